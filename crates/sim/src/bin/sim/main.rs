//! `scripts/dev sim`: seed after seed through the simulator, until one violates something.

mod planted;
mod quiet;

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use clap::Parser;
use sim::faults::Focus;
use sim::places::{Place, Places};
use sim::runner::{self, Violation};
use sim::{Report, WorldConfig};

/// How long the faults of one failing seed may be cut down.
const MINIMISE: Duration = Duration::from_mins(1);
/// A seed takes seconds. As many looks at a second's distance; a clock would count while all of it is stopped.
const ENDLESS_LOOKS: u32 = 180;

/// The seed that a worker is at.
type Running = Mutex<Option<u64>>;

/// Runs simulated clusters, seed after seed.
#[derive(Parser)]
#[command(name = "scripts/dev sim")]
struct Arguments {
    /// Seeds to run, 1000 by default, or as many as fit --seconds.
    #[arg(long)]
    seeds: Option<u64>,
    /// The first seed; by default a fresh one, which is printed.
    #[arg(long)]
    seed_base: Option<u64>,
    /// Stop after so many seconds, however many seeds that were.
    #[arg(long)]
    seconds: Option<u64>,
    /// Seeds at a time; by default one for each processor.
    #[arg(long)]
    jobs: Option<usize>,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
    /// Run this seed alone and print what happens.
    #[arg(long)]
    replay: Option<u64>,
    /// With --replay: make the seed about this (`Home`, say), as --planted says.
    #[arg(long)]
    focus: Option<String>,
    /// With --replay: only the faults that the violation takes.
    #[arg(long)]
    minimal: bool,
    /// With --replay: print what happens to this block.
    #[arg(long)]
    block: Option<u64>,
    /// Places that were not reached are no failure (for short runs).
    #[arg(long)]
    no_places: bool,
    /// Measure how fast one core is without faults: many writes, and a calm guest (--seconds: each).
    #[arg(long)]
    quiet: bool,
    /// Prove that planted bugs are found, each within so many seeds (--seeds, 400 by default).
    #[arg(long)]
    planted: bool,
    /// With --planted or --replay: this bug only.
    #[arg(long)]
    bug: Option<String>,
    /// The commit, for the record.
    #[arg(long, hide = true)]
    commit: Option<String>,
}

/// What all seeds did together.
#[derive(Default)]
struct Total {
    seeds: u64,
    answered: u64,
    written: u64,
    checked: u64,
    faults: u64,
    heads: u64,
    events: u64,
    simulated: Duration,
    /// Of all traces together, in whatever order the seeds were run.
    digest: u64,
    slowest_recovery: (Duration, u64),
    places: Places,
    violations: BTreeMap<u64, Violation>,
}

impl Total {
    fn add(&mut self, seed: u64, result: Result<Report, Violation>) {
        self.seeds += 1;
        match result {
            Ok(report) => {
                self.answered += report.answered;
                self.written += report.written;
                self.checked += report.checked;
                self.faults += report.faults;
                self.heads += report.heads;
                self.events += report.events;
                self.simulated += report.simulated;
                let mixed = report.digest.wrapping_mul(seed | 1).rotate_left(31);
                self.digest = self.digest.wrapping_add(mixed);
                self.slowest_recovery = self.slowest_recovery.max((report.recovery, seed));
                self.places.add(&report.places);
            }
            Err(violation) => {
                self.violations.insert(seed, violation);
            }
        }
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if arguments.planted {
        return planted::prove(&arguments);
    }
    if arguments.quiet {
        return quiet::measure(&arguments);
    }
    match arguments.replay {
        Some(seed) => replay(&arguments, seed),
        None => many(&arguments),
    }
}

fn replay(arguments: &Arguments, seed: u64) -> ExitCode {
    if let Err(error) = planted::plant_named(arguments.bug.as_deref()) {
        eprintln!("sim: {error}");
        return ExitCode::from(2);
    }
    let mut config = WorldConfig::with_faults(seed);
    if let Some(name) = &arguments.focus {
        let named = |focus: &&Focus| format!("{focus:?}") == *name;
        let Some(focus) = Focus::ALL.iter().find(named) else {
            eprintln!("sim: a seed can be about one of {:?}", Focus::ALL);
            return ExitCode::from(2);
        };
        config = WorldConfig::with_focus(seed, *focus);
    }
    if arguments.minimal
        && let Err(violation) = runner::run(config.clone())
    {
        config.faults = runner::minimise(&config, &violation, MINIMISE);
    }
    config.trace = true;
    config.trace_block = arguments.block;
    match runner::run(config) {
        Ok(report) => {
            println!("seed {seed}: {report:?}");
            ExitCode::SUCCESS
        }
        Err(violation) => {
            println!("seed {seed}: {}\n  said at {}", violation.what, violation.place);
            ExitCode::FAILURE
        }
    }
}

/// A seed that nobody has run before, most likely.
fn fresh_seed() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::from(now.subsec_nanos()) + 1_000_000_000 * (now.as_secs() % 1_000_000)
}

fn jobs(arguments: &Arguments) -> usize {
    let all = || std::thread::available_parallelism().map_or(1, usize::from);
    arguments.jobs.unwrap_or_else(all)
}

fn many(arguments: &Arguments) -> ExitCode {
    let base = arguments.seed_base.unwrap_or_else(fresh_seed);
    if !arguments.json {
        println!("sim: seeds {base} and up (--seed-base {base})");
    }
    let jobs = jobs(arguments);
    let started = Instant::now();
    let running: Arc<Vec<Running>> = Arc::new((0..jobs).map(|_| Mutex::new(None)).collect());
    watch(&running);
    let end = arguments.seconds.map(|seconds| started + Duration::from_secs(seconds));
    let most = arguments.seeds.unwrap_or(if end.is_some() { u64::MAX } else { 1000 });
    let next = AtomicU64::new(0);
    let stop = AtomicBool::new(false);
    let total = Mutex::new(Total::default());
    std::thread::scope(|scope| {
        for job in running.iter() {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) && end.is_none_or(|end| Instant::now() < end) {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= most {
                        return;
                    }
                    *job.lock().expect("nobody panics with it") = Some(base + number);
                    let result = runner::run(WorldConfig::with_faults(base + number));
                    *job.lock().expect("nobody panics with it") = None;
                    let mut total = total.lock().expect("no worker panics with the lock");
                    total.add(base + number, result);
                    if total.violations.len() >= 5 {
                        stop.store(true, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    let total = total.into_inner().expect("no worker panics with the lock");
    report(arguments, base, &total, started.elapsed())
}

/// A seed that never ends (a machine that asks itself again and again) is a violation, too.
fn watch(running: &Arc<Vec<Running>>) {
    let running = Arc::clone(running);
    std::thread::spawn(move || {
        let mut seen = vec![(None, 0); running.len()];
        loop {
            std::thread::sleep(Duration::from_secs(1));
            for (job, (last, looks)) in running.iter().zip(&mut seen) {
                let now = *job.lock().expect("nobody panics with it");
                *looks = if now == *last { *looks + 1 } else { 0 };
                *last = now;
                if let Some(seed) = now.filter(|_| *looks > ENDLESS_LOOKS) {
                    println!("sim: FAILED: seed {seed} does not end (I6)");
                    println!("  replay: scripts/dev sim --replay {seed}");
                    std::process::exit(1);
                }
            }
        }
    });
}

fn report(arguments: &Arguments, base: u64, total: &Total, elapsed: Duration) -> ExitCode {
    let seconds = elapsed.as_secs_f64();
    let missing: Vec<&str> = total.places.missing().map(Place::text).collect();
    let rate = |count: u64| per(count, elapsed).round();
    if arguments.json {
        let violations: Vec<_> = total
            .violations
            .iter()
            .map(|(seed, violation)| {
                serde_json::json!({"seed": seed, "what": violation.what, "place": violation.place})
            })
            .collect();
        let places: serde_json::Map<_, _> = Place::ALL
            .iter()
            .map(|place| (place.text().to_owned(), total.places.count(*place).into()))
            .collect();
        println!(
            "{:#}",
            serde_json::json!({
                "seed_base": base,
                "seeds": total.seeds,
                "seconds": seconds,
                "simulated_seconds": total.simulated.as_secs_f64(),
                "events": total.events,
                "requests": total.answered,
                "writes": total.written,
                "checked_blocks": total.checked,
                "faults": total.faults,
                "heads": total.heads,
                "digest": format!("{:016x}", total.digest),
                "slowest_recovery_seconds": total.slowest_recovery.0.as_secs_f64(),
                "places": places,
                "places_missing": missing,
                "violations": violations,
            })
        );
    } else {
        println!(
            "sim: {} seeds in {seconds:.1} s: {:.0} simulated seconds ({:.0}/s), {} events ({}/s)\n  \
             {} requests, {} checked writes ({}/s), {} blocks read and checked, {} heads\n  \
             {} faults ({:.1} per simulated second); slowest recovery {:.1} s (seed {}); digest {:016x}",
            total.seeds,
            total.simulated.as_secs_f64(),
            total.simulated.as_secs_f64() / seconds,
            total.events,
            rate(total.events),
            total.answered,
            total.written,
            rate(total.written),
            total.checked,
            total.heads,
            total.faults,
            per(total.faults, total.simulated),
            total.slowest_recovery.0.as_secs_f64(),
            total.slowest_recovery.1,
            total.digest,
        );
        for (seed, violation) in &total.violations {
            tell(arguments, *seed, violation);
        }
    }
    let places_fail = !arguments.no_places && !missing.is_empty() && total.violations.is_empty();
    if places_fail && !arguments.json {
        println!("sim: FAILED: never reached:\n  {}", missing.join("\n  "));
    }
    if places_fail || !total.violations.is_empty() { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// So many a second.
#[allow(clippy::cast_precision_loss)] // far below 2^52, and for people
fn per(count: u64, time: Duration) -> f64 {
    count as f64 / time.as_secs_f64().max(1e-9)
}

fn tell(arguments: &Arguments, seed: u64, violation: &Violation) {
    let config = WorldConfig::with_faults(seed);
    let faults = runner::minimise(&config, violation, MINIMISE);
    println!(
        "\nsim: FAILED: seed {seed} at commit {}: {}\n  said at {}\n  {} of {} faults are enough:",
        arguments.commit.as_deref().unwrap_or("unknown"),
        violation.what,
        violation.place,
        faults.len(),
        config.faults.len(),
    );
    for fault in faults {
        println!("    {fault}");
    }
    println!("  replay: scripts/dev sim --replay {seed} [--minimal]");
}
