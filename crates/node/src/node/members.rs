//! Sessions with the servers of remote members.

use base::ServerId;
use nvme::initiator::Output as PeerOutput;

use super::Node;
use crate::heads::HeadEntry;
use crate::io::{ConnectionId, Output};

impl Node {
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
                    let from = from.expect("a peer answers each command once");
                    let input = volume::Input::Reply { server, tag: from.tag, result };
                    self.heads.handle(self.now, from.head, input);
                }
                PeerOutput::Up { namespace: _ } => {
                    if self.peers.set_up(peer, true) {
                        self.heads.member_session(self.now, server, true);
                        self.outputs.push_back(Output::Peer { server, down: None });
                    }
                }
                PeerOutput::Down { reason } => {
                    if self.peers.set_up(peer, false) {
                        self.heads.member_session(self.now, server, false);
                    }
                    self.outputs.push_back(Output::Peer { server, down: Some(reason) });
                }
                // State messages are acted on when fencing and membership changes come.
                PeerOutput::State(_) | PeerOutput::NamespaceChanged(_) => {}
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
