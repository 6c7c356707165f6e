//! The initiator machine: one for each peer, with an admin and an I/O connection.

use core::net::SocketAddr;
use core::time::Duration;
use std::io::ErrorKind;

use base::{
    BlockReply, BlockRequest, BlockSize, Buffer, BufferMut, BufferPool, HolderId, Instant,
    ReplicaCommand, ReplicaError, ReplyBody,
};

use crate::io::{ConnectionId, Receive, Tag};
use crate::nqn::Subsystem;
use crate::state::StateEntry;

/// What an initiator is told once.
#[derive(Clone, Debug)]
pub struct InitiatorConfig {
    /// Who we are.
    pub host: HolderId,
    /// Where the peer listens.
    pub address: SocketAddr,
    /// Which of its subsystems to use: `Replica` for [`Input::Command`], `Volume` for
    /// [`Input::Block`].
    pub subsystem: Subsystem,
    /// Commands outstanding on the I/O connection, at most (queue entries), 2 to 1024.
    pub queue_entries: u16,
    /// Ask for header digests. On by default for replica subsystems.
    pub header_digest: bool,
    /// Ask for data digests. Off by default: records carry their own checksums.
    pub data_digest: bool,
    /// A peer that is silent for this long is given up, and gives us up.
    pub keep_alive: Duration,
    /// A connection attempt, handshake included, may take this long.
    pub connect_deadline: Duration,
    /// The pause after a failed attempt; doubled each time, with jitter.
    pub backoff_min: Duration,
    /// The longest pause.
    pub backoff_max: Duration,
    /// Seeds the jitter of the pauses.
    pub jitter_seed: u64,
}

impl InitiatorConfig {
    /// The defaults for `subsystem` of the peer at `address`.
    pub fn new(
        host: HolderId,
        address: SocketAddr,
        subsystem: Subsystem,
        jitter_seed: u64,
    ) -> Self {
        Self {
            host,
            address,
            subsystem,
            queue_entries: 1024,
            header_digest: matches!(subsystem, Subsystem::Replica(_)),
            data_digest: false,
            keep_alive: Duration::from_secs(5),
            connect_deadline: Duration::from_secs(5),
            backoff_min: Duration::from_millis(50),
            backoff_max: Duration::from_secs(2),
            jitter_seed,
        }
    }
}

/// The namespace of a volume subsystem.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Namespace {
    /// Size in blocks.
    pub blocks: u64,
    /// Block size.
    pub block_size: BlockSize,
    /// Writes are refused.
    pub read_only: bool,
}

/// Why a session ended or did not come about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DownReason {
    /// No connection could be made.
    #[error("cannot connect: {0}")]
    Connect(ErrorKind),
    /// The peer or the network closed a connection.
    #[error("the connection was closed")]
    Closed,
    /// The peer was silent for longer than the keep-alive time.
    #[error("the peer was silent for too long")]
    Silent,
    /// The handshake did not end in time.
    #[error("the handshake took too long")]
    HandshakeDeadline,
    /// The peer refused a command of the handshake, with this NVMe status field (SCT and SC).
    #[error("the peer refused the handshake with status {0:#05x}")]
    Refused(u16),
    /// The peer cannot do what we need.
    #[error("the peer does not support {0}")]
    Unsupported(&'static str),
    /// The peer violated the protocol, or bytes were corrupted on the way.
    #[error("protocol error: {0}")]
    Protocol(&'static str),
    /// More commands were handed in than the initiator queues.
    #[error("too many commands are waiting")]
    Overloaded,
    /// [`Input::Stop`].
    #[error("stopped")]
    Stopped,
}

/// What happened.
#[derive(Debug)]
pub enum Input {
    /// Time has passed, or buffers may have come free. Any input does this as well. The first
    /// one starts connecting.
    Tick,
    /// The answer to [`Output::Connect`].
    Connected {
        /// Which.
        connection: ConnectionId,
        /// After an error the id is free; no [`Input::Closed`] comes.
        result: Result<(), ErrorKind>,
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
    /// Send a replica command. Commands are sent in the order in which they come. Without a
    /// session it is answered with [`ReplicaError::Disconnected`] at once.
    Command {
        /// Comes back in [`Output::Reply`]; unique among the unanswered ones.
        tag: Tag,
        /// The command.
        command: ReplicaCommand,
    },
    /// Send a block request to a volume subsystem. Without a session it is answered with
    /// [`base::Status::IoError`] at once.
    Block(BlockRequest),
    /// The peer has moved; used from the next attempt on.
    SetAddress(SocketAddr),
    /// End the session, answer everything and connect no more.
    Stop,
}

/// What to do.
#[derive(Debug)]
pub enum Output {
    /// Connect, without delaying small segments (TCP_NODELAY). Answer with [`Input::Connected`].
    Connect {
        /// The id from now on.
        connection: ConnectionId,
        /// To where.
        address: SocketAddr,
    },
    /// Receive into a buffer.
    Receive(Receive),
    /// Send these bytes after those of earlier sends of the connection.
    Send {
        /// To where.
        connection: ConnectionId,
        /// What.
        part: Buffer,
    },
    /// Close the connection (or give up connecting); answer with [`Input::Closed`].
    Close {
        /// Which.
        connection: ConnectionId,
    },
    /// The answer to [`Input::Command`]; each tag is answered exactly once.
    Reply {
        /// The command's.
        tag: Tag,
        /// How it ended.
        result: Result<ReplyBody, ReplicaError>,
    },
    /// The answer to [`Input::Block`]; each id is answered exactly once.
    BlockReply(BlockReply),
    /// There is a session: commands may come.
    Up {
        /// The namespace, of a volume subsystem.
        namespace: Option<Namespace>,
    },
    /// An attempt failed or the session ended. Everything unanswered has been answered before
    /// this. Unless it was stopped, the machine tries again by itself.
    Down {
        /// Why.
        reason: DownReason,
    },
    /// The peer told us something.
    State(StateEntry),
    /// The namespace changed (resized, read-only).
    NamespaceChanged(Namespace),
}

/// The initiator machine. See [`crate::io`] for the contract about connections and buffers.
pub struct Initiator {
    config: InitiatorConfig,
    pool: BufferPool,
}

impl Initiator {
    /// An initiator that connects at its first input. Buffers for receiving and for small
    /// commands come from `pool`.
    pub fn new(config: InitiatorConfig, pool: BufferPool) -> Self {
        Self { config, pool }
    }

    /// Takes in what happened. Drain [`Initiator::poll_output`] afterwards; several inputs may
    /// come first, and their small commands then share a buffer.
    pub fn handle(&mut self, _now: Instant, _input: Input) {
        let _ = (&self.config, &self.pool);
    }

    /// The next thing to do, if any.
    pub fn poll_output(&mut self) -> Option<Output> {
        None
    }

    /// When to call [`Initiator::handle`] with [`Input::Tick`] if nothing happens before.
    pub fn next_deadline(&self) -> Option<Instant> {
        None
    }

    /// True between [`Output::Up`] and [`Output::Down`].
    pub fn is_up(&self) -> bool {
        false
    }
}
