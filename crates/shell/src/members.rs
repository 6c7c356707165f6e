//! Changes of members, and what servers tell heads: from the control plane to the node.

use base::{Epoch, ShardRecord, VolumeId};
use node::{Audience, HeadHandle};
use volume::MembershipError;

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
        let handle = self.check_head(volume, epoch, shard)?;
        let now = self.reactor.now();
        self.node.change_members(now, handle, shard).map_err(change_error)
    }

    /// Adopts the cluster store's record.
    pub(crate) fn members_changed(
        &mut self,
        volume: VolumeId,
        epoch: Epoch,
        shard: &ShardRecord,
    ) -> Result<(), ChangeError> {
        let handle = self.check_head(volume, epoch, shard)?;
        let now = self.reactor.now();
        self.node.members_changed(now, handle, shard);
        let head = self.heads.get_mut(&volume).expect("checked just now");
        head.spec.shard = shard.clone();
        Ok(())
    }

    fn check_head(
        &self,
        volume: VolumeId,
        epoch: Epoch,
        shard: &ShardRecord,
    ) -> Result<HeadHandle, ChangeError> {
        let head = self.heads.get(&volume).ok_or(ControlError::NoHead(volume))?;
        if head.spec.volume.epoch != epoch {
            return Err(ChangeError::OtherEpoch { volume, epoch: head.spec.volume.epoch });
        }
        if shard.volume != volume || shard.shard != head.spec.shard.shard {
            let reason = "the record is another shard's".to_owned();
            return Err(ChangeError::Refused { reason });
        }
        Ok(head.handle)
    }

    /// Tells the heads that have, or may have, a member here.
    pub(crate) fn publish(&mut self, notice: StateNotice) {
        let now = self.reactor.now();
        self.node.publish(now, Audience::Heads, notice.key, notice.message);
    }
}

fn change_error(error: MembershipError) -> ChangeError {
    let reason = error.to_string();
    match error {
        MembershipError::NotOpen
        | MembershipError::ChangeOpen
        | MembershipError::NotCaughtUp(_)
        | MembershipError::NoQuorum { .. }
        | MembershipError::NotSettled => ChangeError::NotNow { reason },
        MembershipError::WrongShard
        | MembershipError::Ending
        | MembershipError::TooMany(_)
        | MembershipError::LastCopy
        | MembershipError::Unknown(_)
        | MembershipError::TooManyMembers(_)
        | MembershipError::DuplicateServer(_) => ChangeError::Refused { reason },
    }
}
