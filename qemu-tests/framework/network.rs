//! Hosts with a network between them that can be cut: network namespaces on one bridge.
//!
//! Each host is a namespace with one end of a veth pair; the other end is a port of a bridge in a
//! namespace of its own, so nothing of it is seen outside, and tests that run at the same time may
//! use the same addresses. Whatever is cut is *silent*: packets vanish, nothing is closed, nobody
//! is told. The namespaces are anonymous and held by processes: they end with the test, however
//! it ends.

use std::fmt::Write as _;
use std::io::Write as _;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::binaries::system_binary;
use crate::lab::Lab;
use crate::process::Process;
use crate::wait::{Deadline, wait_until};

/// How long a namespace may take to be there.
const START_SECONDS: u64 = 10;

/// The hosts of a network, at most.
const HOSTS_MAX: usize = 16;

/// A place where processes are started: this machine's own network, or a host's.
#[derive(Debug, Clone, Default)]
pub struct Place {
    namespace: Option<PathBuf>,
}

impl Place {
    /// This machine's own network.
    pub const HERE: Self = Self { namespace: None };

    /// What goes before a command line, so that it runs there. It replaces itself with the
    /// command: the process id stays.
    pub(crate) fn prefix(&self) -> Result<Vec<String>> {
        let Some(namespace) = &self.namespace else { return Ok(Vec::new()) };
        let nsenter = system_binary("nsenter")?.display().to_string();
        Ok(vec![nsenter, format!("--net={}", namespace.display()), "--".to_owned()])
    }

    /// A command that runs there.
    pub fn command(&self, program: &Path) -> Result<Command> {
        let mut words = self.prefix()?;
        words.push(program.display().to_string());
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]);
        Ok(command)
    }
}

/// Hosts, and the switch that they are plugged into.
#[derive(Debug)]
pub struct Network {
    switch: Place,
    hosts: Vec<Host>,
    // Dropped last: the namespaces go with their holders.
    _holders: Vec<Process>,
}

/// One host.
#[derive(Debug)]
struct Host {
    name: String,
    place: Place,
}

impl Network {
    /// Why this machine cannot have such a network, if it cannot.
    pub fn unavailable() -> Option<String> {
        let Ok(unshare) = system_binary("unshare") else {
            return Some("unshare is not installed".to_owned());
        };
        if let Err(error) = system_binary("ip") {
            return Some(error.to_string());
        }
        let made = Command::new(unshare).args(["--net", "--", "true"]).output();
        match made {
            Ok(output) if output.status.success() => None,
            Ok(output) => Some(format!(
                "network namespaces need root: {}",
                String::from_utf8_lossy(&output.stderr).trim()
            )),
            Err(error) => Some(error.to_string()),
        }
    }

    /// A network of hosts with these names.
    pub fn start(lab: &Lab, names: &[&str]) -> Result<Self> {
        ensure!(names.len() <= HOSTS_MAX, "at most {HOSTS_MAX} hosts");
        let mut holders = vec![hold(lab, "switch")?];
        for name in names {
            holders.push(hold(lab, name)?);
        }
        let places: Vec<Place> = holders.iter().map(place_of).collect();
        let pids: Vec<u32> = holders.iter().map(Process::pid).collect();
        let hosts = names.iter().zip(&places[1..]);
        let hosts =
            hosts.map(|(name, place)| Host { name: (*name).to_owned(), place: place.clone() });
        let network = Self { switch: places[0].clone(), hosts: hosts.collect(), _holders: holders };
        network.plug_in(&pids[1..])?;
        Ok(network)
    }

    fn plug_in(&self, pids: &[u32]) -> Result<()> {
        let mut switch =
            "link set lo up\nlink add bridge type bridge\nlink set bridge up\n".to_owned();
        for (index, pid) in pids.iter().enumerate() {
            writeln!(switch, "link add {} type veth peer name eth0 netns {pid}", port(index))?;
            writeln!(switch, "link set {} master bridge up", port(index))?;
        }
        // The switch's own address is the operator's seat.
        writeln!(switch, "addr add {}/24 dev bridge", address(HOSTS_MAX))?;
        writeln!(switch, "link set bridge address {}", station(HOSTS_MAX))?;
        switch.push_str(&self.neighbours("bridge", None));
        ip(&self.switch, &switch)?;
        for (index, host) in self.hosts.iter().enumerate() {
            let mut lines = "link set lo up\n".to_owned();
            writeln!(lines, "link set eth0 address {}", station(index))?;
            writeln!(lines, "addr add {}/24 dev eth0", address(index))?;
            writeln!(lines, "link set eth0 up")?;
            lines.push_str(&self.neighbours("eth0", Some(index)));
            ip(&host.place, &lines)?;
        }
        Ok(())
    }

    /// Everybody knows everybody from the start: no packet waits for an address to be resolved.
    fn neighbours(&self, device: &str, but: Option<usize>) -> String {
        let all = (0..self.hosts.len()).chain([HOSTS_MAX]).filter(|index| Some(*index) != but);
        all.filter(|index| but.is_some() || *index != HOSTS_MAX)
            .map(|index| neighbour(device, index, &station(index)))
            .collect()
    }

    fn index(&self, host: &str) -> Result<usize> {
        let found = self.hosts.iter().position(|known| known.name == host);
        found.with_context(|| format!("there is no host {host}"))
    }

    /// A host's address.
    pub fn address(&self, host: &str) -> Result<Ipv4Addr> {
        Ok(address(self.index(host)?))
    }

    /// Where a host's processes run.
    pub fn place(&self, host: &str) -> Result<Place> {
        Ok(self.hosts[self.index(host)?].place.clone())
    }

    /// Where an operator's commands run: at the switch, which reaches everybody that is plugged in.
    pub fn seat(&self) -> Place {
        self.switch.clone()
    }

    /// From now on nothing that the host sends arrives, and nothing arrives at it.
    pub fn isolate(&self, host: &str) -> Result<()> {
        let index = self.index(host)?;
        ip(&self.switch, &format!("link set {} nomaster\n", port(index)))
    }

    /// The end of [`Network::isolate`].
    pub fn rejoin(&self, host: &str) -> Result<()> {
        let index = self.index(host)?;
        ip(&self.switch, &format!("link set {} master bridge\n", port(index)))
    }

    /// From now on nothing that `from` sends `to` arrives; the other direction works.
    pub fn cut(&self, from: &str, to: &str) -> Result<()> {
        let (from, to) = (self.index(from)?, self.index(to)?);
        // To a station that nobody has.
        ip(&self.hosts[from].place, &neighbour("eth0", to, "02:00:00:00:ff:ff"))
    }

    /// The end of [`Network::cut`].
    pub fn mend(&self, from: &str, to: &str) -> Result<()> {
        let (from, to) = (self.index(from)?, self.index(to)?);
        ip(&self.hosts[from].place, &neighbour("eth0", to, &station(to)))
    }
}

fn port(index: usize) -> String {
    format!("port{index}")
}

fn address(index: usize) -> Ipv4Addr {
    let last = u8::try_from(index + 1).expect("HOSTS_MAX fits a byte");
    Ipv4Addr::new(10, 77, 0, last)
}

fn station(index: usize) -> String {
    format!("02:00:00:00:00:{:02x}", index + 1)
}

fn neighbour(device: &str, to: usize, station: &str) -> String {
    format!("neigh replace {} lladdr {station} dev {device} nud permanent\n", address(to))
}

/// Starts a process that does nothing in a network namespace of its own.
fn hold(lab: &Lab, name: &str) -> Result<Process> {
    let unshare = system_binary("unshare")?;
    let arguments = ["--net", "--", "sleep", "infinity"];
    let log = lab.log("network");
    let mut holder = Process::start(&format!("network of {name}"), &unshare, arguments, &log)?;
    let own = std::fs::read_link("/proc/self/ns/net")?;
    wait_until("a network namespace", Deadline::seconds(START_SECONDS), || {
        holder.check_alive()?;
        let its = std::fs::read_link(format!("/proc/{}/ns/net", holder.pid()))?;
        let runs = std::fs::read_to_string(format!("/proc/{}/comm", holder.pid()))?;
        Ok((its != own && runs.trim() == "sleep").then_some(()))
    })?;
    Ok(holder)
}

fn place_of(holder: &Process) -> Place {
    Place { namespace: Some(PathBuf::from(format!("/proc/{}/ns/net", holder.pid()))) }
}

/// Runs `ip` commands, one a line, in a namespace.
fn ip(place: &Place, lines: &str) -> Result<()> {
    let mut command = place.command(&system_binary("ip")?)?;
    let mut child = command
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    child.stdin.take().context("ip's input")?.write_all(lines.as_bytes())?;
    let output = child.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "ip: {said}of\n{lines}");
    Ok(())
}
