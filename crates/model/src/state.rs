//! What the model remembers: the cluster store's record, three members, two heads.

/// Members of the shard; a set of them is a bit mask.
pub(crate) const MEMBERS: usize = 3;
/// Processes that may be head.
pub(crate) const HEADS: usize = 2;
/// The value of an EpochStart record.
pub(crate) const START: u8 = 0;

/// A set of members, one bit each.
pub(crate) type Set = u8;

/// The bit of member `index`.
pub(crate) const fn bit(index: usize) -> Set {
    1 << index
}

/// A log record: who wrote it, and what.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Record {
    /// The epoch of its head.
    pub epoch: u8,
    /// The write, counted from 1, or 0 for EpochStart.
    pub value: u8,
}

/// The cluster store's record of the volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Store {
    /// The newest epoch given out.
    pub epoch: u8,
    /// The in-sync set.
    pub in_sync: u8,
}

/// A member.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Member {
    /// The highest epoch it has sealed.
    pub sealed: u8,
    /// Its log.
    pub log: Vec<Record>,
    /// The epoch whose head has a read grant that has not run out; 0: none.
    pub granted: u8,
}

/// Where a head is in its life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Has no epoch, or has released it.
    #[default]
    Idle,
    /// Waits for a seal quorum.
    Sealing,
    /// Has chosen a tail and writes it, and its EpochStart, to a write quorum. Serves once that is
    /// done.
    Running,
}

/// A head.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Head {
    /// Where it is.
    pub phase: Phase,
    /// Its epoch.
    pub epoch: u8,
    /// The in-sync set it counts in.
    pub in_sync: u8,
    /// The set that it wants and has not heard to be the store's: it counts in both.
    pub wanted: Option<u8>,
    /// Members that answered its Seal.
    pub answered: u8,
    /// Its log; while sealing, the best of the logs that answered.
    pub log: Vec<Record>,
    /// Records through here, EpochStart's included, are settled before it serves.
    pub start: u8,
    /// Members whose log is a prefix of its own.
    pub follows: u8,
    /// Records that it knows each member to have.
    pub acked: [u8; MEMBERS],
    /// Records that each member has said it has; the answer is on its way.
    pub answering: [u8; MEMBERS],
    /// Records at a write quorum.
    pub commit: u8,
    /// Members whose read grant it counts on.
    pub trusted: u8,
}

impl Head {
    /// True once its EpochStart record is at a write quorum.
    pub fn serves(&self) -> bool {
        self.phase == Phase::Running && self.commit >= self.start
    }
}

/// Everything.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct State {
    /// The cluster store.
    pub store: Store,
    /// The members.
    pub members: [Member; MEMBERS],
    /// The heads.
    pub heads: [Head; HEADS],
    /// Writes that were begun.
    pub begun: u8,
    /// Writes that a guest was told of as done, one bit each.
    pub acknowledged: u8,
    /// Changes of the in-sync set that were begun.
    pub changes: u8,
}

impl State {
    /// The state that stands for this one and all that differ from it only in the names of heads and
    /// members: no rule looks at a name.
    #[must_use]
    pub(crate) fn canonical(mut self) -> Self {
        self.heads.sort_by_key(|head| core::cmp::Reverse(head.epoch));
        let key = |at: usize| {
            let heads = self.heads.each_ref().map(|head| {
                let sets = [head.in_sync, head.wanted.unwrap_or(0), head.answered, head.follows];
                let bits = sets.map(|set| set & bit(at) != 0);
                (bits, head.trusted & bit(at) != 0, head.acked[at], head.answering[at])
            });
            (self.store.in_sync & bit(at) != 0, heads, &self.members[at])
        };
        let mut order = [0, 1, 2];
        order.sort_by(|a, b| key(*a).cmp(&key(*b)));
        if order == [0, 1, 2] {
            return self;
        }
        let renamed = |set: Set| {
            let new = (0..MEMBERS).filter(|at| set & bit(order[*at]) != 0);
            new.fold(0, |set, at| set | bit(at))
        };
        self.store.in_sync = renamed(self.store.in_sync);
        for head in &mut self.heads {
            head.in_sync = renamed(head.in_sync);
            head.wanted = head.wanted.map(renamed);
            head.answered = renamed(head.answered);
            head.follows = renamed(head.follows);
            head.trusted = renamed(head.trusted);
            head.acked = order.map(|at| head.acked[at]);
            head.answering = order.map(|at| head.answering[at]);
        }
        self.members = order.map(|at| core::mem::take(&mut self.members[at]));
        self
    }
}
