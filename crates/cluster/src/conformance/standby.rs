//! What a standby hears of a volume, and how it takes the lease.

use std::time::{Duration, Instant};

use base::{Epoch, Holder, VolumeId};

use super::{holder, kind, shard, volume};
use crate::error::StoreErrorKind;
use crate::lease::{self, Acquire, AcquireError, Marked};
use crate::records::VolumeEntry;
use crate::store::{ClusterStore, Swapped};

/// Longer than anything takes that is to happen.
const LIMIT: Duration = Duration::from_secs(20);
const STANDBY: Acquire = Acquire { force: false, standby: true, yields: false, above: Epoch::NONE };

fn inserted(store: &dyn ClusterStore) -> VolumeEntry {
    store.insert_volume(&volume(1, "a"), &shard(1), store.revision().unwrap()).unwrap()
}

fn is_done(marked: &Marked) -> bool {
    matches!(marked, Marked::Done(_))
}

pub(super) fn standbys_take_what_is_yielded(one: &dyn ClusterStore, two: &dyn ClusterStore) {
    let entry = one.insert_volume(&volume(1, "a"), &shard(1), one.revision().unwrap()).unwrap();
    let id = entry.volume.id;
    let plain = Acquire::default();
    let standby = Acquire { standby: true, ..plain };
    let mark = |store, number, epoch, yieldable| {
        lease::mark_yieldable(store, id, holder(number).id, Epoch(epoch), yieldable, None).unwrap()
    };
    assert_eq!(lease::acquire(one, id, &holder(1), standby).unwrap().volume.epoch, Epoch(1));
    let refused = lease::acquire(two, id, &holder(2), standby).unwrap_err();
    assert!(matches!(refused, AcquireError::Held { epoch: Epoch(1), yieldable: false, .. }));
    // Only the holder of the epoch marks, as often as it likes; that is no new epoch.
    assert_eq!(mark(two, 2, 1, true), Marked::NotOurs(Some("holder 1".to_owned())));
    assert_eq!(mark(two, 1, 2, true), Marked::NotOurs(Some("holder 1".to_owned())));
    let seen = one.revision().unwrap();
    assert!(is_done(&mark(one, 1, 1, true)));
    assert!(two.revision().unwrap() > seen, "who waits for it hears of it");
    let seen = one.revision().unwrap();
    assert!(is_done(&mark(two, 1, 1, true)));
    assert_eq!(one.revision().unwrap(), seen, "once is enough");
    let now = two.volume(id).unwrap().unwrap().volume;
    assert_eq!((now.epoch, now.holder.unwrap().yieldable), (Epoch(1), true));
    // It is not given to whom no guest waits for, and not to a repairer.
    let refused = lease::acquire(two, id, &holder(2), plain).unwrap_err();
    assert!(matches!(refused, AcquireError::Held { yieldable: true, .. }));
    assert!(refused.to_string().contains("--standby"), "{refused}");
    let repairer = Holder { repair: true, ..holder(3) };
    assert!(lease::acquire_repair(two, id, &repairer, Epoch::NONE).is_err());
    // The guest goes on where it was; then it moves, and back.
    assert!(is_done(&mark(one, 1, 1, false)));
    assert!(lease::acquire(two, id, &holder(2), standby).is_err());
    assert!(is_done(&mark(one, 1, 1, true)));
    let marked = Holder { yieldable: true, ..holder(2) };
    let taken = lease::acquire(two, id, &marked, standby).unwrap().volume;
    assert_eq!(
        (taken.epoch, taken.holder),
        (Epoch(2), Some(holder(2))),
        "not marked from the start"
    );
    assert_eq!(mark(one, 1, 1, false), Marked::NotOurs(Some("holder 2".to_owned())), "too late");
    assert!(lease::acquire(one, id, &holder(1), standby).is_err());
    assert!(is_done(&mark(two, 2, 2, true)));
    assert_eq!(lease::acquire(one, id, &holder(1), standby).unwrap().volume.epoch, Epoch(3));
    // One that awaits its guest yields from the beginning.
    assert!(is_done(&mark(one, 1, 3, true)));
    let early = Acquire { yields: true, ..standby };
    let taken = lease::acquire(two, id, &holder(2), early).unwrap().volume;
    assert_eq!(
        (taken.epoch, taken.holder),
        (Epoch(4), Some(Holder { yieldable: true, ..holder(2) }))
    );
    assert_eq!(lease::acquire(one, id, &holder(1), standby).unwrap().volume.epoch, Epoch(5));
    // A holder that died after its mark is back: no standby takes it from it.
    assert!(is_done(&mark(one, 1, 5, true)));
    assert_eq!(lease::acquire(one, id, &holder(1), plain).unwrap().volume.epoch, Epoch(6));
    assert!(lease::acquire(two, id, &holder(2), standby).is_err());
    assert!(lease::release(one, id, holder(1).id, Epoch(6)).unwrap());
    assert_eq!(mark(one, 1, 6, true), Marked::NotOurs(None));
    let gone = VolumeId::from_bytes([7; 16]);
    let nothing = lease::mark_yieldable(one, gone, holder(1).id, Epoch(1), true, None).unwrap();
    assert_eq!(nothing, Marked::NotOurs(None));
}

pub(super) fn volumes_are_watched(one: &dyn ClusterStore, two: &dyn ClusterStore) {
    let first = inserted(one);
    let id = first.volume.id;
    let watch = |seen, wait| one.watch_volume(id, seen, wait).unwrap();
    assert_eq!(watch(None, LIMIT), Some(first.clone()), "at once");
    let start = Instant::now();
    assert_eq!(watch(Some(first.versions), Duration::from_millis(300)), None);
    assert!(start.elapsed() >= Duration::from_millis(300) && start.elapsed() < LIMIT);
    let mut changed = first.clone();
    changed.volume.size_bytes *= 2;
    // One after the other, while somebody waits: all that is missed is what was in between.
    let (heard, last) = std::thread::scope(|scope| {
        let seen = first.versions;
        let waiter = scope.spawn(move || watch(Some(seen), LIMIT));
        changed.versions = two.update_volume(&changed).unwrap();
        (waiter.join().unwrap(), changed)
    });
    assert_eq!(heard, Some(last.clone()));
    assert_eq!(watch(Some(first.versions), LIMIT), Some(last.clone()), "and who comes late");
    // Another volume's news are none.
    let revision = two.revision().unwrap();
    two.insert_volume(&volume(2, "b"), &shard(2), revision).unwrap();
    assert_eq!(watch(Some(last.versions), Duration::from_millis(1)), None);
    // Its end is told like any failure.
    let mut dead = VolumeEntry { deleted: true, ..last };
    dead.shard.members.clear();
    dead.versions = two.update_volume(&dead).unwrap();
    let gone = std::thread::scope(|scope| {
        let seen = dead.versions;
        let waiter = scope.spawn(move || one.watch_volume(id, Some(seen), LIMIT));
        two.purge_volume(id, dead.versions).unwrap();
        waiter.join().unwrap()
    });
    assert!(matches!(kind(gone), StoreErrorKind::NoVolume(_)));
    let never = VolumeId::from_bytes([8; 16]);
    assert!(matches!(kind(one.watch_volume(never, None, LIMIT)), StoreErrorKind::NoVolume(_)));
}

pub(super) fn what_is_known_saves_a_question(one: &dyn ClusterStore, two: &dyn ClusterStore) {
    let entry = inserted(one);
    let id = entry.volume.id;
    let held = lease::acquire_known(one, id, &holder(1), STANDBY, Some(entry)).unwrap();
    assert_eq!(one.volume(id).unwrap(), Some(held.clone()), "the entry is as it is written");
    let Marked::Done(marked) =
        lease::mark_yieldable(one, id, holder(1).id, Epoch(1), true, Some(held)).unwrap()
    else {
        panic!("it is its own");
    };
    assert_eq!(two.volume(id).unwrap().as_ref(), Some(marked.as_ref()));
    // What was heard of by a watch serves as well as what was read.
    let heard = two.watch_volume(id, None, LIMIT).unwrap();
    assert_eq!(heard.as_ref(), Some(marked.as_ref()));
    let taken = lease::acquire_known(two, id, &holder(2), STANDBY, heard).unwrap();
    assert_eq!((taken.volume.epoch, &taken.volume.holder), (Epoch(2), &Some(holder(2))));
    // A mark on what was known before finds that out.
    let late = lease::mark_yieldable(one, id, holder(1).id, Epoch(1), false, Some(*marked));
    assert_eq!(late.unwrap(), Marked::NotOurs(Some("holder 2".to_owned())));
    assert_eq!(one.volume(id).unwrap(), Some(taken));
}

pub(super) fn what_was_known_is_not_believed(one: &dyn ClusterStore, two: &dyn ClusterStore) {
    let id = inserted(one).volume.id;
    let own = lease::acquire(one, id, &holder(1), STANDBY).unwrap();
    let mark = |yieldable| {
        let marked = lease::mark_yieldable(one, id, holder(1).id, Epoch(1), yieldable, None);
        let Marked::Done(entry) = marked.unwrap() else { panic!("it is its own") };
        *entry
    };
    let yielding = mark(true);
    let take = |known: &VolumeEntry| {
        lease::acquire_known(two, id, &holder(2), STANDBY, Some(known.clone()))
    };
    // It says that the lease is to be had, and it is not any more: refused, and nothing changed.
    let firm = mark(false);
    assert!(matches!(take(&yielding), Err(AcquireError::Held { yieldable: false, .. })));
    assert_eq!(two.volume(id).unwrap(), Some(firm.clone()));
    let swapped = two.swap_volume(&yielding).unwrap();
    assert_eq!(swapped, Swapped::Refused(Box::new(firm.clone())), "it says what is there");
    // It is to be had again, with other members and another size: taken as it is now.
    let mut changed = mark(true);
    changed.volume.size_bytes *= 2;
    changed.shard.members.clear();
    one.update_volume(&changed).unwrap();
    let taken = take(&yielding).unwrap();
    assert_eq!(
        (taken.volume.epoch, taken.volume.size_bytes),
        (Epoch(2), changed.volume.size_bytes)
    );
    assert_eq!(taken.shard.members, []);
    assert_eq!(one.volume(id).unwrap(), Some(taken.clone()));
    // It says that the lease is not to be had, and it is: that is asked.
    assert!(lease::release(two, id, holder(2).id, Epoch(2)).unwrap());
    let known = Some(taken);
    let taken = lease::acquire_known(one, id, &holder(1), STANDBY, known).unwrap();
    assert_eq!(taken.volume.epoch, Epoch(3), "an epoch is given once");
    // It was our own once.
    let forced = Acquire { force: true, ..STANDBY };
    lease::acquire(two, id, &holder(2), forced).unwrap();
    let known = Some(own);
    let refused = lease::acquire_known(one, id, &holder(1), STANDBY, known);
    assert!(matches!(refused, Err(AcquireError::Held { epoch: Epoch(4), .. })));
    // It is gone.
    let known = two.volume(id).unwrap();
    assert!(lease::release(two, id, holder(2).id, Epoch(4)).unwrap());
    crate::volumes::delete(two, id).unwrap();
    let refused = lease::acquire_known(one, id, &holder(2), STANDBY, known);
    assert!(refused.is_err());
}
