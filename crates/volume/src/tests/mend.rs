//! Blocks that one member cannot read are written again with another's copy, and nothing newer is lost.

use base::{BlockCount, CommandBody, Lba, Seq, StateMessage};

use super::bench::{Bench, server};
use crate::{Input, Output};

fn mended(bench: &Bench) -> Vec<(u64, u32)> {
    let of = |news: &Output| match news {
        Output::Mended { server: who, lba, blocks } => {
            assert_eq!(*who, server(0));
            Some((lba.0, blocks.0))
        }
        _ => None,
    };
    bench.news.iter().filter_map(of).collect()
}

/// Block 9 has the value 4, in record 2, which the local member cannot read.
fn damaged() -> Bench {
    let mut bench = Bench::opened(3);
    bench.write_ok(9, 4);
    bench.models[0].damaged.insert(Seq(2));
    bench
}

#[test]
fn what_a_read_finds_damaged_is_written_again() {
    let mut bench = damaged();
    let read = bench.read(9);
    assert_eq!(bench.value(read), Some(4), "from another member");
    bench.pass(300);
    assert_eq!(mended(&bench), [(9, 1)]);
    assert_eq!(bench.head.status().mended_blocks, 1);
    let last = *bench.models[0].log.last().unwrap();
    assert_eq!((last.header.lba, last.value), (Lba(9), 4));
    // Now the others cannot read it.
    for member in [1, 2] {
        bench.models[member].damaged.insert(last.header.position.seq);
    }
    let read = bench.read(9);
    assert_eq!(bench.value(read), Some(4));
}

#[test]
fn what_a_scrub_finds_is_written_again_a_piece_at_a_time() {
    let mut bench = damaged();
    let message = StateMessage::DamagedBlocks { lba: Lba(512), blocks: BlockCount(300) };
    bench.input(Input::State { server: server(0), message });
    bench.settle();
    assert_eq!(mended(&bench), [(512, 256)]);
    bench.input(Input::Tick);
    assert_eq!(mended(&bench).len(), 1, "not at once");
    bench.pass(300);
    assert_eq!(mended(&bench), [(512, 256), (768, 44)]);
    // Said again, though it was cured a moment ago: writing does not help, and is not repeated.
    bench.input(Input::State { server: server(0), message });
    bench.pass(5_000);
    assert_eq!(mended(&bench).len(), 2);
    // What is not inside the volume is nobody's damage.
    for (lba, blocks) in [(u64::MAX, 1), (1 << 20, 8), (0, 0)] {
        let message = StateMessage::DamagedBlocks { lba: Lba(lba), blocks: BlockCount(blocks) };
        bench.input(Input::State { server: server(0), message });
    }
    bench.pass(1_000);
    assert_eq!(mended(&bench).len(), 2);
}

#[test]
fn a_write_that_comes_between_is_never_overwritten() {
    let mut bench = damaged();
    // The copy is on its way from member 1 or 2, and the guest writes.
    bench.held = vec![false, true, true];
    let message = StateMessage::DamagedBlocks { lba: Lba(9), blocks: BlockCount(1) };
    bench.input(Input::State { server: server(0), message });
    let asked = |bench: &Bench| {
        let reads = |wire: &std::collections::VecDeque<super::bench::Sent>| {
            wire.iter().any(|(_, command)| matches!(command.body, CommandBody::Read { .. }))
        };
        bench.wires.iter().any(reads)
    };
    assert!(asked(&bench), "a copy was asked for");
    let write = bench.write(9, 5);
    bench.held.fill(false);
    bench.pass(2_000);
    assert_eq!(bench.status(write), Some(base::Status::Ok));
    for member in 0..3 {
        let last = bench.models[member].log.iter().rfind(|entry| entry.header.lba == Lba(9));
        assert_eq!(last.unwrap().value, 5, "member {member}");
    }
}

#[test]
fn the_next_copy_is_asked_for_if_the_first_is_damaged_too() {
    let mut bench = damaged();
    bench.models[1].damaged.insert(Seq(2));
    let read = bench.read(9);
    assert_eq!(bench.value(read), Some(4));
    bench.pass(2_000);
    assert!(mended_at_all(&bench));
    for member in [0, 1] {
        assert_eq!(bench.models[member].log.last().unwrap().value, 4);
    }
}

fn mended_at_all(bench: &Bench) -> bool {
    bench.news.iter().any(|news| matches!(news, Output::Mended { .. }))
}

#[test]
fn what_nobody_can_read_is_not_written() {
    let mut bench = damaged();
    bench.models[1].damaged.insert(Seq(2));
    bench.models[2].damaged.insert(Seq(2));
    let before = bench.models[0].last();
    let read = bench.read(9);
    assert_eq!(bench.status(read), Some(base::Status::IoError));
    bench.pass(5_000);
    assert!(!mended_at_all(&bench));
    assert_eq!(bench.models[0].last(), before);
}

#[test]
fn a_copy_that_is_lost_with_its_member_is_asked_of_another() {
    let mut bench = damaged();
    bench.held = vec![false, true, true];
    let message = StateMessage::DamagedBlocks { lba: Lba(9), blocks: BlockCount(1) };
    bench.input(Input::State { server: server(0), message });
    // Whoever was asked goes away with the question.
    let asked = (1..3).find(|member| !bench.wires[*member].is_empty()).unwrap();
    bench.down(asked);
    bench.held.fill(false);
    bench.pass(2_000);
    assert_eq!(mended(&bench), [(9, 1)]);
}
