//! A small world: model members, delays, faults, heads one after another, one client. Everything follows
//! from a seed.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};

use base::{
    BlockReply, BlockRequest, BufferPool, CommandBody, Durability, Epoch, Member, Policy,
    ReplicaCommand, ReplicaError, ReplyBody, Seq, ServerId, ShardRecord, VolumeRecord,
};

use super::clocks::Clock;
use super::control::{Change, first_record};
use super::full::Waiting;
use super::model::{BLOCK_BYTES, BLOCK_SIZE, Effect, Model, Truth};
use super::oracle::Oracle;
use super::settings::Settings;
use crate::{Head, HeadConfig, HeadPhase, Input, Output};

pub(super) const MS: u64 = 1_000_000;

/// A small generator (SplitMix64), so that a run is its seed.
#[derive(Clone, Debug)]
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x5851_f42d_4c95_7f2d)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(super) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub(super) fn index(&mut self, limit: usize) -> usize {
        usize::try_from(self.below(limit as u64)).unwrap()
    }

    pub(super) fn one_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }
}

#[derive(Debug)]
pub(super) enum Event {
    Command { head: usize, server: usize, session: u64, tag: u64, command: Box<ReplicaCommand> },
    Done { head: usize, server: usize, life: u64, session: u64, tag: u64, done: Done },
    Reply { head: usize, server: usize, session: u64, tag: u64, result: Box<Answer> },
    Restart { server: usize },
    Connect { head: usize, server: usize },
    NewHead,
    Fault,
    Strand { head: usize, server: usize },
    Succeed { server: usize },
    HeldSeal { head: usize, server: usize, session: u64, tag: u64, epoch: Epoch },
    Resume { head: usize },
    Submit,
    FillStep { server: usize, life: u64 },
    Plan,
    Write(Box<Change>),
    Written { change: Box<Change>, lost: bool },
    Sweep { server: usize },
    Grow,
    Tell { head: usize, blocks: u64 },
}

pub(super) type Answer = Result<ReplyBody, ReplicaError>;

#[derive(Clone, Copy, Debug)]
pub(super) enum Done {
    Append { seq: Seq, media: bool },
    Flush { seq: Seq },
}

struct Scheduled {
    at: u64,
    order: u64,
    event: Event,
}

impl PartialEq for Scheduled {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.order) == (other.at, other.order)
    }
}
impl Eq for Scheduled {}
impl PartialOrd for Scheduled {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Scheduled {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.order).cmp(&(other.at, other.order))
    }
}

pub(super) struct Server {
    pub(super) model: Model,
    pub(super) up: bool,
    pub(super) grant: super::clocks::Grant,
    /// When the last write under way completes: writes complete in order.
    busy_until: u64,
    /// Appends that wait for room in its log.
    pub(super) waiting: VecDeque<Waiting>,
}

#[derive(Clone, Copy, Default)]
pub(super) struct Link {
    pub(super) session: u64,
    pub(super) connected: bool,
    /// Commands arrive in order.
    busy_until: u64,
    /// Nothing gets through, either way, and nothing is lost.
    pub(super) stalled_until: u64,
}

pub(super) struct Running {
    pub(super) head: Head,
    pub(super) links: Vec<Link>,
    pub(super) opened: bool,
    pub(super) ended: bool,
    pub(super) clock: Clock,
    /// Its process is stopped; this is what it will find.
    pub(super) stopped: Option<Vec<Input>>,
    pub(super) was_stopped: bool,
    /// The record as this head's control plane knows it, and its revision.
    pub(super) known: (ShardRecord, u64),
    /// A change is under way: its outcome is not known yet.
    pub(super) changing: bool,
}

/// What happened, by name.
pub(super) type Counts = BTreeMap<&'static str, u64>;

pub(super) struct World {
    pub(super) now: u64,
    order: u64,
    events: BinaryHeap<Reverse<Scheduled>>,
    pub(super) random: Random,
    pub(super) settings: Settings,
    pub(super) servers: Vec<Server>,
    pub(super) truth: Truth,
    pub(super) oracle: Oracle,
    /// All heads there ever were; those that crashed are gone.
    pub(super) heads: Vec<Option<Running>>,
    pub(super) epoch: Epoch,
    /// The shard's record in the cluster store, and its revision.
    pub(super) record: (ShardRecord, u64),
    /// The control plane only mends.
    pub(super) mending: bool,
    pub(super) buffers: BufferPool,
    free_at_start: (usize, usize),
    pub(super) next_id: u64,
    pub(super) returned: Vec<BlockRequest>,
    pub(super) faults: bool,
    pub(super) submitting: bool,
    pub(super) client_awake: bool,
    pub(super) counts: Counts,
    pub(super) last_reply: Option<BlockReply>,
    /// How many times longer than usual a server takes.
    pub(super) slowness: Vec<u64>,
    /// How long requests took, if it is wanted.
    pub(super) stopwatch: Option<super::latency::Stopwatch>,
    /// A server that new heads do not reach until then.
    pub(super) apart: Option<(usize, u64)>,
    /// Blocks that the cluster store's record says.
    pub(super) size: u64,
    /// Blocks that the client knows of.
    pub(super) seen: usize,
}

pub(super) fn server_id(index: usize) -> ServerId {
    ServerId::from_bytes([u8::try_from(index + 1).unwrap(); 16])
}

pub(super) fn index_of(server: ServerId) -> usize {
    usize::from(server.bytes()[0]) - 1
}

impl Running {
    /// When its time comes, by the world's clock.
    fn deadline(&self) -> Option<u64> {
        let at = self.head.next_deadline().filter(|_| self.stopped.is_none())?;
        Some(self.clock.reaches(at))
    }
}

impl World {
    pub(super) fn new(seed: u64, settings: Settings, buffers: BufferPool) -> Self {
        let mut random = Random::new(seed);
        let size = if settings.grows { settings.blocks / 4 } else { settings.blocks } as u64;
        let mut server = |index| {
            let model = Model { absent: index >= settings.members, ..Model::sized(size) };
            let grant = super::clocks::Grant::new(&mut random, settings.grants);
            Server { model, up: true, grant, busy_until: 0, waiting: VecDeque::new() }
        };
        let servers =
            (0..settings.members + settings.spares.unwrap_or(0)).map(&mut server).collect();
        let durable = settings.durability == Durability::Durable;
        let free_at_start = buffers.available();
        Self {
            now: 0,
            order: 0,
            events: BinaryHeap::new(),
            random,
            servers,
            record: (first_record(settings.members), 1),
            mending: false,
            truth: Truth::default(),
            oracle: Oracle::new(settings.blocks, durable),
            settings,
            heads: Vec::new(),
            epoch: Epoch::NONE,
            buffers,
            free_at_start,
            next_id: 0,
            returned: Vec::new(),
            faults: false,
            submitting: false,
            client_awake: false,
            counts: Counts::new(),
            last_reply: None,
            apart: None,
            size,
            seen: usize::try_from(size).unwrap(),
            slowness: vec![1; base::limits::MEMBERS_MAX],
            stopwatch: None,
        }
    }

    pub(super) fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    pub(super) fn schedule(&mut self, after: u64, event: Event) {
        self.order += 1;
        let scheduled = Scheduled { at: self.now + after, order: self.order, event };
        self.events.push(Reverse(scheduled));
    }

    pub(super) fn delay(&mut self) -> u64 {
        let delay = self.settings.delay;
        1 + self.random.below(delay)
    }

    fn config(&self) -> HeadConfig {
        let settings = &self.settings;
        let shard = self.record.0.clone();
        let id = shard.volume;
        let local = server_id(usize::try_from(self.epoch.0).unwrap() % settings.members);
        let is_member = shard.members.iter().any(|member| member.server == local);
        HeadConfig {
            volume: VolumeRecord {
                id,
                name: "v".into(),
                size_bytes: self.size * BLOCK_BYTES as u64,
                block_size: BLOCK_SIZE,
                policy: Policy {
                    replicas: u8::try_from(settings.members).unwrap(),
                    durability: settings.durability,
                    stall_deadline_ms: settings.stall_deadline_ms,
                    read_only: false,
                },
                epoch: self.epoch,
                holder: None,
            },
            shard,
            epoch: self.epoch,
            local: (!self.epoch.0.is_multiple_of(4) && is_member).then_some(local),
            buffers: self.buffers.clone(),
            tunables: settings.tunables,
        }
    }

    /// Starts the next head; the one before may still run.
    pub(super) fn new_head(&mut self) -> usize {
        self.epoch = self.epoch.next();
        let clock = Clock::new(&mut self.random, self.settings.grants);
        let now = clock.at(self.now);
        let mut head = Head::new(self.config(), now).expect("the configuration is valid");
        head.trusts_blindly = self.settings.untrue_head;
        head.drops_blindly = self.settings.drops_blindly;
        head.mends_nothing = true;
        let links = vec![Link::default(); self.servers.len()];
        let running = Running {
            head,
            links,
            opened: false,
            ended: false,
            clock,
            stopped: None,
            was_stopped: false,
            known: self.record.clone(),
            changing: false,
        };
        self.heads.push(Some(running));
        let index = self.heads.len() - 1;
        if let Some((server, until)) = self.apart {
            self.stall_link(index, server, until.saturating_sub(self.now));
        }
        for server in 0..self.servers.len() {
            let after = self.delay();
            self.schedule(after, Event::Connect { head: index, server });
        }
        index
    }

    pub(super) fn current(&self) -> usize {
        self.heads.len() - 1
    }

    pub(super) fn head(&self) -> Option<&Running> {
        self.heads.last()?.as_ref()
    }

    /// Hands an input to a head and takes what comes out.
    pub(super) fn input(&mut self, index: usize, input: Input) {
        let now = self.now;
        let Some(running) = &mut self.heads[index] else { return };
        if let Some(stopped) = &mut running.stopped {
            stopped.push(input);
            return;
        }
        running.head.handle(running.clock.at(now), input);
        if self.order.is_multiple_of(16) {
            running.head.check_invariants();
        }
        while let Some(output) =
            self.heads[index].as_mut().and_then(|running| running.head.poll_output())
        {
            self.output(index, output);
        }
    }

    fn output(&mut self, index: usize, output: Output) {
        match output {
            Output::Command { server, tag, command } => {
                let server = index_of(server);
                self.count(command.body.name());
                let delay = self.delay();
                let at = self.now + delay;
                let Some(running) = &mut self.heads[index] else { return };
                let link = &mut running.links[server];
                if !link.connected && running.was_stopped {
                    return; // it has yet to find out
                }
                assert!(link.connected, "commands go to connected members only");
                link.busy_until = link.busy_until.max(at).max(link.stalled_until) + 1;
                let (after, session) = (link.busy_until - self.now, link.session);
                let command = Box::new(command);
                self.schedule(after, Event::Command { head: index, server, session, tag, command });
            }
            Output::Reply(reply) => {
                self.stop_watch(reply.id);
                let deposed = index != self.current();
                self.check_acknowledged(index, &reply);
                if deposed && reply.data.is_some() {
                    self.count("deposed read");
                }
                let judged = !deposed || self.settings.grants;
                self.oracle.answered(&self.truth, &reply, judged);
                self.last_reply = Some(reply);
            }
            Output::Returned(request) => {
                self.count("returned");
                self.oracle.pending.remove(&request.id.0);
                self.returned.push(request);
                self.wake_client();
            }
            Output::Opened { position } => {
                assert_eq!(position.epoch.0, index as u64 + 1);
                self.oracle.opened();
                self.heads[index].as_mut().unwrap().opened = true;
                self.see_size(index);
            }
            Output::Superseded { sealed } => {
                assert!(sealed.0 > index as u64 + 1);
                self.count("superseded");
                self.note_interrupted(index);
                self.ended(index);
            }
            Output::Released | Output::Abandoned => {
                self.count("released");
                self.ended(index);
                if index == self.current() {
                    let after = self.delay();
                    self.schedule(after, Event::NewHead);
                }
            }
            Output::Failed { reason } => panic!("a head ended itself: {reason}"),
            Output::Stalled { .. } => self.count("stalled"),
            Output::Resumed => self.count("resumed"),
            Output::Mended { .. } => unreachable!("worlds leave damage as it is"),
            Output::Resized { blocks } => {
                assert!(blocks <= self.size);
                self.count("resized");
                self.see_size(index);
            }
            Output::MemberSlow { slow: true, .. } => self.count("member slow"),
            Output::MemberSlow { slow: false, .. } => self.count("member fast"),
        }
    }

    fn ended(&mut self, index: usize) {
        let running = self.heads[index].as_mut().unwrap();
        assert!(!running.ended, "a head ends once");
        running.ended = true;
        for link in &mut running.links {
            link.connected = false;
        }
    }

    /// Runs one event or tick. False if there is nothing left to do.
    pub(super) fn step(&mut self) -> bool {
        let next = self.events.peek().map(|Reverse(scheduled)| scheduled.at);
        let mut tick: Option<(u64, usize)> = None;
        for (index, running) in self.heads.iter().enumerate() {
            let Some(deadline) = running.as_ref().and_then(Running::deadline) else { continue };
            let at = deadline.max(self.now);
            if tick.is_none_or(|(best, _)| at < best) {
                tick = Some((at, index));
            }
        }
        match (next, tick) {
            (None, None) => return false,
            (Some(event), Some((at, index))) if at < event => self.tick(at, index),
            (None, Some((at, index))) => self.tick(at, index),
            (Some(at), _) => {
                let Some(Reverse(scheduled)) = self.events.pop() else { return false };
                self.now = at;
                self.event(scheduled.event);
            }
        }
        true
    }

    fn tick(&mut self, at: u64, index: usize) {
        let again = self.now == at;
        self.now = at;
        self.input(index, Input::Tick);
        let deadline = self.heads[index].as_ref().and_then(Running::deadline);
        let spins = again && deadline.is_some_and(|deadline| deadline <= at);
        assert!(!spins || !self.events.is_empty(), "a deadline in the past makes the shell spin");
        if deadline.is_some_and(|deadline| deadline <= at) {
            self.count("immediate deadline");
            self.input(index, Input::Tick);
            let deadline = self.heads[index].as_ref().and_then(Running::deadline);
            assert!(deadline.is_none_or(|deadline| deadline > at), "the shell would spin");
        }
    }

    fn event(&mut self, event: Event) {
        match event {
            Event::Command { head, server, session, tag, command } => {
                self.deliver(head, server, session, tag, *command);
            }
            Event::Done { head, server, life, session, tag, done } => {
                self.done(head, server, life, session, tag, done);
            }
            Event::Reply { head, server, session, tag, result } => {
                let Some(running) = &self.heads[head] else { return };
                let link = running.links[server];
                if link.stalled_until > self.now {
                    let event = Event::Reply { head, server, session, tag, result };
                    self.schedule(link.stalled_until - self.now, event);
                    return;
                }
                // Answers of a lost session are delivered late or not at all.
                if link.session == session || self.random.one_in(3) {
                    let server = server_id(server);
                    self.input(head, Input::Reply { server, tag, result: *result });
                }
            }
            Event::Restart { server } => {
                self.servers[server].up = true;
                self.servers[server].grant.restarted(self.now);
                for head in 0..self.heads.len() {
                    let after = self.delay();
                    self.schedule(after, Event::Connect { head, server });
                }
            }
            Event::Connect { head, server } => self.connect(head, server),
            Event::NewHead => {
                self.new_head();
            }
            Event::Fault => {
                if self.faults {
                    self.fault();
                    let longest =
                        if self.settings.deposes { 1_500 * MS } else { 120 * self.settings.delay };
                    let after = self.random.below(longest);
                    self.schedule(after, Event::Fault);
                }
            }
            Event::Strand { head, server } => {
                if self.faults {
                    self.stranded(head, server);
                } else {
                    self.calm_down();
                }
            }
            Event::Succeed { server } if self.faults => self.succeed(server),
            Event::Succeed { .. } => {}
            Event::HeldSeal { head, server, session, tag, epoch } => {
                self.held_seal(head, server, session, tag, epoch);
            }
            Event::Resume { head } => self.resume(head),
            Event::Submit => self.submit(),
            Event::FillStep { server, life } => self.fill_step(server, life),
            Event::Plan => self.plan(),
            Event::Write(change) => self.write_record(change),
            Event::Written { change, lost } => self.record_written(*change, lost),
            Event::Sweep { server } => self.sweep(server),
            Event::Grow => self.grow(),
            Event::Tell { head, blocks } => self.input(head, Input::Grow { blocks }),
        }
    }

    fn connect(&mut self, head: usize, server: usize) {
        if !self.servers[server].up {
            return;
        }
        let now = self.now;
        let Some(running) = &mut self.heads[head] else { return };
        let link = &mut running.links[server];
        let id = server_id(server);
        let serves = |member: &Member| member.server == id && member.role.is_served();
        if link.connected || running.ended || running.stopped.is_some() {
            return;
        }
        if !running.known.0.members.iter().any(serves) {
            return;
        }
        link.connected = true;
        link.session += 1;
        link.busy_until = now;
        self.input(head, Input::MemberUp { server: server_id(server) });
    }

    fn deliver(
        &mut self,
        head: usize,
        server: usize,
        session: u64,
        tag: u64,
        command: ReplicaCommand,
    ) {
        let Some(link) = self.link(head, server, session) else { return };
        if link.stalled_until > self.now {
            let command = Box::new(command);
            let event = Event::Command { head, server, session, tag, command };
            self.schedule(link.stalled_until - self.now, event);
            return;
        }
        if let Some(error) = self.injected(server, &command.body) {
            self.count("injected error");
            self.answer(head, server, session, tag, Err(error));
            return;
        }
        if self.settings.room.is_none() {
            return self.carry_out(head, server, session, tag, command);
        }
        let Some(command) = self.wait_for_room(head, server, session, tag, command) else { return };
        self.drop_waiting(head, server, &command);
        self.carry_out(head, server, session, tag, command);
        self.go_on_with_room(server);
    }

    pub(super) fn carry_out(
        &mut self,
        head: usize,
        server: usize,
        session: u64,
        tag: u64,
        command: ReplicaCommand,
    ) {
        let truncates = matches!(command.body, CommandBody::Truncate { .. });
        let ReplicaCommand { epoch, commit, body, .. } = command;
        let reads = matches!(body, CommandBody::Read { .. });
        let (seals, releases) =
            (matches!(body, CommandBody::Seal), matches!(body, CommandBody::Release));
        let model = &mut self.servers[server].model;
        let sealed_before = model.sealed;
        let rotten = model.damaged.len();
        let effect = model.command(&mut self.truth, head, epoch, commit, body);
        let (life, dropped) = (model.life, rotten > model.damaged.len());
        if dropped {
            self.count("unreadable record dropped");
        }
        let admitted = !matches!(effect, Effect::Answer(Err(ReplicaError::Superseded { .. })));
        let deposes = epoch > sealed_before;
        if admitted && self.settings.grants {
            self.servers[server].grant.admitted(self.now, seals && deposes, seals, releases);
            if seals && !self.settings.untrue_members {
                return self.hold_seal(head, server, session, tag, epoch);
            }
        }
        let done = match effect {
            Effect::Answer(result) => {
                if let Err(ReplicaError::Damaged) = result {
                    self.count("damaged");
                }
                if truncates && result.is_ok() {
                    self.count("truncated");
                }
                let after = if reads { self.reading_takes(server) } else { self.delay() };
                let result = Box::new(result);
                self.schedule(after, Event::Reply { head, server, session, tag, result });
                return;
            }
            Effect::Append { seq, media } => Done::Append { seq, media },
            Effect::Flush { seq } => Done::Flush { seq },
            Effect::Fill { progress, begun } => {
                self.answer(head, server, session, tag, Ok(ReplyBody::Filling(progress)));
                return self.begin_fill(server, life, begun);
            }
        };
        let after = self.writing_takes(server);
        self.schedule(after, Event::Done { head, server, life, session, tag, done });
    }

    fn writing_takes(&mut self, server: usize) -> u64 {
        let mut takes = self.delay() * self.slowness[server];
        if self.settings.slow == Some(server) {
            takes *= 50;
        }
        let server = &mut self.servers[server];
        server.busy_until = server.busy_until.max(self.now + takes) + 1;
        server.busy_until - self.now
    }

    /// The link of a session that is alive.
    pub(super) fn link(&self, head: usize, server: usize, session: u64) -> Option<Link> {
        let link = self.heads[head].as_ref()?.links[server];
        (link.connected && link.session == session && self.servers[server].up).then_some(link)
    }

    pub(super) fn answer(
        &mut self,
        head: usize,
        server: usize,
        session: u64,
        tag: u64,
        result: Answer,
    ) {
        let after = self.delay();
        let result = Box::new(result);
        self.schedule(after, Event::Reply { head, server, session, tag, result });
    }

    fn done(&mut self, head: usize, server: usize, life: u64, session: u64, tag: u64, done: Done) {
        let model = &mut self.servers[server].model;
        if model.life != life {
            return;
        }
        let reply = match done {
            Done::Append { seq, media } => {
                model.written = model.written.max(seq);
                if media {
                    model.durable = model.durable.max(seq);
                }
                ReplyBody::Appended { durable: model.durable }
            }
            Done::Flush { seq } => {
                model.written = model.written.max(seq);
                model.durable = model.durable.max(seq);
                ReplyBody::Flushed { durable: model.durable }
            }
        };
        self.answer(head, server, session, tag, Ok(reply));
    }

    pub(super) fn start_load(&mut self) {
        self.submitting = true;
        self.wake_client();
    }

    pub(super) fn start_faults(&mut self) {
        self.faults = true;
        if self.settings.spares.is_some() {
            self.schedule(self.settings.delay, Event::Plan);
        }
        self.start_growth();
        self.schedule(self.settings.delay, Event::Fault);
    }

    /// Ends faults and load: everything comes back.
    pub(super) fn calm_down(&mut self) {
        self.faults = false;
        self.submitting = false;
        if self.settings.spares.is_some() {
            self.mending = true;
            self.schedule(MS, Event::Plan);
        }
        let current = self.current();
        for index in 0..current {
            if self.heads[index].take().is_some() {
                self.oracle.head_gone(index);
            }
        }
        for server in 0..self.servers.len() {
            self.servers[server].up = true;
            self.schedule(1, Event::Connect { head: current, server });
        }
        if self.heads[current].as_ref().is_none_or(|running| running.ended) {
            self.schedule(1, Event::NewHead);
        }
        let blocks = self.size;
        self.schedule(1, Event::Tell { head: current, blocks });
    }

    pub(super) fn run_until(&mut self, end: u64) {
        while self.now < end && self.step() {}
    }

    /// Runs until `done`, or panics after `within` nanoseconds.
    pub(super) fn run_until_done(&mut self, within: u64, what: &str, done: impl Fn(&Self) -> bool) {
        let end = self.now + within;
        while !done(self) {
            let more = self.step();
            assert!(
                more && self.now < end,
                "{what} within {} ms: {}",
                within / MS,
                self.head().map_or("no head".into(), |running| format!(
                    "{} {:?} pending {:?}",
                    running.head.status(),
                    running.head.status(),
                    self.oracle.pending.keys().collect::<Vec<_>>()
                ))
            );
        }
    }

    pub(super) fn open(&self) -> bool {
        self.head().is_some_and(|running| running.opened && !running.ended)
    }

    pub(super) fn phase(&self) -> Option<HeadPhase> {
        Some(self.head()?.head.status().phase)
    }

    pub(super) fn idle(&self) -> bool {
        // After a stall deadline, writes may be undecided though they were answered.
        let decided = self.head().is_some_and(|running| running.head.decided());
        self.open() && decided && self.oracle.pending.is_empty() && self.returned.is_empty()
    }

    /// Ends the world; every buffer must have come back.
    pub(super) fn finish(mut self) -> Counts {
        self.heads.clear();
        self.events.clear();
        self.returned.clear();
        self.last_reply = None;
        assert_eq!(self.buffers.available(), self.free_at_start, "buffers come back");
        self.counts
    }
}
