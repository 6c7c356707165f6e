//! A data plane that keeps its word and no data.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use base::{
    ClusterId, Epoch, Health, Member, PoolId, ReplicaKey, ReplicaState, Seq, ServerId, ShardIndex,
    ShardRecord, VolumeId,
};
use shell::control::{
    ChangeError, ControlError, DataPlane, DataPlaneConfig, Event, ExportSpec, ExportStatus,
    HeadPhase, HeadSpec, HeadStatus, MemberMode, MemberStatus, MetricFamily, OpenError, Opening,
    PoolConfig, PoolDevices, PoolStatus, ReplicaSpec, ReplicaStatus, ServerAddress, StartError,
    StateNotice, Status, Traffic,
};
use store::{DeviceInfo, DeviceRole, FormatConfig};

const DEVICE_BYTES: u64 = 64 << 20;

/// The planes of this process, by their pools.
static PLANES: Mutex<BTreeMap<PoolId, Arc<FakePlane>>> = Mutex::new(BTreeMap::new());

/// Writes the labels of a pool of two files.
pub(crate) fn format(devices: &PoolDevices, pool: PoolId, cluster: ClusterId, server: ServerId) {
    let device = |role| DeviceInfo { bytes: DEVICE_BYTES, role };
    let config = FormatConfig {
        pool,
        cluster,
        server,
        devices: vec![device(DeviceRole::Fast), device(DeviceRole::Mass)],
        log_bytes: 0,
        segment_bytes: 0,
        chunk_bytes: 0,
        replicas_max: 0,
    };
    let files: Vec<_> = [&devices.fast[0], &devices.mass[0]]
        .into_iter()
        .map(|path| {
            let file =
                OpenOptions::new().write(true).create(true).truncate(true).open(path).unwrap();
            file.set_len(DEVICE_BYTES).unwrap();
            file
        })
        .collect();
    for write in store::format(&config).unwrap() {
        files[usize::from(write.device.0)].write_all_at(&write.bytes, write.offset).unwrap();
    }
}

/// Starts the plane of the configured pool.
#[allow(clippy::unnecessary_wraps, reason = "the signature is `StartDataPlane`'s")]
pub(crate) fn start(config: &DataPlaneConfig) -> Result<Arc<dyn DataPlane>, StartError> {
    let pool = config.pool.clone().expect("a daemon has a pool");
    let plane = Arc::new(FakePlane {
        pool: pool.clone(),
        inner: Mutex::default(),
        changed: Condvar::new(),
    });
    PLANES.lock().unwrap().insert(pool.pool, Arc::clone(&plane));
    Ok(plane)
}

/// The plane that was started last for this pool.
pub(crate) fn of_pool(pool: PoolId) -> Arc<FakePlane> {
    Arc::clone(&PLANES.lock().unwrap()[&pool])
}

pub(crate) struct FakePlane {
    pool: PoolConfig,
    inner: Mutex<Inner>,
    changed: Condvar,
}

#[derive(Default)]
struct Inner {
    log: Vec<String>,
    replicas: BTreeMap<ReplicaKey, ReplicaSpec>,
    refuse_replicas: bool,
    heads: BTreeMap<VolumeId, HeadSpec>,
    sealed: BTreeMap<VolumeId, Epoch>,
    exports: BTreeMap<PathBuf, (ExportSpec, UnixListener)>,
    events: VecDeque<Event>,
    /// What is out of the ordinary with members, by their servers.
    troubles: BTreeMap<ServerId, Trouble>,
    /// Exports with a guest.
    connected: BTreeSet<PathBuf>,
    /// Changes of the in-sync set that are begun: the new set.
    changing: BTreeMap<VolumeId, Vec<ServerId>>,
    /// Blocks that replicas here cannot read.
    damaged: BTreeMap<VolumeId, u64>,
    /// What replicas here have sealed, if not the newest epoch there is.
    away_since: BTreeMap<VolumeId, Epoch>,
    down: bool,
}

impl Inner {
    fn replica_status(&self, spec: &ReplicaSpec) -> ReplicaStatus {
        let volume = &spec.key.volume;
        let sealed = self.away_since.get(volume).copied().unwrap_or(Epoch(u64::MAX));
        ReplicaStatus {
            spec: *spec,
            state: ReplicaState { sealed, ..ReplicaState::default() },
            lost_records: false,
            damaged_blocks: self.damaged.get(volume).copied().unwrap_or(0),
        }
    }
}

/// What a head sees of a member that is not well.
#[derive(Clone, Copy)]
pub(crate) enum Trouble {
    /// Silent for an hour, for others too.
    Lost,
    /// Follows, and lacks something.
    Behind,
}

impl FakePlane {
    fn inner(&self) -> Result<MutexGuard<'_, Inner>, ControlError> {
        let inner = self.inner.lock().unwrap();
        if inner.down { Err(ControlError::Stopped) } else { Ok(inner) }
    }

    pub(crate) fn log(&self) -> Vec<String> {
        self.inner.lock().unwrap().log.clone()
    }

    pub(crate) fn replica_keys(&self) -> Vec<VolumeId> {
        self.inner.lock().unwrap().replicas.keys().map(|key| key.volume).collect()
    }

    /// So many blocks of the replica here cannot be read.
    pub(crate) fn damage(&self, volume: VolumeId, blocks: u64) {
        self.inner.lock().unwrap().damaged.insert(volume, blocks);
    }

    /// The replica here was away since this epoch, until the next head opens.
    pub(crate) fn was_away(&self, volume: VolumeId, since: Epoch) {
        self.inner.lock().unwrap().away_since.insert(volume, since);
    }

    pub(crate) fn refuse_replicas(&self, refuse: bool) {
        self.inner.lock().unwrap().refuse_replicas = refuse;
    }

    /// A replica that no record asks for.
    pub(crate) fn add_stray(&self) -> VolumeId {
        let volume = VolumeId::from_bytes(cluster::new_id());
        let key = ReplicaKey { volume, shard: ShardIndex(0) };
        let spec = ReplicaSpec { key, block_size: base::BlockSize::B512, blocks: 8 };
        self.inner.lock().unwrap().replicas.insert(key, spec);
        volume
    }

    /// What heads see of their members on `server` from now on.
    pub(crate) fn trouble(&self, server: ServerId, trouble: Option<Trouble>) {
        let troubles = &mut self.inner.lock().unwrap().troubles;
        match trouble {
            Some(trouble) => drop(troubles.insert(server, trouble)),
            None => drop(troubles.remove(&server)),
        }
    }

    /// A guest comes to an export, or goes.
    pub(crate) fn connect(&self, socket: &Path, connected: bool) {
        let sockets = &mut self.inner.lock().unwrap().connected;
        if connected {
            sockets.insert(socket.to_owned());
        } else {
            sockets.remove(socket);
        }
    }

    /// The volume's members have sealed this epoch.
    pub(crate) fn seal(&self, volume: VolumeId, epoch: Epoch) {
        self.inner.lock().unwrap().sealed.insert(volume, epoch);
    }

    pub(crate) fn send(&self, event: Event) {
        self.inner.lock().unwrap().events.push_back(event);
        self.changed.notify_all();
    }
}

impl FakePlane {
    fn member_status(&self, member: &Member, trouble: Option<Trouble>) -> MemberStatus {
        let lost = matches!(trouble, Some(Trouble::Lost));
        MemberStatus {
            server: member.server,
            role: member.role,
            local: member.pool == self.pool.pool,
            connected: !lost,
            reachable: !lost,
            last: Seq(1),
            durable: Seq(1),
            lag: Some(0),
            mode: if lost { MemberMode::Down } else { MemberMode::Live },
            mode_for: Duration::from_secs(if lost { 3600 } else { 0 }),
            caught_up: trouble.is_none(),
            slow_for: None,
            draining: false,
            device_failed: false,
            degraded: None,
            others_say: lost.then_some(Health::Silent),
            filling: None,
            note: None,
        }
    }
}

fn in_sync(shard: &ShardRecord) -> Vec<ServerId> {
    let mut servers: Vec<ServerId> = shard.in_sync().collect();
    servers.sort_unstable();
    servers
}

impl DataPlane for FakePlane {
    fn status(&self, _wait: Duration) -> Result<Status, ControlError> {
        let inner = self.inner()?;
        let head = |spec: &HeadSpec| HeadStatus {
            volume: spec.volume.id,
            epoch: spec.volume.epoch,
            phase: HeadPhase::Open,
            size_bytes: spec.volume.size_bytes,
            last: Seq(1),
            commit: Seq(1),
            in_flight: 0,
            queued: 0,
            change_open: inner.changing.contains_key(&spec.volume.id),
            traffic: Traffic::default(),
            members: spec
                .shard
                .members
                .iter()
                .filter(|member| member.role.is_served())
                .map(|member| {
                    let trouble = inner.troubles.get(&member.server).copied();
                    self.member_status(member, trouble)
                })
                .collect(),
        };
        let export = |spec: &ExportSpec| ExportStatus {
            spec: spec.clone(),
            connected: inner.connected.contains(&spec.socket),
            in_flight: 0,
        };
        Ok(Status {
            pool: Some(PoolStatus {
                id: self.pool.pool,
                log_bytes: DEVICE_BYTES,
                log_used_bytes: 0,
                log_recovery_bytes: 0,
                home_bytes: DEVICE_BYTES,
                home_free_bytes: DEVICE_BYTES,
                failed: None,
            }),
            listen: Some(([127, 0, 0, 1], 4999).into()),
            replicas: inner.replicas.values().map(|spec| inner.replica_status(spec)).collect(),
            heads: inner.heads.values().map(head).collect(),
            exports: inner.exports.values().map(|(spec, _)| export(spec)).collect(),
        })
    }

    fn metrics(&self, _wait: Duration) -> Result<Vec<MetricFamily>, ControlError> {
        self.inner().map(|_| Vec::new())
    }

    fn create_replica(
        &self,
        spec: &ReplicaSpec,
        _epoch: Epoch,
        _wait: Duration,
    ) -> Result<(), ControlError> {
        let mut inner = self.inner()?;
        if inner.refuse_replicas {
            return Err(ControlError::NoSpace { needed_bytes: 2, free_bytes: 1 });
        }
        inner.replicas.insert(spec.key, *spec);
        Ok(())
    }

    fn delete_replica(&self, key: ReplicaKey, _wait: Duration) -> Result<(), ControlError> {
        self.inner()?.replicas.remove(&key);
        Ok(())
    }

    fn replicas(&self, _wait: Duration) -> Result<Vec<ReplicaStatus>, ControlError> {
        let inner = self.inner()?;
        let status = |spec: &ReplicaSpec| inner.replica_status(spec);
        Ok(inner.replicas.values().map(status).collect())
    }

    fn set_servers(&self, _servers: &[ServerAddress]) -> Result<(), ControlError> {
        self.inner().map(|_| ())
    }

    fn keep_connected(&self, _servers: &[ServerId]) -> Result<(), ControlError> {
        self.inner().map(|_| ())
    }

    fn open_head(&self, spec: &HeadSpec, _wait: Duration) -> Result<Opening, OpenError> {
        let mut inner = self.inner()?;
        let (id, epoch) = (spec.volume.id, spec.volume.epoch);
        match inner.sealed.get(&id) {
            Some(sealed) if *sealed >= epoch && !inner.heads.contains_key(&id) => {
                return Err(OpenError::Superseded { sealed: *sealed });
            }
            Some(_) | None => {}
        }
        if let Some(running) = inner.heads.get(&id)
            && running.volume.epoch != epoch
        {
            let epoch = running.volume.epoch;
            return Err(ControlError::HeadExists { volume: id, epoch }.into());
        }
        inner.log.push(format!("open_head {id}"));
        inner.sealed.insert(id, epoch);
        inner.away_since.remove(&id);
        inner.heads.insert(id, spec.clone());
        Ok(Opening::Open)
    }

    fn close_head(&self, volume: VolumeId, _drain: Duration) -> Result<(), ControlError> {
        let mut inner = self.inner()?;
        inner.log.push(format!("close_head {volume}"));
        inner.changing.remove(&volume);
        match inner.heads.remove(&volume) {
            Some(_) => Ok(()),
            None => Err(ControlError::NoHead(volume)),
        }
    }

    fn change_members(
        &self,
        volume: VolumeId,
        epoch: Epoch,
        shard: &ShardRecord,
        _wait: Duration,
    ) -> Result<(), ChangeError> {
        let mut inner = self.inner()?;
        let head = inner.heads.get(&volume).ok_or(ControlError::NoHead(volume))?;
        if head.volume.epoch != epoch {
            return Err(ChangeError::OtherEpoch { volume, epoch: head.volume.epoch });
        }
        let (old, new) = (in_sync(&head.shard), in_sync(shard));
        let leave = old.iter().filter(|server| !new.contains(server)).count();
        let enter = new.iter().filter(|server| !old.contains(server)).count();
        assert!(leave <= 1 && enter <= 1, "one at a time: from {old:?} to {new:?}");
        assert!(leave + enter > 0, "a change of {old:?}");
        inner.log.push(format!("change_members {volume}"));
        assert!(inner.changing.insert(volume, new).is_none(), "one change at a time");
        Ok(())
    }

    fn members_changed(
        &self,
        volume: VolumeId,
        epoch: Epoch,
        shard: &ShardRecord,
        _wait: Duration,
    ) -> Result<(), ChangeError> {
        let mut inner = self.inner()?;
        let head = inner.heads.get(&volume).ok_or(ControlError::NoHead(volume))?;
        if head.volume.epoch != epoch {
            return Err(ChangeError::OtherEpoch { volume, epoch: head.volume.epoch });
        }
        let (old, new) = (in_sync(&head.shard), in_sync(shard));
        let changing = inner.changing.remove(&volume);
        assert!(new == old || Some(&new) == changing.as_ref(), "{new:?} was not prepared");
        inner.heads.get_mut(&volume).expect("looked at").shard = shard.clone();
        inner.log.push(format!("members_changed {volume}"));
        Ok(())
    }

    fn volume_grown(
        &self,
        volume: VolumeId,
        epoch: Epoch,
        size_bytes: u64,
        _wait: Duration,
    ) -> Result<(), ChangeError> {
        let mut inner = self.inner()?;
        let head = inner.heads.get_mut(&volume).ok_or(ControlError::NoHead(volume))?;
        if head.volume.epoch != epoch {
            return Err(ChangeError::OtherEpoch { volume, epoch: head.volume.epoch });
        }
        head.volume.size_bytes = size_bytes;
        inner.log.push(format!("volume_grown {volume} {size_bytes}"));
        Ok(())
    }

    fn publish(&self, notice: &StateNotice) -> Result<(), ControlError> {
        self.inner()?.log.push(format!("publish {:?}", notice.message));
        Ok(())
    }

    fn start_export(&self, spec: &ExportSpec, _wait: Duration) -> Result<(), ControlError> {
        let mut inner = self.inner()?;
        let socket = |source| ControlError::Socket { path: spec.socket.clone(), source };
        let listener = UnixListener::bind(&spec.socket).map_err(socket)?;
        inner.exports.insert(spec.socket.clone(), (spec.clone(), listener));
        Ok(())
    }

    fn stop_export(&self, socket: &Path, _drain: Duration) -> Result<(), ControlError> {
        let mut inner = self.inner()?;
        inner.log.push(format!("stop_export {}", socket.display()));
        if inner.exports.remove(socket).is_some() {
            std::fs::remove_file(socket).unwrap();
        }
        Ok(())
    }

    fn next_event(&self, wait: Duration) -> Option<Event> {
        let inner = self.inner.lock().unwrap();
        let quiet = |inner: &mut Inner| inner.events.is_empty();
        let (mut inner, _) = self.changed.wait_timeout_while(inner, wait, quiet).unwrap();
        inner.events.pop_front()
    }

    fn shutdown(&self, _wait: Duration) -> Result<(), ControlError> {
        let mut inner = self.inner()?;
        assert!(inner.heads.is_empty() && inner.exports.is_empty(), "closed before");
        inner.log.push("shutdown".to_owned());
        inner.down = true;
        Ok(())
    }
}
