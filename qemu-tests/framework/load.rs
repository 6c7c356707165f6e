//! A client under load that knows what every read must return, and how long it was kept waiting.
//!
//! It keeps a number of requests under way at a vhost-user socket, from a thread of its own. Each
//! block carries its number and the generation of its last write, so that a lost write, a stale
//! read and a misplaced block are all told apart. What was acknowledged must be read; what was
//! not answered when a back end died may be there or not, but once seen it must stay.
//!
//! The *pause* is what a guest feels: the longest time in which nothing at all was answered
//! although requests were waiting.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use blkio_client::{Client, Done, Operation};

use crate::machine::Stretch;
use crate::oracle::{BLOCK_BYTES, Oracle, fill, mix};
use crate::wait::{Deadline, wait_until};

/// How long the client sleeps at most before it looks whether it is to end.
const TURN: Duration = Duration::from_millis(20);

/// Requests between two flushes.
const FLUSH_EVERY: u64 = 256;

/// Wrong blocks and failed requests that are told in full, at most.
const COMPLAINTS_MAX: usize = 20;

/// A shorter pause is none that is listed.
pub(crate) const PAUSE_MIN: Duration = Duration::from_millis(1);

/// Pauses that are listed, at most.
const PAUSES_MAX: usize = 200_000;

/// What a client does.
#[derive(Debug, Clone, Copy)]
pub struct LoadOptions {
    /// Requests under way.
    pub depth: usize,
    /// Blocks that it writes and reads, from the start of the disk.
    pub blocks: u32,
    /// How many of a hundred requests are reads.
    pub read_percent: u32,
    /// Requests started in a second, at most; 0: as many as are answered.
    pub rate: u32,
    /// Decides which blocks, in which order.
    pub seed: u64,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self { depth: 8, blocks: 8192, read_percent: 50, rate: 8000, seed: 1 }
    }
}

/// What happened in a stretch of time.
#[derive(Debug, Clone, Default)]
pub struct Window {
    /// Requests that were answered.
    pub completed: u64,
    /// The longest time without an answer although requests were waiting.
    pub pause: Duration,
    /// When that time ended.
    pub pause_end: Option<Instant>,
    /// Every such time that is worth a look, the longest with them: from when to when.
    pub pauses: Vec<Stretch>,
    /// The slowest request that was answered.
    pub slowest: Duration,
    /// When the first request was answered.
    pub first: Option<Instant>,
    /// How long each answered request took, in microseconds.
    pub latencies_us: Vec<u32>,
}

impl Window {
    /// From then until then nothing was answered.
    fn note_pause(&mut self, from: Instant, to: Instant) {
        let pause = to - from;
        if pause > self.pause {
            self.pause = pause;
            self.pause_end = Some(to);
        }
        if pause >= PAUSE_MIN && self.pauses.len() < PAUSES_MAX {
            self.pauses.push((from, to));
        }
    }

    /// The latency that so many of a hundred requests did not exceed.
    pub fn percentile(&self, per_cent: usize) -> Duration {
        let mut sorted = self.latencies_us.clone();
        sorted.sort_unstable();
        let index = (sorted.len().max(1) * per_cent).div_ceil(100).saturating_sub(1);
        Duration::from_micros(sorted.get(index).copied().unwrap_or(0).into())
    }
}

/// What the client's thread and its owner share.
#[derive(Debug)]
struct Shared {
    stop: AtomicBool,
    abandon: AtomicBool,
    rate: AtomicU32,
    meter: Mutex<Meter>,
}

#[derive(Debug)]
struct Meter {
    window: Window,
    last: Instant,
    waiting: usize,
    total: u64,
    complaints: Vec<String>,
}

impl Shared {
    fn meter(&self) -> MutexGuard<'_, Meter> {
        self.meter.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A client at work.
#[derive(Debug)]
pub struct Load {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Result<Oracle>>>,
}

impl Load {
    /// Connects to `socket` and starts, on a disk of which `oracle` is true.
    pub fn start(socket: &Path, options: LoadOptions, oracle: Oracle) -> Result<Self> {
        let meter = Meter {
            window: Window::default(),
            last: Instant::now(),
            waiting: 0,
            total: 0,
            complaints: Vec::new(),
        };
        let shared = Arc::new(Shared {
            stop: AtomicBool::new(false),
            abandon: AtomicBool::new(false),
            rate: AtomicU32::new(options.rate),
            meter: Mutex::new(meter),
        });
        let (socket, theirs) = (socket.to_owned(), Arc::clone(&shared));
        let (connected_sender, connected) = sync_channel(1);
        let body = move || {
            let mut worker = match Worker::connect(&socket, options, oracle, theirs) {
                Ok(worker) => worker,
                Err(error) => {
                    drop(connected_sender.send(Err(error)));
                    bail!("not connected");
                }
            };
            drop(connected_sender.send(Ok(())));
            worker.work()?;
            Ok(worker.oracle)
        };
        let thread = thread::Builder::new().name("load".to_owned()).spawn(body)?;
        connected.recv().context("the client's thread")??;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Starts a window: what is told by [`Load::end_window`] counts from here. A pause that goes on
    /// already counts in full.
    pub fn begin_window(&self) {
        self.shared.meter().window = Window::default();
    }

    /// Ends the window. A pause that still goes on counts as far as it has come.
    pub fn end_window(&self) -> Window {
        let mut meter = self.shared.meter();
        let mut window = std::mem::take(&mut meter.window);
        if meter.waiting > 0 && meter.last.elapsed() > window.pause {
            let now = Instant::now();
            window.note_pause(meter.last, now);
        }
        window
    }

    /// Changes how many requests are started in a second, at most.
    pub fn set_rate(&self, rate: u32) {
        self.shared.rate.store(rate, Ordering::Relaxed);
    }

    /// When the first request of the window was answered, if one was.
    pub fn first_answer(&self) -> Option<Instant> {
        self.shared.meter().window.first
    }

    /// Waits until so many more requests were answered.
    pub fn wait_for(&self, count: u64, deadline: Deadline) -> Result<()> {
        let goal = self.shared.meter().total + count;
        wait_until(&format!("{count} requests to be answered"), deadline, || {
            self.check()?;
            Ok((self.shared.meter().total >= goal).then_some(()))
        })
    }

    /// An error if the client saw a failed request or a wrong byte, or has ended.
    pub fn check(&self) -> Result<()> {
        let meter = self.shared.meter();
        ensure!(meter.complaints.is_empty(), "the client saw: {}", meter.complaints.join("; "));
        let ended = self.thread.as_ref().is_none_or(JoinHandle::is_finished);
        ensure!(!ended, "the client has ended");
        Ok(())
    }

    /// Starts nothing new, waits for the requests under way, and returns what the disk holds.
    pub fn finish(mut self) -> Result<Oracle> {
        self.shared.stop.store(true, Ordering::Release);
        self.join()
    }

    /// Goes away with requests under way: their fate is unknown. For a back end that is dead.
    pub fn abandon(mut self) -> Result<Oracle> {
        self.shared.abandon.store(true, Ordering::Release);
        self.join()
    }

    fn join(&mut self) -> Result<Oracle> {
        let thread = self.thread.take().context("joined once")?;
        let oracle = thread.join().map_err(|_| anyhow!("the client's thread panicked"))??;
        let meter = self.shared.meter();
        ensure!(meter.complaints.is_empty(), "the client saw: {}", meter.complaints.join("; "));
        Ok(oracle)
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.shared.abandon.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            // Its result is for whoever finishes it.
            drop(thread.join());
        }
    }
}

/// Writes every block of a new disk once.
pub fn fill_all(socket: &Path, blocks: u32) -> Result<Oracle> {
    const SLOTS: usize = 32;
    let mut oracle = Oracle::new(blocks);
    let mut client = Client::connect(socket, SLOTS, BLOCK_BYTES)?;
    let mut free: Vec<usize> = (0..SLOTS).collect();
    let mut failed = 0;
    for block in 0..blocks {
        let slot = free.pop().context("a free slot")?;
        let generation = oracle.begin_write(block);
        fill(client.bytes(slot), block, generation);
        oracle.acknowledged(block, generation);
        client.submit(slot, Operation::Write, offset(block), BLOCK_BYTES);
        if free.is_empty() || block + 1 == blocks {
            let least = if block + 1 == blocks { client.busy() } else { 1 };
            client.wait(least, REQUEST_LIMIT, |done| {
                failed = failed.min(done.result);
                free.push(done.slot);
            })?;
        }
    }
    ensure!(failed == 0, "filling the disk failed with errno {}", -failed);
    Ok(oracle)
}

/// Reads every block once and compares it with what it may hold.
pub fn verify(socket: &Path, mut oracle: Oracle) -> Result<Oracle> {
    let mut client = Client::connect(socket, 1, BLOCK_BYTES)?;
    for block in 0..u32::try_from(oracle.blocks()).context("blocks")? {
        client.submit(0, Operation::Read, u64::from(block) * BLOCK_BYTES as u64, BLOCK_BYTES);
        let mut result = 0;
        client
            .wait(1, REQUEST_LIMIT, |done| result = done.result)
            .with_context(|| format!("reading block {block}"))?;
        ensure!(result == 0, "reading block {block} failed with errno {}", -result);
        oracle.see(block, client.bytes(0)).map_err(|wrong| anyhow!(wrong))?;
    }
    Ok(oracle)
}

/// How long a request may take when no fault is injected.
const REQUEST_LIMIT: Duration = Duration::from_mins(1);

/// A request under way.
#[derive(Debug, Clone, Copy)]
struct Request {
    operation: Operation,
    block: u32,
    generation: u32,
    submitted: Instant,
}

struct Worker {
    client: Client,
    options: LoadOptions,
    oracle: Oracle,
    shared: Arc<Shared>,
    requests: Vec<Option<Request>>,
    /// Blocks with a request under way: the outcome of two at once would depend on their order.
    busy: Vec<bool>,
    random: u64,
    started: u64,
    /// When the next request may start.
    due: Instant,
}

impl Worker {
    fn connect(
        socket: &Path,
        options: LoadOptions,
        oracle: Oracle,
        shared: Arc<Shared>,
    ) -> Result<Self> {
        ensure!(oracle.blocks() == options.blocks as usize, "the oracle is of another disk");
        ensure!(options.depth * 4 <= oracle.blocks(), "more requests than a few blocks");
        let client = Client::connect(socket, options.depth, BLOCK_BYTES)?;
        let bytes = u64::from(options.blocks) * BLOCK_BYTES as u64;
        ensure!(client.capacity_bytes()? >= bytes, "the disk has no {bytes} bytes");
        Ok(Self {
            client,
            options,
            shared,
            requests: vec![None; options.depth],
            busy: vec![false; oracle.blocks()],
            oracle,
            random: options.seed | 1,
            started: 0,
            due: Instant::now(),
        })
    }

    fn work(&mut self) -> Result<()> {
        self.shared.meter().last = Instant::now();
        loop {
            if self.shared.abandon.load(Ordering::Acquire) {
                self.give_up();
                return Ok(());
            }
            if !self.shared.stop.load(Ordering::Acquire) {
                self.start_requests();
            } else if self.client.busy() == 0 {
                self.shared.meter().waiting = 0;
                return Ok(());
            }
            let turn = TURN.min(self.due.saturating_duration_since(Instant::now()));
            if self.client.busy() == 0 {
                thread::sleep(turn);
                continue;
            }
            let full = self.client.busy() == self.options.depth;
            let mut done = Vec::new();
            match self.client.wait(1, if full { TURN } else { turn }, |one| done.push(one)) {
                Ok(_) => self.complete(&done),
                Err(error) if error.is_timeout() => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn start_requests(&mut self) {
        let idle = self.client.busy() == 0;
        for slot in 0..self.options.depth {
            if self.requests[slot].is_none() && self.is_due() {
                let request = self.choose();
                self.requests[slot] = Some(request);
                let Request { operation, block, generation, .. } = request;
                let length = match operation {
                    Operation::Write => {
                        fill(self.client.bytes(slot), block, generation);
                        BLOCK_BYTES
                    }
                    Operation::Read => {
                        // What a back end leaves alone must not pass for what it read.
                        self.client.bytes(slot).fill(0xEE);
                        BLOCK_BYTES
                    }
                    Operation::Flush => 0,
                };
                self.client.submit(slot, operation, offset(block), length);
            }
        }
        let mut meter = self.shared.meter();
        meter.waiting = self.client.busy();
        if idle && meter.waiting > 0 {
            // Nobody waited before.
            meter.last = Instant::now();
        }
    }

    /// Whether the rate allows a request now. What a pause has held up is not made up for.
    fn is_due(&mut self) -> bool {
        let now = Instant::now();
        if now < self.due {
            return false;
        }
        let rate = self.shared.rate.load(Ordering::Relaxed);
        let interval = Duration::from_secs(1).checked_div(rate).unwrap_or_default();
        self.due = (self.due + interval).max(now.checked_sub(TURN).unwrap_or(now));
        true
    }

    fn choose(&mut self) -> Request {
        self.started += 1;
        let mut request = Request {
            operation: Operation::Flush,
            block: 0,
            generation: 0,
            submitted: Instant::now(),
        };
        if self.started.is_multiple_of(FLUSH_EVERY) {
            return request;
        }
        let block = loop {
            let choice = self.step() % u64::from(self.options.blocks);
            let index = usize::try_from(choice).expect("a u32");
            if !self.busy[index] {
                break index;
            }
        };
        self.busy[block] = true;
        request.block = u32::try_from(block).expect("blocks are counted in u32");
        request.operation = if self.step() % 100 < u64::from(self.options.read_percent) {
            Operation::Read
        } else {
            request.generation = self.oracle.begin_write(request.block);
            Operation::Write
        };
        request
    }

    fn complete(&mut self, done: &[Done]) {
        let now = Instant::now();
        let mut complaints = Vec::new();
        let mut latencies = Vec::with_capacity(done.len());
        for one in done {
            let request = self.requests[one.slot].take().expect("a request that was submitted");
            latencies.push(now - request.submitted);
            if let Err(complaint) = self.judge(one, request) {
                complaints.push(complaint);
            }
        }
        let mut meter = self.shared.meter();
        let before = std::mem::replace(&mut meter.last, now);
        meter.total += done.len() as u64;
        let room = COMPLAINTS_MAX.saturating_sub(meter.complaints.len());
        meter.complaints.extend(complaints.into_iter().take(room));
        let window = &mut meter.window;
        window.first.get_or_insert(now);
        window.completed += done.len() as u64;
        window.note_pause(before, now);
        for latency in latencies {
            window.slowest = window.slowest.max(latency);
            window.latencies_us.push(u32::try_from(latency.as_micros()).unwrap_or(u32::MAX));
        }
    }

    fn judge(&mut self, done: &Done, request: Request) -> Result<(), String> {
        let Request { operation, block, generation, .. } = request;
        let index = block as usize;
        if operation != Operation::Flush {
            self.busy[index] = false;
        }
        if done.result != 0 {
            if operation == Operation::Write {
                self.oracle.unanswered(block, generation);
            }
            return Err(format!(
                "{operation:?} of block {block} failed with errno {}",
                -done.result
            ));
        }
        match operation {
            Operation::Flush => Ok(()),
            Operation::Write => {
                self.oracle.acknowledged(block, generation);
                Ok(())
            }
            Operation::Read => self.oracle.see(block, self.client.bytes(done.slot)),
        }
    }

    /// The back end is dead: what it was asked may have happened, or not.
    fn give_up(&mut self) {
        for request in self.requests.iter().flatten() {
            if request.operation == Operation::Write {
                self.oracle.unanswered(request.block, request.generation);
            }
        }
        self.shared.meter().waiting = 0;
    }

    fn step(&mut self) -> u64 {
        mix(&mut self.random)
    }
}

fn offset(block: u32) -> u64 {
    u64::from(block) * BLOCK_BYTES as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles() {
        let window = Window { latencies_us: (1..=200).rev().collect(), ..Window::default() };
        assert_eq!(window.percentile(50), Duration::from_micros(100));
        assert_eq!(window.percentile(99), Duration::from_micros(198));
        assert_eq!(Window::default().percentile(99), Duration::ZERO);
    }
}
