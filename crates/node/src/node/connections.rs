//! Connections: what the shell says of them, and what the target machine has to say.

use nvme::Subsystem;
use nvme::target::{Input as TargetInput, Output as TargetOutput};

use super::Node;
use crate::io::{ConnectionId, Output};
use crate::replica_service::Origin;

impl Node {
    pub(super) fn target_input(&mut self, input: TargetInput) {
        let server = self.server.as_mut().expect("only a server accepts connections");
        server.target.handle(self.now, input);
    }

    pub(super) fn connected(
        &mut self,
        connection: ConnectionId,
        result: Result<(), std::io::ErrorKind>,
    ) {
        match connection {
            ConnectionId::Accepted(_) => panic!("accepted connections were not asked for"),
            ConnectionId::Peer { peer, connection } => {
                let connection = nvme::ConnectionId(connection);
                let input = nvme::initiator::Input::Connected { connection, result };
                self.peers.handle(self.now, peer, input);
            }
        }
    }

    pub(super) fn sent(&mut self, connection: ConnectionId, bytes: usize) {
        match connection {
            ConnectionId::Accepted(connection) => {
                let connection = nvme::ConnectionId(connection);
                self.target_input(TargetInput::Sent { connection, bytes });
            }
            ConnectionId::Peer { peer, connection } => {
                let connection = nvme::ConnectionId(connection);
                let input = nvme::initiator::Input::Sent { connection, bytes };
                self.peers.handle(self.now, peer, input);
            }
        }
    }

    pub(super) fn closed(&mut self, connection: ConnectionId) {
        match connection {
            ConnectionId::Accepted(connection) => {
                let connection = nvme::ConnectionId(connection);
                self.target_input(TargetInput::Closed { connection });
            }
            ConnectionId::Peer { peer, connection } => {
                let connection = nvme::ConnectionId(connection);
                let input = nvme::initiator::Input::Closed { connection };
                self.peers.handle(self.now, peer, input);
            }
        }
    }

    pub(super) fn drain_target(&mut self) -> bool {
        let mut progress = false;
        while let Some(output) = self.server.as_mut().and_then(|s| s.target.poll_output()) {
            progress = true;
            let server = self.server.as_mut().expect("a target speaks");
            match output {
                TargetOutput::Receive(receive) => self.outputs.push_back(Output::Receive {
                    connection: ConnectionId::Accepted(receive.connection.0),
                    buffer: receive.buffer,
                    region: receive.region,
                    min_bytes: receive.min_bytes,
                }),
                TargetOutput::Send { connection, part } => {
                    let connection = ConnectionId::Accepted(connection.0);
                    self.outputs.push_back(Output::Send { connection, part });
                }
                TargetOutput::Close { connection } => {
                    let connection = ConnectionId::Accepted(connection.0);
                    self.outputs.push_back(Output::Close { connection });
                }
                TargetOutput::Refused { from, refusal } => {
                    server.refused += 1;
                    self.outputs.push_back(Output::Refused { from, refusal });
                }
                TargetOutput::SessionOpened { session, subsystem, host } => match subsystem {
                    Subsystem::Replica(_) => {
                        server.sessions.insert(session.0, host);
                        self.tell_standing(Origin::Remote { session: session.0 });
                    }
                    Subsystem::Discovery | Subsystem::Volume(_) => {}
                },
                TargetOutput::SessionClosed { session } => {
                    server.sessions.remove(&session.0);
                    server.service.session_ended(Origin::Remote { session: session.0 });
                }
                TargetOutput::Replica { session, tag, command } => {
                    self.replica_command(Origin::Remote { session: session.0 }, tag.0, command);
                }
                TargetOutput::Block { session, volume, request } => {
                    self.block_from_initiator(session, volume, request);
                }
            }
        }
        progress
    }
}
