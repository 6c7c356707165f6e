//! Filling one store's replica from another's: under crashes of the target at every disk operation, while the source
//! is written, flushed and trimmed, with peers that lie.
//!
//! `FILL_SEED=n` replays one seed of the random test; `FILL_SEEDS=n` runs that many.

#![allow(missing_docs)]
#![allow(clippy::cast_possible_truncation, clippy::manual_assert, clippy::match_same_arms)]

mod sim;

use base::chunks::{self, ListEntry, ListHeader, NO_MORE};
use base::{
    BlockCount, BlockSize, BufferPool, Epoch, Lba, Position, Record, RecordHeader, RecordKind,
    ReplicaError, ReplicaKey, ReplyBody, Seq, ShardIndex, VolumeId,
};
use core::time::Duration;
use sim::{Random, Shape, World, shape};
use store::{Command, DeviceInfo, DeviceRole};

type Answer = Result<ReplyBody, ReplicaError>;

fn key() -> ReplicaKey {
    ReplicaKey { volume: VolumeId::from_bytes([9; 16]), shard: ShardIndex(0) }
}

fn pattern(id: u64, lba: u64, bytes: usize) -> Vec<u8> {
    let mut block = vec![0; bytes];
    if id != 0 {
        for (number, word) in block.chunks_exact_mut(8).enumerate() {
            let value = (id << 20 ^ lba << 4 ^ number as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            word.copy_from_slice(&value.to_le_bytes());
        }
    }
    block
}

/// A store with one replica, and what the replica must hold.
struct Node {
    world: World,
    memory: BufferPool,
    tag: u64,
    block_size: BlockSize,
    /// Of every record: first block, blocks, id of its data.
    log: Vec<Logged>,
    id: u64,
    commit: u64,
    blocks: u64,
}

#[derive(Clone, Copy, Debug)]
struct Logged {
    position: Position,
    lba: u64,
    blocks: u64,
    id: u64,
}

impl Node {
    fn new(shape: Shape, block_size: BlockSize, blocks: u64, seed: u64) -> Self {
        let mut node = Self {
            world: World::new(shape, Random::new(seed)),
            memory: BufferPool::heap(64, 96),
            tag: 0,
            block_size,
            log: Vec::new(),
            id: 0,
            commit: 0,
            blocks,
        };
        let made = node.ask(Command::Create { key: key(), block_size, blocks });
        assert!(matches!(made, Ok(ReplyBody::Done)));
        assert!(node.ask(Command::Seal { key: key(), epoch: Epoch(9) }).is_ok());
        node
    }

    fn block_bytes(&self) -> usize {
        self.block_size.bytes() as usize
    }

    fn send(&mut self, command: Command) -> u64 {
        self.tag += 1;
        self.world.command(self.tag, command);
        self.tag
    }

    fn take_answer(&mut self, tag: u64) -> Option<Answer> {
        self.world.drain();
        let at = self.world.answers.iter().position(|(other, _)| *other == tag)?;
        Some(self.world.answers.swap_remove(at).1)
    }

    /// `None`: power went first.
    fn try_ask(&mut self, command: Command) -> Option<Answer> {
        let tag = self.send(command);
        self.wait(tag)
    }

    fn wait(&mut self, tag: u64) -> Option<Answer> {
        for _ in 0..100_000 {
            if self.world.is_cut() {
                return None;
            }
            if let Some(answer) = self.take_answer(tag) {
                return Some(answer);
            }
            if !self.world.step() && !self.world.tick() {
                break;
            }
        }
        panic!("no answer; {:?}", self.world.store.usage());
    }

    fn ask(&mut self, command: Command) -> Answer {
        self.try_ask(command).expect("power stays")
    }

    fn last(&self) -> Position {
        self.log.last().map_or(Position::ZERO, |logged| logged.position)
    }

    fn append(&mut self, epoch: u64, lba: u64, blocks: u64, kind: RecordKind) {
        let bytes = self.block_bytes();
        let mut buffer = self.memory.take(base::limits::PAYLOAD_BYTES_MAX).expect("buffers");
        self.id += 1;
        let previous = self.last();
        let position = Position::new(Epoch(epoch), previous.seq.next());
        let mut id = 0;
        if kind == RecordKind::Write {
            id = self.id;
            for number in 0..blocks {
                let block = pattern(id, lba + number, bytes);
                let at = number as usize * bytes;
                buffer.payload_mut()[at..at + bytes].copy_from_slice(&block);
            }
        }
        let header = RecordHeader {
            key: key(),
            position,
            previous_epoch: previous.epoch,
            kind,
            block_size: self.block_size,
            lba: Lba(lba),
            blocks: BlockCount(blocks as u32),
            fua: false,
        };
        let record = Record::encode(header, buffer);
        let commit = Seq(self.commit);
        let answer = self.ask(Command::Append { key: key(), record, commit, media: false });
        assert!(answer.is_ok(), "{answer:?}");
        self.log.push(Logged { position, lba, blocks, id });
    }

    fn some_append(&mut self, epoch: u64) {
        let most = (base::limits::PAYLOAD_BYTES_MAX / self.block_bytes()) as u64;
        let random = &mut self.world.random;
        let kind = match random.below(12) {
            0 => RecordKind::Discard,
            1 => RecordKind::WriteZeroes,
            _ => RecordKind::Write,
        };
        let blocks = if kind == RecordKind::Write {
            let most = if random.chance(80) { 8 } else { most.min(64) };
            1 + random.below(most)
        } else {
            1 + random.below(self.blocks / 3)
        };
        let lba = random.below(self.blocks - blocks + 1);
        if self.log.len().is_multiple_of(8) {
            // Or else the log fills.
            self.flush();
            self.commit((self.log.len() as u64).saturating_sub(5));
        }
        self.append(epoch, lba, blocks, kind);
    }

    fn flush(&mut self) {
        assert!(self.ask(Command::Flush { key: key() }).is_ok());
    }

    fn commit(&mut self, seq: u64) {
        self.commit = seq.max(self.commit);
        let commit = Seq(self.commit);
        assert!(self.ask(Command::Commit { key: key(), commit }).is_ok());
    }

    fn contents(&self, through: usize) -> Vec<u64> {
        let mut ids = vec![0; self.blocks as usize];
        for logged in &self.log[..through] {
            let range = logged.lba as usize..(logged.lba + logged.blocks) as usize;
            ids[range].fill(logged.id);
        }
        ids
    }

    /// Every block is what the log says.
    fn check(&mut self, what: &str) {
        let ids = self.contents(self.log.len());
        self.check_ids(&ids, what);
    }

    fn check_ids(&mut self, ids: &[u64], what: &str) {
        let bytes = self.block_bytes();
        let step = (base::limits::PAYLOAD_BYTES_MAX / bytes) as u64;
        let covers = self.world.store.replica(key()).expect("it is there").state.last.seq;
        for lba in (0..self.blocks).step_by(step as usize) {
            let buffer = self.memory.take(base::limits::PAYLOAD_BYTES_MAX).expect("buffers");
            let blocks = BlockCount(step.min(self.blocks - lba) as u32);
            let read = Command::Read { key: key(), lba: Lba(lba), blocks, covers, buffer };
            let Ok(ReplyBody::Data(data)) = self.ask(read) else { panic!("{what}: at {lba}") };
            for (address, block) in (lba..).zip(data.bytes().chunks_exact(bytes)) {
                let id = ids[address as usize];
                assert!(block == pattern(id, address, bytes), "{what}: block {address}, {id}");
            }
        }
    }

    fn reopen(&mut self) {
        self.world.cut_after = None;
        self.world.reopen(true).expect("it opens");
        self.world.store.check_invariants();
    }
}

/// Copies from source to target as a server does.
struct Filler {
    position: Option<Position>,
    copied: u64,
    freed: u64,
}

impl Filler {
    fn new() -> Self {
        Self { position: None, copied: 0, freed: 0 }
    }

    /// One whole filling, log tail included; `None`: the target's power went. `between` is called
    /// after every step.
    fn fill(
        &mut self,
        source: &mut Node,
        target: &mut Node,
        between: &mut dyn FnMut(&mut Node),
    ) -> Option<()> {
        target.try_ask(Command::FillBegin { key: key() })?.expect("it begins");
        loop {
            self.pass(source, target, between)?;
            let position = self.position.take().expect("a pass has a position");
            target.try_ask(Command::FillEnd { key: key(), position })?.expect("it ends");
            if copy_log(source, target)? {
                return Some(());
            }
            // The log does not reach back any more: again.
            target.try_ask(Command::FillBegin { key: key() })?.expect("it begins");
        }
    }

    fn pass(
        &mut self,
        source: &mut Node,
        target: &mut Node,
        between: &mut dyn FnMut(&mut Node),
    ) -> Option<()> {
        let unit = target.world.store.chunk_unit(key()).expect("it is there");
        let (mut first, mut at) = (0, 0);
        loop {
            let (header, entries) = list(source, unit, first);
            self.position.get_or_insert(header.trimmed);
            for entry in entries {
                self.free_until(target, &mut at, entry.chunk)?;
                at = entry.chunk + 1;
                let own = target.world.store.next_chunk(key(), entry.chunk);
                if own.is_none_or(|(chunk, seq)| chunk != entry.chunk || seq < entry.newest) {
                    self.copy(source, target, entry, unit, between)?;
                }
                between(source);
            }
            if header.next == NO_MORE {
                return self.free_until(target, &mut at, NO_MORE);
            }
            first = header.next;
        }
    }

    fn free_until(&mut self, target: &mut Node, at: &mut u32, end: u32) -> Option<()> {
        while let Some((chunk, _)) = target.world.store.next_chunk(key(), *at)
            && chunk < end
        {
            target.try_ask(Command::FillFree { key: key(), chunk })?.expect("it is freed");
            self.freed += 1;
            *at = chunk + 1;
        }
        Some(())
    }

    fn copy(
        &mut self,
        source: &mut Node,
        target: &mut Node,
        entry: ListEntry,
        unit: BlockCount,
        between: &mut dyn FnMut(&mut Node),
    ) -> Option<()> {
        let ListEntry { chunk, newest } = entry;
        target.try_ask(Command::FillChunk { key: key(), chunk, newest })?.expect("room");
        let mut lba = u64::from(chunk) * u64::from(unit.0);
        let end = (lba + u64::from(unit.0)).min(target.blocks);
        while lba < end {
            let Some(record) = fetch(source, lba, end).expect("the source is whole") else { break };
            lba = record.header().lba.0 + u64::from(record.header().blocks.0);
            self.copied += record.payload().len() as u64;
            let record = resent(target, &record);
            let answer = target.try_ask(Command::FillData { key: key(), record })?;
            assert!(matches!(answer, Ok(ReplyBody::Done)), "{answer:?}");
            between(source);
        }
        let answer = target.try_ask(Command::FillCommit { key: key(), chunk })?;
        assert!(matches!(answer, Ok(ReplyBody::Done)), "{answer:?}");
        Some(())
    }
}

/// A record as it comes out of the network: other memory, the same bytes.
fn resent(target: &Node, record: &Record) -> Record {
    let mut buffer = target.memory.take(base::limits::PAYLOAD_BYTES_MAX).expect("buffers");
    let (head, payload) = buffer.split_mut();
    head[..record.header_bytes().len()].copy_from_slice(record.header_bytes().bytes());
    payload[..record.payload().len()].copy_from_slice(record.payload().bytes());
    Record::decode(buffer).expect("it is a record")
}

fn list(source: &mut Node, unit: BlockCount, first: u32) -> (ListHeader, Vec<ListEntry>) {
    let bytes = if source.world.random.chance(50) { 4096 } else { 100_000 };
    let buffer = source.memory.take(bytes).expect("buffers");
    let answer = source.ask(Command::List { key: key(), unit, first, buffer });
    let Ok(ReplyBody::Chunks(list)) = answer else { panic!("{answer:?}") };
    let (header, entries) = chunks::decode(list.bytes()).expect("it is a list");
    (header, entries.collect())
}

fn fetch(source: &mut Node, lba: u64, end: u64) -> Result<Option<Record>, ReplicaError> {
    let buffer = source.memory.take(base::limits::PAYLOAD_BYTES_MAX).expect("buffers");
    match source.ask(Command::Fetch { key: key(), lba: Lba(lba), end: Lba(end), buffer }) {
        Ok(ReplyBody::Record(record)) => {
            let header = record.header();
            assert!(header.lba.0 >= lba && header.lba.0 + u64::from(header.blocks.0) <= end);
            Ok(Some(record))
        }
        Ok(ReplyBody::Done) => Ok(None),
        Ok(other) => panic!("{other:?}"),
        Err(error) => Err(error),
    }
}

/// Copies the log after the target's last record; false if it is no longer there.
fn copy_log(source: &mut Node, target: &mut Node) -> Option<bool> {
    loop {
        let last = target.world.store.replica(key()).expect("it is there").state.last;
        let seq = last.seq.next();
        if seq > source.last().seq {
            return Some(true);
        }
        let buffer = source.memory.take(base::limits::PAYLOAD_BYTES_MAX).expect("buffers");
        let record = match source.ask(Command::Scan { key: key(), seq, buffer }) {
            Ok(ReplyBody::Record(record)) => resent(target, &record),
            Err(ReplicaError::Trimmed { .. }) => return Some(false),
            other => panic!("{other:?}"),
        };
        let commit = Seq(source.commit);
        let append = Command::Append { key: key(), record, commit, media: false };
        let answer = target.try_ask(append)?;
        assert!(matches!(answer, Ok(ReplyBody::Appended { .. })), "{answer:?}");
    }
}

fn small_shape(mass: u64, chunk_bytes: u64) -> Shape {
    let mut shape = shape();
    shape.devices = vec![
        DeviceInfo { bytes: 10 << 20, role: DeviceRole::Fast },
        DeviceInfo { bytes: mass, role: DeviceRole::Mass },
    ];
    shape.chunk_bytes = chunk_bytes;
    shape.flush.idle = Duration::from_millis(1);
    shape.flush.log_fill_percent = 10;
    shape
}

/// The target has the source's log when the filling is done, and its contents.
fn adopt(source: &Node, target: &mut Node) {
    target.log.clone_from(&source.log);
    target.id = source.id;
    target.commit = target.commit.max(source.commit);
}

#[test]
fn a_fresh_replica_is_filled_and_goes_on() {
    for block_size in [BlockSize::B512, BlockSize::B4096] {
        let mut source = Node::new(small_shape(16 << 20, 64 << 10), block_size, 1000, 1);
        let mut target = Node::new(small_shape(16 << 20, 128 << 10), block_size, 1000, 2);
        for _ in 0..400 {
            source.some_append(1);
        }
        source.flush();
        source.world.run(Duration::from_secs(1));
        let mut filler = Filler::new();
        filler.fill(&mut source, &mut target, &mut |_| ()).expect("power stays");
        adopt(&source, &mut target);
        target.flush();
        target.check("filled");
        assert!(filler.copied > 0);
        target.reopen();
        target.check("filled and reopened");
        // Its log goes on, and goes home.
        target.commit(400);
        for _ in 0..50 {
            target.some_append(10);
        }
        target.flush();
        target.commit(450);
        target.world.run(Duration::from_secs(1));
        target.check("gone on");
        target.reopen();
        target.check("gone on and reopened");
    }
}
