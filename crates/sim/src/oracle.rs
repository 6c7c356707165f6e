//! What reads may return: a register for each block, in which unanswered writes are unknown.
//!
//! A value is the number of the write that made it; 0 is "never written, or discarded". Writes
//! are numbered in the order of their submission. A read may return what was settled at any time
//! between its submission and its answer, or an undecided write's value, which is settled by
//! that (I3: once seen, it never reverts). A write whose head is gone is decided by the first
//! read that is submitted later, whichever value it returns.

use std::collections::BTreeMap;

/// A point in the order of everything that the oracle was told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Stamp(u64);

#[derive(Clone, Copy, Debug)]
struct Undecided {
    value: u64,
    /// The process whose head has it.
    process: usize,
    /// Its head is gone since then.
    orphaned: Option<Stamp>,
}

/// One block.
#[derive(Clone, Debug)]
struct Register {
    /// Values and since when they are settled, oldest first; never empty.
    settled: Vec<(Stamp, u64)>,
    /// By the number of the write.
    undecided: BTreeMap<u64, Undecided>,
}

impl Register {
    /// Write `number` is settled, and before it whatever was submitted earlier: a read that is
    /// under way may have seen any of that.
    fn settle(&mut self, at: Stamp, number: u64) {
        let later = self.undecided.split_off(&(number + 1));
        let settled = std::mem::replace(&mut self.undecided, later);
        self.settled.extend(settled.values().map(|write| (at, write.value)));
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
}

impl Oracle {
    /// A fresh disk of `blocks` blocks.
    pub fn new(blocks: usize) -> Self {
        let fresh = Register { settled: vec![(Stamp(0), 0)], undecided: BTreeMap::new() };
        Self { blocks: vec![fresh; blocks], now: 0, checked: 0 }
    }

    /// Now, in the oracle's order: taken when a read is submitted.
    pub fn stamp(&mut self) -> Stamp {
        self.now += 1;
        Stamp(self.now)
    }

    /// Write `number` of `value` was submitted to the head of `process`.
    pub fn submitted(&mut self, block: usize, number: u64, value: u64, process: usize) {
        let undecided = Undecided { value, process, orphaned: None };
        self.blocks[block].undecided.insert(number, undecided);
    }

    /// Write `number` was acknowledged: it and nothing submitted before it.
    pub fn acknowledged(&mut self, block: usize, number: u64) {
        let at = self.stamp();
        let register = &mut self.blocks[block];
        if register.undecided.contains_key(&number) {
            register.settle(at, number);
        }
    }

    /// The head of `process` is gone, and with it whoever could answer its writes.
    pub fn orphaned(&mut self, process: usize) {
        let at = self.stamp();
        let writes = self.blocks.iter_mut().flat_map(|block| block.undecided.values_mut());
        for write in writes.filter(|write| write.process == process) {
            write.orphaned.get_or_insert(at);
        }
    }

    /// A read submitted at `since` returned `value`.
    ///
    /// # Errors
    /// What the read should have returned.
    pub fn read(&mut self, block: usize, since: Stamp, value: u64) -> Result<(), String> {
        self.checked += 1;
        let at = self.stamp();
        let register = &mut self.blocks[block];
        let first = register.first(since);
        if register.settled[first..].iter().any(|(_, settled)| *settled == value) {
            register.undecided.retain(|_, write| write.orphaned.is_none_or(|gone| gone >= since));
            return Ok(());
        }
        let write = register.undecided.iter().find(|(_, write)| write.value == value);
        if let Some(number) = write.map(|(number, _)| *number) {
            register.settle(at, number);
            register.undecided.retain(|_, write| write.orphaned.is_none_or(|gone| gone >= since));
            return Ok(());
        }
        Err(format!(
            "block {block} reads {value}; it should be one of {:?} or of the undecided {:?}",
            &register.settled[first..],
            register.undecided
        ))
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
        oracle.submitted(0, 1, 1, 0);
        oracle.acknowledged(0, 1);
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
            oracle.submitted(0, 1, 1, 0);
            oracle.orphaned(0);
            let stamp = oracle.stamp();
            assert!(oracle.read(0, stamp, seen).is_ok());
            let stamp = oracle.stamp();
            assert!(oracle.read(0, stamp, 1 - seen).is_err());
            assert!(oracle.read(0, stamp, seen).is_ok());
        }
    }
}
