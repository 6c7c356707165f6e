//! Submission and completion queue entries (base 2.0, 3.3.3.1 and 3.3.3.2), opcodes and SGLs.

use super::status::StatusCode;
use super::{put, take, u16_at, u32_at, u64_at};

/// Bytes of a submission queue entry.
pub const COMMAND_BYTES: usize = 64;
/// Bytes of a completion queue entry.
pub const COMPLETION_BYTES: usize = 16;

/// Opcodes of admin commands.
pub mod admin {
    /// Get Log Page.
    pub const GET_LOG_PAGE: u8 = 0x02;
    /// Identify.
    pub const IDENTIFY: u8 = 0x06;
    /// Abort.
    pub const ABORT: u8 = 0x08;
    /// Set Features.
    pub const SET_FEATURES: u8 = 0x09;
    /// Get Features.
    pub const GET_FEATURES: u8 = 0x0a;
    /// Asynchronous Event Request.
    pub const ASYNC_EVENT: u8 = 0x0c;
    /// Keep Alive.
    pub const KEEP_ALIVE: u8 = 0x18;
}

/// Opcodes of the NVM command set.
pub mod nvm {
    /// Flush.
    pub const FLUSH: u8 = 0x00;
    /// Write.
    pub const WRITE: u8 = 0x01;
    /// Read.
    pub const READ: u8 = 0x02;
    /// Write Zeroes.
    pub const WRITE_ZEROES: u8 = 0x08;
    /// Dataset Management.
    pub const DATASET_MANAGEMENT: u8 = 0x09;
    /// CDW12 of Read, Write and Write Zeroes: Force Unit Access.
    pub const FORCE_UNIT_ACCESS: u32 = 1 << 30;
    /// CDW12 of Write Zeroes: Deallocate.
    pub const DEALLOCATE: u32 = 1 << 25;
    /// CDW12: the protection information field, of which namespaces here have none.
    pub const PROTECTION: u32 = 0xf << 26;
    /// CDW11 of Dataset Management: Attribute - Deallocate.
    pub const ATTRIBUTE_DEALLOCATE: u32 = 1 << 2;
}

/// Fabrics commands (base 2.0, 6).
pub const FABRICS: u8 = 0x7f;
/// The namespace id that means all of them.
pub const NSID_ALL: u32 = 0xffff_ffff;

/// Where a command's data is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sgl {
    /// In the capsule (data block descriptor with an offset).
    InCapsule {
        /// Offset in the capsule's data, in bytes.
        offset: u64,
        /// Bytes.
        length: u32,
    },
    /// Sent in data PDUs (transport data block descriptor).
    Transport {
        /// Bytes.
        length: u32,
    },
    /// Anything else; not supported.
    Other,
}

impl Sgl {
    /// The descriptor of a command without data.
    pub const NONE: Self = Self::Transport { length: 0 };

    const IN_CAPSULE: u8 = 0x01;
    const TRANSPORT: u8 = 0x5a;

    /// Bytes of data.
    pub const fn length(self) -> u32 {
        match self {
            Self::InCapsule { length, .. } | Self::Transport { length } => length,
            Self::Other => 0,
        }
    }

    fn encode(self, out: &mut [u8]) {
        let (offset, length, kind) = match self {
            Self::InCapsule { offset, length } => (offset, length, Self::IN_CAPSULE),
            Self::Transport { length } => (0, length, Self::TRANSPORT),
            Self::Other => (0, 0, 0xff),
        };
        put(out, 0, &offset.to_le_bytes());
        put(out, 8, &length.to_le_bytes());
        out[15] = kind;
    }

    fn decode(bytes: &[u8]) -> Self {
        let length = u32_at(bytes, 8);
        match bytes[15] {
            Self::IN_CAPSULE => Self::InCapsule { offset: u64_at(bytes, 0), length },
            Self::TRANSPORT => Self::Transport { length },
            _ => Self::Other,
        }
    }
}

/// A submission queue entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Command {
    /// OPC.
    pub opcode: u8,
    /// FUSE, zero: no fused commands.
    pub fuse: u8,
    /// CID.
    pub id: u16,
    /// NSID; FCTYPE in its first byte for fabrics commands.
    pub nsid: u32,
    /// CDW2 and CDW3.
    pub cdw2: u64,
    /// MPTR.
    pub metadata: u64,
    /// SGL1.
    pub sgl: Sgl,
    /// CDW10 to CDW15.
    pub cdw10: [u32; 6],
}

impl Command {
    /// A command without data or parameters.
    pub const fn new(opcode: u8, nsid: u32) -> Self {
        Self { opcode, fuse: 0, id: 0, nsid, cdw2: 0, metadata: 0, sgl: Sgl::NONE, cdw10: [0; 6] }
    }

    /// Its bytes.
    pub fn encode(&self) -> [u8; COMMAND_BYTES] {
        let mut out = [0; COMMAND_BYTES];
        out[0] = self.opcode;
        // PSDT 01b: SGLs, as fabrics demand.
        out[1] = self.fuse | 0x40;
        put(&mut out, 2, &self.id.to_le_bytes());
        put(&mut out, 4, &self.nsid.to_le_bytes());
        put(&mut out, 8, &self.cdw2.to_le_bytes());
        put(&mut out, 16, &self.metadata.to_le_bytes());
        self.sgl.encode(&mut out[24..40]);
        for (index, value) in self.cdw10.iter().enumerate() {
            put(&mut out, 40 + 4 * index, &value.to_le_bytes());
        }
        out
    }

    /// From [`COMMAND_BYTES`] bytes.
    pub fn decode(bytes: &[u8; COMMAND_BYTES]) -> Self {
        Self {
            opcode: bytes[0],
            fuse: bytes[1] & 3,
            id: u16_at(bytes, 2),
            nsid: u32_at(bytes, 4),
            cdw2: u64_at(bytes, 8),
            metadata: u64_at(bytes, 16),
            sgl: Sgl::decode(&bytes[24..40]),
            cdw10: core::array::from_fn(|index| u32_at(bytes, 40 + 4 * index)),
        }
    }

    /// CDW10 and CDW11 (`pair` 0), 12 and 13 (1), or 14 and 15 (2) as one number.
    pub fn wide(&self, pair: usize) -> u64 {
        u64::from(self.cdw10[2 * pair]) | (u64::from(self.cdw10[2 * pair + 1]) << 32)
    }

    /// The same command with [`Command::wide`] `pair` set.
    #[must_use]
    pub fn with_wide(mut self, pair: usize, value: u64) -> Self {
        let bytes = value.to_le_bytes();
        self.cdw10[2 * pair] = u32::from_le_bytes(take(&bytes, 0));
        self.cdw10[2 * pair + 1] = u32::from_le_bytes(take(&bytes, 4));
        self
    }
}

/// A completion queue entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// DW0 and DW1.
    pub result: u64,
    /// SQHD.
    pub queue_head: u16,
    /// CID.
    pub id: u16,
    /// How it ended.
    pub status: StatusCode,
}

impl Completion {
    /// Its bytes.
    pub fn encode(&self) -> [u8; COMPLETION_BYTES] {
        let mut out = [0; COMPLETION_BYTES];
        put(&mut out, 0, &self.result.to_le_bytes());
        put(&mut out, 8, &self.queue_head.to_le_bytes());
        put(&mut out, 12, &self.id.to_le_bytes());
        put(&mut out, 14, &self.status.to_wire().to_le_bytes());
        out
    }

    /// From [`COMPLETION_BYTES`] bytes (fewer read as zeroes).
    pub fn decode(bytes: &[u8]) -> Self {
        Self {
            result: u64_at(bytes, 0),
            queue_head: u16_at(bytes, 8),
            id: u16_at(bytes, 12),
            status: StatusCode::from_wire(u16_at(bytes, 14)),
        }
    }
}
