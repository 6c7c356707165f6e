//! What the metadata's entries do to memory, and the two commands that need a replica for
//! themselves: Delete and Truncate.

use base::planted::{self, Bug};
use base::{Position, ReplicaError, ReplicaKey, ReplyBody, Seq};

use crate::journal::After;
use crate::metadata::{ChunkPlace, Entry, Restart};
use crate::replay::{Link, Replay, Replayed};
use crate::replica::{Exclusive, Replica};
use crate::segments::SegmentState;
use crate::store::{Phase, Store, Task};

impl Store {
    /// Applies a durable entry. At a reopening, entries come from the metadata area: one that
    /// makes no sense gives false.
    pub(crate) fn apply_entry(&mut self, entry: Entry) -> bool {
        let slot = match entry {
            Entry::Counters { incarnation, version } => {
                self.journal.incarnation = self.journal.incarnation.max(incarnation);
                self.journal.version = self.journal.version.max(version);
                return true;
            }
            Entry::Create { replica: slot, incarnation, key, block_size, blocks } => {
                if u32::from(slot) >= self.geometry.replicas_max {
                    return false;
                }
                if self.replicas.len() <= usize::from(slot) {
                    self.replicas.resize_with(usize::from(slot) + 1, || None);
                }
                let chunk_blocks = self.geometry.chunk_bytes >> block_size.log2();
                let limit = base::limits::VOLUME_BYTES_MAX >> block_size.log2();
                let taken = self.replicas[usize::from(slot)].is_some();
                if taken || self.by_key.contains_key(&key) || blocks == 0 || blocks > limit {
                    return false;
                }
                let replica =
                    Replica::new(slot, key, incarnation, block_size, blocks, chunk_blocks);
                self.replicas[usize::from(slot)] = Some(replica);
                self.by_key.insert(key, slot);
                self.journal.incarnation = self.journal.incarnation.max(incarnation);
                return true;
            }
            Entry::Delete { replica }
            | Entry::Seal { replica, .. }
            | Entry::Flushed { replica, .. }
            | Entry::Trim { replica, .. }
            | Entry::Commit { replica, .. }
            | Entry::OnMedia { replica, .. }
            | Entry::Restart { replica, .. }
            | Entry::Chunk { replica, .. }
            | Entry::ChunkFree { replica, .. }
            | Entry::Filling { replica, .. }
            | Entry::Filled { replica, .. }
            | Entry::Grow { replica, .. } => replica,
        };
        let Some(replica) = self.replicas.get_mut(usize::from(slot)).and_then(Option::as_mut)
        else {
            // The replica was deleted while the entry was on its way, in the same page.
            return self.phase == Phase::Open || self.opening.deleted.contains(&slot);
        };
        match entry {
            Entry::Counters { .. } | Entry::Create { .. } => {}
            Entry::Delete { .. } => {
                if self.phase == Phase::Opening {
                    self.opening.deleted.insert(slot);
                }
                self.apply_delete(slot);
            }
            Entry::Seal { epoch, .. } => replica.sealed = replica.sealed.max(epoch),
            Entry::Flushed { ordinal, position, .. } => self.apply_flushed(slot, ordinal, position),
            Entry::Trim { ordinal, position, .. } => self.apply_trim(slot, ordinal, position),
            Entry::Commit { seq, .. } => replica.settled(seq),
            Entry::OnMedia { seq, .. } => replica.on_media = seq,
            Entry::Restart { restart, .. } => replica.note_restart(restart),
            Entry::Chunk { chunk, place, .. } => return self.apply_chunk(slot, chunk, Some(place)),
            Entry::ChunkFree { chunk, .. } => return self.apply_chunk(slot, chunk, None),
            Entry::Filling { ordinal, through, keep_home, .. } => {
                self.apply_filling(slot, ordinal, through, keep_home);
            }
            Entry::Filled { ordinal, position, .. } => self.apply_filled(slot, ordinal, position),
            Entry::Grow { blocks, .. } => return self.apply_grow(slot, blocks),
        }
        true
    }

    fn apply_chunk(&mut self, slot: u16, chunk: u32, place: Option<ChunkPlace>) -> bool {
        let opening = self.phase == Phase::Opening;
        let chunk_blocks = self.geometry.chunk_bytes;
        let replica = self.replica_mut(slot);
        let bytes = replica.blocks << replica.block_size.log2();
        if u64::from(chunk) >= bytes.div_ceil(chunk_blocks) {
            return false;
        }
        let old = replica.chunks.set(chunk, place);
        if let Some(place) = place {
            self.journal.version = self.journal.version.max(place.version);
        }
        let moved = old.map(|old| old.location) != place.map(|place| place.location);
        if let (Some(old), true) = (old, moved) {
            self.release_chunk(old.location);
        }
        match place {
            Some(place) if opening && moved => self.chunks.take(place.location),
            Some(_) | None => true,
        }
    }

    /// Gives a chunk back, telling its device.
    pub(crate) fn release_chunk(&mut self, location: u32) {
        if self.phase == Phase::Opening {
            self.chunks.release(location);
        } else {
            self.releasing += 1;
            let (device, offset) = self.chunk_data_offset(location);
            let length = self.geometry.chunk_bytes;
            self.discard(device, offset, length, Task::Discard { location });
        }
    }

    fn apply_flushed(&mut self, slot: u16, ordinal: u64, position: Position) {
        let replica = self.replica_mut(slot);
        if ordinal > replica.flushed_ordinal {
            replica.flushed_ordinal = ordinal;
            replica.flushed = position;
            replica.commit_durable = replica.commit_durable.max(position.seq);
        }
        for number in 0..self.replica_ref(slot).segments.len() {
            let segment = self.replica_ref(slot).segments[number];
            let state = &self.segments.all[segment as usize];
            if state.ordinal < ordinal && state.state == SegmentState::Settling {
                self.segments.set_state(segment, SegmentState::Clean);
            }
        }
    }

    fn apply_trim(&mut self, slot: u16, ordinal: u64, position: Position) {
        let replica = self.replica_mut(slot);
        replica.first_ordinal = replica.first_ordinal.max(ordinal);
        replica.trimmed = position;
        replica.restarts.retain(|restart| restart.ordinal > ordinal);
        while let Some(segment) = self.replica_ref(slot).segments.front().copied() {
            if self.segments.all[segment as usize].ordinal >= ordinal {
                break;
            }
            self.replica_mut(slot).segments.pop_front();
            self.segments.set_state(segment, SegmentState::Free);
        }
    }

    fn apply_delete(&mut self, slot: u16) {
        // What is said of it from now on would be said of whoever has the slot next, or of nobody.
        for (entry, after) in self.journal.forget(slot) {
            match after {
                After::Done(tag)
                | After::Sealed(tag)
                | After::Truncated(tag)
                | After::Staged(tag) => self.done(tag, Err(ReplicaError::NoReplica)),
                After::Nothing => {}
                After::Wave | After::JobStart => self.after_entry(entry, after),
            }
        }
        self.forget_index(slot);
        let replica = self.replicas[usize::from(slot)].take().expect("a slot in use");
        self.by_key.remove(&replica.key);
        for segment in &replica.segments {
            self.segments.set_state(*segment, SegmentState::Free);
        }
        let mut from = 0;
        while let Some((chunk, place)) = replica.chunks.next(from) {
            from = u64::from(chunk) + 1;
            // No discard: there may be very many.
            self.chunks.release(place.location);
        }
        for id in replica.parked {
            self.fail_read(id, ReplicaError::NoReplica);
        }
        for answer in replica.answers {
            self.done(answer.tag, Err(ReplicaError::NoReplica));
        }
        for (_, tag) in replica.flushes {
            self.done(tag, Err(ReplicaError::NoReplica));
        }
    }

    /// Makes a replica larger. Appends may follow at once; those beyond the old end wait for the
    /// journal to have this.
    pub(crate) fn grow(&mut self, tag: u64, key: ReplicaKey, blocks: u64) {
        let slot = match self.find_for_change(key) {
            Ok(slot) => slot,
            Err(error) => return self.done(tag, Err(error)),
        };
        let replica = self.replica_mut(slot);
        if blocks <= replica.blocks {
            return self.done(tag, Ok(ReplyBody::Done));
        }
        let limit = base::limits::VOLUME_BYTES_MAX >> replica.block_size.log2();
        let deleted = matches!(replica.exclusive, Exclusive::Delete(_));
        if blocks > limit || deleted {
            return self.done(tag, Err(ReplicaError::Invalid));
        }
        replica.blocks_coming = replica.blocks_coming.max(blocks);
        if planted::is(Bug::GrowthNotPersisted) {
            self.apply_grow(slot, blocks);
            return self.done(tag, Ok(ReplyBody::Done));
        }
        self.journal.push(Entry::Grow { replica: slot, blocks }, After::Done(tag));
    }

    /// A size never shrinks, so of two entries the larger one counts.
    fn apply_grow(&mut self, slot: u16, blocks: u64) -> bool {
        let chunk_bytes = self.geometry.chunk_bytes;
        let replica = self.replica_mut(slot);
        if blocks > base::limits::VOLUME_BYTES_MAX >> replica.block_size.log2() {
            return false;
        }
        if blocks > replica.blocks {
            replica.blocks = blocks;
            replica.blocks_coming = replica.blocks_coming.max(blocks);
            replica.chunks.grow(blocks.div_ceil(chunk_bytes >> replica.block_size.log2()));
            if self.phase == Phase::Open {
                self.make_ready(slot);
            }
        }
        true
    }

    pub(crate) fn truncate(&mut self, tag: u64, key: ReplicaKey, keep: Seq) {
        let slot = match self.find_for_change(key) {
            Ok(slot) => slot,
            Err(error) => return self.done(tag, Err(error)),
        };
        let replica = self.replica_ref(slot);
        let (commit, trimmed) = (replica.commit, replica.trimmed.seq);
        if replica.filling {
            return self.done(tag, Err(ReplicaError::Filling));
        }
        if replica.damaged {
            return self.done(tag, Err(ReplicaError::Damaged));
        }
        if replica.exclusive != Exclusive::None || keep < commit {
            return self.done(tag, Err(ReplicaError::Invalid));
        }
        if keep < trimmed {
            return self.done(tag, Err(ReplicaError::Trimmed { trimmed }));
        }
        let error = ReplicaError::OutOfOrder { last: Position::ZERO };
        self.drop_pending(slot, keep, error);
        let replica = self.replica_mut(slot);
        if keep >= replica.queued.seq {
            let last = replica.queued;
            return self.done(tag, Ok(ReplyBody::Truncated { last }));
        }
        replica.exclusive = Exclusive::Truncate(tag, keep);
    }

    /// Goes on with deletions and truncations whose replica has nothing under way any more.
    pub(crate) fn pump_exclusive(&mut self) {
        for slot in 0..self.replicas.len() {
            let Some(replica) = &self.replicas[slot] else { continue };
            let (slot, exclusive) = (replica.slot, replica.exclusive);
            if exclusive == Exclusive::None
                || !replica.batches.is_empty()
                || self.flush.is_busy_with(slot)
                || self.fill.is_busy_with(slot)
                || !replica.seals.is_empty()
            {
                continue;
            }
            match exclusive {
                Exclusive::None | Exclusive::Rebuilding(..) | Exclusive::Journal => {}
                Exclusive::Delete(tag) => {
                    self.replica_mut(slot).exclusive = Exclusive::Journal;
                    self.journal.push(Entry::Delete { replica: slot }, After::Done(tag));
                }
                Exclusive::Fill(tag) => self.start_filling(slot, tag),
                Exclusive::Truncate(tag, keep) => {
                    let trimming = self.replica_ref(slot).segments.iter().any(|segment| {
                        self.segments.all[*segment as usize].state == SegmentState::Trimming
                    });
                    let settling = self.journal.pending().any(|(entry, _)| {
                        matches!(entry, Entry::Flushed { replica, .. } if *replica == slot)
                    });
                    // What is kept is on media before anything says that it is kept.
                    let durable = self.replica_ref(slot).durable >= keep;
                    if !durable {
                        self.want_durable(slot, keep);
                    }
                    if self.replay.is_none() && !trimming && !settling && durable {
                        self.begin_truncation(slot, tag, keep);
                    }
                }
            }
        }
    }

    fn begin_truncation(&mut self, slot: u16, tag: u64, keep: Seq) {
        self.close_open_segment(slot);
        let replica = self.replica_mut(slot);
        replica.exclusive = Exclusive::Rebuilding(tag, keep);
        let replica = self.replica_ref(slot);
        let start = replica.home_through();
        let links: Vec<Link> = replica
            .segments
            .iter()
            .map(|segment| (*segment, &self.segments.all[*segment as usize]))
            .filter(|(_, state)| state.state != SegmentState::Clean && state.first_seq <= keep)
            .map(|(segment, state)| Link {
                segment,
                ordinal: state.ordinal,
                header: None,
                restart: replica.restarts.iter().copied().find(|old| old.previous == state.ordinal),
            })
            .collect();
        // What went home from them may be behind what is found in them now.
        for link in &links {
            if self.segments.all[link.segment as usize].state == SegmentState::Settling {
                self.segments.set_state(link.segment, SegmentState::Full);
            }
        }
        let mut replay = Replay::new(slot, start, keep, links);
        replay.limit = Some(keep);
        self.begin_replay(replay);
    }

    /// The index is what it was at the record to keep: make the log's new end durable.
    pub(crate) fn truncation_replayed(&mut self, replay: &Replay, replayed: Replayed) {
        let slot = replay.slot;
        let Exclusive::Rebuilding(tag, keep) = self.replica_ref(slot).exclusive else {
            return;
        };
        if replayed.damaged || replayed.last.seq != keep {
            // The log cannot be read any more. What could be read is in the index; what is not
            // there is not known.
            let replica = self.replica_mut(slot);
            replica.damaged = true;
            replica.exclusive = Exclusive::None;
            return self.done(tag, Err(ReplicaError::Damaged));
        }
        let replica = self.replica_mut(slot);
        replica.exclusive = Exclusive::Journal;
        let ordinal = replica.next_ordinal;
        let kept = match replayed.end {
            Some((link, page)) => Some((replay.links[link].ordinal, page)),
            // Only segments that are home for good are left, if any.
            None => self
                .replica_ref(slot)
                .segments
                .iter()
                .map(|segment| &self.segments.all[*segment as usize])
                .rfind(|state| state.state == SegmentState::Clean)
                .map(|state| (state.ordinal, state.pages)),
        };
        let entry = match kept {
            Some((previous, end_page)) => Entry::Restart {
                replica: slot,
                restart: Restart { ordinal, previous, end_page, keep: replayed.last },
            },
            None => Entry::Trim { replica: slot, ordinal, position: replayed.last },
        };
        if kept.is_none() {
            self.void_segments(slot, 0);
        }
        // First, or what is cut off would be missed.
        self.note_on_media(slot, replayed.last.seq);
        self.journal.push(entry, After::Truncated(tag));
    }

    /// Frees the segments of a replica after ordinal `previous`: no record in them counts.
    pub(crate) fn void_segments(&mut self, slot: u16, previous: u64) {
        while let Some(segment) = self.replica_ref(slot).segments.back().copied() {
            if self.segments.all[segment as usize].ordinal <= previous {
                break;
            }
            self.replica_mut(slot).segments.pop_back();
            if self.phase == Phase::Open {
                self.segments.set_state(segment, SegmentState::Trimming);
                self.voided.push((slot, segment));
            } else {
                self.segments.set_state(segment, SegmentState::Free);
            }
        }
    }

    pub(crate) fn truncated(&mut self, tag: u64, entry: Entry) {
        let (slot, keep) = match entry {
            Entry::Restart { replica, restart } => {
                self.void_segments(replica, restart.previous);
                (replica, restart.keep)
            }
            Entry::Trim { replica, position, .. } => (replica, position),
            _ => unreachable!("a truncation is a restart or a trim"),
        };
        let mut voided = core::mem::take(&mut self.voided);
        voided.retain(|(owner, segment)| {
            if *owner == slot {
                self.segments.set_state(*segment, SegmentState::Free);
            }
            *owner != slot
        });
        self.voided = voided;
        let replica = self.replica_mut(slot);
        replica.queued = keep;
        replica.issued = keep;
        replica.written = keep;
        replica.previous_crc = 0;
        replica.durable = replica.durable.min(keep.seq);
        for entry in &mut replica.undurable {
            entry.seq = entry.seq.min(keep.seq);
        }
        replica.exclusive = Exclusive::None;
        self.search_again();
        let replica = self.replica_ref(slot);
        if let Some(last) = replica.segments.back().copied() {
            let state = &mut self.segments.all[last as usize];
            state.last_seq = state.last_seq.min(keep.seq);
            if state.last_seq == keep.seq {
                state.last_epoch = keep.epoch;
            }
        }
        // Written, and gone before it was on media.
        while let Some(answer) =
            self.replica_mut(slot).answers.pop_back_if(|answer| answer.seq > keep.seq)
        {
            self.done(answer.tag, Err(ReplicaError::OutOfOrder { last: keep }));
        }
        // A segment after the kept one may have been looked at by a scan.
        self.replica_mut(slot).scan_hints = crate::replica::ScanHints::default();
        self.done(tag, Ok(ReplyBody::Truncated { last: keep }));
        self.settle(slot);
    }
}
