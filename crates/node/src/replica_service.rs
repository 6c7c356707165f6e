//! Who may command a replica: sessions, epochs, and the one gate through which a replica's
//! answers leave.
//!
//! A replica obeys one session at a time: the one that sealed the highest epoch. Commands of any
//! other session are refused on arrival, and answers to commands that were accepted from a session
//! deposed since are replaced by [`ReplicaError::Superseded`] on departure (I2: what a deposed head
//! hears can never count). The seal itself is made durable by the store before it is answered.

use std::collections::BTreeMap;

use base::{CommandBody, Epoch, HolderId, ReplicaCommand, ReplicaError, ReplicaKey, ReplyBody};

/// Where a command came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Origin {
    /// A head in this process.
    Local {
        /// The head's handle.
        head: u64,
    },
    /// A connection of another process.
    Remote {
        /// The target machine's session.
        session: u64,
    },
}

/// Whose commands a replica obeys.
#[derive(Clone, Copy, Debug)]
struct Owner {
    epoch: Epoch,
    session: Option<(Origin, HolderId)>,
}

/// The sessions of all replicas of a server.
#[derive(Debug, Default)]
pub(crate) struct ReplicaService {
    owners: BTreeMap<ReplicaKey, Owner>,
}

impl ReplicaService {
    /// Learns of a replica, with the epoch that its store has durably sealed. One that is known
    /// keeps its session.
    pub(crate) fn add_if_new(&mut self, key: ReplicaKey, sealed: Epoch) {
        self.owners.entry(key).or_insert(Owner { epoch: sealed, session: None });
    }

    /// Forgets a deleted replica.
    pub(crate) fn remove(&mut self, key: ReplicaKey) {
        self.owners.remove(&key);
    }

    /// True if some session commands the replica.
    pub(crate) fn is_commanded(&self, key: ReplicaKey) -> bool {
        self.owners.get(&key).is_some_and(|owner| owner.session.is_some())
    }

    /// Decides on arrival whether `command` may go to the store. A Seal that passes deposes every
    /// other session at once.
    pub(crate) fn admit(
        &mut self,
        command: &ReplicaCommand,
        origin: Origin,
        client: HolderId,
    ) -> Result<(), ReplicaError> {
        let owner = self.owners.get_mut(&command.key).ok_or(ReplicaError::NoReplica)?;
        if command.epoch < owner.epoch {
            return Err(ReplicaError::Superseded { sealed: owner.epoch });
        }
        match &command.body {
            CommandBody::Seal => {
                if command.epoch == Epoch::NONE {
                    return Err(ReplicaError::Invalid);
                }
                if command.epoch == owner.epoch
                    && let Some((_, holder)) = owner.session
                    && holder != client
                {
                    return Err(ReplicaError::Superseded { sealed: owner.epoch });
                }
                *owner = Owner { epoch: command.epoch, session: Some((origin, client)) };
                return Ok(());
            }
            CommandBody::Append { record, .. } => {
                let header = record.header();
                if header.key != command.key || header.position.epoch > command.epoch {
                    return Err(ReplicaError::Invalid);
                }
            }
            CommandBody::Read { .. }
            | CommandBody::Flush
            | CommandBody::Scan { .. }
            | CommandBody::Truncate { .. }
            | CommandBody::Trim
            | CommandBody::Release
            | CommandBody::Renew
            | CommandBody::Hello { .. }
            | CommandBody::HealthOf { .. }
            | CommandBody::Install { .. }
            | CommandBody::List { .. }
            | CommandBody::Fetch { .. } => {}
        }
        if owner.epoch == command.epoch && owner.session.is_some_and(|(holder, _)| holder == origin)
        {
            Ok(())
        } else {
            Err(ReplicaError::NotSealed)
        }
    }

    /// The gate: what the session behind `origin` may hear of a command of `epoch` that the store
    /// has answered. Nothing a replica says leaves by another way.
    pub(crate) fn gate(
        &self,
        key: ReplicaKey,
        epoch: Epoch,
        origin: Origin,
        result: Result<ReplyBody, ReplicaError>,
    ) -> Result<ReplyBody, ReplicaError> {
        let Some(owner) = self.owners.get(&key) else {
            return Err(ReplicaError::NoReplica);
        };
        if owner.epoch > epoch || owner.session.is_none_or(|(holder, _)| holder != origin) {
            return Err(ReplicaError::Superseded { sealed: owner.epoch });
        }
        result
    }

    /// A session ended. Its replicas wait for the next Seal; their epochs stay sealed.
    pub(crate) fn session_ended(&mut self, origin: Origin) {
        for owner in self.owners.values_mut() {
            if owner.session.is_some_and(|(holder, _)| holder == origin) {
                owner.session = None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use base::{Seq, ShardIndex, VolumeId};

    use super::*;

    const KEY: ReplicaKey =
        ReplicaKey { volume: VolumeId::from_bytes([1; 16]), shard: ShardIndex(0) };
    const A: (Origin, HolderId) = (Origin::Remote { session: 1 }, HolderId::from_bytes([1; 16]));
    const A_AGAIN: (Origin, HolderId) =
        (Origin::Remote { session: 3 }, HolderId::from_bytes([1; 16]));
    const B: (Origin, HolderId) = (Origin::Remote { session: 2 }, HolderId::from_bytes([2; 16]));

    fn command(epoch: u64, body: CommandBody) -> ReplicaCommand {
        ReplicaCommand { key: KEY, epoch: Epoch(epoch), commit: Seq::ZERO, body }
    }

    fn admit(
        service: &mut ReplicaService,
        who: (Origin, HolderId),
        epoch: u64,
        body: CommandBody,
    ) -> Result<(), ReplicaError> {
        service.admit(&command(epoch, body), who.0, who.1)
    }

    #[test]
    fn only_the_sealing_session_commands() {
        let mut service = ReplicaService::default();
        assert_eq!(admit(&mut service, A, 1, CommandBody::Seal), Err(ReplicaError::NoReplica));
        service.add_if_new(KEY, Epoch(4));
        let superseded = |sealed| Err(ReplicaError::Superseded { sealed: Epoch(sealed) });
        assert_eq!(admit(&mut service, A, 3, CommandBody::Seal), superseded(4));
        assert_eq!(admit(&mut service, A, 5, CommandBody::Flush), Err(ReplicaError::NotSealed));
        assert_eq!(admit(&mut service, A, 5, CommandBody::Seal), Ok(()));
        assert_eq!(admit(&mut service, A, 5, CommandBody::Flush), Ok(()));
        // Another head with the same epoch is refused; the same one may come again.
        assert_eq!(admit(&mut service, B, 5, CommandBody::Seal), superseded(5));
        assert_eq!(admit(&mut service, A_AGAIN, 5, CommandBody::Seal), Ok(()));
        assert_eq!(admit(&mut service, A, 5, CommandBody::Flush), Err(ReplicaError::NotSealed));
        // A higher epoch deposes.
        assert_eq!(admit(&mut service, B, 6, CommandBody::Seal), Ok(()));
        assert_eq!(admit(&mut service, A_AGAIN, 5, CommandBody::Flush), superseded(6));
    }

    #[test]
    fn answers_to_deposed_sessions_are_withheld() {
        let mut service = ReplicaService::default();
        service.add_if_new(KEY, Epoch(0));
        admit(&mut service, A, 1, CommandBody::Seal).unwrap();
        let appended = || Ok(ReplyBody::Appended { durable: Seq(1) });
        assert!(service.gate(KEY, Epoch(1), A.0, appended()).is_ok());
        admit(&mut service, B, 2, CommandBody::Seal).unwrap();
        assert_eq!(
            service.gate(KEY, Epoch(1), A.0, appended()).unwrap_err(),
            ReplicaError::Superseded { sealed: Epoch(2) }
        );
        service.session_ended(B.0);
        assert!(!service.is_commanded(KEY));
        assert_eq!(
            admit(&mut service, A, 1, CommandBody::Seal),
            Err(ReplicaError::Superseded { sealed: Epoch(2) })
        );
    }
}
