//! What the tests share.
#![allow(dead_code, reason = "each test binary uses a part")]
#![allow(clippy::unwrap_used, reason = "in a test, panicking is reporting")]

use std::collections::VecDeque;
use std::path::PathBuf;
use std::time::Duration;

use base::Buffer;
use ring::{Completion, Config, ConnectionHandle, DeviceHandle, DeviceOptions, Reactor};

/// No test waits longer than this for anything.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

/// A small configuration that fits the default RLIMIT_MEMLOCK several times.
pub(crate) fn config() -> Config {
    Config { entries: 64, small_buffers: 16, large_buffers: 4, ..Config::default() }
}

/// A reactor, and completions that were seen while looking for others.
pub(crate) struct Fixture {
    pub(crate) reactor: Reactor,
    seen: VecDeque<Completion>,
}

impl Fixture {
    pub(crate) fn new() -> Self {
        Self::with(&config())
    }

    pub(crate) fn with(config: &Config) -> Self {
        let reactor = Reactor::new(config).expect("io_uring works on the test machine");
        Self { reactor, seen: VecDeque::new() }
    }

    /// The first completion for which `wanted` gives something; others are kept.
    pub(crate) fn wait<T>(
        &mut self,
        mut wanted: impl FnMut(&Completion) -> Option<T>,
    ) -> (Completion, T) {
        let deadline = ring::now() + PATIENCE;
        let mut skipped = 0;
        loop {
            while let Some(completion) = self.seen.get(skipped) {
                if let Some(found) = wanted(completion) {
                    let completion = self.seen.remove(skipped).expect("it is there");
                    return (completion, found);
                }
                skipped += 1;
            }
            assert!(ring::now() < deadline, "timed out; seen: {:?}", self.seen);
            self.reactor.turn(Some(deadline), false).unwrap();
            while let Some(completion) = self.reactor.next_completion() {
                self.seen.push_back(completion);
            }
        }
    }

    /// The next completion of any kind.
    pub(crate) fn next(&mut self) -> Completion {
        self.wait(|_| Some(())).0
    }

    /// Turns until `done`.
    pub(crate) fn turn_until(&mut self, mut done: impl FnMut(&mut Reactor) -> bool) {
        let deadline = ring::now() + PATIENCE;
        while !done(&mut self.reactor) {
            assert!(ring::now() < deadline, "timed out");
            let soon = ring::now() + Duration::from_millis(2);
            self.reactor.turn(Some(soon), false).unwrap();
            while let Some(completion) = self.reactor.next_completion() {
                self.seen.push_back(completion);
            }
        }
    }

    /// Every free buffer is back.
    pub(crate) fn assert_buffers_are_back(&self, config: &Config) {
        assert_eq!(
            self.reactor.buffers().available(),
            (config.small_buffers, config.large_buffers),
            "all buffers are back in the pool"
        );
    }

    /// A frozen payload with `bytes` as `fill` makes them, one buffer for each `chunk`.
    pub(crate) fn payload(&self, bytes: usize, fill: impl Fn(usize) -> u8) -> Buffer {
        let mut buffer = self.reactor.buffers().take(bytes).expect("a free buffer");
        for (index, byte) in buffer.payload_mut()[..bytes].iter_mut().enumerate() {
            *byte = fill(index);
        }
        buffer.freeze().payload(bytes)
    }

    /// Two connections of this reactor that talk to each other over a socket pair.
    pub(crate) fn pair(&mut self) -> (ConnectionHandle, ConnectionHandle) {
        let (a, b) = std::os::unix::net::UnixStream::pair().unwrap();
        let options = ring::SocketOptions::default();
        let a = self.reactor.adopt(a.into(), options).unwrap();
        (a, self.reactor.adopt(b.into(), options).unwrap())
    }

    /// A device on a new file of `bytes` in `directory`.
    pub(crate) fn device(
        &mut self,
        directory: &tempfile::TempDir,
        bytes: u64,
    ) -> (DeviceHandle, PathBuf) {
        let path = directory.path().join("device");
        std::fs::File::create(&path).unwrap().set_len(bytes).unwrap();
        let options = DeviceOptions { read_only: false, exclusive: true };
        (self.reactor.open_device(&path, options).unwrap(), path)
    }
}

/// A byte pattern that differs everywhere and between `seed`s.
pub(crate) fn pattern(seed: usize, index: usize) -> u8 {
    let mixed = (seed * 0x9E37 + index).wrapping_mul(0x85EB_CA6B);
    mixed.to_le_bytes()[2]
}
