//! In steady state nothing allocates: a counting allocator watches.
#![allow(clippy::unwrap_used, reason = "in a test, panicking is reporting")]

mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use base::limits::HEADER_BYTES;
use ring::{Completion, ConnectionHandle, DeviceHandle, Receiver, Sender, Token};
use support::Fixture;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: everything is `System`'s; counting does not allocate.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller's promise is the one `System` asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) };
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: as above.
        unsafe { System.realloc(pointer, layout, bytes) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

struct Work {
    fixture: Fixture,
    device: DeviceHandle,
    from: ConnectionHandle,
    to: ConnectionHandle,
    mail: (Sender<u64>, Receiver<u64>),
}

/// A bit of everything: four gathered writes, a sync, four reads, sixty parts and headers from
/// one connection to another, mail.
fn round(work: &mut Work) {
    let Work { fixture, device, from, to, mail } = work;
    let reactor = &mut fixture.reactor;
    let mut outstanding = 0;
    for index in 0..4 {
        let parts = [0, 1, 2].map(|_| reactor.buffers().take(4096).unwrap().freeze().payload(4096));
        reactor.write(*device, index * 12288, parts, Token(index));
        let buffer = reactor.buffers().take(4096).unwrap();
        reactor.read(*device, index * 4096, buffer, 0, 4096, Token(index));
        outstanding += 2;
    }
    reactor.sync(*device, Token(9));
    outstanding += 1;
    let part = reactor.buffers().take(4096).unwrap().freeze().payload(300);
    for _ in 0..60 {
        reactor.send_bytes(*from, &[1; 100]).unwrap();
        reactor.send(*from, part.clone()).unwrap();
    }
    let buffer = reactor.buffers().take(60 * 400).unwrap();
    reactor.receive(*to, buffer, HEADER_BYTES..HEADER_BYTES + 60 * 400, 60 * 400);
    outstanding += 1;
    mail.0.try_send(7).unwrap();
    while outstanding > 0 {
        reactor.turn(None, false).unwrap();
        while let Some(completion) = reactor.next_completion() {
            match completion {
                Completion::Read { result, .. }
                | Completion::Written { result, .. }
                | Completion::Synced { result, .. } => result.unwrap(),
                Completion::Received { result, .. } => assert_eq!(result, Ok(60 * 400)),
                other => panic!("{other:?}"),
            }
            outstanding -= 1;
        }
    }
    assert_eq!(mail.1.receive(), Some(7));
}

#[test]
fn steady_state_does_not_allocate() {
    let config = ring::Config { small_buffers: 32, ..support::config() };
    let mut fixture = Fixture::with(&config);
    let directory = tempfile::tempdir().unwrap();
    let (device, _) = fixture.device(&directory, 1 << 20);
    let (from, to) = fixture.pair();
    let mail = fixture.reactor.mailbox(4);
    let mut work = Work { fixture, device, from, to, mail };
    for _ in 0..50 {
        round(&mut work);
    }
    let before = ALLOCATIONS.get();
    assert!(before > 0, "the allocator counts");
    for _ in 0..200 {
        round(&mut work);
    }
    assert_eq!(ALLOCATIONS.get() - before, 0, "allocations in 200 rounds of I/O");
}
