//! An opening whose chosen log has a record that nobody can read. Is it acknowledged data, which is waited
//! for, or the end of a write that never counted, which may be dropped?
//!
//! What was acknowledged is at a write quorum of the set that the shard record names, and a member
//! that had a record on media and cannot show it any more says so (damaged). So if fewer members than a write
//! quorum can possibly hold the record, it was not acknowledged; nor was anything after it, since
//! acknowledgements leave in seq order and an EpochStart is written only when a write quorum holds all
//! that precedes it. The log then ends before it. Who cannot say counts as a holder: a member that has
//! not answered this head's Seal, that says it is damaged or half filled, or whose answer reached that
//! far. Why this is safe, change of members and loss of power included: decision 0020.
//!
//! Or nobody can say where a member's log parts from the chosen one, since who holds that cannot read it there. If
//! the others are a write quorum, those holders are *passed over*: the tail is chosen again as if they had not
//! answered, which any opening may do, and what only they hold is no more than what a late answer brings.

use core::time::Duration;

use base::{Position, Seq};

use crate::head::{Head, Phase};
use crate::member::{Member, Mode};
use crate::quorum::{Bits, bit};

impl Member {
    /// True if it may hold record `seq` of the head's log, whether or not it can read it.
    pub(crate) fn may_hold(&self, seq: Seq) -> bool {
        !self.heard || self.reach >= seq
    }
}

/// So long others have to hold what a member is about to forget that cannot read it.
const OTHERS_FIRST: Duration = Duration::from_secs(1);

impl Head {
    /// Ends the chosen log before a record that cannot be read and was never acknowledged.
    pub(crate) fn drop_unreadable(&mut self) {
        // Whose holders count is known for certain only while no change is open.
        if self.phase != Phase::Reconciling || self.sets.change_open() {
            return;
        }
        let Some((seq, end)) = self.unreadable_record() else { return };
        let possible = self.members_where(|member| member.may_hold(seq));
        if seq <= self.log.commit() || self.sets.write_quorum_met(possible) && !self.drops_blindly()
        {
            return;
        }
        self.cut(end);
    }

    /// A record that an in-sync member needs next and that every member which is known to hold it
    /// says is damaged; and the position before it.
    fn unreadable_record(&self) -> Option<(Seq, Position)> {
        self.members.iter().enumerate().find_map(|(index, member)| {
            let Mode::CatchingUp(catch_up) = &member.mode else { return None };
            let (seq, rotten) = catch_up.unreadable(member.next_send)?;
            let waits = member.in_sync() && member.acked.next() == seq;
            let end = Position::new(member.sent_epoch, member.acked);
            (waits && self.donor(seq, rotten | 1 << index).is_none()).then_some((seq, end))
        })
    }

    /// Chooses another tail if nobody can read the chosen log where a member's is to be compared with it, and that
    /// member with others has all that was acknowledged, and is enough to write it to.
    pub(crate) fn pass_over(&mut self) {
        if self.phase != Phase::Reconciling {
            return;
        }
        let unreadable = self.members.iter().enumerate().find_map(|(index, member)| {
            let Mode::Matching(matching) = &member.mode else { return None };
            let (seq, rotten) = matching.unreadable().filter(|_| member.in_sync())?;
            self.donor(seq, rotten | bit(index)).is_none().then_some(rotten)
        });
        let Some(rotten) = unreadable.filter(|rotten| self.suffice(*rotten)) else { return };
        let end = |member: &Member| match &member.mode {
            Mode::Matching(matching) => Some(matching.end()),
            Mode::CatchingUp(_) | Mode::Live => Some(member.acked),
            Mode::Down
            | Mode::Resting { .. }
            | Mode::Sealing
            | Mode::Sealed(_)
            | Mode::Truncating { .. }
            | Mode::Filling(_)
            | Mode::Parked { .. } => None,
        };
        let others = self.members.iter().enumerate();
        let others = others.filter(|(slot, member)| member.in_sync() && rotten & bit(*slot) == 0);
        let reach = others.filter_map(|(_, member)| end(member)).max();
        if reach.is_some_and(|reach| reach >= self.log.commit()) {
            self.seal_again();
            self.passed_over = rotten;
        }
    }

    /// True if the members in sync that have answered are a write quorum without those. So they are a
    /// seal quorum, and hold everything that was acknowledged; what cannot read its own
    /// log may have had to forget something, and does not count.
    pub(crate) fn suffice(&self, without: Bits) -> bool {
        let sealed = |member: &Member| match member.mode {
            Mode::Sealed(_) | Mode::Matching(_) | Mode::CatchingUp(_) | Mode::Live => true,
            Mode::Down
            | Mode::Resting { .. }
            | Mode::Sealing
            | Mode::Truncating { .. }
            | Mode::Filling(_)
            | Mode::Parked { .. } => false,
        };
        let others = self.members_where(|member| sealed(member) && !member.doubted);
        self.sets.write_quorum_met(others & !without)
    }

    /// A member that cannot read the end of its log is about to forget it, though it may be the chosen log's: true
    /// while others could come to hold that at a write quorum, and so this opening to its end, and have had little
    /// time. Until then it may be one of few copies, and the other be lost before this one is made anew.
    pub(crate) fn others_first(&self, index: usize) -> bool {
        let opening = match self.phase {
            Phase::Sealing { .. } | Phase::Reconciling | Phase::Starting => true,
            Phase::Serving | Phase::Releasing { .. } | Phase::Ended(_) => false,
        };
        let member = &self.members[index];
        let others = self.members_where(Member::in_sync) & !bit(index);
        let enough = self.sets.write_quorum_met(others);
        opening && member.in_sync() && enough && self.now < member.since + OTHERS_FIRST
    }

    /// The log ends at `end` from now on; members that hold more are sealed again, and truncate it.
    fn cut(&mut self, end: Position) {
        self.log.follow(end, self.log.commit());
        self.cut = true;
        for index in 0..self.members.len() {
            let member = &self.members[index];
            let again = match &member.mode {
                Mode::CatchingUp(_) => member.next_send > end.seq.next(),
                Mode::Filling(filling) => !filling.copies_chunks(),
                Mode::Sealed(_) | Mode::Matching(_) | Mode::Truncating { .. } | Mode::Live => true,
                Mode::Down | Mode::Resting { .. } | Mode::Sealing | Mode::Parked { .. } => false,
            };
            if again {
                self.reset(index, None);
            }
        }
        self.wake_members();
    }

    #[cfg(not(test))]
    #[expect(clippy::unused_self, reason = "tests plant a bug here")]
    fn drops_blindly(&self) -> bool {
        false
    }

    #[cfg(test)]
    fn drops_blindly(&self) -> bool {
        self.drops_blindly
    }
}
