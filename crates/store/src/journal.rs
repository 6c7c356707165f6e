//! The journal: metadata entries on their way to both copies of the metadata area, and the
//! checkpoints that make room for more.
//!
//! One commit, a page, is under way at a time: written to both copies, both synced, and only then
//! applied to memory and answered. So a page that is followed by a whole one was complete, and a
//! checkpoint, during which no commit is under way, can be encoded piece by piece from memory.

use std::collections::VecDeque;

use base::Buffer;
use base::limits::{PAGE_BYTES, PAYLOAD_BYTES_MAX};

use crate::api::Parts;
use crate::layout::{DeviceIndex, PAGE};
use crate::metadata::{Entry, PAGE_ENTRY_BYTES, PAGE_HEADER_BYTES, Page, PageKind};
use crate::store::{Phase, Store, Task};

/// What to do when an entry is durable, beyond applying it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum After {
    Nothing,
    /// Answer `Done`.
    Done(u64),
    /// Answer `Sealed`.
    Sealed(u64),
    /// Answer `Truncated`.
    Truncated(u64),
    /// A staged chunk counts: answer `Done`.
    Staged(u64),
    /// The flush wave's last entry.
    Wave,
    /// The flush job may begin.
    JobStart,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Idle,
    /// A page is being written to so many copies.
    Writing(u8),
    /// Waits for these syncs of the copies' devices.
    Syncing([u64; 2]),
    Checkpoint(Stage),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// The next piece is to be encoded.
    Encode,
    Pages(u8),
    PagesSync([u64; 2]),
    Header(u8),
    HeaderSync([u64; 2]),
}

/// Where a checkpoint's encoding is.
#[derive(Clone, Copy, Debug, Default)]
struct Cursor {
    replica: usize,
    step: u8,
    restart: usize,
    chunk: u64,
    /// Taken from memory and not put into a page yet.
    held: Option<Entry>,
    page: u32,
    finished: bool,
}

/// The journal's state.
pub(crate) struct Journal {
    pub(crate) copies: [(DeviceIndex, u64); 2],
    pub(crate) region: u64,
    pub(crate) generation: u64,
    pub(crate) next_page: u32,
    pub(crate) previous_crc: u32,
    pub(crate) incarnation: u32,
    pub(crate) version: u32,
    pub(crate) queue: VecDeque<(Entry, After)>,
    flying: Vec<(Entry, After)>,
    state: State,
    cursor: Cursor,
    /// A checkpoint is wanted even though the journal has room.
    pub(crate) checkpoint_wanted: bool,
    pub(crate) checkpoints: u64,
}

impl Journal {
    pub(crate) fn new() -> Self {
        Self {
            copies: [(DeviceIndex(0), 0); 2],
            region: 0,
            generation: 0,
            next_page: 0,
            previous_crc: 0,
            incarnation: 0,
            version: 0,
            queue: VecDeque::new(),
            flying: Vec::new(),
            state: State::Idle,
            cursor: Cursor::default(),
            checkpoint_wanted: false,
            checkpoints: 0,
        }
    }

    pub(crate) fn push(&mut self, entry: Entry, after: After) {
        self.queue.push_back((entry, after));
    }

    /// Takes out what waits to be written about a replica that has been deleted.
    pub(crate) fn forget(&mut self, slot: u16) -> Vec<(Entry, After)> {
        let (gone, rest): (VecDeque<_>, _) =
            self.queue.drain(..).partition(|(entry, _)| entry.replica() == Some(slot));
        self.queue = rest;
        gone.into()
    }

    /// Entries that are not durable yet.
    pub(crate) fn pending(&self) -> impl Iterator<Item = &(Entry, After)> {
        self.flying.iter().chain(&self.queue)
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.state == State::Idle && self.queue.is_empty() && !self.checkpoint_wanted
    }

    /// Answers that will not be given: the tags of commands that wait.
    pub(crate) fn abandon(&mut self) -> Vec<u64> {
        let waiting = self.queue.drain(..).chain(self.flying.drain(..));
        waiting
            .filter_map(|(_, after)| match after {
                After::Done(tag)
                | After::Sealed(tag)
                | After::Truncated(tag)
                | After::Staged(tag) => Some(tag),
                After::Nothing | After::Wave | After::JobStart => None,
            })
            .collect()
    }
}

impl Store {
    /// Writes a checkpoint soon even if the journal has room: the next opening has less to read.
    pub fn checkpoint(&mut self) {
        self.settled = false;
        if self.phase == Phase::Open {
            self.journal.checkpoint_wanted = true;
        }
    }

    fn region_offset(&self, copy: usize, region: u64) -> u64 {
        self.journal.copies[copy].1 + region * self.geometry.region_bytes()
    }

    /// Starts the next commit or the next step of a checkpoint, if one is wanted.
    pub(crate) fn pump_journal(&mut self) {
        match self.journal.state {
            State::Idle => {
                let full = self.journal.next_page >= self.geometry.journal_pages;
                if self.journal.checkpoint_wanted || full && !self.journal.queue.is_empty() {
                    self.journal.checkpoint_wanted = false;
                    self.journal.cursor = Cursor::default();
                    self.journal.state = State::Checkpoint(Stage::Encode);
                    self.encode_checkpoint();
                } else if !self.journal.queue.is_empty() {
                    self.write_journal_page();
                }
            }
            State::Checkpoint(Stage::Encode) => self.encode_checkpoint(),
            State::Checkpoint(Stage::PagesSync(_)) => self.journal_synced(),
            State::Writing(_) | State::Syncing(_) | State::Checkpoint(_) => {}
        }
    }

    fn write_journal_page(&mut self) {
        let Some(mut buffer) = self.config.buffers.take(PAGE_BYTES) else {
            self.starved();
            return;
        };
        let page = &mut buffer.payload_mut()[..PAGE_BYTES];
        let mut used = 0;
        while let Some((entry, after)) = self.journal.queue.front().copied() {
            let encoded = entry.encode();
            let bytes = encoded.bytes();
            if used + bytes.len() > PAGE_ENTRY_BYTES {
                break;
            }
            let at = PAGE_HEADER_BYTES + used;
            page[at..at + bytes.len()].copy_from_slice(bytes);
            used += bytes.len();
            self.journal.flying.push((entry, after));
            self.journal.queue.pop_front();
        }
        let number = self.journal.next_page;
        let header = Page {
            kind: PageKind::Journal,
            pool: self.pool,
            generation: self.journal.generation,
            number: u64::from(number),
            previous_crc: self.journal.previous_crc,
            length: u32::try_from(used).expect("less than a page"),
        };
        self.journal.previous_crc = header.encode(page);
        self.journal.next_page += 1;
        self.journal.state = State::Writing(2);
        let page = 1 + u64::from(self.geometry.checkpoint_pages) + u64::from(number);
        let region = self.journal.region;
        self.write_copies(region, page, &buffer.freeze().payload(PAGE_BYTES));
    }

    fn write_copies(&mut self, region: u64, page: u64, bytes: &Buffer) {
        for copy in 0..2 {
            let offset = self.region_offset(copy, region) + page * PAGE;
            let device = self.journal.copies[copy].0;
            self.write(device, offset, Parts::one(bytes.clone()), Task::Journal);
        }
    }

    /// A write of the journal's has completed.
    pub(crate) fn journal_written(&mut self) {
        let left = |left: u8| left.checked_sub(1).expect("no more completions than writes");
        self.journal.state = match self.journal.state {
            State::Writing(count) if left(count) > 0 => State::Writing(left(count)),
            State::Writing(_) => State::Syncing(self.sync_copies()),
            State::Checkpoint(Stage::Pages(count)) if left(count) > 0 => {
                State::Checkpoint(Stage::Pages(left(count)))
            }
            State::Checkpoint(Stage::Pages(_)) => {
                State::Checkpoint(if self.journal.cursor.finished {
                    Stage::PagesSync(self.sync_copies())
                } else {
                    Stage::Encode
                })
            }
            State::Checkpoint(Stage::Header(count)) if left(count) > 0 => {
                State::Checkpoint(Stage::Header(left(count)))
            }
            State::Checkpoint(Stage::Header(_)) => {
                State::Checkpoint(Stage::HeaderSync(self.sync_copies()))
            }
            State::Idle
            | State::Syncing(_)
            | State::Checkpoint(Stage::Encode | Stage::PagesSync(_) | Stage::HeaderSync(_)) => {
                unreachable!("no write of the journal's is under way")
            }
        };
    }

    fn sync_copies(&mut self) -> [u64; 2] {
        let [first, second] = self.journal.copies;
        [self.want_sync(first.0), self.want_sync(second.0)]
    }

    /// Some device has been synced.
    pub(crate) fn journal_synced(&mut self) {
        let copies = self.journal.copies;
        let done = |stamps: [u64; 2]| {
            (0..2)
                .all(|copy| self.devices[usize::from(copies[copy].0.0)].syncs_done >= stamps[copy])
        };
        match self.journal.state {
            State::Syncing(stamps) if done(stamps) => {
                self.journal.state = State::Idle;
                let mut flying = core::mem::take(&mut self.journal.flying);
                for (entry, after) in flying.drain(..) {
                    self.apply_entry(entry);
                    self.after_entry(entry, after);
                }
                self.journal.flying = flying;
            }
            State::Checkpoint(Stage::PagesSync(stamps)) if done(stamps) => {
                self.write_checkpoint_header();
            }
            State::Checkpoint(Stage::HeaderSync(stamps)) if done(stamps) => {
                self.journal.state = State::Idle;
                self.journal.region ^= 1;
                self.journal.generation += 1;
                self.journal.next_page = 0;
                self.journal.checkpoints += 1;
                // The older region must not be taken for the newest, should this one be lost.
                let region = self.journal.region ^ 1;
                let zeroes = self.zero_page.clone();
                for copy in 0..2 {
                    let offset = self.region_offset(copy, region);
                    let device = self.journal.copies[copy].0;
                    self.write(device, offset, Parts::one(zeroes.clone()), Task::Ignore);
                }
            }
            State::Idle | State::Writing(_) | State::Syncing(_) | State::Checkpoint(_) => {}
        }
    }

    fn encode_checkpoint(&mut self) {
        let Some(mut buffer) = self.config.buffers.take(PAYLOAD_BYTES_MAX) else {
            self.starved();
            return;
        };
        let mut cursor = self.journal.cursor;
        let first = cursor.page;
        let pages = buffer.payload_mut()[..PAYLOAD_BYTES_MAX].chunks_exact_mut(PAGE_BYTES);
        let mut filled = 0;
        for page in pages {
            let mut used = 0;
            loop {
                let Some(entry) = cursor.held.take().or_else(|| self.next_fact(&mut cursor)) else {
                    cursor.finished = true;
                    break;
                };
                let encoded = entry.encode();
                let bytes = encoded.bytes();
                if used + bytes.len() > PAGE_ENTRY_BYTES {
                    cursor.held = Some(entry);
                    break;
                }
                let at = PAGE_HEADER_BYTES + used;
                page[at..at + bytes.len()].copy_from_slice(bytes);
                used += bytes.len();
            }
            let header = Page {
                kind: PageKind::Checkpoint,
                pool: self.pool,
                generation: self.journal.generation + 1,
                number: u64::from(cursor.page),
                previous_crc: 0,
                length: u32::try_from(used).expect("less than a page"),
            };
            header.encode(page);
            cursor.page += 1;
            filled += 1;
            if cursor.finished {
                break;
            }
        }
        assert!(cursor.page <= self.geometry.checkpoint_pages, "a checkpoint fits its area");
        self.journal.cursor = cursor;
        self.journal.state = State::Checkpoint(Stage::Pages(2));
        let bytes = buffer.freeze().payload(filled * PAGE_BYTES);
        self.write_copies(self.journal.region ^ 1, 1 + u64::from(first), &bytes);
    }

    fn write_checkpoint_header(&mut self) {
        let Some(mut buffer) = self.config.buffers.take(PAGE_BYTES) else {
            self.starved();
            return;
        };
        let header = Page {
            kind: PageKind::Header,
            pool: self.pool,
            generation: self.journal.generation + 1,
            number: 0,
            previous_crc: 0,
            length: self.journal.cursor.page,
        };
        self.journal.previous_crc = header.encode(&mut buffer.payload_mut()[..PAGE_BYTES]);
        self.journal.state = State::Checkpoint(Stage::Header(2));
        let bytes = buffer.freeze().payload(PAGE_BYTES);
        self.write_copies(self.journal.region ^ 1, 0, &bytes);
    }

    /// The next fact of a checkpoint.
    fn next_fact(&self, cursor: &mut Cursor) -> Option<Entry> {
        loop {
            if cursor.step == 0 {
                cursor.step = 1;
                let (incarnation, version) = (self.journal.incarnation, self.journal.version);
                return Some(Entry::Counters { incarnation, version });
            }
            let Some(state) = self.replicas.get(cursor.replica)? else {
                cursor.replica += 1;
                continue;
            };
            let replica = state.slot;
            let step = cursor.step;
            cursor.step += 1;
            return Some(match step {
                1 => Entry::Create {
                    replica,
                    incarnation: state.incarnation,
                    key: state.key,
                    block_size: state.block_size,
                    blocks: state.blocks,
                },
                2 => Entry::Seal { replica, epoch: state.sealed },
                3 if state.filling => {
                    cursor.step = 8;
                    Entry::Filling {
                        replica,
                        ordinal: state.first_ordinal,
                        through: state.kept_through,
                        keep_home: true,
                    }
                }
                3 => Entry::Trim { replica, ordinal: state.first_ordinal, position: state.trimmed },
                4 => Entry::Flushed {
                    replica,
                    ordinal: state.flushed_ordinal,
                    position: state.flushed,
                },
                5 => Entry::Commit { replica, seq: state.commit_durable },
                6 if state.on_media > state.commit_durable => {
                    Entry::OnMedia { replica, seq: state.on_media }
                }
                _ => {
                    cursor.step = 8;
                    if let Some(restart) = state.restarts.get(cursor.restart).copied() {
                        cursor.restart += 1;
                        return Some(Entry::Restart { replica, restart });
                    }
                    if let Some((chunk, place)) = state.chunks.next(cursor.chunk) {
                        cursor.chunk = u64::from(chunk) + 1;
                        return Some(Entry::Chunk { replica, chunk, place });
                    }
                    cursor.replica += 1;
                    cursor.step = 1;
                    cursor.restart = 0;
                    cursor.chunk = 0;
                    continue;
                }
            });
        }
    }
}
