//! Kicks and interrupts: none lost, and none that the other side said it does not want.

use std::cell::RefCell;
use std::rc::Rc;

use crate::config::F_EVENT_IDX;
use crate::control::Request;
use crate::testing::{
    DATA, FEATURES, Guest, Rig, config, eventfd_count, inflight_file, interrupted, map_inflight,
    set_hook,
};

fn rig(features: u64) -> (Guest, Rig, Vec<u8>) {
    let guest = Guest::new(1, 16);
    let mut rig = Rig::new(config(1));
    rig.connect(&guest, features, None, &[0]);
    (guest, rig, vec![0; 1 << 20])
}

fn offer(guest: &mut Guest, head: u16) {
    guest.request(0, head, DATA + 0x100 * u64::from(head), 0, 0, (DATA + 0x4000, 512));
    guest.offer(0, head);
}

#[test]
fn event_index_says_which_used_entry_interrupts() {
    let (mut guest, mut rig, mut disk) = rig(FEATURES);
    // (used_event, requests answered at once, interrupt?), the used index going on.
    let cases = [
        (0, 1, true),
        (0, 1, false),
        (4, 2, false), // now 4: entry 4 is the next
        (4, 1, true),
        (6, 3, true),
        (7, 1, false),
        (100, 3, false),
        (0xffff, 1, false),
    ];
    for (n, (event, requests, wanted)) in cases.into_iter().enumerate() {
        guest.set_used_event(0, event);
        for head in 0..requests {
            offer(&mut guest, head * 3);
        }
        rig.run(&mut disk);
        assert_eq!(interrupted(&rig, 0), wanted, "case {n}");
        assert_eq!(guest.reap(0).len(), usize::from(requests));
    }
}

#[test]
fn no_interrupt_flag_counts_without_event_index() {
    let (mut guest, mut rig, mut disk) = rig(FEATURES & !F_EVENT_IDX);
    for (flags, wanted) in [(0, true), (1, false), (0, true), (1, false)] {
        guest.set_available_flags(0, flags);
        offer(&mut guest, 0);
        offer(&mut guest, 3);
        rig.run(&mut disk);
        assert_eq!(eventfd_count(&rig.calls[0]), u64::from(wanted), "one signal for a turn");
        assert_eq!(guest.reap(0).len(), 2);
    }
}

#[test]
fn nothing_new_means_no_interrupt() {
    let (mut guest, mut rig, mut disk) = rig(FEATURES & !F_EVENT_IDX);
    offer(&mut guest, 0);
    rig.run(&mut disk);
    assert!(interrupted(&rig, 0));
    rig.run(&mut disk);
    rig.device.flush_notifications();
    assert!(!interrupted(&rig, 0));
}

#[test]
fn kicks_are_asked_for_when_idle_and_not_while_polling() {
    for features in [FEATURES, FEATURES & !F_EVENT_IDX] {
        let (mut guest, mut rig, mut disk) = rig(features);
        // The driver's rule for a kick after it made `guest.available` available.
        let kicks = |guest: &Guest| {
            if features & F_EVENT_IDX == 0 {
                guest.used_flags(0) & 1 == 0
            } else {
                guest.available_event(0).wrapping_add(1) == guest.available(0)
            }
        };
        for round in 0..40 {
            rig.run(&mut disk);
            offer(&mut guest, 0);
            assert!(kicks(&guest), "round {round}: idle");
            rig.run(&mut disk);
            rig.device.set_polling(true);
            rig.run(&mut disk);
            for head in [3, 6] {
                offer(&mut guest, head);
                rig.run(&mut disk);
            }
            offer(&mut guest, 9);
            assert!(!kicks(&guest), "round {round}: polling");
            // Came without a kick, while the reactor stops polling.
            rig.device.set_polling(false);
            rig.run(&mut disk);
            assert_eq!(guest.reap(0).len(), 4, "round {round}");
        }
    }
}

#[test]
fn a_request_that_comes_while_kicks_are_enabled_is_seen() {
    for features in [FEATURES, FEATURES & !F_EVENT_IDX] {
        let (mut guest, mut rig, mut disk) = rig(features);
        rig.device.set_polling(true);
        offer(&mut guest, 0);
        rig.run(&mut disk);
        assert_eq!(guest.reap(0), [(0, 513)]);
        rig.device.set_polling(false);
        // The guest looked just before it was told to kick, so it does not.
        let guest = Rc::new(RefCell::new(guest));
        let late = Rc::clone(&guest);
        let mut once = true;
        set_hook(Some(Box::new(move || {
            if once {
                once = false;
                offer(&mut late.borrow_mut(), 6);
            }
        })));
        rig.poll(8);
        set_hook(None);
        assert_eq!(rig.requests.len(), 1, "the late request was taken in the same turn");
        rig.run(&mut disk);
        assert_eq!(guest.borrow_mut().reap(0), [(6, 513)]);
    }
}

#[test]
fn a_wish_without_a_call_eventfd_is_kept_until_there_is_one() {
    let (mut guest, mut rig, mut disk) = rig(FEATURES & !F_EVENT_IDX);
    rig.must(Request::Call { queue: 0, fd: None });
    offer(&mut guest, 0);
    rig.run(&mut disk);
    assert!(!interrupted(&rig, 0));
    let call = rig.calls[0].try_clone().unwrap();
    rig.must(Request::Call { queue: 0, fd: Some(call) });
    rig.device.flush_notifications();
    assert!(interrupted(&rig, 0));
}

#[test]
fn a_restarted_back_end_interrupts_once_for_what_the_last_one_may_not_have() {
    let file = inflight_file(1, 16);
    let mut guest = Guest::new(1, 16);
    let mut disk = vec![0; 1 << 20];
    let mut first = Rig::new(config(1));
    first.connect(&guest, FEATURES, Some(map_inflight(&file, 1, 16)), &[0]);
    first.run(&mut disk);
    first.device.flush_notifications();
    eventfd_count(&first.calls[0]);
    offer(&mut guest, 0);
    first.poll(8);
    let request = first.requests.pop_front().unwrap();
    first.execute(request, &mut disk);
    // Used entry published; dies before `flush_notifications`.
    drop(first);
    let mut second = Rig::new(config(1));
    second.connect(&guest, FEATURES, Some(map_inflight(&file, 1, 16)), &[1]);
    second.run(&mut disk);
    assert!(interrupted(&second, 0));
    assert_eq!(guest.reap(0), [(0, 513)]);
}

#[test]
fn interrupts_follow_before_a_drain_is_answered() {
    let (mut guest, mut rig, mut disk) = rig(FEATURES);
    offer(&mut guest, 0);
    rig.poll(8);
    let stopped = rig.ask_later(Request::RingStop { queue: 0 });
    assert!(stopped.try_recv().is_err(), "parked while a request is under way");
    let request = rig.requests.pop_front().unwrap();
    rig.execute(request, &mut disk);
    assert_eq!(stopped.try_recv(), Ok(Ok(1)));
    assert!(interrupted(&rig, 0));
}
