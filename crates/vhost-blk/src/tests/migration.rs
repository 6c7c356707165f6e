//! Dirty logging under a live migration: a destination that copies dirty pages at any moment, and
//! a last time after the ring stopped, has the guest's memory as it is.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use crate::config::{F_EVENT_IDX, F_LOG_ALL};
use crate::control::Request;
use crate::memory::GuestMemory;
use crate::testing::{
    BASE, DATA, FEATURES, Guest, Log, MEMORY_BYTES, Random, Rig, USED, config, log_features,
    print_seed, seeds, set_hook,
};

const PAGE: u64 = 4096;

/// The front end's migration thread.
struct Migration {
    memory: Arc<GuestMemory>,
    log: Log,
    copy: Vec<u8>,
    random: Random,
}

impl Migration {
    fn copy_page(&mut self, page: u64) {
        let at = usize::try_from(page - BASE).unwrap();
        let to = &mut self.copy[at..at + 4096];
        assert!(self.memory.read(page, to));
    }

    fn sync(&mut self) {
        for page in self.log.take() {
            self.copy_page(page);
        }
    }

    fn copy_all(&mut self) {
        for page in (BASE..BASE + MEMORY_BYTES).step_by(4096) {
            self.copy_page(page);
        }
    }
}

/// Writes guest memory as a guest does whose writes the hypervisor tracks.
fn guest_wrote(migration: &Rc<RefCell<Migration>>, gpa: u64, bytes: u64) {
    let mut page = gpa / PAGE * PAGE;
    while page < gpa + bytes {
        migration.borrow_mut().copy_page(page);
        page += PAGE;
    }
}

fn submit(guest: &mut Guest, migration: &Rc<RefCell<Migration>>, random: &mut Random, lane: u16) {
    let header = DATA + 0x1f00 * u64::from(lane);
    let buffer = DATA + 0x2_0000 + 0x5432 * u64::from(lane);
    let kind = random.pick(&[0, 0, 1, 4, 8, 77]);
    let blocks = 1 + random.below32(30);
    let bytes = match kind {
        0 | 1 => 512 * blocks,
        8 => 20,
        _ => 0,
    };
    guest.request(0, lane * 3, header, kind, random.below(1000), (buffer, bytes));
    guest.offer(0, lane * 3);
    // All that the driver wrote: header and status, descriptors, available ring.
    guest_wrote(migration, header, 17);
    guest_wrote(migration, Guest::ring_gpa(0), 0x1800);
}

fn log_on(features: u64, rig: &mut Rig, migration: &Rc<RefCell<Migration>>) {
    rig.must(Request::Log(Arc::clone(&migration.borrow().log.log)));
    rig.must(Request::Features(features | F_LOG_ALL));
    let mut addresses = Guest::addresses(0);
    addresses.used_log = Some(Guest::ring_gpa(0) + USED);
    rig.must(Request::RingAddresses { queue: 0, addresses });
}

/// What the management of a migration does in `round`.
fn manage(round: usize, features: u64, rig: &mut Rig, migration: &Rc<RefCell<Migration>>) {
    if round % 200 == 20 {
        log_on(features, rig, migration);
        migration.borrow_mut().copy_all();
    } else if round % 200 == 90 {
        // A larger log, or the next round's: the old one is read a last time.
        let new = Log::new();
        rig.must(Request::Log(Arc::clone(&new.log)));
        let old = core::mem::replace(&mut migration.borrow_mut().log, new);
        for page in old.take() {
            migration.borrow_mut().copy_page(page);
        }
    } else if round % 200 == 150 && round < 400 {
        // Cancelled: the next attempt starts with a copy of everything.
        rig.must(Request::Features(features));
        rig.must(Request::RingAddresses { queue: 0, addresses: Guest::addresses(0) });
    }
}

fn migrate(seed: u64, features: u64) {
    let mut random = Random::new(seed);
    let mut guest = Guest::new(1, 32);
    let mut rig = Rig::new(config(1));
    rig.connect(&guest, features, None, &[0]);
    let mut disk: Vec<u8> = (0..1_u32 << 20).map(|n| n.wrapping_mul(97).to_be_bytes()[2]).collect();
    let migration = Rc::new(RefCell::new(Migration {
        memory: guest.mapped_again(),
        log: Log::new(),
        copy: vec![0; usize::try_from(MEMORY_BYTES).unwrap()],
        random: Random::new(!seed),
    }));
    let in_hook = Rc::clone(&migration);
    set_hook(Some(Box::new(move || {
        let mut migration = in_hook.borrow_mut();
        if migration.random.one_in(4) {
            migration.sync();
        }
    })));
    let mut free: Vec<u16> = (0..8).collect();
    for round in 0..600 {
        manage(round, features, &mut rig, &migration);
        match random.below(5) {
            0 | 1 => {
                if let Some(lane) = free.pop() {
                    submit(&mut guest, &migration, &mut random, lane);
                }
            }
            2 => {
                rig.device.set_polling(random.one_in(4));
                rig.poll(1 + usize::try_from(random.below(3)).unwrap());
            }
            3 => {
                if let Some(request) = rig.requests.pop_front() {
                    rig.execute(request, &mut disk);
                }
            }
            _ => free.extend(guest.reap(0).into_iter().map(|(head, _)| head / 3)),
        }
    }
    // The last thing before the switch-over is telling the guest to kick again.
    rig.run(&mut disk);
    free.extend(guest.reap(0).into_iter().map(|(head, _)| head / 3));
    rig.device.set_polling(true);
    submit(&mut guest, &migration, &mut random, free[0]);
    rig.run(&mut disk);
    migration.borrow_mut().sync();
    rig.device.set_polling(false);
    rig.poll(8);
    // Switch-over: disabled, stopped, a last look.
    let disabled = rig.ask_later(Request::RingEnable { queue: 0, enable: false });
    rig.run(&mut disk);
    assert_eq!(disabled.try_recv(), Ok(Ok(0)));
    let base = rig.ask(Request::RingStop { queue: 0 }).unwrap().unwrap();
    set_hook(None);
    assert_eq!(base, guest.available(0), "all that was available was answered");
    assert_eq!(guest.used_index(0), base);
    let mut migration = migration.borrow_mut();
    migration.sync();
    for page in (BASE..BASE + MEMORY_BYTES).step_by(4096) {
        let at = usize::try_from(page - BASE).unwrap();
        let same = guest.read(page, 4096) == migration.copy[at..at + 4096];
        assert!(same, "page {:#x} differs at the destination", page - BASE);
    }
}

#[test]
fn a_destination_that_copies_dirty_pages_gets_them_all() {
    for seed in seeds(40) {
        print_seed("a_destination_that_copies_dirty_pages_gets_them_all", seed);
        migrate(seed, FEATURES);
        migrate(seed, FEATURES & !F_EVENT_IDX);
    }
}

#[test]
fn rings_wait_for_a_log_that_was_announced() {
    let mut guest = Guest::new(1, 16);
    let mut rig = Rig::new(config(1));
    rig.connect(&guest, log_features(), None, &[0]);
    let mut disk = vec![3; 1 << 20];
    guest.request(0, 0, DATA, 0, 0, (DATA + 0x1000, 512));
    guest.offer(0, 0);
    rig.run(&mut disk);
    assert!(guest.reap(0).is_empty());
    let log = Log::new();
    rig.must(Request::Log(Arc::clone(&log.log)));
    rig.run(&mut disk);
    assert_eq!(guest.reap(0), [(0, 513)]);
    let used = (Guest::ring_gpa(0) + USED) / PAGE * PAGE;
    // Flags and index, entries and event index, status, data.
    assert_eq!(log.take(), [used, used + PAGE, DATA, DATA + 0x1000]);
}
