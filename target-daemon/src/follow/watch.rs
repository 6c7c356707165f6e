//! What a standby hears of its volume's record before it needs it.
//!
//! A thread for each volume without a head here waits for news of the record. With them a lease is taken by
//! one compare-and-swap instead of a question and a compare-and-swap, while a guest waits; and who waits
//! for a lease hears at once that it is to be had. News may be late or lost: nothing is decided on them that
//! the compare-and-swap does not confirm. While the store does not tell, nothing is known, and it is asked.

use std::sync::{Arc, Weak};
use std::time::Duration;

use base::VolumeId;
use cluster::{ClusterStore, StoreError, Versions, VolumeEntry};

use std::collections::BTreeMap;

use super::{Shared, Volume, servers};

/// After so long without news the store is asked once whether there are none: a connection may be dead
/// without a word.
const SILENCE_MAX: Duration = Duration::from_secs(15);
/// The pauses while the store does not tell double from here
const PAUSE_MIN: Duration = Duration::from_millis(200);
/// to here.
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// Volumes that are watched at a time, each by a thread and a connection. For more, the store is asked.
const WATCHES_MAX: usize = 64;

/// A thread that watches a volume's record.
pub(super) struct Watch {
    /// Tells it from one that is about to end.
    token: Arc<()>,
    hears: bool,
}

impl Watch {
    /// The store tells what is new.
    pub(super) fn hears(&self) -> bool {
        self.hears
    }
}

struct Watcher {
    shared: Weak<Shared>,
    store: Arc<dyn ClusterStore>,
    id: VolumeId,
    token: Arc<()>,
    seen: Option<Versions>,
}

impl Shared {
    /// Has a volume watched if it has no head here.
    pub(super) fn see_to_watch(
        self: &Arc<Self>,
        volumes: &mut BTreeMap<VolumeId, Volume>,
        id: VolumeId,
    ) {
        let watches = volumes.values().filter(|volume| volume.watch.is_some()).count();
        let Some(volume) = volumes.get_mut(&id) else { return };
        if volume.head.is_some() || volume.watch.is_some() || watches >= WATCHES_MAX {
            return;
        }
        let token = Arc::new(());
        let (shared, store) = (Arc::downgrade(self), self.heads.store());
        let watcher = Watcher { shared, store, id, token: Arc::clone(&token), seen: None };
        match std::thread::Builder::new().name("watch".to_owned()).spawn(move || watcher.run()) {
            Ok(_) => volume.watch = Some(Watch { token, hears: false }),
            Err(error) => {
                let volume = &volume.name;
                tracing::warn!(volume, %error, "its record is not watched: taking its lease takes longer");
            }
        }
    }
}

impl Watcher {
    fn run(mut self) {
        let mut pause = PAUSE_MIN;
        loop {
            let heard = self.store.watch_volume(self.id, self.seen, SILENCE_MAX);
            let told = heard.is_ok();
            if !self.note(heard) {
                return;
            }
            if told {
                pause = PAUSE_MIN;
            } else {
                std::thread::sleep(pause);
                pause = (2 * pause).min(PAUSE_MAX);
            }
        }
    }

    /// False if nobody needs it any more.
    fn note(&mut self, heard: Result<Option<VolumeEntry>, StoreError>) -> bool {
        let Some(shared) = self.shared.upgrade() else { return false };
        let mut volumes = shared.volumes();
        let Some(volume) = volumes.get_mut(&self.id) else { return false };
        let mine = |watch: &&mut Watch| Arc::ptr_eq(&watch.token, &self.token);
        let Some(watch) = volume.watch.as_mut().filter(mine) else { return false };
        if volume.head.is_some() {
            // Who holds the lease knows what it wrote, and its healer looks after members.
            volume.watch = None;
            return false;
        }
        watch.hears = heard.is_ok();
        match heard {
            Ok(None) => {}
            Ok(Some(entry)) => {
                self.seen = Some(entry.versions);
                let members = servers(&entry);
                let moved = volume.members != members;
                (volume.known, volume.members) = (Some(entry), members);
                if moved {
                    shared.keep_connected(&volumes);
                }
                // It may be to be had now.
                shared.look(&mut volumes, self.id);
            }
            Err(error) => {
                tracing::debug!(volume = volume.name, %error, "its record is not watched");
                (volume.known, self.seen) = (None, None);
            }
        }
        true
    }
}
