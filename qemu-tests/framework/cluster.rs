//! A cluster on one machine: `holdfastd` servers on loopback over one SQLite store.

use std::cell::RefCell;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::binaries::holdfast_binary;
use crate::lab::Lab;
use crate::process::Process;
use crate::wait::{Deadline, wait_until};

/// How long a server may take to start: recovery of a full log included.
const START_LIMIT: Duration = Duration::from_mins(1);

/// How long an orderly stop may take.
const STOP_LIMIT: Duration = Duration::from_mins(1);

/// How long one command of the CLI may take.
const COMMAND_SECONDS: u64 = 60;

/// The port of the first server. Below the ephemeral range, so that no connection takes it.
const FIRST_PORT: u16 = 4420;

/// The sizes of a server's devices.
#[derive(Debug, Clone, Copy)]
pub struct PoolSizes {
    /// The log's device, in MiB.
    pub fast_mib: u64,
    /// The home's device, in MiB.
    pub mass_mib: u64,
    /// Take the space from the file system now, for measurements.
    pub preallocate: bool,
    /// The daemon's memory for data under way, in MiB.
    pub buffers_mib: u64,
}

impl Default for PoolSizes {
    fn default() -> Self {
        Self { fast_mib: 512, mass_mib: 1024, preallocate: false, buffers_mib: 128 }
    }
}

/// Some servers, and the store they share.
#[derive(Debug)]
pub struct Cluster<'lab> {
    lab: &'lab Lab,
    store: String,
    servers: Vec<Server>,
}

/// One server: its configuration, and its process while it runs.
#[derive(Debug)]
pub struct Server {
    name: String,
    config: PathBuf,
    api: PathBuf,
    log: PathBuf,
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
        let store = format!("sqlite:{}", lab.directory().join("cluster.db").display());
        let mut cluster = Self { lab, store, servers: Vec::new() };
        for name in ["a", "b", "c", "d", "e"].into_iter().take(count) {
            let server = cluster.format(name, sizes)?;
            cluster.servers.push(server);
        }
        cluster.start_all()?;
        Ok(cluster)
    }

    fn format(&self, name: &str, sizes: PoolSizes) -> Result<Server> {
        let device = |role: &str, mib: u64| {
            let (file, bytes) = (format!("{name}-{role}"), mib << 20);
            let path = if sizes.preallocate {
                self.lab.preallocated_file(&file, bytes)?
            } else {
                self.lab.file(&file, bytes)?
            };
            Ok::<_, anyhow::Error>(path.display().to_string())
        };
        let (fast, mass) = (device("fast", sizes.fast_mib)?, device("mass", sizes.mass_mib)?);
        self.holdfast(&["pool", "format", "--name", name, "--fast", &fast, "--mass", &mass])?;

        let address = loopback_address();
        let api = self.lab.socket(&format!("{name}-api"));
        let config = self.lab.directory().join(format!("{name}.toml"));
        let text = format!(
            "name = {name:?}\nstore = {:?}\nlisten = {address:?}\napi = \"{}\"\n\
             [pool]\nfast = [{fast:?}]\nmass = [{mass:?}]\n[log]\nlevel = \"info\"\n\
             [limits]\nbuffers = \"{}M\"\n",
            self.store,
            api.display(),
            sizes.buffers_mib
        );
        std::fs::write(&config, text)?;
        let log = self.lab.log(&format!("holdfastd-{name}"));
        Ok(Server { name: name.to_owned(), config, api, log, process: RefCell::new(None) })
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
        let program = holdfast_binary("holdfast")?;
        let output = Command::new("timeout")
            .args(["--kill-after=5", &COMMAND_SECONDS.to_string()])
            .arg(&program)
            .args(["--json", "--store", &self.store])
            .args(arguments)
            .output()?;
        let (out, err) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        if !output.status.success() {
            bail!("holdfast {} ended with {}:\n{out}{err}", arguments.join(" "), output.status);
        }
        Ok(out.into_owned())
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

    /// Stops serving a volume from a server.
    pub fn unexport(&self, server: usize, socket: &Path) -> Result<()> {
        let (api, path) =
            (self.servers[server].api.display().to_string(), socket.display().to_string());
        self.holdfast(&["export", "remove", "--socket", &path, "--api", &api])?;
        Ok(())
    }

    /// Runs `holdfast attach` and waits for its socket.
    pub fn attach(&self, volume: &str) -> Result<Attached> {
        let socket = self.lab.socket(&format!("{volume}-attached"));
        let path = socket.display().to_string();
        let name = format!("attach-{volume}");
        let arguments = ["--store", &self.store, "attach", volume, "--socket", &path];
        let program = holdfast_binary("holdfast")?;
        let mut process = Process::start(&name, &program, arguments, &self.lab.log(&name))?;
        wait_until("holdfast attach to listen", Deadline::after(START_LIMIT), || {
            process.check_alive()?;
            Ok(socket.exists().then_some(()))
        })?;
        Ok(Attached { process, socket })
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

    fn spawn(&self) -> Result<()> {
        let program = holdfast_binary("holdfastd")?;
        let config = self.config.display().to_string();
        let name = format!("holdfastd {}", self.name);
        let process = Process::start(&name, &program, ["--config", &config], &self.log)?;
        *self.process.borrow_mut() = Some(process);
        Ok(())
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
        let mut process = self.process.borrow_mut();
        process.as_mut().with_context(|| format!("{} was stopped", self.name))?.check_alive()
    }

    /// Its process id.
    pub fn pid(&self) -> Result<u32> {
        let process = self.process.borrow();
        Ok(process.as_ref().with_context(|| format!("{} was stopped", self.name))?.pid())
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
fn loopback_address() -> String {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let [_, high, middle, low] = std::process::id().to_be_bytes();
    let port = FIRST_PORT + NEXT.fetch_add(1, Ordering::Relaxed);
    format!("127.{high}.{middle}.{low}:{port}")
}
