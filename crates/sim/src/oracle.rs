//! What reads may return: a register for each block, in which unanswered writes are unknown.
//!
//! A value is the number of the write that made it; 0 is "never written, or discarded". Writes
//! are numbered in the order of their submission. A read may return what was settled at any time
//! between its submission and its answer, or an undecided write's value, which is settled by
//! that (I3: once seen, it never reverts). A write whose head is gone is decided by the first
//! read that is submitted later, whichever value it returns. A write of an earlier epoch comes before
//! every write of a later one, whenever it was submitted (I2, I5).
//!
//! A write that was acknowledged and not flushed is settled, but *volatile*: when some server has
//! lost power since, and another head opens before a flush, it may be gone, or not: it is undecided
//! again. What an opening leaves is on media, unless a disk lies: then a write of a head that is gone, which reads
//! have shown not to be there, may be back after a loss of power, since what decided so may be gone.

use std::collections::BTreeMap;

/// A point in the order of everything that the oracle was told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Stamp(u64);

#[derive(Clone, Copy, Debug)]
struct Undecided {
    value: u64,
    submitted: Stamp,
    /// Its head is gone since then.
    orphaned: Option<Stamp>,
}

/// A write that is settled and may not be on media.
#[derive(Clone, Copy, Debug)]
struct Volatile {
    order: Order,
    value: u64,
    submitted: Stamp,
    settled: Stamp,
}

/// Where a write is in the order of all that may land: its epoch, then its number.
type Order = (u64, u64);

/// How a read's value was explained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Explained {
    /// It was settled.
    Settled,
    /// A write was undecided and is settled by this.
    Decided,
    /// It was settled, and undecided writes of heads that are gone never landed.
    Dropped,
}

/// One block.
#[derive(Clone, Debug)]
struct Register {
    /// Values and since when they are settled, oldest first; never empty.
    settled: Vec<(Stamp, u64)>,
    undecided: BTreeMap<Order, Undecided>,
    /// Writes that are settled and may not be on media, in their order.
    volatile: Vec<Volatile>,
    /// What the block was before them, on media.
    kept: u64,
    /// Undecided writes that are known not to be there, on a liar's word.
    dropped: Vec<(Order, Undecided)>,
}

impl Register {
    /// A write is settled, and before it whatever comes earlier in the order: a read that is
    /// under way may have seen any of that.
    fn settle(&mut self, at: Stamp, write: Order, on_media: bool) {
        let later = self.undecided.split_off(&(write.0, write.1 + 1));
        let settled = std::mem::replace(&mut self.undecided, later);
        self.settled.extend(settled.values().map(|write| (at, write.value)));
        if on_media {
            self.keep_all();
        } else {
            self.volatile.extend(settled.iter().map(|(order, write)| Volatile {
                order: *order,
                value: write.value,
                submitted: write.submitted,
                settled: at,
            }));
        }
    }

    fn current(&self) -> u64 {
        self.settled.last().expect("never empty").1
    }

    /// Everything settled is on media.
    fn keep_all(&mut self) {
        self.kept = self.current();
        self.volatile.clear();
    }

    /// What was settled by then is on media.
    fn keep(&mut self, until: Stamp) {
        let count = self.volatile.partition_point(|write| write.settled <= until);
        if let Some(write) = self.volatile.drain(..count).next_back() {
            self.kept = write.value;
        }
    }

    /// Power was lost at `lost`, and a new head has opened: what was volatile then may be gone, even if its
    /// acknowledgement was late. Writes submitted later came after it in every log that has them, and the
    /// opening has put all of that on media, unless a disk that is `lying` says so.
    fn doubt(&mut self, at: Stamp, lost: Stamp, lying: bool) {
        let Some(last) = self.volatile.last() else { return };
        if last.submitted > lost {
            if !lying {
                self.keep_all();
            }
            return;
        }
        self.settled = vec![(Stamp(0), self.kept)];
        for Volatile { order, value, submitted, .. } in self.volatile.drain(..) {
            self.undecided.insert(order, Undecided { value, submitted, orphaned: Some(at) });
        }
    }

    /// The first settled value that a read submitted at `since` may return.
    fn first(&self, since: Stamp) -> usize {
        self.settled.partition_point(|(at, _)| *at <= since).saturating_sub(1)
    }
}

/// The whole disk as a guest may see it.
#[derive(Debug)]
pub struct Oracle {
    blocks: Vec<Register>,
    now: u64,
    checked: u64,
    /// When power was last lost, until a head has opened after it.
    lost: Option<Stamp>,
    /// The newest epoch in which a head has opened after power was lost.
    doubtful: u64,
    /// A disk lies: what is said to be on media may not be.
    lying: bool,
}

impl Oracle {
    /// A fresh disk of `blocks` blocks.
    pub fn new(blocks: usize) -> Self {
        let fresh = Register {
            settled: vec![(Stamp(0), 0)],
            undecided: BTreeMap::new(),
            volatile: Vec::new(),
            kept: 0,
            dropped: Vec::new(),
        };
        let blocks = vec![fresh; blocks];
        Self { blocks, now: 0, checked: 0, lost: None, doubtful: 0, lying: false }
    }

    /// Now, in the oracle's order: taken when a read is submitted.
    pub fn stamp(&mut self) -> Stamp {
        self.now += 1;
        Stamp(self.now)
    }

    /// Write `number` of `value` was submitted to the head of `epoch`.
    pub fn submitted(&mut self, block: usize, epoch: u64, number: u64, value: u64) {
        let submitted = self.stamp();
        let undecided = Undecided { value, submitted, orphaned: None };
        self.blocks[block].undecided.insert((epoch, number), undecided);
    }

    /// Write `number` of `epoch` was acknowledged; it is to be on media by now if `on_media`.
    pub fn acknowledged(&mut self, block: usize, epoch: u64, number: u64, on_media: bool) {
        let at = self.stamp();
        let on_media = on_media && !self.lying;
        // An answer that was late: a newer head has found it or not.
        if epoch < self.doubtful && !on_media {
            return;
        }
        let register = &mut self.blocks[block];
        if register.undecided.contains_key(&(epoch, number)) {
            register.settle(at, (epoch, number), on_media);
        }
    }

    /// A flush submitted at `since` was answered.
    pub fn flushed(&mut self, since: Stamp) {
        if !self.lying {
            self.blocks.iter_mut().for_each(|register| register.keep(since));
        }
    }

    /// A disk says that things are on media that are not, until some head has opened after that.
    pub fn lied(&mut self) {
        self.lying = true;
    }

    /// A server has lost what was not on media.
    pub fn power_lost(&mut self) {
        self.lost = Some(self.stamp());
    }

    /// A head has opened in `epoch`: what the epochs before it left is on media. True if it may be
    /// less than what was acknowledged. `honest`: no disk lies now.
    pub fn opened(&mut self, epoch: u64, honest: bool) -> bool {
        let at = self.stamp();
        let lost = self.lost.take();
        for register in &mut self.blocks {
            match lost {
                Some(lost) => {
                    register.doubt(at, lost, self.lying);
                    register.undecided.extend(register.dropped.drain(..));
                }
                None if self.lying => {}
                None => register.keep_all(),
            }
            if honest {
                register.dropped.clear();
            }
        }
        if lost.is_some() {
            self.doubtful = epoch;
        }
        self.lying &= !honest;
        lost.is_some()
    }

    /// The head of `epoch` is gone, and with it whoever could answer its writes.
    pub fn orphaned(&mut self, epoch: u64) {
        let at = self.stamp();
        for block in &mut self.blocks {
            for (_, write) in block.undecided.range_mut((epoch, 0)..(epoch + 1, 0)) {
                write.orphaned.get_or_insert(at);
            }
        }
    }

    /// A read submitted at `since` returned `value`.
    ///
    /// # Errors
    /// What the read should have returned.
    pub fn read(&mut self, block: usize, since: Stamp, value: u64) -> Result<Explained, String> {
        self.checked += 1;
        let at = self.stamp();
        let register = &mut self.blocks[block];
        let first = register.first(since);
        let known = register.settled[first..].iter().any(|(_, settled)| *settled == value);
        if !known {
            let write = register.undecided.iter().find(|(_, write)| write.value == value);
            let Some(order) = write.map(|(order, _)| *order) else {
                return Err(format!(
                    "block {block} reads {value}; it should be one of {:?} or of the undecided {:?}",
                    &register.settled[first..],
                    register.undecided
                ));
            };
            // Its head is gone, or it would be known: it is on media since the next one opened.
            let on_media = register.undecided[&order].orphaned.is_some() && !self.lying;
            register.settle(at, order, on_media);
        }
        let gone = |write: &Undecided| write.orphaned.is_some_and(|gone| gone < since);
        let dropped = register.undecided.extract_if(.., |_, write| gone(write));
        let dropped: Vec<(Order, Undecided)> = dropped.collect();
        let explained = match (known, dropped.is_empty()) {
            (false, _) => Explained::Decided,
            (true, true) => Explained::Settled,
            (true, false) => Explained::Dropped,
        };
        if self.lying {
            register.dropped.extend(dropped);
        }
        Ok(explained)
    }

    /// Reads submitted before `stamp` have all been answered: what they might have seen is forgotten.
    pub fn forget(&mut self, stamp: Stamp) {
        for register in &mut self.blocks {
            let first = register.first(stamp);
            register.settled.drain(..first);
        }
    }

    /// Blocks checked by reads so far.
    pub fn checked(&self) -> u64 {
        self.checked
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_read_sees_what_was_settled_while_it_was_under_way() {
        let mut oracle = Oracle::new(1);
        let early = oracle.stamp();
        oracle.submitted(0, 1, 1, 1);
        oracle.acknowledged(0, 1, 1, true);
        assert!(oracle.read(0, early, 0).is_ok());
        let late = oracle.stamp();
        assert!(oracle.read(0, late, 0).is_err());
        assert!(oracle.read(0, late, 1).is_ok());
        assert!(oracle.read(0, early, 0).is_ok(), "it may have been read before the write");
    }

    #[test]
    fn an_undecided_write_is_settled_by_the_first_read_after_its_head_is_gone() {
        for seen in [0, 1] {
            let mut oracle = Oracle::new(1);
            oracle.submitted(0, 7, 1, 1);
            oracle.orphaned(7);
            let stamp = oracle.stamp();
            assert!(oracle.read(0, stamp, seen).is_ok());
            let stamp = oracle.stamp();
            assert!(oracle.read(0, stamp, 1 - seen).is_err());
            assert!(oracle.read(0, stamp, seen).is_ok());
        }
    }

    #[test]
    fn a_write_of_an_old_epoch_never_lands_after_one_of_a_new_epoch() {
        let mut oracle = Oracle::new(1);
        oracle.submitted(0, 2, 1, 1);
        oracle.submitted(0, 1, 2, 2);
        oracle.acknowledged(0, 2, 1, true);
        let stamp = oracle.stamp();
        assert!(oracle.read(0, stamp, 2).is_err(), "the newer epoch's write came later");
        assert!(oracle.read(0, stamp, 1).is_ok());
    }

    #[test]
    fn what_a_liar_said_is_on_media_may_be_gone_after_more_than_one_opening() {
        for lying in [true, false] {
            let mut oracle = Oracle::new(1);
            if lying {
                oracle.lied();
            }
            oracle.power_lost();
            oracle.submitted(0, 1, 1, 1);
            oracle.acknowledged(0, 1, 1, true);
            oracle.orphaned(1);
            oracle.opened(2, !lying);
            oracle.power_lost();
            oracle.opened(3, true);
            let stamp = oracle.stamp();
            assert_eq!(oracle.read(0, stamp, 0).is_ok(), lying);
        }
    }

    #[test]
    fn what_a_liar_helped_to_drop_may_be_back_after_its_power_was_lost() {
        for lying in [true, false] {
            let mut oracle = Oracle::new(1);
            oracle.submitted(0, 1, 1, 1);
            oracle.orphaned(1);
            if lying {
                oracle.lied();
            }
            oracle.opened(2, !lying);
            let stamp = oracle.stamp();
            assert!(oracle.read(0, stamp, 0).is_ok());
            let stamp = oracle.stamp();
            assert!(oracle.read(0, stamp, 1).is_err(), "nothing was lost yet");
            oracle.power_lost();
            oracle.opened(3, true);
            let stamp = oracle.stamp();
            assert_eq!(oracle.read(0, stamp, 1).is_ok(), lying);
            let stamp = oracle.stamp();
            assert_eq!(oracle.read(0, stamp, 0).is_ok(), !lying, "decided for good");
        }
    }

    #[test]
    fn what_was_flushed_survives_and_what_was_not_may_be_gone() {
        for seen in [1, 2, 3] {
            let mut oracle = Oracle::new(1);
            for write in 1..=3 {
                oracle.submitted(0, 1, write, write);
                oracle.acknowledged(0, 1, write, false);
                if write == 1 {
                    let stamp = oracle.stamp();
                    oracle.flushed(stamp);
                }
            }
            oracle.power_lost();
            let stamp = oracle.stamp();
            assert!(oracle.read(0, stamp, 2).is_err(), "the head lives");
            oracle.orphaned(1);
            oracle.opened(2, true);
            let stamp = oracle.stamp();
            assert!(oracle.read(0, stamp, 0).is_err(), "it was flushed");
            assert!(oracle.read(0, stamp, seen).is_ok());
            let stamp = oracle.stamp();
            for other in 0..4 {
                assert_eq!(oracle.read(0, stamp, other).is_ok(), other == seen, "decided");
            }
        }
    }

    #[test]
    fn without_a_loss_of_power_nothing_is_lost() {
        let mut oracle = Oracle::new(1);
        oracle.submitted(0, 1, 1, 1);
        oracle.acknowledged(0, 1, 1, false);
        oracle.orphaned(1);
        oracle.opened(2, true);
        oracle.power_lost();
        oracle.opened(3, true);
        let stamp = oracle.stamp();
        assert!(oracle.read(0, stamp, 0).is_err());
        assert!(oracle.read(0, stamp, 1).is_ok());
    }
}
