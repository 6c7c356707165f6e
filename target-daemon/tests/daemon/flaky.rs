//! A cluster store that can be out of reach, in two ways.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use base::{ClusterId, ServerId, ShardRecord, VolumeId, VolumeRecord};
use cluster::{
    ClusterStore, Draining, Event, Heartbeat, ServerEntry, ServerRecord, StoreError,
    StoreErrorKind, Versions, VolumeEntry, VolumeStatus,
};

/// How the store is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    Works,
    /// Nothing gets there.
    RequestsLost,
    /// Changes of volumes get there; nothing comes back.
    AnswersLost,
}

pub(crate) struct Flaky {
    inner: Arc<dyn ClusterStore>,
    mode: Mutex<Mode>,
}

impl Flaky {
    pub(crate) fn new(inner: Arc<dyn ClusterStore>) -> Self {
        Self { inner, mode: Mutex::new(Mode::Works) }
    }

    pub(crate) fn set(&self, mode: Mode) {
        *self.mode.lock().unwrap() = mode;
    }

    fn mode(&self) -> Mode {
        *self.mode.lock().unwrap()
    }

    fn reach(&self) -> Result<&dyn ClusterStore, StoreError> {
        if self.mode() == Mode::Works { Ok(self.inner.as_ref()) } else { Err(self.lost()) }
    }

    fn lost(&self) -> StoreError {
        let kind = StoreErrorKind::Unavailable("lost".into());
        StoreError { store: self.inner.address(), kind }
    }
}

impl ClusterStore for Flaky {
    fn address(&self) -> String {
        self.inner.address()
    }

    fn cluster_id(&self) -> Result<ClusterId, StoreError> {
        self.reach()?.cluster_id()
    }

    /// Goes on: what a healer decides on is what it read before.
    fn revision(&self) -> Result<u64, StoreError> {
        self.inner.revision()
    }

    fn wait_for_change(&self, seen: u64, wait: Duration) -> Result<u64, StoreError> {
        self.reach()?.wait_for_change(seen, wait)
    }

    fn volumes(&self) -> Result<Vec<VolumeEntry>, StoreError> {
        self.reach()?.volumes()
    }

    fn volume(&self, id: VolumeId) -> Result<Option<VolumeEntry>, StoreError> {
        // What is read before a change is answered, lest nothing were ever tried.
        match self.mode() {
            Mode::Works | Mode::AnswersLost => self.inner.volume(id),
            Mode::RequestsLost => Err(self.lost()),
        }
    }

    fn volume_named(&self, name: &str) -> Result<Option<VolumeEntry>, StoreError> {
        self.reach()?.volume_named(name)
    }

    fn insert_volume(
        &self,
        volume: &VolumeRecord,
        shard: &ShardRecord,
        revision: u64,
    ) -> Result<VolumeEntry, StoreError> {
        self.reach()?.insert_volume(volume, shard, revision)
    }

    fn update_volume(&self, entry: &VolumeEntry) -> Result<Versions, StoreError> {
        if self.mode() == Mode::AnswersLost {
            self.inner.update_volume(entry)?;
            self.set(Mode::RequestsLost);
        }
        self.reach()?.update_volume(entry)
    }

    fn update_volume_at(&self, entry: &VolumeEntry, revision: u64) -> Result<Versions, StoreError> {
        self.reach()?.update_volume_at(entry, revision)
    }

    fn purge_volume(&self, id: VolumeId, versions: Versions) -> Result<(), StoreError> {
        self.reach()?.purge_volume(id, versions)
    }

    fn servers(&self) -> Result<Vec<ServerEntry>, StoreError> {
        self.inner.servers()
    }

    fn insert_server(&self, server: &ServerRecord) -> Result<(), StoreError> {
        self.reach()?.insert_server(server)
    }

    fn update_server(&self, server: &ServerRecord, version: u64) -> Result<(), StoreError> {
        self.reach()?.update_server(server, version)
    }

    fn set_draining(
        &self,
        id: ServerId,
        draining: Option<Draining>,
        revision: u64,
    ) -> Result<(), StoreError> {
        self.reach()?.set_draining(id, draining, revision)
    }

    fn heartbeat(&self, beat: &Heartbeat) -> Result<(), StoreError> {
        self.reach()?.heartbeat(beat)
    }

    fn remove_server(&self, id: ServerId) -> Result<(), StoreError> {
        self.reach()?.remove_server(id)
    }

    fn put_statuses(&self, statuses: &[VolumeStatus]) -> Result<(), StoreError> {
        self.inner.put_statuses(statuses)
    }

    fn statuses(&self) -> Result<Vec<VolumeStatus>, StoreError> {
        self.reach()?.statuses()
    }

    fn append_event(&self, event: &Event) -> Result<u64, StoreError> {
        self.inner.append_event(event)
    }

    fn events(&self, after: u64, limit: usize) -> Result<Vec<(u64, Event)>, StoreError> {
        self.reach()?.events(after, limit)
    }

    fn last_event(&self) -> Result<u64, StoreError> {
        self.reach()?.last_event()
    }
}
