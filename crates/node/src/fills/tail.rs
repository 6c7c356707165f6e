//! The log's tail: records are scanned from the source and appended here, until its end.

use core::time::Duration;
use std::collections::VecDeque;

use base::{CommandBody, Instant, Position, Record, ReplicaError, ReplyBody, Seq};

use super::line::{Line, Trouble, list, mismatch, own_trouble, source_trouble};
use super::{Shared, Step};

/// Records under way, from the source or into the own log, at most.
const DEPTH: usize = 16;
/// How often the source is asked what is settled: without that a full log would never empty.
const NEWS_INTERVAL: Duration = Duration::from_millis(50);

type Answer = Result<ReplyBody, ReplicaError>;

/// A record that was asked for.
#[derive(Debug)]
enum Place {
    Asked,
    Here(Record),
    /// The source's log ended before it.
    Past,
}

/// The tail.
#[derive(Debug)]
pub(super) struct Tail {
    /// The last record that is in the own log.
    end: Position,
    /// Records that were given to the own store, in order.
    appending: VecDeque<Position>,
    /// What comes after them.
    window: VecDeque<Place>,
    /// What the source said is settled.
    commit: Seq,
    /// The own log is known to be the beginning of the source's.
    matches: bool,
    asking_news: bool,
    news_at: Instant,
}

impl Tail {
    /// A tail after `end`; `matches`: the log there is the source's.
    pub(super) fn new(now: Instant, end: Position, matches: bool) -> Self {
        Self {
            end,
            appending: VecDeque::with_capacity(DEPTH),
            window: VecDeque::with_capacity(DEPTH),
            commit: Seq::ZERO,
            matches,
            asking_news: false,
            news_at: now,
        }
    }

    /// The last record that is in the own log.
    pub(super) fn end(&self) -> Position {
        self.end
    }

    /// Whether the own log is known to be the beginning of the source's.
    pub(super) fn matches(&self) -> bool {
        self.matches
    }

    /// When to look again if nothing happens.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        (!self.asking_news && !self.ends()).then_some(self.news_at)
    }

    /// The source's log has ended.
    fn ends(&self) -> bool {
        self.window.iter().any(|place| matches!(place, Place::Past))
    }

    /// The position that the next record to scan must have its seq after.
    fn handed(&self) -> Position {
        self.appending.back().copied().unwrap_or(self.end)
    }

    /// Does what is possible; true: everything that the source held is here.
    pub(super) fn advance(
        &mut self,
        line: &mut Line,
        shared: &mut Shared,
    ) -> Result<bool, Trouble> {
        while let Some(Place::Here(_)) = self.window.front() {
            let Some(Place::Here(record)) = self.window.pop_front() else { unreachable!() };
            self.append(record, line, shared)?;
        }
        if self.ends() {
            if line.outstanding > 0 {
                return Ok(false);
            }
            // What was copied is of a time that the source has since been at, or it lies.
            return if self.end.seq >= line.seen { Ok(true) } else { Err(mismatch()) };
        }
        while self.window.len() + self.appending.len() < DEPTH {
            let Some(buffer) = line.paced_buffer(shared) else { break };
            let ahead = self.window.len() as u64 + 1;
            let seq = Seq(self.handed().seq.0.saturating_add(ahead));
            self.window.push_back(Place::Asked);
            line.ask(shared, Step::Scan { seq }, CommandBody::Scan { seq, buffer });
        }
        if !self.asking_news && self.news_at <= shared.now {
            self.ask_news(line, shared);
        }
        Ok(false)
    }

    fn ask_news(&mut self, line: &mut Line, shared: &mut Shared) {
        let Some(buffer) = line.buffer(shared) else {
            self.news_at = shared.now + NEWS_INTERVAL;
            return;
        };
        self.asking_news = true;
        let (unit, first) = (line.shape.unit, line.shape.chunks());
        line.ask(shared, Step::News, CommandBody::List { unit, first, buffer });
    }

    fn append(
        &mut self,
        record: Record,
        line: &mut Line,
        shared: &mut Shared,
    ) -> Result<(), Trouble> {
        let header = record.header();
        let before = self.handed();
        let follows = header.key == line.key
            && header.block_size == line.shape.block_size
            && header.position.seq == before.seq.next()
            && header.position.epoch <= line.order.epoch;
        if !follows {
            return Err(mismatch());
        }
        if header.previous_epoch != before.epoch {
            // The own log went another way: its end is the head's to truncate.
            return Err(own_trouble(ReplicaError::OutOfOrder { last: before }));
        }
        shared.counters.records += 1;
        self.appending.push_back(header.position);
        let commit = if self.matches { self.commit } else { Seq::ZERO };
        let key = line.key;
        let command = store::Command::Append { key, record, commit, media: false };
        line.tell(shared, Step::Append, command);
        Ok(())
    }

    /// A record of the source, or that there is none.
    pub(super) fn scanned(
        &mut self,
        seq: Seq,
        answer: Answer,
        line: &mut Line,
        shared: &mut Shared,
    ) -> Result<(), Trouble> {
        let bytes =
            if let Ok(ReplyBody::Record(record)) = &answer { record.payload().len() } else { 0 };
        line.pace.finish(bytes);
        let place = match answer {
            Ok(ReplyBody::Record(record)) => {
                line.copied_bytes += bytes as u64;
                shared.counters.log_bytes += bytes as u64;
                Place::Here(record)
            }
            Ok(_) => return Err(mismatch()),
            Err(ReplicaError::Behind { .. }) => Place::Past,
            Err(ReplicaError::Trimmed { .. }) => return Err(Trouble::Trimmed),
            Err(error) => return Err(source_trouble(error)),
        };
        let first = self.handed().seq.next();
        let index = usize::try_from(seq.0 - first.0).expect("a window of a few records");
        self.window[index] = place;
        Ok(())
    }

    /// What is settled at the source.
    pub(super) fn news(
        &mut self,
        answer: Answer,
        line: &mut Line,
        shared: &mut Shared,
    ) -> Result<(), Trouble> {
        let (header, page) = list(&line.order, answer.map_err(source_trouble)?)?;
        shared.counters.list_bytes += page.len() as u64;
        self.asking_news = false;
        self.news_at = shared.now + NEWS_INTERVAL;
        self.commit = self.commit.max(header.commit);
        if self.matches {
            let command = store::Command::Commit { key: line.key, commit: self.commit };
            line.tell(shared, Step::CommitNews, command);
        }
        Ok(())
    }

    /// The own store has appended a record.
    pub(super) fn appended(&mut self, answer: &Answer) -> Result<(), Trouble> {
        match answer {
            Ok(_) => {
                self.end = self.appending.pop_front().expect("an append was under way");
                // The record names the one before it, and the store has found that.
                self.matches = true;
                Ok(())
            }
            Err(error) => Err(own_trouble(*error)),
        }
    }
}
