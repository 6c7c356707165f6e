//! The verifying writer: runs in a guest, on a disk, and knows what every read must return.
//!
//! Threads keep requests of 4 to 64 KiB under way with direct I/O, each on blocks of its own. Every
//! acknowledged write must be read back from then on. What was read stays in memory and is looked at
//! again much later: a page that a back end wrote and a migration forgot is noticed.
//!
//! The host asks over a virtio port, a line each way (`framework::Writer`). Times are the guest's, whose
//! clock stands still while the guest is stopped.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use framework::{BLOCK_BYTES, Oracle, fill, generation_in, mix};
use serde_json::{Value, json};

/// open(2)'s flag on x86-64: no page cache.
const O_DIRECT: i32 = 0o40_000;

/// The blocks of one request, at most.
const BLOCKS_MAX: u32 = 16;

/// Reads of each thread that stay in memory until their turn comes again.
const KEPT_READS: usize = 32;

/// Requests of one thread between two flushes.
const FLUSH_EVERY: u64 = 128;

/// Gaps between answers that are told, in microseconds at least and so many at most.
const GAP_US_MIN: u64 = 1000;
const GAPS_MAX: usize = 2048;

/// Wrong blocks and failed requests that are told in full, at most.
const COMPLAINTS_MAX: usize = 10;

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [device, port, threads, blocks, rate, seed] = words.as_slice() else {
        bail!("usage: guest_writer DEVICE PORT THREADS BLOCKS RATE SEED");
    };
    let (threads, blocks): (u32, u32) = (threads.parse()?, blocks.parse()?);
    let each = blocks.checked_div(threads).context("at least one thread")?;
    ensure!(each >= 2 * BLOCKS_MAX, "at least {} blocks a thread", 2 * BLOCKS_MAX);
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(O_DIRECT)
        .open(device)
        .context("device")?;
    let shared = Arc::new(Shared::new(rate.parse()?));
    let workers = (0..threads)
        .map(|number| {
            let (device, shared) = (device.try_clone()?, Arc::clone(&shared));
            let seed =
                seed.parse::<u64>()?.wrapping_add(u64::from(number).wrapping_mul(0x9E37_79B9));
            let mut worker = Worker::new(device, shared, number * each, each, threads, seed);
            Ok(thread::Builder::new().spawn(move || {
                worker.work();
                worker.check_all()
            })?)
        })
        .collect::<Result<Vec<_>>>()?;
    let mut line = Line::open(&port_called(port)?)?;
    while let Some(request) = line.next()? {
        match request.as_str() {
            "time" => line.answer(&json!({ "now_us": shared.now_us() }))?,
            "begin" => {
                shared.meter().window = Window::default();
                line.answer(&json!({ "now_us": shared.now_us() }))?;
            }
            "window" => line.answer(&shared.report())?,
            "finish" => break,
            _ => line.answer(&json!({ "error": format!("what is {request}?") }))?,
        }
    }
    shared.stop.store(true, Ordering::Release);
    let mut checked = 0;
    for worker in workers {
        checked += worker.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?;
    }
    let mut report = shared.report();
    report["checked"] = json!(checked);
    line.answer(&report)
}

/// The device of the virtio port with this name.
fn port_called(wanted: &str) -> Result<PathBuf> {
    for entry in fs::read_dir("/sys/class/virtio-ports")? {
        let entry = entry?;
        let name = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        if name.trim() == wanted {
            return Ok(Path::new("/dev").join(entry.file_name()));
        }
    }
    bail!("there is no virtio port '{wanted}'")
}

/// The host's line.
struct Line {
    from: BufReader<File>,
    to: File,
}

impl Line {
    fn open(path: &Path) -> Result<Self> {
        let to = OpenOptions::new().read(true).write(true).open(path)?;
        Ok(Self { from: BufReader::new(to.try_clone()?), to })
    }

    fn next(&mut self) -> Result<Option<String>> {
        let mut line = String::new();
        while self.from.read_line(&mut line)? == 0 {
            // Nobody is connected: the host may come back, at another place.
            thread::sleep(Duration::from_millis(10));
        }
        Ok(Some(line.trim().to_owned()))
    }

    fn answer(&mut self, answer: &Value) -> Result<()> {
        Ok(self.to.write_all(format!("{answer}\n").as_bytes())?)
    }
}

/// What the threads share.
struct Shared {
    start: Instant,
    stop: AtomicBool,
    rate: AtomicU32,
    meter: Mutex<Meter>,
}

struct Meter {
    /// Requests under way.
    waiting: u32,
    /// When the last one was answered, or the first one started after none was under way.
    since_us: u64,
    total: u64,
    wrong: u64,
    complaints: Vec<String>,
    window: Window,
}

/// What happened since the host said `begin`.
#[derive(Default)]
struct Window {
    completed: u64,
    slowest_us: u64,
    gaps: VecDeque<(u64, u64)>,
}

impl Shared {
    fn new(rate: u32) -> Self {
        Self {
            start: Instant::now(),
            stop: AtomicBool::new(false),
            rate: AtomicU32::new(rate),
            meter: Mutex::new(Meter {
                waiting: 0,
                since_us: 0,
                total: 0,
                wrong: 0,
                complaints: Vec::new(),
                window: Window::default(),
            }),
        }
    }

    fn now_us(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_micros()).expect("a guest of half a million years")
    }

    fn meter(&self) -> MutexGuard<'_, Meter> {
        self.meter.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn submitted(&self) -> u64 {
        let mut meter = self.meter();
        let now = self.now_us();
        if meter.waiting == 0 {
            meter.since_us = now;
        }
        meter.waiting += 1;
        now
    }

    fn answered(&self, submitted_us: u64) {
        let mut meter = self.meter();
        let now = self.now_us();
        let since = meter.since_us;
        (meter.since_us, meter.waiting) = (now, meter.waiting - 1);
        meter.total += 1;
        let window = &mut meter.window;
        window.completed += 1;
        window.slowest_us = window.slowest_us.max(now - submitted_us);
        if now - since >= GAP_US_MIN {
            if window.gaps.len() == GAPS_MAX {
                window.gaps.pop_front();
            }
            window.gaps.push_back((since, now));
        }
    }

    fn complain(&self, complaint: String) {
        let mut meter = self.meter();
        meter.wrong += 1;
        if meter.complaints.len() < COMPLAINTS_MAX {
            meter.complaints.push(complaint);
        }
    }

    fn report(&self) -> Value {
        let meter = self.meter();
        let window = &meter.window;
        json!({
            "now_us": self.now_us(),
            "total": meter.total,
            "waiting": meter.waiting,
            "waiting_since_us": meter.since_us,
            "wrong": meter.wrong,
            "complaints": meter.complaints,
            "completed": window.completed,
            "slowest_us": window.slowest_us,
            "gaps": window.gaps,
        })
    }
}

/// Memory for one request, where direct I/O wants it.
struct Buffer {
    bytes: Vec<u8>,
    start: usize,
}

impl Buffer {
    fn new() -> Self {
        let bytes = vec![0; (BLOCKS_MAX as usize + 1) * BLOCK_BYTES];
        let start = bytes.as_ptr().align_offset(BLOCK_BYTES);
        Self { bytes, start }
    }

    fn blocks(&mut self, count: u32) -> &mut [u8] {
        &mut self.bytes[self.start..][..count as usize * BLOCK_BYTES]
    }
}

/// A read that is still in memory: the first block, and what each block was when it was read.
struct Kept {
    buffer: Buffer,
    first: u32,
    generations: Vec<u32>,
}

struct Worker {
    device: File,
    shared: Arc<Shared>,
    first: u32,
    blocks: u32,
    threads: u32,
    oracle: Oracle,
    write: Buffer,
    kept: VecDeque<Kept>,
    random: u64,
    started: u64,
    due: Instant,
}

impl Worker {
    fn new(
        device: File,
        shared: Arc<Shared>,
        first: u32,
        blocks: u32,
        threads: u32,
        seed: u64,
    ) -> Self {
        let kept = || Kept { buffer: Buffer::new(), first: 0, generations: Vec::new() };
        Self {
            device,
            shared,
            first,
            blocks,
            threads,
            oracle: Oracle::new(first + blocks),
            write: Buffer::new(),
            kept: (0..KEPT_READS).map(|_| kept()).collect(),
            random: seed | 1,
            started: 0,
            due: Instant::now(),
        }
    }

    fn work(&mut self) {
        while !self.shared.stop.load(Ordering::Acquire) {
            self.started += 1;
            if self.started.is_multiple_of(FLUSH_EVERY) {
                self.flush();
                continue;
            }
            let count = if self.step().is_multiple_of(4) { 1 + self.choose(BLOCKS_MAX) } else { 1 };
            let first = self.first + self.choose(self.blocks - count + 1);
            if self.step().is_multiple_of(2) {
                self.read(first, count);
            } else {
                self.write(first, count);
            }
            self.pace();
        }
    }

    /// Keeps to this thread's share of the rate. What a pause has held up is not made up for.
    fn pace(&mut self) {
        let rate = self.shared.rate.load(Ordering::Relaxed);
        let Some(interval) = (Duration::from_secs(1) * self.threads).checked_div(rate) else {
            return;
        };
        let now = Instant::now();
        self.due = (self.due + interval).max(now.checked_sub(interval).unwrap_or(now));
        thread::sleep(self.due.saturating_duration_since(now));
    }

    fn flush(&mut self) {
        let submitted = self.shared.submitted();
        let outcome = self.device.sync_data();
        self.shared.answered(submitted);
        if let Err(error) = outcome {
            self.shared.complain(format!("a flush failed: {error}"));
        }
    }

    fn write(&mut self, first: u32, count: u32) {
        let bytes = self.write.blocks(count);
        let mut generations = Vec::with_capacity(count as usize);
        for (block, bytes) in (first..first + count).zip(bytes.chunks_exact_mut(BLOCK_BYTES)) {
            let generation = self.oracle.begin_write(block);
            fill(bytes, block, generation);
            generations.push(generation);
        }
        let submitted = self.shared.submitted();
        let outcome = self.device.write_all_at(self.write.blocks(count), offset(first));
        self.shared.answered(submitted);
        for (block, generation) in (first..).zip(generations) {
            match &outcome {
                Ok(()) => self.oracle.acknowledged(block, generation),
                Err(_) => self.oracle.unanswered(block, generation),
            }
        }
        if let Err(error) = outcome {
            self.shared.complain(format!("writing {count} blocks from {first} failed: {error}"));
        }
    }

    fn read(&mut self, first: u32, count: u32) {
        let mut kept = self.kept.pop_front().expect("reads are kept for ever");
        self.look_again(&mut kept);
        // What a back end leaves alone must not pass for what it read.
        kept.buffer.blocks(count).fill(0xEE);
        (kept.first, kept.generations) = (first, Vec::new());
        let submitted = self.shared.submitted();
        let outcome = self.device.read_exact_at(kept.buffer.blocks(count), offset(first));
        self.shared.answered(submitted);
        if let Err(error) = outcome {
            self.shared.complain(format!("reading {count} blocks from {first} failed: {error}"));
            self.kept.push_back(kept);
            return;
        }
        let blocks = kept.buffer.blocks(count).chunks_exact(BLOCK_BYTES);
        for (block, bytes) in (first..).zip(blocks) {
            if let Err(wrong) = self.oracle.see(block, bytes) {
                self.shared.complain(wrong);
            }
            kept.generations.push(generation_in(block, bytes).unwrap_or(u32::MAX));
        }
        self.kept.push_back(kept);
    }

    /// What was read once must still be in memory.
    fn look_again(&self, kept: &mut Kept) {
        let count = u32::try_from(kept.generations.len()).expect("the blocks of one request");
        let blocks = kept.buffer.blocks(count).chunks_exact(BLOCK_BYTES);
        for ((block, bytes), then) in (kept.first..).zip(blocks).zip(&kept.generations) {
            if *then != u32::MAX && generation_in(block, bytes) != Ok(*then) {
                self.shared.complain(format!(
                    "block {block} was read as write {then}, and memory holds something else now"
                ));
            }
        }
    }

    /// Reads everything once more; how many blocks that were.
    fn check_all(&mut self) -> u64 {
        let (mut first, end) = (self.first, self.first + self.blocks);
        while first < end {
            let count = BLOCKS_MAX.min(end - first);
            self.read(first, count);
            first += count;
        }
        for mut kept in core::mem::take(&mut self.kept) {
            self.look_again(&mut kept);
        }
        self.blocks.into()
    }

    fn choose(&mut self, below: u32) -> u32 {
        u32::try_from(self.step() % u64::from(below)).expect("below a u32")
    }

    fn step(&mut self) -> u64 {
        mix(&mut self.random)
    }
}

fn offset(block: u32) -> u64 {
    u64::from(block) * BLOCK_BYTES as u64
}
