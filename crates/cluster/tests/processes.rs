//! Several processes open a store that does not exist yet, at once, and race for epochs: the
//! store is made once, and no epoch is given twice.

#![allow(clippy::unwrap_used, reason = "a test and its helpers")]

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Command, Stdio};

use base::{
    BlockSize, Durability, Epoch, Holder, HolderId, Policy, ShardIndex, ShardRecord, VolumeId,
    VolumeRecord,
};
use cluster::lease::{self, Acquire};
use cluster::{ClusterStore, Create, SqliteStore, StoreErrorKind};

const PATH: &str = "HOLDFAST_TEST_STORE";
const PROCESSES: u64 = 4;
const EPOCHS_EACH: u64 = 15;

fn volume() -> VolumeRecord {
    VolumeRecord {
        id: VolumeId::from_bytes([1; 16]),
        name: "v".to_owned(),
        size_bytes: 4096,
        block_size: BlockSize::B4096,
        policy: Policy {
            replicas: 1,
            durability: Durability::Flush,
            stall_deadline_ms: None,
            read_only: false,
        },
        epoch: Epoch::NONE,
        holder: None,
    }
}

/// Inserts the volume unless another process did.
fn insert(store: &dyn ClusterStore) {
    let id = volume().id;
    let shard = ShardRecord {
        volume: id,
        shard: ShardIndex(0),
        members: Vec::new(),
        failover: Vec::new(),
        preferred_failover: Vec::new(),
        moves: Vec::new(),
    };
    while store.volume(id).unwrap().is_none() {
        match store.insert_volume(&volume(), &shard, store.revision().unwrap()) {
            Ok(_) => {}
            Err(error) => match error.kind {
                StoreErrorKind::Conflict | StoreErrorKind::VolumeNameTaken(_) => {}
                other => panic!("{other}"),
            },
        }
    }
}

/// Not a test of its own: what each process does. Prints the cluster id and the epochs it got.
#[test]
#[ignore = "run by the other test, in processes of its own"]
fn one_process() {
    let Some(path) = std::env::var_os(PATH) else {
        println!("SKIPPED: it is only run by the other test");
        return;
    };
    let store = SqliteStore::open(Path::new(&path), Create::IfMissing).unwrap();
    insert(&store);
    println!("cluster {}", store.cluster_id().unwrap());
    let me = Holder {
        id: HolderId::from_bytes(cluster::new_id()),
        name: "racer".to_owned(),
        repair: false,
        yieldable: false,
    };
    for _ in 0..EPOCHS_EACH {
        let how = Acquire { force: true, ..Acquire::default() };
        let entry = lease::acquire(&store, volume().id, &me, how).unwrap();
        println!("got {}", entry.volume.epoch.0);
    }
}

#[test]
fn processes_share_a_store() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("cluster.db");
    let start = || {
        Command::new(std::env::current_exe().unwrap())
            .args(["one_process", "--exact", "--ignored", "--nocapture"])
            .env(PATH, &path)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap()
    };
    let children: Vec<_> = (0..PROCESSES).map(|_| start()).collect();
    let (mut epochs, mut clusters) = (Vec::new(), BTreeSet::new());
    for child in children {
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success());
        for line in String::from_utf8(output.stdout).unwrap().lines() {
            if let Some(epoch) = line.strip_prefix("got ") {
                epochs.push(epoch.parse::<u64>().unwrap());
            } else if let Some((_, id)) = line.split_once("cluster ") {
                clusters.insert(id.to_owned());
            }
        }
    }
    epochs.sort_unstable();
    assert_eq!(epochs, (1..=PROCESSES * EPOCHS_EACH).collect::<Vec<_>>());
    assert_eq!(clusters.len(), 1, "one store was made: {clusters:?}");
}
