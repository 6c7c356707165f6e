//! The socket: paths, handshakes, messages that no front end should send, and front ends that die
//! and come back to their in-flight requests.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::front_end::{
    ADD_MEM_REG, CHECK_DEVICE_STATE, FrontEnd, GET_CONFIG, GET_FEATURES, GET_INFLIGHT_FD,
    GET_MAX_MEM_SLOTS, GET_PROTOCOL_FEATURES, GET_QUEUE_NUM, GET_VRING_BASE, REM_MEM_REG,
    SET_DEVICE_STATE_FD, SET_FEATURES, SET_INFLIGHT_FD, SET_LOG_BASE, SET_MEM_TABLE,
    SET_PROTOCOL_FEATURES, SET_VRING_ADDR, SET_VRING_CALL, SET_VRING_ENABLE, SET_VRING_KICK,
    SET_VRING_NUM, halves, message, words,
};
use crate::support::{Backend, wait_for};
use base::BlockSize;
use vhost_blk::{Control, DeviceConfig, Listener, ListenerError, SinkClosed};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

fn config() -> DeviceConfig {
    let mut config = DeviceConfig::new(2048, BlockSize::B512, "socket-test");
    config.queues = 2;
    config.drain_timeout = Duration::from_secs(10);
    config
}

fn nowhere(_: Control) -> Result<(), SinkClosed> {
    Err(SinkClosed)
}

#[test]
fn paths_that_cannot_be_served_say_why() {
    let dir = tempfile::tempdir().unwrap();
    let long = dir.path().join("x".repeat(120));
    let error = Listener::start(&long, config(), nowhere).unwrap_err();
    assert!(matches!(error, ListenerError::NameTooLong { .. }), "{error}");

    let missing = dir.path().join("no/such/directory");
    let error = Listener::start(&missing, config(), nowhere).unwrap_err();
    assert!(error.to_string().contains("No such file or directory"), "{error}");
    assert!(error.to_string().contains("no/such"), "{error}");

    let file = dir.path().join("precious");
    std::fs::write(&file, b"data").unwrap();
    let error = Listener::start(&file, config(), nowhere).unwrap_err();
    assert!(matches!(error, ListenerError::NotASocket { .. }), "{error}");
    assert_eq!(std::fs::read(&file).unwrap(), b"data");
    let error = Listener::start(&file.join("below"), config(), nowhere).unwrap_err();
    assert!(matches!(error, ListenerError::Io { .. }), "{error}");

    let live = dir.path().join("live");
    let first = Listener::start(&live, config(), nowhere).unwrap();
    let error = Listener::start(&live, config(), nowhere).unwrap_err();
    assert!(matches!(error, ListenerError::InUse { .. }), "{error}");
    assert!(live.exists(), "the live one keeps its socket");
    first.stop();
    assert!(!live.exists());

    let stale = dir.path().join("stale");
    drop(UnixListener::bind(&stale).unwrap());
    assert!(stale.exists());
    let listener = Listener::start(&stale, config(), nowhere).unwrap();
    // Somebody replaced our file: theirs is not removed.
    std::fs::remove_file(&stale).unwrap();
    let theirs = UnixListener::bind(&stale).unwrap();
    listener.stop();
    assert!(stale.exists());
    drop(theirs);

    let mut wrong = config();
    wrong.queue_size_max = 100;
    let error = Listener::start(&stale, wrong, nowhere).unwrap_err();
    assert!(matches!(error, ListenerError::Config(_)), "{error}");
}

#[test]
fn the_handshake_offers_what_qemu_and_cloud_hypervisor_need() {
    let dir = tempfile::tempdir().unwrap();
    let backend = Backend::start(&dir.path().join("disk"), &config());
    let mut front_end = FrontEnd::connect(&backend.path);
    let features = front_end.negotiate();
    // SEG_MAX, BLK_SIZE, FLUSH, TOPOLOGY, MQ, DISCARD, WRITE_ZEROES, LOG_ALL, INDIRECT_DESC,
    // EVENT_IDX, PROTOCOL_FEATURES, VERSION_1; neither RO nor SIZE_MAX.
    let bits = [2, 6, 9, 10, 12, 13, 14, 26, 28, 29, 30, 32];
    assert_eq!(features, bits.iter().map(|bit| 1_u64 << bit).sum::<u64>());
    // MQ, LOG_SHMFD, REPLY_ACK, BACKEND_REQ, CONFIG, INFLIGHT_SHMFD, CONFIGURE_MEM_SLOTS, DEVICE_STATE; never
    // STATUS (16).
    let protocol = front_end.get_u64(GET_PROTOCOL_FEATURES);
    assert_eq!(protocol, [0, 1, 3, 5, 9, 12, 15, 19].iter().map(|bit| 1_u64 << bit).sum::<u64>());
    assert_eq!(front_end.get_u64(GET_QUEUE_NUM), 2);
    assert_eq!(front_end.get_u64(GET_MAX_MEM_SLOTS), 256);
    for size in [57_u32, 60, 96] {
        let mut body = halves(&[0, size, 0]);
        body.resize(12 + size as usize, 0);
        let (reply, _) = front_end.get(GET_CONFIG, &body).unwrap();
        assert_eq!(reply.len(), 12 + size as usize);
        let space = &reply[12..];
        assert_eq!(space[..8], 2048_u64.to_le_bytes(), "capacity in sectors");
        assert_eq!(space[20..24], 512_u32.to_le_bytes());
        assert_eq!(space[34..36], 2_u16.to_le_bytes());
        assert_eq!(space[56], 1);
    }
    backend.stop();
}

#[test]
fn capacity_is_in_sectors_whatever_the_block_size() {
    let config = DeviceConfig::new(1000, BlockSize::B4096, "x");
    assert_eq!(config.config_space()[..8], 8000_u64.to_le_bytes());
    assert_eq!(config.config_space()[20..24], 4096_u32.to_le_bytes());
}

fn memory(bytes: u64) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(bytes).unwrap();
    file
}

const ACK: u32 = 1 | 8;

/// Messages that are wrong by themselves. What, the bytes, descriptors to go with them.
fn malformed_messages() -> Vec<(&'static str, Vec<u8>, usize)> {
    vec![
        ("noise", vec![0xff; 64], 0),
        ("version 0", message(GET_FEATURES, 0, &[]), 0),
        ("version 3", message(GET_FEATURES, 3, &[]), 0),
        ("too long", halves(&[SET_MEM_TABLE, 1, 0x0010_0000]), 0),
        ("body where none belongs", message(GET_FEATURES, 1, &[0; 8]), 0),
        ("body too short", message(SET_FEATURES, 1, &[0; 7]), 0),
        ("unknown request", message(99, 1, &[]), 0),
        ("a reply", message(GET_FEATURES, 5, &[]), 0),
        ("features not offered", message(SET_FEATURES, ACK, &words(&[1 << 50])), 0),
        ("STATUS", message(SET_PROTOCOL_FEATURES, ACK, &words(&[1 << 16])), 0),
    ]
}

/// Messages that are well-formed, but not for this device.
fn wrong_messages() -> Vec<(&'static str, Vec<u8>, usize)> {
    let mut misaligned = halves(&[0, 0]);
    misaligned.extend(words(&[1, 0, 0, 0]));
    let mut table = halves(&[2, 0]);
    table.extend(words(&[0, 0x1000, 0, 0, 0x1000, 0x1000, 0x1000, 0]));
    let mut overlapping = halves(&[2, 0]);
    overlapping.extend(words(&[0, 0x2000, 0, 0, 0x1000, 0x1000, 0x4000, 0]));
    let mut inflight = words(&[64, 0]);
    inflight.extend([1, 0, 0, 4, 0, 0, 0, 0]);
    let mut many_queues = words(&[0, 0]);
    many_queues.extend([9, 0, 8, 0, 0, 0, 0, 0]);
    vec![
        (
            "surplus descriptors in place",
            message(ADD_MEM_REG, ACK, &words(&[0, 0, 0x1000, 0, 0])),
            40,
        ),
        ("no descriptor", message(ADD_MEM_REG, ACK, &words(&[0, 0, 0x1000, 0, 0])), 0),
        ("memory beyond its file", message(ADD_MEM_REG, ACK, &words(&[0, 0, 0x1_0001, 0, 0])), 1),
        (
            "memory that wraps",
            message(ADD_MEM_REG, ACK, &words(&[0, u64::MAX - 5, 0x1000, 0, 0])),
            1,
        ),
        ("unknown memory removed", message(REM_MEM_REG, ACK, &words(&[0, 0, 0x1000, 0, 0])), 0),
        ("table with too few descriptors", message(SET_MEM_TABLE, ACK, &table), 1),
        ("table that overlaps", message(SET_MEM_TABLE, ACK, &overlapping), 2),
        ("ring of 3", message(SET_VRING_NUM, ACK, &halves(&[0, 3])), 0),
        ("ring of 2^20", message(SET_VRING_NUM, ACK, &halves(&[0, 1 << 20])), 0),
        ("queue 2 of 2", message(SET_VRING_NUM, ACK, &halves(&[2, 8])), 0),
        ("queue 2^16", message(GET_VRING_BASE, 1, &halves(&[1 << 16, 0])), 0),
        ("misaligned ring", message(SET_VRING_ADDR, ACK, &misaligned), 0),
        ("kick that is no eventfd", message(SET_VRING_KICK, ACK, &words(&[0])), 1),
        ("call that is no eventfd", message(SET_VRING_CALL, ACK, &words(&[0])), 1),
        ("ring without a kick", message(SET_VRING_KICK, ACK, &words(&[0x100])), 0),
        ("half enabled", message(SET_VRING_ENABLE, ACK, &halves(&[0, 2])), 0),
        ("log beyond its file", message(SET_LOG_BASE, 1, &words(&[0x2_0000, 0])), 1),
        ("in-flight buffer too short", message(SET_INFLIGHT_FD, ACK, &inflight), 1),
        ("in-flight buffer for 9 queues", message(GET_INFLIGHT_FD, 1, &many_queues), 0),
    ]
}

#[test]
fn a_bad_message_ends_its_connection_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let backend = Backend::start(&dir.path().join("disk"), &config());
    let other = Backend::start(&dir.path().join("other"), &config());
    let mut bystander = FrontEnd::connect(&other.path);
    bystander.negotiate();

    let file = memory(0x1_0000);
    let fds: Vec<RawFd> = vec![file.as_raw_fd(); 40];
    let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let before = descriptors();
    for (what, bytes, count) in malformed_messages().into_iter().chain(wrong_messages()) {
        let mut front_end = FrontEnd::connect(&backend.path);
        front_end.negotiate();
        front_end.raw(&bytes, &fds[..count]);
        // A refusal may be acknowledged as one before the connection ends.
        if let Some((reply, _)) = front_end.reply() {
            assert_ne!(reply, words(&[0]), "{what}: accepted");
            assert!(front_end.is_dropped(), "{what}: still connected after {reply:?}");
        }
    }
    // The configuration space ends somewhere: an empty answer, by the protocol.
    let mut front_end = FrontEnd::connect(&backend.path);
    front_end.negotiate();
    let mut beyond = halves(&[200, 100, 0]);
    beyond.resize(112, 0);
    let (reply, _) = front_end.get(GET_CONFIG, &beyond).unwrap();
    assert_eq!(reply.len(), 12);
    drop(front_end);
    // More descriptors than any message has: closed, and that message with them, which is how
    // the `vhost` crate reads it. What follows is a message again.
    let mut front_end = FrontEnd::connect(&backend.path);
    front_end.negotiate();
    assert!(front_end.raw(&message(GET_FEATURES, 1, &[]), &fds));
    assert_eq!(front_end.get_u64(GET_QUEUE_NUM), 2);
    drop(front_end);
    // Half a message, then nothing.
    let mut front_end = FrontEnd::connect(&backend.path);
    front_end.raw(&message(SET_FEATURES, 1, &words(&[0]))[..15], &[]);
    drop(front_end);
    wait_for("descriptors to be closed", || descriptors() <= before);
    assert_eq!(bystander.get_u64(GET_QUEUE_NUM), 2, "the other volume's front end");
    FrontEnd::connect(&backend.path).negotiate();
    drop(bystander);
    other.stop();
    backend.stop();
}

#[test]
fn the_next_front_end_waits_for_the_one_before() {
    let dir = tempfile::tempdir().unwrap();
    let backend = Backend::start(&dir.path().join("disk"), &config());
    let mut first = FrontEnd::connect(&backend.path);
    first.negotiate();
    let mut second = FrontEnd::connect(&backend.path);
    second.send(GET_FEATURES, &[]);
    second.socket.set_nonblocking(true).unwrap();
    assert!(second.socket.read(&mut [0]).is_err(), "nothing yet");
    assert_eq!(first.get_u64(GET_QUEUE_NUM), 2, "the first is not displaced");
    drop(first);
    second.socket.set_nonblocking(false).unwrap();
    assert_eq!(second.reply().unwrap().0.len(), 8);
    drop(second);
    backend.stop();
}

const BASE: u64 = 0x7fff_0000_0000;
const SIZE: u16 = 16;

/// A driver that writes at offsets of its memory file.
struct Driver {
    file: File,
    kick: EventFd,
    call: EventFd,
    available: u16,
}

impl Driver {
    fn new() -> Self {
        Self {
            file: memory(0x2_0000),
            kick: EventFd::new(EFD_NONBLOCK).unwrap(),
            call: EventFd::new(EFD_NONBLOCK).unwrap(),
            available: 0,
        }
    }

    fn descriptor(&self, index: u16, offset: u64, bytes: u32, flags: u16, next: u16) {
        let mut raw = words(&[BASE + offset]);
        raw.extend(bytes.to_le_bytes());
        raw.extend(flags.to_le_bytes());
        raw.extend(next.to_le_bytes());
        self.file.write_all_at(&raw, u64::from(index) * 16).unwrap();
    }

    /// Writes one sector of `fill`; the request's head is `head`.
    fn write(&mut self, head: u16, sector: u64, fill: u8) {
        let header = 0x4000 + 0x100 * u64::from(head);
        let data = 0x8000 + 0x200 * u64::from(head);
        self.file.write_all_at(&words(&[1, sector]), header).unwrap();
        self.file.write_all_at(&[0xff], header + 16).unwrap();
        self.file.write_all_at(&[fill; 512], data).unwrap();
        self.descriptor(head, header, 16, 1, head + 1);
        self.descriptor(head + 1, data, 512, 1, head + 2);
        self.descriptor(head + 2, header + 16, 1, 2, 0);
        let slot = 0x1004 + 2 * u64::from(self.available % SIZE);
        self.file.write_all_at(&head.to_le_bytes(), slot).unwrap();
        self.available += 1;
        self.file.write_all_at(&self.available.to_le_bytes(), 0x1002).unwrap();
        self.kick.write(1).unwrap();
    }

    fn used(&self) -> Vec<u32> {
        let mut index = [0; 2];
        self.file.read_exact_at(&mut index, 0x2002).unwrap();
        (0..u64::from(u16::from_le_bytes(index)))
            .map(|n| {
                let mut head = [0; 4];
                self.file.read_exact_at(&mut head, 0x2004 + 8 * n).unwrap();
                u32::from_le_bytes(head)
            })
            .collect()
    }

    fn set_up(&self, path: &Path, start: u32, inflight: Option<&File>) -> (FrontEnd, Option<File>) {
        let mut front_end = FrontEnd::connect(path);
        front_end.negotiate();
        let mut body = words(&[0, 0]);
        body.extend([1, 0, 16, 0, 0, 0, 0, 0]);
        let mut made = None;
        let file = inflight.unwrap_or_else(|| {
            let (reply, fd) = front_end.get(GET_INFLIGHT_FD, &body).unwrap();
            body = reply;
            made.insert(File::from(fd.unwrap()))
        });
        if inflight.is_some() {
            let bytes = file.metadata().unwrap().len();
            body[..8].copy_from_slice(&bytes.to_le_bytes());
        }
        assert!(front_end.set(SET_INFLIGHT_FD, &body, &[file.as_raw_fd()]));
        let eventfds = (self.kick.as_raw_fd(), self.call.as_raw_fd());
        front_end.set_up_queue(&self.file, 0x2_0000, BASE, SIZE.into(), start, eventfds);
        (front_end, made)
    }
}

#[test]
fn requests_in_flight_survive_a_new_back_end() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    let mut driver = Driver::new();
    let backend = Backend::start(&path, &config());
    let (front_end, inflight) = driver.set_up(&path, 0, None);
    driver.write(0, 0, 1);
    wait_for("the first write", || driver.used() == [0]);
    wait_for("the interrupt", || driver.call.read().is_ok());
    backend.shared.stall.store(true, Ordering::Release);
    for head in [3, 6, 9] {
        driver.write(head, head.into(), 7);
    }
    wait_for("three requests under way", || backend.shared.busy.load(Ordering::Acquire) == 3);
    // The back end dies: nothing is drained, nothing is answered.
    let disk = backend.shared.disk.lock().unwrap().clone();
    drop(backend);
    drop(front_end);
    assert_eq!(driver.used(), [0]);

    let backend = Backend::start(&path, &config());
    *backend.shared.disk.lock().unwrap() = disk;
    // QEMU gives the used index as base.
    let (mut front_end, _) = driver.set_up(&path, 1, inflight.as_ref());
    wait_for("the answers", || driver.used().len() == 4);
    let mut used = driver.used();
    used.sort_unstable();
    assert_eq!(used, [0, 3, 6, 9]);
    wait_for("the interrupt", || driver.call.read().is_ok());
    driver.write(12, 12, 9);
    wait_for("one more", || driver.used().len() == 5);
    let (base, _) = front_end.get(GET_VRING_BASE, &halves(&[0, 0])).unwrap();
    assert_eq!(base, halves(&[0, 5]));
    let disk = backend.shared.disk.lock().unwrap().clone();
    for (sector, fill) in [(0, 1), (3, 7), (6, 7), (9, 7), (12, 9)] {
        assert!(disk[sector * 512..][..512].iter().all(|byte| *byte == fill), "sector {sector}");
    }
    drop(front_end);
    backend.stop();
}

/// Passes one end of a pipe in a SET_DEVICE_STATE_FD message and keeps the other.
fn state_pipe(front_end: &mut FrontEnd, load: bool) -> File {
    let (reader, writer) = std::io::pipe().unwrap();
    let (theirs, ours) = if load {
        (File::from(OwnedFd::from(reader)), File::from(OwnedFd::from(writer)))
    } else {
        (File::from(OwnedFd::from(writer)), File::from(OwnedFd::from(reader)))
    };
    let body = halves(&[load.into(), 0]);
    assert!(front_end.raw(&message(SET_DEVICE_STATE_FD, 1, &body), &[theirs.as_raw_fd()]));
    assert_eq!(front_end.reply().unwrap().0, words(&[0x100]), "taken, and no other descriptor");
    ours
}

/// As Cloud Hypervisor moves a guest: rings are disabled and never stopped, a state is saved here and
/// loaded there.
#[test]
fn a_pause_by_disabling_drains_the_whole_ring_and_leaves_no_state() {
    let dir = tempfile::tempdir().unwrap();
    let backend = Backend::start(&dir.path().join("disk"), &config());
    let mut driver = Driver::new();
    let (mut front_end, _) = driver.set_up(&backend.path, 0, None);
    wait_for("the ring to start", || backend.shared.live.load(Ordering::Acquire));
    for head in [0, 3, 6, 9] {
        driver.write(head, head.into(), 5);
    }
    assert!(front_end.set(SET_VRING_ENABLE, &halves(&[0, 0]), &[]));
    // Whatever was available is done before the pause is acknowledged: a destination starts there.
    let mut used = driver.used();
    used.sort_unstable();
    assert_eq!(used, [0, 3, 6, 9]);
    wait_for("the stop to be told", || !backend.shared.live.load(Ordering::Acquire));

    let mut saved = Vec::new();
    state_pipe(&mut front_end, false).read_to_end(&mut saved).unwrap();
    assert!(saved.is_empty(), "the state is empty");
    assert_eq!(front_end.get_u64(CHECK_DEVICE_STATE), 0);
    drop(state_pipe(&mut front_end, true));
    assert_eq!(front_end.get_u64(CHECK_DEVICE_STATE), 0);
    let mut foreign = state_pipe(&mut front_end, true);
    foreign.write_all(b"x").unwrap();
    drop(foreign);
    assert_eq!(front_end.get_u64(CHECK_DEVICE_STATE), 1, "some other device's state");
    let open = state_pipe(&mut front_end, true);
    assert_eq!(front_end.get_u64(CHECK_DEVICE_STATE), 1, "not waited for");
    drop(open);

    // The migration is given up: the guest goes on here.
    assert!(front_end.set(SET_VRING_ENABLE, &halves(&[0, 1]), &[]));
    wait_for("the ring to go on", || backend.shared.live.load(Ordering::Acquire));
    driver.write(0, 1, 5);
    wait_for("the next write", || driver.used().len() == 5);
    backend.stop();
}

#[test]
fn stopping_a_listener_lets_requests_under_way_finish() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    let mut driver = Driver::new();
    let backend = Backend::start(&path, &config());
    let (mut front_end, _) = driver.set_up(&path, 0, None);
    backend.shared.stall.store(true, Ordering::Release);
    driver.write(0, 5, 5);
    wait_for("a request under way", || backend.shared.busy.load(Ordering::Acquire) == 1);
    let shared = std::sync::Arc::clone(&backend.shared);
    let stopper = std::thread::spawn(move || backend.stop());
    wait_for("the socket to go", || !path.exists());
    assert!(driver.used().is_empty());
    shared.stall.store(false, Ordering::Release);
    // The stalled back end sleeps; a kick wakes it as well as anything.
    driver.kick.write(1).unwrap();
    stopper.join().unwrap();
    assert_eq!(driver.used(), [0]);
    assert!(front_end.is_dropped());
    let _ = front_end.socket.write_all(&[0]);
}

#[test]
fn a_drain_that_takes_too_long_drops_the_connection_and_keeps_the_requests() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    let mut impatient = config();
    impatient.drain_timeout = Duration::from_millis(50);
    let mut driver = Driver::new();
    let backend = Backend::start(&path, &impatient);
    let (mut front_end, inflight) = driver.set_up(&path, 0, None);
    backend.shared.stall.store(true, Ordering::Release);
    driver.write(0, 5, 5);
    wait_for("a request under way", || backend.shared.busy.load(Ordering::Acquire) == 1);
    assert!(front_end.get(GET_VRING_BASE, &halves(&[0, 0])).is_none());
    wait_for("the detach", || !backend.shared.attached.load(Ordering::Acquire));
    let (_front_end, _) = driver.set_up(&path, 0, inflight.as_ref());
    backend.shared.stall.store(false, Ordering::Release);
    backend.wake();
    wait_for("the answer", || driver.used() == [0]);
}
