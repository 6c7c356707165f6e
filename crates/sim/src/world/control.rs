//! Who runs the head: what a process does to win the lease, with a store whose answers are late or
//! lost.

use base::{Epoch, Holder, HolderId};

use super::{Event, World};
use crate::checkers::quorums;
use crate::cluster_store::{Answer, Call, Caller, Lease, Records};
use crate::faults::Trigger;
use crate::places::Place;
use crate::process::{RunningHead, host_id};

/// A process that did not get the lease asks again after so long.
const RETRY_NANOS: u64 = 20_000_000;

impl World {
    pub(super) fn control_later(&mut self, process: usize, nanos: u64) {
        let life = self.processes[process].life;
        self.after(nanos, Event::Control { process, life });
    }

    /// A process looks whether it should do something for the head to run here.
    pub(super) fn control(&mut self, process: usize) {
        let state = &mut self.processes[process];
        let stays = state.open && state.leaving.is_none();
        if process != self.desired || !stays || self.provisioned < self.config.servers {
            return;
        }
        if let Some(head) = state.head {
            // An earlier head that has not been told yet that it is deposed. Its end opens the new
            // one.
            if head.epoch < self.store.records.volume.epoch {
                let life = state.life;
                self.input(process, life, node::Input::AbandonHead(head.handle));
            }
            return;
        }
        if let Lease::Idle = state.lease {
            state.lease = Lease::Reading { tried: None };
            self.call_store(process, Caller::Lease, Call::Read);
        }
    }

    pub(super) fn call_store(&mut self, process: usize, caller: Caller, call: Call) {
        let life = self.processes[process].life;
        let course = self.store.course(self.now, &call);
        let heard = (!course.lost).then_some(course.answer);
        if let Some(at) = course.effect {
            let call = Box::new(call);
            self.queue.push(at, Event::StoreEffect { process, life, caller, call, answer: heard });
        }
        if course.lost {
            self.report.places.reach(Place::StoreAnswerLost);
            let answer = Box::new(Answer::Lost);
            self.queue.push(course.answer, Event::StoreAnswer { process, life, caller, answer });
        }
    }

    /// The store does what it was asked; the caller may be gone, or may not hear of it.
    pub(super) fn store_effect(
        &mut self,
        process: usize,
        life: u64,
        caller: Caller,
        call: Call,
        heard: Option<base::Instant>,
    ) {
        let before = self.store.records.shard.clone();
        let answer = Box::new(self.store.perform(call));
        if let Err(violation) = quorums::look(&before, &self.store.records.shard) {
            self.fail(&violation);
        }
        if let Some(at) = heard {
            self.queue.push(at, Event::StoreAnswer { process, life, caller, answer });
        }
    }

    pub(super) fn store_answer(&mut self, process: usize, caller: Caller, answer: Answer) {
        match caller {
            Caller::Lease => self.lease_answer(process, answer),
            Caller::Healer => self.healer_answer(process, answer),
        }
    }

    fn lease_answer(&mut self, process: usize, answer: Answer) {
        let lease = std::mem::take(&mut self.processes[process].lease);
        match (lease, answer) {
            (Lease::Reading { tried }, Answer::Records(records)) => {
                self.records_read(process, tried, &records);
            }
            (Lease::Reading { tried }, Answer::Lost) => {
                self.processes[process].lease = Lease::Reading { tried };
                self.call_store(process, Caller::Lease, Call::Read);
            }
            (Lease::Swapping { won }, Answer::Swapped) => self.won(process, &won),
            (Lease::Swapping { won }, Answer::Conflict | Answer::Lost) => {
                self.report.places.reach(Place::StoreConflict);
                self.processes[process].lease = Lease::Reading { tried: Some(won.volume.epoch) };
                self.call_store(process, Caller::Lease, Call::Read);
            }
            (lease, answer) => self.fail(&format!("{answer:?} to a process in {lease:?}")),
        }
    }

    fn records_read(&mut self, process: usize, tried: Option<Epoch>, records: &Records) {
        let holder = records.volume.holder.as_ref().map(|holder| holder.id);
        let id = HolderId::from_bytes(host_id(process));
        if tried == Some(records.volume.epoch) && holder == Some(id) {
            self.report.places.reach(Place::StoreSwapWonUnheard);
            self.won(process, records);
            return;
        }
        if process != self.desired || self.processes[process].head.is_some() {
            return;
        }
        let holder =
            Holder { id, name: format!("process {process}"), repair: false, yieldable: false };
        let acquired = Box::new(records.acquired(holder));
        self.processes[process].lease = Lease::Swapping { won: acquired.clone() };
        self.call_store(process, Caller::Lease, Call::Swap(acquired));
    }

    /// The lease is ours, or was a moment ago.
    fn won(&mut self, process: usize, records: &Records) {
        let epoch = records.volume.epoch;
        self.trace.say(self.now, || format!("process {process} won {epoch}"));
        if process != self.desired || self.processes[process].leaving.is_some() {
            return;
        }
        self.report.heads += 1;
        self.spring(Trigger::Won, process);
        let state = &mut self.processes[process];
        state.healer.forget_head();
        let local = state.clock.local(self.now);
        let node = state.node.as_mut().expect("an open process runs");
        match node.open_head(local, records.volume.clone(), records.shard.clone()) {
            Ok(handle) => {
                let blocks = records.blocks();
                state.head =
                    Some(RunningHead { handle, epoch, opened: false, blocks, rests: false });
            }
            Err(error) => self.fail(&format!("no head was made: {error}")),
        }
        self.pump(process);
        self.control_later(process, RETRY_NANOS);
    }

    /// Somebody wants the head in another process.
    pub(super) fn attach(&mut self, process: usize) {
        self.desired = process;
        self.begin_burst();
        // A head that runs there already is of an older epoch, or nobody moves anything.
        let state = &mut self.processes[process];
        if let Some(head) = state.head
            && head.epoch < self.store.records.volume.epoch
        {
            let life = state.life;
            self.input(process, life, node::Input::AbandonHead(head.handle));
        }
        self.control(process);
    }
}
