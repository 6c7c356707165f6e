//! Read grants: may this head still answer reads, or has another one been opened meanwhile?
//!
//! A member that admits a command of this head delays its answer to a higher Seal for
//! [`GRANT_MS`] from then on. The head noted when it *sent* a command; if that is answered, it counts
//! on the member for [`GRANT_TRUSTED_MS`] from the sending, which is earlier on any clock. As long as
//! a write quorum of the in-sync set is trusted, no other head has a seal quorum, so nothing newer
//! than what this head knows has been acknowledged. A read's answer leaves only at such a moment.
//!
//! Not every command is timed, that would need a table: reads are (they have a slot each), of the
//! appends to a member one at a time is, and so is the latest Renew. Renew is sent when nothing else
//! renews a grant that is needed: for a read that waits, and ahead of time while reads go on. A head
//! that nobody reads from sends none.

use core::time::Duration;

use base::limits::{GRANT_MS, GRANT_TRUSTED_MS};
use base::planted::{self, Bug};
use base::{CommandBody, Instant, ReplicaError};

use crate::head::Head;
use crate::member::{Member, Mode};
use crate::sessions::Answer;
use crate::status::StallReason;
use crate::tag::Kind;

const TRUSTED: Duration = Duration::from_millis(GRANT_TRUSTED_MS);
/// A grant with less than this left is renewed ahead of time, while reads go on.
const AHEAD: Duration = Duration::from_millis(GRANT_TRUSTED_MS - GRANT_TRUSTED_MS / 3);
/// An unanswered Renew is repeated after so long: what comes later may be too late to be of use.
const REPEAT: Duration = Duration::from_millis(GRANT_TRUSTED_MS / 3);
/// How often that is looked at.
const CHECK: Duration = Duration::from_millis(GRANT_TRUSTED_MS / 15);
/// Unanswered Renews of a session, at most.
const RENEWS_MAX: u8 = 4;

const _: () = assert!(GRANT_TRUSTED_MS < GRANT_MS);

/// What a head knows of a member's grant.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Grant {
    /// The member delays a higher Seal until then at least.
    until: Instant,
    /// The latest Renew: its number, and when it was sent.
    renew: Option<(u64, Instant)>,
    /// Renews of this session that are not answered.
    unanswered: u8,
}

/// What a head knows of its grants together.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Grants {
    /// Whether grants are to be renewed ahead of time is looked at then.
    check_at: Instant,
    /// Data of a read is here and settled, but may not leave; try again then.
    pub(crate) retry_at: Option<Instant>,
}

impl Grant {
    pub(crate) const fn new() -> Self {
        Self { until: Instant::ZERO, renew: None, unanswered: 0 }
    }

    /// The session is another one. What was granted in the last one still holds: members keep
    /// grants when sessions end.
    pub(crate) fn session_over(&mut self) {
        self.renew = None;
        self.unanswered = 0;
    }

    /// A command sent at `sent` was answered as done, just now.
    pub(crate) fn learn(&mut self, sent: Instant, now: Instant) {
        let from = if planted::is(Bug::GrantFromAnswer) { now } else { sent };
        self.until = self.until.max(from + TRUSTED);
    }

    /// The member is told that it need not keep its grant.
    pub(crate) fn forget(&mut self) {
        self.until = Instant::ZERO;
        self.renew = None;
    }

    fn trusted(&self, now: Instant) -> bool {
        now < self.until
    }
}

impl Grants {
    pub(crate) const fn new() -> Self {
        Self { check_at: Instant::ZERO, retry_at: None }
    }
}

impl Member {
    /// True if it has sealed and takes commands.
    fn obeys(&self) -> bool {
        match self.mode {
            Mode::Sealed(_)
            | Mode::Matching(_)
            | Mode::Truncating { .. }
            | Mode::CatchingUp(_)
            | Mode::Live => true,
            // No session, or one that is to be sealed anew once its commands are answered; or it is
            // filled, and gets no command but Install.
            Mode::Down
            | Mode::Resting { .. }
            | Mode::Sealing
            | Mode::Filling(_)
            | Mode::Parked { .. } => false,
        }
    }
}

impl Head {
    /// True if no other head can have been opened before now.
    pub(crate) fn trusted(&self) -> bool {
        #[cfg(test)]
        if self.trusts_blindly {
            return true;
        }
        let now = self.now;
        planted::is(Bug::GrantUnchecked)
            || self.sets.write_quorum_met(self.members_where(|member| member.grant.trusted(now)))
    }

    pub(crate) fn no_grant(&self) -> StallReason {
        let trusted = self.members_where(|member| member.grant.trusted(self.now));
        let (granted, needed, _) = self.sets.shortest(trusted);
        StallReason::NoGrant { granted, needed }
    }

    /// A read begins: sees to it that the grants will be there when its data is.
    pub(crate) fn plan_renewals(&mut self) {
        if self.now < self.grants.check_at {
            return;
        }
        self.grants.check_at = self.now + CHECK;
        for index in 0..self.members.len() {
            let member = &self.members[index];
            if self.sets.counts(index) && member.grant.until.since(self.now) < AHEAD {
                self.renew(index);
            }
        }
    }

    /// Sends a Renew, unless one is under way or the member would refuse it.
    fn renew(&mut self, index: usize) {
        let now = self.now;
        let member = &self.members[index];
        let obeys = member.obeys();
        let waits = member.grant.renew.is_some_and(|(_, sent)| now < sent + REPEAT);
        if !obeys || waits || member.grant.unanswered >= RENEWS_MAX {
            return;
        }
        let number = self.next_number();
        self.send(index, Kind::Renew, number, CommandBody::Renew);
        let grant = &mut self.members[index].grant;
        grant.renew = Some((number, now));
        grant.unanswered += 1;
    }

    pub(crate) fn renew_answered(&mut self, index: usize, number: u64, result: &Answer) {
        let member = &mut self.members[index];
        member.grant.unanswered = member.grant.unanswered.saturating_sub(1);
        // One that was refused is not repeated at once: whoever refuses it may do so without delay.
        let sent = match member.grant.renew {
            Some((latest, sent)) if latest == number => Some(sent),
            Some(_) | None => None,
        };
        match result {
            Ok(_) => {
                if let Some(sent) = sent {
                    member.grant.renew = None;
                    member.grant.learn(sent, self.now);
                }
            }
            // It does not know the command: there are no grants to be had from it.
            Err(ReplicaError::Invalid) => {}
            Err(error) => {
                // A member that is still being looked at may have to be sealed anew, after a Release.
                if member.follows() || member.obeys() && *error == ReplicaError::NotSealed {
                    self.member_failed(index, *error);
                }
            }
        }
    }

    /// Asks for grants while a read waits for them.
    pub(crate) fn advance_grants(&mut self) {
        if !self.reads_ungranted() {
            self.grants.retry_at = None;
            return;
        }
        for index in 0..self.members.len() {
            let member = &self.members[index];
            if self.sets.counts(index) && !member.grant.trusted(self.now) {
                self.renew(index);
            }
        }
        if self.grants.retry_at.is_none_or(|at| at <= self.now) {
            self.grants.retry_at = Some(self.now + REPEAT);
        }
    }
}
