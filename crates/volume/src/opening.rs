//! Opening: wait for a seal quorum, choose the tail, bring it to a write quorum, write EpochStart,
//! serve.
//!
//! Why the greatest last position holds everything acknowledged: a seal quorum meets every write
//! quorum, so one of the answers holds it; and a log with a greater end (epoch before seq) either
//! contains that one's log, or was begun by a head that had settled it. Records of older epochs count
//! as settled only once a record of this epoch follows them at a write quorum: until then another
//! head could choose a tail without them.
//!
//! EpochStart is written only when a write quorum holds the whole tail: before, no record of this
//! epoch exists anywhere, so if the chosen source goes away another tail may still be chosen.
//! And it counts only on media, so that what the old epochs left undecided stays as this opening
//! decided it, whatever loses power afterwards.

use core::time::Duration;

use base::planted::{self, Bug};
use base::{
    BlockCount, Epoch, Instant, Lba, Position, Record, RecordHeader, RecordKind, ReplicaState, Seq,
};

use crate::head::{Head, Output, Phase};
use crate::log::Entry;
use crate::member::{Member, Mode};
use crate::quorum::{Bits, bit};
use crate::status::HeadPhase;

/// The least that members are waited for when the others have sealed, since they were all asked at once;
/// and the most if those agree.
const SEAL_GRACE_MIN: Duration = Duration::from_millis(1);

impl Head {
    pub(crate) fn advance_opening(&mut self) {
        if let Phase::Sealing { quorum_since } = self.phase {
            self.advance_sealing(quorum_since);
        }
        if self.phase == Phase::Reconciling {
            self.advance_reconciling();
        }
        if let Phase::Reconciling | Phase::Starting = self.phase {
            self.settle_tail();
        }
    }

    fn advance_sealing(&mut self, quorum_since: Option<Instant>) {
        let sealed = self.members_where(|member| matches!(member.mode, Mode::Sealed(_)));
        if !self.sets.seal_quorum_met(sealed)
            && (sealed == 0 || !planted::is(Bug::OpenWithoutSealQuorum))
        {
            self.phase = Phase::Sealing { quorum_since: None };
            return;
        }
        let since = quorum_since.unwrap_or(self.now);
        self.phase = Phase::Sealing { quorum_since: Some(since) };
        if self.others_until(since).is_none_or(|until| until <= self.now) {
            self.choose_tail();
        }
    }

    /// A seal quorum has answered: until when the others are waited for, if there are any. They save a
    /// second look at their logs later; so for no longer than it took until now, and guests wait. Where
    /// all logs end alike, as after a head that has left in order, the others' will hardly differ.
    fn others_until(&self, quorum_since: Instant) -> Option<Instant> {
        let late = |member: &&Member| {
            matches!(member.mode, Mode::Sealing | Mode::Resting { error: None, .. })
        };
        let asked = self.members.iter().filter(late).map(|member| member.since).min()?;
        let took = quorum_since.since(asked).max(SEAL_GRACE_MIN);
        let most = if self.ends_agree() { SEAL_GRACE_MIN } else { self.tunables.seal_grace };
        Some(quorum_since + took.min(most))
    }

    /// The logs of all members that have sealed end alike.
    fn ends_agree(&self) -> bool {
        let mut ends = self.members.iter().filter_map(|member| match member.mode {
            Mode::Sealed(state) => Some(state.last),
            Mode::Down
            | Mode::Resting { .. }
            | Mode::Sealing
            | Mode::Matching(_)
            | Mode::Truncating { .. }
            | Mode::CatchingUp(_)
            | Mode::Live
            | Mode::Filling(_)
            | Mode::Parked { .. } => None,
        });
        let first = ends.next();
        ends.all(|end| Some(end) == first)
    }

    /// Takes the greatest last position of the in-sync members that answered.
    fn choose_tail(&mut self) {
        let mut states = [None::<ReplicaState>; base::limits::MEMBERS_MAX];
        let mut commit = Seq::ZERO;
        for (state, member) in states.iter_mut().zip(&self.members) {
            let Mode::Sealed(sealed) = member.mode else { continue };
            *state = Some(sealed);
            if member.in_sync() {
                commit = commit.max(sealed.commit);
            }
        }
        let passed_over = core::mem::take(&mut self.passed_over);
        let without = self.greatest_end(passed_over).filter(|end| end.seq >= commit);
        self.cut = passed_over != 0 && without.is_some() && self.suffice(passed_over);
        let tail = if self.cut { without } else { self.greatest_end(0) };
        let tail = tail.expect("a seal quorum has members");
        self.log.follow(tail, commit);
        self.phase = Phase::Reconciling;
        // Those that hold the tail first: the others are compared with them.
        for holders in [true, false] {
            for (index, state) in states.into_iter().enumerate() {
                if let Some(state) = state.filter(|state| (state.last == tail) == holders) {
                    self.match_member(index, state);
                }
            }
        }
    }

    /// The greatest last position of in-sync members that have sealed, but those `passed_over`.
    fn greatest_end(&self, passed_over: Bits) -> Option<Position> {
        let ends =
            self.members.iter().enumerate().filter_map(|(index, member)| match member.mode {
                Mode::Sealed(state) if member.in_sync() && passed_over & bit(index) == 0 => {
                    Some(state.last)
                }
                _ => None,
            });
        if planted::is(Bug::ShortestTail) { ends.min() } else { ends.max() }
    }

    fn advance_reconciling(&mut self) {
        self.drop_unreadable();
        self.pass_over();
        let tail = self.log.tail();
        let holders = self.holders(tail.seq, false);
        if holders & self.sets.old() == 0 {
            self.seal_again();
        } else if self.sets.write_quorum_met(holders) {
            self.write_epoch_start(tail);
        }
    }

    /// Settles what is on media at a write quorum, if no later opening can decide otherwise. Else a member whose log is
    /// full of what this opening may not settle never has room for the rest of it, or for the EpochStart.
    fn settle_tail(&mut self) {
        let reached = self.write_quorum_durable().min(self.log.tail().seq);
        if reached > self.log.durable && self.outlasts_this_opening(reached) {
            self.log.settle(reached);
            self.plan_commit_news();
        }
    }

    /// True if every later opening keeps the chosen log through `seq` once a write quorum has that on media, though the
    /// EpochStart is not there yet: each member in sync is known to hold a prefix of that log and nothing
    /// else, or a log that ends in an older epoch than `seq` is of.
    ///
    /// Records of old epochs at a write quorum do not count by themselves since a member elsewhere may
    /// have a log that ends in a newer epoch and lacks them. Here there is none: all members in sync, of both sets
    /// while a change is open, have sealed this epoch, so that nobody else writes to their logs. A later opening
    /// chooses among these, and logs that go on from one that was chosen so; those that have what is on media at a
    /// write quorum are in every seal quorum, of two prefixes the longer one wins, and an older epoch's end does not.
    pub(crate) fn outlasts_this_opening(&self, seq: Seq) -> bool {
        let tail = self.log.tail();
        let of_followers = self.members.iter().filter(|member| member.follows());
        let joined = of_followers.map(|member| member.joined).filter(|joined| joined.seq <= seq);
        let known = joined.chain((tail.seq <= seq).then_some(tail)).map(|position| position.epoch);
        let epoch = known.max().unwrap_or(Epoch::NONE);
        self.members.iter().enumerate().all(|(slot, member)| {
            let older = member.heard && member.end.epoch < epoch;
            !self.sets.counts(slot) || member.follows() || older
        })
    }

    /// True if a member that answered late has a tail to prefer. It holds nothing that had to
    /// survive, unless a member of the seal quorum lost its power and with it records that were
    /// acknowledged but not flushed: then it may have them.
    pub(crate) fn better_tail(&self, index: usize, state: ReplicaState) -> bool {
        self.members[index].in_sync() && !self.cut && state.last > self.log.tail()
    }

    /// Chooses again among those that answer: nobody connected holds the whole tail any more, or
    /// somebody came with a better one.
    pub(crate) fn seal_again(&mut self) {
        self.phase = Phase::Sealing { quorum_since: None };
        self.cut = false;
        for index in 0..self.members.len() {
            match self.members[index].mode {
                Mode::Sealed(_)
                | Mode::Matching(_)
                | Mode::Truncating { .. }
                | Mode::CatchingUp(_)
                | Mode::Live => self.reset(index, None),
                // The log it is brought may be another than the one to come; chunks are not.
                Mode::Filling(ref filling) if !filling.copies_chunks() => self.reset(index, None),
                Mode::Down
                | Mode::Resting { .. }
                | Mode::Sealing
                | Mode::Filling(_)
                | Mode::Parked { .. } => {}
            }
        }
        self.wake_members();
    }

    fn write_epoch_start(&mut self, tail: Position) {
        let buffer = self.buffers.take(0);
        let Some(buffer) = buffer.or_else(|| self.reserve.as_ref()?.take(0)) else {
            self.buffer_retry = Some(self.now + self.tunables.retry_min);
            return;
        };
        self.buffer_retry = None;
        let header = RecordHeader {
            key: self.key,
            position: Position::new(self.epoch, tail.seq.next()),
            previous_epoch: tail.epoch,
            kind: RecordKind::EpochStart,
            block_size: self.block_size,
            lba: Lba(0),
            blocks: BlockCount(0),
            fua: false,
        };
        let record = Record::encode(header, buffer);
        let media = !planted::is(Bug::StartNotOnMedia);
        self.log.push(Entry { record, request: None, arrived: self.now, media });
        self.phase = Phase::Starting;
    }

    /// EpochStart is at a write quorum, and with it everything before.
    pub(crate) fn started(&mut self, start: Seq) {
        assert!(self.log.commit() >= start, "serve only after EpochStart is at a write quorum");
        self.phase = Phase::Serving;
        self.outputs.push_back(Output::Opened { position: Position::new(self.epoch, start) });
    }

    pub(crate) fn phase_deadline(&self) -> Option<Instant> {
        match self.phase {
            Phase::Sealing { quorum_since } => {
                quorum_since.and_then(|since| self.others_until(since))
            }
            Phase::Releasing { until } => until,
            Phase::Reconciling | Phase::Starting | Phase::Serving | Phase::Ended(_) => None,
        }
    }

    pub(crate) fn public_phase(&self) -> HeadPhase {
        match self.phase {
            Phase::Sealing { .. } => HeadPhase::Sealing,
            Phase::Reconciling => HeadPhase::Reconciling,
            Phase::Starting => HeadPhase::Starting,
            Phase::Serving => HeadPhase::Serving,
            Phase::Releasing { .. } => HeadPhase::Releasing,
            Phase::Ended(phase) => phase,
        }
    }
}
