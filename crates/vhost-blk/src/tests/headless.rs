//! Rings that are stopped while nobody is there to answer what was taken from them.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::TryRecvError;

use base::Status;

use crate::control::{ControlError, Request};
use crate::inflight::InflightQueue;
use crate::testing::{DATA, FEATURES, Guest, Rig, config, inflight_file, map_inflight, set_hook};

const SIZE: u16 = 32;

fn offer_read(guest: &mut Guest, head: u16, sector: u64) {
    let header = DATA + 0x20 * u64::from(head);
    let buffer = DATA + 0x1_0000 + 0x200 * u64::from(head);
    guest.request(0, head, header, 0, sector, (buffer, 512));
    guest.offer(0, head);
}

fn disk() -> Vec<u8> {
    (0..1_u32 << 20).map(|n| n.to_le_bytes()[1]).collect()
}

/// The head takes all that is offered, and is deposed: nothing of it was decided.
fn depose(rig: &mut Rig) {
    rig.poll(64);
    while let Some(request) = rig.requests.pop_front() {
        rig.refuse(&request, Status::Superseded);
    }
}

/// A source that went on with a head that had been deposed, and is stopped again.
#[test]
fn what_was_taken_and_never_decided_is_put_back() {
    let mut guest = Guest::new(1, SIZE);
    let mut rig = Rig::new(config(1));
    let file = inflight_file(1, SIZE);
    rig.connect(&guest, FEATURES, Some(map_inflight(&file, 1, SIZE)), &[0]);
    offer_read(&mut guest, 0, 7);
    rig.run(&mut disk());
    assert_eq!(guest.reap(0), [(0, 513)]);
    for (head, sector) in [(9, 1), (0, 2), (3, 3)] {
        offer_read(&mut guest, head, sector);
    }
    depose(&mut rig);
    // One more that nobody has taken.
    offer_read(&mut guest, 6, 4);
    let stopped = rig.ask_later(Request::RingStop { queue: 0 });
    assert_eq!(stopped.try_recv(), Err(TryRecvError::Empty), "a head may open in a moment");

    // Whenever this process dies meanwhile, the next one does each request once.
    let heads = [9, 0, 3, 6];
    let buffer = map_inflight(&file, 1, SIZE);
    let looks = Rc::new(RefCell::new(Vec::new()));
    let seen = Rc::clone(&looks);
    set_hook(Some(Box::new(move || {
        let queue = InflightQueue::new(&buffer, 0, SIZE).unwrap();
        let (left, _) = queue.recover(1, SIZE);
        assert_eq!(left, heads[..left.len()], "what follows is taken from the ring again");
        seen.borrow_mut().push(left.len());
    })));
    assert!(rig.device.without_head());
    set_hook(None);
    rig.take_events();
    assert_eq!(*looks.borrow(), [3, 2, 2, 1, 1, 0]);
    assert_eq!(stopped.try_recv(), Ok(Ok(1)), "where the guest is to go on");
    assert_eq!(rig.lives, [true, false]);

    // The destination, which knows that index only, does all four.
    let mut destination = Rig::new(config(1));
    destination.connect(&guest, FEATURES, None, &[1]);
    destination.run(&mut disk());
    assert_eq!(guest.reap(0), [(9, 513), (0, 513), (3, 513), (6, 513)]);
    // As does the source, had it gone on.
    assert_eq!(destination.ask(Request::RingStop { queue: 0 }), Some(Ok(5)));
}

/// With a later request answered before an earlier one no index says where to go on.
#[test]
fn a_stop_that_nobody_can_complete_is_refused() {
    let mut guest = Guest::new(1, SIZE);
    let mut rig = Rig::new(config(1));
    let file = inflight_file(1, SIZE);
    rig.connect(&guest, FEATURES, Some(map_inflight(&file, 1, SIZE)), &[0]);
    offer_read(&mut guest, 0, 1);
    offer_read(&mut guest, 3, 2);
    rig.poll(64);
    let first = rig.requests.pop_front().unwrap();
    let second = rig.requests.pop_front().unwrap();
    rig.execute(second, &mut disk());
    rig.refuse(&first, Status::Superseded);
    assert_eq!(guest.reap(0), [(3, 513)]);

    let stopped = rig.ask_later(Request::RingStop { queue: 0 });
    rig.must(Request::Hopeless { queue: 0 });
    assert_eq!(
        stopped.try_recv(),
        Err(TryRecvError::Empty),
        "its head is there, as far as is known"
    );
    rig.device.without_head();
    assert_eq!(stopped.try_recv(), Err(TryRecvError::Empty));
    rig.must(Request::Hopeless { queue: 0 });
    let refused = ControlError::NobodyAnswers { queue: 0, requests: 1 };
    assert_eq!(stopped.try_recv(), Ok(Err(refused)));

    // The front end comes back with its buffer: nothing is lost.
    rig.must(Request::Disconnected);
    rig.watched.clear();
    let mut next = Rig::new(config(1));
    let inflight = map_inflight(&file, 1, SIZE);
    next.connect(&guest, FEATURES, Some(Arc::clone(&inflight)), &[1]);
    next.run(&mut disk());
    assert_eq!(guest.reap(0), [(0, 513)]);
}
