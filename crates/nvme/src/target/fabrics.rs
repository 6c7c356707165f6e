//! Connect and controller properties.

use core::time::Duration;

use base::HolderId;

use super::connection::{Commands, Connection, Phase};
use super::session::Session;
use super::{Core, Output};
use crate::codec::command::{Command, FABRICS};
use crate::codec::fabrics::{
    CAP, CC, CC_ENABLE, CC_SHUTDOWN, CONNECT, CONTROLLER_ANY, CRTO, CSTS, CSTS_READY,
    CSTS_SHUTDOWN_COMPLETE, Connect, PROPERTY_GET, PROPERTY_SET, VERSION, VS, capabilities,
};
use crate::codec::status::StatusCode;
use crate::io::SessionId;
use crate::nqn::Subsystem;

/// Entries of an admin queue, at most.
const ADMIN_ENTRIES_MAX: u16 = 128;
/// A discovery controller without a keep-alive time gets this one (base 2.0, 3.1.2.3.3).
const DISCOVERY_KEEP_ALIVE: Duration = Duration::from_mins(2);

/// A refusal: status and DW0.
type Refusal = (StatusCode, u64);

/// DW0 of Connect Invalid Parameters: offset of the field in the data (or, without `IATTR`, in
/// the command).
const fn in_data(offset: u64) -> u64 {
    offset | (1 << 16)
}

/// The first command of a connection.
pub(super) fn connect(
    connection: &mut Connection,
    core: &mut Core,
    command: &Command,
    data: &[u8],
) {
    let outcome = if command.opcode != FABRICS || command.nsid & 0xff != u32::from(CONNECT) {
        Err((StatusCode::SEQUENCE_ERROR, 0))
    } else if let Some(request) = Connect::decode(command, data) {
        connect_queue(connection, core, &request)
    } else {
        Err((StatusCode::CONNECT_FORMAT, 0))
    };
    let (status, result) = match outcome {
        Ok(controller_id) => (StatusCode::SUCCESS, u64::from(controller_id)),
        Err(refusal) => refusal,
    };
    connection.complete(&mut core.outbox, command.id, status, result);
}

fn connect_queue(
    connection: &mut Connection,
    core: &mut Core,
    request: &Connect,
) -> Result<u16, Refusal> {
    let Some(subsystem) = Subsystem::from_nqn(&request.subsystem_nqn) else {
        return Err((StatusCode::CONNECT_INVALID, in_data(256)));
    };
    let offered = match subsystem {
        Subsystem::Discovery => true,
        Subsystem::Volume(volume) => core.volumes.contains_key(&volume),
        Subsystem::Replica(server) => server == core.config.server,
    };
    if !offered {
        return Err((StatusCode::CONNECT_INVALID, in_data(256)));
    }
    if let Subsystem::Replica(_) = subsystem
        && core.config.require_header_digest
        && !connection.framing.header_digest
    {
        return Err((StatusCode::CONNECT_HOST, 0));
    }
    if request.queue_id == 0 {
        connect_admin(connection, core, request, subsystem)
    } else {
        connect_io(connection, core, request, subsystem)
    }
}

fn connect_admin(
    connection: &mut Connection,
    core: &mut Core,
    request: &Connect,
    subsystem: Subsystem,
) -> Result<u16, Refusal> {
    if request.controller_id != CONTROLLER_ANY {
        return Err((StatusCode::CONNECT_INVALID, in_data(16)));
    }
    if request.queue_size == 0 || request.queue_size >= ADMIN_ENTRIES_MAX {
        return Err((StatusCode::CONNECT_INVALID, 44));
    }
    let keep_alive = match (subsystem, request.keep_alive_ms) {
        (Subsystem::Replica(_), 0) => return Err((StatusCode::CONNECT_INVALID, 48)),
        (Subsystem::Discovery, 0) => DISCOVERY_KEEP_ALIVE,
        (_, milliseconds) => Duration::from_millis(u64::from(milliseconds)),
    };
    // A head that comes back replaces its old session: what is still under way there must not
    // take effect after what it sends from now on.
    if let Subsystem::Replica(_) = subsystem
        && let Some(old) = core.sessions.values().find(|session| {
            session.subsystem == subsystem
                && session.host_id == request.host_id
                && session.host_nqn == request.host_nqn
        })
    {
        let old = old.id;
        core.end_session(old);
    }
    let Some(controller_id) = free_controller_id(core) else {
        return Err((StatusCode::CONNECT_BUSY, 0));
    };
    core.last_session += 1;
    let id = SessionId(core.last_session);
    let mut session = Session::new(id, subsystem, controller_id);
    session.host_nqn.clone_from(&request.host_nqn);
    session.host_id = request.host_id;
    session.admin = connection.index;
    session.keep_alive = keep_alive;
    session.last_heard = core.now;
    core.sessions.insert(id, session);
    enter(connection, request, Phase::Admin(id));
    let host = HolderId::from_bytes(request.host_id);
    core.outbox.push(Output::SessionOpened { session: id, subsystem, host });
    Ok(controller_id)
}

fn free_controller_id(core: &Core) -> Option<u16> {
    let used = |id: u16| core.sessions.values().any(|session| session.controller_id == id);
    let candidates = usize::from(u16::MAX).min(core.sessions.len() + 1);
    (1..=u16::try_from(candidates).ok()?).find(|&id| id < 0xfff0 && !used(id))
}

fn connect_io(
    connection: &mut Connection,
    core: &mut Core,
    request: &Connect,
    subsystem: Subsystem,
) -> Result<u16, Refusal> {
    let found = core.sessions.values_mut().find(|session| {
        session.controller_id == request.controller_id && session.subsystem == subsystem
    });
    let Some(session) = found else { return Err((StatusCode::CONNECT_INVALID, in_data(16))) };
    if session.host_nqn != request.host_nqn || session.host_id != request.host_id {
        return Err((StatusCode::CONNECT_INVALID, in_data(0)));
    }
    if session.status & CSTS_READY == 0 {
        return Err((StatusCode::CONNECT_INVALID, in_data(16)));
    }
    let (queues_max, phase) = match subsystem {
        Subsystem::Discovery => return Err((StatusCode::CONNECT_INVALID, 42)),
        Subsystem::Volume(volume) => (core.config.io_queues_max, Phase::Volume(session.id, volume)),
        Subsystem::Replica(_) => (1, Phase::Replica(session.id)),
    };
    if request.queue_id > queues_max {
        return Err((StatusCode::CONNECT_INVALID, 42));
    }
    if session.queues & (1 << request.queue_id) != 0 {
        return Err((StatusCode::SEQUENCE_ERROR, 0));
    }
    if request.queue_size == 0 || request.queue_size >= core.config.queue_entries {
        return Err((StatusCode::CONNECT_INVALID, 44));
    }
    session.queues |= 1 << request.queue_id;
    session.last_heard = core.now;
    let controller_id = session.controller_id;
    enter(connection, request, phase);
    connection.commands = Commands::new(connection.entries);
    connection.link.staging_bytes = base::limits::PAYLOAD_BYTES_MAX;
    Ok(controller_id)
}

fn enter(connection: &mut Connection, request: &Connect, phase: Phase) {
    connection.phase = phase;
    connection.entries = request.queue_size + 1;
    connection.queue_id = request.queue_id;
    // Connect itself was the first entry.
    connection.head = 1;
    connection.no_flow_control = request.no_flow_control;
}

/// A fabrics command after Connect.
pub(super) fn run(
    connection: &mut Connection,
    core: &mut Core,
    session: SessionId,
    command: &Command,
) {
    let Core { sessions, config, outbox, .. } = core;
    let Some(session) = sessions.get_mut(&session) else { return };
    let [kind, ..] = command.nsid.to_le_bytes();
    let outcome = match kind {
        PROPERTY_GET => property(session, config.queue_entries, command),
        PROPERTY_SET => set_property(session, command),
        CONNECT => Err(StatusCode::SEQUENCE_ERROR),
        _ => Err(StatusCode::INVALID_OPCODE),
    };
    match outcome {
        Ok(value) => connection.complete(outbox, command.id, StatusCode::SUCCESS, value),
        Err(status) => connection.complete(outbox, command.id, status, 0),
    }
}

fn property(session: &Session, entries: u16, command: &Command) -> Result<u64, StatusCode> {
    let wide = command.cdw10[0] & 7 == 1;
    match (command.cdw10[1], wide) {
        (CAP, true) => Ok(capabilities(entries)),
        (VS, false) => Ok(u64::from(VERSION)),
        (CC, false) => Ok(u64::from(session.configuration)),
        (CSTS, false) => Ok(u64::from(session.status)),
        (CRTO, false) => Ok(0),
        _ => Err(StatusCode::INVALID_FIELD),
    }
}

fn set_property(session: &mut Session, command: &Command) -> Result<u64, StatusCode> {
    if command.cdw10[0] & 7 != 0 || command.cdw10[1] != CC {
        return Err(StatusCode::INVALID_FIELD);
    }
    let value = command.cdw10[2];
    session.configuration = value;
    session.status = if value & CC_ENABLE != 0 { session.status | CSTS_READY } else { 0 };
    if value & CC_SHUTDOWN != 0 {
        session.status |= CSTS_SHUTDOWN_COMPLETE;
    }
    Ok(0)
}
