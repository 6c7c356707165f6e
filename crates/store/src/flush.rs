//! The way home: which segments are flushed when, and what happens to them afterwards.
//!
//! A job takes the oldest segments of one replica, all of them committed and on media. Its waves
//! (see `wave`) move what is still current in them home. When nothing in the index points to
//! them any more they settle: a truncation could still want them back, because a newer version of
//! a block, which kept an older one from being flushed, may be above the commit seq. Once
//! everything that was written by then is committed, they are clean; they stay for scans until
//! their space is wanted, and are then trimmed, oldest first.

use base::planted::{self, Bug};
use base::time::earliest;
use base::{Instant, Position, Seq};
use core::time::Duration;

use crate::append::ZEROES_MAX;
use crate::home::ChunkMeta;
use crate::journal::After;
use crate::metadata::Entry;
use crate::replica::{Exclusive, Obstacle, Replica};
use crate::segments::SegmentState;
use crate::store::Store;
use crate::wave::Wave;

pub(crate) use crate::wave::MoverId;

/// How long to wait before trying again when home was full.
const HOME_FULL_RETRY: Duration = Duration::from_millis(100);
/// What is on media and settled is noted in the journal once no append has come for this long.
const NOTE_AFTER: Duration = Duration::from_millis(50);
/// How much log may be left, and how often to look, while everything is to go home soon.
const HASTE_LEAVES_BYTES: u64 = 2 << 20;
const HASTE_TURN: Duration = Duration::from_millis(10);
/// Index slots looked at in one turn.
const SWEEP_SLOTS: usize = 64 * 1024;

/// Segments of one replica on their way home.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Job {
    pub(crate) slot: u16,
    pub(crate) last_ordinal: u64,
    pub(crate) through: Position,
    started: bool,
    cursor: usize,
    extent_cursor: u64,
}

/// The state of flushing.
#[derive(Default)]
pub(crate) struct Flush {
    pub(crate) job: Option<Job>,
    pub(crate) wave: Wave,
    /// The last chunk that was wanted could not be had.
    pub(crate) home_full: bool,
    /// That was in this job.
    pub(crate) blocked: bool,
    pub(crate) spare_meta: Vec<ChunkMeta>,
    retry_at: Option<Instant>,
    check_at: Option<Instant>,
    /// Until then, everything goes home as soon as it may.
    pub(crate) hasten_until: Option<Instant>,
    /// What is settled may have to be noted then.
    note_at: Option<Instant>,
    /// Replicas with settling segments.
    settling: Vec<u16>,
    pub(crate) jobs_done: u64,
    nothing: Nothing,
    pub(crate) searches: u64,
}

/// What the last searches did not find in any replica, while nothing happens that could change that.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
enum Nothing {
    #[default]
    Unknown,
    /// No full segment may go home.
    Full,
    /// No segment at all may go home.
    Any,
}

impl Flush {
    pub(crate) fn is_busy_with(&self, slot: u16) -> bool {
        self.job.is_some_and(|job| job.slot == slot)
    }
}

impl Store {
    pub(crate) fn flush_deadline(&self) -> Option<Instant> {
        // While a job is under way its completions drive it.
        if self.failed.is_some() {
            return None;
        }
        if self.flush.job.is_some() {
            return self.flush.note_at;
        }
        let check = if self.segments.dirty > 0 { self.flush.check_at } else { None };
        earliest(self.flush.retry_at.or(check), self.flush.note_at)
    }

    /// Room is short: flushing may use more of the disks.
    pub(crate) fn is_pressed(&self) -> bool {
        let all = self.segments.all.len();
        self.stalled.is_some()
            || (self.segments.free.len() + self.segments.clean) * 8 < all
            || self.segments.blocks * 4 > self.index.entries_max() as u64 * 3
    }

    /// A replica may have been told that more of its log is settled.
    pub(crate) fn note_settled_later(&mut self) {
        self.flush.note_at.get_or_insert(self.now + NOTE_AFTER);
    }

    /// Notes in the journal what is on media, and what of that is settled, if no append comes that would say so
    /// in the log. Without, nothing tells rot in a log's last batches from writes that a crash cut off, and
    /// a recovery would end the log before them without a word.
    fn note_settled(&mut self) {
        if self.flush.note_at.is_none_or(|at| at > self.now) {
            return;
        }
        let quiet_at = self.last_append + NOTE_AFTER;
        self.flush.note_at = (quiet_at > self.now).then_some(quiet_at);
        if self.flush.note_at.is_some() {
            return;
        }
        for slot in 0..self.replicas.len() {
            let Some(replica) = &mut self.replicas[slot] else { continue };
            if replica.exclusive != Exclusive::None || replica.damaged || replica.filling {
                continue;
            }
            let (slot, durable) = (replica.slot, replica.durable);
            let settled = replica.commit.min(durable);
            if settled > replica.noted {
                replica.noted = settled;
                if settled > replica.commit_durable {
                    let entry = Entry::Commit { replica: slot, seq: settled };
                    self.journal.push(entry, After::Nothing);
                }
            }
            // What is settled is on media, too.
            if durable > settled && durable > self.replica_ref(slot).noted_on_media {
                self.note_on_media(slot, durable);
            }
        }
    }

    /// Notes in the journal that the log is on media through `seq`, and that it is not missed after that.
    pub(crate) fn note_on_media(&mut self, slot: u16, seq: Seq) {
        self.replica_mut(slot).noted_on_media = seq;
        self.journal.push(Entry::OnMedia { replica: slot, seq }, After::Nothing);
    }

    pub(crate) fn pump_flush(&mut self) {
        self.note_settled();
        self.pump_settling();
        if self.flush.retry_at.is_some_and(|at| at > self.now) {
            return;
        }
        self.flush.retry_at = None;
        if self.flush.job.is_none() && !self.start_job() {
            return;
        }
        self.pump_wave();
    }

    /// The next segments to take home: of which replica, and the last of them.
    ///
    /// What there is a reason to flush may have to stay where it is for long, as does the log of a damaged
    /// replica, or what nobody says is settled. So one reason without a find does not hide the others.
    fn next_job(&mut self) -> Option<(u16, u32)> {
        if self.segments.dirty == 0 && self.segments.zeroes == 0 {
            return None;
        }
        let due = self.is_check_due();
        if self.is_filling_up() {
            return self.search(false).or_else(|| self.search(true));
        }
        if self.hastens() {
            self.flush.check_at = Some(self.now + HASTE_TURN);
            let found = self.search(true);
            return self.with_more_to_come(found);
        }
        let policy = self.config.flush;
        if due && let Some(found) = self.candidate(true, policy.age) {
            return self.with_more_to_come(Some(found));
        }
        // An opening would take too long.
        if self.segments.full as u64 * self.segments.segment_bytes > policy.full_bytes
            && let Some(found) = self.search(false)
        {
            return Some(found);
        }
        if due && self.last_append + policy.idle <= self.now {
            let found = self.search(true);
            return self.with_more_to_come(found);
        }
        None
    }

    /// True if it is time to look for what is old or idle.
    fn is_check_due(&mut self) -> bool {
        let due = self.flush.check_at.is_none_or(|at| at <= self.now);
        if due {
            let policy = self.config.flush;
            let pause = policy.idle.min(policy.age) / 4;
            self.flush.check_at = Some(self.now + pause.max(Duration::from_millis(50)));
        }
        due
    }

    /// There may be more of the kind: look again after this job.
    fn with_more_to_come(&mut self, found: Option<(u16, u32)>) -> Option<(u16, u32)> {
        if found.is_some() {
            self.flush.check_at = Some(self.now);
        }
        found
    }

    fn is_filling_up(&self) -> bool {
        let policy = self.config.flush;
        let all = self.segments.all.len();
        let index = self.segments.blocks * 100
            > self.index.entries_max() as u64 * u64::from(policy.index_fill_percent);
        let log = self.segments.dirty * 100 > all * usize::from(policy.log_fill_percent);
        self.stalled.is_some() || log || index || self.segments.zeroes > ZEROES_MAX / 2
    }

    /// Another process is about to open the pool, and would have much to read.
    fn hastens(&mut self) -> bool {
        self.flush.hasten_until = self.flush.hasten_until.filter(|until| *until > self.now);
        self.flush.hasten_until.is_some() && self.segments.recovery_bytes() > HASTE_LEAVES_BYTES
    }

    fn start_job(&mut self) -> bool {
        let Some((slot, last)) = self.next_job() else { return false };
        self.close_if_open(slot, last);
        let state = self.segments.all[last as usize];
        let through = Position::new(state.last_epoch, state.last_seq);
        self.flush.blocked = false;
        let started = self.replica_ref(slot).commit_durable >= through.seq;
        self.flush.job = Some(Job {
            slot,
            last_ordinal: state.ordinal,
            through,
            started,
            cursor: 0,
            extent_cursor: 0,
        });
        if !started {
            // From here on the home may hold it: no truncation may take it back.
            let entry = Entry::Commit { replica: slot, seq: through.seq };
            self.journal.push(entry, After::JobStart);
        }
        true
    }

    fn close_if_open(&mut self, slot: u16, segment: u32) {
        if self.segments.all[segment as usize].state == SegmentState::Open {
            self.close_open_segment(slot);
        }
    }

    /// Looks for the segments that have waited longest, the open ones too or only full ones; but only if
    /// there may be some that the last search has not seen.
    fn search(&mut self, close: bool) -> Option<(u16, u32)> {
        let nothing = if close { Nothing::Any } else { Nothing::Full };
        if self.flush.nothing >= nothing {
            return None;
        }
        let found = self.candidate(close, Duration::ZERO);
        self.flush.nothing = if found.is_some() { Nothing::Unknown } else { nothing };
        found
    }

    /// The replica whose log has waited longest, and for so long, and the last of its segments to take.
    fn candidate(&mut self, close: bool, waited: Duration) -> Option<(u16, u32)> {
        self.flush.searches += 1;
        let mut best: Option<(Instant, u16, u32)> = None;
        for number in 0..self.replicas.len() {
            let Some(replica) = &self.replicas[number] else { continue };
            let slot = replica.slot;
            let (found, obstacle) = self.flushable(replica, close, waited);
            if let Obstacle::Durable(seq) = obstacle {
                self.want_durable(slot, seq);
            }
            // A search for what is old knows nothing of the rest.
            if waited.is_zero() {
                self.replica_mut(slot).obstacle = obstacle;
            }
            if let Some((since, last)) = found
                && best.is_none_or(|(best, ..)| since < best)
            {
                best = Some((since, slot, last));
            }
        }
        best.map(|(_, slot, last)| (slot, last))
    }

    /// The segments of a replica that may go home, if the first has waited for so long: since when it does,
    /// and the last. And what keeps more from going.
    fn flushable(
        &self,
        replica: &Replica,
        close: bool,
        waited: Duration,
    ) -> (Option<(Instant, u32)>, Obstacle) {
        if replica.damaged || replica.exclusive != Exclusive::None {
            return (None, Obstacle::Other);
        }
        let most = (self.segments.all.len() / 8).max(1);
        let mut found: Option<(Instant, u32)> = None;
        let mut count = 0;
        for segment in &replica.segments {
            let state = &self.segments.all[*segment as usize];
            let open = match state.state {
                SegmentState::Clean | SegmentState::Settling | SegmentState::Trimming => continue,
                SegmentState::Full => false,
                SegmentState::Open => true,
                SegmentState::Free => unreachable!("a replica's segment is not free"),
            };
            let young = found.is_none() && state.opened_at + waited > self.now;
            if open && !close || young || count == most {
                return (found, Obstacle::Other);
            }
            let busy = open && self.is_appended_to(replica);
            if busy || !replica.is_settled(state.last_seq) {
                let obstacle =
                    if open { Obstacle::Unrest } else { Obstacle::Unsettled(state.last_seq) };
                return (found, obstacle);
            }
            if state.last_seq > replica.durable {
                return (found, Obstacle::Durable(state.last_seq));
            }
            count += 1;
            let since = found.map_or(state.opened_at, |(since, _)| since);
            found = Some((since, *segment));
        }
        (found, Obstacle::Other)
    }

    /// More of a replica's log is settled, written or on media: something may go home now that could not.
    pub(crate) fn note_progress(&mut self, slot: u16) {
        if self.flush.nothing == Nothing::Unknown {
            return;
        }
        let replica = self.replica_ref(slot);
        let over = match replica.obstacle {
            Obstacle::Other => false,
            Obstacle::Unsettled(seq) => replica.is_settled(seq),
            Obstacle::Unrest => {
                replica.is_settled(replica.issued.seq) && !self.is_appended_to(replica)
            }
            Obstacle::Durable(seq) => seq <= replica.durable,
        };
        if over {
            self.search_again();
        }
    }

    /// Something is on its way to the open segment. What waits for room is not.
    fn is_appended_to(&self, replica: &Replica) -> bool {
        !replica.batches.is_empty() || !replica.pending.is_empty() && self.stalled.is_none()
    }

    /// Something has happened after which more may go home.
    pub(crate) fn search_again(&mut self) {
        self.flush.nothing = Nothing::Unknown;
    }

    /// Asserts that what is not searched for is not there.
    pub(crate) fn check_nothing(&self) {
        if self.failed.is_some() || self.flush.nothing == Nothing::Unknown {
            return;
        }
        let close = self.flush.nothing == Nothing::Any;
        for replica in self.replicas.iter().flatten() {
            let (found, obstacle) = self.flushable(replica, close, Duration::ZERO);
            let (slot, known) = (replica.slot, replica.obstacle);
            assert_eq!(found, None, "the log of replica {slot} may go home: {known:?}");
            if let Obstacle::Durable(seq) = obstacle {
                // A sync of what came before is enough: the next is asked for after it.
                let asked = matches!(known, Obstacle::Durable(asked) if asked > replica.durable);
                assert!(asked, "nobody syncs replica {slot} through {seq:?}: {known:?}");
            }
        }
    }

    /// The journal has the commit seq that the job relies on.
    pub(crate) fn job_started(&mut self) {
        if let Some(job) = &mut self.flush.job {
            job.started = true;
        }
    }

    /// Gathers chunks for the next wave; false if the job has nothing left to do or must wait.
    pub(crate) fn gather(&mut self) -> bool {
        let Some(mut job) = self.flush.job else { return false };
        if !job.started {
            return false;
        }
        if self.replica_ref(job.slot).exclusive != Exclusive::None {
            self.flush.job = None;
            self.go_on_soon();
            return false;
        }
        if core::mem::take(&mut self.flush.blocked) {
            self.flush.job = None;
            self.flush.retry_at = Some(self.now + HOME_FULL_RETRY);
            return false;
        }
        let mut looked = 0;
        let block_size = self.replica_ref(job.slot).block_size;
        let chunk_blocks = self.chunk_blocks(block_size) as u64;
        let end = match self.index.slots() {
            slots if planted::is(Bug::TrimBeforeHome) => slots / 2,
            slots => slots,
        };
        while job.cursor < end && !self.flush.wave.is_full() {
            if let Some((slot, block, entry)) = self.index.slot(job.cursor)
                && slot == job.slot
                && self.segments.all[self.segments.of(entry.sector)].ordinal <= job.last_ordinal
            {
                let chunk = u32::try_from(block / chunk_blocks).expect("a chunk number");
                self.add_target(&job, chunk);
            }
            job.cursor += 1;
            looked += 1;
            if looked == SWEEP_SLOTS {
                break;
            }
        }
        let swept = job.cursor == end;
        if swept {
            self.gather_extents(&mut job, chunk_blocks);
        }
        self.flush.job = Some(job);
        if !self.flush.wave.is_empty() {
            return true;
        }
        if swept {
            self.finish_pass(job);
        } else {
            self.go_on_soon();
        }
        false
    }

    fn gather_extents(&mut self, job: &mut Job, chunk_blocks: u64) {
        while !self.flush.wave.is_full() {
            let replica = self.replica_mut(job.slot);
            let through = job.through.seq.0;
            let next = replica.extents.next_through(job.extent_cursor, through);
            let Some((start, end)) = next else { return };
            let mapped = replica
                .chunks
                .next(start / chunk_blocks)
                .filter(|(chunk, _)| u64::from(*chunk) * chunk_blocks < end);
            match mapped {
                // No home, nothing to forget there.
                None => {
                    replica.extents.cut(start, end, through);
                    job.extent_cursor = end;
                }
                Some((chunk, _)) => {
                    let first = u64::from(chunk) * chunk_blocks;
                    if first > start {
                        replica.extents.cut(start, first, through);
                    }
                    job.extent_cursor = first + chunk_blocks;
                    self.add_target(job, chunk);
                }
            }
        }
    }

    /// The whole index has been swept and nothing was found: is everything home?
    fn finish_pass(&mut self, job: Job) {
        let of_job = |segment: &&u32| {
            let state = &self.segments.all[**segment as usize];
            state.ordinal <= job.last_ordinal
                && matches!(state.state, SegmentState::Full | SegmentState::Open)
        };
        let replica = self.replica_ref(job.slot);
        let segments: Vec<u32> = replica.segments.iter().filter(of_job).copied().collect();
        let live = segments.iter().any(|segment| self.segments.all[*segment as usize].live > 0);
        let zeroes = replica.extents.next_through(0, job.through.seq.0).is_some();
        if (live || zeroes) && !planted::is(Bug::TrimBeforeHome) {
            // Removals shift entries back, past the cursor: sweep again.
            let again = Job { cursor: 0, extent_cursor: 0, ..job };
            self.flush.job = Some(again);
            return self.go_on_soon();
        }
        let barrier = replica.written.seq;
        for segment in segments {
            self.segments.all[segment as usize].barrier = barrier;
            self.segments.set_state(segment, SegmentState::Settling);
        }
        if !self.flush.settling.contains(&job.slot) {
            self.flush.settling.push(job.slot);
        }
        self.flush.job = None;
        self.flush.jobs_done += 1;
        self.go_on_soon();
    }

    /// Declares settled segments clean as far as the commit seq allows.
    fn pump_settling(&mut self) {
        let mut settling = core::mem::take(&mut self.flush.settling);
        settling.retain(|slot| self.settle_segments(*slot));
        self.flush.settling = settling;
    }

    /// True if some segments of the replica still settle.
    fn settle_segments(&mut self, slot: u16) -> bool {
        let Some(replica) = &self.replicas[usize::from(slot)] else { return false };
        if replica.exclusive != Exclusive::None {
            return true;
        }
        let mut last = None;
        let mut left = false;
        for segment in &replica.segments {
            let state = &self.segments.all[*segment as usize];
            match state.state {
                SegmentState::Clean | SegmentState::Trimming => {}
                SegmentState::Settling if state.barrier <= replica.commit => {
                    if state.barrier <= replica.durable {
                        last = Some(*state);
                    } else {
                        let barrier = state.barrier;
                        self.want_durable(slot, barrier);
                        left = true;
                        break;
                    }
                }
                SegmentState::Settling => {
                    left = true;
                    break;
                }
                SegmentState::Open | SegmentState::Full | SegmentState::Free => break,
            }
        }
        let Some(last) = last else { return left };
        let queued = self
            .journal
            .pending()
            .any(|(entry, _)| matches!(entry, Entry::Flushed { replica, .. } if *replica == slot));
        if queued {
            return true;
        }
        let position = Position::new(last.last_epoch, last.last_seq);
        let commit = Entry::Commit { replica: slot, seq: last.barrier };
        self.journal.push(commit, After::Nothing);
        let entry = Entry::Flushed { replica: slot, ordinal: last.ordinal + 1, position };
        self.journal.push(entry, After::Nothing);
        true
    }

    /// Frees clean segments when free ones are getting few.
    pub(crate) fn pump_trim(&mut self) {
        let wanted = self.segments.all.len() / 16 + 3;
        while self.segments.free.len() + self.trims_pending() < wanted && self.segments.clean > 0 {
            let Some((slot, segment)) = self.oldest_clean() else { return };
            self.segments.set_state(segment, SegmentState::Trimming);
            let replica = self.replica_ref(slot);
            let state = &self.segments.all[segment as usize];
            let next = replica
                .segments
                .iter()
                .map(|segment| self.segments.all[*segment as usize].ordinal)
                .find(|ordinal| *ordinal > state.ordinal)
                .unwrap_or(replica.next_ordinal);
            let position = Position::new(state.last_epoch, state.last_seq);
            let entry = Entry::Trim { replica: slot, ordinal: next, position };
            self.journal.push(entry, After::Nothing);
        }
    }

    fn trims_pending(&self) -> usize {
        self.journal.pending().filter(|(entry, _)| matches!(entry, Entry::Trim { .. })).count()
    }

    fn oldest_clean(&self) -> Option<(u16, u32)> {
        self.replicas
            .iter()
            .flatten()
            .filter(|replica| replica.exclusive == Exclusive::None)
            .filter_map(|replica| {
                let first = replica.segments.iter().find(|segment| {
                    self.segments.all[**segment as usize].state != SegmentState::Trimming
                })?;
                let state = &self.segments.all[*first as usize];
                (state.state == SegmentState::Clean).then_some((
                    state.opened_at,
                    replica.slot,
                    *first,
                ))
            })
            .min()
            .map(|(_, slot, segment)| (slot, segment))
    }
}
