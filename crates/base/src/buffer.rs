//! Payload memory: preallocated, page-aligned, counted, given back on drop.
//!
//! A slot is one header page ([`HEADER_BYTES`]) followed by its payload. A [`BufferMut`] is the
//! only reference to its slot and may be written, by us or by the kernel; freezing it gives
//! [`Buffer`]s, which are read-only, cheap to clone and to slice. The last one to go returns the
//! slot to its pool, so whoever has an operation under way simply owns a buffer until it
//! completes. A pool belongs to one reactor thread; buffers never cross threads.

use core::cell::RefCell;
use core::fmt;
use core::ops::Range;
use std::rc::{Rc, Weak};

use bytes::BytesMut;

use crate::limits::{HEADER_BYTES, PAGE_BYTES, PAYLOAD_BYTES_MAX, SMALL_PAYLOAD_BYTES};

/// Bytes of a slot whose payload is [`SMALL_PAYLOAD_BYTES`].
pub const SMALL_SLOT_BYTES: usize = HEADER_BYTES + SMALL_PAYLOAD_BYTES;
/// Bytes of a slot whose payload is [`PAYLOAD_BYTES_MAX`].
pub const LARGE_SLOT_BYTES: usize = HEADER_BYTES + PAYLOAD_BYTES_MAX;

enum Memory {
    /// Part of a region that lives as long as the process (huge pages, registered with the kernel).
    Region(&'static mut [u8]),
    /// Part of an allocation, which goes with the last of its parts.
    Heap(BytesMut),
    /// An allocation of its own as soon as the slot is taken.
    OnDemand { slot_bytes: usize },
}

/// Zeroed heap memory from a page boundary on.
fn pages(bytes: usize) -> BytesMut {
    let mut memory = BytesMut::zeroed(bytes + PAGE_BYTES);
    let start = memory.as_ptr().align_offset(PAGE_BYTES);
    memory.split_off(start).split_to(bytes)
}

struct Slot {
    memory: Memory,
    small: bool,
    pool: Weak<Pool>,
}

impl Slot {
    fn bytes(&self) -> &[u8] {
        match &self.memory {
            Memory::Region(bytes) => bytes,
            Memory::Heap(bytes) => bytes,
            Memory::OnDemand { .. } => &[],
        }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        match &mut self.memory {
            Memory::Region(bytes) => bytes,
            Memory::Heap(bytes) => bytes,
            Memory::OnDemand { .. } => &mut [],
        }
    }
}

struct Free {
    small: Vec<Rc<Slot>>,
    large: Vec<Rc<Slot>>,
}

struct Pool {
    free: RefCell<Free>,
}

/// A pool of small (4 KiB) and large (128 KiB) payload buffers. Clones share the slots.
#[derive(Clone)]
pub struct BufferPool {
    pool: Rc<Pool>,
}

impl BufferPool {
    /// A pool on heap memory. All of it is one allocation: a process that has little time to start makes
    /// thousands of buffers.
    pub fn heap(small: usize, large: usize) -> Self {
        let mut rest = pages(Self::region_bytes(small, large));
        let mut cut = |slot_bytes: usize| Memory::Heap(rest.split_to(slot_bytes));
        let large = (0..large).map(|_| cut(LARGE_SLOT_BYTES)).collect();
        let small = (0..small).map(|_| cut(SMALL_SLOT_BYTES)).collect();
        Self::with_slots(small, large)
    }

    /// A pool on heap memory that is allocated as its slots are first taken: for tests and the simulator,
    /// where many pools live for a short time and few slots of each are ever used.
    pub fn on_demand(small: usize, large: usize) -> Self {
        let memory = |slot_bytes: usize| Memory::OnDemand { slot_bytes };
        Self::with_slots(
            (0..small).map(|_| memory(SMALL_SLOT_BYTES)).collect(),
            (0..large).map(|_| memory(LARGE_SLOT_BYTES)).collect(),
        )
    }

    /// A pool of `small` small and `large` large slots cut from `region`.
    ///
    /// # Panics
    /// If `region` is not page-aligned or too short; see [`BufferPool::region_bytes`].
    pub fn from_region(region: &'static mut [u8], small: usize, large: usize) -> Self {
        assert_eq!(region.as_ptr().align_offset(PAGE_BYTES), 0, "the region is page-aligned");
        assert!(region.len() >= Self::region_bytes(small, large), "the region holds all slots");
        let mut rest = region;
        let mut cut = |slot_bytes: usize| {
            let (slot, tail) = std::mem::take(&mut rest).split_at_mut(slot_bytes);
            rest = tail;
            Memory::Region(slot)
        };
        // Large slots first: they gain most from lying within one huge page.
        let large = (0..large).map(|_| cut(LARGE_SLOT_BYTES)).collect();
        let small = (0..small).map(|_| cut(SMALL_SLOT_BYTES)).collect();
        Self::with_slots(small, large)
    }

    /// The bytes of memory that so many slots take.
    pub const fn region_bytes(small: usize, large: usize) -> usize {
        small * SMALL_SLOT_BYTES + large * LARGE_SLOT_BYTES
    }

    fn with_slots(small: Vec<Memory>, large: Vec<Memory>) -> Self {
        let pool = Rc::new_cyclic(|pool: &Weak<Pool>| {
            let slots = |memories: Vec<Memory>, small: bool| {
                memories
                    .into_iter()
                    .map(|memory| Rc::new(Slot { memory, small, pool: pool.clone() }))
                    .collect::<Vec<_>>()
            };
            Pool {
                free: RefCell::new(Free { small: slots(small, true), large: slots(large, false) }),
            }
        });
        Self { pool }
    }

    /// A buffer whose payload holds `payload_bytes`; `None` while none is free (try again when
    /// something completed) or if it is more than [`PAYLOAD_BYTES_MAX`]. Contents are stale.
    pub fn take(&self, payload_bytes: usize) -> Option<BufferMut> {
        if payload_bytes > PAYLOAD_BYTES_MAX {
            return None;
        }
        let mut free = self.pool.free.borrow_mut();
        let small = if payload_bytes <= SMALL_PAYLOAD_BYTES { free.small.pop() } else { None };
        let mut slot = small.or_else(|| free.large.pop())?;
        if let Memory::OnDemand { slot_bytes } = slot.memory {
            let slot = Rc::get_mut(&mut slot).expect("a free slot is nobody's");
            slot.memory = Memory::Heap(pages(slot_bytes));
        }
        Some(BufferMut { slot })
    }

    /// Free slots: (small, large).
    pub fn available(&self) -> (usize, usize) {
        let free = self.pool.free.borrow();
        (free.small.len(), free.large.len())
    }
}

impl fmt::Debug for BufferPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (small, large) = self.available();
        write!(f, "BufferPool {{ free small: {small}, free large: {large} }}")
    }
}

/// Puts the slot back if `slot` is its last reference.
fn give_back(slot: &Rc<Slot>) {
    if Rc::strong_count(slot) == 1
        && let Some(pool) = slot.pool.upgrade()
    {
        let mut free = pool.free.borrow_mut();
        let list = if slot.small { &mut free.small } else { &mut free.large };
        list.push(Rc::clone(slot));
    }
}

/// The only reference to a slot: may be written.
pub struct BufferMut {
    slot: Rc<Slot>,
}

impl BufferMut {
    fn all_mut(&mut self) -> &mut [u8] {
        Rc::get_mut(&mut self.slot).expect("a BufferMut is its slot's only reference").bytes_mut()
    }

    /// The header page.
    pub fn header_mut(&mut self) -> &mut [u8] {
        &mut self.all_mut()[..HEADER_BYTES]
    }

    /// The payload, all of its capacity; page-aligned.
    pub fn payload_mut(&mut self) -> &mut [u8] {
        &mut self.all_mut()[HEADER_BYTES..]
    }

    /// Header page and payload, both writable.
    pub fn split_mut(&mut self) -> (&mut [u8], &mut [u8]) {
        self.all_mut().split_at_mut(HEADER_BYTES)
    }

    /// Header page and payload in one piece: the payload starts at [`HEADER_BYTES`].
    pub fn slot_mut(&mut self) -> &mut [u8] {
        self.all_mut()
    }

    /// The payload, all of its capacity.
    pub fn payload(&self) -> &[u8] {
        &self.slot.bytes()[HEADER_BYTES..]
    }

    /// The payload's capacity in bytes.
    pub fn capacity(&self) -> usize {
        self.slot.bytes().len() - HEADER_BYTES
    }

    /// Ends writing. The [`Frozen`] slot gives read-only parts.
    pub fn freeze(self) -> Frozen {
        let slot = Rc::clone(&self.slot);
        drop(self); // two references: not given back
        Frozen { all: Buffer { length: slot.bytes().len(), slot, start: 0 } }
    }
}

impl Drop for BufferMut {
    fn drop(&mut self) {
        give_back(&self.slot);
    }
}

impl fmt::Debug for BufferMut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BufferMut {{ capacity: {} }}", self.capacity())
    }
}

/// A slot whose content no longer changes.
#[derive(Clone, Debug)]
pub struct Frozen {
    all: Buffer,
}

impl Frozen {
    /// The first `bytes` of the header page.
    pub fn header(&self, bytes: usize) -> Buffer {
        assert!(bytes <= HEADER_BYTES);
        self.all.slice(0..bytes)
    }

    /// The first `bytes` of the payload.
    pub fn payload(&self, bytes: usize) -> Buffer {
        self.all.slice(HEADER_BYTES..HEADER_BYTES + bytes)
    }

    /// Header page and the first `bytes` of the payload, in one piece.
    pub fn header_and_payload(&self, bytes: usize) -> Buffer {
        self.all.slice(0..HEADER_BYTES + bytes)
    }
}

/// Read-only bytes of a slot; clones and slices share it.
pub struct Buffer {
    slot: Rc<Slot>,
    start: usize,
    length: usize,
}

impl Buffer {
    /// A buffer of its own with a copy of `bytes`, outside any pool: for control messages,
    /// tests and tools, not for the data path.
    pub fn copied_from(bytes: &[u8]) -> Self {
        let length = bytes.len();
        let memory = Memory::Heap(BytesMut::from(bytes));
        Self { slot: Rc::new(Slot { memory, small: false, pool: Weak::new() }), start: 0, length }
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.slot.bytes()[self.start..self.start + self.length]
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.length
    }

    /// True if there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// A part of these bytes.
    ///
    /// # Panics
    /// If `range` is not within the buffer.
    #[must_use]
    pub fn slice(&self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.length, "slice within the buffer");
        Self {
            slot: Rc::clone(&self.slot),
            start: self.start + range.start,
            length: range.end - range.start,
        }
    }

    /// The same start, but `length` bytes, which may reach past this buffer's end as far as its
    /// slot does: for O_DIRECT writes that pad a payload to whole pages. The bytes past the end
    /// are whatever the slot holds there; zero them before freezing.
    ///
    /// # Panics
    /// If the slot ends before.
    #[must_use]
    pub fn extended(&self, length: usize) -> Self {
        assert!(self.start + length <= self.slot.bytes().len(), "extension within the slot");
        Self { slot: Rc::clone(&self.slot), start: self.start, length }
    }

    /// The buffer as a writable one again, if this is the slot's only reference.
    pub fn try_into_mut(self) -> Result<BufferMut, Self> {
        if Rc::strong_count(&self.slot) == 1 && self.slot.bytes().len() > HEADER_BYTES {
            let slot = Rc::clone(&self.slot);
            drop(self);
            Ok(BufferMut { slot })
        } else {
            Err(self)
        }
    }
}

impl Clone for Buffer {
    fn clone(&self) -> Self {
        Self { slot: Rc::clone(&self.slot), start: self.start, length: self.length }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        give_back(&self.slot);
    }
}

impl PartialEq for Buffer {
    fn eq(&self, other: &Self) -> bool {
        self.bytes() == other.bytes()
    }
}

impl Eq for Buffer {}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer {{ {} bytes }}", self.length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_come_back_when_the_last_reference_goes() {
        let pool = BufferPool::heap(1, 1);
        let mut buffer = pool.take(100).unwrap();
        assert_eq!(pool.available(), (0, 1));
        buffer.payload_mut()[..3].copy_from_slice(b"abc");
        let frozen = buffer.freeze();
        let payload = frozen.payload(3);
        drop(frozen);
        let part = payload.slice(1..3);
        drop(payload);
        assert_eq!(part.bytes(), b"bc");
        assert_eq!(pool.available(), (0, 1));
        drop(part);
        assert_eq!(pool.available(), (1, 1));
    }

    #[test]
    fn small_requests_fall_back_to_large_slots_and_too_large_ones_get_none() {
        let pool = BufferPool::heap(1, 1);
        let small = pool.take(1).unwrap();
        let large = pool.take(1).unwrap();
        assert_eq!(small.capacity(), SMALL_PAYLOAD_BYTES);
        assert_eq!(large.capacity(), PAYLOAD_BYTES_MAX);
        assert!(pool.take(1).is_none());
        drop(large);
        assert!(pool.take(PAYLOAD_BYTES_MAX + 1).is_none());
        assert!(pool.take(PAYLOAD_BYTES_MAX).is_some());
    }

    #[test]
    fn payload_is_page_aligned_in_both_kinds_of_memory() {
        let region: &'static mut [u8] = {
            let bytes = BufferPool::region_bytes(2, 2) + PAGE_BYTES;
            let leaked = Box::leak(vec![0_u8; bytes].into_boxed_slice());
            let offset = leaked.as_ptr().align_offset(PAGE_BYTES);
            &mut leaked[offset..]
        };
        let heap = [BufferPool::heap(2, 2), BufferPool::on_demand(2, 2)];
        for pool in heap.into_iter().chain([BufferPool::from_region(region, 2, 2)]) {
            let all: Vec<_> = std::iter::from_fn(|| pool.take(1)).collect();
            assert_eq!(all.len(), 4);
            for buffer in all {
                assert_eq!(buffer.payload().as_ptr().align_offset(PAGE_BYTES), 0);
            }
            assert_eq!(pool.available(), (2, 2));
        }
    }

    #[test]
    fn a_buffer_becomes_writable_again_only_when_it_is_alone() {
        let pool = BufferPool::heap(1, 0);
        let payload = pool.take(8).unwrap().freeze().payload(8);
        let other = payload.clone();
        let payload = payload.try_into_mut().unwrap_err();
        drop(other);
        let again = payload.try_into_mut().unwrap();
        drop(again);
        assert_eq!(pool.available(), (1, 0));
    }

    #[test]
    fn a_pool_dropped_first_frees_its_slots_with_their_buffers() {
        let pool = BufferPool::heap(1, 0);
        let buffer = pool.take(8).unwrap();
        drop(pool);
        assert_eq!(buffer.capacity(), SMALL_PAYLOAD_BYTES);
    }
}
