//! The vendor-specific replica commands. The tables are in `docs/protocol.md`.
//!
//! The namespace id is a handle: the initiator chooses it and `Seal` binds it, for the session,
//! to the volume and shard that the command names; a later `Seal` may bind it anew. All other
//! commands name the replica by handle, so that epoch, commit, seq, address and length fit into
//! the 64 bytes beside it. Commands of a connection are taken in order, so `Seal` and what
//! follows it may be sent without a pause.

use base::{
    BlockCount, BlockSize, CommandBody, Epoch, FillPhase, FillProgress, Health, HelloReason, Lba,
    Position, ReplicaCommand, ReplicaError, ReplicaKey, ReplicaState, Seq, ServerId, ShardIndex,
    VolumeId,
};

use super::command::{Command, Sgl};
use super::status::StatusCode;
use super::{put, take, u32_at, u64_at};

/// Handles are 1 to this.
pub const HANDLES_MAX: u32 = 4096;
/// Bytes of Seal's answer.
pub const STATE_BYTES: usize = 64;
/// Bytes of Install's answer.
pub const PROGRESS_BYTES: usize = 32;
/// The least room for List's answer: its header and one chunk.
pub const LIST_BYTES_MIN: usize = 64;
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
    /// Fetch.
    pub const FETCH: u8 = 0xe2;
    /// Install.
    pub const INSTALL: u8 = 0xe6;
    /// Hello.
    pub const HELLO: u8 = 0xea;
    /// Renew.
    pub const RENEW: u8 = 0xee;
    /// Health-of.
    pub const HEALTH_OF: u8 = 0xf2;
    /// List.
    pub const LIST: u8 = 0xf6;
    /// Grow.
    pub const GROW: u8 = 0xfa;
}

const FLAG_MEDIA: u32 = 1;
const FLAG_CHUNKS: u32 = 1;
const STATE_FILLING: u64 = 1;
const STATE_DAMAGED: u64 = 2;
/// Bytes per unit of Install's rate.
const RATE_UNIT: u64 = 1024;

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
            put_key(&mut out, command.key);
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
        CommandBody::ScanRun { seq, records, buffer } => {
            out.opcode = opcode::SCAN;
            out.sgl = answer(buffer.capacity().min(base::limits::PAYLOAD_BYTES_MAX));
            out.cdw10[4] = *records;
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
        | CommandBody::Grow { .. }
        | CommandBody::Hello { .. }
        | CommandBody::HealthOf { .. }
        | CommandBody::Install { .. }
        | CommandBody::List { .. }
        | CommandBody::Fetch { .. } => encode_more(command, out),
    }
}

/// The commands that no write or read waits for.
fn encode_more(command: &ReplicaCommand, mut out: Command) -> Command {
    let answer = |length: usize| Sgl::Transport { length: u32::try_from(length).unwrap_or(0) };
    match &command.body {
        CommandBody::Renew => {
            out.opcode = opcode::RENEW;
            out
        }
        CommandBody::Grow { blocks } => {
            out.opcode = opcode::GROW;
            out.with_wide(0, *blocks)
        }
        CommandBody::Hello { reason, acknowledged } => {
            out.opcode = opcode::HELLO;
            if *reason == HelloReason::Fill {
                put_key(&mut out, command.key);
            } else {
                out = out.with_wide(1, acknowledged.0);
            }
            out.cdw10[5] = reason_code(*reason);
            out
        }
        CommandBody::HealthOf { server } => {
            out.opcode = opcode::HEALTH_OF;
            put_id(&mut out, server.bytes());
            out
        }
        CommandBody::Install { source, chunks, bytes_per_second } => {
            out.opcode = opcode::INSTALL;
            out.sgl = answer(PROGRESS_BYTES);
            put_id(&mut out, source.bytes());
            let rate = bytes_per_second.div_ceil(RATE_UNIT);
            out.cdw10[4] = u32::try_from(rate).unwrap_or(u32::MAX);
            out.cdw10[5] = if *chunks { FLAG_CHUNKS } else { 0 };
            out
        }
        CommandBody::List { unit, first, buffer } => {
            out.opcode = opcode::LIST;
            out.sgl = answer(buffer.capacity().min(base::limits::PAYLOAD_BYTES_MAX));
            out.cdw10[0] = unit.0;
            out.cdw10[1] = *first;
            out
        }
        CommandBody::Fetch { lba, end, buffer: _ } => {
            out.opcode = opcode::FETCH;
            out.sgl = answer(base::limits::HEADER_BYTES + base::limits::PAYLOAD_BYTES_MAX);
            out.with_wide(0, lba.0).with_wide(1, end.0)
        }
        CommandBody::Seal
        | CommandBody::Append { .. }
        | CommandBody::Read { .. }
        | CommandBody::Flush
        | CommandBody::Scan { .. }
        | CommandBody::ScanRun { .. }
        | CommandBody::Truncate { .. }
        | CommandBody::Trim
        | CommandBody::Release => unreachable!("encoded by the caller"),
    }
}

fn put_id(out: &mut Command, id: [u8; 16]) {
    for (index, word) in out.cdw10[..4].iter_mut().enumerate() {
        *word = u32_at(&id, 4 * index);
    }
}

fn take_id(command: &Command) -> [u8; 16] {
    let mut id = [0; 16];
    for (index, word) in command.cdw10[..4].iter().enumerate() {
        put(&mut id, 4 * index, &word.to_le_bytes());
    }
    id
}

fn put_key(out: &mut Command, key: ReplicaKey) {
    put_id(out, key.volume.bytes());
    out.cdw10[4] = key.shard.0;
}

fn take_key(command: &Command) -> ReplicaKey {
    let volume = VolumeId::from_bytes(take_id(command));
    ReplicaKey { volume, shard: ShardIndex(command.cdw10[4]) }
}

const fn reason_code(reason: HelloReason) -> u32 {
    match reason {
        HelloReason::Fresh => 1,
        HelloReason::Told => 2,
        HelloReason::IoError => 3,
        HelloReason::Timeout => 4,
        HelloReason::Fill => 5,
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

/// DW0 and DW1 of a completion whose data is not a record, which would carry its own checksums: the
/// data's CRC32C, and a bit that says so.
pub fn data_result(crc: u32) -> u64 {
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
    /// Scan of several records.
    ScanRun {
        /// The first.
        seq: Seq,
        /// How many at most.
        records: u32,
        /// Bytes that the initiator has room for.
        bytes: usize,
    },
    /// Truncate.
    Truncate {
        /// The last to keep.
        keep: Seq,
    },
    /// Grow.
    Grow {
        /// The size in blocks.
        blocks: u64,
    },
    /// Trim.
    Trim,
    /// Release.
    Release,
    /// Renew.
    Renew,
    /// Hello.
    Hello {
        /// Why.
        reason: HelloReason,
        /// What the head has acknowledged; zero for fills.
        acknowledged: Seq,
        /// What the handle means from now on: for fills, which never seal.
        bind: Option<ReplicaKey>,
    },
    /// Health-of.
    HealthOf {
        /// Which server.
        server: ServerId,
    },
    /// Install.
    Install {
        /// From where.
        source: ServerId,
        /// Chunks first.
        chunks: bool,
        /// Rate; 0: pause.
        bytes_per_second: u64,
    },
    /// List.
    List {
        /// Blocks per chunk.
        unit: BlockCount,
        /// The first chunk.
        first: u32,
        /// Bytes that the initiator has room for.
        bytes: usize,
    },
    /// Fetch.
    Fetch {
        /// Where to start.
        lba: Lba,
        /// Where to stop.
        end: Lba,
    },
}

/// Decodes and checks a replica command (its epoch, commit and handle are `cdw2`, `metadata`
/// and `nsid`).
pub fn decode(command: &Command) -> Result<Request, StatusCode> {
    let length = usize::try_from(command.sgl.length()).unwrap_or(usize::MAX);
    let request = match command.opcode {
        opcode::SEAL => Request::Seal { key: take_key(command) },
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
        opcode::SCAN if command.cdw10[4] == 0 => Request::Scan { seq: Seq(command.wide(1)) },
        opcode::SCAN => Request::ScanRun {
            seq: Seq(command.wide(1)),
            records: command.cdw10[4],
            bytes: length.min(base::limits::PAYLOAD_BYTES_MAX),
        },
        opcode::TRUNCATE => Request::Truncate { keep: Seq(command.wide(1)) },
        opcode::TRIM => Request::Trim,
        opcode::GROW => Request::Grow { blocks: command.wide(0) },
        opcode::RELEASE => Request::Release,
        opcode::RENEW => Request::Renew,
        opcode::HELLO => decode_hello(command)?,
        opcode::HEALTH_OF => Request::HealthOf { server: ServerId::from_bytes(take_id(command)) },
        opcode::INSTALL => Request::Install {
            source: ServerId::from_bytes(take_id(command)),
            chunks: command.cdw10[5] & FLAG_CHUNKS != 0,
            bytes_per_second: u64::from(command.cdw10[4]) * RATE_UNIT,
        },
        opcode::LIST => {
            if command.cdw10[0] == 0 {
                return Err(StatusCode::INVALID_FIELD);
            }
            let (unit, first) = (BlockCount(command.cdw10[0]), command.cdw10[1]);
            Request::List { unit, first, bytes: length.min(base::limits::PAYLOAD_BYTES_MAX) }
        }
        opcode::FETCH => Request::Fetch { lba: Lba(command.wide(0)), end: Lba(command.wide(1)) },
        _ => return Err(StatusCode::INVALID_OPCODE),
    };
    let needed = match request {
        Request::Seal { .. } => STATE_BYTES,
        Request::Append { .. } | Request::Read { .. } => 0,
        Request::Scan { .. } | Request::Fetch { .. } => {
            base::limits::HEADER_BYTES + base::limits::PAYLOAD_BYTES_MAX
        }
        Request::Install { .. } => PROGRESS_BYTES,
        Request::List { .. } => LIST_BYTES_MIN,
        Request::ScanRun { .. } => base::record::FIXED_BYTES,
        Request::Flush
        | Request::Truncate { .. }
        | Request::Grow { .. }
        | Request::Trim
        | Request::Release
        | Request::Renew
        | Request::Hello { .. }
        | Request::HealthOf { .. } => POSITION_BYTES,
    };
    match command.sgl {
        Sgl::Transport { .. } if length >= needed => Ok(request),
        Sgl::Transport { .. } => Err(StatusCode::SGL_LENGTH_INVALID),
        Sgl::InCapsule { .. } | Sgl::Other => Err(StatusCode::SGL_TYPE_INVALID),
    }
}

fn decode_hello(command: &Command) -> Result<Request, StatusCode> {
    let reason = match command.cdw10[5] {
        1 => HelloReason::Fresh,
        2 => HelloReason::Told,
        3 => HelloReason::IoError,
        4 => HelloReason::Timeout,
        5 => HelloReason::Fill,
        _ => return Err(StatusCode::INVALID_FIELD),
    };
    Ok(if reason == HelloReason::Fill {
        let bind = Some(take_key(command));
        Request::Hello { reason, acknowledged: Seq::ZERO, bind }
    } else {
        Request::Hello { reason, acknowledged: Seq(command.wide(1)), bind: None }
    })
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
    let filling = if state.filling { STATE_FILLING } else { 0 };
    let damaged = if state.damaged { STATE_DAMAGED } else { 0 };
    put(&mut out, 48, &(filling | damaged).to_le_bytes());
    put(&mut out, 56, &state.blocks.to_le_bytes());
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
        filling: u64_at(bytes, 48) & STATE_FILLING != 0,
        damaged: u64_at(bytes, 48) & STATE_DAMAGED != 0,
        blocks: u64_at(bytes, 56),
    }
}

/// The bytes of Install's answer.
pub fn encode_progress(progress: &FillProgress) -> [u8; PROGRESS_BYTES] {
    let phase: u64 = match progress.phase {
        FillPhase::Connecting => 1,
        FillPhase::Chunks => 2,
        FillPhase::Log => 3,
        FillPhase::Done => 4,
        FillPhase::Failed => 5,
    };
    let mut out = [0; PROGRESS_BYTES];
    put(&mut out, 0, &phase.to_le_bytes());
    put(&mut out, 8, &progress.copied_bytes.to_le_bytes());
    put(&mut out, 16, &progress.total_bytes.to_le_bytes());
    put(&mut out, 24, &progress.log_end.0.to_le_bytes());
    out
}

/// Install's answer; `None` if it names no phase that is known.
pub fn decode_progress(bytes: &[u8]) -> Option<FillProgress> {
    let phase = match u64_at(bytes, 0) {
        1 => FillPhase::Connecting,
        2 => FillPhase::Chunks,
        3 => FillPhase::Log,
        4 => FillPhase::Done,
        5 => FillPhase::Failed,
        _ => return None,
    };
    let (copied_bytes, total_bytes) = (u64_at(bytes, 8), u64_at(bytes, 16));
    Some(FillProgress { phase, copied_bytes, total_bytes, log_end: Seq(u64_at(bytes, 24)) })
}

/// DW0 of a successful Health-of.
pub const fn health_code(health: Health) -> u64 {
    match health {
        Health::Healthy => 1,
        Health::Degraded => 2,
        Health::Silent => 3,
        Health::Unknown => 4,
    }
}

/// The health that DW0 states; what is not known is [`Health::Unknown`].
pub const fn health_from_code(code: u64) -> Health {
    match code {
        1 => Health::Healthy,
        2 => Health::Degraded,
        3 => Health::Silent,
        _ => Health::Unknown,
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
        ReplicaError::NoSpace => (StatusCode::vendor(0xcb, true), 0, None),
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
        0x7cb => ReplicaError::NoSpace,
        _ => ReplicaError::Invalid,
    })
}
