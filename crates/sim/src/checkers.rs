//! What must hold of a cluster at every moment, one file for each thing. Where each invariant is looked
//! at:
//!
//! | | by the guest | at servers and heads |
//! |---|---|---|
//! | I1 | [`crate::oracle`], and every copy read alone at the end (`world/copies.rs`) | `durable`: what was on media and settled is there after every crash; `matching`: nothing is trimmed that is not settled; `honest` |
//! | I2 | `world/workload.rs`: a head whose successor has opened acknowledges nothing; [`crate::oracle`]: an old epoch's writes come before a newer one's | `sealed`: a seal stays, and is of an epoch that somebody won; `matching`: no two settled records of one seq |
//! | I3 | [`crate::oracle`]: the first read decides a write whose head is gone | `matching` |
//! | I4 | `content.rs`: a block says whose it is, and is whole; [`crate::oracle`] | `honest`: honest disks have nothing damaged |
//! | I5 | [`crate::oracle`]: what was given back or never answered is undecided, and never comes after a write that was submitted later and acknowledged | |
//! | I6 | `world.rs`, when faults have stopped: a bound for every request; no request is answered by an error | `process.rs`: no machine spins on its deadline |
//! | I7 | | `one_writer`: an epoch has one head, in one process; `world.rs`: no epoch opens twice |
//!
//! Besides: `quorums` (no change of members has disjoint quorums), `bounded` (queues), and what each
//! machine asserts of itself in its `check_invariants`.

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

    /// A replica begins to be filled with chunks, or that is over.
    pub(crate) fn filled(&mut self, process: usize, is_over: bool) {
        self.durable.filled(process, is_over);
    }

    /// Pages of a server's disks have rotted; these batches in its log are whole.
    pub(crate) fn rotted(&mut self, process: usize, whole: Vec<store::BatchFacts>) {
        self.durable.rotted(process, whole);
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
