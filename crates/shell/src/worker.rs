//! The data-plane thread: one turn after the other.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::mpsc;
use std::time::Duration;

use base::{BufferPool, Instant, ReplicaError, ServerId, Slab, VolumeId};
use node::{HeadEvent, HeadHandle, Input, Node, OpenHeadError, Output};
use ring::{Completion, ListenerHandle, Reactor, Receiver, Token};
use store::{DiskError, DiskId, DiskKind, DiskResult};
use vhost_blk::DeviceConfig;

use crate::connections::Connections;
use crate::control::{
    ControlError, Event, ExportSpec, HeadSpec, OpenError, Opening, PoolConfig, ReplicaSpec,
    ServerAddress,
};
use crate::exports::Exports;
use crate::handover::HandingOver;
use crate::message::{Answer, ExportId, Message};
use crate::pool::Devices;
use crate::refusals::Refusals;

/// A replica that is being made or deleted.
pub(crate) enum Asked {
    Create(ReplicaSpec, Answer<Result<(), ControlError>>),
    Delete(Answer<Result<(), ControlError>>),
}

/// A head that is being closed.
struct Closing {
    /// When it is abandoned; `None` after that.
    deadline: Option<Instant>,
    answers: Vec<Answer<Result<(), ControlError>>>,
}

/// What the control plane wants to know of a head.
pub(crate) struct HeadState {
    pub(crate) handle: HeadHandle,
    pub(crate) spec: HeadSpec,
    pub(crate) opened: bool,
    pub(crate) superseded: Option<base::Epoch>,
    opening: Vec<Answer<Result<Opening, OpenError>>>,
    closing: Option<Closing>,
}

/// What lives on the data-plane thread.
pub(crate) struct Worker {
    pub(crate) reactor: Reactor,
    pub(crate) node: Node,
    pub(crate) exports: Exports,
    pub(crate) heads: BTreeMap<VolumeId, HeadState>,
    pub(crate) pool: Option<PoolConfig>,
    pub(crate) pool_failed: Option<String>,
    pub(crate) listen: Option<SocketAddr>,
    pub(crate) connections: Connections,
    pub(crate) refusals: Refusals,
    pub(crate) listener: Option<ListenerHandle>,
    pub(crate) devices: Option<Devices>,
    /// Who waits for the guests to be quiet.
    pub(crate) holding: Option<Answer<()>>,
    pub(crate) handing_over: Option<HandingOver>,
    asked: Slab<Asked>,
    mail: Receiver<Message>,
    pub(crate) events: mpsc::Sender<Event>,
    guest_buffers: BufferPool,
    stopping: Option<Answer<()>>,
}

/// What a [`Worker`] is made from.
pub(crate) struct Parts {
    pub(crate) reactor: Reactor,
    pub(crate) node: Node,
    pub(crate) pool: Option<PoolConfig>,
    pub(crate) devices: Option<Devices>,
    pub(crate) mail: Receiver<Message>,
    pub(crate) events: mpsc::Sender<Event>,
}

impl Worker {
    pub(crate) fn new(parts: Parts) -> Self {
        Self {
            guest_buffers: parts.reactor.buffers().clone(),
            reactor: parts.reactor,
            node: parts.node,
            exports: Exports::new(),
            heads: BTreeMap::new(),
            pool: parts.pool,
            pool_failed: None,
            listen: None,
            connections: Connections::new(),
            refusals: Refusals::default(),
            listener: None,
            devices: parts.devices,
            holding: None,
            handing_over: None,
            asked: Slab::with_capacity(64),
            mail: parts.mail,
            events: parts.events,
            stopping: None,
        }
    }

    /// Begins to connect to servers; goes on while the pool opens.
    pub(crate) fn connect(&mut self, book: &[ServerAddress], servers: &[ServerId]) {
        self.set_servers(book);
        self.node.keep_connected(self.reactor.now(), servers);
    }

    /// Drives the node until its pool is open.
    pub(crate) fn open_pool(&mut self) -> Result<(), String> {
        loop {
            while let Some(output) = self.node.poll_output() {
                if let Output::PoolOpened(result) = output {
                    return result.map_err(|error| error.to_string());
                }
                self.output(output);
            }
            self.drain_disk();
            let deadline = self.node.next_deadline();
            self.turn(deadline, false).map_err(|error| error.to_string())?;
        }
    }

    /// Runs until it is told to stop, or the ring breaks.
    pub(crate) fn run(mut self) {
        loop {
            let deadline = base::time::earliest(self.node.next_deadline(), self.closing_deadline());
            if let Err(error) = self.turn(deadline, self.exports.is_busy()) {
                tracing::error!(
                    "the data plane's io_uring failed, nothing is served any more: {error}"
                );
                break;
            }
            while let Some(message) = self.mail.receive() {
                self.message(message);
            }
            if let Some(answer) = self.stopping.take() {
                // Nobody listens if the asker has stopped waiting.
                let _ = answer.try_send(());
                break;
            }
            if let Some(handing_over) = self.handing_over.take() {
                return self.leave(handing_over);
            }
            self.abandon_overdue();
            self.exports.poll(&mut self.node, &mut self.reactor);
            self.drain_node();
            if self.exports.is_blocked() {
                // Draining may have freed what they wait for, and nothing else need happen after.
                self.exports.poll(&mut self.node, &mut self.reactor);
                self.drain_node();
            }
            self.exports.finish_turn(&mut self.reactor, &self.events);
            self.rest_unused();
            self.tell_quiet();
        }
        let _ = self.events.send(Event::Stopped);
    }

    /// One turn of the reactor; what has completed goes to the node.
    fn turn(&mut self, deadline: Option<Instant>, busy: bool) -> Result<(), ring::Error> {
        self.reactor.turn(deadline, busy)?;
        let now = self.reactor.now();
        if deadline.is_some_and(|at| at <= now) {
            self.node.handle(now, Input::Tick);
        }
        while let Some(completion) = self.reactor.next_completion() {
            if let Some(input) = self.completion(completion) {
                self.node.handle(now, input);
            }
        }
        Ok(())
    }

    fn completion(&mut self, completion: Completion) -> Option<Input> {
        let reactor = &mut self.reactor;
        let disk = |token: Token, result| Some(Input::DiskDone { id: DiskId(token.0), result });
        match completion {
            Completion::Read { token, buffer, result } => {
                disk(token, DiskResult::Read(result.map(|()| buffer).map_err(disk_error)))
            }
            Completion::Written { token, result } => {
                disk(token, DiskResult::Written(result.map_err(disk_error)))
            }
            Completion::Synced { token, result } => {
                disk(token, DiskResult::Synced(result.map_err(disk_error)))
            }
            Completion::Discarded { token, result } => {
                disk(token, DiskResult::Discarded(result.map_err(disk_error)))
            }
            Completion::Accepted { connection, from, .. } => {
                Some(self.connections.accepted(connection, from))
            }
            Completion::AcceptFailed { error, .. } => {
                tracing::warn!("cannot accept connections: {error}");
                None
            }
            Completion::Connected { token, result } => {
                self.connections.connected(reactor, token, result)
            }
            Completion::Received { connection, buffer, result } => {
                self.connections.received(connection, buffer, result)
            }
            Completion::Writable { connection } => self.connections.writable(reactor, connection),
            Completion::SendFailed { connection, .. } => {
                self.connections.send_failed(reactor, connection);
                None
            }
            Completion::Closed { connection } => self.connections.closed(connection),
            Completion::EventFd { token } => {
                self.exports.kicked(token);
                None
            }
            Completion::DeviceClosed { .. } => None,
        }
    }

    fn drain_node(&mut self) {
        while let Some(output) = self.node.poll_output() {
            self.output(output);
        }
        self.drain_disk();
    }

    fn drain_disk(&mut self) {
        while let Some(operation) = self.node.poll_disk() {
            self.disk(operation);
        }
    }

    pub(crate) fn output(&mut self, output: Output) {
        let now = self.reactor.now();
        let reactor = &mut self.reactor;
        let input = match output {
            Output::Connect { connection, address } => {
                self.connections.connect(reactor, connection, address);
                None
            }
            Output::Receive { connection, buffer, region, min_bytes } => {
                self.connections.receive(reactor, connection, buffer, &region, min_bytes);
                None
            }
            Output::Send { connection, part } => self.connections.send(reactor, connection, part),
            Output::Close { connection } => self.connections.close(reactor, connection),
            Output::Refused { from, refusal } => {
                self.refusals.note(now, from, refusal);
                None
            }
            Output::Reply { front_end, reply } => {
                self.exports.reply(now, front_end, reply);
                None
            }
            Output::ControlDone { tag, result } => {
                self.control_done(tag, result);
                None
            }
            Output::PoolOpened(_) => unreachable!("the pool was opened before anything else"),
            Output::PoolFailed(failure) => {
                self.pool_failure(failure);
                None
            }
            Output::PoolNotice(notice) => {
                pool_notice(notice);
                None
            }
            Output::Head { volume, epoch, event, .. } => {
                self.head_event(volume, epoch, event);
                None
            }
            Output::Fill { key, source, event } => {
                fill_event(key, source, event);
                None
            }
            Output::Peer { server, down } => {
                self.peer_event(server, down);
                None
            }
        };
        if let Some(input) = input {
            self.node.handle(now, input);
        }
    }

    fn peer_event(&self, server: base::ServerId, down: Option<nvme::initiator::DownReason>) {
        let event = match down {
            None => {
                tracing::info!(%server, "connected to server");
                Event::MemberUp { server }
            }
            Some(reason) => {
                tracing::debug!(%server, "no session with server: {reason}");
                Event::MemberDown { server, reason: reason.to_string() }
            }
        };
        // Nobody listens any more only when everything ends.
        let _ = self.events.send(event);
    }

    fn disk(&mut self, operation: store::DiskOperation) {
        let devices = self.devices.as_ref().expect("a store has devices");
        let device = devices.handle(operation.device);
        let token = Token(operation.id.0);
        match operation.kind {
            DiskKind::Read { offset, buffer, start, length } => {
                self.reactor.read(device, offset, buffer, start, length, token);
            }
            DiskKind::Write { offset, parts } => {
                self.reactor.write(device, offset, parts.iter().cloned(), token);
            }
            DiskKind::Sync => self.reactor.sync(device, token),
            DiskKind::Discard { offset, length } => {
                self.reactor.discard(device, offset, length, token);
            }
        }
    }

    fn pool_failure(&mut self, failure: store::DeviceFailure) {
        let path = self.devices.as_ref().map(|devices| devices.path(failure.device).to_owned());
        let path = path.unwrap_or_default();
        let reason = format!("{}: {failure}", path.display());
        tracing::error!("{reason}");
        self.pool_failed = Some(reason.clone());
        let _ = self.events.send(Event::PoolFailed { reason });
    }

    // Messages.

    fn message(&mut self, message: Message) {
        let now = self.reactor.now();
        match message {
            Message::Status(answer) => drop(answer.try_send(self.status())),
            Message::Metrics(answer) => drop(answer.try_send(self.metrics())),
            Message::CreateReplica { spec, epoch, answer } => {
                let tag = self.asked.insert_or_grow(Asked::Create(spec, answer));
                let ReplicaSpec { key, block_size, blocks } = spec;
                self.node.handle(now, Input::CreateReplica { tag, key, block_size, blocks, epoch });
            }
            Message::DeleteReplica { key, answer } => {
                let tag = self.asked.insert_or_grow(Asked::Delete(answer));
                self.node.handle(now, Input::DeleteReplica { tag, key });
            }
            Message::SetServers(servers) => self.set_servers(&servers),
            Message::KeepConnected(servers) => self.node.keep_connected(now, &servers),
            Message::OpenHead { spec, answer } => self.open_head(*spec, answer),
            Message::CloseHead { volume, drain, answer } => self.close_head(volume, drain, answer),
            Message::ChangeMembers { volume, epoch, shard, answer } => {
                drop(answer.try_send(self.change_members(volume, epoch, &shard)));
            }
            Message::MembersChanged { volume, epoch, shard, answer } => {
                drop(answer.try_send(self.members_changed(volume, epoch, &shard)));
            }
            Message::VolumeGrown { volume, epoch, size_bytes, answer } => {
                drop(answer.try_send(self.volume_grown(volume, epoch, size_bytes)));
            }
            Message::Publish(notice) => self.publish(notice),
            Message::AddExport { spec, answer } => {
                let result = self.add_export(spec);
                let added = result.as_ref().ok().map(|(export, _)| *export);
                if answer.try_send(result).is_err()
                    && let Some(export) = added
                {
                    self.exports.remove(&mut self.reactor, export);
                }
            }
            Message::RemoveExport { export, answer } => {
                self.exports.remove(&mut self.reactor, export);
                // Nobody listens if the asker has stopped waiting.
                let _ = answer.try_send(());
            }
            Message::Vhost { export, control } => self.exports.control(export, control),
            Message::Hasten(wait) => self.node.hasten_home(now, now + wait),
            Message::Hold(answer) => {
                self.exports.hold();
                self.holding = Some(answer);
            }
            Message::HandOver { within, answer } => {
                self.handing_over = Some(HandingOver { until: now + within, answer });
            }
            Message::Stop(answer) => {
                self.node.handle(now, Input::StopConnections);
                if let Some(listener) = self.listener.take() {
                    self.reactor.close_listener(listener);
                }
                self.stopping = Some(answer);
            }
        }
    }

    fn set_servers(&mut self, servers: &[ServerAddress]) {
        let servers = servers
            .iter()
            .filter_map(|server| server.addresses.first().map(|address| (server.server, *address)));
        self.node.set_servers(self.reactor.now(), servers);
    }

    fn control_done(&mut self, tag: u64, result: Result<(), ReplicaError>) {
        match self.asked.remove(tag) {
            Some(Asked::Create(spec, answer)) => {
                let result = result.map_err(|error| self.create_error(spec, error));
                drop(answer.try_send(result));
            }
            Some(Asked::Delete(answer)) => {
                let result = match result {
                    Ok(()) | Err(ReplicaError::NoReplica) if self.pool.is_some() => Ok(()),
                    Ok(()) => Ok(()),
                    Err(error) => Err(self.pool_error(error)),
                };
                drop(answer.try_send(result));
            }
            None => {}
        }
    }

    fn create_error(&self, spec: ReplicaSpec, error: ReplicaError) -> ControlError {
        let existing = self.node.store().and_then(|store| store.replica(spec.key));
        match existing {
            Some(info) if error == ReplicaError::Invalid => ControlError::ReplicaMismatch {
                key: spec.key,
                block_size: info.block_size,
                blocks: info.blocks,
            },
            _ => self.pool_error(error),
        }
    }

    fn pool_error(&self, error: ReplicaError) -> ControlError {
        if self.pool.is_none() {
            return ControlError::NoPool;
        }
        let reason = self.pool_failed.clone().unwrap_or_else(|| error.to_string());
        ControlError::PoolFailed { reason }
    }

    // Exports.

    fn add_export(&mut self, spec: ExportSpec) -> Result<(ExportId, DeviceConfig), ControlError> {
        if self.exports.has_socket(&spec.socket) {
            let source = std::io::Error::from(std::io::ErrorKind::AddrInUse);
            return Err(ControlError::Socket { path: spec.socket, source });
        }
        let serial = spec.volume.to_string().replace('-', "");
        let mut config = DeviceConfig::new(spec.blocks, spec.block_size, &serial);
        config.queues = spec.queues;
        config.read_only = spec.read_only;
        if let Err(error) = config.check() {
            let source = std::io::Error::new(std::io::ErrorKind::InvalidInput, error);
            return Err(ControlError::Socket { path: spec.socket, source });
        }
        let id = self.exports.add(spec, config.clone(), self.guest_buffers.clone());
        Ok((id, config))
    }

    // Heads.

    /// Lets the heads rest whose guests have all stopped. The next request ends that.
    fn rest_unused(&mut self) {
        let now = self.reactor.now();
        let mut rested = false;
        while let Some(volume) = self.exports.next_unused() {
            if let Some(head) = self.heads.get(&volume).filter(|head| head.closing.is_none()) {
                self.node.handle(now, Input::RestHead(head.handle));
                rested = true;
            }
        }
        if rested {
            self.drain_node();
        }
    }

    fn open_head(&mut self, spec: HeadSpec, answer: Answer<Result<Opening, OpenError>>) {
        let volume = spec.volume.id;
        if let Some(head) = self.heads.get_mut(&volume) {
            if head.spec.volume.epoch != spec.volume.epoch {
                let epoch = head.spec.volume.epoch;
                let error = ControlError::HeadExists { volume, epoch };
                drop(answer.try_send(Err(error.into())));
            } else if let Some(sealed) = head.superseded {
                drop(answer.try_send(Err(OpenError::Superseded { sealed })));
            } else if head.opened {
                drop(answer.try_send(Ok(Opening::Open)));
            } else {
                head.opening.push(answer);
            }
            return;
        }
        let now = self.reactor.now();
        match self.node.open_head(now, spec.volume.clone(), spec.shard.clone()) {
            Ok(handle) => {
                let state = HeadState {
                    handle,
                    spec,
                    opened: false,
                    superseded: None,
                    opening: vec![answer],
                    closing: None,
                };
                self.heads.insert(volume, state);
                self.exports.volume_opens(now, volume);
            }
            Err(error) => drop(answer.try_send(Err(open_error(error)))),
        }
    }

    fn close_head(
        &mut self,
        volume: VolumeId,
        drain: Duration,
        answer: Answer<Result<(), ControlError>>,
    ) {
        let now = self.reactor.now();
        let Some(head) = self.heads.get_mut(&volume) else {
            drop(answer.try_send(Err(ControlError::NoHead(volume))));
            return;
        };
        if let Some(closing) = &mut head.closing {
            closing.answers.push(answer);
            return;
        }
        head.closing = Some(Closing { deadline: Some(now + drain), answers: vec![answer] });
        let handle = head.handle;
        self.node.handle(now, Input::ReleaseHead(handle));
    }

    fn closing_deadline(&self) -> Option<Instant> {
        self.heads.values().filter_map(|head| head.closing.as_ref()?.deadline).min()
    }

    /// Ends heads whose release takes longer than they were given.
    fn abandon_overdue(&mut self) {
        let now = self.reactor.now();
        for head in self.heads.values_mut() {
            let Some(closing) = &mut head.closing else { continue };
            if closing.deadline.is_some_and(|at| at <= now) {
                closing.deadline = None;
                self.node.handle(now, Input::AbandonHead(head.handle));
            }
        }
    }

    fn head_event(&mut self, volume: VolumeId, epoch: base::Epoch, event: HeadEvent) {
        let Some(head) = self.heads.get_mut(&volume) else { return };
        match event {
            HeadEvent::Opened { position } => {
                tracing::info!(%volume, %epoch, %position, "the volume is open");
                head.opened = true;
                for answer in head.opening.drain(..) {
                    drop(answer.try_send(Ok(Opening::Open)));
                }
                // Exports may be older than this head: from before the volume grew.
                self.exports.volume_resized(volume, head.spec.volume.size_bytes);
                self.exports.volume_opened(self.reactor.now(), volume);
                let _ = self.events.send(Event::Opened { volume, epoch });
            }
            HeadEvent::Stalled { reason, .. } => {
                tracing::warn!(%volume, %epoch, "requests wait: {reason}");
            }
            HeadEvent::Resumed => tracing::info!(%volume, %epoch, "requests go on"),
            HeadEvent::Mended { server, lba, blocks } => {
                tracing::warn!(
                    %volume, %epoch, %server, lba = lba.0, blocks = blocks.0,
                    "blocks that a member could not read were written again with another's copy"
                );
                let (lba, blocks) = (lba.0, blocks.0);
                let _ = self.events.send(Event::Mended { volume, server, blocks, lba });
            }
            HeadEvent::MemberSlow { server, slow } => {
                if slow {
                    tracing::warn!(%volume, %epoch, %server, "a member is far slower than others");
                } else {
                    tracing::info!(%volume, %epoch, %server, "a member is no longer slow");
                }
                let _ = self.events.send(Event::MemberSlow { volume, server, slow });
            }
            HeadEvent::Resized { blocks } => self.volume_resized(volume, epoch, blocks),
            HeadEvent::Superseded { sealed } => {
                // Whoever opened the head says what became of the volume.
                tracing::info!(
                    %volume, %epoch, %sealed,
                    "another head has taken the volume; this one accepts and acknowledges nothing more"
                );
                head.superseded = Some(sealed);
                for answer in head.opening.drain(..) {
                    drop(answer.try_send(Err(OpenError::Superseded { sealed })));
                }
                let _ = self.events.send(Event::Superseded { volume, epoch, sealed });
            }
            HeadEvent::Released => tracing::info!(%volume, %epoch, "the volume is released"),
            HeadEvent::Failed { reason } => {
                tracing::error!(%volume, %epoch, "this head ended itself: {reason}");
                let reason = reason.to_string();
                let _ = self.events.send(Event::Unopenable { volume, epoch, reason });
            }
            HeadEvent::Ended => self.head_ended(volume),
        }
    }

    fn head_ended(&mut self, volume: VolumeId) {
        let Some(head) = self.heads.remove(&volume) else { return };
        self.exports.volume_left(volume);
        for answer in head.opening {
            drop(answer.try_send(Err(ControlError::NoHead(volume).into())));
        }
        for answer in head.closing.into_iter().flat_map(|closing| closing.answers) {
            drop(answer.try_send(Ok(())));
        }
    }
}

fn open_error(error: OpenHeadError) -> OpenError {
    match error {
        OpenHeadError::Head(error) => OpenError::Unopenable { reason: error.to_string() },
        OpenHeadError::Exists { volume, epoch } => {
            ControlError::HeadExists { volume, epoch }.into()
        }
        OpenHeadError::TooMany => {
            ControlError::Limit { what: "volumes", limit: base::limits::VOLUMES_MAX }.into()
        }
    }
}

fn fill_event(key: base::ReplicaKey, source: base::ServerId, event: node::FillEvent) {
    match event {
        node::FillEvent::Started { chunks: true } => {
            tracing::info!(replica = %key, %source, "copies what it lacks from another server");
        }
        node::FillEvent::Started { chunks: false } => {
            tracing::info!(replica = %key, %source, "copies the log's end from another server");
        }
        node::FillEvent::Done { bytes } => {
            tracing::info!(replica = %key, %source, bytes, "has caught up with the other server");
        }
        node::FillEvent::Failed { failure } => {
            tracing::warn!(replica = %key, %source, "cannot be filled from there: {failure}");
        }
    }
}

fn pool_notice(notice: store::Notice) {
    match notice {
        store::Notice::Stalled(stall) => tracing::warn!("writes to the pool wait: {stall}"),
        store::Notice::Resumed => tracing::info!("writes to the pool go on"),
        store::Notice::Damaged(key) => tracing::error!(
            replica = %key,
            "a replica has lost durable records; blocks that may be affected are refused"
        ),
        store::Notice::DamagedBlocks { key, lba, blocks } => tracing::error!(
            replica = %key,
            lba = lba.0,
            blocks = blocks.0,
            "blocks of a replica cannot be read here; the volume's head writes them again"
        ),
        store::Notice::MetadataMended { device } => tracing::warn!(
            device = device.0,
            "a copy of the pool's metadata was not whole; it is written anew from the other one: \
             look at that device's health"
        ),
    }
}

fn disk_error(error: ring::IoError) -> DiskError {
    match error {
        ring::IoError::Os(libc::ENOSPC) => DiskError::NoSpace,
        ring::IoError::Os(libc::ENODEV | libc::ENXIO) | ring::IoError::Closed => DiskError::Gone,
        ring::IoError::Os(libc::EIO) | ring::IoError::Short { .. } | ring::IoError::TimedOut => {
            DiskError::Io
        }
        ring::IoError::Os(_)
        | ring::IoError::Unsupported
        | ring::IoError::Cancelled
        | ring::IoError::Invalid(_) => DiskError::Refused,
    }
}
