//! What `holdfast` prints and how it exits, on real stores and real files.

#![allow(clippy::unwrap_used, reason = "a test and its helpers")]

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use base::{Holder, HolderId, PoolId, Role, ServerId};
use cluster::lease::{self, Acquire};
use cluster::{
    ClusterStore, Create, Event, EventKind, FillReport, Heartbeat, MemberReport, Problem, Rates,
    StallReport, VolumeStatus, servers, unix_ms, volumes,
};
use serde_json::Value;

struct Bench {
    directory: tempfile::TempDir,
    store: Arc<dyn ClusterStore>,
}

struct Ran {
    status: i32,
    out: String,
    err: String,
}

impl Ran {
    fn json(&self) -> Value {
        assert_eq!(self.status, 0, "{}", self.err);
        serde_json::from_str(&self.out).unwrap()
    }

    /// It failed with this status, saying all of these.
    fn refused(&self, status: i32, parts: &[&str]) {
        assert_eq!(self.status, status, "{}{}", self.out, self.err);
        for part in parts {
            assert!(self.err.contains(part), "{part} in {}", self.err);
        }
    }
}

fn holdfast(arguments: &[&str]) -> Ran {
    let output = Command::new(env!("CARGO_BIN_EXE_holdfast"))
        .args(arguments)
        .env_remove("HOLDFAST_STORE")
        .env_remove("HOLDFAST_API")
        .output()
        .unwrap();
    Ran {
        status: output.status.code().unwrap(),
        out: String::from_utf8(output.stdout).unwrap(),
        err: String::from_utf8(output.stderr).unwrap(),
    }
}

impl Bench {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let address = format!("sqlite:{}", directory.path().join("c.db").display());
        let store = cluster::open(&address.parse().unwrap(), Create::IfMissing).unwrap();
        Self { directory, store }
    }

    fn path(&self, name: &str) -> String {
        self.directory.path().join(name).display().to_string()
    }

    fn run(&self, arguments: &[&str]) -> Ran {
        let store = self.store.address();
        let mut all = vec!["--json", "--store", &store];
        all.extend(arguments);
        holdfast(&all)
    }

    /// Registers servers `s1`… and has them say that they run.
    fn servers(&self, count: u8) {
        (1..=count).for_each(|number| self.server(number));
    }

    fn server(&self, number: u8) {
        let name = format!("s{number}");
        let pool = PoolId::from_bytes([number; 16]);
        let id = servers::id_for(self.store.as_ref(), &name, false).unwrap();
        servers::register(self.store.as_ref(), id, &name, pool).unwrap();
        self.beat(id, pool);
    }

    fn beat(&self, server: ServerId, pool: PoolId) {
        self.store.heartbeat(&heartbeat(server, pool)).unwrap();
    }

    /// The server says that it stops.
    fn stop(&self, number: u8) {
        let name = format!("s{number}");
        let entry = servers::named(self.store.as_ref(), &name).unwrap().unwrap();
        let last = heartbeat(entry.server.id, entry.server.pool);
        self.store.heartbeat(&Heartbeat { stopping: true, ..last }).unwrap();
    }

    /// Does what the servers of all volumes are to do.
    fn provision(&self) {
        for entry in self.store.volumes().unwrap() {
            for member in &entry.shard.members {
                let id = entry.volume.id;
                volumes::provisioned(self.store.as_ref(), id, member.server, member.pool).unwrap();
                volumes::removed(self.store.as_ref(), id, member.server, member.pool).unwrap();
            }
        }
    }

    fn format(&self, name: &str, more: &[&str]) -> Ran {
        let (fast, mass) = (self.path(&format!("{name}.fast")), self.path(&format!("{name}.mass")));
        let mut all = vec!["pool", "format", "--name", name, "--fast", &fast, "--mass", &mass];
        all.extend(more);
        self.run(&all)
    }
}

#[test]
fn a_volume_from_creation_to_deletion() {
    let bench = Bench::new();
    bench.servers(3);
    let made = bench.run(&["volume", "create", "disk1", "--size", "4G", "--wait", "0"]).json();
    assert_eq!(
        (&made["state"], &made["size_bytes"]),
        (&"provisioning".into(), &(4_u64 << 30).into())
    );
    assert_eq!(made["members"].as_array().unwrap().len(), 3);
    bench
        .run(&["volume", "create", "disk1", "--size", "4G"])
        .refused(4, &["named 'disk1' already"]);
    bench.provision();
    let shown = bench.run(&["volume", "show", "disk1"]).json();
    assert_eq!((&shown["state"], &shown["holder"]), (&"ready".into(), &Value::Null));
    assert_eq!(shown["members"][0]["role"], "in_sync");
    assert_eq!(bench.run(&["volume", "show", shown["id"].as_str().unwrap()]).json(), shown);
    let listed = bench.run(&["volume", "list"]).json();
    assert_eq!(listed[0]["name"], "disk1");
    let listed = bench.run(&["server", "list"]).json();
    assert_eq!((&listed[2]["name"], &listed[2]["state"]), (&"s3".into(), &"up".into()));
    assert_eq!(listed[0]["promised_bytes"], 4_u64 << 30);

    let id = shown["id"].as_str().unwrap().parse().unwrap();
    let other = Holder {
        id: HolderId::from_bytes([9; 16]),
        name: "server s9".to_owned(),
        repair: false,
        yieldable: false,
    };
    lease::acquire(bench.store.as_ref(), id, &other, Acquire::default()).unwrap();
    bench.run(&["volume", "delete", "disk1"]).refused(4, &["in use by server s9", "--force"]);
    let socket = bench.path("v.sock");
    let attach = ["attach", "disk1", "--socket", &socket];
    bench.run(&attach).refused(4, &["attached elsewhere", "server s9", "--force"]);
    assert!(!PathBuf::from(&socket).exists());
    bench.run(&["volume", "release", "disk1"]).refused(4, &["held by server s9"]);
    let released = bench.run(&["volume", "release", "disk1", "--force"]).json();
    assert_eq!(released["state"], "released");
    assert_eq!(bench.run(&["volume", "delete", "disk1"]).json()["state"], "deleting");
    bench.run(&["volume", "show", "disk1"]).refused(3, &["no volume 'disk1'"]);
    bench.run(&attach).refused(3, &["no volume 'disk1'"]);
    bench.provision();
    assert_eq!(bench.run(&["volume", "list"]).json(), Value::Array(Vec::new()));
}

#[test]
fn creations_that_cannot_be() {
    let bench = Bench::new();
    bench.servers(2);
    let create = |more: &[&str]| {
        let mut all = vec!["volume", "create", "v"];
        all.extend(more);
        bench.run(&all)
    };
    create(&["--size", "1000001"]).refused(2, &["not a multiple of the block size 4096"]);
    create(&["--size", "0"]).refused(2, &["out of range"]);
    create(&["--size", "1G", "--replicas", "4"]).refused(2, &["4 replicas are not supported"]);
    create(&["--size", "1G", "--block-size", "1024"]).refused(2, &["block size 1024"]);
    create(&["--size", "1Q"]).refused(2, &["is not a size"]);
    create(&["--size", "1G"]).refused(5, &["too few servers: 3 replicas", "2 ready (s1, s2)"]);
    create(&["--size", "2T", "--replicas", "1"]).refused(5, &["bytes of room"]);
    assert!(bench.store.volumes().unwrap().is_empty());
    // Servers that run and do not answer are named.
    create(&["--size", "1G", "--replicas", "2", "--wait", "1"])
        .refused(5, &["was created", "s1 (up)", "s2 (up)", "volume delete v"]);
    let members = bench.store.volumes().unwrap().remove(0).shard.members;
    assert!(members.iter().all(|member| member.role == Role::Provisioning));
    let socket = bench.path("v.sock");
    bench.run(&["attach", "v", "--socket", &socket]).refused(5, &["2 of 2 replicas"]);
}

#[test]
fn failover_servers_by_name() {
    let bench = Bench::new();
    bench.servers(4);
    let create = ["volume", "create", "v", "--size", "1G", "--replicas", "2", "--wait", "0"];
    let with = |servers| bench.run(&[&create[..], &["--failover", servers]].concat());
    with("s9").refused(3, &["no server 's9'", "server list"]);
    with("s1,s1").refused(2, &["'s1' is named twice"]);
    with("s1,s2,s3").refused(5, &["1 ready (s4)", "s2: is to be a failover server"]);
    let made = with("s3,s1").json();
    assert_eq!(made["failover"], serde_json::json!(["s3", "s1"]));
    let failover = |more: &[&str]| bench.run(&[&["volume", "failover", "v"], more].concat());
    failover(&[]).refused(2, &["SERVERS"]);
    failover(&["s2"]).refused(4, &["'s2' keeps a replica", "volume show"]);
    let named = failover(&["s1"]).json();
    assert_eq!(named["failover"], serde_json::json!(["s1", "s3"]));
    assert_eq!(named["preferred_failover"], serde_json::json!(["s1"]));
    assert_eq!(failover(&["--any"]).json()["preferred_failover"], serde_json::json!([]));
}

#[test]
fn stores_that_are_not_usable() {
    holdfast(&["volume", "list"]).refused(2, &["--store", "HOLDFAST_STORE"]);
    holdfast(&["--store", "etcd://127.0.0.1:1", "volume", "list"])
        .refused(6, &["none of the 1 etcd endpoints answers", "start etcd, or correct"]);
    holdfast(&["--store", "/c.db", "volume", "list"]).refused(2, &["sqlite:/path/to/file"]);
    let bench = Bench::new();
    let none = format!("sqlite:{}", bench.path("none.db"));
    holdfast(&["--store", &none, "volume", "list"]).refused(6, &["no such store"]);
    std::fs::write(bench.path("text"), "not a database, but long enough to be looked at").unwrap();
    let text = format!("sqlite:{}", bench.path("text"));
    holdfast(&["--store", &text, "volume", "list"]).refused(6, &["not a Holdfast cluster store"]);
    let newer = bench.path("newer.db");
    let address = format!("sqlite:{newer}").parse().unwrap();
    drop(cluster::open(&address, Create::IfMissing).unwrap());
    let mut bytes = std::fs::read(&newer).unwrap();
    // The schema version is at byte 60 of SQLite's header.
    bytes[60..64].copy_from_slice(&99_u32.to_be_bytes());
    std::fs::write(&newer, bytes).unwrap();
    let newer = format!("sqlite:{newer}");
    holdfast(&["--store", &newer, "volume", "list"]).refused(6, &["newer version of Holdfast"]);
}

#[test]
fn pools_are_formatted_once_and_never_over_something_else() {
    let bench = Bench::new();
    bench.format("a", &[]).refused(2, &["a.fast", "a.mass", "--size"]);
    bench.format("a b", &["--size", "1G"]).refused(2, &["cannot be a name"]);
    let sizes = ["--fast-size", "64M", "--mass-size", "256M"];
    let made = bench.format("a", &sizes).json();
    assert_eq!((&made["name"], &made["devices"][1]["bytes"]), (&"a".into(), &(256 << 20).into()));
    let label = target_daemon::pool::read_label(&PathBuf::from(bench.path("a.mass"))).unwrap();
    assert_eq!(label.pool.to_string(), made["pool"].as_str().unwrap());
    assert_eq!(label.server.to_string(), made["server"].as_str().unwrap());
    assert_eq!(label.cluster, bench.store.cluster_id().unwrap());

    bench.format("a", &sizes).refused(4, &["server 'a' has a pool already"]);
    let (fast, mass) = (bench.path("a.fast"), bench.path("a.mass"));
    let other = ["pool", "format", "--name", "b", "--fast", &fast, "--mass", &mass];
    bench.run(&other).refused(4, &["holds a Holdfast pool", "--force"]);
    let lock = std::fs::File::open(&fast).unwrap();
    target_daemon::pool::lock(fast.as_ref(), &lock).unwrap();
    bench.format("a", &["--force"]).refused(4, &["a.fast is in use by another process"]);
    drop(lock);
    let again = bench.format("a", &["--force"]).json();
    assert_eq!(again["server"], made["server"], "the server keeps its id");
    assert_ne!(again["pool"], made["pool"]);

    let mut disk = vec![0; 64 << 20];
    disk[1080..1082].copy_from_slice(b"\x53\xef");
    std::fs::write(bench.path("c.fast"), &disk).unwrap();
    bench
        .format("c", &["--mass-size", "256M"])
        .refused(4, &["c.fast holds an ext2, ext3 or ext4 file system"]);
    assert!(std::fs::read(bench.path("c.fast")).unwrap() == disk, "left alone");
    assert!(!PathBuf::from(bench.path("c.mass")).exists(), "what was made is removed again");
    bench.format("c", &["--mass-size", "256M", "--force"]).json();

    bench.format("d", &["--size", "64K"]).refused(2, &["d.fast", "too small"]);
    assert!(!PathBuf::from(bench.path("d.fast")).exists());
    let missing = ["pool", "format", "--name", "d", "--fast", "/dev/no-such-disk"];
    bench.run(&missing).refused(2, &["no device /dev/no-such-disk"]);
    let twice = ["pool", "format", "--name", "d", "--force", "--fast", &fast, "--mass", &fast];
    bench.run(&twice).refused(2, &["a.fast: it is given twice"]);
    assert_eq!(bench.store.servers().unwrap().len(), 2);
}

#[test]
fn sockets_that_cannot_be() {
    let bench = Bench::new();
    bench.servers(1);
    bench.run(&["volume", "create", "v", "--size", "1G", "--replicas", "1", "--wait", "0"]).json();
    bench.provision();
    let attach = |socket: &str| bench.run(&["attach", "v", "--socket", socket]);
    attach("/no/such/directory/v.sock").refused(1, &["make it first"]);
    attach(&format!("/{}", "x".repeat(200))).refused(2, &["at most 107"]);
    let file = bench.path("file");
    std::fs::write(&file, b"precious").unwrap();
    attach(&file).refused(4, &["is no socket"]);
    assert_eq!(std::fs::read(&file).unwrap(), b"precious");
    let busy = bench.path("busy");
    let _listener = std::os::unix::net::UnixListener::bind(&busy).unwrap();
    attach(&busy).refused(4, &["another process listens"]);
    let volume = bench.store.volume_named("v").unwrap().unwrap().volume;
    assert_eq!((volume.holder, volume.epoch.0), (None, 0), "refused before the lease is touched");
}

#[test]
fn daemons_that_are_not_there() {
    let bench = Bench::new();
    let api = bench.path("api");
    holdfast(&["status"]).refused(2, &["--api"]);
    holdfast(&["status", "--api", &api]).refused(6, &["no daemon answers", &api]);
    let socket = bench.path("v");
    holdfast(&["export", "add", "v", "--socket", &socket, "--api", &api])
        .refused(6, &["is it running"]);
}

/// What the head of `volume` would publish, with its second member being filled.
fn published(entry: &cluster::VolumeEntry, holder: &str, written_ms: u64) -> VolumeStatus {
    let member = |(index, member): (usize, &base::Member)| MemberReport {
        server: member.server,
        role: member.role,
        mode: if index == 1 { "being filled".to_owned() } else { "live".to_owned() },
        since_ms: written_ms - 3000,
        connected: true,
        last: 900,
        durable: 850,
        lag: Some(if index == 1 { 100 } else { 0 }),
        slow: false,
        draining: false,
        fill: (index == 1).then_some(FillReport {
            copied_bytes: 1 << 30,
            total_bytes: 4 << 30,
            bytes_per_second: 1 << 28,
        }),
    };
    VolumeStatus {
        volume: entry.volume.id,
        epoch: entry.volume.epoch,
        holder: holder.to_owned(),
        written_ms,
        phase: "stalled".to_owned(),
        stall: Some(StallReport {
            reason: "1 of 3 members in sync reachable, 2 needed".to_owned(),
            since_ms: written_ms - 7000,
        }),
        size_bytes: 0,
        last: 1000,
        commit: 990,
        in_flight: 4,
        queued: 0,
        rates: Rates::default(),
        members: entry.shard.members.iter().enumerate().map(member).collect(),
    }
}

#[test]
fn what_a_holder_tells_is_shown_with_its_age() {
    let bench = Bench::new();
    bench.servers(3);
    bench.run(&["volume", "create", "v", "--size", "4G", "--wait", "0"]).json();
    bench.provision();
    let store = bench.store.as_ref();
    let id = store.volume_named("v").unwrap().unwrap().volume.id;
    assert_eq!(bench.run(&["volume", "show", "v"]).json()["health"], "healthy");
    let me = Holder {
        id: HolderId::from_bytes([9; 16]),
        name: "server s9".to_owned(),
        repair: false,
        yieldable: false,
    };
    let entry = lease::acquire(store, id, &me, Acquire::default()).unwrap();
    let shown = bench.run(&["volume", "show", "v"]).json();
    assert_eq!((&shown["health"], &shown["head"]), (&"unknown".into(), &Value::Null));

    let now = unix_ms();
    store.put_statuses(&[published(&entry, "server s9", now)]).unwrap();
    let shown = bench.run(&["volume", "show", "v"]).json();
    assert_eq!((&shown["health"], &shown["head"]["current"]), (&"stalled".into(), &true.into()));
    assert!(shown["head"]["stalled"]["for_ms"].as_u64().unwrap() >= 7000);
    let fill = &shown["members"][1]["seen"]["fill"];
    assert_eq!((&fill["seconds_left"], &fill["total_bytes"]), (&12.into(), &(4_u64 << 30).into()));
    let text = holdfast(&["--store", &store.address(), "volume", "show", "v"]).out;
    for part in
        ["stalled     for ", "1 GiB of 4 GiB at 256 MiB/s, 12 s left", "record 900", "100 behind"]
    {
        assert!(text.contains(part), "{part} in {text}");
    }
    let waited = bench.run(&["volume", "wait", "v", "--timeout", "0"]);
    waited.refused(5, &["is stalled", "2 needed"]);
    let top = bench.run(&["top"]).json();
    assert_eq!(
        (&top["volumes"][0]["health"], &top["servers"][0]["replicas"]),
        (&"stalled".into(), &1.into())
    );
    let screen = holdfast(&["--store", &store.address(), "top", "--once"]);
    assert!(screen.out.contains("volumes 0/1 healthy"), "{}", screen.out);
    holdfast(&["--store", &store.address(), "top"]).refused(2, &["needs a terminal", "--once"]);

    store.put_statuses(&[published(&entry, "server s9", now - 60_000)]).unwrap();
    let old = bench.run(&["volume", "show", "v"]).json();
    assert_eq!((&old["health"], &old["head"]["current"]), (&"unknown".into(), &false.into()));
    assert!(old["members"][1]["seen"].is_null(), "nothing old is shown as if it were so now");
    lease::release_forced(store, id, true).unwrap();
    assert_eq!(bench.run(&["volume", "wait", "v"]).json()["health"], "healthy");
}

fn heartbeat(server: ServerId, pool: PoolId) -> Heartbeat {
    Heartbeat {
        server,
        pool,
        addresses: Vec::new(),
        labels: BTreeMap::new(),
        capacity_bytes: 1 << 40,
        free_bytes: 1 << 40,
        version: "0.1.0".to_owned(),
        stopping: false,
        problems: Vec::new(),
    }
}

#[test]
fn servers_are_forgotten_only_when_nothing_is_lost() {
    let bench = Bench::new();
    bench.servers(4);
    bench.run(&["volume", "create", "v", "--size", "4G", "--wait", "0"]).json();
    bench.provision();
    let volume = bench.store.volume_named("v").unwrap().unwrap();
    let keeps = |number: &u8| {
        let name = format!("s{number}");
        let entry = servers::named(bench.store.as_ref(), &name).unwrap().unwrap();
        volume.shard.members.iter().any(|member| member.server == entry.server.id)
    };
    let (used, spare): (Vec<u8>, Vec<u8>) = (1..=4).partition(keeps);
    let name = |number: u8| format!("s{number}");
    bench.run(&["server", "remove", "s9"]).refused(3, &["no server 's9'", "server list"]);
    let (used, spare) = (&used[..], spare[0]);
    bench
        .run(&["server", "remove", &name(spare), "--force"])
        .refused(4, &["is running", "stop it"]);
    bench.stop(spare);
    assert_eq!(bench.run(&["server", "remove", &name(spare)]).json()["name"], name(spare).as_str());
    bench.run(&["server", "remove", &name(spare)]).refused(3, &["no server"]);
    // One that keeps a replica: not by accident.
    bench.stop(used[0]);
    let first = name(used[0]);
    let refused = bench.run(&["server", "remove", &first]);
    refused.refused(4, &["keeps replicas of v", "drain it first", "--force"]);
    bench.run(&["server", "remove", &first, "--force"]).json();
    assert_eq!(bench.run(&["server", "list"]).json().as_array().unwrap().len(), 2);
    // Of a single copy, never.
    let bench = Bench::new();
    bench.servers(1);
    bench.run(&["volume", "create", "w", "--size", "1G", "--replicas", "1", "--wait", "0"]).json();
    bench.provision();
    bench.stop(1);
    let refused = bench.run(&["server", "remove", "s1", "--force"]);
    refused.refused(5, &["copies that w cannot do without", "start it again"]);
    bench.run(&["volume", "delete", "w"]).json();
    bench.run(&["server", "remove", "s1"]).json();
}

#[test]
fn a_drain_names_what_still_holds_a_server() {
    let bench = Bench::new();
    bench.servers(4);
    bench.run(&["volume", "create", "v", "--size", "4G", "--wait", "0"]).json();
    bench.provision();
    let store = bench.store.as_ref();
    let volume = store.volume_named("v").unwrap().unwrap();
    let not_member = |entry: &cluster::ServerEntry| {
        volume.shard.members.iter().all(|member| member.server != entry.server.id)
    };
    let holder = store.servers().unwrap().into_iter().find(not_member).unwrap().server;
    let id = HolderId::from_bytes(holder.id.bytes());
    let me =
        Holder { id, name: format!("server {}", holder.name), repair: false, yieldable: false };
    lease::acquire(store, volume.volume.id, &me, Acquire::default()).unwrap();
    let wait = ["server", "drain", &holder.name, "--wait", "0"];
    bench.run(&wait).refused(5, &["the head of volume v", "has not been given back yet"]);
    let reason = "a guest uses it at /run/vm7.sock; migrate the guest or stop it".to_owned();
    let problems = vec![Problem { volume: volume.volume.id, reason }];
    store.heartbeat(&Heartbeat { problems, ..heartbeat(holder.id, holder.pool) }).unwrap();
    bench
        .run(&wait)
        .refused(5, &["volume v: a guest uses it at /run/vm7.sock", "migrate the guest"]);
    let held = store.volume_named("v").unwrap().unwrap();
    lease::release(store, held.volume.id, me.id, held.volume.epoch).unwrap();
    assert_eq!(bench.run(&wait).json()["state"], "drained");
}

#[test]
fn servers_are_drained_only_where_their_replicas_can_go() {
    let bench = Bench::new();
    bench.servers(3);
    bench.run(&["volume", "create", "v", "--size", "4G", "--wait", "0"]).json();
    bench.provision();
    bench.run(&["server", "drain", "s9"]).refused(3, &["no server 's9'", "server list"]);
    bench.run(&["server", "drain", "s1"]).refused(5, &["volume v", "--force", "add or start"]);
    assert_eq!(bench.run(&["server", "list"]).json()[0]["draining_since_ms"], Value::Null);
    let forced = bench.run(&["server", "drain", "s1", "--force"]).json();
    assert_eq!((&forced["state"], &forced["replicas"][0]), (&"draining".into(), &"v".into()));
    bench
        .run(&["server", "drain", "s1", "--wait", "0"])
        .refused(5, &["is not empty", "volume v", "server undrain s1"]);
    assert!(bench.run(&["server", "list"]).json()[0]["draining_since_ms"].is_u64());
    assert_eq!(bench.run(&["server", "undrain", "s1"]).json()["state"], "in_use");
    // With a fourth server there is room; an empty server is drained at once.
    bench.server(4);
    assert_eq!(bench.run(&["server", "drain", "s1"]).json()["state"], "draining");
    assert_eq!(bench.run(&["server", "drain", "s4", "--force"]).json()["state"], "drained");
    // The last copy.
    let bench = Bench::new();
    bench.servers(1);
    bench.run(&["volume", "create", "w", "--size", "1G", "--replicas", "1", "--wait", "0"]).json();
    bench.provision();
    bench
        .run(&["server", "drain", "s1", "--wait"])
        .refused(5, &["volume w", "its last copy is here"]);
}

#[test]
fn events_are_filtered_and_numbered() {
    let bench = Bench::new();
    bench.servers(2);
    let store = bench.store.as_ref();
    let before = store.last_event().unwrap();
    let server = |name| servers::named(store, name).unwrap().unwrap().server.id;
    for (name, kind) in [("s1", EventKind::MemberLost), ("s2", EventKind::FillStarted)] {
        let event = Event {
            at_ms: 1_795_309_200_000,
            kind,
            volume: None,
            server: Some(server(name)),
            text: format!("volume v: {name}"),
            cause: "a test".to_owned(),
        };
        store.append_event(&event).unwrap();
    }
    let lines = |more: &[&str]| -> Vec<Value> {
        let ran = bench.run(&[&["events"], more].concat());
        assert_eq!(ran.status, 0, "{}", ran.err);
        ran.out.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    assert_eq!(lines(&["-n", "2"])[0]["kind"], "member_lost");
    assert_eq!(lines(&["-n", "1"])[0]["text"], "volume v: s2");
    let of_one = lines(&["--server", "s1"]);
    assert!(of_one.iter().all(|event| event["server_id"] == server("s1").to_string().as_str()));
    let after = (before + 1).to_string();
    assert_eq!(lines(&["--after", &after]).len(), 1);
    let text = holdfast(&["--store", &store.address(), "events", "-n", "1"]).out;
    assert_eq!(text, "2026-11-22 01:00:00.000Z  fill started    volume v: s2 (a test)\n");
    bench.run(&["events", "--server", "s9"]).refused(3, &["no server 's9'"]);
    bench.run(&["events", "--volume", "x"]).refused(3, &["no volume 'x'"]);
}

#[test]
fn completions_and_help() {
    for shell in ["bash", "zsh", "fish"] {
        let ran = holdfast(&["completions", shell]);
        assert!(ran.status == 0 && ran.out.contains("attach"), "{shell}");
    }
    let help = holdfast(&["--help"]);
    assert!(help.status == 0 && help.out.contains("Exit status"), "{}", help.out);
    let error = holdfast(&["--json", "volume", "list"]).err;
    let error: Value = serde_json::from_str(&error).unwrap();
    assert_eq!(error["error"]["code"], "usage");
}
