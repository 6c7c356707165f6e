//! Random commands, crashes and reopenings against a simple model.
//!
//! `STORE_SEED=n` replays one seed; `STORE_SEEDS=n` runs that many, `STORE_FIRST=n` from there.

#![allow(missing_docs)]
#![allow(clippy::cast_possible_truncation, clippy::unnecessary_operation)]
#![allow(clippy::manual_assert, clippy::match_same_arms)]

mod sim;

use std::collections::BTreeMap;

use base::{
    BlockCount, BlockSize, BufferPool, Epoch, Lba, Position, Record, RecordHeader, RecordKind,
    ReplicaError, ReplicaKey, ReplyBody, Seq, ShardIndex, VolumeId,
};
use core::time::Duration;
use sim::{Random, Shape, World};
use store::Command;

/// What a record did; `id` tells its data from everything else's.
#[derive(Clone, Copy, Debug)]
struct Done {
    position: Position,
    previous: Epoch,
    kind: RecordKind,
    lba: u64,
    blocks: u32,
    id: u64,
}

struct Model {
    key: ReplicaKey,
    block_size: BlockSize,
    blocks: u64,
    log: Vec<Done>,
    /// Records through here must survive a crash.
    durable: u64,
    answered: u64,
    commit: u64,
    epoch: u64,
    sealed: u64,
    sealing: u64,
}

impl Model {
    fn last(&self) -> Position {
        self.log.last().map_or(Position::ZERO, |done| done.position)
    }

    /// The ids of all blocks after `through` records.
    fn contents(&self, through: usize) -> Vec<u64> {
        let mut ids = vec![0; self.blocks as usize];
        for done in &self.log[..through] {
            let range = done.lba as usize..done.lba as usize + done.blocks as usize;
            match done.kind {
                RecordKind::Write => ids[range].fill(done.id),
                RecordKind::Discard | RecordKind::WriteZeroes => ids[range].fill(0),
                RecordKind::EpochStart => {}
            }
        }
        ids
    }
}

fn fill(block: &mut [u8], id: u64, lba: u64) {
    if id == 0 {
        return block.fill(0);
    }
    for (number, word) in block.chunks_exact_mut(8).enumerate() {
        let value = (id ^ number as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ lba;
        word.copy_from_slice(&value.to_le_bytes());
    }
}

fn holds(block: &[u8], id: u64, lba: u64) -> bool {
    let mut expected = vec![0; block.len()];
    fill(&mut expected, id, lba);
    block == expected
}

#[derive(Debug)]
enum Asked {
    Create,
    Append(usize, u64, bool),
    Read(usize, u64, u32, u64),
    /// A read that was under way when its replica's log was truncated: what it saw may be gone.
    /// Its session is a deposed one; nobody hears the answer.
    Overtaken,
    Flush(usize, u64),
    Seal(usize, u64),
    Scan(usize, u64),
    Run(usize, u64, u32),
    Truncate(usize, u64),
    Commit,
}

struct Test {
    world: World,
    models: Vec<Model>,
    asked: BTreeMap<u64, Asked>,
    tag: u64,
    id: u64,
    memory: BufferPool,
    seed: u64,
    crashes: u64,
    /// Some replica is being deleted, so it may be gone.
    deleting: bool,
}

impl Test {
    fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let shape = Shape::any(&mut random);
        let replicas = 1 + random.below(3);
        let world = World::new(shape, random);
        let mut test = Self {
            world,
            models: Vec::new(),
            asked: BTreeMap::new(),
            tag: 0,
            id: 0,
            memory: BufferPool::heap(128, 128),
            seed,
            crashes: 0,
            deleting: false,
        };
        for number in 0..replicas {
            let small = test.world.random.chance(30);
            let block_size = if small { BlockSize::B512 } else { BlockSize::B4096 };
            let blocks = if small { 2048 } else { 600 };
            let key = ReplicaKey {
                volume: VolumeId::from_bytes([number as u8 + 10; 16]),
                shard: ShardIndex(0),
            };
            test.ask(Asked::Create, Command::Create { key, block_size, blocks });
            test.models.push(Model {
                key,
                block_size,
                blocks,
                log: Vec::new(),
                durable: 0,
                answered: 0,
                commit: 0,
                epoch: 1,
                sealed: 0,
                sealing: 0,
            });
        }
        test.rest();
        test
    }

    fn ask(&mut self, asked: Asked, command: Command) {
        self.tag += 1;
        self.asked.insert(self.tag, asked);
        self.world.command(self.tag, command);
    }

    fn append(&mut self, at: usize) {
        let Some(mut buffer) = self.memory.take(base::limits::PAYLOAD_BYTES_MAX) else { return };
        let random = &mut self.world.random;
        let model = &mut self.models[at];
        let last = model.last();
        let kind = if last.epoch.0 == model.epoch {
            match random.below(20) {
                0 => RecordKind::Discard,
                1 => RecordKind::WriteZeroes,
                _ => RecordKind::Write,
            }
        } else {
            RecordKind::EpochStart
        };
        let most = match kind {
            RecordKind::Write => {
                (base::limits::PAYLOAD_BYTES_MAX as u64) >> model.block_size.log2()
            }
            RecordKind::Discard | RecordKind::WriteZeroes => model.blocks / 2,
            RecordKind::EpochStart => 0,
        };
        let (lba, blocks) = if most == 0 {
            (0, 0)
        } else {
            let most = if random.chance(70) { most.min(8) } else { most };
            let blocks = 1 + random.below(most);
            let hot = if random.chance(50) { model.blocks } else { blocks + 40 };
            (random.below(hot.min(model.blocks) - blocks + 1), blocks as u32)
        };
        self.id += 1;
        let header = RecordHeader {
            key: model.key,
            position: Position::new(Epoch(model.epoch), last.seq.next()),
            previous_epoch: last.epoch,
            kind,
            block_size: model.block_size,
            lba: Lba(lba),
            blocks: BlockCount(blocks),
            fua: false,
        };
        if kind == RecordKind::Write {
            let size = model.block_size.bytes() as usize;
            let payload = &mut buffer.payload_mut()[..blocks as usize * size];
            for (number, block) in payload.chunks_exact_mut(size).enumerate() {
                fill(block, self.id, lba + number as u64);
            }
        }
        let done = Done {
            position: header.position,
            previous: last.epoch,
            kind,
            lba,
            blocks,
            id: self.id,
        };
        model.log.push(done);
        let record = Record::encode(header, buffer);
        let media = random.chance(10);
        let (key, commit) = (model.key, Seq(model.commit));
        let asked = Asked::Append(at, header.position.seq.0, media);
        self.ask(asked, Command::Append { key, record, commit, media });
    }

    fn read(&mut self, at: usize) {
        let model = &self.models[at];
        let size = u64::from(model.block_size.bytes());
        let most = (base::limits::PAYLOAD_BYTES_MAX as u64 / size).min(model.blocks);
        let random = &mut self.world.random;
        let most = if random.chance(50) { most.min(16) } else { most };
        let blocks = 1 + random.below(most);
        let lba = random.below(model.blocks - blocks + 1);
        let covers = if random.chance(50) { model.last().seq.0 } else { model.answered };
        self.read_range(at, lba, blocks as u32, covers);
    }

    fn read_range(&mut self, at: usize, lba: u64, blocks: u32, covers: u64) {
        let Some(buffer) = self.memory.take(base::limits::PAYLOAD_BYTES_MAX) else { return };
        let command = Command::Read {
            key: self.models[at].key,
            lba: Lba(lba),
            blocks: BlockCount(blocks),
            covers: Seq(covers),
            buffer,
        };
        self.ask(Asked::Read(at, lba, blocks, covers), command);
    }

    fn check_record(&self, at: usize, seq: u64, record: &Record) {
        let (seed, model) = (self.seed, &self.models[at]);
        let done = model.log[seq as usize - 1];
        let header = record.header();
        assert_eq!(header.position, done.position, "seed {seed}");
        assert_eq!(header.previous_epoch, done.previous, "seed {seed}");
        assert_eq!((header.kind, header.lba.0), (done.kind, done.lba), "seed {seed}");
        let size = model.block_size.bytes() as usize;
        for (number, block) in record.payload().bytes().chunks_exact(size).enumerate() {
            assert!(holds(block, done.id, done.lba + number as u64), "seed {seed}: scan");
        }
    }

    /// A run is of the log's records, one after the other from `seq` on, and of no others.
    fn check_run(&self, at: usize, seq: u64, most: u32, bytes: &[u8]) {
        let (seed, model) = (self.seed, &self.models[at]);
        let size = model.block_size.bytes() as usize;
        let (mut offset, mut number) = (0, seq);
        while offset < bytes.len() {
            let header = base::packed::header_at(bytes, offset).expect("a record");
            let done = model.log[number as usize - 1];
            assert_eq!(header.position, done.position, "seed {seed}");
            assert_eq!((header.kind, header.lba.0), (done.kind, done.lba), "seed {seed}");
            let payload = offset + header.header_bytes();
            offset += base::packed::packed_bytes(&header);
            for (block, data) in bytes[payload..offset].chunks_exact(size).enumerate() {
                assert!(holds(data, done.id, done.lba + block as u64), "seed {seed}: run");
            }
            number += 1;
        }
        assert!(number - seq <= u64::from(most), "seed {seed}");
    }

    fn check_read(&self, at: usize, lba: u64, blocks: u32, covers: u64, bytes: &[u8]) {
        let model = &self.models[at];
        let size = model.block_size.bytes() as usize;
        assert_eq!(bytes.len(), blocks as usize * size);
        // Anything from what had to be visible on may be seen.
        let least = model.contents(covers as usize);
        for (number, block) in bytes.chunks_exact(size).enumerate() {
            let address = lba + number as u64;
            if holds(block, least[address as usize], address) {
                continue;
            }
            let later = model.log[covers as usize..]
                .iter()
                .filter(|done| (done.lba..done.lba + u64::from(done.blocks)).contains(&address));
            let found = later.into_iter().any(|done| {
                let id = if done.kind == RecordKind::Write { done.id } else { 0 };
                holds(block, id, address)
            });
            assert!(found, "seed {}: replica {at}, block {address}: wrong bytes", self.seed);
        }
    }

    fn answers(&mut self) {
        for (tag, result) in core::mem::take(&mut self.world.answers) {
            let asked = self.asked.remove(&tag).expect("each command is answered once");
            if !matches!(asked, Asked::Overtaken) {
                self.answer(asked, result);
            }
        }
    }

    /// The reads of a replica that are under way may see what a truncation has taken away.
    fn overtake_reads(&mut self, at: usize) {
        for asked in self.asked.values_mut() {
            if matches!(asked, Asked::Read(reading, ..) if *reading == at) {
                *asked = Asked::Overtaken;
            }
        }
    }

    fn answer(&mut self, asked: Asked, result: Result<ReplyBody, ReplicaError>) {
        let seed = self.seed;
        match (asked, result) {
            (Asked::Create | Asked::Commit, Ok(ReplyBody::Done)) => {}
            (Asked::Append(at, seq, media), Ok(ReplyBody::Appended { durable })) => {
                let model = &mut self.models[at];
                assert_eq!(seq, model.answered + 1, "seed {seed}: answers come in order");
                model.answered = seq;
                model.durable = model.durable.max(durable.0);
                assert!(!media || durable.0 >= seq, "seed {seed}: media means media");
            }
            (Asked::Append(at, seq, _), Err(ReplicaError::Superseded { .. })) => {
                let model = &mut self.models[at];
                model.log.truncate(model.log.len().min(seq as usize - 1));
            }
            (Asked::Append(at, seq, _), Err(ReplicaError::OutOfOrder { .. })) => {
                let model = &mut self.models[at];
                model.log.truncate(model.log.len().min(seq as usize - 1));
            }
            (Asked::Read(at, lba, blocks, covers), Ok(ReplyBody::Data(data))) => {
                self.check_read(at, lba, blocks, covers, data.bytes());
            }
            (Asked::Read(at, _, _, covers), Err(ReplicaError::Behind { last }))
                if !self.deleting =>
            {
                let length = self.models[at].log.len() as u64;
                assert!(covers > last.seq.0 || covers > length, "seed {seed}: needlessly behind");
            }
            (Asked::Flush(at, seq), Ok(ReplyBody::Flushed { durable })) => {
                let model = &mut self.models[at];
                assert!(durable.0 >= seq.min(model.log.len() as u64), "seed {seed}: flush");
                model.durable = model.durable.max(durable.0);
            }
            (Asked::Seal(at, epoch), Ok(ReplyBody::Sealed(state))) => {
                assert!(state.sealed.0 >= epoch);
                let model = &mut self.models[at];
                model.sealed = model.sealed.max(epoch);
                assert_eq!(state.last.seq.0, model.last().seq.0, "seed {seed}: sealed at the end");
            }
            (Asked::Scan(at, seq), Ok(ReplyBody::Record(record))) => {
                self.check_record(at, seq, &record);
            }
            (Asked::Run(at, seq, most), Ok(ReplyBody::Records(records))) => {
                self.check_run(at, seq, most, records.bytes());
            }
            (
                Asked::Scan(..) | Asked::Run(..),
                Err(ReplicaError::Trimmed { .. } | ReplicaError::Behind { .. }),
            ) => {}
            (Asked::Truncate(at, keep), Ok(ReplyBody::Truncated { last })) => {
                let model = &mut self.models[at];
                model.log.truncate(keep as usize);
                assert_eq!(last, model.last(), "seed {seed}: truncated");
                model.answered = model.answered.min(keep);
                model.durable = model.durable.min(keep);
                self.overtake_reads(at);
            }
            (Asked::Truncate(..), Err(ReplicaError::Trimmed { .. })) => {}
            (Asked::Append(at, seq, _), Err(ReplicaError::NoReplica)) if self.deleting => {
                let model = &mut self.models[at];
                model.log.truncate(model.log.len().min(seq as usize - 1));
            }
            (_, Err(ReplicaError::NoReplica | ReplicaError::Behind { .. })) if self.deleting => {}
            (_, Ok(body)) => panic!("seed {seed}: the wrong kind of answer: {body:?}"),
            (asked, Err(error)) => panic!("seed {seed}: {asked:?}: {error}"),
        }
    }

    /// Lets everything finish: with everything committed, nothing may wait for ever.
    fn rest(&mut self) {
        for round in 0..500 {
            self.world.run(Duration::from_millis(300));
            self.answers();
            if self.asked.is_empty() {
                self.world.store.check_invariants();
                return;
            }
            assert!(
                round < 499,
                "seed {}: commands wait for ever: {:?}, {} in flight",
                self.seed,
                self.world.store.usage(),
                self.asked.len()
            );
            self.commit_all();
        }
    }

    fn commit_all(&mut self) {
        for at in 0..self.models.len() {
            let model = &mut self.models[at];
            model.commit = model.commit.max(model.answered);
            let (key, commit) = (model.key, Seq(model.commit));
            self.ask(Asked::Commit, Command::Commit { key, commit });
        }
    }

    fn hand_over(&mut self) {
        let seed = self.seed;
        self.asked.clear();
        let keys: Vec<ReplicaKey> = self.models.iter().map(|model| model.key).collect();
        let store = &self.world.store;
        let before: Vec<Position> = keys.iter().flat_map(|key| store.log_marks(*key)).collect();
        let left = self.world.hand_over().unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        for log in left.replicas {
            let info = self.world.store.replica(log.key).expect("replicas stay");
            for mark in self.world.store.log_marks(log.key) {
                let known = before.contains(&mark) || mark == info.state.last;
                assert!(known, "seed {seed}: {mark} of {before:?}");
            }
            assert_eq!(
                info.state.last,
                log.end.unwrap_or(info.state.last),
                "seed {seed}: the log ends where it was said to"
            );
        }
        self.reopened(false);
    }

    fn reopen(&mut self, power_lost: bool) {
        self.crashes += 1;
        self.asked.clear();
        self.world.reopen(power_lost).unwrap_or_else(|error| panic!("seed {}: {error}", self.seed));
        self.reopened(power_lost);
    }

    fn reopened(&mut self, power_lost: bool) {
        let seed = self.seed;
        assert_eq!(self.world.damaged, 0, "seed {seed}: a crash damages nothing");
        for at in 0..self.models.len() {
            let info = self.world.store.replica(self.models[at].key).expect("replicas stay");
            let model = &mut self.models[at];
            let last = info.state.last.seq.0;
            assert!(
                last >= model.durable,
                "seed {seed}: {last} is left, {} was durable",
                model.durable
            );
            if !power_lost {
                assert!(last >= model.answered, "seed {seed}: a killed process loses nothing");
            }
            assert!(last <= model.log.len() as u64, "seed {seed}: records out of nowhere");
            assert!(info.state.sealed.0 >= model.sealed, "seed {seed}: an epoch went back");
            assert!(info.state.sealed.0 <= model.sealing, "seed {seed}: an epoch out of nowhere");
            model.log.truncate(last as usize);
            assert_eq!(info.state.last, model.last(), "seed {seed}");
            assert_eq!(info.state.durable.0, last);
            model.sealed = info.state.sealed.0;
            model.durable = last;
            model.answered = last;
            model.commit = model.commit.min(last);
            model.epoch = model.epoch.max(model.sealed) + 1;
            assert!(info.state.commit.0 <= last);
        }
        self.verify();
    }

    /// Reads everything.
    fn verify(&mut self) {
        for at in 0..self.models.len() {
            let (blocks, size) = (self.models[at].blocks, self.models[at].block_size.bytes());
            let step = (base::limits::PAYLOAD_BYTES_MAX as u64) / u64::from(size);
            let covers = self.models[at].last().seq.0;
            let mut lba = 0;
            while lba < blocks {
                let count = step.min(blocks - lba);
                self.read_range(at, lba, count as u32, covers);
                lba += count;
            }
            self.rest();
        }
    }

    fn seal(&mut self, at: usize) {
        let model = &mut self.models[at];
        model.epoch = model.epoch.max(model.sealing) + 1;
        let epoch = model.epoch;
        model.sealing = epoch;
        let key = model.key;
        self.ask(Asked::Seal(at, epoch), Command::Seal { key, epoch: Epoch(epoch) });
        while self.asked.values().any(|asked| matches!(asked, Asked::Seal(..))) {
            assert!(self.world.step() || self.world.tick(), "a seal is answered");
            self.answers();
        }
    }

    fn truncate(&mut self, at: usize) {
        if self.world.random.chance(50) {
            self.rest();
        }
        let model = &self.models[at];
        let above = model.log.len() as u64 + 1 - model.commit;
        let keep = model.commit + self.world.random.below(above);
        let key = model.key;
        self.ask(Asked::Truncate(at, keep), Command::Truncate { key, keep: Seq(keep) });
        while self.asked.values().any(|asked| matches!(asked, Asked::Truncate(..))) {
            if !self.world.step() && !self.world.tick() {
                self.commit_all();
            }
            self.answers();
        }
        self.models[at].epoch += 1;
    }

    /// Deletes a replica and makes it anew: nothing of the old one may be seen.
    fn remake(&mut self, at: usize) {
        let model = &mut self.models[at];
        let (key, block_size, blocks) = (model.key, model.block_size, model.blocks);
        self.ask(Asked::Create, Command::Delete { key });
        self.deleting = true;
        self.rest();
        self.deleting = false;
        assert!(self.world.store.replica(key).is_none());
        self.ask(Asked::Create, Command::Create { key, block_size, blocks });
        self.rest();
        let model = &mut self.models[at];
        model.log.clear();
        model.durable = 0;
        model.answered = 0;
        model.commit = 0;
        model.epoch += 1;
        model.sealed = 0;
        model.sealing = 0;
        model.epoch = model.epoch.max(1);
        self.verify();
    }

    fn act(&mut self) {
        let at = self.world.random.below(self.models.len() as u64) as usize;
        match self.world.random.below(100) {
            0..=44 => {
                for _ in 0..=self.world.random.below(12) {
                    self.append(at);
                }
            }
            45..=59 => self.read(at),
            60..=64 => {
                let model = &self.models[at];
                // What has been answered; what waits for room is not waited for.
                let (key, seq) = (model.key, model.answered);
                self.ask(Asked::Flush(at, seq), Command::Flush { key });
            }
            65..=74 => {
                let model = &mut self.models[at];
                model.commit = model.commit.max(model.answered);
                let (key, commit) = (model.key, Seq(model.commit));
                self.ask(Asked::Commit, Command::Commit { key, commit });
            }
            75..=77 => self.seal(at),
            78..=80 => self.truncate(at),
            81..=84 => {
                let model = &self.models[at];
                let length = model.log.len() as u64;
                let buffer = self.memory.take(base::limits::PAYLOAD_BYTES_MAX);
                if let (1.., Some(buffer)) = (length, buffer) {
                    let seq = 1 + self.world.random.below(length);
                    let key = model.key;
                    let records = u32::try_from(self.world.random.below(30)).expect("a few");
                    let asked = Seq(seq);
                    if records == 0 {
                        let scan = Command::Scan { key, seq: asked, buffer };
                        self.ask(Asked::Scan(at, seq), scan);
                    } else {
                        let scan = Command::ScanRun { key, seq: asked, records, buffer };
                        self.ask(Asked::Run(at, seq, records), scan);
                    }
                }
            }
            85..=88 => {
                let pause = self.world.random.below(1000);
                self.world.run(Duration::from_millis(pause));
            }
            89 => self.rest(),
            90 => {
                if self.world.random.chance(30) {
                    self.remake(at);
                }
            }
            91..=93 => {
                self.answers();
                self.reopen(true);
            }
            94 => {
                self.answers();
                if self.world.random.chance(50) {
                    self.reopen(false);
                } else {
                    self.hand_over();
                }
            }
            _ => self.world.store.check_invariants(),
        }
        for _ in 0..self.world.random.below(30) {
            self.world.step();
        }
        self.answers();
    }
}

fn run(seed: u64, actions: usize) -> u64 {
    let mut test = Test::new(seed);
    for _ in 0..actions {
        test.act();
    }
    test.rest();
    test.verify();
    test.crashes
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

#[test]
fn behaves_like_the_model() {
    if let Some(seed) = number("STORE_SEED") {
        run(seed, 150);
        return;
    }
    let first = number("STORE_FIRST").unwrap_or(1);
    let count = number("STORE_SEEDS").unwrap_or(40);
    let mut crashes = 0;
    for seed in first..first + count {
        let result = std::panic::catch_unwind(|| run(seed, 150));
        match result {
            Ok(number) => {
                crashes += number;
                if seed.is_multiple_of(500) {
                    println!("seed {seed} done");
                }
            }
            Err(panic) => {
                eprintln!("to reproduce: STORE_SEED={seed} cargo test -p store --test model");
                std::panic::resume_unwind(panic);
            }
        }
    }
    println!("{count} seeds, {crashes} crashes and restarts");
}
