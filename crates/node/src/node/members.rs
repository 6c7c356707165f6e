//! Sessions with the servers of remote members.

use base::{Instant, ServerId, ShardRecord};
use nvme::initiator::Output as PeerOutput;
use volume::{Head, MembershipError};

use super::Node;
use crate::heads::HeadEntry;
use crate::io::{ConnectionId, HeadHandle, Output};
use crate::peers::Outgoing;
use crate::replica_service::Origin;

impl Node {
    /// Has a head agree to another in-sync set: see [`volume::Head::change_members`]. Then replace
    /// the record in the cluster store, and say [`Node::members_changed`] once it is certain what
    /// that came to.
    pub fn change_members(
        &mut self,
        now: Instant,
        head: HeadHandle,
        shard: &ShardRecord,
    ) -> Result<(), MembershipError> {
        self.now = now;
        let result = self.heads.with(head.0, |head: &mut Head| head.change_members(now, shard));
        result.unwrap_or(Err(MembershipError::Ending))
    }

    /// Tells a head what the cluster store's record, still of its epoch, is now. Sessions with
    /// members that came are made, those with members that went are given up. Nothing happens if the
    /// head is gone.
    pub fn members_changed(&mut self, now: Instant, head: HeadHandle, shard: &ShardRecord) {
        self.now = now;
        let tag = head.0;
        if self.heads.with(tag, |head: &mut Head| head.members_changed(now, shard)).is_none() {
            return;
        }
        let (local, remote) = self.places(shard);
        let entry = self.heads.get_mut(tag).expect("it was there just now");
        let old_local = std::mem::replace(&mut entry.local, local);
        let mut gone = Vec::new();
        entry.remote.retain(|(server, retained)| {
            let stays = remote.contains(server);
            if !stays && *retained {
                gone.push(*server);
            }
            stays
        });
        let came: Vec<ServerId> = remote
            .into_iter()
            .filter(|server| entry.remote.iter().all(|(old, _)| old != server))
            .collect();
        entry.remote.extend(came.iter().map(|server| (*server, false)));
        for server in gone {
            self.peers.release(now, server);
        }
        for server in came {
            self.retain_peer(tag, server);
        }
        if old_local.is_some() && local.is_none() {
            self.local_member_gone(tag);
        }
        if let (None, Some(server)) = (old_local, local) {
            self.heads.handle(now, tag, volume::Input::MemberUp { server });
            self.tell_standing(Origin::Local { head: tag });
        }
    }

    fn local_member_gone(&mut self, head: u64) {
        if let Some(server) = &mut self.server {
            server.service.session_ended(Origin::Local { head });
        }
    }

    /// The servers of the members that a head keeps sessions with: this one, if it is one of them,
    /// and the others. A member on this very server but in another pool is neither: that pool is
    /// gone.
    pub(super) fn places(&self, shard: &ShardRecord) -> (Option<ServerId>, Vec<ServerId>) {
        let own = self.server.as_ref().map(|server| (server.server, server.pool));
        let served = || shard.members.iter().filter(|member| member.role.is_served());
        let local = served().find(|member| own == Some((member.server, member.pool)));
        let remote = served()
            .map(|member| member.server)
            .filter(|server| own.is_none_or(|(own, _)| own != *server));
        (local.map(|member| member.server), remote.collect())
    }

    pub(super) fn retain_peer(&mut self, head: u64, server: ServerId) {
        if !self.peers.is_addressable(server) {
            return;
        }
        let up = self.peers.retain(self.now, server);
        let entry = self.heads.get_mut(head).expect("callers name live heads");
        for (member, retained) in &mut entry.remote {
            if *member == server {
                *retained = true;
            }
        }
        if up {
            self.heads.handle(self.now, head, volume::Input::MemberUp { server });
            for message in self.peers.has_said(self.now, server) {
                self.heads.handle(self.now, head, volume::Input::State { server, message });
            }
        }
    }

    pub(super) fn drain_peers(&mut self) -> bool {
        let mut progress = false;
        while let Some((peer, server, output)) = self.peers.poll_output() {
            progress = true;
            let id = |connection: nvme::ConnectionId| ConnectionId::Peer {
                peer,
                connection: connection.0,
            };
            match output {
                PeerOutput::Connect { connection, address } => {
                    let connection = id(connection);
                    self.outputs.push_back(Output::Connect { connection, address });
                }
                PeerOutput::Receive(receive) => self.outputs.push_back(Output::Receive {
                    connection: id(receive.connection),
                    buffer: receive.buffer,
                    region: receive.region,
                    min_bytes: receive.min_bytes,
                }),
                PeerOutput::Send { connection, part } => {
                    self.outputs.push_back(Output::Send { connection: id(connection), part });
                }
                PeerOutput::Close { connection } => {
                    self.outputs.push_back(Output::Close { connection: id(connection) });
                }
                PeerOutput::Reply { tag, result } => {
                    let from = self.peers.outgoing.remove(tag.0);
                    match from.expect("a peer answers each command once") {
                        Outgoing::Head { head, tag } => {
                            let input = volume::Input::Reply { server, tag, result };
                            self.heads.handle(self.now, head, input);
                        }
                        Outgoing::Fill { fill, step } => self.fill_answer(fill, step, result),
                    }
                }
                PeerOutput::Up { namespace: _ } => {
                    if self.peers.set_up(peer, true) {
                        self.heads.member_session(self.now, server, true);
                        // Its first words may have come before.
                        for message in self.peers.has_said(self.now, server) {
                            self.heads.tell_members(self.now, (server, false), None, message);
                        }
                        self.fill_session(server, true);
                        self.outputs.push_back(Output::Peer { server, down: None });
                    }
                }
                PeerOutput::Down { reason } => {
                    if self.peers.set_up(peer, false) {
                        self.heads.member_session(self.now, server, false);
                        self.fill_session(server, false);
                    }
                    self.outputs.push_back(Output::Peer { server, down: Some(reason) });
                }
                PeerOutput::State(entry) => self.peer_said(server, entry),
                // A replica subsystem has no namespace that could change.
                PeerOutput::NamespaceChanged(_) => {}
                PeerOutput::BlockReply(_) => {
                    unreachable!("no block requests are sent to replica subsystems")
                }
            }
        }
        progress
    }

    pub(super) fn release_peers(&mut self, entry: &HeadEntry) {
        for (server, _) in entry.remote.iter().filter(|(_, retained)| *retained) {
            self.peers.release(self.now, *server);
        }
    }
}
