//! The verifying writer in a guest, from the host's side (the guest's: `src/bin/guest_writer.rs`).
//!
//! It keeps requests under way and knows what every read must return. The times that it tells are the
//! guest's, and that clock stands still while the guest is stopped: what the guest waited for is told
//! apart from what it slept through.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::guest::{Guest, Job};
use crate::wait::{Deadline, wait_until};

/// How often the clocks are compared: the quickest answer counts.
const CLOCK_SAMPLES: usize = 5;

/// How long an answer may take: a writer under emulation, on a busy machine.
const ANSWER_SECONDS: u64 = 60;

/// How long the last look at every block may take.
const FINISH_SECONDS: u64 = 180;

/// What the writer does.
#[derive(Debug, Clone, Copy)]
pub struct WriterOptions {
    /// Requests under way, each from a thread of its own.
    pub threads: u32,
    /// Blocks of 4 KiB that it writes and reads, from the start of the disk.
    pub blocks: u32,
    /// Requests started in a second, at most; 0: as many as are answered.
    pub rate: u32,
    /// Decides which blocks, in which order.
    pub seed: u64,
}

impl Default for WriterOptions {
    fn default() -> Self {
        Self { threads: 8, blocks: 8192, rate: 2000, seed: 1 }
    }
}

/// A writer at work. It goes where its guest goes.
#[derive(Debug)]
pub struct Writer {
    job: Job,
}

/// What the writer saw since [`Writer::begin`].
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// Requests that were answered.
    pub completed: u64,
    /// Requests that were answered since it started.
    pub total: u64,
    /// The slowest of them.
    pub slowest: Duration,
    /// The times without an answer although requests were waiting, of a millisecond and more: when they
    /// began and ended. One that goes on still is the last one.
    pub gaps: Vec<(Duration, Duration)>,
    /// Blocks that were checked in the end.
    pub checked: u64,
    /// The guest's clock.
    pub now: Duration,
}

/// How the guest's clock goes with the host's.
#[derive(Debug, Clone, Copy)]
pub struct Clocks {
    /// Wall clock of the host, when the guest's clock was at `guest`.
    host: Duration,
    guest: Duration,
    /// How far off that may be, either way.
    pub error: Duration,
}

impl Clocks {
    /// The guest's time at a wall clock's time, if the guest ran in between.
    pub fn guest_at(&self, wall: Duration) -> Duration {
        (self.guest + wall).saturating_sub(self.host)
    }
}

/// The wall clock, as QEMU's events have it.
pub fn wall_clock() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

impl Writer {
    /// Starts it on the guest's first disk, which must be all zeroes.
    pub fn start(guest: &mut Guest, options: WriterOptions) -> Result<Self> {
        let WriterOptions { threads, blocks, rate, seed } = options;
        let program = crate::initramfs::WRITER;
        let command = format!("/{program} /dev/vda writer {threads} {blocks} {rate} {seed}");
        let job = guest.spawn(&command)?;
        let writer = Self { job };
        let answer = ask(guest, "time", ANSWER_SECONDS);
        if answer.is_err() {
            // It says why it ended where its output goes.
            if let Some(output) = guest.poll(job)? {
                bail!("the writer ended with {}: {}", output.status, output.text);
            }
        }
        answer.map(|_time| writer)
    }

    /// From now on what happens counts.
    pub fn begin(&self, guest: &mut Guest) -> Result<()> {
        ask(guest, "begin", ANSWER_SECONDS).map(|_time| ())
    }

    /// What happened since [`Writer::begin`]. A wrong byte or a failed request is an error.
    pub fn seen(&self, guest: &mut Guest) -> Result<Seen> {
        let answer = ask(guest, "window", ANSWER_SECONDS)?;
        Seen::parse(&answer)
    }

    /// Waits until so many more requests were answered.
    pub fn wait_for(&self, guest: &mut Guest, count: u64, deadline: Deadline) -> Result<Seen> {
        let goal = self.seen(guest)?.total + count;
        let mut last = 0;
        let done = wait_until("the writer's requests to be answered", deadline, || {
            let seen = self.seen(guest)?;
            last = seen.total;
            Ok((seen.total >= goal).then_some(seen))
        });
        done.with_context(|| format!("{last} of {goal} requests were answered"))
    }

    /// Compares the guest's clock with the host's.
    pub fn clocks(&self, guest: &mut Guest) -> Result<Clocks> {
        let mut best: Option<Clocks> = None;
        for _ in 0..CLOCK_SAMPLES {
            let before = wall_clock();
            let answer = ask(guest, "time", ANSWER_SECONDS)?;
            let error = wall_clock().saturating_sub(before) / 2;
            let sample = Clocks { host: before + error, guest: time(&answer, "now_us")?, error };
            if best.is_none_or(|best| error < best.error) {
                best = Some(sample);
            }
        }
        best.context("clocks were compared")
    }

    /// Ends it: it reads every block once more. A wrong byte or a failed request is an error.
    pub fn finish(self, guest: &mut Guest) -> Result<Seen> {
        let answer = ask(guest, "finish", FINISH_SECONDS)?;
        let seen = Seen::parse(&answer)?;
        guest.wait(self.job, Duration::from_secs(ANSWER_SECONDS))?;
        Ok(seen)
    }
}

impl Seen {
    fn parse(answer: &Value) -> Result<Self> {
        let complaints = answer["complaints"].as_array().context("complaints")?;
        let complaints: Vec<&str> = complaints.iter().filter_map(Value::as_str).collect();
        let wrong = answer["wrong"].as_u64().context("a count of complaints")?;
        ensure!(
            wrong == 0,
            "the guest saw {wrong} errors or wrong blocks: {}",
            complaints.join("; ")
        );
        let mut gaps = Vec::new();
        for gap in answer["gaps"].as_array().context("gaps")? {
            let at = |index: usize| gap[index].as_u64().map(Duration::from_micros);
            gaps.push((at(0).context("a gap's begin")?, at(1).context("a gap's end")?));
        }
        let (since, now) = (time(answer, "waiting_since_us")?, time(answer, "now_us")?);
        if answer["waiting"].as_u64() != Some(0)
            && now.saturating_sub(since) >= Duration::from_millis(1)
        {
            gaps.push((since, now));
        }
        let number = |name: &str| answer[name].as_u64().unwrap_or(0);
        Ok(Self {
            completed: number("completed"),
            total: number("total"),
            slowest: Duration::from_micros(number("slowest_us")),
            gaps,
            checked: number("checked"),
            now,
        })
    }

    /// The longest gap.
    pub fn longest(&self) -> Duration {
        self.gaps.iter().map(|(begin, end)| end.saturating_sub(*begin)).max().unwrap_or_default()
    }

    /// The longest gap that touches a stretch of the guest's clock.
    pub fn longest_between(&self, from: Duration, to: Duration) -> Duration {
        let touching = self.gaps.iter().filter(|(begin, end)| *begin <= to && *end >= from);
        touching.map(|(begin, end)| end.saturating_sub(*begin)).max().unwrap_or_default()
    }
}

/// Asks the writer.
fn ask(guest: &mut Guest, request: &str, seconds: u64) -> Result<Value> {
    let name = guest.name().to_owned();
    let (line, limit) = guest.writer_line()?;
    let deadline = limit.min(Deadline::seconds(seconds));
    line.send(request, deadline)?;
    let answer = line.next(deadline)?;
    let answer =
        answer.with_context(|| format!("the writer in guest {name} did not answer '{request}'"))?;
    let answer: Value = serde_json::from_str(&answer).with_context(|| answer.clone())?;
    ensure!(answer.get("error").is_none(), "the writer in guest {name}: {answer}");
    Ok(answer)
}

fn time(answer: &Value, name: &str) -> Result<Duration> {
    let micros = answer[name].as_u64().with_context(|| format!("no {name} in {answer}"))?;
    Ok(Duration::from_micros(micros))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn answer(wrong: u64) -> Value {
        json!({
            "now_us": 9000, "total": 7, "waiting": 2, "waiting_since_us": 5000, "wrong": wrong,
            "complaints": if wrong > 0 { json!(["block 3 is lost"]) } else { json!([]) },
            "completed": 5, "slowest_us": 40, "gaps": [[1000, 3000], [3500, 3600]],
        })
    }

    #[test]
    fn gaps_and_complaints() {
        let seen = Seen::parse(&answer(0)).unwrap();
        assert_eq!((seen.completed, seen.total), (5, 7));
        let ms = |us: u64| Duration::from_micros(us);
        assert_eq!(seen.longest(), ms(4000), "one that goes on");
        assert_eq!(seen.longest_between(ms(2000), ms(2001)), ms(2000));
        assert_eq!(seen.longest_between(ms(3050), ms(3400)), Duration::ZERO);
        assert_eq!(seen.longest_between(ms(3050), ms(3500)), ms(100));
        assert!(Seen::parse(&answer(1)).unwrap_err().to_string().contains("block 3 is lost"));
    }

    #[test]
    fn clocks() {
        let second = Duration::from_secs;
        let clocks = Clocks { host: second(100), guest: second(5), error: second(0) };
        assert_eq!(clocks.guest_at(second(103)), second(8));
        assert_eq!(clocks.guest_at(second(2)), Duration::ZERO);
    }
}
