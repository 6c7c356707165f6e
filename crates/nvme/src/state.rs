//! In-band state messages: what a server tells a head on the connection that carries the data.

use base::{Epoch, ReplicaKey, ServerId};

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
