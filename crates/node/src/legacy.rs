//! What the process that lets go of a server's pool tells the one that opens it next: which read grants are
//! still good, and where the log is.
//!
//! Without this a reopened pool counts as having granted reads just now (I4: a head that goes on reading
//! here must not miss what a higher epoch writes). With it, what was granted is known, as long as three
//! things are as they were: the replica's sealed epoch, the time that is left, which only shrinks on the way, and
//! the pool's [generation](store::Store::generation): whoever opened the pool in between, and
//! may have granted reads and died, has raised it. What is said of the log is for the same generation.

use core::time::Duration;

use base::{Epoch, ReplicaKey};
use store::LogLeft;

/// What is left of a server whose pool was let go of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Legacy {
    /// The pool's generation then.
    pub generation: u64,
    /// What heads may still count on at its replicas.
    pub grants: Vec<ReplicaGrant>,
    /// Where its log is; `None`: the next process looks.
    pub log: Option<LogLeft>,
}

/// What heads of one replica may still count on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplicaGrant {
    /// The replica.
    pub key: ReplicaKey,
    /// The epoch whose head commanded it.
    pub epoch: Epoch,
    /// For how long heads of that epoch or lower ones may still read; zero after Release.
    pub left: Duration,
}

impl Legacy {
    /// What is left for a replica of a pool that has just been opened in `generation`; `None`:
    /// nothing is known.
    pub(crate) fn left(&self, generation: u64, key: ReplicaKey, sealed: Epoch) -> Option<Duration> {
        // Opening has raised it by one.
        let alone = self.generation.checked_add(1) == Some(generation);
        let found = self.grants.iter().find(|grant| grant.key == key && grant.epoch == sealed);
        found.filter(|_| alone).map(|grant| grant.left)
    }
}
