//! A volume subsystem's I/O commands: the NVM command set.

use base::limits::{PAYLOAD_BYTES_MAX, RANGE_BLOCKS_MAX, SMALL_PAYLOAD_BYTES};
use base::{
    BlockCount, BlockReply, BlockRequest, BufferMut, Lba, Operation, RequestId, Status, VolumeId,
};

use super::admin::VOLUME_CAPSULE_BYTES;
use super::connection::{Connection, Expect, Ranges, Work, Write};
use super::process::Verdict;
use super::{Access, Core, Output, VolumeExport, make_tag};
use crate::codec::command::{Command, NSID_ALL, Sgl, nvm};
use crate::codec::pdu::{FLAG_LAST, FatalError, PduType, Transfer};
use crate::codec::status::StatusCode;
use crate::codec::{u32_at, u64_at};
use crate::io::SessionId;
use crate::link::{Pdu, Sink, Violation};
use crate::outbox::Data;

/// Bytes of a range of Dataset Management.
const RANGE_BYTES: usize = 16;
/// Bytes of a list of ranges, at most: 256 of them.
const RANGE_LIST_BYTES_MAX: usize = 256 * RANGE_BYTES;

/// What a command asks for, checked against the volume.
enum Request {
    Read { lba: Lba, blocks: u32, bytes: usize },
    Write(Write),
    Flush,
    WriteZeroes { lba: Lba, blocks: u32, fua: bool, deallocate: bool },
}

/// A command capsule. Nothing is changed if it has to wait.
pub(super) fn on_command(
    connection: &mut Connection,
    core: &mut Core,
    (session, volume): (SessionId, VolumeId),
    command: &Command,
    data_bytes: usize,
) -> Verdict {
    let request = match decode(core, session, volume, command) {
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
    let operation = match request {
        Request::Read { bytes, .. } => {
            let Some(buffer) = core.pool.take(bytes) else { return Verdict::Wait };
            Operation::Read { buffer }
        }
        Request::Write(write) => {
            return on_write(connection, core, command.id, write, data_bytes);
        }
        Request::Flush => Operation::Flush,
        Request::WriteZeroes { deallocate: true, fua: false, .. } => Operation::Discard,
        Request::WriteZeroes { fua, .. } => Operation::WriteZeroes { fua },
    };
    let (work, lba, blocks) = match request {
        Request::Read { lba, blocks, bytes } => (Work::Read { bytes }, lba, blocks),
        Request::WriteZeroes { lba, blocks, .. } => (Work::Block, lba, blocks),
        Request::Write(_) | Request::Flush => (Work::Block, Lba(0), 0),
    };
    connection.advance_head();
    let slot = connection.commands.insert(command.id, 0, work);
    submit(connection, core, slot, lba, blocks, operation);
    Verdict::DONE
}

fn decode(
    core: &Core,
    session: SessionId,
    volume: VolumeId,
    command: &Command,
) -> Result<Request, StatusCode> {
    let session = core.sessions.get(&session).ok_or(StatusCode::INTERNAL)?;
    let volume = core.volumes.get(&volume).ok_or(StatusCode::INTERNAL)?;
    let export = &volume.export;
    let any_namespace = command.opcode == nvm::FLUSH && command.nsid == NSID_ALL;
    if command.nsid != 1 && !any_namespace {
        return Err(StatusCode::INVALID_NAMESPACE);
    }
    if command.fuse != 0 {
        return Err(StatusCode::INVALID_FIELD);
    }
    if volume.access == Access::Inaccessible {
        return Err(StatusCode::PATH_INACCESSIBLE);
    }
    let changes =
        matches!(command.opcode, nvm::WRITE | nvm::WRITE_ZEROES | nvm::DATASET_MANAGEMENT);
    if changes && export.read_only {
        return Err(StatusCode::WRITE_PROTECTED);
    }
    let lba = Lba(command.wide(0));
    let blocks = (command.cdw10[2] & 0xffff) + 1;
    let fua = command.cdw10[2] & nvm::FORCE_UNIT_ACCESS != 0 || !session.volatile_cache;
    match command.opcode {
        nvm::FLUSH => Ok(Request::Flush),
        nvm::READ => {
            let bytes = payload_bytes(export, lba, blocks)?;
            match command.sgl {
                Sgl::Transport { length } if length as usize == bytes => {
                    Ok(Request::Read { lba, blocks, bytes })
                }
                Sgl::Transport { .. } => Err(StatusCode::SGL_LENGTH_INVALID),
                Sgl::InCapsule { .. } | Sgl::Other => Err(StatusCode::SGL_TYPE_INVALID),
            }
        }
        nvm::WRITE => {
            let bytes = payload_bytes(export, lba, blocks)?;
            if command.sgl.length() as usize != bytes {
                return Err(StatusCode::SGL_LENGTH_INVALID);
            }
            write(command.sgl, Write { lba, blocks, fua, ..Write::new(bytes) })
        }
        nvm::WRITE_ZEROES => {
            check_range(export, lba, blocks)?;
            let deallocate = command.cdw10[2] & nvm::DEALLOCATE != 0;
            Ok(Request::WriteZeroes { lba, blocks, fua, deallocate })
        }
        nvm::DATASET_MANAGEMENT => {
            let count = (command.cdw10[0] & 0xff) + 1;
            let bytes = command.sgl.length() as usize;
            if bytes < count as usize * RANGE_BYTES || bytes > RANGE_LIST_BYTES_MAX {
                return Err(StatusCode::SGL_LENGTH_INVALID);
            }
            // Without Deallocate the ranges are only hints about future access: none is used.
            let deallocate = command.cdw10[1] & nvm::ATTRIBUTE_DEALLOCATE != 0;
            let blocks = if deallocate { count } else { 0 };
            write(command.sgl, Write { blocks, ranges: true, ..Write::new(bytes) })
        }
        _ => Err(StatusCode::INVALID_OPCODE),
    }
}

impl Write {
    fn new(bytes: usize) -> Self {
        Self {
            buffer: None,
            lba: Lba(0),
            blocks: 0,
            bytes,
            received: 0,
            fua: false,
            transfer: false,
            ranges: false,
            damaged: false,
        }
    }
}

fn write(sgl: Sgl, write: Write) -> Result<Request, StatusCode> {
    match sgl {
        Sgl::InCapsule { offset, .. } if offset != 0 => Err(StatusCode::SGL_OFFSET_INVALID),
        Sgl::InCapsule { .. } if write.bytes > VOLUME_CAPSULE_BYTES => {
            Err(StatusCode::SGL_LENGTH_INVALID)
        }
        Sgl::InCapsule { .. } => Ok(Request::Write(write)),
        Sgl::Transport { .. } => Ok(Request::Write(Write { transfer: true, ..write })),
        Sgl::Other => Err(StatusCode::SGL_TYPE_INVALID),
    }
}

fn check_range(export: &VolumeExport, lba: Lba, blocks: u32) -> Result<(), StatusCode> {
    match lba.0.checked_add(u64::from(blocks)) {
        Some(end) if end <= export.blocks => Ok(()),
        Some(_) | None => Err(StatusCode::LBA_RANGE),
    }
}

/// The bytes of a read or write that is within the volume and the transfer limit.
fn payload_bytes(export: &VolumeExport, lba: Lba, blocks: u32) -> Result<usize, StatusCode> {
    check_range(export, lba, blocks)?;
    let bytes = usize::try_from(BlockCount(blocks).bytes(export.block_size)).ok();
    bytes.filter(|&bytes| bytes <= PAYLOAD_BYTES_MAX).ok_or(StatusCode::INVALID_FIELD)
}

/// A write or list of ranges: the data is in the capsule, or is asked for.
fn on_write(
    connection: &mut Connection,
    core: &mut Core,
    id: u16,
    write: Write,
    data_bytes: usize,
) -> Verdict {
    if write.transfer {
        connection.advance_head();
        let slot = connection.commands.insert(id, 0, Work::Write(write));
        connection.waiting.push_back(slot);
        ask_for_data(connection, core);
        return Verdict::DONE;
    }
    let Some(buffer) = core.pool.take(write.bytes) else { return Verdict::Wait };
    connection.advance_head();
    let slot = connection.commands.insert(id, 0, Work::Write(write));
    let sink = Sink::Buffer { buffer, header: 0..0, payload: 0..data_bytes };
    Verdict::Take(sink, Expect::Block { slot, bytes: data_bytes })
}

/// Sends R2Ts for writes that wait, oldest first, while there are buffers.
///
/// The data of such a write comes behind whatever the host has sent before, so a write that holds
/// a buffer may depend on a command that needs one. Therefore writes never take the last one, and
/// do not hold up the stream while they wait.
pub(super) fn ask_for_data(connection: &mut Connection, core: &mut Core) {
    while let Some(&slot) = connection.waiting.front() {
        let Some(entry) = connection.commands.slot(slot) else { return };
        let Some(Work::Write(write)) = &mut entry.work else { return };
        let (small, large) = core.pool.available();
        let free = if write.bytes <= SMALL_PAYLOAD_BYTES { small } else { large };
        if free < 2 {
            return;
        }
        let Some(buffer) = core.pool.take(write.bytes) else { return };
        write.buffer = Some(buffer);
        let length = u32::try_from(write.bytes).expect("bounded by the transfer limit");
        let transfer = Transfer { command_id: entry.id, transfer_tag: slot, offset: 0, length };
        let body = transfer.encode();
        connection.waiting.pop_front();
        connection.pdu(&mut core.outbox, PduType::R2t, 0, &body, Data::None);
    }
}

/// An H2CData PDU.
pub(super) fn on_transfer(connection: &mut Connection, pdu: &Pdu) -> Result<Verdict, Violation> {
    let transfer = Transfer::decode(&pdu.header);
    let invalid = |offset| Err(Violation::of(pdu, FatalError::InvalidHeaderField, offset));
    let slot = transfer.transfer_tag;
    let Some(entry) = connection.commands.slot(slot) else { return invalid(10) };
    if entry.id != transfer.command_id {
        return invalid(8);
    }
    let Some(Work::Write(write)) = &mut entry.work else { return invalid(10) };
    if !write.transfer {
        return invalid(10);
    }
    if transfer.length as usize != pdu.data_bytes || pdu.data_bytes == 0 {
        return invalid(16);
    }
    let start = write.received;
    let end = start + pdu.data_bytes;
    if transfer.offset as usize != start || end > write.bytes {
        return Err(Violation::of(pdu, FatalError::DataOutOfRange, 12));
    }
    if (pdu.flags & FLAG_LAST != 0) != (end == write.bytes) {
        return invalid(1);
    }
    let Some(buffer) = write.buffer.take() else { return invalid(10) };
    let sink = Sink::Buffer { buffer, header: 0..0, payload: start..end };
    Ok(Verdict::Take(sink, Expect::Block { slot, bytes: pdu.data_bytes }))
}

/// Data of a write or a list of ranges has come.
pub(super) fn on_data(
    connection: &mut Connection,
    core: &mut Core,
    slot: u16,
    buffer: BufferMut,
    intact: bool,
    data_bytes: usize,
) {
    let Some(entry) = connection.commands.slot(slot) else { return };
    let Some(Work::Write(write)) = &mut entry.work else { return };
    write.received += data_bytes;
    write.damaged |= !intact;
    if write.received < write.bytes {
        write.buffer = Some(buffer);
        return;
    }
    if write.damaged {
        let id = connection.commands.remove(slot);
        connection.complete(&mut core.outbox, id, StatusCode::TRANSIENT_TRANSPORT, 0);
        return;
    }
    if write.ranges {
        let count = write.blocks as usize;
        let list = buffer.freeze().payload(count * RANGE_BYTES);
        entry.work = Some(Work::Ranges(Ranges { list, count, next: 0, done: 0 }));
        start_ranges(connection, core, slot);
        return;
    }
    let (lba, blocks, fua) = (write.lba, write.blocks, write.fua);
    entry.work = Some(Work::Block);
    submit(connection, core, slot, lba, blocks, Operation::Write { buffer, fua });
}

fn submit(
    connection: &mut Connection,
    core: &mut Core,
    slot: u16,
    lba: Lba,
    blocks: u32,
    operation: Operation,
) {
    let super::connection::Phase::Volume(session, volume) = connection.phase else { return };
    let generation = core.next_generation();
    let Some(entry) = connection.commands.slot(slot) else { return };
    entry.generation = generation;
    let id = RequestId(make_tag(generation, connection.index, slot).0);
    let request = BlockRequest { id, lba, blocks: BlockCount(blocks), operation };
    core.outbox.push(Output::Block { session, volume, request });
}

/// The `index`th range of a list: (LBA, blocks).
fn range(list: &[u8], index: usize) -> (u64, u32) {
    let at = index * RANGE_BYTES;
    (u64_at(list, at + 8), u32_at(list, at + 4))
}

/// Checks all ranges, then discards the first.
fn start_ranges(connection: &mut Connection, core: &mut Core, slot: u16) {
    let super::connection::Phase::Volume(_, volume) = connection.phase else { return };
    let Some(volume) = core.volumes.get(&volume) else { return };
    let Some(entry) = connection.commands.slot(slot) else { return };
    let Some(Work::Ranges(ranges)) = &entry.work else { return };
    let valid = (0..ranges.count).all(|index| {
        let (lba, blocks) = range(ranges.list.bytes(), index);
        check_range(&volume.export, Lba(lba), blocks).is_ok()
    });
    if valid {
        next_range(connection, core, slot);
    } else {
        let id = connection.commands.remove(slot);
        connection.complete(&mut core.outbox, id, StatusCode::LBA_RANGE, 0);
    }
}

/// Discards the next piece; completes the command when there is none.
fn next_range(connection: &mut Connection, core: &mut Core, slot: u16) {
    let Some(entry) = connection.commands.slot(slot) else { return };
    let Some(Work::Ranges(ranges)) = &mut entry.work else { return };
    while ranges.next < ranges.count {
        let (lba, blocks) = range(ranges.list.bytes(), ranges.next);
        let left = blocks - ranges.done;
        if left == 0 {
            ranges.next += 1;
            ranges.done = 0;
            continue;
        }
        let piece = left.min(RANGE_BLOCKS_MAX);
        let lba = Lba(lba + u64::from(ranges.done));
        ranges.done += piece;
        submit(connection, core, slot, lba, piece, Operation::Discard);
        return;
    }
    let id = connection.commands.remove(slot);
    connection.complete(&mut core.outbox, id, StatusCode::SUCCESS, 0);
}

/// The head's answer.
pub(super) fn reply(connection: &mut Connection, core: &mut Core, slot: u16, reply: BlockReply) {
    let Some(entry) = connection.commands.slot(slot) else { return };
    match &entry.work {
        Some(Work::Ranges(_)) if reply.status == Status::Ok => {
            next_range(connection, core, slot);
        }
        Some(Work::Read { bytes }) if reply.status == Status::Ok => {
            let bytes = *bytes;
            let id = connection.commands.remove(slot);
            let data = reply.data.expect("a successful read has data");
            assert_eq!(data.len(), bytes, "a read gives exactly the range's bytes");
            connection.complete_with_data(&mut core.outbox, id, &data);
        }
        Some(Work::Block | Work::Read { .. } | Work::Ranges(_)) => {
            let write = !matches!(entry.work, Some(Work::Read { .. }));
            let id = connection.commands.remove(slot);
            let status = match (reply.status, write) {
                // The media error of a write has another code than that of a read.
                (Status::IoError, true) => StatusCode::INTERNAL,
                (status, _) => StatusCode::of_block(status),
            };
            connection.complete(&mut core.outbox, id, status, 0);
        }
        Some(Work::Receiving | Work::Replica(_) | Work::Write(_)) | None => {}
    }
}
