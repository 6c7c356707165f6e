//! One pass over the chunks: lists are compared, what differs is fetched and put in.

use base::chunks::ListEntry;
use base::limits::PAYLOAD_BYTES_MAX;
use base::{CommandBody, Lba, Position, RecordKind, ReplicaError, ReplyBody};
use store::FILL_CHUNKS_MAX;

use super::compare::{Comparison, Next};
use super::line::{Line, Trouble, entries, list, mismatch, own_trouble, source_trouble};
use super::pace::Reserved;
use super::{FillFailure, Shared, Step};

/// Chunks that are being forgotten, at most.
const FREES_MAX: usize = 16;
/// Runs of one chunk that the store has not taken, at most.
const STORING_MAX: usize = 2;

type Answer = Result<ReplyBody, ReplicaError>;

/// A chunk that is being copied.
#[derive(Debug)]
struct Slot {
    chunk: u32,
    /// What is before this block has come.
    at: u64,
    end: u64,
    begun: bool,
    fetching: Option<Reserved>,
    storing: usize,
    committing: bool,
}

/// One pass.
#[derive(Debug)]
pub(super) struct Copy {
    comparison: Comparison,
    /// The log begins after this, once all chunks are here: what the first list said.
    position: Option<Position>,
    listing: bool,
    slots: [Option<Slot>; FILL_CHUNKS_MAX],
    frees: usize,
    compared: bool,
}

impl Copy {
    pub(super) fn new(line: &Line) -> Self {
        Self {
            comparison: Comparison::new(line.shape.chunks()),
            position: None,
            listing: false,
            slots: [const { None }; FILL_CHUNKS_MAX],
            frees: 0,
            compared: false,
        }
    }

    /// Payload bytes that will come, at most, as far as is known.
    pub(super) fn remaining_bytes(&self, line: &Line) -> u64 {
        let size = line.shape.block_size;
        let under_way: u64 =
            self.slots.iter().flatten().map(|slot| (slot.end - slot.at) << size.log2()).sum();
        under_way + self.comparison.copies() * line.shape.unit.bytes(size)
    }

    /// Does what is possible. `Some`: the pass is over, and the log may begin after the position.
    pub(super) fn advance(&mut self, line: &mut Line, shared: &mut Shared) -> Option<Position> {
        self.compare(line, shared);
        for index in 0..self.slots.len() {
            self.advance_slot(index, line, shared);
        }
        let idle = self.frees == 0 && self.slots.iter().all(Option::is_none);
        self.position.filter(|_| self.compared && idle)
    }

    /// Takes differences while there are places for them.
    fn compare(&mut self, line: &mut Line, shared: &mut Shared) {
        while !self.listing && !self.compared && self.frees < FREES_MAX {
            let Some(free) = self.slots.iter().position(Option::is_none) else { return };
            match self.comparison.next() {
                Next::Source(first) => {
                    let Some(buffer) = line.buffer(shared) else { return };
                    self.listing = true;
                    let body = CommandBody::List { unit: line.shape.unit, first, buffer };
                    line.ask(shared, Step::List, body);
                }
                Next::Own(first) => {
                    self.listing = true;
                    line.look(shared, first);
                }
                Next::Copy(entry) => self.begin(free, entry, line, shared),
                Next::Free(chunk) => {
                    self.frees += 1;
                    let command = store::Command::FillFree { key: line.key, chunk };
                    line.tell(shared, Step::Free, command);
                }
                Next::End => self.compared = true,
            }
        }
    }

    fn begin(&mut self, index: usize, entry: ListEntry, line: &mut Line, shared: &mut Shared) {
        let ListEntry { chunk, newest } = entry;
        let (at, end) = line.shape.range(chunk);
        self.slots[index] = Some(Slot {
            chunk,
            at,
            end,
            begun: false,
            fetching: None,
            storing: 0,
            committing: false,
        });
        let command = store::Command::FillChunk { key: line.key, chunk, newest };
        line.tell(shared, Step::Chunk { slot: index }, command);
    }

    fn advance_slot(&mut self, index: usize, line: &mut Line, shared: &mut Shared) {
        let Some(slot) = &mut self.slots[index] else { return };
        if !slot.begun || slot.fetching.is_some() || slot.committing {
            return;
        }
        if slot.at < slot.end && slot.storing < STORING_MAX {
            if let Some((buffer, reserved)) = line.paced_buffer(shared, PAYLOAD_BYTES_MAX) {
                slot.fetching = Some(reserved);
                let body = CommandBody::Fetch { lba: Lba(slot.at), end: Lba(slot.end), buffer };
                line.ask(shared, Step::Fetch { slot: index }, body);
            }
        } else if slot.at == slot.end && slot.storing == 0 {
            slot.committing = true;
            let command = store::Command::FillCommit { key: line.key, chunk: slot.chunk };
            line.tell(shared, Step::Commit { slot: index }, command);
        }
    }

    /// A page of the source's list.
    pub(super) fn listed(
        &mut self,
        answer: Answer,
        line: &Line,
        shared: &mut Shared,
    ) -> Result<(), Trouble> {
        let (header, page) = list(&line.order, answer.map_err(source_trouble)?)?;
        self.listing = false;
        shared.counters.list_bytes += page.len() as u64;
        if header.blocks > line.shape.blocks {
            // What lies beyond the end here would be left out, and yet count as copied.
            return Err(Trouble::Failed(FillFailure::Larger));
        }
        self.position.get_or_insert(header.trimmed);
        let good = self.comparison.source_page(header.next, entries(&page));
        if good { Ok(()) } else { Err(mismatch()) }
    }

    /// A page of the own list.
    pub(super) fn own_listed(
        &mut self,
        next: u32,
        entries: impl Iterator<Item = ListEntry>,
    ) -> Result<(), Trouble> {
        self.listing = false;
        let good = self.comparison.own_page(next, entries);
        if good { Ok(()) } else { Err(own_trouble(ReplicaError::Invalid)) }
    }

    /// A run of blocks, or that there are no more.
    pub(super) fn fetched(
        &mut self,
        index: usize,
        answer: Answer,
        line: &mut Line,
        shared: &mut Shared,
    ) -> Result<(), Trouble> {
        let slot = self.slots[index].as_mut().expect("an answer for a chunk that is copied");
        let reserved = slot.fetching.take().expect("an answer to what was asked");
        let record = match answer {
            Ok(ReplyBody::Record(record)) => record,
            other => {
                line.pace.finish(reserved, 0);
                return match other {
                    Ok(ReplyBody::Done) => {
                        slot.at = slot.end;
                        Ok(())
                    }
                    Ok(_) => Err(mismatch()),
                    Err(error) => Err(source_trouble(error)),
                };
            }
        };
        let bytes = record.payload().len();
        line.pace.finish(reserved, bytes);
        let header = record.header();
        let after = header.lba.0.saturating_add(u64::from(header.blocks.0));
        let asked_for = header.kind == RecordKind::Write
            && header.key == line.key
            && header.block_size == line.shape.block_size
            && header.position.epoch <= line.order.epoch
            && header.lba.0 >= slot.at
            && after <= slot.end;
        if !asked_for {
            return Err(mismatch());
        }
        line.copied_bytes += bytes as u64;
        shared.counters.chunk_bytes += bytes as u64;
        line.seen = line.seen.max(header.position.seq);
        slot.at = after;
        slot.storing += 1;
        let command = store::Command::FillData { key: line.key, record };
        line.tell(shared, Step::Data { slot: index }, command);
        Ok(())
    }

    /// The store has begun a chunk, taken a run, or made a chunk count.
    pub(super) fn stored(
        &mut self,
        step: Step,
        answer: &Answer,
        shared: &mut Shared,
    ) -> Result<(), Trouble> {
        if let Err(error) = answer {
            return Err(own_trouble(*error));
        }
        let slot = |slots: &mut [Option<Slot>], index: usize| {
            slots[index].take().expect("an answer for a chunk that is copied")
        };
        match step {
            Step::Chunk { slot: index } => {
                let found = slot(&mut self.slots, index);
                self.slots[index] = Some(Slot { begun: true, ..found });
            }
            Step::Data { slot: index } => {
                let found = slot(&mut self.slots, index);
                self.slots[index] = Some(Slot { storing: found.storing - 1, ..found });
            }
            Step::Commit { slot: index } => {
                slot(&mut self.slots, index);
                shared.counters.chunks += 1;
            }
            Step::Free => self.frees -= 1,
            Step::Hello
            | Step::List
            | Step::Fetch { .. }
            | Step::Scan { .. }
            | Step::Run { .. }
            | Step::News
            | Step::Begin
            | Step::End
            | Step::Append
            | Step::CommitNews => unreachable!("{step:?} is no answer of the store to a copy"),
        }
        Ok(())
    }
}
