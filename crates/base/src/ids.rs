//! Identities and the two counters that order everything: epoch and seq.

use core::fmt;
use core::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// A text that is not a UUID where an id was expected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{text}' is not a UUID (expected 32 hexadecimal digits, hyphens allowed)")]
pub struct InvalidId {
    text: String,
}

macro_rules! uuid_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(into = "String", try_from = "String")]
        pub struct $name([u8; 16]);

        impl $name {
            /// The id with these bytes (big-endian UUID order).
            pub const fn from_bytes(bytes: [u8; 16]) -> Self {
                Self(bytes)
            }

            /// The id's bytes (big-endian UUID order), as stored on disk and sent on the wire.
            pub const fn bytes(self) -> [u8; 16] {
                self.0
            }

            /// True for the all-zero id, which names nothing.
            pub fn is_nil(self) -> bool {
                self.0 == [0; 16]
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                Uuid::from_bytes(self.0).hyphenated().fmt(f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({self})", stringify!($name))
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;

            fn from_str(text: &str) -> Result<Self, InvalidId> {
                Uuid::parse_str(text)
                    .map(|uuid| Self(*uuid.as_bytes()))
                    .map_err(|_| InvalidId { text: text.chars().take(64).collect() })
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.to_string()
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidId;

            fn try_from(text: String) -> Result<Self, InvalidId> {
                text.parse()
            }
        }
    };
}

uuid_id! {
    /// A volume: a virtual disk.
    VolumeId
}
uuid_id! {
    /// A server: a machine that runs `holdfastd` and owns a pool.
    ServerId
}
uuid_id! {
    /// A pool: the fast and mass devices of one server. Formatting makes a new id.
    PoolId
}
uuid_id! {
    /// A cluster: everything registered in one cluster store.
    ClusterId
}
uuid_id! {
    /// Whoever may hold a volume's lease: a daemon, or one `holdfast attach`. It outlives a
    /// restart of the process, so that a holder recognises its own lease.
    HolderId
}

/// Which shard of a volume. A volume is one shard (index 0) until volumes are made of more.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct ShardIndex(pub u32);

/// One shard of one volume: what a replica is a copy of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ReplicaKey {
    /// The volume.
    pub volume: VolumeId,
    /// The shard within it.
    pub shard: ShardIndex,
}

impl fmt::Display for ReplicaKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.volume, self.shard.0)
    }
}

/// Grows by one with every change of head and is never reused. 0: never opened.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Epoch(pub u64);

impl Epoch {
    /// The epoch of a volume that no head has opened.
    pub const NONE: Self = Self(0);

    /// The epoch after this one.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.checked_add(1).expect("2^64 changes of head cannot happen"))
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "epoch {}", self.0)
    }
}

/// Position of a record in a shard's log. The first record has seq 1; 0 means an empty log.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Seq(pub u64);

impl Seq {
    /// Before the first record.
    pub const ZERO: Self = Self(0);

    /// The seq after this one.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.checked_add(1).expect("2^64 records cannot be written"))
    }
}

impl fmt::Display for Seq {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "seq {}", self.0)
    }
}

/// (epoch, seq) of a record. Compared epoch before seq, as an opening must.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct Position {
    /// The epoch in which the record was written.
    pub epoch: Epoch,
    /// Its place in the log.
    pub seq: Seq,
}

impl Position {
    /// The position of an empty log.
    pub const ZERO: Self = Self { epoch: Epoch::NONE, seq: Seq::ZERO };

    /// The position of record `seq` of `epoch`.
    pub const fn new(epoch: Epoch, seq: Seq) -> Self {
        Self { epoch, seq }
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.epoch.0, self.seq.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_survive_text_and_refuse_other_text() {
        let id = VolumeId::from_bytes([7; 16]);
        assert_eq!(id.to_string().parse::<VolumeId>().unwrap(), id);
        let error = "disk1".parse::<VolumeId>().unwrap_err();
        assert!(error.to_string().contains("'disk1'"));
    }

    #[test]
    fn positions_compare_epoch_before_seq() {
        let older = Position::new(Epoch(3), Seq(900));
        let newer = Position::new(Epoch(4), Seq(2));
        assert!(newer > older);
    }
}
