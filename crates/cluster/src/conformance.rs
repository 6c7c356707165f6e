//! What every cluster store must do, as tests that run on any of them.

use std::any::Any;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use base::{
    BlockSize, Durability, Epoch, Holder, HolderId, Member, Policy, PoolId, Role, ServerId,
    ShardIndex, ShardRecord, VolumeId, VolumeRecord,
};

use crate::error::{StoreError, StoreErrorKind};
use crate::events::{Event, EventKind};
use crate::heal::Step;
use crate::lease::{self, Acquire, AcquireError};
use crate::members::{self, ChangeOutcome};
use crate::named_failover::{NamedError, name_failover};
use crate::records::{Draining, Heartbeat, Problem, ServerRecord, VolumeEntry};
use crate::resize::{ResizeError, resize};
use crate::servers::{self, DrainError, RegisterError, Remaining, RemoveError};
use crate::status::{FillReport, MemberReport, Rates, StallReport, VolumeStatus};
use crate::store::ClusterStore;
use crate::volumes::{self, CreateError, DeleteError, NewVolume, Task};

mod standby;

/// Two handles on one new store, and what must outlive them.
pub(crate) type Opened = (Box<dyn ClusterStore>, Box<dyn ClusterStore>, Box<dyn Any>);

/// Runs every test on stores that `open` makes.
pub(crate) fn run(open: impl Fn() -> Opened) {
    run_apart(&open);
    let (one, two, _keep) = open();
    racing_acquirers_get_distinct_epochs(one.as_ref(), two.as_ref());
    let (one, two, _keep) = open();
    room_is_not_promised_twice(one.as_ref(), two.as_ref());
}

/// Runs those tests in which no one else gets between an attempt and the next.
pub(crate) fn run_apart(open: impl Fn() -> Opened) {
    let tests: [fn(&dyn ClusterStore, &dyn ClusterStore); 22] = [
        inserts_are_unique_and_seen_by_others,
        updates_are_conditional_on_both_versions,
        epochs_and_tombstones_do_not_go_back,
        servers_register_and_beat,
        changes_are_noticed,
        volumes_live_and_die,
        volumes_grow_where_there_is_room,
        bad_volumes_are_refused,
        leases_have_one_holder,
        standby::standbys_take_what_is_yielded,
        standby::volumes_are_watched,
        standby::what_is_known_saves_a_question,
        standby::what_was_known_is_not_believed,
        servers_keep_their_names,
        statuses_and_events_are_told,
        draining_is_kept_and_conditional,
        members_change_only_as_expected,
        late_members_do_not_count_and_do_not_hold_up,
        repairers_give_way,
        failover_servers_are_named,
        servers_are_drained_if_there_is_room,
        servers_are_forgotten_if_nobody_needs_them,
    ];
    for test in tests {
        let (one, two, _keep) = open();
        test(one.as_ref(), two.as_ref());
    }
}

pub(crate) fn volume(number: u8, name: &str) -> VolumeRecord {
    VolumeRecord {
        id: VolumeId::from_bytes([number; 16]),
        name: name.to_owned(),
        size_bytes: 1 << 20,
        block_size: BlockSize::B4096,
        policy: policy(1),
        epoch: Epoch::NONE,
        holder: None,
    }
}

pub(crate) fn shard(number: u8) -> ShardRecord {
    let (server, pool) = (ServerId::from_bytes([9; 16]), PoolId::from_bytes([9; 16]));
    ShardRecord {
        volume: VolumeId::from_bytes([number; 16]),
        shard: ShardIndex(0),
        members: vec![Member { server, pool, role: Role::InSync }],
        failover: Vec::new(),
        preferred_failover: Vec::new(),
        moves: Vec::new(),
    }
}

fn policy(replicas: u8) -> Policy {
    Policy {
        replicas,
        durability: Durability::Flush,
        stall_deadline_ms: Some(5000),
        read_only: false,
    }
}

fn new_volume(name: &str, replicas: u8) -> NewVolume {
    NewVolume {
        name: name.to_owned(),
        size_bytes: 1 << 20,
        block_size: BlockSize::B512,
        policy: policy(replicas),
        failover: Vec::new(),
    }
}

fn holder(number: u8) -> Holder {
    Holder {
        id: HolderId::from_bytes([number; 16]),
        name: format!("holder {number}"),
        repair: false,
        yieldable: false,
    }
}

fn pool(number: u8) -> PoolId {
    PoolId::from_bytes([number; 16])
}

/// Registers a server and lets it say that it runs.
fn running_server(store: &dyn ClusterStore, number: u8, capacity_bytes: u64) -> ServerId {
    let name = format!("s{number}");
    let id = register(store, &name, pool(number), false).unwrap();
    store.heartbeat(&beat(id, number, capacity_bytes)).unwrap();
    id
}

fn register(
    store: &dyn ClusterStore,
    name: &str,
    pool: PoolId,
    replace: bool,
) -> Result<ServerId, RegisterError> {
    let id = servers::id_for(store, name, replace)?;
    servers::register(store, id, name, pool)?;
    Ok(id)
}

fn beat(server: ServerId, number: u8, capacity_bytes: u64) -> Heartbeat {
    Heartbeat {
        server,
        pool: pool(number),
        addresses: vec![([127, 0, 0, 1], 4420).into()],
        labels: BTreeMap::from([("rack".to_owned(), "7".to_owned())]),
        capacity_bytes,
        free_bytes: capacity_bytes,
        version: "0.1.0".to_owned(),
        stopping: false,
        problems: Vec::new(),
    }
}

fn kind<T>(result: Result<T, StoreError>) -> StoreErrorKind {
    result.err().expect("the operation fails").kind
}

fn inserts_are_unique_and_seen_by_others(one: &dyn ClusterStore, two: &dyn ClusterStore) {
    assert_eq!(one.cluster_id().unwrap(), two.cluster_id().unwrap());
    let revision = one.revision().unwrap();
    let entry = one.insert_volume(&volume(1, "a"), &shard(1), revision).unwrap();
    assert_eq!(two.volume(entry.volume.id).unwrap(), Some(entry.clone()));
    assert_eq!(two.volume_named("a").unwrap(), Some(entry.clone()));
    assert_eq!(two.volumes().unwrap(), [entry]);
    assert_eq!(two.volume_named("b").unwrap(), None);
    assert_eq!(two.volume(VolumeId::from_bytes([2; 16])).unwrap(), None);
    let stale = two.insert_volume(&volume(2, "b"), &shard(2), revision);
    assert!(matches!(kind(stale), StoreErrorKind::Conflict));
    let revision = two.revision().unwrap();
    let taken = two.insert_volume(&volume(2, "a"), &shard(2), revision);
    assert!(matches!(kind(taken), StoreErrorKind::VolumeNameTaken(_)));
    assert_eq!(one.volumes().unwrap().len(), 1);
    assert_eq!(one.revision().unwrap(), revision, "a refused insertion changes nothing");
}

fn updates_are_conditional_on_both_versions(one: &dyn ClusterStore, two: &dyn ClusterStore) {
    let first = one.insert_volume(&volume(1, "a"), &shard(1), one.revision().unwrap()).unwrap();
    let mut changed = first.clone();
    changed.shard.members.clear();
    changed.versions = two.update_volume(&changed).unwrap();
    assert_eq!(one.volume(first.volume.id).unwrap(), Some(changed.clone()));
    for versions in [
        first.versions,
        crate::Versions { volume: changed.versions.volume, ..first.versions },
        crate::Versions { shard: changed.versions.shard, ..first.versions },
        crate::Versions { volume: changed.versions.volume + 1, ..changed.versions },
    ] {
        let mut stale = first.clone();
        stale.versions = versions;
        if versions != changed.versions {
            assert!(matches!(kind(one.update_volume(&stale)), StoreErrorKind::Conflict));
        }
    }
    assert_eq!(two.volume(first.volume.id).unwrap(), Some(changed));
    let mut unknown = first;
    unknown.volume.id = VolumeId::from_bytes([8; 16]);
    unknown.shard.volume = unknown.volume.id;
    assert!(matches!(kind(one.update_volume(&unknown)), StoreErrorKind::NoVolume(_)));
}

fn epochs_and_tombstones_do_not_go_back(one: &dyn ClusterStore, two: &dyn ClusterStore) {
    let record = VolumeRecord { epoch: Epoch(5), ..volume(1, "a") };
    let mut entry = one.insert_volume(&record, &shard(1), one.revision().unwrap()).unwrap();
    entry.volume.epoch = Epoch(4);
    assert!(matches!(kind(one.update_volume(&entry)), StoreErrorKind::Conflict));
    entry.volume.epoch = Epoch(5);
    let too_early = one.purge_volume(entry.volume.id, entry.versions);
    assert!(matches!(kind(too_early), StoreErrorKind::Conflict));
    entry.deleted = true;
    entry.versions = one.update_volume(&entry).unwrap();
    assert_eq!(two.volume_named("a").unwrap(), None, "the name is free");
    two.insert_volume(&volume(2, "a"), &shard(2), two.revision().unwrap()).unwrap();
    let mut lifted = entry.clone();
    lifted.deleted = false;
    assert!(matches!(kind(one.update_volume(&lifted)), StoreErrorKind::Conflict));
    let has_members = one.purge_volume(entry.volume.id, entry.versions);
    assert!(matches!(kind(has_members), StoreErrorKind::Conflict));
    entry.shard.members.clear();
    entry.versions = two.update_volume(&entry).unwrap();
    one.purge_volume(entry.volume.id, entry.versions).unwrap();
    let again = one.purge_volume(entry.volume.id, entry.versions);
    assert!(matches!(kind(again), StoreErrorKind::NoVolume(_)));
    assert_eq!(two.volumes().unwrap().len(), 1);
}

fn servers_register_and_beat(one: &dyn ClusterStore, two: &dyn ClusterStore) {
    let id = running_server(one, 1, 100);
    let before = two.revision().unwrap();
    let mut news = beat(id, 1, 100);
    news.free_bytes = 50;
    two.heartbeat(&news).unwrap();
    assert_eq!(one.revision().unwrap(), before, "room is no news");
    news.addresses = vec![([127, 0, 0, 1], 4421).into()];
    news.problems =
        vec![Problem { volume: VolumeId::from_bytes([1; 16]), reason: "full".to_owned() }];
    two.heartbeat(&news).unwrap();
    assert!(one.revision().unwrap() > before, "a new address is news");
    let entry = one.servers().unwrap().remove(0);
    assert_eq!((entry.server.free_bytes, entry.server.labels["rack"].as_str()), (50, "7"));
    assert_eq!(
        (&entry.server.addresses, &entry.server.problems),
        (&news.addresses, &news.problems)
    );
    assert!(entry.is_alive(crate::unix_ms()));
    assert!(!entry.is_alive(entry.last_seen_ms + crate::ALIVE_MS + 1));
    news.stopping = true;
    two.heartbeat(&news).unwrap();
    assert!(!one.servers().unwrap()[0].is_alive(crate::unix_ms()));
    let foreign = Heartbeat { pool: pool(7), ..news.clone() };
    assert!(matches!(kind(one.heartbeat(&foreign)), StoreErrorKind::NotRegistered { .. }));
    two.remove_server(id).unwrap();
    two.remove_server(id).unwrap();
    assert!(matches!(kind(one.heartbeat(&news)), StoreErrorKind::NotRegistered { .. }));
}

fn changes_are_noticed(one: &dyn ClusterStore, two: &dyn ClusterStore) {
    let seen = one.revision().unwrap();
    assert_eq!(one.wait_for_change(seen, Duration::ZERO).unwrap(), seen);
    let now = std::thread::scope(|scope| {
        let waiter = scope.spawn(|| one.wait_for_change(seen, Duration::from_secs(20)).unwrap());
        two.insert_volume(&volume(1, "a"), &shard(1), seen).unwrap();
        waiter.join().unwrap()
    });
    assert!(now > seen);
}

fn volumes_live_and_die(one: &dyn ClusterStore, two: &dyn ClusterStore) {
    let ids: Vec<_> = (1..=3).map(|number| running_server(one, number, 4 << 20)).collect();
    let made = volumes::create(one, &new_volume("v", 3)).unwrap();
    let id = made.volume.id;
    assert_eq!(volumes::find(two, "v").unwrap(), made);
    assert_eq!(volumes::find(two, &id.to_string()).unwrap(), made);
    let too_early =
        lease::acquire(one, id, &holder(1), Acquire { force: true, ..Acquire::default() });
    assert!(matches!(too_early, Err(AcquireError::Provisioning { count: 3, members: 3, .. })));
    for (server, number) in ids.iter().zip(1..) {
        let all = two.volumes().unwrap();
        assert!(volumes::tasks(&all, *server, pool(99)).is_empty(), "another pool's business");
        let [Task::Provision(entry)] = &volumes::tasks(&all, *server, pool(number))[..] else {
            panic!("one replica to make");
        };
        assert_eq!(entry.volume.id, id);
        assert!(volumes::provisioned(two, id, *server, pool(number)).unwrap());
        assert!(!volumes::provisioned(two, id, *server, pool(number)).unwrap(), "once only");
        assert!(volumes::tasks(&one.volumes().unwrap(), *server, pool(number)).is_empty());
    }
    let held = lease::acquire(one, id, &holder(1), Acquire::default()).unwrap();
    assert_eq!(held.volume.epoch, Epoch(1));
    let refused = volumes::delete(two, id).unwrap_err();
    assert!(matches!(&refused, DeleteError::Held { .. }));
    assert!(refused.to_string().contains("holder 1"), "{refused}");
    assert!(lease::release(one, id, holder(1).id, Epoch(1)).unwrap());
    volumes::delete(two, id).unwrap();
    volumes::delete(two, id).unwrap();
    assert!(volumes::find(one, "v").is_err());
    assert!(volumes::find(one, &id.to_string()).is_err());
    let dead = lease::acquire(one, id, &holder(1), Acquire::default());
    assert!(matches!(dead, Err(AcquireError::Deleted { .. })));
    for (server, number) in ids.iter().zip(1..) {
        let tasks = volumes::tasks(&one.volumes().unwrap(), *server, pool(number));
        assert!(matches!(&tasks[..], [Task::Remove(_)]));
        volumes::removed(two, id, *server, pool(number)).unwrap();
        volumes::removed(two, id, *server, pool(number)).unwrap();
    }
    assert!(one.volumes().unwrap().is_empty(), "the tombstone is purged");
}

fn room_is_not_promised_twice(one: &dyn ClusterStore, two: &dyn ClusterStore) {
    const CHUNK: u64 = 4 << 20;
    running_server(one, 1, 4 * CHUNK);
    let volumes = ["a", "b"].map(|name| volumes::create(one, &new_volume(name, 1)).unwrap());
    let stale = one.revision().unwrap();
    let grown = resize(one, volumes[0].volume.id, 2 * CHUNK).unwrap().entry;
    assert!(matches!(kind(two.update_volume_at(&grown, stale)), StoreErrorKind::Conflict));
    // One chunk is left, and each of them wants it.
    let asked = [(one, volumes[0].volume.id, 3), (two, volumes[1].volume.id, 2)];
    let given = std::thread::scope(|scope| {
        let resized = |(store, id, chunks)| move || resize(store, id, chunks * CHUNK).is_ok();
        let threads = asked.map(|asked| scope.spawn(resized(asked)));
        threads.map(|thread| thread.join().unwrap())
    });
    assert_eq!(given.into_iter().filter(|given| *given).count(), 1, "{given:?}");
}

fn volumes_grow_where_there_is_room(store: &dyn ClusterStore, other: &dyn ClusterStore) {
    const CHUNK: u64 = 4 << 20;
    running_server(store, 1, 4 * CHUNK);
    running_server(store, 2, 8 * CHUNK);
    let entry = volumes::create(store, &new_volume("grows", 2)).unwrap();
    let id = entry.volume.id;
    let size = |store: &dyn ClusterStore| store.volume(id).unwrap().unwrap().volume.size_bytes;

    let resized = resize(store, id, CHUNK + 512).unwrap();
    assert_eq!((resized.before_bytes, resized.entry.volume.size_bytes), (1 << 20, CHUNK + 512));
    assert_eq!(size(other), CHUNK + 512);
    let revision = store.revision().unwrap();
    let again = resize(other, id, CHUNK + 512).unwrap();
    assert_eq!((again.before_bytes, store.revision().unwrap()), (CHUNK + 512, revision));

    let error = resize(store, id, CHUNK).unwrap_err();
    assert!(matches!(error, ResizeError::Shrinks { .. }), "{error}");
    let error = resize(store, id, 2 * CHUNK + 100).unwrap_err();
    assert!(matches!(error, ResizeError::SizeNotMultiple { .. }), "{error}");
    assert!(error.to_string().contains(&(2 * CHUNK + 512).to_string()), "{error}");
    let error = resize(store, id, 1 << 60).unwrap_err();
    assert!(matches!(error, ResizeError::SizeOutOfRange(_)), "{error}");

    // What others were promised is theirs: two chunks here, one there.
    volumes::create(store, &new_volume("another", 2)).unwrap();
    let error = resize(store, id, 3 * CHUNK + 512).unwrap_err();
    let expected = format!("s1 has {CHUNK} bytes of room, {} more are needed", 2 * CHUNK);
    assert!(error.to_string().contains(&expected), "{error}");
    resize(store, id, 3 * CHUNK).unwrap();
    assert_eq!(size(other), 3 * CHUNK);
    // The last chunk of the first server is taken now.
    let error = volumes::create(store, &new_volume("third", 2)).unwrap_err();
    assert!(matches!(error, CreateError::Placement(_)), "{error}");

    volumes::delete(store, id).unwrap();
    assert!(matches!(resize(store, id, 3 * CHUNK), Err(ResizeError::Store(_))));
}

fn bad_volumes_are_refused(one: &dyn ClusterStore, _two: &dyn ClusterStore) {
    for number in 1..=2 {
        running_server(one, number, 12 << 20);
    }
    let with = |change: fn(&mut NewVolume)| {
        let mut new = new_volume("v", 1);
        change(&mut new);
        volumes::create(one, &new)
    };
    let odd = with(|new| new.size_bytes += 100).unwrap_err();
    assert!(matches!(&odd, CreateError::SizeNotMultiple { .. }));
    assert!(odd.to_string().contains("1048576 and 1049088"), "{odd}");
    assert!(matches!(with(|new| new.size_bytes = 0), Err(CreateError::SizeOutOfRange { .. })));
    let huge = with(|new| new.size_bytes = base::limits::VOLUME_BYTES_MAX + 512);
    assert!(matches!(huge, Err(CreateError::SizeOutOfRange { .. })));
    assert!(matches!(with(|new| new.policy.replicas = 4), Err(CreateError::Replicas(4))));
    assert!(matches!(with(|new| new.name = "a b".to_owned()), Err(CreateError::Name(_))));
    let few = with(|new| new.policy.replicas = 3).unwrap_err().to_string();
    assert!(few.contains("3 replicas") && few.contains("2 ready (s1, s2)"), "{few}");
    assert!(one.volumes().unwrap().is_empty());
    with(|_| {}).unwrap();
    let twice = with(|_| {}).unwrap_err();
    assert!(twice.to_string().contains("named 'v' already"), "{twice}");
    // Promised space counts at once: 24 MiB of room hold six volumes of up to 4 MiB, no seventh.
    let fits = (1..10).filter(|n| volumes::create(one, &new_volume(&format!("w{n}"), 1)).is_ok());
    assert_eq!(fits.count(), 5);
}

fn leases_have_one_holder(one: &dyn ClusterStore, two: &dyn ClusterStore) {
    let entry = one.insert_volume(&volume(1, "a"), &shard(1), one.revision().unwrap()).unwrap();
    let id = entry.volume.id;
    let ask = Acquire::default();
    assert_eq!(lease::acquire(one, id, &holder(1), ask).unwrap().volume.epoch, Epoch(1));
    let refused = lease::acquire(two, id, &holder(2), ask).unwrap_err();
    assert!(matches!(refused, AcquireError::Held { epoch: Epoch(1), .. }));
    assert!(refused.to_string().contains("holder 1") && refused.to_string().contains("--force"));
    // The same holder after kill -9.
    assert_eq!(lease::acquire(two, id, &holder(1), ask).unwrap().volume.epoch, Epoch(2));
    assert!(!lease::release(one, id, holder(1).id, Epoch(1)).unwrap(), "an old epoch's release");
    let forced = Acquire { force: true, ..ask };
    let taken = lease::acquire(two, id, &holder(2), forced).unwrap();
    assert_eq!((taken.volume.epoch, taken.volume.holder), (Epoch(3), Some(holder(2))));
    assert!(!lease::release(one, id, holder(1).id, Epoch(2)).unwrap(), "not its own any more");
    // The store was rolled back: members have sealed a higher epoch.
    let above = Acquire { above: Epoch(40), ..ask };
    assert_eq!(lease::acquire(two, id, &holder(2), above).unwrap().volume.epoch, Epoch(41));
    assert!(lease::release_forced(one, id, false).is_err());
    assert_eq!(lease::release_forced(one, id, true).unwrap().as_deref(), Some("holder 2"));
    assert_eq!(lease::release_forced(one, id, false).unwrap(), None);
    assert_eq!(lease::acquire(one, id, &holder(1), ask).unwrap().volume.epoch, Epoch(42));
    let gone = lease::acquire(one, VolumeId::from_bytes([7; 16]), &holder(1), ask);
    assert!(matches!(gone, Err(AcquireError::Store(_))));
}

fn servers_keep_their_names(one: &dyn ClusterStore, two: &dyn ClusterStore) {
    let id = running_server(one, 1, 4 << 20);
    let made = volumes::create(one, &new_volume("v", 1)).unwrap();
    volumes::provisioned(one, made.volume.id, id, pool(1)).unwrap();
    let running = register(two, "s1", pool(2), true);
    assert!(matches!(running, Err(RegisterError::Running { .. })));
    one.heartbeat(&Heartbeat { stopping: true, ..beat(id, 1, 4 << 20) }).unwrap();
    let refused = register(two, "s1", pool(2), false).unwrap_err().to_string();
    assert!(refused.contains("keeps replicas of v"), "{refused}");
    let taken = register(two, "s2", pool(1), false);
    assert!(matches!(taken, Err(RegisterError::Store(_))), "a pool has one server");
    assert_eq!(register(two, "s1", pool(2), true).unwrap(), id);
    let record = one.servers().unwrap().remove(0);
    assert_eq!((record.server.pool, record.last_seen_ms), (pool(2), 0));
    assert_eq!(servers::with_pool(two, pool(2)).unwrap().unwrap().server.id, id);
    let members = one.volume(made.volume.id).unwrap().unwrap().shard.members;
    assert_eq!(members[0].pool, pool(1), "the lost member stays named");
    // Deleting a volume whose pool is gone does not leave a tombstone for ever.
    volumes::delete(one, made.volume.id).unwrap();
    let tombstone = one.volume(made.volume.id).unwrap().unwrap();
    volumes::forget_lost_pools(two, &tombstone).unwrap();
    assert!(one.volumes().unwrap().is_empty());
    assert!(one.update_server(&ServerRecord { ..record.server }, 99).unwrap_err().is_conflict());
}

fn racing_acquirers_get_distinct_epochs(one: &dyn ClusterStore, two: &dyn ClusterStore) {
    const EACH: u64 = 25;
    let entry = one.insert_volume(&volume(1, "a"), &shard(1), one.revision().unwrap()).unwrap();
    let sum = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for (store, number) in [(one, 1), (two, 2), (one, 3), (two, 4)] {
            let (sum, id) = (&sum, entry.volume.id);
            scope.spawn(move || {
                for _ in 0..EACH {
                    let how = Acquire { force: true, ..Acquire::default() };
                    let got = lease::acquire(store, id, &holder(number), how).unwrap();
                    sum.fetch_add(got.volume.epoch.0, Ordering::Relaxed);
                }
            });
        }
    });
    let last = one.volume(entry.volume.id).unwrap().unwrap().volume.epoch.0;
    assert_eq!(last, 4 * EACH, "every acquisition is a new epoch");
    assert_eq!(sum.into_inner(), last * (last + 1) / 2, "and no epoch is given twice");
}

/// A holder's words about `entry`.
fn status(entry: &VolumeEntry, epoch: u64, written_ms: u64) -> VolumeStatus {
    VolumeStatus {
        volume: entry.volume.id,
        epoch: Epoch(epoch),
        holder: "server s1".to_owned(),
        written_ms,
        phase: "open".to_owned(),
        stall: Some(StallReport { reason: "1 of 3".to_owned(), since_ms: 5 }),
        size_bytes: 0,
        last: 9,
        commit: 8,
        in_flight: 3,
        queued: 0,
        rates: Rates { writes_per_second: 7, ..Rates::default() },
        members: vec![MemberReport {
            server: ServerId::from_bytes([9; 16]),
            role: Role::CatchingUp,
            mode: "filling".to_owned(),
            since_ms: 4,
            connected: true,
            last: 7,
            durable: 6,
            lag: Some(2),
            slow: true,
            draining: true,
            fill: Some(FillReport { copied_bytes: 1, total_bytes: 21, bytes_per_second: 8 }),
        }],
    }
}

fn event(number: u64) -> Event {
    Event {
        at_ms: number,
        kind: EventKind::MemberAdded,
        volume: Some(VolumeId::from_bytes([1; 16])),
        server: None,
        text: format!("event {number}"),
        cause: String::new(),
    }
}

/// Statuses and events of a store with a volume `entry` and without events.
pub(crate) fn tells_and_remembers(store: &dyn ClusterStore, entry: &VolumeEntry) {
    let revision = store.revision().unwrap();
    assert_eq!(store.statuses().unwrap(), []);
    let unknown = VolumeStatus { volume: VolumeId::from_bytes([77; 16]), ..status(entry, 5, 1) };
    store.put_statuses(&[status(entry, 5, 1_000), unknown]).unwrap();
    assert_eq!(store.statuses().unwrap(), [status(entry, 5, 1_000)]);
    store.put_statuses(&[status(entry, 4, 2_000)]).unwrap();
    assert_eq!(store.statuses().unwrap(), [status(entry, 5, 1_000)], "a deposed head's words");
    store.put_statuses(&[status(entry, 5, 3_000)]).unwrap();
    store.put_statuses(&[status(entry, 6, 2_500)]).unwrap();
    assert_eq!(store.statuses().unwrap(), [status(entry, 6, 2_500)]);
    assert_eq!(store.events(0, 10).unwrap(), []);
    for number in 1..=5 {
        assert_eq!(store.append_event(&event(number)).unwrap(), number);
    }
    assert_eq!(store.last_event().unwrap(), 5);
    assert_eq!(store.events(1, 2).unwrap(), [(2, event(2)), (3, event(3))]);
    assert_eq!(store.events(3, usize::MAX).unwrap(), [(4, event(4)), (5, event(5))]);
    assert_eq!(store.events(u64::MAX, 9).unwrap(), []);
    assert_eq!(store.revision().unwrap(), revision, "nothing that anybody decides on");
}

fn statuses_and_events_are_told(one: &dyn ClusterStore, two: &dyn ClusterStore) {
    let entry = one.insert_volume(&volume(1, "a"), &shard(1), one.revision().unwrap()).unwrap();
    tells_and_remembers(one, &entry);
    assert_eq!(two.statuses().unwrap().len(), 1);
    assert_eq!(two.append_event(&event(6)).unwrap(), 6);
    assert_eq!(one.last_event().unwrap(), 6);
    let told = status(&entry, 5, 10_000);
    let mut entry = entry;
    assert!(!told.is_current(&entry, 10_000), "of another epoch");
    entry.volume.epoch = Epoch(5);
    assert!(!told.is_current(&entry, 10_000), "nobody holds it");
    entry.volume.holder = Some(holder(1));
    assert!(told.is_current(&entry, 9_000) && told.is_current(&entry, 15_000));
    assert!(!told.is_current(&entry, 15_001), "stale");
    let fill = told.members[0].fill.unwrap();
    assert_eq!(fill.seconds_left(), Some(3));
    assert_eq!(FillReport { bytes_per_second: 0, ..fill }.seconds_left(), None);
    // A purged volume's status goes with it.
    entry.deleted = true;
    entry.shard.members.clear();
    entry.versions = one.update_volume(&entry).unwrap();
    one.purge_volume(entry.volume.id, entry.versions).unwrap();
    assert_eq!(two.statuses().unwrap(), []);
}

fn draining_is_kept_and_conditional(one: &dyn ClusterStore, two: &dyn ClusterStore) {
    let id = running_server(one, 1, 100);
    let revision = one.revision().unwrap();
    let draining = Some(Draining { since_ms: 7 });
    let stale = one.set_draining(id, draining, revision - 1);
    assert!(matches!(kind(stale), StoreErrorKind::Conflict));
    let before = one.servers().unwrap().remove(0);
    two.set_draining(id, draining, revision).unwrap();
    assert!(two.revision().unwrap() > revision, "it is news");
    let after = one.servers().unwrap().remove(0);
    assert_eq!(after.server, ServerRecord { draining, ..before.server });
    assert_eq!(after.last_seen_ms, before.last_seen_ms, "it still runs");
    two.heartbeat(&beat(id, 1, 70)).unwrap();
    two.heartbeat(&Heartbeat { stopping: true, ..beat(id, 1, 70) }).unwrap();
    assert_eq!(one.servers().unwrap()[0].server.draining, draining, "heartbeats keep it");
    one.set_draining(id, None, one.revision().unwrap()).unwrap();
    assert_eq!(two.servers().unwrap()[0].server.draining, None);
    let nobody = one.set_draining(ServerId::from_bytes([8; 16]), None, one.revision().unwrap());
    assert!(matches!(kind(nobody), StoreErrorKind::NoServer(_)));
}

fn members_change_only_as_expected(one: &dyn ClusterStore, two: &dyn ClusterStore) {
    let entry = one.insert_volume(&volume(1, "a"), &shard(1), one.revision().unwrap()).unwrap();
    let (id, old) = (entry.volume.id, entry.shard);
    lease::acquire(one, id, &holder(1), Acquire::default()).unwrap();
    let (server, pool) = (ServerId::from_bytes([3; 16]), pool(3));
    let add = Step::AddSpare { server, pool, at_ms: 5, counts: true };
    let new = add.apply(&old);
    let change = |store, epoch, number, new| {
        members::change(store, id, Epoch(epoch), holder(number).id, &old, new).unwrap()
    };
    assert!(matches!(change(one, 2, 1, &new), ChangeOutcome::Deposed(_)), "another epoch");
    assert!(matches!(change(one, 1, 2, &new), ChangeOutcome::Deposed(_)), "another holder");
    let ChangeOutcome::Changed(written) = change(two, 1, 1, &new) else { panic!("the holder may") };
    assert_eq!(one.volume(id).unwrap(), Some(written.clone()));
    assert_eq!(written.shard.moves, [base::Move { server, at_ms: 5 }]);
    assert_eq!(change(one, 1, 1, &new), ChangeOutcome::Changed(written.clone()), "done before");
    let other = Step::UpdateFailover { failover: vec![server] }.apply(&old);
    assert_eq!(change(one, 1, 1, &other), ChangeOutcome::Conflict(written));
    let forced = Acquire { force: true, ..Acquire::default() };
    let taken = lease::acquire(two, id, &holder(2), forced).unwrap();
    assert_eq!(change(one, 1, 1, &new), ChangeOutcome::Deposed(taken));
}

fn late_members_do_not_count_and_do_not_hold_up(one: &dyn ClusterStore, two: &dyn ClusterStore) {
    let entry = one.insert_volume(&volume(1, "a"), &shard(1), one.revision().unwrap()).unwrap();
    let id = entry.volume.id;
    lease::acquire(one, id, &holder(1), Acquire::default()).unwrap();
    let (server, pool) = (ServerId::from_bytes([3; 16]), pool(3));
    let new = Step::AddSpare { server, pool, at_ms: 5, counts: false }.apply(&entry.shard);
    members::change(one, id, Epoch(1), holder(1).id, &entry.shard, &new).unwrap();
    let again = lease::acquire(two, id, &holder(1), Acquire::default()).unwrap();
    assert_eq!(again.volume.epoch, Epoch(2), "opened while a member is provisioning");
    let all = two.volumes().unwrap();
    assert!(matches!(&volumes::tasks(&all, server, pool)[..], [Task::Provision(_)]));
    assert!(volumes::provisioned(two, id, server, pool).unwrap());
    assert!(!volumes::provisioned(one, id, server, pool).unwrap());
    let entry = one.volume(id).unwrap().unwrap();
    assert_eq!(entry.shard.members[1].role, Role::CatchingUp, "it was never filled");
    let left = Step::Remove { server }.apply(&entry.shard);
    members::change(one, id, Epoch(2), holder(1).id, &entry.shard, &left).unwrap();
    let all = two.volumes().unwrap();
    assert!(matches!(&volumes::tasks(&all, server, pool)[..], [Task::Remove(_)]));
    volumes::removed(two, id, server, pool).unwrap();
    assert_eq!(one.volume(id).unwrap().unwrap().shard.members, shard(1).members);
}

fn repairers_give_way(one: &dyn ClusterStore, two: &dyn ClusterStore) {
    let entry = one.insert_volume(&volume(1, "a"), &shard(1), one.revision().unwrap()).unwrap();
    let id = entry.volume.id;
    let servers = [running_server(one, 1, 100), running_server(one, 2, 100)];
    let own = |number: usize, repair| {
        let id = HolderId::from_bytes(servers[number].bytes());
        Holder { id, name: format!("server s{}", number + 1), repair, yieldable: false }
    };
    let repair = |number| lease::acquire_repair(two, id, &own(number, true), Epoch::NONE);
    assert_eq!(repair(0).unwrap().volume.epoch, Epoch(1));
    assert_eq!(repair(0).unwrap().volume.epoch, Epoch(2), "it died and is back");
    assert!(matches!(repair(1), Err(AcquireError::Held { .. })), "the other one runs");
    one.heartbeat(&Heartbeat { stopping: true, ..beat(servers[0], 1, 100) }).unwrap();
    assert_eq!(repair(1).unwrap().volume.holder, Some(own(1, true)), "the other one is gone");
    let served = lease::acquire(one, id, &holder(9), Acquire::default()).unwrap();
    assert_eq!((served.volume.epoch, served.volume.holder), (Epoch(4), Some(holder(9))));
    assert!(matches!(repair(1), Err(AcquireError::Held { .. })), "never over one that serves");
    assert!(lease::release(one, id, holder(9).id, Epoch(4)).unwrap());
    lease::acquire(one, id, &own(1, false), Acquire::default()).unwrap();
    assert!(matches!(repair(1), Err(AcquireError::Held { .. })), "not over itself either");
    assert!(lease::release(one, id, own(1, false).id, Epoch(5)).unwrap());
    repair(1).unwrap();
    volumes::delete(one, id).unwrap();
    assert!(matches!(repair(1), Err(AcquireError::Deleted { .. })));
}

fn failover_servers_are_named(one: &dyn ClusterStore, two: &dyn ClusterStore) {
    let ids: Vec<_> = (1..=4).map(|number| running_server(one, number, 64 << 20)).collect();
    let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
    let new = |failover: &[&str]| NewVolume { failover: names(failover), ..new_volume("v", 2) };
    let text = volumes::create(one, &new(&["s4", "s9"])).unwrap_err().to_string();
    assert!(text.contains("no server 's9'"), "{text}");
    let text = volumes::create(one, &new(&["s4", "s1", "s2"])).unwrap_err().to_string();
    assert!(text.contains("1 ready (s3)") && text.contains("s1: is to be a failover"), "{text}");
    let made = volumes::create(one, &new(&["s4", "s1"])).unwrap();
    let members: Vec<_> = made.shard.members.iter().map(|member| member.server).collect();
    assert!(members.contains(&ids[1]) && members.contains(&ids[2]), "not those: {members:?}");
    assert_eq!(made.shard.failover, [ids[3], ids[0]]);
    let name = |list: &[&str]| name_failover(two, made.volume.id, &names(list));
    assert_eq!(name(&["s1"]).unwrap().shard.failover, [ids[0], ids[3]]);
    let revision = one.revision().unwrap();
    assert_eq!(name(&["s1"]).unwrap(), one.volume(made.volume.id).unwrap().unwrap());
    assert_eq!(one.revision().unwrap(), revision, "that was so");
    assert!(matches!(name(&["s1", "s1"]), Err(NamedError::Twice(_))));
    assert!(matches!(name(&["s2"]), Err(NamedError::Member(_))));
    assert!(matches!(name(&["s1", "s2", "s3", "s4"]), Err(NamedError::TooMany(4))));
    servers::drain(one, "s4", false).unwrap();
    assert!(
        name(&["s4"])
            .unwrap_err()
            .to_string()
            .contains("'s4' cannot be a failover server: is being")
    );
    assert_eq!(one.volume(made.volume.id).unwrap().unwrap().shard.preferred_failover, [ids[0]]);
    assert_eq!(name(&[]).unwrap().shard.preferred_failover, []);
    volumes::delete(one, made.volume.id).unwrap();
    assert!(matches!(name(&["s1"]), Err(NamedError::Store(_))), "it is gone");
}

fn servers_are_drained_if_there_is_room(one: &dyn ClusterStore, two: &dyn ClusterStore) {
    let first = running_server(one, 1, 16 << 20);
    running_server(one, 2, 4 << 20);
    let refused = servers::drain(one, "s9", false).unwrap_err();
    assert!(matches!(refused, DrainError::NotFound(_)));
    for name in ["v", "w"] {
        let made = volumes::create(one, &new_volume(name, 1)).unwrap();
        let member = made.shard.members[0];
        assert_eq!(member.server, first, "it has most room");
        volumes::provisioned(one, made.volume.id, member.server, member.pool).unwrap();
    }
    let refused = servers::drain(one, "s1", false).unwrap_err().to_string();
    for part in [": its last copy is here, and no other", "4194304 needed", "--force"] {
        assert!(refused.contains(part), "{part} in {refused}");
    }
    running_server(two, 3, 4 << 20);
    let entry = servers::drain(two, "s1", false).unwrap();
    assert!(entry.server.draining.is_some() && entry.is_alive(crate::unix_ms()));
    assert_eq!(servers::drain(one, "s1", false).unwrap(), entry, "once is enough");
    let remaining = Remaining::on(&entry, &one.volumes().unwrap());
    assert_eq!(remaining.replicas, ["v", "w"]);
    assert!(remaining.held.is_empty() && !remaining.is_empty());
    let full = volumes::create(one, &NewVolume { size_bytes: 5 << 20, ..new_volume("x", 1) });
    let full = full.unwrap_err().to_string();
    assert!(full.contains("s1: is being drained"), "{full}");
    assert_eq!(servers::undrain(two, "s1").unwrap().server.draining, None);
    assert_eq!(servers::undrain(two, "s1").unwrap().server.draining, None);
    servers::drain(one, "s2", true).unwrap();
    servers::drain(one, "s3", false).unwrap();
    servers::drain(one, "s1", true).unwrap();
}

fn servers_are_forgotten_if_nobody_needs_them(one: &dyn ClusterStore, two: &dyn ClusterStore) {
    let ids: Vec<_> = (1..=3).map(|number| running_server(one, number, 64 << 20)).collect();
    for (name, replicas) in [("single", 1), ("triple", 3)] {
        let made = volumes::create(one, &new_volume(name, replicas)).unwrap();
        for member in &made.shard.members {
            volumes::provisioned(two, made.volume.id, member.server, member.pool).unwrap();
        }
    }
    let single = one.volume_named("single").unwrap().unwrap();
    let holds = ids.iter().position(|id| *id == single.shard.members[0].server).unwrap();
    let names = ["s1", "s2", "s3"];
    let spare = names[(holds + 1) % 3];
    assert!(matches!(servers::remove(two, "s7", true), Err(RemoveError::NotFound(_))));
    assert!(matches!(servers::remove(two, spare, true), Err(RemoveError::Running(_))));
    for (number, id) in (1..).zip(&ids) {
        one.heartbeat(&Heartbeat { stopping: true, ..beat(*id, number, 64 << 20) }).unwrap();
    }
    let text = servers::remove(two, names[holds], true).unwrap_err().to_string();
    assert!(text.contains("copies that single cannot do without"), "{text}");
    let text = servers::remove(two, spare, false).unwrap_err().to_string();
    assert!(text.contains("keeps replicas of triple") && text.contains("--force"), "{text}");
    servers::remove(two, spare, true).unwrap();
    assert!(servers::named(one, spare).unwrap().is_none());
}
