//! The world: simulated time, processes, faults, a guest's workload and its checks.

mod config;
mod control;
mod copies;
mod deeds;
mod gaps;
mod healing;
mod processes;
mod strike;
mod transport;
mod upgrade;
mod workload;

use core::fmt::Write as _;
use core::time::Duration;
use std::collections::{BTreeMap, BTreeSet};

use base::limits::PAGE_BYTES;
use base::{
    BlockSize, Epoch, Instant, Member, Policy, ReplicaKey, Role, ShardIndex, ShardRecord, VolumeId,
    VolumeRecord,
};
use node::{ConnectionId, HeadEvent, Input, Node, Output};

use crate::checkers::{Checkers, Seen};
use crate::cluster_store::{Answer, Call, Caller, ClusterStore};
use crate::disk::Disk;
use crate::faults::{Deed, Trigger, Victim};
use crate::guest::Guest;
use crate::network::{Later, Network};
use crate::oracle::Oracle;
use crate::places::{Place, Places};
use crate::process::{Process, pool_id, server_id};
use crate::queue::Queue;
use crate::random::Random;
use crate::trace::Trace;

pub use config::{Habits, WorldConfig};
pub(crate) use healing::Healer;
pub(crate) use upgrade::{Leaving, Successor};

const VOLUME: VolumeId = VolumeId::from_bytes([0xd1; 16]);
const KEY: ReplicaKey = ReplicaKey { volume: VOLUME, shard: ShardIndex(0) };

/// What a run did.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Requests answered.
    pub answered: u64,
    /// Writes and discards acknowledged.
    pub written: u64,
    /// Blocks read and checked.
    pub checked: u64,
    /// Faults that struck.
    pub faults: u64,
    /// Heads opened.
    pub heads: u64,
    /// Simulated time.
    pub simulated: Duration,
    /// From the end of the faults until every request was answered.
    pub recovery: Duration,
    /// Events handled.
    pub events: u64,
    /// Allocations that nodes made while the second half of the requests was worked on.
    pub node_allocations: u64,
    /// A digest of every event and its time.
    pub digest: u64,
    /// What was reached.
    pub places: Places,
}

#[derive(Debug)]
enum Event {
    Disk {
        process: usize,
        life: u64,
        tag: u64,
    },
    Network(Later),
    Connect {
        process: usize,
        life: u64,
        connection: ConnectionId,
        address: core::net::SocketAddr,
    },
    Connected {
        process: usize,
        life: u64,
        connection: ConnectionId,
        refused: bool,
    },
    Accepted {
        process: usize,
        life: u64,
        connection: u64,
    },
    ClosedByUs {
        process: usize,
        life: u64,
        connection: ConnectionId,
    },
    /// Something is due, unless something was due earlier.
    Tick {
        process: usize,
        life: u64,
        /// By the process's own clock.
        due: Instant,
    },
    Start {
        process: usize,
    },
    Resume {
        process: usize,
    },
    /// A process that is upgraded goes on with that, or its next one dies.
    HandOver {
        process: usize,
        life: u64,
        dies: bool,
    },
    /// A process ends by itself, and is started again.
    Exit {
        process: usize,
        life: u64,
    },
    Control {
        process: usize,
        life: u64,
    },
    /// A healer's turn.
    Heal {
        process: usize,
        life: u64,
    },
    StoreEffect {
        process: usize,
        life: u64,
        caller: Caller,
        call: Box<Call>,
        answer: Option<Instant>,
    },
    StoreAnswer {
        process: usize,
        life: u64,
        caller: Caller,
        answer: Box<Answer>,
    },
    /// The guest's next request, unless it has begun to make them at another pace.
    Submit {
        pace: u64,
    },
    /// Nothing: time passes.
    Wake,
    Sprung {
        deed: Deed,
        victim: Victim,
        there: usize,
    },
    /// Somebody attaches the volume at a process.
    Attach {
        process: usize,
    },
    /// Nobody uses a process's head for now.
    Rest {
        process: usize,
    },
    Fault {
        number: usize,
    },
}

impl Event {
    /// What tells it from other events, for the digest of a run.
    fn digest(&self) -> (u8, u64, u64) {
        match self {
            Self::Disk { process, tag, .. } => (1, *process as u64, *tag),
            Self::Network(Later::Deliver(socket)) => (2, socket.number(), 0),
            Self::Network(Later::Sent(socket, bytes)) => (3, socket.number(), *bytes as u64),
            Self::Network(Later::Closed(socket)) => (4, socket.number(), 0),
            Self::Network(Later::Retransmit(socket)) => (5, socket.number(), 0),
            Self::Connect { process, address, .. } => (6, *process as u64, address.port().into()),
            Self::Connected { process, refused, .. } => (7, *process as u64, (*refused).into()),
            Self::Accepted { process, connection, .. } => (8, *process as u64, *connection),
            Self::ClosedByUs { process, .. } => (9, *process as u64, 0),
            Self::Tick { process, life, .. } => (10, *process as u64, *life),
            Self::Start { process } => (11, *process as u64, 0),
            Self::Resume { process } => (12, *process as u64, 0),
            Self::Control { process, .. } => (13, *process as u64, 0),
            Self::StoreEffect { process, .. } => (14, *process as u64, 0),
            Self::StoreAnswer { process, .. } => (15, *process as u64, 0),
            Self::Submit { pace } => (16, *pace, 0),
            Self::Wake => (20, 0, 0),
            Self::Heal { process, .. } => (21, *process as u64, 0),
            Self::Sprung { there, .. } => (19, *there as u64, 0),
            Self::Attach { process } => (22, *process as u64, 0),
            Self::Rest { process } => (23, *process as u64, 0),
            Self::HandOver { process, dies, .. } => (24, *process as u64, (*dies).into()),
            Self::Exit { process, .. } => (18, *process as u64, 0),
            Self::Fault { number } => (17, *number as u64, 0),
        }
    }
}

/// A simulated cluster with one volume and one guest.
pub struct World {
    config: WorldConfig,
    random: Random,
    now: Instant,
    queue: Queue<Event>,
    processes: Vec<Process>,
    /// What waits for processes that stand still.
    held: Vec<Vec<Event>>,
    network: Network,
    connecting: BTreeSet<(usize, u64, ConnectionId)>,
    accepted: u64,
    store: ClusterStore,
    /// Which process somebody wants the head in.
    desired: usize,
    /// The newest epoch in which a head has opened.
    opened: Epoch,
    /// Whose disks lie, and no other's.
    faulty: Option<usize>,
    /// They have done so: its copy may be damaged.
    damaged_disks: bool,
    /// Pages of the faulty server have rotted: whenever it starts, the end of its log may be among them.
    rotted: bool,
    /// Of the faulty server's devices that have a copy of its metadata, the one whose copy may not be whole.
    struck_copy: Option<usize>,
    /// Some disk has said that things are on media that were not.
    disks_lied: bool,
    /// Members' copies are compared: nobody changes members.
    comparing: bool,
    /// When the cluster store last heard of each process.
    last_seen_ms: Vec<u64>,
    /// Servers that an operator wants empty.
    draining: Vec<bool>,
    provisioned: usize,
    oracle: Oracle,
    requests: BTreeMap<u64, Guest>,
    next_request: u64,
    next_write: u64,
    faults_on: bool,
    ambushes: Vec<strike::Ambush>,
    midst: Option<deeds::Midst>,
    /// The next change of members is interrupted for so long.
    split: Option<u64>,
    /// Where the replica is filled from that began last.
    fill_source: Option<usize>,
    /// Damaged answers that the faulty server's store has counted.
    damaged_answers: u64,
    /// How wrong each process's wall clock is.
    wall_offset_ms: Vec<i64>,
    load: workload::Load,
    checkers: Checkers,
    trace: Trace,
    report: Report,
}

impl World {
    /// A cluster whose servers are about to start.
    pub fn new(config: WorldConfig) -> Self {
        let servers = config.pools();
        let count = servers + usize::from(config.diskless);
        let (volume, shard) = records(&config);
        let mut random = Random::of(config.seed, "world");
        let mut world = Self {
            now: Instant::ZERO,
            queue: Queue::new(),
            processes: (0..count)
                .map(|index| Process::new(index, index < servers, config.layout))
                .collect(),
            held: (0..count).map(|_| Vec::new()).collect(),
            network: Network::new(count, config.seed, config.hiccups),
            connecting: BTreeSet::new(),
            accepted: 0,
            store: ClusterStore::new(volume, shard, config.seed),
            desired: if config.diskless { servers } else { 0 },
            opened: Epoch::NONE,
            faulty: (config.servers >= 3)
                .then(|| random.index(config.servers))
                .filter(|_| !config.faults.is_empty()),
            damaged_disks: false,
            rotted: false,
            struck_copy: None,
            disks_lied: false,
            comparing: false,
            last_seen_ms: vec![0; servers + 1],
            draining: vec![false; servers],
            provisioned: 0,
            oracle: Oracle::new(
                usize::try_from(config.blocks_in_the_end()).expect("a small volume"),
            ),
            requests: BTreeMap::new(),
            next_request: 1,
            next_write: 1,
            faults_on: !config.faults.is_empty(),
            ambushes: Vec::new(),
            midst: None,
            split: None,
            fill_source: None,
            damaged_answers: 0,
            wall_offset_ms: vec![0; count],
            load: workload::Load::new(&config),
            checkers: Checkers::new(servers),
            trace: Trace::new(config.trace),
            report: Report::default(),
            random,
            config,
        };
        for process in 0..count {
            world.after(0, Event::Start { process });
        }
        world
    }

    /// Runs both phases: requests under faults, then healing, a flush and a check of every block.
    ///
    /// # Panics
    /// With the seed and what was violated.
    pub fn run(mut self) -> Report {
        let limit = Instant::ZERO + Duration::from_mins(10);
        self.run_until(limit, "to provision", |world| world.provisioned == world.config.servers);
        self.control(self.desired);
        self.after(0, Event::Submit { pace: 0 });
        for number in 0..self.config.faults.len() {
            let at = self.config.faults[number].at.max(self.now);
            self.queue.push(at, Event::Fault { number });
        }
        let total = self.config.requests;
        if self.config.length.is_zero() {
            self.run_until(limit, "to submit all requests", |world| world.next_request > total);
        } else {
            let end = self.now + self.config.length;
            self.queue.push(end, Event::Wake);
            self.run_until(limit, "for the faults to end", |world| world.now >= end);
        }
        self.heal();
        let healed = self.now;
        let bound = healed + Duration::from_mins(1);
        // Logs are full for a moment in many an opening that goes on: so that is asked at the end.
        let last = healed + gaps::PATIENCE;
        self.queue.push(last, Event::Wake);
        self.run_until(bound, "to serve again after faults stopped (I6)", |world| {
            world.serving() && world.requests.is_empty()
                || world.waits_for_a_pool()
                || world.now >= last && world.waits_for_room()
        });
        self.report.recovery = self.now.since(healed);
        if self.waits_for_a_pool() || self.now >= last && self.waits_for_room() {
            self.report.places.reach(Place::LeftWaiting);
            return self.finish();
        }
        self.read_everything(bound);
        if !self.config.faults.is_empty() {
            self.read_copies();
        }
        self.wind_up();
        self.finish()
    }

    /// Some disk says that it has put things on media and has not.
    fn disks_lie(&self) -> bool {
        let faulty = self.faulty.map(|faulty| &self.processes[faulty]);
        let mut disks = faulty.iter().flat_map(|process| &process.disks);
        disks.any(|disk| disk.lied || disk.lies_until > self.now)
    }

    fn finish(&mut self) -> Report {
        self.report.simulated = self.now.since(Instant::ZERO);
        self.report.checked = self.oracle.checked();
        self.report.digest = self.trace.digest();
        self.report.places.add_network(&self.network);
        std::mem::take(&mut self.report)
    }

    fn fail(&self, what: &str) -> ! {
        panic!(
            "{what}\n  at {} after {} events; {} servers, diskless {}, {:?}, faults at server {:?}\n  \
             {}",
            self.now,
            self.report.events,
            self.config.servers,
            self.config.diskless,
            self.config.durability,
            self.faulty,
            self.describe()
        )
    }

    fn after(&mut self, nanos: u64, event: Event) {
        self.queue.push(self.now + Duration::from_nanos(nanos), event);
    }

    fn run_until(&mut self, limit: Instant, what: &str, done: impl Fn(&Self) -> bool) {
        while !done(self) {
            let Some((at, event)) = self.queue.pop() else {
                self.fail(&format!("nothing happens any more, waiting {what}"));
            };
            if at > limit {
                self.fail(&format!("took too long {what}"));
            }
            self.now = self.now.max(at);
            self.report.events += 1;
            self.event(event);
            while let Some((at, later)) = self.network.take_later() {
                self.queue.push(at, Event::Network(later));
            }
        }
    }

    fn describe(&self) -> String {
        let mut text = format!(
            "{} requests unanswered, head wanted at process {}, opened {}, store {:?} holder {:?}",
            self.requests.len(),
            self.desired,
            self.opened,
            self.store.records.volume.epoch,
            self.store.records.volume.holder.as_ref().map(|holder| &holder.name)
        );
        for process in &self.processes {
            let (index, open, lease) = (process.index, process.open, &process.lease);
            let running = process.node.is_some();
            let _ = write!(text, "\n  process {index}: running {running}, open {open}, {lease:?}");
            let free = process.free_buffers();
            let _ = write!(text, ", free buffers {free:?}");
            for (_, _, status, _) in process.node.iter().flat_map(Node::heads) {
                let _ = write!(text, "\n    head: {status} {:?}", status.members);
            }
            for (_, info) in
                process.node.iter().filter_map(Node::store).flat_map(store::Store::replicas)
            {
                let _ = write!(text, "\n    replica: {:?}", info.state);
            }
        }
        text
    }

    /// The process that an event happens to, and in which life of it.
    fn victim(&self, event: &Event) -> Option<(usize, u64)> {
        match event {
            Event::Disk { process, life, .. }
            | Event::Connected { process, life, .. }
            | Event::Accepted { process, life, .. }
            | Event::ClosedByUs { process, life, .. }
            | Event::Tick { process, life, .. }
            | Event::Exit { process, life }
            | Event::HandOver { process, life, .. }
            | Event::Control { process, life }
            | Event::Heal { process, life }
            | Event::StoreAnswer { process, life, .. } => Some((*process, *life)),
            Event::Network(Later::Deliver(socket) | Later::Sent(socket, _)) => {
                self.network.end(*socket).map(|end| (end.process, end.life))
            }
            Event::Network(Later::Closed(_) | Later::Retransmit(_))
            | Event::Connect { .. }
            | Event::Start { .. }
            | Event::Resume { .. }
            | Event::StoreEffect { .. }
            | Event::Submit { .. }
            | Event::Wake
            | Event::Attach { .. }
            | Event::Rest { .. }
            | Event::Sprung { .. }
            | Event::Fault { .. } => None,
        }
    }

    fn event(&mut self, event: Event) {
        if let Some((process, life)) = self.victim(&event) {
            if self.processes[process].life != life {
                return;
            }
            if self.processes[process].paused_until > self.now {
                self.held[process].push(event);
                return;
            }
            if self.report.events.is_multiple_of(self.config.check_every) {
                self.check_invariants(process);
            }
        }
        let (kind, who, detail) = event.digest();
        self.trace.event(self.now, kind, who, detail);
        match event {
            Event::Disk { process, life: _, tag } => self.disk_done(process, tag),
            Event::Network(later) => self.network_event(later),
            Event::Connect { process, life, connection, address } => {
                self.connect(process, life, connection, address);
            }
            Event::Connected { process, life, connection, refused } => {
                self.connected(process, life, connection, refused);
            }
            Event::Accepted { process, life, connection } => {
                self.input(process, life, Input::Accepted { connection, from: None });
            }
            Event::ClosedByUs { process, life, connection } => {
                self.input(process, life, Input::Closed { connection });
            }
            Event::Tick { process, life, due } => {
                if self.processes[process].tick_at == Some(due) {
                    self.processes[process].tick_at = None;
                    self.input(process, life, Input::Tick);
                }
            }
            Event::Start { process } => self.start(process),
            Event::Resume { process } => self.resume(process),
            Event::HandOver { process, life: _, dies } => self.hand_over(process, dies),
            Event::Exit { process, life: _ } => self.stop(process, false),
            Event::Control { process, life: _ } => self.control(process),
            Event::Heal { process, life: _ } => self.heal_turn(process),
            Event::StoreEffect { process, life, caller, call, answer } => {
                self.store_effect(process, life, caller, *call, answer);
            }
            Event::StoreAnswer { process, life: _, caller, answer } => {
                self.store_answer(process, caller, *answer);
            }
            Event::Submit { pace } => self.submit(pace),
            Event::Attach { process } if self.faults_on => self.attach(process),
            Event::Wake | Event::Attach { .. } => {}
            Event::Rest { process } => self.rest(process),
            Event::Sprung { deed, victim, there } => self.sprung(deed, victim, there),
            Event::Fault { number } => self.strike(number),
        }
    }

    fn input(&mut self, process: usize, life: u64, input: Input) {
        let state = &mut self.processes[process];
        let hears = state.life == life && !state.has_let_go();
        let Some(node) = state.node.as_mut().filter(|_| hears) else { return };
        let before = (self.config.allocations)();
        node.handle(state.clock.local(self.now), input);
        self.note_allocations(before);
        self.pump(process);
    }

    fn note_allocations(&mut self, before: u64) {
        if 2 * self.next_request > self.config.requests && !self.requests.is_empty() {
            self.report.node_allocations += (self.config.allocations)() - before;
        }
    }

    fn next_output(&mut self, process: usize) -> Option<Output> {
        let before = (self.config.allocations)();
        let output = self.processes[process].node.as_mut()?.poll_output();
        self.note_allocations(before);
        output
    }

    /// Performs what a node asks for.
    fn pump(&mut self, process: usize) {
        while let Some(output) = self.next_output(process) {
            self.output(process, output);
        }
        while let Some(operation) =
            self.processes[process].node.as_mut().and_then(node::Node::poll_disk)
        {
            self.disk_begin(process, operation);
        }
        self.schedule_tick(process);
    }

    fn schedule_tick(&mut self, process: usize) {
        let state = &mut self.processes[process];
        let local = state.clock.local(self.now);
        let deadline = state.node.as_ref().and_then(node::Node::next_deadline);
        let Some(deadline) = deadline.map(|at| at.max(local)) else { return };
        if state.tick_at.is_none_or(|at| deadline < at) {
            state.tick_at = Some(deadline);
            state.count_tick(u64::try_from(deadline.since(local).as_nanos()).expect("soon"));
            let at = state.clock.world(deadline).max(self.now) + Duration::from_nanos(1);
            let life = state.life;
            self.queue.push(at, Event::Tick { process, life, due: deadline });
        }
    }

    fn output(&mut self, process: usize, output: Output) {
        match output {
            Output::Connect { connection, address } => self.dial(process, connection, address),
            Output::Receive { connection, buffer, region, min_bytes: _ } => {
                let end = self.end(process, connection);
                self.network.receive(self.now, end, buffer, region);
            }
            Output::Send { connection, part } => self.send(process, connection, part),
            Output::Close { connection } => self.close(process, connection),
            Output::Reply { reply, .. } => self.reply(&reply),
            Output::ControlDone { tag: 1, result } => {
                if let Err(error) = result {
                    self.fail(&format!("the replica could not be made: {error}"));
                }
                self.provisioned += 1;
            }
            Output::ControlDone { tag, result } => {
                self.checkers.made_or_deleted(process);
                self.own_done(process, tag, result);
            }
            Output::PoolOpened(Ok(())) => self.process_opened(process),
            Output::PoolOpened(Err(error)) => self.pool_lost(process, &error),
            Output::PoolFailed(failure) => self.device_failed(process, failure),
            Output::PoolNotice(store::Notice::Damaged(_)) => self.damage_noticed(process),
            Output::PoolNotice(store::Notice::DamagedBlocks { lba, .. }) => {
                self.damage_noticed(process);
                self.return_to(lba.0);
            }
            Output::PoolNotice(store::Notice::Stalled(_)) => {
                self.report.places.reach(Place::LogFull);
            }
            Output::PoolNotice(store::Notice::Resumed) => {
                self.report.places.reach(Place::LogFreed);
            }
            Output::PoolNotice(store::Notice::MetadataMended { .. })
            | Output::Peer { .. }
            | Output::Refused { .. } => {}
            Output::Fill { event, source, .. } => {
                self.fill_source =
                    (0..self.config.pools()).find(|index| server_id(*index) == source);
                self.fill_event(process, event);
            }
            Output::Head { event, epoch, .. } => self.head_event(process, epoch, event),
        }
    }

    fn fill_event(&mut self, process: usize, event: node::FillEvent) {
        self.trace.say(self.now, || format!("process {process} is filled: {event:?}"));
        if let node::FillEvent::Started { .. } = event {
            self.spring(Trigger::Fill, process);
        }
        match event {
            node::FillEvent::Started { chunks: true } => self.checkers.filled(process, false),
            node::FillEvent::Done { .. } => self.checkers.filled(process, true),
            node::FillEvent::Started { chunks: false } | node::FillEvent::Failed { .. } => {}
        }
        self.report.places.reach(match event {
            node::FillEvent::Started { chunks: true } => Place::FillStarted,
            node::FillEvent::Started { chunks: false } => Place::MemberCaughtUp,
            node::FillEvent::Done { .. } => Place::FillDone,
            node::FillEvent::Failed { .. } => Place::FillFailed,
        });
    }

    fn head_event(&mut self, process: usize, epoch: Epoch, event: HeadEvent) {
        self.trace.say(self.now, || format!("process {process} head {epoch}: {event:?}"));
        let places = &mut self.report.places;
        match event {
            HeadEvent::Opened { .. } => {
                let head = self.processes[process].head.as_mut().expect("it opened");
                head.opened = true;
                if epoch == self.opened {
                    self.fail(&format!("two heads opened in {epoch} (I7)"));
                }
                self.opened = self.opened.max(epoch);
                let honest = !self.disks_lie();
                if self.oracle.opened(epoch.0, honest) {
                    self.report.places.reach(Place::FlushedAfterLoss);
                }
                self.begin_burst();
                self.look_first();
                self.spring(Trigger::Opened, process);
            }
            HeadEvent::Superseded { sealed } => {
                places.reach(Place::HeadSuperseded);
                if sealed < epoch || sealed > self.store.records.volume.epoch {
                    self.fail(&format!("{epoch} was superseded by {sealed}, which nobody won"));
                }
            }
            HeadEvent::Ended => {
                self.processes[process].head = None;
                self.oracle.orphaned(epoch.0);
                if process == self.desired {
                    self.control_later(process, 1_000_000);
                }
            }
            HeadEvent::Failed { reason } => self.fail(&format!("a head ended itself: {reason}")),
            HeadEvent::MemberSlow { .. } => {}
            HeadEvent::Resized { blocks } => {
                places.reach(Place::VolumeGrown);
                let head = &mut self.processes[process].head;
                if let Some(head) = head.as_mut().filter(|head| head.epoch == epoch) {
                    head.blocks = blocks;
                }
            }
            HeadEvent::Mended { .. } => places.reach(Place::BlocksMended),
            HeadEvent::Stalled { .. } => places.reach(Place::HeadStalled),
            HeadEvent::Resumed => places.reach(Place::HeadResumed),
            HeadEvent::Released => places.reach(Place::HeadReleased),
        }
    }

    /// True if the newest head is open, where it is wanted.
    fn serving(&self) -> bool {
        let state = &self.processes[self.desired];
        state.head.filter(|_| state.leaving.is_none()).is_some_and(|head| {
            head.opened
                && head.epoch == self.opened
                && head.epoch == self.store.records.volume.epoch
        })
    }

    /// What every machine of a process asserts of itself, and what the checkers know of it.
    fn check_invariants(&mut self, process: usize) {
        // A pool that is still opening has not read its metadata yet.
        if let Some(node) =
            self.processes[process].node.as_ref().filter(|_| self.processes[process].open)
        {
            node.check_invariants();
            let seen = Seen {
                node,
                process,
                store_epoch: self.store.records.volume.epoch,
                head: self.processes[process].head.map(|head| head.epoch),
                honest: self.faulty != Some(process),
                keeps_its_word: !self.disks_lied && !self.comparing,
                operations: self.processes[process].operations.iter().count(),
                unsent_bytes: self.network.unsent_bytes(process),
            };
            if let Err(violation) = self.checkers.look(&seen) {
                self.fail(&violation);
            }
        }
    }

    /// Faults stop; what is down comes back by itself.
    fn heal(&mut self) {
        self.trace.say(self.now, || "faults stop".to_owned());
        self.faults_on = false;
        self.network.heal(self.now);
        self.store.heal();
        for process in 0..self.processes.len() {
            self.processes[process].disks.iter_mut().for_each(Disk::heal);
            if self.processes[process].paused_until > self.now {
                self.processes[process].paused_until = self.now;
                self.after(0, Event::Resume { process });
            }
            if self.processes[process].device_failed {
                self.stop(process, false);
            }
            self.after(0, Event::Start { process });
        }
        self.ambushes.clear();
        self.split = None;
        self.wall_offset_ms.fill(0);
        // Whoever wants the volume takes it to a server that starts.
        if self.faulty == Some(self.desired) {
            self.desired = (self.desired + 1) % self.config.pools();
        }
        self.control_later(self.desired, 0);
    }
}

impl Drop for World {
    /// A run that failed leaves behind how far it came.
    fn drop(&mut self) {
        crate::runner::note_events(self.report.events);
    }
}

fn records(config: &WorldConfig) -> (VolumeRecord, ShardRecord) {
    let volume = VolumeRecord {
        id: VOLUME,
        name: "simulated".to_owned(),
        size_bytes: config.blocks * PAGE_BYTES as u64,
        block_size: BlockSize::B4096,
        policy: Policy {
            replicas: u8::try_from(config.servers).expect("few servers"),
            durability: config.durability,
            stall_deadline_ms: None,
            read_only: false,
        },
        epoch: Epoch::NONE,
        holder: None,
    };
    let member =
        |index| Member { server: server_id(index), pool: pool_id(index), role: Role::InSync };
    let members = (0..config.servers).map(member).collect();
    let shard = ShardRecord {
        volume: VOLUME,
        shard: ShardIndex(0),
        members,
        failover: Vec::new(),
        preferred_failover: Vec::new(),
        moves: Vec::new(),
    };
    (volume, shard)
}
