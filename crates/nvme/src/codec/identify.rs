//! Identify data structures (base 2.0, 5.17.2; NVM 1.0, 4.1.5).

use base::{BlockSize, VolumeId};

use super::{fabrics, put, put_text};

/// Bytes of every identify data structure.
pub const IDENTIFY_BYTES: usize = 4096;

/// CNS values.
pub mod cns {
    /// Identify Namespace.
    pub const NAMESPACE: u8 = 0x00;
    /// Identify Controller.
    pub const CONTROLLER: u8 = 0x01;
    /// Active namespace id list.
    pub const ACTIVE_NAMESPACES: u8 = 0x02;
    /// Namespace identification descriptor list.
    pub const DESCRIPTORS: u8 = 0x03;
    /// Identify Namespace of an I/O command set.
    pub const NAMESPACE_COMMAND_SET: u8 = 0x05;
    /// Identify Controller of an I/O command set.
    pub const CONTROLLER_COMMAND_SET: u8 = 0x06;
    /// Active namespace id list of an I/O command set.
    pub const ACTIVE_COMMAND_SET: u8 = 0x07;
    /// Identify Namespace, independent of the I/O command set.
    pub const NAMESPACE_INDEPENDENT: u8 = 0x08;
    /// I/O command sets.
    pub const COMMAND_SETS: u8 = 0x1c;
}

/// What Identify Controller says.
#[derive(Clone, Debug)]
pub struct Controller<'a> {
    /// SN.
    pub serial: &'a str,
    /// MN.
    pub model: &'a str,
    /// FR.
    pub firmware: &'a str,
    /// CNTLID.
    pub controller_id: u16,
    /// CNTRLTYPE is discovery, not I/O.
    pub discovery: bool,
    /// MDTS: log2 of 4 KiB pages of a transfer, at most.
    pub transfer_pages_log2: u8,
    /// AERL, 0-based.
    pub event_requests: u8,
    /// OAES.
    pub events: u32,
    /// MAXCMD.
    pub entries: u16,
    /// SUBNQN.
    pub nqn: &'a str,
    /// Bytes of in-capsule data of I/O commands, at most.
    pub in_capsule_bytes: u32,
    /// Namespaces: 1 for a volume, else 0.
    pub namespaces: u32,
}

/// OAES: Namespace Attribute Notices and ANA change notices.
pub const EVENTS_VOLUME: u32 = (1 << 8) | (1 << 11);
/// OAES: Discovery Log Page Change notices.
pub const EVENTS_DISCOVERY: u32 = 1 << 31;
/// The one ANA group.
pub const ANA_GROUP: u32 = 1;
/// KAS: granularity of KATO in units of 100 ms.
const KEEP_ALIVE_UNITS: u16 = 1;

impl Controller<'_> {
    /// Its bytes.
    pub fn encode(&self) -> [u8; IDENTIFY_BYTES] {
        let mut out = [0; IDENTIFY_BYTES];
        put_text(&mut out, 4, 20, self.serial);
        put_text(&mut out, 24, 40, self.model);
        put_text(&mut out, 64, 8, self.firmware);
        // RAB is a recommendation; 0: no burst limit.
        // CMIC: several controllers; ANA for volumes.
        out[76] = 0b0010 | if self.namespaces > 0 { 0b1000 } else { 0 };
        out[77] = self.transfer_pages_log2;
        put(&mut out, 78, &self.controller_id.to_le_bytes());
        put(&mut out, 80, &fabrics::VERSION.to_le_bytes());
        put(&mut out, 92, &self.events.to_le_bytes());
        // CTRATT: 128-bit host ids; keep-alive by traffic.
        put(&mut out, 96, &0x41_u32.to_le_bytes());
        out[111] = if self.discovery { 2 } else { 1 };
        // ACL, 0-based.
        out[258] = 3;
        out[259] = self.event_requests;
        // FRMW: one slot, read-only. LPA: effects log, extended data (offsets).
        out[260] = 0b0000_0011;
        out[261] = 0b0000_0110;
        // WCTEMP and CCTEMP, in kelvins: nothing here has a temperature, but zero is not allowed.
        put(&mut out, 266, &343_u16.to_le_bytes());
        put(&mut out, 268, &373_u16.to_le_bytes());
        put(&mut out, 320, &KEEP_ALIVE_UNITS.to_le_bytes());
        if self.namespaces > 0 {
            // ANATT in seconds; ANACAP: optimized, non-optimized, inaccessible states.
            out[342] = 10;
            out[343] = 0b0000_0111;
            put(&mut out, 344, &ANA_GROUP.to_le_bytes());
            put(&mut out, 348, &1_u32.to_le_bytes());
        }
        if !self.discovery {
            out[512] = 0x66;
            out[513] = 0x44;
            // ONCS: Dataset Management, Write Zeroes.
            put(&mut out, 520, &0b1100_u16.to_le_bytes());
            // VWC: present; Flush of all namespaces is supported.
            out[525] = 0b111;
        }
        put(&mut out, 514, &self.entries.to_le_bytes());
        put(&mut out, 516, &self.namespaces.to_le_bytes());
        // SGLS: supported, in-capsule offsets, transport data blocks.
        put(&mut out, 536, &0x0030_0001_u32.to_le_bytes());
        put(&mut out, 540, &self.namespaces.to_le_bytes());
        put(&mut out, 768, self.nqn.as_bytes());
        let capsule = (64 + self.in_capsule_bytes) / 16;
        put(&mut out, 1792, &capsule.to_le_bytes());
        put(&mut out, 1796, &1_u32.to_le_bytes());
        // ICDOFF 0, FCATT 0: dynamic controllers; MSDBD: one descriptor.
        out[1803] = 1;
        // PSD0.MP: 25 W, in units of 10 mW; a controller has at least one power state.
        put(&mut out, 2048, &2500_u16.to_le_bytes());
        out
    }
}

/// A volume as namespace 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NamespaceFacts {
    /// Its NGUID and UUID.
    pub volume: VolumeId,
    /// NSZE, NCAP.
    pub blocks: u64,
    /// LBA format 0.
    pub block_size: BlockSize,
    /// Write protected.
    pub read_only: bool,
}

impl NamespaceFacts {
    /// Identify Namespace.
    pub fn encode(&self) -> [u8; IDENTIFY_BYTES] {
        let mut out = [0; IDENTIFY_BYTES];
        for at in [0, 8, 16] {
            put(&mut out, at, &self.blocks.to_le_bytes());
        }
        // NSFEAT: preferred sizes below are valid (OPTPERF).
        out[24] = 0b1_0000;
        // NMIC: may be attached to several controllers.
        out[30] = 1;
        // DLFEAT: deallocated blocks read as zeroes; Deallocate in Write Zeroes works.
        out[33] = 0b1001;
        let page_blocks = 4096 / self.block_size.bytes() - 1;
        let preferred = u16::try_from(page_blocks).unwrap_or(0).to_le_bytes();
        // NPWG, NPWA, NPDG, NPDA (0-based): pages.
        for at in [64, 66, 68, 70] {
            put(&mut out, at, &preferred);
        }
        put(&mut out, 92, &ANA_GROUP.to_le_bytes());
        out[99] = u8::from(self.read_only);
        put(&mut out, 104, &self.volume.bytes());
        out[130] = self.block_size.log2();
        out
    }

    /// Identify Namespace, independent of the I/O command set.
    pub fn encode_independent(&self) -> [u8; IDENTIFY_BYTES] {
        let mut out = [0; IDENTIFY_BYTES];
        out[1] = 1;
        put(&mut out, 4, &ANA_GROUP.to_le_bytes());
        out[8] = u8::from(self.read_only);
        // NSTAT: ready.
        out[14] = 1;
        out
    }

    /// Namespace identification descriptor list.
    pub fn encode_descriptors(&self) -> [u8; IDENTIFY_BYTES] {
        let mut out = [0; IDENTIFY_BYTES];
        // NGUID, UUID, command set identifier (NVM).
        put(&mut out, 0, &[2, 16, 0, 0]);
        put(&mut out, 4, &self.volume.bytes());
        put(&mut out, 20, &[3, 16, 0, 0]);
        put(&mut out, 24, &self.volume.bytes());
        put(&mut out, 40, &[4, 1, 0, 0, 0]);
        out
    }
}
