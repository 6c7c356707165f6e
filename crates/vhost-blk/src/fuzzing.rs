//! What fuzzers drive: a hostile guest and a confused front end, made of bytes. Only with the
//! feature `fuzzing`.
//!
//! Each byte decides something, mostly something valid, so that a fuzzer gets deep. What must hold:
//! no panic, every request within the disk, every buffer back in the end.

use std::sync::Arc;

use base::Status;

use crate::config::{F_FLUSH, F_LOG_ALL};
use crate::control::Request;
use crate::ring::{Descriptor, RingAddresses};
use crate::testing::{
    BASE, DATA, F_INDIRECT, F_NEXT, F_WRITE, FEATURES, Guest, Log, MEMORY_BYTES, Rig, config,
    eventfd, inflight_file, map_inflight,
};

const QUEUES: u16 = 2;
const RING_ENTRIES: u16 = 16;
/// Steps of one run, so that no input takes long.
const STEPS_MAX: usize = 200;

/// The input, from its start; zeroes when it is used up.
struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn u8(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    fn u16(&mut self) -> u16 {
        u16::from_le_bytes([self.u8(), self.u8()])
    }

    fn u32(&mut self) -> u32 {
        u32::from(self.u16()) | u32::from(self.u16()) << 16
    }

    fn u64(&mut self) -> u64 {
        u64::from(self.u32()) | u64::from(self.u32()) << 32
    }

    fn below(&mut self, bound: u8) -> u8 {
        self.u8() % bound
    }

    /// An address: mostly in guest memory, some at its seams, some anywhere.
    fn gpa(&mut self) -> u64 {
        match self.below(8) {
            0 => self.u64(),
            1 => BASE + MEMORY_BYTES - u64::from(self.u8()),
            2 => BASE + u64::from(self.u16()),
            3 => BASE + 0x0004_4321 - u64::from(self.u8()),
            _ => DATA + u64::from(self.u32() % 0x4_0000),
        }
    }

    fn length(&mut self) -> u32 {
        match self.below(6) {
            0 => self.u32(),
            1 => u32::from(self.u8()),
            2 => 16,
            3 => 1,
            _ => u32::from(self.below(64)) * 512,
        }
    }
}

/// A guest writes what it likes into its rings and memory, while requests are taken and
/// answered.
pub fn chains(data: &[u8]) {
    let mut bytes = Bytes(data);
    let mut guest = Guest::new(1, RING_ENTRIES);
    let mut rig = Rig::new(config(1));
    let all = rig.buffers.available();
    let inflight = (bytes.below(2) == 1)
        .then(|| map_inflight(&inflight_file(1, RING_ENTRIES), 1, RING_ENTRIES));
    rig.connect(&guest, FEATURES, inflight, &[0]);
    let mut disk = vec![0; 2048 * 512];
    for _ in 0..STEPS_MAX {
        if bytes.is_empty() {
            break;
        }
        chain_step(&mut bytes, &mut guest, &mut rig, &mut disk);
    }
    rig.run(&mut disk);
    let _ = rig.ask(Request::Disconnected);
    while let Some(request) = rig.requests.pop_front() {
        rig.execute(request, &mut disk);
    }
    drop(rig.device);
    assert_eq!(rig.buffers.available(), all, "every buffer came back");
}

fn chain_step(bytes: &mut Bytes<'_>, guest: &mut Guest, rig: &mut Rig, disk: &mut [u8]) {
    let head = u16::from(bytes.below(14));
    match bytes.below(10) {
        0 | 1 => {
            let gpa = DATA + u64::from(bytes.below(64)) * 64;
            let kind = [0, 1, 4, 8, 11, 13, 99][usize::from(bytes.below(7))];
            let data = (bytes.gpa(), bytes.length());
            guest.request(0, head, gpa, kind, u64::from(bytes.u16() % 4096), data);
            guest.offer(0, head);
        }
        2 | 3 => {
            let flags =
                [0, F_NEXT, F_WRITE, F_NEXT | F_WRITE, F_INDIRECT, F_INDIRECT | F_NEXT, 0xffff];
            let flags = flags[usize::from(bytes.below(7))];
            let (gpa, length, next) = (bytes.gpa(), bytes.length(), u16::from(bytes.below(20)));
            guest.descriptor(0, head, gpa, length, flags, next);
        }
        4 => {
            // An indirect table, some of its entries about requests.
            let table = DATA + 0x8000 + u64::from(bytes.below(8)) * 256;
            for entry in 0..u64::from(bytes.below(6)) {
                let flags = if bytes.below(3) == 0 { bytes.u16() } else { F_NEXT };
                let (gpa, length) = (bytes.gpa(), bytes.length());
                let next = u16::from(bytes.below(8));
                let descriptor = Descriptor { gpa, bytes: length, flags, next };
                guest.write_descriptor(table + 16 * entry, descriptor);
            }
            let length = u32::from(bytes.below(12)) * 8;
            guest.descriptor(0, head, table, length, F_INDIRECT, 0);
            guest.offer(0, head);
        }
        5 => guest.offer(0, bytes.u16() % 40),
        6 => {
            let at = BASE + u64::from(bytes.u16());
            let value = [bytes.u8(), bytes.u8()];
            guest.write(at, &value);
        }
        7 => _ = rig.poll(usize::from(bytes.below(8))),
        8 => {
            if let Some(request) = rig.requests.pop_front() {
                if bytes.below(8) == 0 {
                    rig.refuse(&request, Status::IoError);
                } else {
                    rig.execute(request, disk);
                }
            }
        }
        _ => rig.run(disk),
    }
}

/// A front end sends control messages in any order, while a guest makes requests.
pub fn messages(data: &[u8]) {
    let mut bytes = Bytes(data);
    let mut guest = Guest::new(QUEUES, RING_ENTRIES);
    let mut rig = Rig::new(config(QUEUES));
    let all = rig.buffers.available();
    if bytes.below(4) != 0 {
        rig.connect(&guest, FEATURES, None, &[0, 0]);
    }
    let mut disk = vec![0; 2048 * 512];
    let mut waiting = Vec::new();
    for _ in 0..STEPS_MAX {
        if bytes.is_empty() {
            break;
        }
        match bytes.below(8) {
            0 => {
                let (queue, head) = (u16::from(bytes.below(2)), u16::from(bytes.below(14)));
                let gpa = DATA + u64::from(bytes.below(64)) * 64;
                let data = (DATA + 0x1_0000 + u64::from(bytes.u16()), bytes.length());
                let kind = u32::from(bytes.below(2));
                guest.request(queue, head, gpa, kind, u64::from(bytes.u8()), data);
                guest.offer(queue, head);
            }
            1 => _ = rig.poll(usize::from(bytes.below(8))),
            2 => {
                if let Some(request) = rig.requests.pop_front() {
                    rig.execute(request, &mut disk);
                }
            }
            _ => {
                let request = message(&mut bytes, &guest);
                // What is under way when the memory goes away keeps its own mapping.
                waiting.push(rig.ask_later(request));
            }
        }
    }
    rig.run(&mut disk);
    let _ = rig.ask(Request::Disconnected);
    while let Some(request) = rig.requests.pop_front() {
        rig.execute(request, &mut disk);
    }
    drop(rig.device);
    assert_eq!(rig.buffers.available(), all, "every buffer came back");
}

fn message(bytes: &mut Bytes<'_>, guest: &Guest) -> Request {
    let queue = u16::from(bytes.below(4));
    match bytes.below(15) {
        0 => Request::Connected,
        1 => Request::Disconnected,
        2 => Request::Quiesce,
        3 => {
            let features = [FEATURES, FEATURES | F_LOG_ALL, FEATURES & !F_FLUSH, bytes.u64()];
            Request::Features(features[usize::from(bytes.below(4))])
        }
        4 => Request::Memory(guest.mapped_again()),
        5 => Request::Log(Arc::clone(&Log::new().log)),
        6 => {
            let size = [8, RING_ENTRIES, 256][usize::from(bytes.below(3))];
            let queues = u16::from(1 + bytes.below(3));
            Request::Inflight(map_inflight(&inflight_file(queues, size), queues, size))
        }
        7 => {
            let sizes = [0, 1, 8, RING_ENTRIES, 17, 1024, 0x8000];
            Request::RingSize { queue, size: sizes[usize::from(bytes.below(7))] }
        }
        8 => {
            let valid = Guest::addresses(queue.min(QUEUES - 1));
            let addresses = if bytes.below(3) == 0 {
                RingAddresses {
                    descriptors: valid.descriptors.wrapping_add(bytes.u64()),
                    available: valid.available.wrapping_add(u64::from(bytes.u16())),
                    used: valid.used.wrapping_sub(u64::from(bytes.u16())),
                    used_log: (bytes.below(2) == 0).then(|| bytes.u64()),
                }
            } else {
                valid
            };
            Request::RingAddresses { queue, addresses }
        }
        9 => Request::RingBase { queue, base: bytes.u16() },
        10 => Request::RingStop { queue },
        11 => Request::RingEnable { queue, enable: bytes.below(2) == 0 },
        12 => Request::Kick { queue, fd: Arc::new(eventfd()) },
        13 => Request::Call { queue, fd: (bytes.below(2) == 0).then(eventfd) },
        _ => Request::Error { queue, fd: (bytes.below(2) == 0).then(eventfd) },
    }
}
