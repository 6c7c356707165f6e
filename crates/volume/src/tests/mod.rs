//! Tests of the head against model members in a small simulated world.

mod bench;
mod client;
mod clocks;
mod control;
mod deposed;
mod faults;
mod fill;
mod full;
mod growth;
mod latency;
mod membership;
mod mend;
mod model;
mod news;
mod oracle;
mod random;
mod scenarios;
mod settings;
mod unreadable;
mod world;
