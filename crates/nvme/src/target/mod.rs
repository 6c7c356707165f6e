//! The target machine: one for each server process, for all connections that it accepted.

use core::net::SocketAddr;
use core::time::Duration;

use base::{
    BlockReply, BlockRequest, BlockSize, Buffer, BufferMut, BufferPool, HolderId, Instant,
    ReplicaCommand, ReplicaError, ReplicaKey, ReplyBody, ServerId, VolumeId,
};

use crate::io::{ConnectionId, Receive, SessionId, Tag};
use crate::nqn::Subsystem;
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
    /// I/O connections of one session with a volume subsystem, at most.
    pub io_queues_max: u16,
    /// A connection that has not got as far as Connect by then is closed.
    pub handshake_deadline: Duration,
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
    /// A host has opened a session (a Connect of an admin queue succeeded).
    SessionOpened {
        /// Its id.
        session: SessionId,
        /// With which subsystem.
        subsystem: Subsystem,
        /// The HOSTID of its Connect (for our own hosts: [`InitiatorConfig::host`]
        /// (crate::InitiatorConfig)). A head that connects again has the same one, so a seal of
        /// the same epoch is told from one of another head.
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
        /// The command. Records are decoded, and so verified.
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

/// The target machine. See [`crate::io`] for the contract about connections and buffers.
pub struct Target {
    config: TargetConfig,
    pool: BufferPool,
}

impl Target {
    /// A target without volumes. Buffers for receiving and for small responses come from `pool`.
    pub fn new(config: TargetConfig, pool: BufferPool) -> Self {
        Self { config, pool }
    }

    /// Takes in what happened. Drain [`Target::poll_output`] afterwards; several inputs may come
    /// first, and their small responses then share a buffer.
    pub fn handle(&mut self, _now: Instant, _input: Input) {
        let _ = (&self.config, &self.pool);
    }

    /// The next thing to do, if any.
    pub fn poll_output(&mut self) -> Option<Output> {
        None
    }

    /// When to call [`Target::handle`] with [`Input::Tick`] if nothing happens before.
    pub fn next_deadline(&self) -> Option<Instant> {
        None
    }
}
