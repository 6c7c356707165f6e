//! `holdfast attach`: the head of one volume, without a pool. It runs in the foreground.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::thread::JoinHandle;
use std::time::Duration;

use cluster::{ClusterStore, Create, StoreError, VolumeEntry, lease, volumes};
use rustix::fs::{FlockOperation, flock};
use serde::Serialize;
use shell::control::{ControlError, DataPlane, DataPlaneConfig, Event, ExportSpec, Opening};
use target_daemon::exports::DRAIN;
use target_daemon::heads::{self, Head, Heads};
use target_daemon::healer::{HealSettings, Healer};
use target_daemon::logging::{self, LogFormat, LogLevel};
use target_daemon::notify;
use target_daemon::retry::while_lingering;
use target_daemon::socket::{self, SocketError};
use tokio::signal::unix::{SignalKind, signal};

use crate::arguments::{AttachArguments, StoreArgument};
use crate::exit::{Exit, Failure};
use crate::output::Output;

/// How long one turn waits for an event, and how late a signal or a moved server may be noticed.
const TURN: Duration = Duration::from_millis(200);
/// How long a head may take to open before its socket is made anyway and guests' requests wait.
const OPEN_WAIT: Duration = Duration::from_secs(1);
/// How long the socket gets to be made.
const START_WAIT: Duration = Duration::from_secs(5);
/// The least memory that a head works with, in bytes.
const BUFFER_BYTES_MIN: u64 = 16 << 20;

/// The JSON lines of `attach`.
#[derive(Serialize)]
struct AttachView {
    /// `waiting`: the socket is there, guests' requests wait for `reason`. `ready`: it serves.
    /// `detached`: it has ended in good order.
    state: &'static str,
    volume: String,
    /// UUID.
    volume_id: String,
    socket: PathBuf,
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
    lease::check(&entry, me.id, arguments.force)?;
    // The lock keeps a second process with the same holder id from deposing this one.
    let locked = |failure: &Failure| failure.exit == Exit::Conflict;
    let _lock = while_lingering(locked, || lock_socket(&path))?;
    let in_use = |error: &SocketError| matches!(error, SocketError::InUse(_));
    while_lingering(in_use, || socket::check_free(&path))
        .map_err(|error| Failure::new(Exit::Conflict, format!("socket: {error}")))?;
    let stop = stop_on_signals()?;
    let plane = shell::start(&DataPlaneConfig {
        holder: me.id,
        pool: None,
        listen: None,
        buffer_bytes: arguments.buffers,
        state_messages: true,
    })?;
    let heads = Heads::new(Arc::clone(&store), Arc::clone(&plane), me);
    let healing = Healing::start(&store, &plane, &heads, arguments)?;
    let served = heads
        .open(entry.volume.id, arguments.force, OPEN_WAIT)
        .map_err(Failure::from)
        .and_then(|head| {
            let attached = Attached { store, plane: Arc::clone(&plane), heads, path, healing };
            attached.serve(&head, arguments, &stop, output)
        });
    match plane.shutdown(DRAIN) {
        Ok(()) | Err(ControlError::Stopped) => served,
        Err(error) => served.and(Err(error.into())),
    }
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

struct Attached {
    store: Arc<dyn ClusterStore>,
    plane: Arc<dyn DataPlane>,
    heads: Heads,
    path: PathBuf,
    healing: Healing,
}

impl Attached {
    /// Serves until told to stop or deposed; then drains, closes and gives the lease back.
    fn serve(
        &self,
        head: &Head,
        arguments: &AttachArguments,
        stop: &AtomicBool,
        output: &Output,
    ) -> Result<(), Failure> {
        let entry = &head.entry;
        let spec = ExportSpec {
            volume: head.volume(),
            socket: self.path.clone(),
            queues: arguments.queues,
            read_only: arguments.read_only || entry.volume.policy.read_only,
        };
        let served = match self.plane.start_export(&spec, START_WAIT) {
            Ok(()) => self.watch(head, stop, output),
            Err(error) => Err(error.into()),
        };
        notify::notify("STOPPING=1");
        let drain = if served.is_ok() { DRAIN } else { Duration::ZERO };
        let stopped = self.plane.stop_export(&self.path, drain);
        let closed = self.heads.close(entry, drain);
        served?;
        stopped?;
        closed?;
        self.say("detached", entry, None, output);
        Ok(())
    }

    fn watch(&self, head: &Head, stop: &AtomicBool, output: &Output) -> Result<(), Failure> {
        let entry = &head.entry;
        let mut ready = false;
        let mut told = None;
        let mut book = AddressBook::default();
        while !stop.load(Ordering::Acquire) {
            if !ready {
                match self.plane.open_head(&head.spec(), TURN) {
                    Ok(Opening::Open) => {
                        ready = true;
                        self.say("ready", entry, None, output);
                        notify::notify("READY=1");
                    }
                    Ok(Opening::Pending { reason }) => {
                        if told.as_ref() != Some(&reason) {
                            self.say("waiting", entry, Some(reason.clone()), output);
                            told = Some(reason);
                        }
                    }
                    Err(error) => return Err(self.ended(entry, &error.to_string())),
                }
            }
            let wait = if ready { TURN } else { Duration::ZERO };
            let event = self.plane.next_event(wait);
            if let Some(event) = &event {
                // Nobody takes them only if that thread has panicked, which is told at the end.
                let _ = self.healing.news.send(event.clone());
            }
            match event {
                Some(Event::Superseded { epoch, sealed, .. }) if epoch == entry.volume.epoch => {
                    return Err(self.ended(entry, &format!("a member has sealed {sealed}")));
                }
                Some(Event::Unopenable { epoch, reason, .. }) if epoch == entry.volume.epoch => {
                    return Err(Failure::new(Exit::Failed, reason));
                }
                Some(Event::Stopped) => {
                    return Err(Failure::new(Exit::Failed, "the data plane has stopped"));
                }
                Some(
                    Event::Superseded { .. }
                    | Event::Unopenable { .. }
                    | Event::Opened { .. }
                    | Event::MemberDown { .. }
                    | Event::MemberUp { .. }
                    | Event::MemberSlow { .. }
                    | Event::PoolFailed { .. },
                )
                | None => {}
            }
            if book.refresh(self.store.as_ref(), self.plane.as_ref()) {
                // A head without requests hears of its successor from nobody else.
                if let Ok(Some(by)) = self.heads.deposed_by(entry) {
                    return Err(taken_over(entry, &by));
                }
            }
        }
        Ok(())
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

    fn say(
        &self,
        state: &'static str,
        entry: &VolumeEntry,
        reason: Option<String>,
        output: &Output,
    ) {
        let view = AttachView {
            state,
            volume: entry.volume.name.clone(),
            volume_id: entry.volume.id.to_string(),
            socket: self.path.clone(),
            epoch: entry.volume.epoch.0,
            reason,
        };
        output.print_line(&view, || {
            let reason = view.reason.as_ref().map_or(String::new(), |text| format!(": {text}"));
            format!("{state}: volume {} at {}{reason}", view.volume, view.socket.display())
        });
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
