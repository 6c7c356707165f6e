//! How fast a fill may read from its source: a token bucket that allows for what is under way.

use core::time::Duration;

use base::Instant;
use base::limits::PAYLOAD_BYTES_MAX;

/// The most that is set aside for a command whose answer has not come.
const RESERVED_BYTES: i64 = 128 * 1024;
const _: () = assert!(RESERVED_BYTES.unsigned_abs() == PAYLOAD_BYTES_MAX as u64);
const NANOS_PER_SECOND: i128 = 1_000_000_000;

/// What a command that was started was taken to bring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Reserved(i64);

/// The bucket. A command may start while there is anything in it, and is paid for at once as if its
/// answer were as large as its caller expects; the difference comes back, or is paid, with the
/// answer.
#[derive(Debug)]
pub(super) struct Pace {
    bytes_per_second: u64,
    tokens: i64,
    /// Of commands whose answers have not come.
    reserved: i64,
    at: Instant,
}

impl Pace {
    pub(super) fn new(now: Instant, bytes_per_second: u64) -> Self {
        Self { bytes_per_second, tokens: RESERVED_BYTES, reserved: 0, at: now }
    }

    pub(super) fn set_rate(&mut self, now: Instant, bytes_per_second: u64) {
        self.refill(now);
        self.bytes_per_second = bytes_per_second;
    }

    fn refill(&mut self, now: Instant) {
        let nanos = now.since(self.at).as_nanos();
        let earned = nanos.saturating_mul(u128::from(self.bytes_per_second)) / 1_000_000_000;
        // Time that earned nothing yet is kept for the next look.
        if earned > 0 || self.bytes_per_second == 0 {
            self.at = now;
        }
        let most = i64::try_from(self.bytes_per_second / 10).unwrap_or(i64::MAX);
        let earned = i64::try_from(earned).unwrap_or(i64::MAX);
        self.tokens = self.tokens.saturating_add(earned).min(most.max(RESERVED_BYTES));
    }

    /// Whether a command may start now that is expected to bring so many bytes; if so, it is paid for.
    pub(super) fn start(&mut self, now: Instant, expected: usize) -> Option<Reserved> {
        self.refill(now);
        if self.bytes_per_second == 0 || self.tokens <= 0 {
            return None;
        }
        let expected = i64::try_from(expected).unwrap_or(RESERVED_BYTES).min(RESERVED_BYTES);
        self.tokens -= expected;
        self.reserved += expected;
        Some(Reserved(expected))
    }

    /// A command that was started has brought so many bytes, or none.
    pub(super) fn finish(&mut self, reserved: Reserved, bytes: usize) {
        let bytes = i64::try_from(bytes).unwrap_or(RESERVED_BYTES);
        self.reserved -= reserved.0;
        self.tokens = self.tokens.saturating_add(reserved.0 - bytes);
    }

    /// Nothing is under way any more.
    pub(super) fn settle(&mut self) {
        self.tokens = self.tokens.saturating_add(core::mem::take(&mut self.reserved));
    }

    /// When a command may start, if one could not just now. `None`: not before the rate changes.
    pub(super) fn ready_at(&self) -> Option<Instant> {
        if self.tokens > 0 || self.bytes_per_second == 0 {
            return None;
        }
        let missing = i128::from(1 - self.tokens);
        let nanos = missing * NANOS_PER_SECOND / i128::from(self.bytes_per_second) + 1;
        let nanos = u64::try_from(nanos).unwrap_or(u64::MAX);
        Some(self.at + Duration::from_nanos(nanos))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fill_reads_as_fast_as_it_may_and_not_faster() {
        for rate in [0_u64, 300_000, 10 << 20, 1 << 30] {
            let mut now = Instant::ZERO;
            let end = now + Duration::from_secs(2);
            let mut pace = Pace::new(now, rate);
            let mut bytes = 0;
            while now < end {
                // Answers come at once, and are of half the size that they could have.
                while let Some(reserved) = pace.start(now, PAYLOAD_BYTES_MAX) {
                    pace.finish(reserved, PAYLOAD_BYTES_MAX / 2);
                    bytes += PAYLOAD_BYTES_MAX as u64 / 2;
                }
                now = pace.ready_at().unwrap_or(end).max(now);
            }
            let most = 2 * rate + (rate / 10).max(PAYLOAD_BYTES_MAX as u64) * 2;
            assert!(bytes <= most, "{bytes} at {rate}");
            assert!(rate == 0 || bytes >= 2 * rate * 9 / 10, "{bytes} at {rate}");
        }
    }

    #[test]
    fn what_is_under_way_counts() {
        let now = Instant::ZERO + Duration::from_secs(1);
        let mut pace = Pace::new(now, 1 << 20);
        let first = pace.start(now, PAYLOAD_BYTES_MAX).expect("the first one may start");
        assert_eq!(pace.start(now, 1), None, "the rate does not allow for two at once");
        pace.finish(first, 100);
        let second = pace.start(now, 4096).expect("that one was small");
        assert!(pace.start(now, 4096).is_some(), "as many as are expected to fit");
        pace.set_rate(now, 0);
        pace.finish(second, 0);
        assert_eq!(pace.start(now + Duration::from_secs(9), 1), None);
        assert_eq!(pace.ready_at(), None);
        pace.settle();
        assert_eq!((pace.reserved, pace.tokens), (0, RESERVED_BYTES - 100), "all came back");
    }
}
