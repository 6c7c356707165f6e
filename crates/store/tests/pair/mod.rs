//! Two stores, one of which is filled from the other as a server does it.

// Shared by test programs that each use a part of it.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

use crate::sim::{Random, Shape, World, shape};
use base::chunks::{self, ListEntry, ListHeader, NO_MORE};
use base::{
    BlockCount, BlockSize, BufferPool, Epoch, Lba, Position, Record, RecordHeader, RecordKind,
    ReplicaError, ReplicaKey, ReplyBody, Seq, ShardIndex, VolumeId,
};
use core::time::Duration;
use store::{Command, DeviceInfo, DeviceRole};

pub type Answer = Result<ReplyBody, ReplicaError>;

pub fn key() -> ReplicaKey {
    ReplicaKey { volume: VolumeId::from_bytes([9; 16]), shard: ShardIndex(0) }
}

pub fn pattern(id: u64, lba: u64, bytes: usize) -> Vec<u8> {
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
pub struct Node {
    pub world: World,
    pub memory: BufferPool,
    pub tag: u64,
    pub block_size: BlockSize,
    /// Of every record: first block, blocks, id of its data.
    pub log: Vec<Logged>,
    pub id: u64,
    pub commit: u64,
    pub blocks: u64,
}

#[derive(Clone, Copy, Debug)]
pub struct Logged {
    pub position: Position,
    pub lba: u64,
    pub blocks: u64,
    pub id: u64,
}

impl Node {
    pub fn new(shape: Shape, block_size: BlockSize, blocks: u64, seed: u64) -> Self {
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
        node.seal(1);
        node
    }

    pub fn block_bytes(&self) -> usize {
        self.block_size.bytes() as usize
    }

    pub fn send(&mut self, command: Command) -> u64 {
        self.tag += 1;
        self.world.command(self.tag, command);
        self.tag
    }

    pub fn take_answer(&mut self, tag: u64) -> Option<Answer> {
        self.world.drain();
        let at = self.world.answers.iter().position(|(other, _)| *other == tag)?;
        Some(self.world.answers.swap_remove(at).1)
    }

    /// `None`: power went first.
    pub fn try_ask(&mut self, command: Command) -> Option<Answer> {
        let tag = self.send(command);
        self.wait(tag)
    }

    pub fn wait(&mut self, tag: u64) -> Option<Answer> {
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

    pub fn ask(&mut self, command: Command) -> Answer {
        self.try_ask(command).expect("power stays")
    }

    pub fn last(&self) -> Position {
        self.log.last().map_or(Position::ZERO, |logged| logged.position)
    }

    pub fn append(&mut self, epoch: u64, lba: u64, blocks: u64, kind: RecordKind) {
        let tag = self.send_append(epoch, lba, blocks, kind);
        let answer = self.wait(tag).expect("power stays");
        assert!(answer.is_ok(), "{answer:?}");
    }

    /// Without waiting for its answer.
    pub fn send_append(&mut self, epoch: u64, lba: u64, blocks: u64, kind: RecordKind) -> u64 {
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
        self.log.push(Logged { position, lba, blocks, id });
        self.send(Command::Append { key: key(), record, commit, media: false })
    }

    pub fn some_append(&mut self, epoch: u64) {
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

    /// Appends here what the source appends, and does not flush it.
    pub fn append_copy(&mut self, source: &mut Self, lba: u64, blocks: u64) {
        source.append(1, lba, blocks, RecordKind::Write);
        assert_eq!(copy_log(source, self), Some(true));
    }

    /// Takes back what is not committed, from somewhere on.
    pub fn truncate(&mut self) {
        let above = self.log.len() as u64 + 1 - self.commit;
        let keep = self.commit + self.world.random.below(above);
        let answer = self.ask(Command::Truncate { key: key(), keep: Seq(keep) });
        assert!(matches!(answer, Ok(ReplyBody::Truncated { .. })), "{answer:?}");
        self.log.truncate(keep as usize);
    }

    pub fn seal(&mut self, epoch: u64) {
        let answer = self.ask(Command::Seal { key: key(), epoch: Epoch(epoch) });
        assert!(matches!(answer, Ok(ReplyBody::Sealed(_))), "{answer:?}");
    }

    pub fn state(&self) -> base::ReplicaState {
        self.world.store.replica(key()).expect("it is there").state
    }

    pub fn flush(&mut self) {
        assert!(self.ask(Command::Flush { key: key() }).is_ok());
    }

    pub fn commit(&mut self, seq: u64) {
        self.commit = seq.max(self.commit);
        let commit = Seq(self.commit);
        assert!(self.ask(Command::Commit { key: key(), commit }).is_ok());
    }

    pub fn contents(&self, through: usize) -> Vec<u64> {
        let mut ids = vec![0; self.blocks as usize];
        for logged in &self.log[..through] {
            let range = logged.lba as usize..(logged.lba + logged.blocks) as usize;
            ids[range].fill(logged.id);
        }
        ids
    }

    pub fn scan(&mut self, seq: u64) -> Record {
        let buffer = self.memory.take(base::limits::PAYLOAD_BYTES_MAX).expect("buffers");
        match self.ask(Command::Scan { key: key(), seq: Seq(seq), buffer }) {
            Ok(ReplyBody::Record(record)) => record,
            other => panic!("{other:?}"),
        }
    }

    /// The record at `seq`, for `target`, found in a run of one or more; `None`: it is trimmed.
    fn scan_some(&mut self, seq: Seq, target: &Node) -> Option<Record> {
        let records = 1 + u32::try_from(seq.0 % 5).expect("a few");
        let buffer = self.memory.take(base::limits::PAYLOAD_BYTES_MAX).expect("buffers");
        let found = match self.ask(Command::ScanRun { key: key(), seq, records, buffer }) {
            Ok(ReplyBody::Records(found)) => found,
            Err(ReplicaError::Trimmed { .. }) => return None,
            other => panic!("{other:?}"),
        };
        if found.is_empty() {
            return Some(resent(target, &self.scan(seq.0)));
        }
        let (mut at, mut first) = (0, None);
        for expected in seq.0.. {
            if at == found.len() {
                break;
            }
            assert!(expected < seq.0 + u64::from(records), "no more than were asked for");
            let buffer = target.memory.take(base::limits::PAYLOAD_BYTES_MAX).expect("buffers");
            let record = base::packed::unpack(found.bytes(), at, buffer).expect("intact");
            assert_eq!(record.header().position.seq, Seq(expected));
            at += base::packed::packed_bytes(record.header());
            first.get_or_insert(record);
        }
        first
    }

    /// Appends another one's record.
    pub fn adopt_record(&mut self, record: &Record, commit: u64) {
        let record = resent(self, record);
        let append = Command::Append { key: key(), record, commit: Seq(commit), media: false };
        let answer = self.ask(append);
        assert!(matches!(answer, Ok(ReplyBody::Appended { .. })), "{answer:?}");
    }

    /// Every block is what the log says.
    pub fn check(&mut self, what: &str) {
        let ids = self.contents(self.log.len());
        self.check_ids(&ids, what);
    }

    pub fn check_ids(&mut self, ids: &[u64], what: &str) {
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

    pub fn reopen(&mut self) {
        self.world.cut_after = None;
        self.world.reopen(true).expect("it opens");
        self.world.store.check_invariants();
    }
}

/// Copies from source to target as a server does.
#[derive(Default)]
pub struct Filler {
    position: Option<Position>,
    pub copied: u64,
    pub freed: u64,
    /// Chunks that were as good as the source's.
    pub kept: u64,
    pub passes: u64,
    /// FillBegin was answered.
    pub begun: bool,
    /// FillEnd was sent.
    pub ending: bool,
}

/// Why a filling stops before its end.
#[derive(Debug)]
pub enum Stop {
    /// The target's power went.
    Cut,
    /// `between` said so.
    Aborted,
}

/// Called after every step, with the source; false: go no further.
type Between<'a> = &'a mut dyn FnMut(&mut Node) -> bool;

impl Filler {
    pub fn new() -> Self {
        Self::default()
    }

    /// One whole filling, log tail included. False if `between` ended it; `None`: the target's
    /// power went.
    pub fn fill(
        &mut self,
        source: &mut Node,
        target: &mut Node,
        between: Between<'_>,
    ) -> Option<bool> {
        match self.try_fill(source, target, between) {
            Ok(()) => Some(true),
            Err(Stop::Aborted) => Some(false),
            Err(Stop::Cut) => None,
        }
    }

    fn try_fill(
        &mut self,
        source: &mut Node,
        target: &mut Node,
        between: Between<'_>,
    ) -> Result<(), Stop> {
        loop {
            self.passes += 1;
            done(target, Command::FillBegin { key: key() })?;
            self.begun = true;
            self.ending = false;
            self.pass(source, target, between)?;
            let position = self.position.take().expect("a pass has a position");
            self.ending = true;
            done(target, Command::FillEnd { key: key(), position })?;
            // If the log does not reach back any more: again.
            if copy_log(source, target).ok_or(Stop::Cut)? {
                return Ok(());
            }
        }
    }

    /// Copies the chunks once; the target is left filling.
    pub fn copy_only(
        &mut self,
        source: &mut Node,
        target: &mut Node,
        between: Between<'_>,
    ) -> Option<()> {
        done(target, Command::FillBegin { key: key() }).ok()?;
        self.pass(source, target, between).ok()
    }

    fn pass(
        &mut self,
        source: &mut Node,
        target: &mut Node,
        between: Between<'_>,
    ) -> Result<(), Stop> {
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
                } else {
                    self.kept += 1;
                }
                go_on(source, between)?;
            }
            if header.next == NO_MORE {
                return self.free_until(target, &mut at, NO_MORE);
            }
            first = header.next;
        }
    }

    fn free_until(&mut self, target: &mut Node, at: &mut u32, end: u32) -> Result<(), Stop> {
        while let Some((chunk, _)) = target.world.store.next_chunk(key(), *at)
            && chunk < end
        {
            done(target, Command::FillFree { key: key(), chunk })?;
            self.freed += 1;
            *at = chunk + 1;
        }
        Ok(())
    }

    fn copy(
        &mut self,
        source: &mut Node,
        target: &mut Node,
        entry: ListEntry,
        unit: BlockCount,
        between: Between<'_>,
    ) -> Result<(), Stop> {
        let ListEntry { chunk, newest } = entry;
        done(target, Command::FillChunk { key: key(), chunk, newest })?;
        let mut lba = u64::from(chunk) * u64::from(unit.0);
        let end = (lba + u64::from(unit.0)).min(target.blocks);
        while lba < end {
            let Some(record) = fetch(source, lba, end).expect("the source is whole") else { break };
            lba = record.header().lba.0 + u64::from(record.header().blocks.0);
            self.copied += record.payload().len() as u64;
            let record = resent(target, &record);
            done(target, Command::FillData { key: key(), record })?;
            go_on(source, between)?;
        }
        done(target, Command::FillCommit { key: key(), chunk })
    }
}

fn go_on(source: &mut Node, between: Between<'_>) -> Result<(), Stop> {
    if between(source) { Ok(()) } else { Err(Stop::Aborted) }
}

pub fn done(target: &mut Node, command: Command) -> Result<(), Stop> {
    let what = format!("{command:?}");
    let answer = target.try_ask(command).ok_or(Stop::Cut)?;
    assert!(matches!(answer, Ok(ReplyBody::Done)), "{what}: {answer:?}");
    Ok(())
}

/// A record as it comes out of the network: other memory, the same bytes.
pub fn resent(target: &Node, record: &Record) -> Record {
    let mut buffer = target.memory.take(base::limits::PAYLOAD_BYTES_MAX).expect("buffers");
    let (head, payload) = buffer.split_mut();
    head[..record.header_bytes().len()].copy_from_slice(record.header_bytes().bytes());
    payload[..record.payload().len()].copy_from_slice(record.payload().bytes());
    Record::decode(buffer).expect("it is a record")
}

pub fn list(source: &mut Node, unit: BlockCount, first: u32) -> (ListHeader, Vec<ListEntry>) {
    let bytes = if source.world.random.chance(50) { 4096 } else { 100_000 };
    let buffer = source.memory.take(bytes).expect("buffers");
    let answer = source.ask(Command::List { key: key(), unit, first, buffer });
    let Ok(ReplyBody::Chunks(list)) = answer else { panic!("{answer:?}") };
    let (header, entries) = chunks::decode(list.bytes()).expect("it is a list");
    (header, entries.collect())
}

pub fn fetch(source: &mut Node, lba: u64, end: u64) -> Result<Option<Record>, ReplicaError> {
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
pub fn copy_log(source: &mut Node, target: &mut Node) -> Option<bool> {
    loop {
        let last = target.world.store.replica(key()).expect("it is there").state.last;
        let seq = last.seq.next();
        if seq > source.last().seq {
            return Some(true);
        }
        let Some(record) = source.scan_some(seq, target) else { return Some(false) };
        let commit = Seq(source.commit);
        let append = Command::Append { key: key(), record, commit, media: false };
        let answer = target.try_ask(append)?;
        assert!(matches!(answer, Ok(ReplyBody::Appended { .. })), "{answer:?}");
    }
}

pub fn small_shape(mass: u64, chunk_bytes: u64) -> Shape {
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
pub fn adopt(source: &Node, target: &mut Node) {
    target.log.clone_from(&source.log);
    target.id = source.id;
    target.commit = target.commit.max(source.commit);
}
