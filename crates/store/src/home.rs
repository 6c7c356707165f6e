//! Home: chunks of mass devices, each with two alternating metadata slots.

use crate::layout::PAGE;

/// Bytes of the fixed part of a chunk's metadata.
pub(crate) const CHUNK_HEADER_BYTES: u64 = 128;

/// Bytes of one metadata slot of a chunk with `chunk_bytes` of data: fixed part, two state bits
/// and a CRC32C for each 512-byte block, in whole pages.
pub(crate) const fn slot_bytes(chunk_bytes: u64) -> u64 {
    let blocks = chunk_bytes / 512;
    (CHUNK_HEADER_BYTES + blocks / 4 + 4 * blocks).next_multiple_of(PAGE)
}
