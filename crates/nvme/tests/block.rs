//! Standard commands: block requests from an initiator to a volume subsystem, against a model of
//! the volume, and what a stock host asks the admin queue.

#![allow(clippy::unwrap_used, reason = "tests")]

mod net;

use std::collections::BTreeMap;
use std::time::Duration;

use base::{
    BlockCount, BlockReply, BlockRequest, BlockSize, BufferPool, Lba, Operation, RequestId, Status,
    VolumeId,
};
use net::Net;
use nvme::initiator::{Input, Namespace, Output};
use nvme::target::{self, VolumeExport};
use nvme::{SessionId, Subsystem};

const VOLUME: VolumeId = VolumeId::from_bytes([0xb1; 16]);
const BLOCKS: u64 = 200_000;

fn export(block_size: BlockSize) -> VolumeExport {
    VolumeExport { volume: VOLUME, blocks: BLOCKS, block_size, read_only: false }
}

/// A request that the head has not answered.
struct Pending {
    session: SessionId,
    request: BlockRequest,
}

/// The volume's content by block: a number that fills the block, none for zeroes. What is sent
/// and not answered is kept apart, so that requests never overlap while they are under way.
struct Run {
    net: Net,
    pool: BufferPool,
    block_bytes: usize,
    content: BTreeMap<u64, u8>,
    under_way: BTreeMap<RequestId, (u64, u64)>,
    expected: BTreeMap<RequestId, (Status, Option<Vec<u8>>)>,
    writes: BTreeMap<RequestId, (u64, Vec<u8>)>,
    at_target: Vec<Pending>,
    last: u64,
    answered: u64,
    pieces: u64,
}

impl Run {
    fn new(seed: u64, block_size: BlockSize, digests: (bool, bool), slots: (usize, usize)) -> Self {
        let mut net = Net::with(
            seed,
            Subsystem::Volume(VOLUME),
            |_| {},
            |initiator| {
                (initiator.header_digest, initiator.data_digest) = digests;
                initiator.queue_entries = 33;
            },
            slots,
        );
        net.at_target(target::Input::AddVolume(export(block_size)));
        net.up();
        let events = net.initiator_events();
        let expected = Namespace { blocks: BLOCKS, block_size, read_only: false };
        assert!(
            matches!(&events[..], [Output::Up { namespace: Some(found) }] if *found == expected),
            "{events:?}"
        );
        net.target_events();
        Self {
            net,
            pool: BufferPool::heap(2048, 256),
            block_bytes: block_size.bytes() as usize,
            content: BTreeMap::new(),
            under_way: BTreeMap::new(),
            expected: BTreeMap::new(),
            writes: BTreeMap::new(),
            at_target: Vec::new(),
            last: 0,
            answered: 0,
            pieces: 0,
        }
    }

    /// A range that touches nothing that is under way.
    fn range(&mut self, blocks_max: u64) -> Option<(u64, u64)> {
        let blocks = 1 + self.net.random.below(blocks_max);
        // A small area, so that reads find what was written.
        let start = self.net.random.below(if blocks_max > 1000 { BLOCKS - blocks } else { 2000 });
        let end = start + blocks;
        let free = self.under_way.values().all(|&(from, to)| to <= start || end <= from);
        free.then_some((start, blocks))
    }

    fn send(&mut self) {
        self.last += 1;
        let id = RequestId(self.last);
        let kind = self.net.random.below(10);
        let blocks_max = if kind >= 8 { 65_536 } else { (131_072 / self.block_bytes) as u64 };
        let Some((lba, blocks)) = self.range(blocks_max) else {
            self.last -= 1;
            return;
        };
        let bytes = usize::try_from(blocks).unwrap() * self.block_bytes;
        let fua = self.net.random.chance(2);
        let operation = match kind {
            0..4 => {
                let Some(buffer) = self.pool.take(bytes) else {
                    self.last -= 1;
                    return;
                };
                Operation::Read { buffer }
            }
            4..7 => {
                let Some(mut buffer) = self.pool.take(bytes) else {
                    self.last -= 1;
                    return;
                };
                let data: Vec<u8> = (0..blocks)
                    .flat_map(|_| vec![self.net.random.next().to_le_bytes()[0]; self.block_bytes])
                    .collect();
                buffer.payload_mut()[..bytes].copy_from_slice(&data);
                self.writes.insert(id, (lba, data));
                Operation::Write { buffer, fua }
            }
            7 => Operation::Flush,
            8 => Operation::Discard,
            _ => Operation::WriteZeroes { fua },
        };
        self.under_way.insert(id, (lba, lba + blocks));
        let blocks = BlockCount(u32::try_from(blocks).unwrap());
        let request = BlockRequest { id, lba: Lba(lba), blocks, operation };
        self.net.at_initiator(Input::Block(request));
    }

    /// The request under way that the target's request is part of.
    fn sent_as(&self, lba: u64, blocks: u64) -> RequestId {
        let matching = self
            .under_way
            .iter()
            .find(|(_, (from, to))| *from <= lba && lba + blocks <= *to)
            .unwrap();
        *matching.0
    }

    fn answer(&mut self) {
        if self.at_target.is_empty() {
            return;
        }
        let count = self.at_target.len() as u64;
        let index = usize::try_from(self.net.random.below(count)).unwrap();
        let Pending { session, request } = self.at_target.swap_remove(index);
        let BlockRequest { id, lba, blocks, operation } = request;
        let blocks = u64::from(blocks.0);
        self.pieces += 1;
        let fails = self.net.random.chance(12);
        let status = match self.net.random.below(3) {
            _ if !fails => Status::Ok,
            0 => Status::IoError,
            1 => Status::ReadOnly,
            _ => Status::Superseded,
        };
        let mut data = None;
        match operation {
            Operation::Flush => {
                let reply = BlockReply { id, status: Status::Ok, data: None };
                self.net.at_target(target::Input::BlockReply { session, reply });
                return;
            }
            Operation::Read { mut buffer } => {
                let sent = self.sent_as(lba.0, blocks);
                let bytes = usize::try_from(blocks).unwrap() * self.block_bytes;
                for (block, part) in
                    (lba.0..).zip(buffer.payload_mut()[..bytes].chunks_mut(self.block_bytes))
                {
                    part.fill(self.content.get(&block).copied().unwrap_or(0));
                }
                if status == Status::Ok {
                    let buffer = buffer.freeze().payload(bytes);
                    self.expected.insert(sent, (status, Some(buffer.bytes().to_vec())));
                    data = Some(buffer);
                } else {
                    self.expected.insert(sent, (status, None));
                }
            }
            Operation::Write { buffer, .. } => {
                let sent = self.sent_as(lba.0, blocks);
                let (from, expected) = self.writes.remove(&sent).unwrap();
                let bytes = usize::try_from(blocks).unwrap() * self.block_bytes;
                assert_eq!((from, expected.len()), (lba.0, bytes));
                assert!(buffer.payload()[..bytes] == expected[..], "the data is what was sent");
                if status == Status::Ok {
                    for (block, part) in (lba.0..).zip(expected.chunks(self.block_bytes)) {
                        self.content.insert(block, part[0]);
                    }
                }
                self.expected.insert(sent, (status, None));
            }
            Operation::Discard | Operation::WriteZeroes { .. } => {
                assert!(blocks <= u64::from(base::limits::RANGE_BLOCKS_MAX));
                let sent = self.sent_as(lba.0, blocks);
                if status == Status::Ok {
                    let gone: Vec<u64> =
                        self.content.range(lba.0..lba.0 + blocks).map(|(&at, _)| at).collect();
                    for block in gone {
                        self.content.remove(&block);
                    }
                }
                self.expected.insert(sent, (status, None));
            }
        }
        let reply = BlockReply { id, status, data };
        self.net.at_target(target::Input::BlockReply { session, reply });
    }

    fn collect(&mut self) {
        for event in self.net.target_events() {
            match event {
                target::Output::Block { session, volume, request } => {
                    assert_eq!(volume, VOLUME);
                    self.at_target.push(Pending { session, request });
                }
                other => panic!("unexpected {other:?}"),
            }
        }
        for event in self.net.initiator_events() {
            let Output::BlockReply(reply) = event else { panic!("unexpected {event:?}") };
            self.under_way.remove(&reply.id).expect("answered once");
            self.answered += 1;
            let Some((status, data)) = self.expected.remove(&reply.id) else {
                assert_eq!(reply.status, Status::Ok, "a flush");
                continue;
            };
            let write = data.is_none();
            // The status of a failed read and of a failed write differ on the wire.
            assert!(reply.status == status || (write && reply.status == Status::IoError));
            assert_eq!(reply.status == Status::Ok, status == Status::Ok);
            assert_eq!(reply.data.map(|data| data.bytes().to_vec()), data);
        }
    }
}

fn random_requests(
    seed: u64,
    block_size: BlockSize,
    digests: (bool, bool),
    slots: (usize, usize),
    count: u64,
) {
    println!("seed {seed} {block_size} digests {digests:?} slots {slots:?}");
    let mut run = Run::new(seed, block_size, digests, slots);
    while run.last < count || !run.under_way.is_empty() {
        match run.net.random.below(8) {
            0..2 if run.last < count => run.send(),
            2 => run.answer(),
            _ => {
                if !run.net.step() && run.at_target.is_empty() {
                    run.net.pass(Duration::from_millis(3));
                }
            }
        }
        run.collect();
    }
    assert_eq!(run.answered, count);
    assert!(run.expected.is_empty() && run.at_target.is_empty());
    run.net.finish();
}

#[test]
fn random_requests_against_a_model() {
    for seed in 0..3 {
        random_requests(seed, BlockSize::B512, (false, false), (256, 64), 400);
        random_requests(10 + seed, BlockSize::B4096, (true, true), (256, 64), 400);
        random_requests(20 + seed, BlockSize::B4096, (true, false), (8, 4), 200);
        random_requests(30 + seed, BlockSize::B512, (false, true), (256, 64), 200);
    }
}

#[test]
fn a_resized_volume_is_noticed() {
    let mut run = Run::new(1, BlockSize::B4096, (true, true), (64, 16));
    let larger = VolumeExport { blocks: 2 * BLOCKS, ..export(BlockSize::B4096) };
    run.net.at_target(target::Input::AddVolume(larger));
    run.net.settle();
    let events = run.net.initiator_events();
    assert!(
        matches!(&events[..], [Output::NamespaceChanged(now)] if now.blocks == 2 * BLOCKS),
        "{events:?}"
    );
    let access = target::Access::NonOptimized;
    run.net.at_target(target::Input::SetAccess { volume: VOLUME, access });
    let read_only = VolumeExport { read_only: true, ..larger };
    run.net.at_target(target::Input::AddVolume(read_only));
    run.net.settle();
    let events = run.net.initiator_events();
    assert!(matches!(&events[..], [Output::NamespaceChanged(now)] if now.read_only), "{events:?}");
    // Writes are refused before the head sees them.
    let buffer = run.pool.take(4096).unwrap();
    let operation = Operation::Write { buffer, fua: false };
    let request = BlockRequest { id: RequestId(1), lba: Lba(0), blocks: BlockCount(1), operation };
    run.net.at_initiator(Input::Block(request));
    run.net.settle();
    let events = run.net.initiator_events();
    assert!(
        matches!(&events[..], [Output::BlockReply(reply)] if reply.status == Status::ReadOnly),
        "{events:?}"
    );
    run.net.finish();
}

#[test]
fn another_block_size_ends_the_session() {
    let mut run = Run::new(4, BlockSize::B512, (false, false), (64, 16));
    run.net.at_target(target::Input::AddVolume(export(BlockSize::B4096)));
    run.net.settle();
    assert!(!run.net.initiator.is_up());
    run.net.initiator_events();
    run.net.pass(Duration::from_secs(1));
    assert!(run.net.initiator.is_up());
    // A request in the old blocks, whose buffer is too short in the new ones.
    let buffer = run.pool.take(4096).unwrap();
    let operation = Operation::Write { buffer, fua: false };
    let (id, lba, blocks) = (RequestId(1), Lba(0), BlockCount(8));
    run.net.initiator_events();
    run.net.at_initiator(Input::Block(BlockRequest { id, lba, blocks, operation }));
    let events = run.net.initiator_events();
    assert!(
        matches!(&events[..], [Output::BlockReply(reply)] if reply.status == Status::InvalidRange),
        "{events:?}"
    );
    run.net.finish();
}

#[test]
fn a_removed_volume_is_gone_and_an_unknown_one_is_refused() {
    let mut run = Run::new(2, BlockSize::B4096, (false, false), (64, 16));
    run.net.at_target(target::Input::RemoveVolume(VOLUME));
    run.net.settle();
    assert!(!run.net.initiator.is_up());
    assert_eq!(run.net.target.sessions(), 0);
    run.net.initiator_events();
    run.net.pass(Duration::from_secs(1));
    let events = run.net.initiator_events();
    assert!(
        matches!(
            &events[..],
            [Output::Down { reason: nvme::initiator::DownReason::Refused(0x182) }, ..]
        ),
        "{events:?}"
    );
    run.net.finish();
}

#[test]
fn ranges_outside_the_volume_are_refused() {
    let mut run = Run::new(3, BlockSize::B512, (false, false), (64, 16));
    for (number, operation) in [
        Operation::Discard,
        Operation::WriteZeroes { fua: false },
        Operation::Read { buffer: run.pool.take(512 * 9).unwrap() },
        Operation::Write { buffer: run.pool.take(512 * 9).unwrap(), fua: true },
    ]
    .into_iter()
    .enumerate()
    {
        let id = RequestId(number as u64);
        let lba = Lba(BLOCKS - 8);
        let request = BlockRequest { id, lba, blocks: BlockCount(9), operation };
        run.net.at_initiator(Input::Block(request));
        run.net.settle();
        let events = run.net.initiator_events();
        assert!(
            matches!(
                &events[..],
                [Output::BlockReply(reply)] if reply.status == Status::InvalidRange
            ),
            "{events:?}"
        );
        assert!(run.net.target_events().is_empty());
    }
    run.net.finish();
}

/// Whatever arrives on either side: no panic, every request is answered once, all buffers return.
#[test]
fn noise_never_panics() {
    for seed in 0..20 {
        println!("seed {seed}");
        let mut net = Net::with(
            seed,
            Subsystem::Volume(VOLUME),
            |_| {},
            |initiator| initiator.queue_entries = 17,
            (64, 16),
        );
        net.at_target(target::Input::AddVolume(export(BlockSize::B4096)));
        net.noise = Some(500 + 600 * seed);
        let pool = BufferPool::heap(256, 64);
        let (mut sent, mut answered) = (0, 0);
        let mut pending = Vec::new();
        for _ in 0..3000 {
            match net.random.below(8) {
                0 => {
                    let blocks = 1 + u32::try_from(net.random.below(32)).unwrap();
                    let Some(buffer) = pool.take(blocks as usize * 4096) else { continue };
                    let operation = match net.random.below(4) {
                        0 => Operation::Read { buffer },
                        1 => Operation::Discard,
                        _ => Operation::Write { buffer, fua: false },
                    };
                    sent += 1;
                    let (id, lba) = (RequestId(sent), Lba(net.random.below(1000)));
                    let blocks = BlockCount(blocks);
                    net.at_initiator(Input::Block(BlockRequest { id, lba, blocks, operation }));
                }
                1 => {
                    let Some(Pending { session, request }) = pending.pop() else { continue };
                    let data = match request.operation {
                        Operation::Read { buffer } => {
                            let bytes = request.blocks.0 as usize * 4096;
                            Some(buffer.freeze().payload(bytes))
                        }
                        _ => None,
                    };
                    let reply = BlockReply { id: request.id, status: Status::Ok, data };
                    net.at_target(target::Input::BlockReply { session, reply });
                }
                _ => {
                    if !net.step() {
                        net.pass(Duration::from_millis(20));
                    }
                }
            }
            for event in net.target_events() {
                match event {
                    target::Output::Block { session, request, .. } => {
                        pending.push(Pending { session, request });
                    }
                    target::Output::Replica { .. } => panic!("a volume has no replica commands"),
                    _ => {}
                }
            }
            answered += count_replies(&net.initiator_events());
        }
        net.noise = None;
        net.at_initiator(Input::Stop);
        answered += count_replies(&net.initiator_events());
        assert_eq!(answered, sent);
        pending.clear();
        net.finish();
        assert_eq!(pool.available(), (256, 64));
    }
}

fn count_replies(events: &[Output]) -> u64 {
    events.iter().filter(|event| matches!(event, Output::BlockReply(_))).count() as u64
}
