//! Simulated devices and a driver that completes disk operations in any order.

// Shared by test programs that each use a part of it.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

use std::collections::BTreeMap;

use base::{BufferPool, ClusterId, Instant, PoolId, ReplicaError, ReplyBody, ServerId};
use core::time::Duration;
use store::{
    Command, DeviceIndex, DeviceInfo, DeviceRole, DiskError, DiskKind, DiskOperation, DiskResult,
    FlushPolicy, FormatConfig, Input, LogLeft, OpenError, Output, Store, StoreConfig, format,
};

pub const SECTOR: usize = 512;

/// xorshift64*: small, and the same everywhere.
#[derive(Clone)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        let mut random = Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0xdead_beef_cafe_f00d);
        for _ in 0..8 {
            random.next();
        }
        random
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

/// A device: what is on media, and for each sector what was written and not synced.
#[derive(Clone)]
pub struct Disk {
    pub media: Vec<u8>,
    volatile: BTreeMap<usize, Vec<(u64, [u8; SECTOR])>>,
    writes: u64,
    /// Sectors that cannot be read.
    pub latent: std::collections::BTreeSet<usize>,
    pub fail_writes: bool,
    pub fail_syncs: bool,
}

impl Disk {
    pub fn new(bytes: u64) -> Self {
        Self::holding(vec![0; usize::try_from(bytes).unwrap()])
    }

    pub fn holding(media: Vec<u8>) -> Self {
        Self {
            media,
            volatile: BTreeMap::new(),
            writes: 0,
            latent: std::collections::BTreeSet::new(),
            fail_writes: false,
            fail_syncs: false,
        }
    }

    pub fn write(&mut self, offset: u64, bytes: &[u8]) {
        self.writes += 1;
        let first = usize::try_from(offset).unwrap() / SECTOR;
        for (number, sector) in bytes.chunks_exact(SECTOR).enumerate() {
            assert!((first + number + 1) * SECTOR <= self.media.len(), "write past the end");
            self.latent.remove(&(first + number));
            let versions = self.volatile.entry(first + number).or_default();
            versions.push((self.writes, sector.try_into().unwrap()));
        }
    }

    pub fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), DiskError> {
        let first = usize::try_from(offset).unwrap() / SECTOR;
        for (number, sector) in into.chunks_exact_mut(SECTOR).enumerate() {
            let at = first + number;
            if self.latent.contains(&at) {
                return Err(DiskError::Io);
            }
            match self.volatile.get(&at).and_then(|versions| versions.last()) {
                Some((_, bytes)) => sector.copy_from_slice(bytes),
                None => sector.copy_from_slice(&self.media[at * SECTOR..(at + 1) * SECTOR]),
            }
        }
        Ok(())
    }

    /// The number that a sync issued now must carry.
    pub fn mark(&self) -> u64 {
        self.writes
    }

    pub fn sync(&mut self, mark: u64) {
        let media = &mut self.media;
        self.volatile.retain(|at, versions| {
            if let Some(last) = versions.iter().rposition(|(number, _)| *number <= mark) {
                media[at * SECTOR..(at + 1) * SECTOR].copy_from_slice(&versions[last].1);
                versions.drain(..=last);
            }
            !versions.is_empty()
        });
    }

    /// Power is lost: of the sectors that were not synced, which are counted from the first, all have landed but
    /// those that are `lost`.
    pub fn crash_without(&mut self, lost: impl Fn(usize) -> bool) {
        for (number, (at, versions)) in core::mem::take(&mut self.volatile).into_iter().enumerate()
        {
            if !lost(number) {
                let (_, last) = versions.last().expect("it was written");
                self.media[at * SECTOR..(at + 1) * SECTOR].copy_from_slice(last);
            }
        }
    }

    /// Power is lost: of each unsynced sector any version may have made it.
    pub fn crash(&mut self, random: &mut Random) {
        let keep = random.below(101);
        for (at, versions) in core::mem::take(&mut self.volatile) {
            if random.chance(keep) {
                let pick = usize::try_from(random.below(versions.len() as u64)).unwrap();
                let sector = &mut self.media[at * SECTOR..(at + 1) * SECTOR];
                sector.copy_from_slice(&versions[pick].1);
            }
        }
    }
}

/// Shape of a pool under test.
#[derive(Clone, Debug)]
pub struct Shape {
    pub devices: Vec<DeviceInfo>,
    pub log_bytes: u64,
    pub segment_bytes: u64,
    pub chunk_bytes: u64,
    pub flush: FlushPolicy,
    pub buffers: (usize, usize),
    pub scrub_bytes_per_second: u64,
    /// Now and then, another process is about to open the pool, and does not.
    pub leaves: bool,
}

impl Shape {
    pub fn any(random: &mut Random) -> Self {
        let fast = |bytes| DeviceInfo { bytes, role: DeviceRole::Fast };
        let mass = |bytes| DeviceInfo { bytes, role: DeviceRole::Mass };
        let (devices, log_bytes) = match random.below(3) {
            0 => (vec![fast(32 << 20)], 6 << 20),
            1 => (vec![fast(10 << 20), mass(24 << 20)], 0),
            _ => (vec![fast(8 << 20), fast(9 << 20), mass(12 << 20), mass(12 << 20)], 0),
        };
        Self {
            devices,
            log_bytes,
            segment_bytes: 512 << 10,
            chunk_bytes: 64 << (10 + random.below(2)),
            flush: FlushPolicy {
                log_fill_percent: u8::try_from(random.below(60)).unwrap(),
                index_fill_percent: 50,
                age: Duration::from_millis(1 + random.below(2000)),
                idle: Duration::from_millis(1 + random.below(500)),
                operations: u16::try_from(1 + random.below(8)).unwrap(),
                operations_pressed: 16,
                full_bytes: random.below(16) << 19,
            },
            buffers: (64 + usize::try_from(random.below(100)).unwrap(), 16),
            scrub_bytes_per_second: 0,
            leaves: true,
        }
    }
}

/// One fast and one mass device, large chunks of neither.
pub fn shape() -> Shape {
    Shape {
        devices: vec![
            DeviceInfo { bytes: 12 << 20, role: DeviceRole::Fast },
            DeviceInfo { bytes: 24 << 20, role: DeviceRole::Mass },
        ],
        log_bytes: 0,
        segment_bytes: 512 << 10,
        chunk_bytes: 64 << 10,
        flush: FlushPolicy {
            idle: Duration::from_millis(100),
            age: Duration::from_millis(500),
            ..FlushPolicy::default()
        },
        buffers: (128, 24),
        scrub_bytes_per_second: 0,
        leaves: false,
    }
}

pub fn pool_id() -> PoolId {
    PoolId::from_bytes([1; 16])
}

pub fn config(shape: &Shape) -> StoreConfig {
    StoreConfig {
        pool: Some(pool_id()),
        cluster: ClusterId::from_bytes([2; 16]),
        server: ServerId::from_bytes([3; 16]),
        buffers: BufferPool::heap(shape.buffers.0, shape.buffers.1),
        flush: shape.flush,
        scrub_bytes_per_second: shape.scrub_bytes_per_second,
    }
}

pub fn format_config(shape: &Shape) -> FormatConfig {
    FormatConfig {
        pool: pool_id(),
        cluster: ClusterId::from_bytes([2; 16]),
        server: ServerId::from_bytes([3; 16]),
        devices: shape.devices.clone(),
        log_bytes: shape.log_bytes,
        segment_bytes: shape.segment_bytes,
        chunk_bytes: shape.chunk_bytes,
        replicas_max: 16,
    }
}

struct InFlight {
    operation: DiskOperation,
    mark: u64,
    /// Completes when nothing else is under way.
    late: bool,
}

/// A store on simulated devices.
pub struct World {
    pub disks: Vec<Disk>,
    pub shape: Shape,
    pub store: Store,
    pub now: Instant,
    pub random: Random,
    in_flight: Vec<InFlight>,
    /// What was said at the last hand-over, and of which generation.
    told: Option<(u64, LogLeft)>,
    pub answers: Vec<(u64, Result<ReplyBody, ReplicaError>)>,
    pub opened: Option<Result<(), OpenError>>,
    pub failed: bool,
    pub damaged: usize,
    /// Ranges that a scrub has found damaged.
    pub scrubbed: Vec<(u64, u32)>,
    /// Devices whose copy of the metadata was not whole.
    pub mended: Vec<DeviceIndex>,
    pub operations: u64,
    /// Power goes when so many operations have completed.
    pub cut_after: Option<u64>,
    /// The next read of this device at this offset is answered when nothing else is under way.
    pub late_read: Option<(DeviceIndex, u64)>,
}

impl World {
    pub fn new(shape: Shape, random: Random) -> Self {
        let mut disks: Vec<Disk> =
            shape.devices.iter().map(|device| Disk::new(device.bytes)).collect();
        for write in format(&format_config(&shape)).expect("the pool can be made") {
            disks[usize::from(write.device.0)].write(write.offset, &write.bytes);
        }
        for disk in &mut disks {
            disk.sync(u64::MAX);
        }
        let mut world = Self::on(disks, shape, random);
        world.finish_opening().expect("a fresh pool opens");
        world
    }

    /// A store that has just begun to open a pool on these.
    pub fn on(disks: Vec<Disk>, shape: Shape, random: Random) -> Self {
        let store = Store::open(config(&shape), &shape.devices);
        Self {
            disks,
            store,
            now: Instant::ZERO,
            random,
            in_flight: Vec::new(),
            told: None,
            answers: Vec::new(),
            opened: None,
            failed: false,
            damaged: 0,
            scrubbed: Vec::new(),
            mended: Vec::new(),
            operations: 0,
            cut_after: None,
            late_read: None,
            shape,
        }
    }

    pub fn command(&mut self, tag: u64, command: Command) {
        self.store.handle(self.now, Input::Command { tag, command });
    }

    /// Takes all outputs.
    pub fn drain(&mut self) {
        while let Some(output) = self.store.poll_output() {
            match output {
                Output::Opened(result) => {
                    assert!(self.opened.is_none(), "a store opens once");
                    self.opened = Some(result);
                }
                Output::Disk(operation) => {
                    let mark = self.disks[usize::from(operation.device.0)].mark();
                    let is_late = |place: &mut (DeviceIndex, u64)| match &operation.kind {
                        DiskKind::Read { offset, .. } => *place == (operation.device, *offset),
                        DiskKind::Write { .. } | DiskKind::Sync | DiskKind::Discard { .. } => false,
                    };
                    let late = self.late_read.take_if(is_late).is_some();
                    self.in_flight.push(InFlight { operation, mark, late });
                }
                Output::Done { tag, result } => self.answers.push((tag, result)),
                Output::Failed(_) => {
                    assert!(!self.failed, "a failure is told once");
                    self.failed = true;
                }
                Output::Notice(notice) => {
                    if matches!(notice, store::Notice::Damaged(_)) {
                        self.damaged += 1;
                    }
                    if let store::Notice::DamagedBlocks { lba, blocks, .. } = notice {
                        self.scrubbed.push((lba.0, blocks.0));
                    }
                    if let store::Notice::MetadataMended { device } = notice {
                        self.mended.push(device);
                    }
                }
            }
        }
        self.check_quiet();
    }

    /// Nobody comes back before the next completion or deadline, so nothing may be left to do.
    fn check_quiet(&mut self) {
        let soon = self.now + Duration::from_millis(1);
        if self.store.next_deadline().is_none_or(|deadline| deadline > soon) {
            let more = self.store.poll_output();
            assert!(more.is_none(), "{more:?} came only when asked again");
        }
    }

    /// Completes one operation, if any is under way.
    pub fn step(&mut self) -> bool {
        self.drain();
        if self.in_flight.is_empty() {
            return false;
        }
        self.operations += 1;
        let mut pick = usize::try_from(self.random.below(self.in_flight.len() as u64)).unwrap();
        if self.in_flight[pick].late {
            pick = self.in_flight.iter().position(|other| !other.late).unwrap_or(pick);
        }
        let InFlight { operation, mark, .. } = self.in_flight.swap_remove(pick);
        let disk = &mut self.disks[usize::from(operation.device.0)];
        let result = match operation.kind {
            DiskKind::Read { offset, mut buffer, start, length } => {
                assert!(offset % 4096 == 0 && start % 4096 == 0 && length % 4096 == 0);
                let into = &mut buffer.payload_mut()[start..start + length];
                DiskResult::Read(disk.read(offset, into).map(|()| buffer))
            }
            DiskKind::Write { offset, parts } => {
                assert!(offset % 4096 == 0);
                let mut at = offset;
                for part in parts.iter() {
                    assert!(part.bytes().as_ptr().align_offset(4096) == 0, "aligned memory");
                    if !disk.fail_writes {
                        disk.write(at, part.bytes());
                    }
                    at += part.len() as u64;
                }
                DiskResult::Written(if disk.fail_writes { Err(DiskError::Io) } else { Ok(()) })
            }
            DiskKind::Sync => {
                if disk.fail_syncs {
                    DiskResult::Synced(Err(DiskError::Io))
                } else {
                    disk.sync(mark);
                    DiskResult::Synced(Ok(()))
                }
            }
            DiskKind::Discard { offset, length } => {
                let zeroes = vec![0; usize::try_from(length).unwrap()];
                disk.write(offset, &zeroes);
                DiskResult::Discarded(Ok(()))
            }
        };
        self.now = self.now + Duration::from_micros(self.random.below(100));
        let id = operation.id;
        self.store.handle(self.now, Input::DiskDone { id, result });
        self.drain();
        true
    }

    /// Lets time pass until the store's next deadline; false if it has none.
    pub fn tick(&mut self) -> bool {
        let Some(deadline) = self.store.next_deadline() else { return false };
        self.now = self.now.max(deadline);
        self.store.handle(self.now, Input::Tick);
        if self.shape.leaves && self.random.chance(1) {
            let until = self.now + Duration::from_millis(self.random.below(200));
            self.store.handle(self.now, Input::Hasten { until });
        }
        self.drain();
        true
    }

    /// Runs until nothing is under way, letting time pass for at most `idle`.
    pub fn run(&mut self, idle: Duration) {
        let end = self.now + idle;
        for round in 0.. {
            assert!(round < 300_000, "the store comes to rest: {:?}", self.store.usage());
            if self.step() {
                continue;
            }
            match self.store.next_deadline() {
                Some(deadline) if deadline <= end => {
                    self.tick();
                }
                Some(_) | None => return,
            }
        }
    }

    /// Completes so many operations, letting time pass where it must.
    pub fn run_steps(&mut self, steps: u64) {
        for _ in 0..steps {
            if !self.step() && !self.tick() {
                return;
            }
        }
    }

    pub fn is_cut(&self) -> bool {
        self.cut_after.is_some_and(|cut| self.operations >= cut)
    }

    /// As `run`, but power may go first.
    pub fn run_until_cut(&mut self, idle: Duration) {
        let end = self.now + idle;
        while !self.is_cut() {
            if self.step() {
                continue;
            }
            match self.store.next_deadline() {
                Some(deadline) if deadline <= end => {
                    self.tick();
                }
                Some(_) | None => return,
            }
        }
    }

    /// Reopens after the process was killed, or power was lost.
    pub fn reopen(&mut self, power_lost: bool) -> Result<(), OpenError> {
        // What was under way may have happened, in part or in whole.
        for InFlight { operation, .. } in core::mem::take(&mut self.in_flight) {
            let disk = &mut self.disks[usize::from(operation.device.0)];
            if let DiskKind::Write { offset, parts } = operation.kind
                && self.random.chance(50)
                && !disk.fail_writes
            {
                let mut at = offset;
                for part in parts.iter() {
                    if !power_lost || self.random.chance(80) {
                        disk.write(at, part.bytes());
                    }
                    at += part.len() as u64;
                }
            }
        }
        if power_lost {
            for disk in &mut self.disks {
                disk.crash(&mut self.random);
            }
        }
        self.open_anew();
        if let Some((generation, left)) = &self.told
            && !power_lost
            && self.random.chance(50)
        {
            // What was true once, and others have opened the pool since.
            self.store.inherit(*generation, left.clone());
        }
        if self.random.chance(20) {
            // And again, before it is open.
            self.open_in_part();
            return self.reopen(power_lost);
        }
        self.finish_opening()
    }

    /// Reopens after the process has let go of the pool and said where its log is: what was under way
    /// has ended. Returns what it said.
    pub fn hand_over(&mut self) -> Result<LogLeft, OpenError> {
        for InFlight { operation, .. } in core::mem::take(&mut self.in_flight) {
            let disk = &mut self.disks[usize::from(operation.device.0)];
            if let DiskKind::Write { offset, parts } = operation.kind
                && !disk.fail_writes
            {
                let mut at = offset;
                for part in parts.iter() {
                    disk.write(at, part.bytes());
                    at += part.len() as u64;
                }
            }
        }
        let generation = self.store.generation();
        let left = self.store.log_left().expect("it was open");
        self.told = Some((generation, left.clone()));
        self.open_anew();
        self.store.inherit(generation, left.clone());
        if self.random.chance(20) {
            // Whoever was told dies. Perhaps his successor is told the same.
            self.open_in_part();
            if self.random.chance(50) {
                return self.reopen(false).map(|()| left);
            }
            self.in_flight.clear();
            self.open_anew();
            self.store.inherit(generation, left.clone());
        }
        self.finish_opening().map(|()| left)
    }

    fn open_anew(&mut self) {
        self.answers.clear();
        self.opened = None;
        self.failed = false;
        self.store = Store::open(config(&self.shape), &self.shape.devices);
    }

    fn open_in_part(&mut self) {
        for _ in 0..self.random.below(400) {
            if self.opened.is_some() || !self.step() && !self.tick() {
                break;
            }
        }
    }

    fn finish_opening(&mut self) -> Result<(), OpenError> {
        for _ in 0..1_000_000 {
            self.drain();
            if let Some(result) = &self.opened {
                let result = result.clone();
                if result.is_ok() {
                    self.store.check_invariants();
                }
                return result;
            }
            if !self.step() && !self.tick() {
                break;
            }
        }
        panic!("opening does not end");
    }
}
