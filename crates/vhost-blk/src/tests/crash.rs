//! The back end dies at every store whose order matters; the next one goes on from the in-flight
//! buffer. The guest sees each request answered once, and none takes effect after its answer.

use std::cell::Cell;
use std::collections::VecDeque;
use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::rc::Rc;

use base::{BlockReply, Operation};

use crate::control::Request;
use crate::inflight::InflightQueue;
use crate::testing::{
    Crash, DATA, FEATURES, Guest, Random, Rig, apply, config, inflight_file, map_inflight,
    print_seed, seeds, set_hook,
};

const SIZE: u16 = 32;
const LANES: u16 = 8;
const BLOCK: usize = 512;
/// The first lane's requests are larger than one block request may be.
const FIRST_BLOCKS: usize = 300;
const OTHER_BLOCKS: usize = 8;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Want {
    Write(u8),
    Read,
    Zero,
}

/// A part of the disk that has one request at a time, so that its content is known.
#[derive(Clone, Copy, Debug, Default)]
struct Lane {
    content: u8,
    under_way: Option<Want>,
}

struct World {
    guest: Guest,
    inflight: File,
    disk: Vec<u8>,
    lanes: [Lane; LANES as usize],
    fill: u8,
    answered: usize,
}

/// What dies with the process.
struct Process {
    rig: Rig,
    replies: VecDeque<BlockReply>,
}

fn blocks(lane: usize) -> (usize, usize) {
    if lane == 0 { (0, FIRST_BLOCKS) } else { (FIRST_BLOCKS + lane * OTHER_BLOCKS, OTHER_BLOCKS) }
}

fn header(lane: usize) -> u64 {
    DATA + 64 * lane as u64
}

fn buffer(lane: usize) -> u64 {
    DATA + 0x1_0000 + if lane == 0 { 0 } else { 0x3_0000 + 0x1001 * lane as u64 }
}

impl World {
    fn new() -> Self {
        Self {
            guest: Guest::new(1, SIZE),
            inflight: inflight_file(1, SIZE),
            disk: vec![0; 1 << 20],
            lanes: [Lane::default(); LANES as usize],
            fill: 0,
            answered: 0,
        }
    }

    /// A new process connects, with the used index as base, as QEMU gives it.
    fn start(&self) -> Process {
        let mut rig = Rig::new(config(1));
        let inflight = map_inflight(&self.inflight, 1, SIZE);
        let base = self.guest.used_index(0);
        rig.connect(&self.guest, FEATURES, Some(inflight), &[base]);
        Process { rig, replies: VecDeque::new() }
    }

    fn submit(&mut self, random: &mut Random, lane: usize) {
        let (start, count) = blocks(lane);
        let bytes = u32::try_from(count * BLOCK).unwrap();
        self.fill = self.fill.wrapping_add(1);
        let want =
            random.pick(&[Want::Write(self.fill), Want::Write(self.fill), Want::Read, Want::Zero]);
        let (kind, bytes) = match want {
            Want::Write(fill) => {
                self.guest.write(buffer(lane), &vec![fill; bytes as usize]);
                (1, bytes)
            }
            Want::Read => {
                self.guest.write(buffer(lane), &[0xee; 16]);
                (0, bytes)
            }
            Want::Zero => {
                self.guest.write(buffer(lane), &(start as u64).to_le_bytes());
                self.guest.write(buffer(lane) + 8, &(count as u64).to_le_bytes());
                (random.pick(&[11, 13]), 16)
            }
        };
        let head = u16::try_from(lane * 3).unwrap();
        let data = (buffer(lane), bytes);
        let sector = if want == Want::Zero { 0 } else { start as u64 };
        self.guest.request(0, head, header(lane), kind, sector, data);
        self.lanes[lane].under_way = Some(want);
        self.guest.offer(0, head);
    }

    fn reap(&mut self) {
        for (head, _) in self.guest.reap(0) {
            let lane = usize::from(head / 3);
            let want = self.lanes[lane].under_way.take();
            let want = want.unwrap_or_else(|| panic!("lane {lane} was answered twice"));
            assert_eq!(self.guest.status(header(lane)), 0, "lane {lane}");
            match want {
                Want::Write(fill) => self.lanes[lane].content = fill,
                Want::Zero => self.lanes[lane].content = 0,
                Want::Read => {
                    let data = self.guest.read(buffer(lane), blocks(lane).1 * BLOCK);
                    let content = self.lanes[lane].content;
                    assert!(data.iter().all(|byte| *byte == content), "lane {lane} reads wrong");
                }
            }
            self.answered += 1;
        }
    }

    /// Executes a block request, if it may be executed.
    fn execute(&mut self, request: base::BlockRequest) -> BlockReply {
        self.reap();
        if !matches!(request.operation, Operation::Flush) {
            let block = usize::try_from(request.lba.0).unwrap();
            let lane = (0..usize::from(LANES))
                .find(|lane| (blocks(*lane).0..blocks(*lane).0 + blocks(*lane).1).contains(&block))
                .unwrap();
            assert!(
                self.lanes[lane].under_way.is_some(),
                "lane {lane} is written or read after its request was answered"
            );
        }
        apply(request, &mut self.disk, base::BlockSize::B512)
    }

    /// One random step of guest, device or head.
    fn step(&mut self, process: &mut Process, random: &mut Random) {
        match random.below(6) {
            0 | 1 => {
                let lane = usize::try_from(random.below(LANES.into())).unwrap();
                self.reap();
                if self.lanes[lane].under_way.is_none() {
                    self.submit(random, lane);
                }
            }
            2 => drop(process.rig.poll(1 + usize::try_from(random.below(4)).unwrap())),
            3 => {
                let waiting = process.rig.requests.len() as u64;
                if waiting > 0 {
                    let at = usize::try_from(random.below(waiting)).unwrap();
                    let request = process.rig.requests.remove(at).unwrap();
                    let reply = self.execute(request);
                    process.replies.push_back(reply);
                }
            }
            4 => {
                if let Some(reply) = process.replies.pop_front() {
                    process.rig.device.complete(reply);
                }
            }
            _ => self.reap(),
        }
    }

    /// Runs what is left to its end, and checks that all is as the guest thinks.
    fn finish(&mut self, process: &mut Process) {
        for _ in 0..1000 {
            process.rig.poll(64);
            while let Some(request) = process.rig.requests.pop_front() {
                let reply = self.execute(request);
                process.replies.push_back(reply);
            }
            while let Some(reply) = process.replies.pop_front() {
                process.rig.device.complete(reply);
            }
            self.reap();
            if self.lanes.iter().all(|lane| lane.under_way.is_none()) {
                break;
            }
        }
        for (index, lane) in self.lanes.iter().enumerate() {
            assert_eq!(lane.under_way, None, "lane {index} is never answered");
            let (start, count) = blocks(index);
            let content = &self.disk[start * BLOCK..(start + count) * BLOCK];
            assert!(content.iter().all(|byte| *byte == lane.content), "lane {index} on disk");
        }
        assert_eq!(process.rig.device.busy(), 0);
        let inflight = map_inflight(&self.inflight, 1, SIZE);
        let queue = InflightQueue::new(&inflight, 0, SIZE).unwrap();
        let (left, _) = queue.recover(self.guest.used_index(0), SIZE);
        assert!(left.is_empty(), "in-flight entries left: {left:?}");
        let answer = process.rig.ask(Request::RingStop { queue: 0 }).unwrap();
        assert_eq!(answer, Ok(self.guest.available(0)));
    }
}

/// Runs `steps` random steps; dies at each of `crashes` (stores counted since the start of that
/// process), and goes on. Returns the number of stores in the last process.
fn run(seed: u64, steps: usize, crashes: &[u32]) -> u32 {
    let mut random = Random::new(seed);
    let mut world = World::new();
    let left = Rc::new(Cell::new(u32::MAX));
    let count = Rc::new(Cell::new(0_u32));
    let (hook_left, hook_count) = (Rc::clone(&left), Rc::clone(&count));
    set_hook(Some(Box::new(move || {
        hook_count.set(hook_count.get() + 1);
        match hook_left.get().checked_sub(1) {
            Some(less) => hook_left.set(less),
            None => resume_unwind(Box::new(Crash)),
        }
    })));
    let mut crashes = crashes.iter();
    left.set(crashes.next().copied().unwrap_or(u32::MAX));
    let mut process = world.start();
    for step in 0..=steps {
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            if step < steps {
                world.step(&mut process, &mut random);
            } else {
                world.finish(&mut process);
            }
        }));
        let Err(payload) = outcome else { continue };
        if !payload.is::<Crash>() {
            set_hook(None);
            resume_unwind(payload);
        }
        // What was on its way to the disk may have got there.
        for request in core::mem::take(&mut process.rig.requests) {
            if random.one_in(2) {
                world.execute(request);
            }
        }
        process = world.start();
        count.set(0);
        left.set(crashes.next().copied().unwrap_or(u32::MAX));
        if step == steps {
            left.set(u32::MAX);
            world.finish(&mut process);
        }
    }
    set_hook(None);
    assert!(world.answered > steps / 20);
    count.get()
}

#[test]
fn a_death_at_any_store_loses_and_repeats_nothing() {
    for seed in seeds(2) {
        print_seed("a_death_at_any_store_loses_and_repeats_nothing", seed);
        let stores = run(seed, 120, &[]);
        assert!(stores > 200, "only {stores} stores: the test tests too little");
        for store in 0..stores {
            run(seed, 120, &[store]);
        }
    }
}

#[test]
fn death_after_death_loses_and_repeats_nothing() {
    for seed in seeds(60) {
        print_seed("death_after_death_loses_and_repeats_nothing", seed);
        let mut random = Random::new(!seed);
        let crashes: Vec<u32> = (0..20).map(|_| random.below32(60)).collect();
        run(seed, 400, &crashes);
    }
}
