//! Exports that come from another process, or back from one, and the leases that follow them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use base::{Holder, VolumeId};
use cluster::lease::{self, Acquire};
use cluster::{ClusterStore, VolumeEntry};
use shell::control::{ExportSpec, HeadSpec, Opening};
use shell::handover::{HandOver, LeftExport};

use super::{Follow, Use};

/// How long all volumes together may take to open.
const OPEN_WAIT: Duration = Duration::from_secs(5);

/// Notes that an export is served here; true if it is a standby's.
pub type Adopt<'a> = &'a dyn Fn(&ExportSpec) -> bool;

/// How this process stands to a volume, by the volume's record. The lease outlives the process that
/// took it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Standing {
    /// It holds it, for a guest.
    Holds,
    /// It does not, or would give it to whoever wants it: a guest that uses it has to acquire it.
    Other,
}

impl Standing {
    fn of(entry: &VolumeEntry, me: &Holder) -> Self {
        match &entry.volume.holder {
            Some(holder) if holder.id == me.id && !holder.repair && !holder.yieldable => {
                Self::Holds
            }
            Some(_) | None => Self::Other,
        }
    }
}

/// Leases that were acquired anew for exports that another process has left, while there was no data plane
/// yet to open heads on.
#[derive(Debug, Default)]
pub struct Leases(BTreeMap<VolumeId, VolumeEntry>);

impl Leases {
    /// Acquires the volumes of `left` whose leases `me` holds for a guest. What cannot be had is
    /// acquired, or refused, when its head is to be opened.
    pub fn renewed(store: &dyn ClusterStore, me: &Holder, left: &[LeftExport]) -> Self {
        let volumes: BTreeSet<VolumeId> = left.iter().map(|export| export.spec.volume).collect();
        let renew = |id: VolumeId| {
            let found =
                store.volume(id).ok()?.filter(|entry| Standing::of(entry, me) == Standing::Holds);
            lease::acquire_known(store, id, me, Acquire::default(), Some(found?)).ok()
        };
        Self(volumes.into_iter().filter_map(|id| Some((id, renew(id)?))).collect())
    }
}

/// A volume whose head may be opening.
struct Begun {
    found: VolumeEntry,
    standing: Standing,
    head: Option<VolumeEntry>,
}

impl Follow {
    /// Begins nothing any more and waits for what is under way: another process is about to act in
    /// this one's name.
    pub fn freeze(&self) {
        let mut volumes = self.shared.volumes();
        for volume in volumes.values_mut() {
            volume.leaving = true;
        }
        self.shared.news.notify_all();
        while volumes.values().any(|volume| volume.busy) {
            volumes = self.shared.news.wait(volumes).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Goes on after [`Follow::freeze`].
    pub fn thaw(&self) {
        let mut volumes = self.shared.volumes();
        let frozen: Vec<VolumeId> = volumes.keys().copied().collect();
        for id in frozen {
            if let Some(volume) = volumes.get_mut(&id) {
                volume.leaving = false;
            }
            self.shared.look(&mut volumes, id);
        }
    }

    /// Goes on with exports that this process had left. Guests must not lose their connection, so
    /// what fails is said and tried again later: the lease is acquired when the store is back.
    pub fn take_back(&self, hand_over: &dyn HandOver, left: Vec<LeftExport>, adopt: Adopt<'_>) {
        for (volume, exports) in by_volume(left) {
            // The head has ended with the data plane.
            let mut before = None;
            for export in &exports {
                let entry = self.head(volume);
                before = self.leave(volume, &export.spec.socket).or(entry).or(before);
            }
            let begun = self.begin(volume, None).or_else(|error| {
                tracing::error!(%volume, error, "the volume is not open yet; trying on");
                let found = before.ok_or(error)?;
                Ok(Begun { found, standing: Standing::Other, head: None })
            });
            let mut begun = match begun {
                Ok(begun) => begun,
                Err::<_, String>(error) => {
                    tracing::error!(%volume, error, "its front ends are disconnected");
                    continue;
                }
            };
            for export in exports {
                if let Err(error) = self.go_on_with(hand_over, export, &mut begun, adopt) {
                    tracing::error!(%volume, error, "a front end is disconnected");
                }
            }
        }
    }

    /// Goes on with exports that another process has left: a head in a new epoch for each volume
    /// whose lease is held, then the front ends. Returns when all are served; an error names what
    /// is not. Where a lease was acquired before, the data plane knows the servers' addresses.
    pub fn go_on(
        &self,
        hand_over: &dyn HandOver,
        left: Vec<LeftExport>,
        mut leases: Leases,
        adopt: Adopt<'_>,
    ) -> Result<(), String> {
        let mut opening = Vec::new();
        for (volume, exports) in by_volume(left) {
            let mut begun = self.begin(volume, leases.0.remove(&volume))?;
            opening.extend(begun.head.clone());
            for export in exports {
                self.go_on_with(hand_over, export, &mut begun, adopt)?;
            }
        }
        let deadline = Instant::now() + OPEN_WAIT;
        for entry in opening {
            let wait = deadline.saturating_duration_since(Instant::now());
            let name = entry.volume.name.clone();
            let spec = HeadSpec { volume: entry.volume, shard: entry.shard };
            match self.shared.plane.open_head(&spec, wait) {
                Ok(Opening::Open) => {}
                Ok(Opening::Pending { reason }) => {
                    return Err(format!("volume {name} has not opened: {reason}"));
                }
                Err(error) => return Err(format!("volume {name}: {error}")),
            }
        }
        Ok(())
    }

    /// Begins to open a head of a volume, if its lease is held here; `acquired` for it, if it was.
    fn begin(&self, volume: VolumeId, acquired: Option<VolumeEntry>) -> Result<Begun, String> {
        let heads = &self.shared.heads;
        if let Some(entry) = acquired {
            let head = heads.open_acquired(entry).map_err(|error| error.to_string())?.entry;
            return Ok(Begun { found: head.clone(), standing: Standing::Holds, head: Some(head) });
        }
        let found = heads.entry(volume).map_err(|error| error.to_string())?;
        let found = found.ok_or_else(|| format!("volume {volume} is gone"))?;
        let standing = Standing::of(&found, heads.holder());
        let head = match standing {
            Standing::Holds => {
                let opened = heads.open(volume, false, Duration::ZERO);
                Some(opened.map_err(|error| error.to_string())?.entry)
            }
            Standing::Other => None,
        };
        Ok(Begun { found, standing, head })
    }

    fn go_on_with(
        &self,
        hand_over: &dyn HandOver,
        export: LeftExport,
        begun: &mut Begun,
        adopt: Adopt<'_>,
    ) -> Result<(), String> {
        let runs = export.front_end.state().connection.as_ref().is_some_and(|connection| {
            connection.rings.iter().any(|ring| ring.enabled && ring.kick.is_some())
        });
        let standby = adopt(&export.spec);
        // Whose rings have stopped for another one's sake does not want the lease back.
        let in_use = runs || begun.standing == Standing::Holds && !standby;
        self.join_as(
            &begun.found,
            &export.spec.socket,
            Use { standby, in_use, awaits: false },
            begun.head.take(),
        );
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
