//! Fills this server's replicas from those of other servers, directly, for the head that says so.
//!
//! [`Fills`] is a machine of its own, which the node feeds and whose outputs it carries to the own
//! store and to the sessions with other servers. For each replica there is at most one fill:
//!
//! 1. connect to the source and say Hello, which it takes only in the epoch that it has sealed;
//! 2. with chunks: the store notes that the replica is being filled and drops its log; the source's
//!    list of chunks is compared with the own one; what is newer there is fetched, what is not
//!    there is forgotten; then the log begins anew after the position through which everything was
//!    home at the source when the first list was made;
//! 3. the log's tail is scanned and appended, until the source has no more. If it no longer reaches
//!    back so far, 2 is repeated, which copies what changed since.
//!
//! Whatever was committed stays, through lost sessions, restarts and changes of head, since a chunk
//! is compared before it is copied: a fill costs what changed.
//!
//! What is here after 2 is a mix of what the source held from then on until it was copied, and the
//! log from there on makes it whole. So a fill is done only when the log has come as far as the
//! newest thing copied, and it is the head that decides whether that is enough to count.

mod compare;
mod copy;
mod fill;
mod line;
mod pace;
mod tail;
#[cfg(test)]
mod tests;

use core::time::Duration;
use std::collections::VecDeque;

use base::chunks::ListEntry;
use base::{
    BufferPool, FillProgress, Instant, ReplicaCommand, ReplicaError, ReplicaKey, ReplyBody, Seq,
    ServerId, Slab,
};

use self::fill::Fill;
use self::line::Line;
pub(crate) use self::line::{Order, Shape};
use self::pace::Pace;

/// Fills that work at the same time, at most; others wait for their turn.
const ACTIVE_MAX: usize = 4;
/// Buffers of 128 KiB for each of them,
const BUFFERS: usize = 20;
/// and of 4 KiB, for the records of a log.
const SMALL_BUFFERS: usize = 64;
/// How soon to look for a buffer again.
const STARVED_RETRY: Duration = Duration::from_millis(2);

/// Why a fill cannot go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FillFailure {
    /// There is no session with the source.
    #[error("the source cannot be reached")]
    Unreachable,
    /// The source refused or failed a command.
    #[error("at the source: {0}")]
    Source(ReplicaError),
    /// The own store did.
    #[error("here: {0}")]
    Here(ReplicaError),
    /// The source's log does not reach back so far: chunks are needed.
    #[error("the source's log does not reach back to the end of this one")]
    Trimmed,
    /// The source's replica is larger: this one is to grow first.
    #[error(
        "the source's replica is larger than this one, which has not heard of the new size yet"
    )]
    Larger,
    /// The source sent something else than it was asked for.
    #[error("the source sent what it was not asked for")]
    Mismatch,
}

/// What happened to a fill.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FillEvent {
    /// It begins.
    Started {
        /// With home; else only the log's tail.
        chunks: bool,
    },
    /// Everything the source held is here.
    Done {
        /// Payload bytes that came.
        bytes: u64,
    },
    /// It rests. Said once for each reason.
    Failed {
        /// Why.
        failure: FillFailure,
    },
}

/// What fills have done, all together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FillCounters {
    /// Fills begun.
    pub started: u64,
    /// Fills that ended well.
    pub done: u64,
    /// Times that a fill could not go on.
    pub failed: u64,
    /// Payload bytes of chunks that came.
    pub chunk_bytes: u64,
    /// Payload bytes of log records that came.
    pub log_bytes: u64,
    /// Bytes of lists that came.
    pub list_bytes: u64,
    /// Chunks copied.
    pub chunks: u64,
    /// Log records copied.
    pub records: u64,
}

/// What a fill waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// The source: it knows us.
    Hello,
    /// The source: which chunks it has.
    List,
    /// The source: a run of blocks.
    Fetch {
        slot: usize,
    },
    /// The source: a record.
    Scan {
        seq: Seq,
    },
    /// The source: records.
    Run {
        seq: Seq,
    },
    /// The source: what is settled.
    News,
    /// The own store, each of them.
    Begin,
    Chunk {
        slot: usize,
    },
    Data {
        slot: usize,
    },
    Commit {
        slot: usize,
    },
    Free,
    End,
    Append,
    CommitNews,
}

/// What fills want.
#[derive(Debug)]
pub(crate) enum FillOutput {
    /// Keep a session with `source`, and say [`Fills::retained`].
    Retain { fill: u64, source: ServerId },
    /// It is no longer needed.
    Release { source: ServerId },
    /// Send this and bring the answer to [`Fills::answer`].
    Peer { fill: u64, step: Step, source: ServerId, command: ReplicaCommand },
    /// Give this to the store and bring the answer.
    Store { fill: u64, step: Step, command: store::Command },
    /// Say [`Fills::own_chunks`] which chunks the own store has, from this one on.
    Own { fill: u64, key: ReplicaKey, first: u32 },
    /// The head should hear how far it is; 100: done.
    Progress { key: ReplicaKey, percent: u8 },
    /// An operator should.
    Event { key: ReplicaKey, source: ServerId, event: FillEvent },
}

impl FillOutput {
    /// True if a fill waits for an answer to this.
    fn is_begun_by(&self, id: u64) -> bool {
        match self {
            Self::Peer { fill, .. } | Self::Store { fill, .. } | Self::Own { fill, .. } => {
                *fill == id
            }
            Self::Retain { .. }
            | Self::Release { .. }
            | Self::Progress { .. }
            | Self::Event { .. } => false,
        }
    }
}

/// What all fills share.
#[derive(Debug)]
struct Shared {
    now: Instant,
    outputs: VecDeque<FillOutput>,
    buffers: BufferPool,
    counters: FillCounters,
}

/// All fills of a server.
#[derive(Debug)]
pub(crate) struct Fills {
    fills: Slab<Fill>,
    shared: Shared,
    /// Scratch of `tick`.
    due: Vec<u64>,
    /// The pool has memory.
    prepared: bool,
    stopped: bool,
}

impl Fills {
    pub(crate) fn new() -> Self {
        Self {
            fills: Slab::with_capacity(0),
            shared: Shared {
                now: Instant::ZERO,
                outputs: VecDeque::new(),
                buffers: BufferPool::heap(0, 0),
                counters: FillCounters::default(),
            },
            due: Vec::new(),
            prepared: false,
            stopped: false,
        }
    }

    pub(crate) fn counters(&self) -> FillCounters {
        self.shared.counters
    }

    /// How far each fill is.
    pub(crate) fn progress(&self) -> impl Iterator<Item = (ReplicaKey, FillProgress)> {
        self.fills.iter().map(|(_, fill)| (fill.line.key, fill.progress()))
    }

    fn of_replica(&self, key: ReplicaKey) -> Option<u64> {
        self.fills.iter().find(|(_, fill)| fill.line.key == key).map(|(tag, _)| tag)
    }

    /// A head wants a replica filled, or to know how far that is.
    pub(crate) fn install(
        &mut self,
        now: Instant,
        key: ReplicaKey,
        order: Order,
        shape: Shape,
        bytes_per_second: u64,
    ) -> FillProgress {
        self.shared.now = now;
        if !self.prepared {
            self.prepared = true;
            self.shared.buffers =
                BufferPool::heap(ACTIVE_MAX * SMALL_BUFFERS, ACTIVE_MAX * BUFFERS);
        }
        let line = |id: u64| Line {
            id,
            key,
            order,
            shape,
            pace: Pace::new(now, bytes_per_second),
            outstanding: 0,
            copied_bytes: 0,
            seen: Seq::ZERO,
            retry_at: None,
        };
        let id = self.of_replica(key).unwrap_or_else(|| {
            let id = self.fills.insert_or_grow(Fill::new(line(0)));
            self.fills.get_mut(id).expect("it was put in just now").line.id = id;
            id
        });
        if !self.stopped {
            let fill = self.fills.get_mut(id).expect("it is there");
            fill.line.pace.set_rate(now, bytes_per_second);
            fill.order(&mut self.shared, &line(id));
        }
        self.settle();
        let fill = self.fills.get_mut(id).expect("a fill that is wanted stays");
        if !self.stopped {
            fill.advance(&mut self.shared);
        }
        fill.progress()
    }

    /// Removes what is over and starts what can start.
    fn settle(&mut self) {
        let over = |fills: &Slab<Fill>| fills.iter().find(|(_, f)| f.is_over()).map(|(tag, _)| tag);
        while let Some(tag) = over(&self.fills) {
            self.fills.remove(tag);
        }
        let mut active = self.fills.iter().filter(|(_, fill)| fill.is_active()).count();
        while active < ACTIVE_MAX && !self.stopped {
            let queued = self.fills.iter().find(|(_, fill)| fill.is_queued()).map(|(tag, _)| tag);
            let Some(tag) = queued else { return };
            let fill = self.fills.get_mut(tag).expect("it was found just now");
            fill.start(&mut self.shared);
            active += 1;
        }
    }

    /// The session for a fill is kept; `up`: it is there already.
    pub(crate) fn retained(&mut self, now: Instant, id: u64, source: ServerId, up: bool) {
        self.shared.now = now;
        let Some(fill) = self.fills.get_mut(id) else {
            self.shared.outputs.push_back(FillOutput::Release { source });
            return;
        };
        if fill.retained.is_some() || fill.line.order.source != source {
            self.shared.outputs.push_back(FillOutput::Release { source });
            return;
        }
        fill.retained = Some(source);
        if up {
            fill.session(&mut self.shared, true);
        }
    }

    /// A session with a server came or went.
    pub(crate) fn peer_session(&mut self, now: Instant, server: ServerId, up: bool) {
        self.shared.now = now;
        let of_server = |fill: &Fill| fill.retained == Some(server);
        self.due.extend(self.fills.iter().filter(|(_, f)| of_server(f)).map(|(tag, _)| tag));
        while let Some(tag) = self.due.pop() {
            let fill = self.fills.get_mut(tag).expect("it was found just now");
            fill.session(&mut self.shared, up);
        }
        self.settle();
    }

    /// The answer to a command of a fill.
    pub(crate) fn answer(
        &mut self,
        now: Instant,
        id: u64,
        step: Step,
        answer: Result<ReplyBody, ReplicaError>,
    ) {
        self.shared.now = now;
        let fill = self.fills.get_mut(id).expect("a fill waits for its answers");
        fill.answer(&mut self.shared, step, answer);
        self.settle();
    }

    /// The chunks that the own store has up to `next`, which is [`base::chunks::NO_MORE`] after the
    /// last.
    pub(crate) fn own_chunks(
        &mut self,
        now: Instant,
        id: u64,
        next: u32,
        entries: impl Iterator<Item = ListEntry>,
    ) {
        self.shared.now = now;
        let fill = self.fills.get_mut(id).expect("a fill waits for its answers");
        fill.own_chunks(&mut self.shared, next, entries);
        self.settle();
    }

    /// A head has sealed the replica. The one that ordered the fill may have come back, and chunks
    /// are copied on; but it looks at the log now and decides what is to be done with that, so what
    /// follows a log stops, as does everything that an older head ordered.
    pub(crate) fn sealed(&mut self, now: Instant, key: ReplicaKey, epoch: base::Epoch) {
        let Some(tag) = self.of_replica(key) else { return };
        let fill = self.fills.get(tag).expect("it was found just now");
        if fill.line.order.epoch < epoch || !fill.copies_chunks() {
            self.abort(now, key);
        }
    }

    /// Stops the fill of a replica.
    pub(crate) fn abort(&mut self, now: Instant, key: ReplicaKey) {
        self.shared.now = now;
        let Some(tag) = self.of_replica(key) else { return };
        self.fills.get_mut(tag).expect("it was found just now").abort(&mut self.shared);
        self.settle();
    }

    /// Stops everything, for good.
    pub(crate) fn stop(&mut self, now: Instant) {
        self.stopped = true;
        let keys: Vec<_> = self.fills.iter().map(|(_, fill)| fill.line.key).collect();
        for key in keys {
            self.abort(now, key);
        }
    }

    /// Lets every fill whose time has come act.
    pub(crate) fn tick(&mut self, now: Instant) {
        self.shared.now = now;
        let due = |fill: &Fill| fill.next_deadline().is_some_and(|at| at <= now);
        self.due.extend(self.fills.iter().filter(|(_, fill)| due(fill)).map(|(tag, _)| tag));
        while let Some(tag) = self.due.pop() {
            let fill = self.fills.get_mut(tag).expect("it was found just now");
            fill.advance(&mut self.shared);
        }
        self.settle();
    }

    /// Asserts what must hold between any two calls.
    pub(crate) fn check(&self) {
        for (tag, fill) in self.fills.iter() {
            assert_eq!(tag, fill.line.id);
            assert_eq!(self.of_replica(fill.line.key), Some(tag), "one fill for each replica");
        }
        let active = self.fills.iter().filter(|(_, fill)| fill.is_active()).count();
        assert!(active <= ACTIVE_MAX, "fills take turns");
    }

    /// When some fill wants to be called.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        self.fills.iter().filter_map(|(_, fill)| fill.next_deadline()).min()
    }

    /// The next thing to do.
    pub(crate) fn poll_output(&mut self) -> Option<FillOutput> {
        self.shared.outputs.pop_front()
    }
}
