//! Scans: a record as it is in the log, or as many as one read of the log brings. Batch headers are
//! walked from the segment's start, or from where an earlier scan left off, so that a peer that asks
//! for one record after the other costs one header read each, and one that asks for runs of them
//! a read a run.

use std::collections::VecDeque;

use base::limits::{PAGE_BYTES, PAYLOAD_BYTES_MAX};
use base::packed;
use base::{
    BufferMut, Record, RecordError, RecordHeader, ReplicaError, ReplicaKey, ReplyBody, Seq,
};

use crate::batch::{BATCH_FIXED_BYTES, BATCH_HEADER_PAGES_MAX, BatchHeader, Owner, payload_pages};
use crate::layout::PAGE;
use crate::replica::ScanHint;
use crate::segments::SegmentState;
use crate::store::{Store, Task};

#[derive(Debug, Default)]
struct Scan {
    tag: u64,
    replica: u16,
    incarnation: u32,
    seq: Seq,
    /// Of a run: how many records at most. Zero: one record, as such.
    records: u32,
    buffer: Option<BufferMut>,
    segment: u32,
    ordinal: u64,
    page: u32,
    /// The record's header has been found; its payload is being read.
    found: Option<RecordHeader>,
}

/// Pages of the log that are read for a run of records.
const RUN_PAGES: usize = PAYLOAD_BYTES_MAX / PAGE_BYTES;
const _: () = assert!(RUN_PAGES >= BATCH_HEADER_PAGES_MAX);

/// The scans under way. Runs go one after the other: each begins where the one before has found the
/// log to go on, instead of walking there by itself.
#[derive(Default)]
pub(crate) struct Scans {
    all: Vec<Scan>,
    free: Vec<u32>,
    waiting: Vec<u32>,
    /// A run is under way.
    running: bool,
    /// Those that are next.
    line: VecDeque<u32>,
}

impl Store {
    /// `records`: of a run, how many at most; zero: one record, as such.
    pub(crate) fn start_scan(
        &mut self,
        tag: u64,
        key: ReplicaKey,
        (seq, records): (Seq, u32),
        buffer: BufferMut,
    ) {
        let slot = match self.find(key) {
            Ok(slot) => slot,
            Err(error) => return self.done(tag, Err(error)),
        };
        let replica = self.replica_ref(slot);
        if replica.filling {
            return self.done(tag, Err(ReplicaError::Filling));
        }
        if seq > replica.written.seq {
            let last = replica.written;
            return self.done(tag, Err(ReplicaError::Behind { last }));
        }
        if seq <= replica.trimmed.seq {
            let trimmed = replica.trimmed.seq;
            return self.done(tag, Err(ReplicaError::Trimmed { trimmed }));
        }
        let position = replica
            .segments
            .partition_point(|segment| self.segments.all[*segment as usize].last_seq < seq);
        let found = replica.segments.get(position).copied();
        let Some(segment) =
            found.filter(|segment| self.segments.all[*segment as usize].first_seq <= seq)
        else {
            // A truncation to what is home has no segment any more, and is not yet journaled.
            let last = replica.home_through();
            let cut = replica.is_rebuilding() && seq > last.seq;
            let error = if cut { ReplicaError::Behind { last } } else { ReplicaError::Damaged };
            return self.done(tag, Err(error));
        };
        let state = &self.segments.all[segment as usize];
        if state.state == SegmentState::Trimming {
            return self.done(tag, Err(ReplicaError::Trimmed { trimmed: state.last_seq }));
        }
        let ordinal = self.segments.all[segment as usize].ordinal;
        let page = replica.scan_hints.page(ordinal, seq).unwrap_or(1);
        let scan = Scan {
            tag,
            replica: slot,
            incarnation: replica.incarnation,
            seq,
            records,
            buffer: Some(buffer),
            segment,
            ordinal,
            page,
            found: None,
        };
        let id = self.reads.scans.free.pop().unwrap_or_else(|| {
            self.reads.scans.all.push(Scan::default());
            u32::try_from(self.reads.scans.all.len() - 1).expect("scans are bounded")
        });
        self.reads.scans.all[id as usize] = scan;
        if records > 0 && self.reads.scans.running {
            self.reads.scans.line.push_back(id);
            return;
        }
        self.reads.scans.running |= records > 0;
        self.read_scan_header(id);
    }

    /// A run has ended: the next one.
    fn next_run(&mut self) {
        let Some(id) = self.reads.scans.line.pop_front() else {
            self.reads.scans.running = false;
            return;
        };
        let scan = &self.reads.scans.all[id as usize];
        let (slot, ordinal, seq) = (scan.replica, scan.ordinal, scan.seq);
        let known = self.same_replica(slot, scan.incarnation);
        if let Some(page) = known.and_then(|replica| replica.scan_hints.page(ordinal, seq)) {
            self.reads.scans.all[id as usize].page = page;
        }
        self.reads.scans.waiting.push(id);
    }

    pub(crate) fn pump_scans(&mut self) {
        for id in core::mem::take(&mut self.reads.scans.waiting) {
            self.read_scan_header(id);
        }
    }

    fn read_scan_header(&mut self, id: u32) {
        let scan = &self.reads.scans.all[id as usize];
        let pages = self.segments.pages_per_segment();
        if scan.page >= pages {
            return self.end_scan(id, Err(ReplicaError::Damaged));
        }
        // As many pages as a header may have, so that one read is enough; for a run, as many batches as
        // a buffer holds.
        let most = if scan.records == 0 { BATCH_HEADER_PAGES_MAX } else { RUN_PAGES };
        let count = (pages - scan.page).min(u32::try_from(most).expect("few"));
        let length = count as usize * PAGE_BYTES;
        let (segment, page) = (scan.segment, scan.page);
        let Some(buffer) = self.take_buffer(length.max(PAYLOAD_BYTES_MAX / 2)) else {
            self.reads.scans.waiting.push(id);
            return self.starved();
        };
        let device = self.segments.all[segment as usize].device;
        let offset = self.segment_offset(segment) + u64::from(page) * PAGE;
        self.read(device, offset, buffer, length, Task::Scan { scan: id });
    }

    fn end_scan(&mut self, id: u32, result: Result<ReplyBody, ReplicaError>) {
        let scan = &mut self.reads.scans.all[id as usize];
        scan.buffer = None;
        let (tag, run) = (scan.tag, scan.records > 0);
        self.reads.scans.free.push(id);
        if run {
            self.next_run();
        }
        self.done(tag, result);
    }

    /// Trimmed, truncated or deleted while the scan was under way?
    fn scan_is_void(&mut self, id: u32) -> Option<ReplicaError> {
        let scan = &self.reads.scans.all[id as usize];
        let (segment, ordinal, seq) = (scan.segment, scan.ordinal, scan.seq);
        let (slot, incarnation) = (scan.replica, scan.incarnation);
        let state = self.segments.all[segment as usize];
        let Some(replica) = self.same_replica(slot, incarnation) else {
            return Some(ReplicaError::NoReplica);
        };
        if seq > replica.written.seq {
            return Some(ReplicaError::Behind { last: replica.written });
        }
        let trimmed = replica.trimmed.seq;
        if seq <= trimmed || state.replica != slot || state.ordinal != ordinal {
            return Some(ReplicaError::Trimmed { trimmed: trimmed.max(seq) });
        }
        None
    }

    pub(crate) fn scan_read(&mut self, id: u32, data: Option<BufferMut>) {
        if let Some(error) = self.scan_is_void(id) {
            return self.end_scan(id, Err(error));
        }
        let Some(data) = data else { return self.end_scan(id, Err(ReplicaError::Damaged)) };
        if self.reads.scans.all[id as usize].found.is_some() {
            return self.finish_scan(id, data);
        }
        let scan = &self.reads.scans.all[id as usize];
        let (page, seq, segment) = (scan.page, scan.seq, scan.segment);
        let replica = self.replica_ref(scan.replica);
        let owner = Owner {
            pool: self.pool,
            key: replica.key,
            incarnation: replica.incarnation,
            segment,
            ordinal: scan.ordinal,
        };
        if scan.records > 0 {
            return self.scan_run(id, &owner, &data);
        }
        let Some((header, _)) = BatchHeader::decode(data.payload(), &owner, page) else {
            return self.end_scan(id, Err(ReplicaError::Damaged));
        };
        let end = header.first_seq.0 + u64::from(header.records);
        if seq.0 < header.first_seq.0 {
            return self.end_scan(id, Err(ReplicaError::Damaged));
        }
        if seq.0 >= end {
            let scan = &mut self.reads.scans.all[id as usize];
            scan.page = page + header.pages();
            return self.read_scan_header(id);
        }
        let hint = ScanHint { ordinal: owner.ordinal, page, first_seq: header.first_seq };
        let slot = scan.replica;
        self.replica_mut(slot).scan_hints.put(hint);
        self.read_scan_payload(id, &header, &data);
    }

    /// The batch has the record: copies its header out and reads its payload.
    fn read_scan_payload(&mut self, id: u32, batch: &BatchHeader, data: &BufferMut) {
        let bytes = &data.payload()[..batch.header_bytes as usize];
        let mut at = BATCH_FIXED_BYTES;
        let mut page = batch.page + u32::from(batch.header_pages);
        let seq = self.reads.scans.all[id as usize].seq;
        let mut found = None;
        for _ in 0..batch.records {
            let Ok(header) = RecordHeader::decode(&bytes[at..]) else { break };
            if header.position.seq == seq {
                found = Some(header);
                break;
            }
            at += header.header_bytes();
            page += payload_pages(&header);
        }
        let Some(header) = found else { return self.end_scan(id, Err(ReplicaError::Damaged)) };
        let scan = &mut self.reads.scans.all[id as usize];
        let mut buffer = scan.buffer.take().expect("a scan has its buffer");
        if buffer.capacity() < header.payload_bytes().next_multiple_of(PAGE_BYTES) {
            return self.end_scan(id, Err(ReplicaError::Invalid));
        }
        let encoded = &bytes[at..at + header.header_bytes()];
        buffer.header_mut()[..encoded.len()].copy_from_slice(encoded);
        scan.found = Some(header);
        let segment = scan.segment;
        let length = payload_pages(&header) as usize * PAGE_BYTES;
        if length == 0 {
            return self.finish_scan(id, buffer);
        }
        let device = self.segments.all[segment as usize].device;
        let offset = self.segment_offset(segment) + u64::from(page) * PAGE;
        self.read(device, offset, buffer, length, Task::Scan { scan: id });
    }

    /// Several batches, or a part of the last, are here: takes out what is whole of what was asked
    /// for, or reads on if that comes later.
    fn scan_run(&mut self, id: u32, owner: &Owner, data: &BufferMut) {
        let scan = &mut self.reads.scans.all[id as usize];
        let mut buffer = scan.buffer.take().expect("a scan has its buffer");
        let (slot, from, segment) = (scan.replica, scan.page, scan.segment);
        let pages = (self.segments.pages_per_segment() - from) as usize;
        let bytes = &data.payload()[..pages.min(RUN_PAGES) * PAGE_BYTES];
        let end = self.segments.all[segment as usize].last_seq;
        let last = self.replica_ref(slot).written.seq.min(end);
        let scan = &self.reads.scans.all[id as usize];
        let last = last.min(Seq(scan.seq.0.saturating_add(u64::from(scan.records) - 1)));
        let mut run = Run { next: scan.seq, last, used: 0, hint: None };
        match run.take(bytes, owner, from, buffer.payload_mut()) {
            Taken::Nothing => self.end_scan(id, Err(ReplicaError::Damaged)),
            Taken::Later { page } => {
                let scan = &mut self.reads.scans.all[id as usize];
                scan.page = page;
                scan.buffer = Some(buffer);
                self.read_scan_header(id);
            }
            Taken::Some => {
                if let Some(hint) = run.hint {
                    self.replica_mut(slot).scan_hints.put(hint);
                }
                let records = buffer.freeze().payload(run.used);
                self.end_scan(id, Ok(ReplyBody::Records(records)));
            }
        }
    }

    fn finish_scan(&mut self, id: u32, buffer: BufferMut) {
        let result = Record::decode(buffer).map_err(|_| ReplicaError::Damaged);
        self.end_scan(id, result.map(ReplyBody::Record));
    }
}

/// Records that are taken out of pages of the log.
struct Run {
    next: Seq,
    last: Seq,
    /// Bytes of them.
    used: usize,
    /// The batch that the last one is in.
    hint: Option<ScanHint>,
}

/// What was in the pages.
enum Taken {
    /// Some, perhaps none: the first one is there, and too large.
    Some,
    /// The first one is in a batch from this page on.
    Later { page: u32 },
    /// What is there is not what must be.
    Nothing,
}

impl Run {
    /// Takes the records from `next` to `last` out of `bytes`, which begin with the batch at page `from`.
    fn take(&mut self, bytes: &[u8], owner: &Owner, from: u32, out: &mut [u8]) -> Taken {
        let first = self.next;
        let mut at = 0;
        while self.next <= self.last && at < bytes.len() {
            let page = from + u32::try_from(at / PAGE_BYTES).expect("pages of a buffer");
            let Some((batch, _)) = BatchHeader::decode(&bytes[at..], owner, page) else {
                // It may have been cut off: read on from there if nothing was found before.
                let found = self.next > first;
                return if found {
                    Taken::Some
                } else if at > 0 {
                    Taken::Later { page }
                } else {
                    Taken::Nothing
                };
            };
            if self.next < batch.first_seq {
                return if self.next > first { Taken::Some } else { Taken::Nothing };
            }
            let ends = batch.first_seq.0 + u64::from(batch.records);
            if self.next.0 < ends {
                match self.take_batch(&batch, &bytes[at..], out) {
                    Ok(true) => {}
                    Ok(false) if at > 0 && self.next == first => return Taken::Later { page },
                    Ok(false) => return Taken::Some,
                    Err(_) if self.next > first => return Taken::Some,
                    Err(_) => return Taken::Nothing,
                }
            }
            at += batch.pages() as usize * PAGE_BYTES;
        }
        let page = from + u32::try_from(at / PAGE_BYTES).expect("pages of a buffer");
        if self.next == first { Taken::Later { page } } else { Taken::Some }
    }

    /// Takes those that are in a batch, as far as there is room and it is all there: false if not.
    fn take_batch(
        &mut self,
        batch: &BatchHeader,
        bytes: &[u8],
        out: &mut [u8],
    ) -> Result<bool, RecordError> {
        let mut at = BATCH_FIXED_BYTES;
        let mut payload = usize::from(batch.header_pages) * PAGE_BYTES;
        for _ in 0..batch.records {
            let header = RecordHeader::decode(&bytes[at..batch.header_bytes as usize])?;
            let length = payload_pages(&header) as usize * PAGE_BYTES;
            if header.position.seq == self.next && self.next <= self.last {
                let Some(blocks) = bytes.get(payload..payload + length) else { return Ok(false) };
                let Some(used) = packed::pack(&bytes[at..], blocks, out, self.used)? else {
                    return Ok(false);
                };
                self.used = used;
                self.next = self.next.next();
                let Owner { ordinal, .. } = batch.owner;
                let (page, first_seq) = (batch.page, batch.first_seq);
                self.hint = Some(ScanHint { ordinal, page, first_seq });
            }
            at += header.header_bytes();
            payload += length;
        }
        Ok(true)
    }
}
