//! A small world: model members, delays, faults, heads one after another, one client. Everything follows
//! from a seed.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

use base::{
    BlockCount, BlockReply, BlockRequest, BlockSize, BufferPool, Durability, Epoch, Instant, Lba,
    Member, Operation, Policy, PoolId, RecordKind, ReplicaCommand, ReplicaError, ReplyBody,
    RequestId, Role, Seq, ServerId, ShardIndex, ShardRecord, VolumeId, VolumeRecord,
};
use base::{CommandBody, limits};
use core::time::Duration;

use super::model::{BLOCK_BYTES, BLOCK_SIZE, Effect, Model, Truth, fill};
use super::oracle::{Asked, Oracle};
use crate::{Head, HeadConfig, HeadPhase, Input, Output, Tunables};

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

/// How rough a world is.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    pub(super) members: usize,
    pub(super) durability: Durability,
    pub(super) blocks: usize,
    pub(super) depth: usize,
    pub(super) tunables: Tunables,
    /// Longest delay of a message, in nanoseconds.
    pub(super) delay: u64,
    /// A member whose writes take 50 times as long.
    pub(super) slow: Option<usize>,
    /// A member that refuses and fails, and has damaged data.
    pub(super) bad: Option<usize>,
    pub(super) power_losses: bool,
    /// Members trim what other members may still need.
    pub(super) greedy_trims: bool,
    pub(super) stall_deadline_ms: Option<u64>,
}

impl Settings {
    pub(super) fn calm(members: usize) -> Self {
        Self {
            members,
            durability: Durability::Flush,
            blocks: 64,
            depth: 16,
            tunables: Tunables::default(),
            delay: MS / 10,
            slow: None,
            bad: None,
            power_losses: false,
            greedy_trims: false,
            stall_deadline_ms: None,
        }
    }
}

#[derive(Debug)]
enum Event {
    Command { head: usize, server: usize, session: u64, tag: u64, command: Box<ReplicaCommand> },
    Done { head: usize, server: usize, life: u64, session: u64, tag: u64, done: Done },
    Reply { head: usize, server: usize, session: u64, tag: u64, result: Box<Answer> },
    Restart { server: usize },
    Connect { head: usize, server: usize },
    NewHead,
    Fault,
    Strand { head: usize, server: usize },
    Submit,
}

type Answer = Result<ReplyBody, ReplicaError>;

#[derive(Clone, Copy, Debug)]
enum Done {
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

struct Server {
    model: Model,
    up: bool,
    /// When the last write under way completes: writes complete in order.
    busy_until: u64,
}

#[derive(Clone, Copy, Default)]
struct Link {
    session: u64,
    connected: bool,
    /// Commands arrive in order.
    busy_until: u64,
}

pub(super) struct Running {
    pub(super) head: Head,
    links: Vec<Link>,
    pub(super) opened: bool,
    pub(super) ended: bool,
}

/// What happened, by name.
pub(super) type Counts = BTreeMap<&'static str, u64>;

pub(super) struct World {
    pub(super) now: u64,
    order: u64,
    events: BinaryHeap<Reverse<Scheduled>>,
    pub(super) random: Random,
    pub(super) settings: Settings,
    servers: Vec<Server>,
    pub(super) truth: Truth,
    pub(super) oracle: Oracle,
    /// All heads there ever were; those that crashed are gone.
    pub(super) heads: Vec<Option<Running>>,
    epoch: Epoch,
    buffers: BufferPool,
    free_at_start: (usize, usize),
    next_id: u64,
    returned: Vec<BlockRequest>,
    pub(super) faults: bool,
    submitting: bool,
    client_awake: bool,
    pub(super) counts: Counts,
    pub(super) last_reply: Option<BlockReply>,
}

pub(super) fn server_id(index: usize) -> ServerId {
    ServerId::from_bytes([u8::try_from(index + 1).unwrap(); 16])
}

fn index_of(server: ServerId) -> usize {
    usize::from(server.bytes()[0]) - 1
}

impl World {
    pub(super) fn new(seed: u64, settings: Settings, buffers: BufferPool) -> Self {
        let server = |_| Server { model: Model::default(), up: true, busy_until: 0 };
        let durable = settings.durability == Durability::Durable;
        let free_at_start = buffers.available();
        Self {
            now: 0,
            order: 0,
            events: BinaryHeap::new(),
            random: Random::new(seed),
            servers: (0..settings.members).map(server).collect(),
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
        }
    }

    pub(super) fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    fn schedule(&mut self, after: u64, event: Event) {
        self.order += 1;
        let scheduled = Scheduled { at: self.now + after, order: self.order, event };
        self.events.push(Reverse(scheduled));
    }

    fn delay(&mut self) -> u64 {
        let delay = self.settings.delay;
        1 + self.random.below(delay)
    }

    pub(super) fn model(&mut self, server: usize) -> &mut Model {
        &mut self.servers[server].model
    }

    fn config(&self) -> HeadConfig {
        let settings = &self.settings;
        let id = VolumeId::from_bytes([9; 16]);
        let member = |index| Member {
            server: server_id(index),
            pool: PoolId::from_bytes([1; 16]),
            role: Role::InSync,
        };
        HeadConfig {
            volume: VolumeRecord {
                id,
                name: "v".into(),
                size_bytes: (settings.blocks * BLOCK_BYTES) as u64,
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
            shard: ShardRecord {
                volume: id,
                shard: ShardIndex(0),
                members: (0..settings.members).map(member).collect(),
            },
            epoch: self.epoch,
            local: (self.epoch.0 % 4 != 0)
                .then(|| server_id(usize::try_from(self.epoch.0).unwrap() % settings.members)),
            buffers: self.buffers.clone(),
            tunables: settings.tunables,
        }
    }

    /// Starts the next head; the one before may still run.
    pub(super) fn new_head(&mut self) -> usize {
        self.epoch = self.epoch.next();
        let head = Head::new(self.config(), self.instant()).expect("the configuration is valid");
        let links = vec![Link::default(); self.settings.members];
        self.heads.push(Some(Running { head, links, opened: false, ended: false }));
        let index = self.heads.len() - 1;
        for server in 0..self.settings.members {
            let after = self.delay();
            self.schedule(after, Event::Connect { head: index, server });
        }
        index
    }

    fn instant(&self) -> Instant {
        Instant::from_nanos(self.now)
    }

    pub(super) fn current(&self) -> usize {
        self.heads.len() - 1
    }

    pub(super) fn head(&self) -> Option<&Running> {
        self.heads.last()?.as_ref()
    }

    /// Hands an input to a head and takes what comes out.
    pub(super) fn input(&mut self, index: usize, input: Input) {
        let now = self.instant();
        let Some(running) = &mut self.heads[index] else { return };
        running.head.handle(now, input);
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
                assert!(link.connected, "commands go to connected members only");
                link.busy_until = link.busy_until.max(at) + 1;
                let (after, session) = (link.busy_until - self.now, link.session);
                let command = Box::new(command);
                self.schedule(after, Event::Command { head: index, server, session, tag, command });
            }
            Output::Reply(reply) => {
                let deposed = index != self.current();
                self.oracle.answered(&self.truth, &reply, deposed);
                self.last_reply = Some(reply);
            }
            Output::Returned(request) => {
                self.count("returned");
                self.oracle.pending.remove(&request.id.0);
                self.returned.push(request);
                self.wake_client();
            }
            Output::Opened { position } => {
                assert_eq!(position.epoch.0 as usize, index + 1);
                self.oracle.opened();
                self.heads[index].as_mut().unwrap().opened = true;
            }
            Output::Superseded { sealed } => {
                assert!(sealed.0 as usize > index + 1);
                self.count("superseded");
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
            Output::Stalled { .. } => self.count("stalled"),
            Output::Resumed => self.count("resumed"),
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
            let Some(deadline) = running.as_ref().and_then(|r| r.head.next_deadline()) else {
                continue;
            };
            let at = deadline.nanos().max(self.now);
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
        let deadline = self.heads[index].as_ref().and_then(|r| r.head.next_deadline());
        let spins = again && deadline.is_some_and(|deadline| deadline.nanos() <= at);
        assert!(!spins || !self.events.is_empty(), "a deadline in the past makes the shell spin");
        if deadline.is_some_and(|deadline| deadline.nanos() <= at) {
            self.count("immediate deadline");
            self.input(index, Input::Tick);
            let deadline = self.heads[index].as_ref().and_then(|r| r.head.next_deadline());
            assert!(deadline.is_none_or(|d| d.nanos() > at), "the shell would spin");
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
                // Answers of a lost session are delivered late or not at all.
                if link.session == session || self.random.one_in(3) {
                    let server = server_id(server);
                    self.input(head, Input::Reply { server, tag, result: *result });
                }
            }
            Event::Restart { server } => {
                self.servers[server].up = true;
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
                    let after = self.random.below(120 * self.settings.delay);
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
            Event::Submit => self.submit(),
        }
    }

    fn connect(&mut self, head: usize, server: usize) {
        if !self.servers[server].up {
            return;
        }
        let now = self.now;
        let Some(running) = &mut self.heads[head] else { return };
        let link = &mut running.links[server];
        if link.connected || running.ended {
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
        let alive = self.heads[head].as_ref().is_some_and(|running| {
            running.links[server].session == session && running.links[server].connected
        });
        if !alive || !self.servers[server].up {
            return;
        }
        if let Some(error) = self.injected(server, &command.body) {
            self.count("injected error");
            self.answer(head, server, session, tag, Err(error));
            return;
        }
        let truncates = matches!(command.body, CommandBody::Truncate { .. });
        let ReplicaCommand { epoch, commit, body, .. } = command;
        let model = &mut self.servers[server].model;
        let effect = model.command(&mut self.truth, head, epoch, commit, body);
        let life = model.life;
        let done = match effect {
            Effect::Answer(result) => {
                if let Err(ReplicaError::Damaged) = result {
                    self.count("damaged");
                }
                if truncates && result.is_ok() {
                    self.count("truncated");
                }
                self.answer(head, server, session, tag, result);
                return;
            }
            Effect::Append { seq, media } => Done::Append { seq, media },
            Effect::Flush { seq } => Done::Flush { seq },
        };
        let mut takes = self.delay();
        if self.settings.slow == Some(server) {
            takes *= 50;
        }
        let server_state = &mut self.servers[server];
        server_state.busy_until = server_state.busy_until.max(self.now + takes) + 1;
        let after = server_state.busy_until - self.now;
        self.schedule(after, Event::Done { head, server, life, session, tag, done });
    }

    fn injected(&mut self, server: usize, body: &CommandBody) -> Option<ReplicaError> {
        if self.settings.bad != Some(server) || !self.faults || !self.random.one_in(150) {
            return None;
        }
        match body {
            CommandBody::Append { .. } => {
                self.servers[server].model.broken = true;
                let errors = [ReplicaError::Invalid, ReplicaError::Disconnected];
                Some(errors[self.random.index(2)])
            }
            CommandBody::Read { .. } => {
                let errors = [
                    ReplicaError::Damaged,
                    ReplicaError::Behind { last: self.servers[server].model.last() },
                    ReplicaError::DeviceFailed,
                ];
                Some(errors[self.random.index(3)])
            }
            CommandBody::Flush => Some(ReplicaError::DeviceFailed),
            CommandBody::Scan { .. } => Some(ReplicaError::Damaged),
            CommandBody::Seal => Some(ReplicaError::NoReplica),
            CommandBody::Truncate { .. } => Some(ReplicaError::Disconnected),
            CommandBody::Trim | CommandBody::Release => Some(ReplicaError::NotSealed),
        }
    }

    fn answer(&mut self, head: usize, server: usize, session: u64, tag: u64, result: Answer) {
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

    pub(super) fn disconnect(&mut self, head: usize, server: usize) {
        let Some(running) = &mut self.heads[head] else { return };
        let link = &mut running.links[server];
        if !link.connected {
            return;
        }
        link.connected = false;
        link.session += 1;
        self.servers[server].model.session_lost();
        self.input(head, Input::MemberDown { server: server_id(server) });
    }

    /// Kills a server; `power` loses what is not on media.
    pub(super) fn kill(&mut self, server: usize, power: bool) {
        if !self.servers[server].up {
            return;
        }
        self.count(if power { "power loss" } else { "server crash" });
        let state = &mut self.servers[server];
        state.up = false;
        let floor = if power { state.model.durable } else { state.model.written };
        let lost = state.model.last().seq.0 - floor.0;
        let keep = Seq(floor.0 + self.random.below(lost + 1));
        self.servers[server].model.crash(keep);
        if power {
            self.oracle.power_lost();
        }
        for head in 0..self.heads.len() {
            self.disconnect(head, server);
        }
    }

    pub(super) fn restart_after(&mut self, server: usize, after: u64) {
        self.schedule(after, Event::Restart { server });
    }

    pub(super) fn reconnect_after(&mut self, server: usize, after: u64) {
        let head = self.current();
        self.schedule(after, Event::Connect { head, server });
    }

    fn fault(&mut self) {
        let server = self.random.index(self.settings.members);
        let downtime = self.random.below(200 * self.settings.delay);
        match self.random.below(17) {
            14 | 15 => self.strand(server),
            16 if self.settings.greedy_trims => {
                self.kill(server, false);
                self.restart_after(server, 6 * downtime);
            }
            0..=2 => {
                self.kill(server, false);
                self.restart_after(server, downtime);
            }
            3 if self.settings.power_losses => {
                self.kill(server, true);
                self.restart_after(server, downtime);
            }
            4 if self.settings.power_losses && self.random.one_in(3) => {
                for server in 0..self.settings.members {
                    self.kill(server, true);
                    let downtime = self.random.below(600 * self.settings.delay);
                    self.restart_after(server, downtime);
                }
            }
            5..=7 => {
                let head = self.current();
                self.disconnect(head, server);
                self.count("disconnect");
                self.schedule(downtime / 4, Event::Connect { head, server });
            }
            8 => self.crash_head(downtime / 4),
            9 => {
                self.count("takeover");
                self.new_head();
            }
            10 => {
                let head = self.current();
                self.input(head, Input::Release);
            }
            11 | 12 => self.trim_one(server),
            13 => self.damage_one(),
            _ => {}
        }
    }

    /// Leaves one member with records that no other has: the head reaches only that one for a
    /// while, then both go away, and the others go on without.
    fn strand(&mut self, server: usize) {
        self.count("strand");
        let current = self.current();
        for other in (0..self.settings.members).filter(|other| *other != server) {
            self.disconnect(current, other);
        }
        let moment = self.random.below(6 * self.settings.delay);
        self.schedule(moment, Event::Strand { head: current, server });
    }

    fn stranded(&mut self, head: usize, server: usize) {
        if self.random.one_in(2) {
            if head == self.current() {
                self.crash_head(1);
            }
        } else {
            // The old head still reaches that member, and a new one does not.
            self.new_head();
        }
        self.kill(server, false);
        let downtime = self.random.below(200 * self.settings.delay);
        self.restart_after(server, downtime);
    }

    pub(super) fn crash_head(&mut self, downtime: u64) {
        let head = self.current();
        if self.heads[head].as_ref().is_none_or(|running| running.ended) {
            return;
        }
        self.count("head crash");
        self.heads[head] = None;
        self.oracle.head_gone(head);
        self.schedule(downtime, Event::NewHead);
    }

    fn trim_one(&mut self, server: usize) {
        let limit = |server: &Server| server.model.commit.min(server.model.durable);
        let own = limit(&self.servers[server]);
        let everywhere = self.servers.iter().map(limit).min().unwrap();
        let end = if self.settings.greedy_trims { own } else { everywhere };
        let model = &mut self.servers[server].model;
        if end > model.trimmed {
            model.trimmed = Seq(model.trimmed.0 + 1 + self.random.below(end.0 - model.trimmed.0));
        }
    }

    /// Damages a record of the bad member that another holds, safely.
    fn damage_one(&mut self) {
        let Some(bad) = self.settings.bad else { return };
        if self.settings.power_losses {
            return;
        }
        let written = self.servers[bad].model.written;
        if written == Seq::ZERO {
            return;
        }
        let seq = Seq(1 + written.0 - 1 - self.random.below(written.0.min(12)));
        let entry = *self.servers[bad].model.entry(seq).unwrap();
        let holds = |(index, server): (usize, &Server)| {
            index != bad
                && server.model.written >= seq
                && server.model.trimmed < seq
                && server.model.entry(seq) == Some(&entry)
        };
        if self.servers.iter().enumerate().any(holds) {
            self.count("damage");
            self.servers[bad].model.damaged.insert(seq);
        }
    }

    pub(super) fn start_load(&mut self) {
        self.submitting = true;
        self.wake_client();
    }

    pub(super) fn start_faults(&mut self) {
        self.faults = true;
        self.schedule(self.settings.delay, Event::Fault);
    }

    /// Ends faults and load: everything comes back.
    pub(super) fn calm_down(&mut self) {
        self.faults = false;
        self.submitting = false;
        let current = self.current();
        for index in 0..current {
            if self.heads[index].take().is_some() {
                self.oracle.head_gone(index);
            }
        }
        for server in 0..self.settings.members {
            self.servers[server].up = true;
            self.schedule(1, Event::Connect { head: current, server });
        }
        if self.heads[current].as_ref().is_none_or(|running| running.ended) {
            self.schedule(1, Event::NewHead);
        }
    }

    /// The client: fills up to its depth, then comes again.
    fn submit(&mut self) {
        self.client_awake = false;
        let current = self.current();
        while self.heads[current].as_ref().is_some_and(|running| running.head.room() > 0) {
            let in_flight = self.oracle.pending.values().filter(|p| p.head == current).count();
            if in_flight >= self.settings.depth {
                break;
            }
            if let Some(mut request) = self.returned.pop() {
                self.next_id += 1;
                let id = self.next_id;
                request.id = RequestId(id);
                let asked = self.refresh(&mut request);
                let lba = usize::try_from(request.lba.0).unwrap();
                self.oracle.asked(id, asked, lba, request.blocks.0 as usize, current);
                self.input(current, Input::Request(request));
            } else if !self.submitting || !self.random_request() {
                break;
            }
        }
        if self.submitting || !self.returned.is_empty() {
            self.wake_client();
        }
    }

    fn wake_client(&mut self) {
        if !self.client_awake {
            self.client_awake = true;
            let after = self.delay();
            self.schedule(after, Event::Submit);
        }
    }

    /// A returned request as a new one: a new value, so that the oracle can tell them apart.
    fn refresh(&mut self, request: &mut BlockRequest) -> Asked {
        let value = self.next_id;
        let bytes = request.blocks.0 as usize * BLOCK_BYTES;
        match &mut request.operation {
            Operation::Read { .. } => Asked::Read,
            Operation::Write { buffer, fua } => {
                fill(&mut buffer.payload_mut()[..bytes], value);
                Asked::Write { value, fua: *fua }
            }
            Operation::Flush => Asked::Flush,
            Operation::Discard => Asked::Zero { kind: RecordKind::Discard, fua: false },
            Operation::WriteZeroes { fua } => {
                Asked::Zero { kind: RecordKind::WriteZeroes, fua: *fua }
            }
        }
    }

    fn random_request(&mut self) -> bool {
        let lba = self.random.index(self.settings.blocks);
        let blocks = 1 + self.random.index(4.min(self.settings.blocks - lba));
        let fua = self.random.one_in(8);
        let asked = match self.random.below(20) {
            0..=8 => Asked::Read,
            9 => Asked::Flush,
            10 => Asked::Zero { kind: RecordKind::Discard, fua: false },
            11 => Asked::Zero { kind: RecordKind::WriteZeroes, fua },
            _ => Asked::Write { value: 0, fua },
        };
        self.request(asked, lba, blocks)
    }

    /// Submits a request to the current head. A write's value is the request's id. False if no
    /// buffer is free.
    pub(super) fn request(&mut self, asked: Asked, lba: usize, blocks: usize) -> bool {
        let bytes = blocks * BLOCK_BYTES;
        let id = self.next_id + 1;
        let (operation, asked) = match asked {
            Asked::Read => {
                let Some(buffer) = self.buffers.take(bytes) else { return false };
                (Operation::Read { buffer }, asked)
            }
            Asked::Write { fua, .. } => {
                let Some(mut buffer) = self.buffers.take(bytes) else { return false };
                fill(&mut buffer.payload_mut()[..bytes], id);
                (Operation::Write { buffer, fua }, Asked::Write { value: id, fua })
            }
            Asked::Zero { kind: RecordKind::Discard, .. } => (Operation::Discard, asked),
            Asked::Zero { fua, .. } => (Operation::WriteZeroes { fua }, asked),
            Asked::Flush => (Operation::Flush, asked),
        };
        self.next_id = id;
        let current = self.current();
        self.oracle.asked(id, asked, lba, blocks, current);
        let request = BlockRequest {
            id: RequestId(id),
            lba: Lba(lba as u64),
            blocks: BlockCount(u32::try_from(blocks).unwrap()),
            operation,
        };
        self.input(current, Input::Request(request));
        true
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

    /// What every block must hold by the members' settled records.
    pub(super) fn replayed(&self) -> Vec<u64> {
        let longest = self.servers.iter().max_by_key(|server| server.model.last()).unwrap();
        let mut blocks = vec![0; self.settings.blocks];
        for entry in &longest.model.log {
            for (lba, block) in blocks.iter_mut().enumerate() {
                if super::model::touches(&entry.header, lba) {
                    *block = entry.value;
                }
            }
        }
        blocks
    }

    /// Asserts that all members hold the same log.
    pub(super) fn check_converged(&self) {
        for server in &self.servers[1..] {
            assert_eq!(server.model.log.len(), self.servers[0].model.log.len());
            assert!(server.model.log == self.servers[0].model.log, "logs are the same");
        }
    }
}

/// Durations the world's delays are made for.
pub(super) fn quick() -> Tunables {
    Tunables {
        member_records_max: 24,
        backlog_records_max: 16,
        catch_up_depth: 8,
        settle_delay: Duration::from_millis(20),
        ..Tunables::default()
    }
}

const _: () = assert!(limits::HEAD_REQUESTS_MAX > 64);
const _: BlockSize = BLOCK_SIZE;
