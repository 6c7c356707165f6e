//! Bugs that are planted to prove that the simulator finds them.
//!
//! A planted bug is one condition in production code, `… || planted::is(Bug::Name)`. Without the
//! feature `planted`, which only the simulator's proof is built with, [`is`] is `false` at compile
//! time and the code is what it looks like without it. With the feature one bug at a time is
//! live, in one thread.

/// Declares the bugs: a name in the code, and what it does.
macro_rules! bugs {
    ($($name:ident = $text:literal,)*) => {
        /// A planted bug.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Bug { $(#[doc = $text] $name,)* }

        impl Bug {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// What it does.
            pub const fn text(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }

            /// Its name.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$name => stringify!($name),)* }
            }
        }
    };
}

bugs! {
    AckBeforeQuorum = "a write is acknowledged before any member has answered",
    OneAckTooFew = "one member less than a quorum is enough",
    AckBeforeMedia = "a write that must be on media counts when it is in a cache",
    OpenWithoutSealQuorum = "an opening goes on when the first member has answered the seal",
    ShortestTail = "an opening takes the shortest log instead of the longest",
    TailMatchedBySeq = "a member's log is taken for the head's because it is as long",
    ReadOfStaleMember = "a read does not say what the member must hold",
    UndecidedRead = "a read is answered with a write that no quorum holds yet",
    GrantUnchecked = "a read leaves without read grants",
    GrantFromAnswer = "a grant counts from its answer instead of from its question",
    JointRuleForgotten = "while members change only the old set counts",
    PromotedTooEarly = "a member counts before it holds what was acknowledged: neither the planner nor \
                        the head looks",
    ReuseSeq = "a head gives a seq twice",
    NoFencingOnArrival = "a member obeys a session whose epoch is over",
    NoGateOnDeparture = "a deposed head hears that its writes were accepted, and a seal does not wait for \
                         what is being written (else the new head finds those writes)",
    GrantNotWaited = "a seal is answered, and the new head obeyed, while the old head may still read (the \
                      answer alone does no harm: the new head's first record waits, too)",
    RestKeepsGrants = "a head that has released its members goes on with what they granted before",
    GrantForgottenByRestart = "a restarted server does not know that it granted reads",
    GrantForgottenByHandOver = "a server does not tell the process that takes its pool over that it granted \
                                reads",
    LogEndToldTooLow = "a server tells the process that takes its pool over that its logs are a record shorter",
    LogSegmentsUntold = "a server does not tell that process of segments with something that is not home",
    SealNotPersisted = "a seal is answered before it is on media",
    GrowthNotPersisted = "a replica says that it has grown, and forgets it when it restarts",
    SyncNotAwaited = "a record counts as durable when it is written",
    TornTailAccepted = "a torn record at the end of a log is believed",
    DamageTakenForTear = "a log damaged in its middle is cut there",
    ReadUnverified = "data from a disk is not compared with its checksum",
    NewerBlockDropped = "flushing home forgets a block that was written again meanwhile",
    HomeBeforeData = "a chunk is named by the journal before its data or metadata are on media (for one of \
                      them alone the sync of the other stands in)",
    HomeBeforeMeta = "a chunk is named by the journal before its metadata is on media",
    HomeMetaInPlace = "a chunk's metadata is overwritten where it stands",
    MendedOverNewer = "a damaged block is mended with what it held before a newer write",
    DiscardForgotten = "a discard does not reach home",
    UncommittedHome = "what may yet be cut from the log is flushed home",
    TrimBeforeHome = "a log is trimmed before what it holds is home: half of the index is not looked at, \
                      and nobody looks again",
    RecordUnverified = "a record that comes over the network is not verified",
    AnswerUnverified = "data that comes over the network is not verified",
    FuaForgotten = "a write that must be on media is acknowledged when it is in a cache",
    FlushBeforeQuorum = "a flush is answered when one member has flushed",
    StartNotOnMedia = "an opening is done before its first record is on media",
    EarlyRelease = "a head releases its members while requests are under way",
    TruncatesTooLittle = "a member's log keeps the first record that differs",
    CommitNewsTooHigh = "members are told that records are settled which are not",
    FillSkipsChunk = "a fill leaves out chunks that it does not have",
    FillTrustsOldChunk = "a fill keeps chunks that are older than the source's",
    FillKeepsDiscarded = "a fill keeps chunks that the source does not have",
    FetchUnsettled = "a fill is given what may yet be cut from the log",
    StagedBeforeMedia = "a copied chunk counts before it is on media",
    HeaderUnverified = "a header that comes over the network is not verified",
}

#[cfg(not(feature = "planted"))]
mod selector {
    use super::Bug;

    /// True if `bug` is live: never.
    #[must_use]
    pub const fn is(_bug: Bug) -> bool {
        false
    }
}

#[cfg(feature = "planted")]
mod selector {
    use std::cell::Cell;

    use super::Bug;

    thread_local! {
        static LIVE: Cell<Option<Bug>> = const { Cell::new(None) };
    }

    /// True if `bug` is live in this thread.
    #[must_use]
    pub fn is(bug: Bug) -> bool {
        LIVE.with(Cell::get) == Some(bug)
    }

    /// Makes `bug` live in this thread, and no other.
    pub fn plant(bug: Option<Bug>) {
        LIVE.with(|live| live.set(bug));
    }
}

pub use selector::is;
#[cfg(feature = "planted")]
pub use selector::plant;
