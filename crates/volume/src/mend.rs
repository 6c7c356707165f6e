//! Mending: blocks that one member cannot read are made whole with another's copy, by writing what
//! they hold once more. The copy travels as a record like any other, so its seq decides between it and
//! every other write, at every member and whatever fails; members need no command for it, and one
//! that was away gets it with its log. What must not happen is that something newer is overwritten with it:
//! the head is the only writer, so it looks, at the moment at which it gives the record its seq, whether any
//! record has touched the range since before the copy was asked for. If so the copy is dropped.
//!
//! Damage is heard of from reads that a member answered so, and from scrubs (a state message). One range is
//! mended at a time, few in a second. A range that is found damaged again soon after it was mended is
//! left alone: there is something wrong with the member that writing does not cure.

use std::collections::VecDeque;

use base::limits::{HEAD_REQUESTS_MAX, PAYLOAD_BYTES_MAX};
use base::planted::{self, Bug};
use base::{BlockCount, Buffer, CommandBody, Instant, Lba, RecordKind, ReplyBody, Seq, ServerId};
use core::time::Duration;

use crate::head::{Head, Output, Phase};
use crate::inflight::NewRecord;
use crate::member::Mode;
use crate::quorum::{Bits, bit};
use crate::sessions::Answer;
use crate::tag::Kind;

/// Ranges that wait; what is beyond is found again by the next read or scrub.
const WANTED_MAX: usize = 64;
/// Ranges that are remembered as mended.
const RECENT_MAX: usize = 64;
/// From the beginning of one to that of the next: at most 1.25 MiB/s for each shard.
const EVERY: Duration = Duration::from_millis(100);
/// What is damaged again so soon was not cured by writing.
const AGAIN: Duration = Duration::from_mins(10);
/// Writes that come between, before a range is left to the next that finds it.
const TRIES_MAX: u8 = 8;

/// Blocks that a member cannot read.
#[derive(Clone, Copy, Debug)]
struct Damage {
    server: ServerId,
    lba: Lba,
    blocks: BlockCount,
}

/// What is done about them.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// A member is to be asked, when it is time.
    Wait,
    /// Asked `member`, when `seen` was the newest record that touches the range.
    Reading { member: usize, tag: u64, seen: Seq },
    /// Written again as `seq`.
    Writing { seq: Seq },
}

#[derive(Clone, Copy, Debug)]
struct Mending {
    damage: Damage,
    /// Members that could not read it either.
    failed: Bits,
    tries: u8,
    step: Step,
}

/// All that is to be mended.
#[derive(Debug)]
pub(crate) struct Mends {
    wanted: VecDeque<Damage>,
    current: Option<Mending>,
    next_at: Instant,
    recent: VecDeque<(Instant, Damage)>,
    /// Blocks mended.
    pub(crate) blocks: u64,
}

impl Mends {
    pub(crate) fn new() -> Self {
        Self {
            wanted: VecDeque::new(),
            current: None,
            next_at: Instant::ZERO,
            recent: VecDeque::new(),
            blocks: 0,
        }
    }

    /// True if it is known already, or was mended a moment ago.
    fn knows(&self, damage: &Damage, now: Instant) -> bool {
        let same = |other: &Damage| {
            other.server == damage.server
                && other.lba == damage.lba
                && other.blocks == damage.blocks
        };
        self.wanted.iter().any(same)
            || self.current.is_some_and(|current| same(&current.damage))
            || self.recent.iter().any(|(at, other)| same(other) && *at + AGAIN > now)
    }
}

impl Head {
    /// A member cannot read some blocks that it holds.
    pub(crate) fn note_damage(&mut self, index: usize, lba: Lba, blocks: BlockCount) {
        #[cfg(test)]
        if self.mends_nothing {
            return;
        }
        let member = &self.members[index];
        let inside = lba.checked_add(blocks).is_some_and(|end| end.0 <= self.size.served);
        // One that is to be filled gets other data anyway. One that is on its way is told of while
        // the head still opens: what it lacks comes with its log.
        let is_lost = match member.mode {
            Mode::Filling(_) | Mode::Parked { .. } => true,
            Mode::Down
            | Mode::Resting { .. }
            | Mode::Sealing
            | Mode::Sealed(_)
            | Mode::Matching(_)
            | Mode::Truncating { .. }
            | Mode::CatchingUp(_)
            | Mode::Live => false,
        };
        if blocks.0 == 0 || !inside || is_lost || self.policy.read_only {
            return;
        }
        let most = u64::try_from(PAYLOAD_BYTES_MAX).expect("small") >> self.block_size.log2();
        let most = u32::try_from(most).expect("small");
        let mut done = 0;
        while done < blocks.0 && self.mends.wanted.len() < WANTED_MAX {
            let piece = BlockCount((blocks.0 - done).min(most));
            let lba = Lba(lba.0 + u64::from(done));
            let damage = Damage { server: member.server, lba, blocks: piece };
            if !self.mends.knows(&damage, self.now) {
                self.mends.wanted.push_back(damage);
            }
            done += piece.0;
        }
    }

    pub(crate) fn mends_deadline(&self) -> Option<Instant> {
        let waits = match &self.mends.current {
            None => !self.mends.wanted.is_empty(),
            Some(current) => matches!(current.step, Step::Wait),
        };
        (waits && self.phase == Phase::Serving).then_some(self.mends.next_at)
    }

    /// Begins, goes on with, or ends a mending.
    pub(crate) fn advance_mends(&mut self) {
        if let Some(Mending { damage, step: Step::Writing { seq }, .. }) = self.mends.current
            && seq <= self.log.commit()
        {
            self.mends.current = None;
            self.mends.blocks += u64::from(damage.blocks.0);
            if self.mends.recent.len() == RECENT_MAX {
                self.mends.recent.pop_front();
            }
            self.mends.recent.push_back((self.now, damage));
            let Damage { server, lba, blocks } = damage;
            self.outputs.push_back(Output::Mended { server, lba, blocks });
        }
        if self.mends_deadline().is_none_or(|at| at > self.now) {
            return;
        }
        self.mends.next_at = self.now + EVERY;
        if self.mends.current.is_none() {
            let next = self.mends.wanted.pop_front();
            self.mends.current =
                next.map(|damage| Mending { damage, failed: 0, tries: 0, step: Step::Wait });
        }
        self.ask_for_copy();
    }

    /// Asks the best other member for what the damaged blocks hold.
    fn ask_for_copy(&mut self) {
        let Some(mut current) = self.mends.current else { return };
        let Damage { server, lba, blocks } = current.damage;
        let own = self.member_index(server).map_or(0, bit);
        let seen = self.newest.touching(lba, blocks);
        // What is undecided must not be taken for the content, and will mend the blocks itself.
        if seen <= self.log.commit() {
            let covers = self.covers(lba, blocks);
            let Some(member) = self.reader(covers, own | current.failed) else {
                // Nobody has it now. Soon somebody may: a head that has just opened hears of damage
                // before all members follow.
                return self.try_later(current);
            };
            let bytes = usize::try_from(blocks.bytes(self.block_size)).expect("bounded");
            if let Some(buffer) = self.buffers.take(bytes) {
                let number = self.next_number();
                let body = CommandBody::Read { lba, blocks, covers, buffer };
                let tag = self.send(member, Kind::Mend, number, body);
                current.step = Step::Reading { member, tag, seen };
                self.mends.current = Some(current);
                return;
            }
        }
        self.try_later(current);
    }

    fn try_later(&mut self, mut current: Mending) {
        current.tries += 1;
        current.step = Step::Wait;
        self.mends.current = (current.tries < TRIES_MAX).then_some(current);
    }

    pub(crate) fn copy_answered(&mut self, index: usize, tag: u64, result: Answer) {
        let Some(mut current) = self.mends.current else { return };
        let Step::Reading { tag: asked, seen, .. } = current.step else { return };
        if asked != tag {
            return;
        }
        let bytes = current.damage.blocks.bytes(self.block_size);
        match result {
            Ok(ReplyBody::Data(data)) if data.len() as u64 == bytes => {
                self.write_copy(current, data, seen);
            }
            Ok(_) | Err(_) => {
                current.failed |= bit(index);
                self.try_later(current);
            }
        }
    }

    /// Writes the copy, unless something has touched the range meanwhile.
    fn write_copy(&mut self, mut current: Mending, data: Buffer, seen: Seq) {
        let Damage { lba, blocks, .. } = current.damage;
        let newest = self.newest.touching(lba, blocks);
        let untouched = newest == seen && newest <= self.log.commit();
        let room = self.log.undecided() < HEAD_REQUESTS_MAX && self.phase == Phase::Serving;
        if !room || !untouched && !planted::is(Bug::MendedOverNewer) {
            return self.try_later(current);
        }
        let Ok(buffer) = self.writable(data) else { return self.try_later(current) };
        let new = NewRecord { kind: RecordKind::Write, lba, blocks, fua: false };
        let seq = self.push_record(self.now, None, new, buffer);
        current.step = Step::Writing { seq };
        self.mends.current = Some(current);
    }

    /// A member's session is gone, and with it the copy that it was asked for.
    pub(crate) fn copy_lost(&mut self, lost: usize) {
        if let Some(current) = self.mends.current
            && matches!(current.step, Step::Reading { member, .. } if member == lost)
        {
            self.try_later(current);
        }
    }
}
