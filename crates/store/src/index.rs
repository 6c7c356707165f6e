//! The index: which volume block is where in the log.
//!
//! One preallocated open-addressing table for the whole pool, 16 bytes a slot, never more than
//! two thirds full, so at most 24 bytes for each page of log. The hash keeps groups of
//! neighbouring blocks together, so that a sequential run touches few cache lines. A removal
//! shifts later entries back: no tombstones, no rebuilding.

/// Blocks that lie next to each other in the table.
const GROUP: u64 = 16;
/// Bits of a block address within its replica.
const BLOCK_BITS: u32 = 40;
/// Set in every used slot, so that an empty one is all zeroes.
const USED: u64 = 1 << 63;

/// A place in the log: 512-byte sectors from the start of the first segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct LogSector(pub(crate) u32);

/// Where a block's newest data is, and its checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) sector: LogSector,
    pub(crate) crc: u32,
}

/// A key, and the entry's sector below its checksum. Words, because the memory of a vector of zeroed words comes
/// from the kernel as it is used: filling a table of many gigabytes of log would keep an opening.
type Slot = [u64; 2];

const EMPTY: Slot = [0; 2];

impl Entry {
    /// That of a slot.
    #[allow(clippy::cast_possible_truncation)] // Halves of a word.
    const fn of([_, place]: Slot) -> Self {
        Self { sector: LogSector(place as u32), crc: (place >> 32) as u32 }
    }

    fn under(self, key: u64) -> Slot {
        [key, u64::from(self.crc) << 32 | u64::from(self.sector.0)]
    }
}

/// The table.
pub(crate) struct Index {
    slots: Vec<Slot>,
    entries: usize,
    entries_max: usize,
}

fn key_of(replica: u16, block: u64) -> u64 {
    debug_assert!(block < 1 << BLOCK_BITS);
    USED | (u64::from(replica) << BLOCK_BITS) | block
}

impl Index {
    /// A table for `entries_max` blocks.
    pub(crate) fn new(entries_max: usize) -> Self {
        let slots = (entries_max + entries_max / 2).next_multiple_of(16) + 16;
        Self { slots: vec![EMPTY; slots], entries: 0, entries_max }
    }

    pub(crate) const fn entries(&self) -> usize {
        self.entries
    }

    pub(crate) const fn entries_max(&self) -> usize {
        self.entries_max
    }

    /// Slots of the table, used or not.
    pub(crate) const fn slots(&self) -> usize {
        self.slots.len()
    }

    /// The used entry in slot `at`: replica, block, entry.
    pub(crate) fn slot(&self, at: usize) -> Option<(u16, u64, Entry)> {
        let slot = self.slots[at];
        let [key, _] = slot;
        if key == 0 {
            return None;
        }
        let replica = u16::try_from((key >> BLOCK_BITS) & 0xffff).expect("masked to 16 bits");
        let block = key & ((1 << BLOCK_BITS) - 1);
        Some((replica, block, Entry::of(slot)))
    }

    fn home(&self, key: u64) -> usize {
        // Fibonacci hashing of the group with an extra xor-shift to spread high bits.
        let group = key / GROUP;
        let mixed = (group ^ (group >> 29)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let groups = self.slots.len() as u128 / u128::from(GROUP);
        let index = (u128::from(mixed) * groups) >> 64;
        usize::try_from(index).expect("a slot number") * 16
            + usize::try_from(key % GROUP).expect("less than a group")
    }

    fn next(&self, at: usize) -> usize {
        if at + 1 == self.slots.len() { 0 } else { at + 1 }
    }

    fn find(&self, key: u64) -> Result<usize, usize> {
        let mut at = self.home(key);
        loop {
            let [found, _] = self.slots[at];
            if found == key {
                return Ok(at);
            }
            if found == 0 {
                return Err(at);
            }
            at = self.next(at);
        }
    }

    pub(crate) fn lookup(&self, replica: u16, block: u64) -> Option<Entry> {
        let at = self.find(key_of(replica, block)).ok()?;
        Some(Entry::of(self.slots[at]))
    }

    /// Puts an entry in; gives the one it replaces.
    ///
    /// # Panics
    /// If the table is full: the caller keeps a budget.
    pub(crate) fn insert(&mut self, replica: u16, block: u64, entry: Entry) -> Option<Entry> {
        let key = key_of(replica, block);
        let new = entry.under(key);
        match self.find(key) {
            Ok(at) => {
                let old = core::mem::replace(&mut self.slots[at], new);
                Some(Entry::of(old))
            }
            Err(at) => {
                assert!(self.entries < self.entries_max, "the index budget holds");
                self.slots[at] = new;
                self.entries += 1;
                None
            }
        }
    }

    /// Takes an entry out.
    pub(crate) fn remove(&mut self, replica: u16, block: u64) -> Option<Entry> {
        let at = self.find(key_of(replica, block)).ok()?;
        Some(self.remove_slot(at))
    }

    fn remove_slot(&mut self, at: usize) -> Entry {
        let old = self.slots[at];
        self.entries -= 1;
        let mut hole = at;
        let mut probe = self.next(hole);
        while self.slots[probe] != EMPTY {
            let home = self.home(self.slots[probe][0]);
            // It may move back if its home is not cyclically in (hole, probe].
            let stays = if hole < probe {
                hole < home && home <= probe
            } else {
                hole < home || home <= probe
            };
            if !stays {
                self.slots[hole] = self.slots[probe];
                hole = probe;
            }
            probe = self.next(probe);
        }
        self.slots[hole] = EMPTY;
        Entry::of(old)
    }

    /// Takes out every entry of a replica, telling each sector to `gone`. Rare: walks the table.
    pub(crate) fn remove_replica(&mut self, replica: u16, mut gone: impl FnMut(LogSector)) {
        // A removal may shift entries back over the cursor's slot only from later slots, or
        // wrap around: a second round catches those.
        loop {
            let mut removed = false;
            let mut at = 0;
            while at < self.slots.len() {
                if self.slot(at).is_some_and(|(owner, ..)| owner == replica) {
                    gone(self.remove_slot(at).sector);
                    removed = true;
                } else {
                    at += 1;
                }
            }
            if !removed {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    #[allow(clippy::cast_possible_truncation)]
    fn behaves_like_a_map() {
        for seed in 1..40_u64 {
            let mut state = seed;
            let mut next = move || {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state
            };
            let mut index = Index::new(200);
            let mut model = BTreeMap::new();
            for _ in 0..4000 {
                let replica = u16::try_from(next() % 3).unwrap();
                let block = if seed % 2 == 0 { next() % 120 } else { (next() % 30) * 7919 };
                let entry =
                    Entry { sector: LogSector((next() >> 32) as u32), crc: (next() >> 32) as u32 };
                if next() % 3 == 0 || model.len() == 200 {
                    assert_eq!(index.remove(replica, block), model.remove(&(replica, block)));
                } else {
                    assert_eq!(
                        index.insert(replica, block, entry),
                        model.insert((replica, block), entry)
                    );
                }
                assert_eq!(index.entries(), model.len());
            }
            for ((replica, block), entry) in &model {
                assert_eq!(index.lookup(*replica, *block), Some(*entry), "seed {seed}");
            }
            index.remove_replica(1, |_| ());
            model.retain(|(replica, _), _| *replica != 1);
            assert_eq!(index.entries(), model.len());
            for ((replica, block), entry) in &model {
                assert_eq!(index.lookup(*replica, *block), Some(*entry), "seed {seed}");
            }
        }
    }
}
