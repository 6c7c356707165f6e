//! Ranges of a replica that read as zeroes because the log says so. They lie beneath the index's
//! entries: a discard removes the entries it covers, a later write adds entries above it.

use std::collections::BTreeMap;

/// Disjoint ranges, each with the seq of the record that made it.
#[derive(Default)]
pub(crate) struct Extents {
    /// start → (end, seq)
    ranges: BTreeMap<u64, (u64, u64)>,
}

impl Extents {
    pub(crate) fn clear(&mut self) {
        self.ranges.clear();
    }

    /// Cuts `start..end` out of all ranges with a seq of at most `through`.
    pub(crate) fn cut(&mut self, start: u64, end: u64, through: u64) {
        let mut from = self.ranges.range(..start).next_back().map_or(start, |(at, _)| *at);
        while let Some((&at, &(until, seq))) = self.ranges.range(from..end).next() {
            from = at + 1;
            if until <= start || seq > through {
                continue;
            }
            self.ranges.remove(&at);
            if at < start {
                self.ranges.insert(at, (start, seq));
            }
            if until > end {
                self.ranges.insert(end, (until, seq));
            }
        }
    }

    /// `start..end` reads as zeroes since `seq`, which is newer than all before.
    pub(crate) fn insert(&mut self, start: u64, end: u64, seq: u64) {
        self.cut(start, end, u64::MAX);
        self.ranges.insert(start, (end, seq));
    }

    /// The range that covers `block`: its end and seq.
    pub(crate) fn covering(&self, block: u64) -> Option<(u64, u64)> {
        let (_, &(end, seq)) = self.ranges.range(..=block).next_back()?;
        (block < end).then_some((end, seq))
    }

    /// The first range with a seq of at most `through` that ends after `from`: start, end.
    pub(crate) fn next_through(&self, from: u64, through: u64) -> Option<(u64, u64)> {
        let before = self.ranges.range(..=from).next_back().filter(|(_, (end, _))| *end > from);
        before
            .into_iter()
            .chain(self.ranges.range(from.checked_add(1)?..))
            .find(|(_, (_, seq))| *seq <= through)
            .map(|(start, (end, _))| ((*start).max(from), *end))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[allow(clippy::cast_possible_truncation)]
    fn behaves_like_an_array() {
        for seed in 1..60_u64 {
            let mut state = seed;
            let mut next = move |bound: u64| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state % bound
            };
            let mut extents = Extents::default();
            let mut model = [0_u64; 64];
            for seq in 1..200 {
                let start = next(60);
                let end = start + 1 + next(64 - start);
                let range = start as usize..end as usize;
                if next(3) == 0 {
                    let through = next(seq);
                    extents.cut(start, end, through);
                    for cell in &mut model[range] {
                        *cell = if *cell <= through { 0 } else { *cell };
                    }
                } else {
                    extents.insert(start, end, seq);
                    model[range].fill(seq);
                }
                for (block, cell) in (0_u64..).zip(&model) {
                    let found = extents.covering(block).map_or(0, |(_, seq)| seq);
                    assert_eq!(found, *cell, "seed {seed}, seq {seq}, block {block}");
                }
                let through = next(seq + 1);
                let from = next(64);
                let expected = (from..64).find(|at| (1..=through).contains(&model[*at as usize]));
                assert_eq!(extents.next_through(from, through).map(|(at, _)| at), expected);
            }
        }
    }
}
