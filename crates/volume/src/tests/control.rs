//! A model control plane: changes members at random while faults happen, mends afterwards. Its
//! conditional writes and their answers are delayed and lost, and repeated until their outcome is
//! known; heads are superseded meanwhile.

use base::membership::in_sync_floor;
use base::{
    BlockReply, Epoch, Member, PoolId, Role, ServerId, ShardIndex, ShardRecord, Status, VolumeId,
};

use super::oracle::Asked;
use super::world::{Event, MS, World, index_of, server_id};
use crate::{Input, MembershipError};

/// A conditional write to the cluster store.
#[derive(Clone, Debug)]
pub(super) struct Change {
    head: usize,
    epoch: Epoch,
    /// The revision that it replaces.
    revision: u64,
    new: ShardRecord,
}

/// The record of a shard that was just made.
pub(super) fn first_record(members: usize) -> ShardRecord {
    let member = |index| member_of(index, Role::InSync);
    ShardRecord {
        volume: VolumeId::from_bytes([9; 16]),
        shard: ShardIndex(0),
        members: (0..members).map(member).collect(),
        failover: Vec::new(),
        preferred_failover: Vec::new(),
        moves: Vec::new(),
    }
}

fn member_of(index: usize, role: Role) -> Member {
    Member { server: server_id(index), pool: PoolId::from_bytes([1; 16]), role }
}

impl World {
    /// Changes something, maybe, and comes again.
    pub(super) fn plan(&mut self) {
        if !self.faults && !self.mending {
            return;
        }
        let after =
            if self.mending { 20 * MS } else { self.random.below(60 * self.settings.delay) };
        self.schedule(after, Event::Plan);
        // A deposed head's control plane may not know.
        let current = self.current();
        let head = if self.random.one_in(6) { self.random.index(current + 1) } else { current };
        let Some(running) = &self.heads[head] else { return };
        if running.ended || running.changing || running.stopped.is_some() {
            return;
        }
        let (shard, revision) = running.known.clone();
        let new = if self.mending { self.mend_step(head) } else { self.random_step(&shard) };
        let Some(new) = new else { return };
        self.change(head, revision, new);
    }

    fn change(&mut self, head: usize, revision: u64, new: ShardRecord) {
        let Some(running) = &mut self.heads[head] else { return };
        let now = running.clock.at(self.now);
        if !new.in_sync().eq(running.known.0.in_sync()) {
            let was_open = running.head.status().change_open;
            let agreed = running.head.change_members(now, &new);
            assert!(!was_open || agreed.is_err(), "one change at a time");
            self.drain(head);
            match agreed {
                Ok(()) => self.count("agreed"),
                Err(error) => return self.count(refusal(error)),
            }
        }
        let Some(running) = &mut self.heads[head] else { return };
        running.changing = true;
        let epoch = running.head.epoch();
        self.send_write(Change { head, epoch, revision, new });
    }

    /// The write may be lost or late on its way.
    fn send_write(&mut self, change: Change) {
        let lost = self.faults && self.random.one_in(5);
        let late = self.faults && self.random.one_in(5);
        if !lost {
            let after = self.delay() * if late { 40 } else { 1 };
            self.schedule(after, Event::Write(Box::new(change.clone())));
        }
        if lost || late {
            // Nothing is heard of it for a while.
            let after = 20 * self.settings.delay;
            self.schedule(after, Event::Written { change: Box::new(change), lost: true });
        }
    }

    /// The cluster store takes or refuses a write.
    pub(super) fn write_record(&mut self, change: Box<Change>) {
        if self.epoch == change.epoch && self.record.1 == change.revision {
            self.count("changed");
            let before =
                core::mem::replace(&mut self.record, (change.new.clone(), change.revision + 1));
            for member in before.0.members {
                self.schedule(1, Event::Sweep { server: index_of(member.server) });
            }
            self.check_settled();
            self.check_shown();
        } else {
            self.count("conflict");
        }
        let lost = self.faults && self.random.one_in(4);
        let after = if lost { 20 * self.settings.delay } else { self.delay() };
        self.schedule(after, Event::Written { change, lost });
    }

    /// The answer to a write is here, or is no longer waited for.
    pub(super) fn record_written(&mut self, change: Change, lost: bool) {
        let Some(running) = &self.heads[change.head] else { return };
        if running.ended || !running.changing || running.known.1 != change.revision {
            return;
        }
        if lost {
            self.count("answer lost");
            return self.send_write(change);
        }
        if self.epoch != change.epoch {
            // The head is over. Nobody may hurry to say so.
            return;
        }
        if self.record.1 == change.revision {
            return; // a late answer to nothing
        }
        let record = self.record.clone();
        let Some(running) = &mut self.heads[change.head] else { return };
        let now = running.clock.at(self.now);
        running.changing = false;
        running.known = record.clone();
        running.head.members_changed(now, &record.0);
        for (server, link) in running.links.iter_mut().enumerate() {
            let id = server_id(server);
            let serves = |member: &Member| member.server == id && member.role.is_served();
            if !record.0.members.iter().any(serves) && link.connected {
                link.connected = false;
                link.session += 1;
            }
        }
        self.drain(change.head);
        for server in 0..self.servers.len() {
            let after = self.delay();
            self.schedule(after, Event::Connect { head: change.head, server });
        }
    }

    /// A server deletes a replica that the record does not name, or makes one that it does.
    pub(super) fn sweep(&mut self, server: usize) {
        let id = server_id(server);
        let named = self.record.0.members.iter().any(|member| member.server == id);
        if !named && !self.servers[server].model.absent {
            self.count("deleted");
            let life = self.servers[server].model.life + 1;
            let absent = super::model::Model { absent: true, life, ..Default::default() };
            self.servers[server].model = absent;
            self.servers[server].waiting.clear();
        }
    }

    /// Something that an operator, or a planner with wrong ideas, might do.
    fn random_step(&mut self, shard: &ShardRecord) -> Option<ShardRecord> {
        let mut new = shard.clone();
        let floor = in_sync_floor(u8::try_from(self.settings.members).unwrap());
        let in_sync = new.in_sync().count();
        if self.random.one_in(4) && new.members.len() < self.servers.len() {
            let unused = |server: &usize| {
                let id = server_id(*server);
                self.servers[*server].model.absent && new.members.iter().all(|m| m.server != id)
            };
            let spare = (0..self.servers.len()).find(unused)?;
            let later = self.random.one_in(3);
            new.members
                .push(member_of(spare, if later { Role::Provisioning } else { Role::CatchingUp }));
            self.make_replica(spare);
            return Some(new);
        }
        let index = self.random.index(new.members.len());
        let member = &mut new.members[index];
        match member.role {
            Role::Provisioning => member.role = Role::CatchingUp,
            Role::CatchingUp if self.random.one_in(6) => drop(new.members.remove(index)),
            Role::CatchingUp => member.role = Role::InSync,
            Role::InSync if in_sync <= floor => return None,
            Role::InSync if self.random.one_in(2) => member.role = Role::CatchingUp,
            Role::InSync => drop(new.members.remove(index)),
            Role::Leaving => unreachable!("members go at once here"),
        }
        Some(new)
    }

    fn make_replica(&mut self, server: usize) {
        let model = &mut self.servers[server].model;
        assert!(model.absent);
        // A new replica is of the epoch that it is made in: no older head may have it.
        model.absent = false;
        model.sealed = self.epoch;
    }

    /// What brings the members back to as many in sync as were asked for.
    fn mend_step(&mut self, head: usize) -> Option<ShardRecord> {
        let running = self.heads[head].as_ref()?;
        let mut new = running.known.0.clone();
        let status = running.head.status();
        let of = |server: ServerId| status.members.iter().find(|m| m.server == server);
        if let Some(member) = new.members.iter_mut().find(|m| m.role == Role::Provisioning) {
            member.role = Role::CatchingUp;
            return Some(new);
        }
        let (mut leaving, mut entering) = (None, None);
        for (index, member) in new.members.iter().enumerate() {
            let Some(seen) = of(member.server) else { continue };
            let (in_sync, ready) = (member.role == Role::InSync, seen.caught_up);
            let stuck = seen.mode.needs_copy() || seen.mode == crate::MemberMode::Filling;
            if in_sync && stuck {
                leaving.get_or_insert(index);
            }
            if !in_sync && ready {
                entering.get_or_insert(index);
            }
        }
        // One may leave, one enter, or one take the other's place: whatever the head agrees to.
        match self.random.index(3) {
            0 => leaving = None,
            1 => entering = None,
            _ => {}
        }
        if let Some(index) = leaving {
            new.members[index].role = Role::CatchingUp;
        }
        if let Some(index) = entering {
            new.members[index].role = Role::InSync;
        }
        (leaving.is_some() || entering.is_some()).then_some(new)
    }

    /// A head is gone: was a change open, and did the cluster store make it?
    pub(super) fn note_interrupted(&mut self, head: usize) {
        let Some(running) = &self.heads[head] else { return };
        if running.head.status().change_open {
            let made = self.record.1 != running.known.1;
            self.count(if made { "change outlived its head" } else { "change died with its head" });
        }
    }

    /// Every member is in sync, and the current head knows.
    pub(super) fn mended(&self) -> bool {
        let all = self.record.0.members.iter().all(|member| member.role == Role::InSync);
        all && self.head().is_some_and(|running| running.known == self.record)
    }

    /// Everything acknowledged is at a write quorum of the set that the cluster store names.
    pub(super) fn check_acknowledged(&mut self, head: usize, reply: &BlockReply) {
        // A power loss takes from members what they have said they hold.
        if reply.status != Status::Ok || self.settings.power_losses {
            return;
        }
        let Some(running) = &self.heads[head] else { return };
        let Some(pending) = self.oracle.pending.get(&reply.id.0) else { return };
        if self.epoch != running.head.epoch() || matches!(pending.asked, Asked::Read) {
            return;
        }
        let commit = running.head.status().commit;
        // What a member has lost, it did hold when it said so.
        let holds = |server: ServerId| {
            let model = &self.servers[index_of(server)].model;
            model.lost || model.written >= commit
        };
        let members = self.record.0.in_sync();
        let holders = members.clone().filter(|server| holds(*server)).count();
        let needed = base::membership::write_quorum(members.count());
        assert!(holders >= needed, "{holders} of {needed} hold {commit}: {:?}", self.record);
    }

    /// Everything settled is on media at a write quorum of the set that the cluster store names now.
    fn check_settled(&self) {
        let Some((settled, _)) = self.truth.settled.last_key_value() else { return };
        let holds = |server: &ServerId| {
            let model = &self.servers[index_of(*server)].model;
            model.lost || model.durable >= *settled
        };
        let members = self.record.0.in_sync();
        let holders = members.clone().filter(holds).count();
        let needed = base::membership::write_quorum(members.count());
        assert!(holders >= needed, "{holders} of {needed} keep {settled}: {:?}", self.record);
    }

    /// So are the logs through the newest record that was acknowledged or seen; of zeroes it is only
    /// known which may have been the first.
    fn check_shown(&self) {
        if self.settings.power_losses {
            return;
        }
        let shown = self.oracle.newest_shown();
        let holds = |server: &ServerId| {
            let model = &self.servers[index_of(*server)].model;
            model.lost || model.last() >= shown
        };
        let members = self.record.0.in_sync();
        let holders = members.clone().filter(holds).count();
        let needed = base::membership::write_quorum(members.count());
        assert!(holders >= needed, "{holders} of {needed} hold {shown}: {:?}", self.record);
    }

    fn drain(&mut self, head: usize) {
        self.input(head, Input::Tick);
    }
}

fn refusal(error: MembershipError) -> &'static str {
    match error {
        MembershipError::NotOpen => "refused: not open",
        MembershipError::Ending => "refused: ending",
        MembershipError::ChangeOpen => "refused: change open",
        MembershipError::NotCaughtUp(_) => "refused: not caught up",
        MembershipError::NoQuorum { .. } => "refused: no quorum",
        MembershipError::NotSettled => "refused: not settled",
        MembershipError::Unknown(_)
        | MembershipError::WrongShard
        | MembershipError::TooMany(_)
        | MembershipError::LastCopy
        | MembershipError::TooManyMembers(_)
        | MembershipError::DuplicateServer(_) => panic!("the planner plans better: {error}"),
    }
}
