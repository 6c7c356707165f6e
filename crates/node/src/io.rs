//! What goes into a node and what comes out of it.

use core::net::{IpAddr, SocketAddr};
use std::io::ErrorKind;

use base::{
    BlockCount, BlockReply, BlockRequest, BlockSize, Buffer, BufferMut, Epoch, Instant, Lba,
    Position, ReplicaError, ReplicaKey, ServerId, VolumeId,
};
use nvme::ReceiveRegion;
use nvme::target::Refusal;
use volume::{FailStop, StallReason};

use crate::fills::FillEvent;

/// A connection. Accepted ones are numbered by the shell, the others by the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ConnectionId {
    /// A peer connected to us.
    Accepted(u64),
    /// We connect to a peer.
    Peer {
        /// Which peer; not reused.
        peer: u64,
        /// Which of its connections.
        connection: u64,
    },
}

/// A head in this node; not reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HeadHandle(pub u64);

/// One of the shell's front ends: the shell's own number, comes back in replies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FrontEnd(pub u64);

/// Which heads are told a state message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Audience {
    /// All that have, or may have, a member on this server.
    Heads,
    /// The one that commands the replica that the message is about.
    Owner,
}

/// What a node is told. The connection inputs and outputs follow the contract in [`nvme::io`].
#[derive(Debug)]
pub enum Input {
    /// Time has passed, or buffers may have come free.
    Tick,
    /// A disk operation of the store has completed.
    DiskDone {
        /// Which one.
        id: store::DiskId,
        /// How it ended.
        result: store::DiskResult,
    },
    /// A peer has connected. The shell chose the number, which is not in use.
    Accepted {
        /// The number.
        connection: u64,
        /// The peer's address, if it is known.
        from: Option<IpAddr>,
    },
    /// The answer to [`Output::Connect`].
    Connected {
        /// Which.
        connection: ConnectionId,
        /// After an error the id is free.
        result: Result<(), ErrorKind>,
    },
    /// A receive has ended; 0 bytes: the peer has closed.
    Received {
        /// Whose.
        connection: ConnectionId,
        /// The buffer that was lent.
        buffer: BufferMut,
        /// Bytes at the start of the region.
        bytes: usize,
    },
    /// Bytes given to send have left the shell's hands.
    Sent {
        /// Whose.
        connection: ConnectionId,
        /// How many since the last time.
        bytes: usize,
    },
    /// The connection is gone; its last input.
    Closed {
        /// Which.
        connection: ConnectionId,
    },
    /// Make a replica. Answered by [`Output::ControlDone`].
    CreateReplica {
        /// Comes back.
        tag: u64,
        /// Which.
        key: ReplicaKey,
        /// The volume's block size.
        block_size: BlockSize,
        /// The shard's length in blocks.
        blocks: u64,
        /// The volume's epoch: it is sealed before anybody can command the replica, so that heads
        /// of earlier epochs, which may have known another replica here, find nothing to count on.
        epoch: Epoch,
    },
    /// Delete a replica. Answered by [`Output::ControlDone`].
    DeleteReplica {
        /// Comes back.
        tag: u64,
        /// Which.
        key: ReplicaKey,
    },
    /// A request of a front end. Within [`Node::room`](crate::Node::room), else it comes back.
    Request {
        /// The head that serves the volume.
        head: HeadHandle,
        /// Whose request.
        front_end: FrontEnd,
        /// The request.
        request: BlockRequest,
    },
    /// A head's volume has grown: the cluster store's record says so. Nothing happens if the head is
    /// gone, or knows that or a larger size.
    GrowHead {
        /// Which.
        head: HeadHandle,
        /// The size in blocks.
        blocks: u64,
    },
    /// Finish what a head has accepted, release its members, end it.
    ReleaseHead(HeadHandle),
    /// No guest uses a head's volume for now: see [`volume::Input::Rest`].
    RestHead(HeadHandle),
    /// End a head as it is.
    AbandonHead(HeadHandle),
    /// Close every connection and make no more.
    StopConnections,
}

/// What a node wants done, or known; disk operations apart, which have a door of their own
/// ([`Node::poll_disk`](crate::Node::poll_disk)) because they are large.
#[derive(Debug)]
pub enum Output {
    /// Connect; answer with [`Input::Connected`].
    Connect {
        /// The id from now on.
        connection: ConnectionId,
        /// To where.
        address: SocketAddr,
    },
    /// Receive; answer with [`Input::Received`].
    Receive {
        /// From where.
        connection: ConnectionId,
        /// Into what.
        buffer: BufferMut,
        /// Where in it.
        region: ReceiveRegion,
        /// A hint: so many bytes are needed for progress.
        min_bytes: usize,
    },
    /// Send these bytes after earlier ones of the connection.
    Send {
        /// To where.
        connection: ConnectionId,
        /// What.
        part: Buffer,
    },
    /// Close after what was given to send; answer with [`Input::Closed`].
    Close {
        /// Which.
        connection: ConnectionId,
    },
    /// A connection that was accepted was not taken: it is closed.
    Refused {
        /// The peer, as [`Input::Accepted`] has named it.
        from: Option<IpAddr>,
        /// Why.
        refusal: Refusal,
    },
    /// The answer to a request. [`base::Status::Superseded`]: nothing was decided here, keep the
    /// request for the volume's next head.
    Reply {
        /// Whose request.
        front_end: FrontEnd,
        /// The answer.
        reply: BlockReply,
    },
    /// The answer to `CreateReplica` and `DeleteReplica`.
    ControlDone {
        /// The input's.
        tag: u64,
        /// How it ended.
        result: Result<(), ReplicaError>,
    },
    /// The pool is open and serves, or cannot be opened.
    PoolOpened(Result<(), store::OpenError>),
    /// A device of the pool failed: nothing more is acknowledged from it.
    PoolFailed(store::DeviceFailure),
    /// Something about the pool that an operator should see.
    PoolNotice(store::Notice),
    /// Something about a head.
    Head {
        /// Which.
        head: HeadHandle,
        /// Its volume.
        volume: VolumeId,
        /// Its epoch.
        epoch: Epoch,
        /// What.
        event: HeadEvent,
    },
    /// A replica of this server is filled from another server's.
    Fill {
        /// Which replica.
        key: ReplicaKey,
        /// From where.
        source: ServerId,
        /// What happened.
        event: FillEvent,
    },
    /// A session to a peer came or went.
    Peer {
        /// The server.
        server: ServerId,
        /// Why there is none; `None`: there is one.
        down: Option<nvme::initiator::DownReason>,
    },
}

/// What happened to a head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadEvent {
    /// It serves from here on.
    Opened {
        /// Of its EpochStart record.
        position: Position,
    },
    /// Requests wait.
    Stalled {
        /// Why.
        reason: StallReason,
        /// Since when.
        since: Instant,
    },
    /// They no longer wait.
    Resumed,
    /// Blocks that a member could not read were written again with another member's copy.
    Mended {
        /// The member's server.
        server: ServerId,
        /// First block.
        lba: Lba,
        /// Number of blocks.
        blocks: BlockCount,
    },
    /// Enough members have the volume's new size: front ends may use it.
    Resized {
        /// The size in blocks.
        blocks: u64,
    },
    /// A member is far slower than the others, or is no longer.
    MemberSlow {
        /// Its server.
        server: ServerId,
        /// It is.
        slow: bool,
    },
    /// Another head sealed a higher epoch. It is gone after [`HeadEvent::Ended`].
    Superseded {
        /// That epoch.
        sealed: Epoch,
    },
    /// Released in good order.
    Released,
    /// It ended itself.
    Failed {
        /// Why.
        reason: FailStop,
    },
    /// It is gone, its handle is dead. The last event.
    Ended,
}
