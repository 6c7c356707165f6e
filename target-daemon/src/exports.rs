//! The volumes that a daemon serves: each wanted export is brought up, kept, and brought down.
//!
//! An export is wanted because the configuration or the API says so; what the API asked for is
//! remembered beside its socket, so that guests find their disks again after a restart. [`Exports::tend`] starts
//! those that do not run and says why they cannot; it is called every second, so a volume whose
//! lease, replicas or servers come late is served when they have come. The first export of a
//! volume opens its head, the last one to go closes it and gives the lease back.

mod handover;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use base::{Epoch, VolumeId, limits};
use cluster::volumes::{self, FindError};
use cluster::{ClusterStore, VolumeEntry};
use shell::control::{ControlError, DataPlane, Event, ExportSpec, OpenError, Opening};

use crate::config::ExportConfig;
use crate::drain;
use crate::follow::{Follow, LeaseState};
use crate::heads::{HeadError, Heads};
use crate::socket::{self, SocketError};

/// How long accepted requests get to finish when an export is stopped.
pub const DRAIN: Duration = Duration::from_secs(10);
/// How long a question to the data plane may take.
const STATUS_WAIT: Duration = Duration::from_secs(2);
/// How long a socket gets to be made.
const START_WAIT: Duration = Duration::from_secs(5);

/// Why an export was not started or stopped.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// No such volume.
    #[error(transparent)]
    Find(#[from] FindError),
    /// It cannot be opened here.
    #[error(transparent)]
    Head(#[from] HeadError),
    /// The socket cannot be made there.
    #[error("socket: {0}")]
    Socket(#[from] SocketError),
    /// Another export of this daemon has the socket.
    #[error("socket '{}' serves volume '{volume}' already", socket.display())]
    SocketTaken {
        /// The socket.
        socket: PathBuf,
        /// The volume, as it was named.
        volume: String,
    },
    /// No export has the socket.
    #[error("no export has the socket '{}'; `holdfast export list` shows what there is", .0.display())]
    NoExport(PathBuf),
    /// There are too many.
    #[error("this daemon serves {} exports already, which is the most", limits::VOLUMES_MAX)]
    TooMany,
    /// This server is to be emptied.
    #[error(
        "this server is being drained and serves no more volumes; serve it from another one, or end \
         the draining with `holdfast server undrain`"
    )]
    Draining,
    /// The data plane refused.
    #[error(transparent)]
    Control(#[from] ControlError),
}

/// A wanted export and how it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportView {
    /// What is wanted.
    pub wanted: ExportConfig,
    /// It is in the configuration, and comes back with the next start.
    pub configured: bool,
    /// The volume, once it is served.
    pub volume: Option<VolumeId>,
    /// Why it is not served.
    pub waiting: Option<String>,
    /// How its volume's lease is here, if it is served.
    pub lease: Option<LeaseState>,
}

struct Export {
    wanted: ExportConfig,
    configured: bool,
    state: State,
}

enum State {
    Waiting { reason: String },
    Running { volume: VolumeId },
}

enum Known {
    New,
    Waiting,
    Running(VolumeId),
}

/// The file that exports are remembered in: in the directory of the API's socket, which a reboot
/// clears as it does the guests.
pub struct Memory {
    path: PathBuf,
}

impl Memory {
    /// The memory of the daemon whose API is at `api`.
    pub fn beside(api: &Path) -> Self {
        let mut path = api.as_os_str().to_owned();
        path.push(".exports");
        Self { path: PathBuf::from(path) }
    }

    /// What was kept last. A file that cannot be read is said so and put aside.
    fn recall(&self) -> Vec<ExportConfig> {
        let path = self.path.display();
        let text = match fs::read_to_string(&self.path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Vec::new(),
            Err(error) => {
                tracing::error!(%path, %error, "cannot read what exports there were");
                return Vec::new();
            }
        };
        serde_json::from_str(&text).unwrap_or_else(|error| {
            tracing::error!(%path, %error, "damaged: add the exports again");
            drop(fs::rename(&self.path, self.path.with_extension("exports.damaged")));
            Vec::new()
        })
    }

    fn keep(&self, exports: &[&ExportConfig]) -> io::Result<()> {
        let text = serde_json::to_string_pretty(exports)?;
        let new = self.path.with_extension("exports.new");
        fs::write(&new, text)?;
        fs::rename(&new, &self.path)
    }
}

#[derive(Default)]
struct Inner {
    exports: BTreeMap<PathBuf, Export>,
}

/// The exports of one daemon.
pub struct Exports {
    store: Arc<dyn ClusterStore>,
    plane: Arc<dyn DataPlane>,
    heads: Heads,
    /// The volumes of the exports that run, and their heads.
    follow: Follow,
    memory: Memory,
    /// What [`Exports::list`] sees; held only for moments.
    inner: Mutex<Inner>,
    /// Held by whoever starts or stops, for as long as that takes.
    changing: Mutex<()>,
    /// This server is to be emptied: what has no guest is not served.
    draining: Arc<AtomicBool>,
}

impl Exports {
    /// Exports of `configured` volumes, and of those that `memory` remembers; [`Exports::tend`]
    /// starts them.
    pub fn new(
        store: Arc<dyn ClusterStore>,
        plane: Arc<dyn DataPlane>,
        heads: Heads,
        configured: &[ExportConfig],
        memory: Memory,
        draining: Arc<AtomicBool>,
    ) -> Self {
        let export = |wanted: &ExportConfig, configured: bool| {
            let state = State::Waiting { reason: "not started yet".to_owned() };
            (wanted.socket.clone(), Export { wanted: wanted.clone(), configured, state })
        };
        let remembered = memory.recall();
        // The configuration goes before what was asked for earlier.
        let exports = remembered.iter().map(|wanted| export(wanted, false));
        let exports = exports.chain(configured.iter().map(|wanted| export(wanted, true))).collect();
        let inner = Mutex::new(Inner { exports });
        // Whoever wants to know asks; the log tells the rest.
        let follow = Follow::new(heads.clone(), Arc::clone(&plane), Box::new(|_, _| {}));
        Self { store, plane, heads, follow, memory, inner, changing: Mutex::new(()), draining }
    }

    /// All wanted exports, by socket.
    pub fn list(&self) -> Vec<ExportView> {
        let view = |export: &Export| {
            let (volume, waiting) = match &export.state {
                State::Waiting { reason } => (None, Some(reason.clone())),
                State::Running { volume } => (Some(*volume), None),
            };
            let (wanted, configured) = (export.wanted.clone(), export.configured);
            let lease = volume.and_then(|volume| self.follow.state(volume));
            ExportView { wanted, configured, volume, waiting, lease }
        };
        self.inner().exports.values().map(view).collect()
    }

    /// The entry of each volume that a head was opened for, as it was then.
    pub fn open_volumes(&self) -> Vec<VolumeEntry> {
        self.follow.heads()
    }

    /// Starts an export now, or says why not; then it is not wanted either, unless it was before.
    /// The same export again changes nothing. The head may still be opening when this returns: see
    /// [`Exports::wait_open`].
    pub fn add(&self, wanted: ExportConfig) -> Result<VolumeId, ExportError> {
        let _changing = lock(&self.changing);
        let known = self.known(&wanted)?;
        if let Known::Running(volume) = known {
            return Ok(volume);
        }
        let volume = self.start(&wanted)?;
        let state = State::Running { volume };
        match known {
            Known::Waiting | Known::Running(_) => self.set_state(&wanted.socket, state),
            Known::New => {
                let export = Export { wanted, configured: false, state };
                self.inner().exports.insert(export.wanted.socket.clone(), export);
                self.remember();
            }
        }
        Ok(volume)
    }

    /// Whether the same export is wanted already; an error if its socket is another one's.
    fn known(&self, wanted: &ExportConfig) -> Result<Known, ExportError> {
        let inner = self.inner();
        match inner.exports.get(&wanted.socket) {
            None if inner.exports.len() >= limits::VOLUMES_MAX => Err(ExportError::TooMany),
            None => Ok(Known::New),
            Some(existing) if existing.wanted != *wanted => Err(ExportError::SocketTaken {
                socket: wanted.socket.clone(),
                volume: existing.wanted.volume.clone(),
            }),
            Some(existing) => Ok(match existing.state {
                State::Waiting { .. } => Known::Waiting,
                State::Running { volume } => Known::Running(volume),
            }),
        }
    }

    /// A restart finds these again. That they are served matters more than that they are
    /// remembered.
    fn remember(&self) {
        let inner = self.inner();
        let asked = inner.exports.values().filter(|export| !export.configured);
        let asked: Vec<_> = asked.map(|export| &export.wanted).collect();
        if let Err(error) = self.memory.keep(&asked) {
            let path = self.memory.path.display();
            tracing::error!(%path, %error, "exports are not remembered for the next start");
        }
    }

    /// Waits for a volume's head to serve, for up to `wait`; `None` if there is none, and need not be.
    pub fn wait_open(
        &self,
        volume: VolumeId,
        wait: Duration,
    ) -> Result<Option<Opening>, OpenError> {
        let Some(entry) = self.follow.head(volume) else { return Ok(None) };
        let spec = shell::control::HeadSpec { volume: entry.volume, shard: entry.shard };
        self.plane.open_head(&spec, wait).map(Some)
    }

    /// What the data plane tells of heads and rings that leases follow. Never waits.
    pub fn note(&self, event: &Event) {
        match event {
            Event::FrontEnd { volume, socket, connected } => {
                self.follow.front_end(*volume, socket, *connected);
            }
            Event::RingsStarted { volume, socket } => self.follow.started(*volume, socket),
            Event::RingsStopped { volume, socket, by_front_end } => {
                self.follow.stopped(*volume, socket, *by_front_end);
            }
            Event::Opened { volume, epoch } => self.follow.opened(*volume, *epoch),
            Event::Superseded { .. }
            | Event::Unopenable { .. }
            | Event::MemberDown { .. }
            | Event::MemberUp { .. }
            | Event::MemberSlow { .. }
            | Event::Mended { .. }
            | Event::Resized { .. }
            | Event::PoolFailed { .. }
            | Event::Stopped => {}
        }
    }

    /// Stops an export and no longer wants it; closes the head and gives the lease back if it was
    /// the volume's last one.
    pub fn remove(&self, socket: &Path) -> Result<(), ExportError> {
        let _changing = lock(&self.changing);
        let running = match self.inner().exports.get(socket) {
            None => return Err(ExportError::NoExport(socket.to_owned())),
            Some(Export { state: State::Running { volume }, .. }) => Some(*volume),
            Some(Export { state: State::Waiting { .. }, .. }) => None,
        };
        if running.is_some() {
            self.plane.stop_export(socket, DRAIN)?;
        }
        self.inner().exports.remove(socket);
        self.remember();
        tracing::info!(socket = %socket.display(), "export removed");
        match running {
            Some(volume) => self.leave(volume, socket),
            None => Ok(()),
        }
    }

    /// Ends the heads that the store says are deposed, and starts the wanted exports that do not
    /// run.
    pub fn tend(&self) {
        for entry in self.open_volumes() {
            // A head without requests hears of its successor from nobody else.
            if let Ok(Some(by)) = self.heads.deposed_by(&entry) {
                let why = format!("taken over by {by}");
                self.head_ended(entry.volume.id, entry.volume.epoch, &why);
            }
        }
        // Who is opened in a hurry shall find its members connected.
        let standing = self.follow.unwatched().into_iter();
        let standing: Vec<_> =
            standing.filter_map(|id| self.store.volume(id).ok().flatten()).collect();
        self.follow.note_members(&standing);
        let _changing = lock(&self.changing);
        if self.is_draining() {
            self.stop_unused();
        }
        let waiting: Vec<ExportConfig> = self
            .inner()
            .exports
            .values()
            .filter(|export| matches!(export.state, State::Waiting { .. }))
            .map(|export| export.wanted.clone())
            .collect();
        for wanted in waiting {
            let state = match self.start(&wanted) {
                Ok(volume) => State::Running { volume },
                Err(error) => State::Waiting { reason: error.to_string() },
            };
            self.set_state(&wanted.socket, state);
        }
    }

    /// A head of ours was told of a higher epoch, or cannot open. If its guest had stopped the disk,
    /// another one has taken what was yielded: the exports stay, and the lease is taken again when a
    /// guest here starts. Else it and its exports end. They stay wanted, and are served again when
    /// the volume is free.
    pub fn head_ended(&self, volume: VolumeId, epoch: Epoch, why: &str) {
        if self.follow.deposed(volume, epoch) {
            return;
        }
        let _changing = lock(&self.changing);
        let Some(entry) = self.follow.head(volume).filter(|entry| entry.volume.epoch == epoch)
        else {
            return;
        };
        tracing::error!(volume = entry.volume.name, epoch = epoch.0, why, "the head has ended");
        for socket in self.sockets_of(volume) {
            if let Err(error) = self.plane.stop_export(&socket, Duration::ZERO) {
                tracing::warn!(socket = %socket.display(), %error, "cannot stop the export");
            }
            self.set_state(&socket, State::Waiting { reason: why.to_owned() });
            // Releases only what is still ours in this epoch.
            let head = self.follow.leave(volume, &socket);
            if let Some(Err(error)) = head.map(|head| self.heads.close(&head, Duration::ZERO)) {
                tracing::warn!(volume = entry.volume.name, %error, "closing the head");
            }
        }
    }

    /// Notes that a member of the volume has sealed this epoch.
    pub fn note_sealed(&self, volume: VolumeId, sealed: Epoch) {
        self.heads.note_sealed(volume, sealed);
    }

    /// A head of ours was told of a higher epoch: as [`Exports::head_ended`]. The store is asked who has
    /// taken the volume only if that was not expected: it may take its time.
    pub fn deposed(&self, volume: VolumeId, epoch: Epoch, sealed: Epoch) {
        if self.follow.deposed(volume, epoch) {
            return;
        }
        let entry = self.follow.head(volume);
        let by = entry.map_or(Ok(None), |entry| self.heads.deposed_by(&entry));
        let why = match by {
            Ok(Some(by)) => format!("taken over by {by}"),
            Ok(None) | Err(_) => format!("a member has sealed {sealed}"),
        };
        self.head_ended(volume, epoch, &why);
    }

    /// Stops everything at once and gives all leases back. True if all of it went well.
    pub fn shut_down(&self) -> bool {
        let _changing = lock(&self.changing);
        let close = |volume: VolumeId| -> Result<(), ExportError> {
            for socket in self.sockets_of(volume) {
                self.plane.stop_export(&socket, DRAIN)?;
                self.leave(volume, &socket)?;
            }
            Ok(())
        };
        let volumes = self.follow.volumes();
        let all_well = std::thread::scope(|scope| {
            let threads: Vec<_> =
                volumes.into_iter().map(|id| (id, scope.spawn(move || close(id)))).collect();
            let mut all_well = true;
            for (volume, thread) in threads {
                match thread.join() {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => {
                        tracing::error!(%volume, %error, "not closed in good order");
                        all_well = false;
                    }
                    Err(panic) => std::panic::resume_unwind(panic),
                }
            }
            all_well
        });
        *self.inner() = Inner::default();
        all_well
    }

    fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Acquire)
    }

    /// Ends what no guest uses, so that the server gets empty. It is served again when it is no
    /// longer drained.
    fn stop_unused(&self) {
        let Ok(status) = self.plane.status(STATUS_WAIT) else { return };
        for id in self.follow.volumes() {
            if drain::has_guest(&status, id) {
                continue;
            }
            tracing::info!(volume = %id, "given back: this server is being drained");
            for socket in self.sockets_of(id) {
                if let Err(error) = self.plane.stop_export(&socket, Duration::ZERO) {
                    tracing::warn!(socket = %socket.display(), %error, "cannot stop the export");
                }
                self.set_state(
                    &socket,
                    State::Waiting { reason: ExportError::Draining.to_string() },
                );
                if let Err(error) = self.leave(id, &socket) {
                    tracing::warn!(volume = %id, %error, "closing the head");
                }
            }
        }
    }

    fn start(&self, wanted: &ExportConfig) -> Result<VolumeId, ExportError> {
        if self.is_draining() {
            return Err(ExportError::Draining);
        }
        socket::check_free(&wanted.socket)?;
        let found = volumes::find(self.store.as_ref(), &wanted.volume)?;
        let id = found.volume.id;
        let head = if wanted.standby || self.follow.state(id).is_some() {
            None
        } else {
            // Guests' requests wait for a head that takes long, so do not wait for it here.
            Some(self.heads.open(id, false, Duration::ZERO)?.entry)
        };
        let spec = ExportSpec {
            volume: id,
            blocks: found.volume.blocks(),
            block_size: found.volume.block_size,
            socket: wanted.socket.clone(),
            queues: wanted.queues,
            read_only: wanted.read_only || found.volume.policy.read_only,
        };
        // Before the socket is there: whatever its guest does is noticed.
        self.follow.join(&found, &wanted.socket, wanted.standby, head);
        match self.plane.start_export(&spec, START_WAIT) {
            Ok(()) => {
                let socket = wanted.socket.display();
                tracing::info!(volume = found.volume.name, %socket, "serving");
                Ok(id)
            }
            Err(error) => {
                if let Err(error) = self.leave(id, &wanted.socket) {
                    tracing::warn!(volume = found.volume.name, %error, "closing the head");
                }
                Err(error.into())
            }
        }
    }

    /// An export has ended. After the volume's last one, closes its head and gives the lease back.
    fn leave(&self, volume: VolumeId, socket: &Path) -> Result<(), ExportError> {
        match self.follow.leave(volume, socket) {
            Some(entry) => Ok(self.heads.close(&entry, DRAIN)?),
            None => Ok(()),
        }
    }

    fn sockets_of(&self, volume: VolumeId) -> BTreeSet<PathBuf> {
        let inner = self.inner();
        let serves = |export: &&Export| matches!(&export.state, State::Running { volume: served } if *served == volume);
        inner.exports.values().filter(serves).map(|export| export.wanted.socket.clone()).collect()
    }

    fn set_state(&self, socket: &Path, state: State) {
        let mut inner = self.inner();
        let Some(export) = inner.exports.get_mut(socket) else { return };
        if let State::Waiting { reason } = &state {
            let known = matches!(&export.state, State::Waiting { reason: old } if old == reason);
            if !known {
                let volume = &export.wanted.volume;
                tracing::warn!(volume, socket = %socket.display(), reason, "not served");
            }
        }
        export.state = state;
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        lock(&self.inner)
    }
}

/// A panic of another holder leaves nothing half done here: every change is one assignment.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
