//! Blocks of this server's replicas that a scrub could not read and that nobody has written again yet.
//!
//! The head that commands a replica is told, and writes them again; a replica that nobody commands
//! keeps them in mind until somebody does. What a record is written over is no longer damaged, and what a
//! whole round of the scrub did not find again neither: a scrub tells what it has found a little later, and it may have
//! been mended in between. Nothing of this is on media: after a restart the scrub finds it again.

use std::collections::BTreeMap;

use base::{BlockCount, Lba, ReplicaKey};

/// Ranges that are kept in mind for one replica; what is beyond is found by the next round of the scrub.
const RANGES_MAX: usize = 1024;
/// Ranges that a head is told before it has written some of them: it has room for these, and so has
/// the log page that they travel in.
const TOLD_MAX: usize = 16;

/// Damaged blocks by replica.
#[derive(Debug, Default)]
pub(crate) struct Damage {
    replicas: BTreeMap<ReplicaKey, Vec<Range>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Range {
    start: u64,
    end: u64,
    /// The scrub's round that found it last.
    round: u64,
    /// The head that commands the replica knows.
    told: bool,
}

impl Damage {
    /// True if there is none: the usual case.
    pub(crate) fn is_empty(&self) -> bool {
        self.replicas.is_empty()
    }

    /// A scrub has found blocks in its `round`. Those that were found before are told again: who was told
    /// has not helped.
    pub(crate) fn found(&mut self, key: ReplicaKey, lba: Lba, blocks: BlockCount, round: u64) {
        self.written(key, lba, blocks);
        let end = lba.0.saturating_add(u64::from(blocks.0));
        let ranges = self.replicas.entry(key).or_default();
        if ranges.len() < RANGES_MAX && end > lba.0 {
            ranges.push(Range { start: lba.0, end, round, told: false });
        }
        self.replicas.retain(|_, ranges| !ranges.is_empty());
    }

    /// Blocks have been written.
    pub(crate) fn written(&mut self, key: ReplicaKey, lba: Lba, blocks: BlockCount) {
        let Some(ranges) = self.replicas.get_mut(&key) else { return };
        let (start, end) = (lba.0, lba.0.saturating_add(u64::from(blocks.0)));
        for index in (0..ranges.len()).rev() {
            let old = ranges[index];
            if old.end <= start || end <= old.start {
                continue;
            }
            ranges.swap_remove(index);
            let before = Range { end: start, ..old };
            let after = Range { start: end, ..old };
            ranges.extend([before, after].into_iter().filter(|left| left.start < left.end));
        }
        ranges.truncate(RANGES_MAX);
        if ranges.is_empty() {
            self.replicas.remove(&key);
        }
    }

    /// The replica is no more, or is filled anew.
    pub(crate) fn forget(&mut self, key: ReplicaKey) {
        self.replicas.remove(&key);
    }

    /// Another session commands the replica: it knows nothing yet.
    pub(crate) fn nobody_knows(&mut self, key: ReplicaKey) {
        for range in self.replicas.get_mut(&key).into_iter().flatten() {
            range.told = false;
        }
    }

    /// The next range to tell the head that commands the replica, while the scrub is in its `round`.
    pub(crate) fn tell(&mut self, key: ReplicaKey, round: u64) -> Option<(Lba, BlockCount)> {
        let ranges = self.replicas.get_mut(&key)?;
        ranges.retain(|range| range.holds(round));
        if ranges.is_empty() {
            self.replicas.remove(&key);
            return None;
        }
        if ranges.iter().filter(|range| range.told).count() >= TOLD_MAX {
            return None;
        }
        let range = ranges.iter_mut().find(|range| !range.told)?;
        range.told = true;
        let blocks = u32::try_from(range.end - range.start).unwrap_or(u32::MAX);
        Some((Lba(range.start), BlockCount(blocks)))
    }

    /// Blocks of a replica that are damaged, while the scrub is in its `round`.
    pub(crate) fn blocks(&self, key: ReplicaKey, round: u64) -> u64 {
        let ranges = self.replicas.get(&key).into_iter().flatten();
        ranges.filter(|range| range.holds(round)).map(|range| range.end - range.start).sum()
    }
}

impl Range {
    /// True unless a whole round has not found it again.
    fn holds(&self, round: u64) -> bool {
        self.round + 1 >= round
    }
}

#[cfg(test)]
mod tests {
    use base::{ShardIndex, VolumeId};

    use super::*;

    const KEY: ReplicaKey =
        ReplicaKey { volume: VolumeId::from_bytes([1; 16]), shard: ShardIndex(0) };

    #[test]
    fn what_is_written_is_no_longer_damaged() {
        let mut damage = Damage::default();
        damage.found(KEY, Lba(10), BlockCount(10), 1);
        damage.found(KEY, Lba(12), BlockCount(4), 1);
        assert_eq!(damage.blocks(KEY, 1), 10, "found again");
        damage.written(KEY, Lba(14), BlockCount(2));
        assert_eq!(damage.blocks(KEY, 1), 8, "around it");
        damage.written(KEY, Lba(0), BlockCount(10));
        damage.written(KEY, Lba(20), BlockCount(1));
        assert_eq!(damage.blocks(KEY, 1), 8, "beside it");
        damage.written(KEY, Lba(u64::MAX), BlockCount(u32::MAX));
        damage.written(KEY, Lba(0), BlockCount(u32::MAX));
        assert!(damage.is_empty());
        damage.found(KEY, Lba(7), BlockCount(0), 1);
        assert!(damage.is_empty(), "no blocks");
    }

    #[test]
    fn a_head_is_told_as_much_as_it_can_work_on_and_its_successor_from_the_beginning() {
        let mut damage = Damage::default();
        for number in 0..40 {
            damage.found(KEY, Lba(number * 10), BlockCount(1), 1);
        }
        let told = |damage: &mut Damage| std::iter::from_fn(|| damage.tell(KEY, 1)).count();
        assert_eq!((told(&mut damage), told(&mut damage)), (TOLD_MAX, 0));
        damage.written(KEY, Lba(0), BlockCount(1));
        assert_eq!(told(&mut damage), 1);
        damage.nobody_knows(KEY);
        assert_eq!(told(&mut damage), TOLD_MAX);
        damage.forget(KEY);
        assert_eq!((told(&mut damage), damage.blocks(KEY, 1)), (0, 0));
    }

    #[test]
    fn what_is_not_found_again_is_whole() {
        let mut damage = Damage::default();
        damage.found(KEY, Lba(0), BlockCount(1), 1);
        damage.found(KEY, Lba(9), BlockCount(1), 1);
        damage.found(KEY, Lba(9), BlockCount(1), 2);
        assert_eq!((damage.blocks(KEY, 2), damage.blocks(KEY, 3)), (2, 1));
        assert_eq!(damage.tell(KEY, 3), Some((Lba(9), BlockCount(1))));
        assert_eq!((damage.tell(KEY, 4), damage.is_empty()), (None, true));
    }

    #[test]
    fn a_disk_that_rots_everywhere_costs_bounded_memory() {
        let mut damage = Damage::default();
        for number in 0..4096 {
            damage.found(KEY, Lba(number * 10), BlockCount(4), 1);
        }
        assert_eq!(damage.blocks(KEY, 1), 4 * RANGES_MAX as u64);
        for number in 0..4096 {
            damage.written(KEY, Lba(number * 10 + 1), BlockCount(1));
        }
        assert!(damage.replicas[&KEY].len() <= RANGES_MAX);
    }
}
