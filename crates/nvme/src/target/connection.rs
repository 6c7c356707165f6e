//! One connection of a target: its phase, its commands, and what its data is for.

use core::net::IpAddr;
use std::collections::VecDeque;

use base::checksum::crc32c;
use base::{BlockCount, Buffer, BufferMut, Epoch, Instant, Lba, ReplicaKey, Seq, VolumeId};

use super::Output;
use crate::codec::command::{Command, Completion};
use crate::codec::pdu::{FLAG_LAST, FLAG_SUCCESS, PduType, Transfer, encode_terminate};
use crate::codec::replica;
use crate::codec::status::StatusCode;
use crate::io::{ConnectionId, SessionId};
use crate::link::{Link, Role, Violation};
use crate::outbox::{Data, Framing, Outbox};

/// How far a connection has got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Nothing has come yet.
    Initialize,
    /// ICReq and ICResp are exchanged.
    Connect,
    /// The admin queue of a session.
    Admin(SessionId),
    /// The I/O queue of a session with the replica subsystem.
    Replica(SessionId),
    /// An I/O queue of a session with a volume subsystem.
    Volume(SessionId, VolumeId),
    /// The shell has been told to close it.
    Closing,
}

impl Phase {
    pub(super) fn session(self) -> Option<SessionId> {
        match self {
            Self::Initialize | Self::Connect | Self::Closing => None,
            Self::Admin(session) | Self::Replica(session) | Self::Volume(session, _) => {
                Some(session)
            }
        }
    }
}

/// What the data of the accepted PDU is for.
pub(super) enum Expect {
    /// Nothing.
    Nothing,
    /// An admin or fabrics command.
    Admin(Command),
    /// A record.
    Append { slot: u16, append: Append },
    /// Data of a write or of a list of ranges.
    Block { slot: u16, bytes: usize },
}

/// An Append whose record is on its way.
#[derive(Clone, Copy)]
pub(super) struct Append {
    pub(super) key: Option<ReplicaKey>,
    pub(super) epoch: Epoch,
    pub(super) commit: Seq,
    pub(super) lba: Lba,
    pub(super) seq: Seq,
    pub(super) media: bool,
}

/// Which answer a replica command gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    Sealed,
    Appended,
    Data {
        blocks: BlockCount,
        bytes: usize,
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

/// What a command is doing.
pub(super) enum Work {
    /// Its record is on its way.
    Receiving,
    /// With the replica.
    Replica(Answer),
    /// A read is with the head.
    Read { bytes: usize },
    /// A write, flush or write-zeroes is with the head.
    Block,
    /// Waiting for data of a write.
    Write(Write),
    /// A Dataset Management: one range after the other is with the head.
    Ranges(Ranges),
}

/// A write that waits for its data.
pub(super) struct Write {
    /// `None` while a part of the data is on its way.
    pub(super) buffer: Option<BufferMut>,
    pub(super) lba: Lba,
    pub(super) blocks: u32,
    pub(super) bytes: usize,
    pub(super) received: usize,
    pub(super) fua: bool,
    /// In-capsule data needs no R2T.
    pub(super) transfer: bool,
    /// `blocks` is the number of ranges of a Dataset Management.
    pub(super) ranges: bool,
    /// A data digest was wrong.
    pub(super) damaged: bool,
}

/// The ranges of a Dataset Management command that are still to be discarded.
pub(super) struct Ranges {
    pub(super) list: Buffer,
    pub(super) count: usize,
    pub(super) next: usize,
    /// Blocks of range `next` that are done.
    pub(super) done: u32,
}

pub(super) struct Slot {
    pub(super) generation: u32,
    pub(super) id: u16,
    pub(super) work: Option<Work>,
}

/// The outstanding commands of an I/O queue.
#[derive(Default)]
pub(super) struct Commands {
    slots: Vec<Slot>,
    free: Vec<u16>,
    /// A bit for each command id in use.
    ids: Vec<u64>,
}

impl Commands {
    /// Room for `entries` commands.
    pub(super) fn new(entries: u16) -> Self {
        Self {
            slots: (0..entries).map(|_| Slot { generation: 0, id: 0, work: None }).collect(),
            free: (0..entries).rev().collect(),
            ids: vec![0; 1024],
        }
    }

    pub(super) fn is_full(&self) -> bool {
        self.free.is_empty()
    }

    pub(super) fn is_id_used(&self, id: u16) -> bool {
        self.ids.get(usize::from(id / 64)).is_some_and(|word| word & (1 << (id % 64)) != 0)
    }

    /// Takes a slot. There must be one, and `id` must not be in use.
    pub(super) fn insert(&mut self, id: u16, generation: u32, work: Work) -> u16 {
        let slot = self.free.pop().expect("the caller has seen that there is a free slot");
        self.ids[usize::from(id / 64)] |= 1 << (id % 64);
        self.slots[usize::from(slot)] = Slot { generation, id, work: Some(work) };
        slot
    }

    pub(super) fn slot(&mut self, slot: u16) -> Option<&mut Slot> {
        self.slots.get_mut(usize::from(slot)).filter(|slot| slot.work.is_some())
    }

    /// Frees a slot; gives the command id.
    pub(super) fn remove(&mut self, slot: u16) -> u16 {
        let entry = &mut self.slots[usize::from(slot)];
        assert!(entry.work.take().is_some(), "only a used slot is freed");
        let id = entry.id;
        self.ids[usize::from(id / 64)] &= !(1 << (id % 64));
        self.free.push(slot);
        id
    }
}

/// One connection.
pub(super) struct Connection {
    pub(super) id: ConnectionId,
    pub(super) index: u16,
    /// Whose it is, as far as limits go.
    pub(super) peer: Option<IpAddr>,
    pub(super) link: Link,
    pub(super) framing: Framing,
    pub(super) phase: Phase,
    pub(super) expect: Expect,
    pub(super) commands: Commands,
    /// Queue entries; 0 before Connect.
    pub(super) entries: u16,
    /// QID.
    pub(super) queue_id: u16,
    /// SQHD.
    pub(super) head: u16,
    pub(super) no_flow_control: bool,
    /// Bytes given to the shell and not yet sent.
    pub(super) unsent: usize,
    /// Something waits for a buffer, a slot, or for the peer to read.
    pub(super) stalled: bool,
    /// Writes that wait for a buffer before their data is asked for, oldest first.
    pub(super) waiting: VecDeque<u16>,
    pub(super) accepted: Instant,
}

impl Connection {
    pub(super) fn new(id: ConnectionId, index: u16, peer: Option<IpAddr>, now: Instant) -> Self {
        Self {
            id,
            index,
            peer,
            link: Link::new(Role::Controller),
            framing: Framing::default(),
            phase: Phase::Initialize,
            expect: Expect::Nothing,
            commands: Commands::default(),
            entries: 0,
            queue_id: 0,
            head: 0,
            no_flow_control: false,
            unsent: 0,
            stalled: false,
            waiting: VecDeque::new(),
            accepted: now,
        }
    }

    /// Gives up everything but the id: the shell has been told to close.
    pub(super) fn close(&mut self) {
        self.phase = Phase::Closing;
        self.link = Link::new(Role::Controller);
        self.commands = Commands::default();
        self.expect = Expect::Nothing;
        self.stalled = false;
        self.waiting.clear();
    }

    /// The next queue head, after a command was taken.
    pub(super) fn advance_head(&mut self) {
        self.head = if self.head + 1 >= self.entries { 0 } else { self.head + 1 };
    }

    pub(super) fn pdu(
        &mut self,
        outbox: &mut Outbox<Output>,
        kind: PduType,
        flags: u8,
        body: &[u8],
        data: Data<'_>,
    ) {
        self.unsent += outbox.pdu(self.id, self.framing, kind, flags, body, data);
    }

    /// Completes command `id`.
    pub(super) fn complete(
        &mut self,
        outbox: &mut Outbox<Output>,
        id: u16,
        status: StatusCode,
        result: u64,
    ) {
        let queue_head = if self.no_flow_control { 0xffff } else { self.head };
        let completion = Completion { result, queue_head, id, status };
        self.pdu(outbox, PduType::CapsuleResp, 0, &completion.encode(), Data::None);
    }

    /// Sends part of command `id`'s data.
    pub(super) fn send_data(
        &mut self,
        outbox: &mut Outbox<Output>,
        id: u16,
        offset: usize,
        flags: u8,
        data: Data<'_>,
        length: usize,
    ) {
        let number = |bytes: usize| u32::try_from(bytes).expect("transfers are bounded by limits");
        let transfer = Transfer {
            command_id: id,
            transfer_tag: 0,
            offset: number(offset),
            length: number(length),
        };
        self.pdu(outbox, PduType::C2hData, flags, &transfer.encode(), data);
    }

    /// Sends all of command `id`'s data and completes it.
    pub(super) fn complete_with_data(
        &mut self,
        outbox: &mut Outbox<Output>,
        id: u16,
        data: &Buffer,
    ) {
        self.complete_with_parts(outbox, id, &[data]);
    }

    /// Sends each part in a PDU of its own and completes the command.
    pub(super) fn complete_with_parts(
        &mut self,
        outbox: &mut Outbox<Output>,
        id: u16,
        parts: &[&Buffer],
    ) {
        let mut offset = 0;
        let used = parts.iter().filter(|part| !part.is_empty()).count();
        for (index, part) in parts.iter().filter(|part| !part.is_empty()).enumerate() {
            let flags = self.data_flags(index + 1 == used);
            self.send_data(outbox, id, offset, flags, Data::Parts(&[part]), part.len());
            offset += part.len();
        }
        if used == 0 || !self.no_flow_control {
            self.complete(outbox, id, StatusCode::SUCCESS, 0);
        }
    }

    /// Sends a few bytes, and completes the command with `status` and their checksum: the one thing
    /// that vouches for them where data digests are off.
    pub(super) fn complete_with_bytes(
        &mut self,
        outbox: &mut Outbox<Output>,
        id: u16,
        status: StatusCode,
        bytes: &[u8],
    ) {
        self.send_data(outbox, id, 0, FLAG_LAST, Data::Inline(bytes), bytes.len());
        self.complete(outbox, id, status, replica::data_result(crc32c(bytes)));
    }

    /// A completion can be left out only if it would say nothing: no queue head.
    fn data_flags(&self, last: bool) -> u8 {
        match (last, self.no_flow_control) {
            (false, _) => 0,
            (true, false) => FLAG_LAST,
            (true, true) => FLAG_LAST | FLAG_SUCCESS,
        }
    }

    /// Tells the peer why the connection is about to be closed.
    pub(super) fn terminate(&mut self, outbox: &mut Outbox<Output>, violation: &Violation) {
        let body = encode_terminate(violation.error, violation.information);
        let data = Data::Inline(&violation.header);
        self.pdu(outbox, PduType::C2hTermReq, 0, &body, data);
    }
}

/// The Command Capsule's command.
pub(super) fn command_of(header: &[u8]) -> Command {
    Command::decode(header[8..72].first_chunk().expect("64 bytes were sliced"))
}
