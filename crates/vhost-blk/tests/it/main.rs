//! The crate from outside: real sockets, a real client, a back end that answers from memory.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod capacity;
mod client;
mod front_end;
mod handover;
mod socket;
mod support;
