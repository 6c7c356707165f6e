//! What a head knows, in the planner's words.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use base::{Health, ServerId};
use cluster::heal::{MemberFacts, Stage, VolumeFacts};
use shell::control::{HeadPhase, HeadStatus, MemberMode, MemberStatus};

/// When each member of a head was last seen to work: one that refuses, is tried again and refuses
/// again has worked as little in between.
#[derive(Default)]
pub(super) struct Worked(BTreeMap<ServerId, Worker>);

struct Worker {
    last: Instant,
    /// It answers, with refusals.
    refused: bool,
}

impl Worked {
    pub(super) fn facts(&mut self, status: &HeadStatus) -> VolumeFacts {
        let stage = match status.phase {
            HeadPhase::Opening { .. } => Stage::Opening,
            HeadPhase::Open
            | HeadPhase::Stalled { .. }
            | HeadPhase::Draining
            | HeadPhase::Superseded { .. } => Stage::Open,
        };
        self.0.retain(|server, _| status.members.iter().any(|member| member.server == *server));
        let members = status.members.iter().map(|member| self.of_member(member)).collect();
        VolumeFacts { stage, changing: status.change_open, members }
    }

    fn of_member(&mut self, member: &MemberStatus) -> MemberFacts {
        let now = Instant::now();
        let worker = self.0.entry(member.server);
        let worker = worker.or_insert_with(|| Worker { last: now, refused: false });
        let (reachable, silent_for) = match member.mode {
            MemberMode::CatchingUp
            | MemberMode::Filling
            | MemberMode::Live
            | MemberMode::NeedsFill => {
                *worker = Worker { last: now, refused: false };
                (true, Duration::ZERO)
            }
            MemberMode::Opening => (!worker.refused, now.duration_since(worker.last)),
            MemberMode::Failed => {
                worker.refused = true;
                (false, now.duration_since(worker.last))
            }
            MemberMode::Down => (false, member.mode_for),
        };
        MemberFacts {
            server: member.server,
            reachable,
            silent_for_ms: if reachable { 0 } else { millis(silent_for) },
            // A refusal needs nobody else's word.
            corroborated: worker.refused || matches!(member.others_say, Some(Health::Silent)),
            draining: member.draining,
            device_failed: member.device_failed,
            slow_for_ms: member.slow_for.map_or(0, |slow| millis(slow).max(1)),
            needs_fill: member.mode == MemberMode::NeedsFill,
            caught_up: member.caught_up,
        }
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
