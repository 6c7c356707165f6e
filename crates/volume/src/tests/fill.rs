//! How a model replica is filled from another: chunks of one block each, then the log, a step at a
//! time, so that anything may happen between two steps.

use base::{FillPhase, FillProgress, Position, Seq, ServerId};

use super::model::{Effect, Entry, Model, touches};
use super::world::{Event, World, index_of};

/// A filling under way.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fill {
    pub(super) source: ServerId,
    pub(super) chunks: bool,
    phase: FillPhase,
    /// What is home at the source for good: the log restarts there.
    start: Option<Seq>,
    /// The next block to copy.
    next: usize,
    steps: u64,
    /// The target's size when it began.
    blocks: u64,
}

/// Records that one step copies.
const STEP_RECORDS: usize = 4;

impl Model {
    /// Begins a filling, goes on with it, or says how it ended.
    pub(super) fn install(&mut self, source: ServerId, chunks: bool) -> Effect {
        let same = self.fill.filter(|fill| fill.source == source && fill.chunks == chunks);
        let fill = same.unwrap_or(Fill {
            source,
            chunks,
            phase: FillPhase::Connecting,
            start: None,
            next: 0,
            steps: 0,
            blocks: self.blocks,
        });
        let begun = same.is_none();
        if begun {
            self.life += 1;
            if chunks {
                self.drop_log();
            }
        }
        let ended = matches!(fill.phase, FillPhase::Done | FillPhase::Failed);
        self.fill = (!ended).then_some(fill);
        let (copied_bytes, total_bytes) = (fill.steps * 512, fill.steps * 512 + 512);
        let progress =
            FillProgress { phase: fill.phase, copied_bytes, total_bytes, log_end: self.written };
        Effect::Fill { progress, begun }
    }

    /// Its own log is not to be trusted, or of no use: what is half filled says so of itself.
    fn drop_log(&mut self) {
        self.filling = true;
        self.lost = false;
        self.log.clear();
        self.copied.clear();
        self.damaged.clear();
        (self.written, self.durable) = (Seq::ZERO, Seq::ZERO);
        (self.commit, self.trimmed) = (Seq::ZERO, Seq::ZERO);
    }

    /// The version of a block as of the first `records`, or newer if it was copied so.
    pub(super) fn block(&self, lba: usize, records: usize) -> Result<(Position, u64), ()> {
        let log = &self.log[..records];
        let newest = log.iter().rev().find(|entry| touches(&entry.header, lba));
        let copied = self.copied.get(&lba).copied().unwrap_or_default();
        match newest {
            Some(Entry { header, value }) if header.position > copied.0 => {
                let damaged = self.damaged.contains(&header.position.seq);
                if damaged { Err(()) } else { Ok((header.position, *value)) }
            }
            Some(_) | None => Ok(copied),
        }
    }

    /// Copies something more. True if there is more to come.
    pub(super) fn fill_step(&mut self, source: &Self, reachable: bool, blocks: usize) -> bool {
        let Some(mut fill) = self.fill else { return false };
        fill.steps += 1;
        let serves = reachable && !source.absent && !source.filling && source.sealed == self.sealed;
        fill.phase = if !serves {
            FillPhase::Failed
        } else if self.filling {
            self.copy_block(&mut fill, source, blocks)
        } else {
            self.copy_records(source)
        };
        self.fill = Some(fill);
        matches!(fill.phase, FillPhase::Connecting | FillPhase::Chunks | FillPhase::Log)
    }

    fn copy_block(&mut self, fill: &mut Fill, source: &Self, blocks: usize) -> FillPhase {
        if source.blocks > fill.blocks {
            return FillPhase::Failed;
        }
        let start = *fill.start.get_or_insert(source.trimmed);
        if (fill.next as u64) < fill.blocks.min(blocks as u64) {
            let settled = usize::try_from(source.commit.0).unwrap();
            let Ok(version) = source.block(fill.next, settled) else { return FillPhase::Failed };
            self.copied.insert(fill.next, version);
            fill.next += 1;
            return FillPhase::Chunks;
        }
        if source.trimmed > start {
            // The source's log no longer reaches back to where the copy began.
            (fill.start, fill.next) = (None, 0);
            return FillPhase::Chunks;
        }
        let home = &source.log[..usize::try_from(start.0).unwrap()];
        self.log = home.to_vec();
        (self.written, self.durable) = (start, start);
        (self.commit, self.trimmed) = (start, start);
        self.filling = false;
        FillPhase::Log
    }

    fn copy_records(&mut self, source: &Self) -> FillPhase {
        for _ in 0..STEP_RECORDS {
            let last = self.last();
            let next = last.seq.next();
            let Some(entry) = source.entry(next) else { return FillPhase::Done };
            let end = entry.header.lba.0 + u64::from(entry.header.blocks.0);
            let fits = entry.header.previous_epoch == last.epoch && end <= self.blocks;
            if next <= source.trimmed || source.damaged.contains(&next) || !fits {
                return FillPhase::Failed;
            }
            if next > source.written {
                return FillPhase::Done;
            }
            self.log.push(*entry);
            self.written = next;
        }
        FillPhase::Log
    }
}

impl World {
    pub(super) fn begin_fill(&mut self, server: usize, life: u64, begun: bool) {
        if begun {
            let after = self.delay();
            self.schedule(after, Event::FillStep { server, life });
        }
    }

    pub(super) fn fill_step(&mut self, server: usize, life: u64) {
        let model = &self.servers[server].model;
        let Some(fill) = model.fill.filter(|_| model.life == life && self.servers[server].up)
        else {
            return;
        };
        let source = index_of(fill.source);
        let mut target = core::mem::take(&mut self.servers[server].model);
        let reachable = self.servers[source].up;
        let more = target.fill_step(&self.servers[source].model, reachable, self.settings.blocks);
        let filled = !more && !target.filling && fill.chunks;
        self.servers[server].model = target;
        if filled {
            self.count("filled");
        }
        if more {
            let after = self.delay();
            self.schedule(after, Event::FillStep { server, life });
        }
    }
}
