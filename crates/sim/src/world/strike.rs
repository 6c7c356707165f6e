//! Faults strike, within their budget: of every acknowledged block one good copy stays, on a
//! server that a head can reach once the faults have stopped.

use core::time::Duration;

use base::Durability;
use base::limits::GRANT_MS;

use super::{Event, World};
use crate::disk::WriteFault;
use crate::faults::FaultKind;
use crate::places::Place;
use crate::random::Random;

/// The device that data goes home to.
const MASS: usize = 1;

/// Something that happens when something else has happened so often.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ambush {
    left: u64,
    writes: bool,
    power: bool,
    who: Option<usize>,
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
            | FaultKind::Drift { .. } => self.strike_process(fault.kind),
            FaultKind::Partition { .. }
            | FaultKind::Silence { .. }
            | FaultKind::Reset { .. }
            | FaultKind::Loss { .. }
            | FaultKind::Corruption { .. }
            | FaultKind::Delay { .. }
            | FaultKind::Bandwidth { .. } => self.strike_network(fault.kind, &mut random),
            FaultKind::SlowDisk { .. }
            | FaultKind::HangingDisk { .. }
            | FaultKind::ReadErrors { .. }
            | FaultKind::BadPage { .. }
            | FaultKind::Rot { .. }
            | FaultKind::LostWrite
            | FaultKind::MisdirectedWrite
            | FaultKind::FailedSync { .. } => self.strike_disk(fault.kind, &mut random),
            FaultKind::StoreAway { .. }
            | FaultKind::StoreMute { .. }
            | FaultKind::Attach { .. }
            | FaultKind::Drain { .. }
            | FaultKind::HandOver { .. } => self.strike_control(fault.kind),
        };
        let note = if struck { "" } else { " (nothing to strike)" };
        self.trace.say(self.now, || format!("fault: {:?}{note}", fault.kind));
        self.report.faults += u64::from(struck);
        for process in 0..self.processes.len() {
            self.check_invariants(process);
        }
    }

    fn strike_process(&mut self, kind: FaultKind) -> bool {
        match kind {
            FaultKind::Kill { who } => {
                let running = self.processes[who].node.is_some();
                self.stop(who, false);
                running
            }
            FaultKind::PowerCut { who } => self.cut_power(who),
            FaultKind::Pause { who, millis } => self.pause(who, millis),
            FaultKind::Ambush { after, writes, power, who } => {
                self.ambush = Some(Ambush { left: after, writes, power, who });
                true
            }
            FaultKind::TakeOver { to, pause, millis } => {
                let from = self.desired;
                let struck = if pause {
                    self.pause(from, millis)
                } else {
                    self.partition(1 << from, self.now + Duration::from_millis(millis))
                };
                self.attach(to);
                struck && from != to
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

    /// A write was acknowledged, or a disk operation completed: was that what somebody waited for?
    pub(super) fn spring(&mut self, write: bool) {
        let Some(ambush) = self.ambush.as_mut().filter(|ambush| ambush.writes == write) else {
            return;
        };
        ambush.left -= 1;
        if ambush.left > 0 {
            return;
        }
        let Ambush { power, who, .. } = *ambush;
        self.ambush = None;
        // Not from within what a node is doing.
        self.after(0, Event::Sprung { power, who });
    }

    pub(super) fn sprung(&mut self, power: bool, who: Option<usize>) {
        if !self.faults_on {
            return;
        }
        self.trace.say(self.now, || format!("ambush: power {power}, server {who:?}"));
        if power && self.cut_power(who) {
            return;
        }
        let victims = who.map_or(0..self.config.pools(), |who| who..who + 1);
        victims.for_each(|victim| self.stop(victim, false));
    }

    fn schedule_tick_again(&mut self, process: usize) {
        self.processes[process].tick_at = None;
        if self.processes[process].node.is_some() {
            self.schedule_tick(process);
        }
    }

    /// With [`Durability::Flush`] a power cut may cost what was acknowledged and not flushed, which
    /// the oracle does not model yet.
    fn cut_power(&mut self, who: Option<usize>) -> bool {
        if self.config.durability != Durability::Durable {
            return false;
        }
        if let Some(server) = who {
            self.report.places.reach(Place::PowerLost);
            self.stop(server, true);
            return true;
        }
        self.report.places.reach(Place::AllPowerLost);
        for process in 0..self.processes.len() {
            self.stop(process, true);
        }
        true
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
            _ => unreachable!("the caller sorts kinds"),
        }
    }

    fn partition(&mut self, set: u64, until: base::Instant) -> bool {
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

    fn strike_disk(&mut self, kind: FaultKind, random: &mut Random) -> bool {
        match kind {
            FaultKind::SlowDisk { who, device, times, millis } => {
                let disk = &mut self.processes[who].disks[device];
                disk.slowness = times;
                disk.slow_until = self.now + Duration::from_millis(millis);
                true
            }
            FaultKind::HangingDisk { who, device, millis } => {
                let disk = &mut self.processes[who].disks[device];
                disk.hangs_until = self.now + Duration::from_millis(millis);
                true
            }
            FaultKind::ReadErrors { who, device, count } => {
                let allowed = self.faulty == Some(who);
                if allowed {
                    self.processes[who].disks[device].read_errors = count;
                }
                allowed
            }
            FaultKind::BadPage { device } => self.damage(device, random, |world, who, page, _| {
                world.processes[who].disks[device].make_bad(page);
                Place::ReadErrorHit
            }),
            FaultKind::Rot { device, pages, kill } => {
                let mut struck = false;
                for _ in 0..pages {
                    struck |= self.damage(device, random, |world, who, page, random| {
                        let bit = random.index(8 * base::limits::PAGE_BYTES);
                        world.processes[who].disks[device].rot(page, bit);
                        Place::PageRotted
                    });
                }
                if let Some(who) = self.faulty.filter(|_| kill) {
                    self.stop(who, false);
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
                // What the sync should have kept may be gone, as after a power cut.
                if self.config.durability != Durability::Durable {
                    return false;
                }
                self.processes[who].disks[device].sync_fails = true;
                true
            }
            _ => unreachable!("the caller sorts kinds"),
        }
    }

    /// Does something to a page in use of the faulty server.
    fn damage(
        &mut self,
        device: usize,
        random: &mut Random,
        what: impl FnOnce(&mut Self, usize, u64, &mut Random) -> Place,
    ) -> bool {
        let Some(who) = self.faulty else { return false };
        let Some(page) = self.processes[who].disks[device].some_page(random.below(1 << 14)) else {
            return false;
        };
        let place = what(self, who, page, random);
        if place != Place::ReadErrorHit {
            self.report.places.reach(place);
        }
        true
    }

    fn misdo(&mut self, fault: WriteFault, place: Place) -> bool {
        let Some(who) = self.faulty else { return false };
        self.processes[who].disks[MASS].write_fault = Some(fault);
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
            FaultKind::HandOver { to } => {
                let from = self.desired;
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
            store::OpenError::Read { .. } => {
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
