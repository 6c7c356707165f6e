//! Nodes in one thread: production machines over byte pipes, disks that answer at once, and a
//! clock that jumps to the next thing that is due. Nothing is random.

use core::net::SocketAddr;
use core::time::Duration;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io::ErrorKind;

use base::limits::PAGE_BYTES;
use base::{
    BlockCount, BlockReply, BlockRequest, BlockSize, BufferMut, BufferPool, ClusterId, Durability,
    Epoch, HolderId, Instant, Lba, Member, Operation, Policy, PoolId, ReplicaKey, RequestId, Role,
    ServerId, ShardIndex, ShardRecord, Status, VolumeId, VolumeRecord,
};
use node::metrics::NodeCounters;
use node::{
    ConnectionId, FillEvent, FrontEnd, HeadEvent, HeadHandle, Input, Legacy, Node, NodeConfig,
    Output, ServerConfig,
};
use nvme::{ReceiveRegion, TargetConfig};
use store::{
    DeviceInfo, DeviceRole, DiskError, DiskKind, DiskOperation, DiskResult, FlushPolicy,
    FormatConfig, StoreConfig,
};
use volume::{MemberStatus, Tunables};

const CLUSTER: ClusterId = ClusterId::from_bytes([0xc1; 16]);
const VOLUME: VolumeId = VolumeId::from_bytes([0xd1; 16]);
/// The one replica of each server.
pub(crate) const KEY: ReplicaKey = ReplicaKey { volume: VOLUME, shard: ShardIndex(0) };
/// Blocks of a home chunk.
pub(crate) const CHUNK_BLOCKS: u64 = 16;
const BLOCK_BYTES: usize = 4096;
const LOG_BYTES: u64 = 12 << 20;
const HOME_BYTES: u64 = 96 << 20;

type End = (usize, ConnectionId);
type Page = Box<[u8; PAGE_BYTES]>;

fn id(index: usize, kind: u8) -> [u8; 16] {
    let mut bytes = [kind; 16];
    bytes[0] = u8::try_from(index + 1).expect("few machines");
    bytes
}

/// The server of a machine.
pub(crate) fn server(index: usize) -> ServerId {
    ServerId::from_bytes(id(index, 0x5e))
}

fn pool(index: usize) -> PoolId {
    PoolId::from_bytes(id(index, 0x70))
}

fn address(index: usize) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 4420 + u16::try_from(index).expect("few machines")))
}

fn devices() -> Vec<DeviceInfo> {
    vec![
        DeviceInfo { bytes: LOG_BYTES, role: DeviceRole::Fast },
        DeviceInfo { bytes: HOME_BYTES, role: DeviceRole::Mass },
    ]
}

/// A shard record: each machine with its role.
pub(crate) fn shard(members: &[(usize, Role)]) -> ShardRecord {
    let member =
        |&(index, role): &(usize, Role)| Member { server: server(index), pool: pool(index), role };
    let members = members.iter().map(member).collect();
    ShardRecord {
        volume: VOLUME,
        shard: ShardIndex(0),
        members,
        failover: Vec::new(),
        preferred_failover: Vec::new(),
        moves: Vec::new(),
    }
}

/// A machine, with a pool or without.
struct Machine {
    node: Option<Node>,
    disks: Vec<BTreeMap<u64, Page>>,
    /// Its disks refuse writes.
    refusing: bool,
    open: bool,
    replies: BTreeMap<u64, BlockReply>,
    events: Vec<(HeadHandle, HeadEvent)>,
    fills: Vec<FillEvent>,
    control: Option<bool>,
    buffers: BufferPool,
}

#[derive(Default)]
struct Pipe {
    bytes: VecDeque<u8>,
    receive: Option<(BufferMut, ReceiveRegion)>,
    ended: bool,
}

/// How the nodes of a cluster are set up.
#[derive(Clone, Copy)]
pub(crate) struct Setup {
    /// Machines with a pool; one more has none.
    pub(crate) servers: usize,
    /// Of the volume.
    pub(crate) blocks: u64,
    pub(crate) state_messages: bool,
    pub(crate) fill_bytes_per_second: u64,
    /// 0: no scrub.
    pub(crate) scrub_bytes_per_second: u64,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            servers: 3,
            blocks: 256,
            state_messages: true,
            fill_bytes_per_second: 1 << 30,
            scrub_bytes_per_second: 0,
        }
    }
}

/// A cluster with one volume.
pub(crate) struct Cluster {
    pub(crate) now: Instant,
    setup: Setup,
    machines: Vec<Machine>,
    pipes: BTreeMap<End, Pipe>,
    peers: BTreeMap<End, End>,
    /// What one machine sends the other is lost, and nothing is closed.
    cut: BTreeSet<(usize, usize)>,
    accepted: u64,
    epoch: Epoch,
    request: u64,
    /// What each block must hold: a number that is in its every word.
    content: Vec<u64>,
    version: u64,
    rounds: u64,
}

impl Cluster {
    /// Servers with an empty replica each, and a machine without a pool, which is the last one.
    pub(crate) fn new(setup: Setup) -> Self {
        let mut cluster = Self {
            now: Instant::ZERO + Duration::from_secs(1),
            setup,
            machines: Vec::new(),
            pipes: BTreeMap::new(),
            peers: BTreeMap::new(),
            cut: BTreeSet::new(),
            accepted: 0,
            epoch: Epoch::NONE,
            request: 0,
            content: vec![0; usize::try_from(setup.blocks).expect("a small volume")],
            version: 0,
            rounds: 0,
        };
        for index in 0..=setup.servers {
            cluster.machines.push(Machine {
                node: None,
                disks: if index < setup.servers { formatted(index) } else { Vec::new() },
                refusing: false,
                open: false,
                replies: BTreeMap::new(),
                events: Vec::new(),
                fills: Vec::new(),
                control: None,
                buffers: BufferPool::heap(0, 0),
            });
            cluster.start(index);
        }
        for index in 0..setup.servers {
            let (block_size, blocks) = (BlockSize::B4096, setup.blocks);
            cluster.input(
                index,
                Input::CreateReplica { tag: 1, key: KEY, block_size, blocks, epoch: Epoch::NONE },
            );
            cluster.run("to make a replica", |c| c.machines[index].control.is_some());
            assert_eq!(cluster.machines[index].control, Some(true));
        }
        cluster
    }

    /// The machine without a pool.
    pub(crate) fn diskless(&self) -> usize {
        self.setup.servers
    }

    /// Starts a machine's process and waits until it serves.
    pub(crate) fn start(&mut self, index: usize) {
        self.start_after(index, None);
    }

    /// Lets go of a machine's pool in good order, for [`Cluster::start_after`]. Its process ends.
    pub(crate) fn hand_over(&mut self, index: usize) -> Legacy {
        self.input(index, Input::StopConnections);
        let now = self.now;
        let node = self.machines[index].node.as_ref().expect("it runs");
        let legacy = node.legacy(now).expect("it has a pool");
        self.kill(index);
        legacy
    }

    /// Starts a machine whose pool another process has let go of.
    pub(crate) fn start_after(&mut self, index: usize, legacy: Option<Legacy>) {
        let has_pool = index < self.setup.servers;
        let server_config = has_pool.then(|| ServerConfig {
            server: server(index),
            pool: pool(index),
            store: StoreConfig {
                pool: Some(pool(index)),
                cluster: CLUSTER,
                server: server(index),
                buffers: BufferPool::heap(
                    StoreConfig::SMALL_BUFFERS_MIN,
                    StoreConfig::LARGE_BUFFERS_MIN,
                ),
                flush: FlushPolicy { idle: Duration::from_millis(500), ..FlushPolicy::default() },
                scrub_bytes_per_second: self.setup.scrub_bytes_per_second,
            },
            devices: devices(),
            target: TargetConfig::new(server(index)),
            target_buffers: BufferPool::heap(128, 48),
            offer_volumes: false,
        });
        let tunables = Tunables {
            member_bytes_max: 1 << 20,
            backlog_bytes_max: 256 << 10,
            backlog_records_max: 16,
            log_copy_records: 64,
            fill_bytes_per_second: self.setup.fill_bytes_per_second,
            ..Tunables::default()
        };
        let mut node = Node::new(NodeConfig {
            host: HolderId::from_bytes(id(index, 0x40)),
            jitter_seed: index as u64 + 1,
            head_buffers: BufferPool::heap(64, 16),
            peer_buffers: BufferPool::heap(64, 24),
            tunables,
            state_messages: self.setup.state_messages,
            server: server_config,
        });
        if let Some(legacy) = legacy {
            node.inherit(legacy);
        }
        node.set_servers(self.now, (0..self.setup.servers).map(|i| (server(i), address(i))));
        let machine = &mut self.machines[index];
        machine.node = Some(node);
        machine.open = !has_pool;
        machine.buffers = BufferPool::heap(64, 32);
        self.run("to open a pool", |cluster| cluster.machines[index].open);
    }

    /// `kill -9`; what was written is on the disks.
    pub(crate) fn kill(&mut self, index: usize) {
        let machine = &mut self.machines[index];
        machine.node = None;
        machine.open = false;
        machine.events.clear();
        machine.replies.clear();
        let ends: Vec<End> = self.pipes.keys().filter(|end| end.0 == index).copied().collect();
        for end in ends {
            self.shut(end);
        }
    }

    /// Changes a bit of every copy of a block that is on a machine's home device. False: there is none.
    pub(crate) fn rot(&mut self, index: usize, lba: usize) -> bool {
        let value = self.content[lba].to_le_bytes();
        let holds = |page: &&mut Page| page.chunks_exact(8).all(|word| word == value);
        let mut found = false;
        for page in self.machines[index].disks[1].values_mut().filter(holds) {
            page[100] ^= 1;
            found = true;
        }
        found
    }

    /// No disk of a machine takes a write from now on.
    pub(crate) fn refuse_writes(&mut self, index: usize) {
        self.machines[index].refusing = true;
    }

    /// Packets between two machines are lost from now on.
    pub(crate) fn cut(&mut self, a: usize, b: usize) {
        self.cut.extend([(a, b), (b, a)]);
    }

    /// All packets arrive again.
    pub(crate) fn mend(&mut self) {
        self.cut.clear();
    }

    /// Every connection between two machines is reset.
    pub(crate) fn reset_connections(&mut self, a: usize, b: usize) {
        let between = |(end, peer): (&End, &End)| {
            ((end.0, peer.0) == (a, b) || (end.0, peer.0) == (b, a)).then_some(*end)
        };
        let ends: Vec<End> = self.peers.iter().filter_map(between).collect();
        for end in ends {
            self.shut(end);
            self.input(end.0, Input::Closed { connection: end.1 });
        }
    }

    /// A machine's node.
    pub(crate) fn node(&self, index: usize) -> &Node {
        self.machines[index].node.as_ref().expect("the machine runs")
    }

    pub(crate) fn node_mut(&mut self, index: usize) -> &mut Node {
        self.machines[index].node.as_mut().expect("the machine runs")
    }

    pub(crate) fn counters(&self, index: usize) -> NodeCounters {
        self.node(index).counters()
    }

    /// What has happened to the fills of a machine.
    pub(crate) fn fills(&self, index: usize) -> &[FillEvent] {
        &self.machines[index].fills
    }

    /// What has happened to a head.
    pub(crate) fn events(&self, at: usize, head: HeadHandle) -> Vec<HeadEvent> {
        let of_head = self.machines[at].events.iter().filter(|(handle, _)| *handle == head);
        of_head.map(|(_, event)| *event).collect()
    }

    /// A member as a head sees it.
    pub(crate) fn member(&self, at: usize, head: HeadHandle, member: usize) -> MemberStatus {
        let status = self.node(at).heads().find(|(handle, ..)| *handle == head).expect("a head").2;
        let found = status.members.iter().find(|status| status.server == server(member)).copied();
        found.expect("a member")
    }

    /// Wins the next epoch and begins to open a head.
    pub(crate) fn begin_head(&mut self, at: usize, shard: ShardRecord) -> HeadHandle {
        self.epoch = self.epoch.next();
        let volume = VolumeRecord {
            id: VOLUME,
            name: "vol".to_owned(),
            size_bytes: self.setup.blocks * BLOCK_BYTES as u64,
            block_size: BlockSize::B4096,
            policy: Policy {
                replicas: 3,
                durability: Durability::Flush,
                stall_deadline_ms: None,
                read_only: false,
            },
            epoch: self.epoch,
            holder: None,
        };
        let now = self.now;
        self.node_mut(at).open_head(now, volume, shard).expect("a head")
    }

    /// Opens a head.
    pub(crate) fn open_head(&mut self, at: usize, shard: ShardRecord) -> HeadHandle {
        let head = self.begin_head(at, shard);
        self.run("to open a head", |cluster| cluster.is_open(at, head));
        head
    }

    pub(crate) fn is_open(&self, at: usize, head: HeadHandle) -> bool {
        self.events(at, head).iter().any(|event| matches!(event, HeadEvent::Opened { .. }))
    }

    pub(crate) fn has_ended(&self, at: usize, head: HeadHandle) -> bool {
        self.events(at, head).contains(&HeadEvent::Ended)
    }

    /// Ends a head in good order.
    pub(crate) fn release(&mut self, at: usize, head: HeadHandle) {
        self.input(at, Input::ReleaseHead(head));
        self.run("to release a head", |cluster| cluster.has_ended(at, head));
    }

    fn request(
        &mut self,
        at: usize,
        head: HeadHandle,
        lba: u64,
        blocks: u32,
        operation: Operation,
    ) -> u64 {
        self.request += 1;
        let id = self.request;
        let blocks = BlockCount(blocks);
        let request = BlockRequest { id: RequestId(id), lba: Lba(lba), blocks, operation };
        self.input(at, Input::Request { head, front_end: FrontEnd(0), request });
        id
    }

    fn answered(&mut self, at: usize, id: u64) -> BlockReply {
        self.run("for an answer", |cluster| cluster.machines[at].replies.contains_key(&id));
        self.machines[at].replies.remove(&id).expect("it came just now")
    }

    /// Writes something new to some blocks.
    pub(crate) fn write(&mut self, at: usize, head: HeadHandle, lba: u64, blocks: u32) {
        let bytes = blocks as usize * BLOCK_BYTES;
        let mut buffer = self.machines[at].buffers.take(bytes).expect("a buffer");
        self.version += 1;
        for (index, block) in
            buffer.payload_mut()[..bytes].chunks_exact_mut(BLOCK_BYTES).enumerate()
        {
            let block_number = usize::try_from(lba).expect("a small volume") + index;
            let value = self.version << 32 | block_number as u64;
            block.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&value.to_le_bytes()));
            self.content[block_number] = value;
        }
        let id = self.request(at, head, lba, blocks, Operation::Write { buffer, fua: false });
        assert_eq!(self.answered(at, id).status, Status::Ok);
    }

    /// Discards some blocks.
    pub(crate) fn discard(&mut self, at: usize, head: HeadHandle, lba: u64, blocks: u32) {
        let start = usize::try_from(lba).expect("a small volume");
        self.content[start..start + blocks as usize].fill(0);
        let id = self.request(at, head, lba, blocks, Operation::Discard);
        assert_eq!(self.answered(at, id).status, Status::Ok);
    }

    /// Begins a read of one block.
    pub(crate) fn begin_read(&mut self, at: usize, head: HeadHandle, lba: u64) -> u64 {
        let buffer = self.machines[at].buffers.take(BLOCK_BYTES).expect("a buffer");
        self.request(at, head, lba, 1, Operation::Read { buffer })
    }

    /// How a request ended, if it did.
    pub(crate) fn status(&self, at: usize, request: u64) -> Option<Status> {
        self.machines[at].replies.get(&request).map(|reply| reply.status)
    }

    /// Reads every block through a head and compares it with what was written.
    pub(crate) fn check_content(&mut self, at: usize, head: HeadHandle) {
        for lba in (0..self.setup.blocks).step_by(8) {
            let blocks = u32::try_from((self.setup.blocks - lba).min(8)).expect("at most 8");
            let bytes = blocks as usize * BLOCK_BYTES;
            let buffer = self.machines[at].buffers.take(bytes).expect("a buffer");
            let id = self.request(at, head, lba, blocks, Operation::Read { buffer });
            let reply = self.answered(at, id);
            assert_eq!(reply.status, Status::Ok, "block {lba}");
            let data = reply.data.expect("data of a read");
            let start = usize::try_from(lba).expect("a small volume");
            for (index, block) in data.bytes().chunks_exact(BLOCK_BYTES).enumerate() {
                let expected = self.content[start + index].to_le_bytes();
                let good = block.chunks_exact(8).all(|word| word == expected);
                assert!(good, "block {}: {:?}, not {expected:?}", start + index, &block[..8]);
            }
        }
    }

    /// Opens the volume on one replica alone and compares every block. Ends its other heads.
    pub(crate) fn check_replica(&mut self, index: usize) {
        let at = self.diskless();
        let head = self.open_head(at, shard(&[(index, Role::InSync)]));
        self.check_content(at, head);
        self.release(at, head);
    }

    // The world.

    /// Goes on for some time.
    pub(crate) fn run_for(&mut self, duration: Duration) {
        let end = self.now + duration;
        self.run_to(end, |_| false);
        self.now = self.now.max(end);
    }

    /// Goes on until `done`, a minute at most.
    ///
    /// # Panics
    /// If it takes longer.
    pub(crate) fn run(&mut self, what: &str, done: impl Fn(&Self) -> bool) {
        let end = self.now + Duration::from_mins(1);
        if !self.run_to(end, done) {
            let heads = self.machines.iter().enumerate().flat_map(|(index, machine)| {
                let heads = machine.node.iter().flat_map(Node::heads);
                heads.map(move |(_, _, status, _)| format!("\n  at {index}: {status:#?}"))
            });
            let heads: String = heads.collect();
            let fills: Vec<_> = self.machines.iter().map(|machine| &machine.fills).collect();
            panic!("it takes too long {what}; fills: {fills:?}; heads:{heads}");
        }
    }

    fn run_to(&mut self, end: Instant, done: impl Fn(&Self) -> bool) -> bool {
        let mut ticks = 0;
        loop {
            while self.round() {
                ticks = 0;
                self.now = self.now + Duration::from_micros(2);
                if done(self) {
                    return true;
                }
            }
            if done(self) {
                return true;
            }
            let deadlines = self.machines.iter().filter_map(|machine| machine.node.as_ref());
            let next = deadlines.filter_map(Node::next_deadline).min();
            let Some(next) = next.filter(|next| *next <= end) else { return false };
            self.now = self.now.max(next);
            ticks += 1;
            assert!(ticks < 1000, "ticks change nothing at {}", self.now);
            for index in 0..self.machines.len() {
                let node = self.machines[index].node.as_ref();
                if node.and_then(Node::next_deadline).is_some_and(|at| at <= self.now) {
                    self.input(index, Input::Tick);
                }
            }
        }
    }

    /// Hands something to a machine, if it runs.
    pub(crate) fn input(&mut self, index: usize, input: Input) {
        if let Some(node) = &mut self.machines[index].node {
            node.handle(self.now, input);
        }
    }

    /// Performs what nodes ask for and delivers what was sent; false if there was nothing.
    fn round(&mut self) -> bool {
        let mut progress = false;
        self.rounds += 1;
        for index in 0..self.machines.len() {
            while let Some(output) = self.machines[index].node.as_mut().and_then(Node::poll_output)
            {
                progress = true;
                self.output(index, output);
            }
            while let Some(operation) = self.machines[index].node.as_mut().and_then(Node::poll_disk)
            {
                progress = true;
                let machine = &mut self.machines[index];
                let (id, result) = perform(&mut machine.disks, machine.refusing, operation);
                self.input(index, Input::DiskDone { id, result });
            }
            if let Some(node) = &self.machines[index].node
                && self.machines[index].open
                && self.rounds.is_multiple_of(64)
            {
                node.check_invariants();
            }
        }
        let ready: Vec<End> =
            self.pipes.iter().filter(|(at, p)| self.is_ready(at, p)).map(|(at, _)| *at).collect();
        for at in ready {
            progress = true;
            self.deliver(at);
        }
        progress
    }

    fn is_ready(&self, at: &End, pipe: &Pipe) -> bool {
        let open = self.peers.get(at).is_none_or(|peer| !self.cut.contains(&(peer.0, at.0)));
        open && pipe.receive.is_some() && (pipe.ended || !pipe.bytes.is_empty())
    }

    fn deliver(&mut self, at: End) {
        let Some(pipe) = self.pipes.get_mut(&at) else { return };
        let Some((mut buffer, region)) = pipe.receive.take() else { return };
        let bytes = pipe.bytes.len().min(region.len());
        let out = &mut region.bytes(&mut buffer)[..bytes];
        let (front, back) = pipe.bytes.as_slices();
        let split = front.len().min(bytes);
        out[..split].copy_from_slice(&front[..split]);
        out[split..].copy_from_slice(&back[..bytes - split]);
        pipe.bytes.drain(..bytes);
        self.input(at.0, Input::Received { connection: at.1, buffer, bytes });
    }

    fn output(&mut self, index: usize, output: Output) {
        let machine = &mut self.machines[index];
        match output {
            Output::Connect { connection, address } => self.connect(index, connection, address),
            Output::Receive { connection, buffer, region, .. } => {
                if let Some(pipe) = self.pipes.get_mut(&(index, connection)) {
                    pipe.receive = Some((buffer, region));
                }
            }
            Output::Send { connection, part } => {
                let from = (index, connection);
                if let Some(peer) = self.peers.get(&from)
                    && let Some(pipe) = self.pipes.get_mut(peer)
                {
                    pipe.bytes.extend(part.bytes());
                }
                self.input(index, Input::Sent { connection, bytes: part.len() });
            }
            Output::Close { connection } => {
                self.shut((index, connection));
                self.input(index, Input::Closed { connection });
            }
            Output::Reply { reply, .. } => {
                machine.replies.insert(reply.id.0, reply);
            }
            Output::ControlDone { result, .. } => machine.control = Some(result.is_ok()),
            Output::PoolOpened(result) => {
                result.expect("the pool is good");
                machine.open = true;
            }
            Output::PoolFailed(failure) => assert!(machine.refusing, "{failure}"),
            Output::Head { head, event, .. } => machine.events.push((head, event)),
            Output::Fill { event, .. } => machine.fills.push(event),
            Output::PoolNotice(_) | Output::Peer { .. } | Output::Refused { .. } => {}
        }
    }

    fn connect(&mut self, index: usize, connection: ConnectionId, address: SocketAddr) {
        let target = usize::from(address.port() - 4420);
        if self.cut.contains(&(index, target)) {
            return; // nobody answers
        }
        if !self.machines[target].open {
            let result = Err(ErrorKind::ConnectionRefused);
            return self.input(index, Input::Connected { connection, result });
        }
        self.accepted += 1;
        let (here, there) = ((index, connection), (target, ConnectionId::Accepted(self.accepted)));
        self.peers.extend([(here, there), (there, here)]);
        self.pipes.extend([(here, Pipe::default()), (there, Pipe::default())]);
        self.input(index, Input::Connected { connection, result: Ok(()) });
        self.input(target, Input::Accepted { connection: self.accepted, from: None });
    }

    /// One end is gone; the other reads what was sent, and then the end.
    fn shut(&mut self, end: End) {
        self.pipes.remove(&end);
        if let Some(peer) = self.peers.remove(&end)
            && let Some(pipe) = self.pipes.get_mut(&peer)
        {
            pipe.ended = true;
        }
    }
}

fn formatted(index: usize) -> Vec<BTreeMap<u64, Page>> {
    let mut disks = vec![BTreeMap::new(), BTreeMap::new()];
    let writes = store::format(&FormatConfig {
        pool: pool(index),
        cluster: CLUSTER,
        server: server(index),
        devices: devices(),
        log_bytes: 0,
        segment_bytes: 512 * 1024,
        chunk_bytes: CHUNK_BLOCKS * BLOCK_BYTES as u64,
        replicas_max: 8,
    })
    .expect("the disks suffice");
    for write in writes {
        write_pages(&mut disks[usize::from(write.device.0)], write.offset, &write.bytes);
    }
    disks
}

fn write_pages(disk: &mut BTreeMap<u64, Page>, offset: u64, bytes: &[u8]) {
    for (page, chunk) in (offset / PAGE_BYTES as u64..).zip(bytes.chunks_exact(PAGE_BYTES)) {
        let chunk: &[u8; PAGE_BYTES] = chunk.try_into().expect("chunks are pages");
        disk.insert(page, Box::new(*chunk));
    }
}

fn perform(
    disks: &mut [BTreeMap<u64, Page>],
    refusing: bool,
    operation: DiskOperation,
) -> (store::DiskId, DiskResult) {
    let disk = &mut disks[usize::from(operation.device.0)];
    let result = match operation.kind {
        DiskKind::Read { offset, mut buffer, start, length } => {
            let out = &mut buffer.payload_mut()[start..start + length];
            let first = offset / PAGE_BYTES as u64;
            for (page, chunk) in (first..).zip(out.chunks_exact_mut(PAGE_BYTES)) {
                match disk.get(&page) {
                    Some(bytes) => chunk.copy_from_slice(&bytes[..]),
                    None => chunk.fill(0),
                }
            }
            DiskResult::Read(Ok(buffer))
        }
        DiskKind::Write { .. } if refusing => DiskResult::Written(Err(DiskError::Io)),
        DiskKind::Write { mut offset, parts } => {
            for part in parts.iter() {
                write_pages(disk, offset, part.bytes());
                offset += part.len() as u64;
            }
            DiskResult::Written(Ok(()))
        }
        DiskKind::Sync => DiskResult::Synced(Ok(())),
        DiskKind::Discard { .. } => DiskResult::Discarded(Ok(())),
    };
    (operation.id, result)
}
