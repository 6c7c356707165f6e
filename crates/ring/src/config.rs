//! What a caller tells and learns: configuration, options, addresses.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use crate::error::{Error, ErrorKind};

/// How to build a [`Reactor`](crate::Reactor).
#[derive(Clone, Debug)]
pub struct Config {
    /// Submission ring entries, a power of two. What does not fit waits in the reactor.
    pub entries: u32,
    /// Buffers with a 4 KiB payload.
    pub small_buffers: usize,
    /// Buffers with a 128 KiB payload.
    pub large_buffers: usize,
    /// The longest time to poll before sleeping. The reactor polls less, down to not at all,
    /// while polling does not pay.
    pub poll: Duration,
    /// Ask for transparent huge pages under the buffers. The kernel may decline.
    pub huge_pages: bool,
    /// Register the buffers with the kernel, which saves mapping their pages for each device
    /// operation. Without CAP_IPC_LOCK this counts against RLIMIT_MEMLOCK.
    pub register_buffers: bool,
}

impl Default for Config {
    /// 256 entries, 512 small and 64 large buffers (12 MiB), 20 µs of polling at most.
    fn default() -> Self {
        Self {
            entries: 256,
            small_buffers: 512,
            large_buffers: 64,
            poll: Duration::from_micros(20),
            huge_pages: true,
            register_buffers: true,
        }
    }
}

/// How to open a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceOptions {
    /// Refuse writes and discards.
    pub read_only: bool,
    /// Take the device for this process alone: `flock(LOCK_EX)` on what the path names, and
    /// O_EXCL on a block device, which keeps mounts away too. Fails with
    /// [`ErrorKind::InUse`] if another has it. Held until the device is closed.
    pub exclusive: bool,
}

/// What is known of an open device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Size in bytes, when it was opened.
    pub size_bytes: u64,
    /// Offsets and lengths of reads and writes are multiples of this many bytes.
    pub block_bytes: u32,
    /// Memory of reads and writes starts at multiples of this many bytes.
    pub memory_alignment: u32,
    /// A block device, not a regular file.
    pub is_block_device: bool,
    /// Opened without write access.
    pub read_only: bool,
}

/// Where to listen or connect.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum SocketAddress {
    /// TCP over IPv4 or IPv6. Port 0 lets the kernel choose when listening.
    Tcp(SocketAddr),
    /// A Unix stream socket at this path.
    Unix(PathBuf),
}

impl fmt::Display for SocketAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "{address}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl FromStr for SocketAddress {
    type Err = Error;

    /// `unix:PATH`, or an IP address and port such as `10.0.0.1:4420` or `[::1]:4420`.
    fn from_str(text: &str) -> Result<Self, Error> {
        match text.strip_prefix("unix:") {
            Some(path) if !path.is_empty() => Ok(Self::Unix(PathBuf::from(path))),
            Some(_) => Err(Error::new(ErrorKind::InvalidAddress, text)),
            None => match text.parse() {
                Ok(address) => Ok(Self::Tcp(address)),
                Err(_) => Err(Error::new(ErrorKind::InvalidAddress, text)),
            },
        }
    }
}

/// Options of a connection. TCP_NODELAY is always on. What concerns TCP is ignored on Unix
/// sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketOptions {
    /// Give up a connect after this time. `None`: the kernel's patience (minutes).
    pub connect_timeout: Option<Duration>,
    /// Send a keepalive probe after this much silence, and again at a third of it.
    pub keepalive: Option<Duration>,
    /// Fail the connection when sent data stays unacknowledged for so long (TCP_USER_TIMEOUT).
    pub user_timeout: Option<Duration>,
    /// SO_SNDBUF and SO_RCVBUF in bytes. `None`: the kernel tunes them.
    pub buffer_bytes: Option<u32>,
}

impl Default for SocketOptions {
    /// 5 s to connect, keepalive after 5 s, 10 s for unacknowledged data.
    fn default() -> Self {
        Self {
            connect_timeout: Some(Duration::from_secs(5)),
            keepalive: Some(Duration::from_secs(5)),
            user_timeout: Some(Duration::from_secs(10)),
            buffer_bytes: None,
        }
    }
}
