//! The clock.

use base::Instant;

/// The time now, of CLOCK_MONOTONIC: nanoseconds since the machine started, the same in every
/// thread and process. Costs a vDSO call (about 20 ns).
pub fn now() -> Instant {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let seconds = u64::try_from(time.tv_sec).expect("the monotonic clock is not negative");
    let nanos = u64::try_from(time.tv_nsec).expect("nanoseconds are not negative");
    Instant::from_nanos(seconds * 1_000_000_000 + nanos)
}
