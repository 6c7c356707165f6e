//! `holdfast server …`

use std::collections::BTreeMap;

use cluster::{ClusterStore, Create, ServerEntry, Usage, unix_ms};
use serde::Serialize;
use target_daemon::size::format_size;

use crate::arguments::StoreArgument;
use crate::exit::{Exit, Failure};
use crate::output::{Output, table};

/// A server in `server list --json`.
#[derive(Serialize)]
struct ServerView {
    /// UUID.
    id: String,
    name: String,
    /// UUID.
    pool: String,
    /// `up`, `down` (not heard of), `stopped` or `new` (has not run yet).
    state: &'static str,
    /// It is being emptied, since when (milliseconds since 1970).
    draining_since_ms: Option<u64>,
    /// Milliseconds since it was last heard of.
    last_seen_ms_ago: Option<u64>,
    addresses: Vec<String>,
    labels: BTreeMap<String, String>,
    /// Home space.
    capacity_bytes: u64,
    /// Home space that volumes have been promised.
    promised_bytes: u64,
    /// Home space that is free in the pool.
    free_bytes: u64,
    version: String,
    /// What it could not do.
    problems: Vec<String>,
}

/// How a server is, in a word.
pub(crate) fn state(entry: &ServerEntry, now_ms: u64) -> &'static str {
    if entry.last_seen_ms == 0 {
        "new"
    } else if entry.server.stopped {
        "stopped"
    } else if entry.is_alive(now_ms) {
        "up"
    } else {
        "down"
    }
}

/// The server with this name or id.
pub(crate) fn find(store: &dyn ClusterStore, text: &str) -> Result<ServerEntry, Failure> {
    let id = text.parse().ok();
    let is_meant = |entry: &ServerEntry| entry.server.name == text || Some(entry.server.id) == id;
    store.servers()?.into_iter().find(is_meant).ok_or_else(|| {
        let text =
            format!("there is no server '{text}'; `holdfast server list` shows what there is");
        Failure::new(Exit::NotFound, text)
    })
}

pub(crate) fn list(store: &StoreArgument, output: &Output) -> Result<(), Failure> {
    let store = cluster::open(store.address()?, Create::Never)?;
    let servers = store.servers()?;
    let usage = Usage::of(&store.volumes()?, &servers);
    let now_ms = unix_ms();
    let view = |entry: &ServerEntry| {
        let server = &entry.server;
        ServerView {
            id: server.id.to_string(),
            name: server.name.clone(),
            pool: server.pool.to_string(),
            state: state(entry, now_ms),
            draining_since_ms: server.draining.map(|draining| draining.since_ms),
            last_seen_ms_ago: (entry.last_seen_ms != 0)
                .then(|| now_ms.saturating_sub(entry.last_seen_ms)),
            addresses: server.addresses.iter().map(ToString::to_string).collect(),
            labels: server.labels.clone(),
            capacity_bytes: server.capacity_bytes,
            promised_bytes: usage.bytes(server.id),
            free_bytes: server.free_bytes,
            version: server.version.clone(),
            problems: server.problems.iter().map(|problem| problem.reason.clone()).collect(),
        }
    };
    let views: Vec<ServerView> = servers.iter().map(view).collect();
    output.print(&views, || {
        let row = |view: &ServerView| {
            vec![
                view.name.clone(),
                match view.draining_since_ms {
                    Some(_) => format!("{}, draining", view.state),
                    None => view.state.to_owned(),
                },
                view.addresses.join(","),
                format_size(view.capacity_bytes),
                format_size(view.promised_bytes),
                view.problems.join("; "),
            ]
        };
        let rows: Vec<_> = views.iter().map(row).collect();
        table(&["NAME", "STATE", "ADDRESS", "CAPACITY", "PROMISED", "PROBLEMS"], &rows)
    });
    Ok(())
}

/// The JSON of `server remove`.
#[derive(Serialize)]
struct RemovedView {
    /// UUID.
    id: String,
    name: String,
}

pub(crate) fn remove(
    store: &StoreArgument,
    server: &str,
    force: bool,
    output: &Output,
) -> Result<(), Failure> {
    let store = cluster::open(store.address()?, Create::Never)?;
    let server = find(store.as_ref(), server)?.server;
    cluster::servers::remove(store.as_ref(), &server.name, force)?;
    let view = RemovedView { id: server.id.to_string(), name: server.name };
    output.print(&view, || {
        format!(
            "server {} is forgotten; its pool can join again only after `holdfast pool format --force`",
            view.name
        )
    });
    Ok(())
}
