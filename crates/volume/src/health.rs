//! What is known of a member beyond its log: for how long it has been silent, what its server says of
//! itself in state messages, and what other servers say of it. A silent member's server may be
//! well and only out of this head's reach, so the other members' servers are asked before anybody
//! takes it for lost.

use core::time::Duration;

use base::time::earliest;
use base::{
    CommandBody, DegradedReason, Health, HelloReason, Instant, ReplyBody, ServerId, StateMessage,
};

use crate::head::Head;
use crate::member::Member;
use crate::sessions::Answer;
use crate::status::Draining;
use crate::tag::Kind;

/// Others are asked about a member that has been silent for so long.
const SILENT_AFTER: Duration = Duration::from_secs(1);
/// How often, at first,
const ASK_EVERY: Duration = Duration::from_secs(1);
/// and once it has been silent for [`LONG_SILENT`].
const ASK_EVERY_LONG: Duration = Duration::from_secs(10);
const LONG_SILENT: Duration = Duration::from_mins(1);
/// A session that ends with commands unanswered for so long ended by silence.
const TIMEOUT_AFTER: Duration = Duration::from_millis(500);

/// What is known of a member beyond its log.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MemberHealth {
    /// Since when it has answered nothing.
    pub(crate) down_since: Option<Instant>,
    pub(crate) others_say: Option<Health>,
    pub(crate) draining: Option<Draining>,
    pub(crate) degraded: Option<DegradedReason>,
    pub(crate) throttled: Option<u64>,
    /// Why the next session is begun.
    pub(crate) hello: HelloReason,
    /// When it last answered something.
    heard_at: Instant,
    /// The last round in which others were asked about it.
    asked_in: u32,
    /// The best that they have said in it.
    saying: Option<Health>,
}

/// Questions about silent members. Asked in rounds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Polls {
    round: u32,
    /// The next round begins then.
    at: Instant,
}

impl MemberHealth {
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            down_since: Some(now),
            others_say: None,
            draining: None,
            degraded: None,
            throttled: None,
            hello: HelloReason::Fresh,
            heard_at: now,
            asked_in: 0,
            saying: None,
        }
    }

    /// A new session: what was said in the last one is over, until it is said again.
    pub(crate) fn session_up(&mut self, now: Instant) {
        self.heard_at = now;
        if self.draining.is_some() {
            self.hello = HelloReason::Told;
        }
        self.draining = None;
        self.degraded = None;
        self.throttled = None;
    }

    /// Its session ended, with commands `unanswered` or not.
    pub(crate) fn session_down(&mut self, now: Instant, unanswered: bool) {
        self.down_since.get_or_insert(now);
        let silent = unanswered && now.since(self.heard_at) >= TIMEOUT_AFTER;
        self.hello = if silent { HelloReason::Timeout } else { HelloReason::IoError };
    }

    /// It failed a command, and is to be sealed anew in the same session.
    pub(crate) fn failed(&mut self) {
        self.hello = HelloReason::IoError;
    }

    /// It has answered.
    pub(crate) fn heard(&mut self, now: Instant) {
        self.heard_at = now;
        if self.down_since.take().is_some() {
            self.others_say = None;
            self.saying = None;
        }
    }

    fn silent_at(&self) -> Option<Instant> {
        self.down_since.map(|since| since + SILENT_AFTER)
    }
}

impl Polls {
    pub(crate) const fn new() -> Self {
        Self { round: 0, at: Instant::ZERO }
    }
}

/// Of two servers that say different things, one that hears a member is right.
const fn weight(health: Health) -> u8 {
    match health {
        Health::Unknown => 0,
        Health::Silent => 1,
        Health::Degraded => 2,
        Health::Healthy => 3,
    }
}

impl Head {
    /// A member's server says something about itself.
    pub(crate) fn state_message(&mut self, server: ServerId, message: StateMessage) {
        let Some(index) = self.member_index(server) else { return };
        let now = self.now;
        let health = &mut self.members[index].health;
        match message {
            StateMessage::Superseded { epoch } => {
                if epoch > self.epoch {
                    self.superseded(epoch);
                }
            }
            StateMessage::Draining { deadline_ms, successor } => {
                let until = now + Duration::from_millis(deadline_ms);
                let successor = (!successor.is_nil()).then_some(successor);
                health.draining = Some(Draining { until, successor });
            }
            StateMessage::Degraded { reason } => health.degraded = Some(reason),
            StateMessage::DamagedBlocks { lba, blocks } => self.note_damage(index, lba, blocks),
            StateMessage::Throttled { bytes_per_second } => {
                health.throttled = (bytes_per_second > 0).then_some(bytes_per_second);
            }
            StateMessage::Back => {
                health.draining = None;
                health.degraded = None;
            }
            StateMessage::InSync => {
                if let Some(filling) = self.filling(index) {
                    filling.ask_now(now);
                }
            }
            // The head sees a filling's progress by itself; which servers could take a lost
            // member's place, and the size, are in the records.
            StateMessage::CatchingUp { .. }
            | StateMessage::FailoverServer { .. }
            | StateMessage::FailoverUnavailable { .. }
            | StateMessage::Resized { .. } => {}
        }
    }

    /// When others are to be asked about a silent member, if one is silent and others are there.
    pub(crate) fn polls_deadline(&self) -> Option<Instant> {
        let members = self.members.iter().filter(|member| member.role.is_served());
        let silent = members.map(|member| member.health.silent_at());
        let first = silent.fold(None, earliest)?;
        let others = self.members.iter().any(Member::follows);
        others.then(|| first.max(self.polls.at))
    }

    /// Asks the other members' servers about silent members, a round at a time.
    pub(crate) fn advance_polls(&mut self) {
        if self.polls_deadline().is_none_or(|at| at > self.now) {
            return;
        }
        let now = self.now;
        self.polls.round = self.polls.round.wrapping_add(1);
        let mut every = ASK_EVERY_LONG;
        for subject in 0..self.members.len() {
            if !self.members[subject].role.is_served() {
                continue; // a free slot
            }
            let health = &mut self.members[subject].health;
            health.others_say = health.saying.take();
            let Some(since) = health.down_since else { continue };
            if now.since(since) < LONG_SILENT {
                every = ASK_EVERY;
            }
            if now.since(since) >= SILENT_AFTER {
                self.ask_about(subject);
            }
        }
        self.polls.at = now + every;
    }

    fn ask_about(&mut self, subject: usize) {
        let member = &mut self.members[subject];
        let server = member.server;
        member.health.asked_in = self.polls.round;
        let number = u64::from(self.polls.round) << 8 | subject as u64;
        for asked in 0..self.members.len() {
            if asked != subject && self.members[asked].follows() {
                self.send(asked, Kind::HealthOf, number, CommandBody::HealthOf { server });
            }
        }
    }

    /// Another server says how it sees a silent member's. What was said in former rounds no longer
    /// counts; in this one, the best.
    pub(crate) fn health_answered(&mut self, number: u64, result: &Answer) {
        let Ok(ReplyBody::Health(said)) = result else { return };
        let subject = usize::try_from(number & 0xff).unwrap_or(usize::MAX);
        let Some(member) = self.members.get_mut(subject) else { return };
        let same_round = number >> 8 == u64::from(member.health.asked_in);
        if !same_round || member.health.down_since.is_none() {
            return;
        }
        let best = member.health.saying.into_iter().chain([*said]).max_by_key(|h| weight(*h));
        member.health.saying = best;
        let better = |says: Health| best.is_some_and(|best| weight(best) > weight(says));
        if member.health.others_say.is_none_or(better) {
            member.health.others_say = best;
        }
    }
}
