//! Emptying a server: its replicas and heads go elsewhere, and then it can be stopped, and
//! forgotten.

use std::fmt;

use base::membership::in_sync_floor;
use base::{Epoch, Member, Role, ServerId};

use crate::error::{StoreError, StoreErrorKind};
use crate::placement::{Picture, spare};
use crate::records::{Draining, ServerEntry, VolumeEntry, unix_ms};
use crate::servers::named;
use crate::store::ClusterStore;
use crate::volumes::ATTEMPTS;

/// Why a server is not to be emptied, or taken into use again.
#[derive(Debug, thiserror::Error)]
pub enum DrainError {
    /// None has this name.
    #[error("there is no server '{0}'; `holdfast server list` shows what there is")]
    NotFound(String),
    /// Some of its replicas could not go anywhere.
    #[error(
        "server '{server}' cannot be emptied: {}; add or start servers, or delete those volumes, or \
         give --force to move what can be moved",
        stuck.iter().map(Stuck::to_string).collect::<Vec<_>>().join("; ")
    )]
    Stuck {
        /// The server's name.
        server: String,
        /// The volumes that would keep it from being empty.
        stuck: Vec<Stuck>,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// A volume that keeps a replica on a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stuck {
    /// Its name.
    pub volume: String,
    /// Why the replica cannot go elsewhere.
    pub reason: String,
}

impl fmt::Display for Stuck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "volume {}: {}", self.volume, self.reason)
    }
}

/// Orders the server `name` to be emptied: it gets no new replicas, and whoever holds a volume with a
/// replica there moves that elsewhere. Refused if some replicas have nowhere to go, unless `force` is
/// set. Nothing happens to one that is being emptied already. The server as it is then.
pub fn drain(store: &dyn ClusterStore, name: &str, force: bool) -> Result<ServerEntry, DrainError> {
    set(store, name, |entry| {
        if entry.server.draining.is_some() {
            return Ok(Order::Stands);
        }
        let since_ms = unix_ms();
        let stuck = would_stick(entry, &store.volumes()?, store.servers()?, since_ms);
        if stuck.is_empty() || force {
            return Ok(Order::Set(Some(Draining { since_ms })));
        }
        Err(DrainError::Stuck { server: name.to_owned(), stuck })
    })
}

/// Takes a server that is being emptied, or is empty, into use again.
pub fn undrain(store: &dyn ClusterStore, name: &str) -> Result<ServerEntry, DrainError> {
    set(store, name, |entry| {
        Ok(if entry.server.draining.is_some() { Order::Set(None) } else { Order::Stands })
    })
}

enum Order {
    Set(Option<Draining>),
    Stands,
}

/// Sets the flag to what `decide` says, if the picture that it decided on is still true then.
fn set(
    store: &dyn ClusterStore,
    name: &str,
    decide: impl Fn(&ServerEntry) -> Result<Order, DrainError>,
) -> Result<ServerEntry, DrainError> {
    let mut attempt = 0;
    loop {
        // The revision first: whatever changes after it makes the change fail.
        let revision = store.revision()?;
        let not_found = || DrainError::NotFound(name.to_owned());
        let entry = named(store, name)?.ok_or_else(not_found)?;
        let draining = match decide(&entry)? {
            Order::Stands => return Ok(entry),
            Order::Set(draining) => draining,
        };
        attempt += 1;
        match store.set_draining(entry.server.id, draining, revision) {
            Ok(()) => return named(store, name)?.ok_or_else(not_found),
            Err(StoreError { kind: StoreErrorKind::NoServer(_), .. }) => return Err(not_found()),
            Err(error) if error.is_conflict() && attempt < ATTEMPTS => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// The volumes whose replicas on `leaving` could not be made elsewhere, if all were moved at once.
pub fn would_stick(
    leaving: &ServerEntry,
    volumes: &[VolumeEntry],
    servers: Vec<ServerEntry>,
    now_ms: u64,
) -> Vec<Stuck> {
    let mut picture = Picture::of(volumes, servers);
    for entry in &mut picture.servers {
        if entry.server.id == leaving.server.id {
            entry.server.draining = Some(Draining { since_ms: now_ms });
        }
    }
    let here = |member: &&Member| is_on(member, leaving);
    let mut moving: Vec<_> = volumes
        .iter()
        .filter(|entry| !entry.deleted)
        .filter_map(|entry| Some((entry, *entry.shard.members.iter().find(here)?)))
        .collect();
    // The large ones first: what is left is easier to place.
    moving.sort_by_key(|(entry, _)| (u64::MAX - entry.volume.size_bytes, entry.volume.id));
    let mut stuck = Vec::new();
    for (entry, member) in moving {
        if let Err(reason) = place_one(entry, member, leaving, &mut picture, now_ms) {
            stuck.push(Stuck { volume: entry.volume.name.clone(), reason });
        }
    }
    stuck
}

/// Finds a place for one replica and promises it.
fn place_one(
    entry: &VolumeEntry,
    member: Member,
    leaving: &ServerEntry,
    picture: &mut Picture,
    now_ms: u64,
) -> Result<(), String> {
    let runs = |id: ServerId| picture.server(id).is_some_and(|server| server.is_alive(now_ms));
    let others = entry.shard.members.iter().filter(|other| other.server != leaving.server.id);
    let running = others.filter(|other| other.role != Role::Leaving && runs(other.server));
    let staying: Vec<_> = running.clone().map(|other| other.server).collect();
    let in_sync = running.filter(|other| other.role == Role::InSync).count();
    if staying.len() >= usize::from(entry.volume.policy.replicas) {
        return Ok(()); // enough are there, or on their way
    }
    if member.role == Role::Provisioning && entry.volume.epoch == Epoch::NONE {
        return Err("its replicas are still being made; try again when they are".to_owned());
    }
    let last = member.role == Role::InSync && in_sync == 0;
    if last && !leaving.is_alive(now_ms) {
        return Err(
            "its last copy is here, and this server does not run; start it first".to_owned()
        );
    }
    let found = spare(entry, &staying, picture, now_ms).map(|spare| spare.server.id);
    let copy = if last { "its last copy is here, and " } else { "" };
    let server =
        found.map_err(|why| format!("{copy}no other server can take a replica ({why})"))?;
    picture.usage.promise(server, entry);
    Ok(())
}

/// Why a server is not to be forgotten.
#[derive(Debug, thiserror::Error)]
pub enum RemoveError {
    /// None has this name.
    #[error("there is no server '{0}'; `holdfast server list` shows what there is")]
    NotFound(String),
    /// It runs.
    #[error("server '{0}' is running; drain it and stop it first")]
    Running(String),
    /// It keeps replicas that count, or are to.
    #[error(
        "server '{server}' keeps replicas of {}; start it and drain it first (if its pool is gone for \
         good, give --force: the volumes are healed from their other copies)",
        volumes.join(", ")
    )]
    InUse {
        /// The server's name.
        server: String,
        /// Names of the volumes.
        volumes: Vec<String>,
    },
    /// Too few copies of some volumes would be left.
    #[error(
        "server '{server}' keeps copies that {} cannot do without: fewer than half of their copies are \
         elsewhere; start it again, or delete those volumes",
        volumes.join(", ")
    )]
    BelowFloor {
        /// The server's name.
        server: String,
        /// Names of the volumes.
        volumes: Vec<String>,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Forgets a server that does not run: nobody waits for it any more. With `force`, though it keeps
/// replicas; never, if they leave some volume with fewer members in sync elsewhere than its floor.
pub fn remove(store: &dyn ClusterStore, name: &str, force: bool) -> Result<(), RemoveError> {
    let not_found = || RemoveError::NotFound(name.to_owned());
    let entry = named(store, name)?.ok_or_else(not_found)?;
    if entry.is_alive(unix_ms()) {
        return Err(RemoveError::Running(name.to_owned()));
    }
    let (mut kept, mut needed) = (Vec::new(), Vec::new());
    for volume in store.volumes()?.iter().filter(|volume| !volume.deleted) {
        let members = &volume.shard.members;
        let Some(own) = members.iter().find(|member| is_on(member, &entry)) else { continue };
        let elsewhere = volume.shard.in_sync().filter(|server| *server != entry.server.id).count();
        let floor = in_sync_floor(volume.volume.policy.replicas);
        if own.role == Role::InSync && elsewhere < floor {
            needed.push(volume.volume.name.clone());
        }
        kept.push(volume.volume.name.clone());
    }
    let server = name.to_owned();
    if !needed.is_empty() {
        return Err(RemoveError::BelowFloor { server, volumes: needed });
    }
    if !kept.is_empty() && !force {
        return Err(RemoveError::InUse { server, volumes: kept });
    }
    Ok(store.remove_server(entry.server.id)?)
}

/// What keeps a server from being empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Remaining {
    /// Names of the volumes with a replica in its pool, those that are to be deleted too.
    pub replicas: Vec<String>,
    /// Names of the volumes that it holds.
    pub held: Vec<String>,
}

impl Remaining {
    /// What is left on the server of `entry`.
    pub fn on(entry: &ServerEntry, volumes: &[VolumeEntry]) -> Self {
        let (id, pool) = (entry.server.id, entry.server.pool);
        let mut remaining = Self::default();
        for volume in volumes {
            let members = &volume.shard.members;
            if members.iter().any(|member| member.server == id && member.pool == pool) {
                remaining.replicas.push(volume.volume.name.clone());
            }
            let holder = volume.volume.holder.as_ref();
            if holder.is_some_and(|holder| holder.id.bytes() == id.bytes()) {
                remaining.held.push(volume.volume.name.clone());
            }
        }
        remaining
    }

    /// True if the server can be stopped, and its pool taken away.
    pub fn is_empty(&self) -> bool {
        self.replicas.is_empty() && self.held.is_empty()
    }
}

/// A member of this server's pool that is not leaving it already.
fn is_on(member: &Member, server: &ServerEntry) -> bool {
    member.server == server.server.id
        && member.pool == server.server.pool
        && member.role != Role::Leaving
}
