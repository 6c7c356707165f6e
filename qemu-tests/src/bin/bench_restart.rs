//! What a guest feels when the process that serves its disk is killed and restarted.
//! `scripts/dev bench restart` builds everything and runs it.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use framework::Lab;
use framework::failover::Amount;
use framework::restart::{Restart, Victim};
use serde_json::{Value, json};

const USAGE: &str = "\
Usage: scripts/dev bench restart [--runs N] [--only VICTIM]... [--check] [--json [FILE]]

  --runs N       kills of each kind (default 30)
  --only VICTIM  only this kind; may be given again (default: daemon and attach)
  --check        exit status 1 if a figure misses its goal; those are listed last
  --json [FILE]  the figures and every run in JSON, to FILE or in place of the table

Real servers on this machine and a guest under QEMU with two queues, whose writer goes over the disk with
other data each time and then reads everything back. The process is killed at a random moment of
that and started again at once. A failed request, a wrong block or a complaint of the guest's kernel is a
failure of the whole run, whatever the figures. Exit status: 0, 1 for a failure or a goal that was
missed, 2 for wrong arguments.
";

/// The command line.
#[derive(Debug)]
struct Options {
    runs: usize,
    only: Vec<Victim>,
    check: bool,
    json: bool,
    file: Option<PathBuf>,
}

/// What came of one kind.
struct Measured {
    victim: Victim,
    runs: Vec<Restart>,
    failure: Option<String>,
}

fn main() -> ExitCode {
    let options = match parse(std::env::args().skip(1)) {
        Ok(Some(options)) => options,
        Ok(None) => {
            print!("{USAGE}\nVictims:\n{}", explanations());
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprintln!("bench restart: {error:#}\n\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match run(&options) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bench restart: {error:#}");
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
                let name = arguments.next().context("--only needs a victim")?;
                let found = Victim::ALL.into_iter().find(|known| known.name() == name);
                let names = || Victim::ALL.map(Victim::name).join(", ");
                let found = found.with_context(|| format!("no '{name}'; there are {}", names()))?;
                options.only.push(found);
            }
            _ => bail!("what is {name}?"),
        }
    }
    if options.only.is_empty() {
        options.only = vec![Victim::Daemon, Victim::Attach];
    }
    Ok(Some(options))
}

/// Runs everything; true if nothing failed and, if that was asked for, no goal was missed.
fn run(options: &Options) -> Result<bool> {
    let measured: Vec<Measured> =
        options.only.iter().map(|victim| measure(*victim, options.runs)).collect();
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
    let listed = failures.iter().chain(missed.iter().filter(|_| options.check));
    for line in listed {
        // With the JSON on standard output, this is for whoever watches.
        if bare {
            eprintln!("{line}");
        } else {
            println!("{line}");
        }
    }
    Ok(failures.is_empty() && (missed.is_empty() || !options.check))
}

fn measure(victim: Victim, runs: usize) -> Measured {
    let mut measured = Measured { victim, runs: Vec::new(), failure: None };
    let outcome = Lab::new(&format!("bench-restart-{}", victim.name()), 1).and_then(|lab| {
        let told = &mut |run: &Restart| {
            measured.runs.push(*run);
            eprintln!(
                "{} {}/{runs}: {:.0} ms (without a kill {:.0} ms; listens after {:.0} ms)",
                victim.name(),
                measured.runs.len(),
                run.pause_ms,
                run.quiet_ms,
                run.listens_ms
            );
        };
        let outcome = victim.repeat(&lab, Amount::Runs(runs), told);
        if outcome.is_err() {
            eprintln!("{}", lab.report());
        }
        outcome
    });
    if let Err(error) = outcome {
        eprintln!("{}: {error:#}", victim.name());
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
    fn pauses(&self) -> Option<Summary> {
        summary(self.runs.iter().map(|run| run.pause_ms))
    }

    fn failed(&self) -> Option<String> {
        let failure = self.failure.as_ref()?;
        let first = failure.lines().next().unwrap_or_default();
        Some(format!("FAILED {} after {} kills: {first}", self.victim.name(), self.runs.len()))
    }

    fn missed(&self) -> Option<String> {
        let (name, goal) = (self.victim.name(), self.victim.goal_ms()?);
        let Some(pauses) = self.pauses() else {
            return Some(format!("MISSED {name}: nothing was measured"));
        };
        let p99 = pauses.p99;
        (p99 > goal).then(|| format!("MISSED {name}: p99 {p99:.0} ms of {goal:.0} ms allowed"))
    }
}

fn table(all: &[Measured]) -> String {
    let mut lines = vec![format!(
        "{:<14} {:>5} {:>9} {:>9} {:>9} {:>9} {:>9} {:>14} {:>12}",
        "victim", "kills", "min", "median", "p99", "max", "goal", "no kill p99", "listens p99"
    )];
    let ms = |value: f64| format!("{value:.0} ms");
    for measured in all {
        let Some(pauses) = measured.pauses() else {
            lines.push(format!("{:<14} {:>5}", measured.victim.name(), 0));
            continue;
        };
        let p99_of = |value: fn(&Restart) -> f64| {
            summary(measured.runs.iter().map(value)).map_or(0.0, |all| all.p99)
        };
        lines.push(format!(
            "{:<14} {:>5} {:>9} {:>9} {:>9} {:>9} {:>9} {:>14} {:>12}",
            measured.victim.name(),
            measured.runs.len(),
            ms(pauses.min),
            ms(pauses.median),
            ms(pauses.p99),
            ms(pauses.max),
            measured.victim.goal_ms().map_or("-".to_owned(), ms),
            ms(p99_of(|run| run.quiet_ms)),
            ms(p99_of(|run| run.listens_ms)),
        ));
    }
    lines.push(String::new());
    lines.push(explanations());
    lines.join("\n")
}

fn explanations() -> String {
    let figure = "  the figure: the longest that a write of the guest took in that pass\n";
    let one = |one: Victim| format!("  {:<14} {}\n", one.name(), one.explanation());
    Victim::ALL.map(one).concat() + figure
}

fn report(all: &[Measured]) -> Value {
    let one = |measured: &Measured| {
        let pauses = measured.pauses();
        let run = |run: &Restart| {
            json!({
                "pause_ms": run.pause_ms,
                "quiet_ms": run.quiet_ms,
                "listens_ms": run.listens_ms,
            })
        };
        json!({
            "victim": measured.victim.name(),
            "explanation": measured.victim.explanation(),
            "unit": "ms",
            "goal_p99": measured.victim.goal_ms(),
            "min": pauses.as_ref().map(|all| all.min),
            "median": pauses.as_ref().map(|all| all.median),
            "p99": pauses.as_ref().map(|all| all.p99),
            "max": pauses.as_ref().map(|all| all.max),
            "goal_met": measured.missed().is_none(),
            "failure": measured.failure,
            "runs": measured.runs.iter().map(run).collect::<Vec<_>>(),
        })
    };
    json!({ "benchmark": "restart", "victims": all.iter().map(one).collect::<Vec<_>>() })
}
