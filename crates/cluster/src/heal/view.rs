//! A member as the planner sees it: record, head and store put together.

use std::fmt;

use base::{Member, Role};

use super::{HealPolicy, MemberFacts, VolumeFacts};
use crate::placement::Picture;
use crate::records::{ServerEntry, VolumeEntry};
use crate::servers::name_of;

/// A member and what is wrong with it.
pub(super) struct View {
    pub(super) member: Member,
    pub(super) facts: Option<MemberFacts>,
    pub(super) trouble: Option<Trouble>,
}

/// Why a member is to be replaced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Trouble {
    /// Its pool is gone: the server has another one, or is not registered any more.
    Gone,
    /// Its server could not make the replica.
    CannotMake(String),
    /// A device failed.
    DeviceFailed,
    /// Silent for this long.
    Silent(u64),
    /// It counts, and cannot without being filled anew.
    NeedsFill,
    /// It is to be emptied.
    Draining,
    /// Slow for this long.
    Slow(u64),
}

impl Trouble {
    /// True if it cannot be counted on any more, false if it still works.
    pub(super) fn is_lost(&self) -> bool {
        match self {
            Self::Gone
            | Self::CannotMake(_)
            | Self::DeviceFailed
            | Self::Silent(_)
            | Self::NeedsFill => true,
            Self::Draining | Self::Slow(_) => false,
        }
    }
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gone => f.write_str("its pool is gone"),
            Self::CannotMake(reason) => write!(f, "the replica cannot be made there: {reason}"),
            Self::DeviceFailed => f.write_str("a device of its pool has failed"),
            Self::Silent(for_ms) => write!(f, "silent for {} s", for_ms / 1000),
            Self::NeedsFill => f.write_str("its copy cannot follow any more"),
            Self::Draining => f.write_str("it is being drained"),
            Self::Slow(for_ms) => write!(f, "slow for {} s", for_ms / 1000),
        }
    }
}

impl View {
    pub(super) fn of_all(
        entry: &VolumeEntry,
        facts: &VolumeFacts,
        picture: &Picture,
        policy: &HealPolicy,
        now_ms: u64,
    ) -> Vec<Self> {
        let view = |member: &Member| {
            let served = facts.members.iter().find(|facts| facts.server == member.server);
            let facts = served.copied().filter(|_| member.role.is_served());
            let server = picture.server(member.server);
            let trouble = trouble(entry, *member, facts, server, policy, now_ms);
            Self { member: *member, facts, trouble }
        };
        entry.shard.members.iter().map(view).collect()
    }

    pub(super) fn is(&self, role: Role) -> bool {
        self.member.role == role
    }

    pub(super) fn is_lost(&self) -> bool {
        self.trouble.as_ref().is_some_and(Trouble::is_lost)
    }

    /// It holds all that was acknowledged, and answers.
    pub(super) fn holds(&self) -> bool {
        let holds = |facts: MemberFacts| facts.reachable && facts.caught_up && !facts.needs_fill;
        self.member.role.is_served() && !self.is_lost() && self.facts.is_some_and(holds)
    }

    /// It is being made or filled, and nothing is wrong with it.
    pub(super) fn is_coming(&self) -> bool {
        match self.member.role {
            Role::Provisioning | Role::CatchingUp => self.trouble.is_none(),
            Role::InSync | Role::Leaving => false,
        }
    }

    /// `server b: silent for 12 s`.
    pub(super) fn cause(&self, picture: &Picture) -> String {
        let name = name_of(&picture.servers, self.member.server);
        match &self.trouble {
            Some(trouble) => format!("server {name}: {trouble}"),
            None => format!("server {name}"),
        }
    }
}

fn trouble(
    entry: &VolumeEntry,
    member: Member,
    facts: Option<MemberFacts>,
    server: Option<&ServerEntry>,
    policy: &HealPolicy,
    now_ms: u64,
) -> Option<Trouble> {
    let reachable = facts.is_some_and(|facts| facts.reachable);
    match server {
        Some(server) if server.server.pool != member.pool => return Some(Trouble::Gone),
        // A store that was restored may not know a server that works.
        None if !reachable => return Some(Trouble::Gone),
        Some(_) | None => {}
    }
    let unheard = server.filter(|server| !server.is_alive(now_ms));
    let unheard_ms = unheard.map(|server| now_ms.saturating_sub(server.last_seen_ms));
    if let Some(facts) = facts {
        if facts.device_failed {
            return Some(Trouble::DeviceFailed);
        }
        let silent = !reachable && facts.silent_for_ms >= policy.silence_ms;
        if silent && (facts.corroborated || unheard.is_some()) {
            return Some(Trouble::Silent(facts.silent_for_ms));
        }
        if facts.needs_fill && member.role == Role::InSync {
            return Some(Trouble::NeedsFill);
        }
    } else if let Some(unheard_ms) = unheard_ms.filter(|unheard| *unheard >= policy.silence_ms) {
        return Some(Trouble::Silent(unheard_ms));
    }
    if member.role == Role::Provisioning {
        let problems = server.map(|server| server.server.problems.as_slice()).unwrap_or_default();
        let problem = problems.iter().find(|problem| problem.volume == entry.volume.id);
        if let Some(problem) = problem {
            return Some(Trouble::CannotMake(problem.reason.clone()));
        }
    }
    let flagged = server.is_some_and(|server| server.server.draining.is_some());
    if flagged || facts.is_some_and(|facts| facts.draining) {
        return Some(Trouble::Draining);
    }
    let slow_ms = facts.map_or(0, |facts| facts.slow_for_ms);
    // One that is being filled may well be slow.
    (slow_ms >= policy.slow_ms && slow_ms > 0 && member.role == Role::InSync)
        .then_some(Trouble::Slow(slow_ms))
}
