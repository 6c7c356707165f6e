//! How fast members may be filled: as fast as guests do not feel it. The rate grows step by step while the
//! guests' mean latency stays near the lowest that was seen, and is halved when it does not.

use core::time::Duration;

use base::Instant;

/// The rate that a filling starts with, in bytes per second.
const RATE_START: u64 = 64 << 20;
/// No filling is slowed down below this.
const RATE_MIN: u64 = 2 << 20;
/// Nor below so many times what guests write, or it would never end under a steady load.
const RATE_MIN_TIMES_WRITTEN: u64 = 2;
/// What is added to the rate at the end of each good window.
const RATE_STEP: u64 = 8 << 20;
/// Latency above twice the floor is borne if it is within so much of it.
const LATENCY_SLACK_NANOS: u64 = 1_000_000;
/// The floor rises by this part of itself at the end of each window, to follow a load that changed.
const FLOOR_RISE: u64 = 256;

/// The rate of fillings, and the guests' latency that it follows.
#[derive(Debug)]
pub(crate) struct Pace {
    rate: u64,
    rate_max: u64,
    /// The window ends then.
    window_end: Instant,
    sum_nanos: u64,
    answered: u64,
    /// What guests wrote since the last window ended, and when that was.
    written_bytes: u64,
    window_start: Instant,
    /// What guests wrote in the last window, in bytes per second.
    written_rate: u64,
    /// The lowest mean latency of a window, nearly; zero while unknown.
    floor_nanos: u64,
}

impl Pace {
    pub(crate) fn new(rate_max: u64) -> Self {
        let rate = RATE_START.min(rate_max);
        Self {
            rate,
            rate_max,
            window_end: Instant::ZERO,
            sum_nanos: 0,
            answered: 0,
            written_bytes: 0,
            window_start: Instant::ZERO,
            written_rate: 0,
            floor_nanos: 0,
        }
    }

    /// A guest's request was answered after so long.
    pub(crate) fn learn(&mut self, took: Duration) {
        let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.sum_nanos = self.sum_nanos.saturating_add(nanos);
        self.answered += 1;
    }

    /// A record of so many bytes was written for a guest: a member that is being filled will need it,
    /// too.
    pub(crate) fn wrote(&mut self, bytes: usize) {
        self.written_bytes = self.written_bytes.saturating_add(bytes as u64);
    }

    /// The bytes per second for each of `fillings` by now. Guests are `waiting`, or are not.
    pub(crate) fn rate(
        &mut self,
        now: Instant,
        window: Duration,
        fillings: u64,
        waiting: bool,
    ) -> u64 {
        if self.window_end <= now {
            self.end_window(waiting);
            let nanos = now.since(self.window_start).as_nanos().max(1);
            let written = u128::from(self.written_bytes) * 1_000_000_000 / nanos;
            self.written_rate = u64::try_from(written).unwrap_or(u64::MAX);
            self.written_bytes = 0;
            self.window_start = now;
            self.window_end = now + window;
        }
        let needed = self.written_rate.saturating_mul(RATE_MIN_TIMES_WRITTEN);
        (self.rate / fillings.max(1)).max(needed).min(self.rate_max).max(1)
    }

    fn end_window(&mut self, waiting: bool) {
        let mean = self.sum_nanos.checked_div(self.answered);
        self.sum_nanos = 0;
        self.answered = 0;
        let Some(mean) = mean else {
            if !waiting {
                self.grow();
            }
            return;
        };
        let risen = self.floor_nanos.saturating_add(self.floor_nanos / FLOOR_RISE);
        self.floor_nanos = if self.floor_nanos == 0 { mean } else { risen.min(mean) };
        if mean > self.floor_nanos.saturating_mul(2).saturating_add(LATENCY_SLACK_NANOS) {
            self.rate = (self.rate / 2).max(RATE_MIN.min(self.rate_max));
        } else {
            self.grow();
        }
    }

    fn grow(&mut self) {
        self.rate = self.rate.saturating_add(RATE_STEP).min(self.rate_max);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WINDOW: Duration = Duration::from_millis(100);

    struct Windows {
        pace: Pace,
        now: Instant,
    }

    impl Windows {
        /// The rate after a window in which answers took `micros`; none if zero.
        fn pass(&mut self, micros: u64, waiting: bool) -> u64 {
            for _ in 0..if micros == 0 { 0 } else { 10 } {
                self.pace.learn(Duration::from_micros(micros));
            }
            self.now = self.now + WINDOW;
            self.pace.rate(self.now, WINDOW, 1, waiting)
        }
    }

    #[test]
    fn the_rate_grows_until_guests_feel_it_and_is_halved_then() {
        let mut windows = Windows { pace: Pace::new(1 << 30), now: Instant::ZERO };
        assert_eq!(windows.pass(100, true), RATE_START + RATE_STEP);
        assert_eq!(
            windows.pass(1100, true),
            RATE_START + 2 * RATE_STEP,
            "one millisecond is borne"
        );
        let grown = RATE_START + 2 * RATE_STEP;
        assert_eq!(windows.pass(1300, true), grown / 2);
        let halved = windows.pass(0, true);
        assert_eq!(halved, grown / 2, "guests wait: nothing is known");
        assert_eq!(windows.pass(0, false), halved + RATE_STEP, "there are no guests");
        for _ in 0..20 {
            windows.pass(50_000, true);
        }
        assert_eq!(windows.pass(50_000, true), RATE_MIN);
        for _ in 0..200 {
            windows.pass(100, true);
        }
        assert_eq!(windows.pass(100, true), 1 << 30);
        let now = windows.now;
        assert_eq!(windows.pace.rate(now, WINDOW, 4, true), 1 << 28, "members share it");
    }

    #[test]
    fn a_filling_is_always_faster_than_the_guests_write() {
        let mut windows = Windows { pace: Pace::new(1 << 30), now: Instant::ZERO };
        windows.pass(100, true);
        for _ in 0..30 {
            windows.pace.wrote(1 << 20);
            windows.pass(50_000, true);
        }
        assert_eq!(windows.pass(50_000, true), RATE_MIN, "nothing was written any more");
        windows.pace.wrote(1 << 20);
        assert_eq!(windows.pass(50_000, true), 20 << 20);
        let now = windows.now;
        assert_eq!(windows.pace.rate(now, WINDOW, 4, true), 20 << 20, "each of them");
    }

    #[test]
    fn a_load_that_stays_slower_is_the_new_floor_after_a_while() {
        let mut windows = Windows { pace: Pace::new(1 << 30), now: Instant::ZERO };
        windows.pass(1000, true);
        let grown = RATE_START + RATE_STEP;
        assert_eq!(windows.pass(5000, true), grown / 2);
        for _ in 0..300 {
            windows.pass(5000, true);
        }
        assert!(windows.pass(5000, true) > RATE_START);
    }
}
