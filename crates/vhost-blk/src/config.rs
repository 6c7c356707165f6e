//! What a device is: size, limits, features; and how a guest sees that in the configuration space.

use core::time::Duration;

use base::BlockSize;
use base::limits::{RANGE_BLOCKS_MAX, VOLUME_BYTES_MAX};

use crate::Capacity;

/// Bytes of the serial that GET_ID answers.
pub const SERIAL_BYTES: usize = 20;

/// Queues of a device, at most.
pub const QUEUES_MAX: u16 = 64;

/// Entries of a queue, at most.
pub const QUEUE_SIZE_MAX: u16 = 1024;

/// Bytes of a virtio sector, the unit of the configuration space and of requests whatever the
/// block size is (virtio 1.3, 5.2.4).
pub const SECTOR_BYTES: u64 = 512;

/// Bytes of `struct virtio_blk_config` that this device fills: up to `secure_erase_*`, which is
/// never offered. Front ends ask for 57 or 60 bytes; what lies beyond reads as zeroes.
pub const CONFIG_BYTES: usize = 60;

// Feature bits of virtio-blk, virtio and vhost (virtio 1.3, 5.2.3 and 6; vhost-user).
pub(crate) const F_SIZE_MAX: u64 = 1 << 1;
pub(crate) const F_SEG_MAX: u64 = 1 << 2;
pub(crate) const F_RO: u64 = 1 << 5;
pub(crate) const F_BLK_SIZE: u64 = 1 << 6;
pub(crate) const F_FLUSH: u64 = 1 << 9;
pub(crate) const F_TOPOLOGY: u64 = 1 << 10;
pub(crate) const F_MQ: u64 = 1 << 12;
pub(crate) const F_DISCARD: u64 = 1 << 13;
pub(crate) const F_WRITE_ZEROES: u64 = 1 << 14;
pub(crate) const F_LOG_ALL: u64 = 1 << 26;
pub(crate) const F_INDIRECT_DESC: u64 = 1 << 28;
pub(crate) const F_EVENT_IDX: u64 = 1 << 29;
pub(crate) const F_PROTOCOL_FEATURES: u64 = 1 << 30;
pub(crate) const F_VERSION_1: u64 = 1 << 32;

/// A virtual disk as a guest sees it. [`DeviceConfig::new`] gives sound defaults.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceConfig {
    /// Size in blocks of `block_size`.
    pub blocks: u64,
    /// The logical block size.
    pub block_size: BlockSize,
    /// Number of queues, 1 to 64.
    pub queues: u16,
    /// The largest queue that a front end may set up: a power of two, at most 1024.
    pub queue_size_max: u16,
    /// What GET_ID answers: ASCII, zero-padded.
    pub serial: [u8; SERIAL_BYTES],
    /// Writes, discards and write-zeroes are refused.
    pub read_only: bool,
    /// log2 of the logical blocks in a physical one.
    pub physical_block_exp: u8,
    /// The preferred size of an I/O, in logical blocks.
    pub opt_io_size: u32,
    /// Data segments in a request, at most. At most the queue size less two, for guests that do
    /// not use indirect descriptors.
    pub seg_max: u32,
    /// Bytes in a segment, at most; `None` does not limit them (and does not offer the feature).
    pub size_max: Option<u32>,
    /// 512-byte sectors in one discard segment, at most.
    pub max_discard_sectors: u32,
    /// Segments in one discard, at most.
    pub max_discard_seg: u32,
    /// 512-byte sectors to which discards should be aligned.
    pub discard_sector_alignment: u32,
    /// 512-byte sectors in one write-zeroes segment, at most.
    pub max_write_zeroes_sectors: u32,
    /// Segments in one write-zeroes, at most.
    pub max_write_zeroes_seg: u32,
    /// Write-zeroes may give the space back.
    pub write_zeroes_may_unmap: bool,
    /// How the front end hears that the disk has grown.
    pub capacity: Capacity,
    /// How long a stopping front end (GET_VRING_BASE, SET_VRING_ENABLE 0) waits for what is under
    /// way. When it passes, the connection is dropped: the requests stay in the in-flight buffer.
    pub drain_timeout: Duration,
}

/// A device configuration that cannot be served.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The size is zero or above the limit.
    #[error("a volume of {bytes} bytes cannot be served (1 block to {VOLUME_BYTES_MAX} bytes)")]
    Size {
        /// The size asked for, saturated.
        bytes: u64,
    },
    /// A limit is out of range.
    #[error("{field} is {value}, which is not {expected}")]
    Limit {
        /// The field of [`DeviceConfig`].
        field: &'static str,
        /// Its value.
        value: u64,
        /// What it must be.
        expected: &'static str,
    },
}

impl DeviceConfig {
    /// A disk of `blocks` blocks that is called `serial` (its first 20 bytes), with one queue.
    pub fn new(blocks: u64, block_size: BlockSize, serial: &str) -> Self {
        let mut id = [0; SERIAL_BYTES];
        for (to, from) in id.iter_mut().zip(serial.bytes()) {
            *to = from;
        }
        let sectors_per_block = block_size.bytes() / 512;
        let range_sectors = RANGE_BLOCKS_MAX * sectors_per_block;
        Self {
            blocks,
            block_size,
            queues: 1,
            queue_size_max: QUEUE_SIZE_MAX,
            serial: id,
            read_only: false,
            physical_block_exp: 12 - block_size.log2(),
            opt_io_size: 128 * 1024 / block_size.bytes(),
            seg_max: 126,
            size_max: None,
            max_discard_sectors: range_sectors,
            max_discard_seg: 16,
            discard_sector_alignment: 8,
            max_write_zeroes_sectors: range_sectors,
            max_write_zeroes_seg: 16,
            write_zeroes_may_unmap: true,
            capacity: Capacity::new(blocks),
            drain_timeout: Duration::from_secs(30),
        }
    }

    /// Says what cannot be served, if anything.
    pub fn check(&self) -> Result<(), ConfigError> {
        let bytes = self.blocks.saturating_mul(u64::from(self.block_size.bytes()));
        if bytes == 0 || bytes > VOLUME_BYTES_MAX {
            return Err(ConfigError::Size { bytes });
        }
        let limits: [(&'static str, u64, bool, &'static str); 10] = [
            ("queues", self.queues.into(), (1..=QUEUES_MAX).contains(&self.queues), "1 to 64"),
            (
                "queue_size_max",
                self.queue_size_max.into(),
                (2..=QUEUE_SIZE_MAX).contains(&self.queue_size_max)
                    && self.queue_size_max.is_power_of_two(),
                "a power of two from 2 to 1024",
            ),
            (
                "physical_block_exp",
                self.physical_block_exp.into(),
                self.physical_block_exp <= 8,
                "at most 8",
            ),
            ("seg_max", self.seg_max.into(), (1..=1022).contains(&self.seg_max), "1 to 1022"),
            (
                "size_max",
                self.size_max.unwrap_or(u32::MAX).into(),
                self.size_max.is_none_or(|bytes| bytes >= 4096),
                "at least 4096",
            ),
            (
                "max_discard_sectors",
                self.max_discard_sectors.into(),
                self.max_discard_sectors >= self.block_size.bytes() / 512,
                "at least a block",
            ),
            (
                "max_discard_seg",
                self.max_discard_seg.into(),
                (1..=256).contains(&self.max_discard_seg),
                "1 to 256",
            ),
            (
                "discard_sector_alignment",
                self.discard_sector_alignment.into(),
                self.discard_sector_alignment >= 1,
                "at least 1",
            ),
            (
                "max_write_zeroes_sectors",
                self.max_write_zeroes_sectors.into(),
                self.max_write_zeroes_sectors >= self.block_size.bytes() / 512,
                "at least a block",
            ),
            (
                "max_write_zeroes_seg",
                self.max_write_zeroes_seg.into(),
                (1..=256).contains(&self.max_write_zeroes_seg),
                "1 to 256",
            ),
        ];
        match limits.into_iter().find(|(_, _, good, _)| !good) {
            Some((field, value, _, expected)) => Err(ConfigError::Limit { field, value, expected }),
            None => Ok(()),
        }
    }

    /// The virtio features that this device offers, vhost's own bits included.
    pub fn features(&self) -> u64 {
        let always = F_VERSION_1
            | F_SEG_MAX
            | F_BLK_SIZE
            | F_TOPOLOGY
            | F_FLUSH
            | F_MQ
            | F_DISCARD
            | F_WRITE_ZEROES
            | F_INDIRECT_DESC
            | F_EVENT_IDX
            | F_LOG_ALL
            | F_PROTOCOL_FEATURES;
        let size_max = if self.size_max.is_some() { F_SIZE_MAX } else { 0 };
        let read_only = if self.read_only { F_RO } else { 0 };
        always | size_max | read_only
    }

    /// `struct virtio_blk_config` (virtio 1.3, 5.2.4), little-endian. The capacity is in 512-byte
    /// sectors whatever the block size.
    pub fn config_space(&self) -> [u8; CONFIG_BYTES] {
        let mut space = [0; CONFIG_BYTES];
        let mut put = |offset: usize, bytes: &[u8]| {
            space[offset..offset + bytes.len()].copy_from_slice(bytes);
        };
        let sectors = self.blocks * (u64::from(self.block_size.bytes()) / SECTOR_BYTES);
        put(0, &sectors.to_le_bytes());
        put(8, &self.size_max.unwrap_or(0).to_le_bytes());
        put(12, &self.seg_max.to_le_bytes());
        // 16: geometry, not offered.
        put(20, &self.block_size.bytes().to_le_bytes());
        put(24, &[self.physical_block_exp, 0]);
        put(26, &1_u16.to_le_bytes()); // min_io_size, in logical blocks
        put(28, &self.opt_io_size.to_le_bytes());
        // 32: writeback, not offered; 33: unused.
        put(34, &self.queues.to_le_bytes());
        put(36, &self.max_discard_sectors.to_le_bytes());
        put(40, &self.max_discard_seg.to_le_bytes());
        put(44, &self.discard_sector_alignment.to_le_bytes());
        put(48, &self.max_write_zeroes_sectors.to_le_bytes());
        put(52, &self.max_write_zeroes_seg.to_le_bytes());
        put(56, &[u8::from(self.write_zeroes_may_unmap)]);
        space
    }
}
