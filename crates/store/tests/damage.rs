//! Damage of home is found by reads and scrubs, and gone when the blocks are written again; a log that is
//! gone as a whole is missed.

#![allow(missing_docs)]
#![allow(clippy::cast_possible_truncation)]

mod pair;
mod sim;

use base::{BlockCount, BlockSize, Lba, RecordKind, ReplicaError};
use core::time::Duration;
use pair::{Node, key, pattern, small_shape};
use sim::Random;
use store::Command;

const BLOCKS: u64 = 256;

/// One that holds something everywhere, at home.
fn node_of(block_size: BlockSize, seed: u64) -> Node {
    let mut node = Node::new(small_shape(8 << 20, 64 << 10), block_size, BLOCKS, seed);
    write_again(&mut node);
    node
}

/// Where a block is on the mass device.
fn home_of(node: &Node, lba: u64) -> usize {
    let bytes = node.block_size.bytes() as usize;
    let id = node.contents(node.log.len())[lba as usize];
    let wanted = pattern(id, lba, bytes);
    let media = &node.world.disks[1].media;
    let at = (0..media.len() / bytes).find(|at| media[at * bytes..][..bytes] == wanted);
    at.expect("it is home") * bytes
}

/// Writes everything again, whatever is damaged, as a head does with a peer's copy; and takes it home.
fn write_again(node: &mut Node) {
    for lba in (0..BLOCKS).step_by(16) {
        node.append(1, lba, 16, RecordKind::Write);
    }
    node.flush();
    node.commit(node.log.len() as u64);
    node.world.run(Duration::from_secs(1));
    assert_eq!(node.world.store.usage().log_dirty_bytes, 0);
}

fn damaged(node: &mut Node) -> usize {
    let covers = node.state().last.seq;
    let bad = |lba: &u64| {
        let buffer = node.memory.take(4096).expect("buffers");
        let (lba, blocks) = (Lba(*lba), BlockCount(1));
        let answer = node.ask(Command::Read { key: key(), lba, blocks, covers, buffer });
        matches!(answer, Err(ReplicaError::Damaged))
    };
    (0..BLOCKS).filter(bad).count()
}

#[test]
fn rot_and_unreadable_sectors_are_gone_when_written_again() {
    for block_size in [BlockSize::B512, BlockSize::B4096] {
        for seed in 0..4 {
            let mut node = node_of(block_size, seed);
            let mut random = Random::new(seed);
            for _ in 0..12 {
                let at = home_of(&node, random.below(BLOCKS / 16) * 16 + 3);
                let disk = &mut node.world.disks[1];
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
            node.world.reopen(true).expect("it opens");
            assert!(damaged(&mut node) > 0);
            write_again(&mut node);
            node.check("written again");
            node.reopen();
            node.check("and reopened");
        }
    }
}

/// Scrubbing finds exactly what is damaged, keeps to its budget, and does not stand in the way.
#[test]
fn a_scrub_finds_what_is_damaged() {
    for block_size in [BlockSize::B512, BlockSize::B4096] {
        let mut node = node_of(block_size, 3);
        let places = [7, 8, 9, 200].map(|lba| home_of(&node, lba));
        for (number, at) in places.into_iter().enumerate() {
            let disk = &mut node.world.disks[1];
            // A sector that cannot be read takes its page with it.
            if number == 3 && block_size == BlockSize::B4096 {
                disk.latent.insert(at / 512);
            } else {
                disk.media[at] ^= 1;
            }
        }
        let bytes = BLOCKS << block_size.log2();
        node.world.shape.scrub_bytes_per_second = bytes;
        node.world.reopen(true).expect("it opens");
        let begun = node.world.now;
        while node.world.store.scrubbed().rounds == 0 {
            assert!(node.world.step() || node.world.tick(), "the scrub goes on");
        }
        let took = node.world.now - begun;
        assert!(took >= Duration::from_millis(900), "{took:?} for a second's budget");
        assert_eq!(node.world.scrubbed, [(7, 3), (200, 1)]);
        assert_eq!(node.world.store.scrubbed().damaged_blocks, 4);
        assert!(node.world.store.scrubbed().bytes >= bytes);
        write_again(&mut node);
        node.world.scrubbed.clear();
        while node.world.store.scrubbed().rounds < 3 {
            assert!(node.world.step() || node.world.tick(), "the scrub goes on");
        }
        assert_eq!(node.world.scrubbed, []);
        // Nothing is read of what is gone.
        assert!(node.ask(Command::Delete { key: key() }).is_ok());
        node.world.run(Duration::from_secs(1));
        let before = node.world.store.scrubbed();
        node.world.run(Duration::from_secs(1));
        assert_eq!(node.world.store.scrubbed(), before);
    }
}

#[test]
fn a_log_that_rots_as_a_whole_is_missed_after_a_restart() {
    let mut shape = small_shape(8 << 20, 64 << 10);
    (shape.flush.idle, shape.flush.age) = (Duration::from_hours(1), Duration::from_hours(1));
    let mut node = Node::new(shape, BlockSize::B4096, BLOCKS, 7);
    for lba in 0..8 {
        node.append(1, lba, 1, RecordKind::Write);
    }
    node.flush();
    node.commit(8);
    node.append(1, 8, 1, RecordKind::Write);
    node.flush();
    // Only the log itself says what is settled: there was no time to note it.
    node.world.reopen(false).expect("it opens");
    assert_eq!(node.state().commit.0, 8);
    for page in node.world.disks[0].media.chunks_exact_mut(4096) {
        if page.starts_with(b"HFBT") || page.starts_with(b"HFSG") {
            page[9] ^= 1;
        }
    }
    node.world.reopen(true).expect("it opens");
    let info = node.world.store.replica(key()).expect("it is there");
    assert!(info.damaged, "{info:?}");
}
