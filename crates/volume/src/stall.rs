//! Stall, don't err: notices that I/O cannot go on, says why and since when, and when it is over.

use core::time::Duration;

use base::limits::GRANT_MS;
use base::planted::{self, Bug};
use base::{Instant, Seq};

use crate::head::{Head, Output, Phase};
use crate::member::{Member, Mode};
use crate::quorum::Bits;
use crate::status::{HeadStatus, MemberMode, MemberStatus, Stall, StallReason};

/// A Seal may be held for a deposed head's grant; what takes longer is a stall.
const SLOW_SEAL: Duration = Duration::from_millis(2 * GRANT_MS);

impl Head {
    /// Notes the start and the end of stalls, and announces those that last.
    pub(crate) fn watch_for_stall(&mut self) {
        let Some(reason) = self.stall_reason() else {
            self.stall = None;
            if self.stall_announced.take().is_some() {
                self.outputs.push_back(Output::Resumed);
            }
            return;
        };
        let since = self.stall.map_or(self.now, |stall| stall.since);
        self.stall = Some(Stall { reason, since });
        let lasted = since + self.tunables.stall_notice <= self.now;
        if lasted && !self.announced(reason) {
            self.stall_announced = Some(reason);
            self.outputs.push_back(Output::Stalled { reason, since });
        }
    }

    /// True if a stall for the same kind of reason was announced.
    fn announced(&self, reason: StallReason) -> bool {
        let kind = core::mem::discriminant(&reason);
        self.stall_announced.is_some_and(|said| core::mem::discriminant(&said) == kind)
    }

    fn stall_reason(&self) -> Option<StallReason> {
        if let Phase::Ended(_) | Phase::Releasing { until: Some(_) } = self.phase {
            return None;
        }
        let usable = self.members_where(Member::usable);
        if !self.sets.write_quorum_met(usable) {
            let (usable, needed, of) = self.sets.shortest(usable);
            return Some(StallReason::Members { usable, needed, of });
        }
        if let Some(seq) = self.damaged_record() {
            return Some(StallReason::Damaged { seq });
        }
        if self.slow_opening_at().is_some_and(|at| at <= self.now) {
            return Some(self.slow_opening(usable));
        }
        let seq = self.log.commit().next().max(self.log.base());
        if let Some(entry) = self.log.entry(seq)
            && entry.arrived + self.tunables.slow_write <= self.now
        {
            return Some(StallReason::Unanswered { seq });
        }
        if let Some((seq, since)) = self.unsettled_too_long()
            && since <= self.now
        {
            return Some(StallReason::NotOnMedia { seq });
        }
        if self.reads_ungranted() {
            return Some(self.no_grant());
        }
        self.reads_stalled().then_some(StallReason::NoReader)
    }

    /// The oldest record whose way to media keeps writes from being begun, and when that is a stall.
    fn unsettled_too_long(&self) -> Option<(Seq, Instant)> {
        if self.queue.is_empty() || !self.waits_for_media() {
            return None;
        }
        let seq = self.log.base();
        self.log.entry(seq).map(|entry| (seq, entry.arrived + self.tunables.slow_write))
    }

    /// When an opening that makes no progress counts as a stall.
    fn slow_opening_at(&self) -> Option<Instant> {
        let since = |those: fn(&Mode) -> bool| {
            self.members.iter().filter(move |member| those(&member.mode)).map(|member| member.since)
        };
        match self.phase {
            Phase::Sealing { quorum_since: None } => {
                let first = since(|mode| matches!(mode, Mode::Sealing)).min();
                first.map(|since| since + SLOW_SEAL)
            }
            Phase::Reconciling => {
                let at_work = |mode: &Mode| {
                    matches!(
                        mode,
                        Mode::Matching(_) | Mode::Truncating { .. } | Mode::CatchingUp(_)
                    )
                };
                since(at_work).max().map(|since| since + self.tunables.slow_write)
            }
            Phase::Sealing { quorum_since: Some(_) }
            | Phase::Starting
            | Phase::Serving
            | Phase::Releasing { .. }
            | Phase::Ended(_) => None,
        }
    }

    fn slow_opening(&self, usable: Bits) -> StallReason {
        if self.phase == Phase::Reconciling {
            let (hold, needed, _) = self.sets.shortest(self.holders(self.log.tail().seq, false));
            StallReason::Reconciling { hold, needed }
        } else {
            let sealed = self.members_where(|member| matches!(member.mode, Mode::Sealed(_)));
            let (sealed, _, _) = self.sets.shortest(sealed);
            let (of, _, _) = self.sets.shortest(usable);
            StallReason::NotSealed { sealed, of }
        }
    }

    /// A record that keeps members from a write quorum because it cannot be read anywhere.
    fn damaged_record(&self) -> Option<Seq> {
        let live = self.members_where(|member| matches!(member.mode, Mode::Live));
        if self.sets.write_quorum_met(live) {
            return None;
        }
        let mut in_sync = self.members.iter().filter(|member| member.in_sync());
        in_sync.find_map(|member| match &member.mode {
            Mode::CatchingUp(catch_up) => catch_up.damaged,
            Mode::Matching(matching) => matching.damaged,
            Mode::Down
            | Mode::Resting { .. }
            | Mode::Sealing
            | Mode::Sealed(_)
            | Mode::Truncating { .. }
            | Mode::Live
            | Mode::Filling(_)
            | Mode::Parked { .. } => None,
        })
    }

    /// When a stall is to be announced, or an unanswered write becomes one.
    pub(crate) fn stall_deadline(&self) -> Option<Instant> {
        if let Some(stall) = self.stall {
            let announced = self.announced(stall.reason);
            return (!announced).then(|| stall.since + self.tunables.stall_notice);
        }
        let seq = self.log.commit().next().max(self.log.base());
        let slow_write = self.log.entry(seq).map(|entry| entry.arrived + self.tunables.slow_write);
        let slow_media = self.unsettled_too_long().map(|(_, at)| at);
        base::time::earliest(base::time::earliest(slow_write, slow_media), self.slow_opening_at())
    }

    /// How it is doing.
    pub fn status(&self) -> HeadStatus {
        let last = self.log.last();
        let member = |member: &crate::member::Member| {
            let follows = member.follows();
            MemberStatus {
                server: member.server,
                role: member.role,
                connected: member.connected,
                mode: public_mode(&member.mode),
                since: member.since,
                last: if follows { member.acked } else { Seq::ZERO },
                durable: if follows { member.durable() } else { Seq::ZERO },
                lag: follows.then(|| last.seq.0 - member.acked.0),
                caught_up: follows
                    && (member.acked >= self.log.commit() || planted::is(Bug::PromotedTooEarly)),
                damaged: member.damaged,
                fill: match &member.mode {
                    Mode::Filling(filling) => filling.estimate(last.seq),
                    Mode::Down
                    | Mode::Resting { .. }
                    | Mode::Sealing
                    | Mode::Sealed(_)
                    | Mode::Matching(_)
                    | Mode::Truncating { .. }
                    | Mode::CatchingUp(_)
                    | Mode::Live
                    | Mode::Parked { .. } => None,
                },
                down_since: member.health.down_since,
                others_say: member.health.others_say,
                draining: member.health.draining,
                degraded: member.health.degraded,
                throttled: member.health.throttled,
                held_back: self.holdback.held().filter(|held| held.server == member.server),
                slow_since: member.speed.slow_since,
                read_latency: member.speed.reads.mean(self.now),
                append_latency: member.speed.appends.mean(self.now),
            }
        };
        HeadStatus {
            phase: self.public_phase(),
            epoch: self.epoch,
            last,
            commit: self.log.commit(),
            settled: self.log.durable,
            blocks: self.size.served,
            blocks_recorded: self.size.recorded,
            in_flight: self.in_flight(),
            queued: self.queue.len(),
            members: self.members.iter().filter(|m| m.role.is_served()).map(member).collect(),
            change_open: self.sets.change_open(),
            mended_blocks: self.mends.blocks,
            stall: self.stall,
        }
    }
}

fn public_mode(mode: &Mode) -> MemberMode {
    match mode {
        Mode::Down => MemberMode::Down,
        Mode::Resting { error: Some(error), .. } => MemberMode::Failed(*error),
        Mode::Resting { error: None, .. } | Mode::Sealing | Mode::Sealed(_) => MemberMode::Sealing,
        Mode::Matching(_) | Mode::Truncating { .. } => MemberMode::Reconciling,
        Mode::CatchingUp(_) => MemberMode::CatchingUp,
        Mode::Live => MemberMode::Live,
        Mode::Filling(filling) => filling.mode(),
        Mode::Parked { why, .. } => *why,
    }
}
