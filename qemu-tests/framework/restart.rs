//! `kill -9` of the process that serves a running guest's disk, and its restart, over and over: what
//! `scripts/dev bench restart` measures and the tests run in a short form.
//!
//! QEMU is the front end, since it keeps the in-flight buffer and comes back to the socket. A writer in
//! the guest goes over the disk, each time with other data, and in the end of each pass reads
//! every block back: a write that was lost shows the pass before, and so does one that was applied
//! once more on top of a newer one.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use crate::cluster::{Attached, Cluster};
use crate::failover::Amount;
use crate::fio::{Fio, Verify};
use crate::guest::{Guest, GuestOptions};
use crate::lab::Lab;
use crate::wait::{Deadline, wait_until};

/// What the guest writes in one pass, in MiB.
const PASS_MIB: u32 = 12;
/// Writes of one pass.
const PASS_WRITES: u64 = PASS_MIB as u64 * 256;
/// Writes a second: a pass takes a few seconds, so that there is time for the kill in it.
const RATE: u32 = 1500;
/// The longest that a restarted process may take to serve, on a busy machine.
const PATIENCE_SECONDS: u64 = 60;
/// The volume's size, in MiB.
const VOLUME_MIB: u64 = 64;

/// Who is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Victim {
    /// `holdfastd`, which has a replica of the volume too.
    Daemon,
    /// `holdfast attach`, whose members are all remote.
    Attach,
    /// `holdfastd`, and again when it has just acquired the volume for its recovery.
    DaemonTwice,
    /// `holdfast attach` in the same way.
    AttachTwice,
}

/// What one kill did.
#[derive(Debug, Clone, Copy)]
pub struct Restart {
    /// The longest that a write of the guest took in the pass with the kill, in milliseconds.
    pub pause_ms: f64,
    /// The longest in a pass without one, right before.
    pub quiet_ms: f64,
    /// From the (last) kill until the new process listened at the socket, in milliseconds.
    pub listens_ms: f64,
}

impl Victim {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Daemon, Self::Attach, Self::DaemonTwice, Self::AttachTwice];

    /// For command lines and tables.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Daemon => "daemon",
            Self::Attach => "attach",
            Self::DaemonTwice => "daemon-twice",
            Self::AttachTwice => "attach-twice",
        }
    }

    /// What is done.
    pub const fn explanation(self) -> &'static str {
        match self {
            Self::Daemon => "kill -9 of the holdfastd that serves the guest, and its restart",
            Self::Attach => {
                "kill -9 of the `holdfast attach` that serves the guest, and its restart"
            }
            Self::DaemonTwice => {
                "holdfastd is killed again as soon as it has acquired the volume, before it serves"
            }
            Self::AttachTwice => "`holdfast attach` is killed again in the same way",
        }
    }

    /// What the pause is to be at most, at its 99th percentile, in milliseconds.
    pub const fn goal_ms(self) -> Option<f64> {
        match self {
            Self::Daemon | Self::Attach => Some(500.0),
            // Two restarts; for the verification, not for the figure.
            Self::DaemonTwice | Self::AttachTwice => None,
        }
    }

    const fn twice(self) -> bool {
        match self {
            Self::Daemon | Self::Attach => false,
            Self::DaemonTwice | Self::AttachTwice => true,
        }
    }

    /// Kills and restarts again and again under one guest; tells each.
    pub fn repeat(self, lab: &Lab, amount: Amount, told: &mut dyn FnMut(&Restart)) -> Result<()> {
        let mut bench = Bench::start(lab, self)?;
        let mut runs = 0;
        while !amount.is_reached(runs) {
            let restart = bench.run().with_context(|| format!("kill number {}", runs + 1))?;
            told(&restart);
            runs += 1;
        }
        bench.end()
    }
}

/// The process under test.
enum Served {
    Daemon(PathBuf),
    Attached(Attached),
}

/// A guest on a volume.
struct Bench<'lab> {
    victim: Victim,
    cluster: Cluster<'lab>,
    served: Served,
    guest: Guest,
    passes: u32,
    random: u64,
}

impl<'lab> Bench<'lab> {
    fn start(lab: &'lab Lab, victim: Victim) -> Result<Self> {
        let cluster = Cluster::start(lab, 3)?;
        cluster.create_volume("disk", VOLUME_MIB, 3)?;
        let served = match victim {
            Victim::Daemon | Victim::DaemonTwice => Served::Daemon(cluster.export(0, "disk")?),
            Victim::Attach | Victim::AttachTwice => Served::Attached(cluster.attach("disk")?),
        };
        let socket = match &served {
            Served::Daemon(socket) => socket.clone(),
            Served::Attached(attached) => attached.socket.clone(),
        };
        // Two processors, so two queues; the guest's driver uses indirect descriptors.
        let options = GuestOptions {
            cpus: 2,
            // As long as anybody wants to watch it.
            limit: std::time::Duration::from_hours(24),
            ..GuestOptions::new("guest").disk("disk", &socket)
        };
        let mut guest = Guest::boot(lab, &options)?;
        let queues = guest.sh("ls /sys/block/vda/mq | wc -l")?;
        ensure!(queues.trim() == "2", "the guest has {} queues", queues.trim());
        let random = u64::from(std::process::id()) | 1;
        Ok(Self { victim, cluster, served, guest, passes: 0, random })
    }

    fn next_random(&mut self, below: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % below
    }

    /// The next pass: other data, in another order.
    fn pass(&mut self) -> Fio {
        self.passes += 1;
        Fio::new("/dev/vda", "randwrite")
            .size_mib(PASS_MIB)
            .verify(Verify::Pattern)
            .seed(self.passes)
            .rate(RATE)
    }

    /// One pass without a kill, one with.
    fn run(&mut self) -> Result<Restart> {
        let quiet = self.pass().run(&mut self.guest)?;
        let moment = self.next_random(PASS_WRITES - 500);
        let written = self.writes()?;
        let pass = self.pass();
        let job = pass.start(&mut self.guest)?;
        self.wait_for_writes(written + 100 + moment)?;
        let mut killed = self.kill_and_start()?;
        if self.victim.twice() {
            self.wait_until_acquired()?;
            killed = self.kill_and_start()?;
        }
        self.wait_until_listening()?;
        let listens = killed.elapsed();
        let measured = pass.finish(&mut self.guest, job)?;
        self.guest.check_no_complaints()?;
        Ok(Restart {
            pause_ms: measured.write.latency_max_us / 1000.0,
            quiet_ms: quiet.write.latency_max_us / 1000.0,
            listens_ms: listens.as_secs_f64() * 1000.0,
        })
    }

    fn end(mut self) -> Result<()> {
        self.guest.check_no_complaints()?;
        self.guest.power_off()?;
        match self.served {
            Served::Daemon(socket) => self.cluster.unexport(0, &socket),
            Served::Attached(mut attached) => attached.process.check_alive(),
        }
    }

    /// Requests to write that the guest has had answered.
    fn writes(&mut self) -> Result<u64> {
        let text = self.guest.sh("awk '{print $5}' /sys/block/vda/stat")?;
        text.trim().parse().context("a number of writes")
    }

    fn wait_for_writes(&mut self, count: u64) -> Result<()> {
        let reach = format!(
            "n=0; until [ $(awk '{{print $5}}' /sys/block/vda/stat) -ge {count} ]; do \
             n=$((n+1)); [ $n -lt 2500 ] || exit 1; usleep 20000; done"
        );
        self.guest.sh(&reach).map(|_silent| ())
    }

    /// `kill -9`, and a new process at once, as a service manager does. When the kill was.
    fn kill_and_start(&mut self) -> Result<Instant> {
        let killed = Instant::now();
        match &mut self.served {
            Served::Daemon(_) => {
                let server = &self.cluster.servers()[0];
                server.kill()?;
                server.spawn()?;
            }
            Served::Attached(attached) => {
                attached.process.kill()?;
                self.cluster.attach_again("disk", attached)?;
            }
        }
        Ok(killed)
    }

    fn socket(&self) -> &PathBuf {
        match &self.served {
            Served::Daemon(socket) => socket,
            Served::Attached(attached) => &attached.socket,
        }
    }

    /// The old process leaves its socket file behind: somebody must answer there.
    fn wait_until_listening(&self) -> Result<()> {
        let socket = self.socket().clone();
        wait_until("the new process to listen", Deadline::seconds(PATIENCE_SECONDS), || {
            Ok(listens(&socket)?.then_some(()))
        })
    }

    /// The new process has the lease and begins to recover the volume.
    fn wait_until_acquired(&self) -> Result<()> {
        let epoch = |cluster: &Cluster| -> Result<u64> {
            let view = cluster.holdfast(&["volume", "show", "disk"])?;
            view["epoch"].as_u64().context("the volume's epoch")
        };
        let before = epoch(&self.cluster)?;
        // It may have been that quick; then the second kill is one while it serves.
        let socket = self.socket().clone();
        wait_until("the lease to be taken", Deadline::seconds(PATIENCE_SECONDS), || {
            let taken = epoch(&self.cluster)? > before || listens(&socket)?;
            Ok(taken.then_some(()))
        })
    }
}

/// Whether somebody listens at a Unix socket, found out without connecting to it: the next front end in
/// line would be that look.
fn listens(socket: &std::path::Path) -> Result<bool> {
    /// `SO_ACCEPTCON`: the socket was given to `listen`.
    const ACCEPTS: u64 = 1 << 16;
    let path = socket.display().to_string();
    let table = std::fs::read_to_string("/proc/net/unix")?;
    // Num RefCount Protocol Flags Type St Inode Path
    let accepts = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let flags = fields.get(3).and_then(|flags| u64::from_str_radix(flags, 16).ok());
        fields.get(7) == Some(&path.as_str()) && flags.is_some_and(|flags| flags & ACCEPTS != 0)
    };
    Ok(table.lines().any(accepts))
}
