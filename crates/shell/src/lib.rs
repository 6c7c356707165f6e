//! Joins the sans-I/O node to the reactor and the vhost-user front ends (L2).
//!
//! [`start`] runs a data plane on a thread of its own; the control plane holds it as a
//! [`control::DataPlane`]. The thread owns everything that an I/O touches: the reactor, the node,
//! the guests' devices. It decides nothing: outputs of the node become operations of the reactor,
//! completions become inputs.
//!
//! * [`control`] — what the control plane may ask: plain data and one trait.
//! * `plane` — that trait, on top of messages.
//! * `message` — messages to the thread, and waiting for answers.
//! * `worker` — the thread's loop.
//! * `connections`, `exports`, `pool` — sockets, guests' devices, the pool's devices.
//! * `members` — changes of members, state messages.
//! * [`handover`] — leaving everything to another process, or taking it from one.
//! * `report` — status and metrics.

mod connections;
pub mod control;
mod exports;
pub mod handover;
mod members;
mod message;
mod plane;
mod pool;
mod refusals;
mod report;
mod worker;

pub use plane::{Prepared, start};
