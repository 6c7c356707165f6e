//! An etcd, started by the harness: the cluster store of more than one machine.

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

/// A running member of an etcd. Dropping it kills it; what it keeps stays.
#[derive(Debug)]
pub struct Etcd {
    process: Process,
    address: String,
}

/// A member, as it is before it runs.
struct Member<'a> {
    name: String,
    address: &'a str,
}

impl Member<'_> {
    /// Where its clients, and where the other members reach it.
    fn urls(&self) -> Result<(String, String)> {
        let (host, port) = self.address.rsplit_once(':').context("an address with a port")?;
        let port: u16 = port.parse()?;
        // Where no server listens.
        let peer_port = port.checked_add(PEER_PORT_OFFSET).context("a port below the others")?;
        Ok((format!("http://{}", self.address), format!("http://{host}:{peer_port}")))
    }

    /// Starts it; `all` are the members of its etcd. What its log says from the given place on is its own.
    fn start(&self, lab: &Lab, place: &Place, all: &[Self]) -> Result<(Process, usize)> {
        let data = lab.directory().join(format!("{}.etcd", self.name));
        let (client, peer) = self.urls()?;
        let named = |member: &Self| Ok(format!("{}={}", member.name, member.urls()?.1));
        let all = all.iter().map(named).collect::<Result<Vec<String>>>()?;
        let arguments = [
            "--name",
            &self.name,
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
            &all.join(","),
        ];
        let log = lab.log(&self.name);
        let before = std::fs::read(&log).map_or(0, |said| said.len());
        let process = Process::start_at(place, &self.name, &program()?, arguments, &log)?;
        Ok((process, before))
    }

    /// Waits until it serves, which it does with a quorum of members.
    fn wait(&self, lab: &Lab, (mut process, before): (Process, usize)) -> Result<Etcd> {
        let log = lab.log(&self.name);
        wait_until("etcd to serve", Deadline::seconds(START_SECONDS), || {
            process.check_alive()?;
            let said = std::fs::read(&log)?;
            let said = String::from_utf8_lossy(said.get(before..).unwrap_or_default());
            Ok(said.contains("ready to serve client requests").then_some(()))
        })?;
        Ok(Etcd { process, address: self.address.to_owned() })
    }
}

impl Etcd {
    /// Starts one of one member at this address (`127.0.0.1:PORT`), somewhere.
    pub fn start(lab: &Lab, place: &Place, name: &str, address: &str) -> Result<Self> {
        let alone = Member { name: name.to_owned(), address };
        let started = alone.start(lab, place, std::slice::from_ref(&alone))?;
        alone.wait(lab, started)
    }

    /// Starts those members of one at these addresses that are not `running`, and waits until all serve.
    pub fn start_members(
        lab: &Lab,
        addresses: &[String],
        running: &mut [Option<Self>],
    ) -> Result<()> {
        let numbered = addresses.iter().enumerate();
        let all: Vec<Member<'_>> = numbered
            .map(|(number, address)| Member { name: format!("etcd-{number}"), address })
            .collect();
        let mut started = Vec::new();
        for (member, slot) in all.iter().zip(running).filter(|(_, slot)| slot.is_none()) {
            started.push((member, slot, member.start(lab, &Place::HERE, &all)?));
        }
        for (member, slot, process) in started {
            *slot = Some(member.wait(lab, process)?);
        }
        Ok(())
    }

    /// The address of a cluster store in the etcd at these addresses, as `--store` takes it.
    pub fn store_at(addresses: &[String]) -> String {
        format!("etcd://{}/holdfast", addresses.join(","))
    }

    /// The cluster store's address in it, as `--store` takes it.
    pub fn store(&self) -> String {
        Self::store_at(std::slice::from_ref(&self.address))
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
