//! What a head asks of a replica, and what the replica answers. The same words whether the
//! replica is in the head's own process or across the network: `node` carries them to the local
//! store, `nvme` encodes them as vendor-specific commands.

use crate::buffer::{Buffer, BufferMut};
use crate::ids::{Epoch, Position, ReplicaKey, Seq};
use crate::record::Record;
use crate::units::{BlockCount, Lba};

/// A command to one replica. Commands of one session are handed over in order; appends take
/// effect in that order, everything else may be answered in any order.
#[derive(Debug)]
pub struct ReplicaCommand {
    /// Which replica of the addressed server.
    pub key: ReplicaKey,
    /// The head's epoch. Refused if the replica has sealed a higher one.
    pub epoch: Epoch,
    /// Every record at or below this seq is acknowledged or settled: it may go home and be
    /// trimmed, and will never be truncated.
    pub commit: Seq,
    /// What to do.
    pub body: CommandBody,
}

/// The body of a [`ReplicaCommand`].
#[derive(Debug)]
pub enum CommandBody {
    /// Promise, durably, to refuse every lower epoch, and this one from other sessions.
    /// Answered by [`ReplyBody::Sealed`].
    Seal,
    /// Put `record` at the end of the log. Its seq must follow the last one's and its
    /// `previous_epoch` must be the last one's epoch. Answered by [`ReplyBody::Appended`].
    Append {
        /// The record.
        record: Record,
        /// Answer only when it is on media.
        media: bool,
    },
    /// Read blocks as of a log that holds at least `covers`. Answered by [`ReplyBody::Data`].
    Read {
        /// First block.
        lba: Lba,
        /// Number of blocks.
        blocks: BlockCount,
        /// The replica must hold this seq, else [`ReplicaError::Behind`].
        covers: Seq,
        /// Where the data goes.
        buffer: BufferMut,
    },
    /// Put every append that has been answered on media, and what else has been begun. Appends
    /// that wait for room are not waited for. Answered by [`ReplyBody::Flushed`].
    Flush,
    /// The record at `seq` as it is in the log. Answered by [`ReplyBody::Record`].
    Scan {
        /// Which record.
        seq: Seq,
        /// Where header and payload go.
        buffer: BufferMut,
    },
    /// Forget every record after `keep`, which is at or above the replica's commit seq.
    /// Answered by [`ReplyBody::Truncated`].
    Truncate {
        /// The last seq to keep.
        keep: Seq,
    },
    /// Only news of `commit`, sent when nothing else carries it. Answered by [`ReplyBody::Done`].
    Trim,
    /// The head is leaving in good order; a later Seal need not wait for it.
    /// Answered by [`ReplyBody::Done`].
    Release,
}

impl CommandBody {
    /// The command's name, for logs and errors.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Seal => "Seal",
            Self::Append { .. } => "Append",
            Self::Read { .. } => "Read",
            Self::Flush => "Flush",
            Self::Scan { .. } => "Scan",
            Self::Truncate { .. } => "Truncate",
            Self::Trim => "Trim",
            Self::Release => "Release",
        }
    }
}

/// What a replica knows of its log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReplicaState {
    /// The highest epoch sealed.
    pub sealed: Epoch,
    /// The last record appended.
    pub last: Position,
    /// Records at or below this seq are on media.
    pub durable: Seq,
    /// The highest commit seq heard of: nothing at or below it may be truncated.
    pub commit: Seq,
    /// Records at or below this seq are no longer in the log (they are home).
    pub trimmed: Seq,
}

/// The successful answer to a [`ReplicaCommand`].
#[derive(Debug)]
pub enum ReplyBody {
    /// To Seal.
    Sealed(ReplicaState),
    /// To Append.
    Appended {
        /// Records at or below this seq are on media at this replica.
        durable: Seq,
    },
    /// To Read: exactly the range's bytes, verified.
    Data(Buffer),
    /// To Flush.
    Flushed {
        /// Records at or below this seq are on media at this replica.
        durable: Seq,
    },
    /// To Scan: the record, verified.
    Record(Record),
    /// To Truncate: the last position that is left.
    Truncated {
        /// The log's new end.
        last: Position,
    },
    /// To Trim and Release.
    Done,
}

/// Why a replica refused or failed a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReplicaError {
    /// A higher epoch is sealed, or this one by another session.
    #[error("superseded: {sealed} is sealed here")]
    Superseded {
        /// The sealed epoch.
        sealed: Epoch,
    },
    /// The command came before this session's Seal.
    #[error("this session has not sealed its epoch here")]
    NotSealed,
    /// This server has no such replica.
    #[error("this server has no replica of the volume")]
    NoReplica,
    /// An append that does not follow the log's end, in seq or in epoch.
    #[error("does not follow the end of the log at {last}")]
    OutOfOrder {
        /// The log's end.
        last: Position,
    },
    /// A read, scan or truncation past what the log holds.
    #[error("the log ends at {last}")]
    Behind {
        /// The log's end.
        last: Position,
    },
    /// A scan or truncation of what is no longer in the log.
    #[error("records through {trimmed} are no longer in the log")]
    Trimmed {
        /// The last seq that is gone.
        trimmed: Seq,
    },
    /// The data could not be read or does not match its checksum.
    #[error("the data is damaged here")]
    Damaged,
    /// A device of this server's pool has failed; it acknowledges nothing more.
    #[error("a device of the pool has failed")]
    DeviceFailed,
    /// The command or its record is not valid: wrong volume, range, block size or checksum.
    #[error("invalid command")]
    Invalid,
    /// The connection went away; whether the command took effect is unknown.
    #[error("the connection was lost")]
    Disconnected,
}
