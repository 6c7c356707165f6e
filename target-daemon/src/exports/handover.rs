//! Exports that come from another process, or back from one.

use std::collections::BTreeMap;
use std::sync::MutexGuard;
use std::time::{Duration, Instant};

use base::VolumeId;
use cluster::VolumeEntry;
use shell::control::Opening;
use shell::handover::{HandOver, LeftExport};

use super::{Export, Exports, State, lock};
use crate::config::ExportConfig;

/// How long all volumes together may take to open.
const OPEN_WAIT: Duration = Duration::from_secs(5);

/// How this process stands to a volume, by the volume's record. The lease outlives the process that
/// took it.
enum Standing {
    /// It holds it, for a guest.
    Holds,
    /// It holds it, and the guest has stopped the disk.
    Yields,
    /// It does not.
    Other,
}

impl Exports {
    /// Nothing is started or stopped, no lease taken or marked for as long as this is held. What
    /// comes after is [`Exports::thaw`], or another process.
    pub(crate) fn freeze(&self) -> MutexGuard<'_, ()> {
        let changing = lock(&self.changing);
        self.follow.freeze();
        changing
    }

    /// All goes on after [`Exports::freeze`].
    pub(crate) fn thaw(&self) {
        self.follow.thaw();
    }

    /// Ends the heads that only repair, so that the next process may have their volumes.
    pub(crate) fn end_repairs(&self) {
        for entry in self.heads.repairing() {
            let (id, epoch) = (entry.volume.id, entry.volume.epoch);
            if let Err(error) = self.heads.close_repair(id, epoch) {
                tracing::warn!(volume = entry.volume.name, %error, "ending a repair");
            }
        }
    }

    /// Goes on with exports that this process had left. Guests must not lose their connection, so
    /// what fails is said and tried again later: the lease is acquired when the store is back.
    pub(crate) fn take_back(&self, hand_over: &dyn HandOver, left: Vec<LeftExport>) {
        for (volume, exports) in by_volume(left) {
            // The head has ended with the data plane.
            let before = exports.iter().filter_map(|export| {
                let entry = self.follow.head(volume);
                self.follow.leave(volume, &export.spec.socket).or(entry)
            });
            let before = before.last();
            let begun = self.begin(volume).or_else(|error| {
                tracing::error!(%volume, error, "the volume is not open yet; trying on");
                before.map(|entry| (entry, Standing::Other, None)).ok_or(error)
            });
            let (found, standing, mut head) = match begun {
                Ok(begun) => begun,
                Err(error) => {
                    tracing::error!(%volume, error, "its front ends are disconnected");
                    continue;
                }
            };
            for export in exports {
                let gone_on = self.go_on_with(hand_over, export, &found, &standing, head.take());
                if let Err(error) = gone_on {
                    tracing::error!(%volume, error, "a front end is disconnected");
                }
            }
        }
    }

    /// Goes on with exports that another process has left: a head in a new epoch for each volume
    /// whose lease is held, then the front ends. Returns when all are served; an error names what
    /// is not.
    pub(crate) fn go_on(
        &self,
        hand_over: &dyn HandOver,
        left: Vec<LeftExport>,
    ) -> Result<(), String> {
        let mut opening = Vec::new();
        for (volume, exports) in by_volume(left) {
            let (found, standing, mut head) = self.begin(volume)?;
            if head.is_some() {
                opening.push(volume);
            }
            for export in exports {
                self.go_on_with(hand_over, export, &found, &standing, head.take())?;
            }
        }
        let deadline = Instant::now() + OPEN_WAIT;
        for volume in opening {
            let wait = deadline.saturating_duration_since(Instant::now());
            match self.wait_open(volume, wait) {
                Ok(Some(Opening::Open) | None) => {}
                Ok(Some(Opening::Pending { reason })) => {
                    return Err(format!("volume {volume} has not opened: {reason}"));
                }
                Err(error) => return Err(format!("volume {volume}: {error}")),
            }
        }
        Ok(())
    }

    /// Begins to open a head of a volume, if its lease is held here.
    fn begin(
        &self,
        volume: VolumeId,
    ) -> Result<(VolumeEntry, Standing, Option<VolumeEntry>), String> {
        let found = self.store.volume(volume).map_err(|error| error.to_string())?;
        let found = found.ok_or_else(|| format!("volume {volume} is gone"))?;
        let standing = match &found.volume.holder {
            Some(holder) if holder.id != self.heads.holder().id || holder.repair => Standing::Other,
            Some(holder) if holder.yieldable => Standing::Yields,
            Some(_) => Standing::Holds,
            None => Standing::Other,
        };
        let head = match standing {
            Standing::Holds => {
                let opened = self.heads.open(volume, false, Duration::ZERO);
                Some(opened.map_err(|error| error.to_string())?.entry)
            }
            Standing::Yields | Standing::Other => None,
        };
        Ok((found, standing, head))
    }

    fn go_on_with(
        &self,
        hand_over: &dyn HandOver,
        export: LeftExport,
        found: &VolumeEntry,
        standing: &Standing,
        head: Option<VolumeEntry>,
    ) -> Result<(), String> {
        let spec = export.spec.clone();
        let (volume, socket) = (spec.volume, &spec.socket);
        let runs = export.front_end.state().connection.as_ref().is_some_and(|connection| {
            connection.rings.iter().any(|ring| ring.enabled && ring.kick.is_some())
        });
        {
            let mut inner = self.inner();
            let known = inner.exports.entry(socket.clone()).or_insert_with(|| {
                // Not configured any more. Its guest is there all the same.
                let wanted = ExportConfig {
                    volume: volume.to_string(),
                    socket: socket.clone(),
                    queues: spec.queues,
                    read_only: spec.read_only,
                    standby: false,
                };
                Export { wanted, configured: false, state: State::Running { volume } }
            });
            known.state = State::Running { volume };
            let standby = known.wanted.standby;
            drop(inner);
            self.follow.join(found, socket, standby, head);
        }
        if runs {
            self.follow.started(volume, socket);
        } else if matches!(standing, Standing::Yields) {
            self.follow.stopped(volume, socket, true);
        }
        hand_over.resume_export(export).map_err(|error| error.to_string())
    }
}

fn by_volume(left: Vec<LeftExport>) -> BTreeMap<VolumeId, Vec<LeftExport>> {
    let mut volumes: BTreeMap<VolumeId, Vec<LeftExport>> = BTreeMap::new();
    for export in left {
        volumes.entry(export.spec.volume).or_default().push(export);
    }
    volumes
}
