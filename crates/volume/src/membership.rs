//! Changes of the shard's members while the head runs.

use base::limits::MEMBERS_MAX;
use base::membership::ShardRecord;
use base::planted::{self, Bug};
use base::{Instant, Role, ServerId};

use crate::head::{Head, Output, Phase};
use crate::member::{Member, Mode};
use crate::quorum::{Bits, Sets, bit};
use crate::status::HeadPhase;

/// Why a head does not agree to a change of the in-sync set. Nothing was begun; the cluster store
/// must not be asked to make the change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MembershipError {
    /// The record is another shard's.
    #[error("the shard record is not that of this volume: read it again from the cluster store")]
    WrongShard,
    /// The head has ended, or is about to.
    #[error("this head is ending: ask the volume's next head")]
    Ending,
    /// The opening has not got far enough.
    #[error(
        "the volume is being opened and no log was chosen yet: try again when more of its members \
         answer"
    )]
    NotOpen,
    /// Another change is open.
    #[error(
        "another change of members is open: find out what the cluster store says and tell the head \
         (members_changed) first"
    )]
    ChangeOpen,
    /// More than one member would enter, or more than one leave.
    #[error("{0} members would enter or leave the in-sync set at once: change one at a time")]
    TooMany(usize),
    /// Nobody would be in sync.
    #[error("no member would be in sync: add another copy and let it catch up first")]
    LastCopy,
    /// A member is to count that the head has no session with.
    #[error("server {0} is not a member: add it as one that catches up first")]
    Unknown(ServerId),
    /// A member is to count that does not hold all that is acknowledged.
    #[error("server {0} does not hold all that was acknowledged: wait until it has caught up")]
    NotCaughtUp(ServerId),
    /// Too few members of the new set hold all that is acknowledged.
    #[error(
        "{have} of {of} members that would be in sync hold all that was acknowledged, {needed} are \
         needed: wait until more have caught up"
    )]
    NoQuorum {
        /// Members of the new set that do.
        have: usize,
        /// Its write quorum.
        needed: usize,
        /// Its members.
        of: usize,
    },
    /// What is settled is not yet on media where the new set needs it.
    #[error("members are still putting acknowledged data on media: try again in a moment")]
    NotSettled,
    /// More members than a head can serve.
    #[error("{0} members are more than the {MEMBERS_MAX} that are supported")]
    TooManyMembers(usize),
    /// Two members on one server.
    #[error("server {0} is named twice among the members")]
    DuplicateServer(ServerId),
}

/// Why a head ended itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FailStop {
    /// [`Head::members_changed`] was told of an in-sync set that this head never agreed to: records
    /// that it acknowledged may not be where the next opening looks for them.
    #[error(
        "the cluster store names an in-sync set that this head did not agree to; open the volume \
         again, and find out who changed its members"
    )]
    UnknownInSyncSet,
    /// It was told of a record that cannot be its shard's.
    #[error("the cluster store's shard record is not valid: {0}")]
    InvalidRecord(MembershipError),
}

impl Head {
    /// Begins a change of the in-sync set to that of `shard`, or refuses. Once begun, everything
    /// that counts members needs its quorum in both sets; *then* the caller asks the cluster
    /// store to replace the record (conditional on the old one and on this head's epoch), finds out
    /// for certain what came of it, and says so with [`Head::members_changed`].
    ///
    /// One member may enter the in-sync set, one may leave it, or one may take another's place. A
    /// member that enters must follow and hold all that is acknowledged, and so must a write quorum
    /// of the new set. A head that
    /// is opening agrees once it has chosen a log and the same holds of that.
    ///
    /// A record with the same in-sync set needs no agreement: `Ok`, and nothing begins. The head may
    /// have outputs afterwards.
    pub fn change_members(
        &mut self,
        now: Instant,
        shard: &ShardRecord,
    ) -> Result<(), MembershipError> {
        self.now = self.now.max(now);
        match self.phase {
            Phase::Sealing { .. } => return Err(MembershipError::NotOpen),
            Phase::Releasing { until: Some(_) } | Phase::Ended(_) => {
                return Err(MembershipError::Ending);
            }
            // A head that is released may still wait for a quorum to finish what it accepted.
            Phase::Reconciling
            | Phase::Starting
            | Phase::Serving
            | Phase::Releasing { until: None } => {}
        }
        let new = self.set_of(shard)?;
        if self.sets.change_open() {
            let same = new != self.sets.old() && self.sets.names(new);
            return if same { Ok(()) } else { Err(MembershipError::ChangeOpen) };
        }
        if new == self.sets.old() {
            return Ok(());
        }
        let agreed = self.may_become(new);
        if agreed.is_ok() {
            self.sets.open(new);
        }
        self.advance();
        agreed
    }

    /// The cluster store's record, still of this head's epoch, is now `shard`: ends a change that is
    /// open, whichever of the two sets it names, and adopts the members that came and went. The
    /// caller keeps a session to each member that [`base::Role::is_served`]: it says
    /// [`crate::Input::MemberUp`] for those that came after this call, and need say nothing of those
    /// that went.
    ///
    /// An in-sync set that this head did not agree to ends it: [`crate::Output::Failed`].
    pub fn members_changed(&mut self, now: Instant, shard: &ShardRecord) {
        self.now = self.now.max(now);
        if let Phase::Ended(_) = self.phase {
            return;
        }
        let set = match self.set_of(shard) {
            Ok(set) if self.sets.names(set) => set,
            Ok(_) | Err(MembershipError::Unknown(_)) => {
                return self.fail(FailStop::UnknownInSyncSet);
            }
            Err(error) => return self.fail(FailStop::InvalidRecord(error)),
        };
        self.sets.close(set);
        self.adopt_members(shard);
        self.advance();
    }

    /// The in-sync set that a record names.
    fn set_of(&self, shard: &ShardRecord) -> Result<Bits, MembershipError> {
        if shard.volume != self.key.volume || shard.shard != self.key.shard {
            return Err(MembershipError::WrongShard);
        }
        let served = shard.members.iter().filter(|member| member.role.is_served());
        let count = served.clone().count();
        if count > MEMBERS_MAX {
            return Err(MembershipError::TooManyMembers(count));
        }
        let mut set = 0;
        for (index, member) in served.clone().enumerate() {
            let server = member.server;
            if served.clone().take(index).any(|other| other.server == server) {
                return Err(MembershipError::DuplicateServer(server));
            }
            if member.role == Role::InSync {
                set |= bit(self.member_index(server).ok_or(MembershipError::Unknown(server))?);
            }
        }
        if set == 0 { Err(MembershipError::LastCopy) } else { Ok(set) }
    }

    /// Whether the in-sync set may become `new` by now.
    ///
    /// Everything acknowledged must be at a write quorum of the new set, everything settled on
    /// media at one, before the cluster store may name it: the next opening asks only that set's
    /// seal quorum. What is acknowledged from here on will be at quorums of both. Members that
    /// stay need not all be there, or two dead ones of five could not be taken out one by one; a member
    /// that enters must, lest one that is still being filled count.
    fn may_become(&mut self, new: Bits) -> Result<(), MembershipError> {
        let old = self.sets.old();
        let (entering, leaving) = (new & !old, old & !new);
        if entering.count_ones() > 1 || leaving.count_ones() > 1 {
            let changed = usize::try_from((old ^ new).count_ones());
            return Err(MembershipError::TooMany(changed.unwrap_or(MEMBERS_MAX)));
        }
        // While an opening has not come so far: all that it found may have been acknowledged.
        let acknowledged = self.log.commit().max(self.log.tail().seq);
        let hold = self.holders(acknowledged, false);
        if entering & hold != entering && !planted::is(Bug::PromotedTooEarly) {
            let slot = usize::try_from(entering.trailing_zeros()).expect("a small number");
            return Err(MembershipError::NotCaughtUp(self.members[slot].server));
        }
        let set = Sets::of(new);
        if !set.write_quorum_met(hold) && !planted::is(Bug::PromotedTooEarly) {
            let (have, needed, of) = set.shortest(hold);
            return Err(MembershipError::NoQuorum { have, needed, of });
        }
        let settled = self.log.durable;
        let hold = self.holders(settled, true);
        if (entering & hold != entering || !set.write_quorum_met(hold))
            && !planted::is(Bug::PromotedTooEarly)
        {
            self.settle_everywhere = Some(settled);
            return Err(MembershipError::NotSettled);
        }
        Ok(())
    }

    /// Makes the members those that the record names.
    fn adopt_members(&mut self, shard: &ShardRecord) {
        for slot in 0..self.members.len() {
            let (server, role) = (self.members[slot].server, self.members[slot].role);
            if !role.is_served() {
                continue; // a free slot
            }
            let named = shard.members.iter().find(|member| member.server == server);
            match named.map(|member| member.role).filter(|role| role.is_served()) {
                Some(now) if now != role => self.change_role(slot, now),
                Some(_) => {}
                None => self.remove_member(slot),
            }
        }
        for member in shard.members.iter().filter(|member| member.role.is_served()) {
            if self.member_index(member.server).is_none() {
                self.add_member(member.server, member.role);
            }
        }
    }

    fn change_role(&mut self, slot: usize, role: Role) {
        let member = &mut self.members[slot];
        member.role = role;
        match member.mode {
            // What is to be done about it depends on its role: ask how it is.
            Mode::Parked { .. } | Mode::Filling(_) => self.reset(slot, None),
            Mode::Down
            | Mode::Resting { .. }
            | Mode::Sealing
            | Mode::Sealed(_)
            | Mode::Matching(_)
            | Mode::Truncating { .. }
            | Mode::CatchingUp(_)
            | Mode::Live => {}
        }
        self.reads.retry();
    }

    fn remove_member(&mut self, slot: usize) {
        self.member_down(self.members[slot].server);
        for member in &mut self.members {
            match &mut member.mode {
                Mode::Matching(matching) => matching.forget_donor(slot),
                Mode::CatchingUp(catch_up) => catch_up.forget_donor(slot),
                Mode::Filling(filling) => filling.forget_source(slot),
                Mode::Down
                | Mode::Resting { .. }
                | Mode::Sealing
                | Mode::Sealed(_)
                | Mode::Truncating { .. }
                | Mode::Live
                | Mode::Parked { .. } => {}
            }
        }
        self.reads.forget_member(slot);
        self.members[slot].role = Role::Leaving;
    }

    fn add_member(&mut self, server: ServerId, role: Role) {
        let member = Member::new(server, role, self.now, self.tunables.retry_min);
        match self.members.iter().position(|member| !member.role.is_served()) {
            Some(slot) => self.members[slot] = member,
            None => self.members.push(member),
        }
        assert!(self.members.len() <= MEMBERS_MAX, "served members are bounded");
    }

    fn fail(&mut self, reason: FailStop) {
        self.end(HeadPhase::Failed { reason }, Output::Failed { reason });
    }
}
