//! The head of a volume: opening, ordered replication, quorum, reads, flush (L1, sans-I/O).
//!
//! A [`Head`] is the single writer of a shard at one epoch. It talks to members through
//! [`base::ReplicaCommand`] and to front ends through [`base::BlockRequest`]; who carries either is not its
//! business. Time comes in with every call, nothing here blocks.
//!
//! How to drive it:
//! * win the epoch by compare-and-swap, then [`Head::new`];
//! * say [`Input::MemberUp`] once a session to a member's server can take commands, and
//!   [`Input::MemberDown`] when it is gone (commands under way are then taken for lost);
//! * hand over each [`Output::Command`] to its server in the order it came out, and bring its one answer
//!   back as [`Input::Reply`] with the same tag; answers to a lost session may be dropped or
//!   delivered late, both are fine;
//! * after each `handle` take outputs until there are none, and call again with
//!   [`Input::Tick`] at [`Head::next_deadline`].
//!
//! A head ends in one of four ways, each announced once by an output: [`Output::Released`] (after
//! [`Input::Release`]), [`Output::Superseded`] (another head sealed a higher epoch),
//! [`Output::Abandoned`] (after [`Input::Abandon`]) or [`Output::Failed`] (the cluster store says what
//! this head knows to be impossible). Requests that it then still held come back, whole, as
//! [`Output::Returned`]: nothing was decided about them *here* (a write may or may not have
//! landed, just as after a crash) and no guest has seen an answer, so the shell keeps them and
//! submits them to the next head of the volume. An answer [`base::Status::Superseded`] is never
//! produced by a head.
//!
//! What an error means: a request fails with [`base::Status::IoError`] only if every copy of the
//! data is damaged, or if the policy has a stall deadline and it passed. After the latter, a write
//! is *unknown*: it may still land, but never after a newer write to the same blocks was
//! acknowledged, since records take effect and are acknowledged in seq order.
//!
//! What members are told as commit ([`base::ReplicaCommand::commit`]) is less than what is acknowledged:
//! only what is on media at a write quorum. An acknowledged record that no flush covered may be
//! lost with the power of enough members; one that a member had taken home by then could not be taken
//! back. So the head has records put on media a little after they are acknowledged
//! ([`Tunables::settle_delay`], [`Tunables::settle_bytes`]), and keeps them in memory until then,
//! to send them again if a member lost them. A member's log must hold at least that much.
//!
//! Members come and go while a head runs: see [`Head::change_members`] and [`Head::members_changed`].

mod catchup;
mod config;
mod ending;
mod fill;
mod flush;
mod gate;
mod grants;
mod head;
mod health;
mod hedge;
mod hello;
mod holdback;
mod inflight;
mod log;
mod matching;
mod member;
mod membership;
mod mend;
mod opening;
mod overlap;
mod pace;
mod quorum;
mod reads;
mod sessions;
mod size;
mod slow;
mod stall;
mod status;
mod tag;
#[cfg(test)]
mod tests;
mod unreadable;

pub use config::{HeadConfig, HeadError, Tunables};
pub use head::{Head, Input, Output};
pub use holdback::HeldBack;
pub use membership::{FailStop, MembershipError};
pub use status::{Draining, HeadPhase, HeadStatus, MemberMode, MemberStatus, Stall, StallReason};
