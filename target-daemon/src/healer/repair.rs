//! Healing volumes that nobody has attached: a server that has an up-to-date replica becomes their
//! head for as long as that takes, and gives way to anybody who wants to serve them.
//!
//! Which server tries first follows from the records, others wait longer; that two do not do it at once
//! is decided by the compare-and-swap of the lease.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use base::{Epoch, ServerId, VolumeId};
use cluster::heal::{self, Repair};
use cluster::lease::AcquireError;
use cluster::{EventKind, StoreError, VolumeEntry};
use shell::control::{HeadPhase, HeadStatus};

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
/// The longest such wait.
const BACKOFF_MAX: Duration = Duration::from_mins(1);

/// What one server does for volumes that nobody has attached.
pub(super) struct Repairs {
    server: ServerId,
    volumes: BTreeMap<VolumeId, Candidate>,
}

/// A volume that needs a head, or has one here only to be repaired.
struct Candidate {
    /// Since when it has needed one.
    since: Instant,
    not_before: Instant,
    failures: u32,
    running: Option<Running>,
}

struct Running {
    epoch: Epoch,
    started: Instant,
    busy: Instant,
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
        Self { server, volumes: BTreeMap::new() }
    }

    /// Begins and ends repairs.
    pub(super) fn turn(
        &mut self,
        heads: &Heads,
        parts: &mut Parts<'_>,
        statuses: &[HeadStatus],
        changes: &Changes,
    ) -> Result<(), StoreError> {
        self.end(heads, parts, statuses, changes);
        let now_ms = cluster::unix_ms();
        let (picture, policy) = (parts.view.picture(), parts.policy);
        let mine = |entry: &&VolumeEntry| entry.shard.in_sync().any(|id| id == self.server);
        let needy: Vec<(VolumeEntry, Repair)> = parts
            .view
            .volumes()
            .iter()
            .filter(mine)
            .filter_map(|entry| {
                let repair = heal::wants_repair(entry, picture, policy, now_ms)?;
                Some((entry.clone(), repair))
            })
            .collect();
        self.volumes.retain(|volume, candidate| {
            candidate.running.is_some() || needy.iter().any(|(entry, _)| entry.volume.id == *volume)
        });
        for (entry, repair) in needy {
            self.consider(heads, parts, &entry, repair)?;
        }
        Ok(())
    }

    fn consider(
        &mut self,
        heads: &Heads,
        parts: &mut Parts<'_>,
        entry: &VolumeEntry,
        repair: Repair,
    ) -> Result<(), StoreError> {
        let id = entry.volume.id;
        let running = self.volumes.values().filter(|known| known.running.is_some()).count();
        let wait = wait(id, repair.server == self.server);
        let now = Instant::now();
        let candidate = self.volumes.entry(id).or_insert_with(|| Candidate {
            since: now,
            not_before: now,
            failures: 0,
            running: None,
        });
        let early = now < candidate.since + wait || now < candidate.not_before;
        if candidate.running.is_some() || early || running >= REPAIRS_MAX {
            return Ok(());
        }
        let error = match heads.open_repair(id) {
            Ok(epoch) => {
                candidate.failures = 0;
                candidate.running = Some(Running { epoch, started: now, busy: now });
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
    fn end(
        &mut self,
        heads: &Heads,
        parts: &mut Parts<'_>,
        statuses: &[HeadStatus],
        changes: &Changes,
    ) {
        let now_ms = cluster::unix_ms();
        for (volume, candidate) in &mut self.volumes {
            let Some(running) = &mut candidate.running else { continue };
            let (now, epoch) = (Instant::now(), running.epoch);
            let status = statuses.iter().find(|head| head.volume == *volume && head.epoch == epoch);
            let entry = parts.view.volume(*volume);
            let deposed = entry.is_none_or(|entry| entry.deleted || entry.volume.epoch != epoch);
            let Some(status) = status.filter(|_| !deposed) else {
                // A guest has it, or its head is gone.
                close(heads, *volume, epoch);
                candidate.running = None;
                continue;
            };
            let entry = entry.expect("not deposed");
            let opening = matches!(status.phase, HeadPhase::Opening { .. });
            if opening && now.duration_since(running.started) < OPEN_LIMIT {
                continue;
            }
            let wanted = heal::wants_repair(entry, parts.view.picture(), parts.policy, now_ms);
            let busy = wanted.is_some() || status.change_open || changes.is_busy(*volume, epoch);
            if busy && !opening {
                running.busy = now;
                continue;
            }
            if !opening && now.duration_since(running.busy) < IDLE {
                continue;
            }
            close(heads, *volume, epoch);
            candidate.running = None;
            candidate.fail(now);
            let cause =
                if opening { "its members do not answer" } else { "there is nothing to do" };
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
