//! What came of an operation.

use std::net::IpAddr;

use base::BufferMut;

use crate::error::IoError;
use crate::handle::{ConnectionHandle, DeviceHandle, ListenerHandle, Token};

/// What happened. Every operation completes exactly once.
#[derive(Debug)]
pub enum Completion {
    /// A device read: all of it, or an error.
    Read {
        /// The owner's name for it.
        token: Token,
        /// The buffer, given back.
        buffer: BufferMut,
        /// How it ended.
        result: Result<(), IoError>,
    },
    /// A device write: all of it has been accepted by the device, or an error.
    Written {
        /// The owner's name for it.
        token: Token,
        /// How it ended.
        result: Result<(), IoError>,
    },
    /// Every write completed before the sync was started is on media, or an error: the device is
    /// then not to be trusted any more.
    Synced {
        /// The owner's name for it.
        token: Token,
        /// How it ended.
        result: Result<(), IoError>,
    },
    /// A discard.
    Discarded {
        /// The owner's name for it.
        token: Token,
        /// How it ended.
        result: Result<(), IoError>,
    },
    /// A device is closed and its lock released.
    DeviceClosed {
        /// No longer valid.
        device: DeviceHandle,
    },
    /// Somebody connected to a listener.
    Accepted {
        /// Which listener.
        listener: ListenerHandle,
        /// The new connection.
        connection: ConnectionHandle,
        /// The other side's address; `None` of a Unix socket, or if it is gone already.
        from: Option<IpAddr>,
    },
    /// The listener could not accept (out of descriptors or memory). It tries again by itself,
    /// at most ten times a second.
    AcceptFailed {
        /// Which listener.
        listener: ListenerHandle,
        /// Why.
        error: IoError,
    },
    /// A connect.
    Connected {
        /// The owner's name for it.
        token: Token,
        /// The connection, or why there is none.
        result: Result<ConnectionHandle, IoError>,
    },
    /// A receive.
    Received {
        /// On which connection.
        connection: ConnectionHandle,
        /// The buffer, given back.
        buffer: BufferMut,
        /// How many bytes were received from the start of the region. Fewer than `min_bytes`:
        /// the peer has closed its side.
        result: Result<usize, IoError>,
    },
    /// The send queue refused a part before, and is now at most half full.
    Writable {
        /// On which connection.
        connection: ConnectionHandle,
    },
    /// Sending failed; what was queued is dropped and no more is taken. Comes at most once.
    /// The connection is still to be closed.
    SendFailed {
        /// On which connection.
        connection: ConnectionHandle,
        /// Why.
        error: IoError,
    },
    /// The connection is closed and all its buffers are back. The last word about it.
    Closed {
        /// No longer valid.
        connection: ConnectionHandle,
    },
    /// A watched eventfd was signalled, once or several times; its counter has been taken.
    EventFd {
        /// The watch's token.
        token: Token,
    },
}
