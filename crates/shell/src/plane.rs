//! The data plane as the control plane holds it.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use base::{BufferPool, Epoch, ReplicaKey, ServerId, ShardRecord, VolumeId};
use node::{Node, NodeConfig, ServerConfig};
use nvme::TargetConfig;
use ring::{Reactor, SocketAddress, SocketOptions};
use store::{FlushPolicy, StoreConfig};
use vhost_blk::{Listener, ListenerError, SinkClosed};
use volume::Tunables;

use crate::control::{
    ChangeError, ControlError, DataPlane, DataPlaneConfig, Event, ExportSpec, HeadPhase, HeadSpec,
    MetricFamily, OpenError, Opening, ReplicaSpec, ReplicaStatus, ServerAddress, StartError,
    StateNotice, Status,
};
use crate::message::{ExportId, MAIL_MAX, Mail, Message};
use crate::pool::Devices;
use crate::report::STATUS_WAIT;
use crate::worker::{Parts, Worker};

/// How soon a change of members that has to wait is tried again: a member that is about to have
/// caught up has within a few round trips.
const CHANGE_RETRY: Duration = Duration::from_millis(5);

/// How long a message of a vhost-user control thread may wait for a full mailbox.
const VHOST_WAIT: Duration = Duration::from_secs(5);

struct Served {
    id: ExportId,
    spec: ExportSpec,
    listener: Listener,
}

/// A data plane on a thread of its own.
struct Plane {
    mail: Mail,
    events: Mutex<mpsc::Receiver<Event>>,
    served: Mutex<Vec<Served>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// Starts the data plane: opens and recovers the pool, listens, and runs until
/// [`DataPlane::shutdown`].
pub fn start(config: &DataPlaneConfig) -> Result<Arc<dyn DataPlane>, StartError> {
    let (events, event_receiver) = mpsc::channel();
    let (started, start_result) = mpsc::sync_channel(1);
    let config = config.clone();
    let thread = std::thread::Builder::new()
        .name("holdfast-data".to_owned())
        .spawn(move || match prepare(&config, events) {
            Ok((worker, mail)) => {
                if started.send(Ok(mail)).is_ok() {
                    worker.run();
                }
            }
            Err(error) => drop(started.send(Err(error))),
        })
        .map_err(|source| StartError::System { action: "start a thread", source })?;
    let mail = start_result.recv().unwrap_or_else(|_| {
        let source = std::io::Error::other("its thread ended");
        Err(StartError::System { action: "start the data plane", source })
    })?;
    Ok(Arc::new(Plane {
        mail,
        events: Mutex::new(event_receiver),
        served: Mutex::new(Vec::new()),
        thread: Mutex::new(Some(thread)),
    }))
}

/// How the configured payload memory is shared out, in bytes: to guests, to accepted connections,
/// to connections to peers and to heads. Each has its own, so that none can starve another.
struct Budget {
    guests: u64,
    accepted: u64,
    peers: u64,
    heads: u64,
}

impl Budget {
    fn of(total: u64) -> Self {
        Self { guests: total / 2, accepted: total / 4, peers: total / 8, heads: total / 8 }
    }
}

/// So many small and large buffers make up `bytes`: a third of it in small ones.
fn counts(bytes: u64) -> (usize, usize) {
    let small = bytes / 3 / base::buffer::SMALL_SLOT_BYTES as u64;
    let large = bytes * 2 / 3 / base::buffer::LARGE_SLOT_BYTES as u64;
    let bound = |count: u64, least: usize| usize::try_from(count).unwrap_or(least).max(least);
    (bound(small, 64), bound(large, 16))
}

fn pool_of(bytes: u64) -> BufferPool {
    let (small, large) = counts(bytes);
    BufferPool::heap(small, large)
}

/// Heads' limits: what a slow member may hold of the guests' buffers is a part of them.
fn tunables(guest_bytes: u64) -> Tunables {
    let bytes = usize::try_from(guest_bytes).unwrap_or(usize::MAX);
    Tunables { member_bytes_max: bytes / 4, backlog_bytes_max: bytes / 8, ..Tunables::default() }
}

/// Everything that has to succeed before the data plane counts as started. Runs on its thread.
fn prepare(
    config: &DataPlaneConfig,
    events: mpsc::Sender<Event>,
) -> Result<(Worker, Mail), StartError> {
    let budget = Budget::of(config.buffer_bytes);
    let (small_buffers, large_buffers) = counts(budget.guests);
    let ring_config = ring::Config { small_buffers, large_buffers, ..ring::Config::default() };
    let mut reactor = Reactor::new(&ring_config).map_err(ring_error("create an io_uring"))?;
    let (sender, mail) = reactor.mailbox(MAIL_MAX);

    let (devices, server) = match &config.pool {
        None => (None, None),
        Some(pool) => {
            let (devices, infos) = Devices::open(&mut reactor, pool)?;
            let mut target = TargetConfig::new(pool.server);
            target.address = config.listen;
            let server = ServerConfig {
                server: pool.server,
                pool: pool.pool,
                store: StoreConfig {
                    pool: Some(pool.pool),
                    cluster: pool.cluster,
                    server: pool.server,
                    buffers: BufferPool::heap(
                        2 * StoreConfig::SMALL_BUFFERS_MIN,
                        2 * StoreConfig::LARGE_BUFFERS_MIN,
                    ),
                    flush: FlushPolicy::default(),
                    scrub_bytes_per_second: pool.scrub_bytes_per_second,
                },
                devices: infos,
                target,
                target_buffers: pool_of(budget.accepted),
                // Not before initiators can be authenticated and told of moves.
                offer_volumes: false,
            };
            (Some(devices), Some(server))
        }
    };
    let node = Node::new(NodeConfig {
        host: config.holder,
        jitter_seed: jitter_seed(),
        head_buffers: pool_of(budget.heads),
        peer_buffers: pool_of(budget.peers),
        tunables: tunables(budget.guests),
        state_messages: config.state_messages,
        server,
    });
    let has_pool = config.pool.is_some();
    let mut worker =
        Worker::new(Parts { reactor, node, pool: config.pool.clone(), devices, mail, events });
    if has_pool {
        worker.open_pool().map_err(|reason| pool_error(config, reason))?;
        if let Some(address) = config.listen {
            worker.listen(address)?;
        }
    }
    Ok((worker, Mail::new(sender)))
}

fn pool_error(config: &DataPlaneConfig, reason: String) -> StartError {
    let devices = config.pool.as_ref().map(|pool| &pool.devices);
    let path = devices.and_then(|devices| devices.fast.first()).cloned().unwrap_or_default();
    StartError::Pool { path, reason }
}

fn ring_error(action: &'static str) -> impl Fn(ring::Error) -> StartError {
    move |error| {
        let source = std::io::Error::other(error.to_string());
        StartError::System { action, source }
    }
}

/// Different in every process: time and process id are enough for jitter.
fn jitter_seed() -> u64 {
    let nanos = ring::now().nanos();
    nanos ^ u64::from(std::process::id()).rotate_left(40)
}

impl Worker {
    fn listen(&mut self, address: std::net::SocketAddr) -> Result<(), StartError> {
        let listener = self
            .reactor
            .listen(&SocketAddress::Tcp(address), SocketOptions::default())
            .map_err(|error| StartError::Listen {
                address,
                source: error.errno().map_or_else(
                    || std::io::Error::other(error.to_string()),
                    std::io::Error::from_raw_os_error,
                ),
            })?;
        if let Some(SocketAddress::Tcp(real)) = self.reactor.listener_address(listener) {
            self.listen = Some(*real);
        }
        self.listener = Some(listener);
        Ok(())
    }
}

impl Plane {
    fn served(&self) -> std::sync::MutexGuard<'_, Vec<Served>> {
        self.served.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stop_served(&self, served: Served) -> Result<(), ControlError> {
        served.listener.stop();
        self.mail.ask("stop the export", STATUS_WAIT, |answer| Message::RemoveExport {
            export: served.id,
            answer,
        })
    }

    /// Why an opening has not ended.
    fn pending_reason(&self, volume: VolumeId) -> String {
        let head = self.status(STATUS_WAIT).ok().and_then(|status| {
            status.heads.into_iter().find(|head| head.volume == volume).map(|head| head.phase)
        });
        match head {
            Some(HeadPhase::Opening { reason } | HeadPhase::Stalled { reason, .. }) => reason,
            _ => "the members have not answered yet".to_owned(),
        }
    }
}

impl DataPlane for Plane {
    fn status(&self, wait: Duration) -> Result<Status, ControlError> {
        self.mail.ask("report the status", wait, Message::Status)
    }

    fn metrics(&self, wait: Duration) -> Result<Vec<MetricFamily>, ControlError> {
        self.mail.ask("report the metrics", wait, Message::Metrics)
    }

    fn create_replica(
        &self,
        spec: &ReplicaSpec,
        epoch: Epoch,
        wait: Duration,
    ) -> Result<(), ControlError> {
        let spec = *spec;
        let message = |answer| Message::CreateReplica { spec, epoch, answer };
        self.mail.ask("create the replica", wait, message)?
    }

    fn delete_replica(&self, key: ReplicaKey, wait: Duration) -> Result<(), ControlError> {
        self.mail
            .ask("delete the replica", wait, |answer| Message::DeleteReplica { key, answer })?
    }

    fn replicas(&self, wait: Duration) -> Result<Vec<ReplicaStatus>, ControlError> {
        Ok(self.status(wait)?.replicas)
    }

    fn set_servers(&self, servers: &[ServerAddress]) -> Result<(), ControlError> {
        let message = Message::SetServers(servers.to_vec());
        self.mail.send("set the servers' addresses", message, STATUS_WAIT)
    }

    fn keep_connected(&self, servers: &[ServerId]) -> Result<(), ControlError> {
        let message = Message::KeepConnected(servers.to_vec());
        self.mail.send("keep sessions with servers", message, STATUS_WAIT)
    }

    fn open_head(&self, spec: &HeadSpec, wait: Duration) -> Result<Opening, OpenError> {
        let volume = spec.volume.id;
        let spec = Box::new(spec.clone());
        let asked =
            self.mail.ask("open the head", wait, |answer| Message::OpenHead { spec, answer });
        match asked {
            Ok(result) => result,
            Err(ControlError::Deadline { .. }) => {
                Ok(Opening::Pending { reason: self.pending_reason(volume) })
            }
            Err(error) => Err(error.into()),
        }
    }

    fn close_head(&self, volume: VolumeId, drain: Duration) -> Result<(), ControlError> {
        let wait = drain + STATUS_WAIT;
        self.mail.ask("close the head", wait, |answer| Message::CloseHead {
            volume,
            drain,
            answer,
        })?
    }

    fn change_members(
        &self,
        volume: VolumeId,
        epoch: Epoch,
        shard: &ShardRecord,
        wait: Duration,
    ) -> Result<(), ChangeError> {
        let deadline = Instant::now() + wait;
        loop {
            let shard = shard.clone();
            let asked = self.mail.ask("change the members", STATUS_WAIT, |answer| {
                Message::ChangeMembers { volume, epoch, shard, answer }
            })?;
            match asked {
                Err(ChangeError::NotNow { .. }) if Instant::now() < deadline => {
                    std::thread::sleep(CHANGE_RETRY);
                }
                result => return result,
            }
        }
    }

    fn members_changed(
        &self,
        volume: VolumeId,
        epoch: Epoch,
        shard: &ShardRecord,
        wait: Duration,
    ) -> Result<(), ChangeError> {
        let shard = shard.clone();
        self.mail.ask("adopt the members", wait, |answer| Message::MembersChanged {
            volume,
            epoch,
            shard,
            answer,
        })?
    }

    fn publish(&self, notice: &StateNotice) -> Result<(), ControlError> {
        self.mail.send("publish a state message", Message::Publish(*notice), STATUS_WAIT)
    }

    fn start_export(&self, spec: &ExportSpec, wait: Duration) -> Result<(), ControlError> {
        let asked = spec.clone();
        let (id, config) = self
            .mail
            .ask("start the export", wait, |answer| Message::AddExport { spec: asked, answer })??;
        let mail = self.mail.clone();
        let sink = move |control| {
            let message = Message::Vhost { export: id, control };
            mail.send("reach the device", message, VHOST_WAIT).map_err(|_| SinkClosed)
        };
        match Listener::start(&spec.socket, config, sink) {
            Ok(listener) => {
                self.served().push(Served { id, spec: spec.clone(), listener });
                Ok(())
            }
            Err(error) => {
                let _ = self.mail.ask("drop the export", wait, |answer| Message::RemoveExport {
                    export: id,
                    answer,
                });
                Err(ControlError::Socket { path: spec.socket.clone(), source: socket_error(error) })
            }
        }
    }

    fn stop_export(&self, socket: &Path, _drain: Duration) -> Result<(), ControlError> {
        let found = {
            let mut served = self.served();
            let index = served.iter().position(|served| served.spec.socket == socket);
            index.map(|index| served.remove(index))
        };
        found.map_or(Ok(()), |served| self.stop_served(served))
    }

    fn next_event(&self, wait: Duration) -> Option<Event> {
        let events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        events.recv_timeout(wait).ok()
    }

    fn shutdown(&self, wait: Duration) -> Result<(), ControlError> {
        let deadline = Instant::now() + wait;
        let left = || deadline.saturating_duration_since(Instant::now());
        let exports = std::mem::take(&mut *self.served());
        for served in exports {
            self.stop_served(served)?;
        }
        for head in self.status(STATUS_WAIT)?.heads {
            match self.close_head(head.volume, left()) {
                Ok(()) | Err(ControlError::NoHead(_)) => {}
                Err(error) => return Err(error),
            }
        }
        self.mail.ask("stop the data plane", left().max(STATUS_WAIT), Message::Stop)?;
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread
            && thread.join().is_err()
        {
            tracing::error!("the data-plane thread ended in a panic");
        }
        Ok(())
    }
}

fn socket_error(error: ListenerError) -> std::io::Error {
    match error {
        ListenerError::Io { source, .. } => source,
        ListenerError::InUse { .. } => {
            std::io::Error::new(std::io::ErrorKind::AddrInUse, error.to_string())
        }
        ListenerError::Config(_)
        | ListenerError::NameTooLong { .. }
        | ListenerError::NotASocket { .. } => {
            std::io::Error::new(std::io::ErrorKind::InvalidInput, error.to_string())
        }
    }
}
