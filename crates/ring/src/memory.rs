//! The memory under the buffers: one mapping, registered with the kernel, never unmapped.

use std::ptr;

use base::BufferPool;
use base::limits::PAGE_BYTES;
use rustix::mm::{Advice, MapFlags, ProtFlags};

use crate::config::Config;
use crate::error::{Error, ErrorKind};
use crate::uring::Uring;

const HUGE_PAGE_BYTES: usize = 2 << 20;

/// The kernel registers at most this much as one buffer.
const REGISTERED_BYTES_MAX: usize = 1 << 30;

/// Where the registered memory lies, to find a buffer's registration by its address.
pub(crate) struct Region {
    start: usize,
    registered_bytes: usize,
}

impl Region {
    /// Maps, populates and registers the memory for `config`'s buffers.
    pub(crate) fn new(config: &Config, uring: &Uring) -> Result<(Self, BufferPool), Error> {
        let bytes = BufferPool::region_bytes(config.small_buffers, config.large_buffers);
        if bytes == 0 {
            return Ok((Self { start: 0, registered_bytes: 0 }, BufferPool::heap(0, 0)));
        }
        let memory = map(bytes, config.huge_pages)?;
        let start = memory.as_mut_ptr();
        let mut registered_bytes = 0;
        if config.register_buffers {
            register(uring, start, bytes)?;
            registered_bytes = bytes;
        }
        let region = Self { start: start.addr(), registered_bytes };
        Ok((region, BufferPool::from_region(memory, config.small_buffers, config.large_buffers)))
    }

    /// The index of the registered buffer that holds all of these bytes.
    pub(crate) fn registered(&self, start: *const u8, bytes: usize) -> Option<u16> {
        let from = start.addr().checked_sub(self.start)?;
        let to = from.checked_add(bytes)?;
        if to > self.registered_bytes || bytes == 0 {
            return None;
        }
        let index = from / REGISTERED_BYTES_MAX;
        if index != (to - 1) / REGISTERED_BYTES_MAX {
            return None; // lies across two registrations
        }
        u16::try_from(index).ok()
    }
}

fn map(bytes: usize, huge_pages: bool) -> Result<&'static mut [u8], Error> {
    let context = || format!("{bytes} bytes of buffers");
    let mapped_bytes = bytes
        .checked_next_multiple_of(PAGE_BYTES)
        .and_then(|bytes| bytes.checked_add(HUGE_PAGE_BYTES))
        .ok_or_else(|| Error::new(ErrorKind::InvalidConfig, context()))?;
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    // SAFETY: a new anonymous mapping at an address of the kernel's choice disturbs nothing.
    let mapping = unsafe {
        rustix::mm::mmap_anonymous(
            ptr::null_mut(),
            mapped_bytes,
            ProtFlags::READ | ProtFlags::WRITE,
            flags,
        )
    }
    .map_err(|error| Error::os(ErrorKind::OutOfMemory, context(), error.into()))?;
    let skipped = mapping.cast::<u8>().align_offset(HUGE_PAGE_BYTES);
    // SAFETY: `skipped` is less than a huge page, which the mapping has to spare.
    let start = unsafe { mapping.cast::<u8>().add(skipped) };
    if huge_pages {
        // Advice only: a kernel without huge pages refuses it, and small pages do.
        // SAFETY: the range is within the new mapping; this advice does not change contents.
        let _ = unsafe { rustix::mm::madvise(start.cast(), bytes, Advice::LinuxHugepage) };
    }
    // A child must not make the kernel copy pages that a device is writing to, and a core dump
    // is no place for guests' data.
    for advice in [Advice::LinuxDontFork, Advice::LinuxDontDump] {
        // SAFETY: as above; nothing but this process uses the memory.
        unsafe { rustix::mm::madvise(start.cast(), bytes, advice) }
            .map_err(|error| Error::os(ErrorKind::Os, context(), error.into()))?;
    }
    // Faults in every page now: a machine without the memory fails here, not in the I/O path.
    // SAFETY: as above.
    unsafe { rustix::mm::madvise(start.cast(), bytes, Advice::LinuxPopulateWrite) }
        .map_err(|error| Error::os(ErrorKind::OutOfMemory, context(), error.into()))?;
    // SAFETY: `bytes` from `start` are within the mapping, readable, writable, zeroed by the
    // kernel, referenced by nothing else, and never unmapped.
    Ok(unsafe { std::slice::from_raw_parts_mut(start, bytes) })
}

fn register(uring: &Uring, start: *mut u8, bytes: usize) -> Result<(), Error> {
    let iovecs: Vec<libc::iovec> = (0..bytes)
        .step_by(REGISTERED_BYTES_MAX)
        .map(|offset| libc::iovec {
            iov_base: start.wrapping_add(offset).cast(),
            iov_len: REGISTERED_BYTES_MAX.min(bytes - offset),
        })
        .collect();
    // SAFETY: the memory is never unmapped, so the registration stays valid with the ring.
    unsafe { uring.submitter().register_buffers(&iovecs) }.map_err(|error| {
        let kind = match error.raw_os_error() {
            Some(libc::ENOMEM) => ErrorKind::LockedMemory,
            _ => ErrorKind::Os,
        };
        Error::os(kind, format!("registering {bytes} bytes of buffers"), error)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_found_by_address() {
        let gib = REGISTERED_BYTES_MAX;
        let region = Region { start: 0x10_0000, registered_bytes: 2 * gib + 8192 };
        let at = |offset: usize| ptr::without_provenance::<u8>(0x10_0000 + offset);
        assert_eq!(region.registered(at(0), 4096), Some(0));
        assert_eq!(region.registered(at(gib - 4096), 4096), Some(0));
        assert_eq!(region.registered(at(gib), 4096), Some(1));
        assert_eq!(region.registered(at(gib - 4096), 8192), None, "across two registrations");
        assert_eq!(region.registered(at(2 * gib), 8192), Some(2));
        assert_eq!(region.registered(at(2 * gib), 8193), None, "over the end");
        assert_eq!(region.registered(ptr::without_provenance(0xF_FFFF), 1), None, "before it");
        assert_eq!(region.registered(at(0), usize::MAX), None);
        let unregistered = Region { start: 0x10_0000, registered_bytes: 0 };
        assert_eq!(unregistered.registered(at(0), 1), None);
    }
}
