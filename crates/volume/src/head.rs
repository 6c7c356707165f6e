//! The head: what goes in, what comes out.

use base::{
    BlockReply, BlockRequest, Epoch, Instant, Position, ReplicaCommand, ReplicaError, ReplyBody,
    ServerId,
};

use crate::config::{HeadConfig, HeadError};
use crate::status::{HeadStatus, StallReason};

/// What a head is told.
#[derive(Debug)]
pub enum Input {
    /// A session to a member's server can take commands. The head seals there first. A second
    /// one without [`Input::MemberDown`] between means a new session: the old one's commands are
    /// lost.
    MemberUp {
        /// The server.
        server: ServerId,
    },
    /// The session is gone; its unanswered commands are lost.
    MemberDown {
        /// The server.
        server: ServerId,
    },
    /// A member's answer.
    Reply {
        /// Who answers.
        server: ServerId,
        /// The command's tag.
        tag: u64,
        /// The answer.
        result: Result<ReplyBody, ReplicaError>,
    },
    /// A front end's request. At most [`base::limits::HEAD_REQUESTS_MAX`] are begun; as many more
    /// wait; what is beyond comes back as [`Output::Returned`]. See [`Head::room`].
    Request(BlockRequest),
    /// Finish what was accepted, tell the members, end. Requests from now on are returned.
    Release,
    /// End now: what is unanswered is returned. For a shell that must stop while there is no quorum.
    Abandon,
    /// Time has passed.
    Tick,
}

/// What a head wants.
#[derive(Debug)]
pub enum Output {
    /// Send `command` to `server`, after every earlier one to the same server.
    Command {
        /// The member's server.
        server: ServerId,
        /// Comes back in the answer. Unique among a session's unanswered commands.
        tag: u64,
        /// The command.
        command: ReplicaCommand,
    },
    /// Answer a front end.
    Reply(BlockReply),
    /// A request that this head will not answer: keep it for the volume's next head (or, if it
    /// came back because there was no [`Head::room`], for later).
    Returned(BlockRequest),
    /// The head serves from here on.
    Opened {
        /// Of its EpochStart record.
        position: Position,
    },
    /// Terminal: a member has sealed a higher epoch. [`Output::Returned`] follow.
    Superseded {
        /// That epoch.
        sealed: Epoch,
    },
    /// Terminal: released in good order.
    Released,
    /// Terminal: ended by [`Input::Abandon`]. [`Output::Returned`] follow.
    Abandoned,
    /// I/O waits. Said once per stall, and again if the reason changes.
    Stalled {
        /// Why.
        reason: StallReason,
        /// Since when.
        since: Instant,
    },
    /// The stall is over.
    Resumed,
}

/// The single writer of a shard at an epoch.
#[derive(Debug)]
pub struct Head {
    config: HeadConfig,
}

impl Head {
    /// A head that has won `config.epoch`. It waits for [`Input::MemberUp`].
    pub fn new(config: HeadConfig, now: Instant) -> Result<Self, HeadError> {
        config.check()?;
        let _ = now;
        Ok(Self { config })
    }

    /// Takes one input.
    pub fn handle(&mut self, now: Instant, input: Input) {
        let _ = (now, input);
    }

    /// The next thing the head wants, until `None`.
    pub fn poll_output(&mut self) -> Option<Output> {
        None
    }

    /// When to call with [`Input::Tick`] at the latest.
    pub fn next_deadline(&self) -> Option<Instant> {
        None
    }

    /// How many more requests may be handed in without one coming back.
    pub fn room(&self) -> usize {
        0
    }

    /// Requests accepted and neither answered nor returned. A head that ended may be dropped
    /// once this is zero and no output is left.
    pub fn unanswered(&self) -> usize {
        0
    }

    /// The epoch.
    pub fn epoch(&self) -> Epoch {
        self.config.epoch
    }

    /// How it is doing.
    pub fn status(&self) -> HeadStatus {
        HeadStatus {
            phase: crate::status::HeadPhase::Sealing,
            epoch: self.config.epoch,
            last: Position::ZERO,
            commit: base::Seq::ZERO,
            in_flight: 0,
            queued: 0,
            members: Vec::new(),
            stall: None,
        }
    }

    /// Asserts what must always hold; for tests and the simulator.
    ///
    /// # Panics
    /// If an invariant is violated.
    pub fn check_invariants(&self) {}
}
