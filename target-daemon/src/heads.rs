//! Leases and heads, joined: acquire by compare-and-swap, open, and give back after closing.
//!
//! The order is what matters. A head is opened only in an epoch that the cluster store gave to
//! this holder; the lease is given back only when the head is known to have ended. A holder that
//! dies in between finds its own lease when it is back, since its id outlives the process.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use base::{Epoch, Holder, HolderId, ServerId, VolumeId};
use cluster::lease::{self, Acquire, AcquireError, Marked};
use cluster::{ClusterStore, ServerEntry, StoreError, VolumeEntry};
use shell::control::{ControlError, DataPlane, HeadSpec, OpenError, Opening, ServerAddress};

/// How long a head that only repairs gets to release its members when it gives way: some round
/// trips, so that the next head need not wait for what it was granted.
const GIVE_WAY: Duration = Duration::from_millis(300);

/// Acquisitions in a row that a store which was rolled back behind its members may cost.
const EPOCH_ATTEMPTS: usize = 4;

/// The holder that a server is.
pub fn server_holder(server: ServerId, name: &str) -> Holder {
    Holder {
        id: HolderId::from_bytes(server.bytes()),
        name: format!("server {name}"),
        repair: false,
        yieldable: false,
    }
}

/// The holder that `holdfast attach` at this socket of this machine is: the same one whenever it
/// is started again, another one on every other machine and at every other socket. `socket` is
/// canonical.
pub fn attach_holder(socket: &Path) -> Holder {
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let machine = fs::read_to_string("/etc/machine-id").unwrap_or_default();
    let name = format!("{}\0{host}\0{}", machine.trim(), socket.display());
    Holder {
        id: HolderId::from_bytes(cluster::named_id(name.as_bytes())),
        name: format!("attach on {host} at {}", socket.display()),
        repair: false,
        yieldable: false,
    }
}

/// Why a volume was not opened. No head of it runs here, and its lease was given back if it had
/// been taken, but for [`HeadError::NotClosed`].
#[derive(Debug, thiserror::Error)]
pub enum HeadError {
    /// The lease was not to be had.
    #[error(transparent)]
    Acquire(#[from] AcquireError),
    /// Another head came while this one opened.
    #[error("volume '{volume}' was taken over by {by} while it was being opened")]
    Superseded {
        /// The volume's name.
        volume: String,
        /// Who holds it now.
        by: String,
    },
    /// The data plane could not open it.
    #[error("volume '{volume}': {source}")]
    Open {
        /// The volume's name.
        volume: String,
        /// Why.
        source: OpenError,
    },
    /// The head could not be stopped; the lease stays taken.
    #[error("the head of volume '{volume}' does not end: {source}")]
    NotClosed {
        /// The volume's name.
        volume: String,
        /// Why.
        source: ControlError,
    },
    /// The cluster store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// A volume that this process is the head of.
#[derive(Clone, Debug)]
pub struct Head {
    /// Its records as they were when the lease was taken.
    pub entry: VolumeEntry,
    /// How far the opening was.
    pub opening: Opening,
}

impl Head {
    /// The volume's id.
    pub fn volume(&self) -> VolumeId {
        self.entry.volume.id
    }

    /// What the data plane was asked to open.
    pub fn spec(&self) -> HeadSpec {
        HeadSpec { volume: self.entry.volume.clone(), shard: self.entry.shard.clone() }
    }
}

/// Whether the data plane has to be told where the servers are before a head opens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Book {
    Refresh,
    Known,
}

/// Opens and closes heads for one holder.
#[derive(Clone)]
pub struct Heads {
    store: Arc<dyn ClusterStore>,
    plane: Arc<dyn DataPlane>,
    me: Holder,
    /// The highest epoch that a volume's members are known to have sealed, where that deposed a
    /// head of ours. The next one goes above it, even if the store was rolled back.
    sealed: Arc<Mutex<BTreeMap<VolumeId, Epoch>>>,
    /// Volumes that this process only repairs. Held while one of them, or a head that is to serve
    /// one, is opened or closed: two heads of one volume in one process must not cross.
    repairs: Arc<Mutex<BTreeMap<VolumeId, VolumeEntry>>>,
}

impl Heads {
    /// Heads of the holder `me`.
    pub fn new(store: Arc<dyn ClusterStore>, plane: Arc<dyn DataPlane>, me: Holder) -> Self {
        Self { store, plane, me, sealed: Arc::default(), repairs: Arc::default() }
    }

    /// Notes that a member of the volume has sealed this epoch.
    pub fn note_sealed(&self, id: VolumeId, sealed: Epoch) {
        let mut known = self.sealed.lock().unwrap_or_else(PoisonError::into_inner);
        let highest = known.entry(id).or_default();
        *highest = sealed.max(*highest);
    }

    fn known_sealed(&self, id: VolumeId) -> Epoch {
        let known = self.sealed.lock().unwrap_or_else(PoisonError::into_inner);
        known.get(&id).copied().unwrap_or(Epoch::NONE)
    }

    /// Who holds the leases.
    pub fn holder(&self) -> &Holder {
        &self.me
    }

    /// Acquires a volume and opens a head of it, waiting for up to `wait` until it serves. An
    /// opening that takes longer goes on.
    ///
    /// A head of ours that only repairs the volume gives way.
    pub fn open(&self, id: VolumeId, force: bool, wait: Duration) -> Result<Head, HeadError> {
        let mut repairs = self.repairs();
        if let Some(entry) = repairs.get(&id) {
            self.end_within(entry, GIVE_WAY)?;
            repairs.remove(&id);
        }
        self.open_by(id, wait, Book::Refresh, |attempt, above| {
            // Once it is ours, no force is needed.
            let how = Acquire { force: force && attempt == 1, above, ..Acquire::default() };
            lease::acquire(self.store.as_ref(), id, &self.me, how)
        })
    }

    /// Acquires a volume for a guest that has started it here, from a holder that yields it too, and
    /// begins to open a head. The data plane knows the members' addresses already. `known` is how the
    /// volume was when it was heard of last; if it is so still that saves a question to the store. `early`: that
    /// guest has not come yet, and the lease is yielded at once.
    pub fn open_standby(
        &self,
        id: VolumeId,
        known: Option<&VolumeEntry>,
        early: bool,
    ) -> Result<Head, HeadError> {
        let mut repairs = self.repairs();
        if let Some(entry) = repairs.get(&id) {
            self.end_within(entry, GIVE_WAY)?;
            repairs.remove(&id);
        }
        self.open_by(id, Duration::ZERO, Book::Known, |attempt, above| {
            let how = Acquire { standby: true, yields: early, above, ..Acquire::default() };
            let known = known.filter(|_| attempt == 1).cloned();
            lease::acquire_known(self.store.as_ref(), id, &self.me, how, known)
        })
    }

    /// Begins to open a head of a volume that was acquired for it already, which the data plane knows
    /// the members' addresses of.
    pub(crate) fn open_acquired(&self, entry: VolumeEntry) -> Result<Head, HeadError> {
        let _repairs = self.repairs();
        let id = entry.volume.id;
        let acquired = Cell::new(Some(entry));
        self.open_by(id, Duration::ZERO, Book::Known, |_, above| {
            acquired.take().map_or_else(
                || {
                    let how = Acquire { above, ..Acquire::default() };
                    lease::acquire(self.store.as_ref(), id, &self.me, how)
                },
                Ok,
            )
        })
    }

    /// Where a volume's records are watched.
    pub(crate) fn store(&self) -> Arc<dyn ClusterStore> {
        Arc::clone(&self.store)
    }

    /// A volume's records as they are now.
    pub(crate) fn entry(&self, id: VolumeId) -> Result<Option<VolumeEntry>, StoreError> {
        self.store.volume(id)
    }

    /// Says in the volume's record whether the lease of `entry` would be given to a standby; `known` is
    /// how the volume was when it was heard of last.
    pub fn mark_yieldable(
        &self,
        entry: &VolumeEntry,
        yieldable: bool,
        known: Option<VolumeEntry>,
    ) -> Result<Marked, StoreError> {
        let (id, epoch) = (entry.volume.id, entry.volume.epoch);
        lease::mark_yieldable(self.store.as_ref(), id, self.me.id, epoch, yieldable, known)
    }

    /// Tells the cluster of something. It is of no consequence if that fails.
    pub(crate) fn tell(&self, event: &cluster::Event) {
        if let Err(error) = self.store.append_event(event) {
            tracing::debug!(%error, text = event.text, "not told to the cluster");
        }
    }

    /// Acquires a volume that nobody serves, to repair it, and begins to open a head of it. Refused
    /// if another one holds it who does more than that. The epoch of the head.
    pub fn open_repair(&self, id: VolumeId) -> Result<Epoch, HeadError> {
        let mut repairs = self.repairs();
        if let Some(entry) = repairs.get(&id) {
            return Ok(entry.volume.epoch);
        }
        let me = Holder { repair: true, ..self.me.clone() };
        let head = self.open_by(id, Duration::ZERO, Book::Refresh, |_, above| {
            lease::acquire_repair(self.store.as_ref(), id, &me, above)
        })?;
        let epoch = head.entry.volume.epoch;
        repairs.insert(id, head.entry);
        Ok(epoch)
    }

    /// The volumes that are only repaired here, as they were when they were acquired.
    pub fn repairing(&self) -> Vec<VolumeEntry> {
        self.repairs().values().cloned().collect()
    }

    /// Ends a head that only repaired, if it still runs in that epoch, and gives its lease back.
    /// True if there was one.
    pub fn close_repair(&self, id: VolumeId, epoch: Epoch) -> Result<bool, HeadError> {
        let mut repairs = self.repairs();
        let entry = match repairs.get(&id) {
            Some(entry) if entry.volume.epoch == epoch => entry.clone(),
            Some(_) | None => return Ok(false),
        };
        self.end_within(&entry, GIVE_WAY)?;
        repairs.remove(&id);
        self.release(&entry)?;
        Ok(true)
    }

    fn repairs(&self) -> MutexGuard<'_, BTreeMap<VolumeId, VolumeEntry>> {
        self.repairs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open_by(
        &self,
        id: VolumeId,
        wait: Duration,
        book: Book,
        acquire: impl Fn(usize, Epoch) -> Result<VolumeEntry, AcquireError>,
    ) -> Result<Head, HeadError> {
        let mut attempt = 1;
        loop {
            let entry = acquire(attempt, self.known_sealed(id))?;
            tracing::info!(volume = entry.volume.name, epoch = entry.volume.epoch.0, "acquired");
            let spec = HeadSpec { volume: entry.volume.clone(), shard: entry.shard.clone() };
            let known = match book {
                Book::Known => Ok(()),
                Book::Refresh => address_book(self.store.as_ref(), self.plane.as_ref()),
            };
            let opened = known.map_err(HeadError::Store).and_then(|()| {
                let volume = entry.volume.name.clone();
                self.plane
                    .open_head(&spec, wait)
                    .map_err(|source| HeadError::Open { volume, source })
            });
            let error = match opened {
                Ok(opening) => return Ok(Head { entry, opening }),
                Err(error) => error,
            };
            self.end(&entry)?;
            if let HeadError::Open { source: OpenError::Superseded { sealed }, .. } = error {
                self.note_sealed(id, sealed);
                self.still_ours(&entry)?;
                // The record is ours and the members know a higher epoch: the store was rolled
                // back. Epochs must not be, so go above what the members have sealed.
                if attempt == EPOCH_ATTEMPTS {
                    self.release(&entry)?;
                    return Err(error);
                }
                tracing::warn!(
                    volume = entry.volume.name,
                    epoch = entry.volume.epoch.0,
                    sealed = sealed.0,
                    "the cluster store is behind the volume's members (restored from a backup?)"
                );
                attempt += 1;
            } else {
                self.release(&entry)?;
                return Err(error);
            }
        }
    }

    /// Drains and closes a head and gives its lease back. What was not decided within `drain`
    /// stays undecided: the next head settles it.
    pub fn close(&self, entry: &VolumeEntry, drain: Duration) -> Result<(), HeadError> {
        self.end_within(entry, drain)?;
        self.release(entry)
    }

    /// Who the store says has deposed us: it has given out a higher epoch than this entry's, or
    /// has a tombstone. A store without a record of the volume, or with a lower epoch, was
    /// replaced or rolled back; that deposes nobody.
    pub fn deposed_by(&self, entry: &VolumeEntry) -> Result<Option<String>, StoreError> {
        let Some(current) = self.store.volume(entry.volume.id)? else { return Ok(None) };
        if current.deleted {
            return Ok(Some("nobody: the volume was deleted".to_owned()));
        }
        if current.volume.epoch <= entry.volume.epoch {
            return Ok(None);
        }
        let by = current.volume.holder.map(|by| by.name);
        Ok(Some(by.unwrap_or_else(|| "a holder that released it again".to_owned())))
    }

    fn still_ours(&self, entry: &VolumeEntry) -> Result<(), HeadError> {
        match self.deposed_by(entry)? {
            None => Ok(()),
            Some(by) => Err(HeadError::Superseded { volume: entry.volume.name.clone(), by }),
        }
    }

    /// Ends a head that was deposed, or did not come to be.
    pub(crate) fn end(&self, entry: &VolumeEntry) -> Result<(), HeadError> {
        self.end_within(entry, Duration::from_secs(1))
    }

    fn end_within(&self, entry: &VolumeEntry, drain: Duration) -> Result<(), HeadError> {
        match self.plane.close_head(entry.volume.id, drain) {
            Ok(()) | Err(ControlError::NoHead(_) | ControlError::Stopped) => Ok(()),
            Err(source) => Err(HeadError::NotClosed { volume: entry.volume.name.clone(), source }),
        }
    }

    fn release(&self, entry: &VolumeEntry) -> Result<(), HeadError> {
        let (id, epoch) = (entry.volume.id, entry.volume.epoch);
        if lease::release(self.store.as_ref(), id, self.me.id, epoch)? {
            tracing::info!(volume = entry.volume.name, epoch = epoch.0, "released");
        }
        Ok(())
    }
}

/// Tells the data plane where every server is.
pub fn address_book(store: &dyn ClusterStore, plane: &dyn DataPlane) -> Result<(), StoreError> {
    let servers = store.servers()?;
    if let Err(error) = plane.set_servers(&addresses(&servers)) {
        tracing::warn!(%error, "the data plane did not take the servers' addresses");
    }
    Ok(())
}

/// Where these servers are.
pub fn addresses(servers: &[ServerEntry]) -> Vec<ServerAddress> {
    let by_id: BTreeMap<_, _> = servers
        .iter()
        .filter(|entry| !entry.server.addresses.is_empty())
        .map(|entry| (entry.server.id, entry.server.addresses.clone()))
        .collect();
    by_id.into_iter().map(|(server, addresses)| ServerAddress { server, addresses }).collect()
}
