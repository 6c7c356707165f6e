//! Creating, provisioning and deleting volumes.
//!
//! A volume is made with members that are [`Role::Provisioning`]. Each named server makes its
//! replica durably and then says so ([`provisioned`]); when no member is provisioning any more, a
//! head may open the volume. Members that are added later do not hold up an opening. Deleting leaves a tombstone ([`delete`]); each server deletes its
//! replica and takes its member out ([`removed`]); the last one purges the tombstone. A server
//! finds what it has to do with [`tasks`].

use base::limits::VOLUME_BYTES_MAX;
use base::{
    BlockSize, Epoch, Policy, PoolId, Role, ServerId, ShardIndex, ShardRecord, VolumeId,
    VolumeRecord,
};

use crate::error::{StoreError, StoreErrorKind};
use crate::name::{InvalidName, check_name};
use crate::named_failover::{NamedError, check_named, set_apart};
use crate::placement::{Picture, PlacementError, failover as failover_of, place};
use crate::records::{Versions, VolumeEntry, unix_ms};
use crate::store::{ClusterStore, Swapped};

/// How often an operation reads again and tries again when someone else was faster. Every lost
/// race is progress of another one, so this many in a row mean that something is wrong.
pub(crate) const ATTEMPTS: usize = 100;

/// Replica counts that a volume may have.
pub const REPLICA_COUNTS: [u8; 4] = [1, 2, 3, 5];

/// A volume to create.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewVolume {
    /// Its name.
    pub name: String,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// Its block size.
    pub block_size: BlockSize,
    /// Replicas, durability and the rest.
    pub policy: Policy,
    /// Names of the servers that are to take a lost member's place, best first; empty for any. None of
    /// them gets a replica now.
    pub failover: Vec<String>,
}

/// Why a volume was not created.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// The name cannot be one.
    #[error(transparent)]
    Name(#[from] InvalidName),
    /// The size is not a multiple of the block size.
    #[error(
        "size {size_bytes} is not a multiple of the block size {block_size}; the nearest sizes \
         are {} and {}",
        below(*size_bytes, *block_size),
        below(*size_bytes, *block_size) + u64::from(block_size.bytes())
    )]
    SizeNotMultiple {
        /// The size asked for, in bytes.
        size_bytes: u64,
        /// The block size asked for.
        block_size: BlockSize,
    },
    /// The size is zero or too large.
    #[error("size {size_bytes} is out of range: a volume has one block to {max} bytes", max = VOLUME_BYTES_MAX)]
    SizeOutOfRange {
        /// The size asked for, in bytes.
        size_bytes: u64,
    },
    /// The replica count is not one of [`REPLICA_COUNTS`].
    #[error("{0} replicas are not supported; use 1, 2, 3 or 5")]
    Replicas(u8),
    /// A failover server that was named cannot be one.
    #[error(transparent)]
    Failover(#[from] NamedError),
    /// Too few servers.
    #[error(transparent)]
    Placement(#[from] PlacementError),
    /// The store failed, or the name is taken.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Why a volume was not found.
#[derive(Debug, thiserror::Error)]
pub enum FindError {
    /// None has this name or id.
    #[error("there is no volume '{0}'; `holdfast volume list` shows what there is")]
    NotFound(String),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Why a volume was not deleted.
#[derive(Debug, thiserror::Error)]
pub enum DeleteError {
    /// Someone holds it.
    #[error(
        "volume '{volume}' is in use by {holder}; detach it there first (if {holder} is gone for \
         good: `holdfast volume release {volume} --force`)"
    )]
    Held {
        /// The volume's name.
        volume: String,
        /// The holder's name.
        holder: String,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

fn below(size_bytes: u64, block_size: BlockSize) -> u64 {
    size_bytes - size_bytes % u64::from(block_size.bytes())
}

impl NewVolume {
    fn check(&self) -> Result<(), CreateError> {
        check_name(&self.name)?;
        let size_bytes = self.size_bytes;
        if size_bytes == 0 || size_bytes > VOLUME_BYTES_MAX {
            return Err(CreateError::SizeOutOfRange { size_bytes });
        }
        if self.block_size.blocks(size_bytes).is_none() {
            let block_size = self.block_size;
            return Err(CreateError::SizeNotMultiple { size_bytes, block_size });
        }
        if !REPLICA_COUNTS.contains(&self.policy.replicas) {
            return Err(CreateError::Replicas(self.policy.replicas));
        }
        Ok(())
    }
}

/// Creates a volume: chooses its servers and writes its records. Its members are provisioning.
pub fn create(store: &dyn ClusterStore, new: &NewVolume) -> Result<VolumeEntry, CreateError> {
    new.check()?;
    let id = VolumeId::from_bytes(crate::new_id());
    let mut attempt = 0;
    loop {
        // The revision first: whatever changes after it makes the insertion fail.
        let revision = store.revision()?;
        let (volumes, servers) = (store.volumes()?, store.servers()?);
        if volumes.iter().any(|entry| !entry.deleted && entry.volume.name == new.name) {
            let kind = StoreErrorKind::VolumeNameTaken(new.name.clone());
            return Err(StoreError { store: store.address(), kind }.into());
        }
        let (picture, now_ms) = (Picture::of(&volumes, servers), unix_ms());
        let (preferred_failover, others) = set_apart(&picture.servers, &new.failover)?;
        let replicas = usize::from(new.policy.replicas);
        let members = place(new.size_bytes, replicas, &others, &picture.usage, now_ms);
        let members = members.map_err(|mut error| {
            let apart = |name: &String| (name.clone(), "is to be a failover server".to_owned());
            error.unsuitable.extend(new.failover.iter().map(apart));
            error
        })?;
        let volume = VolumeRecord {
            id,
            name: new.name.clone(),
            size_bytes: new.size_bytes,
            block_size: new.block_size,
            policy: new.policy,
            epoch: Epoch::NONE,
            holder: None,
        };
        let (failover, moves) = (Vec::new(), Vec::new());
        let shard = ShardRecord {
            volume: id,
            shard: ShardIndex(0),
            members,
            failover,
            preferred_failover,
            moves,
        };
        let versions = Versions { volume: 0, shard: 0 };
        let mut entry = VolumeEntry { volume, shard, deleted: false, versions };
        check_named(&entry, &picture, now_ms)?;
        entry.shard.failover = failover_of(&entry, &picture, now_ms);
        attempt += 1;
        match store.insert_volume(&entry.volume, &entry.shard, revision) {
            Err(error) if error.is_conflict() && attempt < ATTEMPTS => {}
            done => return Ok(done?),
        }
    }
}

/// The volume that `name_or_id` names and that is not deleted.
pub fn find(store: &dyn ClusterStore, name_or_id: &str) -> Result<VolumeEntry, FindError> {
    let found = match name_or_id.parse::<VolumeId>() {
        Ok(id) => store.volume(id)?.filter(|entry| !entry.deleted),
        Err(_) => store.volume_named(name_or_id)?,
    };
    found.ok_or_else(|| FindError::NotFound(name_or_id.to_owned()))
}

/// Deletes a volume: leaves a tombstone that makes its servers delete their replicas. Nothing
/// happens to one that is deleted already. Refused while someone holds it, other than to repair it.
pub fn delete(store: &dyn ClusterStore, id: VolumeId) -> Result<(), DeleteError> {
    let mut held = None;
    let changed = change(store, id, |entry| {
        if entry.deleted {
            return Change::Nothing;
        }
        if let Some(holder) = entry.volume.holder.as_ref().filter(|holder| !holder.repair) {
            held = Some((entry.volume.name.clone(), holder.name.clone()));
            return Change::Nothing;
        }
        entry.volume.holder = None;
        entry.deleted = true;
        Change::Write
    })?;
    if let Some((volume, holder)) = held {
        return Err(DeleteError::Held { volume, holder });
    }
    if let Some(entry) = changed {
        purge_if_empty(store, &entry)?;
    }
    Ok(())
}

/// Something that a server has to do in its pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Task {
    /// Make this volume's replica, then call [`provisioned`].
    Provision(VolumeEntry),
    /// Delete this deleted volume's replica, then call [`removed`].
    Remove(VolumeEntry),
}

/// What the server with this pool has to do, of all `volumes`. A member of another pool of the
/// same server is not its business.
pub fn tasks(volumes: &[VolumeEntry], server: ServerId, pool: PoolId) -> Vec<Task> {
    let task = |entry: &VolumeEntry| {
        let mine = |member: &&base::Member| member.server == server && member.pool == pool;
        let member = entry.shard.members.iter().find(mine)?;
        match (entry.deleted, member.role) {
            (true, Role::Provisioning | Role::InSync | Role::CatchingUp)
            | (true | false, Role::Leaving) => Some(Task::Remove(entry.clone())),
            (false, Role::Provisioning) => Some(Task::Provision(entry.clone())),
            (false, Role::InSync | Role::CatchingUp) => None,
        }
    };
    volumes.iter().filter_map(task).collect()
}

/// Notes that the server's replica of a volume is made, durably and empty. Its member turns in sync
/// if the volume was never opened, else it is to catch up. False if there was nothing to note:
/// deleted meanwhile, or noted before.
pub fn provisioned(
    store: &dyn ClusterStore,
    id: VolumeId,
    server: ServerId,
    pool: PoolId,
) -> Result<bool, StoreError> {
    let changed = change(store, id, |entry| {
        if entry.deleted {
            return Change::Nothing;
        }
        let member = entry.shard.members.iter_mut().find(|member| {
            member.server == server && member.pool == pool && member.role == Role::Provisioning
        });
        let Some(member) = member else { return Change::Nothing };
        // An empty replica may count only where nothing was ever acknowledged.
        member.role =
            if entry.volume.epoch == Epoch::NONE { Role::InSync } else { Role::CatchingUp };
        Change::Write
    })?;
    Ok(changed.is_some())
}

/// Notes that the server's replica of a deleted volume, or of one whose member is leaving, is
/// gone, and purges the tombstone after the last one.
pub fn removed(
    store: &dyn ClusterStore,
    id: VolumeId,
    server: ServerId,
    pool: PoolId,
) -> Result<(), StoreError> {
    let changed = change(store, id, |entry| {
        let members = entry.shard.members.len();
        let deleted = entry.deleted;
        entry.shard.members.retain(|member| {
            let gone = deleted || member.role == Role::Leaving;
            !gone || member.server != server || member.pool != pool
        });
        if entry.shard.members.len() == members { Change::Nothing } else { Change::Write }
    });
    match changed {
        Ok(Some(entry)) => purge_if_empty(store, &entry),
        // Not a member (any more), or purged already.
        Ok(None) | Err(StoreError { kind: StoreErrorKind::NoVolume(_), .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Takes members whose pool no server has any more out of a deleted volume's shard: nobody else
/// would, and the tombstone would stay for ever. Their data went with their pool.
pub fn forget_lost_pools(store: &dyn ClusterStore, entry: &VolumeEntry) -> Result<(), StoreError> {
    if !entry.deleted {
        return Ok(());
    }
    let servers = store.servers()?;
    for member in &entry.shard.members {
        let known = servers
            .iter()
            .any(|known| known.server.id == member.server && known.server.pool == member.pool);
        if !known {
            removed(store, entry.volume.id, member.server, member.pool)?;
        }
    }
    Ok(())
}

fn purge_if_empty(store: &dyn ClusterStore, entry: &VolumeEntry) -> Result<(), StoreError> {
    if !entry.deleted || !entry.shard.members.is_empty() {
        return Ok(());
    }
    match store.purge_volume(entry.volume.id, entry.versions) {
        Err(StoreError { kind: StoreErrorKind::NoVolume(_), .. }) => Ok(()),
        purged => purged,
    }
}

/// What [`change`] does with an entry that was looked at.
pub(crate) enum Change {
    /// Write it.
    Write,
    /// Leave it.
    Nothing,
}

/// Reads a volume, lets `decide` alter it, and writes it if nobody else did meanwhile; else
/// again. The entry as written, with its new versions; `None` if there was nothing to change.
pub(crate) fn change(
    store: &dyn ClusterStore,
    id: VolumeId,
    decide: impl FnMut(&mut VolumeEntry) -> Change,
) -> Result<Option<VolumeEntry>, StoreError> {
    change_known(store, id, None, decide)
}

/// The same, beginning with how the volume was when it was heard of last, which saves reading it. What is
/// written is conditional on its being so still; that there is nothing to change is not believed.
pub(crate) fn change_known(
    store: &dyn ClusterStore,
    id: VolumeId,
    known: Option<VolumeEntry>,
    mut decide: impl FnMut(&mut VolumeEntry) -> Change,
) -> Result<Option<VolumeEntry>, StoreError> {
    let error = |kind| StoreError { store: store.address(), kind };
    assert!(known.iter().all(|entry| entry.volume.id == id), "what is known is of this volume");
    let mut hearsay = known;
    let mut told = None;
    let mut attempt = 0;
    loop {
        let (mut entry, certain) = match (hearsay.take(), told.take()) {
            (Some(entry), _) => (entry, false),
            (None, Some(entry)) => (entry, true),
            (None, None) => {
                let found = store.volume(id)?;
                (found.ok_or_else(|| error(StoreErrorKind::NoVolume(id)))?, true)
            }
        };
        match decide(&mut entry) {
            Change::Nothing if certain => return Ok(None),
            Change::Nothing => continue,
            Change::Write => {}
        }
        attempt += 1;
        match store.swap_volume(&entry)? {
            Swapped::Written(versions) => return Ok(Some(VolumeEntry { versions, ..entry })),
            Swapped::Refused(now) if attempt < ATTEMPTS => told = Some(*now),
            Swapped::Refused(_) => return Err(error(StoreErrorKind::Conflict)),
        }
    }
}
