//! How rough a world is, and how patient its heads.

use core::time::Duration;

use base::Durability;

use crate::Tunables;

/// How rough a world is.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    pub(super) members: usize,
    pub(super) durability: Durability,
    pub(super) blocks: usize,
    pub(super) depth: usize,
    pub(super) tunables: Tunables,
    /// Longest delay of a message, in nanoseconds.
    pub(super) delay: u64,
    /// A member whose writes take 50 times as long.
    pub(super) slow: Option<usize>,
    /// A member that refuses and fails, and has damaged data.
    pub(super) bad: Option<usize>,
    pub(super) power_losses: bool,
    /// Members trim what other members may still need.
    pub(super) greedy_trims: bool,
    pub(super) stall_deadline_ms: Option<u64>,
    /// Members hold a Seal for as long as a deposed head may read; clocks drift; deposed heads go
    /// on being asked, and what they answer is judged.
    pub(super) grants: bool,
    /// What goes wrong is that heads are deposed without noticing.
    pub(super) deposes: bool,
    /// Planted: heads read without grants.
    pub(super) untrue_head: bool,
    /// Planted: members answer Seals at once.
    pub(super) untrue_members: bool,
    /// Planted: heads drop what cannot be read, whoever may hold it.
    pub(super) drops_blindly: bool,
    /// Servers that keep no replica at first; with them, members come and go.
    pub(super) spares: Option<usize>,
    /// The volume has a quarter of its blocks at first.
    pub(super) grows: bool,
    /// Records beyond its commit seq that a member's log has room for.
    pub(super) room: Option<usize>,
}

/// Durations the world's delays are made for.
pub(super) fn quick() -> Tunables {
    Tunables {
        member_records_max: 24,
        backlog_records_max: 16,
        catch_up_depth: 8,
        settle_delay: Duration::from_millis(20),
        ..Tunables::default()
    }
}
