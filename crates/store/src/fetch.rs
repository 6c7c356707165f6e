//! What a peer that fills its replica from this one is told: which chunks home has, and blocks.
//!
//! **What is given.** A fill copies chunks and then replays the log after a position *p* that the
//! first list states: everything through *p* is home for good. A copied block must therefore be
//! right once the records after *p* have been replayed over it. For each block the newest of these
//! is given:
//!
//! 1. the log's version, if its segment is committed as a whole (so no truncation takes it back);
//! 2. zeroes, if a committed discard made them;
//! 3. the log's version that a flush wave is just putting in home's place: that block of home can
//!    be neither the old one nor the new one until the wave counts;
//! 4. home's version. No wave rewrites it: a wave moves only what the index or rule 3 knows.
//!
//! Rules 3 and 4 may give a version older than a committed one that an uncommitted record hides.
//! That one is above *p*: a segment is home for good only when everything that was written, by the
//! time nothing in it was current any more, is committed; what hides it is not. So the peer
//! replays it. Everything given is committed, so nothing that an opening truncates gets out.
//!
//! **What a run's position says.** Its seq is that of the commit if the blocks are those of the
//! shard after that record. If something uncommitted covers them (rules 2 to 4 under a newer record), it is 1:
//! good for a fill, and for nothing else. A run is all of one kind.

use base::chunks::{self, ListEntry, ListHeader, NO_MORE, UNKNOWN};
use base::limits::PAYLOAD_BYTES_MAX;
use base::planted::{self, Bug};
use base::{
    BlockCount, BufferMut, Epoch, Lba, Position, RecordHeader, RecordKind, ReplicaError,
    ReplicaKey, ReplyBody, Seq,
};

use crate::layout::{CHUNK_BYTES_MAX, CHUNK_BYTES_MIN};
use crate::read::{Read, Source};
use crate::replica::Replica;
use crate::store::Store;

/// Chunks of the map that one list looks at, at most.
const LIST_CHUNKS_MAX: u64 = 1 << 20;

/// A read whose blocks are the first run of written ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fetch {
    from: u64,
    end: u64,
    /// The commit seq when the run was found, if nothing uncommitted covers it.
    pub(crate) settled: Option<Seq>,
}

impl Store {
    /// The replica that a peer may copy from.
    fn find_source(&self, key: ReplicaKey) -> Result<&Replica, ReplicaError> {
        let replica = self.replica_ref(self.find(key)?);
        if replica.filling {
            return Err(ReplicaError::Filling);
        }
        if replica.damaged {
            return Err(ReplicaError::Damaged);
        }
        Ok(replica)
    }

    pub(crate) fn list(
        &mut self,
        tag: u64,
        key: ReplicaKey,
        unit: BlockCount,
        first: u32,
        mut buffer: BufferMut,
    ) {
        let mut entries = core::mem::take(&mut self.listed);
        entries.clear();
        let listed = self.list_units(key, unit, first, buffer.capacity(), &mut entries);
        let result = listed.map(|header| {
            let used = chunks::encode(&header, &entries, buffer.payload_mut());
            ReplyBody::Chunks(buffer.freeze().payload(used))
        });
        self.listed = entries;
        self.done(tag, result);
    }

    fn list_units(
        &self,
        key: ReplicaKey,
        unit: BlockCount,
        first: u32,
        bytes: usize,
        entries: &mut Vec<ListEntry>,
    ) -> Result<ListHeader, ReplicaError> {
        let replica = self.find_source(key)?;
        let capacity = chunks::capacity(bytes.min(PAYLOAD_BYTES_MAX));
        let unit_bytes = unit.bytes(replica.block_size);
        let possible =
            unit.0.is_power_of_two() && (CHUNK_BYTES_MIN..=CHUNK_BYTES_MAX).contains(&unit_bytes);
        if !possible || capacity == 0 {
            return Err(ReplicaError::Invalid);
        }
        let trimmed = replica.home_through();
        let mut header =
            ListHeader { trimmed, commit: replica.commit, next: NO_MORE, blocks: replica.blocks };
        let (unit, own) = (u64::from(unit.0), self.chunk_blocks(replica.block_size) as u64);
        let units = replica.blocks.div_ceil(unit);
        let mut chunk = u64::from(first) * unit / own;
        let stop = chunk + LIST_CHUNKS_MAX;
        // Own chunks that the last unit of the list consists of, and how many of them there are.
        let mut missing = 0;
        while let Some((number, place)) = replica.chunks.next_before(chunk, stop) {
            chunk = u64::from(number) + 1;
            let start = u64::from(number) * own / unit;
            let end = (chunk * own).div_ceil(unit).min(units);
            for at in start.max(u64::from(first))..end {
                let at = u32::try_from(at).expect("a volume has fewer units");
                let newest = if place.newest == Seq::ZERO { UNKNOWN } else { place.newest };
                if let Some(last) = entries.last_mut()
                    && last.chunk == at
                {
                    last.newest = last.newest.max(newest);
                    missing -= 1;
                    continue;
                }
                distrust_holes(entries, missing);
                if entries.len() == capacity {
                    header.next = at;
                    return Ok(header);
                }
                entries.push(ListEntry { chunk: at, newest });
                let unit_end = ((u64::from(at) + 1) * unit).min(replica.blocks);
                let chunks = unit_end.div_ceil(own) - u64::from(at) * unit / own;
                missing = chunks - 1;
            }
        }
        distrust_holes(entries, missing);
        if stop * own < replica.blocks {
            header.next = u32::try_from(stop * own / unit).expect("a volume has fewer units");
        }
        Ok(header)
    }

    pub(crate) fn start_fetch(
        &mut self,
        tag: u64,
        key: ReplicaKey,
        lba: Lba,
        end: Lba,
        buffer: BufferMut,
    ) {
        let replica = match self.find_source(key) {
            Ok(replica) => replica,
            Err(error) => return self.done(tag, Err(error)),
        };
        let bytes = end
            .0
            .checked_sub(lba.0)
            .and_then(|blocks| blocks.checked_mul(u64::from(replica.block_size.bytes())));
        if end.0 > replica.blocks || !matches!(bytes, Some(1..=CHUNK_BYTES_MAX)) {
            return self.done(tag, Err(ReplicaError::Invalid));
        }
        let slot = replica.slot;
        let id = self.add_read(tag, slot, buffer);
        let fetch = Fetch { from: lba.0, end: end.0, settled: None };
        self.read_mut(id).fetch = Some(fetch);
        self.plan_read(id);
    }

    /// Finds the run that a fetch is to read: its blocks and their sources; no blocks if there is
    /// none. False if chunk metadata must be read first.
    pub(crate) fn find_run(&mut self, read: &mut Read) -> Result<bool, ReplicaError> {
        let Some(mut fetch) = read.fetch else { return Ok(true) };
        let slot = read.replica;
        if self.replica_ref(slot).damaged {
            return Err(ReplicaError::Damaged);
        }
        let room = read.buffer.as_ref().map_or(0, BufferMut::capacity).min(PAYLOAD_BYTES_MAX);
        let most = room / read.block_bytes;
        let commit = self.replica_ref(slot).commit;
        read.blocks = 0;
        for block in fetch.from..fetch.end {
            let found = self.settled_source(slot, block, read.block_bytes);
            let begun = !read.sources.is_empty();
            let Some((source, is_settled)) = found else {
                if begun {
                    break;
                }
                return Ok(false);
            };
            let settled = is_settled.then_some(commit);
            match source {
                Source::Zero | Source::Damaged if begun => break,
                Source::Zero => {}
                Source::Damaged => return Err(ReplicaError::Damaged),
                Source::Log(..) | Source::Home { .. } => {
                    if begun && settled != fetch.settled {
                        break;
                    }
                    if !begun {
                        read.lba = block;
                        fetch.settled = settled;
                    }
                    read.sources.push(source);
                    if read.sources.len() == most {
                        break;
                    }
                }
            }
        }
        read.blocks = read.sources.len();
        read.fetch = Some(fetch);
        Ok(true)
    }

    /// Where the version of a block is that the module's rules choose, and whether nothing
    /// uncommitted covers it. `None`: chunk metadata must be read first.
    fn settled_source(
        &mut self,
        slot: u16,
        block: u64,
        block_bytes: usize,
    ) -> Option<(Source, bool)> {
        let replica = self.replica_ref(slot);
        let commit = replica.commit;
        let newest = self.index.lookup(slot, block);
        if let Some(entry) = newest
            && (self.segments.all[self.segments.of(entry.sector)].last_seq <= commit
                || planted::is(Bug::FetchUnsettled))
        {
            return Some((Source::Log(entry.sector, entry.crc), true));
        }
        let mut settled = newest.is_none();
        match replica.extents.covering(block) {
            Some((_, seq)) if seq <= commit.0 => return Some((Source::Zero, settled)),
            Some(_) => settled = false,
            None => {}
        }
        let chunk_blocks = self.geometry.chunk_bytes / block_bytes as u64;
        let chunk = u32::try_from(block / chunk_blocks).expect("a chunk number");
        let index = usize::try_from(block % chunk_blocks).expect("in a chunk");
        if let Some(entry) = self.moving(slot, chunk, index) {
            return Some((Source::Log(entry.sector, entry.crc), settled));
        }
        match self.replica_ref(slot).chunks.place(chunk) {
            None => Some((Source::Zero, settled)),
            Some(place) => {
                self.home_source(slot, chunk, place, index).map(|source| (source, settled))
            }
        }
    }

    /// The header of a run's record.
    pub(crate) fn run_header(&mut self, id: u32, fetch: Fetch) -> Option<RecordHeader> {
        let read = self.read_mut(id);
        let (slot, incarnation) = (read.replica, read.incarnation);
        let (lba, blocks) = (read.lba, read.blocks);
        let replica = self.same_replica(slot, incarnation)?;
        let epoch = replica.sealed.max(replica.written.epoch).max(Epoch(1));
        let seq = fetch.settled.unwrap_or(Seq::ZERO).max(Seq(1));
        Some(RecordHeader {
            key: replica.key,
            position: Position::new(epoch, seq),
            previous_epoch: epoch,
            kind: RecordKind::Write,
            block_size: replica.block_size,
            lba: Lba(lba),
            blocks: BlockCount(u32::try_from(blocks).expect("at most 256 blocks")),
            fua: false,
        })
    }
}

/// A unit that has chunks and lacks others: whether one was freed, and when, is not known any
/// more.
fn distrust_holes(entries: &mut [ListEntry], missing: u64) {
    if let Some(last) = entries.last_mut()
        && missing > 0
    {
        last.newest = UNKNOWN;
    }
}
