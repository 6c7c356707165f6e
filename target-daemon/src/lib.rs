//! The control plane of Holdfast: what `holdfastd` does around the data plane, as a library.
//!
//! [`Daemon`] is a server's: it registers, keeps its replicas as the cluster store wants them
//! ([`registration`]), holds leases and serves exports ([`heads`], [`exports`]), and answers the
//! HTTP API ([`api`]). A [`healer`] looks after the members of the volumes whose heads run here.
//! `holdfast attach` shares [`heads`], [`healer`] and [`logging`]; the command line shares [`size`], [`pool`] and the API's types.
//!
//! Nothing here is on the path of a guest's request. The data plane is behind
//! [`shell::control::DataPlane`], the cluster store behind [`cluster::ClusterStore`]; both block
//! for a bounded time, so they are called from threads of their own or from tokio's blocking ones.

mod announce;
pub mod api;
pub mod config;
mod daemon;
mod drain;
pub mod exports;
pub mod follow;
pub mod heads;
pub mod healer;
pub mod logging;
pub mod metrics;
pub mod notify;
pub mod pool;
pub mod registration;
pub mod retry;
pub mod size;
pub mod socket;
pub mod upgrade;

pub use daemon::{Daemon, DaemonError};

/// The program's version, as servers report it.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
