//! What the benchmarks have in common: their command line, statistics, and how they end.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

/// Runs of each kind, if nobody says otherwise.
const RUNS_DEFAULT: usize = 30;

/// The most runs of a kind.
const RUNS_MAX: usize = 10_000;

/// The command line of a benchmark.
#[derive(Debug)]
pub struct Options {
    /// How often each scenario is measured.
    pub runs: usize,
    /// The names of the scenarios to measure, in the order they were given; all if empty.
    pub only: Vec<String>,
    check: bool,
    json: bool,
    file: Option<PathBuf>,
}

/// What came of a benchmark.
#[derive(Debug)]
pub struct Outcome {
    /// For a reader.
    pub table: String,
    /// For a program.
    pub report: Value,
    /// What went wrong, a line each: no figure makes up for that.
    pub failures: Vec<String>,
    /// The figures that miss their goal, a line each.
    pub missed: Vec<String>,
}

/// Runs a benchmark: reads the command line, measures, prints what came of it.
pub fn main(
    name: &str,
    usage: &str,
    scenarios: &[&str],
    measure: impl FnOnce(&Options) -> Result<Outcome>,
) -> ExitCode {
    let options = match Options::parse(scenarios, std::env::args().skip(1)) {
        Ok(Some(options)) => options,
        Ok(None) => {
            print!("{usage}");
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprintln!("bench {name}: {error:#}\n\n{usage}");
            return ExitCode::from(2);
        }
    };
    match measure(&options).and_then(|outcome| options.tell(&outcome)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bench {name}: {error:#}");
            ExitCode::FAILURE
        }
    }
}

impl Options {
    /// `None`: somebody asked for help.
    fn parse(scenarios: &[&str], arguments: impl Iterator<Item = String>) -> Result<Option<Self>> {
        let (only, file) = (Vec::new(), None);
        let mut options = Self { runs: RUNS_DEFAULT, only, check: false, json: false, file };
        let mut arguments = arguments.peekable();
        while let Some(name) = arguments.next() {
            match name.as_str() {
                "--help" | "-h" => return Ok(None),
                "--check" => options.check = true,
                "--json" => {
                    options.json = true;
                    let file = arguments.next_if(|next| !next.starts_with("--"));
                    options.file = file.map(PathBuf::from);
                }
                "--runs" => {
                    options.runs = arguments.next().context("--runs needs a number")?.parse()?;
                    ensure!((1..=RUNS_MAX).contains(&options.runs), "--runs is 1 to {RUNS_MAX}");
                }
                "--only" => {
                    let name = arguments.next().context("--only needs a scenario")?;
                    let known = scenarios.contains(&name.as_str());
                    ensure!(known, "no scenario '{name}'; there are {}", scenarios.join(", "));
                    options.only.push(name);
                }
                _ => bail!("what is {name}?"),
            }
        }
        Ok(Some(options))
    }

    /// True if this scenario is to be measured.
    pub fn wants(&self, scenario: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|name| name == scenario)
    }

    /// Prints the outcome; true if nothing failed and, if that was asked for, no goal was missed.
    fn tell(&self, outcome: &Outcome) -> Result<bool> {
        let bare = self.json && self.file.is_none();
        if let Some(path) = &self.file {
            let text = serde_json::to_string_pretty(&outcome.report)?;
            std::fs::write(path, text).with_context(|| path.display().to_string())?;
        }
        if bare {
            println!("{}", serde_json::to_string_pretty(&outcome.report)?);
        } else {
            print!("{}", outcome.table);
        }
        if !self.check {
            return Ok(outcome.failures.is_empty());
        }
        for line in outcome.failures.iter().chain(&outcome.missed) {
            // With the JSON on standard output, this is for whoever watches.
            if bare {
                eprintln!("{line}");
            } else {
                println!("{line}");
            }
        }
        Ok(outcome.failures.is_empty() && outcome.missed.is_empty())
    }
}

/// What a figure counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Milliseconds.
    Milliseconds,
    /// So many times the figure without a fault.
    Times,
}

impl Unit {
    /// A figure with its unit.
    pub fn show(self, figure: f64) -> String {
        match self {
            Self::Milliseconds if figure < 100.0 => format!("{figure:.1} ms"),
            Self::Milliseconds => format!("{figure:.0} ms"),
            Self::Times => format!("{figure:.2} x"),
        }
    }

    /// For reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Milliseconds => "ms",
            Self::Times => "times",
        }
    }
}

/// Minimum, median, 99th percentile (nearest rank) and maximum.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Summary {
    /// The smallest.
    pub min: f64,
    /// Half are not above it.
    pub median: f64,
    /// Ninety-nine of a hundred are not above it.
    pub p99: f64,
    /// The largest.
    pub max: f64,
}

impl Summary {
    /// Of some figures; `None` if there are none.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut sorted: Vec<f64> = values.into_iter().collect();
        sorted.sort_by(f64::total_cmp);
        let rank = |per_cent: usize| sorted[(sorted.len() * per_cent).div_ceil(100).max(1) - 1];
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        Some(Self { min, median: rank(50), p99: rank(99), max })
    }
}

/// A figure that was measured several times, and what it is to be at most.
#[derive(Debug, Clone)]
pub struct Figure {
    /// What it is called.
    pub name: String,
    /// What it counts.
    pub unit: Unit,
    /// What it is to be at most, at its 99th percentile; `None`: it is for comparison.
    pub goal: Option<f64>,
    /// What was measured.
    pub values: Vec<f64>,
}

impl Figure {
    /// A line of a table, as [`Figure::heading`] has it.
    pub fn line(&self) -> String {
        let show = |figure: f64| self.unit.show(figure);
        let cells = Summary::of(self.values.iter().copied()).map_or_else(String::new, |all| {
            [all.min, all.median, all.p99, all.max]
                .map(|figure| format!(" {:>10}", show(figure)))
                .concat()
        });
        let goal = self.goal.map_or("-".to_owned(), show);
        format!("{:<36} {:>5}{cells:<44} {goal:>10}", self.name, self.values.len())
    }

    /// What stands above [`Figure::line`]s.
    pub fn heading() -> String {
        format!(
            "{:<36} {:>5} {:>10} {:>10} {:>10} {:>10} {:>10}",
            "figure", "runs", "min", "median", "p99", "max", "goal"
        )
    }

    /// Says so if the goal is missed.
    pub fn missed(&self) -> Option<String> {
        let (name, goal) = (&self.name, self.goal?);
        let Some(summary) = Summary::of(self.values.iter().copied()) else {
            return Some(format!("MISSED {name}: nothing was measured"));
        };
        let show = |figure: f64| self.unit.show(figure);
        (summary.p99 > goal)
            .then(|| format!("MISSED {name}: p99 {} of {} allowed", show(summary.p99), show(goal)))
    }

    /// For a program.
    pub fn report(&self) -> Value {
        let summary = Summary::of(self.values.iter().copied());
        json!({
            "name": self.name,
            "unit": self.unit.name(),
            "goal_p99": self.goal,
            "min": summary.map(|all| all.min),
            "median": summary.map(|all| all.median),
            "p99": summary.map(|all| all.p99),
            "max": summary.map(|all| all.max),
            "goal_met": self.missed().is_none(),
            "values": self.values,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &[&str]) -> Result<Option<Options>> {
        Options::parse(&["one", "two"], words.iter().map(|&word| word.to_owned()))
    }

    #[test]
    fn command_lines() {
        let options = parse(&["--runs", "3", "--only", "two", "--json", "--check"]);
        let options = options.unwrap().unwrap();
        assert_eq!((options.runs, options.check, options.json), (3, true, true));
        assert!(options.file.is_none() && options.wants("two") && !options.wants("one"));
        let options = parse(&["--json", "file"]).unwrap().unwrap();
        assert_eq!(options.file.as_deref(), Some("file".as_ref()));
        assert!(options.wants("one") && options.runs == 30);
        assert!(parse(&["--help"]).unwrap().is_none());
        for wrong in [&["--only", "three"][..], &["--runs", "0"], &["--runs"], &["what"]] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn figures_and_goals() {
        let values = (1..=200).rev().map(f64::from).collect();
        let mut figure =
            Figure { name: "it".into(), unit: Unit::Milliseconds, goal: Some(198.0), values };
        let summary = Summary::of(figure.values.iter().copied()).unwrap();
        assert_eq!(summary, Summary { min: 1.0, median: 100.0, p99: 198.0, max: 200.0 });
        assert_eq!(figure.missed(), None);
        figure.values.extend([300.0; 2]);
        assert!(figure.missed().unwrap().contains("p99 200 ms of 198 ms"));
        figure.values.clear();
        assert!(figure.missed().unwrap().contains("nothing was measured"));
    }
}
