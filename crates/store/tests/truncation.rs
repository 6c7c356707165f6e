//! A log that is being cut back, as others see it meanwhile; and what crashes leave of logs that go on elsewhere.

#![allow(missing_docs)]
#![allow(clippy::cast_possible_truncation)]

mod pair;
mod sim;

use base::{BlockSize, RecordKind, ReplicaError, ReplyBody, Seq};
use core::time::Duration;
use pair::{Node, key, small_shape};
use store::Command;

/// Cuts the log back to `keep` while somebody scans all of it; how many scans found their record,
/// and how many the end of the log.
fn scanned_meanwhile(node: &mut Node, keep: u64, records: u32) -> (usize, usize) {
    let last = node.last().seq.0;
    let truncation = node.send(Command::Truncate { key: key(), keep: Seq(keep) });
    let mut scans = Vec::new();
    loop {
        for seq in (1..=last).rev().take(6) {
            // Those that are near what is cut off, and others.
            let seq = if seq % 2 == 0 { seq } else { 1 + node.world.random.below(last) };
            let Some(buffer) = node.memory.take(base::limits::PAYLOAD_BYTES_MAX) else { break };
            let seq = Seq(seq);
            let scan = if records == 0 {
                Command::Scan { key: key(), seq, buffer }
            } else {
                Command::ScanRun { key: key(), seq, records, buffer }
            };
            scans.push((node.send(scan), seq));
        }
        node.world.drain();
        if let Some(answer) = node.take_answer(truncation) {
            assert!(matches!(answer, Ok(ReplyBody::Truncated { .. })), "{answer:?}");
            break;
        }
        assert!(node.world.step() || node.world.tick(), "no end of it");
    }
    node.log.truncate(usize::try_from(keep).expect("a few"));
    let (mut found, mut behind) = (0, 0);
    for (tag, seq) in scans {
        match node.wait(tag).expect("power stays") {
            Ok(_) => found += 1,
            Err(ReplicaError::Behind { .. }) if seq > Seq(keep) => behind += 1,
            Err(ReplicaError::Trimmed { .. }) => {}
            other => panic!("a scan of {seq} in a log that is cut back to {keep}: {other:?}"),
        }
    }
    (found, behind)
}

fn node(seed: u64) -> Node {
    Node::new(small_shape(16 << 20, 64 << 10), BlockSize::B4096, 1024, seed)
}

/// Cut back to what is in the log: nothing of it is missed meanwhile, and what goes is not damaged.
#[test]
fn what_is_scanned_while_a_log_is_cut_back_is_not_damaged() {
    let (mut found, mut behind) = (0, 0);
    for seed in 1..=40 {
        let mut node = node(seed);
        for number in 0..40 {
            node.append(1, number * 8, 8, RecordKind::Write);
        }
        node.flush();
        let records = u32::try_from(seed % 4).expect("a few");
        let sums = scanned_meanwhile(&mut node, 3 + seed / 2, records);
        (found, behind) = (found + sums.0, behind + sums.1);
        node.check("cut back");
    }
    assert!(found > 100 && behind > 10, "{found} found, {behind} behind the end");
}

/// Cut back to where nothing of it is left in the log.
#[test]
fn what_is_scanned_while_a_whole_log_is_cut_off_is_not_damaged() {
    let mut behind = 0;
    for seed in 1..=40 {
        let mut node = node(seed);
        for number in 0..40 {
            node.append(1, number * 8, 8, RecordKind::Write);
        }
        if seed % 2 == 0 {
            node.flush();
            node.commit(40);
            node.world.run(Duration::from_secs(2));
        }
        let keep = node.commit;
        for number in 0..40 {
            node.append(1, number * 8, 8, RecordKind::Write);
        }
        node.flush();
        behind += scanned_meanwhile(&mut node, keep, u32::try_from(seed % 3).expect("a few")).1;
        node.check("cut off");
    }
    assert!(behind > 10, "{behind} behind the end");
}

const PAGE_SECTORS: usize = 4096 / sim::SECTOR;

/// One whose log goes nowhere, and nothing of it to the journal.
fn calm_node(block_size: BlockSize, seed: u64) -> Node {
    let mut shape = small_shape(16 << 20, 64 << 10);
    (shape.flush.idle, shape.flush.age) = (Duration::from_hours(1), Duration::from_hours(1));
    Node::new(shape, block_size, 1024, seed)
}

/// Of a segment only a later batch has landed when power went, and the log was cut back after that. Used again, the
/// segment has that batch behind its own ones: it says that more was on media, of a log that is no more.
#[test]
fn what_a_crash_left_of_a_segment_does_not_vouch_for_a_later_log() {
    for seed in 1..=8 {
        let mut node = calm_node(BlockSize::B4096, seed);
        // A segment has room for three of these.
        for number in 0..3 {
            node.append(1, number * 32, 32, RecordKind::Write);
        }
        node.flush();
        for number in 3..5 {
            node.append(1, number * 32, 32, RecordKind::Write);
        }
        // The segment's header and the first batch's.
        node.world.disks[0].crash_without(|sector| sector < 2 * PAGE_SECTORS);
        node.reopen();
        assert_eq!(node.state().last.seq, Seq(3));
        let cut = node.ask(Command::Truncate { key: key(), keep: Seq(1) });
        assert!(matches!(cut, Ok(ReplyBody::Truncated { .. })), "{cut:?}");
        node.log.truncate(1);
        node.seal(2);
        node.append(2, 7, 1, RecordKind::Write);
        node.flush();
        node.reopen();
        let info = node.world.store.replica(key()).expect("it is there");
        assert!(!info.damaged, "{info:?}");
        assert_eq!(info.state.last, node.last());
        node.check("after another log was there");
    }
}

/// Nothing is known of the log that a crash left a batch of. When that is found later, since the segment's new
/// beginning has landed in part, it is not taken for the beginning of the log that there is.
#[test]
fn what_a_crash_left_of_a_whole_log_is_not_found_later() {
    const BLOCKS: u64 = 248;
    for seed in 1..=8 {
        let mut node = calm_node(BlockSize::B512, seed);
        // Three fill a segment. Nothing is flushed, and all that lands is the last batch, in the second segment.
        for number in 0..5 {
            node.append(1, number % 4 * BLOCKS, BLOCKS, RecordKind::Write);
        }
        let batch = PAGE_SECTORS + BLOCKS as usize;
        let before = 2 * PAGE_SECTORS + 4 * batch;
        node.world.disks[0].crash_without(|sector| sector < before);
        node.reopen();
        assert_eq!(node.state().last.seq, Seq(0));
        node.log.clear();
        for number in 0..3 {
            node.append(1, number * BLOCKS, BLOCKS, RecordKind::Write);
            node.flush();
        }
        node.append(1, 0, BLOCKS, RecordKind::Write);
        // Of the segment's header nothing has landed, and of the batch's only a part.
        node.world.disks[0]
            .crash_without(|sector| sector <= PAGE_SECTORS + 1 && sector != PAGE_SECTORS);
        node.reopen();
        node.log.truncate(3);
        let info = node.world.store.replica(key()).expect("it is there");
        assert!(!info.damaged, "{info:?}");
        assert_eq!(info.state.last, node.last());
        node.check("with another log's batch behind it");
    }
}
