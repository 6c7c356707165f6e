//! What must hold of a cluster at every moment, one file for each thing. What a guest may read (I1,
//! I3, I4, I5) is in [`crate::oracle`], that service comes back (I6) in the second phase of a run.

mod bounded;
mod durable;
mod honest;
mod matching;
mod one_writer;
pub(crate) mod quorums;
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
    /// No disk has said that something is on media that was not.
    pub(crate) keeps_its_word: bool,
    /// Disk operations that it has under way.
    pub(crate) operations: usize,
    /// Bytes that wait to be sent, for all its connections.
    pub(crate) unsent_bytes: usize,
}

/// All checkers, with what they remember of each server.
pub(crate) struct Checkers {
    durable: durable::Durable,
    sealed: sealed::Sealed,
    one_writer: one_writer::OneWriter,
    matching: matching::Matching,
}

impl Checkers {
    pub(crate) fn new(servers: usize) -> Self {
        Self {
            durable: durable::Durable::new(servers),
            sealed: sealed::Sealed::new(servers),
            one_writer: one_writer::OneWriter::default(),
            matching: matching::Matching::default(),
        }
    }

    /// A server's replica was deleted or made: nothing is promised any more.
    pub(crate) fn made_or_deleted(&mut self, process: usize) {
        self.durable.forget(process);
        self.sealed.forget(process);
    }

    /// A server's log device has lost what it said was on media. Its metadata has a second copy.
    pub(crate) fn log_lost(&mut self, process: usize) {
        self.durable.log_lost(process);
    }

    /// Pages of a server's disks have rotted.
    pub(crate) fn rotted(&mut self, process: usize) {
        self.durable.rotted(process);
    }

    /// Looks at a process; what it finds wrong begins with the invariant's name.
    pub(crate) fn look(&mut self, seen: &Seen<'_>) -> Result<(), String> {
        self.durable.look(seen)?;
        self.sealed.look(seen)?;
        self.one_writer.look(seen)?;
        self.matching.look(seen)?;
        bounded::look(seen)?;
        honest::look(seen)
    }
}
