//! State messages: what a server tells a head or an initiator of itself, on the connection that
//! carries the data. `nvme` encodes them as a log page; who acts on them knows only these words.

use core::fmt;

use crate::ids::{Epoch, ServerId};
use crate::replica::Health;
use crate::units::{BlockCount, Lba};

/// Why a replica is degraded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
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
    /// A scrub has found blocks of this replica that cannot be read here.
    DamagedBlocks {
        /// First block.
        lba: Lba,
        /// Number of blocks.
        blocks: BlockCount,
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

impl fmt::Display for DegradedReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::SlowDevice => "a device answers far too slowly",
            Self::FailedDevice => "a device failed",
            Self::LogFull => "the log is nearly full",
            Self::Damage => "damaged data was found",
        })
    }
}
