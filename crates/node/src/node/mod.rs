//! The node: routes between the store, the target, the peers and the heads of one process.

mod connections;
mod filling;
mod members;
mod replicas;
mod states;
mod volumes;

use core::net::SocketAddr;
use std::collections::{BTreeMap, VecDeque};

use base::time::earliest;
use base::{
    BlockCount, BufferPool, Epoch, HolderId, Instant, Lba, PoolId, ReplicaKey, RequestId, ServerId,
    ShardRecord, Slab, VolumeId, VolumeRecord,
};
use nvme::target::Input as TargetInput;
use nvme::{SessionId, Target, TargetConfig, VolumeExport};
use store::{DeviceInfo, DiskOperation, Store, StoreConfig};
use volume::{Head, HeadConfig, HeadError, HeadStatus, Tunables};

use self::states::Standing;
use crate::damage::Damage;
use crate::fills::{Fills, Step};
use crate::heads::Heads;
use crate::io::{ConnectionId, FrontEnd, HeadHandle, Input, Output};
use crate::legacy::Legacy;
use crate::metrics::{Counters, NodeCounters, OperationKind};
use crate::peers::Peers;
use crate::replica_service::{Origin, ReplicaService};

/// What a node is made from.
pub struct NodeConfig {
    /// Who this process is to the servers it connects to.
    pub host: HolderId,
    /// Seeds the jitter of reconnects.
    pub jitter_seed: u64,
    /// Buffers of heads: log copies, discards, reads that are tried again.
    pub head_buffers: BufferPool,
    /// Buffers of connections to peers.
    pub peer_buffers: BufferPool,
    /// Limits of heads. What members may keep of the guests' buffers
    /// (`member_bytes_max` and twice `backlog_bytes_max`) must be well below what there is, or a slow
    /// member holds up guests.
    pub tunables: Tunables,
    /// Tell heads and hear from servers what happens, as it happens. Without it they find out by
    /// themselves, later: for tests.
    pub state_messages: bool,
    /// The pool and the replica service; `None` for a diskless head.
    pub server: Option<ServerConfig>,
}

/// The part of a node that only a server has.
pub struct ServerConfig {
    /// This server.
    pub server: ServerId,
    /// Its pool: members that name another one are not this server's.
    pub pool: PoolId,
    /// How the store opens the pool.
    pub store: StoreConfig,
    /// The pool's devices, in the order of their indexes.
    pub devices: Vec<DeviceInfo>,
    /// How connections are accepted.
    pub target: TargetConfig,
    /// Buffers of accepted connections.
    pub target_buffers: BufferPool,
    /// Offer volumes whose head runs here to stock initiators. Nobody is authenticated.
    pub offer_volumes: bool,
}

/// Why a head was not made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenHeadError {
    /// The records cannot make a head.
    #[error(transparent)]
    Head(#[from] HeadError),
    /// There is a head of the volume here.
    #[error("a head of volume {volume} runs here in {epoch}")]
    Exists {
        /// The volume.
        volume: VolumeId,
        /// Its epoch.
        epoch: Epoch,
    },
    /// The process serves as many volumes as it may.
    #[error("this process serves {} volumes already", base::limits::VOLUMES_MAX)]
    TooMany,
}

/// The pool of a server and who may use it.
struct Server {
    server: ServerId,
    pool: PoolId,
    store: Store,
    target: Target,
    offer_volumes: bool,
    service: ReplicaService,
    fills: Fills,
    standing: Standing,
    /// What a scrub found here and nobody has mended yet.
    damage: Damage,
    /// Connections that were not taken.
    refused: u64,
    /// The hosts behind the target's replica sessions.
    sessions: BTreeMap<u64, HolderId>,
    /// Commands that the store has not answered.
    commands: Slab<StoreCommand>,
    /// What the process that had the pool before has left; until it is open.
    legacy: Option<Legacy>,
}

/// Whom the store's answer is for.
#[derive(Clone, Copy, Debug)]
enum StoreCommand {
    /// A session's command.
    Replica { key: ReplicaKey, epoch: Epoch, origin: Origin, tag: u64 },
    /// A session's Append, of these blocks.
    Append { key: ReplicaKey, epoch: Epoch, origin: Origin, tag: u64, lba: Lba, blocks: BlockCount },
    /// A session's Grow, which makes the replica larger.
    Grow { key: ReplicaKey, epoch: Epoch, origin: Origin, tag: u64 },
    /// A fill's command.
    Fill { fill: u64, step: Step },
    /// `CreateReplica`.
    Create { key: ReplicaKey, tag: u64, epoch: Epoch },
    /// The first Seal of a replica that was made.
    FirstSeal { key: ReplicaKey, tag: u64 },
    /// `DeleteReplica`.
    Delete { key: ReplicaKey, tag: u64 },
}

/// Whose request a head works on.
#[derive(Clone, Copy, Debug)]
struct Request {
    from: RequestOrigin,
    id: RequestId,
    kind: OperationKind,
    bytes: u64,
    arrived: Instant,
}

#[derive(Clone, Copy, Debug)]
enum RequestOrigin {
    Shell(FrontEnd),
    Nvme(SessionId),
}

/// A server's or a diskless head's whole data plane, without I/O.
pub struct Node {
    host: HolderId,
    head_buffers: BufferPool,
    tunables: Tunables,
    state_messages: bool,
    server: Option<Server>,
    peers: Peers,
    heads: Heads,
    requests: Slab<Request>,
    outputs: VecDeque<Output>,
    disk: VecDeque<DiskOperation>,
    now: Instant,
}

impl Node {
    /// A node; if it has a pool, that begins to open.
    pub fn new(config: NodeConfig) -> Self {
        let server = config.server.map(|server| Server {
            server: server.server,
            pool: server.pool,
            store: Store::open(server.store, &server.devices),
            target: Target::new(server.target, server.target_buffers),
            offer_volumes: server.offer_volumes,
            service: ReplicaService::default(),
            fills: Fills::new(),
            standing: Standing::default(),
            damage: Damage::default(),
            refused: 0,
            sessions: BTreeMap::new(),
            commands: Slab::with_capacity(4096),
            legacy: None,
        });
        Self {
            host: config.host,
            head_buffers: config.head_buffers,
            tunables: config.tunables,
            state_messages: config.state_messages,
            server,
            peers: Peers::new(config.host, config.peer_buffers, config.jitter_seed),
            heads: Heads::new(),
            requests: Slab::with_capacity(1024),
            outputs: VecDeque::with_capacity(1024),
            disk: VecDeque::with_capacity(64),
            now: Instant::ZERO,
        }
    }

    /// Takes in what happened. Take outputs afterwards; several inputs may come first, and what
    /// they cause is then written and sent together.
    pub fn handle(&mut self, now: Instant, input: Input) {
        self.now = now;
        match input {
            Input::Tick => self.tick(),
            Input::DiskDone { id, result } => {
                let server = self.server.as_mut().expect("only a store starts disk operations");
                server.store.handle(now, store::Input::DiskDone { id, result });
            }
            Input::Accepted { connection, from } => {
                let connection = nvme::ConnectionId(connection);
                self.target_input(TargetInput::Accepted { connection, from });
            }
            Input::Connected { connection, result } => self.connected(connection, result),
            Input::Received { connection, buffer, bytes } => match connection {
                ConnectionId::Accepted(connection) => {
                    let connection = nvme::ConnectionId(connection);
                    self.target_input(TargetInput::Received { connection, buffer, bytes });
                }
                ConnectionId::Peer { peer, connection } => {
                    let connection = nvme::ConnectionId(connection);
                    let input = nvme::initiator::Input::Received { connection, buffer, bytes };
                    self.peers.handle(now, peer, input);
                }
            },
            Input::Sent { connection, bytes } => self.sent(connection, bytes),
            Input::Closed { connection } => self.closed(connection),
            Input::CreateReplica { tag, key, block_size, blocks, epoch } => {
                let command = store::Command::Create { key, block_size, blocks };
                self.control(StoreCommand::Create { key, tag, epoch }, tag, command);
            }
            Input::DeleteReplica { tag, key } => {
                if let Some(server) = &mut self.server {
                    server.fills.abort(now, key);
                }
                let command = store::Command::Delete { key };
                self.control(StoreCommand::Delete { key, tag }, tag, command);
            }
            Input::Request { head, front_end, request } => {
                self.request(head, RequestOrigin::Shell(front_end), request);
            }
            Input::GrowHead { head, blocks } => {
                self.heads.handle(now, head.0, volume::Input::Grow { blocks });
            }
            Input::ReleaseHead(head) => self.heads.handle(now, head.0, volume::Input::Release),
            Input::RestHead(head) => self.heads.handle(now, head.0, volume::Input::Rest),
            Input::AbandonHead(head) => self.heads.handle(now, head.0, volume::Input::Abandon),
            Input::StopConnections => {
                // A diskless head accepts no connections and has only its peers.
                if let Some(server) = &mut self.server {
                    server.fills.stop(now);
                    self.target_input(TargetInput::Stop);
                }
                self.peers.stop_all(now);
            }
        }
    }

    /// The next thing to do, until there is none.
    pub fn poll_output(&mut self) -> Option<Output> {
        while self.outputs.is_empty() {
            let mut progress = self.drain_target();
            progress |= self.drain_peers();
            progress |= self.drain_heads();
            progress |= self.drain_store();
            progress |= self.drain_service();
            progress |= self.drain_fills();
            if !progress {
                return None;
            }
        }
        self.outputs.pop_front()
    }

    /// The next disk operation to perform, until there is none; answer each with
    /// [`Input::DiskDone`]. Take them after [`Node::poll_output`] has given `None`.
    pub fn poll_disk(&mut self) -> Option<DiskOperation> {
        self.disk.pop_front()
    }

    /// When to come back with [`Input::Tick`] if nothing happens before.
    pub fn next_deadline(&self) -> Option<Instant> {
        let server = self.server.as_ref().and_then(|server| {
            let machines = earliest(server.store.next_deadline(), server.target.next_deadline());
            let machines = earliest(machines, server.fills.next_deadline());
            earliest(machines, server.service.next_deadline())
        });
        let rest = earliest(self.heads.next_deadline(), self.peers.next_deadline());
        earliest(server, rest)
    }

    /// Replaces the address book that heads find their remote members by.
    pub fn set_servers(
        &mut self,
        now: Instant,
        servers: impl IntoIterator<Item = (ServerId, SocketAddr)>,
    ) {
        self.now = now;
        self.peers.set_addresses(now, servers.into_iter());
        let waiting: Vec<(u64, ServerId)> = self
            .heads
            .iter()
            .flat_map(|(tag, entry)| {
                entry.remote.iter().filter(|(_, retained)| !retained).map(move |(s, _)| (tag, *s))
            })
            .filter(|(_, server)| self.peers.is_addressable(*server))
            .collect();
        for (tag, server) in waiting {
            self.retain_peer(tag, server);
        }
    }

    /// Keeps sessions with these servers (but not with this one) whether or not a head here has
    /// members on them, instead of with those that were named last.
    pub fn keep_connected(&mut self, now: Instant, servers: &[ServerId]) {
        self.now = now;
        let own = self.server.as_ref().map(|server| server.server);
        let others = servers.iter().copied().filter(|server| Some(*server) != own);
        self.peers.keep(now, others.collect());
    }

    /// Another process is about to take the pool: until `until`, what may go home does, so that
    /// the next one has little log to read.
    pub fn hasten_home(&mut self, now: Instant, until: Instant) {
        self.now = now;
        if let Some(server) = &mut self.server {
            server.store.handle(now, store::Input::Hasten { until });
        }
    }

    /// Makes a head; its lease is won. It goes on opening by itself and says
    /// [`HeadEvent::Opened`](crate::HeadEvent::Opened).
    pub fn open_head(
        &mut self,
        now: Instant,
        volume: VolumeRecord,
        shard: ShardRecord,
    ) -> Result<HeadHandle, OpenHeadError> {
        self.now = now;
        if let Some(entry) = self.heads.of_volume(volume.id).and_then(|tag| self.heads.get(tag)) {
            return Err(OpenHeadError::Exists { volume: volume.id, epoch: entry.epoch });
        }
        if self.heads.len() >= base::limits::VOLUMES_MAX {
            return Err(OpenHeadError::TooMany);
        }
        let (local, remote) = self.places(&shard);
        let key = ReplicaKey { volume: volume.id, shard: shard.shard };
        let config = HeadConfig {
            epoch: volume.epoch,
            shard,
            // Its member here may come later.
            local: self.server.as_ref().map(|server| server.server),
            buffers: self.head_buffers.clone(),
            tunables: self.tunables,
            volume,
        };
        let export = VolumeExport {
            volume: config.volume.id,
            blocks: config.volume.blocks(),
            block_size: config.volume.block_size,
            read_only: config.volume.policy.read_only,
        };
        let head = Head::new(config, now)?;
        let members = remote.iter().map(|server| (*server, false)).collect();
        let tag = self.heads.insert(head, key, export, local, members);
        if let Some(server) = local {
            self.heads.handle(now, tag, volume::Input::MemberUp { server });
            self.tell_standing(Origin::Local { head: tag });
        }
        for server in remote {
            self.retain_peer(tag, server);
        }
        Ok(HeadHandle(tag))
    }

    /// How many requests a head takes without one coming back.
    pub fn room(&self, head: HeadHandle) -> usize {
        self.heads.get(head.0).map_or(0, |entry| if entry.ended { 0 } else { entry.head.room() })
    }

    /// The head of a volume, if one runs here.
    pub fn head_of(&self, volume: VolumeId) -> Option<HeadHandle> {
        self.heads.of_volume(volume).map(HeadHandle)
    }

    /// How the heads are doing, with their counters. Made on demand.
    pub fn heads(&self) -> impl Iterator<Item = (HeadHandle, VolumeId, HeadStatus, &Counters)> {
        self.heads.iter().map(|(tag, entry)| {
            (HeadHandle(tag), entry.export.volume, entry.head.status(), &entry.counters)
        })
    }

    /// The server in whose pool a head has a member in this process, if any.
    pub fn local_member(&self, head: HeadHandle) -> Option<ServerId> {
        self.heads.get(head.0)?.local
    }

    /// What there is to say of this server to the process that opens the pool next.
    /// Nothing may be admitted any more: connections have been stopped, heads have ended; and what
    /// the disks were asked to do has ended.
    pub fn legacy(&self, now: Instant) -> Option<Legacy> {
        let server = self.server.as_ref()?;
        let (generation, log) = (server.store.generation(), server.store.log_left());
        Some(Legacy { generation, grants: server.service.grants(now), log })
    }

    /// The pool was let go of by another process, which has left this. To be told before anything is
    /// asked of the disks.
    pub fn inherit(&mut self, legacy: Legacy) {
        if let Some(server) = &mut self.server {
            if let Some(log) = legacy.log.clone() {
                server.store.inherit(legacy.generation, log);
            }
            server.legacy = Some(legacy);
        }
    }

    /// The pool.
    pub fn store(&self) -> Option<&Store> {
        self.server.as_ref().map(|server| &server.store)
    }

    /// True while some session or head commands the replica.
    pub fn is_commanded(&self, key: ReplicaKey) -> bool {
        self.server.as_ref().is_some_and(|server| server.service.is_commanded(key))
    }

    /// Blocks of a replica here that a scrub could not read and that nobody has written again yet.
    pub fn damaged_blocks(&self, key: ReplicaKey) -> u64 {
        let Some(server) = &self.server else { return 0 };
        server.damage.blocks(key, server.store.scrubbed().rounds)
    }

    /// True if there is a session with a peer.
    pub fn is_peer_up(&self, server: ServerId) -> bool {
        self.peers.is_up(server)
    }

    /// What was counted of the node as a whole.
    pub fn counters(&self) -> NodeCounters {
        let Some(server) = &self.server else { return NodeCounters::default() };
        let (seals_held, seals_waited) = server.service.seals_held();
        let fills = server.fills.counters();
        NodeCounters { seals_held, seals_waited, refused: server.refused, fills }
    }

    /// Asserts what must hold between any two calls. For tests and the simulator.
    pub fn check_invariants(&self) {
        for (_, entry) in self.heads.iter() {
            entry.head.check_invariants();
        }
        if let Some(server) = &self.server {
            server.store.check_invariants();
            server.service.check();
            server.fills.check();
        }
    }

    fn tick(&mut self) {
        let now = self.now;
        if let Some(server) = &mut self.server {
            server.store.handle(now, store::Input::Tick);
            server.target.handle(now, TargetInput::Tick);
            server.service.tick(now);
            server.fills.tick(now);
        }
        self.peers.tick(now);
        self.heads.tick(now);
    }
}
