//! The healer: looks after the members of every volume whose head runs in this process.
//!
//! One thread, the same in a daemon and in `holdfast attach`. In each turn it reads what the cluster
//! store says and how the heads are, lets [`cluster::heal`] decide on one step for each volume, and
//! carries it out: prepare the change in the head, change the record by compare-and-swap, tell the
//! head what the record became. A head that has begun a change acknowledges only what has quorum
//! in both sets until it knows how the compare-and-swap came out, so an attempt whose answer was
//! lost is repeated until that is known.
//!
//! A store that is away stops nothing but changes: the heads go on, the healer says so once and goes
//! on when it is back. In a daemon it also heals volumes that nobody has attached (module `repair`).

mod change;
mod facts;
mod repair;
mod report;
mod servers;
mod view;
mod watch;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use base::ServerId;
use cluster::heal::HealPolicy;
use cluster::{ClusterStore, StoreError};
use shell::control::{ControlError, DataPlane, Event, Status};

use crate::heads::Heads;
use change::Changes;
use repair::Repairs;
use report::Reports;
use servers::Servers;
use view::View;
use watch::Watch;

/// How long a turn waits for something to do.
const TURN: Duration = Duration::from_millis(200);
/// How long a question to the data plane may take.
const PLANE_WAIT: Duration = Duration::from_secs(2);

/// What an operator may say about healing. The same in all processes of a cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealSettings {
    /// How long a member must have been silent before it is replaced, in milliseconds.
    pub delay_ms: u64,
    /// Members of the whole cluster that are filled at a time.
    pub fills_max: usize,
}

impl Default for HealSettings {
    fn default() -> Self {
        let policy = HealPolicy::default();
        Self { delay_ms: policy.silence_ms, fills_max: policy.filling_max }
    }
}

impl HealSettings {
    /// The policy that decisions are made by.
    pub fn policy(&self) -> HealPolicy {
        let usual = HealPolicy::default();
        // Who wants it quickly wants the rest quickly, too.
        let scaled = |value: u64| {
            let scaled = u128::from(value) * u128::from(self.delay_ms);
            u64::try_from(scaled / u128::from(usual.silence_ms)).unwrap_or(u64::MAX).min(value)
        };
        HealPolicy {
            silence_ms: self.delay_ms,
            filling_max: self.fills_max,
            backoff_ms: scaled(usual.backoff_ms),
            jitter_ms: scaled(usual.jitter_ms),
            ..usual
        }
    }
}

/// Keeps the members of volumes as they should be. [`Healer::run`] is a thread's whole life.
pub struct Healer {
    store: Arc<dyn ClusterStore>,
    plane: Arc<dyn DataPlane>,
    heads: Heads,
    policy: HealPolicy,
    news: Receiver<Event>,
    view: View,
    changes: Changes,
    repairs: Option<Repairs>,
    watch: Watch,
    /// In a daemon: who else runs.
    servers: Option<Servers>,
    reports: Reports,
    /// Events that the store has not taken yet.
    untold: Vec<cluster::Event>,
    trouble: Option<String>,
}

/// Events that wait for a store that is away, at most; the oldest are dropped.
const UNTOLD_MAX: usize = 256;

/// Whether the healer need hear of an event. Whatever it hears wakes it, and it looks at everything then:
/// not while a guest's rings start or stop, when the store is asked for its lease.
pub fn concerns(event: &Event) -> bool {
    match event {
        Event::FrontEnd { .. } | Event::RingsStarted { .. } | Event::RingsStopped { .. } => false,
        Event::Opened { .. }
        | Event::Superseded { .. }
        | Event::Unopenable { .. }
        | Event::MemberDown { .. }
        | Event::MemberUp { .. }
        | Event::MemberSlow { .. }
        | Event::Mended { .. }
        | Event::Resized { .. }
        | Event::PoolFailed { .. }
        | Event::Stopped => true,
    }
}

impl Healer {
    /// The healer of the heads that `heads` opens. `server` heals volumes that nobody has attached,
    /// too. Whoever listens to the data plane's events passes on those that [concern](concerns) it.
    pub fn new(
        store: Arc<dyn ClusterStore>,
        plane: Arc<dyn DataPlane>,
        heads: Heads,
        policy: HealPolicy,
        server: Option<ServerId>,
    ) -> (Self, Sender<Event>) {
        let (sender, news) = channel();
        let healer = Self {
            store,
            plane,
            heads,
            policy,
            news,
            view: View::default(),
            changes: Changes::default(),
            repairs: server.map(Repairs::new),
            watch: Watch::default(),
            servers: server.map(Servers::new),
            reports: Reports::default(),
            untold: Vec::new(),
            trouble: None,
        };
        (healer, sender)
    }

    /// Works until `stop` is set, then ends the heads that only repair.
    pub fn run(mut self, stop: &AtomicBool) {
        while !stop.load(Ordering::Acquire) {
            if self.turn(TURN).is_err() {
                break;
            }
        }
        if self.repairs.is_some() {
            repair::close_all(&self.heads);
        }
        // What became of the last heads is still to be told.
        if let Err(error) = self.turn(Duration::ZERO) {
            tracing::debug!(%error, "the data plane ended before the healer");
        }
    }

    /// Waits for up to `wait` for something to do, and does it. An error: the data plane has ended.
    pub fn turn(&mut self, wait: Duration) -> Result<(), ControlError> {
        self.listen(wait);
        let status = match self.plane.status(PLANE_WAIT) {
            Ok(status) => status,
            Err(error @ ControlError::Stopped) => return Err(error),
            // Another process does, or this one in a moment.
            Err(ControlError::HandedOver) => return Ok(()),
            Err(error) => {
                tracing::warn!(%error, "volumes are not healed while the data plane is late");
                return Ok(());
            }
        };
        let refreshed = self.view.refresh(self.store.as_ref());
        let happened = self.watch.news(&status.heads, &self.view, &self.heads.holder().name);
        self.tell_later(happened);
        if let (Ok(()), Some(servers)) = (&refreshed, &mut self.servers) {
            let known = &self.view.picture().servers;
            let happened = servers.news(known, Instant::now(), cluster::unix_ms());
            self.tell_later(happened);
        }
        let worked = refreshed.and_then(|()| self.work(&status));
        self.note(worked);
        Ok(())
    }

    fn listen(&mut self, wait: Duration) {
        let mut next = match self.news.recv_timeout(wait) {
            Ok(event) => Some(event),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => {
                // Whoever listened to the data plane has gone; what it does is seen all the same.
                std::thread::sleep(wait);
                None
            }
        };
        while let Some(event) = next {
            self.take(event);
            next = self.news.try_recv().ok();
        }
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::MemberDown { server, reason } => self.watch.note_down(server, reason),
            Event::MemberUp { server } => self.watch.note_up(server),
            Event::Superseded { volume, epoch, sealed } => {
                if self.repairs.is_some() {
                    self.heads.note_sealed(volume, sealed);
                    repair::close(&self.heads, volume, epoch);
                }
            }
            Event::Unopenable { volume, epoch, .. } => {
                if self.repairs.is_some() {
                    repair::close(&self.heads, volume, epoch);
                }
            }
            Event::Mended { volume, server, blocks, lba } => {
                let happened = watch::mended(&self.view, volume, server, blocks, lba);
                self.tell_later(vec![happened]);
            }
            // They wake the healer, which looks at everything anyway.
            Event::Opened { .. }
            | Event::MemberSlow { .. }
            | Event::FrontEnd { .. }
            | Event::RingsStarted { .. }
            | Event::RingsStopped { .. }
            | Event::Resized { .. }
            | Event::PoolFailed { .. }
            | Event::Stopped => {}
        }
    }

    fn work(&mut self, status: &Status) -> Result<(), StoreError> {
        self.tell()?;
        let heads = &status.heads;
        let now_ms = cluster::unix_ms();
        let reports = self.reports.due(heads, &self.heads.holder().name, now_ms);
        if !reports.is_empty() {
            self.store.put_statuses(&reports).inspect_err(|_| self.reports.not_told())?;
        }
        let mut parts = change::Parts {
            store: self.store.as_ref(),
            plane: self.plane.as_ref(),
            me: self.heads.holder().id,
            policy: &self.policy,
            view: &mut self.view,
            happened: &mut self.untold,
        };
        let changed = self.changes.turn(&mut parts, heads);
        let repaired = match &mut self.repairs {
            Some(repairs) => repairs.turn(&self.heads, &mut parts, status, &self.changes),
            None => Ok(()),
        };
        self.tell()?;
        changed.and(repaired)
    }

    fn tell_later(&mut self, happened: Vec<cluster::Event>) {
        for event in &happened {
            tracing::info!(kind = %event.kind, cause = event.cause, "{}", event.text);
        }
        self.untold.extend(happened);
        let surplus = self.untold.len().saturating_sub(UNTOLD_MAX);
        self.untold.drain(..surplus);
    }

    /// Puts what happened into the cluster's log of events.
    fn tell(&mut self) -> Result<(), StoreError> {
        while let Some(event) = self.untold.first() {
            self.store.append_event(event)?;
            self.untold.remove(0);
        }
        Ok(())
    }

    /// A store that is away is said once, and once that it is back.
    fn note(&mut self, worked: Result<(), StoreError>) {
        match worked {
            Ok(()) => {
                if self.trouble.take().is_some() {
                    tracing::info!("the cluster store answers again: volumes are healed");
                }
            }
            Err(error) => {
                let text = error.to_string();
                if self.trouble.is_none() {
                    tracing::warn!(error = text, "volumes go on, but are not healed");
                }
                self.trouble = Some(text);
            }
        }
    }
}
