//! The target machine: one for each server process, for all connections that it accepted.

mod admin;
mod block;
mod connection;
mod fabrics;
mod process;
mod replica;
mod session;

use core::net::{IpAddr, SocketAddr};
use core::time::Duration;
use std::collections::BTreeMap;

use base::{
    BlockReply, BlockRequest, BlockSize, Buffer, BufferMut, BufferPool, HolderId, Instant,
    ReplicaCommand, ReplicaError, ReplicaKey, ReplyBody, ServerId, VolumeId,
};

use self::connection::{Connection, Phase};
use self::session::{Event, Session};
use crate::io::{ConnectionId, Receive, SessionId, Tag};
use crate::link::Arm;
use crate::nqn::Subsystem;
use crate::outbox::{Outbox, SendOutput};
use crate::state::StateMessage;

/// What a target is told once.
#[derive(Clone, Debug)]
pub struct TargetConfig {
    /// This server: names its replica subsystem and its serial number.
    pub server: ServerId,
    /// Where stock initiators reach this target, for the discovery log page.
    pub address: Option<SocketAddr>,
    /// Connections at once, at most; more are closed as they come.
    pub connections_max: usize,
    /// Commands outstanding on one I/O connection, at most (queue entries), 2 to 1024.
    pub queue_entries: u16,
    /// I/O connections of one session with a volume subsystem, at most; 1 to 64.
    pub io_queues_max: u16,
    /// A connection that has not got as far as Connect by then is closed.
    pub handshake_deadline: Duration,
    /// Connections of one peer that have not got as far as Connect, at most; more are closed as they
    /// come. So one peer that sends nothing, or never the right thing, does not keep others out.
    pub handshakes_of_peer_max: usize,
    /// Refuse hosts that do not offer header digests to the replica subsystem.
    pub require_header_digest: bool,
}

impl TargetConfig {
    /// The defaults for `server`.
    pub fn new(server: ServerId) -> Self {
        Self {
            server,
            address: None,
            connections_max: 1024,
            queue_entries: 1024,
            io_queues_max: 16,
            handshake_deadline: Duration::from_secs(10),
            handshakes_of_peer_max: 128,
            require_header_digest: true,
        }
    }
}

/// A volume as stock initiators see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VolumeExport {
    /// The volume: names the subsystem and the namespace.
    pub volume: VolumeId,
    /// Size in blocks.
    pub blocks: u64,
    /// Block size.
    pub block_size: BlockSize,
    /// Writes are refused.
    pub read_only: bool,
}

/// How well a volume is reached through this server (ANA states, NVMe base 2.0, 8.1.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Here.
    Optimized,
    /// Through another server.
    NonOptimized,
    /// Not at present.
    Inaccessible,
}

/// Who is told a state message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Audience {
    /// All sessions of heads.
    Heads,
    /// One session.
    Session(SessionId),
}

/// What happened.
#[derive(Debug)]
pub enum Input {
    /// Time has passed, or buffers may have come free. Any input does this as well.
    Tick,
    /// A peer has connected. The shell chose the id, which is not in use.
    Accepted {
        /// The new connection.
        connection: ConnectionId,
        /// The peer's address, if the shell knows it. Those whose address is not known are one peer.
        from: Option<IpAddr>,
    },
    /// A receive has ended.
    Received {
        /// Whose.
        connection: ConnectionId,
        /// The buffer of the [`Receive`].
        buffer: BufferMut,
        /// Bytes received at the region's start; 0: the peer has closed.
        bytes: usize,
    },
    /// Bytes of earlier sends have left.
    Sent {
        /// Whose.
        connection: ConnectionId,
        /// How many since the last time.
        bytes: usize,
    },
    /// The connection is gone; the last input of this id.
    Closed {
        /// Which.
        connection: ConnectionId,
    },
    /// Offer a volume, or change one that is offered (resize, read-only).
    AddVolume(VolumeExport),
    /// Offer it no longer: its sessions are closed.
    RemoveVolume(VolumeId),
    /// How well a volume is reached here has changed.
    SetAccess {
        /// The volume.
        volume: VolumeId,
        /// From now on.
        access: Access,
    },
    /// Tell heads something (log page C0h and an asynchronous event).
    Publish {
        /// Whom.
        audience: Audience,
        /// About which replica; `None`: the whole server.
        key: Option<ReplicaKey>,
        /// What.
        message: StateMessage,
    },
    /// The answer to [`Output::Replica`]. Ignored if the session is gone.
    ReplicaReply {
        /// Of the command.
        session: SessionId,
        /// Of the command.
        tag: Tag,
        /// How it ended. The body must be the one that belongs to the command.
        result: Result<ReplyBody, ReplicaError>,
    },
    /// The answer to [`Output::Block`]. Ignored if the session is gone.
    BlockReply {
        /// Of the request.
        session: SessionId,
        /// `id` is the request's.
        reply: BlockReply,
    },
    /// Close one session, for instance one of a deposed head.
    CloseSession(SessionId),
    /// Close everything; nothing is accepted any more.
    Stop,
}

/// What to do.
#[derive(Debug)]
pub enum Output {
    /// Receive into a buffer.
    Receive(Receive),
    /// Send these bytes after those of earlier sends of the connection.
    Send {
        /// To where.
        connection: ConnectionId,
        /// What.
        part: Buffer,
    },
    /// Close the connection after what was given to send; answer with [`Input::Closed`].
    Close {
        /// Which.
        connection: ConnectionId,
    },
    /// A connection was not taken; its [`Output::Close`] comes next.
    Refused {
        /// The peer, as [`Input::Accepted`] has named it.
        from: Option<IpAddr>,
        /// Why.
        refusal: Refusal,
    },
    /// A host has opened a session (a Connect of an admin queue succeeded).
    SessionOpened {
        /// Its id.
        session: SessionId,
        /// With which subsystem.
        subsystem: Subsystem,
        /// The HOSTID of its Connect: of our own hosts, the
        /// [`host`](crate::InitiatorConfig::host) of their configuration. A head that connects
        /// again has the same one, so a seal of the same epoch is told from one of another head.
        host: HolderId,
    },
    /// The session is over, its connections are being closed. Its unanswered commands need no
    /// answer; [`Output::Replica`] and [`Output::Block`] of it come no more.
    SessionClosed {
        /// Which.
        session: SessionId,
    },
    /// A command of a head. Answer with [`Input::ReplicaReply`]. Commands of a session come in
    /// the order in which the head sent them.
    Replica {
        /// The head's session: what a seal is bound to.
        session: SessionId,
        /// For the answer; unique in the life of this target.
        tag: Tag,
        /// The command. Records are decoded, and so verified. The block size is not known here:
        /// the `buffer` of a Read may be too short for its blocks, which is Invalid.
        command: ReplicaCommand,
    },
    /// A request of a stock initiator, checked against the volume's size and within the bounds
    /// that [`BlockRequest`] states. Answer with [`Input::BlockReply`].
    Block {
        /// The host's session.
        session: SessionId,
        /// The volume.
        volume: VolumeId,
        /// The request; `id` is unique in the life of this target.
        request: BlockRequest,
    },
}

/// Why a connection is closed as it comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// See [`TargetConfig::connections_max`].
    #[error("there are as many connections as there may be")]
    Full,
    /// See [`TargetConfig::handshakes_of_peer_max`].
    #[error("too many connections of this peer have not said who they are")]
    Peer,
}

/// Bytes a connection may have unsent before it stops taking commands.
const UNSENT_BYTES_MAX: usize = 2 * 1024 * 1024;
/// How soon to look for buffers again when the pool was empty and nothing else happens.
const STARVED_RETRY: Duration = Duration::from_millis(2);
/// How often deadlines of sessions and handshakes are looked at, at the least.
const CHECK_INTERVAL_MAX: Duration = Duration::from_secs(1);

/// A volume that is offered.
struct Volume {
    export: VolumeExport,
    access: Access,
    access_count: u64,
}

/// Everything but the connections: what a connection's processing needs beside itself.
struct Core {
    config: TargetConfig,
    pool: BufferPool,
    outbox: Outbox<Output>,
    sessions: BTreeMap<SessionId, Session>,
    volumes: BTreeMap<VolumeId, Volume>,
    last_session: u64,
    last_generation: u32,
    discovery_generation: u64,
    now: Instant,
    /// Sessions that have ended and whose connections are still to be closed.
    ended: Vec<SessionId>,
}

impl SendOutput for Output {
    fn send(connection: ConnectionId, part: Buffer) -> Self {
        Self::Send { connection, part }
    }
}

/// The target machine. See [`crate::io`] for the contract about connections and buffers.
pub struct Target {
    core: Core,
    connections: Vec<Option<Box<Connection>>>,
    free: Vec<u16>,
    by_id: BTreeMap<ConnectionId, u16>,
    /// Connections that wait for a buffer, a slot, or for their peer to read.
    stalled: usize,
    retry_at: Option<Instant>,
    check_at: Instant,
    stopped: bool,
}

impl Target {
    /// A target without volumes. Buffers for receiving and for small responses come from `pool`.
    ///
    /// # Panics
    /// If a limit in `config` is out of range: the caller has checked what an operator wrote.
    pub fn new(config: TargetConfig, pool: BufferPool) -> Self {
        assert!((2..=1024).contains(&config.queue_entries), "2 to 1024 queue entries");
        assert!((1..=64).contains(&config.io_queues_max), "1 to 64 I/O queues of a session");
        let connections_max = u16::try_from(config.connections_max).expect("at most 65535");
        Self {
            core: Core {
                config,
                outbox: Outbox::new(pool.clone()),
                pool,
                sessions: BTreeMap::new(),
                volumes: BTreeMap::new(),
                last_session: 0,
                last_generation: 0,
                discovery_generation: 0,
                now: Instant::ZERO,
                ended: Vec::new(),
            },
            connections: (0..connections_max).map(|_| None).collect(),
            free: (0..connections_max).rev().collect(),
            by_id: BTreeMap::new(),
            stalled: 0,
            retry_at: None,
            check_at: Instant::ZERO,
            stopped: false,
        }
    }

    /// Takes in what happened. Drain [`Target::poll_output`] afterwards; several inputs may come
    /// first, and their small responses then share a buffer.
    ///
    /// # Panics
    /// If the shell breaks the contract of [`crate::io`], or a reply's body does not belong to
    /// its command.
    pub fn handle(&mut self, now: Instant, input: Input) {
        self.core.now = now;
        match input {
            Input::Tick => {}
            Input::Accepted { connection, from } => self.accepted(connection, from),
            Input::Received { connection, buffer, bytes } => {
                self.received(connection, buffer, bytes);
            }
            Input::Sent { connection, bytes } => {
                if let Some(&index) = self.by_id.get(&connection)
                    && let Some(connection) = &mut self.connections[usize::from(index)]
                {
                    connection.unsent = connection.unsent.saturating_sub(bytes);
                }
            }
            Input::Closed { connection } => self.closed(connection),
            Input::AddVolume(export) => self.add_volume(export),
            Input::RemoveVolume(volume) => self.remove_volume(volume),
            Input::SetAccess { volume, access } => self.set_access(volume, access),
            Input::Publish { audience, key, message } => self.publish(audience, key, message),
            Input::ReplicaReply { session, tag, result } => {
                self.on_reply(session, tag, |connection, core, slot| {
                    replica::reply(connection, core, slot, result);
                });
            }
            Input::BlockReply { session, reply } => {
                self.on_reply(session, Tag(reply.id.0), |connection, core, slot| {
                    block::reply(connection, core, slot, reply);
                });
            }
            Input::CloseSession(session) => self.close_session(session),
            Input::Stop => {
                self.stopped = true;
                self.close_where(|_| true);
            }
        }
        if self.stalled > 0 || self.retry_at.is_some() {
            self.retry();
        }
        if now >= self.check_at {
            self.check_deadlines();
        }
    }

    /// The next thing to do, if any.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.core.outbox.pop()
    }

    /// When to call [`Target::handle`] with [`Input::Tick`] if nothing happens before.
    pub fn next_deadline(&self) -> Option<Instant> {
        let check = (!self.by_id.is_empty()).then_some(self.check_at);
        base::time::earliest(check, self.retry_at)
    }

    /// Sessions that are open.
    pub fn sessions(&self) -> usize {
        self.core.sessions.len()
    }

    fn accepted(&mut self, id: ConnectionId, from: Option<IpAddr>) {
        assert!(!self.by_id.contains_key(&id), "the shell gives each connection its own id");
        let peer = from.map(peer);
        let refusal = if self.free.is_empty() {
            Some(Refusal::Full)
        } else if self.handshakes_of(peer) >= self.core.config.handshakes_of_peer_max {
            Some(Refusal::Peer)
        } else {
            None
        };
        let taken = if self.stopped || refusal.is_some() { None } else { self.free.pop() };
        let Some(index) = taken else {
            if let Some(refusal) = refusal.filter(|_| !self.stopped) {
                self.core.outbox.push(Output::Refused { from, refusal });
            }
            self.core.outbox.push(Output::Close { connection: id });
            return;
        };
        self.by_id.insert(id, index);
        let connection = Connection::new(id, index, peer, self.core.now);
        self.connections[usize::from(index)] = Some(Box::new(connection));
        self.check_at = self.check_at.min(self.core.now + self.core.config.handshake_deadline);
        self.process(index);
    }

    /// Connections of a peer that belong to no session.
    fn handshakes_of(&self, peer: Option<IpAddr>) -> usize {
        let connections = self.connections.iter().flatten();
        let strange = connections.filter(|connection| connection.phase.session().is_none());
        strange.filter(|connection| connection.peer == peer).count()
    }

    fn received(&mut self, id: ConnectionId, buffer: BufferMut, bytes: usize) {
        let Some(&index) = self.by_id.get(&id) else { return };
        let Some(connection) = &mut self.connections[usize::from(index)] else { return };
        if connection.phase == Phase::Closing {
            return;
        }
        connection.link.received(buffer, bytes);
        if bytes == 0 {
            self.close(index);
            return;
        }
        if let Some(session) = connection.phase.session()
            && let Some(session) = self.core.sessions.get_mut(&session)
        {
            session.last_heard = self.core.now;
        }
        self.process(index);
    }

    fn closed(&mut self, id: ConnectionId) {
        let Some(index) = self.by_id.remove(&id) else { return };
        let Some(connection) = self.connections[usize::from(index)].take() else { return };
        self.free.push(index);
        if connection.stalled {
            self.stalled -= 1;
        }
        self.on_gone(connection.phase, connection.queue_id);
    }

    /// Works on what a connection has received, and arms its next receive.
    fn process(&mut self, index: u16) {
        let Some(connection) = &mut self.connections[usize::from(index)] else { return };
        if connection.phase == Phase::Closing {
            return;
        }
        if core::mem::take(&mut connection.stalled) {
            self.stalled -= 1;
        }
        match process::process(connection, &mut self.core) {
            Ok(process::Progress::Drained) => {
                match connection.link.arm(connection.id, &self.core.pool) {
                    Arm::Nothing => {}
                    Arm::Receive(receive) => self.core.outbox.push(Output::Receive(receive)),
                    Arm::Starved => self.stall(index),
                }
                self.stall_waiting(index);
            }
            Ok(process::Progress::Stalled) => self.stall(index),
            Err(process::End::Violation(violation)) => {
                connection.terminate(&mut self.core.outbox, &violation);
                self.close(index);
            }
            Err(process::End::Close) => self.close(index),
        }
        while let Some(ended) = self.core.ended.pop() {
            self.close_where(|phase| phase.session() == Some(ended));
        }
    }

    fn stall(&mut self, index: u16) {
        if let Some(connection) = &mut self.connections[usize::from(index)]
            && !connection.stalled
        {
            connection.stalled = true;
            self.stalled += 1;
        }
        self.retry_at = Some(self.core.now + STARVED_RETRY);
    }

    /// Writes that wait for a buffer are looked at again, though the stream goes on.
    fn stall_waiting(&mut self, index: u16) {
        let waits = self.connections[usize::from(index)]
            .as_ref()
            .is_some_and(|connection| !connection.waiting.is_empty());
        if waits {
            self.stall(index);
        }
    }

    fn retry(&mut self) {
        self.retry_at = None;
        if self.stalled == 0 {
            return;
        }
        for index in 0..u16::try_from(self.connections.len()).unwrap_or(u16::MAX) {
            if self.connections[usize::from(index)].as_ref().is_some_and(|one| one.stalled) {
                self.process(index);
            }
        }
    }

    /// Closes a connection, and what ends with it.
    fn close(&mut self, index: u16) {
        let Some(connection) = &mut self.connections[usize::from(index)] else { return };
        let (phase, queue_id) = (connection.phase, connection.queue_id);
        if phase == Phase::Closing {
            return;
        }
        if connection.stalled {
            self.stalled -= 1;
        }
        connection.close();
        self.core.outbox.push(Output::Close { connection: connection.id });
        self.on_gone(phase, queue_id);
    }

    /// A connection is gone. Without its admin queue a session is over, and so is one with
    /// replicas without its I/O queue; a host of a volume may connect an I/O queue again, and
    /// closes them before it says good-bye on the admin queue.
    fn on_gone(&mut self, phase: Phase, queue_id: u16) {
        match phase {
            Phase::Initialize | Phase::Connect | Phase::Closing => {}
            Phase::Admin(session) | Phase::Replica(session) => self.close_session(session),
            Phase::Volume(session, _) => {
                if let Some(session) = self.core.sessions.get_mut(&session) {
                    session.queues &= !(1 << queue_id);
                }
            }
        }
    }

    fn close_session(&mut self, id: SessionId) {
        if self.core.end_session(id) {
            self.core.ended.pop();
            self.close_where(|phase| phase.session() == Some(id));
        }
    }

    fn close_where(&mut self, closes: impl Fn(Phase) -> bool) {
        for index in 0..u16::try_from(self.connections.len()).unwrap_or(u16::MAX) {
            if let Some(connection) = &self.connections[usize::from(index)]
                && connection.phase != Phase::Closing
                && closes(connection.phase)
            {
                self.close(index);
            }
        }
    }

    fn check_deadlines(&mut self) {
        let now = self.core.now;
        let mut next = now + CHECK_INTERVAL_MAX;
        let mut silent = Vec::new();
        for session in self.core.sessions.values() {
            if let Some(deadline) = session.deadline() {
                if deadline <= now {
                    silent.push(session.id);
                } else {
                    next = next.min(deadline);
                }
            }
        }
        for session in silent {
            self.close_session(session);
        }
        for index in 0..u16::try_from(self.connections.len()).unwrap_or(u16::MAX) {
            let Some(connection) = &self.connections[usize::from(index)] else { continue };
            if !matches!(connection.phase, Phase::Initialize | Phase::Connect) {
                continue;
            }
            let deadline = connection.accepted + self.core.config.handshake_deadline;
            if deadline <= now {
                self.close(index);
            } else {
                next = next.min(deadline);
            }
        }
        self.check_at = next;
    }

    /// Finds the command that a reply belongs to; replies of closed sessions are dropped.
    fn on_reply(
        &mut self,
        session: SessionId,
        tag: Tag,
        reply: impl FnOnce(&mut Connection, &mut Core, u16),
    ) {
        let (generation, index, slot) = split_tag(tag);
        let Some(Some(connection)) = self.connections.get_mut(usize::from(index)) else { return };
        if connection.phase.session() != Some(session) {
            return;
        }
        let Some(found) = connection.commands.slot(slot) else { return };
        if found.generation != generation {
            return;
        }
        reply(connection, &mut self.core, slot);
    }

    fn add_volume(&mut self, export: VolumeExport) {
        let known = self.core.volumes.get_mut(&export.volume);
        if let Some(volume) = known {
            if volume.export != export {
                volume.export = export;
                self.raise(Subsystem::Volume(export.volume), |session| {
                    session.namespace_changed = true;
                    session.raise(Event::Namespace);
                });
            }
            return;
        }
        let volume = Volume { export, access: Access::Optimized, access_count: 1 };
        self.core.volumes.insert(export.volume, volume);
        self.discovery_changed();
    }

    fn remove_volume(&mut self, volume: VolumeId) {
        if self.core.volumes.remove(&volume).is_none() {
            return;
        }
        let sessions: Vec<_> = self
            .core
            .sessions
            .values()
            .filter(|session| session.subsystem == Subsystem::Volume(volume))
            .map(|session| session.id)
            .collect();
        for session in sessions {
            self.close_session(session);
        }
        self.discovery_changed();
    }

    fn discovery_changed(&mut self) {
        self.core.discovery_generation += 1;
        self.raise(Subsystem::Discovery, |session| session.raise(Event::Discovery));
    }

    fn set_access(&mut self, id: VolumeId, access: Access) {
        let Some(volume) = self.core.volumes.get_mut(&id) else { return };
        if volume.access != access {
            volume.access = access;
            volume.access_count += 1;
            self.raise(Subsystem::Volume(id), |session| session.raise(Event::Access));
        }
    }

    fn publish(&mut self, audience: Audience, key: Option<ReplicaKey>, message: StateMessage) {
        let subsystem = Subsystem::Replica(self.core.config.server);
        match audience {
            Audience::Heads => self.raise(subsystem, |session| session.add_state(key, message)),
            Audience::Session(id) => {
                if let Some(session) = self.core.sessions.get_mut(&id) {
                    session.add_state(key, message);
                }
                self.tell_events(id);
            }
        }
    }

    /// Changes every session of `subsystem`, and tells the events that this raised.
    fn raise(&mut self, subsystem: Subsystem, mut change: impl FnMut(&mut Session)) {
        let mut changed = Vec::new();
        for session in self.core.sessions.values_mut() {
            if session.subsystem == subsystem {
                change(session);
                changed.push(session.id);
            }
        }
        for session in changed {
            self.tell_events(session);
        }
    }

    fn tell_events(&mut self, id: SessionId) {
        let Some(session) = self.core.sessions.get(&id) else { return };
        let admin = usize::from(session.admin);
        if let Some(Some(connection)) = self.connections.get_mut(admin) {
            admin::tell_events(connection, &mut self.core, id);
        }
    }
}

/// What counts as one peer: an IPv4 address, or the network of 64 bits that an IPv6 host chooses its
/// addresses from.
fn peer(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(address) => address.into(),
        IpAddr::V6(address) => {
            let network = u128::from(address) & (u128::MAX << 64);
            core::net::Ipv6Addr::from(network).into()
        }
    }
}

/// A tag: generation, connection, slot.
fn make_tag(generation: u32, connection: u16, slot: u16) -> Tag {
    Tag((u64::from(generation) << 32) | (u64::from(connection) << 16) | u64::from(slot))
}

fn split_tag(tag: Tag) -> (u32, u16, u16) {
    let bytes = tag.0.to_le_bytes();
    let generation = crate::codec::u32_at(&bytes, 4);
    (generation, crate::codec::u16_at(&bytes, 2), crate::codec::u16_at(&bytes, 0))
}

impl Core {
    fn next_generation(&mut self) -> u32 {
        self.last_generation = self.last_generation.wrapping_add(1);
        self.last_generation
    }

    /// Ends a session, but for closing its connections; false if it was not there.
    fn end_session(&mut self, id: SessionId) -> bool {
        if self.sessions.remove(&id).is_none() {
            return false;
        }
        self.outbox.push(Output::SessionClosed { session: id });
        self.ended.push(id);
        true
    }
}
