//! What the cluster store said last. Kept while it is away.

use std::time::{Duration, Instant};

use base::{ServerId, VolumeId};
use cluster::{ClusterStore, Picture, ServerEntry, StoreError, VolumeEntry};

/// How old the servers' last words may be. They come every two seconds and are no news for the
/// store's revision.
const SERVERS_AGE_MAX: Duration = Duration::from_secs(1);

/// Volumes and servers as they were read last.
#[derive(Default)]
pub(crate) struct View {
    /// The revision that the volumes were read at.
    seen: Option<u64>,
    /// By id.
    volumes: Vec<VolumeEntry>,
    picture: Picture,
    servers_read: Option<Instant>,
}

impl View {
    /// Reads what may have changed.
    pub(crate) fn refresh(&mut self, store: &dyn ClusterStore) -> Result<(), StoreError> {
        // The revision first: what changes after it is read again next time.
        let revision = store.revision()?;
        let news = self.seen != Some(revision);
        if news {
            let mut volumes = store.volumes()?;
            volumes.sort_by_key(|entry| entry.volume.id);
            self.volumes = volumes;
        }
        if news || self.servers_read.is_none_or(|at| at.elapsed() >= SERVERS_AGE_MAX) {
            self.picture = Picture::of(&self.volumes, store.servers()?);
            self.servers_read = Some(Instant::now());
        }
        self.seen = Some(revision);
        Ok(())
    }

    /// The revision that the volumes were read at; `None`: they are to be read again.
    pub(crate) fn revision(&self) -> Option<u64> {
        self.seen
    }

    /// Takes in what a change has made of a volume. The next refresh reads everything again.
    pub(crate) fn put(&mut self, entry: VolumeEntry) {
        match self.index(entry.volume.id) {
            Ok(index) => self.volumes[index] = entry,
            Err(index) => self.volumes.insert(index, entry),
        }
        self.seen = None;
    }

    /// A volume, deleted ones too.
    pub(crate) fn volume(&self, id: VolumeId) -> Option<&VolumeEntry> {
        self.index(id).ok().map(|index| &self.volumes[index])
    }

    /// All volumes, deleted ones too.
    pub(crate) fn volumes(&self) -> &[VolumeEntry] {
        &self.volumes
    }

    /// What decisions about places are made on.
    pub(crate) fn picture(&self) -> &Picture {
        &self.picture
    }

    /// A server.
    pub(crate) fn server(&self, id: ServerId) -> Option<&ServerEntry> {
        self.picture.server(id)
    }

    /// A server's name for people.
    pub(crate) fn server_name(&self, id: ServerId) -> String {
        self.server(id).map_or_else(|| id.to_string(), |entry| entry.server.name.clone())
    }

    /// A volume's name for people.
    pub(crate) fn volume_name(&self, id: VolumeId) -> String {
        self.volume(id).map_or_else(|| id.to_string(), |entry| entry.volume.name.clone())
    }

    fn index(&self, id: VolumeId) -> Result<usize, usize> {
        self.volumes.binary_search_by_key(&id, |entry| entry.volume.id)
    }
}
