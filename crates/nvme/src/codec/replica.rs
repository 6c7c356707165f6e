//! The vendor-specific replica commands. The tables are in `docs/protocol.md`.
//!
//! The namespace id is a handle: the initiator chooses it and `Seal` binds it, for the session,
//! to the volume and shard that the command names; a later `Seal` may bind it anew. All other
//! commands name the replica by handle, so that epoch, commit, seq, address and length fit into
//! the 64 bytes beside it. Commands of a connection are taken in order, so `Seal` and what
//! follows it may be sent without a pause.

use base::{
    BlockCount, BlockSize, CommandBody, Epoch, Lba, Position, ReplicaCommand, ReplicaError,
    ReplicaKey, ReplicaState, Seq, ShardIndex, VolumeId,
};

use super::command::{Command, Sgl};
use super::status::StatusCode;
use super::{put, take, u32_at, u64_at};

/// Handles are 1 to this.
pub const HANDLES_MAX: u32 = 4096;
/// Bytes of Seal's answer.
pub const STATE_BYTES: usize = 48;
/// Bytes of a position: answer of Truncate, detail of some errors.
pub const POSITION_BYTES: usize = 16;

/// Opcodes. Bits 1:0 state the direction of data: 10b from the controller, 11b both ways.
pub mod opcode {
    /// Seal.
    pub const SEAL: u8 = 0xc2;
    /// Append.
    pub const APPEND: u8 = 0xc7;
    /// Read.
    pub const READ: u8 = 0xca;
    /// Flush.
    pub const FLUSH: u8 = 0xce;
    /// Scan.
    pub const SCAN: u8 = 0xd2;
    /// Truncate.
    pub const TRUNCATE: u8 = 0xd6;
    /// Trim.
    pub const TRIM: u8 = 0xda;
    /// Release.
    pub const RELEASE: u8 = 0xde;
}

const FLAG_MEDIA: u32 = 1;

/// The 64 bytes of `command` for `handle`, without command id; data of Append in-capsule.
pub fn encode(command: &ReplicaCommand, handle: u32) -> Command {
    let mut out = Command::new(0, handle);
    out.cdw2 = command.epoch.0;
    out.metadata = command.commit.0;
    let answer = |length: usize| Sgl::Transport { length: u32::try_from(length).unwrap_or(0) };
    out.sgl = answer(POSITION_BYTES);
    match &command.body {
        CommandBody::Seal => {
            out.opcode = opcode::SEAL;
            out.sgl = answer(STATE_BYTES);
            let volume = command.key.volume.bytes();
            for (index, word) in out.cdw10[..4].iter_mut().enumerate() {
                *word = u32_at(&volume, 4 * index);
            }
            out.cdw10[4] = command.key.shard.0;
            out
        }
        CommandBody::Append { record, media } => {
            out.opcode = opcode::APPEND;
            let payload_bytes = record.payload().len();
            let length = record.header_bytes().len() + payload_bytes;
            out.sgl = Sgl::InCapsule { offset: 0, length: u32::try_from(length).unwrap_or(0) };
            out = out.with_wide(0, record.header().lba.0);
            out = out.with_wide(1, record.header().position.seq.0);
            out.cdw10[4] = u32::try_from(payload_bytes).unwrap_or(0);
            out.cdw10[5] = if *media { FLAG_MEDIA } else { 0 };
            out
        }
        CommandBody::Read { lba, blocks, covers, buffer } => {
            out.opcode = opcode::READ;
            out.sgl = answer(read_bytes_max(*blocks, buffer.capacity()));
            out = out.with_wide(0, lba.0).with_wide(1, covers.0);
            out.cdw10[4] = blocks.0;
            out
        }
        CommandBody::Flush => {
            out.opcode = opcode::FLUSH;
            out
        }
        CommandBody::Scan { seq, buffer: _ } => {
            out.opcode = opcode::SCAN;
            out.sgl = answer(base::limits::HEADER_BYTES + base::limits::PAYLOAD_BYTES_MAX);
            out.with_wide(1, seq.0)
        }
        CommandBody::Truncate { keep } => {
            out.opcode = opcode::TRUNCATE;
            out.with_wide(1, keep.0)
        }
        CommandBody::Trim => {
            out.opcode = opcode::TRIM;
            out
        }
        CommandBody::Release => {
            out.opcode = opcode::RELEASE;
            out
        }
        CommandBody::Renew
        | CommandBody::Hello { .. }
        | CommandBody::HealthOf { .. }
        | CommandBody::Install { .. }
        | CommandBody::List { .. }
        | CommandBody::Fetch { .. } => out,
    }
}

/// Room for the answer of a Read of `blocks` blocks, of whatever size, into a buffer with
/// `capacity`.
pub fn read_bytes_max(blocks: BlockCount, capacity: usize) -> usize {
    usize::try_from(blocks.bytes(BlockSize::B4096)).unwrap_or(usize::MAX).min(capacity)
}

/// True if `bytes` is the length of `blocks` blocks of one of our sizes.
pub fn is_read_length(blocks: BlockCount, bytes: usize) -> bool {
    let bytes = bytes as u64;
    bytes == blocks.bytes(BlockSize::B512) || bytes == blocks.bytes(BlockSize::B4096)
}

/// DW0 and DW1 of a successful Read: CRC32C of the data, and a bit that says so. Read data is
/// not a record, which would carry its own checksums.
pub fn read_result(crc: u32) -> u64 {
    u64::from(crc) | (1 << 32)
}

/// What a replica command asks for, as it arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Seal, and bind the handle.
    Seal {
        /// What the handle means from now on.
        key: ReplicaKey,
    },
    /// Append.
    Append {
        /// First block, as in the record.
        lba: Lba,
        /// As in the record.
        seq: Seq,
        /// Bytes of the record's header, the first part of the data.
        header_bytes: usize,
        /// Bytes of the payload, the rest of the data.
        payload_bytes: usize,
        /// Answer when on media.
        media: bool,
    },
    /// Read.
    Read {
        /// First block.
        lba: Lba,
        /// Blocks.
        blocks: BlockCount,
        /// The replica must hold this.
        covers: Seq,
        /// Bytes that the initiator has room for, at least those of the answer.
        bytes: usize,
    },
    /// Flush.
    Flush,
    /// Scan.
    Scan {
        /// Which record.
        seq: Seq,
    },
    /// Truncate.
    Truncate {
        /// The last to keep.
        keep: Seq,
    },
    /// Trim.
    Trim,
    /// Release.
    Release,
}

/// Decodes and checks a replica command (its epoch, commit and handle are `cdw2`, `metadata`
/// and `nsid`).
pub fn decode(command: &Command) -> Result<Request, StatusCode> {
    let length = usize::try_from(command.sgl.length()).unwrap_or(usize::MAX);
    let request = match command.opcode {
        opcode::SEAL => {
            let mut volume = [0; 16];
            for (index, word) in command.cdw10[..4].iter().enumerate() {
                put(&mut volume, 4 * index, &word.to_le_bytes());
            }
            let shard = ShardIndex(command.cdw10[4]);
            Request::Seal { key: ReplicaKey { volume: VolumeId::from_bytes(volume), shard } }
        }
        opcode::APPEND => return decode_append(command, length),
        opcode::READ => {
            let blocks = BlockCount(command.cdw10[4]);
            let blocks_max = length / 512;
            if blocks.0 == 0
                || length > base::limits::PAYLOAD_BYTES_MAX
                || usize::try_from(blocks.0).is_ok_and(|blocks| blocks > blocks_max)
            {
                return Err(StatusCode::SGL_LENGTH_INVALID);
            }
            let covers = Seq(command.wide(1));
            Request::Read { lba: Lba(command.wide(0)), blocks, covers, bytes: length }
        }
        opcode::FLUSH => Request::Flush,
        opcode::SCAN => Request::Scan { seq: Seq(command.wide(1)) },
        opcode::TRUNCATE => Request::Truncate { keep: Seq(command.wide(1)) },
        opcode::TRIM => Request::Trim,
        opcode::RELEASE => Request::Release,
        _ => return Err(StatusCode::INVALID_OPCODE),
    };
    let needed = match request {
        Request::Seal { .. } => STATE_BYTES,
        Request::Append { .. } | Request::Read { .. } => 0,
        Request::Scan { .. } => base::limits::HEADER_BYTES + base::limits::PAYLOAD_BYTES_MAX,
        Request::Flush | Request::Truncate { .. } | Request::Trim | Request::Release => {
            POSITION_BYTES
        }
    };
    match command.sgl {
        Sgl::Transport { .. } if length >= needed => Ok(request),
        Sgl::Transport { .. } => Err(StatusCode::SGL_LENGTH_INVALID),
        Sgl::InCapsule { .. } | Sgl::Other => Err(StatusCode::SGL_TYPE_INVALID),
    }
}

fn decode_append(command: &Command, length: usize) -> Result<Request, StatusCode> {
    match command.sgl {
        Sgl::InCapsule { offset: 0, .. } => {}
        Sgl::InCapsule { .. } => return Err(StatusCode::SGL_OFFSET_INVALID),
        Sgl::Transport { .. } | Sgl::Other => return Err(StatusCode::SGL_TYPE_INVALID),
    }
    let payload_bytes = usize::try_from(command.cdw10[4]).unwrap_or(usize::MAX);
    let header_bytes = length.checked_sub(payload_bytes).ok_or(StatusCode::SGL_LENGTH_INVALID)?;
    if payload_bytes > base::limits::PAYLOAD_BYTES_MAX
        || !(base::record::FIXED_BYTES..=base::limits::RECORD_HEADER_BYTES_MAX)
            .contains(&header_bytes)
    {
        return Err(StatusCode::SGL_LENGTH_INVALID);
    }
    Ok(Request::Append {
        lba: Lba(command.wide(0)),
        seq: Seq(command.wide(1)),
        header_bytes,
        payload_bytes,
        media: command.cdw10[5] & FLAG_MEDIA != 0,
    })
}

/// The bytes of a position: epoch, seq.
pub fn encode_position(position: Position) -> [u8; POSITION_BYTES] {
    let mut out = [0; POSITION_BYTES];
    put(&mut out, 0, &position.epoch.0.to_le_bytes());
    put(&mut out, 8, &position.seq.0.to_le_bytes());
    out
}

/// The position in the first bytes of `bytes`.
pub fn decode_position(bytes: &[u8]) -> Position {
    Position::new(Epoch(u64_at(bytes, 0)), Seq(u64_at(bytes, 8)))
}

/// The bytes of Seal's answer.
pub fn encode_state(state: &ReplicaState) -> [u8; STATE_BYTES] {
    let mut out = [0; STATE_BYTES];
    put(&mut out, 0, &state.sealed.0.to_le_bytes());
    put(&mut out, 8, &encode_position(state.last));
    put(&mut out, 24, &state.durable.0.to_le_bytes());
    put(&mut out, 32, &state.commit.0.to_le_bytes());
    put(&mut out, 40, &state.trimmed.0.to_le_bytes());
    out
}

/// Seal's answer.
pub fn decode_state(bytes: &[u8]) -> ReplicaState {
    ReplicaState {
        sealed: Epoch(u64_at(bytes, 0)),
        last: decode_position(&take::<16>(bytes, 8)),
        durable: Seq(u64_at(bytes, 24)),
        commit: Seq(u64_at(bytes, 32)),
        trimmed: Seq(u64_at(bytes, 40)),
        filling: false,
        damaged: false,
    }
}

/// An error as it is sent: status, DW0 and DW1, and a position sent as data before the completion.
pub fn encode_error(error: ReplicaError) -> (StatusCode, u64, Option<Position>) {
    match error {
        ReplicaError::Superseded { sealed } => (StatusCode::vendor(0xc0, false), sealed.0, None),
        ReplicaError::NotSealed => (StatusCode::vendor(0xc1, false), 0, None),
        ReplicaError::NoReplica => (StatusCode::vendor(0xc2, false), 0, None),
        ReplicaError::OutOfOrder { last } => (StatusCode::vendor(0xc3, false), 0, Some(last)),
        ReplicaError::Behind { last } => (StatusCode::vendor(0xc4, true), 0, Some(last)),
        ReplicaError::Trimmed { trimmed } => (StatusCode::vendor(0xc5, false), trimmed.0, None),
        ReplicaError::Damaged => (StatusCode::vendor(0xc6, false), 0, None),
        ReplicaError::DeviceFailed => (StatusCode::vendor(0xc7, false), 0, None),
        ReplicaError::Invalid => (StatusCode::vendor(0xc8, false), 0, None),
        ReplicaError::Disconnected => (StatusCode::vendor(0xc9, true), 0, None),
        ReplicaError::Filling => (StatusCode::vendor(0xca, true), 0, None),
    }
}

/// The error that `status`, `result` and the position that came as data mean. What a replica
/// does not send (a generic status) means that the peer found the command invalid. `None` if a
/// position is missing.
pub fn decode_error(
    status: StatusCode,
    result: u64,
    position: Option<Position>,
) -> Option<ReplicaError> {
    Some(match status.code() {
        0x7c0 => ReplicaError::Superseded { sealed: Epoch(result) },
        0x7c1 => ReplicaError::NotSealed,
        0x7c2 => ReplicaError::NoReplica,
        0x7c3 => ReplicaError::OutOfOrder { last: position? },
        0x7c4 => ReplicaError::Behind { last: position? },
        0x7c5 => ReplicaError::Trimmed { trimmed: Seq(result) },
        0x7c6 => ReplicaError::Damaged,
        0x7c7 => ReplicaError::DeviceFailed,
        0x7c9 => ReplicaError::Disconnected,
        0x7ca => ReplicaError::Filling,
        _ => ReplicaError::Invalid,
    })
}
