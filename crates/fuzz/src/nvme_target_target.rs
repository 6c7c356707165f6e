//! A raw host against the NVMe/TCP target: commands of all kinds with fields from the input,
//! answers of the layers above, and bytes that are no PDU.

use base::{
    BlockReply, Buffer, CommandBody, FillPhase, FillProgress, Health, ReplicaError, ReplicaState,
    ReplyBody, Seq, Status,
};
use nvme::codec::command::{Command, Sgl};
use nvme::target::{Input, Output};

use crate::bytes::Bytes;
use crate::raw::{Raw, capsule, h2c, pdu};

const STEPS_MAX: usize = 120;

/// No panic; nothing sent after a close; all buffers and sessions gone in the end.
pub fn nvme_target(data: &[u8]) {
    let mut bytes = Bytes(data);
    let mut raw = Raw::new();
    match bytes.below(4) {
        0 => raw.accept(0),
        1 => raw.initialize(0, bytes.one_in(2)),
        2 => raw.volume_session(),
        _ => raw.replica_session(),
    }
    for _ in 0..STEPS_MAX {
        if bytes.is_empty() {
            break;
        }
        let connection = usize::from(!bytes.one_in(4));
        match bytes.below(8) {
            0 => {
                let count = usize::from(bytes.below(64));
                let noise = bytes.take(count).to_vec();
                raw.send(connection, &noise);
            }
            1 => {
                let kind = bytes.below(10);
                let (flags, header, offset) = (bytes.u8(), bytes.u8(), bytes.u8());
                let count = usize::from(bytes.u8());
                let body = bytes.take(count).to_vec();
                raw.send(connection, &pdu(kind, flags, header, offset, &body, &[]));
            }
            2 => {
                let length = u32::from(bytes.u16());
                let data = vec![bytes.u8(); length as usize % 9000];
                let (id, tag, offset) = (bytes.u16(), bytes.u16() % 4, u32::from(bytes.u16()));
                raw.send(connection, &h2c(id, tag, offset, length, bytes.below(8), &data));
            }
            3 => answer(&mut bytes, &mut raw),
            4 => {
                let pass = u64::from(bytes.u8()) * 50_000_000;
                raw.now = base::Instant::from_nanos(raw.now.nanos() + pass);
                raw.input(Input::Tick);
            }
            _ => {
                let (command, data) = command(&mut bytes);
                let mut whole = capsule(&command, &data);
                if bytes.one_in(16) {
                    let at = usize::from(bytes.u16()) % whole.len();
                    whole[at] ^= 1 << bytes.below(8);
                }
                raw.send(connection, &whole);
            }
        }
        while raw.pdu(0).is_some() || raw.pdu(1).is_some() {}
    }
    raw.finish("fuzz");
}

/// A command with an opcode that exists, mostly, and fields that are near valid ones.
fn command(bytes: &mut Bytes<'_>) -> (Command, Vec<u8>) {
    const OPCODES: [u8; 28] = [
        0x00, 0x01, 0x02, 0x04, 0x05, 0x06, 0x08, 0x09, 0x0a, 0x0c, 0x18, 0x7f, 0xc2, 0xc7, 0xca,
        0xce, 0xd2, 0xd6, 0xda, 0xde, 0xe2, 0xe6, 0xea, 0xee, 0xf2, 0xf6, 0xfe, 0xff,
    ];
    let opcode = OPCODES[usize::from(bytes.u8()) % OPCODES.len()];
    let nsid = match bytes.below(4) {
        0 => bytes.u32(),
        _ => 1,
    };
    let mut command = Command::new(opcode, nsid);
    command.id = u16::from(bytes.u8());
    command.cdw2 = u64::from(bytes.below(4));
    command.metadata = u64::from(bytes.u8());
    for word in &mut command.cdw10 {
        *word = match bytes.below(4) {
            0 => bytes.u32(),
            1 => u32::from(bytes.u16()),
            _ => u32::from(bytes.below(8)),
        };
    }
    let mut data = Vec::new();
    command.sgl = match bytes.below(4) {
        0 => Sgl::Transport { length: bytes.u32() },
        1 => {
            let length = u32::from(bytes.u16());
            data = vec![bytes.u8(); length as usize];
            let offset = if bytes.one_in(8) { u64::from(bytes.u8()) } else { 0 };
            Sgl::InCapsule { offset, length }
        }
        2 => Sgl::Transport { length: 132_176 },
        _ => Sgl::Transport { length: u32::from(bytes.below(64)) * 512 },
    };
    (command, data)
}

/// The layers above answer one of what they were asked.
fn answer(bytes: &mut Bytes<'_>, raw: &mut Raw) {
    if raw.events.is_empty() {
        return;
    }
    let at = usize::from(bytes.u8()) % raw.events.len();
    match raw.events.swap_remove(at) {
        Output::Replica { session, tag, command } => {
            let result = replica_answer(bytes, command.body);
            raw.input(Input::ReplicaReply { session, tag, result });
        }
        Output::Block { session, volume: _, request } => {
            let (id, status) = (request.id, Status::Ok);
            let data = match request.operation {
                base::Operation::Read { buffer } => {
                    let length = usize::try_from(request.blocks.0).unwrap_or(0) * 4096;
                    Some(buffer.freeze().payload(length))
                }
                base::Operation::Write { .. }
                | base::Operation::Flush
                | base::Operation::Discard
                | base::Operation::WriteZeroes { .. } => None,
            };
            let failed = bytes.one_in(4);
            let reply = if failed {
                BlockReply { id, status: Status::IoError, data: None }
            } else {
                BlockReply { id, status, data }
            };
            raw.input(Input::BlockReply { session, reply });
        }
        _ => {}
    }
}

fn replica_answer(bytes: &mut Bytes<'_>, body: CommandBody) -> Result<ReplyBody, ReplicaError> {
    if bytes.one_in(3) {
        let last = base::Position::new(base::Epoch(1), Seq(u64::from(bytes.u8())));
        let errors = [
            ReplicaError::Damaged,
            ReplicaError::Behind { last },
            ReplicaError::OutOfOrder { last },
        ];
        return Err(errors[usize::from(bytes.below(3))]);
    }
    let durable = Seq(u64::from(bytes.u8()));
    let whole = |buffer: base::BufferMut, length: usize| -> Buffer {
        let length = length.min(buffer.capacity());
        buffer.freeze().payload(length)
    };
    Ok(match body {
        CommandBody::Seal => ReplyBody::Sealed(ReplicaState::default()),
        CommandBody::Append { .. } => ReplyBody::Appended { durable },
        CommandBody::Read { blocks, buffer, .. } => {
            let length = usize::try_from(blocks.0).unwrap_or(0) * 512;
            ReplyBody::Data(whole(buffer, length))
        }
        CommandBody::Flush => ReplyBody::Flushed { durable },
        CommandBody::Scan { .. } => return Err(ReplicaError::Trimmed { trimmed: durable }),
        CommandBody::Truncate { .. } => {
            ReplyBody::Truncated { last: base::Position::new(base::Epoch(1), durable) }
        }
        CommandBody::Grow { .. }
        | CommandBody::Trim
        | CommandBody::Release
        | CommandBody::Renew
        | CommandBody::Hello { .. }
        | CommandBody::Fetch { .. } => ReplyBody::Done,
        CommandBody::HealthOf { .. } => ReplyBody::Health(Health::Silent),
        CommandBody::Install { .. } => ReplyBody::Filling(FillProgress {
            phase: FillPhase::Log,
            copied_bytes: 1,
            total_bytes: 2,
            log_end: base::Seq(3),
        }),
        CommandBody::List { buffer, .. } => ReplyBody::Chunks(whole(buffer, 32)),
        CommandBody::ScanRun { buffer, .. } => ReplyBody::Records(whole(buffer, 4000)),
    })
}
