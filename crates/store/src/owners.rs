//! Whose each segment of the log is: found out at a reopening.
//!
//! A segment's header says so; if that is lost, its first batch does; if that is lost as well, any other
//! batch of it that is whole. What such a batch states of what was on media must not be overlooked, or the log
//! would end before the segment without a word. Only a segment that begins with something like a header, or
//! whose beginning cannot be read, is searched for one: to search all free ones would be to read the whole log.

use base::BufferMut;
use base::limits::{PAGE_BYTES, PAYLOAD_BYTES_MAX};

use crate::api::DiskError;
use crate::batch::{
    BATCH_HEADER_PAGES_MAX, Owner, SegmentHeader, resembles_header, segment_header,
    segment_header_by_batch,
};
use crate::layout::PAGE;
use crate::recovery::Stage;
use crate::store::{Store, Task};

/// Segment headers read at a time.
const HEADER_READS_MAX: u32 = 16;
/// Bytes at a segment's beginning that are read of all: its header, and the page by which a batch is known that
/// could stand in for a lost one.
const FIRST_BYTES: usize = 2 * PAGE_BYTES;
/// Bytes of a segment's header and of the first batch's.
const HEADER_BYTES: usize = (1 + BATCH_HEADER_PAGES_MAX) * PAGE_BYTES;
/// Bytes that are searched at a time.
const WINDOW_BYTES: usize = PAYLOAD_BYTES_MAX;
/// Each window begins with as many bytes of the one before: a batch header may have begun there and not ended.
const OVERLAP_BYTES: usize = (BATCH_HEADER_PAGES_MAX - 1) * PAGE_BYTES;
const _: () = assert!(WINDOW_BYTES >= HEADER_BYTES);
const _: () = assert!(WINDOW_BYTES as u64 <= crate::layout::SEGMENT_BYTES_MIN);

/// A segment that is being searched for something that says whose it is.
pub(crate) struct Search {
    segment: u32,
    /// The first page of the window.
    page: u32,
    /// What is in the window. What cannot be read is zero.
    window: Vec<u8>,
    /// The window cannot be read at once: the page of it that is read now.
    single: Option<usize>,
}

impl Search {
    /// The part of the window that is to be read now, as offset and length in bytes.
    fn wanted(&self) -> (usize, usize) {
        match self.single {
            None => (0, self.window.len()),
            Some(page) => (page * PAGE_BYTES, PAGE_BYTES),
        }
    }

    /// What was wanted has been read. True if that was the last of the window.
    fn take(&mut self, result: &Result<BufferMut, DiskError>) -> bool {
        let (at, length) = self.wanted();
        let part = &mut self.window[at..at + length];
        match result {
            Ok(buffer) => part.copy_from_slice(&buffer.payload()[..length]),
            Err(_) => part.fill(0),
        }
        self.single = match self.single {
            None if result.is_err() => Some(0),
            None => return true,
            Some(page) => Some(page + 1),
        };
        self.wanted().0 == self.window.len()
    }
}

impl Store {
    /// Reads the beginnings of all segments that are not known, then more of those that do not say enough.
    pub(crate) fn read_segment_headers(&mut self) {
        let all = u32::try_from(self.segments.all.len()).expect("segments are counted in 32 bits");
        while self.opening.in_flight < HEADER_READS_MAX
            && let Some(segment) = self.opening.known.segment(self.opening.next, all)
        {
            if !self.read_segment_bytes(segment, 0, FIRST_BYTES) {
                return;
            }
            self.opening.next += 1;
        }
        if self.opening.in_flight > 0 {
            return;
        }
        if self.opening.search.is_none() {
            self.opening.search = self.opening.unclear.pop().map(|segment| Search {
                segment,
                page: 0,
                window: vec![0; WINDOW_BYTES],
                single: None,
            });
        }
        if let Some(search) = &self.opening.search {
            let (at, length) = search.wanted();
            let offset = u64::from(search.page) * PAGE + at as u64;
            self.read_segment_bytes(search.segment, offset, length);
        } else {
            self.assign_segments();
            self.opening.stage = Stage::Replay;
        }
    }

    /// False if memory was short.
    fn read_segment_bytes(&mut self, segment: u32, offset: u64, length: usize) -> bool {
        let Some(buffer) = self.config.buffers.take(length) else {
            self.starved();
            return false;
        };
        self.opening.in_flight += 1;
        let device = self.segments.all[segment as usize].device;
        let offset = self.segment_offset(segment) + offset;
        self.read(device, offset, buffer, length, Task::Opening { piece: segment });
        true
    }

    pub(crate) fn segment_pages_read(
        &mut self,
        segment: u32,
        result: Result<BufferMut, DiskError>,
    ) {
        // While a segment is searched, nothing else is read.
        if let Some(mut search) = self.opening.search.take() {
            if !search.take(&result) || !self.search_window(&mut search) {
                self.opening.search = Some(search);
            }
            return;
        }
        let Ok(buffer) = result else { return self.opening.unclear.push(segment) };
        let pages = &buffer.payload()[..FIRST_BYTES];
        let header = segment_header(pages, segment);
        let mut first = pages.chunks_exact(PAGE_BYTES);
        if header.is_none() && first.any(|page| resembles_header(page, self.pool)) {
            self.opening.unclear.push(segment);
        }
        self.opening.segment_headers[segment as usize] = header;
    }

    /// Looks through what was read of a segment. True if that says whose it is, or nothing does.
    fn search_window(&mut self, search: &mut Search) -> bool {
        let segment = search.segment;
        let mut header = None;
        if search.page == 0 {
            header = segment_header(&search.window[..HEADER_BYTES], segment);
        }
        let header = header.or_else(|| self.live_batch(search));
        self.opening.segment_headers[segment as usize] = header;
        let pages = self.segments.pages_per_segment();
        let end = search.page + pages_of(search.window.len());
        if header.is_some() || end == pages {
            return true;
        }
        search.page = end - pages_of(OVERLAP_BYTES);
        let left = (pages - search.page) as usize * PAGE_BYTES;
        search.window.resize(left.min(WINDOW_BYTES), 0);
        search.single = None;
        false
    }

    /// The first batch in the window that is part of some replica's log. What was there before the segment was
    /// used again is not.
    fn live_batch(&self, search: &Search) -> Option<SegmentHeader> {
        let pages = pages_of(search.window.len());
        (0..pages).find_map(|page| {
            let bytes = &search.window[page as usize * PAGE_BYTES..];
            let header = segment_header_by_batch(bytes, search.page + page)?;
            let slot = self.slot_of(&header.owner, search.segment)?;
            self.replica_ref(slot).has_ordinal(header.owner.ordinal).then_some(header)
        })
    }

    /// The replica that something in a segment belongs to.
    pub(crate) fn slot_of(&self, owner: &Owner, segment: u32) -> Option<u16> {
        let slot = *self.by_key.get(&owner.key)?;
        let is_its_own = owner.pool == self.pool
            && owner.segment == segment
            && owner.incarnation == self.replica_ref(slot).incarnation;
        is_its_own.then_some(slot)
    }
}

fn pages_of(bytes: usize) -> u32 {
    u32::try_from(bytes / PAGE_BYTES).expect("pages of a window")
}
