//! A disk grows under its front end.

use std::io::{ErrorKind, Read};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use base::BlockSize;
use vhost_blk::DeviceConfig;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::front_end::{FrontEnd, GET_CONFIG, halves};
use crate::support::{Backend, wait_for};

const SET_BACKEND_REQ_FD: u32 = 21;
const BLOCKS: u64 = 2048;

fn connect(backend: &Backend) -> (FrontEnd, UnixStream) {
    let mut front_end = FrontEnd::connect(&backend.path);
    front_end.negotiate();
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    assert!(front_end.set(SET_BACKEND_REQ_FD, &[], &[theirs.as_raw_fd()]));
    (front_end, ours)
}

fn capacity(front_end: &mut FrontEnd) -> u64 {
    let mut body = halves(&[0, 60, 0]);
    body.resize(12 + 60, 0);
    let (reply, _) = front_end.get(GET_CONFIG, &body).unwrap();
    u64::from_le_bytes(reply[12..20].try_into().unwrap())
}

/// CONFIG_CHANGE_MSG, version 1, no reply wanted, no body.
fn hears_of_a_change(channel: &mut UnixStream) {
    let mut message = [0; 12];
    channel.read_exact(&mut message).unwrap();
    assert_eq!(message[..], halves(&[2, 1, 0]));
}

fn hears_nothing(channel: &mut UnixStream) {
    channel.set_nonblocking(true).unwrap();
    assert_eq!(channel.read(&mut [0; 12]).unwrap_err().kind(), ErrorKind::WouldBlock);
    channel.set_nonblocking(false).unwrap();
}

fn grow(backend: &Backend, blocks: u64) {
    backend.shared.grow.store(blocks, Ordering::Release);
    backend.wake();
}

fn start_ring(front_end: &mut FrontEnd, backend: &Backend) -> EventFd {
    let memory = tempfile::tempfile().unwrap();
    memory.set_len(1 << 20).unwrap();
    let eventfd = EventFd::new(EFD_NONBLOCK).unwrap();
    let fds = (eventfd.as_raw_fd(), eventfd.as_raw_fd());
    front_end.set_up_queue(&memory, 1 << 20, 0x10_0000, 8, 0, fds);
    wait_for("the ring to run", || backend.shared.live.load(Ordering::Acquire));
    eventfd
}

#[test]
fn front_ends_hear_of_a_larger_disk_and_read_its_size() {
    let dir = tempfile::tempdir().unwrap();
    let config = DeviceConfig::new(BLOCKS, BlockSize::B512, "capacity-test");
    let backend = Backend::start(&dir.path().join("disk"), &config);
    let (mut front_end, mut channel) = connect(&backend);
    assert_eq!(capacity(&mut front_end), BLOCKS);
    let eventfd = start_ring(&mut front_end, &backend);
    hears_nothing(&mut channel);

    grow(&backend, 2 * BLOCKS);
    hears_of_a_change(&mut channel);
    assert_eq!(capacity(&mut front_end), 2 * BLOCKS);
    grow(&backend, 3 * BLOCKS);
    hears_of_a_change(&mut channel);

    // One that comes back is told again when it starts, since it may not have read the size.
    drop((front_end, channel, eventfd));
    wait_for("the front end to be gone", || !backend.shared.attached.load(Ordering::Acquire));
    let (mut front_end, mut channel) = connect(&backend);
    hears_nothing(&mut channel);
    let eventfd = start_ring(&mut front_end, &backend);
    hears_of_a_change(&mut channel);
    assert_eq!(capacity(&mut front_end), 3 * BLOCKS);

    // Smaller is no news, and a front end without a channel is none to tell.
    grow(&backend, BLOCKS);
    drop((front_end, channel, eventfd));
    wait_for("the front end to be gone", || !backend.shared.attached.load(Ordering::Acquire));
    let mut front_end = FrontEnd::connect(&backend.path);
    front_end.negotiate();
    grow(&backend, 4 * BLOCKS);
    wait_for("the disk to grow", || {
        backend.shared.disk.lock().unwrap().len() as u64 == 4 * BLOCKS * 512
    });
    assert_eq!(capacity(&mut front_end), 4 * BLOCKS);
    backend.stop();
}

#[test]
fn the_channel_is_handed_over() {
    let dir = tempfile::tempdir().unwrap();
    let config = DeviceConfig::new(BLOCKS, BlockSize::B512, "capacity-test");
    let backend = Backend::start(&dir.path().join("disk"), &config);
    let (mut front_end, mut channel) = connect(&backend);
    assert_eq!(capacity(&mut front_end), BLOCKS);
    let eventfd = start_ring(&mut front_end, &backend);
    let handover = backend.hand_over();
    let state = handover.state().connection.clone().unwrap();
    assert_eq!(state.channel.unwrap().known_blocks, Some(BLOCKS));

    // The next one gets some way and dies. Nothing has grown, so nothing is said.
    let lost = Backend::resume(handover.try_clone().unwrap(), &config, Arc::default()).unwrap();
    wait_for("the ring to run", || lost.shared.live.load(Ordering::Acquire));
    drop(lost);
    let mut backend = Backend::resume(handover, &config, Arc::default()).unwrap();
    backend.go();
    wait_for("the ring to run", || backend.shared.live.load(Ordering::Acquire));
    hears_nothing(&mut channel);
    grow(&backend, 2 * BLOCKS);
    hears_of_a_change(&mut channel);
    assert_eq!(capacity(&mut front_end), 2 * BLOCKS);

    // Grown between two processes, as far as the front end is concerned.
    let handover = backend.hand_over();
    let larger = DeviceConfig::new(3 * BLOCKS, BlockSize::B512, "capacity-test");
    let mut backend = Backend::resume(handover, &larger, Arc::default()).unwrap();
    backend.go();
    hears_of_a_change(&mut channel);
    assert_eq!(capacity(&mut front_end), 3 * BLOCKS);
    drop((front_end, channel, eventfd));
    backend.stop();
}

#[test]
fn a_front_end_that_does_not_read_its_channel_holds_up_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let config = DeviceConfig::new(BLOCKS, BlockSize::B512, "capacity-test");
    let backend = Backend::start(&dir.path().join("disk"), &config);
    let (mut front_end, channel) = connect(&backend);
    for round in 1..2000 {
        grow(&backend, BLOCKS + round);
        let bytes = (BLOCKS + round) * 512;
        wait_for("the disk to grow", || backend.shared.disk.lock().unwrap().len() as u64 == bytes);
    }
    assert_eq!(capacity(&mut front_end), BLOCKS + 1999);
    // Nor does one that hands over something else.
    let mut other = FrontEnd::connect(&backend.path);
    drop((front_end, channel));
    other.negotiate();
    let file = tempfile::tempfile().unwrap();
    assert!(!other.set(SET_BACKEND_REQ_FD, &[], &[file.as_raw_fd()]));
    backend.stop();
}
