//! What the parts of a fill share: whom it is for, where it reads, what is under way.

use base::chunks::{self, ListEntry, ListHeader};
use base::limits::PAYLOAD_BYTES_MAX;
use base::time::earliest;
use base::{
    BlockCount, BlockSize, BufferMut, CommandBody, Epoch, Instant, Position, ReplicaCommand,
    ReplicaError, ReplicaKey, ReplyBody, Seq, ServerId,
};

use super::pace::{Pace, Reserved};
use super::{FillFailure, FillOutput, Shared, Step};

/// What a head wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Order {
    /// The head's epoch, which is the sealed one.
    pub(crate) epoch: Epoch,
    /// Whose replica to read.
    pub(crate) source: ServerId,
    /// Home first, or only the log.
    pub(crate) chunks: bool,
}

/// What the store knows of the replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    /// Blocks of a chunk.
    pub(crate) unit: BlockCount,
    /// The shard's size in blocks.
    pub(crate) blocks: u64,
    /// The volume's block size.
    pub(crate) block_size: BlockSize,
    /// Where its log ends.
    pub(crate) last: Position,
}

impl Shape {
    /// Chunks of the replica.
    pub(super) fn chunks(&self) -> u32 {
        let count = self.blocks.div_ceil(u64::from(self.unit.0.max(1)));
        u32::try_from(count).unwrap_or(chunks::NO_MORE - 1)
    }

    /// First block of a chunk, and the first one after it.
    pub(super) fn range(&self, chunk: u32) -> (u64, u64) {
        let start = u64::from(chunk) * u64::from(self.unit.0);
        (start, (start + u64::from(self.unit.0)).min(self.blocks))
    }
}

/// Why a fill cannot go on as it is.
#[derive(Clone, Copy, Debug)]
pub(super) enum Trouble {
    /// The session with the source is gone: start over when there is one. What was copied counts.
    Lost,
    /// The source's log no longer reaches back to where this replica's begins.
    Trimmed,
    /// Not from this source, or not here.
    Failed(FillFailure),
}

/// See the module.
#[derive(Debug)]
pub(super) struct Line {
    pub(super) id: u64,
    pub(super) key: ReplicaKey,
    pub(super) order: Order,
    pub(super) shape: Shape,
    pub(super) pace: Pace,
    /// Commands that were not answered, here and there.
    pub(super) outstanding: usize,
    /// Payload bytes that came from the source.
    pub(super) copied_bytes: u64,
    /// What was copied is as of this seq, at the newest: the log must come at least so far.
    pub(super) seen: Seq,
    /// There was no buffer, or the pace does not allow more: look again then.
    pub(super) retry_at: Option<Instant>,
}

impl Line {
    /// Sends a command to the source.
    pub(super) fn ask(&mut self, shared: &mut Shared, step: Step, body: CommandBody) {
        self.outstanding += 1;
        let Order { epoch, source, .. } = self.order;
        let command = ReplicaCommand { key: self.key, epoch, commit: Seq::ZERO, body };
        shared.outputs.push_back(FillOutput::Peer { fill: self.id, step, source, command });
    }

    /// Gives a command to the own store.
    pub(super) fn tell(&mut self, shared: &mut Shared, step: Step, command: store::Command) {
        self.outstanding += 1;
        shared.outputs.push_back(FillOutput::Store { fill: self.id, step, command });
    }

    /// Looks which chunks the own store has.
    pub(super) fn look(&mut self, shared: &mut Shared, first: u32) {
        self.outstanding += 1;
        shared.outputs.push_back(FillOutput::Own { fill: self.id, key: self.key, first });
    }

    /// A buffer for an answer; `None`: one comes free soon.
    pub(super) fn buffer(&mut self, shared: &Shared) -> Option<BufferMut> {
        self.buffer_of(shared, PAYLOAD_BYTES_MAX)
    }

    /// A buffer for so many bytes of payload.
    pub(super) fn buffer_of(&mut self, shared: &Shared, bytes: usize) -> Option<BufferMut> {
        let buffer = shared.buffers.take(bytes);
        if buffer.is_none() {
            self.retry_at = earliest(self.retry_at, Some(shared.now + super::STARVED_RETRY));
        }
        buffer
    }

    /// A buffer for data of the source, if it may be asked for any now. Paid for as far as is
    /// `expected`.
    pub(super) fn paced_buffer(
        &mut self,
        shared: &Shared,
        expected: usize,
    ) -> Option<(BufferMut, Reserved)> {
        let buffer = self.buffer(shared)?;
        if let Some(reserved) = self.pace.start(shared.now, expected) {
            return Some((buffer, reserved));
        }
        self.retry_at = earliest(self.retry_at, self.pace.ready_at());
        None
    }
}

/// The source's answer to a List.
pub(super) fn list(order: &Order, body: ReplyBody) -> Result<(ListHeader, base::Buffer), Trouble> {
    let ReplyBody::Chunks(buffer) = body else { return Err(mismatch()) };
    let header = chunks::decode(buffer.bytes()).map(|(header, _)| header);
    // No log has a seq near the end of all numbers.
    let possible = |header: &ListHeader| {
        let ListHeader { trimmed, commit, .. } = *header;
        trimmed.epoch <= order.epoch && trimmed.seq.max(commit).0 < u64::MAX / 2
    };
    header.filter(possible).map(|header| (header, buffer)).ok_or_else(mismatch)
}

/// The entries of a list that was decoded before.
pub(super) fn entries(list: &base::Buffer) -> impl Iterator<Item = ListEntry> {
    chunks::decode(list.bytes()).into_iter().flat_map(|(_, entries)| entries)
}

/// An answer that is none to what was asked.
pub(super) fn mismatch() -> Trouble {
    Trouble::Failed(FillFailure::Mismatch)
}

/// What an error of the source means.
pub(super) fn source_trouble(error: ReplicaError) -> Trouble {
    match error {
        // The session, or what was said in it, is gone.
        ReplicaError::Disconnected | ReplicaError::NotSealed => Trouble::Lost,
        ReplicaError::Superseded { .. }
        | ReplicaError::NoReplica
        | ReplicaError::OutOfOrder { .. }
        | ReplicaError::Behind { .. }
        | ReplicaError::Trimmed { .. }
        | ReplicaError::Filling
        | ReplicaError::NoSpace
        | ReplicaError::Damaged
        | ReplicaError::DeviceFailed
        | ReplicaError::Invalid => Trouble::Failed(FillFailure::Source(error)),
    }
}

/// What an error of the own store means.
pub(super) fn own_trouble(error: ReplicaError) -> Trouble {
    Trouble::Failed(FillFailure::Here(error))
}
