//! How a daemon leaves to the next one, and takes over from one.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use base::{ClusterId, Holder, PoolId, ServerId};
use cluster::{ClusterStore, Create, StoreError};
use shell::Prepared;
use shell::control::ServerAddress;
use shell::handover::{Inherited, Left};

use super::{Daemon, DaemonError, Listeners, Parts, plane_config};
use crate::config::Config;
use crate::follow::Leases;
use crate::heads;
use crate::pool::PoolIdentity;
use crate::upgrade::{self, Leaves, Next, Outcome, PassOn, UpgradeError};

/// How long the log may take to go home before an upgrade; all is served meanwhile.
const LOG_HOME: Duration = Duration::from_secs(5);

const CLUSTER: &str = "cluster";
const SERVER: &str = "server";
const POOL: &str = "pool";
const NAME: &str = "name";
const API: &str = "api";
const UPGRADES: &str = "upgrade";

/// A daemon that may be asked to leave.
pub(super) struct Leaving {
    pub(super) parts: Arc<Parts>,
    pub(super) listeners: Listeners,
}

impl Leaving {
    /// Answers at the upgrade socket until `stop` is set. Once another process has taken over, ends
    /// this one, where it stands: nothing here may be touched any more.
    pub(super) fn run(&self, stop: &AtomicBool) {
        if upgrade::serve(&self.listeners.upgrades, stop, self) {
            tracing::info!("another process has taken over");
            std::process::exit(0);
        }
    }
}

impl Leaves for Leaving {
    fn about(&self) -> BTreeMap<String, String> {
        let parts = &self.parts;
        let identity = &parts.identity;
        [
            (CLUSTER, parts.cluster.to_string()),
            (SERVER, identity.server.to_string()),
            (POOL, identity.pool.to_string()),
            (NAME, parts.name.clone()),
        ]
        .into_iter()
        .map(|(key, value)| (key.to_owned(), value))
        .collect()
    }

    fn leave(&self, pass_on: &mut PassOn<'_>) -> Result<Outcome, String> {
        let plane = Arc::clone(&self.parts.plane);
        let hand_over = plane.handing_over().ok_or("this data plane cannot be handed over")?;
        hand_over.prepare(LOG_HOME);
        let _frozen = self.parts.exports.freeze();
        self.parts.exports.end_repairs();
        let named: [(&str, BorrowedFd<'_>); 2] =
            [(API, self.listeners.api.as_fd()), (UPGRADES, self.listeners.upgrades.as_fd())];
        let exports = &self.parts.exports;
        let left = upgrade::leave_by(hand_over, &named, pass_on, |left| {
            exports.take_back(hand_over, left);
        });
        if left != Ok(Outcome::Gone) {
            exports.thaw();
        }
        left
    }
}

impl Daemon {
    /// Takes everything over from the daemon that runs with this configuration. With an error that
    /// one goes on, and this process must end at once, touching nothing.
    pub fn take_over(config: Config) -> Result<Self, DaemonError> {
        let mut next = Next::ask(&upgrade::socket_of(&config.api))?;
        match prepare_and_take(&config, &mut next) {
            Ok(taken) => {
                let Taken { started, listeners, hand_over_of } = taken;
                next.ready()?;
                if let Some(hand_over) = hand_over_of.handing_over() {
                    hand_over.go();
                }
                Self::begin(config, started, listeners)
            }
            Err(error) => {
                // Now: the running daemon ends this process as soon as it knows.
                tracing::error!(%error, "not taken over; the running daemon goes on");
                next.fail(&error.to_string());
                Err(error)
            }
        }
    }
}

struct Taken {
    started: super::Started,
    listeners: Listeners,
    hand_over_of: Arc<dyn shell::control::DataPlane>,
}

fn prepare_and_take(config: &Config, next: &mut Next) -> Result<Taken, DaemonError> {
    let found = identity(next, config)?;
    let store = cluster::open(&config.store, Create::Never)?;
    let prepared = Prepared::new(&plane_config(config, &found))?;
    let me = heads::server_holder(found.server, &config.name);
    // Without the store a server that serves no guest can still be taken over.
    let surroundings = Surroundings::of(store.as_ref(), &me);
    let surroundings = surroundings.inspect_err(|error| tracing::warn!(%error, "taking over")).ok();
    // Now nobody serves: whatever could be done before is done.
    let taking = Instant::now();
    let (left, mut named) = next.take()?;
    let taken = taking.elapsed();
    let Left { listener, exports, legacy } = left;
    let mut listener_named = |name: &'static str| {
        let fd = named.remove(name).ok_or_else(|| {
            UpgradeError::Refused(format!("the running daemon left no {name} socket"))
        })?;
        Ok::<_, DaemonError>(UnixListener::from(fd))
    };
    let listeners = Listeners { api: listener_named(API)?, upgrades: listener_named(UPGRADES)? };
    let knows_servers = surroundings.is_some();
    let Surroundings { servers, connect } = surroundings.unwrap_or_default();
    let inherited = Inherited { listener, legacy, servers, connect };
    // The pool takes its time to open.
    let (plane, leases) = std::thread::scope(|scope| {
        let renew = || Leases::renewed(store.as_ref(), &me, &exports);
        let leases = knows_servers.then(|| scope.spawn(renew));
        let plane = prepared.start(inherited);
        (plane, leases.and_then(|leases| leases.join().ok()).unwrap_or_default())
    });
    let plane = plane?;
    let running = taking.elapsed();
    let started = Daemon::start_parts(config, store, found, Arc::clone(&plane));
    let hand_over = plane.handing_over().expect("a started data plane can be handed over");
    started.parts.exports.go_on(hand_over, exports, leases).map_err(|reason| {
        DaemonError::System { action: "go on with the exports", source: io::Error::other(reason) }
    })?;
    tracing::info!(
        left_after = ?taken, pool_open_after = ?running, served_after = ?taking.elapsed(),
        "everything is taken over"
    );
    Ok(Taken { started, listeners, hand_over_of: plane })
}

/// What a data plane is told of the servers before it opens its pool.
#[derive(Default)]
struct Surroundings {
    servers: Vec<ServerAddress>,
    /// Those with members of volumes that are served here.
    connect: Vec<ServerId>,
}

impl Surroundings {
    fn of(store: &dyn ClusterStore, me: &Holder) -> Result<Self, StoreError> {
        let mut connect = BTreeSet::new();
        for entry in store.volumes()? {
            if entry.volume.holder.is_some_and(|holder| holder.id == me.id) {
                connect.extend(entry.shard.members.iter().map(|member| member.server));
            }
        }
        let servers = heads::addresses(&store.servers()?);
        Ok(Self { servers, connect: connect.into_iter().collect() })
    }
}

/// Whose pool the running daemon has; an error if the configuration is for another one.
fn identity(next: &Next, config: &Config) -> Result<PoolIdentity, DaemonError> {
    fn parsed<T: std::str::FromStr>(next: &Next, key: &str) -> Result<T, DaemonError> {
        next.about(key).and_then(|text| text.parse().ok()).ok_or_else(|| {
            UpgradeError::Refused(format!("the running daemon does not say its {key}")).into()
        })
    }
    let name: String = parsed(next, NAME)?;
    if name != config.name {
        return Err(DaemonError::WrongName { found: name, name: config.name.clone() });
    }
    Ok(PoolIdentity {
        cluster: parsed::<ClusterId>(next, CLUSTER)?,
        server: parsed::<ServerId>(next, SERVER)?,
        pool: parsed::<PoolId>(next, POOL)?,
    })
}
