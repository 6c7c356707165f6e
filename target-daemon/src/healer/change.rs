//! Changes of members: decided, prepared in the head, made true by compare-and-swap, told to the head.

use std::collections::BTreeMap;
use std::mem::Discriminant;
use std::time::{Duration, Instant};

use base::{Epoch, HolderId, Role, ShardRecord, VolumeId};
use cluster::heal::{self, Blocked, HealPolicy, Plan};
use cluster::members::{self, ChangeOutcome};
use cluster::{ClusterStore, Event, EventKind, StoreError, StoreErrorKind, VolumeEntry};
use shell::control::{ChangeError, DataPlane, HeadPhase, HeadStatus};

use super::facts::Worked;
use super::view::View;
use super::watch::event;

/// How long a head may take to begin a change: a member that follows the log is behind what is
/// acknowledged for some round trips at most.
const PREPARE_WAIT: Duration = Duration::from_millis(500);
/// How long a head may take to answer.
const ADOPT_WAIT: Duration = Duration::from_secs(2);
/// After a change that the head did not begin, this long nothing is tried; twice as long after the
/// next one, and so on.
const BACKOFF: Duration = Duration::from_millis(250);
/// The longest such wait.
const BACKOFF_MAX: Duration = Duration::from_secs(8);

/// What a turn works with.
pub(super) struct Parts<'a> {
    pub(super) store: &'a dyn ClusterStore,
    pub(super) plane: &'a dyn DataPlane,
    pub(super) me: HolderId,
    pub(super) policy: &'a HealPolicy,
    pub(super) view: &'a mut View,
    pub(super) happened: &'a mut Vec<Event>,
}

/// What is known of the heads here between turns.
#[derive(Default)]
pub(super) struct Changes {
    heads: BTreeMap<VolumeId, Head>,
}

#[derive(Default)]
struct Head {
    epoch: Epoch,
    /// The record that the head was told of last.
    told: Option<ShardRecord>,
    /// The size that it was told of last.
    told_bytes: u64,
    pending: Option<Pending>,
    failures: u32,
    not_before: Option<Instant>,
    /// Why the last step was not taken.
    refused: Option<String>,
    worked: Worked,
    /// The last plan had something to do.
    busy: bool,
    /// Why the planner leaves a volume that is not well as it is.
    blocked: Option<Discriminant<Blocked>>,
}

/// A change that was begun and whose outcome is not known.
struct Pending {
    expected: ShardRecord,
    new: ShardRecord,
    /// Why, for people.
    cause: String,
}

impl Changes {
    /// Finishes what is pending, tells heads what others have changed, and takes one step for each
    /// volume that needs one. An error: the store failed; the rest is for the next turn.
    pub(super) fn turn(
        &mut self,
        parts: &mut Parts<'_>,
        heads: &[HeadStatus],
    ) -> Result<(), StoreError> {
        self.heads.retain(|volume, _| heads.iter().any(|head| head.volume == *volume));
        for status in heads {
            let head = self.heads.entry(status.volume).or_default();
            if head.epoch != status.epoch {
                *head = Head { epoch: status.epoch, ..Head::default() };
            }
            if is_over(status) {
                continue;
            }
            if head.pending.is_some() {
                head.finish(parts, status)?;
                continue;
            }
            let Some(entry) = parts.view.volume(status.volume).cloned() else { continue };
            let held = entry.volume.holder.as_ref().is_some_and(|holder| holder.id == parts.me);
            if entry.deleted || !held || entry.volume.epoch != status.epoch {
                // Deposed: whoever owns the head notices by itself.
                continue;
            }
            head.adopt(parts.plane, status, &entry.shard);
            head.grow(parts.plane, status, entry.volume.size_bytes);
            head.heal(parts, status, &entry)?;
        }
        Ok(())
    }
}

impl Changes {
    /// True while something is to be done for a volume whose head runs here in that epoch.
    pub(super) fn is_busy(&self, volume: VolumeId, epoch: Epoch) -> bool {
        let head = self.heads.get(&volume).filter(|head| head.epoch == epoch);
        head.is_some_and(|head| head.busy || head.pending.is_some())
    }
}

fn is_over(status: &HeadStatus) -> bool {
    match status.phase {
        HeadPhase::Opening { .. } | HeadPhase::Open | HeadPhase::Stalled { .. } => false,
        HeadPhase::Draining | HeadPhase::Superseded { .. } => true,
    }
}

impl Head {
    /// Tells the head what the record is, if it was not told that before.
    fn adopt(&mut self, plane: &dyn DataPlane, status: &HeadStatus, shard: &ShardRecord) {
        if self.told.as_ref() == Some(shard) {
            return;
        }
        match plane.members_changed(status.volume, status.epoch, shard, ADOPT_WAIT) {
            Ok(()) => {
                self.told = Some(shard.clone());
                self.refused = None;
            }
            Err(error) => {
                self.refuse(status.volume, &error.to_string());
            }
        }
    }

    /// Tells the head how large the volume is, if it has grown.
    fn grow(&mut self, plane: &dyn DataPlane, status: &HeadStatus, size_bytes: u64) {
        if size_bytes <= status.size_bytes.max(self.told_bytes) {
            return;
        }
        match plane.volume_grown(status.volume, status.epoch, size_bytes, ADOPT_WAIT) {
            Ok(()) => self.told_bytes = size_bytes,
            Err(error) => self.refuse(status.volume, &error.to_string()),
        }
    }

    fn heal(
        &mut self,
        parts: &mut Parts<'_>,
        status: &HeadStatus,
        entry: &VolumeEntry,
    ) -> Result<(), StoreError> {
        if self.not_before.is_some_and(|at| Instant::now() < at) {
            return Ok(());
        }
        let facts = self.worked.facts(status);
        let now_ms = cluster::unix_ms();
        let plan = heal::plan(entry, &facts, parts.view.picture(), parts.policy, now_ms);
        self.note_blocked(parts, entry, &plan);
        self.busy = plan.step.is_some();
        let Some(step) = plan.step else { return Ok(()) };
        let new = step.apply(&entry.shard);
        if step.alters_in_sync(&entry.shard)
            && let Err(error) =
                parts.plane.change_members(status.volume, status.epoch, &new, PREPARE_WAIT)
        {
            // It may have begun all the same, if its answer is only late: the record as it is
            // ends that.
            self.told = None;
            self.back_off(status.volume);
            if !matches!(error, ChangeError::NotNow { .. }) || self.failures > 3 {
                self.refuse(status.volume, &error.to_string());
            }
            return Ok(());
        }
        self.pending = Some(Pending { expected: entry.shard.clone(), new, cause: plan.cause });
        self.finish(parts, status)
    }

    /// Makes a pending change true, or learns what came in between. After an error the outcome is
    /// not known, and this is called again.
    fn finish(&mut self, parts: &mut Parts<'_>, status: &HeadStatus) -> Result<(), StoreError> {
        let Some(pending) = &self.pending else { return Ok(()) };
        let (volume, epoch) = (status.volume, status.epoch);
        let changed =
            members::change(parts.store, volume, epoch, parts.me, &pending.expected, &pending.new);
        let entry = match changed {
            Ok(ChangeOutcome::Changed(entry)) => {
                let told = told(&pending.cause, &pending.expected, &entry, parts.view);
                for event in &told {
                    tracing::info!(cause = event.cause, "{}", event.text);
                }
                parts.happened.extend(told);
                self.failures = 0;
                self.not_before = None;
                entry
            }
            Ok(ChangeOutcome::Conflict(entry)) => entry,
            Ok(ChangeOutcome::Deposed(entry)) => {
                // The head is over, whoever owns it notices by itself.
                self.pending = None;
                parts.view.put(entry);
                return Ok(());
            }
            Err(StoreError { kind: StoreErrorKind::NoVolume(_), .. }) => {
                self.pending = None;
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        self.pending = None;
        self.adopt(parts.plane, status, &entry.shard);
        parts.view.put(entry);
        Ok(())
    }

    fn back_off(&mut self, volume: VolumeId) {
        let wait = BACKOFF.saturating_mul(1 << self.failures.min(8)).min(BACKOFF_MAX);
        // Heads of many volumes that fail for one reason do not all come back at once.
        let jitter = u32::from(volume.bytes()[15]) + 256;
        self.not_before = Some(Instant::now() + wait * jitter / 384);
        self.failures += 1;
    }

    /// A volume that is not well and is left so is told once, unless it is only a matter of time.
    fn note_blocked(&mut self, parts: &mut Parts<'_>, entry: &VolumeEntry, plan: &Plan) {
        let blocked = plan.blocked.as_ref().filter(|blocked| match blocked {
            Blocked::Backoff { .. } | Blocked::Busy { .. } => false,
            Blocked::NoSpare { .. }
            | Blocked::TooManyMoves { .. }
            | Blocked::Floor { .. }
            | Blocked::NoQuorum
            | Blocked::Full => true,
        });
        // What the reasons say in numbers changes; that there is one of the kind counts.
        let kind = blocked.map(std::mem::discriminant);
        if let Some(blocked) = blocked.filter(|_| self.blocked != kind) {
            let text = format!("volume {} is not healed: {}", entry.volume.name, plan.cause);
            let (kind, id) = (EventKind::HealRefused, entry.volume.id);
            tracing::warn!(volume = entry.volume.name, cause = plan.cause, "not healed: {blocked}");
            parts.happened.push(event(kind, Some(id), None, text, blocked.to_string()));
        }
        self.blocked = kind;
    }

    /// Says why, once.
    fn refuse(&mut self, volume: VolumeId, reason: &str) {
        if self.refused.as_deref() != Some(reason) {
            tracing::warn!(%volume, reason, "the head does not take a change of its members");
            self.refused = Some(reason.to_owned());
        }
    }
}

/// What has become of each member, for the log of events.
fn told(cause: &str, old: &ShardRecord, entry: &VolumeEntry, view: &View) -> Vec<Event> {
    let volume = &entry.volume.name;
    let mut events = Vec::new();
    for member in &entry.shard.members {
        let before = old.members.iter().find(|known| known.server == member.server);
        let before = before.map(|known| known.role);
        if before == Some(member.role) {
            continue;
        }
        let server = view.server_name(member.server);
        let (kind, text) = match (before, member.role) {
            (_, Role::Provisioning) => {
                (EventKind::MemberAdded, format!("volume {volume} gets a member on {server}"))
            }
            (_, Role::Leaving) => (
                EventKind::MemberRemoved,
                format!("volume {volume} gives up its member on {server}"),
            ),
            (_, Role::InSync) => {
                (EventKind::InSync, format!("the member of volume {volume} on {server} is in sync"))
            }
            (_, Role::CatchingUp) => (
                EventKind::Demoted,
                format!("the member of volume {volume} on {server} does not count for now"),
            ),
        };
        events.push(event(kind, Some(entry.volume.id), Some(member.server), text, cause));
    }
    events
}
