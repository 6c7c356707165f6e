//! Every bound that more than one crate relies on, related by assertions at compile time.

/// Alignment of disk I/O and of payload memory, in bytes.
pub const PAGE_BYTES: usize = 4096;

/// The largest payload of one record, one member command and one block request, in bytes.
/// Front ends split larger guest requests.
pub const PAYLOAD_BYTES_MAX: usize = 128 * 1024;

/// The payload capacity of a small buffer, in bytes.
pub const SMALL_PAYLOAD_BYTES: usize = PAGE_BYTES;

/// Space in front of a buffer's payload for an encoded record header, in bytes.
pub const HEADER_BYTES: usize = PAGE_BYTES;

/// The largest encoded record header, in bytes: the fixed part and a CRC for each 512-byte block.
pub const RECORD_HEADER_BYTES_MAX: usize =
    crate::record::FIXED_BYTES + 4 * (PAYLOAD_BYTES_MAX / 512);

/// The most blocks one discard or write-zeroes record may cover. Larger requests are split.
pub const RANGE_BLOCKS_MAX: u32 = 65_536;

/// Members of a shard, at most.
pub const MEMBERS_MAX: usize = 7;

/// Block requests that a head has accepted and not answered, at most; more wait in the front end.
pub const HEAD_REQUESTS_MAX: usize = 1024;

/// Records that a member may have received and not yet answered, per head session.
pub const MEMBER_COMMANDS_MAX: usize = 1024;

/// How long a member that answered a head's command delays the answer to a higher Seal, counted
/// from when the command came, in milliseconds of its own monotonic clock.
pub const GRANT_MS: u64 = 200;

/// How long a head counts on such a grant, from when it sent the command, in milliseconds of its own
/// clock. The rest is for clocks that run at different rates.
pub const GRANT_TRUSTED_MS: u64 = 150;

/// Volumes that one process serves, at most.
pub const VOLUMES_MAX: usize = 1024;

/// A volume's size, at most, in bytes.
pub const VOLUME_BYTES_MAX: u64 = 1 << 47;

/// A volume's or server's name, at most, in bytes.
pub const NAME_BYTES_MAX: usize = 63;

const _: () = assert!(RECORD_HEADER_BYTES_MAX <= HEADER_BYTES);
const _: () = assert!(PAYLOAD_BYTES_MAX.is_multiple_of(PAGE_BYTES));
const _: () = assert!(SMALL_PAYLOAD_BYTES <= PAYLOAD_BYTES_MAX);
const _: () = assert!(HEAD_REQUESTS_MAX <= MEMBER_COMMANDS_MAX);
const _: () = assert!(GRANT_TRUSTED_MS + GRANT_MS / 5 < GRANT_MS);
