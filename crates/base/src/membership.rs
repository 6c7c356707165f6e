//! The records that the cluster store keeps of a volume: who may write it, and who keeps it.
//! Plain data; the store that keeps them and the head that changes them are elsewhere.

use core::fmt;

use serde::{Deserialize, Serialize};

use crate::ids::{Epoch, HolderId, PoolId, ServerId, ShardIndex, VolumeId};
use crate::units::BlockSize;

/// When a record counts at a member.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Durability {
    /// When its log write has completed; FLUSH and FUA force media. A disk's usual promise.
    #[default]
    Flush,
    /// When its log write has reached media.
    Durable,
}

/// What a volume's owner asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    /// Copies to keep: 1, 2, 3 or 5.
    pub replicas: u8,
    /// When a write counts at a member.
    pub durability: Durability,
    /// Milliseconds that a request may wait for a quorum before the guest sees an error;
    /// `None`: for ever.
    pub stall_deadline_ms: Option<u64>,
    /// Writes are refused.
    pub read_only: bool,
}

/// Who holds a volume's lease.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// Survives a restart of the holder's process.
    pub id: HolderId,
    /// For people: `server a`, or `attach on host7 at /run/vm3.sock`.
    pub name: String,
    /// It only heals the volume and gives way to anybody at once.
    #[serde(default, skip_serializing_if = "core::ops::Not::not")]
    pub repair: bool,
    /// It uses the volume no more, or not now: its guest stopped the disk, everything is answered.
    /// Whoever has a guest that wants the volume may take the lease without force. The holder still
    /// is the holder, and may say that it goes on, until somebody does.
    #[serde(default, skip_serializing_if = "core::ops::Not::not")]
    pub yieldable: bool,
}

/// A volume as the cluster store keeps it. Changed only by compare-and-swap.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeRecord {
    /// Its id.
    pub id: VolumeId,
    /// Its name, unique in the cluster.
    pub name: String,
    /// Its size in bytes, a multiple of the block size.
    pub size_bytes: u64,
    /// Its block size.
    pub block_size: BlockSize,
    /// What its owner asked for.
    pub policy: Policy,
    /// The newest epoch handed out.
    pub epoch: Epoch,
    /// Who may be head in that epoch; `None` after a release.
    pub holder: Option<Holder>,
}

impl VolumeRecord {
    /// Its size in blocks.
    pub fn blocks(&self) -> u64 {
        self.size_bytes >> self.block_size.log2()
    }
}

/// What a member is to its shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Chosen, but its server has not made the replica yet. A volume that was never opened (epoch
    /// 0) may not be opened while it has such a member; later ones are not waited for.
    Provisioning,
    /// Its acknowledgements count.
    InSync,
    /// Being filled; its acknowledgements do not count.
    CatchingUp,
    /// No longer a member: its server deletes the replica and then takes this entry out. No head
    /// has anything to do with it.
    Leaving,
}

impl Role {
    /// True if a head keeps a session with such a member.
    pub const fn is_served(self) -> bool {
        match self {
            Self::InSync | Self::CatchingUp => true,
            Self::Provisioning | Self::Leaving => false,
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Provisioning => "provisioning",
            Self::InSync => "in sync",
            Self::CatchingUp => "catching up",
            Self::Leaving => "leaving",
        })
    }
}

/// A replica named in a shard record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// The server that keeps it.
    pub server: ServerId,
    /// The pool it was made in: a server whose pool was formatted anew is not this member.
    pub pool: PoolId,
    /// What it is to the shard.
    pub role: Role,
}

/// A server that was given a replica in place of a lost one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Move {
    /// The server that was added.
    pub server: ServerId,
    /// When, in milliseconds since 1970.
    pub at_ms: u64,
}

/// A shard as the cluster store keeps it. Changed only by compare-and-swap.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardRecord {
    /// The volume it is part of.
    pub volume: VolumeId,
    /// Which part.
    pub shard: ShardIndex,
    /// Its replicas.
    pub members: Vec<Member>,
    /// Servers that can take a lost member's place, best first, with room kept for it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub failover: Vec<ServerId>,
    /// Servers that an operator named for that, best first: while they qualify, they come before all
    /// others.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub preferred_failover: Vec<ServerId>,
    /// The latest moves, oldest first: a volume that moves again and again is left alone for a
    /// while, lest it fell server after server.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub moves: Vec<Move>,
}

impl ShardRecord {
    /// The servers of the in-sync set S, in the record's order.
    pub fn in_sync(&self) -> impl Iterator<Item = ServerId> + Clone {
        let members = self.members.iter().filter(|member| member.role == Role::InSync);
        members.map(|member| member.server)
    }
}

/// The fewest members in sync that a volume of so many `replicas` may be left with by a change: a
/// member whose removal would leave fewer stays, dead or not.
pub const fn in_sync_floor(replicas: u8) -> usize {
    (replicas as usize).div_ceil(2)
}

/// Qw(S): acknowledgements that make a write acknowledged, of a set of `in_sync` members.
pub const fn write_quorum(in_sync: usize) -> usize {
    in_sync / 2 + 1
}

/// Qs(S): answers to a Seal that an opening needs. Meets every write quorum.
pub const fn seal_quorum(in_sync: usize) -> usize {
    in_sync - write_quorum(in_sync) + 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seal_quorums_meet_write_quorums_and_write_quorums_meet_each_other() {
        for members in 1..=crate::limits::MEMBERS_MAX {
            assert!(write_quorum(members) + seal_quorum(members) > members);
            assert!(2 * write_quorum(members) > members);
            assert!(write_quorum(members) <= members && seal_quorum(members) >= 1);
        }
    }
}
