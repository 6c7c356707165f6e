//! A split virtqueue in guest memory (virtio 1.3, 2.7): the fields, one access each.
//!
//! Nothing read here is trusted. The view resolves the front end's addresses once; each later
//! access is at a checked offset of a part that is known to be mapped and aligned.

use core::sync::atomic::{AtomicU16, AtomicU32, Ordering, fence};
use std::sync::Arc;

use vm_memory::{AtomicInteger, VolatileMemory};

use crate::crash_point;
use crate::dirty::DirtyLog;
use crate::memory::{GuestMemory, Mapping};

const DESCRIPTOR_BYTES: usize = 16;

/// Set by the guest in the available ring's flags: no interrupts, please (without EVENT_IDX).
const AVAIL_F_NO_INTERRUPT: u16 = 1;
/// Set by us in the used ring's flags: no kicks, please (without EVENT_IDX).
const USED_F_NO_NOTIFY: u16 = 1;

const DESC_F_NEXT: u16 = 1;
const DESC_F_WRITE: u16 = 2;
const DESC_F_INDIRECT: u16 = 4;

/// A descriptor, copied out of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Descriptor {
    pub(crate) gpa: u64,
    pub(crate) bytes: u32,
    pub(crate) flags: u16,
    pub(crate) next: u16,
}

impl Descriptor {
    pub(crate) fn decode(raw: [u8; DESCRIPTOR_BYTES]) -> Self {
        let [g0, g1, g2, g3, g4, g5, g6, g7, b0, b1, b2, b3, f0, f1, n0, n1] = raw;
        Self {
            gpa: u64::from_le_bytes([g0, g1, g2, g3, g4, g5, g6, g7]),
            bytes: u32::from_le_bytes([b0, b1, b2, b3]),
            flags: u16::from_le_bytes([f0, f1]),
            next: u16::from_le_bytes([n0, n1]),
        }
    }

    pub(crate) fn has_next(self) -> bool {
        self.flags & DESC_F_NEXT != 0
    }

    pub(crate) fn is_writable(self) -> bool {
        self.flags & DESC_F_WRITE != 0
    }

    pub(crate) fn is_indirect(self) -> bool {
        self.flags & DESC_F_INDIRECT != 0
    }
}

/// Where a front end says a ring is, in its own address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RingAddresses {
    pub(crate) descriptors: u64,
    pub(crate) available: u64,
    pub(crate) used: u64,
    /// The used ring's guest address for the dirty log, if the front end gave one.
    pub(crate) used_log: Option<u64>,
}

#[derive(Debug)]
struct Part {
    mapping: Arc<Mapping>,
    offset: usize,
}

impl Part {
    /// Finds `bytes` bytes at `user`, aligned to `align`; also their guest address.
    fn find(memory: &GuestMemory, user: u64, bytes: usize, align: usize) -> Option<(Self, u64)> {
        let (region, offset) = memory.find_user(user, bytes as u64)?;
        let slice = region.mapping.slice().subslice(offset, bytes).ok()?;
        if !(slice.ptr_guard().as_ptr() as usize).is_multiple_of(align) {
            return None;
        }
        let part = Self { mapping: Arc::clone(&region.mapping), offset };
        Some((part, region.gpa + offset as u64))
    }

    fn store<T: AtomicInteger>(&self, offset: usize, value: T::V, order: Ordering) {
        self.with::<T, _>(offset, |cell| cell.store(value, order));
    }

    fn load<T: AtomicInteger>(&self, offset: usize, order: Ordering) -> T::V {
        self.with::<T, _>(offset, |cell| cell.load(order))
    }

    fn with<T: AtomicInteger, R>(&self, offset: usize, access: impl FnOnce(&T) -> R) -> R {
        let slice = self.mapping.slice();
        let cell = slice.get_atomic_ref::<T>(self.offset + offset);
        access(cell.expect("`find` checked length and alignment, callers stay within them"))
    }
}

/// A ring whose parts are mapped. Keeps the mappings alive.
#[derive(Debug)]
pub(crate) struct Ring {
    size: u16,
    descriptors: Part,
    available: Part,
    used: Part,
    used_gpa: u64,
    /// What we last told the guest: `avail_event`, or the used ring's flags.
    kicks_told: Option<u16>,
}

impl Ring {
    /// Resolves `addresses` for a ring of `size` entries (a power of two); `None` if a part is
    /// not mapped or not aligned.
    pub(crate) fn resolve(
        memory: &GuestMemory,
        size: u16,
        addresses: &RingAddresses,
    ) -> Option<Self> {
        let entries = usize::from(size);
        let (descriptors, _) =
            Part::find(memory, addresses.descriptors, DESCRIPTOR_BYTES * entries, 16)?;
        let (available, _) = Part::find(memory, addresses.available, 6 + 2 * entries, 2)?;
        let (used, used_gpa) = Part::find(memory, addresses.used, 6 + 8 * entries, 4)?;
        Some(Self {
            size,
            descriptors,
            available,
            used,
            used_gpa: addresses.used_log.unwrap_or(used_gpa),
            kicks_told: None,
        })
    }

    pub(crate) fn size(&self) -> u16 {
        self.size
    }

    fn slot(&self, index: u16) -> usize {
        usize::from(index & (self.size - 1))
    }

    /// Descriptor `index` of the table; `None` if there is no such descriptor.
    pub(crate) fn descriptor(&self, index: u16) -> Option<Descriptor> {
        if index >= self.size {
            return None;
        }
        let at = self.descriptors.offset + usize::from(index) * DESCRIPTOR_BYTES;
        let slice = self.descriptors.mapping.slice().subslice(at, DESCRIPTOR_BYTES).ok()?;
        let mut raw = [0; DESCRIPTOR_BYTES];
        slice.copy_to(&mut raw);
        Some(Descriptor::decode(raw))
    }

    /// The guest's index: entries made available up to here are visible to us.
    pub(crate) fn available_index(&self) -> u16 {
        u16::from_le(self.available.load::<AtomicU16>(2, Ordering::Acquire))
    }

    /// The head descriptor in available entry `index`.
    pub(crate) fn available_head(&self, index: u16) -> u16 {
        let offset = 4 + 2 * self.slot(index);
        u16::from_le(self.available.load::<AtomicU16>(offset, Ordering::Relaxed))
    }

    /// The used index in memory. Read once, when the ring starts: afterwards ours is right.
    pub(crate) fn used_index(&self) -> u16 {
        u16::from_le(self.used.load::<AtomicU16>(2, Ordering::Acquire))
    }

    /// Writes used entry `index`. Not visible to the guest before [`Ring::publish_used`].
    pub(crate) fn write_used(&self, index: u16, head: u16, bytes: u32, log: Option<&DirtyLog>) {
        let offset = 4 + 8 * self.slot(index);
        crash_point();
        self.used.store::<AtomicU32>(offset, u32::from(head).to_le(), Ordering::Relaxed);
        self.used.store::<AtomicU32>(offset + 4, bytes.to_le(), Ordering::Relaxed);
        crash_point();
        self.mark(log, offset, 8);
    }

    /// Makes all entries before `index` visible to the guest.
    pub(crate) fn publish_used(&self, index: u16, log: Option<&DirtyLog>) {
        crash_point();
        self.used.store::<AtomicU16>(2, index.to_le(), Ordering::Release);
        crash_point();
        // The index itself can only be marked after it was written.
        self.mark(log, 2, 2);
    }

    /// True if the guest wants an interrupt, now that the used index went from `before` to `now`.
    pub(crate) fn wants_interrupt(&self, event_index: bool, before: u16, now: u16) -> bool {
        // Our used index before their wish: one of the two sides sees the other's store.
        fence(Ordering::SeqCst);
        if event_index {
            let offset = 4 + 2 * usize::from(self.size);
            let event = u16::from_le(self.available.load::<AtomicU16>(offset, Ordering::Relaxed));
            now.wrapping_sub(event).wrapping_sub(1) < now.wrapping_sub(before)
        } else {
            let flags = u16::from_le(self.available.load::<AtomicU16>(0, Ordering::Relaxed));
            flags & AVAIL_F_NO_INTERRUPT == 0
        }
    }

    /// Asks for a kick when the available index passes `seen`. The caller looks at the index
    /// again afterwards.
    pub(crate) fn enable_kicks(&mut self, event_index: bool, seen: u16, log: Option<&DirtyLog>) {
        let told = if event_index { seen } else { 0 };
        self.tell_kicks(event_index, told, log);
        fence(Ordering::SeqCst);
    }

    /// Asks for no kicks while we poll. With EVENT_IDX the event index we leave behind does it.
    pub(crate) fn disable_kicks(&mut self, event_index: bool, log: Option<&DirtyLog>) {
        if !event_index {
            self.tell_kicks(false, USED_F_NO_NOTIFY, log);
        }
    }

    /// Forgets what the guest was told about kicks.
    pub(crate) fn forget_kicks(&mut self) {
        self.kicks_told = None;
    }

    fn tell_kicks(&mut self, event_index: bool, value: u16, log: Option<&DirtyLog>) {
        if self.kicks_told == Some(value) {
            return;
        }
        self.kicks_told = Some(value);
        let offset = if event_index { 4 + 8 * usize::from(self.size) } else { 0 };
        self.used.store::<AtomicU16>(offset, value.to_le(), Ordering::Relaxed);
        crash_point();
        self.mark(log, offset, 2);
    }

    fn mark(&self, log: Option<&DirtyLog>, offset: usize, bytes: u64) {
        if let Some(log) = log {
            log.mark(self.used_gpa.saturating_add(offset as u64), bytes);
        }
    }
}
