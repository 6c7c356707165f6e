//! What a volume's holder tells about it every second or so, for everybody who asks the store.
//! Plain data for people and planners; nothing that safety depends on.

use base::{Epoch, Role, ServerId, VolumeId};
use serde::{Deserialize, Serialize};

use crate::records::VolumeEntry;

/// A status that is older than this says nothing about now, in milliseconds.
pub const STATUS_STALE_MS: u64 = 5_000;

/// A volume as its head sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeStatus {
    /// The volume.
    pub volume: VolumeId,
    /// The head's epoch.
    pub epoch: Epoch,
    /// The holder's name.
    pub holder: String,
    /// When this was written, in milliseconds since 1970.
    pub written_ms: u64,
    /// Where the head is in its life: `open`, `opening`, ...
    pub phase: String,
    /// Why requests wait, if they do.
    #[serde(default)]
    pub stall: Option<StallReport>,
    /// Bytes that guests may use; 0: not told. Less than the volume record says while members are told of
    /// a new size.
    #[serde(default)]
    pub size_bytes: u64,
    /// The newest record of its log.
    pub last: u64,
    /// Records through this seq are acknowledged.
    pub commit: u64,
    /// Requests begun and not answered.
    pub in_flight: u64,
    /// Requests that wait to be begun.
    #[serde(default)]
    pub queued: u64,
    /// What the guests do and see.
    #[serde(default)]
    pub rates: Rates,
    /// The members that the head serves.
    pub members: Vec<MemberReport>,
}

impl VolumeStatus {
    /// It is recent, and of the epoch that `entry` names and somebody holds. A time from the future
    /// counts: clocks jump.
    pub fn is_current(&self, entry: &VolumeEntry, now_ms: u64) -> bool {
        self.volume == entry.volume.id
            && self.epoch == entry.volume.epoch
            && entry.volume.holder.is_some()
            && now_ms.saturating_sub(self.written_ms) <= STATUS_STALE_MS
    }
}

/// Why and since when requests wait.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StallReport {
    /// The reason, for people.
    pub reason: String,
    /// Since when, in milliseconds since 1970.
    pub since_ms: u64,
}

/// Load and latency over the last second or so.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Rates {
    /// Reads answered per second.
    pub reads_per_second: u64,
    /// Writes answered per second.
    pub writes_per_second: u64,
    /// Bytes read per second.
    pub read_bytes_per_second: u64,
    /// Bytes written per second.
    pub write_bytes_per_second: u64,
    /// Median latency of reads, in microseconds; 0: none.
    pub read_p50_us: u64,
    /// 99th percentile of the latency of reads, in microseconds; 0: none.
    pub read_p99_us: u64,
    /// Median latency of writes, in microseconds; 0: none.
    pub write_p50_us: u64,
    /// 99th percentile of the latency of writes, in microseconds; 0: none.
    pub write_p99_us: u64,
}

/// A member as the head sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberReport {
    /// Its server.
    pub server: ServerId,
    /// Its role in the head's shard record.
    pub role: Role,
    /// What the head does with it, for people: empty for nothing out of the ordinary.
    pub mode: String,
    /// Since when it is in that mode, in milliseconds since 1970.
    #[serde(default)]
    pub since_ms: u64,
    /// There is a session to its server.
    pub connected: bool,
    /// The last record it is known to hold; 0 while unknown.
    pub last: u64,
    /// Records through this seq are on its media; 0 while unknown.
    pub durable: u64,
    /// Records behind the head's newest; `None` while unknown.
    pub lag: Option<u64>,
    /// It is much slower than the others.
    #[serde(default)]
    pub slow: bool,
    /// Its server is being drained.
    #[serde(default)]
    pub draining: bool,
    /// How far its filling is.
    #[serde(default)]
    pub fill: Option<FillReport>,
}

/// How far a filling is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FillReport {
    /// Bytes copied.
    pub copied_bytes: u64,
    /// Bytes to copy in all, as far as is known.
    pub total_bytes: u64,
    /// How fast it goes at present.
    pub bytes_per_second: u64,
}

impl FillReport {
    /// Seconds that are left at the present rate; `None` if it stands still.
    pub fn seconds_left(&self) -> Option<u64> {
        let left = self.total_bytes.saturating_sub(self.copied_bytes);
        if left == 0 {
            return Some(0);
        }
        left.checked_add(self.bytes_per_second.checked_sub(1)?)?.checked_div(self.bytes_per_second)
    }
}
