//! What members' servers say of themselves and of each other, whether they still grant reads, and what
//! the head makes of it.

use core::time::Duration;
use std::collections::VecDeque;

use base::{
    CommandBody, DegradedReason, Epoch, Health, HelloReason, ReplicaCommand, ReplicaError,
    ReplyBody, Role, Seq, StateMessage, Status,
};

use super::bench::{Bench, Sent, server};
use crate::{HeadPhase, Input, MemberMode, Output, StallReason};

impl Bench {
    fn state(&mut self, index: usize, message: StateMessage) {
        self.input(Input::State { server: server(index), message });
        self.settle();
    }

    /// Takes the commands for which `wanted` is true off a member's wire.
    fn sent(&mut self, index: usize, wanted: impl Fn(&CommandBody) -> bool) -> Vec<Sent> {
        let all = core::mem::take(&mut self.wires[index]);
        let (taken, left) = all.into_iter().partition(|(_, command)| wanted(&command.body));
        self.wires[index] = left;
        Vec::from(taken)
    }

    /// The member that a read of `lba` is asked of.
    fn asked_to_read(&mut self, lba: u64) -> usize {
        let held = core::mem::replace(&mut self.held, vec![true; self.models.len()]);
        let read = self.read(lba);
        let reads = |wire: &VecDeque<Sent>| {
            wire.iter().any(|(_, command)| matches!(command.body, CommandBody::Read { .. }))
        };
        let asked = self.wires.iter().position(reads).expect("somebody is asked");
        self.held = held;
        self.settle();
        assert!(self.value(read).is_some());
        asked
    }
}

#[test]
fn an_idle_head_ends_when_it_hears_of_its_successor() {
    let mut bench = Bench::opened(3);
    bench.state(1, StateMessage::Superseded { epoch: Epoch(1) });
    assert_eq!(bench.head.status().phase, HeadPhase::Serving, "that is its own epoch");
    bench.state(1, StateMessage::Superseded { epoch: Epoch(4) });
    bench.state(2, StateMessage::Superseded { epoch: Epoch(4) });
    let ends = |news: &&Output| matches!(news, Output::Superseded { sealed: Epoch(4) });
    assert_eq!(bench.news.iter().filter(ends).count(), 1);
    assert_eq!(bench.head.next_deadline(), None);
}

#[test]
fn reads_avoid_members_that_go_away_or_have_trouble_reading() {
    let mut bench = Bench::opened(3);
    assert_eq!(bench.asked_to_read(1), 0, "the local one");
    let successor = server(2);
    bench.state(0, StateMessage::Draining { deadline_ms: 900, successor });
    let draining = bench.member(0).draining.unwrap();
    assert_eq!(draining.until, bench.now + Duration::from_millis(900));
    assert_eq!(draining.successor, Some(successor));
    assert_ne!(bench.asked_to_read(1), 0);
    for index in [1, 2] {
        bench.state(index, StateMessage::Degraded { reason: DegradedReason::SlowDevice });
    }
    assert_eq!(bench.asked_to_read(1), 0, "of three that should not be read from, the local one");
    bench.state(0, StateMessage::Back);
    bench.state(1, StateMessage::Back);
    bench.state(0, StateMessage::Degraded { reason: DegradedReason::LogFull });
    assert_eq!(bench.asked_to_read(1), 0, "a full log can be read");
    bench.state(0, StateMessage::Degraded { reason: DegradedReason::Damage });
    assert_eq!(bench.asked_to_read(1), 1);
    assert_eq!(bench.member(0).degraded, Some(DegradedReason::Damage));
    bench.down(0);
    bench.up([0]);
    assert_eq!(bench.member(0).degraded, None, "a new session says it again if it is so");
}

#[test]
fn members_hear_why_a_session_was_begun() {
    let mut bench = Bench::new(3);
    bench.held = vec![false, false, true];
    bench.up(0..3);
    let hello = |bench: &mut Bench| {
        bench.deliver(2);
        let sent = bench.sent(2, |body| matches!(body, CommandBody::Hello { .. }));
        let [(_, ReplicaCommand { body: CommandBody::Hello { reason, acknowledged }, .. })] =
            sent[..]
        else {
            panic!("one Hello after each Seal")
        };
        (reason, acknowledged)
    };
    assert_eq!(hello(&mut bench), (HelloReason::Fresh, Seq(0)));
    bench.held[2] = false;
    bench.settle();
    bench.held[2] = true;
    bench.down(2);
    bench.up([2]);
    assert_eq!(hello(&mut bench).0, HelloReason::IoError);
    bench.write(1, 1);
    bench.pass(600);
    bench.down(2);
    bench.up([2]);
    assert_eq!(hello(&mut bench), (HelloReason::Timeout, Seq(2)));
    bench.state(2, StateMessage::Draining { deadline_ms: 10, successor: server(1) });
    bench.down(2);
    bench.up([2]);
    assert_eq!(hello(&mut bench).0, HelloReason::Told);
}

#[test]
fn others_are_asked_about_a_silent_member_every_second() {
    let mut bench = Bench::opened(3);
    bench.down(2);
    bench.pass(900);
    assert_eq!(bench.member(2).others_say, None);
    let since = bench.member(2).down_since.unwrap();
    assert!(bench.member(0).down_since.is_none());
    bench.held = vec![true; 3];
    let asks = |bench: &mut Bench, index| {
        bench.sent(
            index,
            |body| matches!(body, CommandBody::HealthOf { server: about } if *about == server(2)),
        )
    };
    let round = |bench: &mut Bench, said: [Health; 2]| {
        bench.pass(1000);
        for (index, health) in said.into_iter().enumerate() {
            let asked = asks(bench, index);
            assert_eq!(asked.len(), 1, "once a second");
            for (tag, _) in asked {
                bench.answer(index, tag, Ok(ReplyBody::Health(health)));
            }
        }
        bench.member(2).others_say
    };
    assert_eq!(round(&mut bench, [Health::Silent, Health::Healthy]), Some(Health::Healthy));
    assert_eq!(
        round(&mut bench, [Health::Silent, Health::Unknown]),
        Some(Health::Healthy),
        "until the round is over"
    );
    assert_eq!(round(&mut bench, [Health::Unknown, Health::Silent]), Some(Health::Silent));
    assert_eq!(bench.member(2).down_since, Some(since));
    bench.held = vec![false; 3];
    bench.up([2]);
    let member = bench.member(2);
    assert_eq!((member.down_since, member.others_say), (None, None));
}

#[test]
fn an_idle_head_costs_nothing_and_its_first_read_waits_for_grants() {
    let mut bench = Bench::opened(3);
    bench.write(3, 9);
    bench.pass(2000);
    assert_eq!(bench.head.next_deadline(), None, "nothing is to be done");
    let renew = |body: &CommandBody| matches!(body, CommandBody::Renew);
    bench.held = vec![false, true, true];
    assert!(bench.sent(1, |_| true).is_empty(), "and nothing was sent for long");
    let read = bench.read(3);
    assert_eq!(bench.value(read), None, "what the local member says may be out of date");
    bench.pass(120);
    let stall = bench.head.status().stall.unwrap();
    assert_eq!(stall.reason, StallReason::NoGrant { granted: 1, needed: 2 });
    assert!(matches!(bench.news.last(), Some(Output::Stalled { .. })));
    let sent = bench.sent(1, renew);
    assert!((2..=4).contains(&sent.len()), "asked again now and then: {}", sent.len());
    // The first was sent too long ago by the time it is answered.
    bench.pass(100);
    bench.answer(1, sent[0].0, Ok(ReplyBody::Done));
    assert_eq!(bench.value(read), None);
    bench.held = vec![false; 3];
    bench.settle();
    bench.pass(60);
    assert_eq!(bench.value(read), Some(9));
    assert!(matches!(bench.news.last(), Some(Output::Resumed)));
}

#[test]
fn grants_are_renewed_while_reads_go_on() {
    let mut bench = Bench::opened(3);
    bench.write(3, 9);
    let mut renews = 0;
    for _ in 0..1000 {
        bench.now = bench.now + Duration::from_millis(2);
        bench.input(Input::Tick);
        bench.settle();
        bench.held = vec![false, true, true];
        let read = bench.read(3);
        assert_eq!(bench.value(read), Some(9), "the local member's answer is enough");
        renews += bench
            .wires
            .iter()
            .flatten()
            .filter(|(_, sent)| matches!(sent.body, CommandBody::Renew))
            .count();
        bench.held = vec![false; 3];
        bench.settle();
    }
    // Two members, every 50 ms or a little later, but for what the probes carry.
    assert!((50..=80).contains(&renews), "{renews} in two seconds");
}

/// A session that was released refuses without asking the member: whoever asks again at once never stops.
#[test]
fn a_renewal_that_is_refused_is_not_repeated_at_once() {
    let mut bench = Bench::opened(3);
    bench.held = vec![false, true, true];
    bench.write(1, 1);
    bench.next_head();
    bench.held.fill(false);
    bench.up([1, 2]);
    bench.pass(100);
    // What it alone has is truncated, which takes a while, and the grants run out.
    bench.held[0] = true;
    bench.up([0]);
    bench.deliver(0);
    let truncates = |body: &CommandBody| matches!(body, CommandBody::Truncate { .. });
    let truncate = bench.sent(0, truncates);
    assert_eq!(truncate.len(), 1);
    bench.held[2] = true;
    bench.pass(1000);
    bench.read(9);
    let renews = |body: &CommandBody| matches!(body, CommandBody::Renew);
    let renew = bench.sent(0, renews);
    assert!(!renew.is_empty());
    bench.answer(0, renew[0].0, Err(ReplicaError::NotSealed));
    assert!(bench.sent(0, renews).is_empty(), "it was told just now");
    let mode = bench.mode(0);
    assert_eq!(mode, MemberMode::Failed(ReplicaError::NotSealed), "it is to be sealed anew");
}

#[test]
fn a_read_without_grants_fails_at_the_stall_deadline_like_others() {
    let mut bench = Bench::with(3, |config| config.volume.policy.stall_deadline_ms = Some(300));
    bench.up(0..3);
    bench.pass(1000);
    bench.held = vec![false, true, true];
    let read = bench.read(3);
    bench.pass(200);
    assert_eq!(bench.status(read), None);
    bench.pass(400);
    assert_eq!(bench.status(read), Some(Status::IoError));
}

#[test]
fn second_opinions_leave_buffers_to_others() {
    let mut bench = Bench::opened(3);
    bench.held[0] = true;
    let (small, _) = bench.buffers.available();
    let others: Vec<_> = (20..small).map(|_| bench.buffers.take(1).unwrap()).collect();
    let read = bench.read(3);
    bench.pass(20);
    assert_eq!(bench.value(read), None, "the local member hangs, and no buffer is to spare");
    drop(others);
    bench.pass(5);
    assert_eq!(bench.value(read), Some(0), "another member answers");
    let reads = bench.wires[0].iter();
    let reads = reads.filter(|(_, sent)| matches!(sent.body, CommandBody::Read { .. }));
    assert_eq!(reads.count(), 1, "what was asked first is still under way");
    bench.held[0] = false;
    bench.settle();
    bench.pass(500);
    assert_eq!(bench.buffers.available().0, small, "and gives its buffer back in the end");
}

#[test]
fn while_a_change_of_members_is_open_reads_need_grants_in_both_sets() {
    let mut bench = Bench::opened(3);
    bench.write(3, 9);
    bench.agree(&[(0, Role::InSync), (1, Role::InSync), (2, Role::CatchingUp)]);
    bench.pass(1000);
    bench.held = vec![false, true, false];
    let read = bench.read(3);
    bench.pass(20);
    assert_eq!(bench.value(read), None, "two of the old three, but not two of the new two");
    bench.held = vec![false, false, true];
    bench.settle();
    assert_eq!(bench.value(read), Some(9));
    bench.changed(&[(0, Role::InSync), (1, Role::InSync), (2, Role::CatchingUp)]);
    bench.held = vec![false; 3];
    bench.settle();
    bench.pass(1000);
    bench.held = vec![false, true, false];
    let read = bench.read(3);
    bench.pass(20);
    assert_eq!(bench.value(read), None, "the third counts for nothing any more");
    bench.held = vec![false; 3];
    bench.settle();
    assert_eq!(bench.value(read), Some(9));
}

#[test]
fn an_opening_that_gets_no_answer_says_so() {
    let mut bench = Bench::new(3);
    bench.held = vec![false, true, true];
    bench.up(0..3);
    bench.pass(300);
    assert_eq!(bench.head.status().stall, None, "members may wait for the head before");
    bench.pass(400);
    let stall = bench.head.status().stall.unwrap();
    assert_eq!(stall.reason, StallReason::NotSealed { sealed: 1, of: 3 });
    assert!(matches!(bench.news.last(), Some(Output::Stalled { .. })));
    bench.held = vec![false; 3];
    bench.settle();
    assert_eq!(bench.head.status().stall, None);
    bench.write(1, 1);
    bench.held[2] = true;
    bench.write(2, 2);
    bench.next_head();
    bench.held[2] = false;
    for index in [0, 2] {
        bench.input(Input::MemberUp { server: server(index) });
    }
    bench.deliver(0);
    bench.deliver(2);
    bench.held = vec![true; 3];
    bench.pass(1200);
    let stall = bench.head.status().stall.unwrap();
    assert_eq!(stall.reason, StallReason::Reconciling { hold: 1, needed: 2 });
    bench.held = vec![false; 3];
    bench.settle();
    bench.pass(1200);
    assert_eq!(bench.head.status().phase, HeadPhase::Serving);
}

#[test]
fn a_second_opinion_that_hangs_is_not_waited_for_either() {
    let mut bench = Bench::opened(3);
    bench.held = vec![true, true, false];
    let read = bench.read(3);
    bench.pass(3);
    let asked = |bench: &Bench, index: usize| {
        let reads = |sent: &&Sent| matches!(sent.1.body, CommandBody::Read { .. });
        bench.wires[index].iter().filter(reads).count()
    };
    assert_eq!((asked(&bench, 0), asked(&bench, 1)), (1, 1), "two hang");
    assert_eq!(bench.value(read), None);
    bench.down(0);
    bench.pass(20);
    assert_eq!(bench.value(read), Some(0), "and the third answers");
}
