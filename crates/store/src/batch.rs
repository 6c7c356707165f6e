//! What a log segment holds: a header page, then batches one after the other.
//!
//! A batch is one or more header pages with the encoded headers of its records, then their
//! payloads, each padded to whole pages. The batch header is the member's own and binds what
//! follows to this pool, replica, segment and page, and to the batch before.
//!
//! Segment header, one page: magic `HFSG`, CRC32C of the page (as zero), then
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 8 | 16 | pool id |
//! | 24 | 16 + 4 | volume id, shard index |
//! | 44 | 4 | incarnation of the replica |
//! | 48 | 4 | segment's index in the pool |
//! | 52 | 4 | CRC of the last batch before this segment, 0: none |
//! | 56 | 8 | ordinal: grows from segment to segment of the replica, from 1, never reused |
//! | 64 | 8 | seq of the first record to come |
//! | 72 | 8 | number of the first batch to come |
//! | 80 | 8 | epoch of the last record before |
//!
//! Batch header: magic `HFBT`, CRC32C of the used header bytes (as zero), then
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 8 | 16 | pool id |
//! | 24 | 16 + 4 | volume id, shard index |
//! | 44 | 4 | incarnation |
//! | 48 | 4 | segment's index |
//! | 52 | 4 | CRC of the batch before (its bytes 4..8), 0: none |
//! | 56 | 8 | ordinal of the segment |
//! | 64 | 8 | seq of the first record |
//! | 72 | 8 | number of the batch: counts the replica's batches from 1 |
//! | 80 | 8 | commit seq known |
//! | 88 | 8 | durable seq known: a log that ends before it has lost data |
//! | 96 | 4 | page of this header in the segment |
//! | 100 | 4 | pages of payload |
//! | 104 | 4 | header bytes in use |
//! | 108 | 2 | records |
//! | 110 | 2 | header pages |
//! | 112 | … | encoded record headers, one after the other |

use base::checksum::crc32c_without;
use base::limits::{PAGE_BYTES, PAYLOAD_BYTES_MAX, RECORD_HEADER_BYTES_MAX};
use base::{Epoch, PoolId, RecordHeader, ReplicaKey, Seq, ShardIndex, VolumeId};

use crate::api::Parts;
use crate::bytes::{array_at, put, u16_at, u32_at, u64_at};

pub(crate) const SEGMENT_MAGIC: [u8; 4] = *b"HFSG";
pub(crate) const BATCH_MAGIC: [u8; 4] = *b"HFBT";
const CRC_OFFSET: usize = 4;
/// Bytes of a batch header before its record headers.
pub(crate) const BATCH_FIXED_BYTES: usize = 112;
/// Where a batch header states its length in bytes.
pub(crate) const BATCH_LENGTH_OFFSET: usize = 104;
/// Records of one batch, at most.
pub(crate) const BATCH_RECORDS_MAX: usize = 32;
/// Payload bytes of one batch, at most.
pub(crate) const BATCH_PAYLOAD_BYTES_MAX: usize = 1 << 20;

const _: () = assert!(BATCH_RECORDS_MAX + 2 <= Parts::COUNT_MAX);
const _: () =
    assert!(BATCH_FIXED_BYTES + BATCH_RECORDS_MAX * RECORD_HEADER_BYTES_MAX <= PAYLOAD_BYTES_MAX);
/// A batch of one record fits any segment.
const _: () = assert!(
    (PAYLOAD_BYTES_MAX + 2 * PAGE_BYTES + BATCH_FIXED_BYTES + RECORD_HEADER_BYTES_MAX) as u64
        <= crate::layout::SEGMENT_BYTES_MIN
);

/// Whose a segment is: what every structure in it is bound to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Owner {
    pub(crate) pool: PoolId,
    pub(crate) key: ReplicaKey,
    pub(crate) incarnation: u32,
    pub(crate) segment: u32,
    pub(crate) ordinal: u64,
}

impl Owner {
    fn encode(&self, page: &mut [u8]) {
        put(page, 8, &self.pool.bytes());
        put(page, 24, &self.key.volume.bytes());
        put(page, 40, &self.key.shard.0.to_le_bytes());
        put(page, 44, &self.incarnation.to_le_bytes());
        put(page, 48, &self.segment.to_le_bytes());
        put(page, 56, &self.ordinal.to_le_bytes());
    }

    fn decode(page: &[u8]) -> Self {
        Self {
            pool: PoolId::from_bytes(array_at(page, 8)),
            key: ReplicaKey {
                volume: VolumeId::from_bytes(array_at(page, 24)),
                shard: ShardIndex(u32_at(page, 40)),
            },
            incarnation: u32_at(page, 44),
            segment: u32_at(page, 48),
            ordinal: u64_at(page, 56),
        }
    }
}

/// The first page of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SegmentHeader {
    pub(crate) owner: Owner,
    pub(crate) previous_crc: u32,
    pub(crate) first_seq: Seq,
    pub(crate) first_batch: u64,
    pub(crate) previous_epoch: Epoch,
}

impl SegmentHeader {
    pub(crate) fn encode(&self, page: &mut [u8]) {
        page.fill(0);
        put(page, 0, &SEGMENT_MAGIC);
        self.owner.encode(page);
        put(page, 52, &self.previous_crc.to_le_bytes());
        put(page, 64, &self.first_seq.0.to_le_bytes());
        put(page, 72, &self.first_batch.to_le_bytes());
        put(page, 80, &self.previous_epoch.0.to_le_bytes());
        let crc = crc32c_without(page, CRC_OFFSET);
        put(page, CRC_OFFSET, &crc.to_le_bytes());
    }

    /// The header in `page`, if it is a whole one.
    pub(crate) fn decode(page: &[u8]) -> Option<Self> {
        if page[0..4] != SEGMENT_MAGIC
            || u32_at(page, CRC_OFFSET) != crc32c_without(page, CRC_OFFSET)
        {
            return None;
        }
        Some(Self {
            owner: Owner::decode(page),
            previous_crc: u32_at(page, 52),
            first_seq: Seq(u64_at(page, 64)),
            first_batch: u64_at(page, 72),
            previous_epoch: Epoch(u64_at(page, 80)),
        })
    }
}

/// What the header of `segment` says or, if that is lost, what its first batch says of it.
/// `pages` are the segment's first pages, as many as the header and a batch's header may have.
pub(crate) fn segment_header(pages: &[u8], segment: u32) -> Option<SegmentHeader> {
    let header = SegmentHeader::decode(&pages[..PAGE_BYTES])
        .or_else(|| segment_header_by_batch(pages.get(PAGE_BYTES..)?, 1))?;
    (header.owner.segment == segment).then_some(header)
}

/// What the header of a segment would say if it began with the batch at its page `page`, with which `pages` begin.
pub(crate) fn segment_header_by_batch(pages: &[u8], page: u32) -> Option<SegmentHeader> {
    if pages.len() < PAGE_BYTES {
        return None;
    }
    let owner = Owner::decode(pages);
    let (batch, _) = BatchHeader::decode(pages, &owner, page)?;
    let record = RecordHeader::decode(pages.get(BATCH_FIXED_BYTES..)?).ok()?;
    Some(SegmentHeader {
        owner,
        previous_crc: batch.previous_crc,
        first_seq: batch.first_seq,
        first_batch: batch.number,
        previous_epoch: record.previous_epoch,
    })
}

/// Whether a page that is no whole header may have been one, of a segment or of a batch of this pool.
pub(crate) fn resembles_header(page: &[u8], pool: PoolId) -> bool {
    page[0..4] == SEGMENT_MAGIC || page[0..4] == BATCH_MAGIC || Owner::decode(page).pool == pool
}

/// The fixed part of a batch header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BatchHeader {
    pub(crate) owner: Owner,
    pub(crate) previous_crc: u32,
    pub(crate) first_seq: Seq,
    pub(crate) number: u64,
    pub(crate) commit: Seq,
    pub(crate) durable: Seq,
    pub(crate) page: u32,
    pub(crate) payload_pages: u32,
    pub(crate) header_bytes: u32,
    pub(crate) records: u16,
    pub(crate) header_pages: u16,
}

impl BatchHeader {
    /// Pages of the whole batch.
    pub(crate) fn pages(&self) -> u32 {
        u32::from(self.header_pages) + self.payload_pages
    }

    /// Completes a header whose record headers are already at [`BATCH_FIXED_BYTES`] in `pages`;
    /// gives its CRC.
    pub(crate) fn encode(&self, pages: &mut [u8]) -> u32 {
        let used = self.header_bytes as usize;
        pages[..BATCH_FIXED_BYTES].fill(0);
        pages[used..usize::from(self.header_pages) * PAGE_BYTES].fill(0);
        put(pages, 0, &BATCH_MAGIC);
        self.owner.encode(pages);
        put(pages, 52, &self.previous_crc.to_le_bytes());
        put(pages, 64, &self.first_seq.0.to_le_bytes());
        put(pages, 72, &self.number.to_le_bytes());
        put(pages, 80, &self.commit.0.to_le_bytes());
        put(pages, 88, &self.durable.0.to_le_bytes());
        put(pages, 96, &self.page.to_le_bytes());
        put(pages, 100, &self.payload_pages.to_le_bytes());
        put(pages, 104, &self.header_bytes.to_le_bytes());
        put(pages, 108, &self.records.to_le_bytes());
        put(pages, 110, &self.header_pages.to_le_bytes());
        let crc = crc32c_without(&pages[..used], CRC_OFFSET);
        put(pages, CRC_OFFSET, &crc.to_le_bytes());
        crc
    }

    /// The batch header at the start of `pages`, with its CRC, if it is whole, possible, and at
    /// page `page` of `owner`'s segment. `pages` reaches as far as a header may.
    pub(crate) fn decode(pages: &[u8], owner: &Owner, page: u32) -> Option<(Self, u32)> {
        if pages.len() < PAGE_BYTES || pages[0..4] != BATCH_MAGIC || u32_at(pages, 96) != page {
            return None;
        }
        let header = Self {
            owner: Owner::decode(pages),
            previous_crc: u32_at(pages, 52),
            first_seq: Seq(u64_at(pages, 64)),
            number: u64_at(pages, 72),
            commit: Seq(u64_at(pages, 80)),
            durable: Seq(u64_at(pages, 88)),
            page,
            payload_pages: u32_at(pages, 100),
            header_bytes: u32_at(pages, 104),
            records: u16_at(pages, 108),
            header_pages: u16_at(pages, 110),
        };
        let used = header.header_bytes as usize;
        if header.owner != *owner
            || used < BATCH_FIXED_BYTES
            || used > pages.len()
            || used.div_ceil(PAGE_BYTES) != usize::from(header.header_pages)
            || header.records == 0
            || usize::from(header.records) > BATCH_RECORDS_MAX
            || header.payload_pages as usize > (BATCH_PAYLOAD_BYTES_MAX / PAGE_BYTES)
        {
            return None;
        }
        let crc = crc32c_without(&pages[..used], CRC_OFFSET);
        (u32_at(pages, CRC_OFFSET) == crc).then_some((header, crc))
    }
}

/// What a batch in a log says of itself and of what was before it, as far as a page tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchFacts {
    /// Its first record.
    pub first: Seq,
    /// Its last record.
    pub last: Seq,
    /// Through which record the log was on media before it was written: rot in what it vouches for is not
    /// taken for a write that was cut off.
    pub durable: Seq,
    /// Of its segment: later ones are higher. What begins again at a lower seq in a later segment took its place.
    pub ordinal: u64,
    /// Its pages.
    pub pages: u32,
}

/// The batch that a page of a log's device begins, if its header is whole and fits in the page. For the
/// simulator, which wants to know what its rot strikes: whose the page is, it has to know itself.
pub fn batch_facts(page: &[u8]) -> Option<BatchFacts> {
    if page.len() < PAGE_BYTES {
        return None;
    }
    let owner = Owner::decode(page);
    let (header, _) = BatchHeader::decode(page, &owner, u32_at(page, 96))?;
    let (first, durable, ordinal) = (header.first_seq, header.durable, owner.ordinal);
    let last = Seq(first.0.checked_add(u64::from(header.records) - 1)?);
    Some(BatchFacts { first, last, durable, ordinal, pages: header.pages() })
}

/// Whole pages of a record's payload in the log.
pub(crate) fn payload_pages(header: &RecordHeader) -> u32 {
    u32::try_from(header.payload_bytes().div_ceil(PAGE_BYTES)).expect("bounded by limits")
}

/// Pages that a batch header may take, at most.
pub(crate) const BATCH_HEADER_PAGES_MAX: usize =
    (BATCH_FIXED_BYTES + BATCH_RECORDS_MAX * RECORD_HEADER_BYTES_MAX).div_ceil(PAGE_BYTES);

#[cfg(test)]
mod tests {
    use super::*;

    fn owner() -> Owner {
        Owner {
            pool: PoolId::from_bytes([1; 16]),
            key: ReplicaKey { volume: VolumeId::from_bytes([2; 16]), shard: ShardIndex(3) },
            incarnation: 4,
            segment: 5,
            ordinal: 6,
        }
    }

    fn common(magic: [u8; 4], previous_crc: u32) -> Vec<u8> {
        let mut bytes = magic.to_vec();
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&[1; 16]);
        bytes.extend_from_slice(&[2; 16]);
        for value in [3, 4, 5, previous_crc] {
            bytes.extend_from_slice(&value.to_le_bytes());
        }
        bytes.extend_from_slice(&6_u64.to_le_bytes());
        bytes
    }

    #[test]
    fn golden_bytes_of_a_segment_header() {
        let header = SegmentHeader {
            owner: owner(),
            previous_crc: 7,
            first_seq: Seq(8),
            first_batch: 9,
            previous_epoch: Epoch(10),
        };
        let mut expected = common(*b"HFSG", 7);
        for value in [8_u64, 9, 10] {
            expected.extend_from_slice(&value.to_le_bytes());
        }
        expected.resize(PAGE_BYTES, 0);
        let crc = base::checksum::crc32c(&expected);
        expected[4..8].copy_from_slice(&crc.to_le_bytes());
        let mut page = vec![0xee; PAGE_BYTES];
        header.encode(&mut page);
        assert_eq!(page, expected);
        assert_eq!(SegmentHeader::decode(&page), Some(header));
        page[4000] ^= 1;
        assert_eq!(SegmentHeader::decode(&page), None);
    }

    #[test]
    fn golden_bytes_of_a_batch_header() {
        let header = BatchHeader {
            owner: owner(),
            previous_crc: 7,
            first_seq: Seq(8),
            number: 9,
            commit: Seq(10),
            durable: Seq(11),
            page: 12,
            payload_pages: 13,
            header_bytes: 115,
            records: 1,
            header_pages: 1,
        };
        let mut expected = common(*b"HFBT", 7);
        for value in [8_u64, 9, 10, 11] {
            expected.extend_from_slice(&value.to_le_bytes());
        }
        for value in [12_u32, 13, 115] {
            expected.extend_from_slice(&value.to_le_bytes());
        }
        expected.extend_from_slice(&[1, 0, 1, 0]);
        expected.extend_from_slice(b"abc");
        let crc = base::checksum::crc32c(&expected);
        expected[4..8].copy_from_slice(&crc.to_le_bytes());
        expected.resize(PAGE_BYTES, 0);
        let mut page = vec![0xee; PAGE_BYTES];
        page[BATCH_FIXED_BYTES..115].copy_from_slice(b"abc");
        assert_eq!(header.encode(&mut page), crc);
        assert_eq!(page, expected);
        assert_eq!(BatchHeader::decode(&page, &owner(), 12), Some((header, crc)));
        // Elsewhere, or in another life of the segment, it is not a batch.
        assert_eq!(BatchHeader::decode(&page, &owner(), 13), None);
        let later = Owner { ordinal: 7, ..owner() };
        assert_eq!(BatchHeader::decode(&page, &later, 12), None);
        let facts = BatchFacts {
            first: Seq(8),
            last: Seq(8),
            durable: Seq(11),
            ordinal: 6,
            pages: header.pages(),
        };
        assert_eq!(batch_facts(&page), Some(facts));
        assert_eq!(batch_facts(&page[..PAGE_BYTES - 1]), None);
        for bit in 0..115 * 8 {
            page[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(BatchHeader::decode(&page, &owner(), 12), None, "bit {bit}");
            assert_eq!(batch_facts(&page), None, "bit {bit}");
            page[bit / 8] ^= 1 << (bit % 8);
        }
    }
}
