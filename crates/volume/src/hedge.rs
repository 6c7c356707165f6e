//! Second opinions. A read that a member has not answered after a few times its usual latency is
//! also asked of the next best, and the first good answer wins: one member that stumbles costs the
//! guest little. And now and then a read is also asked of a member that has not been read from lately, so
//! that its latency stays known: one that was slow once is noticed when it no longer is.
//!
//! Reads that may become late stand in one list for each member asked, oldest first; nearly all
//! leave it when their answer comes. So the only one to look at is the first of each.

use core::time::Duration;

use base::limits::{HEAD_REQUESTS_MAX, MEMBERS_MAX};
use base::time::earliest;
use base::{BufferMut, Instant, Seq};

use crate::head::Head;
use crate::quorum::bit;
use crate::reads::{Read, ReadState, Reads};

/// A read is late after so many times its member's mean latency,
const LATE_TIMES: u32 = 4;
/// and no less than this.
const LATE_LEAST: Duration = Duration::from_millis(1);
/// When a second opinion is wanted but not to be had, it is tried again after so long.
const RETRY: Duration = Duration::from_millis(1);
/// Of this many reads under way one may be asked twice at a time; always [`HEDGES_LEAST`] may.
const HEDGE_ONE_IN: usize = 8;
const HEDGES_LEAST: usize = 8;
/// How often a member that has not been read from lately is.
const PROBE: Duration = Duration::from_millis(250);
/// Second opinions leave so many buffers of their size to others.
const BUFFERS_LEFT: usize = 32;

const _: () = assert!(HEDGES_LEAST <= HEAD_REQUESTS_MAX);

const NONE: u16 = u16::MAX;

/// The reads that may become late.
#[derive(Debug)]
pub(crate) struct Hedging {
    /// First and last of those that each member was asked for.
    lists: [(u16, u16); MEMBERS_MAX],
    /// How many there are in all.
    watched: usize,
    /// Reads for which two members are asked because the first was late.
    hedged: usize,
    /// A second opinion was not to be had; not before then.
    retry_at: Instant,
    /// The next probe may be sent then.
    probe_at: Instant,
}

/// A read's place in a list.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Link {
    member: usize,
    since: Instant,
    previous: u16,
    next: u16,
}

impl Hedging {
    pub(crate) const fn new() -> Self {
        Self {
            lists: [(NONE, NONE); MEMBERS_MAX],
            watched: 0,
            hedged: 0,
            retry_at: Instant::ZERO,
            probe_at: Instant::ZERO,
        }
    }
}

impl Reads {
    fn link(&mut self, slot: u16, member: usize, since: Instant) {
        let (first, last) = self.hedging.lists[member];
        let Some(read) = self.at_mut(slot) else { return };
        assert!(read.link.is_none(), "a read is in one list");
        read.link = Some(Link { member, since, previous: last, next: NONE });
        if let Some(Read { link: Some(link), .. }) = self.at_mut(last) {
            link.next = slot;
        }
        let first = if first == NONE { slot } else { first };
        self.hedging.lists[member] = (first, slot);
        self.hedging.watched += 1;
    }

    fn unlink(&mut self, slot: u16) {
        let Some(link) = self.at_mut(slot).and_then(|read| read.link.take()) else { return };
        self.hedging.watched -= 1;
        let (mut first, mut last) = self.hedging.lists[link.member];
        match self.at_mut(link.previous).and_then(|read| read.link.as_mut()) {
            Some(previous) => previous.next = link.next,
            None => first = link.next,
        }
        match self.at_mut(link.next).and_then(|read| read.link.as_mut()) {
            Some(next) => next.previous = link.previous,
            None => last = link.previous,
        }
        self.hedging.lists[link.member] = (first, last);
    }

    /// A command for the read came to its end.
    pub(crate) fn ask_ended(&mut self, slot: u16, member: usize) {
        let linked = self.at(slot).and_then(|read| read.link);
        if linked.is_some_and(|link| link.member == member) {
            self.unlink(slot);
        }
        self.no_longer_hedged(slot);
    }

    /// The read has its data, or is answered: no second opinion is needed.
    pub(crate) fn settled(&mut self, slot: u16) {
        self.unlink(slot);
        self.no_longer_hedged(slot);
    }

    fn no_longer_hedged(&mut self, slot: u16) {
        if let Some(read) = self.at_mut(slot)
            && core::mem::take(&mut read.hedged)
        {
            self.hedging.hedged -= 1;
        }
    }

    pub(crate) fn check_hedging(&self) {
        let mut watched = 0;
        for (member, (first, last)) in self.hedging.lists.into_iter().enumerate() {
            let (mut slot, mut previous) = (first, NONE);
            while let Some(read) = self.at(slot) {
                let link = read.link.expect("what is in a list has a link");
                assert!(link.member == member && link.previous == previous);
                assert!(matches!(read.state, ReadState::Asked));
                assert!(read.asks.iter().flatten().any(|ask| ask.member == member));
                watched += 1;
                (previous, slot) = (slot, link.next);
            }
            assert_eq!((slot, last), (NONE, previous));
        }
        assert_eq!(watched, self.hedging.watched);
        let hedged = self.slots.iter().flatten().filter(|read| read.hedged);
        assert_eq!(hedged.count(), self.hedging.hedged);
    }
}

impl Head {
    /// A member was asked for a read: sees to it that it is not waited for too long.
    pub(crate) fn watch(&mut self, slot: u16, member: usize) {
        let others = self.members.iter().filter(|member| member.in_sync()).count() > 1;
        if others {
            let now = self.now;
            self.reads.link(slot, member, now);
        }
    }

    fn late_after(&self, member: usize) -> Duration {
        let mean = self.members[member].speed.reads.mean(self.now).unwrap_or_default();
        LATE_LEAST.max(mean.saturating_mul(LATE_TIMES))
    }

    /// When the first read under way at a member becomes late.
    fn late_at(&self, member: usize) -> Option<(u16, Instant)> {
        let (first, _) = self.reads.hedging.lists[member];
        let link = self.reads.at(first)?.link?;
        Some((first, link.since + self.late_after(member)))
    }

    pub(crate) fn hedge_deadline(&self) -> Option<Instant> {
        if self.reads.hedging.watched == 0 {
            return None;
        }
        let members = 0..self.members.len();
        let late = members.filter_map(|member| self.late_at(member).map(|(_, at)| at));
        late.fold(None, |first, at| earliest(first, Some(at.max(self.reads.hedging.retry_at))))
    }

    /// Asks for second opinions where they are due.
    pub(crate) fn advance_hedges(&mut self) {
        let hedging = &self.reads.hedging;
        if hedging.watched == 0 || self.now < hedging.retry_at {
            return;
        }
        for member in 0..self.members.len() {
            while let Some((slot, at)) = self.late_at(member) {
                if at > self.now {
                    break;
                }
                if !self.hedge(slot, member) {
                    self.reads.hedging.retry_at = self.now + RETRY;
                    break;
                }
            }
        }
    }

    /// Asks the next best member for a read that `asked` has not answered. False if that is not
    /// possible now.
    fn hedge(&mut self, slot: u16, asked: usize) -> bool {
        let Some(read) = self.reads.at(slot) else { return false };
        if read.asks.iter().all(Option::is_some) {
            // A probe is under way for it.
            self.reads.unlink(slot);
            return true;
        }
        let hedges_max = HEDGES_LEAST.max(self.reads.unanswered() / HEDGE_ONE_IN);
        if self.reads.hedging.hedged >= hedges_max {
            return false;
        }
        let (lba, blocks) = (read.lba, read.blocks);
        let except = read.damaged | read.failed | bit(asked);
        let bytes = usize::try_from(blocks.bytes(self.block_size)).expect("checked at arrival");
        let covers = self.covers(lba, blocks);
        let Some(target) = self.reader(covers, except) else { return false };
        let Some(buffer) = self.spare_buffer(bytes) else { return false };
        self.ask(slot, target, covers, buffer);
        self.reads.unlink(slot);
        if let Some(read) = self.reads.at_mut(slot) {
            read.hedged = true;
            self.reads.hedging.hedged += 1;
        }
        true
    }

    /// Also asks a member that has not been read from lately, if it is time.
    pub(crate) fn probe(&mut self, slot: u16, asked: usize, covers: Seq) {
        if self.now < self.reads.hedging.probe_at {
            return;
        }
        self.reads.hedging.probe_at = self.now + PROBE;
        let now = self.now;
        let rested = |(index, member): (usize, &crate::member::Member)| {
            let able = index != asked && Self::can_read(member, covers);
            let rest = member.speed.reads.rested(now).filter(|rest| able && *rest >= PROBE)?;
            Some((rest, index))
        };
        let Some((_, target)) = self.members.iter().enumerate().filter_map(rested).max() else {
            return;
        };
        let Some(read) = self.reads.at(slot) else { return };
        let bytes = usize::try_from(read.blocks.bytes(self.block_size));
        let Some(buffer) = self.spare_buffer(bytes.expect("checked at arrival")) else { return };
        self.ask(slot, target, covers, buffer);
    }

    /// A buffer, if others find enough left.
    fn spare_buffer(&self, bytes: usize) -> Option<BufferMut> {
        let (small, large) = self.buffers.available();
        let free = if bytes <= base::limits::SMALL_PAYLOAD_BYTES { small } else { large };
        if free > BUFFERS_LEFT { self.buffers.take(bytes) } else { None }
    }
}
