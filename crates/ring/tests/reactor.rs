//! The turn: eventfds, mailboxes, deadlines, idleness; and the end.
#![allow(clippy::unwrap_used, reason = "in a test, panicking is reporting")]

mod support;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc;
use std::time::Duration;

use proptest::prelude::*;
use ring::{
    Completion, Config, ConnectionHandle, ErrorKind, Reactor, SocketOptions, Token, TrySendError,
};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use support::{Fixture, PATIENCE, config};

fn signal(eventfd: &OwnedFd) {
    rustix::io::write(eventfd, &1_u64.to_ne_bytes()).unwrap();
}

fn event(completion: &Completion) -> Option<Token> {
    match completion {
        Completion::EventFd { token } => Some(*token),
        _ => None,
    }
}

#[test]
fn eventfds_are_told_and_taken_blocking_or_not() {
    for flags in [EventfdFlags::empty(), EventfdFlags::NONBLOCK] {
        let mut fixture = Fixture::new();
        let eventfd = eventfd(0, flags).unwrap();
        let copy = eventfd.try_clone().unwrap();
        let watch = fixture.reactor.watch_eventfd(copy, Token(1)).unwrap();
        for _ in 0..10 {
            signal(&eventfd);
            assert_eq!(fixture.wait(event).1, Token(1));
            let mut polled = [PollFd::new(&eventfd, PollFlags::IN)];
            assert_eq!(
                poll(&mut polled, Some(&Timespec::default())),
                Ok(0),
                "the counter is taken"
            );
        }
        // Signalled by another thread while the reactor sleeps, thousands of times: the last
        // one is always told.
        let (tell, told) = mpsc::channel();
        let copy = eventfd.try_clone().unwrap();
        let thread = std::thread::spawn(move || {
            for _ in 0..2000 {
                signal(&copy);
                told.recv_timeout(PATIENCE).unwrap();
            }
        });
        for _ in 0..2000 {
            fixture.wait(event);
            tell.send(()).unwrap();
        }
        thread.join().unwrap();
        fixture.reactor.unwatch(watch);
        signal(&eventfd);
        fixture.reactor.turn(Some(ring::now() + Duration::from_millis(5)), false).unwrap();
        assert!(fixture.reactor.next_completion().is_none());
        fixture.reactor.turn(Some(ring::now() + Duration::from_millis(5)), false).unwrap();
        assert!(fixture.reactor.next_completion().is_none());
        // What came after unwatch is still there for the next one.
        fixture.reactor.watch_eventfd(eventfd, Token(2)).unwrap();
        assert_eq!(fixture.wait(event).1, Token(2));
    }
}

#[test]
fn only_eventfds_are_watched() {
    let mut fixture = Fixture::new();
    let file = tempfile::tempfile().unwrap();
    let error = fixture.reactor.watch_eventfd(file.into(), Token(0)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotAnEventFd);
}

#[test]
fn mail_wakes_the_reactor_and_all_of_it_arrives_in_order() {
    const EACH: u32 = 20_000;
    let mut reactor = Reactor::new(&config()).unwrap();
    let (sender, mut mail) = reactor.mailbox::<(u32, u32)>(64);
    let threads: Vec<_> = (0..2)
        .map(|id| {
            let sender = sender.clone();
            std::thread::spawn(move || {
                for number in 0..EACH {
                    let mut message = (id, number);
                    while let Err(error) = sender.try_send(message) {
                        let TrySendError::Full(back) = error else { panic!("{error:?}") };
                        message = back;
                        std::thread::yield_now();
                    }
                    if number % 64 == 0 {
                        std::thread::yield_now(); // lets the reactor fall asleep now and then
                    }
                }
            })
        })
        .collect();
    drop(sender);
    let deadline = ring::now() + PATIENCE;
    let mut next = [0, 0];
    while next != [EACH, EACH] {
        // No deadline: a lost wake-up would hang; the watchdog deadline makes it fail instead.
        reactor.turn(Some(deadline), false).unwrap();
        assert!(ring::now() < deadline, "a wake-up was lost at {next:?}");
        while let Some((id, number)) = mail.receive() {
            assert_eq!(number, next[id as usize]);
            next[id as usize] += 1;
        }
    }
    for thread in threads {
        thread.join().unwrap();
    }
    assert!(mail.is_orphaned());
    assert!(mail.receive().is_none());
}

#[test]
fn a_full_mailbox_gives_the_message_back_and_a_closed_one_too() {
    let reactor = Reactor::new(&config()).unwrap();
    let (sender, mail) = reactor.mailbox::<String>(2);
    sender.try_send("a".into()).unwrap();
    sender.try_send("b".into()).unwrap();
    assert_eq!(sender.try_send("c".into()), Err(TrySendError::Full("c".into())));
    drop(mail);
    assert_eq!(sender.try_send("d".into()), Err(TrySendError::Closed("d".into())));
}

#[test]
fn a_wakeup_ends_this_turn_or_the_next() {
    let mut reactor = Reactor::new(&config()).unwrap();
    let wakeup = reactor.wakeup();
    let watchdog = || Some(ring::now() + PATIENCE);
    wakeup.wake();
    let turn = reactor.turn(watchdog(), false).unwrap();
    assert!(turn.woken && turn.slept.is_zero());
    for _ in 0..100 {
        let wakeup = wakeup.clone();
        let thread = std::thread::spawn(move || wakeup.wake());
        let deadline = watchdog();
        while !reactor.turn(deadline, false).unwrap().woken {}
        assert!(ring::now() < deadline.unwrap(), "a wake-up was lost");
        thread.join().unwrap();
    }
}

#[test]
fn deadlines_are_kept() {
    for poll in [Duration::ZERO, Duration::from_micros(50)] {
        let mut reactor = Reactor::new(&Config { poll, ..config() }).unwrap();
        for micros in [0, 100, 1000, 20_000] {
            let deadline = ring::now() + Duration::from_micros(micros);
            let give_up = deadline + PATIENCE;
            while reactor.now() < deadline {
                reactor.turn(Some(deadline), false).unwrap();
            }
            assert!(reactor.now() < give_up);
            assert!(reactor.now() <= ring::now());
        }
        // A deadline that is past, and a busy turn, do not sleep.
        for _ in 0..1000 {
            assert!(reactor.turn(Some(base::Instant::ZERO), false).unwrap().slept.is_zero());
            assert!(reactor.turn(None, true).unwrap().slept.is_zero());
        }
    }
}

/// CPU time of this thread.
fn thread_cpu() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap())
}

#[test]
fn an_idle_reactor_costs_next_to_nothing() {
    let mut fixture = Fixture::new();
    let (a, b) = fixture.pair();
    let buffer = fixture.reactor.buffers().take(4096).unwrap();
    fixture.reactor.receive(a, buffer, 0..4096, 1);
    // Teach it that polling pays.
    let wakeup = fixture.reactor.wakeup();
    for _ in 0..1000 {
        wakeup.wake();
        fixture.reactor.turn(None, false).unwrap();
    }
    let before = thread_cpu();
    let end = ring::now() + Duration::from_secs(1);
    let mut turns = 0;
    while ring::now() < end {
        // Ticks of 10 ms, as a shell with timers has them.
        let tick = ring::now() + Duration::from_millis(10);
        fixture.reactor.turn(Some(tick.min(end)), false).unwrap();
        turns += 1;
    }
    let spent = thread_cpu().saturating_sub(before);
    // What as many sleeps cost without a reactor: on a machine full of other work, many times as much.
    let before = thread_cpu();
    for _ in 0..turns {
        std::thread::sleep(Duration::from_millis(10));
    }
    let asleep = thread_cpu().saturating_sub(before);
    println!("an idle second: {turns} turns, {spent:?} of CPU; asleep {asleep:?}");
    assert!(turns <= 250, "{turns} turns in an idle second");
    // 0.1 % is 1 ms; the bound leaves room for a loaded machine.
    let bound = Duration::from_millis(10) + 4 * asleep;
    assert!(spent < bound, "an idle second cost {spent:?}, as many sleeps {asleep:?}");
    fixture.reactor.close(a);
    fixture.reactor.close(b);
}

/// What an owner can start. Small numbers choose among what there is.
#[derive(Clone, Copy, Debug)]
enum Step {
    Read { at: u8, large: bool },
    Write { at: u8, parts: u8 },
    Sync,
    Discard { at: u8 },
    Receive { connection: u8, min_bytes: u16 },
    Send { connection: u8, bytes: u16 },
    SendBytes { connection: u8, bytes: u8 },
    Close { connection: u8 },
    CloseAfterSend { connection: u8 },
    Pair,
    Turn,
    Drain,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (any::<u8>(), any::<bool>()).prop_map(|(at, large)| Step::Read { at, large }),
        3 => (any::<u8>(), 0..6_u8).prop_map(|(at, parts)| Step::Write { at, parts }),
        1 => Just(Step::Sync),
        1 => any::<u8>().prop_map(|at| Step::Discard { at }),
        5 => (any::<u8>(), 1..5000_u16)
            .prop_map(|(connection, min_bytes)| Step::Receive { connection, min_bytes }),
        5 => (any::<u8>(), 1..4096_u16)
            .prop_map(|(connection, bytes)| Step::Send { connection, bytes }),
        2 => (any::<u8>(), 0..136_u8)
            .prop_map(|(connection, bytes)| Step::SendBytes { connection, bytes }),
        1 => any::<u8>().prop_map(|connection| Step::Close { connection }),
        1 => any::<u8>().prop_map(|connection| Step::CloseAfterSend { connection }),
        2 => Just(Step::Pair),
        4 => Just(Step::Turn),
        2 => Just(Step::Drain),
    ]
}

/// What is expected to come back.
#[derive(Default)]
struct Expected {
    device: u32,
    receives: u32,
    /// With: the outstanding receive, if there is one, and whether it was started before a close;
    /// a close was asked for.
    connections: Vec<(ConnectionHandle, Option<bool>, bool)>,
    open: usize,
}

impl Expected {
    fn take(&mut self, reactor: &mut Reactor) {
        while let Some(completion) = reactor.next_completion() {
            match completion {
                Completion::Read { .. }
                | Completion::Written { .. }
                | Completion::Synced { .. }
                | Completion::Discarded { .. } => self.device -= 1,
                Completion::Received { connection, .. } => {
                    self.receives -= 1;
                    if let Some(entry) = self.connections.iter_mut().find(|c| c.0 == connection) {
                        entry.1 = None;
                    }
                }
                Completion::Closed { connection } => {
                    // A receive that was started after the close may be refused after this.
                    assert!(
                        !self.connections.iter().any(|c| c.0 == connection && c.1 == Some(true)),
                        "closed before its receive came back"
                    );
                    self.connections.retain(|c| c.0 != connection);
                    self.open -= 1;
                }
                Completion::Writable { .. } | Completion::SendFailed { .. } => {}
                other => panic!("not asked for: {other:?}"),
            }
        }
    }

    fn pick(&mut self, index: u8) -> Option<&mut (ConnectionHandle, Option<bool>, bool)> {
        let count = self.connections.len().max(1);
        self.connections.get_mut(usize::from(index) % count)
    }
}

fn perform(fixture: &mut Fixture, device: ring::DeviceHandle, expected: &mut Expected, step: Step) {
    let reactor = &mut fixture.reactor;
    let offset = |at: u8| u64::from(at % 64) * 4096; // some are beyond the end
    match step {
        Step::Read { at, large } => {
            let bytes = if large { 16384 } else { 4096 };
            if let Some(buffer) = reactor.buffers().take(bytes) {
                reactor.read(device, offset(at), buffer, 0, bytes, Token(0));
                expected.device += 1;
            }
        }
        Step::Write { at, parts } => {
            let parts: Vec<_> = (0..parts)
                .filter_map(|_| Some(reactor.buffers().take(4096)?.freeze().payload(4096)))
                .collect();
            reactor.write(device, offset(at), parts, Token(0));
            expected.device += 1;
        }
        Step::Sync => {
            reactor.sync(device, Token(0));
            expected.device += 1;
        }
        Step::Discard { at } => {
            reactor.discard(device, offset(at), 8192, Token(0));
            expected.device += 1;
        }
        Step::Receive { connection, min_bytes } => {
            let Some((connection, receiving @ None, closing)) = expected.pick(connection) else {
                return;
            };
            if let Some(buffer) = reactor.buffers().take(4096) {
                *receiving = Some(!*closing);
                let min_bytes = usize::from(min_bytes);
                reactor.receive(*connection, buffer, 100..100 + min_bytes.max(2000), min_bytes);
                expected.receives += 1;
            }
        }
        Step::Send { connection, bytes } => {
            let Some((connection, ..)) = expected.pick(connection) else { return };
            if let Some(buffer) = reactor.buffers().take(4096) {
                let part = buffer.freeze().payload(usize::from(bytes));
                let _ = reactor.send(*connection, part); // may be closing
            }
        }
        Step::SendBytes { connection, bytes } => {
            let Some((connection, ..)) = expected.pick(connection) else { return };
            let _ = reactor.send_bytes(*connection, &vec![7; usize::from(bytes)]);
        }
        Step::Close { connection } => {
            let Some((connection, _, closing)) = expected.pick(connection) else { return };
            *closing = true;
            reactor.close(*connection);
        }
        Step::CloseAfterSend { connection } => {
            let Some((connection, _, closing)) = expected.pick(connection) else { return };
            *closing = true;
            reactor.close_after_send(*connection);
        }
        Step::Pair if expected.open >= 12 => {}
        Step::Pair => {
            let (a, b) = fixture.pair();
            expected.connections.extend([(a, None, false), (b, None, false)]);
            expected.open += 2;
        }
        Step::Turn => {
            reactor.turn(None, true).unwrap();
        }
        Step::Drain => expected.take(reactor),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever an owner does, in whatever order: every operation completes once, no connection
    /// is closed before its receive came back, and in the end every buffer is in the pool.
    #[test]
    fn every_buffer_comes_back(steps in proptest::collection::vec(step(), 1..150), end: bool) {
        let config = Config { entries: 8, small_buffers: 24, large_buffers: 2, ..config() };
        let mut fixture = Fixture::with(&config);
        let pool = fixture.reactor.buffers().clone();
        let directory = tempfile::tempdir().unwrap();
        let (device, _) = fixture.device(&directory, 60 * 4096);
        let mut expected = Expected::default();
        for step in steps {
            perform(&mut fixture, device, &mut expected, step);
        }
        if end {
            for (connection, ..) in expected.connections.clone() {
                fixture.reactor.close(connection);
            }
            let deadline = ring::now() + PATIENCE;
            while expected.device + expected.receives > 0 || expected.open > 0 {
                prop_assert!(ring::now() < deadline, "operations did not come back");
                fixture.reactor.turn(Some(deadline), false).unwrap();
                expected.take(&mut fixture.reactor);
            }
            prop_assert_eq!(pool.available(), (24, 2));
        }
        // Dropped with whatever is under way.
        drop(fixture);
        prop_assert_eq!(pool.available(), (24, 2));
    }
}

#[test]
fn a_dropped_reactor_waits_for_the_kernel() {
    let config = config();
    let mut fixture = Fixture::new();
    let pool = fixture.reactor.buffers().clone();
    let (a, b) = fixture.pair();
    let eventfd = eventfd(0, EventfdFlags::empty()).unwrap();
    fixture.reactor.watch_eventfd(eventfd, Token(0)).unwrap();
    let address = "127.0.0.1:0".parse().unwrap();
    fixture.reactor.listen(&address, SocketOptions::default()).unwrap();
    for connection in [a, b] {
        let buffer = pool.take(4096).unwrap();
        fixture.reactor.receive(connection, buffer, 0..4096, 4096);
    }
    let part = pool.take(131_072).unwrap().freeze().payload(131_072);
    for _ in 0..20 {
        fixture.reactor.send(a, part.clone()).unwrap();
    }
    drop(part);
    fixture.reactor.turn(None, true).unwrap();
    assert_eq!(pool.available(), (config.small_buffers - 2, config.large_buffers - 1));
    let (our_end, their_end) = std::os::unix::net::UnixStream::pair().unwrap();
    fixture.reactor.adopt(our_end.into(), SocketOptions::default()).unwrap();
    drop(fixture);
    assert_eq!(pool.available(), (config.small_buffers, config.large_buffers));
    // Its sockets are closed.
    let mut byte = [0];
    assert_eq!(rustix::io::read(their_end.as_fd(), &mut byte), Ok(0));
}
