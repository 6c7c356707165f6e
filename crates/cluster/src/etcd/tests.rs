//! The store against real members: one, three, members that die, answers that get lost, backups.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use base::{Epoch, Holder, HolderId};
use serde_json::json;

use super::EtcdStore;
use super::client::{Client, OPERATION};
use super::wire::{Reply, delete, get, put};
use crate::conformance::{self, Opened};
use crate::error::StoreErrorKind;
use crate::lease::{self, Acquire};
use crate::store::{ClusterStore, Create, Swapped};
use harness::{Etcd, Lossy, copy, eventually, shared, skipped};

mod harness;

fn holder(number: u8) -> Holder {
    let id = HolderId::from_bytes([number; 16]);
    Holder { id, name: format!("holder {number}"), repair: false, yieldable: false }
}

/// A new volume, never opened.
fn insert(store: &dyn ClusterStore, number: u8) -> base::VolumeId {
    let (volume, shard) = (conformance::volume(number, "v"), conformance::shard(number));
    store.insert_volume(&volume, &shard, store.revision().unwrap()).unwrap();
    volume.id
}

fn acquire(store: &dyn ClusterStore, id: base::VolumeId) -> Epoch {
    let how = Acquire { force: true, ..Acquire::default() };
    lease::acquire(store, id, &holder(1), how).unwrap().volume.epoch
}

fn open_error(etcd: &Etcd, prefix: &str, create: Create) -> String {
    let opened = EtcdStore::open(&etcd.endpoints(), prefix, create);
    opened.err().expect("opening fails").to_string()
}

#[test]
fn conforms() {
    if skipped("conforms") {
        return;
    }
    let etcd = Etcd::start(1);
    let next = AtomicU64::new(0);
    conformance::run(|| -> Opened {
        let prefix = format!("test/{}", next.fetch_add(1, Ordering::Relaxed));
        let one = etcd.open(&prefix, Create::IfMissing);
        let two = etcd.open(&prefix, Create::Never);
        (Box::new(one), Box::new(two), Box::new(()))
    });
}

#[test]
fn conforms_though_answers_get_lost() {
    if skipped("conforms_though_answers_get_lost") {
        return;
    }
    let etcd = Etcd::start(1);
    let next = AtomicU64::new(0);
    let proxy = Lossy::start(etcd.endpoints().remove(0), 3);
    conformance::run_apart(|| -> Opened {
        let prefix = format!("test/{}", next.fetch_add(1, Ordering::Relaxed));
        let open =
            || EtcdStore::open(std::slice::from_ref(&proxy.endpoint), &prefix, Create::IfMissing);
        (Box::new(open().unwrap()), Box::new(open().unwrap()), Box::new(()))
    });
    assert!(proxy.lost.load(Ordering::Relaxed) > 50, "answers were lost");
}

#[test]
fn what_is_no_store_of_ours_is_refused_and_left_alone() {
    if skipped("what_is_no_store_of_ours_is_refused_and_left_alone") {
        return;
    }
    let etcd = Etcd::start(1);
    let missing = open_error(&etcd, "hf", Create::Never);
    assert!(missing.contains("no such store") && missing.starts_with("cluster store etcd://127"));
    let client = Client::new(etcd.endpoints());
    let write = |operation| {
        client.call("/v3/kv/txn", &json!({ "success": [operation] })).unwrap();
    };
    write(put("/hf/other", "x"));
    let foreign = open_error(&etcd, "hf", Create::IfMissing);
    assert!(foreign.contains("not a Holdfast cluster store"), "{foreign}");
    let store = etcd.open("ours", Create::IfMissing);
    let id = insert(&store, 1);
    // Stores of other prefixes do not see each other, nor those whose prefix ours begins with.
    let other = etcd.open("ours2", Create::IfMissing);
    assert_ne!(store.cluster_id().unwrap(), other.cluster_id().unwrap());
    assert_eq!(other.volumes().unwrap(), []);
    // A damaged record is an error, not an absence.
    let key = format!("/ours/volumes/{id}");
    let read = client.call("/v3/kv/txn", &json!({ "success": [get(&key)] })).unwrap();
    let good = Reply::parse(read.body).unwrap().found.remove(0).remove(0).value;
    write(put(&key, "{}"));
    let damaged = store.volumes().unwrap_err();
    assert!(matches!(damaged.kind, StoreErrorKind::Damaged(_)), "{damaged}");
    assert!(store.volume(id).is_err());
    write(put(&key, std::str::from_utf8(&good).unwrap()));
    assert!(store.volume(id).unwrap().is_some());
    // Another store in this one's place: neither read nor written.
    let identity = store.identity.clone();
    write(delete("/ours/cluster"));
    assert!(matches!(store.volumes().unwrap_err().kind, StoreErrorKind::Replaced));
    let newer = r#"{"cluster":"5f7c2b52-3ad0-4d5a-9f6e-0f3f0d6f3f11","layout":9}"#;
    write(put("/ours/cluster", newer));
    assert!(matches!(store.revision().unwrap_err().kind, StoreErrorKind::Replaced));
    let commit = store.append_event(&crate::Event {
        at_ms: 1,
        kind: crate::EventKind::Opened,
        volume: None,
        server: None,
        text: String::new(),
        cause: String::new(),
    });
    assert!(matches!(commit.unwrap_err().kind, StoreErrorKind::Replaced));
    let refused = open_error(&etcd, "ours", Create::IfMissing);
    assert!(refused.contains("schema 9"), "{refused}");
    write(put("/ours/cluster", &identity));
    assert!(store.volumes().is_ok());
}

#[test]
fn members_die_and_come_back_while_epochs_are_given() {
    if skipped("members_die_and_come_back_while_epochs_are_given") {
        return;
    }
    let mut etcd = Etcd::start(3);
    let store = shared(etcd.open("hf", Create::IfMissing));
    let id = insert(store.as_ref(), 1);
    let (given, stop) = (AtomicU64::new(0), std::sync::atomic::AtomicBool::new(false));
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..2)
            .map(|_| {
                let (store, given, stop) = (&store, &given, &stop);
                scope.spawn(move || {
                    let mut epochs = Vec::new();
                    while !stop.load(Ordering::Relaxed) {
                        let how = Acquire { force: true, ..Acquire::default() };
                        // A leader that is being elected takes a while: errors may be, twice the
                        // same epoch may not.
                        let got = lease::acquire(store.as_ref(), id, &holder(1), how);
                        if let Ok(entry) = got {
                            epochs.push(entry.volume.epoch.0);
                            given.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                    epochs
                })
            })
            .collect();
        let more = |what: &str| {
            let before = given.load(Ordering::Relaxed);
            eventually(what, || given.load(Ordering::Relaxed) >= before + 10);
        };
        more("three members");
        for round in 0..2 {
            let leader = etcd.leader();
            etcd.kill(leader);
            more(&format!("two members, round {round}"));
            etcd.resume(leader);
            more(&format!("the third is back, round {round}"));
        }
        stop.store(true, Ordering::Relaxed);
        let mut all: Vec<_> =
            workers.into_iter().flat_map(|worker| worker.join().unwrap()).collect();
        let count = all.len();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), count, "no epoch is given twice");
    });
    // What one store changes, the other one notices, though the member it watched dies.
    let other = etcd.open("hf", Create::Never);
    let seen = other.revision().unwrap();
    let noticed = std::thread::scope(|scope| {
        let waiter = scope.spawn(|| other.wait_for_change(seen, Duration::from_secs(30)));
        let follower = (0..3).find(|at| *at != etcd.leader()).unwrap();
        etcd.kill(follower);
        acquire(store.as_ref(), id);
        waiter.join().unwrap()
    });
    assert!(noticed.unwrap() > seen);
}

#[test]
fn without_quorum_it_says_so_in_time_and_goes_on_when_it_is_back() {
    if skipped("without_quorum_it_says_so_in_time_and_goes_on_when_it_is_back") {
        return;
    }
    let mut etcd = Etcd::start(3);
    let store = etcd.open("hf", Create::IfMissing);
    let id = insert(&store, 1);
    let before = acquire(&store, id);
    etcd.kill(0);
    etcd.kill(1);
    let start = Instant::now();
    let how = Acquire { force: true, ..Acquire::default() };
    let (read, write) = std::thread::scope(|scope| {
        let read = scope.spawn(|| store.volumes().unwrap_err());
        let write = lease::acquire(&store, id, &holder(2), how).unwrap_err().to_string();
        (read.join().unwrap(), write)
    });
    assert!(start.elapsed() < OPERATION + Duration::from_secs(8), "{:?}", start.elapsed());
    for text in [read.to_string(), write] {
        assert!(text.contains("etcd has no quorum: 1 of 3 endpoints answer"), "{text}");
        assert!(text.contains("start the other members"), "{text}");
    }
    assert!(read.may_have_happened());
    etcd.kill(2);
    let text = store.revision().unwrap_err().to_string();
    assert!(text.contains("none of the 3 etcd endpoints answers"), "{text}");
    for at in 0..3 {
        etcd.resume(at);
    }
    etcd.wait();
    assert_eq!(store.volume(id).unwrap().unwrap().volume.epoch, before, "nothing was done late");
    assert_eq!(acquire(&store, id), before.next());
}

#[test]
fn an_old_backup_is_noticed_and_its_epochs_are_left_behind() {
    if skipped("an_old_backup_is_noticed_and_its_epochs_are_left_behind") {
        return;
    }
    let mut etcd = Etcd::start(1);
    let store = etcd.open("hf", Create::IfMissing);
    let id = insert(&store, 1);
    let old = acquire(&store, id);
    etcd.kill(0);
    let backup = etcd.directory.path().join("backup");
    copy(&etcd.data(0), &backup);
    etcd.resume(0);
    etcd.wait();
    let stale = store.volume(id).unwrap().unwrap();
    let known: Vec<_> = (0..5)
        .map(|_| {
            acquire(&store, id);
            store.volume(id).unwrap().unwrap()
        })
        .collect();
    let seen = store.revision().unwrap();
    etcd.kill(0);
    std::fs::remove_dir_all(etcd.data(0)).unwrap();
    copy(&backup, &etcd.data(0));
    etcd.resume(0);
    etcd.wait();
    let noticed = store.wait_for_change(seen, Duration::from_secs(30)).unwrap();
    assert!(noticed < seen, "the picture is another one");
    assert_eq!(store.volume(id).unwrap(), Some(stale), "that of the backup");
    // Members have sealed up to old + 5: whoever opens is told, and goes above.
    let how = Acquire { force: true, above: Epoch(old.0 + 5), ..Acquire::default() };
    let taken = lease::acquire(&store, id, &holder(1), how).unwrap();
    assert_eq!(taken.volume.epoch, Epoch(old.0 + 6));
    // etcd gives its revisions out once more: what was known of one of them is not taken for what is
    // there now, nor by who has kept it in mind.
    let known = known.into_iter().find(|known| known.versions.volume == taken.versions.volume);
    let known = known.expect("a revision that was given out twice");
    assert_ne!(known.versions, taken.versions);
    assert_eq!(store.swap_volume(&known).unwrap(), Swapped::Refused(Box::new(taken.clone())));
    store.note(&super::Known { value: "{}".to_owned(), entry: known.clone() });
    assert_eq!(store.swap_volume(&known).unwrap(), Swapped::Refused(Box::new(taken.clone())));
    assert_eq!(store.volume(id).unwrap(), Some(taken));
}
