//! Changes of members, and what servers tell heads: from the control plane to the node.

use base::{Epoch, ShardRecord, VolumeId};

use crate::control::{ChangeError, ControlError, StateNotice};
use crate::worker::Worker;

impl Worker {
    /// Begins a change of the in-sync set.
    pub(crate) fn change_members(
        &mut self,
        volume: VolumeId,
        epoch: Epoch,
        shard: &ShardRecord,
    ) -> Result<(), ChangeError> {
        self.check_head(volume, epoch, shard)?;
        let reason = "heads of this version have the members that they were opened with";
        Err(ChangeError::Refused { reason: reason.to_owned() })
    }

    /// Adopts the cluster store's record.
    pub(crate) fn members_changed(
        &mut self,
        volume: VolumeId,
        epoch: Epoch,
        shard: &ShardRecord,
    ) -> Result<(), ChangeError> {
        self.check_head(volume, epoch, shard)?;
        let head = self.heads.get_mut(&volume).expect("checked just now");
        if head.spec.shard.members == shard.members {
            head.spec.shard = shard.clone();
            return Ok(());
        }
        let reason = "heads of this version have the members that they were opened with";
        Err(ChangeError::Refused { reason: reason.to_owned() })
    }

    fn check_head(
        &self,
        volume: VolumeId,
        epoch: Epoch,
        shard: &ShardRecord,
    ) -> Result<(), ChangeError> {
        let head = self.heads.get(&volume).ok_or(ControlError::NoHead(volume))?;
        if head.spec.volume.epoch != epoch {
            return Err(ChangeError::OtherEpoch { volume, epoch: head.spec.volume.epoch });
        }
        if shard.volume != volume || shard.shard != head.spec.shard.shard {
            let reason = "the record is another shard's".to_owned();
            return Err(ChangeError::Refused { reason });
        }
        Ok(())
    }

    /// Tells the heads that have sessions here.
    pub(crate) fn publish(&mut self, notice: StateNotice) {
        tracing::debug!(?notice, "published");
    }
}
