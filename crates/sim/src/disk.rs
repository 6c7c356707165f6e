//! A disk, page by page, with a volatile write cache.

use std::collections::BTreeMap;

use base::limits::PAGE_BYTES;

use crate::random::Random;

type Page = Box<[u8; PAGE_BYTES]>;

/// A simulated disk. What was written and not synced survives a power cut page by page or not.
#[derive(Debug, Default)]
pub struct Disk {
    media: BTreeMap<u64, Page>,
    /// Unsynced versions of a page, oldest first.
    cache: BTreeMap<u64, Vec<Page>>,
}

fn page_of(offset: u64) -> u64 {
    assert!(offset.is_multiple_of(PAGE_BYTES as u64), "whole pages");
    offset / PAGE_BYTES as u64
}

impl Disk {
    /// Reads what was last written, synced or not.
    pub fn read(&self, offset: u64, out: &mut [u8]) {
        for (page, chunk) in (page_of(offset)..).zip(out.chunks_exact_mut(PAGE_BYTES)) {
            let newest = self.cache.get(&page).and_then(|versions| versions.last());
            match newest.or_else(|| self.media.get(&page)) {
                Some(bytes) => chunk.copy_from_slice(&bytes[..]),
                None => chunk.fill(0),
            }
        }
    }

    /// Writes into the cache.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) {
        for (page, chunk) in (page_of(offset)..).zip(bytes.chunks_exact(PAGE_BYTES)) {
            let chunk: &[u8; PAGE_BYTES] = chunk.try_into().expect("chunks are pages");
            self.cache.entry(page).or_default().push(Box::new(*chunk));
        }
    }

    /// Puts the cache on media.
    pub fn sync(&mut self) {
        for (page, mut versions) in std::mem::take(&mut self.cache) {
            self.media.insert(page, versions.pop().expect("a cached page has a version"));
        }
    }

    /// The power goes: of each unsynced page any version, or none, has reached media.
    pub fn power_cut(&mut self, random: &mut Random) {
        for (page, mut versions) in std::mem::take(&mut self.cache) {
            let survivor = random.index(versions.len() + 1);
            if survivor < versions.len() {
                self.media.insert(page, versions.swap_remove(survivor));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_synced_pages_are_sure_to_survive() {
        let (mut lost, mut kept) = (0, 0);
        for seed in 0..64 {
            let mut random = Random::new(seed);
            let mut disk = Disk::default();
            disk.write(0, &[1; PAGE_BYTES]);
            disk.sync();
            disk.write(0, &[2; PAGE_BYTES]);
            disk.write(PAGE_BYTES as u64, &[3; PAGE_BYTES]);
            let mut bytes = [0; 2 * PAGE_BYTES];
            disk.read(0, &mut bytes);
            assert_eq!((bytes[0], bytes[PAGE_BYTES]), (2, 3));
            disk.power_cut(&mut random);
            disk.read(0, &mut bytes);
            assert!(bytes[0] == 1 || bytes[0] == 2);
            match bytes[PAGE_BYTES] {
                0 => lost += 1,
                3 => kept += 1,
                other => panic!("page holds {other}"),
            }
        }
        assert!(lost > 10 && kept > 10);
    }
}
