//! Handing a running data plane over to another process, and taking it back.
//!
//! The process that leaves pauses its front ends' control threads, takes nothing new from the
//! rings, lets what is under way finish, releases its heads at the members (so that the next Seal
//! is answered at once), and lets go of the pool's devices. What is left is [`Left`]: sockets,
//! memory and eventfds, as plain data and descriptors. Whoever has it, the next process or this one
//! if the next one failed, starts a data plane, opens heads in higher epochs, and goes on with
//! [`HandOver::resume_export`]. Requests that were not answered are in the in-flight buffers, as
//! after a crash.
//!
//! `wire` has the messages in which it travels.

pub mod wire;

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use base::{ServerId, VolumeId};
use node::{Input, Legacy};
use vhost_blk::Listener;
use vhost_blk::handover::Handover;

use crate::control::{ControlError, DataPlane, ExportSpec, ServerAddress, StartError};
use crate::message::{Answer, Message};
use crate::plane::{Plane, Served};
use crate::report::STATUS_WAIT;
use crate::worker::Worker;

/// How long an export gets to be made.
const EXPORT_WAIT: Duration = Duration::from_secs(5);

/// An export that nobody serves for the moment.
#[derive(Debug)]
pub struct LeftExport {
    /// What it is.
    pub spec: ExportSpec,
    /// Its sockets and its front end.
    pub front_end: Handover,
}

/// What a data plane has left.
#[derive(Debug, Default)]
pub struct Left {
    /// The replica service's listening socket.
    pub listener: Option<OwnedFd>,
    /// The exports.
    pub exports: Vec<LeftExport>,
    /// What there is to say of the pool; `None`: not known.
    pub legacy: Option<Legacy>,
}

/// What a data plane begins with that another process has left, or that is known beforehand.
#[derive(Debug, Default)]
pub struct Inherited {
    /// The replica service's listening socket.
    pub listener: Option<OwnedFd>,
    /// What that process has said of the pool; `None`: nothing.
    pub legacy: Option<Legacy>,
    /// The address book: see [`DataPlane::set_servers`].
    pub servers: Vec<ServerAddress>,
    /// Servers to be connected while the pool opens: see
    /// [`DataPlane::keep_connected`].
    pub connect: Vec<ServerId>,
}

/// What the data-plane thread has left.
pub(crate) type LetGo = (Option<OwnedFd>, Option<Legacy>);

/// How long each step of handing over may take. What guests notice is their sum at worst, and the
/// time that the steps need as a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HandOverWaits {
    /// For the front ends' control threads to rest. Nothing waits meanwhile.
    pub pause: Duration,
    /// For requests under way.
    pub drain: Duration,
    /// For each head's members to take notice.
    pub release: Duration,
    /// For the pool's devices to finish what was begun.
    pub close: Duration,
}

impl Default for HandOverWaits {
    fn default() -> Self {
        Self {
            pause: Duration::from_secs(2),
            drain: Duration::from_millis(500),
            release: Duration::from_millis(500),
            close: Duration::from_secs(5),
        }
    }
}

/// Log that the next process reads in a few milliseconds.
const LITTLE_LOG_BYTES: u64 = 4 << 20;
/// How often it is asked how much is left.
const LOG_TURN: Duration = Duration::from_millis(10);

/// Why a data plane was not handed over.
#[derive(Debug, thiserror::Error)]
pub enum HandOverError {
    /// Nothing has changed, all goes on.
    #[error("nothing was handed over: {0}")]
    Stays(ControlError),
    /// It has stopped half-way: take this back.
    #[error("the data plane did not let go of everything: {source}")]
    Stuck {
        /// What is left.
        left: Box<Left>,
        /// Why.
        source: ControlError,
    },
}

/// A data plane that can be handed over.
pub trait HandOver {
    /// Sends home what is in the pool's log, while everything is served, so that the next process
    /// has little to read. Returns once that is so, or after `wait`: guests may write faster.
    fn prepare(&self, wait: Duration);

    /// Stops, and leaves everything for another process. Afterwards every other method fails with
    /// [`ControlError::HandedOver`], until [`HandOver::take_back`].
    fn hand_over(&self, waits: HandOverWaits) -> Result<Left, HandOverError>;

    /// Runs again after [`HandOver::hand_over`], with a pool that is opened and recovered, and with
    /// no heads and no exports.
    fn take_back(&self, listener: Option<OwnedFd>) -> Result<(), StartError>;

    /// Goes on with an export that was left; a head of its volume is open or opening here. Its
    /// guest's requests are served from now on, the front end's messages after [`HandOver::go`].
    fn resume_export(&self, export: LeftExport) -> Result<(), ControlError>;

    /// Reads the front ends' messages: no other process will go on with them.
    fn go(&self);
}

impl HandOver for Plane {
    fn prepare(&self, wait: Duration) {
        let begun = Instant::now();
        let mut before = None;
        let left = loop {
            let left = match self.status(STATUS_WAIT) {
                Ok(status) => status.pool.map_or(0, |pool| pool.log_recovery_bytes),
                Err(error) => return tracing::warn!(%error, "the log is not sent home first"),
            };
            if left <= LITTLE_LOG_BYTES || begun.elapsed() >= wait {
                break left;
            }
            if before.is_none() {
                before = Some(left);
                if let Err(error) = self.mail().send("hasten", Message::Hasten(wait), STATUS_WAIT) {
                    return tracing::warn!(%error, "the log is not sent home first");
                }
            }
            std::thread::sleep(LOG_TURN);
        };
        let before = before.unwrap_or(left);
        tracing::info!(before, left, took = ?begun.elapsed(), "bytes of log for the next process");
    }

    fn hand_over(&self, waits: HandOverWaits) -> Result<Left, HandOverError> {
        let begun = Instant::now();
        let mut exports = std::mem::take(&mut *self.served());
        if let Err(error) = pause(&exports, waits.pause) {
            for export in &mut exports {
                export.listener.go();
            }
            *self.served() = exports;
            return Err(HandOverError::Stays(error));
        }
        let paused = begun.elapsed();
        match self.mail().ask("finish requests under way", waits.drain, Message::Hold) {
            // What is not finished is done again, by the next head.
            Ok(()) | Err(ControlError::Deadline { .. }) => {}
            Err(error) => tracing::warn!(%error, "handing over"),
        }
        let drained = begun.elapsed();
        self.close_heads(waits.release);
        let released = begun.elapsed();
        self.mail().note_handing_over();
        let close = waits.close;
        let asked = self.mail().ask("close the pool", close + STATUS_WAIT, |answer| {
            Message::HandOver { within: close, answer }
        });
        // The thread ends by itself; what it has mapped takes a while to take apart.
        drop(self.thread().take());
        let exports = exports
            .into_iter()
            .map(|Served { spec, listener, .. }| LeftExport {
                spec,
                front_end: listener.hand_over(),
            })
            .collect();
        tracing::info!(
            paused_after = ?paused, drained_after = ?drained, released_after = ?released,
            let_go_after = ?begun.elapsed(),
            "the data plane is handed over"
        );
        match asked.flatten() {
            Ok((listener, legacy)) => Ok(Left { listener, exports, legacy }),
            Err(source) => {
                let left = Box::new(Left { listener: None, exports, legacy: None });
                Err(HandOverError::Stuck { left, source })
            }
        }
    }

    fn take_back(&self, listener: Option<OwnedFd>) -> Result<(), StartError> {
        // The next process may have granted reads before it died: what this one knows is not enough.
        self.begin_again(Inherited { listener, ..Inherited::default() })
    }

    fn resume_export(&self, export: LeftExport) -> Result<(), ControlError> {
        let LeftExport { spec, front_end } = export;
        self.add_export(&spec, EXPORT_WAIT, |config, sink| {
            Listener::resume(front_end, config, sink)
        })
    }

    fn go(&self) {
        for served in self.served().iter_mut() {
            served.listener.go();
        }
    }
}

/// Has all control threads rest.
fn pause(exports: &[Served], wait: Duration) -> Result<(), ControlError> {
    let deadline = Instant::now() + wait;
    for export in exports {
        if !export.listener.pause(deadline.saturating_duration_since(Instant::now())) {
            tracing::warn!(
                socket = %export.spec.socket.display(),
                "the front end is in the midst of a change; try again later"
            );
            return Err(ControlError::Deadline { operation: "pause the front ends", waited: wait });
        }
    }
    Ok(())
}

impl Plane {
    /// Closes all heads at the same time.
    fn close_heads(&self, drain: Duration) {
        let heads: Vec<VolumeId> = match self.status(STATUS_WAIT) {
            Ok(status) => status.heads.into_iter().map(|head| head.volume).collect(),
            Err(error) => {
                tracing::warn!(%error, "handing over: no head is released");
                return;
            }
        };
        let mail = self.mail();
        let mut answers = Vec::new();
        for volume in heads {
            let (answer, answered) = std::sync::mpsc::sync_channel(1);
            let message = Message::CloseHead { volume, drain, answer };
            match mail.send("close the head", message, STATUS_WAIT) {
                Ok(()) => answers.push((volume, answered)),
                Err(error) => tracing::warn!(%volume, %error, "handing over"),
            }
        }
        let deadline = Instant::now() + drain + STATUS_WAIT;
        for (volume, answered) in answers {
            let left = deadline.saturating_duration_since(Instant::now());
            match answered.recv_timeout(left) {
                Ok(Ok(()) | Err(ControlError::NoHead(_))) => {}
                Ok(Err(error)) => tracing::warn!(%volume, %error, "handing over"),
                Err(error) => tracing::warn!(%volume, %error, "the head has not ended"),
            }
        }
    }
}

/// The last message to a data-plane thread.
pub(crate) struct HandingOver {
    pub(crate) until: base::Instant,
    pub(crate) answer: Answer<Result<LetGo, ControlError>>,
}

impl Worker {
    /// Answers whoever waits for the guests to be quiet. They have been signalled.
    pub(crate) fn tell_quiet(&mut self) {
        if self.exports.is_quiet()
            && let Some(answer) = self.holding.take()
        {
            // Nobody listens if the asker has stopped waiting.
            let _ = answer.try_send(());
        }
    }

    /// The thread's end: lets go of everything that the next process needs, then answers.
    pub(crate) fn leave(mut self, handing_over: HandingOver) {
        let HandingOver { until, answer } = handing_over;
        let listener = self.let_go(until);
        let _ = answer.try_send(listener);
    }

    fn let_go(&mut self, until: base::Instant) -> Result<LetGo, ControlError> {
        let start = self.reactor.now();
        let mut socket = None;
        if let Some(listener) = self.listener.take() {
            match self.reactor.listener_socket(listener) {
                Ok(listening) => socket = Some(listening),
                // The next one binds anew; peers that connect meanwhile are refused and try again.
                Err(error) => tracing::warn!(%error, "the listening socket is not handed over"),
            }
            self.reactor.release_listener(listener);
        }
        self.node.handle(start, Input::StopConnections);
        while let Some(output) = self.node.poll_output() {
            self.output(output);
        }
        self.exports.clear(&mut self.reactor);
        // The pool is left as a crash would leave it, but for what was begun: that ends first.
        if let Some(devices) = self.devices.take() {
            devices.close(&mut self.reactor);
        }
        while !self.reactor.has_let_go() {
            let broken = self.reactor.turn(Some(until), false).is_err();
            while self.reactor.next_completion().is_some() {}
            if broken || self.reactor.now() >= until {
                let waited = until.since(start);
                return Err(ControlError::Deadline { operation: "close the pool", waited });
            }
        }
        // Only now: nothing is admitted any more.
        Ok((socket, self.node.legacy(self.reactor.now())))
    }
}
