//! The in-flight buffer (vhost-user, "Inflight I/O tracking"): which heads of a split ring the
//! back end has taken and not answered, in memory that outlives the back end.
//!
//! Layout as libvhost-user's, per queue, each region padded to 64 bytes:
//!
//! | offset | field |
//! |---|---|
//! | 0 | features: u64, 0 (in a buffer of our own: 1 while the ring runs) |
//! | 8 | version: u16, 1 |
//! | 10 | desc_num: u16 |
//! | 12 | last_batch_head: u16 |
//! | 14 | used_idx: u16 |
//! | 16 + 16 n | entry n: inflight: u8, padding, next: u16 at 6, counter: u64 at 8 |
//!
//! Order of a head's life: the entry is set before the request is submitted; `last_batch_head` is
//! set before the used index is published; the entry is cleared, then `used_idx` set, after. A
//! back end that died between publication and clearing is found by `used_idx` differing from the
//! used ring's: the entry of `last_batch_head` is then stale.

use core::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering, fence};
use std::fs::File;
use std::io;
use std::sync::Arc;

use vm_memory::{AtomicInteger, VolatileMemory};

use crate::crash_point;
use crate::memory::{Mapping, MemoryError, memory_file};

const VERSION: u16 = 1;
const HEADER_BYTES: usize = 16;
const ENTRY_BYTES: usize = 16;
const ALIGNMENT_BYTES: usize = 64;

/// Why an in-flight buffer cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InflightError {
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error("cannot make an in-flight buffer: {0}")]
    Create(#[from] io::Error),
    #[error("{queues} queues of {size} entries are not a layout for this device")]
    Layout { queues: u16, size: u16 },
    #[error("{given} bytes do not hold {needed}")]
    TooShort { given: u64, needed: u64 },
    #[error("queue {queue} has version {version} and {entries} entries")]
    Foreign { queue: u16, version: u16, entries: u16 },
}

fn queue_bytes(size: u16) -> usize {
    (HEADER_BYTES + ENTRY_BYTES * usize::from(size)).next_multiple_of(ALIGNMENT_BYTES)
}

/// Bytes of the buffer for `queues` queues of `size` entries.
pub(crate) fn buffer_bytes(queues: u16, size: u16) -> u64 {
    usize::from(queues) as u64 * queue_bytes(size) as u64
}

/// A fresh, zeroed buffer for a front end to keep.
pub(crate) fn create(queues: u16, size: u16) -> Result<File, InflightError> {
    if queues == 0 || size == 0 {
        return Err(InflightError::Layout { queues, size });
    }
    Ok(memory_file(c"holdfast-inflight", buffer_bytes(queues, size))?)
}

/// Who keeps a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Keeper {
    /// The front end: what it holds counts whenever a ring starts.
    FrontEnd,
    /// The back end, for as long as the connection lasts: what it holds counts only for a ring that
    /// was running when the connection was handed over.
    BackEnd,
}

/// The mapped buffer of all queues.
#[derive(Debug)]
pub(crate) struct InflightBuffer {
    mapping: Mapping,
    keeper: Keeper,
    queues: u16,
    size: u16,
}

impl InflightBuffer {
    /// True if the front end took it away.
    pub(crate) fn is_lost(&self) -> bool {
        self.mapping.is_lost()
    }

    /// Maps a front end's buffer and checks, or for a fresh one writes, its headers.
    pub(crate) fn map(
        file: &File,
        offset: u64,
        bytes: u64,
        queues: u16,
        size: u16,
        keeper: Keeper,
    ) -> Result<Self, InflightError> {
        if queues == 0 || size == 0 {
            return Err(InflightError::Layout { queues, size });
        }
        let needed = buffer_bytes(queues, size);
        if bytes < needed {
            return Err(InflightError::TooShort { given: bytes, needed });
        }
        // Atomic access needs alignment; the layout gives it if the start has it.
        if !offset.is_multiple_of(8) {
            return Err(InflightError::Layout { queues, size });
        }
        let buffer = Self { mapping: Mapping::new(file, offset, needed)?, keeper, queues, size };
        for queue in 0..queues {
            let at = usize::from(queue) * queue_bytes(size);
            let version = buffer.load::<AtomicU16>(at + 8);
            let entries = buffer.load::<AtomicU16>(at + 10);
            if version == 0 {
                buffer.store::<AtomicU16>(at + 10, size);
                buffer.store::<AtomicU16>(at + 8, VERSION);
            } else if version != VERSION || entries != size {
                return Err(InflightError::Foreign { queue, version, entries });
            }
        }
        Ok(buffer)
    }

    fn load<T: AtomicInteger>(&self, offset: usize) -> T::V {
        let slice = self.mapping.slice();
        let cell = slice.get_atomic_ref::<T>(offset).expect("within the layout, and aligned");
        cell.load(Ordering::Relaxed)
    }

    fn store<T: AtomicInteger>(&self, offset: usize, value: T::V) {
        let slice = self.mapping.slice();
        let cell = slice.get_atomic_ref::<T>(offset).expect("within the layout, and aligned");
        cell.store(value, Ordering::Relaxed);
    }
}

/// One queue's part of the buffer.
#[derive(Clone, Debug)]
pub(crate) struct InflightQueue {
    buffer: Arc<InflightBuffer>,
    start: usize,
}

impl InflightQueue {
    /// The part of `queue`, if it has one for a ring of `ring_size` entries.
    pub(crate) fn new(buffer: &Arc<InflightBuffer>, queue: u16, ring_size: u16) -> Option<Self> {
        if queue >= buffer.queues || ring_size > buffer.size {
            return None;
        }
        let start = usize::from(queue) * queue_bytes(buffer.size);
        Some(Self { buffer: Arc::clone(buffer), start })
    }

    fn entry(&self, head: u16) -> usize {
        debug_assert!(head < self.buffer.size, "heads are checked against the ring's size");
        self.start + HEADER_BYTES + ENTRY_BYTES * usize::from(head)
    }

    /// The ring starts with `used_index`: true if what the buffer holds is to be recovered.
    pub(crate) fn start(&self, used_index: u16) -> bool {
        match self.buffer.keeper {
            Keeper::FrontEnd => true,
            Keeper::BackEnd if self.buffer.load::<AtomicU64>(self.start) == 1 => true,
            Keeper::BackEnd => {
                for head in 0..self.buffer.size {
                    self.buffer.store::<AtomicU8>(self.entry(head), 0);
                }
                self.buffer.store::<AtomicU16>(self.start + 14, used_index);
                fence(Ordering::Release);
                self.buffer.store::<AtomicU64>(self.start, 1);
                false
            }
        }
    }

    /// The ring was stopped with nothing under way.
    pub(crate) fn stop(&self) {
        match self.buffer.keeper {
            Keeper::FrontEnd => {}
            Keeper::BackEnd => self.buffer.store::<AtomicU64>(self.start, 0),
        }
    }

    /// `head` was taken, as number `counter`. Before anything is submitted for it.
    pub(crate) fn set(&self, head: u16, counter: u64) {
        let entry = self.entry(head);
        crash_point();
        self.buffer.store::<AtomicU64>(entry + 8, counter);
        fence(Ordering::Release);
        crash_point();
        self.buffer.store::<AtomicU8>(entry, 1);
        fence(Ordering::Release);
        crash_point();
    }

    /// `head` is back in the available ring: it was the newest one that was taken.
    pub(crate) fn clear(&self, head: u16) {
        crash_point();
        fence(Ordering::Release);
        self.buffer.store::<AtomicU8>(self.entry(head), 0);
        fence(Ordering::Release);
        crash_point();
    }

    /// The used index is about to be published with `head` as its newest entry.
    pub(crate) fn before_publication(&self, head: u16) {
        crash_point();
        self.buffer.store::<AtomicU16>(self.start + 12, head);
        fence(Ordering::Release);
    }

    /// `used_index` was published with `head` as its newest entry.
    pub(crate) fn after_publication(&self, head: u16, used_index: u16) {
        fence(Ordering::Release);
        crash_point();
        self.buffer.store::<AtomicU8>(self.entry(head), 0);
        fence(Ordering::Release);
        crash_point();
        self.buffer.store::<AtomicU16>(self.start + 14, used_index);
        crash_point();
    }

    /// What a back end before us left behind, for a ring that starts with `used_index` and
    /// `ring_size` entries: the heads under way in the order they were taken, and the counter to
    /// go on with. Entries past the ring's size are cleared.
    pub(crate) fn recover(&self, used_index: u16, ring_size: u16) -> (Vec<u16>, u64) {
        if self.buffer.load::<AtomicU16>(self.start + 14) != used_index {
            let last = self.buffer.load::<AtomicU16>(self.start + 12);
            if last < self.buffer.size {
                self.buffer.store::<AtomicU8>(self.entry(last), 0);
            }
            crash_point();
            fence(Ordering::Release);
            self.buffer.store::<AtomicU16>(self.start + 14, used_index);
        }
        let mut taken: Vec<(u64, u16)> = Vec::new();
        for head in 0..self.buffer.size {
            let entry = self.entry(head);
            if self.buffer.load::<AtomicU8>(entry) == 0 {
                continue;
            }
            if head < ring_size {
                taken.push((self.buffer.load::<AtomicU64>(entry + 8), head));
            } else {
                self.buffer.store::<AtomicU8>(entry, 0);
            }
        }
        taken.sort_unstable();
        let next = taken.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        (taken.into_iter().map(|(_, head)| head).collect(), next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_libvhost_users() {
        // ALIGN_UP(sizeof(VuDescStateSplit) * size + sizeof(uint16_t), 64)
        for size in 1..=1024_u16 {
            let theirs = (16 * usize::from(size) + 2).next_multiple_of(64);
            assert_eq!(queue_bytes(size), theirs, "queue size {size}");
        }
    }

    #[test]
    fn fields_are_where_libvhost_user_has_them() {
        let file = create(2, 4).unwrap();
        let buffer = Arc::new(
            InflightBuffer::map(&file, 0, buffer_bytes(2, 4), 2, 4, Keeper::FrontEnd).unwrap(),
        );
        let queue = InflightQueue::new(&buffer, 1, 4).unwrap();
        queue.set(2, 0x0102_0304_0506_0708);
        queue.before_publication(3);
        let mut bytes = [0_u8; 128 + 128];
        buffer.mapping.slice().copy_to(&mut bytes);
        let region = &bytes[128..];
        assert_eq!(region[..16], [0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 4, 0, 3, 0, 0, 0]);
        assert_eq!(region[48..64], [1, 0, 0, 0, 0, 0, 0, 0, 8, 7, 6, 5, 4, 3, 2, 1]);
        queue.after_publication(2, 9);
        buffer.mapping.slice().copy_to(&mut bytes);
        assert_eq!(bytes[128 + 14], 9);
        assert_eq!(bytes[128 + 48], 0);
    }

    #[test]
    fn foreign_and_short_buffers_are_refused() {
        let file = create(1, 8).unwrap();
        let bytes = buffer_bytes(1, 8);
        assert!(matches!(
            InflightBuffer::map(&file, 0, bytes - 1, 1, 8, Keeper::FrontEnd),
            Err(InflightError::TooShort { .. })
        ));
        assert!(matches!(
            InflightBuffer::map(&file, 0, 1 << 40, 1, 1000, Keeper::FrontEnd),
            Err(InflightError::Memory(MemoryError::BeyondFile { .. }))
        ));
        InflightBuffer::map(&file, 0, bytes, 1, 8, Keeper::FrontEnd).unwrap();
        assert!(matches!(
            InflightBuffer::map(&file, 0, bytes, 1, 4, Keeper::FrontEnd),
            Err(InflightError::Foreign { queue: 0, version: 1, entries: 8 })
        ));
    }

    #[test]
    fn recovery_orders_by_counter_and_clears_the_entry_that_was_published() {
        let file = create(1, 8).unwrap();
        let buffer = Arc::new(
            InflightBuffer::map(&file, 0, buffer_bytes(1, 8), 1, 8, Keeper::FrontEnd).unwrap(),
        );
        let queue = InflightQueue::new(&buffer, 0, 8).unwrap();
        for (counter, head) in [(0, 5), (1, 2), (2, 7), (3, 0)] {
            queue.set(head, counter);
        }
        queue.before_publication(2);
        // Died before the used index moved: all four are under way.
        assert_eq!(queue.recover(0, 8), (vec![5, 2, 7, 0], 4));
        // Died after it moved.
        assert_eq!(queue.recover(1, 8), (vec![5, 7, 0], 4));
        assert_eq!(queue.recover(1, 8), (vec![5, 7, 0], 4));
        // A smaller ring than before has no such head.
        assert_eq!(queue.recover(1, 7), (vec![5, 0], 4));
    }
}
