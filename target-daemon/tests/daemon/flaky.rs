//! A cluster store that can be out of reach, in two ways.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use base::{ClusterId, ServerId, ShardRecord, VolumeId, VolumeRecord};
use cluster::{
    ClusterStore, Draining, Event, Heartbeat, ServerEntry, ServerRecord, StoreError,
    StoreErrorKind, Swapped, Versions, VolumeEntry, VolumeStatus,
};

/// How the store is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    Works,
    /// Nothing gets there.
    RequestsLost,
    /// Changes of volumes get there; nothing comes back.
    AnswersLost,
    /// It tells no news.
    WatchesSilent,
    /// It does not let itself be watched.
    WatchesRefused,
}

pub(crate) struct Flaky {
    inner: Arc<dyn ClusterStore>,
    mode: Mutex<Mode>,
    /// Questions for a volume, and changes of one.
    asked: Mutex<(usize, usize)>,
}

impl Flaky {
    pub(crate) fn new(inner: Arc<dyn ClusterStore>) -> Self {
        Self { inner, mode: Mutex::new(Mode::Works), asked: Mutex::default() }
    }

    /// Volumes that were read and tried to change since this was asked last.
    pub(crate) fn asked(&self) -> (usize, usize) {
        std::mem::take(&mut self.asked.lock().unwrap())
    }

    pub(crate) fn set(&self, mode: Mode) {
        *self.mode.lock().unwrap() = mode;
    }

    fn mode(&self) -> Mode {
        *self.mode.lock().unwrap()
    }

    fn reach(&self) -> Result<&dyn ClusterStore, StoreError> {
        match self.mode() {
            Mode::Works | Mode::WatchesSilent | Mode::WatchesRefused => Ok(self.inner.as_ref()),
            Mode::RequestsLost | Mode::AnswersLost => Err(self.lost()),
        }
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
        self.asked.lock().unwrap().0 += 1;
        // What is read before a change is answered, lest nothing were ever tried.
        match self.mode() {
            Mode::AnswersLost => self.inner.volume(id),
            Mode::Works | Mode::WatchesSilent | Mode::WatchesRefused | Mode::RequestsLost => {
                self.reach()?.volume(id)
            }
        }
    }

    fn watch_volume(
        &self,
        id: VolumeId,
        seen: Option<Versions>,
        wait: Duration,
    ) -> Result<Option<VolumeEntry>, StoreError> {
        let start = Instant::now();
        loop {
            let found = match self.mode() {
                Mode::Works => self.inner.watch_volume(id, seen, Duration::ZERO)?,
                Mode::WatchesSilent => None,
                Mode::WatchesRefused | Mode::RequestsLost | Mode::AnswersLost => {
                    return Err(self.lost());
                }
            };
            if found.is_some() || start.elapsed() >= wait {
                return Ok(found.filter(|_| self.mode() == Mode::Works));
            }
            std::thread::park_timeout(Duration::from_millis(2));
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

    fn swap_volume(&self, entry: &VolumeEntry) -> Result<Swapped, StoreError> {
        self.asked.lock().unwrap().1 += 1;
        if self.mode() == Mode::AnswersLost {
            self.inner.swap_volume(entry)?;
            // Unless the test has gone on meanwhile.
            let mut mode = self.mode.lock().unwrap();
            if *mode == Mode::AnswersLost {
                *mode = Mode::RequestsLost;
            }
        }
        self.reach()?.swap_volume(entry)
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
