//! What to do next for a volume's health: one step at a time, decided by whoever holds it.
//!
//! Pure: records, facts and the time go in, a [`Step`] or the reason why there is none comes out. The
//! holder has its head agree to the step if the step alters the in-sync set
//! ([`Step::alters_in_sync`]), writes [`Step::apply`]'s record with [`crate::members::change`],
//! tells the head, and asks again.
//!
//! A member that is lost, or that is to go though it works (its server is drained, or it is slow), is
//! replaced in this order: a spare is added (`Provisioning`), its server makes the replica
//! (`CatchingUp`), the head has it filled, and the spare counts from the moment on from which the
//! other one does not. Where a dead member only keeps the others from a quorum it is demoted first.
//! The in-sync set never gets smaller than [`base::membership::in_sync_floor`].
//!
//! The limits are soft where holders do not know of each other: two that look at once may begin one
//! filling more than [`HealPolicy::filling_max`].

mod plan;
mod repair;
#[cfg(test)]
mod tests;
mod view;

use std::fmt;

use base::{Member, Move, PoolId, Role, ServerId, ShardRecord};

pub use plan::plan;
pub use repair::{Repair, may_repair, wants_repair};

/// Moves that a shard's record remembers.
pub const MOVES_REMEMBERED: usize = 8;

/// When and how much is healed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealPolicy {
    /// A member is lost when it was silent for this long and someone else says so too.
    pub silence_ms: u64,
    /// A member is replaced when it was slow for this long.
    pub slow_ms: u64,
    /// Lost members of one volume that are replaced within `moves_window_ms`; then it is left
    /// alone.
    pub moves_max: usize,
    /// See `moves_max`.
    pub moves_window_ms: u64,
    /// The least time between two replacements of one volume; doubles with each in the window.
    pub backoff_ms: u64,
    /// Replacing a silent member waits up to this much longer, other volumes for another time.
    pub jitter_ms: u64,
    /// Members of all volumes that are made or filled at once.
    pub filling_max: usize,
}

impl Default for HealPolicy {
    fn default() -> Self {
        Self {
            silence_ms: 10_000,
            slow_ms: 30_000,
            moves_max: 3,
            moves_window_ms: 600_000,
            backoff_ms: 5_000,
            jitter_ms: 2_000,
            filling_max: 4,
        }
    }
}

/// Where the head is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// It has a seal quorum and not yet a write quorum: only members that keep it from one can be
    /// demoted.
    Opening,
    /// It serves.
    Open,
}

/// What a volume's head knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeFacts {
    /// Where the head is.
    pub stage: Stage,
    /// A change of members is open: its outcome comes first.
    pub changing: bool,
    /// The members that the head serves.
    pub members: Vec<MemberFacts>,
}

/// What is known of a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemberFacts {
    /// Its server.
    pub server: ServerId,
    /// The head has a session to it that works.
    pub reachable: bool,
    /// For how long it has not been.
    pub silent_for_ms: u64,
    /// Another server says the same. (That the store has not heard of it for
    /// [`crate::ALIVE_MS`] counts as well, and is seen here.)
    pub corroborated: bool,
    /// Its server said that it is to be emptied. (The flag in the store counts as well.)
    pub draining: bool,
    /// A device of its pool has failed.
    pub device_failed: bool,
    /// For how long it has been much slower than the others; 0: it is not.
    pub slow_for_ms: u64,
    /// It lacks what is in no log any more, or its data is damaged or diverged: nothing but a filling
    /// with chunks helps it.
    pub needs_fill: bool,
    /// It holds everything that is acknowledged and follows. While the head opens: it has answered
    /// the seal and holds the log that was chosen.
    pub caught_up: bool,
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Give a server a replica: a new member that is provisioning.
    AddSpare {
        /// The server.
        server: ServerId,
        /// Its pool.
        pool: PoolId,
        /// The present, in milliseconds since 1970.
        at_ms: u64,
        /// Whether it counts as a move: not if an operator empties a server.
        counts: bool,
    },
    /// Let a member that is in sync catch up: its acknowledgements do not count meanwhile.
    Demote {
        /// Its server.
        server: ServerId,
    },
    /// Let a member leave: its server deletes the replica.
    Remove {
        /// Its server.
        server: ServerId,
    },
    /// Let a member that has caught up count.
    Promote {
        /// Its server.
        server: ServerId,
    },
    /// Let a member that has caught up count in the place of one that leaves.
    Replace {
        /// The server of the one that leaves.
        leaves: ServerId,
        /// The server of the one that counts then.
        counts: ServerId,
    },
    /// Take out a member that is leaving and whose server will not do that.
    Forget {
        /// Its server.
        server: ServerId,
        /// The pool that it was in.
        pool: PoolId,
    },
    /// Name other failover servers.
    UpdateFailover {
        /// Best first.
        failover: Vec<ServerId>,
    },
}

impl Step {
    /// `shard` after this step. What is not there stays as it is.
    #[must_use]
    pub fn apply(&self, shard: &ShardRecord) -> ShardRecord {
        let mut next = shard.clone();
        match self {
            Self::AddSpare { server, pool, at_ms, counts } => {
                next.members.push(Member {
                    server: *server,
                    pool: *pool,
                    role: Role::Provisioning,
                });
                next.failover.retain(|other| other != server);
                if *counts {
                    next.moves.push(Move { server: *server, at_ms: *at_ms });
                    let surplus = next.moves.len().saturating_sub(MOVES_REMEMBERED);
                    next.moves.drain(..surplus);
                }
            }
            Self::Demote { server } => set_role(&mut next, *server, Role::CatchingUp),
            Self::Remove { server } => set_role(&mut next, *server, Role::Leaving),
            Self::Promote { server } => set_role(&mut next, *server, Role::InSync),
            Self::Replace { leaves, counts } => {
                set_role(&mut next, *leaves, Role::Leaving);
                set_role(&mut next, *counts, Role::InSync);
            }
            Self::Forget { server, pool } => next.members.retain(|member| {
                member.role != Role::Leaving || member.server != *server || member.pool != *pool
            }),
            Self::UpdateFailover { failover } => next.failover.clone_from(failover),
        }
        next
    }

    /// True if the head must agree first, since the in-sync set becomes another one.
    pub fn alters_in_sync(&self, shard: &ShardRecord) -> bool {
        !self.apply(shard).in_sync().eq(shard.in_sync())
    }
}

/// Of the member on `server` that is not leaving.
fn set_role(shard: &mut ShardRecord, server: ServerId, role: Role) {
    let mut members = shard.members.iter_mut();
    let of_server = |member: &&mut Member| member.server == server && member.role != Role::Leaving;
    if let Some(member) = members.find(of_server) {
        member.role = role;
    }
}

/// What [`plan()`] came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// What to do now, if anything.
    pub step: Option<Step>,
    /// Why: what is wrong with which member, for people. Empty if nothing is.
    pub cause: String,
    /// Why what is wrong is not put right now.
    pub blocked: Option<Blocked>,
}

/// Why a volume that is not well is left as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Blocked {
    /// No server can take a replica.
    NoSpare {
        /// Why each does not qualify.
        reasons: String,
    },
    /// It was moved too often.
    TooManyMoves {
        /// So many times in the policy's window.
        moves: usize,
        /// When that is over, in milliseconds since 1970.
        until_ms: u64,
    },
    /// It was moved just now, or its turn comes in a moment.
    Backoff {
        /// When that is over, in milliseconds since 1970.
        until_ms: u64,
    },
    /// Enough members of all volumes are being filled.
    Busy {
        /// How many.
        filling: usize,
    },
    /// Taking out what is lost would leave too few members in sync.
    Floor {
        /// The fewest that may be left.
        floor: usize,
    },
    /// Too few members hold all that was acknowledged.
    NoQuorum,
    /// The record has no room for another member.
    Full,
}

impl fmt::Display for Blocked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoSpare { reasons } => write!(
                f,
                "no server can take another replica ({reasons}); start or add servers, or bring the \
                 lost one back"
            ),
            Self::TooManyMoves { moves, .. } => write!(
                f,
                "it was moved {moves} times in short order and is left alone for now: look at the \
                 servers that it was on before more of them are lost"
            ),
            Self::Backoff { .. } => f.write_str("it was moved just now, or others go first: wait"),
            Self::Busy { filling } => {
                write!(f, "{filling} other replicas are being filled: it waits for its turn")
            }
            Self::Floor { floor } => write!(
                f,
                "taking the lost member out would leave fewer than {floor} in sync; bring the lost \
                 one back"
            ),
            Self::NoQuorum => f.write_str(
                "too few members hold all that was acknowledged; bring the lost ones back",
            ),
            Self::Full => f.write_str(
                "it has as many members as there can be, some of them leaving; start their servers",
            ),
        }
    }
}
