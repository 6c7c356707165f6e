//! Reads: from the local member if it holds the newest acknowledged record of the range, else from the
//! fastest that does; on failure from the next. A member that takes far longer than usual is not
//! waited for (see `hedge`). Data that may show a record which is not at a quorum yet is held back until
//! it is: what a guest has seen never reverts. And no data leaves while another head may have been
//! opened (see `grants`).

use core::time::Duration;
use std::cmp::Reverse;
use std::collections::BinaryHeap;

use base::limits::HEAD_REQUESTS_MAX;
use base::planted::{self, Bug};
use base::{
    BlockCount, Buffer, BufferMut, CommandBody, DegradedReason, Instant, Lba, ReplicaError,
    ReplyBody, RequestId, Seq,
};

use crate::config::DEPTH_EXPECTED;
use crate::gate::Grounds;
use crate::head::{Head, Phase};
use crate::hedge::{Hedging, Link};
use crate::member::Member;
use crate::quorum::bit;
use crate::sessions::Answer;
use crate::tag::Kind;

/// Slots: reads that were answered keep theirs while a member still works for them.
const SLOTS_MAX: usize = 2 * HEAD_REQUESTS_MAX;
/// The bits of a tag's number that name the slot; the rest counts commands.
const SLOT_BITS: u32 = 16;

const _: () = assert!(SLOTS_MAX < 1 << SLOT_BITS);

/// The local member is read from while it takes no longer than this many times the fastest other
const LOCAL_TIMES: u32 = 3;
/// and this.
const LOCAL_FAVOUR: Duration = Duration::from_micros(300);

/// All reads under way.
#[derive(Debug)]
pub(crate) struct Reads {
    pub(crate) slots: Vec<Option<Read>>,
    free: Vec<u16>,
    /// Read, but to be held until the seq is settled and the head is trusted.
    held: BinaryHeap<Reverse<(Seq, u16)>>,
    /// Reads whose request is unanswered.
    unanswered: usize,
    /// Reads that wait for a member or a buffer.
    waiting: usize,
    retry: bool,
    retry_at: Option<Instant>,
    /// Commands sent, for their tags.
    sent: u64,
    pub(crate) hedging: Hedging,
}

#[derive(Debug)]
pub(crate) struct Read {
    /// `None` once answered.
    pub(crate) request: Option<RequestId>,
    pub(crate) lba: Lba,
    pub(crate) blocks: BlockCount,
    arrived: Instant,
    pub(crate) state: ReadState,
    /// Commands under way for it: a first one, and perhaps a second opinion.
    pub(crate) asks: [Option<Ask>; 2],
    /// Its place among those that may become too late.
    pub(crate) link: Option<Link>,
    /// The second member was asked because the first was late.
    pub(crate) hedged: bool,
    /// Members where the data is damaged.
    pub(crate) damaged: u8,
    /// Members that failed in this round.
    pub(crate) failed: u8,
}

/// A command under way to a member.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ask {
    pub(crate) member: usize,
    pub(crate) tag: u64,
    at: Instant,
}

#[derive(Debug)]
pub(crate) enum ReadState {
    /// A member was asked, or two.
    Asked,
    /// The data is here and waits for `until` to be settled, or for grants.
    Held { until: Seq, data: Buffer },
    /// No member can be asked now. The buffer may have been lost with a command.
    Waiting { buffer: Option<BufferMut> },
    /// Answered; somebody still works for it.
    Answered,
}

/// An unanswered read of a head that ended.
#[derive(Debug)]
pub(crate) struct LostRead {
    pub(crate) id: RequestId,
    pub(crate) lba: Lba,
    pub(crate) blocks: BlockCount,
    pub(crate) buffer: Option<BufferMut>,
}

impl Read {
    pub(crate) fn idle(&self) -> bool {
        self.asks.iter().all(Option::is_none)
    }
}

impl Reads {
    pub(crate) fn new() -> Self {
        Self {
            slots: Vec::with_capacity(DEPTH_EXPECTED),
            free: Vec::with_capacity(DEPTH_EXPECTED),
            held: BinaryHeap::with_capacity(DEPTH_EXPECTED),
            unanswered: 0,
            waiting: 0,
            retry: false,
            retry_at: None,
            sent: 0,
            hedging: Hedging::new(),
        }
    }

    /// That member is gone; another may get its slot.
    pub(crate) fn forget_member(&mut self, slot: usize) {
        for read in self.slots.iter_mut().flatten() {
            read.damaged &= !bit(slot);
            read.failed &= !bit(slot);
        }
    }

    pub(crate) fn room(&self) -> bool {
        !self.free.is_empty() || self.slots.len() < SLOTS_MAX
    }

    /// Puts a read into a free slot; the caller saw room.
    fn insert(&mut self, read: Read) -> u16 {
        assert!(self.room(), "reads are bounded");
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            u16::try_from(self.slots.len() - 1).expect("the limit fits")
        });
        self.unanswered += 1;
        self.waiting += 1;
        self.slots[usize::from(slot)] = Some(read);
        slot
    }

    pub(crate) fn unanswered(&self) -> usize {
        self.unanswered
    }

    /// Reads that wait for a member.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting
    }

    /// Something changed for the better: waiting reads try again.
    pub(crate) fn retry(&mut self) {
        self.retry = true;
    }

    pub(crate) fn retry_at(&self) -> Option<Instant> {
        if self.waiting > 0 { self.retry_at } else { None }
    }

    /// The number of the next command for `slot`.
    pub(crate) fn number(&mut self, slot: u16) -> u64 {
        self.sent += 1;
        self.sent << SLOT_BITS | u64::from(slot)
    }

    pub(crate) fn at(&self, slot: u16) -> Option<&Read> {
        self.slots.get(usize::from(slot))?.as_ref()
    }

    pub(crate) fn at_mut(&mut self, slot: u16) -> Option<&mut Read> {
        self.slots.get_mut(usize::from(slot))?.as_mut()
    }

    /// Enters `state`, and leaves the one before.
    fn enter(&mut self, slot: u16, state: ReadState) -> Option<ReadState> {
        let read = self.slots.get_mut(usize::from(slot))?.as_mut()?;
        self.waiting += usize::from(matches!(state, ReadState::Waiting { .. }));
        let before = core::mem::replace(&mut read.state, state);
        self.waiting -= usize::from(matches!(before, ReadState::Waiting { .. }));
        Some(before)
    }

    /// A read's request is answered now: its name, and what it waited with.
    fn answer(&mut self, slot: u16) -> Option<(RequestId, ReadState)> {
        let request = self.at_mut(slot)?.request.take()?;
        self.unanswered -= 1;
        let before = self.enter(slot, ReadState::Answered)?;
        self.settled(slot);
        self.free_if_done(slot);
        Some((request, before))
    }

    /// Frees a slot that nobody works for any more.
    fn free_if_done(&mut self, slot: u16) {
        let done = |read: &Read| matches!(read.state, ReadState::Answered) && read.idle();
        if self.at(slot).is_some_and(done) {
            self.slots[usize::from(slot)] = None;
            self.free.push(slot);
        }
    }

    /// Takes all unanswered reads, at the end of a head.
    pub(crate) fn drain(&mut self) -> impl Iterator<Item = LostRead> + '_ {
        self.held.clear();
        self.unanswered = 0;
        self.waiting = 0;
        self.hedging = Hedging::new();
        let count = u16::try_from(self.slots.len()).expect("the limit fits");
        self.free.clear();
        self.free.extend(0..count);
        self.slots.iter_mut().filter_map(|slot| {
            let Read { request, lba, blocks, state, .. } = slot.take()?;
            let buffer = match state {
                ReadState::Asked | ReadState::Answered => None,
                ReadState::Held { data, .. } => data.try_into_mut().ok(),
                ReadState::Waiting { buffer } => buffer,
            };
            Some(LostRead { id: request?, lba, blocks, buffer })
        })
    }

    pub(crate) fn check(&self) {
        let used = self.slots.iter().flatten();
        assert_eq!(used.clone().count() + self.free.len(), self.slots.len());
        let unanswered = used.clone().filter(|read| read.request.is_some()).count();
        assert_eq!(unanswered, self.unanswered);
        let waiting = |read: &&Read| matches!(read.state, ReadState::Waiting { .. });
        assert_eq!(used.clone().filter(waiting).count(), self.waiting);
        for read in used {
            let answered = matches!(read.state, ReadState::Answered);
            assert_eq!(read.request.is_none(), answered);
            assert!(!answered || !read.idle(), "an answered read is kept for its commands only");
            assert!(!waiting(&read) || read.idle(), "a read waits for one thing at a time");
        }
        self.check_hedging();
    }
}

impl Member {
    /// True if reads are better asked of others: it is slow, goes away, or has trouble with reading.
    pub(crate) fn reads_badly(&self) -> bool {
        let degraded = match self.health.degraded {
            Some(
                DegradedReason::SlowDevice | DegradedReason::FailedDevice | DegradedReason::Damage,
            ) => true,
            Some(DegradedReason::LogFull) | None => false,
        };
        degraded || self.speed.slow_since.is_some() || self.health.draining.is_some()
    }
}

impl Head {
    pub(crate) fn begin_read(
        &mut self,
        arrived: Instant,
        id: RequestId,
        lba: Lba,
        blocks: BlockCount,
        buffer: BufferMut,
    ) {
        let state = ReadState::Waiting { buffer: Some(buffer) };
        let read = Read {
            request: Some(id),
            lba,
            blocks,
            arrived,
            state,
            asks: [None; 2],
            link: None,
            hedged: false,
            damaged: 0,
            failed: 0,
        };
        let slot = self.reads.insert(read);
        self.plan_renewals();
        self.dispatch(slot);
    }

    /// How eagerly a member is read from: the least is the best.
    pub(crate) fn reluctance(&self, member: &Member) -> (bool, Duration, bool) {
        let expected = member.speed.reads.expected(self.now).unwrap_or_default();
        let local = self.local == Some(member.server);
        let cost =
            if local { expected.saturating_sub(LOCAL_FAVOUR) / LOCAL_TIMES } else { expected };
        (member.reads_badly(), cost, !local)
    }

    /// True if the member can answer a read that shows everything through `covers`.
    pub(crate) fn can_read(member: &Member, covers: Seq) -> bool {
        member.in_sync() && member.follows() && member.acked >= covers
    }

    /// The best member to read from, of those that hold `covers`.
    pub(crate) fn reader(&self, covers: Seq, except: u8) -> Option<usize> {
        let members = self.members.iter().enumerate();
        members
            .filter(|(index, member)| except & bit(*index) == 0 && Self::can_read(member, covers))
            .min_by_key(|(_, member)| self.reluctance(member))
            .map(|(index, _)| index)
    }

    /// The newest acknowledged record of a range; what came before this epoch is below EpochStart.
    pub(crate) fn covers(&self, lba: Lba, blocks: BlockCount) -> Seq {
        let start = self.log.start().expect("reads begin after EpochStart");
        if planted::is(Bug::ReadOfStaleMember) {
            return start;
        }
        self.newest.touching(lba, blocks).min(self.log.commit()).max(start)
    }

    fn damaged_everywhere(&self, damaged: u8) -> bool {
        let members = self.members.iter().enumerate();
        members.filter(|(_, member)| member.in_sync()).all(|(index, _)| damaged & bit(index) != 0)
    }

    /// Sends a waiting read to a member, if one can serve it.
    fn dispatch(&mut self, slot: u16) {
        let Some(read) = self.reads.at(slot) else { return };
        let (lba, blocks, damaged, failed) = (read.lba, read.blocks, read.damaged, read.failed);
        if self.damaged_everywhere(damaged) {
            self.fail_read(slot);
            return;
        }
        let covers = self.covers(lba, blocks);
        let bytes = usize::try_from(blocks.bytes(self.block_size)).expect("checked at arrival");
        let target = self.reader(covers, damaged | failed);
        let again = self.now + self.tunables.retry_min;
        let Some(read) = self.reads.at_mut(slot) else { return };
        let ReadState::Waiting { buffer: own } = &mut read.state else { return };
        let buffer = own.take().or_else(|| self.buffers.take(bytes));
        let (Some(member), Some(_)) = (target, &buffer) else {
            *own = buffer;
            let at = self.reads.retry_at.map_or(again, |at| at.max(self.now).min(again));
            self.reads.retry_at = Some(at);
            return;
        };
        let Some(buffer) = buffer else { return };
        self.ask(slot, member, covers, buffer);
        self.reads.enter(slot, ReadState::Asked);
        self.watch(slot, member);
        self.probe(slot, member, covers);
    }

    /// Sends a read to a member.
    pub(crate) fn ask(&mut self, slot: u16, member: usize, covers: Seq, buffer: BufferMut) {
        let Some(read) = self.reads.at(slot) else { return };
        let (lba, blocks) = (read.lba, read.blocks);
        let number = self.reads.number(slot);
        let body = CommandBody::Read { lba, blocks, covers, buffer };
        let tag = self.send(member, Kind::Read, number, body);
        let at = self.now;
        self.members[member].speed.reads.sent(tag, at);
        let Some(read) = self.reads.at_mut(slot) else { return };
        let place = read.asks.iter_mut().find(|ask| ask.is_none());
        *place.expect("a third member is never asked") = Some(Ask { member, tag, at });
    }

    fn fail_read(&mut self, slot: u16) {
        if let Some((id, _)) = self.reads.answer(slot) {
            self.answer(id, Grounds::Failed);
        }
    }

    pub(crate) fn read_answered(&mut self, index: usize, tag: u64, number: u64, result: Answer) {
        let _ = self.members[index].speed.reads.timed(tag);
        let Ok(slot) = u16::try_from(number & ((1 << SLOT_BITS) - 1)) else { return };
        let Some(read) = self.reads.at_mut(slot) else { return };
        let asked = |ask: &&mut Option<Ask>| ask.is_some_and(|ask| ask.tag == tag);
        let Some(Ask { at, .. }) = read.asks.iter_mut().find(asked).and_then(Option::take) else {
            return;
        };
        let bytes = read.blocks.bytes(self.block_size);
        self.reads.ask_ended(slot, index);
        let failure = match result {
            Ok(ReplyBody::Data(data)) if data.len() as u64 == bytes => {
                let now = self.now;
                let member = &mut self.members[index];
                member.speed.reads.learn(now.since(at), now);
                member.grant.learn(at, now);
                self.hold_or_answer(slot, data);
                self.reads.free_if_done(slot);
                return;
            }
            Ok(_) => ReplicaError::Damaged,
            Err(error) => error,
        };
        self.read_failed(slot, index, failure);
        self.reads.free_if_done(slot);
    }

    /// A member could not answer a read.
    fn read_failed(&mut self, slot: u16, index: usize, failure: ReplicaError) {
        if failure == ReplicaError::Damaged
            && let Some(Read { lba, blocks, .. }) = self.reads.at(slot)
        {
            let (lba, blocks) = (*lba, *blocks);
            self.note_damage(index, lba, blocks);
        }
        let mut again = false;
        if let Some(read) = self.reads.at_mut(slot)
            && matches!(read.state, ReadState::Asked)
        {
            if failure == ReplicaError::Damaged {
                read.damaged |= bit(index);
            } else {
                read.failed |= bit(index);
            }
            again = read.idle();
            if let Some(Ask { member, .. }) = read.asks.iter().flatten().next().copied()
                && read.link.is_none()
            {
                self.watch(slot, member);
            }
        }
        if again {
            self.reads.enter(slot, ReadState::Waiting { buffer: None });
        }
        match failure {
            ReplicaError::Damaged | ReplicaError::Behind { .. } | ReplicaError::Invalid => {}
            ReplicaError::Superseded { .. }
            | ReplicaError::NotSealed
            | ReplicaError::NoReplica
            | ReplicaError::OutOfOrder { .. }
            | ReplicaError::Trimmed { .. }
            | ReplicaError::DeviceFailed
            | ReplicaError::Filling
            | ReplicaError::NoSpace
            | ReplicaError::Disconnected => {
                if self.members[index].follows() {
                    self.member_failed(index, failure);
                }
            }
        }
        if again {
            self.dispatch(slot);
        }
    }

    /// Answers a read unless its data may show what is not settled, or may be out of date. Data that
    /// came too late to be of use is dropped.
    fn hold_or_answer(&mut self, slot: u16, data: Buffer) {
        let Some(read) = self.reads.at(slot) else { return };
        if !matches!(read.state, ReadState::Asked) {
            return;
        }
        let arrived = read.arrived;
        let until = self.newest.touching(read.lba, read.blocks);
        let until = if planted::is(Bug::UndecidedRead) { Seq::ZERO } else { until };
        self.reads.settled(slot);
        if until > self.log.commit() || !self.trusted() {
            self.reads.enter(slot, ReadState::Held { until, data });
            self.reads.held.push(Reverse((until, slot)));
        } else if let Some((id, _)) = self.reads.answer(slot) {
            self.pace.learn(self.now - arrived);
            self.answer(id, Grounds::Read { data, seen: until });
        }
    }

    /// True if data that is settled is held back for want of grants.
    pub(crate) fn reads_ungranted(&self) -> bool {
        let first = self.reads.held.peek();
        first.is_some_and(|Reverse((until, _))| *until <= self.log.commit()) && !self.trusted()
    }

    /// Answers reads whose data is settled by now, while the head is trusted.
    pub(crate) fn release_held_reads(&mut self) {
        while let Some(Reverse((until, slot))) = self.reads.held.peek().copied() {
            if until > self.log.commit() {
                return;
            }
            let held = matches!(
                self.reads.at(slot),
                Some(Read { state: ReadState::Held { until: u, .. }, .. }) if *u == until
            );
            if held && !self.trusted() {
                return;
            }
            self.reads.held.pop();
            // Others were answered by the stall deadline.
            if held && let Some((id, ReadState::Held { data, .. })) = self.reads.answer(slot) {
                self.answer(id, Grounds::Read { data, seen: until });
            }
        }
    }

    /// A member's session is gone, and with it the reads it was asked for.
    pub(crate) fn reads_lost(&mut self, lost: usize) {
        for slot in 0..self.reads.slots.len() {
            let slot = u16::try_from(slot).expect("bounded by the limit");
            let Some(read) = self.reads.at_mut(slot) else { continue };
            let of_lost = |ask: &&mut Option<Ask>| ask.is_some_and(|ask| ask.member == lost);
            let Some(ask) = read.asks.iter_mut().find(of_lost) else { continue };
            *ask = None;
            let again = matches!(read.state, ReadState::Asked) && read.idle();
            let left = read.asks.iter().flatten().next().map(|ask| ask.member);
            let asked = matches!(read.state, ReadState::Asked);
            self.reads.ask_ended(slot, lost);
            if let Some(member) = left.filter(|_| asked)
                && self.reads.at(slot).is_some_and(|read| read.link.is_none())
            {
                self.watch(slot, member);
            }
            if again {
                self.reads.enter(slot, ReadState::Waiting { buffer: None });
            }
            self.reads.free_if_done(slot);
        }
        self.reads.retry();
    }

    /// Waiting reads try again, when something changed or it is time.
    pub(crate) fn advance_reads(&mut self) {
        let due = self.reads.retry_at.is_some_and(|at| at <= self.now);
        if !due && !self.reads.retry {
            return;
        }
        self.reads.retry = false;
        if due {
            self.reads.retry_at = None;
        }
        if self.reads.waiting == 0 {
            return;
        }
        for slot in 0..self.reads.slots.len() {
            let Some(read) = &mut self.reads.slots[slot] else { continue };
            if let ReadState::Waiting { .. } = read.state {
                if due {
                    read.failed = 0;
                }
                self.dispatch(u16::try_from(slot).expect("bounded by the limit"));
            }
        }
    }

    /// Answers reads that arrived before `oldest` with an error.
    pub(crate) fn expire_reads(&mut self, oldest: Instant) {
        for slot in 0..self.reads.slots.len() {
            let Some(read) = &self.reads.slots[slot] else { continue };
            if read.arrived < oldest {
                self.fail_read(u16::try_from(slot).expect("bounded by the limit"));
            }
        }
    }

    /// True if reads wait though a quorum is there.
    pub(crate) fn reads_stalled(&self) -> bool {
        self.reads.waiting() > 0 && matches!(self.phase, Phase::Serving | Phase::Releasing { .. })
    }
}
