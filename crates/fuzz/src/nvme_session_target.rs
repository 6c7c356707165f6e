//! Our initiator and our target, with somebody on the wire between them who changes bytes, in both
//! directions.

use std::collections::{BTreeMap, VecDeque};

use base::{
    BufferPool, CommandBody, Epoch, HelloReason, HolderId, Instant, Lba, ReplicaCommand,
    ReplicaError, ReplicaKey, ReplicaState, ReplyBody, Seq, ServerId, ShardIndex, VolumeId,
};
use nvme::initiator::{self, Initiator, InitiatorConfig};
use nvme::target::{self, Target, TargetConfig};
use nvme::{ConnectionId, Receive, Subsystem, Tag};

use crate::bytes::Bytes;

const SERVER: ServerId = ServerId::from_bytes([0x5e; 16]);
const STEPS_MAX: usize = 400;

/// A direction of a connection: what is on its way, and the receive that waits for it.
#[derive(Default)]
struct Pipe {
    bytes: VecDeque<u8>,
    receive: Option<Receive>,
    ended: bool,
}

struct Wire {
    now: Instant,
    target: Target,
    initiator: Initiator,
    /// By the initiator's id: towards the target, towards the initiator.
    pipes: BTreeMap<u64, (Pipe, Pipe)>,
    asked: Vec<(nvme::SessionId, Tag, CommandBody)>,
    sent: u64,
    answered: u64,
}

/// No panic; every command is answered once, at the latest when the session ends.
pub fn nvme_session(data: &[u8]) {
    let mut bytes = Bytes(data);
    let mut config = TargetConfig::new(SERVER);
    config.require_header_digest = false;
    let address = "192.0.2.1:4420".parse().expect("an address");
    let subsystem = Subsystem::Replica(SERVER);
    let mut host = InitiatorConfig::new(HolderId::from_bytes([1; 16]), address, subsystem, 1);
    host.header_digest = bytes.one_in(2);
    host.data_digest = bytes.one_in(2);
    let pool = BufferPool::heap(64, 16);
    let mut wire = Wire {
        now: Instant::from_nanos(1),
        target: Target::new(config, pool.clone()),
        initiator: Initiator::new(host, pool.clone()),
        pipes: BTreeMap::new(),
        asked: Vec::new(),
        sent: 0,
        answered: 0,
    };
    wire.initiator.handle(wire.now, initiator::Input::Tick);
    let quiet = usize::from(bytes.u8());
    for step in 0..STEPS_MAX {
        wire.outputs();
        if bytes.is_empty() && step > quiet {
            break;
        }
        match bytes.below(6) {
            0 if wire.initiator.is_up() => wire.command(&mut bytes, &pool),
            1 => wire.answer(&mut bytes),
            2 if step > quiet => wire.tamper(&mut bytes),
            _ => wire.deliver(&mut bytes),
        }
    }
    wire.initiator.handle(wire.now, initiator::Input::Stop);
    wire.target.handle(wire.now, target::Input::Stop);
    wire.outputs();
    assert_eq!(wire.answered, wire.sent, "every command is answered once");
}

impl Wire {
    fn outputs(&mut self) {
        loop {
            let mut progress = false;
            while let Some(output) = self.initiator.poll_output() {
                progress = true;
                self.initiator_output(output);
            }
            while let Some(output) = self.target.poll_output() {
                progress = true;
                self.target_output(output);
            }
            if !progress {
                return;
            }
        }
    }

    fn initiator_output(&mut self, output: initiator::Output) {
        match output {
            initiator::Output::Connect { connection, .. } => {
                self.pipes.insert(connection.0, (Pipe::default(), Pipe::default()));
                self.target.handle(self.now, target::Input::Accepted { connection, from: None });
                let input = initiator::Input::Connected { connection, result: Ok(()) };
                self.initiator.handle(self.now, input);
            }
            initiator::Output::Receive(receive) => {
                if let Some((_, back)) = self.pipes.get_mut(&receive.connection.0) {
                    back.receive = Some(receive);
                }
            }
            initiator::Output::Send { connection, part } => {
                let bytes = part.len();
                if let Some((there, _)) = self.pipes.get_mut(&connection.0) {
                    there.bytes.extend(part.bytes());
                }
                drop(part);
                self.initiator.handle(self.now, initiator::Input::Sent { connection, bytes });
            }
            initiator::Output::Close { connection } => {
                if let Some((there, back)) = self.pipes.get_mut(&connection.0) {
                    there.ended = true;
                    back.receive = None;
                }
                self.initiator.handle(self.now, initiator::Input::Closed { connection });
            }
            initiator::Output::Reply { .. } => self.answered += 1,
            _ => {}
        }
    }

    fn target_output(&mut self, output: target::Output) {
        match output {
            target::Output::Receive(receive) => {
                if let Some((there, _)) = self.pipes.get_mut(&receive.connection.0) {
                    there.receive = Some(receive);
                }
            }
            target::Output::Send { connection, part } => {
                let bytes = part.len();
                if let Some((_, back)) = self.pipes.get_mut(&connection.0) {
                    back.bytes.extend(part.bytes());
                }
                drop(part);
                self.target.handle(self.now, target::Input::Sent { connection, bytes });
            }
            target::Output::Close { connection } => {
                if let Some((there, back)) = self.pipes.get_mut(&connection.0) {
                    back.ended = true;
                    there.receive = None;
                }
                self.target.handle(self.now, target::Input::Closed { connection });
            }
            target::Output::Replica { session, tag, command } => {
                self.asked.push((session, tag, command.body));
            }
            _ => {}
        }
    }

    fn command(&mut self, bytes: &mut Bytes<'_>, pool: &BufferPool) {
        let key =
            ReplicaKey { volume: VolumeId::from_bytes([bytes.below(3); 16]), shard: ShardIndex(0) };
        let buffer = |small: bool| pool.take(if small { 4096 } else { 128 << 10 });
        let body = match bytes.below(9) {
            0..3 => CommandBody::Seal,
            3 => CommandBody::Flush,
            4 => CommandBody::Truncate { keep: Seq(u64::from(bytes.u8())) },
            5 => CommandBody::Renew,
            6 => CommandBody::Hello { reason: HelloReason::Fill, acknowledged: Seq::ZERO },
            7 => match buffer(false) {
                Some(buffer) => CommandBody::Fetch { lba: Lba(1), end: Lba(9), buffer },
                None => return,
            },
            _ => match buffer(true) {
                Some(buffer) => {
                    let blocks = base::BlockCount(1);
                    CommandBody::Read { lba: Lba(1), blocks, covers: Seq::ZERO, buffer }
                }
                None => return,
            },
        };
        self.sent += 1;
        let command = ReplicaCommand { key, epoch: Epoch(1), commit: Seq::ZERO, body };
        let tag = Tag(self.sent);
        self.initiator.handle(self.now, initiator::Input::Command { tag, command });
    }

    fn answer(&mut self, bytes: &mut Bytes<'_>) {
        if self.asked.is_empty() {
            return;
        }
        let at = usize::from(bytes.u8()) % self.asked.len();
        let (session, tag, body) = self.asked.swap_remove(at);
        let result = match body {
            CommandBody::Seal => Ok(ReplyBody::Sealed(ReplicaState::default())),
            CommandBody::Flush => Ok(ReplyBody::Flushed { durable: Seq(1) }),
            CommandBody::Read { buffer, .. } => {
                Ok(ReplyBody::Data(buffer.freeze().payload(if bytes.one_in(2) {
                    512
                } else {
                    4096
                })))
            }
            CommandBody::Renew | CommandBody::Hello { .. } | CommandBody::Fetch { .. } => {
                Ok(ReplyBody::Done)
            }
            _ => Err(ReplicaError::Damaged),
        };
        self.target.handle(self.now, target::Input::ReplicaReply { session, tag, result });
    }

    /// One of the pipes that the input names, and which direction of it.
    fn pipe(&mut self, bytes: &mut Bytes<'_>) -> Option<(u64, bool)> {
        let count = u8::try_from(self.pipes.len()).ok().filter(|count| *count > 0)?;
        let id = *self.pipes.keys().nth(usize::from(bytes.below(count)))?;
        Some((id, bytes.one_in(2)))
    }

    fn tamper(&mut self, bytes: &mut Bytes<'_>) {
        let Some((id, there)) = self.pipe(bytes) else { return };
        let Some((to, from)) = self.pipes.get_mut(&id) else { return };
        let pipe = if there { to } else { from };
        let length = pipe.bytes.len();
        match bytes.below(6) {
            0 => pipe.ended = true,
            1 if length > 0 => drop(pipe.bytes.remove(usize::from(bytes.u16()) % length)),
            2 => pipe.bytes.push_back(bytes.u8()),
            _ if length > 0 => {
                let at = usize::from(bytes.u16()) % length;
                pipe.bytes[at] ^= 1 << bytes.below(8);
            }
            _ => {}
        }
    }

    fn deliver(&mut self, bytes: &mut Bytes<'_>) {
        let Some((id, there)) = self.pipe(bytes) else { return };
        let limit = 1 + usize::from(bytes.u8()) * 64;
        let Some((to, from)) = self.pipes.get_mut(&id) else { return };
        let pipe = if there { to } else { from };
        if pipe.bytes.is_empty() && !pipe.ended {
            return;
        }
        let Some(mut receive) = pipe.receive.take() else { return };
        let region = receive.region.bytes(&mut receive.buffer);
        let count = region.len().min(limit).min(pipe.bytes.len());
        for (slot, byte) in region.iter_mut().zip(pipe.bytes.drain(..count)) {
            *slot = byte;
        }
        let Receive { buffer, .. } = receive;
        let connection = ConnectionId(id);
        if there {
            let input = target::Input::Received { connection, buffer, bytes: count };
            self.target.handle(self.now, input);
        } else {
            let input = initiator::Input::Received { connection, buffer, bytes: count };
            self.initiator.handle(self.now, input);
        }
    }
}
