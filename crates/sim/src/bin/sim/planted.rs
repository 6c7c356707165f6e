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
    use sim::faults::Focus;
    use sim::runner::{self, Violation};

    use super::super::Arguments;

    /// Seeds that a bug may take.
    const SEEDS: u64 = 400;

    struct Found {
        bug: Bug,
        seeds: u64,
        events: u64,
        violation: Option<(u64, Focus, Violation)>,
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

    /// What a run must be about for a bug to show soon.
    fn focus(bug: Bug) -> Focus {
        match bug {
            Bug::GrantUnchecked
            | Bug::GrantFromAnswer
            | Bug::GrantNotWaited
            | Bug::RestKeepsGrants
            | Bug::GrantForgottenByRestart
            | Bug::GrantForgottenByHandOver => Focus::StaleReads,
            Bug::JointRuleForgotten | Bug::PromotedTooEarly | Bug::GrowthNotPersisted => {
                Focus::Members
            }
            Bug::OpenWithoutSealQuorum
            | Bug::ShortestTail
            | Bug::TailMatchedBySeq
            | Bug::NoFencingOnArrival
            | Bug::NoGateOnDeparture
            | Bug::UncommittedHome
            | Bug::TruncatesTooLittle
            | Bug::CommitNewsTooHigh => Focus::Openings,
            Bug::HomeBeforeData
            | Bug::HomeBeforeMeta
            | Bug::HomeMetaInPlace
            | Bug::NewerBlockDropped
            | Bug::DiscardForgotten
            | Bug::LogEndToldTooLow
            | Bug::LogSegmentsUntold
            | Bug::TrimBeforeHome => Focus::Home,
            Bug::DamageTakenForTear | Bug::ReadUnverified | Bug::MendedOverNewer => Focus::Media,
            Bug::RecordUnverified | Bug::AnswerUnverified | Bug::HeaderUnverified => Focus::Wire,
            Bug::FillSkipsChunk
            | Bug::FillTrustsOldChunk
            | Bug::FillKeepsDiscarded
            | Bug::FetchUnsettled
            | Bug::StagedBeforeMedia => Focus::Fills,
            Bug::AckBeforeMedia
            | Bug::FuaForgotten
            | Bug::FlushBeforeQuorum
            | Bug::StartNotOnMedia
            | Bug::SealNotPersisted
            | Bug::SyncNotAwaited
            | Bug::TornTailAccepted => Focus::Power,
            Bug::AckBeforeQuorum
            | Bug::OneAckTooFew
            | Bug::ReadOfStaleMember
            | Bug::UndecidedRead
            | Bug::ReuseSeq
            | Bug::EarlyRelease => Focus::Everything,
        }
    }

    /// Every second seed is about what the bug is about.
    fn hunt(bug: Bug, base: u64, seeds: u64) -> Found {
        plant(Some(bug));
        let mut found = Found { bug, seeds: 0, events: 0, violation: None };
        for seed in base..base + seeds {
            found.seeds += 1;
            let focus = if seed.is_multiple_of(2) { focus(bug) } else { Focus::of(seed) };
            match runner::run(WorldConfig::with_focus(seed, focus)) {
                Ok(report) => found.events += report.events,
                Err(violation) => {
                    found.events += violation.events;
                    // What this seed violates without the bug is not the bug's.
                    plant(None);
                    let clean = runner::run(WorldConfig::with_focus(seed, focus)).is_ok();
                    plant(Some(bug));
                    if clean {
                        found.violation = Some((seed, focus, violation));
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
            Some((seed, focus, violation)) => {
                let first = violation.what.lines().next().unwrap_or_default();
                let first: String = first.chars().take(120).collect();
                println!(
                    "{:24} found by seed {seed} {focus:?} ({seeds} seeds, {events} events): {first}",
                    bug.name()
                );
            }
            None => println!("{:24} NOT FOUND in {seeds} seeds: {}", bug.name(), bug.text()),
        }
        violation.is_some()
    }
}
