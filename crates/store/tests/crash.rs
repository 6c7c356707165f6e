//! Every crash of small histories.
//!
//! Sequences of up to three operations (write, overwrite, discard, flush, flush to home,
//! checkpoint, growth with a write beyond the old end right behind it), in a log with room and in one where every flush to home is followed by a trim.
//! Power goes after each disk operation that is issued or completes, and of the sectors that were written
//! and not synced any subset has landed; of a sector written twice, any version. The store must
//! open, must hold everything that was promised, and must hold exactly some prefix of the history.
//!
//! Disk operations complete in the order in which they were issued; the other orders are for
//! the random tests (`model`). Only sectors that change anything count. Where there are more than [`SUBSETS_MAX`] subsets, that many
//! are taken: none, all, all but one, one alone, and random ones; the test prints how many crash points that were.
//!
//! `STORE_CRASHES=all` takes every state (83,000, some minutes); else every so-manieth.

#![allow(missing_docs)]
#![allow(clippy::cast_possible_truncation)]

use std::collections::{BTreeMap, VecDeque};

use base::{
    BlockCount, BlockSize, BufferPool, ClusterId, Epoch, Instant, Lba, PoolId, Position, Record,
    RecordHeader, RecordKind, ReplicaError, ReplicaKey, ReplyBody, Seq, ServerId, ShardIndex,
    VolumeId,
};
use core::time::Duration;
use store::{
    Command, DeviceInfo, DeviceRole, DiskKind, DiskOperation, DiskResult, FlushPolicy,
    FormatConfig, Input, LogLeft, Notice, Output, Store, StoreConfig, format,
};

/// Subsets of one crash point that are tried, at most.
const SUBSETS_MAX: usize = 1 << 12;
const SECTOR: usize = 512;
const BLOCKS: u64 = 256;
/// Blocks that one growth adds, and all of a history together at most.
const GROWTH: u64 = 8;
const GROWTH_MAX: u64 = 4 * GROWTH;
const POOL: [u8; 16] = [1; 16];

type Sector = [u8; SECTOR];

/// What is on media; sectors that are not there are zero.
type Media = BTreeMap<u64, Sector>;

fn sector_of(media: &Media, at: u64) -> Sector {
    media.get(&at).copied().unwrap_or([0; SECTOR])
}

/// A write that has been issued and is not synced.
#[derive(Clone)]
struct Volatile {
    number: u64,
    completed: bool,
    sectors: Vec<(u64, Sector)>,
}

/// One store on one device.
struct World {
    store: Store,
    now: Instant,
    media: Media,
    volatile: Vec<Volatile>,
    /// With the last write that had completed when it was issued.
    in_flight: VecDeque<(DiskOperation, u64)>,
    writes: u64,
    answers: Vec<(u64, Result<ReplyBody, ReplicaError>)>,
    opened: bool,
    /// Reads until it was open.
    reads: u64,
    tag: u64,
}

fn key() -> ReplicaKey {
    ReplicaKey { volume: VolumeId::from_bytes([9; 16]), shard: ShardIndex(0) }
}

fn device() -> DeviceInfo {
    DeviceInfo { bytes: 8 << 20, role: DeviceRole::Fast }
}

fn config(buffers: &BufferPool) -> StoreConfig {
    StoreConfig {
        pool: Some(PoolId::from_bytes(POOL)),
        cluster: ClusterId::from_bytes([2; 16]),
        server: ServerId::from_bytes([3; 16]),
        buffers: buffers.clone(),
        flush: FlushPolicy {
            idle: Duration::from_secs(10),
            age: Duration::from_hours(1),
            ..FlushPolicy::default()
        },
        scrub_bytes_per_second: 0,
    }
}

fn formatted() -> Media {
    let config = FormatConfig {
        pool: PoolId::from_bytes(POOL),
        cluster: ClusterId::from_bytes([2; 16]),
        server: ServerId::from_bytes([3; 16]),
        devices: vec![device()],
        log_bytes: 4 << 20,
        segment_bytes: 512 << 10,
        chunk_bytes: 64 << 10,
        replicas_max: 4,
    };
    let mut media = Media::new();
    for write in format(&config).expect("the pool can be made") {
        for (number, bytes) in write.bytes.chunks_exact(SECTOR).enumerate() {
            let at = write.offset / SECTOR as u64 + number as u64;
            media.insert(at, bytes.try_into().expect("a sector"));
        }
    }
    media
}

/// All that was written, synced or not.
fn media_of(world: &World) -> Media {
    let mut media = world.media.clone();
    for write in &world.volatile {
        media.extend(write.sectors.iter().copied());
    }
    media
}

/// Called at every crash point.
type Crash<'a> = &'a mut dyn FnMut(&World);

impl World {
    fn open(media: Media, buffers: &BufferPool) -> Self {
        Self::open_told(media, buffers, None)
    }

    fn open_told(media: Media, buffers: &BufferPool, told: Option<(u64, LogLeft)>) -> Self {
        let mut world = Self {
            store: Store::open(config(buffers), &[device()]),
            now: Instant::ZERO,
            media,
            volatile: Vec::new(),
            in_flight: VecDeque::new(),
            writes: 0,
            answers: Vec::new(),
            opened: false,
            reads: 0,
            tag: 0,
        };
        if let Some((generation, left)) = told {
            world.store.inherit(generation, left);
        }
        while !world.opened {
            assert!(world.step(&mut |_| ()), "an opening ends");
        }
        world
    }

    /// Takes all outputs, with a crash point after each write that is issued.
    fn drain(&mut self, crash: Crash<'_>) {
        while let Some(output) = self.store.poll_output() {
            match output {
                Output::Opened(result) => {
                    result.expect("the pool opens");
                    self.opened = true;
                }
                Output::Disk(operation) => {
                    let completed = self.volatile.iter().filter(|write| write.completed);
                    let mark = completed.map(|write| write.number).max().unwrap_or(0);
                    let is_write = self.issue(&operation);
                    self.in_flight.push_back((operation, mark));
                    if is_write {
                        crash(self);
                    }
                }
                Output::Done { tag, result } => self.answers.push((tag, result)),
                Output::Failed(failure) => panic!("{failure}"),
                Output::Notice(
                    Notice::Damaged(_)
                    | Notice::DamagedBlocks { .. }
                    | Notice::MetadataMended { .. },
                ) => panic!("a crash damages nothing"),
                Output::Notice(Notice::Stalled(_) | Notice::Resumed) => {}
            }
        }
    }

    /// From here on a write may have landed.
    fn issue(&mut self, operation: &DiskOperation) -> bool {
        let DiskKind::Write { offset, parts } = &operation.kind else { return false };
        self.writes += 1;
        let mut at = offset / SECTOR as u64;
        let mut sectors = Vec::new();
        for part in parts.iter() {
            for bytes in part.bytes().chunks_exact(SECTOR) {
                sectors.push((at, bytes.try_into().expect("a sector")));
                at += 1;
            }
        }
        self.volatile.push(Volatile { number: self.writes, completed: false, sectors });
        true
    }

    /// Completes the operation that was issued first.
    fn step(&mut self, crash: Crash<'_>) -> bool {
        self.drain(crash);
        let Some((operation, mark)) = self.in_flight.pop_front() else { return false };
        let mut landed = false;
        let result = match operation.kind {
            DiskKind::Read { offset, mut buffer, start, length } => {
                self.reads += u64::from(!self.opened);
                self.read(offset, &mut buffer.payload_mut()[start..start + length]);
                DiskResult::Read(Ok(buffer))
            }
            DiskKind::Write { .. } => {
                let write = self.volatile.iter_mut().find(|write| !write.completed);
                write.expect("it was issued").completed = true;
                DiskResult::Written(Ok(()))
            }
            DiskKind::Sync => {
                let media = &mut self.media;
                self.volatile.retain(|write| {
                    let synced = write.completed && write.number <= mark;
                    if synced {
                        media.extend(write.sectors.iter().copied());
                    }
                    !synced
                });
                landed = true;
                DiskResult::Synced(Ok(()))
            }
            DiskKind::Discard { .. } => DiskResult::Discarded(Ok(())),
        };
        self.store.handle(self.now, Input::DiskDone { id: operation.id, result });
        if landed {
            crash(self);
        }
        self.drain(crash);
        true
    }

    fn read(&self, offset: u64, into: &mut [u8]) {
        into.fill(0);
        let first = offset / SECTOR as u64;
        let end = first + (into.len() / SECTOR) as u64;
        let place = |at: u64| (at - first) as usize * SECTOR;
        for (at, bytes) in self.media.range(first..end) {
            into[place(*at)..place(*at) + SECTOR].copy_from_slice(bytes);
        }
        for (at, bytes) in self.volatile.iter().flat_map(|write| &write.sectors) {
            if (first..end).contains(at) {
                into[place(*at)..place(*at) + SECTOR].copy_from_slice(bytes);
            }
        }
    }

    fn send(&mut self, command: Command) -> u64 {
        self.tag += 1;
        self.store.handle(self.now, Input::Command { tag: self.tag, command });
        self.tag
    }

    fn ask(&mut self, command: Command, crash: Crash<'_>) -> ReplyBody {
        let tag = self.send(command);
        loop {
            self.drain(crash);
            if let Some(at) = self.answers.iter().position(|(other, _)| *other == tag) {
                return self.answers.swap_remove(at).1.expect("it succeeds");
            }
            assert!(self.step(crash), "a command is answered");
        }
    }

    /// Lets everything finish that does not wait for time to pass.
    fn settle(&mut self, crash: Crash<'_>) {
        for round in 0..100_000 {
            assert!(round < 99_999, "it comes to rest");
            let due = self.store.next_deadline().is_some_and(|at| at <= self.now);
            if !self.step(crash) {
                if !due {
                    return;
                }
                self.store.handle(self.now, Input::Tick);
            }
        }
    }

    /// What may have to be chosen at a crash here: sectors, and the contents that each may have.
    fn choices(&self) -> Vec<(u64, Vec<Sector>)> {
        let mut all: BTreeMap<u64, Vec<Sector>> = BTreeMap::new();
        for (at, bytes) in self.volatile.iter().flat_map(|write| &write.sectors) {
            let versions = all.entry(*at).or_insert_with(|| vec![sector_of(&self.media, *at)]);
            if !versions.contains(bytes) {
                versions.push(*bytes);
            }
        }
        all.into_iter().filter(|(_, versions)| versions.len() > 1).collect()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Write,
    Overwrite,
    Discard,
    Flush,
    Home,
    Checkpoint,
    Grow,
}

const STEPS: [Step; 7] = [
    Step::Write,
    Step::Overwrite,
    Step::Discard,
    Step::Flush,
    Step::Home,
    Step::Checkpoint,
    Step::Grow,
];

/// What the history promises at a crash point.
#[derive(Clone, Debug, Default)]
struct History {
    /// For each record the blocks that it changes, and to what; 0: zeroes.
    records: Vec<(core::ops::Range<u64>, u64)>,
    durable: u64,
    /// The replica's size, as far as it is promised.
    blocks: u64,
}

impl History {
    fn contents(&self, through: u64) -> Vec<u64> {
        let mut ids = vec![0; (BLOCKS + GROWTH_MAX) as usize];
        for (range, id) in &self.records[..through as usize] {
            ids[range.start as usize..range.end as usize].fill(*id);
        }
        ids
    }
}

fn pattern(id: u64, lba: u64) -> Sector {
    let mut block = [0; SECTOR];
    if id != 0 {
        for (number, word) in block.chunks_exact_mut(8).enumerate() {
            let value = (id << 20 ^ lba << 4 ^ number as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            word.copy_from_slice(&value.to_le_bytes());
        }
    }
    block
}

/// How many states were tried, and of how many crash points not all.
#[derive(Debug, Default)]
struct Count {
    points: u64,
    states: u64,
    bounded: u64,
    seen: u64,
    /// Reopenings that were told where the log is, their reads, and those of the same that were not told.
    handed: u64,
    reads: u64,
    reads_untold: u64,
}

struct Enumeration {
    buffers: BufferPool,
    memory: BufferPool,
    /// Every so-manieth state is tried.
    stride: u64,
    count: Count,
    random: u64,
}

impl Enumeration {
    fn new(stride: u64) -> Self {
        Self {
            buffers: BufferPool::heap(96, 24),
            memory: BufferPool::heap(8, 8),
            stride,
            count: Count::default(),
            random: 1,
        }
    }

    fn random(&mut self, bound: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % bound
    }

    fn append(
        &mut self,
        world: &mut World,
        history: &mut History,
        range: core::ops::Range<u64>,
        kind: RecordKind,
        crash: &mut dyn FnMut(&mut Self, &World, &History),
    ) {
        let seq = history.records.len() as u64 + 1;
        let id = if kind == RecordKind::Write { seq } else { 0 };
        let mut buffer = self.memory.take(4096).expect("buffers come back");
        for (number, lba) in range.clone().enumerate() {
            buffer.payload_mut()[number * SECTOR..][..SECTOR].copy_from_slice(&pattern(id, lba));
        }
        let header = RecordHeader {
            key: key(),
            position: Position::new(Epoch(1), Seq(seq)),
            previous_epoch: if seq == 1 { Epoch::NONE } else { Epoch(1) },
            kind,
            block_size: BlockSize::B512,
            lba: Lba(range.start),
            blocks: BlockCount((range.end - range.start) as u32),
            fua: false,
        };
        let record = Record::encode(header, buffer);
        history.records.push((range, id));
        let command = Command::Append { key: key(), record, commit: Seq::ZERO, media: false };
        world.ask(command, &mut |world| crash(self, world, history));
    }

    fn flush(
        &mut self,
        world: &mut World,
        history: &mut History,
        crash: &mut dyn FnMut(&mut Self, &World, &History),
    ) {
        let answer =
            world.ask(Command::Flush { key: key() }, &mut |world| crash(self, world, history));
        let ReplyBody::Flushed { durable } = answer else { panic!("{answer:?}") };
        assert_eq!(durable.0, history.records.len() as u64);
        history.durable = durable.0;
    }

    /// One operation of a history, with `crash` at each of its crash points.
    fn perform(
        &mut self,
        step: Step,
        world: &mut World,
        history: &mut History,
        crash: &mut dyn FnMut(&mut Self, &World, &History),
    ) {
        let fresh = 10 + 2 * history.records.len() as u64 % 200;
        match step {
            Step::Write => {
                self.append(world, history, fresh..fresh + 1, RecordKind::Write, crash);
            }
            Step::Overwrite => self.append(world, history, 1..3, RecordKind::Write, crash),
            Step::Discard => self.append(world, history, 2..5, RecordKind::Discard, crash),
            Step::Flush => self.flush(world, history, crash),
            Step::Home => {
                self.flush(world, history, crash);
                let commit = Seq(history.records.len() as u64);
                let command = Command::Commit { key: key(), commit };
                world.ask(command, &mut |world| crash(self, world, history));
                world.now = world.now + Duration::from_secs(30);
                world.store.handle(world.now, Input::Tick);
                world.settle(&mut |world| crash(self, world, history));
                assert_eq!(world.store.usage().log_dirty_bytes, 0);
            }
            Step::Grow => {
                let blocks = history.blocks + GROWTH;
                let grown = world.send(Command::Grow { key: key(), blocks });
                self.append(world, history, blocks - 2..blocks, RecordKind::Write, crash);
                // What follows takes effect after it.
                let answer = world.answers.iter().position(|(tag, _)| *tag == grown);
                let answer = world.answers.swap_remove(answer.expect("it was answered before"));
                assert!(matches!(answer.1, Ok(ReplyBody::Done)));
                history.blocks = blocks;
            }
            Step::Checkpoint => {
                world.store.checkpoint();
                world.settle(&mut |world| crash(self, world, history));
            }
        }
    }

    /// A volume with something home and something not.
    fn begin(&mut self, tight: bool) -> (World, History) {
        let mut world = World::open(formatted(), &self.buffers);
        let mut history = History { blocks: BLOCKS, ..History::default() };
        let (block_size, blocks) = (BlockSize::B512, BLOCKS);
        world.ask(Command::Create { key: key(), block_size, blocks }, &mut |_| ());
        let nothing = &mut |_: &mut Self, _: &World, _: &History| ();
        self.append(&mut world, &mut history, 0..6, RecordKind::Write, nothing);
        // Each round takes a segment; when few are free, clean ones are trimmed.
        for _ in 0..if tight { 6 } else { 1 } {
            self.append(&mut world, &mut history, 4..6, RecordKind::Write, nothing);
            self.perform(Step::Home, &mut world, &mut history, nothing);
        }
        let trimmed = world.store.replica(key()).expect("it is there").state.trimmed;
        assert_eq!(trimmed > Seq::ZERO, tight);
        (world, history)
    }

    fn sequence(&mut self, steps: &[Step], tight: bool) {
        let (mut world, mut history) = self.begin(tight);
        let (last, before) = steps.split_last().expect("at least one");
        for step in before {
            // The crashes in here are those of shorter sequences.
            self.perform(*step, &mut world, &mut history, &mut |_, _, _| ());
        }
        self.perform(*last, &mut world, &mut history, &mut |this, world, history| {
            this.crash_point(world, history, steps);
        });
        self.crash_point(&world, &history, steps);
    }

    fn crash_point(&mut self, world: &World, history: &History, steps: &[Step]) {
        let choices = world.choices();
        self.count.points += 1;
        self.hand_over(world, history, steps);
        let total = choices
            .iter()
            .try_fold(1_usize, |all, (_, versions)| all.checked_mul(versions.len()))
            .filter(|total| *total <= SUBSETS_MAX);
        let Some(total) = total else {
            self.count.bounded += 1;
            return self.some_subsets(world, history, steps, &choices);
        };
        for mut number in 0..total {
            let mut pick = |(_, versions): &(u64, Vec<Sector>)| {
                let pick = number % versions.len();
                number /= versions.len();
                pick
            };
            let picks: Vec<usize> = choices.iter().map(&mut pick).collect();
            self.crash(world, history, steps, &choices, &picks);
        }
    }

    fn some_subsets(
        &mut self,
        world: &World,
        history: &History,
        steps: &[Step],
        choices: &[(u64, Vec<Sector>)],
    ) {
        let none = vec![0; choices.len()];
        let all: Vec<usize> = choices.iter().map(|(_, versions)| versions.len() - 1).collect();
        let mut tried = 2;
        self.crash(world, history, steps, choices, &none);
        self.crash(world, history, steps, choices, &all);
        for at in 0..choices.len().min(SUBSETS_MAX / 4) {
            let mut alone = none.clone();
            alone[at] = all[at];
            let mut but_one = all.clone();
            but_one[at] = 0;
            self.crash(world, history, steps, choices, &alone);
            self.crash(world, history, steps, choices, &but_one);
            tried += 2;
        }
        while tried < SUBSETS_MAX {
            let picks: Vec<usize> = choices
                .iter()
                .map(|(_, versions)| self.random(versions.len() as u64) as usize)
                .collect();
            self.crash(world, history, steps, choices, &picks);
            tried += 1;
        }
    }

    /// Power goes, and these versions have landed.
    fn crash(
        &mut self,
        world: &World,
        history: &History,
        steps: &[Step],
        choices: &[(u64, Vec<Sector>)],
        picks: &[usize],
    ) {
        self.count.seen += 1;
        if !self.count.seen.is_multiple_of(self.stride) {
            return;
        }
        self.count.states += 1;
        let mut media = world.media.clone();
        for ((at, versions), pick) in choices.iter().zip(picks) {
            media.insert(*at, versions[*pick]);
        }
        let point = self.count.points;
        let what = || format!("{steps:?}, crash point {point}: versions {picks:?}");
        let opened = World::open(media, &self.buffers);
        self.check(opened, history, &what);
    }

    /// The process lets go of the pool here: what it has begun lands, and the next one is told where the log is.
    fn hand_over(&mut self, world: &World, history: &History, steps: &[Step]) {
        let point = self.count.points;
        let what = || format!("{steps:?}, handed over at point {point}");
        let told = world.store.log_left().map(|left| (world.store.generation(), left));
        let opened = World::open_told(media_of(world), &self.buffers, told);
        let plain = World::open(media_of(world), &self.buffers);
        self.count.handed += 1;
        self.count.reads += opened.reads;
        self.count.reads_untold += plain.reads;
        let last = |world: &World| world.store.replica(key()).expect("replicas stay").state;
        let (told, untold) = (last(&opened), last(&plain));
        // What was being written at that moment may be cut off, and was not promised to anybody.
        assert!(told.last <= untold.last && told.sealed == untold.sealed, "{}", what());
        self.check(opened, history, &what);
    }

    fn check(&mut self, mut opened: World, history: &History, what: &dyn Fn() -> String) {
        let replica = opened.store.replica(key()).expect("replicas stay");
        let state = replica.state;
        assert!(replica.blocks >= history.blocks, "{}: {} blocks", what(), replica.blocks);
        let last = state.last.seq.0;
        assert!(last >= history.durable, "{}: {last} of {}", what(), history.durable);
        assert!(last <= history.records.len() as u64, "{}: out of nowhere", what());
        assert!(!state.damaged && state.commit.0 <= last, "{}", what());
        opened.store.check_invariants();
        let mut history = history.clone();
        history.records.truncate(last as usize);
        history.blocks = replica.blocks;
        self.verify(&mut opened, &history, what);
        if self.count.states.is_multiple_of(4) {
            // And it goes on from there.
            let nothing = &mut |_: &mut Self, _: &World, _: &History| ();
            self.append(&mut opened, &mut history, 1..4, RecordKind::Write, nothing);
            self.perform(Step::Home, &mut opened, &mut history, nothing);
            self.verify(&mut opened, &history, what);
            opened.store.check_invariants();
        }
    }

    fn verify(&mut self, opened: &mut World, history: &History, what: &dyn Fn() -> String) {
        let last = history.records.len() as u64;
        let ids = history.contents(last);
        for range in [0..BLOCKS, BLOCKS..history.blocks] {
            if range.is_empty() {
                continue;
            }
            let bytes = base::limits::PAYLOAD_BYTES_MAX;
            let buffer = self.memory.take(bytes).expect("buffers come back");
            let (lba, blocks) = (Lba(range.start), BlockCount((range.end - range.start) as u32));
            let read = Command::Read { key: key(), lba, blocks, covers: Seq(last), buffer };
            let ReplyBody::Data(data) = opened.ask(read, &mut |_| ()) else { panic!("{}", what()) };
            for (block, lba) in data.bytes().chunks_exact(SECTOR).zip(range) {
                let expected = pattern(ids[lba as usize], lba);
                assert!(block == expected, "{}: block {lba} after {last}", what());
            }
        }
    }
}

fn sequences(length: usize) -> Vec<Vec<Step>> {
    let mut all = vec![Vec::new()];
    for _ in 0..length {
        let longer = |steps: &Vec<Step>| {
            let steps = steps.clone();
            STEPS.into_iter().map(move |step| [&steps[..], &[step]].concat())
        };
        all = all.iter().flat_map(longer).collect();
    }
    all
}

#[test]
fn every_crash_of_every_short_history() {
    let full = std::env::var("STORE_CRASHES").is_ok_and(|value| value == "all");
    let (lengths, stride) = if full { (1..=3, 1) } else { (1..=3, 43) };
    let mut enumeration = Enumeration::new(stride);
    for length in lengths {
        for steps in sequences(length) {
            for tight in [false, true] {
                enumeration.sequence(&steps, tight);
            }
        }
        println!("up to {length} operations: {:?}", enumeration.count);
    }
    if !full {
        println!("every {stride}th state; STORE_CRASHES=all takes all, of three operations too");
    }
    let Count { states, handed, reads, reads_untold, .. } = enumeration.count;
    assert!(states > 500 && handed > 500);
    assert!(reads < reads_untold, "being told saves reads: {reads} of {reads_untold}");
}
