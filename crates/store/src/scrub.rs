//! Scrub: home is read, slowly, so that what rots is found while a peer still has it.
//!
//! A round walks the chunks of all replicas in turn, a piece at a time, through the same path as
//! every read, so the log's blocks in between are verified too. What cannot be read is narrowed
//! down to blocks and told as ranges. The rate is a budget of bytes per second, of which an eighth
//! is used while anybody else reads or writes.

use base::limits::PAYLOAD_BYTES_MAX;
use base::{BlockCount, Instant, Lba, ReplicaError, ReplyBody};
use core::time::Duration;

use crate::api::{Notice, Output};
use crate::store::Store;

/// Without reads and writes for this long, nobody is in the way.
const IDLE: Duration = Duration::from_millis(50);
/// The part of the budget that is used while somebody is.
const BUSY_PART: u32 = 8;

/// A range of blocks to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    lba: u64,
    blocks: u64,
}

/// Where the scrub is.
#[derive(Debug, Default)]
pub(crate) struct Scrub {
    next_at: Instant,
    slot: usize,
    incarnation: u32,
    chunk: u64,
    /// Pieces of the chunk still to be read, the next one last.
    pieces: Vec<Piece>,
    reading: Option<Piece>,
    /// Blocks found damaged that are not told yet.
    damaged: Option<Piece>,
    scrubbed: Scrubbed,
}

/// What scrubbing has done since the pool was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Scrubbed {
    /// Times that everything has been read.
    pub rounds: u64,
    /// Bytes read.
    pub bytes: u64,
    /// Damaged blocks found, in all rounds.
    pub damaged_blocks: u64,
}

impl Store {
    /// What scrubbing has done.
    pub fn scrubbed(&self) -> Scrubbed {
        self.scrub.scrubbed
    }

    pub(crate) fn scrub_deadline(&self) -> Option<Instant> {
        let waits = self.config.scrub_bytes_per_second > 0 && self.scrub.reading.is_none();
        (waits && self.failed.is_none() && !self.by_key.is_empty()).then_some(self.scrub.next_at)
    }

    pub(crate) fn pump_scrub(&mut self) {
        if self.scrub_deadline().is_none_or(|at| at > self.now) {
            return;
        }
        let Some((slot, piece)) = self.next_piece() else {
            // A round has ended, or nothing is home.
            return self.pause_scrub(PAYLOAD_BYTES_MAX as u64);
        };
        let bytes = piece.blocks << self.replica_ref(slot).block_size.log2();
        let Some(buffer) = self.take_buffer(usize::try_from(bytes).expect("a piece of a chunk"))
        else {
            self.scrub.pieces.push(piece);
            return self.pause_scrub(bytes);
        };
        self.scrub.reading = Some(piece);
        self.scrub.scrubbed.bytes += bytes;
        self.pause_scrub(bytes);
        let blocks = BlockCount(u32::try_from(piece.blocks).expect("a piece of a chunk"));
        self.read_for_scrub(slot, Lba(piece.lba), blocks, buffer);
    }

    fn pause_scrub(&mut self, bytes: u64) {
        let micros = bytes.saturating_mul(1_000_000) / self.config.scrub_bytes_per_second.max(1);
        let pause = Duration::from_micros(micros.max(1));
        let is_busy = self.last_used + IDLE > self.now || self.stalled.is_some();
        let pause = if is_busy { pause.saturating_mul(BUSY_PART) } else { pause };
        self.scrub.next_at = self.now + pause;
    }

    /// What to read next, and of which replica; `None` at the end of a round.
    fn next_piece(&mut self) -> Option<(u16, Piece)> {
        loop {
            let at = self.scrub.slot;
            if at >= self.replicas.len() {
                self.scrub.slot = 0;
                self.scrub.scrubbed.rounds += 1;
                return None;
            }
            let replica = self.replicas[at].as_ref();
            let Some(replica) = replica.filter(|replica| !replica.filling && !replica.damaged)
            else {
                self.end_replica();
                continue;
            };
            if self.scrub.incarnation != replica.incarnation {
                // Another one has been made in its place.
                self.scrub.incarnation = replica.incarnation;
                self.scrub.pieces.clear();
                self.scrub.damaged = None;
                self.scrub.chunk = 0;
            }
            if let Some(piece) = self.scrub.pieces.pop() {
                return Some((replica.slot, piece));
            }
            let Some((chunk, _)) = replica.chunks.next(self.scrub.chunk) else {
                self.end_replica();
                continue;
            };
            let blocks = self.chunk_blocks(replica.block_size) as u64;
            let most = PAYLOAD_BYTES_MAX as u64 >> replica.block_size.log2();
            let start = u64::from(chunk) * blocks;
            let end = (start + blocks).min(replica.blocks);
            for number in (0..(end - start).div_ceil(most)).rev() {
                let lba = start + number * most;
                self.scrub.pieces.push(Piece { lba, blocks: most.min(end - lba) });
            }
            self.scrub.chunk = u64::from(chunk) + 1;
        }
    }

    fn end_replica(&mut self) {
        self.tell_damage();
        self.scrub.pieces.clear();
        self.scrub.chunk = 0;
        self.scrub.slot += 1;
    }

    /// A piece has been read.
    pub(crate) fn scrub_read(&mut self, result: &Result<ReplyBody, ReplicaError>) {
        let Some(piece) = self.scrub.reading.take() else { return };
        match result {
            Err(ReplicaError::Damaged) if piece.blocks > 1 => {
                let half = piece.blocks / 2;
                let rest = Piece { lba: piece.lba + half, blocks: piece.blocks - half };
                self.scrub.pieces.push(rest);
                self.scrub.pieces.push(Piece { blocks: half, ..piece });
                return;
            }
            Err(ReplicaError::Damaged) => {
                self.scrub.scrubbed.damaged_blocks += 1;
                match &mut self.scrub.damaged {
                    Some(known) if known.lba + known.blocks == piece.lba => known.blocks += 1,
                    Some(_) | None => {
                        self.tell_damage();
                        self.scrub.damaged = Some(piece);
                    }
                }
            }
            // Deleted, truncated or emptied meanwhile; the next round comes.
            Ok(_) | Err(_) => self.tell_damage(),
        }
        if self.scrub.pieces.is_empty() {
            self.tell_damage();
        }
    }

    fn tell_damage(&mut self) {
        let Some(piece) = self.scrub.damaged.take() else { return };
        let replica = self.replicas.get(self.scrub.slot).and_then(Option::as_ref);
        if let Some(key) = replica.map(|replica| replica.key) {
            let blocks = BlockCount(u32::try_from(piece.blocks).expect("within a chunk"));
            let notice = Notice::DamagedBlocks { key, lba: Lba(piece.lba), blocks };
            self.output(Output::Notice(notice));
        }
    }
}
