//! The initiator machine: one for each peer, with an admin and an I/O connection.

mod admin;
mod block;
mod queue;
mod replica;
mod wire;

use core::net::SocketAddr;
use core::time::Duration;
use std::collections::VecDeque;
use std::io::ErrorKind;

use base::{
    BlockReply, BlockRequest, BlockSize, Buffer, BufferMut, BufferPool, HolderId, Instant,
    ReplicaCommand, ReplicaError, ReplyBody,
};

use self::admin::{Admin, Step};
use self::queue::Queue;
use self::replica::Handles;
use self::wire::Wire;
use crate::codec::pdu::FatalError;
use crate::io::{ConnectionId, Receive, Tag};
use crate::link::{self, Arm, Violation};
use crate::nqn::Subsystem;
use crate::outbox::{Outbox, SendOutput};
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
    /// Ask for data digests on the I/O connection, too. Off by default: records carry their own
    /// checksums, other answers one in their completion. The admin connection to a replica
    /// subsystem always has them.
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

/// Commands that wait for a free queue entry, at most.
const BACKLOG_MAX: usize = 65_536;
/// How soon to look for buffers again when the pool was empty and nothing else happens.
const STARVED_RETRY: Duration = Duration::from_millis(2);

impl SendOutput for Output {
    fn send(connection: ConnectionId, part: Buffer) -> Self {
        Self::Send { connection, part }
    }
}

enum State {
    /// Before the first input.
    Idle,
    /// After a failure.
    Waiting { until: Instant },
    /// On the way to a session.
    Connecting { step: Step, deadline: Instant },
    /// There is a session.
    Up { since: Instant },
    /// For ever.
    Stopped,
}

/// The initiator machine. See [`crate::io`] for the contract about connections and buffers.
pub struct Initiator {
    config: InitiatorConfig,
    pool: BufferPool,
    outbox: Outbox<Output>,
    now: Instant,
    state: State,
    /// The admin connection, then the I/O connection.
    wires: [Option<Wire>; 2],
    last_connection: u64,
    admin: Admin,
    queue: Queue,
    handles: Handles,
    backlog: VecDeque<Queued>,
    backoff: Duration,
    random: u64,
    last_heard: Instant,
    retry_at: Option<Instant>,
}

/// A command that waits for a queue entry.
enum Queued {
    Replica(Tag, ReplicaCommand),
    Block(BlockRequest),
}

/// Index of a connection in [`Initiator::wires`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Admin,
    Io,
}

impl Side {
    const fn index(self) -> usize {
        match self {
            Self::Admin => 0,
            Self::Io => 1,
        }
    }
}

/// The session cannot go on.
enum End {
    Violation(Violation, &'static str),
    Down(DownReason),
}

impl From<DownReason> for End {
    fn from(reason: DownReason) -> Self {
        Self::Down(reason)
    }
}

impl Initiator {
    /// An initiator that connects at its first input. Buffers for receiving and for small
    /// commands come from `pool`.
    ///
    /// # Panics
    /// If a limit in `config` is out of range: the caller has checked what an operator wrote.
    pub fn new(config: InitiatorConfig, pool: BufferPool) -> Self {
        assert!((2..=1024).contains(&config.queue_entries), "2 to 1024 queue entries");
        assert!(!config.keep_alive.is_zero(), "a keep-alive time");
        Self {
            outbox: Outbox::new(pool.clone()),
            pool,
            now: Instant::ZERO,
            state: State::Idle,
            wires: [None, None],
            last_connection: 0,
            admin: Admin::default(),
            queue: Queue::new(config.queue_entries - 1),
            handles: Handles::default(),
            backlog: VecDeque::with_capacity(usize::from(config.queue_entries)),
            backoff: config.backoff_min,
            random: config.jitter_seed,
            last_heard: Instant::ZERO,
            retry_at: None,
            config,
        }
    }

    /// Takes in what happened. Drain [`Initiator::poll_output`] afterwards; several inputs may
    /// come first, and their small commands then share a buffer.
    ///
    /// # Panics
    /// If the shell breaks the contract of [`crate::io`].
    pub fn handle(&mut self, now: Instant, input: Input) {
        self.now = now;
        match input {
            // A target that does not read what it is sent is noticed by its silence.
            Input::Tick | Input::Sent { .. } => {}
            Input::Connected { connection, result } => self.connected(connection, result),
            Input::Received { connection, buffer, bytes } => {
                self.received(connection, buffer, bytes);
            }
            Input::Closed { connection } => {
                if let Some(side) = self.side(connection) {
                    // The shell has closed it already.
                    self.wires[side.index()] = None;
                    self.down(DownReason::Closed);
                }
            }
            Input::Command { tag, command } => self.submit(Queued::Replica(tag, command)),
            Input::Block(request) => self.submit(Queued::Block(request)),
            Input::SetAddress(address) => self.config.address = address,
            Input::Stop => self.stop(),
        }
        if self.retry_at.is_some() {
            self.retry_at = None;
            self.process(Side::Admin);
            self.process(Side::Io);
        }
        self.on_time();
    }

    /// The next thing to do, if any.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outbox.pop()
    }

    /// When the peer was last heard of.
    pub fn last_heard(&self) -> Instant {
        self.last_heard
    }

    /// When to call [`Initiator::handle`] with [`Input::Tick`] if nothing happens before.
    pub fn next_deadline(&self) -> Option<Instant> {
        let deadline = match &self.state {
            State::Idle => Some(self.now),
            State::Waiting { until } => Some(*until),
            State::Connecting { deadline, .. } => {
                base::time::earliest(Some(*deadline), self.admin.poll_at)
            }
            State::Up { .. } => base::time::earliest(
                Some(self.last_heard + self.config.keep_alive),
                self.admin.next_keep_alive(),
            ),
            State::Stopped => None,
        };
        base::time::earliest(deadline, self.retry_at)
    }

    /// True between [`Output::Up`] and [`Output::Down`].
    pub fn is_up(&self) -> bool {
        matches!(self.state, State::Up { .. })
    }

    /// Commands that were handed in and not answered.
    pub fn outstanding(&self) -> usize {
        self.queue.used() + self.backlog.len()
    }

    fn side(&self, connection: ConnectionId) -> Option<Side> {
        [Side::Admin, Side::Io]
            .into_iter()
            .find(|side| self.wires[side.index()].as_ref().is_some_and(|w| w.id == connection))
    }

    fn on_time(&mut self) {
        let now = self.now;
        match &self.state {
            State::Idle => self.connect(),
            State::Waiting { until } if *until <= now => self.connect(),
            State::Connecting { deadline, .. } if *deadline <= now => {
                self.down(DownReason::HandshakeDeadline);
            }
            State::Connecting { .. } => {
                if self.admin.poll_at.is_some_and(|at| at <= now) {
                    self.admin.poll_at = None;
                    self.send_step(Step::Status);
                }
            }
            State::Up { .. } => {
                if self.last_heard + self.config.keep_alive <= now {
                    self.down(DownReason::Silent);
                } else if self.admin.next_keep_alive().is_some_and(|at| at <= now) {
                    self.send_keep_alive();
                }
            }
            State::Waiting { .. } | State::Stopped => {}
        }
    }

    fn connect(&mut self) {
        let deadline = self.now + self.config.connect_deadline;
        self.state = State::Connecting { step: Step::Initialize, deadline };
        self.admin = Admin::default();
        self.open(Side::Admin);
    }

    /// Asks the shell for a connection.
    fn open(&mut self, side: Side) {
        self.last_connection += 1;
        let id = ConnectionId(self.last_connection);
        // What the admin connection carries (state messages among it) has no other checksum.
        let replica = matches!(self.config.subsystem, Subsystem::Replica(_));
        let data_digest = self.config.data_digest || (replica && side == Side::Admin);
        let mut wire = Wire::new(id, self.config.header_digest, data_digest);
        if side == Side::Io {
            wire.link.staging_bytes = base::limits::PAYLOAD_BYTES_MAX;
        }
        self.wires[side.index()] = Some(wire);
        self.outbox.push(Output::Connect { connection: id, address: self.config.address });
    }

    fn connected(&mut self, connection: ConnectionId, result: Result<(), ErrorKind>) {
        let Some(side) = self.side(connection) else { return };
        match result {
            Ok(()) => {
                self.last_heard = self.now;
                if let Some(wire) = &mut self.wires[side.index()] {
                    wire.initialize(&mut self.outbox);
                }
                self.process(side);
            }
            Err(error) => {
                self.wires[side.index()] = None;
                self.down(DownReason::Connect(error));
            }
        }
    }

    fn received(&mut self, connection: ConnectionId, buffer: BufferMut, bytes: usize) {
        let Some(side) = self.side(connection) else { return };
        let Some(wire) = &mut self.wires[side.index()] else { return };
        wire.link.received(buffer, bytes);
        if bytes == 0 {
            self.down(DownReason::Closed);
            return;
        }
        self.last_heard = self.now;
        self.process(side);
    }

    /// Works on what a connection has received, and arms its next receive.
    fn process(&mut self, side: Side) {
        // The wire is taken out while it is worked on; going down closes it by its id.
        let Some(mut wire) = self.wires[side.index()].take() else { return };
        let id = wire.id;
        if !wire.open {
            self.wires[side.index()] = Some(wire);
            return;
        }
        let outcome = self.work(side, &mut wire);
        match outcome {
            Ok(stalled) => {
                let arm = if stalled { Arm::Starved } else { wire.link.arm(id, &self.pool) };
                match arm {
                    Arm::Nothing => {}
                    Arm::Receive(receive) => self.outbox.push(Output::Receive(receive)),
                    Arm::Starved => self.retry_at = Some(self.now + STARVED_RETRY),
                }
                self.wires[side.index()] = Some(wire);
                self.pump();
            }
            Err(End::Violation(violation, what)) => {
                wire.terminate(&mut self.outbox, &violation);
                self.wires[side.index()] = Some(wire);
                self.down(DownReason::Protocol(what));
            }
            Err(End::Down(reason)) => {
                self.wires[side.index()] = Some(wire);
                self.down(reason);
            }
        }
    }

    /// Goes through received PDUs; true if one has to wait for a buffer.
    fn work(&mut self, side: Side, wire: &mut Wire) -> Result<bool, End> {
        loop {
            let step = wire.link.poll().map_err(|violation| {
                let what = match violation.error {
                    FatalError::HeaderDigest => "a header digest is wrong",
                    FatalError::InvalidHeaderField
                    | FatalError::Sequence
                    | FatalError::DataOutOfRange
                    | FatalError::LimitExceeded
                    | FatalError::UnsupportedParameter => "a PDU header is invalid",
                };
                End::Violation(violation, what)
            })?;
            match step {
                link::Step::Idle => return Ok(false),
                link::Step::Pdu(pdu) => {
                    let verdict = match side {
                        Side::Admin => self.on_admin_pdu(wire, &pdu)?,
                        Side::Io => self.on_io_pdu(wire, &pdu)?,
                    };
                    let Some(sink) = verdict else { return Ok(true) };
                    wire.link.accept(&pdu, sink);
                    if pdu.data_bytes == 0 {
                        self.on_pdu_end(side, wire)?;
                    }
                }
                link::Step::Data { arrived, intact } => {
                    if !intact {
                        return Err(DownReason::Protocol("a data digest is wrong").into());
                    }
                    match side {
                        Side::Admin => self.admin.on_data(arrived),
                        Side::Io => self.queue.on_data(arrived),
                    }
                    self.on_pdu_end(side, wire)?;
                }
            }
        }
    }

    fn on_pdu_end(&mut self, side: Side, wire: &mut Wire) -> Result<(), End> {
        match side {
            Side::Admin => self.on_admin_end(wire),
            Side::Io => self.on_io_end(),
        }
    }

    fn submit(&mut self, queued: Queued) {
        if !self.is_up() {
            self.answer_disconnected(queued);
            return;
        }
        self.backlog.push_back(queued);
        if self.backlog.len() > BACKLOG_MAX {
            self.down(DownReason::Overloaded);
        } else {
            self.pump();
        }
    }

    fn answer_disconnected(&mut self, queued: Queued) {
        match queued {
            Queued::Replica(tag, _) => {
                let result = Err(ReplicaError::Disconnected);
                self.outbox.push(Output::Reply { tag, result });
            }
            Queued::Block(request) => {
                let reply =
                    BlockReply { id: request.id, status: base::Status::IoError, data: None };
                self.outbox.push(Output::BlockReply(reply));
            }
        }
    }

    /// Sends commands while there are free queue entries.
    fn pump(&mut self) {
        if !self.is_up() {
            return;
        }
        while !self.queue.is_full() {
            let Some(queued) = self.backlog.pop_front() else { return };
            match queued {
                Queued::Replica(tag, command) => self.send_replica(tag, command),
                Queued::Block(request) => self.send_block(request),
            }
        }
    }

    /// Ends the session or the attempt: answers everything, closes everything.
    fn down(&mut self, reason: DownReason) {
        if matches!(self.state, State::Idle | State::Waiting { .. } | State::Stopped) {
            return;
        }
        for wire in &mut self.wires {
            if let Some(wire) = wire.take() {
                self.outbox.push(Output::Close { connection: wire.id });
            }
        }
        self.queue.abandon(&mut self.outbox);
        while let Some(queued) = self.backlog.pop_front() {
            self.answer_disconnected(queued);
        }
        self.handles.clear();
        self.admin = Admin::default();
        if let State::Up { since } = self.state
            && self.now.since(since) >= self.config.backoff_max
        {
            self.backoff = self.config.backoff_min;
        }
        let until = self.now + self.pause();
        self.state = State::Waiting { until };
        self.outbox.push(Output::Down { reason });
    }

    fn stop(&mut self) {
        self.down(DownReason::Stopped);
        self.state = State::Stopped;
    }

    /// The next pause between attempts: half of the back-off and a random part of the other half.
    fn pause(&mut self) -> Duration {
        // SplitMix64 (Steele, Lea and Flood, 2014).
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = self.random;
        value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^= value >> 31;
        let half = self.backoff / 2;
        let thousandth = u32::try_from(value % 1000).unwrap_or(0);
        self.backoff = (self.backoff * 2).min(self.config.backoff_max);
        half + half * thousandth / 1000
    }
}
