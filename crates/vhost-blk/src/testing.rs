//! A guest, its driver's half of the rings, and a device under it, all in one thread. For tests.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::Arc;

use base::{BlockReply, BlockRequest, BlockSize, BufferPool, Operation, Status};

use crate::config::{
    F_EVENT_IDX, F_FLUSH, F_INDIRECT_DESC, F_LOG_ALL, F_PROTOCOL_FEATURES, F_VERSION_1,
};
use crate::control::{Answer, Request};
use crate::dirty::DirtyLog;
use crate::inflight::{InflightBuffer, buffer_bytes, create};
use crate::memory::{GuestMemory, Mapping, Region, memory_file};
use crate::ring::{Descriptor, Ring, RingAddresses};
use crate::{Control, Device, DeviceConfig, Event};

/// Features that tests negotiate unless they say otherwise.
pub(crate) const FEATURES: u64 =
    F_VERSION_1 | F_EVENT_IDX | F_INDIRECT_DESC | F_FLUSH | F_PROTOCOL_FEATURES;

/// Where guest memory starts: high, as 47-bit guests have it.
pub(crate) const BASE: u64 = (1 << 46) + 0x1000;
/// Where the front end sees it.
const USER: u64 = 0x7f12_3456_0000;
/// Two adjacent regions; the first is no whole number of pages.
const FIRST_BYTES: u64 = 0x0004_4321;
pub(crate) const MEMORY_BYTES: u64 = 0x0010_0000;
/// Where the second region starts in the file.
const SECOND_OFFSET: u64 = 0x0008_0ab1;
/// Bytes between the rings of two queues.
const RING_BYTES: u64 = 0x4000;
/// Where a ring's used part starts: its flags and index end one page, its entries begin the next.
pub(crate) const USED: u64 = 0x2ffc;
/// Where data may be placed.
pub(crate) const DATA: u64 = BASE + 0x1_0000;

pub(crate) const F_NEXT: u16 = 1;
pub(crate) const F_WRITE: u16 = 2;
pub(crate) const F_INDIRECT: u16 = 4;

/// Counts each thread's allocations, so that tests can see that there are none. Fuzzers keep their
/// own allocator.
struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: everything is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let _ = ALLOCATIONS.try_with(|count| count.set(count.get() + 1));
        // SAFETY: the caller keeps the contract that `System` has too.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above; the pointer came from `alloc`, so from `System`.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[cfg(test)]
#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Allocations that this thread made so far.
pub(crate) fn allocations() -> usize {
    ALLOCATIONS.with(Cell::get)
}

pub(crate) type Hook = Box<dyn FnMut()>;

thread_local! {
    static HOOK: RefCell<Option<Hook>> = const { RefCell::new(None) };
}

/// Called wherever the order of stores to shared memory matters. A test's hook may look around,
/// or unwind: then the process "died" here.
pub(crate) fn crash_point() {
    HOOK.with_borrow_mut(|hook| {
        if let Some(hook) = hook {
            hook();
        }
    });
}

/// Installs a hook for this thread.
pub(crate) fn set_hook(hook: Option<Hook>) {
    HOOK.with_borrow_mut(|slot| *slot = hook);
}

/// What a hook unwinds with.
pub(crate) struct Crash;

/// A small random number generator; tests print its seed.
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub(crate) fn below32(&mut self, limit: u32) -> u32 {
        u32::try_from(self.below(limit.into())).expect("below a u32")
    }

    pub(crate) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[usize::try_from(self.below(from.len() as u64)).expect("an index")]
    }

    pub(crate) fn one_in(&mut self, chances: u64) -> bool {
        self.below(chances) == 0
    }
}

/// Seeds to run: `VHOST_BLK_SEED` alone, or `count` from a fixed start. Prints each, so that a
/// failure's output ends with the seed that reproduces it.
pub(crate) fn seeds(count: u64) -> Vec<u64> {
    match std::env::var("VHOST_BLK_SEED").ok().and_then(|seed| seed.parse().ok()) {
        Some(seed) => vec![seed],
        None => (0..count).map(|n| 0x5eed_0000 + n).collect(),
    }
}

pub(crate) fn print_seed(test: &str, seed: u64) {
    println!("VHOST_BLK_SEED={seed} cargo test -p vhost-blk {test}");
}

pub(crate) fn eventfd() -> OwnedFd {
    // SAFETY: the call has no memory effects.
    let fd = unsafe { libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC) };
    assert!(fd >= 0);
    // SAFETY: `fd` was just opened and belongs to nobody else.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// The eventfd's count; resets it.
pub(crate) fn eventfd_count(fd: &OwnedFd) -> u64 {
    use std::io::Read;
    let mut bytes = [0_u8; 8];
    match File::from(fd.try_clone().unwrap()).read_exact(&mut bytes) {
        Ok(()) => u64::from_ne_bytes(bytes),
        Err(_) => 0,
    }
}

/// The driver's state of one ring.
#[derive(Clone, Debug, Default)]
struct DriverRing {
    available: u16,
    used_seen: u16,
}

/// Guest memory and the driver's half of the rings. Outlives devices.
pub(crate) struct Guest {
    pub(crate) size: u16,
    file: File,
    pub(crate) memory: Arc<GuestMemory>,
    rings: Vec<DriverRing>,
}

impl Guest {
    pub(crate) fn new(queues: u16, size: u16) -> Self {
        Self::in_file(memory_file(c"guest", 0x20_0000).unwrap(), queues, size)
    }

    /// A guest whose memory is in this file of 2 MiB.
    pub(crate) fn in_file(file: File, queues: u16, size: u16) -> Self {
        let memory = Arc::new(Self::map(&file));
        Self { size, file, memory, rings: vec![DriverRing::default(); queues.into()] }
    }

    fn map(file: &File) -> GuestMemory {
        let region = |gpa: u64, offset, bytes| Region {
            gpa,
            user: USER + (gpa - BASE),
            mapping: Arc::new(Mapping::new(file, offset, bytes).unwrap()),
        };
        GuestMemory::new(vec![
            region(BASE, 0, FIRST_BYTES),
            region(BASE + FIRST_BYTES, SECOND_OFFSET, MEMORY_BYTES - FIRST_BYTES),
        ])
        .unwrap()
    }

    /// The same memory, mapped anew, as a new process would.
    pub(crate) fn mapped_again(&self) -> Arc<GuestMemory> {
        Arc::new(Self::map(&self.file))
    }

    pub(crate) fn ring_gpa(queue: u16) -> u64 {
        BASE + u64::from(queue) * RING_BYTES
    }

    pub(crate) fn addresses(queue: u16) -> RingAddresses {
        let user = USER + u64::from(queue) * RING_BYTES;
        RingAddresses {
            descriptors: user,
            available: user + 0x1000,
            used: user + USED,
            used_log: None,
        }
    }

    /// A view of a ring, as the device has one.
    pub(crate) fn ring(&self, queue: u16) -> Ring {
        Ring::resolve(&self.memory, self.size, &Self::addresses(queue)).unwrap()
    }

    pub(crate) fn write(&self, gpa: u64, bytes: &[u8]) {
        // Straight to the regions: the device's copy has test hooks.
        for (gpa, byte) in (gpa..).zip(bytes) {
            self.memory.poke(gpa, *byte);
        }
    }

    pub(crate) fn read(&self, gpa: u64, bytes: usize) -> Vec<u8> {
        let mut to = vec![0; bytes];
        assert!(self.memory.read(gpa, &mut to), "guest memory at {gpa:#x}");
        to
    }

    pub(crate) fn read_u16(&self, gpa: u64) -> u16 {
        u16::from_le_bytes(self.read(gpa, 2).try_into().unwrap())
    }

    pub(crate) fn write_descriptor(&self, at: u64, descriptor: Descriptor) {
        self.write(at, &descriptor.gpa.to_le_bytes());
        self.write(at + 8, &descriptor.bytes.to_le_bytes());
        self.write(at + 12, &descriptor.flags.to_le_bytes());
        self.write(at + 14, &descriptor.next.to_le_bytes());
    }

    pub(crate) fn descriptor(
        &self,
        queue: u16,
        index: u16,
        gpa: u64,
        bytes: u32,
        flags: u16,
        next: u16,
    ) {
        let at = Self::ring_gpa(queue) + 16 * u64::from(index);
        self.write_descriptor(at, Descriptor { gpa, bytes, flags, next });
    }

    /// Puts `head` into the available ring and publishes it.
    pub(crate) fn offer(&mut self, queue: u16, head: u16) {
        let ring = &mut self.rings[usize::from(queue)];
        let slot = u64::from(ring.available % self.size);
        ring.available = ring.available.wrapping_add(1);
        let index = ring.available;
        let gpa = Self::ring_gpa(queue) + 0x1000;
        self.write(gpa + 4 + 2 * slot, &head.to_le_bytes());
        self.write(gpa + 2, &index.to_le_bytes());
    }

    pub(crate) fn available(&self, queue: u16) -> u16 {
        self.rings[usize::from(queue)].available
    }

    /// Starts the driver's ring at another index than 0, as after a migration.
    pub(crate) fn start_at(&mut self, queue: u16, index: u16) {
        self.rings[usize::from(queue)] = DriverRing { available: index, used_seen: index };
        let gpa = Self::ring_gpa(queue);
        self.write(gpa + 0x1002, &index.to_le_bytes());
        self.write(gpa + USED + 2, &index.to_le_bytes());
    }

    pub(crate) fn set_available_flags(&self, queue: u16, flags: u16) {
        self.write(Self::ring_gpa(queue) + 0x1000, &flags.to_le_bytes());
    }

    pub(crate) fn set_used_event(&self, queue: u16, index: u16) {
        let gpa = Self::ring_gpa(queue) + 0x1004 + 2 * u64::from(self.size);
        self.write(gpa, &index.to_le_bytes());
    }

    pub(crate) fn used_flags(&self, queue: u16) -> u16 {
        self.read_u16(Self::ring_gpa(queue) + USED)
    }

    pub(crate) fn available_event(&self, queue: u16) -> u16 {
        self.read_u16(Self::ring_gpa(queue) + USED + 4 + 8 * u64::from(self.size))
    }

    pub(crate) fn used_index(&self, queue: u16) -> u16 {
        self.read_u16(Self::ring_gpa(queue) + USED + 2)
    }

    /// Used entries since the last time: (head, bytes).
    pub(crate) fn reap(&mut self, queue: u16) -> Vec<(u16, u32)> {
        let index = self.used_index(queue);
        let mut entries = Vec::new();
        while self.rings[usize::from(queue)].used_seen != index {
            let ring = &mut self.rings[usize::from(queue)];
            let slot = u64::from(ring.used_seen % self.size);
            ring.used_seen = ring.used_seen.wrapping_add(1);
            let entry = self.read(Self::ring_gpa(queue) + USED + 4 + 8 * slot, 8);
            let head = u32::from_le_bytes(entry[..4].try_into().unwrap());
            let bytes = u32::from_le_bytes(entry[4..].try_into().unwrap());
            entries.push((u16::try_from(head).unwrap(), bytes));
        }
        entries
    }

    /// Writes a request's header at `gpa`.
    pub(crate) fn header(&self, gpa: u64, kind: u32, sector: u64) {
        self.write(gpa, &kind.to_le_bytes());
        self.write(gpa + 4, &[0; 4]);
        self.write(gpa + 8, &sector.to_le_bytes());
    }

    /// A three-descriptor request at `head`: header at `gpa`, status after it, data elsewhere.
    /// Does not offer it.
    pub(crate) fn request(
        &self,
        queue: u16,
        head: u16,
        gpa: u64,
        kind: u32,
        sector: u64,
        data: (u64, u32),
    ) {
        self.header(gpa, kind, sector);
        self.write(gpa + 16, &[0xff]);
        let (data_gpa, bytes) = data;
        let data_flags = if kind == 0 || kind == 8 { F_NEXT | F_WRITE } else { F_NEXT };
        if bytes == 0 {
            self.descriptor(queue, head, gpa, 16, F_NEXT, head + 2);
        } else {
            self.descriptor(queue, head, gpa, 16, F_NEXT, head + 1);
            self.descriptor(queue, head + 1, data_gpa, bytes, data_flags, head + 2);
        }
        self.descriptor(queue, head + 2, gpa + 16, 1, F_WRITE, 0);
    }

    pub(crate) fn status(&self, gpa: u64) -> u8 {
        self.read(gpa + 16, 1)[0]
    }
}

/// A device, and the shell and head around it.
pub(crate) struct Rig {
    pub(crate) device: Device,
    pub(crate) buffers: BufferPool,
    pub(crate) requests: VecDeque<BlockRequest>,
    pub(crate) watched: BTreeMap<u16, Arc<OwnedFd>>,
    pub(crate) calls: Vec<OwnedFd>,
    pub(crate) errors: Vec<OwnedFd>,
    pub(crate) lives: Vec<bool>,
    pub(crate) superseded: usize,
}

pub(crate) fn config(queues: u16) -> DeviceConfig {
    let mut config = DeviceConfig::new(2048, BlockSize::B512, "serial-of-the-test-disk");
    config.queues = queues;
    config
}

pub(crate) fn inflight_file(queues: u16, size: u16) -> File {
    create(queues, size).unwrap()
}

pub(crate) fn map_inflight(file: &File, queues: u16, size: u16) -> Arc<InflightBuffer> {
    let bytes = buffer_bytes(queues, size);
    Arc::new(
        InflightBuffer::map(file, 0, bytes, queues, size, crate::inflight::Keeper::FrontEnd)
            .unwrap(),
    )
}

impl Rig {
    pub(crate) fn new(config: DeviceConfig) -> Self {
        let buffers = BufferPool::heap(32, 4);
        let queues = config.queues;
        Self {
            device: Device::new(config, buffers.clone()),
            buffers,
            requests: VecDeque::new(),
            watched: BTreeMap::new(),
            calls: (0..queues).map(|_| eventfd()).collect(),
            errors: (0..queues).map(|_| eventfd()).collect(),
            lives: Vec::new(),
            superseded: 0,
        }
    }

    /// Sends a control message; the answer if there is one already.
    pub(crate) fn ask(&mut self, request: Request) -> Option<Answer> {
        self.ask_later(request).try_recv().ok()
    }

    /// Sends a control message; its answer may come later.
    pub(crate) fn ask_later(&mut self, request: Request) -> std::sync::mpsc::Receiver<Answer> {
        let (control, answer) = Control::new(request);
        self.device.control(control);
        self.take_events();
        answer
    }

    pub(crate) fn must(&mut self, request: Request) {
        let what = format!("{request:?}");
        assert_eq!(self.ask(request), Some(Ok(0)), "{what}");
    }

    /// Connects and sets up all rings as QEMU does.
    pub(crate) fn connect(
        &mut self,
        guest: &Guest,
        features: u64,
        inflight: Option<Arc<InflightBuffer>>,
        bases: &[u16],
    ) {
        self.must(Request::Connected);
        self.must(Request::Features(features));
        if let Some(inflight) = inflight {
            self.must(Request::Inflight(inflight));
        }
        self.must(Request::Memory(guest.mapped_again()));
        for (queue, base) in (0_u16..).zip(bases) {
            self.set_up_ring(guest, queue, *base);
        }
        for queue in 0..u16::try_from(bases.len()).unwrap() {
            self.must(Request::RingEnable { queue, enable: true });
        }
    }

    pub(crate) fn set_up_ring(&mut self, guest: &Guest, queue: u16, base: u16) {
        self.must(Request::RingSize { queue, size: guest.size });
        self.must(Request::RingBase { queue, base });
        self.must(Request::RingAddresses { queue, addresses: Guest::addresses(queue) });
        let call = self.calls[usize::from(queue)].try_clone().unwrap();
        self.must(Request::Call { queue, fd: Some(call) });
        let error = self.errors[usize::from(queue)].try_clone().unwrap();
        self.must(Request::Error { queue, fd: Some(error) });
        self.must(Request::Kick { queue, fd: Arc::new(eventfd()) });
    }

    pub(crate) fn poll(&mut self, budget: usize) -> bool {
        let requests = &mut self.requests;
        let more = self.device.poll(budget, &mut |request| requests.push_back(request));
        self.take_events();
        more
    }

    pub(crate) fn take_events(&mut self) {
        while let Some(event) = self.device.poll_event() {
            match event {
                Event::WatchKick { queue, fd } => drop(self.watched.insert(queue, fd)),
                Event::UnwatchKick { queue } => {
                    assert!(self.watched.remove(&queue).is_some(), "queue {queue} was watched");
                }
                Event::FrontEnd { .. } => {}
                Event::Started => self.lives.push(true),
                Event::Stopped { .. } => self.lives.push(false),
                Event::Superseded => self.superseded += 1,
            }
        }
    }

    /// Polls and answers from `disk` until nothing is left to do.
    pub(crate) fn run(&mut self, disk: &mut [u8]) {
        loop {
            self.poll(64);
            if self.requests.is_empty() {
                break;
            }
            while let Some(request) = self.requests.pop_front() {
                self.execute(request, disk);
            }
        }
        self.device.flush_notifications();
    }

    /// Executes one request on `disk` and completes it.
    pub(crate) fn execute(&mut self, request: BlockRequest, disk: &mut [u8]) {
        let reply = apply(request, disk, self.device.config().block_size);
        self.device.complete(reply);
        self.take_events();
    }

    /// Completes one request with an error.
    pub(crate) fn refuse(&mut self, request: &BlockRequest, status: Status) {
        self.device.complete(BlockReply { id: request.id, status, data: None });
        self.take_events();
    }
}

/// Applies a request to `disk`; its reply.
pub(crate) fn apply(request: BlockRequest, disk: &mut [u8], block_size: BlockSize) -> BlockReply {
    let start = usize::try_from(request.lba.0 << block_size.log2()).unwrap();
    let bytes = usize::try_from(request.blocks.bytes(block_size)).unwrap();
    let mut data = None;
    match request.operation {
        Operation::Read { mut buffer } => {
            buffer.payload_mut()[..bytes].copy_from_slice(&disk[start..start + bytes]);
            data = Some(buffer.freeze().payload(bytes));
        }
        Operation::Write { buffer, fua: _ } => {
            disk[start..start + bytes].copy_from_slice(&buffer.payload()[..bytes]);
        }
        Operation::Flush => {}
        Operation::Discard | Operation::WriteZeroes { fua: _ } => {
            disk[start..start + bytes].fill(0);
        }
    }
    BlockReply { id: request.id, status: Status::Ok, data }
}

/// A dirty log and the file that the "front end" reads it from.
pub(crate) struct Log {
    map: Mapping,
    pub(crate) log: Arc<DirtyLog>,
}

impl Log {
    /// Covers the guest's memory. Starts at guest page 0, like a real one, in a sparse file.
    pub(crate) fn new() -> Self {
        let bytes = ((BASE + MEMORY_BYTES) >> 15) + 1;
        let file = memory_file(c"log", bytes).unwrap();
        let log = Arc::new(DirtyLog::new(&file, 0, bytes).unwrap());
        let from = BASE >> 15;
        let map = Mapping::new(&file, from, bytes - from).unwrap();
        Self { map, log }
    }

    /// Reads and clears the map: the guest addresses of the dirty pages.
    pub(crate) fn take(&self) -> Vec<u64> {
        use vm_memory::VolatileMemory;
        let slice = self.map.slice();
        let mut pages = Vec::new();
        for at in 0..slice.len() {
            let byte = slice.get_atomic_ref::<std::sync::atomic::AtomicU8>(at).unwrap();
            let bits = byte.swap(0, std::sync::atomic::Ordering::SeqCst);
            let first = ((BASE >> 15) + at as u64) << 15;
            pages.extend((0..8).filter(|bit| bits >> bit & 1 == 1).map(|bit| first + (bit << 12)));
        }
        pages
    }
}

pub(crate) fn log_features() -> u64 {
    FEATURES | F_LOG_ALL
}

/// Reads the call eventfd to tell whether the guest was interrupted.
pub(crate) fn interrupted(rig: &Rig, queue: u16) -> bool {
    eventfd_count(&rig.calls[usize::from(queue)]) > 0
}
