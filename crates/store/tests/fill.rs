//! Filling one store's replica from another's: under crashes of the target at every disk
//! operation, while the source is written, flushed, trimmed and truncated, with peers that lie.
//!
//! `FILL_SEED=n` replays one seed of the random test; `FILL_SEEDS=n` runs that many.

#![allow(missing_docs)]
#![allow(clippy::cast_possible_truncation, clippy::manual_assert, clippy::match_same_arms)]

mod pair;
mod sim;

use base::{
    BlockCount, BlockSize, Epoch, Lba, Position, Record, RecordHeader, RecordKind, ReplicaError,
    ReplicaKey, Seq, ShardIndex, VolumeId, chunks,
};
use core::time::Duration;
use pair::{Filler, Node, adopt, copy_log, fetch, key, list, small_shape};
use sim::Random;
use store::{Command, FILL_CHUNKS_MAX};

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
        assert_eq!(filler.fill(&mut source, &mut target, &mut |_| true), Some(true));
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

/// What a seed did, so that the test can say that everything happened.
#[derive(Debug, Default)]
struct Seen {
    crashes: u64,
    aborted: u64,
    truncated: u64,
    passes: u64,
    kept: u64,
    freed: u64,
}

/// Something happens at the source.
fn disturb(source: &mut Node, epoch: u64) {
    if source.world.random.chance(50) {
        for _ in 0..source.world.random.below(6) {
            source.some_append(epoch);
        }
    }
    if source.world.random.chance(20) {
        source.flush();
        let commit = source.log.len() as u64 - source.world.random.below(4);
        source.commit(commit);
    }
    if source.world.random.chance(30) {
        let pause = source.world.random.below(40);
        source.world.run(Duration::from_millis(pause));
    }
}

fn some_node(random: &mut Random, block_size: BlockSize, blocks: u64) -> Node {
    let mut shape = small_shape(16 << 20, 64 << (10 + random.below(2)));
    if block_size == BlockSize::B4096 {
        shape.devices[0].bytes = 7 << 20;
    }
    shape.flush.log_fill_percent = random.below(40) as u8;
    shape.flush.idle = Duration::from_millis(1 + random.below(30));
    Node::new(shape, block_size, blocks, random.next())
}

/// A source, and a target that has followed it for a while, and may hold what the source does not.
fn some_history(
    random: &mut Random,
    block_size: BlockSize,
    blocks: u64,
    seen: &mut Seen,
) -> (Node, Node) {
    let mut source = some_node(random, block_size, blocks);
    let mut target = some_node(random, block_size, blocks);
    let mut epoch = 1;
    for _ in 0..random.below(5) {
        for _ in 0..random.below(60) {
            source.some_append(epoch);
        }
        if copy_log(&mut source, &mut target) == Some(false) {
            break;
        }
        target.flush();
        let pause = random.below(60);
        target.world.run(Duration::from_millis(pause));
    }
    // The source's history goes on without the target's last records.
    if random.chance(60) {
        source.truncate();
        seen.truncated += 1;
        epoch += 1;
        source.seal(epoch);
    }
    for _ in 0..random.below(250) {
        source.some_append(epoch);
    }
    (source, target)
}

/// The target follows the source, is left behind, and is filled in spite of everything.
fn random_fill(seed: u64, seen: &mut Seen) {
    let mut random = Random::new(seed);
    let (block_size, blocks) = match random.below(3) {
        0 => (BlockSize::B512, 2048),
        _ => (BlockSize::B4096, 600),
    };
    let (mut source, mut target) = some_history(&mut random, block_size, blocks, seen);
    let mut epoch = source.last().epoch.0.max(source.state().sealed.0);
    for round in 0.. {
        assert!(round < 60, "seed {seed}: it is filled in the end");
        target.seal(epoch);
        let fine = round > 10;
        if !fine && random.chance(60) {
            target.world.cut_after = Some(target.world.operations + random.below(120));
        }
        let mut filler = Filler::new();
        let mut left = if fine { u64::MAX } else { random.below(200) };
        let filled = filler.fill(&mut source, &mut target, &mut |source| {
            disturb(source, epoch);
            left = left.saturating_sub(1);
            left > 0
        });
        if filled.is_some() {
            target.world.cut_after = None;
        }
        seen.passes += filler.passes;
        seen.kept += filler.kept;
        seen.freed += filler.freed;
        match filled {
            Some(true) => break,
            Some(false) => seen.aborted += 1,
            None => {
                seen.crashes += 1;
                target.reopen();
            }
        }
        if filler.begun {
            assert!(target.state().filling || filler.ending, "seed {seed}: it fills");
        }
        if random.chance(40) {
            source.truncate();
            seen.truncated += 1;
            epoch += 1;
            source.seal(epoch);
        }
    }
    adopt(&source, &mut target);
    target.flush();
    target.check(&format!("seed {seed}: filled"));
    target.world.store.check_invariants();
    target.reopen();
    target.check(&format!("seed {seed}: filled and reopened"));
    fill_another(&mut random, target, &format!("seed {seed}"));
}

/// What was filled is as good as any: another one is filled from it.
fn fill_another(random: &mut Random, mut target: Node, what: &str) {
    let epoch = target.state().sealed.0;
    let mut third = some_node(random, target.block_size, target.blocks);
    third.seal(epoch);
    let mut filler = Filler::new();
    let filled = filler.fill(&mut target, &mut third, &mut |target| {
        disturb(target, epoch);
        true
    });
    assert_eq!(filled, Some(true));
    adopt(&target, &mut third);
    third.check(&format!("{what}: filled from what was filled"));
    third.commit(target.commit);
    third.flush();
    third.world.run(Duration::from_secs(1));
    third.check(&format!("{what}: and gone home"));
    third.world.store.check_invariants();
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

#[test]
fn a_replica_that_was_left_behind_is_filled_whatever_happens() {
    let mut seen = Seen::default();
    let seeds = match number("FILL_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("FILL_SEEDS").unwrap_or(25),
    };
    let many = seeds.end - seeds.start >= 25;
    for seed in seeds {
        let result = std::panic::catch_unwind(core::panic::AssertUnwindSafe(|| {
            random_fill(seed, &mut seen);
        }));
        if let Err(panic) = result {
            eprintln!("to reproduce: FILL_SEED={seed} cargo test -p store --test fill");
            std::panic::resume_unwind(panic);
        }
    }
    println!("{seen:?}");
    if many {
        let Seen { crashes, aborted, truncated, passes, kept, freed } = seen;
        assert!(crashes > 5 && aborted > 5 && truncated > 5 && passes > 50);
        assert!(kept > 20 && freed > 5);
    }
}

/// A target with a home of its own, cut off after each disk operation of a filling in turn.
#[test]
fn power_may_go_at_every_disk_operation_of_a_filling() {
    let step = if std::env::var_os("STORE_EVERY_CUT").is_some() { 1 } else { 7 };
    let mut cuts = 0;
    for cut in (0..3000).step_by(step) {
        let mut source = Node::new(small_shape(8 << 20, 64 << 10), BlockSize::B4096, 160, 1);
        let mut target = Node::new(small_shape(8 << 20, 64 << 10), BlockSize::B4096, 160, cut);
        for lba in (0..160).step_by(16) {
            source.append(1, lba, 8, RecordKind::Write);
        }
        source.flush();
        source.commit(10);
        assert_eq!(copy_log(&mut source, &mut target), Some(true));
        target.flush();
        target.commit(10);
        target.world.run(Duration::from_secs(1));
        target.append_copy(&mut source, 0, 4);
        for lba in [16, 40, 70, 71, 100] {
            source.append(1, lba, 8, RecordKind::Write);
        }
        source.append(1, 128, 32, RecordKind::Discard);
        source.flush();
        source.commit(source.log.len() as u64);
        source.world.run(Duration::from_secs(1));
        source.append(1, 48, 30, RecordKind::Write);

        target.world.cut_after = Some(target.world.operations + cut);
        let mut filler = Filler::new();
        let filled = filler.fill(&mut source, &mut target, &mut |_| true);
        target.reopen();
        let state = target.state();
        match filled {
            None if !filler.begun && !state.filling => {
                // Its old log is still there; power took what was not flushed.
                assert!(state.last.seq >= Seq(10), "cut {cut}");
            }
            None if state.filling => {
                let buffer = target.memory.take(4096).expect("buffers");
                let (lba, blocks, covers) = (Lba(0), BlockCount(1), Seq::ZERO);
                let read = Command::Read { key: key(), lba, blocks, covers, buffer };
                assert_eq!(target.ask(read).unwrap_err(), ReplicaError::Filling);
                assert_eq!(state.last, Position::ZERO);
            }
            None => assert!(filler.ending, "cut {cut}: filled out of nowhere"),
            Some(_) => assert!(!state.filling),
        }
        let again = Filler::new().fill(&mut source, &mut target, &mut |_| true);
        assert_eq!(again, Some(true));
        adopt(&source, &mut target);
        target.flush();
        target.check(&format!("cut {cut}"));
        target.reopen();
        target.check(&format!("cut {cut}, reopened"));
        cuts += 1;
        if filled.is_some() {
            break;
        }
    }
    println!("{cuts} places to cut");
    assert!(cuts * step > 30 && cuts * step < 3000);
}

#[test]
fn only_what_changed_is_copied() {
    let mut source = Node::new(small_shape(16 << 20, 64 << 10), BlockSize::B4096, 1024, 1);
    let mut target = Node::new(small_shape(16 << 20, 64 << 10), BlockSize::B4096, 1024, 2);
    for lba in (0..1024).step_by(32) {
        source.append(1, lba, 32, RecordKind::Write);
    }
    source.flush();
    source.commit(32);
    assert_eq!(copy_log(&mut source, &mut target), Some(true));
    target.flush();
    target.commit(32);
    for node in [&mut source, &mut target] {
        node.world.run(Duration::from_secs(1));
    }
    // Chunks 1 and 40 change, 63 goes away, all of it home.
    source.append(1, 16, 1, RecordKind::Write);
    source.append(1, 640, 1, RecordKind::Write);
    source.append(1, 1008, 16, RecordKind::Discard);
    source.flush();
    source.commit(35);
    source.world.run(Duration::from_secs(1));
    let mut filler = Filler::new();
    assert_eq!(filler.fill(&mut source, &mut target, &mut |_| true), Some(true));
    assert_eq!((filler.copied, filler.freed, filler.kept), (2 * 65536, 1, 61));
    adopt(&source, &mut target);
    target.check("delta");
    let again = &mut Filler::new();
    assert_eq!(again.fill(&mut source, &mut target, &mut |_| true), Some(true));
    assert_eq!((again.copied, again.freed, again.kept), (0, 0, 63));
    target.check("delta again");
}

fn record(lba: u64, blocks: u32, change: impl FnOnce(&mut RecordHeader), node: &Node) -> Record {
    let mut header = RecordHeader {
        key: key(),
        position: Position::new(Epoch(1), Seq(7)),
        previous_epoch: Epoch(1),
        kind: RecordKind::Write,
        block_size: BlockSize::B4096,
        lba: Lba(lba),
        blocks: BlockCount(blocks),
        fua: false,
    };
    change(&mut header);
    let buffer = node.memory.take(base::limits::PAYLOAD_BYTES_MAX).expect("buffers");
    Record::encode(header, buffer)
}

#[test]
fn peers_that_lie_are_refused() {
    let mut node = Node::new(small_shape(16 << 20, 64 << 10), BlockSize::B4096, 1020, 1);
    let other = ReplicaKey { volume: VolumeId::from_bytes([1; 16]), shard: ShardIndex(0) };
    let invalid = |node: &mut Node, command| {
        let answer = node.ask(command);
        assert!(matches!(answer, Err(ReplicaError::Invalid)), "{answer:?}");
    };
    let chunk = |chunk| Command::FillChunk { key: key(), chunk, newest: Seq(5) };
    let position = Position::ZERO;
    // Nothing of a filling before it begins.
    invalid(&mut node, chunk(0));
    invalid(&mut node, Command::FillCommit { key: key(), chunk: 0 });
    invalid(&mut node, Command::FillFree { key: key(), chunk: 0 });
    invalid(&mut node, Command::FillEnd { key: key(), position });
    assert!(node.ask(Command::FillBegin { key: key() }).is_ok());
    for number in [64, u32::MAX] {
        invalid(&mut node, chunk(number));
        invalid(&mut node, Command::FillFree { key: key(), chunk: number });
        invalid(&mut node, Command::FillCommit { key: key(), chunk: number });
    }
    assert!(node.ask(chunk(3)).is_ok());
    invalid(&mut node, chunk(3));
    invalid(&mut node, Command::FillFree { key: key(), chunk: 3 });
    invalid(&mut node, Command::FillEnd { key: key(), position });
    let data = |record| Command::FillData { key: key(), record };
    let bad = [
        record(0, 1, |_| (), &node),
        record(47, 2, |_| (), &node),
        record(63, 2, |_| (), &node),
        record(48, 1, |header| header.kind = RecordKind::Discard, &node),
        record(48, 1, |header| header.block_size = BlockSize::B512, &node),
        record(48, 1, |header| header.key = other, &node),
        record(1019, 2, |_| (), &node),
        record(u64::MAX - 1, 1, |_| (), &node),
        record(u64::MAX / 4096, 1, |_| (), &node),
    ];
    for record in bad {
        invalid(&mut node, data(record));
    }
    let good = record(50, 2, |_| (), &node);
    assert!(node.ask(data(good)).is_ok());
    // Not again, and not before what came.
    let late = record(51, 2, |_| (), &node);
    invalid(&mut node, data(late));
    let early = record(48, 1, |_| (), &node);
    invalid(&mut node, data(early));
    for number in 4..4 + FILL_CHUNKS_MAX as u32 - 1 {
        assert!(node.ask(chunk(number)).is_ok());
    }
    invalid(&mut node, chunk(20));
    assert!(node.ask(Command::FillCommit { key: key(), chunk: 3 }).is_ok());
    assert_eq!(node.world.store.next_chunk(key(), 0), Some((3, Seq(5))));
    // A seal ends what is staged; beginning again goes on from what counts.
    node.seal(5);
    invalid(&mut node, Command::FillCommit { key: key(), chunk: 4 });
    let late = record(64, 1, |_| (), &node);
    invalid(&mut node, data(late));
    node.world.run(Duration::from_secs(1));
    node.world.store.check_invariants();
    assert!(node.ask(Command::FillBegin { key: key() }).is_ok());
    assert_eq!(node.world.store.next_chunk(key(), 0), Some((3, Seq(5))));
    for position in [
        Position::new(Epoch(6), Seq(9)),
        Position::new(Epoch(0), Seq(9)),
        Position::new(Epoch(1), Seq(0)),
    ] {
        invalid(&mut node, Command::FillEnd { key: key(), position });
    }
}

#[test]
fn a_replica_being_filled_has_no_log_until_the_end() {
    let mut node = Node::new(small_shape(16 << 20, 64 << 10), BlockSize::B4096, 1020, 1);
    node.seal(5);
    assert!(node.ask(Command::FillBegin { key: key() }).is_ok());
    let chunk = |chunk| Command::FillChunk { key: key(), chunk, newest: Seq(5) };
    // An empty chunk is none.
    assert!(node.ask(chunk(3)).is_ok());
    assert!(node.ask(Command::FillCommit { key: key(), chunk: 3 }).is_ok());
    assert_eq!(node.world.store.next_chunk(key(), 0), None);
    let state = node.state();
    assert!(state.filling && state.last == Position::ZERO && state.sealed == Epoch(5));
    // What a log is needed for is refused.
    let buffer = node.memory.take(4096).expect("buffers");
    let scan = Command::Scan { key: key(), seq: Seq(1), buffer };
    let append = record(0, 1, |header| header.position.seq = Seq(1), &node);
    let append = Command::Append { key: key(), record: append, commit: Seq(0), media: false };
    let buffer = node.memory.take(4096).expect("buffers");
    let ask = Command::List { key: key(), unit: BlockCount(16), first: 0, buffer };
    let flush = Command::Flush { key: key() };
    for command in [scan, append, ask, flush, Command::Truncate { key: key(), keep: Seq(0) }] {
        assert_eq!(node.ask(command).unwrap_err(), ReplicaError::Filling);
    }
    let position = Position::new(Epoch(2), Seq(9));
    assert!(node.ask(Command::FillEnd { key: key(), position }).is_ok());
    let state = node.state();
    assert!(!state.filling && state.last == position && state.commit == Seq(9));
    assert_eq!((state.durable, state.trimmed), (Seq(9), Seq(9)));
    assert!(node.ask(Command::Delete { key: key() }).is_ok());
    node.world.run(Duration::from_secs(1));
    node.world.store.check_invariants();
    assert_eq!(node.world.store.usage().home_used_bytes, 0);
}

#[test]
fn impossible_lists_and_fetches_are_refused() {
    let mut node = Node::new(small_shape(16 << 20, 64 << 10), BlockSize::B4096, 1024, 1);
    for unit in [0, 1, 8, 17, 24, 2048, u32::MAX] {
        let buffer = node.memory.take(4096).expect("buffers");
        let ask = Command::List { key: key(), unit: BlockCount(unit), first: 0, buffer };
        assert_eq!(node.ask(ask).unwrap_err(), ReplicaError::Invalid);
    }
    for (lba, end) in [(0, 0), (5, 4), (0, 1025), (0, u64::MAX), (u64::MAX, 0)] {
        let buffer = node.memory.take(4096).expect("buffers");
        let ask = Command::Fetch { key: key(), lba: Lba(lba), end: Lba(end), buffer };
        assert_eq!(node.ask(ask).unwrap_err(), ReplicaError::Invalid, "{lba}..{end}");
    }
    assert!(fetch(&mut node, 0, 1024).expect("it is whole").is_none());
    let (header, entries) = list(&mut node, BlockCount(16), u32::MAX);
    assert!(entries.is_empty() && header.next == chunks::NO_MORE);
}

#[test]
fn a_full_home_refuses_to_be_filled_and_loses_nothing() {
    let mut source = Node::new(small_shape(16 << 20, 64 << 10), BlockSize::B4096, 1024, 1);
    let mut target = Node::new(small_shape(5 << 20, 64 << 10), BlockSize::B4096, 1024, 2);
    for lba in (0..1024).step_by(32) {
        source.append(1, lba, 32, RecordKind::Write);
    }
    source.flush();
    source.commit(32);
    source.world.run(Duration::from_secs(1));
    assert!(target.ask(Command::FillBegin { key: key() }).is_ok());
    let mut chunk = 0;
    loop {
        match target.ask(Command::FillChunk { key: key(), chunk, newest: Seq(3) }) {
            Ok(_) => {}
            Err(error) => {
                assert_eq!(error, ReplicaError::NoSpace);
                break;
            }
        }
        let blocks = record(u64::from(chunk) * 16, 16, |_| (), &target);
        assert!(target.ask(Command::FillData { key: key(), record: blocks }).is_ok());
        assert!(target.ask(Command::FillCommit { key: key(), chunk }).is_ok());
        chunk += 1;
    }
    assert!(chunk > 10);
    target.reopen();
    let kept = (0..chunk)
        .filter(|chunk| target.world.store.next_chunk(key(), *chunk) == Some((*chunk, Seq(3))));
    assert_eq!(kept.count(), chunk as usize);
    assert!(target.state().filling);
    assert!(target.ask(Command::Delete { key: key() }).is_ok());
    assert_eq!(target.world.store.usage().home_used_bytes, 0);
}
