//! The I/O queue of an initiator: which commands are outstanding, and their data.

use base::{BlockCount, Buffer, BufferMut, Epoch, ReplicaError, ReplicaKey, RequestId};

use super::wire::Wire;
use super::{BlockReply, DownReason, End, Initiator, Output};
use crate::codec::command::Completion;
use crate::codec::pdu::{FLAG_LAST, FLAG_SUCCESS, FatalError, PduType, Transfer};
use crate::codec::replica::POSITION_BYTES;
use crate::codec::status::StatusCode;
use crate::io::Tag;
use crate::link::{Arrived, Pdu, SMALL_DATA_BYTES, Sink, Violation};
use crate::outbox::Outbox;

/// Slots are the low bits of a command id; the others tell uses of a slot apart.
const SLOT_BITS: u32 = 10;
const SLOT_MASK: u16 = (1 << SLOT_BITS) - 1;

/// Which answer a replica command gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    Sealed,
    Appended,
    Data {
        blocks: BlockCount,
    },
    Flushed,
    Record,
    /// A record, or nothing.
    Run,
    Truncated,
    Progress,
    Health,
    Chunks,
    Records,
    Done,
}

/// An outstanding replica command.
pub(super) struct Replica {
    pub(super) tag: Tag,
    pub(super) key: ReplicaKey,
    pub(super) epoch: Epoch,
    pub(super) answer: Answer,
}

/// An outstanding block request.
pub(super) struct Block {
    pub(super) id: RequestId,
    /// Data of a write that the peer asks for with R2T.
    pub(super) source: Option<Buffer>,
    /// Bytes of it that were asked for so far.
    pub(super) sent: usize,
    /// Answer with data.
    pub(super) read: bool,
}

pub(super) enum Work {
    Replica(Replica),
    Block(Block),
}

/// An outstanding command.
pub(super) struct Entry {
    pub(super) work: Work,
    /// Where data of the answer goes; elsewhere while it is on its way.
    pub(super) buffer: Option<BufferMut>,
    /// Bytes of data that the answer may have.
    pub(super) bytes_max: usize,
    /// Bytes of it that have come, or are on their way.
    pub(super) received: usize,
    /// Of these, the first go to the header page (the header of a record).
    pub(super) header_bytes: usize,
    /// A short answer or the detail of an error.
    pub(super) small: [u8; SMALL_DATA_BYTES],
    pub(super) small_bytes: usize,
}

struct Slot {
    generation: u16,
    entry: Option<Entry>,
}

/// See the module.
pub(super) struct Queue {
    slots: Vec<Slot>,
    free: Vec<u16>,
    /// The slot whose data is on its way.
    receiving: Option<u16>,
    completion: Option<Completion>,
}

impl Queue {
    pub(super) fn new(entries: u16) -> Self {
        let slot = |_| Slot { generation: 0, entry: None };
        Self {
            slots: (0..entries).map(slot).collect(),
            free: (0..entries).rev().collect(),
            receiving: None,
            completion: None,
        }
    }

    /// Another number of slots, while none is in use.
    pub(super) fn resize(&mut self, entries: u16) {
        assert_eq!(self.used(), 0, "a queue is resized before it is used");
        if self.slots.len() != usize::from(entries) {
            *self = Self::new(entries);
        }
    }

    pub(super) fn used(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    pub(super) fn is_full(&self) -> bool {
        self.free.is_empty()
    }

    /// Takes a slot, of which there must be one; gives the command id.
    pub(super) fn insert(&mut self, entry: Entry) -> u16 {
        let index = self.free.pop().expect("the caller has seen that there is a free slot");
        let slot = &mut self.slots[usize::from(index)];
        slot.generation = slot.generation.wrapping_add(1);
        slot.entry = Some(entry);
        index | (slot.generation << SLOT_BITS)
    }

    /// The outstanding command with this id.
    pub(super) fn entry(&mut self, id: u16) -> Option<&mut Entry> {
        let slot = self.slots.get_mut(usize::from(id & SLOT_MASK))?;
        let current = slot.generation << SLOT_BITS == id & !SLOT_MASK;
        slot.entry.as_mut().filter(|_| current)
    }

    fn remove(&mut self, id: u16) -> Option<Entry> {
        self.entry(id)?;
        let index = id & SLOT_MASK;
        let entry = self.slots[usize::from(index)].entry.take();
        self.free.push(index);
        entry
    }

    /// Data has come.
    pub(super) fn on_data(&mut self, arrived: Arrived) {
        let Some(id) = self.receiving.take() else { return };
        let Some(entry) = self.entry(id) else { return };
        match arrived {
            Arrived::Buffer(buffer) => entry.buffer = Some(buffer),
            Arrived::Small(bytes, length) => {
                entry.small = bytes;
                entry.small_bytes = length;
            }
            Arrived::Discarded => {}
        }
    }

    /// Answers everything with "disconnected".
    pub(super) fn abandon(&mut self, outbox: &mut Outbox<Output>) {
        self.receiving = None;
        self.completion = None;
        for index in 0..self.slots.len() {
            let Some(entry) = self.slots[index].entry.take() else { continue };
            self.free.push(u16::try_from(index).unwrap_or(u16::MAX));
            match entry.work {
                Work::Replica(replica) => outbox.push(Output::Reply {
                    tag: replica.tag,
                    result: Err(ReplicaError::Disconnected),
                }),
                Work::Block(block) => {
                    let status = base::Status::IoError;
                    let reply = BlockReply { id: block.id, status, data: None };
                    outbox.push(Output::BlockReply(reply));
                }
            }
        }
    }
}

impl Entry {
    pub(super) fn new(work: Work) -> Self {
        Self {
            work,
            buffer: None,
            bytes_max: 0,
            received: 0,
            header_bytes: 0,
            small: [0; SMALL_DATA_BYTES],
            small_bytes: 0,
        }
    }

    /// Where the data of a C2HData PDU goes; `None` if it was not asked for.
    fn place(&mut self, transfer: Transfer, length: usize) -> Option<Sink> {
        if length == 0 || transfer.length as usize != length {
            return None;
        }
        let answer = match &self.work {
            Work::Replica(replica) => Some(replica.answer),
            Work::Block(_) => None,
        };
        let small = match answer {
            Some(Answer::Sealed | Answer::Progress) => length <= SMALL_DATA_BYTES,
            Some(_) => length == POSITION_BYTES,
            None => false,
        };
        if small {
            return (transfer.offset == 0 && self.received == 0).then_some(Sink::Small);
        }
        if transfer.offset as usize != self.received {
            return None;
        }
        let end = self.received + length;
        if let Some(Answer::Record | Answer::Run) = answer {
            return self.place_record(length);
        }
        if end > self.bytes_max {
            return None;
        }
        let buffer = self.buffer.take()?;
        let payload = self.received..end;
        self.received = end;
        Some(Sink::Buffer { buffer, header: 0..0, payload })
    }

    /// The first PDU of a Scan's answer is the record's header, all of it.
    fn place_record(&mut self, length: usize) -> Option<Sink> {
        if self.received == 0 {
            let fits = (base::record::FIXED_BYTES..=base::limits::RECORD_HEADER_BYTES_MAX)
                .contains(&length);
            let buffer = self.buffer.take_if(|_| fits)?;
            self.received = length;
            self.header_bytes = length;
            return Some(Sink::Buffer { buffer, header: 0..length, payload: 0..0 });
        }
        let start = self.received - self.header_bytes;
        let fits = start + length <= self.bytes_max;
        let buffer = self.buffer.take_if(|_| fits)?;
        self.received += length;
        Some(Sink::Buffer { buffer, header: 0..0, payload: start..start + length })
    }
}

impl Initiator {
    pub(super) fn on_io_pdu(&mut self, wire: &mut Wire, pdu: &Pdu) -> Result<Option<Sink>, End> {
        match pdu.kind {
            PduType::C2hTermReq => {
                Err(DownReason::Protocol("the peer terminated the connection").into())
            }
            PduType::IcResp if !wire.initialized => {
                wire.on_initialized(&pdu.header).map_err(DownReason::Unsupported)?;
                self.connect_io(wire);
                Ok(Some(Sink::Discard))
            }
            PduType::CapsuleResp if wire.initialized => {
                self.queue.completion = Some(Completion::decode(&pdu.header[8..24]));
                Ok(Some(Sink::Discard))
            }
            PduType::C2hData if self.is_up() => {
                let transfer = Transfer::decode(&pdu.header);
                let id = transfer.command_id;
                let entry = self.queue.entry(id);
                let sink = entry.and_then(|entry| entry.place(transfer, pdu.data_bytes));
                let Some(sink) = sink else {
                    let violation = Violation::of(pdu, FatalError::DataOutOfRange, 12);
                    return Err(End::Violation(violation, "data that was not asked for"));
                };
                self.queue.receiving = Some(id);
                if pdu.flags & (FLAG_LAST | FLAG_SUCCESS) == FLAG_LAST | FLAG_SUCCESS {
                    let status = StatusCode::SUCCESS;
                    let completion = Completion { result: 0, queue_head: 0, id, status };
                    self.queue.completion = Some(completion);
                }
                Ok(Some(sink))
            }
            PduType::R2t if self.is_up() => {
                self.on_ready_to_transfer(wire, pdu)?;
                Ok(Some(Sink::Discard))
            }
            PduType::IcReq
            | PduType::IcResp
            | PduType::H2cTermReq
            | PduType::CapsuleCmd
            | PduType::CapsuleResp
            | PduType::H2cData
            | PduType::C2hData
            | PduType::R2t => {
                let violation = Violation::of(pdu, FatalError::Sequence, 0);
                Err(End::Violation(violation, "a PDU came out of sequence"))
            }
        }
    }

    /// A PDU of the I/O connection has been taken in, with its data.
    pub(super) fn on_io_end(&mut self) -> Result<(), End> {
        let Some(completion) = self.queue.completion.take() else { return Ok(()) };
        if !self.is_up() {
            return self.on_io_connected(completion);
        }
        let Some(entry) = self.queue.remove(completion.id) else {
            return Err(DownReason::Protocol("a completion of an unknown command").into());
        };
        match entry.work {
            Work::Replica(_) => self.on_replica_end(entry, completion),
            Work::Block(_) => self.on_block_end(entry, completion),
        }
    }
}
