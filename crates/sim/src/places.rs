//! Sometimes-places: what a good set of runs must have reached. A place that no seed reaches
//! says that a check has stopped checking, or a fault has stopped striking.

/// Declares the places: a name in the code, and what it says.
macro_rules! places {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        /// A place.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Place { $($(#[$doc])* #[doc = $text] $name,)* }

        impl Place {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// What it says.
            pub const fn text(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }
        }
    };
}

places! {
    HeadSuperseded = "a head was told that it is deposed",
    HeadReleased = "a head released its members in good order",
    HeadRested = "the guest stopped and a head rested",
    DeposedAtRest = "a head was deposed while it rested, and somebody used it again",
    HeadStalled = "requests waited for a quorum",
    HeadResumed = "requests no longer waited for a quorum",
    StaleHeadUsed = "somebody used a head after its successor had opened",
    StaleWriteReturned = "a deposed head gave a write back",
    StaleReadReturned = "a deposed head gave a read back",
    UndecidedSeen = "a read decided a write whose head was gone",
    UndecidedDropped = "a read showed that a write of a lost head never landed",
    KilledWithRequests = "a head's process was killed with requests under way",
    KilledWithDiskWrites = "a process was killed with disk writes under way",
    Upgraded = "a next process took everything over from a running one",
    UpgradeTakenBack = "a next process died and the one before took everything back",
    GrantHandedOver = "an upgraded server had granted reads, and the next process knew",
    LogHandedOver = "an upgraded server had log that was not home, and the next process knew where",
    PowerLost = "a server lost power",
    PowerLostWhileDown = "a server lost power while its process was down",
    AllPowerLost = "every server lost power at once",
    WallClockWrong = "a process's wall clock was wrong",
    ClockJumped = "a head's clock jumped ahead",
    ChangeSplit = "a change of members was interrupted by a partition between the old and the new",
    PausedPastGrant = "a process stood still for longer than a grant lasts",
    PausedHead = "a process with a serving head stood still",
    PartitionedHead = "a serving head was cut off from every other process",
    HalfOpen = "somebody spoke into a connection whose other end was gone",
    SegmentCorrupted = "bits flipped in a connection",
    SegmentLost = "a segment had to be sent again",
    WriterBlocked = "a connection had no room for what was to be sent",
    SyncLied = "a device said that data is on media that is not",
    FlushedAfterLoss = "what was flushed survived a loss of power that may have cost more",
    LogFull = "a log had no room and writes waited",
    LogFreed = "a log had room again",
    CopyReadAlone = "a member's copy alone was read and was whole",
    ReadErrorHit = "a disk could not read",
    PageRotted = "a bit flipped on media",
    WriteLost = "a write was said to be done and was not",
    WriteMisdirected = "a write landed elsewhere",
    DeviceFailed = "a device failed, and its pool stopped acknowledging",
    RottedInMidst = "rot struck settled records of a log before others that vouch for them",
    DamageNoticed = "a store said that it had lost durable records",
    PoolLost = "a pool could not be opened any more",
    StoreAnswerLost = "a compare-and-swap's answer was lost",
    StoreSwapWonUnheard = "a process won the lease and was not told, and found out",
    StoreConflict = "two processes wanted the lease at once",
    StoreAwayWhileServing = "a head served while the cluster store was away",
    MemberCaughtUp = "a member caught up from a log",
    FillStarted = "a replica began to be filled with chunks",
    FillDone = "a filling was done",
    FillFailed = "a filling had to rest",
    FillCutOff = "a head, a replica that was filled and its source were cut off together",
    LeftWaiting = "an opening waited for a lost pool while another member needed a copy, or room",
    ReplicaMade = "a spare server made a replica",
    ReplicaDeleted = "a member that had left deleted its replica",
    VolumeGrown = "a volume grew while it was used",
    JointChange = "a head agreed to other members",
    ChangeLost = "a change of members that a head had begun did not come true",
    BlocksMended = "blocks that a member could not read were written again",
}

/// How often each place was reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Places(Vec<u64>);

impl Default for Places {
    fn default() -> Self {
        Self(vec![0; Place::ALL.len()])
    }
}

impl Places {
    /// Notes that `place` was reached.
    pub fn reach(&mut self, place: Place) {
        self.0[place as usize] += 1;
    }

    /// What the network counted.
    pub(crate) fn add_network(&mut self, network: &crate::network::Network) {
        self.0[Place::SegmentCorrupted as usize] += network.corrupted;
        self.0[Place::SegmentLost as usize] += network.lost;
    }

    /// Adds what another run reached.
    pub fn add(&mut self, other: &Self) {
        self.0.iter_mut().zip(&other.0).for_each(|(mine, theirs)| *mine += theirs);
    }

    /// How often a place was reached.
    pub fn count(&self, place: Place) -> u64 {
        self.0[place as usize]
    }

    /// Places that were not reached.
    pub fn missing(&self) -> impl Iterator<Item = Place> {
        Place::ALL.iter().copied().filter(|place| self.count(*place) == 0)
    }
}
