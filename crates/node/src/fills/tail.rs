//! The log's tail: runs of records are read from the source and appended here, until its end.
//!
//! Several runs are asked for at a time, each a fixed number of records after the one before. An
//! answer holds as many as fit; for the rest the same place asks again. A record that does not
//! fit with others is scanned by itself.

use core::time::Duration;
use std::collections::VecDeque;

use base::limits::PAYLOAD_BYTES_MAX;
use base::packed;
use base::{Buffer, CommandBody, Instant, Position, Record, ReplicaError, ReplyBody, Seq};

use super::line::{Line, Trouble, list, mismatch, own_trouble, source_trouble};
use super::pace::Reserved;
use super::{Shared, Step};

/// Records of a run, at most: with 4 KiB each, and batches of one, they are what the source reads in one
/// piece.
const RUN_RECORDS: u32 = 16;
/// Runs under way, from the source or on their way into the own log, at most.
const RUNS: usize = 8;
/// Records on their way into the own log, at most.
const APPENDS: usize = 48;
const _: () = assert!(APPENDS < super::SMALL_BUFFERS, "some are left for the next run");
/// How often the source is asked what is settled: without that a full log would never empty.
const NEWS_INTERVAL: Duration = Duration::from_millis(50);

type Answer = Result<ReplyBody, ReplicaError>;

/// Records that were asked for.
#[derive(Debug)]
struct Run {
    /// The next one that is not here.
    next: Seq,
    /// The first one that is another run's.
    end: Seq,
    place: Place,
}

/// Where they are.
#[derive(Debug)]
enum Place {
    /// To be asked for: several, or one by itself.
    Wanted {
        alone: bool,
    },
    Asked(Reserved),
    /// Packed, from this offset on.
    Here(Buffer, usize),
    One(Record),
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
    window: VecDeque<Run>,
    /// What a run brought last: what the next one is expected to bring.
    run_bytes: usize,
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
            appending: VecDeque::with_capacity(APPENDS),
            window: VecDeque::with_capacity(RUNS),
            run_bytes: PAYLOAD_BYTES_MAX,
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
        self.window.iter().any(|run| matches!(run.place, Place::Past))
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
        self.append_runs(line, shared)?;
        let over = self.window.front().is_some_and(|run| matches!(run.place, Place::Past));
        if over {
            if line.outstanding > 0 {
                return Ok(false);
            }
            // What was copied is of a time that the source has since been at, or it lies.
            return if self.end.seq >= line.seen { Ok(true) } else { Err(mismatch()) };
        }
        self.ask_runs(line, shared);
        if !self.asking_news && !self.ends() && self.news_at <= shared.now {
            self.ask_news(line, shared);
        }
        Ok(false)
    }

    /// Gives the own store what is here, in order.
    fn append_runs(&mut self, line: &mut Line, shared: &mut Shared) -> Result<(), Trouble> {
        while let Some(run) = self.window.front_mut() {
            if self.appending.len() == APPENDS {
                return Ok(());
            }
            let record = match &mut run.place {
                Place::Wanted { .. } | Place::Asked(_) | Place::Past => return Ok(()),
                Place::Here(bytes, at) => {
                    let damaged =
                        |_| Trouble::Failed(super::FillFailure::Source(ReplicaError::Damaged));
                    let header = packed::header_at(bytes.bytes(), *at).map_err(damaged)?;
                    let Some(buffer) = line.buffer_of(shared, header.payload_bytes()) else {
                        return Ok(());
                    };
                    let record = packed::unpack(bytes.bytes(), *at, buffer).map_err(damaged)?;
                    *at += packed::packed_bytes(&header);
                    let over = *at == bytes.len();
                    run.next = run.next.next();
                    if over {
                        run.place = Place::Wanted { alone: false };
                    }
                    record
                }
                Place::One(_) => {
                    run.next = run.next.next();
                    let again = Place::Wanted { alone: false };
                    let Place::One(record) = core::mem::replace(&mut run.place, again) else {
                        unreachable!("it was looked at just now")
                    };
                    record
                }
            };
            if run.next >= run.end {
                if !matches!(run.place, Place::Wanted { .. }) {
                    return Err(mismatch());
                }
                self.window.pop_front();
            }
            self.append(record, line, shared)?;
        }
        Ok(())
    }

    /// Asks for what is wanted, and for more.
    fn ask_runs(&mut self, line: &mut Line, shared: &mut Shared) {
        for index in 0..RUNS {
            if index == self.window.len() {
                if self.ends() {
                    return;
                }
                let next = self.window.back().map_or(self.handed().seq.next(), |run| run.end);
                let end = Seq(next.0.saturating_add(u64::from(RUN_RECORDS)));
                self.window.push_back(Run { next, end, place: Place::Wanted { alone: false } });
            }
            let run = &mut self.window[index];
            let Place::Wanted { alone } = run.place else { continue };
            let expected = if alone { PAYLOAD_BYTES_MAX } else { self.run_bytes };
            let Some((buffer, reserved)) = line.paced_buffer(shared, expected) else { return };
            run.place = Place::Asked(reserved);
            let seq = run.next;
            if alone {
                line.ask(shared, Step::Scan { seq }, CommandBody::Scan { seq, buffer });
            } else {
                let records = u32::try_from(run.end.0 - seq.0).expect("a run's records");
                let body = CommandBody::ScanRun { seq, records, buffer };
                line.ask(shared, Step::Run { seq }, body);
            }
        }
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
        shared.counters.log_bytes += record.payload().len() as u64;
        line.copied_bytes += record.payload().len() as u64;
        self.appending.push_back(header.position);
        let commit = if self.matches { self.commit } else { Seq::ZERO };
        let key = line.key;
        let command = store::Command::Append { key, record, commit, media: false };
        line.tell(shared, Step::Append, command);
        Ok(())
    }

    /// Records of the source, or that there are none.
    pub(super) fn scanned(
        &mut self,
        seq: Seq,
        answer: Answer,
        line: &mut Line,
    ) -> Result<(), Trouble> {
        let asked = |run: &&mut Run| run.next == seq && matches!(run.place, Place::Asked(_));
        let run = self.window.iter_mut().find(asked).expect("an answer to what was asked");
        let Place::Asked(reserved) = run.place else { unreachable!("it was found so") };
        let (place, bytes) = match answer {
            Ok(ReplyBody::Record(record)) => {
                let bytes = record.payload().len();
                (Place::One(record), bytes)
            }
            Ok(ReplyBody::Records(records)) if records.is_empty() => {
                (Place::Wanted { alone: true }, 0)
            }
            Ok(ReplyBody::Records(records)) => {
                let bytes = records.len();
                self.run_bytes = bytes;
                (Place::Here(records, 0), bytes)
            }
            other => {
                line.pace.finish(reserved, 0);
                run.place = Place::Past;
                return match other {
                    Err(ReplicaError::Behind { .. }) => Ok(()),
                    Err(ReplicaError::Trimmed { .. }) => Err(Trouble::Trimmed),
                    Err(error) => Err(source_trouble(error)),
                    Ok(_) => Err(mismatch()),
                };
            }
        };
        run.place = place;
        line.pace.finish(reserved, bytes);
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
