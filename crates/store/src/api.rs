//! What goes into a store and what comes out of it.

use core::fmt;
use core::time::Duration;

use base::{
    BlockCount, BlockSize, Buffer, BufferMut, BufferPool, ClusterId, Epoch, Instant, Lba, PoolId,
    Position, Record, ReplicaError, ReplicaKey, ReplicaState, ReplyBody, Seq, ServerId,
};

use crate::label::LabelError;
use crate::layout::DeviceIndex;

/// How a store opens its pool and how it behaves.
#[derive(Clone, Debug)]
pub struct StoreConfig {
    /// The pool that the devices must belong to; `None`: whichever they belong to, as long as it
    /// is one.
    pub pool: Option<PoolId>,
    /// The cluster that the pool must belong to.
    pub cluster: ClusterId,
    /// The server that the pool must belong to.
    pub server: ServerId,
    /// Memory of the store's own: batch headers, metadata, flush and recovery. Nobody else may
    /// take from this pool, or flushing could starve and appends would wait for ever. At least
    /// [`StoreConfig::SMALL_BUFFERS_MIN`] small and [`StoreConfig::LARGE_BUFFERS_MIN`] large ones.
    pub buffers: BufferPool,
    /// When data goes home.
    pub flush: FlushPolicy,
    /// Bytes per second, at most, that are read from home in the background to find damage; an
    /// eighth of that while anybody reads or writes. 0: none.
    pub scrub_bytes_per_second: u64,
}

impl StoreConfig {
    /// The fewest small (4 KiB) buffers a store works with.
    pub const SMALL_BUFFERS_MIN: usize = 64;
    /// The fewest large (128 KiB) buffers a store works with.
    pub const LARGE_BUFFERS_MIN: usize = 16;
}

/// When and how hard a store flushes its log home.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlushPolicy {
    /// Flush while more than this share of the log's segments holds data that is not home.
    pub log_fill_percent: u8,
    /// Flush while more than this share of the index is in use.
    pub index_fill_percent: u8,
    /// Flush while full segments hold more bytes than this that are not home. Whoever opens the
    /// pool next reads them before anybody is served.
    pub full_bytes: u64,
    /// Flush what has been in the log for longer than this.
    pub age: Duration,
    /// Flush everything that may go home after no append has come for this long.
    pub idle: Duration,
    /// Disk operations that flushing has under way, at most, while there is no pressure.
    pub operations: u16,
    /// The same while the log, or the index, is nearly full.
    pub operations_pressed: u16,
}

impl Default for FlushPolicy {
    fn default() -> Self {
        Self {
            log_fill_percent: 50,
            index_fill_percent: 50,
            full_bytes: 64 << 20,
            age: Duration::from_secs(30),
            idle: Duration::from_secs(5),
            operations: 8,
            operations_pressed: 32,
        }
    }
}

/// Names a disk operation until its completion; never reused by one store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DiskId(pub u64);

/// What a store is told.
#[derive(Debug)]
#[allow(clippy::large_enum_variant)] // moved once, not kept
pub enum Input {
    /// A disk operation has completed. Drop a write's [`Parts`] before saying so.
    DiskDone {
        /// Which one.
        id: DiskId,
        /// How it ended.
        result: DiskResult,
    },
    /// Do this and answer with [`Output::Done`]. Accepted only after [`Output::Opened`].
    Command {
        /// Comes back in the answer.
        tag: u64,
        /// What to do.
        command: Command,
    },
    /// This process is about to leave the pool to another one: until then, whatever may go home
    /// does, beyond what the policy asks for, so that the next one has little log to read.
    Hasten {
        /// When it ends, if no other process has taken the pool.
        until: Instant,
    },
    /// Nothing happened but time: [`next_deadline`](crate::Store::next_deadline) passed.
    Tick,
}

/// How a disk operation ended. The kind is the operation's.
#[derive(Debug)]
pub enum DiskResult {
    /// The whole length was read into the operation's buffer.
    Read(Result<BufferMut, DiskError>),
    /// The whole length was written; volatile until a sync.
    Written(Result<(), DiskError>),
    /// Every write completed before the sync was issued is on media.
    Synced(Result<(), DiskError>),
    /// The range was discarded, or the device cannot do that.
    Discarded(Result<(), DiskError>),
}

/// Why a disk operation failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DiskError {
    /// The medium could not be read or written (EIO, short I/O).
    #[error("I/O error")]
    Io,
    /// No space behind a sparse file (ENOSPC).
    #[error("no space left behind the device")]
    NoSpace,
    /// The device is gone (ENODEV, ENXIO).
    #[error("the device is gone")]
    Gone,
    /// The operation was not possible as asked (EINVAL and others).
    #[error("the operation is not possible")]
    Refused,
}

/// A command to one replica, session and epoch checks done.
#[derive(Debug)]
pub enum Command {
    /// Makes a replica: durable when answered with `Done`. An existing replica of the same block size
    /// is left as it is (the volume may have grown meanwhile: its head says so); of another one, `Invalid`.
    Create {
        /// Which replica.
        key: ReplicaKey,
        /// The volume's block size.
        block_size: BlockSize,
        /// The shard's size in blocks, above zero and at most `VOLUME_BYTES_MAX`.
        blocks: u64,
    },
    /// Forgets a replica, log and home: durable when answered with `Done`.
    Delete {
        /// Which replica.
        key: ReplicaKey,
    },
    /// Promises, durably, to refuse lower epochs. Appends that have not been started are answered
    /// `Superseded`; those under way complete first. Answered `Sealed`, or `Superseded` if a
    /// higher epoch is sealed already.
    Seal {
        /// Which replica.
        key: ReplicaKey,
        /// The epoch to seal.
        epoch: Epoch,
    },
    /// Appends a record; it must follow the last one. Answered `Appended`, in seq order. May
    /// wait for space. The record's epoch is not compared with the sealed one: an opening copies
    /// older records.
    Append {
        /// Which replica.
        key: ReplicaKey,
        /// What to append; verified when it was decoded.
        record: Record,
        /// News of the commit seq; counts no further than the records that have come.
        commit: Seq,
        /// Answer only when it is on media.
        media: bool,
    },
    /// Reads blocks. Answered `Data` with exactly the range's bytes; `Behind` if record `covers`
    /// has not arrived.
    Read {
        /// Which replica.
        key: ReplicaKey,
        /// First block.
        lba: Lba,
        /// Number of blocks, at most `PAYLOAD_BYTES_MAX` bytes.
        blocks: BlockCount,
        /// The record that must be visible.
        covers: Seq,
        /// Where the data goes; dropped on an error.
        buffer: BufferMut,
    },
    /// Puts every append that has been answered on media. Answered `Flushed`.
    Flush {
        /// Which replica.
        key: ReplicaKey,
    },
    /// Reads a record from the log. Answered `Record`; `Behind` or `Trimmed` if it is not there.
    Scan {
        /// Which replica.
        key: ReplicaKey,
        /// Which record.
        seq: Seq,
        /// Where it goes; dropped on an error.
        buffer: BufferMut,
    },
    /// Reads records from the log, from `seq` on: as many as fit into the buffer's payload and as one
    /// read of the log brings. Answered `Records`, with nothing in it if the first one does not fit;
    /// `Behind` or `Trimmed` if that is not there.
    ScanRun {
        /// Which replica.
        key: ReplicaKey,
        /// The first record.
        seq: Seq,
        /// How many at most.
        records: u32,
        /// Where they go; dropped on an error.
        buffer: BufferMut,
    },
    /// Forgets every record after `keep`, durably. Appends not started are answered
    /// `OutOfOrder`. Answered `Truncated`; `Invalid` if `keep` is below the commit seq.
    Truncate {
        /// Which replica.
        key: ReplicaKey,
        /// The last seq to keep.
        keep: Seq,
    },
    /// The replica has at least so many blocks from now on, at most `VOLUME_BYTES_MAX`. Appends beyond the
    /// old end may follow at once; they wait. What is new reads as zeroes. Durable when answered
    /// with `Done`.
    Grow {
        /// Which replica.
        key: ReplicaKey,
        /// The shard's size in blocks.
        blocks: u64,
    },
    /// Only news of the commit seq. Answered `Done`. Send it only to a replica whose log is known
    /// to be a prefix of the head's: what it covers may go home at once. Counts no further than
    /// the records that have come.
    Commit {
        /// Which replica.
        key: ReplicaKey,
        /// Nothing at or below it is ever truncated.
        commit: Seq,
    },
    /// Which chunks home has, for a server that fills its replica from this one. Answered
    /// `Chunks`, as [`base::chunks`] encodes them: every unit that has a block in home is listed,
    /// with a number that is at least that of the newest record in it.
    List {
        /// Which replica.
        key: ReplicaKey,
        /// Blocks per chunk of the asker: a power of two, 64 KiB to 4 MiB.
        unit: BlockCount,
        /// The first unit of the list.
        first: u32,
        /// Where the list goes.
        buffer: BufferMut,
    },
    /// The first run of written blocks in `lba..end`, at most 4 MiB, as they are settled here.
    /// Answered `Record`, or `Done` if there is none. See the module `fetch` for which version it
    /// is and what its position says.
    Fetch {
        /// Which replica.
        key: ReplicaKey,
        /// Where to start.
        lba: Lba,
        /// Where to stop.
        end: Lba,
        /// Where it goes; dropped on an error.
        buffer: BufferMut,
    },
    /// Begins to fill the replica, or goes on. Its log is dropped, its home kept, except that of
    /// a damaged replica; from now on, and after a crash too, it is filling. What was staged and
    /// not committed is forgotten. Durable when answered with `Done`.
    FillBegin {
        /// Which replica.
        key: ReplicaKey,
    },
    /// Begins a new version of a chunk, all absent; the old one stays until the new one is
    /// committed. At most [`FILL_CHUNKS_MAX`] at a time. Answered `Done`; `NoSpace`.
    FillChunk {
        /// Which replica.
        key: ReplicaKey,
        /// Which chunk, in units of [`Store::chunk_unit`](crate::Store::chunk_unit).
        chunk: u32,
        /// What the source's list says of it.
        newest: Seq,
    },
    /// Puts a run of blocks into the chunk that was begun and holds it. Within a chunk, runs come
    /// in the order of their addresses. Answered `Done`, in any order, when the run has been
    /// taken and its buffer is free.
    FillData {
        /// Which replica.
        key: ReplicaKey,
        /// A write record from a peer, decoded: its blocks match its checksums.
        record: Record,
    },
    /// The chunk has all its blocks: answered `Done` when it counts instead of the old one,
    /// durably. Those that come together share their syncs. No more data may come.
    FillCommit {
        /// Which replica.
        key: ReplicaKey,
        /// Which chunk.
        chunk: u32,
    },
    /// The source does not have the chunk: forgets it, durably when answered with `Done`.
    FillFree {
        /// Which replica.
        key: ReplicaKey,
        /// Which chunk.
        chunk: u32,
    },
    /// Every chunk is as new as the source's list said: the replica is filled, and its log begins
    /// after `position`. Durable when answered with `Done`. `Invalid` while a chunk is staged.
    FillEnd {
        /// Which replica.
        key: ReplicaKey,
        /// The trimmed position of the source's first list.
        position: Position,
    },
}

/// Chunks of a replica that a filling may have begun and not committed, at most.
pub const FILL_CHUNKS_MAX: usize = 8;

impl Command {
    /// The replica it is for.
    pub const fn key(&self) -> ReplicaKey {
        match self {
            Self::Create { key, .. }
            | Self::Delete { key }
            | Self::Seal { key, .. }
            | Self::Append { key, .. }
            | Self::Read { key, .. }
            | Self::Flush { key }
            | Self::Scan { key, .. }
            | Self::ScanRun { key, .. }
            | Self::Truncate { key, .. }
            | Self::Grow { key, .. }
            | Self::Commit { key, .. }
            | Self::List { key, .. }
            | Self::Fetch { key, .. }
            | Self::FillBegin { key }
            | Self::FillChunk { key, .. }
            | Self::FillData { key, .. }
            | Self::FillCommit { key, .. }
            | Self::FillFree { key, .. }
            | Self::FillEnd { key, .. } => *key,
        }
    }
}

/// What a store wants done, or known.
#[derive(Debug)]
#[allow(clippy::large_enum_variant)] // inline parts: a write allocates nothing
pub enum Output {
    /// The pool is open and takes commands; or it cannot be opened, and this store is of no
    /// further use. Comes once.
    Opened(Result<(), OpenError>),
    /// Perform this and report it with [`Input::DiskDone`], in any order.
    Disk(DiskOperation),
    /// The answer to a command.
    Done {
        /// The command's.
        tag: u64,
        /// How it ended.
        result: Result<ReplyBody, ReplicaError>,
    },
    /// A device failed a write or a sync: nothing is acknowledged from now on; reads go on.
    /// Comes once.
    Failed(DeviceFailure),
    /// Something an operator should see. Also visible in [`Usage`].
    Notice(Notice),
}

/// A disk operation. Offsets, lengths and the addresses of all memory are multiples of 4 KiB.
#[derive(Debug)]
pub struct DiskOperation {
    /// Comes back in the completion.
    pub id: DiskId,
    /// Which device.
    pub device: DeviceIndex,
    /// What to do.
    pub kind: DiskKind,
}

/// What a disk operation does.
#[derive(Debug)]
#[allow(clippy::large_enum_variant)] // inline parts: a write allocates nothing
pub enum DiskKind {
    /// Reads `length` bytes at `offset` into `buffer`'s payload from byte `start` on.
    Read {
        /// Byte offset on the device.
        offset: u64,
        /// The memory; comes back in the completion.
        buffer: BufferMut,
        /// First byte of the payload that is written.
        start: usize,
        /// Bytes to read.
        length: usize,
    },
    /// Writes `parts`, one after the other, at `offset`.
    Write {
        /// Byte offset on the device.
        offset: u64,
        /// The data.
        parts: Parts,
    },
    /// Makes every write that has completed on this device durable.
    Sync,
    /// Tells the device that a range's content no longer matters. A hint.
    Discard {
        /// Byte offset on the device.
        offset: u64,
        /// Bytes.
        length: u64,
    },
}

/// The parts of a gathered write: no more than [`Parts::COUNT_MAX`], each a multiple of 4 KiB.
/// Held inline, so that a write allocates nothing.
pub struct Parts {
    parts: [Option<Buffer>; Self::COUNT_MAX],
    count: usize,
    bytes: usize,
}

impl Parts {
    /// The most parts a write has.
    pub const COUNT_MAX: usize = 34;

    /// No parts yet.
    pub(crate) const fn new() -> Self {
        Self { parts: [const { None }; Self::COUNT_MAX], count: 0, bytes: 0 }
    }

    /// One part.
    pub(crate) fn one(part: Buffer) -> Self {
        let mut parts = Self::new();
        parts.push(part);
        parts
    }

    pub(crate) fn push(&mut self, part: Buffer) {
        assert!(part.len().is_multiple_of(base::limits::PAGE_BYTES), "parts are whole pages");
        self.bytes += part.len();
        self.parts[self.count] = Some(part);
        self.count += 1;
    }

    /// The parts in order.
    pub fn iter(&self) -> impl Iterator<Item = &Buffer> {
        self.parts[..self.count].iter().flatten()
    }

    /// Number of parts.
    pub const fn count(&self) -> usize {
        self.count
    }

    /// Bytes of all parts.
    pub const fn bytes(&self) -> usize {
        self.bytes
    }
}

impl fmt::Debug for Parts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Parts {{ {} parts, {} bytes }}", self.count, self.bytes)
    }
}

/// A device that failed a write or a sync.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("device {device} failed a {operation}: {error}; the pool acknowledges nothing more")]
pub struct DeviceFailure {
    /// Which device.
    pub device: DeviceIndex,
    /// `write` or `sync`.
    pub operation: &'static str,
    /// The error.
    pub error: DiskError,
}

/// Something an operator should see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// Appends wait, for this reason.
    Stalled(Stall),
    /// Appends no longer wait.
    Resumed,
    /// A replica's log has lost records that were durable, or its metadata is unreadable. Blocks
    /// that may be affected answer `Damaged`.
    Damaged(ReplicaKey),
    /// A scrub has found blocks that cannot be read here; writing them makes them whole.
    DamagedBlocks {
        /// Of which replica.
        key: ReplicaKey,
        /// First block.
        lba: Lba,
        /// Number of blocks.
        blocks: BlockCount,
    },
    /// When the pool was opened, one of the two copies of its metadata had pages that could not be read,
    /// or pages of a checkpoint that were not whole. The other copy did; the opening's checkpoint is a new
    /// one in both.
    MetadataMended {
        /// Where that copy is.
        device: DeviceIndex,
    },
}

/// Why appends wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stall {
    /// No log segment is free; flushing makes room, as far as the commit seq allows.
    LogFull,
    /// The index of the log is full; flushing makes room.
    IndexFull,
    /// The home has no free chunk, so that the log cannot be flushed.
    HomeFull,
}

impl fmt::Display for Stall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::LogFull => "the log is full",
            Self::IndexFull => "the index of the log is full",
            Self::HomeFull => "the pool has no free space: add mass devices or delete volumes",
        })
    }
}

/// Why a pool could not be opened.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// A device's label is missing, foreign, newer, or of another pool.
    #[error("device {device}: {error}")]
    Label {
        /// Which device.
        device: DeviceIndex,
        /// What is wrong with it.
        #[source]
        error: LabelError,
    },
    /// A device could not be read.
    #[error("device {device} cannot be read: {error}")]
    Read {
        /// Which device.
        device: DeviceIndex,
        /// The error.
        #[source]
        error: DiskError,
    },
    /// A device could not be written or synced.
    #[error("{0}")]
    Failed(DeviceFailure),
    /// Neither copy of the pool's metadata is whole. Nothing was changed.
    #[error(
        "the pool's metadata is damaged ({what}); nothing was changed: restore the device, or \
         format it anew and let its replicas be rebuilt from their peers"
    )]
    Metadata {
        /// What was found.
        what: &'static str,
    },
    /// What cannot be read of the pool's metadata may be newer than what can. Nothing was changed.
    #[error(
        "{what}, as device {device} cannot be read: {error}; nothing was changed: try again, and \
         if it stays so, restore the device, or format it anew and let its replicas be rebuilt \
         from their peers"
    )]
    MetadataUnread {
        /// What is missing.
        what: &'static str,
        /// Which device.
        device: DeviceIndex,
        /// The error.
        #[source]
        error: DiskError,
    },
}

/// What a store knows of a replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplicaInfo {
    /// Positions. `last` is the last record written, not merely queued.
    pub state: ReplicaState,
    /// The volume's block size.
    pub block_size: BlockSize,
    /// The shard's size in blocks.
    pub blocks: u64,
    /// Durable records were lost: rebuild it from a peer.
    pub damaged: bool,
    /// The journal says that the log is on media through here.
    pub noted: Seq,
    /// Bytes of log segments it holds.
    pub log_bytes: u64,
    /// Bytes of home chunks it holds.
    pub home_bytes: u64,
}

/// How full the pool is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Bytes of all log segments.
    pub log_bytes: u64,
    /// Bytes of log segments in use, clean ones included.
    pub log_used_bytes: u64,
    /// Bytes of log segments that hold data which is not home.
    pub log_dirty_bytes: u64,
    /// Bytes of log that an opening of the pool would read.
    pub log_recovery_bytes: u64,
    /// Blocks found through the index.
    pub index_entries: u64,
    /// Blocks that the index has room for.
    pub index_entries_max: u64,
    /// Bytes of all home chunks.
    pub home_bytes: u64,
    /// Bytes of home chunks in use.
    pub home_used_bytes: u64,
    /// Why appends wait, if they do.
    pub stalled: Option<Stall>,
    /// Commands answered [`ReplicaError::Damaged`] since the pool was opened.
    pub damaged_answers: u64,
}
