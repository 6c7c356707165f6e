//! A volume grows in a world, and chosen situations of growing.

use base::{BlockRequest, CommandBody, Operation, ReplicaError, RequestId, Status};

use super::bench::{BLOCKS, Bench};
use super::world::{Event, World};
use crate::{HeadPhase, Input, MemberMode, Output};

impl World {
    pub(super) fn start_growth(&mut self) {
        if self.settings.grows {
            let after = self.growth_pause();
            self.schedule(after, Event::Grow);
        }
    }

    fn growth_pause(&mut self) -> u64 {
        let delay = self.settings.delay;
        self.random.below(150 * delay)
    }

    /// The cluster store's record says a larger size. The head of the moment hears of it after a while,
    /// if it still is the head.
    pub(super) fn grow(&mut self) {
        let most = self.settings.blocks as u64;
        if !self.faults || self.size == most {
            return;
        }
        self.size = (self.size + 1 + self.random.below(1 + most / 4)).min(most);
        self.count("grown");
        let (head, blocks) = (self.current(), self.size);
        let after = self.delay();
        self.schedule(after, Event::Tell { head, blocks });
        self.start_growth();
    }

    /// What the guest can find out of the size.
    pub(super) fn see_size(&mut self, head: usize) {
        if head == self.current()
            && let Some(running) = &self.heads[head]
        {
            let served = usize::try_from(running.head.status().blocks).unwrap();
            self.seen = self.seen.max(served);
        }
    }

    /// Blocks that a head serves.
    pub(super) fn served(&self, head: usize) -> usize {
        let served = self.heads[head].as_ref().map_or(0, |head| head.head.status().blocks);
        usize::try_from(served).unwrap()
    }
}

const LARGER: u64 = BLOCKS + 700;

impl Bench {
    fn grow(&mut self, blocks: u64) {
        self.input(Input::Grow { blocks });
        self.settle();
    }

    fn served(&self) -> u64 {
        self.head.status().blocks
    }
}

#[test]
fn a_volume_grows_while_it_is_used() {
    let mut bench = Bench::opened(3);
    let last = BLOCKS;
    let beyond = bench.write(last, 7);
    assert_eq!(bench.status(beyond), Some(Status::InvalidRange));
    bench.grow(LARGER);
    assert!(bench.news.iter().any(|n| matches!(n, Output::Resized { blocks: LARGER })));
    assert!(bench.models.iter().all(|model| model.blocks == LARGER));
    let fresh = bench.read(last + 1);
    assert_eq!(bench.value(fresh), Some(0), "what is new reads as zeroes");
    let write = bench.write(LARGER - 1, 8);
    assert_eq!(bench.status(write), Some(Status::Ok));
    let beyond = bench.write(LARGER, 9);
    assert_eq!(bench.status(beyond), Some(Status::InvalidRange));
    // An older size is old news.
    bench.grow(BLOCKS);
    assert_eq!(bench.served(), LARGER);
}

#[test]
fn front_ends_may_use_what_a_write_quorum_has() {
    let mut bench = Bench::opened(3);
    bench.held = vec![false, true, true];
    bench.grow(LARGER);
    assert_eq!(bench.served(), BLOCKS);
    bench.held[1] = false;
    bench.settle();
    assert_eq!(bench.served(), LARGER);
    // The third one is told first, whenever it gets there.
    let write = bench.write(LARGER - 1, 3);
    assert_eq!(bench.status(write), Some(Status::Ok));
    assert_eq!(bench.models[2].blocks, BLOCKS);
    bench.held[2] = false;
    bench.settle();
    assert_eq!((bench.models[2].blocks, bench.models[2].last()), (LARGER, bench.models[1].last()));
}

#[test]
fn a_member_that_was_away_is_told_first() {
    let mut bench = Bench::opened(3);
    bench.down(2);
    bench.grow(LARGER);
    let write = bench.write(LARGER - 1, 3);
    assert_eq!(bench.status(write), Some(Status::Ok));
    bench.up([2]);
    bench.pass(1000);
    assert_eq!((bench.models[2].blocks, bench.mode(2)), (LARGER, MemberMode::Live));
    assert_eq!(bench.models[2].last(), bench.models[1].last());
}

/// The store's record was changed, and the head died before it told anybody, or some.
#[test]
fn the_next_head_knows_the_size_and_tells_members_before_their_tails_are_mended() {
    let mut bench = Bench::opened(3);
    bench.held[2] = true;
    bench.grow(LARGER);
    let write = bench.write(LARGER - 2, 5);
    assert_eq!(bench.status(write), Some(Status::Ok));
    bench.held[2] = false;
    bench.wires[2].clear();
    bench.next_head();
    bench.up([1, 2]);
    bench.pass(1000);
    assert_eq!(bench.head.status().phase, HeadPhase::Serving);
    assert_eq!(bench.models[2].blocks, LARGER, "it was brought a record beyond its old end");
    assert_eq!(bench.served(), BLOCKS, "the record, which this bench keeps, went back");
    bench.grow(LARGER);
    let read = bench.read(LARGER - 2);
    assert_eq!(bench.value(read), Some(5));
}

#[test]
fn a_member_that_cannot_grow_is_tried_again_and_gets_nothing_that_does_not_fit() {
    let mut bench = Bench::opened(3);
    bench.held[2] = true;
    bench.grow(LARGER);
    let (tag, command) = bench.wires[2].pop_front().expect("it is told");
    assert!(matches!(command.body, CommandBody::Grow { blocks: LARGER }));
    bench.answer(2, tag, Err(ReplicaError::DeviceFailed));
    bench.held[2] = false;
    let write = bench.write(LARGER - 1, 3);
    assert_eq!(bench.status(write), Some(Status::Ok));
    assert_eq!(bench.mode(2), MemberMode::Failed(ReplicaError::DeviceFailed));
    bench.pass(5000);
    assert_eq!((bench.models[2].blocks, bench.mode(2)), (LARGER, MemberMode::Live));
}

#[test]
fn a_request_of_an_old_end_crosses_it_only_when_it_may() {
    let mut bench = Bench::opened(1);
    bench.grow(LARGER);
    let buffer = bench.buffers.take(8 * 512).unwrap();
    let request = BlockRequest {
        id: RequestId(1 << 40),
        lba: base::Lba(BLOCKS - 4),
        blocks: base::BlockCount(8),
        operation: Operation::Read { buffer },
    };
    bench.input(Input::Request(request));
    bench.settle();
    assert_eq!(bench.replies.last().map(|reply| reply.status), Some(Status::Ok));
}
