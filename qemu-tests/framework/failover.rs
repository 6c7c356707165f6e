//! Faults under load, one after the other, and what the client felt: the loops that
//! `scripts/dev bench failover` measures and the tests run in a short form.
//!
//! Every loop ends with a look at every block; a failed request or a wrong byte at any time ends
//! it with an error.

mod head;
mod member;
mod moves;

use core::fmt;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::bench::Unit;
use crate::cluster::{ClusterOptions, PoolSizes, Space};
use crate::lab::Lab;
use crate::load::{Load, PAUSE_MIN, Window};
use crate::machine::Stretch;

/// How long the client is watched before a fault, for comparison.
const QUIET: Duration = Duration::from_millis(500);

/// How long the client is watched after a fault: longer than any pause that is allowed.
const WATCH: Duration = Duration::from_millis(2500);

/// A pause that a killed process makes begins within so long. The kernel has taken it down and closed its
/// connections in a fraction of that, and with that it is over for everybody else.
const FELT: Duration = Duration::from_millis(500);

/// The volume's size, in MiB.
const VOLUME_MIB: u64 = 64;

/// Requests that a client has answered before the first fault.
const WARM_UP: u64 = 2000;

/// Requests a second while a member that was away comes back: that is not what is measured here.
const RECOVERY_RATE: u32 = 500;

/// How long to wait for anything that is to happen at once, when the machine is busy.
const PATIENCE_SECONDS: u64 = 60;

/// A kind of fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scenario {
    /// A member that is not the head's is killed.
    MemberKilled,
    /// A server that has nothing to do with the volume is killed.
    BystanderKilled,
    /// Packets to and from a member vanish.
    MemberPartitioned,
    /// One member of three answers late.
    MemberSlow,
    /// A member is killed while a copy is made elsewhere.
    PeerKilledInRebuild,
    /// A member's server is emptied and stopped.
    Drain,
    /// The same, with servers that tell heads nothing.
    DrainUntold,
    /// The head is killed, and another host takes the volume.
    TakeOver,
    /// Packets to and from the head's host vanish, and another host takes the volume.
    HeadPartitioned,
}

/// Where a loop runs.
#[derive(Debug, Clone, Copy)]
pub struct Ground<'lab> {
    /// The directory of its processes.
    pub lab: &'lab Lab,
    /// What pools are made of. Where pauses are measured, files that were written once: with others, a
    /// sync is the file system's, which has others' data to write, too.
    pub space: Space,
}

impl<'lab> Ground<'lab> {
    /// So many servers on loopback, whose cluster store is a file.
    fn cluster(self, servers: usize) -> ClusterOptions<'lab> {
        let sizes = PoolSizes { space: self.space, ..PoolSizes::default() };
        ClusterOptions { servers, sizes, ..ClusterOptions::default() }
    }
}

/// When a loop ends.
#[derive(Debug, Clone, Copy)]
pub enum Amount {
    /// After so many faults.
    Runs(usize),
    /// With the first fault that ends after this moment.
    Until(Instant),
}

impl Amount {
    /// `HOLDFAST_LOOP_MINUTES` of faults, or so many if it is not set.
    pub fn from_environment(runs: usize) -> Self {
        let minutes = std::env::var("HOLDFAST_LOOP_MINUTES").ok();
        let minutes: Option<u64> = minutes.and_then(|text| text.parse().ok());
        minutes.map_or(Self::Runs(runs), |minutes| {
            Self::Until(Instant::now() + Duration::from_mins(minutes))
        })
    }

    /// Whether so many are enough.
    pub fn is_reached(self, runs: usize) -> bool {
        match self {
            Self::Runs(wanted) => runs >= wanted,
            Self::Until(end) => runs > 0 && Instant::now() >= end,
        }
    }
}

/// What one fault did.
#[derive(Debug, Clone)]
pub struct Run {
    /// The figure that the scenario is about, in [`Scenario::unit`].
    pub figure: f64,
    /// The pauses of which that is the longest; none if it is something else.
    pub pauses: Vec<Stretch>,
    /// The same figure without a fault, right before, in the same unit.
    pub quiet: f64,
    /// The slowest request that was answered after the fault, in milliseconds.
    pub slowest_ms: f64,
    /// How long after the fault the longest pause began, in milliseconds: a pause that has to do with
    /// the fault begins with it. Zero where that has no meaning.
    pub began_ms: f64,
    /// How long it took until all was over, in milliseconds.
    pub took_ms: f64,
    /// Requests that were answered while the client was watched.
    pub completed: u64,
}

impl fmt::Display for Run {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { figure, quiet, slowest_ms, began_ms, took_ms, completed, .. } = self;
        write!(
            f,
            "{figure:.1} (quiet: {quiet:.1}), begun after {began_ms:.1} ms, over after {took_ms:.0}; "
        )?;
        write!(f, "{completed} requests, the slowest {slowest_ms:.1} ms")
    }
}

impl Scenario {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::MemberKilled,
        Self::BystanderKilled,
        Self::MemberPartitioned,
        Self::MemberSlow,
        Self::PeerKilledInRebuild,
        Self::Drain,
        Self::DrainUntold,
        Self::TakeOver,
        Self::HeadPartitioned,
    ];

    /// For command lines and tables.
    pub const fn name(self) -> &'static str {
        match self {
            Self::MemberKilled => "member-killed",
            Self::BystanderKilled => "bystander-killed",
            Self::MemberPartitioned => "member-partitioned",
            Self::MemberSlow => "member-slow",
            Self::PeerKilledInRebuild => "killed-in-rebuild",
            Self::Drain => "drain",
            Self::DrainUntold => "drain-untold",
            Self::TakeOver => "take-over",
            Self::HeadPartitioned => "head-partitioned",
        }
    }

    /// What is done, and what the figure is.
    pub const fn explanation(self) -> &'static str {
        match self {
            Self::MemberKilled => {
                "kill -9 of a server that is a member, with the head in another one; the longest \
                 time without an answer that begins within half a second"
            }
            Self::BystanderKilled => {
                "kill -9 of a server that keeps nothing of the volume; the longest time without an \
                 answer that begins within half a second: what the machine itself makes of a process that dies"
            }
            Self::MemberPartitioned => {
                "every packet to and from a member's host vanishes; the longest time without an \
                 answer"
            }
            Self::MemberSlow => {
                "everything to and from one of three members takes 5 ms longer each way; the p99 \
                 of the latency, 2 s later, against the p99 before"
            }
            Self::PeerKilledInRebuild => {
                "kill -9 of a peer of the head's server while another member's replica is copied to \
                 a new one; the longest time without an answer that begins within half a second"
            }
            Self::Drain => {
                "`holdfast server drain --wait` of a member's server, and its stop when that says \
                 that it is safe; the longest time without an answer in all that time"
            }
            Self::DrainUntold => {
                "the same with state messages switched off: servers tell heads nothing"
            }
            Self::TakeOver => {
                "kill -9 of `holdfast attach`, and at that moment `holdfast attach --force` \
                 elsewhere; from the kill to the first answer at the new place"
            }
            Self::HeadPartitioned => {
                "every packet to and from the host of `holdfast attach` vanishes, and at that \
                 moment `holdfast attach --force` on another host; from the cut to the first \
                 answer at the new place"
            }
        }
    }

    /// What its figure counts.
    pub const fn unit(self) -> Unit {
        match self {
            Self::MemberKilled
            | Self::BystanderKilled
            | Self::MemberPartitioned
            | Self::PeerKilledInRebuild
            | Self::Drain
            | Self::DrainUntold
            | Self::TakeOver
            | Self::HeadPartitioned => Unit::Milliseconds,
            Self::MemberSlow => Unit::Times,
        }
    }

    /// A server's process dies: what that alone costs is measured by itself.
    pub const fn kills_a_server(self) -> bool {
        match self {
            Self::MemberKilled | Self::BystanderKilled | Self::PeerKilledInRebuild => true,
            Self::MemberPartitioned
            | Self::MemberSlow
            | Self::Drain
            | Self::DrainUntold
            | Self::TakeOver
            | Self::HeadPartitioned => false,
        }
    }

    /// What the figure is to be at most, at its 99th percentile (times: in the median); `None`: it is for
    /// comparison.
    pub const fn goal(self) -> Option<f64> {
        match self {
            Self::MemberKilled | Self::PeerKilledInRebuild => Some(5.0),
            Self::Drain => Some(50.0),
            // For comparison only.
            Self::BystanderKilled | Self::DrainUntold => None,
            Self::MemberPartitioned | Self::HeadPartitioned => Some(2000.0),
            Self::MemberSlow => Some(1.5),
            Self::TakeOver => Some(300.0),
        }
    }

    /// True if it needs hosts with a network between them.
    pub const fn needs_network(self) -> bool {
        match self {
            Self::MemberPartitioned | Self::HeadPartitioned => true,
            Self::MemberKilled
            | Self::BystanderKilled
            | Self::MemberSlow
            | Self::PeerKilledInRebuild
            | Self::Drain
            | Self::DrainUntold
            | Self::TakeOver => false,
        }
    }

    /// Does it again and again in a cluster of its own; tells each run.
    pub fn repeat(
        self,
        ground: Ground<'_>,
        amount: Amount,
        told: &mut dyn FnMut(&Run),
    ) -> Result<()> {
        match self {
            Self::MemberKilled => member::killed(ground, amount, told),
            Self::BystanderKilled => member::bystander_killed(ground, amount, told),
            Self::MemberPartitioned => member::partitioned(ground, amount, told),
            Self::MemberSlow => member::slow(ground, amount, told),
            Self::PeerKilledInRebuild => moves::killed_in_rebuild(ground, amount, told),
            Self::Drain => moves::drained(ground, moves::Messages::On, amount, told),
            Self::DrainUntold => moves::drained(ground, moves::Messages::Off, amount, told),
            Self::TakeOver => head::taken_over(ground, amount, told),
            Self::HeadPartitioned => head::partitioned(ground, amount, told),
        }
    }
}

/// Watches the client for a while, whatever happens.
fn watch(load: &Load, duration: Duration) -> Result<Window> {
    load.begin_window();
    // Not a wait for anything: what the client feels is measured over a stretch of time.
    std::thread::sleep(duration);
    load.check()?;
    Ok(load.end_window())
}

/// The pauses of a fault, and what is said of the longest.
struct Felt {
    pauses: Vec<Stretch>,
    figure: f64,
    began_ms: f64,
}

impl Felt {
    /// Of a window's pauses those that a fault at `struck` may have made: all later ones, or those that begin
    /// within so long.
    fn of(window: Window, struck: Instant, within: Option<Duration>) -> Self {
        let is_felt = |(from, to): &Stretch| {
            *to > struck && within.is_none_or(|within| *from < struck + within)
        };
        let pauses: Vec<Stretch> = window.pauses.into_iter().filter(is_felt).collect();
        let longest = pauses.iter().max_by_key(|(from, to)| *to - *from);
        // Shorter ones are not listed.
        let (figure, began) = longest.map_or((PAUSE_MIN, Duration::ZERO), |(from, to)| {
            (*to - *from, from.saturating_duration_since(struck))
        });
        Self { figure: milliseconds(figure), began_ms: milliseconds(began), pauses }
    }
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}
