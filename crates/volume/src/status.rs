//! What a head tells people and metrics about itself. Made on demand, not on the data path.

use core::fmt;
use core::time::Duration;

use base::membership::Role;
use base::{DegradedReason, Epoch, FillProgress, Health, Instant, Position, Seq, ServerId};

use crate::holdback::HeldBack;
use crate::membership::FailStop;

/// Where a head is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadPhase {
    /// Waits for a seal quorum.
    Sealing,
    /// Brings the log's tail to a write quorum.
    Reconciling,
    /// Waits for its EpochStart record to be on media at a write quorum.
    Starting,
    /// Serves.
    Serving,
    /// Takes no more requests and finishes those it has.
    Releasing,
    /// Ended in good order.
    Released,
    /// Ended: another head sealed a higher epoch.
    Superseded {
        /// That epoch.
        sealed: Epoch,
    },
    /// Ended because the shell gave it up.
    Abandoned,
    /// Ended itself.
    Failed {
        /// Why.
        reason: FailStop,
    },
}

/// Why I/O waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StallReason {
    /// Too few in-sync members are usable.
    Members {
        /// In-sync members that are connected and usable.
        usable: usize,
        /// How many are needed.
        needed: usize,
        /// How many in-sync members there are.
        of: usize,
    },
    /// Enough members are connected, but too few have answered the Seal of an opening: they do not
    /// answer at all, or wait longer than they may for the head before this one.
    NotSealed {
        /// In-sync members that have answered.
        sealed: usize,
        /// In-sync members that are connected and usable.
        of: usize,
    },
    /// An opening has chosen a log, and it takes long to bring its end to a write quorum.
    Reconciling {
        /// In-sync members that hold all of it.
        hold: usize,
        /// How many are needed.
        needed: usize,
    },
    /// A record that an opening or a catch-up needs cannot be read at any member that is
    /// reachable. It may be acknowledged data, so nothing is dropped.
    Damaged {
        /// The record.
        seq: Seq,
    },
    /// Enough members are connected, but they have not answered for long.
    Unanswered {
        /// The oldest record that is not at a quorum.
        seq: Seq,
    },
    /// So much is acknowledged and not on media at a write quorum that no more is begun: members do not
    /// complete their flushes.
    NotOnMedia {
        /// The oldest such record.
        seq: Seq,
    },
    /// No in-sync member that holds the newest data can be read.
    NoReader,
    /// Too few in-sync members confirm that this head has not been deposed, so what was read may
    /// be out of date.
    NoGrant {
        /// In-sync members that have confirmed it lately.
        granted: usize,
        /// How many are needed.
        needed: usize,
    },
}

impl fmt::Display for StallReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Members { usable, needed, of } => {
                write!(f, "{usable} of {of} members usable, {needed} needed")
            }
            Self::NotSealed { sealed, of } => {
                write!(f, "{sealed} of {of} usable members have answered the Seal")
            }
            Self::Reconciling { hold, needed } => {
                write!(f, "{hold} members hold the whole log, {needed} needed")
            }
            Self::Damaged { seq } => {
                write!(f, "the log record at {seq} is damaged at every reachable member")
            }
            Self::Unanswered { seq } => write!(f, "members do not answer the write at {seq}"),
            Self::NotOnMedia { seq } => {
                write!(f, "members do not put the write at {seq} on media")
            }
            Self::NoReader => f.write_str("no reachable member holds the newest data"),
            Self::NoGrant { granted, needed } => {
                write!(f, "{granted} members confirm this head, {needed} needed to read")
            }
        }
    }
}

/// A stall and its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stall {
    /// Why I/O waits.
    pub reason: StallReason,
    /// Since when.
    pub since: Instant,
}

/// What a head is doing with a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemberMode {
    /// No session to its server.
    Down,
    /// Waits for its answer to Seal.
    Sealing,
    /// Compares its log with the head's, truncates what conflicts.
    Reconciling,
    /// Is copied the records it lacks.
    CatchingUp,
    /// Gets every record as it is written.
    Live,
    /// The records it lacks are no longer in any log: it needs chunk copy.
    TooFarBehind,
    /// What it holds contradicts acknowledged data; it must be filled anew.
    Diverged,
    /// It lost durable records; it must be filled anew.
    Damaged,
    /// Another member fills it, directly. If it is in the in-sync set, nobody does: it must leave that
    /// first.
    Filling,
    /// It refused or failed, with this error; tried again after a while.
    Failed(base::ReplicaError),
}

impl MemberMode {
    /// True if only a copy of everything helps: if it is in the in-sync set, it must leave that first.
    pub const fn needs_copy(self) -> bool {
        match self {
            Self::TooFarBehind | Self::Diverged | Self::Damaged => true,
            Self::Down
            | Self::Sealing
            | Self::Reconciling
            | Self::CatchingUp
            | Self::Live
            | Self::Filling
            | Self::Failed(_) => false,
        }
    }
}

impl fmt::Display for MemberMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Down => f.write_str("down"),
            Self::Sealing => f.write_str("sealing"),
            Self::Reconciling => f.write_str("reconciling"),
            Self::CatchingUp => f.write_str("catching up from a log"),
            Self::Live => f.write_str("live"),
            Self::TooFarBehind => f.write_str("too far behind the log, needs a copy"),
            Self::Diverged => f.write_str("contradicts acknowledged data, needs a copy"),
            Self::Damaged => f.write_str("lost durable data, needs a copy"),
            Self::Filling => f.write_str("being filled"),
            Self::Failed(error) => write!(f, "failed: {error}"),
        }
    }
}

/// A member as the head sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemberStatus {
    /// Its server.
    pub server: ServerId,
    /// Its role in the shard record.
    pub role: Role,
    /// True while there is a session to its server.
    pub connected: bool,
    /// What the head is doing with it.
    pub mode: MemberMode,
    /// Since when it is in that mode.
    pub since: Instant,
    /// The last record it is known to hold, with every record before it. Zero while unknown.
    pub last: Seq,
    /// Records at or below this seq are on its media. Zero while unknown.
    pub durable: Seq,
    /// Records behind the head's newest; `None` while unknown.
    pub lag: Option<u64>,
    /// It holds everything acknowledged: it may enter the in-sync set.
    pub caught_up: bool,
    /// It said that it lost durable records, and was not filled since.
    pub damaged: bool,
    /// How far it is filled, while it is.
    pub fill: Option<FillProgress>,
    /// Since when it has answered nothing; `None` while it answers.
    pub down_since: Option<Instant>,
    /// What other members' servers say of its server, while it is down.
    pub others_say: Option<Health>,
    /// Its server goes away in good order.
    pub draining: Option<Draining>,
    /// What its server says is wrong with it.
    pub degraded: Option<DegradedReason>,
    /// Its server limits the volume to so many bytes per second.
    pub throttled: Option<u64>,
    /// Guests are held back so that it catches up.
    pub held_back: Option<HeldBack>,
    /// Since when it is far slower than the others.
    pub slow_since: Option<Instant>,
    /// How long it takes to answer a read: a smoothed mean; `None` while unknown.
    pub read_latency: Option<Duration>,
    /// How long it takes to answer a write.
    pub append_latency: Option<Duration>,
}

/// A server's announcement that it goes away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Draining {
    /// When it will be gone.
    pub until: Instant,
    /// The server that takes over, if there is one.
    pub successor: Option<ServerId>,
}

/// A head as people and metrics see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeadStatus {
    /// Where it is in its life.
    pub phase: HeadPhase,
    /// Its epoch.
    pub epoch: Epoch,
    /// The newest record of its log (once it has one).
    pub last: Position,
    /// Every record at or below this seq is at a write quorum: acknowledged.
    pub commit: Seq,
    /// Every record at or below this seq is on media at a write quorum; members are told of no more.
    pub settled: Seq,
    /// Blocks that front ends may use.
    pub blocks: u64,
    /// Blocks that the volume record says; more than the former while members are told.
    pub blocks_recorded: u64,
    /// Requests begun and not answered.
    pub in_flight: usize,
    /// Requests that wait to be begun.
    pub queued: usize,
    /// The members that it keeps sessions with.
    pub members: Vec<MemberStatus>,
    /// A change of the in-sync set was begun and its outcome is not known.
    pub change_open: bool,
    /// Blocks that a member could not read and that were written again with another's copy.
    pub mended_blocks: u64,
    /// Why and since when I/O waits, if it does.
    pub stall: Option<Stall>,
}

impl fmt::Display for HeadStatus {
    /// One line for people, such as `1 of 3 members usable, 2 needed: server … down since …`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} in {}", self.phase, self.epoch)?;
        let Some(stall) = self.stall else { return Ok(()) };
        write!(f, ", stalled since {}: {}", stall.since, stall.reason)?;
        for member in self.members.iter().filter(|member| member.mode != MemberMode::Live) {
            write!(f, "; server {} {} since {}", member.server, member.mode, member.since)?;
        }
        Ok(())
    }
}
