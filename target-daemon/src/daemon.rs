//! A running `holdfastd`: started in an order in which every failure leaves nothing behind, and
//! stopped in the reverse one.

mod upgrade;

use std::io;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use base::ClusterId;
use cluster::{ClusterStore, Create, StoreError};
use shell::control::{
    ControlError, DataPlane, DataPlaneConfig, Event, MetricFamily, MetricSample, MetricValue,
    PoolConfig, StartDataPlane, StartError,
};
use tokio::sync::watch;

use crate::api;
use crate::config::Config;
use crate::exports::{Exports, Memory};
use crate::heads::{self, Heads};
use crate::healer::{self, Healer};
use crate::notify::notify;
use crate::pool::{self, PoolError, PoolIdentity};
use crate::registration::{Identity, Registration};
use crate::retry::while_lingering;
use crate::socket;
use crate::upgrade::UpgradeError;
use upgrade::Leaving;

/// How long one turn of a control loop waits for something to do: also how late it may notice
/// that it is to stop.
const TURN: Duration = Duration::from_millis(500);
/// How often exports that do not run are tried again.
const TEND_INTERVAL: Duration = Duration::from_secs(1);
/// How long the data plane gets to close the pool.
const SHUTDOWN_WAIT: Duration = Duration::from_secs(30);

/// Why a daemon did not start or did not end well.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// The cluster store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The pool's devices.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// The pool belongs to another cluster than the store's.
    #[error(
        "the pool belongs to cluster {pool}, but {store} is the store of cluster {found}; correct \
         `store` in the configuration, or restore the right store"
    )]
    WrongCluster {
        /// The pool's cluster.
        pool: ClusterId,
        /// The store's address.
        store: String,
        /// The store's cluster.
        found: ClusterId,
    },
    /// The pool belongs to a server of another name.
    #[error("the pool belongs to server '{found}', the configuration is for '{name}'; correct one")]
    WrongName {
        /// The pool's server.
        found: String,
        /// The configured name.
        name: String,
    },
    /// The API's socket.
    #[error("api socket '{}': {source}", path.display())]
    Api {
        /// The socket.
        path: PathBuf,
        /// What is wrong.
        source: io::Error,
    },
    /// The data plane.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The running daemon was not taken over from.
    #[error(transparent)]
    Upgrade(#[from] UpgradeError),
    /// The data plane did not end in order.
    #[error("the pool was not closed in good order ({0}); it is recovered at the next start")]
    Shutdown(ControlError),
    /// Exports were not drained in time or leases not given back.
    #[error("some volumes were not closed in good order; the log says which")]
    NotDrained,
    /// The data plane ended by itself.
    #[error("the data plane has stopped; the log says why")]
    PlaneStopped,
    /// A thread could not be started, or the API failed.
    #[error("cannot {action}: {source}")]
    System {
        /// What was tried.
        action: &'static str,
        /// The system's error.
        source: io::Error,
    },
}

/// What a control thread runs.
type Loop = Box<dyn FnOnce() + Send>;

/// What the API looks at.
pub(crate) struct Parts {
    pub(crate) name: String,
    pub(crate) cluster: ClusterId,
    pub(crate) identity: Identity,
    pub(crate) store: Arc<dyn ClusterStore>,
    pub(crate) plane: Arc<dyn DataPlane>,
    pub(crate) exports: Exports,
    pub(crate) started: Instant,
}

/// The sockets by which a daemon is reached.
struct Listeners {
    api: UnixListener,
    upgrades: UnixListener,
}

/// What a daemon's data plane is started with.
fn plane_config(config: &Config, found: &PoolIdentity) -> DataPlaneConfig {
    DataPlaneConfig {
        holder: heads::server_holder(found.server, &config.name).id,
        pool: Some(PoolConfig {
            cluster: found.cluster,
            server: found.server,
            pool: found.pool,
            devices: config.pool.clone(),
            scrub_bytes_per_second: config.scrub_bytes_per_second,
        }),
        listen: Some(config.listen),
        buffer_bytes: config.buffer_bytes,
        state_messages: config.state_messages,
    }
}

/// What a daemon's threads are made from.
struct Started {
    parts: Arc<Parts>,
    registration: Registration,
    healer: Healer,
    /// To the healer.
    news: Sender<Event>,
}

/// A daemon with its threads. [`Daemon::serve`] runs it to its end.
pub struct Daemon {
    parts: Arc<Parts>,
    listener: UnixListener,
    api: PathBuf,
    stop: Arc<AtomicBool>,
    plane_stopped: watch::Receiver<bool>,
    threads: Vec<JoinHandle<()>>,
}

impl Daemon {
    /// Starts a daemon: checks whose pool it is, opens everything and begins to serve.
    pub fn start(config: Config, start_plane: StartDataPlane) -> Result<Self, DaemonError> {
        let store = cluster::open(&config.store, Create::Never)?;
        let identity = identify(&config, store.as_ref())?;
        // Known to be free before anything is opened, made when there is somebody to answer.
        let api = |source| DaemonError::Api { path: config.api.clone(), source };
        while_lingering(is_in_use, || socket::check_free(&config.api).map_err(Into::into))
            .map_err(api)?;
        let plane = start_plane(&plane_config(&config, &identity))?;
        let mut started = Self::start_parts(&config, store, identity, plane);
        // Whoever sees this server answer may count on it from then on.
        started.registration.turn(Duration::ZERO);
        let listeners = socket::listen(&config.api).and_then(|api| {
            let upgrades = socket::listen(&crate::upgrade::socket_of(&config.api))?;
            Ok(Listeners { api, upgrades })
        });
        match listeners {
            Ok(listeners) => Self::begin(config, started, listeners),
            Err(source) => {
                if let Err(error) = started.parts.plane.shutdown(SHUTDOWN_WAIT) {
                    tracing::error!(%error, "stopping after a failed start");
                }
                Err(api(source))
            }
        }
    }

    /// Starts the threads of a daemon whose parts run.
    fn begin(config: Config, started: Started, listeners: Listeners) -> Result<Self, DaemonError> {
        let Started { parts, registration, healer, news } = started;
        let system = |source| DaemonError::System { action: "share a socket", source };
        let listener = listeners.api.try_clone().map_err(system)?;
        let leaving = Leaving { parts: Arc::clone(&parts), listeners };
        let stop = Arc::new(AtomicBool::new(false));
        let (plane_stopped_sender, plane_stopped) = watch::channel(false);
        let mut daemon = Self {
            parts: Arc::clone(&parts),
            listener,
            api: config.api,
            stop: Arc::clone(&stop),
            plane_stopped,
            threads: Vec::new(),
        };
        let loops: [(&str, Loop); 5] = [
            ("upgrade", {
                let stop = Arc::clone(&stop);
                Box::new(move || leaving.run(&stop))
            }),
            ("healer", {
                let stop = Arc::clone(&stop);
                Box::new(move || healer.run(&stop))
            }),
            ("registration", {
                let stop = Arc::clone(&stop);
                Box::new(move || register_until(&stop, registration))
            }),
            ("exports", {
                let (stop, parts) = (Arc::clone(&stop), Arc::clone(&parts));
                Box::new(move || tend_until(&stop, &parts.exports))
            }),
            ("events", {
                Box::new(move || {
                    if handle_events_until(&stop, &parts, &news) {
                        // Nobody listens only when the daemon is ending anyway.
                        plane_stopped_sender.send_replace(true);
                    }
                })
            }),
        ];
        for (name, run) in loops {
            match std::thread::Builder::new().name(name.to_owned()).spawn(run) {
                Ok(thread) => daemon.threads.push(thread),
                Err(source) => {
                    if let Err(error) = daemon.stop() {
                        tracing::error!(%error, "stopping after a failed start");
                    }
                    return Err(DaemonError::System { action: "start a thread", source });
                }
            }
        }
        Ok(daemon)
    }

    fn start_parts(
        config: &Config,
        store: Arc<dyn ClusterStore>,
        found: PoolIdentity,
        plane: Arc<dyn DataPlane>,
    ) -> Started {
        let holder = heads::server_holder(found.server, &config.name);
        let identity = Identity {
            server: found.server,
            pool: found.pool,
            advertise: config.advertise,
            labels: config.labels.clone(),
        };
        let heads = Heads::new(Arc::clone(&store), Arc::clone(&plane), holder);
        let (healer, news) = Healer::new(
            Arc::clone(&store),
            Arc::clone(&plane),
            heads.clone(),
            config.heal.policy(),
            Some(found.server),
        );
        let draining = Arc::new(AtomicBool::new(false));
        let exports = Exports::new(
            Arc::clone(&store),
            Arc::clone(&plane),
            heads,
            &config.exports,
            Memory::beside(&config.api),
            Arc::clone(&draining),
        );
        let registration =
            Registration::new(Arc::clone(&store), Arc::clone(&plane), identity.clone(), draining);
        let parts = Parts {
            name: config.name.clone(),
            cluster: found.cluster,
            identity,
            store,
            plane,
            exports,
            started: Instant::now(),
        };
        Started { parts: Arc::new(parts), registration, healer, news }
    }

    /// Answers the API until `stop` is ready or the data plane has ended, then stops everything.
    pub async fn serve(mut self, stop: impl Future<Output = ()>) -> Result<(), DaemonError> {
        let served = self.serve_api(stop).await;
        notify("STOPPING=1");
        let stopped = tokio::task::spawn_blocking(move || self.stop()).await;
        let stopped = stopped.unwrap_or_else(|error| {
            Err(DaemonError::System { action: "stop", source: io::Error::other(error) })
        });
        served.and(stopped)
    }

    async fn serve_api(&mut self, stop: impl Future<Output = ()>) -> Result<(), DaemonError> {
        let system = |source| DaemonError::System { action: "serve the API", source };
        let listener = self.listener.try_clone().map_err(system)?;
        listener.set_nonblocking(true).map_err(system)?;
        let listener = tokio::net::UnixListener::from_std(listener).map_err(system)?;
        let router = api::router(Arc::clone(&self.parts));
        notify("READY=1");
        tracing::info!(name = self.parts.name, api = %self.api.display(), "ready");
        // Requests that wait for a drain must not keep the daemon from stopping, so they are
        // dropped with the server.
        tokio::select! {
            served = axum::serve(listener, router) => served.map_err(system),
            () = stop => Ok(()),
            () = ended(&mut self.plane_stopped) => Err(DaemonError::PlaneStopped),
        }
    }

    fn stop(&mut self) -> Result<(), DaemonError> {
        tracing::info!("stopping");
        remove_socket(&self.api);
        remove_socket(&crate::upgrade::socket_of(&self.api));
        self.stop.store(true, Ordering::Release);
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a control thread had panicked");
            }
        }
        let drained = self.parts.exports.shut_down();
        match self.parts.plane.shutdown(SHUTDOWN_WAIT) {
            Ok(()) | Err(ControlError::Stopped) => {}
            Err(error) => return Err(DaemonError::Shutdown(error)),
        }
        tracing::info!("stopped");
        if drained { Ok(()) } else { Err(DaemonError::NotDrained) }
    }
}

impl Parts {
    /// Metrics of the control plane itself.
    pub(crate) fn own_metrics(&self) -> Vec<MetricFamily> {
        let gauge = |name, help, labels, value| MetricFamily {
            name,
            help,
            samples: vec![MetricSample { labels, value: MetricValue::Gauge(value) }],
        };
        let exports = self.exports.list();
        let served = exports.iter().filter(|export| export.volume.is_some()).count();
        let waiting = exports.len() - served;
        // Counts of exports are far below 2^52.
        let count = |count: usize| f64::from(u32::try_from(count).unwrap_or(u32::MAX));
        let version = vec![("version", crate::VERSION.to_owned())];
        vec![
            gauge("holdfast_build_info", "The program's version.", version, 1.0),
            gauge("holdfast_exports", "Exports that are served.", vec![], count(served)),
            gauge("holdfast_exports_waiting", "Exports that wait.", vec![], count(waiting)),
            gauge(
                "holdfast_uptime_seconds",
                "Time since the daemon started.",
                vec![],
                self.started.elapsed().as_secs_f64(),
            ),
        ]
    }
}

/// Whose pool the configured devices hold; an error unless it is this configuration's and this
/// cluster's.
fn identify(config: &Config, store: &dyn ClusterStore) -> Result<PoolIdentity, DaemonError> {
    let in_use = |error: &PoolError| matches!(error, PoolError::InUse { .. });
    let found = while_lingering(in_use, || pool::identify(&config.pool))?;
    let cluster = store.cluster_id()?;
    if found.cluster != cluster {
        let store = store.address();
        return Err(DaemonError::WrongCluster { pool: found.cluster, store, found: cluster });
    }
    let entry = cluster::servers::with_pool(store, found.pool)?
        .filter(|entry| entry.server.id == found.server)
        .ok_or_else(|| cluster::servers::not_registered(store, found.server, found.pool))?;
    if entry.server.name != config.name {
        let (found, name) = (entry.server.name, config.name.clone());
        return Err(DaemonError::WrongName { found, name });
    }
    Ok(found)
}

fn is_in_use(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::AddrInUse
}

fn remove_socket(path: &std::path::Path) {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(path = %path.display(), %error, "cannot remove the socket");
        }
        Ok(()) | Err(_) => {}
    }
}

/// Ready when the data plane has ended; never, if whoever would know has gone first.
async fn ended(plane_stopped: &mut watch::Receiver<bool>) {
    if plane_stopped.wait_for(|stopped| *stopped).await.is_err() {
        std::future::pending::<()>().await;
    }
}

fn register_until(stop: &AtomicBool, mut registration: Registration) {
    while !stop.load(Ordering::Acquire) {
        registration.turn(TURN);
    }
    if let Err(error) = registration.leave() {
        tracing::warn!(%error, "cannot tell the cluster store that this server leaves");
    }
}

fn tend_until(stop: &AtomicBool, exports: &Exports) {
    while !stop.load(Ordering::Acquire) {
        exports.tend();
        std::thread::park_timeout(TEND_INTERVAL);
    }
}

/// True if the data plane has ended.
fn handle_events_until(stop: &AtomicBool, parts: &Parts, news: &Sender<Event>) -> bool {
    while !stop.load(Ordering::Acquire) {
        let event = parts.plane.next_event(TURN);
        if let Some(event) = &event {
            parts.exports.note(event);
            if healer::concerns(event) {
                // Nobody takes them only if the healer has panicked, which is told at the end.
                let _ = news.send(event.clone());
            }
        }
        match event {
            Some(Event::Opened { volume, epoch }) => {
                tracing::info!(%volume, epoch = epoch.0, "open");
            }
            Some(Event::Superseded { volume, epoch, sealed }) => {
                parts.exports.note_sealed(volume, sealed);
                parts.exports.deposed(volume, epoch, sealed);
            }
            Some(Event::Unopenable { volume, epoch, reason }) => {
                parts.exports.head_ended(volume, epoch, &reason);
            }
            Some(
                Event::MemberDown { .. }
                | Event::MemberUp { .. }
                | Event::MemberSlow { .. }
                | Event::Mended { .. }
                | Event::FrontEnd { .. }
                | Event::RingsStarted { .. }
                | Event::RingsStopped { .. }
                | Event::Resized { .. },
            )
            | None => {}
            Some(Event::PoolFailed { reason }) => {
                tracing::error!(reason, "the pool has failed; replace the device and restart");
            }
            Some(Event::Stopped) => return true,
        }
    }
    false
}
