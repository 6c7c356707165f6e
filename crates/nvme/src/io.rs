//! What the machines and the shell that owns the sockets say to each other. The same for
//! [`Target`](crate::Target) and [`Initiator`](crate::Initiator).
//!
//! Receiving: the machine lends the shell a buffer with [`Receive`]; the shell fills part of the
//! named region and gives the buffer back with `Received { connection, buffer, bytes }`. There is
//! at most one receive outstanding on a connection. `bytes == 0` says that the peer has closed,
//! or that the receive failed.
//!
//! Sending: `Send { connection, part }` outputs of one connection are written to its socket in
//! order; the shell gathers as many as it likes into one call and reports progress with
//! `Sent { connection, bytes }`, any number of times. A target with too many unsent bytes on a
//! connection takes no more commands from it: without `Sent` a connection comes to a halt.
//!
//! Closing: the shell answers `Close { connection }` with `Closed { connection }` once it has no
//! operation under way on the socket. It gives `Closed` unasked after an error. `Closed` is the
//! last input of a connection, and its id is free again then. A `Received` between `Close` and
//! `Closed` is fine; the buffer of a cancelled receive may also just be dropped. `Send` and
//! `Receive` outputs of a connection that the shell has closed unasked may still be in the
//! machine's queue: the shell drops them.
//!
//! Buffers: a machine that finds the pool empty stops receiving on that connection and tries
//! again at every `handle`, at the latest at `next_deadline`.

use core::ops::Range;

use base::BufferMut;

/// A connection. In a [`Target`](crate::Target) the shell chooses it, in an
/// [`Initiator`](crate::Initiator) the machine does (each has its own namespace of ids).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnectionId(pub u64);

/// A controller of the target: one host's admin connection and its I/O connections. Never reused
/// in the life of a target machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(pub u64);

/// Names an unanswered replica command. The target chooses it for commands that it hands out, the
/// caller of an initiator for commands that it hands in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tag(pub u64);

/// Where in a buffer received bytes go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReceiveRegion {
    /// This range of the header page.
    Header(Range<usize>),
    /// This range of the payload.
    Payload(Range<usize>),
}

impl ReceiveRegion {
    /// Bytes of the region, above zero.
    pub fn len(&self) -> usize {
        match self {
            Self::Header(range) | Self::Payload(range) => range.len(),
        }
    }

    /// True if there is no byte in it, which no machine asks for.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The bytes of `buffer` that are in the region.
    ///
    /// # Panics
    /// If `buffer` is not the one the region came with.
    pub fn bytes<'a>(&self, buffer: &'a mut BufferMut) -> &'a mut [u8] {
        match self {
            Self::Header(range) => &mut buffer.header_mut()[range.clone()],
            Self::Payload(range) => &mut buffer.payload_mut()[range.clone()],
        }
    }
}

/// Asks the shell to receive into a buffer.
#[derive(Debug)]
pub struct Receive {
    /// From where.
    pub connection: ConnectionId,
    /// Into what; comes back in `Received`.
    pub buffer: BufferMut,
    /// Where in `buffer`.
    pub region: ReceiveRegion,
    /// So many bytes are needed to make progress: a hint (for MSG_WAITALL, say). Fewer are fine.
    pub min_bytes: usize,
}
