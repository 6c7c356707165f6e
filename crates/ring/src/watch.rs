//! Watched eventfds.

use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use io_uring::squeue::Entry;
use io_uring::{opcode, types};
use rustix::io::ReadWriteFlags;

use crate::completion::Completion;
use crate::error::{Error, ErrorKind};
use crate::handle::{Key, Token, WatchHandle};
use crate::operation::Operation;
use crate::reactor::{RETRY_AFTER, Reactor, Timer};

pub(crate) struct Watch {
    eventfd: OwnedFd,
    /// `None`: the reactor's own, by which it is woken.
    token: Option<Token>,
    poll: Option<Key>,
    closing: bool,
}

/// Polled, not read: a read of an eventfd that some other process has made non-blocking would
/// come back at once, and it is not ours to change.
pub(crate) fn poll_entry(descriptor: RawFd) -> Entry {
    let events = u32::from(libc::POLLIN.cast_unsigned());
    opcode::PollAdd::new(types::Fd(descriptor), events).multi(true).build()
}

/// Takes the counter; false if it was zero. Never blocks.
fn take_counter(eventfd: &OwnedFd) -> bool {
    let mut counter = [0; 8];
    let mut slices = [IoSliceMut::new(&mut counter)];
    // An offset of -1 is the file's own: eventfds have none.
    rustix::io::preadv2(eventfd, &mut slices, u64::MAX, ReadWriteFlags::NOWAIT) == Ok(8)
}

fn is_eventfd(descriptor: RawFd) -> bool {
    // Without /proc there is no telling; a wrong descriptor is then merely never ready.
    std::fs::read_link(format!("/proc/self/fd/{descriptor}"))
        .map_or(true, |name| name.as_os_str() == "anon_inode:[eventfd]")
}

impl Reactor {
    /// Watches an eventfd (blocking or not, never changed): [`Completion::EventFd`] each time it
    /// was signalled, its counter taken.
    pub fn watch_eventfd(&mut self, eventfd: OwnedFd, token: Token) -> Result<WatchHandle, Error> {
        if !is_eventfd(eventfd.as_raw_fd()) {
            return Err(Error::new(ErrorKind::NotAnEventFd, "watching a descriptor"));
        }
        Ok(self.add_watch(eventfd, Some(token)))
    }

    pub(crate) fn add_watch(&mut self, eventfd: OwnedFd, token: Option<Token>) -> WatchHandle {
        let key = self.watches.insert(Watch { eventfd, token, poll: None, closing: false });
        self.start_poll(key);
        WatchHandle(key)
    }

    /// Polls from now on, if the watch is open and does not already.
    pub(crate) fn start_poll(&mut self, watch: Key) {
        if let Some(entry) = self.watches.get(watch)
            && entry.poll.is_none()
        {
            let descriptor = entry.eventfd.as_raw_fd();
            let key = self.start(Operation::Poll { watch, descriptor });
            self.watches.get_mut(watch).expect("it was there just now").poll = Some(key);
        }
    }

    pub(crate) fn poll_completed(&mut self, key: Key, watch: Key, result: i32, more: bool) {
        let entry = self.watches.get_mut(watch).expect("a watch outlives its operation");
        let closing = entry.closing || self.ending;
        if !closing
            && result >= 0
            && take_counter(&entry.eventfd)
            && let Some(token) = entry.token
        {
            self.completions.push_back(Completion::EventFd { token });
        }
        if more {
            return;
        }
        self.operations.remove(key);
        entry.poll = None;
        if closing {
            self.watches.remove(watch);
        } else if result >= 0 {
            self.start_poll(watch);
        } else {
            self.set_timer(RETRY_AFTER, Timer::Poll(watch)); // out of memory
        }
    }

    /// Stops watching. No `EventFd` of this watch comes after those already completed; the
    /// counter keeps what is signalled from now on.
    pub fn unwatch(&mut self, watch: WatchHandle) {
        let Some(entry) = self.watches.get_mut(watch.0) else { return };
        if entry.closing {
            return;
        }
        entry.closing = true;
        match entry.poll {
            Some(key) => self.cancel(key),
            None => {
                self.watches.remove(watch.0);
            }
        }
    }
}
