//! What a head knows, in the planner's words.

use std::time::Duration;

use base::Health;
use cluster::heal::{MemberFacts, Stage, VolumeFacts};
use shell::control::{HeadPhase, HeadStatus, MemberMode, MemberStatus};

pub(super) fn of_head(status: &HeadStatus) -> VolumeFacts {
    let stage = match status.phase {
        HeadPhase::Opening { .. } => Stage::Opening,
        HeadPhase::Open
        | HeadPhase::Stalled { .. }
        | HeadPhase::Draining
        | HeadPhase::Superseded { .. } => Stage::Open,
    };
    let members = status.members.iter().map(of_member).collect();
    VolumeFacts { stage, changing: status.change_open, members }
}

fn of_member(member: &MemberStatus) -> MemberFacts {
    // What does not work is not there, whatever the reason: a server that refuses every command
    // is no better than one that is off.
    let (reachable, needs_fill) = match member.mode {
        MemberMode::Down | MemberMode::Failed => (false, false),
        MemberMode::Opening | MemberMode::CatchingUp | MemberMode::Filling | MemberMode::Live => {
            (true, false)
        }
        MemberMode::NeedsFill => (true, true),
    };
    MemberFacts {
        server: member.server,
        reachable,
        silent_for_ms: if reachable { 0 } else { millis(member.mode_for) },
        corroborated: matches!(member.others_say, Some(Health::Silent)),
        draining: member.draining,
        device_failed: member.device_failed,
        slow_for_ms: member.slow_for.map_or(0, |slow| millis(slow).max(1)),
        needs_fill,
        caught_up: member.caught_up,
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
