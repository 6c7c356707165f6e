//! The lease follows the rings: whoever has a guest that uses a volume holds it.
//!
//! When a guest starts the rings of an export and no head of the volume runs here, the lease is
//! acquired as a standby ([`cluster::lease::Acquire::standby`]) and a head opened; while another one
//! holds it and does not yield, that is tried again and again, visibly. When the guest stops them,
//! the head stays open and rests, and the lease is marked yieldable. That is all a live migration
//! needs: the destination's rings start when the source's have stopped. Until then QEMU moves what is left of the
//! guest; a standby whose front end waits for one need not wait with it: it takes a lease that is yielded at once
//! and has its head open when the rings start. And if the guest goes on at the
//! source, its head goes on in its epoch, and the mark is taken back; unless a destination has taken
//! the lease, then it is the source that waits until the destination yields.
//!
//! A guest that is stopped and started again (a firmware, a pause) costs two changes of a record and
//! no epoch. With the cluster store away nothing is marked and nothing acquired, which is said and
//! tried again; a head that rests goes on at once when its guest does, without the store.
//!
//! For each volume there is a thread as long as something is to be done for it; everything else only
//! notes what is wanted and wakes it. So nobody who takes events waits for the store here.
//!
//! A guest's pause should not be spent on questions. So how a volume's record is, is heard of before it is
//! needed (module `watch`), and what is acquired or marked is changed at once by compare-and-swap on
//! that. If it was old news the store says how the record is now, and that decides.

mod handover;
mod watch;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use base::{Epoch, ServerId, VolumeId};
use cluster::lease::{AcquireError, Marked};
use cluster::{Event as Told, EventKind, VolumeEntry};
use shell::control::DataPlane;

use crate::heads::{HeadError, Heads};

use watch::Watch;

pub use handover::{Adopt, Leases};

/// For so long after a guest has started its rings, a lease that is not to be had is asked for every
/// [`SOON`]: the source is about to yield.
const EAGER_FOR: Duration = Duration::from_secs(1);
/// A guest waits: the next try.
const SOON: Duration = Duration::from_millis(3);
/// The longest wait between two tries.
const LATER: Duration = Duration::from_millis(500);
/// Whoever waits for longer than this says so to the cluster.
const TELL_AFTER: Duration = Duration::from_millis(500);
/// And again so often as long as it waits.
pub const TELL_AGAIN: Duration = Duration::from_secs(30);

/// How a volume's lease is here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LeaseState {
    /// No guest uses the volume here, and the lease is not ours.
    Standby,
    /// A guest waits for the lease.
    Waiting {
        /// Why it does.
        reason: String,
    },
    /// The lease is ours, and a head runs.
    Held {
        /// Its epoch.
        epoch: Epoch,
        /// The head has opened.
        open: bool,
    },
    /// The guest has stopped the disk. The head rests, and the lease is ours until another one
    /// takes it.
    Yielded {
        /// The head's epoch.
        epoch: Epoch,
        /// Why the record does not say so yet, if it does not: nobody can take it before.
        pending: Option<String>,
    },
}

fn servers(entry: &VolumeEntry) -> Vec<ServerId> {
    entry.shard.members.iter().map(|member| member.server).collect()
}

/// Who is told of every change of a state. Called on any thread; must not block for long.
pub type TellState = Box<dyn Fn(VolumeId, &LeaseState) + Send + Sync>;

/// What the volume's record says of the head's lease, as far as is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mark {
    Firm,
    Yieldable,
    /// A change has been asked for and not been answered.
    Unknown,
}

/// An export of a followed volume.
#[derive(Clone, Copy, Debug)]
struct Use {
    /// Its front end's end without a word means that the guest is gone.
    standby: bool,
    /// It needs the lease.
    in_use: bool,
    /// A front end has come, and its guest may be on its way here: a lease that is on offer is taken. Once for each
    /// front end, or two of them would take it from each other for ever.
    awaits: bool,
}

struct Volume {
    name: String,
    members: Vec<ServerId>,
    exports: BTreeMap<PathBuf, Use>,
    head: Option<VolumeEntry>,
    /// The newest epoch in which a head has opened: that may be heard before its head is noted here.
    opened: Epoch,
    mark: Mark,
    /// How the record was when it was heard of last, if that has not been used up. May be old news.
    known: Option<VolumeEntry>,
    /// The thread that watches the record.
    watch: Option<Watch>,
    /// A head of ours that was deposed and may still be there.
    stale: Option<VolumeEntry>,
    /// Since when a guest waits for the lease.
    waits_since: Option<Instant>,
    /// When the cluster was told last that it does.
    told_cluster: Option<Instant>,
    /// Why the last try failed.
    trouble: Option<String>,
    /// A thread works for it.
    busy: bool,
    /// Nothing is to be begun any more.
    leaving: bool,
    said: Option<LeaseState>,
}

/// What a volume's thread is to do next.
enum Step {
    End(VolumeEntry),
    Acquire {
        /// No guest waits for it yet.
        early: bool,
    },
    Mark(VolumeEntry, bool),
}

impl Volume {
    fn in_use(&self) -> bool {
        self.exports.values().any(|export| export.in_use)
    }

    /// Another one yields the lease, as far as is known, and a guest is awaited here.
    fn is_on_offer(&self) -> bool {
        let holder = self.known.as_ref().and_then(|known| known.volume.holder.as_ref());
        holder.is_some_and(|holder| holder.yieldable)
            && self.exports.values().any(|export| export.awaits)
    }

    fn next_step(&self) -> Option<Step> {
        if self.leaving {
            return None;
        }
        if let Some(stale) = &self.stale {
            return Some(Step::End(stale.clone()));
        }
        match (&self.head, self.in_use(), self.mark) {
            (None, true, _) => Some(Step::Acquire { early: false }),
            (None, false, _) if self.is_on_offer() => Some(Step::Acquire { early: true }),
            (None, false, _) | (Some(_), true, Mark::Firm) | (Some(_), false, Mark::Yieldable) => {
                None
            }
            (Some(entry), true, Mark::Yieldable | Mark::Unknown) => {
                Some(Step::Mark(entry.clone(), false))
            }
            (Some(entry), false, Mark::Firm | Mark::Unknown) => {
                Some(Step::Mark(entry.clone(), true))
            }
        }
    }

    fn state(&self) -> LeaseState {
        match (&self.head, self.in_use()) {
            (None, false) => LeaseState::Standby,
            (None, true) => {
                let reason = self.trouble.clone();
                LeaseState::Waiting { reason: reason.unwrap_or_else(|| "acquiring".to_owned()) }
            }
            (Some(entry), true) => LeaseState::Held {
                epoch: entry.volume.epoch,
                open: self.opened == entry.volume.epoch,
            },
            (Some(entry), false) => {
                let not_yet = || "the lease is being marked".to_owned();
                let pending = (self.mark != Mark::Yieldable)
                    .then(|| self.trouble.clone().unwrap_or_else(not_yet));
                LeaseState::Yielded { epoch: entry.volume.epoch, pending }
            }
        }
    }
}

struct Shared {
    heads: Heads,
    plane: Arc<dyn DataPlane>,
    volumes: Mutex<BTreeMap<VolumeId, Volume>>,
    /// Something changed for some volume.
    news: Condvar,
    tell: TellState,
}

/// The volumes of one process whose leases follow their rings.
#[derive(Clone)]
pub struct Follow {
    shared: Arc<Shared>,
}

impl Follow {
    /// Follows nothing yet.
    pub fn new(heads: Heads, plane: Arc<dyn DataPlane>, tell: TellState) -> Self {
        let (volumes, news) = (Mutex::default(), Condvar::new());
        Self { shared: Arc::new(Shared { heads, plane, volumes, news, tell }) }
    }

    /// An export of the volume is about to be started; `head`: its lease was taken for it. A standby
    /// needs the lease when its rings start, any other one from now on.
    pub fn join(
        &self,
        entry: &VolumeEntry,
        socket: &Path,
        standby: bool,
        head: Option<VolumeEntry>,
    ) {
        self.join_as(entry, socket, Use { standby, in_use: !standby, awaits: false }, head);
    }

    fn join_as(&self, entry: &VolumeEntry, socket: &Path, export: Use, head: Option<VolumeEntry>) {
        let mut volumes = self.shared.volumes();
        let volume = volumes.entry(entry.volume.id).or_insert_with(|| Volume {
            name: entry.volume.name.clone(),
            members: Vec::new(),
            exports: BTreeMap::new(),
            head: None,
            opened: Epoch::NONE,
            mark: Mark::Firm,
            known: None,
            watch: None,
            stale: None,
            waits_since: None,
            told_cluster: None,
            trouble: None,
            busy: false,
            leaving: false,
            said: None,
        });
        volume.members = servers(entry);
        volume.exports.insert(socket.to_owned(), export);
        if head.is_some() {
            assert!(volume.head.is_none(), "one head of a volume at a time");
            volume.known.clone_from(&head);
            (volume.head, volume.mark) = (head, Mark::Firm);
        }
        self.shared.keep_connected(&volumes);
        self.shared.look(&mut volumes, entry.volume.id);
    }

    /// An export is over, or was not started after all. Waits for what is under way for the volume.
    /// If it was the last one the volume is no longer followed; its head, if there is one, is the
    /// caller's to close.
    pub fn leave(&self, id: VolumeId, socket: &Path) -> Option<VolumeEntry> {
        let mut volumes = self.shared.volumes();
        let volume = volumes.get_mut(&id)?;
        volume.exports.remove(socket);
        if !volume.exports.is_empty() {
            self.shared.look(&mut volumes, id);
            return None;
        }
        volume.leaving = true;
        self.shared.news.notify_all();
        while volumes.get(&id).is_some_and(|volume| volume.busy) {
            volumes = self.shared.news.wait(volumes).unwrap_or_else(PoisonError::into_inner);
        }
        let volume = volumes.remove(&id)?;
        self.shared.keep_connected(&volumes);
        // One that was deposed just now is ended like any other.
        volume.head.or(volume.stale)
    }

    /// A front end has connected to an export, or is gone.
    pub fn front_end(&self, id: VolumeId, socket: &Path, connected: bool) {
        self.note(id, socket, |export| export.awaits = connected && export.standby);
    }

    /// A guest has started the rings of an export.
    pub fn started(&self, id: VolumeId, socket: &Path) {
        self.note(id, socket, |export| (export.in_use, export.awaits) = (true, false));
    }

    /// The rings of an export have stopped, `by_front_end` or because that is gone. A front end
    /// that is gone from a standby means that its guest is: management starts guests there that
    /// come from elsewhere, and must be able to start them elsewhere when this one has died. Anywhere
    /// else it may be back with the same guest.
    pub fn stopped(&self, id: VolumeId, socket: &Path, by_front_end: bool) {
        self.note(id, socket, |export| {
            export.in_use = export.in_use && !by_front_end && !export.standby;
        });
    }

    fn note(&self, id: VolumeId, socket: &Path, change: impl FnOnce(&mut Use)) {
        let mut volumes = self.shared.volumes();
        let export = volumes.get_mut(&id).and_then(|volume| volume.exports.get_mut(socket));
        if let Some(export) = export {
            change(export);
            self.shared.look(&mut volumes, id);
        }
    }

    /// The head of this epoch has opened.
    pub fn opened(&self, id: VolumeId, epoch: Epoch) {
        let mut volumes = self.shared.volumes();
        let Some(volume) = volumes.get_mut(&id) else { return };
        volume.opened = volume.opened.max(epoch);
        self.shared.look(&mut volumes, id);
    }

    /// A head of ours was deposed. True if that is in order, since its lease was yieldable or may
    /// have been: it is ended, and the lease acquired anew when a guest here wants it. False if it was
    /// taken from a guest that uses it, or is none of ours.
    pub fn deposed(&self, id: VolumeId, epoch: Epoch) -> bool {
        let mut volumes = self.shared.volumes();
        let Some(volume) = volumes.get_mut(&id) else { return false };
        let ours = volume.head.as_ref().is_some_and(|entry| entry.volume.epoch == epoch);
        if !ours {
            // It was noticed before.
            return volume.head.is_none();
        }
        if volume.in_use() && volume.mark == Mark::Firm {
            return false;
        }
        volume.stale = volume.head.take();
        self.shared.look(&mut volumes, id);
        true
    }

    /// Tells a volume's state once more.
    pub fn tell_again(&self, id: VolumeId) {
        let mut volumes = self.shared.volumes();
        if let Some(volume) = volumes.get_mut(&id) {
            volume.said = None;
            self.shared.look(&mut volumes, id);
        }
    }

    /// The volumes that are followed.
    pub fn volumes(&self) -> Vec<VolumeId> {
        self.shared.volumes().keys().copied().collect()
    }

    /// The entries of the volumes that heads were opened for, as they were then.
    pub fn heads(&self) -> Vec<VolumeEntry> {
        self.shared.volumes().values().filter_map(|volume| volume.head.clone()).collect()
    }

    /// The entry of a volume that a head was opened for, as it was then.
    pub fn head(&self, id: VolumeId) -> Option<VolumeEntry> {
        self.shared.volumes().get(&id)?.head.clone()
    }

    /// How a volume's lease is here; `None` if it is not followed.
    pub fn state(&self, id: VolumeId) -> Option<LeaseState> {
        self.shared.volumes().get(&id).map(Volume::state)
    }

    /// The volumes that are followed, have no head here, and whose records are not heard of otherwise.
    pub fn unwatched(&self) -> Vec<VolumeId> {
        let volumes = self.shared.volumes();
        let hears = |volume: &Volume| volume.watch.as_ref().is_some_and(Watch::hears);
        let asked = volumes.iter().filter(|(_, volume)| volume.head.is_none() && !hears(volume));
        asked.map(|(id, _)| *id).collect()
    }

    /// How a volume's record was when it was heard of last, if that is to be relied on.
    pub fn known(&self, id: VolumeId) -> Option<VolumeEntry> {
        self.shared.volumes().get(&id)?.known.clone()
    }

    /// The volume's members are these now: sessions are kept with them.
    pub fn note_members(&self, entries: &[VolumeEntry]) {
        let mut volumes = self.shared.volumes();
        let mut changed = false;
        for entry in entries {
            let Some(volume) = volumes.get_mut(&entry.volume.id) else { continue };
            let members = servers(entry);
            changed |= volume.members != members;
            volume.members = members;
        }
        if changed {
            self.shared.keep_connected(&volumes);
        }
    }
}

impl Shared {
    /// A panic of another holder leaves nothing half done: what is noted is noted in one go.
    fn volumes(&self) -> MutexGuard<'_, BTreeMap<VolumeId, Volume>> {
        self.volumes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn keep_connected(&self, volumes: &BTreeMap<VolumeId, Volume>) {
        let servers: BTreeSet<ServerId> =
            volumes.values().flat_map(|volume| volume.members.iter().copied()).collect();
        let servers: Vec<ServerId> = servers.into_iter().collect();
        if let Err(error) = self.plane.keep_connected(&servers) {
            tracing::warn!(%error, "sessions with the members are not kept: taking a lease takes longer");
        }
    }

    /// Something about the volume has changed: says so, and sees to it that somebody acts.
    fn look(self: &Arc<Self>, volumes: &mut BTreeMap<VolumeId, Volume>, id: VolumeId) {
        let Some(volume) = volumes.get_mut(&id) else { return };
        if volume.head.is_none() && volume.in_use() {
            volume.waits_since.get_or_insert_with(Instant::now);
        } else {
            volume.waits_since = None;
            volume.told_cluster = None;
        }
        self.say(volume, id);
        self.news.notify_all();
        self.see_to_watch(volumes, id);
        let Some(volume) = volumes.get_mut(&id) else { return };
        if volume.busy || volume.next_step().is_none() {
            return;
        }
        let shared = Arc::clone(self);
        let work = move || shared.work(id);
        match std::thread::Builder::new().name("lease".to_owned()).spawn(work) {
            Ok(_) => volume.busy = true,
            // The next ring that starts or stops tries again.
            Err(error) => tracing::error!(volume = volume.name, %error, "cannot start a thread"),
        }
    }

    fn say(&self, volume: &mut Volume, id: VolumeId) {
        let state = volume.state();
        if volume.said.as_ref() == Some(&state) {
            return;
        }
        tracing::info!(volume = volume.name, ?state, "lease");
        (self.tell)(id, &state);
        volume.said = Some(state);
    }

    /// A volume's thread: one step after the other, until there is none.
    fn work(self: &Arc<Self>, id: VolumeId) {
        let mut wait = SOON;
        loop {
            let step = {
                let mut volumes = self.volumes();
                let Some(volume) = volumes.get_mut(&id) else { return };
                let Some(step) = volume.next_step() else {
                    volume.busy = false;
                    volume.trouble = None;
                    self.say(volume, id);
                    self.news.notify_all();
                    return;
                };
                step
            };
            let done = self.perform(id, step);
            let mut volumes = self.volumes();
            let Some(volume) = volumes.get_mut(&id) else { return };
            let Err(trouble) = done.map(|change| change(volume)) else {
                volume.trouble = None;
                wait = SOON;
                self.look(&mut volumes, id);
                continue;
            };
            if volume.trouble.as_ref() != Some(&trouble) {
                tracing::warn!(volume = volume.name, reason = trouble, "the lease has to wait");
            }
            volume.trouble = Some(trouble);
            self.say(volume, id);
            let eager = volume.waits_since.is_some_and(|since| since.elapsed() < EAGER_FOR);
            wait = if eager { SOON } else { (wait * 2).min(LATER) };
            if let Some(event) = self.to_tell(volume, id) {
                // Not while others wait for what is noted here: the store may be away.
                drop(volumes);
                self.heads.tell(&event);
                continue;
            }
            let nothing_new = self.news.wait_timeout(volumes, wait);
            drop(nothing_new.unwrap_or_else(PoisonError::into_inner));
        }
    }

    /// Does a step; what it changes for the volume, or why it must be done again.
    fn perform(&self, id: VolumeId, step: Step) -> Result<impl FnOnce(&mut Volume), String> {
        enum Done {
            Ended,
            Acquired(Box<VolumeEntry>),
            Marked(Epoch, Mark, Box<VolumeEntry>),
            Lost(Epoch),
        }
        // Used once: an attempt whose answer is lost may have made it old news.
        let known = || self.volumes().get_mut(&id).and_then(|volume| volume.known.take());
        let done = match step {
            Step::End(entry) => {
                self.heads.end(&entry).map_err(|error| error.to_string())?;
                Done::Ended
            }
            Step::Acquire { early } => match self.heads.open_standby(id, known().as_ref(), early) {
                Ok(head) => Done::Acquired(Box::new(head.entry)),
                Err(HeadError::Acquire(AcquireError::Held { holder, epoch, .. })) => {
                    return Err(format!(
                        "{holder} holds the volume ({epoch}) and its guest has not stopped it; it \
                         is taken as soon as that yields"
                    ));
                }
                Err(error) => return Err(error.to_string()),
            },
            Step::Mark(entry, yieldable) => {
                let epoch = entry.volume.epoch;
                self.note_unknown(id, epoch);
                let mark = if yieldable { Mark::Yieldable } else { Mark::Firm };
                match self.heads.mark_yieldable(&entry, yieldable, known()) {
                    Ok(Marked::Done(now)) => Done::Marked(epoch, mark, now),
                    Ok(Marked::NotOurs(_)) => Done::Lost(epoch),
                    Err(error) => return Err(error.to_string()),
                }
            }
        };
        Ok(move |volume: &mut Volume| {
            let current = volume.head.as_ref().map(|entry| entry.volume.epoch);
            match done {
                Done::Ended => volume.stale = None,
                Done::Acquired(entry) => {
                    volume.known = Some(VolumeEntry::clone(&entry));
                    volume.exports.values_mut().for_each(|export| export.awaits = false);
                    let yields =
                        entry.volume.holder.as_ref().is_some_and(|holder| holder.yieldable);
                    volume.mark = if yields { Mark::Yieldable } else { Mark::Firm };
                    volume.head = Some(*entry);
                }
                Done::Marked(epoch, mark, now) if current == Some(epoch) => {
                    (volume.known, volume.mark) = (Some(*now), mark);
                }
                Done::Lost(epoch) if current == Some(epoch) => volume.stale = volume.head.take(),
                Done::Marked(..) | Done::Lost(_) => {}
            }
        })
    }

    /// Before a change of the record is asked for: its answer may be lost.
    fn note_unknown(&self, id: VolumeId, epoch: Epoch) {
        if let Some(volume) = self.volumes().get_mut(&id)
            && volume.head.as_ref().is_some_and(|entry| entry.volume.epoch == epoch)
        {
            volume.mark = Mark::Unknown;
        }
    }

    /// What the cluster is to be told now: that a guest waits here and for whom.
    fn to_tell(&self, volume: &mut Volume, id: VolumeId) -> Option<Told> {
        let waited = volume.waits_since.is_some_and(|since| since.elapsed() >= TELL_AFTER);
        if !waited || volume.told_cluster.is_some_and(|told| told.elapsed() < TELL_AGAIN) {
            return None;
        }
        volume.told_cluster = Some(Instant::now());
        let holder = &self.heads.holder().name;
        Some(Told {
            at_ms: cluster::unix_ms(),
            kind: EventKind::Waiting,
            volume: Some(id),
            server: None,
            text: format!("a guest at {holder} waits for volume {}", volume.name),
            cause: volume.trouble.clone().unwrap_or_default(),
        })
    }
}
