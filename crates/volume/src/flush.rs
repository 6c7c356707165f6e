//! Flush: answered when every write acknowledged before it is on media at a write quorum. Flushes that
//! arrive while one is under way share the next. And settling: what is acknowledged goes to media
//! after a while even if no guest asks.

use base::planted::{self, Bug};
use base::{CommandBody, Instant, ReplicaError, ReplyBody, RequestId, Seq};

use crate::gate::Grounds;
use crate::head::{Head, Phase};
use crate::member::Member;
use crate::sessions::Answer;
use crate::tag::Kind;

/// An unanswered flush.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FlushWaiter {
    pub(crate) id: RequestId,
    /// Everything through here must be on media.
    pub(crate) target: Seq,
    pub(crate) arrived: Instant,
}

impl Head {
    pub(crate) fn begin_flush(&mut self, arrived: Instant, id: RequestId) {
        let target = self.log.commit();
        self.flushes.push_back(FlushWaiter { id, target, arrived });
    }

    /// Asks members to flush what is wanted on media, and answers flushes that are done.
    pub(crate) fn advance_flushes(&mut self) {
        self.learn_durable_quorum();
        while let Some(flush) = self.flushes.front().copied() {
            if flush.target > self.log.durable {
                break;
            }
            self.flushes.pop_front();
            self.answer(flush.id, Grounds::Flushed { target: flush.target });
        }
        let wanted = self.flushes.front().map(|flush| flush.target).max(self.plan_settling());
        let media = self.log.first_media();
        let mut lacking = false;
        for index in 0..self.members.len() {
            let member = &self.members[index];
            if !member.follows() {
                continue;
            }
            if member.flushing.is_some() {
                lacking = true;
                continue;
            }
            // A record that counts only on media is there with its own append, unless the member
            // got it in another session.
            let lacks = |seq: Seq| seq <= member.acked && member.durable() < seq;
            if wanted.is_some_and(lacks)
                || media.is_some_and(lacks)
                || self.settle_everywhere.is_some_and(lacks)
            {
                lacking = true;
                self.members[index].flushing = Some(member.acked);
                let number = self.next_number();
                self.send(index, Kind::Flush, number, CommandBody::Flush);
            }
        }
        if !lacking {
            self.settle_everywhere = None;
        }
    }

    /// The seq through which members that follow have everything on media, a write quorum of them.
    pub(crate) fn write_quorum_durable(&self) -> Seq {
        if planted::is(Bug::FlushBeforeQuorum) {
            let follow = self.members.iter().filter(|member| member.follows());
            return follow.map(Member::durable).max().unwrap_or(Seq::ZERO);
        }
        self.write_quorum_at(Member::durable)
    }

    /// The greatest seq that a write quorum of members that follow have reached.
    fn write_quorum_at(&self, reached: impl Fn(&Member) -> Seq) -> Seq {
        let mut positions = [Seq::ZERO; base::limits::MEMBERS_MAX];
        for (position, member) in positions.iter_mut().zip(&self.members) {
            if member.follows() {
                *position = reached(member);
            }
        }
        self.sets.write_quorum_reached(&positions)
    }

    /// What is on media at a write quorum stays there, so this only grows.
    fn learn_durable_quorum(&mut self) {
        let durable = self.write_quorum_durable().min(self.log.commit());
        if durable > self.log.durable {
            self.log.durable = durable;
            self.plan_commit_news();
        }
    }

    /// Acknowledged records must reach media some time even if no guest asks, so that members may
    /// take them home. Says through which record that is due.
    fn plan_settling(&mut self) -> Option<Seq> {
        if let Phase::Reconciling | Phase::Starting = self.phase {
            return self.plan_settling_tail();
        }
        let (commit, durable) = (self.log.commit(), self.log.durable);
        if self.settle_target.is_some_and(|target| target <= durable) {
            self.settle_target = None;
        }
        if commit <= durable || self.log.start().is_none() {
            self.settle_at = None;
            return self.settle_target;
        }
        let at = *self.settle_at.get_or_insert(self.now + self.tunables.settle_delay);
        let records = usize::try_from(commit.0 - durable.0).unwrap_or(usize::MAX);
        // Well before the backlog is full: then writes would wait.
        let bytes = self.tunables.settle_bytes.min(self.tunables.backlog_bytes_max / 2);
        if at <= self.now
            || self.log.unsettled_bytes >= bytes
            || (self.settle_target.is_none() && records > self.tunables.backlog_records_max / 2)
        {
            self.settle_target = Some(commit);
            self.settle_at = Some(self.now + self.tunables.settle_delay);
            self.log.unsettled_bytes = 0;
        }
        self.settle_target
    }

    /// In an opening that lasts: what a write quorum holds is put on media, so that it is settled and those that
    /// are full have room for the rest. Says through which record, when that is due.
    fn plan_settling_tail(&mut self) -> Option<Seq> {
        let held = self.write_quorum_at(|member| member.acked).min(self.log.tail().seq);
        if !self.outlasts_this_opening(held) {
            self.settle_at = None;
            return None;
        }
        let at = *self.settle_at.get_or_insert(self.now + self.tunables.settle_delay);
        if at > self.now {
            return None;
        }
        self.settle_at = Some(self.now + self.tunables.settle_delay);
        Some(held)
    }

    pub(crate) fn flush_answered(&mut self, index: usize, result: &Answer) {
        let member = &mut self.members[index];
        if !member.follows() {
            return;
        }
        let Some(covers) = member.flushing.take() else { return };
        match result {
            Ok(ReplyBody::Flushed { durable }) if *durable >= covers => {
                member.learn_durable(*durable);
            }
            Ok(_) => self.member_failed(index, ReplicaError::Invalid),
            Err(error) => self.member_failed(index, *error),
        }
    }
}
