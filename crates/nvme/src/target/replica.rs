//! The replica subsystem's I/O commands.

use base::checksum::crc32c;
use base::{BufferMut, CommandBody, Epoch, Record, ReplicaCommand, ReplicaError, Seq};
use base::{ReplicaKey, ReplyBody};

use super::connection::{Answer, Append, Connection, Expect, Work};
use super::process::Verdict;
use super::{Core, Output, make_tag};
use crate::codec::command::Command;
use crate::codec::pdu::FLAG_LAST;
use crate::codec::replica::{self, Request};
use crate::codec::status::StatusCode;
use crate::io::SessionId;
use crate::link::Sink;
use crate::outbox::Data;

/// A command capsule. Nothing is changed if it has to wait.
pub(super) fn on_command(
    connection: &mut Connection,
    core: &mut Core,
    session: SessionId,
    command: &Command,
    data_bytes: usize,
) -> Verdict {
    let request = match replica::decode(command) {
        Ok(request) => request,
        Err(status) => {
            connection.advance_head();
            connection.complete(&mut core.outbox, command.id, status, 0);
            return Verdict::DONE;
        }
    };
    if connection.commands.is_full() {
        return Verdict::Wait;
    }
    let buffer_bytes = match request {
        Request::Append { payload_bytes, .. } => Some(payload_bytes),
        Request::Read { bytes, .. }
        | Request::List { bytes, .. }
        | Request::ScanRun { bytes, .. } => Some(bytes),
        Request::Scan { .. } | Request::Fetch { .. } => Some(base::limits::PAYLOAD_BYTES_MAX),
        Request::Seal { .. }
        | Request::Flush
        | Request::Truncate { .. }
        | Request::Grow { .. }
        | Request::Trim
        | Request::Release
        | Request::Renew
        | Request::Hello { .. }
        | Request::HealthOf { .. }
        | Request::Install { .. } => None,
    };
    let mut buffer = None;
    if let Some(bytes) = buffer_bytes {
        buffer = core.pool.take(bytes);
        if buffer.is_none() {
            return Verdict::Wait;
        }
    }
    connection.advance_head();
    if let Request::Append { lba, seq, header_bytes, payload_bytes, media } = request
        && let Some(buffer) = buffer
    {
        let key = core.sessions.get(&session).and_then(|session| session.key(command.nsid));
        let (epoch, commit) = (Epoch(command.cdw2), Seq(command.metadata));
        let generation = core.next_generation();
        let slot = connection.commands.insert(command.id, generation, Work::Receiving);
        let append = Append { key, epoch, commit, lba, seq, media };
        debug_assert_eq!(header_bytes + payload_bytes, data_bytes);
        let sink = Sink::Buffer { buffer, header: 0..header_bytes, payload: 0..payload_bytes };
        return Verdict::Take(sink, Expect::Append { slot, append });
    }
    run(connection, core, session, command, request, buffer);
    Verdict::DONE
}

/// A command without data to receive.
fn run(
    connection: &mut Connection,
    core: &mut Core,
    id: SessionId,
    command: &Command,
    request: Request,
    buffer: Option<BufferMut>,
) {
    let Some(session) = core.sessions.get_mut(&id) else { return };
    if let Request::Seal { key } | Request::Hello { bind: Some(key), .. } = request
        && !session.bind(command.nsid, key)
    {
        refuse(connection, core, command.id, ReplicaError::Invalid);
        return;
    }
    let Some(key) = session.key(command.nsid) else {
        refuse(connection, core, command.id, ReplicaError::NotSealed);
        return;
    };
    let (body, answer) = match (request, buffer) {
        (Request::Seal { .. }, _) => (CommandBody::Seal, Answer::Sealed),
        (Request::Read { lba, blocks, covers, bytes }, Some(buffer)) => {
            (CommandBody::Read { lba, blocks, covers, buffer }, Answer::Data { blocks, bytes })
        }
        (Request::Scan { seq }, Some(buffer)) => {
            (CommandBody::Scan { seq, buffer }, Answer::Record)
        }
        (Request::ScanRun { seq, records, bytes: _ }, Some(buffer)) => {
            (CommandBody::ScanRun { seq, records, buffer }, Answer::Records)
        }
        (Request::Flush, _) => (CommandBody::Flush, Answer::Flushed),
        (Request::Truncate { keep }, _) => (CommandBody::Truncate { keep }, Answer::Truncated),
        (Request::Grow { blocks }, _) => (CommandBody::Grow { blocks }, Answer::Done),
        (Request::Trim, _) => (CommandBody::Trim, Answer::Done),
        (Request::Release, _) => (CommandBody::Release, Answer::Done),
        (Request::Renew, _) => (CommandBody::Renew, Answer::Done),
        (Request::Hello { reason, acknowledged, bind: _ }, _) => {
            (CommandBody::Hello { reason, acknowledged }, Answer::Done)
        }
        (Request::HealthOf { server }, _) => (CommandBody::HealthOf { server }, Answer::Health),
        (Request::Install { source, chunks, bytes_per_second }, _) => {
            (CommandBody::Install { source, chunks, bytes_per_second }, Answer::Progress)
        }
        (Request::List { unit, first, bytes: _ }, Some(buffer)) => {
            (CommandBody::List { unit, first, buffer }, Answer::Chunks)
        }
        (Request::Fetch { lba, end }, Some(buffer)) => {
            (CommandBody::Fetch { lba, end, buffer }, Answer::Run)
        }
        (
            Request::Append { .. }
            | Request::Read { .. }
            | Request::Scan { .. }
            | Request::ScanRun { .. }
            | Request::List { .. }
            | Request::Fetch { .. },
            _,
        ) => unreachable!("appends go another way, and what is answered with data has a buffer"),
    };
    let generation = core.next_generation();
    let slot = connection.commands.insert(command.id, generation, Work::Replica(answer));
    let tag = make_tag(generation, connection.index, slot);
    let (epoch, commit) = (Epoch(command.cdw2), Seq(command.metadata));
    let command = ReplicaCommand { key, epoch, commit, body };
    core.outbox.push(Output::Replica { session: id, tag, command });
}

/// An Append's record has come.
pub(super) fn on_record(
    connection: &mut Connection,
    core: &mut Core,
    slot: u16,
    append: Append,
    buffer: BufferMut,
    intact: bool,
) {
    let Some(session) = connection.phase.session() else { return };
    if !intact {
        let id = connection.commands.remove(slot);
        connection.complete(&mut core.outbox, id, StatusCode::TRANSIENT_TRANSPORT, 0);
        return;
    }
    match check_record(&append, buffer) {
        Ok((key, record)) => {
            let Some(entry) = connection.commands.slot(slot) else { return };
            entry.work = Some(Work::Replica(Answer::Appended));
            let tag = make_tag(entry.generation, connection.index, slot);
            let body = CommandBody::Append { record, media: append.media };
            let Append { epoch, commit, .. } = append;
            let command = ReplicaCommand { key, epoch, commit, body };
            core.outbox.push(Output::Replica { session, tag, command });
        }
        Err(error) => {
            let id = connection.commands.remove(slot);
            refuse(connection, core, id, error);
        }
    }
}

/// The record, if it is intact and is what the command says.
fn check_record(append: &Append, buffer: BufferMut) -> Result<(ReplicaKey, Record), ReplicaError> {
    let key = append.key.ok_or(ReplicaError::NotSealed)?;
    let record = Record::decode(buffer).map_err(|_| ReplicaError::Invalid)?;
    let header = record.header();
    let same = header.key == key
        && header.lba == append.lba
        && header.position.seq == append.seq
        && header.position.epoch <= append.epoch;
    if same { Ok((key, record)) } else { Err(ReplicaError::Invalid) }
}

/// Completes `id` with an error.
fn refuse(connection: &mut Connection, core: &mut Core, id: u16, error: ReplicaError) {
    let (status, result, position) = replica::encode_error(error);
    let outbox = &mut core.outbox;
    match position {
        Some(position) => {
            connection.complete_with_bytes(outbox, id, status, &replica::encode_position(position));
        }
        None => connection.complete(outbox, id, status, result),
    }
}

/// The replica's answer.
pub(super) fn reply(
    connection: &mut Connection,
    core: &mut Core,
    slot: u16,
    result: Result<ReplyBody, ReplicaError>,
) {
    let Some(entry) = connection.commands.slot(slot) else { return };
    let Some(Work::Replica(answer)) = entry.work else { return };
    let id = connection.commands.remove(slot);
    let body = match result {
        Ok(body) => body,
        Err(error) => return refuse(connection, core, id, error),
    };
    let outbox = &mut core.outbox;
    let success = StatusCode::SUCCESS;
    match (body, answer) {
        (ReplyBody::Sealed(state), Answer::Sealed) => {
            connection.complete_with_bytes(outbox, id, success, &replica::encode_state(&state));
        }
        (ReplyBody::Appended { durable }, Answer::Appended)
        | (ReplyBody::Flushed { durable }, Answer::Flushed) => {
            connection.complete(outbox, id, success, durable.0);
        }
        (ReplyBody::Data(data), Answer::Data { blocks, bytes }) => {
            if data.len() <= bytes && replica::is_read_length(blocks, data.len()) {
                let crc = crc32c(data.bytes());
                let parts = Data::Parts(&[&data]);
                connection.send_data(outbox, id, 0, FLAG_LAST, parts, data.len());
                connection.complete(outbox, id, success, replica::data_result(crc));
            } else {
                // The head has room for smaller blocks than this volume's.
                refuse(connection, core, id, ReplicaError::Invalid);
            }
        }
        (ReplyBody::Record(record), Answer::Record | Answer::Run) => {
            let parts = [record.header_bytes(), record.payload()];
            connection.complete_with_parts(outbox, id, &parts);
        }
        (ReplyBody::Truncated { last }, Answer::Truncated) => {
            connection.complete_with_bytes(outbox, id, success, &replica::encode_position(last));
        }
        (ReplyBody::Done, Answer::Done | Answer::Run) => {
            connection.complete(outbox, id, success, 0);
        }
        (ReplyBody::Filling(progress), Answer::Progress) => {
            connection.complete_with_bytes(
                outbox,
                id,
                success,
                &replica::encode_progress(&progress),
            );
        }
        (ReplyBody::Health(health), Answer::Health) => {
            connection.complete(outbox, id, success, replica::health_code(health));
        }
        (ReplyBody::Chunks(list), Answer::Chunks) | (ReplyBody::Records(list), Answer::Records) => {
            let crc = crc32c(list.bytes());
            if !list.is_empty() {
                connection.send_data(outbox, id, 0, FLAG_LAST, Data::Parts(&[&list]), list.len());
            }
            connection.complete(outbox, id, success, replica::data_result(crc));
        }
        (body, answer) => panic!("{body:?} is not an answer to a command that wants {answer:?}"),
    }
}
