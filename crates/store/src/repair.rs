//! Repair: blocks of home that are damaged here are rewritten with a peer's.
//!
//! Which version is right? A peer's run says through which record it is complete (see `fetch`). If that
//! is at or above everything that may be home here, the peer's block is what home must hold, or something newer that
//! is committed and will come with the log. So a run that says less is refused, and so is, by
//! being left as it is, a block that something in the log covers: that is newer, and on its way home.
//!
//! A block is rewritten in place if home says that it is damaged, or if its checksum is that of the peer's
//! block, whatever is there now: neither can lose anything. A block with another checksum is left.
//! The order is a flush's: data, sync, metadata into the other slot, sync, journal. One run is
//! repaired at a time, and no flush of its replica is under way meanwhile.

use std::collections::VecDeque;

use base::limits::PAGE_BYTES;
use base::{BlockSize, BufferMut, Record, RecordKind, ReplicaError, ReplicaKey, ReplyBody};

use crate::api::Parts;
use crate::cache::Lookup;
use crate::home::{BlockState, ChunkMeta};
use crate::journal::After;
use crate::layout::DeviceIndex;
use crate::metadata::{ChunkPlace, Entry};
use crate::replica::Exclusive;
use crate::store::{Store, Task};

/// Repairs that may wait, at most.
const REPAIRS_MAX: usize = 64;
/// 512-byte blocks of a page.
const PAGE_BLOCKS: usize = PAGE_BYTES / 512;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Blocks are being written; of 512-byte blocks, one page after the other.
    Data,
    DataSync(u64),
    /// Metadata is to be written.
    Meta,
    MetaWritten,
    MetaSync(u64),
    Journal,
}

/// A run under repair.
struct Job {
    tag: u64,
    slot: u16,
    record: Record,
    chunk: u32,
    place: ChunkPlace,
    meta: ChunkMeta,
    /// Indexes in the chunk of the blocks to rewrite, rising.
    blocks: Vec<usize>,
    next: usize,
    /// The state of some block has changed.
    changed: bool,
    in_flight: u32,
    step: Step,
}

/// Repairs under way and to come.
#[derive(Default)]
pub(crate) struct Repair {
    queue: VecDeque<(u64, ReplicaKey, Record)>,
    job: Option<Job>,
}

impl Repair {
    pub(crate) fn is_busy_with(&self, slot: u16) -> bool {
        self.job.as_ref().is_some_and(|job| job.slot == slot)
    }

    /// Nothing will be written any more: the tags of the commands that wait.
    pub(crate) fn abandon(&mut self) -> Vec<u64> {
        let job = self.job.take();
        // The journal's entry has the tag.
        let job = job.filter(|job| job.step != Step::Journal).map(|job| job.tag);
        self.queue.drain(..).map(|(tag, ..)| tag).chain(job).collect()
    }

    fn job(&mut self) -> &mut Job {
        self.job.as_mut().expect("a repair under way")
    }
}

impl Store {
    pub(crate) fn repair(&mut self, tag: u64, key: ReplicaKey, record: Record) {
        let possible = self.find_for_change(key).and_then(|slot| {
            let replica = self.replica_ref(slot);
            let header = record.header();
            let blocks = self.chunk_blocks(replica.block_size) as u64;
            let end = header.lba.checked_add(header.blocks).ok_or(ReplicaError::Invalid)?;
            let fits = header.key == key
                && header.kind == RecordKind::Write
                && header.block_size == replica.block_size
                && end.0 <= replica.blocks
                && header.lba.0 / blocks == (end.0 - 1) / blocks;
            let room = self.repair.queue.len() < REPAIRS_MAX;
            if fits && room { Ok(()) } else { Err(ReplicaError::Invalid) }
        });
        match possible {
            Ok(()) => self.repair.queue.push_back((tag, key, record)),
            Err(error) => self.done(tag, Err(error)),
        }
    }

    pub(crate) fn pump_repair(&mut self) {
        while self.repair.job.is_none() {
            if !self.begin_repair() {
                return;
            }
        }
        match self.repair.job().step {
            Step::Data => self.write_repair(),
            Step::Meta => self.write_repair_meta(),
            Step::DataSync(_) | Step::MetaWritten | Step::MetaSync(_) | Step::Journal => {}
        }
    }

    /// Takes up the next run; false if there is none, or it must wait.
    fn begin_repair(&mut self) -> bool {
        let Some((tag, key, record)) = self.repair.queue.pop_front() else { return false };
        match self.plan_repair(tag, key, record) {
            Ok(None) => true,
            Ok(Some(record)) => {
                self.repair.queue.push_front((tag, key, record));
                false
            }
            Err(error) => {
                self.done(tag, Err(error));
                true
            }
        }
    }

    /// Makes the job; gives the record back if that must wait.
    fn plan_repair(
        &mut self,
        tag: u64,
        key: ReplicaKey,
        record: Record,
    ) -> Result<Option<Record>, ReplicaError> {
        let slot = self.find_for_change(key)?;
        let replica = self.replica_ref(slot);
        if replica.filling {
            return Err(ReplicaError::Filling);
        }
        if replica.damaged {
            return Err(ReplicaError::Damaged);
        }
        if replica.exclusive != Exclusive::None || self.flush.is_busy_with(slot) {
            return Ok(Some(record));
        }
        let header = record.header();
        // No flush begins before the journal has the commit seq that covers it.
        // Seq 1 says nothing at all.
        if header.position.seq < replica.commit_durable.max(base::Seq(2)) {
            return Err(ReplicaError::Behind { last: replica.written });
        }
        let blocks = self.chunk_blocks(replica.block_size);
        let chunk = u32::try_from(header.lba.0 / blocks as u64).expect("a chunk number");
        let Some(place) = replica.chunks.place(chunk) else {
            self.done(tag, Ok(ReplyBody::Done));
            return Ok(None);
        };
        let mut meta = ChunkMeta::default();
        match self.cache.lookup(place.location, place.version) {
            Lookup::Meta(cached) => meta.copy_from(cached),
            Lookup::Damaged => {
                meta.reset(blocks);
                (0..blocks).for_each(|index| meta.set(index, BlockState::Damaged));
            }
            Lookup::Missing => {
                self.fill_cache(slot, chunk, place);
                return Ok(Some(record));
            }
        }
        let mut job = Job {
            tag,
            slot,
            record,
            chunk,
            place,
            meta,
            blocks: Vec::new(),
            next: 0,
            changed: false,
            in_flight: 0,
            step: Step::Data,
        };
        self.choose_blocks(&mut job, blocks);
        self.repair.job = Some(job);
        Ok(None)
    }

    fn choose_blocks(&self, job: &mut Job, chunk_blocks: usize) {
        let header = job.record.header();
        let replica = self.replica_ref(job.slot);
        for number in 0..header.blocks.0 as usize {
            let block = header.lba.0 + number as u64;
            let index = usize::try_from(block % chunk_blocks as u64).expect("in a chunk");
            let in_log = self.index.lookup(job.slot, block).is_some()
                || replica.extents.covering(block).is_some();
            let crc = job.record.block_crc(number);
            let wanted = match job.meta.block(index) {
                BlockState::Damaged => true,
                BlockState::Present(known) => known == crc,
                BlockState::Absent => false,
            };
            if !in_log && wanted {
                job.changed |= job.meta.block(index) == BlockState::Damaged;
                job.meta.set(index, BlockState::Present(crc));
                job.blocks.push(index);
            }
        }
    }

    /// Bytes of a block of the run, by its index in the chunk.
    fn repair_bytes(&self, index: usize) -> core::ops::Range<usize> {
        let job = self.repair.job.as_ref().expect("a repair under way");
        let header = job.record.header();
        let bytes = header.block_size.bytes() as usize;
        let blocks = self.chunk_blocks(header.block_size) as u64;
        let first = usize::try_from(header.lba.0 % blocks).expect("in a chunk");
        (index - first) * bytes..(index - first + 1) * bytes
    }

    fn write_repair(&mut self) {
        let job = self.repair.job();
        let block_size = job.record.header().block_size;
        while self.repair.job().next < self.repair.job().blocks.len() {
            match block_size {
                BlockSize::B4096 => self.write_repair_run(),
                BlockSize::B512 => {
                    if self.repair.job().in_flight == 0 {
                        self.read_repair_page();
                    }
                    return;
                }
            }
        }
        let job = self.repair.job();
        if job.in_flight == 0 {
            let location = job.place.location;
            let device = self.chunk_offset(location).0;
            let stamp = self.want_sync(device);
            self.repair.job().step = Step::DataSync(stamp);
        }
    }

    /// Blocks of 4 KiB that lie next to each other go out as they came.
    fn write_repair_run(&mut self) {
        let job = self.repair.job();
        let first = job.blocks[job.next];
        let rest = &job.blocks[job.next..];
        let count = rest.iter().zip(first..).take_while(|(block, at)| **block == *at).count();
        job.next += count;
        job.in_flight += 1;
        let location = job.place.location;
        let range = self.repair_bytes(first).start..self.repair_bytes(first + count - 1).end;
        let bytes = self.repair.job().record.payload().slice(range);
        let (device, offset) = self.chunk_data_offset(location);
        let offset = offset + (first * PAGE_BYTES) as u64;
        self.write(device, offset, Parts::one(bytes), Task::Repair);
    }

    fn read_repair_page(&mut self) {
        let Some(buffer) = self.take_buffer(PAGE_BYTES) else { return self.starved() };
        let job = self.repair.job();
        job.in_flight += 1;
        let page = job.blocks[job.next] / PAGE_BLOCKS;
        let location = job.place.location;
        let (device, offset) = self.chunk_data_offset(location);
        let offset = offset + (page * PAGE_BYTES) as u64;
        self.read(device, offset, buffer, PAGE_BYTES, Task::Repair);
    }

    /// The page of some 512-byte blocks has been read: puts them in.
    pub(crate) fn repair_read(&mut self, data: Option<BufferMut>) {
        if self.failed.is_some() || self.repair.job.is_none() {
            return;
        }
        let is_readable = data.is_some();
        self.repair.job().in_flight -= 1;
        let Some(mut image) = data.or_else(|| self.config.buffers.take(PAGE_BYTES)) else {
            return self.starved();
        };
        let job = self.repair.job();
        let page = job.blocks[job.next] / PAGE_BLOCKS;
        let in_page = |index: &&usize| **index / PAGE_BLOCKS == page;
        let count = job.blocks[job.next..].iter().take_while(in_page).count();
        let blocks = job.blocks[job.next..job.next + count].to_vec();
        job.next += count;
        job.in_flight += 1;
        if !is_readable {
            image.payload_mut()[..PAGE_BYTES].fill(0);
            for index in page * PAGE_BLOCKS..(page + 1) * PAGE_BLOCKS {
                if !blocks.contains(&index) && job.meta.block(index) != BlockState::Absent {
                    // It cannot be read, and is about to be overwritten.
                    job.meta.set(index, BlockState::Damaged);
                    job.changed = true;
                }
            }
        }
        let location = job.place.location;
        for index in blocks {
            let range = self.repair_bytes(index);
            let bytes = &self.repair.job().record.payload().bytes()[range];
            let at = index % PAGE_BLOCKS * 512;
            image.payload_mut()[at..at + 512].copy_from_slice(bytes);
        }
        let (device, offset) = self.chunk_data_offset(location);
        let offset = offset + (page * PAGE_BYTES) as u64;
        self.write(device, offset, Parts::one(image.freeze().payload(PAGE_BYTES)), Task::Repair);
    }

    pub(crate) fn repair_written(&mut self, device: DeviceIndex) {
        let job = self.repair.job();
        if job.step == Step::MetaWritten {
            let stamp = self.want_sync(device);
            self.repair.job().step = Step::MetaSync(stamp);
        } else {
            job.in_flight -= 1;
        }
    }

    /// Some device has been synced.
    pub(crate) fn repair_synced(&mut self) {
        let Some(job) = &self.repair.job else { return };
        let device = self.chunk_offset(job.place.location).0;
        let done = self.devices[usize::from(device.0)].syncs_done;
        match job.step {
            Step::DataSync(stamp) if done >= stamp && job.changed => {
                self.repair.job().step = Step::Meta;
            }
            Step::DataSync(stamp) if done >= stamp => {
                let tag = job.tag;
                self.repair.job = None;
                self.done(tag, Ok(ReplyBody::Done));
            }
            Step::MetaSync(stamp) if done >= stamp => {
                let (tag, replica, chunk, place) = (job.tag, job.slot, job.chunk, job.place);
                self.repair.job().step = Step::Journal;
                let entry = Entry::Chunk { replica, chunk, place };
                self.journal.push(entry, After::Repaired(tag));
            }
            Step::Data
            | Step::DataSync(_)
            | Step::Meta
            | Step::MetaWritten
            | Step::MetaSync(_)
            | Step::Journal => {}
        }
    }

    fn write_repair_meta(&mut self) {
        let slot = self.repair.job().slot;
        let blocks = self.chunk_blocks(self.replica_ref(slot).block_size);
        let length = ChunkMeta::encoded_bytes(blocks);
        let Some(mut buffer) = self.take_buffer(length) else { return self.starved() };
        self.journal.version = self.journal.version.wrapping_add(1);
        let version = self.journal.version;
        let chunk = self.repair.job().chunk;
        // More damage may have been found meanwhile.
        let known = self.replica_ref(slot).chunks.place(chunk);
        let job = self.repair.job();
        job.place.newest = known.map_or(base::Seq::ZERO, |place| place.newest);
        job.place.slot ^= 1;
        job.place.version = version;
        job.meta.newest = job.place.newest;
        let (chunk, place) = (job.chunk, job.place);
        let identity = self.chunk_identity(self.replica_ref(slot), chunk, place);
        self.repair.job().meta.encode(&identity, &mut buffer.payload_mut()[..length]);
        self.repair.job().step = Step::MetaWritten;
        let (device, offset) = self.chunk_slot_offset(place.location, place.slot);
        self.write(device, offset, Parts::one(buffer.freeze().payload(length)), Task::Repair);
    }

    /// The journal has the chunk's new metadata.
    pub(crate) fn repaired(&mut self, tag: u64) {
        let job = self.repair.job.take().expect("it stays until it counts");
        self.cache.insert(job.place.location, job.place.version, |cached| {
            cached.copy_from(&job.meta);
            true
        });
        self.done(tag, Ok(ReplyBody::Done));
    }
}
