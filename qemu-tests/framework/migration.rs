//! A guest with a verifying writer that moves between two hosts, and what it felt.
//!
//! The hosts are network namespaces, each with a back end of its own that stands by: the daemon of a
//! server that has a replica, or `holdfast attach`, or, to compare with, a daemon of QEMU's. QEMU's migration stream goes over the network between
//! them. The volume's lease follows the guest's rings; nobody is told of a migration.

mod attempt;
mod own;
mod qemu;
mod trace;

use std::fs::File;
use std::io::Read as _;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

pub use attempt::{Move, Step};
pub use qemu::{move_guest, move_guest_meanwhile};

use crate::cluster::{Attached, Cluster, ClusterOptions, PoolSizes};
use crate::etcd::Etcd;
use crate::guest::{Guest, GuestOptions};
use crate::lab::Lab;
use crate::network::{Network, Place};
use crate::process::Process;
use crate::storage_daemon::StorageDaemon;
use crate::wait::Deadline;
use crate::writer::{Seen, Writer, WriterOptions};

/// The volume's size, in MiB.
const VOLUME_MIB: u64 = 64;

/// How long to wait for anything that is to happen at once, when the machine is busy.
const PATIENCE_SECONDS: u64 = 120;

/// Requests that are answered between two things that happen.
const CALM: u64 = 300;

/// The hosts of the network: servers, two hosts without a disk, and the cluster store's.
const NAMES: [&str; 7] = ["a", "b", "c", "d", "one", "two", "store"];

/// What the guest's hosts are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hosts {
    /// Servers: the guest's daemon has a replica of its volume.
    Servers,
    /// Hosts without a disk, with `holdfast attach`.
    Diskless,
    /// Hosts without Holdfast: both serve the same file, by QEMU's storage daemon. To compare with.
    BareFile,
}

impl Hosts {
    /// For command lines and tables.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Servers => "servers",
            Self::Diskless => "diskless",
            Self::BareFile => "bare-file",
        }
    }

    const fn names(self) -> [&'static str; 2] {
        match self {
            Self::Servers => ["a", "b"],
            Self::Diskless | Self::BareFile => ["one", "two"],
        }
    }
}

/// One of the two hosts.
#[derive(Debug)]
struct Host {
    place: Place,
    address: Ipv4Addr,
    socket: PathBuf,
    /// What serves it, if that is no server.
    back_end: Option<BackEnd>,
}

/// A process that serves one guest.
#[derive(Debug)]
enum BackEnd {
    Attached(Attached),
    Bare(StorageDaemon),
}

impl BackEnd {
    fn process(&mut self) -> &mut Process {
        match self {
            Self::Attached(attached) => &mut attached.process,
            Self::Bare(daemon) => daemon.process(),
        }
    }
}

/// Two hosts, and the guest on one of them.
#[derive(Debug)]
pub struct Rig<'lab> {
    lab: &'lab Lab,
    cluster: Cluster<'lab>,
    hosts: [Host; 2],
    here: usize,
    guest: Guest,
    writer: Writer,
    limit: Duration,
    guests_make_way: bool,
    launched: u16,
}

/// What a rig is made of.
#[derive(Debug, Clone)]
pub struct RigOptions {
    /// The guest's hosts.
    pub hosts: Hosts,
    /// How long the guest lives at most.
    pub limit: Duration,
    /// What its writer does.
    pub writer: WriterOptions,
    /// How many servers there are.
    pub servers: usize,
    /// Their devices.
    pub sizes: PoolSizes,
    /// The cluster store's address; `None`: a SQLite file.
    pub store: Option<String>,
    /// Whether guests run at a lower priority than all else ([`GuestOptions::makes_way`]).
    pub guests_make_way: bool,
}

impl RigOptions {
    /// A writer as usual, three servers, and the cluster store in a file.
    pub fn new(hosts: Hosts, limit: Duration) -> Self {
        let (writer, sizes) = (WriterOptions::default(), PoolSizes::default());
        Self { hosts, limit, writer, servers: 3, sizes, store: None, guests_make_way: false }
    }
}

/// An etcd on the network's host for the cluster store.
pub fn start_store(lab: &Lab, network: &Network) -> Result<Etcd> {
    let address = format!("{}:2379", network.address("store")?);
    Etcd::start(lab, &network.place("store")?, "etcd", &address)
}

/// The network that a rig wants.
pub fn network(lab: &Lab) -> Result<Network> {
    Network::start(lab, &NAMES)
}

impl<'lab> Rig<'lab> {
    /// Starts servers, makes a volume, lets both hosts stand by, and boots the guest on the first one.
    pub fn start(lab: &'lab Lab, network: &'lab Network, options: RigOptions) -> Result<Self> {
        let cluster = Cluster::start_of(
            lab,
            ClusterOptions {
                servers: options.servers,
                sizes: options.sizes,
                network: Some(network),
                store: options.store,
                ..ClusterOptions::default()
            },
        )?;
        let file = lab.directory().join("bare.img");
        match options.hosts {
            Hosts::Servers | Hosts::Diskless => cluster.create_volume("disk", VOLUME_MIB, 3)?,
            Hosts::BareFile => write_whole(&file, VOLUME_MIB)?,
        }
        let host = |number: usize| {
            let name = options.hosts.names()[number];
            let place = network.place(name)?;
            let (socket, back_end) = match options.hosts {
                Hosts::Servers => (cluster.export_standby(number, "disk")?, None),
                Hosts::Diskless => {
                    let mut attached = cluster.start_attach("disk", &place, &["--standby"])?;
                    attached.wait_for_socket()?;
                    (attached.socket.clone(), Some(BackEnd::Attached(attached)))
                }
                Hosts::BareFile => {
                    let daemon = StorageDaemon::share(lab, &format!("bare-{name}"), &file)?;
                    (daemon.socket().to_owned(), Some(BackEnd::Bare(daemon)))
                }
            };
            Ok::<_, anyhow::Error>(Host {
                place,
                address: network.address(name)?,
                socket,
                back_end,
            })
        };
        let hosts = [host(0)?, host(1)?];
        let (limit, guests_make_way) = (options.limit, options.guests_make_way);
        let boot =
            GuestOptions { makes_way: guests_make_way, ..guest_options(&hosts[0], 0, limit) };
        let mut guest = Guest::boot(lab, &boot)?;
        let writer = Writer::start(&mut guest, options.writer)?;
        writer.wait_for(&mut guest, CALM, Deadline::seconds(PATIENCE_SECONDS))?;
        Ok(Self {
            lab,
            cluster,
            hosts,
            here: 0,
            guest,
            writer,
            limit,
            guests_make_way,
            launched: 1,
        })
    }

    /// The servers.
    pub fn cluster(&self) -> &Cluster<'lab> {
        &self.cluster
    }

    /// The guest, wherever it is.
    pub fn guest(&mut self) -> &mut Guest {
        &mut self.guest
    }

    /// The number of the host that the guest is on.
    pub fn here(&self) -> usize {
        self.here
    }

    /// Waits until the guest got on a bit, and has seen nothing wrong.
    pub fn calm(&mut self) -> Result<Seen> {
        let deadline = Deadline::seconds(PATIENCE_SECONDS);
        let seen = self.writer.wait_for(&mut self.guest, CALM, deadline);
        seen.with_context(|| format!("the guest is on host {}", self.here))
    }

    /// What the guest saw, and how much of it, without waiting.
    pub fn seen(&mut self) -> Result<Seen> {
        self.writer.seen(&mut self.guest)
    }

    /// Every block is what was written, nobody complained, and all processes are there.
    pub fn finish(mut self) -> Result<()> {
        let seen = self.writer.finish(&mut self.guest)?;
        ensure!(seen.checked > 0, "nothing was checked in the end");
        self.guest.check_no_complaints()?;
        for host in &mut self.hosts {
            host.back_end.iter_mut().try_for_each(|back_end| back_end.process().check_alive())?;
        }
        self.cluster.servers().iter().try_for_each(crate::cluster::Server::check_alive)?;
        self.guest.power_off()
    }

    /// What the back end on a host has said so far.
    pub fn said(&self, host: usize) -> Result<String> {
        let log = match &self.hosts[host].back_end {
            Some(BackEnd::Attached(attached)) => attached.process.log(),
            Some(BackEnd::Bare(daemon)) => daemon.log(),
            None => self.cluster.servers()[host].log(),
        };
        Ok(std::fs::read_to_string(log)?)
    }
}

/// Makes a file of so many MiB, of zeroes that were written.
fn write_whole(path: &Path, mib: u64) -> Result<()> {
    let mut file = File::create(path)?;
    std::io::copy(&mut std::io::repeat(0).take(mib << 20), &mut file)?;
    Ok(file.sync_all()?)
}

fn guest_options(host: &Host, number: u16, limit: Duration) -> GuestOptions {
    GuestOptions {
        place: host.place.clone(),
        writer: true,
        limit,
        ..GuestOptions::new(&format!("guest{number}")).disk("disk", &host.socket)
    }
}
