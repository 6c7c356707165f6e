//! Decoders of what comes from peers and disks, on changed encodings of something valid.

use base::{
    BlockCount, BlockSize, BufferPool, Epoch, Lba, Position, Record, RecordHeader, RecordKind,
    ReplicaKey, Seq, ShardIndex, VolumeId,
};

use crate::bytes::Bytes;

/// No panic; a record that is accepted encodes to what was decoded; a list that is accepted is in
/// order.
pub fn structures(data: &[u8]) {
    let mut bytes = Bytes(data);
    let pool = BufferPool::heap(2, 2);
    match bytes.below(3) {
        0 => record(&mut bytes, &pool),
        1 => {
            if let Some((header, entries)) = base::chunks::decode(bytes.0) {
                let mut next = 0;
                for entry in entries {
                    assert!(entry.chunk >= next && entry.chunk < header.next, "in order");
                    next = entry.chunk + 1;
                }
            }
        }
        _ => {
            let mut page = vec![0; nvme::state::LOG_BYTES];
            page[..4].copy_from_slice(&nvme::state::MAGIC);
            page[4] = 1;
            page[6] = bytes.u8();
            for slot in page[64..].iter_mut().zip(bytes.0) {
                *slot.0 = *slot.1;
            }
            let mut count = 0;
            if nvme::state::decode_log(&page, |_| count += 1).is_ok() {
                assert!(count <= nvme::state::STATE_ENTRIES_MAX);
            }
        }
    }
}

fn record(bytes: &mut Bytes<'_>, pool: &BufferPool) {
    let kind = [RecordKind::Write, RecordKind::Discard, RecordKind::EpochStart];
    let kind = kind[usize::from(bytes.below(3))];
    let blocks = if kind == RecordKind::EpochStart { 0 } else { u32::from(1 + bytes.below(4)) };
    let volume = VolumeId::from_bytes([7; 16]);
    let header = RecordHeader {
        key: ReplicaKey { volume, shard: ShardIndex(0) },
        position: Position::new(Epoch(1 + u64::from(bytes.u8())), Seq(1 + u64::from(bytes.u16()))),
        previous_epoch: Epoch(1),
        kind,
        block_size: if bytes.one_in(2) { BlockSize::B512 } else { BlockSize::B4096 },
        lba: if kind == RecordKind::EpochStart { Lba(0) } else { Lba(u64::from(bytes.u16())) },
        blocks: BlockCount(blocks),
        fua: bytes.one_in(2),
    };
    let Some(buffer) = pool.take(header.payload_bytes()) else { return };
    let whole = Record::encode(header, buffer);
    let (head, payload) = (whole.header_bytes().bytes().to_vec(), whole.payload().bytes().to_vec());
    drop(whole);
    let Some(mut buffer) = pool.take(payload.len()) else { return };
    buffer.header_mut()[..head.len()].copy_from_slice(&head);
    buffer.payload_mut()[..payload.len()].copy_from_slice(&payload);
    let mut changed = false;
    for _ in 0..bytes.below(4) {
        let at = usize::from(bytes.u16()) % (head.len() + payload.len());
        let bit = 1 << bytes.below(8);
        if at < head.len() {
            buffer.header_mut()[at] ^= bit;
        } else {
            buffer.payload_mut()[at - head.len()] ^= bit;
        }
        changed = true;
    }
    if let Ok(found) = Record::decode(buffer) {
        assert!(!changed || *found.header() == header, "a changed header was not noticed");
        assert_eq!(found.payload().bytes(), payload, "changed data was not noticed");
    } else {
        assert!(changed, "a record that was not changed was refused");
    }
}
