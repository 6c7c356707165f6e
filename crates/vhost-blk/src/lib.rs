//! vhost-user-blk devices: sessions, guest memory, queues, in-flight buffer, dirty log (L2).
//!
//! Two halves, joined by the shell:
//!
//! * [`Listener`] owns a Unix socket and one control thread. The thread speaks the vhost-user
//!   protocol, maps the guest's memory, and turns what concerns the data path into [`Control`]
//!   messages, which it hands to the shell's [`ControlSink`] and whose answers it waits for.
//! * [`Device`] is plain data owned by a reactor thread. It takes the [`Control`] messages, reads
//!   the rings, emits [`base::BlockRequest`]s and answers the guest when their replies come. It
//!   makes no system call except to signal a call eventfd, and allocates nothing per I/O.
//!
//! The shell's duties, in one turn of its reactor:
//!
//! 1. [`Device::control`] for each message that its sink delivered;
//! 2. [`Device::kicked`] for each kick eventfd that it read, [`Device::complete`] for each reply;
//! 3. [`Device::poll`] until it returns false or its budget is spent;
//! 4. [`Device::poll_event`] until it returns `None`;
//! 5. [`Device::flush_notifications`].

mod capacity;
mod chain;
mod config;
mod control;
mod device;
mod dirty;
mod eventfd;
mod fault;
pub mod handover;
mod inflight;
mod listener;
mod memory;
mod peek;
mod queue;
mod record;
mod request;
mod ring;
mod session;

pub use capacity::Capacity;
pub use config::{
    CONFIG_BYTES, ConfigError, DeviceConfig, QUEUE_SIZE_MAX, QUEUES_MAX, SECTOR_BYTES, SERIAL_BYTES,
};
pub use control::{Control, ControlSink, SinkClosed};
pub use device::{Device, Event};
pub use eventfd::read_eventfd;
pub use listener::{Listener, ListenerError};

#[cfg(feature = "fuzzing")]
pub mod fuzzing;
#[cfg(any(test, feature = "fuzzing"))]
#[cfg_attr(feature = "fuzzing", allow(dead_code, reason = "fuzzers use a part of it"))]
#[allow(clippy::unwrap_used, reason = "as in tests")]
mod testing;
#[cfg(test)]
mod tests;

#[cfg(any(test, feature = "fuzzing"))]
use testing::crash_point;

/// Where tests let the process "die": before and after each store whose order matters.
#[cfg(not(any(test, feature = "fuzzing")))]
#[inline(always)]
fn crash_point() {}
