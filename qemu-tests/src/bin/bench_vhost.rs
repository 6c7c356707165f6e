//! The vhost-user-blk socket of `holdfastd` against that of `qemu-storage-daemon`, on files on the
//! same disk, in the same run, with the same client. `scripts/dev bench vhost` runs it.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use blkio_client::{Client, Operation};
use framework::{Cluster, Lab, PoolSizes, Space, StorageDaemon};
use serde_json::{Value, json};

const USAGE: &str = "\
Usage: scripts/dev bench vhost [--rounds N] [--seconds N] [--size-mib N] [--json FILE]

  --rounds N     measurements of each workload on each side; the median counts (default 5)
  --seconds N    how long each measurement takes (default 2)
  --size-mib N   the disk's size (default 1024)
  --json FILE    writes every measurement to FILE

Both sides are measured in turn, with a client that sleeps while it waits.
";

/// What each side does for a write before it says that it is done. They are not the same, and the
/// comparison is to be read with that in mind.
const PROMISES: &str = "\
holdfastd: one local replica (no network). Every write goes to a checksummed log first, and later
  home; every read is verified. A write is acknowledged when its log write has completed, a FLUSH
  when it is on media.
qemu-storage-daemon: the file itself, with io_uring and direct I/O. No checksums, no log, no
  replicas. A write is acknowledged when it has completed, a FLUSH when it is on media.";

/// The size of the log of `holdfastd`: smaller than the disk, so that the flush to the home is
/// part of what is measured.
const LOG_MIB: u64 = 512;

/// One workload.
#[derive(Debug, Clone, Copy)]
struct Workload {
    name: &'static str,
    operation: Operation,
    bytes: usize,
    depth: usize,
    sequential: bool,
}

const WORKLOADS: [Workload; 6] = [
    random("4k random read, depth 1", Operation::Read, 1),
    random("4k random read, depth 32", Operation::Read, 32),
    random("4k random write, depth 1", Operation::Write, 1),
    random("4k random write, depth 32", Operation::Write, 32),
    sequential("128k sequential read, depth 8", Operation::Read),
    sequential("128k sequential write, depth 8", Operation::Write),
];

const fn random(name: &'static str, operation: Operation, depth: usize) -> Workload {
    Workload { name, operation, bytes: 4096, depth, sequential: false }
}

const fn sequential(name: &'static str, operation: Operation) -> Workload {
    Workload { name, operation, bytes: 128 << 10, depth: 8, sequential: true }
}

/// The command line.
#[derive(Debug)]
struct Options {
    rounds: usize,
    seconds: u64,
    size_mib: u64,
    json: Option<PathBuf>,
}

/// One side of the comparison.
struct Side {
    name: &'static str,
    socket: PathBuf,
    /// By workload, by round: requests a second and the 99th percentile of the latency.
    measured: Vec<Vec<Measurement>>,
}

#[derive(Debug, Clone, Copy)]
struct Measurement {
    iops: f64,
    p50_us: f64,
    p99_us: f64,
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench vhost: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let Some(options) = parse(std::env::args().skip(1))? else {
        print!("{USAGE}");
        return Ok(());
    };
    // No guests, but nothing else should fill the cores meanwhile.
    let lab = Lab::new("bench-vhost", 2)?;
    let outcome = compare(&lab, &options);
    if outcome.is_err() {
        eprintln!("{}", lab.report());
    }
    outcome
}

fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Option<Options>> {
    let mut options = Options { rounds: 5, seconds: 2, size_mib: 1024, json: None };
    while let Some(name) = arguments.next() {
        if name == "--help" || name == "-h" {
            return Ok(None);
        }
        let value = arguments.next().with_context(|| format!("{name} needs a value\n{USAGE}"))?;
        match name.as_str() {
            "--rounds" => options.rounds = value.parse().context("--rounds")?,
            "--seconds" => options.seconds = value.parse().context("--seconds")?,
            "--size-mib" => options.size_mib = value.parse().context("--size-mib")?,
            "--json" => options.json = Some(PathBuf::from(value)),
            _ => bail!("what is {name}?\n{USAGE}"),
        }
    }
    ensure!((1..=100).contains(&options.rounds), "--rounds is 1 to 100");
    ensure!((1..=60).contains(&options.seconds), "--seconds is 1 to 60");
    ensure!((64..=65536).contains(&options.size_mib), "--size-mib is 64 to 65536");
    Ok(Some(options))
}

fn compare(lab: &Lab, options: &Options) -> Result<()> {
    let size_mib = options.size_mib;
    let mass_mib = size_mib + size_mib / 4;
    let sizes =
        PoolSizes { fast_mib: LOG_MIB, mass_mib, space: Space::Taken, ..PoolSizes::default() };
    let cluster = Cluster::start_with(lab, 1, sizes)?;
    cluster.create_volume("disk", size_mib, 1)?;
    let holdfast = cluster.export(0, "disk")?;

    let file = lab.preallocated_file("disk", size_mib << 20)?;
    let peer = StorageDaemon::start(lab, "qemu-storage-daemon", &file)?;

    let mut sides = [
        Side { name: "holdfastd", socket: holdfast, measured: Vec::new() },
        Side {
            name: "qemu-storage-daemon",
            socket: peer.socket().to_owned(),
            measured: Vec::new(),
        },
    ];
    for side in &mut sides {
        eprintln!("filling the disk of {}", side.name);
        fill(side, size_mib << 20)?;
        side.measured = vec![Vec::new(); WORKLOADS.len()];
    }
    for round in 1..=options.rounds {
        for (index, workload) in WORKLOADS.iter().enumerate() {
            eprintln!("round {round} of {}: {}", options.rounds, workload.name);
            for side in &mut sides {
                let seed = (round * WORKLOADS.len() + index) as u64;
                let measurement = measure(side, *workload, options.seconds, seed)?;
                side.measured[index].push(measurement);
            }
        }
    }
    println!("{}", table(&sides, options));
    if let Some(path) = &options.json {
        let text = serde_json::to_string_pretty(&report(&sides, options))?;
        std::fs::write(path, text).with_context(|| path.display().to_string())?;
    }
    Ok(())
}

/// Writes the whole disk once, so that reads find data and writes find blocks that exist.
fn fill(side: &Side, bytes: u64) -> Result<()> {
    let workload = WORKLOADS[5];
    let mut driver = Driver::new(side, workload, 1)?;
    ensure!(driver.disk_bytes == bytes, "{} has {} bytes", side.name, driver.disk_bytes);
    let requests = bytes / workload.bytes as u64;
    driver.drive(|started| started < requests)?;
    driver.flush()
}

fn measure(side: &Side, workload: Workload, seconds: u64, seed: u64) -> Result<Measurement> {
    let mut driver = Driver::new(side, workload, seed)?;
    let warm_up = Instant::now() + Duration::from_millis(200);
    driver.drive(|_| Instant::now() < warm_up)?;
    driver.latencies_ns.clear();
    let start = Instant::now();
    let end = start + Duration::from_secs(seconds);
    driver.drive(|_| Instant::now() < end)?;
    let elapsed = start.elapsed();
    let mut latencies = std::mem::take(&mut driver.latencies_ns);
    ensure!(!latencies.is_empty(), "{} completed nothing of {}", side.name, workload.name);
    latencies.sort_unstable();
    let percentile =
        |per_cent: usize| Duration::from_nanos(latencies[(latencies.len() - 1) * per_cent / 100]);
    let count = u32::try_from(latencies.len()).context("too many requests to count")?;
    Ok(Measurement {
        iops: f64::from(count) / elapsed.as_secs_f64(),
        p50_us: percentile(50).as_secs_f64() * 1e6,
        p99_us: percentile(99).as_secs_f64() * 1e6,
    })
}

/// Keeps a workload's depth of requests under way.
struct Driver {
    client: Client,
    workload: Workload,
    disk_bytes: u64,
    next: u64,
    random: u64,
    started_at: Vec<Instant>,
    latencies_ns: Vec<u64>,
}

/// How long a request may take before the benchmark gives up.
const REQUEST_LIMIT: Duration = Duration::from_secs(30);

impl Driver {
    fn new(side: &Side, workload: Workload, seed: u64) -> Result<Self> {
        let mut client = Client::connect(&side.socket, workload.depth, workload.bytes)
            .with_context(|| side.name.to_owned())?;
        let mut driver_random = seed | 1;
        for slot in 0..client.slots() {
            // Bytes that no layer can compress or take for zeroes.
            for chunk in client.bytes(slot).chunks_mut(8) {
                chunk.copy_from_slice(&step(&mut driver_random).to_le_bytes()[..chunk.len()]);
            }
        }
        let disk_bytes = client.capacity_bytes()?;
        Ok(Self {
            client,
            workload,
            disk_bytes,
            next: 0,
            random: driver_random,
            started_at: vec![Instant::now(); workload.depth],
            // Enough for the fastest disk; it grows outside of what is measured otherwise.
            latencies_ns: Vec::with_capacity(1 << 20),
        })
    }

    /// Starts requests while `go_on` (which is told how many were started) and waits for all.
    fn drive(&mut self, mut go_on: impl FnMut(u64) -> bool) -> Result<()> {
        let mut free: Vec<usize> = (0..self.workload.depth).collect();
        let mut started = 0;
        let mut under_way = 0;
        loop {
            while let Some(&slot) = free.last()
                && go_on(started)
            {
                free.pop();
                let offset = self.next_offset();
                self.started_at[slot] = Instant::now();
                self.client.submit(slot, self.workload.operation, offset, self.workload.bytes);
                started += 1;
                under_way += 1;
            }
            if under_way == 0 {
                return Ok(());
            }
            let now_free = &mut free;
            let (started_at, latencies) = (&self.started_at, &mut self.latencies_ns);
            let mut failure = None;
            under_way -= self.client.wait(1, REQUEST_LIMIT, |done| {
                if done.result < 0 {
                    failure = Some(done.result);
                }
                let nanoseconds = started_at[done.slot].elapsed().as_nanos();
                latencies.push(u64::try_from(nanoseconds).unwrap_or(u64::MAX));
                now_free.push(done.slot);
            })?;
            if let Some(errno) = failure {
                bail!("{}: a request failed with errno {}", self.workload.name, -errno);
            }
        }
    }

    fn flush(&mut self) -> Result<()> {
        let mut result = 0;
        self.client.submit(0, Operation::Flush, 0, 0);
        self.client.wait(1, REQUEST_LIMIT, |done| result = done.result)?;
        ensure!(result == 0, "a flush failed with errno {}", -result);
        Ok(())
    }

    fn next_offset(&mut self) -> u64 {
        let bytes = self.workload.bytes as u64;
        let blocks = self.disk_bytes / bytes;
        let block = if self.workload.sequential {
            self.next % blocks
        } else {
            step(&mut self.random) % blocks
        };
        self.next += 1;
        block * bytes
    }
}

/// xorshift64* (Vigna 2016): the same offsets for both sides.
fn step(state: &mut u64) -> u64 {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    state.wrapping_mul(0x2545_F491_4F6C_DD1D)
}

fn median(measurements: &[Measurement], value: impl Fn(&Measurement) -> f64) -> f64 {
    let mut values: Vec<f64> = measurements.iter().map(value).collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 {
        values[middle]
    } else {
        f64::midpoint(values[middle - 1], values[middle])
    }
}

fn table(sides: &[Side; 2], options: &Options) -> String {
    let mut out = String::new();
    let mut line = |text: String| writeln!(out, "{text}").expect("a string takes all");
    line(format!(
        "{:<31} {:>12} {:>20} {:>6}   p50 / p99 µs",
        "requests a second (median)", sides[0].name, sides[1].name, "ratio"
    ));
    for (index, workload) in WORKLOADS.iter().enumerate() {
        let [ours, theirs] = sides.each_ref().map(|side| &side.measured[index]);
        let (own, other) = (median(ours, |m| m.iops), median(theirs, |m| m.iops));
        line(format!(
            "{:<31} {own:>12.0} {other:>20.0} {:>6.2}   {:.0} / {:.0} against {:.0} / {:.0}",
            workload.name,
            own / other,
            median(ours, |m| m.p50_us),
            median(ours, |m| m.p99_us),
            median(theirs, |m| m.p50_us),
            median(theirs, |m| m.p99_us),
        ));
    }
    line(format!(
        "\n{} rounds of {} s each, in turn; a disk of {} MiB (log {LOG_MIB} MiB), both on files on \
         the same disk.\n{PROMISES}",
        options.rounds, options.seconds, options.size_mib
    ));
    out
}

fn report(sides: &[Side; 2], options: &Options) -> Value {
    let side = |side: &Side, index: usize| {
        let measured: &[Measurement] = &side.measured[index];
        json!({
            "iops_median": median(measured, |m| m.iops),
            "p50_us_median": median(measured, |m| m.p50_us),
            "p99_us_median": median(measured, |m| m.p99_us),
            "iops": measured.iter().map(|m| m.iops).collect::<Vec<_>>(),
        })
    };
    let workload = |(index, workload): (usize, &Workload)| {
        let [own, other] = sides.each_ref().map(|side| median(&side.measured[index], |m| m.iops));
        json!({
            "workload": workload.name,
            "holdfastd": side(&sides[0], index),
            "qemu-storage-daemon": side(&sides[1], index),
            "ratio": own / other,
        })
    };
    json!({
        "benchmark": "vhost",
        "rounds": options.rounds,
        "seconds": options.seconds,
        "size_mib": options.size_mib,
        "log_mib": LOG_MIB,
        "promises": PROMISES,
        "workloads": WORKLOADS.iter().enumerate().map(workload).collect::<Vec<_>>(),
    })
}
