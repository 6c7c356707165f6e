//! Sockets: the node's names for connections on one side, the reactor's handles on the other, and
//! what the reactor's send queue did not take in between.

use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};

use base::limits::HEADER_BYTES;
use base::{Buffer, BufferMut, Slab};
use node::{ConnectionId, Input};
use nvme::ReceiveRegion;
use ring::{ConnectionHandle, IoError, Reactor, SocketAddress, SocketOptions, Token};

/// What a connection is waiting to send because the reactor's queue is full.
#[derive(Default)]
struct Backlog {
    parts: VecDeque<Buffer>,
    /// Close when the parts are gone.
    closing: bool,
}

struct Connection {
    handle: ConnectionHandle,
    backlog: Backlog,
}

/// A connect under way. The node may give it up before it ends.
struct Connecting {
    connection: ConnectionId,
    abandoned: bool,
}

/// All sockets of the data plane.
pub(crate) struct Connections {
    by_id: HashMap<ConnectionId, Connection>,
    by_handle: HashMap<ConnectionHandle, ConnectionId>,
    connecting: Slab<Connecting>,
    accepted: u64,
}

/// Connect tokens are told from those of other operations by the completion they come with.
impl Connections {
    pub(crate) fn new() -> Self {
        Self {
            by_id: HashMap::new(),
            by_handle: HashMap::new(),
            connecting: Slab::with_capacity(64),
            accepted: 0,
        }
    }

    /// Number of sockets that are open or being opened.
    pub(crate) fn len(&self) -> usize {
        self.by_id.len() + self.connecting.len()
    }

    fn insert(&mut self, connection: ConnectionId, handle: ConnectionHandle) {
        let entry = Connection { handle, backlog: Backlog::default() };
        self.by_id.insert(connection, entry);
        self.by_handle.insert(handle, connection);
    }

    /// A peer has connected.
    pub(crate) fn accepted(&mut self, handle: ConnectionHandle, from: Option<IpAddr>) -> Input {
        self.accepted += 1;
        self.insert(ConnectionId::Accepted(self.accepted), handle);
        Input::Accepted { connection: self.accepted, from }
    }

    /// Starts to connect for the node.
    pub(crate) fn connect(
        &mut self,
        reactor: &mut Reactor,
        connection: ConnectionId,
        address: SocketAddr,
    ) {
        let connecting = Connecting { connection, abandoned: false };
        let token = Token(self.connecting.insert_or_grow(connecting));
        reactor.connect(&SocketAddress::Tcp(address), SocketOptions::default(), token);
    }

    /// A connect has ended. Nothing is to be told to the node if it gave the connection up.
    pub(crate) fn connected(
        &mut self,
        reactor: &mut Reactor,
        token: Token,
        result: Result<ConnectionHandle, IoError>,
    ) -> Option<Input> {
        let connecting = self.connecting.remove(token.0)?;
        let connection = connecting.connection;
        match result {
            Ok(handle) if connecting.abandoned => {
                reactor.close(handle);
                None
            }
            Ok(handle) => {
                self.insert(connection, handle);
                Some(Input::Connected { connection, result: Ok(()) })
            }
            Err(_) if connecting.abandoned => None,
            Err(error) => Some(Input::Connected { connection, result: Err(error_kind(error)) }),
        }
    }

    /// Lends a buffer to the kernel for the node.
    pub(crate) fn receive(
        &mut self,
        reactor: &mut Reactor,
        connection: ConnectionId,
        buffer: BufferMut,
        region: &ReceiveRegion,
        min_bytes: usize,
    ) {
        // A connection that is gone needs no receive: `Closed` is on its way to the node.
        let Some(entry) = self.by_id.get(&connection) else { return };
        let range = match region {
            ReceiveRegion::Header(range) => range.clone(),
            ReceiveRegion::Payload(range) => range.start + HEADER_BYTES..range.end + HEADER_BYTES,
        };
        reactor.receive(entry.handle, buffer, range, min_bytes);
    }

    /// A receive has ended.
    pub(crate) fn received(
        &mut self,
        handle: ConnectionHandle,
        buffer: BufferMut,
        result: Result<usize, IoError>,
    ) -> Option<Input> {
        let connection = *self.by_handle.get(&handle)?;
        Some(Input::Received { connection, buffer, bytes: result.unwrap_or(0) })
    }

    /// Sends for the node. Bytes count as sent once the reactor has taken them: it holds a
    /// bounded number of parts, and the rest waits here.
    pub(crate) fn send(
        &mut self,
        reactor: &mut Reactor,
        connection: ConnectionId,
        part: Buffer,
    ) -> Option<Input> {
        let entry = self.by_id.get_mut(&connection)?;
        if !entry.backlog.parts.is_empty() || reactor.send_space(entry.handle) == 0 {
            entry.backlog.parts.push_back(part);
            return None;
        }
        let bytes = part.len();
        // Refused only by a connection that failed; its `Closed` follows.
        reactor.send(entry.handle, part).ok()?;
        Some(Input::Sent { connection, bytes })
    }

    /// The reactor takes more parts.
    pub(crate) fn writable(
        &mut self,
        reactor: &mut Reactor,
        handle: ConnectionHandle,
    ) -> Option<Input> {
        let connection = *self.by_handle.get(&handle)?;
        let entry = self.by_id.get_mut(&connection)?;
        let mut bytes = 0;
        while reactor.send_space(handle) > 0
            && let Some(part) = entry.backlog.parts.pop_front()
        {
            bytes += part.len();
            reactor.send(handle, part).ok()?;
        }
        if entry.backlog.closing && entry.backlog.parts.is_empty() {
            reactor.close_after_send(handle);
        }
        (bytes > 0).then_some(Input::Sent { connection, bytes })
    }

    /// Closes for the node, after what it gave to send.
    pub(crate) fn close(
        &mut self,
        reactor: &mut Reactor,
        connection: ConnectionId,
    ) -> Option<Input> {
        if let Some(entry) = self.by_id.get_mut(&connection) {
            if entry.backlog.parts.is_empty() {
                reactor.close_after_send(entry.handle);
            } else {
                entry.backlog.closing = true;
            }
            return None;
        }
        let tag = self
            .connecting
            .iter()
            .find(|(_, connecting)| connecting.connection == connection && !connecting.abandoned)
            .map(|(tag, _)| tag)?;
        self.connecting.get_mut(tag).expect("it was found just now").abandoned = true;
        Some(Input::Closed { connection })
    }

    /// Sending failed: nothing more will come of the connection.
    pub(crate) fn send_failed(&mut self, reactor: &mut Reactor, handle: ConnectionHandle) {
        if let Some(entry) =
            self.by_handle.get(&handle).and_then(|connection| self.by_id.get_mut(connection))
        {
            entry.backlog.parts.clear();
        }
        reactor.close(handle);
    }

    /// The reactor has closed a connection.
    pub(crate) fn closed(&mut self, handle: ConnectionHandle) -> Option<Input> {
        let connection = self.by_handle.remove(&handle)?;
        self.by_id.remove(&connection);
        Some(Input::Closed { connection })
    }
}

fn error_kind(error: IoError) -> std::io::ErrorKind {
    match error {
        IoError::Os(errno) => std::io::Error::from_raw_os_error(errno).kind(),
        IoError::TimedOut => std::io::ErrorKind::TimedOut,
        IoError::Cancelled | IoError::Closed => std::io::ErrorKind::ConnectionAborted,
        IoError::Short { .. } | IoError::Unsupported | IoError::Invalid(_) => {
            std::io::ErrorKind::Other
        }
    }
}
