//! The reactor: one io_uring, its buffers, devices, sockets, eventfds and mailboxes on one thread.
//!
//! Layer 2. There are no futures and no callbacks: the owner of a [`Reactor`] starts operations,
//! calls [`Reactor::turn`], and takes the [`Completion`]s out. A loop looks like this:
//!
//! ```no_run
//! # use ring::{Config, Reactor, Completion};
//! # fn handle(_: Completion) {}
//! # fn main() -> Result<(), ring::Error> {
//! let mut reactor = Reactor::new(&Config::default())?;
//! let (sender, mut mail) = reactor.mailbox::<u32>(64);
//! let mut deadline = None; // the earliest of the machines' deadlines
//! # let stop = true;
//! loop {
//!     reactor.turn(deadline, false)?; // submits, reaps, polls a while, sleeps
//!     let now = reactor.now();
//!     while let Some(completion) = reactor.next_completion() {
//!         handle(completion); // feed the machines, which start further operations
//!     }
//!     while let Some(message) = mail.receive() {
//!         // ...
//!     }
//! #   if stop { return Ok(()); }
//! }
//! # }
//! ```
//!
//! An operation owns its buffers until the kernel has given it back, also when it is cancelled,
//! when its connection is closed and when the reactor is dropped. In steady state nothing here
//! allocates: operations live in a slab whose slots keep their storage.
//!
//! Linux 6.1 or later on a 64-bit machine.

#![cfg_attr(
    test,
    allow(clippy::duplicate_mod, reason = "model.rs puts other primitives under the same source")
)]

mod clock;
mod completion;
mod config;
mod connection;
mod device;
mod error;
mod flag;
mod handle;
mod listener;
mod mailbox;
mod memory;
#[cfg(test)]
mod model;
mod operation;
mod pacing;
mod queue;
mod reactor;
mod slab;
mod sync;
mod uring;
mod wake;
mod watch;

pub use clock::now;
pub use completion::Completion;
pub use config::{Config, DeviceInfo, DeviceOptions, SocketAddress, SocketOptions};
pub use error::{Error, ErrorKind, IoError, SendError};
pub use handle::{ConnectionHandle, DeviceHandle, ListenerHandle, Token, WatchHandle};
pub use mailbox::{Receiver, Sender, TrySendError};
pub use reactor::{Reactor, Turn};
pub use wake::Wakeup;

/// The most parts that one device write gathers (the kernel's `IOV_MAX`).
pub const WRITE_PARTS_MAX: usize = 1024;

/// The most parts that wait in one connection's send queue, together with those being sent.
pub const SEND_PARTS_MAX: usize = 4096;

/// The most bytes that [`Reactor::send_bytes`] takes: any header of the wire protocol.
pub const INLINE_BYTES_MAX: usize = 136;
