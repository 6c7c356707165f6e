//! Where things are: the areas of each device, segments, chunks and metadata regions.

use core::fmt;

use base::limits::PAGE_BYTES;
use base::{ClusterId, PoolId, ServerId};

use crate::label::Label;
use crate::metadata;

/// A page in bytes, as disk offsets count.
pub(crate) const PAGE: u64 = PAGE_BYTES as u64;

/// The first bytes of every device, which hold two copies of its label.
pub const LABEL_AREA_BYTES: usize = 128 * 1024;
/// Offset of the label's second copy: either half of the label area has one.
pub const LABEL_COPY_OFFSET: usize = 64 * 1024;

/// The most devices of a pool.
pub(crate) const DEVICES_MAX: usize = 64;
/// The most replicas of a pool.
pub(crate) const REPLICAS_MAX: u32 = 4096;
/// The smallest log segment: a few batches of the largest kind.
pub(crate) const SEGMENT_BYTES_MIN: u64 = 512 * 1024;
/// The largest log segment.
pub(crate) const SEGMENT_BYTES_MAX: u64 = 1 << 30;
/// The smallest chunk.
pub(crate) const CHUNK_BYTES_MIN: u64 = 64 * 1024;
/// The largest chunk.
pub(crate) const CHUNK_BYTES_MAX: u64 = 4 * 1024 * 1024;
/// The fewest segments a log works with.
pub(crate) const SEGMENTS_MIN: u64 = 8;
/// The log's size, at most: locations in it count 512-byte sectors in 32 bits.
pub(crate) const LOG_BYTES_MAX: u64 = (1 << 41) - (1 << 30);
/// The most chunks of a pool.
pub(crate) const CHUNKS_MAX: u64 = 1 << 30;

/// A device of the pool, counted from 0 in the order of the configuration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceIndex(pub u16);

impl fmt::Display for DeviceIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// What a device is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceRole {
    /// Log; the part past `log_bytes` is home.
    Fast,
    /// Home.
    Mass,
}

/// A device: a file or a block device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Its size in bytes.
    pub bytes: u64,
    /// What it is for.
    pub role: DeviceRole,
}

/// A pool to be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FormatConfig {
    /// A new id.
    pub pool: PoolId,
    /// The cluster that the pool's server belongs to.
    pub cluster: ClusterId,
    /// The server that the pool belongs to.
    pub server: ServerId,
    /// The devices; at least one is fast.
    pub devices: Vec<DeviceInfo>,
    /// Bytes of each fast device that are log; the rest of it is home. 0: all of it.
    pub log_bytes: u64,
    /// Bytes of a log segment, a multiple of 4 KiB; 0: chosen by the size of the log.
    pub segment_bytes: u64,
    /// Bytes of a home chunk's data, a power of two; 0: 1 MiB.
    pub chunk_bytes: u64,
    /// The most replicas that the pool will ever keep; 0: 1024.
    pub replicas_max: u32,
}

/// Bytes to write to a fresh device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FormatWrite {
    /// Which device.
    pub device: DeviceIndex,
    /// Byte offset.
    pub offset: u64,
    /// What to write there, whole pages.
    pub bytes: Vec<u8>,
}

/// Why a pool cannot be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// There is no fast device, or there are too many devices.
    #[error("a pool has 1 to {DEVICES_MAX} devices, at least one of them fast")]
    Devices,
    /// A value of the configuration is out of range.
    #[error("{name} is {value}; it must be {rule}")]
    Value {
        /// Which value.
        name: &'static str,
        /// What it is.
        value: u64,
        /// What it may be.
        rule: &'static str,
    },
    /// A device is too small.
    #[error("device {device} has {bytes} bytes, which is too small: {need} bytes are needed")]
    TooSmall {
        /// Which device.
        device: DeviceIndex,
        /// Its size.
        bytes: u64,
        /// The smallest size that works.
        need: u64,
    },
    /// There is no room for a home.
    #[error("no space is left for the home: add a mass device, or make log_bytes smaller")]
    NoHome,
}

/// The areas of one device, as its label states them. Offsets and lengths in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Areas {
    /// Copies of the metadata area that begin here; 0: none. The first copy of a pool is on its
    /// first device, the second on its last, which may be the same.
    pub(crate) metadata: [u64; 2],
    pub(crate) log_offset: u64,
    pub(crate) segments: u32,
    pub(crate) home_offset: u64,
    pub(crate) chunks: u32,
}

/// Sizes that all devices of a pool agree on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Geometry {
    pub(crate) segment_bytes: u64,
    pub(crate) chunk_bytes: u64,
    pub(crate) replicas_max: u32,
    /// Pages of a checkpoint, its header not counted.
    pub(crate) checkpoint_pages: u32,
    /// Pages of a region's journal.
    pub(crate) journal_pages: u32,
}

impl Geometry {
    /// Bytes of one of a chunk's two metadata slots.
    pub(crate) const fn slot_bytes(&self) -> u64 {
        crate::home::slot_bytes(self.chunk_bytes)
    }

    /// Bytes from one chunk to the next: two metadata slots and the data.
    pub(crate) const fn chunk_stride(&self) -> u64 {
        self.chunk_bytes + 2 * self.slot_bytes()
    }

    pub(crate) const fn region_bytes(&self) -> u64 {
        (1 + self.checkpoint_pages as u64 + self.journal_pages as u64) * PAGE
    }
}

fn check(config: &FormatConfig) -> Result<(u64, u64, u32), FormatError> {
    let fast = config.devices.iter().filter(|device| device.role == DeviceRole::Fast);
    let fast_count = fast.clone().count();
    if fast_count == 0 || config.devices.len() > DEVICES_MAX {
        return Err(FormatError::Devices);
    }
    let log: u64 = fast
        .map(|device| match config.log_bytes {
            0 => device.bytes,
            bytes => bytes.min(device.bytes),
        })
        .fold(0, u64::saturating_add);
    let value = |name, value, rule| Err(FormatError::Value { name, value, rule });
    if log > LOG_BYTES_MAX {
        return value("the size of the log", log, "at most 2 TiB - 1 GiB in all");
    }
    let segment_bytes = match config.segment_bytes {
        0 => (log / 64)
            .next_power_of_two()
            .clamp(SEGMENT_BYTES_MIN, if log < 1 << 36 { 4 << 20 } else { 64 << 20 }),
        bytes => bytes,
    };
    if !(SEGMENT_BYTES_MIN..=SEGMENT_BYTES_MAX).contains(&segment_bytes)
        || !segment_bytes.is_multiple_of(PAGE)
    {
        return value("segment_bytes", segment_bytes, "a multiple of 4 KiB, 512 KiB to 1 GiB");
    }
    let chunk_bytes = if config.chunk_bytes == 0 { 1 << 20 } else { config.chunk_bytes };
    if !(CHUNK_BYTES_MIN..=CHUNK_BYTES_MAX).contains(&chunk_bytes) || !chunk_bytes.is_power_of_two()
    {
        return value("chunk_bytes", chunk_bytes, "a power of two, 64 KiB to 4 MiB");
    }
    let replicas_max = if config.replicas_max == 0 { 1024 } else { config.replicas_max };
    if replicas_max > REPLICAS_MAX {
        return value("replicas_max", u64::from(replicas_max), "at most 4096");
    }
    Ok((segment_bytes, chunk_bytes, replicas_max))
}

/// Plans a pool: what to write where, in this order, to fresh devices, before a sync of each.
/// Only the labels, which come last, make the devices a pool.
pub fn format(config: &FormatConfig) -> Result<Vec<FormatWrite>, FormatError> {
    let (geometry, areas) = plan(config)?;
    let mut writes = metadata::fresh(config.pool, &geometry, &areas);
    for (index, areas) in areas.iter().enumerate() {
        let label = Label {
            pool: config.pool,
            cluster: config.cluster,
            server: config.server,
            device: device_index(index),
            devices: device_index(config.devices.len()).0,
            role: config.devices[index].role,
            device_bytes: config.devices[index].bytes,
            geometry,
            areas: *areas,
        };
        let page = label.encode();
        for offset in [LABEL_COPY_OFFSET as u64, 0] {
            writes.push(FormatWrite { device: device_index(index), offset, bytes: page.to_vec() });
        }
    }
    Ok(writes)
}

/// Where a fresh pool's two copies of its metadata are: the device, and the bytes there.
pub fn metadata_copies(
    config: &FormatConfig,
) -> Result<[(DeviceIndex, core::ops::Range<u64>); 2], FormatError> {
    let (geometry, areas) = plan(config)?;
    let copy = |copy: usize| {
        let found = areas.iter().position(|areas| areas.metadata[copy] != 0);
        let device = found.expect("a plan has both copies");
        let start = areas[device].metadata[copy];
        (device_index(device), start..start + 2 * geometry.region_bytes())
    };
    Ok([copy(0), copy(1)])
}

pub(crate) fn device_index(index: usize) -> DeviceIndex {
    DeviceIndex(u16::try_from(index).expect("a pool has at most DEVICES_MAX devices"))
}

fn narrow(count: u64, name: &'static str) -> Result<u32, FormatError> {
    u32::try_from(count)
        .ok()
        .filter(|count| u64::from(*count) <= CHUNKS_MAX)
        .ok_or(FormatError::Value { name, value: count, rule: "at most 2^30" })
}

fn plan(config: &FormatConfig) -> Result<(Geometry, Vec<Areas>), FormatError> {
    let (segment_bytes, chunk_bytes, replicas_max) = check(config)?;
    let mut geometry = Geometry {
        segment_bytes,
        chunk_bytes,
        replicas_max,
        checkpoint_pages: 0,
        journal_pages: 0,
    };
    let total: u64 = config.devices.iter().map(|device| device.bytes).sum();
    // Room for as many segments and chunks as could be there if metadata took nothing.
    let chunks = total / geometry.chunk_stride();
    let segments = total.min(LOG_BYTES_MAX) / segment_bytes;
    let pages = metadata::checkpoint_pages(replicas_max, segments, chunks);
    geometry.checkpoint_pages = narrow(pages, "the size of the checkpoint")?;
    geometry.journal_pages = narrow((total / PAGE / 128).clamp(64, 2048), "journal")?;

    let last = config.devices.len() - 1;
    let mut areas = Vec::with_capacity(config.devices.len());
    for (index, device) in config.devices.iter().enumerate() {
        let mut used = LABEL_AREA_BYTES as u64;
        let mut own = Areas::default();
        for (copy, holder) in [0, last].into_iter().enumerate() {
            if holder == index {
                own.metadata[copy] = used;
                used += 2 * geometry.region_bytes();
            }
        }
        let is_fast = device.role == DeviceRole::Fast;
        let smallest = if is_fast { SEGMENTS_MIN * segment_bytes } else { geometry.chunk_stride() };
        if device.bytes < used + smallest {
            return Err(FormatError::TooSmall {
                device: device_index(index),
                bytes: device.bytes,
                need: used + smallest,
            });
        }
        let mut room = device.bytes - used;
        if is_fast {
            let log = match config.log_bytes {
                0 => room,
                bytes => bytes.max(smallest).min(room),
            };
            own.log_offset = used;
            own.segments = narrow(log / segment_bytes, "the number of segments")?;
            used += u64::from(own.segments) * segment_bytes;
            room = device.bytes - used;
        }
        if !is_fast || config.log_bytes != 0 {
            own.home_offset = used;
            own.chunks = narrow(room / geometry.chunk_stride(), "the number of chunks")?;
        }
        areas.push(own);
    }
    let chunks: u64 = areas.iter().map(|areas| u64::from(areas.chunks)).sum();
    if chunks == 0 {
        return Err(FormatError::NoHome);
    }
    narrow(chunks, "the number of chunks")?;
    Ok((geometry, areas))
}
