//! Log, metadata and home images at recovery: a pool that was written to, then changed by the
//! input, is opened.

use core::cell::RefCell;
use core::time::Duration;
use std::sync::OnceLock;

use base::{
    BlockCount, BlockSize, BufferPool, Epoch, Lba, Position, Record, RecordHeader, RecordKind,
    ReplicaKey, ReplyBody, Seq, ShardIndex, VolumeId,
};
use store::Command;

use crate::bytes::Bytes;
use crate::sim::{Disk, Random, Shape, World, shape};

const KEY: ReplicaKey = ReplicaKey { volume: VolumeId::from_bytes([9; 16]), shard: ShardIndex(0) };
const BLOCKS: u64 = 64;
const RECORDS: u64 = 40;

thread_local! {
    /// The devices of the last run: memory that is mapped already is most of a run's time.
    static MEDIA: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
}

/// No panic; the pool opens or says why not; a block that is read is one that was written there, or
/// absent, or an error: never something else (I4).
pub fn recovery(data: &[u8]) {
    let mut bytes = Bytes(data);
    let (images, used) = images();
    let random = Random::new(u64::from(bytes.u8()));
    let mut media = MEDIA.take();
    media.clone_from(images);
    for _ in 0..64 {
        if bytes.is_empty() {
            break;
        }
        change(&mut bytes, &mut media, used);
    }
    let mut world = World::on(media.into_iter().map(Disk::holding).collect(), small(), random);
    if world.reopen(false).is_ok() && world.store.replica(KEY).is_some() {
        read_everything(&mut world);
    }
    MEDIA.set(world.disks.into_iter().map(|disk| disk.media).collect());
}

fn read_everything(world: &mut World) {
    let pool = BufferPool::heap(2, 2);
    for block in 0..BLOCKS {
        let Some(buffer) = pool.take(4096) else { break };
        let covers = Seq::ZERO;
        let (lba, blocks) = (Lba(block), BlockCount(1));
        world.command(block, Command::Read { key: KEY, lba, blocks, covers, buffer });
        world.run(Duration::from_millis(1));
        for (_, result) in world.answers.drain(..) {
            if let Ok(ReplyBody::Data(data)) = result {
                check(block, data.bytes());
            }
        }
    }
    world.store.check_invariants();
}

fn small() -> Shape {
    let mut shape = shape();
    for device in &mut shape.devices {
        device.bytes = 6 << 20;
    }
    shape
}

/// What record `seq` writes into block `block`.
fn fill(block: u64, seq: u64, out: &mut [u8]) {
    for (index, word) in out.chunks_exact_mut(8).enumerate() {
        let value = (block << 32 | seq) ^ (index as u64) << 48;
        word.copy_from_slice(&value.to_le_bytes());
    }
}

fn check(block: u64, data: &[u8]) {
    if data.iter().all(|byte| *byte == 0) {
        return;
    }
    let first = u64::from_le_bytes(data[..8].try_into().expect("eight bytes"));
    let seq = first & 0xffff_ffff;
    let mut expected = vec![0; data.len()];
    fill(block, seq, &mut expected);
    assert!(
        first >> 32 == block && (1..=RECORDS).contains(&seq) && data == expected,
        "block {block} has data that was never written there"
    );
}

/// The pool's devices, and the sectors that are not zero.
fn images() -> &'static (Vec<Vec<u8>>, Vec<Vec<usize>>) {
    static IMAGES: OnceLock<(Vec<Vec<u8>>, Vec<Vec<usize>>)> = OnceLock::new();
    IMAGES.get_or_init(|| {
        let mut world = World::new(small(), Random::new(1));
        let command = Command::Create { key: KEY, block_size: BlockSize::B4096, blocks: BLOCKS };
        world.command(1, command);
        world.run(Duration::from_millis(1));
        world.command(2, Command::Seal { key: KEY, epoch: Epoch(1) });
        world.run(Duration::from_millis(1));
        let pool = BufferPool::heap(4, 2);
        for seq in 1..=RECORDS {
            let lba = (seq * 7) % (BLOCKS - 2);
            let header = RecordHeader {
                key: KEY,
                position: Position::new(Epoch(1), Seq(seq)),
                previous_epoch: if seq == 1 { Epoch::NONE } else { Epoch(1) },
                kind: RecordKind::Write,
                block_size: BlockSize::B4096,
                lba: Lba(lba),
                blocks: BlockCount(2),
                fua: false,
            };
            let mut buffer = pool.take(8192).expect("the last one came back");
            for (index, page) in buffer.payload_mut()[..8192].chunks_exact_mut(4096).enumerate() {
                fill(lba + index as u64, seq, page);
            }
            let record = Record::encode(header, buffer);
            let commit = Seq(seq.saturating_sub(5));
            world.command(
                10 + seq,
                Command::Append { key: KEY, record, commit, media: seq % 9 == 0 },
            );
            // Idle for a while in the middle, so that some of it goes home.
            world.run(Duration::from_millis(if seq == RECORDS / 2 { 2000 } else { 1 }));
        }
        let appended = |answer: &&(u64, Result<ReplyBody, _>)| {
            matches!(answer.1, Ok(ReplyBody::Appended { .. }))
        };
        let count = world.answers.iter().filter(appended).count() as u64;
        assert_eq!(count, RECORDS, "the image holds what was to be written");
        for disk in &mut world.disks {
            disk.sync(u64::MAX);
        }
        let images: Vec<Vec<u8>> = world.disks.iter().map(|disk| disk.media.clone()).collect();
        let used = images
            .iter()
            .map(|image| {
                let sectors = image.chunks_exact(512).enumerate();
                sectors.filter(|(_, s)| s.iter().any(|b| *b != 0)).map(|(at, _)| at).collect()
            })
            .collect();
        (images, used)
    })
}

/// Changes the media somewhere that was in use.
fn change(bytes: &mut Bytes<'_>, media: &mut [Vec<u8>], used: &[Vec<usize>]) {
    let device = usize::from(bytes.u8()) % used.len();
    let sectors = &used[device];
    let at = sectors[usize::from(bytes.u16()) % sectors.len()] * 512;
    let media = &mut media[device];
    match bytes.below(6) {
        0 | 1 => media[at + usize::from(bytes.u16()) % 512] ^= 1 << bytes.below(8),
        2 => media[at..at + 512].fill(0),
        3 => {
            let other = sectors[usize::from(bytes.u16()) % sectors.len()] * 512;
            media.copy_within(other..other + 512, at);
        }
        4 => {
            let page = at / 4096 * 4096;
            let other = sectors[usize::from(bytes.u16()) % sectors.len()] * 512 / 4096 * 4096;
            media.copy_within(other..other + 4096, page);
        }
        _ => {
            let word = at + usize::from(bytes.u8() % 63) * 8;
            let value = if bytes.one_in(2) { bytes.u64() } else { u64::from(bytes.u8()) };
            media[word..word + 8].copy_from_slice(&value.to_le_bytes());
        }
    }
}
