//! A socket on its way from one process to the next: what a [`Listener`](crate::Listener) is made
//! of, as plain data and descriptors.
//!
//! The front end notices nothing: its connection stays open, and what it sends meanwhile waits in
//! the socket. Where the rings are is not in here but in the in-flight buffer, whose memory goes
//! along, so that the state stays good however far the next process gets with the rings: the same
//! [`Handover`] takes them back if that process fails.
//!
//! Everything in a received state is checked as if a front end had said it.

use core::fmt;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::memory::Region;

/// An index into the descriptors that travel with a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FdIndex(pub u32);

/// A listening socket, and the connection of its front end if there is one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ListenerState {
    /// The socket's path.
    pub path: PathBuf,
    /// Device and inode of the socket file.
    pub file: (u64, u64),
    /// The listening socket.
    pub socket: FdIndex,
    /// The front end.
    pub connection: Option<ConnectionState>,
}

/// A front end's connection and what it has said so far.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConnectionState {
    /// The connected socket.
    pub stream: FdIndex,
    /// The virtio features that it acknowledged.
    pub features: Option<u64>,
    /// The vhost-user protocol features that it acknowledged.
    pub protocol_features: Option<u64>,
    /// The guest's memory.
    pub memory: Vec<RegionState>,
    /// The in-flight buffer.
    pub inflight: Option<InflightState>,
    /// The dirty log.
    pub log: Option<LogState>,
    /// The queues that it spoke of, by index.
    pub rings: Vec<RingState>,
    /// Where it reads messages of the device. Absent in version 1 of the state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub channel: Option<ChannelState>,
}

/// The back-end channel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChannelState {
    /// The socket.
    pub socket: FdIndex,
    /// The size in blocks that the front end was given last: it is told of another one.
    pub known_blocks: Option<u64>,
}

/// A region of guest memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegionState {
    /// Its guest-physical address.
    pub gpa: u64,
    /// Its address in the front end.
    pub user: u64,
    /// Its length in bytes.
    pub bytes: u64,
    /// Where it starts in the file, in bytes.
    pub offset: u64,
    /// The file.
    pub file: FdIndex,
}

/// The in-flight buffer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InflightState {
    /// Where it starts in the file, in bytes.
    pub offset: u64,
    /// Its length in bytes.
    pub bytes: u64,
    /// Queues.
    pub queues: u16,
    /// Entries of a queue.
    pub size: u16,
    /// The front end keeps none: this one ends with the connection.
    pub own: bool,
    /// The file.
    pub file: FdIndex,
}

/// The dirty log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LogState {
    /// Where it starts in the file, in bytes.
    pub offset: u64,
    /// Its length in bytes.
    pub bytes: u64,
    /// The file.
    pub file: FdIndex,
}

/// What a front end has said of a queue.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RingState {
    /// Entries.
    pub size: Option<u16>,
    /// The available index to start at, if the ring is stopped.
    pub base: Option<u16>,
    /// Where the ring is.
    pub addresses: Option<AddressState>,
    /// It may run.
    pub enabled: bool,
    /// The eventfd by which the guest kicks; only while the ring is started.
    pub kick: Option<FdIndex>,
    /// The eventfd by which the guest is called.
    pub call: Option<FdIndex>,
    /// The eventfd for a broken ring.
    pub error: Option<FdIndex>,
}

/// Addresses of a ring in the front end's address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AddressState {
    /// The descriptor table.
    pub descriptors: u64,
    /// The available ring.
    pub available: u64,
    /// The used ring.
    pub used: u64,
    /// The used ring's guest address for the dirty log.
    pub used_log: Option<u64>,
}

/// A listener that no thread serves: nothing reads its sockets until
/// [`Listener::resume`](crate::Listener::resume), in this process or in another one.
pub struct Handover {
    pub(crate) state: ListenerState,
    pub(crate) fds: Vec<OwnedFd>,
    /// Mappings that were in use, kept because unmapping a large guest takes a while.
    pub(crate) _mapped: Vec<Region>,
}

impl Handover {
    /// What was received from another process.
    pub fn new(state: ListenerState, fds: Vec<OwnedFd>) -> Self {
        Self { state, fds, _mapped: Vec::new() }
    }

    /// What there is to send along with [`Handover::fds`].
    pub fn state(&self) -> &ListenerState {
        &self.state
    }

    /// The descriptors that the state's indices mean.
    pub fn fds(&self) -> &[OwnedFd] {
        &self.fds
    }

    /// The same again, with descriptors of its own: for [`Listener::resume`](crate::Listener::resume)
    /// in a process that may have to try more than once.
    pub fn try_clone(&self) -> std::io::Result<Self> {
        let fds = self.fds.iter().map(OwnedFd::try_clone).collect::<std::io::Result<_>>()?;
        Ok(Self { state: self.state.clone(), fds, _mapped: Vec::new() })
    }
}

impl fmt::Debug for Handover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handover").field("state", &self.state).finish_non_exhaustive()
    }
}

/// Why a state cannot be resumed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HandoverError {
    /// It names a descriptor that did not come, or names one twice.
    #[error("descriptor {index} of {count} is missing or used twice")]
    Descriptor {
        /// The index.
        index: u32,
        /// How many came.
        count: usize,
    },
    /// The device does not take it: another configuration, or damage.
    #[error("the front end's state is refused: {reason}")]
    Refused {
        /// Why.
        reason: String,
    },
}

/// Gives each descriptor out once.
pub(crate) struct Fds {
    fds: Vec<Option<OwnedFd>>,
}

impl Fds {
    pub(crate) fn new(fds: Vec<OwnedFd>) -> Self {
        Self { fds: fds.into_iter().map(Some).collect() }
    }

    pub(crate) fn take(&mut self, index: FdIndex) -> Result<OwnedFd, HandoverError> {
        let count = self.fds.len();
        usize::try_from(index.0)
            .ok()
            .and_then(|at| self.fds.get_mut(at))
            .and_then(Option::take)
            .ok_or(HandoverError::Descriptor { index: index.0, count })
    }
}

/// Collects descriptors and numbers them.
#[derive(Default)]
pub(crate) struct FdTable {
    pub(crate) fds: Vec<OwnedFd>,
}

impl FdTable {
    pub(crate) fn add(&mut self, fd: impl Into<OwnedFd>) -> FdIndex {
        let index = u32::try_from(self.fds.len()).expect("a process has far fewer descriptors");
        self.fds.push(fd.into());
        FdIndex(index)
    }
}
