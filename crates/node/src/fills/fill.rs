//! One fill: connect, say hello, copy chunks, follow the log.

use core::time::Duration;

use base::chunks::ListEntry;
use base::time::earliest;
use base::{
    CommandBody, FillPhase, FillProgress, HelloReason, Instant, Position, ReplicaError, ReplyBody,
    Seq, ServerId,
};

use super::copy::Copy;
use super::line::{Line, Trouble, own_trouble, source_trouble};
use super::tail::Tail;
use super::{FillEvent, FillFailure, FillOutput, Shared, Step};

/// A source that cannot be reached for so long is given up.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);
/// How long a fill that failed rests before it is tried again.
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// Failures that are told an operator before the fill has ended well, at most.
const FAILURES_SAID_MAX: usize = 16;
/// Heads hear of progress no more often than this.
const ANNOUNCE_INTERVAL: Duration = Duration::from_millis(500);

#[derive(Debug)]
enum Phase {
    /// Other fills are at it.
    Queued,
    /// For a session with the source.
    Connecting {
        until: Instant,
    },
    /// Hello was said.
    Greeting,
    /// The store notes that the replica is being filled.
    Beginning,
    /// Chunks.
    Copying(Box<Copy>),
    /// The store notes that the log begins after this position.
    Ending {
        position: Position,
    },
    /// The log.
    Following(Box<Tail>),
    /// Answers to what was begun are waited for, and ignored.
    Draining(Then),
    Done,
    Failed {
        until: Instant,
    },
}

/// What comes after [`Phase::Draining`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Then {
    /// Start over.
    Again,
    /// Rest.
    Fail,
    /// Nothing: it was aborted.
    Nothing,
}

/// A fill of one replica.
#[derive(Debug)]
pub(super) struct Fill {
    pub(super) line: Line,
    phase: Phase,
    /// There is a session with the source.
    up: bool,
    /// The source's session is kept for this fill.
    pub(super) retained: Option<ServerId>,
    /// The own log ends here and is the source's, as far as is known: no chunks are needed.
    end: Option<(Position, bool)>,
    announced: Option<(u8, Instant)>,
    /// What was said of sources since it last ended well, so that it is said once.
    failures: Vec<(ServerId, FillFailure)>,
}

impl Fill {
    pub(super) fn new(line: Line) -> Self {
        let mut fill = Self {
            line,
            phase: Phase::Queued,
            up: false,
            retained: None,
            end: None,
            announced: None,
            failures: Vec::new(),
        };
        fill.set_start();
        fill
    }

    fn set_start(&mut self) {
        let tail_only = !self.line.order.chunks;
        self.end = tail_only.then_some((self.line.shape.last, false));
    }

    /// True while it takes part in the bound on fills at once.
    pub(super) fn is_active(&self) -> bool {
        match self.phase {
            Phase::Queued | Phase::Done | Phase::Failed { .. } => false,
            Phase::Connecting { .. }
            | Phase::Greeting
            | Phase::Beginning
            | Phase::Copying(_)
            | Phase::Ending { .. }
            | Phase::Following(_)
            | Phase::Draining(_) => true,
        }
    }

    /// True if it waits for its turn.
    pub(super) fn is_queued(&self) -> bool {
        matches!(self.phase, Phase::Queued)
    }

    /// True if it was aborted and nothing of it is under way.
    pub(super) fn is_over(&self) -> bool {
        matches!(self.phase, Phase::Draining(Then::Nothing)) && self.line.outstanding == 0
    }

    /// A head wants this. What is under way goes on unless something else is wanted now.
    pub(super) fn order(&mut self, shared: &mut Shared, line: &Line) {
        let same = self.line.order == line.order;
        let next = match &self.phase {
            Phase::Failed { until } if same && *until > shared.now => return,
            Phase::Draining(Then::Again | Then::Fail) | Phase::Done if same => return,
            Phase::Queued | Phase::Failed { .. } | Phase::Done => Phase::Queued,
            Phase::Draining(_) => Phase::Draining(Then::Again),
            Phase::Connecting { .. }
            | Phase::Greeting
            | Phase::Beginning
            | Phase::Copying(_)
            | Phase::Ending { .. }
            | Phase::Following(_) => {
                if same {
                    return;
                }
                Phase::Draining(Then::Again)
            }
        };
        self.phase = next;
        if !same {
            self.release(shared);
            self.line.copied_bytes = 0;
        }
        self.announced = None;
        self.line.order = line.order;
        self.line.shape = line.shape;
        self.set_start();
        self.drained(shared);
    }

    /// Its turn has come.
    pub(super) fn start(&mut self, shared: &mut Shared) {
        shared.counters.started += 1;
        if self.failures.is_empty() {
            let event = FillEvent::Started { chunks: self.line.order.chunks };
            self.say(shared, event);
        }
        self.connect(shared);
        self.advance(shared);
    }

    fn say(&self, shared: &mut Shared, event: FillEvent) {
        let (key, source) = (self.line.key, self.line.order.source);
        shared.outputs.push_back(FillOutput::Event { key, source, event });
    }

    fn connect(&mut self, shared: &mut Shared) {
        let until = shared.now + CONNECT_DEADLINE;
        self.phase = Phase::Connecting { until };
        if self.retained.is_none() {
            let (fill, source) = (self.line.id, self.line.order.source);
            shared.outputs.push_back(FillOutput::Retain { fill, source });
        }
    }

    fn release(&mut self, shared: &mut Shared) {
        if let Some(source) = self.retained.take() {
            shared.outputs.push_back(FillOutput::Release { source });
        }
        self.up = false;
    }

    /// The session with the source came or went.
    pub(super) fn session(&mut self, shared: &mut Shared, up: bool) {
        self.up = up;
        if !up {
            match self.phase {
                Phase::Greeting
                | Phase::Beginning
                | Phase::Copying(_)
                | Phase::Ending { .. }
                | Phase::Following(_) => self.trouble(shared, Trouble::Lost),
                Phase::Queued
                | Phase::Connecting { .. }
                | Phase::Draining(_)
                | Phase::Done
                | Phase::Failed { .. } => {}
            }
        }
        self.advance(shared);
    }

    /// Stops it; what was copied stays. Nothing more of it goes to the store.
    pub(super) fn abort(&mut self, shared: &mut Shared) {
        self.phase = Phase::Draining(Then::Nothing);
        let id = self.line.id;
        let before = shared.outputs.len();
        shared.outputs.retain(|output| !output.is_begun_by(id));
        self.line.outstanding -= before - shared.outputs.len();
        self.release(shared);
    }

    /// True while the store knows the replica as one that is being filled, or nothing was begun
    /// yet: no head can do anything else with it.
    pub(super) fn copies_chunks(&self) -> bool {
        match self.phase {
            Phase::Queued
            | Phase::Connecting { .. }
            | Phase::Greeting
            | Phase::Draining(Then::Again | Then::Fail)
            | Phase::Failed { .. } => self.line.order.chunks && self.end.is_none(),
            Phase::Beginning | Phase::Copying(_) => true,
            Phase::Ending { .. }
            | Phase::Following(_)
            | Phase::Draining(Then::Nothing)
            | Phase::Done => false,
        }
    }

    /// Keeps in mind how far the log has come.
    fn note_end(&mut self) {
        if let Phase::Following(tail) = &self.phase {
            self.end = Some((tail.end(), tail.matches()));
        }
    }

    fn trouble(&mut self, shared: &mut Shared, trouble: Trouble) {
        self.note_end();
        let then = match trouble {
            Trouble::Lost => Then::Again,
            Trouble::Trimmed if self.line.order.chunks => {
                self.end = None;
                Then::Again
            }
            Trouble::Trimmed => {
                self.fail(shared, FillFailure::Trimmed);
                Then::Fail
            }
            Trouble::Failed(failure) => {
                self.fail(shared, failure);
                Then::Fail
            }
        };
        self.phase = Phase::Draining(then);
        self.drained(shared);
    }

    fn fail(&mut self, shared: &mut Shared, failure: FillFailure) {
        shared.counters.failed += 1;
        let found = (self.line.order.source, failure);
        if self.failures.len() < FAILURES_SAID_MAX && !self.failures.contains(&found) {
            self.failures.push(found);
            self.say(shared, FillEvent::Failed { failure });
        }
    }

    /// Goes on if nothing of the past is under way any more.
    fn drained(&mut self, shared: &mut Shared) {
        let Phase::Draining(then) = self.phase else { return };
        if self.line.outstanding > 0 {
            return;
        }
        self.line.pace.settle();
        match then {
            Then::Again => self.connect(shared),
            Then::Fail => {
                self.release(shared);
                self.phase = Phase::Failed { until: shared.now + RETRY_AFTER };
            }
            Then::Nothing => {}
        }
    }

    /// An answer, of the source or of the own store.
    pub(super) fn answer(
        &mut self,
        shared: &mut Shared,
        step: Step,
        answer: Result<ReplyBody, ReplicaError>,
    ) {
        self.line.outstanding -= 1;
        if let Err(trouble) = self.take(shared, step, answer) {
            self.trouble(shared, trouble);
        }
        self.drained(shared);
        self.advance(shared);
    }

    /// A page of the own store's chunks.
    pub(super) fn own_chunks(
        &mut self,
        shared: &mut Shared,
        next: u32,
        entries: impl Iterator<Item = ListEntry>,
    ) {
        self.line.outstanding -= 1;
        if let Phase::Copying(copy) = &mut self.phase
            && let Err(trouble) = copy.own_listed(next, entries)
        {
            self.trouble(shared, trouble);
        }
        self.drained(shared);
        self.advance(shared);
    }

    fn take(
        &mut self,
        shared: &mut Shared,
        step: Step,
        answer: Result<ReplyBody, ReplicaError>,
    ) -> Result<(), Trouble> {
        let line = &mut self.line;
        match (&mut self.phase, step) {
            (Phase::Draining(_), _) => Ok(()),
            (Phase::Greeting, Step::Hello) => match answer {
                Ok(_) => {
                    self.greeted(shared);
                    Ok(())
                }
                // The source obeys another head, or none yet.
                Err(error @ ReplicaError::NotSealed) => {
                    Err(Trouble::Failed(FillFailure::Source(error)))
                }
                Err(error) => Err(source_trouble(error)),
            },
            (Phase::Beginning, Step::Begin) => {
                answer.map_err(own_trouble)?;
                self.phase = Phase::Copying(Box::new(Copy::new(line)));
                Ok(())
            }
            (Phase::Copying(copy), Step::List) => copy.listed(answer, line, shared),
            (Phase::Copying(copy), Step::Fetch { slot }) => {
                copy.fetched(slot, answer, line, shared)
            }
            (Phase::Copying(copy), step) => copy.stored(step, &answer, shared),
            (Phase::Ending { position }, Step::End) => {
                answer.map_err(own_trouble)?;
                self.end = Some((*position, true));
                self.follow(shared);
                Ok(())
            }
            (Phase::Following(tail), Step::Scan { seq } | Step::Run { seq }) => {
                tail.scanned(seq, answer, line)
            }
            (Phase::Following(tail), Step::News) => tail.news(answer, line, shared),
            (Phase::Following(tail), Step::Append) => tail.appended(&answer),
            (Phase::Following(_), Step::CommitNews) => answer.map(|_| ()).map_err(own_trouble),
            (phase, step) => unreachable!("{step:?} was not begun in {phase:?}"),
        }
    }

    fn greeted(&mut self, shared: &mut Shared) {
        if self.end.is_some() {
            self.follow(shared);
        } else {
            self.phase = Phase::Beginning;
            let command = store::Command::FillBegin { key: self.line.key };
            self.line.tell(shared, Step::Begin, command);
        }
    }

    fn follow(&mut self, shared: &Shared) {
        let (end, matches) = self.end.expect("callers know where the log ends");
        self.phase = Phase::Following(Box::new(Tail::new(shared.now, end, matches)));
    }

    /// Does whatever the last event, or the time, made possible.
    pub(super) fn advance(&mut self, shared: &mut Shared) {
        self.line.retry_at = None;
        match &mut self.phase {
            Phase::Connecting { .. } if self.up => {
                self.phase = Phase::Greeting;
                let acknowledged = self.end.map_or(Seq::ZERO, |(end, _)| end.seq);
                let body = CommandBody::Hello { reason: HelloReason::Fill, acknowledged };
                self.line.ask(shared, Step::Hello, body);
            }
            Phase::Connecting { until } if *until <= shared.now => {
                self.trouble(shared, Trouble::Failed(FillFailure::Unreachable));
            }
            Phase::Copying(copy) => {
                if let Some(position) = copy.advance(&mut self.line, shared) {
                    self.phase = Phase::Ending { position };
                    let command = store::Command::FillEnd { key: self.line.key, position };
                    self.line.tell(shared, Step::End, command);
                }
            }
            Phase::Following(tail) => match tail.advance(&mut self.line, shared) {
                Ok(false) => {}
                Ok(true) => self.done(shared),
                Err(trouble) => self.trouble(shared, trouble),
            },
            Phase::Queued
            | Phase::Connecting { .. }
            | Phase::Greeting
            | Phase::Beginning
            | Phase::Ending { .. }
            | Phase::Draining(_)
            | Phase::Done
            | Phase::Failed { .. } => {}
        }
        self.announce(shared);
    }

    fn done(&mut self, shared: &mut Shared) {
        self.note_end();
        self.phase = Phase::Done;
        self.failures.clear();
        self.release(shared);
        shared.counters.done += 1;
        self.say(shared, FillEvent::Done { bytes: self.line.copied_bytes });
    }

    /// Tells the head how far it is, now and then.
    fn announce(&mut self, shared: &mut Shared) {
        let percent = match self.phase {
            Phase::Copying(_) | Phase::Following(_) => self.percent(),
            Phase::Done => 100,
            Phase::Queued
            | Phase::Connecting { .. }
            | Phase::Greeting
            | Phase::Beginning
            | Phase::Ending { .. }
            | Phase::Draining(_)
            | Phase::Failed { .. } => return,
        };
        let due = self.announced.is_none_or(|(told, at)| {
            told != percent && (percent == 100 || shared.now >= at + ANNOUNCE_INTERVAL)
        });
        if due {
            self.announced = Some((percent, shared.now));
            shared.outputs.push_back(FillOutput::Progress { key: self.line.key, percent });
        }
    }

    fn percent(&self) -> u8 {
        let FillProgress { copied_bytes, total_bytes, .. } = self.progress();
        let percent = copied_bytes.saturating_mul(100).checked_div(total_bytes).unwrap_or(0);
        u8::try_from(percent.min(99)).expect("below a hundred")
    }

    /// How far it is.
    pub(super) fn progress(&self) -> FillProgress {
        let copied_bytes = self.line.copied_bytes;
        let (phase, more) = match &self.phase {
            Phase::Queued
            | Phase::Connecting { .. }
            | Phase::Greeting
            | Phase::Beginning
            | Phase::Draining(Then::Again | Then::Nothing) => (FillPhase::Connecting, 0),
            Phase::Copying(copy) => (FillPhase::Chunks, copy.remaining_bytes(&self.line)),
            Phase::Ending { .. } => (FillPhase::Chunks, 0),
            Phase::Following(_) => (FillPhase::Log, 0),
            Phase::Done => (FillPhase::Done, 0),
            Phase::Draining(Then::Fail) | Phase::Failed { .. } => (FillPhase::Failed, 0),
        };
        let log_end = match &self.phase {
            Phase::Following(tail) => tail.end().seq,
            Phase::Queued
            | Phase::Connecting { .. }
            | Phase::Greeting
            | Phase::Beginning
            | Phase::Copying(_)
            | Phase::Ending { .. }
            | Phase::Draining(_)
            | Phase::Done
            | Phase::Failed { .. } => Seq::ZERO,
        };
        FillProgress { phase, copied_bytes, total_bytes: copied_bytes + more, log_end }
    }

    /// When to look at it again if nothing happens.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        match &self.phase {
            Phase::Connecting { until } => Some(*until),
            Phase::Copying(_) => self.line.retry_at,
            Phase::Following(tail) => earliest(self.line.retry_at, tail.next_deadline()),
            Phase::Queued
            | Phase::Greeting
            | Phase::Beginning
            | Phase::Ending { .. }
            | Phase::Draining(_)
            | Phase::Done
            | Phase::Failed { .. } => None,
        }
    }
}
