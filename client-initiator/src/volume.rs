//! `holdfast volume …`

use std::time::{Duration, Instant};

use base::{Policy, VolumeId};
use cluster::named_failover::name_failover;
use cluster::volumes::{self, CreateError, NewVolume};
use cluster::{
    ClusterStore, Create, ServerEntry, VolumeEntry, VolumeStatus, lease, servers, unix_ms,
};
use serde::Serialize;
use target_daemon::size::format_size;

use crate::arguments::{
    CreateArguments, DeleteArguments, FailoverArguments, StoreArgument, WaitArguments,
};
use crate::exit::{Exit, Failure};
use crate::output::{Output, table};
use crate::progress::{Done, Progress};
use crate::server;
use crate::view::{self, Health, VolumeView, pending, view};

/// How long `volume create` waits for servers that are registered but do not run.
const SERVERS_WAIT: Duration = Duration::from_secs(5);
/// How long one look at the store waits for news.
const TURN: Duration = Duration::from_millis(500);

pub(crate) fn create(
    store: &StoreArgument,
    arguments: &CreateArguments,
    output: &Output,
) -> Result<(), Failure> {
    let store = cluster::open(store.address()?, Create::Never)?;
    let new = NewVolume {
        name: arguments.name.clone(),
        size_bytes: arguments.size,
        block_size: arguments.block_size,
        policy: Policy {
            replicas: arguments.replicas,
            durability: arguments.durability.into(),
            stall_deadline_ms: arguments.stall_deadline,
            read_only: arguments.read_only,
        },
        failover: arguments.failover.clone(),
    };
    let created = create_when_possible(store.as_ref(), &new, arguments.wait, output)?;
    let entry = match arguments.wait {
        0 => created,
        seconds => {
            wait_for_replicas(store.as_ref(), created, Duration::from_secs(seconds), output)?
        }
    };
    let view = view(&entry, &store.servers()?, None);
    output.print(&view, || {
        let names: Vec<_> = view.members.iter().map(|member| member.server.as_str()).collect();
        let size = format_size(view.size_bytes);
        format!("created volume {} ({size}) on {}: {}", view.name, names.join(", "), view.state)
    });
    Ok(())
}

/// Creates the volume; waits a moment for servers that are registered but do not run: they may
/// have been started just now.
fn create_when_possible(
    store: &dyn ClusterStore,
    new: &NewVolume,
    wait_seconds: u64,
    output: &Output,
) -> Result<VolumeEntry, Failure> {
    let start = Instant::now();
    let wait = SERVERS_WAIT.min(Duration::from_secs(wait_seconds));
    loop {
        let revision = store.revision()?;
        match volumes::create(store, new) {
            Err(CreateError::Placement(error)) if error.may_pass() && start.elapsed() < wait => {
                output.progress("waiting for servers that are not running");
                store.wait_for_change(revision, TURN)?;
            }
            created => {
                output.progress("");
                return Ok(created?);
            }
        }
    }
}

fn wait_for_replicas(
    store: &dyn ClusterStore,
    mut entry: VolumeEntry,
    wait: Duration,
    output: &Output,
) -> Result<VolumeEntry, Failure> {
    let start = Instant::now();
    loop {
        let revision = store.revision()?;
        let current = store.volume(entry.volume.id)?.filter(|current| !current.deleted);
        entry = current.ok_or_else(|| {
            let text = format!("volume '{}' was deleted meanwhile", entry.volume.name);
            Failure::new(Exit::Conflict, text)
        })?;
        let (missing, all) = (pending(&entry).count(), entry.shard.members.len());
        if missing == 0 {
            output.progress("");
            return Ok(entry);
        }
        output.progress(&format!("{} of {all} servers have made their replica", all - missing));
        let left = wait.saturating_sub(start.elapsed());
        if left.is_zero() {
            output.progress("");
            return Err(not_provisioned(&entry, &store.servers()?, wait));
        }
        store.wait_for_change(revision, left.min(TURN))?;
    }
}

fn not_provisioned(entry: &VolumeEntry, all: &[ServerEntry], wait: Duration) -> Failure {
    let now_ms = unix_ms();
    let say = |member: &base::Member| {
        let name = servers::name_of(all, member.server);
        let Some(known) = all.iter().find(|known| known.server.id == member.server) else {
            return format!("{name} (not registered any more)");
        };
        let mut problems = known.server.problems.iter();
        match problems.find(|problem| problem.volume == entry.volume.id) {
            Some(problem) => format!("{name} ({})", problem.reason),
            None => format!("{name} ({})", server::state(known, now_ms)),
        }
    };
    let missing: Vec<_> = pending(entry).map(say).collect();
    let name = &entry.volume.name;
    let text = format!(
        "volume '{name}' was created, but after {} s these servers have not made their replica: \
         {}; it is ready when they have (`holdfast volume show {name}`), or give it up with \
         `holdfast volume delete {name}`",
        wait.as_secs(),
        missing.join(", "),
    );
    Failure::new(Exit::NotReady, text)
}

pub(crate) fn list(store: &StoreArgument, output: &Output) -> Result<(), Failure> {
    let store = cluster::open(store.address()?, Create::Never)?;
    let servers = store.servers()?;
    let statuses = store.statuses()?;
    let one = |entry: &VolumeEntry| view(entry, &servers, status_of(&statuses, entry).as_ref());
    let views: Vec<_> = store.volumes()?.iter().map(one).collect();
    output.print(&views, || {
        let row = |view: &VolumeView| {
            let names: Vec<_> = view.members.iter().map(|member| member.server.as_str()).collect();
            vec![
                view.name.clone(),
                format_size(view.size_bytes),
                view.state.to_owned(),
                view.health.word().to_owned(),
                names.join(","),
                view.holder.clone().unwrap_or_default(),
            ]
        };
        let rows: Vec<_> = views.iter().map(row).collect();
        table(&["NAME", "SIZE", "STATE", "HEALTH", "SERVERS", "HOLDER"], &rows)
    });
    Ok(())
}

/// Events that are searched for guests that wait: those of the last minute, unless very much happens.
const EVENTS_LOOKED_AT: u64 = 500;

pub(crate) fn show(store: &StoreArgument, volume: &str, output: &Output) -> Result<(), Failure> {
    let store = cluster::open(store.address()?, Create::Never)?;
    let entry = volumes::find(store.as_ref(), volume)?;
    let status = status_of(&store.statuses()?, &entry);
    let mut view = view(&entry, &store.servers()?, status.as_ref());
    let first = store.last_event()?.saturating_sub(EVENTS_LOOKED_AT);
    let events = store.events(first, usize::try_from(EVENTS_LOOKED_AT).unwrap_or(usize::MAX))?;
    view.waiting = view::waiting(&events, entry.volume.id, cluster::unix_ms());
    output.print(&view, || view::text(&view));
    Ok(())
}

/// Waits until a volume is healthy. A command of its own, and not an option of `show`, because its
/// exit status is an answer: 0 when all copies are there, 5 when they are not in time.
pub(crate) fn wait(
    store: &StoreArgument,
    arguments: &WaitArguments,
    output: &Output,
) -> Result<(), Failure> {
    let store = cluster::open(store.address()?, Create::Never)?;
    let id = volumes::find(store.as_ref(), &arguments.volume)?.volume.id;
    let start = Instant::now();
    let limit = arguments.timeout.map(Duration::from_secs);
    let mut progress = Progress::new(output);
    loop {
        let revision = store.revision()?;
        let entry = store.volume(id)?.filter(|entry| !entry.deleted).ok_or_else(|| {
            let text = format!("volume '{}' was deleted meanwhile", arguments.volume);
            Failure::new(Exit::NotFound, text)
        })?;
        let status = status_of(&store.statuses()?, &entry);
        let view = view(&entry, &store.servers()?, status.as_ref());
        if view.health == Health::Healthy && view.state != "provisioning" {
            drop(progress);
            output.print(&view, || format!("volume {} is healthy", view.name));
            return Ok(());
        }
        if limit.is_some_and(|limit| start.elapsed() >= limit) {
            drop(progress);
            let text = format!(
                "volume '{}' is {} after {} s: {}",
                view.name,
                view.health.word(),
                start.elapsed().as_secs(),
                view.problems.join("; ")
            );
            return Err(Failure::new(Exit::NotReady, text));
        }
        progress.show(output, &what_is_waited_for(&view), filled(&view));
        store.wait_for_change(revision, TURN)?;
    }
}

fn what_is_waited_for(view: &VolumeView) -> String {
    let filling =
        |member: &&view::MemberView| member.seen.as_ref().is_some_and(|seen| seen.fill.is_some());
    let names: Vec<_> =
        view.members.iter().filter(filling).map(|member| member.server.as_str()).collect();
    if names.is_empty() {
        format!("volume {}: {}", view.name, view.problems.join("; "))
    } else {
        format!("volume {}: filling {}", view.name, names.join(", "))
    }
}

/// How far the fillings of a volume are, together.
pub(crate) fn filled(view: &VolumeView) -> Done {
    let fills = view.members.iter().filter_map(|member| member.seen.as_ref()?.fill);
    fills.fold(Done::default(), |all, fill| {
        all.and(Done {
            copied_bytes: fill.copied_bytes,
            total_bytes: fill.total_bytes,
            bytes_per_second: fill.bytes_per_second,
        })
    })
}

pub(crate) fn failover(
    store: &StoreArgument,
    arguments: &FailoverArguments,
    output: &Output,
) -> Result<(), Failure> {
    let store = cluster::open(store.address()?, Create::Never)?;
    let id = volumes::find(store.as_ref(), &arguments.volume)?.volume.id;
    let entry = name_failover(store.as_ref(), id, &arguments.servers)?;
    let view = view(&entry, &store.servers()?, None);
    output.print(&view, || match view.failover.as_slice() {
        [] => format!("volume {} has no failover server: none qualifies", view.name),
        names => format!("failover servers of volume {}: {}", view.name, names.join(", ")),
    });
    Ok(())
}

/// What the volume's holder published.
pub(crate) fn status_of(statuses: &[VolumeStatus], entry: &VolumeEntry) -> Option<VolumeStatus> {
    statuses.iter().find(|status| status.volume == entry.volume.id).cloned()
}

/// The JSON of `volume delete` and `volume release`.
#[derive(Serialize)]
struct ChangedView {
    /// UUID.
    id: String,
    name: String,
    /// `deleting`, `deleted`, `released` or `unheld` (there was nothing to release).
    state: &'static str,
}

pub(crate) fn delete(
    store: &StoreArgument,
    arguments: &DeleteArguments,
    output: &Output,
) -> Result<(), Failure> {
    let store = cluster::open(store.address()?, Create::Never)?;
    let entry = volumes::find(store.as_ref(), &arguments.volume)?;
    let id = entry.volume.id;
    volumes::delete(store.as_ref(), id)?;
    let gone = wait_for_purge(store.as_ref(), id, Duration::from_secs(arguments.wait))?;
    let view = ChangedView {
        id: id.to_string(),
        name: entry.volume.name,
        state: if gone { "deleted" } else { "deleting" },
    };
    output.print(&view, || {
        let note = if gone { "" } else { "; its servers remove its replicas as they run" };
        format!("deleted volume {}{note}", view.name)
    });
    Ok(())
}

fn wait_for_purge(store: &dyn ClusterStore, id: VolumeId, wait: Duration) -> Result<bool, Failure> {
    let start = Instant::now();
    loop {
        let revision = store.revision()?;
        if store.volume(id)?.is_none() {
            return Ok(true);
        }
        let left = wait.saturating_sub(start.elapsed());
        if left.is_zero() {
            return Ok(false);
        }
        store.wait_for_change(revision, left.min(TURN))?;
    }
}

pub(crate) fn release(
    store: &StoreArgument,
    volume: &str,
    force: bool,
    output: &Output,
) -> Result<(), Failure> {
    let store = cluster::open(store.address()?, Create::Never)?;
    let entry = volumes::find(store.as_ref(), volume)?;
    let holder = lease::release_forced(store.as_ref(), entry.volume.id, force)?;
    let view = ChangedView {
        id: entry.volume.id.to_string(),
        name: entry.volume.name,
        state: if holder.is_some() { "released" } else { "unheld" },
    };
    output.print(&view, || match &holder {
        Some(holder) => format!("released volume {} from {holder}", view.name),
        None => format!("nobody holds volume {}", view.name),
    });
    Ok(())
}
