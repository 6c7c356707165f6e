//! Where a test takes place: its directory, its share of the machine, and the report if it fails.

use std::env;
use std::fs::{self, File};
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::fs::Advice;
use tempfile::TempDir;

use crate::binaries::{cache_directory, system_binary, work_directory};
use crate::disk::Page;
use crate::network::Network;
use crate::process::tail;
use crate::wait::{Deadline, wait_until};

/// Guests that run at once on one machine, over all test processes. Without KVM each fills a core.
const GUESTS_AT_ONCE: usize = 2;

/// How long to wait for other tests' guests, in seconds.
const SLOT_WAIT_SECONDS: u64 = 1200;

/// A working directory and the right to run some guests.
#[derive(Debug)]
pub struct Lab {
    /// Pools, logs and consoles: on a disk, for direct I/O.
    directory: TempDir,
    /// Sockets: a path of theirs has at most 107 bytes.
    sockets: TempDir,
    /// Locked for as long as the guests may run.
    _slots: Vec<File>,
}

impl Lab {
    /// Makes the directories, and waits until `guests` more guests may run.
    pub fn new(name: &str, guests: usize) -> Result<Self> {
        let slots = acquire_slots(guests)?;
        Self::with_slots(name, slots)
    }

    /// A lab for finding out what this machine can do, for whoever holds slots already.
    pub(crate) fn for_probe(name: &str) -> Result<Self> {
        Self::with_slots(name, Vec::new())
    }

    fn with_slots(name: &str, slots: Vec<File>) -> Result<Self> {
        let work = work_directory()?;
        fs::create_dir_all(&work)?;
        let mut builder = tempfile::Builder::new();
        let keep = env::var_os("HOLDFAST_KEEP").is_some();
        builder.disable_cleanup(keep);
        let prefix = format!("{}-", name.replace("::", "-"));
        let directory = builder.prefix(&prefix).tempdir_in(&work)?;
        let sockets = builder.prefix("holdfast-").tempdir_in("/tmp")?;
        if keep {
            eprintln!("keeping {} and {}", directory.path().display(), sockets.path().display());
        }
        Ok(Self { directory, sockets, _slots: slots })
    }

    /// The directory for data and logs. Every `*.log` in it is part of a failure report.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// The path of a log called `name`.
    pub fn log(&self, name: &str) -> PathBuf {
        self.directory().join(format!("{name}.log"))
    }

    /// The path of a socket called `name`.
    pub fn socket(&self, name: &str) -> PathBuf {
        self.sockets.path().join(format!("{name}.sock"))
    }

    /// Makes a file of `bytes` bytes (sparse), for a disk or a device of a pool.
    pub fn file(&self, name: &str, bytes: u64) -> Result<PathBuf> {
        let path = self.directory().join(name);
        File::create_new(&path)?.set_len(bytes)?;
        Ok(path)
    }

    /// The same, with the space taken from the file system: for measurements.
    pub fn preallocated_file(&self, name: &str, bytes: u64) -> Result<PathBuf> {
        let path = self.file(name, bytes)?;
        let taken = Command::new(system_binary("fallocate")?)
            .args(["--length", &bytes.to_string()])
            .arg(&path)
            .status()?;
        ensure!(taken.success(), "there are no {bytes} bytes for {}", path.display());
        Ok(path)
    }

    /// The same, written through to the disk once.
    pub fn written_file(&self, name: &str, bytes: u64) -> Result<PathBuf> {
        const PIECE: u64 = 1 << 20;
        let path = self.preallocated_file(name, bytes)?;
        let mut file = File::options().write(true).open(&path)?;
        let zeroes = vec![0; usize::try_from(PIECE)?];
        for _ in 0..bytes / PIECE {
            file.write_all(&zeroes)?;
        }
        file.write_all(&zeroes[..usize::try_from(bytes % PIECE)?])?;
        file.sync_all()?;
        // Or each first direct write of a part would have to throw it out of the page cache.
        rustix::fs::fadvise(&file, 0, None, Advice::DontNeed)?;
        Ok(path)
    }

    /// Waits until small writes are quick again, as they are not for some seconds after gigabytes were
    /// written; half a minute at most, since on some machines they never are.
    pub fn wait_for_calm_disk(&self) -> Result<()> {
        const SLOW: Duration = Duration::from_millis(8);
        const CALM: Duration = Duration::from_secs(3);
        let page = Page::new(self, "calm")?;
        let (start, mut slow) = (Instant::now(), Instant::now());
        while slow.elapsed() < CALM && start.elapsed() < 10 * CALM {
            let before = Instant::now();
            page.write()?;
            if before.elapsed() > SLOW {
                slow = Instant::now();
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// The end of every log, for a reader who was not there.
    pub fn report(&self) -> String {
        let mut logs: Vec<PathBuf> = fs::read_dir(self.directory())
            .into_iter()
            .flatten()
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| path.extension().is_some_and(|extension| extension == "log"))
            .collect();
        logs.sort();
        let part = |log: &PathBuf| {
            let name = log.file_name().unwrap_or_default().display();
            format!("--- {name}\n{}", tail(log))
        };
        logs.iter().map(part).collect::<Vec<_>>().join("\n")
    }
}

/// Runs a test that needs `guests` guests at once. A failure prints every log and console.
pub fn test(guests: usize, body: impl FnOnce(&Lab) -> Result<()>) {
    let name = test_name();
    let lab = Lab::new(&name, guests).expect("a lab for the test");
    // The body owns the processes: they are gone, and their logs complete, when it returns.
    match catch_unwind(AssertUnwindSafe(|| body(&lab))) {
        Ok(Ok(())) => {}
        Ok(Err(error)) => {
            eprintln!("{}", lab.report());
            drop(lab);
            let reasons: Vec<String> = error.chain().map(ToString::to_string).collect();
            panic!("{name}: {}", reasons.join("\n  because: "));
        }
        Err(payload) => {
            eprintln!("{}", lab.report());
            drop(lab);
            resume_unwind(payload);
        }
    }
}

/// True if a test that needs hosts with a network between them cannot run here: it is to return at
/// once. Says so, and where `HOLDFAST_SKIPPED` says; in CI it is a failure.
pub fn skip_without_network() -> bool {
    let Some(reason) = Network::unavailable() else { return false };
    assert!(env::var_os("CI").is_none(), "{} cannot run: {reason}", test_name());
    skip(&reason);
    true
}

/// Says that a test does not run here, and why, also where `HOLDFAST_SKIPPED` says.
pub fn skip(reason: &str) {
    let line = format!("SKIPPED {}: {reason}\n", test_name());
    eprint!("{line}");
    if let Some(path) = env::var_os("HOLDFAST_SKIPPED") {
        let list = File::options().create(true).append(true).open(path);
        list.and_then(|mut list| list.write_all(line.as_bytes())).expect("the list of the skipped");
    }
}

fn test_name() -> String {
    std::thread::current().name().unwrap_or("test").to_owned()
}

/// Locks `count` of the machine's slots. Whoever waits for several holds the gate meanwhile, so
/// that two such never wait for each other.
fn acquire_slots(count: usize) -> Result<Vec<File>> {
    ensure!(count <= GUESTS_AT_ONCE, "{count} guests at once, the limit is {GUESTS_AT_ONCE}");
    let directory = cache_directory()?;
    fs::create_dir_all(&directory).with_context(|| directory.display().to_string())?;
    let deadline = Deadline::seconds(SLOT_WAIT_SECONDS);
    let gate = File::create(directory.join("guests.lock"))?;
    wait_until("other tests' guests (gate)", deadline, || Ok(gate.try_lock().ok()))?;
    let mut slots = Vec::new();
    for index in 0..GUESTS_AT_ONCE {
        slots.push(File::create(directory.join(format!("guest-{index}.lock")))?);
    }
    let mut held = Vec::new();
    wait_until("other tests' guests", deadline, || {
        let mut index = 0;
        while index < slots.len() && held.len() < count {
            if slots[index].try_lock().is_ok() {
                held.push(slots.swap_remove(index));
            } else {
                index += 1;
            }
        }
        Ok((held.len() == count).then_some(()))
    })?;
    Ok(held)
}
