//! Where does a member's log stop being the head's? Two logs that agree on the epoch at a seq agree
//! on everything up to it, and every record names the epoch before it. So: is the member's last
//! record ours? Then its log is a prefix. Else search, between its commit seq (settled, so
//! shared) and the shorter of the two ends, for the last record that is shared, and truncate what
//! follows. What cannot be read is looked up elsewhere or waited for, never dropped.

use base::planted::{self, Bug};
use base::{BufferPool, CommandBody, Epoch, Instant, ReplicaError, ReplicaState, ReplyBody, Seq};

use crate::catchup::CatchUp;
use crate::head::Head;
use crate::member::Mode;
use crate::quorum::{Bits, bit};
use crate::sessions::Answer;
use crate::status::MemberMode;
use crate::tag::Kind;

/// The search for the last shared record.
#[derive(Debug)]
pub(crate) struct Matching {
    state: ReplicaState,
    /// Shared.
    low: Seq,
    /// Not shared, once known.
    high: Option<Seq>,
    /// Is this one shared?
    probe: Seq,
    ours: Side,
    theirs: Side,
    /// Records at or below this seq are in no log that was asked.
    floor: Seq,
    /// Donors that could not read the probe.
    tried: Bits,
    /// Those of them that said it is damaged, or the one after it.
    rotten: Bits,
    /// The record at `high` counts as not shared because the member cannot read it.
    doubt: bool,
    /// The search is over: keep the member's log through here once somebody has shown that
    /// he can read our record at `high`, which is the probe now.
    confirm: Option<Seq>,
    pub(crate) damaged: Option<Seq>,
    pub(crate) retry_at: Option<Instant>,
}

/// What is known of the epoch at the probe on one side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    /// Not asked; `at` the record after the probe (its `previous_epoch`), else at the probe itself.
    Ask { after: bool },
    /// Asked member `donor`.
    Asked { after: bool, donor: usize, tag: u64 },
    /// Known.
    Known(Epoch),
}

const ASK: Side = Side::Ask { after: true };

/// What to do after a step of the search.
enum Step {
    Ask,
    Shared(Seq),
    Park(MemberMode),
}

impl Matching {
    fn new(state: ReplicaState, end: Seq) -> Self {
        let probe = state.last.seq.min(end);
        Self {
            state,
            low: state.commit.min(probe),
            high: None,
            probe,
            ours: ASK,
            theirs: ASK,
            floor: Seq::ZERO,
            tried: 0,
            rotten: 0,
            doubt: false,
            confirm: None,
            damaged: None,
            retry_at: None,
        }
    }

    fn probe(&mut self, probe: Seq) {
        self.probe = probe;
        self.ours = ASK;
        self.theirs = ASK;
        self.tried = 0;
        self.rotten = 0;
        self.damaged = None;
        self.retry_at = None;
    }

    /// Both epochs at the probe are known: narrows the search.
    fn compare(&mut self, ours: Epoch, theirs: Epoch) -> Step {
        if ours == theirs {
            self.low = self.probe;
        } else if self.probe <= self.low {
            // Settled records differ: one of the two logs is not what its member promised.
            return Step::Park(MemberMode::Diverged);
        } else {
            self.high = Some(self.probe);
            self.doubt = false;
        }
        self.narrow()
    }

    fn narrow(&mut self) -> Step {
        let Some(high) = self.high else { return Step::Shared(self.low) };
        if high <= self.floor {
            return Step::Park(MemberMode::TooFarBehind);
        }
        if self.low.next() >= high {
            let keep = if planted::is(Bug::TruncatesTooLittle) { high } else { self.low };
            return Step::Shared(keep);
        }
        let middle = Seq(self.low.0 + (high.0 - self.low.0) / 2);
        let probe = if self.floor < high { middle.max(self.floor) } else { middle };
        self.probe(probe);
        Step::Ask
    }

    /// The donor no longer has records through `trimmed`.
    fn trimmed(&mut self, trimmed: Seq) -> Step {
        self.floor = self.floor.max(trimmed);
        match self.high {
            // The member's end itself is gone from the log: what follows cannot be copied.
            None => Step::Park(MemberMode::TooFarBehind),
            Some(high) if high <= self.floor => Step::Park(MemberMode::TooFarBehind),
            Some(_) => {
                self.probe(self.floor.max(self.low));
                Step::Ask
            }
        }
    }
}

impl Head {
    /// Begins to bring a sealed member into line with the head's log.
    pub(crate) fn match_member(&mut self, index: usize, state: ReplicaState) {
        let end = self.log.last();
        let planted = planted::is(Bug::TailMatchedBySeq) && state.last.seq == end.seq;
        if state.last.epoch == end.epoch && state.last.seq <= end.seq || planted {
            self.shared(index, state, state.last.seq);
            return;
        }
        if state.last.epoch == self.epoch && state.last.seq > end.seq {
            self.needs_copy(index, MemberMode::Diverged, false);
            return;
        }
        let now = self.now;
        self.members[index].enter(Mode::Matching(Matching::new(state, end.seq)), now);
        self.pump_matching(index);
    }

    fn matching(&mut self, index: usize) -> Option<&mut Matching> {
        match &mut self.members[index].mode {
            Mode::Matching(matching) => Some(matching),
            Mode::Down
            | Mode::Resting { .. }
            | Mode::Sealing
            | Mode::Sealed(_)
            | Mode::Truncating { .. }
            | Mode::CatchingUp(_)
            | Mode::Live
            | Mode::Filling(_)
            | Mode::Parked { .. } => None,
        }
    }

    /// Asks for what the search lacks, or goes on with what it knows.
    pub(crate) fn pump_matching(&mut self, index: usize) {
        let now = self.now;
        let Some(matching) = self.matching(index) else { return };
        if matching.retry_at.is_some_and(|at| at > now) {
            return;
        }
        if matching.retry_at.take().is_some() {
            matching.tried = 0;
            matching.rotten = 0;
        }
        self.ask_theirs(index);
        self.ask_ours(index);
        let Some(matching) = self.matching(index) else { return };
        if let (Some(keep), Side::Known(_)) = (matching.confirm, matching.ours) {
            let state = matching.state;
            if self.others_first(index) {
                return self.retry_matching(index, None);
            }
            return self.shared(index, state, keep);
        }
        if let (Side::Known(ours), Side::Known(theirs)) = (matching.ours, matching.theirs) {
            let step = matching.compare(ours, theirs);
            self.step(index, &step);
        }
    }

    fn step(&mut self, index: usize, step: &Step) {
        match *step {
            Step::Ask => self.pump_matching(index),
            Step::Park(why) => self.needs_copy(index, why, why == MemberMode::TooFarBehind),
            Step::Shared(keep) => {
                let Some(matching) = self.matching(index) else { return };
                let (state, doubt) = (matching.state, matching.doubt);
                if doubt {
                    // Its own record may be the only good reason to wait for ours.
                    matching.confirm_before_keeping(keep);
                    self.members[index].doubted = true;
                    return self.pump_matching(index);
                }
                let member = &mut self.members[index];
                if !member.doubted {
                    member.reach = keep;
                }
                self.shared(index, state, keep);
            }
        }
    }

    fn ask_ours(&mut self, index: usize) {
        let Some(matching) = self.matching(index) else { return };
        let (probe, side, tried) = (matching.probe, matching.ours, matching.tried);
        let Side::Ask { after } = side else { return };
        let (confirming, theirs) = (matching.confirm.is_some(), matching.theirs);
        let known = if confirming {
            self.log.entry(probe).map(|entry| entry.record.header().position.epoch)
        } else {
            self.epoch_of_ours(probe, theirs)
        };
        let side = if let Some(epoch) = known {
            Side::Known(epoch)
        } else {
            let seq = if after { probe.next() } else { probe };
            match self.donor(seq, tried | 1 << index) {
                Some(donor) => match self.scan(donor, seq, true) {
                    Some(tag) => Side::Asked { after, donor, tag },
                    None => return self.retry_matching(index, None),
                },
                None if after && tried != 0 => {
                    if let Some(matching) = self.matching(index) {
                        matching.tried = 0;
                        matching.ours = Side::Ask { after: false };
                    }
                    return self.ask_ours(index);
                }
                None if tried != 0 && self.ends_settled(index) => {
                    return self.step(index, &Step::Shared(probe));
                }
                None => return self.retry_matching(index, (tried != 0).then_some(seq)),
            }
        };
        if let Some(matching) = self.matching(index) {
            matching.ours = side;
        }
    }

    /// True if the member's log ends in what is settled, and nothing differed yet: such a log is part of every
    /// later one. To compare its end finds members that promise too much, but is not worth a wait for what
    /// nobody can read, which may be there in this very log.
    fn ends_settled(&mut self, index: usize) -> bool {
        self.matching(index).is_some_and(|matching| {
            matching.high.is_none()
                && matching.confirm.is_none()
                && matching.state.last.seq == matching.probe
                && matching.state.commit >= matching.probe
        })
    }

    /// The epoch of our record `probe`, as far as it follows from what is known.
    fn epoch_of_ours(&self, probe: Seq, theirs: Side) -> Option<Epoch> {
        let last = self.log.last();
        // An epoch has one EpochStart, and its records follow that without a gap: if theirs there is
        // of the epoch in which ours ends, ours is, too.
        if theirs == Side::Known(last.epoch) && probe <= last.seq {
            return Some(last.epoch);
        }
        self.log.epoch_at(probe).or_else(|| {
            let entry = self.log.entry(probe.next())?;
            Some(entry.record.header().previous_epoch)
        })
    }

    fn ask_theirs(&mut self, index: usize) {
        let Some(matching) = self.matching(index) else { return };
        let Side::Ask { after } = matching.theirs else { return };
        let (probe, last) = (matching.probe, matching.state.last);
        let side = if probe == Seq::ZERO {
            Side::Known(Epoch::NONE)
        } else if probe == last.seq {
            Side::Known(last.epoch)
        } else {
            let seq = if after { probe.next() } else { probe };
            match self.scan(index, seq, true) {
                Some(tag) => Side::Asked { after, donor: index, tag },
                None => return self.retry_matching(index, None),
            }
        };
        if let Some(matching) = self.matching(index) {
            matching.theirs = side;
        }
    }

    fn retry_matching(&mut self, index: usize, damaged: Option<Seq>) {
        let at = self.now + self.tunables.retry_min;
        if let Some(matching) = self.matching(index) {
            matching.damaged = damaged.or(matching.damaged);
            matching.retry_at = Some(at);
        }
    }

    /// Reads record `seq` of a member's log. `None` while there is no buffer; if it is `urgent`,
    /// the head's own reserve helps out: writes that wait for a member to catch up must not
    /// keep it from catching up by holding all buffers.
    pub(crate) fn scan(&mut self, donor: usize, seq: Seq, urgent: bool) -> Option<u64> {
        let bytes = base::limits::PAYLOAD_BYTES_MAX;
        let buffer = match self.buffers.take(bytes) {
            Some(buffer) => buffer,
            None if urgent => self.reserve.get_or_insert_with(reserve).take(bytes)?,
            None => return None,
        };
        let number = self.next_number();
        Some(self.send(donor, Kind::Scan, number, CommandBody::Scan { seq, buffer }))
    }

    /// A member other than those in `except` whose log is known to hold our record `seq`: the local
    /// one, else the fastest.
    pub(crate) fn donor(&self, seq: Seq, except: u8) -> Option<usize> {
        let able = |(index, member): &(usize, &crate::member::Member)| {
            except & 1 << index == 0 && member.follows() && member.acked >= seq
        };
        let rank = |(_, member): &(usize, &crate::member::Member)| {
            (member.trimmed >= seq, self.local != Some(member.server), self.reluctance(member))
        };
        self.members.iter().enumerate().filter(able).min_by_key(rank).map(|(index, _)| index)
    }

    /// Takes the answer to a scan that the search asked for. False if it did not.
    pub(crate) fn matching_scanned(&mut self, index: usize, tag: u64, result: &Answer) -> bool {
        let key = self.key;
        let Some(matching) = self.matching(index) else { return false };
        let is_ours = match (matching.ours, matching.theirs) {
            (Side::Asked { tag: asked, .. }, _) if asked == tag => true,
            (_, Side::Asked { tag: asked, .. }) if asked == tag => false,
            (_, _) => return false,
        };
        let side = if is_ours { matching.ours } else { matching.theirs };
        let Side::Asked { after, donor, .. } = side else { return false };
        let seq = if after { matching.probe.next() } else { matching.probe };
        let known = match result {
            Ok(ReplyBody::Record(record)) => {
                let header = record.header();
                let valid = header.key == key && header.position.seq == seq;
                valid.then_some(if after { header.previous_epoch } else { header.position.epoch })
            }
            Ok(_) | Err(_) => None,
        };
        if let Some(epoch) = known {
            *matching.side(is_ours) = Side::Known(epoch);
            matching.damaged = None;
            self.pump_matching(index);
        } else if is_ours {
            *matching.side(true) = Side::Ask { after };
            matching.tried |= bit(donor);
            if matches!(result, Err(ReplicaError::Damaged)) {
                matching.rotten |= bit(donor);
            }
            let tried = matching.tried;
            let another = self.donor(seq, tried | 1 << index).is_some();
            match result {
                Err(ReplicaError::Trimmed { trimmed }) if !another => {
                    let Some(matching) = self.matching(index) else { return true };
                    let step = matching.trimmed((*trimmed).max(seq));
                    self.step(index, &step);
                }
                Ok(_) | Err(_) => self.pump_matching(index),
            }
        } else {
            self.their_scan_failed(index, after, result);
        }
        true
    }

    /// The member cannot read its own record: try the one before, then take it for not shared.
    fn their_scan_failed(&mut self, index: usize, after: bool, result: &Answer) {
        match result {
            Err(ReplicaError::Damaged) | Ok(_) => {}
            Err(ReplicaError::Trimmed { .. }) => {
                // What is not in its log any more was settled.
                let Some(matching) = self.matching(index) else { return };
                matching.low = matching.low.max(matching.probe);
                let step = matching.narrow();
                return self.step(index, &step);
            }
            Err(error) => return self.member_failed(index, *error),
        }
        let Some(matching) = self.matching(index) else { return };
        if after && matching.probe > Seq::ZERO {
            matching.theirs = Side::Ask { after: false };
            return self.pump_matching(index);
        }
        if matching.probe <= matching.low {
            return self.needs_copy(index, MemberMode::Diverged, true);
        }
        matching.high = Some(matching.probe);
        matching.doubt = true;
        let step = matching.narrow();
        self.step(index, &step);
    }

    /// The member's log is ours through `seq`: truncates the rest, or goes on from there.
    fn shared(&mut self, index: usize, state: ReplicaState, seq: Seq) {
        if seq == state.last.seq {
            self.follow(index, state.last.epoch, seq, state.durable);
        } else if seq < state.commit {
            self.needs_copy(index, MemberMode::Diverged, false);
        } else {
            let number = self.next_number();
            self.send(index, Kind::Truncate, number, CommandBody::Truncate { keep: seq });
            let now = self.now;
            self.members[index].enter(Mode::Truncating { keep: seq, durable: state.durable }, now);
        }
    }

    pub(crate) fn truncate_answered(&mut self, index: usize, result: &Answer) {
        let Mode::Truncating { keep, durable } = self.members[index].mode else { return };
        match result {
            Ok(ReplyBody::Truncated { last }) if last.seq == keep => {
                self.follow(index, last.epoch, keep, durable);
            }
            Ok(_) => self.member_failed(index, ReplicaError::Invalid),
            Err(error) => self.member_failed(index, *error),
        }
    }

    /// The member's log ends at `acked` and is a prefix of ours.
    fn follow(&mut self, index: usize, epoch: Epoch, acked: Seq, durable: Seq) {
        let base = self.log.base();
        let now = self.now;
        let depth = self.tunables.catch_up_depth;
        if self.fill_log(index, acked) {
            return;
        }
        let member = &mut self.members[index];
        member.follow_from(acked, epoch, durable);
        let mode = if member.next_send >= base {
            Mode::Live
        } else {
            Mode::CatchingUp(Box::new(CatchUp::new(member.next_send, depth)))
        };
        member.enter(mode, now);
        self.reads.retry();
        self.new_donor();
    }
}

/// What a head keeps for itself, once the shared pool has let it down.
fn reserve() -> BufferPool {
    BufferPool::heap(1, base::limits::MEMBERS_MAX)
}

impl Matching {
    fn side(&mut self, ours: bool) -> &mut Side {
        if ours { &mut self.ours } else { &mut self.theirs }
    }

    /// The search is over, but for the record that the member could not read: can ours be read?
    fn confirm_before_keeping(&mut self, keep: Seq) {
        if let Some(high) = self.high {
            self.probe(high);
        }
        self.ours = Side::Ask { after: false };
        self.theirs = Side::Known(Epoch::NONE);
        self.confirm = Some(keep);
    }

    /// That donor is no member any more; another may get its slot.
    pub(crate) fn forget_donor(&mut self, slot: usize) {
        self.tried &= !bit(slot);
        self.rotten &= !bit(slot);
    }

    /// The record of ours that is to be compared and that nobody can read, and who says that it is damaged.
    pub(crate) fn unreadable(&self) -> Option<(Seq, Bits)> {
        let waits = self.retry_at.is_some() && self.confirm.is_none() && self.rotten != 0;
        let seq = self.damaged.filter(|_| waits)?;
        Some((seq, self.rotten))
    }

    /// The last record of the member's log.
    pub(crate) fn end(&self) -> Seq {
        self.state.last.seq
    }

    /// The donor's session is gone: ask another.
    pub(crate) fn donor_lost(&mut self, lost: usize) -> bool {
        match self.ours {
            Side::Asked { after, donor, .. } if donor == lost => {
                self.ours = Side::Ask { after };
                true
            }
            Side::Asked { .. } | Side::Ask { .. } | Side::Known(_) => false,
        }
    }
}
