//! What the control plane asks of the data plane: plain data and one object-safe trait.
//!
//! Every method may be called from any thread, never from a reactor. A method that needs the
//! reactor's answer blocks for at most its `wait` and then fails with [`ControlError::Deadline`];
//! what it asked for may still happen, so callers repeat it (all of them are idempotent) or look
//! at [`DataPlane::status`].
//!
//! The data plane knows no cluster store. Who may be head is decided before
//! [`DataPlane::open_head`] is called, and made true by the members' seals.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use base::{
    BlockSize, ClusterId, Epoch, FillProgress, Health, HolderId, PoolId, ReplicaKey, ReplicaState,
    Role, Seq, ServerId, ShardRecord, StateMessage, VolumeId, VolumeRecord,
};

pub use node::metrics::LATENCY_BOUNDS_NS;

use crate::handover::HandOver;

/// What a data plane is started with. It is fixed for the life of the process.
#[derive(Clone, Debug)]
pub struct DataPlaneConfig {
    /// Who this process is to the servers it connects to: the holder of its leases. A head that
    /// connects again is told from another one by it.
    pub holder: HolderId,
    /// The pool to open and lock; `None` for a diskless head (`holdfast attach`).
    pub pool: Option<PoolConfig>,
    /// Where the replica service listens (port 0: any); `None`: it does not.
    pub listen: Option<SocketAddr>,
    /// Payload memory to preallocate, in bytes.
    pub buffer_bytes: u64,
    /// Servers tell heads of what happens before an I/O does. Only tests that show the gap without
    /// such messages turn them off.
    pub state_messages: bool,
}

/// A pool to open, and whose it must be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolConfig {
    /// The cluster that its labels must name.
    pub cluster: ClusterId,
    /// The server that its labels must name: this one.
    pub server: ServerId,
    /// The pool that its labels must name.
    pub pool: PoolId,
    /// Its devices.
    pub devices: PoolDevices,
    /// Home is read for rot at this rate, at most; 0: not at all.
    pub scrub_bytes_per_second: u64,
}

/// The devices of a pool: files or block devices, in the order they were formatted.
///
/// Whoever opens or formats a pool holds an exclusive `flock` on every device; that is how a
/// pool in use by a live daemon is noticed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolDevices {
    /// Fast devices: the log.
    pub fast: Vec<PathBuf>,
    /// Mass devices: home.
    pub mass: Vec<PathBuf>,
}

/// Why a data plane did not start. Nothing runs and nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A device is locked by another process.
    #[error(
        "pool device {} is in use by another process; stop that daemon (`fuser {}` names it) first",
        path.display(),
        path.display()
    )]
    PoolInUse {
        /// The locked device.
        path: PathBuf,
    },
    /// The devices do not hold the pool that was asked for, or not a usable one.
    #[error("pool device {}: {reason}", path.display())]
    Pool {
        /// The device at fault.
        path: PathBuf,
        /// What is wrong with it and what to do.
        reason: String,
    },
    /// A device could not be opened, read or recovered.
    #[error("pool device {}: {source}", path.display())]
    Device {
        /// The device at fault.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The replica service could not listen.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// The configured address.
        address: SocketAddr,
        /// The system's error.
        source: io::Error,
    },
    /// The kernel or the machine refused something the data plane needs.
    #[error("cannot {action}: {source}")]
    System {
        /// What was tried, as in "create an io_uring".
        action: &'static str,
        /// The system's error.
        source: io::Error,
    },
}

/// Why the data plane did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// No answer in time; it may still happen.
    #[error("{operation} has not finished after {} ms", waited.as_millis())]
    Deadline {
        /// The method's purpose, as in "create the replica".
        operation: &'static str,
        /// How long the caller waited.
        waited: Duration,
    },
    /// The reactor has ended; nothing of it runs any more.
    #[error("the data plane has stopped")]
    Stopped,
    /// Another process is taking everything over; if it fails, all goes on here.
    #[error("the data plane is being handed over to another process")]
    HandedOver,
    /// This process has no pool (`holdfast attach`).
    #[error("this process has no pool")]
    NoPool,
    /// A device of the pool has failed.
    #[error("the pool has failed: {reason}")]
    PoolFailed {
        /// Which device, and how.
        reason: String,
    },
    /// The pool has no room.
    #[error("the pool has {free_bytes} bytes free, {needed_bytes} are needed")]
    NoSpace {
        /// Bytes the request needs.
        needed_bytes: u64,
        /// Bytes that are free.
        free_bytes: u64,
    },
    /// There is such a replica, of another geometry.
    #[error("replica {key} exists with {blocks} blocks of {block_size} bytes")]
    ReplicaMismatch {
        /// Which replica.
        key: ReplicaKey,
        /// Its block size.
        block_size: BlockSize,
        /// Its length in blocks.
        blocks: u64,
    },
    /// No head of this volume runs here.
    #[error("no head of volume {0} runs here")]
    NoHead(VolumeId),
    /// A head of this volume runs here in another epoch; close it first.
    #[error("a head of volume {volume} runs here in {epoch}")]
    HeadExists {
        /// Which volume.
        volume: VolumeId,
        /// The running head's epoch.
        epoch: Epoch,
    },
    /// A limit of the process is reached.
    #[error("too many {what} in this process (at most {limit})")]
    Limit {
        /// What there is too much of, as in "volumes".
        what: &'static str,
        /// The limit.
        limit: usize,
    },
    /// The export's socket could not be made, or another export uses it.
    #[error("socket {}: {source}", path.display())]
    Socket {
        /// The socket's path.
        path: PathBuf,
        /// The system's error; `AddrInUse` if someone listens there.
        source: io::Error,
    },
}

/// Why a head did not open. After an error no head of the volume runs here in that epoch.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// A member has sealed a higher epoch: another head came later, or the cluster store was
    /// rolled back.
    #[error("superseded: a member has sealed {sealed}")]
    Superseded {
        /// The highest sealed epoch seen.
        sealed: Epoch,
    },
    /// The members cannot make a head whatever happens next: damage, or replicas that are gone.
    #[error("the volume cannot be opened: {reason}")]
    Unopenable {
        /// What is wrong and what to do.
        reason: String,
    },
    /// The data plane refused.
    #[error(transparent)]
    Control(#[from] ControlError),
}

/// Why a head did not begin or follow a change of its members. Nothing has changed in it.
#[derive(Debug, thiserror::Error)]
pub enum ChangeError {
    /// Not now: a member of the new set has not caught up, another change is open, it is still
    /// opening. Worth another try.
    #[error("the members cannot be changed now: {reason}")]
    NotNow {
        /// What stands in the way.
        reason: String,
    },
    /// Not in this way: the record is none that the head could ever take.
    #[error("the members cannot be changed so: {reason}")]
    Refused {
        /// Why not.
        reason: String,
    },
    /// The head of the volume here is of another epoch.
    #[error("the head of volume {volume} runs in {epoch}")]
    OtherEpoch {
        /// The volume.
        volume: VolumeId,
        /// The running head's epoch.
        epoch: Epoch,
    },
    /// The data plane refused.
    #[error(transparent)]
    Control(#[from] ControlError),
}

/// A state message to the heads that have a session here: what they should know before an I/O
/// tells them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StateNotice {
    /// The replica that it is about; `None`: the whole server, so every session.
    pub key: Option<ReplicaKey>,
    /// What there is to know.
    pub message: StateMessage,
}

/// A replica to make: geometry of one shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplicaSpec {
    /// Which shard of which volume.
    pub key: ReplicaKey,
    /// The volume's block size.
    pub block_size: BlockSize,
    /// The shard's length in blocks.
    pub blocks: u64,
}

/// Where a server's replica service is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerAddress {
    /// The server.
    pub server: ServerId,
    /// Its addresses, preferred first.
    pub addresses: Vec<SocketAddr>,
}

/// A head to open: the lease is taken, `volume.epoch` is the head's epoch.
///
/// A member whose pool is this process's own is local; the others are found in the address book
/// ([`DataPlane::set_servers`]).
#[derive(Clone, Debug)]
pub struct HeadSpec {
    /// The volume as it was when its lease was taken.
    pub volume: VolumeRecord,
    /// Its shard; no member is [`Role::Provisioning`].
    pub shard: ShardRecord,
}

/// How far an opening is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Opening {
    /// The head serves.
    Open,
    /// It goes on trying; requests of front ends wait.
    Pending {
        /// What it waits for, as in "1 of 3 members answered the seal, 2 are needed".
        reason: String,
    },
}

/// A vhost-user-blk socket to serve a volume on.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ExportSpec {
    /// The volume. While no head of it runs here, guests' requests wait in their rings.
    pub volume: VolumeId,
    /// Its length in blocks.
    pub blocks: u64,
    /// Its block size.
    pub block_size: BlockSize,
    /// The socket's path. A stale socket file (nobody listens) is replaced.
    pub socket: PathBuf,
    /// Request queues, at least 1.
    pub queues: u16,
    /// The guest sees a read-only disk.
    pub read_only: bool,
}

/// What happens without being asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A head, open or opening, was told of a higher epoch. It accepts and acknowledges nothing
    /// any more; its exports hold their requests until they are stopped.
    Superseded {
        /// The volume.
        volume: VolumeId,
        /// The deposed head's epoch.
        epoch: Epoch,
        /// The higher epoch.
        sealed: Epoch,
    },
    /// No session to a server that heads here have members on.
    MemberDown {
        /// The server.
        server: ServerId,
        /// Why, for people.
        reason: String,
    },
    /// There is a session to that server again.
    MemberUp {
        /// The server.
        server: ServerId,
    },
    /// Blocks that a member could not read were written again with another member's copy.
    Mended {
        /// The volume.
        volume: VolumeId,
        /// The member's server.
        server: ServerId,
        /// How many blocks.
        blocks: u32,
        /// The first.
        lba: u64,
    },
    /// A member answers far later than the others, or no longer does.
    MemberSlow {
        /// The volume.
        volume: VolumeId,
        /// The member's server.
        server: ServerId,
        /// It is slow now.
        slow: bool,
    },
    /// Enough members of the volume have its new size: it is served from now on, and the guests were
    /// told.
    Resized {
        /// The volume.
        volume: VolumeId,
        /// Its size.
        size_bytes: u64,
    },
    /// A pending head has opened.
    Opened {
        /// The volume.
        volume: VolumeId,
        /// The head's epoch.
        epoch: Epoch,
    },
    /// An opening has failed for good, or a head has ended itself; no head runs.
    Unopenable {
        /// The volume.
        volume: VolumeId,
        /// The head's epoch.
        epoch: Epoch,
        /// What is wrong and what to do.
        reason: String,
    },
    /// A device of the pool has failed: the pool acknowledges nothing more until a restart.
    PoolFailed {
        /// Which device, and how.
        reason: String,
    },
    /// A front end has connected to an export, or is gone.
    FrontEnd {
        /// The volume.
        volume: VolumeId,
        /// The export's socket.
        socket: PathBuf,
        /// It has connected.
        connected: bool,
    },
    /// A guest has started the rings of an export: it wants the volume. Its requests wait there
    /// until a head of the volume serves here.
    RingsStarted {
        /// The volume.
        volume: VolumeId,
        /// The export's socket.
        socket: PathBuf,
    },
    /// No ring of an export runs any more, and every request that was taken from it is answered.
    RingsStopped {
        /// The volume.
        volume: VolumeId,
        /// The export's socket.
        socket: PathBuf,
        /// The front end stopped them, or paused them. Not so if it is gone without a word.
        by_front_end: bool,
    },
    /// The reactor has ended; this is the last event.
    Stopped,
}

/// The data plane as it is now.
#[derive(Clone, Debug, Default)]
pub struct Status {
    /// The pool; `None` without one.
    pub pool: Option<PoolStatus>,
    /// Where the replica service listens, with its real port.
    pub listen: Option<SocketAddr>,
    /// The pool's replicas.
    pub replicas: Vec<ReplicaStatus>,
    /// The heads that run here.
    pub heads: Vec<HeadStatus>,
    /// The exports.
    pub exports: Vec<ExportStatus>,
}

/// A pool's identity and room.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolStatus {
    /// Its id.
    pub id: PoolId,
    /// Bytes of log space.
    pub log_bytes: u64,
    /// Bytes of log in use.
    pub log_used_bytes: u64,
    /// Bytes of log that the next process to open the pool would read before it serves.
    pub log_recovery_bytes: u64,
    /// Bytes of home space: what volumes are placed by.
    pub home_bytes: u64,
    /// Bytes of home space that replicas may still take.
    pub home_free_bytes: u64,
    /// Which device has failed, and how.
    pub failed: Option<String>,
}

/// One replica of this server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplicaStatus {
    /// Its identity and geometry.
    pub spec: ReplicaSpec,
    /// What it knows of its log.
    pub state: ReplicaState,
    /// It has lost durable records: it counts for no opening, and is to be filled.
    pub lost_records: bool,
    /// Blocks that a scrub could not read and that nobody has written again yet.
    pub damaged_blocks: u64,
}

/// What a head does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HeadPhase {
    /// Seals and reconciles.
    Opening {
        /// What it waits for.
        reason: String,
    },
    /// Serves.
    Open,
    /// Serves, but requests wait for a quorum.
    Stalled {
        /// What is missing.
        reason: String,
        /// For how long.
        duration: Duration,
    },
    /// Is being closed.
    Draining,
    /// Was deposed.
    Superseded {
        /// The higher epoch.
        sealed: Epoch,
    },
}

/// A head that runs here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeadStatus {
    /// The volume.
    pub volume: VolumeId,
    /// The head's epoch.
    pub epoch: Epoch,
    /// What it does.
    pub phase: HeadPhase,
    /// Bytes that guests may use. Less than the volume record says while members are told of a new
    /// size.
    pub size_bytes: u64,
    /// The last seq it gave out.
    pub last: Seq,
    /// The last seq that is acknowledged.
    pub commit: Seq,
    /// Requests accepted and not answered.
    pub in_flight: u32,
    /// Of these, those that wait to be begun.
    pub queued: u32,
    /// A change of its in-sync set is open: it acknowledges what has quorum in both sets.
    pub change_open: bool,
    /// What it has answered since it was made.
    pub traffic: Traffic,
    /// Its members.
    pub members: Vec<MemberStatus>,
}

/// What a head has answered. Only grows in the life of a head.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Reads.
    pub reads: KindTraffic,
    /// Writes, discards and write-zeroes.
    pub writes: KindTraffic,
}

/// What a head has answered of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KindTraffic {
    /// Requests.
    pub requests: u64,
    /// Of these, those that ended in an error.
    pub errors: u64,
    /// Bytes of those that ended well.
    pub bytes: u64,
    /// Answers by latency: bucket i has those up to [`LATENCY_BOUNDS_NS`]`[i]`, the last one the
    /// rest.
    pub latency_counts: [u64; LATENCY_BOUNDS_NS.len() + 1],
}

/// What a head does with a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemberMode {
    /// No session to its server.
    Down,
    /// Seals, or compares its log with the head's.
    Opening,
    /// Is copied the log records it lacks.
    CatchingUp,
    /// Is filled by another member.
    Filling,
    /// Gets every record as it is written.
    Live,
    /// What it lacks is in no log any more, or its data is damaged or contradicts what was
    /// acknowledged: it must be filled.
    NeedsFill,
    /// It refuses or fails; tried again.
    Failed,
}

/// A member as its head sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberStatus {
    /// Its server.
    pub server: ServerId,
    /// Its role in the shard record.
    pub role: Role,
    /// It is in this process.
    pub local: bool,
    /// There is a session to its server.
    pub connected: bool,
    /// Its commands are answered: connected and sealed by this head.
    pub reachable: bool,
    /// The last seq it has.
    pub last: Seq,
    /// The last seq it has on media.
    pub durable: Seq,
    /// Records behind the head's newest; `None` while unknown.
    pub lag: Option<u64>,
    /// What the head does with it.
    pub mode: MemberMode,
    /// How long it has been in that mode.
    pub mode_for: Duration,
    /// It follows the log and holds every acknowledged record.
    pub caught_up: bool,
    /// For how long it has been far slower than the others.
    pub slow_for: Option<Duration>,
    /// Its server has said that it goes away.
    pub draining: bool,
    /// A device of its pool has failed, or its server has no such replica: it is gone for good.
    pub device_failed: bool,
    /// Its server has said that it does not work as it should, for people.
    pub degraded: Option<String>,
    /// How another member's server sees its server, if one was asked.
    pub others_say: Option<Health>,
    /// How far its filling is.
    pub filling: Option<FillProgress>,
    /// Why it is not reachable, or how far behind it is, for people.
    pub note: Option<String>,
}

/// A served socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportStatus {
    /// What was asked for.
    pub spec: ExportSpec,
    /// A front end is connected.
    pub connected: bool,
    /// Guest requests accepted and not answered.
    pub in_flight: u32,
}

/// A metric with its samples, ready for Prometheus' text format.
#[derive(Clone, Debug, PartialEq)]
pub struct MetricFamily {
    /// As in `holdfast_requests_total`: base units, `_total` on counters.
    pub name: &'static str,
    /// One line.
    pub help: &'static str,
    /// Its samples, all of the kind that the first one has.
    pub samples: Vec<MetricSample>,
}

/// One sample of a [`MetricFamily`].
#[derive(Clone, Debug, PartialEq)]
pub struct MetricSample {
    /// Label names and values.
    pub labels: Vec<(&'static str, String)>,
    /// Its value.
    pub value: MetricValue,
}

/// The value of a [`MetricSample`].
#[derive(Clone, Debug, PartialEq)]
pub enum MetricValue {
    /// Only grows.
    Counter(u64),
    /// Goes up and down.
    Gauge(f64),
    /// A latency histogram.
    Histogram {
        /// Upper bounds of the buckets in nanoseconds, rising; what is above the last one is
        /// counted in one more bucket.
        bounds_ns: &'static [u64],
        /// Counts per bucket (not cumulative): one more than there are bounds.
        counts: Vec<u64>,
        /// Sum of all observations, in nanoseconds.
        sum_ns: u64,
    },
}

/// A running data plane.
pub trait DataPlane: Send + Sync {
    /// A snapshot of everything, gathered within `wait`.
    fn status(&self, wait: Duration) -> Result<Status, ControlError>;

    /// Counters and histograms, gathered within `wait`.
    fn metrics(&self, wait: Duration) -> Result<Vec<MetricFamily>, ControlError>;

    /// Makes an empty replica, durably: when this returns, it outlives a power cut. If there is
    /// one of the same geometry already, nothing changes. It refuses heads below `epoch`, the
    /// volume's as it is now.
    fn create_replica(
        &self,
        spec: &ReplicaSpec,
        epoch: Epoch,
        wait: Duration,
    ) -> Result<(), ControlError>;

    /// Deletes a replica and its data, durably. If there is none, nothing changes.
    fn delete_replica(&self, key: ReplicaKey, wait: Duration) -> Result<(), ControlError>;

    /// The replicas of the pool; empty without one.
    fn replicas(&self, wait: Duration) -> Result<Vec<ReplicaStatus>, ControlError>;

    /// Replaces the address book that heads connect by. Connections that are up stay.
    fn set_servers(&self, servers: &[ServerAddress]) -> Result<(), ControlError>;

    /// Starts a head and waits for it to serve. If that takes longer than `wait` (which may be
    /// zero) the opening goes on and is answered with [`Opening::Pending`]; asked again with the
    /// same epoch, it waits again. [`Event::Opened`] tells when a pending one has opened.
    fn open_head(&self, spec: &HeadSpec, wait: Duration) -> Result<Opening, OpenError>;

    /// Waits for accepted requests to be answered, releases the members and ends the head. If that
    /// has not happened within `drain`, the head is ended as it is: requests that were not decided
    /// stay unanswered. Exports of the volume stay; what their guests want waits for the next
    /// head. Returns once the head
    /// is gone, whichever way; only with [`ControlError::Deadline`] it may still run.
    fn close_head(&self, volume: VolumeId, drain: Duration) -> Result<(), ControlError>;

    /// Begins a change of the in-sync set of the head in `epoch`, before the cluster store's record
    /// is made to say so: from then on, what it acknowledges has quorum in both sets. Members that
    /// are about to have what the new set needs are waited for, up to `wait`. The change stays
    /// open until [`DataPlane::members_changed`] says what the record is.
    fn change_members(
        &self,
        volume: VolumeId,
        epoch: Epoch,
        shard: &ShardRecord,
        wait: Duration,
    ) -> Result<(), ChangeError>;

    /// The cluster store's record of the head's members is this now, still in `epoch`. Ends an open
    /// change, whichever of its two sets the record names, and adopts members that do not count.
    /// A record that names another set ends the head. The same record again changes nothing.
    fn members_changed(
        &self,
        volume: VolumeId,
        epoch: Epoch,
        shard: &ShardRecord,
        wait: Duration,
    ) -> Result<(), ChangeError>;

    /// The volume of the head in `epoch` has grown: the cluster store's record says so. Its members are
    /// told, then its guests ([`Event::Resized`]). A head that knows has nothing to do.
    fn volume_grown(
        &self,
        volume: VolumeId,
        epoch: Epoch,
        size_bytes: u64,
        wait: Duration,
    ) -> Result<(), ChangeError>;

    /// Tells the heads that have sessions here.
    fn publish(&self, notice: &StateNotice) -> Result<(), ControlError>;

    /// Keeps sessions with these servers, whether or not a head here has members on them: one that
    /// is opened finds them connected. Replaces the servers that were named before.
    fn keep_connected(&self, servers: &[ServerId]) -> Result<(), ControlError>;

    /// Serves a volume on a socket. Listens when this returns. There need not be a head yet, it may
    /// be opening or stalled: guests' requests wait.
    fn start_export(&self, spec: &ExportSpec, wait: Duration) -> Result<(), ControlError>;

    /// Stops serving: no new requests, waits up to `drain` for the accepted ones, disconnects
    /// the front end and removes the socket. If there is no such export, nothing changes.
    fn stop_export(&self, socket: &std::path::Path, drain: Duration) -> Result<(), ControlError>;

    /// The next event, waiting for up to `wait`. One caller at a time.
    fn next_event(&self, wait: Duration) -> Option<Event>;

    /// How this data plane is handed over to another process; `None` if it cannot be.
    fn handing_over(&self) -> Option<&dyn HandOver> {
        None
    }

    /// Ends everything: exports and heads as their own methods do, then the replica service, then
    /// the pool, with a checkpoint. Afterwards every method fails with [`ControlError::Stopped`].
    fn shutdown(&self, wait: Duration) -> Result<(), ControlError>;
}

/// How the binaries start a data plane: `shell::start`, or a fake in their tests.
pub type StartDataPlane = fn(&DataPlaneConfig) -> Result<Arc<dyn DataPlane>, StartError>;
