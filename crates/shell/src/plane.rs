//! The data plane as the control plane holds it.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use base::{BufferPool, Epoch, ReplicaKey, ServerId, ShardRecord, VolumeId};
use node::{Node, NodeConfig, ServerConfig};
use nvme::TargetConfig;
use ring::{Reactor, SocketAddress, SocketOptions};
use store::{FlushPolicy, StoreConfig};
use vhost_blk::{Control, DeviceConfig, Listener, ListenerError, SinkClosed};
use volume::Tunables;

use crate::control::{
    ChangeError, ControlError, DataPlane, DataPlaneConfig, Event, ExportSpec, HeadPhase, HeadSpec,
    MetricFamily, OpenError, Opening, ReplicaSpec, ReplicaStatus, ServerAddress, StartError,
    StateNotice, Status,
};
use crate::handover::{HandOver, Inherited};
use crate::message::{ExportId, MAIL_MAX, Mail, Message};
use crate::pool::Devices;
use crate::report::STATUS_WAIT;
use crate::worker::{Parts, Worker};

/// How soon a change of members that has to wait is tried again: a member that is about to have
/// caught up has within a few round trips.
const CHANGE_RETRY: Duration = Duration::from_millis(5);

/// How long a message of a vhost-user control thread may wait for a full mailbox.
const VHOST_WAIT: Duration = Duration::from_secs(5);

/// How the messages of an export's control thread reach its device.
type VhostSink = Box<dyn FnMut(Control) -> Result<(), SinkClosed> + Send>;

pub(crate) struct Served {
    id: ExportId,
    pub(crate) spec: ExportSpec,
    pub(crate) listener: Listener,
}

/// A data plane on a thread of its own.
pub(crate) struct Plane {
    config: DataPlaneConfig,
    /// To the thread that runs; another one after it was handed over and taken back.
    mail: Mutex<Mail>,
    events: Mutex<mpsc::Receiver<Event>>,
    event_sender: mpsc::Sender<Event>,
    served: Mutex<Vec<Served>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// Starts the data plane: opens and recovers the pool, listens, and runs until
/// [`DataPlane::shutdown`].
pub fn start(config: &DataPlaneConfig) -> Result<Arc<dyn DataPlane>, StartError> {
    Prepared::new(config)?.start(Inherited::default())
}

/// A data plane that has its memory and its ring, and does not touch the pool yet: what takes time
/// and can be done while another process still serves.
pub struct Prepared {
    config: DataPlaneConfig,
    events: mpsc::Receiver<Event>,
    event_sender: mpsc::Sender<Event>,
    thread: PreparedThread,
}

struct PreparedThread {
    begin: mpsc::SyncSender<Inherited>,
    started: mpsc::Receiver<Result<Mail, StartError>>,
    handle: JoinHandle<()>,
}

impl Prepared {
    /// Makes the thread and what it needs.
    pub fn new(config: &DataPlaneConfig) -> Result<Self, StartError> {
        let (event_sender, events) = mpsc::channel();
        let thread = PreparedThread::new(config, event_sender.clone())?;
        Ok(Self { config: config.clone(), events, event_sender, thread })
    }

    /// Opens and recovers the pool and runs.
    pub fn start(self, inherited: Inherited) -> Result<Arc<dyn DataPlane>, StartError> {
        let (mail, thread) = self.thread.start(inherited)?;
        Ok(Arc::new(Plane {
            config: self.config,
            mail: Mutex::new(mail),
            events: Mutex::new(self.events),
            event_sender: self.event_sender,
            served: Mutex::new(Vec::new()),
            thread: Mutex::new(Some(thread)),
        }))
    }
}

impl PreparedThread {
    fn new(config: &DataPlaneConfig, events: mpsc::Sender<Event>) -> Result<Self, StartError> {
        let (begin, beginning) = mpsc::sync_channel(1);
        let (tell, started) = mpsc::sync_channel(1);
        let (prepared, outcome) = mpsc::sync_channel(1);
        let config = config.clone();
        let handle = std::thread::Builder::new()
            .name("holdfast-data".to_owned())
            .spawn(move || {
                let resources = match Resources::new(&config) {
                    Ok(resources) => resources,
                    Err(error) => return drop(prepared.send(Err(error))),
                };
                let (sender, mail) = resources.reactor.mailbox(MAIL_MAX);
                let _ = prepared.send(Ok(()));
                // An error: whoever prepared this has changed his mind.
                let Ok(inherited) = beginning.recv() else { return };
                match prepare(&config, resources, mail, events, inherited) {
                    Ok(worker) => {
                        if tell.send(Ok(Mail::new(sender))).is_ok() {
                            worker.run();
                        }
                    }
                    Err(error) => drop(tell.send(Err(error))),
                }
            })
            .map_err(|source| StartError::System { action: "start a thread", source })?;
        outcome.recv().unwrap_or_else(|_| Err(thread_ended()))?;
        Ok(Self { begin, started, handle })
    }

    fn start(self, inherited: Inherited) -> Result<(Mail, JoinHandle<()>), StartError> {
        // If the thread is gone, so is what it would answer with.
        let _ = self.begin.send(inherited);
        let mail = self.started.recv().unwrap_or_else(|_| Err(thread_ended()))?;
        Ok((mail, self.handle))
    }
}

fn thread_ended() -> StartError {
    let source = std::io::Error::other("its thread ended");
    StartError::System { action: "start the data plane", source }
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

/// Heads' limits: what a slow member may hold of the guests' buffers is a part of them.
fn tunables(guest_bytes: u64) -> Tunables {
    let bytes = usize::try_from(guest_bytes).unwrap_or(usize::MAX);
    Tunables { member_bytes_max: bytes / 4, backlog_bytes_max: bytes / 8, ..Tunables::default() }
}

/// The ring, and all memory for payloads: it takes tens of milliseconds to have that much of it, in which nobody
/// need wait.
struct Resources {
    /// Has the guests' buffers.
    reactor: Reactor,
    accepted: BufferPool,
    peers: BufferPool,
    heads: BufferPool,
    store: BufferPool,
}

impl Resources {
    fn new(config: &DataPlaneConfig) -> Result<Self, StartError> {
        let budget = Budget::of(config.buffer_bytes);
        let (small_buffers, large_buffers) = counts(budget.guests);
        let ring_config = ring::Config { small_buffers, large_buffers, ..ring::Config::default() };
        let reactor = Reactor::new(&ring_config).map_err(ring_error("create an io_uring"))?;
        // Only a server's need any.
        let (accepted, store) = match config.pool {
            None => ((0, 0), (0, 0)),
            Some(_) => (
                counts(budget.accepted),
                (2 * StoreConfig::SMALL_BUFFERS_MIN, 2 * StoreConfig::LARGE_BUFFERS_MIN),
            ),
        };
        let pool_of = |(small, large)| BufferPool::heap(small, large);
        Ok(Self {
            reactor,
            accepted: pool_of(accepted),
            peers: pool_of(counts(budget.peers)),
            heads: pool_of(counts(budget.heads)),
            store: pool_of(store),
        })
    }
}

/// Everything that has to succeed before the data plane counts as started. Runs on its thread.
fn prepare(
    config: &DataPlaneConfig,
    resources: Resources,
    mail: ring::Receiver<Message>,
    events: mpsc::Sender<Event>,
    inherited: Inherited,
) -> Result<Worker, StartError> {
    let Resources { mut reactor, accepted, peers, heads, store } = resources;
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
                    buffers: store,
                    flush: FlushPolicy::default(),
                    scrub_bytes_per_second: pool.scrub_bytes_per_second,
                },
                devices: infos,
                target,
                target_buffers: accepted,
                // Not before initiators can be authenticated and told of moves.
                offer_volumes: false,
            };
            (Some(devices), Some(server))
        }
    };
    let mut node = Node::new(NodeConfig {
        host: config.holder,
        jitter_seed: jitter_seed(),
        head_buffers: heads,
        peer_buffers: peers,
        tunables: tunables(Budget::of(config.buffer_bytes).guests),
        state_messages: config.state_messages,
        server,
    });
    if let Some(legacy) = inherited.legacy {
        node.inherit(legacy);
    }
    let has_pool = config.pool.is_some();
    let mut worker =
        Worker::new(Parts { reactor, node, pool: config.pool.clone(), devices, mail, events });
    worker.connect(&inherited.servers, &inherited.connect);
    if has_pool {
        worker.open_pool().map_err(|reason| pool_error(config, reason))?;
        if let Some(address) = config.listen {
            worker.listen(address, inherited.listener)?;
        }
    }
    Ok(worker)
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
    fn listen(
        &mut self,
        address: std::net::SocketAddr,
        inherited: Option<OwnedFd>,
    ) -> Result<(), StartError> {
        let listener = if let Some(socket) = inherited {
            self.reactor.adopt_listener(socket)
        } else {
            self.reactor.listen(&SocketAddress::Tcp(address), SocketOptions::default())
        };
        let listener = listener.map_err(|error| StartError::Listen {
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
    /// The way to the thread.
    pub(crate) fn mail(&self) -> Mail {
        self.mail.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Runs on a new thread, in place of one that has ended.
    pub(crate) fn begin_again(&self, inherited: Inherited) -> Result<(), StartError> {
        let prepared = PreparedThread::new(&self.config, self.event_sender.clone())?;
        let (mail, thread) = prepared.start(inherited)?;
        *self.mail.lock().unwrap_or_else(PoisonError::into_inner) = mail;
        *self.thread.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread);
        Ok(())
    }

    /// Makes the device of an export and, with `serve`, its listener.
    pub(crate) fn add_export(
        &self,
        spec: &ExportSpec,
        wait: Duration,
        serve: impl FnOnce(DeviceConfig, VhostSink) -> Result<Listener, ListenerError>,
    ) -> Result<(), ControlError> {
        let mail = self.mail();
        let added = spec.clone();
        let (id, config) = mail
            .ask("make the export", wait, |answer| Message::AddExport { spec: added, answer })??;
        let sink_mail = mail.clone();
        let sink: VhostSink = Box::new(move |control| {
            let message = Message::Vhost { export: id, control };
            sink_mail.send("reach the device", message, VHOST_WAIT).map_err(|_| SinkClosed)
        });
        match serve(config, sink) {
            Ok(listener) => {
                self.served().push(Served { id, spec: spec.clone(), listener });
                Ok(())
            }
            Err(error) => {
                // The socket's error is the one to tell.
                let _ = mail.ask("drop the export", wait, |answer| Message::RemoveExport {
                    export: id,
                    answer,
                });
                Err(ControlError::Socket { path: spec.socket.clone(), source: socket_error(error) })
            }
        }
    }

    pub(crate) fn thread(&self) -> std::sync::MutexGuard<'_, Option<JoinHandle<()>>> {
        self.thread.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn served(&self) -> std::sync::MutexGuard<'_, Vec<Served>> {
        self.served.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stop_served(&self, served: Served) -> Result<(), ControlError> {
        served.listener.stop();
        self.mail().ask("stop the export", STATUS_WAIT, |answer| Message::RemoveExport {
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
        self.mail().ask("report the status", wait, Message::Status)
    }

    fn metrics(&self, wait: Duration) -> Result<Vec<MetricFamily>, ControlError> {
        self.mail().ask("report the metrics", wait, Message::Metrics)
    }

    fn create_replica(
        &self,
        spec: &ReplicaSpec,
        epoch: Epoch,
        wait: Duration,
    ) -> Result<(), ControlError> {
        let spec = *spec;
        let message = |answer| Message::CreateReplica { spec, epoch, answer };
        self.mail().ask("create the replica", wait, message)?
    }

    fn delete_replica(&self, key: ReplicaKey, wait: Duration) -> Result<(), ControlError> {
        self.mail()
            .ask("delete the replica", wait, |answer| Message::DeleteReplica { key, answer })?
    }

    fn replicas(&self, wait: Duration) -> Result<Vec<ReplicaStatus>, ControlError> {
        Ok(self.status(wait)?.replicas)
    }

    fn set_servers(&self, servers: &[ServerAddress]) -> Result<(), ControlError> {
        let message = Message::SetServers(servers.to_vec());
        self.mail().send("set the servers' addresses", message, STATUS_WAIT)
    }

    fn keep_connected(&self, servers: &[ServerId]) -> Result<(), ControlError> {
        let message = Message::KeepConnected(servers.to_vec());
        self.mail().send("keep sessions with servers", message, STATUS_WAIT)
    }

    fn open_head(&self, spec: &HeadSpec, wait: Duration) -> Result<Opening, OpenError> {
        let volume = spec.volume.id;
        let spec = Box::new(spec.clone());
        let asked =
            self.mail().ask("open the head", wait, |answer| Message::OpenHead { spec, answer });
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
        self.mail().ask("close the head", wait, |answer| Message::CloseHead {
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
            let asked = self.mail().ask("change the members", STATUS_WAIT, |answer| {
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
        self.mail().ask("adopt the members", wait, |answer| Message::MembersChanged {
            volume,
            epoch,
            shard,
            answer,
        })?
    }

    fn volume_grown(
        &self,
        volume: VolumeId,
        epoch: Epoch,
        size_bytes: u64,
        wait: Duration,
    ) -> Result<(), ChangeError> {
        self.mail().ask("tell the volume's new size", wait, |answer| Message::VolumeGrown {
            volume,
            epoch,
            size_bytes,
            answer,
        })?
    }

    fn publish(&self, notice: &StateNotice) -> Result<(), ControlError> {
        self.mail().send("publish a state message", Message::Publish(*notice), STATUS_WAIT)
    }

    fn start_export(&self, spec: &ExportSpec, wait: Duration) -> Result<(), ControlError> {
        self.add_export(spec, wait, |config, sink| Listener::start(&spec.socket, config, sink))
    }

    fn stop_export(&self, socket: &Path, _drain: Duration) -> Result<(), ControlError> {
        let found = {
            let mut served = self.served();
            let index = served.iter().position(|served| served.spec.socket == socket);
            index.map(|index| served.remove(index))
        };
        found.map_or(Ok(()), |served| self.stop_served(served))
    }

    fn handing_over(&self) -> Option<&dyn HandOver> {
        Some(self)
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
        self.mail().ask("stop the data plane", left().max(STATUS_WAIT), Message::Stop)?;
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
        | ListenerError::Handover { .. }
        | ListenerError::NameTooLong { .. }
        | ListenerError::NotASocket { .. } => {
            std::io::Error::new(std::io::ErrorKind::InvalidInput, error.to_string())
        }
    }
}
