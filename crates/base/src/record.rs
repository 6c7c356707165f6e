//! The log record: one write, discard, zeroes or EpochStart. Encoded once, by the head; the same
//! bytes travel to every member and are stored in its log.
//!
//! Layout, little-endian, [`FIXED_BYTES`] and then one CRC32C per block of a write's payload:
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 4 | magic `HFR1` |
//! | 4 | 2 | version, 1 |
//! | 6 | 1 | kind: 1 write, 2 discard, 3 write-zeroes, 4 EpochStart |
//! | 7 | 1 | log2 of the block size: 9 or 12 |
//! | 8 | 16 | volume id |
//! | 24 | 4 | shard index |
//! | 28 | 4 | header bytes, CRCs included |
//! | 32 | 8 | epoch |
//! | 40 | 8 | seq |
//! | 48 | 8 | epoch of the record at seq - 1 (log matching) |
//! | 56 | 8 | LBA |
//! | 64 | 4 | blocks |
//! | 68 | 4 | payload bytes |
//! | 72 | 4 | flags: bit 0 FUA |
//! | 76 | 4 | CRC32C of the header with this field zero |
//! | 80 | 4 × n | CRC32C of each payload block |
//!
//! The block CRCs cover data only; what binds a block to its volume, address and version is the
//! header that carries the CRC.

use crate::buffer::{Buffer, BufferMut};
use crate::checksum::{crc32c, crc32c_without};
use crate::ids::{Epoch, Position, ReplicaKey, Seq, ShardIndex, VolumeId};
use crate::limits::{PAYLOAD_BYTES_MAX, RANGE_BLOCKS_MAX};
use crate::units::{BlockCount, BlockSize, Lba};

/// Bytes of a record header before its block CRCs.
pub const FIXED_BYTES: usize = 80;
/// First bytes of every record header.
pub const MAGIC: [u8; 4] = *b"HFR1";
/// The version this code writes and reads.
pub const VERSION: u16 = 1;

const CRC_OFFSET: usize = 76;
const FLAG_FUA: u32 = 1;

/// What a record does to its range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecordKind {
    /// Writes its payload.
    Write,
    /// Discards: reads as zeroes afterwards.
    Discard,
    /// Writes zeroes.
    WriteZeroes,
    /// First record of an epoch; covers no block.
    EpochStart,
}

impl RecordKind {
    const fn code(self) -> u8 {
        match self {
            Self::Write => 1,
            Self::Discard => 2,
            Self::WriteZeroes => 3,
            Self::EpochStart => 4,
        }
    }

    const fn from_code(code: u8) -> Option<Self> {
        match code {
            1 => Some(Self::Write),
            2 => Some(Self::Discard),
            3 => Some(Self::WriteZeroes),
            4 => Some(Self::EpochStart),
            _ => None,
        }
    }
}

/// The fixed part of a record, decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordHeader {
    /// Whose log it belongs to.
    pub key: ReplicaKey,
    /// Epoch of the head that wrote it, and its place in the log.
    pub position: Position,
    /// Epoch of the record before it; [`Epoch::NONE`] for seq 1.
    pub previous_epoch: Epoch,
    /// What it does.
    pub kind: RecordKind,
    /// The volume's block size.
    pub block_size: BlockSize,
    /// First block.
    pub lba: Lba,
    /// Number of blocks; 0 for EpochStart.
    pub blocks: BlockCount,
    /// The front end asked for media.
    pub fua: bool,
}

/// Why bytes are not a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// Shorter than its fixed part or than the length it states.
    #[error("record header is cut short")]
    Truncated,
    /// Not our magic.
    #[error("not a record (wrong magic)")]
    Magic,
    /// A version this code does not know.
    #[error("record version {0} is not supported (this build knows version {VERSION})")]
    Version(u16),
    /// The header's checksum does not match.
    #[error("record header checksum mismatch")]
    HeaderChecksum,
    /// A field holds an impossible value.
    #[error("record field is invalid: {0}")]
    Field(&'static str),
    /// A payload block's checksum does not match.
    #[error("checksum mismatch in payload block {0}")]
    BlockChecksum(u32),
}

impl RecordHeader {
    /// Bytes of this record's payload; zero unless it is a write.
    pub fn payload_bytes(&self) -> usize {
        match self.kind {
            RecordKind::Write => {
                usize::try_from(self.blocks.bytes(self.block_size)).expect("a payload fits memory")
            }
            RecordKind::Discard | RecordKind::WriteZeroes | RecordKind::EpochStart => 0,
        }
    }

    /// Bytes of this record's encoded header, block CRCs included.
    pub fn header_bytes(&self) -> usize {
        FIXED_BYTES + 4 * (self.payload_bytes() >> self.block_size.log2())
    }

    fn check(&self) -> Result<(), RecordError> {
        match self.kind {
            RecordKind::Write => {
                if self.blocks.0 == 0
                    || self.blocks.bytes(self.block_size) > PAYLOAD_BYTES_MAX as u64
                {
                    return Err(RecordError::Field("blocks of a write"));
                }
            }
            RecordKind::Discard | RecordKind::WriteZeroes => {
                if self.blocks.0 == 0 || self.blocks.0 > RANGE_BLOCKS_MAX {
                    return Err(RecordError::Field("blocks of a discard or write-zeroes"));
                }
            }
            RecordKind::EpochStart => {
                if self.blocks.0 != 0 || self.lba.0 != 0 {
                    return Err(RecordError::Field("range of an EpochStart"));
                }
            }
        }
        if self.lba.checked_add(self.blocks).is_none() {
            return Err(RecordError::Field("LBA"));
        }
        if self.position.epoch == Epoch::NONE || self.previous_epoch > self.position.epoch {
            return Err(RecordError::Field("epoch"));
        }
        if self.position.seq == Seq::ZERO {
            return Err(RecordError::Field("seq"));
        }
        Ok(())
    }

    fn encode_fixed(&self, out: &mut [u8]) {
        let header_bytes = u32::try_from(self.header_bytes()).expect("bounded by limits");
        let payload_bytes = u32::try_from(self.payload_bytes()).expect("bounded by limits");
        out[0..4].copy_from_slice(&MAGIC);
        out[4..6].copy_from_slice(&VERSION.to_le_bytes());
        out[6] = self.kind.code();
        out[7] = self.block_size.log2();
        out[8..24].copy_from_slice(&self.key.volume.bytes());
        out[24..28].copy_from_slice(&self.key.shard.0.to_le_bytes());
        out[28..32].copy_from_slice(&header_bytes.to_le_bytes());
        out[32..40].copy_from_slice(&self.position.epoch.0.to_le_bytes());
        out[40..48].copy_from_slice(&self.position.seq.0.to_le_bytes());
        out[48..56].copy_from_slice(&self.previous_epoch.0.to_le_bytes());
        out[56..64].copy_from_slice(&self.lba.0.to_le_bytes());
        out[64..68].copy_from_slice(&self.blocks.0.to_le_bytes());
        out[68..72].copy_from_slice(&payload_bytes.to_le_bytes());
        out[72..76].copy_from_slice(&(if self.fua { FLAG_FUA } else { 0 }).to_le_bytes());
        out[76..80].fill(0);
    }

    /// Decodes and checks the header at the start of `bytes`, block CRCs included. On success
    /// `bytes[..header.header_bytes()]` is the whole encoded header.
    pub fn decode(bytes: &[u8]) -> Result<Self, RecordError> {
        let fixed: &[u8; FIXED_BYTES] = bytes.first_chunk().ok_or(RecordError::Truncated)?;
        if fixed[0..4] != MAGIC {
            return Err(RecordError::Magic);
        }
        let version = u16::from_le_bytes(field(fixed, 4));
        if version != VERSION {
            return Err(RecordError::Version(version));
        }
        let stated_bytes = u32::from_le_bytes(field(fixed, 28)) as usize;
        let encoded = bytes.get(..stated_bytes).ok_or(RecordError::Truncated)?;
        if encoded.len() < FIXED_BYTES {
            return Err(RecordError::Field("header bytes"));
        }
        let crc = u32::from_le_bytes(field(fixed, CRC_OFFSET));
        if crc != crc32c_without(encoded, CRC_OFFSET) {
            return Err(RecordError::HeaderChecksum);
        }
        let flags = u32::from_le_bytes(field(fixed, 72));
        if flags & !FLAG_FUA != 0 {
            return Err(RecordError::Field("flags"));
        }
        let header = Self {
            key: ReplicaKey {
                volume: VolumeId::from_bytes(field(fixed, 8)),
                shard: ShardIndex(u32::from_le_bytes(field(fixed, 24))),
            },
            position: Position::new(
                Epoch(u64::from_le_bytes(field(fixed, 32))),
                Seq(u64::from_le_bytes(field(fixed, 40))),
            ),
            previous_epoch: Epoch(u64::from_le_bytes(field(fixed, 48))),
            kind: RecordKind::from_code(fixed[6]).ok_or(RecordError::Field("kind"))?,
            block_size: BlockSize::from_log2(fixed[7]).ok_or(RecordError::Field("block size"))?,
            lba: Lba(u64::from_le_bytes(field(fixed, 56))),
            blocks: BlockCount(u32::from_le_bytes(field(fixed, 64))),
            fua: flags & FLAG_FUA != 0,
        };
        header.check()?;
        if header.header_bytes() != stated_bytes {
            return Err(RecordError::Field("header bytes"));
        }
        if header.payload_bytes() != u32::from_le_bytes(field(fixed, 68)) as usize {
            return Err(RecordError::Field("payload bytes"));
        }
        Ok(header)
    }
}

/// The `N` bytes of `fixed` at `offset`.
fn field<const N: usize>(fixed: &[u8; FIXED_BYTES], offset: usize) -> [u8; N] {
    fixed[offset..offset + N].try_into().expect("a slice of N bytes is N bytes")
}

/// A record with its encoded header and payload.
#[derive(Clone, Debug)]
pub struct Record {
    header: RecordHeader,
    header_bytes: Buffer,
    payload: Buffer,
}

impl Record {
    /// Encodes a record into `buffer`'s header page over the payload it already holds: checksums
    /// each block, then never changes again. Payload pages past a short payload are zeroed up to
    /// the next page boundary, so that a log can write whole pages.
    ///
    /// # Panics
    /// If `header` is not valid or the payload does not fit `buffer`: the head made it.
    pub fn encode(header: RecordHeader, mut buffer: BufferMut) -> Self {
        header.check().expect("a head encodes only valid records");
        let payload_bytes = header.payload_bytes();
        let header_bytes = header.header_bytes();
        let (head, payload) = buffer.split_mut();
        header.encode_fixed(head);
        let block_bytes = header.block_size.bytes() as usize;
        let crcs = head[FIXED_BYTES..].chunks_exact_mut(4);
        for (block, crc) in payload[..payload_bytes].chunks_exact(block_bytes).zip(crcs) {
            crc.copy_from_slice(&crc32c(block).to_le_bytes());
        }
        let crc = crc32c_without(&head[..header_bytes], CRC_OFFSET);
        head[CRC_OFFSET..CRC_OFFSET + 4].copy_from_slice(&crc.to_le_bytes());
        zero_to_page(payload, payload_bytes);
        let frozen = buffer.freeze();
        Self {
            header,
            header_bytes: frozen.header(header_bytes),
            payload: frozen.payload(payload_bytes),
        }
    }

    /// The record that `buffer` holds: encoded header at the start of its header page, payload at
    /// the start of its payload. Everything is verified, every block included.
    pub fn decode(mut buffer: BufferMut) -> Result<Self, RecordError> {
        let (head, payload) = buffer.split_mut();
        let header = RecordHeader::decode(head)?;
        let payload_bytes = header.payload_bytes();
        if payload_bytes > payload.len() {
            return Err(RecordError::Truncated);
        }
        verify_blocks(
            &head[..header.header_bytes()],
            &payload[..payload_bytes],
            header.block_size,
        )?;
        zero_to_page(payload, payload_bytes);
        let frozen = buffer.freeze();
        Ok(Self {
            header,
            header_bytes: frozen.header(header.header_bytes()),
            payload: frozen.payload(payload_bytes),
        })
    }

    /// The decoded header.
    pub fn header(&self) -> &RecordHeader {
        &self.header
    }

    /// The encoded header with its block CRCs.
    pub fn header_bytes(&self) -> &Buffer {
        &self.header_bytes
    }

    /// The payload; empty unless the record is a write.
    pub fn payload(&self) -> &Buffer {
        &self.payload
    }

    /// CRC32C of payload block `index`.
    ///
    /// # Panics
    /// If the record has no such block.
    pub fn block_crc(&self, index: usize) -> u32 {
        block_crc(self.header_bytes.bytes(), index)
    }
}

/// CRC32C of payload block `index` according to an encoded, checked header.
///
/// # Panics
/// If the header has no such block.
pub fn block_crc(header_bytes: &[u8], index: usize) -> u32 {
    let at = FIXED_BYTES + 4 * index;
    u32::from_le_bytes(header_bytes[at..at + 4].try_into().expect("four bytes are four bytes"))
}

/// Checks every block of `payload` against the CRCs of an encoded, checked header.
pub fn verify_blocks(
    header_bytes: &[u8],
    payload: &[u8],
    block_size: BlockSize,
) -> Result<(), RecordError> {
    for (index, block) in payload.chunks_exact(block_size.bytes() as usize).enumerate() {
        if crc32c(block) != block_crc(header_bytes, index)
            && !crate::planted::is(crate::planted::Bug::RecordUnverified)
        {
            return Err(RecordError::BlockChecksum(u32::try_from(index).unwrap_or(u32::MAX)));
        }
    }
    Ok(())
}

fn zero_to_page(payload: &mut [u8], used: usize) {
    let end = used.next_multiple_of(crate::limits::PAGE_BYTES).min(payload.len());
    payload[used..end].fill(0);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffer::BufferPool;

    fn header(kind: RecordKind, lba: u64, blocks: u32) -> RecordHeader {
        RecordHeader {
            key: ReplicaKey { volume: VolumeId::from_bytes([3; 16]), shard: ShardIndex(0) },
            position: Position::new(Epoch(5), Seq(77)),
            previous_epoch: Epoch(4),
            kind,
            block_size: BlockSize::B512,
            lba: Lba(lba),
            blocks: BlockCount(blocks),
            fua: true,
        }
    }

    fn encoded(pool: &BufferPool) -> Record {
        let mut buffer = pool.take(1024).unwrap();
        buffer.payload_mut().fill(0xee);
        buffer.payload_mut()[..512].fill(1);
        buffer.payload_mut()[512..1024].fill(2);
        Record::encode(header(RecordKind::Write, 10, 2), buffer)
    }

    /// A buffer with the record's bytes as they arrive from the wire.
    fn received(pool: &BufferPool, record: &Record) -> BufferMut {
        let mut buffer = pool.take(1024).unwrap();
        let (head, payload) = buffer.split_mut();
        head[..record.header_bytes().len()].copy_from_slice(record.header_bytes().bytes());
        payload[..record.payload().len()].copy_from_slice(record.payload().bytes());
        buffer
    }

    #[test]
    fn round_trip_and_padding() {
        let pool = BufferPool::heap(2, 0);
        let record = encoded(&pool);
        assert_eq!(record.payload().extended(4096).bytes()[1024..], [0; 3072]);
        let decoded = Record::decode(received(&pool, &record)).unwrap();
        assert_eq!(decoded.header(), record.header());
        assert_eq!(decoded.payload(), record.payload());
        assert_eq!(decoded.block_crc(1), crc32c(&[2; 512]));
    }

    #[test]
    fn golden_bytes() {
        let pool = BufferPool::heap(1, 0);
        let record = encoded(&pool);
        let mut expected = Vec::new();
        expected.extend_from_slice(b"HFR1\x01\x00\x01\x09");
        expected.extend_from_slice(&[3; 16]);
        expected.extend_from_slice(&[0, 0, 0, 0, 88, 0, 0, 0]);
        for value in [5_u64, 77, 4, 10] {
            expected.extend_from_slice(&value.to_le_bytes());
        }
        for value in [2_u32, 1024, 1] {
            expected.extend_from_slice(&value.to_le_bytes());
        }
        expected.extend_from_slice(&[0; 4]);
        expected.extend_from_slice(&crc32c(&[1; 512]).to_le_bytes());
        expected.extend_from_slice(&crc32c(&[2; 512]).to_le_bytes());
        let crc = crc32c(&expected);
        expected[76..80].copy_from_slice(&crc.to_le_bytes());
        assert_eq!(record.header_bytes().bytes(), expected);
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let pool = BufferPool::heap(2, 0);
        let record = encoded(&pool);
        for bit in 0..(88 + 1024) * 8 {
            let mut buffer = received(&pool, &record);
            let (head, payload) = buffer.split_mut();
            let byte = bit / 8;
            if byte < 88 {
                head[byte] ^= 1 << (bit % 8);
            } else {
                payload[byte - 88] ^= 1 << (bit % 8);
            }
            assert!(Record::decode(buffer).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn impossible_fields_are_refused_even_with_a_good_checksum() {
        let cases = [
            (
                RecordHeader { blocks: BlockCount(0), ..header(RecordKind::Write, 0, 1) },
                "blocks of a write",
            ),
            (
                RecordHeader { blocks: BlockCount(257), ..header(RecordKind::Write, 0, 1) },
                "blocks of a write",
            ),
            (
                header(RecordKind::Discard, 0, RANGE_BLOCKS_MAX + 1),
                "blocks of a discard or write-zeroes",
            ),
            (header(RecordKind::EpochStart, 1, 0), "range of an EpochStart"),
            (header(RecordKind::WriteZeroes, u64::MAX, 1), "LBA"),
            (
                RecordHeader {
                    position: Position::new(Epoch(5), Seq(0)),
                    ..header(RecordKind::Write, 0, 1)
                },
                "seq",
            ),
            (RecordHeader { previous_epoch: Epoch(6), ..header(RecordKind::Write, 0, 1) }, "epoch"),
        ];
        for (bad, field) in cases {
            let mut bytes = vec![0; bad.header_bytes().max(FIXED_BYTES)];
            bad.encode_fixed(&mut bytes);
            let crc = crc32c_without(&bytes, CRC_OFFSET);
            bytes[CRC_OFFSET..CRC_OFFSET + 4].copy_from_slice(&crc.to_le_bytes());
            assert_eq!(RecordHeader::decode(&bytes), Err(RecordError::Field(field)));
        }
    }
}
