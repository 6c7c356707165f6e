//! Changing a volume's members: by the holder, in its epoch, and conditional on everything that the
//! change was decided on.
//!
//! A head that has begun a change acknowledges only what has quorum in both sets until it knows how
//! the change came out. So the outcome here is definite or an error, and after an error the same
//! call is made again, until it is definite: an attempt that got lost may have come true, or may
//! still come true, but only if the records are as they were read for it.

use base::{Epoch, HolderId, ShardRecord, VolumeId};

use crate::error::{StoreError, StoreErrorKind};
use crate::records::VolumeEntry;
use crate::store::ClusterStore;
use crate::volumes::ATTEMPTS;

/// How a change came out, with the entry as it is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ChangeOutcome {
    /// The shard's record is the new one.
    Changed(VolumeEntry),
    /// The shard's record is neither the expected one nor the new one; nothing was changed.
    Conflict(VolumeEntry),
    /// The volume has another holder or a higher epoch, or was deleted: the caller's head is over,
    /// whether its change came true or not.
    Deposed(VolumeEntry),
}

/// Replaces the shard's record by `new`, if it is `expected` and `holder` holds the volume in
/// `epoch`.
///
/// After an error the outcome is unknown: call again with the same arguments. `NoVolume` is
/// definite: the volume was deleted and purged.
pub fn change(
    store: &dyn ClusterStore,
    id: VolumeId,
    epoch: Epoch,
    holder: HolderId,
    expected: &ShardRecord,
    new: &ShardRecord,
) -> Result<ChangeOutcome, StoreError> {
    assert!(expected.volume == id && new.volume == id, "both are the volume's");
    assert_eq!(expected.shard, new.shard, "both are of one shard");
    let mut attempt = 0;
    loop {
        let no_volume =
            || StoreError { store: store.address(), kind: StoreErrorKind::NoVolume(id) };
        let entry = store.volume(id)?.ok_or_else(no_volume)?;
        let held = entry.volume.holder.as_ref().is_some_and(|current| current.id == holder);
        if entry.deleted || !held || entry.volume.epoch != epoch {
            return Ok(ChangeOutcome::Deposed(entry));
        }
        if entry.shard == *new {
            // Written by an attempt whose answer was lost, or there was nothing to change.
            return Ok(ChangeOutcome::Changed(entry));
        }
        if entry.shard != *expected {
            return Ok(ChangeOutcome::Conflict(entry));
        }
        attempt += 1;
        let wanted = VolumeEntry { shard: new.clone(), ..entry };
        match store.update_volume(&wanted) {
            Ok(versions) => {
                return Ok(ChangeOutcome::Changed(VolumeEntry { versions, ..wanted }));
            }
            // Someone else was faster, or the answer was lost: what is there now tells.
            Err(error) if attempt < ATTEMPTS && error.is_conflict() => {}
            Err(error) if attempt < LOST_ANSWERS && error.may_have_happened() => {}
            Err(error) => return Err(error),
        }
    }
}

/// Attempts in a row whose answers are lost, before the caller is told.
const LOST_ANSWERS: usize = 3;
