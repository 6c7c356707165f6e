//! Fills of this server's replicas: what heads order, and what the fills want done.

use base::chunks::{ListEntry, NO_MORE};
use base::{
    CommandBody, Epoch, FillProgress, ReplicaError, ReplicaKey, ReplyBody, ServerId, StateMessage,
};

use super::{Node, StoreCommand};
use crate::fills::{FillOutput, Order, Shape, Step};
use crate::io::{Audience, Output};
use crate::peers::Outgoing;

/// Own chunks that a fill compares at a time.
const OWN_CHUNKS_PAGE: usize = 4096;

impl Node {
    /// How far the fills of this server's replicas are.
    pub fn fills(&self) -> impl Iterator<Item = (ReplicaKey, FillProgress)> {
        self.server.iter().flat_map(|server| server.fills.progress())
    }

    /// A head, which owns the replica, orders a fill or asks how far it is.
    pub(super) fn install(
        &mut self,
        (key, epoch): (ReplicaKey, Epoch),
        body: &CommandBody,
    ) -> Result<ReplyBody, ReplicaError> {
        let CommandBody::Install { source, chunks, bytes_per_second } = *body else {
            unreachable!("the caller looked")
        };
        let server = self.server.as_mut().ok_or(ReplicaError::NoReplica)?;
        let info = server.store.replica(key).ok_or(ReplicaError::NoReplica)?;
        let unit = server.store.chunk_unit(key).ok_or(ReplicaError::NoReplica)?;
        if source == server.server {
            return Err(ReplicaError::Invalid);
        }
        let (blocks, block_size, last) = (info.blocks, info.block_size, info.state.last);
        if chunks {
            server.damage.forget(key);
        }
        let shape = Shape { unit, blocks, block_size, last };
        let order = Order { epoch, source, chunks };
        let progress = server.fills.install(self.now, key, order, shape, bytes_per_second);
        Ok(ReplyBody::Filling(progress))
    }

    pub(super) fn fill_answer(
        &mut self,
        fill: u64,
        step: Step,
        result: Result<ReplyBody, ReplicaError>,
    ) {
        let server = self.server.as_mut().expect("only servers fill replicas");
        server.fills.answer(self.now, fill, step, result);
    }

    pub(super) fn fill_session(&mut self, source: ServerId, up: bool) {
        if let Some(server) = &mut self.server {
            server.fills.peer_session(self.now, source, up);
        }
    }

    pub(super) fn drain_fills(&mut self) -> bool {
        let mut progress = false;
        while let Some(output) = self.server.as_mut().and_then(|s| s.fills.poll_output()) {
            progress = true;
            match output {
                FillOutput::Retain { fill, source } => self.retain_source(fill, source),
                FillOutput::Release { source } => self.peers.release(self.now, source),
                FillOutput::Peer { fill, step, source, command } => {
                    let from = Outgoing::Fill { fill, step };
                    if !self.peers.command(self.now, source, from, command) {
                        self.fill_answer(fill, step, Err(ReplicaError::Disconnected));
                    }
                }
                FillOutput::Store { fill, step, command } => {
                    let server = self.server.as_mut().expect("a fill spoke");
                    let pending = StoreCommand::Fill { fill, step };
                    let tag = server.commands.insert_or_grow(pending);
                    server.store.handle(self.now, store::Input::Command { tag, command });
                }
                FillOutput::Own { fill, key, first } => self.own_chunks(fill, key, first),
                FillOutput::Progress { key, percent } => {
                    let message = if percent == 100 {
                        StateMessage::InSync
                    } else {
                        StateMessage::CatchingUp { percent }
                    };
                    self.publish(self.now, Audience::Owner, Some(key), message);
                }
                FillOutput::Event { key, source, event } => {
                    self.outputs.push_back(Output::Fill { key, source, event });
                }
            }
        }
        progress
    }

    fn own_chunks(&mut self, fill: u64, key: ReplicaKey, first: u32) {
        let server = self.server.as_mut().expect("a fill spoke");
        let mut entries = Vec::with_capacity(OWN_CHUNKS_PAGE);
        let mut from = first;
        while entries.len() < OWN_CHUNKS_PAGE {
            let Some((chunk, newest)) = server.store.next_chunk(key, from) else {
                from = NO_MORE;
                break;
            };
            entries.push(ListEntry { chunk, newest });
            from = chunk + 1;
        }
        server.fills.own_chunks(self.now, fill, from, entries.into_iter());
    }

    fn retain_source(&mut self, fill: u64, source: ServerId) {
        if !self.peers.is_addressable(source) {
            return;
        }
        let up = self.peers.retain(self.now, source);
        let server = self.server.as_mut().expect("a fill spoke");
        server.fills.retained(self.now, fill, source, up);
    }
}
