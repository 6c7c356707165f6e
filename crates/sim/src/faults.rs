//! What goes wrong and when, as data: made from the seed before the run, so that a failing run's
//! list can be cut down to what it takes.

use core::fmt;
use core::time::Duration;

use base::Instant;

use crate::random::Random;

/// Something that happens to the cluster, from without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// `kill -9` of a process; it starts again after a while. The kernel's caches survive.
    Kill {
        /// Which process.
        who: usize,
    },
    /// A server, or every one, loses power.
    PowerCut {
        /// Which server; `None`: all of them.
        who: Option<usize>,
    },
    /// SIGSTOP, and SIGCONT later.
    Pause {
        /// Which process.
        who: usize,
        /// For how long.
        millis: u64,
    },
    /// A server, or every one, loses power, or a process is killed, in the midst of things: after so
    /// many more acknowledged writes, or completed disk operations.
    Ambush {
        /// How many.
        after: u64,
        /// Of the guest's writes; else disk operations.
        writes: bool,
        /// What then.
        power: bool,
        /// To whom; `None`: to all servers.
        who: Option<usize>,
    },
    /// The process with the head is cut off, or stands still, while another one takes over.
    TakeOver {
        /// By which process.
        to: usize,
        /// It stands still; else it is cut off.
        pause: bool,
        /// For how long.
        millis: u64,
    },
    /// A process's clock runs at another rate.
    Drift {
        /// Whose.
        who: usize,
        /// How much faster, in millionths.
        millionths: i64,
    },
    /// Nothing passes between the processes of a set and the others; nothing is closed.
    Partition {
        /// The set, a bit for each process.
        set: u64,
        /// For how long.
        millis: u64,
    },
    /// Nothing passes one way from one process to another.
    Silence {
        /// The one.
        from: usize,
        /// The other.
        to: usize,
        /// For how long.
        millis: u64,
    },
    /// A connection breaks.
    Reset {
        /// Of which process.
        who: usize,
    },
    /// Segments from one process to another are lost, and so late.
    Loss {
        /// The one.
        from: usize,
        /// The other.
        to: usize,
        /// Once in so many times.
        times: u64,
        /// For how long.
        millis: u64,
    },
    /// Segments from one process to another have a bit flipped that TCP's checksum misses.
    Corruption {
        /// The one.
        from: usize,
        /// The other.
        to: usize,
        /// Once in so many times.
        times: u64,
        /// For how long.
        millis: u64,
    },
    /// What one process sends another takes up to so much longer.
    Delay {
        /// The one.
        from: usize,
        /// The other.
        to: usize,
        /// At most so much.
        micros: u64,
        /// For how long.
        millis: u64,
    },
    /// The way from one process to another is narrow.
    Bandwidth {
        /// The one.
        from: usize,
        /// The other.
        to: usize,
        /// A byte takes so long.
        byte_nanos: u64,
        /// For how long.
        millis: u64,
    },
    /// A disk answers late.
    SlowDisk {
        /// Whose.
        who: usize,
        /// Which.
        device: usize,
        /// How many times slower.
        times: u64,
        /// For how long.
        millis: u64,
    },
    /// A disk does not answer for a while.
    HangingDisk {
        /// Whose.
        who: usize,
        /// Which.
        device: usize,
        /// For how long.
        millis: u64,
    },
    /// A few reads fail.
    ReadErrors {
        /// Whose.
        who: usize,
        /// Which.
        device: usize,
        /// How many.
        count: u64,
    },
    /// A page that is in use cannot be read until it is written. Only of the faulty server.
    BadPage {
        /// Which.
        device: usize,
    },
    /// Bits flip on media. Only of the faulty server.
    Rot {
        /// Which.
        device: usize,
        /// In how many pages.
        pages: u64,
        /// And its process is killed.
        kill: bool,
    },
    /// A write is said to be done and is not. Only of the faulty server.
    LostWrite,
    /// A write lands elsewhere. Only of the faulty server.
    MisdirectedWrite,
    /// A sync fails; what it should have kept may be gone. Only of the faulty server.
    FailedSync {
        /// Which.
        device: usize,
    },
    /// The cluster store cannot be reached.
    StoreAway {
        /// For how long.
        millis: u64,
    },
    /// The cluster store does as it is told and its answers are lost.
    StoreMute {
        /// How many.
        answers: u64,
    },
    /// Somebody attaches the volume at another process, while the old head may still run.
    Attach {
        /// Which process.
        who: usize,
    },
    /// A server is to be emptied, or no longer.
    Drain {
        /// Which server.
        who: usize,
    },
    /// The holder gives the volume up in good order, and another process attaches it.
    HandOver {
        /// Which process.
        to: usize,
    },
}

/// A fault and its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// When.
    pub at: Instant,
    /// Decides what the kind leaves open (which connection, which page).
    pub salt: u64,
    /// What.
    pub kind: FaultKind,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:?}", self.at, self.kind)
    }
}

/// What a schedule is made for.
#[derive(Clone, Copy, Debug)]
pub struct Profile {
    /// Decides everything.
    pub seed: u64,
    /// Processes with a pool.
    pub servers: usize,
    /// All processes.
    pub processes: usize,
    /// Faults begin here.
    pub from: Instant,
    /// And last so long.
    pub length: Duration,
}

/// Kinds of faults: which of them a seed uses is part of the seed, since a run in which everything
/// goes wrong at once never gets far enough for the rare things.
const KINDS: usize = 27;

/// All faults of a run, in the order of their times.
pub fn schedule(profile: &Profile) -> Vec<Fault> {
    let mut random = Random::of(profile.seed, "faults");
    let mut weights = [0; KINDS];
    for weight in &mut weights {
        *weight = random.choose(&[0, 0, 1, 1, 2, 6]);
    }
    // Somebody always moves the volume.
    weights[20] += 1;
    let total: u64 = weights.iter().sum();
    let per_second = random.choose(&[2, 5, 10, 20, 40]);
    let pause = 2_000_000_000 / per_second;
    let mut at = profile.from;
    let mut faults = Vec::new();
    loop {
        at = at + Duration::from_nanos(random.between(1_000, pause));
        if at.since(profile.from) > profile.length {
            return faults;
        }
        let mut pick = random.below(total);
        let number = weights.iter().position(|weight| {
            let found = pick < *weight;
            pick = pick.saturating_sub(*weight);
            found
        });
        let number = number.expect("the pick is below the sum");
        let salt = random.bits();
        faults.push(Fault { at, salt, kind: kind(number, profile, &mut random) });
    }
}

/// How long something lasts: mostly short, now and then past every time-out.
fn millis(random: &mut Random) -> u64 {
    match random.below(8) {
        0..=3 => random.between(1, 100),
        4..=6 => random.between(100, 2000),
        _ => random.between(2000, 10_000),
    }
}

fn kind(number: usize, profile: &Profile, random: &mut Random) -> FaultKind {
    let who = random.index(profile.processes);
    let server = random.index(profile.servers);
    let device = random.index(2);
    let (from, to) = (random.index(profile.processes), random.index(profile.processes));
    let millis = millis(random);
    match number {
        0 | 1 => FaultKind::Kill { who },
        2 => FaultKind::PowerCut { who: (!random.one_in(4)).then_some(server) },
        3 | 4 => FaultKind::Pause { who, millis },
        5 => {
            let millionths = i64::try_from(random.below(40_001)).expect("small") - 20_000;
            FaultKind::Drift { who, millionths }
        }
        6 => FaultKind::Partition { set: random.below(1 << profile.processes), millis },
        7 => FaultKind::Partition { set: 1 << who, millis },
        8 => FaultKind::Silence { from, to, millis },
        9 => FaultKind::Reset { who },
        10 => FaultKind::Loss { from, to, times: random.choose(&[3, 20, 100]), millis },
        11 => FaultKind::Corruption { from, to, times: random.choose(&[5, 50]), millis },
        12 => FaultKind::Delay { from, to, micros: random.choose(&[500, 5000, 100_000]), millis },
        13 => {
            FaultKind::Bandwidth { from, to, byte_nanos: random.choose(&[10, 100, 1000]), millis }
        }
        14 => {
            let times = random.choose(&[10, 100, 1000]);
            FaultKind::SlowDisk { who: server, device, times, millis }
        }
        15 => FaultKind::HangingDisk { who: server, device, millis },
        16 => FaultKind::ReadErrors { who: server, device, count: random.between(1, 4) },
        17 => match random.below(4) {
            0 => FaultKind::BadPage { device },
            1 => {
                let pages = random.choose(&[1, 2, 4]);
                FaultKind::Rot { device, pages, kill: random.one_in(2) }
            }
            2 => FaultKind::LostWrite,
            _ => FaultKind::MisdirectedWrite,
        },
        18 => FaultKind::FailedSync { device },
        19 if random.one_in(2) => FaultKind::StoreAway { millis },
        19 => FaultKind::StoreMute { answers: random.between(1, 4) },
        20 => FaultKind::Attach { who },
        21 => FaultKind::HandOver { to: who },
        22 | 23 => FaultKind::TakeOver { to: who, pause: random.one_in(2), millis },
        26 => FaultKind::Drain { who: server },
        24 | 25 => FaultKind::Ambush {
            after: random.between(1, 40),
            writes: random.one_in(2),
            power: !random.one_in(3),
            who: (!random.one_in(3)).then_some(server),
        },
        _ => unreachable!("there are {KINDS} kinds"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_is_used_by_some_seed() {
        let mut seen = std::collections::BTreeSet::new();
        for seed in 0..200 {
            let profile = Profile {
                seed,
                servers: 3,
                processes: 4,
                from: Instant::ZERO,
                length: Duration::from_secs(4),
            };
            let faults = schedule(&profile);
            assert_eq!(faults, schedule(&profile), "a seed decides everything");
            assert!(faults.is_sorted_by_key(|fault| fault.at));
            for fault in faults {
                let name = format!("{:?}", fault.kind);
                seen.insert(name.split([' ', '{']).next().unwrap_or_default().to_owned());
            }
        }
        assert_eq!(seen.len(), 26, "{seen:?}");
    }
}
