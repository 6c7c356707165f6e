//! What Holdfast is for, shown: three servers, a volume, a guest, and a server that dies.
//! `scripts/run` builds everything and runs it.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use framework::fio::{Direction, Fio, Verify};
use framework::migration::move_guest;
use framework::{
    Accelerator, Cluster, Guest, GuestOptions, Lab, Server, Shell, loopback_address, wait_until,
};
use serde_json::{Value, json};

const USAGE: &str = "\
Usage: scripts/run [--shell] [--json FILE]

Starts three servers on loopback over one SQLite store, creates a volume with three replicas,
boots a guest on it, works it, kills one server under load, moves the guest to another server's back end
while it runs, kills and restarts that one, and prints what the guest saw.

  --shell      leaves you in the guest afterwards, with the cluster running; `exit` ends it
  --json FILE  writes the table to FILE

Exit status: 0 if the guest saw no error and no wrong byte, 1 if not, 2 for wrong arguments.
";

/// The volume's size. A third is a file system, the rest is for fio.
const VOLUME_MIB: u64 = 384;

/// How long each measurement takes.
const MEASURE: Duration = Duration::from_secs(6);

/// Writes that are verified while a server dies, in MiB, and how many a second.
const VERIFIED_MIB: u32 = 48;
const VERIFIED_RATE: u32 = 1500;

/// How long the guest lives at most, without and with somebody in its shell.
const GUEST_LIMIT: Duration = Duration::from_mins(10);
const SHELL_LIMIT: Duration = Duration::from_hours(24);

/// The command line.
#[derive(Debug, Default)]
struct Options {
    shell: bool,
    json: Option<PathBuf>,
}

/// One line of the table.
#[derive(Debug)]
struct Step {
    name: &'static str,
    seconds: f64,
    figures: Option<Direction>,
    failure: Option<String>,
}

/// How long the guest waited when it moved, and when its back end was restarted.
#[derive(Debug, Clone, Copy, Default)]
struct Pauses {
    /// In milliseconds, as QEMU says: in that time the guest's clock stood still.
    downtime_ms: f64,
    /// The slowest write besides, in milliseconds.
    moved_ms: f64,
    /// The slowest write, in milliseconds.
    restarted_ms: f64,
}

/// What has been done so far.
#[derive(Debug, Default)]
struct Tour {
    steps: Vec<Step>,
    pauses: Pauses,
}

fn main() -> ExitCode {
    let options = match parse(std::env::args().skip(1)) {
        Ok(Some(options)) => options,
        Ok(None) => {
            print!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprintln!("{error:#}\n\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match run(&options) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("scripts/run: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Option<Options>> {
    let mut options = Options::default();
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--shell" => options.shell = true,
            "--json" => {
                let file = arguments.next().context("--json needs a file")?;
                options.json = Some(PathBuf::from(file));
            }
            "--help" | "-h" => return Ok(None),
            _ => bail!("what is {argument}?"),
        }
    }
    Ok(Some(options))
}

/// Runs the tour; whether everything went well.
fn run(options: &Options) -> Result<bool> {
    let lab = Lab::new("tour", 1)?;
    let accelerator = Accelerator::detect()?;
    let mut tour = Tour::default();
    // The failure is in the table; what led to it is in the logs.
    let went_well = tour.take(&lab, options).is_ok();
    if !went_well {
        eprintln!("\n{}", lab.report());
    }
    println!("\n{}", tour.table(accelerator));
    if let Some(path) = &options.json {
        let text = serde_json::to_string_pretty(&tour.report(accelerator))?;
        std::fs::write(path, text).with_context(|| path.display().to_string())?;
    }
    Ok(went_well)
}

impl Tour {
    fn take(&mut self, lab: &Lab, options: &Options) -> Result<()> {
        let cluster = self.step("three servers on loopback, one SQLite store", || {
            Ok((Cluster::start(lab, 3)?, None))
        })?;
        let socket = self.step("a volume of 384 MiB with three replicas", || {
            cluster.create_volume("disk", VOLUME_MIB, 3)?;
            Ok((cluster.export(0, "disk")?, None))
        })?;
        let limit = if options.shell { SHELL_LIMIT } else { GUEST_LIMIT };
        let mut guest = self.step("a guest boots on it", || {
            let options = GuestOptions { limit, ..GuestOptions::new("guest") };
            Ok((Guest::boot(lab, &options.disk("disk", &socket))?, None))
        })?;
        self.work(&mut guest)?;
        self.lose_a_server(&cluster, &mut guest)?;
        let there = cluster.export_standby(1, "disk")?;
        let moved = GuestOptions { limit, ..GuestOptions::new("moved") }.disk("disk", &there);
        let mut guest = self.move_it(lab, guest, &moved)?;
        self.restart_its_back_end(&cluster.servers()[1], &mut guest)?;
        self.check(&mut guest)?;
        if options.shell {
            println!("\nThe guest's disk is /dev/vda, with a file system on /dev/vda1.");
            for server in cluster.servers() {
                println!("holdfastd {}: pid {}", server.name(), server.pid()?);
            }
            println!("`exit` ends the guest and the cluster.\n");
            Shell::run(&mut guest)?;
        }
        self.step("the guest and the servers stop in good order", || {
            guest.power_off()?;
            cluster.unexport(0, &socket)?;
            cluster.unexport(1, &there)?;
            cluster.servers().iter().try_for_each(Server::stop)?;
            Ok(((), None))
        })
    }

    /// A file system with a file in it, and what the disk can do.
    fn work(&mut self, guest: &mut Guest) -> Result<()> {
        self.step("the guest partitions, makes ext4, writes 32 MiB", || {
            guest.sh("printf 'label: gpt\n,128M\n,\n' | sfdisk --quiet /dev/vda")?;
            guest.sh("mkfs.ext4 -q /dev/vda1 && mount /dev/vda1 /mnt")?;
            guest.sh("dd if=/dev/urandom of=/mnt/data bs=64k count=512 2>/dev/null")?;
            guest.sh("cd /mnt && md5sum data >sum && sync")?;
            Ok(((), None))
        })?;
        for (name, pattern, depth) in [
            ("4k random writes, one at a time", "randwrite", 1),
            ("4k random writes, 16 at a time", "randwrite", 16),
            ("4k random reads, 16 at a time", "randread", 16),
        ] {
            self.step(name, || {
                let fio = Fio::new("/dev/vda2", pattern).size_mib(128).depth(depth);
                let measured = fio.runtime(MEASURE).run(guest)?;
                let is_read = pattern == "randread";
                Ok(((), Some(if is_read { measured.read } else { measured.write })))
            })?;
        }
        Ok(())
    }

    /// Kills a server under verified writes, and brings it back under more of them.
    fn lose_a_server(&mut self, cluster: &Cluster<'_>, guest: &mut Guest) -> Result<()> {
        let pass = Fio::new("/dev/vda2", "randwrite").size_mib(VERIFIED_MIB).rate(VERIFIED_RATE);
        let victim = &cluster.servers()[2];
        self.step("server c is killed under verified writes", || {
            let fio = pass.clone().verify(Verify::Crc32c);
            let job = fio.start(guest)?;
            wait_for_load(guest)?;
            victim.kill()?;
            let measured = fio.finish(guest, job)?;
            Ok(((), Some(measured.write)))
        })?;
        self.step("it comes back under verified writes", || {
            let fio = pass.clone().verify(Verify::Pattern).seed(2);
            let job = fio.start(guest)?;
            wait_for_load(guest)?;
            victim.start()?;
            let measured = fio.finish(guest, job)?;
            Ok(((), Some(measured.write)))
        })
    }

    /// Moves the guest to another back end while it runs and writes.
    fn move_it(&mut self, lab: &Lab, mut guest: Guest, options: &GuestOptions) -> Result<Guest> {
        let pass = Fio::new("/dev/vda2", "randwrite").size_mib(VERIFIED_MIB).rate(VERIFIED_RATE);
        let fio = pass.verify(Verify::Crc32c).seed(3);
        let mut pauses = self.pauses;
        let guest = self.step("it moves to server b, live, under verified writes", || {
            let job = fio.start(&mut guest)?;
            wait_for_load(&mut guest)?;
            let address = format!("tcp:{}", loopback_address());
            let (mut guest, downtime_ms) = move_guest(lab, guest, options, &address)?;
            let measured = fio.finish(&mut guest, job)?;
            pauses.downtime_ms = downtime_ms;
            pauses.moved_ms = measured.write.latency_max_us / 1000.0;
            Ok((guest, Some(measured.write)))
        })?;
        self.pauses = pauses;
        Ok(guest)
    }

    /// `kill -9` for the process that serves the guest's disk, and starts it again.
    fn restart_its_back_end(&mut self, server: &Server, guest: &mut Guest) -> Result<()> {
        let pass = Fio::new("/dev/vda2", "randwrite").size_mib(VERIFIED_MIB).rate(VERIFIED_RATE);
        let fio = pass.verify(Verify::Pattern).seed(4);
        let longest_ms = self.step("server b is killed and restarted under such writes", || {
            let job = fio.start(guest)?;
            wait_for_load(guest)?;
            server.kill()?;
            server.start()?;
            let measured = fio.finish(guest, job)?;
            Ok((measured.write.latency_max_us / 1000.0, Some(measured.write)))
        })?;
        self.pauses.restarted_ms = longest_ms;
        Ok(())
    }

    /// Nothing was lost, and the guest's kernel has no complaint.
    fn check(&mut self, guest: &mut Guest) -> Result<()> {
        self.step("every byte is what was written, no error in the guest", || {
            guest.sh("umount /mnt; echo 3 >/proc/sys/vm/drop_caches")?;
            guest.sh("e2fsck -fn /dev/vda1 && mount /dev/vda1 /mnt")?;
            guest.sh("cd /mnt && md5sum -c sum && cd / && umount /mnt")?;
            guest.check_no_complaints()?;
            Ok(((), None))
        })
    }

    /// Does one thing, says so, and keeps what came of it.
    fn step<T>(
        &mut self,
        name: &'static str,
        action: impl FnOnce() -> Result<(T, Option<Direction>)>,
    ) -> Result<T> {
        eprintln!("... {name}");
        let start = Instant::now();
        let outcome = action();
        let mut step =
            Step { name, seconds: start.elapsed().as_secs_f64(), figures: None, failure: None };
        let outcome = match outcome {
            Ok((value, figures)) => {
                step.figures = figures;
                Ok(value)
            }
            Err(error) => {
                let reasons: Vec<String> = error.chain().map(ToString::to_string).collect();
                step.failure = Some(reasons.join("\n  because: "));
                Err(error)
            }
        };
        self.steps.push(step);
        outcome
    }

    /// The longest pause the guest saw in any request, in milliseconds.
    fn longest_pause_ms(&self) -> f64 {
        let figures = self.steps.iter().filter_map(|step| step.figures);
        figures.map(|figures| figures.latency_max_us / 1000.0).fold(0.0, f64::max)
    }

    fn failures(&self) -> Vec<String> {
        let failed = self.steps.iter().filter_map(|step| Some((step.name, step.failure.as_ref()?)));
        failed.map(|(name, failure)| format!("{name}: {failure}")).collect()
    }

    fn table(&self, accelerator: Accelerator) -> String {
        let mut out = String::new();
        let mut line = |text: String| writeln!(out, "{text}").expect("a string takes all");
        line(format!(
            "{:<52} {:>7} {:>8} {:>10} {:>10} {:>10}",
            "what was done", "seconds", "IOPS", "mean", "99 %", "longest"
        ));
        for step in &self.steps {
            let figures = match step.figures {
                None => String::new(),
                Some(seen) => format!(
                    " {:>8.0} {:>7.2} ms {:>7.2} ms {:>7.1} ms",
                    seen.iops,
                    seen.latency_mean_us / 1000.0,
                    seen.latency_p99_us / 1000.0,
                    seen.latency_max_us / 1000.0
                ),
            };
            let failed = if step.failure.is_some() { "  FAILED" } else { "" };
            line(format!("{:<52} {:>7.1}{figures}{failed}", step.name, step.seconds));
        }
        let failures = self.failures();
        let what_failed =
            if failures.is_empty() { "nothing".to_owned() } else { failures.join("\n") };
        line(format!("\nlongest pause in the guest: {:.1} ms", self.longest_pause_ms()));
        let Pauses { downtime_ms, moved_ms, restarted_ms } = self.pauses;
        line(format!(
            "pause when it moved: {moved_ms:.1} ms, and {downtime_ms:.0} ms in which QEMU had it \
             stopped"
        ));
        line(format!("pause when its back end was killed and restarted: {restarted_ms:.1} ms"));
        line(format!("what failed: {what_failed}"));
        if accelerator == Accelerator::Tcg {
            line(
                "KVM does not work here: the guest ran under emulation, which is what the figures \
                 mostly measure. `scripts/dev bench vhost` measures without a guest."
                    .to_owned(),
            );
        }
        out
    }

    fn report(&self, accelerator: Accelerator) -> Value {
        let step = |step: &Step| {
            let figures = step.figures.map(|seen| {
                json!({
                    "iops": seen.iops,
                    "latency_mean_us": seen.latency_mean_us,
                    "latency_p99_us": seen.latency_p99_us,
                    "latency_max_us": seen.latency_max_us,
                    "requests": seen.requests,
                })
            });
            json!({
                "name": step.name,
                "seconds": step.seconds,
                "seen_in_guest": figures,
                "failure": step.failure,
            })
        };
        json!({
            "passed": self.failures().is_empty(),
            "accelerator": if accelerator == Accelerator::Kvm { "kvm" } else { "tcg" },
            "longest_pause_ms": self.longest_pause_ms(),
            "migration_pause_ms": self.pauses.moved_ms,
            "migration_downtime_ms": self.pauses.downtime_ms,
            "restart_pause_ms": self.pauses.restarted_ms,
            "failures": self.failures(),
            "steps": self.steps.iter().map(step).collect::<Vec<_>>(),
        })
    }
}

/// Waits until writes of the job that was just started reach the disk.
fn wait_for_load(guest: &mut Guest) -> Result<()> {
    let written = |guest: &mut Guest| -> Result<u64> {
        let stat = guest.sh("awk '{print $5}' /sys/block/vda/stat")?;
        stat.trim().parse().context("a count of writes")
    };
    let before = written(guest)?;
    let deadline = framework::Deadline::seconds(60);
    wait_until("the guest to write", deadline, || {
        Ok((written(guest)? >= before + 1000).then_some(()))
    })?;
    ensure!(!guest.deadline().has_passed(), "the guest's time is over");
    Ok(())
}
