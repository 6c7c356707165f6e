//! Metadata: the entries that describe replicas and chunks, and the pages that carry them.
//!
//! The metadata area (two copies, each of two regions) holds one live region: a header page, the
//! checkpoint's pages, the journal's pages. Checkpoint and journal carry the same entries, which
//! only ever set values, so applying one twice does no harm. The region with the highest
//! generation whose header is whole is the live one.
//!
//! A page: magic (`HFMH` header, `HFMC` checkpoint, `HFMJ` journal), CRC32C of the page (as
//! zero), then
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 8 | 16 | pool id |
//! | 24 | 8 | generation of the region |
//! | 32 | 8 | number: of the page in the checkpoint, or of the journal, from 0 |
//! | 40 | 4 | CRC of the page before (journal: the header's, then the journal page's) |
//! | 44 | 4 | bytes of entries; in the header: pages of the checkpoint |
//! | 48 | … | entries |
//!
//! An entry is a kind byte and its fields in a row, little-endian.

use base::checksum::crc32c_without;
use base::limits::PAGE_BYTES;
use base::{BlockSize, Epoch, PoolId, Position, ReplicaKey, Seq, ShardIndex, VolumeId};

use crate::bytes::{Reader, array_at, put, u32_at, u64_at};
use crate::layout::{Areas, FormatWrite, Geometry, PAGE, device_index};

/// Bytes of a page before its entries.
pub(crate) const PAGE_HEADER_BYTES: usize = 48;
/// Bytes of entries that a page holds.
pub(crate) const PAGE_ENTRY_BYTES: usize = PAGE_BYTES - PAGE_HEADER_BYTES;
/// The largest encoded entry.
pub(crate) const ENTRY_BYTES_MAX: usize = 40;
const CRC_OFFSET: usize = 4;

/// What a metadata page is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PageKind {
    Header,
    Checkpoint,
    Journal,
}

impl PageKind {
    const fn magic(self) -> [u8; 4] {
        match self {
            Self::Header => *b"HFMH",
            Self::Checkpoint => *b"HFMC",
            Self::Journal => *b"HFMJ",
        }
    }
}

/// The header of a metadata page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Page {
    pub(crate) kind: PageKind,
    pub(crate) pool: PoolId,
    pub(crate) generation: u64,
    pub(crate) number: u64,
    pub(crate) previous_crc: u32,
    /// Bytes of entries, or pages of the checkpoint.
    pub(crate) length: u32,
}

impl Page {
    /// Completes a page whose entries are already in place; gives its CRC.
    pub(crate) fn encode(&self, page: &mut [u8]) -> u32 {
        let used = match self.kind {
            PageKind::Header => 0,
            PageKind::Checkpoint | PageKind::Journal => self.length as usize,
        };
        page[..PAGE_HEADER_BYTES].fill(0);
        page[PAGE_HEADER_BYTES + used..PAGE_BYTES].fill(0);
        put(page, 0, &self.kind.magic());
        put(page, 8, &self.pool.bytes());
        put(page, 24, &self.generation.to_le_bytes());
        put(page, 32, &self.number.to_le_bytes());
        put(page, 40, &self.previous_crc.to_le_bytes());
        put(page, 44, &self.length.to_le_bytes());
        let crc = crc32c_without(&page[..PAGE_BYTES], CRC_OFFSET);
        put(page, CRC_OFFSET, &crc.to_le_bytes());
        crc
    }

    /// The page's header and CRC, if it is a whole page of this kind and pool.
    pub(crate) fn decode(page: &[u8], kind: PageKind, pool: PoolId) -> Option<(Self, u32)> {
        if page[0..4] != kind.magic() || array_at(page, 8) != pool.bytes() {
            return None;
        }
        let header = Self {
            kind,
            pool,
            generation: u64_at(page, 24),
            number: u64_at(page, 32),
            previous_crc: u32_at(page, 40),
            length: u32_at(page, 44),
        };
        if kind != PageKind::Header && header.length as usize > PAGE_ENTRY_BYTES {
            return None;
        }
        let crc = crc32c_without(&page[..PAGE_BYTES], CRC_OFFSET);
        (crc == u32_at(page, CRC_OFFSET)).then_some((header, crc))
    }
}

/// Where the log goes on after a reopening or a truncation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Restart {
    /// The ordinal of the segment in which the log goes on.
    pub(crate) ordinal: u64,
    /// The ordinal of the last segment that counts before it; those between are void.
    pub(crate) previous: u64,
    /// That segment's end, in pages.
    pub(crate) end_page: u32,
    /// The last record that counts.
    pub(crate) keep: Position,
}

/// Where a chunk's home is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ChunkPlace {
    /// The chunk's index in the pool.
    pub(crate) location: u32,
    /// Which metadata slot is the valid one.
    pub(crate) slot: u8,
    /// The version that slot must have.
    pub(crate) version: u32,
    /// Of every record of the shard's log through this one, the chunk holds what it did to it, or
    /// something newer; and no record after this one that is home did anything to it. Zero: not
    /// known.
    pub(crate) newest: Seq,
    /// While its replica is being filled: it was there before, and nothing that was in the log then
    /// touches it.
    pub(crate) kept: bool,
}

/// In the encoded newest seq: the chunk was kept.
pub(crate) const KEPT: u64 = 1 << 63;

/// One fact. The replica is named by its slot number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    /// Numbers that must not be used again: incarnations and chunk versions up to these.
    Counters { incarnation: u32, version: u32 },
    /// A replica is in this slot.
    Create { replica: u16, incarnation: u32, key: ReplicaKey, block_size: BlockSize, blocks: u64 },
    /// The slot is free; its segments and chunks too.
    Delete { replica: u16 },
    /// Epochs below this one are refused.
    Seal { replica: u16, epoch: Epoch },
    /// Segments below this ordinal are home, and no truncation can want them back; their last
    /// record has this position.
    Flushed { replica: u16, ordinal: u64, position: Position },
    /// Segments below this ordinal are free; the log begins after this position.
    Trim { replica: u16, ordinal: u64, position: Position },
    /// Nothing at or below this seq is ever truncated.
    Commit { replica: u16, seq: Seq },
    /// The log is on media through this seq, until an entry says less.
    OnMedia { replica: u16, seq: Seq },
    /// The log goes on elsewhere.
    Restart { replica: u16, restart: Restart },
    /// The chunk is there, with that metadata.
    Chunk { replica: u16, chunk: u32, place: ChunkPlace },
    /// The chunk holds nothing and is nowhere.
    ChunkFree { replica: u16, chunk: u32 },
    /// The replica is being filled: it has no log, and will go on in a segment with this ordinal
    /// or a higher one. Without `keep_home` it has no chunk either; else chunks that are kept
    /// hold every record through `through`.
    Filling { replica: u16, ordinal: u64, through: Seq, keep_home: bool },
    /// The replica has so many blocks.
    Grow { replica: u16, blocks: u64 },
    /// It is filled: home holds everything through this position, or what comes after it in the log.
    Filled { replica: u16, ordinal: u64, position: Position },
}

/// Appends fields to a small buffer.
pub(crate) struct Encoded {
    bytes: [u8; ENTRY_BYTES_MAX],
    length: usize,
}

impl Encoded {
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }

    fn new(kind: u8) -> Self {
        let mut bytes = [0; ENTRY_BYTES_MAX];
        bytes[0] = kind;
        Self { bytes, length: 1 }
    }

    fn with(mut self, field: &[u8]) -> Self {
        put(&mut self.bytes, self.length, field);
        self.length += field.len();
        self
    }

    fn u16(self, value: u16) -> Self {
        self.with(&value.to_le_bytes())
    }

    fn u32(self, value: u32) -> Self {
        self.with(&value.to_le_bytes())
    }

    fn u64(self, value: u64) -> Self {
        self.with(&value.to_le_bytes())
    }
}

impl Entry {
    /// The slot of the replica that it is about; a `Create` is about one that is not there yet.
    pub(crate) const fn replica(&self) -> Option<u16> {
        match *self {
            Self::Counters { .. } | Self::Create { .. } => None,
            Self::Delete { replica }
            | Self::Seal { replica, .. }
            | Self::Flushed { replica, .. }
            | Self::Trim { replica, .. }
            | Self::Commit { replica, .. }
            | Self::OnMedia { replica, .. }
            | Self::Restart { replica, .. }
            | Self::Chunk { replica, .. }
            | Self::ChunkFree { replica, .. }
            | Self::Filling { replica, .. }
            | Self::Filled { replica, .. }
            | Self::Grow { replica, .. } => Some(replica),
        }
    }

    pub(crate) fn encode(&self) -> Encoded {
        match *self {
            Self::Counters { incarnation, version } => {
                Encoded::new(1).u32(incarnation).u32(version)
            }
            Self::Create { replica, incarnation, key, block_size, blocks } => Encoded::new(2)
                .u16(replica)
                .u32(incarnation)
                .with(&key.volume.bytes())
                .u32(key.shard.0)
                .with(&[block_size.log2()])
                .u64(blocks),
            Self::Delete { replica } => Encoded::new(3).u16(replica),
            Self::Seal { replica, epoch } => Encoded::new(4).u16(replica).u64(epoch.0),
            Self::Flushed { replica, ordinal, position } => {
                Encoded::new(5).u16(replica).u64(ordinal).u64(position.epoch.0).u64(position.seq.0)
            }
            Self::Trim { replica, ordinal, position } => {
                Encoded::new(6).u16(replica).u64(ordinal).u64(position.epoch.0).u64(position.seq.0)
            }
            Self::Commit { replica, seq } => Encoded::new(7).u16(replica).u64(seq.0),
            Self::Restart { replica, restart } => Encoded::new(8)
                .u16(replica)
                .u64(restart.ordinal)
                .u64(restart.previous)
                .u32(restart.end_page)
                .u64(restart.keep.epoch.0)
                .u64(restart.keep.seq.0),
            Self::Chunk { replica, chunk, place } => Encoded::new(9)
                .u16(replica)
                .u32(chunk)
                .u32(place.location | u32::from(place.slot) << 31)
                .u32(place.version)
                .u64(place.newest.0 | if place.kept { KEPT } else { 0 }),
            Self::ChunkFree { replica, chunk } => Encoded::new(10).u16(replica).u32(chunk),
            Self::Filling { replica, ordinal, through, keep_home } => Encoded::new(11)
                .u16(replica)
                .u64(ordinal)
                .u64(through.0)
                .with(&[u8::from(keep_home)]),
            Self::Filled { replica, ordinal, position } => {
                Encoded::new(12).u16(replica).u64(ordinal).u64(position.epoch.0).u64(position.seq.0)
            }
            Self::Grow { replica, blocks } => Encoded::new(13).u16(replica).u64(blocks),
            Self::OnMedia { replica, seq } => Encoded::new(14).u16(replica).u64(seq.0),
        }
    }

    /// The next entry of a page; `None` if it is not one.
    pub(crate) fn decode(from: &mut Reader<'_>) -> Option<Self> {
        let position =
            |from: &mut Reader<'_>| Some(Position::new(Epoch(from.u64()?), Seq(from.u64()?)));
        Some(match from.u8()? {
            1 => Self::Counters { incarnation: from.u32()?, version: from.u32()? },
            2 => Self::Create {
                replica: from.u16()?,
                incarnation: from.u32()?,
                key: ReplicaKey {
                    volume: VolumeId::from_bytes(from.array()?),
                    shard: ShardIndex(from.u32()?),
                },
                block_size: BlockSize::from_log2(from.u8()?)?,
                blocks: from.u64()?,
            },
            3 => Self::Delete { replica: from.u16()? },
            4 => Self::Seal { replica: from.u16()?, epoch: Epoch(from.u64()?) },
            5 => Self::Flushed {
                replica: from.u16()?,
                ordinal: from.u64()?,
                position: position(from)?,
            },
            6 => {
                Self::Trim { replica: from.u16()?, ordinal: from.u64()?, position: position(from)? }
            }
            7 => Self::Commit { replica: from.u16()?, seq: Seq(from.u64()?) },
            8 => Self::Restart {
                replica: from.u16()?,
                restart: Restart {
                    ordinal: from.u64()?,
                    previous: from.u64()?,
                    end_page: from.u32()?,
                    keep: position(from)?,
                },
            },
            9 => {
                let (replica, chunk) = (from.u16()?, from.u32()?);
                let (place, version) = (from.u32()?, from.u32()?);
                let slot = u8::from(place >> 31 != 0);
                let newest = from.u64()?;
                let place = ChunkPlace {
                    location: place & 0x7fff_ffff,
                    slot,
                    version,
                    newest: Seq(newest & !KEPT),
                    kept: newest & KEPT != 0,
                };
                Self::Chunk { replica, chunk, place }
            }
            10 => Self::ChunkFree { replica: from.u16()?, chunk: from.u32()? },
            11 => Self::Filling {
                replica: from.u16()?,
                ordinal: from.u64()?,
                through: Seq(from.u64()?),
                keep_home: match from.u8()? {
                    0 => false,
                    1 => true,
                    _ => return None,
                },
            },
            12 => Self::Filled {
                replica: from.u16()?,
                ordinal: from.u64()?,
                position: position(from)?,
            },
            13 => Self::Grow { replica: from.u16()?, blocks: from.u64()? },
            14 => Self::OnMedia { replica: from.u16()?, seq: Seq(from.u64()?) },
            _ => return None,
        })
    }
}

/// Pages that a checkpoint of so many replicas, segments and chunks takes, at most.
pub(crate) fn checkpoint_pages(replicas: u32, segments: u64, chunks: u64) -> u64 {
    // 152 bytes for a replica, 39 for a restart (no more than segments), 23 for a chunk.
    let bytes = u64::from(replicas) * 156 + segments * 40 + chunks * 24;
    bytes.div_ceil((PAGE_ENTRY_BYTES - ENTRY_BYTES_MAX) as u64) + 4
}

/// The writes that make both copies of the metadata area an empty pool: generation 1 in the
/// first region, nothing in the second.
pub(crate) fn fresh(pool: PoolId, geometry: &Geometry, areas: &[Areas]) -> Vec<FormatWrite> {
    let mut header = vec![0; PAGE_BYTES];
    let crc =
        Page { kind: PageKind::Header, pool, generation: 1, number: 0, previous_crc: 0, length: 0 }
            .encode(&mut header);
    debug_assert_ne!(crc, 0);
    let mut writes = Vec::new();
    for (index, areas) in areas.iter().enumerate() {
        for offset in areas.metadata.into_iter().filter(|offset| *offset != 0) {
            let device = device_index(index);
            let journal = offset + (1 + u64::from(geometry.checkpoint_pages)) * PAGE;
            let second = offset + geometry.region_bytes();
            let zeroes = vec![0; PAGE_BYTES];
            writes.push(FormatWrite { device, offset: second, bytes: zeroes.clone() });
            writes.push(FormatWrite { device, offset: journal, bytes: zeroes });
            writes.push(FormatWrite { device, offset, bytes: header.clone() });
        }
    }
    writes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_bytes_of_entries() {
        let key = ReplicaKey { volume: VolumeId::from_bytes([2; 16]), shard: ShardIndex(3) };
        let keep = Position::new(Epoch(7), Seq(8));
        let restart = Restart { ordinal: 4, previous: 5, end_page: 6, keep };
        let place = ChunkPlace { location: 6, slot: 1, version: 7, newest: Seq(8), kept: true };
        let long = |values: &[u64]| -> Vec<u8> {
            values.iter().flat_map(|value| value.to_le_bytes()).collect()
        };
        let cases: [(Entry, Vec<u8>); 14] = [
            (Entry::Counters { incarnation: 1, version: 2 }, vec![1, 1, 0, 0, 0, 2, 0, 0, 0]),
            (
                Entry::Create {
                    replica: 9,
                    incarnation: 4,
                    key,
                    block_size: BlockSize::B4096,
                    blocks: 5,
                },
                [&[2, 9, 0, 4, 0, 0, 0][..], &[2; 16], &[3, 0, 0, 0, 12], &long(&[5])].concat(),
            ),
            (Entry::Delete { replica: 9 }, vec![3, 9, 0]),
            (Entry::Grow { replica: 9, blocks: 5 }, [&[13, 9, 0][..], &long(&[5])].concat()),
            (Entry::Seal { replica: 9, epoch: Epoch(5) }, [&[4, 9, 0][..], &long(&[5])].concat()),
            (
                Entry::Flushed { replica: 9, ordinal: 5, position: keep },
                [&[5, 9, 0][..], &long(&[5, 7, 8])].concat(),
            ),
            (
                Entry::Trim { replica: 9, ordinal: 5, position: keep },
                [&[6, 9, 0][..], &long(&[5, 7, 8])].concat(),
            ),
            (Entry::Commit { replica: 9, seq: Seq(5) }, [&[7, 9, 0][..], &long(&[5])].concat()),
            (Entry::OnMedia { replica: 9, seq: Seq(5) }, [&[14, 9, 0][..], &long(&[5])].concat()),
            (
                Entry::Restart { replica: 9, restart },
                [&[8, 9, 0][..], &long(&[4, 5]), &[6, 0, 0, 0], &long(&[7, 8])].concat(),
            ),
            (
                Entry::Chunk { replica: 9, chunk: 5, place },
                vec![9, 9, 0, 5, 0, 0, 0, 6, 0, 0, 0x80, 7, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0x80],
            ),
            (Entry::ChunkFree { replica: 9, chunk: 5 }, vec![10, 9, 0, 5, 0, 0, 0]),
            (
                Entry::Filling { replica: 9, ordinal: 5, through: Seq(6), keep_home: true },
                [&[11, 9, 0][..], &long(&[5, 6]), &[1]].concat(),
            ),
            (
                Entry::Filled { replica: 9, ordinal: 5, position: keep },
                [&[12, 9, 0][..], &long(&[5, 7, 8])].concat(),
            ),
        ];
        for (entry, expected) in cases {
            assert_eq!(entry.encode().bytes(), expected, "{entry:?}");
            assert_eq!(Entry::decode(&mut Reader::new(&expected)), Some(entry));
            for length in 0..expected.len() {
                assert_eq!(Entry::decode(&mut Reader::new(&expected[..length])), None);
            }
        }
        assert_eq!(Entry::decode(&mut Reader::new(&[15; 40])), None);
    }

    #[test]
    fn golden_bytes_of_a_page() {
        let pool = PoolId::from_bytes([1; 16]);
        let header = Page {
            kind: PageKind::Journal,
            pool,
            generation: 2,
            number: 3,
            previous_crc: 4,
            length: 5,
        };
        let mut expected = b"HFMJ\0\0\0\0".to_vec();
        expected.extend_from_slice(&[1; 16]);
        expected.extend_from_slice(&2_u64.to_le_bytes());
        expected.extend_from_slice(&3_u64.to_le_bytes());
        expected.extend_from_slice(&[4, 0, 0, 0, 5, 0, 0, 0]);
        expected.extend_from_slice(b"hello");
        expected.resize(PAGE_BYTES, 0);
        let crc = base::checksum::crc32c(&expected);
        expected[4..8].copy_from_slice(&crc.to_le_bytes());
        let mut page = vec![0xee; PAGE_BYTES];
        page[PAGE_HEADER_BYTES..PAGE_HEADER_BYTES + 5].copy_from_slice(b"hello");
        assert_eq!(header.encode(&mut page), crc);
        assert_eq!(page, expected);
        assert_eq!(Page::decode(&page, PageKind::Journal, pool), Some((header, crc)));
        assert_eq!(Page::decode(&page, PageKind::Checkpoint, pool), None);
        assert_eq!(Page::decode(&page, PageKind::Journal, PoolId::from_bytes([9; 16])), None);
        page[4095] ^= 1;
        assert_eq!(Page::decode(&page, PageKind::Journal, pool), None);
    }
}
