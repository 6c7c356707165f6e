//! A guest request under way: emitted in pieces, answered when all pieces are.

use std::sync::Arc;

use base::limits::{PAYLOAD_BYTES_MAX, RANGE_BLOCKS_MAX};
use base::{BlockCount, BlockReply, BlockRequest, BufferPool, Lba, Operation, RequestId, Status};

use crate::DeviceConfig;
use crate::chain::{Body, Cursor, Kind};
use crate::dirty::DirtyLog;
use crate::memory::GuestMemory;

/// Which guest request, and which piece of it, a block request is.
///
/// | bits | |
/// |---|---|
/// | 0..24 | piece |
/// | 24..40 | generation of the head's use |
/// | 40..56 | head |
/// | 56..64 | queue |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PieceId {
    pub(crate) queue: u16,
    pub(crate) head: u16,
    pub(crate) generation: u16,
    pub(crate) piece: u32,
}

impl PieceId {
    pub(crate) fn encode(self) -> RequestId {
        debug_assert!(self.piece < 1 << 24 && self.queue < 256);
        RequestId(
            u64::from(self.piece)
                | u64::from(self.generation) << 24
                | u64::from(self.head) << 40
                | u64::from(self.queue) << 56,
        )
    }

    pub(crate) fn decode(id: RequestId) -> Self {
        let [p0, p1, p2, g0, g1, h0, h1, queue] = id.0.to_le_bytes();
        Self {
            queue: queue.into(),
            head: u16::from_le_bytes([h0, h1]),
            generation: u16::from_le_bytes([g0, g1]),
            piece: u32::from_le_bytes([p0, p1, p2, 0]),
        }
    }
}

/// What emitting a piece came to.
#[derive(Debug)]
pub(crate) enum Emit {
    /// Submit this.
    Piece(BlockRequest),
    /// No buffer is free.
    NoBuffer,
    /// The guest's memory could not be read (its mapping was checked, so it never happens).
    Failed,
}

/// The slot of a head.
#[derive(Debug, Default)]
pub(crate) struct Chain {
    /// The device has taken the head and not returned it.
    pub(crate) taken: bool,
    /// When it was taken, counted per queue.
    pub(crate) counter: u64,
    generation: u16,
    kind: Option<Kind>,
    pub(crate) body: Body,
    /// The mappings that this request uses, kept alive.
    pub(crate) memory: Option<Arc<GuestMemory>>,
    cursor: Cursor,
    /// Blocks emitted of the current range, and which range that is.
    emitted: u64,
    range: usize,
    next_piece: u32,
    /// Pieces submitted and not answered.
    pending: u32,
    /// Nothing more will be submitted.
    all_emitted: bool,
    /// The worst status so far; `None` while all is well.
    status: Option<Status>,
}

impl Chain {
    /// Starts a parsed request.
    pub(crate) fn start(&mut self, kind: Kind) {
        self.kind = Some(kind);
        self.cursor = Cursor::default();
        self.emitted = 0;
        self.range = 0;
        self.next_piece = 0;
        self.pending = 0;
        self.all_emitted = false;
        self.status = None;
    }

    /// Ends the head's use; late replies are told apart by the generation.
    pub(crate) fn release(&mut self) {
        self.taken = false;
        self.kind = None;
        self.memory = None;
        self.pending = 0;
        self.all_emitted = true;
        self.generation = self.generation.wrapping_add(1);
    }

    /// All pieces are submitted and answered.
    pub(crate) fn is_done(&self) -> bool {
        self.taken && self.all_emitted && self.pending == 0
    }

    pub(crate) fn is_emitted(&self) -> bool {
        self.all_emitted
    }

    pub(crate) fn has_pending(&self) -> bool {
        self.pending > 0
    }

    pub(crate) fn status(&self) -> Status {
        self.status.unwrap_or(Status::Ok)
    }

    /// True if `id` names a piece of this use of the head that may still be answered.
    pub(crate) fn expects(&self, id: PieceId) -> bool {
        self.taken
            && self.pending > 0
            && self.generation == id.generation
            && id.piece < self.next_piece
    }

    /// Submits nothing more, and ends with `status`.
    pub(crate) fn fail(&mut self, status: Status) {
        // Superseded outranks errors: nothing was decided, so the whole request is sent again.
        if self.status.is_none() || status == Status::Superseded {
            self.status = Some(status);
        }
        self.all_emitted = true;
    }

    /// The next piece, of queue `queue` and head `head`.
    pub(crate) fn emit(
        &mut self,
        queue: u16,
        head: u16,
        fua: bool,
        config: &DeviceConfig,
        buffers: &BufferPool,
    ) -> Emit {
        let kind = self.kind.expect("only started requests are emitted");
        let blocks_max = match kind {
            Kind::Read | Kind::Write => {
                PAYLOAD_BYTES_MAX as u64 / u64::from(config.block_size.bytes())
            }
            Kind::Discard | Kind::WriteZeroes => u64::from(RANGE_BLOCKS_MAX),
            Kind::Flush => 0,
        };
        let range = match kind {
            Kind::Read | Kind::Write => self.body.range,
            Kind::Discard | Kind::WriteZeroes => self.body.ranges.get(self.range).copied(),
            Kind::Flush => None,
        };
        let (lba, blocks, left) = match range {
            Some(range) => {
                let blocks = (range.blocks - self.emitted).min(blocks_max);
                (range.lba + self.emitted, blocks, range.blocks - self.emitted - blocks)
            }
            None => (0, 0, 0),
        };
        let count = BlockCount(u32::try_from(blocks).expect("at most RANGE_BLOCKS_MAX"));
        let bytes = usize::try_from(count.bytes(config.block_size)).expect("fits as blocks do");
        let operation = match kind {
            Kind::Read => match buffers.take(bytes) {
                Some(buffer) => Operation::Read { buffer },
                None => return Emit::NoBuffer,
            },
            Kind::Write => {
                let Some(mut buffer) = buffers.take(bytes) else { return Emit::NoBuffer };
                let memory = self.memory.as_deref().expect("a started request has its memory");
                let payload = &mut buffer.payload_mut()[..bytes];
                if !self.body.read_data(memory, &mut self.cursor, payload) {
                    self.fail(Status::IoError);
                    return Emit::Failed;
                }
                Operation::Write { buffer, fua }
            }
            Kind::Flush => Operation::Flush,
            Kind::Discard => Operation::Discard,
            Kind::WriteZeroes => Operation::WriteZeroes { fua },
        };
        let id = PieceId { queue, head, generation: self.generation, piece: self.next_piece };
        self.next_piece += 1;
        self.pending += 1;
        self.emitted += blocks;
        if left == 0 {
            self.emitted = 0;
            self.range += 1;
            self.all_emitted = match kind {
                Kind::Discard | Kind::WriteZeroes => self.range == self.body.ranges.len(),
                Kind::Read | Kind::Write | Kind::Flush => true,
            };
        }
        Emit::Piece(BlockRequest { id: id.encode(), lba: Lba(lba), blocks: count, operation })
    }

    /// Takes the reply to piece `id`; copies what was read to the guest, unless the guest is gone
    /// (the chain then has no memory).
    pub(crate) fn reply(
        &mut self,
        id: PieceId,
        reply: BlockReply,
        config: &DeviceConfig,
        log: Option<&DirtyLog>,
    ) {
        self.pending -= 1;
        let BlockReply { id: _, status, data } = reply;
        if status != Status::Ok {
            self.fail(status);
            return;
        }
        let (Some(Kind::Read), Some(memory)) = (self.kind, self.memory.as_deref()) else { return };
        let offset = u64::from(id.piece) * PAYLOAD_BYTES_MAX as u64;
        let range = self.body.range.expect("a read has a range");
        let total = range.blocks * u64::from(config.block_size.bytes());
        let expected = total.saturating_sub(offset).min(PAYLOAD_BYTES_MAX as u64);
        let copied = match data {
            Some(data) if data.len() as u64 == expected => {
                self.body.write_data(memory, offset, data.bytes(), log)
            }
            _ => false,
        };
        if !copied {
            tracing::error!("a read of {expected} bytes was answered without them");
            self.fail(Status::IoError);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_survive_their_encoding() {
        for (queue, head, generation, piece) in
            [(0, 0, 0, 0), (63, 1023, 0xffff, 0x00ff_ffff), (1, 0x0102, 0x0304, 0x05_0607)]
        {
            let id = PieceId { queue, head, generation, piece };
            assert_eq!(PieceId::decode(id.encode()), id);
        }
    }
}
