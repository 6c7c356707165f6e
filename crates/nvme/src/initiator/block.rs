//! Block requests to a volume subsystem.

use base::{BlockReply, BlockRequest, BufferMut, Operation, Status};

use super::queue::{Block, Entry, Work};
use super::wire::Wire;
use super::{DownReason, End, Initiator, Output, Queued, Side};
use crate::codec::command::{Command, Completion, Sgl, nvm};
use crate::codec::pdu::{FLAG_LAST, FatalError, PduType, Transfer};
use crate::codec::status::StatusCode;
use crate::link::{Pdu, Violation};
use crate::outbox::Data;

/// Bytes of a range of Dataset Management.
const RANGE_BYTES: usize = 16;

impl Initiator {
    /// Sends a block request; there is a session and a free queue entry.
    pub(super) fn send_block(&mut self, request: BlockRequest) {
        let Some(namespace) = self.admin.namespace else {
            // A replica subsystem has no namespace.
            self.answer_disconnected(Queued::Block(request));
            return;
        };
        let BlockRequest { id, lba, blocks, operation } = request;
        let bytes = usize::try_from(blocks.bytes(namespace.block_size)).unwrap_or(usize::MAX);
        let length = u32::try_from(bytes).unwrap_or(u32::MAX);
        let capacity = match &operation {
            Operation::Read { buffer } | Operation::Write { buffer, .. } => buffer.capacity(),
            Operation::Flush | Operation::Discard | Operation::WriteZeroes { .. } => usize::MAX,
        };
        if bytes > capacity {
            // The caller counts in other blocks than the peer's namespace has.
            let reply = BlockReply { id, status: Status::InvalidRange, data: None };
            self.outbox.push(Output::BlockReply(reply));
            return;
        }
        let ranged = |opcode: u8, flags: u32| {
            let mut command = Command::new(opcode, 1).with_wide(0, lba.0);
            command.cdw10[2] = (blocks.0.wrapping_sub(1) & 0xffff) | flags;
            command
        };
        let fua = |fua: bool| if fua { nvm::FORCE_UNIT_ACCESS } else { 0 };
        let mut block = Block { id, source: None, sent: 0, read: false };
        match operation {
            Operation::Read { buffer } => {
                block.read = true;
                let mut command = ranged(nvm::READ, 0);
                command.sgl = Sgl::Transport { length };
                let work = Work::Block(block);
                let bytes_max = bytes.min(buffer.capacity());
                let entry = Entry { buffer: Some(buffer), bytes_max, ..Entry::new(work) };
                self.send_entry(entry, &command, Data::None);
            }
            Operation::Write { buffer, fua: media } => {
                self.send_write(block, ranged(nvm::WRITE, fua(media)), buffer, bytes);
            }
            Operation::Flush => {
                let command = Command::new(nvm::FLUSH, 1);
                self.send_entry(Entry::new(Work::Block(block)), &command, Data::None);
            }
            Operation::Discard => {
                let mut range = [0; RANGE_BYTES];
                range[4..8].copy_from_slice(&blocks.0.to_le_bytes());
                range[8..16].copy_from_slice(&lba.0.to_le_bytes());
                let mut command = Command::new(nvm::DATASET_MANAGEMENT, 1);
                command.cdw10[1] = nvm::ATTRIBUTE_DEALLOCATE;
                command.sgl = Sgl::InCapsule { offset: 0, length: 16 };
                self.send_entry(Entry::new(Work::Block(block)), &command, Data::Inline(&range));
            }
            Operation::WriteZeroes { fua: media } => {
                let command = ranged(nvm::WRITE_ZEROES, fua(media));
                self.send_entry(Entry::new(Work::Block(block)), &command, Data::None);
            }
        }
    }

    fn send_write(&mut self, block: Block, command: Command, buffer: BufferMut, bytes: usize) {
        let length = u32::try_from(bytes).unwrap_or(u32::MAX);
        let data = buffer.freeze().payload(bytes);
        if bytes <= self.admin.capsule_bytes {
            let command = Command { sgl: Sgl::InCapsule { offset: 0, length }, ..command };
            let entry = Entry::new(Work::Block(block));
            self.send_entry(entry, &command, Data::Parts(&[&data]));
        } else {
            let command = Command { sgl: Sgl::Transport { length }, ..command };
            let block = Block { source: Some(data), ..block };
            self.send_entry(Entry::new(Work::Block(block)), &command, Data::None);
        }
    }

    fn send_entry(&mut self, entry: Entry, command: &Command, data: Data<'_>) {
        let id = self.queue.insert(entry);
        let command = Command { id, ..*command };
        if let Some(wire) = &self.wires[Side::Io.index()] {
            wire.send(&mut self.outbox, &command, data);
        }
    }

    /// The peer asks for data of a write.
    pub(super) fn on_ready_to_transfer(&mut self, wire: &Wire, pdu: &Pdu) -> Result<(), End> {
        let transfer = Transfer::decode(&pdu.header);
        let invalid = |error, offset| {
            Err(End::Violation(Violation::of(pdu, error, offset), "an R2T is not valid"))
        };
        let Some(Entry { work: Work::Block(block), .. }) = self.queue.entry(transfer.command_id)
        else {
            return invalid(FatalError::InvalidHeaderField, 8);
        };
        let Some(source) = &block.source else {
            return invalid(FatalError::InvalidHeaderField, 8);
        };
        let start = transfer.offset as usize;
        let end = start.saturating_add(transfer.length as usize);
        if start != block.sent || end > source.len() || start == end {
            return invalid(FatalError::DataOutOfRange, 12);
        }
        block.sent = end;
        let mut at = start;
        while at < end {
            let length = (end - at).min(wire.data_bytes_max);
            let flags = if at + length == end { FLAG_LAST } else { 0 };
            let number = |value: usize| u32::try_from(value).unwrap_or(u32::MAX);
            let part = Transfer { offset: number(at), length: number(length), ..transfer };
            let data = source.slice(at..at + length);
            let (kind, body) = (PduType::H2cData, part.encode());
            self.outbox.pdu(wire.id, wire.framing, kind, flags, &body, Data::Parts(&[&data]));
            at += length;
        }
        Ok(())
    }

    /// A block request has ended.
    pub(super) fn on_block_end(&mut self, entry: Entry, completion: Completion) -> Result<(), End> {
        let Work::Block(block) = entry.work else { return Ok(()) };
        let mut status = completion.status.to_block();
        let mut incomplete = false;
        let mut data = None;
        if block.read && status == Status::Ok {
            match entry.buffer {
                Some(buffer) if entry.received == entry.bytes_max => {
                    data = Some(buffer.freeze().payload(entry.received));
                }
                Some(_) | None => {
                    incomplete = true;
                    status = Status::IoError;
                }
            }
        }
        let reply = BlockReply { id: block.id, status, data };
        self.outbox.push(Output::BlockReply(reply));
        if incomplete || completion.status.code() == StatusCode::TRANSIENT_TRANSPORT.code() {
            return Err(DownReason::Protocol("data of a command is incomplete").into());
        }
        Ok(())
    }
}
