//! Sessions of members: up, sealed, reset, parked, down; and where their answers go.

use base::{CommandBody, Instant, ReplicaError, ReplicaState, ReplyBody, Seq, ServerId};

use crate::head::{Head, Output, Phase};
use crate::member::{Farewell, Member, Mode};
use crate::status::{HeadPhase, MemberMode};
use crate::tag::{Kind, parse};

/// What a member answered to a command.
pub(crate) type Answer = Result<ReplyBody, ReplicaError>;

impl Head {
    /// The slot of the member on `server`.
    pub(crate) fn member_index(&self, server: ServerId) -> Option<usize> {
        let is = |member: &Member| member.server == server && member.role.is_served();
        self.members.iter().position(is)
    }

    pub(crate) fn member_up(&mut self, server: ServerId) {
        let Some(index) = self.member_index(server) else { return };
        if self.members[index].connected {
            self.member_down(server);
        }
        let (now, backoff, session) = (self.now, self.tunables.retry_min, self.next_session());
        let member = &mut self.members[index];
        member.connected = true;
        member.begin_session(session);
        member.backoff = backoff;
        member.told_commit = Seq::ZERO;
        member.farewell = Farewell::None;
        member.fills_refused = false;
        member.health.session_up(now);
        member.enter(Mode::Resting { error: None, until: now }, now);
    }

    pub(crate) fn member_down(&mut self, server: ServerId) {
        let Some(index) = self.member_index(server) else { return };
        let (now, session) = (self.now, self.next_session());
        let member = &mut self.members[index];
        if !member.connected {
            return;
        }
        let unanswered = member.outstanding > 0;
        member.connected = false;
        member.begin_session(session);
        member.health.session_down(now, unanswered);
        member.enter(Mode::Down, now);
        self.ask_others(index);
    }

    /// Nothing that this member was asked for will come.
    fn ask_others(&mut self, lost: usize) {
        self.reads_lost(lost);
        self.copy_lost(lost);
        self.donor_lost(lost);
    }

    /// Ends what the head was doing with a member and starts over with a Seal, after a wait that
    /// doubles if `error` says that something went wrong.
    pub(crate) fn reset(&mut self, index: usize, error: Option<ReplicaError>) {
        let (now, retry_max) = (self.now, self.tunables.retry_max);
        let member = &mut self.members[index];
        let until = if error.is_some() { now + member.backoff } else { now };
        if error.is_some() {
            member.health.failed();
            member.backoff = (member.backoff * 2).min(retry_max);
        }
        member.enter(Mode::Resting { error, until }, now);
    }

    /// Takes a member out of use, until `retry_max` from now if `again`.
    pub(crate) fn park(&mut self, index: usize, why: MemberMode, again: bool) {
        let until = again.then(|| self.now + self.tunables.retry_max);
        let now = self.now;
        self.members[index].enter(Mode::Parked { why, until }, now);
    }

    /// What an unexpected answer means for its member.
    pub(crate) fn member_failed(&mut self, index: usize, error: ReplicaError) {
        match error {
            ReplicaError::NoReplica | ReplicaError::DeviceFailed => {
                self.park(index, MemberMode::Failed(error), true);
            }
            ReplicaError::Superseded { .. }
            | ReplicaError::NotSealed
            | ReplicaError::OutOfOrder { .. }
            | ReplicaError::Behind { .. }
            | ReplicaError::Trimmed { .. }
            | ReplicaError::Filling
            | ReplicaError::NoSpace
            | ReplicaError::Damaged
            | ReplicaError::Invalid
            | ReplicaError::Disconnected => self.reset(index, Some(error)),
        }
    }

    /// Seals at members whose wait is over, and that are done with what they were sent in a former life, or have had
    /// time for it. Commands reach a member in order, so that the Seal's answer says what came of them.
    pub(crate) fn wake_members(&mut self) {
        let now = self.now;
        for index in 0..self.members.len() {
            let member = &self.members[index];
            if member.seal_at().is_none_or(|at| at > now) {
                continue;
            }
            if member.outstanding > 0 {
                let session = self.next_session();
                self.members[index].begin_session(session);
                self.ask_others(index);
            }
            let number = self.next_number();
            self.send(index, Kind::Seal, number, CommandBody::Seal);
            self.members[index].enter(Mode::Sealing, now);
        }
    }

    pub(crate) fn reply(&mut self, server: ServerId, tag: u64, result: Answer) {
        let Some(index) = self.member_index(server) else { return };
        let member = &mut self.members[index];
        if !member.connected {
            return;
        }
        let Some((kind, number)) = parse(tag, member.session) else { return };
        member.outstanding = member.outstanding.saturating_sub(1);
        member.outliving = member.outliving.saturating_sub(usize::from(kind.outlives_a_seal()));
        member.health.heard(self.now);
        if let Err(ReplicaError::Superseded { sealed }) = result
            && sealed > self.epoch
        {
            self.superseded(sealed);
            return;
        }
        match kind {
            Kind::Seal => self.seal_answered(index, &result),
            Kind::Append => {
                self.append_timed(index, tag, result.is_ok());
                self.append_answered(index, number, &result);
            }
            Kind::Read => self.read_answered(index, tag, number, result),
            Kind::Flush => self.flush_answered(index, &result),
            Kind::Mend => self.copy_answered(index, tag, result),
            Kind::Scan => self.scan_answered(index, tag, result),
            Kind::Truncate => self.truncate_answered(index, &result),
            Kind::Trim => self.trim_answered(index, &result),
            Kind::Release => self.members[index].release_answered(number),
            Kind::Install => self.install_answered(index, &result),
            Kind::Renew => self.renew_answered(index, number, &result),
            Kind::Hello => self.hello_answered(index, &result),
            Kind::Grow => self.grow_answered(index, number, &result),
            Kind::HealthOf => self.health_answered(number, &result),
        }
    }

    pub(crate) fn superseded(&mut self, sealed: base::Epoch) {
        self.end(HeadPhase::Superseded { sealed }, Output::Superseded { sealed });
    }

    fn seal_answered(&mut self, index: usize, result: &Answer) {
        if !matches!(self.members[index].mode, Mode::Sealing) {
            return;
        }
        match result {
            Ok(ReplyBody::Sealed(state)) => self.sealed(index, *state),
            Ok(_) => self.member_failed(index, ReplicaError::Invalid),
            Err(error) => self.member_failed(index, *error),
        }
    }

    fn sealed(&mut self, index: usize, state: ReplicaState) {
        let newest = state.sealed.max(state.last.epoch);
        if newest > self.epoch {
            self.superseded(newest);
            return;
        }
        let now = self.now;
        self.say_hello(index);
        self.learn_size(index, state.blocks);
        self.members[index].trimmed = state.trimmed;
        self.members[index].damaged = state.damaged;
        self.members[index].heard = !state.filling && !state.damaged;
        if state.filling || state.damaged {
            // What it says of its log is less than what it acknowledged: no opening may count on it.
            let why = if state.filling { MemberMode::Filling } else { MemberMode::Damaged };
            return self.needs_copy(index, why, false);
        }
        let member = &mut self.members[index];
        member.reach = member.reach.max(state.last.seq);
        member.end = member.end.max(state.last);
        member.enter(Mode::Sealed(state), now);
        match self.phase {
            Phase::Sealing { .. } => {}
            Phase::Reconciling if self.better_tail(index, state) => self.seal_again(),
            Phase::Reconciling | Phase::Starting | Phase::Serving | Phase::Releasing { .. } => {
                self.match_member(index, state);
            }
            Phase::Ended(_) => unreachable!("an ended head takes no answers"),
        }
    }

    fn trim_answered(&mut self, index: usize, result: &Answer) {
        if !self.members[index].follows() {
            return;
        }
        match result {
            Ok(_) => {}
            Err(error) => self.member_failed(index, *error),
        }
    }

    /// Sends commit news that nothing carried for a while.
    pub(crate) fn send_commit_news(&mut self) {
        if self.trim_at.is_none_or(|at| at > self.now) {
            return;
        }
        self.trim_at = None;
        for index in 0..self.members.len() {
            let member = &self.members[index];
            if !member.follows() || member.told_commit >= self.log.durable.min(member.acked) {
                continue;
            }
            let due = member.told_at + self.tunables.trim_delay;
            if due <= self.now {
                let number = self.next_number();
                self.send(index, Kind::Trim, number, CommandBody::Trim);
            } else {
                self.trim_at = base::time::earliest(self.trim_at, Some(due));
            }
        }
    }

    /// Commit news for a member may have come up: sees to it that it gets there.
    pub(crate) fn plan_commit_news(&mut self) {
        let due = self.now + self.tunables.trim_delay;
        self.trim_at.get_or_insert(due);
    }
}

impl Member {
    /// When it is to be sealed anew.
    fn seal_at(&self) -> Option<Instant> {
        let until = match &self.mode {
            Mode::Resting { until, .. } => Some(*until),
            Mode::Parked { until, .. } => *until,
            Mode::Down
            | Mode::Sealing
            | Mode::Sealed(_)
            | Mode::Matching(_)
            | Mode::Truncating { .. }
            | Mode::CatchingUp(_)
            | Mode::Live
            | Mode::Filling(_) => None,
        };
        Some(until?.max(self.free_at()?))
    }

    /// When something is to be done about this member.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        match &self.mode {
            Mode::Resting { .. } | Mode::Parked { .. } => self.seal_at(),
            Mode::Matching(matching) => matching.retry_at,
            Mode::CatchingUp(catch_up) => catch_up.retry_at,
            Mode::Filling(filling) => Some(filling.at().max(self.free_at()?)),
            Mode::Down | Mode::Sealing | Mode::Sealed(_) | Mode::Truncating { .. } | Mode::Live => {
                None
            }
        }
    }
}
