//! How long to poll before sleeping.
//!
//! Polling pays when completions follow each other closely: sleeping and being woken costs some
//! microseconds. It wastes a core when they do not, and where cores are few or shared it takes
//! time from the very kernel or peer that is waited for. So the time is earned: a wait of at
//! most half the limit doubles it, one beyond the limit halves it, down to nothing; waits in
//! between, which polling would now catch and now miss, leave it. An idle reactor has stopped
//! polling after a few long waits.

use std::time::Duration;

/// Polling for less than this is not worth starting.
const POLL_MIN: Duration = Duration::from_micros(4);

pub(crate) struct Pacing {
    limit: Duration,
    poll: Duration,
}

impl Pacing {
    pub(crate) fn new(limit: Duration) -> Self {
        Self { limit, poll: Duration::ZERO }
    }

    /// How long to poll now.
    pub(crate) fn poll(&self) -> Duration {
        self.poll
    }

    /// A wait ended, by polling or by sleeping, after `waited`; because of an `event`, or only
    /// because its time was over.
    pub(crate) fn waited(&mut self, waited: Duration, event: bool) {
        if event && waited <= self.limit / 2 {
            self.poll = (self.poll * 2).max(POLL_MIN).min(self.limit);
        } else if !event || waited > self.limit {
            let half = self.poll / 2;
            self.poll = if half < POLL_MIN { Duration::ZERO } else { half };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_micros(50);

    #[test]
    fn dense_events_earn_polling_and_idleness_ends_it() {
        let mut pacing = Pacing::new(LIMIT);
        assert_eq!(pacing.poll(), Duration::ZERO);
        for _ in 0..10 {
            pacing.waited(Duration::from_micros(20), true);
        }
        assert_eq!(pacing.poll(), LIMIT);
        pacing.waited(Duration::from_micros(40), true);
        assert_eq!(pacing.poll(), LIMIT);
        pacing.waited(Duration::from_millis(1), true);
        assert_eq!(pacing.poll(), LIMIT / 2);
        for _ in 0..5 {
            pacing.waited(Duration::from_micros(20), false);
        }
        assert_eq!(pacing.poll(), Duration::ZERO);
    }

    #[test]
    fn a_limit_of_zero_never_polls() {
        let mut pacing = Pacing::new(Duration::ZERO);
        pacing.waited(Duration::ZERO, true);
        assert_eq!(pacing.poll(), Duration::ZERO);
    }
}
