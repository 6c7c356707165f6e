//! What cannot be read of the metadata may be newer than what can: a pool says so, or knows better from the
//! other copy. It never goes on with what is older.

#![allow(missing_docs)]
#![allow(clippy::cast_possible_truncation)]

mod pair;
mod sim;

use base::{BlockSize, Epoch, RecordKind};
use core::time::Duration;
use pair::{Node, key, small_shape};
use sim::SECTOR;
use store::{DeviceIndex, OpenError};

const PAGE: usize = 4096;
const HEADER: [u8; 4] = *b"HFMH";
const CHECKPOINT: [u8; 4] = *b"HFMC";
const JOURNAL: [u8; 4] = *b"HFMJ";
/// The last epoch that is sealed: each seal is a page of the journal.
const SEALED: u64 = 7;

/// Pages of the journal that are read at a time.
const PIECE_PAGES: usize = 32;
/// Of so large a mass device, a pool's journal has more than 250 pages.
const LONG_JOURNAL: u64 = 128 << 20;

/// How a page of one copy is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Loss {
    /// Its sectors cannot be read.
    Unreadable,
    /// A bit is another one.
    Rotten,
}

/// A pool whose last seal is the newest page of the journal.
fn sealed_often(seed: u64) -> Node {
    sealed_often_in(8 << 20, seed)
}

fn sealed_often_in(mass: u64, seed: u64) -> Node {
    let mut node = Node::new(small_shape(mass, 64 << 10), BlockSize::B4096, 256, seed);
    // So that the journal's room is not as it was formatted.
    for _ in 0..2 {
        for _ in 0..12 {
            node.seal(1);
        }
        node.world.reopen(false).expect("it opens");
    }
    for epoch in 2..=SEALED {
        node.seal(epoch);
    }
    node.world.run(Duration::from_millis(10));
    assert_eq!(node.state().sealed, Epoch(SEALED));
    node
}

/// The generation that the header page or the journal's page at an offset states.
fn generation(media: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(media[at + 24..at + 32].try_into().expect("8 bytes"))
}

/// Where a copy's pages of the newest generation are, in their order.
fn pages(node: &Node, copy: usize, magic: [u8; 4]) -> Vec<usize> {
    let media = &node.world.disks[copy].media;
    let all = (0..media.len()).step_by(PAGE).filter(|at| media[*at..].starts_with(&magic));
    let newest = all.clone().map(|at| generation(media, at)).max();
    all.filter(|at| Some(generation(media, *at)) == newest).collect()
}

fn newest_page(node: &Node, copy: usize) -> usize {
    *pages(node, copy, JOURNAL).last().expect("it was sealed")
}

fn lose(node: &mut Node, copy: usize, at: usize, loss: Loss) {
    let disk = &mut node.world.disks[copy];
    match loss {
        Loss::Unreadable => {
            disk.latent.insert(at / SECTOR + 3);
        }
        Loss::Rotten => disk.media[at + 60] ^= 1,
    }
}

/// It does not open, says why, and does when everything can be read again.
fn is_refused_until_it_can_be_read(node: &mut Node, what: &str) {
    for _ in 0..2 {
        let refused = node.world.reopen(true);
        assert!(matches!(refused, Err(OpenError::MetadataUnread { .. })), "{what}: {refused:?}");
    }
    for disk in &mut node.world.disks {
        disk.latent.clear();
    }
    opens(node, what);
}

fn opens(node: &mut Node, what: &str) {
    let opened = node.world.reopen(true);
    assert!(opened.is_ok(), "{what}: {opened:?}");
    let sealed = node.world.store.replica(key()).expect("it is there").state.sealed;
    assert_eq!(sealed, Epoch(SEALED), "{what}: the seal went back");
}

#[test]
fn a_page_that_no_copy_can_give_is_not_the_journals_end() {
    for back in 0..3 {
        let mut node = sealed_often(back);
        for copy in 0..2 {
            let pages = pages(&node, copy, JOURNAL);
            let at = pages[pages.len() - 1 - usize::try_from(back).expect("small")];
            lose(&mut node, copy, at, Loss::Unreadable);
        }
        is_refused_until_it_can_be_read(&mut node, "unreadable in both copies");
    }
    for copy in 0..2 {
        let mut node = sealed_often(3);
        let places = [0, 1].map(|copy| newest_page(&node, copy));
        lose(&mut node, copy, places[copy], Loss::Unreadable);
        lose(&mut node, 1 - copy, places[1 - copy], Loss::Rotten);
        is_refused_until_it_can_be_read(&mut node, "one copy is unreadable, the other rotten");
    }
}

#[test]
fn a_page_that_was_lost_in_both_copies_is_not_the_journals_end_either() {
    for lost in [1, 2, 30, 31, 32, 33, 62, 63, 64, 90, 98] {
        let mut node = sealed_often_in(LONG_JOURNAL, 50 + lost as u64);
        while pages(&node, 0, JOURNAL).len() < 100 {
            node.seal(SEALED);
        }
        for copy in 0..2 {
            let at = pages(&node, copy, JOURNAL)[lost];
            lose(&mut node, copy, at, Loss::Rotten);
        }
        let refused = node.world.reopen(true);
        assert!(matches!(refused, Err(OpenError::Metadata { .. })), "page {lost}: {refused:?}");
    }
}

#[test]
fn far_behind_the_journals_end_nothing_is_looked_at() {
    for seed in 0..4 {
        let mut node = sealed_often_in(LONG_JOURNAL, 70 + seed);
        for copy in 0..2 {
            let end = newest_page(&node, copy) + PAGE;
            for page in 2 * PIECE_PAGES..4 * PIECE_PAGES {
                lose(&mut node, copy, end + page * PAGE, Loss::Unreadable);
            }
        }
        opens(&mut node, "it ended long before");
        assert_eq!(node.world.mended, []);
    }
}

#[test]
fn an_unreadable_sector_costs_its_page_in_its_copy_and_nothing_else() {
    // Neighbours, one in each copy; in the checkpoint and the journal.
    for first in 0..2 {
        let mut node = sealed_often(10);
        for copy in 0..2 {
            let pages = pages(&node, copy, JOURNAL);
            let odd = usize::from(copy == first);
            for at in pages.iter().skip(odd).step_by(2) {
                lose(&mut node, copy, *at, Loss::Unreadable);
            }
            if copy == first {
                let checkpoint = self::pages(&node, copy, CHECKPOINT)[0];
                lose(&mut node, copy, checkpoint, Loss::Unreadable);
            }
        }
        opens(&mut node, "every page can be read in one copy");
        assert_eq!(core::mem::take(&mut node.world.mended).len(), 2, "nobody was told");
        opens(&mut node, "both copies are whole again");
        assert_eq!(node.world.mended, []);
    }
    // Rot, of which the device says nothing.
    for copy in 0..2 {
        let mut node = sealed_often(12);
        let checkpoint = pages(&node, copy, CHECKPOINT)[0];
        lose(&mut node, copy, checkpoint, Loss::Rotten);
        opens(&mut node, "the other copy is whole");
        assert_eq!(core::mem::take(&mut node.world.mended).len(), 1, "nobody was told");
        opens(&mut node, "both copies are whole again");
        assert_eq!(node.world.mended, []);
    }
    // A copy that is unreadable as a whole.
    for copy in 0..2 {
        let mut node = sealed_often(11);
        for magic in [HEADER, CHECKPOINT, JOURNAL] {
            for at in pages(&node, copy, magic) {
                lose(&mut node, copy, at, Loss::Unreadable);
            }
        }
        opens(&mut node, "the other copy is whole");
    }
}

#[test]
fn an_unreadable_sector_where_the_journal_goes_on_keeps_no_pool_closed() {
    for (copy, past) in [(0, 1), (1, 1), (0, 2)] {
        let mut node = sealed_often(20);
        let at = newest_page(&node, copy) + past * PAGE;
        lose(&mut node, copy, at, Loss::Unreadable);
        opens(&mut node, "the other copy says that nothing is there");
    }
    // Nothing is there in either copy, and nothing in the copies says so.
    let mut node = sealed_often(21);
    for copy in 0..2 {
        let at = newest_page(&node, copy) + PAGE;
        lose(&mut node, copy, at, Loss::Unreadable);
    }
    is_refused_until_it_can_be_read(&mut node, "unreadable where the journal goes on");
    // Past a page that was not written there is nothing.
    let mut node = sealed_often(22);
    for copy in 0..2 {
        let at = newest_page(&node, copy) + 2 * PAGE;
        lose(&mut node, copy, at, Loss::Unreadable);
    }
    opens(&mut node, "past the journal's end");
}

/// Pages behind one that cannot be read are read again; what had been asked of them before comes when the opening
/// would long be at something else.
#[test]
fn a_late_read_of_the_journal_is_taken_for_nothing_else() {
    for seed in 0..8 {
        let mut node = sealed_often(40 + seed);
        // Most segments have something that is nowhere else.
        for lba in (0..256).step_by(32).cycle().take(48) {
            node.append(SEALED, lba, 32, RecordKind::Write);
        }
        node.flush();
        let copy = usize::from(seed % 2 == 1);
        let first = pages(&node, copy, JOURNAL)[0];
        lose(&mut node, copy, first, Loss::Unreadable);
        let late = (DeviceIndex(copy as u16), (first + PIECE_PAGES * PAGE) as u64);
        node.world.late_read = Some(late);
        opens(&mut node, "the other copy is whole");
        assert_eq!(node.world.late_read, None, "no such piece was read");
        node.check("a read came late");
    }
}

/// The generation before has not been wiped yet, or that was lost.
#[test]
fn a_checkpoint_that_cannot_be_read_is_not_passed_over_for_the_one_before() {
    for (first, second) in [
        (Loss::Unreadable, Loss::Unreadable),
        (Loss::Unreadable, Loss::Rotten),
        (Loss::Rotten, Loss::Unreadable),
    ] {
        let mut node = sealed_often(30);
        let before = [0, 1].map(|copy| {
            let at = pages(&node, copy, HEADER)[0];
            (at, node.world.disks[copy].media[at..at + PAGE].to_vec())
        });
        node.world.reopen(false).expect("it opens");
        node.world.run(Duration::from_secs(1));
        for disk in &mut node.world.disks {
            disk.sync(u64::MAX);
        }
        for (copy, loss) in [first, second].into_iter().enumerate() {
            let at = pages(&node, copy, HEADER)[0];
            let (old, header) = &before[copy];
            assert_ne!(at, *old, "the regions take turns");
            node.world.disks[copy].media[*old..*old + PAGE].copy_from_slice(header);
            lose(&mut node, copy, at, loss);
        }
        is_refused_until_it_can_be_read(&mut node, "the newer header cannot be read");
    }
    // The region that is not in use may have an unreadable sector.
    for copy in 0..2 {
        let mut node = sealed_often(31);
        let at = pages(&node, copy, HEADER)[0];
        let opened = node.world.reopen(false);
        assert!(opened.is_ok(), "{opened:?}");
        node.world.run(Duration::from_secs(1));
        lose(&mut node, copy, at, Loss::Unreadable);
        opens(&mut node, "the older region's header");
    }
    let mut node = sealed_often(32);
    for copy in 0..2 {
        let at = pages(&node, copy, HEADER)[0];
        lose(&mut node, copy, at, Loss::Unreadable);
    }
    is_refused_until_it_can_be_read(&mut node, "no header can be read");
}
