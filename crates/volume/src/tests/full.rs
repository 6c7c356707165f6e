//! Members whose logs are full or that put nothing on media, and heads out of buffers.

use base::{
    BufferPool, CommandBody, Epoch, Operation, Position, RecordKind, ReplicaCommand, ReplicaError,
    Seq, Status,
};

use super::bench::{Bench, server};
use super::world::World;
use crate::{HeadPhase, Input, MemberMode, StallReason};

/// An append that waits for room in a member's log.
pub(super) struct Waiting {
    head: usize,
    session: u64,
    tag: u64,
    command: ReplicaCommand,
}

/// Members of a world whose logs have little room, as a store has it: an append waits until enough of
/// what is there is settled, and what comes later does not wait for it, but for other appends.
impl World {
    /// Gives the command back unless it waits.
    pub(super) fn wait_for_room(
        &mut self,
        head: usize,
        server: usize,
        session: u64,
        tag: u64,
        command: ReplicaCommand,
    ) -> Option<ReplicaCommand> {
        let model = &self.servers[server].model;
        let obeys = model.sealed == command.epoch && model.sealed_by == Some(head);
        let CommandBody::Append { record, .. } = &command.body else { return Some(command) };
        let opens = record.header().kind == RecordKind::EpochStart;
        let waits = !self.servers[server].waiting.is_empty() || !opens && self.is_full(server);
        if !obeys || !waits {
            return Some(command);
        }
        self.count("append that waits for room");
        let model = &mut self.servers[server].model;
        model.learn_commit(&mut self.truth, command.commit);
        self.servers[server].waiting.push_back(Waiting { head, session, tag, command });
        self.go_on_with_room(server);
        None
    }

    fn is_full(&self, server: usize) -> bool {
        let model = &self.servers[server].model;
        let unsettled = model.log.len() - usize::try_from(model.commit.0).unwrap();
        self.settings.room.is_some_and(|room| unsettled >= room)
    }

    /// What a Seal or a filling finds waiting is not carried out any more.
    pub(super) fn drop_waiting(&mut self, head: usize, server: usize, command: &ReplicaCommand) {
        let model = &self.servers[server].model;
        let (sealed, by) = (model.sealed, model.sealed_by);
        let error = match command.body {
            CommandBody::Seal if command.epoch > sealed || by == Some(head) => {
                ReplicaError::Superseded { sealed: command.epoch }
            }
            CommandBody::Install { .. } if by == Some(head) => ReplicaError::Filling,
            _ => return,
        };
        for waiting in core::mem::take(&mut self.servers[server].waiting) {
            self.count("append dropped before it had room");
            self.answer(waiting.head, server, waiting.session, waiting.tag, Err(error));
        }
    }

    pub(super) fn go_on_with_room(&mut self, server: usize) {
        while !self.is_full(server) {
            let Some(next) = self.servers[server].waiting.pop_front() else { return };
            self.carry_out(next.head, server, next.session, next.tag, next.command);
        }
    }
}

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

/// One member holds no more than a part of the log and gets nothing of the rest; another is full of what two hold.
#[test]
fn what_a_quorum_holds_makes_room_though_another_is_far_behind() {
    let mut bench = Bench::opened(3);
    bench.room[2] = 12;
    bench.held[1] = true;
    for value in 1..=20 {
        bench.write(value, value);
    }
    assert_eq!((bench.models[0].log.len(), bench.models[2].log.len()), (21, 13));
    bench.models[1].commit = Seq(1);
    bench.next_head();
    bench.held.fill(false);
    bench.up([0, 2]);
    bench.failing_scans = Some(ReplicaError::NoSpace);
    bench.up([1]);
    bench.pass(3000);
    assert_eq!((bench.mode(1), bench.models[1].log.len()), (MemberMode::CatchingUp, 1));
    assert_eq!(bench.head.status().phase, HeadPhase::Serving);
    bench.write_ok(1, 100);
    for value in 2..=20 {
        let read = bench.read(value);
        assert_eq!(bench.value(read), Some(value));
    }
}

/// One member needs a copy, but ends in an older epoch than what two hold: no opening prefers its log to theirs.
#[test]
fn what_a_quorum_holds_makes_room_though_another_needs_a_copy() {
    let mut bench = Bench::opened(3);
    for value in 1..=3 {
        bench.write_ok(value, value);
    }
    bench.held[2] = true;
    bench.next_head();
    bench.up([0, 1]);
    for value in 4..=8 {
        bench.write_ok(value, value);
    }
    bench.pass(1000);
    bench.room[1] = 3;
    for value in 9..=20 {
        bench.write(value, value);
    }
    let lengths = [0, 1, 2].map(|member| bench.models[member].log.len());
    assert_eq!(lengths, [22, 13, 4]);
    assert_eq!(bench.models[1].commit, Seq(10));
    bench.models[0].trimmed = Seq(8);
    bench.models[1].trimmed = Seq(8);
    bench.next_head();
    bench.held.fill(false);
    bench.up([0, 1, 2]);
    bench.pass(3000);
    assert_eq!(bench.mode(2), MemberMode::TooFarBehind);
    assert_eq!(bench.head.status().phase, HeadPhase::Serving);
    bench.write_ok(1, 100);
    for value in 2..=20 {
        let read = bench.read(value);
        assert_eq!(bench.value(read), Some(value));
    }
}

/// Record 2 of epoch 1 is at members 0 and 1; an opening that saw neither has left another at member 2, in epoch 2, and
/// one that did not see that one has its EpochStart at member 0 alone. Without member 0, member 2's log counts.
#[test]
fn what_a_newer_log_elsewhere_lacks_is_not_settled_early() {
    let mut bench = Bench::opened(3);
    bench.pass(1000);
    bench.held = vec![false, true, true];
    bench.write(7, 7);
    bench.next_head();
    bench.held = vec![true, false, false];
    bench.room[1] = 0;
    bench.up([1, 2]);
    bench.next_head();
    bench.held = vec![false, false, true];
    bench.room[1] = 1;
    bench.up([0, 1]);
    let ends = [0, 1, 2].map(|member| bench.models[member].last());
    let position = |epoch, seq| Position::new(Epoch(epoch), Seq(seq));
    assert_eq!(ends, [position(3, 3), position(1, 2), position(2, 2)]);
    bench.next_head();
    bench.held.fill(false);
    bench.input(Input::MemberUp { server: server(2) });
    bench.deliver(2);
    bench.held[2] = true;
    bench.up([0, 1]);
    bench.pass(3000);
    assert_eq!(bench.head.status().phase, HeadPhase::Reconciling, "member 1 has no room");
    assert_eq!(bench.mode(2), MemberMode::Reconciling);
    assert_eq!(bench.models[1].commit, Seq(1), "member 2 may yet win");
    bench.held[2] = false;
    bench.settle();
    bench.pass(1000);
    assert_eq!(bench.head.status().phase, HeadPhase::Serving);
    assert_eq!(bench.models[1].log, bench.models[2].log);
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
