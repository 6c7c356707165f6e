//! The reactor: what it owns, its turn, its end.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::fmt;
use std::mem;
use std::time::Duration;

use base::time::earliest;
use base::{BufferPool, Instant};
use io_uring::{opcode, types};

use crate::clock::now;
use crate::completion::Completion;
use crate::config::Config;
use crate::connection::Connection;
use crate::device::{Device, FileTable};
use crate::error::{Error, ErrorKind, IoError};
use crate::handle::{ConnectionHandle, DeviceHandle, Key};
use crate::listener::{Listener, accept_entry};
use crate::mailbox::{Receiver, Sender, mailbox};
use crate::memory::Region;
use crate::operation::{Gather, Operation, Step, on, step_plain};
use crate::pacing::Pacing;
use crate::slab::Slab;
use crate::uring::{UNWATCHED, Uring, Wait};
use crate::wake::Wakeup;
use crate::watch::{Watch, poll_entry};

/// When to try again what the kernel refused for want of memory or descriptors.
pub(crate) const RETRY_AFTER: Duration = Duration::from_millis(100);

/// How long a reactor that is dropped waits for the kernel to give its buffers back.
const END_TIMEOUT: Duration = Duration::from_secs(10);

/// Looks at the ring between two looks at the clock while polling.
const POLLS_PER_CLOCK: u32 = 16;

/// Buffers of one kind, at most: far above any machine's memory, far below overflow.
const BUFFERS_MAX: usize = 1 << 32;

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

/// The reactor's own timers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Timer {
    /// Accept again on this listener.
    Accept(Key),
    /// Poll again on this watch.
    Poll(Key),
    /// Cancel this connect.
    Connect(Key),
}

/// One io_uring with its buffers, devices, sockets and eventfds. Belongs to the thread that made
/// it.
///
/// Dropping it cancels what is under way and waits for it, so that no buffer is freed while the
/// kernel may still use it. What the kernel does not give back within 10 s is leaked.
pub struct Reactor {
    pub(crate) uring: Uring,
    pub(crate) operations: Slab<Operation>,
    pub(crate) devices: Slab<Device>,
    pub(crate) connections: Slab<Connection>,
    pub(crate) listeners: Slab<Listener>,
    pub(crate) watches: Slab<Watch>,
    pub(crate) files: FileTable,
    pub(crate) completions: VecDeque<Completion>,
    /// Connections with something new in their send queues.
    pub(crate) senders: Vec<ConnectionHandle>,
    /// Storage for gathering writes that is not in use.
    #[expect(clippy::vec_box, reason = "operations hold them boxed: the kernel reads them")]
    pub(crate) gathers: Vec<Box<Gather>>,
    timers: BinaryHeap<Reverse<(Instant, Timer)>>,
    buffers: BufferPool,
    region: Region,
    wakeup: Wakeup,
    pacing: Pacing,
    now: Instant,
    /// The reactor is being dropped: nothing is started again.
    pub(crate) ending: bool,
}

impl Reactor {
    /// A reactor for the calling thread. Its buffers' memory is never given back to the system.
    pub fn new(config: &Config) -> Result<Self, Error> {
        if config.entries == 0 || !config.entries.is_power_of_two() {
            let entries = config.entries;
            return Err(Error::new(
                ErrorKind::InvalidConfig,
                format!("{entries} ring entries: not a power of two"),
            ));
        }
        if config.small_buffers.max(config.large_buffers) > BUFFERS_MAX {
            return Err(Error::new(ErrorKind::InvalidConfig, "too many buffers"));
        }
        let uring = Uring::new(config.entries)?;
        let files = FileTable::new(&uring)?;
        let (region, buffers) = Region::new(config, &uring)?;
        let operations = config.entries as usize * 4;
        let wakeup = Wakeup::new()?;
        let eventfd = wakeup.eventfd().try_clone_to_owned().map_err(|error| {
            Error::os(ErrorKind::FileDescriptors, "duplicating an eventfd", error)
        })?;
        let mut reactor = Self {
            uring,
            operations: Slab::with_capacity(operations),
            devices: Slab::with_capacity(8),
            connections: Slab::with_capacity(64),
            listeners: Slab::with_capacity(8),
            watches: Slab::with_capacity(64),
            files,
            completions: VecDeque::with_capacity(operations),
            senders: Vec::with_capacity(64),
            gathers: Vec::with_capacity(operations),
            timers: BinaryHeap::with_capacity(64),
            buffers,
            region,
            wakeup,
            pacing: Pacing::new(config.poll),
            now: now(),
            ending: false,
        };
        reactor.add_watch(eventfd, None);
        Ok(reactor)
    }

    /// The buffers, registered with the kernel.
    pub fn buffers(&self) -> &BufferPool {
        &self.buffers
    }

    /// The time, as read when the last turn ended: use it for everything that follows from one
    /// turn. [`now`](fn@crate::now) reads the clock.
    pub fn now(&self) -> Instant {
        self.now
    }

    /// Reads the clock and moves [`Reactor::now`] there.
    pub fn now_precise(&mut self) -> Instant {
        self.now = now();
        self.now
    }

    /// Wakes this reactor from other threads.
    pub fn wakeup(&self) -> Wakeup {
        self.wakeup.clone()
    }

    /// A mailbox into this thread that holds up to `capacity` messages (rounded up to a power of
    /// two).
    pub fn mailbox<T: Send>(&self, capacity: usize) -> (Sender<T>, Receiver<T>) {
        mailbox(capacity, self.wakeup())
    }

    /// Submits what is queued and reaps what has completed. If that is nothing and the owner is
    /// not `busy` (has no other work), polls for a while and then sleeps, until something
    /// completes, another thread wakes it, or `deadline` (`None`: no limit). It may return
    /// without any of these.
    ///
    /// An error means that the ring is broken: stop using the reactor.
    pub fn turn(&mut self, deadline: Option<Instant>, busy: bool) -> Result<Turn, Error> {
        let mut turn = Turn { woken: self.wakeup.flag().take(), ..Turn::default() };
        self.start_sends();
        if busy || turn.woken || !self.completions.is_empty() {
            self.uring.enter(Wait::No)?;
            self.reap();
            self.now = now();
        } else {
            self.wait(deadline, &mut turn)?;
        }
        self.fire_timers();
        turn.completions = self.completions.len();
        Ok(turn)
    }

    /// Waits: polls, then sleeps. Sets [`Reactor::now`].
    fn wait(&mut self, deadline: Option<Instant>, turn: &mut Turn) -> Result<(), Error> {
        let timer = self.timers.peek().map(|Reverse((at, _))| *at);
        let deadline = earliest(deadline, timer);
        let started = now();
        self.now = started;
        let poll = self.pacing.poll();
        let mut event = false;
        if poll > Duration::ZERO || deadline.is_some_and(|deadline| deadline <= started) {
            let until = started + poll;
            event = self.poll(deadline.map_or(until, |deadline| deadline.min(until)))?;
        }
        if !event && deadline.is_none_or(|deadline| self.now < deadline) {
            let sleep = match deadline {
                Some(deadline) => Wait::AtMost(deadline.since(self.now)),
                None => Wait::Forever,
            };
            let before = self.now;
            if self.wakeup.flag().prepare_sleep() {
                let entered = self.uring.enter(sleep);
                turn.woken |= self.wakeup.flag().take();
                entered?;
            } else {
                turn.woken |= self.wakeup.flag().take();
                self.uring.enter(Wait::No)?;
            }
            event = self.reap() > 0 || turn.woken;
            self.now = now();
            turn.slept = self.now.since(before);
        }
        self.pacing.waited(self.now.since(started), event);
        Ok(())
    }

    /// Submits, and polls until something completes or another thread wakes the reactor (true),
    /// or `until`. Sets [`Reactor::now`].
    fn poll(&mut self, until: Instant) -> Result<bool, Error> {
        self.uring.enter(Wait::No)?;
        loop {
            for _ in 0..POLLS_PER_CLOCK {
                if self.uring.is_ready() {
                    self.uring.enter(Wait::No)?;
                    if self.reap() > 0 {
                        self.now = now();
                        return Ok(true);
                    }
                }
                if self.wakeup.flag().is_notified() {
                    self.now = now();
                    return Ok(true);
                }
                std::hint::spin_loop();
            }
            self.now = now();
            if self.now >= until {
                return Ok(false);
            }
        }
    }

    /// The next completion, if there is one. What is left is kept for the next turn, which then
    /// does not sleep.
    pub fn next_completion(&mut self) -> Option<Completion> {
        self.completions.pop_front()
    }

    /// Handles what has completed; gives the number.
    fn reap(&mut self) -> usize {
        let mut count = 0;
        while let Some(reaped) = self.uring.reap() {
            count += 1;
            if reaped.user_data != UNWATCHED {
                self.complete(Key::from_user_data(reaped.user_data), reaped.result, reaped.more);
            }
        }
        count
    }

    /// Gives `operation` to the kernel, with the next submission.
    pub(crate) fn start(&mut self, operation: Operation) -> Key {
        let key = self.operations.insert(operation);
        self.issue(key);
        key
    }

    /// Queues the entry for (the rest of) an operation in the slab.
    pub(crate) fn issue(&mut self, key: Key) {
        let operation = self.operations.get_mut(key).expect("issued while in the slab");
        let entry = match operation {
            Operation::Read(read) => read.entry(&self.region),
            Operation::Write(write) => write.entry(&self.region),
            Operation::Sync { target, .. } => on!(*target, |file| {
                opcode::Fsync::new(file).flags(types::FsyncFlags::DATASYNC).build()
            }),
            Operation::Discard { target, offset, length, .. } => on!(*target, |file| {
                opcode::Fallocate::new(file, *length)
                    .offset(*offset)
                    .mode(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE)
                    .build()
            }),
            Operation::Accept { descriptor, .. } => accept_entry(*descriptor),
            Operation::Connect(connect) => connect.entry(),
            Operation::Receive(receive) => receive.entry(),
            Operation::Send { connection } => self
                .connections
                .get_mut(*connection)
                .expect("a connection outlives its operations")
                .send_entry(),
            Operation::Poll { descriptor, .. } => poll_entry(*descriptor),
        };
        // SAFETY: what the entry names (buffers, vectors, addresses, headers) is owned by the
        // operation or by its connection, on the heap or in the never-unmapped region, and is
        // neither moved, freed nor handed out before `complete` has seen the last completion;
        // if the reactor goes before that, it is leaked.
        unsafe { self.uring.push(entry.user_data(key.user_data())) };
    }

    /// Asks the kernel to end an operation. It completes all the same, one way or the other.
    pub(crate) fn cancel(&mut self, key: Key) {
        let entry = opcode::AsyncCancel::new(key.user_data()).build().user_data(UNWATCHED);
        // SAFETY: a cancellation names no memory.
        unsafe { self.uring.push(entry) };
    }

    fn complete(&mut self, key: Key, result: i32, more: bool) {
        let operation = self.operations.get_mut(key).expect("the kernel completes what it has");
        let step = match operation {
            Operation::Read(read) => read.step(result),
            Operation::Write(write) => write.step(result),
            Operation::Sync { retries, .. } | Operation::Discard { retries, .. } => {
                step_plain(result, retries)
            }
            Operation::Connect(_) => return self.connect_completed(key, result),
            Operation::Receive(_) => return self.receive_completed(key, result),
            Operation::Accept { listener, .. } => {
                let listener = *listener;
                return self.accept_completed(key, listener, result, more);
            }
            Operation::Send { connection } => {
                let connection = *connection;
                return self.send_completed(key, connection, result);
            }
            Operation::Poll { watch, .. } => {
                let watch = *watch;
                return self.poll_completed(key, watch, result, more);
            }
        };
        match step {
            Step::Again if self.ending => self.device_completed(key, Err(IoError::Cancelled)),
            Step::Again => self.issue(key),
            Step::Done(result) => self.device_completed(key, result),
        }
    }

    fn device_completed(&mut self, key: Key, result: Result<(), IoError>) {
        let (device, completion) = match self.operations.remove(key) {
            Some(Operation::Read(read)) => {
                (read.device, Completion::Read { token: read.token, buffer: read.buffer, result })
            }
            Some(Operation::Write(write)) => {
                self.recycle(write.gather);
                (write.device, Completion::Written { token: write.token, result })
            }
            Some(Operation::Sync { device, token, .. }) => {
                (device, Completion::Synced { token, result })
            }
            Some(Operation::Discard { device, token, .. }) => {
                (device, Completion::Discarded { token, result })
            }
            _ => unreachable!("the caller has seen a device operation"),
        };
        self.completions.push_back(completion);
        self.device_operation_ended(DeviceHandle(device));
    }

    /// True if no device, listener or watched eventfd of the owner's is open, nor still being
    /// closed: the kernel does nothing with them any more, and another process may go on.
    pub fn has_let_go(&self) -> bool {
        // One watch is the reactor's own.
        self.devices.len() == 0 && self.listeners.len() == 0 && self.watches.len() <= 1
    }

    pub(crate) fn set_timer(&mut self, after: Duration, timer: Timer) {
        self.timers.push(Reverse((now() + after, timer)));
    }

    fn fire_timers(&mut self) {
        while let Some(Reverse((at, timer))) = self.timers.peek().copied()
            && at <= self.now
        {
            self.timers.pop();
            match timer {
                Timer::Accept(listener) => self.start_accept(listener),
                Timer::Poll(watch) => self.start_poll(watch),
                Timer::Connect(key) => self.connect_expired(key),
            }
        }
    }

    /// Cancels everything and waits until the kernel has given it back; false if it did not in
    /// time.
    fn end(&mut self) -> bool {
        self.ending = true;
        let deadline = now() + END_TIMEOUT;
        let any = opcode::AsyncCancel2::new(types::CancelBuilder::any().all())
            .build()
            .user_data(UNWATCHED);
        // SAFETY: a cancellation names no memory.
        unsafe { self.uring.push(any) };
        while self.operations.len() > 0 {
            let left = deadline.since(now());
            if left.is_zero() || self.uring.enter(Wait::AtMost(left)).is_err() {
                return false;
            }
            self.reap();
            self.completions.clear();
        }
        true
    }
}

impl Drop for Reactor {
    fn drop(&mut self) {
        if self.end() {
            // Now, not when the kernel gets round to taking the ring apart. What fails here
            // (nothing was registered) is left to that.
            self.unlock_devices();
            let _ = self.uring.submitter().unregister_files();
            let _ = self.uring.submitter().unregister_buffers();
            return;
        }
        // The kernel may still write to what these own: it must never be used again.
        mem::forget(mem::replace(&mut self.operations, Slab::with_capacity(0)));
        mem::forget(mem::replace(&mut self.connections, Slab::with_capacity(0)));
    }
}

impl fmt::Debug for Reactor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reactor")
            .field("operations", &self.operations.len())
            .field("connections", &self.connections.len())
            .field("buffers", &self.buffers)
            .finish_non_exhaustive()
    }
}
