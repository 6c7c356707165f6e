//! What the blocks of a disk may hold, and blocks that say what they are.
//!
//! Each block carries its number and the generation of its last write, so that a lost write, a stale
//! read and a misplaced block are all told apart. What was acknowledged must be read; what was
//! not answered may be there or not, but once seen it must stay.

/// The unit of writing and checking, in bytes.
pub const BLOCK_BYTES: usize = 4096;

/// What every block may hold.
#[derive(Debug, Clone)]
pub struct Oracle {
    blocks: Vec<Expected>,
}

/// What a block may hold. Generation 0 is a block of zeroes that was never written.
#[derive(Debug, Clone, Default)]
struct Expected {
    /// The last write that was acknowledged or seen.
    settled: u32,
    /// Later ones that were never answered.
    possible: Vec<u32>,
    /// The last generation given out.
    newest: u32,
}

impl Oracle {
    /// Of a disk that nobody has written to.
    pub fn new(blocks: u32) -> Self {
        Self { blocks: vec![Expected::default(); blocks as usize] }
    }

    /// How many blocks it knows.
    pub fn blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Gives out the generation of the next write of a block.
    pub fn begin_write(&mut self, block: u32) -> u32 {
        let expected = &mut self.blocks[block as usize];
        expected.newest += 1;
        expected.newest
    }

    /// A write was acknowledged.
    pub fn acknowledged(&mut self, block: u32, generation: u32) {
        let expected = &mut self.blocks[block as usize];
        expected.settled = generation;
        expected.possible.clear();
    }

    /// A write failed or was never answered: it may have happened, or not.
    pub fn unanswered(&mut self, block: u32, generation: u32) {
        self.blocks[block as usize].possible.push(generation);
    }

    /// Judges what was read.
    pub fn see(&mut self, block: u32, bytes: &[u8]) -> Result<(), String> {
        self.blocks[block as usize].see(block, bytes)
    }
}

impl Expected {
    fn see(&mut self, block: u32, bytes: &[u8]) -> Result<(), String> {
        let found = generation_in(block, bytes)?;
        if found == self.settled {
            // The opening of this head has settled that what was undecided never happened.
            self.possible.clear();
            return Ok(());
        }
        let Some(place) = self.possible.iter().position(|possible| *possible == found) else {
            return Err(format!(
                "block {block} holds write {found}, but write {} was acknowledged{}",
                self.settled,
                if self.possible.is_empty() {
                    String::new()
                } else {
                    format!(" (and {:?} were not answered)", self.possible)
                }
            ));
        };
        // Once seen it stays.
        self.settled = self.possible[place];
        self.possible.clear();
        Ok(())
    }
}

/// What a block's write of this generation writes: every word depends on all of it.
pub fn fill(bytes: &mut [u8], block: u32, generation: u32) {
    let identity = u64::from(block) << 32 | u64::from(generation);
    let mut state = identity | 1 << 63;
    for (index, word) in bytes[..BLOCK_BYTES].chunks_exact_mut(8).enumerate() {
        let value = if index == 0 { identity } else { mix(&mut state) };
        word.copy_from_slice(&value.to_le_bytes());
    }
}

/// Which write of this block the bytes are of.
pub fn generation_in(block: u32, bytes: &[u8]) -> Result<u32, String> {
    let bytes = &bytes[..BLOCK_BYTES];
    if bytes.iter().all(|byte| *byte == 0) {
        return Ok(0);
    }
    let identity = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes"));
    let (number, generation) = (identity >> 32, identity & u64::from(u32::MAX));
    let generation = u32::try_from(generation).expect("masked");
    let mut expected = [0; BLOCK_BYTES];
    fill(&mut expected, block, generation);
    if number != u64::from(block) || bytes != expected {
        return Err(format!(
            "block {block} holds bytes that were never written to it: they begin with {:02x?}",
            &bytes[..16]
        ));
    }
    Ok(generation)
}

/// xorshift64* (Vigna 2016).
pub fn mix(state: &mut u64) -> u64 {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    state.wrapping_mul(0x2545_F491_4F6C_DD1D)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(number: u32, generation: u32) -> Vec<u8> {
        let mut bytes = vec![0; BLOCK_BYTES];
        fill(&mut bytes, number, generation);
        bytes
    }

    #[test]
    fn stale_misplaced_and_damaged_blocks_are_told_apart() {
        let undecided = Expected { settled: 3, possible: vec![5, 6], newest: 6 };
        let mut expected = undecided.clone();
        assert!(expected.see(7, &block(7, 2)).unwrap_err().contains("write 3 was acknowledged"));
        assert!(expected.see(7, &block(8, 3)).unwrap_err().contains("never written"));
        assert!(expected.see(7, &vec![0; BLOCK_BYTES]).is_err(), "a lost block");
        let mut damaged = block(7, 3);
        damaged[4000] ^= 1;
        assert!(expected.see(7, &damaged).is_err());
        assert!(expected.see(7, &block(7, 5)).is_ok(), "it was not answered");
        assert!(expected.see(7, &block(7, 3)).is_err(), "what was seen stays");
        assert!(expected.see(7, &block(7, 6)).is_err(), "and the rest never happened");
        let mut expected = undecided;
        assert!(expected.see(7, &block(7, 3)).is_ok());
        assert!(expected.see(7, &block(7, 5)).is_err(), "settled: it never happened");
    }
}
