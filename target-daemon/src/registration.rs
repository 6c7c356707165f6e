//! A server's part in the cluster: says that it runs, makes and deletes the replicas that the
//! cluster store's records ask of it, and keeps the data plane's address book.
//!
//! A replica is deleted only for a tombstone, or a member that is leaving, that names this server
//! and pool. A store that is away, or has no record of a volume, changes nothing here.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use base::{PoolId, ReplicaKey, Role, ServerId, VolumeId};
use cluster::volumes::{self, Task};
use cluster::{
    ClusterStore, Event, EventKind, Heartbeat, Problem, ServerEntry, StoreError, VolumeEntry,
};
use shell::control::{ControlError, DataPlane, PoolStatus, ReplicaSpec, Status};

use crate::announce::Announcer;
use crate::{drain, heads};

/// How often a server says that it runs. [`cluster::ALIVE_MS`] is several of these.
const HEARTBEAT: Duration = Duration::from_secs(2);
/// How long a question to the data plane may take.
const PLANE_WAIT: Duration = Duration::from_secs(2);
/// How long making or deleting a replica may take.
const REPLICA_WAIT: Duration = Duration::from_mins(1);

/// Who a server is.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The server's id.
    pub server: ServerId,
    /// Its pool.
    pub pool: PoolId,
    /// Where others reach its replica service; `None`: where it listens.
    pub advertise: Option<SocketAddr>,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
}

/// Keeps a server registered and its replicas as wanted. [`Registration::turn`] is called again
/// and again from one thread.
pub struct Registration {
    store: Arc<dyn ClusterStore>,
    plane: Arc<dyn DataPlane>,
    identity: Identity,
    /// The revision that was worked off whole; `None`: none was.
    seen: Option<u64>,
    last_beat: Option<Instant>,
    problems: BTreeMap<VolumeId, String>,
    trouble: Option<String>,
    /// Replicas that were warned of.
    strays: BTreeSet<ReplicaKey>,
    announcer: Announcer,
    /// Volumes as they were read last.
    volumes: Vec<VolumeEntry>,
    /// Set while this server is to be emptied.
    draining: Arc<AtomicBool>,
    /// It was told that nothing is left here.
    drained: bool,
}

impl Registration {
    /// The registration of the server `identity`, which keeps `draining` as the store says.
    pub fn new(
        store: Arc<dyn ClusterStore>,
        plane: Arc<dyn DataPlane>,
        identity: Identity,
        draining: Arc<AtomicBool>,
    ) -> Self {
        Self {
            announcer: Announcer::new(Arc::clone(&plane), identity.server),
            volumes: Vec::new(),
            draining,
            drained: false,
            store,
            plane,
            identity,
            seen: None,
            last_beat: None,
            problems: BTreeMap::new(),
            trouble: None,
            strays: BTreeSet::new(),
        }
    }

    /// Waits for up to `wait` for something to do, and does it. What fails is tried again in a
    /// later turn.
    pub fn turn(&mut self, wait: Duration) {
        let start = Instant::now();
        let turned = self.try_turn(wait);
        if let Err(error) = &turned {
            // A store that fails at once must not make this loop spin.
            std::thread::sleep(wait.saturating_sub(start.elapsed()));
            let text = error.to_string();
            if self.trouble.as_ref() != Some(&text) {
                tracing::warn!(error = text, "volumes go on, but changes have to wait");
            }
            self.trouble = Some(text);
        } else if self.trouble.take().is_some() {
            tracing::info!("the cluster store answers again");
        }
    }

    /// What went wrong in the last turn.
    pub fn trouble(&self) -> Option<&str> {
        self.trouble.as_deref()
    }

    /// Tells the others that this server leaves.
    pub fn leave(&mut self) -> Result<(), StoreError> {
        let beat = self.heartbeat(None, true);
        self.store.heartbeat(&beat)
    }

    fn try_turn(&mut self, wait: Duration) -> Result<(), StoreError> {
        if self.last_beat.is_none_or(|last| last.elapsed() >= HEARTBEAT) {
            self.beat()?;
            if self.seen.is_some() {
                self.look_at_servers()?;
            }
        }
        let revision = match self.seen {
            Some(seen) if self.problems.is_empty() => self.store.wait_for_change(seen, wait)?,
            Some(seen) => {
                // Something failed: once a turn it is tried again without any news.
                self.store.wait_for_change(seen, wait)?;
                self.store.revision()?
            }
            None => self.store.revision()?,
        };
        if self.seen == Some(revision) && self.problems.is_empty() {
            return Ok(());
        }
        heads::address_book(self.store.as_ref(), self.plane.as_ref())?;
        let all = self.store.volumes()?;
        let before = self.problems.clone();
        for task in volumes::tasks(&all, self.identity.server, self.identity.pool) {
            self.work(&task)?;
        }
        for entry in &all {
            volumes::forget_lost_pools(self.store.as_ref(), entry)?;
        }
        let wanted: BTreeSet<_> = all.iter().map(|entry| entry.volume.id).collect();
        self.problems.retain(|volume, _| wanted.contains(volume));
        self.look_for_strays(&all);
        self.volumes = all;
        self.look_at_servers()?;
        self.seen = Some(revision);
        if self.problems == before { Ok(()) } else { self.beat() }
    }

    /// What the servers' records say that concerns heads with sessions here.
    fn look_at_servers(&mut self) -> Result<(), StoreError> {
        let servers = self.store.servers()?;
        let own = servers.iter().find(|entry| entry.server.id == self.identity.server);
        let draining = own.is_some_and(|entry| entry.server.draining.is_some());
        self.tell_drain(own, draining)?;
        self.announcer.tell(&self.volumes, &servers, cluster::unix_ms());
        self.drained = draining && (self.drained || self.tell_if_drained(own)?);
        Ok(())
    }

    /// Notes whether this server is to be emptied, and tells what is new about that.
    fn tell_drain(&mut self, own: Option<&ServerEntry>, draining: bool) -> Result<(), StoreError> {
        let was = self.draining.load(Ordering::Acquire);
        if let Some(own) = own.filter(|_| draining != was) {
            let name = &own.server.name;
            let (kind, text) = if draining {
                (EventKind::DrainStarted, format!("server {name} is being emptied"))
            } else {
                (EventKind::Undrained, format!("server {name} is in use again"))
            };
            self.tell(kind, text, "an operator said so")?;
        }
        self.draining.store(draining, Ordering::Release);
        Ok(())
    }

    /// Tells, once, that nothing is left on a server that was to be emptied.
    fn tell_if_drained(&self, own: Option<&ServerEntry>) -> Result<bool, StoreError> {
        let Some(own) = own.filter(|_| drain::is_empty(&self.volumes, self.identity.server)) else {
            return Ok(false);
        };
        let Ok(status) = self.plane.status(PLANE_WAIT) else { return Ok(false) };
        if !status.heads.is_empty() {
            return Ok(false);
        }
        tracing::info!("nothing is left on this server: it may be stopped");
        let text = format!("server {} is empty and may be stopped", own.server.name);
        self.tell(EventKind::Drained, text, "")?;
        Ok(true)
    }

    fn tell(&self, kind: EventKind, text: String, cause: &str) -> Result<(), StoreError> {
        self.store.append_event(&Event {
            at_ms: cluster::unix_ms(),
            kind,
            volume: None,
            server: Some(self.identity.server),
            text,
            cause: cause.to_owned(),
        })?;
        Ok(())
    }

    fn work(&mut self, task: &Task) -> Result<(), StoreError> {
        let (entry, done) = match task {
            Task::Provision(entry) => (entry, self.provision(entry)),
            Task::Remove(entry) => {
                let key = key_of(entry);
                (entry, self.plane.delete_replica(key, REPLICA_WAIT))
            }
        };
        let (id, name) = (entry.volume.id, &entry.volume.name);
        let Identity { server, pool, .. } = self.identity;
        if let Err(error) = done {
            let reason = error.to_string();
            if self.problems.get(&id) != Some(&reason) {
                tracing::error!(volume = name, reason, "cannot make or delete the replica");
            }
            self.problems.insert(id, reason);
            return Ok(());
        }
        self.problems.remove(&id);
        match task {
            Task::Provision(_) => {
                if volumes::provisioned(self.store.as_ref(), id, server, pool)? {
                    tracing::info!(volume = name, "replica made");
                }
            }
            Task::Remove(_) => {
                volumes::removed(self.store.as_ref(), id, server, pool)?;
                tracing::info!(volume = name, "replica removed");
            }
        }
        Ok(())
    }

    fn provision(&self, entry: &VolumeEntry) -> Result<(), ControlError> {
        let spec = ReplicaSpec {
            key: key_of(entry),
            block_size: entry.volume.block_size,
            blocks: entry.volume.blocks(),
        };
        self.plane.create_replica(&spec, entry.volume.epoch, REPLICA_WAIT)
    }

    /// Says once which replicas no record asks for, and which a record asks for and are not there.
    fn look_for_strays(&mut self, all: &[VolumeEntry]) {
        let Ok(replicas) = self.plane.replicas(PLANE_WAIT) else { return };
        let have: BTreeSet<_> = replicas.iter().map(|replica| replica.spec.key).collect();
        let is_mine = |member: &base::Member| {
            member.server == self.identity.server && member.pool == self.identity.pool
        };
        let mine = all.iter().filter(|entry| entry.shard.members.iter().any(is_mine));
        let wanted: BTreeMap<_, _> = mine.map(|entry| (key_of(entry), entry)).collect();
        for key in have.iter().filter(|key| !wanted.contains_key(key)) {
            if self.strays.insert(*key) {
                tracing::warn!(replica = %key, "kept: no volume record asks for this replica");
            }
        }
        for (key, entry) in wanted.iter().filter(|(key, _)| !have.contains(key)) {
            let made = entry.shard.members.iter().any(|member| {
                is_mine(member) && matches!(member.role, Role::InSync | Role::CatchingUp)
            });
            if made && !entry.deleted && self.strays.insert(*key) {
                let volume = &entry.volume.name;
                tracing::error!(volume, "this server's replica is missing from its pool");
            }
        }
    }

    fn beat(&mut self) -> Result<(), StoreError> {
        let status = match self.plane.status(PLANE_WAIT) {
            Ok(status) => status,
            Err(error) => {
                // Say nothing rather than that all is well.
                tracing::warn!(%error, "the data plane does not answer");
                return Ok(());
            }
        };
        let beat = self.heartbeat(Some(&status), false);
        self.store.heartbeat(&beat)?;
        self.last_beat = Some(Instant::now());
        Ok(())
    }

    fn heartbeat(&self, status: Option<&Status>, stopping: bool) -> Heartbeat {
        let pool: Option<&PoolStatus> = status.and_then(|status| status.pool.as_ref());
        let failed = pool.is_some_and(|pool| pool.failed.is_some());
        let room = |bytes: u64| if failed { 0 } else { bytes };
        let listen = status.and_then(|status| status.listen);
        // What keeps this server from being empty, besides replicas.
        let waits = status.filter(|_| self.draining.load(Ordering::Acquire));
        let waits = waits.into_iter().flat_map(drain::guests);
        let problem = |(volume, reason): (&VolumeId, &String)| Problem {
            volume: *volume,
            reason: reason.clone(),
        };
        Heartbeat {
            server: self.identity.server,
            pool: self.identity.pool,
            addresses: self.identity.advertise.or(listen).into_iter().collect(),
            labels: self.identity.labels.clone(),
            capacity_bytes: pool.map_or(0, |pool| room(pool.home_bytes)),
            free_bytes: pool.map_or(0, |pool| room(pool.home_free_bytes)),
            version: crate::VERSION.to_owned(),
            stopping,
            problems: self.problems.iter().map(problem).chain(waits).collect(),
        }
    }
}

fn key_of(entry: &VolumeEntry) -> ReplicaKey {
    ReplicaKey { volume: entry.shard.volume, shard: entry.shard.shard }
}
