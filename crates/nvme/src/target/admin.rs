//! Admin commands.

use core::time::Duration;

use base::Buffer;

use super::connection::Connection;
use super::session::{EVENT_REQUESTS_MAX, Session};
use super::{Access, Core, Volume, fabrics};
use crate::codec::command::{Command, FABRICS, NSID_ALL, Sgl, admin};
use crate::codec::identify::{
    Controller, EVENTS_DISCOVERY, EVENTS_VOLUME, IDENTIFY_BYTES, NamespaceFacts, cns,
};
use crate::codec::log::{self, ana, page};
use crate::codec::status::StatusCode;
use crate::io::SessionId;
use crate::nqn::{DISCOVERY, Subsystem};
use crate::state;

/// In-capsule data of I/O commands of a volume subsystem, at most; longer writes use R2T.
pub(super) const VOLUME_CAPSULE_BYTES: usize = 32 * 1024;
/// In-capsule data of replica commands: the longest record.
pub(super) const REPLICA_CAPSULE_BYTES: usize =
    base::limits::PAYLOAD_BYTES_MAX + base::limits::RECORD_HEADER_BYTES_MAX;

const MODEL: &str = "Holdfast";
const FIRMWARE: &str = env!("CARGO_PKG_VERSION");

/// Feature identifiers.
mod feature {
    pub(super) const ARBITRATION: u8 = 0x01;
    pub(super) const POWER: u8 = 0x02;
    pub(super) const TEMPERATURE: u8 = 0x04;
    pub(super) const ERROR_RECOVERY: u8 = 0x05;
    pub(super) const VOLATILE_CACHE: u8 = 0x06;
    pub(super) const QUEUES: u8 = 0x07;
    pub(super) const EVENTS: u8 = 0x0b;
    pub(super) const KEEP_ALIVE: u8 = 0x0f;
    pub(super) const HOST_BEHAVIOR: u8 = 0x16;
    pub(super) const HOST_ID: u8 = 0x81;
}

/// How an admin command ends.
enum Ending {
    Result(u64),
    Data(Vec<u8>),
    /// Later.
    Parked,
}

/// Runs one admin command.
pub(super) fn run(connection: &mut Connection, core: &mut Core, id: SessionId, command: &Command) {
    if command.opcode == FABRICS {
        fabrics::run(connection, core, id, command);
        return;
    }
    let ending = match command.opcode {
        admin::IDENTIFY => identify(core, id, command),
        admin::GET_LOG_PAGE => log_page(core, id, command),
        admin::KEEP_ALIVE => Ok(Ending::Result(0)),
        admin::ABORT => abort(connection, core, id, command),
        admin::GET_FEATURES => features(core, id, command, false),
        admin::SET_FEATURES => features(core, id, command, true),
        admin::ASYNC_EVENT => park(core, id, command),
        _ => Err(StatusCode::INVALID_OPCODE),
    };
    match ending {
        Ok(Ending::Result(result)) => {
            connection.complete(&mut core.outbox, command.id, StatusCode::SUCCESS, result);
        }
        Ok(Ending::Data(data)) => send_data(connection, core, command, &data),
        Ok(Ending::Parked) => {}
        Err(status) => connection.complete(&mut core.outbox, command.id, status, 0),
    }
    tell_events(connection, core, id);
}

fn send_data(connection: &mut Connection, core: &mut Core, command: &Command, data: &[u8]) {
    match command.sgl {
        Sgl::Transport { length } => {
            let length = data.len().min(usize::try_from(length).unwrap_or(usize::MAX));
            let data = Buffer::copied_from(&data[..length]);
            connection.complete_with_data(&mut core.outbox, command.id, &data);
        }
        Sgl::InCapsule { .. } | Sgl::Other => {
            let status = StatusCode::SGL_TYPE_INVALID;
            connection.complete(&mut core.outbox, command.id, status, 0);
        }
    }
}

/// Completes parked Asynchronous Event Requests with events that wait.
pub(super) fn tell_events(connection: &mut Connection, core: &mut Core, id: SessionId) {
    let Some(session) = core.sessions.get_mut(&id) else { return };
    while let Some((command, event)) = session.next_event() {
        connection.complete(&mut core.outbox, command, StatusCode::SUCCESS, event.result());
    }
}

fn park(core: &mut Core, id: SessionId, command: &Command) -> Result<Ending, StatusCode> {
    let session = core.sessions.get_mut(&id).ok_or(StatusCode::INTERNAL)?;
    if session.park(command.id) { Ok(Ending::Parked) } else { Err(StatusCode::EVENT_LIMIT) }
}

/// DW0 bit 0 says that the command was not aborted. Commands of I/O queues never are: they may
/// have taken effect already, and end soon anyway.
fn abort(
    connection: &mut Connection,
    core: &mut Core,
    id: SessionId,
    command: &Command,
) -> Result<Ending, StatusCode> {
    let [low, high, queue_low, queue_high] = command.cdw10[0].to_le_bytes();
    let queue = u16::from_le_bytes([low, high]);
    let aborted = u16::from_le_bytes([queue_low, queue_high]);
    let session = core.sessions.get_mut(&id).ok_or(StatusCode::INTERNAL)?;
    if queue == 0 && session.unpark(aborted) {
        connection.complete(&mut core.outbox, aborted, StatusCode::ABORT_REQUESTED, 0);
        return Ok(Ending::Result(0));
    }
    Ok(Ending::Result(1))
}

fn volume_of<'a>(core: &'a Core, session: &Session) -> Option<&'a Volume> {
    match session.subsystem {
        Subsystem::Volume(volume) => core.volumes.get(&volume),
        Subsystem::Discovery | Subsystem::Replica(_) => None,
    }
}

fn facts(volume: &Volume) -> NamespaceFacts {
    NamespaceFacts {
        volume: volume.export.volume,
        blocks: volume.export.blocks,
        block_size: volume.export.block_size,
        read_only: volume.export.read_only,
    }
}

fn identify(core: &Core, id: SessionId, command: &Command) -> Result<Ending, StatusCode> {
    let session = core.sessions.get(&id).ok_or(StatusCode::INTERNAL)?;
    let [structure, ..] = command.cdw10[0].to_le_bytes();
    let [.., command_set] = command.cdw10[1].to_le_bytes();
    let volume = volume_of(core, session);
    let namespace =
        || volume.filter(|_| command.nsid == 1).map(facts).ok_or(StatusCode::INVALID_NAMESPACE);
    let of_nvm = || if command_set == 0 { Ok(()) } else { Err(StatusCode::INVALID_FIELD) };
    if session.subsystem == Subsystem::Discovery && structure != cns::CONTROLLER {
        return Err(StatusCode::INVALID_FIELD);
    }
    let data = match structure {
        cns::CONTROLLER => controller(core, session).to_vec(),
        cns::NAMESPACE => namespace()?.encode().to_vec(),
        cns::ACTIVE_NAMESPACES | cns::ACTIVE_COMMAND_SET => {
            if structure == cns::ACTIVE_COMMAND_SET {
                of_nvm()?;
            }
            if command.nsid >= 0xffff_fffe {
                return Err(StatusCode::INVALID_NAMESPACE);
            }
            let mut list = vec![0; IDENTIFY_BYTES];
            list[0] = u8::from(volume.is_some() && command.nsid == 0);
            list
        }
        cns::DESCRIPTORS => namespace()?.encode_descriptors().to_vec(),
        cns::NAMESPACE_COMMAND_SET => {
            of_nvm()?;
            namespace()?;
            vec![0; IDENTIFY_BYTES]
        }
        cns::CONTROLLER_COMMAND_SET => {
            of_nvm()?;
            // No limits on Write Zeroes and Dataset Management: long ranges are split here.
            vec![0; IDENTIFY_BYTES]
        }
        cns::NAMESPACE_INDEPENDENT => namespace()?.encode_independent().to_vec(),
        cns::COMMAND_SETS => {
            let mut sets = vec![0; IDENTIFY_BYTES];
            sets[0] = 1;
            sets
        }
        _ => return Err(StatusCode::INVALID_FIELD),
    };
    Ok(Ending::Data(data))
}

fn controller(core: &Core, session: &Session) -> [u8; IDENTIFY_BYTES] {
    let serial = core.config.server.to_string().replace('-', "");
    let nqn = match session.subsystem {
        Subsystem::Discovery => DISCOVERY.to_owned(),
        other @ (Subsystem::Volume(_) | Subsystem::Replica(_)) => other.to_string(),
    };
    let (capsule, transfer_pages_log2, namespaces, events) = match session.subsystem {
        Subsystem::Discovery => (0, 0, 0, EVENTS_DISCOVERY),
        Subsystem::Volume(_) => (VOLUME_CAPSULE_BYTES, 5, 1, EVENTS_VOLUME),
        Subsystem::Replica(_) => (REPLICA_CAPSULE_BYTES, 6, 0, 0),
    };
    Controller {
        serial: &serial[..20],
        model: MODEL,
        firmware: FIRMWARE,
        controller_id: session.controller_id,
        discovery: session.subsystem == Subsystem::Discovery,
        transfer_pages_log2,
        event_requests: u8::try_from(EVENT_REQUESTS_MAX - 1).unwrap_or(0),
        events,
        entries: core.config.queue_entries,
        nqn: &nqn,
        in_capsule_bytes: u32::try_from(capsule).unwrap_or(0),
        namespaces,
    }
    .encode()
}

fn log_page(core: &mut Core, id: SessionId, command: &Command) -> Result<Ending, StatusCode> {
    let [identifier, flags, dwords_low, dwords_high] = command.cdw10[0].to_le_bytes();
    let [dwords_2, dwords_3, ..] = command.cdw10[1].to_le_bytes();
    let dwords = u32::from_le_bytes([dwords_low, dwords_high, dwords_2, dwords_3]);
    let length = (u64::from(dwords) + 1) * 4;
    let offset = command.wide(1);
    let length_max = command.sgl.length().min(LOG_READ_BYTES_MAX);
    if !offset.is_multiple_of(4) || length > u64::from(length_max) {
        return Err(StatusCode::INVALID_FIELD);
    }
    let retain_event = flags & 0x80 != 0;
    let parameter = flags & 0x0f;
    let all = log_bytes(core, id, identifier, parameter)?;
    let session = core.sessions.get_mut(&id).ok_or(StatusCode::INTERNAL)?;
    let start = usize::try_from(offset).ok().filter(|&start| start <= all.len());
    let start = start.ok_or(StatusCode::INVALID_FIELD)?;
    // What lies past the page's end reads as zeroes (undefined in the specification).
    let length = usize::try_from(length).map_err(|_| StatusCode::INVALID_FIELD)?;
    let mut data = all[start..].to_vec();
    data.resize(length, 0);
    if !retain_event {
        if identifier == page::CHANGED_NAMESPACES {
            session.namespace_changed = false;
        }
        session.clear_event(identifier);
    }
    Ok(Ending::Data(data))
}

/// A host may read this much of a log page at once.
const LOG_READ_BYTES_MAX: u32 = 256 * 1024;

fn log_bytes(
    core: &Core,
    id: SessionId,
    identifier: u8,
    parameter: u8,
) -> Result<Vec<u8>, StatusCode> {
    const EVERYWHERE: [u8; 5] =
        [page::SUPPORTED, page::ERROR, page::SMART, page::FIRMWARE, page::EFFECTS];
    let session = core.sessions.get(&id).ok_or(StatusCode::INTERNAL)?;
    let volume = volume_of(core, session);
    let invalid = Err(StatusCode::INVALID_LOG_PAGE);
    match (identifier, session.subsystem) {
        (page::SUPPORTED, subsystem) => {
            let mut pages = EVERYWHERE.to_vec();
            match subsystem {
                Subsystem::Discovery => pages = vec![page::SUPPORTED, page::DISCOVERY],
                Subsystem::Volume(_) => {
                    pages.extend([page::CHANGED_NAMESPACES, page::ANA]);
                }
                Subsystem::Replica(_) => pages.push(state::LOG_PAGE),
            }
            Ok(log::supported(&pages))
        }
        (page::DISCOVERY, Subsystem::Discovery) => Ok(discovery(core)),
        (_, Subsystem::Discovery) => invalid,
        (page::ERROR, _) => Ok(log::errors()),
        (page::SMART, _) => Ok(log::smart()),
        (page::FIRMWARE, _) => Ok(log::firmware(FIRMWARE)),
        (page::EFFECTS, _) => Ok(log::effects(volume.is_some())),
        (page::CHANGED_NAMESPACES, Subsystem::Volume(_)) => {
            Ok(log::changed_namespaces(session.namespace_changed))
        }
        (page::ANA, Subsystem::Volume(_)) => {
            let volume = volume.ok_or(StatusCode::INTERNAL)?;
            let state = match volume.access {
                Access::Optimized => ana::OPTIMIZED,
                Access::NonOptimized => ana::NON_OPTIMIZED,
                Access::Inaccessible => ana::INACCESSIBLE,
            };
            Ok(log::access(volume.access_count, state, parameter & 1 != 0))
        }
        (state::LOG_PAGE, Subsystem::Replica(_)) => {
            Ok(state::encode_log(session.states.iter()).to_vec())
        }
        _ => invalid,
    }
}

fn discovery(core: &Core) -> Vec<u8> {
    let nqns: Vec<_> =
        core.volumes.keys().map(|&volume| Subsystem::Volume(volume).to_string()).collect();
    let nqns = nqns.iter().map(String::as_str);
    log::discovery(core.discovery_generation, core.config.address, nqns)
}

fn features(
    core: &mut Core,
    id: SessionId,
    command: &Command,
    set: bool,
) -> Result<Ending, StatusCode> {
    let queues_max = core.config.io_queues_max;
    let session = core.sessions.get_mut(&id).ok_or(StatusCode::INTERNAL)?;
    let [identifier, select, ..] = command.cdw10[0].to_le_bytes();
    let value = command.cdw10[1];
    if set && command.cdw10[0] & (1 << 31) != 0 {
        return Err(StatusCode::FEATURE_NOT_SAVEABLE);
    }
    if !set && select & 7 == 3 {
        return supported_capabilities(identifier);
    }
    if session.subsystem == Subsystem::Discovery
        && !matches!(identifier, feature::EVENTS | feature::KEEP_ALIVE | feature::HOST_ID)
    {
        return Err(StatusCode::INVALID_FIELD);
    }
    let result = match identifier {
        feature::ARBITRATION | feature::POWER | feature::TEMPERATURE | feature::ERROR_RECOVERY => 0,
        feature::VOLATILE_CACHE => {
            if set {
                session.volatile_cache = value & 1 != 0;
            }
            u64::from(session.volatile_cache)
        }
        feature::QUEUES => {
            let [low, high, completion_low, completion_high] = value.to_le_bytes();
            let submission = u16::from_le_bytes([low, high]);
            let completion = u16::from_le_bytes([completion_low, completion_high]);
            if set && (submission == u16::MAX || completion == u16::MAX) {
                return Err(StatusCode::INVALID_FIELD);
            }
            let queues_max = match session.subsystem {
                Subsystem::Replica(_) => 1,
                Subsystem::Volume(_) | Subsystem::Discovery => queues_max,
            };
            let granted = u64::from(queues_max - 1);
            granted | (granted << 16)
        }
        feature::EVENTS => {
            if set {
                session.event_configuration = value;
            }
            u64::from(session.event_configuration)
        }
        feature::KEEP_ALIVE => {
            if set {
                set_keep_alive(session, value)?;
            }
            u64::try_from(session.keep_alive.as_millis()).unwrap_or(u64::MAX)
        }
        feature::HOST_BEHAVIOR if set => 0,
        feature::HOST_BEHAVIOR => return Ok(Ending::Data(vec![0; 512])),
        feature::HOST_ID if !set => return Ok(Ending::Data(session.host_id.to_vec())),
        feature::HOST_ID => return Err(StatusCode::SEQUENCE_ERROR),
        _ => return Err(StatusCode::INVALID_FIELD),
    };
    if command.nsid != 0 && command.nsid != NSID_ALL && command.nsid != 1 {
        return Err(StatusCode::INVALID_NAMESPACE);
    }
    Ok(Ending::Result(result))
}

/// SEL 011b: changeable or not, never saveable, not of a namespace.
fn supported_capabilities(identifier: u8) -> Result<Ending, StatusCode> {
    const CHANGEABLE: u64 = 1 << 2;
    match identifier {
        feature::ARBITRATION
        | feature::POWER
        | feature::TEMPERATURE
        | feature::ERROR_RECOVERY
        | feature::QUEUES
        | feature::HOST_ID => Ok(Ending::Result(0)),
        feature::VOLATILE_CACHE
        | feature::EVENTS
        | feature::KEEP_ALIVE
        | feature::HOST_BEHAVIOR => Ok(Ending::Result(CHANGEABLE)),
        _ => Err(StatusCode::INVALID_FIELD),
    }
}

fn set_keep_alive(session: &mut Session, milliseconds: u32) -> Result<(), StatusCode> {
    if milliseconds == 0 && matches!(session.subsystem, Subsystem::Replica(_)) {
        return Err(StatusCode::KEEP_ALIVE_INVALID);
    }
    session.keep_alive = Duration::from_millis(u64::from(milliseconds));
    Ok(())
}
