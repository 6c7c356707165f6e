//! What may not go home, for a while or for good, keeps nothing else from going, and costs nothing.

#![allow(missing_docs)]
#![allow(clippy::cast_possible_truncation)]

mod sim;

use base::{
    BlockCount, BlockSize, BufferPool, Epoch, Lba, Position, Record, RecordHeader, RecordKind,
    ReplicaError, ReplicaKey, ReplyBody, Seq, ShardIndex, VolumeId,
};
use core::time::Duration;
use sim::{Random, Shape, World, shape};
use store::{Command, FlushPolicy};

const SIZE: usize = 4096;
const BLOCKS: u64 = 1024;

/// The volume that may not go home, one that waits, and one that is busy.
const STUCK: u8 = 0;
const WAITING: u8 = 1;
const BUSY: u8 = 2;

fn key(volume: u8) -> ReplicaKey {
    ReplicaKey { volume: VolumeId::from_bytes([volume + 40; 16]), shard: ShardIndex(0) }
}

/// Three volumes in one pool.
struct Three {
    world: World,
    memory: BufferPool,
    tag: u64,
    last: [u64; 3],
}

impl Three {
    fn new(shape: Shape) -> Self {
        let world = World::new(shape, Random::new(11));
        let mut three = Self { world, memory: BufferPool::heap(64, 64), tag: 0, last: [0; 3] };
        for volume in [STUCK, WAITING, BUSY] {
            let block_size = BlockSize::B4096;
            let create = Command::Create { key: key(volume), block_size, blocks: BLOCKS };
            assert!(three.ask(create).is_ok());
        }
        three
    }

    fn ask(&mut self, command: Command) -> Result<ReplyBody, ReplicaError> {
        self.tag += 1;
        let tag = self.tag;
        self.world.command(tag, command);
        for _ in 0..100_000 {
            self.world.drain();
            if let Some(at) = self.world.answers.iter().position(|(other, _)| *other == tag) {
                return self.world.answers.swap_remove(at).1;
            }
            if !self.world.step() && !self.world.tick() {
                break;
            }
        }
        panic!("no answer; {:?}", self.world.store.usage());
    }

    /// Writes four blocks, when everything through `commit` is settled.
    fn write(&mut self, volume: u8, commit: u64) {
        let seq = self.last[usize::from(volume)] + 1;
        self.last[usize::from(volume)] = seq;
        let mut buffer = self.memory.take(4 * SIZE).expect("buffers come back");
        buffer.payload_mut()[..4 * SIZE].fill(seq as u8 ^ volume << 6);
        let header = RecordHeader {
            key: key(volume),
            position: Position::new(Epoch(1), Seq(seq)),
            previous_epoch: if seq == 1 { Epoch::NONE } else { Epoch(1) },
            kind: RecordKind::Write,
            block_size: BlockSize::B4096,
            lba: Lba(seq % (BLOCKS / 4) * 4),
            blocks: BlockCount(4),
            fua: false,
        };
        let record = Record::encode(header, buffer);
        let (key, commit) = (key(volume), Seq(commit));
        let answer = self.ask(Command::Append { key, record, commit, media: false });
        assert!(answer.is_ok(), "{answer:?}");
        self.world.store.check_invariants();
    }

    fn commit(&mut self, volume: u8) {
        let commit = Seq(self.last[usize::from(volume)]);
        assert!(self.ask(Command::Commit { key: key(volume), commit }).is_ok());
        self.world.store.check_invariants();
    }

    /// Writes a few segments that may not go home: because nobody says that they are settled, or
    /// because the log is damaged. From then on, the policy is this one.
    fn stuck(damaged: bool, policy: FlushPolicy) -> Self {
        let mut three = Self::new(patient());
        for _ in 0..100 {
            three.write(STUCK, 0);
        }
        three.world.shape.flush = policy;
        if damaged {
            three.lose_log();
        }
        three.world.reopen(false).expect("it opens");
        let info = three.world.store.replica(key(STUCK)).expect("it is there");
        assert_eq!(info.damaged, damaged);
        assert!(info.log_bytes > 1 << 20 && info.home_bytes == 0, "{info:?}");
        three
    }

    fn lose_log(&mut self) {
        self.commit(STUCK);
        assert!(self.ask(Command::Flush { key: key(STUCK) }).is_ok());
        // Or what is lost may never have been there.
        self.world.run(Duration::from_millis(60));
        let disk = &mut self.world.disks[0];
        disk.sync(u64::MAX);
        let id = [STUCK + 40; 16];
        for page in disk.media.chunks_exact_mut(SIZE) {
            if page.starts_with(b"HFBT") && page.windows(16).any(|window| window == id) {
                page[9] ^= 1;
            }
        }
    }

    fn home_bytes(&self, volume: u8) -> u64 {
        self.world.store.replica(key(volume)).expect("it is there").home_bytes
    }

    /// The busy volume is written to for so long, and nothing is ever idle.
    fn be_busy(&mut self, time: Duration) {
        let end = self.world.now + time;
        while self.world.now < end {
            self.write(BUSY, self.last[usize::from(BUSY)]);
            let next = self.world.now + Duration::from_millis(20);
            self.world.run(Duration::from_millis(20));
            self.world.now = self.world.now.max(next);
        }
        self.world.store.check_invariants();
    }
}

/// Nothing goes home.
fn patient() -> Shape {
    let mut shape = shape();
    shape.flush = FlushPolicy {
        log_fill_percent: 100,
        index_fill_percent: 100,
        full_bytes: u64::MAX,
        idle: Duration::from_hours(1),
        age: Duration::from_hours(1),
        ..FlushPolicy::default()
    };
    shape
}

/// Less than the stuck volume has in full segments.
const FEW_BYTES: u64 = 1 << 20;

#[test]
fn idle_logs_go_home_beside_too_much_that_may_not() {
    let idle = Duration::from_millis(200);
    let policy = FlushPolicy { full_bytes: FEW_BYTES, idle, ..patient().flush };
    for damaged in [false, true] {
        let mut three = Three::stuck(damaged, policy);
        let stuck = three.world.store.usage().log_dirty_bytes;
        three.write(WAITING, 0);
        three.commit(WAITING);
        three.world.run(Duration::from_secs(1));
        assert!(three.home_bytes(WAITING) > 0, "damaged: {damaged}");
        assert_eq!(three.home_bytes(STUCK), 0);
        assert_eq!(three.world.store.usage().log_dirty_bytes, stuck);
        three.world.store.check_invariants();
    }
}

#[test]
fn old_logs_go_home_beside_older_ones_that_may_not() {
    let age = Duration::from_millis(500);
    for full_bytes in [FEW_BYTES, u64::MAX] {
        let policy = FlushPolicy { full_bytes, age, ..patient().flush };
        for damaged in [false, true] {
            let mut three = Three::stuck(damaged, policy);
            three.write(WAITING, 0);
            three.commit(WAITING);
            three.be_busy(Duration::from_millis(300));
            assert_eq!(three.home_bytes(WAITING), 0, "it is not due");
            three.be_busy(Duration::from_secs(1));
            assert!(three.home_bytes(WAITING) > 0, "damaged: {damaged}, {full_bytes}");
            assert_eq!(three.home_bytes(STUCK), 0);
        }
    }
}

#[test]
fn nothing_is_looked_for_again_and_again() {
    let pressed = FlushPolicy { log_fill_percent: 0, ..patient().flush };
    let full = FlushPolicy { full_bytes: FEW_BYTES, ..patient().flush };
    for policy in [pressed, full] {
        for damaged in [false, true] {
            let mut three = Three::stuck(damaged, policy);
            three.write(BUSY, 0);
            three.world.run(Duration::from_secs(1));
            let before = three.world.store.flush_searches();
            // Less than a segment. The last is never settled, so the segment may not go home.
            for _ in 0..20 {
                three.write(BUSY, three.last[usize::from(BUSY)]);
                three.world.run(Duration::from_millis(10));
            }
            let searches = three.world.store.flush_searches() - before;
            assert!(searches <= 1, "damaged: {damaged}, {policy:?}: {searches} searches");
            assert_eq!(three.home_bytes(BUSY), 0);
        }
    }
}

#[test]
fn what_may_go_home_after_all_does_at_once() {
    let policy = FlushPolicy { full_bytes: FEW_BYTES, ..patient().flush };
    for told_by_append in [false, true] {
        let mut three = Three::stuck(false, policy);
        let last = three.last[usize::from(STUCK)];
        three.world.run(Duration::from_secs(1));
        assert_eq!(three.home_bytes(STUCK), 0);
        if told_by_append {
            three.write(STUCK, last);
        } else {
            three.commit(STUCK);
        }
        three.world.run(Duration::from_secs(1));
        assert!(three.home_bytes(STUCK) > 0, "told by an append: {told_by_append}");
        three.world.store.check_invariants();
    }
}
