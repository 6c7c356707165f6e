//! Deterministic simulation of a cluster (L3).
//!
//! A [`World`] runs the production machines ([`node::Node`] with everything below it) and replaces
//! only what lies underneath: disks page by page with a volatile cache ([`disk`]), connections as
//! TCP keeps them, clocks, and the cluster store's answers. One seed decides a run: what goes wrong
//! is a list made from it ([`faults`]). The [`oracle`] says what reads may return, [`places`] what a
//! good set of runs must have come through.

mod checkers;
mod clock;
mod cluster_store;
mod content;
pub mod disk;
pub mod faults;
mod guest;
mod network;
pub mod oracle;
pub mod places;
mod process;
mod queue;
pub mod random;
pub mod runner;
mod trace;
mod world;

pub use process::PoolLayout;
pub use world::{Habits, Report, World, WorldConfig};
