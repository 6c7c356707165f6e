//! A replica in memory that holds the head to the contract of [`base::replica`]: it panics where a real
//! one could only refuse, because no head may ever ask for it.

use std::collections::{BTreeMap, BTreeSet};

use base::{
    BlockSize, Buffer, BufferMut, CommandBody, Epoch, FillProgress, Position, Record, RecordHeader,
    RecordKind, ReplicaError, ReplicaState, ReplyBody, Seq,
};

use super::fill::Fill;

pub(super) const BLOCK_SIZE: BlockSize = BlockSize::B512;
pub(super) const BLOCK_BYTES: usize = 512;

/// A record as the model keeps it: the value of each block is `value`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) header: RecordHeader,
    pub(super) value: u64,
}

impl Entry {
    pub(super) fn of(record: &Record) -> Self {
        let header = *record.header();
        let value = match header.kind {
            RecordKind::Write => value_of(record.payload().bytes()),
            RecordKind::Discard | RecordKind::WriteZeroes | RecordKind::EpochStart => 0,
        };
        Self { header, value }
    }

    fn record(&self, mut buffer: BufferMut) -> Record {
        let bytes = self.header.payload_bytes();
        fill(&mut buffer.payload_mut()[..bytes], self.value);
        Record::encode(self.header, buffer)
    }
}

/// The value that every block of `bytes` holds.
pub(super) fn value_of(bytes: &[u8]) -> u64 {
    let value = |block: &[u8]| u64::from_le_bytes(block[..8].try_into().unwrap());
    let first = value(bytes);
    assert!(bytes.chunks_exact(BLOCK_BYTES).all(|block| value(block) == first), "one write");
    first
}

pub(super) fn values_of(bytes: &[u8]) -> Vec<u64> {
    let value = |block: &[u8]| u64::from_le_bytes(block[..8].try_into().unwrap());
    bytes.chunks_exact(BLOCK_BYTES).map(value).collect()
}

pub(super) fn fill(bytes: &mut [u8], value: u64) {
    for block in bytes.chunks_exact_mut(BLOCK_BYTES) {
        block[..8].copy_from_slice(&value.to_le_bytes());
    }
}

/// What all members of a world must agree on.
#[derive(Debug, Default)]
pub(super) struct Truth {
    /// Every record ever written: a position names one record.
    pub(super) records: BTreeMap<Position, Entry>,
    /// Every record that a member was told is settled.
    pub(super) settled: BTreeMap<Seq, Entry>,
}

/// The model replica.
#[derive(Debug, Default)]
pub(super) struct Model {
    /// Record `n` is at index `n - 1`.
    pub(super) log: Vec<Entry>,
    pub(super) sealed: Epoch,
    /// Which head sealed it.
    pub(super) sealed_by: Option<usize>,
    /// Survives a crash of the process.
    pub(super) written: Seq,
    /// Survives a loss of power.
    pub(super) durable: Seq,
    pub(super) commit: Seq,
    pub(super) trimmed: Seq,
    /// Changes when what is under way no longer counts.
    pub(super) life: u64,
    /// Records that cannot be read any more.
    pub(super) damaged: BTreeSet<Seq>,
    /// Records that it once said it could not read.
    pub(super) doubtful: BTreeSet<Seq>,
    /// An append of this session failed: what follows does not fit.
    pub(super) broken: bool,
    /// Durable records were lost.
    pub(super) lost: bool,
    /// Half filled with chunks.
    pub(super) filling: bool,
    /// Blocks as a filling copied them: they may be newer than the log says.
    pub(super) copied: BTreeMap<usize, (Position, u64)>,
    /// What fills it just now.
    pub(super) fill: Option<Fill>,
    /// It was deleted, or is not made yet.
    pub(super) absent: bool,
    /// Its size.
    pub(super) blocks: u64,
}

/// What to do with a command.
#[derive(Debug)]
pub(super) enum Effect {
    /// Answer.
    Answer(Result<ReplyBody, ReplicaError>),
    /// Answer once record `seq` is written, or on media.
    Append { seq: Seq, media: bool },
    /// Answer once everything through `seq` is on media.
    Flush { seq: Seq },
    /// Answer how far it is; it goes on, or begins, with what [`Model::fill_step`] does.
    Fill { progress: FillProgress, begun: bool },
}

fn refuse(error: ReplicaError) -> Effect {
    Effect::Answer(Err(error))
}

fn seq_of(length: usize) -> Seq {
    Seq(length as u64)
}

impl Model {
    pub(super) fn sized(blocks: u64) -> Self {
        Self { blocks, ..Self::default() }
    }

    pub(super) fn last(&self) -> Position {
        self.log.last().map_or(Position::ZERO, |entry| entry.header.position)
    }

    pub(super) fn entry(&self, seq: Seq) -> Option<&Entry> {
        self.log.get(usize::try_from(seq.0.checked_sub(1)?).unwrap())
    }

    pub(super) fn state(&self) -> ReplicaState {
        ReplicaState {
            sealed: self.sealed,
            last: self.last(),
            durable: self.durable,
            commit: self.commit,
            trimmed: self.trimmed,
            filling: self.filling,
            damaged: self.lost,
            blocks: self.blocks,
        }
    }

    /// The session or the process is gone.
    pub(super) fn session_lost(&mut self) {
        self.broken = false;
    }

    /// The process dies; of what survives, `keep` (at least `floor`) does.
    pub(super) fn crash(&mut self, keep: Seq) {
        self.life += 1;
        self.broken = false;
        self.fill = None;
        self.log.truncate(usize::try_from(keep.0).unwrap());
        let last = seq_of(self.log.len());
        self.written = last;
        self.durable = self.durable.min(last);
        self.commit = self.commit.min(last);
        assert!(self.trimmed <= last, "what is home was on media");
    }

    /// Carries out a command of `head` at `epoch`.
    pub(super) fn command(
        &mut self,
        truth: &mut Truth,
        head: usize,
        epoch: Epoch,
        commit: Seq,
        body: CommandBody,
    ) -> Effect {
        if self.absent {
            return refuse(ReplicaError::NoReplica);
        }
        let other = self.sealed_by.is_some_and(|sealer| sealer != head);
        if epoch < self.sealed || (epoch == self.sealed && other) {
            return refuse(ReplicaError::Superseded { sealed: self.sealed });
        }
        if let CommandBody::Seal = body {
            assert!(commit <= self.last().seq);
            self.sealed = epoch;
            self.sealed_by = Some(head);
            self.written = self.last().seq;
            self.broken = false;
            self.fill = None;
            return Effect::Answer(Ok(ReplyBody::Sealed(self.state())));
        }
        if epoch != self.sealed || self.sealed_by.is_none() {
            return refuse(ReplicaError::NotSealed);
        }
        if let CommandBody::Install { source, chunks, .. } = body {
            assert_eq!(commit, Seq::ZERO, "nothing is known of a member that is filled");
            return self.install(source, chunks);
        }
        let harmless = matches!(
            body,
            CommandBody::Renew
                | CommandBody::Hello { .. }
                | CommandBody::HealthOf { .. }
                | CommandBody::Release
                | CommandBody::Grow { .. }
        );
        let free = !self.filling && self.fill.is_none() && !self.lost;
        assert!(free || harmless, "{}: it is filled, or must be", body.name());
        self.learn_commit(truth, commit);
        match body {
            CommandBody::Seal | CommandBody::Install { .. } => unreachable!(),
            CommandBody::Append { record, media } => self.append(truth, &record, media),
            CommandBody::Read { lba, blocks, covers, buffer } => {
                let end = usize::try_from(lba.0 + u64::from(blocks.0)).unwrap();
                let start = usize::try_from(lba.0).unwrap();
                self.read(start..end, covers, buffer)
            }
            CommandBody::Flush => Effect::Flush { seq: self.last().seq },
            CommandBody::Scan { seq, buffer } => self.scan(seq, buffer),
            CommandBody::Truncate { keep } => self.truncate(truth, keep),
            CommandBody::Grow { blocks } => {
                self.blocks = self.blocks.max(blocks);
                Effect::Answer(Ok(ReplyBody::Done))
            }
            CommandBody::Trim
            | CommandBody::Release
            | CommandBody::Renew
            | CommandBody::Hello { .. } => Effect::Answer(Ok(ReplyBody::Done)),
            CommandBody::HealthOf { .. }
            | CommandBody::List { .. }
            | CommandBody::Fetch { .. }
            | CommandBody::ScanRun { .. } => Effect::Answer(Err(ReplicaError::Invalid)),
        }
    }

    pub(super) fn learn_commit(&mut self, truth: &mut Truth, commit: Seq) {
        assert!(commit <= self.written, "a member is told only of what it acknowledged");
        while self.commit < commit {
            let seq = self.commit.next();
            let entry = *self.entry(seq).unwrap();
            let settled = truth.settled.entry(seq).or_insert(entry);
            assert_eq!(*settled, entry, "settled records are the same everywhere");
            self.commit = seq;
        }
    }

    fn append(&mut self, truth: &mut Truth, record: &Record, media: bool) -> Effect {
        let entry = Entry::of(record);
        let last = self.last();
        let header = &entry.header;
        if self.broken {
            return refuse(ReplicaError::OutOfOrder { last });
        }
        assert!(header.lba.0 + u64::from(header.blocks.0) <= self.blocks, "it was told first");
        assert_eq!(header.position.seq, last.seq.next(), "appends have no gap");
        assert_eq!(header.previous_epoch, last.epoch, "appends extend the log they match");
        let known = truth.records.entry(header.position).or_insert(entry);
        assert_eq!(*known, entry, "a position names one record");
        self.log.push(entry);
        Effect::Append { seq: header.position.seq, media }
    }

    fn read(&self, blocks: core::ops::Range<usize>, covers: Seq, mut buffer: BufferMut) -> Effect {
        if self.broken && blocks.end as u64 > self.blocks {
            return refuse(ReplicaError::Invalid);
        }
        assert!(blocks.end as u64 <= self.blocks, "it was told first");
        assert!(covers <= self.last().seq, "a head reads only where it knows the data to be");
        let bytes = blocks.len() * BLOCK_BYTES;
        buffer.payload_mut()[..bytes].fill(0);
        for (place, lba) in blocks.enumerate() {
            let Ok((_, value)) = self.block(lba, self.log.len()) else {
                return refuse(ReplicaError::Damaged);
            };
            let at = place * BLOCK_BYTES;
            fill(&mut buffer.payload_mut()[at..at + BLOCK_BYTES], value);
        }
        let data: Buffer = buffer.freeze().payload(bytes);
        Effect::Answer(Ok(ReplyBody::Data(data)))
    }

    fn scan(&self, seq: Seq, buffer: BufferMut) -> Effect {
        if seq <= self.trimmed {
            return refuse(ReplicaError::Trimmed { trimmed: self.trimmed });
        }
        let entry = self.entry(seq).expect("a head scans only what it knows to be there");
        if self.damaged.contains(&seq) {
            return refuse(ReplicaError::Damaged);
        }
        Effect::Answer(Ok(ReplyBody::Record(entry.record(buffer))))
    }

    fn truncate(&mut self, truth: &Truth, keep: Seq) -> Effect {
        assert!(keep >= self.commit, "settled records are never truncated");
        assert!(keep < self.last().seq, "truncation drops something");
        let first =
            self.log.get(usize::try_from(keep.0).unwrap()).map(|entry| entry.header.position);
        let unreadable = first.is_some_and(|Position { seq, .. }| {
            self.damaged.contains(&seq) || self.doubtful.contains(&seq)
        });
        for entry in &self.log[usize::try_from(keep.0).unwrap()..] {
            let settled = truth.settled.get(&entry.header.position.seq);
            // What the member cannot read is of no use; it is brought it again.
            assert!(unreadable || settled != Some(entry), "what is settled is not truncated");
        }
        self.life += 1;
        self.log.truncate(usize::try_from(keep.0).unwrap());
        self.written = self.written.min(keep);
        self.durable = self.durable.min(keep);
        self.damaged.retain(|seq| *seq <= keep);
        self.doubtful.retain(|seq| *seq <= keep);
        Effect::Answer(Ok(ReplyBody::Truncated { last: self.last() }))
    }
}

pub(super) fn touches(header: &RecordHeader, lba: usize) -> bool {
    let lba = lba as u64;
    header.lba.0 <= lba && lba < header.lba.0 + u64::from(header.blocks.0)
}
