//! The answer to [`CommandBody::List`](crate::CommandBody::List): which chunks a replica's home has,
//! as bytes in a buffer, since it crosses the network as data.
//!
//! Little-endian: trimmed position (epoch 8, seq 8), commit seq 8, next chunk 4 ([`NO_MORE`] after
//! the last), number of entries 4, the replica's size in blocks 8; then for each chunk that has blocks, by number: number 4, newest
//! seq 8. All records at or below the trimmed position are home. A chunk that misses between two
//! others, or before the next chunk, has no block.

use crate::ids::{Epoch, Position, Seq};

/// In place of the next chunk's number: the list is at its end.
pub const NO_MORE: u32 = u32::MAX;

/// In place of a chunk's newest seq: not known, and above all that are.
pub const UNKNOWN: Seq = Seq(u64::MAX);

const HEADER_BYTES: usize = 40;
const ENTRY_BYTES: usize = 12;

/// What stands before the entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListHeader {
    /// Everything through here is home, and was when the first entry was made.
    pub trimmed: Position,
    /// The replica's commit seq.
    pub commit: Seq,
    /// The chunk to ask for next, or [`NO_MORE`].
    pub next: u32,
    /// The replica's size in blocks: what is asked for in smaller ranges may leave something out.
    pub blocks: u64,
}

/// A chunk that has blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListEntry {
    /// Its number, in the units that were asked for.
    pub chunk: u32,
    /// The newest record in it, or a higher number: what a replica holds of the chunk is as good if
    /// it has every record through this one. [`UNKNOWN`]: copy it whatever is there.
    pub newest: Seq,
}

/// Entries that fit into `bytes`.
pub const fn capacity(bytes: usize) -> usize {
    bytes.saturating_sub(HEADER_BYTES) / ENTRY_BYTES
}

/// Writes a list to the start of `out`; the bytes used.
///
/// # Panics
/// If there are more entries than [`capacity`].
pub fn encode(header: &ListHeader, entries: &[ListEntry], out: &mut [u8]) -> usize {
    assert!(entries.len() <= capacity(out.len()), "callers leave out what does not fit");
    let count = u32::try_from(entries.len()).expect("fewer than bytes in a buffer");
    out[0..8].copy_from_slice(&header.trimmed.epoch.0.to_le_bytes());
    out[8..16].copy_from_slice(&header.trimmed.seq.0.to_le_bytes());
    out[16..24].copy_from_slice(&header.commit.0.to_le_bytes());
    out[24..28].copy_from_slice(&header.next.to_le_bytes());
    out[28..32].copy_from_slice(&count.to_le_bytes());
    out[32..40].copy_from_slice(&header.blocks.to_le_bytes());
    for (entry, out) in entries.iter().zip(out[HEADER_BYTES..].chunks_exact_mut(ENTRY_BYTES)) {
        out[..4].copy_from_slice(&entry.chunk.to_le_bytes());
        out[4..].copy_from_slice(&entry.newest.0.to_le_bytes());
    }
    HEADER_BYTES + entries.len() * ENTRY_BYTES
}

/// Reads a list; `None` unless it is one, whole, with rising chunk numbers below `next`.
pub fn decode(bytes: &[u8]) -> Option<(ListHeader, impl Iterator<Item = ListEntry>)> {
    let (head, rest) = bytes.split_at_checked(HEADER_BYTES)?;
    let header = ListHeader {
        trimmed: Position::new(Epoch(u64_at(head, 0)), Seq(u64_at(head, 8))),
        commit: Seq(u64_at(head, 16)),
        next: u32_at(head, 24),
        blocks: u64_at(head, 32),
    };
    let count = usize::try_from(u32_at(head, 28)).ok()?;
    let entries = rest.get(..count.checked_mul(ENTRY_BYTES)?)?.chunks_exact(ENTRY_BYTES);
    let entries =
        entries.map(|entry| ListEntry { chunk: u32_at(entry, 0), newest: Seq(u64_at(entry, 4)) });
    let mut least = 0;
    for entry in entries.clone() {
        if entry.chunk < least || entry.chunk >= header.next {
            return None;
        }
        least = entry.chunk + 1;
    }
    Some((header, entries))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: ListHeader = ListHeader {
        trimmed: Position::new(Epoch(3), Seq(70)),
        commit: Seq(90),
        next: 9,
        blocks: 2100,
    };

    fn entry(chunk: u32, newest: u64) -> ListEntry {
        ListEntry { chunk, newest: Seq(newest) }
    }

    #[test]
    fn a_list_comes_back_as_it_went() {
        let entries = [entry(0, 5), entry(7, 80), entry(8, 1)];
        let mut bytes = [0; 100];
        assert_eq!(capacity(bytes.len()), 5);
        let used = encode(&HEADER, &entries, &mut bytes);
        assert_eq!(used, 76);
        let (header, found) = decode(&bytes[..used]).unwrap();
        assert_eq!((header, found.collect::<Vec<_>>()), (HEADER, entries.to_vec()));
    }

    #[test]
    fn what_is_no_list_is_refused() {
        let mut bytes = [0; 100];
        let used = encode(&HEADER, &[entry(3, 1), entry(4, 1)], &mut bytes);
        assert!(decode(&bytes[..used - 1]).is_none(), "cut short");
        assert!(decode(&bytes[..39]).is_none(), "no header");
        let used = encode(&HEADER, &[entry(4, 1), entry(4, 1)], &mut bytes);
        assert!(decode(&bytes[..used]).is_none(), "twice the same");
        let used = encode(&HEADER, &[entry(9, 1)], &mut bytes);
        assert!(decode(&bytes[..used]).is_none(), "past the next");
        bytes[28..32].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(decode(&bytes).is_none(), "more than there are");
    }
}
