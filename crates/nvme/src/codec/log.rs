//! Log pages (base 2.0, 5.16) other than that of the state messages ([`crate::state`]).

use core::net::SocketAddr;

use super::identify::ANA_GROUP;
use super::{command, put, put_text};

/// Log page identifiers.
pub mod page {
    /// Supported Log Pages.
    pub const SUPPORTED: u8 = 0x00;
    /// Error Information.
    pub const ERROR: u8 = 0x01;
    /// SMART / Health Information.
    pub const SMART: u8 = 0x02;
    /// Firmware Slot Information.
    pub const FIRMWARE: u8 = 0x03;
    /// Changed Namespace List.
    pub const CHANGED_NAMESPACES: u8 = 0x04;
    /// Commands Supported and Effects.
    pub const EFFECTS: u8 = 0x05;
    /// Asymmetric Namespace Access.
    pub const ANA: u8 = 0x0c;
    /// Discovery.
    pub const DISCOVERY: u8 = 0x70;
}

/// ANA states.
pub mod ana {
    /// Optimized.
    pub const OPTIMIZED: u8 = 1;
    /// Non-optimized.
    pub const NON_OPTIMIZED: u8 = 2;
    /// Inaccessible.
    pub const INACCESSIBLE: u8 = 3;
}

/// Supported Log Pages: the ones in `pages`.
pub fn supported(pages: &[u8]) -> Vec<u8> {
    let mut out = vec![0; 1024];
    for &page in pages {
        out[4 * usize::from(page)] = 1;
    }
    out
}

/// Error Information: no errors.
pub fn errors() -> Vec<u8> {
    vec![0; 64]
}

/// SMART / Health: no warnings, 300 K, all spare available.
pub fn smart() -> Vec<u8> {
    let mut out = vec![0; 512];
    put(&mut out, 1, &300_u16.to_le_bytes());
    out[3] = 100;
    out[4] = 10;
    out
}

/// Firmware Slot Information: slot 1 active.
pub fn firmware(revision: &str) -> Vec<u8> {
    let mut out = vec![0; 512];
    out[0] = 1;
    put_text(&mut out, 8, 8, revision);
    out
}

/// Changed Namespace List: namespace 1, or nothing.
pub fn changed_namespaces(changed: bool) -> Vec<u8> {
    let mut out = vec![0; 4096];
    out[0] = u8::from(changed);
    out
}

/// Commands Supported and Effects.
pub fn effects(volume: bool) -> Vec<u8> {
    const SUPPORTED: u32 = 1;
    const CONTENT_CHANGE: u32 = 1 << 1;
    let mut out = vec![0; 4096];
    let mut set = |at: usize, opcode: u8, effects: u32| {
        put(&mut out, at + 4 * usize::from(opcode), &effects.to_le_bytes());
    };
    for opcode in [
        command::admin::GET_LOG_PAGE,
        command::admin::IDENTIFY,
        command::admin::ABORT,
        command::admin::SET_FEATURES,
        command::admin::GET_FEATURES,
        command::admin::ASYNC_EVENT,
        command::admin::KEEP_ALIVE,
    ] {
        set(0, opcode, SUPPORTED);
    }
    if volume {
        set(1024, command::nvm::FLUSH, SUPPORTED);
        set(1024, command::nvm::READ, SUPPORTED);
        for opcode in
            [command::nvm::WRITE, command::nvm::WRITE_ZEROES, command::nvm::DATASET_MANAGEMENT]
        {
            set(1024, opcode, SUPPORTED | CONTENT_CHANGE);
        }
    }
    out
}

/// Asymmetric Namespace Access: namespace 1 in the one group, in `state`.
pub fn access(change_count: u64, state: u8, groups_only: bool) -> Vec<u8> {
    let namespaces = u32::from(!groups_only);
    let mut out = vec![0; if groups_only { 48 } else { 52 }];
    put(&mut out, 0, &change_count.to_le_bytes());
    put(&mut out, 8, &1_u16.to_le_bytes());
    put(&mut out, 16, &ANA_GROUP.to_le_bytes());
    put(&mut out, 20, &namespaces.to_le_bytes());
    put(&mut out, 24, &change_count.to_le_bytes());
    out[32] = state;
    if !groups_only {
        put(&mut out, 48, &1_u32.to_le_bytes());
    }
    out
}

/// Discovery: a header and an entry for each NQN, all at `address`.
pub fn discovery<'a>(
    generation: u64,
    address: Option<SocketAddr>,
    nqns: impl Iterator<Item = &'a str>,
) -> Vec<u8> {
    let mut out = vec![0; 1024];
    put(&mut out, 0, &generation.to_le_bytes());
    let Some(address) = address else { return out };
    let mut count = 0_u64;
    for nqn in nqns {
        count += 1;
        let at = out.len();
        out.resize(at + 1024, 0);
        let entry = &mut out[at..];
        // TRTYPE TCP; ADRFAM; SUBTYPE NVM subsystem; TREQ: secure channel not required, and
        // submission queue flow control may be disabled.
        entry[0] = 3;
        entry[1] = if address.is_ipv4() { 1 } else { 2 };
        entry[2] = 2;
        entry[3] = 0b110;
        put(entry, 4, &1_u16.to_le_bytes());
        put(entry, 6, &super::fabrics::CONTROLLER_ANY.to_le_bytes());
        put(entry, 8, &32_u16.to_le_bytes());
        put_text(entry, 32, 32, &address.port().to_string());
        put(entry, 256, nqn.as_bytes());
        put_text(entry, 512, 256, &address.ip().to_string());
    }
    put(&mut out, 8, &count.to_le_bytes());
    out
}
