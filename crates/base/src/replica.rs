//! What a head asks of a replica, and what the replica answers. The same words whether the
//! replica is in the head's own process or across the network: `node` carries them to the local
//! store, `nvme` encodes them as vendor-specific commands.

use crate::buffer::{Buffer, BufferMut};
use crate::ids::{Epoch, Position, ReplicaKey, Seq, ServerId};
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
    /// The records from `seq` on, as many as fit and at most `records`. Answered by
    /// [`ReplyBody::Records`], empty if the first one does not fit: it is to be scanned by itself.
    ScanRun {
        /// The first record.
        seq: Seq,
        /// How many at most.
        records: u32,
        /// Where they go.
        buffer: BufferMut,
    },
    /// Forget every record after `keep`, which is at or above the replica's commit seq.
    /// Answered by [`ReplyBody::Truncated`].
    Truncate {
        /// The last seq to keep.
        keep: Seq,
    },
    /// The shard has at least so many blocks from now on: durably, before the answer. Appends may
    /// follow at once, also beyond the old end: none of them takes effect before this has.
    /// A replica that is as large already has nothing to do. Answered by [`ReplyBody::Done`].
    Grow {
        /// The shard's size in blocks.
        blocks: u64,
    },
    /// Only news of `commit`, sent when nothing else carries it. Answered by [`ReplyBody::Done`].
    Trim,
    /// The head is leaving in good order; a later Seal need not wait for it.
    /// Answered by [`ReplyBody::Done`].
    Release,
    /// Renews the session's read grant, as every other admitted command does too; does nothing
    /// else. Answered by [`ReplyBody::Done`].
    Renew,
    /// Says who comes and why; binds the replica for the session without sealing it.
    /// Answered by [`ReplyBody::Done`].
    Hello {
        /// Why.
        reason: HelloReason,
        /// The last seq that the head has acknowledged, as far as it knows.
        acknowledged: Seq,
    },
    /// How this server sees another one: silence seen by one is corroborated by another before a
    /// member is replaced. Answered by [`ReplyBody::Health`].
    HealthOf {
        /// The other one.
        server: ServerId,
    },
    /// Fill this replica from `source`'s, directly: the log's tail, or, if `chunks`, first every chunk
    /// of home that is newer there. Starts the filling, or changes its rate, and says how far it is;
    /// repeated until it is done. Answered by [`ReplyBody::Filling`].
    Install {
        /// A server whose replica is in sync.
        source: ServerId,
        /// What this replica lacks is in no log any more. Its own log is dropped: allowed only
        /// while it does not count for any quorum.
        chunks: bool,
        /// Bytes per second, at most; 0: pause.
        bytes_per_second: u64,
    },
    /// Which chunks home has, for a server that fills its replica from this one.
    /// Answered by [`ReplyBody::Chunks`].
    List {
        /// Blocks per chunk of the list: those of the asking server.
        unit: BlockCount,
        /// Number of the first chunk of the list.
        first: u32,
        /// Where the list goes.
        buffer: BufferMut,
    },
    /// The first run of written blocks at or after `lba` and before `end`, in the version that is
    /// settled here. Answered by [`ReplyBody::Record`], a write record with its checksums and the
    /// position of this replica's commit (seq 1 if something that is not settled yet covers the
    /// blocks), or by [`ReplyBody::Done`] if there is no such block.
    Fetch {
        /// Where to start.
        lba: Lba,
        /// Where to stop.
        end: Lba,
        /// Where header and payload go.
        buffer: BufferMut,
    },
}

/// Why a session says hello.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HelloReason {
    /// A head opens the volume.
    Fresh,
    /// A state message told the head to come here.
    Told,
    /// The head's last session ended with an error.
    IoError,
    /// The head's last session fell silent.
    Timeout,
    /// Another server fills its replica from this one, on behalf of the head of the same epoch.
    Fill,
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
            Self::ScanRun { .. } => "ScanRun",
            Self::Truncate { .. } => "Truncate",
            Self::Grow { .. } => "Grow",
            Self::Trim => "Trim",
            Self::Release => "Release",
            Self::Renew => "Renew",
            Self::Hello { .. } => "Hello",
            Self::HealthOf { .. } => "HealthOf",
            Self::Install { .. } => "Install",
            Self::List { .. } => "List",
            Self::Fetch { .. } => "Fetch",
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
    /// It is being filled with chunks: its blocks are neither those of `last` nor of any other
    /// position. It takes no appends and no reads, and counts for no quorum.
    pub filling: bool,
    /// Durable records were lost here: it must be filled anew.
    pub damaged: bool,
    /// The replica's size in blocks: no record in its log reaches beyond.
    pub blocks: u64,
}

/// How a server sees another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// It answers.
    Healthy,
    /// It answers late, or refuses some work.
    Degraded,
    /// It does not answer.
    Silent,
    /// Asked for the first time just now; ask again.
    Unknown,
}

/// How far a filling is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FillProgress {
    /// What it does.
    pub phase: FillPhase,
    /// Payload bytes that came from the source.
    pub copied_bytes: u64,
    /// Payload bytes that will have come when it is done, as far as is known.
    pub total_bytes: u64,
    /// While it copies the log's tail: the last record that is here. Zero otherwise.
    pub log_end: Seq,
}

/// What a filling does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FillPhase {
    /// Connects to the source.
    Connecting,
    /// Copies chunks.
    Chunks,
    /// Copies the log's tail.
    Log,
    /// Holds everything the source held when it got there: seal it and go on from its log.
    Done,
    /// Cannot go on from this source; what has been copied stays.
    Failed,
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
    /// To Scan: the record, verified. To Fetch: a run of blocks.
    Record(Record),
    /// To Truncate: the last position that is left.
    Truncated {
        /// The log's new end.
        last: Position,
    },
    /// To Grow, Trim, Release, Renew and Hello; to Fetch: there is no such block.
    Done,
    /// To HealthOf.
    Health(Health),
    /// To Install.
    Filling(FillProgress),
    /// To List: encoded as [`crate::chunks`] says.
    Chunks(Buffer),
    /// To ScanRun: one after the other, as [`crate::packed`] says.
    Records(Buffer),
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
    /// The replica is being filled and cannot do that yet.
    #[error("the replica is being filled")]
    Filling,
    /// The data could not be read or does not match its checksum.
    #[error("the data is damaged here")]
    Damaged,
    /// A device of this server's pool has failed; it acknowledges nothing more.
    #[error("a device of the pool has failed")]
    DeviceFailed,
    /// This server's pool has no room for the replica that is being filled.
    #[error("the pool has no free space")]
    NoSpace,
    /// The command or its record is not valid: wrong volume, range, block size or checksum.
    #[error("invalid command")]
    Invalid,
    /// The connection went away; whether the command took effect is unknown.
    #[error("the connection was lost")]
    Disconnected,
}
