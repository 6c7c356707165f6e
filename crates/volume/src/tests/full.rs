//! Members whose logs are full or that put nothing on media, and heads out of buffers.

use base::{BufferPool, Operation, ReplicaError, Seq, Status};

use super::bench::Bench;
use crate::{HeadPhase, Input, MemberMode, StallReason};

#[test]
fn what_is_not_on_media_is_kept_whatever_the_backlog_and_more_of_it_waits() {
    let mut bench = Bench::with(1, |config| config.tunables.backlog_records_max = 8);
    bench.up([0]);
    bench.flushes_hang = true;
    let writes: Vec<_> = (1..=30).map(|value| bench.write(value, value)).collect();
    let acknowledged = writes.iter().filter(|write| bench.status(**write).is_some()).count();
    assert_eq!(acknowledged, 9, "more than the backlog holds is not begun");
    bench.pass(2000);
    let stall = bench.head.status().stall.unwrap();
    assert_eq!(stall.reason, StallReason::NotOnMedia { seq: Seq(2) });
    // It had said that all this is written, and it was.
    bench.down(0);
    bench.models[0].crash(Seq(1));
    bench.flushes_hang = false;
    bench.up([0]);
    bench.pass(1000);
    assert_eq!(bench.head.status().stall, None);
    for value in 1..=30 {
        let read = bench.read(value);
        assert_eq!(bench.value(read), Some(value));
    }
}

/// Nothing of the old epoch is settled before the new one begins, unless all members' logs are the same as
/// far as they go: else a member that is full of it never takes the rest.
#[test]
fn an_opening_settles_what_fills_a_members_log() {
    for members in [2, 3] {
        let mut bench = Bench::opened(members);
        bench.room[1] = 6;
        // The last member is away for a while.
        bench.held[2..].fill(true);
        for value in 1..=20 {
            bench.write(value, value);
        }
        assert_eq!((bench.models[0].log.len(), bench.models[1].log.len()), (21, 7));
        bench.held.fill(false);
        bench.room.fill(6);
        bench.next_head();
        bench.up([0, 1]);
        bench.pass(3000);
        if members == 3 {
            assert_eq!(bench.head.status().phase, HeadPhase::Reconciling, "nobody knows of it");
            assert_eq!(bench.models[1].commit, Seq(1));
            bench.up([2]);
            bench.pass(3000);
        }
        assert_eq!(bench.head.status().phase, HeadPhase::Serving);
        let write = bench.write(1, 100);
        bench.pass(1000);
        assert_eq!(bench.status(write), Some(Status::Ok));
        for value in 2..=7 {
            let read = bench.read(value);
            assert_eq!(bench.value(read), Some(value));
        }
    }
}

/// What was sent to a full log is never answered, and only an opening makes room: it must not wait for that.
#[test]
fn a_full_member_is_sealed_again_though_it_answers_nothing() {
    let mut bench = Bench::opened(3);
    bench.room[0] = 6;
    bench.held[1] = true;
    for value in 1..=20 {
        bench.write(value, value);
    }
    assert_eq!((bench.models[0].log.len(), bench.models[2].log.len()), (7, 21));
    bench.room.fill(6);
    bench.next_head();
    bench.held.fill(false);
    bench.up([0, 2]);
    assert_eq!(bench.mode(0), MemberMode::Live, "with appends that wait for room");
    let (waiting, _) = bench.wires[0][0];
    // Nobody else has the whole tail: the opening begins anew.
    bench.down(2);
    bench.pass(10);
    bench.up([1, 2]);
    bench.pass(3000);
    assert_eq!(bench.head.status().phase, HeadPhase::Serving);
    assert!((0..3).all(|member| bench.mode(member) == MemberMode::Live));
    for value in 1..=20 {
        let read = bench.read(value);
        assert_eq!(bench.value(read), Some(value));
    }
    bench.answer(0, waiting, Err(ReplicaError::NoSpace));
    assert_eq!(bench.mode(0), MemberMode::Live, "what it was sent before means nothing any more");
    let logs = [0, 1, 2].map(|member| &bench.models[member].log);
    assert!(logs[0] == logs[1] && logs[1] == logs[2]);
}

/// Reads whose buffers are gone need new ones, and those behind them may have all there are.
#[test]
fn what_an_ended_head_still_holds_does_not_wait_for_itself() {
    let own = BufferPool::heap(1, 0);
    let mut bench = Bench::with(3, |config| config.buffers = own.clone());
    bench.up(0..3);
    bench.ask(0, 0, Operation::Flush);
    assert_eq!(own.available(), (1, 0), "nothing is kept of the opening");
    bench.room[1..].fill(0);
    let write = bench.write(7, 5);
    // The second of two reads loses its buffer with a session, and gets the head's only one.
    bench.held[0] = true;
    let (first, second) = (bench.read(200), bench.read(7));
    bench.deliver(0);
    assert_eq!(bench.value(first), Some(0));
    bench.down(0);
    bench.held[0] = false;
    bench.up([0]);
    assert_eq!(own.available(), (0, 0), "what it read shows an undecided write: it is kept");
    // One that came later is in the first one's place, and its buffer is with a member.
    bench.held[0] = true;
    let third = bench.read(9);
    bench.input(Input::Abandon);
    let returned = |bench: &Bench| bench.returned.iter().map(|r| r.id.0).collect::<Vec<_>>();
    (0..3).for_each(|index| bench.down(index));
    bench.pass(100);
    assert_eq!(returned(&bench), [write, second]);
    bench.returned.clear();
    bench.pass(100);
    assert_eq!((returned(&bench), bench.head.unanswered()), (vec![third], 0));
}
