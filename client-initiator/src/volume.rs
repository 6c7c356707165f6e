//! `holdfast volume …`

use std::time::{Duration, Instant};

use base::{Durability, Policy, Role, VolumeId};
use cluster::volumes::{self, CreateError, NewVolume};
use cluster::{ClusterStore, Create, ServerEntry, VolumeEntry, lease, servers, unix_ms};
use serde::Serialize;
use target_daemon::size::format_size;

use crate::arguments::{CreateArguments, DeleteArguments, StoreArgument};
use crate::exit::{Exit, Failure};
use crate::output::{Output, table};
use crate::server;

/// How long `volume create` waits for servers that are registered but do not run.
const SERVERS_WAIT: Duration = Duration::from_secs(5);
/// How long one look at the store waits for news.
const TURN: Duration = Duration::from_millis(500);

/// A volume in the JSON of `volume create`, `volume show` and, as a list, `volume list`.
#[derive(Serialize)]
struct VolumeView {
    /// UUID.
    id: String,
    name: String,
    size_bytes: u64,
    block_size: u32,
    replicas: u8,
    /// `flush` or `durable`.
    durability: Durability,
    stall_deadline_ms: Option<u64>,
    read_only: bool,
    /// `ready`, `attached`, `provisioning` or `deleting`.
    state: &'static str,
    epoch: u64,
    /// Who holds its lease.
    holder: Option<String>,
    members: Vec<MemberView>,
}

/// A member of a volume.
#[derive(Serialize)]
struct MemberView {
    /// UUID.
    server_id: String,
    /// The server's name, or its id if it is not registered.
    server: String,
    /// `provisioning`, `in_sync` or `catching_up`.
    role: Role,
    /// As in `server list`; `gone` if it is not registered, `replaced` if it has another pool.
    server_state: &'static str,
}

fn view(entry: &VolumeEntry, all: &[ServerEntry]) -> VolumeView {
    let volume = &entry.volume;
    let now_ms = unix_ms();
    let member = |member: &base::Member| {
        let known = all.iter().find(|known| known.server.id == member.server);
        MemberView {
            server_id: member.server.to_string(),
            server: servers::name_of(all, member.server),
            role: member.role,
            server_state: match known {
                None => "gone",
                Some(known) if known.server.pool != member.pool => "replaced",
                Some(known) => server::state(known, now_ms),
            },
        }
    };
    let provisioning = pending(entry).next().is_some();
    VolumeView {
        id: volume.id.to_string(),
        name: volume.name.clone(),
        size_bytes: volume.size_bytes,
        block_size: volume.block_size.bytes(),
        replicas: volume.policy.replicas,
        durability: volume.policy.durability,
        stall_deadline_ms: volume.policy.stall_deadline_ms,
        read_only: volume.policy.read_only,
        state: match (entry.deleted, provisioning, &volume.holder) {
            (true, _, _) => "deleting",
            (false, true, _) => "provisioning",
            (false, false, Some(_)) => "attached",
            (false, false, None) => "ready",
        },
        epoch: volume.epoch.0,
        holder: volume.holder.as_ref().map(|holder| holder.name.clone()),
        members: entry.shard.members.iter().map(member).collect(),
    }
}

/// The members whose servers have not made their replicas.
fn pending(entry: &VolumeEntry) -> impl Iterator<Item = &base::Member> {
    entry.shard.members.iter().filter(|member| member.role == Role::Provisioning)
}

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
    };
    let created = create_when_possible(store.as_ref(), &new, arguments.wait, output)?;
    let entry = match arguments.wait {
        0 => created,
        seconds => {
            wait_for_replicas(store.as_ref(), created, Duration::from_secs(seconds), output)?
        }
    };
    let view = view(&entry, &store.servers()?);
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
    let views: Vec<_> = store.volumes()?.iter().map(|entry| view(entry, &servers)).collect();
    output.print(&views, || {
        let row = |view: &VolumeView| {
            let names: Vec<_> = view.members.iter().map(|member| member.server.as_str()).collect();
            vec![
                view.name.clone(),
                format_size(view.size_bytes),
                view.state.to_owned(),
                names.join(","),
                view.holder.clone().unwrap_or_default(),
            ]
        };
        let rows: Vec<_> = views.iter().map(row).collect();
        table(&["NAME", "SIZE", "STATE", "SERVERS", "HOLDER"], &rows)
    });
    Ok(())
}

pub(crate) fn show(store: &StoreArgument, volume: &str, output: &Output) -> Result<(), Failure> {
    let store = cluster::open(store.address()?, Create::Never)?;
    let entry = volumes::find(store.as_ref(), volume)?;
    let view = view(&entry, &store.servers()?);
    output.print(&view, || {
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
            format!("epoch       {}", view.epoch),
            format!("holder      {}", view.holder.as_deref().unwrap_or("none")),
        ];
        for member in &view.members {
            let (server, role, state) = (&member.server, member.role, member.server_state);
            lines.push(format!("member      {server}: {role}, server {state}"));
        }
        lines.join("\n")
    });
    Ok(())
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
