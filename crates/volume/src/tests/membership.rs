//! Changes of members in chosen situations: who may enter and leave, what counts meanwhile, and what
//! becomes of a change when its head dies.

use base::{Epoch, FillPhase, Role, Seq, Status};

use super::bench::{Bench, server};
use crate::{FailStop, HeadPhase, MemberMode, MembershipError, Output, StallReason};

use Role::{CatchingUp, InSync, Leaving, Provisioning};

const ABC: [(usize, Role); 3] = [(0, InSync), (1, InSync), (2, InSync)];
const AB: [(usize, Role); 3] = [(0, InSync), (1, InSync), (2, CatchingUp)];

#[test]
fn while_a_change_is_open_both_sets_count() {
    let mut bench = Bench::opened(3);
    assert_eq!(bench.change(&AB), Ok(()));
    assert!(bench.head.status().change_open);
    bench.held[1] = true;
    let write = bench.write(1, 1);
    assert_eq!(bench.status(write), None, "two of three have it, one of two has");
    let stall = bench.head.status().stall;
    assert_eq!(stall, None);
    bench.held[1] = false;
    bench.settle();
    assert_eq!(bench.status(write), Some(Status::Ok));
    bench.changed(&AB);
    assert!(!bench.head.status().change_open);
    bench.held[2] = true;
    bench.write_ok(2, 2);
    bench.held = vec![false, true, false];
    let write = bench.write(3, 3);
    assert_eq!(bench.status(write), None, "the member that left does not count");
    bench.held[1] = false;
    bench.settle();
    assert_eq!(bench.status(write), Some(Status::Ok));
}

#[test]
fn a_change_that_did_not_come_true_ends_with_the_old_set() {
    let mut bench = Bench::opened(3);
    assert_eq!(bench.change(&AB), Ok(()));
    bench.changed(&ABC);
    assert!(!bench.head.status().change_open);
    bench.held[1] = true;
    bench.write_ok(1, 1);
}

#[test]
fn flushes_need_media_in_both_sets() {
    let mut bench = Bench::opened(3);
    bench.write_ok(1, 1);
    assert_eq!(bench.change(&AB), Ok(()));
    bench.held[1] = true;
    let flush = bench.ask(0, 0, base::Operation::Flush);
    assert_eq!(bench.models[2].durable, Seq(2));
    assert_eq!(bench.status(flush), None, "one of the new set's two has it on media");
    bench.held[1] = false;
    bench.settle();
    assert_eq!(bench.status(flush), Some(Status::Ok));
}

#[test]
fn what_is_no_step_is_refused_with_the_way_out() {
    let mut bench = Bench::with_spares(3, 2);
    let cases: [(&[(usize, Role)], MembershipError); 6] = [
        (&[(0, InSync), (1, CatchingUp), (2, CatchingUp)], MembershipError::TooMany(2)),
        (&[(0, InSync)], MembershipError::TooMany(2)),
        (&[(0, CatchingUp), (1, CatchingUp)], MembershipError::LastCopy),
        (
            &[(0, InSync), (1, InSync), (2, InSync), (3, InSync)],
            MembershipError::Unknown(server(3)),
        ),
        (&[(0, InSync), (0, InSync), (2, InSync)], MembershipError::DuplicateServer(server(0))),
        (
            &[0, 1, 2, 3, 4, 5, 6, 7].map(|index| (index, InSync)),
            MembershipError::TooManyMembers(8),
        ),
    ];
    for (roles, error) in cases {
        assert_eq!(bench.change(roles), Err(error));
        assert!(!bench.head.status().change_open);
    }
    assert_eq!(bench.change(&AB), Ok(()));
    assert_eq!(bench.change(&AB), Ok(()), "asked again, it is the same change");
    let other = [(0, InSync), (1, CatchingUp), (2, InSync)];
    assert_eq!(bench.change(&other), Err(MembershipError::ChangeOpen));
    assert_eq!(bench.change(&ABC), Err(MembershipError::ChangeOpen));
    let mut foreign = bench.record(&ABC);
    foreign.volume = base::VolumeId::from_bytes([77; 16]);
    let refused = bench.head.change_members(bench.now, &foreign);
    assert_eq!(refused, Err(MembershipError::WrongShard));
    bench.input(crate::Input::Release);
    bench.changed(&ABC);
    bench.settle();
    assert_eq!(bench.head.status().phase, HeadPhase::Released);
    assert_eq!(bench.change(&AB), Err(MembershipError::Ending));
    let fresh = Bench::new(3).change(&AB);
    assert_eq!(fresh, Err(MembershipError::NotOpen));
}

#[test]
fn members_that_lack_something_do_not_enter() {
    let mut bench = Bench::with_spares(2, 1);
    let with = |role| [(0, InSync), (1, InSync), (2, role)];
    bench.changed(&with(CatchingUp));
    assert_eq!(bench.change(&with(InSync)), Err(MembershipError::NotCaughtUp(server(2))));
    bench.up([2]);
    bench.write_ok(0, 1);
    bench.held[2] = true;
    bench.write_ok(0, 2);
    assert!(!bench.member(2).caught_up);
    assert_eq!(bench.change(&with(InSync)), Err(MembershipError::NotCaughtUp(server(2))));
    bench.held[2] = false;
    bench.settle();
    assert!(bench.member(2).caught_up);
    bench.agree(&with(InSync));
    bench.changed(&with(InSync));
    bench.held[1] = true;
    bench.write_ok(0, 3);
}

#[test]
fn what_is_settled_is_on_media_at_a_member_before_it_enters() {
    let mut bench = Bench::with_spares(1, 1);
    bench.write_ok(0, 1);
    let flush = bench.ask(0, 0, base::Operation::Flush);
    assert_eq!(bench.status(flush), Some(Status::Ok));
    bench.changed(&[(0, InSync), (1, CatchingUp)]);
    bench.up([1]);
    assert_eq!((bench.models[1].written, bench.models[1].durable), (Seq(2), Seq(0)));
    let both = [(0, InSync), (1, InSync)];
    assert_eq!(bench.change(&both), Err(MembershipError::NotSettled));
    bench.settle();
    assert_eq!(bench.models[1].durable, Seq(2), "being refused, it sees to it");
    assert_eq!(bench.change(&both), Ok(()));
}

#[test]
fn two_dead_members_of_five_leave_one_by_one() {
    let mut bench = Bench::with_spares(5, 2);
    bench.down(3);
    bench.down(4);
    bench.write_ok(1, 1);
    let abcd = [(0, InSync), (1, InSync), (2, InSync), (3, InSync)];
    assert_eq!(bench.change(&abcd), Ok(()));
    bench.write_ok(1, 2);
    bench.changed(&abcd);
    bench.write_ok(1, 3);
    assert_eq!(bench.change(&ABC), Ok(()));
    bench.changed(&ABC);
    bench.held[2] = true;
    bench.write_ok(1, 4);
    bench.held[2] = false;
    bench.settle();
    let mut roles = ABC.to_vec();
    for spare in [5, 6] {
        roles.push((spare, Provisioning));
        bench.changed(&roles);
        assert_eq!(bench.head.status().members.len(), spare - 2, "it is not served yet");
        roles.last_mut().unwrap().1 = CatchingUp;
        bench.changed(&roles);
        bench.up([spare]);
        bench.pass(500);
        roles.last_mut().unwrap().1 = InSync;
        bench.agree(&roles);
        bench.changed(&roles);
    }
    bench.down(0);
    bench.down(1);
    bench.write_ok(1, 5);
    let read = bench.read(1);
    assert_eq!(bench.value(read), Some(5));
}

#[test]
fn removal_that_would_leave_no_quorum_is_refused() {
    let mut bench = Bench::opened(3);
    bench.down(1);
    let without_c = [(0, InSync), (1, InSync)];
    let error = MembershipError::NoQuorum { have: 1, needed: 2, of: 2 };
    assert_eq!(bench.change(&without_c), Err(error));
    assert_eq!(bench.change(&[(0, InSync), (1, CatchingUp), (2, InSync)]), Ok(()));
}

#[test]
fn two_replicas_that_lose_one_go_on_with_the_other() {
    let mut bench = Bench::opened(2);
    bench.write_ok(1, 1);
    bench.down(1);
    let write = bench.write(1, 2);
    bench.pass(500);
    assert_eq!(bench.status(write), None);
    let alone = [(0, InSync), (1, CatchingUp)];
    assert_eq!(bench.change(&alone), Ok(()));
    assert_eq!(bench.status(write), None, "not before the cluster store has said so");
    bench.changed(&alone);
    assert_eq!(bench.status(write), Some(Status::Ok));
    bench.up([1]);
    bench.pass(500);
    assert!(bench.member(1).caught_up);
    bench.agree(&[(0, InSync), (1, InSync)]);
    bench.changed(&[(0, InSync), (1, InSync)]);
    bench.held[1] = true;
    let write = bench.write(1, 3);
    assert_eq!(bench.status(write), None);
}

#[test]
fn an_opening_with_a_seal_quorum_only_may_shrink_the_set() {
    let mut bench = Bench::opened(2);
    bench.write_ok(1, 7);
    bench.next_head();
    let alone = [(0, InSync), (1, CatchingUp)];
    assert_eq!(bench.change(&alone), Err(MembershipError::NotOpen));
    bench.up([0]);
    bench.pass(200);
    assert_eq!(bench.head.status().phase, HeadPhase::Reconciling);
    let reason = StallReason::Members { usable: 1, needed: 2, of: 2 };
    assert_eq!(bench.head.status().stall.unwrap().reason, reason);
    let other = [(0, CatchingUp), (1, InSync)];
    assert_eq!(
        bench.change(&other),
        Err(MembershipError::NoQuorum { have: 0, needed: 1, of: 1 }),
        "the one that did not answer may be all there is of something"
    );
    assert_eq!(bench.change(&alone), Ok(()));
    bench.pass(200);
    assert_eq!(bench.head.status().phase, HeadPhase::Reconciling);
    bench.changed(&alone);
    assert_eq!(bench.head.status().phase, HeadPhase::Serving);
    let read = bench.read(1);
    assert_eq!(bench.value(read), Some(7));
    bench.write_ok(1, 8);
}

#[test]
fn a_change_whose_head_dies_is_what_the_cluster_store_says_it_is() {
    // Before the store was asked; after it changed, before the head knew; after the head knew.
    for step in 0..3 {
        let mut bench = Bench::opened(3);
        bench.write_ok(1, 1);
        bench.down(2);
        bench.write_ok(1, 2);
        let without_c = [(0, InSync), (1, InSync)];
        assert_eq!(bench.change(&without_c), Ok(()));
        bench.write_ok(1, 3);
        match step {
            0 => {}
            1 => bench.shard = bench.record(&without_c),
            _ => bench.changed(&without_c),
        }
        bench.next_head();
        // The next head hears the member that knows least, and as few others as it must.
        bench.up([2, 1]);
        bench.pass(500);
        let read = bench.read(1);
        if step == 0 {
            assert_eq!(bench.value(read), Some(3));
        } else {
            assert_eq!(bench.status(read), None, "one of two is no write quorum");
            assert_eq!(bench.head.status().members.len(), 2);
            bench.up([0]);
            bench.pass(100);
            assert_eq!(bench.value(read), Some(3));
        }
    }
}

#[test]
fn a_head_that_is_told_the_impossible_ends_itself() {
    let impossible: [&[(usize, Role)]; 3] = [
        &[(0, InSync), (1, InSync), (2, CatchingUp)],
        &[(0, InSync), (1, InSync), (2, InSync), (5, InSync)],
        &[(0, InSync)],
    ];
    for roles in impossible {
        let mut bench = Bench::opened(3);
        bench.held = vec![true; 3];
        let write = bench.write(1, 1);
        bench.changed(roles);
        let reason = FailStop::UnknownInSyncSet;
        assert!(matches!(bench.news.last(), Some(Output::Failed { reason: r }) if *r == reason));
        assert_eq!(bench.head.status().phase, HeadPhase::Failed { reason });
        assert_eq!(bench.returned.pop().unwrap().id.0, write);
    }
    let mut bench = Bench::opened(3);
    bench.changed(&[(0, Leaving)]);
    let reason = FailStop::InvalidRecord(MembershipError::LastCopy);
    assert!(matches!(bench.news.last(), Some(Output::Failed { reason: r }) if *r == reason));
}

#[test]
fn a_member_out_of_the_logs_reach_is_demoted_filled_and_promoted() {
    let mut bench = Bench::with_spares(3, 0);
    bench.down(2);
    for value in 1..=40 {
        bench.write_ok(value % 8, value);
    }
    bench.pass(1000);
    for index in 0..2 {
        bench.models[index].trimmed = Seq(30);
    }
    bench.up([2]);
    bench.pass(1000);
    assert_eq!(bench.mode(2), MemberMode::TooFarBehind, "in sync, it is not filled");
    assert_eq!(bench.change(&AB), Ok(()));
    bench.changed(&AB);
    let mut seen = Vec::new();
    while !bench.member(2).caught_up {
        bench.write_ok(9, 100);
        bench.pass(100);
        seen.push((bench.mode(2), bench.member(2).fill.map(|fill| fill.phase)));
        assert!(seen.len() < 500, "{seen:?}");
    }
    assert!(seen.contains(&(MemberMode::Filling, Some(FillPhase::Chunks))), "{seen:?}");
    bench.pass(500);
    bench.agree(&ABC);
    bench.changed(&ABC);
    bench.down(0);
    for value in 33..=40 {
        let read = bench.read(value % 8);
        assert_eq!(bench.value(read), Some(value));
    }
}

#[test]
fn a_filling_goes_on_after_its_source_its_session_or_its_head_is_gone() {
    let mut bench = Bench::with_spares(3, 1);
    for value in 1..=40 {
        bench.write_ok(value, value);
    }
    bench.pass(1000);
    for index in 0..3 {
        bench.models[index].trimmed = Seq(35);
    }
    let roles = [(0, InSync), (1, InSync), (2, InSync), (3, CatchingUp)];
    bench.changed(&roles);
    bench.up([3]);
    bench.pass(1000);
    assert_eq!(bench.mode(3), MemberMode::Filling);
    let source = bench.models[3].fill.unwrap().source;
    assert_ne!(source, server(0), "the head's own server is spared");
    let source = usize::from(source.bytes()[0]) - 1;
    bench.down(source);
    bench.pass(1000);
    assert_eq!(bench.mode(3), MemberMode::Filling);
    assert_ne!(bench.models[3].fill.unwrap().source, server(source));
    bench.up([source]);
    bench.down(3);
    bench.up([3]);
    bench.pass(1000);
    assert_eq!(bench.mode(3), MemberMode::Filling);
    bench.next_head();
    bench.up(0..4);
    bench.pass(20_000);
    assert!(bench.member(3).caught_up, "{:?}", bench.member(3));
    assert_eq!(bench.models[3].log, bench.models[0].log);
}

#[test]
fn a_member_far_behind_within_reach_gets_the_log_from_a_peer() {
    let mut bench = Bench::with_spares(3, 0);
    bench.down(2);
    for value in 1..=60 {
        bench.write_ok(value, value);
    }
    bench.pass(500);
    bench.input(crate::Input::MemberUp { server: server(2) });
    while bench.models[2].fill.is_none() {
        bench.deliver(2);
    }
    assert_eq!(bench.mode(2), MemberMode::CatchingUp);
    let fill = bench.models[2].fill.unwrap();
    assert_eq!((fill.source, fill.chunks), (server(1), false));
    assert_eq!(bench.wires[2].len(), 0, "no appends meanwhile");
    bench.settle();
    bench.pass(5000);
    assert_eq!(bench.mode(2), MemberMode::Live);
    assert_eq!(bench.models[2].log, bench.models[0].log);
}

#[test]
fn a_damaged_member_counts_for_no_opening_until_it_was_filled() {
    let mut bench = Bench::with_spares(3, 0);
    bench.held[2] = true;
    bench.write_ok(1, 5);
    // Member 0 loses the end of its log, and says so; member 1 has all, member 2 never had it.
    bench.next_head();
    bench.held[2] = false;
    bench.models[0].crash(Seq(1));
    bench.models[0].lost = true;
    bench.up([0, 2]);
    bench.pass(2000);
    assert_eq!(bench.head.status().phase, HeadPhase::Sealing);
    let member = bench.member(0);
    assert_eq!((member.mode, member.damaged), (MemberMode::Damaged, true));
    bench.up([1]);
    bench.pass(100);
    let read = bench.read(1);
    assert_eq!(bench.value(read), Some(5));
    let bc = [(0, CatchingUp), (1, InSync), (2, InSync)];
    assert_eq!(bench.change(&bc), Ok(()));
    bench.changed(&bc);
    bench.pass(20_000);
    let member = bench.member(0);
    assert_eq!((member.mode, member.damaged), (MemberMode::Live, false));
    assert!(member.caught_up);
}

#[test]
fn a_half_filled_member_counts_for_no_opening() {
    let mut bench = Bench::opened(2);
    bench.write_ok(1, 5);
    bench.next_head();
    bench.models[0].filling = true;
    bench.models[0].log.clear();
    bench.up([0]);
    bench.pass(2000);
    assert_eq!(bench.head.status().phase, HeadPhase::Sealing);
    assert_eq!(bench.mode(0), MemberMode::Filling);
    assert_eq!(bench.head.epoch(), Epoch(2));
}

#[test]
fn a_place_that_was_left_is_taken_by_another() {
    let mut bench = Bench::with_spares(3, 2);
    bench.write_ok(1, 1);
    for spare in [3, 4, 3, 4] {
        let mut roles = ABC.to_vec();
        roles.push((spare, CatchingUp));
        bench.models[spare] = super::model::Model::default();
        bench.changed(&roles);
        bench.up([spare]);
        bench.pass(200);
        assert!(bench.member(spare).caught_up);
        bench.write_ok(1, spare as u64);
        bench.changed(&ABC);
        bench.wires[spare].clear();
        assert_eq!(bench.head.status().members.len(), 3);
        bench.models[spare].session_lost();
        bench.write_ok(2, spare as u64);
    }
}

#[test]
fn one_member_may_take_anothers_place() {
    let mut bench = Bench::with_spares(3, 1);
    let mut roles = ABC.to_vec();
    roles.push((3, CatchingUp));
    bench.changed(&roles);
    bench.up([3]);
    bench.down(2);
    bench.write_ok(1, 1);
    // Of those in sync one is dead, and one lacks what only the third and the newcomer hold.
    bench.models[1].crash(Seq(1));
    bench.models[1].lost = true;
    bench.down(1);
    bench.up([1]);
    bench.pass(100);
    let write = bench.write(1, 2);
    let without_dead = [(0, InSync), (1, InSync), (3, CatchingUp)];
    assert!(matches!(bench.change(&without_dead), Err(MembershipError::NoQuorum { .. })));
    let four = [(0, InSync), (1, InSync), (2, InSync), (3, InSync)];
    assert!(matches!(bench.change(&four), Err(MembershipError::NoQuorum { .. })));
    let instead = [(0, InSync), (1, InSync), (2, CatchingUp), (3, InSync)];
    bench.agree(&instead);
    assert_eq!(bench.status(write), None, "both sets count");
    bench.changed(&instead);
    assert_eq!(bench.status(write), Some(Status::Ok));
    let read = bench.read(1);
    assert_eq!(bench.value(read), Some(2));
}

#[test]
fn an_opening_shrinks_only_to_members_that_hold_the_tail_it_chose() {
    let mut bench = Bench::opened(3);
    bench.held[2] = true;
    bench.write_ok(1, 5);
    bench.next_head();
    // Member 1 is gone; member 2 answers the Seal and lacks the write.
    bench.up([0]);
    bench.input(crate::Input::MemberUp { server: server(2) });
    while bench.models[2].sealed != Epoch(2) {
        bench.deliver(2);
    }
    bench.pass(100);
    assert_eq!(bench.head.status().phase, HeadPhase::Reconciling);
    let without_b = [(0, InSync), (1, CatchingUp), (2, InSync)];
    let error = MembershipError::NoQuorum { have: 1, needed: 2, of: 2 };
    assert_eq!(bench.change(&without_b), Err(error), "the next opening may hear member 2 alone");
    bench.held[2] = false;
    bench.settle();
    bench.agree(&without_b);
    bench.changed(&without_b);
    bench.next_head();
    bench.up([2]);
    bench.pass(100);
    bench.up([0]);
    bench.pass(100);
    let read = bench.read(1);
    assert_eq!(bench.value(read), Some(5));
}
