//! The guest's memory: files of the front end, mapped; and copies to and from it.
//!
//! Guest memory is volatile and hostile. It is only ever copied, through
//! [`VolatileSlice`]s of bounds-checked parts of a [`Mapping`]; no reference to it exists.
//!
//! A front end may shrink its file under a mapping: what was read since then is not believed, and
//! the device's queues end ([`crate::fault`]).

use core::fmt;
use core::ptr::NonNull;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::sync::Arc;

use vm_memory::VolatileSlice;

use crate::crash_point;
use crate::dirty::DirtyLog;
use crate::fault::Listed;

/// Memory regions of one guest, at most.
pub(crate) const REGIONS_MAX: usize = 256;

/// The largest page a file may be made of (x86-64's largest huge page), in bytes.
const FILE_PAGE_BYTES_MAX: u64 = 1 << 30;

/// Why memory of the front end cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MemoryError {
    #[error("a region of {bytes} bytes at offset {offset} of a file of {file_bytes} bytes")]
    BeyondFile { offset: u64, bytes: u64, file_bytes: u64 },
    #[error("the descriptor is not a file of memory")]
    NotAFile,
    #[error("an empty region")]
    Empty,
    #[error("region at guest address {gpa:#x} overlaps another, or wraps around")]
    Overlap { gpa: u64 },
    #[error("more than {REGIONS_MAX} memory regions")]
    TooMany,
    #[error("cannot map: {0}")]
    Map(#[from] io::Error),
}

/// A shared, writable mapping of part of a file. Unmapped on drop.
pub(crate) struct Mapping {
    /// Taken off the list before the memory is unmapped: `drop` does it.
    listed: Option<Listed>,
    /// Where the mapping starts, and its length: whole pages.
    base: NonNull<u8>,
    map_bytes: usize,
    /// The part that was asked for.
    start: usize,
    bytes: usize,
}

// SAFETY: the mapping belongs to this value alone, stays where it is, and is only accessed
// through volatile and atomic operations, which may come from any thread.
unsafe impl Send for Mapping {}
// SAFETY: as above; `&Mapping` gives out `VolatileSlice`s and atomics only.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `bytes` bytes of `file` from `offset` on. Neither needs to be page-aligned.
    pub(crate) fn new(file: &File, offset: u64, bytes: u64) -> Result<Self, MemoryError> {
        if bytes == 0 {
            return Err(MemoryError::Empty);
        }
        let metadata = file.metadata()?;
        let kind = metadata.file_type();
        if !kind.is_file() || kind.is_char_device() {
            return Err(MemoryError::NotAFile);
        }
        let file_bytes = metadata.len();
        if offset.checked_add(bytes).is_none_or(|end| end > file_bytes) {
            return Err(MemoryError::BeyondFile { offset, bytes, file_bytes });
        }
        // Files on huge pages are mapped and unmapped in whole huge pages.
        let page = match metadata.blksize() {
            page if page.is_power_of_two() && page <= FILE_PAGE_BYTES_MAX => page.max(4096),
            _ => 4096,
        };
        let map_offset = offset & !(page - 1);
        let start = offset - map_offset;
        let too_large = || io::Error::from_raw_os_error(libc::EOVERFLOW);
        let map_bytes = (start + bytes).checked_next_multiple_of(page).ok_or_else(too_large)?;
        let map_bytes = usize::try_from(map_bytes).map_err(|_| too_large())?;
        let map_offset = libc::off_t::try_from(map_offset).map_err(|_| too_large())?;
        // SAFETY: a new mapping at an address of the kernel's choice changes no other memory.
        let address = unsafe {
            libc::mmap(
                core::ptr::null_mut(),
                map_bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                map_offset,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error().into());
        }
        let base = NonNull::new(address.cast()).ok_or_else(too_large)?;
        let mut mapping = Self {
            listed: None,
            base,
            map_bytes,
            start: usize::try_from(start).map_err(|_| too_large())?,
            bytes: usize::try_from(bytes).map_err(|_| too_large())?,
        };
        mapping.listed = Some(Listed::new(base.as_ptr(), map_bytes)?);
        Ok(mapping)
    }

    /// True if the front end took the memory away. An access before this call that hit the hole
    /// is seen.
    pub(crate) fn is_lost(&self) -> bool {
        self.listed.as_ref().is_some_and(Listed::is_lost)
    }

    /// Length in bytes.
    pub(crate) fn len(&self) -> usize {
        self.bytes
    }

    /// All of it. Parts come from the slice's checked methods.
    pub(crate) fn slice(&self) -> VolatileSlice<'_> {
        // SAFETY: `start + bytes <= map_bytes` by construction, so the pointer stays within the
        // mapping.
        let address = unsafe { self.base.as_ptr().add(self.start) };
        // SAFETY: the mapping is at least `bytes` long from `address` and lives as long as
        // `self`, which the slice borrows; nobody makes references into it.
        unsafe { VolatileSlice::new(address, self.bytes) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        self.listed = None;
        // SAFETY: the range was mapped by `new`, whole pages, and no slice outlives `self`.
        let result = unsafe { libc::munmap(self.base.as_ptr().cast(), self.map_bytes) };
        debug_assert_eq!(result, 0, "unmapping our own mapping");
    }
}

impl fmt::Debug for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mapping {{ {} bytes }}", self.bytes)
    }
}

/// One region of guest memory.
#[derive(Clone, Debug)]
pub(crate) struct Region {
    /// Where the guest sees it.
    pub(crate) gpa: u64,
    /// Where the front end sees it; ring addresses are given in these.
    pub(crate) user: u64,
    /// Our own mapping of it.
    pub(crate) mapping: Arc<Mapping>,
}

impl Region {
    fn bytes(&self) -> u64 {
        self.mapping.len() as u64
    }
}

/// A snapshot of all regions. A request under way keeps the one it started with.
#[derive(Debug, Default)]
pub(crate) struct GuestMemory {
    /// Sorted by guest address, disjoint.
    regions: Vec<Region>,
}

impl GuestMemory {
    pub(crate) fn new(mut regions: Vec<Region>) -> Result<Self, MemoryError> {
        if regions.len() > REGIONS_MAX {
            return Err(MemoryError::TooMany);
        }
        regions.sort_by_key(|region| region.gpa);
        let mut end = 0;
        for region in &regions {
            let overlap = MemoryError::Overlap { gpa: region.gpa };
            if region.gpa < end || region.user.checked_add(region.bytes()).is_none() {
                return Err(overlap);
            }
            end = region.gpa.checked_add(region.bytes()).ok_or(overlap)?;
        }
        Ok(Self { regions })
    }

    /// The memory at `gpa`, up to `bytes` long: shorter where the region ends; and the mapping that
    /// it is in. `None` if nothing is there.
    fn part(&self, gpa: u64, bytes: usize) -> Option<(VolatileSlice<'_>, &Mapping)> {
        let after = self.regions.partition_point(|region| region.gpa <= gpa);
        let region = self.regions.get(after.checked_sub(1)?)?;
        let offset = usize::try_from(gpa - region.gpa).ok()?;
        let left = region.mapping.len().checked_sub(offset).filter(|left| *left > 0)?;
        let slice = region.mapping.slice().subslice(offset, bytes.min(left)).ok()?;
        Some((slice, &region.mapping))
    }

    /// True if the front end took some of it away.
    pub(crate) fn is_lost(&self) -> bool {
        self.regions.iter().any(|region| region.mapping.is_lost())
    }

    /// True if all of `[gpa, gpa + bytes)` is mapped.
    pub(crate) fn contains(&self, gpa: u64, bytes: u64) -> bool {
        let mut gpa = gpa;
        let mut left = bytes;
        while left > 0 {
            let wanted = usize::try_from(left).unwrap_or(usize::MAX);
            let Some((part, _)) = self.part(gpa, wanted) else { return false };
            let got = part.len() as u64;
            left -= got;
            match gpa.checked_add(got) {
                Some(next) => gpa = next,
                None => return left == 0,
            }
        }
        true
    }

    /// Copies guest memory at `gpa` into `to`; false if not all of it is mapped, or if it was taken
    /// away meanwhile.
    #[must_use]
    pub(crate) fn read(&self, gpa: u64, to: &mut [u8]) -> bool {
        let mut gpa = gpa;
        let mut to = to;
        while !to.is_empty() {
            let Some((part, mapping)) = self.part(gpa, to.len()) else { return false };
            let got = part.copy_to(to);
            if mapping.is_lost() {
                return false;
            }
            to = &mut to[got..];
            gpa = gpa.wrapping_add(got as u64);
        }
        true
    }

    /// Copies `from` to guest memory at `gpa` and marks it in the dirty log; false if not all of
    /// it is mapped.
    #[must_use]
    pub(crate) fn write(&self, gpa: u64, from: &[u8], log: Option<&DirtyLog>) -> bool {
        let mut at = gpa;
        let mut left = from;
        while !left.is_empty() {
            let Some((part, _)) = self.part(at, left.len()) else { return false };
            crash_point();
            part.copy_from(left);
            crash_point();
            if let Some(log) = log {
                log.mark(at, part.len() as u64);
            }
            left = &left[part.len()..];
            at = at.wrapping_add(part.len() as u64);
        }
        true
    }

    /// The guest writes a byte of its memory.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn poke(&self, gpa: u64, byte: u8) {
        self.part(gpa, 1).expect("guest memory").0.copy_from(&[byte]);
    }

    /// The region that holds `[user, user + bytes)` of the front end's address space, and the
    /// offset in it.
    pub(crate) fn find_user(&self, user: u64, bytes: u64) -> Option<(&Region, usize)> {
        self.regions.iter().find_map(|region| {
            let offset = user.checked_sub(region.user)?;
            let fits = offset.checked_add(bytes)? <= region.bytes();
            if fits { Some((region, usize::try_from(offset).ok()?)) } else { None }
        })
    }
}

/// Anonymous memory in a file, for what the front end maps too.
pub(crate) fn memory_file(name: &core::ffi::CStr, bytes: u64) -> io::Result<File> {
    use std::os::fd::FromRawFd;
    // SAFETY: `name` is a valid C string; the call has no other memory effects.
    let fd =
        unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `fd` was just opened and belongs to nobody else.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(bytes)?;
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: F_ADD_SEALS on an open descriptor has no memory effects.
    let sealed = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) };
    if sealed < 0 { Err(io::Error::last_os_error()) } else { Ok(file) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(gpa: u64, user: u64, bytes: u64, offset: u64, file: &File) -> Region {
        Region { gpa, user, mapping: Arc::new(Mapping::new(file, offset, bytes).unwrap()) }
    }

    #[test]
    fn copies_cross_adjacent_regions_and_stop_at_holes() {
        let file = memory_file(c"test", 64 * 1024).unwrap();
        let top = (1_u64 << 47) - 5000;
        // Neither the sizes nor the file offsets are whole pages.
        let memory = GuestMemory::new(vec![
            region(top + 1000, 0x9000_0000, 3000, 8193, &file),
            region(top, 0x1000_0000, 1000, 512, &file),
        ])
        .unwrap();
        let data: Vec<u8> = (0..3999_u32).map(|n| n.to_le_bytes()[0]).collect();
        assert!(memory.write(top + 1, &data, None));
        let mut back = vec![0; 3999];
        assert!(memory.read(top + 1, &mut back));
        assert_eq!(back, data);
        assert!(memory.contains(top, 4000));
        assert!(!memory.contains(top, 4001));
        assert!(!memory.contains(top - 1, 2));
        assert!(!memory.contains(u64::MAX, 2));
        assert!(!memory.read(top + 3999, &mut [0; 2]));
        assert!(memory.find_user(0x9000_0000, 3000).is_some());
        assert!(memory.find_user(0x9000_0001, 3000).is_none());
        assert!(memory.find_user(u64::MAX, 2).is_none());
    }

    #[test]
    fn memory_that_is_taken_away_is_noticed_and_nothing_else_is_harmed() {
        // Not sealed, as a file on tmpfs is not.
        let file = tempfile::tempfile().unwrap();
        file.set_len(64 * 1024).unwrap();
        let other = memory_file(c"other", 8192).unwrap();
        let lost_before = crate::fault::lost();
        let memory = GuestMemory::new(vec![
            region(0, 0, 65536, 0, &file),
            region(65536, 65536, 8192, 0, &other),
        ])
        .unwrap();
        assert!(memory.write(0, &vec![7; 65536 + 8192], None));
        assert!(!memory.is_lost());
        file.set_len(4096).unwrap();
        // What is still there is read as before, until the hole is hit.
        let mut bytes = [0; 512];
        assert!(memory.read(1024, &mut bytes) && bytes == [7; 512]);
        assert!(!memory.read(60_000, &mut bytes), "nobody takes the zeroes for the guest's data");
        assert!(memory.is_lost() && crate::fault::lost() > lost_before);
        assert!(!memory.read(1024, &mut bytes));
        assert!(memory.read(65536, &mut bytes) && bytes == [7; 512]);
        assert!(memory.write(20_000, &[1; 512], None), "written where nobody looks");
        drop(memory);
        // The place in the list is used again.
        let again = Mapping::new(&other, 0, 8192).unwrap();
        assert!(!again.is_lost());
        let mut first = [0_u8];
        assert_eq!(again.slice().copy_to(&mut first), 1);
        assert_eq!(first, [7]);
    }

    #[test]
    fn regions_beyond_their_file_or_overlapping_are_refused() {
        let file = memory_file(c"test", 8192).unwrap();
        let error = Mapping::new(&file, 4096, 4097).unwrap_err();
        assert!(matches!(error, MemoryError::BeyondFile { file_bytes: 8192, .. }));
        assert!(matches!(Mapping::new(&file, u64::MAX, 2), Err(MemoryError::BeyondFile { .. })));
        assert!(matches!(Mapping::new(&file, 0, 0), Err(MemoryError::Empty)));
        let null = File::open("/dev/null").unwrap();
        assert!(matches!(Mapping::new(&null, 0, 1), Err(MemoryError::NotAFile)));
        let overlap = vec![region(0, 0, 4096, 0, &file), region(4095, 8192, 4096, 0, &file)];
        assert!(matches!(GuestMemory::new(overlap), Err(MemoryError::Overlap { gpa: 4095 })));
        let wraps = vec![region(u64::MAX - 10, 0, 4096, 0, &file)];
        assert!(matches!(GuestMemory::new(wraps), Err(MemoryError::Overlap { .. })));
    }
}
