//! The planner against a small world: servers that die, come back, are drained, lose their pools;
//! members that are made, filled and deleted by them. What a step may never do is checked at each
//! one; when the world is quiet, the volume must become well, or the plan must say why it cannot.

use std::collections::BTreeMap;

use base::membership::{in_sync_floor, seal_quorum, write_quorum};
use base::{
    BlockSize, Durability, Epoch, Member, Policy, PoolId, Role, ServerId, ShardIndex, ShardRecord,
    VolumeId, VolumeRecord,
};

use super::{Blocked, HealPolicy, MemberFacts, Plan, Stage, Step, VolumeFacts, plan, wants_repair};
use crate::placement::Picture;
use crate::records::{Draining, Problem, ServerEntry, ServerRecord, Versions, VolumeEntry};

/// How far the clock goes between two looks.
const TICK_MS: u64 = 3_000;
const SEEDS: u64 = 3_000;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    fn one_in(&mut self, of: u64) -> bool {
        self.below(of) == 0
    }
}

fn server_id(number: u8) -> ServerId {
    ServerId::from_bytes([number; 16])
}

/// What is true of a server.
#[derive(Clone, Default)]
struct Truth {
    silent_since_ms: Option<u64>,
    device_failed: bool,
    slow_since_ms: Option<u64>,
    /// Its replica holds everything.
    caught_up: bool,
    needs_fill: bool,
}

struct World {
    now_ms: u64,
    entry: VolumeEntry,
    servers: Vec<ServerEntry>,
    truth: BTreeMap<ServerId, Truth>,
    policy: HealPolicy,
}

fn entry(replicas: u8, members: &[(u8, Role)]) -> VolumeEntry {
    let volume = VolumeId::from_bytes([0x55; 16]);
    let member = |(number, role): &(u8, Role)| Member {
        server: server_id(*number),
        pool: PoolId::from_bytes([*number; 16]),
        role: *role,
    };
    VolumeEntry {
        volume: VolumeRecord {
            id: volume,
            name: "v".to_owned(),
            size_bytes: 64 << 20,
            block_size: BlockSize::B4096,
            policy: Policy {
                replicas,
                durability: Durability::Flush,
                stall_deadline_ms: None,
                read_only: false,
            },
            epoch: Epoch(3),
            holder: None,
        },
        shard: ShardRecord {
            volume,
            shard: ShardIndex(0),
            members: members.iter().map(member).collect(),
            failover: Vec::new(),
            preferred_failover: Vec::new(),
            moves: Vec::new(),
        },
        deleted: false,
        versions: Versions { volume: 1, shard: 1 },
    }
}

fn server(number: u8, labels: &[(&str, String)], now_ms: u64) -> ServerEntry {
    let label = |(name, value): &(&str, String)| ((*name).to_owned(), value.clone());
    ServerEntry {
        server: ServerRecord {
            id: server_id(number),
            name: format!("s{number}"),
            pool: PoolId::from_bytes([number; 16]),
            addresses: Vec::new(),
            labels: labels.iter().map(label).collect(),
            capacity_bytes: 1 << 40,
            free_bytes: 1 << 40,
            version: String::new(),
            stopped: false,
            problems: Vec::new(),
            draining: None,
        },
        last_seen_ms: now_ms,
        version: 1,
    }
}

impl World {
    /// So many servers that run, and a volume on the first of them, all in sync.
    fn new(servers: u8, replicas: u8) -> Self {
        let now_ms = 1_000_000_000;
        let members: Vec<_> = (1..=replicas).map(|number| (number, Role::InSync)).collect();
        let truth = |number| (server_id(number), Truth { caught_up: true, ..Truth::default() });
        Self {
            now_ms,
            entry: entry(replicas, &members),
            servers: (1..=servers).map(|number| server(number, &[], now_ms)).collect(),
            truth: (1..=servers).map(truth).collect(),
            policy: HealPolicy::default(),
        }
    }

    fn kill(&mut self, number: u8) {
        let now_ms = self.now_ms;
        let truth = self.truth.get_mut(&server_id(number)).unwrap();
        truth.silent_since_ms.get_or_insert(now_ms);
    }

    fn runs(&self, id: ServerId) -> bool {
        self.truth[&id].silent_since_ms.is_none()
    }

    fn server(&self, id: ServerId) -> &ServerEntry {
        self.servers.iter().find(|entry| entry.server.id == id).unwrap()
    }

    fn holds(&self, member: &Member) -> bool {
        let truth = &self.truth[&member.server];
        member.role.is_served()
            && truth.caught_up
            && truth.silent_since_ms.is_none()
            && !truth.device_failed
            && !truth.needs_fill
            && self.server(member.server).server.pool == member.pool
    }

    fn holders(&self, shard: &ShardRecord) -> usize {
        let in_sync = shard.members.iter().filter(|member| member.role == Role::InSync);
        in_sync.filter(|member| self.holds(member)).count()
    }

    fn facts(&self) -> VolumeFacts {
        let facts = |member: &Member| {
            let truth = &self.truth[&member.server];
            let mine = self.server(member.server).server.pool == member.pool;
            let since = |since: Option<u64>| since.map_or(0, |since| self.now_ms - since);
            MemberFacts {
                server: member.server,
                reachable: truth.silent_since_ms.is_none() && mine,
                silent_for_ms: since(truth.silent_since_ms),
                corroborated: truth.silent_since_ms.is_some(),
                draining: false,
                device_failed: truth.device_failed,
                slow_for_ms: since(truth.slow_since_ms),
                needs_fill: truth.needs_fill,
                caught_up: truth.caught_up && mine,
            }
        };
        let served = self.entry.shard.members.iter().filter(|member| member.role.is_served());
        let members = served.map(facts).collect();
        VolumeFacts { stage: Stage::Open, changing: false, members }
    }

    fn picture(&self) -> Picture {
        Picture::of(std::slice::from_ref(&self.entry), self.servers.clone())
    }

    fn plan(&self) -> Plan {
        plan(&self.entry, &self.facts(), &self.picture(), &self.policy, self.now_ms)
    }

    /// Time passes, and servers do their part.
    fn tick(&mut self) {
        self.now_ms += TICK_MS;
        for server in &mut self.servers {
            if self.truth[&server.server.id].silent_since_ms.is_none() {
                server.last_seen_ms = self.now_ms;
            }
        }
        let (servers, truth) = (&self.servers, &mut self.truth);
        self.entry.shard.members.retain_mut(|member| {
            let server = servers.iter().find(|entry| entry.server.id == member.server).unwrap();
            let truth = truth.get_mut(&member.server).unwrap();
            if truth.silent_since_ms.is_some() || server.server.pool != member.pool {
                return true;
            }
            match member.role {
                Role::Provisioning => {
                    member.role = Role::CatchingUp;
                    truth.caught_up = false;
                }
                Role::CatchingUp => (truth.caught_up, truth.needs_fill) = (true, false),
                Role::InSync => truth.caught_up = true,
                Role::Leaving => return false,
            }
            true
        });
    }

    /// Takes a step, after checking that it may be taken.
    fn take(&mut self, step: &Step) {
        let old = self.entry.shard.clone();
        let new = step.apply(&old);
        assert_ne!(old, new, "{step:?} changes nothing");
        let set = |shard: &ShardRecord| shard.in_sync().collect::<std::collections::BTreeSet<_>>();
        let (before, after) = (set(&old), set(&new));
        let (enter, leave) = (after.difference(&before), before.difference(&after));
        assert!(enter.count() <= 1 && leave.count() <= 1, "{step:?} changes several at once");
        assert_eq!(step.alters_in_sync(&old), before != after);
        if after != before {
            assert!(!after.is_empty(), "{step:?} takes the last one");
            let floor = in_sync_floor(self.entry.volume.policy.replicas);
            assert!(after.len() > before.len() || after.len() >= floor, "{step:?} below the floor");
            let hold = self.holders(&new);
            assert!(hold >= write_quorum(after.len()), "{step:?}: {hold} hold, of {after:?}");
        }
        if let Step::Promote { server } | Step::Replace { counts: server, .. } = step {
            let member = new.members.iter().find(|member| member.server == *server).unwrap();
            assert!(self.holds(member), "{step:?} of one that has not caught up");
        }
        if let Step::AddSpare { server, .. } = step {
            self.check_spare(*server);
        }
        self.entry.shard = new;
    }

    /// No other member is on its way, and no server that could have been taken has less in common with
    /// the members that stay.
    fn check_spare(&self, chosen: ServerId) {
        let members = &self.entry.shard.members;
        let fine = |member: &&Member| {
            let server = &self.server(member.server).server;
            self.runs(member.server)
                && !self.truth[&member.server].device_failed
                && server.draining.is_none()
                && server.pool == member.pool
        };
        let coming = members.iter().filter(fine).filter(|member| match member.role {
            Role::Provisioning | Role::CatchingUp => true,
            Role::InSync | Role::Leaving => false,
        });
        assert_eq!(coming.count(), 0, "another one is on its way");
        let since = |since: Option<u64>| since.map_or(0, |since| self.now_ms - since);
        let stays = |member: &&Member| {
            let (truth, server) = (&self.truth[&member.server], self.server(member.server));
            member.role == Role::InSync
                && since(truth.silent_since_ms) < self.policy.silence_ms
                && since(truth.slow_since_ms) < self.policy.slow_ms
                && !truth.device_failed
                && !truth.needs_fill
                && server.server.draining.is_none()
                && server.server.pool == member.pool
        };
        let staying: Vec<_> =
            members.iter().filter(stays).map(|member| &self.server(member.server).server).collect();
        let cost = |id: ServerId| {
            let own = &self.server(id).server;
            let same = |name: &str, other: &ServerRecord| {
                own.labels.contains_key(name) && own.labels.get(name) == other.labels.get(name)
            };
            let zones = staying.iter().filter(|other| same("zone", other)).count();
            let zone = |record: &ServerRecord| record.labels.get("zone").cloned();
            let racks =
                staying.iter().filter(|other| zone(own) == zone(other) && same("rack", other));
            (racks.count(), zones)
        };
        for other in &self.servers {
            let id = other.server.id;
            let is_member = members.iter().any(|member| member.server == id);
            let able = other.is_alive(self.now_ms) && other.server.draining.is_none();
            if able && !is_member {
                assert!(cost(chosen) <= cost(id), "{id} shares less than {chosen}");
            }
        }
    }

    /// Lets time pass and takes the steps that come, until nothing is left to do.
    fn settle(&mut self) -> Plan {
        let mut quiet = 0;
        for _ in 0..2_000 {
            let planned = self.plan();
            if let Some(step) = &planned.step {
                self.take(step);
                quiet = 0;
            } else {
                quiet += 1;
            }
            let waits = match &planned.blocked {
                Some(Blocked::TooManyMoves { .. } | Blocked::Backoff { .. }) => true,
                Some(
                    Blocked::Busy { .. }
                    | Blocked::NoSpare { .. }
                    | Blocked::Floor { .. }
                    | Blocked::NoQuorum
                    | Blocked::Full,
                )
                | None => false,
            };
            if quiet > 30 && !waits {
                return planned;
            }
            self.tick();
        }
        panic!("never settles: {:?}", self.entry.shard);
    }

    fn roles(&self) -> Vec<(u8, Role)> {
        let members = self.entry.shard.members.iter();
        members.map(|member| (member.server.bytes()[0], member.role)).collect()
    }
}

/// A world of random size, labels and damage.
fn random_world(random: &mut Random) -> World {
    let replicas = [1, 2, 3, 5][usize::try_from(random.below(4)).unwrap()];
    let servers = replicas + u8::try_from(random.below(4)).unwrap();
    let mut world = World::new(servers, replicas);
    let (zones, racks) = (random.below(4), random.below(4));
    for entry in &mut world.servers {
        for (name, of) in [("zone", zones), ("rack", racks)] {
            if of > 0 && !random.one_in(8) {
                let value = format!("{}", random.below(of));
                entry.server.labels.insert(name.to_owned(), value);
            }
        }
    }
    world
}

/// Something happens to a random server, if a seal quorum is left.
fn damage(world: &mut World, random: &mut Random) {
    let count = u64::try_from(world.servers.len()).unwrap();
    let at = usize::try_from(random.below(count)).unwrap();
    let id = world.servers[at].server.id;
    let saved = (world.servers.clone(), world.truth.clone());
    let now_ms = world.now_ms;
    let truth = world.truth.get_mut(&id).unwrap();
    match random.below(7) {
        0 | 1 => {
            truth.silent_since_ms.get_or_insert(now_ms);
            truth.caught_up = false;
        }
        2 => truth.device_failed = true,
        3 => truth.needs_fill = true,
        4 => truth.slow_since_ms = Some(now_ms),
        5 => world.servers[at].server.draining = Some(Draining { since_ms: now_ms }),
        _ => {
            let mut pool = world.servers[at].server.pool.bytes();
            pool[1] = pool[1].wrapping_add(1);
            world.servers[at].server.pool = PoolId::from_bytes(pool);
            truth.caught_up = false;
        }
    }
    let in_sync = world.entry.shard.in_sync().count();
    if world.holders(&world.entry.shard) < seal_quorum(in_sync) {
        (world.servers, world.truth) = saved;
    }
}

/// A random server is as good as new.
fn mend(world: &mut World, random: &mut Random) {
    let count = u64::try_from(world.servers.len()).unwrap();
    let at = usize::try_from(random.below(count)).unwrap();
    world.servers[at].server.draining = None;
    let truth = world.truth.get_mut(&world.servers[at].server.id).unwrap();
    truth.silent_since_ms = None;
    truth.device_failed = false;
    truth.slow_since_ms = None;
}

fn run(seed: u64) {
    let mut random = Random(seed);
    let mut world = random_world(&mut random);
    for _ in 0..random.below(60) {
        if random.one_in(4) {
            damage(&mut world, &mut random);
        }
        if random.one_in(8) {
            mend(&mut world, &mut random);
        }
        if let Some(step) = world.plan().step {
            world.take(&step);
        }
        if !random.one_in(3) {
            world.tick();
        }
    }
    // Quiet: nothing new breaks, devices are replaced, nobody is slow.
    for truth in world.truth.values_mut() {
        truth.slow_since_ms = None;
        truth.device_failed = false;
    }
    let last = world.settle();
    let able = world
        .servers
        .iter()
        .filter(|entry| world.runs(entry.server.id) && entry.server.draining.is_none());
    let replicas = usize::from(world.entry.volume.policy.replicas);
    let well = world.entry.shard.members.iter().filter(|member| {
        member.role == Role::InSync
            && world.holds(member)
            && world.server(member.server).server.draining.is_none()
    });
    let well = well.count();
    if able.count() >= replicas {
        assert_eq!(well, replicas, "{:?} of {:?}", world.roles(), last);
        assert!(last.blocked.is_none(), "{last:?}");
        let counted = world.entry.shard.members.iter().filter(|member| match member.role {
            Role::InSync | Role::CatchingUp | Role::Provisioning => true,
            Role::Leaving => false,
        });
        assert_eq!(counted.count(), replicas, "nothing is left over: {:?}", world.roles());
    } else {
        assert!(last.blocked.is_some(), "{:?} of {:?}", world.roles(), last);
    }
}

#[test]
fn damaged_volumes_become_well() {
    let number = |name| std::env::var(name).ok().map(|text| text.parse::<u64>().expect(name));
    let seeds = number("HOLDFAST_SEED")
        .map_or_else(|| 0..number("HOLDFAST_SEEDS").unwrap_or(SEEDS), |seed| seed..seed + 1);
    for seed in seeds {
        if let Err(panic) = std::panic::catch_unwind(|| run(seed)) {
            eprintln!("seed {seed}; again: HOLDFAST_SEED={seed} cargo test -p cluster damaged");
            std::panic::resume_unwind(panic);
        }
    }
}

#[test]
fn a_lost_member_of_three_is_replaced_in_order() {
    let mut world = World::new(4, 3);
    world.kill(3);
    let mut steps = Vec::new();
    while world.now_ms < 1_000_060_000 {
        let planned = world.plan();
        if let Some(step) = planned.step {
            world.take(&step);
            steps.push((world.now_ms - 1_000_000_000, step, planned.cause));
        }
        world.tick();
    }
    let kinds: Vec<_> = steps.iter().map(|(_, step, _)| step.clone()).collect();
    let (gone, spare) = (server_id(3), server_id(4));
    let [
        Step::UpdateFailover { failover },
        Step::AddSpare { server, counts: true, .. },
        Step::Replace { leaves, counts },
    ] = &kinds[..]
    else {
        panic!("{kinds:?}");
    };
    assert_eq!(*failover, [spare]);
    assert_eq!((*server, *leaves, *counts), (spare, gone, spare));
    let (when, _, cause) = &steps[1];
    assert!((10_000..=15_000).contains(when), "after the policy's time: {when}");
    assert!(cause.starts_with("server s3: silent for 1"), "{cause}");
    assert_eq!(
        world.roles(),
        [(1, Role::InSync), (2, Role::InSync), (3, Role::Leaving), (4, Role::InSync)]
    );
}

#[test]
fn silence_that_nobody_else_confirms_is_no_loss() {
    let mut world = World::new(4, 3);
    let picture = world.picture();
    world.kill(3);
    world.now_ms += 60_000;
    let mut facts = world.facts();
    facts.members[2].corroborated = false;
    // The store hears of everybody.
    let mut heard = picture.clone();
    for server in &mut heard.servers {
        server.last_seen_ms = world.now_ms;
    }
    let planned = plan(&world.entry, &facts, &heard, &world.policy, world.now_ms);
    assert!(matches!(planned.step, Some(Step::UpdateFailover { .. })), "{planned:?}");
    facts.members[2].corroborated = true;
    let planned = plan(&world.entry, &facts, &heard, &world.policy, world.now_ms);
    assert!(matches!(planned.step, Some(Step::AddSpare { .. })), "{planned:?}");
    facts.members[2].corroborated = false;
    heard.servers[2].last_seen_ms -= crate::ALIVE_MS + 1;
    let planned = plan(&world.entry, &facts, &heard, &world.policy, world.now_ms);
    assert!(matches!(planned.step, Some(Step::AddSpare { .. })), "{planned:?}");
    facts.changing = true;
    let planned = plan(&world.entry, &facts, &heard, &world.policy, world.now_ms);
    assert_eq!(planned, Plan::default(), "one change at a time");
}

#[test]
fn drained_members_leave_when_their_replacement_counts() {
    for replicas in [1, 2, 3] {
        let mut world = World::new(replicas + 1, replicas);
        world.servers[0].server.draining = Some(Draining { since_ms: 1 });
        let Some(Step::AddSpare { counts: false, .. }) = world.plan().step else {
            panic!("at once: {:?}", world.plan());
        };
        world.settle();
        let in_sync: Vec<_> = world.entry.shard.in_sync().collect();
        assert_eq!(in_sync, (2..=replicas + 1).map(server_id).collect::<Vec<_>>());
        assert!(world.entry.shard.moves.is_empty(), "an operator's moves are not counted");
    }
}

#[test]
fn without_spare_a_dead_member_is_demoted_only_where_that_helps() {
    let mut two = World::new(2, 2);
    two.kill(2);
    two.now_ms += 20_000;
    assert_eq!(two.plan().step, Some(Step::Demote { server: server_id(2) }));
    let stage = Stage::Opening;
    let opening = VolumeFacts { stage, ..two.facts() };
    let planned = plan(&two.entry, &opening, &two.picture(), &two.policy, two.now_ms);
    assert_eq!(planned.step, Some(Step::Demote { server: server_id(2) }), "while it opens too");
    let last = two.settle();
    assert!(matches!(last.blocked, Some(Blocked::NoSpare { .. })), "{last:?}");
    assert_eq!(two.roles(), [(1, Role::InSync), (2, Role::CatchingUp)]);
    // It comes back, catches up and counts again.
    two.truth.get_mut(&server_id(2)).unwrap().silent_since_ms = None;
    two.settle();
    assert_eq!(two.roles(), [(1, Role::InSync), (2, Role::InSync)]);
    let mut three = World::new(3, 3);
    three.kill(3);
    three.settle();
    assert_eq!(three.entry.shard.in_sync().count(), 3, "two of three are a quorum anyway");
    three.kill(2);
    let last = three.settle();
    assert!(
        matches!(last.blocked, Some(Blocked::NoSpare { .. })),
        "a newcomer would help: {last:?}"
    );
    assert_eq!(three.entry.shard.in_sync().count(), 3, "one of three is below the floor");
}

#[test]
fn a_poisonous_volume_is_left_alone_for_a_while() {
    let mut world = World::new(9, 3);
    let mut spares = Vec::new();
    let start = world.now_ms;
    while world.now_ms < start + 500_000 {
        let planned = world.plan();
        if let Some(step) = planned.step {
            world.take(&step);
            if let Step::AddSpare { server, .. } = step {
                spares.push(world.now_ms - start);
                world.kill(server.bytes()[0]);
            }
        }
        if spares.is_empty() {
            world.kill(3);
        }
        world.tick();
    }
    assert_eq!(spares.len(), 3, "{spares:?}");
    let planned = world.plan();
    let Some(Blocked::TooManyMoves { moves: 3, until_ms }) = planned.blocked else {
        panic!("{planned:?}");
    };
    assert!(planned.blocked.unwrap().to_string().contains("moved 3 times"));
    assert_eq!(until_ms, start + spares[0] + world.policy.moves_window_ms);
    world.settle();
    assert_eq!(world.holders(&world.entry.shard), 3, "then it is healed");
}

#[test]
fn a_newcomer_takes_a_place_where_nothing_else_has_a_quorum() {
    let mut world = World::new(4, 3);
    let (spare, pool) = (server_id(4), PoolId::from_bytes([4; 16]));
    world.take(&Step::AddSpare { server: spare, pool, at_ms: 0, counts: false });
    world.tick();
    world.tick();
    world.kill(2);
    world.now_ms += 20_000;
    world.truth.get_mut(&server_id(3)).unwrap().needs_fill = true;
    let step = world.plan().step.unwrap();
    assert_eq!(step, Step::Replace { leaves: server_id(2), counts: spare });
    world.take(&step);
    world.settle();
    assert_eq!(world.holders(&world.entry.shard), 3);
}

#[test]
fn limits_and_reasons() {
    let mut world = World::new(4, 3);
    world.kill(3);
    world.now_ms += 20_000;
    for server in &mut world.servers[..2] {
        server.last_seen_ms = world.now_ms;
    }
    world.servers[3].last_seen_ms = world.now_ms;
    let mut busy = world.picture();
    busy.filling = vec![server_id(1); world.policy.filling_max];
    busy.filling.extend([server_id(3); 9]);
    let planned = plan(&world.entry, &world.facts(), &busy, &world.policy, world.now_ms);
    assert_eq!(planned.blocked, Some(Blocked::Busy { filling: 4 }));
    busy.filling.remove(0);
    let planned = plan(&world.entry, &world.facts(), &busy, &world.policy, world.now_ms);
    assert!(matches!(planned.step, Some(Step::AddSpare { .. })), "dead ones do not count");
    world.servers[3].server.capacity_bytes = 1 << 20;
    let planned = world.plan();
    let reason = planned.blocked.unwrap().to_string();
    assert!(reason.contains("s4: 1048576 bytes of room, 67108864 needed"), "{reason}");
    // A server that says that it cannot make the replica is let go, and another one tried.
    world.servers[3].server.capacity_bytes = 1 << 40;
    let Some(step @ Step::AddSpare { .. }) = world.plan().step else { panic!("room again") };
    world.take(&step);
    let volume = world.entry.volume.id;
    world.servers[3].server.problems = vec![Problem { volume, reason: "no space".to_owned() }];
    let planned = world.plan();
    assert_eq!(planned.step, Some(Step::Remove { server: server_id(4) }));
    assert!(planned.cause.contains("s4: the replica cannot be made there: no space"));
}

#[test]
fn room_is_kept_for_failover_and_given_to_whom_it_is_kept_for() {
    let mut world = World::new(4, 3);
    let planned = world.plan();
    assert_eq!(planned.step, Some(Step::UpdateFailover { failover: vec![server_id(4)] }));
    world.take(&planned.step.unwrap());
    assert_eq!(world.plan(), Plan::default());
    let picture = world.picture();
    assert_eq!(picture.usage.reserved(server_id(4)), 64 << 20);
    // Another volume on the same members shares what is kept for the loss of one of them.
    let mut other = world.entry.clone();
    other.volume.id = VolumeId::from_bytes([0x56; 16]);
    other.shard.members.truncate(1);
    let both = Picture::of(&[world.entry.clone(), other.clone()], world.servers.clone());
    assert_eq!(both.usage.reserved(server_id(4)), 128 << 20, "both have a member on s1");
    other.shard.members[0].server = server_id(9);
    let apart = Picture::of(&[world.entry.clone(), other], world.servers.clone());
    assert_eq!(apart.usage.reserved(server_id(4)), 64 << 20, "they are not lost at once");
    world.servers[3].server.capacity_bytes = 64 << 20;
    let picture = world.picture();
    let mut servers = vec![world.servers[3].clone()];
    let refused = crate::place(4096, 1, &servers, &picture.usage, world.now_ms).unwrap_err();
    assert!(refused.to_string().contains("67108864 more are kept for failover"), "{refused}");
    servers[0].server.capacity_bytes += 4 << 20;
    assert!(crate::place(4096, 1, &servers, &picture.usage, world.now_ms).is_ok());
    world.kill(1);
    world.settle();
    assert!(world.entry.shard.in_sync().any(|id| id == server_id(4)), "its own room");
}

#[test]
fn named_failover_servers_come_first_while_they_qualify() {
    let mut world = World::new(6, 3);
    let (four, five, six) = (server_id(4), server_id(5), server_id(6));
    world.settle();
    assert_eq!(world.entry.shard.failover, [four, five, six]);
    world.entry.shard.preferred_failover = vec![six];
    let step = world.plan().step.unwrap();
    assert_eq!(step, Step::UpdateFailover { failover: vec![six, four, five] });
    world.take(&step);
    assert_eq!(world.plan(), Plan::default(), "once");
    // One that restarts keeps its place; one that is away for long loses it, and gets it back.
    world.kill(6);
    for _ in 0..10 {
        world.tick();
    }
    assert_eq!(world.plan(), Plan::default(), "it is only late");
    for _ in 0..15 {
        world.tick();
    }
    world.settle();
    assert_eq!(world.entry.shard.failover, [four, five]);
    world.truth.get_mut(&six).unwrap().silent_since_ms = None;
    world.tick();
    world.settle();
    assert_eq!(world.entry.shard.failover, [six, four, five]);
    world.kill(3);
    world.settle();
    assert!(world.entry.shard.in_sync().any(|id| id == six), "{:?}", world.roles());
    assert_eq!(world.entry.shard.preferred_failover, [six]);
}

#[test]
fn unserved_volumes_are_repaired_by_a_member_that_runs() {
    let mut world = World::new(4, 3);
    let wants =
        |world: &World| wants_repair(&world.entry, &world.picture(), &world.policy, world.now_ms);
    assert_eq!(wants(&world), None, "all is well");
    world.kill(1);
    for _ in 0..5 {
        world.tick();
    }
    let repair = wants(&world).unwrap();
    assert_eq!(repair.server, server_id(2));
    assert!(repair.cause.contains("server s1: silent"), "{}", repair.cause);
    let holder = |repair| {
        let id = base::HolderId::from_bytes([2; 16]);
        Some(base::Holder { id, name: "server s2".to_owned(), repair, yieldable: false })
    };
    world.entry.volume.holder = holder(true);
    assert!(wants(&world).is_some(), "the repairing one goes on");
    world.entry.volume.holder = holder(false);
    assert_eq!(wants(&world), None, "served: not ours to heal");
    world.entry.volume.holder = None;
    world.servers.pop();
    world.truth.remove(&server_id(4));
    assert_eq!(wants(&world), None, "nothing can be done without a spare");
    // What is being filled needs a head.
    world.entry = entry(2, &[(2, Role::InSync), (3, Role::CatchingUp)]);
    assert_eq!(wants(&world).unwrap().server, server_id(2));
    world.kill(2);
    for _ in 0..5 {
        world.tick();
    }
    assert_eq!(wants(&world), None, "the only copy is away");
}

/// Found by the simulator: one member was demoted while it was away, then another died for good, and
/// the opening waited for the dead one with a whole copy at hand.
#[test]
fn an_opening_counts_a_member_that_holds_its_log_where_another_is_dead() {
    let mut world = World::new(3, 3);
    world.entry.shard.members[1].role = Role::CatchingUp;
    world.truth.get_mut(&server_id(2)).unwrap().caught_up = true;
    world.kill(3);
    world.now_ms += 20_000;
    // Even if somebody wants its server empty: it works, and nothing else does.
    for draining in [false, true] {
        let since_ms = world.now_ms;
        world.servers[1].server.draining = draining.then_some(Draining { since_ms });
        let opening = VolumeFacts { stage: Stage::Opening, ..world.facts() };
        let planned = plan(&world.entry, &opening, &world.picture(), &world.policy, world.now_ms);
        let step = Step::Promote { server: server_id(2) };
        assert_eq!(planned.step, Some(step), "{planned:?}");
    }
}
