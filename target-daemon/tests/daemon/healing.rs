//! Members that come and go, volumes that nobody has attached, servers that are emptied.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use base::{
    BlockSize, Durability, Epoch, Holder, HolderId, Policy, PoolId, Role, ServerId, VolumeId,
};
use cluster::lease::{self, Acquire};
use cluster::volumes::{self, NewVolume};
use cluster::{ClusterStore, Draining, EventKind, Heartbeat, servers};
use serde_json::json;
use target_daemon::heads::{Heads, server_holder};
use target_daemon::healer::{HealSettings, Healer};

use crate::bench::{Bench, Running, until};
use crate::fake::{self, Trouble};
use crate::flaky::{Flaky, Mode};

/// Healing without delay.
const AT_ONCE: &str = "[heal]\ndelay_ms = 100\n";

/// Servers that are not there but for what the store knows of them.
struct Others<'a> {
    store: &'a dyn ClusterStore,
    servers: Vec<(ServerId, PoolId)>,
}

impl<'a> Others<'a> {
    fn new(bench: &'a Bench, names: &[&str]) -> Self {
        let store = bench.store.as_ref();
        let servers = names.iter().map(|name| {
            let id = servers::id_for(store, name, false).unwrap();
            let pool = PoolId::from_bytes(cluster::new_id());
            servers::register(store, id, name, pool).unwrap();
            (id, pool)
        });
        let others = Self { store, servers: servers.collect() };
        others.beat();
        others
    }

    /// They say that they run.
    fn beat(&self) {
        for (server, pool) in &self.servers {
            let beat = Heartbeat {
                server: *server,
                pool: *pool,
                addresses: vec![([127, 0, 0, 1], 4998).into()],
                labels: BTreeMap::new(),
                capacity_bytes: 64 << 20,
                free_bytes: 64 << 20,
                version: "0".to_owned(),
                stopping: false,
                problems: Vec::new(),
            };
            self.store.heartbeat(&beat).unwrap();
        }
    }

    /// They make and delete what is asked of them.
    fn work(&self, volume: VolumeId) {
        for (server, pool) in &self.servers {
            volumes::provisioned(self.store, volume, *server, *pool).unwrap();
            volumes::removed(self.store, volume, *server, *pool).unwrap();
        }
    }

    /// A volume with members on the first `replicas` servers, the daemon's first; ready.
    fn volume(&self, bench: &Bench, replicas: u8) -> VolumeId {
        let new = NewVolume {
            name: "v".to_owned(),
            size_bytes: 1 << 20,
            block_size: BlockSize::B4096,
            policy: Policy {
                replicas,
                durability: Durability::Flush,
                stall_deadline_ms: None,
                read_only: false,
            },
            failover: Vec::new(),
        };
        // The daemon has to be one of its servers: all but the wanted ones are made full.
        let id = volumes::create(self.store, &new).unwrap().volume.id;
        until("provisioning", || {
            self.work(id);
            let entry = self.store.volume(id).unwrap().unwrap();
            let ready = entry.shard.members.iter().all(|member| member.role == Role::InSync);
            ready.then_some(())
        });
        assert!(roles(bench, id).contains_key(&bench.server));
        id
    }
}

fn roles(bench: &Bench, volume: VolumeId) -> BTreeMap<ServerId, Role> {
    let entry = bench.store.volume(volume).unwrap().unwrap();
    entry.shard.members.iter().map(|member| (member.server, member.role)).collect()
}

fn set_draining(bench: &Bench, server: ServerId, draining: bool) {
    let draining = draining.then(|| Draining { since_ms: cluster::unix_ms() });
    let revision = bench.store.revision().unwrap();
    bench.store.set_draining(server, draining, revision).unwrap();
}

fn kinds(bench: &Bench) -> Vec<EventKind> {
    let events = bench.store.events(0, 1000).unwrap();
    events.into_iter().map(|(_, event)| event.kind).collect()
}

fn published(running: &Running, word: &str) -> bool {
    running.plane.log().iter().any(|line| line.starts_with("publish") && line.contains(word))
}

#[test]
fn a_lost_member_is_replaced_by_a_spare() {
    let bench = Bench::new();
    let running = bench.start(AT_ONCE);
    let mut others = Others::new(&bench, &["b", "c"]);
    let id = others.volume(&bench, 3);
    assert_eq!(running.export(&bench, "v", "v.sock").0, 201);
    let (lost, _) = others.servers[1];
    running.plane.trouble(lost, Some(Trouble::Lost));
    until("a refusal", || kinds(&bench).contains(&EventKind::HealRefused).then_some(()));

    let spare = Others::new(&bench, &["d"]).servers[0];
    others.servers.push(spare);
    running.plane.trouble(spare.0, Some(Trouble::Behind));
    until("a spare", || {
        others.beat();
        roles(&bench, id).contains_key(&spare.0).then_some(())
    });
    assert_eq!(roles(&bench, id)[&lost], Role::InSync, "it counts until another one may");
    until("a replica", || {
        others.work(id);
        (roles(&bench, id)[&spare.0] == Role::CatchingUp).then_some(())
    });
    running.plane.trouble(spare.0, None);
    let members = until("the swap", || {
        others.beat();
        let roles = roles(&bench, id);
        (roles[&spare.0] == Role::InSync).then_some(roles)
    });
    assert_eq!(members.values().filter(|role| **role == Role::InSync).count(), 3);
    assert_eq!(members[&lost], Role::Leaving);

    // The lost one is back: it deletes its replica, and the head is told.
    running.plane.trouble(lost, None);
    others.work(id);
    assert!(!roles(&bench, id).contains_key(&lost));
    let told = bench.store.statuses().unwrap();
    assert_eq!((told.len(), told[0].phase.as_str()), (1, "open"));
    until("the log of it", || {
        let kinds = kinds(&bench);
        [EventKind::MemberLost, EventKind::MemberAdded, EventKind::InSync, EventKind::MemberRemoved]
            .iter()
            .all(|kind| kinds.contains(kind))
            .then_some(())
    });
    let events = bench.store.events(0, 1000).unwrap();
    let added = events.iter().find(|(_, event)| event.kind == EventKind::MemberAdded).unwrap();
    assert!(added.1.cause.contains("server c: silent"), "{added:?}");
    running.stop();
}

/// A healer whose head has begun to take a lost member out, with a store that then goes away.
/// What the plane was told since, and what the store says, while that is so; and what the plane is
/// told when the store is back.
fn interrupted(mode: Mode) -> (Vec<String>, Role, Vec<String>) {
    let bench = Bench::new();
    let flaky = Arc::new(Flaky::new(Arc::clone(&bench.store)));
    let store: Arc<dyn ClusterStore> = flaky.clone();
    let plane = fake::start(&bench.plane_config()).unwrap();
    let fake = fake::of_pool(bench.pool);
    let mut others = Others::new(&bench, &["b", "c"]);
    others.servers.push((bench.server, bench.pool));
    others.beat();
    let id = others.volume(&bench, 3);
    let heads = Heads::new(store.clone(), plane.clone(), server_holder(bench.server, "a"));
    heads.open(id, false, Duration::ZERO).unwrap();
    let policy = HealSettings { delay_ms: 100, ..HealSettings::default() }.policy();
    let (mut healer, _news) = Healer::new(store, plane, heads, policy, None);
    let (spare, lost) = (Others::new(&bench, &["d"]).servers[0], others.servers[1].0);
    others.servers.push(spare);
    fake.trouble(lost, Some(Trouble::Lost));
    fake.trouble(spare.0, Some(Trouble::Behind));
    until("a member on the spare", || {
        healer.turn(Duration::from_millis(10)).unwrap();
        others.beat();
        others.work(id);
        (roles(&bench, id).get(&spare.0) == Some(&Role::CatchingUp)).then_some(())
    });
    healer.turn(Duration::ZERO).unwrap();
    let before = fake.log().len();
    fake.trouble(spare.0, None);
    flaky.set(mode);
    for _ in 0..20 {
        healer.turn(Duration::ZERO).unwrap();
    }
    let during = fake.log().split_off(before);
    let role = roles(&bench, id)[&lost];
    flaky.set(Mode::Works);
    healer.turn(Duration::ZERO).unwrap();
    let after = fake.log().split_off(before + during.len());
    assert_eq!(roles(&bench, id)[&lost], Role::Leaving, "it is done now");
    (during, role, after)
}

fn words(log: &[String]) -> Vec<&str> {
    log.iter().map(|line| line.split(' ').next().unwrap()).collect()
}

#[test]
fn a_change_stays_open_until_its_outcome_is_known() {
    let (during, role, after) = interrupted(Mode::AnswersLost);
    assert_eq!(role, Role::Leaving, "it came true, but nobody knows");
    assert_eq!(words(&during), ["change_members"], "the head is not told what is not known");
    assert_eq!(words(&after)[0], "members_changed");
    let (during, role, after) = interrupted(Mode::RequestsLost);
    assert_eq!(role, Role::InSync, "it did not come true, but nobody knows");
    assert_eq!(words(&during), ["change_members"]);
    assert_eq!(words(&after)[0], "members_changed");
}

#[test]
fn volumes_go_on_without_the_cluster_store_and_are_healed_when_it_is_back() {
    let bench = Bench::new();
    let running = bench.start(AT_ONCE);
    let mut others = Others::new(&bench, &["b", "c"]);
    let id = others.volume(&bench, 3);
    assert_eq!(running.export(&bench, "v", "v.sock").0, 201);
    others.servers.extend(Others::new(&bench, &["d"]).servers);
    let (lost, _) = others.servers[1];
    let (here, away) = (bench.path("c.db"), bench.path("away.db"));
    std::fs::rename(&here, &away).unwrap();
    running.plane.trouble(lost, Some(Trouble::Lost));
    let degraded = "the API to say that the store is away";
    until(degraded, || (running.get("/v1/health")["state"] == "degraded").then_some(()));
    let turns = Instant::now();
    until("some turns", || (turns.elapsed() > Duration::from_secs(1)).then_some(()));
    assert_eq!(running.get("/v1/exports")[0]["state"], "open");
    std::fs::rename(&away, &here).unwrap();
    until("the volume to be whole", || {
        others.beat();
        others.work(id);
        let roles = roles(&bench, id);
        (roles.len() == 3 && !roles.contains_key(&lost)).then_some(())
    });
    running.stop();
}

#[test]
fn a_volume_that_nobody_has_attached_is_repaired_and_given_to_whoever_wants_it() {
    let bench = Bench::new();
    let running = bench.start(AT_ONCE);
    let mut others = Others::new(&bench, &["b"]);
    let id = others.volume(&bench, 2);
    // Used once, so that there is something to keep.
    let guest = Holder {
        id: HolderId::from_bytes([9; 16]),
        name: "guest".to_owned(),
        repair: false,
        yieldable: false,
    };
    let store = bench.store.as_ref();
    lease::acquire(store, id, &guest, Acquire::default()).unwrap();
    lease::release(store, id, guest.id, Epoch(1)).unwrap();
    let spare = Others::new(&bench, &["c"]).servers[0];
    let (leaving, _) = others.servers[0];
    others.servers.push(spare);
    running.plane.trouble(spare.0, Some(Trouble::Behind));
    set_draining(&bench, leaving, true);

    let epoch = until("a repair head", || {
        others.beat();
        let volume = bench.store.volume(id).unwrap().unwrap().volume;
        volume.holder.is_some_and(|holder| holder.repair).then_some(volume.epoch)
    });
    assert_eq!(epoch, Epoch(2));
    assert!(running.get("/v1/exports").as_array().unwrap().is_empty());
    until("a new member", || {
        others.beat();
        others.work(id);
        (roles(&bench, id).get(&spare.0) == Some(&Role::CatchingUp)).then_some(())
    });

    // A guest elsewhere does not ask twice, and is not asked for force.
    let taken = lease::acquire(store, id, &guest, Acquire::default()).unwrap().volume.epoch;
    until("giving way", || {
        others.beat();
        running.get("/v1/status")["heads"].as_array().unwrap().is_empty().then_some(())
    });
    assert_eq!(bench.holder(id), (Some("guest".to_owned()), taken));
    lease::release(store, id, guest.id, taken).unwrap();

    // One on this very server neither.
    until("another repair head", || {
        others.beat();
        let holder = bench.store.volume(id).unwrap().unwrap().volume.holder;
        holder.is_some_and(|holder| holder.repair).then_some(())
    });
    assert_eq!(running.export(&bench, "v", "v.sock").0, 201);
    assert_eq!(bench.holder(id).0.as_deref(), Some("server a"));
    let holder = bench.store.volume(id).unwrap().unwrap().volume.holder.unwrap();
    assert!(!holder.repair);
    running.plane.trouble(spare.0, None);
    until("the volume to be whole", || {
        others.beat();
        others.work(id);
        let roles = roles(&bench, id);
        (roles.len() == 2 && roles.get(&spare.0) == Some(&Role::InSync)).then_some(())
    });
    assert!(!roles(&bench, id).contains_key(&leaving));
    running.stop();
    assert_eq!(bench.holder(id).0, None);
}

#[test]
fn a_repair_ends_by_itself_and_gives_the_volume_back() {
    let bench = Bench::new();
    let running = bench.start(AT_ONCE);
    let mut others = Others::new(&bench, &["b"]);
    let id = others.volume(&bench, 2);
    let guest = Holder {
        id: HolderId::from_bytes([9; 16]),
        name: "guest".to_owned(),
        repair: false,
        yieldable: false,
    };
    let store = bench.store.as_ref();
    lease::acquire(store, id, &guest, Acquire::default()).unwrap();
    lease::release(store, id, guest.id, Epoch(1)).unwrap();
    others.servers.extend(Others::new(&bench, &["c"]).servers);
    set_draining(&bench, others.servers[0].0, true);
    until("the end of the repair", || {
        others.beat();
        others.work(id);
        kinds(&bench).contains(&EventKind::RepairEnded).then_some(())
    });
    assert_eq!(bench.holder(id), (None, Epoch(2)));
    assert!(!roles(&bench, id).contains_key(&others.servers[0].0));
    let running_heads = running.get("/v1/status")["heads"].as_array().unwrap().len();
    assert_eq!(running_heads, 0);
    running.stop();
}

/// A volume that is ready, was used once by a guest, and that nobody has.
fn left_alone(bench: &Bench, others: &Others<'_>) -> VolumeId {
    let id = others.volume(bench, 2);
    let guest = Holder {
        id: HolderId::from_bytes([9; 16]),
        name: "guest".to_owned(),
        repair: false,
        yieldable: false,
    };
    lease::acquire(others.store, id, &guest, Acquire::default()).unwrap();
    lease::release(others.store, id, guest.id, Epoch(1)).unwrap();
    id
}

#[test]
fn what_only_a_server_knows_of_its_own_copy_is_healed_by_itself() {
    let bench = Bench::new();
    let running = bench.start(AT_ONCE);
    let others = Others::new(&bench, &["b"]);
    let id = left_alone(&bench, &others);
    let wait_for = |what: &str, repair: bool, epoch: u64| {
        until(what, || {
            others.beat();
            let volume = bench.store.volume(id).unwrap().unwrap().volume;
            let held = volume.holder.is_some_and(|holder| holder.repair);
            (held == repair && volume.epoch == Epoch(epoch)).then_some(())
        });
    };
    // Blocks that cannot be read: the head stays until they have been written again.
    running.plane.damage(id, 3);
    wait_for("a repair head", true, 2);
    running.plane.damage(id, 0);
    wait_for("the volume to be free", false, 2);
    // The copy was away when somebody else opened it.
    running.plane.was_away(id, Epoch(1));
    wait_for("another repair head", true, 3);
    wait_for("the volume to be free again", false, 3);
    // What the last head told: the copy had not followed.
    let mut told = bench.store.statuses().unwrap().remove(0);
    assert_eq!((told.volume, told.epoch), (id, Epoch(3)));
    let guest = Holder {
        id: HolderId::from_bytes([9; 16]),
        name: "guest".to_owned(),
        repair: false,
        yieldable: false,
    };
    lease::acquire(others.store, id, &guest, Acquire::default()).unwrap();
    told.epoch = Epoch(4);
    "open".clone_into(&mut told.phase);
    for member in told.members.iter_mut().filter(|member| member.server == bench.server) {
        member.connected = false;
    }
    others.store.put_statuses(&[told]).unwrap();
    lease::release(others.store, id, guest.id, Epoch(4)).unwrap();
    wait_for("a third one", true, 5);
    wait_for("the volume to be free at last", false, 5);
    let repairs = kinds(&bench).iter().filter(|kind| **kind == EventKind::RepairEnded).count();
    assert_eq!(repairs, 3);
    // While somebody serves it, it is none of this server's business.
    lease::acquire(others.store, id, &guest, Acquire::default()).unwrap();
    running.plane.damage(id, 3);
    let turns = Instant::now();
    until("some turns", || (turns.elapsed() > Duration::from_secs(3)).then_some(()));
    assert_eq!(bench.holder(id), (Some("guest".to_owned()), Epoch(6)));
    running.stop();
}

#[test]
fn a_server_is_emptied_and_says_what_it_waits_for() {
    let bench = Bench::new();
    let running = bench.start(AT_ONCE);
    let mut others = Others::new(&bench, &[]);
    let id = others.volume(&bench, 1);
    let socket = bench.path("v.sock");
    assert_eq!(running.export(&bench, "v", "v.sock").0, 201);
    running.plane.connect(&socket, true);
    assert!(running.get("/v1/status")["drain"].is_null());
    others.servers.extend(Others::new(&bench, &["b"]).servers);
    set_draining(&bench, bench.server, true);

    until("what it waits for", || {
        others.beat();
        others.work(id);
        let drain = running.get("/v1/status")["drain"].clone();
        let problems = bench.store.servers().unwrap().remove(0).server.problems;
        let named = problems.first().is_some_and(|problem| problem.reason.contains("v.sock"));
        let left = &drain["heads"][0];
        let guest = left["volume"] == "v" && left["reason"].to_string().contains("migrate");
        (named && guest && drain["replicas"] == json!([])).then_some(())
    });
    assert!(published(&running, "Draining"));
    assert_eq!(roles(&bench, id), [(others.servers[0].0, Role::InSync)].into());
    assert_eq!(bench.holder(id).0.as_deref(), Some("server a"), "a guest uses it");
    let (status, error) = running.export(&bench, "v", "w.sock");
    assert_eq!((status, &error["code"]), (409, &json!("draining")), "{error}");

    running.plane.connect(&socket, false);
    until("the end", || {
        others.beat();
        (running.get("/v1/status")["drain"]["safe_to_stop"] == true).then_some(())
    });
    assert_eq!(bench.holder(id).0, None);
    until("the announcement", || kinds(&bench).contains(&EventKind::Drained).then_some(()));
    let export = running.get("/v1/exports")[0].clone();
    assert!(export["reason"].to_string().contains("being drained"), "{export}");

    set_draining(&bench, bench.server, false);
    until("serving again", || {
        others.beat();
        (running.get("/v1/exports")[0]["state"] == "open").then_some(())
    });
    until("word of it", || published(&running, "Back").then_some(()));
    let told = kinds(&bench);
    for kind in [EventKind::DrainStarted, EventKind::Undrained, EventKind::Released] {
        assert!(told.contains(&kind), "{kind} in {told:?}");
    }
    running.stop();
}

#[test]
fn a_head_is_told_that_its_volume_has_grown_wherever_that_was_done() {
    let bench = Bench::new();
    let running = bench.start("");
    let id = bench.volume("v");
    let (status, body) = running.export(&bench, "v", "v.sock");
    assert_eq!(status, 201, "{body}");
    let resized = cluster::resize::resize(bench.store.as_ref(), id, 3 << 20).unwrap();
    assert_eq!(resized.before_bytes, 1 << 20);
    let told = format!("volume_grown {id} {}", 3 << 20);
    until("the head to be told", || running.plane.log().contains(&told).then_some(()));
    until("everybody to be told", || {
        let statuses = bench.store.statuses().unwrap();
        statuses.iter().any(|status| status.size_bytes == 3 << 20).then_some(())
    });
    let kinds = bench.store.events(0, 100).unwrap();
    assert!(kinds.iter().any(|(_, event)| event.kind == EventKind::Resized), "{kinds:?}");
    // Once.
    let times = running.plane.log().iter().filter(|line| **line == told).count();
    assert_eq!(times, 1);
    running.stop();
}
