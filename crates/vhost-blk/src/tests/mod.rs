//! Tests of the device against a guest in the same thread.

mod chains;
mod crash;
mod headless;
mod life;
mod migration;
mod notify;
