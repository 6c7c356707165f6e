//! A disk that grows, and how its front end hears of that.
//!
//! The message is `VHOST_USER_BACKEND_CONFIG_CHANGE_MSG` on the back-end channel, a socket that the front
//! end hands over (SET_BACKEND_REQ_FD) and reads between other work: it then asks for the configuration
//! (GET_CONFIG, answered by the control thread) before it does anything else. So the message must not be sent by
//! the thread that answers, and nobody waits for it to be taken in: it is sent by the reactor
//! thread, which never waits for this socket.
//!
//! Front ends ignore it while they have stopped the device, and after a reconnect do not ask for the
//! configuration again. So it is sent again whenever a ring starts, unless the front end has read the
//! present size in this connection.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// `VHOST_USER_BACKEND_CONFIG_CHANGE_MSG`.
const CONFIG_CHANGE: u32 = 2;
/// Protocol version 1, no reply wanted.
const FLAGS: u32 = 1;

/// The size of a disk, known to its device and to its listener: both are made from clones of one
/// [`DeviceConfig`](crate::DeviceConfig), whose handle on it is this.
#[derive(Clone, Debug)]
pub struct Capacity {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    blocks: AtomicU64,
    front_end: Mutex<FrontEnd>,
}

/// What this connection's front end knows, and how to reach it.
#[derive(Debug, Default)]
struct FrontEnd {
    channel: Option<OwnedFd>,
    /// The size that it was given last.
    has_read: Option<u64>,
}

/// What a device is does not depend on whom it tells of a change.
impl PartialEq for Capacity {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for Capacity {}

impl Capacity {
    pub(crate) fn new(blocks: u64) -> Self {
        let shared = Shared { blocks: AtomicU64::new(blocks), front_end: Mutex::default() };
        Self { shared: Arc::new(shared) }
    }

    fn front_end(&self) -> MutexGuard<'_, FrontEnd> {
        self.shared.front_end.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The size in blocks, if it is more than `blocks`.
    pub(crate) fn at_least(&self, blocks: u64) -> u64 {
        self.shared.blocks.load(Ordering::Acquire).max(blocks)
    }

    /// The front end is given this size.
    pub(crate) fn read(&self, blocks: u64) {
        self.front_end().has_read = Some(blocks);
    }

    /// A front end came, or went.
    pub(crate) fn forget_front_end(&self) {
        *self.front_end() = FrontEnd::default();
    }

    /// The front end's back-end channel.
    pub(crate) fn set_channel(&self, channel: OwnedFd) {
        self.front_end().channel = Some(channel);
    }

    /// The back-end channel and the size that the front end was given last, for another process.
    pub(crate) fn take_channel(&self) -> Option<(OwnedFd, Option<u64>)> {
        let FrontEnd { channel, has_read } = std::mem::take(&mut *self.front_end());
        channel.map(|channel| (channel, has_read))
    }

    /// Goes on with what another process had.
    pub(crate) fn resume_channel(&self, channel: OwnedFd, has_read: Option<u64>) {
        *self.front_end() = FrontEnd { channel: Some(channel), has_read };
    }

    /// The disk is larger from now on; its device serves that already.
    pub(crate) fn grow(&self, blocks: u64) {
        self.shared.blocks.fetch_max(blocks, Ordering::AcqRel);
        self.tell();
    }

    /// Tells the front end to read the configuration, unless it has.
    pub(crate) fn tell(&self) {
        let front_end = self.front_end();
        let blocks = self.shared.blocks.load(Ordering::Acquire);
        let Some(channel) = &front_end.channel else { return };
        if front_end.has_read == Some(blocks) {
            return;
        }
        if let Err(error) = send_config_change(channel) {
            tracing::warn!(%error, "a front end was not told of the disk's new size");
        }
    }
}

/// Sends the message if the socket takes it at once.
fn send_config_change(channel: &OwnedFd) -> io::Result<()> {
    let mut message = [0; 12];
    message[0..4].copy_from_slice(&CONFIG_CHANGE.to_ne_bytes());
    message[4..8].copy_from_slice(&FLAGS.to_ne_bytes());
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: `message` is valid for reads of its length for the call's duration.
    let sent =
        unsafe { libc::send(channel.as_raw_fd(), message.as_ptr().cast(), message.len(), flags) };
    match usize::try_from(sent) {
        Ok(sent) if sent == message.len() => Ok(()),
        // Twelve bytes are taken whole or not at all; what is cut short would confuse the reader.
        Ok(_) => Err(io::Error::from(io::ErrorKind::WriteZero)),
        Err(_) => Err(io::Error::last_os_error()),
    }
}
