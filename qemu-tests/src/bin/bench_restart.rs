//! What a guest feels when the process that serves its disk is killed and restarted.
//! `scripts/dev bench restart` builds everything and runs it.

use std::fmt::Write as _;
use std::process::ExitCode;

use anyhow::Result;
use framework::Lab;
use framework::bench::{self, Figure, Options, Outcome, Unit};
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

/// What came of one kind.
struct Measured {
    victim: Victim,
    runs: Vec<Restart>,
    failure: Option<String>,
}

fn main() -> ExitCode {
    let usage = format!("{USAGE}\nVictims:\n{}", explanations());
    bench::main("restart", &usage, &Victim::ALL.map(Victim::name), run)
}

fn run(options: &Options) -> Result<Outcome> {
    let wanted = |victim: &Victim| match victim {
        Victim::Daemon | Victim::Attach => options.wants(victim.name()),
        // For the verification: only if they are asked for.
        Victim::DaemonTwice | Victim::AttachTwice => {
            !options.only.is_empty() && options.wants(victim.name())
        }
    };
    let wanted = Victim::ALL.into_iter().filter(wanted);
    let measured: Vec<Measured> = wanted.map(|victim| measure(victim, options.runs)).collect();
    let figures: Vec<Figure> = measured.iter().flat_map(Measured::figures).collect();
    let mut table = format!("{}\n", Figure::heading());
    for figure in &figures {
        writeln!(table, "{}", figure.line())?;
    }
    write!(table, "\n{}", explanations())?;
    let failures: Vec<String> = measured.iter().filter_map(Measured::failed).collect();
    for failure in &failures {
        writeln!(table, "{failure}")?;
    }
    Ok(Outcome {
        table,
        report: json!({
            "benchmark": "restart",
            "victims": measured.iter().map(Measured::report).collect::<Vec<_>>(),
        }),
        failures,
        missed: figures.iter().filter_map(Figure::missed).collect(),
    })
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

impl Measured {
    fn figures(&self) -> Vec<Figure> {
        let figure = |what: &str, goal: Option<f64>, value: fn(&Restart) -> f64| Figure {
            name: format!("{} {what}", self.victim.name()),
            unit: Unit::Milliseconds,
            goal,
            values: self.runs.iter().map(value).collect(),
        };
        vec![
            figure("pause", self.victim.goal_ms(), |run| run.pause_ms),
            figure("without a kill", None, |run| run.quiet_ms),
            figure("listens after", None, |run| run.listens_ms),
        ]
    }

    fn failed(&self) -> Option<String> {
        let failure = self.failure.as_ref()?;
        let first = failure.lines().next().unwrap_or_default();
        Some(format!("FAILED {} after {} kills: {first}", self.victim.name(), self.runs.len()))
    }

    fn report(&self) -> Value {
        json!({
            "victim": self.victim.name(),
            "explanation": self.victim.explanation(),
            "kills": self.runs.len(),
            "failure": self.failure,
            "figures": self.figures().iter().map(Figure::report).collect::<Vec<_>>(),
        })
    }
}

fn explanations() -> String {
    let one = |one: Victim| format!("  {:<14} {}\n", one.name(), one.explanation());
    let figures = [
        ("pause", "the longest that a write of the guest took in the pass in which that happened"),
        ("without a kill", "the same in a pass before, in which nothing happened"),
        ("listens after", "from the kill until the socket is there again"),
    ];
    let figures = figures.map(|(name, what)| format!("  {name:<14} {what}\n"));
    Victim::ALL.map(one).concat() + &figures.concat()
}
