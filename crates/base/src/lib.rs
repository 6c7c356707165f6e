//! The words every other crate uses: ids, units, limits, time, checksums, buffers, log
//! records, membership records and front-end-neutral block requests.
//!
//! Layer 0. Nothing here does I/O, reads a clock or draws a random number; everything is plain
//! data, and safe. See `docs/architecture.md` for the layers and `docs/glossary.md` for the words.

pub mod buffer;
pub mod checksum;
pub mod chunks;
pub mod ids;
pub mod limits;
pub mod membership;
pub mod packed;
pub mod planted;
pub mod record;
pub mod replica;
pub mod request;
pub mod slab;
pub mod state;
pub mod time;
pub mod units;

pub use buffer::{Buffer, BufferMut, BufferPool};
pub use ids::{
    ClusterId, Epoch, HolderId, PoolId, Position, ReplicaKey, Seq, ServerId, ShardIndex, VolumeId,
};
pub use membership::{Durability, Holder, Member, Move, Policy, Role, ShardRecord, VolumeRecord};
pub use record::{Record, RecordError, RecordHeader, RecordKind};
pub use replica::{
    CommandBody, FillPhase, FillProgress, Health, HelloReason, ReplicaCommand, ReplicaError,
    ReplicaState, ReplyBody,
};
pub use request::{BlockReply, BlockRequest, Operation, RequestId, Status};
pub use slab::Slab;
pub use state::{DegradedReason, StateMessage};
pub use time::Instant;
pub use units::{BlockCount, BlockSize, Lba};
