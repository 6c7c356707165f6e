//! The node: routes between the store, the target, the peers and the heads of one process.

use core::net::SocketAddr;
use std::collections::{BTreeMap, VecDeque};

use base::{
    BlockReply, BlockRequest, BufferPool, CommandBody, Epoch, HolderId, Instant, PoolId,
    ReplicaCommand, ReplicaError, ReplicaKey, ReplyBody, RequestId, ServerId, ShardRecord, Slab,
    Status, VolumeId, VolumeRecord,
};
use nvme::initiator::Output as PeerOutput;
use nvme::target::{Input as TargetInput, Output as TargetOutput};
use nvme::{SessionId, Subsystem, Tag, Target, TargetConfig, VolumeExport};
use store::{DeviceInfo, DiskOperation, Store, StoreConfig};
use volume::{Head, HeadConfig, HeadError, HeadStatus, Tunables};

use crate::heads::{HeadEntry, Heads};
use crate::io::{ConnectionId, FrontEnd, HeadEvent, HeadHandle, Input, Output};
use crate::metrics::{Counters, OperationKind};
use crate::peers::{Outgoing, Peers};
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
    /// (`member_bytes_max` and `backlog_bytes_max`) must be well below what there is, or a slow
    /// member holds up guests.
    pub tunables: Tunables,
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
    /// The hosts behind the target's replica sessions.
    sessions: BTreeMap<u64, HolderId>,
    /// Commands that the store has not answered.
    commands: Slab<StoreCommand>,
}

/// Whom the store's answer is for.
#[derive(Clone, Copy, Debug)]
enum StoreCommand {
    /// A session's command.
    Replica { key: ReplicaKey, epoch: Epoch, origin: Origin, tag: u64 },
    /// `CreateReplica`.
    Create { key: ReplicaKey, tag: u64 },
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
            sessions: BTreeMap::new(),
            commands: Slab::with_capacity(4096),
        });
        Self {
            host: config.host,
            head_buffers: config.head_buffers,
            tunables: config.tunables,
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
            Input::Accepted { connection } => {
                let connection = nvme::ConnectionId(connection);
                self.target_input(TargetInput::Accepted { connection });
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
            Input::CreateReplica { tag, key, block_size, blocks } => {
                let command = store::Command::Create { key, block_size, blocks };
                self.control(StoreCommand::Create { key, tag }, tag, command);
            }
            Input::DeleteReplica { tag, key } => {
                let command = store::Command::Delete { key };
                self.control(StoreCommand::Delete { key, tag }, tag, command);
            }
            Input::Request { head, front_end, request } => {
                self.request(head, RequestOrigin::Shell(front_end), request);
            }
            Input::ReleaseHead(head) => self.heads.handle(now, head.0, volume::Input::Release),
            Input::AbandonHead(head) => self.heads.handle(now, head.0, volume::Input::Abandon),
            Input::StopConnections => {
                // A diskless head accepts no connections and has only its peers.
                if self.server.is_some() {
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
            base::time::earliest(server.store.next_deadline(), server.target.next_deadline())
        });
        let rest = base::time::earliest(self.heads.next_deadline(), self.peers.next_deadline());
        base::time::earliest(server, rest)
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

    /// Makes a head; its lease is won. It goes on opening by itself and says
    /// [`HeadEvent::Opened`].
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
        let own = self.server.as_ref().map(|server| (server.server, server.pool));
        let local = shard
            .members
            .iter()
            .find(|member| own == Some((member.server, member.pool)))
            .map(|member| member.server);
        // A member on this very server but in another pool is neither: that pool is gone.
        let remote: Vec<ServerId> = shard
            .members
            .iter()
            .map(|member| member.server)
            .filter(|server| own.is_none_or(|(own, _)| own != *server))
            .collect();
        let config = HeadConfig {
            epoch: volume.epoch,
            shard,
            local,
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
        let tag = self.heads.insert(head, export, local, members);
        if let Some(server) = local {
            self.heads.handle(now, tag, volume::Input::MemberUp { server });
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

    /// The pool.
    pub fn store(&self) -> Option<&Store> {
        self.server.as_ref().map(|server| &server.store)
    }

    /// True while some session or head commands the replica.
    pub fn is_commanded(&self, key: ReplicaKey) -> bool {
        self.server.as_ref().is_some_and(|server| server.service.is_commanded(key))
    }

    /// True if there is a session with a peer.
    pub fn is_peer_up(&self, server: ServerId) -> bool {
        self.peers.is_up(server)
    }

    /// Asserts what must hold between any two calls. For tests and the simulator.
    pub fn check_invariants(&self) {
        for (_, entry) in self.heads.iter() {
            entry.head.check_invariants();
        }
        if let Some(server) = &self.server {
            server.store.check_invariants();
        }
    }

    fn tick(&mut self) {
        let now = self.now;
        if let Some(server) = &mut self.server {
            server.store.handle(now, store::Input::Tick);
            server.target.handle(now, TargetInput::Tick);
        }
        self.peers.tick(now);
        self.heads.tick(now);
    }

    // Connections.

    fn target_input(&mut self, input: TargetInput) {
        let server = self.server.as_mut().expect("only a server accepts connections");
        server.target.handle(self.now, input);
    }

    fn connected(&mut self, connection: ConnectionId, result: Result<(), std::io::ErrorKind>) {
        match connection {
            ConnectionId::Accepted(_) => panic!("accepted connections were not asked for"),
            ConnectionId::Peer { peer, connection } => {
                let connection = nvme::ConnectionId(connection);
                let input = nvme::initiator::Input::Connected { connection, result };
                self.peers.handle(self.now, peer, input);
            }
        }
    }

    fn sent(&mut self, connection: ConnectionId, bytes: usize) {
        match connection {
            ConnectionId::Accepted(connection) => {
                let connection = nvme::ConnectionId(connection);
                self.target_input(TargetInput::Sent { connection, bytes });
            }
            ConnectionId::Peer { peer, connection } => {
                let connection = nvme::ConnectionId(connection);
                let input = nvme::initiator::Input::Sent { connection, bytes };
                self.peers.handle(self.now, peer, input);
            }
        }
    }

    fn closed(&mut self, connection: ConnectionId) {
        match connection {
            ConnectionId::Accepted(connection) => {
                let connection = nvme::ConnectionId(connection);
                self.target_input(TargetInput::Closed { connection });
            }
            ConnectionId::Peer { peer, connection } => {
                let connection = nvme::ConnectionId(connection);
                let input = nvme::initiator::Input::Closed { connection };
                self.peers.handle(self.now, peer, input);
            }
        }
    }

    // Replicas.

    fn control(&mut self, pending: StoreCommand, tag: u64, command: store::Command) {
        let Some(server) = &mut self.server else {
            let result = Err(ReplicaError::NoReplica);
            self.outputs.push_back(Output::ControlDone { tag, result });
            return;
        };
        let tag = server.commands.insert_or_grow(pending);
        server.store.handle(self.now, store::Input::Command { tag, command });
    }

    /// A command for a replica of this server, from whomever.
    fn replica_command(&mut self, origin: Origin, tag: u64, command: ReplicaCommand) {
        let Some(server) = &mut self.server else {
            self.replica_reply(origin, tag, Err(ReplicaError::NoReplica));
            return;
        };
        let client = match origin {
            Origin::Local { .. } => Some(self.host),
            Origin::Remote { session } => server.sessions.get(&session).copied(),
        };
        let admitted = match client {
            Some(client) => server.service.admit(&command, origin, client),
            None => Err(ReplicaError::NotSealed),
        };
        if let Err(error) = admitted {
            self.replica_reply(origin, tag, Err(error));
            return;
        }
        let ReplicaCommand { key, epoch, commit, body } = command;
        let command = match body {
            CommandBody::Seal => store::Command::Seal { key, epoch },
            CommandBody::Append { record, media } => {
                store::Command::Append { key, record, commit, media }
            }
            CommandBody::Read { lba, blocks, covers, buffer } => {
                store::Command::Read { key, lba, blocks, covers, buffer }
            }
            CommandBody::Flush => store::Command::Flush { key },
            CommandBody::Scan { seq, buffer } => store::Command::Scan { key, seq, buffer },
            CommandBody::Truncate { keep } => store::Command::Truncate { key, keep },
            CommandBody::Trim
            | CommandBody::Release
            | CommandBody::Renew
            | CommandBody::Hello { .. } => store::Command::Commit { key, commit },
            CommandBody::HealthOf { .. }
            | CommandBody::Install { .. }
            | CommandBody::List { .. }
            | CommandBody::Fetch { .. } => {
                self.replica_reply(origin, tag, Err(ReplicaError::Invalid));
                return;
            }
        };
        let pending = StoreCommand::Replica { key, epoch, origin, tag };
        let tag = server.commands.insert_or_grow(pending);
        server.store.handle(self.now, store::Input::Command { tag, command });
    }

    fn replica_reply(&mut self, origin: Origin, tag: u64, result: Result<ReplyBody, ReplicaError>) {
        match origin {
            Origin::Local { head } => {
                let Some(server) = self.heads.get(head).and_then(|entry| entry.local) else {
                    return;
                };
                self.heads.handle(self.now, head, volume::Input::Reply { server, tag, result });
            }
            Origin::Remote { session } => {
                let input = TargetInput::ReplicaReply {
                    session: SessionId(session),
                    tag: Tag(tag),
                    result,
                };
                self.target_input(input);
            }
        }
    }

    fn store_done(&mut self, tag: u64, result: Result<ReplyBody, ReplicaError>) {
        let server = self.server.as_mut().expect("a store answers");
        let command = server.commands.remove(tag).expect("a store answers each command once");
        match command {
            StoreCommand::Replica { key, epoch, origin, tag } => {
                let result = server.service.gate(key, epoch, origin, result);
                self.replica_reply(origin, tag, result);
            }
            StoreCommand::Create { key, tag } => {
                if result.is_ok() {
                    let sealed = server.store.replica(key).map_or(Epoch::NONE, |r| r.state.sealed);
                    server.service.add_if_new(key, sealed);
                }
                self.outputs.push_back(Output::ControlDone { tag, result: result.map(|_| ()) });
            }
            StoreCommand::Delete { key, tag } => {
                if result.is_ok() {
                    server.service.remove(key);
                }
                self.outputs.push_back(Output::ControlDone { tag, result: result.map(|_| ()) });
            }
        }
    }

    fn drain_store(&mut self) -> bool {
        let mut progress = false;
        while let Some(output) = self.server.as_mut().and_then(|s| s.store.poll_output()) {
            progress = true;
            match output {
                store::Output::Opened(result) => {
                    let server = self.server.as_mut().expect("a store speaks");
                    if result.is_ok() {
                        for (key, info) in server.store.replicas() {
                            server.service.add_if_new(key, info.state.sealed);
                        }
                    }
                    self.outputs.push_back(Output::PoolOpened(result));
                }
                store::Output::Disk(operation) => self.disk.push_back(operation),
                store::Output::Done { tag, result } => self.store_done(tag, result),
                store::Output::Failed(failure) => {
                    self.outputs.push_back(Output::PoolFailed(failure));
                }
                store::Output::Notice(notice) => self.outputs.push_back(Output::PoolNotice(notice)),
            }
        }
        progress
    }

    fn drain_target(&mut self) -> bool {
        let mut progress = false;
        while let Some(output) = self.server.as_mut().and_then(|s| s.target.poll_output()) {
            progress = true;
            let server = self.server.as_mut().expect("a target speaks");
            match output {
                TargetOutput::Receive(receive) => self.outputs.push_back(Output::Receive {
                    connection: ConnectionId::Accepted(receive.connection.0),
                    buffer: receive.buffer,
                    region: receive.region,
                    min_bytes: receive.min_bytes,
                }),
                TargetOutput::Send { connection, part } => {
                    let connection = ConnectionId::Accepted(connection.0);
                    self.outputs.push_back(Output::Send { connection, part });
                }
                TargetOutput::Close { connection } => {
                    let connection = ConnectionId::Accepted(connection.0);
                    self.outputs.push_back(Output::Close { connection });
                }
                TargetOutput::SessionOpened { session, subsystem, host } => match subsystem {
                    Subsystem::Replica(_) => {
                        server.sessions.insert(session.0, host);
                    }
                    Subsystem::Discovery | Subsystem::Volume(_) => {}
                },
                TargetOutput::SessionClosed { session } => {
                    server.sessions.remove(&session.0);
                    server.service.session_ended(Origin::Remote { session: session.0 });
                }
                TargetOutput::Replica { session, tag, command } => {
                    self.replica_command(Origin::Remote { session: session.0 }, tag.0, command);
                }
                TargetOutput::Block { session, volume, request } => {
                    self.block_from_initiator(session, volume, request);
                }
            }
        }
        progress
    }

    // Peers.

    fn retain_peer(&mut self, head: u64, server: ServerId) {
        if !self.peers.is_addressable(server) {
            return;
        }
        let up = self.peers.retain(self.now, server);
        let entry = self.heads.get_mut(head).expect("callers name live heads");
        for (member, retained) in &mut entry.remote {
            if *member == server {
                *retained = true;
            }
        }
        if up {
            self.heads.handle(self.now, head, volume::Input::MemberUp { server });
        }
    }

    fn drain_peers(&mut self) -> bool {
        let mut progress = false;
        while let Some((peer, server, output)) = self.peers.poll_output() {
            progress = true;
            let id = |connection: nvme::ConnectionId| ConnectionId::Peer {
                peer,
                connection: connection.0,
            };
            match output {
                PeerOutput::Connect { connection, address } => {
                    let connection = id(connection);
                    self.outputs.push_back(Output::Connect { connection, address });
                }
                PeerOutput::Receive(receive) => self.outputs.push_back(Output::Receive {
                    connection: id(receive.connection),
                    buffer: receive.buffer,
                    region: receive.region,
                    min_bytes: receive.min_bytes,
                }),
                PeerOutput::Send { connection, part } => {
                    self.outputs.push_back(Output::Send { connection: id(connection), part });
                }
                PeerOutput::Close { connection } => {
                    self.outputs.push_back(Output::Close { connection: id(connection) });
                }
                PeerOutput::Reply { tag, result } => {
                    let from = self.peers.outgoing.remove(tag.0);
                    let from = from.expect("a peer answers each command once");
                    let input = volume::Input::Reply { server, tag: from.tag, result };
                    self.heads.handle(self.now, from.head, input);
                }
                PeerOutput::Up { namespace: _ } => {
                    if self.peers.set_up(peer, true) {
                        self.heads.member_session(self.now, server, true);
                        self.outputs.push_back(Output::Peer { server, down: None });
                    }
                }
                PeerOutput::Down { reason } => {
                    if self.peers.set_up(peer, false) {
                        self.heads.member_session(self.now, server, false);
                    }
                    self.outputs.push_back(Output::Peer { server, down: Some(reason) });
                }
                // State messages are acted on when fencing and membership changes come.
                PeerOutput::State(_) | PeerOutput::NamespaceChanged(_) => {}
                PeerOutput::BlockReply(_) => {
                    unreachable!("no block requests are sent to replica subsystems")
                }
            }
        }
        progress
    }

    // Heads.

    fn request(&mut self, head: HeadHandle, from: RequestOrigin, mut request: BlockRequest) {
        let id = request.id;
        let Some(entry) = self.heads.get(head.0).filter(|entry| !entry.ended) else {
            self.front_end_reply(from, BlockReply { id, status: Status::Superseded, data: None });
            return;
        };
        let bytes = request.blocks.bytes(entry.export.block_size);
        let kind = OperationKind::of(&request.operation);
        let pending = Request { from, id, kind, bytes, arrived: self.now };
        request.id = RequestId(self.requests.insert_or_grow(pending));
        self.heads.handle(self.now, head.0, volume::Input::Request(request));
    }

    fn block_from_initiator(
        &mut self,
        session: SessionId,
        volume: VolumeId,
        request: BlockRequest,
    ) {
        let from = RequestOrigin::Nvme(session);
        if let Some(head) = self.heads.of_volume(volume) {
            self.request(HeadHandle(head), from, request);
        } else {
            let reply = BlockReply { id: request.id, status: Status::Superseded, data: None };
            self.front_end_reply(from, reply);
        }
    }

    fn front_end_reply(&mut self, from: RequestOrigin, reply: BlockReply) {
        match from {
            RequestOrigin::Shell(front_end) => {
                self.outputs.push_back(Output::Reply { front_end, reply });
            }
            RequestOrigin::Nvme(session) => {
                self.target_input(TargetInput::BlockReply { session, reply });
            }
        }
    }

    /// A head's answer, under the request's own name.
    fn head_reply(&mut self, head: u64, mut reply: BlockReply) {
        let request = self.requests.remove(reply.id.0);
        let request = request.expect("a head answers each request once");
        reply.id = request.id;
        if reply.status != Status::Superseded
            && let Some(entry) = self.heads.get_mut(head)
        {
            let latency = self.now.since(request.arrived);
            entry.counters.count(request.kind, reply.status, request.bytes, latency);
        }
        self.front_end_reply(request.from, reply);
    }

    fn drain_heads(&mut self) -> bool {
        let mut progress = false;
        while let Some((tag, output)) = self.heads.poll_output() {
            progress = true;
            let Some(output) = output else {
                self.bury_if_done(tag);
                continue;
            };
            match output {
                volume::Output::Command { server, tag: command_tag, command } => {
                    self.head_command(tag, server, command_tag, command);
                }
                volume::Output::Reply(reply) => self.head_reply(tag, reply),
                volume::Output::Returned(request) => {
                    let (id, status) = (request.id, Status::Superseded);
                    self.head_reply(tag, BlockReply { id, status, data: None });
                }
                volume::Output::Opened { position } => {
                    self.offer_volume(tag);
                    self.head_event(tag, HeadEvent::Opened { position });
                }
                volume::Output::Superseded { sealed } => {
                    self.head_event(tag, HeadEvent::Superseded { sealed });
                    self.mark_ended(tag);
                }
                volume::Output::Released => {
                    self.head_event(tag, HeadEvent::Released);
                    self.mark_ended(tag);
                }
                volume::Output::Abandoned => self.mark_ended(tag),
                volume::Output::Stalled { reason, since } => {
                    self.head_event(tag, HeadEvent::Stalled { reason, since });
                }
                volume::Output::Resumed => self.head_event(tag, HeadEvent::Resumed),
            }
        }
        progress
    }

    fn head_command(&mut self, head: u64, server: ServerId, tag: u64, command: ReplicaCommand) {
        let local = self.heads.get(head).and_then(|entry| entry.local);
        if local == Some(server) {
            self.replica_command(Origin::Local { head }, tag, command);
            return;
        }
        let from = Outgoing { head, tag };
        if !self.peers.command(self.now, server, from, command) {
            let result = Err(ReplicaError::Disconnected);
            self.heads.handle(self.now, head, volume::Input::Reply { server, tag, result });
        }
    }

    fn head_event(&mut self, tag: u64, event: HeadEvent) {
        let entry = self.heads.get(tag).expect("the head spoke");
        let (volume, epoch) = (entry.export.volume, entry.epoch);
        self.outputs.push_back(Output::Head { head: HeadHandle(tag), volume, epoch, event });
    }

    /// Stock initiators that connect to this server may use the volume from now on, if that is
    /// wanted.
    fn offer_volume(&mut self, tag: u64) {
        let entry = self.heads.get_mut(tag).expect("the head spoke");
        entry.opened = true;
        let export = entry.export;
        if let Some(server) = &mut self.server
            && server.offer_volumes
        {
            server.target.handle(self.now, TargetInput::AddVolume(export));
        }
    }

    fn mark_ended(&mut self, tag: u64) {
        let entry = self.heads.get_mut(tag).expect("the head spoke");
        entry.ended = true;
        let (opened, volume) = (entry.opened, entry.export.volume);
        if opened && let Some(server) = &mut self.server {
            server.target.handle(self.now, TargetInput::RemoveVolume(volume));
        }
    }

    /// A head that has ended, holds no request and has said everything is gone.
    fn bury_if_done(&mut self, tag: u64) {
        if !self.heads.get(tag).is_some_and(|entry| entry.ended && entry.head.unanswered() == 0) {
            return;
        }
        self.head_event(tag, HeadEvent::Ended);
        let entry = self.heads.remove(tag).expect("it was there just now");
        if let Some(server) = &mut self.server {
            server.service.session_ended(Origin::Local { head: tag });
        }
        self.release_peers(&entry);
    }

    fn release_peers(&mut self, entry: &HeadEntry) {
        for (server, _) in entry.remote.iter().filter(|(_, retained)| *retained) {
            self.peers.release(self.now, *server);
        }
    }
}
