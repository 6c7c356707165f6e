//! A cluster on one machine: `holdfastd` servers on loopback over one SQLite store.

use std::cell::{Cell, RefCell};
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::binaries::{holdfast_binary, system_binary};
use crate::lab::Lab;
use crate::network::{Network, Place};
use crate::process::Process;
use crate::proxy::Proxy;
use crate::wait::{Deadline, wait_until};

/// How long a server may take to start: recovery of a full log included.
const START_LIMIT: Duration = Duration::from_mins(1);

/// How long an orderly stop may take.
const STOP_LIMIT: Duration = Duration::from_mins(1);

/// How long members that were away may take to be up to date again.
const HEAL_LIMIT: Duration = Duration::from_mins(1);

/// What servers are called.
const NAMES: [&str; 8] = ["a", "b", "c", "d", "e", "f", "g", "h"];

/// How long one command of the CLI may take.
const COMMAND_SECONDS: u64 = 180;

/// The port of the first server. Below the ephemeral range, so that no connection takes it.
const FIRST_PORT: u16 = 4420;

/// The sizes of a server's devices.
#[derive(Debug, Clone, Copy)]
pub struct PoolSizes {
    /// The log's device, in MiB.
    pub fast_mib: u64,
    /// The home's device, in MiB.
    pub mass_mib: u64,
    /// Whether they have their space.
    pub space: Space,
    /// The daemon's memory for data under way, in MiB.
    pub buffers_mib: u64,
}

impl Default for PoolSizes {
    fn default() -> Self {
        Self { fast_mib: 512, mass_mib: 1024, space: Space::Sparse, buffers_mib: 128 }
    }
}

/// Whether a device, which is a file here, has its space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Space {
    /// When it is written to: quickly made.
    Sparse,
    /// It is taken from the file system.
    Taken,
    /// It was written once: a sync waits for the device and not for the file system, which would first
    /// note where everything is, together with what everybody else has written. As a block device.
    Written,
}

/// What a cluster is made of.
#[derive(Debug, Clone, Default)]
pub struct ClusterOptions<'lab> {
    /// Servers, named `a`, `b` and so on.
    pub servers: usize,
    /// Their devices.
    pub sizes: PoolSizes,
    /// Each server runs on the host of its name; `None`: all on loopback.
    pub network: Option<&'lab Network>,
    /// Others reach each server through a relay ([`Server::proxy`]).
    pub proxied: bool,
    /// The cluster store's address; `None`: a SQLite file.
    pub store: Option<String>,
    /// What is added to every server's configuration. `{name}` stands for the server's name.
    pub configuration: String,
}

/// Some servers, and the store they share.
#[derive(Debug)]
pub struct Cluster<'lab> {
    lab: &'lab Lab,
    options: ClusterOptions<'lab>,
    store: String,
    /// Where the operator's commands run.
    seat: Place,
    servers: Vec<Server>,
    attached: Cell<usize>,
}

/// One server: its configuration, and its process while it runs.
#[derive(Debug)]
pub struct Server {
    name: String,
    config: PathBuf,
    api: PathBuf,
    log: PathBuf,
    place: Place,
    proxy: Option<Proxy>,
    process: RefCell<Option<Process>>,
}

/// A running `holdfast attach`.
#[derive(Debug)]
pub struct Attached {
    /// The process; its death is the disk's.
    pub process: Process,
    /// Where it serves the volume.
    pub socket: PathBuf,
}

impl<'lab> Cluster<'lab> {
    /// Formats pools for `count` servers, named `a`, `b` and so on, and starts them all.
    pub fn start(lab: &'lab Lab, count: usize) -> Result<Self> {
        Self::start_with(lab, count, PoolSizes::default())
    }

    /// The same, with pools of other sizes.
    pub fn start_with(lab: &'lab Lab, count: usize, sizes: PoolSizes) -> Result<Self> {
        let options = ClusterOptions { servers: count, sizes, ..ClusterOptions::default() };
        Self::start_of(lab, options)
    }

    /// The same, of whatever the options say.
    pub fn start_of(lab: &'lab Lab, options: ClusterOptions<'lab>) -> Result<Self> {
        let file = || format!("sqlite:{}", lab.directory().join("cluster.db").display());
        let store = options.store.clone().unwrap_or_else(file);
        let seat = options.network.map(Network::seat).unwrap_or_default();
        let (servers, attached) = (Vec::new(), Cell::new(0));
        let mut cluster = Self { lab, options, store, seat, servers, attached };
        ensure!(cluster.options.servers <= NAMES.len(), "at most {} servers", NAMES.len());
        for name in &NAMES[..cluster.options.servers] {
            let server = cluster.format(name)?;
            cluster.servers.push(server);
        }
        if cluster.options.sizes.space == Space::Written {
            lab.wait_for_calm_disk()?;
        }
        cluster.start_all()?;
        Ok(cluster)
    }

    fn format(&self, name: &str) -> Result<Server> {
        let sizes = self.options.sizes;
        let device = |role: &str, mib: u64| {
            let (file, bytes) = (format!("{name}-{role}"), mib << 20);
            let path = match sizes.space {
                Space::Sparse => self.lab.file(&file, bytes)?,
                Space::Taken => self.lab.preallocated_file(&file, bytes)?,
                Space::Written => self.lab.written_file(&file, bytes)?,
            };
            Ok::<_, anyhow::Error>(path.display().to_string())
        };
        let (fast, mass) = (device("fast", sizes.fast_mib)?, device("mass", sizes.mass_mib)?);
        self.holdfast(&["pool", "format", "--name", name, "--fast", &fast, "--mass", &mass])?;

        let (place, address) = match self.options.network {
            None => (Place::HERE, loopback_address()),
            Some(network) => {
                (network.place(name)?, SocketAddr::from((network.address(name)?, FIRST_PORT)))
            }
        };
        ensure!(
            !(self.options.proxied && self.options.network.is_some()),
            "relays are on this machine's own network"
        );
        let proxy = self.options.proxied.then(|| Proxy::start(loopback_address(), address));
        let proxy = proxy.transpose()?;
        let advertise = proxy
            .as_ref()
            .map_or(String::new(), |proxy| format!("advertise = \"{}\"\n", proxy.address()));
        let api = self.lab.socket(&format!("{name}-api"));
        let config = self.lab.directory().join(format!("{name}.toml"));
        let text = format!(
            "name = {name:?}\nstore = {:?}\nlisten = \"{address}\"\n{advertise}api = \"{}\"\n\
             [pool]\nfast = [{fast:?}]\nmass = [{mass:?}]\n[log]\nlevel = \"info\"\n\
             [limits]\nbuffers = \"{}M\"\n{}",
            self.store,
            api.display(),
            sizes.buffers_mib,
            self.options.configuration.replace("{name}", name),
        );
        std::fs::write(&config, text)?;
        let log = self.lab.log(&format!("holdfastd-{name}"));
        let (name, process) = (name.to_owned(), RefCell::new(None));
        Ok(Server { name, config, api, log, place, proxy, process })
    }

    /// The store's address, as `--store` takes it.
    pub fn store(&self) -> &str {
        &self.store
    }

    /// The servers.
    pub fn servers(&self) -> &[Server] {
        &self.servers
    }

    /// Starts every server that does not run, and waits until all are well.
    pub fn start_all(&self) -> Result<()> {
        let stopped = self.servers.iter().filter(|server| server.process.borrow().is_none());
        let started: Vec<&Server> = stopped.collect();
        started.iter().try_for_each(|server| server.spawn())?;
        started.iter().try_for_each(|server| server.wait_healthy())
    }

    /// `kill -9` for every server at once, as a power cut of all but their disks.
    pub fn kill_all(&self) -> Result<()> {
        self.servers.iter().try_for_each(Server::kill)
    }

    /// Runs `holdfast --json` with the store and returns what it printed. A failure is an error
    /// with what it said.
    pub fn holdfast(&self, arguments: &[&str]) -> Result<Value> {
        let text = self.holdfast_raw(arguments)?;
        if text.trim().is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_str(&text).with_context(|| format!("holdfast printed no JSON: {text}"))
    }

    fn holdfast_raw(&self, arguments: &[&str]) -> Result<String> {
        let output = self.holdfast_output(arguments)?;
        let (out, err) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        if !output.status.success() {
            bail!("holdfast {} ended with {}:\n{out}{err}", arguments.join(" "), output.status);
        }
        Ok(out.into_owned())
    }

    /// Runs `holdfast --json` with the store, whatever comes of it.
    pub fn holdfast_output(&self, arguments: &[&str]) -> Result<std::process::Output> {
        let program = holdfast_binary("holdfast")?;
        Ok(self
            .seat
            .command(&system_binary("timeout")?)?
            .args(["--kill-after=5", &COMMAND_SECONDS.to_string()])
            .arg(&program)
            .args(["--json", "--store", &self.store])
            .args(arguments)
            .output()?)
    }

    /// Creates a volume.
    pub fn create_volume(&self, name: &str, mib: u64, replicas: usize) -> Result<()> {
        let (size, replicas) = (format!("{mib}M"), replicas.to_string());
        self.holdfast(&["volume", "create", name, "--size", &size, "--replicas", &replicas])?;
        Ok(())
    }

    /// Serves a volume from a server, and waits until it is open. Returns the socket.
    pub fn export(&self, server: usize, volume: &str) -> Result<PathBuf> {
        let server = &self.servers[server];
        let socket = self.lab.socket(&format!("{volume}-{}", server.name));
        let (api, path) = (server.api.display().to_string(), socket.display().to_string());
        self.holdfast(&["export", "add", volume, "--socket", &path, "--api", &api])?;
        wait_until(&format!("{volume} to be served"), Deadline::after(START_LIMIT), || {
            Ok(server.export_is_open(&socket)?.then_some(()))
        })?;
        Ok(socket)
    }

    /// Lets a server stand by to serve a volume: it takes it when a guest's rings start. Returns the
    /// socket.
    pub fn export_standby(&self, server: usize, volume: &str) -> Result<PathBuf> {
        let server = &self.servers[server];
        let socket = self.lab.socket(&format!("{volume}-{}", server.name));
        let (api, path) = (server.api.display().to_string(), socket.display().to_string());
        self.holdfast(&["export", "add", volume, "--standby", "--socket", &path, "--api", &api])?;
        wait_until(&format!("{} to stand by", server.name), Deadline::after(START_LIMIT), || {
            server.check_alive()?;
            Ok(socket.exists().then_some(()))
        })?;
        Ok(socket)
    }

    /// Stops serving a volume from a server.
    pub fn unexport(&self, server: usize, socket: &Path) -> Result<()> {
        let (api, path) =
            (self.servers[server].api.display().to_string(), socket.display().to_string());
        self.holdfast(&["export", "remove", "--socket", &path, "--api", &api])?;
        Ok(())
    }

    /// Runs `holdfast attach` and waits for its socket.
    pub fn attach(&self, volume: &str) -> Result<Attached> {
        let mut attached = self.start_attach(volume, &self.seat, &[])?;
        attached.wait_for_socket()?;
        Ok(attached)
    }

    /// Starts a `holdfast attach` that has ended again, at its socket, as a service manager does.
    pub fn attach_again(&self, volume: &str, attached: &mut Attached) -> Result<()> {
        let path = attached.socket.display().to_string();
        let arguments = ["--store", &self.store, "attach", volume, "--socket", &path];
        let program = holdfast_binary("holdfast")?;
        let (name, log) = (attached.process.name().to_owned(), attached.process.log().to_owned());
        attached.process = Process::start_at(&self.seat, &name, &program, arguments, &log)?;
        Ok(())
    }

    /// Starts `holdfast attach --upgrade` at the socket of one that runs.
    pub fn start_attach_upgrade(
        &self,
        volume: &str,
        attached: &Attached,
        more: &[&str],
    ) -> Result<Process> {
        let path = attached.socket.display().to_string();
        let mut arguments =
            vec!["--store", &self.store, "attach", volume, "--socket", &path, "--upgrade"];
        arguments.extend(more);
        let program = holdfast_binary("holdfast")?;
        let name = format!("{} upgrade", attached.process.name());
        Process::start_at(&self.seat, &name, &program, arguments, attached.process.log())
    }

    /// Replaces a `holdfast attach` by another process, which takes everything over; the one before
    /// must end with success.
    pub fn upgrade_attach(
        &self,
        volume: &str,
        attached: &mut Attached,
        more: &[&str],
    ) -> Result<()> {
        let mut next = self.start_attach_upgrade(volume, attached, more)?;
        let ended = wait_until("the one before to end", Deadline::after(START_LIMIT), || {
            next.check_alive()?;
            attached.process.try_wait()
        })?;
        ensure!(ended.success(), "the one before ended with {ended}");
        attached.process = next;
        Ok(())
    }

    /// Starts `holdfast attach` somewhere, at a socket of its own.
    pub fn start_attach(&self, volume: &str, place: &Place, more: &[&str]) -> Result<Attached> {
        let number = self.attached.replace(self.attached.get() + 1);
        let name = format!("attach-{volume}-{number}");
        let socket = self.lab.socket(&name);
        let path = socket.display().to_string();
        let program = holdfast_binary("holdfast")?.display().to_string();
        // It replaces itself with the command, which tells how long guests waited.
        let mut arguments = vec!["HOLDFAST_LOG=info", &program, "--store", &self.store];
        arguments.extend(["attach", volume, "--socket", &path]);
        arguments.extend(more);
        let log = self.lab.log(&name);
        let process = Process::start_at(place, &name, &system_binary("env")?, arguments, &log)?;
        Ok(Attached { process, socket })
    }

    /// Waits until every member of a volume that is up to date again, as the head in `server` sees
    /// it: all are reachable, and none is behind or has a note.
    pub fn wait_all_well(&self, server: usize, volume: &str) -> Result<()> {
        let mut last = Value::Null;
        let well = wait_until("all members to be well", Deadline::after(HEAL_LIMIT), || {
            let status = self.servers[server].status()?;
            let heads = status["heads"].as_array().context("a list of heads")?;
            let head = heads.iter().find(|head| head["volume"] == volume);
            let Some(head) = head else { return Ok(None) };
            last = head.clone();
            Ok(head_is_well(head).then_some(()))
        });
        well.with_context(|| format!("the head says {last:#}"))
    }
}

/// Records that a member may be behind under load and count as up to date.
const BEHIND_MAX: u64 = 1000;

/// Whether a head of `/v1/status` serves, with every member up to date.
fn head_is_well(head: &Value) -> bool {
    let last = head["last_seq"].as_u64().unwrap_or(u64::MAX);
    let well = |member: &Value| {
        let behind = last.saturating_sub(member["last_seq"].as_u64().unwrap_or(0));
        member["reachable"] == true && behind <= BEHIND_MAX
    };
    head["phase"] == "open" && head["members"].as_array().is_some_and(|all| all.iter().all(well))
}

impl Attached {
    /// Waits until it listens.
    pub fn wait_for_socket(&mut self) -> Result<()> {
        wait_until("holdfast attach to listen", Deadline::after(START_LIMIT), || {
            self.process.check_alive()?;
            Ok(self.listens()?.then_some(()))
        })
    }

    /// Whether somebody on its host listens at its socket: it is there a moment earlier.
    pub(crate) fn listens(&self) -> Result<bool> {
        let sockets = std::fs::read_to_string(format!("/proc/{}/net/unix", self.process.pid()))?;
        let path = self.socket.display().to_string();
        // Number, references, protocol, flags (`__SO_ACCEPTCON`), type, state, inode, path.
        let listens = |line: &str| line.ends_with(&path) && line.contains(" 00010000 ");
        Ok(sockets.lines().any(listens))
    }
}

impl Server {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its API's socket.
    pub fn api(&self) -> &Path {
        &self.api
    }

    /// Starts it and waits until it is well.
    pub fn start(&self) -> Result<()> {
        self.spawn()?;
        self.wait_healthy()
    }

    /// Starts it, and waits for nothing.
    pub fn spawn(&self) -> Result<()> {
        let program = holdfast_binary("holdfastd")?;
        let config = self.config.display().to_string();
        let name = format!("holdfastd {}", self.name);
        let arguments = ["--config", &config];
        let process = Process::start_at(&self.place, &name, &program, arguments, &self.log)?;
        *self.process.borrow_mut() = Some(process);
        Ok(())
    }

    /// Where it can be asked to hand everything over.
    pub fn upgrade_socket(&self) -> PathBuf {
        let mut path = self.api.clone().into_os_string();
        path.push(".upgrade");
        PathBuf::from(path)
    }

    /// Starts `holdfastd upgrade`, with another configuration if one is given.
    pub fn start_upgrade(&self, config: Option<&Path>) -> Result<Process> {
        let program = holdfast_binary("holdfastd")?;
        let config = config.unwrap_or(&self.config).display().to_string();
        let name = format!("holdfastd upgrade {}", self.name);
        let arguments = ["upgrade", "--config", &config];
        Process::start_at(&self.place, &name, &program, arguments, &self.log)
    }

    /// Replaces it by another process, which takes everything over; the one before must end with
    /// success.
    pub fn upgrade(&self) -> Result<()> {
        let mut next = self.start_upgrade(None)?;
        let ended = wait_until("the one before to end", Deadline::after(START_LIMIT), || {
            next.check_alive()?;
            self.with_process(Process::try_wait)
        })?;
        ensure!(ended.success(), "the one before ended with {ended}");
        *self.process.borrow_mut() = Some(next);
        self.wait_healthy()
    }

    /// The path of its log.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Its configuration.
    pub fn config(&self) -> &Path {
        &self.config
    }

    fn wait_healthy(&self) -> Result<()> {
        let what = format!("holdfastd {} to be well", self.name);
        wait_until(&what, Deadline::after(START_LIMIT), || {
            self.check_alive()?;
            // Not listening yet, or still recovering.
            let Ok(health) = self.get("/v1/health") else { return Ok(None) };
            Ok((health["state"] == "ok").then_some(()))
        })
    }

    /// An error if it runs no longer.
    pub fn check_alive(&self) -> Result<()> {
        self.with_process(Process::check_alive)
    }

    /// The relay in front of it.
    pub fn proxy(&self) -> Result<&Proxy> {
        self.proxy.as_ref().with_context(|| format!("{} has no relay", self.name))
    }

    /// SIGSTOP: it stands still, and nobody is told.
    pub fn pause(&self) -> Result<()> {
        self.with_process(Process::pause)
    }

    /// SIGCONT.
    pub fn resume(&self) -> Result<()> {
        self.with_process(Process::resume)
    }

    fn with_process<T>(&self, act: impl FnOnce(&mut Process) -> Result<T>) -> Result<T> {
        let mut process = self.process.borrow_mut();
        act(process.as_mut().with_context(|| format!("{} was stopped", self.name))?)
    }

    /// Its process id.
    pub fn pid(&self) -> Result<u32> {
        self.with_process(|process| Ok(process.pid()))
    }

    /// `kill -9`.
    pub fn kill(&self) -> Result<()> {
        match self.process.borrow_mut().take() {
            Some(mut process) => process.kill(),
            None => Ok(()),
        }
    }

    /// SIGTERM; it must end by itself, with success.
    pub fn stop(&self) -> Result<()> {
        let Some(mut process) = self.process.borrow_mut().take() else { return Ok(()) };
        let status = process.terminate(Deadline::after(STOP_LIMIT))?;
        ensure!(status.success(), "holdfastd {} ended with {status} on SIGTERM", self.name);
        Ok(())
    }

    /// Everything it says of itself.
    pub fn status(&self) -> Result<Value> {
        self.get("/v1/status")
    }

    fn export_is_open(&self, socket: &Path) -> Result<bool> {
        let exports = self.get("/v1/exports")?;
        let path = socket.display().to_string();
        let exports = exports.as_array().context("a list of exports")?;
        let export = exports.iter().find(|export| export["socket"] == path.as_str());
        Ok(export.is_some_and(|export| export["state"] == "open"))
    }

    fn get(&self, path: &str) -> Result<Value> {
        let body = http_get(&self.api, path)?;
        serde_json::from_str(&body).with_context(|| format!("{path} is not JSON: {body}"))
    }

    /// Its metrics, in Prometheus' text format.
    pub fn metrics(&self) -> Result<String> {
        http_get(&self.api, "/metrics")
    }
}

/// The body that a server on a Unix socket answers with, whatever its status.
fn http_get(socket: &Path, path: &str) -> Result<String> {
    let mut connection = UnixStream::connect(socket)?;
    connection.set_read_timeout(Some(Duration::from_secs(10)))?;
    let request = format!("GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n");
    connection.write_all(request.as_bytes())?;
    let mut answer = String::new();
    connection.read_to_string(&mut answer)?;
    let (_head, body) = answer.split_once("\r\n\r\n").context("an HTTP answer")?;
    Ok(body.to_owned())
}

/// An address no other test has: its own part of the loopback network for each process.
pub fn loopback_address() -> SocketAddr {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let [_, high, middle, low] = std::process::id().to_be_bytes();
    let port = FIRST_PORT + NEXT.fetch_add(1, Ordering::Relaxed);
    SocketAddr::from(([127, high, middle, low], port))
}
