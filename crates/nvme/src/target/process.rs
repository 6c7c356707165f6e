//! What a target does with the PDUs of one connection.

use super::connection::{Connection, Expect, Phase, command_of};
use super::{Core, UNSENT_BYTES_MAX, admin, block, fabrics, replica};
use crate::codec::command::Sgl;
use crate::codec::pdu::{FatalError, Initialize, PduType};
use crate::codec::status::StatusCode;
use crate::link::{Arrived, Pdu, Sink, Step, Violation};
use crate::outbox::Data;

/// MAXH2CDATA: a write's data may come in one PDU.
const H2C_DATA_BYTES_MAX: u32 = 128 * 1024;
/// In-capsule data of the admin queue, at most (TCP 1.0, 3.3.2).
pub(super) const ADMIN_DATA_BYTES_MAX: usize = 8192;

/// All that has come was worked on, or something has to wait.
pub(super) enum Progress {
    Drained,
    Stalled,
}

/// The connection ends.
pub(super) enum End {
    Violation(Violation),
    Close,
}

impl From<Violation> for End {
    fn from(violation: Violation) -> Self {
        Self::Violation(violation)
    }
}

/// What becomes of a PDU.
pub(super) enum Verdict {
    /// It must wait for a buffer or a slot.
    Wait,
    /// It is taken; its data (if any) goes here.
    Take(Sink, Expect),
}

impl Verdict {
    /// Taken, and nothing more to do when its data has come.
    pub(super) const DONE: Self = Self::Take(Sink::Discard, Expect::Nothing);
}

/// Works on everything received so far.
pub(super) fn process(connection: &mut Connection, core: &mut Core) -> Result<Progress, End> {
    if !connection.waiting.is_empty() {
        block::ask_for_data(connection, core);
    }
    loop {
        match connection.link.poll()? {
            Step::Idle => return Ok(Progress::Drained),
            Step::Pdu(pdu) => {
                if connection.unsent > UNSENT_BYTES_MAX {
                    return Ok(Progress::Stalled);
                }
                match on_pdu(connection, core, &pdu)? {
                    Verdict::Wait => return Ok(Progress::Stalled),
                    Verdict::Take(sink, expect) => {
                        connection.link.accept(&pdu, sink);
                        connection.expect = expect;
                    }
                }
            }
            Step::Data { arrived, intact } => on_data(connection, core, arrived, intact)?,
        }
    }
}

fn on_pdu(connection: &mut Connection, core: &mut Core, pdu: &Pdu) -> Result<Verdict, End> {
    match (pdu.kind, connection.phase) {
        (PduType::H2cTermReq, _) => Err(End::Close),
        (PduType::IcReq, Phase::Initialize) => initialize(connection, core, pdu),
        (PduType::CapsuleCmd, Phase::Connect | Phase::Admin(_)) => {
            on_admin_capsule(connection, core, pdu)
        }
        (PduType::CapsuleCmd, Phase::Replica(session)) => {
            check_id(connection, pdu)?;
            let command = command_of(&pdu.header);
            check_in_capsule(pdu, command.sgl)?;
            Ok(replica::on_command(connection, core, session, &command, pdu.data_bytes))
        }
        (PduType::CapsuleCmd, Phase::Volume(session, volume)) => {
            check_id(connection, pdu)?;
            let command = command_of(&pdu.header);
            check_in_capsule(pdu, command.sgl)?;
            Ok(block::on_command(connection, core, (session, volume), &command, pdu.data_bytes))
        }
        (PduType::H2cData, Phase::Volume(..)) => Ok(block::on_transfer(connection, pdu)?),
        _ => Err(Violation::of(pdu, FatalError::Sequence, 0).into()),
    }
}

/// A command id must not be in use (its offset in the PDU is 10).
fn check_id(connection: &Connection, pdu: &Pdu) -> Result<(), Violation> {
    if connection.commands.is_id_used(command_of(&pdu.header).id) {
        return Err(Violation::of(pdu, FatalError::InvalidHeaderField, 10));
    }
    Ok(())
}

/// The capsule has exactly the data that the command's SGL says is in it.
fn check_in_capsule(pdu: &Pdu, sgl: Sgl) -> Result<(), Violation> {
    let stated = match sgl {
        Sgl::InCapsule { length, .. } => usize::try_from(length).unwrap_or(usize::MAX),
        Sgl::Transport { .. } | Sgl::Other => 0,
    };
    if stated == pdu.data_bytes {
        Ok(())
    } else {
        Err(Violation::of(pdu, FatalError::InvalidHeaderField, 4))
    }
}

fn initialize(connection: &mut Connection, core: &mut Core, pdu: &Pdu) -> Result<Verdict, End> {
    let request = Initialize::decode(&pdu.header);
    if request.version != 0 {
        return Err(Violation::of(pdu, FatalError::UnsupportedParameter, 8).into());
    }
    if request.alignment > 31 {
        return Err(Violation::of(pdu, FatalError::InvalidHeaderField, 10).into());
    }
    let response = Initialize {
        version: 0,
        alignment: 0,
        header_digest: request.header_digest,
        data_digest: request.data_digest,
        max: H2C_DATA_BYTES_MAX,
    };
    connection.pdu(&mut core.outbox, PduType::IcResp, 0, &response.encode(), Data::None);
    connection.framing.header_digest = request.header_digest;
    connection.framing.data_digest = request.data_digest;
    connection.framing.alignment = request.alignment;
    connection.link.header_digest = request.header_digest;
    connection.link.data_digest = request.data_digest;
    connection.phase = Phase::Connect;
    Ok(Verdict::DONE)
}

fn on_admin_capsule(
    connection: &mut Connection,
    core: &mut Core,
    pdu: &Pdu,
) -> Result<Verdict, End> {
    let command = command_of(&pdu.header);
    check_in_capsule(pdu, command.sgl)?;
    if pdu.data_bytes > ADMIN_DATA_BYTES_MAX {
        return Err(Violation::of(pdu, FatalError::LimitExceeded, 4).into());
    }
    if pdu.data_bytes > 0 {
        let Some(buffer) = core.pool.take(pdu.data_bytes) else { return Ok(Verdict::Wait) };
        let sink = Sink::Buffer { buffer, header: 0..0, payload: 0..pdu.data_bytes };
        return Ok(Verdict::Take(sink, Expect::Admin(command)));
    }
    run_admin(connection, core, &command, &[])?;
    Ok(Verdict::DONE)
}

fn run_admin(
    connection: &mut Connection,
    core: &mut Core,
    command: &crate::codec::command::Command,
    data: &[u8],
) -> Result<(), End> {
    connection.advance_head();
    match connection.phase {
        Phase::Connect => {
            fabrics::connect(connection, core, command, data);
            Ok(())
        }
        Phase::Admin(session) => {
            if let Some(parked) = core.sessions.get(&session)
                && parked.is_parked(command.id)
            {
                connection.complete(
                    &mut core.outbox,
                    command.id,
                    StatusCode::COMMAND_ID_CONFLICT,
                    0,
                );
                return Ok(());
            }
            admin::run(connection, core, session, command);
            Ok(())
        }
        Phase::Initialize | Phase::Replica(_) | Phase::Volume(..) | Phase::Closing => {
            Err(End::Close)
        }
    }
}

fn on_data(
    connection: &mut Connection,
    core: &mut Core,
    arrived: Arrived,
    intact: bool,
) -> Result<(), End> {
    match core::mem::replace(&mut connection.expect, Expect::Nothing) {
        Expect::Nothing => Ok(()),
        Expect::Admin(command) => {
            let Arrived::Buffer(buffer) = arrived else { return Err(End::Close) };
            if !intact {
                connection.complete(
                    &mut core.outbox,
                    command.id,
                    StatusCode::TRANSIENT_TRANSPORT,
                    0,
                );
                return Ok(());
            }
            let length = usize::try_from(command.sgl.length()).unwrap_or(0);
            run_admin(connection, core, &command, &buffer.payload()[..length])
        }
        Expect::Append { slot, append } => {
            let Arrived::Buffer(buffer) = arrived else { return Err(End::Close) };
            replica::on_record(connection, core, slot, append, buffer, intact);
            Ok(())
        }
        Expect::Block { slot, bytes } => {
            let Arrived::Buffer(buffer) = arrived else { return Err(End::Close) };
            block::on_data(connection, core, slot, buffer, intact, bytes);
            Ok(())
        }
    }
}
