//! What a guest feels when it moves to another host, many times over.
//! `scripts/dev bench migrate` builds everything and runs it.

use std::fmt::Write as _;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, bail};
use framework::bench::{self, Figure, Options, Outcome, Summary, Unit};
use framework::migration::{Hosts, Move, Rig, RigOptions, Step, network, start_store};
use framework::{Lab, MachineProbe, Network, PoolSizes, Space};
use serde_json::{Value, json};

const USAGE: &str = "\
Usage: scripts/dev bench migrate [--runs N] [--only HOSTS]... [--check] [--json [FILE]]

  --runs N       migrations of each kind (default 30)
  --only HOSTS   only between hosts of this kind, `servers` (each runs holdfastd and has a replica) or
                 `diskless` (each runs holdfast attach), or `aborted`, or `bare-file`; may be given again
  --check        exit status 1 if a figure misses its goal; those are listed last
  --json [FILE]  the figures and every run in JSON, to FILE or in place of the table

A guest under QEMU moves back and forth between two hosts (network namespaces, as root), while a
program in it keeps 8 requests under way and knows what every read must return. The cluster store is an
etcd, and the pools' files were written once, so that a sync is what it is on a block device. QEMU runs
at a lower priority than back ends and servers (nice 10): emulation would take their processors. `aborted`
moves diskless, and before each migration that goes through there is one that is given up, at each step
in turn. `bare-file` has no Holdfast in it: each host's qemu-storage-daemon serves the same file, which
promises nothing but shows what a migration costs the guest on this machine in any case. A failed
request or a wrong byte is a failure of the whole run, whatever the figures.

  added     what the guest feels beside QEMU's own downtime: drain and gap together. The goal is on top of
            what that is at its p99 with the bare file, if that is measured, too
  drain     the source's back end, from GET_VRING_BASE to its answer; QEMU's downtime has it, too
  own       Holdfast's own part of the gap, by the back end's clock: from when the guest's first ring
            started at the destination until the volume was open, and what the first request took then;
            of that, until the lease was had (`lease`), and until the volume was open (`opened`)
  storage   drain and own together: what Holdfast adds, without what emulation and the machine's other work
            add to the gap
  beyond    storage without the time in which the one disk under all servers and etcd let somebody else wait,
            too: a page of a file of its own is written through a hundred times a second, and what takes
            longer than 10 ms counts
  gap       the longest time without an answer from when the guest was stopped until a second after, by
            the guest's clock, which stands still while the guest is stopped
  quiet     the same for the second before: what the machine does to it, and no migration
  downtime  QEMU's

Exit status: 0, 1 for a failure or a goal that was missed, 2 for wrong arguments.
";

/// What storage may add to what QEMU takes, in milliseconds, at the 99th percentile.
const ADDED_MS_MAX: f64 = 20.0;

/// With the bare file, a request that takes so many milliseconds is not answered at all: QEMU's storage daemon was
/// seen to leave some for good after migrations.
const UNANSWERED_MS: f64 = 1000.0;

/// How long a guest lives at most, for each migration.
const LIMIT_EACH: Duration = Duration::from_mins(3);

/// A kind of move.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Scenario {
    name: &'static str,
    hosts: Hosts,
    aborts: bool,
}

const SCENARIOS: [Scenario; 4] = [
    Scenario { name: Hosts::BareFile.name(), hosts: Hosts::BareFile, aborts: false },
    Scenario { name: Hosts::Servers.name(), hosts: Hosts::Servers, aborts: false },
    Scenario { name: Hosts::Diskless.name(), hosts: Hosts::Diskless, aborts: false },
    Scenario { name: "aborted", hosts: Hosts::Diskless, aborts: true },
];

/// What came of one scenario.
struct Measured {
    scenario: Scenario,
    moves: Vec<Move>,
    /// Of each of them, what Holdfast added without what the disk does to everybody, in milliseconds.
    beyond_ms: Vec<f64>,
    given_up: usize,
    failure: Option<String>,
}

fn main() -> ExitCode {
    bench::main("migrate", USAGE, &SCENARIOS.map(|scenario| scenario.name), run)
}

fn run(options: &Options) -> Result<Outcome> {
    if let Some(reason) = Network::unavailable() {
        bail!("hosts with a network between them cannot be had: {reason}");
    }
    let wanted = SCENARIOS.into_iter().filter(|scenario| options.wants(scenario.name));
    let measured: Vec<Measured> = wanted.map(|scenario| measure(scenario, options.runs)).collect();
    let bare = measured.iter().find(|measured| !measured.is_ours());
    let bare = bare.and_then(|bare| Summary::of(bare.moves.iter().map(|run| run.added_ms)));
    let goal = ADDED_MS_MAX + bare.map_or(0.0, |bare| bare.p99);
    let figures: Vec<Figure> =
        measured.iter().flat_map(|measured| measured.figures(goal)).collect();
    Ok(Outcome {
        table: table(&measured, &figures),
        report: report(&measured, goal),
        failures: measured.iter().filter_map(Measured::failed).collect(),
        missed: figures.iter().filter_map(Figure::missed).collect(),
    })
}

fn measure(scenario: Scenario, runs: usize) -> Measured {
    let (moves, beyond_ms, given_up, failure) = (Vec::new(), Vec::new(), 0, None);
    let mut measured = Measured { scenario, moves, beyond_ms, given_up, failure };
    // Once, unless the bare file's daemon spoils its guest.
    for _ in 0..runs {
        let outcome = Lab::new(&format!("bench-migrate-{}", scenario.name), 1).and_then(|lab| {
            let outcome = repeat(&lab, runs, &mut measured);
            if outcome.is_err() {
                eprintln!("{}", lab.report());
            }
            outcome
        });
        if let Err(error) = outcome {
            eprintln!("{}: {error:#}", scenario.name);
            measured.failure = Some(format!("{error:#}"));
        }
        if measured.failure.is_some() || measured.moves.len() == runs {
            break;
        }
    }
    measured
}

/// Measures until there are so many. Of the bare file fewer if a request is lost.
fn repeat(lab: &Lab, runs: usize, measured: &mut Measured) -> Result<()> {
    let Scenario { name, hosts, aborts } = measured.scenario;
    let network = network(lab)?;
    let limit = LIMIT_EACH * u32::try_from(runs)? + Duration::from_mins(5);
    // What hosts share: SQLite is for one machine.
    let etcd = start_store(lab, &network)?;
    let options = RigOptions {
        sizes: PoolSizes { fast_mib: 256, mass_mib: 256, space: Space::Written, buffers_mib: 128 },
        store: Some(etcd.store()),
        guests_make_way: true,
        ..RigOptions::new(hosts, limit)
    };
    let mut rig = Rig::start(lab, &network, options)?;
    let probe = MachineProbe::start(lab)?;
    let mut steps = Step::ALL.into_iter().cycle();
    for run in measured.moves.len() + 1..=runs {
        if aborts && let Some(step) = steps.next() {
            rig.give_up_at(step)?;
            measured.given_up += 1;
            eprintln!("{name} {run}/{runs}: {}", step.name());
        }
        let moved = rig.migrate()?;
        if hosts == Hosts::BareFile && moved.added_ms > UNANSWERED_MS {
            eprintln!(
                "{name} {run}/{runs}: QEMU's storage daemon has left a request unanswered for {:.0} ms, which \
                 is not counted; going on with a new guest",
                moved.added_ms
            );
            return Ok(());
        }
        let storage = moved.drain_ms + moved.own_ms;
        let beyond = storage - probe.stalled(&moved.own).as_secs_f64() * 1000.0;
        measured.moves.push(moved);
        measured.beyond_ms.push(beyond);
        eprintln!(
            "{name} {run}/{runs}: added {:.1} ms to QEMU's {:.0} ms (quiet {:.1} ms); drain {:.1} ms, \
             lease {:.1}, opened {:.1}, own {:.1}; {beyond:.1} beyond the machine",
            moved.added_ms,
            moved.downtime_ms,
            moved.quiet_ms,
            moved.drain_ms,
            moved.lease_ms,
            moved.opened_ms,
            moved.own_ms
        );
    }
    match hosts {
        Hosts::Servers | Hosts::Diskless => rig.finish(),
        // The writer would wait for what that daemon has left unanswered.
        Hosts::BareFile => Ok(()),
    }
}

impl Measured {
    fn is_ours(&self) -> bool {
        self.scenario.hosts != Hosts::BareFile
    }

    /// All figures; `added` is the goal for what is added to QEMU's downtime.
    fn figures(&self, added: f64) -> Vec<Figure> {
        let figure = |what: &str, goal: Option<f64>, value: fn(&Move) -> f64| Figure {
            name: format!("{} {what}", self.scenario.name),
            unit: Unit::Milliseconds,
            goal,
            values: self.moves.iter().map(value).collect(),
        };
        let goal = |goal: f64| Some(goal).filter(|_| self.is_ours());
        let mut figures = vec![figure("added", goal(added), |run| run.added_ms)];
        if self.is_ours() {
            figures.extend([
                figure("storage", None, |run| run.drain_ms + run.own_ms),
                Figure {
                    name: format!("{} beyond", self.scenario.name),
                    unit: Unit::Milliseconds,
                    goal: Some(ADDED_MS_MAX),
                    values: self.beyond_ms.clone(),
                },
                figure("lease", None, |run| run.lease_ms),
                figure("opened", None, |run| run.opened_ms),
                figure("own", None, |run| run.own_ms),
            ]);
        }
        figures.extend([
            figure("drain", None, |run| run.drain_ms),
            figure("gap", None, |run| run.gap_ms),
            figure("quiet", None, |run| run.quiet_ms),
            figure("downtime", None, |run| run.downtime_ms),
            figure("slowest request", None, |run| run.slowest_ms),
            figure("whole migration", None, |run| run.total_ms),
        ]);
        figures
    }

    fn failed(&self) -> Option<String> {
        let failure = self.failure.as_ref()?;
        let first = failure.lines().next().unwrap_or_default();
        let moves = self.moves.len();
        Some(format!("FAILED {} after {moves} migrations: {first}", self.scenario.name))
    }
}

fn table(all: &[Measured], figures: &[Figure]) -> String {
    let mut out = format!("{}\n", Figure::heading());
    for figure in figures {
        writeln!(out, "{}", figure.line()).expect("a string takes all");
    }
    for measured in all {
        let (name, moves, given_up) =
            (measured.scenario.name, measured.moves.len(), measured.given_up);
        let wrong = if measured.failure.is_some() { "FAILED" } else { "nothing wrong" };
        writeln!(out, "{name}: {moves} migrations, {given_up} given up, {wrong}")
            .expect("a string takes all");
    }
    for failure in all.iter().filter_map(Measured::failed) {
        writeln!(out, "{failure}").expect("a string takes all");
    }
    out
}

fn report(all: &[Measured], goal: f64) -> Value {
    let one = |measured: &Measured| {
        json!({
            "scenario": measured.scenario.name,
            "migrations": measured.moves.len(),
            "given_up": measured.given_up,
            "failure": measured.failure,
            "figures": measured.figures(goal).iter().map(Figure::report).collect::<Vec<_>>(),
        })
    };
    json!({ "benchmark": "migrate", "scenarios": all.iter().map(one).collect::<Vec<_>>() })
}
