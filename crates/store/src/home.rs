//! Home: chunks of mass devices. A chunk is two metadata slots, used in turn, and its data.
//!
//! Chunk metadata, at the start of a slot:
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 4 | magic `HFCH` |
//! | 4 | 4 | CRC32C of the slot's used bytes with this field zero |
//! | 8 | 16 | pool id |
//! | 24 | 16 + 4 | volume id, shard index |
//! | 44 | 4 | chunk number within the shard |
//! | 48 | 4 | chunk's index in the pool |
//! | 52 | 4 | version, as the metadata area states it |
//! | 56 | 8 | seq through which the chunk holds every record, as the metadata area states it |
//! | 64 | 1 | log2 of the block size |
//! | 65 | 1 | column and kind for erasure coding, 0: whole data |
//! | 66 | 2 | references by snapshots, 0 |
//! | 68 | 4 | blocks |
//! | 72 | 4 | used bytes |
//! | 76 | 52 | zero |
//! | 128 | blocks / 4 | two bits a block: 0 absent (reads as zeroes), 1 present, 2 damaged |
//! | … | 4 × blocks | CRC32C of each present block |

use base::checksum::crc32c_without;
use base::{BlockSize, PoolId, ReplicaKey, Seq, ShardIndex, VolumeId};

use crate::bytes::{array_at, put, u32_at, u64_at};
use crate::layout::PAGE;
use crate::metadata::{ChunkPlace, KEPT};

const MAGIC: [u8; 4] = *b"HFCH";
const CRC_OFFSET: usize = 4;
/// Bytes of the fixed part of a chunk's metadata.
const FIXED_BYTES: usize = 128;

/// Bytes of one metadata slot of a chunk with `chunk_bytes` of data: fixed part, two state bits
/// and a CRC32C for each 512-byte block, in whole pages.
pub(crate) const fn slot_bytes(chunk_bytes: u64) -> u64 {
    let blocks = chunk_bytes / 512;
    (FIXED_BYTES as u64 + blocks / 4 + 4 * blocks).next_multiple_of(PAGE)
}

/// What home knows of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BlockState {
    /// Never written, or discarded: zeroes.
    Absent,
    /// Its data has this checksum.
    Present(u32),
    /// Its data was lost on the way home.
    Damaged,
}

/// Whose a chunk is and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ChunkIdentity {
    pub(crate) pool: PoolId,
    pub(crate) key: ReplicaKey,
    pub(crate) chunk: u32,
    pub(crate) location: u32,
    pub(crate) version: u32,
    pub(crate) block_size: BlockSize,
}

/// A chunk's metadata: the state of each block.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct ChunkMeta {
    pub(crate) newest: Seq,
    states: Vec<u8>,
    crcs: Vec<u32>,
}

impl ChunkMeta {
    /// A chunk of absent blocks.
    pub(crate) fn reset(&mut self, blocks: usize) {
        self.newest = Seq::ZERO;
        self.states.clear();
        self.states.resize(blocks, 0);
        self.crcs.clear();
        self.crcs.resize(blocks, 0);
    }

    pub(crate) fn copy_from(&mut self, other: &Self) {
        self.newest = other.newest;
        self.states.clone_from(&other.states);
        self.crcs.clone_from(&other.crcs);
    }

    pub(crate) fn block(&self, index: usize) -> BlockState {
        match self.states[index] {
            0 => BlockState::Absent,
            1 => BlockState::Present(self.crcs[index]),
            _ => BlockState::Damaged,
        }
    }

    pub(crate) fn set(&mut self, index: usize, state: BlockState) {
        let (state, crc) = match state {
            BlockState::Absent => (0, 0),
            BlockState::Present(crc) => (1, crc),
            BlockState::Damaged => (2, 0),
        };
        self.states[index] = state;
        self.crcs[index] = crc;
    }

    pub(crate) fn is_all_absent(&self) -> bool {
        self.states.iter().all(|state| *state == 0)
    }

    pub(crate) fn has_damage(&self) -> bool {
        self.states.iter().any(|state| *state > 1)
    }

    /// Bytes that the encoded metadata takes, in whole pages.
    pub(crate) fn encoded_bytes(blocks: usize) -> usize {
        (FIXED_BYTES + blocks / 4 + 4 * blocks).next_multiple_of(base::limits::PAGE_BYTES)
    }

    pub(crate) fn encode(&self, identity: &ChunkIdentity, out: &mut [u8]) {
        let blocks = self.states.len();
        let used = FIXED_BYTES + blocks / 4 + 4 * blocks;
        out.fill(0);
        put(out, 0, &MAGIC);
        put(out, 8, &identity.pool.bytes());
        put(out, 24, &identity.key.volume.bytes());
        put(out, 40, &identity.key.shard.0.to_le_bytes());
        put(out, 44, &identity.chunk.to_le_bytes());
        put(out, 48, &identity.location.to_le_bytes());
        put(out, 52, &identity.version.to_le_bytes());
        put(out, 56, &self.newest.0.to_le_bytes());
        out[64] = identity.block_size.log2();
        put(out, 68, &u32::try_from(blocks).expect("a chunk's blocks").to_le_bytes());
        put(out, 72, &u32::try_from(used).expect("a slot's bytes").to_le_bytes());
        for (index, state) in self.states.iter().enumerate() {
            out[FIXED_BYTES + index / 4] |= state << (2 * (index % 4));
        }
        let crcs = FIXED_BYTES + blocks / 4;
        for (index, crc) in self.crcs.iter().enumerate() {
            put(out, crcs + 4 * index, &crc.to_le_bytes());
        }
        let crc = crc32c_without(&out[..used], CRC_OFFSET);
        put(out, CRC_OFFSET, &crc.to_le_bytes());
    }

    /// Fills in from an encoded slot; false if it is not exactly that chunk's.
    #[must_use]
    pub(crate) fn decode(&mut self, identity: &ChunkIdentity, blocks: usize, from: &[u8]) -> bool {
        let used = FIXED_BYTES + blocks / 4 + 4 * blocks;
        if from.len() < used || from[0..4] != MAGIC {
            return false;
        }
        let found = ChunkIdentity {
            pool: PoolId::from_bytes(array_at(from, 8)),
            key: ReplicaKey {
                volume: VolumeId::from_bytes(array_at(from, 24)),
                shard: ShardIndex(u32_at(from, 40)),
            },
            chunk: u32_at(from, 44),
            location: u32_at(from, 48),
            version: u32_at(from, 52),
            block_size: match BlockSize::from_log2(from[64]) {
                Some(size) => size,
                None => return false,
            },
        };
        if found != *identity
            || u32_at(from, 68) as usize != blocks
            || u32_at(from, 72) as usize != used
            || u32_at(from, CRC_OFFSET) != crc32c_without(&from[..used], CRC_OFFSET)
        {
            return false;
        }
        self.reset(blocks);
        self.newest = Seq(u64_at(from, 56));
        for (index, state) in self.states.iter_mut().enumerate() {
            *state = from[FIXED_BYTES + index / 4] >> (2 * (index % 4)) & 3;
        }
        let crcs = FIXED_BYTES + blocks / 4;
        for (index, crc) in self.crcs.iter_mut().enumerate() {
            *crc = u32_at(from, crcs + 4 * index);
        }
        true
    }
}

const LEAF: usize = 512;

/// A chunk's place, packed, and its newest seq.
type Cell = (u64, u64);

/// Chunk number → place, 16 bytes each, in leaves made when first needed.
pub(crate) struct ChunkMap {
    leaves: Vec<Option<Box<[Cell; LEAF]>>>,
    count: usize,
}

impl ChunkMap {
    pub(crate) fn new(chunks: u64) -> Self {
        let leaves = usize::try_from(chunks.div_ceil(LEAF as u64)).expect("bounded by a volume");
        Self { leaves: vec![None; leaves], count: 0 }
    }

    /// Makes room for more chunks.
    pub(crate) fn grow(&mut self, chunks: u64) {
        let leaves = usize::try_from(chunks.div_ceil(LEAF as u64)).expect("bounded by a volume");
        if leaves > self.leaves.len() {
            self.leaves.resize(leaves, None);
        }
    }

    /// Chunks that have a place.
    pub(crate) const fn count(&self) -> usize {
        self.count
    }

    pub(crate) fn place(&self, chunk: u32) -> Option<ChunkPlace> {
        let leaf = self.leaves.get(chunk as usize / LEAF)?.as_ref()?;
        Self::unpack(leaf[chunk as usize % LEAF])
    }

    fn unpack((value, newest): Cell) -> Option<ChunkPlace> {
        // location + 1 in the low 31 bits, so that zero is nowhere.
        let location = u32::try_from(value & 0x7fff_ffff).expect("masked").checked_sub(1)?;
        let version = u32::try_from(value >> 32).expect("shifted");
        let slot = u8::from(value >> 31 & 1 != 0);
        Some(ChunkPlace {
            location,
            slot,
            version,
            newest: Seq(newest & !KEPT),
            kept: newest & KEPT != 0,
        })
    }

    /// Sets a chunk's place; gives the old one.
    pub(crate) fn set(&mut self, chunk: u32, place: Option<ChunkPlace>) -> Option<ChunkPlace> {
        let leaf = &mut self.leaves[chunk as usize / LEAF];
        if place.is_none() && leaf.is_none() {
            return None;
        }
        let leaf = leaf.get_or_insert_with(|| Box::new([(0, 0); LEAF]));
        let cell = &mut leaf[chunk as usize % LEAF];
        let old = Self::unpack(*cell);
        *cell = place.map_or((0, 0), |place| {
            let packed = u64::from(place.version) << 32
                | u64::from(place.slot) << 31
                | u64::from(place.location + 1);
            (packed, place.newest.0 | if place.kept { KEPT } else { 0 })
        });
        self.count = self.count + usize::from(place.is_some()) - usize::from(old.is_some());
        old
    }

    /// The first chunk at or after `from` that has a place.
    pub(crate) fn next(&self, from: u64) -> Option<(u32, ChunkPlace)> {
        self.next_before(from, u64::MAX)
    }

    /// The first chunk at or after `from` and before `end` that has a place.
    pub(crate) fn next_before(&self, from: u64, end: u64) -> Option<(u32, ChunkPlace)> {
        let mut at = usize::try_from(from).ok()?;
        let end = usize::try_from(end).unwrap_or(usize::MAX).min(self.leaves.len() * LEAF);
        while at < end {
            let Some(leaf) = &self.leaves[at / LEAF] else {
                at = (at / LEAF + 1) * LEAF;
                continue;
            };
            if let Some(place) = Self::unpack(leaf[at % LEAF]) {
                return Some((u32::try_from(at).expect("a chunk number"), place));
            }
            at += 1;
        }
        None
    }
}

/// Which chunks of the pool are free.
pub(crate) struct ChunkSpace {
    used: Vec<u64>,
    chunks: u32,
    free: u32,
    cursor: u32,
}

impl ChunkSpace {
    pub(crate) fn new(chunks: u32) -> Self {
        let words = chunks.div_ceil(64) as usize;
        Self { used: vec![0; words], chunks, free: chunks, cursor: 0 }
    }

    pub(crate) const fn chunks(&self) -> u32 {
        self.chunks
    }

    pub(crate) const fn free(&self) -> u32 {
        self.free
    }

    pub(crate) fn is_used(&self, location: u32) -> bool {
        self.used[location as usize / 64] >> (location % 64) & 1 != 0
    }

    /// Marks a chunk used; false if it is out of range or used already.
    #[must_use]
    pub(crate) fn take(&mut self, location: u32) -> bool {
        if location >= self.chunks || self.is_used(location) {
            return false;
        }
        self.used[location as usize / 64] |= 1 << (location % 64);
        self.free -= 1;
        true
    }

    /// A free chunk, now used.
    pub(crate) fn allocate(&mut self) -> Option<u32> {
        if self.free == 0 {
            return None;
        }
        loop {
            if self.cursor >= self.chunks {
                self.cursor = 0;
            }
            let word = self.used[self.cursor as usize / 64];
            if word == u64::MAX {
                self.cursor = (self.cursor / 64 + 1) * 64;
                continue;
            }
            let location = self.cursor;
            self.cursor += 1;
            if self.take(location) {
                return Some(location);
            }
        }
    }

    pub(crate) fn release(&mut self, location: u32) {
        assert!(self.is_used(location), "a free chunk cannot be freed");
        self.used[location as usize / 64] &= !(1 << (location % 64));
        self.free += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_bytes_of_chunk_metadata() {
        let identity = ChunkIdentity {
            pool: PoolId::from_bytes([1; 16]),
            key: ReplicaKey { volume: VolumeId::from_bytes([2; 16]), shard: ShardIndex(3) },
            chunk: 4,
            location: 5,
            version: 6,
            block_size: BlockSize::B4096,
        };
        let mut meta = ChunkMeta::default();
        meta.reset(16);
        meta.newest = Seq(7);
        meta.set(1, BlockState::Present(0x0a0b_0c0d));
        meta.set(5, BlockState::Damaged);
        let mut expected = b"HFCH\0\0\0\0".to_vec();
        expected.extend_from_slice(&[1; 16]);
        expected.extend_from_slice(&[2; 16]);
        for value in [3_u32, 4, 5, 6, 7, 0] {
            expected.extend_from_slice(&value.to_le_bytes());
        }
        expected.extend_from_slice(&[12, 0, 0, 0, 16, 0, 0, 0, 196, 0, 0, 0]);
        expected.resize(128, 0);
        expected.extend_from_slice(&[0b0100, 0b1000, 0, 0]);
        expected.extend_from_slice(&[0, 0, 0, 0, 0x0d, 0x0c, 0x0b, 0x0a]);
        expected.resize(196, 0);
        let crc = base::checksum::crc32c(&expected);
        expected[4..8].copy_from_slice(&crc.to_le_bytes());
        expected.resize(4096, 0);
        let mut page = vec![0xee; 4096];
        meta.encode(&identity, &mut page);
        assert_eq!(page, expected);
        let mut decoded = ChunkMeta::default();
        assert!(decoded.decode(&identity, 16, &page));
        assert_eq!(decoded, meta);
        let newer = ChunkIdentity { version: 7, ..identity };
        assert!(!decoded.decode(&newer, 16, &page));
        for byte in 0..196 {
            page[byte] ^= 4;
            assert!(!decoded.decode(&identity, 16, &page), "byte {byte}");
            page[byte] ^= 4;
        }
    }

    #[test]
    fn the_map_and_the_space_keep_count() {
        let mut map = ChunkMap::new(3000);
        let mut space = ChunkSpace::new(70);
        let mut taken = Vec::new();
        for chunk in (0..2800).step_by(41) {
            let location = space.allocate().expect("69 of 70");
            let (slot, newest) = (u8::from(chunk % 2 == 1), Seq(u64::from(chunk) * 3));
            let place = ChunkPlace { location, slot, version: !chunk, newest, kept: slot == 1 };
            assert_eq!(map.set(chunk, Some(place)), None);
            assert_eq!(map.place(chunk), Some(place));
            taken.push((chunk, place));
        }
        assert_eq!(map.count(), taken.len());
        assert_eq!(space.free() as usize, 70 - taken.len());
        let mut from = 0;
        for (chunk, place) in &taken {
            assert_eq!(map.next(from), Some((*chunk, *place)));
            from = u64::from(*chunk) + 1;
        }
        assert_eq!(map.next(from), None);
        for (chunk, place) in taken {
            assert_eq!(map.set(chunk, None), Some(place));
            space.release(place.location);
        }
        assert_eq!((map.count(), space.free()), (0, 70));
        assert!((0..70).all(|_| space.allocate().is_some()) && space.allocate().is_none());
    }
}
