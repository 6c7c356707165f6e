//! A bounded cache of chunk metadata, by the chunk's place.

use std::collections::BTreeMap;

use crate::home::ChunkMeta;

/// Chunks whose metadata is cached, at most.
const CHUNKS_CACHED_MAX: usize = 2048;

/// Whose metadata is being read, and which version.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted {
    pub(crate) replica: u16,
    pub(crate) chunk: u32,
    pub(crate) version: u32,
}

struct Cached {
    location: u32,
    version: u32,
    used: bool,
    /// False: its metadata on the device is not what it must be.
    readable: bool,
    meta: ChunkMeta,
}

/// What the cache knows of a chunk.
pub(crate) enum Lookup<'a> {
    Meta(&'a ChunkMeta),
    /// Read, and not readable.
    Damaged,
    Missing,
}

/// The cache. Replacement gives each entry a second chance.
pub(crate) struct ChunkCache {
    by_location: BTreeMap<u32, usize>,
    entries: Vec<Cached>,
    hand: usize,
    /// Being read: location → what is wanted.
    filling: BTreeMap<u32, Wanted>,
}

impl ChunkCache {
    pub(crate) fn new() -> Self {
        Self {
            by_location: BTreeMap::new(),
            entries: Vec::new(),
            hand: 0,
            filling: BTreeMap::new(),
        }
    }

    pub(crate) fn lookup(&mut self, location: u32, version: u32) -> Lookup<'_> {
        let Some(at) = self.by_location.get(&location) else { return Lookup::Missing };
        let entry = &mut self.entries[*at];
        if entry.version != version {
            return Lookup::Missing;
        }
        entry.used = true;
        if entry.readable { Lookup::Meta(&entry.meta) } else { Lookup::Damaged }
    }

    /// Lets `fill` set the metadata of a chunk; it says whether that is readable.
    pub(crate) fn insert(
        &mut self,
        location: u32,
        version: u32,
        fill: impl FnOnce(&mut ChunkMeta) -> bool,
    ) {
        let at = match self.by_location.get(&location) {
            Some(at) => *at,
            None => self.vacate(),
        };
        self.by_location.insert(location, at);
        let entry = &mut self.entries[at];
        entry.location = location;
        entry.version = version;
        entry.used = true;
        entry.readable = fill(&mut entry.meta);
    }

    fn vacate(&mut self) -> usize {
        if self.entries.len() < CHUNKS_CACHED_MAX {
            self.entries.push(Cached {
                location: 0,
                version: 0,
                used: false,
                readable: false,
                meta: ChunkMeta::default(),
            });
            return self.entries.len() - 1;
        }
        loop {
            self.hand = (self.hand + 1) % self.entries.len();
            let entry = &mut self.entries[self.hand];
            if !core::mem::take(&mut entry.used) {
                self.by_location.remove(&entry.location);
                return self.hand;
            }
        }
    }

    /// True if nobody reads this chunk's metadata yet: the caller does now.
    pub(crate) fn begin_fill(&mut self, location: u32, wanted: Wanted) -> bool {
        if self.filling.contains_key(&location) {
            return false;
        }
        self.filling.insert(location, wanted);
        true
    }

    /// What was wanted of a chunk whose metadata has been read.
    pub(crate) fn end_fill(&mut self, location: u32) -> Option<Wanted> {
        self.filling.remove(&location)
    }
}
