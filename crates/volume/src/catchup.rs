//! Feeding members: live ones from memory, those that are behind from another member's log,
//! several records deep, until what they lack is in memory. Records reach a member in
//! seq order with no gap, whichever way they come.

use std::collections::VecDeque;

use base::{CommandBody, Instant, Record, ReplicaError, ReplyBody, Seq};

use crate::head::Head;
use crate::member::Mode;
use crate::quorum::bit;
use crate::sessions::Answer;
use crate::status::MemberMode;
use crate::tag::Kind;

/// Records on their way from other members' logs.
#[derive(Debug)]
pub(crate) struct CatchUp {
    /// For the records from the member's `next_send` on.
    slots: VecDeque<Slot>,
    /// The next record to ask for.
    next_scan: Seq,
    pub(crate) damaged: Option<Seq>,
    pub(crate) retry_at: Option<Instant>,
}

#[derive(Debug)]
struct Slot {
    /// Donors that could not read it.
    tried: u8,
    /// Those of them that said it is damaged.
    rotten: u8,
    state: SlotState,
}

#[derive(Debug)]
enum SlotState {
    /// To be asked for.
    Wanted,
    /// Asked of `donor`.
    Asked { donor: usize, tag: u64 },
    /// Here.
    Ready(Record),
}

impl CatchUp {
    pub(crate) fn new(next: Seq, depth: usize) -> Self {
        let slots = VecDeque::with_capacity(depth);
        Self { slots, next_scan: next, damaged: None, retry_at: None }
    }

    /// That donor is no member any more; another may get its slot.
    pub(crate) fn forget_donor(&mut self, slot: usize) {
        for wanted in &mut self.slots {
            wanted.tried &= !bit(slot);
            wanted.rotten &= !bit(slot);
        }
    }

    /// The first record that is lacking, `next`, if donors said that it is damaged; and which.
    pub(crate) fn unreadable(&self, next: Seq) -> Option<(Seq, u8)> {
        let first = self.slots.front().filter(|first| first.rotten != 0)?;
        Some((next, first.rotten))
    }

    /// The donor's session is gone: ask others.
    pub(crate) fn donor_lost(&mut self, lost: usize) {
        for slot in &mut self.slots {
            if matches!(slot.state, SlotState::Asked { donor, .. } if donor == lost) {
                slot.state = SlotState::Wanted;
            }
        }
    }
}

impl Head {
    fn catch_up(&mut self, index: usize) -> Option<&mut CatchUp> {
        match &mut self.members[index].mode {
            Mode::CatchingUp(catch_up) => Some(catch_up),
            Mode::Down
            | Mode::Resting { .. }
            | Mode::Sealing
            | Mode::Sealed(_)
            | Mode::Matching(_)
            | Mode::Truncating { .. }
            | Mode::Live
            | Mode::Filling(_)
            | Mode::Parked { .. } => None,
        }
    }

    /// Sends a member what it may be sent, and asks for what it lacks.
    pub(crate) fn pump(&mut self, index: usize) {
        match self.members[index].mode {
            Mode::Live => self.pump_live(index),
            Mode::CatchingUp(_) => self.pump_catch_up(index),
            Mode::Matching(_) => self.pump_matching(index),
            Mode::Filling(_) => self.pump_filling(index),
            Mode::Down
            | Mode::Resting { .. }
            | Mode::Sealing
            | Mode::Sealed(_)
            | Mode::Truncating { .. }
            | Mode::Parked { .. } => {}
        }
    }

    fn may_append(&self, index: usize) -> bool {
        let member = &self.members[index];
        member.in_flight_records() < self.tunables.member_records_max
            && member.in_flight_bytes < self.tunables.member_bytes_max
    }

    fn pump_live(&mut self, index: usize) {
        while self.members[index].next_send <= self.log.last().seq && self.may_append(index) {
            let seq = self.members[index].next_send;
            let entry = self.log.entry(seq).expect("a live member lacks only what is in memory");
            let record = entry.record.clone();
            let media = entry.media && seq > self.log.commit();
            self.append(index, record, media);
        }
    }

    fn append(&mut self, index: usize, record: Record, media: bool) {
        let member = &mut self.members[index];
        let header = record.header();
        assert_eq!(header.position.seq, member.next_send, "no gap");
        assert_eq!(header.previous_epoch, member.sent_epoch, "records match the log they extend");
        member.sent(&record);
        let seq = header.position.seq;
        self.send(index, Kind::Append, seq.0, CommandBody::Append { record, media });
    }

    fn pump_catch_up(&mut self, index: usize) {
        let (now, base, key) = (self.now, self.log.base(), self.key);
        let Some(catch_up) = self.catch_up(index) else { return };
        if catch_up.retry_at.is_some_and(|at| at <= now) {
            catch_up.retry_at = None;
            for slot in &mut catch_up.slots {
                slot.tried = 0;
                slot.rotten = 0;
            }
        }
        while self.members[index].next_send < base && self.may_append(index) {
            let sent_epoch = self.members[index].sent_epoch;
            let Some(catch_up) = self.catch_up(index) else { return };
            let ready =
                matches!(catch_up.slots.front(), Some(Slot { state: SlotState::Ready(_), .. }));
            if !ready {
                break;
            }
            let Some(Slot { state: SlotState::Ready(record), .. }) = catch_up.slots.pop_front()
            else {
                break;
            };
            let header = record.header();
            if header.key != key || header.previous_epoch != sent_epoch {
                // The donor's log and this one part before this record: one of them is not what
                // its member promised. Compare anew.
                self.reset(index, Some(ReplicaError::Invalid));
                return;
            }
            self.append(index, record, false);
        }
        if self.members[index].next_send >= base {
            self.members[index].enter(Mode::Live, now);
            self.members[index].backoff = self.tunables.retry_min;
            self.pump_live(index);
        } else if self.fell_back(index) {
            self.reset(index, None);
        } else {
            self.ask_for_records(index, base);
        }
    }

    /// Guests write faster than we bring a member what it lacks, so that by now another member does that better.
    fn fell_back(&self, index: usize) -> bool {
        let member = &self.members[index];
        let lacks = self.log.base().0.saturating_sub(member.next_send.0);
        lacks > 2 * self.tunables.log_copy_records && self.can_fill_log(index, member.acked)
    }

    fn ask_for_records(&mut self, index: usize, base: Seq) {
        let depth = self.tunables.catch_up_depth;
        let first = self.members[index].next_send;
        let Some(catch_up) = self.catch_up(index) else { return };
        if catch_up.retry_at.is_some() {
            return;
        }
        catch_up.next_scan = catch_up.next_scan.max(first);
        while catch_up.slots.len() < depth && catch_up.next_scan < base {
            catch_up.slots.push_back(Slot { tried: 0, rotten: 0, state: SlotState::Wanted });
            catch_up.next_scan = catch_up.next_scan.next();
        }
        for place in 0..catch_up.slots.len() {
            let Some(catch_up) = self.catch_up(index) else { return };
            let slot = &catch_up.slots[place];
            let SlotState::Wanted = slot.state else { continue };
            let tried = slot.tried;
            let seq = Seq(first.0 + place as u64);
            let asked = match self.donor(seq, tried | 1 << index) {
                Some(donor) => {
                    self.scan(donor, seq, place == 0).map(|tag| SlotState::Asked { donor, tag })
                }
                None => None,
            };
            let again = self.now + self.tunables.retry_min;
            let later = self.now + self.tunables.retry_max / 4;
            let Some(catch_up) = self.catch_up(index) else { return };
            if let Some(state) = asked {
                catch_up.slots[place].state = state;
                continue;
            }
            if tried != 0 {
                // Nobody reachable can read it; a member that comes may.
                catch_up.damaged = Some(seq);
                catch_up.retry_at = Some(later.max(again));
            } else if place == 0 {
                catch_up.retry_at = Some(again);
            }
            return;
        }
    }

    pub(crate) fn scan_answered(&mut self, donor: usize, tag: u64, mut result: Answer) {
        if let Err(
            error @ (ReplicaError::NotSealed
            | ReplicaError::NoReplica
            | ReplicaError::DeviceFailed
            | ReplicaError::Disconnected),
        ) = result
            && self.members[donor].follows()
        {
            self.member_failed(donor, error);
        }
        for index in 0..self.members.len() {
            if self.matching_scanned(index, tag, &result) {
                return;
            }
            result = match self.catch_up_scanned(index, donor, tag, result) {
                Ok(()) => return,
                Err(result) => result,
            };
        }
    }

    /// Takes the answer to a scan for a member that catches up; gives it back if it is not that.
    fn catch_up_scanned(
        &mut self,
        index: usize,
        donor: usize,
        tag: u64,
        result: Answer,
    ) -> Result<(), Answer> {
        let (first, block_size) = (self.members[index].next_send, self.block_size);
        let Some(catch_up) = self.catch_up(index) else { return Err(result) };
        let asked = |slot: &Slot| matches!(slot.state, SlotState::Asked { tag: t, .. } if t == tag);
        let Some(place) = catch_up.slots.iter().position(asked) else { return Err(result) };
        let seq = Seq(first.0 + place as u64);
        let slot = &mut catch_up.slots[place];
        match result {
            Ok(ReplyBody::Record(record))
                if record.header().position.seq == seq
                    && record.header().block_size == block_size =>
            {
                slot.state = SlotState::Ready(record);
                if catch_up.damaged == Some(seq) {
                    catch_up.damaged = None;
                }
            }
            Err(ReplicaError::Trimmed { trimmed }) => {
                slot.state = SlotState::Wanted;
                slot.tried |= 1 << donor;
                let tried = slot.tried;
                let member = &mut self.members[donor];
                member.trimmed = member.trimmed.max(trimmed);
                if self.donor(seq, tried | 1 << index).is_none() {
                    self.needs_copy(index, MemberMode::TooFarBehind, true);
                }
            }
            Ok(_) | Err(_) => {
                slot.state = SlotState::Wanted;
                slot.tried |= bit(donor);
                if matches!(result, Err(ReplicaError::Damaged)) {
                    slot.rotten |= bit(donor);
                }
            }
        }
        Ok(())
    }

    /// A member's log became known to be a prefix of ours: those that wait for records may ask it.
    pub(crate) fn new_donor(&mut self) {
        let now = self.now;
        for member in &mut self.members {
            let retry_at = match &mut member.mode {
                Mode::CatchingUp(catch_up) => &mut catch_up.retry_at,
                Mode::Matching(matching) => &mut matching.retry_at,
                Mode::Down
                | Mode::Resting { .. }
                | Mode::Sealing
                | Mode::Sealed(_)
                | Mode::Truncating { .. }
                | Mode::Live
                | Mode::Filling(_)
                | Mode::Parked { .. } => continue,
            };
            if retry_at.is_some() {
                *retry_at = Some(now);
            }
        }
    }

    /// A member's session is gone: what it was asked for is asked of others.
    pub(crate) fn donor_lost(&mut self, lost: usize) {
        for member in &mut self.members {
            match &mut member.mode {
                Mode::CatchingUp(catch_up) => catch_up.donor_lost(lost),
                Mode::Matching(matching) => {
                    matching.donor_lost(lost);
                }
                Mode::Filling(filling) => filling.source_lost(lost, self.now),
                Mode::Down
                | Mode::Resting { .. }
                | Mode::Sealing
                | Mode::Sealed(_)
                | Mode::Truncating { .. }
                | Mode::Live
                | Mode::Parked { .. } => {}
            }
        }
    }
}
