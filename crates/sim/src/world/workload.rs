//! The guest: requests, and whether their answers can be explained.

use base::limits::PAGE_BYTES;
use base::{BlockCount, BlockReply, BlockRequest, Lba, Operation, RequestId, Status};
use core::time::Duration;
use node::{FrontEnd, Input};

use super::{Event, World};
use crate::content::{fill, value_of};
use crate::guest::{Guest, Kind};
use crate::oracle::Explained;
use crate::places::Place;

/// Requests that the guest has under way, at most.
const DEPTH: usize = 32;

impl World {
    pub(super) fn submit(&mut self) {
        let pause = self.random.between(2_000, self.config.pause_nanos);
        if self.next_request > self.config.requests || !self.submitting() {
            return;
        }
        self.after(pause, Event::Submit);
        if self.processes[self.desired].head.is_none() {
            return;
        }
        let kind = match self.random.below(20) {
            0 => Kind::Flush,
            1 => Kind::Discard,
            2..=8 => Kind::Read,
            _ => Kind::Write,
        };
        let blocks = match self.random.below(8) {
            0 => self.random.between(1, 32),
            _ => self.random.between(1, 3),
        };
        let blocks = blocks.min(self.config.blocks);
        let lba = self.random.below(self.config.blocks - blocks + 1);
        // Now and then somebody goes on using a head that was deposed.
        let process = match self.random.below(4) {
            0 => self.random.index(self.processes.len()),
            _ => self.desired,
        };
        // Each front end has a depth of its own: what a lost head holds is not in another's way.
        let begun = self.requests.values().filter(|guest| guest.process == process).count();
        if begun < DEPTH {
            self.submit_request(process, kind, lba, blocks);
        }
    }

    /// The guest goes on until the faults end, or until it has submitted everything.
    fn submitting(&self) -> bool {
        self.faults_on || self.config.length.is_zero()
    }

    pub(super) fn submit_request(&mut self, process: usize, kind: Kind, lba: u64, blocks: u64) {
        let state = &mut self.processes[process];
        let Some(head) = state.head else { return };
        if state.paused_until > self.now {
            return;
        }
        let stale = head.epoch < self.opened;
        let node = state.node.as_ref().expect("a head is in a process");
        if node.room(head.handle) == 0 {
            return;
        }
        let bytes = usize::try_from(blocks).expect("few") * PAGE_BYTES;
        let Some(mut buffer) = state.guest_buffers.take(bytes) else { return };
        let life = state.life;
        let number = self.next_write;
        let operation = match kind {
            Kind::Read => Operation::Read { buffer },
            Kind::Flush => Operation::Flush,
            Kind::Discard => {
                self.next_write += 1;
                Operation::Discard
            }
            Kind::Write => {
                self.next_write += 1;
                fill(&mut buffer, lba, blocks, number);
                Operation::Write { buffer, fua: self.random.one_in(10) }
            }
        };
        for block in lba..lba + blocks {
            let block = usize::try_from(block).expect("a small volume");
            match kind {
                Kind::Write | Kind::Discard if stale => {}
                Kind::Write => self.oracle.submitted(block, head.epoch.0, number, number),
                Kind::Discard => self.oracle.submitted(block, head.epoch.0, number, 0),
                Kind::Read | Kind::Flush => {}
            }
        }
        let id = RequestId(self.next_request);
        self.next_request += 1;
        let (submitted, epoch) = (self.oracle.stamp(), head.epoch);
        let guest = Guest { lba, blocks, kind, number, submitted, process, epoch, stale };
        self.trace_blocks("submit", &guest);
        self.requests.insert(id.0, guest);
        if stale {
            self.report.places.reach(Place::StaleHeadUsed);
        }
        let count = BlockCount(u32::try_from(blocks).expect("few"));
        let request = BlockRequest { id, lba: Lba(lba), blocks: count, operation };
        let input = Input::Request { head: head.handle, front_end: FrontEnd(1), request };
        self.input(process, life, input);
    }

    pub(super) fn reply(&mut self, reply: &BlockReply) {
        let Some(guest) = self.requests.remove(&reply.id.0) else {
            self.fail(&format!("request {} was answered twice or never made", reply.id.0));
        };
        match reply.status {
            Status::Ok => {}
            // Given back: it may or may not have landed.
            Status::Superseded => {
                let places = &mut self.report.places;
                match guest.kind {
                    Kind::Read if guest.stale => places.reach(Place::StaleReadReturned),
                    Kind::Write if guest.stale => places.reach(Place::StaleWriteReturned),
                    Kind::Read | Kind::Write | Kind::Flush | Kind::Discard => {}
                }
                return;
            }
            other => self.fail(&format!("the guest saw an error: {other} for {guest:?}")),
        }
        if guest.stale {
            match guest.kind {
                // What it acknowledged itself is on media: it may say so.
                Kind::Flush => return,
                // Grants: whoever sealed a higher epoch waited for them to run out, so that this
                // read is as good as one of the new head's.
                Kind::Read => {}
                Kind::Write | Kind::Discard => {
                    self.fail(&format!("a deposed head acknowledged {guest:?} (I2)"))
                }
            }
        }
        self.report.answered += 1;
        self.trace_blocks("answer", &guest);
        self.check_answer(reply, &guest);
        if self.report.answered.is_multiple_of(256) {
            let oldest = self.requests.values().map(|guest| guest.submitted).min();
            if let Some(oldest) = oldest {
                self.oracle.forget(oldest);
            }
        }
    }

    fn check_answer(&mut self, reply: &BlockReply, guest: &Guest) {
        let blocks = guest.lba..guest.lba + guest.blocks;
        match guest.kind {
            Kind::Flush => {}
            Kind::Write | Kind::Discard => {
                self.report.written += 1;
                self.spring(true);
                for block in blocks {
                    let block = usize::try_from(block).expect("a small volume");
                    self.oracle.acknowledged(block, guest.epoch.0, guest.number);
                }
            }
            Kind::Read => {
                let data = reply.data.as_ref().expect("a good read has data");
                let pages = data.bytes().chunks_exact(PAGE_BYTES);
                if pages.len() as u64 != guest.blocks {
                    self.fail("a read returned another length (I4)");
                }
                for (block, page) in blocks.zip(pages) {
                    let checked = value_of(page, block).and_then(|value| {
                        let block = usize::try_from(block).expect("small");
                        self.oracle.read(block, guest.submitted, value)
                    });
                    match checked {
                        Ok(Explained::Settled) => {}
                        Ok(Explained::Decided) => self.report.places.reach(Place::UndecidedSeen),
                        Ok(Explained::Dropped) => self.report.places.reach(Place::UndecidedDropped),
                        Err(violation) => {
                            self.fail(&format!("{violation} (I1, I3 or I4) {guest:?}"))
                        }
                    }
                }
            }
        }
    }

    /// What happens to the block that is being looked at.
    fn trace_blocks(&mut self, what: &str, guest: &Guest) {
        let blocks = guest.lba..guest.lba + guest.blocks;
        if self.config.trace_block.is_some_and(|block| blocks.contains(&block)) {
            println!("{} {what} {guest:?}", self.now);
        }
    }

    pub(super) fn read_everything(&mut self, bound: base::Instant) {
        let mut lba = 0;
        while lba < self.config.blocks {
            let blocks = (self.config.blocks - lba).min(32);
            let before = self.next_request;
            self.submit_request(self.desired, Kind::Read, lba, blocks);
            if self.next_request == before {
                // Members that are behind still hold buffers.
                let later = self.now + Duration::from_millis(1);
                self.after(1_000_000, Event::Wake);
                self.run_until(bound, "for a free buffer", |world| world.now >= later);
                continue;
            }
            lba += blocks;
            self.run_until(bound, "to read everything back", |world| world.requests.is_empty());
        }
        for process in 0..self.processes.len() {
            self.check_invariants(process);
            let life = self.processes[process].life;
            self.input(process, life, Input::StopConnections);
        }
    }
}
