//! What a daemon tells the cluster store, the data plane and its API's users, and in which order.

use std::sync::Arc;

use base::{BlockSize, ClusterId, Durability, Epoch, Holder, HolderId, Policy, PoolId};
use cluster::Create;
use cluster::lease::{self, Acquire};
use cluster::volumes::{self, NewVolume};
use serde_json::{Value, json};
use shell::control::Event;

use crate::bench::{Bench, until};
use crate::fake;

#[test]
fn a_day_in_the_life() {
    let bench = Bench::new();
    let running = bench.start("[labels]\nrack = \"7\"\n");
    let entry = bench.store.servers().unwrap().remove(0);
    assert!(entry.is_alive(cluster::unix_ms()), "registered before it answers");
    assert_eq!(entry.server.labels["rack"], "7");
    assert_eq!(entry.server.addresses, ["127.0.0.1:4999".parse().unwrap()]);
    assert_eq!(running.get("/v1/health")["state"], "ok");

    let id = bench.volume("v");
    assert_eq!(running.plane.replica_keys(), [id]);
    let (status, export) = running.export(&bench, "v", "v.sock");
    assert_eq!((status, &export["state"]), (201, &json!("open")), "{export}");
    assert_eq!(bench.holder(id), (Some("server a".to_owned()), Epoch(1)));
    let (status, same) = running.export(&bench, "v", "v.sock");
    assert_eq!((status, &same["volume_id"]), (201, &export["volume_id"]), "again is no error");
    let (status, second) = running.export(&bench, &id.to_string(), "w.sock");
    assert_eq!((status, bench.holder(id).1), (201, Epoch(1)), "one head: {second}");

    let told = running.get("/v1/status");
    assert_eq!(told["server"]["name"], "a");
    assert_eq!(told["heads"][0]["volume"], "v");
    assert_eq!(told["heads"][0]["members"][0]["server"], "a");
    assert_eq!(told["exports"].as_array().unwrap().len(), 2);
    let document = running.get("/v1/openapi.json");
    for path in ["/v1/status", "/v1/health", "/v1/exports", "/metrics"] {
        assert!(document["paths"][path].is_object(), "{path} is described");
    }
    let (status, metrics) = running.call("GET", "/metrics", &Value::Null);
    assert_eq!(status, 200);
    assert!(metrics.contains("holdfast_exports 2\n"), "{metrics}");

    let remove = |socket: &str| {
        let target = format!("/v1/exports?socket={}", bench.path(socket).display());
        running.call("DELETE", &target, &Value::Null).0
    };
    assert_eq!(remove("w.sock"), 204);
    assert_eq!(bench.holder(id).0.as_deref(), Some("server a"), "one export is left");
    assert_eq!(remove("v.sock"), 204);
    assert_eq!(bench.holder(id), (None, Epoch(1)), "given back");
    assert_eq!(remove("v.sock"), 404);

    assert_eq!(running.export(&bench, "v", "v.sock").0, 201);
    let (plane, api) = (Arc::clone(&running.plane), running.api.clone());
    running.stop();
    assert_eq!(bench.holder(id), (None, Epoch(2)), "given back at the end");
    assert_eq!(plane.log().last().unwrap(), "shutdown");
    let closed = plane.log().iter().rposition(|line| line.starts_with("close_head"));
    let stopped = plane.log().iter().rposition(|line| line.starts_with("stop_export"));
    assert!(stopped < closed, "exports end before their head: {:?}", plane.log());
    assert!(!api.exists());
    assert!(!bench.store.servers().unwrap()[0].is_alive(cluster::unix_ms()));

    // What was asked for is served again by the next start, until it is removed.
    let running = bench.start("");
    until("serving again", || (running.get("/v1/exports")[0]["state"] == "open").then_some(()));
    assert_eq!(running.export(&bench, "v", "v.sock").0, 201);
    let target = format!("/v1/exports?socket={}", bench.path("v.sock").display());
    assert_eq!(running.call("DELETE", &target, &Value::Null).0, 204);
    running.stop();
    let running = bench.start("");
    assert!(running.get("/v1/exports").as_array().unwrap().is_empty());
    running.stop();
}

#[test]
fn a_volume_held_elsewhere_is_refused_by_name_and_ones_own_is_taken_again() {
    let bench = Bench::new();
    let running = bench.start("");
    let id = bench.volume("v");
    let other = Holder {
        id: HolderId::from_bytes([9; 16]),
        name: "attach on host7".to_owned(),
        repair: false,
        yieldable: false,
    };
    let store = bench.store.as_ref();
    lease::acquire(store, id, &other, Acquire::default()).unwrap();
    let (status, error) = running.export(&bench, "v", "v.sock");
    assert_eq!((status, &error["code"]), (409, &json!("held")));
    assert!(error["error"].as_str().unwrap().contains("attach on host7"), "{error}");
    assert!(running.get("/v1/exports").as_array().unwrap().is_empty(), "not wanted any more");
    lease::release(store, id, other.id, Epoch(1)).unwrap();
    // What kill -9 leaves behind: the lease is this server's.
    let own = Holder {
        id: HolderId::from_bytes(bench.server.bytes()),
        name: "server a".to_owned(),
        repair: false,
        yieldable: false,
    };
    lease::acquire(store, id, &own, Acquire::default()).unwrap();
    assert_eq!(running.export(&bench, "v", "v.sock").0, 201);
    assert_eq!(bench.holder(id), (Some("server a".to_owned()), Epoch(3)));
    running.stop();
}

#[test]
fn a_deposed_head_ends_and_is_served_again_when_the_volume_is_free() {
    let bench = Bench::new();
    let socket = bench.path("v.sock").display().to_string();
    let exports = format!("[[exports]]\nvolume = \"v\"\nsocket = \"{socket}\"\n");
    let running = bench.start(&exports);
    let state = || {
        let export = running.get("/v1/exports")[0].clone();
        (export["state"].as_str().unwrap().to_owned(), export["reason"].to_string())
    };
    assert_eq!(state().0, "waiting", "there is no volume yet");
    let id = bench.volume("v");
    until("serving", || (state().0 == "open").then_some(()));

    let other = Holder {
        id: HolderId::from_bytes([9; 16]),
        name: "attach on host7".to_owned(),
        repair: false,
        yieldable: false,
    };
    let force = Acquire { force: true, ..Acquire::default() };
    let taken = lease::acquire(bench.store.as_ref(), id, &other, force).unwrap().volume.epoch;
    let epoch = Epoch(taken.0 - 1);
    running.plane.send(Event::Superseded { volume: id, epoch, sealed: taken });
    until("giving way", || {
        let (state, reason) = state();
        (state == "waiting" && reason.contains("attach on host7")).then_some(())
    });
    assert_eq!(bench.holder(id).0.as_deref(), Some("attach on host7"), "left alone");
    lease::release(bench.store.as_ref(), id, other.id, taken).unwrap();
    until("serving again", || (state().0 == "open").then_some(()));

    // The same without a word from the members: the store's record is enough.
    let taken = lease::acquire(bench.store.as_ref(), id, &other, force).unwrap().volume.epoch;
    until("giving way", || (state().0 == "waiting").then_some(()));
    lease::release(bench.store.as_ref(), id, other.id, taken).unwrap();
    until("serving again", || (state().0 == "open").then_some(()));
    assert_eq!(bench.holder(id).0.as_deref(), Some("server a"));
    running.stop();
}

#[test]
fn a_store_behind_its_members_costs_epochs_not_safety() {
    let bench = Bench::new();
    let running = bench.start("");
    let id = bench.volume("v");
    running.plane.seal(id, Epoch(40));
    assert_eq!(running.export(&bench, "v", "v.sock").0, 201);
    assert_eq!(bench.holder(id).1, Epoch(41), "above what the members have sealed");
    running.stop();
}

#[test]
fn replicas_go_only_for_a_tombstone() {
    let bench = Bench::new();
    let running = bench.start("");
    let (kept, deleted) = (bench.volume("kept"), bench.volume("deleted"));
    let stray = running.plane.add_stray();
    volumes::delete(bench.store.as_ref(), deleted).unwrap();
    until("the purge", || bench.store.volume(deleted).unwrap().is_none().then_some(()));
    // Another whole turn, after which a deletion by mistake would have happened.
    let after = bench.volume("after");
    let mut expected = vec![kept, stray, after];
    expected.sort();
    assert_eq!(running.plane.replica_keys(), expected);
    running.stop();
}

#[test]
fn a_replica_that_cannot_be_made_is_reported_to_the_cluster() {
    let bench = Bench::new();
    let running = bench.start("");
    running.plane.refuse_replicas(true);
    let new = NewVolume {
        name: "v".to_owned(),
        size_bytes: 1 << 20,
        block_size: BlockSize::B512,
        policy: Policy {
            replicas: 1,
            durability: Durability::Durable,
            stall_deadline_ms: None,
            read_only: false,
        },
        failover: Vec::new(),
    };
    let id = volumes::create(bench.store.as_ref(), &new).unwrap().volume.id;
    let problem = until("a report", || {
        bench.store.servers().unwrap().remove(0).server.problems.into_iter().next()
    });
    assert_eq!(problem.volume, id);
    assert!(problem.reason.contains("bytes free"), "{}", problem.reason);
    let (status, error) = running.export(&bench, "v", "v.sock");
    assert_eq!((status, &error["code"]), (409, &json!("provisioning")));
    running.plane.refuse_replicas(false);
    until("another try", || {
        let members = bench.store.volume(id).unwrap().unwrap().shard.members;
        (members[0].role == base::Role::InSync).then_some(())
    });
    until("no more problems", || {
        bench.store.servers().unwrap()[0].server.problems.is_empty().then_some(())
    });
    running.stop();
}

#[test]
fn bad_requests_get_clear_answers() {
    let bench = Bench::new();
    let running = bench.start("");
    bench.volume("v");
    let post = |body: Value| running.call("POST", "/v1/exports", &body);
    for (body, status, part) in [
        (json!({ "volume": "v" }), 400, "socket"),
        (json!({ "volume": "v", "socket": "/x", "queue": 1 }), 400, "unknown field"),
        (json!({ "volume": "v", "socket": "x.sock" }), 400, "not an absolute path"),
        (json!({ "volume": "v", "socket": "/x", "queues": 0 }), 400, "queues"),
        (json!({ "volume": "v", "socket": "/no/such/x.sock" }), 409, "make it first"),
        (json!({ "volume": "w", "socket": "/tmp/x.sock" }), 404, "there is no volume 'w'"),
    ] {
        let (got, text) = post(body.clone());
        assert_eq!(got, status, "{body}: {text}");
        assert!(text.contains(part), "{part} in {text}");
    }
    std::fs::write(bench.path("file"), b"precious").unwrap();
    let (status, error) = running.export(&bench, "v", "file");
    assert_eq!(status, 409, "{error}");
    assert_eq!(std::fs::read(bench.path("file")).unwrap(), b"precious");
    assert_eq!(running.call("GET", "/v2", &Value::Null).0, 404);
    assert_eq!(running.call("PUT", "/v1/exports", &Value::Null).0, 405);
    assert_eq!(running.call("DELETE", "/v1/exports", &Value::Null).0, 400);
    running.stop();
}

#[test]
fn wrong_pools_and_stores_are_refused() {
    let bench = Bench::new();
    let start = |config| bench.start_error(config);
    let cluster = bench.store.cluster_id().unwrap();

    let mut other = bench.config("");
    other.name = "b".to_owned();
    assert!(start(other).contains("belongs to server 'a'"));

    let foreign_store = bench.path("other.db");
    let address = format!("sqlite:{}", foreign_store.display());
    drop(cluster::open(&address.parse().unwrap(), Create::IfMissing).unwrap());
    let mut other = bench.config("");
    other.store = address.parse().unwrap();
    let text = start(other);
    assert!(text.contains(&format!("belongs to cluster {cluster}")), "{text}");

    let mut other = bench.config("");
    other.store = format!("sqlite:{}", bench.path("none.db").display()).parse().unwrap();
    assert!(start(other).contains("no such store"));
    assert!(!bench.path("none.db").exists());

    let mut swapped = bench.config("");
    std::mem::swap(&mut swapped.pool.fast, &mut swapped.pool.mass);
    assert!(start(swapped).contains("pool device"));

    let held = std::fs::File::open(bench.path("mass")).unwrap();
    target_daemon::pool::lock(&bench.path("mass"), &held).unwrap();
    let text = start(bench.config(""));
    assert!(text.contains("mass is in use by another process"), "{text}");
    drop(held);

    // Formatted anew without being registered.
    let (pool, server) = (PoolId::from_bytes([3; 16]), bench.server);
    fake::format(&bench.devices(), pool, cluster, server);
    assert!(start(bench.config("")).contains("not registered"));
    fake::format(&bench.devices(), bench.pool, ClusterId::from_bytes([4; 16]), server);
    assert!(start(bench.config("")).contains("belongs to cluster"));
    std::fs::write(bench.path("mass"), vec![7; 1 << 20]).unwrap();
    assert!(start(bench.config("")).contains("mass"));
    std::fs::write(bench.path("fast"), vec![0; 1 << 20]).unwrap();
    assert!(start(bench.config("")).contains("blank"));
    assert!(!bench.path("api").exists(), "a failed start leaves no socket");
}

#[test]
fn an_api_socket_in_use_stops_the_start() {
    let bench = Bench::new();
    let _other = std::os::unix::net::UnixListener::bind(bench.path("api")).unwrap();
    assert!(bench.start_error(bench.config("")).contains("another process listens"));
    assert!(bench.path("api").exists());
}
