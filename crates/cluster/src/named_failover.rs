//! Failover servers that an operator names.
//!
//! A volume has failover servers without anybody's doing ([`crate::failover`]). Whoever knows better
//! names some: while they qualify, they are the first ones.

use base::{ServerId, VolumeId};

use crate::error::{StoreError, StoreErrorKind};
use crate::placement::{FAILOVER_MAX, Picture, failover, home_bytes, room};
use crate::records::{ServerEntry, VolumeEntry, unix_ms};
use crate::store::ClusterStore;
use crate::volumes::ATTEMPTS;

/// Why a server that was named cannot be a volume's failover server. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum NamedError {
    /// None has this name.
    #[error("there is no server '{0}'; `holdfast server list` shows what there is")]
    NotFound(String),
    /// Named twice.
    #[error("server '{0}' is named twice")]
    Twice(String),
    /// More than a volume has.
    #[error("a volume has up to {FAILOVER_MAX} failover servers, not {0}")]
    TooMany(usize),
    /// It keeps a replica.
    #[error(
        "server '{0}' keeps a replica of the volume, so it cannot take the place of another one; \
         name servers that keep none (`holdfast volume show` says which do)"
    )]
    Member(String),
    /// It could not take a replica now.
    #[error(
        "server '{server}' cannot be a failover server: {reason}; name another one, or none, and \
         one is chosen"
    )]
    Unsuitable {
        /// Its name.
        server: String,
        /// Why.
        reason: String,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Names the failover servers of a volume, best first; none: whichever qualify. The volume as it is
/// then.
pub fn name_failover(
    store: &dyn ClusterStore,
    id: VolumeId,
    names: &[String],
) -> Result<VolumeEntry, NamedError> {
    let mut attempt = 0;
    loop {
        let (volumes, servers) = (store.volumes()?, store.servers()?);
        let found = volumes.iter().find(|entry| entry.volume.id == id && !entry.deleted);
        let Some(mut entry) = found.cloned() else {
            return Err(
                StoreError { store: store.address(), kind: StoreErrorKind::NoVolume(id) }.into()
            );
        };
        let (picture, now_ms) = (Picture::of(&volumes, servers), unix_ms());
        entry.shard.preferred_failover = set_apart(&picture.servers, names)?.0;
        check_named(&entry, &picture, now_ms)?;
        entry.shard.failover = failover(&entry, &picture, now_ms);
        if found == Some(&entry) {
            return Ok(entry);
        }
        attempt += 1;
        match store.update_volume(&entry) {
            Ok(versions) => return Ok(VolumeEntry { versions, ..entry }),
            Err(error) if error.is_conflict() && attempt < ATTEMPTS => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// The servers with these names, and all the others.
pub(crate) fn set_apart(
    servers: &[ServerEntry],
    names: &[String],
) -> Result<(Vec<ServerId>, Vec<ServerEntry>), NamedError> {
    if names.len() > FAILOVER_MAX {
        return Err(NamedError::TooMany(names.len()));
    }
    let mut named = Vec::with_capacity(names.len());
    for name in names {
        let found = servers.iter().find(|entry| entry.server.name == *name);
        let id = found.ok_or_else(|| NamedError::NotFound(name.clone()))?.server.id;
        if named.contains(&id) {
            return Err(NamedError::Twice(name.clone()));
        }
        named.push(id);
    }
    let others = servers.iter().filter(|entry| !named.contains(&entry.server.id));
    let others = others.cloned().collect();
    Ok((named, others))
}

/// Whether the servers that are named for `entry`'s volume could take a replica of it now.
pub(crate) fn check_named(
    entry: &VolumeEntry,
    picture: &Picture,
    now_ms: u64,
) -> Result<(), NamedError> {
    for id in &entry.shard.preferred_failover {
        let Some(server) = picture.server(*id) else { continue };
        let name = server.server.name.clone();
        if entry.shard.members.iter().any(|member| member.server == *id) {
            return Err(NamedError::Member(name));
        }
        let needed = home_bytes(entry.volume.size_bytes);
        if let Err(reason) = room(server, needed, &picture.usage, Some(entry), now_ms) {
            return Err(NamedError::Unsuitable { server: name, reason });
        }
    }
    Ok(())
}
