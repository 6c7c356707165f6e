//! A volume as people and programs are shown it: what the cluster store says, and what its holder
//! has published.

use base::{Durability, Role, ServerId, VolumeId};
use cluster::{
    Event, EventKind, FillReport, MemberReport, Rates, ServerEntry, VolumeEntry, VolumeStatus,
    servers, unix_ms,
};
use serde::Serialize;
use target_daemon::size::format_size;

use crate::server;

/// A volume in the JSON of `volume create`, `volume show`, `volume wait` and, as a list, `volume
/// list`.
#[derive(Serialize)]
pub(crate) struct VolumeView {
    /// UUID.
    pub(crate) id: String,
    pub(crate) name: String,
    pub(crate) size_bytes: u64,
    pub(crate) block_size: u32,
    pub(crate) replicas: u8,
    /// `flush` or `durable`.
    pub(crate) durability: Durability,
    pub(crate) stall_deadline_ms: Option<u64>,
    pub(crate) read_only: bool,
    /// `ready`, `attached`, `repairing` (a server holds it to heal it and gives way to anybody),
    /// `provisioning` or `deleting`.
    pub(crate) state: &'static str,
    /// How its data is: see [`Health`].
    pub(crate) health: Health,
    /// What keeps it from being healthy, for people.
    pub(crate) problems: Vec<String>,
    pub(crate) epoch: u64,
    /// Who holds its lease.
    pub(crate) holder: Option<String>,
    /// The holder's guest has stopped the disk: a standby takes the lease when a guest starts there.
    pub(crate) yieldable: bool,
    /// Where a guest has been waiting for the lease lately, and why; only in `volume show`.
    pub(crate) waiting: Option<String>,
    pub(crate) members: Vec<MemberView>,
    /// The names of the servers that can take a lost member's place, best first.
    pub(crate) failover: Vec<String>,
    /// Those that an operator named for that, whether or not they qualify now.
    pub(crate) preferred_failover: Vec<String>,
    /// What the holder told last, if it told anything in this epoch.
    pub(crate) head: Option<HeadView>,
}

/// How a volume's data is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Health {
    /// As many copies as were asked for, all up to date as far as anybody knows.
    Healthy,
    /// Served, or ready to be; a copy is missing, away, slow or being filled.
    Degraded,
    /// Requests wait.
    Stalled,
    /// Held, and its holder has told nothing for a while.
    Unknown,
}

impl Health {
    pub(crate) const fn word(self) -> &'static str {
        match self {
            Self::Healthy => "healthy",
            Self::Degraded => "degraded",
            Self::Stalled => "stalled",
            Self::Unknown => "unknown",
        }
    }
}

/// A member of a volume.
#[derive(Serialize)]
pub(crate) struct MemberView {
    /// UUID.
    pub(crate) server_id: String,
    /// The server's name, or its id if it is not registered.
    pub(crate) server: String,
    /// `provisioning`, `in_sync`, `catching_up` or `leaving`.
    pub(crate) role: Role,
    /// As in `server list`; `gone` if it is not registered, `replaced` if it has another pool.
    pub(crate) server_state: &'static str,
    /// Its server is being drained.
    pub(crate) draining: bool,
    /// How the head sees it, if it has told so lately.
    pub(crate) seen: Option<SeenView>,
}

/// A member as the head sees it.
#[derive(Serialize)]
pub(crate) struct SeenView {
    /// What the head does with it; empty for nothing out of the ordinary.
    pub(crate) mode: String,
    /// For how long it has been in that mode.
    pub(crate) for_ms: u64,
    pub(crate) connected: bool,
    /// The last record it has.
    pub(crate) last_seq: u64,
    /// The last record it has on media.
    pub(crate) durable_seq: u64,
    /// Records behind the head's newest; `null` while unknown.
    pub(crate) behind: Option<u64>,
    /// Much slower than the others.
    pub(crate) slow: bool,
    pub(crate) fill: Option<FillView>,
}

/// How far a filling is.
#[derive(Clone, Copy, Serialize)]
pub(crate) struct FillView {
    pub(crate) copied_bytes: u64,
    pub(crate) total_bytes: u64,
    pub(crate) bytes_per_second: u64,
    pub(crate) seconds_left: Option<u64>,
}

/// What a holder tells of its head.
#[derive(Serialize)]
pub(crate) struct HeadView {
    /// How old this is.
    pub(crate) told_ms_ago: u64,
    /// Recent enough to be true.
    pub(crate) current: bool,
    /// `open`, `opening` and others.
    pub(crate) phase: String,
    /// Why requests wait, if they do.
    pub(crate) stalled: Option<StallView>,
    /// The newest record.
    pub(crate) last_seq: u64,
    /// Records up to here are acknowledged.
    pub(crate) commit_seq: u64,
    /// Requests begun and not answered.
    pub(crate) in_flight: u64,
    /// Requests that wait to be begun.
    pub(crate) queued: u64,
    /// What guests do and see.
    pub(crate) rates: Rates,
}

/// Why and for how long requests wait.
#[derive(Serialize)]
pub(crate) struct StallView {
    pub(crate) reason: String,
    /// Milliseconds since 1970.
    pub(crate) since_ms: u64,
    pub(crate) for_ms: u64,
}

/// The members whose servers have not made their replicas.
pub(crate) fn pending(entry: &VolumeEntry) -> impl Iterator<Item = &base::Member> {
    entry.shard.members.iter().filter(|member| member.role == Role::Provisioning)
}

/// What was told longer ago than this of a guest that waits says nothing about now: it is told again
/// every [`target_daemon::follow::TELL_AGAIN`].
const WAITING_MS: u64 = 45_000;
const _: () = assert!(WAITING_MS / 1000 > target_daemon::follow::TELL_AGAIN.as_secs());

/// A volume as it is shown. `status` is what its holder published.
pub(crate) fn view(
    entry: &VolumeEntry,
    all: &[ServerEntry],
    status: Option<&VolumeStatus>,
) -> VolumeView {
    let volume = &entry.volume;
    let now_ms = unix_ms();
    // What the head of an earlier epoch told is history.
    let status = status.filter(|status| status.epoch == volume.epoch && volume.holder.is_some());
    let current = status.filter(|status| status.is_current(entry, now_ms));
    let members: Vec<MemberView> = entry
        .shard
        .members
        .iter()
        .map(|member| member_view(member, all, current, now_ms))
        .collect();
    let (health, problems) = judge(entry, &members, status, now_ms);
    let names =
        |ids: &[ServerId]| ids.iter().map(|id| servers::name_of(all, *id)).collect::<Vec<_>>();
    VolumeView {
        id: volume.id.to_string(),
        name: volume.name.clone(),
        size_bytes: volume.size_bytes,
        block_size: volume.block_size.bytes(),
        replicas: volume.policy.replicas,
        durability: volume.policy.durability,
        stall_deadline_ms: volume.policy.stall_deadline_ms,
        read_only: volume.policy.read_only,
        state: state(entry),
        health,
        problems,
        epoch: volume.epoch.0,
        holder: volume.holder.as_ref().map(|holder| holder.name.clone()),
        yieldable: volume.holder.as_ref().is_some_and(|holder| holder.yieldable),
        waiting: None,
        members,
        failover: names(&entry.shard.failover),
        preferred_failover: names(&entry.shard.preferred_failover),
        head: status.map(|status| head_view(status, entry, now_ms)),
    }
}

/// Who told lately that a guest waits for the volume's lease, if nobody has opened the volume since.
pub(crate) fn waiting(events: &[(u64, Event)], volume: VolumeId, now_ms: u64) -> Option<String> {
    let of_volume = events.iter().rev().map(|(_, event)| event);
    let last = of_volume
        .filter(|event| event.volume == Some(volume))
        .find(|event| matches!(event.kind, EventKind::Waiting | EventKind::Opened))?;
    let lately = now_ms.saturating_sub(last.at_ms) <= WAITING_MS;
    (last.kind == EventKind::Waiting && lately).then(|| format!("{}: {}", last.text, last.cause))
}

fn state(entry: &VolumeEntry) -> &'static str {
    // A volume that was opened once does not wait for members that are added later.
    let provisioning = entry.volume.epoch.0 == 0 && pending(entry).next().is_some();
    match (entry.deleted, provisioning, &entry.volume.holder) {
        (true, _, _) => "deleting",
        (false, true, _) => "provisioning",
        (false, false, Some(holder)) if holder.repair => "repairing",
        (false, false, Some(_)) => "attached",
        (false, false, None) => "ready",
    }
}

fn member_view(
    member: &base::Member,
    all: &[ServerEntry],
    status: Option<&VolumeStatus>,
    now_ms: u64,
) -> MemberView {
    let known = all.iter().find(|known| known.server.id == member.server);
    let report = status.and_then(|status| report_of(status, member.server));
    MemberView {
        server_id: member.server.to_string(),
        server: servers::name_of(all, member.server),
        role: member.role,
        server_state: match known {
            None => "gone",
            Some(known) if known.server.pool != member.pool => "replaced",
            Some(known) => server::state(known, now_ms),
        },
        draining: known.is_some_and(|known| known.server.draining.is_some()),
        seen: report.map(|report| seen_view(report, now_ms)),
    }
}

fn report_of(status: &VolumeStatus, server: ServerId) -> Option<&MemberReport> {
    status.members.iter().find(|report| report.server == server)
}

fn seen_view(report: &MemberReport, now_ms: u64) -> SeenView {
    SeenView {
        mode: report.mode.clone(),
        for_ms: now_ms.saturating_sub(report.since_ms),
        connected: report.connected,
        last_seq: report.last,
        durable_seq: report.durable,
        behind: report.lag,
        slow: report.slow,
        fill: report.fill.as_ref().map(fill_view),
    }
}

fn fill_view(fill: &FillReport) -> FillView {
    FillView {
        copied_bytes: fill.copied_bytes,
        total_bytes: fill.total_bytes,
        bytes_per_second: fill.bytes_per_second,
        seconds_left: fill.seconds_left(),
    }
}

fn head_view(status: &VolumeStatus, entry: &VolumeEntry, now_ms: u64) -> HeadView {
    HeadView {
        told_ms_ago: now_ms.saturating_sub(status.written_ms),
        current: status.is_current(entry, now_ms),
        phase: status.phase.clone(),
        stalled: status.stall.as_ref().map(|stall| StallView {
            reason: stall.reason.clone(),
            since_ms: stall.since_ms,
            for_ms: now_ms.saturating_sub(stall.since_ms),
        }),
        last_seq: status.last,
        commit_seq: status.commit,
        in_flight: status.in_flight,
        queued: status.queued,
        rates: status.rates,
    }
}

/// The verdict on a volume, and what speaks against it.
fn judge(
    entry: &VolumeEntry,
    members: &[MemberView],
    status: Option<&VolumeStatus>,
    now_ms: u64,
) -> (Health, Vec<String>) {
    let mut problems: Vec<String> = members.iter().filter_map(complaint).collect();
    let counted = members.iter().filter(|member| member.role == Role::InSync).count();
    let wanted = usize::from(entry.volume.policy.replicas);
    if counted < wanted {
        problems.insert(0, format!("{counted} of {wanted} copies are in sync"));
    }
    let held = entry.volume.holder.as_ref();
    let mut health = if problems.is_empty() { Health::Healthy } else { Health::Degraded };
    match (held, status) {
        (Some(holder), None) => {
            problems.insert(0, format!("{} has told nothing about it yet", holder.name));
            health = Health::Unknown;
        }
        (Some(_), Some(status)) if !status.is_current(entry, now_ms) => {
            let ago = duration_text(now_ms.saturating_sub(status.written_ms));
            problems.insert(0, format!("{} was last heard of {ago} ago", status.holder));
            health = Health::Unknown;
        }
        (Some(_), Some(status)) => {
            if let Some(stall) = &status.stall {
                let time = duration_text(now_ms.saturating_sub(stall.since_ms));
                problems.insert(0, format!("requests have waited for {time}: {}", stall.reason));
                health = Health::Stalled;
            }
        }
        (None, _) => {}
    }
    (health, problems)
}

/// What is wrong with a member, if something is.
fn complaint(member: &MemberView) -> Option<String> {
    let server = &member.server;
    let seen = member.seen.as_ref();
    let text = match member.role {
        Role::Leaving => return None,
        Role::Provisioning => "makes its replica".to_owned(),
        Role::CatchingUp => match seen.and_then(|seen| seen.fill) {
            Some(fill) => format!("is being filled, {}", fill_text(&fill)),
            None => "is behind".to_owned(),
        },
        Role::InSync => seen.map_or_else(|| unseen(member), |seen| noticed(seen, member))?,
    };
    Some(format!("{server} {text}"))
}

/// Records that a member may be behind and count as up to date.
const BEHIND_MAX: u64 = 1000;

/// What is wrong with a member that the head has told of, if something is.
fn noticed(seen: &SeenView, member: &MemberView) -> Option<String> {
    if !seen.connected {
        return Some(format!("has been {} for {}", seen.mode, duration_text(seen.for_ms)));
    }
    // Under load everybody is a few records behind.
    let follows =
        seen.mode.is_empty() || seen.mode.starts_with(|first: char| first.is_ascii_digit());
    if !follows || seen.behind.is_some_and(|behind| behind > BEHIND_MAX) {
        return Some(format!("is not up to date: {}", seen.mode));
    }
    if seen.slow {
        return Some("is much slower than the others".to_owned());
    }
    member.draining.then(|| "is being drained".to_owned())
}

/// The same of one that no head has told of.
fn unseen(member: &MemberView) -> Option<String> {
    if member.server_state != "up" {
        return Some(format!("is {}", member.server_state));
    }
    member.draining.then(|| "is being drained".to_owned())
}

/// A filling in a few words.
pub(crate) fn fill_text(fill: &FillView) -> String {
    if fill.copied_bytes >= fill.total_bytes {
        // How much there is to copy is not known (any more): the log's end grows.
        let (copied, rate) = (format_size(fill.copied_bytes), format_size(fill.bytes_per_second));
        return format!("{copied} at {rate}/s");
    }
    let left = match fill.seconds_left {
        Some(seconds) => format!("{} left", duration_text(seconds.saturating_mul(1000))),
        None => "standing still".to_owned(),
    };
    format!(
        "{} of {} at {}/s, {left}",
        format_size(fill.copied_bytes),
        format_size(fill.total_bytes),
        format_size(fill.bytes_per_second),
    )
}

/// A time span for people.
pub(crate) fn duration_text(ms: u64) -> String {
    let seconds = ms / 1000;
    match seconds {
        0 => format!("{ms} ms"),
        1..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{} h {} min", seconds / 3600, seconds / 60 % 60),
        _ => format!("{} d {} h", seconds / 86_400, seconds / 3600 % 24),
    }
}

/// The text of `volume show`.
pub(crate) fn text(view: &VolumeView) -> String {
    let stall = match view.stall_deadline_ms {
        None => "waits for ever without a quorum".to_owned(),
        Some(ms) => format!("error after {ms} ms without a quorum"),
    };
    let durability = match view.durability {
        Durability::Flush => "flush",
        Durability::Durable => "durable",
    };
    let mut lines = vec![
        format!("name        {}", view.name),
        format!("id          {}", view.id),
        format!("size        {} ({} bytes)", format_size(view.size_bytes), view.size_bytes),
        format!("block size  {}", view.block_size),
        format!("policy      {} replicas, {durability}, {stall}", view.replicas),
        format!("read only   {}", if view.read_only { "yes" } else { "no" }),
        format!("state       {}", view.state),
        format!("health      {}", view.health.word()),
    ];
    lines.extend(view.problems.iter().map(|problem| format!("            {problem}")));
    lines.push(format!("epoch       {}", view.epoch));
    let note = if view.yieldable { " (yieldable: its guest has stopped the disk)" } else { "" };
    lines.push(format!("holder      {}{note}", view.holder.as_deref().unwrap_or("none")));
    lines.extend(view.waiting.iter().map(|waiting| format!("waiting     {waiting}")));
    if let Some(head) = &view.head {
        lines.extend(head_lines(head));
    }
    lines.extend(view.members.iter().map(member_line));
    if !view.failover.is_empty() {
        lines.push(format!("failover    {}", view.failover.join(", ")));
    }
    if !view.preferred_failover.is_empty() {
        lines.push(format!("            named: {}", view.preferred_failover.join(", ")));
    }
    lines.join("\n")
}

fn head_lines(head: &HeadView) -> Vec<String> {
    let ago = duration_text(head.told_ms_ago);
    let note = if head.current { "" } else { ", which is too old to say anything about now" };
    let mut lines = vec![
        format!("head        {}, as told {ago} ago{note}", head.phase),
        format!(
            "records     {} written, {} acknowledged, {} requests in flight, {} waiting",
            head.last_seq, head.commit_seq, head.in_flight, head.queued
        ),
    ];
    if let Some(stall) = &head.stalled {
        let time = duration_text(stall.for_ms);
        lines.push(format!("stalled     for {time}: {}", stall.reason));
    }
    lines
}

fn member_line(member: &MemberView) -> String {
    let (server, role, state) = (&member.server, member.role, member.server_state);
    let draining = if member.draining { ", draining" } else { "" };
    let mut line = format!("member      {server}: {role}, server {state}{draining}");
    let Some(seen) = &member.seen else { return line };
    let mut add = |text: String| {
        line.push_str(", ");
        line.push_str(&text);
    };
    if !seen.mode.is_empty() && !seen.mode.starts_with(|first: char| first.is_ascii_digit()) {
        add(format!("{} for {}", seen.mode, duration_text(seen.for_ms)));
    }
    add(format!("record {}", seen.last_seq));
    if let Some(behind) = seen.behind.filter(|behind| *behind > 0) {
        add(format!("{behind} behind"));
    }
    if seen.slow {
        add("slow".to_owned());
    }
    if let Some(fill) = &seen.fill {
        add(format!("filled {}", fill_text(fill)));
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `volume show` prints in a word is a row of a table, with what to do in its last cell.
    #[test]
    fn the_manual_explains_every_word() {
        let manual = include_str!("../../docs/operations.md");
        let states = ["provisioning", "ready", "attached", "repairing", "deleting"];
        let healths = [Health::Healthy, Health::Degraded, Health::Stalled, Health::Unknown];
        let roles = [Role::Provisioning, Role::CatchingUp, Role::InSync, Role::Leaving];
        let servers = ["new", "up", "stopped", "down", "gone", "replaced"];
        let all = states.into_iter().chain(servers).map(str::to_owned);
        let all = all.chain(healths.into_iter().map(|health| health.word().to_owned()));
        for word in all.chain(roles.into_iter().map(|role| role.to_string())) {
            let explains = |row: &str| {
                let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
                cells[0] == word && cells.last().is_some_and(|what| !what.is_empty())
            };
            let mut rows = manual.lines().filter(|line| line.starts_with('|'));
            assert!(rows.any(explains), "docs/operations.md does not explain '{word}'");
        }
    }

    #[test]
    fn spans() {
        for (ms, text) in [
            (0, "0 ms"),
            (999, "999 ms"),
            (59_999, "59 s"),
            (61_000, "1 min 1 s"),
            (3_660_000, "1 h 1 min"),
            (90_000_000, "1 d 1 h"),
        ] {
            assert_eq!(duration_text(ms), text);
        }
    }
}
