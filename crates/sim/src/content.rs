//! What writes put into blocks, so that a read can tell whose data it sees.

use base::BufferMut;
use base::limits::PAGE_BYTES;

const WORDS: usize = PAGE_BYTES / 8;

/// Which word is which: with a table, all words are looked at side by side.
static INDICES: [u64; WORDS] = {
    let mut indices = [0; WORDS];
    let mut index = 0;
    while index < WORDS {
        indices[index] = index as u64;
        index += 1;
    }
    indices
};

/// What a write puts into a block: who wrote it, where it belongs, and words that differ between writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Content {
    number: u32,
    block: u32,
}

impl Content {
    /// Writes have smaller numbers: no structure of a pool begins like a block.
    const NUMBERS: u32 = 1 << 30;

    /// What a page holds, if every byte of it is as such a write left it.
    pub(crate) fn of(page: &[u8; PAGE_BYTES]) -> Option<Self> {
        let (words, _) = page.as_chunks::<8>();
        let [number, block, first] = [0, 1, 2].map(|index| u64::from_le_bytes(words[index]));
        if number == 0 || first != rest(number) ^ INDICES[2] {
            return None;
        }
        let content = Self { number: number.try_into().ok()?, block: block.try_into().ok()? };
        let differs = words[2..].iter().zip(&INDICES[2..]).fold(0, |differs, (word, index)| {
            differs | (u64::from_le_bytes(*word) ^ rest(number) ^ index)
        });
        (differs == 0 && content.number < Self::NUMBERS).then_some(content)
    }

    /// Makes a page such a block.
    pub(crate) fn put(self, page: &mut [u8; PAGE_BYTES]) {
        put(u64::from(self.number), u64::from(self.block), page);
    }
}

fn rest(number: u64) -> u64 {
    number.wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

fn put(number: u64, block: u64, page: &mut [u8; PAGE_BYTES]) {
    let (words, _) = page.as_chunks_mut::<8>();
    for (word, index) in words.iter_mut().zip(&INDICES) {
        *word = (rest(number) ^ index).to_le_bytes();
    }
    words[0] = number.to_le_bytes();
    words[1] = block.to_le_bytes();
}

/// Fills a write's blocks: each says who wrote it, and where it belongs.
pub(crate) fn fill(buffer: &mut BufferMut, lba: u64, blocks: u64, number: u64) {
    let (pages, _) = buffer.payload_mut().as_chunks_mut::<PAGE_BYTES>();
    for (block, page) in (lba..lba + blocks).zip(pages) {
        put(number, block, page);
    }
}

/// Which write a block holds; an error if it holds a mix, or another block's data.
pub(crate) fn value_of(page: &[u8; PAGE_BYTES], block: u64) -> Result<u64, String> {
    if let Some(content) = Content::of(page).filter(|content| u64::from(content.block) == block) {
        return Ok(content.number.into());
    }
    let (words, _) = page.as_chunks::<8>();
    let word = |index: usize| u64::from_le_bytes(words[index]);
    let number = word(0);
    if number == 0 {
        let zero = page.iter().all(|byte| *byte == 0);
        return if zero { Ok(0) } else { Err(format!("block {block} is neither data nor zero")) };
    }
    if word(1) != block {
        return Err(format!("block {block} holds data of block {}", word(1)));
    }
    match (2..WORDS).find(|index| word(*index) != rest(number) ^ INDICES[*index]) {
        None => Ok(number),
        Some(index) => Err(format!("block {block} mixes writes at word {index}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_known_only_if_all_of_it_is_there() {
        let mut page = [0; PAGE_BYTES];
        put(7, 3, &mut page);
        let content = Content { number: 7, block: 3 };
        assert_eq!((Content::of(&page), value_of(&page, 3)), (Some(content), Ok(7)));
        assert!(value_of(&page, 4).is_err());
        let mut again = [9; PAGE_BYTES];
        content.put(&mut again);
        assert_eq!(again, page);
        for byte in 0..PAGE_BYTES {
            let mut other = page;
            other[byte] ^= 1;
            // The second word says which block it is, and so much is all that it says.
            let known = Content::of(&other).map(|content| content.number);
            assert_eq!(known, (8..12).contains(&byte).then_some(7), "byte {byte}");
            assert!(value_of(&other, 3).is_err(), "byte {byte}");
        }
        assert_eq!(Content::of(&[0; PAGE_BYTES]), None);
        put(u64::from(Content::NUMBERS), 3, &mut page);
        assert_eq!(Content::of(&page), None);
        assert_eq!(value_of(&page, 3), Ok(u64::from(Content::NUMBERS)));
    }
}
