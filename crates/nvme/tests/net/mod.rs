//! A target and an initiator joined by byte pipes: the shell of the tests. Bytes arrive in
//! random pieces, and may be corrupted or cut off.

#![allow(dead_code, reason = "each test file uses a part of it")]

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use base::{BufferPool, HolderId, Instant, ServerId};
use nvme::initiator::{self, Initiator, InitiatorConfig};
use nvme::target::{self, Target, TargetConfig};
use nvme::{ConnectionId, Receive, Subsystem};

/// SplitMix64.
pub(crate) struct Random(pub u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = self.0;
        value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ (value >> 31)
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    pub(crate) fn chance(&mut self, one_in: u64) -> bool {
        self.below(one_in) == 0
    }
}

pub(crate) const SERVER: ServerId = ServerId::from_bytes([0x5e; 16]);
pub(crate) const HOST: HolderId = HolderId::from_bytes([0x40; 16]);

/// One direction of a connection.
#[derive(Default)]
pub(crate) struct Pipe {
    pub(crate) bytes: VecDeque<u8>,
    pub(crate) receive: Option<Receive>,
    /// The sender has closed; what is in the pipe is still delivered.
    pub(crate) ended: bool,
    /// Longest region of a receive.
    pub(crate) region_bytes_max: usize,
    /// Bytes that went in, in all.
    pub(crate) total: u64,
    /// Flip a bit of this byte of `total`.
    pub(crate) corrupt: Option<u64>,
    /// Change one byte in so many.
    pub(crate) noise: Option<u64>,
}

impl Pipe {
    fn push(&mut self, part: &[u8], random: &mut Random) {
        for &byte in part {
            let hit = self.corrupt == Some(self.total)
                || self.noise.is_some_and(|one_in| random.chance(one_in));
            self.total += 1;
            let bit = 1 << random.below(8);
            self.bytes.push_back(if hit { byte ^ bit } else { byte });
        }
    }

    /// Moves up to `limit` bytes into the receive that waits; `None` if there is nothing to do.
    fn deliver(&mut self, limit: usize) -> Option<(Receive, usize)> {
        if self.bytes.is_empty() && !self.ended {
            return None;
        }
        let mut receive = self.receive.take()?;
        let count = limit.max(1).min(receive.region.len()).min(self.bytes.len());
        let target = receive.region.bytes(&mut receive.buffer);
        for (slot, byte) in target.iter_mut().zip(self.bytes.drain(..count)) {
            *slot = byte;
        }
        Some((receive, count))
    }
}

/// A connection: towards the target, towards the initiator.
#[derive(Default)]
pub(crate) struct Link {
    pub(crate) to_target: Pipe,
    pub(crate) to_initiator: Pipe,
    initiator_open: bool,
    target_open: bool,
}

impl Link {
    /// The initiator is gone and the target does not hear of it.
    pub(crate) fn lose_initiator(&mut self) {
        self.initiator_open = false;
        self.to_initiator.receive = None;
    }
}

pub(crate) struct Net {
    pub(crate) now: Instant,
    pub(crate) random: Random,
    pub(crate) target: Target,
    pub(crate) initiator: Initiator,
    pub(crate) links: BTreeMap<u64, Link>,
    pub(crate) from_target: Vec<target::Output>,
    pub(crate) from_initiator: Vec<initiator::Output>,
    pub(crate) target_pool: BufferPool,
    pub(crate) initiator_pool: BufferPool,
    pub(crate) target_slots: (usize, usize),
    pub(crate) initiator_slots: (usize, usize),
    /// Connects are refused.
    pub(crate) refuse: bool,
    /// Nothing is delivered.
    pub(crate) frozen: bool,
    /// Noise on new connections.
    pub(crate) noise: Option<u64>,
    /// Corrupt a byte of each of the next connections: (towards the target, which byte).
    pub(crate) corrupt: Vec<(bool, u64)>,
    /// Largest piece that is delivered at once.
    pub(crate) piece_bytes_max: u64,
}

impl Net {
    pub(crate) fn new(seed: u64, subsystem: Subsystem) -> Self {
        Self::with(seed, subsystem, |_| {}, |_| {}, (256, 64))
    }

    pub(crate) fn with(
        seed: u64,
        subsystem: Subsystem,
        set_target: impl FnOnce(&mut TargetConfig),
        set_initiator: impl FnOnce(&mut InitiatorConfig),
        slots: (usize, usize),
    ) -> Self {
        let target_pool = BufferPool::heap(slots.0, slots.1);
        let initiator_pool = BufferPool::heap(256, 64);
        let mut target_config = TargetConfig::new(SERVER);
        target_config.address = Some("192.0.2.1:4420".parse().unwrap());
        target_config.connections_max = 16;
        set_target(&mut target_config);
        let address = "127.0.0.1:4420".parse().unwrap();
        let mut config = InitiatorConfig::new(HOST, address, subsystem, seed);
        set_initiator(&mut config);
        Self {
            now: Instant::from_nanos(1_000_000),
            random: Random(seed),
            target: Target::new(target_config, target_pool.clone()),
            initiator: Initiator::new(config, initiator_pool.clone()),
            links: BTreeMap::new(),
            from_target: Vec::new(),
            from_initiator: Vec::new(),
            target_slots: target_pool.available(),
            initiator_slots: initiator_pool.available(),
            target_pool,
            initiator_pool,
            refuse: false,
            frozen: false,
            noise: None,
            corrupt: Vec::new(),
            piece_bytes_max: 200_000,
        }
    }

    pub(crate) fn at_target(&mut self, input: target::Input) {
        self.target.handle(self.now, input);
        self.drain();
    }

    pub(crate) fn at_initiator(&mut self, input: initiator::Input) {
        self.initiator.handle(self.now, input);
        self.drain();
    }

    fn drain(&mut self) {
        while let Some(output) = self.target.poll_output() {
            self.on_target_output(output);
        }
        while let Some(output) = self.initiator.poll_output() {
            self.on_initiator_output(output);
        }
    }

    fn on_target_output(&mut self, output: target::Output) {
        match output {
            target::Output::Receive(receive) => {
                let Some(link) = self.links.get_mut(&receive.connection.0) else { return };
                assert!(link.to_target.receive.is_none(), "one receive at a time");
                assert!(receive.min_bytes > 0 && receive.min_bytes <= receive.region.len());
                let longest = &mut link.to_target.region_bytes_max;
                *longest = receive.region.len().max(*longest);
                link.to_target.receive = Some(receive);
            }
            target::Output::Send { connection, part } => {
                let Some(link) = self.links.get_mut(&connection.0) else { return };
                assert!(link.target_open, "nothing is sent after closing");
                link.to_initiator.push(part.bytes(), &mut self.random);
                self.target.handle(self.now, target::Input::Sent { connection, bytes: part.len() });
            }
            target::Output::Close { connection } => {
                let link = self.links.get_mut(&connection.0).unwrap();
                assert!(link.target_open, "closed once");
                link.target_open = false;
                link.to_target.receive = None;
                link.to_initiator.ended = true;
                self.target.handle(self.now, target::Input::Closed { connection });
                self.forget(connection.0);
            }
            other => self.from_target.push(other),
        }
    }

    fn on_initiator_output(&mut self, output: initiator::Output) {
        match output {
            initiator::Output::Connect { connection, .. } => {
                if self.refuse {
                    let result = Err(std::io::ErrorKind::ConnectionRefused);
                    let input = initiator::Input::Connected { connection, result };
                    self.initiator.handle(self.now, input);
                    return;
                }
                let mut link = Link { initiator_open: true, target_open: true, ..Link::default() };
                link.to_target.noise = self.noise;
                link.to_initiator.noise = self.noise;
                if let Some((towards_target, byte)) = self.corrupt.pop() {
                    let pipe =
                        if towards_target { &mut link.to_target } else { &mut link.to_initiator };
                    pipe.corrupt = Some(byte);
                }
                self.links.insert(connection.0, link);
                self.target.handle(self.now, target::Input::Accepted { connection, from: None });
                let input = initiator::Input::Connected { connection, result: Ok(()) };
                self.initiator.handle(self.now, input);
                while let Some(output) = self.target.poll_output() {
                    self.on_target_output(output);
                }
            }
            initiator::Output::Receive(receive) => {
                let Some(link) = self.links.get_mut(&receive.connection.0) else { return };
                assert!(link.to_initiator.receive.is_none(), "one receive at a time");
                assert!(receive.min_bytes > 0 && receive.min_bytes <= receive.region.len());
                let longest = &mut link.to_initiator.region_bytes_max;
                *longest = receive.region.len().max(*longest);
                link.to_initiator.receive = Some(receive);
            }
            initiator::Output::Send { connection, part } => {
                let Some(link) = self.links.get_mut(&connection.0) else { return };
                assert!(link.initiator_open, "nothing is sent after closing");
                link.to_target.push(part.bytes(), &mut self.random);
            }
            initiator::Output::Close { connection } => {
                let link = self.links.get_mut(&connection.0).unwrap();
                assert!(link.initiator_open, "closed once");
                link.initiator_open = false;
                link.to_initiator.receive = None;
                link.to_target.ended = true;
                self.initiator.handle(self.now, initiator::Input::Closed { connection });
                self.forget(connection.0);
            }
            other => self.from_initiator.push(other),
        }
    }

    /// Cuts a connection: both shells see an error.
    pub(crate) fn cut(&mut self, id: u64) {
        self.links.remove(&id);
        let connection = ConnectionId(id);
        self.initiator.handle(self.now, initiator::Input::Closed { connection });
        self.target.handle(self.now, target::Input::Closed { connection });
        self.drain();
    }

    fn forget(&mut self, id: u64) {
        if self.links.get(&id).is_some_and(|link| !link.initiator_open && !link.target_open) {
            self.links.remove(&id);
        }
    }

    /// Adds bytes to what the target sends on connection `id`.
    pub(crate) fn inject(&mut self, id: u64, bytes: &[u8]) {
        if let Some(link) = self.links.get_mut(&id) {
            link.to_initiator.bytes.extend(bytes);
        }
    }

    /// Delivers one piece somewhere; false if there is nothing to deliver.
    pub(crate) fn step(&mut self) -> bool {
        self.drain();
        if self.frozen {
            return false;
        }
        let ids: Vec<u64> = self.links.keys().copied().collect();
        if ids.is_empty() {
            return false;
        }
        let first = self.random.below(2 * ids.len() as u64);
        for offset in 0..2 * ids.len() as u64 {
            let at = (first + offset) % (2 * ids.len() as u64);
            let id = ids[usize::try_from(at / 2).unwrap()];
            let limit = match self.random.below(4) {
                0 => 1 + self.random.below(16),
                1 => 1 + self.random.below(5000),
                _ => 1 + self.random.below(self.piece_bytes_max),
            };
            let limit = usize::try_from(limit).unwrap();
            let Some(link) = self.links.get_mut(&id) else { continue };
            let connection = ConnectionId(id);
            if at.is_multiple_of(2) {
                if let Some((receive, bytes)) = link.to_target.deliver(limit) {
                    let buffer = receive.buffer;
                    let input = target::Input::Received { connection, buffer, bytes };
                    self.target.handle(self.now, input);
                    self.drain();
                    return true;
                }
            } else if let Some((receive, bytes)) = link.to_initiator.deliver(limit) {
                let buffer = receive.buffer;
                let input = initiator::Input::Received { connection, buffer, bytes };
                self.initiator.handle(self.now, input);
                self.drain();
                return true;
            }
        }
        false
    }

    /// Delivers everything.
    pub(crate) fn settle(&mut self) {
        while self.step() {}
    }

    /// Lets time pass, waking the machines when they ask for it.
    pub(crate) fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        loop {
            self.settle();
            let deadline =
                base::time::earliest(self.target.next_deadline(), self.initiator.next_deadline());
            let next = deadline.unwrap_or(end).max(self.now + Duration::from_micros(100));
            if next > end {
                break;
            }
            self.now = next;
            self.target.handle(self.now, target::Input::Tick);
            self.initiator.handle(self.now, initiator::Input::Tick);
            self.drain();
        }
        self.now = end;
        self.target.handle(self.now, target::Input::Tick);
        self.initiator.handle(self.now, initiator::Input::Tick);
        self.settle();
    }

    /// Connects; panics if that does not work.
    pub(crate) fn up(&mut self) {
        self.initiator.handle(self.now, initiator::Input::Tick);
        self.settle();
        assert!(self.initiator.is_up(), "not up: {:?}", self.from_initiator);
    }

    /// The events so far.
    pub(crate) fn target_events(&mut self) -> Vec<target::Output> {
        std::mem::take(&mut self.from_target)
    }

    pub(crate) fn initiator_events(&mut self) -> Vec<initiator::Output> {
        std::mem::take(&mut self.from_initiator)
    }

    /// Ends everything and checks that all buffers have come back.
    pub(crate) fn finish(mut self) {
        self.at_initiator(initiator::Input::Stop);
        self.at_target(target::Input::Stop);
        self.settle();
        assert_eq!(self.initiator.outstanding(), 0);
        self.from_target.clear();
        self.from_initiator.clear();
        self.links.clear();
        assert_eq!(self.target.sessions(), 0);
        assert_eq!(self.target_pool.available(), self.target_slots, "the target's buffers");
        assert_eq!(self.initiator_pool.available(), self.initiator_slots, "the initiator's");
    }
}
