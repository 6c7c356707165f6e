//! `scripts/dev sim --planted`: every planted bug must be found.

#[cfg(not(feature = "planted"))]
pub(super) fn prove(_arguments: &super::Arguments) -> std::process::ExitCode {
    eprintln!("sim: build with --features planted (scripts/dev sim --planted does)");
    std::process::ExitCode::from(2)
}

#[cfg(not(feature = "planted"))]
pub(super) fn plant_named(name: Option<&str>) -> Result<(), String> {
    match name {
        Some(_) => Err("build with --features planted to plant a bug".to_owned()),
        None => Ok(()),
    }
}

#[cfg(feature = "planted")]
pub(super) use with_bugs::{plant_named, prove};

#[cfg(feature = "planted")]
mod with_bugs {
    use std::process::ExitCode;
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use base::planted::{Bug, plant};
    use sim::WorldConfig;
    use sim::runner::{self, Violation};

    use super::super::Arguments;

    /// Seeds that a bug may take.
    const SEEDS: u64 = 400;

    struct Found {
        bug: Bug,
        seeds: u64,
        events: u64,
        violation: Option<(u64, Violation)>,
    }

    fn named(name: &str) -> Result<Bug, String> {
        let found = Bug::ALL.iter().copied().find(|bug| bug.name() == name);
        found.ok_or_else(|| {
            let names: Vec<&str> = Bug::ALL.iter().map(|bug| bug.name()).collect();
            format!("no bug is called {name}; there are {}", names.join(", "))
        })
    }

    pub(crate) fn plant_named(name: Option<&str>) -> Result<(), String> {
        plant(name.map(named).transpose()?);
        Ok(())
    }

    fn hunt(bug: Bug, base: u64, seeds: u64) -> Found {
        plant(Some(bug));
        let mut found = Found { bug, seeds: 0, events: 0, violation: None };
        for seed in base..base + seeds {
            found.seeds += 1;
            match runner::run(WorldConfig::with_faults(seed)) {
                Ok(report) => found.events += report.events,
                Err(violation) => {
                    found.events += violation.events;
                    // What this seed violates without the bug is not the bug's.
                    plant(None);
                    let clean = runner::run(WorldConfig::with_faults(seed)).is_ok();
                    plant(Some(bug));
                    if clean {
                        found.violation = Some((seed, violation));
                        break;
                    }
                }
            }
        }
        plant(None);
        found
    }

    pub(crate) fn prove(arguments: &Arguments) -> ExitCode {
        let base = arguments.seed_base.unwrap_or(0);
        let seeds = arguments.seeds.unwrap_or(SEEDS);
        let bugs: Vec<Bug> = match arguments.bug.as_deref().map(named).transpose() {
            Ok(Some(bug)) => vec![bug],
            Ok(None) => Bug::ALL.to_vec(),
            Err(error) => {
                eprintln!("sim: {error}");
                return ExitCode::from(2);
            }
        };
        let next = AtomicUsize::new(0);
        let missed = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for _ in 0..super::super::jobs(arguments) {
                scope.spawn(|| {
                    while let Some(bug) = bugs.get(next.fetch_add(1, Ordering::Relaxed)) {
                        let found = hunt(*bug, base, seeds);
                        if !tell(&found) {
                            missed.lock().expect("no worker panics with the lock").push(*bug);
                        }
                    }
                });
            }
        });
        let missed = missed.into_inner().expect("no worker panics with the lock");
        println!("sim: {} of {} planted bugs found", bugs.len() - missed.len(), bugs.len());
        if missed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }

    /// Prints what became of a bug; true if it was found.
    fn tell(found: &Found) -> bool {
        let Found { bug, seeds, events, violation } = found;
        match violation {
            Some((seed, violation)) => {
                let first = violation.what.lines().next().unwrap_or_default();
                let first: String = first.chars().take(120).collect();
                println!(
                    "{:24} found by seed {seed} ({seeds} seeds, {events} events): {first}",
                    bug.name()
                );
            }
            None => println!("{:24} NOT FOUND in {seeds} seeds: {}", bug.name(), bug.text()),
        }
        violation.is_some()
    }
}
