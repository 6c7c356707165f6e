//! Flush: answered when every write acknowledged before it is on media at a write quorum. Flushes that
//! arrive while one is under way share the next.

use base::{CommandBody, Instant, ReplicaError, ReplyBody, RequestId, Seq};

use crate::gate::Grounds;
use crate::head::Head;
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
        let wanted = self.flushes.front().map(|flush| flush.target);
        let media = self.log.first_media();
        for index in 0..self.members.len() {
            let member = &self.members[index];
            if !member.follows() || member.flushing.is_some() {
                continue;
            }
            // A record that counts only on media is there with its own append, unless the member
            // got it in another session.
            let lacks = |seq: Seq| seq <= member.acked && member.durable() < seq;
            if wanted.is_some_and(lacks) || media.is_some_and(lacks) {
                self.members[index].flushing = Some(member.acked);
                let number = self.next_number();
                self.send(index, Kind::Flush, number, CommandBody::Flush);
            }
        }
    }

    /// What is on media at a write quorum stays there, so this only grows.
    fn learn_durable_quorum(&mut self) {
        let mut positions = [Seq::ZERO; base::limits::MEMBERS_MAX];
        for (position, member) in positions.iter_mut().zip(&self.members) {
            if member.in_sync() && member.follows() {
                *position = member.durable();
            }
        }
        positions.sort_unstable();
        let quorum = positions[positions.len() - self.write_quorum];
        self.log.durable = self.log.durable.max(quorum.min(self.log.commit()));
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
