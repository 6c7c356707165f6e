//! A process's monotonic clock: it starts anywhere and runs a little fast or slow.

use core::time::Duration;

use base::Instant;

const MILLION: i128 = 1_000_000;

/// Maps the world's time to a process's and back.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock {
    world: u64,
    local: u64,
    /// How much faster than the world's time it runs, in millionths.
    drift: i64,
}

impl Clock {
    /// A clock that shows `local` nanoseconds at `now`.
    pub(crate) fn new(now: Instant, local: u64, drift: i64) -> Self {
        Self { world: now.nanos(), local, drift }
    }

    /// It runs at another rate from now on.
    pub(crate) fn set_drift(&mut self, now: Instant, drift: i64) {
        *self = Self { world: now.nanos(), local: self.local(now).nanos(), drift };
    }

    /// It shows so much more from now on.
    pub(crate) fn jump(&mut self, now: Instant, by: Duration) {
        let local = (self.local(now) + by).nanos();
        *self = Self { world: now.nanos(), local, ..*self };
    }

    /// What it shows.
    pub(crate) fn local(&self, now: Instant) -> Instant {
        if self.drift == 0 {
            return Instant::from_nanos(now.nanos() - self.world + self.local);
        }
        let elapsed = i128::from(now.nanos() - self.world);
        let local = elapsed * (MILLION + i128::from(self.drift)) / MILLION;
        Instant::from_nanos(self.local + u64::try_from(local).expect("clocks run forward"))
    }

    /// When it shows `local`, or the world's time of the last change of its rate if that is earlier.
    pub(crate) fn world(&self, local: Instant) -> Instant {
        let elapsed = local.nanos().saturating_sub(self.local);
        if self.drift == 0 {
            return Instant::from_nanos(self.world.saturating_add(elapsed));
        }
        let rate = MILLION + i128::from(self.drift);
        let world = (i128::from(elapsed) * MILLION + rate - 1) / rate;
        let world = u64::try_from(world).unwrap_or(u64::MAX);
        Instant::from_nanos(self.world.saturating_add(world))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deadline_has_come_when_the_world_says_so() {
        for drift in [-20_000, -7, 0, 3, 20_000] {
            let mut clock = Clock::new(Instant::from_nanos(500), 90_000, drift);
            for deadline in [90_000, 90_001, 123_456, 9_999_999_999] {
                let deadline = Instant::from_nanos(deadline);
                let at = clock.world(deadline);
                assert!(clock.local(at) >= deadline, "drift {drift}");
            }
            let now = Instant::from_nanos(1_000_000);
            let before = clock.local(now);
            clock.set_drift(now, -drift);
            assert_eq!(clock.local(now), before, "a clock does not jump");
        }
    }
}
