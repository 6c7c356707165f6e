//! In-band state messages: what a server tells a head on the connection that carries the data.
//!
//! They are read from log page C0h: a header of [`ENTRY_BYTES`] and up to [`STATE_ENTRIES_MAX`]
//! entries, oldest first, always [`LOG_BYTES`] in all. Little-endian; `docs/protocol.md` has the
//! tables. A reader skips entries whose kind or values it does not know, so that a newer server
//! may say more; a layout that an older reader would misread gets another version.

use base::{Epoch, ReplicaKey, ServerId, ShardIndex, VolumeId};

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

/// Health of a server as another server sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// It answers.
    Healthy,
    /// It answers late, or refuses some work.
    Degraded,
    /// It is silent.
    Silent,
}

/// Why a replica is degraded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DegradedReason {
    /// A device answers far too slowly.
    SlowDevice,
    /// A device failed; acknowledgements have stopped.
    FailedDevice,
    /// The log is nearly full.
    LogFull,
    /// Damaged data was found.
    Damage,
}

/// A state message of a server to a head or initiator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateMessage {
    /// This server goes away in good order.
    Draining {
        /// Milliseconds left.
        deadline_ms: u64,
        /// The server that takes over; nil if there is none yet.
        successor: ServerId,
    },
    /// This replica works, but not as it should.
    Degraded {
        /// Why.
        reason: DegradedReason,
    },
    /// A higher epoch was sealed.
    Superseded {
        /// The sealed epoch.
        epoch: Epoch,
    },
    /// This replica is being filled.
    CatchingUp {
        /// 0 to 100.
        percent: u8,
    },
    /// This replica has caught up.
    InSync,
    /// One server of the volume's failover set. A new set is told as one message for each
    /// server, `index` counting from 0 up to `count - 1`.
    FailoverServer {
        /// The server.
        server: ServerId,
        /// As this server sees it.
        health: Health,
        /// Which of the set.
        index: u8,
        /// How many there are.
        count: u8,
    },
    /// A failover server can no longer be used.
    FailoverUnavailable {
        /// Which.
        server: ServerId,
    },
    /// This server limits the volume.
    Throttled {
        /// Bytes per second; 0: no longer limited.
        bytes_per_second: u64,
    },
    /// The volume has a new size.
    Resized {
        /// In bytes.
        size_bytes: u64,
    },
    /// What an earlier message announced is over.
    Back,
}

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

impl Health {
    const fn code(self) -> u8 {
        match self {
            Self::Healthy => 1,
            Self::Degraded => 2,
            Self::Silent => 3,
        }
    }

    const fn from_code(code: u8) -> Option<Self> {
        match code {
            1 => Some(Self::Healthy),
            2 => Some(Self::Degraded),
            3 => Some(Self::Silent),
            _ => None,
        }
    }
}

impl DegradedReason {
    const fn code(self) -> u64 {
        match self {
            Self::SlowDevice => 1,
            Self::FailedDevice => 2,
            Self::LogFull => 3,
            Self::Damage => 4,
        }
    }

    const fn from_code(code: u64) -> Option<Self> {
        match code {
            1 => Some(Self::SlowDevice),
            2 => Some(Self::FailedDevice),
            3 => Some(Self::LogFull),
            4 => Some(Self::Damage),
            _ => None,
        }
    }
}

impl StateMessage {
    /// Kind, value and server as they are sent.
    fn parts(self) -> (u16, u64, ServerId) {
        let nil = ServerId::from_bytes([0; 16]);
        match self {
            Self::Draining { deadline_ms, successor } => (1, deadline_ms, successor),
            Self::Degraded { reason } => (2, reason.code(), nil),
            Self::Superseded { epoch } => (3, epoch.0, nil),
            Self::CatchingUp { percent } => (4, u64::from(percent), nil),
            Self::InSync => (5, 0, nil),
            Self::FailoverServer { server, health, index, count } => {
                (6, u64::from_le_bytes([health.code(), index, count, 0, 0, 0, 0, 0]), server)
            }
            Self::FailoverUnavailable { server } => (7, 0, server),
            Self::Throttled { bytes_per_second } => (8, bytes_per_second, nil),
            Self::Resized { size_bytes } => (9, size_bytes, nil),
            Self::Back => (10, 0, nil),
        }
    }

    fn from_parts(kind: u16, value: u64, server: ServerId) -> Option<Self> {
        match kind {
            1 => Some(Self::Draining { deadline_ms: value, successor: server }),
            2 => DegradedReason::from_code(value).map(|reason| Self::Degraded { reason }),
            3 => Some(Self::Superseded { epoch: Epoch(value) }),
            4 => u8::try_from(value)
                .ok()
                .filter(|&percent| percent <= 100)
                .map(|percent| Self::CatchingUp { percent }),
            5 => Some(Self::InSync),
            6 => {
                let [health, index, count, ..] = value.to_le_bytes();
                let health = Health::from_code(health)?;
                Some(Self::FailoverServer { server, health, index, count })
            }
            7 => Some(Self::FailoverUnavailable { server }),
            8 => Some(Self::Throttled { bytes_per_second: value }),
            9 => Some(Self::Resized { size_bytes: value }),
            10 => Some(Self::Back),
            _ => None,
        }
    }
}

/// The log page with `entries`, of which there are at most [`STATE_ENTRIES_MAX`].
pub fn encode_log<'a>(entries: impl Iterator<Item = &'a StateEntry>) -> [u8; LOG_BYTES] {
    let mut out = [0; LOG_BYTES];
    let mut count = 0_u16;
    for entry in entries.take(STATE_ENTRIES_MAX) {
        count += 1;
        let at = &mut out[usize::from(count) * ENTRY_BYTES..][..ENTRY_BYTES];
        let (kind, value, server) = entry.message.parts();
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
        let Some(message) = StateMessage::from_parts(u16_at(at, 28), u64_at(at, 32), server) else {
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
