//! Measures the reactor on this machine: random reads of a file with direct I/O, and a TCP
//! ping-pong over loopback. Prints the median of several runs.
//!
//! ```text
//! cargo run --release -p ring --example measure -- [--file PATH] [--mib SIZE] [--poll MICROS]
//!     [--only PART_OF_A_NAME]
//! ```
//!
//! The file is made (and written in full) if it is not there; put it on the disk to measure.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use base::BufferMut;
use base::limits::HEADER_BYTES;
use ring::{
    Completion, Config, DeviceHandle, DeviceOptions, Reactor, SocketAddress, SocketOptions, Token,
};

const RUNS: usize = 5;
const RUN: Duration = Duration::from_secs(1);

type Failure = Box<dyn std::error::Error>;

/// xorshift64*: any spread will do.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) % bound
    }
}

/// CPU time of this thread.
fn thread_cpu() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Runs `once`, which gives (operations, elapsed), and prints the medians.
fn report(
    what: &str,
    mut once: impl FnMut() -> Result<(u64, Duration), Failure>,
) -> Result<(), Failure> {
    let (mut rates, mut costs) = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        let before = thread_cpu();
        let (operations, elapsed) = once()?;
        #[expect(clippy::cast_precision_loss, reason = "counts of seconds of work")]
        let operations = operations as f64;
        rates.push(operations / elapsed.as_secs_f64());
        costs.push(thread_cpu().saturating_sub(before).as_secs_f64() / operations * 1e6);
    }
    let rate = median(rates);
    let cost = median(costs);
    println!(
        "{what:<29} {:>8.1} k/s  {:>7.1} µs each  {cost:>6.2} µs of CPU each",
        rate / 1e3,
        1e6 / rate
    );
    Ok(())
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Read,
    Write,
    /// As a log does it: a page in front, from another place.
    WriteWithHeader,
}

/// Keeps `depth` operations of `bytes` under way for a while.
fn disk(
    reactor: &mut Reactor,
    device: DeviceHandle,
    kind: Kind,
    depth: usize,
    bytes: usize,
) -> Result<(u64, Duration), Failure> {
    let extra = if kind == Kind::WriteWithHeader { HEADER_BYTES } else { 0 };
    let header = reactor.buffers().take(4096).ok_or("no buffer")?.freeze().payload(4096);
    let blocks = reactor.device_info(device).ok_or("open")?.size_bytes / (bytes + extra) as u64;
    let mut random = Random(ring::now().nanos() | 1);
    let mut start = |reactor: &mut Reactor, buffer: BufferMut| {
        let offset = random.below(blocks) * (bytes + extra) as u64;
        match kind {
            Kind::Read => reactor.read(device, offset, buffer, 0, bytes, Token(0)),
            Kind::Write => {
                reactor.write(device, offset, [buffer.freeze().payload(bytes)], Token(0));
            }
            Kind::WriteWithHeader => {
                let parts = [header.clone(), buffer.freeze().payload(bytes)];
                reactor.write(device, offset, parts, Token(0));
            }
        }
    };
    for _ in 0..depth {
        let buffer = reactor.buffers().take(bytes).ok_or("no buffer")?;
        start(reactor, buffer);
    }
    let (began, mut count, mut under_way) = (ring::now(), 0, depth);
    while under_way > 0 {
        reactor.turn(None, false)?;
        let over = reactor.now().since(began) >= RUN;
        while let Some(completion) = reactor.next_completion() {
            let (buffer, result) = match completion {
                Completion::Read { buffer, result, .. } => (Some(buffer), result),
                Completion::Written { result, .. } => (reactor.buffers().take(bytes), result),
                _ => continue,
            };
            result?;
            count += 1;
            match buffer {
                Some(buffer) if !over => start(reactor, buffer),
                _ => under_way -= 1,
            }
        }
    }
    Ok((count, ring::now().since(began)))
}

/// 4 KiB there and 4 KiB back, one at a time; the other side is a blocking thread.
fn ping_pong(reactor: &mut Reactor) -> Result<(u64, Duration), Failure> {
    const BYTES: usize = 4096;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = SocketAddress::Tcp(listener.local_addr()?);
    let thread = std::thread::spawn(move || -> std::io::Result<()> {
        let (mut stream, _): (TcpStream, _) = listener.accept()?;
        stream.set_nodelay(true)?;
        let mut buffer = [0; BYTES];
        while stream.read_exact(&mut buffer).is_ok() {
            stream.write_all(&buffer)?;
        }
        Ok(())
    });
    reactor.connect(&address, SocketOptions::default(), Token(0));
    let connection = loop {
        reactor.turn(None, false)?;
        if let Some(Completion::Connected { result, .. }) = reactor.next_completion() {
            break result?;
        }
    };
    let part = reactor.buffers().take(BYTES).ok_or("no buffer")?.freeze().payload(BYTES);
    let mut buffer = reactor.buffers().take(BYTES).ok_or("no buffer")?;
    let (began, mut count) = (ring::now(), 0);
    while reactor.now().since(began) < RUN {
        reactor.send(connection, part.clone())?;
        reactor.receive(connection, buffer, HEADER_BYTES..HEADER_BYTES + BYTES, BYTES);
        buffer = loop {
            reactor.turn(None, false)?;
            if let Some(Completion::Received { buffer, result, .. }) = reactor.next_completion() {
                result?;
                break buffer;
            }
        };
        count += 1;
    }
    let elapsed = ring::now().since(began);
    reactor.close(connection);
    thread.join().map_err(|_| "the echo thread panicked")??;
    while !matches!(reactor.next_completion(), Some(Completion::Closed { .. })) {
        reactor.turn(None, false)?;
    }
    Ok((count, elapsed))
}

fn prepare(path: &Path, mib: u64) -> Result<(), Failure> {
    if std::fs::metadata(path).is_ok_and(|status| status.len() >= mib << 20) {
        return Ok(());
    }
    let mut file = std::fs::File::create(path)?;
    let mut chunk = vec![0; 1 << 20];
    let mut random = Random(1);
    for _ in 0..mib {
        chunk.iter_mut().step_by(64).for_each(|byte| *byte = random.below(256).to_le_bytes()[0]);
        file.write_all(&chunk)?;
    }
    Ok(file.sync_all()?)
}

fn main() -> Result<(), Failure> {
    let mut path = PathBuf::from("measure.img");
    let mut mib = 1024;
    let mut config = Config::default();
    let mut only = String::new();
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let value = arguments.next().ok_or("an option without its value")?;
        match argument.as_str() {
            "--file" => path = value.into(),
            "--mib" => mib = value.parse()?,
            "--only" => only = value,
            "--poll" => config.poll = Duration::from_micros(value.parse()?),
            other => return Err(format!("unknown option {other}").into()),
        }
    }
    prepare(&path, mib)?;
    let mut reactor = Reactor::new(&config)?;
    let options = DeviceOptions { read_only: false, exclusive: true };
    let device = reactor.open_device(&path, options)?;
    println!("polling {:?} at most; {mib} MiB in {}", config.poll, path.display());
    for (what, kind, depth, bytes) in [
        ("4k random read, depth 1", Kind::Read, 1, 4096),
        ("4k random read, depth 32", Kind::Read, 32, 4096),
        ("4k random write, depth 1", Kind::Write, 1, 4096),
        ("4k random write, depth 32", Kind::Write, 32, 4096),
        ("4k+4k random write, depth 32", Kind::WriteWithHeader, 32, 4096),
        ("128k random read, depth 8", Kind::Read, 8, 131_072),
        ("128k random write, depth 8", Kind::Write, 8, 131_072),
    ] {
        if !what.contains(&only) {
            continue;
        }
        report(what, || disk(&mut reactor, device, kind, depth, bytes))?;
    }
    if "TCP".contains(&only) {
        report("TCP 4 KiB ping-pong", || ping_pong(&mut reactor))?;
    }
    Ok(())
}
