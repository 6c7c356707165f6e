//! What clients feel when the daemon that serves them is upgraded, many times over.
//! `scripts/dev bench upgrade` builds everything and runs it.

use std::fmt::Write as _;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use framework::bench::{self, Figure, Options, Outcome, Unit};
use framework::{
    Cluster, Deadline, Lab, Load, LoadOptions, MachineProbe, Oracle, PoolSizes, Space, verify,
};
use serde_json::json;

const USAGE: &str = "\
Usage: scripts/dev bench upgrade [--runs N] [--only REPLICAS]... [--check] [--json [FILE]]

  --runs N         upgrades of each kind (default 30)
  --only REPLICAS  only with a volume of `three` replicas, or of `one`; may be given again
  --check          exit status 1 if a figure misses its goal; those are listed last
  --json [FILE]    the figures in JSON, to FILE or in place of the table

Three servers on this machine; the one that serves a client is upgraded by `holdfastd upgrade`. The
client, which has no way to reconnect, keeps 8 requests of 4 KiB under way, half of them reads, and
knows what every read must return. A failed request or a wrong byte is a failure of the whole run,
whatever the figures.

  pause   the longest time without an answer, from before the upgrade until a second after
  beyond  the same without the time in which the disk let somebody else wait, too: a page of a file of its
          own is written through a hundred times a second, and what takes longer than 10 ms counts
  quiet   the pause in a second before: what the machine does to it, and no upgrade

Exit status: 0, 1 for a failure or a goal that was missed, 2 for wrong arguments.
";

/// How long an upgrade may be felt, in milliseconds, at its 99th percentile.
const PAUSE_MS_MAX: f64 = 50.0;

/// How long there is no upgrade, before and after each.
const QUIET: Duration = Duration::from_secs(1);

const SCENARIOS: [(&str, usize); 2] = [("three", 3), ("one", 1)];

/// What came of one scenario.
#[derive(Debug)]
struct Measured {
    name: &'static str,
    pauses_ms: Vec<f64>,
    beyond_ms: Vec<f64>,
    quiet_ms: Vec<f64>,
    slowest_ms: Vec<f64>,
    failure: Option<String>,
}

fn main() -> ExitCode {
    bench::main("upgrade", USAGE, &SCENARIOS.map(|(name, _)| name), run)
}

fn run(options: &Options) -> Result<Outcome> {
    let wanted = SCENARIOS.into_iter().filter(|(name, _)| options.wants(name));
    let measured: Vec<Measured> =
        wanted.map(|(name, replicas)| measure(name, replicas, options.runs)).collect();
    let figures: Vec<Figure> = measured.iter().flat_map(Measured::figures).collect();
    let mut table = format!("{}\n", Figure::heading());
    for figure in &figures {
        writeln!(table, "{}", figure.line())?;
    }
    let failures: Vec<String> = measured.iter().filter_map(Measured::failed).collect();
    for failure in &failures {
        writeln!(table, "{failure}")?;
    }
    let one = |measured: &Measured| {
        json!({
            "scenario": measured.name,
            "upgrades": measured.pauses_ms.len(),
            "failure": measured.failure,
            "figures": measured.figures().iter().map(Figure::report).collect::<Vec<_>>(),
        })
    };
    Ok(Outcome {
        table,
        report: json!({
            "benchmark": "upgrade",
            "scenarios": measured.iter().map(one).collect::<Vec<_>>(),
        }),
        failures,
        missed: figures.iter().filter_map(Figure::missed).collect(),
    })
}

fn measure(name: &'static str, replicas: usize, runs: usize) -> Measured {
    let mut measured = Measured {
        name,
        pauses_ms: Vec::new(),
        beyond_ms: Vec::new(),
        quiet_ms: Vec::new(),
        slowest_ms: Vec::new(),
        failure: None,
    };
    let outcome = Lab::new(&format!("bench-upgrade-{name}"), 0).and_then(|lab| {
        let outcome = repeat(&lab, replicas, runs, &mut measured);
        if outcome.is_err() {
            eprintln!("{}", lab.report());
        }
        outcome
    });
    if let Err(error) = outcome {
        eprintln!("{name}: {error:#}");
        measured.failure = Some(format!("{error:#}"));
    }
    measured
}

fn repeat(lab: &Lab, replicas: usize, runs: usize, measured: &mut Measured) -> Result<()> {
    let sizes = PoolSizes { space: Space::Written, ..PoolSizes::default() };
    let cluster = Cluster::start_with(lab, 3, sizes)?;
    cluster.create_volume("disk", 128, replicas)?;
    // A volume of one replica is served where it lies, or not at all within this goal.
    let server = (0..3).find(|server| holds(&cluster, *server)).unwrap_or(0);
    let socket = cluster.export(server, "disk")?;
    let options = LoadOptions { rate: 4000, ..LoadOptions::default() };
    let load = Load::start(&socket, options, Oracle::new(options.blocks))?;
    let probe = MachineProbe::start(lab)?;
    let milliseconds = |time: Duration| time.as_secs_f64() * 1000.0;
    for run in 1..=runs {
        load.begin_window();
        std::thread::sleep(QUIET);
        let quiet = milliseconds(load.end_window().pause);
        load.begin_window();
        cluster.servers()[server].upgrade()?;
        std::thread::sleep(QUIET);
        load.wait_for(100, Deadline::seconds(60))?;
        let window = load.end_window();
        let pause = milliseconds(window.pause);
        let beyond = probe.beyond(&window.pauses).map_or(pause, milliseconds);
        measured.pauses_ms.push(pause);
        measured.beyond_ms.push(beyond);
        measured.quiet_ms.push(quiet);
        measured.slowest_ms.push(milliseconds(window.slowest));
        eprintln!(
            "{} {run}/{runs}: {pause:.1} ms ({beyond:.1} ms beyond the machine, quiet {quiet:.1} ms)",
            measured.name
        );
    }
    verify(&socket, load.finish()?)?;
    Ok(())
}

/// True if a server has a replica.
fn holds(cluster: &Cluster<'_>, server: usize) -> bool {
    let status = cluster.servers()[server].status();
    status.is_ok_and(|status| status["replicas"].as_array().is_some_and(|all| !all.is_empty()))
}

impl Measured {
    fn figures(&self) -> Vec<Figure> {
        let figure = |what: &str, goal: Option<f64>, values: &Vec<f64>| Figure {
            name: format!("{} {what}", self.name),
            unit: Unit::Milliseconds,
            goal,
            values: values.clone(),
        };
        vec![
            figure("pause", None, &self.pauses_ms),
            figure("beyond", Some(PAUSE_MS_MAX), &self.beyond_ms),
            figure("quiet", None, &self.quiet_ms),
            figure("slowest request", None, &self.slowest_ms),
        ]
    }

    fn failed(&self) -> Option<String> {
        let failure = self.failure.as_ref()?;
        let first = failure.lines().next().unwrap_or_default();
        Some(format!("FAILED {} after {} upgrades: {first}", self.name, self.pauses_ms.len()))
    }
}
