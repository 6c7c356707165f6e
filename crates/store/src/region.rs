//! The metadata at a reopening: which region is the newest, and its pages, each from both copies.
//!
//! Pieces of both copies are read side by side, and looked at in the order of their pages: what a page of
//! the journal means depends on those before it. Of the room behind the journal's end a piece's length is looked
//! at, where a page that counts would show that its end was none.

use std::collections::VecDeque;

use base::BufferMut;
use base::limits::{PAGE_BYTES, PAYLOAD_BYTES_MAX};

use crate::api::{DiskError, StoreConfig};
use crate::bytes::Reader;
use crate::layout::PAGE;
use crate::metadata::{Entry, PAGE_HEADER_BYTES, Page, PageKind};
use crate::recovery::Stage;
use crate::store::{Phase, Store, Task};

/// Chunk versions that a reopening skips: those that an unfinished flush may have used.
const VERSIONS_SKIPPED: u32 = 1 << 16;
/// Pages read at a time.
const PIECE_PAGES: u32 = 32;
const _: () = assert!(PIECE_PAGES as usize * PAGE_BYTES == PAYLOAD_BYTES_MAX);
/// Reads that are under way at once.
const READS_MAX: u32 = 16;
/// Pieces that are read side by side at first.
const PIECES_FIRST: u32 = 3;

/// The header page of a region in one copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Header {
    Whole {
        generation: u64,
        pages: u32,
        crc: u32,
    },
    /// Wiped, or never written.
    Blank,
    /// Being written when power went, or rotten.
    Broken,
    Unread(DiskError),
}

/// One copy's part of a piece.
enum Part {
    Wanted,
    /// By the read of this number.
    Reading(u32),
    Done(Result<BufferMut, DiskError>),
}

/// What came of both copies of a piece.
type Copies = [Result<BufferMut, DiskError>; 2];

/// Pages that follow each other in the region.
struct Piece {
    /// Counted among the used pages: those of the checkpoint, then those of the journal.
    first: u32,
    count: u32,
    parts: [Part; 2],
}

impl Piece {
    const fn new(first: u32, count: u32) -> Self {
        Self { first, count, parts: [Part::Wanted, Part::Wanted] }
    }
}

/// What is known of the metadata so far.
#[derive(Default)]
pub(crate) struct Region {
    /// Those of both regions: copy × 2 + region.
    headers: [Option<Header>; 4],
    checkpoint_pages: u32,
    /// Pieces that are being read, in their order.
    pieces: VecDeque<Piece>,
    /// The page after those.
    next: u32,
    /// Pieces that have been looked at.
    taken: u32,
    /// Reads begun.
    reads: u32,
    /// What came of pages that could not be read, of each copy.
    errors: [Option<DiskError>; 2],
    /// Which copies had pages that were not whole and should have been.
    broken: [bool; 2],
    /// Once it has: the first page that need not be looked at.
    journal_ended: Option<u32>,
}

impl Region {
    /// Whether a page of this copy was not as it should have been.
    pub(crate) const fn was_damaged(&self, copy: usize) -> bool {
        self.broken[copy] || self.errors[copy].is_some()
    }

    /// Adds pieces up to the region's end, `total` pages, as long as few wait to be read: the more there were, the
    /// more there may be, but most journals end soon.
    fn plan(&mut self, total: u32) {
        let total = self.journal_ended.map_or(total, |end| end.min(total));
        let ahead = (PIECES_FIRST + self.taken).min(READS_MAX / 2);
        while self.next < total && self.pieces.len() < ahead as usize {
            // Checkpoint and journal are apart from each other.
            let used = self.checkpoint_pages;
            let end = if self.next < used { used } else { total };
            let count = PIECE_PAGES.min(end - self.next);
            self.pieces.push_back(Piece::new(self.next, count));
            self.next += count;
        }
    }

    /// This page is not the journal's any more, so those behind it should not be either. If it has been lost in
    /// both copies, pages behind it count. Only if as many in a row have been lost in both as a piece has, nothing
    /// shows that; all of the room would have to be read, which took half of an opening's time.
    fn end_journal(&mut self, page: u32) {
        if self.journal_ended.is_none() {
            let end = page + 1 + PIECE_PAGES;
            self.journal_ended = Some(end);
            // What is being read of them is waited for, and nothing else.
            self.pieces.retain(|piece| piece.first < end);
        }
    }

    /// Reads these pages again, one at a time, and what follows them after that.
    fn split(&mut self, first: u32, count: u32) {
        self.pieces = (first..first + count).map(|page| Piece::new(page, 1)).collect();
        self.next = first + count;
    }

    /// Notes what came of a read, unless its piece has been given up.
    fn note(&mut self, read: u32, result: Result<BufferMut, DiskError>) {
        let mut parts = self.pieces.iter_mut().flat_map(|piece| &mut piece.parts);
        let waiting = parts.find(|part| matches!(part, Part::Reading(number) if *number == read));
        if let Some(part) = waiting {
            *part = Part::Done(result);
        }
    }

    /// The first piece, if both copies of it have come: its first page, its length in pages, and they.
    fn take_first(&mut self) -> Option<(u32, u32, Copies)> {
        let is_done = |piece: &mut Piece| matches!(piece.parts, [Part::Done(_), Part::Done(_)]);
        let Piece { first, count, parts } = self.pieces.pop_front_if(is_done)?;
        let [Part::Done(one), Part::Done(other)] = parts else { return None };
        self.taken += 1;
        Some((first, count, [one, other]))
    }
}

impl Store {
    pub(crate) fn read_headers(&mut self) {
        while self.opening.next < 4 {
            let number = self.opening.next;
            let Some(buffer) = self.config.buffers.take(PAGE_BYTES) else { return self.starved() };
            let (device, offset) = self.journal.copies[number as usize / 2];
            let offset = offset + u64::from(number % 2) * self.geometry.region_bytes();
            self.opening.next += 1;
            self.opening.in_flight += 1;
            self.read(device, offset, buffer, PAGE_BYTES, Task::Opening { piece: number });
        }
        if self.opening.in_flight == 0 {
            self.judge_headers();
        }
    }

    pub(crate) fn header_read(&mut self, number: u32, result: &Result<BufferMut, DiskError>) {
        let header = match result {
            Ok(buffer) => self.header_of(&buffer.payload()[..PAGE_BYTES]),
            Err(error) => Header::Unread(*error),
        };
        self.opening.region.headers[number as usize] = Some(header);
    }

    fn header_of(&self, bytes: &[u8]) -> Header {
        match Page::decode(bytes, PageKind::Header, self.pool) {
            Some((page, crc)) => {
                Header::Whole { generation: page.generation, pages: page.length, crc }
            }
            None if is_blank(bytes) => Header::Blank,
            None => Header::Broken,
        }
    }

    fn judge_headers(&mut self) {
        let headers = self.opening.region.headers.map(|header| header.expect("all were read"));
        let of_region = |region: usize| [headers[region], headers[2 + region]];
        let error = |header| match header {
            Header::Unread(error) => Some(error),
            Header::Whole { .. } | Header::Blank | Header::Broken => None,
        };
        let newest = (0..2_u64)
            .zip([of_region(0), of_region(1)])
            .flat_map(|(region, copies)| copies.map(|header| (region, header)))
            .filter_map(|(region, header)| match header {
                Header::Whole { generation, pages, crc } => Some((generation, region, pages, crc)),
                Header::Blank | Header::Broken | Header::Unread(_) => None,
            })
            .max();
        let Some((generation, region, pages, crc)) = newest else {
            let either = [0, 2].map(|copy| error(headers[copy]).or(error(headers[copy + 1])));
            return self.refuse_copies("no checkpoint header is whole", either);
        };
        // The other region is the newer one unless a copy of its header says that it is not. What is
        // whole is older, and a header is on media in both copies before anything counts there.
        let other = of_region(usize::from(region == 0));
        let is_older = |header: &Header| matches!(header, Header::Whole { .. } | Header::Blank);
        let errors = other.map(error);
        if errors != [None; 2] && !other.iter().any(is_older) {
            return self.refuse_copies("a checkpoint may be newer than all that is whole", errors);
        }
        if pages > self.geometry.checkpoint_pages {
            return self.refuse_metadata("the checkpoint header states an impossible length");
        }
        self.journal.generation = generation;
        self.journal.region = region;
        self.journal.previous_crc = crc;
        self.opening.region.checkpoint_pages = pages;
        self.opening.stage = Stage::Pages;
    }

    /// Reads the region's next pieces: checkpoint pages, then journal pages, each from both copies.
    pub(crate) fn read_region(&mut self) {
        let region = &mut self.opening.region;
        region.plan(region.checkpoint_pages + self.geometry.journal_pages);
        if region.pieces.is_empty() {
            // Reads of pieces that were given up must not come while segments are read.
            if self.opening.in_flight == 0 {
                self.region_read();
            }
            return;
        }
        for at in 0..self.opening.region.pieces.len() {
            for copy in 0..2 {
                if !self.read_part(at, copy) {
                    return;
                }
            }
        }
    }

    /// False if no more can be read now.
    fn read_part(&mut self, at: usize, copy: usize) -> bool {
        let Piece { first, count, ref parts } = self.opening.region.pieces[at];
        if !matches!(parts[copy], Part::Wanted) {
            return true;
        }
        // The first one waits for nobody. Those after it leave the others' buffers alone.
        let few = self.config.buffers.available().1 <= StoreConfig::LARGE_BUFFERS_MIN / 2;
        let in_flight = self.opening.in_flight;
        if in_flight >= READS_MAX || (few && in_flight > 0) {
            return false;
        }
        let length = count as usize * PAGE_BYTES;
        let Some(buffer) = self.config.buffers.take(length) else {
            self.starved();
            return false;
        };
        let region = &mut self.opening.region;
        region.reads = region.reads.wrapping_add(1);
        let read = region.reads;
        region.pieces[at].parts[copy] = Part::Reading(read);
        let used = region.checkpoint_pages;
        let page = if first < used { first } else { self.geometry.checkpoint_pages + first - used };
        let (device, offset) = self.journal.copies[copy];
        // The first page is the header.
        let offset = offset
            + self.journal.region * self.geometry.region_bytes()
            + (1 + u64::from(page)) * PAGE;
        self.opening.in_flight += 1;
        self.read(device, offset, buffer, length, Task::Opening { piece: read });
        true
    }

    /// Some pages were read. Looks at those that all before them were looked at.
    pub(crate) fn region_part_read(&mut self, read: u32, result: Result<BufferMut, DiskError>) {
        self.opening.region.note(read, result);
        while self.phase == Phase::Opening {
            let Some((first, count, copies)) = self.opening.region.take_first() else { return };
            self.take_piece(first, count, &copies);
        }
    }

    fn take_piece(&mut self, first: u32, count: u32, copies: &Copies) {
        let region = &mut self.opening.region;
        let errors = copies.each_ref().map(|copy| copy.as_ref().err().copied());
        if count > 1 && errors != [None; 2] {
            // A sector that cannot be read is no reason to do without those beside it.
            return region.split(first, count);
        }
        for (known, error) in region.errors.iter_mut().zip(errors) {
            *known = known.or(error);
        }
        let used = region.checkpoint_pages;
        for number in first..first + count {
            let at = (number - first) as usize * PAGE_BYTES;
            let pages = copies.each_ref().map(|copy| {
                let buffer = copy.as_ref().ok()?;
                Some(&buffer.payload()[at..at + PAGE_BYTES])
            });
            let good = if number < used {
                self.take_checkpoint_page(number, pages)
            } else {
                self.take_journal_page(number - used, pages)
            };
            if let Err(what) = good {
                return self.refuse_copies(what, self.opening.region.errors);
            }
        }
    }

    fn take_checkpoint_page(
        &mut self,
        number: u32,
        copies: [Option<&[u8]>; 2],
    ) -> Result<(), &'static str> {
        let generation = self.journal.generation;
        let mut whole = None;
        for (copy, bytes) in copies.into_iter().enumerate() {
            let Some(bytes) = bytes else { continue };
            match Page::decode(bytes, PageKind::Checkpoint, self.pool) {
                Some((page, _))
                    if page.generation == generation && page.number == u64::from(number) =>
                {
                    whole = Some((bytes, page.length));
                }
                Some(_) | None => self.opening.region.broken[copy] = true,
            }
        }
        let (bytes, length) = whole.ok_or("a page of the checkpoint is lost in both copies")?;
        self.take_entries(bytes, length)
    }

    fn take_journal_page(
        &mut self,
        number: u32,
        copies: [Option<&[u8]>; 2],
    ) -> Result<(), &'static str> {
        for bytes in copies.into_iter().flatten() {
            let Some((page, crc)) = Page::decode(bytes, PageKind::Journal, self.pool) else {
                continue;
            };
            if page.generation != self.journal.generation || page.number != u64::from(number) {
                continue;
            }
            if self.opening.region.journal_ended.is_some() {
                // A commit was whole before the next one was begun.
                return Err("a page of the journal is lost in both copies");
            }
            if page.previous_crc == self.journal.previous_crc {
                self.journal.previous_crc = crc;
                return self.take_entries(bytes, page.length);
            }
        }
        // What cannot be read may be the next page, unless the other copy says that it is not: a page
        // is on media in both before anything in it counts. What is neither whole nor as it was
        // before says nothing: it may have been cut off, or have been whole and be rotten.
        let unread = copies.contains(&None);
        let is_older = |bytes: &[u8]| {
            let page = Page::decode(bytes, PageKind::Journal, self.pool);
            is_blank(bytes)
                || page.is_some_and(|(page, _)| page.generation < self.journal.generation)
        };
        let region = &mut self.opening.region;
        let known = region.journal_ended.is_some() || copies.into_iter().flatten().any(is_older);
        if unread && !known {
            return Err("the journal may go on after all that is whole");
        }
        region.end_journal(region.checkpoint_pages + number);
        Ok(())
    }

    fn take_entries(&mut self, page: &[u8], length: u32) -> Result<(), &'static str> {
        let mut reader = Reader::new(&page[PAGE_HEADER_BYTES..PAGE_HEADER_BYTES + length as usize]);
        while !reader.is_empty() {
            let entry = Entry::decode(&mut reader).ok_or("an entry is of an unknown kind")?;
            if !self.apply_entry(entry) {
                return Err("an entry contradicts those before it");
            }
        }
        Ok(())
    }

    fn region_read(&mut self) {
        self.journal.version = self.journal.version.wrapping_add(VERSIONS_SKIPPED);
        let segments = self.segments.all.len();
        self.opening.segment_headers = vec![None; segments];
        self.take_inheritance();
        self.opening.next = 0;
        self.opening.stage = Stage::Segments;
    }
}

fn is_blank(page: &[u8]) -> bool {
    page.iter().all(|byte| *byte == 0)
}
