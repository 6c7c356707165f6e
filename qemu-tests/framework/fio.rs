//! fio in the guest: the jobs this project asks for, and what they measured.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::guest::{Guest, Job};

/// How much longer than its running time a job may take: to start under emulation, to verify.
const GRACE: Duration = Duration::from_secs(90);

/// What a job that writes also checks, in the end, for every block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verify {
    /// Nothing.
    Nothing,
    /// The CRC32C in each block: damage, and blocks never written this way.
    Crc32c,
    /// That each block has the bytes made from the seed and its own offset: stale and misplaced
    /// blocks too, which a checksum of their own does not give away.
    Pattern,
}

/// A job for fio.
#[derive(Debug, Clone)]
pub struct Fio {
    /// Device or file.
    pub target: String,
    /// fio's `rw`: `randwrite`, `randread`, `randrw`, `write`, `read`.
    pub pattern: &'static str,
    /// Bytes of one request.
    pub block_bytes: u32,
    /// Requests in flight.
    pub depth: u32,
    /// The part of the target that is used, from its start, in MiB.
    pub size_mib: u32,
    /// How long to go on, over and over. Without, each block is visited once.
    pub runtime: Option<Duration>,
    /// The most requests a second.
    pub rate: Option<u32>,
    /// What is checked in the end.
    pub verify: Verify,
    /// Of the order, and of the data if it is a pattern.
    pub seed: u32,
}

impl Fio {
    /// 4 KiB requests, sixteen in flight, over 64 MiB.
    pub fn new(target: &str, pattern: &'static str) -> Self {
        Self {
            target: target.to_owned(),
            pattern,
            block_bytes: 4096,
            depth: 16,
            size_mib: 64,
            runtime: None,
            rate: None,
            verify: Verify::Nothing,
            seed: 1,
        }
    }

    /// Goes on for this long.
    #[must_use]
    pub fn runtime(self, runtime: Duration) -> Self {
        Self { runtime: Some(runtime), ..self }
    }

    /// Reads everything back in the end and checks it.
    #[must_use]
    pub fn verify(self, verify: Verify) -> Self {
        Self { verify, ..self }
    }

    /// Writes other data, in another order.
    #[must_use]
    pub fn seed(self, seed: u32) -> Self {
        Self { seed, ..self }
    }

    /// Makes at most this many requests a second, so that there is time for something to happen.
    #[must_use]
    pub fn rate(self, rate: u32) -> Self {
        Self { rate: Some(rate), ..self }
    }

    /// Uses this many MiB.
    #[must_use]
    pub fn size_mib(self, size_mib: u32) -> Self {
        Self { size_mib, ..self }
    }

    /// Keeps this many requests in flight.
    #[must_use]
    pub fn depth(self, depth: u32) -> Self {
        Self { depth, ..self }
    }

    /// Runs it to its end.
    pub fn run(&self, guest: &mut Guest) -> Result<Measured> {
        let job = self.start(guest)?;
        self.finish(guest, job)
    }

    /// Starts it.
    pub fn start(&self, guest: &mut Guest) -> Result<Job> {
        guest.spawn(&self.command_line())
    }

    /// Waits for its end. An I/O error or a block that does not verify is an error.
    pub fn finish(&self, guest: &mut Guest, job: Job) -> Result<Measured> {
        let text = guest.wait(job, self.runtime.unwrap_or_default() + GRACE)?;
        Measured::parse(&text)
    }

    /// Reads back and checks what a `verify` job with the same target and size wrote.
    pub fn check_only(&self, guest: &mut Guest) -> Result<Measured> {
        ensure!(self.verify != Verify::Nothing, "there is nothing to check without verify");
        let job = guest.spawn(&format!("{} --verify_only", self.command_line()))?;
        self.finish(guest, job)
    }

    /// What runs it in a guest.
    pub fn command_line(&self) -> String {
        let mut command = format!(
            "fio --name=job --thread --ioengine=libaio --direct=1 --group_reporting \
             --output-format=json --filename={} --rw={} --bs={} --iodepth={} --size={}M \
             --randseed={}",
            self.target, self.pattern, self.block_bytes, self.depth, self.size_mib, self.seed
        );
        if let Some(rate) = self.rate {
            command += " --rate_iops=";
            command += &rate.to_string();
        }
        // A job that is cut off by time would not verify what it wrote.
        let verifies = self.verify != Verify::Nothing;
        assert!(self.runtime.is_none() || !verifies, "runtime and verify exclude each other");
        if let Some(runtime) = self.runtime {
            command += " --time_based --runtime=";
            command += &runtime.as_secs().to_string();
        }
        match self.verify {
            Verify::Nothing => return command,
            Verify::Crc32c => command += " --verify=crc32c",
            // %o: the block's offset.
            Verify::Pattern => {
                let pattern = format!(" --verify=pattern --verify_pattern=0x{:08x}%o", self.seed);
                command += &pattern;
            }
        }
        command + " --do_verify=1 --verify_fatal=1 --verify_dump=0"
    }
}

/// One direction of a job.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Direction {
    /// Requests.
    pub requests: u64,
    /// Requests a second.
    pub iops: f64,
    /// Mean latency, in microseconds.
    pub latency_mean_us: f64,
    /// The latency that 99 % of the requests do not exceed, in microseconds.
    pub latency_p99_us: f64,
    /// The longest latency: the longest pause the guest saw, in microseconds.
    pub latency_max_us: f64,
}

/// What a job measured.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Measured {
    /// Reads, those that verify included.
    pub read: Direction,
    /// Writes.
    pub write: Direction,
}

impl Measured {
    /// The longest any request took, in microseconds.
    pub fn longest_pause_us(&self) -> f64 {
        self.read.latency_max_us.max(self.write.latency_max_us)
    }

    /// Parses fio's JSON, which may follow warnings.
    fn parse(text: &str) -> Result<Self> {
        let start = text.find('{').with_context(|| format!("fio printed no JSON:\n{text}"))?;
        let mut values = serde_json::Deserializer::from_str(&text[start..]).into_iter::<Value>();
        let report = values.next().context("fio printed no JSON")?.context("fio's JSON")?;
        let job = &report["jobs"][0];
        match job["error"].as_i64() {
            Some(0) => {}
            Some(error) => bail!("fio reported error {error}:\n{text}"),
            None => bail!("fio's report has no job:\n{text}"),
        }
        Ok(Self { read: direction(&job["read"]), write: direction(&job["write"]) })
    }
}

fn direction(job: &Value) -> Direction {
    let number = |value: &Value| value.as_f64().unwrap_or(0.0);
    let latency = &job["clat_ns"];
    Direction {
        requests: job["total_ios"].as_u64().unwrap_or(0),
        iops: number(&job["iops"]),
        latency_mean_us: number(&latency["mean"]) / 1000.0,
        latency_p99_us: number(&latency["percentile"]["99.000000"]) / 1000.0,
        latency_max_us: number(&latency["max"]) / 1000.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_are_parsed_after_warnings_and_errors_are_errors() {
        let report = |error: u32| {
            format!(
                "fio: a warning\n{{\"jobs\": [{{\"error\": {error}, \"write\": {{\
                 \"total_ios\": 7, \"iops\": 3.5, \"clat_ns\": {{\"mean\": 1000.0, \
                 \"max\": 9000, \"percentile\": {{\"99.000000\": 8000}}}}}}, \"read\": {{}}}}]}}\n"
            )
        };
        let measured = Measured::parse(&report(0)).unwrap();
        assert_eq!(measured.write.requests, 7);
        assert!((measured.write.latency_p99_us - 8.0).abs() < 1e-9);
        assert!((measured.longest_pause_us() - 9.0).abs() < 1e-9);
        assert!(Measured::parse(&report(5)).is_err());
        assert!(Measured::parse("fio: crashed").is_err());
    }
}
