//! A bench for chosen situations, one at a time, without delays: members answer at once unless they
//! are held.

use std::collections::VecDeque;

use base::{
    BlockCount, BlockReply, BlockRequest, BlockSize, BufferPool, CommandBody, Durability, Epoch,
    Instant, Lba, Member, Operation, Policy, PoolId, ReplicaCommand, ReplicaError, ReplyBody,
    RequestId, Role, ServerId, ShardIndex, ShardRecord, Status, VolumeId, VolumeRecord,
};
use core::time::Duration;

use super::model::{BLOCK_BYTES, Effect, Model, Truth, fill, values_of};
use crate::{Head, HeadConfig, HeadPhase, Input, MemberMode, MembershipError, Output, Tunables};

pub(super) fn server(index: usize) -> ServerId {
    ServerId::from_bytes([u8::try_from(index + 1).unwrap(); 16])
}

pub(super) fn config(members: usize, epoch: u64, buffers: &BufferPool) -> HeadConfig {
    let id = VolumeId::from_bytes([5; 16]);
    let member = |index| Member {
        server: server(index),
        pool: PoolId::from_bytes([1; 16]),
        role: Role::InSync,
    };
    HeadConfig {
        volume: VolumeRecord {
            id,
            name: "v".into(),
            size_bytes: BLOCKS * BLOCK_BYTES as u64,
            block_size: BlockSize::B512,
            policy: Policy {
                replicas: u8::try_from(members).unwrap(),
                durability: Durability::Flush,
                stall_deadline_ms: None,
                read_only: false,
            },
            epoch: Epoch(epoch),
            holder: None,
        },
        shard: ShardRecord {
            volume: id,
            shard: ShardIndex(0),
            members: (0..members).map(member).collect(),
            failover: Vec::new(),
            preferred_failover: Vec::new(),
            moves: Vec::new(),
        },
        epoch: Epoch(epoch),
        local: Some(server(0)),
        buffers: buffers.clone(),
        tunables: Tunables::default(),
    }
}

/// Blocks of the volume.
pub(super) const BLOCKS: u64 = 2048;
/// Blocks that fillings copy: those that tests use.
const FILL_BLOCKS: usize = 64;

pub(super) type Sent = (u64, ReplicaCommand);

/// A head, its members, and what they have to say to each other.
pub(super) struct Bench {
    pub(super) now: Instant,
    pub(super) buffers: BufferPool,
    pub(super) head: Head,
    pub(super) number: usize,
    /// What the cluster store says of the members.
    pub(super) shard: ShardRecord,
    pub(super) models: Vec<Model>,
    pub(super) truth: Truth,
    /// Commands not delivered yet.
    pub(super) wires: Vec<VecDeque<Sent>>,
    /// Members whose commands are not delivered for now.
    pub(super) held: Vec<bool>,
    /// Members do not answer flushes for now.
    pub(super) flushes_hang: bool,
    /// Records beyond its commit seq that a member's log has room for.
    pub(super) room: Vec<usize>,
    /// What members answer to scans instead of records.
    pub(super) failing_scans: Option<ReplicaError>,
    pub(super) replies: Vec<BlockReply>,
    pub(super) returned: Vec<BlockRequest>,
    /// Everything else that came out.
    pub(super) news: Vec<Output>,
    pub(super) next_id: u64,
}

impl Bench {
    pub(super) fn new(members: usize) -> Self {
        Self::with(members, |_| {})
    }

    pub(super) fn with(members: usize, change: impl Fn(&mut HeadConfig)) -> Self {
        let buffers = BufferPool::heap(2200, 64);
        let mut config = config(members, 1, &buffers);
        change(&mut config);
        Self {
            now: Instant::ZERO,
            shard: config.shard.clone(),
            head: Head::new(config, Instant::ZERO).unwrap(),
            buffers,
            number: 1,
            models: (0..members).map(|_| Model::sized(BLOCKS)).collect(),
            truth: Truth::default(),
            wires: (0..members).map(|_| VecDeque::new()).collect(),
            held: vec![false; members],
            flushes_hang: false,
            room: vec![usize::MAX; members],
            failing_scans: None,
            replies: Vec::new(),
            returned: Vec::new(),
            news: Vec::new(),
            next_id: 0,
        }
    }

    /// With servers that keep no replica yet, and little that is kept in memory.
    pub(super) fn with_spares(members: usize, spares: usize) -> Self {
        let mut bench = Self::with(members, |config| {
            config.tunables.backlog_records_max = 8;
            config.tunables.log_copy_records = 16;
        });
        for _ in 0..spares {
            bench.models.push(Model::sized(BLOCKS));
            bench.wires.push(VecDeque::new());
            bench.held.push(false);
            bench.room.push(usize::MAX);
        }
        bench.up(0..members);
        assert_eq!(bench.head.status().phase, HeadPhase::Serving);
        bench
    }

    /// The shard's record with these roles; members that are not named are not in it.
    pub(super) fn record(&self, roles: &[(usize, Role)]) -> ShardRecord {
        let pool = PoolId::from_bytes([1; 16]);
        let member =
            |(index, role): &(usize, Role)| Member { server: server(*index), pool, role: *role };
        ShardRecord { members: roles.iter().map(member).collect(), ..self.shard.clone() }
    }

    /// Asks the head to agree to a change.
    pub(super) fn change(&mut self, roles: &[(usize, Role)]) -> Result<(), MembershipError> {
        let shard = self.record(roles);
        let agreed = self.head.change_members(self.now, &shard);
        self.take();
        agreed
    }

    /// Has the head agree to a change, as soon as everything settled is on media where it must be.
    pub(super) fn agree(&mut self, roles: &[(usize, Role)]) {
        if let Err(error) = self.change(roles) {
            assert_eq!(error, MembershipError::NotSettled);
            self.settle();
            assert_eq!(self.change(roles), Ok(()));
        }
    }

    /// The cluster store's record is changed, and the head told.
    pub(super) fn changed(&mut self, roles: &[(usize, Role)]) {
        self.shard = self.record(roles);
        let shard = self.shard.clone();
        self.head.members_changed(self.now, &shard);
        self.take();
        self.settle();
    }

    pub(super) fn write_ok(&mut self, lba: u64, value: u64) {
        let write = self.write(lba, value);
        assert_eq!(self.status(write), Some(Status::Ok));
    }

    pub(super) fn member(&self, index: usize) -> crate::MemberStatus {
        let members = self.head.status().members;
        members.into_iter().find(|member| member.server == server(index)).expect("a member")
    }

    pub(super) fn opened(members: usize) -> Self {
        let mut bench = Self::new(members);
        bench.up(0..members);
        assert_eq!(bench.head.status().phase, HeadPhase::Serving);
        bench
    }

    pub(super) fn take(&mut self) {
        while let Some(output) = self.head.poll_output() {
            match output {
                Output::Command { server, tag, command } => {
                    let index = usize::from(server.bytes()[0]) - 1;
                    self.wires[index].push_back((tag, command));
                }
                Output::Reply(reply) => self.replies.push(reply),
                Output::Returned(request) => self.returned.push(request),
                other => self.news.push(other),
            }
        }
        self.head.check_invariants();
    }

    pub(super) fn input(&mut self, input: Input) {
        self.head.handle(self.now, input);
        self.take();
    }

    pub(super) fn answer(
        &mut self,
        index: usize,
        tag: u64,
        result: Result<ReplyBody, ReplicaError>,
    ) {
        self.input(Input::Reply { server: server(index), tag, result });
    }

    /// The next command for a member that it can carry out now: what waits for room or hangs does not
    /// keep it from the others.
    fn next_command(&self, index: usize) -> Option<usize> {
        let model = &self.models[index];
        let committed = usize::try_from(model.commit.0).unwrap();
        let full = model.log.len().saturating_sub(committed) >= self.room[index];
        let can = |(_, command): &Sent| match command.body {
            CommandBody::Append { .. } => !full,
            CommandBody::Flush => !self.flushes_hang,
            _ => true,
        };
        if self.held[index] { None } else { self.wires[index].iter().position(can) }
    }

    /// Delivers one command to a member and its answer to the head.
    pub(super) fn deliver(&mut self, index: usize) {
        self.deliver_at(index, 0);
    }

    fn deliver_at(&mut self, index: usize, place: usize) {
        let (tag, command) = self.wires[index].remove(place).unwrap();
        let ReplicaCommand { epoch, commit, body, .. } = command;
        if matches!(body, CommandBody::Seal) {
            self.drop_waiting(index, place, epoch);
        }
        if let (CommandBody::Scan { .. }, Some(error)) = (&body, self.failing_scans) {
            return self.answer(index, tag, Err(error));
        }
        let model = &mut self.models[index];
        let result = match model.command(&mut self.truth, self.number, epoch, commit, body) {
            Effect::Answer(result) => result,
            Effect::Append { seq, media } => {
                model.written = seq;
                model.durable = if media { seq } else { model.durable };
                Ok(ReplyBody::Appended { durable: model.durable })
            }
            Effect::Flush { seq } => {
                (model.written, model.durable) = (seq, seq);
                Ok(ReplyBody::Flushed { durable: seq })
            }
            Effect::Fill { progress, .. } => {
                self.fill_step(index);
                Ok(ReplyBody::Filling(progress))
            }
        };
        self.answer(index, tag, result);
    }

    /// A Seal has come: what was sent before it and waits for room is not carried out any more.
    fn drop_waiting(&mut self, index: usize, before: usize, sealed: Epoch) {
        let wire = &mut self.wires[index];
        let later = wire.split_off(before);
        let is_append = |(_, command): &Sent| matches!(command.body, CommandBody::Append { .. });
        let (dropped, mut kept): (VecDeque<_>, VecDeque<_>) = wire.drain(..).partition(is_append);
        kept.extend(later);
        *wire = kept;
        for (tag, _) in dropped {
            self.answer(index, tag, Err(ReplicaError::Superseded { sealed }));
        }
    }

    /// One step of a filling for each time that the head asks.
    fn fill_step(&mut self, index: usize) {
        let Some(fill) = self.models[index].fill.as_ref() else { return };
        let source = usize::from(fill.source.bytes()[0]) - 1;
        let mut target = core::mem::take(&mut self.models[index]);
        target.fill_step(&self.models[source], !self.held[source], FILL_BLOCKS);
        self.models[index] = target;
    }

    /// Delivers what there is, until nothing moves.
    pub(super) fn settle(&mut self) {
        let ready = |bench: &Self| {
            (0..bench.models.len()).find_map(|index| Some((index, bench.next_command(index)?)))
        };
        while let Some((index, place)) = ready(self) {
            self.deliver_at(index, place);
        }
    }

    pub(super) fn up(&mut self, members: impl IntoIterator<Item = usize>) {
        for index in members {
            self.input(Input::MemberUp { server: server(index) });
        }
        self.settle();
    }

    pub(super) fn down(&mut self, index: usize) {
        self.wires[index].clear();
        self.models[index].session_lost();
        self.input(Input::MemberDown { server: server(index) });
    }

    /// Lets time pass, tick by tick.
    pub(super) fn pass(&mut self, millis: u64) {
        let end = self.now + Duration::from_millis(millis);
        while let Some(deadline) = self.head.next_deadline().filter(|at| *at <= end) {
            self.now = self.now.max(deadline);
            self.input(Input::Tick);
            self.settle();
        }
        self.now = end;
        self.input(Input::Tick);
        self.settle();
    }

    pub(super) fn ask(&mut self, lba: u64, blocks: u32, operation: Operation) -> u64 {
        self.next_id += 1;
        let id = RequestId(self.next_id);
        let blocks = BlockCount(blocks);
        self.input(Input::Request(BlockRequest { id, lba: Lba(lba), blocks, operation }));
        self.settle();
        self.next_id
    }

    pub(super) fn write(&mut self, lba: u64, value: u64) -> u64 {
        let mut buffer = self.buffers.take(BLOCK_BYTES).unwrap();
        fill(&mut buffer.payload_mut()[..BLOCK_BYTES], value);
        self.ask(lba, 1, Operation::Write { buffer, fua: false })
    }

    pub(super) fn read(&mut self, lba: u64) -> u64 {
        let buffer = self.buffers.take(BLOCK_BYTES).unwrap();
        self.ask(lba, 1, Operation::Read { buffer })
    }

    pub(super) fn reply(&mut self, id: u64) -> Option<BlockReply> {
        let place = self.replies.iter().position(|reply| reply.id == RequestId(id))?;
        Some(self.replies.remove(place))
    }

    pub(super) fn status(&mut self, id: u64) -> Option<Status> {
        Some(self.reply(id)?.status)
    }

    pub(super) fn value(&mut self, id: u64) -> Option<u64> {
        Some(values_of(self.reply(id)?.data?.bytes())[0])
    }

    pub(super) fn mode(&self, index: usize) -> MemberMode {
        self.member(index).mode
    }

    /// The next head takes over with epoch + 1; members are not up yet.
    pub(super) fn next_head(&mut self) {
        self.number += 1;
        let mut config = config(self.models.len(), self.number as u64, &self.buffers);
        config.shard = self.shard.clone();
        self.head = Head::new(config, self.now).unwrap();
        for wire in &mut self.wires {
            wire.clear();
        }
        for model in &mut self.models {
            model.session_lost();
        }
    }
}
