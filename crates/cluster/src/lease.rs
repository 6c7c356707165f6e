//! The lease: the right to be a volume's head.
//!
//! The volume record names the holder; the seals make it true. So taking a lease from a holder
//! that still runs is safe (its head is deposed when the members seal the new epoch) but rude,
//! and needs `force`.
//!
//! **The lease follows the rings.** A holder whose guest has stopped the disk marks its lease
//! *yieldable* ([`mark_yieldable`]); one whose guest starts a disk acquires as a *standby*
//! ([`Acquire::standby`]), which takes a yieldable lease without force. That is a live migration; and
//! if the guest goes on where it was, its holder takes the mark back.

use base::{Epoch, Holder, HolderId, Role, VolumeId};

use crate::error::{StoreError, StoreErrorKind};
use crate::records::{ServerEntry, VolumeEntry, unix_ms};
use crate::store::ClusterStore;
use crate::volumes::{Change, change, change_known};

/// Why a lease was not acquired. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum AcquireError {
    /// Someone else holds it.
    #[error(
        "volume '{volume}' is attached elsewhere: {holder} holds it ({epoch}); {}",
        remedy(holder, *yieldable)
    )]
    Held {
        /// The volume's name.
        volume: String,
        /// The holder's name.
        holder: String,
        /// The epoch it was given.
        epoch: Epoch,
        /// It would give it to a standby.
        yieldable: bool,
    },
    /// Some members have no replica yet.
    #[error(
        "volume '{volume}' is not ready: {count} of {members} replicas are still to be made by \
         their servers; start those servers, `holdfast volume show {volume}` names them"
    )]
    Provisioning {
        /// The volume's name.
        volume: String,
        /// Members without replica.
        count: usize,
        /// Members in all.
        members: usize,
    },
    /// It was deleted.
    #[error("volume '{volume}' was deleted")]
    Deleted {
        /// The volume's name.
        volume: String,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

fn remedy(holder: &str, yieldable: bool) -> String {
    if yieldable {
        "its guest there does not use it now: detach it there first, or attach it here with \
         --standby, which takes it when a guest starts here"
            .to_owned()
    } else {
        format!("detach it there first, or take it over with --force if {holder} is gone for good")
    }
}

/// Why a lease was not released by force.
#[derive(Debug, thiserror::Error)]
pub enum ReleaseError {
    /// It is held, and force was not allowed.
    #[error(
        "volume '{volume}' is held by {holder}; detach it there, or give --force if {holder} is \
         gone for good"
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

/// How a lease is asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Acquire {
    /// Take it from another holder.
    pub force: bool,
    /// For a guest that starts the disk here: also from a holder that marked it yieldable.
    pub standby: bool,
    /// The new holder yields from the beginning: the guest is awaited, and not there yet.
    pub yields: bool,
    /// The epoch will be above this one: the highest that a member is known to have sealed, if
    /// the store was rolled back behind the members.
    pub above: Epoch,
}

/// What keeps `me` from acquiring the volume of `entry` as it is. A holder that only repairs it
/// keeps nobody from it.
pub fn check(entry: &VolumeEntry, me: HolderId, how: Acquire) -> Result<(), AcquireError> {
    let volume = entry.volume.name.clone();
    if entry.deleted {
        return Err(AcquireError::Deleted { volume });
    }
    // Later ones are not waited for: they do not count yet.
    let members = &entry.shard.members;
    let new = entry.volume.epoch == Epoch::NONE;
    let count = members.iter().filter(|member| member.role == Role::Provisioning).count();
    if new && count > 0 {
        return Err(AcquireError::Provisioning { volume, count, members: members.len() });
    }
    match &entry.volume.holder {
        None => Ok(()),
        Some(holder) if holder.id == me || holder.repair || how.force => Ok(()),
        Some(holder) if holder.yieldable && how.standby => Ok(()),
        Some(holder) => Err(held(entry, holder)),
    }
}

fn held(entry: &VolumeEntry, holder: &Holder) -> AcquireError {
    AcquireError::Held {
        volume: entry.volume.name.clone(),
        holder: holder.name.clone(),
        epoch: entry.volume.epoch,
        yieldable: holder.yieldable,
    }
}

/// Makes `me` the holder, in a new epoch, of a volume that it is to serve. A holder may acquire what
/// it holds: its process died and is back. The lease is yieldable as `how` says, whatever `me` says. The entry
/// as it is now; `entry.volume.epoch` is the epoch to open in.
pub fn acquire(
    store: &dyn ClusterStore,
    id: VolumeId,
    me: &Holder,
    how: Acquire,
) -> Result<VolumeEntry, AcquireError> {
    acquire_known(store, id, me, how, None)
}

/// The same, beginning with how the volume was when it was heard of last: if it is so still, the store is
/// asked once. It decides on nothing but the record as it is: what is written is conditional on that being
/// the known one, and refused is nobody before it was read.
pub fn acquire_known(
    store: &dyn ClusterStore,
    id: VolumeId,
    me: &Holder,
    how: Acquire,
    known: Option<VolumeEntry>,
) -> Result<VolumeEntry, AcquireError> {
    take(store, id, me, known, how, |entry| check(entry, me.id, how))
}

fn take(
    store: &dyn ClusterStore,
    id: VolumeId,
    me: &Holder,
    known: Option<VolumeEntry>,
    how: Acquire,
    may: impl Fn(&VolumeEntry) -> Result<(), AcquireError>,
) -> Result<VolumeEntry, AcquireError> {
    let mut refused = None;
    let changed = change_known(store, id, known, |entry| match may(entry) {
        Ok(()) => {
            entry.volume.epoch = entry.volume.epoch.max(how.above).next();
            entry.volume.holder = Some(Holder { yieldable: how.yields, ..me.clone() });
            Change::Write
        }
        Err(error) => {
            refused = Some(error);
            Change::Nothing
        }
    })?;
    match (changed, refused) {
        (Some(entry), _) => Ok(entry),
        (None, Some(error)) => Err(error),
        (None, None) => {
            let kind = StoreErrorKind::NoVolume(id);
            Err(StoreError { store: store.address(), kind }.into())
        }
    }
}

/// Makes the server `me` the holder, in a new epoch, to repair a volume that nobody serves: that
/// nobody holds, or that only a server repaired that does not run any more, or that `me` repaired
/// before it died and is back. The epoch will be above `above` ([`Acquire::above`]).
///
/// `me.id` has the bytes of its server's id, as every server's holder has, and `me.repair` is set.
pub fn acquire_repair(
    store: &dyn ClusterStore,
    id: VolumeId,
    me: &Holder,
    above: Epoch,
) -> Result<VolumeEntry, AcquireError> {
    assert!(me.repair, "others acquire what they serve");
    let servers = store.servers()?;
    let now_ms = unix_ms();
    let runs = |holder: HolderId| {
        let of_holder = |entry: &&ServerEntry| entry.server.id.bytes() == holder.bytes();
        servers.iter().find(of_holder).is_some_and(|entry| entry.is_alive(now_ms))
    };
    let may = |entry: &VolumeEntry| {
        check(entry, me.id, Acquire::default())?;
        match &entry.volume.holder {
            Some(holder) if !holder.repair || (holder.id != me.id && runs(holder.id)) => {
                Err(held(entry, holder))
            }
            Some(_) | None => Ok(()),
        }
    };
    take(store, id, me, None, Acquire { above, ..Acquire::default() }, may)
}

/// What became of a mark.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Marked {
    /// The record says so now, or did before; the volume as it was then.
    Done(Box<VolumeEntry>),
    /// The lease is another one's now, or of another epoch: nothing was changed. The name of who
    /// holds it; `None` if nobody does, or there is no such volume any more.
    NotOurs(Option<String>),
}

/// Says whether `me`, who holds the volume in `epoch`, would give it up to a standby. `known` is how the
/// volume was when it was heard of last: if it is so still, the store is asked once. Nothing happens
/// if the lease is not its own in that epoch any more. After an error that may have happened
/// nevertheless ([`StoreError::may_have_happened`]), asking again settles it.
pub fn mark_yieldable(
    store: &dyn ClusterStore,
    id: VolumeId,
    me: HolderId,
    epoch: Epoch,
    yieldable: bool,
    known: Option<VolumeEntry>,
) -> Result<Marked, StoreError> {
    let mut marked = Marked::NotOurs(None);
    let changed = change_known(store, id, known, |entry| {
        let same_epoch = entry.volume.epoch == epoch && !entry.deleted;
        match &mut entry.volume.holder {
            Some(holder) if holder.id == me && same_epoch => {
                if holder.yieldable == yieldable {
                    marked = Marked::Done(Box::new(entry.clone()));
                    return Change::Nothing;
                }
                holder.yieldable = yieldable;
                Change::Write
            }
            holder => {
                marked = Marked::NotOurs(holder.as_ref().map(|holder| holder.name.clone()));
                Change::Nothing
            }
        }
    });
    match changed {
        Err(StoreError { kind: StoreErrorKind::NoVolume(_), .. }) => Ok(Marked::NotOurs(None)),
        changed => Ok(changed?.map_or(marked, |entry| Marked::Done(Box::new(entry)))),
    }
}

/// Gives a lease back after its head has ended. Nothing happens if it is not `me`'s in that
/// `epoch` any more, or if the volume is gone. True if it was given back.
pub fn release(
    store: &dyn ClusterStore,
    id: VolumeId,
    me: HolderId,
    epoch: Epoch,
) -> Result<bool, StoreError> {
    let changed = change(store, id, |entry| {
        let mine = entry.volume.holder.as_ref().is_some_and(|holder| holder.id == me);
        if !mine || entry.volume.epoch != epoch {
            return Change::Nothing;
        }
        entry.volume.holder = None;
        Change::Write
    });
    match changed {
        Err(StoreError { kind: StoreErrorKind::NoVolume(_), .. }) => Ok(false),
        changed => Ok(changed?.is_some()),
    }
}

/// Takes a lease from whoever holds it and gives it to nobody: for holders that are gone for
/// good. A holder that still runs is not stopped by this, only by the next head's seals. The
/// holder's name, if there was one.
pub fn release_forced(
    store: &dyn ClusterStore,
    id: VolumeId,
    force: bool,
) -> Result<Option<String>, ReleaseError> {
    let mut holder = None;
    let mut refused = None;
    change(store, id, |entry| {
        let repair = entry.volume.holder.as_ref().is_some_and(|holder| holder.repair);
        holder = entry.volume.holder.take().map(|holder| holder.name);
        match &holder {
            None => Change::Nothing,
            Some(_) if force || repair => Change::Write,
            Some(name) => {
                refused = Some((entry.volume.name.clone(), name.clone()));
                Change::Nothing
            }
        }
    })?;
    match refused {
        Some((volume, holder)) => Err(ReleaseError::Held { volume, holder }),
        None => Ok(holder),
    }
}
