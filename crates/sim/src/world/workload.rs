//! The guest: requests, and whether their answers can be explained.

use base::limits::PAGE_BYTES;
use base::{BlockCount, BlockReply, BlockRequest, Durability, Lba, Operation, RequestId, Status};
use core::time::Duration;
use node::{FrontEnd, Input};

use super::{Event, World, WorldConfig};
use crate::content::{fill, value_of};
use crate::faults::Trigger;
use crate::guest::{Guest, Kind};
use crate::oracle::Explained;
use crate::places::Place;
use crate::process::Process;
use crate::random::Random;

/// Blocks of a chunk of home.
const CHUNK_BLOCKS: u64 = 16;
/// Requests to where damage was found, at most.
const RETURNS_MAX: u64 = 600;
/// The longest pause between two of them.
const RETURN_NANOS: u64 = 400_000;
/// Blocks that half of the requests begin in.
const HOT_BLOCKS: u64 = 24;

/// How fast the guest makes requests: bursts, and pauses such that they last as long as the faults.
#[derive(Clone, Debug)]
pub(super) struct Load {
    /// Requests left of this burst.
    burst: u64,
    /// The longest pause between two bursts.
    idle_nanos: u64,
    /// Which pace counts.
    pace: u64,
    /// Where the newest head wrote last.
    written: Option<u64>,
    /// The guest does nothing before.
    stopped_until: base::Instant,
    /// The guest only reads before.
    reads_until: base::Instant,
    /// Where damage was found, and how many requests go there yet.
    damage: Option<(u64, u64)>,
    /// What decides on habits: those of one guest do not shift what another one does.
    random: Random,
}

impl Load {
    pub(super) fn new(config: &WorldConfig) -> Self {
        let bursts = (config.requests / config.burst.max(1)).max(1);
        let nanos = u64::try_from(config.length.as_nanos()).expect("seconds");
        Self {
            burst: 0,
            idle_nanos: 2 * nanos / bursts + 1,
            pace: 0,
            written: None,
            stopped_until: base::Instant::ZERO,
            reads_until: base::Instant::ZERO,
            damage: None,
            random: Random::of(config.seed, "habits"),
        }
    }
}

impl World {
    /// Something has happened: the guest is busy now.
    pub(super) fn begin_burst(&mut self) {
        if self.config.burst > 0 {
            self.load.burst = self.load.burst.max(self.config.burst / 2);
            self.load.pace += 1;
            let pace = self.load.pace;
            self.after(1_000, Event::Submit { pace });
        }
    }

    /// The guest stands still for so long.
    pub(super) fn stop_guest(&mut self, how_long: Duration) {
        self.load.stopped_until = self.now + how_long;
    }

    /// The guest only reads for so long.
    pub(super) fn read_for(&mut self, how_long: Duration) {
        self.load.reads_until = self.now + how_long;
    }

    /// A head has opened: the guest may want to see what there is.
    pub(super) fn look_first(&mut self) {
        if self.config.habits.looks_first && self.load.random.one_in(2) {
            let nanos = self.load.random.between(1_000_000, 1_000_000_000);
            self.load.reads_until = self.now + Duration::from_nanos(nanos);
        }
    }

    /// Damage was found there: the guest uses just that.
    pub(super) fn return_to(&mut self, lba: u64) {
        if self.config.habits.returns_to_damage && self.load.damage.is_none() {
            self.load.damage = Some((lba, RETURNS_MAX));
            self.begin_burst();
        }
    }

    /// Has a read of the faulty server found damage?
    pub(super) fn look_for_damage(&mut self, process: usize) {
        let store = self.processes[process].node.as_ref().and_then(node::Node::store);
        let damaged = store.map_or(0, |store| store.usage().damaged_answers);
        let found = damaged > std::mem::replace(&mut self.damaged_answers, damaged);
        let mut reads = self.requests.values().filter(|guest| guest.kind == Kind::Read);
        if found && let Some(read) = reads.next() {
            let lba = read.lba + self.load.random.below(read.blocks);
            self.return_to(lba);
        }
    }

    /// A request to where damage was found. False if there is none.
    fn submit_return(&mut self, pace: u64) -> bool {
        let Some((lba, left)) = self.load.damage else { return false };
        self.load.damage = left.checked_sub(1).map(|left| (lba, left));
        let pause = self.load.random.between(2_000, RETURN_NANOS);
        self.after(pause, Event::Submit { pace });
        let kind = if self.load.random.one_in(2) { Kind::Read } else { Kind::Write };
        self.submit_request(self.desired, kind, lba, 1);
        true
    }

    /// Nobody uses the head of a process for now.
    pub(super) fn rest(&mut self, process: usize) {
        let state = &mut self.processes[process];
        let Some(head) = &mut state.head else { return };
        if state.paused_until <= self.now {
            head.rests = true;
            let (handle, life) = (head.handle, state.life);
            self.report.places.reach(Place::HeadRested);
            self.input(process, life, Input::RestHead(handle));
        }
    }

    /// How long until the next request.
    fn next_pause(&mut self) -> u64 {
        if self.config.burst > 0 && self.load.burst == 0 {
            self.load.burst = self.random.between(1, self.config.burst);
            return self.random.between(2_000, self.load.idle_nanos + 2_000);
        }
        self.load.burst = self.load.burst.saturating_sub(1);
        self.random.between(2_000, self.config.pause_nanos)
    }

    pub(super) fn submit(&mut self, pace: u64) {
        if self.next_request > self.config.requests || !self.submitting() || pace != self.load.pace
        {
            return;
        }
        if self.submit_return(pace) {
            return;
        }
        let pause = self.next_pause();
        self.after(pause, Event::Submit { pace });
        if self.now < self.load.stopped_until {
            return;
        }
        let Some(process) = self.used_head() else { return };
        // From a head that may be deposed mostly what another one has just written is read: what waits
        // there for a quorum, and what overlaps that, says nothing.
        let elsewhere = (process != self.desired && !self.random.one_in(8))
            .then_some(self.load.written)
            .flatten();
        let kind = if elsewhere.is_some() || self.random.below(100) < self.config.reads_percent {
            Kind::Read
        } else {
            match self.random.below(12) {
                0 => Kind::Flush,
                1 => Kind::Discard,
                _ => Kind::Write,
            }
        };
        let blocks = match self.random.below(8) {
            0 => self.random.between(1, 32),
            _ => self.random.between(1, 3),
        };
        let size = self.processes[process].head.map_or(1, |head| head.blocks);
        let blocks = blocks.min(size).min(self.config.habits.blocks);
        // Half of the requests meet in a few blocks.
        let most = size - blocks + 1;
        let most = if self.random.one_in(2) { most.min(HOT_BLOCKS) } else { most };
        let lba = self.random.below(most);
        let (lba, blocks) = elsewhere.map_or((lba, blocks), |lba| (lba, 1));
        let (kind, lba, blocks) = self.by_habit(kind, lba, blocks);
        if lba + blocks > size {
            // Of a head that knows of more.
            return;
        }
        // Each front end has a depth of its own: what a lost head holds is not in another's way.
        let depth = self.config.habits.depth;
        let whole = process == self.desired || kind == Kind::Read;
        let most = if whole { depth } else { depth.div_ceil(2) };
        if self.processes[process].begun < most {
            self.submit_request(process, kind, lba, blocks);
        }
    }

    /// What the guest's habits make of a request.
    fn by_habit(&mut self, kind: Kind, lba: u64, blocks: u64) -> (Kind, u64, u64) {
        let habits = self.config.habits;
        if kind != Kind::Read && self.now < self.load.reads_until {
            return (Kind::Read, lba, blocks);
        }
        if kind == Kind::Discard && habits.discards_chunks && self.load.random.one_in(2) {
            let chunks = self.config.blocks / CHUNK_BLOCKS;
            let chunk = self.load.random.below(chunks);
            let count = self.load.random.between(1, 2).min(chunks - chunk);
            return (Kind::Discard, chunk * CHUNK_BLOCKS, count * CHUNK_BLOCKS);
        }
        (kind, lba, blocks)
    }

    /// Where the next request goes. Now and then somebody goes on using a head that was deposed.
    fn used_head(&mut self) -> Option<usize> {
        let heads = |process: &&Process| process.head.is_some();
        let desired = self.processes[self.desired].head.is_some();
        if desired && !self.random.one_in(3) {
            return Some(self.desired);
        }
        let count = self.processes.iter().filter(heads).count();
        let number = if count > 1 { self.random.index(count) } else { 0 };
        self.processes.iter().filter(heads).nth(number).map(|process| process.index)
    }

    /// The guest goes on until the faults end, or until it has submitted everything.
    fn submitting(&self) -> bool {
        self.faults_on || self.config.length.is_zero()
    }

    pub(super) fn submit_request(&mut self, process: usize, kind: Kind, lba: u64, blocks: u64) {
        let state = &mut self.processes[process];
        let Some(head) = state.head else { return };
        if state.paused_until > self.now || state.leaving.is_some() {
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
        let rested = state.head.as_mut().is_some_and(|head| std::mem::take(&mut head.rests));
        let number = self.next_write;
        let fua = kind == Kind::Write && self.random.one_in(10);
        let on_media = fua || self.config.durability == Durability::Durable;
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
                Operation::Write { buffer, fua }
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
        let guest = Guest { lba, blocks, kind, number, submitted, process, epoch, stale, on_media };
        self.trace_blocks("submit", &guest);
        self.requests.insert(id.0, guest);
        self.processes[process].begun += 1;
        if stale {
            let place = if rested { Place::DeposedAtRest } else { Place::StaleHeadUsed };
            self.report.places.reach(place);
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
        self.processes[guest.process].begun -= 1;
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
            Kind::Flush => {
                self.oracle.flushed(guest.submitted);
                self.spring(Trigger::Flushed, guest.process);
            }
            Kind::Write | Kind::Discard => {
                self.report.written += 1;
                self.spring(Trigger::Acknowledged, guest.process);
                if guest.epoch == self.opened {
                    self.load.written = Some(guest.lba);
                }
                for block in blocks {
                    let block = usize::try_from(block).expect("a small volume");
                    let (epoch, number) = (guest.epoch.0, guest.number);
                    self.oracle.acknowledged(block, epoch, number, guest.on_media);
                }
            }
            Kind::Read => {
                let data = reply.data.as_ref().expect("a good read has data");
                let (pages, _) = data.bytes().as_chunks::<PAGE_BYTES>();
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
        let size = |world: &Self| world.processes[world.desired].head.map_or(0, |head| head.blocks);
        while lba < size(self) {
            let blocks = (size(self) - lba).min(32);
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
    }

    /// Nothing may be left of what the run began.
    pub(super) fn wind_up(&mut self) {
        for process in 0..self.processes.len() {
            self.check_invariants(process);
            let life = self.processes[process].life;
            self.input(process, life, Input::StopConnections);
        }
    }
}
