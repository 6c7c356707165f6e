//! Members of an etcd as processes, and a proxy that loses answers.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::etcd::EtcdStore;
use crate::store::{ClusterStore, Create};

/// How long starting and electing may take on a busy machine.
const PATIENCE: Duration = Duration::from_mins(1);

/// The program: `HOLDFAST_ETCD`, what `scripts/install etcd` unpacked, or one in the path.
pub(super) fn program() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("HOLDFAST_ETCD") {
        return Some(path.into());
    }
    let variable = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let cache = variable("HOLDFAST_CACHE")
        .or_else(|| Some(variable("XDG_CACHE_HOME")?.join("holdfast")))
        .or_else(|| Some(variable("HOME")?.join(".cache/holdfast")));
    let unpacked = cache.map(|cache| cache.join("etcd/usr/bin/etcd"));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let installed = std::env::split_paths(&path).map(|directory| directory.join("etcd"));
    unpacked.into_iter().chain(installed).find(|path| path.is_file())
}

/// True if there is no etcd to test with: says so.
pub(super) fn skipped(test: &str) -> bool {
    if program().is_some() {
        return false;
    }
    let reason = "there is no etcd (scripts/install etcd)";
    assert!(std::env::var_os("CI").is_none(), "{test}: {reason}");
    eprintln!("SKIPPED {test}: {reason}");
    if let Some(path) = std::env::var_os("HOLDFAST_SKIPPED") {
        let mut file = fs::OpenOptions::new().create(true).append(true).open(path).unwrap();
        writeln!(file, "SKIPPED {test}: {reason}").unwrap();
    }
    true
}

/// One or more members on this machine.
pub(super) struct Etcd {
    pub(super) directory: tempfile::TempDir,
    members: Vec<Member>,
}

struct Member {
    client: SocketAddr,
    peer: SocketAddr,
    process: Option<Child>,
}

/// An address that no other process on this machine takes, not even for a connection it makes:
/// of the loopback network, the one with this process's number, and there a port never given
/// out before. A port that the system had just called free on 127.0.0.1 could be taken by
/// anybody before etcd listens on it, and while a killed member is away.
fn free_address() -> SocketAddr {
    static GIVEN: AtomicU16 = AtomicU16::new(0);
    let [_, a, b, c] = std::process::id().to_be_bytes();
    let port = 20_000 + GIVEN.fetch_add(1, Ordering::Relaxed);
    SocketAddr::from(([127, a, b, c], port))
}

impl Etcd {
    /// Starts so many members and waits for their leader.
    pub(super) fn start(count: usize) -> Self {
        let member = || Member { client: free_address(), peer: free_address(), process: None };
        let members = (0..count).map(|_| member()).collect();
        let mut etcd = Self { directory: tempfile::tempdir().unwrap(), members };
        for at in 0..count {
            etcd.resume(at);
        }
        etcd.wait();
        etcd
    }

    pub(super) fn data(&self, at: usize) -> PathBuf {
        self.directory.path().join(format!("m{at}"))
    }

    /// Starts a member that does not run.
    pub(super) fn resume(&mut self, at: usize) {
        let url = |address: SocketAddr| format!("http://{address}");
        let all = self.members.iter().enumerate();
        let all: Vec<_> = all.map(|(at, m)| format!("m{at}={}", url(m.peer))).collect();
        let member = &self.members[at];
        let log = fs::File::create(self.directory.path().join(format!("m{at}.log"))).unwrap();
        let process = Command::new(program().unwrap())
            .args(["--name", &format!("m{at}"), "--data-dir"])
            .arg(self.data(at))
            .args(["--listen-client-urls", &url(member.client)])
            .args(["--advertise-client-urls", &url(member.client)])
            .args(["--listen-peer-urls", &url(member.peer)])
            .args(["--initial-advertise-peer-urls", &url(member.peer)])
            .args(["--initial-cluster", &all.join(",")])
            .args(["--heartbeat-interval", "100", "--election-timeout", "1000"])
            .args(["--logger", "zap", "--log-level", "warn"])
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        assert!(self.members[at].process.replace(process).is_none(), "it does not run");
    }

    /// Kills a member.
    pub(super) fn kill(&mut self, at: usize) {
        let mut process = self.members[at].process.take().expect("it runs");
        process.kill().unwrap();
        process.wait().unwrap();
    }

    /// Waits until changes can be made.
    pub(super) fn wait(&self) {
        let start = Instant::now();
        let client = super::super::client::Client::new(self.endpoints());
        let nothing = serde_json::json!({});
        while let Err(error) = client.call("/v3/kv/txn", &nothing) {
            assert!(start.elapsed() < PATIENCE, "{error}: {}", self.logs());
        }
    }

    fn logs(&self) -> String {
        let log = |at| fs::read_to_string(self.directory.path().join(format!("m{at}.log")));
        (0..self.members.len()).map(|at| log(at).unwrap_or_default()).collect()
    }

    /// The member that leads.
    pub(super) fn leader(&self) -> usize {
        let start = Instant::now();
        loop {
            for (at, member) in self.members.iter().enumerate() {
                if member.process.is_some() && self.leads(at) {
                    return at;
                }
            }
            assert!(start.elapsed() < PATIENCE, "no leader: {}", self.logs());
            std::thread::yield_now();
        }
    }

    fn leads(&self, at: usize) -> bool {
        let endpoint = self.members[at].client.to_string();
        let client = super::super::client::Client::new(vec![endpoint]);
        let status = client.call("/v3/maintenance/status", &serde_json::json!({}));
        let Ok(status) = status else { return false };
        status.body["leader"] == status.body["header"]["member_id"]
    }

    pub(super) fn endpoints(&self) -> Vec<String> {
        self.members.iter().map(|member| member.client.to_string()).collect()
    }

    pub(super) fn open(&self, prefix: &str, create: Create) -> EtcdStore {
        EtcdStore::open(&self.endpoints(), prefix, create).unwrap()
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        for process in self.members.iter_mut().filter_map(|member| member.process.as_mut()) {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

/// Copies a directory with all that is in it.
pub(super) fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &to);
        } else {
            fs::copy(entry.path(), to).unwrap();
        }
    }
}

/// Passes requests on and loses every `nth` answer to a transaction, after it was made.
pub(super) struct Lossy {
    pub(super) endpoint: String,
    pub(super) lost: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
}

impl Lossy {
    pub(super) fn start(etcd: String, nth: u64) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = listener.local_addr().unwrap().to_string();
        let (lost, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (losses, stopping) = (Arc::clone(&lost), Arc::clone(&stop));
        std::thread::spawn(move || {
            let count = Arc::new(AtomicU64::new(0));
            for client in listener.incoming() {
                if stopping.load(Ordering::Relaxed) {
                    return;
                }
                let Ok(client) = client else { continue };
                let (etcd, count, losses) = (etcd.clone(), Arc::clone(&count), Arc::clone(&losses));
                std::thread::spawn(move || {
                    let lose = || count.fetch_add(1, Ordering::Relaxed) % nth == nth - 1;
                    // A broken connection is what this is for.
                    if let Ok(true) = pass_on(client, &etcd, lose) {
                        losses.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
        });
        Self { endpoint, lost, stop }
    }
}

impl Drop for Lossy {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(&self.endpoint);
    }
}

/// One request and its answer; true if the answer was lost.
fn pass_on(client: TcpStream, etcd: &str, lose: impl Fn() -> bool) -> std::io::Result<bool> {
    let mut reader = BufReader::new(client.try_clone()?);
    let (mut head, mut length) = (String::new(), 0);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(false);
        }
        let (name, value) = line.split_once(':').unwrap_or((&line, ""));
        if name.eq_ignore_ascii_case("content-length") {
            length = value.trim().parse().unwrap();
        }
        if line.trim().is_empty() {
            head.push_str("Connection: close\r\n\r\n");
            break;
        }
        head.push_str(&line);
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    let mut server = TcpStream::connect(etcd)?;
    server.write_all(head.as_bytes())?;
    server.write_all(&body)?;
    let mut client = client;
    if head.starts_with("POST /v3/kv/txn") && lose() {
        std::io::copy(&mut server, &mut std::io::sink())?;
        return Ok(true);
    }
    std::io::copy(&mut server, &mut client)?;
    Ok(false)
}

/// Waits for up to a minute for `true`.
pub(super) fn eventually(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "{what}");
        std::thread::yield_now();
    }
}

/// A store as a trait object, for threads.
pub(super) fn shared(store: EtcdStore) -> Arc<dyn ClusterStore> {
    Arc::new(store)
}
