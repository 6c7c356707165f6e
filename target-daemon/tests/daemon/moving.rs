//! The lease follows the rings: who acquires, yields and waits when, as guests start and stop.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use base::{Epoch, Holder, HolderId, PoolId, VolumeId};
use cluster::lease::{self, Acquire};
use cluster::{ClusterStore, EventKind, VolumeEntry};
use serde_json::json;
use shell::control::{DataPlane, Event};
use target_daemon::follow::{Follow, LeaseState};
use target_daemon::heads::Heads;

use crate::bench::{Bench, until};
use crate::fake::{self, FakePlane};
use crate::flaky::{Flaky, Mode};

/// A host with one export of the volume.
struct Host {
    follow: Follow,
    heads: Heads,
    plane: Arc<FakePlane>,
    store: Arc<Flaky>,
    socket: PathBuf,
    id: VolumeId,
}

impl Host {
    fn new(bench: &Bench, number: u8, id: VolumeId) -> Self {
        let pool = PoolId::from_bytes([number; 16]);
        let mut config = bench.plane_config();
        config.pool.as_mut().unwrap().pool = pool;
        let plane: Arc<dyn DataPlane> = fake::start(&config).unwrap();
        let store = Arc::new(Flaky::new(Arc::clone(&bench.store)));
        let me = Holder {
            id: HolderId::from_bytes([number; 16]),
            name: format!("host {number}"),
            repair: false,
            yieldable: false,
        };
        let shared: Arc<dyn ClusterStore> = Arc::clone(&store) as _;
        let heads = Heads::new(shared, Arc::clone(&plane), me);
        let follow = Follow::new(heads.clone(), plane, Box::new(|_, _| {}));
        let socket = Path::new("/run").join(format!("{number}.sock"));
        Self { follow, heads, plane: fake::of_pool(pool), store, socket, id }
    }

    fn standby(bench: &Bench, number: u8, id: VolumeId) -> Self {
        let host = Self::new(bench, number, id);
        host.follow.join(&host.entry(bench), &host.socket, true, None);
        host
    }

    fn entry(&self, bench: &Bench) -> VolumeEntry {
        bench.store.volume(self.id).unwrap().unwrap()
    }

    fn start(&self) {
        self.follow.started(self.id, &self.socket);
    }

    fn stop(&self) {
        self.follow.stopped(self.id, &self.socket, true);
    }

    /// A front end connects, whose guest is elsewhere yet.
    fn expect_guest(&self) {
        self.follow.front_end(self.id, &self.socket, true);
    }

    fn state(&self) -> LeaseState {
        self.follow.state(self.id).unwrap()
    }

    fn until(&self, what: &str, is: impl Fn(&LeaseState) -> bool) {
        until(what, || is(&self.state()).then_some(()));
    }

    fn until_held(&self, epoch: u64) {
        let held = |state: &LeaseState| matches!(state, LeaseState::Held { epoch: at, .. } if at.0 == epoch);
        self.until(&format!("holding in epoch {epoch}"), held);
    }

    fn until_yielded(&self) {
        self.until("yielding", |state| matches!(state, LeaseState::Yielded { pending: None, .. }));
    }

    fn until_waiting(&self, part: &str) {
        let waits = |state: &LeaseState| matches!(state, LeaseState::Waiting { reason } if reason.contains(part));
        self.until(&format!("waiting: {part}"), waits);
    }

    /// Until it has heard of a record that is so, and nothing has come of that.
    fn until_known(&self, what: &str, is: impl Fn(&VolumeEntry) -> bool) {
        until(what, || self.follow.known(self.id).filter(|entry| is(entry)).map(drop));
    }

    /// Until it has heard that host 1 yields.
    fn until_on_offer(&self) {
        self.until_known("hearing of the lease", |entry| {
            let holder = entry.volume.holder.as_ref();
            holder.is_some_and(|holder| holder.name == "host 1" && holder.yieldable)
        });
    }

    /// How often the store was asked and told for the leases here, since this was looked at last.
    fn asked(&self) -> (usize, usize) {
        self.store.asked()
    }

    fn opened(&self) -> usize {
        self.plane.log().iter().filter(|line| line.starts_with("open_head")).count()
    }

    fn leave(&self) {
        if let Some(entry) = self.follow.leave(self.id, &self.socket) {
            self.heads.close(&entry, Duration::ZERO).unwrap();
        }
    }
}

fn record(bench: &Bench, id: VolumeId) -> (Option<(String, bool)>, Epoch) {
    let volume = bench.store.volume(id).unwrap().unwrap().volume;
    (volume.holder.map(|holder| (holder.name, holder.yieldable)), volume.epoch)
}

fn held_by(number: u8, yieldable: bool, epoch: u64) -> (Option<(String, bool)>, Epoch) {
    (Some((format!("host {number}"), yieldable)), Epoch(epoch))
}

/// A volume, and a daemon that keeps its replica.
fn volume(bench: &Bench) -> VolumeId {
    let running = bench.start("");
    let id = bench.volume("v");
    running.stop();
    id
}

#[test]
fn a_head_that_opens_before_it_is_noted_is_open() {
    let bench = Bench::new();
    let id = volume(&bench);
    let (a, b) = (Host::standby(&bench, 1, id), Host::standby(&bench, 2, id));
    let held = |number, open| LeaseState::Held { epoch: Epoch(number), open };
    // The data plane may say so while the thread that acquires is on its way back from asking for it.
    a.follow.opened(id, Epoch(1));
    assert_eq!(a.state(), LeaseState::Standby);
    a.start();
    a.until("an open head", |state| *state == held(1, true));
    // It says nothing of the head after that.
    a.stop();
    a.until_yielded();
    b.start();
    b.until_held(2);
    a.follow.deposed(id, Epoch(1));
    b.stop();
    b.until_yielded();
    a.start();
    a.until_held(3);
    assert_eq!(a.state(), held(3, false));
    a.follow.opened(id, Epoch(3));
    assert_eq!(a.state(), held(3, true));
    a.leave();
}

#[test]
fn a_guest_moves_there_and_back_and_its_lease_with_it() {
    let bench = Bench::new();
    let id = volume(&bench);
    let (a, b) = (Host::standby(&bench, 1, id), Host::standby(&bench, 2, id));
    assert_eq!((a.state(), record(&bench, id)), (LeaseState::Standby, (None, Epoch(0))));
    a.start();
    a.until_held(1);
    // A firmware, and a guest that is paused: no epoch, no other head.
    for _ in 0..3 {
        a.stop();
        a.until_yielded();
        assert_eq!(record(&bench, id), held_by(1, true, 1));
        a.start();
        until("the mark to be taken back", || {
            (record(&bench, id) == held_by(1, false, 1)).then_some(())
        });
    }
    assert_eq!(a.opened(), 1);
    for (from, to, epoch) in [(&a, &b, 2), (&b, &a, 3), (&a, &b, 4)] {
        from.stop();
        to.start();
        to.until_held(epoch);
        // Told by the members, or noticed in the store; twice is no harm.
        for _ in 0..2 {
            assert!(from.follow.deposed(id, Epoch(epoch - 1)), "it was yielded");
        }
        from.until("standing by again", |state| *state == LeaseState::Standby);
    }
    assert_eq!(record(&bench, id), held_by(2, false, 4));
    b.stop();
    b.until_yielded();
    b.leave();
    assert_eq!(record(&bench, id), (None, Epoch(4)));
    a.leave();
}

#[test]
fn a_lease_on_offer_is_taken_before_the_guest_comes() {
    let bench = Bench::new();
    let id = volume(&bench);
    let (a, b) = (Host::standby(&bench, 1, id), Host::standby(&bench, 2, id));
    a.start();
    a.until_held(1);
    b.expect_guest();
    b.until_known("hearing of the holder", |entry| entry.volume.epoch == Epoch(1));
    assert_eq!(b.state(), LeaseState::Standby, "a guest uses it");
    a.stop();
    b.until_yielded();
    assert_eq!(record(&bench, id), held_by(2, true, 2), "not in anybody's way");
    assert!(a.follow.deposed(id, Epoch(1)));
    b.start();
    b.until_held(2);
    until("the mark to be taken back", || {
        (record(&bench, id) == held_by(2, false, 2)).then_some(())
    });
    assert_eq!(b.opened(), 1, "the same head");
    b.leave();
    a.leave();
}

#[test]
fn a_guest_that_goes_on_at_its_source_takes_back_what_was_taken_early() {
    let bench = Bench::new();
    let id = volume(&bench);
    let (a, b) = (Host::standby(&bench, 1, id), Host::standby(&bench, 2, id));
    a.start();
    a.until_held(1);
    b.expect_guest();
    a.stop();
    b.until_yielded();
    a.start();
    assert!(a.follow.deposed(id, Epoch(1)), "it was yielded");
    a.until_held(3);
    assert!(b.follow.deposed(id, Epoch(2)));
    b.until("standing by", |state| *state == LeaseState::Standby);
    // Once for each front end: the next time its guest is waited for.
    a.stop();
    a.until_yielded();
    b.until_on_offer();
    assert_eq!((b.state(), record(&bench, id)), (LeaseState::Standby, held_by(1, true, 3)));
    // The next front end comes when the lease is on offer already. One that only looks in takes nothing.
    b.follow.front_end(id, &b.socket, false);
    assert_eq!(b.state(), LeaseState::Standby);
    b.expect_guest();
    b.until_yielded();
    assert_eq!(record(&bench, id).1, Epoch(4));
    b.leave();
    a.leave();
}

#[test]
fn two_that_await_a_guest_take_its_lease_from_each_other_once() {
    let bench = Bench::new();
    let id = volume(&bench);
    let [a, b, c] = [1, 2, 3].map(|number| Host::standby(&bench, number, id));
    a.start();
    a.until_held(1);
    b.expect_guest();
    c.expect_guest();
    a.stop();
    until("both to have had it", || (record(&bench, id).1 == Epoch(3)).then_some(()));
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(record(&bench, id).1, Epoch(3));
    a.leave();
    b.leave();
    c.leave();
}

#[test]
fn a_lease_that_was_heard_of_costs_one_question() {
    let bench = Bench::new();
    let id = volume(&bench);
    let (a, b) = (Host::standby(&bench, 1, id), Host::standby(&bench, 2, id));
    a.until_known("hearing of the volume", |_| true);
    a.start();
    a.until_held(1);
    assert_eq!(a.asked(), (0, 1), "a lease that nobody holds");
    a.stop();
    a.until_yielded();
    assert_eq!(a.asked(), (0, 1), "the mark");
    b.until_on_offer();
    b.start();
    b.until_held(2);
    assert_eq!(b.asked(), (0, 1), "a lease that is yielded");
    assert_eq!(b.follow.head(id).unwrap(), bench.store.volume(id).unwrap().unwrap());
    // There and back, and a guest that was only paused.
    assert!(a.follow.deposed(id, Epoch(1)));
    b.stop();
    b.until_yielded();
    b.start();
    until("the mark to be taken back", || {
        (record(&bench, id) == held_by(2, false, 2)).then_some(())
    });
    b.stop();
    until("yielding again", || (record(&bench, id) == held_by(2, true, 2)).then_some(()));
    a.until_known("hearing of the lease", |entry| {
        entry.volume.holder.as_ref().is_some_and(|holder| holder.yieldable)
            && bench.store.volume(id).unwrap().as_ref() == Some(entry)
    });
    a.asked();
    a.start();
    a.until_held(3);
    assert_eq!(a.asked(), (0, 1), "back again");
    a.leave();
    b.leave();
}

#[test]
fn a_lease_that_was_heard_of_late_is_taken_as_it_is() {
    let bench = Bench::new();
    let id = volume(&bench);
    let [a, b, c] = [1, 2, 3].map(|number| Host::standby(&bench, number, id));
    a.start();
    a.until_held(1);
    a.stop();
    a.until_yielded();
    b.until_on_offer();
    b.store.set(Mode::WatchesSilent);
    // Larger since, and still on offer: one refusal, which says how it is.
    let mut grown = a.entry(&bench);
    grown.volume.size_bytes *= 2;
    bench.store.update_volume(&grown).unwrap();
    b.asked();
    b.start();
    b.until_held(2);
    assert_eq!(b.asked(), (0, 2));
    let head = b.follow.head(id).unwrap();
    assert_eq!(head.volume.size_bytes, grown.volume.size_bytes);
    assert_eq!(Some(head), bench.store.volume(id).unwrap());
    assert!(a.follow.deposed(id, Epoch(1)));
    // On offer once, and a third one was faster.
    b.store.set(Mode::Works);
    b.stop();
    b.until_yielded();
    let offered = |entry: &VolumeEntry| {
        entry.volume.epoch == Epoch(2) && {
            entry.volume.holder.as_ref().is_some_and(|holder| holder.yieldable)
        }
    };
    a.until_known("hearing of the lease", offered);
    a.store.set(Mode::WatchesSilent);
    c.start();
    c.until_held(3);
    a.start();
    a.until_waiting("host 3 holds the volume");
    assert_eq!(record(&bench, id), held_by(3, false, 3), "not taken from who did not yield");
    a.store.set(Mode::Works);
    c.stop();
    a.until_held(4);
    for host in [&a, &b, &c] {
        host.leave();
    }
}

#[test]
fn a_record_that_is_not_watched_is_asked_for() {
    let bench = Bench::new();
    let id = volume(&bench);
    let (a, b) = (Host::standby(&bench, 1, id), Host::standby(&bench, 2, id));
    a.start();
    a.until_held(1);
    a.stop();
    a.until_yielded();
    b.until_on_offer();
    assert_eq!(b.follow.unwatched(), []);
    b.store.set(Mode::WatchesRefused);
    until("knowing nothing", || b.follow.known(id).is_none().then_some(()));
    assert_eq!(b.follow.unwatched(), [id]);
    b.asked();
    b.start();
    b.until_held(2);
    assert_eq!(b.asked(), (1, 1), "a question, and the change");
    b.stop();
    b.until_yielded();
    assert!(a.follow.deposed(id, Epoch(1)));
    // It goes on when it can.
    a.start();
    a.until_held(3);
    assert!(b.follow.deposed(id, Epoch(2)));
    until("being refused", || (b.follow.unwatched() == [id]).then_some(()));
    b.store.set(Mode::Works);
    b.until_known("hearing of the record", |entry| entry.volume.epoch == Epoch(3));
    assert_eq!(b.follow.unwatched(), []);
    a.leave();
    b.leave();
}

#[test]
fn a_destination_waits_visibly_and_harms_nobody() {
    let bench = Bench::new();
    let id = volume(&bench);
    let [a, b, c] = [1, 2, 3].map(|number| Host::standby(&bench, number, id));
    a.start();
    a.until_held(1);
    // Started too early, and a third one by mistake: both wait.
    b.start();
    c.start();
    b.until_waiting("host 1 holds the volume");
    c.until_waiting("host 1 holds the volume");
    until("the cluster to be told", || {
        let events = bench.store.events(0, 100).unwrap();
        let waiting = events.iter().filter(|(_, event)| event.kind == EventKind::Waiting);
        (waiting.count() == 2).then_some(())
    });
    assert_eq!(record(&bench, id), held_by(1, false, 1));
    // Given up there: the source never noticed.
    c.stop();
    c.until("standing by again", |state| *state == LeaseState::Standby);
    a.stop();
    b.until_held(2);
    // It dies with its guest: standbys yield what nobody uses any more, and the source goes on.
    a.start();
    a.until_waiting("host 2 holds the volume");
    b.follow.stopped(id, &b.socket, false);
    a.until_held(3);
    // One whose guest uses it and that did not yield: that is no migration.
    assert!(!a.follow.deposed(id, Epoch(3)));
    for host in [&a, &b, &c] {
        host.leave();
    }
}

#[test]
fn without_the_store_a_source_goes_on_and_a_destination_waits() {
    let bench = Bench::new();
    let id = volume(&bench);
    let (a, b) = (Host::standby(&bench, 1, id), Host::standby(&bench, 2, id));
    a.start();
    a.until_held(1);
    for mode in [Mode::RequestsLost, Mode::AnswersLost] {
        a.store.set(mode);
        a.stop();
        a.until("saying why it does not yield", |state| {
            matches!(state, LeaseState::Yielded { pending: Some(reason), .. } if reason.contains("lost"))
        });
        // The guest goes on at once, in its epoch.
        a.start();
        a.until_held(1);
        assert_eq!(a.opened(), 1);
        a.store.set(Mode::Works);
        let firm = || (record(&bench, id) == held_by(1, false, 1)).then_some(());
        until("a firm lease", firm);
        // Once more without trouble, so that what was said of this one is not taken for the next one's.
        a.stop();
        a.until_yielded();
        a.start();
        until("a firm lease again", firm);
    }
    b.store.set(Mode::RequestsLost);
    a.stop();
    a.until_yielded();
    b.start();
    b.until_waiting("lost");
    b.store.set(Mode::Works);
    b.until_held(2);
    // The source comes too late, whatever the store told it.
    a.start();
    a.until_waiting("host 2");
    b.leave();
    a.until_held(3);
    a.leave();
}

#[test]
fn a_lease_that_is_not_for_a_standby_outlives_its_front_end() {
    let bench = Bench::new();
    let id = volume(&bench);
    let (a, b) = (Host::new(&bench, 1, id), Host::standby(&bench, 2, id));
    let head = a.heads.open(id, false, Duration::ZERO).unwrap();
    a.follow.join(&a.entry(&bench), &a.socket, false, Some(head.entry));
    a.until_held(1);
    a.start();
    a.follow.stopped(id, &a.socket, false);
    b.start();
    b.until_waiting("host 1");
    assert_eq!(record(&bench, id), held_by(1, false, 1), "the guest may be back");
    // A takeover by force goes over both.
    let other = Holder { name: "operator".to_owned(), ..b.heads.holder().clone() };
    let other = Holder { id: HolderId::from_bytes([7; 16]), ..other };
    let force = Acquire { force: true, ..Acquire::default() };
    lease::acquire(bench.store.as_ref(), id, &other, force).unwrap();
    assert!(!a.follow.deposed(id, Epoch(1)), "it was in use");
    b.until_waiting("operator");
    a.leave();
    b.leave();
}

#[test]
fn a_daemon_lets_exports_stand_by() {
    let bench = Bench::new();
    let running = bench.start("");
    let id = bench.volume("v");
    let other = Holder {
        id: HolderId::from_bytes([9; 16]),
        name: "server b".to_owned(),
        repair: false,
        yieldable: false,
    };
    lease::acquire(bench.store.as_ref(), id, &other, Acquire::default()).unwrap();
    let socket = bench.path("v.sock");
    let wanted = json!({ "volume": "v", "socket": socket, "standby": true });
    let (status, text) = running.call("POST", "/v1/exports", &wanted);
    assert_eq!(status, 201, "{text}");
    let export = || running.get("/v1/exports")[0].clone();
    let state = |what: &str| until(what, || (export()["state"] == what).then_some(()));
    assert_eq!((&export()["state"], &export()["standby"]), (&json!("standby"), &json!(true)));
    let rings = |started: bool| {
        let (volume, socket) = (id, socket.clone());
        running.plane.send(if started {
            Event::RingsStarted { volume, socket }
        } else {
            Event::RingsStopped { volume, socket, by_front_end: true }
        });
    };
    rings(true);
    until("waiting", || {
        let reason = export()["reason"].to_string();
        (export()["state"] == "waiting" && reason.contains("server b")).then_some(())
    });
    lease::mark_yieldable(bench.store.as_ref(), id, other.id, Epoch(1), true, None).unwrap();
    let begun = Instant::now();
    state("open");
    assert!(begun.elapsed() < Duration::from_secs(10));
    rings(false);
    state("yielded");
    until("the record to say so", || {
        let holder = bench.store.volume(id).unwrap().unwrap().volume.holder.unwrap();
        holder.yieldable.then_some(())
    });
    // The other one has it back, and yields: a front end that has come is enough.
    let standby = Acquire { standby: true, ..Acquire::default() };
    lease::acquire(bench.store.as_ref(), id, &other, standby).unwrap();
    running.plane.send(Event::Superseded { volume: id, epoch: Epoch(2), sealed: Epoch(3) });
    state("standby");
    running.plane.send(Event::FrontEnd { volume: id, socket: socket.clone(), connected: true });
    lease::mark_yieldable(bench.store.as_ref(), id, other.id, Epoch(3), true, None).unwrap();
    state("yielded");
    let volume = bench.store.volume(id).unwrap().unwrap().volume;
    assert_eq!(
        (volume.epoch, volume.holder.map(|holder| holder.yieldable)),
        (Epoch(4), Some(true))
    );
    running.stop();
    assert_eq!(bench.holder(id), (None, Epoch(4)));
}
