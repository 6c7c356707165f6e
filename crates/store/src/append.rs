//! Appends: records become batches, batches become gathered writes, completions become answers.
//!
//! A batch takes whatever has come since the last one left; a few are in flight at a time. It
//! counts when it and every batch before it has been written, and only then do its records enter
//! the index. Answers leave in seq order; one that promises media waits for a sync of the device,
//! which serves everybody who waits for it.

use base::limits::{PAGE_BYTES, PAYLOAD_BYTES_MAX};
use base::planted::{self, Bug};
use base::{Position, Record, RecordKind, ReplicaError, ReplicaKey, ReplyBody, Seq};

use crate::api::{Parts, Stall};
use crate::batch::{
    BATCH_FIXED_BYTES, BATCH_PAYLOAD_BYTES_MAX, BATCH_RECORDS_MAX, BatchHeader, Owner,
    SegmentHeader, payload_pages,
};
use crate::index::{Entry as IndexEntry, LogSector};
use crate::journal::After;
use crate::layout::{DeviceIndex, PAGE};
use crate::metadata::Entry;
use crate::replica::{Answer, Batch, Exclusive, Pending, ScanHint, Undurable};
use crate::segments::{PAGE_SECTORS, SegmentState};
use crate::store::{Store, Task};

/// Batches of one replica in flight, at most.
const BATCHES_MAX: usize = 4;
/// Discards and zeroes in the log that are not home, at most.
pub(crate) const ZEROES_MAX: u64 = 32 * 1024;
/// Segments that only an EpochStart may take: an opening must get through a full log.
const SEGMENTS_RESERVED: usize = 1;

/// How much of a replica's pending records goes into a batch.
#[derive(Clone, Copy, Debug, Default)]
struct Fit {
    records: usize,
    header_bytes: usize,
    payload_pages: u32,
    blocks: u32,
    zeroes: u32,
}

impl Fit {
    fn header_pages(&self) -> u32 {
        u32::try_from(self.header_bytes.div_ceil(PAGE_BYTES)).expect("a few pages")
    }
}

/// Why no batch could be made.
enum Blocked {
    /// The segment has no room for the next record.
    Segment,
    Stall(Stall),
}

impl Store {
    pub(crate) fn append(
        &mut self,
        tag: u64,
        key: ReplicaKey,
        record: Record,
        commit: Seq,
        media: bool,
    ) {
        let slot = match self.find_for_change(key) {
            Ok(slot) => slot,
            Err(error) => return self.done(tag, Err(error)),
        };
        self.last_append = self.now;
        self.last_used = self.now;
        self.note_settled_later();
        let replica = self.replica_mut(slot);
        let header = record.header();
        let last = replica.queued;
        let error = if replica.filling {
            Some(ReplicaError::Filling)
        } else if replica.damaged {
            Some(ReplicaError::Damaged)
        } else if header.key != key
            || header.block_size != replica.block_size
            || header.lba.checked_add(header.blocks).is_none_or(|end| end.0 > replica.blocks_coming)
        {
            Some(ReplicaError::Invalid)
        } else if replica.exclusive != Exclusive::None
            || header.position.seq != last.seq.next()
            || header.previous_epoch != last.epoch
        {
            Some(ReplicaError::OutOfOrder { last })
        } else {
            None
        };
        if let Some(error) = error {
            return self.done(tag, Err(error));
        }
        replica.queued = header.position;
        replica.answers.push_back(Answer { seq: header.position.seq, tag, media });
        replica.pending.push_back(Pending { record });
        replica.note_commit(commit);
        self.note_progress(slot);
        self.make_ready(slot);
    }

    pub(crate) fn make_ready(&mut self, slot: u16) {
        let replica = self.replica_mut(slot);
        if !replica.ready {
            replica.ready = true;
            self.ready.push(slot);
        }
    }

    /// Answers what has not been started after `keep` with `error`; the log then ends before it.
    pub(crate) fn drop_pending(&mut self, slot: u16, keep: Seq, error: ReplicaError) {
        let replica = self.replica_mut(slot);
        let mut tags = Vec::new();
        while replica.queued.seq > keep.max(replica.issued.seq) {
            let pending = replica.pending.pop_back().expect("what is queued and not issued pends");
            let answer = replica.answers.pop_back().expect("every append has an answer");
            assert_eq!(answer.seq, replica.queued.seq);
            let header = pending.record.header();
            replica.queued = Position::new(header.previous_epoch, Seq(header.position.seq.0 - 1));
            tags.push(answer.tag);
        }
        replica.commit = replica.commit.min(replica.queued.seq);
        for tag in tags.into_iter().rev() {
            self.done(tag, Err(error));
        }
        self.note_progress(slot);
    }

    /// Writes what has come, as far as there is room.
    pub(crate) fn pump_appends(&mut self) {
        let mut stalled = None;
        let mut ready = core::mem::take(&mut self.ready);
        ready.retain(|slot| {
            loop {
                let Some(replica) = self.replicas[usize::from(*slot)].as_mut() else {
                    return false;
                };
                if replica.pending.is_empty()
                    || replica.batches.len() >= BATCHES_MAX
                    // Goes on when the journal has the growth.
                    || !replica.is_grown_for(replica.pending[0].record.header())
                {
                    replica.ready = false;
                    return false;
                }
                match self.issue_batch(*slot) {
                    Ok(true) => {}
                    Ok(false) => return true,
                    Err(stall) => {
                        stalled = Some(stall);
                        return true;
                    }
                }
            }
        });
        self.ready = ready;
        if let Some(stall) = stalled {
            let home_full = self.flush.home_full;
            self.set_stalled(Some(if home_full { Stall::HomeFull } else { stall }));
        } else {
            self.set_stalled(None);
        }
    }

    /// The records that a batch with `room` pages takes.
    fn fit(&self, slot: u16, room: u32) -> Result<Fit, Blocked> {
        let replica = self.replica_ref(slot);
        let mut fit = Fit { header_bytes: BATCH_FIXED_BYTES, ..Fit::default() };
        let mut blocked = Blocked::Segment;
        for pending in replica.pending.iter().take(BATCH_RECORDS_MAX) {
            let header = pending.record.header();
            if !replica.is_grown_for(header) {
                break;
            }
            let mut next = fit;
            next.records += 1;
            next.header_bytes += pending.record.header_bytes().len();
            next.payload_pages += payload_pages(header);
            match header.kind {
                RecordKind::Write => next.blocks += header.blocks.0,
                RecordKind::Discard | RecordKind::WriteZeroes => next.zeroes += 1,
                RecordKind::EpochStart => {}
            }
            let blocks = self.segments.blocks + u64::from(next.blocks);
            if blocks > self.index.entries_max() as u64
                || self.segments.zeroes + u64::from(next.zeroes) > ZEROES_MAX
            {
                blocked = Blocked::Stall(Stall::IndexFull);
                break;
            }
            let bytes = next.payload_pages as usize * PAGE_BYTES;
            if bytes > BATCH_PAYLOAD_BYTES_MAX
                || next.header_bytes > PAYLOAD_BYTES_MAX
                || next.header_pages() + next.payload_pages > room
            {
                break;
            }
            fit = next;
        }
        if fit.records == 0 { Err(blocked) } else { Ok(fit) }
    }

    /// Writes one batch; false if memory was short.
    fn issue_batch(&mut self, slot: u16) -> Result<bool, Stall> {
        let pages_max = self.segments.pages_per_segment();
        let open = self.open_segment(slot);
        let room = open.map_or(0, |open| pages_max - self.segments.all[open as usize].pages);
        let fit = match self.fit(slot, room) {
            Ok(fit) => Some(fit),
            Err(Blocked::Stall(stall)) => return Err(stall),
            Err(Blocked::Segment) => None,
        };
        let (segment, fit, fresh) = if let (Some(open), Some(fit)) = (open, fit) {
            (open, fit, false)
        } else {
            let (segment, fit) = self.fresh_segment(slot, pages_max)?;
            (segment, fit, true)
        };
        let Some(header_buffer) = self.config.buffers.take(fit.header_bytes) else {
            self.starved();
            return Ok(false);
        };
        let mut parts = Parts::new();
        if fresh {
            let Some(mut buffer) = self.config.buffers.take(PAGE_BYTES) else {
                self.starved();
                return Ok(false);
            };
            self.close_open_segment(slot);
            let header = self.begin_segment(slot, segment);
            header.encode(&mut buffer.payload_mut()[..PAGE_BYTES]);
            parts.push(buffer.freeze().payload(PAGE_BYTES));
        }
        self.write_batch(slot, segment, fit, header_buffer, parts);
        Ok(true)
    }

    /// The next free segment, if this replica's next record may have it, and what fits there.
    fn fresh_segment(&self, slot: u16, pages: u32) -> Result<(u32, Fit), Stall> {
        let fit = match self.fit(slot, pages - 1) {
            Ok(fit) => fit,
            Err(Blocked::Stall(stall)) => return Err(stall),
            Err(Blocked::Segment) => unreachable!("one record fits a fresh segment"),
        };
        let first = &self.replica_ref(slot).pending[0];
        let reserved = match first.record.header().kind {
            RecordKind::EpochStart => 0,
            RecordKind::Write | RecordKind::Discard | RecordKind::WriteZeroes => SEGMENTS_RESERVED,
        };
        if self.segments.free.len() <= reserved {
            return Err(Stall::LogFull);
        }
        Ok((self.segments.free[0], fit))
    }

    fn open_segment(&self, slot: u16) -> Option<u32> {
        let last = *self.replica_ref(slot).segments.back()?;
        (self.segments.all[last as usize].state == SegmentState::Open).then_some(last)
    }

    pub(crate) fn close_open_segment(&mut self, slot: u16) {
        if let Some(open) = self.open_segment(slot) {
            self.segments.set_state(open, SegmentState::Full);
            self.search_again();
        }
    }

    fn owner(&self, slot: u16, segment: u32) -> Owner {
        let replica = self.replica_ref(slot);
        Owner {
            pool: self.pool,
            key: replica.key,
            incarnation: replica.incarnation,
            segment,
            ordinal: self.segments.all[segment as usize].ordinal,
        }
    }

    fn begin_segment(&mut self, slot: u16, segment: u32) -> SegmentHeader {
        let taken = self.segments.free.pop_front();
        assert_eq!(taken, Some(segment));
        let replica = self.replicas[usize::from(slot)].as_mut().expect("a slot in use");
        let ordinal = replica.next_ordinal;
        replica.next_ordinal += 1;
        replica.segments.push_back(segment);
        let state = &mut self.segments.all[segment as usize];
        assert_eq!(state.state, SegmentState::Free);
        state.replica = slot;
        state.ordinal = ordinal;
        state.first_seq = replica.issued.seq.next();
        state.last_seq = replica.issued.seq;
        state.previous_epoch = replica.issued.epoch;
        state.last_epoch = replica.issued.epoch;
        state.pages = 1;
        state.opened_at = self.now;
        let header = SegmentHeader {
            owner: Owner {
                pool: self.pool,
                key: replica.key,
                incarnation: replica.incarnation,
                segment,
                ordinal,
            },
            previous_crc: replica.previous_crc,
            first_seq: replica.issued.seq.next(),
            first_batch: replica.next_batch,
            previous_epoch: replica.issued.epoch,
        };
        self.segments.set_state(segment, SegmentState::Open);
        self.search_again();
        header
    }

    fn write_batch(
        &mut self,
        slot: u16,
        segment: u32,
        fit: Fit,
        mut buffer: base::BufferMut,
        mut parts: Parts,
    ) {
        let owner = self.owner(slot, segment);
        let page = self.segments.all[segment as usize].pages;
        // The segment header, if it is part of this write, lies before the batch.
        let write_page = page - u32::try_from(parts.count()).expect("none or one");
        let mut records = self.spare_records.pop().unwrap_or_default();
        let replica = self.replicas[usize::from(slot)].as_mut().expect("a slot in use");
        let header = BatchHeader {
            owner,
            previous_crc: replica.previous_crc,
            first_seq: replica.issued.seq.next(),
            number: replica.next_batch,
            commit: replica.commit,
            durable: replica.durable,
            page,
            payload_pages: fit.payload_pages,
            header_bytes: u32::try_from(fit.header_bytes).expect("a few pages"),
            records: u16::try_from(fit.records).expect("a few records"),
            header_pages: u16::try_from(fit.header_pages()).expect("a few pages"),
        };
        let bytes = buffer.payload_mut();
        let mut at = BATCH_FIXED_BYTES;
        for pending in replica.pending.drain(..fit.records) {
            let encoded = pending.record.header_bytes().bytes();
            bytes[at..at + encoded.len()].copy_from_slice(encoded);
            at += encoded.len();
            records.push(pending.record);
        }
        assert_eq!(at, fit.header_bytes);
        replica.previous_crc = header.encode(bytes);
        replica.next_batch += 1;
        let last = records.last().expect("a batch has records").header().position;
        replica.issued = last;
        let (ordinal, first_seq) = (header.owner.ordinal, header.first_seq);
        replica.scan_hints.written(ScanHint { ordinal, page, first_seq });
        parts.push(buffer.freeze().payload(fit.header_pages() as usize * PAGE_BYTES));
        for record in &records {
            if !record.payload().is_empty() {
                let padded = record.payload().len().next_multiple_of(PAGE_BYTES);
                parts.push(record.payload().extended(padded));
            }
        }
        let payload_page = page + fit.header_pages();
        let number = header.number;
        let incarnation = replica.incarnation;
        replica.batches.push_back(Batch {
            number,
            segment,
            payload_page,
            records,
            last,
            done: false,
        });
        let state = &mut self.segments.all[segment as usize];
        state.pages += header.pages();
        state.last_seq = last.seq;
        state.last_epoch = last.epoch;
        let device = state.device;
        self.segments.charge(segment, fit.blocks, fit.zeroes);
        let offset = self.segment_offset(segment) + u64::from(write_page) * PAGE;
        self.write(device, offset, parts, Task::Batch { replica: slot, incarnation, number });
    }

    /// A segment's byte offset on its device.
    pub(crate) fn segment_offset(&self, segment: u32) -> u64 {
        let device = self.segments.all[segment as usize].device;
        let device = &self.devices[usize::from(device.0)];
        device.areas.log_offset
            + u64::from(segment - device.first_segment) * self.geometry.segment_bytes
    }

    pub(crate) fn batch_written(
        &mut self,
        slot: u16,
        incarnation: u32,
        number: u64,
        device: DeviceIndex,
    ) {
        let Some(replica) = self.same_replica(slot, incarnation) else { return };
        if let Some(batch) = replica.batches.iter_mut().find(|batch| batch.number == number) {
            batch.done = true;
        }
        let stamp = self.next_sync(device);
        // A batch that completed before its predecessor may be covered by a later sync than
        // necessary, never by an earlier one: the stamp is taken when it begins to count.
        while let Some(batch) = self.next_done_batch(slot) {
            self.index_batch(slot, &batch);
            let batch_device = self.segments.all[batch.segment as usize].device;
            let stamp = if batch_device == device { stamp } else { self.next_sync(batch_device) };
            let replica = self.replica_mut(slot);
            replica.written = batch.last;
            let entry = Undurable { seq: batch.last.seq, device: batch_device, stamp };
            match replica.undurable.back_mut() {
                Some(back) if back.device == batch_device && back.stamp == stamp => *back = entry,
                _ => replica.undurable.push_back(entry),
            }
            let mut records = batch.records;
            records.clear();
            self.spare_records.push(records);
        }
        if !self.replica_ref(slot).pending.is_empty() {
            self.make_ready(slot);
        }
        self.settle(slot);
    }

    fn next_done_batch(&mut self, slot: u16) -> Option<Batch> {
        let batches = &mut self.replica_mut(slot).batches;
        if batches.front()?.done { batches.pop_front() } else { None }
    }

    fn index_batch(&mut self, slot: u16, batch: &Batch) {
        let mut page = batch.payload_page;
        for record in &batch.records {
            let header = record.header();
            let sector = self.segments.sector(batch.segment, page);
            self.index_record(slot, header, sector, |block| record.block_crc(block));
            page += payload_pages(header);
        }
    }

    /// Lets a record that is in the log take effect.
    pub(crate) fn index_record(
        &mut self,
        slot: u16,
        header: &base::RecordHeader,
        sector: LogSector,
        crc: impl Fn(usize) -> u32,
    ) {
        let start = header.lba.0;
        let end = start + u64::from(header.blocks.0);
        match header.kind {
            RecordKind::Write => {
                let step = PAGE_SECTORS >> (12 - header.block_size.log2());
                let segment = self.segments.of(sector);
                let mut at = sector.0;
                for (number, block) in (start..end).enumerate() {
                    let entry = IndexEntry { sector: LogSector(at), crc: crc(number) };
                    if let Some(old) = self.index.insert(slot, block, entry) {
                        let old = self.segments.of(old.sector);
                        self.segments.all[old].live -= 1;
                    }
                    self.segments.all[segment].live += 1;
                    at += step;
                }
            }
            RecordKind::Discard | RecordKind::WriteZeroes => {
                for block in start..end {
                    if self.index.entries() == 0 {
                        break;
                    }
                    if let Some(old) = self.index.remove(slot, block) {
                        let old = self.segments.of(old.sector);
                        self.segments.all[old].live -= 1;
                    }
                }
                let seq = header.position.seq.0;
                self.replica_mut(slot).extents.insert(start, end, seq);
            }
            RecordKind::EpochStart => {}
        }
    }

    pub(crate) fn flush_command(&mut self, tag: u64, key: ReplicaKey) {
        match self.find_for_change(key) {
            Ok(slot) => {
                let replica = self.replica_mut(slot);
                if replica.filling {
                    return self.done(tag, Err(ReplicaError::Filling));
                }
                // Not what waits for room: room may have to wait for this flush, since only what
                // heads have had put on media goes home.
                replica.flushes.push_back((replica.issued.seq, tag));
                self.settle(slot);
            }
            Err(error) => self.done(tag, Err(error)),
        }
    }

    /// A device was synced: what of this replica is durable now?
    pub(crate) fn replica_synced(&mut self, slot: usize) {
        let Some(replica) = &mut self.replicas[slot] else { return };
        let mut moved = false;
        while let Some(front) = replica.undurable.front() {
            if self.devices[usize::from(front.device.0)].syncs_done < front.stamp
                && !planted::is(Bug::SyncNotAwaited)
            {
                break;
            }
            replica.durable = front.seq;
            replica.undurable.pop_front();
            moved = true;
        }
        if moved {
            let slot = replica.slot;
            self.note_settled_later();
            self.settle(slot);
        }
    }

    /// Answers what can be answered, and asks for the syncs that the rest waits for.
    pub(crate) fn settle(&mut self, slot: u16) {
        loop {
            let replica = self.replica_mut(slot);
            let (written, durable) = (replica.written.seq, replica.durable);
            let Some(front) = replica.answers.front().copied() else { break };
            let media = front.media && !planted::is(Bug::AckBeforeMedia);
            if front.seq > written || media && front.seq > durable {
                break;
            }
            replica.answers.pop_front();
            self.done(front.tag, Ok(ReplyBody::Appended { durable }));
        }
        loop {
            let replica = self.replica_mut(slot);
            let durable = replica.durable;
            // Truncation may have taken what was to be flushed.
            let queued = replica.queued.seq;
            match replica.flushes.front().copied() {
                Some((seq, tag)) if seq.min(queued) <= durable => {
                    replica.flushes.pop_front();
                    self.done(tag, Ok(ReplyBody::Flushed { durable }));
                }
                Some(_) | None => break,
            }
        }
        let replica = self.replica_mut(slot);
        let written = replica.written.seq;
        let flush = replica.flushes.iter().map(|(seq, _)| *seq).rfind(|seq| *seq <= written);
        let media = replica.answers.front().map(|answer| answer.seq).filter(|seq| *seq <= written);
        if let Some(target) = flush.max(media) {
            self.want_durable(slot, target);
        }
        self.settle_seals(slot);
        self.unpark_reads(slot);
        self.note_progress(slot);
    }

    /// Asks for the syncs that make this replica durable through `target`, if it is written.
    pub(crate) fn want_durable(&mut self, slot: u16, target: Seq) {
        let count = self.replica_ref(slot).undurable.len();
        for index in 0..count {
            let entry = self.replica_ref(slot).undurable[index];
            self.want_sync_number(entry.device, entry.stamp);
            if entry.seq >= target {
                break;
            }
        }
    }

    fn settle_seals(&mut self, slot: u16) {
        let replica = self.replica_mut(slot);
        if !replica.batches.is_empty() && !planted::is(Bug::NoGateOnDeparture) {
            return;
        }
        let seals = core::mem::take(&mut replica.seals);
        for (epoch, tag) in seals {
            if planted::is(Bug::SealNotPersisted) {
                self.replica_mut(slot).sealed = epoch;
                self.after_entry(Entry::Seal { replica: slot, epoch }, After::Sealed(tag));
                continue;
            }
            self.journal.push(Entry::Seal { replica: slot, epoch }, After::Sealed(tag));
        }
    }
}
