//! `holdfast attach`: the head of one volume, without a pool. It runs in the foreground.

mod upgrade;

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use base::{Epoch, Holder};
use cluster::lease::{self, Acquire, AcquireError};
use cluster::{ClusterStore, Create, StoreError, VolumeEntry, volumes};
use rustix::fs::{FlockOperation, flock};
use serde::Serialize;
use shell::control::{
    ControlError, DataPlane, DataPlaneConfig, Event, ExportSpec, HeadSpec, Opening,
};
use target_daemon::exports::DRAIN;
use target_daemon::follow::{Follow, LeaseState};
use target_daemon::heads::{self, Heads};
use target_daemon::healer::{self, HealSettings, Healer};
use target_daemon::logging::{self, LogFormat, LogLevel};
use target_daemon::notify;
use target_daemon::retry::while_lingering;
use target_daemon::socket::{self, SocketError};
use tokio::signal::unix::{SignalKind, signal};

use crate::arguments::{AttachArguments, StoreArgument};
use crate::exit::{Exit, Failure};
use crate::output::Output;
use upgrade::Upgrades;

/// How long one turn waits for an event, and how late a signal or a moved server may be noticed.
const TURN: Duration = Duration::from_millis(200);
/// How long a head may take to open before its socket is made anyway and guests' requests wait.
const OPEN_WAIT: Duration = Duration::from_secs(1);
/// How long a head opens before it is said that requests wait for it.
const PENDING_AFTER: Duration = Duration::from_millis(200);
/// How long the socket gets to be made.
const START_WAIT: Duration = Duration::from_secs(5);
/// The least memory that a head works with, in bytes.
const BUFFER_BYTES_MIN: u64 = 16 << 20;

/// The JSON lines of `attach`, one for each change.
#[derive(Serialize)]
struct AttachView {
    /// `standby`: the socket is there, no guest uses it, the lease is not taken. `waiting`: guests'
    /// requests wait for `reason`. `ready`: it serves. `yielding`: the guest stopped the disk; the
    /// lease cannot be taken by another one yet, for `reason`. `yielded`: it can. `handed-over`:
    /// another process serves the socket, and this one has ended. `detached`: it has ended in good
    /// order.
    state: &'static str,
    volume: String,
    /// UUID.
    volume_id: String,
    socket: PathBuf,
    /// Of the lease; the newest one that is known if it is not held.
    epoch: u64,
    reason: Option<String>,
}

pub(crate) fn run(
    store: &StoreArgument,
    arguments: &AttachArguments,
    output: &Output,
) -> Result<(), Failure> {
    let format = if output.json { LogFormat::Json } else { LogFormat::Text };
    logging::start(LogLevel::Warn, format);
    if arguments.buffers < BUFFER_BYTES_MIN {
        return Err(Failure::new(Exit::Usage, "--buffers must be at least 16M"));
    }
    let store = cluster::open(store.address()?, Create::Never)?;
    let entry = volumes::find(store.as_ref(), &arguments.volume)?;
    let path = canonical(&arguments.socket)?;
    let me = heads::attach_holder(&path);
    let asked = Asked { store, entry, path, me, arguments, output };
    let stop = stop_on_signals()?;
    if arguments.upgrade { upgrade::take_over(&asked, &stop) } else { start(&asked, &stop) }
}

/// What a process is to serve, and how.
struct Asked<'a> {
    store: Arc<dyn ClusterStore>,
    entry: VolumeEntry,
    path: PathBuf,
    me: Holder,
    arguments: &'a AttachArguments,
    output: &'a Output,
}

fn plane_config(asked: &Asked<'_>) -> DataPlaneConfig {
    DataPlaneConfig {
        holder: asked.me.id,
        pool: None,
        listen: None,
        buffer_bytes: asked.arguments.buffers,
        state_messages: true,
    }
}

fn start(asked: &Asked<'_>, stop: &AtomicBool) -> Result<(), Failure> {
    let Asked { store, entry, path, me, arguments, .. } = asked;
    let how = Acquire { force: arguments.force, standby: arguments.standby, ..Acquire::default() };
    match lease::check(entry, me.id, how) {
        // A standby waits for who holds it.
        Err(AcquireError::Held { .. }) if arguments.standby => {}
        checked => checked?,
    }
    // The lock keeps a second process with the same holder id from deposing this one.
    let locked = |failure: &Failure| failure.exit == Exit::Conflict;
    let lock = while_lingering(locked, || lock_socket(path))?;
    let in_use = |error: &SocketError| matches!(error, SocketError::InUse(_));
    while_lingering(in_use, || socket::check_free(path))
        .map_err(|error| Failure::new(Exit::Conflict, format!("socket: {error}")))?;
    let plane = shell::start(&plane_config(asked))?;
    let heads = Heads::new(Arc::clone(store), Arc::clone(&plane), me.clone());
    let attached = Attached::new(asked, plane, heads, lock)?;
    let head = if arguments.standby {
        let known = heads::address_book(store.as_ref(), attached.plane.as_ref());
        known.map(|()| None).map_err(Failure::from)
    } else {
        let opened = attached.heads.open(entry.volume.id, arguments.force, OPEN_WAIT);
        opened.map(|head| Some(head.entry)).map_err(Failure::from)
    };
    let served = head.and_then(|head| {
        attached.follow.join(entry, path, arguments.standby, head);
        attached.serve(asked, Sockets::Make, stop)
    });
    attached.shut_down(served)
}

/// The socket's path without links, so that it always names the same holder.
fn canonical(path: &Path) -> Result<PathBuf, Failure> {
    let usage = |text: String| Failure::new(Exit::Usage, format!("socket: {text}"));
    let absolute = std::path::absolute(path).map_err(|error| usage(error.to_string()))?;
    socket::check_path(&absolute).map_err(usage)?;
    let (parent, name) = (absolute.parent(), absolute.file_name());
    let (Some(parent), Some(name)) = (parent, name) else {
        return Err(usage(format!("'{}' names no file", path.display())));
    };
    let parent = fs::canonicalize(parent).map_err(|error| {
        let text = format!("directory '{}': {error}; make it first", parent.display());
        Failure::new(Exit::Failed, format!("socket: {text}"))
    })?;
    Ok(parent.join(name))
}

/// Locks `PATH.lock`, which stays behind: removing it would let two processes lock two files of
/// one name.
fn lock_socket(path: &Path) -> Result<File, Failure> {
    let mut lock_path = path.as_os_str().to_owned();
    lock_path.push(".lock");
    let lock_path = PathBuf::from(lock_path);
    let failed = |error: std::io::Error| {
        Failure::new(Exit::Failed, format!("lock file '{}': {error}", lock_path.display()))
    };
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&lock_path)
        .map_err(failed)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let text = format!(
                "another `holdfast attach` serves '{}'; stop it first, or choose another socket",
                path.display()
            );
            Err(Failure::new(Exit::Conflict, text))
        }
        Err(errno) => Err(failed(errno.into())),
    }
}

/// A flag that is set on SIGTERM and SIGINT.
fn stop_on_signals() -> Result<Arc<AtomicBool>, Failure> {
    let failed = |error: std::io::Error| {
        Failure::new(Exit::Failed, format!("cannot wait for signals: {error}"))
    };
    let stop = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&stop);
    let (ready_sender, ready) = std::sync::mpsc::sync_channel(1);
    let wait = move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build();
        let runtime = match runtime {
            Ok(runtime) => runtime,
            Err(error) => return drop(ready_sender.send(Err(error))),
        };
        runtime.block_on(async {
            let signals = signal(SignalKind::terminate())
                .and_then(|terminate| Ok((terminate, signal(SignalKind::interrupt())?)));
            match signals {
                Err(error) => drop(ready_sender.send(Err(error))),
                Ok((mut terminate, mut interrupt)) => {
                    drop(ready_sender.send(Ok(())));
                    tokio::select! {
                        _ = terminate.recv() => {}
                        _ = interrupt.recv() => {}
                    }
                    flag.store(true, Ordering::Release);
                }
            }
        });
    };
    std::thread::Builder::new().name("signals".to_owned()).spawn(wait).map_err(failed)?;
    match ready.recv() {
        Ok(started) => started.map_err(failed)?,
        Err(error) => return Err(failed(std::io::Error::other(error))),
    }
    Ok(stop)
}

/// The thread that looks after the volume's members.
struct Healing {
    stop: Arc<AtomicBool>,
    news: Sender<Event>,
    thread: Option<JoinHandle<()>>,
}

impl Healing {
    fn start(
        store: &Arc<dyn ClusterStore>,
        plane: &Arc<dyn DataPlane>,
        heads: &Heads,
        arguments: &AttachArguments,
    ) -> Result<Self, Failure> {
        let mut settings = HealSettings::default();
        if let Some(delay_ms) = arguments.heal_delay_ms {
            settings.delay_ms = delay_ms;
        }
        let (healer, news) = Healer::new(
            Arc::clone(store),
            Arc::clone(plane),
            heads.clone(),
            settings.policy(),
            None,
        );
        let stop = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("healer".to_owned())
            .spawn(move || healer.run(&flag))
            .map_err(|error| {
                Failure::new(Exit::Failed, format!("cannot start a thread: {error}"))
            })?;
        Ok(Self { stop, news, thread: Some(thread) })
    }
}

impl Drop for Healing {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that looks after the members had panicked");
        }
    }
}

/// Says how the volume is, a line for each change.
struct Teller {
    entry: VolumeEntry,
    path: PathBuf,
    json: bool,
    /// The socket is there; nothing is told before.
    listening: Arc<AtomicBool>,
}

impl Teller {
    fn state(&self, state: &LeaseState) {
        if !self.listening.load(Ordering::Acquire) {
            return;
        }
        match state {
            LeaseState::Standby => {
                self.say("standby", None, None);
                notify::notify("READY=1");
            }
            LeaseState::Waiting { reason } => self.say("waiting", None, Some(reason)),
            LeaseState::Held { open: false, .. } => {}
            LeaseState::Held { epoch, open: true } => {
                self.say("ready", Some(*epoch), None);
                notify::notify("READY=1");
            }
            LeaseState::Yielded { epoch, pending: Some(reason) } => {
                self.say("yielding", Some(*epoch), Some(reason));
            }
            LeaseState::Yielded { epoch, pending: None } => {
                self.say("yielded", Some(*epoch), None);
            }
        }
    }

    fn say(&self, state: &'static str, epoch: Option<Epoch>, reason: Option<&str>) {
        let volume = &self.entry.volume;
        let view = AttachView {
            state,
            volume: volume.name.clone(),
            volume_id: volume.id.to_string(),
            socket: self.path.clone(),
            epoch: epoch.unwrap_or(volume.epoch).0,
            reason: reason.map(str::to_owned),
        };
        Output { json: self.json }.print_line(&view, || {
            let reason = view.reason.as_ref().map_or(String::new(), |text| format!(": {text}"));
            format!("{state}: volume {} at {}{reason}", view.volume, view.socket.display())
        });
    }
}

struct Attached {
    store: Arc<dyn ClusterStore>,
    plane: Arc<dyn DataPlane>,
    heads: Heads,
    follow: Follow,
    /// As it was at the start.
    entry: VolumeEntry,
    path: PathBuf,
    lock: File,
    healing: Healing,
    /// The socket is there: what is told is true from now on.
    listening: Arc<AtomicBool>,
    /// Held while another process takes over.
    changing: Arc<Mutex<()>>,
}

/// The sockets to serve at.
enum Sockets {
    Make,
    /// They came from another process, as did the exports.
    Taken(UnixListener),
}

impl Attached {
    fn new(
        asked: &Asked<'_>,
        plane: Arc<dyn DataPlane>,
        heads: Heads,
        lock: File,
    ) -> Result<Self, Failure> {
        let Asked { store, entry, path, arguments, output, .. } = asked;
        let healing = Healing::start(store, &plane, &heads, arguments)?;
        let listening = Arc::<AtomicBool>::default();
        let teller = Teller {
            entry: entry.clone(),
            path: path.clone(),
            json: output.json,
            listening: Arc::clone(&listening),
        };
        let tell = Box::new(move |_, state: &LeaseState| teller.state(state));
        let follow = Follow::new(heads.clone(), Arc::clone(&plane), tell);
        let (store, entry, path) = (Arc::clone(store), entry.clone(), path.clone());
        let changing = Arc::default();
        Ok(Self { store, plane, heads, follow, entry, path, lock, healing, listening, changing })
    }

    /// Ends the data plane; `served`: how that went so far.
    fn shut_down(&self, served: Result<(), Failure>) -> Result<(), Failure> {
        match self.plane.shutdown(DRAIN) {
            Ok(()) | Err(ControlError::Stopped) => served,
            Err(error) => served.and(Err(error.into())),
        }
    }

    /// Serves until told to stop or deposed; then drains, closes and gives the lease back.
    fn serve(&self, asked: &Asked<'_>, sockets: Sockets, stop: &AtomicBool) -> Result<(), Failure> {
        let volume = &self.entry.volume;
        let served = self.served(asked, sockets).and_then(|upgrades| {
            let watched = self.watch(stop, asked.output);
            // Whoever asks for everything now comes too late, or has it.
            drop(upgrades);
            watched
        });
        notify::notify("STOPPING=1");
        let drain = if served.is_ok() { DRAIN } else { Duration::ZERO };
        let stopped = self.plane.stop_export(&self.path, drain);
        let held = self.follow.leave(volume.id, &self.path);
        let epoch = held.as_ref().map(|entry| entry.volume.epoch);
        let closed = held.map_or(Ok(()), |entry| self.heads.close(&entry, drain));
        served?;
        stopped?;
        closed?;
        self.teller(asked.output).say("detached", epoch, None);
        Ok(())
    }

    /// Serves at the sockets; the thread that answers whoever wants to take over.
    fn served(&self, asked: &Asked<'_>, sockets: Sockets) -> Result<Option<Upgrades>, Failure> {
        let volume = &self.entry.volume;
        let arguments = asked.arguments;
        let listener = match sockets {
            Sockets::Taken(listener) => Some(listener),
            Sockets::Make => {
                let spec = ExportSpec {
                    volume: volume.id,
                    blocks: volume.blocks(),
                    block_size: volume.block_size,
                    socket: self.path.clone(),
                    queues: arguments.queues,
                    read_only: arguments.read_only || volume.policy.read_only,
                };
                self.plane.start_export(&spec, START_WAIT)?;
                upgrade::listen(&self.path)
            }
        };
        let started = listener
            .map(|listener| Upgrades::start(self, arguments, listener, self.teller(asked.output)));
        started.transpose().map_err(|error| {
            Failure::new(Exit::Failed, format!("cannot start the thread for upgrades: {error}"))
        })
    }

    fn teller(&self, output: &Output) -> Teller {
        Teller {
            entry: self.entry.clone(),
            path: self.path.clone(),
            json: output.json,
            listening: Arc::clone(&self.listening),
        }
    }

    /// Waits while another process takes over: what that does to the volume's records is not to be
    /// taken for somebody else's.
    fn staying(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes events as they come. The cluster store is asked elsewhere: it may take its time.
    fn watch(&self, stop: &AtomicBool, output: &Output) -> Result<(), Failure> {
        self.listening.store(true, Ordering::Release);
        self.follow.tell_again(self.entry.volume.id);
        let done = AtomicBool::new(false);
        let deposed = Mutex::new(None);
        std::thread::scope(|scope| {
            let kept = scope.spawn(|| {
                let mut book = AddressBook::default();
                while !done.load(Ordering::Acquire) {
                    if let Some(by) = self.refresh(&mut book) {
                        *deposed.lock().unwrap_or_else(PoisonError::into_inner) = Some(by);
                        return;
                    }
                    std::thread::park_timeout(TURN);
                }
            });
            let watched = self.take_events(stop, &deposed, output);
            done.store(true, Ordering::Release);
            kept.thread().unpark();
            watched
        })
    }

    fn take_events(
        &self,
        stop: &AtomicBool,
        deposed: &Mutex<Option<String>>,
        output: &Output,
    ) -> Result<(), Failure> {
        let mut pending = Pending::default();
        while !stop.load(Ordering::Acquire) {
            let event = self.plane.next_event(TURN);
            let _staying = self.staying();
            pending.look(self, output);
            if let Some(event) = event {
                if healer::concerns(&event) {
                    // Nobody takes them only if that thread has panicked, which is told at the end.
                    let _ = self.healing.news.send(event.clone());
                }
                self.take(event)?;
            }
            let by = deposed.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(by) = by {
                return Err(taken_over(&self.entry, &by));
            }
        }
        Ok(())
    }

    fn take(&self, event: Event) -> Result<(), Failure> {
        let ours = |epoch: Epoch| {
            let head = self.follow.head(self.entry.volume.id);
            head.filter(|entry| entry.volume.epoch == epoch)
        };
        match event {
            Event::FrontEnd { volume, socket, connected } => {
                self.follow.front_end(volume, &socket, connected);
            }
            Event::RingsStarted { volume, socket } => self.follow.started(volume, &socket),
            Event::RingsStopped { volume, socket, by_front_end } => {
                self.follow.stopped(volume, &socket, by_front_end);
            }
            Event::Opened { volume, epoch } => self.follow.opened(volume, epoch),
            Event::Superseded { volume, epoch, sealed } => {
                self.heads.note_sealed(volume, sealed);
                if let Some(entry) = ours(epoch)
                    && !self.follow.deposed(volume, epoch)
                {
                    return Err(self.ended(&entry, &format!("a member has sealed {sealed}")));
                }
            }
            Event::Unopenable { epoch, reason, .. } => {
                if ours(epoch).is_some() {
                    return Err(Failure::new(Exit::Failed, reason));
                }
            }
            Event::Stopped => {
                return Err(Failure::new(Exit::Failed, "the data plane has stopped"));
            }
            Event::MemberDown { .. }
            | Event::MemberUp { .. }
            | Event::MemberSlow { .. }
            | Event::Mended { .. }
            | Event::Resized { .. }
            | Event::PoolFailed { .. } => {}
        }
        Ok(())
    }

    /// Takes in the store's news; who has taken the volume from a guest that uses it, if somebody has.
    fn refresh(&self, book: &mut AddressBook) -> Option<String> {
        if !book.refresh(self.store.as_ref(), self.plane.as_ref()) {
            return None;
        }
        let id = self.entry.volume.id;
        let Some(entry) = self.follow.head(id) else {
            // Who is opened in a hurry shall find its members connected.
            if let Ok(Some(entry)) = self.store.volume(id) {
                self.follow.note_members(&[entry]);
            }
            return None;
        };
        // A head without requests hears of its successor from nobody else.
        self.heads.deposed_by(&entry).ok().flatten()?;
        // Asked again, since that may have been an upgrade which came to nothing. Not only then: events must
        // not wait for the store, which may be away, whenever it has news.
        let _staying = self.staying();
        let entry = self.follow.head(id)?;
        let by = self.heads.deposed_by(&entry).ok().flatten()?;
        (!self.follow.deposed(id, entry.volume.epoch)).then_some(by)
    }

    /// The head has ended by itself: who has the volume now?
    fn ended(&self, entry: &VolumeEntry, why: &str) -> Failure {
        let volume = &entry.volume.name;
        match self.heads.deposed_by(entry) {
            Ok(Some(by)) => taken_over(entry, &by),
            Ok(None) | Err(_) => {
                Failure::new(Exit::Failed, format!("volume '{volume}' cannot be served: {why}"))
            }
        }
    }
}

/// What is said of a head that has not opened yet.
#[derive(Default)]
struct Pending {
    since: Option<Instant>,
    told: Option<String>,
}

impl Pending {
    fn look(&mut self, attached: &Attached, output: &Output) {
        let id = attached.entry.volume.id;
        let Some(LeaseState::Held { epoch, open: false }) = attached.follow.state(id) else {
            *self = Self::default();
            return;
        };
        if self.since.get_or_insert_with(Instant::now).elapsed() < PENDING_AFTER {
            return;
        }
        let Some(entry) = attached.follow.head(id).filter(|entry| entry.volume.epoch == epoch)
        else {
            return;
        };
        let spec = HeadSpec { volume: entry.volume, shard: entry.shard };
        match attached.plane.open_head(&spec, Duration::ZERO) {
            Ok(Opening::Open) => attached.follow.opened(id, epoch),
            Ok(Opening::Pending { reason }) => {
                if self.told.as_ref() != Some(&reason) {
                    attached.teller(output).say("waiting", Some(epoch), Some(&reason));
                    self.told = Some(reason);
                }
            }
            // The event that comes with it says so.
            Err(error) => tracing::debug!(%error, "the head does not open"),
        }
    }
}

fn taken_over(entry: &VolumeEntry, by: &str) -> Failure {
    let text = format!("volume '{}' was taken over by {by}", entry.volume.name);
    Failure::new(Exit::Superseded, text)
}

/// Keeps the data plane's address book: servers come back at other addresses.
#[derive(Default)]
struct AddressBook {
    seen: Option<u64>,
    trouble: Option<String>,
}

impl AddressBook {
    /// True if the store has news. One that is away changes nothing: the head goes on with the
    /// addresses it has.
    fn refresh(&mut self, store: &dyn ClusterStore, plane: &dyn DataPlane) -> bool {
        match self.try_refresh(store, plane) {
            Ok(news) => {
                self.trouble = None;
                news
            }
            Err(error) => {
                let text = error.to_string();
                if self.trouble.as_ref() != Some(&text) {
                    tracing::warn!(error = text, "the volume goes on without the cluster store");
                }
                self.trouble = Some(text);
                false
            }
        }
    }

    fn try_refresh(
        &mut self,
        store: &dyn ClusterStore,
        plane: &dyn DataPlane,
    ) -> Result<bool, StoreError> {
        let revision = store.revision()?;
        if self.seen == Some(revision) {
            return Ok(false);
        }
        heads::address_book(store, plane)?;
        self.seen = Some(revision);
        Ok(true)
    }
}
