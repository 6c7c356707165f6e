//! Filling: this replica's chunks come from a peer's.

use base::{BlockCount, ReplicaKey, Seq};

use crate::store::Store;

impl Store {
    /// Blocks of a chunk of this replica: the unit for [`Command::List`](crate::Command::List) at the
    /// source.
    pub fn chunk_unit(&self, key: ReplicaKey) -> Option<BlockCount> {
        let slot = *self.by_key.get(&key)?;
        let blocks = self.chunk_blocks(self.replica_ref(slot).block_size);
        Some(BlockCount(u32::try_from(blocks).expect("a chunk's blocks")))
    }

    /// The first chunk of this replica at or after number `from` that home has: its number, and the
    /// seq through which it holds every record; zero: that is not known.
    ///
    /// A chunk that a source lists is to be copied unless it is here with a seq that is at least
    /// the listed one.
    pub fn next_chunk(&self, key: ReplicaKey, from: u32) -> Option<(u32, Seq)> {
        let slot = *self.by_key.get(&key)?;
        let (chunk, place) = self.replica_ref(slot).chunks.next(u64::from(from))?;
        Some((chunk, place.newest))
    }
}
