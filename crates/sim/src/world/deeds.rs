//! What takes several things at once to do harm: each of these brings them together.

use core::time::Duration;

use base::limits::GRANT_MS;
use base::membership::write_quorum;

use super::strike::Ambush;
use super::{Event, World};
use crate::faults::{Deed, Trigger, Victim};
use crate::guest::Kind;
use crate::places::Place;
use crate::process::server_id;
use crate::random::Random;

/// The device of the log.
const LOG: usize = 0;

/// Bytes at the beginning of a batch in a log that all mean something.
const BATCH_BYTES: usize = 112;
/// Between the bursts of writes of [`crate::faults::FaultKind::RotInMidst`], and how many there are.
const BURST_NANOS: u64 = 4_000_000;
const BURSTS: u64 = 3;

/// Who has what, while [`crate::faults::FaultKind::RotInMidst`] is under way.
#[derive(Clone, Debug)]
pub(super) struct Midst {
    /// The process with the head.
    head: usize,
    /// A bit for each process of those who have the records, but the faulty server.
    with: u64,
    /// The members in sync that do not.
    without: Vec<usize>,
}

impl World {
    /// Every server loses power; one is away for so long, and another one takes over. What only the one has
    /// on media is missed.
    pub(super) fn black_out(&mut self, away: usize, millis: u64) {
        self.report.places.reach(Place::AllPowerLost);
        for process in 0..self.config.pools() {
            let nanos = if process == away {
                millis * 1_000_000
            } else {
                self.random.between(1, 30_000_000)
            };
            self.stop_for(process, true, nanos);
        }
        let pools = self.config.pools();
        let to = self.random.index(pools);
        // Without a second server it is the same one.
        self.attach(if to == away { (to + 1) % pools } else { to });
    }

    /// Only the victim puts its log on media for a while: a flush takes that long.
    pub(super) fn hold_up_syncs(&mut self, victim: Victim) {
        let own = match victim {
            Victim::There => self.desired,
            Victim::Server(who) => who,
            Victim::All => return,
        };
        let until = self.now + Duration::from_millis(100);
        for who in (0..self.config.pools()).filter(|who| *who != own) {
            self.disk(who, LOG).syncs_hang_until = until;
        }
        self.begin_burst();
    }

    /// A device that data goes home to is slow to put it on media, and meanwhile everything else goes on;
    /// then the power goes. The journal has no copy on it if it is not the last one.
    pub(super) fn hang_and_cut(&mut self, who: usize, millis: u64) {
        if self.processes[who].is_server() {
            let until = self.now + Duration::from_millis(millis);
            self.disk(who, LOG + 1).syncs_hang_until = until;
            let deed = Deed::PowerCut;
            self.queue.push(until, Event::Sprung { deed, victim: Victim::Server(who), there: who });
        }
    }

    /// The head, a replica that is being filled and the source that it is filled from are cut off: what
    /// the head writes meanwhile reaches the source and no quorum.
    pub(super) fn cut_fill(&mut self, filled: usize, millis: u64) {
        let Some(source) = self.fill_source else { return };
        let head = self.desired;
        let set = [filled, source, head].iter().fold(0, |set, who| set | 1_u64 << who);
        let members = self.store.records.shard.in_sync();
        let pools = 0..self.config.pools();
        let outside = |index: &usize| set >> index & 1 == 0;
        let members: Vec<_> = members.collect();
        let mut others = pools.filter(outside).filter(|index| members.contains(&server_id(*index)));
        let Some(other) = others.next() else { return };
        if self.partition(set, self.now + Duration::from_millis(millis)) {
            self.report.places.reach(Place::FillCutOff);
            self.begin_burst();
            let nanos = self.random.between(5, 100) * 1_000_000;
            self.after(nanos, Event::Attach { process: other });
        }
    }

    /// Some member is to leave, so that another one is filled.
    pub(super) fn bring_about_fill(&mut self, random: &mut Random) {
        let shard = &self.store.records.shard;
        let counts = |index: &usize| shard.in_sync().any(|server| server == server_id(*index));
        let members: Vec<usize> = (0..self.config.pools()).filter(counts).collect();
        self.draining.fill(false);
        self.draining[random.choose(&members)] = true;
    }

    /// The guest pauses, until nothing is under way.
    pub(super) fn challenge(&mut self, deed: Deed) -> bool {
        self.stop_guest(Duration::from_millis(5));
        let there = self.desired;
        self.after(3_000_000, Event::Sprung { deed, victim: Victim::There, there });
        true
    }

    /// The head is cut off, and what the guest writes there now is in one log only. Another process takes
    /// over and writes as little, so that two logs are as long as each other, and differ.
    pub(super) fn duel(&mut self, from: usize, to: usize, writes: u64, millis: u64) {
        let to = self.other_than(from, to);
        if !self.partition(1 << from, self.now + Duration::from_millis(millis)) {
            return;
        }
        for lba in 0..writes.min(self.config.blocks) {
            self.submit_request(from, Kind::Write, lba, 1);
        }
        self.read_for(Duration::from_millis(millis + 500));
        self.after(1_000_000, Event::Attach { process: to });
    }

    /// What is acknowledged now is on two servers, and the one that takes over brings it to the others
    /// before it opens. When it has, it must be on media there.
    pub(super) fn start_thinly(&mut self, from: usize, millis: u64) {
        let count = self.processes.len();
        let until = self.now + Duration::from_millis(millis);
        for other in (0..count).filter(|other| *other != from && *other != (from + 1) % count) {
            self.network.block(self.now, from, other, until);
        }
        for lba in 0..4.min(self.config.blocks) {
            self.submit_request(from, Kind::Write, lba, 1);
        }
        self.ambushes.push(Ambush {
            trigger: Trigger::Opened,
            left: 1,
            operations: 0,
            deed: Deed::Blackout { millis: 2000 },
            victim: Victim::There,
            sprung: None,
        });
        let deed = Deed::TakeOver { pause: true, millis };
        self.after(1_000_000, Event::Sprung { deed, victim: Victim::Server(from), there: from });
    }

    /// Another process takes over while the head goes on, knowing nothing. Logs are so slow that what the
    /// head has sent is being written while the others seal; its own server cannot seal at all.
    pub(super) fn slow_take_over(&mut self, to: usize, millis: u64) -> bool {
        let from = self.desired;
        let own = if self.processes[from].is_server() { from } else { 0 };
        let until = self.now + Duration::from_millis(millis);
        for who in 0..self.config.pools() {
            if who == own {
                let last = self.processes[who].disks.len() - 1;
                self.disk(who, last).hangs_until = until;
            } else {
                let disk = self.disk(who, LOG);
                disk.slowness = 1000;
                disk.slow_until = until;
            }
        }
        self.begin_burst();
        let to = self.other_than(from, to);
        let nanos = self.random.between(1, GRANT_MS) * 1_000_000;
        self.after(nanos, Event::Attach { process: to });
        from != to
    }

    /// Members are cut off such that a write quorum is left, the faulty server in it, and the guest writes.
    pub(super) fn write_thinly(&mut self, millis: u64) -> bool {
        let Some(faulty) = self.faulty.filter(|_| self.serving()) else { return false };
        let head = self.desired;
        let shard = &self.store.records.shard;
        let counts = |index: &usize| shard.in_sync().any(|server| server == server_id(*index));
        let members: Vec<usize> = (0..self.config.pools()).filter(counts).collect();
        if members.len() < 3 || !members.contains(&faulty) {
            return false;
        }
        let mut others: Vec<usize> = members.iter().copied().filter(|who| *who != faulty).collect();
        // The head's own server cannot be without.
        others.sort_by_key(|who| *who != head);
        let without = others.split_off(write_quorum(members.len()) - 1);
        let bits = |of: &[usize]| of.iter().fold(0, |set, who| set | 1_u64 << who);
        let with = (bits(&others) | 1 << head) & !(1 << faulty);
        self.partition(bits(&without), self.now + Duration::from_nanos(BURSTS * BURST_NANOS));
        self.disk(faulty, LOG).watch();
        self.midst = Some(Midst { head, with, without });
        self.write_burst(BURSTS, millis);
        true
    }

    /// One write after the other, on media: each batch says of those before it that they are.
    pub(super) fn write_burst(&mut self, bursts: u64, millis: u64) {
        let Some(Midst { head, .. }) = self.midst else { return };
        for lba in 0..4.min(self.config.blocks) {
            self.submit_request(head, Kind::Write, lba, 1);
        }
        self.submit_request(head, Kind::Flush, 0, 1);
        let deed = Deed::RotInMidst { bursts: bursts - 1, millis };
        self.after(BURST_NANOS, Event::Sprung { deed, victim: Victim::There, there: head });
    }

    /// What only a write quorum has rots at one server of it, in a place that its log vouches for: that one
    /// must know that it has lost something, when the others that are left ask it.
    pub(super) fn rot_in_midst(&mut self, millis: u64) {
        let Some(Midst { head, with, without }) = self.midst.take() else { return };
        let Some(faulty) = self.faulty.filter(|_| self.desired == head) else { return };
        let theirs: Option<Vec<_>> = without.iter().map(|who| self.log_of(*who)).collect();
        let (Some(own), Some(theirs)) = (self.log_of(faulty), theirs) else { return };
        let missed = theirs.iter().map(|state| state.last.seq).max().unwrap_or(own.last.seq);
        let disk = self.disk(faulty, LOG);
        let batches = disk.watched();
        // What vouches for it is there after a start, even if a sync fails meanwhile.
        let synced: Vec<bool> = batches.iter().map(|(page, _)| disk.is_synced(*page)).collect();
        let vouched = |number: usize, last: base::Seq| {
            let mut later = batches.iter().zip(&synced).skip(number + 1);
            later.any(|((_, later), synced)| *synced && later.first > last && later.durable >= last)
        };
        let found = batches.iter().enumerate().find(|(number, (_, batch))| {
            batch.first > missed && batch.last <= own.commit && vouched(*number, batch.last)
        });
        let Some((_, (page, batch))) = found else { return };
        let (page, batch) = (*page, *batch);
        self.trace.say(self.now, || format!("rot at server {faulty}, page {page}: {batch:?}"));
        let bit = self.random.index(8 * BATCH_BYTES);
        self.disk(faulty, LOG).rot(page, bit);
        self.damaged_disks = true;
        self.report.places.reach(Place::RottedInMidst);
        let nanos = self.random.between(100_000, 10_000_000);
        self.stop_for(faulty, false, nanos);
        self.partition(with, self.now + Duration::from_millis(millis));
        self.after(1_000_000, Event::Attach { process: without[0] });
    }

    /// What the log of a server that runs and has lost nothing says of itself.
    fn log_of(&self, who: usize) -> Option<base::ReplicaState> {
        let process = &self.processes[who];
        let store = process.node.as_ref().filter(|_| process.open)?.store()?;
        let (_, info) = store.replicas().next()?;
        let whole = !info.damaged && !info.state.damaged && !info.state.filling;
        whole.then_some(info.state)
    }
}
