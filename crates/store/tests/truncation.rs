//! A log that is being cut back, as others see it meanwhile.

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
