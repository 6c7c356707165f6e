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
        // Peers' port: nobody else comes there, but it must be one.
        let (client, peer) = (format!("http://{address}"), format!("http://{host}:{}", port + 1));
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
        let mut process = Process::start_at(place, name, &program()?, arguments, &log)?;
        wait_until("etcd to serve", Deadline::seconds(START_SECONDS), || {
            process.check_alive()?;
            let said = std::fs::read_to_string(&log)?;
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
