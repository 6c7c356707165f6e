//! Joins the sans-I/O node to the reactor and the vhost-user front ends (L2).

pub mod control;
