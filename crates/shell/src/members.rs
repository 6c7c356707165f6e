//! Changes of members, and what servers tell heads: from the control plane to the node.

use base::{Epoch, ShardRecord, VolumeId};
use node::{Audience, HeadHandle, Input};
use volume::MembershipError;

use crate::control::{ChangeError, ControlError, Event, StateNotice};
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

    /// Takes note that the cluster store's record says another size.
    pub(crate) fn volume_grown(
        &mut self,
        volume: VolumeId,
        epoch: Epoch,
        size_bytes: u64,
    ) -> Result<(), ChangeError> {
        let handle = self.find_head(volume, epoch)?;
        let head = self.heads.get_mut(&volume).expect("found just now");
        let record = &mut head.spec.volume;
        let Some(blocks) = record.block_size.blocks(size_bytes) else {
            let reason = format!("{size_bytes} bytes are not whole blocks");
            return Err(ChangeError::Refused { reason });
        };
        record.size_bytes = record.size_bytes.max(size_bytes);
        self.node.handle(self.reactor.now(), Input::GrowHead { head: handle, blocks });
        Ok(())
    }

    /// Enough members have the new size: guests may use it.
    pub(crate) fn volume_resized(&mut self, volume: VolumeId, epoch: Epoch, blocks: u64) {
        let Some(head) = self.heads.get(&volume) else { return };
        let size_bytes = blocks << head.spec.volume.block_size.log2();
        tracing::info!(%volume, %epoch, size_bytes, "the volume has grown");
        self.exports.volume_resized(volume, size_bytes);
        // Nobody listens any more only when everything ends.
        let _ = self.events.send(Event::Resized { volume, size_bytes });
    }

    fn find_head(&self, volume: VolumeId, epoch: Epoch) -> Result<HeadHandle, ChangeError> {
        let head = self.heads.get(&volume).ok_or(ControlError::NoHead(volume))?;
        if head.spec.volume.epoch != epoch {
            return Err(ChangeError::OtherEpoch { volume, epoch: head.spec.volume.epoch });
        }
        Ok(head.handle)
    }

    fn check_head(
        &self,
        volume: VolumeId,
        epoch: Epoch,
        shard: &ShardRecord,
    ) -> Result<HeadHandle, ChangeError> {
        let handle = self.find_head(volume, epoch)?;
        if shard.volume != volume || shard.shard != self.heads[&volume].spec.shard.shard {
            let reason = "the record is another shard's".to_owned();
            return Err(ChangeError::Refused { reason });
        }
        Ok(handle)
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
