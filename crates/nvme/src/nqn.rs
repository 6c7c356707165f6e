//! NVMe Qualified Names of our subsystems and hosts (NVMe base 2.0, 4.7).

use core::fmt;

use base::{HolderId, ServerId, VolumeId};

/// The well-known discovery subsystem.
pub const DISCOVERY: &str = "nqn.2014-08.org.nvmexpress.discovery";
/// Longest NQN in bytes, without the terminating zero (NVMe base 2.0, 4.7).
pub const NQN_BYTES_MAX: usize = 223;

const VOLUME_PREFIX: &str = "nqn.2026-11.io.holdfast:volume:";
const REPLICA_PREFIX: &str = "nqn.2026-11.io.holdfast:replica:";
const HOST_PREFIX: &str = "nqn.2026-11.io.holdfast:host:";

/// A subsystem that a target may offer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Subsystem {
    /// Tells which volume subsystems there are.
    Discovery,
    /// One volume as namespace 1; standard commands only.
    Volume(VolumeId),
    /// All replicas of one server; vendor-specific commands, for heads.
    Replica(ServerId),
}

impl Subsystem {
    /// The subsystem with this NQN, if it is one of ours.
    pub fn from_nqn(nqn: &str) -> Option<Self> {
        if nqn == DISCOVERY {
            Some(Self::Discovery)
        } else if let Some(id) = nqn.strip_prefix(VOLUME_PREFIX) {
            id.parse().ok().map(Self::Volume)
        } else if let Some(id) = nqn.strip_prefix(REPLICA_PREFIX) {
            id.parse().ok().map(Self::Replica)
        } else {
            None
        }
    }
}

impl fmt::Display for Subsystem {
    /// The NQN.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Discovery => f.write_str(DISCOVERY),
            Self::Volume(id) => write!(f, "{VOLUME_PREFIX}{id}"),
            Self::Replica(id) => write!(f, "{REPLICA_PREFIX}{id}"),
        }
    }
}

/// The NQN of one of our own hosts: a daemon, or one `holdfast attach`.
pub fn host(id: HolderId) -> String {
    format!("{HOST_PREFIX}{id}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_survive_text() {
        let all = [
            Subsystem::Discovery,
            Subsystem::Volume(VolumeId::from_bytes([1; 16])),
            Subsystem::Replica(ServerId::from_bytes([2; 16])),
        ];
        for subsystem in all {
            let nqn = subsystem.to_string();
            assert!(nqn.len() <= NQN_BYTES_MAX);
            assert_eq!(Subsystem::from_nqn(&nqn), Some(subsystem));
        }
        assert_eq!(Subsystem::from_nqn("nqn.2026-11.io.holdfast:volume:x"), None);
        assert_eq!(Subsystem::from_nqn(""), None);
    }
}
