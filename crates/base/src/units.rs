//! Block addresses, block counts and block sizes. Distinct types, so that bytes and blocks of
//! different sizes cannot be mixed up.

use core::fmt;

use serde::{Deserialize, Serialize};

/// A volume's block size: the unit of its addresses and of its checksums.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "u32", try_from = "u32")]
pub enum BlockSize {
    /// 512 bytes.
    B512,
    /// 4096 bytes.
    B4096,
}

/// A block size that is neither 512 nor 4096.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("block size {0} is not supported (use 512 or 4096)")]
pub struct InvalidBlockSize(pub u32);

impl BlockSize {
    /// The size in bytes.
    pub const fn bytes(self) -> u32 {
        match self {
            Self::B512 => 512,
            Self::B4096 => 4096,
        }
    }

    /// log2 of the size in bytes: 9 or 12.
    pub const fn log2(self) -> u8 {
        match self {
            Self::B512 => 9,
            Self::B4096 => 12,
        }
    }

    /// The block size with this log2, if it is one of ours.
    pub const fn from_log2(log2: u8) -> Option<Self> {
        match log2 {
            9 => Some(Self::B512),
            12 => Some(Self::B4096),
            _ => None,
        }
    }

    /// `bytes` in blocks, if it is a whole number of them.
    pub const fn blocks(self, bytes: u64) -> Option<u64> {
        if bytes.is_multiple_of(self.bytes() as u64) { Some(bytes >> self.log2()) } else { None }
    }
}

impl From<BlockSize> for u32 {
    fn from(size: BlockSize) -> u32 {
        size.bytes()
    }
}

impl TryFrom<u32> for BlockSize {
    type Error = InvalidBlockSize;

    fn try_from(bytes: u32) -> Result<Self, InvalidBlockSize> {
        match bytes {
            512 => Ok(Self::B512),
            4096 => Ok(Self::B4096),
            other => Err(InvalidBlockSize(other)),
        }
    }
}

impl fmt::Display for BlockSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.bytes())
    }
}

/// A logical block address: in blocks of the volume's block size, from the volume's start.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Lba(pub u64);

impl Lba {
    /// The address `count` blocks later; `None` past 2^64.
    pub const fn checked_add(self, count: BlockCount) -> Option<Self> {
        match self.0.checked_add(count.0 as u64) {
            Some(lba) => Some(Self(lba)),
            None => None,
        }
    }
}

impl fmt::Display for Lba {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LBA {}", self.0)
    }
}

/// A number of blocks of the volume's block size.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct BlockCount(pub u32);

impl BlockCount {
    /// The bytes that this many blocks of `size` take.
    pub const fn bytes(self, size: BlockSize) -> u64 {
        (self.0 as u64) << size.log2()
    }
}

/// True if block ranges `[a, a + a_blocks)` and `[b, b + b_blocks)` share a block.
pub const fn overlaps(a: Lba, a_blocks: BlockCount, b: Lba, b_blocks: BlockCount) -> bool {
    a.0 < b.0.saturating_add(b_blocks.0 as u64) && b.0 < a.0.saturating_add(a_blocks.0 as u64)
}
