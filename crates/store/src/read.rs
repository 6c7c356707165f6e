//! Reads. Each block comes from where its newest data is: the log through the index, zeroes by an
//! extent, or home through the chunk's metadata; and is verified against the checksum kept there.
//!
//! Nothing is pinned while a read is under way. When a block does not match, its source is
//! looked up again: if that has changed, the read starts over; if not, the data is damaged.

use std::collections::VecDeque;

use base::checksum::crc32c;
use base::limits::{PAGE_BYTES, PAYLOAD_BYTES_MAX};
use base::planted::{self, Bug};
use base::{BlockCount, BufferMut, Lba, Record, ReplicaError, ReplicaKey, ReplyBody, Seq};

use crate::cache::{Lookup, Wanted};
use crate::fetch::Fetch;
use crate::home::{BlockState, ChunkIdentity, ChunkMeta};
use crate::index::LogSector;
use crate::layout::{DeviceIndex, PAGE};
use crate::metadata::ChunkPlace;
use crate::replica::Replica;
use crate::store::{Store, Task};

/// Small and large buffers that reads and flushing leave to batches and the journal.
pub(crate) const BUFFERS_RESERVED: (usize, usize) = (16, 4);
/// Fragments of one read under way at a time.
const FRAGMENTS_MAX: usize = 16;
/// How often a read may start over because its data moved.
const ATTEMPTS_MAX: u32 = 64;

/// Names a fragment of a read under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FragmentId {
    read: u32,
    fragment: u16,
}

/// Where a block's data is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    Zero,
    Damaged,
    Log(LogSector, u32),
    Home { location: u32, version: u32, crc: u32 },
}

impl Source {
    fn crc(self) -> Option<u32> {
        match self {
            Self::Zero | Self::Damaged => None,
            Self::Log(_, crc) | Self::Home { crc, .. } => Some(crc),
        }
    }
}

/// Consecutive blocks that lie one after the other on one device.
#[derive(Clone, Copy, Debug)]
struct Fragment {
    first: usize,
    blocks: usize,
    device: DeviceIndex,
    /// Byte offset of the first block.
    offset: u64,
}

impl Fragment {
    /// The pages that hold the fragment: offset, bytes, and where in them it begins.
    fn pages(&self, block_bytes: usize) -> (u64, usize, usize) {
        let inner = usize::try_from(self.offset % PAGE).expect("less than a page");
        let bytes = (inner + self.blocks * block_bytes).next_multiple_of(PAGE_BYTES);
        (self.offset - inner as u64, bytes, inner)
    }
}

#[derive(Debug, Default)]
pub(crate) struct Read {
    active: bool,
    tag: u64,
    pub(crate) replica: u16,
    pub(crate) incarnation: u32,
    pub(crate) block_bytes: usize,
    pub(crate) lba: u64,
    pub(crate) blocks: usize,
    covers: Seq,
    /// Nobody asked for it.
    is_scrub: bool,
    /// Which blocks it is, is still to be found out.
    pub(crate) fetch: Option<Fetch>,
    pub(crate) buffer: Option<BufferMut>,
    /// The whole read is one fragment, read straight into its buffer.
    direct: bool,
    pub(crate) sources: Vec<Source>,
    fragments: Vec<Fragment>,
    next: usize,
    in_flight: usize,
    attempts: u32,
    /// Some fragment did not verify.
    mismatch: bool,
    waits: bool,
}

/// The reads under way.
#[derive(Default)]
pub(crate) struct Reads {
    all: Vec<Read>,
    free: Vec<u32>,
    /// To be planned, or short of memory.
    waiting: VecDeque<u32>,
    /// Waiting for chunk metadata.
    filling: Vec<u32>,
    /// Memory was short for reading some of that.
    refill: bool,
    pub(crate) scans: crate::scan::Scans,
}

impl Store {
    pub(crate) fn start_read(
        &mut self,
        tag: u64,
        key: ReplicaKey,
        lba: Lba,
        blocks: BlockCount,
        covers: Seq,
        buffer: BufferMut,
    ) {
        let slot = match self.find(key) {
            Ok(slot) => slot,
            Err(error) => return self.done(tag, Err(error)),
        };
        self.last_used = self.now;
        let replica = self.replica_ref(slot);
        if replica.filling {
            return self.done(tag, Err(ReplicaError::Filling));
        }
        let bytes = blocks.bytes(replica.block_size);
        let end = lba.checked_add(blocks);
        if blocks.0 == 0
            || bytes > PAYLOAD_BYTES_MAX as u64
            || bytes > buffer.capacity() as u64
            || end.is_none_or(|end| end.0 > replica.blocks_coming)
        {
            return self.done(tag, Err(ReplicaError::Invalid));
        }
        if covers > replica.queued.seq || self.failed.is_some() && covers > replica.written.seq {
            return self.done(tag, Err(ReplicaError::Behind { last: replica.written }));
        }
        let parked = covers > replica.written.seq;
        let id = self.add_read(tag, slot, buffer);
        let read = &mut self.reads.all[id as usize];
        read.lba = lba.0;
        read.blocks = blocks.0 as usize;
        read.covers = covers;
        if parked {
            self.replica_mut(slot).parked.push_back(id);
        } else {
            self.plan_read(id);
        }
    }

    /// A new read of a replica, with everything but its range.
    pub(crate) fn add_read(&mut self, tag: u64, slot: u16, buffer: BufferMut) -> u32 {
        let replica = self.replica_ref(slot);
        let (incarnation, block_size) = (replica.incarnation, replica.block_size);
        let id = self.reads.free.pop().unwrap_or_else(|| {
            self.reads.all.push(Read::default());
            u32::try_from(self.reads.all.len() - 1).expect("reads are bounded by the front ends")
        });
        let read = &mut self.reads.all[id as usize];
        read.active = true;
        read.tag = tag;
        read.replica = slot;
        read.incarnation = incarnation;
        read.block_bytes = block_size.bytes() as usize;
        read.is_scrub = false;
        read.fetch = None;
        read.buffer = Some(buffer);
        read.attempts = 0;
        id
    }

    /// Reads what is there only to see whether it can be read.
    pub(crate) fn read_for_scrub(
        &mut self,
        slot: u16,
        lba: Lba,
        blocks: BlockCount,
        buffer: BufferMut,
    ) {
        let id = self.add_read(0, slot, buffer);
        let read = &mut self.reads.all[id as usize];
        read.is_scrub = true;
        read.lba = lba.0;
        read.blocks = blocks.0 as usize;
        read.covers = Seq::ZERO;
        self.plan_read(id);
    }

    pub(crate) fn read_mut(&mut self, id: u32) -> &mut Read {
        &mut self.reads.all[id as usize]
    }

    pub(crate) fn unpark_reads(&mut self, slot: u16) {
        for _ in 0..self.replica_ref(slot).parked.len() {
            let replica = self.replica_mut(slot);
            let (written, queued) = (replica.written, replica.queued.seq);
            let Some(id) = replica.parked.pop_front() else { return };
            let covers = self.reads.all[id as usize].covers;
            if covers <= written.seq {
                self.plan_read(id);
            } else if covers > queued {
                self.fail_read(id, ReplicaError::Behind { last: written });
            } else {
                self.replica_mut(slot).parked.push_back(id);
            }
        }
    }

    pub(crate) fn fail_read(&mut self, id: u32, error: ReplicaError) {
        self.end_read(id, Err(error));
    }

    fn end_read(&mut self, id: u32, result: Result<ReplyBody, ReplicaError>) {
        let read = &mut self.reads.all[id as usize];
        assert!(read.active, "a read ends once");
        read.active = false;
        read.buffer = None;
        let (tag, is_scrub) = (read.tag, read.is_scrub);
        self.reads.free.push(id);
        if is_scrub {
            self.scrub_read(&result);
        } else {
            self.done(tag, result);
        }
    }

    /// Starts reads again that were short of memory.
    pub(crate) fn pump_reads(&mut self) {
        for _ in 0..self.reads.waiting.len() {
            if let Some(id) = self.reads.waiting.pop_front() {
                self.reads.all[id as usize].waits = false;
                self.start_fragments(id);
            }
        }
        if core::mem::take(&mut self.reads.refill) {
            self.refill_waiters();
        }
        self.pump_scans();
    }

    /// Finds where each block is and starts to read.
    pub(crate) fn plan_read(&mut self, id: u32) {
        let mut read = core::mem::take(&mut self.reads.all[id as usize]);
        let known = self.find_blocks(&mut read);
        read.fragments.clear();
        read.next = 0;
        read.mismatch = false;
        read.direct = false;
        let error = match known {
            Ok(true) if read.sources.contains(&Source::Damaged) => Some(ReplicaError::Damaged),
            Ok(true) => {
                self.find_fragments(&mut read);
                None
            }
            Ok(false) => None,
            Err(error) => Some(error),
        };
        let filling = known == Ok(false);
        let nothing = read.blocks == 0;
        self.reads.all[id as usize] = read;
        match error {
            Some(error) => {
                if error == ReplicaError::Damaged {
                    self.distrust_home(id);
                }
                self.end_read(id, Err(error));
            }
            None if filling => self.reads.filling.push(id),
            None if nothing => self.end_read(id, Ok(ReplyBody::Done)),
            None => self.start_fragments(id),
        }
    }

    /// Fills in the sources of all blocks, and for a fetch which blocks they are; false if chunk
    /// metadata must be read first.
    fn find_blocks(&mut self, read: &mut Read) -> Result<bool, ReplicaError> {
        match self.same_replica(read.replica, read.incarnation) {
            None => return Err(ReplicaError::NoReplica),
            Some(replica) if replica.filling => return Err(ReplicaError::Filling),
            Some(replica) if replica.is_rebuilding() => {
                return Err(ReplicaError::Behind { last: replica.written });
            }
            Some(_) => {}
        }
        read.sources.clear();
        if read.fetch.is_some() { self.find_run(read) } else { Ok(self.find_sources(read)) }
    }

    fn find_sources(&mut self, read: &mut Read) -> bool {
        let slot = read.replica;
        let mut known = true;
        let mut shift = (0, 0_u64);
        let chunk_blocks = self.geometry.chunk_bytes / read.block_bytes as u64;
        for block in read.lba..read.lba + read.blocks as u64 {
            let source = if let Some(entry) = self.index.lookup(slot, block) {
                Source::Log(entry.sector, entry.crc)
            } else {
                let replica = self.replica_ref(slot);
                if shift.1 <= block {
                    shift = match replica.extents.covering(block) {
                        Some((end, _)) => (1, end),
                        None => (0, block + 1),
                    };
                }
                if shift.0 == 1 {
                    Source::Zero
                } else if replica.damaged {
                    Source::Damaged
                } else {
                    let chunk = u32::try_from(block / chunk_blocks).expect("a chunk number");
                    match replica.chunks.place(chunk) {
                        None => Source::Zero,
                        Some(place) => {
                            let index = usize::try_from(block % chunk_blocks).expect("in a chunk");
                            let source = self.home_source(slot, chunk, place, index);
                            known &= source.is_some();
                            source.unwrap_or(Source::Zero)
                        }
                    }
                }
            };
            read.sources.push(source);
        }
        known
    }

    pub(crate) fn home_source(
        &mut self,
        slot: u16,
        chunk: u32,
        place: ChunkPlace,
        index: usize,
    ) -> Option<Source> {
        match self.cache.lookup(place.location, place.version) {
            Lookup::Meta(meta) => Some(match meta.block(index) {
                BlockState::Absent => Source::Zero,
                BlockState::Damaged => Source::Damaged,
                BlockState::Present(crc) => {
                    Source::Home { location: place.location, version: place.version, crc }
                }
            }),
            Lookup::Damaged => Some(Source::Damaged),
            Lookup::Missing => {
                self.fill_cache(slot, chunk, place);
                None
            }
        }
    }

    /// Reads a chunk's metadata into the cache, unless that is under way.
    pub(crate) fn fill_cache(&mut self, slot: u16, chunk: u32, place: ChunkPlace) {
        let wanted = Wanted { replica: slot, chunk, version: place.version };
        if !self.cache.begin_fill(place.location, wanted) {
            return;
        }
        let block_size = self.replica_ref(slot).block_size;
        let blocks = self.chunk_blocks(block_size);
        let length = ChunkMeta::encoded_bytes(blocks);
        let Some(buffer) = self.take_buffer(length) else {
            self.cache.end_fill(place.location);
            self.reads.refill = true;
            self.starved();
            return;
        };
        let (device, offset) = self.chunk_slot_offset(place.location, place.slot);
        self.read(device, offset, buffer, length, Task::CacheFill { location: place.location });
    }

    /// A buffer, unless that would leave too few for batches and the journal.
    pub(crate) fn take_buffer(&self, bytes: usize) -> Option<BufferMut> {
        let (small, large) = self.config.buffers.available();
        let small_left = small > BUFFERS_RESERVED.0;
        let large_left = large > BUFFERS_RESERVED.1;
        let fits_small = bytes <= base::limits::SMALL_PAYLOAD_BYTES;
        if fits_small && small_left || large_left && (!fits_small || small == 0) {
            self.config.buffers.take(bytes)
        } else {
            None
        }
    }

    /// Blocks of a chunk.
    pub(crate) fn chunk_blocks(&self, block_size: base::BlockSize) -> usize {
        usize::try_from(self.geometry.chunk_bytes >> block_size.log2()).expect("a chunk's blocks")
    }

    /// The device of a chunk, and the chunk's byte offset there.
    pub(crate) fn chunk_offset(&self, location: u32) -> (DeviceIndex, u64) {
        let index = self.devices.partition_point(|device| device.first_chunk <= location) - 1;
        // Devices without chunks share their first chunk with the next one.
        let device = &self.devices[index];
        let within = u64::from(location - device.first_chunk) * self.geometry.chunk_stride();
        (crate::layout::device_index(index), device.areas.home_offset + within)
    }

    /// The device of a chunk, and the byte offset of one of its metadata slots.
    pub(crate) fn chunk_slot_offset(&self, location: u32, slot: u8) -> (DeviceIndex, u64) {
        let (device, offset) = self.chunk_offset(location);
        (device, offset + u64::from(slot) * self.geometry.slot_bytes())
    }

    /// The device of a chunk, and the byte offset of its data.
    pub(crate) fn chunk_data_offset(&self, location: u32) -> (DeviceIndex, u64) {
        let (device, offset) = self.chunk_offset(location);
        (device, offset + 2 * self.geometry.slot_bytes())
    }

    pub(crate) fn cache_filled(&mut self, location: u32, buffer: Option<BufferMut>) {
        if let Some(wanted) = self.cache.end_fill(location)
            && let Some((identity, blocks)) = self.still_wanted(location, wanted)
        {
            self.cache.insert(location, wanted.version, |meta| {
                buffer
                    .as_ref()
                    .is_some_and(|buffer| meta.decode(&identity, blocks, buffer.payload()))
            });
        }
        drop(buffer);
        self.refill_waiters();
    }

    fn refill_waiters(&mut self) {
        let mut filling = core::mem::take(&mut self.reads.filling);
        for id in filling.drain(..) {
            self.plan_read(id);
        }
        // Planning may have put some back.
        filling.append(&mut self.reads.filling);
        self.reads.filling = filling;
    }

    /// The identity that a chunk's metadata must have, if it is still in use in that version.
    fn still_wanted(&self, location: u32, wanted: Wanted) -> Option<(ChunkIdentity, usize)> {
        let replica = self.replicas[usize::from(wanted.replica)].as_ref()?;
        let place = replica.chunks.place(wanted.chunk)?;
        if place.location != location || place.version != wanted.version {
            return None;
        }
        let identity = self.chunk_identity(replica, wanted.chunk, place);
        Some((identity, self.chunk_blocks(replica.block_size)))
    }

    pub(crate) fn chunk_identity(
        &self,
        replica: &Replica,
        chunk: u32,
        place: ChunkPlace,
    ) -> ChunkIdentity {
        ChunkIdentity {
            pool: self.pool,
            key: replica.key,
            chunk,
            location: place.location,
            version: place.version,
            block_size: replica.block_size,
        }
    }

    fn find_fragments(&self, read: &mut Read) {
        let block_bytes = read.block_bytes as u64;
        let chunk_blocks = self.geometry.chunk_bytes / block_bytes;
        for (number, source) in read.sources.iter().enumerate() {
            let (device, offset) = match *source {
                Source::Zero | Source::Damaged => continue,
                Source::Log(sector, _) => {
                    let (segment, within) = self.segments.locate(sector);
                    let device = self.segments.all[segment as usize].device;
                    (device, self.segment_offset(segment) + within)
                }
                Source::Home { location, .. } => {
                    let (device, offset) = self.chunk_data_offset(location);
                    let block = read.lba + number as u64;
                    (device, offset + block % chunk_blocks * block_bytes)
                }
            };
            match read.fragments.last_mut() {
                Some(last)
                    if last.first + last.blocks == number
                        && last.device == device
                        && last.offset + last.blocks as u64 * block_bytes == offset
                        && last.pages(read.block_bytes).1 < PAYLOAD_BYTES_MAX =>
                {
                    last.blocks += 1;
                }
                _ => read.fragments.push(Fragment { first: number, blocks: 1, device, offset }),
            }
        }
    }

    fn start_fragments(&mut self, id: u32) {
        let read = &mut self.reads.all[id as usize];
        if read.fragments.is_empty() {
            let mut buffer = read.buffer.take().expect("a read has its buffer");
            let bytes = read.blocks * read.block_bytes;
            buffer.payload_mut()[..bytes].fill(0);
            return self.end_read(id, Ok(ReplyBody::Data(buffer.freeze().payload(bytes))));
        }
        let bytes = read.blocks * read.block_bytes;
        if let [fragment] = read.fragments[..]
            && read.next == 0
            && fragment.pages(read.block_bytes) == (fragment.offset, bytes, 0)
            && fragment.blocks == read.blocks
        {
            let buffer = read.buffer.take().expect("a read has its buffer");
            read.direct = true;
            read.next = 1;
            read.in_flight = 1;
            let task = Task::Fragment(FragmentId { read: id, fragment: 0 });
            return self.read(fragment.device, fragment.offset, buffer, bytes, task);
        }
        loop {
            let read = &self.reads.all[id as usize];
            if read.next == read.fragments.len() || read.in_flight == FRAGMENTS_MAX {
                return;
            }
            let fragment = read.fragments[read.next];
            let (offset, length, _) = fragment.pages(read.block_bytes);
            let Some(buffer) = self.take_buffer(length) else {
                if !read.waits {
                    self.reads.all[id as usize].waits = true;
                    self.reads.waiting.push_back(id);
                    self.starved();
                }
                return;
            };
            let read = &mut self.reads.all[id as usize];
            let number = u16::try_from(read.next).expect("at most 256 blocks");
            read.next += 1;
            read.in_flight += 1;
            let task = Task::Fragment(FragmentId { read: id, fragment: number });
            self.read(fragment.device, offset, buffer, length, task);
        }
    }

    pub(crate) fn fragment_read(&mut self, id: FragmentId, data: Option<BufferMut>) {
        let read = &mut self.reads.all[id.read as usize];
        let fragment = read.fragments[usize::from(id.fragment)];
        read.in_flight -= 1;
        let (block_bytes, first) = (read.block_bytes, fragment.first);
        let inner = fragment.pages(block_bytes).2;
        let range = inner..inner + fragment.blocks * block_bytes;
        let good = data.as_ref().is_some_and(|data| {
            data.payload()[range.clone()].chunks_exact(block_bytes).zip(&read.sources[first..]).all(
                |(block, source)| {
                    source.crc() == Some(crc32c(block)) || planted::is(Bug::ReadUnverified)
                },
            )
        });
        read.mismatch |= !good;
        if read.direct {
            read.buffer = data;
        } else if let (Some(data), Some(buffer)) = (&data, &mut read.buffer) {
            let at = first * block_bytes;
            buffer.payload_mut()[at..at + range.len()].copy_from_slice(&data.payload()[range]);
        }
        if read.mismatch {
            // Start no more; judge when all have come back.
            read.next = read.fragments.len();
        }
        if read.next < read.fragments.len() && !read.waits {
            self.start_fragments(id.read);
        }
        let read = &self.reads.all[id.read as usize];
        if read.in_flight == 0 && read.next == read.fragments.len() {
            self.judge_read(id.read);
        }
    }

    fn judge_read(&mut self, id: u32) {
        let read = &mut self.reads.all[id as usize];
        let bytes = read.blocks * read.block_bytes;
        if !read.mismatch {
            let mut buffer = read.buffer.take().expect("a read has its buffer");
            if let Some(fetch) = read.fetch {
                return match self.run_header(id, fetch) {
                    Some(header) => {
                        let record = Record::encode(header, buffer);
                        self.end_read(id, Ok(ReplyBody::Record(record)));
                    }
                    None => self.end_read(id, Err(ReplicaError::NoReplica)),
                };
            }
            let blocks = buffer.payload_mut()[..bytes].chunks_exact_mut(read.block_bytes);
            for (block, source) in blocks.zip(&read.sources) {
                if *source == Source::Zero {
                    block.fill(0);
                }
            }
            return self.end_read(id, Ok(ReplyBody::Data(buffer.freeze().payload(bytes))));
        }
        if read.waits {
            // Leave the queue first.
            read.waits = false;
            self.reads.waiting.retain(|waiting| *waiting != id);
        }
        let mut read = core::mem::take(&mut self.reads.all[id as usize]);
        let before = (core::mem::take(&mut read.sources), read.lba, read.fetch);
        let known = self.find_blocks(&mut read);
        let after = (&read.sources, read.lba, read.fetch);
        let moved = known != Ok(true) || after != (&before.0, before.1, before.2);
        read.attempts += 1;
        let again = moved && read.attempts < ATTEMPTS_MAX && read.buffer.is_some();
        self.reads.all[id as usize] = read;
        match known {
            Err(error) => self.end_read(id, Err(error)),
            Ok(_) if again => self.plan_read(id),
            Ok(_)
                if self.reads.all[id as usize]
                    .fetch
                    .is_some_and(|fetch| fetch.settled.is_none()) =>
            {
                // What hides the block may have interrupted its predecessor on the way home: the
                // data is there before its checksum. It is known again when the newer one settles.
                let last = self.replica_ref(self.reads.all[id as usize].replica).written;
                self.end_read(id, Err(ReplicaError::Behind { last }));
            }
            Ok(_) => {
                self.distrust_home(id);
                self.end_read(id, Err(ReplicaError::Damaged));
            }
        }
    }

    /// Some block of a read is not what it must be: the chunks that it may lie in are no longer
    /// as good as a peer's.
    fn distrust_home(&mut self, id: u32) {
        let read = &self.reads.all[id as usize];
        let chunk_blocks = self.geometry.chunk_bytes / read.block_bytes as u64;
        let range = read.lba..read.lba + read.blocks as u64;
        let slot = read.replica;
        for chunk in range.start / chunk_blocks..range.end.div_ceil(chunk_blocks) {
            let chunk = u32::try_from(chunk).expect("a chunk number");
            let chunks = &mut self.replica_mut(slot).chunks;
            if let Some(place) = chunks.place(chunk) {
                chunks.set(chunk, Some(ChunkPlace { newest: Seq::ZERO, ..place }));
            }
        }
    }
}
