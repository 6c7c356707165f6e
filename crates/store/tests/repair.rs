//! Damaged blocks are rewritten with a peer's, and nothing else is.

#![allow(missing_docs)]
#![allow(clippy::cast_possible_truncation)]

mod pair;
mod sim;

use base::{
    BlockCount, BlockSize, Epoch, Lba, Position, Record, RecordHeader, RecordKind, ReplicaError,
    ReplyBody, Seq,
};
use core::time::Duration;
use pair::{Node, copy_log, fetch, key, pattern, resent, small_shape};
use sim::Random;
use store::Command;

const BLOCKS: u64 = 256;

/// A source and a target that hold the same, at home.
fn pair_of(block_size: BlockSize, seed: u64) -> (Node, Node) {
    let mut source = Node::new(small_shape(8 << 20, 64 << 10), block_size, BLOCKS, 1);
    let mut target = Node::new(small_shape(8 << 20, 64 << 10), block_size, BLOCKS, seed);
    for lba in (0..BLOCKS).step_by(16) {
        source.append(1, lba, 16, RecordKind::Write);
    }
    source.flush();
    source.commit(source.log.len() as u64);
    assert_eq!(copy_log(&mut source, &mut target), Some(true));
    target.log.clone_from(&source.log);
    target.flush();
    target.commit(target.log.len() as u64);
    for node in [&mut source, &mut target] {
        node.world.run(Duration::from_secs(1));
        assert_eq!(node.world.store.usage().log_dirty_bytes, 0);
    }
    (source, target)
}

/// Where a block is on the target's mass device.
fn home_of(target: &Node, lba: u64) -> usize {
    let bytes = target.block_size.bytes() as usize;
    let id = target.contents(target.log.len())[lba as usize];
    let wanted = pattern(id, lba, bytes);
    let media = &target.world.disks[1].media;
    let at = (0..media.len() / bytes).find(|at| media[at * bytes..][..bytes] == wanted);
    at.expect("it is home") * bytes
}

/// Fetches everything from the source and gives it to the target for repair.
fn repair_all(source: &mut Node, target: &mut Node) -> Option<()> {
    let chunk = u64::from(target.world.store.chunk_unit(key()).expect("it is there").0);
    for start in (0..BLOCKS).step_by(chunk as usize) {
        let (mut lba, end) = (start, (start + chunk).min(BLOCKS));
        while lba < end
            && let Some(record) = fetch(source, lba, end).expect("the source is whole")
        {
            lba = record.header().lba.0 + u64::from(record.header().blocks.0);
            let record = resent(target, &record);
            let answer = target.try_ask(Command::Repair { key: key(), record })?;
            assert!(matches!(answer, Ok(ReplyBody::Done)), "{answer:?}");
        }
    }
    Some(())
}

fn damaged(target: &mut Node) -> usize {
    let covers = target.state().last.seq;
    let bad = |lba: &u64| {
        let buffer = target.memory.take(4096).expect("buffers");
        let (lba, blocks) = (Lba(*lba), BlockCount(1));
        let answer = target.ask(Command::Read { key: key(), lba, blocks, covers, buffer });
        matches!(answer, Err(ReplicaError::Damaged))
    };
    (0..BLOCKS).filter(bad).count()
}

#[test]
fn rot_and_unreadable_sectors_are_repaired() {
    for block_size in [BlockSize::B512, BlockSize::B4096] {
        for seed in 0..4 {
            let (mut source, mut target) = pair_of(block_size, seed);
            let mut random = Random::new(seed);
            for _ in 0..12 {
                let at = home_of(&target, random.below(BLOCKS / 16) * 16 + 3);
                let disk = &mut target.world.disks[1];
                if seed % 2 == 0 {
                    disk.media[at + 5] ^= 0x10;
                } else {
                    disk.latent.insert(at / 512);
                }
                // Only whole blocks can be found again.
                if random.chance(50) {
                    break;
                }
            }
            target.world.reopen(true).expect("it opens");
            assert!(damaged(&mut target) > 0);
            repair_all(&mut source, &mut target).expect("power stays");
            target.check("repaired");
            target.reopen();
            target.check("repaired and reopened");
        }
    }
}

/// Blocks that were lost on their way home have no checksum any more.
#[test]
fn blocks_lost_on_their_way_home_are_repaired_whenever_power_goes() {
    for block_size in [BlockSize::B512, BlockSize::B4096] {
        let mut cuts = 0;
        for cut in 0.. {
            let (mut source, mut target) = pair_of(block_size, cut);
            source.append(1, 34, 8, RecordKind::Write);
            source.flush();
            source.commit(17);
            assert_eq!(copy_log(&mut source, &mut target), Some(true));
            target.log.clone_from(&source.log);
            target.flush();
            let bytes = block_size.bytes() as usize;
            let wanted = pattern(17, 36, bytes);
            let media = &mut target.world.disks[0].media;
            let at = (0..media.len() / bytes).find(|at| media[at * bytes..][..bytes] == wanted);
            media[at.expect("it is in the log") * bytes] ^= 1;
            target.commit(17);
            target.world.run(Duration::from_secs(1));
            assert_eq!(damaged(&mut target), 1);
            target.world.cut_after = Some(target.world.operations + cut);
            let whole = repair_all(&mut source, &mut target).is_some();
            target.reopen();
            assert!(damaged(&mut target) <= usize::from(!whole), "cut {cut}");
            repair_all(&mut source, &mut target).expect("power stays");
            target.check(&format!("cut {cut}"));
            target.reopen();
            target.check(&format!("cut {cut}, reopened"));
            cuts += 1;
            if whole {
                break;
            }
        }
        assert!(cuts > 5);
    }
}

#[test]
fn what_is_newer_or_whole_is_left() {
    let (mut source, mut target) = pair_of(BlockSize::B4096, 1);
    let at = home_of(&target, 20);
    target.world.disks[1].media[at] ^= 1;
    target.world.reopen(true).expect("it opens");
    let record = fetch(&mut source, 16, 32).expect("it is whole").expect("it is there");
    // The target has a newer block than the source, and one that is damaged.
    target.append(1, 18, 1, RecordKind::Write);
    target.append(1, 30, 1, RecordKind::Discard);
    target.flush();
    let repair = Command::Repair { key: key(), record: resent(&target, &record) };
    assert!(target.ask(repair).is_ok());
    target.check("repaired");
    // A peer that is behind, or lies about data that is whole here.
    let lie = |seq, lba, target: &Node| {
        let header = RecordHeader {
            key: key(),
            position: Position::new(Epoch(1), Seq(seq)),
            previous_epoch: Epoch(1),
            kind: RecordKind::Write,
            block_size: BlockSize::B4096,
            lba: Lba(lba),
            blocks: BlockCount(2),
            fua: false,
        };
        let buffer = target.memory.take(8192).expect("buffers");
        Record::encode(header, buffer)
    };
    for (seq, lba, expected) in
        [(1, 4, ReplicaError::Behind { last: target.last() }), (99, 15, ReplicaError::Invalid)]
    {
        let record = lie(seq, lba, &target);
        let answer = target.ask(Command::Repair { key: key(), record });
        assert_eq!(answer.unwrap_err(), expected);
    }
    let record = lie(99, 4, &target);
    assert!(target.ask(Command::Repair { key: key(), record }).is_ok());
    target.check("left alone");
}

/// Scrubbing finds exactly what is damaged, keeps to its budget, and does not stand in the way.
#[test]
fn a_scrub_finds_what_is_damaged() {
    for block_size in [BlockSize::B512, BlockSize::B4096] {
        let (mut source, mut target) = pair_of(block_size, 3);
        let places = [7, 8, 9, 200].map(|lba| home_of(&target, lba));
        for (number, at) in places.into_iter().enumerate() {
            let disk = &mut target.world.disks[1];
            // A sector that cannot be read takes its page with it.
            if number == 3 && block_size == BlockSize::B4096 {
                disk.latent.insert(at / 512);
            } else {
                disk.media[at] ^= 1;
            }
        }
        let bytes = BLOCKS << block_size.log2();
        target.world.shape.scrub_bytes_per_second = bytes;
        target.world.reopen(true).expect("it opens");
        let begun = target.world.now;
        while target.world.store.scrubbed().rounds == 0 {
            assert!(target.world.step() || target.world.tick(), "the scrub goes on");
        }
        let took = target.world.now - begun;
        assert!(took >= Duration::from_millis(900), "{took:?} for a second's budget");
        assert_eq!(target.world.scrubbed, [(7, 3), (200, 1)]);
        assert_eq!(target.world.store.scrubbed().damaged_blocks, 4);
        assert!(target.world.store.scrubbed().bytes >= bytes);
        repair_all(&mut source, &mut target).expect("power stays");
        target.world.scrubbed.clear();
        while target.world.store.scrubbed().rounds < 3 {
            assert!(target.world.step() || target.world.tick(), "the scrub goes on");
        }
        assert_eq!(target.world.scrubbed, []);
        // Nothing is read of what is gone.
        assert!(target.ask(Command::Delete { key: key() }).is_ok());
        target.world.run(Duration::from_secs(1));
        let before = target.world.store.scrubbed();
        target.world.run(Duration::from_secs(1));
        assert_eq!(target.world.store.scrubbed(), before);
    }
}
