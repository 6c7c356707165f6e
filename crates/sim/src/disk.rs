//! A disk, page by page, with a volatile write cache and faults of its own.

use core::ops::Range;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

use base::limits::PAGE_BYTES;
use base::{Instant, Seq};
use store::DiskError;

use self::pages::Page;
use crate::random::Random;

mod pages;

const SECTOR_BYTES: usize = 512;

/// Pages that a disk knows to have been written just now: a fault there strikes what is in use.
const RECENT_PAGES: usize = 64;

/// What the next write of a disk does instead of what it says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteFault {
    /// Nothing, but says it did.
    Lost,
    /// Lands so many pages further.
    Misdirected(u64),
}

/// A simulated disk. What was written and not synced survives a power cut sector by sector or not.
#[derive(Debug, Default)]
pub struct Disk {
    /// What reads see; absent pages are zero.
    pages: Vec<Option<Page>>,
    /// What unsynced writes replaced, oldest first.
    replaced: Vec<(u64, Option<Page>)>,
    /// The pages that were written last.
    recent: VecDeque<u64>,
    /// The pages that were written since somebody began to watch.
    watched: Option<Vec<u64>>,
    /// Pages that cannot be read until they are written.
    bad: BTreeSet<u64>,
    /// Reads that fail before the next good one.
    pub(crate) read_errors: u64,
    /// Bytes whose reads do not fail in that way.
    pub(crate) spared: Range<u64>,
    pub(crate) write_fault: Option<WriteFault>,
    /// The next sync fails, and what it should have put on media may be gone after a restart.
    pub(crate) sync_fails: bool,
    condemned: bool,
    /// Syncs are said to be done and are not, until then.
    pub(crate) lies_until: Instant,
    /// Something was said to be on media that is not.
    pub(crate) lied: bool,
    /// Operations take this many times longer before [`Disk::slow_until`].
    pub(crate) slowness: u64,
    pub(crate) slow_until: Instant,
    /// Nothing is answered before.
    pub(crate) hangs_until: Instant,
    /// No sync is answered before; reads and writes are.
    pub(crate) syncs_hang_until: Instant,
}

fn page_of(offset: u64) -> u64 {
    assert!(offset.is_multiple_of(PAGE_BYTES as u64), "whole pages");
    offset / PAGE_BYTES as u64
}

fn index(page: u64) -> usize {
    usize::try_from(page).expect("a small disk")
}

impl Disk {
    /// Reads what was last written, synced or not.
    pub fn read(&mut self, offset: u64, out: &mut [u8]) -> Result<(), DiskError> {
        let end = offset + out.len() as u64;
        let is_spared = offset < self.spared.end && self.spared.start < end;
        if self.read_errors > 0 && !is_spared {
            self.read_errors -= 1;
            return Err(DiskError::Io);
        }
        let first = page_of(offset);
        let pages = first..first + (out.len() / PAGE_BYTES) as u64;
        if !self.bad.is_empty() && self.bad.range(pages).next().is_some() {
            return Err(DiskError::Io);
        }
        for (page, chunk) in (first..).zip(out.as_chunks_mut::<PAGE_BYTES>().0) {
            match self.pages.get(index(page)).and_then(Option::as_ref) {
                Some(held) => held.copy_to(chunk),
                None => chunk.fill(0),
            }
        }
        Ok(())
    }

    /// Writes into the cache.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) {
        let shift = match self.write_fault.take() {
            None => 0,
            Some(WriteFault::Lost) => return,
            Some(WriteFault::Misdirected(pages)) => pages,
        };
        for (page, chunk) in (page_of(offset) + shift..).zip(bytes.as_chunks::<PAGE_BYTES>().0) {
            let fresh = pages::holding(chunk);
            if !self.bad.is_empty() {
                self.bad.remove(&page);
            }
            let at = index(page);
            if at >= self.pages.len() {
                self.pages.resize_with((at + 1).next_power_of_two(), || None);
            }
            self.replaced.push((page, self.pages[at].replace(fresh)));
            if self.recent.len() == RECENT_PAGES {
                self.recent.pop_front();
            }
            self.recent.push_back(page);
            if let Some(watched) = &mut self.watched {
                watched.push(page);
            }
        }
    }

    /// Puts the cache on media.
    pub fn sync(&mut self, now: Instant) -> Result<(), DiskError> {
        if now < self.lies_until {
            self.lied = true;
            return Ok(());
        }
        if std::mem::take(&mut self.sync_fails) {
            self.condemned = true;
            return Err(DiskError::Io);
        }
        self.lied = false;
        pages::give_back(self.replaced.drain(..).filter_map(|(_, page)| page));
        Ok(())
    }

    /// The process that used it is gone. A disk that failed a sync has dropped what it liked.
    /// True if it has.
    pub(crate) fn process_died(&mut self, random: &mut Random) -> bool {
        let condemned = std::mem::take(&mut self.condemned);
        if condemned {
            self.power_cut(random);
        }
        condemned
    }

    /// The power goes: of each unsynced page any version, or a mix of the sectors of two, has
    /// reached media.
    pub fn power_cut(&mut self, random: &mut Random) {
        let mut versions: BTreeMap<u64, Vec<Option<Page>>> = BTreeMap::new();
        for (page, old) in self.replaced.drain(..) {
            versions.entry(page).or_default().push(old);
        }
        for (page, mut versions) in versions {
            let current = &mut self.pages[index(page)];
            versions.push(current.take());
            let one = random.index(versions.len());
            let other = if random.one_in(4) { random.index(versions.len()) } else { one };
            *current = if one == other {
                versions.swap_remove(one)
            } else {
                Some(torn(versions[one].as_ref(), versions[other].as_ref(), random))
            };
        }
        self.sync_fails = false;
        self.lied = false;
    }

    /// Some written page that `number` stands for, half the time one that was written just now.
    pub(crate) fn some_page(&self, number: u64) -> Option<u64> {
        let start = number / 2;
        if number.is_multiple_of(2) && !self.recent.is_empty() {
            let at = start % self.recent.len() as u64;
            return self.recent.get(index(at)).copied();
        }
        let count = self.pages.len() as u64;
        (0..count)
            .map(|step| (start % count + step) % count)
            .find(|page| self.pages[index(*page)].is_some())
    }

    /// Notes which pages are written from now on.
    pub(crate) fn watch(&mut self) {
        self.watched = Some(Vec::new());
    }

    /// The batches that begin on pages that were written since; nobody watches any more.
    pub(crate) fn watched(&mut self) -> Vec<(u64, store::BatchFacts)> {
        let watched = self.watched.take().unwrap_or_default();
        let batch = |page: u64| Some((page, facts(self.pages[index(page)].as_ref()?)?));
        watched.into_iter().filter_map(batch).collect()
    }

    /// What the page holds is on media.
    pub(crate) fn is_synced(&self, page: u64) -> bool {
        self.replaced.iter().all(|(at, _)| *at != page)
    }

    /// The batches of a log that begin on it and are whole.
    pub(crate) fn batches(&self) -> Vec<store::BatchFacts> {
        self.pages.iter().flatten().filter_map(facts).collect()
    }

    /// The page is of a batch at the end of a log, and neither another batch nor what is `noted` elsewhere
    /// says that this one was ever on media.
    pub(crate) fn is_unvouched(&self, page: u64, noted: Seq) -> bool {
        let pages = self.pages.iter().enumerate();
        let batches = pages.filter_map(|(at, page)| Some((at as u64, facts(page.as_ref()?)?)));
        let batches: Vec<(u64, store::BatchFacts)> = batches.collect();
        let vouched = batches.iter().map(|(_, batch)| batch.durable).fold(noted, Seq::max);
        batches.iter().any(|(at, batch)| {
            (*at..*at + u64::from(batch.pages)).contains(&page) && batch.last > vouched
        })
    }

    /// Flips a bit on media.
    pub(crate) fn rot(&mut self, page: u64, bit: usize) {
        if let Some(held) = self.pages[index(page)].as_mut() {
            held.flip(bit / 8 % PAGE_BYTES, 1 << (bit % 8));
        }
    }

    /// A page cannot be read until it is written.
    pub(crate) fn make_bad(&mut self, page: u64) {
        self.bad.insert(page);
    }

    /// No fault strikes any more; damage done stays.
    pub(crate) fn heal(&mut self) {
        self.watched = None;
        self.read_errors = 0;
        self.write_fault = None;
        self.sync_fails = false;
        self.lies_until = Instant::ZERO;
        self.slow_until = Instant::ZERO;
        self.hangs_until = Instant::ZERO;
        self.syncs_hang_until = Instant::ZERO;
    }

    /// How long an operation begun at `now` takes that would take `nanos` on a good day.
    pub(crate) fn delay(&self, now: Instant, nanos: u64, is_sync: bool) -> u64 {
        let nanos = if now < self.slow_until { nanos * self.slowness } else { nanos };
        let syncs = if is_sync { self.syncs_hang_until } else { Instant::ZERO };
        let hang = self.hangs_until.max(syncs).since(now);
        nanos + u64::try_from(hang.as_nanos()).expect("disks hang for seconds")
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let replaced = self.replaced.drain(..).map(|(_, page)| page);
        pages::give_back(self.pages.drain(..).chain(replaced).flatten());
    }
}

/// A page of which some sectors are of one version, the rest of another.
fn torn(one: Option<&Page>, other: Option<&Page>, random: &mut Random) -> Page {
    let [mut page, from] = [one, other].map(|version| {
        let mut bytes = [0; PAGE_BYTES];
        if let Some(version) = version {
            version.copy_to(&mut bytes);
        }
        bytes
    });
    for start in (0..PAGE_BYTES).step_by(SECTOR_BYTES) {
        if random.one_in(2) {
            let sector = start..start + SECTOR_BYTES;
            page[sector.clone()].copy_from_slice(&from[sector]);
        }
    }
    pages::holding(&page)
}

/// The batch of a log that begins with a page, if it is whole.
fn facts(page: &Page) -> Option<store::BatchFacts> {
    let mut bytes = [0; PAGE_BYTES];
    page.may_be_structure().then(|| page.copy_to(&mut bytes))?;
    store::batch_facts(&bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_synced_pages_are_sure_to_survive() {
        let (mut lost, mut kept, mut torn) = (0, 0, 0);
        for seed in 0..128 {
            let mut random = Random::new(seed);
            let mut disk = Disk::default();
            disk.write(0, &[1; PAGE_BYTES]);
            disk.sync(Instant::ZERO).unwrap();
            disk.write(0, &[2; PAGE_BYTES]);
            disk.write(PAGE_BYTES as u64, &[3; PAGE_BYTES]);
            let mut bytes = [0; 2 * PAGE_BYTES];
            disk.read(0, &mut bytes).unwrap();
            assert_eq!((bytes[0], bytes[PAGE_BYTES]), (2, 3));
            disk.power_cut(&mut random);
            disk.read(0, &mut bytes).unwrap();
            assert!(bytes[..PAGE_BYTES].iter().all(|byte| *byte == 1 || *byte == 2));
            let second = &bytes[PAGE_BYTES..];
            assert!(second.iter().all(|byte| *byte == 0 || *byte == 3));
            match (second.contains(&0), second.contains(&3)) {
                (true, true) => torn += 1,
                (true, false) => lost += 1,
                (false, _) => kept += 1,
            }
        }
        assert!(lost > 10 && kept > 10 && torn > 5, "{lost} {kept} {torn}");
    }

    #[test]
    fn disks_that_hold_the_same_do_not_share_their_faults() {
        let (mut one, mut other) = (Disk::default(), Disk::default());
        let bytes = [7; PAGE_BYTES];
        for disk in [&mut one, &mut other] {
            disk.write(0, &bytes);
            disk.write(PAGE_BYTES as u64, &bytes);
            disk.sync(Instant::ZERO).unwrap();
        }
        one.rot(0, 9);
        let mut read = [0; 2 * PAGE_BYTES];
        other.read(0, &mut read).unwrap();
        assert!(read.iter().all(|byte| *byte == 7));
        one.read(0, &mut read).unwrap();
        assert_eq!((read[1], &read[2..]), (5, &[7; 2 * PAGE_BYTES - 2][..]));
        // What comes next is not what rotted, nor is it written over what others hold.
        one.write(0, &[8; PAGE_BYTES]);
        one.sync(Instant::ZERO).unwrap();
        one.write(0, &[9; PAGE_BYTES]);
        other.read(0, &mut read).unwrap();
        assert!(read.iter().all(|byte| *byte == 7));
        // A page that ends in zeroes rots anywhere, too, and for nobody else.
        let mut head = [0; PAGE_BYTES];
        head[..9].copy_from_slice(b"beginning");
        for disk in [&mut one, &mut other] {
            disk.write(PAGE_BYTES as u64, &head);
        }
        one.rot(1, 8 * PAGE_BYTES - 1);
        other.read(PAGE_BYTES as u64, &mut read[..PAGE_BYTES]).unwrap();
        assert_eq!(read[..PAGE_BYTES], head);
        one.read(PAGE_BYTES as u64, &mut read[..PAGE_BYTES]).unwrap();
        assert_eq!((&read[..9], read[PAGE_BYTES - 1]), (&head[..9], 1 << 7));
    }

    #[test]
    fn a_bad_page_is_good_again_when_it_is_written() {
        let mut disk = Disk::default();
        disk.write(0, &[1; 2 * PAGE_BYTES]);
        disk.make_bad(1);
        let mut bytes = [0; 2 * PAGE_BYTES];
        assert_eq!(disk.read(0, &mut bytes), Err(DiskError::Io));
        assert_eq!(disk.read(0, &mut bytes[..PAGE_BYTES]), Ok(()));
        disk.write(PAGE_BYTES as u64, &[2; PAGE_BYTES]);
        assert_eq!(disk.read(0, &mut bytes), Ok(()));
        assert_eq!(bytes[PAGE_BYTES], 2);
    }
}
