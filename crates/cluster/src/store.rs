//! The trait every cluster store implements.

use std::time::Duration;

use base::{ClusterId, ServerId, ShardRecord, VolumeId, VolumeRecord};

use crate::error::{StoreError, StoreErrorKind};
use crate::events::Event;
use crate::records::{Draining, Heartbeat, ServerEntry, ServerRecord, Versions, VolumeEntry};
use crate::status::VolumeStatus;

/// Whether opening may make a new store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Create {
    /// It must be there. What daemons use: an empty store in place of a lost one helps nobody.
    Never,
    /// Make one if there is none.
    IfMissing,
}

/// What became of a change that was conditional on how a volume was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Swapped {
    /// It was made; the new versions.
    Written(Versions),
    /// Somebody else was faster; the volume as it is now. Nothing was changed.
    Refused(Box<VolumeEntry>),
}

impl Swapped {
    pub(crate) fn or_conflict(self) -> Result<Versions, StoreErrorKind> {
        match self {
            Self::Written(versions) => Ok(versions),
            Self::Refused(_) => Err(StoreErrorKind::Conflict),
        }
    }
}

/// Keeps the records of a cluster. Methods block for a bounded time and may be called from
/// several threads and processes at once; each is atomic and, when it returns, durable.
pub trait ClusterStore: Send + Sync {
    /// The store's address, for messages.
    fn address(&self) -> String;

    /// The cluster's id, made with the store.
    fn cluster_id(&self) -> Result<ClusterId, StoreError>;

    /// Grows with every change to a volume, a shard, a server's registration or its addresses;
    /// not with a heartbeat that brings no such news.
    fn revision(&self) -> Result<u64, StoreError>;

    /// Waits until the revision is another than `seen`, for up to `wait`; the revision then.
    fn wait_for_change(&self, seen: u64, wait: Duration) -> Result<u64, StoreError>;

    /// All volumes, deleted ones too, by name.
    fn volumes(&self) -> Result<Vec<VolumeEntry>, StoreError>;

    /// One volume, deleted or not.
    fn volume(&self, id: VolumeId) -> Result<Option<VolumeEntry>, StoreError>;

    /// Waits until a volume is another than it was with the versions `seen`, for up to `wait`: the volume
    /// then, and at once if none were seen. `None` if nothing has changed. May be late, so what is decided
    /// on it is to be conditional on its versions. Fails with `NoVolume`, and when the store cannot
    /// tell (any more).
    fn watch_volume(
        &self,
        id: VolumeId,
        seen: Option<Versions>,
        wait: Duration,
    ) -> Result<Option<VolumeEntry>, StoreError>;

    /// The volume with this name that is not deleted.
    fn volume_named(&self, name: &str) -> Result<Option<VolumeEntry>, StoreError>;

    /// Adds a volume with its shard, if the revision is still `revision`: placements decided on
    /// the same picture do not both come true. Fails with `Conflict` or `VolumeNameTaken`.
    fn insert_volume(
        &self,
        volume: &VolumeRecord,
        shard: &ShardRecord,
        revision: u64,
    ) -> Result<VolumeEntry, StoreError>;

    /// Replaces both records and the tombstone of `entry`, if both still have `entry.versions`; else says
    /// what is there, which saves reading it. Fails with `NoVolume`.
    ///
    /// The store refuses to lower an epoch and to lift a tombstone.
    fn swap_volume(&self, entry: &VolumeEntry) -> Result<Swapped, StoreError>;

    /// The same, but what was refused is the error `Conflict`. Returns the new versions.
    fn update_volume(&self, entry: &VolumeEntry) -> Result<Versions, StoreError> {
        let swapped = self.swap_volume(entry)?.or_conflict();
        swapped.map_err(|kind| StoreError { store: self.address(), kind })
    }

    /// The same, but only if the revision is still `revision`, too: room that was found on the same picture is not
    /// given twice.
    fn update_volume_at(&self, entry: &VolumeEntry, revision: u64) -> Result<Versions, StoreError>;

    /// Forgets a deleted volume that has no members left, if both records still have these
    /// versions. Fails with `Conflict` or `NoVolume`.
    fn purge_volume(&self, id: VolumeId, versions: Versions) -> Result<(), StoreError>;

    /// All servers, by name.
    fn servers(&self) -> Result<Vec<ServerEntry>, StoreError>;

    /// Adds a server. Fails with `ServerTaken` if its id, name or pool is taken.
    fn insert_server(&self, server: &ServerRecord) -> Result<(), StoreError>;

    /// Replaces a server's record if it still has this version, and forgets when it was last
    /// seen. Fails with `Conflict` or `ServerTaken`.
    fn update_server(&self, server: &ServerRecord, version: u64) -> Result<(), StoreError>;

    /// Sets or clears the flag that a server is to be emptied, if the revision is still `revision`:
    /// drainings decided on the same picture do not both come true. What else is known of the
    /// server stays. Fails with `Conflict` or `NoServer`.
    fn set_draining(
        &self,
        id: ServerId,
        draining: Option<Draining>,
        revision: u64,
    ) -> Result<(), StoreError>;

    /// Notes that a server runs; keeps its draining flag. Fails with `NotRegistered`.
    fn heartbeat(&self, beat: &Heartbeat) -> Result<(), StoreError>;

    /// Forgets a server. Nothing happens if there is none.
    fn remove_server(&self, id: ServerId) -> Result<(), StoreError>;

    /// Keeps what holders tell of their volumes, one for each volume. Unconditional, not durable, no
    /// news for [`Self::revision`]. Those of an older epoch than the one that is kept, and of
    /// volumes that are not there, are dropped.
    fn put_statuses(&self, statuses: &[VolumeStatus]) -> Result<(), StoreError>;

    /// What was told last of each volume, by volume. May be stale: see
    /// [`VolumeStatus::is_current`].
    fn statuses(&self) -> Result<Vec<VolumeStatus>, StoreError>;

    /// Appends to the log of events and gives the event its number, from 1. No news for
    /// [`Self::revision`]; the oldest beyond [`crate::EVENTS_MAX`] are dropped. After a failure it
    /// may or may not be there.
    fn append_event(&self, event: &Event) -> Result<u64, StoreError>;

    /// Up to `limit` events with numbers above `after`, by number.
    fn events(&self, after: u64, limit: usize) -> Result<Vec<(u64, Event)>, StoreError>;

    /// The number of the newest event; 0: there was none.
    fn last_event(&self) -> Result<u64, StoreError>;
}
