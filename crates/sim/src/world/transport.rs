//! What nodes ask of disks and sockets, and what comes of it.

use core::net::SocketAddr;

use base::Buffer;
use node::{ConnectionId, Input};
use store::{DiskId, DiskKind, DiskOperation, DiskResult};

use super::{Event, World};
use crate::faults::Trigger;
use crate::network::{End, Later};
use crate::places::Place;
use crate::process::address;

/// A connection request that nobody answers is repeated after so long.
const SYN_RETRY_NANOS: u64 = 1_000_000_000;

/// A connection request that waits for a process to be there is looked at after so long.
const ACCEPT_NANOS: u64 = 1_000_000;

impl World {
    pub(super) fn end(&self, process: usize, connection: ConnectionId) -> End {
        End { process, life: self.processes[process].life, connection }
    }

    // Disks.

    pub(super) fn disk_begin(&mut self, process: usize, operation: DiskOperation) {
        let nanos = match self.random.below(200) {
            0 if self.config.hiccups => self.random.between(1_000_000, 20_000_000),
            _ => self.random.between(15_000, 120_000),
        };
        let is_sync = matches!(operation.kind, DiskKind::Sync);
        let state = &mut self.processes[process];
        let nanos = state.disks[usize::from(operation.device.0)].delay(self.now, nanos, is_sync);
        let life = state.life;
        let tag = state.operations.insert_or_grow(operation);
        self.after(nanos, Event::Disk { process, life, tag });
    }

    pub(super) fn disk_done(&mut self, process: usize, tag: u64) {
        let state = &mut self.processes[process];
        let life = state.life;
        let operation = state.operations.remove(tag).expect("an operation ends once");
        let wrote = matches!(operation.kind, DiskKind::Write { .. });
        let disk = &mut state.disks[usize::from(operation.device.0)];
        let result = match operation.kind {
            DiskKind::Read { offset, mut buffer, start, length } => {
                let read = disk.read(offset, &mut buffer.payload_mut()[start..start + length]);
                if read.is_err() {
                    self.report.places.reach(Place::ReadErrorHit);
                }
                DiskResult::Read(read.map(|()| buffer))
            }
            DiskKind::Write { offset, parts } => {
                let mut at = offset;
                for part in parts.iter() {
                    disk.write(at, part.bytes());
                    at += part.len() as u64;
                }
                DiskResult::Written(Ok(()))
            }
            DiskKind::Sync => DiskResult::Synced(disk.sync(self.now)),
            DiskKind::Discard { .. } => DiskResult::Discarded(Ok(())),
        };
        let id: DiskId = operation.id;
        self.spring(Trigger::Operation, process);
        if wrote && operation.device.0 > 0 {
            self.spring(Trigger::HomeWrite, process);
        }
        self.input(process, life, Input::DiskDone { id, result });
        if self.faulty == Some(process) && self.config.habits.returns_to_damage {
            self.look_for_damage(process);
        }
    }

    // Connections.

    pub(super) fn dial(&mut self, process: usize, connection: ConnectionId, address: SocketAddr) {
        let life = self.processes[process].life;
        self.connecting.insert((process, life, connection));
        let delay = self.random.between(20_000, 200_000);
        self.after(delay, Event::Connect { process, life, connection, address });
    }

    /// A connection request arrives, or would.
    pub(super) fn connect(
        &mut self,
        process: usize,
        life: u64,
        connection: ConnectionId,
        to: SocketAddr,
    ) {
        if self.processes[process].life != life
            || !self.connecting.contains(&(process, life, connection))
        {
            return;
        }
        let target = (0..self.config.pools()).find(|index| address(*index) == to);
        let target = target.expect("nodes know the addresses that they were given");
        let reachable = self.processes[target].machine_up
            && self.network.is_open(self.now, process, target)
            && self.network.is_open(self.now, target, process);
        if !reachable {
            self.after(SYN_RETRY_NANOS, Event::Connect { process, life, connection, address: to });
            return;
        }
        if !self.processes[target].open && self.processes[target].listens {
            // It waits to be accepted.
            self.after(ACCEPT_NANOS, Event::Connect { process, life, connection, address: to });
            return;
        }
        if !self.processes[target].open {
            self.after(0, Event::Connected { process, life, connection, refused: true });
            return;
        }
        self.accepted += 1;
        let accepted = self.accepted;
        let there = self.end(target, ConnectionId::Accepted(accepted));
        self.network.join(self.end(process, connection), there);
        self.after(0, Event::Accepted { process: target, life: there.life, connection: accepted });
        self.after(0, Event::Connected { process, life, connection, refused: false });
    }

    pub(super) fn connected(
        &mut self,
        process: usize,
        life: u64,
        connection: ConnectionId,
        refused: bool,
    ) {
        if !self.connecting.remove(&(process, life, connection)) {
            // Given up in the meantime.
            self.network.shut(self.now, self.end(process, connection), false);
            return;
        }
        let refusal = std::io::ErrorKind::ConnectionRefused;
        let result = if refused { Err(refusal) } else { Ok(()) };
        self.input(process, life, Input::Connected { connection, result });
    }

    pub(super) fn close(&mut self, process: usize, connection: ConnectionId) {
        let life = self.processes[process].life;
        let end = self.end(process, connection);
        let connecting = self.connecting.remove(&(process, life, connection));
        // An end that is gone has its `Closed` on the way.
        if connecting || self.network.shut(self.now, end, false) {
            self.after(1_000, Event::ClosedByUs { process, life, connection });
        }
    }

    pub(super) fn send(&mut self, process: usize, connection: ConnectionId, part: Buffer) {
        let total = part.len();
        let end = self.end(process, connection);
        let bytes = self.network.send(self.now, end, part);
        if bytes < total {
            self.report.places.reach(Place::WriterBlocked);
        }
        if bytes == 0 {
            return;
        }
        let state = &mut self.processes[process];
        let before = (self.config.allocations)();
        if let Some(node) = &mut state.node {
            node.handle(state.clock.local(self.now), Input::Sent { connection, bytes });
        }
        self.note_allocations(before);
    }

    pub(super) fn network_event(&mut self, later: Later) {
        match later {
            Later::Deliver(socket) => {
                if let Some(delivery) = self.network.deliver(self.now, socket) {
                    let (end, buffer, bytes) = (delivery.end, delivery.buffer, delivery.bytes);
                    let input = Input::Received { connection: end.connection, buffer, bytes };
                    self.input(end.process, end.life, input);
                }
            }
            Later::Sent(socket, bytes) => {
                if let Some(end) = self.network.end(socket) {
                    let input = Input::Sent { connection: end.connection, bytes };
                    self.input(end.process, end.life, input);
                }
            }
            Later::Closed(socket) => {
                if let Some(end) = self.network.gone(socket) {
                    self.tell_closed(end);
                }
            }
            Later::Retransmit(socket) => {
                self.report.places.reach(Place::HalfOpen);
                let processes = &self.processes;
                let is_up = |process: usize| processes[process].machine_up;
                if let Some(end) = self.network.retransmit(self.now, socket, is_up) {
                    self.tell_closed(end);
                }
            }
        }
    }

    fn tell_closed(&mut self, end: End) {
        let End { process, life, connection } = end;
        self.after(0, Event::ClosedByUs { process, life, connection });
    }
}
