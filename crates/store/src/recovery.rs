//! Reopening: labels, metadata, segment headers, the live log, a sync, and a fresh checkpoint.
//!
//! Nothing is written before everything has been read and understood, so a pool that cannot be
//! opened is as it was.

use std::collections::BTreeSet;

use base::limits::{PAGE_BYTES, PAYLOAD_BYTES_MAX};
use base::{BufferMut, Position, Seq};

use crate::api::{DiskError, Notice, OpenError, Output};
use crate::append::ZEROES_MAX;
use crate::batch::SegmentHeader;
use crate::bytes::Reader;
use crate::home::ChunkSpace;
use crate::index::Index;
use crate::label::{Label, LabelError, identify};
use crate::layout::{DeviceIndex, LABEL_AREA_BYTES, LABEL_COPY_OFFSET, PAGE, device_index};
use crate::metadata::{Entry, PAGE_HEADER_BYTES, Page, PageKind, Restart};
use crate::owners::Search;
use crate::replay::{Link, Replay, Replayed};
use crate::segments::{SegmentState, Segments};
use crate::store::{Phase, Store, Task};

/// Chunk versions that a reopening skips: those that an unfinished flush may have used.
const VERSIONS_SKIPPED: u32 = 1 << 16;
/// Pages of metadata read at a time.
const PIECE_PAGES: u32 = 32;
const _: () = assert!(PIECE_PAGES as usize * PAGE_BYTES == PAYLOAD_BYTES_MAX);

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

/// The header page of a region in one copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Header {
    Whole {
        generation: u64,
        pages: u32,
        crc: u32,
    },
    /// Wiped, or never written.
    Blank,
    /// Being written when power went, or rotten.
    Broken,
    Unread(DiskError),
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
    /// The four region headers: copy × 2 + region.
    headers: Vec<Header>,
    checkpoint_pages: u32,
    /// A longer read failed: one page at a time up to this one.
    fine: u32,
    /// What came of pages that could not be read, of each copy.
    errors: [Option<DiskError>; 2],
    /// Which copies had pages that were not whole and should have been.
    broken: [bool; 2],
    /// The piece's pages from the first copy, while the second's are being read.
    first_copy: Option<Result<BufferMut, DiskError>>,
    journal_ended: bool,
    pub(crate) segment_headers: Vec<Option<SegmentHeader>>,
    /// Slots whose replica was deleted by an entry of the journal.
    pub(crate) deleted: BTreeSet<u16>,
    /// Segments whose beginning does not say whose they are.
    pub(crate) unclear: Vec<u32>,
    pub(crate) search: Option<Search>,
    /// Next replica to replay.
    replica: usize,
    stamps: Vec<u64>,
}

impl Store {
    fn refuse(&mut self, error: OpenError) {
        self.phase = Phase::Closed;
        self.output(Output::Opened(Err(error)));
    }

    fn refuse_metadata(&mut self, what: &'static str) {
        self.refuse(OpenError::Metadata { what });
    }

    /// Refuses for what both copies lack; `errors` says which of them could not be read.
    fn refuse_copies(&mut self, what: &'static str, errors: [Option<DiskError>; 2]) {
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
                Stage::Pages => self.read_piece(),
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
            Stage::Headers => {
                self.opening.next += 1;
                let header = self.header_of(result);
                self.opening.headers.push(header);
            }
            Stage::Pages => match self.opening.first_copy.take() {
                None => self.opening.first_copy = Some(result),
                Some(first) => self.take_piece(&[first, result]),
            },
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

    fn read_headers(&mut self) {
        if self.opening.in_flight > 0 {
            return;
        }
        let next = self.opening.next;
        if next == 4 {
            return self.headers_read();
        }
        let Some(buffer) = self.config.buffers.take(PAGE_BYTES) else { return self.starved() };
        let (device, offset) = self.journal.copies[next as usize / 2];
        let offset = offset + u64::from(next % 2) * self.geometry.region_bytes();
        self.opening.in_flight = 1;
        self.read(device, offset, buffer, PAGE_BYTES, Task::Opening { piece: next });
    }

    fn header_of(&self, result: Result<BufferMut, DiskError>) -> Header {
        let buffer = match result {
            Ok(buffer) => buffer,
            Err(error) => return Header::Unread(error),
        };
        let bytes = &buffer.payload()[..PAGE_BYTES];
        match Page::decode(bytes, PageKind::Header, self.pool) {
            Some((page, crc)) => {
                Header::Whole { generation: page.generation, pages: page.length, crc }
            }
            None if is_blank(bytes) => Header::Blank,
            None => Header::Broken,
        }
    }

    fn headers_read(&mut self) {
        let headers = core::mem::take(&mut self.opening.headers);
        let of_region = |region: usize| [headers[region], headers[2 + region]];
        let error = |header| match header {
            Header::Unread(error) => Some(error),
            Header::Whole { .. } | Header::Blank | Header::Broken => None,
        };
        let newest = (0..2_u64)
            .zip([of_region(0), of_region(1)])
            .flat_map(|(region, copies)| copies.map(|header| (region, header)))
            .filter_map(|(region, header)| match header {
                Header::Whole { generation, pages, crc } => Some((generation, region, pages, crc)),
                Header::Blank | Header::Broken | Header::Unread(_) => None,
            })
            .max();
        let Some((generation, region, pages, crc)) = newest else {
            let either = [0, 2].map(|copy| error(headers[copy]).or(error(headers[copy + 1])));
            return self.refuse_copies("no checkpoint header is whole", either);
        };
        // The other region is the newer one unless a copy of its header says that it is not. What is
        // whole is older, and a header is on media in both copies before anything counts there.
        let other = of_region(usize::from(region == 0));
        let is_older = |header: &Header| matches!(header, Header::Whole { .. } | Header::Blank);
        let errors = other.map(error);
        if errors != [None; 2] && !other.iter().any(is_older) {
            return self.refuse_copies("a checkpoint may be newer than all that is whole", errors);
        }
        if pages > self.geometry.checkpoint_pages {
            return self.refuse_metadata("the checkpoint header states an impossible length");
        }
        self.journal.generation = generation;
        self.journal.region = region;
        self.journal.previous_crc = crc;
        self.opening.checkpoint_pages = pages;
        (self.opening.next, self.opening.fine) = (0, 0);
        self.opening.stage = Stage::Pages;
    }

    /// Reads the next piece of the region: checkpoint pages, then journal pages, each from both
    /// copies.
    fn read_piece(&mut self) {
        if self.opening.in_flight > 0 {
            return;
        }
        let next = self.opening.next;
        let total = self.opening.checkpoint_pages + self.geometry.journal_pages;
        if next >= total {
            return self.pages_read();
        }
        let Some(buffer) = self.config.buffers.take(PAYLOAD_BYTES_MAX) else {
            return self.starved();
        };
        let (page, count) = self.piece(next);
        let copy = usize::from(self.opening.first_copy.is_some());
        let (device, offset) = self.journal.copies[copy];
        let offset =
            offset + self.journal.region * self.geometry.region_bytes() + u64::from(page) * PAGE;
        self.opening.in_flight = 1;
        let length = count as usize * PAGE_BYTES;
        self.read(device, offset, buffer, length, Task::Opening { piece: next });
    }

    /// The page in the region, and the number of pages, of the piece that begins with the `next`
    /// of all used pages.
    fn piece(&self, next: u32) -> (u32, u32) {
        let used = self.opening.checkpoint_pages;
        let most = if next < self.opening.fine { 1 } else { PIECE_PAGES };
        if next < used {
            (1 + next, most.min(used - next))
        } else {
            let total = used + self.geometry.journal_pages;
            (1 + self.geometry.checkpoint_pages + next - used, most.min(total - next))
        }
    }

    fn take_piece(&mut self, copies: &[Result<BufferMut, DiskError>; 2]) {
        let next = self.opening.next;
        let (_, count) = self.piece(next);
        let errors = copies.each_ref().map(|copy| copy.as_ref().err().copied());
        if count > 1 && errors != [None; 2] {
            // A sector that cannot be read is no reason to do without those beside it.
            self.opening.fine = next + count;
            return;
        }
        for (known, error) in self.opening.errors.iter_mut().zip(errors) {
            *known = known.or(error);
        }
        for number in 0..count {
            let at = number as usize * PAGE_BYTES;
            let pages = copies.each_ref().map(|copy| {
                let buffer = copy.as_ref().ok()?;
                Some(&buffer.payload()[at..at + PAGE_BYTES])
            });
            let good = if next < self.opening.checkpoint_pages {
                self.take_checkpoint_page(next + number, pages)
            } else {
                self.take_journal_page(next + number - self.opening.checkpoint_pages, pages)
            };
            if let Err(what) = good {
                return self.refuse_copies(what, self.opening.errors);
            }
        }
        self.opening.next += count;
    }

    fn take_checkpoint_page(
        &mut self,
        number: u32,
        copies: [Option<&[u8]>; 2],
    ) -> Result<(), &'static str> {
        let generation = self.journal.generation;
        let mut whole = None;
        for (copy, bytes) in copies.into_iter().enumerate() {
            let Some(bytes) = bytes else { continue };
            match Page::decode(bytes, PageKind::Checkpoint, self.pool) {
                Some((page, _))
                    if page.generation == generation && page.number == u64::from(number) =>
                {
                    whole = Some((bytes, page.length));
                }
                Some(_) | None => self.opening.broken[copy] = true,
            }
        }
        let (bytes, length) = whole.ok_or("a page of the checkpoint is lost in both copies")?;
        self.take_entries(bytes, length)
    }

    fn take_journal_page(
        &mut self,
        number: u32,
        copies: [Option<&[u8]>; 2],
    ) -> Result<(), &'static str> {
        for bytes in copies.into_iter().flatten() {
            let Some((page, crc)) = Page::decode(bytes, PageKind::Journal, self.pool) else {
                continue;
            };
            if page.generation != self.journal.generation || page.number != u64::from(number) {
                continue;
            }
            if self.opening.journal_ended {
                // A commit was whole before the next one was begun.
                return Err("a page of the journal is lost in both copies");
            }
            if page.previous_crc == self.journal.previous_crc {
                self.journal.previous_crc = crc;
                return self.take_entries(bytes, page.length);
            }
        }
        // What cannot be read may be the next page, unless the other copy says that it is not: a page
        // is on media in both before anything in it counts. What is neither whole nor as it was
        // before says nothing: it may have been cut off, or have been whole and be rotten.
        let unread = copies.contains(&None);
        let is_older = |bytes: &[u8]| {
            let page = Page::decode(bytes, PageKind::Journal, self.pool);
            is_blank(bytes)
                || page.is_some_and(|(page, _)| page.generation < self.journal.generation)
        };
        let known = self.opening.journal_ended || copies.into_iter().flatten().any(is_older);
        if unread && !known {
            return Err("the journal may go on after all that is whole");
        }
        self.opening.journal_ended = true;
        Ok(())
    }

    fn take_entries(&mut self, page: &[u8], length: u32) -> Result<(), &'static str> {
        let mut reader = Reader::new(&page[PAGE_HEADER_BYTES..PAGE_HEADER_BYTES + length as usize]);
        while !reader.is_empty() {
            let entry = Entry::decode(&mut reader).ok_or("an entry is of an unknown kind")?;
            if !self.apply_entry(entry) {
                return Err("an entry contradicts those before it");
            }
        }
        Ok(())
    }

    fn pages_read(&mut self) {
        self.journal.version = self.journal.version.wrapping_add(VERSIONS_SKIPPED);
        let segments = self.segments.all.len();
        self.opening.segment_headers = vec![None; segments];
        self.opening.next = 0;
        self.opening.stage = Stage::Segments;
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
        for replica in self.replicas.iter_mut().flatten() {
            let restarted = replica.restarts.iter().map(|restart| restart.ordinal + 1).max();
            replica.next_ordinal = replica
                .next_ordinal
                .max(restarted.unwrap_or(1))
                .max(replica.first_ordinal)
                .max(replica.flushed_ordinal);
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
        let slot = replica.slot;
        self.begin_replay(Replay::new(slot, start, durable, links));
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
        let ordinal = replica.next_ordinal;
        if replica.segments.is_empty() {
            return;
        }
        let kept = match replayed.end {
            Some((link, page)) => Some((replay.links[link].ordinal, page)),
            None => self.last_clean(slot),
        };
        let entry = if let Some((previous, end_page)) = kept {
            self.void_segments(slot, previous);
            let restart = Restart { ordinal, previous, end_page, keep: last };
            Entry::Restart { replica: slot, restart }
        } else {
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
                if self.opening.broken[copy] || self.opening.errors[copy].is_some() {
                    self.output(Output::Notice(Notice::MetadataMended { device }));
                }
            }
            self.journal.checkpoint_wanted = true;
            self.opening.stage = Stage::Checkpoint;
        }
    }
}

fn is_blank(page: &[u8]) -> bool {
    page.iter().all(|byte| *byte == 0)
}

const _: () = assert!(size_of::<Position>() == 16);
