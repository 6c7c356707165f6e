//! A connection moves from one back end to the next under load: the client, which has no way to
//! reconnect, sees no error, and every request is answered once.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use base::BlockSize;
use blkio::ReqFlags;
use vhost_blk::ListenerError;
use vhost_blk::handover::{FdIndex, Handover, HandoverError};

use crate::client::{Client, config, pattern};
use crate::front_end::{FrontEnd, GET_CONFIG, GET_VRING_BASE, SET_VRING_ENABLE, halves};
use crate::support::{Backend, wait_for};

const DEPTH: usize = 16;
const BYTES: usize = 8192;

/// Writes and reads back on two queues until told to stop; the number of requests answered grows.
fn work(client: &mut Client, stop: &AtomicBool, answered: &AtomicUsize) {
    let mut round = 0_u64;
    while !stop.load(Ordering::Acquire) {
        round += 1;
        let place = |queue: usize, slot: usize| (queue * DEPTH + slot) * BYTES;
        let data =
            |queue: usize, slot: usize| pattern(round << 16 | place(queue, slot) as u64, BYTES);
        for write in [true, false] {
            for queue in 0..2 {
                for slot in 0..DEPTH {
                    let (at, start) = (place(queue, slot), place(queue, slot) as u64);
                    let fill = if write { data(queue, slot) } else { vec![0xee; BYTES] };
                    client.fill(at, &fill);
                    let memory = client.at(at);
                    let queue = &mut client.queues[queue];
                    if write {
                        queue.write(start, memory, BYTES, slot, ReqFlags::empty());
                    } else {
                        queue.read(start, memory, BYTES, slot, ReqFlags::empty());
                    }
                }
            }
            for queue in 0..2 {
                let mut slots = [false; DEPTH];
                for (slot, result) in client.complete(queue, DEPTH) {
                    assert_eq!(result, 0, "round {round} queue {queue} slot {slot}");
                    assert!(!slots[slot], "slot {slot} was answered twice");
                    slots[slot] = true;
                    answered.fetch_add(1, Ordering::AcqRel);
                }
            }
        }
        for queue in 0..2 {
            for slot in 0..DEPTH {
                let read = client.bytes(place(queue, slot), BYTES);
                assert!(read == data(queue, slot), "round {round} queue {queue} slot {slot}");
            }
        }
    }
}

#[test]
fn a_client_under_load_does_not_notice_that_back_ends_change() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(BlockSize::B4096);
    let backend = Backend::start(&dir.path().join("disk"), &config);
    let mut client = Client::connect(&backend.path, 2);
    let (stop, answered) = (AtomicBool::new(false), AtomicUsize::new(0));
    let backend = std::thread::scope(|scope| {
        let mut backend = backend;
        let worker = scope.spawn(|| work(&mut client, &stop, &answered));
        for round in 0..24 {
            let seen = answered.load(Ordering::Acquire) + 7 * (round % 5) + 1;
            wait_for("answers", || {
                answered.load(Ordering::Acquire) >= seen || worker.is_finished()
            });
            assert!(!worker.is_finished(), "the client failed");
            let shared = Arc::clone(&backend.shared);
            if round % 3 == 0 {
                // With requests taken that are not answered here.
                shared.stall.store(true, Ordering::Release);
                wait_for("requests under way", || shared.busy.load(Ordering::Acquire) > 0);
            }
            let handover = backend.hand_over();
            assert!(handover.state().connection.is_some());
            shared.stall.store(false, Ordering::Release);
            if round % 4 == 0 {
                // The next one gets some way with the rings and dies: they are taken back.
                let lost = Backend::resume(handover.try_clone().unwrap(), &config, shared);
                let lost = lost.unwrap();
                let seen = answered.load(Ordering::Acquire) + 3;
                wait_for("answers", || answered.load(Ordering::Acquire) >= seen);
                let shared = Arc::clone(&lost.shared);
                drop(lost);
                assert!(dir.path().join("disk").exists(), "the socket is not its own to remove");
                backend = Backend::resume(handover, &config, shared).unwrap();
            } else {
                backend = Backend::resume(handover, &config, shared).unwrap();
            }
            backend.go();
        }
        stop.store(true, Ordering::Release);
        worker.join().unwrap();
        backend
    });
    // The control connection works as well.
    drop(client);
    wait_for("the end of the connection", || !backend.shared.attached.load(Ordering::Acquire));
    let mut client = Client::connect(&backend.path, 1);
    assert_eq!(client.read(0, 4096).len(), 4096);
    drop(client);
    backend.stop();
    assert!(!dir.path().join("disk").exists());
}

#[test]
fn what_was_negotiated_and_stopped_is_known_to_the_next_back_end() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(BlockSize::B512);
    config.drain_timeout = Duration::from_secs(10);
    let backend = Backend::start(&dir.path().join("disk"), &config);
    let mut front_end = FrontEnd::connect(&backend.path);
    front_end.negotiate();
    let handover = backend.hand_over();
    let state = handover.state().connection.clone().unwrap();
    assert!(state.features.is_some() && state.protocol_features.is_some());
    assert!(state.inflight.unwrap().own, "the front end has not brought a buffer");
    // A message that came while nobody served.
    let mut body = halves(&[0, 60, 0]);
    body.resize(12 + 60, 0);
    front_end.send(GET_CONFIG, &body);
    let shared = Arc::default();
    let config_bytes = usize::try_from(config.blocks).unwrap() * 512;
    let shared: Arc<crate::support::Shared> = shared;
    shared.disk.lock().unwrap().resize(config_bytes, 0);
    let mut backend = Backend::resume(handover, &config, shared).unwrap();
    front_end.socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    let early = std::io::Read::read(&mut &front_end.socket, &mut [0; 1]);
    assert!(early.is_err(), "the front end is not read from before `go`");
    front_end.socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    backend.go();
    // Needs CONFIG, MQ and REPLY_ACK to be known as negotiated.
    assert_eq!(front_end.reply().unwrap().0.len(), 12 + 60);
    assert!(front_end.set(SET_VRING_ENABLE, &halves(&[0, 1]), &[]));
    let (reply, _) = front_end.get(GET_VRING_BASE, &halves(&[0, 0])).unwrap();
    assert_eq!(reply, halves(&[0, 0]));
    backend.stop();
    assert!(front_end.is_dropped());
}

#[test]
fn states_that_do_not_fit_are_refused_and_the_front_end_stays_connected() {
    let dir = tempfile::tempdir().unwrap();
    let four = config(BlockSize::B4096);
    let backend = Backend::start(&dir.path().join("disk"), &four);
    let mut client = Client::connect(&backend.path, 2);
    let shared = Arc::clone(&backend.shared);
    let handover = backend.hand_over();
    let refused =
        |handover: Handover, config| match Backend::resume(handover, config, Arc::clone(&shared)) {
            Err(ListenerError::Handover { source, .. }) => source,
            Err(other) => panic!("{other}"),
            Ok(_) => panic!("it was taken"),
        };
    let fewer = vhost_blk::DeviceConfig { queues: 1, ..four.clone() };
    assert!(matches!(
        refused(handover.try_clone().unwrap(), &fewer),
        HandoverError::Refused { .. }
    ));
    // Every descriptor missing in turn, and every state with one used twice.
    let fds = |count: usize| -> Vec<OwnedFd> {
        handover.fds()[..count].iter().map(|fd| fd.try_clone().unwrap()).collect()
    };
    let all = handover.fds().len();
    assert!(all > 8, "two sockets, memory, in-flight buffer, kicks and calls");
    for count in 0..all {
        let part = Handover::new(handover.state().clone(), fds(count));
        assert!(matches!(refused(part, &four), HandoverError::Descriptor { .. }), "{count}");
    }
    let mut twice = handover.state().clone();
    twice.connection.as_mut().unwrap().memory[0].file = FdIndex(0);
    let error = refused(Handover::new(twice, fds(all)), &four);
    assert!(matches!(error, HandoverError::Descriptor { index: 0, .. }));
    let mut beyond = handover.state().clone();
    beyond.connection.as_mut().unwrap().memory[0].bytes += 1 << 40;
    let error = refused(Handover::new(beyond, fds(all)), &four);
    assert!(matches!(error, HandoverError::Refused { .. }));
    // After all that, the client is where it was.
    let mut backend = Backend::resume(handover, &four, Arc::clone(&shared)).unwrap();
    backend.go();
    assert_eq!(client.read(0, 4096), vec![0; 4096]);
    drop(client);
    backend.stop();
}
