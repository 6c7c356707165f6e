//! The replication protocol as a small model, checked exhaustively (L3).
//!
//! What is modelled: opening in a new epoch (compare-and-swap, seals, choice of the tail, matching,
//! EpochStart), writes and their acknowledgement by quorum, read grants, changes of the in-sync set
//! by the joint rule, release and take-over (a migration is a release followed by a take-over), heads
//! that die and come back, answers that are late. What is not: disks, time-outs, chunk copy, more
//! than one write to a block (a log is compared record by record instead).
//!
//! [`Protocol`] is a [`stateright::Model`]; its properties are invariants of `docs/architecture.md`:
//!
//! * *acknowledged writes survive* (I1, I2, I3): the newest head that serves has every acknowledged
//!   write in its log;
//! * *reads are current* (I4): a head that counts on read grants of a write quorum has committed
//!   every acknowledged write, so whatever it answers is the newest;
//! * *settled logs agree* (I3): what two heads have settled in common is the same;
//! * *one writer an epoch* (I7).
//!
//! A [`Mutant`] leaves one rule out. Tests check that the model holds, and that it does not hold
//! without any one of the rules: a model that cannot fail proves nothing.

#![allow(clippy::trivially_copy_pass_by_ref, reason = "a model's methods take it by reference")]

mod protocol;
mod state;

pub use protocol::{Action, Bounds, Mutant, Protocol};
pub use state::{Head, Member, Phase, Record, State, Store};
