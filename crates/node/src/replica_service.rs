//! Who may command a replica: sessions, epochs, read grants, and the one gate through which a
//! replica's answers leave.
//!
//! A replica obeys one session at a time: the one that sealed the highest epoch. Commands of any
//! other session are refused on arrival, and answers to commands that were accepted from a session
//! deposed since are replaced by [`ReplicaError::Superseded`] on departure (I2: what a deposed head
//! hears can never count). The seal itself is made durable by the store before it is answered.
//!
//! Grants: whatever this replica admits from its owner entitles that head to serve reads for a
//! while ([`GRANT_MS`]), even if it hears nothing more. So a Seal of a higher epoch deposes at
//! once, but its *answer* waits here until the deposed head's grant has run out, unless that head
//! said Release, before or after. A replica that was found in a pool counts as granted when the pool was opened:
//! nobody remembers what was admitted before, unless the process that let go of it has said so ([`Legacy`](crate::Legacy)).
//!
//! Readers: another server fills its own replica from this one. Its session may list, fetch and
//! scan, nothing else, and only while the epoch that it named is the sealed one.

use core::time::Duration;
use std::collections::{BTreeMap, VecDeque};

use base::limits::{GRANT_MS, MEMBERS_MAX};
use base::planted::{self, Bug};
use base::{
    CommandBody, Epoch, HelloReason, HolderId, Instant, ReplicaCommand, ReplicaError, ReplicaKey,
    ReplyBody,
};

use crate::legacy::ReplicaGrant;

const GRANT: Duration = Duration::from_millis(GRANT_MS);
/// Sessions that fill from one replica, at most; one more takes the place of the oldest.
const READERS_MAX: usize = MEMBERS_MAX;

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

/// What becomes of an admitted command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Admitted {
    /// It is carried out.
    Command,
    /// A Seal, which goes to the store.
    Seal {
        /// The session that commanded until now, if its epoch was lower.
        deposed: Option<Origin>,
    },
}

/// An answer that waited here and may leave.
pub(crate) type Answer = (Origin, u64, Result<ReplyBody, ReplicaError>);

/// Whose commands a replica obeys.
#[derive(Clone, Copy, Debug)]
struct Owner {
    epoch: Epoch,
    session: Option<(Origin, HolderId)>,
    /// Until then a head of `epoch` may count on this replica.
    granted_until: Instant,
    /// Until then the head that was deposed last may.
    deposed_until: Instant,
    /// Its epoch and its session, if that was there to be deposed.
    deposed: Option<(Epoch, Origin)>,
    /// Until then heads that were deposed before it may.
    earlier_until: Instant,
}

impl Owner {
    /// Until then a Seal is not answered.
    fn waits_until(&self) -> Instant {
        if planted::is(Bug::GrantNotWaited) {
            return Instant::ZERO;
        }
        self.deposed_until.max(self.earlier_until)
    }

    /// A higher Seal has come.
    fn depose(&mut self, epoch: Epoch) {
        self.earlier_until = self.waits_until();
        self.deposed_until = self.granted_until;
        self.deposed = self.session.map(|(origin, _)| (self.epoch, origin));
        // Until it is answered it entitles to nothing.
        self.granted_until = Instant::ZERO;
        self.epoch = epoch;
    }
}

/// The answer to a Seal that waits for the grant of a deposed head.
#[derive(Debug)]
struct Held {
    origin: Origin,
    tag: u64,
    until: Instant,
    reply: ReplyBody,
}

/// The sessions of all replicas of a server.
#[derive(Debug, Default)]
pub(crate) struct ReplicaService {
    owners: BTreeMap<ReplicaKey, Owner>,
    /// At most one for each replica.
    held: BTreeMap<ReplicaKey, Held>,
    /// Sessions that fill from a replica, with the epoch that they named, oldest first.
    readers: BTreeMap<ReplicaKey, Vec<(Origin, Epoch)>>,
    answers: VecDeque<Answer>,
    waited: u64,
}

impl ReplicaService {
    /// Learns of a replica, with the epoch that its store has durably sealed, and for how long heads may
    /// still count on what was granted, if that is known. One that is known keeps its session.
    pub(crate) fn add_if_new(
        &mut self,
        now: Instant,
        key: ReplicaKey,
        sealed: Epoch,
        left: Option<Duration>,
    ) {
        let granted = sealed != Epoch::NONE && !planted::is(Bug::GrantForgottenByRestart);
        let left = left.map_or(GRANT, |left| left.min(GRANT));
        self.owners.entry(key).or_insert(Owner {
            epoch: sealed,
            session: None,
            granted_until: if granted { now + left } else { Instant::ZERO },
            deposed_until: Instant::ZERO,
            deposed: None,
            earlier_until: Instant::ZERO,
        });
    }

    /// Forgets a deleted replica.
    pub(crate) fn remove(&mut self, key: ReplicaKey) {
        self.owners.remove(&key);
        self.readers.remove(&key);
        if let Some(held) = self.held.remove(&key) {
            self.answers.push_back((held.origin, held.tag, Err(ReplicaError::NoReplica)));
        }
    }

    /// What heads may still count on.
    pub(crate) fn grants(&self, now: Instant) -> Vec<ReplicaGrant> {
        let until = |owner: &Owner| {
            if planted::is(Bug::GrantForgottenByHandOver) {
                return Instant::ZERO;
            }
            owner.granted_until.max(owner.waits_until())
        };
        let grant = |(key, owner): (&ReplicaKey, &Owner)| ReplicaGrant {
            key: *key,
            epoch: owner.epoch,
            left: until(owner).since(now),
        };
        self.owners.iter().map(grant).collect()
    }

    /// True if some session commands the replica.
    pub(crate) fn is_commanded(&self, key: ReplicaKey) -> bool {
        self.owner(key).is_some()
    }

    /// The session that commands the replica.
    pub(crate) fn owner(&self, key: ReplicaKey) -> Option<Origin> {
        self.owners.get(&key)?.session.map(|(origin, _)| origin)
    }

    /// Seals whose answers wait now, and those that ever did.
    pub(crate) fn seals_held(&self) -> (usize, u64) {
        (self.held.len(), self.waited)
    }

    /// Decides on arrival whether `command` may be carried out. A Seal that passes deposes every
    /// other session at once.
    pub(crate) fn admit(
        &mut self,
        now: Instant,
        command: &ReplicaCommand,
        origin: Origin,
        client: HolderId,
    ) -> Result<Admitted, ReplicaError> {
        let owner = self.owners.get_mut(&command.key).ok_or(ReplicaError::NoReplica)?;
        if command.epoch < owner.epoch && !planted::is(Bug::NoFencingOnArrival) {
            let sealed = owner.epoch;
            self.deposed_releases(command, origin);
            return Err(ReplicaError::Superseded { sealed });
        }
        if matches!(command.body, CommandBody::Seal) {
            return self.admit_seal(command.key, command.epoch, origin, client);
        }
        if let CommandBody::Append { record, .. } = &command.body {
            let header = record.header();
            if header.key != command.key || header.position.epoch > command.epoch {
                return Err(ReplicaError::Invalid);
            }
        }
        let owns = planted::is(Bug::NoFencingOnArrival)
            || owner.epoch == command.epoch
            && owner.session.is_some_and(|(holder, _)| holder == origin)
            // What follows a Seal must not take effect before that is answered.
            && owner.waits_until() <= now;
        if owns {
            // After Release it reads no more: a later Seal need not wait.
            let released = matches!(command.body, CommandBody::Release);
            owner.granted_until = if released { Instant::ZERO } else { now + GRANT };
        }
        if owns || self.admit_stranger(command, origin) {
            Ok(Admitted::Command)
        } else {
            Err(ReplicaError::NotSealed)
        }
    }

    fn admit_seal(
        &mut self,
        key: ReplicaKey,
        epoch: Epoch,
        origin: Origin,
        client: HolderId,
    ) -> Result<Admitted, ReplicaError> {
        let owner = self.owners.get_mut(&key).expect("the caller found it");
        if epoch == Epoch::NONE {
            return Err(ReplicaError::Invalid);
        }
        let deposed = if epoch == owner.epoch {
            if owner.session.is_some_and(|(_, holder)| holder != client) {
                return Err(ReplicaError::Superseded { sealed: owner.epoch });
            }
            None
        } else {
            owner.depose(epoch);
            self.readers.remove(&key);
            owner.deposed.map(|(_, origin)| origin)
        };
        owner.session = Some((origin, client));
        if let Some(held) = self.held.remove(&key) {
            let error = match deposed {
                Some(_) => ReplicaError::Superseded { sealed: epoch },
                None => ReplicaError::NotSealed,
            };
            self.answers.push_back((held.origin, held.tag, Err(error)));
        }
        Ok(Admitted::Seal { deposed })
    }

    /// A head that has heard that it was deposed says that it reads no more: whoever deposed it need
    /// not wait for its grant.
    fn deposed_releases(&mut self, command: &ReplicaCommand, origin: Origin) {
        let Some(owner) = self.owners.get_mut(&command.key) else { return };
        let released = matches!(command.body, CommandBody::Release);
        if released && owner.deposed == Some((command.epoch, origin)) {
            owner.deposed_until = Instant::ZERO;
            if let Some(held) = self.held.get_mut(&command.key) {
                held.until = owner.waits_until();
            }
        }
    }

    /// Whether a command is admitted that does not come from the replica's owner.
    fn admit_stranger(&mut self, command: &ReplicaCommand, origin: Origin) -> bool {
        let sealed = self.owners.get(&command.key).map_or(Epoch::NONE, |owner| owner.epoch);
        match &command.body {
            CommandBody::Hello { reason: HelloReason::Fill, .. } => {
                if command.epoch != sealed || sealed == Epoch::NONE {
                    return false;
                }
                let readers = self.readers.entry(command.key).or_default();
                readers.retain(|(reader, _)| *reader != origin);
                if readers.len() == READERS_MAX {
                    readers.remove(0);
                }
                readers.push((origin, command.epoch));
                true
            }
            CommandBody::Hello {
                reason:
                    HelloReason::Fresh | HelloReason::Told | HelloReason::IoError | HelloReason::Timeout,
                ..
            }
            | CommandBody::HealthOf { .. } => true,
            CommandBody::List { .. }
            | CommandBody::Fetch { .. }
            | CommandBody::Scan { .. }
            | CommandBody::ScanRun { .. } => self.is_reader(command.key, command.epoch, origin),
            CommandBody::Seal
            | CommandBody::Append { .. }
            | CommandBody::Read { .. }
            | CommandBody::Flush
            | CommandBody::Truncate { .. }
            | CommandBody::Grow { .. }
            | CommandBody::Trim
            | CommandBody::Release
            | CommandBody::Renew
            | CommandBody::Install { .. } => false,
        }
    }

    fn is_reader(&self, key: ReplicaKey, epoch: Epoch, origin: Origin) -> bool {
        let sealed = self.owners.get(&key).is_some_and(|owner| owner.epoch == epoch);
        let readers = self.readers.get(&key);
        sealed && readers.is_some_and(|readers| readers.contains(&(origin, epoch)))
    }

    /// The gate: what the session behind `origin` may hear of a command of `epoch` that the store
    /// has answered. Nothing a replica says leaves by another way. `None`: it leaves later, by
    /// [`ReplicaService::poll_answer`].
    pub(crate) fn gate(
        &mut self,
        now: Instant,
        (key, epoch): (ReplicaKey, Epoch),
        (origin, tag): (Origin, u64),
        result: Result<ReplyBody, ReplicaError>,
    ) -> Option<Result<ReplyBody, ReplicaError>> {
        let Some(owner) = self.owners.get_mut(&key) else {
            return Some(Err(ReplicaError::NoReplica));
        };
        let owns = owner.epoch == epoch && owner.session.is_some_and(|(o, _)| o == origin);
        let gated = !planted::is(Bug::NoGateOnDeparture) && !planted::is(Bug::NoFencingOnArrival);
        if !owns && gated {
            let sealed = owner.epoch;
            let reads = self.is_reader(key, epoch, origin);
            return Some(if reads { result } else { Err(ReplicaError::Superseded { sealed }) });
        }
        if let Ok(reply @ ReplyBody::Sealed(_)) = result {
            if owner.waits_until() <= now {
                owner.granted_until = owner.granted_until.max(now + GRANT);
                return Some(Ok(reply));
            }
            self.waited += 1;
            let held = Held { origin, tag, until: owner.waits_until(), reply };
            if let Some(older) = self.held.insert(key, held) {
                self.answers.push_back((older.origin, older.tag, Err(ReplicaError::NotSealed)));
            }
            return None;
        }
        Some(result)
    }

    /// A session ended. Its replicas wait for the next Seal; their epochs stay sealed, and what was
    /// granted stays granted.
    pub(crate) fn session_ended(&mut self, origin: Origin) {
        for owner in self.owners.values_mut() {
            if owner.session.is_some_and(|(holder, _)| holder == origin) {
                owner.session = None;
            }
        }
        self.held.retain(|_, held| held.origin != origin);
        self.answers.retain(|(to, _, _)| *to != origin);
        self.readers.retain(|_, readers| {
            readers.retain(|(reader, _)| *reader != origin);
            !readers.is_empty()
        });
    }

    /// Lets go of the Seals whose wait is over.
    pub(crate) fn tick(&mut self, now: Instant) {
        while let Some(key) = self.held.iter().find(|(_, h)| h.until <= now).map(|(key, _)| *key) {
            let held = self.held.remove(&key).expect("it was found just now");
            if let Some(owner) = self.owners.get_mut(&key) {
                owner.granted_until = owner.granted_until.max(now + GRANT);
            }
            self.answers.push_back((held.origin, held.tag, Ok(held.reply)));
        }
    }

    /// The next answer that waited and may leave.
    pub(crate) fn poll_answer(&mut self) -> Option<Answer> {
        self.answers.pop_front()
    }

    /// Asserts what must hold between any two calls.
    pub(crate) fn check(&self) {
        for (key, held) in &self.held {
            let owner = self.owners.get(key).expect("only known replicas hold a Seal");
            let waits = owner.session.is_some_and(|(origin, _)| origin == held.origin);
            assert!(waits, "a Seal is held for the owner only");
        }
        for (key, readers) in &self.readers {
            let owner = self.owners.get(key).expect("only known replicas are read");
            assert!(readers.len() <= READERS_MAX);
            assert!(readers.iter().all(|(_, epoch)| *epoch == owner.epoch), "of the sealed epoch");
        }
    }

    /// When the wait of some Seal is over.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        self.held.values().map(|held| held.until).min()
    }
}

#[cfg(test)]
mod tests {
    use base::{BufferPool, Lba, ReplicaState, Seq, ShardIndex, VolumeId};

    use super::*;

    const KEY: ReplicaKey =
        ReplicaKey { volume: VolumeId::from_bytes([1; 16]), shard: ShardIndex(0) };
    const A: (Origin, HolderId) = (Origin::Remote { session: 1 }, HolderId::from_bytes([1; 16]));
    const A_AGAIN: (Origin, HolderId) =
        (Origin::Remote { session: 3 }, HolderId::from_bytes([1; 16]));
    const B: (Origin, HolderId) = (Origin::Remote { session: 2 }, HolderId::from_bytes([2; 16]));
    const C: (Origin, HolderId) = (Origin::Local { head: 9 }, HolderId::from_bytes([3; 16]));

    fn at(ms: u64) -> Instant {
        Instant::ZERO + Duration::from_secs(1) + Duration::from_millis(ms)
    }

    fn superseded<T>(sealed: u64) -> Result<T, ReplicaError> {
        Err(ReplicaError::Superseded { sealed: Epoch(sealed) })
    }

    /// A service of one replica, with words for what happens to it.
    struct Service(ReplicaService);

    impl Service {
        fn new(now: Instant, sealed: u64) -> Self {
            let mut service = ReplicaService::default();
            service.add_if_new(now, KEY, Epoch(sealed), None);
            Self(service)
        }

        fn admit(
            &mut self,
            now: Instant,
            who: (Origin, HolderId),
            epoch: u64,
            body: CommandBody,
        ) -> Result<Admitted, ReplicaError> {
            let command = ReplicaCommand { key: KEY, epoch: Epoch(epoch), commit: Seq::ZERO, body };
            self.0.admit(now, &command, who.0, who.1)
        }

        fn seal(&mut self, now: Instant, who: (Origin, HolderId), epoch: u64) {
            self.admit(now, who, epoch, CommandBody::Seal).unwrap();
        }

        /// The store has sealed; true if the answer leaves at once.
        fn sealed(&mut self, now: Instant, who: (Origin, HolderId), epoch: u64) -> bool {
            let result = Ok(ReplyBody::Sealed(ReplicaState::default()));
            match self.0.gate(now, (KEY, Epoch(epoch)), (who.0, epoch), result) {
                Some(Ok(ReplyBody::Sealed(_))) => true,
                None => false,
                Some(other) => panic!("{other:?}"),
            }
        }

        fn flush(
            &mut self,
            now: Instant,
            who: (Origin, HolderId),
            epoch: u64,
        ) -> Result<(), ReplicaError> {
            self.admit(now, who, epoch, CommandBody::Flush).map(|_| ())
        }

        /// Answers that may leave: the epochs of their Seals, with whether they succeeded.
        fn answers(&mut self, now: Instant) -> Vec<(u64, bool)> {
            self.0.tick(now);
            std::iter::from_fn(|| self.0.poll_answer())
                .map(|(_, tag, result)| (tag, result.is_ok()))
                .collect()
        }
    }

    #[test]
    fn only_the_sealing_session_commands() {
        let mut service = Service(ReplicaService::default());
        let refused = service.admit(at(0), A, 1, CommandBody::Seal);
        assert_eq!(refused, Err(ReplicaError::NoReplica));
        let mut service = Service::new(Instant::ZERO, 4);
        assert_eq!(service.admit(at(0), A, 3, CommandBody::Seal), superseded(4));
        assert_eq!(service.flush(at(0), A, 5), Err(ReplicaError::NotSealed));
        service.seal(at(0), A, 5);
        assert_eq!(service.flush(at(0), A, 5), Ok(()));
        // Another head with the same epoch is refused; the same one may come again.
        assert_eq!(service.admit(at(0), B, 5, CommandBody::Seal), superseded(5));
        service.seal(at(0), A_AGAIN, 5);
        assert_eq!(service.flush(at(0), A, 5), Err(ReplicaError::NotSealed));
        assert_eq!(service.flush(at(0), A_AGAIN, 5), Ok(()));
        // A higher epoch deposes.
        let admitted = service.admit(at(0), B, 6, CommandBody::Seal);
        assert_eq!(admitted, Ok(Admitted::Seal { deposed: Some(A_AGAIN.0) }));
        assert_eq!(service.flush(at(0), A_AGAIN, 5), superseded(6));
    }

    #[test]
    fn answers_to_deposed_sessions_are_withheld() {
        let mut service = Service::new(at(0), 0);
        service.seal(at(0), A, 1);
        let appended = || Ok(ReplyBody::Appended { durable: Seq(1) });
        let one = (KEY, Epoch(1));
        assert!(service.0.gate(at(0), one, (A.0, 1), appended()).unwrap().is_ok());
        service.seal(at(0), B, 2);
        assert_eq!(
            service.0.gate(at(0), one, (A.0, 1), appended()).unwrap().unwrap_err(),
            ReplicaError::Superseded { sealed: Epoch(2) }
        );
        service.0.session_ended(B.0);
        assert!(!service.0.is_commanded(KEY));
        assert_eq!(service.admit(at(0), A, 1, CommandBody::Seal), superseded(2));
    }

    #[test]
    fn a_seal_is_answered_when_the_grant_of_the_deposed_head_has_run_out() {
        let mut service = Service::new(at(0), 0);
        service.seal(at(0), A, 1);
        assert!(service.sealed(at(0), A, 1), "nobody was granted anything");
        // The newest admitted command counts, and the end of the connection changes nothing.
        service.admit(at(100), A, 1, CommandBody::Renew).unwrap();
        service.0.session_ended(A.0);
        service.seal(at(150), B, 2);
        assert_eq!(service.flush(at(160), B, 2), Err(ReplicaError::NotSealed), "not before that");
        assert!(!service.sealed(at(160), B, 2));
        assert_eq!(service.0.next_deadline(), Some(at(300)));
        assert_eq!(service.answers(at(299)), []);
        assert_eq!(service.answers(at(300)), [(2, true)]);
        assert_eq!(service.0.seals_held(), (0, 1));
        assert_eq!(service.flush(at(300), B, 2), Ok(()));
        // The same head again, from another connection: it does not wait for itself.
        let b_again = (Origin::Remote { session: 7 }, B.1);
        service.seal(at(310), b_again, 2);
        assert!(service.sealed(at(310), b_again, 2));
    }

    #[test]
    fn who_released_is_not_waited_for() {
        let mut service = Service::new(at(0), 0);
        service.seal(at(0), A, 1);
        assert!(service.sealed(at(0), A, 1));
        service.flush(at(10), A, 1).unwrap();
        service.admit(at(20), A, 1, CommandBody::Release).unwrap();
        service.seal(at(30), C, 2);
        assert!(service.sealed(at(30), C, 2));
        // But what an older head holds is waited for, whoever releases after it.
        service.seal(at(40), B, 3);
        assert!(!service.sealed(at(40), B, 3));
        assert_eq!(service.answers(at(230)), [(3, true)]);
    }

    #[test]
    fn a_deposed_head_may_release_afterwards() {
        let mut service = Service::new(at(0), 0);
        service.seal(at(0), A, 1);
        assert!(service.sealed(at(0), A, 1));
        service.seal(at(50), B, 2);
        assert!(!service.sealed(at(60), B, 2));
        let release = |service: &mut Service, who, epoch| {
            let admitted = service.admit(at(70), who, epoch, CommandBody::Release);
            assert_eq!(admitted, superseded(2));
        };
        release(&mut service, C, 1);
        release(&mut service, A_AGAIN, 1);
        release(&mut service, A, 0);
        assert_eq!(service.answers(at(70)), [], "nobody else can");
        release(&mut service, A, 1);
        assert_eq!(service.answers(at(70)), [(2, true)]);
        // One that was deposed earlier is still waited for.
        let mut service = Service::new(at(0), 0);
        service.seal(at(0), A, 1);
        assert!(service.sealed(at(0), A, 1));
        service.seal(at(50), B, 2);
        service.seal(at(60), C, 3);
        assert!(!service.sealed(at(60), C, 3));
        let admitted = service.admit(at(70), B, 2, CommandBody::Release);
        assert_eq!(admitted, superseded(3));
        assert_eq!(service.answers(at(199)), []);
        assert_eq!(service.answers(at(200)), [(3, true)]);
    }

    #[test]
    fn a_still_higher_seal_takes_the_place_of_one_that_waits() {
        let mut service = Service::new(at(0), 0);
        service.seal(at(0), A, 1);
        assert!(service.sealed(at(0), A, 1));
        service.seal(at(50), B, 2);
        assert!(!service.sealed(at(60), B, 2));
        service.seal(at(70), C, 3);
        assert_eq!(service.answers(at(70)), [(2, false)]);
        assert!(!service.sealed(at(80), C, 3));
        // Epoch 2 was never entitled to anything: only epoch 1 is waited for.
        assert_eq!(service.answers(at(200)), [(3, true)]);
        // A Seal whose session ends is not answered.
        service.seal(at(210), A, 4);
        assert!(!service.sealed(at(210), A, 4));
        service.0.session_ended(A.0);
        assert_eq!(service.answers(at(1000)), []);
        assert_eq!(service.0.next_deadline(), None);
    }

    #[test]
    fn after_a_restart_every_sealed_replica_counts_as_granted() {
        let mut service = Service::new(at(0), 5);
        service.seal(at(10), A, 6);
        assert!(!service.sealed(at(20), A, 6));
        assert_eq!(service.answers(at(200)), [(6, true)]);
        let mut service = Service::new(at(0), 5);
        service.seal(at(10), A, 5);
        assert!(service.sealed(at(20), A, 5), "the head of that very epoch");
        let mut service = Service::new(at(0), 5);
        service.seal(at(10), A, 6);
        assert!(!service.sealed(at(20), A, 6));
        service.0.remove(KEY);
        assert_eq!(service.answers(at(20)), [(6, false)]);
    }

    #[test]
    fn readers_read_in_the_sealed_epoch_only() {
        let pool = BufferPool::heap(0, 4);
        let scan = || CommandBody::Scan { seq: Seq(1), buffer: pool.take(8192).unwrap() };
        let fetch = || {
            let buffer = pool.take(8192).unwrap();
            CommandBody::Fetch { lba: Lba(0), end: Lba(8), buffer }
        };
        let hello = || CommandBody::Hello { reason: HelloReason::Fill, acknowledged: Seq::ZERO };
        let mut service = Service::new(at(0), 0);
        service.seal(at(0), A, 1);
        assert!(service.sealed(at(0), A, 1));
        assert_eq!(service.admit(at(0), B, 1, scan()), Err(ReplicaError::NotSealed));
        assert_eq!(service.admit(at(0), B, 2, hello()), Err(ReplicaError::NotSealed));
        service.admit(at(0), B, 1, hello()).unwrap();
        service.admit(at(0), B, 1, scan()).unwrap();
        service.admit(at(0), B, 1, fetch()).unwrap();
        assert_eq!(service.flush(at(0), B, 1), Err(ReplicaError::NotSealed));
        let done = || Ok(ReplyBody::Done);
        let one = (KEY, Epoch(1));
        assert!(service.0.gate(at(0), one, (B.0, 1), done()).unwrap().is_ok());
        // It reads nothing that a later head knows of.
        service.seal(at(300), C, 2);
        assert_eq!(
            service.0.gate(at(300), one, (B.0, 1), done()).unwrap().unwrap_err(),
            ReplicaError::Superseded { sealed: Epoch(2) }
        );
        assert_eq!(service.admit(at(300), B, 1, scan()), superseded(2));
        assert_eq!(service.admit(at(300), B, 2, scan()), Err(ReplicaError::NotSealed));
        service.admit(at(300), B, 2, hello()).unwrap();
        service.0.session_ended(B.0);
        assert_eq!(service.admit(at(300), B, 2, scan()), Err(ReplicaError::NotSealed));
    }
}
