//! Random replica commands and answers to them.

use base::{
    BlockCount, BlockSize, BufferPool, CommandBody, Epoch, FillPhase, FillProgress, Health,
    HelloReason, Lba, Position, Record, RecordHeader, RecordKind, ReplicaCommand, ReplicaError,
    ReplicaKey, ReplicaState, ReplyBody, Seq, ServerId, ShardIndex, VolumeId,
};

use crate::net::Random;

pub(crate) fn key(number: u64) -> ReplicaKey {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&number.to_le_bytes());
    ReplicaKey { volume: VolumeId::from_bytes(bytes), shard: ShardIndex(0) }
}

pub(crate) fn record(
    random: &mut Random,
    pool: &BufferPool,
    key: ReplicaKey,
    epoch: Epoch,
) -> Record {
    let block_size = if random.chance(2) { BlockSize::B512 } else { BlockSize::B4096 };
    let kind = match random.below(6) {
        0 => RecordKind::Discard,
        1 => RecordKind::WriteZeroes,
        2 => RecordKind::EpochStart,
        _ => RecordKind::Write,
    };
    let blocks = match kind {
        RecordKind::Write => match random.below(3) {
            0 => 1,
            1 => 128 * 1024 / block_size.bytes(),
            _ => 1 + u32::try_from(random.below(u64::from(131_072 / block_size.bytes()))).unwrap(),
        },
        RecordKind::Discard | RecordKind::WriteZeroes => 7,
        RecordKind::EpochStart => 0,
    };
    let header = RecordHeader {
        key,
        position: Position::new(epoch, Seq(1 + random.below(1 << 40))),
        previous_epoch: Epoch(1),
        kind,
        block_size,
        lba: Lba(if kind == RecordKind::EpochStart { 0 } else { random.below(1 << 30) }),
        blocks: BlockCount(blocks),
        fua: random.chance(2),
    };
    let mut buffer = pool.take(header.payload_bytes()).unwrap();
    let fill = u8::try_from(random.below(256)).unwrap();
    buffer.payload_mut().fill(fill);
    Record::encode(header, buffer)
}

/// A command without its buffers, to compare.
pub(crate) fn summary(command: &ReplicaCommand) -> String {
    let ReplicaCommand { key, epoch, commit, body } = command;
    let body = match body {
        CommandBody::Append { record, media } => format!(
            "Append {:?} {:08x} {media}",
            record.header(),
            base::checksum::crc32c(record.payload().bytes())
        ),
        CommandBody::Read { lba, blocks, covers, .. } => {
            format!("Read {lba} {blocks:?} {covers}")
        }
        CommandBody::Scan { seq, .. } => format!("Scan {seq}"),
        CommandBody::ScanRun { seq, records, .. } => format!("ScanRun {records} from {seq}"),
        CommandBody::Truncate { keep } => format!("Truncate {keep}"),
        CommandBody::Grow { blocks } => format!("Grow {blocks}"),
        CommandBody::Hello { reason, acknowledged } => format!("Hello {reason:?} {acknowledged}"),
        CommandBody::HealthOf { server } => format!("HealthOf {server}"),
        CommandBody::Install { source, chunks, bytes_per_second } => {
            format!("Install {source} {chunks} {bytes_per_second}")
        }
        CommandBody::List { unit, first, .. } => format!("List {unit:?} {first}"),
        CommandBody::Fetch { lba, end, .. } => format!("Fetch {lba} {end}"),
        other => other.name().to_owned(),
    };
    format!("{key} {epoch} {commit} {body}")
}

pub(crate) fn result_summary(result: &Result<ReplyBody, ReplicaError>) -> String {
    match result {
        Ok(ReplyBody::Data(data)) => {
            format!("Data {} {:08x}", data.len(), base::checksum::crc32c(data.bytes()))
        }
        Ok(ReplyBody::Chunks(list)) => {
            format!("Chunks {} {:08x}", list.len(), base::checksum::crc32c(list.bytes()))
        }
        Ok(ReplyBody::Records(records)) => {
            format!("Records {} {:08x}", records.len(), base::checksum::crc32c(records.bytes()))
        }
        Ok(ReplyBody::Record(record)) => format!(
            "Record {:?} {:08x}",
            record.header(),
            base::checksum::crc32c(record.payload().bytes())
        ),
        other => format!("{other:?}"),
    }
}

pub(crate) fn server(random: &mut Random) -> ServerId {
    ServerId::from_bytes([u8::try_from(random.below(256)).unwrap(); 16])
}

pub(crate) fn random_command(random: &mut Random, pool: &BufferPool) -> Option<ReplicaCommand> {
    let key = key(random.below(5));
    let epoch = Epoch(3 + random.below(4));
    let commit = Seq(random.next() >> 20);
    let body = match random.below(24) {
        0..6 => CommandBody::Append {
            record: record(random, pool, key, epoch),
            media: random.chance(2),
        },
        6..10 => {
            let blocks = 1 + u32::try_from(random.below(32)).unwrap();
            let buffer = pool.take(usize::try_from(blocks).unwrap() * 4096)?;
            let lba = Lba(random.next() >> 8);
            CommandBody::Read {
                lba,
                blocks: BlockCount(blocks),
                covers: Seq(random.next()),
                buffer,
            }
        }
        10 => CommandBody::Flush,
        11 => CommandBody::Scan { seq: Seq(random.next()), buffer: pool.take(128 * 1024)? },
        12 => CommandBody::Truncate { keep: Seq(random.next()) },
        13 => CommandBody::Trim,
        14 => CommandBody::Renew,
        15 => {
            let reasons =
                [HelloReason::Fresh, HelloReason::Told, HelloReason::IoError, HelloReason::Timeout];
            let reason = reasons[usize::try_from(random.below(4)).unwrap()];
            CommandBody::Hello { reason, acknowledged: Seq(random.next()) }
        }
        16 => CommandBody::Hello { reason: HelloReason::Fill, acknowledged: Seq::ZERO },
        17 => CommandBody::HealthOf { server: server(random) },
        18 => CommandBody::Install {
            source: server(random),
            chunks: random.chance(2),
            bytes_per_second: random.below(1 << 32) * 1024,
        },
        19 => {
            let unit = BlockCount(1 + u32::try_from(random.below(1 << 20)).unwrap());
            let first = u32::try_from(random.below(1 << 32)).unwrap();
            CommandBody::List { unit, first, buffer: pool.take(4096)? }
        }
        20 => CommandBody::Fetch {
            lba: Lba(random.next()),
            end: Lba(random.next()),
            buffer: pool.take(128 * 1024)?,
        },
        21 => CommandBody::ScanRun {
            seq: Seq(random.next()),
            records: 1 + u32::try_from(random.below(100)).unwrap(),
            buffer: pool.take(128 * 1024)?,
        },
        22 => CommandBody::Grow { blocks: random.next() },
        _ => CommandBody::Seal,
    };
    Some(ReplicaCommand { key, epoch, commit, body })
}

pub(crate) fn random_error(random: &mut Random) -> ReplicaError {
    let position = Position::new(Epoch(random.next()), Seq(random.next()));
    match random.below(10) {
        0 => ReplicaError::Superseded { sealed: Epoch(random.next()) },
        1 => ReplicaError::NotSealed,
        2 => ReplicaError::NoReplica,
        3 => ReplicaError::OutOfOrder { last: position },
        4 => ReplicaError::Behind { last: position },
        5 => ReplicaError::Trimmed { trimmed: Seq(random.next()) },
        6 => ReplicaError::Damaged,
        7 => ReplicaError::DeviceFailed,
        8 => ReplicaError::Filling,
        _ => ReplicaError::Invalid,
    }
}

/// Any answer that belongs to the command.
pub(crate) fn random_result(
    random: &mut Random,
    pool: &BufferPool,
    command: ReplicaCommand,
) -> Result<ReplyBody, ReplicaError> {
    if random.chance(5) {
        return Err(random_error(random));
    }
    let durable = Seq(random.next());
    Ok(match command.body {
        CommandBody::Seal => ReplyBody::Sealed(ReplicaState {
            sealed: Epoch(random.next()),
            last: Position::new(Epoch(random.next()), Seq(random.next())),
            durable,
            commit: Seq(random.next()),
            trimmed: Seq(random.next()),
            filling: random.chance(2),
            damaged: random.chance(2),
            blocks: random.next(),
        }),
        CommandBody::Append { .. } => ReplyBody::Appended { durable },
        CommandBody::Read { blocks, mut buffer, .. } => {
            let block_bytes = if random.chance(2) { 512 } else { 4096 };
            let bytes = usize::try_from(blocks.0).unwrap() * block_bytes;
            if bytes > buffer.capacity() {
                return Err(ReplicaError::Invalid);
            }
            buffer.payload_mut()[..bytes].fill(u8::try_from(random.below(256)).unwrap());
            ReplyBody::Data(buffer.freeze().payload(bytes))
        }
        CommandBody::Flush => ReplyBody::Flushed { durable },
        CommandBody::Truncate { .. } => {
            ReplyBody::Truncated { last: Position::new(Epoch(random.next()), durable) }
        }
        CommandBody::Grow { .. }
        | CommandBody::Trim
        | CommandBody::Release
        | CommandBody::Renew
        | CommandBody::Hello { .. } => ReplyBody::Done,
        CommandBody::HealthOf { .. } => {
            let all = [Health::Healthy, Health::Degraded, Health::Silent, Health::Unknown];
            ReplyBody::Health(all[usize::try_from(random.below(4)).unwrap()])
        }
        CommandBody::Install { .. } => {
            let all = [FillPhase::Connecting, FillPhase::Chunks, FillPhase::Log, FillPhase::Done];
            ReplyBody::Filling(FillProgress {
                phase: all[usize::try_from(random.below(4)).unwrap()],
                copied_bytes: random.next(),
                total_bytes: random.next(),
                log_end: Seq(random.next()),
            })
        }
        CommandBody::List { mut buffer, .. } => {
            let bytes = 40 + usize::try_from(random.below(300)).unwrap() * 12;
            buffer.payload_mut()[..bytes].fill(u8::try_from(random.below(256)).unwrap());
            ReplyBody::Chunks(buffer.freeze().payload(bytes))
        }
        CommandBody::ScanRun { mut buffer, .. } => {
            let bytes = usize::try_from(random.below(2) * (17 + random.below(100_000))).unwrap();
            buffer.payload_mut()[..bytes].fill(u8::try_from(random.below(256)).unwrap());
            ReplyBody::Records(buffer.freeze().payload(bytes))
        }
        CommandBody::Fetch { .. } if random.chance(3) => ReplyBody::Done,
        CommandBody::Scan { .. } | CommandBody::Fetch { .. } => {
            ReplyBody::Record(record(random, pool, command.key, command.epoch))
        }
    })
}
