//! What the heads here tell the cluster: once a second, for `volume show` and `top`.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use base::{ServerId, VolumeId};
use cluster::{FillReport, MemberReport, Rates, StallReport, VolumeStatus};
use shell::control::{
    HeadPhase, HeadStatus, KindTraffic, LATENCY_BOUNDS_NS, MemberStatus, Traffic,
};

/// How often a status that changes is told.
const INTERVAL: Duration = Duration::from_secs(1);
/// How often one that does not is told: well before it counts as stale.
const REPEAT: Duration = Duration::from_millis(cluster::STATUS_STALE_MS / 2);

/// What was told, and what the next rates are taken from.
#[derive(Default)]
pub(super) struct Reports {
    told: BTreeMap<VolumeId, Told>,
}

struct Told {
    at: Instant,
    status: VolumeStatus,
    /// What the rates are differences to.
    sampled: Instant,
    traffic: Traffic,
    copied: BTreeMap<ServerId, u64>,
}

impl Reports {
    /// The statuses that are to be told now. What is not told for good is made again next time.
    pub(super) fn due(
        &mut self,
        heads: &[HeadStatus],
        holder: &str,
        now_ms: u64,
    ) -> Vec<VolumeStatus> {
        self.told.retain(|volume, _| heads.iter().any(|head| head.volume == *volume));
        heads.iter().filter_map(|head| self.of_head(head, holder, now_ms)).collect()
    }

    fn of_head(&mut self, head: &HeadStatus, holder: &str, now_ms: u64) -> Option<VolumeStatus> {
        let now = Instant::now();
        let told = self.told.get(&head.volume).filter(|told| told.status.epoch == head.epoch);
        if told.is_some_and(|told| now.duration_since(told.at) < INTERVAL) {
            return None;
        }
        let since = told.map(|told| (now.duration_since(told.sampled), told));
        let mut status = status(head, holder, now_ms);
        if let Some((elapsed, told)) = since {
            status.rates = rates(&told.traffic, &head.traffic, elapsed);
            for (report, member) in status.members.iter_mut().zip(&head.members) {
                if let (Some(fill), Some(filling)) = (&mut report.fill, member.filling) {
                    let before = told.copied.get(&member.server).copied();
                    let copied = filling.copied_bytes.saturating_sub(before.unwrap_or(0));
                    fill.bytes_per_second = per_second(copied, elapsed);
                }
            }
            if same(&told.status, &status) && now.duration_since(told.at) < REPEAT {
                return None;
            }
        }
        let filling = |member: &MemberStatus| Some((member.server, member.filling?.copied_bytes));
        let copied = head.members.iter().filter_map(filling).collect();
        let sample =
            Told { at: now, status: status.clone(), sampled: now, traffic: head.traffic, copied };
        self.told.insert(head.volume, sample);
        Some(status)
    }

    /// Nothing of what was due was told.
    pub(super) fn not_told(&mut self) {
        self.told.clear();
    }
}

/// Equal but for when it was written.
fn same(old: &VolumeStatus, new: &VolumeStatus) -> bool {
    let since = |status: &VolumeStatus| {
        let mut status = status.clone();
        status.written_ms = 0;
        if let Some(stall) = &mut status.stall {
            stall.since_ms = 0;
        }
        for member in &mut status.members {
            member.since_ms = 0;
        }
        status
    };
    since(old) == since(new)
}

fn status(head: &HeadStatus, holder: &str, now_ms: u64) -> VolumeStatus {
    let before = |ago: Duration| now_ms.saturating_sub(millis(ago));
    let (phase, stall) = match &head.phase {
        HeadPhase::Opening { reason } => ("opening", Some((reason, Duration::ZERO))),
        HeadPhase::Open => ("open", None),
        HeadPhase::Stalled { reason, duration } => ("open", Some((reason, *duration))),
        HeadPhase::Draining => ("closing", None),
        HeadPhase::Superseded { .. } => ("superseded", None),
    };
    let member = |member: &MemberStatus| MemberReport {
        server: member.server,
        role: member.role,
        mode: mode(member),
        since_ms: before(member.mode_for),
        connected: member.connected,
        last: member.last.0,
        durable: member.durable.0,
        lag: member.lag,
        slow: member.slow_for.is_some(),
        draining: member.draining,
        fill: member.filling.map(|filling| FillReport {
            copied_bytes: filling.copied_bytes,
            total_bytes: filling.total_bytes,
            bytes_per_second: 0,
        }),
    };
    VolumeStatus {
        volume: head.volume,
        epoch: head.epoch,
        holder: holder.to_owned(),
        written_ms: now_ms,
        phase: phase.to_owned(),
        stall: stall
            .map(|(reason, ago)| StallReport { reason: reason.clone(), since_ms: before(ago) }),
        size_bytes: head.size_bytes,
        last: head.last.0,
        commit: head.commit.0,
        in_flight: u64::from(head.in_flight.saturating_sub(head.queued)),
        queued: u64::from(head.queued),
        rates: Rates::default(),
        members: head.members.iter().map(member).collect(),
    }
}

/// What is out of the ordinary with a member.
fn mode(member: &MemberStatus) -> String {
    let mut words: Vec<String> = member.note.iter().cloned().collect();
    words.extend(member.degraded.clone());
    words.join("; ")
}

fn rates(old: &Traffic, new: &Traffic, elapsed: Duration) -> Rates {
    let of = |old: &KindTraffic, new: &KindTraffic| {
        let requests = new.requests.saturating_sub(old.requests);
        let bytes = new.bytes.saturating_sub(old.bytes);
        (per_second(requests, elapsed), per_second(bytes, elapsed))
    };
    let (reads_per_second, read_bytes_per_second) = of(&old.reads, &new.reads);
    let (writes_per_second, write_bytes_per_second) = of(&old.writes, &new.writes);
    Rates {
        reads_per_second,
        writes_per_second,
        read_bytes_per_second,
        write_bytes_per_second,
        read_p50_us: percentile(&old.reads, &new.reads, 50),
        read_p99_us: percentile(&old.reads, &new.reads, 99),
        write_p50_us: percentile(&old.writes, &new.writes, 50),
        write_p99_us: percentile(&old.writes, &new.writes, 99),
    }
}

/// The upper bound, in microseconds, of the bucket that holds the percentile of what was answered
/// in between; 0 if that is nothing.
fn percentile(old: &KindTraffic, new: &KindTraffic, percent: u64) -> u64 {
    let counts = new.latency_counts.iter().zip(&old.latency_counts);
    let counts = counts.map(|(new, old)| new.saturating_sub(*old));
    let total: u64 = counts.clone().sum();
    let rank = (total * percent).div_ceil(100);
    let mut seen = 0;
    for (count, bound) in counts.zip(LATENCY_BOUNDS_NS.iter().chain(LATENCY_BOUNDS_NS.last())) {
        seen += count;
        if total > 0 && seen >= rank {
            return bound / 1000;
        }
    }
    0
}

fn per_second(count: u64, elapsed: Duration) -> u64 {
    let millis = millis(elapsed).max(1);
    count.saturating_mul(1000) / millis
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_what_came_since() {
        let mut old = KindTraffic::default();
        old.latency_counts[16] = 1_000;
        let mut new = old;
        assert_eq!(percentile(&old, &new, 99), 0);
        new.latency_counts[2] += 98;
        new.latency_counts[6] += 2;
        assert_eq!((percentile(&old, &new, 50), percentile(&old, &new, 98)), (50, 50));
        assert_eq!(percentile(&old, &new, 99), 1_000);
        new.latency_counts[16] += 100_000;
        assert_eq!(percentile(&old, &new, 99), 10_000_000, "past the last bound");
    }

    #[test]
    fn rates_are_per_second() {
        let old = Traffic::default();
        let mut new = old;
        new.writes.requests = 500;
        new.writes.bytes = 500 << 12;
        let rates = rates(&old, &new, Duration::from_millis(500));
        assert_eq!((rates.writes_per_second, rates.write_bytes_per_second), (1_000, 1_000 << 12));
        assert_eq!(rates.reads_per_second, 0);
    }
}
