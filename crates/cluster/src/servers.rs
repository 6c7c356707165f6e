//! Registering servers, and emptying them.

use std::collections::BTreeMap;

use base::{PoolId, Role, ServerId};

use crate::error::{StoreError, StoreErrorKind};
use crate::name::{InvalidName, check_name};
use crate::records::{ServerEntry, ServerRecord, unix_ms};
use crate::store::ClusterStore;

pub use crate::drain::{
    DrainError, Remaining, RemoveError, Stuck, drain, remove, undrain, would_stick,
};

/// Why a server was not registered.
#[derive(Debug, thiserror::Error)]
pub enum RegisterError {
    /// The name cannot be one.
    #[error(transparent)]
    Name(#[from] InvalidName),
    /// A server of this name exists with another pool.
    #[error(
        "server '{name}' has a pool already ({pool}){}; choose another name, or give --force to \
         replace its pool: its replicas are lost then",
        if volumes.is_empty() {
            String::new()
        } else {
            format!(", which keeps replicas of {}", volumes.join(", "))
        }
    )]
    Exists {
        /// The server's name.
        name: String,
        /// Its pool.
        pool: PoolId,
        /// Names of the volumes with a replica in it.
        volumes: Vec<String>,
    },
    /// A server of this name runs.
    #[error("server '{name}' is running with pool {pool}; stop it first")]
    Running {
        /// The server's name.
        name: String,
        /// Its pool.
        pool: PoolId,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The server of this name, if there is one.
pub fn named(store: &dyn ClusterStore, name: &str) -> Result<Option<ServerEntry>, StoreError> {
    Ok(store.servers()?.into_iter().find(|entry| entry.server.name == name))
}

/// The server that owns this pool, if there is one.
pub fn with_pool(
    store: &dyn ClusterStore,
    pool: PoolId,
) -> Result<Option<ServerEntry>, StoreError> {
    Ok(store.servers()?.into_iter().find(|entry| entry.server.pool == pool))
}

/// The id that a new pool's server of this name is to have: its own if `replace` is set and it
/// does not run, a new one for a new name.
pub fn id_for(
    store: &dyn ClusterStore,
    name: &str,
    replace: bool,
) -> Result<ServerId, RegisterError> {
    check_name(name)?;
    let Some(entry) = named(store, name)? else {
        return Ok(ServerId::from_bytes(crate::new_id()));
    };
    let id = entry.server.id;
    let (name, pool) = (name.to_owned(), entry.server.pool);
    if entry.is_alive(unix_ms()) {
        return Err(RegisterError::Running { name, pool });
    }
    if replace {
        return Ok(id);
    }
    let keeps = |member: &base::Member| {
        member.server == entry.server.id
            && member.pool == pool
            && matches!(member.role, Role::InSync | Role::CatchingUp)
    };
    let volumes = store.volumes()?.into_iter();
    let volumes =
        volumes.filter(|volume| !volume.deleted && volume.shard.members.iter().any(keeps));
    let volumes = volumes.map(|volume| volume.volume.name).collect();
    Err(RegisterError::Exists { name, pool, volumes })
}

/// Registers a server of this name, with the id that [`id_for`] gave and a freshly formatted
/// pool. Members in the server's former pool stay named in their shards, as members that are
/// lost. It tells its room when it runs.
pub fn register(
    store: &dyn ClusterStore,
    id: ServerId,
    name: &str,
    pool: PoolId,
) -> Result<(), RegisterError> {
    check_name(name)?;
    let server = ServerRecord {
        id,
        name: name.to_owned(),
        pool,
        addresses: Vec::new(),
        labels: BTreeMap::new(),
        capacity_bytes: 0,
        free_bytes: 0,
        version: String::new(),
        stopped: false,
        problems: Vec::new(),
        draining: None,
    };
    match store.servers()?.into_iter().find(|entry| entry.server.id == id) {
        Some(entry) => store.update_server(&server, entry.version)?,
        None => store.insert_server(&server)?,
    }
    Ok(())
}

/// The name of a server, or its id for one that is not registered (any more).
pub fn name_of(servers: &[ServerEntry], id: ServerId) -> String {
    servers
        .iter()
        .find(|entry| entry.server.id == id)
        .map_or_else(|| id.to_string(), |entry| entry.server.name.clone())
}

/// The error of a server whose pool the store does not know.
pub fn not_registered(store: &dyn ClusterStore, server: ServerId, pool: PoolId) -> StoreError {
    let kind = StoreErrorKind::NotRegistered { server, pool };
    StoreError { store: store.address(), kind }
}
