//! An etcd of one member, started by the harness: the cluster store of more than one machine.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::binaries::{cache_directory, system_binary};
use crate::lab::Lab;
use crate::network::Place;
use crate::process::Process;
use crate::wait::{Deadline, wait_until};

/// How long it may take to answer.
const START_SECONDS: u64 = 30;

/// How far above its clients' port its peers' port is.
const PEER_PORT_OFFSET: u16 = 10_000;

/// A running etcd. Dropping it kills it; what it keeps stays.
#[derive(Debug)]
pub struct Etcd {
    process: Process,
    address: String,
}

impl Etcd {
    /// Starts one at this address (`127.0.0.1:PORT`), somewhere.
    pub fn start(lab: &Lab, place: &Place, name: &str, address: &str) -> Result<Self> {
        let data = lab.directory().join(format!("{name}.etcd"));
        let (host, port) = address.rsplit_once(':').context("an address with a port")?;
        let port: u16 = port.parse()?;
        // Nobody comes to the peers' port, but there must be one, where no server listens.
        let peer_port = port.checked_add(PEER_PORT_OFFSET).context("a port below the others")?;
        let (client, peer) = (format!("http://{address}"), format!("http://{host}:{peer_port}"));
        let arguments = [
            "--name",
            name,
            "--data-dir",
            &data.display().to_string(),
            "--listen-client-urls",
            &client,
            "--advertise-client-urls",
            &client,
            "--listen-peer-urls",
            &peer,
            "--initial-advertise-peer-urls",
            &peer,
            "--initial-cluster",
            &format!("{name}={peer}"),
        ];
        let log = lab.log(name);
        // What an earlier one said does not count.
        let before = std::fs::read(&log).map_or(0, |said| said.len());
        let mut process = Process::start_at(place, name, &program()?, arguments, &log)?;
        wait_until("etcd to serve", Deadline::seconds(START_SECONDS), || {
            process.check_alive()?;
            let said = std::fs::read(&log)?;
            let said = String::from_utf8_lossy(said.get(before..).unwrap_or_default());
            Ok(said.contains("ready to serve client requests").then_some(()))
        })?;
        Ok(Self { process, address: address.to_owned() })
    }

    /// The cluster store's address in it, as `--store` takes it.
    pub fn store(&self) -> String {
        format!("etcd://{}/holdfast", self.address)
    }

    /// The process, to be stopped and resumed.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }
}

/// Debian's etcd, from wherever scripts/install has put it.
fn program() -> Result<PathBuf> {
    let unpacked: &Path = &cache_directory()?.join("etcd/usr/bin/etcd");
    if unpacked.exists() {
        return Ok(unpacked.to_owned());
    }
    system_binary("etcd")
}
