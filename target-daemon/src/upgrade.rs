//! Upgrading without a disconnect: a running process hands everything to the next one, which may
//! be of another version, through a socket beside its own.
//!
//! The one that leaves waits for the next one to say that it serves; if it does not say so in time
//! it is killed and everything is taken back. The next one reads no front end's messages until it
//! is told that nobody will take anything back. So at every moment one process reads them, and one
//! moves the rings: see `docs/decisions/0018-upgrade-by-hand-over.md`.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt;
use rustix::process::{Pid, PidfdFlags, Signal, geteuid, pidfd_open, pidfd_send_signal};
use shell::handover::wire::{Channel, Frame, State, VERSIONS, WireError, agree};
use shell::handover::{HandOver, HandOverError, HandOverWaits, Left, LeftExport};

use crate::notify::notify;

/// How long a short answer may take.
const ANSWER: Duration = Duration::from_secs(5);
/// How long the next process may prepare itself, while everything goes on here.
const PREPARATION: Duration = Duration::from_mins(1);
/// How long the next process may take to serve everything, before it is taken back.
const READINESS: Duration = Duration::from_secs(10);
/// How long to wait for what a process leaves: all bounds of handing over, and some.
const STATE: Duration = Duration::from_secs(30);
/// How long to wait before everything is taken back once more.
const RETRY: Duration = Duration::from_millis(200);
/// How soon it is noticed that the process is to stop.
const TURN: Duration = Duration::from_millis(200);

/// The socket at which a process whose own socket is `path` can be asked for everything.
pub fn socket_of(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".upgrade");
    PathBuf::from(name)
}

/// Why the next process did not take over.
#[derive(Debug, thiserror::Error)]
pub enum UpgradeError {
    /// Nobody can be asked.
    #[error("nothing to upgrade at '{}': {source}; start it instead", path.display())]
    Nobody {
        /// The socket.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The running process refused, and goes on.
    #[error("the running process goes on: {0}")]
    Refused(String),
    /// It was not understood, or is gone.
    #[error("the running process: {0}")]
    Wire(#[from] WireError),
    /// It said something that has no place there.
    #[error("the running process said {0}, out of turn")]
    OutOfTurn(&'static str),
}

/// What leaves.
pub trait Leaves {
    /// Whose data plane it is, for the next process to prepare itself.
    fn about(&self) -> BTreeMap<String, String>;

    /// Stops serving and passes on what is left, with the named descriptors. If that comes back
    /// with an error, serves again. An error of its own: nothing was stopped.
    fn leave(&self, pass_on: &mut PassOn<'_>) -> Result<Outcome, String>;
}

/// Sends everything to the next process and waits for it to serve.
pub type PassOn<'a> = dyn FnMut(&Left, &[(&str, BorrowedFd<'_>)]) -> Result<(), String> + 'a;

/// How it ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The next process serves; this one must end without touching anything.
    Gone,
    /// Everything was taken back, because of this.
    TakenBack(String),
}

/// Stops a data plane and passes on what is left with the `named` descriptors. If the next process
/// does not serve, the data plane runs again, `again` goes on with the exports, and then their front
/// ends' messages are read.
pub fn leave_by(
    hand_over: &dyn HandOver,
    named: &[(&str, BorrowedFd<'_>)],
    pass_on: &mut PassOn<'_>,
    again: impl FnOnce(Vec<LeftExport>),
) -> Result<Outcome, String> {
    let (left, passed) = match hand_over.hand_over(HandOverWaits::default()) {
        Ok(left) => {
            let passed = pass_on(&left, named);
            (left, passed)
        }
        Err(HandOverError::Stays(error)) => return Err(error.to_string()),
        Err(HandOverError::Stuck { left, source }) => (*left, Err(source.to_string())),
    };
    let Err(reason) = passed else { return Ok(Outcome::Gone) };
    let Left { listener, exports, legacy: _ } = left;
    loop {
        let listener =
            listener.as_ref().map(OwnedFd::try_clone).transpose().unwrap_or_else(|error| {
                tracing::warn!(%error, "the replica service's socket is made anew");
                None
            });
        match hand_over.take_back(listener) {
            Ok(()) => break,
            // A pool that another process holds for a moment; or a device that is gone.
            Err(error) => tracing::error!(%error, "the data plane does not run; trying on"),
        }
        std::thread::sleep(RETRY);
    }
    again(exports);
    hand_over.go();
    Ok(Outcome::TakenBack(reason))
}

/// Answers whoever connects to `listener` until `stop` is set. True once another process has taken
/// over.
pub fn serve(listener: &UnixListener, stop: &AtomicBool, leaves: &dyn Leaves) -> bool {
    if let Err(error) = listener.set_nonblocking(true) {
        tracing::error!(%error, "this process cannot be upgraded without a restart");
        return false;
    }
    while !stop.load(Ordering::Acquire) {
        if wait_readable(listener.as_fd(), TURN) {
            match listener.accept() {
                Ok((stream, _)) => match converse(stream, leaves) {
                    Ok(Outcome::Gone) => return true,
                    Ok(Outcome::TakenBack(reason)) => {
                        tracing::error!(reason, "the upgrade was taken back; this process serves");
                    }
                    Err(reason) => tracing::warn!(reason, "not upgraded; this process goes on"),
                },
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => tracing::warn!(%error, "cannot accept at the upgrade socket"),
            }
        }
    }
    false
}

fn wait_readable(fd: BorrowedFd<'_>, wait: Duration) -> bool {
    let mut entries = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    let wait = Timespec::try_from(wait).expect("a moment");
    matches!(poll(&mut entries, Some(&wait)), Ok(1..))
}

/// The next process, as the one that leaves sees it.
struct Peer {
    channel: Channel,
    /// Its process: whoever is killed for being late is the one that connected.
    process: OwnedFd,
    pid: Pid,
}

impl Peer {
    fn new(stream: UnixStream) -> Result<Self, String> {
        stream.set_nonblocking(false).map_err(|error| error.to_string())?;
        let who = sockopt::socket_peercred(&stream).map_err(|error| error.to_string())?;
        if who.uid != geteuid() && !who.uid.is_root() {
            return Err(format!("user {} may not upgrade this process", who.uid.as_raw()));
        }
        let process = pidfd_open(who.pid, PidfdFlags::empty())
            .map_err(|error| format!("process {}: {error}", who.pid))?;
        Ok(Self { channel: Channel::new(stream), process, pid: who.pid })
    }

    fn refuse(&mut self, reason: String) -> String {
        // It may be gone: then nobody needs to be told.
        let _ = self.channel.send(&Frame::Refused { reason: reason.clone() }, &[], ANSWER);
        reason
    }

    /// Kills it, and returns when it is dead: two processes must not move the same rings.
    fn end(&self) {
        let start = Instant::now();
        loop {
            // An error: it is dead already.
            let _ = pidfd_send_signal(&self.process, Signal::KILL);
            if wait_readable(self.process.as_fd(), Duration::from_secs(1)) {
                return;
            }
            tracing::error!(
                pid = self.pid.as_raw_nonzero().get(),
                seconds = start.elapsed().as_secs(),
                "the process that failed to take over does not die; guests wait until it has"
            );
        }
    }
}

fn converse(stream: UnixStream, leaves: &dyn Leaves) -> Result<Outcome, String> {
    let mut peer = Peer::new(stream)?;
    let text = |error: WireError| error.to_string();
    let versions = match peer.channel.receive(ANSWER) {
        Ok((Frame::Hello { versions, program }, _)) => {
            tracing::info!(program, "another process asks to take over");
            versions
        }
        Ok(_) => return Err(peer.refuse("it did not say hello".to_owned())),
        Err(error) => return Err(peer.refuse(error.to_string())),
    };
    let version = agree(&VERSIONS, versions).map_err(|reason| peer.refuse(reason))?;
    let program = format!("version {}", crate::VERSION);
    let welcome = Frame::Welcome { version, program, about: leaves.about() };
    peer.channel.send(&welcome, &[], ANSWER).map_err(text)?;
    match peer.channel.receive(PREPARATION).map_err(text)? {
        (Frame::Take, _) => {}
        (Frame::Failed { reason }, _) => return Err(reason),
        _ => return Err(peer.refuse("out of turn".to_owned())),
    }
    let left = leaves.leave(&mut |left, named| pass_on(&mut peer, version, left, named));
    if let Err(reason) = &left {
        let failed = Frame::Failed { reason: reason.clone() };
        let _ = peer.channel.send(&failed, &[], ANSWER);
    }
    left
}

/// Sends everything, waits for the next process to serve, and lets it go on alone. With an error it
/// is dead.
fn pass_on(
    peer: &mut Peer,
    version: u16,
    left: &Left,
    named: &[(&str, BorrowedFd<'_>)],
) -> Result<(), String> {
    let (state, fds) = State::pack(version, left, named);
    let sent = peer.channel.send(&Frame::State(state), &fds, ANSWER);
    let ready = sent.and_then(|()| peer.channel.receive(READINESS));
    let failed = match ready {
        Ok((Frame::Ready, _)) => {
            // From here on it is the next process that the service manager watches.
            notify(&format!("MAINPID={}", peer.pid.as_raw_nonzero()));
            match peer.channel.send(&Frame::Go, &[], ANSWER) {
                Ok(()) => return Ok(()),
                Err(error) => {
                    notify(&format!("MAINPID={}", std::process::id()));
                    error.to_string()
                }
            }
        }
        Ok((Frame::Failed { reason }, _)) => reason,
        Ok(_) => "it said something out of turn".to_owned(),
        Err(error) => format!("it did not report ready: {error}"),
    };
    peer.end();
    Err(failed)
}

/// The running process, as the next one sees it.
pub struct Next {
    channel: Channel,
    about: BTreeMap<String, String>,
}

impl Next {
    /// Asks the process at `path`, which goes on serving for the time being.
    pub fn ask(path: &Path) -> Result<Self, UpgradeError> {
        let stream = UnixStream::connect(path)
            .map_err(|source| UpgradeError::Nobody { path: path.to_owned(), source })?;
        let mut channel = Channel::new(stream);
        let program = format!("version {}", crate::VERSION);
        let versions = (*VERSIONS.start(), *VERSIONS.end());
        channel.send(&Frame::Hello { versions, program }, &[], ANSWER)?;
        match channel.receive(ANSWER)?.0 {
            Frame::Welcome { about, .. } => Ok(Self { channel, about }),
            other => Err(out_of_turn(other)),
        }
    }

    /// What the running process says of itself.
    pub fn about(&self, key: &str) -> Option<&str> {
        self.about.get(key).map(String::as_str)
    }

    /// Takes everything: from now on nobody serves.
    pub fn take(&mut self) -> Result<(Left, BTreeMap<String, OwnedFd>), UpgradeError> {
        self.channel.send(&Frame::Take, &[], ANSWER)?;
        match self.channel.receive(STATE)? {
            (Frame::State(state), fds) => Ok(state.unpack(fds)?),
            (other, _) => Err(out_of_turn(other)),
        }
    }

    /// Says that this process serves, and waits until nobody will take anything back.
    pub fn ready(mut self) -> Result<(), UpgradeError> {
        self.channel.send(&Frame::Ready, &[], ANSWER)?;
        match self.channel.receive(ANSWER) {
            // Closed: it has ended without a word, so it takes nothing back. If it wanted to, this
            // process would be dead before the connection is closed.
            Ok((Frame::Go, _)) | Err(WireError::Closed) => Ok(()),
            Ok((other, _)) => Err(out_of_turn(other)),
            Err(error) => Err(error.into()),
        }
    }

    /// Says why this process does not take over. It must end at once.
    pub fn fail(mut self, reason: &str) {
        let failed = Frame::Failed { reason: reason.to_owned() };
        // If it is gone there is nobody to tell.
        let _ = self.channel.send(&failed, &[], ANSWER);
    }
}

fn out_of_turn(frame: Frame) -> UpgradeError {
    UpgradeError::OutOfTurn(match frame {
        Frame::Refused { reason } | Frame::Failed { reason } => {
            return UpgradeError::Refused(reason);
        }
        Frame::Hello { .. } => "Hello",
        Frame::Welcome { .. } => "Welcome",
        Frame::Take => "Take",
        Frame::State(_) => "State",
        Frame::Ready => "Ready",
        Frame::Go => "Go",
    })
}
