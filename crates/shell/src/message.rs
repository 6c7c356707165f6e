//! What control threads ask of the data-plane thread, and how they wait for its answer.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use base::{Epoch, ReplicaKey, ServerId, ShardRecord, VolumeId};
use ring::{Sender, TrySendError};
use vhost_blk::DeviceConfig;

use crate::control::{
    ChangeError, ControlError, ExportSpec, HeadSpec, MetricFamily, OpenError, Opening, ReplicaSpec,
    ServerAddress, StateNotice, Status,
};
use crate::handover::LetGo;

/// Messages that may wait for the data-plane thread.
pub(crate) const MAIL_MAX: usize = 4096;

/// An export on the data-plane thread; never reused in the life of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ExportId(pub(crate) u64);

/// Where an answer goes. The asker may have stopped waiting.
pub(crate) type Answer<T> = SyncSender<T>;

/// A message to the data-plane thread.
pub(crate) enum Message {
    Status(Answer<Status>),
    Metrics(Answer<Vec<MetricFamily>>),
    CreateReplica {
        spec: ReplicaSpec,
        epoch: Epoch,
        answer: Answer<Result<(), ControlError>>,
    },
    DeleteReplica {
        key: ReplicaKey,
        answer: Answer<Result<(), ControlError>>,
    },
    SetServers(Vec<ServerAddress>),
    KeepConnected(Vec<ServerId>),
    OpenHead {
        spec: Box<HeadSpec>,
        answer: Answer<Result<Opening, OpenError>>,
    },
    /// Answered once the head is gone; after `drain` it is abandoned.
    CloseHead {
        volume: VolumeId,
        drain: Duration,
        answer: Answer<Result<(), ControlError>>,
    },
    ChangeMembers {
        volume: VolumeId,
        epoch: Epoch,
        shard: ShardRecord,
        answer: Answer<Result<(), ChangeError>>,
    },
    MembersChanged {
        volume: VolumeId,
        epoch: Epoch,
        shard: ShardRecord,
        answer: Answer<Result<(), ChangeError>>,
    },
    VolumeGrown {
        volume: VolumeId,
        epoch: Epoch,
        size_bytes: u64,
        answer: Answer<Result<(), ChangeError>>,
    },
    Publish(StateNotice),
    AddExport {
        spec: ExportSpec,
        answer: Answer<Result<(ExportId, DeviceConfig), ControlError>>,
    },
    RemoveExport {
        export: ExportId,
        answer: Answer<()>,
    },
    /// From the control thread of an export's socket.
    Vhost {
        export: ExportId,
        control: vhost_blk::Control,
    },
    /// Sends home what it can, for as long.
    Hasten(Duration),
    /// Takes nothing new from guests; answered when nothing of theirs is under way.
    Hold(Answer<()>),
    /// Lets go of pool, sockets and guests, answers with the replica service's listening socket
    /// and the read grants, and ends the thread.
    HandOver {
        within: Duration,
        answer: Answer<Result<LetGo, ControlError>>,
    },
    /// Ends the thread; heads and exports have been closed.
    Stop(Answer<()>),
}

/// Sends messages to the data-plane thread and waits for answers.
#[derive(Clone)]
pub(crate) struct Mail {
    sender: Sender<Message>,
    /// The thread has ended because everything is being handed over.
    handed_over: Arc<AtomicBool>,
}

impl Mail {
    pub(crate) fn new(sender: Sender<Message>) -> Self {
        Self { sender, handed_over: Arc::default() }
    }

    /// From now on, that the thread has ended means that it has handed over.
    pub(crate) fn note_handing_over(&self) {
        self.handed_over.store(true, Ordering::Release);
    }

    fn ended(&self) -> ControlError {
        if self.handed_over.load(Ordering::Acquire) {
            ControlError::HandedOver
        } else {
            ControlError::Stopped
        }
    }

    /// Delivers `message`, waiting while the mailbox is full.
    pub(crate) fn send(
        &self,
        operation: &'static str,
        message: Message,
        wait: Duration,
    ) -> Result<(), ControlError> {
        let start = Instant::now();
        let mut message = message;
        loop {
            match self.sender.try_send(message) {
                Ok(()) => return Ok(()),
                Err(TrySendError::Closed(_)) => return Err(self.ended()),
                Err(TrySendError::Full(back)) => message = back,
            }
            if start.elapsed() >= wait {
                return Err(ControlError::Deadline { operation, waited: wait });
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Sends what `make` makes around an answer, and waits for it.
    pub(crate) fn ask<T>(
        &self,
        operation: &'static str,
        wait: Duration,
        make: impl FnOnce(Answer<T>) -> Message,
    ) -> Result<T, ControlError> {
        let (answer, answered): (_, Receiver<T>) = sync_channel(1);
        let start = Instant::now();
        self.send(operation, make(answer), wait)?;
        match answered.recv_timeout(wait.saturating_sub(start.elapsed())) {
            Ok(value) => Ok(value),
            Err(RecvTimeoutError::Timeout) => {
                Err(ControlError::Deadline { operation, waited: wait })
            }
            Err(RecvTimeoutError::Disconnected) => Err(self.ended()),
        }
    }
}
