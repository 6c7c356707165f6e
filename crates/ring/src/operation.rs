//! Operations: what the kernel is working on. Each owns its buffers until it is done.

use std::os::fd::{OwnedFd, RawFd};

use base::{Buffer, BufferMut};
use io_uring::squeue::Entry;
use io_uring::{opcode, types};
use rustix::net::SocketAddrAny;

use crate::error::IoError;
use crate::handle::{Key, Token};
use crate::memory::Region;

/// Times that a device operation is started again after EINTR or EAGAIN.
const RETRIES_MAX: u8 = 64;

/// A file as the kernel is told it: registered, or by its descriptor.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Target {
    Registered(u32),
    Descriptor(RawFd),
}

/// Builds an entry for either kind of [`Target`].
macro_rules! on {
    ($target:expr, |$file:ident| $build:expr) => {
        match $target {
            $crate::operation::Target::Registered(index) => {
                let $file = io_uring::types::Fixed(index);
                $build
            }
            $crate::operation::Target::Descriptor(descriptor) => {
                let $file = io_uring::types::Fd(descriptor);
                $build
            }
        }
    };
}
pub(crate) use on;

/// Storage for gathering parts; reused.
#[derive(Default)]
pub(crate) struct Gather {
    pub(crate) parts: Vec<Buffer>,
    pub(crate) iovecs: Vec<libc::iovec>,
    /// Index into `iovecs` of the first that is not done.
    pub(crate) first: usize,
}

pub(crate) struct Read {
    pub(crate) device: Key,
    pub(crate) target: Target,
    pub(crate) token: Token,
    pub(crate) offset: u64,
    pub(crate) buffer: BufferMut,
    /// In bytes of the slot.
    pub(crate) start: usize,
    pub(crate) length: usize,
    pub(crate) done: usize,
    pub(crate) block_bytes: usize,
    pub(crate) retries: u8,
}

pub(crate) struct Write {
    pub(crate) device: Key,
    pub(crate) target: Target,
    pub(crate) token: Token,
    pub(crate) offset: u64,
    pub(crate) gather: Box<Gather>,
    pub(crate) length: usize,
    pub(crate) done: usize,
    pub(crate) block_bytes: usize,
    pub(crate) retries: u8,
}

pub(crate) struct Connect {
    pub(crate) token: Token,
    pub(crate) socket: OwnedFd,
    pub(crate) address: SocketAddrAny,
    pub(crate) expired: bool,
}

pub(crate) struct Receive {
    pub(crate) connection: Key,
    pub(crate) target: Target,
    pub(crate) buffer: BufferMut,
    pub(crate) start: usize,
    pub(crate) length: usize,
    pub(crate) min_bytes: usize,
    pub(crate) done: usize,
}

pub(crate) enum Operation {
    Read(Read),
    Write(Write),
    Sync {
        device: Key,
        target: Target,
        token: Token,
        retries: u8,
    },
    Discard {
        device: Key,
        target: Target,
        token: Token,
        offset: u64,
        length: u64,
        retries: u8,
    },
    /// Multishot.
    Accept {
        listener: Key,
        descriptor: RawFd,
    },
    /// Boxed: the kernel reads the address.
    Connect(Box<Connect>),
    Receive(Receive),
    /// The connection holds what is sent.
    Send {
        connection: Key,
    },
    /// Multishot.
    Poll {
        watch: Key,
        descriptor: RawFd,
    },
}

/// What follows from a completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Start it again, for the rest.
    Again,
    /// It is over.
    Done(Result<(), IoError>),
}

/// The error behind a negative result.
pub(crate) fn error_of(result: i32) -> IoError {
    match -result {
        libc::ECANCELED => IoError::Cancelled,
        libc::ETIMEDOUT | libc::ETIME => IoError::TimedOut,
        libc::EOPNOTSUPP | libc::ENOSYS => IoError::Unsupported,
        errno => IoError::Os(errno),
    }
}

/// What to do about the result of an operation that transfers nothing.
pub(crate) fn step_plain(result: i32, retries: &mut u8) -> Step {
    if result >= 0 {
        Step::Done(Ok(()))
    } else if matches!(-result, libc::EINTR | libc::EAGAIN) && *retries < RETRIES_MAX {
        *retries += 1;
        Step::Again
    } else {
        Step::Done(Err(error_of(result)))
    }
}

/// What to do after a device transferred `result` bytes more. Success is only ever all of it.
fn step_transfer(
    result: i32,
    done: &mut usize,
    length: usize,
    block_bytes: usize,
    retries: &mut u8,
) -> Step {
    let Ok(bytes) = usize::try_from(result) else {
        return step_plain(result, retries);
    };
    *done += bytes;
    assert!(*done <= length, "the kernel transfers no more than it was asked to");
    if *done == length {
        Step::Done(Ok(()))
    } else if bytes == 0 || !bytes.is_multiple_of(block_bytes) {
        // The end of the file, or a rest that direct I/O cannot start at.
        Step::Done(Err(IoError::Short { done: *done }))
    } else {
        Step::Again
    }
}

/// `bytes` of one transfer, as the kernel counts them.
fn length32(bytes: usize) -> u32 {
    u32::try_from(bytes).expect("buffers are shorter than 4 GiB")
}

impl Read {
    pub(crate) fn entry(&mut self, region: &Region) -> Entry {
        let rest = self.start + self.done..self.start + self.length;
        let bytes = length32(rest.len());
        let memory = self.buffer.slot_mut()[rest].as_mut_ptr();
        let offset = self.offset + self.done as u64;
        match region.registered(memory, bytes as usize) {
            Some(index) => on!(self.target, |file| {
                opcode::ReadFixed::new(file, memory, bytes, index).offset(offset).build()
            }),
            None => on!(self.target, |file| {
                opcode::Read::new(file, memory, bytes).offset(offset).build()
            }),
        }
    }

    pub(crate) fn step(&mut self, result: i32) -> Step {
        let Self { done, length, block_bytes, retries, .. } = self;
        step_transfer(result, done, *length, *block_bytes, retries)
    }
}

impl Write {
    pub(crate) fn entry(&mut self, region: &Region) -> Entry {
        let iovecs = &self.gather.iovecs[self.gather.first..];
        let offset = self.offset + self.done as u64;
        if let [one] = iovecs {
            let memory = one.iov_base.cast::<u8>().cast_const();
            let bytes = length32(one.iov_len);
            return match region.registered(memory, one.iov_len) {
                Some(index) => on!(self.target, |file| {
                    opcode::WriteFixed::new(file, memory, bytes, index).offset(offset).build()
                }),
                None => on!(self.target, |file| {
                    opcode::Write::new(file, memory, bytes).offset(offset).build()
                }),
            };
        }
        // Not WRITEV_FIXED, which would save about a microsecond: it came with Linux 6.15 and was
        // still being mended after that, and this is the path that every log write takes.
        let count = length32(iovecs.len());
        on!(self.target, |file| {
            opcode::Writev::new(file, iovecs.as_ptr(), count).offset(offset).build()
        })
    }

    pub(crate) fn step(&mut self, result: i32) -> Step {
        let Self { done, length, block_bytes, retries, .. } = self;
        let step = step_transfer(result, done, *length, *block_bytes, retries);
        if step == Step::Again && result > 0 {
            self.gather.advance(result.unsigned_abs() as usize);
        }
        step
    }
}

impl Gather {
    /// Fills in the vectors for `parts`; neighbours in memory become one.
    pub(crate) fn set(&mut self, parts: impl IntoIterator<Item = Buffer>) {
        debug_assert!(self.parts.is_empty() && self.iovecs.is_empty());
        self.first = 0;
        for part in parts {
            push_iovec(&mut self.iovecs, part.bytes());
            self.parts.push(part);
        }
    }

    /// The first `bytes` that are not done are done.
    pub(crate) fn advance(&mut self, bytes: usize) {
        self.first = advance(&mut self.iovecs, self.first, bytes);
    }

    /// Gives the parts back; keeps the storage.
    pub(crate) fn clear(&mut self) {
        self.parts.clear();
        self.iovecs.clear();
    }
}

/// Appends `bytes` to `iovecs`, to the last vector if they follow it in memory.
pub(crate) fn push_iovec(iovecs: &mut Vec<libc::iovec>, bytes: &[u8]) {
    let base = bytes.as_ptr().cast_mut();
    match iovecs.last_mut() {
        Some(last) if last.iov_base.cast::<u8>().wrapping_add(last.iov_len) == base => {
            last.iov_len += bytes.len();
        }
        _ => iovecs.push(libc::iovec { iov_base: base.cast(), iov_len: bytes.len() }),
    }
}

/// Takes `bytes` off the front of `iovecs[first..]`; gives the new first.
pub(crate) fn advance(iovecs: &mut [libc::iovec], mut first: usize, mut bytes: usize) -> usize {
    while bytes > 0 {
        let iovec = &mut iovecs[first];
        if bytes < iovec.iov_len {
            iovec.iov_base = iovec.iov_base.cast::<u8>().wrapping_add(bytes).cast();
            iovec.iov_len -= bytes;
            return first;
        }
        bytes -= iovec.iov_len;
        first += 1;
    }
    first
}

impl Connect {
    pub(crate) fn entry(&self) -> Entry {
        let file = types::Fd(std::os::fd::AsRawFd::as_raw_fd(&self.socket));
        let address = self.address.as_ptr().cast::<libc::sockaddr>();
        opcode::Connect::new(file, address, self.address.addr_len()).build()
    }
}

impl Receive {
    pub(crate) fn entry(&mut self) -> Entry {
        let rest = self.start + self.done..self.start + self.length;
        let bytes = length32(rest.len());
        let memory = self.buffer.slot_mut()[rest].as_mut_ptr();
        // With MSG_WAITALL the kernel itself waits for the rest.
        let flags = if self.min_bytes == self.length { libc::MSG_WAITALL } else { 0 };
        on!(self.target, |file| opcode::Recv::new(file, memory, bytes).flags(flags).build())
    }

    pub(crate) fn step(&mut self, result: i32) -> Step {
        let Ok(bytes) = usize::try_from(result) else {
            return if matches!(-result, libc::EINTR | libc::EAGAIN) {
                Step::Again
            } else {
                Step::Done(Err(error_of(result)))
            };
        };
        self.done += bytes;
        assert!(self.done <= self.length, "the kernel receives no more than it was asked to");
        if bytes == 0 || self.done >= self.min_bytes { Step::Done(Ok(())) } else { Step::Again }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transfer_succeeds_only_as_a_whole() {
        let step = |results: &[i32]| {
            let (mut done, mut retries) = (0, 0);
            let mut last = Step::Again;
            for &result in results {
                assert_eq!(last, Step::Again);
                last = step_transfer(result, &mut done, 8192, 512, &mut retries);
            }
            last
        };
        assert_eq!(step(&[8192]), Step::Done(Ok(())));
        assert_eq!(step(&[4096, 512, 3584]), Step::Done(Ok(())));
        assert_eq!(step(&[4096]), Step::Again);
        assert_eq!(step(&[4096, 0]), Step::Done(Err(IoError::Short { done: 4096 })));
        assert_eq!(step(&[100]), Step::Done(Err(IoError::Short { done: 100 })));
        assert_eq!(step(&[4096, -libc::EIO]), Step::Done(Err(IoError::Os(libc::EIO))));
        assert_eq!(step(&[-libc::EINTR, 8192]), Step::Done(Ok(())));
        assert_eq!(step(&[-libc::EAGAIN; 65]), Step::Done(Err(IoError::Os(libc::EAGAIN))));
        assert_eq!(step(&[-libc::ENOSPC]), Step::Done(Err(IoError::Os(libc::ENOSPC))));
    }

    #[test]
    fn vectors_merge_and_advance() {
        let memory = [7_u8; 100];
        let mut iovecs = Vec::new();
        for range in [0..10, 10..30, 40..50, 60..61, 61..70] {
            push_iovec(&mut iovecs, &memory[range]);
        }
        let lengths = |iovecs: &[libc::iovec]| iovecs.iter().map(|v| v.iov_len).collect::<Vec<_>>();
        assert_eq!(lengths(&iovecs), [30, 10, 10]);
        let mut first = advance(&mut iovecs, 0, 29);
        assert_eq!((first, lengths(&iovecs[first..])), (0, vec![1, 10, 10]));
        assert_eq!(iovecs[0].iov_base.cast::<u8>().cast_const(), &raw const memory[29]);
        first = advance(&mut iovecs, first, 11);
        assert_eq!((first, lengths(&iovecs[first..])), (2, vec![10]));
        first = advance(&mut iovecs, first, 10);
        assert_eq!(first, 3);
    }

    /// After a short write the rest is written, from where it ended.
    #[test]
    fn a_short_write_goes_on_in_the_right_part() {
        let pool = base::BufferPool::heap(3, 0);
        let parts: Vec<_> =
            (0..3).map(|_| pool.take(4096).unwrap().freeze().payload(4096)).collect();
        let mut gather = Box::<Gather>::default();
        gather.set(parts.iter().cloned());
        let mut write = Write {
            device: Key { index: 0, generation: 0 },
            target: Target::Descriptor(-1),
            token: Token(0),
            offset: 0,
            gather,
            length: 12288,
            done: 0,
            block_bytes: 512,
            retries: 0,
        };
        assert_eq!(write.step(4608), Step::Again);
        assert_eq!(write.done, 4608);
        let rest = &write.gather.iovecs[write.gather.first..];
        assert_eq!(rest[0].iov_base.cast_const().cast(), &raw const parts[1].bytes()[512]);
        assert_eq!(rest.iter().map(|iovec| iovec.iov_len).sum::<usize>(), 12288 - 4608);
        assert_eq!(write.step(12288 - 4608), Step::Done(Ok(())));
    }
}
