//! What happened to the heads here, told from how they were a moment ago: for the cluster's log of
//! events.

use std::collections::BTreeMap;
use std::time::Duration;

use base::{Epoch, Health, ServerId, VolumeId};
use cluster::{Event, EventKind};
use shell::control::{HeadPhase, HeadStatus, MemberMode, MemberStatus};

use super::view::View;
use crate::size::format_size;

/// Requests that waited for less are no news.
const STALL_TOLD_AFTER: Duration = Duration::from_secs(1);
/// A member that a new head has not reached for this long is lost.
const LOST_AFTER: Duration = Duration::from_secs(3);

/// The heads as they were.
#[derive(Default)]
pub(super) struct Watch {
    heads: BTreeMap<VolumeId, Seen>,
    /// Why there is no session to a server.
    down: BTreeMap<ServerId, String>,
}

#[derive(Default)]
struct Seen {
    epoch: Epoch,
    open: bool,
    stalled: bool,
    size_bytes: u64,
    members: BTreeMap<ServerId, SeenMember>,
}

#[derive(Default)]
struct SeenMember {
    live: bool,
    lost: bool,
    degraded: Option<String>,
    filling: bool,
}

/// One event, whose time the caller sets.
pub(super) fn event(
    kind: EventKind,
    volume: Option<VolumeId>,
    server: Option<ServerId>,
    text: String,
    cause: impl Into<String>,
) -> Event {
    Event { at_ms: cluster::unix_ms(), kind, volume, server, text, cause: cause.into() }
}

/// A head here has written again what a member could not read.
pub(super) fn mended(
    view: &View,
    volume: VolumeId,
    server: ServerId,
    blocks: u32,
    lba: u64,
) -> Event {
    let (name, at) = (view.volume_name(volume), view.server_name(server));
    let plural = if blocks == 1 { "block" } else { "blocks" };
    let text = format!("{blocks} {plural} of volume {name} on {at} at LBA {lba} are whole again");
    let cause =
        "the server could not read them; they were written again with another member's copy";
    event(EventKind::Mended, Some(volume), Some(server), text, cause)
}

impl Watch {
    /// A session to a server has ended.
    pub(super) fn note_down(&mut self, server: ServerId, reason: String) {
        self.down.insert(server, reason);
    }

    /// There is a session to a server.
    pub(super) fn note_up(&mut self, server: ServerId) {
        self.down.remove(&server);
    }

    /// What is new of the heads.
    pub(super) fn news(&mut self, heads: &[HeadStatus], view: &View, holder: &str) -> Vec<Event> {
        let mut events = Vec::new();
        self.heads.retain(|volume, seen| {
            let stays = heads.iter().any(|head| head.volume == *volume);
            if !stays && seen.open {
                events.push(ended(*volume, seen.epoch, view, holder));
            }
            stays
        });
        for head in heads {
            let known = self.heads.entry(head.volume).or_default();
            if known.epoch != head.epoch {
                *known = Seen { epoch: head.epoch, ..Seen::default() };
            }
            let volume = view.volume_name(head.volume);
            known.phase(head, &volume, holder, &mut events);
            for member in &head.members {
                let server = view.server_name(member.server);
                let words = Words { volume: &volume, server: &server };
                let known = known.members.entry(member.server).or_default();
                known.news(head, member, words, &self.down, &mut events);
            }
        }
        events
    }
}

impl Seen {
    fn phase(&mut self, head: &HeadStatus, volume: &str, holder: &str, events: &mut Vec<Event>) {
        let mut tell = |kind, text: String, cause: &str| {
            events.push(event(kind, Some(head.volume), None, text, cause));
        };
        let stalled = match &head.phase {
            HeadPhase::Open => None,
            HeadPhase::Stalled { reason, duration } => Some((reason, duration)),
            HeadPhase::Opening { .. } | HeadPhase::Draining | HeadPhase::Superseded { .. } => {
                return;
            }
        };
        if !self.open {
            self.open = true;
            tell(EventKind::Opened, format!("{holder} serves volume {volume}"), "");
        }
        if self.size_bytes != 0 && head.size_bytes > self.size_bytes {
            let text = format!("volume {volume} has {} now", format_size(head.size_bytes));
            tell(EventKind::Resized, text, "");
        }
        self.size_bytes = head.size_bytes;
        match stalled {
            Some((reason, duration)) if !self.stalled && *duration >= STALL_TOLD_AFTER => {
                self.stalled = true;
                tell(EventKind::Stalled, format!("requests to volume {volume} wait"), reason);
            }
            None if self.stalled => {
                self.stalled = false;
                tell(EventKind::Resumed, format!("requests to volume {volume} go on"), "");
            }
            Some(_) | None => {}
        }
    }
}

#[derive(Clone, Copy)]
struct Words<'a> {
    volume: &'a str,
    server: &'a str,
}

impl SeenMember {
    fn news(
        &mut self,
        head: &HeadStatus,
        member: &MemberStatus,
        Words { volume, server }: Words<'_>,
        down: &BTreeMap<ServerId, String>,
        events: &mut Vec<Event>,
    ) {
        let mut tell = |kind, text: String, cause: String| {
            events.push(event(kind, Some(head.volume), Some(member.server), text, cause));
        };
        let gone = match member.mode {
            MemberMode::Down => self.live || member.mode_for >= LOST_AFTER,
            MemberMode::Opening
            | MemberMode::CatchingUp
            | MemberMode::Filling
            | MemberMode::Live
            | MemberMode::NeedsFill
            | MemberMode::Failed => false,
        };
        if gone && !self.lost {
            self.lost = true;
            let text = format!("volume {volume} has lost its member on {server}");
            tell(EventKind::MemberLost, text, lost_cause(member, down));
        } else if self.lost && member.mode == MemberMode::Live {
            self.lost = false;
            let text = format!("the member of volume {volume} on {server} is back");
            tell(EventKind::MemberBack, text, String::new());
        }
        self.live = member.mode == MemberMode::Live;
        let degraded = degraded(member);
        if let Some(cause) = degraded.as_ref().filter(|_| self.degraded.is_none()) {
            let text = format!("the member of volume {volume} on {server} is degraded");
            tell(EventKind::Degraded, text, cause.clone());
        }
        self.degraded = degraded;
        if member.filling.is_some() && !self.filling {
            let text = format!("filling the member of volume {volume} on {server}");
            tell(EventKind::FillStarted, text, String::new());
        }
        self.filling = member.filling.is_some();
    }
}

/// What became of a volume whose head here is gone.
fn ended(volume: VolumeId, epoch: Epoch, view: &View, holder: &str) -> Event {
    let name = view.volume_name(volume);
    let entry = view.volume(volume).filter(|entry| entry.volume.epoch > epoch);
    let (kind, text) = match entry.map(|entry| &entry.volume.holder) {
        Some(Some(by)) => {
            let text = format!("{} has taken volume {name} from {holder}", by.name);
            (EventKind::TakenOver, text)
        }
        Some(None) | None => {
            (EventKind::Released, format!("{holder} no longer serves volume {name}"))
        }
    };
    event(kind, Some(volume), None, text, "")
}

fn lost_cause(member: &MemberStatus, down: &BTreeMap<ServerId, String>) -> String {
    let mut cause = match down.get(&member.server) {
        Some(reason) => reason.clone(),
        None => "it does not answer".to_owned(),
    };
    match member.others_say {
        Some(Health::Silent) => cause.push_str("; other servers do not hear of it either"),
        Some(Health::Healthy | Health::Degraded) => cause.push_str("; other servers reach it"),
        Some(Health::Unknown) | None => {}
    }
    cause
}

fn degraded(member: &MemberStatus) -> Option<String> {
    if member.device_failed {
        return Some("a device of its pool has failed".to_owned());
    }
    match (&member.degraded, member.slow_for) {
        (Some(reason), _) => Some(reason.clone()),
        (None, Some(_)) => Some("it answers far later than the others".to_owned()),
        (None, None) => None,
    }
}
