//! Chosen situations, one at a time, without delays.

use base::{
    BufferPool, CommandBody, Epoch, Instant, Operation, Position, ReplicaCommand, ReplicaError,
    ReplyBody, RequestId, Role, Seq, ServerId, Status, VolumeId,
};

use super::bench::{Bench, config, server};
use super::model::{BLOCK_BYTES, values_of};
use crate::{
    Head, HeadConfig, HeadError, HeadPhase, Input, MemberMode, Output, StallReason, Tunables,
};

#[test]
fn a_volume_of_one_to_five_members_serves_and_is_released() {
    for members in [1, 2, 3, 5] {
        let mut bench = Bench::opened(members);
        let write = bench.write(3, 77);
        assert_eq!(bench.status(write), Some(Status::Ok));
        let flush = bench.ask(0, 0, Operation::Flush);
        assert_eq!(bench.status(flush), Some(Status::Ok));
        let on_media = bench.models.iter().filter(|model| model.durable >= Seq(2)).count();
        assert!(on_media >= base::membership::write_quorum(members));
        let zero = bench.ask(3, 1, Operation::WriteZeroes { fua: true });
        let read = bench.read(3);
        assert_eq!((bench.status(zero), bench.value(read)), (Some(Status::Ok), Some(0)));
        bench.input(Input::Release);
        bench.settle();
        assert!(matches!(bench.news.last(), Some(Output::Released)));
        assert_eq!(bench.head.unanswered(), 0);
    }
}

/// What a member was asked to give back while nobody used the volume is not what it is asked at the end.
#[test]
fn a_release_waits_for_a_member_that_is_still_being_written_to() {
    let mut bench = Bench::opened(3);
    bench.input(Input::Rest);
    bench.settle();
    bench.held[1] = true;
    bench.write(3, 77);
    let flush = bench.ask(0, 0, Operation::Flush);
    assert_eq!(bench.status(flush), Some(Status::Ok));
    let last = bench.models[0].last();
    let released = |bench: &Bench| bench.news.iter().any(|news| matches!(news, Output::Released));
    bench.input(Input::Release);
    bench.settle();
    assert!(!released(&bench), "member 1 lacks the newest write, and is on its way");
    bench.held[1] = false;
    bench.settle();
    assert!(released(&bench));
    let ends = bench.models.iter().map(|model| (model.last(), model.commit));
    assert_eq!(ends.collect::<Vec<_>>(), vec![(last, last.seq); 3]);
}

/// Members that do not answer do not keep a guest's lease for long: one of three for a moment, two as long as what
/// they have granted lasts.
#[test]
fn a_release_does_not_wait_for_ever() {
    let tunables = Tunables::default();
    for (silent, wait) in [(1, tunables.release_grace), (2, tunables.release_wait)] {
        let mut bench = Bench::opened(3);
        bench.held[1] = true;
        bench.write(3, 77);
        bench.held[2] = silent == 2;
        bench.input(Input::Release);
        bench.settle();
        let millis = u64::try_from(wait.as_millis()).unwrap();
        bench.pass(millis - 1);
        assert_eq!(bench.head.status().phase, HeadPhase::Releasing, "{silent} are silent");
        bench.pass(1);
        assert_eq!(bench.head.status().phase, HeadPhase::Released, "{silent} are silent");
    }
}

#[test]
fn without_a_quorum_io_waits_and_says_why() {
    let mut bench = Bench::opened(3);
    bench.down(1);
    bench.down(2);
    let write = bench.write(0, 1);
    bench.pass(5000);
    assert_eq!(bench.status(write), None);
    let stall = bench.head.status().stall.unwrap();
    let reason = StallReason::Members { usable: 1, needed: 2, of: 3 };
    assert_eq!((stall.reason, stall.since), (reason, Instant::ZERO));
    let text = bench.head.status().to_string();
    assert!(text.contains("1 of 3 members usable, 2 needed; server 02020202-"), "{text}");
    assert!(bench.news.iter().any(|news| matches!(news, Output::Stalled { .. })));
    bench.up([2]);
    assert_eq!(bench.status(write), Some(Status::Ok));
    assert!(matches!(bench.news.last(), Some(Output::Resumed)));
}

#[test]
fn a_read_that_shows_an_undecided_write_is_held_until_it_is_decided() {
    let mut bench = Bench::opened(3);
    bench.held = vec![false, true, true];
    let write = bench.write(7, 5);
    let read = bench.read(7);
    let other = bench.read(200);
    assert_eq!((bench.status(write), bench.value(read)), (None, None));
    assert_eq!(bench.value(other), Some(0));
    bench.held = vec![false, false, true];
    bench.settle();
    assert_eq!((bench.status(write), bench.value(read)), (Some(Status::Ok), Some(5)));
}

#[test]
fn damage_is_looked_up_elsewhere_and_waited_for_never_dropped() {
    let mut bench = Bench::opened(3);
    bench.held[2] = true;
    for value in 1..=6 {
        bench.write(value, value);
    }
    bench.next_head();
    // Only member 0, whose record 4 is rotten, and member 2, which lacks it, are there.
    bench.held[2] = false;
    bench.models[0].damaged.insert(Seq(4));
    bench.up([0, 2]);
    bench.pass(3000);
    let stall = bench.head.status().stall.unwrap();
    assert_eq!(stall.reason, StallReason::Damaged { seq: Seq(4) });
    assert_eq!(bench.models[0].last(), Position::new(Epoch(1), Seq(7)));
    bench.up([1]);
    bench.pass(1000);
    assert_eq!(bench.head.status().phase, HeadPhase::Serving);
    assert_eq!(bench.mode(2), MemberMode::Live);
    let read = bench.read(3);
    assert_eq!(bench.value(read), Some(3));
}

#[test]
fn a_read_damaged_everywhere_is_an_error_and_nowhere_else() {
    let mut bench = Bench::opened(3);
    bench.write(9, 4);
    bench.models[0].damaged.insert(Seq(2));
    bench.models[1].damaged.insert(Seq(2));
    let read = bench.read(9);
    assert_eq!(bench.value(read), Some(4));
    bench.down(2);
    let read = bench.read(9);
    bench.pass(1000);
    assert_eq!(bench.status(read), None, "the third member may have it");
    bench.models[2].damaged.insert(Seq(2));
    bench.up([2]);
    assert_eq!(bench.status(read), Some(Status::IoError));
}

#[test]
fn a_member_behind_the_trimmed_log_is_left_out_visibly() {
    let mut bench = Bench::opened(3);
    bench.down(2);
    for value in 1..=40 {
        bench.write(value, value);
    }
    bench.pass(1000);
    assert_eq!(bench.models[0].commit, Seq(41), "commit news reaches idle members");
    for index in 0..2 {
        bench.models[index].trimmed = Seq(41);
    }
    bench.up([2]);
    bench.pass(100);
    assert_eq!(bench.mode(2), MemberMode::TooFarBehind);
    let write = bench.write(1, 100);
    assert_eq!(bench.status(write), Some(Status::Ok));
}

#[test]
fn a_slow_member_goes_from_memory_to_the_log_and_back() {
    let mut bench = Bench::with(3, |config| {
        config.tunables.backlog_records_max = 20;
        config.tunables.member_records_max = 10;
    });
    bench.up(0..3);
    bench.held[2] = true;
    for value in 1..=100 {
        let write = bench.write(value, value);
        assert_eq!(bench.status(write), Some(Status::Ok));
    }
    assert_eq!(bench.mode(2), MemberMode::CatchingUp);
    assert!(bench.wires[2].len() <= 11, "what a member is sent is bounded");
    bench.held[2] = false;
    bench.settle();
    bench.pass(500);
    assert_eq!(bench.mode(2), MemberMode::Live);
    assert_eq!(bench.models[2].log, bench.models[0].log);
}

/// A head whose last member gets nothing, and is behind what is in memory.
fn left_behind(log_copy_records: u64) -> Bench {
    let mut bench = Bench::with(3, |config| {
        config.tunables.backlog_records_max = 20;
        config.tunables.member_records_max = 10;
        config.tunables.log_copy_records = log_copy_records;
    });
    bench.up(0..3);
    bench.held[2] = true;
    for value in 1..=50 {
        bench.write_ok(value, value);
    }
    assert_eq!(bench.mode(2), MemberMode::CatchingUp);
    bench
}

#[test]
fn a_member_as_fast_as_guests_write_gets_there() {
    let mut bench = left_behind(1000);
    let mut written = 50;
    while bench.mode(2) != MemberMode::Live {
        written += 1;
        assert!(written < 100, "it is never there");
        bench.write_ok(written, written);
        bench.deliver(2);
    }
    bench.held[2] = false;
    bench.settle();
    bench.pass(500);
    assert_eq!(bench.models[2].log, bench.models[0].log);
}

#[test]
fn a_member_that_falls_back_is_brought_the_log_by_another() {
    let mut bench = left_behind(30);
    for value in 51..=110 {
        bench.write_ok(value, value);
    }
    let mut brought = false;
    for value in 111..=150 {
        bench.write_ok(value, value);
        if let Some((_, command)) = bench.wires[2].front() {
            brought |= matches!(command.body, CommandBody::Install { .. });
            bench.deliver(2);
        }
    }
    assert!(brought, "the head goes on alone");
    bench.held[2] = false;
    bench.settle();
    bench.pass(5000);
    assert_eq!(bench.mode(2), MemberMode::Live);
    assert_eq!(bench.models[2].log, bench.models[0].log);
}

#[test]
fn a_conflicting_tail_is_truncated_where_it_parts() {
    let mut bench = Bench::opened(3);
    bench.write(1, 1);
    bench.held = vec![false, true, true];
    for value in 2..=5 {
        bench.write(value, value);
    }
    assert_eq!(bench.models[0].last().seq, Seq(6));
    bench.next_head();
    bench.held = vec![false; 3];
    bench.up([1, 2]);
    bench.pass(100);
    let write = bench.write(2, 20);
    assert_eq!(bench.status(write), Some(Status::Ok));
    bench.up([0]);
    bench.pass(100);
    assert_eq!(bench.mode(0), MemberMode::Live);
    assert_eq!(bench.models[0].log, bench.models[1].log);
    let read = bench.read(3);
    assert_eq!(bench.value(read), Some(0), "the lost tail is not to be seen");
}

#[test]
fn a_shorter_tail_of_a_newer_epoch_wins_over_a_longer_one_of_an_older() {
    let mut bench = Bench::opened(3);
    bench.held = vec![false, true, true];
    for value in 1..=9 {
        bench.write(value, value);
    }
    bench.next_head();
    bench.held = vec![false; 3];
    bench.up([1, 2]);
    let write = bench.write(1, 50);
    assert_eq!(bench.status(write), Some(Status::Ok));
    assert!(bench.models[0].last().seq > bench.models[1].last().seq);
    bench.next_head();
    bench.up([0, 1]);
    bench.pass(100);
    let read = bench.read(1);
    assert_eq!(bench.value(read), Some(50));
}

#[test]
fn an_opening_whose_source_dies_goes_on_with_the_others() {
    let mut bench = Bench::opened(3);
    bench.held = vec![false, true, true];
    for value in 1..=9 {
        bench.write(value, value);
    }
    bench.next_head();
    bench.held = vec![false; 3];
    for index in [0, 1] {
        bench.input(Input::MemberUp { server: server(index) });
        bench.deliver(index);
    }
    assert_eq!(bench.head.status().phase, HeadPhase::Reconciling);
    bench.down(0);
    bench.up([2]);
    bench.pass(2000);
    assert_eq!(bench.head.status().phase, HeadPhase::Serving);
    let read = bench.read(1);
    assert_eq!(bench.value(read), Some(0));
}

#[test]
fn what_was_acknowledged_outlives_the_power_of_all_members_while_the_head_lives() {
    for members in [1, 3] {
        let mut bench = Bench::opened(members);
        for value in 1..=30 {
            let write = bench.write(value % 7, value);
            assert_eq!(bench.status(write), Some(Status::Ok));
        }
        for index in 0..members {
            bench.down(index);
            assert_eq!(bench.models[index].durable, Seq(1), "nothing was flushed yet");
            bench.models[index].crash(Seq(1));
        }
        bench.up(0..members);
        bench.pass(1000);
        for value in 24..=30 {
            let read = bench.read(value % 7);
            assert_eq!(bench.value(read), Some(value));
        }
        assert_eq!(bench.models[0].durable, Seq(31), "it is settled after a while");
    }
}

#[test]
fn a_better_tail_that_comes_late_is_taken_as_long_as_nothing_was_begun() {
    let mut bench = Bench::opened(2);
    let write = bench.write(1, 1);
    assert_eq!(bench.status(write), Some(Status::Ok));
    bench.models[1].crash(Seq(1));
    bench.next_head();
    bench.up([1]);
    bench.pass(100);
    assert_eq!(bench.head.status().phase, HeadPhase::Reconciling);
    bench.up([0]);
    bench.pass(100);
    let read = bench.read(1);
    assert_eq!(bench.value(read), Some(1));
}

#[test]
fn writes_that_hold_every_buffer_do_not_keep_a_member_from_catching_up() {
    let mut bench = Bench::with(3, |config| {
        config.tunables.backlog_records_max = 10;
        config.buffers = BufferPool::heap(1, 0);
    });
    let mut own = BufferPool::heap(200, 0);
    core::mem::swap(&mut own, &mut bench.buffers);
    bench.up(0..3);
    bench.down(2);
    for value in 1..=100 {
        bench.write(value, value);
    }
    bench.down(1);
    let write = bench.write(1, 1000);
    assert_eq!(bench.status(write), None);
    bench.up([2]);
    bench.pass(3000);
    assert_eq!(bench.status(write), Some(Status::Ok));
    assert_eq!(bench.models[2].log, bench.models[0].log);
}

#[test]
fn past_the_stall_deadline_requests_fail_and_late_writes_keep_their_order() {
    let mut bench = Bench::with(3, |config| config.volume.policy.stall_deadline_ms = Some(500));
    bench.up(0..3);
    bench.down(1);
    bench.down(2);
    let first = bench.write(1, 10);
    let flush = bench.ask(0, 0, Operation::Flush);
    assert_eq!(bench.status(flush), Some(Status::Ok), "nothing was acknowledged before it");
    bench.pass(700);
    assert_eq!(bench.status(first), Some(Status::IoError));
    let second = bench.write(1, 11);
    bench.pass(100);
    assert_eq!(bench.status(second), None);
    bench.up([1]);
    assert_eq!(bench.status(second), Some(Status::Ok));
    let read = bench.read(1);
    assert_eq!(bench.value(read), Some(11));
}

#[test]
fn a_superseded_head_gives_every_request_back_whole() {
    let mut bench = Bench::opened(3);
    bench.held = vec![true; 3];
    let write = bench.write(1, 42);
    let read = bench.read(2);
    let flush = bench.ask(0, 0, Operation::Flush);
    let zero = bench.ask(5, 9, Operation::WriteZeroes { fua: true });
    bench.status(flush);
    let (tag, _) = bench.wires[1].pop_front().unwrap();
    bench.answer(1, tag, Err(ReplicaError::Superseded { sealed: Epoch(2) }));
    assert!(matches!(bench.news.last(), Some(Output::Superseded { sealed: Epoch(2) })));
    assert_eq!(bench.head.unanswered(), 0);
    let mut ids: Vec<u64> = bench.returned.iter().map(|request| request.id.0).collect();
    ids.sort_unstable();
    assert_eq!(ids, [write, read, zero]);
    let request = bench.returned.iter().find(|request| request.id.0 == write).unwrap();
    let Operation::Write { buffer, fua: false } = &request.operation else { panic!() };
    assert_eq!(values_of(&buffer.payload()[..BLOCK_BYTES]), [42]);
    bench.read(1);
    assert_eq!(bench.returned.len(), 4, "what comes later goes back at once");
}

#[test]
fn an_older_epoch_is_refused_by_a_member_that_sealed_a_higher_one() {
    let mut bench = Bench::new(3);
    bench.models[1].sealed = Epoch(8);
    bench.up(0..3);
    assert!(matches!(bench.news[..], [Output::Superseded { sealed: Epoch(8) }]));
}

#[test]
fn what_is_not_valid_is_refused() {
    let mut bench = Bench::with(1, |config| config.volume.policy.read_only = true);
    bench.up([0]);
    let write = bench.write(0, 1);
    assert_eq!(bench.status(write), Some(Status::ReadOnly));
    let zero = bench.ask(0, 1, Operation::Discard);
    assert_eq!(bench.status(zero), Some(Status::ReadOnly));
    let read = bench.read(0);
    assert_eq!(bench.value(read), Some(0));
    let ranges = [(2048, 1), (2047, 2), (0, 0), (u64::MAX, 1), (0, 257), (0, 9)];
    for (lba, blocks) in ranges {
        let buffer = bench.buffers.take(BLOCK_BYTES).unwrap();
        let read = bench.ask(lba, blocks, Operation::Read { buffer });
        assert_eq!(bench.status(read), Some(Status::InvalidRange), "{lba}+{blocks}");
    }
    let large = bench.ask(0, base::limits::RANGE_BLOCKS_MAX + 1, Operation::Discard);
    assert_eq!(bench.status(large), Some(Status::InvalidRange));
}

#[test]
fn requests_beyond_the_limits_come_back() {
    let mut bench = Bench::new(1);
    let room = bench.head.room();
    assert_eq!(room, base::limits::HEAD_REQUESTS_MAX);
    for _ in 0..room {
        bench.ask(0, 0, Operation::Flush);
    }
    assert_eq!((bench.head.room(), bench.returned.len()), (0, 0));
    let last = bench.ask(0, 0, Operation::Flush);
    assert_eq!(bench.returned.pop().unwrap().id, RequestId(last));
    bench.up([0]);
    assert_eq!(bench.replies.len(), room);
}

#[test]
fn a_member_that_was_sent_nonsense_or_answers_it_does_not_hurt_the_head() {
    let mut bench = Bench::opened(3);
    bench.held[2] = true;
    bench.write(0, 1);
    let (tag, _) = bench.wires[2].pop_front().unwrap();
    for tag in [tag ^ 1 << 62, tag ^ 1 << 45, tag + 100, 0, u64::MAX] {
        for result in [
            Ok(ReplyBody::Done),
            Ok(ReplyBody::Appended { durable: Seq(u64::MAX) }),
            Ok(ReplyBody::Flushed { durable: Seq(0) }),
            Err(ReplicaError::Behind { last: Position::ZERO }),
        ] {
            bench.answer(2, tag, result);
        }
    }
    bench.input(Input::MemberUp { server: ServerId::from_bytes([99; 16]) });
    bench.down(2);
    bench.held[2] = false;
    bench.up([2]);
    bench.pass(100);
    assert_eq!(bench.mode(2), MemberMode::Live);
    assert_eq!(bench.models[2].log, bench.models[0].log);
}

#[test]
fn a_head_is_refused_what_it_cannot_serve() {
    let buffers = BufferPool::heap(1, 0);
    type Change = fn(&mut HeadConfig);
    let cases: [(Change, HeadError); 6] = [
        (|c| c.shard.volume = VolumeId::from_bytes([6; 16]), HeadError::WrongShard),
        (|c| c.epoch = Epoch(2), HeadError::WrongEpoch { given: Epoch(2), recorded: Epoch(1) }),
        (
            |c| c.shard.members.iter_mut().for_each(|m| m.role = Role::CatchingUp),
            HeadError::NoInSyncMember,
        ),
        (|c| c.shard.members[1].server = server(0), HeadError::DuplicateServer(server(0))),
        (|c| c.volume.size_bytes = 513, HeadError::Size(513)),
        (|c| c.tunables.catch_up_depth = 0, HeadError::Tunable("catch_up_depth")),
    ];
    for (change, error) in cases {
        let mut config = config(3, 1, &buffers);
        change(&mut config);
        assert_eq!(Head::new(config, Instant::ZERO).unwrap_err(), error);
    }
}

#[test]
fn a_member_that_catches_up_by_role_does_not_count() {
    let mut bench = Bench::with(3, |config| {
        config.shard.members[1].role = Role::CatchingUp;
    });
    bench.up(0..3);
    bench.held[2] = true;
    let write = bench.write(0, 1);
    assert_eq!(bench.status(write), None, "two of the two in-sync members are needed");
    assert_eq!(bench.models[1].last().seq, Seq(2));
    bench.held[2] = false;
    bench.settle();
    assert_eq!(bench.status(write), Some(Status::Ok));
    let sent = |command: &ReplicaCommand| matches!(command.body, CommandBody::Read { .. });
    assert!(bench.wires.iter().flatten().all(|(_, command)| !sent(command)));
}
