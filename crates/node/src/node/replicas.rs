//! Commands for this server's replicas, and what the store has to say.

use base::{
    CommandBody, Epoch, Health, ReplicaCommand, ReplicaError, ReplicaKey, ReplyBody, StateMessage,
};
use nvme::target::Input as TargetInput;
use nvme::{SessionId, Tag};

use super::{Node, StoreCommand};
use crate::io::{Audience, Output};
use crate::replica_service::{Admitted, Origin};

impl Node {
    pub(super) fn control(&mut self, pending: StoreCommand, tag: u64, command: store::Command) {
        let Some(server) = &mut self.server else {
            let result = Err(ReplicaError::NoReplica);
            self.outputs.push_back(Output::ControlDone { tag, result });
            return;
        };
        let tag = server.commands.insert_or_grow(pending);
        server.store.handle(self.now, store::Input::Command { tag, command });
    }

    /// A command for a replica of this server, from whomever.
    pub(super) fn replica_command(&mut self, origin: Origin, tag: u64, command: ReplicaCommand) {
        let Some(server) = &mut self.server else {
            self.replica_reply(origin, tag, Err(ReplicaError::NoReplica));
            return;
        };
        let client = match origin {
            Origin::Local { .. } => Some(self.host),
            Origin::Remote { session } => server.sessions.get(&session).copied(),
        };
        let admitted = match client {
            Some(client) => server.service.admit(self.now, &command, origin, client),
            None => Err(ReplicaError::NotSealed),
        };
        match admitted {
            Ok(Admitted::Command) => {}
            Ok(Admitted::Seal { deposed }) => {
                server.fills.sealed(self.now, command.key, command.epoch);
                server.damage.nobody_knows(command.key);
                if let Some(deposed) = deposed {
                    self.tell_deposed(deposed, command.key, command.epoch);
                }
                self.tell_damage(command.key);
            }
            Err(error) => {
                self.replica_reply(origin, tag, Err(error));
                return;
            }
        }
        match self.answer_here(&command) {
            Some(result) => self.replica_reply(origin, tag, result),
            None => self.store_command(origin, tag, command),
        }
    }

    /// The answer to a command that is not for the store.
    fn answer_here(&mut self, command: &ReplicaCommand) -> Option<Result<ReplyBody, ReplicaError>> {
        match &command.body {
            CommandBody::Renew | CommandBody::Hello { .. } => Some(Ok(ReplyBody::Done)),
            CommandBody::HealthOf { server } => {
                let own = self.server.as_ref().is_some_and(|own| own.server == *server);
                let health =
                    if own { Health::Healthy } else { self.peers.health(self.now, *server) };
                Some(Ok(ReplyBody::Health(health)))
            }
            CommandBody::Install { .. } => {
                Some(self.install((command.key, command.epoch), &command.body))
            }
            CommandBody::Seal
            | CommandBody::Append { .. }
            | CommandBody::Read { .. }
            | CommandBody::Flush
            | CommandBody::Scan { .. }
            | CommandBody::ScanRun { .. }
            | CommandBody::Truncate { .. }
            | CommandBody::Grow { .. }
            | CommandBody::Trim
            | CommandBody::Release
            | CommandBody::List { .. }
            | CommandBody::Fetch { .. } => None,
        }
    }

    fn store_command(&mut self, origin: Origin, tag: u64, command: ReplicaCommand) {
        let ReplicaCommand { key, epoch, commit, body } = command;
        let server = self.server.as_ref().expect("the caller found it");
        let pending = match (&body, server.store.replica(key)) {
            (CommandBody::Grow { blocks }, Some(info)) if *blocks > info.blocks => {
                StoreCommand::Grow { key, epoch, origin, tag }
            }
            (CommandBody::Append { record, .. }, _) => {
                let (lba, blocks) = (record.header().lba, record.header().blocks);
                StoreCommand::Append { key, epoch, origin, tag, lba, blocks }
            }
            _ => StoreCommand::Replica { key, epoch, origin, tag },
        };
        let command = match body {
            CommandBody::Seal => store::Command::Seal { key, epoch },
            CommandBody::Append { record, media } => {
                store::Command::Append { key, record, commit, media }
            }
            CommandBody::Read { lba, blocks, covers, buffer } => {
                store::Command::Read { key, lba, blocks, covers, buffer }
            }
            CommandBody::Flush => store::Command::Flush { key },
            CommandBody::Scan { seq, buffer } => store::Command::Scan { key, seq, buffer },
            CommandBody::ScanRun { seq, records, buffer } => {
                store::Command::ScanRun { key, seq, records, buffer }
            }
            CommandBody::Truncate { keep } => store::Command::Truncate { key, keep },
            CommandBody::Grow { blocks } => store::Command::Grow { key, blocks },
            CommandBody::Trim | CommandBody::Release => store::Command::Commit { key, commit },
            CommandBody::List { unit, first, buffer } => {
                store::Command::List { key, unit, first, buffer }
            }
            CommandBody::Fetch { lba, end, buffer } => {
                store::Command::Fetch { key, lba, end, buffer }
            }
            CommandBody::Renew
            | CommandBody::Hello { .. }
            | CommandBody::HealthOf { .. }
            | CommandBody::Install { .. } => unreachable!("answered without the store"),
        };
        let server = self.server.as_mut().expect("the caller found it");
        let tag = server.commands.insert_or_grow(pending);
        server.store.handle(self.now, store::Input::Command { tag, command });
    }

    pub(super) fn replica_reply(
        &mut self,
        origin: Origin,
        tag: u64,
        result: Result<ReplyBody, ReplicaError>,
    ) {
        match origin {
            Origin::Local { head } => {
                let Some(server) = self.heads.get(head).and_then(|entry| entry.local) else {
                    return;
                };
                self.heads.handle(self.now, head, volume::Input::Reply { server, tag, result });
            }
            Origin::Remote { session } => {
                let input = TargetInput::ReplicaReply {
                    session: SessionId(session),
                    tag: Tag(tag),
                    result,
                };
                self.target_input(input);
            }
        }
    }

    /// Answers that have waited for a grant to run out.
    pub(super) fn drain_service(&mut self) -> bool {
        let mut progress = false;
        while let Some((origin, tag, result)) =
            self.server.as_mut().and_then(|server| server.service.poll_answer())
        {
            progress = true;
            self.replica_reply(origin, tag, result);
        }
        progress
    }

    fn store_done(&mut self, tag: u64, result: Result<ReplyBody, ReplicaError>) {
        let server = self.server.as_mut().expect("a store answers");
        let command = server.commands.remove(tag).expect("a store answers each command once");
        match command {
            StoreCommand::Replica { key, epoch, origin, tag } => {
                self.gated_reply((key, epoch), (origin, tag), result);
            }
            StoreCommand::Append { key, epoch, origin, tag, lba, blocks } => {
                // One that failed leaves in home what is there.
                if result.is_ok() && !server.damage.is_empty() {
                    self.blocks_written(key, lba, blocks);
                }
                self.gated_reply((key, epoch), (origin, tag), result);
            }
            StoreCommand::Grow { key, epoch, origin, tag } => {
                if let (Ok(_), Some(info)) = (&result, server.store.replica(key)) {
                    let size_bytes = info.blocks << info.block_size.log2();
                    let message = StateMessage::Resized { size_bytes };
                    self.publish(self.now, Audience::Heads, Some(key), message);
                }
                self.gated_reply((key, epoch), (origin, tag), result);
            }
            StoreCommand::Fill { fill, step } => self.fill_answer(fill, step, result),
            StoreCommand::Create { key, tag, epoch }
                if result.is_ok()
                    && server.store.replica(key).is_some_and(|info| info.state.sealed < epoch) =>
            {
                let command = store::Command::Seal { key, epoch };
                self.control(StoreCommand::FirstSeal { key, tag }, tag, command);
            }
            StoreCommand::Create { key, tag, .. } | StoreCommand::FirstSeal { key, tag } => {
                if result.is_ok() {
                    let sealed = server.store.replica(key).map_or(Epoch::NONE, |r| r.state.sealed);
                    server.service.add_if_new(self.now, key, sealed, None);
                }
                self.outputs.push_back(Output::ControlDone { tag, result: result.map(|_| ()) });
            }
            StoreCommand::Delete { key, tag } => {
                if result.is_ok() {
                    server.service.remove(key);
                    server.damage.forget(key);
                }
                self.outputs.push_back(Output::ControlDone { tag, result: result.map(|_| ()) });
            }
        }
    }

    /// Answers a session's command through the gate.
    fn gated_reply(
        &mut self,
        replica: (ReplicaKey, Epoch),
        from: (Origin, u64),
        result: Result<ReplyBody, ReplicaError>,
    ) {
        let server = self.server.as_mut().expect("a store answers");
        if let Some(result) = server.service.gate(self.now, replica, from, result) {
            self.replica_reply(from.0, from.1, result);
        }
    }

    pub(super) fn drain_store(&mut self) -> bool {
        let mut progress = false;
        while let Some(output) = self.server.as_mut().and_then(|s| s.store.poll_output()) {
            progress = true;
            match output {
                store::Output::Opened(result) => {
                    let server = self.server.as_mut().expect("a store speaks");
                    if result.is_ok() {
                        let legacy = server.legacy.take().unwrap_or_default();
                        let generation = server.store.generation();
                        for (key, info) in server.store.replicas() {
                            let sealed = info.state.sealed;
                            let left = legacy.left(generation, key, sealed);
                            server.service.add_if_new(self.now, key, sealed, left);
                        }
                    }
                    self.outputs.push_back(Output::PoolOpened(result));
                }
                store::Output::Disk(operation) => self.disk.push_back(operation),
                store::Output::Done { tag, result } => self.store_done(tag, result),
                store::Output::Failed(failure) => {
                    self.pool_failed();
                    self.outputs.push_back(Output::PoolFailed(failure));
                }
                store::Output::Notice(notice) => {
                    self.pool_notice(notice);
                    self.outputs.push_back(Output::PoolNotice(notice));
                }
            }
        }
        progress
    }
}
