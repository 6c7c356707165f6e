//! The life of rings and connections: starts, drains, memory that comes and goes, front ends that
//! leave, heads that are superseded.

use std::sync::Arc;
use std::sync::mpsc::TryRecvError;

use base::{BlockReply, BlockSize, BufferPool, Operation, RequestId, Status};

use crate::config::F_FLUSH;
use crate::control::{ControlError, Request};
use crate::memory::GuestMemory;
use crate::testing::{
    DATA, F_INDIRECT, F_NEXT, F_WRITE, FEATURES, Guest, Rig, config, inflight_file, map_inflight,
};

fn setup(queues: u16) -> (Guest, Rig, Vec<u8>) {
    let guest = Guest::new(queues, 32);
    let mut rig = Rig::new(config(queues));
    rig.connect(&guest, FEATURES, None, &vec![0; queues.into()]);
    let disk = (0..1_u32 << 20).map(|n| n.to_le_bytes()[1]).collect();
    (guest, rig, disk)
}

fn offer_read(guest: &mut Guest, queue: u16, head: u16, sector: u64, bytes: u32) {
    let header = DATA + 0x800 * u64::from(queue) + 0x20 * u64::from(head);
    let buffer = DATA + 0x1_0000 + 0x200 * u64::from(head);
    guest.request(queue, head, header, 0, sector, (buffer, bytes));
    guest.offer(queue, head);
}

#[test]
fn firmware_then_kernel_then_migration() {
    let (mut guest, mut rig, mut disk) = setup(1);
    rig.poll(8);
    assert_eq!(rig.lives, [true]);
    assert!(rig.watched.contains_key(&0));
    for head in [0, 3, 6] {
        offer_read(&mut guest, 0, head, 0, 512);
        rig.run(&mut disk);
    }
    assert_eq!(guest.reap(0).len(), 3);
    // The firmware is done: QEMU disables, then stops.
    rig.must(Request::RingEnable { queue: 0, enable: false });
    assert_eq!(rig.ask(Request::RingStop { queue: 0 }), Some(Ok(3)));
    assert_eq!(rig.lives, [true, false]);
    assert!(rig.watched.is_empty());
    // The kernel's ring starts at 0, in the same place.
    guest.start_at(0, 0);
    rig.set_up_ring(&guest, 0, 0);
    rig.must(Request::RingEnable { queue: 0, enable: true });
    offer_read(&mut guest, 0, 0, 0, 512);
    rig.run(&mut disk);
    assert_eq!(guest.reap(0), [(0, 513)]);
    assert_eq!(rig.lives, [true, false, true]);
    assert_eq!(rig.ask(Request::RingStop { queue: 0 }), Some(Ok(1)));
    // A destination goes on where the source stopped, near the wrap of the index.
    guest.start_at(0, 0xfffe);
    let mut destination = Rig::new(config(1));
    destination.connect(&guest, FEATURES, None, &[0xfffe]);
    for _ in 0..5 {
        offer_read(&mut guest, 0, 3, 0, 512);
        destination.run(&mut disk);
        assert_eq!(guest.reap(0), [(3, 513)]);
    }
    assert_eq!(destination.ask(Request::RingStop { queue: 0 }), Some(Ok(3)));
}

#[test]
fn disabling_takes_what_is_available_and_resuming_goes_on() {
    let (mut guest, mut rig, mut disk) = setup(1);
    for head in [0, 3, 6, 9] {
        offer_read(&mut guest, 0, head, 0, 512);
    }
    rig.poll(2);
    let disabled = rig.ask_later(Request::RingEnable { queue: 0, enable: false });
    // Made available after the request to stop: left alone.
    offer_read(&mut guest, 0, 12, 0, 512);
    assert_eq!(disabled.try_recv(), Err(TryRecvError::Empty));
    rig.run(&mut disk);
    assert_eq!(disabled.try_recv(), Ok(Ok(0)));
    assert_eq!(guest.reap(0).len(), 4);
    assert_eq!(rig.lives, [true, false]);
    rig.must(Request::RingEnable { queue: 0, enable: true });
    rig.run(&mut disk);
    assert_eq!(guest.reap(0), [(12, 513)]);
    assert_eq!(rig.lives, [true, false, true]);
}

#[test]
fn a_stop_waits_for_every_piece_and_takes_nothing_new() {
    let (mut guest, mut rig, mut disk) = setup(1);
    // Two pieces; only one buffer's worth of budget.
    offer_read(&mut guest, 0, 0, 0, 200 * 1024);
    offer_read(&mut guest, 0, 3, 0, 512);
    rig.poll(1);
    let stopped = rig.ask_later(Request::RingStop { queue: 0 });
    let first = rig.requests.pop_front().unwrap();
    rig.execute(first, &mut disk);
    assert_eq!(stopped.try_recv(), Err(TryRecvError::Empty));
    rig.run(&mut disk);
    assert_eq!(stopped.try_recv(), Ok(Ok(1)), "the second request was never taken");
    assert_eq!(guest.reap(0), [(0, 200 * 1024 + 1)]);
    assert_eq!(guest.read(DATA + 0x1_0000, 200 * 1024), disk[..200 * 1024]);
}

#[test]
fn new_addresses_on_a_live_ring_do_not_rewind_it() {
    let (mut guest, mut rig, mut disk) = setup(1);
    for _ in 0..5 {
        offer_read(&mut guest, 0, 0, 0, 512);
        rig.run(&mut disk);
    }
    guest.reap(0);
    offer_read(&mut guest, 0, 3, 0, 512);
    rig.poll(8);
    // What is in memory is not looked at again.
    let used = Guest::ring_gpa(0) + crate::testing::USED + 2;
    guest.write(used, &1_u16.to_le_bytes());
    rig.must(Request::RingAddresses { queue: 0, addresses: Guest::addresses(0) });
    assert_eq!(
        rig.ask(Request::RingBase { queue: 0, base: 0 }),
        Some(Err(ControlError::Running { queue: 0 }))
    );
    assert_eq!(
        rig.ask(Request::RingSize { queue: 0, size: 8 }),
        Some(Err(ControlError::Running { queue: 0 }))
    );
    rig.run(&mut disk);
    assert_eq!(guest.used_index(0), 6);
    assert_eq!(guest.reap(0), [(3, 513)]);
}

#[test]
fn memory_that_goes_away_lives_until_its_requests_end() {
    let (mut guest, mut rig, mut disk) = setup(1);
    offer_read(&mut guest, 0, 0, 1, 512);
    rig.poll(8);
    rig.must(Request::Memory(guest.mapped_again()));
    let request = rig.requests.pop_front().unwrap();
    rig.execute(request, &mut disk);
    assert_eq!(guest.reap(0), [(0, 513)]);
    assert_eq!(guest.read(DATA + 0x1_0000, 512), disk[512..1024]);
    // Without the ring's own memory the queue stops; what is under way still ends.
    offer_read(&mut guest, 0, 3, 1, 512);
    rig.poll(8);
    rig.must(Request::Memory(Arc::new(GuestMemory::default())));
    offer_read(&mut guest, 0, 6, 1, 512);
    rig.run(&mut disk);
    assert_eq!(guest.reap(0), [(3, 513)]);
    assert_eq!(rig.device.busy(), 0);
    assert_eq!(rig.ask(Request::RingStop { queue: 0 }), Some(Ok(2)));
}

#[test]
fn a_lost_front_end_s_requests_touch_nothing_and_the_next_one_waits_for_them() {
    let (mut guest, mut rig, mut disk) = setup(1);
    let buffer = DATA + 0x1_0000;
    guest.write(buffer, &[0xaa; 512]);
    offer_read(&mut guest, 0, 0, 0, 512);
    // Never to be finished: more pieces than the budget.
    offer_read(&mut guest, 0, 3, 0, 200 * 1024);
    rig.poll(2);
    rig.must(Request::Disconnected);
    assert!(!rig.device.is_attached());
    assert_eq!(rig.device.busy(), 2);
    assert!(rig.watched.is_empty());
    // The guest was reset meanwhile, and comes back.
    guest.start_at(0, 0);
    offer_read(&mut guest, 0, 6, 0, 512);
    rig.connect(&guest, FEATURES, None, &[0]);
    rig.poll(8);
    assert_eq!(rig.requests.len(), 2, "nothing new while the old ones are under way");
    let old: Vec<_> = rig.requests.drain(..).collect();
    for request in old {
        assert!(guest.reap(0).is_empty());
        rig.execute(request, &mut disk);
    }
    assert_eq!(guest.read(buffer, 512), [0xaa; 512]);
    rig.run(&mut disk);
    assert_eq!(guest.reap(0), [(6, 513)]);
    assert_eq!(rig.device.busy(), 0);
    assert_eq!(rig.buffers.available(), (32, 4));
}

#[test]
fn superseded_requests_are_held_and_sent_again() {
    let file = inflight_file(1, 32);
    let (mut guest, mut rig, mut disk) = setup(1);
    rig.connect(&guest, FEATURES, Some(map_inflight(&file, 1, 32)), &[0]);
    for head in [0, 3, 6] {
        offer_read(&mut guest, 0, head, u64::from(head), 512);
    }
    rig.poll(8);
    let requests: Vec<_> = rig.requests.drain(..).collect();
    rig.refuse(&requests[2], Status::Superseded);
    rig.refuse(&requests[0], Status::Superseded);
    rig.refuse(&requests[1], Status::IoError);
    assert_eq!(rig.superseded, 1);
    offer_read(&mut guest, 0, 9, 9, 512);
    assert!(!rig.poll(8));
    assert!(rig.requests.is_empty(), "held");
    assert_eq!(guest.reap(0), [(3, 1)]);
    // A daemon that ends now leaves them to the next one.
    let quiet = rig.ask_later(Request::Quiesce);
    assert_eq!(quiet.try_recv(), Ok(Ok(0)));
    let mut next = Rig::new(config(1));
    next.connect(&guest, FEATURES, Some(map_inflight(&file, 1, 32)), &[0]);
    next.poll(8);
    let lbas: Vec<u64> = next.requests.iter().map(|request| request.lba.0).collect();
    assert_eq!(lbas, [0, 6, 9]);
    drop(next);
    // Or it resumes.
    let (mut guest, mut rig, _) = setup(1);
    for head in [0, 3] {
        offer_read(&mut guest, 0, head, u64::from(head), 512);
    }
    rig.poll(8);
    let requests: Vec<_> = rig.requests.drain(..).collect();
    rig.refuse(&requests[0], Status::Superseded);
    rig.refuse(&requests[1], Status::Superseded);
    rig.device.resume();
    rig.poll(8);
    let lbas: Vec<u64> = rig.requests.iter().map(|request| request.lba.0).collect();
    assert_eq!(lbas, [0, 3], "in the order they were taken");
    rig.run(&mut disk);
    assert_eq!(guest.reap(0), [(0, 513), (3, 513)]);
}

#[test]
fn quiescing_answers_what_was_taken_and_takes_no_more() {
    let (mut guest, mut rig, mut disk) = setup(1);
    offer_read(&mut guest, 0, 0, 0, 512);
    rig.poll(8);
    let quiet = rig.ask_later(Request::Quiesce);
    offer_read(&mut guest, 0, 3, 0, 512);
    assert_eq!(quiet.try_recv(), Err(TryRecvError::Empty));
    rig.run(&mut disk);
    assert_eq!(quiet.try_recv(), Ok(Ok(0)));
    assert_eq!(guest.reap(0), [(0, 513)]);
}

#[test]
fn large_requests_wait_for_buffers_and_queues_share_them() {
    let guest = Guest::new(2, 32);
    let mut rig = Rig::new(config(2));
    let small = BufferPool::heap(0, 1);
    rig.device = crate::Device::new(config(2), small.clone());
    rig.connect(&guest, FEATURES, None, &[0, 0]);
    let (mut guest, mut disk) = (guest, vec![5; 1 << 20]);
    offer_read(&mut guest, 0, 0, 0, 600 * 1024);
    offer_read(&mut guest, 1, 3, 0, 512);
    let mut pieces = 0;
    while guest.used_index(0) == 0 || guest.used_index(1) == 0 {
        assert!(rig.poll(8) || !rig.requests.is_empty());
        assert_eq!(rig.requests.len(), 1, "one buffer, one piece");
        assert_eq!(rig.poll(8), pieces < 5, "more work waits for a buffer");
        let request = rig.requests.pop_front().unwrap();
        rig.execute(request, &mut disk);
        pieces += 1;
    }
    assert_eq!(pieces, 6);
    assert_eq!(guest.reap(0), [(0, 600 * 1024 + 1)]);
    assert_eq!(guest.reap(1), [(3, 513)]);
    assert_eq!(small.available(), (0, 1));
}

#[test]
fn writes_are_durable_when_the_guest_cannot_flush() {
    for (features, expected) in [(FEATURES, false), (FEATURES & !F_FLUSH, true)] {
        let mut guest = Guest::new(1, 32);
        let mut rig = Rig::new(config(1));
        rig.connect(&guest, features, None, &[0]);
        guest.request(0, 0, DATA, 1, 0, (DATA + 0x1000, 512));
        guest.offer(0, 0);
        guest.write(DATA + 0x1000, &0_u64.to_le_bytes());
        guest.write(DATA + 0x1008, &8_u64.to_le_bytes());
        guest.request(0, 3, DATA + 0x100, 13, 0, (DATA + 0x1000, 16));
        guest.offer(0, 3);
        rig.poll(8);
        for request in &rig.requests {
            match request.operation {
                Operation::Write { fua, .. } | Operation::WriteZeroes { fua } => {
                    assert_eq!(fua, expected);
                }
                Operation::Read { .. } | Operation::Flush | Operation::Discard => unreachable!(),
            }
        }
        assert_eq!(rig.requests.len(), 2);
    }
}

#[test]
fn four_kilobyte_blocks_ids_and_indirect_tables() {
    let mut config = config(1);
    config.block_size = BlockSize::B4096;
    config.blocks = 256;
    let mut guest = Guest::new(1, 32);
    let mut rig = Rig::new(config);
    rig.connect(&guest, FEATURES, None, &[0]);
    let mut disk = vec![9; 1 << 20];
    // Sector 8 is block 1; sectors 4 and half blocks are refused.
    for (sector, bytes, status, used) in [
        (8, 4096, 0, 4097),
        (4, 4096, 1, 1),
        (8, 512, 1, 1),
        (2040, 4096, 0, 4097),
        (2048, 4096, 1, 1),
    ] {
        guest.request(0, 0, DATA, 0, sector, (DATA + 0x1000, bytes));
        guest.offer(0, 0);
        rig.run(&mut disk);
        assert_eq!(guest.reap(0), [(0, used)], "{bytes} bytes at sector {sector}");
        assert_eq!(guest.status(DATA), status);
    }
    guest.request(0, 0, DATA, 8, 0, (DATA + 0x1000, 20));
    guest.offer(0, 0);
    rig.run(&mut disk);
    assert_eq!(guest.reap(0), [(0, 21)]);
    assert_eq!(guest.read(DATA + 0x1000, 20), *b"serial-of-the-test-d");
    // An indirect table behind a direct header; the table's write flag means nothing.
    guest.header(DATA, 0, 0);
    let table = DATA + 0x2000;
    let entry = |gpa, bytes, flags, next| crate::ring::Descriptor { gpa, bytes, flags, next };
    guest.write_descriptor(table, entry(DATA + 0x1000, 4096, F_NEXT | F_WRITE, 2));
    guest.write_descriptor(table + 32, entry(DATA + 16, 1, F_WRITE, 0));
    guest.descriptor(0, 0, DATA, 16, F_NEXT, 5);
    guest.descriptor(0, 5, table, 48, F_INDIRECT | F_WRITE, 0);
    guest.offer(0, 0);
    rig.run(&mut disk);
    assert_eq!(guest.reap(0), [(0, 4097)]);
    assert_eq!(guest.status(DATA), 0);
}

#[test]
fn what_was_not_offered_or_does_not_exist_is_refused() {
    let mut rig = Rig::new(config(2));
    rig.must(Request::Connected);
    let unknown = 1 << 40;
    assert_eq!(
        rig.ask(Request::Features(FEATURES | unknown)),
        Some(Err(ControlError::Features { unknown }))
    );
    let no_queue = Some(Err(ControlError::NoQueue { queue: 2, queues: 2 }));
    assert_eq!(rig.ask(Request::RingStop { queue: 2 }), no_queue);
    assert_eq!(rig.ask(Request::RingEnable { queue: 2, enable: true }), no_queue);
    assert_eq!(rig.ask(Request::RingEnable { queue: 2, enable: false }), no_queue);
    assert_eq!(rig.ask(Request::RingBase { queue: 2, base: 0 }), no_queue);
    assert_eq!(rig.ask(Request::Call { queue: 2, fd: None }), no_queue);
    for size in [0, 3, 2048] {
        let error = ControlError::RingSize { queue: 0, size, max: 1024 };
        assert_eq!(rig.ask(Request::RingSize { queue: 0, size }), Some(Err(error)));
    }
    // A ring that never started says where it would have.
    rig.must(Request::RingBase { queue: 0, base: 77 });
    assert_eq!(rig.ask(Request::RingStop { queue: 0 }), Some(Ok(77)));
}

#[test]
fn replies_to_nothing_change_nothing() {
    let (mut guest, mut rig, mut disk) = setup(1);
    offer_read(&mut guest, 0, 0, 0, 512);
    rig.poll(8);
    let id = rig.requests[0].id;
    for wrong in [id.0 ^ 1, id.0 ^ 1 << 24, id.0 ^ 1 << 41, id.0 ^ 1 << 57, u64::MAX] {
        let id = RequestId(wrong);
        rig.device.complete(BlockReply { id, status: Status::Ok, data: None });
    }
    assert_eq!(rig.device.busy(), 1);
    rig.run(&mut disk);
    rig.device.complete(BlockReply { id, status: Status::Ok, data: None });
    assert_eq!(guest.reap(0), [(0, 513)]);
    // A read answered without its data is an error for the guest, not stale memory.
    offer_read(&mut guest, 0, 0, 0, 512);
    rig.poll(8);
    let id = rig.requests[0].id;
    rig.device.complete(BlockReply { id, status: Status::Ok, data: None });
    assert_eq!(guest.reap(0), [(0, 1)]);
}

#[test]
fn an_in_flight_buffer_that_does_not_fit_stops_the_queue() {
    let mut guest = Guest::new(1, 32);
    let mut rig = Rig::new(config(1));
    let file = inflight_file(1, 16);
    rig.connect(&guest, FEATURES, Some(map_inflight(&file, 1, 16)), &[0]);
    offer_read(&mut guest, 0, 0, 0, 512);
    rig.poll(8);
    assert!(rig.requests.is_empty());
    assert_eq!(crate::testing::eventfd_count(&rig.errors[0]), 1);
}

/// Requests answered on the spot count against the budget: a guest cannot keep `poll` for ever.
#[test]
fn local_answers_are_bounded_too() {
    let (mut guest, mut rig, _) = setup(1);
    for head in (0..30).step_by(3) {
        guest.request(0, head, DATA + 0x20 * u64::from(head), 99, 0, (DATA, 0));
        guest.offer(0, head);
    }
    assert!(rig.poll(4));
    assert_eq!(guest.reap(0).len(), 4);
    assert!(!rig.poll(400));
    assert_eq!(guest.reap(0).len(), 6);
}

#[test]
fn steady_state_allocates_nothing() {
    let (mut guest, mut rig, mut disk) = setup(2);
    let mut allocated = 0;
    for round in 0..50 {
        for queue in 0..2 {
            for head in (0..24).step_by(3) {
                let bytes = if head == 6 { 200 * 1024 } else { 4096 };
                offer_read(&mut guest, queue, head, 0, bytes);
            }
        }
        let before = crate::testing::allocations();
        rig.poll(64);
        while let Some(request) = rig.requests.pop_front() {
            let reply = crate::testing::apply(request, &mut disk, BlockSize::B512);
            rig.device.complete(reply);
            if rig.requests.is_empty() {
                rig.poll(64);
            }
        }
        rig.device.flush_notifications();
        assert!(rig.device.poll_event().is_none());
        if round >= 2 {
            allocated += crate::testing::allocations() - before;
        }
        for queue in 0..2 {
            assert_eq!(guest.reap(queue).len(), 8, "round {round}");
        }
    }
    assert_eq!(allocated, 0, "allocations in steady state");
}

#[test]
fn a_front_end_that_shrinks_its_memory_loses_its_queues_and_harms_nobody_else() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(0x20_0000).unwrap();
    let mut guest = Guest::in_file(file.try_clone().unwrap(), 1, 32);
    let mut rig = Rig::new(config(1));
    rig.connect(&guest, FEATURES, None, &[0]);
    let (mut other, mut other_rig, mut other_disk) = setup(1);
    let mut disk = vec![9; 1 << 20];

    // One read under way, one write in the ring, when the file goes.
    offer_read(&mut guest, 0, 0, 0, 512);
    rig.poll(8);
    assert_eq!(rig.requests.len(), 1);
    guest.request(0, 3, DATA + 0x100, 1, 8, (DATA + 0x4000, 512));
    guest.offer(0, 3);
    file.set_len(0).unwrap();
    rig.run(&mut disk);
    assert!(rig.requests.is_empty(), "nothing is taken from memory that is gone");
    assert!(disk.iter().all(|byte| *byte == 9), "no zeroes were written in its place");
    assert_eq!(rig.device.busy(), 0);

    offer_read(&mut other, 0, 0, 0, 512);
    other_rig.run(&mut other_disk);
    assert_eq!(other.reap(0), [(0, 513)]);

    // The front end stops the ring, brings memory that is there, and starts it again.
    assert!(matches!(rig.ask(Request::RingStop { queue: 0 }), Some(Ok(_))));
    let mut again = Guest::new(1, 32);
    rig.must(Request::Memory(Arc::clone(&again.memory)));
    rig.set_up_ring(&again, 0, 0);
    offer_read(&mut again, 0, 0, 0, 512);
    rig.run(&mut disk);
    assert_eq!(again.reap(0), [(0, 513)]);
}

/// A destination of a migration that waits for its lease.
#[test]
fn without_a_head_rings_start_and_stop_and_keep_what_they_hold() {
    let (mut guest, mut rig, mut disk) = setup(1);
    offer_read(&mut guest, 0, 0, 0, 512);
    assert!(rig.device.without_head());
    rig.take_events();
    assert_eq!(rig.lives, [true], "the guest wants the volume");
    // Nobody would answer what is available, so nobody is kept waiting for it.
    let paused = rig.ask_later(Request::RingEnable { queue: 0, enable: false });
    assert_eq!(paused.try_recv(), Err(TryRecvError::Empty));
    assert!(rig.device.without_head());
    rig.take_events();
    assert_eq!(paused.try_recv(), Ok(Ok(0)));
    assert_eq!(rig.lives, [true, false]);
    assert_eq!(rig.ask(Request::Drained), Some(Err(ControlError::Undrained { queue: 0 })));
    // It goes on, and a head opens.
    rig.must(Request::RingEnable { queue: 0, enable: true });
    rig.run(&mut disk);
    assert_eq!(guest.reap(0), [(0, 513)]);
    rig.must(Request::Drained);
    // A front end that asks for the index is told the right one.
    offer_read(&mut guest, 0, 3, 0, 512);
    let paused = rig.ask_later(Request::RingEnable { queue: 0, enable: false });
    rig.device.without_head();
    rig.take_events();
    assert!(paused.try_recv().is_ok());
    assert_eq!(rig.ask(Request::RingStop { queue: 0 }), Some(Ok(1)));
}
