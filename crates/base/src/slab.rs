//! A preallocated table of things under way, named by tags that do not repeat soon.

/// Holds up to a fixed number of `T`. A tag is (generation, index), so that a late or forged
/// answer with an old tag finds nothing instead of somebody else's entry.
#[derive(Debug)]
pub struct Slab<T> {
    slots: Vec<Slot<T>>,
    free: Vec<u32>,
}

#[derive(Debug)]
struct Slot<T> {
    generation: u32,
    value: Option<T>,
}

impl<T> Slab<T> {
    /// A slab for `capacity` entries; all memory is allocated here.
    pub fn with_capacity(capacity: u32) -> Self {
        Self {
            slots: (0..capacity).map(|_| Slot { generation: 0, value: None }).collect(),
            free: (0..capacity).rev().collect(),
        }
    }

    /// Puts `value` in and gives its tag; gives `value` back while the slab is full.
    pub fn insert(&mut self, value: T) -> Result<u64, T> {
        let Some(index) = self.free.pop() else {
            return Err(value);
        };
        let slot = &mut self.slots[index as usize];
        slot.value = Some(value);
        Ok(u64::from(slot.generation) << 32 | u64::from(index))
    }

    /// As [`Slab::insert`], but doubles a full slab: for tables whose bound is somebody else's and
    /// that settle at a size.
    pub fn insert_or_grow(&mut self, value: T) -> u64 {
        if self.free.is_empty() {
            let old = u32::try_from(self.slots.len()).expect("fewer than 2^32 entries");
            let new = old.checked_mul(2).expect("fewer than 2^32 entries").max(16);
            self.slots.extend((old..new).map(|_| Slot { generation: 0, value: None }));
            self.free.extend((old..new).rev());
        }
        let Ok(tag) = self.insert(value) else { unreachable!("a slab that has grown has room") };
        tag
    }

    fn slot_mut(&mut self, tag: u64) -> Option<&mut Slot<T>> {
        let (generation, index) = split(tag);
        self.slots.get_mut(index).filter(|slot| slot.generation == generation)
    }

    /// The entry of `tag`, if it is still there.
    pub fn get(&self, tag: u64) -> Option<&T> {
        let (generation, index) = split(tag);
        let slot = self.slots.get(index).filter(|slot| slot.generation == generation)?;
        slot.value.as_ref()
    }

    /// The entry of `tag`, if it is still there.
    pub fn get_mut(&mut self, tag: u64) -> Option<&mut T> {
        self.slot_mut(tag)?.value.as_mut()
    }

    /// Takes the entry of `tag` out, if it is still there. The tag is dead afterwards.
    pub fn remove(&mut self, tag: u64) -> Option<T> {
        let slot = self.slot_mut(tag)?;
        let value = slot.value.take()?;
        slot.generation = slot.generation.wrapping_add(1);
        self.free.push(u32::try_from(split(tag).1).expect("an index is below a u32 capacity"));
        Some(value)
    }

    /// Entries in the slab.
    pub fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// True if [`Slab::insert`] would give its value back.
    pub fn is_full(&self) -> bool {
        self.free.is_empty()
    }

    /// All entries with their tags, by index.
    pub fn iter(&self) -> impl Iterator<Item = (u64, &T)> {
        self.slots.iter().enumerate().filter_map(|(index, slot)| {
            let tag = u64::from(slot.generation) << 32 | index as u64;
            slot.value.as_ref().map(|value| (tag, value))
        })
    }
}

const fn split(tag: u64) -> (u32, usize) {
    ((tag >> 32) as u32, (tag & 0xffff_ffff) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_die_with_their_entries() {
        let mut slab = Slab::with_capacity(2);
        let a = slab.insert('a').unwrap();
        let b = slab.insert('b').unwrap();
        assert_eq!(slab.insert('c'), Err('c'));
        assert_eq!(slab.remove(a), Some('a'));
        assert_eq!(slab.remove(a), None);
        let c = slab.insert('c').unwrap();
        assert_ne!(a, c);
        assert_eq!(slab.get(a), None);
        assert_eq!(slab.iter().map(|(_, value)| *value).collect::<String>(), "cb");
        assert_eq!(slab.get(b), Some(&'b'));
        assert_eq!(slab.len(), 2);
        assert_eq!(slab.get(u64::MAX), None);
        let d = slab.insert_or_grow('d');
        assert_eq!((slab.get(d), slab.get(b), slab.len()), (Some(&'d'), Some(&'b'), 3));
    }
}
