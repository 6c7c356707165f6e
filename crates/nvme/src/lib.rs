//! NVMe over TCP: PDU codec, commands, target and initiator machines (L1, sans-I/O).
//!
//! Everything between machines speaks this protocol: stock initiators use a volume as an NVMe
//! namespace, heads use a server's replicas through vendor-specific commands. `docs/protocol.md`
//! has every layout, opcode and status code.
//!
//! * [`codec`] turns PDUs, commands, completions and log pages into bytes and back.
//! * [`target`] is the server's side, one [`Target`] for all connections of a process.
//! * [`initiator`] is the other side, one [`Initiator`] for each peer server.
//! * [`io`] is the contract that both have with the shell that owns the sockets.
//! * [`state`] is the layout of the in-band state messages.
//!
//! Nothing here does I/O, reads a clock or draws a random number, and nothing that a peer sends
//! can make it panic.

pub mod codec;
pub mod initiator;
pub mod io;
mod link;
pub mod nqn;
mod outbox;
pub mod state;
pub mod target;

pub use initiator::{Initiator, InitiatorConfig};
pub use io::{ConnectionId, Receive, ReceiveRegion, SessionId, Tag};
pub use nqn::Subsystem;
pub use target::{Target, TargetConfig, VolumeExport};
