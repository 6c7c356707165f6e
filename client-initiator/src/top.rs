//! `holdfast top`: the cluster on one screen, live.

use std::sync::Arc;
use std::time::{Duration, Instant};

use cluster::{ClusterStore, Create, Event, Rates, ServerEntry, StoreError, Usage, unix_ms};
use serde::Serialize;
use target_daemon::size::format_size;

use crate::arguments::{StoreArgument, TopArguments};
use crate::events;
use crate::exit::{Exit, Failure};
use crate::output::{Output, table};
use crate::server::state;
use crate::terminal::{Key, Terminal};
use crate::view::{Health, VolumeView, duration_text, view};
use crate::volume::status_of;

/// Events at the bottom of the screen.
const EVENTS_SHOWN: usize = 8;

/// Everything on the screen; the JSON of `top --json`.
#[derive(Serialize)]
struct Picture {
    /// Milliseconds since 1970.
    at_ms: u64,
    servers: Vec<ServerLine>,
    volumes: Vec<VolumeView>,
    /// The last events, oldest first.
    events: Vec<Event>,
}

#[derive(Serialize)]
struct ServerLine {
    name: String,
    /// As in `server list`.
    state: &'static str,
    draining: bool,
    last_seen_ms_ago: Option<u64>,
    /// Volumes with a replica there.
    replicas: usize,
    /// Volumes whose head is there.
    heads: usize,
    capacity_bytes: u64,
    free_bytes: u64,
    promised_bytes: u64,
    problems: usize,
}

pub(crate) fn run(
    store: &StoreArgument,
    arguments: &TopArguments,
    output: &Output,
) -> Result<(), Failure> {
    let store = cluster::open(store.address()?, Create::Never)?;
    if arguments.once || output.json {
        let picture = look(store.as_ref())?;
        output.print(&picture, || lines(&picture, None).join("\n"));
        return Ok(());
    }
    let taken = Terminal::take().map_err(terminal_failed)?;
    let Some(terminal) = taken else {
        let text = "top needs a terminal; use --once or --json for one picture";
        return Err(Failure::new(Exit::Usage, text));
    };
    live(&store, &terminal, Duration::from_secs(arguments.every))
}

/// Draws again and again, until q. A store that is away is shown, with the last picture.
fn live(
    store: &Arc<dyn ClusterStore>,
    terminal: &Terminal,
    every: Duration,
) -> Result<(), Failure> {
    let mut last = None;
    loop {
        let trouble = match look(store.as_ref()) {
            Ok(picture) => {
                last = Some(picture);
                None
            }
            Err(error) => Some(error.to_string()),
        };
        let shown = match &last {
            Some(picture) => lines(picture, trouble.as_deref()),
            None => trouble.into_iter().collect(),
        };
        terminal.draw(&shown).map_err(terminal_failed)?;
        let next = Instant::now() + every;
        while let Some(left) = next.checked_duration_since(Instant::now()) {
            match terminal.key(left).map_err(terminal_failed)? {
                Some(Key::Quit) => return Ok(()),
                Some(Key::Other) | None => {}
            }
        }
    }
}

#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
fn terminal_failed(error: std::io::Error) -> Failure {
    Failure::new(Exit::Failed, format!("the terminal cannot be used: {error}"))
}

fn look(store: &dyn ClusterStore) -> Result<Picture, StoreError> {
    let now_ms = unix_ms();
    let (volumes, servers, statuses) = (store.volumes()?, store.servers()?, store.statuses()?);
    let usage = Usage::of(&volumes, &servers);
    let server = |entry: &ServerEntry| {
        let remaining = cluster::drain::Remaining::on(entry, &volumes);
        ServerLine {
            name: entry.server.name.clone(),
            state: state(entry, now_ms),
            draining: entry.server.draining.is_some(),
            last_seen_ms_ago: (entry.last_seen_ms != 0)
                .then(|| now_ms.saturating_sub(entry.last_seen_ms)),
            replicas: remaining.replicas.len(),
            heads: remaining.held.len(),
            capacity_bytes: entry.server.capacity_bytes,
            free_bytes: entry.server.free_bytes,
            promised_bytes: usage.bytes(entry.server.id),
            problems: entry.server.problems.len(),
        }
    };
    let shown = u64::try_from(EVENTS_SHOWN).unwrap_or(u64::MAX);
    let after = store.last_event()?.saturating_sub(shown);
    let events = store.events(after, EVENTS_SHOWN)?;
    let mut views: Vec<VolumeView> = volumes
        .iter()
        .map(|entry| view(entry, &servers, status_of(&statuses, entry).as_ref()))
        .collect();
    // What is not well comes first: the screen may be too small for all.
    views.sort_by_key(|view| match view.health {
        Health::Stalled => 0,
        Health::Unknown => 1,
        Health::Degraded => 2,
        Health::Healthy => 3,
    });
    Ok(Picture {
        at_ms: now_ms,
        servers: servers.iter().map(server).collect(),
        volumes: views,
        events: events.into_iter().map(|(_, event)| event).collect(),
    })
}

fn lines(picture: &Picture, trouble: Option<&str>) -> Vec<String> {
    let up = picture.servers.iter().filter(|server| server.state == "up").count();
    let healthy = picture.volumes.iter().filter(|volume| volume.health == Health::Healthy).count();
    let mut lines = vec![format!(
        "holdfast  {}  servers {up}/{} up  volumes {healthy}/{} healthy",
        events::timestamp(picture.at_ms),
        picture.servers.len(),
        picture.volumes.len()
    )];
    if let Some(trouble) = trouble {
        lines.push(format!("the picture is old: {trouble}"));
    }
    lines.push(String::new());
    lines.extend(
        table(
            &[
                "SERVER", "STATE", "SEEN", "REPLICAS", "HEADS", "FREE", "CAPACITY", "PROMISED",
                "PROBLEMS",
            ],
            &picture.servers.iter().map(server_row).collect::<Vec<_>>(),
        )
        .lines()
        .map(str::to_owned),
    );
    lines.push(String::new());
    lines.extend(
        table(
            &[
                "VOLUME",
                "HEALTH",
                "SIZE",
                "HOLDER",
                "READ/S",
                "WRITE/S",
                "READ P99",
                "WRITE P99",
                "MEMBERS",
                "WHAT",
            ],
            &picture.volumes.iter().map(volume_row).collect::<Vec<_>>(),
        )
        .lines()
        .map(str::to_owned),
    );
    if !picture.events.is_empty() {
        lines.push(String::new());
        lines.extend(picture.events.iter().map(events::line));
    }
    lines
}

fn server_row(server: &ServerLine) -> Vec<String> {
    vec![
        server.name.clone(),
        format!("{}{}", server.state, if server.draining { ", draining" } else { "" }),
        server
            .last_seen_ms_ago
            .map_or("never".to_owned(), |ms| format!("{} ago", duration_text(ms))),
        server.replicas.to_string(),
        server.heads.to_string(),
        format_size(server.free_bytes),
        format_size(server.capacity_bytes),
        format_size(server.promised_bytes),
        server.problems.to_string(),
    ]
}

fn volume_row(volume: &VolumeView) -> Vec<String> {
    let head = volume.head.as_ref().filter(|head| head.current);
    let rate = |value: fn(&Rates) -> u64| {
        head.map_or("-".to_owned(), |head| value(&head.rates).to_string())
    };
    let latency = |value: fn(&Rates) -> u64| {
        let us = head.map_or(0, |head| value(&head.rates));
        if us == 0 { "-".to_owned() } else { format!("{us} us") }
    };
    let members: Vec<_> = volume.members.iter().map(|member| member.server.as_str()).collect();
    vec![
        volume.name.clone(),
        volume.health.word().to_owned(),
        format_size(volume.size_bytes),
        volume.holder.clone().unwrap_or_else(|| "none".to_owned()),
        rate(|rates| rates.reads_per_second),
        rate(|rates| rates.writes_per_second),
        latency(|rates| rates.read_p99_us),
        latency(|rates| rates.write_p99_us),
        members.join(","),
        volume.problems.join("; "),
    ]
}
