//! Filling: a member that lacks more than the head's memory holds gets it from another member,
//! directly, so that the head's link is not the bottleneck. The head says from whom and how fast
//! ([`base::CommandBody::Install`]), again and again until it is done, and then starts over with a
//! Seal: what the member holds is looked at as after any absence.
//!
//! Two kinds. The *log's tail*, for a member of any role whose log is far behind but within
//! reach of another's: its server appends what the head would have sent. And *chunks* of home, for
//! one whose log is out of reach or not to be trusted: its own log is dropped, and until the
//! filling is complete its blocks are of no one position. So that is only done to a member of role
//! catching up, which counts for nothing; one of the in-sync set must leave that first. Afterwards it
//! holds everything through some position of a log that the head can compare with its own.
//!
//! While it is filled, a member gets no other command: its server's own appends and the head's
//! must not mix. It pins no buffers.

use base::{CommandBody, FillPhase, FillProgress, Instant, ReplicaError, ReplyBody, Role, Seq};

use crate::head::Head;
use crate::member::{Member, Mode};
use crate::quorum::{Bits, bit};
use crate::sessions::Answer;
use crate::status::MemberMode;
use crate::tag::Kind;

/// Bytes of a record while nothing is known of the size.
const RECORD_BYTES_ASSUMED: u128 = 4096;

/// A member that another one fills.
#[derive(Debug)]
pub(crate) struct Filling {
    /// What was found, for people.
    why: MemberMode,
    chunks: bool,
    /// The source must hold more than this.
    beyond: Seq,
    source: Option<usize>,
    /// Members that could not fill it, in this round.
    tried: Bits,
    /// When to ask next.
    at: Instant,
    pub(crate) progress: Option<FillProgress>,
    /// Where the log's tail began, and what had been copied by then.
    log_from: Option<(Seq, u64)>,
}

impl Filling {
    /// When to ask for it next.
    pub(crate) fn at(&self) -> Instant {
        self.at
    }

    pub(crate) fn copies_chunks(&self) -> bool {
        self.chunks
    }

    /// The last record that is there, while the log's tail is copied.
    pub(crate) fn log_end(&self) -> Option<Seq> {
        let progress = self.progress.filter(|progress| progress.phase == FillPhase::Log)?;
        (progress.log_end > Seq::ZERO).then_some(progress.log_end)
    }

    fn learn(&mut self, progress: FillProgress) {
        self.progress = Some(progress);
        if let Some(end) = self.log_end() {
            self.log_from.get_or_insert((end, progress.copied_bytes));
        }
    }

    /// How far it is. Of the log's tail only the head knows how much there is: `last` is its end.
    pub(crate) fn estimate(&self, last: Seq) -> Option<FillProgress> {
        let mut progress = self.progress?;
        if let (Some(end), Some((from, copied_before))) = (self.log_end(), self.log_from) {
            let (came, left) = (end.0.saturating_sub(from.0), last.0.saturating_sub(end.0));
            let bytes = u128::from(progress.copied_bytes.saturating_sub(copied_before));
            let left = match came {
                0 => u128::from(left) * RECORD_BYTES_ASSUMED,
                _ => u128::from(left) * bytes / u128::from(came),
            };
            let left = u64::try_from(left).unwrap_or(u64::MAX);
            progress.total_bytes = progress.copied_bytes.saturating_add(left);
        }
        Some(progress)
    }

    /// Its server says that something has changed: ask it at once.
    pub(crate) fn ask_now(&mut self, now: Instant) {
        self.at = now;
    }

    /// For people: why it is filled, until somebody does it.
    pub(crate) fn mode(&self) -> MemberMode {
        match (self.chunks, self.progress) {
            (false, _) => MemberMode::CatchingUp,
            (true, Some(_)) => MemberMode::Filling,
            (true, None) => self.why,
        }
    }

    /// The source's session is gone: another may go on.
    pub(crate) fn source_lost(&mut self, lost: usize, now: Instant) {
        if self.source == Some(lost) {
            self.source = None;
            self.at = now;
        }
    }

    /// That source is no member any more; another may get its slot.
    pub(crate) fn forget_source(&mut self, slot: usize) {
        self.tried &= !bit(slot);
    }
}

impl Head {
    /// A member's log, ending at `acked`, is a prefix of ours, so far from the end that another
    /// member can bring it the rest better than we. False if none can.
    pub(crate) fn fill_log(&mut self, index: usize, acked: Seq) -> bool {
        let lacks = self.log.base().0.saturating_sub(acked.next().0);
        let far = lacks > self.tunables.log_copy_records;
        let fills = far && self.can_fill_log(index, acked);
        if fills {
            self.begin_filling(index, false, acked, MemberMode::CatchingUp);
        }
        fills
    }

    /// Whether another member can bring this one what follows `acked` in the log.
    pub(crate) fn can_fill_log(&self, index: usize, acked: Seq) -> bool {
        !self.members[index].fills_refused && self.fill_source(index, acked, 0).is_some()
    }

    /// Only a copy of everything helps this member. If its acknowledgements count, it waits for
    /// that to end; it is looked at again after a while if `again`.
    pub(crate) fn needs_copy(&mut self, index: usize, why: MemberMode, again: bool) {
        match self.members[index].role {
            Role::CatchingUp => self.begin_filling(index, true, Seq::ZERO, why),
            Role::InSync => self.park(index, why, again),
            Role::Provisioning | Role::Leaving => unreachable!("only served members are sealed"),
        }
    }

    fn begin_filling(&mut self, index: usize, chunks: bool, beyond: Seq, why: MemberMode) {
        let now = self.now;
        let member = &mut self.members[index];
        member.heard = false;
        let at = now.max(member.fill_after);
        let filling = Filling {
            why,
            chunks,
            beyond,
            source: None,
            tried: 0,
            at,
            progress: None,
            log_from: None,
        };
        member.enter(Mode::Filling(filling), now);
    }

    pub(crate) fn filling(&mut self, index: usize) -> Option<&mut Filling> {
        match &mut self.members[index].mode {
            Mode::Filling(filling) => Some(filling),
            Mode::Down
            | Mode::Resting { .. }
            | Mode::Sealing
            | Mode::Sealed(_)
            | Mode::Matching(_)
            | Mode::Truncating { .. }
            | Mode::CatchingUp(_)
            | Mode::Live
            | Mode::Parked { .. } => None,
        }
    }

    /// Who is to fill the member: in sync, following, and holding more than `beyond`; remote rather than local, so that the
    /// head's link is spared, but rather local than slow or about to go.
    fn fill_source(&self, index: usize, beyond: Seq, except: Bits) -> Option<usize> {
        let able = |(slot, member): &(usize, &Member)| {
            let holds = member.in_sync() && member.follows() && member.acked > beyond;
            *slot != index && except & bit(*slot) == 0 && holds
        };
        let able = self.members.iter().enumerate().filter(able);
        let rank = |(_, member): &(usize, &Member)| {
            let weak = member.reads_badly() || member.health.degraded.is_some();
            (weak, self.local == Some(member.server), member.speed.reads.expected(self.now))
        };
        able.min_by_key(rank).map(|(slot, _)| slot)
    }

    /// Asks for the filling to begin, go on or change its rate, when it is time.
    pub(crate) fn pump_filling(&mut self, index: usize) {
        let now = self.now;
        // What it was sent before may still be on its way into its log.
        let busy = self.members[index].free_at().is_none_or(|at| at > now);
        let Some(filling) = self.filling(index) else { return };
        if busy || filling.at > now {
            return;
        }
        if self.tell_size(index) {
            return;
        }
        let Some(filling) = self.filling(index) else { return };
        let (chunks, beyond) = (filling.chunks, filling.beyond);
        let (kept, tried) = (filling.source, filling.tried);
        let able = |slot: &usize| self.members[*slot].in_sync() && self.members[*slot].follows();
        let source = kept.filter(able).or_else(|| self.fill_source(index, beyond, tried));
        let Some(source) = source else { return self.no_fill_source(index) };
        let fillings = self.members.iter().filter(|m| matches!(m.mode, Mode::Filling(_))).count();
        let (fillings, waiting) = (fillings as u64, self.in_flight() > 0);
        let window = self.tunables.fill_interval;
        let bytes_per_second = self.pace.rate(now, window, fillings, waiting);
        let server = self.members[source].server;
        let number = self.next_number();
        let body = CommandBody::Install { source: server, chunks, bytes_per_second };
        self.send(index, Kind::Install, number, body);
        if let Some(filling) = self.filling(index) {
            filling.source = Some(source);
        }
    }

    /// Nobody can fill the member now.
    fn no_fill_source(&mut self, index: usize) {
        let (now, interval, retry) =
            (self.now, self.tunables.fill_interval, self.tunables.retry_max);
        let Some(filling) = self.filling(index) else { return };
        let all_failed = filling.tried != 0;
        filling.tried = 0;
        filling.at = now + if all_failed { retry } else { interval };
        if !filling.chunks {
            // The head brings the records itself, as it does to those that are not far behind.
            self.members[index].fills_refused = true;
            self.reset(index, None);
        }
    }

    pub(crate) fn install_answered(&mut self, index: usize, result: &Answer) {
        let (now, interval) = (self.now, self.tunables.fill_interval);
        let Some(filling) = self.filling(index) else { return };
        filling.at = now + interval;
        match result {
            Ok(ReplyBody::Filling(progress)) => match progress.phase {
                FillPhase::Connecting | FillPhase::Chunks | FillPhase::Log => {
                    filling.learn(*progress);
                }
                FillPhase::Done => {
                    self.members[index].fill_after = now + interval;
                    self.reset(index, None);
                }
                FillPhase::Failed => self.fill_source_failed(index),
            },
            Ok(_) => self.fill_source_failed(index),
            Err(error) => match error {
                ReplicaError::Damaged
                | ReplicaError::Behind { .. }
                | ReplicaError::Trimmed { .. }
                | ReplicaError::Filling
                | ReplicaError::Invalid => self.fill_source_failed(index),
                ReplicaError::NoReplica
                | ReplicaError::DeviceFailed
                | ReplicaError::NoSpace
                | ReplicaError::Superseded { .. }
                | ReplicaError::NotSealed
                | ReplicaError::OutOfOrder { .. }
                | ReplicaError::Disconnected => self.member_failed(index, *error),
            },
        }
    }

    /// This source cannot, or the member cannot from this one: what was copied stays, another goes on.
    fn fill_source_failed(&mut self, index: usize) {
        let now = self.now;
        let Some(filling) = self.filling(index) else { return };
        if let Some(source) = filling.source.take() {
            filling.tried |= bit(source);
        }
        filling.at = now;
    }
}
