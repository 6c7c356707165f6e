//! Deterministic simulation of a cluster (L3).
//!
//! A [`World`] runs the production machines ([`node::Node`] with everything below it) and replaces
//! only what lies underneath: disks page by page with a volatile cache ([`disk`]), connections as
//! byte pipes, the clock, and the cluster store's answer to who may be head. One seed decides a
//! run. The [`oracle`] says what reads may return.

mod content;
pub mod disk;
mod guest;
mod network;
pub mod oracle;
mod process;
pub mod random;
mod world;

pub use world::{Report, World, WorldConfig};
