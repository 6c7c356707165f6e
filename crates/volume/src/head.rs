//! The head: what goes in, what comes out.

use std::collections::VecDeque;

use base::limits::HEAD_REQUESTS_MAX;
use base::planted::{self, Bug};
use base::time::earliest;
use base::{
    BlockCount, BlockReply, BlockRequest, BlockSize, BufferPool, CommandBody, Epoch, Instant, Lba,
    Policy, Position, ReplicaCommand, ReplicaError, ReplicaKey, ReplyBody, Seq, ServerId,
    StateMessage,
};

use crate::config::{DEPTH_EXPECTED, HeadConfig, HeadError, Tunables};
use crate::ending::Unanswered;
use crate::flush::FlushWaiter;
use crate::grants::Grants;
use crate::health::Polls;
use crate::holdback::Holdback;
use crate::log::Log;
use crate::member::{Farewell, Member};
use crate::membership::FailStop;
use crate::mend::Mends;
use crate::overlap::Newest;
use crate::pace::Pace;
use crate::quorum::{Bits, Sets, bit};
use crate::reads::Reads;
use crate::size::Size;
use crate::status::{HeadPhase, Stall, StallReason};
use crate::tag::{Kind, tag};

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
    /// A member's server says something about itself, or about its replica of this shard.
    State {
        /// Who says it.
        server: ServerId,
        /// What.
        message: StateMessage,
    },
    /// Nobody is expected to use the volume for now; another head may be. Once everything is answered
    /// the members are released, so that they let another head open at once, and again after whatever
    /// this one still does with them. The head stays open: the next request ends its rest.
    Rest,
    /// The volume has grown: the cluster store's record says so. A size that is not larger is no news.
    Grow {
        /// The size in blocks, at most [`base::limits::VOLUME_BYTES_MAX`].
        blocks: u64,
    },
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
    /// Terminal: the head ended itself because it cannot know any more what counts.
    /// [`Output::Returned`] follow.
    Failed {
        /// Why.
        reason: FailStop,
    },
    /// I/O waits. Said once per stall, and again if the reason changes.
    Stalled {
        /// Why.
        reason: StallReason,
        /// Since when.
        since: Instant,
    },
    /// The stall is over.
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
    /// Front ends may use so many blocks from here on: enough members have the new size.
    Resized {
        /// The size in blocks.
        blocks: u64,
    },
    /// A member is far slower than the others, or is no longer. Said once per change.
    MemberSlow {
        /// Its server.
        server: ServerId,
        /// It is.
        slow: bool,
    },
}

/// The single writer of a shard at an epoch.
#[derive(Debug)]
pub struct Head {
    pub(crate) key: ReplicaKey,
    pub(crate) epoch: Epoch,
    pub(crate) block_size: BlockSize,
    pub(crate) size: Size,
    pub(crate) policy: Policy,
    pub(crate) local: Option<ServerId>,
    pub(crate) buffers: BufferPool,
    /// The head's own few buffers, made when `buffers` was empty at the wrong moment.
    pub(crate) reserve: Option<BufferPool>,
    pub(crate) tunables: Tunables,
    /// Time of the input being handled.
    pub(crate) now: Instant,
    pub(crate) phase: Phase,
    /// Nobody uses the volume: what members grant is given back.
    pub(crate) resting: bool,
    pub(crate) members: Vec<Member>,
    /// Whose answers count.
    pub(crate) sets: Sets,
    /// Sessions there were, of all members.
    pub(crate) sessions: u64,
    pub(crate) log: Log,
    /// This opening has dropped the end of the log that it chose, or passed over who holds a longer one.
    pub(crate) cut: bool,
    /// Members whose logs the next choice passes over, since they cannot read them.
    pub(crate) passed_over: Bits,
    pub(crate) newest: Newest,
    pub(crate) reads: Reads,
    pub(crate) grants: Grants,
    pub(crate) polls: Polls,
    pub(crate) mends: Mends,
    /// The members' latencies are compared then.
    pub(crate) speeds_at: Instant,
    pub(crate) flushes: VecDeque<FlushWaiter>,
    pub(crate) queue: VecDeque<Queued>,
    /// The first queued request waits for a buffer; try again then.
    pub(crate) buffer_retry: Option<Instant>,
    /// Writes begun and not answered.
    pub(crate) writes: usize,
    /// What is acknowledged is to be put on media then.
    pub(crate) settle_at: Option<Instant>,
    /// Everything through here is to be on media, whether or not a guest asked.
    pub(crate) settle_target: Option<Seq>,
    /// Every member that holds it is to put everything through here on media.
    pub(crate) settle_everywhere: Option<Seq>,
    /// How fast members are filled.
    pub(crate) pace: Pace,
    /// Guests are held back for a member that would not catch up otherwise.
    pub(crate) holdback: Holdback,
    /// The backlog may have twice its limits.
    pub(crate) backlog_doubled: bool,
    /// Commit news goes out then.
    pub(crate) trim_at: Option<Instant>,
    /// Requests past the stall deadline are looked for then.
    pub(crate) expire_at: Instant,
    pub(crate) stall: Option<Stall>,
    pub(crate) stall_announced: Option<StallReason>,
    pub(crate) returned: VecDeque<Unanswered>,
    pub(crate) outputs: VecDeque<Output>,
    /// Numbers for the tags of rare commands.
    pub(crate) counter: u64,
    /// Planted by tests: reads need no grants.
    #[cfg(test)]
    pub(crate) trusts_blindly: bool,
    /// Planted by tests: who may hold what cannot be read is not counted.
    #[cfg(test)]
    pub(crate) drops_blindly: bool,
    /// Worlds whose oracle knows a write by its value alone leave damage as it is.
    #[cfg(test)]
    pub(crate) mends_nothing: bool,
}

/// Where a head is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Waits for a seal quorum, and from `quorum_since` on for a moment longer.
    Sealing { quorum_since: Option<Instant> },
    /// A tail is chosen; brings it to a write quorum.
    Reconciling,
    /// EpochStart is written.
    Starting,
    /// Serves.
    Serving,
    /// Finishes what was accepted, and from `until` on waits for members to hear of it.
    Releasing { until: Option<Instant> },
    /// Over.
    Ended(HeadPhase),
}

/// A request that has not been begun.
#[derive(Debug)]
pub(crate) struct Queued {
    pub(crate) arrived: Instant,
    pub(crate) request: BlockRequest,
}

impl Head {
    /// A head that has won `config.epoch`. It waits for [`Input::MemberUp`].
    pub fn new(config: HeadConfig, now: Instant) -> Result<Self, HeadError> {
        config.check()?;
        let HeadConfig { volume, shard, epoch, local, buffers, tunables } = config;
        let member = |member: &base::Member| {
            Member::new(member.server, member.role, now, tunables.retry_min)
        };
        let served = shard.members.iter().filter(|member| member.role.is_served());
        let members: Vec<Member> = served.map(member).collect();
        let in_sync = bits_of(&members, Member::in_sync);
        Ok(Self {
            key: ReplicaKey { volume: volume.id, shard: shard.shard },
            epoch,
            block_size: volume.block_size,
            size: Size::new(volume.blocks()),
            policy: volume.policy,
            local,
            buffers,
            reserve: None,
            tunables,
            now,
            phase: Phase::Sealing { quorum_since: None },
            resting: false,
            members,
            sets: Sets::of(in_sync),
            sessions: 0,
            log: Log::new(DEPTH_EXPECTED),
            cut: false,
            passed_over: 0,
            newest: Newest::new(volume.block_size),
            reads: Reads::new(),
            grants: Grants::new(),
            polls: Polls::new(),
            mends: Mends::new(),
            speeds_at: now,
            flushes: VecDeque::with_capacity(DEPTH_EXPECTED),
            queue: VecDeque::with_capacity(DEPTH_EXPECTED),
            buffer_retry: None,
            writes: 0,
            settle_at: None,
            settle_target: None,
            settle_everywhere: None,
            pace: Pace::new(tunables.fill_bytes_per_second),
            holdback: Holdback::new(now),
            backlog_doubled: false,
            trim_at: None,
            expire_at: now,
            stall: None,
            stall_announced: None,
            returned: VecDeque::new(),
            outputs: VecDeque::with_capacity(DEPTH_EXPECTED),
            counter: 0,
            #[cfg(test)]
            trusts_blindly: false,
            #[cfg(test)]
            drops_blindly: false,
            #[cfg(test)]
            mends_nothing: false,
        })
    }

    /// Takes one input.
    pub fn handle(&mut self, now: Instant, input: Input) {
        self.now = self.now.max(now);
        if let Phase::Ended(_) = self.phase {
            if let Input::Request(request) = input {
                self.outputs.push_back(Output::Returned(request));
            }
            return;
        }
        match input {
            Input::MemberUp { server } => self.member_up(server),
            Input::MemberDown { server } => self.member_down(server),
            Input::Reply { server, tag, result } => self.reply(server, tag, result),
            Input::State { server, message } => self.state_message(server, message),
            Input::Request(request) => {
                self.resting = false;
                self.accept(request);
            }
            Input::Rest => self.resting = true,
            Input::Grow { blocks } => self.grow(blocks),
            Input::Release => self.release(),
            Input::Abandon => self.end(HeadPhase::Abandoned, Output::Abandoned),
            Input::Tick => {}
        }
        self.advance();
    }

    /// Does whatever the last input, or the time, made possible.
    pub(crate) fn advance(&mut self) {
        if let Phase::Ended(_) = self.phase {
            return;
        }
        if self.buffer_retry.is_some_and(|at| at <= self.now) {
            self.buffer_retry = None;
        }
        self.wake_members();
        self.advance_opening();
        self.advance_commit();
        // Before requests begin: those that were held back and no longer are begin now.
        self.advance_holdback();
        self.advance_size();
        self.begin_queued();
        for member in 0..self.members.len() {
            self.pump(member);
        }
        self.forget_acknowledged();
        self.advance_flushes();
        self.advance_reads();
        self.advance_hedges();
        self.advance_mends();
        self.advance_grants();
        self.send_commit_news();
        self.expire();
        self.advance_polls();
        self.advance_speeds();
        // After everything that members may be told, since they have to hear this last.
        self.advance_release();
        if let Phase::Ended(_) = self.phase {
            return;
        }
        self.advance_rest();
        self.watch_for_stall();
    }

    /// The number of a session that begins or ends.
    pub(crate) fn next_session(&mut self) -> u64 {
        self.sessions += 1;
        self.sessions
    }

    /// The next thing the head wants, until `None`.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front().or_else(|| self.next_returned().map(Output::Returned))
    }

    /// When to call with [`Input::Tick`] at the latest.
    pub fn next_deadline(&self) -> Option<Instant> {
        if let Phase::Ended(_) = self.phase {
            let more = !self.returned.is_empty();
            return more.then(|| self.now + self.tunables.retry_min);
        }
        let mut deadline = earliest(self.buffer_retry, self.trim_at);
        deadline = earliest(deadline, self.settle_at);
        deadline = earliest(deadline, self.reads.retry_at());
        deadline = earliest(deadline, self.grants.retry_at);
        deadline = earliest(deadline, self.hedge_deadline());
        deadline = earliest(deadline, self.speeds_deadline());
        deadline = earliest(deadline, self.polls_deadline());
        deadline = earliest(deadline, self.mends_deadline());
        deadline = earliest(deadline, self.phase_deadline());
        deadline = earliest(deadline, self.stall_deadline());
        deadline = earliest(deadline, self.holdback_deadline());
        if self.policy.stall_deadline_ms.is_some() && self.unanswered() > 0 {
            deadline = earliest(deadline, Some(self.expire_at));
        }
        for member in &self.members {
            deadline = earliest(deadline, member.deadline());
        }
        deadline
    }

    /// How many more requests may be handed in without one coming back.
    pub fn room(&self) -> usize {
        match self.phase {
            Phase::Sealing { .. } | Phase::Reconciling | Phase::Starting | Phase::Serving => {
                HEAD_REQUESTS_MAX - self.queue.len()
            }
            Phase::Releasing { .. } | Phase::Ended(_) => 0,
        }
    }

    /// Requests accepted and neither answered nor returned. A head that ended may be dropped
    /// once this is zero and no output is left.
    pub fn unanswered(&self) -> usize {
        self.in_flight() + self.queue.len() + self.returned.len()
    }

    /// Requests begun and not answered.
    pub(crate) fn in_flight(&self) -> usize {
        self.writes + self.reads.unanswered() + self.flushes.len()
    }

    /// The epoch.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    #[cfg(test)]
    pub(crate) fn decided(&self) -> bool {
        self.log.undecided() == 0
    }

    /// The members of which `holds` is true.
    pub(crate) fn members_where(&self, holds: impl Fn(&Member) -> bool) -> Bits {
        bits_of(&self.members, holds)
    }

    pub(crate) fn next_number(&mut self) -> u64 {
        self.counter += 1;
        self.counter
    }

    /// Sends a command to a member; commit news rides along, and counts where a replica looks at it.
    pub(crate) fn send(&mut self, index: usize, kind: Kind, number: u64, body: CommandBody) -> u64 {
        let (commit, now) = (self.log.durable, self.now);
        let commit = if planted::is(Bug::CommitNewsTooHigh) { self.log.last().seq } else { commit };
        let member = &mut self.members[index];
        assert!(member.connected, "commands go to connected members only");
        // What a member has not acknowledged it may yet have to truncate, or may not hold.
        let commit = if member.follows() { commit.min(member.acked) } else { Seq::ZERO };
        if kind.tells_commit() {
            member.told_commit = member.told_commit.max(commit);
            member.told_at = now;
        }
        member.outstanding += 1;
        member.outliving += usize::from(kind.outlives_a_seal());
        member.granting = kind != Kind::Release;
        if member.granting {
            // It is granted again with this: the last word is a Release.
            member.farewell = Farewell::None;
        }
        let tag = tag(kind, member.session, number);
        let command = ReplicaCommand { key: self.key, epoch: self.epoch, commit, body };
        self.outputs.push_back(Output::Command { server: member.server, tag, command });
        self.time_append(index, kind, tag);
        tag
    }

    /// Asserts what must always hold; for tests and the simulator.
    ///
    /// # Panics
    /// If an invariant is violated.
    pub fn check_invariants(&self) {
        self.log.check();
        self.reads.check();
        self.check_size();
        assert!(self.queue.len() <= HEAD_REQUESTS_MAX);
        assert!(self.log.undecided() <= HEAD_REQUESTS_MAX + 1);
        assert!(self.log.durable <= self.log.commit());
        let in_sync = self.members_where(Member::in_sync);
        assert_eq!(self.sets.old(), in_sync, "who counts is what the record said last");
        for member in &self.members {
            if let crate::member::Mode::Filling(filling) = &member.mode {
                assert!(
                    !filling.copies_chunks() || !member.in_sync(),
                    "what counts is not dropped"
                );
            }
            let follows = member.follows();
            assert!(!follows || member.connected);
            assert!(!follows || member.next_send.0 <= self.log.last().seq.0 + 1);
            assert!(!follows || member.acked < member.next_send);
            if let crate::member::Mode::Live = member.mode {
                assert!(member.next_send >= self.log.base(), "no gap before the live stream");
            }
        }
    }
}

fn bits_of(members: &[Member], holds: impl Fn(&Member) -> bool) -> Bits {
    let those = members.iter().enumerate().filter(|(_, member)| holds(member));
    those.fold(0, |bits, (slot, _)| bits | bit(slot))
}
