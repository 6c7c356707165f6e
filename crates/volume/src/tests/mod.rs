//! Tests of the head against model members in a small simulated world.

mod client;
mod clocks;
mod deposed;
mod faults;
mod latency;
mod model;
mod oracle;
mod random;
mod scenarios;
mod world;
