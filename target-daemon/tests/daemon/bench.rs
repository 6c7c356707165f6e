//! A daemon with its store and pool, for tests.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use base::{BlockSize, Durability, Epoch, HolderId, Policy, PoolId, ServerId, VolumeId};
use cluster::volumes::{self, NewVolume};
use cluster::{ClusterStore, Create, servers};
use serde_json::{Value, json};
use shell::control::{DataPlaneConfig, PoolConfig, PoolDevices};
use target_daemon::config::Config;
use target_daemon::{Daemon, DaemonError};
use tokio::sync::oneshot;

use crate::fake::{self, FakePlane};

const LIMIT: Duration = Duration::from_secs(20);

/// A directory with a store and one server's pool.
pub(crate) struct Bench {
    pub(crate) directory: tempfile::TempDir,
    pub(crate) store: Arc<dyn ClusterStore>,
    pub(crate) pool: PoolId,
    pub(crate) server: ServerId,
}

pub(crate) struct Running {
    pub(crate) stop: oneshot::Sender<()>,
    pub(crate) thread: JoinHandle<Result<(), DaemonError>>,
    pub(crate) plane: Arc<FakePlane>,
    pub(crate) api: PathBuf,
}

pub(crate) fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(start.elapsed() < LIMIT, "{what} did not happen in time");
        std::thread::yield_now();
        std::thread::park_timeout(Duration::from_millis(5));
    }
}

impl Bench {
    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let address = format!("sqlite:{}", directory.path().join("c.db").display());
        let store = cluster::open(&address.parse().unwrap(), Create::IfMissing).unwrap();
        let server = servers::id_for(store.as_ref(), "a", false).unwrap();
        let pool = PoolId::from_bytes(cluster::new_id());
        let bench = Self { directory, store, pool, server };
        let cluster = bench.store.cluster_id().unwrap();
        fake::format(&bench.devices(), pool, cluster, server);
        servers::register(bench.store.as_ref(), server, "a", pool).unwrap();
        bench
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn devices(&self) -> PoolDevices {
        PoolDevices { fast: vec![self.path("fast")], mass: vec![self.path("mass")] }
    }

    pub(crate) fn config(&self, more: &str) -> Config {
        let path = |name: &str| self.path(name).display().to_string();
        let text = format!(
            "name = \"a\"\nstore = \"sqlite:{}\"\nlisten = \"127.0.0.1:0\"\napi = \"{}\"\n\
             [pool]\nfast = [\"{}\"]\nmass = [\"{}\"]\n{more}",
            path("c.db"),
            path("api"),
            path("fast"),
            path("mass"),
        );
        Config::parse(&self.path("a.toml"), &text).unwrap()
    }

    pub(crate) fn start(&self, more: &str) -> Running {
        let config = self.config(more);
        let (stop, stopped) = oneshot::channel();
        let (started, daemon_started) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(1)
                .enable_all()
                .build()
                .unwrap();
            let daemon = Daemon::start(config, fake::start)?;
            started.send(()).unwrap();
            runtime.block_on(daemon.serve(async { stopped.await.unwrap_or(()) }))
        });
        let Ok(()) = daemon_started.recv_timeout(LIMIT) else {
            panic!("the daemon did not start: {:?}", thread.join().unwrap());
        };
        Running { stop, thread, plane: fake::of_pool(self.pool), api: self.path("api") }
    }

    /// What a data plane on the pool is started with.
    pub(crate) fn plane_config(&self) -> DataPlaneConfig {
        DataPlaneConfig {
            holder: HolderId::from_bytes(self.server.bytes()),
            pool: Some(PoolConfig {
                cluster: self.store.cluster_id().unwrap(),
                server: self.server,
                pool: self.pool,
                devices: self.devices(),
                scrub_bytes_per_second: 2 << 20,
            }),
            listen: None,
            buffer_bytes: 1 << 24,
            state_messages: true,
        }
    }

    pub(crate) fn start_error(&self, config: Config) -> String {
        let _ = self;
        Daemon::start(config, fake::start).err().expect("it does not start").to_string()
    }

    /// Creates a volume on the only server and waits until it is ready.
    pub(crate) fn volume(&self, name: &str) -> VolumeId {
        let new = NewVolume {
            name: name.to_owned(),
            size_bytes: 1 << 20,
            block_size: BlockSize::B4096,
            policy: Policy {
                replicas: 1,
                durability: Durability::Flush,
                stall_deadline_ms: None,
                read_only: false,
            },
            failover: Vec::new(),
        };
        let id = volumes::create(self.store.as_ref(), &new).unwrap().volume.id;
        until("provisioning", || {
            let entry = self.store.volume(id).unwrap().unwrap();
            (entry.shard.members[0].role == base::Role::InSync).then_some(())
        });
        id
    }

    pub(crate) fn holder(&self, id: VolumeId) -> (Option<String>, Epoch) {
        let volume = self.store.volume(id).unwrap().unwrap().volume;
        (volume.holder.map(|holder| holder.name), volume.epoch)
    }
}

impl Running {
    pub(crate) fn call(&self, method: &str, target: &str, body: &Value) -> (u16, String) {
        let mut stream = UnixStream::connect(&self.api).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let body = if body.is_null() { String::new() } else { body.to_string() };
        write!(
            stream,
            "{method} {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )
        .unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        (head[9..12].parse().unwrap(), body.to_owned())
    }

    pub(crate) fn get(&self, target: &str) -> Value {
        let (status, body) = self.call("GET", target, &Value::Null);
        assert_eq!(status, 200, "{body}");
        serde_json::from_str(&body).unwrap()
    }

    pub(crate) fn export(&self, bench: &Bench, volume: &str, socket: &str) -> (u16, Value) {
        let socket = bench.path(socket).display().to_string();
        let (status, body) =
            self.call("POST", "/v1/exports", &json!({ "volume": volume, "socket": socket }));
        (status, serde_json::from_str(&body).unwrap())
    }

    pub(crate) fn stop(self) {
        self.stop.send(()).unwrap();
        self.thread.join().unwrap().unwrap();
    }
}
