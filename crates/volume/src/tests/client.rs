//! The client of a world: reads, writes, zeroes and flushes at random places, a few at a time.

use base::{BlockCount, BlockRequest, Lba, Operation, RecordKind, RequestId};

use super::model::{BLOCK_BYTES, fill};
use super::oracle::Asked;
use super::world::{Event, Running, World};
use crate::Input;

impl World {
    /// The client: fills up to its depth, then comes again.
    pub(super) fn submit(&mut self) {
        self.client_awake = false;
        let current = self.current();
        while self.heads[current].as_ref().is_some_and(|running| running.head.room() > 0) {
            let in_flight = self.oracle.pending.values().filter(|p| p.head == current).count();
            if in_flight >= self.settings.depth {
                break;
            }
            if self.settings.grants {
                self.ask_deposed();
            }
            if let Some(mut request) = self.returned.pop() {
                self.next_id += 1;
                let id = self.next_id;
                request.id = RequestId(id);
                let asked = self.refresh(&mut request);
                let lba = usize::try_from(request.lba.0).unwrap();
                self.oracle.asked(id, asked, lba, request.blocks.0 as usize, current);
                self.input(current, Input::Request(request));
            } else if !self.submitting || !self.random_request() {
                break;
            }
        }
        if self.submitting || !self.returned.is_empty() {
            self.wake_client();
        }
    }

    pub(super) fn wake_client(&mut self) {
        if !self.client_awake {
            self.client_awake = true;
            let after = self.delay();
            self.schedule(after, Event::Submit);
        }
    }

    /// A returned request as a new one: a new value, so that the oracle can tell them apart.
    fn refresh(&mut self, request: &mut BlockRequest) -> Asked {
        let value = self.next_id;
        let bytes = request.blocks.0 as usize * BLOCK_BYTES;
        match &mut request.operation {
            Operation::Read { .. } => Asked::Read,
            Operation::Write { buffer, fua } => {
                fill(&mut buffer.payload_mut()[..bytes], value);
                Asked::Write { value, fua: *fua }
            }
            Operation::Flush => Asked::Flush,
            Operation::Discard => Asked::Zero { kind: RecordKind::Discard, fua: false },
            Operation::WriteZeroes { fua } => {
                Asked::Zero { kind: RecordKind::WriteZeroes, fua: *fua }
            }
        }
    }

    fn random_request(&mut self) -> bool {
        // A head that was opened before the client heard of a size may not serve that yet.
        let size = self.seen.min(self.served(self.current()));
        let lba = self.random.index(size);
        let blocks = 1 + self.random.index(4.min(size - lba));
        let fua = self.random.one_in(8);
        let asked = match self.random.below(20) {
            0..=8 => Asked::Read,
            9 => Asked::Flush,
            10 => Asked::Zero { kind: RecordKind::Discard, fua: false },
            11 => Asked::Zero { kind: RecordKind::WriteZeroes, fua },
            _ => Asked::Write { value: 0, fua },
        };
        self.request(asked, lba, blocks)
    }

    /// Somebody goes on reading from heads that are no longer the newest.
    fn ask_deposed(&mut self) {
        let head = self.random.index(self.heads.len());
        let listens = |running: &Running| running.head.room() > 0 && !running.ended;
        if head == self.current() || !self.heads[head].as_ref().is_some_and(listens) {
            return;
        }
        let waiting = self.oracle.pending.values().filter(|pending| pending.head == head).count();
        if waiting < 2 * self.settings.depth {
            let lba = self.random.index(self.served(head));
            self.request_of(head, Asked::Read, lba, 1);
        }
    }

    /// Submits a request to the current head. A write's value is the request's id. False if no
    /// buffer is free.
    pub(super) fn request(&mut self, asked: Asked, lba: usize, blocks: usize) -> bool {
        self.request_of(self.current(), asked, lba, blocks)
    }

    fn request_of(&mut self, head: usize, asked: Asked, lba: usize, blocks: usize) -> bool {
        let bytes = blocks * BLOCK_BYTES;
        let id = self.next_id + 1;
        let (operation, asked) = match asked {
            Asked::Read => {
                let Some(buffer) = self.buffers.take(bytes) else { return false };
                (Operation::Read { buffer }, asked)
            }
            Asked::Write { fua, .. } => {
                let Some(mut buffer) = self.buffers.take(bytes) else { return false };
                fill(&mut buffer.payload_mut()[..bytes], id);
                (Operation::Write { buffer, fua }, Asked::Write { value: id, fua })
            }
            Asked::Zero { kind: RecordKind::Discard, .. } => (Operation::Discard, asked),
            Asked::Zero { fua, .. } => (Operation::WriteZeroes { fua }, asked),
            Asked::Flush => (Operation::Flush, asked),
        };
        self.next_id = id;
        self.oracle.asked(id, asked, lba, blocks, head);
        self.start_watch(id, asked);
        let request = BlockRequest {
            id: RequestId(id),
            lba: Lba(lba as u64),
            blocks: BlockCount(u32::try_from(blocks).unwrap()),
            operation,
        };
        self.input(head, Input::Request(request));
        true
    }
}
