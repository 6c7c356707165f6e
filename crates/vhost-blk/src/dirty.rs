//! The dirty log of a live migration: one bit per 4 KiB page of guest memory, shared with the
//! front end (vhost-user, "Migration").
//!
//! A page is marked after it was written and before the guest can learn of it. The front end
//! reads and clears the map at any time, so bits are set with atomic operations.

use core::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::fs::File;

use vm_memory::VolatileMemory;

use crate::memory::{Mapping, MemoryError};

const LOG_PAGE_SHIFT: u32 = 12;

/// The map, indexed by guest-physical page for the whole device.
#[derive(Debug)]
pub(crate) struct DirtyLog {
    map: Mapping,
    /// So that a map that is too small is reported once.
    reported: AtomicBool,
}

impl DirtyLog {
    pub(crate) fn new(file: &File, offset: u64, bytes: u64) -> Result<Self, MemoryError> {
        Ok(Self { map: Mapping::new(file, offset, bytes)?, reported: AtomicBool::new(false) })
    }

    /// True if the front end took it away.
    pub(crate) fn is_lost(&self) -> bool {
        self.map.is_lost()
    }

    /// Marks the pages of `[gpa, gpa + bytes)`.
    pub(crate) fn mark(&self, gpa: u64, bytes: u64) {
        if bytes == 0 {
            return;
        }
        let first = gpa >> LOG_PAGE_SHIFT;
        let last = gpa.saturating_add(bytes - 1) >> LOG_PAGE_SHIFT;
        for page in first..=last {
            let byte = usize::try_from(page / 8).unwrap_or(usize::MAX);
            let slice = self.map.slice();
            let Ok(bits) = slice.get_atomic_ref::<AtomicU8>(byte) else {
                self.report(gpa);
                return;
            };
            let bit = 1 << (page % 8);
            // Release: the data is visible to whoever sees the bit.
            bits.fetch_or(bit, Ordering::Release);
        }
    }

    fn report(&self, gpa: u64) {
        if !self.reported.swap(true, Ordering::Relaxed) {
            tracing::error!(
                "the front end's dirty log of {} bytes does not cover guest address {gpa:#x}: \
                 a live migration would lose this page",
                self.map.len()
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::memory_file;

    #[test]
    fn marks_every_page_touched_and_nothing_beyond_the_map() {
        let file = memory_file(c"log", 4096).unwrap();
        let log = DirtyLog::new(&file, 16, 2).unwrap();
        log.mark(0x0fff, 2); // pages 0 and 1
        log.mark(0x9000, 1); // page 9
        log.mark(0x3000, 0);
        log.mark(0xf000, 0x2000); // page 15, and 16 beyond the map
        log.mark(u64::MAX, 1);
        let mut bytes = [0_u8; 4];
        let read = Mapping::new(&file, 14, 4).unwrap();
        assert_eq!(read.slice().copy_to(&mut bytes), 4);
        // Before the map (2 bytes skipped), the map, nothing after.
        assert_eq!(bytes[2..], [0b0000_0011, 0b1000_0010]);
        let after = Mapping::new(&file, 18, 1).unwrap();
        let mut byte = [0_u8];
        after.slice().copy_to(&mut byte);
        assert_eq!(byte, [0]);
    }
}
