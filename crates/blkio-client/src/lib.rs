//! A vhost-user-blk front end without a virtual machine: the `blkio` crate behind an interface
//! that is safe, for benchmarks and tests.
//!
//! The client owns one memory region, shared with the back end and cut into slots of equal size,
//! each aligned to a page. A slot belongs to one request at a time; its bytes are out of reach
//! while the request is under way.
#![expect(unsafe_code, reason = "blkio takes and returns raw memory; see the SAFETY comments")]

use std::fmt::Debug;
use std::mem::MaybeUninit;
use std::path::Path;
use std::time::Duration;

use blkio::{Blkio, Blkioq, Completion, Errno, MemoryRegion, ReqFlags};

/// Slots start on page boundaries: a back end with direct I/O needs it.
const PAGE_BYTES: usize = 4096;

/// The most requests that may be under way, and completions taken at once.
const SLOTS_MAX: usize = 256;

/// Why the client could not do something.
#[derive(Debug, thiserror::Error)]
#[error("{action}: {source}")]
pub struct ClientError {
    action: &'static str,
    source: blkio::Error,
}

impl ClientError {
    /// True if the back end let the time pass; the requests are still under way.
    pub fn is_timeout(&self) -> bool {
        self.source.errno() == Errno::TIME
    }
}

/// A request's kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// The back end fills the slot.
    Read,
    /// The back end takes the slot's bytes.
    Write,
    /// All completed writes reach media. The slot's bytes play no part.
    Flush,
}

/// What became of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Done {
    /// The slot, free again.
    pub slot: usize,
    /// 0, or a negative errno.
    pub result: i32,
}

/// A connected front end with one queue.
pub struct Client {
    // Dropped before the memory that its requests may point into, which `blkio` holds.
    queue: Blkioq,
    blkio: Blkio,
    region: MemoryRegion,
    slot_bytes: usize,
    busy: Vec<bool>,
    completions: Vec<MaybeUninit<Completion>>,
}

impl Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let slots = self.busy.len();
        f.debug_struct("Client")
            .field("slots", &slots)
            .field("slot_bytes", &self.slot_bytes)
            .finish_non_exhaustive()
    }
}

fn failed(action: &'static str) -> impl Fn(blkio::Error) -> ClientError {
    move |source| ClientError { action, source }
}

impl Client {
    /// Connects to the back end at `socket`, with `slots` slots of at least `slot_bytes` bytes.
    pub fn connect(socket: &Path, slots: usize, slot_bytes: usize) -> Result<Self, ClientError> {
        assert!((1..=SLOTS_MAX).contains(&slots), "1 to {SLOTS_MAX} slots");
        let slot_bytes = slot_bytes.next_multiple_of(PAGE_BYTES);
        let mut blkio =
            Blkio::new("virtio-blk-vhost-user").map_err(failed("making a vhost-user client"))?;
        let path = socket.to_string_lossy();
        blkio.set_str("path", &path).map_err(failed("setting the path"))?;
        blkio.connect().map_err(failed("connecting to the back end"))?;
        blkio.set_i32("num-queues", 1).map_err(failed("setting the number of queues"))?;
        let mut started = blkio.start().map_err(failed("starting the device"))?;
        let region = blkio
            .alloc_mem_region(slots * slot_bytes)
            .map_err(failed("allocating shared memory"))?;
        blkio.map_mem_region(&region).map_err(failed("sharing memory with the back end"))?;
        let mut queue = started.queues.remove(0);
        // Completions are waited for in the kernel: a spinning client takes the back end's core.
        queue.set_completion_fd_enabled(true);
        let completions = (0..slots).map(|_| MaybeUninit::uninit()).collect();
        Ok(Self { queue, blkio, region, slot_bytes, busy: vec![false; slots], completions })
    }

    /// The disk's size in bytes.
    pub fn capacity_bytes(&self) -> Result<u64, ClientError> {
        self.blkio.get_u64("capacity").map_err(failed("reading the capacity"))
    }

    /// Slots.
    pub fn slots(&self) -> usize {
        self.busy.len()
    }

    /// Requests that were handed over and have not been reported as done.
    pub fn busy(&self) -> usize {
        self.busy.iter().filter(|busy| **busy).count()
    }

    /// The bytes of a free slot.
    pub fn bytes(&mut self, slot: usize) -> &mut [u8] {
        assert!(!self.busy[slot], "slot {slot} belongs to a request");
        let start = self.pointer(slot);
        // SAFETY: the slot lies in the region, which lives as long as `self.blkio`; `&mut self`
        // makes this the only reference of ours, and no request of ours points into the slot
        // (asserted above). The back end writes only where a request lets it, and it is a process
        // that the caller started.
        unsafe { std::slice::from_raw_parts_mut(start, self.slot_bytes) }
    }

    /// Hands a request over; [`Client::wait`] sends it. `length` bytes at `offset`, in `slot`.
    pub fn submit(&mut self, slot: usize, operation: Operation, offset: u64, length: usize) {
        assert!(!self.busy[slot], "slot {slot} belongs to a request");
        assert!(length <= self.slot_bytes, "{length} bytes do not fit a slot");
        self.busy[slot] = true;
        // The memory stays mapped until the queue is gone, and is not touched until completion.
        let start = self.pointer(slot);
        let none = ReqFlags::empty();
        match operation {
            Operation::Read => self.queue.read(offset, start, length, slot, none),
            Operation::Write => self.queue.write(offset, start, length, slot, none),
            Operation::Flush => self.queue.flush(slot, none),
        }
    }

    /// Sends what was submitted and waits until at least `least` requests are done; calls `each`
    /// for every one that is. Gives up after `limit`, which is an error.
    pub fn wait(
        &mut self,
        least: usize,
        limit: Duration,
        mut each: impl FnMut(Done),
    ) -> Result<usize, ClientError> {
        let mut left = limit;
        let taken = self
            .queue
            .do_io(&mut self.completions, least, Some(&mut left), None)
            .map_err(failed("waiting for completions"))?;
        for completion in &self.completions[..taken] {
            // SAFETY: do_io initialised the first `taken` entries; they are copied out once, and
            // a completion owns nothing.
            let completion = unsafe { completion.assume_init_read() };
            let slot = completion.user_data;
            assert!(std::mem::replace(&mut self.busy[slot], false), "slot {slot} completed twice");
            each(Done { slot, result: completion.ret });
        }
        Ok(taken)
    }

    fn pointer(&self, slot: usize) -> *mut u8 {
        assert!(slot < self.busy.len(), "slot {slot} of {}", self.busy.len());
        (self.region.addr + slot * self.slot_bytes) as *mut u8
    }
}
