//! The rules of filling, one by one: what a chunk's seq may say, and which version a source gives.
//! Each test fails without its rule.

#![allow(missing_docs)]
#![allow(clippy::cast_possible_truncation)]

mod pair;
mod sim;

use base::{BlockCount, BlockSize, Lba, RecordKind, ReplyBody, Seq};
use core::time::Duration;
use pair::{Filler, Node, adopt, copy_log, done, fetch, key, list, small_shape};
use store::Command;

const SECOND: Duration = Duration::from_secs(1);

fn node(chunk_bytes: u64) -> Node {
    Node::new(small_shape(16 << 20, chunk_bytes), BlockSize::B4096, 1024, 7)
}

/// Everything committed so far goes home.
fn go_home(node: &mut Node) {
    node.flush();
    node.world.run(SECOND);
}

fn commit_all(node: &mut Node) {
    node.flush();
    node.commit(node.log.len() as u64);
}

fn follow(source: &mut Node, target: &mut Node) {
    assert_eq!(copy_log(source, target), Some(true));
    target.flush();
    target.commit = source.commit;
}

fn fill(source: &mut Node, target: &mut Node) -> Filler {
    let mut filler = Filler::new();
    assert_eq!(filler.fill(source, target, &mut |_| true), Some(true));
    filler
}

/// Copies the chunks and goes no further.
fn copy_chunks(source: &mut Node, target: &mut Node) {
    let mut filler = Filler::new();
    let unit = target.world.store.chunk_unit(key()).expect("it is there");
    let chunks = list(source, unit, 0).1.len();
    let mut left = 2 * chunks + 100;
    let mut between = |_: &mut Node| {
        left -= 1;
        left > 0
    };
    let pass = filler.copy_only(source, target, &mut between);
    assert_eq!(pass, Some(()));
    assert!(target.state().filling);
}

/// Writes as much as a segment holds, past the blocks that tests look at.
fn fill_segment(node: &mut Node) {
    for number in 0..5 {
        node.append(1, 600 + number * 32, 32, RecordKind::Write);
    }
}

/// A version that an uncommitted record hides does not go home; when that record is taken back,
/// a copy made meanwhile is not as good as it seemed.
#[test]
fn what_an_uncommitted_record_hides_is_copied_when_it_comes_back() {
    for kind in [RecordKind::Write, RecordKind::Discard] {
        let (mut source, mut target) = (node(64 << 10), node(64 << 10));
        source.append(1, 0, 2, RecordKind::Write);
        fill_segment(&mut source);
        commit_all(&mut source);
        // In another segment than the first, or the first would not be flushed.
        source.append(1, 0, 1, kind);
        go_home(&mut source);
        copy_chunks(&mut source, &mut target);
        let keep = Seq(source.commit);
        assert!(source.ask(Command::Truncate { key: key(), keep }).is_ok());
        source.log.truncate(keep.0 as usize);
        go_home(&mut source);
        fill(&mut source, &mut target);
        adopt(&source, &mut target);
        target.check(&format!("{kind:?}"));
    }
}

/// What is not committed is not given: nobody could take it back.
#[test]
fn an_uncommitted_version_is_not_given() {
    for kind in [RecordKind::Write, RecordKind::Discard] {
        let (mut source, mut target) = (node(64 << 10), node(64 << 10));
        source.append(1, 0, 8, RecordKind::Write);
        commit_all(&mut source);
        go_home(&mut source);
        source.append(1, 2, 3, kind);
        copy_chunks(&mut source, &mut target);
        let keep = Seq(source.commit);
        assert!(source.ask(Command::Truncate { key: key(), keep }).is_ok());
        source.log.truncate(keep.0 as usize);
        fill(&mut source, &mut target);
        adopt(&source, &mut target);
        target.check(&format!("{kind:?}"));
    }
}

/// What was in the dropped log only is copied, even if the target knew that it was committed.
#[test]
fn what_was_in_the_dropped_log_only_is_copied() {
    for kind in [RecordKind::Write, RecordKind::Discard] {
        let (mut source, mut target) = (node(64 << 10), node(64 << 10));
        for lba in (0..256).step_by(16) {
            source.append(1, lba, 16, RecordKind::Write);
        }
        commit_all(&mut source);
        follow(&mut source, &mut target);
        target.commit(16);
        go_home(&mut source);
        go_home(&mut target);
        source.append(1, 80, 4, kind);
        commit_all(&mut source);
        follow(&mut source, &mut target);
        target.commit(17);
        go_home(&mut source);
        let filler = fill(&mut source, &mut target);
        assert_eq!(filler.copied, if kind == RecordKind::Write { 65536 } else { 12 * 4096 });
        adopt(&source, &mut target);
        target.check(&format!("{kind:?}"));
    }
}

/// Uncommitted records of the target's own do not make it as new as others of the same seq.
#[test]
fn seqs_of_another_history_count_for_nothing() {
    let (mut source, mut target) = (node(64 << 10), node(64 << 10));
    for lba in (0..256).step_by(16) {
        source.append(1, lba, 16, RecordKind::Write);
    }
    commit_all(&mut source);
    follow(&mut source, &mut target);
    target.commit(16);
    go_home(&mut source);
    go_home(&mut target);
    for lba in [0, 32, 48] {
        source.append(1, lba, 1, RecordKind::Write);
    }
    assert_eq!(copy_log(&mut source, &mut target), Some(true));
    target.flush();
    let keep = Seq(16);
    assert!(source.ask(Command::Truncate { key: key(), keep }).is_ok());
    source.log.truncate(16);
    for node in [&mut source, &mut target] {
        node.seal(2);
    }
    source.append(2, 112, 4, RecordKind::Write);
    commit_all(&mut source);
    go_home(&mut source);
    fill(&mut source, &mut target);
    adopt(&source, &mut target);
    target.check("other history");
}

/// A source with smaller chunks does not know any more when one of them went away.
#[test]
fn a_hole_in_a_unit_is_copied() {
    let (mut source, mut target) = (node(64 << 10), node(128 << 10));
    for lba in (0..256).step_by(16) {
        source.append(1, lba, 16, RecordKind::Write);
    }
    commit_all(&mut source);
    follow(&mut source, &mut target);
    target.commit(16);
    go_home(&mut source);
    go_home(&mut target);
    source.append(1, 80, 16, RecordKind::Discard);
    commit_all(&mut source);
    go_home(&mut source);
    let filler = fill(&mut source, &mut target);
    assert_eq!((filler.copied, filler.kept), (65536, 7));
    adopt(&source, &mut target);
    target.check("hole");
}

/// A copied chunk may be newer than the log; what the log then takes home is older.
#[test]
fn a_chunk_that_goes_back_in_time_says_so() {
    let (mut source, mut target) = (node(64 << 10), node(64 << 10));
    source.append(1, 0, 16, RecordKind::Write);
    commit_all(&mut source);
    go_home(&mut source);
    let position = list(&mut source, BlockCount(16), 0).0.trimmed;
    assert_eq!(position.seq, Seq(1));
    for _ in 0..4 {
        source.append(1, 0, 4, RecordKind::Write);
        fill_segment(&mut source);
    }
    commit_all(&mut source);
    go_home(&mut source);
    copy_chunks(&mut source, &mut target);
    let (_, filled) = target.world.store.next_chunk(key(), 0).expect("it was copied");
    done(&mut target, Command::FillEnd { key: key(), position }).expect("power stays");
    for seq in 2..8 {
        let record = source.scan(seq);
        target.adopt_record(&record, seq - 1);
    }
    target.flush();
    target.commit = 7;
    target.commit(7);
    target.world.run(SECOND);
    done(&mut target, Command::FillBegin { key: key() }).expect("power stays");
    let (_, now) = target.world.store.next_chunk(key(), 0).expect("it is kept");
    assert!(now < filled && now <= Seq(7), "{now:?} after {filled:?}");
    fill(&mut source, &mut target);
    adopt(&source, &mut target);
    target.check("back in time");
}

/// A copied chunk may lack blocks before their discard comes with the log. That counts as newer all the same:
/// who has the chunk as it was before must not keep it.
#[test]
fn a_discard_that_a_copy_had_before_it_came_is_not_forgotten() {
    let [mut source, mut copy, mut other] = [(); 3].map(|()| node(64 << 10));
    for lba in (0..64).step_by(16) {
        source.append(1, lba, 16, RecordKind::Write);
    }
    commit_all(&mut source);
    follow(&mut source, &mut other);
    other.commit(4);
    go_home(&mut source);
    go_home(&mut other);
    // After the list was made, before this chunk is copied.
    let mut discarded = false;
    let mut discard = |source: &mut Node| {
        if !core::mem::replace(&mut discarded, true) {
            source.append(1, 50, 4, RecordKind::Discard);
            commit_all(source);
        }
        true
    };
    let mut filler = Filler::new();
    assert_eq!(filler.fill(&mut source, &mut copy, &mut discard), Some(true));
    adopt(&source, &mut copy);
    copy.check("a copy that had it before");
    copy.flush();
    copy.commit(5);
    copy.world.run(SECOND);
    fill(&mut copy, &mut other);
    adopt(&copy, &mut other);
    other.check("a copy of the copy");
}

/// While a block is on its way home, the source gives it from the log; also if a newer one that is
/// not committed has taken its place in the index.
#[test]
fn a_block_on_its_way_home_is_given_whole() {
    for stop in 0..60 {
        let mut source = node(64 << 10);
        source.append(1, 0, 16, RecordKind::Write);
        commit_all(&mut source);
        go_home(&mut source);
        source.append(1, 0, 16, RecordKind::Write);
        fill_segment(&mut source);
        commit_all(&mut source);
        // Some way into the flush.
        source.world.run_steps(stop);
        source.append(1, 4, 2, RecordKind::Write);
        let committed = source.contents(source.commit as usize);
        let older = source.contents(1);
        let mut lba = 0;
        while lba < 16
            && let Some(record) = fetch(&mut source, lba, 16).expect("it can be read")
        {
            let start = record.header().lba.0;
            for (at, block) in (start..).zip(record.payload().bytes().chunks_exact(4096)) {
                let is = |ids: &[u64]| block == pair::pattern(ids[at as usize], at, 4096);
                let hidden = (4..6).contains(&at) && is(&older);
                assert!(is(&committed) || hidden, "after {stop} steps, block {at}");
            }
            lba = start + u64::from(record.header().blocks.0);
        }
        assert_eq!(lba, 16);
    }
}

/// A damaged chunk is not as good as its seq says.
#[test]
fn a_chunk_found_damaged_is_copied() {
    let (mut source, mut target) = (node(64 << 10), node(64 << 10));
    for lba in (0..64).step_by(16) {
        source.append(1, lba, 16, RecordKind::Write);
    }
    commit_all(&mut source);
    follow(&mut source, &mut target);
    target.commit(4);
    go_home(&mut source);
    go_home(&mut target);
    let id = source.contents(source.log.len())[20];
    let wanted = pair::pattern(id, 20, 4096);
    let media = &mut target.world.disks[1].media;
    let page = (0..media.len() / 4096).find(|at| media[at * 4096..][..4096] == wanted);
    media[page.expect("it is home") * 4096] ^= 1;
    let buffer = target.memory.take(4096).expect("buffers");
    let (lba, blocks, covers) = (Lba(20), BlockCount(1), Seq(1));
    let read = target.ask(Command::Read { key: key(), lba, blocks, covers, buffer });
    assert!(!matches!(read, Ok(ReplyBody::Data(_))));
    let filler = fill(&mut source, &mut target);
    assert_eq!((filler.copied, filler.kept), (65536, 3));
    adopt(&source, &mut target);
    target.check("healed");
}
