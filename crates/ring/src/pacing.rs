//! How long to poll before sleeping.
//!
//! Polling pays when completions follow each other within the polling time: sleeping and being
//! woken costs several microseconds on both sides. It wastes a core when they do not. So the
//! time is earned: a wait that ended within the limit doubles it, one that took longer halves
//! it, down to nothing. An idle reactor has stopped polling after a few long waits.

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
        if event && waited <= self.limit {
            self.poll = (self.poll * 2).max(POLL_MIN).min(self.limit);
        } else {
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
