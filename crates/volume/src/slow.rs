//! How fast members answer, and which of them is far slower than the others.
//!
//! Per member, apart for reads and appends, the head keeps a smoothed mean of how long answers take,
//! and the age of one command that is not answered: a member that hangs gives no samples. It is slow
//! if either is more than ten times the median of the others', and above 2 ms, for a second; it is
//! no longer slow once both have been below three times for five seconds. Guests then wait for it
//! less (see `reads`), and whoever plans membership hears of it.
//!
//! Looked at ten times a second while something is under way, never while the head is idle.

use core::time::Duration;

use base::limits::MEMBERS_MAX;
use base::{Instant, ServerId};

use crate::head::{Head, Output};
use crate::member::{Member, Mode};
use crate::tag::Kind;

const CHECK: Duration = Duration::from_millis(100);
/// How many times the median of the others is slow,
const SLOW_TIMES: u32 = 10;
/// above this,
const SLOW_LEAST: Duration = Duration::from_millis(2);
/// for so long.
const SLOW_AFTER: Duration = Duration::from_secs(1);
/// How many times the median of the others is no longer slow,
const FAST_TIMES: u32 = 3;
/// or below this in any case,
const FAST_LEAST: Duration = Duration::from_millis(1);
/// for so long.
const FAST_AFTER: Duration = Duration::from_secs(5);
/// A mean without a sample for so long says nothing any more.
const STALE: Duration = Duration::from_secs(10);

/// How long answers of one kind take.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Latency {
    /// A smoothed mean over about eight; zero while unknown.
    nanos: u64,
    /// When the last sample came.
    sampled: Instant,
    /// A command under way, and when it was sent.
    timed: Option<(u64, Instant)>,
}

/// How fast a member is.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Speed {
    pub(crate) reads: Latency,
    pub(crate) appends: Latency,
    /// It is slow since then, and that was announced.
    pub(crate) slow_since: Option<Instant>,
    /// It has been what it was not said to be, since then.
    changing_since: Option<Instant>,
}

impl Latency {
    /// A command goes out. One at a time is timed.
    pub(crate) fn sent(&mut self, tag: u64, now: Instant) {
        self.timed.get_or_insert((tag, now));
    }

    /// The answer to a command came. If it is the timed one: when it was sent.
    pub(crate) fn timed(&mut self, tag: u64) -> Option<Instant> {
        let (timed, sent) = self.timed?;
        (timed == tag).then(|| {
            self.timed = None;
            sent
        })
    }

    pub(crate) fn learn(&mut self, took: Duration, now: Instant) {
        let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX / 16);
        self.nanos = if self.mean(now).is_none() {
            nanos.max(1)
        } else {
            (self.nanos / 8 * 7).saturating_add(nanos / 8).max(1)
        };
        self.sampled = now;
    }

    /// The smoothed mean.
    pub(crate) fn mean(&self, now: Instant) -> Option<Duration> {
        let known = self.nanos > 0 && now.since(self.sampled) < STALE;
        known.then(|| Duration::from_nanos(self.nanos))
    }

    /// The smoothed mean, or the age of a command under way if that is more.
    pub(crate) fn expected(&self, now: Instant) -> Option<Duration> {
        let age = self.timed.map(|(_, sent)| now.since(sent));
        match (self.mean(now), age) {
            (Some(mean), Some(age)) => Some(mean.max(age)),
            (Some(mean), None) => Some(mean),
            (None, Some(age)) => (age > SLOW_LEAST).then_some(age),
            (None, None) => None,
        }
    }

    /// Nothing was heard of it for this long, neither answer nor command.
    pub(crate) fn rested(&self, now: Instant) -> Option<Duration> {
        self.timed.is_none().then(|| now.since(self.sampled))
    }
}

impl Speed {
    /// The session is another one; what was timed will not be answered.
    pub(crate) fn session_over(&mut self) {
        self.reads.timed = None;
        self.appends.timed = None;
    }
}

/// What the latencies say of a member, one kind of commands at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Verdict {
    Fast,
    Between,
    Slow,
}

impl Head {
    /// Looks at the members' latencies now and then, and announces what changed.
    pub(crate) fn advance_speeds(&mut self) {
        if self.now < self.speeds_at {
            return;
        }
        self.speeds_at = self.now + CHECK;
        for index in 0..self.members.len() {
            let reads = self.verdict(index, |speed| &speed.reads);
            let appends = self.verdict(index, |speed| &speed.appends);
            let Some(verdict) = reads.max(appends) else { continue };
            self.judge(index, verdict);
        }
    }

    fn judge(&mut self, index: usize, verdict: Verdict) {
        let now = self.now;
        let member = &mut self.members[index];
        let speed = &mut member.speed;
        let (wanted, after) = match speed.slow_since {
            None => (Verdict::Slow, SLOW_AFTER),
            Some(_) => (Verdict::Fast, FAST_AFTER),
        };
        if verdict != wanted {
            speed.changing_since = None;
            return;
        }
        let since = *speed.changing_since.get_or_insert(now);
        if now.since(since) < after {
            return;
        }
        speed.changing_since = None;
        let slow = speed.slow_since.is_none();
        speed.slow_since = slow.then_some(since);
        let server: ServerId = member.server;
        self.outputs.push_back(Output::MemberSlow { server, slow });
        self.reads.retry();
    }

    /// Compares a member with the others; `None` if there is nothing to compare.
    fn verdict(&self, index: usize, kind: impl Fn(&Speed) -> &Latency) -> Option<Verdict> {
        let comparable = |member: &Member| matches!(member.mode, Mode::Live) && member.in_sync();
        let member = &self.members[index];
        if !comparable(member) {
            return None;
        }
        let own = kind(&member.speed).expected(self.now)?;
        let mut others = [Duration::MAX; MEMBERS_MAX];
        let mut count = 0;
        for (other, member) in self.members.iter().enumerate() {
            if other != index
                && comparable(member)
                && let Some(latency) = kind(&member.speed).expected(self.now)
            {
                others[count] = latency;
                count += 1;
            }
        }
        if count == 0 {
            return None;
        }
        others.sort_unstable();
        // Of two the slower one: half of the members are not slow, they are as they are.
        let median = others[count / 2];
        Some(if own > SLOW_LEAST && own > median.saturating_mul(SLOW_TIMES) {
            Verdict::Slow
        } else if own < FAST_LEAST.max(median.saturating_mul(FAST_TIMES)) {
            Verdict::Fast
        } else {
            Verdict::Between
        })
    }

    /// When to look at the latencies, if something is under way that may hang.
    pub(crate) fn speeds_deadline(&self) -> Option<Instant> {
        if self.members.len() < 2 {
            return None;
        }
        let under_way = |member: &Member| {
            member.speed.reads.timed.is_some() || member.speed.appends.timed.is_some()
        };
        self.members.iter().any(under_way).then_some(self.speeds_at)
    }

    /// An append goes out to a member: times one at a time, of those that are not copies of old ones.
    pub(crate) fn time_append(&mut self, index: usize, kind: Kind, tag: u64) {
        let member = &mut self.members[index];
        if kind == Kind::Append && matches!(member.mode, Mode::Live) {
            member.speed.appends.sent(tag, self.now);
        }
    }

    /// A member has answered an append.
    pub(crate) fn append_timed(&mut self, index: usize, tag: u64, done: bool) {
        let now = self.now;
        let member = &mut self.members[index];
        if let Some(sent) = member.speed.appends.timed(tag)
            && done
        {
            member.speed.appends.learn(now.since(sent), now);
            member.grant.learn(sent, now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_that_is_not_answered_is_as_slow_as_it_is_old() {
        let at = |millis: u64| Instant::from_nanos(millis * 1_000_000);
        let mut latency = Latency::default();
        assert_eq!(latency.expected(at(0)), None);
        latency.sent(7, at(0));
        latency.sent(8, at(1));
        assert_eq!(latency.expected(at(1)), None, "too early to tell");
        assert_eq!(latency.expected(at(50)), Some(Duration::from_millis(50)));
        assert_eq!((latency.timed(8), latency.timed(7)), (None, Some(at(0))));
        latency.learn(Duration::from_millis(60), at(60));
        assert_eq!(latency.expected(at(60)), Some(Duration::from_millis(60)));
        for _ in 0..100 {
            latency.learn(Duration::from_millis(1), at(100));
        }
        assert!(latency.mean(at(100)).is_some_and(|mean| mean < Duration::from_millis(2)));
        assert_eq!(latency.mean(at(20_000)), None, "what is old says nothing");
    }
}
