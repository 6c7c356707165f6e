//! The clock.

use base::Instant;

/// The time now, of CLOCK_BOOTTIME: nanoseconds since the machine started, the same in every
/// thread and process. Runs on while the machine is suspended, as read grants need
/// (`docs/decisions/0014-read-grants.md`). Costs a vDSO call (about 20 ns).
pub fn now() -> Instant {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let seconds = u64::try_from(time.tv_sec).expect("the clock is not negative");
    let nanos = u64::try_from(time.tv_nsec).expect("nanoseconds are not negative");
    Instant::from_nanos(seconds * 1_000_000_000 + nanos)
}
