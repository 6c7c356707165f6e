//! The shard's size. It only grows, and the cluster store knows of it first: whoever opens the volume
//! next knows the new size, whatever becomes of this head.
//!
//! A member must have made the new size durable before it takes a record beyond its old end, or
//! a restart would find records there that cannot be. It is told so in its session (`Grow`), and
//! commands of a session take effect in order: so it is enough that the head tells each member before
//! it sends it anything that reaches further. A member that is not there is told at the beginning of
//! its next session, whose Seal answer says how large its replica is; one that is filled, before the
//! next Install. What front ends may use grows when a write quorum has answered: before, their
//! writes would only wait.
//!
//! The members may be larger than the record says, if the cluster store went back to an older state
//! or this head read it just before the volume was resized. Then logs may hold records beyond the
//! record's size, and to bring them to others these are told the larger size too. Front ends
//! see what the record says.

use base::CommandBody;

use crate::head::{Head, Output, Phase};
use crate::member::Mode;
use crate::sessions::Answer;
use crate::tag::Kind;

/// The sizes that a head knows, in blocks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Size {
    /// What front ends may use.
    pub(crate) served: u64,
    /// What the volume record says.
    pub(crate) recorded: u64,
    /// What members are to have: no less than what any of them has.
    members: u64,
}

/// The size of a member's replica.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct MemberSize {
    /// It said so.
    has: u64,
    /// It was told so in this session.
    told: u64,
    /// The number of the latest Grow.
    number: u64,
}

impl Size {
    pub(crate) const fn new(blocks: u64) -> Self {
        Self { served: blocks, recorded: blocks, members: blocks }
    }
}

impl Head {
    /// The volume record says `blocks` now. Shrinking is not possible, so a smaller number is old news.
    pub(crate) fn grow(&mut self, blocks: u64) {
        if blocks > self.blocks_max() {
            return;
        }
        self.size.recorded = self.size.recorded.max(blocks);
        self.size.members = self.size.members.max(blocks);
        self.tell_sizes();
    }

    /// The largest volume there can be.
    fn blocks_max(&self) -> u64 {
        base::limits::VOLUME_BYTES_MAX >> self.block_size.log2()
    }

    /// A member has sealed, and says how large its replica is. The others are not told a size that no
    /// volume has.
    pub(crate) fn learn_size(&mut self, index: usize, blocks: u64) {
        self.members[index].size = MemberSize { has: blocks, told: blocks, number: 0 };
        if blocks > self.size.members && blocks <= self.blocks_max() {
            self.size.members = blocks;
            self.tell_sizes();
        }
        self.tell_size(index);
    }

    fn tell_sizes(&mut self) {
        for index in 0..self.members.len() {
            let obeys = match self.members[index].mode {
                Mode::Sealed(_)
                | Mode::Matching(_)
                | Mode::Truncating { .. }
                | Mode::CatchingUp(_)
                | Mode::Live => true,
                // At the beginning of its next session, or before the next Install.
                Mode::Down
                | Mode::Resting { .. }
                | Mode::Sealing
                | Mode::Filling(_)
                | Mode::Parked { .. } => false,
            };
            if obeys {
                self.tell_size(index);
            }
        }
    }

    /// Tells a member how large its replica is to be, if it has not been told. True if it was now.
    pub(crate) fn tell_size(&mut self, index: usize) -> bool {
        let blocks = self.size.members;
        if self.members[index].size.told >= blocks {
            return false;
        }
        let number = self.next_number();
        self.members[index].size.told = blocks;
        self.members[index].size.number = number;
        self.send(index, Kind::Grow, number, CommandBody::Grow { blocks });
        true
    }

    pub(crate) fn grow_answered(&mut self, index: usize, number: u64, result: &Answer) {
        match result {
            Ok(_) => {
                let size = &mut self.members[index].size;
                if size.number == number {
                    size.has = size.told;
                }
            }
            Err(error) => match self.members[index].mode {
                Mode::Sealed(_)
                | Mode::Matching(_)
                | Mode::Truncating { .. }
                | Mode::CatchingUp(_)
                | Mode::Live
                | Mode::Filling(_) => self.member_failed(index, *error),
                Mode::Down | Mode::Resting { .. } | Mode::Sealing | Mode::Parked { .. } => {}
            },
        }
    }

    /// Lets front ends use what enough members have.
    pub(crate) fn advance_size(&mut self) {
        let recorded = self.size.recorded;
        if self.size.served >= recorded || matches!(self.phase, Phase::Ended(_)) {
            return;
        }
        let grown = self.members_where(|member| member.follows() && member.size.has >= recorded);
        if self.sets.write_quorum_met(grown) {
            self.size.served = recorded;
            self.outputs.push_back(Output::Resized { blocks: recorded });
        }
    }

    /// Asserts what must always hold.
    pub(crate) fn check_size(&self) {
        assert!(self.size.served <= self.size.recorded && self.size.recorded <= self.size.members);
    }
}
