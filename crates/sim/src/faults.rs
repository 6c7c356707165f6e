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
    /// Something happens in the midst of things: so many times after something else did, and a number
    /// of disk operations later.
    Ambush {
        /// What is waited for.
        trigger: Trigger,
        /// How often it is to happen.
        count: u64,
        /// Then so many disk operations of the process where it happened.
        operations: u64,
        /// What happens then.
        deed: Deed,
        /// To whom.
        victim: Victim,
    },
    /// The process with the head is cut off, or stands still, while another one takes over.
    TakeOver {
        /// By which process.
        to: usize,
        /// It stands still; else it is cut off.
        pause: bool,
        /// What happens to every other server at the same time.
        others: Others,
        /// For how long.
        millis: u64,
    },
    /// Every answer to the process with the head comes late.
    LateAnswers {
        /// At most so much.
        micros: u64,
        /// For how long.
        millis: u64,
    },
    /// A server is to be emptied; when the head has agreed to the next change of members, and nobody
    /// knows yet what came of it, those who were to count and those who will are cut off from each
    /// other, and one of the latter takes over.
    SplitChange {
        /// Which server.
        who: usize,
        /// For how long.
        millis: u64,
    },
    /// A next process takes everything over from a running one (`holdfastd upgrade`), or fails to and the
    /// running one takes it back.
    Upgrade {
        /// Which process.
        who: usize,
        /// The next one dies so long after it has got everything.
        dies_after: Option<Duration>,
    },
    /// Records reach only a write quorum, one of which is the faulty server; the header of one of their batches
    /// rots there, which later batches in its log vouch for, and it starts again. The others of the quorum
    /// are cut off, and those who do not have the records are asked to open the volume.
    RotInMidst {
        /// For how long those who have the records are cut off.
        millis: u64,
    },
    /// A process's clock runs at another rate.
    Drift {
        /// Whose.
        who: usize,
        /// How much faster, in millionths.
        millionths: i64,
    },
    /// A process's wall clock is set wrong.
    WallClock {
        /// Whose.
        who: usize,
        /// By how much.
        seconds: i64,
    },
    /// A process without a pool stood still and its clock did not show it, or it ran ahead: its
    /// monotonic clock jumps forward.
    ClockJump {
        /// By how much.
        millis: u64,
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
    /// A device says that it has put things on media, and has not. Only of the faulty server, only
    /// one of its devices.
    LyingSync {
        /// For how long.
        millis: u64,
        /// And then the server loses power.
        power: bool,
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
    /// Somebody attaches the volume at another process, and the old head knows nothing of that: what it
    /// has sent to be written is written late, and what the new one asks for may come before it.
    SlowTakeOver {
        /// Which process.
        to: usize,
        /// For how long disks are slow.
        millis: u64,
    },
    /// The guest pauses; then the process with the head is cut off, the guest writes a little more there,
    /// which no other server gets, and another process takes over; the guest looks at things for a while.
    Duel {
        /// Which process takes over.
        to: usize,
        /// How many writes.
        writes: u64,
        /// For how long the old head is cut off.
        millis: u64,
    },
    /// The guest pauses; what it writes then reaches the head's server and the one that takes over, and
    /// no other; and when that one has opened, every server loses power and it is away for longer.
    ThinStart {
        /// For how long the old head stands still.
        millis: u64,
    },
    /// The volume is made larger.
    Grow {
        /// By so many blocks.
        blocks: u64,
    },
    /// Between the head and everybody else bits flip, half of them where headers are.
    HeadCorruption {
        /// Once in so many times.
        times: u64,
        /// For how long.
        millis: u64,
    },
    /// A server is to be emptied, or no longer.
    Drain {
        /// Which server.
        who: usize,
    },
    /// The guest stops, the head rests, and another process attaches the volume, as in a migration.
    Migrate {
        /// Which process.
        to: usize,
        /// The one with the head that rests is cut off for so long, and does not know what it has lost when
        /// somebody uses it again.
        cut_millis: Option<u64>,
    },
    /// The holder gives the volume up in good order, and another process attaches it.
    HandOver {
        /// Which process.
        to: usize,
    },
}

/// What happens to the other servers while somebody takes over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Others {
    /// Nothing.
    Stay,
    /// They are killed and start again at once.
    Restart,
    /// They are upgraded.
    Upgrade,
}

/// What an ambush waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trigger {
    /// A write of the guest's is acknowledged.
    Acknowledged,
    /// A disk operation completes.
    Operation,
    /// A write to a mass device completes: of data going home, of metadata, of the journal.
    HomeWrite,
    /// A process wins the lease.
    Won,
    /// A head agrees to a change of members.
    Change,
    /// A replica begins to be filled.
    Fill,
    /// A head has opened.
    Opened,
    /// A flush is answered.
    Flushed,
}

/// What an ambush does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deed {
    /// `kill -9`.
    Kill,
    /// The power goes.
    PowerCut,
    /// The victim stands still, or is cut off, and another process takes over.
    TakeOver {
        /// It stands still.
        pause: bool,
        /// For how long.
        millis: u64,
    },
    /// The victim is cut off from all others.
    CutOff {
        /// For how long.
        millis: u64,
    },
    /// Every server loses power, the victim is away for longer, and another process takes over.
    Blackout {
        /// For how long the victim is away.
        millis: u64,
    },
    /// A device of the victim that data goes home to syncs nothing, and then its power goes.
    HangAndCut {
        /// For how long.
        millis: u64,
    },
    /// The second half of [`FaultKind::Duel`].
    Duel {
        /// Which process takes over.
        to: usize,
        /// How many writes.
        writes: u64,
        /// For how long the victim is cut off.
        millis: u64,
    },
    /// The second half of [`FaultKind::ThinStart`].
    ThinStart {
        /// For how long the victim stands still.
        millis: u64,
    },
    /// What follows of [`FaultKind::RotInMidst`].
    RotInMidst {
        /// Bursts of writes that are still to come.
        bursts: u64,
        /// For how long those who have the records are cut off.
        millis: u64,
    },
    /// The head, the replica that is filled last and its source are cut off from all others, one of
    /// which takes over after a while.
    CutFill {
        /// For how long.
        millis: u64,
    },
}

/// Whom an ambush strikes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Victim {
    /// The process where it happened.
    There,
    /// This server.
    Server(usize),
    /// All servers.
    All,
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
    /// What it is about.
    pub focus: Focus,
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
const KINDS: usize = 46;

/// The longest pause between two faults of a burst.
const BURST_NANOS: u64 = 40_000_000;

/// What a seed is about. Half of them are about everything at once; a run in which everything goes wrong
/// seldom gets far enough for the rare things.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Focus {
    /// Everything.
    Everything,
    /// Heads that do not know that they are deposed, and are read from.
    StaleReads,
    /// Openings that are broken off, one after the other.
    Openings,
    /// Changes of members.
    Members,
    /// The way home.
    Home,
    /// Damage on media.
    Media,
    /// Damage on the wire.
    Wire,
    /// Members that are filled.
    Fills,
    /// Power.
    Power,
}

impl Focus {
    /// All of them.
    pub const ALL: &[Self] = &[
        Self::Everything,
        Self::StaleReads,
        Self::Openings,
        Self::Members,
        Self::Home,
        Self::Media,
        Self::Wire,
        Self::Fills,
        Self::Power,
    ];

    /// Of a seed.
    pub fn of(seed: u64) -> Self {
        let mut random = Random::of(seed, "focus");
        if random.one_in(2) {
            return Self::Everything;
        }
        random.choose(&Self::ALL[1..])
    }

    /// The kinds of faults, see [`kind`]; none: any.
    const fn kinds(self) -> &'static [usize] {
        match self {
            Self::Everything => &[],
            Self::StaleReads => &[5, 22, 22, 22, 22, 29, 29, 29, 34, 34, 44],
            Self::Openings => &[0, 22, 22, 32, 32, 32, 24, 35, 35, 41, 41],
            Self::Members => &[30, 30, 30, 26, 19, 7, 3, 42, 44],
            Self::Home => &[31, 31, 31, 37, 2, 0, 42, 44],
            Self::Media => &[17, 17, 17, 17, 18, 0, 22, 45, 45],
            Self::Wire => &[11, 36, 36, 36, 36, 9, 10, 12, 22],
            Self::Fills => &[33, 38, 38, 39, 39, 26, 26, 3, 7, 7, 30, 42],
            Self::Power => &[2, 24, 24, 40, 40, 40, 43, 43, 43, 22, 22, 18, 42],
        }
    }
}

/// All faults of a run, in the order of their times.
pub fn schedule(profile: &Profile) -> Vec<Fault> {
    let mut random = Random::of(profile.seed, "faults");
    let focus = profile.focus;
    let mut weights = [0; KINDS];
    for weight in &mut weights {
        *weight = random.choose(&[0, 0, 1, 1, 2, 6]);
    }
    // Somebody always moves the volume.
    weights[20] += 1;
    let (mut per_second, mut bursts) = (random.choose(&[2, 5, 10, 20, 40]), random.one_in(2));
    if focus != Focus::Everything {
        weights = [0; KINDS];
        focus.kinds().iter().for_each(|kind| weights[*kind] += 1);
        (per_second, bursts) = (random.choose(&[1, 2, 4]), false);
    }
    let total: u64 = weights.iter().sum();
    let pause = 2_000_000_000 / per_second;
    // Faults that strike together are worse than those that strike alone.
    let mut burst = 0;
    let mut at = profile.from;
    let mut faults = Vec::new();
    loop {
        if burst == 0 && bursts && random.one_in(3) {
            burst = random.between(1, 4);
        }
        let most = if burst > 0 { pause.min(BURST_NANOS) } else { pause };
        burst = u64::saturating_sub(burst, 1);
        at = at + Duration::from_nanos(random.between(1_000, most));
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
        let millis = millis(focus, &mut random);
        faults.push(Fault { at, salt, kind: kind(number, profile, millis, &mut random) });
    }
}

/// How long something lasts: mostly short, now and then past every time-out.
fn millis(focus: Focus, random: &mut Random) -> u64 {
    match focus {
        // What follows finds things in order again.
        Focus::StaleReads
        | Focus::Openings
        | Focus::Home
        | Focus::Media
        | Focus::Wire
        | Focus::Power => return random.between(20, 600),
        Focus::Fills => {
            let most = random.choose(&[300, 300, 2500]);
            return random.between(20, most);
        }
        Focus::Everything | Focus::Members => {}
    }
    match random.below(8) {
        0..=3 => random.between(1, 100),
        4..=6 => random.between(100, 2000),
        _ => random.between(2000, 10_000),
    }
}

fn kind(number: usize, profile: &Profile, millis: u64, random: &mut Random) -> FaultKind {
    let who = random.index(profile.processes);
    let server = random.index(profile.servers);
    let device = random.index(3);
    let (from, to) = (random.index(profile.processes), random.index(profile.processes));
    match number {
        0 | 1 => FaultKind::Kill { who },
        2 => FaultKind::PowerCut { who: (!random.one_in(4)).then_some(server) },
        3 | 4 => FaultKind::Pause { who, millis },
        5 => {
            let millionths = i64::try_from(random.below(200_001)).expect("small") - 100_000;
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
        17 => damage(device, random),
        18 if random.one_in(2) => FaultKind::FailedSync { device },
        18 => FaultKind::LyingSync { millis, power: !random.one_in(3) },
        19 if random.one_in(2) => FaultKind::StoreAway { millis },
        19 => FaultKind::StoreMute { answers: random.between(1, 4) },
        20 => FaultKind::Attach { who },
        21 => FaultKind::HandOver { to: who },
        22 | 23 => take_over(who, millis, random),
        26 => FaultKind::Drain { who: server },
        27 => FaultKind::WallClock {
            who,
            seconds: i64::try_from(random.below(7201)).expect("small") - 3600,
        },
        28 => FaultKind::ClockJump { millis },
        29 => {
            let micros = random.choose(&[60_000, 150_000]);
            FaultKind::LateAnswers { micros, millis: millis + 1000 }
        }
        30 => FaultKind::SplitChange { who: server, millis },
        34 => FaultKind::Migrate { to: who, cut_millis: random.one_in(2).then_some(millis) },
        35 => FaultKind::SlowTakeOver { to: who, millis: random.between(300, 1000) },
        36 => FaultKind::HeadCorruption { times: random.choose(&[5, 20, 50]), millis },
        41 => duel(who, random),
        43 => FaultKind::ThinStart { millis: random.between(200, 800) },
        44 => upgrade(who, random),
        45 => FaultKind::RotInMidst { millis: random.between(300, 1200) },
        42 => FaultKind::Grow { blocks: random.choose(&[1, 16, 100]) },
        _ => ambush_of_kind(number, server, millis, random),
    }
}

fn damage(device: usize, random: &mut Random) -> FaultKind {
    match random.below(4) {
        0 => FaultKind::BadPage { device },
        1 => {
            let pages = random.choose(&[1, 2, 4]);
            FaultKind::Rot { device, pages, kill: random.one_in(2) }
        }
        2 => FaultKind::LostWrite,
        _ => FaultKind::MisdirectedWrite,
    }
}

fn take_over(to: usize, millis: u64, random: &mut Random) -> FaultKind {
    let pause = random.one_in(2);
    let others = [Others::Stay, Others::Stay, Others::Restart, Others::Upgrade];
    FaultKind::TakeOver { to, pause, others: random.choose(&others), millis }
}

fn duel(to: usize, random: &mut Random) -> FaultKind {
    let writes = random.choose(&[1, 1, 2, 4]);
    FaultKind::Duel { to, writes, millis: random.between(20, 300) }
}

/// One in three next processes dies, when it has just begun or later.
fn upgrade(who: usize, random: &mut Random) -> FaultKind {
    let most = random.choose(&[1_000_000, 20_000_000, 500_000_000]);
    let dies_after = random.one_in(3).then(|| Duration::from_nanos(random.between(0, most)));
    FaultKind::Upgrade { who, dies_after }
}

/// What is rare is waited for.
fn ambush_of_kind(number: usize, server: usize, millis: u64, random: &mut Random) -> FaultKind {
    match number {
        24 | 25 => ambush(server, millis, random),
        31 => home_ambush(random),
        32 => opening_ambush(millis, random),
        33 => fill_ambush(server, random),
        37 => hang_ambush(Trigger::HomeWrite, 60, random),
        38 => hang_ambush(Trigger::Fill, 1, random),
        39 => cut_ambush(random),
        40 => blackout_ambush(server, random),
        _ => unreachable!("there are {KINDS} kinds"),
    }
}

fn ambush(server: usize, millis: u64, random: &mut Random) -> FaultKind {
    let deed = match random.below(6) {
        0..=2 => Deed::PowerCut,
        3..=4 => Deed::Kill,
        _ => Deed::TakeOver { pause: random.one_in(2), millis },
    };
    FaultKind::Ambush {
        trigger: random.choose(&[Trigger::Acknowledged, Trigger::Operation]),
        count: random.between(1, 40),
        operations: 0,
        deed,
        victim: match random.below(3) {
            0 => Victim::All,
            1 => Victim::Server(server),
            _ => Victim::There,
        },
    }
}

/// The order in which data, metadata and the journal reach media matters only to whom the power goes
/// in between.
fn home_ambush(random: &mut Random) -> FaultKind {
    FaultKind::Ambush {
        trigger: Trigger::HomeWrite,
        count: random.between(1, 60),
        operations: random.below(8),
        deed: Deed::PowerCut,
        victim: Victim::There,
    }
}

/// An opening that is broken off leaves the beginnings of an epoch behind.
fn opening_ambush(millis: u64, random: &mut Random) -> FaultKind {
    let pause = random.one_in(2);
    FaultKind::Ambush {
        trigger: Trigger::Won,
        count: random.between(1, 2),
        operations: random.below(24),
        deed: random.choose(&[Deed::Kill, Deed::TakeOver { pause, millis }]),
        victim: Victim::There,
    }
}

fn fill_ambush(server: usize, random: &mut Random) -> FaultKind {
    FaultKind::Ambush {
        trigger: Trigger::Fill,
        count: 1,
        operations: random.below(200),
        deed: random.choose(&[Deed::Kill, Deed::PowerCut]),
        victim: random.choose(&[Victim::There, Victim::There, Victim::Server(server)]),
    }
}

/// What one device has, and another has not when the power goes.
fn hang_ambush(trigger: Trigger, most: u64, random: &mut Random) -> FaultKind {
    FaultKind::Ambush {
        trigger,
        count: random.between(1, most),
        operations: random.below(100),
        deed: Deed::HangAndCut { millis: random.between(2, 50) },
        victim: Victim::There,
    }
}

/// What a fill may be given that no quorum has.
fn cut_ambush(random: &mut Random) -> FaultKind {
    FaultKind::Ambush {
        trigger: Trigger::Fill,
        count: 1,
        operations: random.choose(&[0, 0, 10, 50]),
        deed: Deed::CutFill { millis: random.between(200, 1000) },
        victim: Victim::There,
    }
}

/// What was promised to be on media, and by whom, matters when power goes at once.
fn blackout_ambush(server: usize, random: &mut Random) -> FaultKind {
    FaultKind::Ambush {
        trigger: random.choose(&[Trigger::Opened, Trigger::Flushed, Trigger::Flushed]),
        count: random.between(1, 2),
        operations: random.choose(&[0, 0, 0, 10]),
        deed: Deed::Blackout { millis: random.between(500, 1500) },
        victim: random.choose(&[Victim::There, Victim::Server(server)]),
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
                focus: Focus::Everything,
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
        assert_eq!(seen.len(), 39, "{seen:?}");
    }
}
