//! The world: simulated time, processes, faults, a guest's workload and its checks.

use core::time::Duration;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

use base::limits::PAGE_BYTES;
use base::{
    BlockCount, BlockReply, BlockRequest, BlockSize, Durability, Epoch, Instant, Lba, Member,
    Operation, Policy, ReplicaKey, RequestId, Role, ShardIndex, ShardRecord, Status, VolumeId,
    VolumeRecord,
};
use node::{ConnectionId, FrontEnd, HeadEvent, Input, Output};
use store::{DiskId, DiskKind, DiskOperation, DiskResult};

use crate::content::{fill, value_of};
use crate::guest::{Guest, Kind};
use crate::network::{End, Network};
use crate::oracle::Oracle;
use crate::process::{Process, address, pool_id, server_id};
use crate::random::Random;

const VOLUME: VolumeId = VolumeId::from_bytes([0xd1; 16]);
const KEY: ReplicaKey = ReplicaKey { volume: VOLUME, shard: ShardIndex(0) };

/// A run.
#[derive(Clone, Copy, Debug)]
pub struct WorldConfig {
    /// Decides everything.
    pub seed: u64,
    /// Servers with a replica each: 1, 2, 3 or 5.
    pub servers: usize,
    /// The head runs in a process without a pool.
    pub diskless: bool,
    /// Blocks of 4 KiB of the volume.
    pub blocks: u64,
    /// Requests to submit before the faults stop.
    pub requests: u64,
    /// Processes die, lose connections; heads are replaced.
    pub faults: bool,
    /// Now and then a disk or the network is a hundred times slower, and members fall behind.
    pub hiccups: bool,
    /// When a write counts. Only with [`Durability::Durable`] do servers lose power, one at a
    /// time: with [`Durability::Flush`] that may cost what was acknowledged and not flushed.
    pub durability: Durability,
    /// Print what happens to this block.
    pub trace_block: Option<u64>,
    /// Counts the process's allocations, for [`Report::node_allocations`].
    pub allocations: fn() -> u64,
}

/// What a run did.
#[derive(Clone, Copy, Debug, Default)]
pub struct Report {
    /// Requests answered.
    pub answered: u64,
    /// Blocks read and checked.
    pub checked: u64,
    /// Faults injected.
    pub faults: u64,
    /// Heads opened.
    pub heads: u64,
    /// Simulated time.
    pub simulated: Duration,
    /// Events handled.
    pub events: u64,
    /// Allocations that nodes made while the second half of the requests was worked on.
    pub node_allocations: u64,
}

enum Event {
    Disk { process: usize, life: u64, operation: Box<DiskOperation> },
    Deliver { at: End, life: u64 },
    Connect { process: usize, life: u64, connection: ConnectionId, address: core::net::SocketAddr },
    Closed { at: End, life: u64 },
    Tick { process: usize, life: u64 },
    Start { process: usize },
    OpenHead,
    Submit,
    Fault,
}

/// A simulated cluster with one volume and one guest.
pub struct World {
    config: WorldConfig,
    random: Random,
    now: Instant,
    queue: BinaryHeap<Reverse<(Instant, u64)>>,
    events: BTreeMap<u64, Event>,
    next_event: u64,
    processes: Vec<Process>,
    network: Network,
    accepted: u64,
    /// What the cluster store says.
    epoch: Epoch,
    /// Which process is to run the head.
    head_at: usize,
    provisioned: usize,
    serving: bool,
    oracle: Oracle,
    requests: BTreeMap<u64, Guest>,
    next_request: u64,
    next_write: u64,
    faults_on: bool,
    report: Report,
}

impl World {
    /// A cluster whose servers are about to start.
    pub fn new(config: WorldConfig) -> Self {
        let servers = config.servers;
        let mut world = Self {
            random: Random::new(config.seed),
            now: Instant::ZERO,
            queue: BinaryHeap::new(),
            events: BTreeMap::new(),
            next_event: 0,
            processes: (0..servers).map(|index| Process::new(index, true)).collect(),
            network: Network::default(),
            accepted: 0,
            epoch: Epoch::NONE,
            head_at: if config.diskless { servers } else { 0 },
            provisioned: 0,
            serving: false,
            oracle: Oracle::new(usize::try_from(config.blocks).expect("a small volume")),
            requests: BTreeMap::new(),
            next_request: 1,
            next_write: 1,
            faults_on: config.faults,
            report: Report::default(),
            config,
        };
        if config.diskless {
            world.processes.push(Process::new(servers, false));
        }
        for process in 0..world.processes.len() {
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
        self.after(0, Event::OpenHead);
        self.after(0, Event::Submit);
        if self.faults_on {
            self.after(1_000_000, Event::Fault);
        }
        let total = self.config.requests;
        self.run_until(limit, "to submit all requests", |world| world.next_request > total);
        self.heal();
        let bound = self.now + Duration::from_mins(1);
        self.run_until(bound, "to serve again after faults stopped", |world| {
            world.serving && world.requests.is_empty()
        });
        self.read_everything(bound);
        self.report.simulated = self.now.since(Instant::ZERO);
        self.report.checked = self.oracle.checked();
        self.report
    }

    fn fail(&self, what: &str) -> ! {
        panic!(
            "{what}\n  at {} after {} events; configuration {:?}\n  replay: SIM_SEED={} SIM_SERVERS={} \
             SIM_DISKLESS={} cargo test -p sim replay -- --nocapture",
            self.now,
            self.report.events,
            self.config,
            self.config.seed,
            self.config.servers,
            self.config.diskless
        )
    }

    fn after(&mut self, nanos: u64, event: Event) {
        let at = self.now + Duration::from_nanos(nanos);
        self.next_event += 1;
        self.events.insert(self.next_event, event);
        self.queue.push(Reverse((at, self.next_event)));
    }

    fn run_until(&mut self, limit: Instant, what: &str, done: impl Fn(&Self) -> bool) {
        while !done(self) {
            let Some(Reverse((at, id))) = self.queue.pop() else {
                self.fail(&format!("nothing happens any more, waiting {what}"));
            };
            if at > limit {
                let heads = self.describe();
                self.fail(&format!("took too long {what}: {heads}"));
            }
            self.now = self.now.max(at);
            self.report.events += 1;
            let event = self.events.remove(&id).expect("a queued event exists");
            self.event(event);
        }
    }

    fn describe(&self) -> String {
        let heads = self.processes.iter().flat_map(|process| {
            process.node.iter().flat_map(node::Node::heads).map(|(_, _, status, _)| {
                format!("\n  process {}: {status} {:?}", process.index, status.members)
            })
        });
        let processes = self.processes.iter().map(|process| {
            let running = process.node.is_some();
            format!("\n  process {}: running {running}, open {}", process.index, process.open)
        });
        format!(
            "{} requests unanswered, head at process {}, serving {}{}{}",
            self.requests.len(),
            self.head_at,
            self.serving,
            processes.collect::<String>(),
            heads.collect::<String>()
        )
    }

    fn event(&mut self, event: Event) {
        match event {
            Event::Disk { process, life, operation } => self.disk_done(process, life, *operation),
            Event::Deliver { at, life } => self.deliver(at, life),
            Event::Connect { process, life, connection, address } => {
                self.connect(process, life, connection, address);
            }
            Event::Closed { at, life } => {
                self.input(at.0, life, Input::Closed { connection: at.1 });
            }
            Event::Tick { process, life } => {
                if self.processes[process].life == life {
                    self.processes[process].tick_at = None;
                }
                self.input(process, life, Input::Tick);
            }
            Event::Start { process } => self.start(process),
            Event::OpenHead => self.open_head(),
            Event::Submit => self.submit(),
            Event::Fault => self.fault(),
        }
    }

    // Processes.

    fn start(&mut self, process: usize) {
        if self.processes[process].node.is_some() {
            return;
        }
        self.processes[process].start(&mut self.random);
        self.pump(process);
        if !self.processes[process].is_server() {
            self.process_opened(process);
        }
    }

    /// A process serves: the first time its replica is made, later it may have to run the head.
    fn process_opened(&mut self, process: usize) {
        self.processes[process].open = true;
        let servers: Vec<_> =
            (0..self.config.servers).map(|index| (server_id(index), address(index))).collect();
        let now = self.now;
        let life = self.processes[process].life;
        let node = self.processes[process].node.as_mut().expect("it runs");
        node.set_servers(now, servers);
        if self.processes[process].is_server() && self.epoch == Epoch::NONE {
            let blocks = self.config.blocks;
            let create =
                Input::CreateReplica { tag: 1, key: KEY, block_size: BlockSize::B4096, blocks };
            self.input(process, life, create);
        } else if process == self.head_at && self.epoch != Epoch::NONE {
            self.after(0, Event::OpenHead);
        }
    }

    fn stop(&mut self, process: usize, power_cut: bool) {
        if self.processes[process].node.is_none() {
            return;
        }
        if self.processes[process].head.is_some() {
            self.serving &= process != self.head_at;
            // Nobody will answer: the guest's requests are undecided for ever.
            self.requests.retain(|_, guest| guest.process != process);
            self.oracle.orphaned(process);
        }
        self.settle_writes(process);
        self.processes[process].stop(power_cut, &mut self.random);
        let silent = self.random.one_in(3);
        for peer in self.network.break_all(process) {
            let delay = if silent { 10_000_000_000 } else { self.random.between(10_000, 500_000) };
            let life = self.processes[peer.0].life;
            self.after(delay, Event::Deliver { at: peer, life });
        }
        let delay = self.random.between(1_000_000, 3_000_000_000);
        self.after(delay, Event::Start { process });
    }

    /// Writes under way when their process dies have reached the disk, page by page, or not.
    fn settle_writes(&mut self, process: usize) {
        for event in self.events.values() {
            let Event::Disk { process: owner, life, operation } = event else { continue };
            let DiskKind::Write { offset, parts } = &operation.kind else { continue };
            let owner = &mut self.processes[*owner];
            if owner.index != process || owner.life != *life || self.random.one_in(3) {
                continue;
            }
            let torn = self.random.one_in(2);
            let mut at = *offset;
            for page in parts.iter().flat_map(|part| part.bytes().chunks_exact(PAGE_BYTES)) {
                if !torn || self.random.one_in(2) {
                    owner.disks[usize::from(operation.device.0)].write(at, page);
                }
                at += PAGE_BYTES as u64;
            }
        }
    }

    fn input(&mut self, process: usize, life: u64, input: Input) {
        let now = self.now;
        if self.processes[process].life != life {
            return;
        }
        let Some(node) = &mut self.processes[process].node else { return };
        let before = (self.config.allocations)();
        node.handle(now, input);
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
        let life = self.processes[process].life;
        while let Some(operation) =
            self.processes[process].node.as_mut().and_then(node::Node::poll_disk)
        {
            let delay = match self.random.below(200) {
                0 if self.config.hiccups => self.random.between(1_000_000, 20_000_000),
                _ => self.random.between(15_000, 120_000),
            };
            let operation = Box::new(operation);
            self.after(delay, Event::Disk { process, life, operation });
        }
        self.schedule_tick(process);
    }

    fn schedule_tick(&mut self, process: usize) {
        let life = self.processes[process].life;
        let deadline = self.processes[process].node.as_ref().and_then(node::Node::next_deadline);
        let Some(deadline) = deadline.map(|at| at.max(self.now)) else { return };
        if self.processes[process].tick_at.is_none_or(|at| deadline < at) {
            self.processes[process].tick_at = Some(deadline);
            let nanos = u64::try_from(deadline.since(self.now).as_nanos()).expect("soon");
            self.processes[process].count_tick(nanos);
            self.after(nanos + 1, Event::Tick { process, life });
        }
    }

    fn output(&mut self, process: usize, output: Output) {
        let life = self.processes[process].life;
        match output {
            Output::Connect { connection, address } => {
                let delay = self.random.between(20_000, 200_000);
                self.after(delay, Event::Connect { process, life, connection, address });
            }
            Output::Receive { connection, buffer, region, min_bytes: _ } => {
                let at = (process, connection);
                self.network.receive(at, buffer, region);
                self.after(0, Event::Deliver { at, life });
            }
            Output::Send { connection, part } => self.send(process, connection, part.bytes()),
            Output::Close { connection } => {
                let peer = self.network.shut((process, connection));
                self.after(1_000, Event::Closed { at: (process, connection), life });
                if let Some(at) = peer {
                    let delay = self.random.between(10_000, 200_000);
                    let life = self.processes[at.0].life;
                    self.after(delay, Event::Deliver { at, life });
                }
            }
            Output::Reply { reply, .. } => self.reply(reply),
            Output::ControlDone { result, .. } => {
                if let Err(error) = result {
                    self.fail(&format!("the replica could not be made: {error}"));
                }
                self.provisioned += 1;
            }
            Output::PoolOpened(Ok(())) => self.process_opened(process),
            Output::PoolOpened(Err(error)) => self.fail(&format!("a pool does not open: {error}")),
            Output::PoolFailed(failure) => self.fail(&format!("no device failed: {failure}")),
            Output::PoolNotice(store::Notice::Damaged(_)) => self.fail("nothing was damaged"),
            Output::PoolNotice(_) | Output::Fill { .. } | Output::Peer { .. } => {}
            Output::Head { event, epoch, .. } => self.head_event(process, epoch, event),
        }
    }

    // Disks and network.

    fn disk_done(&mut self, process: usize, life: u64, operation: DiskOperation) {
        if self.processes[process].life != life {
            return;
        }
        let disk = &mut self.processes[process].disks[usize::from(operation.device.0)];
        let result = match operation.kind {
            DiskKind::Read { offset, mut buffer, start, length } => {
                disk.read(offset, &mut buffer.payload_mut()[start..start + length]);
                DiskResult::Read(Ok(buffer))
            }
            DiskKind::Write { offset, parts } => {
                let mut at = offset;
                for part in parts.iter() {
                    disk.write(at, part.bytes());
                    at += part.len() as u64;
                }
                DiskResult::Written(Ok(()))
            }
            DiskKind::Sync => {
                disk.sync();
                DiskResult::Synced(Ok(()))
            }
            DiskKind::Discard { .. } => DiskResult::Discarded(Ok(())),
        };
        let id: DiskId = operation.id;
        self.input(process, life, Input::DiskDone { id, result });
    }

    fn connect(
        &mut self,
        process: usize,
        life: u64,
        connection: ConnectionId,
        to: core::net::SocketAddr,
    ) {
        if self.processes[process].life != life {
            return;
        }
        let target = (0..self.config.servers).find(|index| address(*index) == to);
        let target = target.filter(|index| self.processes[*index].open);
        let Some(target) = target else {
            let result = Err(std::io::ErrorKind::ConnectionRefused);
            self.input(process, life, Input::Connected { connection, result });
            return;
        };
        self.accepted += 1;
        let accepted = self.accepted;
        self.network.join((process, connection), (target, ConnectionId::Accepted(accepted)));
        let target_life = self.processes[target].life;
        self.input(target, target_life, Input::Accepted { connection: accepted });
        self.input(process, life, Input::Connected { connection, result: Ok(()) });
    }

    fn send(&mut self, process: usize, connection: ConnectionId, bytes: &[u8]) {
        let from = (process, connection);
        self.network.send(from, bytes);
        if let Some(at) = self.network.peer(from) {
            let delay = match self.random.below(500) {
                0 if self.config.hiccups => self.random.between(1_000_000, 30_000_000),
                _ => self.random.between(5_000, 60_000),
            };
            let life = self.processes[at.0].life;
            self.after(delay, Event::Deliver { at, life });
        }
        let now = self.now;
        let before = (self.config.allocations)();
        if let Some(node) = &mut self.processes[process].node {
            node.handle(now, Input::Sent { connection, bytes: bytes.len() });
        }
        self.note_allocations(before);
    }

    fn deliver(&mut self, at: End, life: u64) {
        if self.processes[at.0].life != life {
            return;
        }
        if let Some(delivery) = self.network.deliver(at, &mut self.random) {
            let (buffer, bytes) = (delivery.buffer, delivery.bytes);
            self.input(at.0, life, Input::Received { connection: at.1, buffer, bytes });
            let delay = self.random.between(1_000, 10_000);
            self.after(delay, Event::Deliver { at, life });
        }
    }

    // The head.

    fn records(&self) -> (VolumeRecord, ShardRecord) {
        let volume = VolumeRecord {
            id: VOLUME,
            name: "simulated".to_owned(),
            size_bytes: self.config.blocks * PAGE_BYTES as u64,
            block_size: BlockSize::B4096,
            policy: Policy {
                replicas: u8::try_from(self.config.servers).expect("few servers"),
                durability: self.config.durability,
                stall_deadline_ms: None,
                read_only: false,
            },
            epoch: self.epoch,
            holder: None,
        };
        let members = (0..self.config.servers)
            .map(|index| Member {
                server: server_id(index),
                pool: pool_id(index),
                role: Role::InSync,
            })
            .collect();
        (
            volume,
            ShardRecord {
                volume: VOLUME,
                shard: ShardIndex(0),
                members,
                failover: Vec::new(),
                moves: Vec::new(),
            },
        )
    }

    fn open_head(&mut self) {
        let process = self.head_at;
        if !self.processes[process].open {
            return;
        }
        if let Some(head) = self.processes[process].head {
            // An earlier head that has not been told yet that it is deposed. Its end opens the
            // new one.
            if !self.serving {
                let life = self.processes[process].life;
                self.input(process, life, Input::AbandonHead(head));
            }
            return;
        }
        self.epoch = self.epoch.next();
        self.report.heads += 1;
        let (volume, shard) = self.records();
        let now = self.now;
        let node = self.processes[process].node.as_mut().expect("an open process runs");
        match node.open_head(now, volume, shard) {
            Ok(head) => self.processes[process].head = Some(head),
            Err(error) => self.fail(&format!("no head was made: {error}")),
        }
        self.pump(process);
    }

    fn head_event(&mut self, process: usize, epoch: Epoch, event: HeadEvent) {
        match event {
            HeadEvent::Opened { .. } => self.serving |= epoch == self.epoch,
            HeadEvent::Superseded { sealed } => {
                if sealed <= epoch {
                    self.fail("a head was superseded by no higher epoch");
                }
            }
            HeadEvent::Failed { reason } => self.fail(&format!("a head ended itself: {reason}")),
            HeadEvent::Ended => {
                self.processes[process].head = None;
                self.oracle.orphaned(process);
                if process == self.head_at {
                    self.serving = false;
                    self.after(1_000_000, Event::OpenHead);
                }
            }
            HeadEvent::Stalled { .. }
            | HeadEvent::Resumed
            | HeadEvent::MemberSlow { .. }
            | HeadEvent::Released => {}
        }
    }

    // The guest.

    fn submit(&mut self) {
        let pause = self.random.between(2_000, 80_000);
        if self.next_request > self.config.requests {
            return;
        }
        self.after(pause, Event::Submit);
        if self.requests.len() >= 32 || !self.serving {
            return;
        }
        let kind = match self.random.below(20) {
            0 => Kind::Flush,
            1 => Kind::Discard,
            2..=8 => Kind::Read,
            _ => Kind::Write,
        };
        let blocks = match self.random.below(8) {
            0 => self.random.between(1, 32),
            _ => self.random.between(1, 3),
        };
        let blocks = blocks.min(self.config.blocks);
        let lba = self.random.below(self.config.blocks - blocks + 1);
        // Now and then somebody goes on using a head that was deposed.
        let process = match self.random.below(4) {
            0 => self.random.index(self.processes.len()),
            _ => self.head_at,
        };
        self.submit_request(process, kind, lba, blocks);
    }

    fn submit_request(&mut self, process: usize, kind: Kind, lba: u64, blocks: u64) {
        let stale = self.serving && process != self.head_at;
        let Some(head) = self.processes[process].head else { return };
        let node = self.processes[process].node.as_ref().expect("a head is in a process");
        if node.room(head) == 0 {
            return;
        }
        let bytes = usize::try_from(blocks).expect("few") * PAGE_BYTES;
        let Some(mut buffer) = self.processes[process].guest_buffers.take(bytes) else { return };
        let number = self.next_write;
        let operation = match kind {
            Kind::Read => Operation::Read { buffer },
            Kind::Flush => Operation::Flush,
            Kind::Discard => {
                self.next_write += 1;
                Operation::Discard
            }
            Kind::Write => {
                self.next_write += 1;
                fill(&mut buffer, lba, blocks, number);
                Operation::Write { buffer, fua: self.random.one_in(10) }
            }
        };
        for block in lba..lba + blocks {
            let block = usize::try_from(block).expect("a small volume");
            match kind {
                Kind::Write | Kind::Discard if stale => {}
                Kind::Write => self.oracle.submitted(block, number, number, process),
                Kind::Discard => self.oracle.submitted(block, number, 0, process),
                Kind::Read | Kind::Flush => {}
            }
        }
        let id = RequestId(self.next_request);
        self.next_request += 1;
        let submitted = self.oracle.stamp();
        self.trace(&format!("submit {kind:?} #{number} {lba}+{blocks} {submitted:?}"), lba, blocks);
        self.requests.insert(id.0, Guest { lba, blocks, kind, number, submitted, process, stale });
        let count = BlockCount(u32::try_from(blocks).expect("few"));
        let request = BlockRequest { id, lba: Lba(lba), blocks: count, operation };
        let life = self.processes[process].life;
        self.input(process, life, Input::Request { head, front_end: FrontEnd(1), request });
    }

    fn reply(&mut self, reply: BlockReply) {
        let Some(guest) = self.requests.remove(&reply.id.0) else {
            self.fail(&format!("request {} was answered twice or never made", reply.id.0));
        };
        match reply.status {
            Status::Ok => {}
            // Given back: it may or may not have landed.
            Status::Superseded => return,
            other => self.fail(&format!("the guest saw an error: {other} for {guest:?}")),
        }
        if guest.stale {
            match guest.kind {
                // No read grants yet: a deposed head that has not been told reads old data. And what
                // it acknowledged itself is on media: it may say so.
                Kind::Read | Kind::Flush => return,
                Kind::Write | Kind::Discard => {
                    self.fail(&format!("a deposed head acknowledged {guest:?}"))
                }
            }
        }
        self.report.answered += 1;
        self.trace(&format!("answer {guest:?}"), guest.lba, guest.blocks);
        let blocks = guest.lba..guest.lba + guest.blocks;
        match guest.kind {
            Kind::Flush => {}
            Kind::Write | Kind::Discard => {
                for block in blocks {
                    let block = usize::try_from(block).expect("a small volume");
                    self.oracle.acknowledged(block, guest.number);
                }
            }
            Kind::Read => {
                let data = reply.data.expect("a good read has data");
                let pages = data.bytes().chunks_exact(PAGE_BYTES);
                if pages.len() as u64 != guest.blocks {
                    self.fail("a read returned another length");
                }
                for (block, page) in blocks.zip(pages) {
                    let checked = value_of(page, block).and_then(|value| {
                        let block = usize::try_from(block).expect("small");
                        self.oracle.read(block, guest.submitted, value)
                    });
                    if let Err(violation) = checked {
                        self.fail(&violation);
                    }
                }
            }
        }
    }

    /// What happens to the block that is being looked at.
    fn trace(&self, what: &str, lba: u64, blocks: u64) {
        if self.config.trace_block.is_some_and(|block| (lba..lba + blocks).contains(&block)) {
            println!("{} {what}", self.now);
        }
    }

    // Faults.

    fn fault(&mut self) {
        if !self.faults_on {
            return;
        }
        let pause = self.random.between(1_000_000, 400_000_000);
        self.after(pause, Event::Fault);
        if !self.serving && !self.random.one_in(8) {
            return;
        }
        self.report.faults += 1;
        let down = self.processes.iter().filter(|process| process.node.is_none()).count();
        let may_lose = (self.config.servers - 1) / 2;
        match self.random.below(6) {
            // kill -9 of a process, while a majority lives on (their caches are the kernel's).
            0 | 1 => {
                let victim = self.random.index(self.processes.len());
                self.stop(victim, false);
            }
            // A power cut of one server, if that leaves every acknowledged write a copy.
            2 if down < may_lose && self.config.durability == Durability::Durable => {
                let victim = self.random.index(self.config.servers);
                if self.processes.iter().all(|process| process.node.is_some()) {
                    self.stop(victim, true);
                }
            }
            // A connection breaks.
            3 | 4 => {
                let process = self.random.index(self.processes.len());
                if let Some(end) = self.network.any_of(process, &mut self.random) {
                    self.break_connection(end);
                }
            }
            // Another process becomes head while the old one may still run.
            _ => {
                if self.epoch != Epoch::NONE {
                    self.head_at = self.random.index(self.processes.len());
                    self.serving = false;
                    self.after(0, Event::OpenHead);
                }
            }
        }
    }

    fn break_connection(&mut self, end: End) {
        let peer = self.network.shut(end);
        let life = self.processes[end.0].life;
        self.after(1_000, Event::Closed { at: end, life });
        if let Some(at) = peer {
            let life = self.processes[at.0].life;
            self.after(10_000, Event::Deliver { at, life });
        }
    }

    /// Faults stop; what is down comes back by itself.
    fn heal(&mut self) {
        self.faults_on = false;
        for process in 0..self.processes.len() {
            self.after(0, Event::Start { process });
        }
        self.after(0, Event::OpenHead);
    }

    fn read_everything(&mut self, bound: Instant) {
        let mut lba = 0;
        while lba < self.config.blocks {
            let blocks = (self.config.blocks - lba).min(32);
            let before = self.next_request;
            self.submit_request(self.head_at, Kind::Read, lba, blocks);
            if self.next_request == before {
                // Members that are behind still hold buffers.
                let later = self.now + Duration::from_millis(1);
                self.run_until(bound, "for a free buffer", |world| world.now >= later);
                continue;
            }
            lba += blocks;
            self.run_until(bound, "to read everything back", |world| world.requests.is_empty());
        }
        for process in 0..self.processes.len() {
            let life = self.processes[process].life;
            if let Some(node) = self.processes[process].node.as_ref()
                && self.processes[process].open
            {
                node.check_invariants();
            }
            self.input(process, life, Input::StopConnections);
        }
    }
}
