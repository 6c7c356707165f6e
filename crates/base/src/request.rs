//! The block request that every front end speaks to a head, and the status it gets back.

use core::fmt;

use crate::buffer::{Buffer, BufferMut};
use crate::units::{BlockCount, Lba};

/// A front end's name for a request; unique among its unanswered ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

/// What a request asks for.
#[derive(Debug)]
pub enum Operation {
    /// Read into `buffer`'s payload, which holds at least the range's bytes.
    Read {
        /// Where the data goes; comes back in the reply.
        buffer: BufferMut,
    },
    /// Write the first bytes of `buffer`'s payload. The copy from the guest has been made.
    Write {
        /// The data, at the payload's start; the header area is the head's to fill.
        buffer: BufferMut,
        /// Answer only when the data is on media.
        fua: bool,
    },
    /// Answer when every write acknowledged before is on media at a write quorum.
    Flush,
    /// The range's content no longer matters; it reads as zeroes afterwards.
    Discard,
    /// The range reads as zeroes afterwards.
    WriteZeroes {
        /// Answer only when this is on media.
        fua: bool,
    },
}

/// A request of a front end. A range is within the volume and at most
/// [`PAYLOAD_BYTES_MAX`](crate::limits::PAYLOAD_BYTES_MAX) bytes (reads, writes) or
/// [`RANGE_BLOCKS_MAX`](crate::limits::RANGE_BLOCKS_MAX) blocks (discard, zeroes): the front end
/// has checked and split it.
#[derive(Debug)]
pub struct BlockRequest {
    /// Comes back in the reply.
    pub id: RequestId,
    /// The first block. Ignored by flush.
    pub lba: Lba,
    /// The number of blocks, above zero. Ignored by flush.
    pub blocks: BlockCount,
    /// What to do.
    pub operation: Operation,
}

/// The answer to a [`BlockRequest`].
#[derive(Debug)]
pub struct BlockReply {
    /// The request's id.
    pub id: RequestId,
    /// How it ended.
    pub status: Status,
    /// The data of a successful read, exactly the range's bytes.
    pub data: Option<Buffer>,
}

/// How a request ended. Front ends map it to virtio or NVMe status in one exhaustive function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Done.
    Ok,
    /// The volume is read-only.
    ReadOnly,
    /// The range is outside the volume, or not of a supported length.
    InvalidRange,
    /// The command is not supported.
    Unsupported,
    /// No copy of the data could be read and verified, or the volume's stall deadline passed.
    IoError,
    /// This head is no longer the volume's head, or is shutting down: nothing was decided here.
    Superseded,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ok => "ok",
            Self::ReadOnly => "the volume is read-only",
            Self::InvalidRange => "the range is outside the volume",
            Self::Unsupported => "the command is not supported",
            Self::IoError => "I/O error",
            Self::Superseded => "this head no longer holds the volume",
        })
    }
}
