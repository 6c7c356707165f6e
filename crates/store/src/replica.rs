//! What a store keeps in memory of one replica.

use std::collections::VecDeque;

use base::planted::{self, Bug};
use base::{BlockSize, Epoch, Position, Record, RecordHeader, ReplicaKey, ReplicaState, Seq};

use crate::extents::Extents;
use crate::home::ChunkMap;
use crate::layout::DeviceIndex;
use crate::metadata::Restart;

/// A record that has come and is not being written yet.
#[derive(Debug)]
pub(crate) struct Pending {
    pub(crate) record: Record,
}

/// A batch being written.
#[derive(Debug)]
pub(crate) struct Batch {
    pub(crate) number: u64,
    pub(crate) segment: u32,
    /// First page of the payloads in the segment.
    pub(crate) payload_page: u32,
    pub(crate) records: Vec<Record>,
    pub(crate) last: Position,
    pub(crate) done: bool,
}

/// An append that has not been answered.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Answer {
    pub(crate) seq: Seq,
    pub(crate) tag: u64,
    pub(crate) media: bool,
}

/// Records through `seq` are on media when `device` has done sync number `stamp`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Undurable {
    pub(crate) seq: Seq,
    pub(crate) device: DeviceIndex,
    pub(crate) stamp: u64,
}

/// What keeps a replica from taking appends and from being flushed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exclusive {
    /// Nothing.
    None,
    /// To be deleted, for this command, when nothing is under way.
    Delete(u64),
    /// To be truncated after this seq, for this command, when nothing is under way.
    Truncate(u64, Seq),
    /// To lose its log and be filled, for this command, when nothing is under way.
    Fill(u64),
    /// To be truncated, index being rebuilt.
    Rebuilding(u64, Seq),
    /// The delete, restart or filling is in the journal's hands.
    Journal,
}

/// What keeps the first segment of a replica that is not home from going there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Obstacle {
    /// Nothing, or what says itself when it is over.
    Other,
    /// The segment is full and ends with this seq, which is not written or not settled.
    Unsettled(Seq),
    /// The segment is the one that is appended to: something of it is not written, not settled, or about
    /// to come.
    Unrest,
    /// This seq is not on media; the sync is asked for.
    Durable(Seq),
}

/// One replica.
pub(crate) struct Replica {
    pub(crate) slot: u16,
    pub(crate) key: ReplicaKey,
    pub(crate) incarnation: u32,
    pub(crate) block_size: BlockSize,
    pub(crate) blocks: u64,
    /// Its size once the journal has what it was given: appends and reads within are accepted.
    pub(crate) blocks_coming: u64,

    // What metadata says; changed only when the journal has it.
    pub(crate) sealed: Epoch,
    pub(crate) first_ordinal: u64,
    pub(crate) trimmed: Position,
    pub(crate) flushed_ordinal: u64,
    pub(crate) flushed: Position,
    pub(crate) commit_durable: Seq,
    /// The log was on media through here.
    pub(crate) on_media: Seq,
    pub(crate) restarts: Vec<Restart>,
    pub(crate) chunks: ChunkMap,
    /// Its home is being filled from a peer's: it has no log.
    pub(crate) filling: bool,
    /// Through which seq the chunks that were kept hold every record, while it is being filled.
    pub(crate) kept_through: Seq,

    // The log.
    pub(crate) segments: VecDeque<u32>,
    pub(crate) next_ordinal: u64,
    pub(crate) next_batch: u64,
    pub(crate) previous_crc: u32,
    /// The last record that has come.
    pub(crate) queued: Position,
    /// The last record that is or was being written.
    pub(crate) issued: Position,
    /// The last record such that it and all before are written.
    pub(crate) written: Position,
    pub(crate) durable: Seq,
    pub(crate) commit: Seq,
    /// The journal has been given this as settled, or more.
    pub(crate) noted: Seq,
    /// What `on_media` will be once the journal has what it was given.
    pub(crate) noted_on_media: Seq,
    pub(crate) pending: VecDeque<Pending>,
    pub(crate) batches: VecDeque<Batch>,
    pub(crate) answers: VecDeque<Answer>,
    pub(crate) undurable: VecDeque<Undurable>,
    pub(crate) flushes: VecDeque<(Seq, u64)>,
    pub(crate) seals: VecDeque<(Epoch, u64)>,
    /// Reads that wait for a record that has come and is not written.
    pub(crate) parked: VecDeque<u32>,
    pub(crate) extents: Extents,
    /// The log has lost durable records: what is not in the index is not known.
    pub(crate) damaged: bool,
    pub(crate) exclusive: Exclusive,
    /// As the last search for something to flush has seen it.
    pub(crate) obstacle: Obstacle,
    /// In the store's list of replicas with something to append.
    pub(crate) ready: bool,
    /// Where the next scan probably finds its record.
    pub(crate) scan_hints: ScanHints,
}

/// The batch that follows a scanned record's, or is it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ScanHint {
    pub(crate) ordinal: u64,
    pub(crate) page: u32,
    pub(crate) first_seq: Seq,
}

/// Of a few scans that go on at the same time, each finds its own. And the last batch that was written is known: a
/// scan of the log's end neither walks there nor stumbles over what has become of those before.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ScanHints {
    hints: [ScanHint; 8],
    oldest: usize,
    written: ScanHint,
}

impl ScanHints {
    /// The page of the last known batch of segment `ordinal` that begins at or before `seq`.
    pub(crate) fn page(&self, ordinal: u64, seq: Seq) -> Option<u32> {
        let fits = |hint: &&ScanHint| hint.ordinal == ordinal && hint.first_seq <= seq;
        let hints = self.hints.iter().chain([&self.written]).filter(fits);
        hints.max_by_key(|hint| hint.first_seq).map(|hint| hint.page)
    }

    /// A batch is written after all others.
    pub(crate) fn written(&mut self, hint: ScanHint) {
        self.written = hint;
    }

    pub(crate) fn put(&mut self, hint: ScanHint) {
        let same = |other: &ScanHint| other.ordinal == hint.ordinal && other.page == hint.page;
        if self.hints.iter().any(same) {
            return;
        }
        self.hints[self.oldest] = hint;
        self.oldest = (self.oldest + 1) % self.hints.len();
    }
}

impl Replica {
    pub(crate) fn new(
        slot: u16,
        key: ReplicaKey,
        incarnation: u32,
        block_size: BlockSize,
        blocks: u64,
        chunk_blocks: u64,
    ) -> Self {
        Self {
            slot,
            key,
            incarnation,
            block_size,
            blocks,
            blocks_coming: blocks,
            sealed: Epoch::NONE,
            first_ordinal: 1,
            trimmed: Position::ZERO,
            flushed_ordinal: 1,
            flushed: Position::ZERO,
            commit_durable: Seq::ZERO,
            on_media: Seq::ZERO,
            noted: Seq::ZERO,
            noted_on_media: Seq::ZERO,
            restarts: Vec::new(),
            chunks: ChunkMap::new(blocks.div_ceil(chunk_blocks)),
            filling: false,
            kept_through: Seq::ZERO,
            segments: VecDeque::new(),
            next_ordinal: 1,
            next_batch: 1,
            previous_crc: 0,
            queued: Position::ZERO,
            issued: Position::ZERO,
            written: Position::ZERO,
            durable: Seq::ZERO,
            commit: Seq::ZERO,
            pending: VecDeque::new(),
            batches: VecDeque::new(),
            answers: VecDeque::new(),
            undurable: VecDeque::new(),
            flushes: VecDeque::new(),
            seals: VecDeque::new(),
            parked: VecDeque::new(),
            extents: Extents::default(),
            damaged: false,
            exclusive: Exclusive::None,
            obstacle: Obstacle::Other,
            ready: false,
            scan_hints: ScanHints::default(),
        }
    }

    pub(crate) fn state(&self) -> ReplicaState {
        ReplicaState {
            sealed: self.sealed,
            last: self.written,
            durable: self.durable,
            commit: self.commit,
            trimmed: self.trimmed.seq,
            filling: self.filling,
            damaged: self.damaged,
            blocks: self.blocks,
        }
    }

    /// The record is within what metadata says of the size.
    pub(crate) fn is_grown_for(&self, header: &RecordHeader) -> bool {
        header.lba.0 + u64::from(header.blocks.0) <= self.blocks
    }

    /// The index does not have everything that is in the log.
    pub(crate) fn is_rebuilding(&self) -> bool {
        match self.exclusive {
            Exclusive::Rebuilding(..) | Exclusive::Journal => true,
            Exclusive::None
            | Exclusive::Delete(_)
            | Exclusive::Truncate(..)
            | Exclusive::Fill(_) => false,
        }
    }

    /// Everything through `seq` is written, and nothing of it is ever truncated.
    pub(crate) fn is_settled(&self, seq: Seq) -> bool {
        let settled = seq <= self.commit || planted::is(Bug::UncommittedHome);
        settled && seq <= self.written.seq
    }

    /// Every record through here is home, or what came after it in the log is settled.
    pub(crate) fn home_through(&self) -> Position {
        if self.flushed_ordinal > self.first_ordinal { self.flushed } else { self.trimmed }
    }

    /// Metadata says that nothing through here is ever truncated.
    pub(crate) fn settled(&mut self, seq: Seq) {
        self.commit_durable = self.commit_durable.max(seq);
    }

    /// Metadata says that the log is on media through here.
    pub(crate) fn noted_through(&self) -> Seq {
        self.commit_durable.max(self.on_media)
    }

    /// News of the commit seq. Beyond what has come it says nothing about this log: only an
    /// append that fits proves that the log is the head's.
    pub(crate) fn note_commit(&mut self, commit: Seq) {
        self.commit = self.commit.max(commit.min(self.queued.seq));
    }

    /// Whether segment `ordinal`, if there is one, is part of the log: not trimmed and not cut off.
    pub(crate) fn has_ordinal(&self, ordinal: u64) -> bool {
        let is_void = |restart: &Restart| restart.previous < ordinal && ordinal < restart.ordinal;
        ordinal >= self.first_ordinal && !self.restarts.iter().any(is_void)
    }

    /// Takes note of a restart: those it makes void are forgotten.
    pub(crate) fn note_restart(&mut self, restart: Restart) {
        self.restarts.retain(|old| old.ordinal <= restart.previous);
        // A restart in the same segment is narrowed by the newer one.
        self.restarts.retain(|old| old.previous < restart.previous);
        self.restarts.push(restart);
    }
}
