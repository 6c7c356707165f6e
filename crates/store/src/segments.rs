//! The log's segments: whose each is and how full.

use std::collections::VecDeque;

use base::{Instant, Seq};

use crate::index::LogSector;
use crate::layout::{DeviceIndex, PAGE};

/// 512-byte sectors of a page.
pub(crate) const PAGE_SECTORS: u32 = 8;

/// What a segment is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SegmentState {
    /// Nobody's.
    Free,
    /// Being appended to.
    Open,
    /// Not appended to any more; holds data that is not home.
    Full,
    /// Everything is home, but a truncation after seqs below `barrier` would need it.
    Settling,
    /// Everything is home for good; kept for scans until its space is wanted.
    Clean,
    /// The journal is about to say that it is free.
    Trimming,
}

impl SegmentState {
    /// Whether a recovery reads it.
    fn is_replayed(self) -> bool {
        match self {
            Self::Open | Self::Full | Self::Settling => true,
            Self::Free | Self::Clean | Self::Trimming => false,
        }
    }
}

/// One segment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Segment {
    pub(crate) device: DeviceIndex,
    pub(crate) state: SegmentState,
    pub(crate) replica: u16,
    pub(crate) ordinal: u64,
    pub(crate) first_seq: Seq,
    pub(crate) last_seq: Seq,
    /// Epoch of the record before `first_seq`.
    pub(crate) previous_epoch: base::Epoch,
    /// Epoch of the record `last_seq`.
    pub(crate) last_epoch: base::Epoch,
    /// Pages written or being written.
    pub(crate) pages: u32,
    /// Index entries that point here.
    pub(crate) live: u32,
    /// Block records, whether still current or not: its share of the index budget.
    pub(crate) blocks: u32,
    /// Discards and zeroes: its share of the extent budget.
    pub(crate) zeroes: u32,
    pub(crate) opened_at: Instant,
    pub(crate) barrier: Seq,
}

/// All segments of the pool.
pub(crate) struct Segments {
    pub(crate) all: Vec<Segment>,
    pub(crate) free: VecDeque<u32>,
    pub(crate) segment_bytes: u64,
    /// Segments in state `Open` or `Full`.
    pub(crate) dirty: usize,
    /// Segments in state `Full`.
    pub(crate) full: usize,
    /// Segments in state `Clean`.
    pub(crate) clean: usize,
    /// Sum of `blocks` over segments that a recovery would replay.
    pub(crate) blocks: u64,
    /// Sum of `zeroes` over the same.
    pub(crate) zeroes: u64,
}

impl Segments {
    pub(crate) fn new(segment_bytes: u64) -> Self {
        Self {
            all: Vec::new(),
            free: VecDeque::new(),
            segment_bytes,
            dirty: 0,
            full: 0,
            clean: 0,
            blocks: 0,
            zeroes: 0,
        }
    }

    pub(crate) fn add_device(&mut self, device: DeviceIndex, count: u32) {
        self.all.extend((0..count).map(|_| Segment {
            device,
            state: SegmentState::Free,
            replica: 0,
            ordinal: 0,
            first_seq: Seq::ZERO,
            previous_epoch: base::Epoch::NONE,
            last_seq: Seq::ZERO,
            last_epoch: base::Epoch::NONE,
            pages: 0,
            live: 0,
            blocks: 0,
            zeroes: 0,
            opened_at: Instant::ZERO,
            barrier: Seq::ZERO,
        }));
    }

    pub(crate) fn pages_per_segment(&self) -> u32 {
        u32::try_from(self.segment_bytes / PAGE).expect("a segment is at most 1 GiB")
    }

    /// The place of a page of a segment.
    pub(crate) fn sector(&self, segment: u32, page: u32) -> LogSector {
        LogSector((segment * self.pages_per_segment() + page) * PAGE_SECTORS)
    }

    /// The segment of a place, and the byte within it.
    pub(crate) fn locate(&self, sector: LogSector) -> (u32, u64) {
        let per_segment = self.pages_per_segment() * PAGE_SECTORS;
        (sector.0 / per_segment, u64::from(sector.0 % per_segment) * 512)
    }

    pub(crate) fn of(&self, sector: LogSector) -> usize {
        (sector.0 / (self.pages_per_segment() * PAGE_SECTORS)) as usize
    }

    pub(crate) fn set_state(&mut self, segment: u32, state: SegmentState) {
        let segment_index = segment;
        let segment = &mut self.all[segment as usize];
        let replayed = |state: SegmentState| u64::from(state.is_replayed());
        let dirty = |state| usize::from(matches!(state, SegmentState::Open | SegmentState::Full));
        let full = |state| usize::from(state == SegmentState::Full);
        let clean = |state| usize::from(state == SegmentState::Clean);
        let old = segment.state;
        segment.state = state;
        self.dirty = self.dirty + dirty(state) - dirty(old);
        self.full = self.full + full(state) - full(old);
        self.clean = self.clean + clean(state) - clean(old);
        let (blocks, zeroes) = (u64::from(segment.blocks), u64::from(segment.zeroes));
        self.blocks = self.blocks + replayed(state) * blocks - replayed(old) * blocks;
        self.zeroes = self.zeroes + replayed(state) * zeroes - replayed(old) * zeroes;
        if state == SegmentState::Free {
            assert_eq!(segment.live, 0, "no block is found in a free segment");
            segment.blocks = 0;
            segment.zeroes = 0;
            if old != SegmentState::Free {
                self.free.push_back(segment_index);
            }
        }
    }

    /// Bytes that a recovery would read now.
    pub(crate) fn recovery_bytes(&self) -> u64 {
        let replayed = self.all.iter().filter(|segment| segment.state.is_replayed());
        replayed.map(|segment| u64::from(segment.pages) * PAGE).sum()
    }

    /// Forgets what a segment was charged with: its records are about to be replayed.
    pub(crate) fn uncharge(&mut self, segment: u32) {
        let segment = &mut self.all[segment as usize];
        self.blocks -= u64::from(core::mem::take(&mut segment.blocks));
        self.zeroes -= u64::from(core::mem::take(&mut segment.zeroes));
    }

    /// Adds records to a segment's share of the budgets.
    pub(crate) fn charge(&mut self, segment: u32, blocks: u32, zeroes: u32) {
        let segment = &mut self.all[segment as usize];
        segment.blocks += blocks;
        segment.zeroes += zeroes;
        self.blocks += u64::from(blocks);
        self.zeroes += u64::from(zeroes);
    }
}
