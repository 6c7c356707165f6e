//! The control half: a Unix socket and the thread that serves its front end.

use core::fmt;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vhost::vhost_user::{BackendReqHandler, Error as ProtocolError};

use crate::handover::{ConnectionState, FdTable, Fds, Handover, HandoverError, ListenerState};
use crate::peek::next_channel;
use crate::session::Session;
use crate::{ConfigError, ControlSink, DeviceConfig};

/// Why a socket could not be served.
#[derive(Debug, thiserror::Error)]
pub enum ListenerError {
    /// The configuration cannot be served.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The path does not fit into a socket address (107 bytes).
    #[error("socket path {path} is longer than the 107 bytes that a Unix socket allows")]
    NameTooLong {
        /// The path.
        path: PathBuf,
    },
    /// Another process, or another volume of this one, listens there.
    #[error("socket {path} is in use by a running process; choose another path, or stop it first")]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// Something else than a socket is there.
    #[error("{path} exists and is not a socket; it is left alone")]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The state of another process's front end cannot be gone on with.
    #[error("{path}: {source}")]
    Handover {
        /// The path.
        path: PathBuf,
        /// Why not.
        source: HandoverError,
    },
    /// The operating system refused.
    #[error("cannot {what} {path}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The path.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

/// The longest path that fits into a `sockaddr_un` with its terminating zero.
const PATH_BYTES_MAX: usize = 107;

/// `AF_UNIX` in the type that socket addresses have it in.
const AF_UNIX_FAMILY: libc::sa_family_t = 1;

/// The control thread's stack: it parses small messages.
const STACK_BYTES: usize = 256 * 1024;

/// A vhost-user socket and its control thread. Serves one front end at a time; the next one
/// waits until the connection before it has ended.
pub struct Listener {
    shared: Arc<Shared>,
    /// Its other end is in the control thread's poll: shutting it down wakes the thread.
    wake: UnixStream,
    thread: Option<JoinHandle<Sockets>>,
    session: Arc<Mutex<Session>>,
    /// Resumed and not told to go yet: the front end may still be another process's, so dropping
    /// this touches neither its connection nor the socket file.
    borrowed: bool,
}

/// What a control thread serves, and leaves when its listener is handed over.
struct Sockets {
    socket: UnixListener,
    connection: Option<UnixStream>,
}

struct Shared {
    path: PathBuf,
    /// Device and inode of our socket file: only that one is removed.
    file: (u64, u64),
    state: Mutex<SharedState>,
    changed: Condvar,
}

#[derive(Default)]
struct SharedState {
    stopping: Option<Stop>,
    connection: Option<UnixStream>,
    /// The thread shall rest between two messages.
    pausing: bool,
    /// It does.
    resting: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stop {
    /// Let requests under way finish.
    Drain,
    /// Just let go.
    Abandon,
    /// Leave everything as it is: it goes on elsewhere.
    HandOver,
}

impl Shared {
    fn new(path: &Path, file: (u64, u64), pausing: bool) -> Self {
        let state = Mutex::new(SharedState { pausing, ..SharedState::default() });
        Self { path: path.to_owned(), file, state, changed: Condvar::new() }
    }

    fn state(&self) -> MutexGuard<'_, SharedState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Rests while it is asked to, then says whether to go on.
    fn rest(&self) -> Option<Stop> {
        let mut state = self.state();
        while state.pausing && state.stopping.is_none() {
            state.resting = true;
            self.changed.notify_all();
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.resting = false;
        state.stopping
    }
}

impl fmt::Debug for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Listener").field("path", &self.shared.path).finish_non_exhaustive()
    }
}

impl Listener {
    /// Binds `socket_path` (a stale socket file is replaced, a live one is not) and starts the
    /// control thread, whose messages for the device go through `sink`.
    pub fn start(
        socket_path: &Path,
        config: DeviceConfig,
        sink: impl ControlSink + 'static,
    ) -> Result<Self, ListenerError> {
        config.check()?;
        let io_error =
            |what| move |source| ListenerError::Io { what, path: socket_path.to_owned(), source };
        let socket = bind(socket_path)?;
        let metadata =
            std::fs::symlink_metadata(socket_path).map_err(io_error("look at the new socket"))?;
        let file = (metadata.dev(), metadata.ino());
        let shared = Arc::new(Shared::new(socket_path, file, false));
        let session = Session::new(config, Box::new(sink));
        Self::run(shared, session, move |woken, shared, session| {
            serve(Sockets { socket, connection: None }, woken, shared, session)
        })
    }

    /// Goes on with a socket, and the front end that is connected to it, where another listener
    /// left off: the device is told everything anew, and its rings may start. Nothing is read from
    /// the front end, nor accepted, until [`Listener::go`].
    pub fn resume(
        handover: Handover,
        config: DeviceConfig,
        sink: impl ControlSink + 'static,
    ) -> Result<Self, ListenerError> {
        config.check()?;
        let Handover { state, fds, _mapped: _ } = handover;
        let path = state.path.clone();
        let refused = |source| ListenerError::Handover { path: path.clone(), source };
        let mut fds = Fds::new(fds);
        let socket = UnixListener::from(fds.take(state.socket).map_err(refused)?);
        let stream = state
            .connection
            .as_ref()
            .map(|known| fds.take(known.stream).map(UnixStream::from))
            .transpose()
            .map_err(refused)?;
        let shared = Arc::new(Shared::new(&state.path, state.file, true));
        let session = Session::new(config, Box::new(sink));
        let (told, outcome) = mpsc::sync_channel(1);
        let mut listener = Self::run(shared, session, move |woken, shared, session| {
            resume(socket, stream.zip(state.connection), fds, &told, (woken, shared, session))
        })?;
        listener.borrowed = true;
        let outcome = outcome.recv().unwrap_or_else(|_| {
            Err(HandoverError::Refused { reason: "its control thread ended".to_owned() })
        });
        outcome.map_err(refused)?;
        Ok(listener)
    }

    fn run(
        shared: Arc<Shared>,
        session: Session,
        serve: impl FnOnce(&UnixStream, &Shared, &Arc<Mutex<Session>>) -> Sockets + Send + 'static,
    ) -> Result<Self, ListenerError> {
        let path = shared.path.clone();
        let io_error = |what| {
            let path = path.clone();
            move |source| ListenerError::Io { what, path, source }
        };
        let (wake, woken) = UnixStream::pair().map_err(io_error("make a wake-up pair for"))?;
        woken.set_nonblocking(true).map_err(io_error("make a wake-up pair for"))?;
        let session = Arc::new(Mutex::new(session));
        let (in_thread, serving) = (Arc::clone(&shared), Arc::clone(&session));
        let thread = std::thread::Builder::new()
            .name("vhost-control".into())
            .stack_size(STACK_BYTES)
            .spawn(move || serve(&woken, &in_thread, &serving))
            .map_err(io_error("start a thread for"))?;
        Ok(Self { shared, wake, thread: Some(thread), session, borrowed: false })
    }

    /// Has the control thread rest between two of the front end's messages. False if it did not
    /// come to that within `wait` (a ring is being drained, say); then it goes on.
    #[must_use]
    pub fn pause(&self, wait: Duration) -> bool {
        let deadline = Instant::now() + wait;
        let mut state = self.shared.state();
        state.pausing = true;
        // One byte, read by the thread: it may be waiting for a message.
        let woken = (&self.wake).write(&[0]).is_ok();
        while woken && !state.resting {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            state = match self.shared.changed.wait_timeout(state, left) {
                Ok((state, _)) => state,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
        if state.resting {
            drop(state);
            if self.session().is_clear() {
                return true;
            }
            state = self.shared.state();
        }
        state.pausing = false;
        self.shared.changed.notify_all();
        false
    }

    /// Lets the control thread go on after [`Listener::pause`] or [`Listener::resume`].
    pub fn go(&mut self) {
        self.borrowed = false;
        self.shared.state().pausing = false;
        self.shared.changed.notify_all();
    }

    /// Takes the paused listener apart. The front end's connection stays open, its socket where it
    /// is, and the device is told nothing: the caller lets go of it.
    ///
    /// # Panics
    /// If the listener is not paused.
    pub fn hand_over(mut self) -> Handover {
        {
            let mut state = self.shared.state();
            assert!(state.pausing && state.resting, "only a paused listener is handed over");
            state.stopping = Some(Stop::HandOver);
            state.connection = None;
            self.shared.changed.notify_all();
        }
        let thread = self.thread.take().expect("a listener has a thread until it is consumed");
        let Sockets { socket, connection } = thread.join().expect("a resting thread just returns");
        let mut table = FdTable::default();
        let socket = table.add(socket);
        let mut mapped = Vec::new();
        let connection = connection.map(|stream| {
            let stream = table.add(stream);
            let (state, regions) = self.session().export(stream, &mut table);
            mapped = regions;
            state
        });
        let Shared { path, file, .. } = &*self.shared;
        let state = ListenerState { path: path.clone(), file: *file, socket, connection };
        Handover { state, fds: table.fds, _mapped: mapped }
    }

    fn session(&self) -> MutexGuard<'_, Session> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The socket's path.
    pub fn path(&self) -> &Path {
        &self.shared.path
    }

    /// Removes the socket file, lets the requests under way finish (bounded by
    /// [`DeviceConfig::drain_timeout`]), disconnects the front end and ends the thread. Blocks
    /// until then, so never call it on the reactor thread; dropping the listener does not wait
    /// and does not drain.
    pub fn stop(mut self) {
        self.signal_stop(Stop::Drain);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!(path = %self.shared.path.display(), "the control thread panicked");
        }
    }

    fn signal_stop(&self, stop: Stop) {
        let mut state = self.shared.state();
        if state.stopping.is_some() {
            return;
        }
        if self.borrowed {
            state.stopping = Some(Stop::HandOver);
            self.shared.changed.notify_all();
            return;
        }
        state.stopping = Some(stop);
        self.shared.changed.notify_all();
        let ours = std::fs::symlink_metadata(&self.shared.path)
            .is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == self.shared.file);
        if ours && let Err(error) = std::fs::remove_file(&self.shared.path) {
            tracing::warn!(path = %self.shared.path.display(), %error, "cannot remove the socket");
        }
        // The thread reads end of file, whatever it is waiting for. Replies can still go out.
        let how = if stop == Stop::Drain { Shutdown::Read } else { Shutdown::Both };
        if let Some(connection) = &state.connection {
            drop(connection.shutdown(how));
        }
        drop(self.wake.shutdown(Shutdown::Both));
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.signal_stop(Stop::Abandon);
    }
}

/// Binds the path, replacing a socket file that nobody listens on.
fn bind(path: &Path) -> Result<UnixListener, ListenerError> {
    let io_error = |what| move |source| ListenerError::Io { what, path: path.to_owned(), source };
    if path.as_os_str().as_bytes().len() > PATH_BYTES_MAX {
        return Err(ListenerError::NameTooLong { path: path.to_owned() });
    }
    match UnixListener::bind(path) {
        Ok(socket) => return Ok(socket),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
        Err(error) => return Err(io_error("listen on")(error)),
    }
    let metadata = std::fs::symlink_metadata(path).map_err(io_error("look at"))?;
    if !metadata.file_type().is_socket() {
        return Err(ListenerError::NotASocket { path: path.to_owned() });
    }
    match connect_without_waiting(path) {
        Ok(()) => return Err(ListenerError::InUse { path: path.to_owned() }),
        // Somebody listens, and has more front ends waiting than it takes.
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            return Err(ListenerError::InUse { path: path.to_owned() });
        }
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
        Err(error) => return Err(io_error("find out who listens on")(error)),
    }
    std::fs::remove_file(path).map_err(io_error("remove the stale socket"))?;
    UnixListener::bind(path).map_err(io_error("listen on"))
}

/// Tries to connect. Unlike `UnixStream::connect`, does not block while the queue is full.
fn connect_without_waiting(path: &Path) -> io::Result<()> {
    // SAFETY: the call has no memory effects.
    let fd = unsafe {
        libc::socket(libc::AF_UNIX, libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK, 0)
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `fd` was just opened and belongs to nobody else.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let mut address = libc::sockaddr_un { sun_family: AF_UNIX_FAMILY, sun_path: [0; 108] };
    for (to, from) in address.sun_path.iter_mut().zip(path.as_os_str().as_bytes()) {
        *to = libc::c_char::from_ne_bytes([*from]);
    }
    let bytes = libc::socklen_t::try_from(size_of::<libc::sockaddr_un>()).expect("110");
    // SAFETY: `address` is a valid socket address of `bytes` bytes for the call's duration.
    let result = unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), bytes) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The control thread: one connection after the other. Returns what it serves when that is handed
/// over, or to be dropped.
fn serve(
    mut sockets: Sockets,
    woken: &UnixStream,
    shared: &Shared,
    session: &Arc<Mutex<Session>>,
) -> Sockets {
    while shared.rest().is_none() {
        let readable = match wait_readable(sockets.socket.as_fd(), woken) {
            Ok(readable) => readable,
            Err(error) => {
                tracing::error!(path = %shared.path.display(), %error, "cannot wait for front ends");
                break;
            }
        };
        if !readable {
            continue;
        }
        match sockets.socket.accept() {
            Ok((stream, _)) => {
                sockets.connection = serve_connection(stream, woken, shared, session);
                if sockets.connection.is_some() {
                    break;
                }
            }
            Err(error) => {
                tracing::warn!(path = %shared.path.display(), %error, "cannot accept a front end");
                // Out of descriptors, likely: give others the time to close some.
                let patience = core::time::Duration::from_millis(100);
                drop(wait_any(&mut [poll_entry(woken.as_fd())], Some(patience)));
            }
        }
    }
    sockets
}

type Handler = BackendReqHandler<Mutex<Session>>;

/// The control thread of a listener that goes on where another one left off.
fn resume(
    socket: UnixListener,
    connection: Option<(UnixStream, ConnectionState)>,
    mut fds: Fds,
    told: &mpsc::SyncSender<Result<(), HandoverError>>,
    (woken, shared, session): (&UnixStream, &Shared, &Arc<Mutex<Session>>),
) -> Sockets {
    let mut sockets = Sockets { socket, connection: None };
    let Some((stream, known)) = connection else {
        let _ = told.send(Ok(()));
        return serve(sockets, woken, shared, session);
    };
    let resumed = stream
        .try_clone()
        .map_err(|error| HandoverError::Refused { reason: error.to_string() })
        .and_then(|clone| Ok((clone, replayed(session, &stream, &known, &mut fds)?)));
    let (clone, handler) = match resumed {
        Ok(resumed) => resumed,
        Err(error) => {
            let _ = told.send(Err(error));
            return sockets;
        }
    };
    shared.state().connection = Some(clone);
    let _ = told.send(Ok(()));
    tracing::info!(path = %shared.path.display(), "front end taken over");
    sockets.connection = converse(handler, stream, woken, shared, session);
    if sockets.connection.is_some() { sockets } else { serve(sockets, woken, shared, session) }
}

/// A handler of `stream` that knows what was negotiated, and a device that knows the rest.
///
/// The `vhost` crate's handler keeps the negotiated features to itself, so they are negotiated
/// again: with us, through a socket pair, whose descriptor then becomes the front end's
/// connection.
fn replayed(
    session: &Arc<Mutex<Session>>,
    stream: &UnixStream,
    known: &ConnectionState,
    fds: &mut Fds,
) -> Result<Handler, HandoverError> {
    const GET_FEATURES: u32 = 1;
    const SET_FEATURES: u32 = 2;
    const SET_PROTOCOL_FEATURES: u32 = 16;
    let refused = |reason: String| HandoverError::Refused { reason };
    let lock = || session.lock().unwrap_or_else(PoisonError::into_inner);
    lock().attach().map_err(|error| refused(error.to_string()))?;
    let (front, back) = UnixStream::pair().map_err(|error| refused(error.to_string()))?;
    let mut handler = BackendReqHandler::from_stream(back, Arc::clone(session));
    let messages = [
        Some((GET_FEATURES, None)),
        known.protocol_features.map(|features| (SET_PROTOCOL_FEATURES, Some(features))),
        known.features.map(|features| (SET_FEATURES, Some(features))),
    ];
    for (code, value) in messages.into_iter().flatten() {
        const VERSION: u32 = 1;
        let body = value.map_or(Vec::new(), |value| value.to_le_bytes().to_vec());
        let bytes = u32::try_from(body.len()).expect("eight at most");
        let header = [code, VERSION, bytes].map(u32::to_le_bytes).concat();
        (&front).write_all(&[header, body].concat()).map_err(|error| refused(error.to_string()))?;
        handler.handle_request().map_err(|error| refused(error.to_string()))?;
    }
    // SAFETY: both descriptors are open and owned, by `stream` and by `handler`; the call makes
    // the latter refer to the former's socket, which is what it is meant to serve from now on. No
    // memory is concerned.
    let moved = unsafe { libc::dup3(stream.as_raw_fd(), handler.as_raw_fd(), libc::O_CLOEXEC) };
    if moved < 0 {
        return Err(refused(io::Error::last_os_error().to_string()));
    }
    lock().resume(known, fds)?;
    Ok(handler)
}

/// Serves a front end to its end (`None`), or until it is handed over.
fn serve_connection(
    stream: UnixStream,
    woken: &UnixStream,
    shared: &Shared,
    session: &Arc<Mutex<Session>>,
) -> Option<UnixStream> {
    let path = shared.path.display();
    let clones = stream.try_clone().and_then(|clone| Ok((clone, stream.try_clone()?)));
    let clone = match clones {
        Ok((clone, for_shutdown)) => {
            let mut state = shared.state();
            if state.stopping.is_some() {
                return None;
            }
            state.connection = Some(for_shutdown);
            clone
        }
        Err(error) => {
            tracing::warn!(%path, %error, "cannot serve a front end");
            return None;
        }
    };
    tracing::info!(%path, "front end connected");
    let connected = session.lock().unwrap_or_else(PoisonError::into_inner).connected();
    match connected {
        Ok(()) => {
            let handler = BackendReqHandler::from_stream(clone, Arc::clone(session));
            converse(handler, stream, woken, shared, session)
        }
        Err(error) => {
            shared.state().connection = None;
            tracing::warn!(%path, %error, "front end dropped");
            None
        }
    }
}

/// Handles the front end's messages until it or the listener ends (`None`), or until it is handed
/// over.
fn converse(
    mut handler: Handler,
    stream: UnixStream,
    woken: &UnixStream,
    shared: &Shared,
    session: &Arc<Mutex<Session>>,
) -> Option<UnixStream> {
    let path = shared.path.display();
    let lock = || session.lock().unwrap_or_else(PoisonError::into_inner);
    let end = loop {
        match shared.rest() {
            Some(Stop::HandOver) => return Some(stream),
            // The connection was shut down for reading: the handler finds its end.
            Some(Stop::Drain | Stop::Abandon) | None => {}
        }
        match wait_readable(stream.as_fd(), woken) {
            Ok(true) => {}
            Ok(false) => continue,
            Err(error) => break ProtocolError::SocketError(error),
        }
        let channel = match next_channel(&stream) {
            Ok(channel) => channel,
            Err(error) => break ProtocolError::SocketError(error),
        };
        if let Err(error) = handler.handle_request() {
            break error;
        }
        // The message was found to be one.
        if let Some(channel) = channel {
            lock().set_channel(channel);
        }
    };
    if shared.state().stopping == Some(Stop::Drain) && !lock().quiesce() {
        tracing::warn!(%path, "requests were still under way when the device stopped");
    }
    // What is under way is let go of before the front end learns that we are gone.
    lock().disconnected();
    shared.state().connection = None;
    match end {
        ProtocolError::Disconnected => tracing::info!(%path, "front end disconnected"),
        error => tracing::warn!(%path, %error, "front end dropped"),
    }
    None
}

fn poll_entry(fd: BorrowedFd<'_>) -> libc::pollfd {
    libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 }
}

fn wait_any(entries: &mut [libc::pollfd], timeout: Option<core::time::Duration>) -> io::Result<()> {
    let count = libc::nfds_t::try_from(entries.len()).expect("a handful of entries");
    let timeout = timeout.map_or(-1, |timeout| {
        libc::c_int::try_from(timeout.as_millis()).unwrap_or(libc::c_int::MAX)
    });
    // SAFETY: `entries` is a valid array of `count` entries for the call's duration.
    let result = unsafe { libc::poll(entries.as_mut_ptr(), count, timeout) };
    if result >= 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    if error.kind() == io::ErrorKind::Interrupted { Ok(()) } else { Err(error) }
}

/// Waits until `socket` is readable (true), or the thread is woken for another reason (false).
fn wait_readable(socket: BorrowedFd<'_>, mut woken: &UnixStream) -> io::Result<bool> {
    let mut entries = [poll_entry(socket), poll_entry(woken.as_fd())];
    wait_any(&mut entries, None)?;
    if entries[1].revents != 0 {
        // Bytes of `pause`. At their end, which stays, there is nothing to take.
        let _ = woken.read(&mut [0; 64]);
    }
    Ok(entries[0].revents != 0)
}
