//! Waking a reactor from another thread.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::event::EventfdFlags;

use crate::error::{Error, ErrorKind};
use crate::flag::Flag;

struct Shared {
    flag: Flag,
    /// Non-blocking; the reactor watches it.
    eventfd: OwnedFd,
}

/// Wakes a reactor from any thread: its [`turn`](crate::Reactor::turn) returns, now or the next
/// time it is called. Cheap (one atomic operation) unless the reactor sleeps.
#[derive(Clone)]
pub struct Wakeup {
    shared: Arc<Shared>,
}

impl Wakeup {
    pub(crate) fn new() -> Result<Self, Error> {
        let eventfd = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|error| Error::os(ErrorKind::FileDescriptors, "eventfd", error.into()))?;
        Ok(Self { shared: Arc::new(Shared { flag: Flag::new(), eventfd }) })
    }

    /// Makes the reactor's current turn, or else its next one, return without sleeping.
    pub fn wake(&self) {
        if self.shared.flag.notify() {
            // It fails only if the counter is full (EAGAIN): then the eventfd is signalled.
            let _ = rustix::io::write(&self.shared.eventfd, &1_u64.to_ne_bytes());
        }
    }

    pub(crate) fn flag(&self) -> &Flag {
        &self.shared.flag
    }

    pub(crate) fn eventfd(&self) -> BorrowedFd<'_> {
        self.shared.eventfd.as_fd()
    }
}

impl fmt::Debug for Wakeup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Wakeup")
    }
}
