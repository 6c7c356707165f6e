//! Whose answers count: the in-sync set, or two of them while a change from one to the other is open.
//! Members are numbered by their slot in the head; a set of members is a [`Bits`], bit n for slot n.
//!
//! Everything that counts members asks here, so that the joint rule holds everywhere: while a change
//! is open nobody knows which of the two sets the cluster store names, hence what counts needs
//! its quorum in both.

use base::Seq;
use base::limits::MEMBERS_MAX;
use base::membership::{seal_quorum, write_quorum};
use base::planted::{self, Bug};

/// A set of members: bit n stands for the member in slot n.
pub(crate) type Bits = u8;

const _: () = assert!(MEMBERS_MAX < Bits::BITS as usize);

/// The set of one member.
pub(crate) fn bit(slot: usize) -> Bits {
    assert!(slot < MEMBERS_MAX, "slots are below the limit");
    1 << slot
}

/// The in-sync set S, and what it is about to become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sets {
    /// What the cluster store named last.
    old: Bits,
    /// What it may name by now.
    new: Option<Bits>,
}

impl Sets {
    /// One set, of at least one member.
    pub(crate) fn of(members: Bits) -> Self {
        assert!(members != 0, "a shard has a member in sync");
        Self { old: members, new: None }
    }

    /// A change to `new` begins: from now on both sets count.
    pub(crate) fn open(&mut self, new: Bits) {
        assert!(self.new.is_none(), "one change at a time");
        assert!(new != 0 && new != self.old, "to another set");
        self.new = Some(new);
    }

    /// The cluster store names `set`, which is one of the two: it alone counts from now on.
    pub(crate) fn close(&mut self, set: Bits) {
        assert!(self.names(set), "a set that this head agreed to");
        *self = Self::of(set);
    }

    /// True if `set` is one of the two.
    pub(crate) fn names(self, set: Bits) -> bool {
        self.old == set || self.new == Some(set)
    }

    /// True while a change is open.
    pub(crate) fn change_open(self) -> bool {
        self.new.is_some()
    }

    /// The set before a change that is open, or the only one.
    pub(crate) fn old(self) -> Bits {
        self.old
    }

    /// True if the member in `slot` is in the set, or in one of two.
    pub(crate) fn counts(self, slot: usize) -> bool {
        self.each().any(|set| set & bit(slot) != 0)
    }

    /// The one set, or both.
    fn each(self) -> impl Iterator<Item = Bits> {
        let new = self.new.filter(|_| !planted::is(Bug::JointRuleForgotten));
        core::iter::once(self.old).chain(new)
    }

    /// True if the members `bits` are a write quorum, of both sets if there are two.
    pub(crate) fn write_quorum_met(self, bits: Bits) -> bool {
        let spared = usize::from(planted::is(Bug::OneAckTooFew));
        self.each().all(|set| count(set & bits) + spared >= write_quorum(count(set)))
    }

    /// True if the members `bits` are a seal quorum, of both sets if there are two.
    pub(crate) fn seal_quorum_met(self, bits: Bits) -> bool {
        self.each().all(|set| count(set & bits) >= seal_quorum(count(set)))
    }

    /// The greatest seq that a write quorum has reached, of both sets if there are two, where
    /// `reached` says how far the member in a slot is.
    pub(crate) fn write_quorum_reached(self, reached: &[Seq; MEMBERS_MAX]) -> Seq {
        let of_set = |set: Bits| {
            let mut positions = [Seq::ZERO; MEMBERS_MAX];
            for (slot, position) in positions.iter_mut().enumerate() {
                *position = if set & bit(slot) != 0 { reached[slot] } else { Seq::ZERO };
            }
            positions.sort_unstable();
            positions[MEMBERS_MAX - write_quorum(count(set))]
        };
        self.each().map(of_set).min().expect("there is one set at least")
    }

    /// For people: of the set that lacks most, how many of `bits` it has, how many it needs, and how many
    /// members it has.
    pub(crate) fn shortest(self, bits: Bits) -> (usize, usize, usize) {
        let of_set = |set: Bits| (count(set & bits), write_quorum(count(set)), count(set));
        let lacks = |(have, needed, _): &(usize, usize, usize)| needed.saturating_sub(*have);
        self.each().map(of_set).max_by_key(lacks).expect("there is one set at least")
    }
}

fn count(bits: Bits) -> usize {
    usize::try_from(bits.count_ones()).expect("fewer than eight")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_quorum_meets_every_seal_quorum_of_either_set() {
        for old in 1..1_u8 << 5 {
            for new in (1..1_u8 << 5).filter(|new| *new != old) {
                let mut joint = Sets::of(old);
                joint.open(new);
                for written in (0..1 << 5).filter(|bits| joint.write_quorum_met(*bits)) {
                    for sealed in 0..1 << 5 {
                        let opens = |set| Sets::of(set).seal_quorum_met(sealed);
                        if opens(old) || opens(new) {
                            assert!(
                                written & sealed != 0,
                                "{old:b} {new:b} {written:b} {sealed:b}"
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn what_a_quorum_reached_is_what_both_reached() {
        let mut reached = [Seq::ZERO; MEMBERS_MAX];
        for (slot, seq) in [9, 7, 3, 100].into_iter().enumerate() {
            reached[slot] = Seq(seq);
        }
        let mut sets = Sets::of(0b0111);
        assert_eq!(sets.write_quorum_reached(&reached), Seq(7));
        sets.open(0b1111);
        assert_eq!(sets.write_quorum_reached(&reached), Seq(7));
        reached[1] = Seq(8);
        reached[0] = Seq(2);
        assert_eq!(sets.write_quorum_reached(&reached), Seq(3));
        assert_eq!(sets.shortest(0b0011), (2, 3, 4));
        sets.close(0b0111);
        assert_eq!((sets.old(), sets.change_open()), (0b0111, false));
        assert_eq!(sets.write_quorum_reached(&reached), Seq(3));
    }
}
