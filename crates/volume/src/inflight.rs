//! Requests on their way in, and writes: a seq each at arrival, the same record to every member,
//! acknowledged in seq order once a write quorum has it.

use base::limits::{HEAD_REQUESTS_MAX, PAYLOAD_BYTES_MAX, RANGE_BLOCKS_MAX};
use base::planted::{self, Bug};
use base::{
    BlockCount, BlockRequest, BufferMut, Durability, Lba, Operation, Position, Record,
    RecordHeader, RecordKind, ReplicaError, ReplyBody, RequestId, Seq, Status,
};

use crate::gate::Grounds;
use crate::head::{Head, Output, Phase, Queued};
use crate::log::Entry;
use crate::member::{Member, Mode};
use crate::quorum::Bits;
use crate::sessions::Answer;
use crate::tag::NUMBER_MASK;

/// What a record is to do.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NewRecord {
    pub(crate) kind: RecordKind,
    pub(crate) lba: Lba,
    pub(crate) blocks: BlockCount,
    pub(crate) fua: bool,
}

impl Head {
    /// Takes a request in: answers it if it is not valid, queues it, or gives it back.
    pub(crate) fn accept(&mut self, request: BlockRequest) {
        if self.room() == 0 {
            self.outputs.push_back(Output::Returned(request));
            return;
        }
        if let Some(status) = self.refusal(&request) {
            self.answer(request.id, Grounds::Refused(status));
            return;
        }
        self.queue.push_back(Queued { arrived: self.now, request });
    }

    /// Why a request can never be served, if so. Front ends check too; what slips through must
    /// not reach a record.
    fn refusal(&self, request: &BlockRequest) -> Option<Status> {
        let bytes = request.blocks.bytes(self.block_size);
        let fits = |capacity: usize| bytes <= PAYLOAD_BYTES_MAX as u64 && bytes <= capacity as u64;
        let in_limits = match &request.operation {
            Operation::Flush => return None,
            Operation::Read { buffer } | Operation::Write { buffer, .. } => fits(buffer.capacity()),
            Operation::Discard | Operation::WriteZeroes { .. } => {
                request.blocks.0 <= RANGE_BLOCKS_MAX
            }
        };
        let end = request.lba.checked_add(request.blocks);
        if request.blocks.0 == 0 || !in_limits || end.is_none_or(|end| end.0 > self.size.served) {
            return Some(Status::InvalidRange);
        }
        let writes = !matches!(request.operation, Operation::Read { .. });
        (writes && self.policy.read_only).then_some(Status::ReadOnly)
    }

    /// Begins queued requests in their order, as far as limits and buffers allow.
    pub(crate) fn begin_queued(&mut self) {
        if !matches!(self.phase, Phase::Serving | Phase::Releasing { until: None }) {
            return;
        }
        while self.in_flight() < HEAD_REQUESTS_MAX {
            let Some(Queued { arrived, request }) = self.queue.pop_front() else { return };
            if let Err(request) = self.begin(arrived, request) {
                self.queue.push_front(Queued { arrived, request });
                return;
            }
        }
    }

    /// Begins a request, or gives it back if it has to wait.
    fn begin(&mut self, arrived: base::Instant, request: BlockRequest) -> Result<(), BlockRequest> {
        let BlockRequest { id, lba, blocks, operation } = request;
        let give_back = |operation| Err(BlockRequest { id, lba, blocks, operation });
        // After a stall deadline, undecided records outlive their requests.
        let room = self.log.undecided() < HEAD_REQUESTS_MAX
            && !self.waits_for_media()
            && self.holdback.may_begin(self.now);
        let (kind, buffer, fua) = match operation {
            Operation::Read { buffer } if self.reads.room() => {
                self.begin_read(arrived, id, lba, blocks, buffer);
                return Ok(());
            }
            Operation::Flush => {
                self.begin_flush(arrived, id);
                return Ok(());
            }
            Operation::Write { buffer, fua } if room => (RecordKind::Write, buffer, fua),
            Operation::Discard if room => match self.header_buffer() {
                Some(buffer) => (RecordKind::Discard, buffer, false),
                None => return give_back(Operation::Discard),
            },
            Operation::WriteZeroes { fua } if room => match self.header_buffer() {
                Some(buffer) => (RecordKind::WriteZeroes, buffer, fua),
                None => return give_back(Operation::WriteZeroes { fua }),
            },
            Operation::Read { .. }
            | Operation::Write { .. }
            | Operation::Discard
            | Operation::WriteZeroes { .. } => return give_back(operation),
        };
        self.push_record(arrived, Some(id), NewRecord { kind, lba, blocks, fua }, buffer);
        self.writes += 1;
        self.holdback.begun(self.now);
        Ok(())
    }

    /// Gives a record its seq: from here on it is written, whatever happens.
    pub(crate) fn push_record(
        &mut self,
        arrived: base::Instant,
        request: Option<RequestId>,
        new: NewRecord,
        buffer: BufferMut,
    ) -> Seq {
        let NewRecord { kind, lba, blocks, fua } = new;
        let last = self.log.last();
        let header = RecordHeader {
            key: self.key,
            position: Position::new(self.epoch, next_seq(last.seq)),
            previous_epoch: last.epoch,
            kind,
            block_size: self.block_size,
            lba,
            blocks,
            fua,
        };
        let record = Record::encode(header, buffer);
        let media =
            fua && !planted::is(Bug::FuaForgotten) || self.policy.durability == Durability::Durable;
        self.newest.note(lba, blocks, header.position.seq);
        self.pace.wrote(header.header_bytes() + header.payload_bytes());
        self.log.push(Entry { record, request, arrived, media });
        header.position.seq
    }

    fn header_buffer(&mut self) -> Option<BufferMut> {
        let buffer = self.buffers.take(0);
        if buffer.is_none() {
            self.buffer_retry = Some(self.now + self.tunables.retry_min);
        }
        buffer
    }

    pub(crate) fn append_answered(&mut self, index: usize, number: u64, result: &Answer) {
        let member = &mut self.members[index];
        if !member.follows() {
            return;
        }
        // The tag holds the seq's low bits; the appends under way are far fewer.
        let ahead = number.wrapping_sub(member.acked.0) & NUMBER_MASK;
        let seq = Seq(member.acked.0.saturating_add(ahead));
        match result {
            Ok(ReplyBody::Appended { durable }) => {
                let before = member.acked;
                member.learn_durable(*durable);
                if member.append_answered(seq) {
                    if let Mode::Live = member.mode {
                        member.backoff = self.tunables.retry_min;
                    }
                    let covers_now = member.acked >= self.log.commit();
                    if before < self.log.commit() && covers_now {
                        self.reads.retry();
                    }
                    self.plan_commit_news();
                }
            }
            Ok(_) => self.member_failed(index, ReplicaError::Invalid),
            Err(error) => self.member_failed(index, *error),
        }
    }

    /// Members that hold `seq`, on media if `media`.
    pub(crate) fn holders(&self, seq: Seq, media: bool) -> Bits {
        self.members_where(|member| {
            let media = media && !planted::is(Bug::AckBeforeMedia);
            let position = if media { member.durable() } else { member.acked };
            member.follows() && position >= seq
        })
    }

    /// Acknowledges every record that a write quorum has, in seq order.
    pub(crate) fn advance_commit(&mut self) {
        let Some(start) = self.log.start() else { return };
        loop {
            // What precedes EpochStart is settled with it, never before.
            let seq = self.log.commit().next().max(start);
            let Some(entry) = self.log.entry(seq) else { break };
            if !self.sets.write_quorum_met(self.holders(seq, entry.media))
                && !planted::is(Bug::AckBeforeQuorum)
            {
                break;
            }
            let committed = self.log.commit_next();
            assert_eq!(committed, seq, "records are acknowledged in order");
            let request = self.log.entry_mut(seq).and_then(|entry| {
                let id = entry.request.take()?;
                Some((id, entry.arrived))
            });
            if let Some((id, arrived)) = request {
                self.writes -= 1;
                self.pace.learn(self.now - arrived);
                self.answer(id, Grounds::Written { seq });
            }
            if seq == start {
                self.started(start);
            }
            self.plan_commit_news();
        }
        self.release_held_reads();
    }

    /// True if the acknowledged records in memory are more than so many times the backlog's limits.
    fn backlog_over(&self, times: usize) -> bool {
        let (records, bytes) = self.log.backlog();
        records > times * self.tunables.backlog_records_max
            || bytes > times * self.tunables.backlog_bytes_max
    }

    /// Whether the backlog may have twice its limits: for a member that catches up and lacks no more than as
    /// much again as is in memory. As fast as guests write, it would come no nearer to what is forgotten
    /// at the same pace.
    fn doubles_backlog(&self) -> bool {
        if !self.backlog_over(1) || self.backlog_over(2) {
            return false;
        }
        let (base, within) = (self.log.base().0, self.log.backlog().0 as u64);
        let near = |member: &Member| {
            matches!(member.mode, Mode::CatchingUp(_))
                && base.saturating_sub(member.next_send.0) <= within
        };
        self.backlog_doubled || self.members.iter().any(near)
    }

    /// True if what is acknowledged and not on media at a write quorum fills the backlog. Members may lose
    /// all of it with their power, and only this head could give it back: it is kept, and no more
    /// is begun until some of it is on media.
    pub(crate) fn waits_for_media(&self) -> bool {
        self.log.base() > self.log.durable && self.backlog_over(1)
    }

    /// Forgets settled records that every member that follows has been sent, and beyond the
    /// backlog's limits the oldest: members that still lack those read another's log.
    pub(crate) fn forget_acknowledged(&mut self) {
        self.backlog_doubled = self.doubles_backlog();
        let times = 1 + usize::from(self.backlog_doubled);
        loop {
            let first = self.log.base();
            // What is not settled can be lost with the members' power; while it is here, it can
            // be sent again.
            if self.log.backlog().0 == 0 || first > self.log.durable {
                return;
            }
            let wanted = self.members.iter().any(|m| m.follows() && m.next_send <= first)
                // Who is about to follow needs no other's log if it is still here then.
                || self.members.iter().any(Member::comes_soon);
            if wanted && !self.backlog_over(times) {
                return;
            }
            self.log.forget_first();
            if wanted {
                self.demote_members();
            }
        }
    }

    /// Members whose next record is no longer in memory go on from another member's log.
    fn demote_members(&mut self) {
        let (base, now) = (self.log.base(), self.now);
        for member in &mut self.members {
            if matches!(member.mode, Mode::Live) && member.next_send < base {
                let catch_up =
                    crate::catchup::CatchUp::new(member.next_send, self.tunables.catch_up_depth);
                member.enter(Mode::CatchingUp(Box::new(catch_up)), now);
            }
        }
    }
}

fn next_seq(last: Seq) -> Seq {
    if planted::is(Bug::ReuseSeq) && last.0 % 64 == 63 { last } else { last.next() }
}
