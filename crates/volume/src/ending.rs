//! How a head ends: released in good order, superseded, or abandoned; what happens to the requests it
//! still holds; and the policy's stall deadline.

use core::time::Duration;

use base::planted::{self, Bug};
use base::{
    BlockCount, BlockRequest, Buffer, BufferMut, CommandBody, Instant, Lba, Operation, Record,
    RecordKind, RequestId,
};

use crate::gate::Grounds;
use crate::head::{Head, Output, Phase, Queued};
use crate::member::{Farewell, Mode};
use crate::status::HeadPhase;
use crate::tag::Kind;

/// A request that goes back to the shell as soon as it has a buffer again.
#[derive(Debug)]
pub(crate) enum Unanswered {
    /// Whole.
    Request(BlockRequest),
    /// A write whose buffer members' commands may still share.
    Write { id: RequestId, lba: Lba, blocks: BlockCount, payload: Buffer, fua: bool },
    /// A read whose buffer went with a command.
    Read { id: RequestId, lba: Lba, blocks: BlockCount },
}

impl Unanswered {
    fn from_record(id: RequestId, record: &Record) -> Self {
        let header = record.header();
        let (lba, blocks, fua) = (header.lba, header.blocks, header.fua);
        let operation = match header.kind {
            RecordKind::Write => {
                let payload = record.payload().clone();
                return Self::Write { id, lba, blocks, payload, fua };
            }
            RecordKind::Discard => Operation::Discard,
            RecordKind::WriteZeroes => Operation::WriteZeroes { fua },
            RecordKind::EpochStart => unreachable!("no request is behind an EpochStart"),
        };
        Self::Request(BlockRequest { id, lba, blocks, operation })
    }
}

impl Head {
    /// Stops accepting; ends once everything accepted is answered and the members know.
    pub(crate) fn release(&mut self) {
        match self.phase {
            Phase::Sealing { .. } | Phase::Reconciling | Phase::Starting => {
                self.end(HeadPhase::Released, Output::Released);
            }
            Phase::Serving => self.phase = Phase::Releasing { until: None },
            Phase::Releasing { .. } | Phase::Ended(_) => {}
        }
    }

    pub(crate) fn advance_release(&mut self) {
        let Phase::Releasing { until } = self.phase else { return };
        let busy = self.in_flight() > 0 || !self.queue.is_empty() || self.log.undecided() > 0;
        if until.is_none() && busy && !planted::is(Bug::EarlyRelease) {
            return;
        }
        let until = until.unwrap_or(self.now + self.tunables.release_wait);
        self.phase = Phase::Releasing { until: Some(until) };
        let last = self.log.last().seq;
        let mut pending = false;
        for index in 0..self.members.len() {
            let member = &self.members[index];
            if member.follows() && member.acked == last && member.farewell == Farewell::None {
                let number = self.next_number();
                self.send(index, Kind::Release, number, CommandBody::Release);
                self.members[index].farewell = Farewell::Said(number);
            }
            let member = &self.members[index];
            pending |= match member.mode {
                Mode::Live => member.farewell != Farewell::Answered,
                // Not worth waiting for: they do not hold the newest records.
                Mode::Down
                | Mode::Resting { .. }
                | Mode::Sealing
                | Mode::Sealed(_)
                | Mode::Matching(_)
                | Mode::Truncating { .. }
                | Mode::CatchingUp(_)
                | Mode::Filling(_)
                | Mode::Parked { .. } => false,
            };
        }
        let told = self.members_where(|member| member.farewell == Farewell::Answered);
        let mut until = until;
        if self.sets.write_quorum_met(told) {
            until = until.min(self.now + self.tunables.release_grace);
            self.phase = Phase::Releasing { until: Some(until) };
        }
        if !pending || until <= self.now {
            self.end(HeadPhase::Released, Output::Released);
        }
    }

    /// Gives back what members have granted while nobody uses the volume, so that another head's Seal
    /// is answered at once. This one forgets the grant when it sends the Release, and has nothing
    /// under way there that could bring one back: what it is granted later, the member was asked for
    /// after the Release, and delays a Seal for.
    pub(crate) fn advance_rest(&mut self) {
        let quiet = self.in_flight() == 0 && self.queue.is_empty() && self.log.undecided() == 0;
        if !self.resting || self.phase != Phase::Serving || !quiet {
            return;
        }
        for index in 0..self.members.len() {
            let member = &mut self.members[index];
            if member.connected && member.granting && member.outstanding == 0 {
                if !planted::is(Bug::RestKeepsGrants) {
                    member.grant.forget();
                }
                let number = self.next_number();
                self.send(index, Kind::Release, number, CommandBody::Release);
            }
        }
    }

    /// Ends the head. What is unanswered will be returned, oldest writes first.
    pub(crate) fn end(&mut self, phase: HeadPhase, output: Output) {
        assert!(!matches!(self.phase, Phase::Ended(_)), "a head ends once");
        self.phase = Phase::Ended(phase);
        // Commands not taken yet would only be refused, and they share the writes' buffers.
        self.outputs.retain(|output| !matches!(output, Output::Command { .. }));
        self.outputs.push_back(output);
        for entry in self.log.drain() {
            if let Some(id) = entry.request {
                self.returned.push_back(Unanswered::from_record(id, &entry.record));
            }
        }
        for read in self.reads.drain() {
            let (id, lba, blocks) = (read.id, read.lba, read.blocks);
            self.returned.push_back(match read.buffer {
                Some(buffer) => {
                    let operation = Operation::Read { buffer };
                    Unanswered::Request(BlockRequest { id, lba, blocks, operation })
                }
                None => Unanswered::Read { id, lba, blocks },
            });
        }
        for flush in self.flushes.drain(..) {
            self.returned.push_back(Unanswered::Request(BlockRequest {
                id: flush.id,
                lba: Lba(0),
                blocks: BlockCount(0),
                operation: Operation::Flush,
            }));
        }
        for Queued { request, .. } in self.queue.drain(..) {
            self.returned.push_back(Unanswered::Request(request));
        }
        self.writes = 0;
        for member in &mut self.members {
            member.enter(Mode::Down, self.now);
            member.connected = false;
        }
        self.stall = None;
    }

    /// The next request that goes back; `None` also while the pool has no buffer for it. A read that needs
    /// one lets those behind it go first: they may be who has it.
    pub(crate) fn next_returned(&mut self) -> Option<BlockRequest> {
        for _ in 0..self.returned.len() {
            match self.returned.pop_front()? {
                Unanswered::Request(request) => return Some(request),
                Unanswered::Write { id, lba, blocks, payload, fua } => {
                    return match self.writable(payload) {
                        Ok(buffer) => {
                            let operation = Operation::Write { buffer, fua };
                            Some(BlockRequest { id, lba, blocks, operation })
                        }
                        Err(payload) => {
                            let write = Unanswered::Write { id, lba, blocks, payload, fua };
                            self.returned.push_front(write);
                            None
                        }
                    };
                }
                Unanswered::Read { id, lba, blocks } => {
                    let bytes = usize::try_from(blocks.bytes(self.block_size));
                    if let Some(buffer) = self.buffers.take(bytes.unwrap_or(usize::MAX)) {
                        let operation = Operation::Read { buffer };
                        return Some(BlockRequest { id, lba, blocks, operation });
                    }
                    self.returned.push_back(Unanswered::Read { id, lba, blocks });
                }
            }
        }
        None
    }

    /// A payload in a writable buffer: its own if nobody shares it any more, else a copy.
    pub(crate) fn writable(&self, payload: Buffer) -> Result<BufferMut, Buffer> {
        payload.try_into_mut().or_else(|payload| {
            let Some(mut copy) = self.buffers.take(payload.len()) else { return Err(payload) };
            copy.payload_mut()[..payload.len()].copy_from_slice(payload.bytes());
            Ok(copy)
        })
    }

    /// Answers requests that waited past the policy's stall deadline with an error. Their records
    /// stay: a write that failed so may still land, but before any newer one is acknowledged.
    pub(crate) fn expire(&mut self) {
        let Some(deadline_ms) = self.policy.stall_deadline_ms else { return };
        if self.now < self.expire_at {
            return;
        }
        let deadline = Duration::from_millis(deadline_ms);
        let step = (deadline / 8).clamp(Duration::from_millis(1), Duration::from_secs(1));
        self.expire_at = self.now + step;
        let deadline_nanos = u64::try_from(deadline.as_nanos()).unwrap_or(u64::MAX);
        let oldest = Instant::from_nanos(self.now.nanos().saturating_sub(deadline_nanos));
        while self.queue.front().is_some_and(|queued| queued.arrived < oldest) {
            let Some(queued) = self.queue.pop_front() else { break };
            self.answer(queued.request.id, Grounds::Failed);
        }
        while self.flushes.front().is_some_and(|flush| flush.arrived < oldest) {
            let Some(flush) = self.flushes.pop_front() else { break };
            self.answer(flush.id, Grounds::Failed);
        }
        self.expire_reads(oldest);
        self.expire_writes(oldest);
    }

    fn expire_writes(&mut self, oldest: Instant) {
        if self.writes == 0 {
            return;
        }
        let mut seq = self.log.commit().next().max(self.log.base());
        while let Some(entry) = self.log.entry_mut(seq) {
            if entry.arrived < oldest
                && let Some(id) = entry.request.take()
            {
                self.writes -= 1;
                self.answer(id, Grounds::Failed);
            }
            seq = seq.next();
        }
    }
}
