//! Damage of home is found by reads and scrubs, and gone when the blocks are written again; a log that is
//! gone as a whole is missed.

#![allow(missing_docs)]
#![allow(clippy::cast_possible_truncation)]

mod pair;
mod sim;

use base::{BlockCount, BlockSize, Lba, RecordKind, ReplicaError, Seq};
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

/// Nobody says that the last records are settled, and no batch follows them: the journal knows that they were on media.
#[test]
fn rot_at_the_end_of_an_idle_log_is_missed() {
    for cut_back in [false, true] {
        let mut node = node_with_batches(8);
        node.world.run(Duration::from_secs(1));
        if cut_back {
            // What is cut off is not missed; what was noted before is no evidence any more.
            assert!(node.ask(Command::Truncate { key: key(), keep: Seq(5) }).is_ok());
            node.log.truncate(5);
            node.world.reopen(true).expect("it opens");
            assert_eq!(node.state().last.seq, Seq(5));
            assert!(!node.state().damaged);
        }
        let count = node.log.len();
        let block = pattern(node.log[count - 1].id, node.log[count - 1].lba, 4096);
        let media = &mut node.world.disks[0].media;
        let at = (0..media.len() / 4096).find(|at| media[at * 4096..][..4096] == block);
        media[at.expect("it is in the log") * 4096] ^= 1;
        node.world.reopen(true).expect("it opens");
        assert_eq!(node.state().last.seq, Seq(count as u64), "the log does not end before it");
        assert_eq!(damaged(&mut node), 1, "and what has rotted is known to be damaged");
    }
}

/// A head that looks for the end of a log need not read what comes before it there.
#[test]
fn the_end_of_a_log_can_be_scanned_behind_what_cannot_be_read() {
    let mut node = node_with_batches(8);
    lose(&mut node, Loss { rotten: &[], unreadable: &[13] });
    assert_eq!(node.scan(8).header().position.seq, Seq(8));
    let buffer = node.memory.take(base::limits::PAYLOAD_BYTES_MAX).expect("buffers");
    let seventh = node.ask(Command::Scan { key: key(), seq: Seq(7), buffer });
    assert!(matches!(seventh, Err(ReplicaError::Damaged)), "{seventh:?}");
}

/// What becomes of the pages of a segment, counted from its header. The first batch is next to that; each batch
/// has a page of headers and one of data.
#[derive(Clone, Copy, Debug)]
struct Loss {
    rotten: &'static [usize],
    unreadable: &'static [usize],
}

/// Writes `count` batches of which each says that those before are on media. Nothing else says so.
fn write_batches(node: &mut Node, count: u64) {
    for lba in 0..count {
        node.append(1, lba, 1, RecordKind::Write);
        node.flush();
    }
}

/// Loses pages of the first segment.
fn lose(node: &mut Node, loss: Loss) {
    let disk = &mut node.world.disks[0];
    let mut pages = disk.media.chunks_exact(4096);
    let header = pages.position(|page| page.starts_with(b"HFSG")).expect("there is a segment");
    for page in loss.rotten {
        disk.media[(header + page) * 4096 + 100] ^= 1;
    }
    for page in loss.unreadable {
        disk.latent.insert((header + page) * 8);
    }
}

fn node_with_batches(count: u64) -> Node {
    let mut shape = small_shape(8 << 20, 64 << 10);
    (shape.flush.idle, shape.flush.age) = (Duration::from_hours(1), Duration::from_hours(1));
    let mut node = Node::new(shape, BlockSize::B4096, BLOCKS, 9);
    write_batches(&mut node, count);
    node
}

#[test]
fn a_segment_without_its_header_is_known_by_its_batches() {
    const ODD: [usize; 30] = {
        let mut pages = [0; 30];
        let mut number = 0;
        while number < pages.len() {
            pages[number] = 2 * number + 1;
            number += 1;
        }
        pages
    };
    let losses = [
        // What cannot be read is data, in the midst of what is read of a segment to see whose it is.
        (Loss { rotten: &[0], unreadable: &[6] }, 40),
        (Loss { rotten: &[], unreadable: &[0, 4] }, 40),
        // The first batch is lost as well, in one way or another; and more of them.
        (Loss { rotten: &[0, 1], unreadable: &[] }, 0),
        (Loss { rotten: &[0], unreadable: &[1] }, 0),
        (Loss { rotten: &[1], unreadable: &[0] }, 0),
        (Loss { rotten: &[3], unreadable: &[0, 1] }, 0),
        (Loss { rotten: &ODD, unreadable: &[0, 40] }, 0),
    ];
    for (loss, whole) in losses {
        let mut node = node_with_batches(40);
        lose(&mut node, loss);
        node.world.reopen(true).expect("it opens");
        let info = node.world.store.replica(key()).expect("it is there");
        assert_eq!(info.damaged, whole == 0, "{loss:?}: {info:?}");
        assert!(info.state.last.seq.0 >= whole, "{loss:?}: {info:?}");
        // It does not get away with that later, either.
        node.world.reopen(true).expect("it opens");
        let info = node.world.store.replica(key()).expect("it is there");
        assert_eq!(info.damaged, whole == 0, "{loss:?}: {info:?}");
    }
}

#[test]
fn what_was_in_a_segment_before_is_nobodys() {
    for deleted in [true, false] {
        let mut node = node_with_batches(40);
        if deleted {
            assert!(node.ask(Command::Delete { key: key() }).is_ok());
            let (block_size, blocks) = (BlockSize::B4096, BLOCKS);
            let made = node.ask(Command::Create { key: key(), block_size, blocks });
            assert!(made.is_ok(), "{made:?}");
        } else {
            let cut = node.ask(Command::Truncate { key: key(), keep: Seq(0) });
            assert!(cut.is_ok(), "{cut:?}");
        }
        lose(&mut node, Loss { rotten: &[0, 1], unreadable: &[3] });
        node.world.reopen(true).expect("it opens");
        let info = node.world.store.replica(key()).expect("it is there");
        assert!(!info.damaged, "{info:?}");
        assert_eq!(info.state.last.seq, Seq::ZERO);
    }
}

/// The header of a batch of many small blocks takes more pages than are read of each segment at first.
#[test]
fn a_segment_without_its_header_is_known_by_a_batch_with_a_long_header() {
    /// Eight such writes fit into a segment of the test's, and their headers into two pages.
    const WRITE_BLOCKS: u64 = 120;
    for unreadable in [false, true] {
        let mut shape = small_shape(8 << 20, 64 << 10);
        (shape.flush.idle, shape.flush.age) = (Duration::from_hours(1), Duration::from_hours(1));
        let mut node = Node::new(shape, BlockSize::B512, 16 * WRITE_BLOCKS, 12);
        // They wait for the replica's first segment, and go together.
        let places = (0..9).map(|number| number * WRITE_BLOCKS);
        let writes: Vec<u64> =
            places.map(|lba| node.send_append(1, lba, WRITE_BLOCKS, RecordKind::Write)).collect();
        for tag in writes {
            assert!(node.wait(tag).expect("power stays").is_ok());
        }
        node.flush();
        let disk = &mut node.world.disks[0];
        let pages: Vec<&[u8]> = disk.media.chunks_exact(4096).collect();
        let begins_long = |pages: &&[&[u8]]| {
            let header_pages = u16::from_le_bytes([pages[1][110], pages[1][111]]);
            pages[0].starts_with(b"HFSG") && pages[1].starts_with(b"HFBT") && header_pages > 1
        };
        let header = pages.windows(2).position(|pages| begins_long(&pages));
        let header = header.expect("a segment that begins with a batch with a long header");
        if unreadable {
            disk.latent.insert(header * 8);
        } else {
            disk.media[header * 4096 + 100] ^= 1;
        }
        node.world.reopen(true).expect("it opens");
        let info = node.world.store.replica(key()).expect("it is there");
        assert_eq!((info.damaged, info.state.last.seq), (false, Seq(9)), "{unreadable}: {info:?}");
        node.check("after the loss of a segment's header");
    }
}
