//! Holding guests back, a little, for a member that would never catch up otherwise: its log is
//! brought to it, by its server or by the head, as fast as that goes, and still guests write faster.
//!
//! Looked at four times a second. A member whose distance to the end of the log has not shrunk for
//! [`LATE_AFTER`] is late; writes are then begun at no more than three quarters of the pace at
//! which that member gets on, but never at less than half of what guests wrote before. So what
//! guests feel is bounded, and a member that is far slower than that is not waited for: after
//! [`GIVE_UP_AFTER`] they are left alone for [`REST`]. Nor is one waited for that is slow, degraded or about to
//! go anyway: it will be replaced.
//!
//! Only when writes begin is changed here, never what counts.

use core::time::Duration;

use base::limits::MEMBERS_MAX;
use base::{Instant, Seq, ServerId};

use crate::head::{Head, Phase};
use crate::member::{Member, Mode};

/// How often distances are compared.
const WINDOW: Duration = Duration::from_millis(250);
/// Windows without progress until guests are held back: the head start.
const LATE_AFTER: u32 = 8;
/// Windows after which that was no help.
const GIVE_UP_AFTER: u32 = 120;
/// Windows for which guests are left alone then.
const REST: u32 = 240;
/// Records that are soon brought whatever guests do.
const CLOSE: u64 = 256;
/// Writes that may begin at once after a pause, as time at the pace.
const BURST: Duration = Duration::from_millis(10);
/// The slowest pace, in writes per second.
const SLOWEST: u64 = 50;

/// A member that guests are held back for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeldBack {
    /// Its server.
    pub server: ServerId,
    /// Writes that are begun in a second, at most.
    pub writes_per_second: u64,
    /// Since when.
    pub since: Instant,
}

/// What is known of the members' progress, and the pace if there is one.
#[derive(Debug)]
pub(crate) struct Holdback {
    /// The window ends then.
    at: Instant,
    begun: Instant,
    /// The log's end when it began.
    last: Seq,
    /// How far each member that is behind had come then.
    reached: [Option<Seq>; MEMBERS_MAX],
    /// Windows in which somebody did not get nearer, one after the other.
    late: u32,
    /// Windows of rest that are left.
    rest: u32,
    /// Writes per second, before anybody was held back.
    before: u64,
    held: Option<HeldBack>,
    /// The next write may begin then.
    next: Instant,
}

impl Holdback {
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            at: now,
            begun: now,
            last: Seq::ZERO,
            reached: [None; MEMBERS_MAX],
            late: 0,
            rest: 0,
            before: 0,
            held: None,
            next: now,
        }
    }

    pub(crate) fn held(&self) -> Option<HeldBack> {
        self.held
    }

    /// Whether a write may begin now.
    pub(crate) fn may_begin(&self, now: Instant) -> bool {
        self.held.is_none() || self.next <= now
    }

    /// A write has begun.
    pub(crate) fn begun(&mut self, now: Instant) {
        let Some(held) = self.held else { return };
        let every = Duration::from_secs(1) / u32::try_from(held.writes_per_second).unwrap_or(1);
        // A pause is made up for by no more than a burst.
        let burst = u64::try_from(BURST.as_nanos()).unwrap_or(0);
        let earliest = Instant::from_nanos(now.nanos().saturating_sub(burst));
        self.next = self.next.max(earliest) + every;
    }
}

/// How far a member's log has been brought, if it is being brought.
fn reached(member: &Member) -> Option<Seq> {
    if member.speed.slow_since.is_some()
        || member.health.degraded.is_some()
        || member.health.draining.is_some()
    {
        return None;
    }
    match &member.mode {
        Mode::CatchingUp(_) => Some(member.acked),
        Mode::Filling(filling) => filling.log_end(),
        Mode::Down
        | Mode::Resting { .. }
        | Mode::Sealing
        | Mode::Sealed(_)
        | Mode::Matching(_)
        | Mode::Truncating { .. }
        | Mode::Live
        | Mode::Parked { .. } => None,
    }
}

impl Head {
    /// When to look again, or when the next write may begin.
    pub(crate) fn holdback_deadline(&self) -> Option<Instant> {
        if self.phase != Phase::Serving {
            return None;
        }
        let behind = self.members.iter().any(|member| reached(member).is_some());
        let busy = behind || self.holdback.held.is_some();
        let writes = (self.holdback.held.is_some() && !self.queue.is_empty())
            .then_some(self.holdback.next)
            .filter(|at| *at > self.now);
        base::time::earliest(busy.then_some(self.holdback.at), writes)
    }

    /// Ends a window if it is time.
    pub(crate) fn advance_holdback(&mut self) {
        if self.phase != Phase::Serving {
            self.holdback.held = None;
            return;
        }
        let now = self.now;
        if self.holdback.at > now {
            return;
        }
        let last = self.log.last().seq;
        let elapsed = now.since(self.holdback.begun);
        // After a pause, and with nobody behind, there is nothing to compare with.
        let comparable = elapsed >= WINDOW && elapsed < 4 * WINDOW;
        let written = last.0 - self.holdback.last.0.min(last.0);
        let mut worst: Option<(ServerId, u64)> = None;
        let mut behind = false;
        for (slot, member) in self.members.iter().enumerate() {
            let Some(at) = reached(member) else {
                self.holdback.reached[slot] = None;
                continue;
            };
            behind = true;
            let Some(before) = self.holdback.reached[slot].replace(at) else { continue };
            let came = at.0.saturating_sub(before.0);
            let far = last.0.saturating_sub(at.0) > CLOSE;
            // Nearer by an eighth of what was written.
            if far && came < written + written / 8 && worst.is_none_or(|(_, least)| came < least) {
                worst = Some((member.server, came));
            }
        }
        let per_second = |records: u64| {
            let nanos = elapsed.as_nanos().max(1);
            u64::try_from(u128::from(records) * 1_000_000_000 / nanos).unwrap_or(u64::MAX)
        };
        let worst = worst.filter(|_| comparable).map(|(server, came)| (server, per_second(came)));
        self.holdback.decide(now, behind, worst, per_second(written));
        (self.holdback.begun, self.holdback.last) = (now, last);
        self.holdback.at = now + WINDOW;
    }
}

impl Holdback {
    /// A window has ended: `worst` got no nearer, at so many records per second; guests `wrote` so many.
    fn decide(&mut self, now: Instant, behind: bool, worst: Option<(ServerId, u64)>, wrote: u64) {
        self.rest = self.rest.saturating_sub(1);
        if !behind {
            (self.late, self.held) = (0, None);
            return;
        }
        if self.rest > 0 {
            return;
        }
        let Some((server, pace)) = worst else {
            // It comes nearer: as long as it is behind, it goes on like this.
            self.late = self.late.min(LATE_AFTER);
            if self.held.is_none() {
                self.late = 0;
            }
            return;
        };
        self.late += 1;
        if self.late < LATE_AFTER {
            return;
        }
        if self.late >= LATE_AFTER + GIVE_UP_AFTER {
            (self.late, self.held, self.rest) = (0, None, REST);
            return;
        }
        if self.held.is_none() {
            self.before = wrote;
            self.next = now;
        }
        let writes_per_second = (pace / 4 * 3).max(self.before / 2).max(SLOWEST);
        let since = self.held.map_or(now, |held| held.since);
        self.held = Some(HeldBack { server, writes_per_second, since });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SERVER: ServerId = ServerId::from_bytes([3; 16]);

    fn windows(holdback: &mut Holdback, count: u32, worst: Option<u64>, wrote: u64) -> Option<u64> {
        for _ in 0..count {
            let worst = worst.map(|pace| (SERVER, pace));
            holdback.decide(Instant::ZERO + Duration::from_secs(9), true, worst, wrote);
        }
        holdback.held().map(|held| held.writes_per_second)
    }

    #[test]
    fn guests_are_held_back_after_a_head_start_and_by_half_at_most() {
        let mut holdback = Holdback::new(Instant::ZERO);
        assert_eq!(windows(&mut holdback, LATE_AFTER - 1, Some(800), 1000), None);
        assert_eq!(windows(&mut holdback, 1, Some(800), 1000), Some(600));
        assert_eq!(windows(&mut holdback, 1, Some(100), 600), Some(500), "half of before");
        assert_eq!(windows(&mut holdback, 9, None, 500), Some(500), "it comes nearer");
        assert_eq!(windows(&mut holdback, 1, Some(900), 500), Some(675));
        holdback.decide(Instant::ZERO, false, None, 500);
        assert_eq!(holdback.held(), None, "it is there");
    }

    #[test]
    fn who_is_far_too_slow_is_not_waited_for() {
        let mut holdback = Holdback::new(Instant::ZERO);
        let most = LATE_AFTER + GIVE_UP_AFTER;
        assert_eq!(windows(&mut holdback, most - 1, Some(100), 1000), Some(500));
        assert_eq!(windows(&mut holdback, 1, Some(100), 500), None);
        assert_eq!(windows(&mut holdback, REST - 1, Some(100), 1000), None);
        assert_eq!(windows(&mut holdback, LATE_AFTER, Some(100), 1000), Some(500), "once more");
    }

    #[test]
    fn writes_begin_at_the_pace() {
        let mut holdback = Holdback::new(Instant::ZERO);
        let mut now = Instant::ZERO + Duration::from_secs(9);
        assert!(holdback.may_begin(now));
        windows(&mut holdback, LATE_AFTER, Some(800), 1000);
        let (end, mut writes) = (now + Duration::from_secs(2), 0);
        while now < end {
            while holdback.may_begin(now) {
                holdback.begun(now);
                writes += 1;
            }
            now = now + Duration::from_millis(1);
        }
        assert!((1195..=1210).contains(&writes), "{writes}");
    }
}
