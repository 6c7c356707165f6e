//! The data half: rings in, block requests out, replies in, used entries out.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use base::{BlockReply, BlockRequest, BufferPool, Status};

use crate::chain::{Verdict, status_byte};
use crate::config::{F_EVENT_IDX, F_FLUSH, F_INDIRECT_DESC, F_LOG_ALL, F_PROTOCOL_FEATURES};
use crate::control::{ControlError, Reply, Request};
use crate::dirty::DirtyLog;
use crate::fault;
use crate::inflight::InflightBuffer;
use crate::memory::GuestMemory;
use crate::queue::{Queue, Rest, State, Take};
use crate::request::{Emit, PieceId};
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
    /// A front end has connected, or the one that was is gone. Its guest may be about to come from elsewhere.
    FrontEnd {
        /// It has connected.
        connected: bool,
    },
    /// A ring runs, and none ran before: the guest wants I/O (a destination of a live migration
    /// takes the lease now).
    Started,
    /// No ring runs any more and nothing is under way: drained (the source of a live migration
    /// may mark its lease yieldable).
    Stopped {
        /// The front end stopped or disabled its rings. Not so if it is gone without a word: its
        /// guest was killed, or will be back and send its requests again.
        by_front_end: bool,
    },
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
    queues: Vec<Queue>,
    events: VecDeque<Event>,
    attached: bool,
    features: u64,
    memory: Arc<GuestMemory>,
    inflight: Option<Arc<InflightBuffer>>,
    log: Option<Arc<DirtyLog>>,
    /// The log while LOG_ALL is on.
    log_in_use: Option<Arc<DirtyLog>>,
    /// A ring may be able to start.
    starts_wanted: bool,
    polling: bool,
    /// The queue to look at next.
    next_queue: usize,
    /// Requests of lost connections that have replies outstanding. Rings of a new connection
    /// wait for them: what they were doing must not land after newer requests.
    orphans: usize,
    /// A request was superseded: nothing is submitted until `resume`.
    held: bool,
    /// Take nothing new; answered when nothing is under way.
    quiescing: bool,
    quiesce: Option<Reply>,
    /// As last told with `Event::Started` and `Event::Stopped`.
    live: bool,
    /// Mappings that were lost in this process when we last looked at ours.
    lost_seen: u64,
    /// The rings that ran last were left by their front end, not stopped.
    left: bool,
    /// There is no head, as far as is known.
    headless: bool,
}

/// What one step of a queue came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Progress,
    Idle,
    NoBuffer,
}

impl Device {
    /// A device without a front end. Its read and write data goes through `buffers`.
    ///
    /// # Panics
    /// If [`DeviceConfig::check`] finds fault with `config`.
    pub fn new(config: DeviceConfig, buffers: BufferPool) -> Self {
        config.check().expect("the caller has checked the configuration");
        let size = config.queue_size_max;
        Self {
            queues: (0..config.queues).map(|index| Queue::new(index, size)).collect(),
            config,
            buffers,
            events: VecDeque::new(),
            attached: false,
            features: 0,
            memory: Arc::default(),
            inflight: None,
            log: None,
            log_in_use: None,
            starts_wanted: false,
            polling: false,
            next_queue: 0,
            orphans: 0,
            held: false,
            quiescing: false,
            quiesce: None,
            live: false,
            lost_seen: fault::lost(),
            left: false,
            headless: false,
        }
    }

    /// The configuration.
    pub fn config(&self) -> &DeviceConfig {
        &self.config
    }

    /// Takes a message of the control thread, and answers it now or, if it asks for a drain, when
    /// nothing is under way any more. Call [`Device::poll`] afterwards: a ring may have started.
    pub fn control(&mut self, message: Control) {
        let Control { request, reply } = message;
        match request {
            Request::Connected => {
                self.detach();
                self.attached = true;
                self.events.push_back(Event::FrontEnd { connected: true });
                reply.send(Ok(0));
            }
            Request::Disconnected => {
                self.detach();
                self.events.push_back(Event::FrontEnd { connected: false });
                reply.send(Ok(0));
            }
            Request::Drained => {
                let cut = self.queues.iter().find(|queue| queue.cut_short);
                let undrained = |queue: &Queue| ControlError::Undrained { queue: queue.index };
                reply.send(cut.map_or(Ok(0), |queue| Err(undrained(queue))));
            }
            Request::Quiesce => {
                self.quiescing = true;
                self.quiesce = Some(reply);
            }
            Request::Features(features) => reply.send(self.set_features(features).map(|()| 0)),
            Request::Memory(memory) => {
                self.memory = memory;
                for queue in &mut self.queues {
                    queue.refresh(&self.memory);
                }
                reply.send(Ok(0));
            }
            Request::Log(log) => {
                self.log = Some(log);
                self.choose_log();
                reply.send(Ok(0));
            }
            Request::Inflight(buffer) => {
                self.inflight = Some(buffer);
                reply.send(Ok(0));
            }
            Request::RingStop { queue } => self.drain(queue, reply, false, Rest::Stopped),
            Request::Hopeless { queue } => {
                if self.headless
                    && let Some(queue) = self.queues.get_mut(usize::from(queue))
                {
                    queue.refuse_drain();
                }
                reply.send(Ok(0));
            }
            Request::RingEnable { queue, enable: false } => {
                if let Some(queue) = self.queues.get_mut(usize::from(queue)) {
                    queue.enabled = false;
                }
                self.drain(queue, reply, true, Rest::Paused);
            }
            other => {
                let answer = self.set_up_ring(other);
                reply.send(answer.map(|()| 0));
            }
        }
        self.starts_wanted = true;
        self.settle();
    }

    /// The next thing that the shell must do or know.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// The shell read the kick eventfd of `queue`. Call [`Device::poll`] afterwards.
    pub fn kicked(&mut self, queue: u16) {
        // Every poll looks at every running ring, so a kick is no more than a reason to poll; one
        // that came while the ring was stopped is as good as the next.
        let _ = queue;
    }

    /// Takes requests from the rings, all queues in turn, and submits at most `budget` block
    /// requests. True if work may remain: call again in the next turn, or, when buffers ran out,
    /// after replies came in.
    pub fn poll(&mut self, budget: usize, submit: &mut impl FnMut(BlockRequest)) -> bool {
        self.headless = false;
        if fault::lost() != self.lost_seen {
            self.look_for_lost_memory();
        }
        if self.starts_wanted {
            self.start_rings();
        }
        if self.held || self.lacks_log() {
            return false;
        }
        let count = self.queues.len();
        let mut left = budget;
        let mut idle = 0;
        let mut no_buffer = false;
        while idle < count && left > 0 {
            let index = self.next_queue;
            self.next_queue = if index + 1 == count { 0 } else { index + 1 };
            match self.step(index, &mut left, submit) {
                Step::Progress => idle = 0,
                Step::Idle => idle += 1,
                Step::NoBuffer => {
                    no_buffer = true;
                    idle += 1;
                }
            }
        }
        self.settle();
        left == 0 || no_buffer
    }

    /// Takes a reply. Replies may come in any order. Call [`Device::poll`] afterwards if the last
    /// one returned true, or if the front end changed: buffers are free again, and rings may have
    /// waited for the requests of a lost connection.
    pub fn complete(&mut self, reply: BlockReply) {
        let id = PieceId::decode(reply.id);
        let chain = self
            .queues
            .get_mut(usize::from(id.queue))
            .and_then(|queue| queue.chains.get_mut(usize::from(id.head)))
            .filter(|chain| chain.expects(id));
        let Some(chain) = chain else {
            tracing::error!(?id, "a reply to a request that is not under way was ignored");
            return;
        };
        chain.reply(id, reply, &self.config, self.log_in_use.as_deref());
        let orphan = chain.memory.is_none();
        let done = chain.is_done();
        if orphan {
            if done {
                chain.release();
                self.orphans -= 1;
                self.starts_wanted = true;
                self.settle();
            }
            return;
        }
        let queue = &mut self.queues[usize::from(id.queue)];
        if queue.emitting == Some(id.head) && queue.chains[usize::from(id.head)].is_emitted() {
            // It failed before its last piece was submitted.
            queue.emitting = None;
        }
        if done {
            self.finish(usize::from(id.queue), id.head);
            self.settle();
        }
    }

    /// Signals the call eventfds of the queues that got used entries since the last time and
    /// whose guest wants to know. Once per turn, after everything else.
    pub fn flush_notifications(&mut self) {
        let event_index = self.features & F_EVENT_IDX != 0;
        for queue in &mut self.queues {
            queue.notify(event_index);
        }
    }

    /// While on, guests are told not to kick, since the reactor polls. After switching off, call
    /// [`Device::poll`]: a request may have come without a kick.
    pub fn set_polling(&mut self, on: bool) {
        self.polling = on;
    }

    /// No head of the volume is there to answer requests, and nobody knows when one will be. A front end
    /// that disables or stops its rings is not kept waiting for what they still hold, nor for what was
    /// taken and never decided: it stays there, or is put back, and is taken when the rings go on, here or
    /// where they are moved to. Call it instead of [`Device::poll`]; true if there are events.
    pub fn without_head(&mut self) -> bool {
        self.headless = true;
        if self.starts_wanted {
            self.start_rings();
        }
        let mut cut = false;
        for queue in &mut self.queues {
            cut |= queue.cut_drain() || queue.untake();
        }
        if cut {
            self.settle();
        }
        !self.events.is_empty()
    }

    /// Sends what [`Event::Superseded`] held back again, and goes on with the rings, at the next
    /// [`Device::poll`].
    pub fn resume(&mut self) {
        self.held = false;
        for queue in &mut self.queues {
            // The first to have been taken goes first, and that is the last in the list.
            queue.resubmit.sort_unstable_by(|a, b| b.cmp(a));
        }
    }

    /// Takes no new requests from the rings any more: the connection is about to be handed over.
    /// What was taken goes on; see [`Device::is_quiet`]. There is no way back but a new device.
    pub fn hold(&mut self) {
        self.quiescing = true;
    }

    /// The disk has `blocks` blocks from now on, if that is more than before; a front end that listens
    /// is told.
    pub fn resize(&mut self, blocks: u64) {
        if blocks > self.config.blocks {
            self.config.blocks = blocks;
            self.config.capacity.grow(blocks);
        }
    }

    /// Guest requests under way, those of lost connections included.
    pub fn busy(&self) -> usize {
        self.orphans + self.queues.iter().map(|queue| queue.under_way).sum::<usize>()
    }

    /// True while a front end is connected.
    pub fn is_attached(&self) -> bool {
        self.attached
    }

    /// True if nothing is under way but what was superseded, which stays in the in-flight buffer.
    pub fn is_quiet(&self) -> bool {
        let held = |queue: &Queue| if self.held { queue.resubmit.len() } else { 0 };
        self.orphans == 0 && self.queues.iter().all(|queue| queue.under_way == held(queue))
    }

    fn event_index(&self) -> bool {
        self.features & F_EVENT_IDX != 0
    }

    fn set_features(&mut self, features: u64) -> Result<(), ControlError> {
        let unknown = features & !self.config.features();
        if unknown != 0 {
            return Err(ControlError::Features { unknown });
        }
        self.features = features;
        for queue in &mut self.queues {
            queue.forget_kicks();
        }
        if features & F_PROTOCOL_FEATURES == 0 {
            // Without the feature there is no message to enable rings: they start enabled.
            for queue in &mut self.queues {
                queue.enabled = true;
            }
        }
        self.choose_log();
        Ok(())
    }

    fn choose_log(&mut self) {
        let on = self.features & F_LOG_ALL != 0;
        self.log_in_use = self.log.clone().filter(|_| on);
        if self.lacks_log() {
            tracing::info!("the rings wait for the dirty log that the front end has announced");
        }
    }

    /// True while pages should be logged and there is no log: nothing may be written then.
    fn lacks_log(&self) -> bool {
        self.features & F_LOG_ALL != 0 && self.log.is_none()
    }

    fn set_up_ring(&mut self, request: Request) -> Result<(), ControlError> {
        match request {
            Request::RingSize { queue, size } => {
                let max = self.config.queue_size_max;
                let queue = self.queue_at_rest(queue)?;
                if size == 0 || size > max || !size.is_power_of_two() {
                    return Err(ControlError::RingSize { queue: queue.index, size, max });
                }
                queue.size = size;
            }
            Request::RingAddresses { queue, addresses } => {
                let index = self.queue_index(queue)?;
                let queue = &mut self.queues[index];
                queue.addresses = Some(addresses);
                queue.refresh(&self.memory);
            }
            Request::RingBase { queue, base } => self.queue_at_rest(queue)?.base = base,
            Request::RingEnable { queue, enable } => {
                let index = self.queue_index(queue)?;
                self.queues[index].enabled = enable;
            }
            Request::Kick { queue, fd } => {
                let index = self.queue_index(queue)?;
                self.queues[index].kick = Some(Arc::clone(&fd));
                self.events.push_back(Event::WatchKick { queue, fd });
            }
            Request::Call { queue, fd } => {
                let index = self.queue_index(queue)?;
                self.queues[index].set_call(fd);
            }
            Request::Error { queue, fd } => {
                let index = self.queue_index(queue)?;
                self.queues[index].set_error(fd);
            }
            Request::Connected
            | Request::Disconnected
            | Request::Quiesce
            | Request::Drained
            | Request::Features(_)
            | Request::Memory(_)
            | Request::Log(_)
            | Request::Inflight(_)
            | Request::Hopeless { .. }
            | Request::RingStop { .. } => unreachable!("`control` handles these itself"),
        }
        Ok(())
    }

    fn queue_index(&self, queue: u16) -> Result<usize, ControlError> {
        let queues = self.config.queues;
        if queue < queues { Ok(queue.into()) } else { Err(ControlError::NoQueue { queue, queues }) }
    }

    fn queue_at_rest(&mut self, queue: u16) -> Result<&mut Queue, ControlError> {
        let index = self.queue_index(queue)?;
        match self.queues[index].state {
            State::Stopped => Ok(&mut self.queues[index]),
            State::Paused | State::Running | State::Draining { .. } | State::Broken => {
                Err(ControlError::Running { queue })
            }
        }
    }

    fn drain(&mut self, queue: u16, reply: Reply, available: bool, rest: Rest) {
        match self.queue_index(queue) {
            Ok(index) => self.queues[index].drain(available, reply, rest),
            Err(error) => reply.send(Err(error)),
        }
    }

    /// Lets go of the front end: its rings, memory and eventfds. Requests under way go on without
    /// it; their replies change nothing any more.
    fn detach(&mut self) {
        let mut orphans = 0;
        for queue in &mut self.queues {
            if queue.kick.is_some() {
                self.events.push_back(Event::UnwatchKick { queue: queue.index });
            }
            orphans += queue.detach(self.config.queue_size_max);
        }
        self.left |= self.live;
        self.orphans = orphans;
        self.attached = false;
        self.features = 0;
        self.memory = Arc::default();
        self.inflight = None;
        self.log = None;
        self.log_in_use = None;
        self.quiescing = false;
        self.quiesce = None;
    }

    fn start_rings(&mut self) {
        self.starts_wanted = false;
        if !self.attached || self.orphans > 0 || self.has_lost_memory() {
            return;
        }
        for queue in &mut self.queues {
            queue.try_start(&self.memory, self.inflight.as_ref());
        }
        self.tell_life();
    }

    /// Ends the queues if the front end took away what they work with. Its other memory, and other
    /// front ends, are not concerned.
    fn look_for_lost_memory(&mut self) {
        self.lost_seen = fault::lost();
        if self.has_lost_memory() {
            for queue in self.queues.iter_mut().filter(|queue| queue.state != State::Stopped) {
                queue.break_down("the front end has shrunk the files of its memory");
            }
        }
    }

    fn has_lost_memory(&self) -> bool {
        self.memory.is_lost()
            || self.inflight.as_deref().is_some_and(InflightBuffer::is_lost)
            || self.log.as_deref().is_some_and(DirtyLog::is_lost)
    }

    /// One step of one queue: a piece of the request being submitted, or a new request.
    fn step(
        &mut self,
        index: usize,
        left: &mut usize,
        submit: &mut impl FnMut(BlockRequest),
    ) -> Step {
        let ask_for_kicks = !self.polling;
        let event_index = self.event_index();
        let queue = &mut self.queues[index];
        if queue.emitting.is_none() {
            let head = if let Some((_, head)) = queue.resubmit.pop() {
                head
            } else if queue.takes() && !self.quiescing {
                match queue.take(ask_for_kicks, event_index, self.log_in_use.as_deref()) {
                    Take::Head(head) => head,
                    Take::Empty => return Step::Idle,
                }
            } else {
                return Step::Idle;
            };
            self.begin(index, head);
            if self.queues[index].emitting.is_none() {
                // Answered on the spot. It counts, or a guest could keep us here for ever.
                *left -= 1;
                return Step::Progress;
            }
        }
        self.emit(index, left, submit)
    }

    /// Parses the chain at `head`; answers it, or makes it the one being submitted.
    fn begin(&mut self, index: usize, head: u16) {
        let indirect = self.features & F_INDIRECT_DESC != 0;
        let queue = &mut self.queues[index];
        let verdict = queue.parse(head, &self.memory, indirect, &self.config);
        let chain = &mut queue.chains[usize::from(head)];
        chain.memory = Some(Arc::clone(&self.memory));
        match verdict {
            Verdict::Run(kind) => {
                chain.start(kind);
                queue.emitting = Some(head);
            }
            Verdict::Id => {
                let serial = &self.config.serial;
                let room = usize::try_from(chain.body.data_bytes()).unwrap_or(serial.len());
                let serial = &serial[..serial.len().min(room)];
                let log = self.log_in_use.as_deref();
                let written = chain.body.write_data(&self.memory, 0, serial, log);
                let status = if written { Status::Ok } else { Status::IoError };
                self.answer(index, head, status);
            }
            Verdict::Reject(status) => self.answer(index, head, status),
        }
    }

    fn emit(
        &mut self,
        index: usize,
        left: &mut usize,
        submit: &mut impl FnMut(BlockRequest),
    ) -> Step {
        // A guest that did not take FLUSH relies on every write being on media when answered.
        let fua = self.features & F_FLUSH == 0;
        let queue = &mut self.queues[index];
        let Some(head) = queue.emitting else { return Step::Progress };
        let chain = &mut queue.chains[usize::from(head)];
        let step = match chain.emit(queue.index, head, fua, &self.config, &self.buffers) {
            Emit::Piece(request) => {
                *left -= 1;
                submit(request);
                Step::Progress
            }
            Emit::NoBuffer => Step::NoBuffer,
            Emit::Failed => Step::Progress,
        };
        if chain.is_emitted() {
            queue.emitting = None;
            if chain.is_done() {
                self.finish(index, head);
            }
        }
        step
    }

    /// All pieces of a request are answered: answers the guest, or keeps the request.
    fn finish(&mut self, index: usize, head: u16) {
        let queue = &mut self.queues[index];
        let chain = &mut queue.chains[usize::from(head)];
        let status = chain.status();
        if status_byte(status).is_some() {
            self.answer(index, head, status);
            return;
        }
        // Nothing was decided about it: it stays taken, and is sent again after `resume`.
        queue.resubmit.push((chain.counter, head));
        if !self.held {
            self.held = true;
            self.events.push_back(Event::Superseded);
        }
    }

    /// Writes the status byte and returns the head to the guest.
    fn answer(&mut self, index: usize, head: u16, status: Status) {
        let log = self.log_in_use.as_deref();
        let queue = &mut self.queues[index];
        let chain = &queue.chains[usize::from(head)];
        let byte = status_byte(status).expect("only decided requests are answered");
        let bytes = match (chain.body.status_gpa, chain.memory.as_deref()) {
            (Some(gpa), Some(memory)) if memory.write(gpa, &[byte], log) => {
                if status == Status::Ok { chain.body.writable_bytes } else { 1 }
            }
            _ => 0,
        };
        queue.give_back(head, bytes, log);
    }

    /// Answers drains that are complete, and tells the shell what changed.
    fn settle(&mut self) {
        let event_index = self.event_index();
        for queue in &mut self.queues {
            if queue.parked.is_some() {
                let watched = queue.kick.is_some();
                if queue.settle(event_index) && watched {
                    self.events.push_back(Event::UnwatchKick { queue: queue.index });
                }
            }
        }
        if self.quiesce.is_some() && self.is_quiet() {
            self.flush_notifications();
            if let Some(reply) = self.quiesce.take() {
                reply.send(Ok(0));
            }
        }
        self.tell_life();
    }

    fn tell_life(&mut self) {
        let live = self.orphans > 0 || self.queues.iter().any(Queue::is_live);
        if live != self.live {
            self.live = live;
            if live {
                self.config.capacity.tell();
            }
            let by_front_end = !core::mem::take(&mut self.left);
            self.events.push_back(if live {
                Event::Started
            } else {
                Event::Stopped { by_front_end }
            });
        }
    }
}
