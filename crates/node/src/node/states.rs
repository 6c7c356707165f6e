//! State messages: what this server tells heads, and what it hears as a host.

use core::time::Duration;

use base::{BlockCount, DegradedReason, Epoch, Instant, Lba, ReplicaKey, ServerId, StateMessage};
use nvme::SessionId;
use nvme::state::StateEntry;
use nvme::target::{Audience as Sessions, Input as TargetInput};

use super::Node;
use crate::io::Audience;
use crate::replica_service::Origin;

/// What holds for the whole server until it is taken back; heads that come later are told.
#[derive(Debug, Default)]
pub(super) struct Standing {
    failed: bool,
    stalled: bool,
    draining: Option<(Instant, ServerId)>,
}

impl Standing {
    fn messages(&self, now: Instant) -> impl Iterator<Item = StateMessage> {
        let degraded = |is: bool, reason| is.then_some(StateMessage::Degraded { reason });
        let draining = self.draining.map(|(until, successor)| StateMessage::Draining {
            deadline_ms: millis(until.since(now)),
            successor,
        });
        [
            degraded(self.stalled, DegradedReason::LogFull),
            degraded(self.failed, DegradedReason::FailedDevice),
            draining,
        ]
        .into_iter()
        .flatten()
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

impl Node {
    /// Tells heads something about this server, or about one of its replicas: those in other
    /// processes on the connections that carry their data, those in this one directly. Draining is
    /// told to heads that come later too, until Back.
    pub fn publish(
        &mut self,
        now: Instant,
        audience: Audience,
        key: Option<ReplicaKey>,
        message: StateMessage,
    ) {
        self.now = now;
        let Some(server) = &mut self.server else { return };
        if let (Audience::Heads, None) = (audience, key) {
            match message {
                StateMessage::Draining { deadline_ms, successor } => {
                    let until = now + Duration::from_millis(deadline_ms);
                    server.standing.draining = Some((until, successor));
                }
                StateMessage::Back => {
                    server.standing.draining = None;
                    self.tell_back();
                    return;
                }
                StateMessage::Degraded { .. }
                | StateMessage::Superseded { .. }
                | StateMessage::CatchingUp { .. }
                | StateMessage::InSync
                | StateMessage::FailoverServer { .. }
                | StateMessage::FailoverUnavailable { .. }
                | StateMessage::Throttled { .. }
                | StateMessage::Resized { .. }
                | StateMessage::DamagedBlocks { .. } => {}
            }
        }
        self.tell(audience, key, message);
    }

    fn tell(&mut self, audience: Audience, key: Option<ReplicaKey>, message: StateMessage) {
        if !self.state_messages {
            return;
        }
        match audience {
            Audience::Heads => {
                let audience = Sessions::Heads;
                self.target_input(TargetInput::Publish { audience, key, message });
                let Some(own) = self.server.as_ref().map(|server| server.server) else { return };
                self.heads.tell_members(self.now, (own, true), key, message);
            }
            Audience::Owner => {
                let owner = key.zip(self.server.as_ref());
                if let Some((key, origin)) =
                    owner.and_then(|(key, server)| Some((key, server.service.owner(key)?)))
                {
                    self.tell_origin(origin, Some(key), message);
                }
            }
        }
    }

    fn tell_origin(&mut self, origin: Origin, key: Option<ReplicaKey>, message: StateMessage) {
        if !self.state_messages {
            return;
        }
        match origin {
            Origin::Local { head } => {
                let Some(own) = self.server.as_ref().map(|server| server.server) else { return };
                let input = volume::Input::State { server: own, message };
                self.heads.handle(self.now, head, input);
            }
            Origin::Remote { session } => {
                let audience = Sessions::Session(SessionId(session));
                self.target_input(TargetInput::Publish { audience, key, message });
            }
        }
    }

    /// A session's head was deposed.
    pub(super) fn tell_deposed(&mut self, origin: Origin, key: ReplicaKey, epoch: Epoch) {
        self.tell_origin(origin, Some(key), StateMessage::Superseded { epoch });
    }

    /// A head, or a host with heads, has come: tells it what holds.
    pub(super) fn tell_standing(&mut self, origin: Origin) {
        let Some(server) = &self.server else { return };
        let messages: Vec<_> = server.standing.messages(self.now).collect();
        for message in messages {
            self.tell_origin(origin, None, message);
        }
    }

    pub(super) fn pool_failed(&mut self) {
        if let Some(server) = &mut self.server {
            server.standing.failed = true;
        }
        let message = StateMessage::Degraded { reason: DegradedReason::FailedDevice };
        self.tell(Audience::Heads, None, message);
    }

    pub(super) fn pool_notice(&mut self, notice: store::Notice) {
        let (key, reason) = match notice {
            store::Notice::Stalled(_) => (None, DegradedReason::LogFull),
            store::Notice::Damaged(key) => (Some(key), DegradedReason::Damage),
            // A few blocks, which answer so when they are read: the member is no worse otherwise, and
            // the head has them written again.
            store::Notice::DamagedBlocks { key, lba, blocks } => {
                if let Some(server) = &mut self.server {
                    let round = server.store.scrubbed().rounds;
                    server.damage.found(key, lba, blocks, round);
                }
                return self.tell_damage(key);
            }
            // Whoever commands a replica here is not concerned.
            store::Notice::MetadataMended { .. } => return,
            store::Notice::Resumed => {
                if let Some(server) = &mut self.server {
                    server.standing.stalled = false;
                }
                self.tell_back();
                return;
            }
        };
        if let Some(server) = &mut self.server {
            server.standing.stalled |= key.is_none();
        }
        self.tell(Audience::Heads, key, StateMessage::Degraded { reason });
    }

    /// Tells the head that commands a replica what is damaged in it, as far as it has room for that.
    pub(super) fn tell_damage(&mut self, key: ReplicaKey) {
        while let Some(server) = &mut self.server
            && let Some(owner) = server.service.owner(key)
            && let Some((lba, blocks)) = server.damage.tell(key, server.store.scrubbed().rounds)
        {
            self.tell_origin(owner, Some(key), StateMessage::DamagedBlocks { lba, blocks });
        }
    }

    /// A record is in the log of a replica here.
    pub(super) fn blocks_written(&mut self, key: ReplicaKey, lba: Lba, blocks: BlockCount) {
        if let Some(server) = &mut self.server {
            server.damage.written(key, lba, blocks);
        }
        self.tell_damage(key);
    }

    /// Something is over: heads take everything back, so they hear again what still holds.
    fn tell_back(&mut self) {
        self.tell(Audience::Heads, None, StateMessage::Back);
        let Some(server) = &self.server else { return };
        let messages: Vec<_> = server.standing.messages(self.now).collect();
        for message in messages {
            self.tell(Audience::Heads, None, message);
        }
    }

    /// A peer says something to the heads here.
    pub(super) fn peer_said(&mut self, server: ServerId, entry: StateEntry) {
        if !self.state_messages {
            return;
        }
        let StateEntry { key, message, .. } = entry;
        if key.is_none() {
            self.peers.said(self.now, server, message);
        }
        self.heads.tell_members(self.now, (server, false), key, message);
    }
}
