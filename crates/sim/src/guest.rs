//! Requests of the guest.

use base::Epoch;

use crate::oracle::Stamp;

/// A request of the guest that is not answered.
#[derive(Debug)]
pub(crate) struct Guest {
    pub(crate) lba: u64,
    pub(crate) blocks: u64,
    pub(crate) kind: Kind,
    /// Of a write or discard.
    pub(crate) number: u64,
    pub(crate) submitted: Stamp,
    /// Whose head has it.
    pub(crate) process: usize,
    /// That head's epoch.
    pub(crate) epoch: Epoch,
    /// A newer head had opened already when it was submitted: it must never take effect.
    pub(crate) stale: bool,
    /// A write that is on media when it is acknowledged.
    pub(crate) on_media: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Read,
    Write,
    Discard,
    Flush,
}
