//! The reactor.

use std::marker::PhantomData;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use base::{Buffer, BufferMut, BufferPool, Instant};

use crate::completion::Completion;
use crate::config::{Config, DeviceInfo, DeviceOptions, SocketAddress, SocketOptions};
use crate::error::{Error, SendError};
use crate::handle::{ConnectionHandle, DeviceHandle, ListenerHandle, Token, WatchHandle};
use crate::mailbox::{Receiver, Sender};
use crate::wake::Wakeup;

/// What a [`Reactor::turn`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Turn {
    /// Completions waiting to be taken.
    pub completions: usize,
    /// Another thread called [`Wakeup::wake`] or sent mail since the last turn.
    pub woken: bool,
    /// How long it slept.
    pub slept: Duration,
}

/// One io_uring with its buffers, devices, sockets and eventfds. Belongs to the thread that made
/// it.
pub struct Reactor {
    _not_send: PhantomData<*const ()>,
}

impl Reactor {
    /// A reactor for the calling thread. Its buffers' memory is never given back to the system.
    pub fn new(config: &Config) -> Result<Self, Error> {
        let _ = config;
        todo!()
    }

    /// The buffers, registered with the kernel.
    pub fn buffers(&self) -> &BufferPool {
        todo!()
    }

    /// The time, as read when the last turn ended: use it for everything that follows from one
    /// turn. [`now`](crate::now) reads the clock.
    pub fn now(&self) -> Instant {
        todo!()
    }

    /// Reads the clock and moves [`Reactor::now`] there.
    pub fn now_precise(&mut self) -> Instant {
        todo!()
    }

    /// Wakes this reactor from other threads.
    pub fn wakeup(&self) -> Wakeup {
        todo!()
    }

    /// A mailbox into this thread that holds up to `capacity` messages (rounded up to a power of
    /// two).
    pub fn mailbox<T: Send>(&self, capacity: usize) -> (Sender<T>, Receiver<T>) {
        let _ = capacity;
        todo!()
    }

    // Devices. Ranges are checked: what is outside the device or not aligned completes with
    // `IoError::Invalid`, and a handle that is no longer valid with `IoError::Closed`.

    /// Opens a regular file or a block device for direct I/O. Blocks for as long as the file
    /// system does.
    pub fn open_device(
        &mut self,
        path: &Path,
        options: DeviceOptions,
    ) -> Result<DeviceHandle, Error> {
        let _ = (path, options);
        todo!()
    }

    /// What is known of a device; `None` if the handle is no longer valid.
    pub fn device_info(&self, device: DeviceHandle) -> Option<DeviceInfo> {
        let _ = device;
        todo!()
    }

    /// Closes a device once the operations under way on it have completed; no more are taken.
    /// Completes with [`Completion::DeviceClosed`].
    pub fn close_device(&mut self, device: DeviceHandle) {
        let _ = device;
        todo!()
    }

    /// Reads `length` bytes at byte `offset` into `buffer`'s payload at `start`. Completes with
    /// [`Completion::Read`].
    pub fn read(
        &mut self,
        device: DeviceHandle,
        offset: u64,
        buffer: BufferMut,
        start: usize,
        length: usize,
        token: Token,
    ) {
        let _ = (device, offset, buffer, start, length, token);
        todo!()
    }

    /// Writes `parts`, one after the other, at byte `offset`: one contiguous write of up to
    /// [`WRITE_PARTS_MAX`](crate::WRITE_PARTS_MAX) parts. Each part's memory and length are
    /// aligned as [`DeviceInfo`] says (pages always are). Completes with
    /// [`Completion::Written`].
    pub fn write(
        &mut self,
        device: DeviceHandle,
        offset: u64,
        parts: impl IntoIterator<Item = Buffer>,
        token: Token,
    ) {
        let _ = (device, offset, parts.into_iter(), token);
        todo!()
    }

    /// Puts on media what was written before (fdatasync): every write that had completed when
    /// this was called. Completes with [`Completion::Synced`].
    pub fn sync(&mut self, device: DeviceHandle, token: Token) {
        let _ = (device, token);
        todo!()
    }

    /// Gives the range's space back (hole punching; the size stays). It reads as zeroes. Completes
    /// with [`Completion::Discarded`].
    pub fn discard(&mut self, device: DeviceHandle, offset: u64, length: u64, token: Token) {
        let _ = (device, offset, length, token);
        todo!()
    }

    // Sockets.

    /// Listens; connections come as [`Completion::Accepted`] and have `options`. A Unix socket
    /// that nobody listens on any more is replaced.
    pub fn listen(
        &mut self,
        address: &SocketAddress,
        options: SocketOptions,
    ) -> Result<ListenerHandle, Error> {
        let _ = (address, options);
        todo!()
    }

    /// Where a listener listens, with the port that the kernel chose.
    pub fn listener_address(&self, listener: ListenerHandle) -> Option<&SocketAddress> {
        let _ = listener;
        todo!()
    }

    /// Stops listening. No `Accepted` comes after this. A Unix socket's file stays.
    pub fn close_listener(&mut self, listener: ListenerHandle) {
        let _ = listener;
        todo!()
    }

    /// Connects. Completes with [`Completion::Connected`].
    pub fn connect(&mut self, address: &SocketAddress, options: SocketOptions, token: Token) {
        let _ = (address, options, token);
        todo!()
    }

    /// Takes over a connected stream socket, for instance one end of a socket pair.
    pub fn adopt(
        &mut self,
        socket: OwnedFd,
        options: SocketOptions,
    ) -> Result<ConnectionHandle, Error> {
        let _ = (socket, options);
        todo!()
    }

    /// The peer's address, if it has one.
    pub fn peer_address(&self, connection: ConnectionHandle) -> Option<SocketAddress> {
        let _ = connection;
        todo!()
    }

    /// Receives into `buffer`. `region` is in bytes of the whole slot: the header page at 0, the
    /// payload at [`HEADER_BYTES`](base::limits::HEADER_BYTES), so that one receive may put a
    /// header right before the payload. Completes with [`Completion::Received`] once `min_bytes`
    /// (at least 1) are there, or the peer has closed, or it failed.
    ///
    /// # Panics
    /// If a receive is outstanding on this connection, or `region` is not within the slot, or
    /// `min_bytes` is 0 or longer than the region.
    pub fn receive(
        &mut self,
        connection: ConnectionHandle,
        buffer: BufferMut,
        region: Range<usize>,
        min_bytes: usize,
    ) {
        let _ = (connection, buffer, region, min_bytes);
        todo!()
    }

    /// Appends `part` to what is to be sent. Parts are sent in order and whole; they leave with
    /// the next turn, many in one system call. What must go as a whole (a header and its data)
    /// needs its [`Reactor::send_space`] first: a refused part is dropped.
    pub fn send(&mut self, connection: ConnectionHandle, part: Buffer) -> Result<(), SendError> {
        let _ = (connection, part);
        todo!()
    }

    /// As [`Reactor::send`], of a copy of at most [`INLINE_BYTES_MAX`](crate::INLINE_BYTES_MAX)
    /// bytes that takes no buffer: for protocol headers. Takes up to one part of the queue.
    ///
    /// # Panics
    /// If there are more bytes.
    pub fn send_bytes(
        &mut self,
        connection: ConnectionHandle,
        bytes: &[u8],
    ) -> Result<(), SendError> {
        let _ = (connection, bytes);
        todo!()
    }

    /// Parts that the send queue still takes; 0 if the connection is closed or failed.
    pub fn send_space(&self, connection: ConnectionHandle) -> usize {
        let _ = connection;
        todo!()
    }

    /// Closes a connection now: drops what is queued, cancels what is under way. An outstanding
    /// receive completes first, then [`Completion::Closed`] comes.
    pub fn close(&mut self, connection: ConnectionHandle) {
        let _ = connection;
        todo!()
    }

    /// Closes a connection when all that is queued has been sent, for a last message. Takes no
    /// more parts. [`Reactor::close`] cuts it short.
    pub fn close_after_send(&mut self, connection: ConnectionHandle) {
        let _ = connection;
        todo!()
    }

    // Eventfds.

    /// Watches an eventfd (blocking or not, never changed): [`Completion::EventFd`] each time it
    /// was signalled, its counter taken.
    pub fn watch_eventfd(&mut self, eventfd: OwnedFd, token: Token) -> Result<WatchHandle, Error> {
        let _ = (eventfd, token);
        todo!()
    }

    /// Stops watching. No `EventFd` of this watch comes after this; the counter keeps what is
    /// signalled from now on.
    pub fn unwatch(&mut self, watch: WatchHandle) {
        let _ = watch;
        todo!()
    }

    // The loop.

    /// Submits what is queued and reaps what has completed. If that is nothing and the owner is
    /// not `busy` (has no other work), polls for a while and then sleeps, until something
    /// completes, another thread wakes it, or `deadline` (`None`: no limit).
    ///
    /// An error means that the ring is broken: stop using the reactor.
    pub fn turn(&mut self, deadline: Option<Instant>, busy: bool) -> Result<Turn, Error> {
        let _ = (deadline, busy);
        todo!()
    }

    /// The next completion, if there is one. What is left is kept for the next turn, which then
    /// does not sleep.
    pub fn next_completion(&mut self) -> Option<Completion> {
        todo!()
    }
}
