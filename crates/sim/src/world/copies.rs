//! At the end of a run, every copy must be the same: each member that follows is made the only one, and
//! everything is read from it. What a member holds that nobody reads from, a quorum hides else.

use core::time::Duration;

use base::{Member, Role, ServerId};
use node::Node;

use super::{Event, World};
use crate::places::Place;
use crate::process::{pool_id, server_id};

/// Members that are behind may take so long to catch up; those that take longer are left out.
const PATIENCE: Duration = Duration::from_secs(2);

impl World {
    pub(super) fn read_copies(&mut self) {
        self.comparing = true;
        let until = self.now + PATIENCE;
        self.queue.push(until, Event::Wake);
        self.run_until(until + PATIENCE, "for members to catch up", |world| {
            world.now >= until || world.whole_copies(Role::CatchingUp).is_empty()
        });
        let whole = self.whole_copies(Role::InSync);
        for server in whole {
            let index = (0..self.config.pools()).find(|index| server_id(*index) == server);
            let index = index.expect("members are servers");
            // What its disks lost it knows, or another member will tell; alone it has nobody to ask.
            if self.faulty != Some(index) || !self.damaged_disks {
                self.read_copy(index);
            }
        }
    }

    /// Members in sync that hold all that is acknowledged; of another role, those that do not yet.
    fn whole_copies(&self, role: Role) -> Vec<ServerId> {
        let heads = self.processes[self.desired].node.iter().flat_map(Node::heads);
        let members = heads.flat_map(|(_, _, status, _)| status.members);
        let wanted = |member: &volume::MemberStatus| {
            // A head that waits for nothing may not have noticed yet that its member lost power.
            let whole = member.caught_up && member.lag == Some(0) && self.has(member);
            if role == Role::InSync {
                member.role == role && whole
            } else {
                member.role == Role::InSync && !whole
            }
        };
        // The head may not have been told yet who is about to go.
        let record = &self.store.records.shard;
        let stays = |server: &ServerId| record.in_sync().any(|member| member == *server);
        let servers = members.filter(wanted).map(|member| member.server);
        servers.filter(|server| role != Role::InSync || stays(server)).collect()
    }

    /// Whether a member has what its head believes.
    fn has(&self, member: &volume::MemberStatus) -> bool {
        let mut servers = (0..self.config.pools()).filter(|at| server_id(*at) == member.server);
        let store = servers.next().and_then(|at| self.processes[at].node.as_ref()?.store());
        let replica = store.and_then(|store| store.replicas().next());
        replica.is_some_and(|(_, info)| info.state.last.seq >= member.last)
    }

    /// The volume has this copy alone, and what is read is what it was.
    fn read_copy(&mut self, index: usize) {
        self.trace.say(self.now, || format!("the copy of process {index} is read alone"));
        let records = &mut self.store.records;
        records.revision += 1;
        records.volume.epoch = records.volume.epoch.next();
        records.volume.holder = None;
        records.shard.members =
            vec![Member { server: server_id(index), pool: pool_id(index), role: Role::InSync }];
        let bound = self.now + Duration::from_mins(1);
        self.attach(index);
        self.run_until(bound, "to open a copy alone", World::serving);
        self.read_everything(bound);
        self.report.places.reach(Place::CopyReadAlone);
    }
}
