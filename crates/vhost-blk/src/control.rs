//! What the control thread asks of the device, and how it waits for the answer.

use core::fmt;
use core::time::Duration;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};

use crate::dirty::DirtyLog;
use crate::inflight::InflightBuffer;
use crate::memory::GuestMemory;
use crate::ring::RingAddresses;

/// A message from a socket's control thread to its device. The shell passes it unopened from its
/// [`ControlSink`] to [`Device::control`](crate::Device::control), in order. Dropping it
/// unanswered ends the front end's connection.
#[derive(Debug)]
pub struct Control {
    pub(crate) request: Request,
    pub(crate) reply: Reply,
}

/// What is asked. Queues are below [`crate::QUEUES_MAX`]'s bound only after the device checked.
#[derive(Debug)]
pub(crate) enum Request {
    /// A front end connected.
    Connected,
    /// It is gone: let go of everything of it. Answered at once.
    Disconnected,
    /// Take no new requests; answered when none is under way.
    Quiesce,
    /// Whether every paused ring was drained of all that was available.
    Drained,
    Features(u64),
    Memory(Arc<GuestMemory>),
    Log(Arc<DirtyLog>),
    Inflight(Arc<InflightBuffer>),
    RingSize {
        queue: u16,
        size: u16,
    },
    RingAddresses {
        queue: u16,
        addresses: RingAddresses,
    },
    RingBase {
        queue: u16,
        base: u16,
    },
    /// Answered with the ring's available index, when nothing of it is under way.
    RingStop {
        queue: u16,
    },
    /// Disabling is answered when all that is available now was answered.
    RingEnable {
        queue: u16,
        enable: bool,
    },
    /// Whoever waits for a queue to be drained has waited for long: he is refused if nobody is there to
    /// answer what is under way.
    Hopeless {
        queue: u16,
    },
    Kick {
        queue: u16,
        fd: Arc<OwnedFd>,
    },
    Call {
        queue: u16,
        fd: Option<OwnedFd>,
    },
    Error {
        queue: u16,
        fd: Option<OwnedFd>,
    },
}

/// Why a device did not do what it was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ControlError {
    #[error("queue {queue} does not exist: the device has {queues}")]
    NoQueue { queue: u16, queues: u16 },
    #[error("features {unknown:#x} were not offered")]
    Features { unknown: u64 },
    #[error("queue {queue} cannot have {size} entries (a power of two up to {max})")]
    RingSize { queue: u16, size: u16, max: u16 },
    #[error("queue {queue} is running: its size and base cannot change")]
    Running { queue: u16 },
    #[error("queue {queue} was paused with requests in it: there was nobody to answer them")]
    Undrained { queue: u16 },
    #[error(
        "queue {queue} cannot be stopped: nobody is there to answer the {requests} requests that are under \
         way, which stay in the in-flight buffer, since this host does not hold the volume"
    )]
    NobodyAnswers { queue: u16, requests: usize },
    #[error("the device's reactor is gone")]
    Closed,
    #[error("no answer in time")]
    TimedOut,
}

/// An answer; the number is a stopped ring's available index, else 0.
pub(crate) type Answer = Result<u16, ControlError>;

/// The way back to the control thread.
pub(crate) struct Reply {
    sender: SyncSender<Answer>,
}

impl Reply {
    /// Answers. Nobody may be waiting any more: then the connection ends anyway.
    pub(crate) fn send(self, answer: Answer) {
        let _ = self.sender.try_send(answer);
    }
}

impl fmt::Debug for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Reply")
    }
}

impl Control {
    /// A message, and where its answer will come.
    pub(crate) fn new(request: Request) -> (Self, Receiver<Answer>) {
        let (sender, receiver) = sync_channel(1);
        (Self { request, reply: Reply { sender } }, receiver)
    }
}

/// The reactor that owned the device is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the device's reactor is gone")]
pub struct SinkClosed;

/// How control messages reach the reactor thread that owns the device: usually a mailbox and an
/// eventfd. Called from the control thread; it may block while the mailbox is full, but it does
/// not wait for the answer (the control thread does, with a deadline).
pub trait ControlSink: Send {
    /// Delivers `control`. Messages arrive in the order of delivery.
    fn deliver(&mut self, control: Control) -> Result<(), SinkClosed>;
}

impl<F: FnMut(Control) -> Result<(), SinkClosed> + Send> ControlSink for F {
    fn deliver(&mut self, control: Control) -> Result<(), SinkClosed> {
        self(control)
    }
}

/// Delivers `request` and waits for its answer.
pub(crate) fn ask(sink: &mut dyn ControlSink, request: Request, timeout: Duration) -> Answer {
    let answer = deliver(sink, request)?;
    wait(&answer, timeout).unwrap_or(Err(ControlError::TimedOut))
}

/// The same for a request that drains a queue: after `hopeful` it is asked whether that can end.
pub(crate) fn ask_drained(
    sink: &mut dyn ControlSink,
    (queue, request): (u16, Request),
    hopeful: Duration,
    timeout: Duration,
) -> Answer {
    let answer = deliver(sink, request)?;
    if let Some(answer) = wait(&answer, hopeful.min(timeout)) {
        return answer;
    }
    deliver(sink, Request::Hopeless { queue })?;
    wait(&answer, timeout.saturating_sub(hopeful)).unwrap_or(Err(ControlError::TimedOut))
}

fn deliver(sink: &mut dyn ControlSink, request: Request) -> Result<Receiver<Answer>, ControlError> {
    let (control, answer) = Control::new(request);
    sink.deliver(control).map_err(|SinkClosed| ControlError::Closed)?;
    Ok(answer)
}

/// `None`: there was none in time.
fn wait(answer: &Receiver<Answer>, timeout: Duration) -> Option<Answer> {
    match answer.recv_timeout(timeout) {
        Ok(answer) => Some(answer),
        Err(RecvTimeoutError::Timeout) => None,
        Err(RecvTimeoutError::Disconnected) => Some(Err(ControlError::Closed)),
    }
}
