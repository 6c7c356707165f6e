//! What a head is made from.

use core::time::Duration;

use base::limits::{
    GRANT_MS, HEAD_REQUESTS_MAX, MEMBER_COMMANDS_MAX, MEMBERS_MAX, SMALL_PAYLOAD_BYTES,
};
use base::membership::{Role, ShardRecord, VolumeRecord};
use base::{BufferPool, Epoch, ServerId};

/// What a head is made from. The records are as read (or written) by the compare-and-swap that won
/// `epoch`.
#[derive(Clone, Debug)]
pub struct HeadConfig {
    /// The volume.
    pub volume: VolumeRecord,
    /// Its shard and the shard's members.
    pub shard: ShardRecord,
    /// The epoch that the caller has won by compare-and-swap.
    pub epoch: Epoch,
    /// The server in whose process this head runs, if that is a member: reads prefer it.
    pub local: Option<ServerId>,
    /// Where buffers come from: record headers of discards, log copies to members that are behind,
    /// reads that lost theirs. The same pool that front ends use.
    pub buffers: BufferPool,
    /// Limits and times; the defaults are good.
    pub tunables: Tunables,
}

/// Limits and times of a head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tunables {
    /// How long an opening waits, once it has a seal quorum, for the other connected members.
    pub seal_grace: Duration,
    /// Commit news goes out by itself when nothing carried it for so long.
    pub trim_delay: Duration,
    /// Acknowledged records are put on media at a write quorum, even if no guest asks, after so long:
    /// members learn of a record as settled, and may take it home, only then.
    pub settle_delay: Duration,
    /// Or once they pin or pinned so many buffer bytes.
    pub settle_bytes: usize,
    /// First wait before a member that refused or failed is tried again; doubles.
    pub retry_min: Duration,
    /// The longest such wait.
    pub retry_max: Duration,
    /// A missing quorum is announced ([`crate::Output::Stalled`]) once it has lasted so long.
    pub stall_notice: Duration,
    /// With a quorum connected, a write unanswered for so long counts as a stall.
    pub slow_write: Duration,
    /// How long a release waits for the members' answers. After as long as a grant lasts, what they would give
    /// back has run out, and another head brings them what they lack.
    pub release_wait: Duration,
    /// How long it waits, once it has them of a write quorum, for the others: a guest may be waiting elsewhere,
    /// or an upgrade.
    pub release_grace: Duration,
    /// Appends sent to a member and not answered, at most.
    pub member_records_max: usize,
    /// Buffer bytes of appends sent to a member and not answered, at most.
    pub member_bytes_max: usize,
    /// Acknowledged records kept in memory until they are settled and every connected member has been
    /// sent them, at most; a member further behind reads the log of another. Twice as many, for as long as a
    /// member needs them that is about to get there.
    pub backlog_records_max: usize,
    /// Buffer bytes of such records, at most; or twice as many, likewise.
    pub backlog_bytes_max: usize,
    /// A member that lacks more records than this beyond what is in memory gets them from another
    /// member's log, directly.
    pub log_copy_records: u64,
    /// How often the filling of a member is asked about, and its rate changed.
    pub fill_interval: Duration,
    /// What all members that are being filled get, at most, in bytes per second.
    pub fill_bytes_per_second: u64,
    /// Log reads under way for a member that catches up, at most.
    pub catch_up_depth: usize,
}

impl Default for Tunables {
    fn default() -> Self {
        Self {
            seal_grace: Duration::from_millis(20),
            trim_delay: Duration::from_millis(5),
            settle_delay: Duration::from_millis(100),
            settle_bytes: 4 << 20,
            retry_min: Duration::from_millis(10),
            retry_max: Duration::from_secs(1),
            stall_notice: Duration::from_millis(100),
            slow_write: Duration::from_secs(1),
            release_wait: Duration::from_millis(GRANT_MS),
            release_grace: Duration::from_millis(20),
            member_records_max: MEMBER_COMMANDS_MAX - MEMBER_COMMANDS_RESERVED,
            member_bytes_max: 32 << 20,
            backlog_records_max: 2048,
            backlog_bytes_max: 8 << 20,
            log_copy_records: 1024,
            fill_interval: Duration::from_millis(100),
            fill_bytes_per_second: 1 << 30,
            catch_up_depth: 32,
        }
    }
}

/// Of [`MEMBER_COMMANDS_MAX`], what is left for everything that is not an append.
pub(crate) const MEMBER_COMMANDS_RESERVED: usize = 64;
/// Requests in flight that room is made for from the start. More grow the queues once: a head's
/// queues wrap around, so all that is reserved is soon resident, for each of many volumes.
pub(crate) const DEPTH_EXPECTED: usize = 128;
/// The deepest catch-up pipeline that may be configured.
pub(crate) const CATCH_UP_DEPTH_MAX: usize = 256;

const _: () = assert!(MEMBER_COMMANDS_RESERVED < MEMBER_COMMANDS_MAX);
const _: () = assert!(HEAD_REQUESTS_MAX <= 1 << 16);
const _: () = assert!(SMALL_PAYLOAD_BYTES > 0);

/// Why a head cannot be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeadError {
    /// The shard record is another volume's.
    #[error("the shard record does not belong to the volume")]
    WrongShard,
    /// The epoch was not won: it is zero or not the volume record's.
    #[error("{given} is not the epoch in the volume's record ({recorded})")]
    WrongEpoch {
        /// The epoch given.
        given: Epoch,
        /// The epoch in the record.
        recorded: Epoch,
    },
    /// No member is in sync.
    #[error("no replica of the volume is in sync")]
    NoInSyncMember,
    /// More members than [`MEMBERS_MAX`].
    #[error("{0} replicas are more than the {MEMBERS_MAX} that are supported")]
    TooManyMembers(usize),
    /// Two members on one server.
    #[error("server {0} is named twice among the replicas")]
    DuplicateServer(ServerId),
    /// The volume has no blocks, or its size is not a multiple of its block size.
    #[error("a volume of {0} bytes cannot be opened")]
    Size(u64),
    /// A limit is zero or above what is supported.
    #[error("the tunable {0} is out of range")]
    Tunable(&'static str),
}

impl HeadConfig {
    /// Checks what [`crate::Head::new`] refuses.
    pub fn check(&self) -> Result<(), HeadError> {
        if self.shard.volume != self.volume.id {
            return Err(HeadError::WrongShard);
        }
        if self.epoch == Epoch::NONE || self.epoch != self.volume.epoch {
            return Err(HeadError::WrongEpoch { given: self.epoch, recorded: self.volume.epoch });
        }
        let size_bytes = self.volume.size_bytes;
        if size_bytes == 0
            || size_bytes > base::limits::VOLUME_BYTES_MAX
            || self.volume.block_size.blocks(size_bytes).is_none()
        {
            return Err(HeadError::Size(size_bytes));
        }
        self.check_members()?;
        self.tunables.check()
    }

    fn check_members(&self) -> Result<(), HeadError> {
        let mut members = self.shard.members.iter().filter(|member| member.role.is_served());
        let count = members.clone().count();
        if count > MEMBERS_MAX {
            return Err(HeadError::TooManyMembers(count));
        }
        for (index, member) in members.clone().enumerate() {
            if members.clone().take(index).any(|other| other.server == member.server) {
                return Err(HeadError::DuplicateServer(member.server));
            }
        }
        if members.all(|member| member.role != Role::InSync) {
            return Err(HeadError::NoInSyncMember);
        }
        Ok(())
    }
}

impl Tunables {
    fn check(&self) -> Result<(), HeadError> {
        let records_max = MEMBER_COMMANDS_MAX - MEMBER_COMMANDS_RESERVED;
        if self.member_records_max == 0 || self.member_records_max > records_max {
            return Err(HeadError::Tunable("member_records_max"));
        }
        if self.member_bytes_max == 0 {
            return Err(HeadError::Tunable("member_bytes_max"));
        }
        if self.catch_up_depth == 0 || self.catch_up_depth > CATCH_UP_DEPTH_MAX {
            return Err(HeadError::Tunable("catch_up_depth"));
        }
        if self.fill_interval.is_zero() {
            return Err(HeadError::Tunable("fill_interval"));
        }
        if self.fill_bytes_per_second == 0 {
            return Err(HeadError::Tunable("fill_bytes_per_second"));
        }
        if self.retry_min.is_zero() || self.retry_max < self.retry_min {
            return Err(HeadError::Tunable("retry_min"));
        }
        Ok(())
    }
}
