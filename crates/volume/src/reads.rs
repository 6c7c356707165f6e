//! Reads: from the local member if it holds the newest acknowledged record of the range, else from the
//! fastest that does; on failure from the next. Data that may show a record which is not at a
//! quorum yet is held back until it is: what a guest has seen never reverts.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use base::limits::HEAD_REQUESTS_MAX;
use base::{
    BlockCount, Buffer, BufferMut, CommandBody, Instant, Lba, ReplicaError, ReplyBody, RequestId,
    Seq,
};

use crate::config::DEPTH_EXPECTED;
use crate::gate::Grounds;
use crate::head::{Head, Phase};
use crate::sessions::Answer;
use crate::tag::Kind;

/// All reads under way.
#[derive(Debug)]
pub(crate) struct Reads {
    slots: Vec<Option<Read>>,
    free: Vec<u16>,
    /// Read, but to be held until the seq is settled.
    held: BinaryHeap<Reverse<(Seq, u16)>>,
    /// Reads whose request is unanswered.
    unanswered: usize,
    /// Reads that wait for a member or a buffer.
    waiting: usize,
    retry: bool,
    retry_at: Option<Instant>,
}

#[derive(Debug)]
struct Read {
    /// `None` once answered, by the stall deadline.
    request: Option<RequestId>,
    lba: Lba,
    blocks: BlockCount,
    arrived: Instant,
    state: ReadState,
    /// Members where the data is damaged.
    damaged: u8,
    /// Members that failed in this round.
    failed: u8,
}

#[derive(Debug)]
enum ReadState {
    /// A member was asked.
    Asked { member: usize, tag: u64, at: Instant },
    /// The data is here and waits for `until` to be settled.
    Held { until: Seq, data: Buffer },
    /// No member can be asked now. The buffer may have been lost with a command.
    Waiting { buffer: Option<BufferMut> },
}

/// An unanswered read of a head that ended.
#[derive(Debug)]
pub(crate) struct LostRead {
    pub(crate) id: RequestId,
    pub(crate) lba: Lba,
    pub(crate) blocks: BlockCount,
    pub(crate) buffer: Option<BufferMut>,
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
        !self.free.is_empty() || self.slots.len() < HEAD_REQUESTS_MAX
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

    fn release(&mut self, slot: u16) -> Option<Read> {
        let read = self.slots[usize::from(slot)].take()?;
        if read.request.is_some() {
            self.unanswered -= 1;
        }
        if let ReadState::Waiting { .. } = read.state {
            self.waiting -= 1;
        }
        self.free.push(slot);
        Some(read)
    }

    /// Takes all unanswered reads, at the end of a head.
    pub(crate) fn drain(&mut self) -> impl Iterator<Item = LostRead> + '_ {
        self.held.clear();
        self.unanswered = 0;
        self.waiting = 0;
        let count = u16::try_from(self.slots.len()).expect("the limit fits");
        self.free.clear();
        self.free.extend(0..count);
        self.slots.iter_mut().filter_map(|slot| {
            let Read { request, lba, blocks, state, .. } = slot.take()?;
            let buffer = match state {
                ReadState::Asked { .. } => None,
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
        let waiting = used.filter(|read| matches!(read.state, ReadState::Waiting { .. })).count();
        assert_eq!(waiting, self.waiting);
    }
}

fn bit(member: usize) -> u8 {
    1 << member
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
        let read = Read { request: Some(id), lba, blocks, arrived, state, damaged: 0, failed: 0 };
        let slot = self.reads.insert(read);
        self.dispatch(slot);
    }

    /// The best member to read from, of those that hold `covers`.
    fn reader(&self, covers: Seq, except: u8) -> Option<usize> {
        let able = |(index, member): &(usize, &crate::member::Member)| {
            except & bit(*index) == 0
                && member.in_sync()
                && member.follows()
                && member.acked >= covers
        };
        let rank = |(_, member): &(usize, &crate::member::Member)| {
            (self.local != Some(member.server), member.latency_nanos)
        };
        self.members.iter().enumerate().filter(able).min_by_key(rank).map(|(index, _)| index)
    }

    fn damaged_everywhere(&self, damaged: u8) -> bool {
        let members = self.members.iter().enumerate();
        members.filter(|(_, member)| member.in_sync()).all(|(index, _)| damaged & bit(index) != 0)
    }

    /// Sends a waiting read to a member, if one can serve it.
    fn dispatch(&mut self, slot: u16) {
        let commit = self.log.commit();
        let Some(read) = &self.reads.slots[usize::from(slot)] else { return };
        let (lba, blocks, damaged, failed) = (read.lba, read.blocks, read.damaged, read.failed);
        if self.damaged_everywhere(damaged) {
            if let Some(Read { request: Some(id), .. }) = self.reads.release(slot) {
                self.answer(id, Grounds::Failed);
            }
            return;
        }
        // The newest acknowledged record of the range; what came before this epoch is below
        // EpochStart.
        let start = self.log.start().expect("reads begin after EpochStart");
        let covers = self.newest.touching(lba, blocks).min(commit).max(start);
        let bytes = usize::try_from(blocks.bytes(self.block_size)).expect("checked at arrival");
        let target = self.reader(covers, damaged | failed);
        let again = self.now + self.tunables.retry_min;
        let Some(read) = &mut self.reads.slots[usize::from(slot)] else { return };
        let ReadState::Waiting { buffer: own } = &mut read.state else { return };
        let buffer = own.take().or_else(|| self.buffers.take(bytes));
        let (Some(member), Some(_)) = (target, &buffer) else {
            *own = buffer;
            let at = self.reads.retry_at.map_or(again, |at| at.max(self.now).min(again));
            self.reads.retry_at = Some(at);
            return;
        };
        let Some(buffer) = buffer else { return };
        let body = CommandBody::Read { lba, blocks, covers, buffer };
        let tag = self.send(member, Kind::Read, u64::from(slot), body);
        let at = self.now;
        if let Some(read) = &mut self.reads.slots[usize::from(slot)] {
            read.state = ReadState::Asked { member, tag, at };
            self.reads.waiting -= 1;
        }
    }

    pub(crate) fn read_answered(&mut self, index: usize, tag: u64, number: u64, result: Answer) {
        let Ok(slot) = u16::try_from(number) else { return };
        let Some(Some(read)) = self.reads.slots.get_mut(usize::from(slot)) else { return };
        let ReadState::Asked { tag: asked, at, .. } = read.state else { return };
        if asked != tag {
            return;
        }
        if read.request.is_none() {
            self.reads.release(slot);
            return;
        }
        let bytes = read.blocks.bytes(self.block_size);
        let failure = match result {
            Ok(ReplyBody::Data(data)) if data.len() as u64 == bytes => {
                self.members[index].learn_latency(self.now - at);
                self.hold_or_answer(slot, data);
                return;
            }
            Ok(_) => ReplicaError::Damaged,
            Err(error) => error,
        };
        if failure == ReplicaError::Damaged {
            read.damaged |= bit(index);
        } else {
            read.failed |= bit(index);
        }
        read.state = ReadState::Waiting { buffer: None };
        self.reads.waiting += 1;
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
        self.dispatch(slot);
    }

    /// Answers a read unless its data may show what is not settled.
    fn hold_or_answer(&mut self, slot: u16, data: Buffer) {
        let Some(read) = &mut self.reads.slots[usize::from(slot)] else { return };
        let until = self.newest.touching(read.lba, read.blocks);
        if until > self.log.commit() {
            read.state = ReadState::Held { until, data };
            self.reads.held.push(Reverse((until, slot)));
        } else if let Some(Read { request: Some(id), .. }) = self.reads.release(slot) {
            self.answer(id, Grounds::Read { data, seen: until });
        }
    }

    /// Answers reads whose data is settled by now.
    pub(crate) fn release_held_reads(&mut self) {
        while let Some(Reverse((until, slot))) = self.reads.held.peek().copied() {
            if until > self.log.commit() {
                return;
            }
            self.reads.held.pop();
            let held = matches!(
                &self.reads.slots[usize::from(slot)],
                Some(Read { state: ReadState::Held { until: u, .. }, .. }) if *u == until
            );
            if !held {
                continue; // answered by the stall deadline
            }
            if let Some(Read { request: Some(id), state: ReadState::Held { data, .. }, .. }) =
                self.reads.release(slot)
            {
                self.answer(id, Grounds::Read { data, seen: until });
            }
        }
    }

    /// A member's session is gone, and with it the reads it was asked for.
    pub(crate) fn reads_lost(&mut self, lost: usize) {
        for slot in 0..self.reads.slots.len() {
            let Some(read) = &mut self.reads.slots[slot] else { continue };
            if !matches!(read.state, ReadState::Asked { member, .. } if member == lost) {
                continue;
            }
            let slot = u16::try_from(slot).expect("bounded by the limit");
            read.state = ReadState::Waiting { buffer: None };
            self.reads.waiting += 1;
            if read.request.is_none() {
                self.reads.release(slot);
            }
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
            let Some(read) = &mut self.reads.slots[slot] else { continue };
            if read.arrived >= oldest {
                continue;
            }
            let Some(id) = read.request.take() else { continue };
            self.reads.unanswered -= 1;
            match read.state {
                // The command still owns the slot's tag.
                ReadState::Asked { .. } => {}
                ReadState::Held { .. } | ReadState::Waiting { .. } => {
                    self.reads.release(u16::try_from(slot).expect("bounded by the limit"));
                }
            }
            self.answer(id, Grounds::Failed);
        }
    }

    /// True if reads wait though a quorum is there.
    pub(crate) fn reads_stalled(&self) -> bool {
        self.reads.waiting() > 0 && matches!(self.phase, Phase::Serving | Phase::Releasing { .. })
    }
}
