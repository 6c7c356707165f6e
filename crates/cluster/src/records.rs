//! What the store keeps besides `base`'s records: servers, versions, tombstones.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{SystemTime, UNIX_EPOCH};

use base::{PoolId, ServerId, ShardRecord, VolumeId, VolumeRecord};
use serde::{Deserialize, Serialize};

/// A server that was not heard of for this long gets no new replicas, in milliseconds.
pub const ALIVE_MS: u64 = 10_000;

/// Milliseconds since 1970 on the system's clock. Good for telling who is alive, and for
/// nothing else: safety never depends on it.
pub fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// The versions of a volume's two records, as they were when read. Opaque but for equality.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Versions {
    /// Of the volume record (and its tombstone).
    pub volume: u64,
    /// Of the shard record.
    pub shard: u64,
}

/// A volume with its shard, read together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeEntry {
    /// The volume record.
    pub volume: VolumeRecord,
    /// The record of its only shard.
    pub shard: ShardRecord,
    /// The tombstone: the volume is gone for its users, and its members' servers delete their
    /// replicas. A deleted volume never comes back.
    pub deleted: bool,
    /// What a change must be conditional on.
    pub versions: Versions,
}

/// A server as it was registered and as it last said it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerRecord {
    /// Its id; kept when its pool is formatted anew.
    pub id: ServerId,
    /// Its name, unique in the cluster.
    pub name: String,
    /// Its pool.
    pub pool: PoolId,
    /// Where its replica service listens, preferred first; empty before it first ran.
    pub addresses: Vec<SocketAddr>,
    /// Free-form facts, as in `rack = "7"`.
    pub labels: BTreeMap<String, String>,
    /// Home space of the pool, in bytes.
    pub capacity_bytes: u64,
    /// Home space that replicas may still take, in bytes.
    pub free_bytes: u64,
    /// The version of its program; empty before it first ran.
    pub version: String,
    /// It said that it is leaving.
    pub stopped: bool,
    /// What it could not do.
    pub problems: Vec<Problem>,
    /// An operator wants it empty: it gets no new replicas, and those it has go elsewhere.
    /// Heartbeats do not touch it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub draining: Option<Draining>,
}

/// An order to empty a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Draining {
    /// When it was given, in milliseconds since 1970.
    pub since_ms: u64,
}

/// Something that a server was to do for a volume and could not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// The volume.
    pub volume: VolumeId,
    /// What happened, for people.
    pub reason: String,
}

/// A server record as the store keeps it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerEntry {
    /// The record.
    pub server: ServerRecord,
    /// When it was last heard of, in milliseconds since 1970; 0: never.
    pub last_seen_ms: u64,
    /// What a change must be conditional on.
    pub version: u64,
}

impl ServerEntry {
    /// It has said within [`ALIVE_MS`] that it runs. A last word from the future counts: clocks
    /// jump.
    pub fn is_alive(&self, now_ms: u64) -> bool {
        !self.server.stopped
            && self.last_seen_ms != 0
            && now_ms.saturating_sub(self.last_seen_ms) <= ALIVE_MS
    }
}

/// What a running server says of itself every few seconds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Heartbeat {
    /// Which server.
    pub server: ServerId,
    /// Its pool; refused if the server is registered with another one.
    pub pool: PoolId,
    /// Where its replica service listens.
    pub addresses: Vec<SocketAddr>,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Home space of its pool, in bytes.
    pub capacity_bytes: u64,
    /// Home space that replicas may still take, in bytes.
    pub free_bytes: u64,
    /// The version of its program.
    pub version: String,
    /// It is leaving.
    pub stopping: bool,
    /// What it could not do.
    pub problems: Vec<Problem>,
}

impl Heartbeat {
    /// `record` with this news.
    pub(crate) fn applied_to(&self, record: &ServerRecord) -> ServerRecord {
        ServerRecord {
            id: record.id,
            name: record.name.clone(),
            pool: record.pool,
            addresses: self.addresses.clone(),
            labels: self.labels.clone(),
            capacity_bytes: self.capacity_bytes,
            free_bytes: self.free_bytes,
            version: self.version.clone(),
            stopped: self.stopping,
            problems: self.problems.clone(),
            draining: record.draining,
        }
    }
}
