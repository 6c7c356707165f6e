//! `scripts/dev sim --quiet`: how fast the simulator is on one core when nothing fails.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use sim::{Habits, Report, World, WorldConfig};

/// Replicated writes a second that are wanted, all of them checked.
const WRITES_WANTED: f64 = 50_000.0;
/// Simulated seconds a second that are wanted.
const SECONDS_WANTED: f64 = 1000.0;
/// For how long each load is simulated.
const LENGTH: Duration = Duration::from_secs(5);

/// A load that stays the same: requests of 4 KiB.
struct Load {
    name: &'static str,
    requests: u64,
    pause_nanos: u64,
    reads_percent: u64,
}

/// The busy one is ready with the next request before the last is answered: its depth is what limits it.
const LOADS: &[Load] = &[
    Load { name: "busy", requests: 20_000, pause_nanos: 3_000, reads_percent: 10 },
    Load { name: "calm", requests: 2000, pause_nanos: 100_000_000, reads_percent: 35 },
];

/// For how long this thread has had a core, where the kernel says so: other work on the machine is not
/// in it.
fn core_time() -> Option<Duration> {
    let statistics = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    statistics.split(' ').next()?.parse().ok().map(Duration::from_nanos)
}

/// Runs each load on this thread, seed after seed, and tells what came of it.
pub(super) fn measure(arguments: &super::Arguments) -> ExitCode {
    let base = arguments.seed_base.unwrap_or(1);
    let length = arguments.seconds.map_or(LENGTH, Duration::from_secs);
    for load in LOADS {
        let (begun, mut seed, mut total) = (Instant::now(), base, Report::default());
        let used_before = core_time();
        while begun.elapsed() < length {
            let report = World::new(WorldConfig {
                hiccups: false,
                habits: Habits { blocks: 1, depth: 128, ..Habits::PLAIN },
                check_every: 1024,
                pause_nanos: load.pause_nanos,
                reads_percent: load.reads_percent,
                ..WorldConfig::quiet(seed, 3, false, load.requests)
            })
            .run();
            total.written += report.written;
            total.checked += report.checked;
            total.events += report.events;
            total.simulated += report.simulated;
            seed += 1;
        }
        let used = core_time().zip(used_before).map(|(after, before)| after.saturating_sub(before));
        let elapsed = used.unwrap_or_else(|| begun.elapsed());
        let writes = super::per(total.written, elapsed);
        let seconds = total.simulated.as_secs_f64() / elapsed.as_secs_f64();
        println!(
            "sim: quiet, {}: {writes:.0} checked writes/s (wanted {WRITES_WANTED:.0}), {seconds:.0} \
             simulated seconds/s (wanted {SECONDS_WANTED:.0}); {:.0} events/s, {:.1} events a write, {} \
             blocks checked",
            load.name,
            super::per(total.events, elapsed),
            super::per(total.events, Duration::from_secs(1))
                / super::per(total.written.max(1), Duration::from_secs(1)),
            total.checked,
        );
    }
    ExitCode::SUCCESS
}
