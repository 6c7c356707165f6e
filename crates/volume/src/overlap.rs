//! Which is the newest record that touches a range? Answered from two small tables of
//! seqs by address granule, so that neither a write nor a read pays for what else is in flight.
//! Different granules share a slot, so the answer may be too new, never too old: a read may
//! then be held for, or demand, a record that it does not need.

use base::limits::PAYLOAD_BYTES_MAX;
use base::{BlockCount, BlockSize, Lba, Seq};

/// log2 of the bytes of a fine granule: 4 KiB.
const FINE_LOG2: u32 = 12;
/// log2 of the bytes of a coarse granule: 32 MiB.
const COARSE_LOG2: u32 = 25;
const FINE_SLOTS: usize = 2048;
const COARSE_SLOTS: usize = 256;
/// A range of more fine granules than this is noted in the coarse table.
const FINE_GRANULES_MAX: u64 = 64;

const _: () = assert!((PAYLOAD_BYTES_MAX as u64 >> FINE_LOG2) < FINE_GRANULES_MAX);
const _: () = assert!(FINE_SLOTS.is_power_of_two() && COARSE_SLOTS.is_power_of_two());

/// The newest record by address.
#[derive(Debug)]
pub(crate) struct Newest {
    fine: Box<[Seq]>,
    coarse: Box<[Seq]>,
    block_log2: u32,
}

impl Newest {
    pub(crate) fn new(block_size: BlockSize) -> Self {
        Self {
            fine: vec![Seq::ZERO; FINE_SLOTS].into_boxed_slice(),
            coarse: vec![Seq::ZERO; COARSE_SLOTS].into_boxed_slice(),
            block_log2: u32::from(block_size.log2()),
        }
    }

    /// Notes that record `seq` touches the range. Seqs grow.
    pub(crate) fn note(&mut self, lba: Lba, blocks: BlockCount, seq: Seq) {
        let (first, last) = self.granules(lba, blocks, FINE_LOG2);
        if last - first < FINE_GRANULES_MAX {
            for granule in first..=last {
                self.fine[slot(granule, FINE_SLOTS)] = seq;
            }
        } else {
            let (first, last) = self.granules(lba, blocks, COARSE_LOG2);
            for granule in first..=last.min(first + COARSE_SLOTS as u64 - 1) {
                self.coarse[slot(granule, COARSE_SLOTS)] = seq;
            }
        }
    }

    /// A seq at or above that of the newest noted record that touches the range.
    pub(crate) fn touching(&self, lba: Lba, blocks: BlockCount) -> Seq {
        let (first, last) = self.granules(lba, blocks, COARSE_LOG2);
        let mut newest = Seq::ZERO;
        for granule in first..=last.min(first + COARSE_SLOTS as u64 - 1) {
            newest = newest.max(self.coarse[slot(granule, COARSE_SLOTS)]);
        }
        let (first, last) = self.granules(lba, blocks, FINE_LOG2);
        for granule in first..=last.min(first + FINE_SLOTS as u64 - 1) {
            newest = newest.max(self.fine[slot(granule, FINE_SLOTS)]);
        }
        newest
    }

    fn granules(&self, lba: Lba, blocks: BlockCount, granule_log2: u32) -> (u64, u64) {
        debug_assert!(blocks.0 > 0, "a range has blocks");
        let shift = granule_log2 - self.block_log2;
        let last = lba.0.saturating_add(u64::from(blocks.0)).saturating_sub(1);
        (lba.0 >> shift, last >> shift)
    }
}

fn slot(granule: u64, slots: usize) -> usize {
    usize::try_from(granule & (slots as u64 - 1)).expect("masked to the table's size")
}

#[cfg(test)]
mod tests {
    use super::*;
    use base::units::overlaps;

    #[test]
    fn never_older_than_the_newest_overlapping_record() {
        let mut state = 1_u64;
        let mut random = move |below: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) % below
        };
        for block_size in [BlockSize::B512, BlockSize::B4096] {
            let mut newest = Newest::new(block_size);
            let mut all: Vec<(Lba, BlockCount, Seq)> = Vec::new();
            let mut exact = 0;
            for seq in 1..3000 {
                let longest = [8, 256, 65_536][usize::try_from(random(3)).unwrap()];
                let lba = Lba(random(1 << 26));
                let blocks = BlockCount(u32::try_from(1 + random(longest)).unwrap());
                let truth = all
                    .iter()
                    .filter(|(l, b, _)| overlaps(*l, *b, lba, blocks))
                    .map(|(_, _, seq)| *seq)
                    .max()
                    .unwrap_or(Seq::ZERO);
                let answer = newest.touching(lba, blocks);
                assert!(answer >= truth);
                exact += u32::from(answer == truth);
                newest.note(lba, blocks, Seq(seq));
                all.push((lba, blocks, Seq(seq)));
            }
            assert!(exact > 0);
        }
    }

    #[test]
    fn neighbours_do_not_disturb_each_other() {
        let mut newest = Newest::new(BlockSize::B4096);
        newest.note(Lba(10), BlockCount(1), Seq(5));
        assert_eq!(newest.touching(Lba(11), BlockCount(32)), Seq::ZERO);
        assert_eq!(newest.touching(Lba(9), BlockCount(2)), Seq(5));
    }
}
