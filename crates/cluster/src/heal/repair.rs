//! Volumes that nobody serves are healed too.

use base::membership::{seal_quorum, write_quorum};
use base::{Epoch, Member, Role, ServerId};

use super::{HealPolicy, MemberFacts, Stage, Step, VolumeFacts, plan};
use crate::placement::Picture;
use crate::records::{ServerEntry, VolumeEntry};

/// A volume that is to be repaired.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Repair {
    /// The server that is to do it.
    pub server: ServerId,
    /// Why, for people.
    pub cause: String,
}

/// Whether the volume of `entry`, which nobody serves, needs a head to be healed, and can be; and
/// which server is to run it ([`crate::lease::acquire_repair`]): the first that has a member in sync
/// and runs. All servers come to the same answer, give or take what they have heard.
///
/// A volume that is being moved is without a holder for a moment: act only on an answer that stays
/// the same for a while. The repairing holder gives the volume back when this is `None` with
/// itself as the holder, whom this does not count as serving.
pub fn wants_repair(
    entry: &VolumeEntry,
    picture: &Picture,
    policy: &HealPolicy,
    now_ms: u64,
) -> Option<Repair> {
    if is_taken(entry) {
        return None;
    }
    let facts = facts_of(entry, picture, now_ms);
    let in_sync = entry.shard.in_sync().count();
    let alive = facts.members.iter().filter(|facts| facts.caught_up).count();
    if in_sync == 0 || alive < seal_quorum(in_sync) {
        return None;
    }
    let stage = if alive < write_quorum(in_sync) { Stage::Opening } else { Stage::Open };
    let planned = plan(entry, &VolumeFacts { stage, ..facts.clone() }, picture, policy, now_ms);
    let cause = match planned.step {
        Some(
            Step::AddSpare { .. }
            | Step::Demote { .. }
            | Step::Remove { .. }
            | Step::Promote { .. }
            | Step::Replace { .. },
        ) => planned.cause,
        Some(Step::Forget { .. } | Step::UpdateFailover { .. }) | None => {
            if stage == Stage::Opening || !is_filling(entry, picture, now_ms) {
                return None;
            }
            "a replica is to be filled".to_owned()
        }
    };
    let server = repairer(entry, picture, now_ms)?;
    Some(Repair { server, cause })
}

/// Whether a server may run a head of the volume of `entry` to heal what only that server knows of its own
/// copy: nobody serves the volume, and enough members run for a head to open and write.
pub fn may_repair(entry: &VolumeEntry, picture: &Picture, now_ms: u64) -> bool {
    let in_sync = entry.shard.in_sync().count();
    let facts = facts_of(entry, picture, now_ms);
    let alive = facts.members.iter().filter(|facts| facts.caught_up).count();
    !is_taken(entry) && in_sync > 0 && alive >= write_quorum(in_sync)
}

/// True if somebody serves it, or there is nothing of it to heal.
fn is_taken(entry: &VolumeEntry) -> bool {
    let served = entry.volume.holder.as_ref().is_some_and(|holder| !holder.repair);
    let unmade = |member: &Member| member.role == Role::Provisioning;
    let new = entry.volume.epoch == Epoch::NONE && entry.shard.members.iter().any(unmade);
    served || entry.deleted || new
}

/// What the store knows of the members, put as a head would.
fn facts_of(entry: &VolumeEntry, picture: &Picture, now_ms: u64) -> VolumeFacts {
    let served = entry.shard.members.iter().filter(|member| member.role.is_served());
    let facts = served.map(|member| {
        let server =
            picture.server(member.server).filter(|server| server.server.pool == member.pool);
        let alive = server.is_some_and(|server| server.is_alive(now_ms));
        let last_seen_ms = server.map_or(0, |server| server.last_seen_ms);
        MemberFacts {
            server: member.server,
            reachable: alive,
            silent_for_ms: if alive { 0 } else { now_ms.saturating_sub(last_seen_ms) },
            corroborated: !alive,
            draining: false,
            device_failed: false,
            slow_for_ms: 0,
            needs_fill: false,
            caught_up: alive && member.role == Role::InSync,
        }
    });
    VolumeFacts { stage: Stage::Open, changing: false, members: facts.collect() }
}

/// True if a member is being made or filled whose server runs.
fn is_filling(entry: &VolumeEntry, picture: &Picture, now_ms: u64) -> bool {
    entry.shard.members.iter().any(|member| match member.role {
        Role::Provisioning | Role::CatchingUp => {
            let server = picture.server(member.server);
            let mine = server.filter(|server| server.server.pool == member.pool);
            mine.is_some_and(|server| server.is_alive(now_ms))
        }
        Role::InSync | Role::Leaving => false,
    })
}

fn repairer(entry: &VolumeEntry, picture: &Picture, now_ms: u64) -> Option<ServerId> {
    let alive = |id: ServerId| picture.server(id).filter(|server| server.is_alive(now_ms));
    let may = |server: &&ServerEntry| {
        let own = entry.shard.members.iter().find(|member| member.server == server.server.id);
        own.is_some_and(|member| member.pool == server.server.pool)
    };
    let able = entry.shard.in_sync().filter_map(alive).filter(may);
    let best = able.min_by_key(|server| server.server.draining.is_some())?;
    Some(best.server.id)
}
