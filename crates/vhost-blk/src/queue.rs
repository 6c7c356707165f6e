//! One virtqueue: its life from the front end's messages to running and back, and the heads that
//! the device has taken from it.
//!
//! A ring runs when it has a kick eventfd, is enabled and all of it is mapped. The used index is
//! read from memory once, when the ring starts; later address changes on a live ring move where
//! it is written, never its value.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use crate::DeviceConfig;
use crate::chain::Verdict;
use crate::control::{ControlError, Reply};
use crate::dirty::DirtyLog;
use crate::eventfd::signal_eventfd;
use crate::inflight::{InflightBuffer, InflightQueue};
use crate::memory::GuestMemory;
use crate::request::Chain;
use crate::ring::{Ring, RingAddresses};

/// Where a queue is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// Not started since it was last stopped.
    Stopped,
    /// Started, then disabled; its indices hold.
    Paused,
    /// Takes heads.
    Running,
    /// Takes heads up to `until`, then rests.
    Draining {
        /// The available index to stop at.
        until: u16,
    },
    /// The guest broke the rules of the ring: takes nothing until it is stopped.
    Broken,
}

/// How a drained queue rests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rest {
    Paused,
    Stopped,
}

/// What taking a head came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Take {
    Head(u16),
    Empty,
}

#[derive(Debug)]
pub(crate) struct Queue {
    pub(crate) index: u16,
    /// Entries, as the front end set it.
    pub(crate) size: u16,
    pub(crate) addresses: Option<RingAddresses>,
    /// The available index to start at.
    pub(crate) base: u16,
    pub(crate) enabled: bool,
    pub(crate) kick: Option<Arc<OwnedFd>>,
    call: Option<OwnedFd>,
    error: Option<OwnedFd>,
    pub(crate) state: State,
    /// The ring as last resolved. Kept for what is under way if it can no longer be.
    ring: Option<Ring>,
    /// The next available entry to take, and the next used entry to write.
    pub(crate) next_available: u16,
    used: u16,
    /// The used index when the guest's wish for interrupts was last looked at.
    signalled: u16,
    /// Signal whatever the guest's wish.
    signal: bool,
    /// By head.
    pub(crate) chains: Vec<Chain>,
    /// Heads taken and not returned.
    pub(crate) under_way: usize,
    /// Heads to send again, the first to go last.
    pub(crate) resubmit: Vec<(u64, u16)>,
    /// The head whose pieces are being submitted.
    pub(crate) emitting: Option<u16>,
    inflight: Option<InflightQueue>,
    counter: u64,
    /// It was paused before all that was available had been taken: its indices say so, but a front end
    /// that does not ask for them must not take it for drained.
    pub(crate) cut_short: bool,
    /// Who waits for this queue to be drained, and how it rests then.
    pub(crate) parked: Option<(Reply, Rest)>,
}

impl Queue {
    pub(crate) fn new(index: u16, size: u16) -> Self {
        Self {
            index,
            size,
            addresses: None,
            base: 0,
            enabled: false,
            kick: None,
            call: None,
            error: None,
            state: State::Stopped,
            ring: None,
            next_available: 0,
            used: 0,
            signalled: 0,
            signal: false,
            chains: Vec::new(),
            under_way: 0,
            resubmit: Vec::new(),
            emitting: None,
            inflight: None,
            counter: 0,
            cut_short: false,
            parked: None,
        }
    }

    /// True from the start of the ring until it rests with nothing under way.
    pub(crate) fn is_live(&self) -> bool {
        match self.state {
            State::Running | State::Draining { .. } => true,
            State::Stopped | State::Paused | State::Broken => self.under_way > 0,
        }
    }

    /// True if heads may be taken now.
    pub(crate) fn takes(&self) -> bool {
        match self.state {
            State::Running => true,
            State::Draining { until } => until != self.next_available,
            State::Stopped | State::Paused | State::Broken => false,
        }
    }

    /// Parses the chain at `head`, which was taken.
    pub(crate) fn parse(
        &mut self,
        head: u16,
        memory: &GuestMemory,
        indirect: bool,
        config: &DeviceConfig,
    ) -> Verdict {
        let ring = self.ring.as_ref().expect("a ring with heads under way is resolved");
        self.chains[usize::from(head)].body.parse(ring, memory, head, indirect, config)
    }

    /// Starts or resumes the ring if all it needs is there.
    pub(crate) fn try_start(
        &mut self,
        memory: &GuestMemory,
        inflight: Option<&Arc<InflightBuffer>>,
    ) {
        let fresh = match self.state {
            State::Stopped => true,
            State::Paused => false,
            State::Running | State::Draining { .. } | State::Broken => return,
        };
        let (true, Some(_), Some(addresses)) = (self.enabled, &self.kick, &self.addresses) else {
            return;
        };
        self.cut_short = false;
        if fresh {
            // Not mapped yet is no error: the memory table may follow.
            let Some(ring) = Ring::resolve(memory, self.size, addresses) else { return };
            self.start(ring, inflight);
        } else {
            self.state = State::Running;
        }
    }

    fn start(&mut self, ring: Ring, inflight: Option<&Arc<InflightBuffer>>) {
        debug_assert_eq!(self.under_way, 0, "a queue is drained before it starts again");
        self.used = ring.used_index();
        self.signalled = self.used;
        self.counter = 0;
        self.next_available = self.base;
        self.resubmit.clear();
        self.emitting = None;
        self.chains.resize_with(usize::from(self.size), Chain::default);
        self.inflight =
            inflight.and_then(|buffer| InflightQueue::new(buffer, self.index, self.size));
        if inflight.is_some() && self.inflight.is_none() {
            self.break_down("the in-flight buffer is for fewer queues or smaller ones");
            return;
        }
        if let Some(inflight) = self.inflight.as_ref().filter(|inflight| inflight.start(self.used))
        {
            let (heads, counter) = inflight.recover(self.used, self.size);
            self.counter = counter;
            let count = u16::try_from(heads.len()).expect("at most the queue's size");
            self.next_available = self.used.wrapping_add(count);
            // The one before us may have died between a used entry and its interrupt.
            self.signal = true;
            for (order, head) in heads.into_iter().enumerate() {
                let chain = &mut self.chains[usize::from(head)];
                chain.taken = true;
                chain.counter = order as u64;
                self.resubmit.push((order as u64, head));
            }
            self.resubmit.reverse();
            self.under_way = self.resubmit.len();
        }
        if self.under_way > 0 {
            tracing::info!(
                queue = self.index,
                requests = self.under_way,
                "sending again what the back end before this one left unanswered"
            );
        }
        self.ring = Some(ring);
        self.state = State::Running;
    }

    /// Tells the guest anew whether to kick, at the next opportunity: how it is told may change.
    pub(crate) fn forget_kicks(&mut self) {
        if let Some(ring) = &mut self.ring {
            ring.forget_kicks();
        }
    }

    /// Finds the ring in a new memory table, or at new addresses.
    pub(crate) fn refresh(&mut self, memory: &GuestMemory) {
        let active = match self.state {
            State::Stopped => false,
            State::Paused | State::Running | State::Draining { .. } | State::Broken => true,
        };
        let Some(addresses) = self.addresses.as_ref().filter(|_| active) else { return };
        match Ring::resolve(memory, self.size, addresses) {
            Some(ring) => self.ring = Some(ring),
            None => self.break_down("the live ring is no longer mapped"),
        }
    }

    /// Takes the next head off the available ring. `ask_for_kicks`: the guest shall kick if there
    /// is none.
    pub(crate) fn take(
        &mut self,
        ask_for_kicks: bool,
        event_index: bool,
        log: Option<&DirtyLog>,
    ) -> Take {
        let ring = self.ring.as_mut().expect("a ring that takes heads is resolved");
        let mut available = ring.available_index();
        if available == self.next_available {
            if ask_for_kicks {
                ring.enable_kicks(event_index, self.next_available, log);
                available = ring.available_index();
            } else {
                ring.disable_kicks(event_index, log);
            }
            if available == self.next_available {
                return Take::Empty;
            }
        }
        if available.wrapping_sub(self.next_available) > self.size {
            self.break_down("the available index is further ahead than the ring is long");
            return Take::Empty;
        }
        let head = ring.available_head(self.next_available);
        match self.chains.get_mut(usize::from(head)) {
            None => {
                self.break_down("an available entry names a descriptor that does not exist");
                return Take::Empty;
            }
            Some(chain) if chain.taken => {
                self.break_down("an available entry names a request that is under way");
                return Take::Empty;
            }
            Some(chain) => {
                chain.taken = true;
                chain.counter = self.counter;
            }
        }
        if let Some(inflight) = &self.inflight {
            inflight.set(head, self.counter);
        }
        self.counter = self.counter.wrapping_add(1);
        self.next_available = self.next_available.wrapping_add(1);
        self.under_way += 1;
        Take::Head(head)
    }

    /// Returns `head` to the guest: used entry, in-flight entry. Data and status are written.
    pub(crate) fn give_back(&mut self, head: u16, bytes: u32, log: Option<&DirtyLog>) {
        let ring = self.ring.as_ref().expect("a ring with heads under way is resolved");
        ring.write_used(self.used, head, bytes, log);
        if let Some(inflight) = &self.inflight {
            inflight.before_publication(head);
        }
        self.used = self.used.wrapping_add(1);
        ring.publish_used(self.used, log);
        if let Some(inflight) = &self.inflight {
            inflight.after_publication(head, self.used);
        }
        self.chains[usize::from(head)].release();
        self.under_way -= 1;
    }

    /// Stops taking heads until the front end stops the ring. The first reason is logged.
    pub(crate) fn break_down(&mut self, reason: &str) {
        if self.state == State::Broken {
            return;
        }
        tracing::warn!(queue = self.index, reason, "the guest's queue is broken; it is left alone");
        self.state = State::Broken;
        if let Some(fd) = &self.error
            && let Err(error) = signal_eventfd(fd.as_fd())
        {
            tracing::debug!(queue = self.index, %error, "cannot signal the error eventfd");
        }
    }

    /// Starts a drain that ends in `rest`: heads available now are still taken if `available`.
    pub(crate) fn drain(&mut self, available: bool, reply: Reply, rest: Rest) {
        self.parked = Some((reply, rest));
        match self.state {
            State::Running | State::Draining { .. } => {
                let until = self
                    .ring
                    .as_ref()
                    .filter(|_| available)
                    .map_or(self.next_available, Ring::available_index);
                self.state = State::Draining { until };
                if until.wrapping_sub(self.next_available) > self.size {
                    self.break_down("the available index is further ahead than the ring is long");
                }
            }
            State::Stopped | State::Paused | State::Broken => {}
        }
    }

    /// Nobody answers requests for now: a drain takes no more of what is available. True if that ends
    /// it.
    pub(crate) fn cut_drain(&mut self) -> bool {
        match self.state {
            State::Draining { until } if until != self.next_available && self.under_way == 0 => {
                self.state = State::Draining { until: self.next_available };
                self.cut_short = true;
                true
            }
            State::Stopped
            | State::Paused
            | State::Running
            | State::Draining { .. }
            | State::Broken => false,
        }
    }

    /// Nobody answers requests for now: a drain puts those that were taken back where they came from, the
    /// available ring, if they are the newest there, as those are that a head took and never decided.
    /// Else, with later ones answered already, no index says where the rings are to go on, and only the
    /// in-flight buffer knows of them. True if that ends the drain.
    pub(crate) fn untake(&mut self) -> bool {
        let State::Draining { until } = self.state else { return false };
        if self.under_way == 0
            || self.resubmit.len() != self.under_way
            || self.emitting.is_some()
            || until != self.next_available
            || usize::from(self.next_available.wrapping_sub(self.used)) != self.under_way
        {
            return false;
        }
        let ring = self.ring.as_ref().expect("a ring with heads under way is resolved");
        self.resubmit.sort_unstable();
        let mut slot = self.used;
        for (_, head) in &self.resubmit {
            if ring.available_head(slot) != *head {
                return false;
            }
            slot = slot.wrapping_add(1);
        }
        // The newest first: whoever recovers from the buffer, should we die here, takes what is left in
        // it for what follows the used index.
        while let Some((_, head)) = self.resubmit.pop() {
            if let Some(inflight) = &self.inflight {
                inflight.clear(head);
            }
            self.chains[usize::from(head)].release();
            self.under_way -= 1;
            self.next_available = self.next_available.wrapping_sub(1);
        }
        self.state = State::Draining { until: self.next_available };
        self.cut_short = true;
        true
    }

    /// Refuses whoever waits for a drain that nobody can complete: says how many requests are under way.
    pub(crate) fn refuse_drain(&mut self) {
        if let Some((reply, _)) = self.parked.take() {
            reply.send(Err(ControlError::NobodyAnswers {
                queue: self.index,
                requests: self.under_way,
            }));
        }
    }

    /// Ends a drain that is complete: answers who waits. True if the ring was stopped.
    pub(crate) fn settle(&mut self, event_index: bool) -> bool {
        if self.under_way > 0 || self.parked.is_none() || self.takes() {
            return false;
        }
        // The guest hears of everything before the front end does.
        self.notify(event_index);
        let (reply, rest) = self.parked.take().expect("checked above");
        let started = self.state != State::Stopped;
        match (rest, self.state) {
            (Rest::Stopped, _) => self.state = State::Stopped,
            (Rest::Paused, State::Draining { .. } | State::Running) => self.state = State::Paused,
            (Rest::Paused, State::Stopped | State::Paused | State::Broken) => {}
        }
        if rest == Rest::Stopped {
            if started {
                self.base = self.next_available;
            }
            self.ring = None;
            if let Some(inflight) = self.inflight.take() {
                inflight.stop();
            }
            self.kick = None;
        }
        reply.send(Ok(self.base));
        rest == Rest::Stopped
    }

    /// Signals the call eventfd if there are new used entries and the guest wants to know.
    pub(crate) fn notify(&mut self, event_index: bool) {
        let Some(ring) = &self.ring else { return };
        if self.used != self.signalled {
            if ring.wants_interrupt(event_index, self.signalled, self.used) {
                self.signal = true;
            }
            self.signalled = self.used;
        }
        // Without a call eventfd the wish is kept: one may be set later.
        if self.signal
            && let Some(call) = &self.call
        {
            self.signal = false;
            if let Err(error) = signal_eventfd(call.as_fd()) {
                tracing::debug!(queue = self.index, %error, "cannot signal the call eventfd");
            }
        }
    }

    pub(crate) fn set_call(&mut self, fd: Option<OwnedFd>) {
        self.call = fd;
    }

    pub(crate) fn set_error(&mut self, fd: Option<OwnedFd>) {
        self.error = fd;
    }

    /// Forgets the front end. Requests under way become orphans: their memory is let go, their
    /// heads stay in the in-flight buffer. Returns how many there are.
    pub(crate) fn detach(&mut self, size: u16) -> usize {
        let mut orphans = 0;
        for chain in self.chains.iter_mut().filter(|chain| chain.taken) {
            chain.memory = None;
            chain.fail(base::Status::IoError);
            if chain.has_pending() {
                orphans += 1;
            } else {
                chain.release();
            }
        }
        let chains = core::mem::take(&mut self.chains);
        let resubmit = core::mem::take(&mut self.resubmit);
        *self = Self { chains, resubmit, ..Self::new(self.index, size) };
        self.resubmit.clear();
        orphans
    }
}
