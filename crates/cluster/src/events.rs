//! What happened in the cluster, one line each with its cause.

use std::fmt;

use base::{ServerId, VolumeId};
use serde::{Deserialize, Serialize};

/// Events that a store keeps; older ones are dropped.
pub const EVENTS_MAX: u64 = 10_000;

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// When, in milliseconds since 1970.
    pub at_ms: u64,
    /// What kind of thing.
    pub kind: EventKind,
    /// The volume it happened to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volume: Option<VolumeId>,
    /// The server it happened to or at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server: Option<ServerId>,
    /// What happened, with names, for people.
    pub text: String,
    /// Why, for people; empty if that is all there is to say.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub cause: String,
}

/// Kinds of events, for filters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EventKind {
    /// A head opened a volume in a new epoch.
    Opened,
    /// A head gave a volume back.
    Released,
    /// A holder took a volume from another one.
    TakenOver,
    /// A guest waits for a volume that another holder has and does not yield.
    Waiting,
    /// Requests began to wait.
    Stalled,
    /// Requests go on.
    Resumed,
    /// A volume's guests may use its new size.
    Resized,
    /// A member fell silent or was lost.
    MemberLost,
    /// A member is back.
    MemberBack,
    /// A member is slow, or refuses some work.
    Degraded,
    /// Blocks that a member could not read were written again.
    Mended,
    /// A server was given a replica.
    MemberAdded,
    /// A member's filling began.
    FillStarted,
    /// A member turned in sync.
    InSync,
    /// A member does not count for now.
    Demoted,
    /// A member was taken out.
    MemberRemoved,
    /// A volume cannot be healed at present.
    HealRefused,
    /// A server heals a volume that nobody holds.
    RepairStarted,
    /// Such a healing ended.
    RepairEnded,
    /// A server is to be emptied.
    DrainStarted,
    /// A server is empty and can be stopped.
    Drained,
    /// A server takes replicas again.
    Undrained,
    /// A server runs.
    ServerUp,
    /// A server stopped, or was not heard of.
    ServerDown,
    /// Written by a newer version of this program.
    #[serde(other)]
    Other,
}

impl fmt::Display for EventKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Opened => "opened",
            Self::Released => "released",
            Self::TakenOver => "taken over",
            Self::Waiting => "waiting",
            Self::Stalled => "stalled",
            Self::Resumed => "resumed",
            Self::Resized => "resized",
            Self::MemberLost => "member lost",
            Self::MemberBack => "member back",
            Self::Degraded => "degraded",
            Self::Mended => "mended",
            Self::MemberAdded => "member added",
            Self::FillStarted => "fill started",
            Self::InSync => "in sync",
            Self::Demoted => "demoted",
            Self::MemberRemoved => "member removed",
            Self::HealRefused => "not healed",
            Self::RepairStarted => "repair started",
            Self::RepairEnded => "repair ended",
            Self::DrainStarted => "drain started",
            Self::Drained => "drained",
            Self::Undrained => "undrained",
            Self::ServerUp => "server up",
            Self::ServerDown => "server down",
            Self::Other => "other",
        })
    }
}
