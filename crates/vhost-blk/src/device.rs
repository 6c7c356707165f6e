//! The data half: rings in, block requests out, replies in, used entries out.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use base::{BlockReply, BlockRequest, BufferPool};

use crate::{Control, DeviceConfig};

/// What the shell must do or know. Taken with [`Device::poll_event`] after each
/// [`Device::control`], [`Device::poll`] and [`Device::complete`].
#[derive(Debug)]
pub enum Event {
    /// Watch this eventfd: read its 8 bytes whenever it is readable (an io_uring read, or a poll
    /// and [`read_eventfd`](crate::read_eventfd)), then call [`Device::kicked`]. Replaces an
    /// earlier one of this queue.
    WatchKick {
        /// The queue.
        queue: u16,
        /// The eventfd; keep this until the watch has ended.
        fd: Arc<OwnedFd>,
    },
    /// Stop watching the queue's eventfd and let go of it.
    UnwatchKick {
        /// The queue.
        queue: u16,
    },
    /// A ring runs, and none ran before: the guest wants I/O (a destination of a live migration
    /// takes the lease now).
    Started,
    /// No ring runs any more and nothing is under way: drained (the source of a live migration
    /// may mark its lease yieldable).
    Stopped,
    /// A request came back with [`base::Status::Superseded`]. The device holds it and all later
    /// ones; the guest sees a pause. When the volume is open again, call [`Device::resume`].
    Superseded,
}

/// One virtual disk: its rings, and the requests of its guest that are under way. Plain data,
/// owned by one reactor thread.
#[derive(Debug)]
pub struct Device {
    config: DeviceConfig,
    buffers: BufferPool,
}

impl Device {
    /// A device without a front end. Its read and write data goes through `buffers`.
    ///
    /// # Panics
    /// If [`DeviceConfig::check`] finds fault with `config`.
    pub fn new(config: DeviceConfig, buffers: BufferPool) -> Self {
        config.check().expect("the caller has checked the configuration");
        Self { config, buffers }
    }

    /// The configuration.
    pub fn config(&self) -> &DeviceConfig {
        &self.config
    }

    /// Takes a message of the control thread, and answers it now or, if it asks for a drain, when
    /// nothing is under way any more. Call [`Device::poll`] afterwards: a ring may have started.
    pub fn control(&mut self, message: Control) {
        drop(message);
    }

    /// The next thing that the shell must do or know.
    pub fn poll_event(&mut self) -> Option<Event> {
        None
    }

    /// The shell read the kick eventfd of `queue`. Call [`Device::poll`] afterwards.
    pub fn kicked(&mut self, queue: u16) {
        let _ = queue;
    }

    /// Takes requests from the rings, all queues in turn, and submits at most `budget` block
    /// requests. True if work remains: call again in the next turn, or, when buffers ran out,
    /// after replies came in.
    pub fn poll(&mut self, budget: usize, submit: &mut impl FnMut(BlockRequest)) -> bool {
        let _ = (budget, submit, &self.buffers);
        false
    }

    /// Takes a reply. Replies may come in any order.
    pub fn complete(&mut self, reply: BlockReply) {
        drop(reply);
    }

    /// Signals the call eventfds of the queues that got used entries since the last time and
    /// whose guest wants to know. Once per turn, after everything else.
    pub fn flush_notifications(&mut self) {}

    /// While on, guests are told not to kick, since the reactor polls. After switching off, call
    /// [`Device::poll`]: a request may have come without a kick.
    pub fn set_polling(&mut self, on: bool) {
        let _ = on;
    }

    /// Sends what [`Event::Superseded`] held back again, and goes on with the rings.
    pub fn resume(&mut self) {}

    /// Guest requests under way, those of lost connections included.
    pub fn busy(&self) -> usize {
        0
    }

    /// True while a front end is connected.
    pub fn is_attached(&self) -> bool {
        false
    }
}
