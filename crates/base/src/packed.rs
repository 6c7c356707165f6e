//! Several records in one buffer, one after the other: encoded header, payload, and so on without a
//! gap. What a replica's log is copied in, from server to server. Each record carries its own
//! checksums; nothing is believed before they were checked.

use crate::buffer::BufferMut;
use crate::record::{Record, RecordError, RecordHeader, verify_blocks};

/// Room that a record takes.
pub fn packed_bytes(header: &RecordHeader) -> usize {
    header.header_bytes() + header.payload_bytes()
}

/// Writes a record of which `header` are the first bytes of the encoded header and `payload` those of
/// the payload at `at` in `out`; the offset after it. `Ok(None)`: there is no room.
pub fn pack(
    header: &[u8],
    payload: &[u8],
    out: &mut [u8],
    at: usize,
) -> Result<Option<usize>, RecordError> {
    let decoded = RecordHeader::decode(header)?;
    let (header_bytes, payload_bytes) = (decoded.header_bytes(), decoded.payload_bytes());
    let payload = payload.get(..payload_bytes).ok_or(RecordError::Truncated)?;
    verify_blocks(&header[..header_bytes], payload, decoded.block_size)?;
    let end = at + header_bytes + payload_bytes;
    let Some(room) = out.get_mut(at..end) else { return Ok(None) };
    let (head, tail) = room.split_at_mut(header_bytes);
    head.copy_from_slice(&header[..header_bytes]);
    tail.copy_from_slice(payload);
    Ok(Some(end))
}

/// The header of the record at `at`.
pub fn header_at(bytes: &[u8], at: usize) -> Result<RecordHeader, RecordError> {
    RecordHeader::decode(bytes.get(at..).ok_or(RecordError::Truncated)?)
}

/// The record at `at`, verified, in a buffer of its own; `buffer` has room for its payload.
pub fn unpack(bytes: &[u8], at: usize, mut buffer: BufferMut) -> Result<Record, RecordError> {
    let header = header_at(bytes, at)?;
    let (header_bytes, payload_bytes) = (header.header_bytes(), header.payload_bytes());
    let rest = &bytes[at..];
    let payload = rest.get(header_bytes..header_bytes + payload_bytes);
    let payload = payload.ok_or(RecordError::Truncated)?;
    let (head, body) = buffer.split_mut();
    head[..header_bytes].copy_from_slice(&rest[..header_bytes]);
    body.get_mut(..payload_bytes).ok_or(RecordError::Truncated)?.copy_from_slice(payload);
    Record::decode(buffer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        BlockCount, BlockSize, BufferPool, Epoch, Lba, Position, RecordKind, ReplicaKey, Seq,
        ShardIndex, VolumeId,
    };

    fn record(pool: &BufferPool, seq: u64, kind: RecordKind, blocks: u32) -> Record {
        let header = RecordHeader {
            key: ReplicaKey { volume: VolumeId::from_bytes([1; 16]), shard: ShardIndex(0) },
            position: Position::new(Epoch(3), Seq(seq)),
            previous_epoch: Epoch(3),
            kind,
            block_size: BlockSize::B512,
            lba: Lba(seq),
            blocks: BlockCount(blocks),
            fua: false,
        };
        let mut buffer = pool.take(header.payload_bytes()).unwrap();
        buffer.payload_mut().fill(u8::try_from(seq).unwrap());
        Record::encode(header, buffer)
    }

    #[test]
    fn what_is_packed_comes_out_again_and_nothing_else() {
        let pool = BufferPool::heap(0, 8);
        let records = [
            record(&pool, 1, RecordKind::Write, 3),
            record(&pool, 2, RecordKind::Discard, 9),
            record(&pool, 3, RecordKind::Write, 1),
        ];
        let mut bytes = vec![0; 4096];
        let mut end = 0;
        for record in &records {
            let (header, payload) = (record.header_bytes().bytes(), record.payload().bytes());
            end = pack(header, payload, &mut bytes, end).unwrap().unwrap();
        }
        let (header, payload) = (records[0].header_bytes().bytes(), records[0].payload().bytes());
        assert_eq!(pack(header, payload, &mut bytes[..end + 100], end), Ok(None), "no room");
        assert!(pack(header, &payload[1..], &mut bytes, end).is_err(), "cut short");
        let mut at = 0;
        for record in &records {
            let out = unpack(&bytes[..end], at, pool.take(4096).unwrap()).unwrap();
            assert_eq!(out.header(), record.header());
            assert_eq!(out.payload(), record.payload());
            at += packed_bytes(out.header());
        }
        assert_eq!(at, end);
        assert!(unpack(&bytes[..end], end, pool.take(0).unwrap()).is_err(), "the end");
        assert!(unpack(&bytes[..end], end + 1, pool.take(0).unwrap()).is_err(), "past it");
        for at in 0..end {
            bytes[at] ^= 0x10;
            let mut from = 0;
            let intact = records.iter().all(|record| {
                let result = unpack(&bytes[..end], from, pool.take(4096).unwrap());
                from += packed_bytes(record.header());
                result.is_ok()
            });
            assert!(!intact, "byte {at}");
            bytes[at] ^= 0x10;
        }
    }
}
