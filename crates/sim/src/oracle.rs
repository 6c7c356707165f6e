//! What reads may return: a register for each block, in which unanswered writes are unknown.
//!
//! A value is the number of the write that made it; 0 is "never written, or discarded". Writes
//! are numbered in the order of their submission. Once a read has returned an undecided write's
//! value, that value stays (I3).

use std::collections::BTreeMap;

/// One block.
#[derive(Clone, Debug, Default)]
struct Register {
    settled: u64,
    /// Undecided writes: number of the write and the value it leaves (0 for a discard).
    undecided: BTreeMap<u64, u64>,
}

/// The whole disk as a guest may see it.
#[derive(Debug)]
pub struct Oracle {
    blocks: Vec<Register>,
    checked: u64,
}

impl Oracle {
    /// A fresh disk of `blocks` blocks.
    pub fn new(blocks: usize) -> Self {
        Self { blocks: vec![Register::default(); blocks], checked: 0 }
    }

    /// Write `number` of `value` was submitted.
    pub fn submitted(&mut self, block: usize, number: u64, value: u64) {
        self.blocks[block].undecided.insert(number, value);
    }

    /// Write `number` was acknowledged: it and nothing submitted before it.
    pub fn acknowledged(&mut self, block: usize, number: u64) {
        let register = &mut self.blocks[block];
        if let Some(value) = register.undecided.remove(&number) {
            register.settled = value;
            register.undecided.retain(|other, _| *other > number);
        }
    }

    /// A read returned `value`, which was submitted or settled before the read's answer.
    ///
    /// # Errors
    /// What the read should have returned.
    pub fn read(&mut self, block: usize, value: u64) -> Result<(), String> {
        self.checked += 1;
        let register = &mut self.blocks[block];
        if register.settled == value {
            return Ok(());
        }
        let found = register.undecided.iter().find(|(_, left)| **left == value).map(|(n, _)| *n);
        match found {
            Some(number) => {
                register.settled = value;
                register.undecided.retain(|other, _| *other > number);
                Ok(())
            }
            None => Err(format!(
                "block {block} reads {value}; it should be {} or one of the undecided {:?}",
                register.settled, register.undecided
            )),
        }
    }

    /// Blocks checked by reads so far.
    pub fn checked(&self) -> u64 {
        self.checked
    }
}
