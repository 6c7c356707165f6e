//! Processes start, open, stop, pause and go on.

use super::{Event, KEY, World};
use crate::places::Place;
use crate::process::{RunningHead, address, server_id};
use base::{BlockSize, Epoch};
use node::Input;

impl World {
    pub(super) fn start(&mut self, process: usize) {
        if self.processes[process].node.is_some() {
            return;
        }
        let drift = i64::try_from(self.random.below(2001)).expect("small") - 1000;
        let drift = if self.config.faults.is_empty() { 0 } else { drift };
        let successor = self.processes[process].start(self.now, drift, &mut self.random);
        self.trace.say(self.now, || format!("process {process} starts"));
        self.succeed(process, successor);
        self.heal_later(process);
        self.pump(process);
        if !self.processes[process].is_server() {
            self.process_opened(process);
        }
    }

    /// A process serves: the first time its replica is made, later it may have to run the head.
    pub(super) fn process_opened(&mut self, process: usize) {
        self.processes[process].open = true;
        self.check_invariants(process);
        let servers: Vec<_> =
            (0..self.config.pools()).map(|index| (server_id(index), address(index))).collect();
        let local = self.processes[process].clock.local(self.now);
        let life = self.processes[process].life;
        let node = self.processes[process].node.as_mut().expect("it runs");
        node.set_servers(local, servers);
        if process < self.config.servers && self.provisioned < self.config.servers {
            let blocks = self.config.blocks;
            let create = Input::CreateReplica {
                tag: 1,
                key: KEY,
                block_size: BlockSize::B4096,
                blocks,
                epoch: Epoch::NONE,
            };
            self.input(process, life, create);
        } else {
            self.control(process);
        }
    }

    pub(super) fn stop(&mut self, process: usize, power_cut: bool) {
        // Whoever is back at once finds others that have not noticed.
        let nanos = if self.random.one_in(2) {
            self.random.between(1_000_000, 30_000_000)
        } else {
            self.random.between(1_000_000, 3_000_000_000)
        };
        self.stop_for(process, power_cut, nanos);
    }

    /// A process dies, and is started again after so long.
    pub(super) fn stop_for(&mut self, process: usize, power_cut: bool, nanos: u64) {
        if self.processes[process].node.is_some() {
            self.end_process(process, power_cut);
            self.after(nanos, Event::Start { process });
        } else if power_cut && self.processes[process].is_server() {
            self.lose_caches(process);
        }
    }

    /// What is about to be recovered may have rotted.
    pub(super) fn note_rot(&mut self, process: usize) {
        self.checkers.rotted(process, self.processes[process].disks[0].batches());
    }

    /// The power goes where a process was down already: what it had not put on media may be gone, too.
    fn lose_caches(&mut self, process: usize) {
        self.report.places.reach(Place::PowerLostWhileDown);
        let lied = self.processes[process].disks.iter().any(|disk| disk.lied);
        self.processes[process].lose_power(&mut self.random);
        self.oracle.power_lost();
        if lied {
            self.checkers.log_lost(process);
        }
        if self.rotted && self.faulty == Some(process) {
            self.note_rot(process);
        }
    }

    /// A running process is no more.
    pub(super) fn end_process(&mut self, process: usize, power_cut: bool) {
        if let Some(head) = self.processes[process].head {
            self.lose_head(process, head);
        }
        if self.processes[process].is_writing() {
            self.report.places.reach(Place::KilledWithDiskWrites);
        }
        self.check_invariants(process);
        self.held[process].clear();
        let lied = self.processes[process].disks.iter().any(|disk| disk.lied);
        if self.processes[process].stop(power_cut, &mut self.random) {
            self.oracle.power_lost();
            if lied {
                // What was said to be on media was not.
                self.checkers.log_lost(process);
            }
        }
        if self.rotted && self.faulty == Some(process) {
            self.note_rot(process);
        }
        self.network.break_all(self.now, process, power_cut);
    }

    /// Nobody will answer: the guest's requests are undecided for ever.
    pub(super) fn lose_head(&mut self, process: usize, head: RunningHead) {
        let before = self.requests.len();
        self.requests.retain(|_, guest| guest.process != process);
        self.processes[process].begun = 0;
        if self.requests.len() < before {
            self.report.places.reach(Place::KilledWithRequests);
        }
        self.oracle.orphaned(head.epoch.0);
    }

    /// A process goes on after it stood still: everything comes at once.
    pub(super) fn resume(&mut self, process: usize) {
        if self.processes[process].paused_until > self.now {
            return;
        }
        self.trace.say(self.now, || format!("process {process} goes on"));
        for event in std::mem::take(&mut self.held[process]) {
            self.event(event);
        }
    }
}
