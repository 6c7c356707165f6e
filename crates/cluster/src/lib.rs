//! The cluster store: volume records, shard records, servers and placement (L2).
//!
//! [`ClusterStore`] keeps the records and changes them only by compare-and-swap; it is consulted
//! when something *changes*, never per I/O, and may be away for hours without stopping a running
//! volume. [`SqliteStore`] is for one machine, [`EtcdStore`] for several. What the records mean is in
//! the operations on top: [`volumes`] (create, delete, provision), [`lease`] (acquire, release),
//! [`members`] (change), [`servers`] (register, drain). They work on any store. [`heal`] plans what a
//! volume needs.
//!
//! Beside the records, and of no consequence for data: what holders publish of their volumes
//! ([`VolumeStatus`]), and the log of [`Event`]s.
//!
//! Two rules keep data safe from this crate. A replica is deleted only for an explicit tombstone,
//! never because a record is missing. And every change to a volume's record or its shard's is
//! conditional on the versions of both.

mod address;
pub mod drain;
mod error;
mod etcd;
mod events;
pub mod heal;
pub mod lease;
pub mod members;
mod name;
pub mod named_failover;
mod placement;
mod records;
pub mod resize;
pub mod servers;
mod sqlite;
mod status;
mod store;
pub mod volumes;

#[cfg(test)]
mod conformance;

pub use address::{InvalidStoreAddress, StoreAddress, open};
pub use error::{StoreError, StoreErrorKind};
pub use etcd::EtcdStore;
pub use events::{EVENTS_MAX, Event, EventKind};
pub use name::{InvalidName, check_name};
pub use placement::{FAILOVER_MAX, Picture, PlacementError, Usage, failover, place};
pub use records::{
    ALIVE_MS, Draining, Heartbeat, Problem, ServerEntry, ServerRecord, Versions, VolumeEntry,
    unix_ms,
};
pub use sqlite::{SCHEMA_VERSION, SqliteStore};
pub use status::{FillReport, MemberReport, Rates, STATUS_STALE_MS, StallReport, VolumeStatus};
pub use store::{ClusterStore, Create, Swapped};

use uuid::Uuid;

/// The bytes of a new random id (UUID version 4).
pub fn new_id() -> [u8; 16] {
    Uuid::new_v4().into_bytes()
}

/// The bytes of the id that `name` always has (UUID version 5).
pub fn named_id(name: &[u8]) -> [u8; 16] {
    /// What tells our names from other programs' equal ones. Never changes.
    const NAMESPACE: Uuid = Uuid::from_u128(0x6d3c_6f0b_53b0_4c1e_9c39_4d6f_1f0a_7e52);
    Uuid::new_v5(&NAMESPACE, name).into_bytes()
}
