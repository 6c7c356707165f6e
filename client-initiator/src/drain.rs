//! `holdfast server drain` and `undrain`.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use cluster::drain::{self, Remaining};
use cluster::{ClusterStore, Create, ServerEntry, VolumeEntry};
use serde::Serialize;

use crate::arguments::{DrainArguments, StoreArgument};
use crate::exit::{Exit, Failure};
use crate::output::Output;
use crate::progress::{Done, Progress};
use crate::server::{find, state};
use crate::view::view;
use crate::volume::{filled, status_of};

/// How long one look at the store waits for news.
const TURN: Duration = Duration::from_millis(500);

/// The JSON of `server drain` and `server undrain`.
#[derive(Serialize)]
struct DrainView {
    /// UUID.
    id: String,
    name: String,
    /// `draining`, `drained` (nothing is left, it can be stopped) or `in_use`.
    state: &'static str,
    /// Volumes with a replica there.
    replicas: Vec<String>,
    /// Volumes that it holds for a guest.
    held: Vec<String>,
}

pub(crate) fn drain(
    store: &StoreArgument,
    arguments: &DrainArguments,
    output: &Output,
) -> Result<(), Failure> {
    let store = cluster::open(store.address()?, Create::Never)?;
    let store = store.as_ref();
    let name = find(store, &arguments.server)?.server.name;
    let entry = drain::drain(store, &name, arguments.force)?;
    let left = match arguments.wait {
        None => Remaining::on(&entry, &store.volumes()?),
        Some(limit) => wait_until_empty(store, &name, limit.map(Duration::from_secs), output)?,
    };
    output.print(&drain_view(&entry, &left, "draining"), || {
        if left.is_empty() {
            format!("server {name} is empty: it is safe to stop it (and `holdfast server undrain {name}` takes it into use again)")
        } else {
            format!("server {name} is being emptied: {}; `holdfast server drain {name} --wait` shows how far it is", what_is_left(&left))
        }
    });
    Ok(())
}

pub(crate) fn undrain(store: &StoreArgument, server: &str, output: &Output) -> Result<(), Failure> {
    let store = cluster::open(store.address()?, Create::Never)?;
    let name = find(store.as_ref(), server)?.server.name;
    let entry = drain::undrain(store.as_ref(), &name)?;
    let left = Remaining::on(&entry, &store.volumes()?);
    output.print(&drain_view(&entry, &left, "in_use"), || format!("server {name} is in use again"));
    Ok(())
}

fn drain_view(entry: &ServerEntry, left: &Remaining, state: &'static str) -> DrainView {
    DrainView {
        id: entry.server.id.to_string(),
        name: entry.server.name.clone(),
        state: if state == "draining" && left.is_empty() { "drained" } else { state },
        replicas: left.replicas.clone(),
        held: left.held.clone(),
    }
}

fn wait_until_empty(
    store: &dyn ClusterStore,
    name: &str,
    limit: Option<Duration>,
    output: &Output,
) -> Result<Remaining, Failure> {
    let start = Instant::now();
    let mut progress = Progress::new(output);
    loop {
        let revision = store.revision()?;
        let entry = find(store, name)?;
        let volumes = store.volumes()?;
        let left = Remaining::on(&entry, &volumes);
        if left.is_empty() {
            return Ok(left);
        }
        if entry.server.draining.is_none() {
            let text = format!("somebody has taken server '{name}' into use again meanwhile");
            return Err(Failure::new(Exit::Conflict, text));
        }
        if limit.is_some_and(|limit| start.elapsed() >= limit) {
            drop(progress);
            let text = format!(
                "after {} s server '{name}' is not empty: {}; the draining goes on (or give it up \
                 with `holdfast server undrain {name}`){}",
                start.elapsed().as_secs(),
                what_is_left(&left),
                advice(&entry, &left, &volumes)
            );
            return Err(Failure::new(Exit::NotReady, text));
        }
        let what = format!("emptying {name}: {}", what_is_left(&left));
        progress.show(output, &what, copied(store, &left)?);
        store.wait_for_change(revision, TURN)?;
    }
}

fn advice(entry: &ServerEntry, left: &Remaining, volumes: &[VolumeEntry]) -> String {
    let mut parts = String::new();
    if state(entry, cluster::unix_ms()) != "up" {
        parts.push_str("; the server does not run, so it cannot give back what it holds");
    }
    let volumes: Vec<_> =
        volumes.iter().filter(|entry| left.held.contains(&entry.volume.name)).collect();
    for volume in volumes {
        let name = &volume.volume.name;
        let said = entry.server.problems.iter().find(|said| said.volume == volume.volume.id);
        let _infallible = match said {
            Some(said) => write!(parts, "; volume {name}: {}", said.reason),
            None => write!(
                parts,
                "; volume {name}: its head has not been given back yet (`holdfast volume show {name}`)"
            ),
        };
    }
    parts
}

fn what_is_left(left: &Remaining) -> String {
    let part = |names: &[String], what: &str| match names {
        [] => None,
        [only] => Some(format!("{what} of volume {only}")),
        more => Some(format!("{what}s of {} volumes", more.len())),
    };
    let parts: Vec<_> = [part(&left.replicas, "the replica"), part(&left.held, "the head")]
        .into_iter()
        .flatten()
        .collect();
    format!("{} left", parts.join(" and "))
}

/// How far the copies that take the place of its replicas are, together.
fn copied(store: &dyn ClusterStore, left: &Remaining) -> Result<Done, Failure> {
    let (statuses, servers) = (store.statuses()?, store.servers()?);
    let volumes = store.volumes()?;
    let moving = volumes.iter().filter(|entry| left.replicas.contains(&entry.volume.name));
    Ok(moving
        .map(|entry| filled(&view(entry, &servers, status_of(&statuses, entry).as_ref())))
        .fold(Done::default(), Done::and))
}
