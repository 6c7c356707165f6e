//! Staging: new versions of chunks of a replica that is being filled.
//!
//! A staged chunk has a place of its own, so its blocks may be written in any way: nothing there
//! counts until the journal says so. When its last block has been written, its metadata is too,
//! the devices are synced, and an entry in the journal puts the new place in that of the old
//! one. Chunks that are ready at the same time share the syncs and, mostly, the journal's page.

use std::collections::VecDeque;

use base::limits::PAGE_BYTES;
use base::planted::{self, Bug};
use base::{
    BlockSize, Buffer, BufferMut, Record, RecordKind, ReplicaError, ReplicaKey, ReplyBody, Seq,
};

use crate::api::{FILL_CHUNKS_MAX, Parts};
use crate::home::{BlockState, ChunkMeta};
use crate::journal::After;
use crate::layout::DeviceIndex;
use crate::metadata::{ChunkPlace, Entry, KEPT};
use crate::store::{Store, Task};

/// Chunks of home that filling leaves to flushing, at most: those of one wave.
const HOME_RESERVED_MAX: u32 = 32;
/// 512-byte blocks of a page.
const PAGE_BLOCKS: usize = PAGE_BYTES / 512;

/// Where a staged chunk is on its way; with the tag of its commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Takes runs.
    Open,
    /// Has all its runs; some are not written.
    Closing(u64),
    /// Its metadata is being written, and then synced.
    Sealing(u64),
    /// The journal has its entry.
    Journal,
    /// Nobody wants it any more; its place is free when its writes are done.
    Aborted,
}

struct Staged {
    slot: u16,
    chunk: u32,
    place: ChunkPlace,
    meta: ChunkMeta,
    /// Index of the first block after the last run.
    next: usize,
    queue: VecDeque<(u64, Record)>,
    /// The page in which the last run of 512-byte blocks ended: its number, and what it will hold.
    tail: Option<(usize, BufferMut)>,
    in_flight: u32,
    step: Step,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Wave {
    #[default]
    None,
    /// Metadata is being written.
    Writing,
    Syncing,
}

/// Staged chunks and their writes.
#[derive(Default)]
pub(crate) struct Fill {
    staged: Vec<Option<Staged>>,
    active: usize,
    /// Staged chunk, and the command to answer.
    writes: Vec<(usize, Option<u64>)>,
    writes_free: Vec<u32>,
    wave: Wave,
    stamps: Vec<(DeviceIndex, u64)>,
    spare_meta: Vec<ChunkMeta>,
}

impl Fill {
    fn all(&self) -> impl Iterator<Item = &Staged> {
        self.staged.iter().flatten()
    }

    /// True while something of the replica's is staged, aborted or not.
    pub(crate) fn is_busy_with(&self, slot: u16) -> bool {
        self.active > 0 && self.all().any(|staged| staged.slot == slot)
    }

    /// True if the replica has a staged chunk that is wanted.
    pub(crate) fn has_any(&self, slot: u16) -> bool {
        self.all().any(|staged| staged.slot == slot && staged.step != Step::Aborted)
    }

    pub(crate) fn has_staged(&self, slot: u16, chunk: u32) -> bool {
        self.find(slot, chunk).is_some()
    }

    fn find(&self, slot: u16, chunk: u32) -> Option<usize> {
        self.staged.iter().position(|staged| {
            staged.as_ref().is_some_and(|staged| {
                staged.slot == slot && staged.chunk == chunk && staged.step != Step::Aborted
            })
        })
    }

    fn at(&mut self, at: usize) -> &mut Staged {
        self.staged[at].as_mut().expect("a staged chunk")
    }

    /// Places that staged chunks have and no map knows.
    pub(crate) fn places(&self) -> impl Iterator<Item = u32> {
        self.all().map(|staged| staged.place.location)
    }

    /// Nothing will be written any more: the tags of the commands that wait.
    pub(crate) fn abandon(&mut self) -> Vec<u64> {
        let mut tags: Vec<u64> = Vec::new();
        for staged in self.staged.drain(..).flatten() {
            tags.extend(staged.queue.iter().map(|(tag, _)| *tag));
            match staged.step {
                Step::Closing(tag) | Step::Sealing(tag) => tags.push(tag),
                // The journal's entry has the tag.
                Step::Open | Step::Journal | Step::Aborted => {}
            }
        }
        for free in &self.writes_free {
            self.writes[*free as usize].1 = None;
        }
        tags.extend(self.writes.iter().filter_map(|(_, tag)| *tag));
        *self = Self::default();
        tags
    }
}

impl Store {
    pub(crate) fn fill_chunk(&mut self, tag: u64, key: ReplicaKey, chunk: u32, newest: Seq) {
        let slot = match self.find_filling(key, chunk) {
            Ok(slot) => slot,
            Err(error) => return self.done(tag, Err(error)),
        };
        let count = self.fill.all().filter(|staged| staged.slot == slot).count();
        if self.fill.has_staged(slot, chunk) || count >= FILL_CHUNKS_MAX {
            return self.done(tag, Err(ReplicaError::Invalid));
        }
        let reserved = (self.chunks.chunks() / 16).min(HOME_RESERVED_MAX);
        if self.chunks.free() <= reserved {
            return self.done(tag, Err(ReplicaError::NoSpace));
        }
        let location = self.chunks.allocate().expect("some are free");
        // Not known, or impossible.
        let newest = if newest.0 >= KEPT { Seq::ZERO } else { newest };
        let mut meta = self.fill.spare_meta.pop().unwrap_or_default();
        meta.reset(self.chunk_blocks(self.replica_ref(slot).block_size));
        meta.newest = newest;
        let staged = Staged {
            slot,
            chunk,
            place: ChunkPlace { location, slot: 0, version: 0, newest, kept: false },
            meta,
            next: 0,
            queue: VecDeque::new(),
            tail: None,
            in_flight: 0,
            step: Step::Open,
        };
        self.fill.active += 1;
        match self.fill.staged.iter().position(Option::is_none) {
            Some(free) => self.fill.staged[free] = Some(staged),
            None => self.fill.staged.push(Some(staged)),
        }
        self.done(tag, Ok(ReplyBody::Done));
    }

    pub(crate) fn fill_data(&mut self, tag: u64, key: ReplicaKey, record: Record) {
        match self.find_run_place(key, &record) {
            Ok(at) => self.fill.at(at).queue.push_back((tag, record)),
            Err(error) => self.done(tag, Err(error)),
        }
    }

    /// The staged chunk that a run belongs to; notes its blocks there.
    fn find_run_place(&mut self, key: ReplicaKey, record: &Record) -> Result<usize, ReplicaError> {
        let slot = self.find_for_change(key)?;
        let header = record.header();
        let replica = self.replica_ref(slot);
        let end = header.lba.checked_add(header.blocks).ok_or(ReplicaError::Invalid)?;
        if header.key != key
            || header.kind != RecordKind::Write
            || header.block_size != replica.block_size
            || end.0 > replica.blocks
        {
            return Err(ReplicaError::Invalid);
        }
        let blocks = self.chunk_blocks(replica.block_size) as u64;
        let chunk = u32::try_from(header.lba.0 / blocks).map_err(|_| ReplicaError::Invalid)?;
        let slot = self.find_filling(key, chunk)?;
        let at = self.fill.find(slot, chunk).ok_or(ReplicaError::Invalid)?;
        let staged = self.fill.at(at);
        let start = u64::from(chunk) * blocks;
        let index = usize::try_from(header.lba.0 - start).expect("in a chunk");
        if staged.step != Step::Open || end.0 > start + blocks || index < staged.next {
            return Err(ReplicaError::Invalid);
        }
        for number in 0..header.blocks.0 as usize {
            staged.meta.set(index + number, BlockState::Present(record.block_crc(number)));
        }
        staged.next = index + header.blocks.0 as usize;
        Ok(at)
    }

    pub(crate) fn fill_commit(&mut self, tag: u64, key: ReplicaKey, chunk: u32) {
        let found = self.find_filling(key, chunk).and_then(|slot| {
            let at = self.fill.find(slot, chunk).ok_or(ReplicaError::Invalid)?;
            if self.fill.at(at).step == Step::Open { Ok(at) } else { Err(ReplicaError::Invalid) }
        });
        match found {
            Ok(at) => self.fill.at(at).step = Step::Closing(tag),
            Err(error) => self.done(tag, Err(error)),
        }
    }

    /// Forgets what is staged for a replica and is not being committed.
    pub(crate) fn abort_staged(&mut self, slot: u16, error: ReplicaError) {
        if self.fill.active == 0 {
            return;
        }
        for at in 0..self.fill.staged.len() {
            let Some(staged) = &mut self.fill.staged[at] else { continue };
            if staged.slot != slot {
                continue;
            }
            let commit = match staged.step {
                Step::Open => None,
                Step::Closing(tag) => Some(tag),
                Step::Sealing(_) | Step::Journal | Step::Aborted => continue,
            };
            staged.step = Step::Aborted;
            staged.tail = None;
            let queue = core::mem::take(&mut staged.queue);
            for tag in queue.iter().map(|(tag, _)| *tag).chain(commit) {
                self.done(tag, Err(error));
            }
        }
    }

    pub(crate) fn pump_fill(&mut self) {
        if self.fill.active == 0 {
            return;
        }
        for at in 0..self.fill.staged.len() {
            let Some(staged) = &self.fill.staged[at] else { continue };
            match staged.step {
                Step::Open | Step::Closing(_) => self.write_runs(at),
                Step::Aborted if staged.in_flight == 0 => {
                    let location = staged.place.location;
                    self.drop_staged(at);
                    self.release_chunk(location);
                }
                Step::Aborted | Step::Sealing(_) | Step::Journal => {}
            }
        }
        if self.fill.wave == Wave::None {
            self.begin_wave();
        }
        if self.fill.wave == Wave::Writing {
            self.sync_wave();
        }
    }

    fn drop_staged(&mut self, at: usize) {
        let staged = self.fill.staged[at].take().expect("a staged chunk");
        self.fill.spare_meta.push(staged.meta);
        self.fill.active -= 1;
    }

    // Runs.

    fn write_runs(&mut self, at: usize) {
        let slot = self.fill.at(at).slot;
        let block_size = self.replica_ref(slot).block_size;
        while let Some((tag, record)) = self.fill.at(at).queue.pop_front() {
            match block_size {
                BlockSize::B4096 => self.write_pages(at, tag, &record),
                BlockSize::B512 => {
                    if !self.copy_blocks(at, &record) {
                        self.fill.at(at).queue.push_front((tag, record));
                        return self.starved();
                    }
                    self.done(tag, Ok(ReplyBody::Done));
                }
            }
        }
        if matches!(self.fill.at(at).step, Step::Closing(_)) {
            self.write_tail(at);
        }
    }

    /// The index of a record's first block in its chunk.
    fn index_of(&mut self, at: usize, record: &Record) -> usize {
        let slot = self.fill.at(at).slot;
        let blocks = self.chunk_blocks(self.replica_ref(slot).block_size) as u64;
        usize::try_from(record.header().lba.0 % blocks).expect("in a chunk")
    }

    /// A run of 4 KiB blocks goes out as it came.
    fn write_pages(&mut self, at: usize, tag: u64, record: &Record) {
        let page = self.index_of(at, record);
        self.write_staged(at, page, record.payload().clone(), Some(tag));
    }

    /// A run of 512-byte blocks is put together in pages. The one it ends in waits for the next
    /// run. False if memory was short.
    fn copy_blocks(&mut self, at: usize, record: &Record) -> bool {
        let first = self.index_of(at, record);
        let end = first + record.header().blocks.0 as usize;
        let (head, last) = (first / PAGE_BLOCKS, (end - 1) / PAGE_BLOCKS);
        if self.fill.at(at).tail.as_ref().is_some_and(|(page, _)| *page < head) {
            self.write_tail(at);
        }
        // All the memory first: a run is copied as a whole or not at all.
        let mut pages = VecDeque::new();
        let held = usize::from(self.fill.at(at).tail.is_some());
        for _ in head + held..=last {
            let Some(mut page) = self.take_buffer(PAGE_BYTES) else { return false };
            page.payload_mut()[..PAGE_BYTES].fill(0);
            pages.push_back(page);
        }
        let bytes = record.payload().bytes();
        for page in head..=last {
            let (from, to) = (first.max(page * PAGE_BLOCKS), end.min((page + 1) * PAGE_BLOCKS));
            let (_, mut image) = self
                .fill
                .at(at)
                .tail
                .take()
                .unwrap_or_else(|| (page, pages.pop_front().expect("one was taken for each")));
            let within = (from % PAGE_BLOCKS) * 512;
            let source = &bytes[(from - first) * 512..(to - first) * 512];
            image.payload_mut()[within..within + source.len()].copy_from_slice(source);
            self.fill.at(at).tail = Some((page, image));
            if to == (page + 1) * PAGE_BLOCKS {
                self.write_tail(at);
            }
        }
        true
    }

    fn write_tail(&mut self, at: usize) {
        if let Some((page, image)) = self.fill.at(at).tail.take() {
            self.write_staged(at, page, image.freeze().payload(PAGE_BYTES), None);
        }
    }

    fn write_staged(&mut self, at: usize, page: usize, bytes: Buffer, tag: Option<u64>) {
        let location = self.fill.at(at).place.location;
        let (device, offset) = self.chunk_data_offset(location);
        let write = self.add_fill_write(at, tag);
        let offset = offset + (page * PAGE_BYTES) as u64;
        self.write(device, offset, Parts::one(bytes), Task::Fill { write });
    }

    fn add_fill_write(&mut self, at: usize, tag: Option<u64>) -> u32 {
        let fill = &mut self.fill;
        fill.at(at).in_flight += 1;
        if let Some(free) = fill.writes_free.pop() {
            fill.writes[free as usize] = (at, tag);
            return free;
        }
        fill.writes.push((at, tag));
        u32::try_from(fill.writes.len() - 1).expect("writes are bounded by buffers")
    }

    pub(crate) fn fill_written(&mut self, write: u32) {
        let (at, tag) = self.fill.writes[write as usize];
        self.fill.writes_free.push(write);
        self.fill.at(at).in_flight -= 1;
        if let Some(tag) = tag {
            self.done(tag, Ok(ReplyBody::Done));
        }
    }

    // Commits.

    /// Takes every chunk that has all its blocks written.
    fn begin_wave(&mut self) {
        for at in 0..self.fill.staged.len() {
            let Some(staged) = &self.fill.staged[at] else { continue };
            let Step::Closing(tag) = staged.step else { continue };
            if staged.in_flight > 0 || !staged.queue.is_empty() || staged.tail.is_some() {
                continue;
            }
            let (slot, chunk, location) = (staged.slot, staged.chunk, staged.place.location);
            if staged.meta.is_all_absent() {
                // The source had nothing there after all.
                self.drop_staged(at);
                self.release_chunk(location);
                let entry = Entry::ChunkFree { replica: slot, chunk };
                self.journal.push(entry, After::Done(tag));
            } else if !self.write_staged_meta(at, tag) {
                break;
            }
        }
    }

    fn write_staged_meta(&mut self, at: usize, tag: u64) -> bool {
        let slot = self.fill.at(at).slot;
        let blocks = self.chunk_blocks(self.replica_ref(slot).block_size);
        let length = ChunkMeta::encoded_bytes(blocks);
        let Some(mut buffer) = self.take_buffer(length) else {
            self.starved();
            return false;
        };
        self.journal.version = self.journal.version.wrapping_add(1);
        let version = self.journal.version;
        let staged = self.fill.at(at);
        staged.step = Step::Sealing(tag);
        staged.place.version = version;
        let (chunk, place) = (staged.chunk, staged.place);
        let identity = self.chunk_identity(self.replica_ref(slot), chunk, place);
        let meta = &self.fill.at(at).meta;
        meta.encode(&identity, &mut buffer.payload_mut()[..length]);
        let (device, offset) = self.chunk_slot_offset(place.location, place.slot);
        let write = self.add_fill_write(at, None);
        let parts = Parts::one(buffer.freeze().payload(length));
        self.write(device, offset, parts, Task::Fill { write });
        self.fill.wave = Wave::Writing;
        true
    }

    fn sync_wave(&mut self) {
        let is_sealing = |staged: &&Staged| matches!(staged.step, Step::Sealing(_));
        if self.fill.all().filter(is_sealing).any(|staged| staged.in_flight > 0) {
            return;
        }
        for at in 0..self.fill.staged.len() {
            let Some(staged) = self.fill.staged[at].as_ref().filter(is_sealing) else { continue };
            let device = self.chunk_offset(staged.place.location).0;
            let stamp = self.want_sync(device);
            if !self.fill.stamps.contains(&(device, stamp)) {
                self.fill.stamps.push((device, stamp));
            }
        }
        self.fill.wave = Wave::Syncing;
    }

    /// Some device has been synced.
    pub(crate) fn fill_synced(&mut self) {
        let done = |(device, stamp): &(DeviceIndex, u64)| {
            self.devices[usize::from(device.0)].syncs_done >= *stamp
        };
        let done = self.fill.stamps.iter().all(done) || planted::is(Bug::StagedBeforeMedia);
        if self.fill.wave != Wave::Syncing || !done {
            return;
        }
        self.fill.stamps.clear();
        self.fill.wave = Wave::None;
        for at in 0..self.fill.staged.len() {
            let Some(staged) = &mut self.fill.staged[at] else { continue };
            let Step::Sealing(tag) = staged.step else { continue };
            staged.step = Step::Journal;
            let (replica, chunk, place) = (staged.slot, staged.chunk, staged.place);
            self.journal.push(Entry::Chunk { replica, chunk, place }, After::Staged(tag));
        }
    }

    /// The journal has it: the new version counts.
    pub(crate) fn staged_counts(&mut self, tag: u64, entry: Entry) {
        let Entry::Chunk { replica, chunk, place } = entry else {
            unreachable!("a staged chunk is committed by its place");
        };
        let at = self.fill.find(replica, chunk).expect("it stays until it counts");
        let meta = core::mem::take(&mut self.fill.at(at).meta);
        self.cache.insert(place.location, place.version, |cached| {
            cached.copy_from(&meta);
            true
        });
        self.fill.at(at).meta = meta;
        self.drop_staged(at);
        self.done(tag, Ok(ReplyBody::Done));
    }
}
