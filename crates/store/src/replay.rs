//! Replay: reads a replica's log from its first segment that is not home and rebuilds the index
//! from it; at a reopening, and after a truncation.
//!
//! Batches form a chain: consecutive numbers, consecutive seqs, each with its predecessor's CRC.
//! Where the chain breaks, what follows decides. Every batch states a seq through which the log
//! was on media when it was written; if the break is at or below the highest such seq, data that
//! was durable is gone: the replica is damaged. If it is above, it is what a crash leaves of
//! writes that were never synced: the log ends there. The same goes for a payload that does not
//! match its record.

use base::checksum::crc32c;
use base::limits::{PAGE_BYTES, PAYLOAD_BYTES_MAX};
use base::planted::{self, Bug};
use base::record::block_crc;
use base::{BufferMut, BufferPool, Position, RecordHeader, RecordKind, Seq};
use std::collections::VecDeque;

use crate::api::{DiskError, Notice, Output, StoreConfig};
use crate::batch::{
    BATCH_FIXED_BYTES, BATCH_HEADER_PAGES_MAX, BATCH_LENGTH_OFFSET, BATCH_MAGIC, BatchHeader,
    Owner, SegmentHeader, payload_pages,
};
use crate::bytes::u32_at;
use crate::layout::PAGE;
use crate::metadata::Restart;
use crate::segments::SegmentState;
use crate::store::{Phase, Store, Task};

const WINDOW_PAGES: u32 = 32;
/// Windows that are read before they are wanted, when a pool is opened: its guests wait.
const AHEAD_WINDOWS: usize = 8;
const _: () = assert!(WINDOW_PAGES as usize * PAGE_BYTES == PAYLOAD_BYTES_MAX);

/// A segment to be replayed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Link {
    pub(crate) segment: u32,
    pub(crate) ordinal: u64,
    /// As found on the device; `None`: known to follow.
    pub(crate) header: Option<SegmentHeader>,
    /// A restart that ended this segment.
    pub(crate) restart: Option<Restart>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// Everything has followed so far.
    Chain,
    /// The chain is broken; looking for evidence of what was durable.
    Survey,
    /// Durable data is lost: whatever is whole is taken.
    Salvage,
}

#[derive(Clone, Copy, Debug)]
struct Break {
    before: Position,
    link: usize,
    page: u32,
}

struct Current {
    header: BatchHeader,
    crc: u32,
    headers: Vec<RecordHeader>,
    /// Next page of payload to verify.
    page: u32,
}

/// Pages of a segment in memory.
struct Window {
    link: usize,
    page: u32,
    count: u32,
    buffer: BufferMut,
    unreadable: bool,
}

/// A window that will be wanted, as far as is known.
struct Ahead {
    read: u64,
    link: usize,
    page: u32,
    count: u32,
    /// What came of it.
    done: Option<Result<BufferMut, DiskError>>,
}

/// A replay under way.
pub(crate) struct Replay {
    pub(crate) slot: u16,
    pub(crate) start: Position,
    pub(crate) links: Vec<Link>,
    /// Records after this one do not count.
    pub(crate) limit: Option<Seq>,
    /// The last record, if whoever wrote it has said so.
    told: Option<Position>,
    link: usize,
    page: u32,
    last: Position,
    number: Option<u64>,
    crc: Option<u32>,
    mode: Mode,
    broken: Option<Break>,
    durable: Seq,
    commit: Seq,
    bad: Vec<Seq>,
    current: Option<Current>,
    header_bytes: Vec<u8>,
    window: Option<Window>,
    /// A longer read failed: one page at a time up to this page of this link.
    fine: Option<(usize, u32)>,
    /// Pages that the next read must have.
    want: u32,
    /// The chain broke at a page that cannot be read: no crash does that.
    unreadable: bool,
    /// The read that is waited for, and the link, first page and pages of its window.
    reading: Option<(u64, usize, u32, u32)>,
    /// Windows after that one, as they follow each other.
    ahead: VecDeque<Ahead>,
    /// Link and page after the last batch that counts.
    end: (usize, u32),
    next_number: u64,
}

/// How a replay ended.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Replayed {
    pub(crate) last: Position,
    pub(crate) commit: Seq,
    pub(crate) next_number: u64,
    /// The last link that counts, and its end in pages; `None`: no link counts.
    pub(crate) end: Option<(usize, u32)>,
    pub(crate) damaged: bool,
}

enum Step {
    Again,
    Read,
    End,
}

impl Replay {
    pub(crate) fn new(slot: u16, start: Position, durable: Seq, links: Vec<Link>) -> Self {
        Self {
            slot,
            start,
            links,
            limit: None,
            told: None,
            link: 0,
            page: 1,
            last: start,
            number: None,
            crc: None,
            mode: Mode::Chain,
            broken: None,
            durable,
            commit: Seq::ZERO,
            bad: Vec::new(),
            current: None,
            header_bytes: Vec::new(),
            window: None,
            fine: None,
            want: 1,
            unreadable: false,
            reading: None,
            ahead: VecDeque::new(),
            end: (0, 1),
            next_number: 1,
        }
    }

    /// The log ends with this record: all of it was written, and nothing after it is looked at.
    pub(crate) fn end_at(&mut self, last: Position) {
        if last.seq >= self.start.seq {
            self.told = Some(last);
            self.limit = Some(last.seq);
            self.durable = self.durable.max(last.seq);
        }
    }

    /// Whether the last record that counts has been read.
    fn is_at_limit(&mut self) -> bool {
        if self.limit.is_none_or(|limit| self.last.seq < limit) {
            return false;
        }
        if self.told.take_if(|told| *told != self.last).is_some() {
            // That was said of another log.
            self.limit = None;
        }
        self.limit.is_some()
    }

    fn rewind(&mut self) {
        self.link = 0;
        self.page = 1;
        self.last = self.start;
        self.number = None;
        self.crc = None;
        self.mode = Mode::Chain;
        self.broken = None;
        self.unreadable = false;
        self.bad.clear();
        self.current = None;
        self.end = (0, 1);
    }

    /// Pages of a link's segment that may hold batches.
    fn link_end(&self, link: usize, pages_per_segment: u32) -> u32 {
        match self.links[link].restart {
            Some(restart) => restart.end_page.min(pages_per_segment),
            None => pages_per_segment,
        }
    }

    fn window_page(&self, page: u32) -> Option<&[u8]> {
        let window = self.window.as_ref()?;
        if window.link != self.link || page < window.page || page >= window.page + window.count {
            return None;
        }
        let at = (page - window.page) as usize * PAGE_BYTES;
        Some(&window.buffer.payload()[at..window.count as usize * PAGE_BYTES])
    }

    /// Records of the current segment after this one do not count.
    fn limit_here(&self) -> Seq {
        let keep = self.links[self.link].restart.map(|restart| restart.keep.seq);
        self.limit.unwrap_or(Seq(u64::MAX)).min(keep.unwrap_or(Seq(u64::MAX)))
    }

    /// The first segment must take up where the home's data ends.
    fn check_first_link(&mut self) {
        let Some(header) = self.links.first().and_then(|first| first.header) else { return };
        let follows =
            header.first_seq == self.start.seq.next() && header.previous_epoch == self.start.epoch;
        if !follows {
            self.page = 0;
            self.break_here();
        }
    }

    /// Goes on in the next segment.
    fn next_link(&mut self) {
        self.link += 1;
        self.page = 1;
    }

    /// Whether the segment after the current one takes up where the log is.
    fn next_follows(&self) -> bool {
        let Some(next) = self.links.get(self.link + 1) else { return false };
        let restarted = self.links[self.link].restart;
        match (next.header, restarted) {
            (header, Some(restart)) => {
                restart.keep == self.last
                    && restart.ordinal == next.ordinal
                    && header.is_none_or(|header| header.first_seq == self.last.seq.next())
            }
            (None, None) => true,
            (Some(header), None) => {
                next.ordinal == self.links[self.link].ordinal + 1
                    && header.first_seq == self.last.seq.next()
                    && header.previous_epoch == self.last.epoch
                    && self.crc.is_none_or(|crc| crc == header.previous_crc)
            }
        }
    }

    /// A window has been read, or cannot be: then page by page.
    fn take_window(
        &mut self,
        (link, page, count): (usize, u32, u32),
        result: Result<BufferMut, DiskError>,
        buffers: &mut BufferPool,
    ) {
        let fine = self.fine.is_some_and(|(fine, end)| fine == link && page < end);
        if let Ok(buffer) = result {
            self.window = Some(Window { link, page, count, buffer, unreadable: false });
        } else if count > 1 && !fine {
            self.fine = Some((link, page + count));
        } else if let Some(mut buffer) = buffers.take(PAYLOAD_BYTES_MAX) {
            buffer.payload_mut().fill(0);
            self.window = Some(Window { link, page, count, buffer, unreadable: true });
        }
    }

    /// The current page does not go on with the chain.
    fn break_here(&mut self) {
        if self.mode == Mode::Chain {
            self.mode = Mode::Survey;
            self.unreadable = self.window.as_ref().is_some_and(|window| {
                window.unreadable && window.link == self.link && window.page == self.page
            });
            self.broken = Some(Break { before: self.last, link: self.link, page: self.page });
        }
        self.page += 1;
    }

    /// The link after the current one begins.
    fn enter_next(&mut self) {
        let restarted = self.links[self.link].restart.is_some();
        let follows = self.next_follows();
        if self.mode == Mode::Chain && !follows && self.link + 1 < self.links.len() {
            self.break_here();
        }
        self.next_link();
        if restarted {
            self.crc = None;
            self.number = None;
        }
    }
}

impl Store {
    /// Begins to replay. One replay is under way at a time.
    pub(crate) fn begin_replay(&mut self, mut replay: Replay) {
        assert!(self.replay.is_none(), "one replay at a time");
        if self.phase == Phase::Open {
            self.forget_index(replay.slot);
        }
        replay.check_first_link();
        self.replay = Some(replay);
    }

    /// Takes everything of a replica out of the index.
    pub(crate) fn forget_index(&mut self, slot: u16) {
        let segments = &mut self.segments;
        self.index.remove_replica(slot, |sector| {
            let segment = segments.of(sector);
            segments.all[segment].live -= 1;
        });
        self.replica_mut(slot).extents.clear();
    }

    pub(crate) fn pump_replay(&mut self) {
        let Some(mut replay) = self.replay.take() else { return };
        if replay.reading.is_some() {
            self.replay = Some(replay);
            return;
        }
        loop {
            match self.replay_step(&mut replay) {
                Step::Again => {}
                Step::Read => {
                    if !self.next_window(&mut replay) {
                        self.replay = Some(replay);
                        return;
                    }
                }
                Step::End => match self.conclude(&mut replay) {
                    None => {}
                    Some(replayed) => return self.replayed(&replay, replayed),
                },
            }
        }
    }

    /// Takes or reads the window that is wanted now, and reads ahead. False if it is not there yet.
    fn next_window(&mut self, replay: &mut Replay) -> bool {
        replay.window = None;
        let link = replay.link;
        let page = replay.current.as_ref().map_or(replay.page, |current| current.page);
        let fine = replay.fine.is_some_and(|(at, end)| at == link && page < end);
        let most = if fine { replay.want } else { WINDOW_PAGES };
        let count = most.min(self.segments.pages_per_segment() - page);
        replay.want = 1;
        let wanted = replay
            .ahead
            .pop_front_if(|ahead| (ahead.link, ahead.page, ahead.count) == (link, page, count));
        let read = match wanted {
            Some(Ahead { done: Some(result), .. }) => {
                replay.take_window((link, page, count), result, &mut self.config.buffers);
                None
            }
            Some(ahead) => Some(ahead.read),
            None => {
                // The log goes on elsewhere than it seemed. What is on its way comes for nobody.
                replay.ahead.clear();
                let read = self.read_pages(replay, link, page, count);
                if read.is_none() {
                    self.starved();
                    return false;
                }
                read
            }
        };
        replay.reading = read.map(|read| (read, link, page, count));
        if !fine && self.phase == Phase::Opening {
            self.read_ahead(replay, (link, page + count));
        }
        read.is_none()
    }

    /// Reads what follows the window that ends at `end`, and what is read ahead already.
    fn read_ahead(&mut self, replay: &mut Replay, end: (usize, u32)) {
        let pages = self.segments.pages_per_segment();
        let last = replay.ahead.back().map(|ahead| (ahead.link, ahead.page + ahead.count));
        let (mut link, mut page) = last.unwrap_or(end);
        while replay.ahead.len() < AHEAD_WINDOWS && link < replay.links.len() {
            if page >= replay.link_end(link, pages) {
                (link, page) = (link + 1, 1);
                continue;
            }
            if self.config.buffers.available().1 <= StoreConfig::LARGE_BUFFERS_MIN / 2 {
                return;
            }
            let count = WINDOW_PAGES.min(pages - page);
            let Some(read) = self.read_pages(replay, link, page, count) else { return };
            replay.ahead.push_back(Ahead { read, link, page, count, done: None });
            page += count;
        }
    }

    /// Reads pages of a link's segment; `None` without a buffer.
    fn read_pages(&mut self, replay: &Replay, link: usize, page: u32, count: u32) -> Option<u64> {
        let buffer = self.config.buffers.take(PAYLOAD_BYTES_MAX)?;
        let segment = replay.links[link].segment;
        let device = self.segments.all[segment as usize].device;
        let offset = self.segment_offset(segment) + u64::from(page) * PAGE;
        // Not only of this replay: what an earlier one read ahead may still come.
        self.replay_reads += 1;
        let read = self.replay_reads;
        self.read(device, offset, buffer, count as usize * PAGE_BYTES, Task::Replay { read });
        Some(read)
    }

    pub(crate) fn replay_read(&mut self, read: u64, result: Result<BufferMut, DiskError>) {
        let Some(replay) = &mut self.replay else { return };
        if let Some((awaited, link, page, count)) = replay.reading
            && awaited == read
        {
            replay.reading = None;
            replay.take_window((link, page, count), result, &mut self.config.buffers);
        } else if let Some(ahead) = replay.ahead.iter_mut().find(|ahead| ahead.read == read) {
            ahead.done = Some(result);
        }
    }

    fn replay_step(&mut self, replay: &mut Replay) -> Step {
        if replay.current.is_some() {
            return self.verify_payload(replay);
        }
        if replay.link >= replay.links.len() || replay.is_at_limit() {
            return Step::End;
        }
        let pages = self.segments.pages_per_segment();
        if replay.page >= replay.link_end(replay.link, pages) {
            if replay.links[replay.link].restart.is_some_and(|restart| restart.keep != replay.last)
            {
                replay.break_here();
            }
            replay.enter_next();
            return Step::Again;
        }
        let Some(bytes) = replay.window_page(replay.page) else { return Step::Read };
        let wanted = header_pages_wanted(bytes).min(pages - replay.page);
        if bytes.len() < wanted as usize * PAGE_BYTES {
            replay.want = wanted;
            return Step::Read;
        }
        let link = replay.links[replay.link];
        let replica = self.replica_ref(replay.slot);
        let owner = Owner {
            pool: self.pool,
            key: replica.key,
            incarnation: replica.incarnation,
            segment: link.segment,
            ordinal: link.ordinal,
        };
        match BatchHeader::decode(bytes, &owner, replay.page) {
            Some((header, crc)) if replay.page + header.pages() <= pages => {
                self.replay_batch(replay, header, crc);
            }
            Some(_) | None => {
                if replay.mode == Mode::Chain && replay.next_follows() && link.restart.is_none() {
                    replay.enter_next();
                } else {
                    replay.break_here();
                }
            }
        }
        Step::Again
    }

    /// A whole batch header: does it go on with the chain?
    fn replay_batch(&mut self, replay: &mut Replay, header: BatchHeader, crc: u32) {
        let follows = header.first_seq == replay.last.seq.next()
            && replay.number.is_none_or(|number| number == header.number)
            && replay.crc.is_none_or(|crc| crc == header.previous_crc);
        let bytes = replay.window_page(replay.page).expect("the header was found there");
        let bytes = bytes[..header.header_bytes as usize].to_vec();
        let headers = self.record_headers(replay.slot, &header, &bytes);
        let first_epoch = headers.as_ref().map(|headers| headers[0].previous_epoch);
        let follows = follows && first_epoch == Some(replay.last.epoch);
        let Some(headers) = headers else { return replay.break_here() };
        if !follows && replay.mode == Mode::Chain {
            return replay.break_here_before(header.durable);
        }
        replay.durable = replay.durable.max(header.durable);
        replay.commit = replay.commit.max(header.commit);
        if replay.mode == Mode::Survey {
            replay.page += header.pages();
            return;
        }
        replay.header_bytes = bytes;
        let page = replay.page + u32::from(header.header_pages);
        replay.current = Some(Current { header, crc, headers, page });
    }

    /// The headers of a batch's records, if they are what the batch says.
    fn record_headers(
        &self,
        slot: u16,
        batch: &BatchHeader,
        bytes: &[u8],
    ) -> Option<Vec<RecordHeader>> {
        let replica = self.replica_ref(slot);
        let mut headers: Vec<RecordHeader> = Vec::with_capacity(usize::from(batch.records));
        let mut at = BATCH_FIXED_BYTES;
        let mut pages = 0;
        let mut seq = batch.first_seq;
        for _ in 0..batch.records {
            let header = RecordHeader::decode(bytes.get(at..)?).ok()?;
            let previous = headers.last().map(|last| last.position.epoch);
            if header.key != replica.key
                || header.position.seq != seq
                || previous.is_some_and(|epoch| epoch != header.previous_epoch)
                || header.block_size != replica.block_size
                || header.lba.checked_add(header.blocks)?.0 > replica.blocks
            {
                return None;
            }
            at += header.header_bytes();
            pages += payload_pages(&header);
            seq = seq.next();
            headers.push(header);
        }
        (pages == batch.payload_pages && at == bytes.len()).then_some(headers)
    }

    fn verify_payload(&mut self, replay: &mut Replay) -> Step {
        let current = replay.current.as_ref().expect("a batch is being verified");
        let end = replay.page + current.header.pages();
        let mut page = current.page;
        while page < end {
            let Some(bytes) = replay.window_page(page) else {
                replay.current.as_mut().expect("as above").page = page;
                return Step::Read;
            };
            let current = replay.current.as_ref().expect("as above");
            if let Some(seq) = bad_page(current, &replay.header_bytes, replay.page, page, bytes)
                && seq <= replay.limit_here()
                // What cannot be read was not torn by a crash: that block is damaged, no more.
                && replay.window.as_ref().is_some_and(|window| !window.unreadable)
                && replay.bad.last() != Some(&seq)
                && !planted::is(Bug::TornTailAccepted)
            {
                replay.bad.push(seq);
            }
            page += 1;
        }
        self.take_batch(replay)
    }

    /// Lets a batch's records take effect.
    fn take_batch(&mut self, replay: &mut Replay) -> Step {
        let current = replay.current.take().expect("a batch was verified");
        let segment = replay.links[replay.link].segment;
        let mut page = replay.page + u32::from(current.header.header_pages);
        let mut at = BATCH_FIXED_BYTES;
        let limit = replay.limit_here();
        for header in &current.headers {
            if header.position.seq > limit {
                break;
            }
            let encoded = &replay.header_bytes[at..at + header.header_bytes()];
            let sector = self.segments.sector(segment, page);
            let (blocks, zeroes) = match header.kind {
                RecordKind::Write => (header.blocks.0, 0),
                RecordKind::Discard | RecordKind::WriteZeroes => (0, 1),
                RecordKind::EpochStart => (0, 0),
            };
            // After a truncation, what the segments were charged with before still holds.
            if self.phase == Phase::Opening {
                let sum = self.segments.blocks + u64::from(blocks);
                if sum > self.index.entries_max() as u64 {
                    // Cannot come from this store: it keeps a budget.
                    replay.broken = Some(Break { before: replay.start, link: 0, page: 1 });
                    return Step::End;
                }
                self.segments.charge(segment, blocks, zeroes);
            }
            self.index_record(replay.slot, header, sector, |block| block_crc(encoded, block));
            replay.last = header.position;
            // A truncation knows where its segments end, and scans must find their way meanwhile.
            if self.phase == Phase::Opening {
                let state = &mut self.segments.all[segment as usize];
                state.last_seq = header.position.seq;
                state.last_epoch = header.position.epoch;
            }
            at += header.header_bytes();
            page += payload_pages(header);
        }
        replay.page += current.header.pages();
        self.segments.all[segment as usize].pages = replay.page;
        replay.end = (replay.link, replay.page);
        replay.number = Some(current.header.number + 1);
        replay.next_number = current.header.number + 1;
        replay.crc = Some(current.crc);
        Step::Again
    }

    /// Everything has been read: is that the end? `None`: another round is needed.
    fn conclude(&mut self, replay: &mut Replay) -> Option<Replayed> {
        let salvaged = replay.mode == Mode::Salvage;
        if let Some(broken) = replay.broken
            && !salvaged
        {
            let salvage = !planted::is(Bug::DamageTakenForTear);
            if salvage && (broken.before.seq < replay.durable || replay.unreadable) {
                self.forget_index(replay.slot);
                self.recharge(replay);
                replay.rewind();
                replay.mode = Mode::Salvage;
                replay.link = broken.link;
                replay.page = broken.page;
                replay.broken = Some(broken);
                replay.last = broken.before;
                return None;
            }
            replay.broken = None;
        }
        let durable = replay.durable;
        let torn = replay.bad.iter().copied().filter(|seq| *seq > durable).min();
        if let Some(torn) = torn
            && torn <= replay.last.seq
            && !salvaged
        {
            // Only the headers of the last, unsynced batches have landed.
            self.forget_index(replay.slot);
            self.recharge(replay);
            let keep = Seq(torn.0 - 1);
            replay.rewind();
            (replay.limit, replay.told) = (Some(keep), None);
            if keep > replay.start.seq {
                return None;
            }
        }
        let counts = !replay.links.is_empty() && replay.end != (0, 1);
        Some(Replayed {
            last: replay.last,
            commit: replay.commit,
            next_number: replay.next_number,
            end: counts.then_some(replay.end),
            damaged: salvaged,
        })
    }

    fn recharge(&mut self, replay: &Replay) {
        if self.phase == Phase::Opening {
            for link in &replay.links {
                self.segments.uncharge(link.segment);
            }
        }
    }

    fn replayed(&mut self, replay: &Replay, replayed: Replayed) {
        if replayed.damaged {
            let replica = self.replica_mut(replay.slot);
            replica.damaged = true;
            let key = replica.key;
            self.output(Output::Notice(Notice::Damaged(key)));
        }
        for (number, link) in replay.links.iter().enumerate() {
            let counts = replayed.end.is_some_and(|(end, _)| number <= end);
            if counts || replayed.damaged {
                let state = &mut self.segments.all[link.segment as usize];
                if state.state == SegmentState::Settling {
                    self.segments.set_state(link.segment, SegmentState::Full);
                }
            }
        }
        match self.phase {
            Phase::Opening => self.opening_replayed(replay, replayed),
            Phase::Open => self.truncation_replayed(replay, replayed),
            Phase::Closed => {}
        }
    }
}

impl Replay {
    /// A whole batch that does not follow: evidence, but not part of the chain.
    fn break_here_before(&mut self, durable: Seq) {
        self.durable = self.durable.max(durable);
        self.break_here();
        // Look at the same page again, as a survey does.
        self.page -= 1;
    }
}

/// Pages that the header of a batch takes, if `bytes` begin with one; else one.
fn header_pages_wanted(bytes: &[u8]) -> u32 {
    if bytes[0..4] != BATCH_MAGIC {
        return 1;
    }
    let pages = u32_at(bytes, BATCH_LENGTH_OFFSET).div_ceil(4096);
    pages.clamp(1, u32::try_from(BATCH_HEADER_PAGES_MAX).expect("a few pages"))
}

/// The seq of the record whose payload in `page` does not match, if one does not.
fn bad_page(
    current: &Current,
    header_bytes: &[u8],
    batch_page: u32,
    page: u32,
    bytes: &[u8],
) -> Option<Seq> {
    let mut first = batch_page + u32::from(current.header.header_pages);
    let mut at = BATCH_FIXED_BYTES;
    for header in &current.headers {
        let pages = payload_pages(header);
        if page < first + pages {
            let block_bytes = header.block_size.bytes() as usize;
            let from = (page - first) as usize * PAGE_BYTES;
            let count = (header.payload_bytes() - from).min(PAGE_BYTES);
            let encoded = &header_bytes[at..at + header.header_bytes()];
            let good =
                bytes[..count].chunks_exact(block_bytes).enumerate().all(|(number, block)| {
                    crc32c(block) == block_crc(encoded, from / block_bytes + number)
                });
            return (!good).then_some(header.position.seq);
        }
        first += pages;
        at += header.header_bytes();
    }
    None
}
