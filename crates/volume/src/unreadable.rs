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

use base::{Position, Seq};

use crate::head::{Head, Phase};
use crate::member::{Member, Mode};

impl Member {
    /// True if it may hold record `seq` of the head's log, whether or not it can read it.
    pub(crate) fn may_hold(&self, seq: Seq) -> bool {
        !self.heard || self.reach >= seq
    }
}

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
