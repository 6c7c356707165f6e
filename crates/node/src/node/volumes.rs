//! Heads: their requests, their commands, their ends.

use base::{
    BlockReply, BlockRequest, CommandBody, ReplicaCommand, ReplicaError, RequestId, Seq, ServerId,
    Status, VolumeId,
};
use nvme::SessionId;
use nvme::target::Input as TargetInput;

use super::{Node, Request, RequestOrigin};
use crate::io::{HeadEvent, HeadHandle, Output};
use crate::metrics::OperationKind;
use crate::peers::Outgoing;
use crate::replica_service::Origin;

impl Node {
    pub(super) fn request(
        &mut self,
        head: HeadHandle,
        from: RequestOrigin,
        mut request: BlockRequest,
    ) {
        let id = request.id;
        let Some(entry) = self.heads.get(head.0).filter(|entry| !entry.ended) else {
            self.front_end_reply(from, BlockReply { id, status: Status::Superseded, data: None });
            return;
        };
        let bytes = request.blocks.bytes(entry.export.block_size);
        let kind = OperationKind::of(&request.operation);
        let pending = Request { from, id, kind, bytes, arrived: self.now };
        request.id = RequestId(self.requests.insert_or_grow(pending));
        self.heads.handle(self.now, head.0, volume::Input::Request(request));
    }

    pub(super) fn block_from_initiator(
        &mut self,
        session: SessionId,
        volume: VolumeId,
        request: BlockRequest,
    ) {
        let from = RequestOrigin::Nvme(session);
        if let Some(head) = self.heads.of_volume(volume) {
            self.request(HeadHandle(head), from, request);
        } else {
            let reply = BlockReply { id: request.id, status: Status::Superseded, data: None };
            self.front_end_reply(from, reply);
        }
    }

    pub(super) fn front_end_reply(&mut self, from: RequestOrigin, reply: BlockReply) {
        match from {
            RequestOrigin::Shell(front_end) => {
                self.outputs.push_back(Output::Reply { front_end, reply });
            }
            RequestOrigin::Nvme(session) => {
                self.target_input(TargetInput::BlockReply { session, reply });
            }
        }
    }

    /// A head's answer, under the request's own name.
    pub(super) fn head_reply(&mut self, head: u64, mut reply: BlockReply) {
        let request = self.requests.remove(reply.id.0);
        let request = request.expect("a head answers each request once");
        reply.id = request.id;
        if reply.status != Status::Superseded
            && let Some(entry) = self.heads.get_mut(head)
        {
            let latency = self.now.since(request.arrived);
            entry.counters.count(request.kind, reply.status, request.bytes, latency);
        }
        self.front_end_reply(request.from, reply);
    }

    pub(super) fn drain_heads(&mut self) -> bool {
        let mut progress = false;
        while let Some((tag, output)) = self.heads.poll_output() {
            progress = true;
            let Some(output) = output else {
                self.bury_if_done(tag);
                continue;
            };
            match output {
                volume::Output::Command { server, tag: command_tag, command } => {
                    self.head_command(tag, server, command_tag, command);
                }
                volume::Output::Reply(reply) => self.head_reply(tag, reply),
                volume::Output::Returned(request) => {
                    let (id, status) = (request.id, Status::Superseded);
                    self.head_reply(tag, BlockReply { id, status, data: None });
                }
                volume::Output::Opened { position } => {
                    self.offer_volume(tag);
                    self.head_event(tag, HeadEvent::Opened { position });
                }
                volume::Output::Superseded { sealed } => {
                    self.head_event(tag, HeadEvent::Superseded { sealed });
                    self.mark_ended(tag);
                    self.release_grants(tag);
                }
                volume::Output::Released => {
                    self.head_event(tag, HeadEvent::Released);
                    self.mark_ended(tag);
                }
                volume::Output::Abandoned => self.mark_ended(tag),
                volume::Output::Failed { reason } => {
                    self.head_event(tag, HeadEvent::Failed { reason });
                    self.mark_ended(tag);
                }
                volume::Output::Stalled { reason, since } => {
                    self.head_event(tag, HeadEvent::Stalled { reason, since });
                }
                volume::Output::Resized { blocks } => self.volume_resized(tag, blocks),
                volume::Output::Resumed => self.head_event(tag, HeadEvent::Resumed),
                volume::Output::Mended { server, lba, blocks } => {
                    self.head_event(tag, HeadEvent::Mended { server, lba, blocks });
                }
                volume::Output::MemberSlow { server, slow } => {
                    self.head_event(tag, HeadEvent::MemberSlow { server, slow });
                }
            }
        }
        progress
    }

    pub(super) fn head_command(
        &mut self,
        head: u64,
        server: ServerId,
        tag: u64,
        command: ReplicaCommand,
    ) {
        let local = self.heads.get(head).and_then(|entry| entry.local);
        if local == Some(server) {
            self.replica_command(Origin::Local { head }, tag, command);
            return;
        }
        let from = Outgoing::Head { head, tag };
        if !self.peers.command(self.now, server, from, command) {
            let result = Err(ReplicaError::Disconnected);
            self.heads.handle(self.now, head, volume::Input::Reply { server, tag, result });
        }
    }

    /// A head was deposed and has answered the last that it will: tells its members, so that the head
    /// that deposed it need not wait for its grants. Their answers are of no interest.
    fn release_grants(&mut self, head: u64) {
        let entry = self.heads.get(head).expect("the head spoke");
        let (key, epoch, local) = (entry.key, entry.epoch, entry.local);
        let remote: Vec<ServerId> = entry.remote.iter().map(|(server, _)| *server).collect();
        let release =
            || ReplicaCommand { key, epoch, commit: Seq::ZERO, body: CommandBody::Release };
        for server in remote {
            if self.peers.is_up(server) {
                let from = Outgoing::Head { head, tag: u64::MAX };
                self.peers.command(self.now, server, from, release());
            }
        }
        if local.is_some() {
            self.replica_command(Origin::Local { head }, u64::MAX, release());
        }
    }

    fn head_event(&mut self, tag: u64, event: HeadEvent) {
        let entry = self.heads.get(tag).expect("the head spoke");
        let (volume, epoch) = (entry.export.volume, entry.epoch);
        self.outputs.push_back(Output::Head { head: HeadHandle(tag), volume, epoch, event });
    }

    /// Stock initiators that connect to this server may use the volume from now on, if that is
    /// wanted.
    pub(super) fn offer_volume(&mut self, tag: u64) {
        let entry = self.heads.get_mut(tag).expect("the head spoke");
        entry.opened = true;
        let export = entry.export;
        if let Some(server) = &mut self.server
            && server.offer_volumes
        {
            server.target.handle(self.now, TargetInput::AddVolume(export));
        }
    }

    /// Front ends may use more of the volume from now on.
    fn volume_resized(&mut self, tag: u64, blocks: u64) {
        let entry = self.heads.get_mut(tag).expect("the head spoke");
        entry.export.blocks = blocks;
        if entry.opened {
            self.offer_volume(tag);
        }
        self.head_event(tag, HeadEvent::Resized { blocks });
    }

    pub(super) fn mark_ended(&mut self, tag: u64) {
        let entry = self.heads.get_mut(tag).expect("the head spoke");
        entry.ended = true;
        let (opened, volume) = (entry.opened, entry.export.volume);
        if opened && let Some(server) = &mut self.server {
            server.target.handle(self.now, TargetInput::RemoveVolume(volume));
        }
    }

    /// A head that has ended, holds no request and has said everything is gone.
    pub(super) fn bury_if_done(&mut self, tag: u64) {
        if !self.heads.get(tag).is_some_and(|entry| entry.ended && entry.head.unanswered() == 0) {
            return;
        }
        self.head_event(tag, HeadEvent::Ended);
        let entry = self.heads.remove(tag).expect("it was there just now");
        if let Some(server) = &mut self.server {
            server.service.session_ended(Origin::Local { head: tag });
        }
        self.release_peers(&entry);
    }
}
