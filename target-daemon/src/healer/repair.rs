//! Healing volumes that nobody has attached: a server that has an up-to-date replica becomes their
//! head for as long as that takes, and gives way to anybody who wants to serve them.
//!
//! Which server tries first follows from the records, others wait longer; that two do not do it at once
//! is decided by the compare-and-swap of the lease.
//!
//! What is wrong with a server's own copy is known to that server only: blocks that its scrub cannot
//! read, records of its log that are lost or that nobody settled, an opening that took place while it was
//! away. It runs the head for that itself.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use base::{Epoch, Role, ServerId, VolumeId};
use cluster::heal::{self, Repair};
use cluster::lease::AcquireError;
use cluster::{EventKind, StoreError, VolumeEntry, VolumeStatus};
use shell::control::{HeadPhase, HeadStatus, MemberMode, MemberStatus, ReplicaStatus, Status};

use super::change::{Changes, Parts};
use super::watch::event;
use crate::heads::{HeadError, Heads};

/// Volumes that one server repairs at a time.
const REPAIRS_MAX: usize = 4;
/// How long a volume must have needed it, with nobody holding it, before the first tries:
/// guests that move leave it without a holder for a moment.
const FIRST_AFTER: Duration = Duration::from_secs(2);
/// The same for the others, which try only if the first does not.
const OTHERS_AFTER: Duration = Duration::from_secs(20);
/// How long there must be nothing to do before a repair head ends.
const IDLE: Duration = Duration::from_secs(1);
/// A repair head that does not open gives others a chance after this long.
const OPEN_LIMIT: Duration = Duration::from_secs(30);
/// What waits after a failure, doubled with each.
const BACKOFF: Duration = Duration::from_secs(5);
/// A repair of what is wrong with the own copy that gets nowhere for so long is given up,
const STUCK: Duration = Duration::from_secs(30);
/// and tried again much later: whatever keeps it from being mended takes people, or another server.
const AFTER_STUCK: Duration = Duration::from_hours(1);
/// The same after a head that did not open, or ended itself.
const AFTER_NOT_OPEN: Duration = Duration::from_mins(5);
/// The longest wait after a failure.
const BACKOFF_MAX: Duration = Duration::from_mins(1);

/// What one server does for volumes that nobody has attached.
pub(super) struct Repairs {
    server: ServerId,
    volumes: BTreeMap<VolumeId, Candidate>,
    /// What heads told last, and the revision at which that was read.
    told: (Option<u64>, Vec<VolumeStatus>),
    /// Epochs in which this server has seen to it that its copy lacks nothing, whatever was told before.
    whole: BTreeMap<VolumeId, Epoch>,
}

/// A volume that needs a head, or has one here only to be repaired.
struct Candidate {
    /// Since when it has needed one.
    since: Instant,
    not_before: Instant,
    /// The same for what is wrong with the own copy only.
    own_not_before: Instant,
    failures: u32,
    running: Option<Running>,
}

struct Running {
    epoch: Epoch,
    started: Instant,
    busy: Instant,
    /// What was left to do, and since when.
    left: (Left, Instant),
}

/// Why a repair is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ended {
    Done,
    NotOpen,
    Stuck,
}

impl Running {
    /// Looks at how far it is; `planned`: there is something to do for the planner. `None`: it goes on.
    fn look(
        &mut self,
        now: Instant,
        status: &Status,
        head: &HeadStatus,
        planned: bool,
    ) -> Option<Ended> {
        if matches!(head.phase, HeadPhase::Opening { .. }) {
            return (now.duration_since(self.started) >= OPEN_LIMIT).then_some(Ended::NotOpen);
        }
        self.judge(now, Left::of(status, head), planned)
    }

    /// The same of a head that is open, with what is left to do.
    fn judge(&mut self, now: Instant, left: Left, planned: bool) -> Option<Ended> {
        if planned || left != self.left.0 {
            self.left = (left, now);
        }
        if planned || left != Left::default() {
            self.busy = now;
            let stuck = now.duration_since(self.left.1) >= STUCK;
            return stuck.then_some(Ended::Stuck);
        }
        (now.duration_since(self.busy) >= IDLE).then_some(Ended::Done)
    }
}

/// What is left to do of what the planner does not see.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct Left {
    /// Blocks of the own copy that cannot be read.
    damaged_blocks: u64,
    /// Records of the own log are lost.
    lost_records: bool,
    /// Records that members lack which are on their way.
    behind: u64,
}

impl Left {
    fn of(status: &Status, head: &HeadStatus) -> Self {
        let own = status.replicas.iter().find(|replica| replica.spec.key.volume == head.volume);
        let coming = head.members.iter().filter(|member| is_coming(member));
        Self {
            damaged_blocks: own.map_or(0, |own| own.damaged_blocks),
            lost_records: own.is_some_and(|own| own.lost_records),
            behind: coming.map(|member| 1 + member.lag.unwrap_or(0)).sum(),
        }
    }
}

/// True if a member that counts is being brought what it lacks.
fn is_coming(member: &MemberStatus) -> bool {
    let mode = match member.mode {
        MemberMode::Opening | MemberMode::CatchingUp | MemberMode::Live => true,
        MemberMode::Down | MemberMode::Filling | MemberMode::NeedsFill | MemberMode::Failed => {
            false
        }
    };
    mode && member.role == Role::InSync && member.connected && !member.caught_up
}

/// Why a volume needs a head.
struct Need {
    repair: Repair,
    /// Only this server knows.
    own: bool,
}

/// What a server knows of its own copies.
struct Own<'a> {
    server: ServerId,
    replicas: &'a [ReplicaStatus],
    told: &'a [VolumeStatus],
    whole: &'a BTreeMap<VolumeId, Epoch>,
}

impl Own<'_> {
    /// What is wrong with the copy of a volume that nobody serves.
    fn trouble(&self, entry: &VolumeEntry) -> Option<String> {
        let (id, epoch) = (entry.volume.id, entry.volume.epoch);
        let own = self.replicas.iter().find(|replica| replica.spec.key.volume == id)?;
        if own.lost_records {
            return Some("its copy has lost records of its log".to_owned());
        }
        if own.damaged_blocks > 0 {
            return Some(format!("its copy has {} blocks that cannot be read", own.damaged_blocks));
        }
        if own.state.sealed < epoch {
            return Some("its copy was away when the volume was last opened".to_owned());
        }
        let free = entry.volume.holder.is_none() && self.whole.get(&id) != Some(&epoch);
        if free && own.state.commit < own.state.last.seq {
            // Nothing of that goes home, and only a head can say what becomes of it.
            return Some("its copy was not told how its log ends".to_owned());
        }
        let is_last = |told: &&VolumeStatus| told.volume == id && told.epoch == epoch;
        let last = self.told.iter().find(is_last).filter(|told| told.phase == "open")?;
        let mut members = last.members.iter();
        let member = members.find(|member| member.server == self.server)?;
        let lacks = !member.connected || member.lag.is_none_or(|lag| lag > 0);
        (free && lacks).then(|| "its copy lacked something when the volume was released".to_owned())
    }

    /// Whether a volume that nobody serves needs a head.
    fn needs(&self, entry: &VolumeEntry, parts: &Parts<'_>) -> Option<Need> {
        let (picture, now_ms) = (parts.view.picture(), cluster::unix_ms());
        if let Some(repair) = heal::wants_repair(entry, picture, parts.policy, now_ms) {
            return Some(Need { repair, own: false });
        }
        let cause = self.trouble(entry)?;
        let repair = Repair { server: self.server, cause };
        heal::may_repair(entry, picture, now_ms).then_some(Need { repair, own: true })
    }
}

/// Ends a repair head that is over, whatever the reason. Whoever deposed it has the volume.
pub(super) fn close(heads: &Heads, volume: VolumeId, epoch: Epoch) {
    match heads.close_repair(volume, epoch) {
        Ok(false) => {}
        Ok(true) => tracing::info!(%volume, epoch = epoch.0, "the repair has given way"),
        Err(error) => tracing::warn!(%volume, %error, "closing the head that repaired"),
    }
}

/// Ends all of them, when the server stops.
pub(super) fn close_all(heads: &Heads) {
    for entry in heads.repairing() {
        close(heads, entry.volume.id, entry.volume.epoch);
    }
}

impl Repairs {
    pub(super) fn new(server: ServerId) -> Self {
        Self { server, volumes: BTreeMap::new(), told: (None, Vec::new()), whole: BTreeMap::new() }
    }

    /// Begins and ends repairs.
    pub(super) fn turn(
        &mut self,
        heads: &Heads,
        parts: &mut Parts<'_>,
        status: &Status,
        changes: &Changes,
    ) -> Result<(), StoreError> {
        self.end(heads, parts, status, changes);
        let mine = |entry: &&VolumeEntry| entry.shard.in_sync().any(|id| id == self.server);
        let free = |entry: &VolumeEntry| !entry.deleted && entry.volume.holder.is_none();
        if parts.view.revision() != self.told.0
            && parts.view.volumes().iter().filter(mine).any(free)
        {
            self.told = (parts.view.revision(), parts.store.statuses()?);
        }
        let own = Own {
            server: self.server,
            replicas: &status.replicas,
            told: &self.told.1,
            whole: &self.whole,
        };
        let all = parts.view.volumes().iter().filter(mine);
        let needy: Vec<(VolumeEntry, Need)> =
            all.filter_map(|entry| Some((entry.clone(), own.needs(entry, parts)?))).collect();
        let known = |id: &VolumeId| parts.view.volume(*id).is_some();
        self.whole.retain(|id, _| known(id));
        self.volumes.retain(|volume, candidate| {
            candidate.running.is_some() || needy.iter().any(|(entry, _)| entry.volume.id == *volume)
        });
        for (entry, need) in needy {
            self.consider(heads, parts, &entry, need)?;
        }
        Ok(())
    }

    fn consider(
        &mut self,
        heads: &Heads,
        parts: &mut Parts<'_>,
        entry: &VolumeEntry,
        Need { repair, own }: Need,
    ) -> Result<(), StoreError> {
        let id = entry.volume.id;
        let running = self.volumes.values().filter(|known| known.running.is_some()).count();
        let wait = wait(id, repair.server == self.server);
        let now = Instant::now();
        let candidate = self.volumes.entry(id).or_insert_with(|| Candidate::new(now));
        let not_before = candidate.not_before;
        let not_before = if own { not_before.max(candidate.own_not_before) } else { not_before };
        let early = now < candidate.since + wait || now < not_before;
        if candidate.running.is_some() || early || running >= REPAIRS_MAX {
            return Ok(());
        }
        let error = match heads.open_repair(id) {
            Ok(epoch) => {
                let left = (Left::default(), now);
                candidate.running = Some(Running { epoch, started: now, busy: now, left });
                let (server, volume) = (parts.view.server_name(self.server), &entry.volume.name);
                tracing::info!(volume, cause = repair.cause, "repairing: nobody has it attached");
                parts.happened.push(event(
                    EventKind::RepairStarted,
                    Some(id),
                    Some(self.server),
                    format!("server {server} repairs volume {volume}, which nobody has attached"),
                    repair.cause,
                ));
                return Ok(());
            }
            Err(error) => error,
        };
        candidate.fail(now);
        match error {
            HeadError::Acquire(AcquireError::Store(error)) | HeadError::Store(error) => Err(error),
            // Somebody else was faster, or it is gone.
            HeadError::Acquire(_) | HeadError::Superseded { .. } => Ok(()),
            HeadError::Open { .. } | HeadError::NotClosed { .. } => {
                tracing::warn!(volume = entry.volume.name, %error, "cannot repair the volume");
                Ok(())
            }
        }
    }

    /// Ends the repairs that are done, deposed, or get nowhere.
    fn end(&mut self, heads: &Heads, parts: &mut Parts<'_>, status: &Status, changes: &Changes) {
        for (volume, candidate) in &mut self.volumes {
            let Some(running) = &mut candidate.running else { continue };
            let (now, epoch) = (Instant::now(), running.epoch);
            let mut ours = status.heads.iter();
            let head = ours.find(|head| head.volume == *volume && head.epoch == epoch);
            let entry = parts.view.volume(*volume);
            let deposed = entry.is_none_or(|entry| entry.deleted || entry.volume.epoch != epoch);
            let Some(head) = head.filter(|_| !deposed) else {
                // A guest has it, or its head has ended itself.
                close(heads, *volume, epoch);
                if deposed {
                    candidate.running = None;
                } else {
                    candidate.ended(Ended::NotOpen, now);
                }
                continue;
            };
            let entry = entry.expect("not deposed");
            let planned =
                heal::wants_repair(entry, parts.view.picture(), parts.policy, cluster::unix_ms());
            let changing = head.change_open || changes.is_busy(*volume, epoch);
            let ended = running.look(now, status, head, planned.is_some() || changing);
            let Some(ended) = ended else { continue };
            close(heads, *volume, epoch);
            candidate.ended(ended, now);
            if ended == Ended::Done {
                self.whole.insert(*volume, epoch);
            }
            let cause = match ended {
                Ended::Done => "there is nothing to do",
                Ended::NotOpen => "its members do not answer",
                Ended::Stuck => "what is left to do gets nowhere; it is tried again in an hour",
            };
            let (server, name) = (parts.view.server_name(self.server), &entry.volume.name);
            parts.happened.push(event(
                EventKind::RepairEnded,
                Some(*volume),
                Some(self.server),
                format!("server {server} no longer repairs volume {name}"),
                cause,
            ));
        }
    }
}

impl Candidate {
    fn new(now: Instant) -> Self {
        Self { since: now, not_before: now, own_not_before: now, failures: 0, running: None }
    }

    /// Its repair head is gone: says when the next may come.
    fn ended(&mut self, ended: Ended, now: Instant) {
        self.running = None;
        self.fail(now);
        match ended {
            Ended::Done => self.failures = 0,
            Ended::NotOpen => self.own_not_before = now + AFTER_NOT_OPEN,
            Ended::Stuck => self.own_not_before = now + AFTER_STUCK,
        }
    }

    fn fail(&mut self, now: Instant) {
        let wait = BACKOFF.saturating_mul(1 << self.failures.min(8)).min(BACKOFF_MAX);
        self.not_before = now + wait;
        self.failures += 1;
    }
}

/// How long this server waits before it tries.
fn wait(volume: VolumeId, first: bool) -> Duration {
    // Some hundreds of milliseconds apart for different volumes.
    let jitter = Duration::from_millis(u64::from(volume.bytes()[0]));
    if first { FIRST_AFTER + jitter } else { OTHERS_AFTER + jitter }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn running(now: Instant) -> Running {
        Running { epoch: Epoch(1), started: now, busy: now, left: (Left::default(), now) }
    }

    fn damaged(damaged_blocks: u64) -> Left {
        Left { damaged_blocks, ..Left::default() }
    }

    #[test]
    fn a_repair_ends_when_there_has_been_nothing_to_do_for_a_while() {
        let now = Instant::now();
        let mut repair = running(now);
        assert_eq!(repair.judge(now + IDLE / 2, Left::default(), false), None);
        assert_eq!(repair.judge(now + IDLE, damaged(1), false), None, "found just now");
        assert_eq!(repair.judge(now + IDLE * 3 / 2, Left::default(), false), None, "mended");
        assert_eq!(repair.judge(now + IDLE * 2, Left::default(), false), Some(Ended::Done));
    }

    #[test]
    fn only_a_repair_that_gets_nowhere_is_given_up() {
        let mut now = Instant::now();
        let mut repair = running(now);
        let nearly = STUCK * 9 / 10;
        for blocks in (1..=10).rev() {
            now += nearly;
            assert_eq!(repair.judge(now, damaged(blocks), false), None, "{blocks} blocks left");
        }
        assert_eq!(repair.judge(now + nearly, damaged(1), false), None);
        assert_eq!(repair.judge(now + STUCK, damaged(1), false), Some(Ended::Stuck));
        // The planner has no such limit: a copy to a new member may take as long as it takes.
        let mut planned = running(now);
        for _ in 0..10 {
            now += STUCK;
            assert_eq!(planned.judge(now, damaged(1), true), None);
        }
    }

    #[test]
    fn what_gets_nowhere_is_tried_again_much_later_unless_others_see_a_need() {
        let now = Instant::now();
        let mut candidate = Candidate::new(now);
        candidate.ended(Ended::Stuck, now);
        assert_eq!(candidate.own_not_before, now + AFTER_STUCK);
        assert_eq!(candidate.not_before, now + BACKOFF, "for what the planner sees");
        let mut candidate = Candidate::new(now);
        candidate.ended(Ended::NotOpen, now);
        assert_eq!(candidate.own_not_before, now + AFTER_NOT_OPEN);
        for _ in 0..100 {
            candidate.ended(Ended::NotOpen, now);
        }
        assert_eq!(candidate.not_before, now + BACKOFF_MAX);
        candidate.ended(Ended::Done, now);
        candidate.fail(now);
        assert_eq!(candidate.not_before, now + BACKOFF, "what was done is no failure");
    }
}
