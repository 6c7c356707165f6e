//! What a run is made of: the cluster, the load and the faults that a seed stands for.

use core::time::Duration;

use base::{Durability, Instant};

use crate::faults::{Fault, FaultKind, Focus, Profile, schedule};
use crate::process::PoolLayout;
use crate::random::Random;

/// When faults begin, at the earliest.
const FAULTS_FROM: Duration = Duration::from_millis(20);

/// What a guest is like, besides how fast it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Habits {
    /// Requests that it has under way, at most.
    pub depth: usize,
    /// Blocks of a request, at most.
    pub blocks: u64,
    /// Half of its discards are of whole chunks of home.
    pub discards_chunks: bool,
    /// Half of the times that a head opens it only reads for a while.
    pub looks_first: bool,
    /// It is busy where damage was found.
    pub returns_to_damage: bool,
}

impl Habits {
    /// Of a guest that does anything at any time.
    pub const PLAIN: Self = Self {
        depth: 32,
        blocks: 32,
        discards_chunks: false,
        looks_first: false,
        returns_to_damage: false,
    };
}

/// A run.
#[derive(Clone, Debug)]
pub struct WorldConfig {
    /// Decides everything.
    pub seed: u64,
    /// Servers with a replica each: 1, 2, 3 or 5.
    pub servers: usize,
    /// Further servers, without a replica at first.
    pub spares: usize,
    /// The head runs in a process without a pool.
    pub diskless: bool,
    /// Blocks of 4 KiB of the volume.
    pub blocks: u64,
    /// Requests to submit, at most.
    pub requests: u64,
    /// The longest pause between two requests of a burst, in nanoseconds.
    pub pause_nanos: u64,
    /// Requests of a burst; zero: there is one burst, and no pause in it.
    pub burst: u64,
    /// Of a hundred requests, how many are reads.
    pub reads_percent: u64,
    /// What else the guest is like.
    pub habits: Habits,
    /// What goes wrong; see [`WorldConfig::with_faults`].
    pub faults: Vec<Fault>,
    /// The phase of faults lasts so long; zero: until all requests have been submitted.
    pub length: Duration,
    /// Now and then a disk or the network is a hundred times slower, and members fall behind.
    pub hiccups: bool,
    /// The servers' pools.
    pub layout: PoolLayout,
    /// When a write counts. With [`Durability::Flush`], servers that lose power may cost what was
    /// acknowledged and not flushed.
    pub durability: Durability,
    /// Machines check themselves, and checkers look at them, after every one of so many events (and
    /// wherever a fault strikes).
    pub check_every: u64,
    /// Print what happens.
    pub trace: bool,
    /// Print what happens to this block.
    pub trace_block: Option<u64>,
    /// Counts the process's allocations, for [`Report::node_allocations`](crate::Report::node_allocations).
    pub allocations: fn() -> u64,
}

impl WorldConfig {
    /// Blocks that the volume may have at last.
    pub(crate) fn blocks_in_the_end(&self) -> u64 {
        let grown = self.faults.iter().map(|fault| match fault.kind {
            FaultKind::Grow { blocks } => blocks,
            _ => 0,
        });
        self.blocks + grown.sum::<u64>()
    }

    /// Processes with a pool.
    pub(crate) fn pools(&self) -> usize {
        self.servers + self.spares
    }

    /// A cluster in which nothing fails.
    pub fn quiet(seed: u64, servers: usize, diskless: bool, requests: u64) -> Self {
        Self {
            seed,
            servers,
            spares: 0,
            diskless,
            blocks: 512,
            requests,
            pause_nanos: 80_000,
            burst: 0,
            reads_percent: 35,
            habits: Habits::PLAIN,
            faults: Vec::new(),
            length: Duration::ZERO,
            hiccups: true,
            layout: PoolLayout::roomy(),
            durability: Durability::Flush,
            check_every: 32,
            trace: false,
            trace_block: None,
            allocations: || 0,
        }
    }

    /// The cluster and the faults that a seed stands for.
    pub fn with_faults(seed: u64) -> Self {
        Self::with_focus(seed, Focus::of(seed))
    }

    /// What a seed stands for if it is about `focus`.
    pub fn with_focus(seed: u64, focus: Focus) -> Self {
        let mut random = Random::of(seed, "configuration");
        let mut shape = Shape {
            servers: random.choose(&[3, 3, 3, 5, 2, 1]),
            spares: random.choose(&[0, 1, 2]),
            diskless: random.one_in(3),
            length: Duration::from_millis(random.choose(&[500, 2000, 4000, 8000])),
            pause_nanos: random.choose(&[80_000, 300_000, 1_000_000, 8_000_000]),
            layout: random.choose(&[PoolLayout::roomy(), PoolLayout::busy(), PoolLayout::tight()]),
            durability: Durability::Flush,
            habits: Habits::PLAIN,
        };
        if focus != Focus::Everything {
            shape.length = Duration::from_millis(random.choose(&[4000, 8000]));
            shape.pause_nanos = random.choose(&[80_000, 300_000]);
        }
        shape.durability = random.choose(&[Durability::Durable, Durability::Flush]);
        shape.suit(focus, &mut random);
        let Shape { servers, spares, diskless, length, .. } = shape;
        let profile = Profile {
            seed,
            focus,
            servers: servers + spares,
            processes: servers + spares + usize::from(diskless),
            from: Instant::ZERO + FAULTS_FROM,
            length,
        };
        Self {
            spares,
            habits: shape.habits,
            requests: 4000,
            pause_nanos: shape.pause_nanos,
            burst: random.choose(&[20, 100, 400]),
            reads_percent: random.choose(&[10, 35, 35, 70]),
            faults: schedule(&profile),
            length,
            durability: shape.durability,
            blocks: random.choose(&[64, 512, 512]),
            layout: shape.layout,
            ..Self::quiet(seed, servers, diskless, 0)
        }
    }
}

/// What of a run its focus may change.
struct Shape {
    servers: usize,
    spares: usize,
    diskless: bool,
    length: Duration,
    pause_nanos: u64,
    layout: PoolLayout,
    durability: Durability,
    habits: Habits,
}

impl Shape {
    /// A cluster and a guest that suit what the seed is about.
    fn suit(&mut self, focus: Focus, random: &mut Random) {
        let flushing = [PoolLayout::busy(), PoolLayout::tight()];
        match focus {
            Focus::Everything => {}
            Focus::StaleReads | Focus::Wire => self.servers = random.choose(&[2, 3, 3]),
            Focus::Openings => {
                self.servers = random.choose(&[2, 3, 3, 5]);
                self.habits.depth = random.choose(&[1, 2, 8, 32]);
                self.habits.looks_first = random.one_in(2);
            }
            Focus::Media => {
                self.servers = random.choose(&[3, 3, 3, 5]);
                self.layout.scrub_bytes_per_second = 4 << 20;
                self.habits.returns_to_damage = true;
            }
            Focus::Members => {
                (self.servers, self.spares) = (random.choose(&[2, 3, 3]), random.choose(&[1, 2]));
                self.layout = random.choose(&flushing);
            }
            Focus::Fills => {
                (self.servers, self.spares) = (random.choose(&[2, 3, 3]), random.choose(&[1, 2]));
                self.diskless = random.one_in(2);
                self.layout = random.choose(&flushing);
                self.habits.discards_chunks = true;
                self.habits.looks_first = true;
            }
            Focus::Home => {
                self.layout = random.choose(&flushing);
                self.habits.discards_chunks = random.one_in(2);
            }
            Focus::Power => {
                self.servers = random.choose(&[1, 2, 3, 3, 3, 5]);
                self.spares = random.choose(&[0, 0, 1]);
                self.diskless = random.one_in(5);
                self.durability =
                    random.choose(&[Durability::Durable, Durability::Flush, Durability::Flush]);
                self.habits.looks_first = true;
            }
        }
    }
}
