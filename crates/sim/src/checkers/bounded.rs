//! Bounded queues: however long a disk hangs or a peer does not listen, a process asks only so much of
//! them.

use super::Seen;

/// Disk operations under way: buffers bound them.
const OPERATIONS_MAX: usize = 512;
/// Bytes that wait for one peer's window, in all connections of a process.
const UNSENT_BYTES_MAX: usize = 64 << 20;

pub(super) fn look(seen: &Seen<'_>) -> Result<(), String> {
    if seen.operations > OPERATIONS_MAX {
        return Err(format!(
            "bounds: process {} has {} disk operations under way",
            seen.process, seen.operations
        ));
    }
    if seen.unsent_bytes > UNSENT_BYTES_MAX {
        return Err(format!(
            "bounds: process {} has {} bytes to send that nobody takes",
            seen.process, seen.unsent_bytes
        ));
    }
    Ok(())
}
