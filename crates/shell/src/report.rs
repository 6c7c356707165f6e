//! What the data plane tells people and metrics about itself. Made when asked for.

use std::time::Duration;

use crate::control::{
    HeadPhase, HeadStatus, LATENCY_BOUNDS_NS, MemberMode, MemberStatus, MetricFamily, MetricSample,
    MetricValue, PoolStatus, ReplicaSpec, ReplicaStatus, Status, Traffic,
};
use crate::worker::{HeadState, Worker};
use base::{ReplicaError, Role};
use node::metrics::{Counters, OperationKind};

impl Worker {
    pub(crate) fn status(&self) -> Status {
        Status {
            pool: self.pool_status(),
            listen: self.listen,
            replicas: self.replica_status(),
            heads: self.head_status(),
            exports: self.exports.status(),
        }
    }

    fn pool_status(&self) -> Option<PoolStatus> {
        let usage = self.node.store()?.usage();
        Some(PoolStatus {
            id: self.pool.as_ref()?.pool,
            log_bytes: usage.log_bytes,
            log_used_bytes: usage.log_used_bytes,
            log_recovery_bytes: usage.log_recovery_bytes,
            home_bytes: usage.home_bytes,
            home_free_bytes: usage.home_bytes.saturating_sub(usage.home_used_bytes),
            failed: self.pool_failed.clone(),
        })
    }

    fn replica_status(&self) -> Vec<ReplicaStatus> {
        let Some(store) = self.node.store() else { return Vec::new() };
        store
            .replicas()
            .map(|(key, info)| ReplicaStatus {
                spec: ReplicaSpec { key, block_size: info.block_size, blocks: info.blocks },
                state: info.state,
                lost_records: info.damaged,
                damaged_blocks: self.node.damaged_blocks(key),
            })
            .collect()
    }

    fn head_status(&self) -> Vec<HeadStatus> {
        self.node
            .heads()
            .filter_map(|(handle, volume, status, counters)| {
                let state = self.heads.get(&volume)?;
                let local = self.node.local_member(handle);
                Some(HeadStatus {
                    volume,
                    epoch: status.epoch,
                    phase: self.phase(state, &status),
                    size_bytes: status.blocks << state.spec.volume.block_size.log2(),
                    last: status.last.seq,
                    commit: status.commit,
                    in_flight: u32::try_from(status.in_flight + status.queued).unwrap_or(u32::MAX),
                    queued: u32::try_from(status.queued).unwrap_or(u32::MAX),
                    change_open: status.change_open,
                    traffic: traffic(counters),
                    members: status
                        .members
                        .iter()
                        .map(|member| self.member(member, local))
                        .collect(),
                })
            })
            .collect()
    }

    fn member(&self, member: &volume::MemberStatus, local: Option<base::ServerId>) -> MemberStatus {
        let mode = mode(member);
        let now = self.reactor.now();
        MemberStatus {
            server: member.server,
            role: member.role,
            local: local == Some(member.server),
            connected: member.connected,
            reachable: mode == MemberMode::Live,
            last: member.last,
            durable: member.durable,
            lag: member.lag,
            mode,
            mode_for: now.since(member.down_since.unwrap_or(member.since)),
            caught_up: member.caught_up,
            slow_for: member.slow_since.map(|since| now.since(since)),
            draining: member.draining.is_some(),
            device_failed: is_gone(member),
            degraded: member.degraded.map(|reason| reason.to_string()),
            others_say: member.others_say,
            filling: member.fill,
            note: note(member),
        }
    }

    fn phase(&self, state: &HeadState, status: &volume::HeadStatus) -> HeadPhase {
        if let Some(sealed) = state.superseded {
            return HeadPhase::Superseded { sealed };
        }
        match status.phase {
            volume::HeadPhase::Sealing
            | volume::HeadPhase::Reconciling
            | volume::HeadPhase::Starting => HeadPhase::Opening { reason: opening_reason(status) },
            volume::HeadPhase::Serving => match &status.stall {
                None => HeadPhase::Open,
                Some(stall) => HeadPhase::Stalled {
                    reason: stall.reason.to_string(),
                    duration: self.reactor.now().since(stall.since),
                },
            },
            volume::HeadPhase::Releasing
            | volume::HeadPhase::Released
            | volume::HeadPhase::Abandoned
            | volume::HeadPhase::Failed { .. } => HeadPhase::Draining,
            volume::HeadPhase::Superseded { sealed } => HeadPhase::Superseded { sealed },
        }
    }

    pub(crate) fn metrics(&self) -> Vec<MetricFamily> {
        let mut families = self.request_metrics();
        families.extend(self.pool_metrics());
        families.extend(self.replication_metrics());
        let mended = self.node.heads().map(|(_, _, status, _)| status.mended_blocks).sum::<u64>();
        families.push(gauge(
            "holdfast_mended_blocks",
            "Blocks that the heads here wrote again because a member could not read them.",
            mended,
        ));
        families.push(gauge("holdfast_heads", "Heads that run in this process.", self.heads.len()));
        families.push(gauge(
            "holdfast_connections",
            "Open connections, accepted ones and those to peers.",
            self.connections.len(),
        ));
        families
    }

    fn request_metrics(&self) -> Vec<MetricFamily> {
        let family = |name, help| MetricFamily { name, help, samples: Vec::new() };
        let mut requests = family("holdfast_requests_total", "Requests answered.");
        let mut errors =
            family("holdfast_request_errors_total", "Requests answered with an error.");
        let mut bytes = family("holdfast_request_bytes_total", "Bytes of successful requests.");
        let mut latency = family(
            "holdfast_request_duration_seconds",
            "Time from a request's arrival at the head to its answer.",
        );
        for (_, volume, _, counters) in self.node.heads() {
            for kind in OperationKind::ALL {
                let labels =
                    || vec![("volume", volume.to_string()), ("operation", kind.name().to_owned())];
                let sample = |value| MetricSample { labels: labels(), value };
                let of = counters.of(kind);
                requests.samples.push(sample(MetricValue::Counter(of.requests)));
                errors.samples.push(sample(MetricValue::Counter(of.errors)));
                bytes.samples.push(sample(MetricValue::Counter(of.bytes)));
                latency.samples.push(sample(histogram(counters, kind)));
            }
        }
        vec![requests, errors, bytes, latency]
    }

    fn replication_metrics(&self) -> Vec<MetricFamily> {
        if self.node.store().is_none() {
            return Vec::new();
        }
        let node::metrics::NodeCounters { seals_held, seals_waited, refused, fills } =
            self.node.counters();
        vec![
            gauge(
                "holdfast_seals_held",
                "Seals of new heads that wait for a deposed head's read grant to run out.",
                seals_held,
            ),
            counter("holdfast_seals_waited_total", "Seals that ever waited so.", seals_waited),
            counter(
                "holdfast_connections_refused_total",
                "Connections closed as they came: too many, or too many of a peer that says nothing.",
                refused,
            ),
            gauge(
                "holdfast_fills",
                "Replicas that are being filled from other servers, or wait for that.",
                self.node.fills().filter(|(_, progress)| is_filling(progress.phase)).count(),
            ),
            counter("holdfast_fills_started_total", "Fillings begun.", fills.started),
            counter("holdfast_fills_done_total", "Fillings that ended well.", fills.done),
            counter(
                "holdfast_fills_failed_total",
                "Times a filling could not go on.",
                fills.failed,
            ),
            counter(
                "holdfast_fill_chunk_bytes_total",
                "Payload bytes of chunks that came from other servers.",
                fills.chunk_bytes,
            ),
            counter("holdfast_fill_chunks_total", "Chunks that came.", fills.chunks),
            counter(
                "holdfast_fill_log_bytes_total",
                "Payload bytes of log records that came from other servers.",
                fills.log_bytes,
            ),
            counter("holdfast_fill_records_total", "Log records that came.", fills.records),
        ]
    }

    fn pool_metrics(&self) -> Vec<MetricFamily> {
        let Some(store) = self.node.store() else { return Vec::new() };
        let (usage, scrubbed) = (store.usage(), store.scrubbed());
        vec![
            counter("holdfast_scrub_rounds_total", "Times all of home was read.", scrubbed.rounds),
            counter("holdfast_scrub_bytes_total", "Bytes read to find damage.", scrubbed.bytes),
            counter(
                "holdfast_scrub_damaged_blocks_total",
                "Blocks that a scrub could not read.",
                scrubbed.damaged_blocks,
            ),
            gauge(
                "holdfast_damaged_blocks",
                "Blocks that a scrub could not read and that nobody has written again yet.",
                store.replicas().map(|(key, _)| self.node.damaged_blocks(key)).sum::<u64>(),
            ),
            counter(
                "holdfast_damaged_answers_total",
                "Reads that were answered with damage.",
                usage.damaged_answers,
            ),
            gauge("holdfast_log_bytes", "Bytes of log space.", usage.log_bytes),
            gauge("holdfast_log_used_bytes", "Bytes of log in use.", usage.log_used_bytes),
            gauge("holdfast_log_dirty_bytes", "Bytes of log not home yet.", usage.log_dirty_bytes),
            gauge(
                "holdfast_log_recovery_bytes",
                "Bytes of log that a restart would read.",
                usage.log_recovery_bytes,
            ),
            gauge("holdfast_index_entries", "Blocks found through the log.", usage.index_entries),
            gauge("holdfast_home_bytes", "Bytes of home space.", usage.home_bytes),
            gauge("holdfast_home_used_bytes", "Bytes of home in use.", usage.home_used_bytes),
            gauge(
                "holdfast_pool_stalled",
                "1 while writes to the pool wait for room.",
                u64::from(usage.stalled.is_some()),
            ),
            gauge(
                "holdfast_pool_failed",
                "1 after a device of the pool failed.",
                u64::from(self.pool_failed.is_some()),
            ),
        ]
    }
}

fn gauge(
    name: &'static str,
    help: &'static str,
    value: impl TryInto<u64, Error: core::fmt::Debug>,
) -> MetricFamily {
    let value: u64 = value.try_into().expect("counts are not negative");
    #[expect(clippy::cast_precision_loss, reason = "a gauge is a float")]
    let value = MetricValue::Gauge(value as f64);
    MetricFamily { name, help, samples: vec![MetricSample { labels: Vec::new(), value }] }
}

fn counter(name: &'static str, help: &'static str, value: u64) -> MetricFamily {
    let value = MetricValue::Counter(value);
    MetricFamily { name, help, samples: vec![MetricSample { labels: Vec::new(), value }] }
}

fn is_filling(phase: base::FillPhase) -> bool {
    match phase {
        base::FillPhase::Connecting | base::FillPhase::Chunks | base::FillPhase::Log => true,
        base::FillPhase::Done | base::FillPhase::Failed => false,
    }
}

fn histogram(counters: &Counters, kind: OperationKind) -> MetricValue {
    let of = counters.of(kind);
    MetricValue::Histogram {
        bounds_ns: LATENCY_BOUNDS_NS,
        counts: of.latency_counts.to_vec(),
        sum_ns: of.latency_sum_ns,
    }
}

fn mode(member: &volume::MemberStatus) -> MemberMode {
    match member.mode {
        // Nobody fills a member that counts.
        volume::MemberMode::Filling if member.role == Role::InSync => MemberMode::NeedsFill,
        volume::MemberMode::Down => MemberMode::Down,
        volume::MemberMode::Sealing | volume::MemberMode::Reconciling => MemberMode::Opening,
        volume::MemberMode::CatchingUp => MemberMode::CatchingUp,
        volume::MemberMode::Live => MemberMode::Live,
        volume::MemberMode::TooFarBehind
        | volume::MemberMode::Diverged
        | volume::MemberMode::Damaged => MemberMode::NeedsFill,
        volume::MemberMode::Filling => MemberMode::Filling,
        volume::MemberMode::Failed(_) => MemberMode::Failed,
    }
}

/// True if the member's copy will not come back by itself.
fn is_gone(member: &volume::MemberStatus) -> bool {
    let said = member.degraded == Some(base::DegradedReason::FailedDevice);
    let refused = match member.mode {
        volume::MemberMode::Failed(error) => {
            matches!(error, ReplicaError::DeviceFailed | ReplicaError::NoReplica)
        }
        volume::MemberMode::Down
        | volume::MemberMode::Sealing
        | volume::MemberMode::Reconciling
        | volume::MemberMode::CatchingUp
        | volume::MemberMode::Live
        | volume::MemberMode::TooFarBehind
        | volume::MemberMode::Diverged
        | volume::MemberMode::Damaged
        | volume::MemberMode::Filling => false,
    };
    said || refused
}

fn traffic(counters: &Counters) -> Traffic {
    let mut traffic = Traffic::default();
    for kind in OperationKind::ALL {
        let sum = match kind {
            OperationKind::Read => &mut traffic.reads,
            OperationKind::Write | OperationKind::Discard | OperationKind::WriteZeroes => {
                &mut traffic.writes
            }
            OperationKind::Flush => continue,
        };
        let of = counters.of(kind);
        sum.requests += of.requests;
        sum.errors += of.errors;
        sum.bytes += of.bytes;
        for (sum, count) in sum.latency_counts.iter_mut().zip(of.latency_counts) {
            *sum += count;
        }
    }
    traffic
}

/// What an opening waits for.
pub(crate) fn opening_reason(status: &volume::HeadStatus) -> String {
    if let Some(stall) = &status.stall {
        return stall.reason.to_string();
    }
    let connected = status.members.iter().filter(|member| member.connected).count();
    let in_sync = status.members.iter().filter(|member| member.role == Role::InSync).count();
    format!("{connected} of {} members connected ({in_sync} in sync)", status.members.len())
}

fn note(member: &volume::MemberStatus) -> Option<String> {
    let note = match (member.mode, member.lag) {
        (volume::MemberMode::Live, None | Some(0)) => None,
        (volume::MemberMode::Live, Some(lag)) => Some(format!("{lag} records behind")),
        (mode, Some(lag)) => Some(format!("{mode}, {lag} records behind")),
        (mode, None) => Some(mode.to_string()),
    };
    let Some(held) = member.held_back else { return note };
    let held = format!(
        "guests are held back to {} writes a second until it has caught up",
        held.writes_per_second
    );
    Some(note.map_or_else(|| held.clone(), |note| format!("{note}; {held}")))
}

/// A duration that a caller may wait for a status.
pub(crate) const STATUS_WAIT: Duration = Duration::from_secs(2);
