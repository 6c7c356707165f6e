//! Reopening: labels, metadata, segment headers, the live log, a sync, and a fresh checkpoint.
//!
//! Nothing is written before everything has been read and understood, so a pool that cannot be
//! opened is as it was.

use std::collections::BTreeSet;

use base::{BufferMut, Position, Seq};

use crate::api::{DiskError, Notice, OpenError, Output};
use crate::append::ZEROES_MAX;
use crate::batch::SegmentHeader;
use crate::home::ChunkSpace;
use crate::index::Index;
use crate::label::{Label, LabelError, identify};
use crate::layout::{DeviceIndex, LABEL_AREA_BYTES, LABEL_COPY_OFFSET, PAGE, device_index};
use crate::left::{Known, LogLeft};
use crate::metadata::{Entry, Restart};
use crate::owners::Search;
use crate::region::Region;
use crate::replay::{Link, Replay, Replayed};
use crate::segments::{SegmentState, Segments};
use crate::store::{Phase, Store, Task};

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Stage {
    #[default]
    Labels,
    Headers,
    Pages,
    Segments,
    Replay,
    Sync,
    Checkpoint,
    Done,
}

/// A label area that is read by halves, of which each has a copy of the label.
struct Halves {
    /// What cannot be read is no label.
    area: Vec<u8>,
    read: usize,
    error: DiskError,
}

/// A reopening under way.
#[derive(Default)]
pub(crate) struct Opening {
    pub(crate) stage: Stage,
    /// Next thing to read in this stage.
    pub(crate) next: u32,
    pub(crate) in_flight: u32,
    labels: Vec<Label>,
    /// The label area of a device that cannot be read as a whole.
    halves: Option<Halves>,
    pub(crate) region: Region,
    pub(crate) segment_headers: Vec<Option<SegmentHeader>>,
    /// Slots whose replica was deleted by an entry of the journal.
    pub(crate) deleted: BTreeSet<u16>,
    /// Segments whose beginning does not say whose they are.
    pub(crate) unclear: Vec<u32>,
    pub(crate) search: Option<Search>,
    /// Next replica to replay.
    replica: usize,
    stamps: Vec<u64>,
    /// What whoever had the pool in a generation has said of its log, and what is known from that.
    pub(crate) left: Option<(u64, LogLeft)>,
    pub(crate) known: Known,
}

impl Store {
    fn refuse(&mut self, error: OpenError) {
        self.phase = Phase::Closed;
        self.output(Output::Opened(Err(error)));
    }

    pub(crate) fn refuse_metadata(&mut self, what: &'static str) {
        self.refuse(OpenError::Metadata { what });
    }

    /// Refuses for what both copies lack; `errors` says which of them could not be read.
    pub(crate) fn refuse_copies(&mut self, what: &'static str, errors: [Option<DiskError>; 2]) {
        let unread = self.journal.copies.iter().zip(errors).find_map(|((device, _), error)| {
            Some(OpenError::MetadataUnread { what, device: *device, error: error? })
        });
        self.refuse(unread.unwrap_or(OpenError::Metadata { what }));
    }

    /// Starts the next reads, or the next stage.
    pub(crate) fn pump_opening(&mut self) {
        loop {
            let stage = self.opening.stage;
            match stage {
                Stage::Labels => self.read_labels(),
                Stage::Headers => self.read_headers(),
                Stage::Pages => self.read_region(),
                Stage::Segments => self.read_segment_headers(),
                Stage::Replay => {
                    // A log may be empty, and done at once.
                    while self.replay.is_none() && self.opening.stage == Stage::Replay {
                        self.next_replay();
                    }
                }
                Stage::Sync | Stage::Done => {}
                Stage::Checkpoint => {
                    if self.journal.is_idle() {
                        self.opening.stage = Stage::Done;
                        self.opening = Opening { stage: Stage::Done, ..Opening::default() };
                        self.phase = Phase::Open;
                        self.last_append = self.now;
                        self.output(Output::Opened(Ok(())));
                    }
                }
            }
            if self.opening.stage == stage || self.phase != Phase::Opening {
                return;
            }
        }
    }

    fn read_labels(&mut self) {
        if self.opening.in_flight > 0 {
            return;
        }
        let next = self.opening.next as usize;
        if next == self.devices.len() {
            return self.labels_read();
        }
        let Some(buffer) = self.config.buffers.take(LABEL_AREA_BYTES) else {
            return self.starved();
        };
        if self.devices[next].info.bytes < LABEL_AREA_BYTES as u64 {
            let device = device_index(next);
            return self.refuse(OpenError::Label { device, error: LabelError::TooShort });
        }
        self.opening.in_flight = 1;
        let task = Task::Opening { piece: self.opening.next };
        let (offset, length) = match &self.opening.halves {
            None => (0, LABEL_AREA_BYTES),
            Some(halves) => (halves.read * LABEL_COPY_OFFSET, LABEL_COPY_OFFSET),
        };
        self.read(device_index(next), offset as u64, buffer, length, task);
    }

    /// A label area was read, or a half of one.
    fn label_area_read(&mut self, device: DeviceIndex, result: Result<BufferMut, DiskError>) {
        let Some(mut halves) = self.opening.halves.take() else {
            match result {
                Ok(buffer) => self.label_read(device, identify(buffer.payload())),
                Err(error) => {
                    let area = vec![u8::MAX; LABEL_AREA_BYTES];
                    self.opening.halves = Some(Halves { area, read: 0, error });
                }
            }
            return;
        };
        let start = halves.read * LABEL_COPY_OFFSET;
        match result {
            Ok(buffer) => halves.area[start..start + LABEL_COPY_OFFSET]
                .copy_from_slice(&buffer.payload()[..LABEL_COPY_OFFSET]),
            Err(error) => halves.error = error,
        }
        halves.read += 1;
        if start == 0 {
            self.opening.halves = Some(halves);
            return;
        }
        match identify(&halves.area) {
            Ok(label) => self.label_read(device, Ok(label)),
            Err(_) => self.refuse(OpenError::Read { device, error: halves.error }),
        }
    }

    pub(crate) fn opening_read(
        &mut self,
        piece: u32,
        device: DeviceIndex,
        result: Result<BufferMut, DiskError>,
    ) {
        if self.phase != Phase::Opening {
            return;
        }
        self.opening.in_flight -= 1;
        match self.opening.stage {
            Stage::Labels => self.label_area_read(device, result),
            Stage::Headers => self.header_read(piece, &result),
            Stage::Pages => self.region_part_read(piece, result),
            Stage::Segments => self.segment_pages_read(piece, result),
            Stage::Replay | Stage::Sync | Stage::Checkpoint | Stage::Done => {}
        }
    }

    fn label_read(&mut self, device: DeviceIndex, label: Result<Label, LabelError>) {
        let label = label.and_then(|label| {
            let config = &self.config;
            let pool = config.pool.or_else(|| self.opening.labels.first().map(|label| label.pool));
            let pool = pool.unwrap_or(label.pool);
            let devices = u16::try_from(self.devices.len()).unwrap_or(u16::MAX);
            let info = self.devices[usize::from(device.0)].info;
            if label.cluster != config.cluster {
                return Err(LabelError::WrongCluster {
                    found: label.cluster,
                    expected: config.cluster,
                });
            }
            if label.server != config.server {
                return Err(LabelError::WrongServer {
                    found: label.server,
                    expected: config.server,
                });
            }
            if label.pool != pool {
                return Err(LabelError::WrongPool { found: label.pool, expected: pool });
            }
            if label.devices != devices {
                return Err(LabelError::WrongDeviceCount {
                    found: label.devices,
                    expected: devices,
                });
            }
            if label.device != device {
                return Err(LabelError::WrongDevice { found: label.device });
            }
            if label.role != info.role {
                return Err(LabelError::WrongRole);
            }
            if info.bytes < label.device_bytes {
                return Err(LabelError::Shrunk { found: info.bytes, expected: label.device_bytes });
            }
            Ok(label)
        });
        match label {
            Ok(label) => {
                self.opening.labels.push(label);
                self.opening.next += 1;
            }
            Err(error) => self.refuse(OpenError::Label { device, error }),
        }
    }

    fn labels_read(&mut self) {
        let labels = core::mem::take(&mut self.opening.labels);
        let first = labels[0];
        self.pool = first.pool;
        self.geometry = first.geometry;
        self.segments = Segments::new(first.geometry.segment_bytes);
        let (mut chunks, mut segments) = (0_u32, 0_u32);
        for (index, label) in labels.iter().enumerate() {
            if label.geometry != first.geometry {
                return self.refuse_metadata("the devices' labels disagree");
            }
            let device = &mut self.devices[index];
            device.areas = label.areas;
            device.first_chunk = chunks;
            device.first_segment = segments;
            self.segments.add_device(device_index(index), label.areas.segments);
            let sum = chunks.checked_add(label.areas.chunks);
            let (Some(sum), Some(all)) = (sum, segments.checked_add(label.areas.segments)) else {
                return self.refuse_metadata("the labels state impossible sizes");
            };
            (chunks, segments) = (sum, all);
            for copy in 0..2 {
                if label.areas.metadata[copy] != 0 {
                    self.journal.copies[copy] = (device_index(index), label.areas.metadata[copy]);
                }
            }
        }
        let log_pages = u64::from(segments) * (first.geometry.segment_bytes / PAGE);
        if self.journal.copies.iter().any(|(_, offset)| *offset == 0)
            || chunks >= 1 << 30
            || log_pages >= 1 << 29
        {
            return self.refuse_metadata("the labels state impossible sizes");
        }
        self.chunks = ChunkSpace::new(chunks);
        self.index = Index::new(usize::try_from(log_pages).expect("checked"));
        self.opening.next = 0;
        self.opening.stage = Stage::Headers;
    }

    /// Gives each segment to the replica that its header names, if it still counts there.
    pub(crate) fn assign_segments(&mut self) {
        let headers = core::mem::take(&mut self.opening.segment_headers);
        let mut owned: Vec<(u16, u64, u32)> = Vec::new();
        for (index, header) in headers.iter().enumerate() {
            let segment = u32::try_from(index).expect("segments are counted in 32 bits");
            let Some(header) = header else { continue };
            let Some(slot) = self.slot_of(&header.owner, segment) else { continue };
            let ordinal = header.owner.ordinal;
            let replica = self.replica_mut(slot);
            replica.next_ordinal = replica.next_ordinal.max(ordinal + 1);
            if replica.has_ordinal(ordinal) {
                owned.push((slot, ordinal, segment));
            }
        }
        owned.sort_unstable();
        for (slot, ordinal, segment) in owned {
            let header = headers[segment as usize].as_ref().expect("it is owned");
            let before = Seq(header.first_seq.0.saturating_sub(1));
            let state = &mut self.segments.all[segment as usize];
            state.replica = slot;
            state.ordinal = ordinal;
            state.first_seq = header.first_seq;
            state.last_seq = before;
            state.previous_epoch = header.previous_epoch;
            state.last_epoch = header.previous_epoch;
            state.pages = 1;
            state.opened_at = self.now;
            let clean = ordinal < self.replica_ref(slot).flushed_ordinal;
            // The one before ended where this one begins.
            if let Some(previous) = self.replica_ref(slot).segments.back().copied() {
                let pages = self.segments.pages_per_segment();
                let state = &mut self.segments.all[previous as usize];
                state.last_seq = before;
                state.last_epoch = header.previous_epoch;
                state.pages = pages;
            }
            self.replica_mut(slot).segments.push_back(segment);
            let state = if clean { SegmentState::Clean } else { SegmentState::Full };
            self.segments.set_state(segment, state);
        }
        self.opening.segment_headers = headers;
        self.close_assignment();
    }

    /// What the whole of the segments says of each replica, and which segments are nobody's.
    fn close_assignment(&mut self) {
        // A crash may leave batches of a segment and nothing of its beginning, so that it is nobody's. If it were
        // used again under the same ordinal, they would vouch for a log that is not theirs. Of all ordinals that
        // metadata does not know to be used up each had a segment to itself, so that many are left out.
        let unseen = self.segments.all.len() as u64;
        for replica in self.replicas.iter_mut().flatten() {
            let restarted = replica.restarts.iter().map(|restart| restart.ordinal + 1).max();
            replica.next_ordinal = replica
                .next_ordinal
                .max(restarted.unwrap_or(1))
                .max(replica.first_ordinal)
                .max(replica.flushed_ordinal)
                + unseen;
            if let Some(last) = replica.segments.back() {
                let state = &mut self.segments.all[*last as usize];
                if state.state == SegmentState::Clean {
                    state.last_seq = replica.flushed.seq;
                    state.last_epoch = replica.flushed.epoch;
                    state.pages = u32::try_from(self.geometry.segment_bytes / PAGE).expect("1 GiB");
                }
            }
        }
        for (index, state) in self.segments.all.iter().enumerate() {
            if state.state == SegmentState::Free {
                self.segments.free.push_back(u32::try_from(index).expect("32 bits"));
            }
        }
    }

    /// Replays the next replica's log.
    fn next_replay(&mut self) {
        if self.replay.is_some() {
            return;
        }
        let Some(at) =
            (self.opening.replica..self.replicas.len()).find(|at| self.replicas[*at].is_some())
        else {
            self.opening.stamps =
                (0..self.devices.len()).map(|at| self.want_sync(device_index(at))).collect();
            self.opening.stage = Stage::Sync;
            return;
        };
        self.opening.replica = at + 1;
        let replica = self.replicas[at].as_ref().expect("just found");
        let start = replica.home_through();
        let links: Vec<Link> = replica
            .segments
            .iter()
            .filter(|segment| self.segments.all[**segment as usize].state != SegmentState::Clean)
            .map(|segment| {
                let ordinal = self.segments.all[*segment as usize].ordinal;
                Link {
                    segment: *segment,
                    ordinal,
                    header: self.opening.segment_headers[*segment as usize],
                    restart: replica
                        .restarts
                        .iter()
                        .copied()
                        .find(|restart| restart.previous == ordinal),
                }
            })
            .collect();
        // What metadata says of the log was on media before the metadata was.
        let kept = replica.restarts.iter().map(|restart| restart.keep.seq).max();
        let noted = replica.noted_through().max(start.seq);
        let durable = noted.max(kept.unwrap_or(Seq::ZERO));
        let mut replay = Replay::new(replica.slot, start, durable, links);
        if let Some(end) = self.opening.known.end(replica.key) {
            replay.end_at(end);
        }
        self.begin_replay(replay);
        self.pump_replay();
    }

    /// A replica's log has been read to its end.
    pub(crate) fn opening_replayed(&mut self, replay: &Replay, replayed: Replayed) {
        let slot = replay.slot;
        let replica = self.replica_mut(slot);
        let last = replayed.last;
        replica.queued = last;
        replica.issued = last;
        replica.written = last;
        // The sync that follows makes it so before anybody hears of it.
        replica.durable = last.seq;
        replica.commit = replica.commit_durable.max(replayed.commit).min(last.seq);
        replica.next_batch = replayed.next_number;
        replica.previous_crc = 0;
        if replayed.damaged {
            return;
        }
        if last.seq < replica.noted_through() {
            replica.damaged = true;
            let key = replica.key;
            self.output(Output::Notice(crate::api::Notice::Damaged(key)));
            return;
        }
        // All of it is on media before the checkpoint is, which need not rely on the log for it.
        replica.commit_durable = replica.commit;
        (replica.on_media, replica.noted_on_media) = (last.seq, last.seq);
        if replica.filling {
            return;
        }
        let ordinal = replica.next_ordinal;
        let kept = match replayed.end {
            Some((link, page)) => Some((replay.links[link].ordinal, page)),
            None => self.last_clean(slot),
        };
        let entry = if let Some((previous, end_page)) = kept {
            self.void_segments(slot, previous);
            let restart = Restart { ordinal, previous, end_page, keep: last };
            Entry::Restart { replica: slot, restart }
        } else {
            // Also if there is no segment: what a crash has left of some is void, whenever it is found.
            self.void_segments(slot, 0);
            Entry::Trim { replica: slot, ordinal, position: last }
        };
        // It is part of the checkpoint that ends the reopening.
        self.apply_entry(entry);
        if let Some(back) = self.replica_ref(slot).segments.back().copied() {
            let state = &mut self.segments.all[back as usize];
            state.last_seq = last.seq;
            state.last_epoch = last.epoch;
        }
    }

    fn last_clean(&self, slot: u16) -> Option<(u64, u32)> {
        self.replica_ref(slot)
            .segments
            .iter()
            .map(|segment| &self.segments.all[*segment as usize])
            .rfind(|state| state.state == SegmentState::Clean)
            .map(|state| (state.ordinal, state.pages))
    }

    pub(crate) fn opening_synced(&mut self) {
        if self.phase != Phase::Opening || self.opening.stage != Stage::Sync {
            return;
        }
        let done = self
            .devices
            .iter()
            .zip(&self.opening.stamps)
            .all(|(device, stamp)| device.syncs_done >= *stamp);
        if done {
            debug_assert!(self.segments.zeroes <= ZEROES_MAX);
            for (copy, (device, _)) in self.journal.copies.into_iter().enumerate() {
                if self.opening.region.was_damaged(copy) {
                    self.output(Output::Notice(Notice::MetadataMended { device }));
                }
            }
            self.journal.checkpoint_wanted = true;
            self.opening.stage = Stage::Checkpoint;
        }
    }
}

const _: () = assert!(size_of::<Position>() == 16);
