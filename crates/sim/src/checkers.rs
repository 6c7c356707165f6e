//! What must hold of a cluster at every moment, one file for each thing. What a guest may read (I1,
//! I3, I4, I5) is in [`crate::oracle`], that service comes back (I6) in the second phase of a run.

mod durable;
mod honest;
mod one_writer;
mod sealed;

use base::Epoch;
use node::Node;

/// What a checker is shown: a running process with an open pool, if it has one.
pub(crate) struct Seen<'a> {
    pub(crate) node: &'a Node,
    pub(crate) process: usize,
    /// The newest epoch that the cluster store has given out.
    pub(crate) store_epoch: Epoch,
    /// The epoch of the head that runs in it.
    pub(crate) head: Option<Epoch>,
    /// Its disks do what they say.
    pub(crate) honest: bool,
}

/// All checkers, with what they remember of each server.
pub(crate) struct Checkers {
    durable: durable::Durable,
    sealed: sealed::Sealed,
    one_writer: one_writer::OneWriter,
}

impl Checkers {
    pub(crate) fn new(servers: usize) -> Self {
        Self {
            durable: durable::Durable::new(servers),
            sealed: sealed::Sealed::new(servers),
            one_writer: one_writer::OneWriter::default(),
        }
    }

    /// A server's replica was deleted or made: nothing is promised any more.
    pub(crate) fn made_or_deleted(&mut self, process: usize) {
        self.durable.forget(process);
    }

    /// Looks at a process; what it finds wrong begins with the invariant's name.
    pub(crate) fn look(&mut self, seen: &Seen<'_>) -> Result<(), String> {
        self.durable.look(seen)?;
        self.sealed.look(seen)?;
        self.one_writer.look(seen)?;
        honest::look(seen)
    }
}
