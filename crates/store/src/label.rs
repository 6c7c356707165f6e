//! The label: whose a device is, and where its areas are. Two copies, 64 KiB apart.
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 8 | magic `HFPOOL\r\n` |
//! | 8 | 4 | version, 2 |
//! | 12 | 4 | CRC32C of the page with this field zero |
//! | 16 | 16 | pool id |
//! | 32 | 16 | cluster id |
//! | 48 | 16 | server id |
//! | 64 | 2 | device index |
//! | 66 | 2 | number of devices |
//! | 68 | 4 | role: 1 fast, 2 mass |
//! | 72 | 8 | device bytes |
//! | 80 | 8 | segment bytes |
//! | 88 | 8 | chunk bytes |
//! | 96 | 4 | replicas at most |
//! | 100 | 4 | pages of a checkpoint |
//! | 104 | 4 | pages of a journal |
//! | 108 | 4 | zero |
//! | 112 | 8 + 8 | offsets of the metadata copies, 0: none |
//! | 128 | 8 | log offset |
//! | 136 | 8 | home offset |
//! | 144 | 4 | segments |
//! | 148 | 4 | chunks |
//!
//! The rest of the page is zero.

use base::checksum::crc32c_without;
use base::limits::PAGE_BYTES;
use base::{ClusterId, PoolId, ServerId};

use crate::layout::{
    Areas, CHUNK_BYTES_MAX, CHUNK_BYTES_MIN, DEVICES_MAX, DeviceIndex, DeviceRole, Geometry,
    LABEL_AREA_BYTES, LABEL_COPY_OFFSET, PAGE, REPLICAS_MAX, SEGMENT_BYTES_MAX, SEGMENT_BYTES_MIN,
};

/// First bytes of a label.
pub(crate) const MAGIC: [u8; 8] = *b"HFPOOL\r\n";
/// The version of the whole disk format.
pub(crate) const VERSION: u32 = 2;
const CRC_OFFSET: usize = 12;

/// Whose a device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Label {
    /// The pool.
    pub pool: PoolId,
    /// Its cluster.
    pub cluster: ClusterId,
    /// Its server.
    pub server: ServerId,
    /// Which of the pool's devices this is.
    pub device: DeviceIndex,
    /// How many devices the pool has.
    pub devices: u16,
    /// What the device is for.
    pub role: DeviceRole,
    /// The device's size when it was formatted, in bytes.
    pub device_bytes: u64,
    pub(crate) geometry: Geometry,
    pub(crate) areas: Areas,
}

/// Why a device is not (this) one of this pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LabelError {
    /// Nothing but zeroes.
    #[error("it is blank, not a pool: format it with `holdfast pool format`")]
    Blank,
    /// Somebody else's data.
    #[error(
        "it holds data that is not a Holdfast pool: check the path; to give it up to Holdfast, \
         wipe its first 128 KiB and format it"
    )]
    Foreign,
    /// A label that fails its checksum, twice.
    #[error(
        "both copies of its pool label are damaged: restore it from a backup, or format it anew \
         and let its replicas be rebuilt from their peers"
    )]
    Damaged,
    /// Made by a newer version.
    #[error("its format is version {found}, this build knows {VERSION}: use a newer build")]
    Newer {
        /// The label's version.
        found: u32,
    },
    /// Made by an older version.
    #[error(
        "its format is version {found}, this build knows {VERSION} only: format it anew and let \
         its replicas be rebuilt from their peers"
    )]
    Older {
        /// The label's version.
        found: u32,
    },
    /// Fewer bytes than a label has.
    #[error("it is too short to be a pool device")]
    TooShort,
    /// Another pool's device.
    #[error("it belongs to pool {found}, not to {expected}: check the paths of the devices")]
    WrongPool {
        /// The label's.
        found: PoolId,
        /// The configuration's, or the first device's.
        expected: PoolId,
    },
    /// Another cluster's device.
    #[error("it belongs to cluster {found}, not to {expected}: check the cluster store's address")]
    WrongCluster {
        /// The label's.
        found: ClusterId,
        /// The configuration's.
        expected: ClusterId,
    },
    /// Another server's device.
    #[error(
        "it belongs to server {found}, not to {expected}: restore this server's id, or attach \
         the device to its own server"
    )]
    WrongServer {
        /// The label's.
        found: ServerId,
        /// The configuration's.
        expected: ServerId,
    },
    /// The right pool, the wrong device.
    #[error("it is the pool's device {found}: list the devices in their order at format")]
    WrongDevice {
        /// The label's.
        found: DeviceIndex,
    },
    /// Devices are missing or too many.
    #[error("the pool has {found} devices, the configuration lists {expected}")]
    WrongDeviceCount {
        /// The label's.
        found: u16,
        /// The configuration's.
        expected: u16,
    },
    /// The role in the configuration is not the label's.
    #[error("it was formatted for the other role (fast or mass): correct the configuration")]
    WrongRole,
    /// The device has shrunk.
    #[error("it has {found} bytes, but had {expected} when formatted: do not shrink devices")]
    Shrunk {
        /// Now.
        found: u64,
        /// When formatted.
        expected: u64,
    },
}

/// Reads the label in a device's first [`LABEL_AREA_BYTES`] bytes: who owns this device?
pub fn identify(first_bytes: &[u8]) -> Result<Label, LabelError> {
    let area = first_bytes.get(..LABEL_AREA_BYTES).ok_or(LabelError::TooShort)?;
    let first = Label::decode(&area[..PAGE_BYTES]);
    let second = Label::decode(&area[LABEL_COPY_OFFSET..LABEL_COPY_OFFSET + PAGE_BYTES]);
    match (first, second) {
        (Ok(label), _) | (_, Ok(label)) => Ok(label),
        (Err(other @ (LabelError::Newer { .. } | LabelError::Older { .. })), _)
        | (_, Err(other @ (LabelError::Newer { .. } | LabelError::Older { .. }))) => Err(other),
        (Err(LabelError::Damaged), _) | (_, Err(LabelError::Damaged)) => Err(LabelError::Damaged),
        (Err(LabelError::Blank), Err(LabelError::Blank)) => {
            let blank = area.iter().all(|byte| *byte == 0);
            Err(if blank { LabelError::Blank } else { LabelError::Foreign })
        }
        (Err(_), Err(_)) => Err(LabelError::Foreign),
    }
}

impl Label {
    pub(crate) fn encode(&self) -> [u8; PAGE_BYTES] {
        let mut page = [0; PAGE_BYTES];
        page[0..8].copy_from_slice(&MAGIC);
        page[8..12].copy_from_slice(&VERSION.to_le_bytes());
        page[16..32].copy_from_slice(&self.pool.bytes());
        page[32..48].copy_from_slice(&self.cluster.bytes());
        page[48..64].copy_from_slice(&self.server.bytes());
        page[64..66].copy_from_slice(&self.device.0.to_le_bytes());
        page[66..68].copy_from_slice(&self.devices.to_le_bytes());
        let role = match self.role {
            DeviceRole::Fast => 1_u32,
            DeviceRole::Mass => 2,
        };
        page[68..72].copy_from_slice(&role.to_le_bytes());
        let (geometry, areas) = (&self.geometry, &self.areas);
        for (at, value) in [
            (72, self.device_bytes),
            (80, geometry.segment_bytes),
            (88, geometry.chunk_bytes),
            (112, areas.metadata[0]),
            (120, areas.metadata[1]),
            (128, areas.log_offset),
            (136, areas.home_offset),
        ] {
            page[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        for (at, value) in [
            (96, geometry.replicas_max),
            (100, geometry.checkpoint_pages),
            (104, geometry.journal_pages),
            (144, areas.segments),
            (148, areas.chunks),
        ] {
            page[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
        let crc = crc32c_without(&page, CRC_OFFSET);
        page[CRC_OFFSET..CRC_OFFSET + 4].copy_from_slice(&crc.to_le_bytes());
        page
    }

    fn decode(page: &[u8]) -> Result<Self, LabelError> {
        if page[0..8] != MAGIC {
            let blank = page.iter().all(|byte| *byte == 0);
            return Err(if blank { LabelError::Blank } else { LabelError::Foreign });
        }
        let long = |at: usize| u64::from_le_bytes(page[at..at + 8].try_into().expect("8 bytes"));
        let word = |at: usize| u32::from_le_bytes(page[at..at + 4].try_into().expect("4 bytes"));
        let half = |at: usize| u16::from_le_bytes(page[at..at + 2].try_into().expect("2 bytes"));
        let id = |at: usize| -> [u8; 16] { page[at..at + 16].try_into().expect("16 bytes") };
        if word(CRC_OFFSET) != crc32c_without(page, CRC_OFFSET) {
            return Err(LabelError::Damaged);
        }
        match word(8) {
            VERSION => {}
            found @ 0..VERSION => return Err(LabelError::Older { found }),
            found => return Err(LabelError::Newer { found }),
        }
        let label = Self {
            pool: PoolId::from_bytes(id(16)),
            cluster: ClusterId::from_bytes(id(32)),
            server: ServerId::from_bytes(id(48)),
            device: DeviceIndex(half(64)),
            devices: half(66),
            role: match word(68) {
                1 => DeviceRole::Fast,
                2 => DeviceRole::Mass,
                _ => return Err(LabelError::Damaged),
            },
            device_bytes: long(72),
            geometry: Geometry {
                segment_bytes: long(80),
                chunk_bytes: long(88),
                replicas_max: word(96),
                checkpoint_pages: word(100),
                journal_pages: word(104),
            },
            areas: Areas {
                metadata: [long(112), long(120)],
                log_offset: long(128),
                segments: word(144),
                home_offset: long(136),
                chunks: word(148),
            },
        };
        if label.is_possible() { Ok(label) } else { Err(LabelError::Damaged) }
    }

    /// Sizes within limits and areas within the device: what the rest of the store relies on.
    fn is_possible(&self) -> bool {
        let (geometry, areas) = (&self.geometry, &self.areas);
        let within = |offset: u64, bytes: Option<u64>| {
            bytes
                .and_then(|bytes| offset.checked_add(bytes))
                .is_some_and(|end| end <= self.device_bytes && offset.is_multiple_of(PAGE))
        };
        (1..=DEVICES_MAX).contains(&usize::from(self.devices))
            && self.device.0 < self.devices
            && (SEGMENT_BYTES_MIN..=SEGMENT_BYTES_MAX).contains(&geometry.segment_bytes)
            && geometry.segment_bytes.is_multiple_of(PAGE)
            && (CHUNK_BYTES_MIN..=CHUNK_BYTES_MAX).contains(&geometry.chunk_bytes)
            && geometry.chunk_bytes.is_power_of_two()
            && (1..=REPLICAS_MAX).contains(&geometry.replicas_max)
            && geometry.journal_pages >= 16
            && within(
                areas.log_offset,
                u64::from(areas.segments).checked_mul(geometry.segment_bytes),
            )
            && within(
                areas.home_offset,
                u64::from(areas.chunks).checked_mul(geometry.chunk_stride()),
            )
            && areas
                .metadata
                .iter()
                .all(|offset| *offset == 0 || within(*offset, Some(2 * geometry.region_bytes())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_bytes() {
        let label = Label {
            pool: PoolId::from_bytes([1; 16]),
            cluster: ClusterId::from_bytes([2; 16]),
            server: ServerId::from_bytes([3; 16]),
            device: DeviceIndex(1),
            devices: 2,
            role: DeviceRole::Mass,
            device_bytes: 1 << 40,
            geometry: Geometry {
                segment_bytes: 4 << 20,
                chunk_bytes: 1 << 20,
                replicas_max: 1024,
                checkpoint_pages: 77,
                journal_pages: 64,
            },
            areas: Areas {
                metadata: [0, 131_072],
                log_offset: 0,
                segments: 0,
                home_offset: 8 << 20,
                chunks: 1000,
            },
        };
        let mut expected = Vec::new();
        expected.extend_from_slice(b"HFPOOL\r\n\x02\0\0\0\0\0\0\0");
        for id in 1..=3 {
            expected.extend_from_slice(&[id; 16]);
        }
        expected.extend_from_slice(&[1, 0, 2, 0, 2, 0, 0, 0]);
        for value in [1_u64 << 40, 4 << 20, 1 << 20] {
            expected.extend_from_slice(&value.to_le_bytes());
        }
        for value in [1024_u32, 77, 64, 0] {
            expected.extend_from_slice(&value.to_le_bytes());
        }
        for value in [0_u64, 131_072, 0, 8 << 20] {
            expected.extend_from_slice(&value.to_le_bytes());
        }
        for value in [0_u32, 1000] {
            expected.extend_from_slice(&value.to_le_bytes());
        }
        expected.resize(PAGE_BYTES, 0);
        let crc = base::checksum::crc32c(&expected);
        expected[12..16].copy_from_slice(&crc.to_le_bytes());
        assert_eq!(label.encode().as_slice(), expected);
        assert_eq!(Label::decode(&expected), Ok(label));
        for byte in 0..152 {
            expected[byte] ^= 0x20;
            assert!(Label::decode(&expected).is_err(), "byte {byte}");
            expected[byte] ^= 0x20;
        }
    }
}
