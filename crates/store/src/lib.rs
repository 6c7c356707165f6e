//! A pool: log, index, home, checkpoint, flush, trim and recovery (L1, sans-I/O).
//!
//! A [`Store`] is the one pool of one server: fast devices that hold the log and mass devices
//! that hold the home, files or block devices. It keeps many replicas. Nothing here does I/O:
//! whoever drives a store hands it [`Input`]s, takes [`Output`]s until there are none, performs
//! the disk operations among them and reports each one's completion.
//!
//! What is where on a device is in `docs/disk-format.md`. The order of writes and syncs that
//! keeps acknowledged data is told in the modules: `append` for the log, `flush` for
//! the way home, `recovery` and `region` for what a reopening believes.

mod api;
mod append;
mod batch;
mod bytes;
mod cache;
mod extents;
mod facts;
mod fetch;
mod fill;
mod flush;
mod home;
mod index;
mod journal;
mod label;
mod layout;
mod left;
mod metadata;
mod owners;
mod read;
mod recovery;
mod region;
mod replay;
mod replica;
mod scan;
mod scrub;
mod segments;
mod stage;
mod store;
mod wave;

pub use api::{
    Command, DeviceFailure, DiskError, DiskId, DiskKind, DiskOperation, DiskResult,
    FILL_CHUNKS_MAX, FlushPolicy, Input, Notice, OpenError, Output, Parts, ReplicaInfo, Stall,
    StoreConfig, Usage,
};
pub use batch::{BatchFacts, batch_facts};
pub use label::{Label, LabelError, identify};
pub use layout::{
    DeviceIndex, DeviceInfo, DeviceRole, FormatConfig, FormatError, FormatWrite, LABEL_AREA_BYTES,
    LABEL_COPY_OFFSET, format, metadata_copies,
};
pub use left::{CleanSegment, LogLeft, ReplicaLog};
pub use scrub::Scrubbed;
pub use store::Store;
