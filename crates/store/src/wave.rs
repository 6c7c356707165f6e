//! One wave of a flush job: a few chunks at a time.
//!
//! The order is what keeps data safe: block data in place; sync; each chunk's metadata into the
//! slot that is not in use; sync; the journal says which slot and version count; sync; and only
//! then do the index entries go, so that the log still has every block that is being overwritten
//! until its new checksum is the one that counts.

use base::checksum::crc32c;
use base::limits::{PAGE_BYTES, PAYLOAD_BYTES_MAX};
use base::planted::{self, Bug};
use base::{BlockSize, BufferMut, Seq};

use crate::api::Parts;
use crate::cache::Lookup;
use crate::flush::Job;
use crate::home::{BlockState, ChunkMeta};
use crate::index::{Entry as IndexEntry, LogSector};
use crate::journal::After;
use crate::layout::DeviceIndex;
use crate::metadata::{ChunkPlace, Entry};
use crate::segments::PAGE_SECTORS;
use crate::store::{Store, Task};

/// Chunks of one wave, at most.
const CHUNKS_MAX: usize = 32;
/// Pages moved by one read and one write, at most.
const RUN_PAGES_MAX: usize = PAYLOAD_BYTES_MAX / PAGE_BYTES;

/// Names a mover.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MoverId(u32);

/// A block on its way: its index in the chunk, and where it is in the log.
#[derive(Clone, Copy, Debug)]
struct Move {
    index: usize,
    entry: IndexEntry,
}

struct Target {
    chunk: u32,
    old: Option<ChunkPlace>,
    place: ChunkPlace,
    meta: ChunkMeta,
    loaded: bool,
    moves: Vec<Move>,
    next: usize,
    /// Pages to be moved one by one, because a longer read failed: first move and count.
    singles: Vec<(usize, usize)>,
    written: bool,
    /// Its metadata has changed.
    changed: bool,
    /// Nothing in the log after the job's segments covers any of its blocks: all that came
    /// through their end will be home.
    complete: bool,
    /// No record that goes home with this wave is above this seq.
    newest: Seq,
    empty: bool,
    meta_sent: bool,
}

impl Target {
    /// What its entry will state of it, after a job through this seq.
    fn newest_at_home(&self, through: Seq) -> Seq {
        if !self.complete || self.meta.has_damage() {
            return Seq::ZERO;
        }
        match self.old.map(|old| old.newest) {
            Some(Seq::ZERO) => through,
            // A replica that was filled with blocks newer than its log may put older ones in their
            // place until the log has caught up.
            Some(old) => old.max(self.newest).min(through),
            None => self.newest,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum MoverKind {
    /// Whole pages, in a row in the log and at home.
    Run,
    /// A page of small blocks from several places.
    Mixed,
}

struct Mover {
    target: usize,
    first: usize,
    count: usize,
    kind: MoverKind,
    /// Of a mixed page: what will be written, and the moves copied so far.
    image: Option<BufferMut>,
    copied: usize,
    home_read: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Phase {
    #[default]
    Gather,
    Move,
    DataSync,
    Meta,
    MetaSync,
    Journal,
}

/// The wave under way.
#[derive(Default)]
pub(crate) struct Wave {
    targets: Vec<Target>,
    phase: Phase,
    movers: Vec<Option<Mover>>,
    movers_free: Vec<u32>,
    in_flight: usize,
    spare_moves: Vec<Vec<Move>>,
    stamps: Vec<(DeviceIndex, u64)>,
    pub(crate) waves_done: u64,
}

impl Wave {
    pub(crate) fn is_full(&self) -> bool {
        self.targets.len() >= CHUNKS_MAX
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.targets.is_empty()
    }
}

impl Store {
    /// Puts a chunk into the wave that is being gathered.
    pub(crate) fn add_target(&mut self, job: &Job, chunk: u32) {
        if self.flush.wave.targets.iter().any(|target| target.chunk == chunk) {
            return;
        }
        let old = self.replica_ref(job.slot).chunks.place(chunk);
        let place = if let Some(old) = old {
            let slot = if planted::is(Bug::HomeMetaInPlace) { old.slot } else { old.slot ^ 1 };
            ChunkPlace { slot, kept: false, ..old }
        } else {
            let Some(location) = self.chunks.allocate() else {
                self.flush.home_full = true;
                self.flush.blocked = true;
                return;
            };
            self.flush.home_full = false;
            ChunkPlace { location, slot: 0, version: 0, newest: Seq::ZERO, kept: false }
        };
        let meta = self.flush.spare_meta.pop().unwrap_or_default();
        let moves = self.flush.wave.spare_moves.pop().unwrap_or_default();
        self.flush.wave.targets.push(Target {
            chunk,
            old,
            place,
            meta,
            loaded: false,
            moves,
            next: 0,
            singles: Vec::new(),
            written: false,
            changed: false,
            complete: false,
            newest: Seq::ZERO,
            empty: false,
            meta_sent: false,
        });
    }

    pub(crate) fn pump_wave(&mut self) {
        loop {
            let phase = self.flush.wave.phase;
            match phase {
                Phase::Gather => {
                    if !self.gather() {
                        return;
                    }
                    self.flush.wave.phase = Phase::Move;
                }
                Phase::Move => self.pump_moves(),
                Phase::DataSync | Phase::MetaSync => self.flush_synced(),
                Phase::Meta => self.pump_meta(),
                Phase::Journal => return,
            }
            if self.flush.wave.phase == phase {
                return;
            }
        }
    }

    /// Loads a target's metadata and decides what moves; false if it is not there yet.
    fn load_target(&mut self, job: &Job, at: usize) -> bool {
        let block_size = self.replica_ref(job.slot).block_size;
        let blocks = self.chunk_blocks(block_size);
        let (old, chunk) = {
            let target = &self.flush.wave.targets[at];
            (target.old, target.chunk)
        };
        let mut meta = core::mem::take(&mut self.flush.wave.targets[at].meta);
        let loaded = match old {
            None => {
                meta.reset(blocks);
                true
            }
            Some(place) => match self.cache.lookup(place.location, place.version) {
                Lookup::Meta(cached) => {
                    meta.copy_from(cached);
                    true
                }
                Lookup::Damaged => {
                    // What it said is lost; what is not overwritten now stays unreadable.
                    meta.reset(blocks);
                    (0..blocks).for_each(|index| meta.set(index, BlockState::Damaged));
                    true
                }
                Lookup::Missing => false,
            },
        };
        if !loaded {
            self.flush.wave.targets[at].meta = meta;
            self.fill_cache(job.slot, chunk, old.expect("a new chunk needs no loading"));
            return false;
        }
        self.choose_moves(job, at, meta, blocks);
        true
    }

    fn choose_moves(&mut self, job: &Job, at: usize, mut meta: ChunkMeta, blocks: usize) {
        let chunk = self.flush.wave.targets[at].chunk;
        let first = u64::from(chunk) * blocks as u64;
        let mut moves = core::mem::take(&mut self.flush.wave.targets[at].moves);
        let (mut changed, mut complete) = (false, true);
        let mut last = Seq::ZERO;
        let replica = self.replica_ref(job.slot);
        for index in 0..blocks {
            let block = first + index as u64;
            let newest = self.index.lookup(job.slot, block);
            let entry = newest.filter(|entry| {
                self.segments.all[self.segments.of(entry.sector)].ordinal <= job.last_ordinal
            });
            let zeroes = replica.extents.covering(block).map(|(_, seq)| seq);
            // What a later record hides may be older than it and newer than home.
            complete &= newest == entry && zeroes.is_none_or(|seq| seq <= job.through.seq.0);
            if let Some(entry) = entry {
                meta.set(index, BlockState::Present(entry.crc));
                moves.push(Move { index, entry });
                changed = true;
                let segment = self.segments.of(entry.sector);
                last = last.max(self.segments.all[segment].last_seq);
            } else if let Some(seq) = zeroes.filter(|seq| *seq <= job.through.seq.0)
                && !planted::is(Bug::DiscardForgotten)
            {
                changed |= meta.block(index) != BlockState::Absent;
                meta.set(index, BlockState::Absent);
                last = last.max(Seq(seq));
            }
        }
        let target = &mut self.flush.wave.targets[at];
        // A chunk that was filled may be without these blocks before their discard comes: what it says of
        // itself would be too old, and whoever has it older still would keep that.
        changed |= target.old.is_some_and(|old| old.newest != Seq::ZERO && old.newest < last);
        target.empty = meta.is_all_absent();
        target.changed = changed;
        target.complete = complete;
        target.newest = last;
        target.meta = meta;
        target.moves = moves;
        target.loaded = true;
    }

    fn pump_moves(&mut self) {
        let Some(job) = self.flush.job else { return };
        let limit = usize::from(if self.is_pressed() {
            self.config.flush.operations_pressed
        } else {
            self.config.flush.operations
        });
        let mut all = true;
        for at in 0..self.flush.wave.targets.len() {
            if !self.flush.wave.targets[at].loaded && !self.load_target(&job, at) {
                all = false;
                continue;
            }
            while self.flush.wave.in_flight < limit.max(1) {
                match self.next_mover(&job, at) {
                    Some(true) => {}
                    Some(false) => return self.starved(),
                    None => break,
                }
            }
            let target = &self.flush.wave.targets[at];
            all &= target.next == target.moves.len() && target.singles.is_empty();
        }
        if all && self.flush.wave.in_flight == 0 {
            self.flush.wave.stamps.clear();
            for at in 0..self.flush.wave.targets.len() {
                let target = &self.flush.wave.targets[at];
                if target.written {
                    let device = self.chunk_offset(target.place.location).0;
                    self.stamp_wave(device);
                }
            }
            self.flush.wave.phase = Phase::DataSync;
        }
    }

    fn stamp_wave(&mut self, device: DeviceIndex) {
        let stamp = self.want_sync(device);
        let stamps = &mut self.flush.wave.stamps;
        match stamps.iter_mut().find(|(other, _)| *other == device) {
            Some(entry) => entry.1 = stamp,
            None => stamps.push((device, stamp)),
        }
    }

    /// Starts a target's next mover: false if memory was short, `None` if there is none.
    fn next_mover(&mut self, job: &Job, at: usize) -> Option<bool> {
        let block_size = self.replica_ref(job.slot).block_size;
        let target = &self.flush.wave.targets[at];
        let single = target.singles.last().copied();
        let (first, count, kind) = match single {
            Some((first, count)) => (first, count, MoverKind::Run),
            None => match block_size {
                BlockSize::B4096 => {
                    let count = run_of_pages(&target.moves[target.next..]);
                    (target.next, count, MoverKind::Run)
                }
                BlockSize::B512 => small_run(&target.moves, target.next),
            },
        };
        if count == 0 {
            return None;
        }
        let mover =
            Mover { target: at, first, count, kind, image: None, copied: 0, home_read: false };
        let started = match kind {
            MoverKind::Run => self.start_run(mover, block_size),
            MoverKind::Mixed => self.start_mixed(mover),
        };
        if started {
            let target = &mut self.flush.wave.targets[at];
            if single.is_some() {
                target.singles.pop();
            } else {
                target.next = first + count;
            }
        }
        Some(started)
    }

    fn add_mover(&mut self, mover: Mover) -> MoverId {
        let wave = &mut self.flush.wave;
        wave.in_flight += 1;
        if let Some(free) = wave.movers_free.pop() {
            wave.movers[free as usize] = Some(mover);
            return MoverId(free);
        }
        wave.movers.push(Some(mover));
        MoverId(u32::try_from(wave.movers.len() - 1).expect("movers are bounded"))
    }

    fn end_mover(&mut self, id: MoverId) {
        let wave = &mut self.flush.wave;
        wave.movers[id.0 as usize] = None;
        wave.movers_free.push(id.0);
        wave.in_flight -= 1;
    }

    /// The bytes of a run: pages of log.
    fn run_bytes(count: usize, block_size: BlockSize) -> usize {
        count * block_size.bytes() as usize
    }

    fn log_place(&self, sector: LogSector) -> (DeviceIndex, u64) {
        let (segment, within) = self.segments.locate(sector);
        let device = self.segments.all[segment as usize].device;
        (device, self.segment_offset(segment) + within)
    }

    fn start_run(&mut self, mover: Mover, block_size: BlockSize) -> bool {
        let length = Self::run_bytes(mover.count, block_size);
        let Some(buffer) = self.take_buffer(length) else { return false };
        let sector = self.flush.wave.targets[mover.target].moves[mover.first].entry.sector;
        let (device, offset) = self.log_place(sector);
        let id = self.add_mover(mover);
        self.read(device, offset, buffer, length, Task::Mover(id));
        true
    }

    pub(crate) fn mover_read(&mut self, id: MoverId, data: Option<BufferMut>) {
        if self.failed.is_some() {
            return;
        }
        let mover = self.flush.wave.movers[id.0 as usize].as_ref().expect("a mover under way");
        match mover.kind {
            MoverKind::Run => self.run_read(id, data),
            MoverKind::Mixed => self.mixed_read(id, data),
        }
    }

    fn run_read(&mut self, id: MoverId, data: Option<BufferMut>) {
        let Some(job) = self.flush.job else { return };
        let block_size = self.replica_ref(job.slot).block_size;
        let mover = self.flush.wave.movers[id.0 as usize].as_ref().expect("a mover under way");
        let (at, first, count) = (mover.target, mover.first, mover.count);
        let per_page = PAGE_BYTES >> block_size.log2();
        let target = &mut self.flush.wave.targets[at];
        let Some(data) = data else {
            if count > per_page {
                // Find out which pages it is.
                let pages = (first..first + count).step_by(per_page);
                target.singles.extend(pages.map(|first| (first, per_page)));
            } else {
                for number in first..first + count {
                    let index = target.moves[number].index;
                    target.meta.set(index, BlockState::Damaged);
                }
            }
            return self.end_mover(id);
        };
        let blocks = data.payload().chunks_exact(block_size.bytes() as usize);
        for (step, block) in target.moves[first..first + count].iter().zip(blocks) {
            if crc32c(block) != step.entry.crc {
                target.meta.set(step.index, BlockState::Damaged);
            }
        }
        target.written = true;
        let index = target.moves[first].index as u64;
        let length = Self::run_bytes(count, block_size);
        let (device, offset) = self.chunk_data_offset(self.flush.wave.targets[at].place.location);
        let offset = offset + index * u64::from(block_size.bytes());
        self.write(device, offset, Parts::one(data.freeze().payload(length)), Task::Mover(id));
    }

    pub(crate) fn mover_written(&mut self, id: MoverId) {
        self.end_mover(id);
    }

    // Pages of 512-byte blocks that come from several places: read the page from home unless all
    // that matters of it is overwritten, copy the blocks in, write it back. A neighbour that is
    // not in the log is written as it was, so a torn write does not change it.

    fn start_mixed(&mut self, mut mover: Mover) -> bool {
        let (Some(mut image), Some(scratch)) =
            (self.take_buffer(PAGE_BYTES), self.take_buffer(PAGE_BYTES))
        else {
            return false;
        };
        image.payload_mut()[..PAGE_BYTES].fill(0);
        let target = &self.flush.wave.targets[mover.target];
        let page = target.moves[mover.first].index / 8;
        let moved = &target.moves[mover.first..mover.first + mover.count];
        let needs_home = (page * 8..page * 8 + 8).any(|index| {
            matches!(target.meta.block(index), BlockState::Present(_))
                && !moved.iter().any(|step| step.index == index)
        });
        mover.image = Some(image);
        mover.home_read = !needs_home;
        let location = target.place.location;
        let id = self.add_mover(mover);
        if needs_home {
            let (device, offset) = self.chunk_data_offset(location);
            let offset = offset + page as u64 * PAGE_BYTES as u64;
            self.read(device, offset, scratch, PAGE_BYTES, Task::Mover(id));
        } else {
            self.read_mixed_log(id, scratch);
        }
        true
    }

    fn read_mixed_log(&mut self, id: MoverId, scratch: BufferMut) {
        let mover = self.flush.wave.movers[id.0 as usize].as_ref().expect("a mover under way");
        let target = &self.flush.wave.targets[mover.target];
        let sector = target.moves[mover.first + mover.copied].entry.sector;
        let page = LogSector(sector.0 - sector.0 % PAGE_SECTORS);
        let (device, offset) = self.log_place(page);
        self.read(device, offset, scratch, PAGE_BYTES, Task::Mover(id));
    }

    fn mixed_read(&mut self, id: MoverId, data: Option<BufferMut>) {
        let wave = &mut self.flush.wave;
        let mover = wave.movers[id.0 as usize].as_mut().expect("a mover under way");
        let target = &mut wave.targets[mover.target];
        let moves = &target.moves[mover.first..mover.first + mover.count];
        let page = moves[0].index / 8;
        let image = mover.image.as_mut().expect("a mixed page has its image");
        let failed = data.is_none();
        let Some(scratch) = data.or_else(|| self.config.buffers.take(PAGE_BYTES)) else {
            // Nothing to go on with: what this page needs is marked, never guessed.
            for step in moves {
                target.meta.set(step.index, BlockState::Damaged);
            }
            return self.end_mover(id);
        };
        if mover.home_read {
            let log_page = moves[mover.copied].entry.sector.0 / PAGE_SECTORS;
            while let Some(step) = moves.get(mover.copied)
                && step.entry.sector.0 / PAGE_SECTORS == log_page
            {
                let from = (step.entry.sector.0 % PAGE_SECTORS) as usize * 512;
                let block = &scratch.payload()[from..from + 512];
                if failed || crc32c(block) != step.entry.crc {
                    target.meta.set(step.index, BlockState::Damaged);
                }
                let to = step.index % 8 * 512;
                image.payload_mut()[to..to + 512].copy_from_slice(block);
                mover.copied += 1;
            }
        } else {
            mover.home_read = true;
            image.payload_mut()[..PAGE_BYTES].copy_from_slice(&scratch.payload()[..PAGE_BYTES]);
            for index in page * 8..page * 8 + 8 {
                let block = &image.payload()[index % 8 * 512..][..512];
                let moved = moves.iter().any(|step| step.index == index);
                if let BlockState::Present(crc) = target.meta.block(index)
                    && !moved
                    && (failed || crc32c(block) != crc)
                {
                    target.meta.set(index, BlockState::Damaged);
                }
            }
        }
        if mover.copied < moves.len() {
            return self.read_mixed_log(id, scratch);
        }
        drop(scratch);
        target.written = true;
        let image = mover.image.take().expect("as above").freeze().payload(PAGE_BYTES);
        let location = target.place.location;
        let (device, offset) = self.chunk_data_offset(location);
        let offset = offset + page as u64 * PAGE_BYTES as u64;
        self.write(device, offset, Parts::one(image), Task::Mover(id));
    }

    /// Some device has been synced.
    pub(crate) fn flush_synced(&mut self) {
        let phase = self.flush.wave.phase;
        if !matches!(phase, Phase::DataSync | Phase::MetaSync) {
            return;
        }
        let done = self
            .flush
            .wave
            .stamps
            .iter()
            .all(|(device, stamp)| self.devices[usize::from(device.0)].syncs_done >= *stamp);
        let hasty = match phase {
            Phase::DataSync => planted::is(Bug::HomeBeforeData),
            Phase::MetaSync => planted::is(Bug::HomeBeforeMeta) || planted::is(Bug::HomeBeforeData),
            Phase::Gather | Phase::Move | Phase::Meta | Phase::Journal => false,
        };
        if !done && !hasty {
            return;
        }
        self.flush.wave.stamps.clear();
        if phase == Phase::DataSync {
            self.flush.wave.phase = Phase::Meta;
        } else {
            self.flush.wave.phase = Phase::Journal;
            self.write_wave_entries();
        }
    }

    fn pump_meta(&mut self) {
        let Some(job) = self.flush.job else { return };
        for at in 0..self.flush.wave.targets.len() {
            let target = &self.flush.wave.targets[at];
            if target.meta_sent || target.empty || !target.changed {
                continue;
            }
            let replica = self.replica_ref(job.slot);
            let blocks = self.chunk_blocks(replica.block_size);
            let length = ChunkMeta::encoded_bytes(blocks);
            let Some(mut buffer) = self.take_buffer(length) else { return self.starved() };
            self.journal.version = self.journal.version.wrapping_add(1);
            let version = self.journal.version;
            let target = &mut self.flush.wave.targets[at];
            target.place.version = version;
            target.place.newest = target.newest_at_home(job.through.seq);
            target.meta.newest = target.place.newest;
            target.meta_sent = true;
            let place = target.place;
            let identity = self.chunk_identity(
                self.replica_ref(job.slot),
                self.flush.wave.targets[at].chunk,
                place,
            );
            let meta = &self.flush.wave.targets[at].meta;
            meta.encode(&identity, &mut buffer.payload_mut()[..length]);
            let (device, offset) = self.chunk_slot_offset(place.location, place.slot);
            self.flush.wave.in_flight += 1;
            let parts = Parts::one(buffer.freeze().payload(length));
            self.write(device, offset, parts, Task::WaveMeta);
        }
        if self.flush.wave.in_flight == 0 {
            for at in 0..self.flush.wave.targets.len() {
                let target = &self.flush.wave.targets[at];
                if target.meta_sent {
                    let device = self.chunk_offset(target.place.location).0;
                    self.stamp_wave(device);
                }
            }
            self.flush.wave.phase = Phase::MetaSync;
        }
    }

    pub(crate) fn wave_meta_written(&mut self, _device: DeviceIndex) {
        self.flush.wave.in_flight -= 1;
    }

    fn write_wave_entries(&mut self) {
        let Some(job) = self.flush.job else { return };
        let mut last: Option<Entry> = None;
        for at in 0..self.flush.wave.targets.len() {
            let target = &self.flush.wave.targets[at];
            let (replica, chunk) = (job.slot, target.chunk);
            let entry = if target.empty {
                target.old.map(|_| Entry::ChunkFree { replica, chunk })
            } else if target.changed {
                Some(Entry::Chunk { replica, chunk, place: target.place })
            } else {
                None
            };
            if let Some(entry) = entry
                && let Some(before) = last.replace(entry)
            {
                self.journal.push(before, After::Nothing);
            }
        }
        match last {
            Some(entry) => self.journal.push(entry, After::Wave),
            None => self.wave_durable(),
        }
    }

    /// Where the log has the version of a block of `slot` that is being put in home's place of it:
    /// until that counts, the block cannot be read from home.
    pub(crate) fn moving(&self, slot: u16, chunk: u32, index: usize) -> Option<IndexEntry> {
        if !self.flush.is_busy_with(slot) {
            return None;
        }
        let target = self.flush.wave.targets.iter().find(|target| target.chunk == chunk)?;
        let at = target.moves.binary_search_by_key(&index, |step| step.index).ok()?;
        Some(target.moves[at].entry)
    }

    /// Chunks that the wave has taken and that are in no map yet.
    pub(crate) fn wave_chunks(&self) -> usize {
        let Some(job) = self.flush.job else { return 0 };
        let map = &self.replica_ref(job.slot).chunks;
        let is_new = |target: &&Target| {
            target.old.is_none()
                && map.place(target.chunk).map(|place| place.location)
                    != Some(target.place.location)
        };
        self.flush.wave.targets.iter().filter(is_new).count()
    }

    /// The journal has the wave: home is where its blocks are now.
    pub(crate) fn wave_durable(&mut self) {
        let Some(job) = self.flush.job else { return };
        let block_size = self.replica_ref(job.slot).block_size;
        let blocks = self.chunk_blocks(block_size) as u64;
        let mut targets = core::mem::take(&mut self.flush.wave.targets);
        for mut target in targets.drain(..) {
            let first = u64::from(target.chunk) * blocks;
            for step in &target.moves {
                let block = first + step.index as u64;
                // A newer version in the log stays there.
                let found = self.index.lookup(job.slot, block);
                if found == Some(step.entry)
                    || planted::is(Bug::NewerBlockDropped) && found.is_some()
                {
                    self.index.remove(job.slot, block);
                    let segment = self.segments.of(step.entry.sector);
                    self.segments.all[segment].live -= 1;
                }
            }
            let replica = self.replica_mut(job.slot);
            replica.extents.cut(first, first + blocks, job.through.seq.0);
            if target.changed && !target.empty {
                let meta = &target.meta;
                self.cache.insert(target.place.location, target.place.version, |cached| {
                    cached.copy_from(meta);
                    true
                });
            } else if target.old.is_none() {
                // It was made for nothing.
                self.chunks.release(target.place.location);
            }
            target.moves.clear();
            self.flush.wave.spare_moves.push(target.moves);
            self.flush.spare_meta.push(target.meta);
        }
        self.flush.wave.targets = targets;
        self.flush.wave.phase = Phase::Gather;
        self.flush.wave.waves_done += 1;
        self.go_on_soon();
    }
}

/// How many 4 KiB moves in a row are in a row in the log and at home.
fn run_of_pages(moves: &[Move]) -> usize {
    let in_row = moves.windows(2).take(RUN_PAGES_MAX - 1).take_while(|pair| {
        pair[1].index == pair[0].index + 1
            && pair[1].entry.sector.0 == pair[0].entry.sector.0 + PAGE_SECTORS
    });
    if moves.is_empty() { 0 } else { in_row.count() + 1 }
}

/// The next moves of 512-byte blocks: whole pages in a row, or the moves of one page.
fn small_run(moves: &[Move], first: usize) -> (usize, usize, MoverKind) {
    let rest = &moves[first..];
    if rest.is_empty() {
        return (first, 0, MoverKind::Mixed);
    }
    let page = rest[0].index / 8;
    let in_page = rest.iter().take_while(|step| step.index / 8 == page).count();
    let aligned = rest[0].index.is_multiple_of(8) && rest[0].entry.sector.0.is_multiple_of(8);
    let in_row = 1 + rest
        .windows(2)
        .take(RUN_PAGES_MAX * 8 - 1)
        .take_while(|pair| {
            pair[1].index == pair[0].index + 1
                && pair[1].entry.sector.0 == pair[0].entry.sector.0 + 1
        })
        .count();
    if aligned && in_row >= 8 {
        (first, in_row - in_row % 8, MoverKind::Run)
    } else {
        (first, in_page, MoverKind::Mixed)
    }
}
