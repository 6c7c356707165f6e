//! Filling: this replica's chunks come from a peer's.
//!
//! A replica that is being filled has no log: its own was dropped, since what it says of blocks
//! that are copied may be wrong by then. Home stays, and of each chunk the metadata area says
//! through which seq it holds every record; what a peer has that is newer is copied (`stage`),
//! what the peer does not have is freed. At the end the log begins anew after the position that
//! the peer stated: everything through there is home, and the rest comes from its log.
//!
//! That the replica is being filled is durable first and goes last, so no crash in between leaves
//! one that seems whole.

use base::{BlockCount, Position, ReplicaError, ReplicaKey, ReplyBody, Seq};

use crate::journal::After;
use crate::metadata::{ChunkPlace, Entry, KEPT};
use crate::replica::{Exclusive, ScanHints};
use crate::segments::SegmentState;
use crate::store::{Phase, Store};

pub(crate) use crate::stage::Fill;

impl Store {
    /// Blocks of a chunk of this replica: the unit for [`Command::List`](crate::Command::List) at the
    /// source.
    pub fn chunk_unit(&self, key: ReplicaKey) -> Option<BlockCount> {
        let slot = *self.by_key.get(&key)?;
        let blocks = self.chunk_blocks(self.replica_ref(slot).block_size);
        Some(BlockCount(u32::try_from(blocks).expect("a chunk's blocks")))
    }

    /// The first chunk of this replica at or after number `from` that home has: its number, and the
    /// seq through which it holds every record; zero: that is not known.
    ///
    /// A chunk that a source lists is to be copied unless it is here with a seq that is at least
    /// the listed one.
    pub fn next_chunk(&self, key: ReplicaKey, from: u32) -> Option<(u32, Seq)> {
        let slot = *self.by_key.get(&key)?;
        let replica = self.replica_ref(slot);
        let (chunk, place) = replica.chunks.next(u64::from(from))?;
        let kept = replica.filling && place.kept;
        let through = if kept { place.newest.max(replica.kept_through) } else { place.newest };
        Some((chunk, through))
    }

    pub(crate) fn fill_begin(&mut self, tag: u64, key: ReplicaKey) {
        let slot = match self.find_for_change(key) {
            Ok(slot) => slot,
            Err(error) => return self.done(tag, Err(error)),
        };
        if self.replica_ref(slot).exclusive != Exclusive::None {
            return self.done(tag, Err(ReplicaError::Invalid));
        }
        self.abort_staged(slot, ReplicaError::Invalid);
        self.drop_pending(slot, Seq::ZERO, ReplicaError::Filling);
        self.replica_mut(slot).exclusive = Exclusive::Fill(tag);
    }

    /// Nothing of the replica's is under way any more.
    pub(crate) fn start_filling(&mut self, slot: u16, tag: u64) {
        let replica = self.replica_mut(slot);
        if replica.filling {
            replica.exclusive = Exclusive::None;
            return self.done(tag, Ok(ReplyBody::Done));
        }
        replica.exclusive = Exclusive::Journal;
        let (ordinal, keep_home) = (replica.next_ordinal, !replica.damaged);
        // What was not committed may not have happened.
        let through = replica.commit;
        if keep_home {
            self.distrust_touched(slot);
        }
        let entry = Entry::Filling { replica: slot, ordinal, through, keep_home };
        self.journal.push(entry, After::Done(tag));
    }

    /// Of a chunk that something in the log touches, nothing is known when the log is gone.
    fn distrust_touched(&mut self, slot: u16) {
        let chunk_blocks = self.chunk_blocks(self.replica_ref(slot).block_size) as u64;
        for at in 0..self.index.slots() {
            if let Some((owner, block, _)) = self.index.slot(at)
                && owner == slot
            {
                self.distrust(slot, u32::try_from(block / chunk_blocks).expect("a chunk number"));
            }
        }
        let mut from = 0;
        while let Some((start, end)) = self.replica_ref(slot).extents.next_through(from, u64::MAX) {
            from = end;
            let mut chunk = start / chunk_blocks;
            let end = end.div_ceil(chunk_blocks);
            while let Some((number, _)) = self.replica_ref(slot).chunks.next_before(chunk, end) {
                chunk = u64::from(number) + 1;
                self.distrust(slot, number);
            }
        }
    }

    fn distrust(&mut self, replica: u16, chunk: u32) {
        let chunks = &mut self.replica_mut(replica).chunks;
        if let Some(old) = chunks.place(chunk)
            && old.newest != Seq::ZERO
        {
            let place = ChunkPlace { newest: Seq::ZERO, ..old };
            chunks.set(chunk, Some(place));
            self.journal.push(Entry::Chunk { replica, chunk, place }, After::Nothing);
        }
    }

    /// The replica has lost its log, durably.
    pub(crate) fn apply_filling(&mut self, slot: u16, ordinal: u64, through: Seq, keep_home: bool) {
        if self.phase == Phase::Open {
            self.forget_index(slot);
        }
        let replica = self.replica_mut(slot);
        replica.filling = true;
        replica.noted = Seq::ZERO;
        replica.on_media = Seq::ZERO;
        replica.noted_on_media = Seq::ZERO;
        replica.kept_through = through;
        replica.damaged = false;
        replica.exclusive = Exclusive::None;
        replica.restarts.clear();
        replica.undurable.clear();
        replica.scan_hints = ScanHints::default();
        let answers = core::mem::take(&mut replica.answers);
        let flushes = core::mem::take(&mut replica.flushes);
        let parked = core::mem::take(&mut replica.parked);
        let segments = core::mem::take(&mut replica.segments);
        self.begin_log(slot, ordinal, Position::ZERO);
        for segment in segments {
            self.segments.set_state(segment, SegmentState::Free);
        }
        for tag in
            answers.iter().map(|answer| answer.tag).chain(flushes.iter().map(|(_, tag)| *tag))
        {
            self.done(tag, Err(ReplicaError::Filling));
        }
        for read in parked {
            self.fail_read(read, ReplicaError::Filling);
        }
        self.keep_chunks(slot, keep_home);
    }

    /// Marks the chunks that are as good as the log was, or drops all of them.
    fn keep_chunks(&mut self, slot: u16, keep: bool) {
        // In a checkpoint, chunks come after this entry and say themselves whether they were kept.
        let mut from = 0;
        while let Some((chunk, place)) = self.replica_ref(slot).chunks.next(from) {
            from = u64::from(chunk) + 1;
            let kept = ChunkPlace { kept: place.newest != Seq::ZERO, ..place };
            self.replica_mut(slot).chunks.set(chunk, keep.then_some(kept));
            if !keep {
                // No discard: there may be very many.
                self.chunks.release(place.location);
            }
        }
    }

    /// The replica is filled, durably.
    pub(crate) fn apply_filled(&mut self, slot: u16, ordinal: u64, position: Position) {
        self.replica_mut(slot).filling = false;
        self.replica_mut(slot).exclusive = Exclusive::None;
        self.begin_log(slot, ordinal, position);
    }

    /// The log of a replica is empty and goes on after `position`.
    fn begin_log(&mut self, slot: u16, ordinal: u64, position: Position) {
        let replica = self.replica_mut(slot);
        replica.first_ordinal = ordinal;
        replica.flushed_ordinal = ordinal;
        replica.next_ordinal = replica.next_ordinal.max(ordinal);
        replica.previous_crc = 0;
        replica.trimmed = position;
        replica.flushed = position;
        replica.queued = position;
        replica.issued = position;
        replica.written = position;
        replica.durable = position.seq;
        replica.commit = position.seq;
        replica.commit_durable = position.seq;
    }

    /// The slot of a replica that is being filled and takes this chunk.
    pub(crate) fn find_filling(&self, key: ReplicaKey, chunk: u32) -> Result<u16, ReplicaError> {
        let slot = self.find_for_change(key)?;
        let replica = self.replica_ref(slot);
        let blocks = self.chunk_blocks(replica.block_size) as u64;
        let exists = u64::from(chunk) < replica.blocks.div_ceil(blocks);
        if !replica.filling || replica.exclusive != Exclusive::None || !exists {
            return Err(ReplicaError::Invalid);
        }
        Ok(slot)
    }

    pub(crate) fn fill_free(&mut self, tag: u64, key: ReplicaKey, chunk: u32) {
        let slot = match self.find_filling(key, chunk) {
            Ok(slot) => slot,
            Err(error) => return self.done(tag, Err(error)),
        };
        if self.fill.has_staged(slot, chunk) {
            return self.done(tag, Err(ReplicaError::Invalid));
        }
        self.journal.push(Entry::ChunkFree { replica: slot, chunk }, After::Done(tag));
    }

    pub(crate) fn fill_end(&mut self, tag: u64, key: ReplicaKey, position: Position) {
        let slot = match self.find_filling(key, 0) {
            Ok(slot) => slot,
            Err(error) => return self.done(tag, Err(error)),
        };
        let replica = self.replica_mut(slot);
        let possible = position.epoch <= replica.sealed
            && (position.epoch == base::Epoch::NONE) == (position.seq == Seq::ZERO)
            && position.seq.0 < KEPT;
        if !possible || self.fill.has_any(slot) {
            return self.done(tag, Err(ReplicaError::Invalid));
        }
        let replica = self.replica_mut(slot);
        replica.exclusive = Exclusive::Journal;
        let ordinal = replica.next_ordinal;
        let entry = Entry::Filled { replica: slot, ordinal, position };
        self.journal.push(entry, After::Done(tag));
    }
}
