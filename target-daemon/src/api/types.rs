//! What the API says, as JSON. Fields are added, never renamed or removed. Ids are UUIDs as text.

use std::collections::BTreeMap;

use base::{Position, ServerId, VolumeId};
use cluster::drain::Remaining;
use cluster::{ServerEntry, VolumeEntry};
use serde::{Deserialize, Serialize};
use shell::control::{HeadPhase, HeadStatus, MemberStatus, PoolStatus, ReplicaStatus, Status};
use utoipa::ToSchema;

use crate::daemon::Parts;
use crate::drain;
use crate::exports::ExportView;
use crate::follow::LeaseState;

/// An error.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorReply {
    /// For programs: `held`, `no_volume`, `provisioning`, `socket` and others.
    pub code: String,
    /// For people: what happened, to what, and what to do.
    pub error: String,
}

/// A volume to serve.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ExportRequest {
    /// The volume's name or id.
    pub volume: String,
    /// Absolute path of the vhost-user socket to make.
    pub socket: String,
    /// Request queues; 4 if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queues: Option<u16>,
    /// The guest sees a read-only disk.
    #[serde(default)]
    pub read_only: bool,
    /// The lease is taken when a guest starts its rings, and not now: for the destination of a live
    /// migration.
    #[serde(default)]
    pub standby: bool,
    /// How long to wait for the volume to be open before answering that it is still opening, in
    /// milliseconds; 5000 if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wait_ms: Option<u64>,
}

/// How an export is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ExportState {
    /// It is not served, or its guest waits for the lease; `reason` says why. It is tried again.
    Waiting,
    /// The socket is there, no guest uses it, and the lease is not taken: a live migration may come.
    Standby,
    /// The guest stopped the disk; another holder may take the lease. With a `reason`: it may not
    /// yet, since the cluster store does not say so.
    Yielded,
    /// The socket is there; requests wait for the head to open.
    Opening,
    /// It is served.
    Open,
    /// Requests wait for a quorum; `reason` says what is missing.
    Stalled,
    /// It is being stopped.
    Stopping,
}

/// An export.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ExportReply {
    /// The volume as it was asked for: a name or an id.
    pub volume: String,
    /// The volume's id, once it is known.
    pub volume_id: Option<String>,
    /// The socket.
    pub socket: String,
    /// Request queues.
    pub queues: u16,
    /// The guest sees a read-only disk.
    pub read_only: bool,
    /// Its lease is taken when a guest starts its rings.
    #[serde(default)]
    pub standby: bool,
    /// It is in the configuration, so it comes back with every start, not only until a reboot.
    pub configured: bool,
    /// How it is.
    pub state: ExportState,
    /// Why it is so.
    pub reason: Option<String>,
    /// A front end is connected.
    pub connected: bool,
    /// Guest requests accepted and not answered.
    pub in_flight: u32,
}

/// Whether the server can do its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum HealthState {
    /// All is well.
    Ok,
    /// Volumes are served, but changes have to wait.
    Degraded,
    /// The pool or the data plane has failed.
    Failed,
}

/// The answer of `/v1/health`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HealthReply {
    /// The verdict.
    pub state: HealthState,
    /// What is wrong.
    pub problems: Vec<String>,
}

/// The server itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ServerReply {
    /// Its id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Its cluster's id.
    pub cluster: String,
    /// The program's version.
    pub version: String,
    /// Its process.
    pub pid: u32,
    /// Where its replica service listens.
    pub listen: Option<String>,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Seconds since it started.
    pub uptime_s: u64,
}

/// The cluster store as the server sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StoreReply {
    /// Its address.
    pub address: String,
    /// Why it does not answer.
    pub error: Option<String>,
}

/// The pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PoolReply {
    /// Its id.
    pub id: String,
    /// Bytes of log space.
    pub log_bytes: u64,
    /// Bytes of log in use.
    pub log_used_bytes: u64,
    /// Bytes of home space.
    pub home_bytes: u64,
    /// Bytes of home space that are free.
    pub home_free_bytes: u64,
    /// Which device has failed, and how.
    pub failed: Option<String>,
}

/// A replica in the pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ReplicaReply {
    /// The volume's id.
    pub volume_id: String,
    /// The volume's shard.
    pub shard: u32,
    /// The block size in bytes.
    pub block_size: u32,
    /// Its length in blocks.
    pub blocks: u64,
    /// The highest epoch it has sealed.
    pub sealed_epoch: u64,
    /// The epoch of its last record.
    pub last_epoch: u64,
    /// The seq of its last record.
    pub last_seq: u64,
    /// Records at or below this seq are on media.
    pub durable_seq: u64,
    /// Records at or below this seq are acknowledged or settled.
    pub commit_seq: u64,
    /// Records at or below this seq are home and no longer in the log.
    pub trimmed_seq: u64,
}

/// A member of a volume, as its head sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MemberReply {
    /// Its server's id.
    pub server_id: String,
    /// Its server's name, if the cluster store could be asked.
    pub server: Option<String>,
    /// `in sync`, `catching up`, `provisioning` or `leaving`.
    pub role: String,
    /// It is in this process.
    pub local: bool,
    /// Its commands are answered.
    pub reachable: bool,
    /// The last seq it has.
    pub last_seq: u64,
    /// The last seq it has on media.
    pub durable_seq: u64,
    /// Why it is not reachable, or how far behind it is.
    pub note: Option<String>,
    /// It answers far later than the others: it is not read from.
    #[serde(default)]
    pub slow: bool,
    /// Its server is being drained.
    #[serde(default)]
    pub draining: bool,
    /// What its server says is wrong with it.
    #[serde(default)]
    pub degraded: Option<String>,
    /// Bytes that its filling has copied, and will have copied when it is done.
    #[serde(default)]
    pub filled_bytes: Option<(u64, u64)>,
}

/// What is left on a server that is being drained.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DrainReply {
    /// When that was ordered, in milliseconds since 1970.
    pub since_ms: u64,
    /// Volumes, by name, with a replica here.
    pub replicas: Vec<String>,
    /// Volumes whose head runs here, and why it still does.
    pub heads: Vec<DrainHead>,
    /// Nothing is left: the server may be stopped.
    pub safe_to_stop: bool,
}

/// A head on a server that is being drained.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DrainHead {
    /// The volume's name, or its id.
    pub volume: String,
    /// What it waits for; `None`: it is being given back.
    pub reason: Option<String>,
}

/// A head.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HeadReply {
    /// The volume's id.
    pub volume_id: String,
    /// The volume's name.
    pub volume: Option<String>,
    /// The head's epoch.
    pub epoch: u64,
    /// `opening`, `open`, `stalled`, `draining` or `superseded`.
    pub phase: String,
    /// What it waits for.
    pub reason: Option<String>,
    /// For how long it has been stalled, in milliseconds.
    pub stalled_ms: Option<u64>,
    /// The last seq it gave out.
    pub last_seq: u64,
    /// The last seq that is acknowledged.
    pub commit_seq: u64,
    /// Requests accepted and not answered.
    pub in_flight: u32,
    /// Its members.
    pub members: Vec<MemberReply>,
}

/// The answer of `/v1/status`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StatusReply {
    /// The server.
    pub server: ServerReply,
    /// The cluster store.
    pub store: StoreReply,
    /// Its pool.
    pub pool: Option<PoolReply>,
    /// The pool's replicas.
    pub replicas: Vec<ReplicaReply>,
    /// The heads that run here.
    pub heads: Vec<HeadReply>,
    /// The exports.
    pub exports: Vec<ExportReply>,
    /// What is left here, if the server is being drained and the cluster store could be asked.
    #[serde(default)]
    pub drain: Option<DrainReply>,
}

/// What the cluster store says that concerns a server's status.
#[derive(Default)]
pub(super) struct StoreView {
    pub(super) servers: Vec<ServerEntry>,
    pub(super) volumes: Vec<VolumeEntry>,
    /// Why it says nothing.
    pub(super) error: Option<String>,
}

pub(super) fn status_reply(parts: &Parts, plane: &Status, store: StoreView) -> StatusReply {
    let servers = &store.servers;
    let volumes: BTreeMap<VolumeId, String> = parts
        .exports
        .open_volumes()
        .into_iter()
        .map(|entry| (entry.volume.id, entry.volume.name))
        .collect();
    let names: BTreeMap<ServerId, &str> =
        servers.iter().map(|entry| (entry.server.id, entry.server.name.as_str())).collect();
    let views = parts.exports.list();
    StatusReply {
        server: ServerReply {
            id: parts.identity.server.to_string(),
            name: parts.name.clone(),
            cluster: parts.cluster.to_string(),
            version: crate::VERSION.to_owned(),
            pid: std::process::id(),
            listen: plane.listen.map(|address| address.to_string()),
            labels: parts.identity.labels.clone(),
            uptime_s: parts.started.elapsed().as_secs(),
        },
        drain: drain_reply(parts.identity.server, plane, &store),
        store: StoreReply { address: parts.store.address(), error: store.error },
        pool: plane.pool.as_ref().map(pool_reply),
        replicas: plane.replicas.iter().map(replica_reply).collect(),
        heads: plane.heads.iter().map(|head| head_reply(head, &volumes, &names)).collect(),
        exports: views.iter().map(|view| export_reply(view, plane)).collect(),
    }
}

fn drain_reply(own: ServerId, plane: &Status, store: &StoreView) -> Option<DrainReply> {
    let own_entry = store.servers.iter().find(|entry| entry.server.id == own)?;
    let draining = own_entry.server.draining?;
    let here = drain::replicas(&store.volumes, own);
    let replicas: Vec<String> = here.map(|entry| entry.volume.name.clone()).collect();
    let name = |id: VolumeId| {
        let entry = store.volumes.iter().find(|entry| entry.volume.id == id);
        entry.map_or_else(|| id.to_string(), |entry| entry.volume.name.clone())
    };
    let head = |head: &HeadStatus| DrainHead {
        volume: name(head.volume),
        reason: drain::guests(plane)
            .find(|problem| problem.volume == head.volume)
            .map(|problem| problem.reason),
    };
    let mut heads: Vec<DrainHead> = plane.heads.iter().map(head).collect();
    // Heads that have ended, and whose leases others cannot take yet.
    for volume in Remaining::on(own_entry, &store.volumes).held {
        if heads.iter().all(|head| head.volume != volume) {
            heads.push(DrainHead { volume, reason: None });
        }
    }
    let safe_to_stop = replicas.is_empty() && heads.is_empty();
    Some(DrainReply { since_ms: draining.since_ms, replicas, heads, safe_to_stop })
}

fn pool_reply(pool: &PoolStatus) -> PoolReply {
    PoolReply {
        id: pool.id.to_string(),
        log_bytes: pool.log_bytes,
        log_used_bytes: pool.log_used_bytes,
        home_bytes: pool.home_bytes,
        home_free_bytes: pool.home_free_bytes,
        failed: pool.failed.clone(),
    }
}

fn replica_reply(replica: &ReplicaStatus) -> ReplicaReply {
    let Position { epoch, seq } = replica.state.last;
    ReplicaReply {
        volume_id: replica.spec.key.volume.to_string(),
        shard: replica.spec.key.shard.0,
        block_size: replica.spec.block_size.bytes(),
        blocks: replica.spec.blocks,
        sealed_epoch: replica.state.sealed.0,
        last_epoch: epoch.0,
        last_seq: seq.0,
        durable_seq: replica.state.durable.0,
        commit_seq: replica.state.commit.0,
        trimmed_seq: replica.state.trimmed.0,
    }
}

fn head_reply(
    head: &HeadStatus,
    volumes: &BTreeMap<VolumeId, String>,
    servers: &BTreeMap<ServerId, &str>,
) -> HeadReply {
    let (phase, reason, stalled_ms) = match &head.phase {
        HeadPhase::Opening { reason } => ("opening", Some(reason.clone()), None),
        HeadPhase::Open => ("open", None, None),
        HeadPhase::Stalled { reason, duration } => {
            let ms = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
            ("stalled", Some(reason.clone()), Some(ms))
        }
        HeadPhase::Draining => ("draining", None, None),
        HeadPhase::Superseded { sealed } => {
            ("superseded", Some(format!("a member has sealed {sealed}")), None)
        }
    };
    HeadReply {
        volume_id: head.volume.to_string(),
        volume: volumes.get(&head.volume).cloned(),
        epoch: head.epoch.0,
        phase: phase.to_owned(),
        reason,
        stalled_ms,
        last_seq: head.last.0,
        commit_seq: head.commit.0,
        in_flight: head.in_flight,
        members: head.members.iter().map(|member| member_reply(member, servers)).collect(),
    }
}

fn member_reply(member: &MemberStatus, servers: &BTreeMap<ServerId, &str>) -> MemberReply {
    MemberReply {
        server_id: member.server.to_string(),
        server: servers.get(&member.server).map(|name| (*name).to_owned()),
        role: member.role.to_string(),
        local: member.local,
        reachable: member.reachable,
        last_seq: member.last.0,
        durable_seq: member.durable.0,
        note: member.note.clone(),
        slow: member.slow_for.is_some(),
        draining: member.draining,
        degraded: member.degraded.clone(),
        filled_bytes: member.filling.map(|filling| (filling.copied_bytes, filling.total_bytes)),
    }
}

pub(super) fn export_reply(view: &ExportView, plane: &Status) -> ExportReply {
    let served = plane.exports.iter().find(|export| export.spec.socket == view.wanted.socket);
    let head = plane.heads.iter().find(|head| Some(head.volume) == view.volume);
    let (state, reason) = match (&view.waiting, &view.lease) {
        (Some(reason), _) | (None, Some(LeaseState::Waiting { reason })) => {
            (ExportState::Waiting, Some(reason.clone()))
        }
        (None, Some(LeaseState::Standby)) => (ExportState::Standby, None),
        (None, Some(LeaseState::Yielded { pending, .. })) => {
            (ExportState::Yielded, pending.clone())
        }
        (None, Some(LeaseState::Held { .. }) | None) => head_state(head.map(|head| &head.phase)),
    };
    ExportReply {
        volume: view.wanted.volume.clone(),
        volume_id: view.volume.map(|id| id.to_string()),
        socket: view.wanted.socket.display().to_string(),
        queues: view.wanted.queues,
        read_only: served.map_or(view.wanted.read_only, |export| export.spec.read_only),
        standby: view.wanted.standby,
        configured: view.configured,
        state,
        reason,
        connected: served.is_some_and(|export| export.connected),
        in_flight: served.map_or(0, |export| export.in_flight),
    }
}

/// How an export is whose head is in this phase; `None`: there is no head any more.
fn head_state(phase: Option<&HeadPhase>) -> (ExportState, Option<String>) {
    match phase {
        Some(HeadPhase::Open) => (ExportState::Open, None),
        Some(HeadPhase::Opening { reason }) => (ExportState::Opening, Some(reason.clone())),
        Some(HeadPhase::Stalled { reason, .. }) => (ExportState::Stalled, Some(reason.clone())),
        Some(HeadPhase::Draining | HeadPhase::Superseded { .. }) | None => {
            (ExportState::Stopping, None)
        }
    }
}
