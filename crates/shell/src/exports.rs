//! Volumes served at vhost-user sockets: the devices, and the eventfds of their rings.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

use base::{BlockReply, BlockRequest, BufferPool, Instant, Status, VolumeId};
use node::{FrontEnd, Input, Node};
use ring::{Reactor, Token, WatchHandle};
use vhost_blk::{Control, Device, DeviceConfig, Event};

use crate::control::{Event as Told, ExportSpec, ExportStatus};
use crate::message::ExportId;

/// Requests that one device may submit in one turn: guests take turns, too.
const TURN_BUDGET: usize = 64;

struct Export {
    spec: ExportSpec,
    device: Device,
    /// Watched kick eventfds, by queue.
    watches: BTreeMap<u16, WatchHandle>,
    /// There may be requests in its rings.
    pending: bool,
    /// They wait for buffers or for the head: no reason to look again before something happened.
    blocked: bool,
    /// Replies or a control message came: guests may have to be signalled.
    touched: bool,
    /// A guest has started its rings, and not stopped them since.
    live: bool,
    /// It has, and no request of it was answered yet.
    start: Option<Start>,
}

/// A guest has started its rings: how long it waits for its disk.
struct Start {
    at: Instant,
    /// A head began to open for it, and has opened; `None` if one was there.
    head: Option<Instant>,
    opened: Option<Instant>,
    /// The first request was taken out of its rings; before there is a head none is.
    asked: Option<Instant>,
    answered: Option<Instant>,
}

impl Start {
    /// Says so once the first request is answered. That is what a migration, or whatever else made
    /// the guest wait, has cost on this side.
    fn tell(&self, socket: &Path) {
        let Some(answered) = self.answered else { return };
        let micros = |moment: Option<Instant>| {
            let after = moment.map_or(Duration::ZERO, |moment| moment.since(self.at));
            u64::try_from(after.as_micros()).unwrap_or(u64::MAX)
        };
        tracing::info!(
            socket = %socket.display(),
            lease_us = micros(self.head),
            opened_us = micros(self.opened),
            asked_us = micros(self.asked),
            answered_us = micros(Some(answered)),
            "the guest's first request is answered"
        );
    }
}

/// All exports of the process.
pub(crate) struct Exports {
    exports: BTreeMap<ExportId, Export>,
    next: u64,
    /// Requests out of one device's rings on their way to the node. Empty between polls.
    taken: Vec<BlockRequest>,
    /// Volumes whose rings have all stopped in this turn.
    unused: Vec<VolumeId>,
}

/// A token of a kick eventfd: export and queue.
fn kick_token(export: ExportId, queue: u16) -> Token {
    Token(export.0 << 16 | u64::from(queue))
}

impl Exports {
    pub(crate) fn new() -> Self {
        Self {
            exports: BTreeMap::new(),
            next: 1,
            taken: Vec::with_capacity(TURN_BUDGET),
            unused: Vec::new(),
        }
    }

    /// Makes the device of a new export.
    pub(crate) fn add(
        &mut self,
        spec: ExportSpec,
        config: DeviceConfig,
        buffers: BufferPool,
    ) -> ExportId {
        let id = ExportId(self.next);
        self.next += 1;
        let device = Device::new(config, buffers);
        let export = Export {
            spec,
            device,
            watches: BTreeMap::new(),
            pending: false,
            blocked: false,
            touched: false,
            live: false,
            start: None,
        };
        self.exports.insert(id, export);
        id
    }

    /// Forgets an export. Its socket is closed, nobody will be answered any more.
    pub(crate) fn remove(&mut self, reactor: &mut Reactor, id: ExportId) {
        if let Some(export) = self.exports.remove(&id) {
            for watch in export.watches.into_values() {
                reactor.unwatch(watch);
            }
        }
    }

    pub(crate) fn has_socket(&self, path: &Path) -> bool {
        self.exports.values().any(|export| export.spec.socket == path)
    }

    pub(crate) fn status(&self) -> Vec<ExportStatus> {
        self.exports
            .values()
            .map(|export| ExportStatus {
                spec: export.spec.clone(),
                connected: export.device.is_attached(),
                in_flight: u32::try_from(export.device.busy()).unwrap_or(u32::MAX),
            })
            .collect()
    }

    /// A message of an export's control thread. Without the export it goes unanswered, which ends
    /// the connection.
    pub(crate) fn control(&mut self, id: ExportId, control: Control) {
        if let Some(export) = self.exports.get_mut(&id) {
            export.device.control(control);
            export.pending = true;
            export.touched = true;
        }
    }

    /// A kick eventfd was signalled.
    pub(crate) fn kicked(&mut self, token: Token) {
        let queue = u16::try_from(token.0 & 0xffff).expect("16 bits fit");
        if let Some(export) = self.exports.get_mut(&ExportId(token.0 >> 16)) {
            export.device.kicked(queue);
            export.pending = true;
        }
    }

    /// Takes nothing new from any guest, for good.
    pub(crate) fn hold(&mut self) {
        for export in self.exports.values_mut() {
            export.device.hold();
        }
    }

    /// True if no guest's request is under way.
    pub(crate) fn is_quiet(&self) -> bool {
        self.exports.values().all(|export| export.device.is_quiet())
    }

    /// Forgets all exports. What is under way stays in the guests' in-flight buffers.
    pub(crate) fn clear(&mut self, reactor: &mut Reactor) {
        for export in std::mem::take(&mut self.exports).into_values() {
            for watch in export.watches.into_values() {
                reactor.unwatch(watch);
            }
        }
    }

    /// The answer to a request.
    pub(crate) fn reply(&mut self, now: Instant, front_end: FrontEnd, reply: BlockReply) {
        if let Some(export) = self.exports.get_mut(&ExportId(front_end.0)) {
            if let Some(start) = &mut export.start
                && reply.status != Status::Superseded
            {
                start.answered.get_or_insert(now);
            }
            export.device.complete(reply);
            export.touched = true;
        }
        // Guests share the buffers: what this one gives back, another may be waiting for.
        for export in self.exports.values_mut() {
            export.blocked = false;
        }
    }

    /// A head of `volume` begins to open.
    pub(crate) fn volume_opens(&mut self, now: Instant, volume: VolumeId) {
        // It may be opened before its guest comes: then it rests, and is in nobody's way.
        self.note_unused();
        for export in self.exports.values_mut().filter(|export| export.spec.volume == volume) {
            if let Some(start) = &mut export.start {
                (start.head, start.opened) = (Some(now), None);
            }
        }
    }

    /// A head of `volume` serves: what an earlier one gave back is submitted again.
    pub(crate) fn volume_opened(&mut self, now: Instant, volume: VolumeId) {
        for export in self.exports.values_mut().filter(|export| export.spec.volume == volume) {
            if let Some(start) = &mut export.start {
                start.opened = Some(now);
            }
            export.device.resume();
            export.pending = true;
            export.blocked = false;
        }
    }

    /// The head of `volume` is gone: rings that are being stopped wait for it no longer.
    pub(crate) fn volume_left(&mut self, volume: VolumeId) {
        for export in self.exports.values_mut().filter(|export| export.spec.volume == volume) {
            export.pending = true;
            export.blocked = false;
        }
    }

    /// Guests of `volume` may use so many bytes from now on.
    pub(crate) fn volume_resized(&mut self, volume: VolumeId, size_bytes: u64) {
        for export in self.exports.values_mut().filter(|export| export.spec.volume == volume) {
            let blocks = size_bytes >> export.device.config().block_size.log2();
            export.device.resize(blocks);
        }
    }

    /// Takes requests out of rings and hands them to the heads. Rings that were found blocked are
    /// tried again: buffers also come free without a reply, when a slow member answers at last.
    ///
    /// The clock is read after requests were taken, not before. This process may be stopped at
    /// any point and resumed seconds later; a request that a guest made after that must not be
    /// judged by a time at which this head still had its read grants.
    pub(crate) fn poll(&mut self, node: &mut Node, reactor: &mut Reactor) {
        for (id, export) in &mut self.exports {
            if !export.pending {
                continue;
            }
            let Some(head) = node.head_of(export.spec.volume) else {
                export.blocked = true;
                export.touched |= export.device.without_head();
                continue;
            };
            let budget = TURN_BUDGET.min(node.room(head));
            let taken = &mut self.taken;
            export.pending = export.device.poll(budget, &mut |request| taken.push(request));
            export.blocked = export.pending && taken.is_empty();
            export.touched = true;
            if taken.is_empty() {
                continue;
            }
            let now = reactor.now_precise();
            if let Some(start) = &mut export.start {
                start.asked.get_or_insert(now);
            }
            for request in taken.drain(..) {
                let front_end = FrontEnd(id.0);
                node.handle(now, Input::Request { head, front_end, request });
            }
        }
    }

    /// True if some ring holds requests that were found waiting for something.
    pub(crate) fn is_blocked(&self) -> bool {
        self.exports.values().any(|export| export.pending && export.blocked)
    }

    /// True if some ring may hold requests that need not wait for anything.
    pub(crate) fn is_busy(&self) -> bool {
        self.exports.values().any(|export| export.pending && !export.blocked)
    }

    /// Does what devices ask for, and signals guests. Last in a turn.
    pub(crate) fn finish_turn(&mut self, reactor: &mut Reactor, told: &mpsc::Sender<Told>) {
        let mut stopped = false;
        for (id, export) in &mut self.exports {
            if !std::mem::take(&mut export.touched) {
                continue;
            }
            while let Some(event) = export.device.poll_event() {
                if let Some(event) = export.event(reactor, *id, event) {
                    stopped |= !export.live;
                    // Nobody listens any more only when everything ends.
                    let _ = told.send(event);
                }
            }
            export.device.flush_notifications();
            if let Some(start) = export.start.take_if(|start| start.answered.is_some()) {
                start.tell(&export.spec.socket);
            }
        }
        if stopped {
            self.note_unused();
        }
    }

    /// Finds the volumes whose guests have all stopped.
    fn note_unused(&mut self) {
        let live = |volume: VolumeId| {
            self.exports.values().any(|export| export.spec.volume == volume && export.live)
        };
        let volumes = self.exports.values().map(|export| export.spec.volume);
        self.unused = volumes.filter(|volume| !live(*volume)).collect();
    }

    /// The next volume that no guest uses since some guest has stopped.
    pub(crate) fn next_unused(&mut self) -> Option<VolumeId> {
        self.unused.pop()
    }
}

impl Export {
    /// Does what the device asks for; what the control plane wants to hear.
    fn event(&mut self, reactor: &mut Reactor, id: ExportId, event: Event) -> Option<Told> {
        let (volume, socket) = (self.spec.volume, &self.spec.socket);
        match event {
            Event::WatchKick { queue, fd } => {
                if let Some(old) = self.watches.remove(&queue) {
                    reactor.unwatch(old);
                }
                let watch =
                    fd.as_fd().try_clone_to_owned().map_err(|error| error.to_string()).and_then(
                        |fd| {
                            let token = kick_token(id, queue);
                            reactor.watch_eventfd(fd, token).map_err(|error| error.to_string())
                        },
                    );
                match watch {
                    Ok(watch) => {
                        self.watches.insert(queue, watch);
                        self.pending = true;
                    }
                    Err(error) => tracing::error!(
                        socket = %self.spec.socket.display(),
                        queue,
                        "cannot watch the queue's kick eventfd, its requests will not be seen: {error}"
                    ),
                }
            }
            Event::UnwatchKick { queue } => {
                if let Some(watch) = self.watches.remove(&queue) {
                    reactor.unwatch(watch);
                }
            }
            Event::FrontEnd { connected } => {
                return Some(Told::FrontEnd { volume, socket: socket.clone(), connected });
            }
            Event::Started => {
                tracing::info!(socket = %socket.display(), "the guest uses the disk");
                self.live = true;
                let at = reactor.now();
                self.start =
                    Some(Start { at, head: None, opened: None, asked: None, answered: None });
                return Some(Told::RingsStarted { volume, socket: socket.clone() });
            }
            Event::Stopped { by_front_end } => {
                tracing::info!(socket = %socket.display(), by_front_end, "the guest stopped the disk");
                self.live = false;
                self.start = None;
                return Some(Told::RingsStopped { volume, socket: socket.clone(), by_front_end });
            }
            Event::Superseded => tracing::info!(
                socket = %self.spec.socket.display(),
                "requests wait: this process is no longer the volume's head"
            ),
        }
        None
    }
}
