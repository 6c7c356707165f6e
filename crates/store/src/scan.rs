//! Scans: a record as it is in the log. Batch headers are walked from the segment's start, or
//! from where the last scan left off, so that a peer that asks for one record after the other
//! costs one header read each.

use base::limits::{PAGE_BYTES, PAYLOAD_BYTES_MAX};
use base::{BufferMut, Record, RecordHeader, ReplicaError, ReplicaKey, ReplyBody, Seq};

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
    buffer: Option<BufferMut>,
    segment: u32,
    ordinal: u64,
    page: u32,
    /// The record's header has been found; its payload is being read.
    found: Option<RecordHeader>,
}

/// The scans under way.
#[derive(Default)]
pub(crate) struct Scans {
    all: Vec<Scan>,
    free: Vec<u32>,
    waiting: Vec<u32>,
}

impl Store {
    pub(crate) fn start_scan(&mut self, tag: u64, key: ReplicaKey, seq: Seq, buffer: BufferMut) {
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
            return self.done(tag, Err(ReplicaError::Damaged));
        };
        let state = &self.segments.all[segment as usize];
        if state.state == SegmentState::Trimming {
            return self.done(tag, Err(ReplicaError::Trimmed { trimmed: state.last_seq }));
        }
        let ordinal = self.segments.all[segment as usize].ordinal;
        let hint = replica.scan_hint;
        let page = if hint.ordinal == ordinal && hint.first_seq <= seq { hint.page } else { 1 };
        let scan = Scan {
            tag,
            replica: slot,
            incarnation: replica.incarnation,
            seq,
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
        self.read_scan_header(id);
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
        // As many pages as a header may have, so that one read is enough.
        let count = (pages - scan.page).min(u32::try_from(BATCH_HEADER_PAGES_MAX).expect("few"));
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
        let tag = scan.tag;
        self.reads.scans.free.push(id);
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
        self.replica_mut(slot).scan_hint = hint;
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

    fn finish_scan(&mut self, id: u32, buffer: BufferMut) {
        let result = Record::decode(buffer).map_err(|_| ReplicaError::Damaged);
        self.end_scan(id, result.map(ReplyBody::Record));
    }
}
