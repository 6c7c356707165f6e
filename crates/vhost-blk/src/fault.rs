//! Memory that a front end takes away while it is mapped here.
//!
//! A file that is truncated under a mapping makes the next access to it raise SIGBUS, which would
//! end the process and with it every other guest's disk. So every mapping is listed here, and the
//! signal's handler puts anonymous zeroes in the place of the one that was hit and notes that it
//! is *lost*. The access goes on; whoever made it looks at [`Listed::is_lost`] before it
//! believes what it read. A SIGBUS anywhere else goes to whoever handled it before.
//!
//! The list only grows (a block of places at a time), so the handler walks it without locks.

use core::cell::UnsafeCell;
use core::ptr;
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering, compiler_fence};
use std::io;
use std::mem::MaybeUninit;
use std::sync::OnceLock;

const BLOCK_PLACES: usize = 64;

/// A place in the list.
#[derive(Default)]
struct Place {
    taken: AtomicBool,
    /// First address; 0 while nothing is listed here.
    start: AtomicUsize,
    bytes: AtomicUsize,
    lost: AtomicBool,
}

struct Block {
    places: [Place; BLOCK_PLACES],
    next: AtomicPtr<Block>,
}

/// The newest block. Blocks are never freed.
static BLOCKS: AtomicPtr<Block> = AtomicPtr::new(ptr::null_mut());

/// Mappings that were lost since the process began.
static LOST: AtomicU64 = AtomicU64::new(0);

/// How many mappings were lost since the process began: whoever sees it change looks at its own.
pub(crate) fn lost() -> u64 {
    LOST.load(Ordering::Relaxed)
}

/// A mapping's place in the list; taken off on drop, which must come before it is unmapped.
pub(crate) struct Listed(&'static Place);

impl Listed {
    /// Lists the mapping of `bytes` bytes, whole pages of its file, at `start`.
    pub(crate) fn new(start: *mut u8, bytes: usize) -> io::Result<Self> {
        install()?;
        let place = free_place();
        place.lost.store(false, Ordering::Relaxed);
        place.bytes.store(bytes, Ordering::Relaxed);
        // The handler looks at the length only of places that have a start.
        place.start.store(start.expose_provenance(), Ordering::Release);
        Ok(Self(place))
    }

    /// True if the memory was taken away. An access before this call that hit the hole is seen.
    pub(crate) fn is_lost(&self) -> bool {
        // The handler runs in the thread that made the access; the fence keeps the compiler from
        // looking before the access is made.
        compiler_fence(Ordering::SeqCst);
        self.0.lost.load(Ordering::Relaxed)
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        self.0.start.store(0, Ordering::Release);
        self.0.taken.store(false, Ordering::Release);
    }
}

fn blocks() -> impl Iterator<Item = &'static Block> {
    let load = |from: &AtomicPtr<Block>| {
        // SAFETY: null, or a block that was leaked by `free_place`, complete before it was put here.
        unsafe { from.load(Ordering::Acquire).as_ref() }
    };
    core::iter::successors(load(&BLOCKS), move |block| load(&block.next))
}

fn free_place() -> &'static Place {
    let take = |place: &Place| {
        place.taken.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed).is_ok()
    };
    if let Some(place) = blocks().flat_map(|block| &block.places).find(|place| take(place)) {
        return place;
    }
    let block: &'static Block = Box::leak(Box::new(Block {
        places: core::array::from_fn(|_| Place::default()),
        next: AtomicPtr::default(),
    }));
    block.places[0].taken.store(true, Ordering::Relaxed);
    let mut first = BLOCKS.load(Ordering::Relaxed);
    loop {
        block.next.store(first, Ordering::Relaxed);
        let new = ptr::from_ref(block).cast_mut();
        match BLOCKS.compare_exchange(first, new, Ordering::Release, Ordering::Relaxed) {
            Ok(_) => return &block.places[0],
            Err(now) => first = now,
        }
    }
}

/// Who handled SIGBUS before. Written once, before our handler is installed.
struct Before(UnsafeCell<MaybeUninit<libc::sigaction>>);

// SAFETY: written by `install` alone, under its lock, before the handler that reads it can run.
unsafe impl Sync for Before {}

static BEFORE: Before = Before(UnsafeCell::new(MaybeUninit::zeroed()));

fn install() -> io::Result<()> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    let result = INSTALLED.get_or_init(|| {
        let failed = || io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL);
        // SAFETY: an all-zero sigaction is a valid value of the C struct.
        let mut action: libc::sigaction = unsafe { core::mem::zeroed() };
        action.sa_sigaction = (handle as extern "C" fn(_, _, _)) as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        // SAFETY: reads the present action into `BEFORE`, which nobody else accesses yet.
        let known = unsafe { libc::sigaction(libc::SIGBUS, ptr::null(), BEFORE.0.get().cast()) };
        if known != 0 {
            return Err(failed());
        }
        // SAFETY: `handle` has the signature that SA_SIGINFO asks for and is async-signal-safe.
        let set = unsafe { libc::sigaction(libc::SIGBUS, &raw const action, ptr::null_mut()) };
        if set == 0 { Ok(()) } else { Err(failed()) }
    });
    result.map_err(io::Error::from_raw_os_error)
}

/// Async-signal-safe: atomics, and system calls that touch no memory of ours.
extern "C" fn handle(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel gives a valid siginfo of a SIGBUS.
    let address = unsafe { (*info).si_addr() }.addr();
    if replace(address) {
        return;
    }
    // SAFETY: written before this handler was installed, and not since.
    let before = unsafe { (*BEFORE.0.get()).assume_init_ref() };
    if before.sa_sigaction == libc::SIG_DFL || before.sa_sigaction == libc::SIG_IGN {
        // The access is made again and ends the process, as it does by default.
        // SAFETY: an all-zero sigaction is SIG_DFL.
        unsafe {
            let default: libc::sigaction = core::mem::zeroed();
            libc::sigaction(signal, &raw const default, ptr::null_mut());
        }
    } else if before.sa_flags & libc::SA_SIGINFO != 0 {
        // SAFETY: a handler that was installed with SA_SIGINFO has this signature.
        let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) =
            unsafe { core::mem::transmute(before.sa_sigaction) };
        handler(signal, info, context);
    } else {
        // SAFETY: a handler that was installed without SA_SIGINFO has this signature.
        let handler: extern "C" fn(i32) = unsafe { core::mem::transmute(before.sa_sigaction) };
        handler(signal);
    }
}

/// Puts zeroes in the place of the listed mapping at `address`; false if there is none.
fn replace(address: usize) -> bool {
    for place in blocks().flat_map(|block| &block.places) {
        let start = place.start.load(Ordering::Acquire);
        let bytes = place.bytes.load(Ordering::Relaxed);
        if start == 0 || address < start || address - start >= bytes {
            continue;
        }
        // All of it: files on huge pages can only be replaced so, and the rest is as good as gone.
        // SAFETY: the range is a mapping of this crate's: it is taken off the list before it is
        // unmapped, and somebody is accessing it, so it is not being dropped.
        let mapped = unsafe {
            libc::mmap(
                ptr::with_exposed_provenance_mut(start),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED,
                -1,
                0,
            )
        };
        if mapped == libc::MAP_FAILED {
            return false;
        }
        place.lost.store(true, Ordering::Relaxed);
        LOST.fetch_add(1, Ordering::Relaxed);
        return true;
    }
    false
}
