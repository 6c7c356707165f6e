//! Where a volume may wait for good though a minority failed: what docs/testing.md lists as left out.

use core::time::Duration;

use base::{DegradedReason, Role};
use node::Node;
use volume::{HeadPhase, HeadStatus, MemberStatus, StallReason};

use super::World;
use crate::process::server_id;

/// For so long after faults stopped an opening may find logs full and go on nevertheless.
pub(super) const PATIENCE: Duration = Duration::from_millis(59_999);

impl World {
    /// Known gap: the faulty server's copy is lost, its pool for good or its log damaged, and another member
    /// that counts needs a copy, which nobody gives it without a write quorum: the volume waits, and
    /// says so. Damage elsewhere is none of this budget's, and a checker says so.
    pub(super) fn waits_for_a_pool(&self) -> bool {
        self.waits_without_faultys_copy(|status, others| {
            let reason = status.stall.map(|stall| stall.reason);
            let stalled = matches!(reason, Some(StallReason::Members { .. }));
            stalled && others.iter().any(|member| needs_copy(member))
        })
    }

    /// Known gap: the faulty server's copy is lost, and the log of another member is full of what this
    /// opening may not settle without having heard from all.
    pub(super) fn waits_for_room(&self) -> bool {
        let full = Some(DegradedReason::LogFull);
        self.waits_without_faultys_copy(|status, others| {
            let reconciles = status.phase == HeadPhase::Reconciling;
            reconciles && others.iter().any(|member| member.degraded == full)
        })
    }

    /// True if the head has all members but the faulty server's, whose copy is lost, and `waits`.
    fn waits_without_faultys_copy(
        &self,
        waits: impl Fn(&HeadStatus, &[&MemberStatus]) -> bool,
    ) -> bool {
        let desired = &self.processes[self.desired];
        let Some(faulty) = self.faulty else { return false };
        desired.node.iter().flat_map(Node::heads).any(|(_, _, status, _)| {
            let (of_faulty, others): (Vec<_>, Vec<_>) =
                status.members.iter().partition(|member| member.server == server_id(faulty));
            let lost = !self.processes[faulty].open || of_faulty.into_iter().any(needs_copy);
            lost && others.iter().all(|member| member.connected) && waits(&status, &others)
        })
    }
}

fn needs_copy(member: &MemberStatus) -> bool {
    member.role == Role::InSync && member.mode.needs_copy()
}
