//! What a client feels when something fails: the pause of each kind of fault, many times over.
//! `scripts/dev bench failover` builds everything and runs it.

use std::fmt::Write as _;
use std::process::ExitCode;

use anyhow::{Result, bail};
use framework::bench::{self, Options, Outcome, Summary, Unit};
use framework::failover::{Amount, Ground, Run, Scenario};
use framework::{Lab, MachineProbe, Network, Space};
use serde_json::{Value, json};

const USAGE: &str = "\
Usage: scripts/dev bench failover [--runs N] [--only SCENARIO]... [--check] [--json [FILE]]

  --runs N         faults of each kind (default 30)
  --only SCENARIO  only this kind; may be given again
  --check          exit status 1 if a figure misses its goal; those are listed last. Goals are for the
                   99th percentile, and for the median where the figure is one of percentiles itself
                   (member-slow), of what is beyond the machine; where a process dies they are on top of what
                   bystander-killed cost, if that was measured, too
  --json [FILE]    the figures and every run in JSON, to FILE or in place of the table

Real servers on this machine, a client that keeps 8 requests of 4 KiB under way, half of them
reads, and knows what every read must return. Pools' files were written once, so that a sync is what
it is on a block device. `beyond machine` is the figure without the time in which the one disk under
all servers let somebody else wait, too, or the machine itself stood still: a page of a file of its own is
written through a hundred times a second, a thread on each processor wakes every 2 ms, and what takes more
than 10 ms longer counts, if no thread of this machine was the reason. A failed request or a wrong byte is a failure of the
whole run, whatever the figures. Exit status: 0, 1 for a failure or a goal that was missed, 2 for wrong arguments.
";

/// What came of one scenario.
struct Measured {
    scenario: Scenario,
    runs: Vec<Run>,
    /// Each run's figure, without what the disk does to everybody.
    beyond: Vec<f64>,
    failure: Option<String>,
    /// What the figure is to be at most.
    goal: Option<f64>,
}

fn main() -> ExitCode {
    let usage = format!("{USAGE}\nScenarios:\n{}", explanations());
    bench::main("failover", &usage, &Scenario::ALL.map(Scenario::name), run)
}

/// Runs everything that is wanted.
fn run(options: &Options) -> Result<Outcome> {
    let wanted = Scenario::ALL.into_iter().filter(|scenario| options.wants(scenario.name()));
    let wanted: Vec<Scenario> = wanted.collect();
    if let Some(reason) = Network::unavailable()
        && wanted.iter().any(|scenario| scenario.needs_network())
    {
        bail!("hosts with a network between them cannot be had: {reason}");
    }
    let mut measured: Vec<Measured> =
        wanted.iter().map(|scenario| measure(*scenario, options.runs)).collect();
    let bystander = measured.iter().find(|one| one.scenario == Scenario::BystanderKilled);
    let dying = bystander.and_then(Measured::beyond_machine).map_or(0.0, |all| all.p99);
    for one in &mut measured {
        let dying = if one.scenario.kills_a_server() { dying } else { 0.0 };
        one.goal = one.scenario.goal().map(|goal| goal + dying);
    }
    Ok(Outcome {
        table: table(&measured),
        report: report(&measured),
        failures: measured.iter().filter_map(Measured::failed).collect(),
        missed: measured.iter().filter_map(Measured::missed).collect(),
    })
}

fn measure(scenario: Scenario, runs: usize) -> Measured {
    let (runs_done, beyond) = (Vec::new(), Vec::new());
    let mut measured = Measured { scenario, runs: runs_done, beyond, failure: None, goal: None };
    let outcome = Lab::new(&format!("bench-{}", scenario.name()), 0).and_then(|lab| {
        let probe = MachineProbe::start(&lab)?;
        let told = &mut |run: &Run| {
            let beyond = probe.beyond(&run.pauses);
            let beyond = beyond.map_or(run.figure, |beyond| beyond.as_secs_f64() * 1000.0);
            measured.runs.push(run.clone());
            measured.beyond.push(beyond);
            let show = |figure| scenario.unit().show(figure);
            eprintln!(
                "{} {}/{runs}: {} ({} beyond the machine, quiet {})",
                scenario.name(),
                measured.runs.len(),
                show(run.figure),
                show(beyond),
                show(run.quiet)
            );
        };
        let ground = Ground { lab: &lab, space: Space::Written };
        let outcome = scenario.repeat(ground, Amount::Runs(runs), told);
        if outcome.is_err() {
            eprintln!("{}", lab.report());
        }
        outcome
    });
    if let Err(error) = outcome {
        eprintln!("{}: {error:#}", scenario.name());
        measured.failure = Some(format!("{error:#}"));
    }
    measured
}

impl Measured {
    fn summary(&self) -> Option<Summary> {
        Summary::of(self.runs.iter().map(|run| run.figure))
    }

    fn beyond_machine(&self) -> Option<Summary> {
        Summary::of(self.beyond.iter().copied())
    }

    fn failed(&self) -> Option<String> {
        let failure = self.failure.as_ref()?;
        let first = failure.lines().next().unwrap_or_default();
        Some(format!("FAILED {} after {} runs: {first}", self.scenario.name(), self.runs.len()))
    }

    fn missed(&self) -> Option<String> {
        let (name, unit) = (self.scenario.name(), self.scenario.unit());
        let (goal, summary) = (self.goal?, self.beyond_machine()?);
        let (which, reached) = match unit {
            Unit::Times => ("median", summary.median),
            Unit::Milliseconds => ("p99", summary.p99),
        };
        (reached > goal).then(|| {
            let (reached, goal) = (unit.show(reached), unit.show(goal));
            format!("MISSED {name}: {which} {reached} beyond the machine, of {goal} allowed")
        })
    }
}

fn table(all: &[Measured]) -> String {
    let mut out = String::new();
    let mut line = |text: String| writeln!(out, "{text}").expect("a string takes all");
    line(format!(
        "{:<20} {:>5} {:>10} {:>10} {:>10} {:>10} {:>10} {:>15} {:>12} {:>15} {:>10}",
        "scenario",
        "runs",
        "min",
        "median",
        "p99",
        "max",
        "goal",
        "beyond machine",
        "no fault p99",
        "slowest request",
        "took"
    ));
    for measured in all {
        let (scenario, unit) = (measured.scenario, measured.scenario.unit());
        let Some(figure) = measured.summary() else {
            line(format!("{:<20} {:>5}", scenario.name(), 0));
            continue;
        };
        let quiet =
            Summary::of(measured.runs.iter().map(|run| run.quiet)).map_or(0.0, |all| all.p99);
        let slowest = Summary::of(measured.runs.iter().map(|run| run.slowest_ms));
        let slowest = slowest.map_or(0.0, |all| all.max);
        let took = Summary::of(measured.runs.iter().map(|run| run.took_ms));
        let took = took.map_or(0.0, |all| all.median);
        line(format!(
            "{:<20} {:>5} {:>10} {:>10} {:>10} {:>10} {:>10} {:>15} {:>12} {:>15} {:>10}",
            scenario.name(),
            measured.runs.len(),
            unit.show(figure.min),
            unit.show(figure.median),
            unit.show(figure.p99),
            unit.show(figure.max),
            measured.goal.map_or("-".to_owned(), |goal| unit.show(goal)),
            unit.show(measured.beyond_machine().map_or(0.0, |all| all.p99)),
            unit.show(quiet),
            Unit::Milliseconds.show(slowest),
            Unit::Milliseconds.show(took),
        ));
    }
    line(String::new());
    line(explanations());
    for failure in all.iter().filter_map(Measured::failed) {
        line(failure);
    }
    out
}

fn explanations() -> String {
    Scenario::ALL.map(|one| format!("  {:<20} {}\n", one.name(), one.explanation())).concat()
}

fn report(all: &[Measured]) -> Value {
    let one = |measured: &Measured| {
        let (scenario, figure) = (measured.scenario, measured.summary());
        let run = |(run, beyond): (&Run, &f64)| {
            json!({
                "figure": run.figure,
                "beyond_machine": beyond,
                "quiet": run.quiet,
                "slowest_ms": run.slowest_ms,
                "began_ms": run.began_ms,
                "took_ms": run.took_ms,
                "completed": run.completed,
            })
        };
        json!({
            "scenario": scenario.name(),
            "explanation": scenario.explanation(),
            "unit": scenario.unit().name(),
            "goal": measured.goal,
            "min": figure.as_ref().map(|all| all.min),
            "median": figure.as_ref().map(|all| all.median),
            "p99": figure.as_ref().map(|all| all.p99),
            "max": figure.as_ref().map(|all| all.max),
            "beyond_machine_p99": measured.beyond_machine().map(|all| all.p99),
            "goal_met": measured.missed().is_none(),
            "failure": measured.failure,
            "runs": measured.runs.iter().zip(&measured.beyond).map(run).collect::<Vec<_>>(),
        })
    };
    json!({ "benchmark": "failover", "scenarios": all.iter().map(one).collect::<Vec<_>>() })
}
