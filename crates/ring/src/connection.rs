//! Stream sockets: receiving, the send queue, closing.

use std::collections::VecDeque;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr;

use base::{Buffer, BufferMut};
use io_uring::opcode;
use io_uring::squeue::Entry;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::net::{AddressFamily, Shutdown, SocketType, sockopt};

use crate::completion::Completion;
use crate::config::{SocketAddress, SocketOptions};
use crate::error::{Error, ErrorKind, IoError, SendError};
use crate::handle::{ConnectionHandle, Key};
use crate::operation::{Operation, Receive, Step, Target, advance, error_of, on, push_iovec};
use crate::reactor::Reactor;
use crate::{INLINE_BYTES_MAX, SEND_PARTS_MAX};

/// Parts in one send, at most.
const GATHER_PARTS_MAX: usize = 64;
/// Bytes in one send, about: enough to fill a socket's buffer, few enough that their buffers
/// come back soon.
const GATHER_BYTES: usize = 1 << 20;

/// Something to send.
enum Part {
    Buffer(Buffer),
    Inline { length: u8, bytes: [u8; INLINE_BYTES_MAX] },
}

const _: () = assert!(INLINE_BYTES_MAX <= u8::MAX as usize);

impl Part {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Buffer(buffer) => buffer.bytes(),
            Self::Inline { length, bytes } => &bytes[..usize::from(*length)],
        }
    }
}

/// What the kernel is sending. Boxed: it reads the header, the vectors and inline parts.
struct Sending {
    parts: Vec<Part>,
    iovecs: Vec<libc::iovec>,
    /// Index into `iovecs` of the first that is not done.
    first: usize,
    rest_bytes: usize,
    header: libc::msghdr,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Open,
    /// Closes when the queue is empty.
    Draining,
    /// Closed for the owner; waits for operations to come back.
    Closing,
}

pub(crate) struct Connection {
    socket: OwnedFd,
    target: Target,
    state: State,
    /// Sending failed.
    failed: bool,
    /// A part was refused since the last `Writable`.
    refused: bool,
    /// Is in the reactor's list of connections with something new to send.
    listed: bool,
    queue: VecDeque<Part>,
    sending: Box<Sending>,
    send: Option<Key>,
    receive: Option<Key>,
}

impl Connection {
    fn new(socket: OwnedFd, target: Target) -> Self {
        // SAFETY: all-zero bytes are a valid `msghdr`: null pointers and zero lengths.
        let header = unsafe { std::mem::zeroed::<libc::msghdr>() };
        let sending = Box::new(Sending {
            parts: Vec::with_capacity(GATHER_PARTS_MAX),
            iovecs: Vec::with_capacity(GATHER_PARTS_MAX),
            first: 0,
            rest_bytes: 0,
            header,
        });
        Self {
            socket,
            target,
            state: State::Open,
            failed: false,
            refused: false,
            listed: false,
            queue: VecDeque::with_capacity(GATHER_PARTS_MAX),
            sending,
            send: None,
            receive: None,
        }
    }

    fn parts(&self) -> usize {
        self.queue.len() + self.sending.parts.len()
    }

    fn takes_parts(&self) -> bool {
        self.state == State::Open && !self.failed
    }

    /// Moves what one send takes from the queue to `sending`.
    fn gather(&mut self) {
        let sending = &mut *self.sending;
        debug_assert!(sending.parts.is_empty());
        let mut bytes = 0;
        while sending.parts.len() < GATHER_PARTS_MAX && bytes < GATHER_BYTES {
            let Some(part) = self.queue.pop_front() else { break };
            bytes += part.bytes().len();
            sending.parts.push(part);
        }
        sending.iovecs.clear();
        // The parts stay where they are from here on.
        for part in &sending.parts {
            push_iovec(&mut sending.iovecs, part.bytes());
        }
        sending.first = 0;
        sending.rest_bytes = bytes;
    }

    /// The entry that sends the rest of `sending`.
    pub(crate) fn send_entry(&mut self) -> Entry {
        // With MSG_WAITALL the kernel itself sends the rest after a short send.
        const FLAGS: i32 = libc::MSG_WAITALL | libc::MSG_NOSIGNAL;
        let sending = &mut *self.sending;
        let iovecs = &mut sending.iovecs[sending.first..];
        if let [one] = iovecs
            && let Ok(length) = u32::try_from(one.iov_len)
        {
            let memory = one.iov_base.cast::<u8>().cast_const();
            return on!(self.target, |file| {
                opcode::Send::new(file, memory, length).flags(FLAGS).build()
            });
        }
        sending.header.msg_iov = iovecs.as_mut_ptr();
        sending.header.msg_iovlen = iovecs.len();
        let header = &raw const sending.header;
        on!(self.target, |file| {
            opcode::SendMsg::new(file, header).flags(FLAGS.cast_unsigned()).build()
        })
    }

    fn send_step(&mut self, result: i32) -> Step {
        let Ok(bytes) = usize::try_from(result) else {
            return if matches!(-result, libc::EINTR | libc::EAGAIN) {
                Step::Again
            } else {
                Step::Done(Err(error_of(result)))
            };
        };
        let sending = &mut *self.sending;
        assert!(bytes <= sending.rest_bytes, "the kernel sends no more than it was asked to");
        sending.rest_bytes -= bytes;
        if sending.rest_bytes == 0 {
            Step::Done(Ok(()))
        } else if bytes == 0 {
            Step::Done(Err(IoError::Os(libc::EPIPE)))
        } else {
            sending.first = advance(&mut sending.iovecs, sending.first, bytes);
            Step::Again
        }
    }

    /// The send is over: its parts go.
    fn send_ended(&mut self) {
        self.send = None;
        self.sending.parts.clear();
        self.sending.iovecs.clear();
        self.sending.header.msg_iov = ptr::null_mut();
    }
}

/// Sets what every connection has; `options` concern TCP. On a listener, connections inherit it.
pub(crate) fn set_options(
    socket: impl AsFd,
    family: AddressFamily,
    options: SocketOptions,
) -> rustix::io::Result<()> {
    if let Some(bytes) = options.buffer_bytes {
        sockopt::set_socket_send_buffer_size(&socket, bytes as usize)?;
        sockopt::set_socket_recv_buffer_size(&socket, bytes as usize)?;
    }
    if family != AddressFamily::INET && family != AddressFamily::INET6 {
        return Ok(());
    }
    sockopt::set_tcp_nodelay(&socket, true)?;
    if let Some(silence) = options.keepalive {
        let second = std::time::Duration::from_secs(1);
        sockopt::set_socket_keepalive(&socket, true)?;
        sockopt::set_tcp_keepidle(&socket, silence.max(second))?;
        sockopt::set_tcp_keepintvl(&socket, (silence / 3).max(second))?;
        sockopt::set_tcp_keepcnt(&socket, 3)?;
    }
    if let Some(timeout) = options.user_timeout {
        let millis = u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX);
        sockopt::set_tcp_user_timeout(&socket, millis)?;
    }
    Ok(())
}

impl Reactor {
    /// Takes over a connected stream socket, for instance one end of a socket pair. It is made
    /// blocking, which concerns whoever shares it.
    pub fn adopt(
        &mut self,
        socket: OwnedFd,
        options: SocketOptions,
    ) -> Result<ConnectionHandle, Error> {
        let failed =
            |error: rustix::io::Errno| Error::os(ErrorKind::Os, "adopting a socket", error.into());
        if sockopt::socket_type(&socket).map_err(failed)? != SocketType::STREAM {
            return Err(Error::new(ErrorKind::InvalidConfig, "adopting a socket: not a stream"));
        }
        let flags = fcntl_getfl(&socket).map_err(failed)?;
        // The kernel would answer EAGAIN on a non-blocking one instead of waiting.
        fcntl_setfl(&socket, flags - OFlags::NONBLOCK).map_err(failed)?;
        let family = sockopt::socket_domain(&socket).map_err(failed)?;
        set_options(&socket, family, options).map_err(failed)?;
        Ok(self.add_connection(socket))
    }

    pub(crate) fn add_connection(&mut self, socket: OwnedFd) -> ConnectionHandle {
        let target = self.files.install(&self.uring, socket.as_fd());
        ConnectionHandle(self.connections.insert(Connection::new(socket, target)))
    }

    /// The peer's address, if it has one.
    pub fn peer_address(&self, connection: ConnectionHandle) -> Option<SocketAddress> {
        let entry = self.connections.get(connection.0)?;
        SocketAddress::from_any(&rustix::net::getpeername(&entry.socket).ok()??)
    }

    /// Receives into `buffer`. `region` is in bytes of the whole slot: the header page at 0, the
    /// payload at [`HEADER_BYTES`](base::limits::HEADER_BYTES), so that one receive may put a
    /// header right before the payload. Completes with [`Completion::Received`] once `min_bytes`
    /// (at least 1) are there, or the peer has closed, or it failed. On a connection that is
    /// closing or closed it completes with [`IoError::Closed`], perhaps after the `Closed`.
    ///
    /// # Panics
    /// If a receive is outstanding on this connection, or `region` is not within the slot, or
    /// `min_bytes` is 0 or longer than the region.
    pub fn receive(
        &mut self,
        connection: ConnectionHandle,
        mut buffer: BufferMut,
        region: Range<usize>,
        min_bytes: usize,
    ) {
        assert!(
            region.start <= region.end && region.end <= buffer.slot_mut().len(),
            "the region is within the slot"
        );
        assert!(0 < min_bytes && min_bytes <= region.len(), "the region holds the least bytes");
        let target = match self.connections.get(connection.0) {
            Some(entry) if entry.state != State::Closing => {
                assert!(entry.receive.is_none(), "one receive at a time on a connection");
                entry.target
            }
            Some(_) | None => {
                let result = Err(IoError::Closed);
                self.completions.push_back(Completion::Received { connection, buffer, result });
                return;
            }
        };
        let key = self.start(Operation::Receive(Receive {
            connection: connection.0,
            target,
            buffer,
            start: region.start,
            length: region.len(),
            min_bytes,
            done: 0,
        }));
        self.connections.get_mut(connection.0).expect("it was there just now").receive = Some(key);
    }

    pub(crate) fn receive_completed(&mut self, key: Key, result: i32) {
        let Some(Operation::Receive(receive)) = self.operations.get_mut(key) else {
            unreachable!("the caller has seen the operation");
        };
        let connection = ConnectionHandle(receive.connection);
        let closing =
            self.connections.get(connection.0).is_none_or(|entry| entry.state == State::Closing);
        let result = match receive.step(result) {
            Step::Again if closing || self.ending => Err(IoError::Cancelled),
            Step::Again => return self.issue(key),
            Step::Done(_) if closing => Err(IoError::Cancelled),
            Step::Done(Ok(())) => Ok(receive.done),
            Step::Done(Err(error)) => Err(error),
        };
        let Some(Operation::Receive(receive)) = self.operations.remove(key) else {
            unreachable!("as above");
        };
        if let Some(entry) = self.connections.get_mut(connection.0) {
            entry.receive = None;
        }
        let buffer = receive.buffer;
        self.completions.push_back(Completion::Received { connection, buffer, result });
        self.finish_connection(connection);
    }

    /// Appends `part` to what is to be sent. Parts are sent in order and whole; they leave with
    /// the next turn, many in one system call. What must go as a whole (a header and its data)
    /// needs its [`Reactor::send_space`] first: a refused part is dropped.
    pub fn send(&mut self, connection: ConnectionHandle, part: Buffer) -> Result<(), SendError> {
        if part.is_empty() {
            return Ok(());
        }
        self.enqueue(connection)?.queue.push_back(Part::Buffer(part));
        Ok(())
    }

    /// As [`Reactor::send`], of a copy of at most [`INLINE_BYTES_MAX`] bytes that takes no buffer:
    /// for protocol headers. Takes up to one part of the queue.
    ///
    /// # Panics
    /// If there are more bytes.
    pub fn send_bytes(
        &mut self,
        connection: ConnectionHandle,
        bytes: &[u8],
    ) -> Result<(), SendError> {
        assert!(bytes.len() <= INLINE_BYTES_MAX, "inline bytes are few");
        if bytes.is_empty() {
            return Ok(());
        }
        let queue = &mut self.enqueue(connection)?.queue;
        if let Some(Part::Inline { length, bytes: room }) = queue.back_mut() {
            let start = usize::from(*length);
            if let Some(room) = room.get_mut(start..start + bytes.len()) {
                room.copy_from_slice(bytes);
                *length = u8::try_from(start + bytes.len()).expect("within INLINE_BYTES_MAX");
                return Ok(());
            }
        }
        let mut room = [0; INLINE_BYTES_MAX];
        room[..bytes.len()].copy_from_slice(bytes);
        let length = u8::try_from(bytes.len()).expect("within INLINE_BYTES_MAX");
        queue.push_back(Part::Inline { length, bytes: room });
        Ok(())
    }

    /// The connection, if it takes another part; puts it on the list of those to send from.
    fn enqueue(&mut self, connection: ConnectionHandle) -> Result<&mut Connection, SendError> {
        let entry = self.connections.get_mut(connection.0).ok_or(SendError::Closed)?;
        if !entry.takes_parts() {
            return Err(SendError::Closed);
        }
        if entry.parts() >= SEND_PARTS_MAX {
            entry.refused = true;
            return Err(SendError::Full);
        }
        if !entry.listed {
            entry.listed = true;
            self.senders.push(connection);
        }
        Ok(entry)
    }

    /// Parts that the send queue still takes; 0 if the connection is closed or failed.
    pub fn send_space(&self, connection: ConnectionHandle) -> usize {
        match self.connections.get(connection.0) {
            Some(entry) if entry.takes_parts() => SEND_PARTS_MAX - entry.parts(),
            Some(_) | None => 0,
        }
    }

    /// Starts a send on every connection with something new in its queue.
    pub(crate) fn start_sends(&mut self) {
        while let Some(connection) = self.senders.pop() {
            if let Some(entry) = self.connections.get_mut(connection.0) {
                entry.listed = false;
                self.start_send(connection);
            }
        }
    }

    /// Starts a send if there is something to send and none is under way.
    fn start_send(&mut self, connection: ConnectionHandle) {
        let Some(entry) = self.connections.get_mut(connection.0) else { return };
        if entry.send.is_some() || entry.queue.is_empty() {
            return;
        }
        entry.gather();
        let key = self.start(Operation::Send { connection: connection.0 });
        self.connections.get_mut(connection.0).expect("it was there just now").send = Some(key);
    }

    pub(crate) fn send_completed(&mut self, key: Key, connection: Key, result: i32) {
        let handle = ConnectionHandle(connection);
        let ending = self.ending;
        let entry =
            self.connections.get_mut(connection).expect("a connection outlives its operations");
        let closing = entry.state == State::Closing;
        let result = match entry.send_step(result) {
            Step::Again if closing || ending => Err(IoError::Cancelled),
            Step::Again => return self.issue(key),
            Step::Done(result) => result,
        };
        self.operations.remove(key);
        entry.send_ended();
        if let Err(error) = result
            && !closing
        {
            entry.failed = true;
            entry.queue.clear();
            let error = if ending { IoError::Cancelled } else { error };
            self.completions.push_back(Completion::SendFailed { connection: handle, error });
        } else if entry.refused && entry.takes_parts() && entry.parts() <= SEND_PARTS_MAX / 2 {
            entry.refused = false;
            self.completions.push_back(Completion::Writable { connection: handle });
        }
        if entry.state == State::Draining && entry.queue.is_empty() {
            self.close(handle);
        } else if closing {
            self.finish_connection(handle);
        } else if !ending {
            self.start_send(handle);
        }
    }

    /// Closes a connection now: drops what is queued, cancels what is under way. An outstanding
    /// receive completes first, then [`Completion::Closed`] comes.
    pub fn close(&mut self, connection: ConnectionHandle) {
        let Some(entry) = self.connections.get_mut(connection.0) else { return };
        if entry.state == State::Closing {
            return;
        }
        entry.state = State::Closing;
        entry.queue.clear();
        let under_way = [entry.send, entry.receive];
        // Ends what is under way in the socket even before it is cancelled. It fails if the peer
        // has gone already.
        let _ = rustix::net::shutdown(&entry.socket, Shutdown::Both);
        for key in under_way.into_iter().flatten() {
            self.cancel(key);
        }
        self.finish_connection(connection);
    }

    /// Closes a connection when all that is queued has been sent, for a last message. Takes no
    /// more parts. [`Reactor::close`] cuts it short.
    pub fn close_after_send(&mut self, connection: ConnectionHandle) {
        let Some(entry) = self.connections.get_mut(connection.0) else { return };
        if entry.state != State::Open {
            return;
        }
        if entry.parts() == 0 {
            return self.close(connection);
        }
        entry.state = State::Draining;
    }

    /// Frees a closing connection that has nothing under way.
    fn finish_connection(&mut self, connection: ConnectionHandle) {
        let idle = self.connections.get(connection.0).is_some_and(|entry| {
            entry.state == State::Closing && entry.send.is_none() && entry.receive.is_none()
        });
        if idle && let Some(entry) = self.connections.remove(connection.0) {
            self.files.remove(&self.uring, entry.target);
            drop(entry);
            self.completions.push_back(Completion::Closed { connection });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// After a short send the rest is sent, from where it ended, inline bytes too.
    #[test]
    fn a_short_send_goes_on_in_the_right_part() {
        let (socket, _peer) = std::os::unix::net::UnixStream::pair().unwrap();
        let mut connection = Connection::new(socket.into(), Target::Descriptor(-1));
        let bytes: Vec<u8> = (0..200).collect();
        let room = std::array::from_fn(|index| bytes[index % 200]);
        connection.queue.push_back(Part::Buffer(Buffer::copied_from(&bytes[..100])));
        connection.queue.push_back(Part::Inline { length: 50, bytes: room });
        connection.queue.push_back(Part::Buffer(Buffer::copied_from(&bytes[100..])));
        connection.gather();
        let rest = |connection: &Connection| {
            let sending = &connection.sending;
            let mut rest = Vec::new();
            for iovec in &sending.iovecs[sending.first..] {
                // SAFETY: the parts that the vectors point to are still there.
                let part = unsafe {
                    std::slice::from_raw_parts(iovec.iov_base.cast::<u8>(), iovec.iov_len)
                };
                rest.extend_from_slice(part);
            }
            rest
        };
        let expected = [&bytes[..100], &bytes[..50], &bytes[100..]].concat();
        assert_eq!(rest(&connection), expected);
        let mut done = 0;
        for bytes in [1, 98, 1, 20, 40, 89] {
            assert_eq!(connection.send_step(bytes), Step::Again);
            done += bytes.unsigned_abs() as usize;
            assert_eq!(rest(&connection), expected[done..]);
        }
        assert_eq!(connection.send_step(-libc::EINTR), Step::Again);
        assert_eq!(connection.send_step(1), Step::Done(Ok(())));
    }

    #[test]
    fn a_send_that_makes_no_progress_fails() {
        let (socket, _peer) = std::os::unix::net::UnixStream::pair().unwrap();
        let mut connection = Connection::new(socket.into(), Target::Descriptor(-1));
        connection.queue.push_back(Part::Buffer(Buffer::copied_from(b"some")));
        connection.gather();
        assert_eq!(connection.send_step(0), Step::Done(Err(IoError::Os(libc::EPIPE))));
        let reset = Step::Done(Err(IoError::Os(libc::ECONNRESET)));
        assert_eq!(connection.send_step(-libc::ECONNRESET), reset);
    }
}
