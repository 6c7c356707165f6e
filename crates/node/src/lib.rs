//! A server or an initiator composed of store, nvme and volume (L1, sans-I/O).
//!
//! A [`Node`] is everything that one process does on the data path, without the I/O: its pool
//! ([`store::Store`]), the connections it accepted ([`nvme::Target`]), the servers it connects to
//! ([`nvme::Initiator`]) and the heads of the volumes it serves ([`volume::Head`]). It only routes;
//! each of the four decides for itself. What it adds is who may command a replica and hear its
//! answers (`replica_service`, the replica's ack gate).
//!
//! * `node` — the routes.
//! * `io` — what goes in and comes out.
//! * `replica_service` — sessions and epochs of this server's replicas.
//! * `damage` — what of them a scrub could not read.
//! * `fills` — fills this server's replicas from those of other servers.
//! * `heads`, `peers` — who of them has something to say.
//! * `metrics` — what is counted.

mod damage;
mod fills;
mod heads;
mod io;
mod legacy;
pub mod metrics;
mod node;
mod peers;
mod replica_service;

pub use crate::fills::{FillEvent, FillFailure};
pub use crate::io::{Audience, ConnectionId, FrontEnd, HeadEvent, HeadHandle, Input, Output};
pub use crate::legacy::{Legacy, ReplicaGrant};
pub use crate::node::{Node, NodeConfig, OpenHeadError, ServerConfig};
