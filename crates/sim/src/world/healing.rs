//! What the control plane does for a volume's members: whoever holds the volume lets the planner
//! decide on one step, has its head agree, changes the record by compare-and-swap and finds out what
//! came of it; servers make and delete their own replicas. The same steps as the daemons take, with a
//! store whose answers are late or lost.

use core::time::Duration;
use std::collections::BTreeMap;

use base::{BlockSize, Health, HolderId, ReplicaError, Role, ShardRecord};
use cluster::heal::{self, HealPolicy, MemberFacts, Stage, VolumeFacts};
use cluster::{Draining, Picture, ServerEntry, ServerRecord, Versions, VolumeEntry};
use node::Input;
use volume::{HeadPhase, HeadStatus, MemberMode, MemberStatus};

use super::{Event, KEY, World};
use crate::cluster_store::{Answer, Call, Caller, Records};
use crate::places::Place;
use crate::process::{address, host_id, pool_id, server_id};

/// A healer's turn.
const TURN_NANOS: u64 = 100_000_000;
/// How often daemons ask the cluster store whether their heads are deposed, and how long such a head may take to
/// end by itself.
const TEND: Duration = Duration::from_secs(1);
/// The wall clock at the beginning of the world, in milliseconds since 1970.
const EPOCH_MS: u64 = 1_700_000_000_000;

/// What a process is doing for the members.
#[derive(Clone, Debug, Default)]
pub(crate) struct Healer {
    /// It waits for the store.
    busy: bool,
    /// The record that its head was told of last.
    told: Option<ShardRecord>,
    /// A change that was begun and whose outcome is not known: the record before and after.
    pending: Option<(ShardRecord, ShardRecord)>,
    /// What its server is to do for its own replica, once it is done.
    own: Option<Role>,
    /// Since when the cluster store has said that its head is deposed.
    deposed: Option<(base::Epoch, base::Instant)>,
}

impl Healer {
    /// A head begins, or none runs: what an earlier one was about is nobody's business any more.
    pub(super) fn forget_head(&mut self) {
        self.told = None;
        self.pending = None;
    }
}

impl World {
    pub(super) fn heal_later(&mut self, process: usize) {
        let life = self.processes[process].life;
        let nanos = TURN_NANOS / 2 + self.random.below(TURN_NANOS);
        self.after(nanos, Event::Heal { process, life });
    }

    /// What the wall clock of a process shows.
    fn wall_ms(&self, process: usize) -> u64 {
        let right = EPOCH_MS + self.now.nanos() / 1_000_000;
        right.saturating_add_signed(self.wall_offset_ms[process])
    }

    /// A process looks after what it holds and what it keeps.
    pub(super) fn heal_turn(&mut self, process: usize) {
        self.heal_later(process);
        let state = &self.processes[process];
        let ready =
            state.open && state.leaving.is_none() && self.provisioned >= self.config.servers;
        if !ready || self.comparing {
            return;
        }
        self.last_seen_ms[process] = self.wall_ms(process);
        if self.processes[process].head.is_none() {
            self.processes[process].healer.forget_head();
        }
        if !self.processes[process].healer.busy {
            self.processes[process].healer.busy = true;
            self.call_store(process, Caller::Healer, Call::Read);
        }
    }

    pub(super) fn healer_answer(&mut self, process: usize, answer: Answer) {
        self.processes[process].healer.busy = false;
        if self.processes[process].leaving.is_some() {
            return;
        }
        match answer {
            Answer::Records(records) => {
                self.tend(process, &records);
                if !self.keep_own(process, &records) {
                    self.look_after(process, &records);
                }
            }
            // Whether it came true shows when the records are read the next time.
            Answer::Swapped | Answer::Conflict | Answer::Lost => {}
        }
    }

    /// As the daemons do every second: a head that the store says is deposed, and that may hear of it from
    /// nobody else, is released, and abandoned if that does not end it.
    fn tend(&mut self, process: usize, records: &Records) {
        let state = &mut self.processes[process];
        let Some(head) = state.head.filter(|head| head.epoch < records.volume.epoch) else {
            state.healer.deposed = None;
            return;
        };
        let since = state.healer.deposed.filter(|(epoch, _)| *epoch == head.epoch);
        let (_, since) = *state.healer.deposed.insert(since.unwrap_or((head.epoch, self.now)));
        let (lasted, life) = (self.now.since(since), state.life);
        if lasted >= 2 * TEND {
            self.input(process, life, Input::AbandonHead(head.handle));
        } else if lasted >= TEND {
            self.input(process, life, Input::ReleaseHead(head.handle));
        }
    }

    fn swap(&mut self, process: usize, records: Records) {
        self.processes[process].healer.busy = true;
        self.call_store(process, Caller::Healer, Call::Swap(Box::new(records)));
    }

    // A server and its own replica.

    /// Makes or deletes the replica of this server; true if there is something to do.
    fn keep_own(&mut self, process: usize, records: &Records) -> bool {
        if !self.processes[process].is_server() {
            return false;
        }
        let own = server_id(process);
        let members = records.shard.members.iter();
        let mut roles = members.filter(|member| member.server == own).map(|member| member.role);
        let wanted = roles.find(|role| matches!(role, Role::Provisioning | Role::Leaving));
        let Some(wanted) = wanted else { return false };
        if self.processes[process].healer.own != Some(wanted) {
            let life = self.processes[process].life;
            let (block_size, blocks) = (BlockSize::B4096, records.blocks());
            let input = match wanted {
                Role::Provisioning => {
                    let epoch = records.volume.epoch;
                    Input::CreateReplica { tag: 2, key: KEY, block_size, blocks, epoch }
                }
                Role::Leaving | Role::InSync | Role::CatchingUp => {
                    Input::DeleteReplica { tag: 3, key: KEY }
                }
            };
            self.input(process, life, input);
            return true;
        }
        // Done: say so in the record.
        let mut next = records.clone();
        self.processes[process].healer.own = None;
        let of_own = |member: &base::Member| member.server == own && member.role == wanted;
        if wanted == Role::Provisioning {
            let mut members = next.shard.members.iter_mut();
            if let Some(member) = members.find(|member| of_own(member)) {
                member.role = Role::CatchingUp;
            }
        } else {
            next.shard.members.retain(|member| !of_own(member));
        }
        self.swap(process, next);
        true
    }

    /// A replica was made or deleted for the healer. As for the daemons, one that is not there is deleted: it
    /// was before, and what the record was to say of that got lost.
    pub(super) fn own_done(&mut self, process: usize, tag: u64, result: Result<(), ReplicaError>) {
        let (wanted, place) = match tag {
            2 => (Role::Provisioning, Place::ReplicaMade),
            _ => (Role::Leaving, Place::ReplicaDeleted),
        };
        let was_gone = wanted == Role::Leaving && result == Err(ReplicaError::NoReplica);
        if result.is_ok() || was_gone {
            self.processes[process].healer.own = Some(wanted);
        }
        if result.is_ok() {
            self.report.places.reach(place);
        }
    }

    // The holder and its members.

    fn look_after(&mut self, process: usize, records: &Records) {
        let Some(head) = self.processes[process].head else { return };
        let id = HolderId::from_bytes(host_id(process));
        let held = records.volume.holder.as_ref().is_some_and(|holder| holder.id == id);
        if !held || records.volume.epoch != head.epoch {
            // Deposed: the members will say so.
            return;
        }
        if let Some((expected, new)) = self.processes[process].healer.pending.clone() {
            if records.shard == expected {
                let next = Records { shard: new, ..records.clone() };
                return self.swap(process, next);
            }
            self.processes[process].healer.pending = None;
            if records.shard != new {
                self.report.places.reach(Place::ChangeLost);
            }
        }
        if self.processes[process].healer.told.as_ref() != Some(&records.shard) {
            self.tell_members(process, &records.shard);
        }
        if head.blocks < records.blocks() {
            let life = self.processes[process].life;
            let grow = Input::GrowHead { head: head.handle, blocks: records.blocks() };
            self.input(process, life, grow);
        }
        self.take_step(process, records);
    }

    fn tell_members(&mut self, process: usize, shard: &ShardRecord) {
        let state = &mut self.processes[process];
        let Some(head) = state.head else { return };
        let local = state.clock.local(self.now);
        let node = state.node.as_mut().expect("a head is in a process");
        node.members_changed(local, head.handle, shard);
        state.healer.told = Some(shard.clone());
        self.pump(process);
    }

    fn take_step(&mut self, process: usize, records: &Records) {
        let state = &mut self.processes[process];
        let Some(head) = state.head else { return };
        let node = state.node.as_mut().expect("a head is in a process");
        let status = node.heads().find(|(handle, ..)| *handle == head.handle);
        let Some((_, _, status, _)) = status else { return };
        let local = state.clock.local(self.now);
        let facts = facts(&status, local);
        let entry = VolumeEntry {
            volume: records.volume.clone(),
            shard: records.shard.clone(),
            deleted: false,
            versions: Versions { volume: records.revision, shard: records.revision },
        };
        let picture = Picture::of(std::slice::from_ref(&entry), self.servers());
        let plan = heal::plan(&entry, &facts, &picture, &policy(), self.wall_ms(process));
        if let Some(blocked) = &plan.blocked {
            self.trace.say(self.now, || format!("process {process}: {}: {blocked}", plan.cause));
        }
        let Some(step) = plan.step else { return };
        let new = step.apply(&records.shard);
        if step.alters_in_sync(&records.shard) {
            let state = &mut self.processes[process];
            let node = state.node.as_mut().expect("a head is in a process");
            let agreed = node.change_members(local, head.handle, &new);
            self.pump(process);
            if let Err(error) = agreed {
                self.trace
                    .say(self.now, || format!("process {process}: {step:?} refused: {error}"));
                return;
            }
            self.report.places.reach(Place::JointChange);
            self.change_agreed(process, &records.shard, &new);
        }
        self.trace.say(self.now, || format!("process {process}: {step:?}: {}", plan.cause));
        self.processes[process].healer.pending = Some((records.shard.clone(), new.clone()));
        self.swap(process, Records { shard: new, ..records.clone() });
    }

    fn servers(&self) -> Vec<ServerEntry> {
        let entry = |index: usize| ServerEntry {
            server: ServerRecord {
                id: server_id(index),
                name: format!("server{index}"),
                pool: pool_id(index),
                addresses: vec![address(index)],
                labels: BTreeMap::new(),
                capacity_bytes: 64 << 20,
                free_bytes: 48 << 20,
                version: "1".to_owned(),
                stopped: false,
                problems: Vec::new(),
                draining: self.draining[index].then_some(Draining { since_ms: EPOCH_MS }),
            },
            last_seen_ms: self.last_seen_ms[index],
            version: 1,
        };
        (0..self.config.pools()).map(entry).collect()
    }
}

/// Everything the daemons' policy has, in less time.
fn policy() -> HealPolicy {
    HealPolicy {
        silence_ms: 1000,
        slow_ms: 3000,
        moves_max: 1000,
        moves_window_ms: 1000,
        backoff_ms: 100,
        jitter_ms: 100,
        filling_max: 4,
    }
}

fn facts(status: &HeadStatus, now: base::Instant) -> VolumeFacts {
    let stage = match status.phase {
        HeadPhase::Sealing | HeadPhase::Reconciling | HeadPhase::Starting => Stage::Opening,
        HeadPhase::Serving
        | HeadPhase::Releasing
        | HeadPhase::Released
        | HeadPhase::Superseded { .. }
        | HeadPhase::Abandoned
        | HeadPhase::Failed { .. } => Stage::Open,
    };
    let members = status.members.iter().map(|member| member_facts(member, now)).collect();
    VolumeFacts { stage, changing: status.change_open, members }
}

fn member_facts(member: &MemberStatus, now: base::Instant) -> MemberFacts {
    let millis = |since: base::Instant| {
        u64::try_from(now.since(since).as_millis()).expect("simulated time is short")
    };
    let reachable = match member.mode {
        MemberMode::Down | MemberMode::Failed(_) => false,
        MemberMode::Sealing
        | MemberMode::Reconciling
        | MemberMode::CatchingUp
        | MemberMode::Live
        | MemberMode::TooFarBehind
        | MemberMode::Diverged
        | MemberMode::Damaged
        | MemberMode::Filling => true,
    };
    MemberFacts {
        server: member.server,
        reachable,
        silent_for_ms: if reachable { 0 } else { millis(member.since) },
        corroborated: matches!(member.others_say, Some(Health::Silent)),
        draining: member.draining.is_some(),
        device_failed: matches!(member.degraded, Some(base::DegradedReason::FailedDevice)),
        slow_for_ms: member.slow_since.map_or(0, |since| millis(since).max(1)),
        needs_fill: member.mode.needs_copy(),
        caught_up: member.caught_up,
    }
}

#[cfg(test)]
mod tests {
    use base::{Instant, Member};

    use super::*;
    use crate::world::WorldConfig;

    /// The head runs where the replica was: nobody else looks after its members.
    #[test]
    fn a_server_whose_word_that_its_replica_is_gone_was_lost_says_so_again() {
        let mut world = World::new(WorldConfig { spares: 1, ..WorldConfig::quiet(7, 1, false, 0) });
        let (limit, spare) = (Instant::ZERO + Duration::from_secs(10), 1);
        world.run_until(limit, "to provision", |world| world.provisioned == 1);
        world.attach(spare);
        world.run_until(limit, "to serve", World::serving);
        let (server, pool) = (server_id(spare), pool_id(spare));
        let records = &mut world.store.records;
        records.shard.members.push(Member { server, pool, role: Role::Leaving });
        records.revision += 1;
        let is_done = |world: &World| {
            let shard = &world.store.records.shard;
            let told = world.processes[spare].healer.told.as_ref();
            shard.members.iter().all(|member| member.server != server) && told == Some(shard)
        };
        world.run_until(limit, "to take the member out and tell the head", is_done);
    }
}
