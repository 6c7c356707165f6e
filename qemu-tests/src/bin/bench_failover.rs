//! What a client feels when something fails: the pause of each kind of fault, many times over.
//! `scripts/dev bench failover` builds everything and runs it.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use framework::failover::{Amount, Run, Scenario, Unit};
use framework::{Lab, Network};
use serde_json::{Value, json};

const USAGE: &str = "\
Usage: scripts/dev bench failover [--runs N] [--only SCENARIO]... [--check] [--json [FILE]]

  --runs N         faults of each kind (default 30)
  --only SCENARIO  only this kind; may be given again
  --check          exit status 1 if a figure misses its goal; those are listed last
  --json [FILE]    the figures and every run in JSON, to FILE or in place of the table

Real servers on this machine, a client that keeps 8 requests of 4 KiB under way, half of them
reads, and knows what every read must return. A failed request or a wrong byte is a failure of the
whole run, whatever the figures. Exit status: 0, 1 for a failure or a goal that was missed, 2 for
wrong arguments.
";

/// The command line.
#[derive(Debug)]
struct Options {
    runs: usize,
    only: Vec<Scenario>,
    check: bool,
    json: bool,
    file: Option<PathBuf>,
}

/// What came of one scenario.
struct Measured {
    scenario: Scenario,
    runs: Vec<Run>,
    failure: Option<String>,
}

fn main() -> ExitCode {
    let options = match parse(std::env::args().skip(1)) {
        Ok(Some(options)) => options,
        Ok(None) => {
            print!("{USAGE}\nScenarios:\n{}", explanations());
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprintln!("bench failover: {error:#}\n\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match run(&options) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bench failover: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn parse(arguments: impl Iterator<Item = String>) -> Result<Option<Options>> {
    let mut options = Options { runs: 30, only: Vec::new(), check: false, json: false, file: None };
    let mut arguments = arguments.peekable();
    while let Some(name) = arguments.next() {
        match name.as_str() {
            "--help" | "-h" => return Ok(None),
            "--check" => options.check = true,
            "--json" => {
                options.json = true;
                options.file = arguments.next_if(|next| !next.starts_with("--")).map(PathBuf::from);
            }
            "--runs" => {
                options.runs = arguments.next().context("--runs needs a number")?.parse()?;
                ensure!((1..=10_000).contains(&options.runs), "--runs is 1 to 10000");
            }
            "--only" => {
                let name = arguments.next().context("--only needs a scenario")?;
                let found = Scenario::ALL.into_iter().find(|known| known.name() == name);
                let names = || Scenario::ALL.map(Scenario::name).join(", ");
                options.only.push(
                    found
                        .with_context(|| format!("no scenario '{name}'; there are {}", names()))?,
                );
            }
            _ => bail!("what is {name}?"),
        }
    }
    if options.only.is_empty() {
        options.only = Scenario::ALL.to_vec();
    }
    Ok(Some(options))
}

/// Runs everything; true if nothing failed and, if that was asked for, no goal was missed.
fn run(options: &Options) -> Result<bool> {
    if let Some(reason) = Network::unavailable()
        && options.only.iter().any(|scenario| scenario.needs_network())
    {
        bail!("hosts with a network between them cannot be had: {reason}");
    }
    let measured: Vec<Measured> =
        options.only.iter().map(|scenario| measure(*scenario, options.runs)).collect();
    let bare = options.json && options.file.is_none();
    if let Some(path) = &options.file {
        let text = serde_json::to_string_pretty(&report(&measured))?;
        std::fs::write(path, text).with_context(|| path.display().to_string())?;
    }
    if bare {
        println!("{}", serde_json::to_string_pretty(&report(&measured))?);
    } else {
        print!("{}", table(&measured));
    }
    let failures: Vec<String> = measured.iter().filter_map(Measured::failed).collect();
    let missed: Vec<String> = measured.iter().filter_map(Measured::missed).collect();
    if options.check {
        for line in failures.iter().chain(&missed) {
            // With the JSON on standard output, this is for whoever watches.
            if bare {
                eprintln!("{line}");
            } else {
                println!("{line}");
            }
        }
        return Ok(failures.is_empty() && missed.is_empty());
    }
    Ok(failures.is_empty())
}

fn measure(scenario: Scenario, runs: usize) -> Measured {
    let mut measured = Measured { scenario, runs: Vec::new(), failure: None };
    let outcome = Lab::new(&format!("bench-{}", scenario.name()), 0).and_then(|lab| {
        let told = &mut |run: &Run| {
            measured.runs.push(*run);
            let count = measured.runs.len();
            let figure = scenario.unit().show(run.figure);
            eprintln!(
                "{} {count}/{runs}: {figure} (quiet {})",
                scenario.name(),
                scenario.unit().show(run.quiet)
            );
        };
        let outcome = scenario.repeat(&lab, Amount::Runs(runs), told);
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

/// Minimum, median, 99th percentile (nearest rank) and maximum.
struct Summary {
    min: f64,
    median: f64,
    p99: f64,
    max: f64,
}

fn summary(values: impl Iterator<Item = f64>) -> Option<Summary> {
    let mut sorted: Vec<f64> = values.collect();
    sorted.sort_by(f64::total_cmp);
    let rank = |per_cent: usize| sorted[(sorted.len() * per_cent).div_ceil(100).max(1) - 1];
    let (min, max) = (*sorted.first()?, *sorted.last()?);
    Some(Summary { min, median: rank(50), p99: rank(99), max })
}

impl Measured {
    fn summary(&self) -> Option<Summary> {
        summary(self.runs.iter().map(|run| run.figure))
    }

    fn failed(&self) -> Option<String> {
        let failure = self.failure.as_ref()?;
        let first = failure.lines().next().unwrap_or_default();
        Some(format!("FAILED {} after {} runs: {first}", self.scenario.name(), self.runs.len()))
    }

    fn missed(&self) -> Option<String> {
        let (name, unit) = (self.scenario.name(), self.scenario.unit());
        let goal = self.scenario.goal()?;
        let Some(summary) = self.summary() else {
            return Some(format!("MISSED {name}: nothing was measured"));
        };
        (summary.p99 > goal).then(|| {
            format!("MISSED {name}: p99 {} of {} allowed", unit.show(summary.p99), unit.show(goal))
        })
    }
}

fn table(all: &[Measured]) -> String {
    let mut out = String::new();
    let mut line = |text: String| writeln!(out, "{text}").expect("a string takes all");
    line(format!(
        "{:<20} {:>5} {:>10} {:>10} {:>10} {:>10} {:>10} {:>12} {:>14}",
        "scenario",
        "runs",
        "min",
        "median",
        "p99",
        "max",
        "goal",
        "no fault p99",
        "slowest request"
    ));
    for measured in all {
        let (scenario, unit) = (measured.scenario, measured.scenario.unit());
        let Some(figure) = measured.summary() else {
            line(format!("{:<20} {:>5}", scenario.name(), 0));
            continue;
        };
        let quiet = summary(measured.runs.iter().map(|run| run.quiet)).map_or(0.0, |all| all.p99);
        let slowest = summary(measured.runs.iter().map(|run| run.slowest_ms));
        let slowest = slowest.map_or(0.0, |all| all.max);
        let took = summary(measured.runs.iter().map(|run| run.took_ms));
        let took = took.map_or(0.0, |all| all.median);
        line(format!(
            "{:<20} {:>5} {:>10} {:>10} {:>10} {:>10} {:>10} {:>12} {:>15} {:>10}",
            scenario.name(),
            measured.runs.len(),
            unit.show(figure.min),
            unit.show(figure.median),
            unit.show(figure.p99),
            unit.show(figure.max),
            scenario.goal().map_or("-".to_owned(), |goal| unit.show(goal)),
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
        let run = |run: &Run| {
            json!({
                "figure": run.figure,
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
            "unit": match scenario.unit() { Unit::Milliseconds => "ms", Unit::Times => "times" },
            "goal_p99": scenario.goal(),
            "min": figure.as_ref().map(|all| all.min),
            "median": figure.as_ref().map(|all| all.median),
            "p99": figure.as_ref().map(|all| all.p99),
            "max": figure.as_ref().map(|all| all.max),
            "goal_met": measured.missed().is_none(),
            "failure": measured.failure,
            "runs": measured.runs.iter().map(run).collect::<Vec<_>>(),
        })
    };
    json!({ "benchmark": "failover", "scenarios": all.iter().map(one).collect::<Vec<_>>() })
}
