//! Faults strike, within their budget: of every acknowledged block one good copy stays, on a
//! server that a head can reach once the faults have stopped.

use core::time::Duration;

use base::ShardRecord;
use base::limits::GRANT_MS;
use base::membership::write_quorum;

use super::{Event, World};
use crate::disk::{Disk, WriteFault};
use crate::faults::{Deed, FaultKind, Others, Trigger, Victim};
use crate::places::Place;
use crate::process::server_id;
use crate::random::Random;

/// The device that data goes home to.
const MASS: usize = 1;

/// Something that happens when something else has happened so often.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ambush {
    pub(super) trigger: Trigger,
    pub(super) left: u64,
    pub(super) operations: u64,
    pub(super) deed: Deed,
    pub(super) victim: Victim,
    /// Where it has happened, and whether operations of other processes count there.
    pub(super) sprung: Option<(usize, bool)>,
}

impl Ambush {
    /// Something has happened in `process`: is that the moment?
    fn is_met(&mut self, trigger: Trigger, process: usize, has_disks: bool) -> bool {
        match self.sprung {
            None if trigger == self.trigger => {
                self.left -= 1;
                if self.left == 0 {
                    self.sprung = Some((process, !has_disks));
                }
                self.left == 0 && self.operations == 0
            }
            Some((there, anywhere)) if trigger == Trigger::Operation => {
                self.operations -= u64::from(there == process || anywhere);
                self.operations == 0
            }
            None | Some(_) => false,
        }
    }
}

impl World {
    pub(super) fn strike(&mut self, number: usize) {
        if !self.faults_on {
            return;
        }
        let fault = self.config.faults[number];
        let mut random = Random::new(fault.salt);
        let struck = match fault.kind {
            FaultKind::Kill { .. }
            | FaultKind::PowerCut { .. }
            | FaultKind::Pause { .. }
            | FaultKind::Ambush { .. }
            | FaultKind::TakeOver { .. }
            | FaultKind::SlowTakeOver { .. }
            | FaultKind::Duel { .. }
            | FaultKind::ThinStart { .. }
            | FaultKind::Upgrade { .. }
            | FaultKind::WallClock { .. }
            | FaultKind::ClockJump { .. }
            | FaultKind::Drift { .. } => self.strike_process(fault.kind, &mut random),
            FaultKind::Partition { .. }
            | FaultKind::Silence { .. }
            | FaultKind::Reset { .. }
            | FaultKind::Loss { .. }
            | FaultKind::LateAnswers { .. }
            | FaultKind::HeadCorruption { .. }
            | FaultKind::Corruption { .. }
            | FaultKind::Delay { .. }
            | FaultKind::Bandwidth { .. } => self.strike_network(fault.kind, &mut random),
            FaultKind::SlowDisk { .. }
            | FaultKind::HangingDisk { .. }
            | FaultKind::ReadErrors { .. }
            | FaultKind::BadPage { .. }
            | FaultKind::Rot { .. }
            | FaultKind::LostWrite
            | FaultKind::LyingSync { .. }
            | FaultKind::MisdirectedWrite
            | FaultKind::RotInMidst { .. }
            | FaultKind::FailedSync { .. } => self.strike_disk(fault.kind, &mut random),
            FaultKind::StoreAway { .. }
            | FaultKind::StoreMute { .. }
            | FaultKind::Attach { .. }
            | FaultKind::Drain { .. }
            | FaultKind::SplitChange { .. }
            | FaultKind::Grow { .. }
            | FaultKind::Migrate { .. }
            | FaultKind::HandOver { .. } => self.strike_control(fault.kind),
        };
        let note = if struck { "" } else { " (nothing to strike)" };
        self.trace.say(self.now, || format!("fault: {:?}{note}", fault.kind));
        self.report.faults += u64::from(struck);
        for process in 0..self.processes.len() {
            self.check_invariants(process);
        }
    }

    fn strike_process(&mut self, kind: FaultKind, random: &mut Random) -> bool {
        match kind {
            FaultKind::Kill { who } => {
                let running = self.processes[who].node.is_some();
                self.stop(who, false);
                running
            }
            FaultKind::PowerCut { who } => {
                self.cut_power(who);
                true
            }
            FaultKind::Pause { who, millis } => self.pause(who, millis),
            FaultKind::Ambush { trigger, count, operations, deed, victim } => {
                let left = count.max(1);
                let ambush = Ambush { trigger, left, operations, deed, victim, sprung: None };
                self.ambushes.push(ambush);
                match trigger {
                    Trigger::Fill => self.bring_about_fill(random),
                    Trigger::Flushed => self.hold_up_syncs(victim),
                    Trigger::Acknowledged
                    | Trigger::Operation
                    | Trigger::HomeWrite
                    | Trigger::Won
                    | Trigger::Change
                    | Trigger::Opened => {}
                }
                true
            }
            FaultKind::TakeOver { to, pause, others, millis } => {
                let from = self.desired;
                let to = self.other_than(from, to);
                let struck = self.take_over(from, to, pause, millis);
                for other in (0..self.config.pools()).filter(|other| *other != from) {
                    self.strike_other(other, others);
                }
                struck
            }
            FaultKind::SlowTakeOver { to, millis } => self.slow_take_over(to, millis),
            FaultKind::Duel { to, writes, millis } => {
                self.challenge(Deed::Duel { to, writes, millis })
            }
            FaultKind::Upgrade { who, dies_after } => self.upgrade(who, dies_after),
            FaultKind::ThinStart { millis } => self.challenge(Deed::ThinStart { millis }),
            FaultKind::WallClock { who, seconds } => {
                self.wall_offset_ms[who] = seconds * 1000;
                self.report.places.reach(Place::WallClockWrong);
                true
            }
            FaultKind::ClockJump { millis } => {
                let who = self.config.pools();
                let Some(process) = self.processes.get_mut(who) else { return false };
                process.clock.jump(self.now, Duration::from_millis(millis));
                self.report.places.reach(Place::ClockJumped);
                self.schedule_tick_again(who);
                true
            }
            FaultKind::Drift { who, millionths } => {
                let now = self.now;
                self.processes[who].clock.set_drift(now, millionths);
                // The tick that is due by the old rate may come late: never by more than drift.
                self.schedule_tick_again(who);
                true
            }
            _ => unreachable!("the caller sorts kinds"),
        }
    }

    fn strike_other(&mut self, other: usize, what: Others) {
        match what {
            Others::Stay => {}
            Others::Restart => {
                let nanos = self.random.between(100_000, 10_000_000);
                self.stop_for(other, false, nanos);
            }
            Others::Upgrade => {
                self.upgrade(other, None);
            }
        }
    }

    fn pause(&mut self, who: usize, millis: u64) -> bool {
        if self.processes[who].node.is_none() {
            return false;
        }
        let until = self.now + Duration::from_millis(millis);
        if self.processes[who].head.is_some_and(|head| head.opened) {
            self.report.places.reach(Place::PausedHead);
        }
        if millis > GRANT_MS {
            self.report.places.reach(Place::PausedPastGrant);
        }
        let paused = &mut self.processes[who].paused_until;
        *paused = (*paused).max(until);
        self.queue.push(until, Event::Resume { process: who });
        true
    }

    /// `to`, or the next process if that is `from`.
    pub(super) fn other_than(&self, from: usize, to: usize) -> usize {
        if from == to { (to + 1) % self.processes.len() } else { to }
    }

    /// A process is cut off, or stands still, while another one takes over.
    pub(super) fn take_over(&mut self, from: usize, to: usize, pause: bool, millis: u64) -> bool {
        let struck = if pause {
            self.pause(from, millis)
        } else {
            self.partition(1 << from, self.now + Duration::from_millis(millis))
        };
        self.attach(to);
        struck && from != to
    }

    /// Something has happened in a process: was that what somebody waited for?
    pub(super) fn spring(&mut self, trigger: Trigger, process: usize) {
        let has_disks = self.processes[process].is_server();
        let mut number = 0;
        while number < self.ambushes.len() {
            if self.ambushes[number].is_met(trigger, process, has_disks) {
                let Ambush { deed, victim, sprung, .. } = self.ambushes.remove(number);
                let there = sprung.map_or(process, |(there, _)| there);
                // Not from within what a node is doing.
                self.after(0, Event::Sprung { deed, victim, there });
            } else {
                number += 1;
            }
        }
    }

    pub(super) fn sprung(&mut self, deed: Deed, victim: Victim, there: usize) {
        if !self.faults_on {
            return;
        }
        self.trace.say(self.now, || format!("ambush: {deed:?} {victim:?} {there}"));
        let victims = match victim {
            Victim::There => there..there + 1,
            Victim::Server(who) => who..who + 1,
            Victim::All => 0..self.config.pools(),
        };
        match deed {
            Deed::PowerCut => {
                self.cut_power((victim != Victim::All).then_some(victims.start));
            }
            Deed::Kill => victims.for_each(|victim| self.stop(victim, false)),
            Deed::TakeOver { pause, millis } => {
                let from = victims.start;
                self.take_over(from, (from + 1) % self.processes.len(), pause, millis);
            }
            Deed::CutOff { millis } => {
                self.partition(1 << victims.start, self.now + Duration::from_millis(millis));
            }
            Deed::Blackout { millis } => self.black_out(victims.start, millis),
            Deed::HangAndCut { millis } => self.hang_and_cut(victims.start, millis),
            Deed::ThinStart { millis } => self.start_thinly(victims.start, millis),
            Deed::Duel { to, writes, millis } => self.duel(victims.start, to, writes, millis),
            Deed::RotInMidst { bursts: 0, millis } => self.rot_in_midst(millis),
            Deed::RotInMidst { bursts, millis } => self.write_burst(bursts, millis),
            Deed::CutFill { millis } => self.cut_fill(victims.start, millis),
        }
    }

    /// A head has agreed to a change of members, and the cluster store is about to be asked.
    pub(super) fn change_agreed(&mut self, process: usize, old: &ShardRecord, new: &ShardRecord) {
        self.spring(Trigger::Change, process);
        if !self.faults_on {
            return;
        }
        let Some(millis) = self.split.take() else { return };
        let pools = self.config.pools();
        let is_in = |shard: &ShardRecord, index: usize| {
            shard.in_sync().any(|server| server == server_id(index))
        };
        // On the head's side those that leave, and as many others as were a quorum.
        let quorum = write_quorum(old.in_sync().count());
        let mut side = 1_u64 << process;
        let mut have = usize::from(is_in(old, process));
        for leaves in [true, false] {
            for index in (0..pools).filter(|index| is_in(old, *index)) {
                if have < quorum && side >> index & 1 == 0 && leaves != is_in(new, index) {
                    side |= 1 << index;
                    have += 1;
                }
            }
        }
        let other = (0..pools).find(|index| is_in(new, *index) && side >> index & 1 == 0);
        let Some(other) = other else { return };
        self.report.places.reach(Place::ChangeSplit);
        self.store.mute = self.store.mute.max(1);
        self.partition(side, self.now + Duration::from_millis(millis));
        let nanos = self.random.between(5_000_000, 400_000_000);
        self.after(nanos, Event::Attach { process: other });
    }

    fn schedule_tick_again(&mut self, process: usize) {
        self.processes[process].tick_at = None;
        if self.processes[process].node.is_some() {
            self.schedule_tick(process);
        }
    }

    fn cut_power(&mut self, who: Option<usize>) {
        if let Some(server) = who {
            self.report.places.reach(Place::PowerLost);
            self.stop(server, true);
            return;
        }
        self.report.places.reach(Place::AllPowerLost);
        for process in 0..self.processes.len() {
            self.stop(process, true);
        }
    }

    fn strike_network(&mut self, kind: FaultKind, random: &mut Random) -> bool {
        let now = self.now;
        let until = |millis: u64| now + Duration::from_millis(millis);
        match kind {
            FaultKind::Partition { set, millis } => self.partition(set, until(millis)),
            FaultKind::Silence { from, to, millis } => {
                self.network.block(now, from, to, until(millis));
                from != to
            }
            FaultKind::Reset { who } => {
                let end = self.network.any_of(who, random);
                if let Some(end) = end {
                    self.network.reset(now, end);
                }
                end.is_some()
            }
            FaultKind::Loss { from, to, times, millis } => {
                self.network.link(from, to).loss = Some((times, until(millis)));
                from != to
            }
            FaultKind::Corruption { from, to, times, millis } => {
                self.network.link(from, to).corruption = Some((times, until(millis)));
                from != to
            }
            FaultKind::Delay { from, to, micros, millis } => {
                self.network.link(from, to).extra = Some((micros * 1000, until(millis)));
                from != to
            }
            FaultKind::Bandwidth { from, to, byte_nanos, millis } => {
                self.network.link(from, to).byte_nanos = Some((byte_nanos, until(millis)));
                from != to
            }
            FaultKind::HeadCorruption { times, millis } => {
                let head = self.desired;
                for other in (0..self.processes.len()).filter(|other| *other != head) {
                    for (from, to) in [(other, head), (head, other)] {
                        let link = self.network.link(from, to);
                        link.corruption = Some((times, until(millis)));
                        link.corrupts_headers = true;
                    }
                }
                self.processes.len() > 1
            }
            FaultKind::LateAnswers { micros, millis } => {
                let head = self.desired;
                for from in (0..self.processes.len()).filter(|from| *from != head) {
                    self.network.link(from, head).extra = Some((micros * 1000, until(millis)));
                }
                self.processes.len() > 1
            }
            _ => unreachable!("the caller sorts kinds"),
        }
    }

    pub(super) fn partition(&mut self, set: u64, until: base::Instant) -> bool {
        let count = self.processes.len();
        let inside = |process: usize| set >> process & 1 == 1;
        let cut = (0..count).filter(|process| inside(*process)).count();
        for from in 0..count {
            for to in 0..count {
                if inside(from) != inside(to) {
                    self.network.block(self.now, from, to, until);
                }
            }
        }
        let head = self.processes[self.desired].head.is_some_and(|head| head.opened);
        if cut == 1 && inside(self.desired) && head {
            self.report.places.reach(Place::PartitionedHead);
        }
        cut > 0 && cut < count
    }

    pub(super) fn disk(&mut self, who: usize, device: usize) -> &mut Disk {
        let disks = &mut self.processes[who].disks;
        let count = disks.len();
        &mut disks[device % count]
    }

    fn strike_disk(&mut self, kind: FaultKind, random: &mut Random) -> bool {
        self.damaged_disks |= matches!(
            kind,
            FaultKind::ReadErrors { .. }
                | FaultKind::LyingSync { .. }
                | FaultKind::FailedSync { .. }
        );
        match kind {
            FaultKind::SlowDisk { who, device, times, millis } => {
                let slow_until = self.now + Duration::from_millis(millis);
                let disk = self.disk(who, device);
                disk.slowness = times;
                disk.slow_until = slow_until;
                true
            }
            FaultKind::HangingDisk { who, device, millis } => {
                self.disk(who, device).hangs_until = self.now + Duration::from_millis(millis);
                true
            }
            FaultKind::ReadErrors { who, device, count } => {
                let allowed = self.faulty == Some(who);
                if allowed {
                    self.disk(who, device).read_errors = count;
                }
                allowed
            }
            FaultKind::BadPage { device } => {
                self.damage(device, random, |world, who, device, page, _| {
                    world.disk(who, device).make_bad(page);
                    Place::ReadErrorHit
                })
            }
            FaultKind::Rot { device, pages, kill } => {
                let mut struck = false;
                self.rotted = true;
                for _ in 0..pages {
                    struck |= self.damage(device, random, Self::rot);
                }
                if let Some(who) = self.faulty.filter(|_| random.one_in(24)) {
                    self.spoil_labels(who, device);
                }
                if let Some(who) = self.faulty.filter(|_| kill) {
                    self.stop(who, false);
                }
                // What it has not read yet of its log counts as well.
                if let Some(who) = self.faulty.filter(|who| !self.processes[*who].open) {
                    self.note_rot(who);
                }
                struck
            }
            FaultKind::LostWrite => self.misdo(WriteFault::Lost, Place::WriteLost),
            FaultKind::MisdirectedWrite => {
                let fault = WriteFault::Misdirected(random.between(1, 64));
                self.misdo(fault, Place::WriteMisdirected)
            }
            FaultKind::FailedSync { device } => {
                let Some(who) = self.faulty else { return false };
                self.disk(who, device).sync_fails = true;
                true
            }
            FaultKind::LyingSync { millis, power } => self.lie(millis, power),
            FaultKind::RotInMidst { millis } => self.write_thinly(millis),
            _ => unreachable!("the caller sorts kinds"),
        }
    }

    /// The faulty server's log device lies about what is on media.
    fn lie(&mut self, millis: u64, power: bool) -> bool {
        // Always the log's device: the journal has another copy elsewhere.
        let Some(who) = self.faulty.filter(|who| self.may_strike_copy(*who, 0)) else {
            return false;
        };
        self.spare_other_copy(who, 0);
        let until = self.now + Duration::from_millis(millis);
        self.disk(who, 0).lies_until = until;
        self.oracle.lied();
        self.disks_lied = true;
        self.report.places.reach(Place::SyncLied);
        if power {
            let deed = Deed::PowerCut;
            let (victim, there) = (Victim::Server(who), who);
            self.queue.push(until, Event::Sprung { deed, victim, there });
        }
        true
    }

    /// Does something to a page in use of the faulty server.
    fn damage(
        &mut self,
        device: usize,
        random: &mut Random,
        what: impl FnOnce(&mut Self, usize, usize, u64, &mut Random) -> Place,
    ) -> bool {
        let Some(who) = self.faulty else { return false };
        let number = random.bits();
        let Some(page) = self.disk(who, device).some_page(number) else { return false };
        let device = device % self.processes[who].disks.len();
        if self.processes[who].is_metadata(device, page) && !self.may_strike_copy(who, device) {
            return false;
        }
        let place = what(self, who, device, page, random);
        self.damaged_disks = true;
        if place != Place::ReadErrorHit {
            self.report.places.reach(place);
        }
        true
    }

    /// Flips a bit of a page; but nobody can tell rot at a log's end from a write that was cut off.
    fn rot(&mut self, who: usize, device: usize, page: u64, random: &mut Random) -> Place {
        let bit = random.index(8 * base::limits::PAGE_BYTES);
        let noted = self.noted(who);
        let disk = self.disk(who, device);
        if !disk.is_unvouched(page, noted) {
            disk.rot(page, bit);
        }
        Place::PageRotted
    }

    /// Through which seq the metadata of a server that runs says that its log is on media.
    fn noted(&self, who: usize) -> base::Seq {
        let process = &self.processes[who];
        let store = process.node.as_ref().filter(|_| process.open).and_then(node::Node::store);
        store
            .and_then(|store| store.replicas().next())
            .map_or(base::Seq::ZERO, |(_, info)| info.noted)
    }

    /// Metadata has two copies on two devices, and only one of them is struck in a run: a server whose newest
    /// page is gone from both forgets a seal without a word, and no quorum survives that. (Older
    /// pages are missed: what follows them tells.) True if the copy on `device` may be, which
    /// counts as done; also if there is none.
    fn may_strike_copy(&mut self, who: usize, device: usize) -> bool {
        if !self.processes[who].has_metadata(device) {
            return true;
        }
        *self.struck_copy.get_or_insert(device) == device
    }

    /// The metadata on `device` may lack a write from now on, and no checksum tells. If the other copy could
    /// not be read either, a page less would look like the journal's end; so that one can be read.
    fn spare_other_copy(&mut self, who: usize, device: usize) {
        let process = &mut self.processes[who];
        if !process.has_metadata(device) {
            return;
        }
        for other in (0..process.disks.len()).filter(|other| *other != device) {
            if let Some(bytes) = process.metadata(other) {
                process.disks[other].spared = bytes;
            }
        }
    }

    /// Nothing tells any more that a device is one of the pool's.
    fn spoil_labels(&mut self, who: usize, device: usize) {
        for offset in [0, store::LABEL_COPY_OFFSET] {
            let page = (offset / base::limits::PAGE_BYTES) as u64;
            self.disk(who, device).rot(page, 0);
        }
        self.damaged_disks = true;
    }

    fn misdo(&mut self, fault: WriteFault, place: Place) -> bool {
        let Some(who) = self.faulty.filter(|who| self.may_strike_copy(*who, MASS)) else {
            return false;
        };
        self.spare_other_copy(who, MASS);
        self.processes[who].disks[MASS].write_fault = Some(fault);
        self.damaged_disks = true;
        self.report.places.reach(place);
        true
    }

    fn strike_control(&mut self, kind: FaultKind) -> bool {
        match kind {
            FaultKind::StoreAway { millis } => {
                self.store.away_until = self.now + Duration::from_millis(millis);
                if self.serving() {
                    self.report.places.reach(Place::StoreAwayWhileServing);
                }
                true
            }
            FaultKind::StoreMute { answers } => {
                self.store.mute = answers;
                true
            }
            FaultKind::Attach { who } => {
                self.attach(who);
                true
            }
            FaultKind::Drain { who } => {
                self.draining[who] ^= true;
                true
            }
            FaultKind::Grow { blocks } => {
                self.store.grow(blocks);
                true
            }
            FaultKind::SplitChange { who, millis } => {
                self.draining.fill(false);
                self.draining[who] = true;
                self.split = Some(millis);
                true
            }
            FaultKind::Migrate { to, cut_millis } => {
                let from = self.desired;
                let to = self.other_than(from, to);
                self.stop_guest(Duration::from_millis(20));
                self.after(10_000_000, Event::Rest { process: from });
                if let Some(millis) = cut_millis {
                    let (deed, victim) = (Deed::CutOff { millis }, Victim::Server(from));
                    self.after(12_000_000, Event::Sprung { deed, victim, there: from });
                }
                self.after(12_000_000, Event::Attach { process: to });
                true
            }
            FaultKind::HandOver { to } => {
                let from = self.desired;
                let to = self.other_than(from, to);
                let head = self.processes[from].head;
                let running = self.processes[from].paused_until <= self.now;
                if let Some(head) = head.filter(|_| running && from != to) {
                    self.desired = to;
                    let life = self.processes[from].life;
                    self.input(from, life, node::Input::ReleaseHead(head.handle));
                }
                self.attach(to);
                head.is_some()
            }
            _ => unreachable!("the caller sorts kinds"),
        }
    }

    // What a pool may say only of the faulty server.

    pub(super) fn pool_lost(&mut self, process: usize, error: &store::OpenError) {
        self.trace.say(self.now, || format!("process {process}: pool does not open: {error}"));
        match error {
            // Whoever runs the daemon starts it again; the read may be good then.
            store::OpenError::Read { .. } | store::OpenError::MetadataUnread { .. } => {
                let life = self.processes[process].life;
                self.after(1, Event::Exit { process, life });
            }
            store::OpenError::Label { .. }
            | store::OpenError::Failed(_)
            | store::OpenError::Metadata { .. } => {
                if self.faulty != Some(process) {
                    self.fail(&format!("a pool does not open: {error}"));
                }
                self.report.places.reach(Place::PoolLost);
            }
        }
    }

    pub(super) fn device_failed(&mut self, process: usize, failure: store::DeviceFailure) {
        if self.faulty != Some(process) {
            self.fail(&format!("no device failed: {failure}"));
        }
        self.trace.say(self.now, || format!("process {process}: {failure}"));
        self.report.places.reach(Place::DeviceFailed);
        self.processes[process].device_failed = true;
    }

    pub(super) fn damage_noticed(&mut self, process: usize) {
        if self.faulty != Some(process) {
            self.fail("nothing was damaged");
        }
        self.trace.say(self.now, || format!("process {process}: damage noticed"));
        self.report.places.reach(Place::DamageNoticed);
    }
}
