//! The store: what it holds, how inputs reach its parts, and how disk operations leave it.

use std::collections::{BTreeMap, VecDeque};

use base::limits::{PAGE_BYTES, VOLUME_BYTES_MAX};
use base::{
    BlockSize, Buffer, BufferMut, Epoch, Instant, PoolId, Position, ReplicaError, ReplicaKey,
    ReplyBody, Seq,
};
use core::time::Duration;

use crate::api::{
    Command, DeviceFailure, DiskError, DiskId, DiskKind, DiskOperation, DiskResult, Input, Notice,
    Output, Parts, ReplicaInfo, Stall, StoreConfig, Usage,
};
use crate::cache::ChunkCache;
use crate::fill::Fill;
use crate::flush::{Flush, MoverId};
use crate::home::ChunkSpace;
use crate::index::Index;
use crate::journal::{After, Journal};
use crate::layout::{Areas, DeviceIndex, DeviceInfo, Geometry, PAGE, device_index};
use crate::metadata::Entry;
use crate::read::{FragmentId, Reads};
use crate::recovery::Opening;
use crate::replay::Replay;
use crate::replica::{Exclusive, Replica};
use crate::scrub::Scrub;
use crate::segments::{SegmentState, Segments};

/// How soon to try again when memory was short.
const STARVED_RETRY: Duration = Duration::from_millis(1);

/// Whose a disk operation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Task {
    /// Nobody waits for it.
    Ignore,
    /// A batch of a replica's log.
    Batch {
        replica: u16,
        incarnation: u32,
        number: u64,
    },
    Sync,
    Journal,
    /// A read that recovers the pool.
    Opening {
        piece: u32,
    },
    /// A read that rebuilds an index.
    Replay {
        read: u64,
    },
    Fragment(FragmentId),
    /// Chunk metadata on its way into the cache.
    CacheFill {
        location: u32,
    },
    Scan {
        scan: u32,
    },
    Mover(MoverId),
    /// Chunk metadata of the flush wave.
    WaveMeta,
    /// Data or metadata of a staged chunk.
    Fill {
        write: u32,
    },
    /// A freed chunk.
    Discard {
        location: u32,
    },
}

struct Operation {
    round: u32,
    active: Option<(Task, DeviceIndex)>,
}

/// A device and the syncs of it.
pub(crate) struct Device {
    pub(crate) info: DeviceInfo,
    pub(crate) areas: Areas,
    /// Index of its first chunk in the pool.
    pub(crate) first_chunk: u32,
    /// Index of its first segment in the pool.
    pub(crate) first_segment: u32,
    syncs_issued: u64,
    pub(crate) syncs_done: u64,
    sync_wanted: u64,
}

/// What a store is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Opening,
    Open,
    /// It could not be opened.
    Closed,
}

/// One pool of one server.
pub struct Store {
    pub(crate) config: StoreConfig,
    pub(crate) now: Instant,
    pub(crate) phase: Phase,
    pub(crate) failed: Option<DeviceFailure>,
    /// Commands answered `Damaged`.
    damaged_answers: u64,
    pub(crate) pool: PoolId,
    pub(crate) geometry: Geometry,
    pub(crate) devices: Vec<Device>,
    pub(crate) replicas: Vec<Option<Replica>>,
    pub(crate) by_key: BTreeMap<ReplicaKey, u16>,
    pub(crate) segments: Segments,
    pub(crate) index: Index,
    pub(crate) chunks: ChunkSpace,
    pub(crate) cache: ChunkCache,
    pub(crate) journal: Journal,
    pub(crate) reads: Reads,
    pub(crate) flush: Flush,
    pub(crate) fill: Fill,
    pub(crate) scrub: Scrub,
    pub(crate) opening: Opening,
    pub(crate) replay: Option<Replay>,
    /// Reads of replays, all that there were.
    pub(crate) replay_reads: u64,
    /// Replicas with something to append.
    pub(crate) ready: Vec<u16>,
    pub(crate) stalled: Option<Stall>,
    pub(crate) zero_page: Buffer,
    pub(crate) spare_records: Vec<Vec<base::Record>>,
    pub(crate) last_append: Instant,
    /// The last read or append.
    pub(crate) last_used: Instant,
    /// Segments that a truncation voids, until that is durable.
    pub(crate) voided: Vec<(u16, u32)>,
    /// The entries of the last list, to be used again.
    pub(crate) listed: Vec<base::chunks::ListEntry>,
    /// Chunks whose device is being told that they are free.
    pub(crate) releasing: u32,
    outputs: VecDeque<Output>,
    /// Nothing has come in since there was nothing to do.
    pub(crate) settled: bool,
    operations: Vec<Operation>,
    operations_free: Vec<u32>,
    pub(crate) retry_at: Option<Instant>,
}

impl Store {
    /// Begins to open the pool on `devices`, which are in the order of their indexes. Nothing is
    /// known until [`Output::Opened`] comes.
    ///
    /// # Panics
    /// If the configuration has fewer buffers than a store needs.
    pub fn open(config: StoreConfig, devices: &[DeviceInfo]) -> Self {
        let (small, large) = config.buffers.available();
        assert!(
            small >= StoreConfig::SMALL_BUFFERS_MIN && large >= StoreConfig::LARGE_BUFFERS_MIN,
            "a store needs buffers of its own"
        );
        let mut zero_page = config.buffers.take(PAGE_BYTES).expect("there are enough");
        zero_page.payload_mut().fill(0);
        let device = |info: &DeviceInfo| Device {
            info: *info,
            areas: Areas::default(),
            first_chunk: 0,
            first_segment: 0,
            syncs_issued: 0,
            syncs_done: 0,
            sync_wanted: 0,
        };
        Self {
            now: Instant::ZERO,
            phase: Phase::Opening,
            failed: None,
            damaged_answers: 0,
            pool: PoolId::from_bytes([0; 16]),
            geometry: Geometry::default(),
            devices: devices.iter().map(device).collect(),
            replicas: Vec::new(),
            by_key: BTreeMap::new(),
            segments: Segments::new(0),
            index: Index::new(0),
            chunks: ChunkSpace::new(0),
            cache: ChunkCache::new(),
            journal: Journal::new(),
            reads: Reads::default(),
            flush: Flush::default(),
            fill: Fill::default(),
            scrub: Scrub::default(),
            opening: Opening::default(),
            replay: None,
            replay_reads: 0,
            ready: Vec::new(),
            stalled: None,
            zero_page: zero_page.freeze().payload(PAGE_BYTES),
            spare_records: Vec::new(),
            last_append: Instant::ZERO,
            last_used: Instant::ZERO,
            voided: Vec::new(),
            listed: Vec::new(),
            releasing: 0,
            outputs: VecDeque::with_capacity(256),
            settled: false,
            operations: Vec::new(),
            operations_free: Vec::new(),
            retry_at: None,
            config,
        }
    }

    /// Takes in what happened.
    pub fn handle(&mut self, now: Instant, input: Input) {
        self.now = self.now.max(now);
        self.settled = false;
        match input {
            Input::DiskDone { id, result } => self.disk_done(id, result),
            Input::Command { tag, command } => self.command(tag, command),
            Input::Hasten { until } => self.flush.hasten_until = Some(until),
            Input::Tick => {}
        }
    }

    /// The next thing to do, until there is none. Call it after the inputs of a turn: appends
    /// that came together are written together.
    pub fn poll_output(&mut self) -> Option<Output> {
        if let Some(output) = self.outputs.pop_front() {
            return Some(output);
        }
        // A node asks whenever any of its machines has had something to say.
        if self.settled {
            return None;
        }
        self.retry_at = None;
        self.pump();
        let output = self.outputs.pop_front();
        // Memory that was short may come back without a word to the store.
        self.settled = output.is_none() && self.retry_at.is_none();
        output
    }

    /// When to come back with [`Input::Tick`] if nothing happens before.
    pub fn next_deadline(&self) -> Option<Instant> {
        let scrub = if self.phase == Phase::Open { self.scrub_deadline() } else { None };
        base::time::earliest(base::time::earliest(self.retry_at, self.flush_deadline()), scrub)
    }

    fn pump(&mut self) {
        match self.phase {
            Phase::Opening => {
                // In this order: a replay that ends lets the opening go on, and no output may follow
                // that would bring anybody here again.
                self.pump_replay();
                self.pump_opening();
            }
            Phase::Open => {
                if self.failed.is_none() {
                    // In this order: who waits for staged chunks may go on, and a truncation
                    // begins a replay.
                    self.pump_fill();
                    self.pump_exclusive();
                    self.pump_replay();
                    self.pump_appends();
                    self.pump_trim();
                    self.pump_flush();
                    self.pump_scrub();
                }
                self.pump_reads();
            }
            Phase::Closed => return,
        }
        if self.failed.is_none() {
            self.pump_journal();
            self.pump_syncs();
        }
    }

    /// Memory was short: try again soon even if nothing happens.
    pub(crate) fn starved(&mut self) {
        self.retry_at = Some(self.now + STARVED_RETRY);
    }

    /// There is more to do, but not in this turn.
    pub(crate) fn go_on_soon(&mut self) {
        self.retry_at = Some(self.now);
    }

    pub(crate) fn output(&mut self, output: Output) {
        self.outputs.push_back(output);
    }

    pub(crate) fn done(&mut self, tag: u64, result: Result<ReplyBody, ReplicaError>) {
        self.damaged_answers += u64::from(matches!(result, Err(ReplicaError::Damaged)));
        self.output(Output::Done { tag, result });
    }

    // Disk operations.

    fn emit(&mut self, device: DeviceIndex, task: Task, kind: DiskKind) {
        let slot = self.operations_free.pop().unwrap_or_else(|| {
            self.operations.push(Operation { round: 0, active: None });
            u32::try_from(self.operations.len() - 1).expect("operations are bounded")
        });
        let operation = &mut self.operations[slot as usize];
        operation.round = operation.round.wrapping_add(1);
        operation.active = Some((task, device));
        let id = DiskId(u64::from(operation.round) << 32 | u64::from(slot));
        self.output(Output::Disk(DiskOperation { id, device, kind }));
    }

    pub(crate) fn write(&mut self, device: DeviceIndex, offset: u64, parts: Parts, task: Task) {
        debug_assert!(offset.is_multiple_of(PAGE));
        self.emit(device, task, DiskKind::Write { offset, parts });
    }

    pub(crate) fn read(
        &mut self,
        device: DeviceIndex,
        offset: u64,
        buffer: BufferMut,
        length: usize,
        task: Task,
    ) {
        debug_assert!(offset.is_multiple_of(PAGE) && length.is_multiple_of(PAGE_BYTES));
        debug_assert!(length > 0 && length <= buffer.capacity());
        self.emit(device, task, DiskKind::Read { offset, buffer, start: 0, length });
    }

    pub(crate) fn discard(&mut self, device: DeviceIndex, offset: u64, length: u64, task: Task) {
        self.emit(device, task, DiskKind::Discard { offset, length });
    }

    /// The number of the sync of `device` that covers what has completed until now; asks for it.
    pub(crate) fn want_sync(&mut self, device: DeviceIndex) -> u64 {
        let device = &mut self.devices[usize::from(device.0)];
        device.sync_wanted = device.syncs_issued + 1;
        device.sync_wanted
    }

    /// The number of the next sync of `device`, without asking for it.
    pub(crate) fn next_sync(&self, device: DeviceIndex) -> u64 {
        self.devices[usize::from(device.0)].syncs_issued + 1
    }

    /// Asks for sync number `stamp` of `device`.
    pub(crate) fn want_sync_number(&mut self, device: DeviceIndex, stamp: u64) {
        let device = &mut self.devices[usize::from(device.0)];
        device.sync_wanted = device.sync_wanted.max(stamp);
    }

    fn pump_syncs(&mut self) {
        for index in 0..self.devices.len() {
            let device = &mut self.devices[index];
            if device.syncs_issued == device.syncs_done && device.sync_wanted > device.syncs_issued
            {
                device.syncs_issued += 1;
                self.emit(device_index(index), Task::Sync, DiskKind::Sync);
            }
        }
    }

    fn disk_done(&mut self, id: DiskId, result: DiskResult) {
        let slot = u32::try_from(id.0 & u64::from(u32::MAX)).expect("masked");
        let round = u32::try_from(id.0 >> 32).expect("shifted");
        let Some(operation) = self.operations.get_mut(slot as usize) else { return };
        if operation.round != round {
            return;
        }
        let Some((task, device)) = operation.active.take() else { return };
        self.operations_free.push(slot);
        if self.phase == Phase::Closed {
            return;
        }
        match result {
            DiskResult::Read(result) => self.read_done(task, device, result),
            DiskResult::Written(Ok(())) => self.written(task, device),
            DiskResult::Written(Err(error)) => self.fail(device, "write", error),
            DiskResult::Synced(Ok(())) => {
                let device = &mut self.devices[usize::from(device.0)];
                device.syncs_done = device.syncs_issued;
                self.synced();
            }
            DiskResult::Synced(Err(error)) => self.fail(device, "sync", error),
            // A hint: whether the device took it does not matter.
            DiskResult::Discarded(_) => {
                if let Task::Discard { location } = task {
                    self.releasing -= 1;
                    self.chunks.release(location);
                }
            }
        }
    }

    fn read_done(&mut self, task: Task, device: DeviceIndex, result: Result<BufferMut, DiskError>) {
        match task {
            Task::Opening { piece } => self.opening_read(piece, device, result),
            Task::Replay { read } => self.replay_read(read, result),
            Task::Fragment(fragment) => self.fragment_read(fragment, result.ok()),
            Task::CacheFill { location } => self.cache_filled(location, result.ok()),
            Task::Scan { scan } => self.scan_read(scan, result.ok()),
            Task::Mover(mover) => self.mover_read(mover, result.ok()),
            Task::Ignore
            | Task::Batch { .. }
            | Task::Sync
            | Task::Journal
            | Task::WaveMeta
            | Task::Fill { .. }
            | Task::Discard { .. } => {}
        }
    }

    fn written(&mut self, task: Task, device: DeviceIndex) {
        if self.failed.is_some() {
            return;
        }
        match task {
            Task::Batch { replica, incarnation, number } => {
                self.batch_written(replica, incarnation, number, device);
            }
            Task::Journal => self.journal_written(),
            Task::Mover(mover) => self.mover_written(mover),
            Task::WaveMeta => self.wave_meta_written(device),
            Task::Fill { write } => self.fill_written(write),
            Task::Ignore
            | Task::Sync
            | Task::Opening { .. }
            | Task::Replay { .. }
            | Task::Fragment(_)
            | Task::CacheFill { .. }
            | Task::Scan { .. }
            | Task::Discard { .. } => {}
        }
    }

    fn synced(&mut self) {
        if self.failed.is_some() {
            return;
        }
        self.journal_synced();
        self.flush_synced();
        self.fill_synced();
        for slot in 0..self.replicas.len() {
            self.replica_synced(slot);
        }
        self.opening_synced();
    }

    /// A write or sync has failed: from now on nothing is acknowledged.
    fn fail(&mut self, device: DeviceIndex, operation: &'static str, error: DiskError) {
        if self.failed.is_some() {
            return;
        }
        let failure = DeviceFailure { device, operation, error };
        self.failed = Some(failure);
        if self.phase == Phase::Opening {
            self.phase = Phase::Closed;
            self.output(Output::Opened(Err(crate::api::OpenError::Failed(failure))));
            return;
        }
        self.output(Output::Failed(failure));
        let mut waiting = self.journal.abandon();
        waiting.extend(self.fill.abandon());
        for tag in waiting {
            self.done(tag, Err(ReplicaError::DeviceFailed));
        }
        for slot in 0..self.replicas.len() {
            let Some(replica) = &mut self.replicas[slot] else { continue };
            let mut tags: Vec<u64> = replica.answers.drain(..).map(|answer| answer.tag).collect();
            tags.extend(replica.flushes.drain(..).map(|(_, tag)| tag));
            tags.extend(replica.seals.drain(..).map(|(_, tag)| tag));
            match replica.exclusive {
                Exclusive::Delete(tag)
                | Exclusive::Fill(tag)
                | Exclusive::Truncate(tag, _)
                | Exclusive::Rebuilding(tag, _) => tags.push(tag),
                Exclusive::None | Exclusive::Journal => {}
            }
            replica.exclusive = Exclusive::None;
            replica.pending.clear();
            replica.batches.clear();
            let parked: Vec<u32> = replica.parked.drain(..).collect();
            for tag in tags {
                self.done(tag, Err(ReplicaError::DeviceFailed));
            }
            for read in parked {
                self.fail_read(read, ReplicaError::DeviceFailed);
            }
        }
        self.ready.clear();
    }

    // Commands.

    fn command(&mut self, tag: u64, command: Command) {
        if self.phase != Phase::Open {
            self.done(tag, Err(ReplicaError::NoReplica));
            return;
        }
        match command {
            Command::Create { key, block_size, blocks } => {
                self.create(tag, key, block_size, blocks);
            }
            Command::Delete { key } => self.delete(tag, key),
            Command::Seal { key, epoch } => self.seal(tag, key, epoch),
            Command::Append { key, record, commit, media } => {
                self.append(tag, key, record, commit, media);
            }
            Command::Read { key, lba, blocks, covers, buffer } => {
                self.start_read(tag, key, lba, blocks, covers, buffer);
            }
            Command::Flush { key } => self.flush_command(tag, key),
            Command::Scan { key, seq, buffer } => self.start_scan(tag, key, (seq, 0), buffer),
            Command::ScanRun { key, seq, records, buffer } => {
                self.start_scan(tag, key, (seq, records), buffer);
            }
            Command::Truncate { key, keep } => self.truncate(tag, key, keep),
            Command::Grow { key, blocks } => self.grow(tag, key, blocks),
            Command::Commit { key, commit } => match self.find(key) {
                Ok(slot) => {
                    self.replica_mut(slot).note_commit(commit);
                    self.note_progress(slot);
                    self.note_settled_later();
                    self.done(tag, Ok(ReplyBody::Done));
                }
                Err(error) => self.done(tag, Err(error)),
            },
            Command::List { key, unit, first, buffer } => self.list(tag, key, unit, first, buffer),
            Command::Fetch { key, lba, end, buffer } => {
                self.start_fetch(tag, key, lba, end, buffer);
            }
            Command::FillBegin { key } => self.fill_begin(tag, key),
            Command::FillChunk { key, chunk, newest } => self.fill_chunk(tag, key, chunk, newest),
            Command::FillData { key, record } => self.fill_data(tag, key, record),
            Command::FillCommit { key, chunk } => self.fill_commit(tag, key, chunk),
            Command::FillFree { key, chunk } => self.fill_free(tag, key, chunk),
            Command::FillEnd { key, position } => self.fill_end(tag, key, position),
        }
    }

    /// The slot of a replica that takes commands.
    pub(crate) fn find(&self, key: ReplicaKey) -> Result<u16, ReplicaError> {
        let slot = *self.by_key.get(&key).ok_or(ReplicaError::NoReplica)?;
        Ok(slot)
    }

    /// As `find`, but for a command that changes something.
    pub(crate) fn find_for_change(&self, key: ReplicaKey) -> Result<u16, ReplicaError> {
        if self.failed.is_some() {
            return Err(ReplicaError::DeviceFailed);
        }
        self.find(key)
    }

    pub(crate) fn replica_ref(&self, slot: u16) -> &Replica {
        self.replicas[usize::from(slot)].as_ref().expect("a slot in use")
    }

    pub(crate) fn replica_mut(&mut self, slot: u16) -> &mut Replica {
        self.replicas[usize::from(slot)].as_mut().expect("a slot in use")
    }

    /// The replica in `slot` if it is still that one.
    pub(crate) fn same_replica(&mut self, slot: u16, incarnation: u32) -> Option<&mut Replica> {
        self.replicas
            .get_mut(usize::from(slot))?
            .as_mut()
            .filter(|replica| replica.incarnation == incarnation)
    }

    fn create(&mut self, tag: u64, key: ReplicaKey, block_size: BlockSize, blocks: u64) {
        if self.failed.is_some() {
            return self.done(tag, Err(ReplicaError::DeviceFailed));
        }
        if let Some(slot) = self.by_key.get(&key) {
            let replica = self.replica_ref(*slot);
            let same = replica.block_size == block_size && replica.exclusive == Exclusive::None;
            let result = if same { Ok(ReplyBody::Done) } else { Err(ReplicaError::Invalid) };
            return self.done(tag, result);
        }
        let creating = |(entry, _): &(Entry, After)| match entry {
            Entry::Create { replica, .. } => Some(*replica),
            _ => None,
        };
        let bytes = blocks.checked_mul(u64::from(block_size.bytes()));
        let reserved: Vec<u16> = self.journal.pending().filter_map(creating).collect();
        let free = (0..self.geometry.replicas_max)
            .filter_map(|slot| u16::try_from(slot).ok())
            .find(|slot| {
                self.replicas.get(usize::from(*slot)).is_none_or(Option::is_none)
                    && !reserved.contains(slot)
            });
        let again = self
            .journal
            .pending()
            .any(|(entry, _)| matches!(entry, Entry::Create { key: other, .. } if *other == key));
        let (Some(slot), Some(1..=VOLUME_BYTES_MAX), false) = (free, bytes, again) else {
            return self.done(tag, Err(ReplicaError::Invalid));
        };
        self.journal.incarnation += 1;
        let incarnation = self.journal.incarnation;
        let entry = Entry::Create { replica: slot, incarnation, key, block_size, blocks };
        self.journal.push(entry, After::Done(tag));
    }

    fn delete(&mut self, tag: u64, key: ReplicaKey) {
        let slot = match self.find_for_change(key) {
            Ok(slot) => slot,
            Err(error) => return self.done(tag, Err(error)),
        };
        if self.replica_ref(slot).exclusive != Exclusive::None {
            return self.done(tag, Err(ReplicaError::Invalid));
        }
        self.abort_staged(slot, ReplicaError::NoReplica);
        self.replica_mut(slot).exclusive = Exclusive::Delete(tag);
        self.drop_pending(slot, Seq::ZERO, ReplicaError::NoReplica);
    }

    fn seal(&mut self, tag: u64, key: ReplicaKey, epoch: Epoch) {
        let slot = match self.find_for_change(key) {
            Ok(slot) => slot,
            Err(error) => return self.done(tag, Err(error)),
        };
        let replica = self.replica_mut(slot);
        let pending = replica.seals.iter().map(|(epoch, _)| *epoch).max();
        let sealed = replica.sealed.max(pending.unwrap_or(Epoch::NONE));
        if epoch < sealed {
            return self.done(tag, Err(ReplicaError::Superseded { sealed }));
        }
        replica.seals.push_back((epoch, tag));
        self.abort_staged(slot, ReplicaError::Superseded { sealed: epoch });
        self.drop_pending(slot, Seq::ZERO, ReplicaError::Superseded { sealed: epoch });
        self.settle(slot);
    }

    /// Carries out what the journal now has.
    pub(crate) fn after_entry(&mut self, entry: Entry, after: After) {
        match after {
            After::Nothing => {}
            After::Done(tag) => self.done(tag, Ok(ReplyBody::Done)),
            After::Sealed(tag) => {
                let Entry::Seal { replica, epoch } = entry else {
                    unreachable!("only a seal is answered so");
                };
                let result = match self.replicas[usize::from(replica)].as_ref() {
                    None => Err(ReplicaError::NoReplica),
                    Some(replica) if replica.sealed > epoch => {
                        Err(ReplicaError::Superseded { sealed: replica.sealed })
                    }
                    Some(replica) => Ok(ReplyBody::Sealed(replica.state())),
                };
                self.done(tag, result);
            }
            After::Truncated(tag) => self.truncated(tag, entry),
            After::Staged(tag) => self.staged_counts(tag, entry),
            After::Wave => self.wave_durable(),
            After::JobStart => self.job_started(),
        }
    }

    // What others may know.

    /// Of the metadata: raised by one with every opening, before anything is answered, and by one with
    /// every checkpoint after that.
    pub fn generation(&self) -> u64 {
        self.journal.generation
    }

    /// The replicas and what is known of them, in the order of their keys.
    pub fn replicas(&self) -> impl Iterator<Item = (ReplicaKey, ReplicaInfo)> + '_ {
        self.by_key.iter().map(|(key, slot)| (*key, self.info(*slot)))
    }

    /// Positions that a replica's log is known to have: where it begins, where it is home, where its
    /// segments end. For checks.
    pub fn log_marks(&self, key: ReplicaKey) -> impl Iterator<Item = Position> + '_ {
        let replica = self.by_key.get(&key).map(|slot| self.replica_ref(*slot));
        let segments = replica.into_iter().flat_map(|replica| &replica.segments);
        let ends = segments.map(|segment| {
            let segment = &self.segments.all[*segment as usize];
            Position::new(segment.last_epoch, segment.last_seq)
        });
        let fixed = replica
            .into_iter()
            .flat_map(|replica| [replica.trimmed, replica.flushed, replica.written]);
        ends.chain(fixed)
    }

    /// What is known of one replica.
    pub fn replica(&self, key: ReplicaKey) -> Option<ReplicaInfo> {
        self.by_key.get(&key).map(|slot| self.info(*slot))
    }

    fn info(&self, slot: u16) -> ReplicaInfo {
        let replica = self.replica_ref(slot);
        ReplicaInfo {
            state: replica.state(),
            block_size: replica.block_size,
            blocks: replica.blocks,
            damaged: replica.damaged,
            noted: replica.noted_through(),
            log_bytes: replica.segments.len() as u64 * self.geometry.segment_bytes,
            home_bytes: replica.chunks.count() as u64 * self.geometry.chunk_bytes,
        }
    }

    /// How often all replicas were looked through for what may go home. For checks.
    pub fn flush_searches(&self) -> u64 {
        self.flush.searches
    }

    /// How full the pool is.
    pub fn usage(&self) -> Usage {
        let segment = self.geometry.segment_bytes;
        let all = self.segments.all.len() as u64;
        let chunk = self.geometry.chunk_bytes;
        Usage {
            log_bytes: all * segment,
            log_used_bytes: (all - self.segments.free.len() as u64) * segment,
            log_dirty_bytes: self.segments.dirty as u64 * segment,
            log_recovery_bytes: self.segments.recovery_bytes(),
            index_entries: self.index.entries() as u64,
            index_entries_max: self.index.entries_max() as u64,
            home_bytes: u64::from(self.chunks.chunks()) * chunk,
            home_used_bytes: u64::from(self.chunks.chunks() - self.chunks.free()) * chunk,
            stalled: self.stalled,
            damaged_answers: self.damaged_answers,
        }
    }

    pub(crate) fn set_stalled(&mut self, stalled: Option<Stall>) {
        if self.stalled != stalled {
            self.stalled = stalled;
            self.search_again();
            self.output(Output::Notice(stalled.map_or(Notice::Resumed, Notice::Stalled)));
        }
    }

    /// Every chunk in use is somebody's, and only his.
    fn check_chunks(&self) {
        let mut seen = std::collections::BTreeSet::new();
        for replica in self.replicas.iter().flatten() {
            let mut from = 0;
            while let Some((chunk, place)) = replica.chunks.next(from) {
                from = u64::from(chunk) + 1;
                assert!(seen.insert(place.location), "a chunk belongs to one replica");
            }
        }
        // A staged chunk may be in the map before the journal's page is worked off.
        seen.extend(self.fill.places());
        let used = seen.len() + self.wave_chunks() + self.releasing as usize;
        assert!(seen.iter().all(|location| self.chunks.is_used(*location)));
        let counted = (self.chunks.chunks() - self.chunks.free()) as usize;
        assert!(counted == used || self.failed.is_some(), "{counted} chunks in use, {used} known");
    }

    /// Asserts what must hold between any two calls. For tests and the simulator: it walks
    /// everything.
    pub fn check_invariants(&self) {
        let mut live = vec![0_u32; self.segments.all.len()];
        for at in 0..self.index.slots() {
            let Some((slot, block, entry)) = self.index.slot(at) else { continue };
            let segment = self.segments.of(entry.sector);
            live[segment] += 1;
            let replica = self.replicas[usize::from(slot)].as_ref().expect("an indexed replica");
            assert!(block < replica.blocks, "an indexed block is within its replica");
            let state = self.segments.all[segment].state;
            assert!(
                matches!(state, SegmentState::Open | SegmentState::Full),
                "an index entry points to {state:?}"
            );
            assert_eq!(self.segments.all[segment].replica, slot);
        }
        for (segment, live) in self.segments.all.iter().zip(live) {
            assert_eq!(segment.live, live, "live counts are right");
        }
        self.check_chunks();
        self.check_nothing();
        assert!(self.segments.blocks <= self.index.entries_max() as u64, "the budget holds");
        for replica in self.replicas.iter().flatten() {
            assert!(replica.blocks <= replica.blocks_coming);
            assert!(replica.trimmed.seq <= replica.written.seq);
            assert!(replica.durable <= replica.written.seq);
            assert!(replica.written.seq <= replica.issued.seq);
            assert!(replica.issued.seq <= replica.queued.seq);
            assert!(replica.commit <= replica.queued.seq);
            if replica.filling {
                assert!(replica.segments.is_empty() && replica.queued == Position::ZERO);
            }
            let ordinals: Vec<u64> = replica
                .segments
                .iter()
                .map(|segment| self.segments.all[*segment as usize].ordinal)
                .collect();
            assert!(ordinals.is_sorted() && ordinals.first() >= ordinals.first());
            assert!(ordinals.iter().all(|ordinal| *ordinal < replica.next_ordinal));
        }
    }
}
