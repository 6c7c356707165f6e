//! In-band state messages: what a server tells a head on the connection that carries the data.
//!
//! They are read from log page C0h: a header of [`ENTRY_BYTES`] and up to [`STATE_ENTRIES_MAX`]
//! entries, oldest first, always [`LOG_BYTES`] in all. Little-endian; `docs/protocol.md` has the
//! tables. A reader skips entries whose kind or values it does not know, so that a newer server
//! may say more; a layout that an older reader would misread gets another version.

pub use base::{DegradedReason, Health, StateMessage};

use base::{BlockCount, Epoch, Lba, ReplicaKey, ServerId, ShardIndex, VolumeId};

use crate::codec::{put, take, u16_at, u32_at, u64_at};

/// Log page identifier.
pub const LOG_PAGE: u8 = 0xc0;
/// First bytes of the log page.
pub const MAGIC: [u8; 4] = *b"HFS1";
/// The version of the layout that this code writes and reads.
pub const VERSION: u16 = 1;
/// Bytes of an entry, and of the header.
pub const ENTRY_BYTES: usize = 64;
/// Entries that the log page holds; older ones are dropped.
pub const STATE_ENTRIES_MAX: usize = 63;
/// Bytes of the log page.
pub const LOG_BYTES: usize = ENTRY_BYTES * (STATE_ENTRIES_MAX + 1);

/// A message and the replica it is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StateEntry {
    /// Counts the messages of a session from 1; a gap means that messages were lost.
    pub number: u64,
    /// `None`: about the whole server.
    pub key: Option<ReplicaKey>,
    /// What happened.
    pub message: StateMessage,
}

/// A log page that cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StateLogError {
    /// It does not begin with [`MAGIC`], or is cut short.
    #[error("not a volume-state log page")]
    NotALog,
    /// A version this code does not know.
    #[error("volume-state log version {0} is not supported (this build knows version {VERSION})")]
    Version(u16),
}

const fn health_code(health: Health) -> u8 {
    match health {
        Health::Healthy => 1,
        Health::Degraded => 2,
        Health::Silent => 3,
        Health::Unknown => 4,
    }
}

const fn health_from_code(code: u8) -> Option<Health> {
    match code {
        1 => Some(Health::Healthy),
        2 => Some(Health::Degraded),
        3 => Some(Health::Silent),
        4 => Some(Health::Unknown),
        _ => None,
    }
}

const fn reason_code(reason: DegradedReason) -> u64 {
    match reason {
        DegradedReason::SlowDevice => 1,
        DegradedReason::FailedDevice => 2,
        DegradedReason::LogFull => 3,
        DegradedReason::Damage => 4,
    }
}

const fn reason_from_code(code: u64) -> Option<DegradedReason> {
    match code {
        1 => Some(DegradedReason::SlowDevice),
        2 => Some(DegradedReason::FailedDevice),
        3 => Some(DegradedReason::LogFull),
        4 => Some(DegradedReason::Damage),
        _ => None,
    }
}

/// Kind, value and server as they are sent.
fn parts(message: StateMessage) -> (u16, u64, ServerId) {
    let nil = ServerId::from_bytes([0; 16]);
    match message {
        StateMessage::Draining { deadline_ms, successor } => (1, deadline_ms, successor),
        StateMessage::Degraded { reason } => (2, reason_code(reason), nil),
        StateMessage::Superseded { epoch } => (3, epoch.0, nil),
        StateMessage::CatchingUp { percent } => (4, u64::from(percent), nil),
        StateMessage::InSync => (5, 0, nil),
        StateMessage::FailoverServer { server, health, index, count } => {
            let value = [health_code(health), index, count, 0, 0, 0, 0, 0];
            (6, u64::from_le_bytes(value), server)
        }
        StateMessage::FailoverUnavailable { server } => (7, 0, server),
        StateMessage::Throttled { bytes_per_second } => (8, bytes_per_second, nil),
        StateMessage::Resized { size_bytes } => (9, size_bytes, nil),
        StateMessage::Back => (10, 0, nil),
        StateMessage::DamagedBlocks { lba, blocks } => {
            let mut id = [0; 16];
            put(&mut id, 0, &blocks.0.to_le_bytes());
            (11, lba.0, ServerId::from_bytes(id))
        }
    }
}

fn from_parts(kind: u16, value: u64, server: ServerId) -> Option<StateMessage> {
    match kind {
        1 => Some(StateMessage::Draining { deadline_ms: value, successor: server }),
        2 => reason_from_code(value).map(|reason| StateMessage::Degraded { reason }),
        3 => Some(StateMessage::Superseded { epoch: Epoch(value) }),
        4 => u8::try_from(value)
            .ok()
            .filter(|&percent| percent <= 100)
            .map(|percent| StateMessage::CatchingUp { percent }),
        5 => Some(StateMessage::InSync),
        6 => {
            let [health, index, count, ..] = value.to_le_bytes();
            let health = health_from_code(health)?;
            Some(StateMessage::FailoverServer { server, health, index, count })
        }
        7 => Some(StateMessage::FailoverUnavailable { server }),
        8 => Some(StateMessage::Throttled { bytes_per_second: value }),
        9 => Some(StateMessage::Resized { size_bytes: value }),
        10 => Some(StateMessage::Back),
        11 => {
            let blocks = BlockCount(u32_at(&server.bytes(), 0));
            Some(StateMessage::DamagedBlocks { lba: Lba(value), blocks })
        }
        _ => None,
    }
}

/// The log page with `entries`, of which there are at most [`STATE_ENTRIES_MAX`].
pub fn encode_log<'a>(entries: impl Iterator<Item = &'a StateEntry>) -> [u8; LOG_BYTES] {
    let mut out = [0; LOG_BYTES];
    let mut count = 0_u16;
    for entry in entries.take(STATE_ENTRIES_MAX) {
        count += 1;
        let at = &mut out[usize::from(count) * ENTRY_BYTES..][..ENTRY_BYTES];
        let (kind, value, server) = parts(entry.message);
        put(at, 0, &entry.number.to_le_bytes());
        if let Some(key) = entry.key {
            put(at, 8, &key.volume.bytes());
            put(at, 24, &key.shard.0.to_le_bytes());
        }
        put(at, 28, &kind.to_le_bytes());
        put(at, 30, &u16::from(entry.key.is_some()).to_le_bytes());
        put(at, 32, &value.to_le_bytes());
        put(at, 40, &server.bytes());
    }
    put(&mut out, 0, &MAGIC);
    put(&mut out, 4, &VERSION.to_le_bytes());
    put(&mut out, 6, &count.to_le_bytes());
    out
}

/// Calls `each` with every entry that this code understands, oldest first.
pub fn decode_log(bytes: &[u8], mut each: impl FnMut(StateEntry)) -> Result<(), StateLogError> {
    if bytes.len() < ENTRY_BYTES || take(bytes, 0) != MAGIC {
        return Err(StateLogError::NotALog);
    }
    let version = u16_at(bytes, 4);
    if version != VERSION {
        return Err(StateLogError::Version(version));
    }
    let count = usize::from(u16_at(bytes, 6));
    for at in bytes.chunks_exact(ENTRY_BYTES).skip(1).take(count) {
        let server = ServerId::from_bytes(take(at, 40));
        let Some(message) = from_parts(u16_at(at, 28), u64_at(at, 32), server) else {
            continue;
        };
        let key = ReplicaKey {
            volume: VolumeId::from_bytes(take(at, 8)),
            shard: ShardIndex(u32_at(at, 24)),
        };
        let key = (u16_at(at, 30) & 1 != 0).then_some(key);
        each(StateEntry { number: u64_at(at, 0), key, message });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn messages() -> Vec<StateMessage> {
        let server = ServerId::from_bytes([9; 16]);
        vec![
            StateMessage::Draining { deadline_ms: 1500, successor: server },
            StateMessage::Degraded { reason: DegradedReason::LogFull },
            StateMessage::Superseded { epoch: Epoch(7) },
            StateMessage::CatchingUp { percent: 42 },
            StateMessage::InSync,
            StateMessage::FailoverServer { server, health: Health::Silent, index: 1, count: 3 },
            StateMessage::FailoverUnavailable { server },
            StateMessage::Throttled { bytes_per_second: 1 << 30 },
            StateMessage::Resized { size_bytes: 1 << 40 },
            StateMessage::Back,
            StateMessage::DamagedBlocks { lba: Lba(1 << 30), blocks: BlockCount(77) },
        ]
    }

    #[test]
    fn log_round_trip_and_unknown_kinds_are_skipped() {
        let key = ReplicaKey { volume: VolumeId::from_bytes([1; 16]), shard: ShardIndex(2) };
        let entries: Vec<_> = (1..)
            .zip(messages())
            .map(|(number, message)| StateEntry {
                number,
                key: (number % 2 == 0).then_some(key),
                message,
            })
            .collect();
        let mut log = encode_log(entries.iter());
        let mut read = Vec::new();
        decode_log(&log, |entry| read.push(entry)).unwrap();
        assert_eq!(read, entries);
        log[ENTRY_BYTES + 28] = 200;
        read.clear();
        decode_log(&log, |entry| read.push(entry)).unwrap();
        assert_eq!(read, entries[1..]);
    }

    #[test]
    fn foreign_pages_are_refused() {
        let mut log = encode_log([].iter());
        assert_eq!(decode_log(&log[..10], |_| ()), Err(StateLogError::NotALog));
        log[4] = 2;
        assert_eq!(decode_log(&log, |_| ()), Err(StateLogError::Version(2)));
        log[0] = 0;
        assert_eq!(decode_log(&log, |_| ()), Err(StateLogError::NotALog));
    }

    #[test]
    fn golden_entry() {
        let key = ReplicaKey { volume: VolumeId::from_bytes([1; 16]), shard: ShardIndex(2) };
        let message =
            StateMessage::Draining { deadline_ms: 1500, successor: ServerId::from_bytes([9; 16]) };
        let entry = StateEntry { number: 5, key: Some(key), message };
        let log = encode_log([entry].iter());
        let mut expected = vec![b'H', b'F', b'S', b'1', 1, 0, 1, 0];
        expected.resize(64, 0);
        expected.extend_from_slice(&[5, 0, 0, 0, 0, 0, 0, 0]);
        expected.extend_from_slice(&[1; 16]);
        expected.extend_from_slice(&[2, 0, 0, 0, 1, 0, 1, 0]);
        expected.extend_from_slice(&[0xdc, 5, 0, 0, 0, 0, 0, 0]);
        expected.extend_from_slice(&[9; 16]);
        expected.resize(LOG_BYTES, 0);
        assert_eq!(log[..], expected[..]);
    }
}
