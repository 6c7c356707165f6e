//! Replica commands.

use std::collections::BTreeMap;

use base::checksum::crc32c;
use base::planted::{self, Bug};
use base::{
    BufferMut, CommandBody, Epoch, HelloReason, Record, ReplicaCommand, ReplicaError, ReplicaKey,
    ReplyBody, Seq,
};

use super::queue::{Answer, Entry, Replica, Work};
use super::{DownReason, End, Initiator, Output, Side};
use crate::codec::command::{Command, Completion};
use crate::codec::replica::{self, HANDLES_MAX, POSITION_BYTES, PROGRESS_BYTES, STATE_BYTES};
use crate::codec::status::StatusCode;
use crate::io::Tag;
use crate::nqn::Subsystem;
use crate::outbox::Data;

/// Which handle means which replica in this session.
#[derive(Default)]
pub(super) struct Handles {
    by_key: BTreeMap<ReplicaKey, Bound>,
    free: Vec<u32>,
    last: u32,
}

/// What a handle is bound to.
struct Bound {
    handle: u32,
    epoch: Epoch,
    /// Its head has been deposed: all that it may still say is Release.
    deposed: bool,
    /// Its head has said Release. It may have ended, or rest and go on.
    released: bool,
}

impl Bound {
    /// Whether the handle may be given to another replica. A head that rests seals again then.
    fn can_be_spared(&self) -> bool {
        self.deposed || self.released
    }
}

impl Handles {
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// The handle of a replica that is to be sealed, or read for a fill; `None` if there are too many.
    fn bind(&mut self, key: ReplicaKey, epoch: Epoch) -> Option<u32> {
        if let Some(bound) = self.by_key.get_mut(&key) {
            bound.epoch = bound.epoch.max(epoch);
            (bound.deposed, bound.released) = (false, false);
            return Some(bound.handle);
        }
        if self.free.is_empty() && self.last == HANDLES_MAX {
            self.take_back();
        }
        let handle = match self.free.pop() {
            Some(handle) => handle,
            None if self.last < HANDLES_MAX => {
                self.last += 1;
                self.last
            }
            None => return None,
        };
        self.by_key.insert(key, Bound { handle, epoch, deposed: false, released: false });
        Some(handle)
    }

    fn find(&mut self, key: ReplicaKey, epoch: Epoch, body: &CommandBody) -> Option<u32> {
        let bound = self.by_key.get_mut(&key)?;
        let releases = matches!(body, CommandBody::Release);
        if bound.deposed && !releases {
            return None;
        }
        // The last word of a head that was deposed says nothing of the next one.
        if epoch >= bound.epoch {
            bound.released = releases;
        }
        Some(bound.handle)
    }

    /// Takes back the handles that can be spared. What is under way with them was resolved
    /// when it arrived, so they may mean something else from the next Seal on.
    fn take_back(&mut self) {
        let free = &mut self.free;
        self.by_key.retain(|_, bound| {
            if bound.can_be_spared() {
                free.push(bound.handle);
            }
            !bound.can_be_spared()
        });
    }

    /// There is no such replica for the head of `epoch`.
    fn unbind(&mut self, key: ReplicaKey, epoch: Epoch) {
        if let Some(&Bound { handle, epoch: bound, .. }) = self.by_key.get(&key)
            && bound <= epoch
        {
            self.by_key.remove(&key);
            self.free.push(handle);
        }
    }

    /// The head of `epoch` has been deposed.
    fn depose(&mut self, key: ReplicaKey, epoch: Epoch) {
        if let Some(bound) = self.by_key.get_mut(&key) {
            bound.deposed |= bound.epoch <= epoch;
        }
    }
}

impl Initiator {
    fn handle_for(&mut self, command: &ReplicaCommand) -> Result<u32, ReplicaError> {
        let Subsystem::Replica(_) = self.config.subsystem else {
            return Err(ReplicaError::NoReplica);
        };
        let (key, epoch) = (command.key, command.epoch);
        match &command.body {
            CommandBody::Seal | CommandBody::Hello { reason: HelloReason::Fill, .. } => {
                self.handles.bind(key, epoch).ok_or(ReplicaError::Invalid)
            }
            body => self.handles.find(key, epoch, body).ok_or(ReplicaError::NotSealed),
        }
    }

    /// Sends a command; there is a session and a free queue entry.
    pub(super) fn send_replica(&mut self, tag: Tag, command: ReplicaCommand) {
        let handle = self.handle_for(&command);
        let handle = match handle {
            Ok(handle) => handle,
            Err(error) => {
                self.outbox.push(Output::Reply { tag, result: Err(error) });
                return;
            }
        };
        let encoded = replica::encode(&command, handle);
        let ReplicaCommand { key, epoch, body, .. } = command;
        let (answer, buffer, record) = wanted(body);
        let capacity = buffer.as_ref().map_or(0, base::BufferMut::capacity);
        let bytes_max = match answer {
            Answer::Data { blocks } => replica::read_bytes_max(blocks, capacity),
            Answer::Sealed
            | Answer::Appended
            | Answer::Flushed
            | Answer::Record
            | Answer::Run
            | Answer::Truncated
            | Answer::Progress
            | Answer::Health
            | Answer::Chunks
            | Answer::Records
            | Answer::Done => capacity,
        };
        let work = Work::Replica(Replica { tag, key, epoch, answer });
        let id = self.queue.insert(Entry { buffer, bytes_max, ..Entry::new(work) });
        let encoded = Command { id, ..encoded };
        let Some(wire) = &self.wires[Side::Io.index()] else { return };
        match &record {
            Some(record) => {
                let parts = [record.header_bytes(), record.payload()];
                wire.send(&mut self.outbox, &encoded, Data::Parts(&parts));
            }
            None => wire.send(&mut self.outbox, &encoded, Data::None),
        }
    }

    /// A replica command has ended.
    pub(super) fn on_replica_end(
        &mut self,
        entry: Entry,
        completion: Completion,
    ) -> Result<(), End> {
        let Work::Replica(command) = &entry.work else { return Ok(()) };
        let (tag, key, epoch) = (command.tag, command.key, command.epoch);
        let result = if completion.status.is_success() {
            let answer = command.answer;
            body(entry, answer, completion)
        } else if completion.status.code() == StatusCode::TRANSIENT_TRANSPORT.code() {
            Err(DownReason::Protocol("a data digest is wrong at the peer"))
        } else {
            let detail = &entry.small[..entry.small_bytes];
            let intact = replica::data_result(crc32c(detail)) == completion.result;
            let position = (intact && detail.len() == POSITION_BYTES)
                .then(|| replica::decode_position(detail));
            match replica::decode_error(completion.status, completion.result, position) {
                Some(error) => Ok(Err(error)),
                None => Err(DownReason::Protocol("an error without its position, whole")),
            }
        };
        let result = match result {
            Ok(result) => result,
            Err(reason) => {
                // Going down answers everything in the queue; this one is no longer there.
                let result = Err(ReplicaError::Disconnected);
                self.outbox.push(Output::Reply { tag, result });
                return Err(reason.into());
            }
        };
        match result {
            Err(ReplicaError::Superseded { .. }) => self.handles.depose(key, epoch),
            Err(ReplicaError::NoReplica) => self.handles.unbind(key, epoch),
            Ok(_) | Err(_) => {}
        }
        self.outbox.push(Output::Reply { tag, result });
        Ok(())
    }
}

/// The answer that a command asks for, the buffer that it goes to, and what is sent with the command.
fn wanted(body: CommandBody) -> (Answer, Option<BufferMut>, Option<Record>) {
    match body {
        CommandBody::Seal => (Answer::Sealed, None, None),
        CommandBody::Append { record, .. } => (Answer::Appended, None, Some(record)),
        CommandBody::Read { blocks, buffer, .. } => (Answer::Data { blocks }, Some(buffer), None),
        CommandBody::Flush => (Answer::Flushed, None, None),
        CommandBody::Scan { buffer, .. } => (Answer::Record, Some(buffer), None),
        CommandBody::ScanRun { buffer, .. } => (Answer::Records, Some(buffer), None),
        CommandBody::Truncate { .. } => (Answer::Truncated, None, None),
        CommandBody::Grow { .. }
        | CommandBody::Trim
        | CommandBody::Release
        | CommandBody::Renew
        | CommandBody::Hello { .. } => (Answer::Done, None, None),
        CommandBody::HealthOf { .. } => (Answer::Health, None, None),
        CommandBody::Install { .. } => (Answer::Progress, None, None),
        CommandBody::List { buffer, .. } => (Answer::Chunks, Some(buffer), None),
        CommandBody::Fetch { buffer, .. } => (Answer::Run, Some(buffer), None),
    }
}

/// The answer of a successful command; an error if it is not the one that belongs to it.
fn body(
    entry: Entry,
    answer: Answer,
    completion: Completion,
) -> Result<Result<ReplyBody, ReplicaError>, DownReason> {
    let incomplete = DownReason::Protocol("an answer is incomplete");
    let small = &entry.small[..entry.small_bytes];
    let result = completion.result;
    if !small.is_empty() && replica::data_result(crc32c(small)) != result {
        return Err(DownReason::Protocol("an answer was corrupted on the way"));
    }
    let body = match answer {
        Answer::Sealed if small.len() >= STATE_BYTES => {
            ReplyBody::Sealed(replica::decode_state(small))
        }
        Answer::Truncated if small.len() == POSITION_BYTES => {
            ReplyBody::Truncated { last: replica::decode_position(small) }
        }
        Answer::Progress if small.len() >= PROGRESS_BYTES => {
            ReplyBody::Filling(replica::decode_progress(small).ok_or(incomplete)?)
        }
        Answer::Sealed | Answer::Truncated | Answer::Progress => return Err(incomplete),
        Answer::Health => ReplyBody::Health(replica::health_from_code(result)),
        Answer::Appended => ReplyBody::Appended { durable: Seq(result) },
        Answer::Flushed => ReplyBody::Flushed { durable: Seq(result) },
        Answer::Done => ReplyBody::Done,
        Answer::Data { blocks } => {
            let bytes = entry.received;
            if !replica::is_read_length(blocks, bytes) {
                return Err(incomplete);
            }
            let data = entry.buffer.ok_or(incomplete)?.freeze().payload(bytes);
            let intact = replica::data_result(crc32c(data.bytes())) == result;
            if !intact && !planted::is(Bug::AnswerUnverified) {
                return Err(DownReason::Protocol("read data was corrupted on the way"));
            }
            ReplyBody::Data(data)
        }
        Answer::Chunks | Answer::Records => {
            let bytes = entry.received;
            let data = entry.buffer.ok_or(incomplete)?.freeze().payload(bytes);
            if replica::data_result(crc32c(data.bytes())) != result {
                return Err(DownReason::Protocol("a list was corrupted on the way"));
            }
            if answer == Answer::Records {
                ReplyBody::Records(data)
            } else {
                ReplyBody::Chunks(data)
            }
        }
        Answer::Run if entry.received == 0 => ReplyBody::Done,
        Answer::Record | Answer::Run => {
            if entry.received == 0 {
                return Err(incomplete);
            }
            let buffer = entry.buffer.ok_or(incomplete)?;
            match Record::decode(buffer) {
                Ok(record)
                    if record.header_bytes().len() == entry.header_bytes
                        && record.payload().len() == entry.received - entry.header_bytes =>
                {
                    ReplyBody::Record(record)
                }
                Ok(_) => return Err(incomplete),
                Err(_) => return Ok(Err(ReplicaError::Damaged)),
            }
        }
    };
    Ok(Ok(body))
}
