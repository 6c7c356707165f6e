//! Fabrics commands: Connect, Property Get, Property Set (base 2.0, 6), and controller properties.

use super::command::{Command, FABRICS, Sgl};
use super::{put, take, u16_at};

/// FCTYPE of Property Set.
pub const PROPERTY_SET: u8 = 0x00;
/// FCTYPE of Connect.
pub const CONNECT: u8 = 0x01;
/// FCTYPE of Property Get.
pub const PROPERTY_GET: u8 = 0x04;
/// FCTYPE of Disconnect.
pub const DISCONNECT: u8 = 0x08;

/// Bytes of Connect's data.
pub const CONNECT_DATA_BYTES: usize = 1024;
/// CNTLID with which a host asks the subsystem to choose one.
pub const CONTROLLER_ANY: u16 = 0xffff;

/// Offset of the Controller Capabilities property.
pub const CAP: u32 = 0x00;
/// Offset of the Version property.
pub const VS: u32 = 0x08;
/// Offset of the Controller Configuration property.
pub const CC: u32 = 0x14;
/// Offset of the Controller Status property.
pub const CSTS: u32 = 0x1c;
/// Offset of the NVM Subsystem Reset property.
pub const NSSR: u32 = 0x20;
/// Offset of the Controller Ready Timeouts property.
pub const CRTO: u32 = 0x68;

/// CC.EN.
pub const CC_ENABLE: u32 = 1;
/// CC.SHN.
pub const CC_SHUTDOWN: u32 = 3 << 14;
/// CSTS.RDY.
pub const CSTS_READY: u32 = 1;
/// CSTS.SHST: shutdown processing complete.
pub const CSTS_SHUTDOWN_COMPLETE: u32 = 2 << 2;
/// NVMe 2.0.0, as VS and Identify state it.
pub const VERSION: u32 = 0x0002_0000;

/// Connect's parameters, from command and data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connect {
    /// QID; 0 is the admin queue.
    pub queue_id: u16,
    /// SQSIZE, 0-based.
    pub queue_size: u16,
    /// CATTR bit 2: no submission queue flow control, no SQHD.
    pub no_flow_control: bool,
    /// KATO in milliseconds.
    pub keep_alive_ms: u32,
    /// HOSTID.
    pub host_id: [u8; 16],
    /// CNTLID.
    pub controller_id: u16,
    /// SUBNQN.
    pub subsystem_nqn: String,
    /// HOSTNQN.
    pub host_nqn: String,
}

impl Connect {
    /// The command, its data in-capsule.
    pub fn command(&self) -> Command {
        let mut command = Command::new(FABRICS, u32::from(CONNECT));
        command.sgl =
            Sgl::InCapsule { offset: 0, length: u32::try_from(CONNECT_DATA_BYTES).unwrap_or(0) };
        command.cdw10 = [
            u32::from(self.queue_id) << 16,
            u32::from(self.queue_size) | (u32::from(self.no_flow_control) << 18),
            self.keep_alive_ms,
            0,
            0,
            0,
        ];
        command
    }

    /// The data.
    pub fn data(&self) -> [u8; CONNECT_DATA_BYTES] {
        let mut out = [0; CONNECT_DATA_BYTES];
        put(&mut out, 0, &self.host_id);
        put(&mut out, 16, &self.controller_id.to_le_bytes());
        put(&mut out, 256, self.subsystem_nqn.as_bytes());
        put(&mut out, 512, self.host_nqn.as_bytes());
        out
    }

    /// From command and data; `None` if the format (RECFMT) or an NQN is not valid.
    pub fn decode(command: &Command, data: &[u8]) -> Option<Self> {
        let data: &[u8; CONNECT_DATA_BYTES] = data.first_chunk()?;
        let record_format = command.cdw10[0] & 0xffff;
        if record_format != 0 {
            return None;
        }
        let [low, high, attributes, _] = command.cdw10[1].to_le_bytes();
        Some(Self {
            queue_id: u16::try_from(command.cdw10[0] >> 16).ok()?,
            queue_size: u16::from_le_bytes([low, high]),
            no_flow_control: attributes & 4 != 0,
            keep_alive_ms: command.cdw10[2],
            host_id: take(data, 0),
            controller_id: u16_at(data, 16),
            subsystem_nqn: nqn(&data[256..512])?,
            host_nqn: nqn(&data[512..768])?,
        })
    }
}

/// The zero-terminated NQN in a field of 256 bytes.
fn nqn(field: &[u8]) -> Option<String> {
    let length = field.iter().position(|&byte| byte == 0)?;
    if length == 0 || length > crate::nqn::NQN_BYTES_MAX {
        return None;
    }
    core::str::from_utf8(&field[..length]).ok().map(str::to_owned)
}

/// Property Get of 4 or 8 bytes at `offset`.
pub fn property_get(offset: u32, wide: bool) -> Command {
    let mut command = Command::new(FABRICS, u32::from(PROPERTY_GET));
    command.cdw10[0] = u32::from(wide);
    command.cdw10[1] = offset;
    command
}

/// Property Set of 4 bytes at `offset`.
pub fn property_set(offset: u32, value: u32) -> Command {
    let mut command = Command::new(FABRICS, u32::from(PROPERTY_SET));
    command.cdw10[1] = offset;
    command.cdw10[2] = value;
    command
}

/// CAP: contiguous queues, 4 KiB pages, `entries` queue entries at most, 15 s to ready.
pub fn capabilities(entries: u16) -> u64 {
    let timeout_half_seconds = 30_u64 << 24;
    let command_set_nvm = 1_u64 << 37;
    u64::from(entries - 1) | (1 << 16) | timeout_half_seconds | command_set_nvm
}
