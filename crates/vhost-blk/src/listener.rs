//! The control half: a Unix socket and the thread that serves its front end.

use core::fmt;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use vhost::vhost_user::{BackendReqHandler, Error as ProtocolError};

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
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    path: PathBuf,
    /// Device and inode of our socket file: only that one is removed.
    file: (u64, u64),
    state: Mutex<SharedState>,
}

#[derive(Default)]
struct SharedState {
    stopping: Option<Stop>,
    connection: Option<UnixStream>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stop {
    /// Let requests under way finish.
    Drain,
    /// Just let go.
    Abandon,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, SharedState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
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
        let (wake, woken) = UnixStream::pair().map_err(io_error("make a wake-up pair for"))?;
        let shared = Arc::new(Shared {
            path: socket_path.to_owned(),
            file: (metadata.dev(), metadata.ino()),
            state: Mutex::default(),
        });
        let session = Arc::new(Mutex::new(Session::new(config, Box::new(sink))));
        let in_thread = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("vhost-control".into())
            .stack_size(STACK_BYTES)
            .spawn(move || serve(&socket, &woken, &in_thread, &session))
            .map_err(io_error("start a thread for"))?;
        Ok(Self { shared, wake, thread: Some(thread) })
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
        state.stopping = Some(stop);
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

/// The control thread: one connection after the other.
fn serve(
    socket: &UnixListener,
    woken: &UnixStream,
    shared: &Shared,
    session: &Arc<Mutex<Session>>,
) {
    while shared.state().stopping.is_none() {
        let readable = match wait_readable(socket.as_fd(), woken.as_fd()) {
            Ok(readable) => readable,
            Err(error) => {
                tracing::error!(path = %shared.path.display(), %error, "cannot wait for front ends");
                return;
            }
        };
        if !readable {
            continue;
        }
        match socket.accept() {
            Ok((stream, _)) => serve_connection(stream, shared, session),
            Err(error) => {
                tracing::warn!(path = %shared.path.display(), %error, "cannot accept a front end");
                // Out of descriptors, likely: give others the time to close some.
                let patience = core::time::Duration::from_millis(100);
                drop(wait_any(&mut [poll_entry(woken.as_fd())], Some(patience)));
            }
        }
    }
}

fn serve_connection(stream: UnixStream, shared: &Shared, session: &Arc<Mutex<Session>>) {
    let path = shared.path.display();
    let lock = || session.lock().unwrap_or_else(PoisonError::into_inner);
    match stream.try_clone() {
        Ok(clone) => {
            let mut state = shared.state();
            if state.stopping.is_some() {
                return;
            }
            state.connection = Some(clone);
        }
        Err(error) => {
            tracing::warn!(%path, %error, "cannot serve a front end");
            return;
        }
    }
    tracing::info!(%path, "front end connected");
    let connected = lock().connected();
    let end = match connected {
        Ok(()) => {
            let mut handler = BackendReqHandler::from_stream(stream, Arc::clone(session));
            let end = loop {
                match handler.handle_request() {
                    Ok(()) => {}
                    Err(error) => break error,
                }
            };
            if shared.state().stopping == Some(Stop::Drain) && !lock().quiesce() {
                tracing::warn!(%path, "requests were still under way when the device stopped");
            }
            // What is under way is let go of before the front end learns that we are gone.
            lock().disconnected();
            end
        }
        Err(error) => error,
    };
    shared.state().connection = None;
    match end {
        ProtocolError::Disconnected => tracing::info!(%path, "front end disconnected"),
        error => tracing::warn!(%path, %error, "front end dropped"),
    }
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
fn wait_readable(socket: BorrowedFd<'_>, woken: BorrowedFd<'_>) -> io::Result<bool> {
    let mut entries = [poll_entry(socket), poll_entry(woken)];
    wait_any(&mut entries, None)?;
    Ok(entries[0].revents != 0)
}
