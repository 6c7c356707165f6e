//! Listening and connecting.

use std::io;
use std::net::{IpAddr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use io_uring::opcode;
use io_uring::squeue::Entry;
use io_uring::types;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, Shutdown, SocketAddrAny, SocketAddrUnix, SocketFlags, SocketType, sockopt,
};

use crate::completion::Completion;
use crate::config::{SocketAddress, SocketOptions};
use crate::connection::set_options;
use crate::error::{Error, ErrorKind, IoError};
use crate::handle::{Key, ListenerHandle, Token};
use crate::operation::{Connect, Operation, error_of};
use crate::reactor::{RETRY_AFTER, Reactor, Timer};

/// Connections that wait to be accepted, at most; the kernel has a limit of its own.
const LISTEN_BACKLOG: i32 = 1024;

pub(crate) struct Listener {
    socket: OwnedFd,
    address: SocketAddress,
    accept: Option<Key>,
    closing: bool,
}

impl SocketAddress {
    fn to_any(&self) -> Result<SocketAddrAny, Error> {
        match self {
            Self::Tcp(address) => Ok(SocketAddrAny::from(*address)),
            Self::Unix(path) => {
                SocketAddrUnix::new(path.as_path()).map(SocketAddrAny::from).map_err(|error| {
                    Error::os(ErrorKind::InvalidAddress, self.to_string(), error.into())
                })
            }
        }
    }

    pub(crate) fn from_any(address: &SocketAddrAny) -> Option<Self> {
        match address.address_family() {
            AddressFamily::INET => {
                let address = SocketAddrV4::try_from(address.clone()).ok()?;
                Some(Self::Tcp(SocketAddr::V4(address)))
            }
            AddressFamily::INET6 => {
                let address = SocketAddrV6::try_from(address.clone()).ok()?;
                Some(Self::Tcp(SocketAddr::V6(address)))
            }
            AddressFamily::UNIX => {
                let address = SocketAddrUnix::try_from(address.clone()).ok()?;
                let path = address.path()?;
                let path = Path::new(std::ffi::OsStr::from_bytes(path.to_bytes()));
                Some(Self::Unix(PathBuf::from(path)))
            }
            _ => None,
        }
    }
}

fn stream_socket(family: AddressFamily) -> rustix::io::Result<OwnedFd> {
    rustix::net::socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)
}

/// True if `path` is a Unix socket that nobody listens on: what a process that died left behind.
fn is_abandoned(path: &Path) -> bool {
    use std::os::unix::fs::FileTypeExt;
    let is_socket =
        std::fs::symlink_metadata(path).is_ok_and(|status| status.file_type().is_socket());
    is_socket
        && std::os::unix::net::UnixStream::connect(path)
            .is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}

fn listen_on(
    address: &SocketAddress,
    options: SocketOptions,
) -> Result<(OwnedFd, SocketAddress), Error> {
    let context = || format!("listening on {address}");
    let failed = |error: Errno| {
        let kind = match error {
            Errno::ADDRINUSE => ErrorKind::InUse,
            Errno::ACCESS | Errno::PERM => ErrorKind::PermissionDenied,
            Errno::NOENT | Errno::NOTDIR => ErrorKind::NotFound,
            Errno::MFILE | Errno::NFILE => ErrorKind::FileDescriptors,
            Errno::ADDRNOTAVAIL => ErrorKind::InvalidAddress,
            _ => ErrorKind::Os,
        };
        Error::os(kind, context(), error.into())
    };
    let any = address.to_any()?;
    let family = any.address_family();
    let socket = stream_socket(family).map_err(failed)?;
    if matches!(address, SocketAddress::Tcp(_)) {
        sockopt::set_socket_reuseaddr(&socket, true).map_err(failed)?;
    }
    set_options(&socket, family, options).map_err(failed)?;
    match (rustix::net::bind(&socket, &any), address) {
        (Err(Errno::ADDRINUSE), SocketAddress::Unix(path)) if is_abandoned(path) => {
            std::fs::remove_file(path)
                .map_err(|error| Error::os(ErrorKind::PermissionDenied, context(), error))?;
            rustix::net::bind(&socket, &any).map_err(failed)?;
        }
        (result, _) => result.map_err(failed)?,
    }
    rustix::net::listen(&socket, LISTEN_BACKLOG).map_err(failed)?;
    let bound = rustix::net::getsockname(&socket).map_err(failed)?;
    let bound = SocketAddress::from_any(&bound).unwrap_or_else(|| address.clone());
    Ok((socket, bound))
}

/// Who is at the other end of a connection. Once for each, so it may cost a system call.
fn peer_of(socket: &OwnedFd) -> Option<IpAddr> {
    let address = rustix::net::getpeername(socket).ok()??;
    Some(SocketAddr::try_from(address).ok()?.ip())
}

pub(crate) fn accept_entry(descriptor: RawFd) -> Entry {
    opcode::AcceptMulti::new(types::Fd(descriptor)).flags(libc::SOCK_CLOEXEC).build()
}

impl Reactor {
    /// Listens; connections come as [`Completion::Accepted`] and have `options`. A Unix socket
    /// that nobody listens on any more is replaced; whoever does listen there sees a connection
    /// that closes at once, which is how it is found out.
    pub fn listen(
        &mut self,
        address: &SocketAddress,
        options: SocketOptions,
    ) -> Result<ListenerHandle, Error> {
        let (socket, address) = listen_on(address, options)?;
        let listener = Listener { socket, address, accept: None, closing: false };
        let key = self.listeners.insert(listener);
        self.start_accept(key);
        Ok(ListenerHandle(key))
    }

    /// Where a listener listens, with the port that the kernel chose.
    pub fn listener_address(&self, listener: ListenerHandle) -> Option<&SocketAddress> {
        self.listeners.get(listener.0).map(|listener| &listener.address)
    }

    /// Accepts from now on, if the listener is open and does not already.
    pub(crate) fn start_accept(&mut self, listener: Key) {
        if let Some(entry) = self.listeners.get(listener)
            && entry.accept.is_none()
        {
            let descriptor = entry.socket.as_raw_fd();
            let key = self.start(Operation::Accept { listener, descriptor });
            self.listeners.get_mut(listener).expect("it was there just now").accept = Some(key);
        }
    }

    pub(crate) fn accept_completed(&mut self, key: Key, listener: Key, result: i32, more: bool) {
        let entry = self.listeners.get_mut(listener).expect("a listener outlives its operation");
        let closing = entry.closing || self.ending;
        if !more {
            self.operations.remove(key);
            entry.accept = None;
            if closing {
                self.listeners.remove(listener);
            }
        }
        let handle = ListenerHandle(listener);
        if result >= 0 {
            // SAFETY: the kernel has made this descriptor for us; nobody else knows it.
            let socket = unsafe { OwnedFd::from_raw_fd(result) };
            if !closing {
                let from = peer_of(&socket);
                let connection = self.add_connection(socket);
                let accepted = Completion::Accepted { listener: handle, connection, from };
                self.completions.push_back(accepted);
            }
        } else if !closing && !matches!(-result, libc::ECONNABORTED | libc::EINTR) {
            let error = error_of(result);
            self.completions.push_back(Completion::AcceptFailed { listener: handle, error });
            if !more {
                self.set_timer(RETRY_AFTER, Timer::Accept(listener));
            }
            return;
        }
        if !more && !closing {
            self.start_accept(listener);
        }
    }

    /// Accepts on a socket that listens already: another process's, handed over.
    pub fn adopt_listener(&mut self, socket: OwnedFd) -> Result<ListenerHandle, Error> {
        let failed = |error: Errno| Error::os(ErrorKind::Os, "taking over a socket", error.into());
        if !sockopt::socket_acceptconn(&socket).map_err(failed)? {
            return Err(Error::new(ErrorKind::InvalidAddress, "the socket does not listen"));
        }
        let bound = rustix::net::getsockname(&socket).map_err(failed)?;
        let Some(address) = SocketAddress::from_any(&bound) else {
            return Err(Error::new(ErrorKind::InvalidAddress, "neither TCP nor a Unix socket"));
        };
        let listener = Listener { socket, address, accept: None, closing: false };
        let key = self.listeners.insert(listener);
        self.start_accept(key);
        Ok(ListenerHandle(key))
    }

    /// Another descriptor of a listener's socket, for a process that is to go on with it.
    pub fn listener_socket(&self, listener: ListenerHandle) -> io::Result<OwnedFd> {
        let entry = self.listeners.get(listener.0).ok_or(io::ErrorKind::NotFound)?;
        entry.socket.try_clone()
    }

    /// Stops accepting, and leaves the socket listening for whoever else has a descriptor of it: who
    /// connects meanwhile waits.
    pub fn release_listener(&mut self, listener: ListenerHandle) {
        self.end_listener(listener, false);
    }

    /// Stops listening. No `Accepted` comes after those already completed. A Unix socket's file
    /// stays.
    pub fn close_listener(&mut self, listener: ListenerHandle) {
        self.end_listener(listener, true);
    }

    fn end_listener(&mut self, listener: ListenerHandle, shut_down: bool) {
        let Some(entry) = self.listeners.get_mut(listener.0) else { return };
        if entry.closing {
            return;
        }
        entry.closing = true;
        if shut_down {
            // The kernel refuses connections from now on.
            let _ = rustix::net::shutdown(&entry.socket, Shutdown::Both);
        }
        match entry.accept {
            Some(key) => self.cancel(key),
            None => {
                self.listeners.remove(listener.0);
            }
        }
    }

    /// Connects. Completes with [`Completion::Connected`].
    pub fn connect(&mut self, address: &SocketAddress, options: SocketOptions, token: Token) {
        match prepare_connect(address, options, token) {
            Ok(connect) => {
                let key = self.start(Operation::Connect(Box::new(connect)));
                if let Some(timeout) = options.connect_timeout {
                    self.set_timer(timeout, Timer::Connect(key));
                }
            }
            Err(error) => {
                let result = Err(error);
                self.completions.push_back(Completion::Connected { token, result });
            }
        }
    }

    /// A connect's time is over.
    pub(crate) fn connect_expired(&mut self, key: Key) {
        if let Some(Operation::Connect(connect)) = self.operations.get_mut(key) {
            connect.expired = true;
            self.cancel(key);
        }
    }

    pub(crate) fn connect_completed(&mut self, key: Key, result: i32) {
        let Some(Operation::Connect(connect)) = self.operations.remove(key) else {
            unreachable!("the caller has seen the operation");
        };
        let Connect { token, socket, expired, .. } = *connect;
        let result = match result {
            0.. => Ok(self.add_connection(socket)),
            _ if expired => Err(IoError::TimedOut),
            error => Err(error_of(error)),
        };
        self.completions.push_back(Completion::Connected { token, result });
    }
}

fn prepare_connect(
    address: &SocketAddress,
    options: SocketOptions,
    token: Token,
) -> Result<Connect, IoError> {
    let any = address.to_any().map_err(|_| IoError::Invalid("the path is too long"))?;
    let os = |error: Errno| IoError::Os(error.raw_os_error());
    let socket = stream_socket(any.address_family()).map_err(os)?;
    set_options(socket.as_fd(), any.address_family(), options).map_err(os)?;
    Ok(Connect { token, socket, address: any, expired: false })
}
