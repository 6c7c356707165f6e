//! What writes put into blocks, so that a read can tell whose data it sees.

use base::BufferMut;
use base::limits::PAGE_BYTES;

/// Fills a write's blocks: each says who wrote it, and where it belongs.
pub(crate) fn fill(buffer: &mut BufferMut, lba: u64, blocks: u64, number: u64) {
    for (block, page) in (lba..lba + blocks).zip(buffer.payload_mut().chunks_exact_mut(PAGE_BYTES))
    {
        for (index, word) in page.chunks_exact_mut(8).enumerate() {
            let value = match index {
                0 => number,
                1 => block,
                _ => number.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ index as u64,
            };
            word.copy_from_slice(&value.to_le_bytes());
        }
    }
}

/// Which write a block holds; an error if it holds a mix, or another block's data.
pub(crate) fn value_of(page: &[u8], block: u64) -> Result<u64, String> {
    let word = |index: usize| {
        let bytes = page[index * 8..index * 8 + 8].try_into().expect("eight bytes");
        u64::from_le_bytes(bytes)
    };
    let number = word(0);
    if number == 0 {
        let zero = page.iter().all(|byte| *byte == 0);
        return if zero { Ok(0) } else { Err(format!("block {block} is neither data nor zero")) };
    }
    if word(1) != block {
        return Err(format!("block {block} holds data of block {}", word(1)));
    }
    let expected = |index: usize| number.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ index as u64;
    match (2..PAGE_BYTES / 8).find(|index| word(*index) != expected(*index)) {
        None => Ok(number),
        Some(index) => Err(format!("block {block} mixes writes at word {index}")),
    }
}
