//! The end of the log, in memory: every record that is not at a quorum, and the acknowledged ones that
//! some member has not been sent yet, within the backlog limits.

use std::collections::VecDeque;

use base::limits::{PAYLOAD_BYTES_MAX, SMALL_PAYLOAD_BYTES};
use base::{Epoch, Instant, Position, Record, RequestId, Seq};

/// A record that members are being sent.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) record: Record,
    /// The unanswered request; `None` for EpochStart and once answered.
    pub(crate) request: Option<RequestId>,
    pub(crate) arrived: Instant,
    /// Counts at a member only when it is on media there.
    pub(crate) media: bool,
}

impl Entry {
    fn seq(&self) -> Seq {
        self.record.header().position.seq
    }
}

/// True if the record's buffer is a large slot; and the bytes it pins.
pub(crate) fn pinned(record: &Record) -> (bool, usize) {
    if record.payload().len() > SMALL_PAYLOAD_BYTES {
        (true, base::limits::HEADER_BYTES + PAYLOAD_BYTES_MAX)
    } else {
        (false, base::limits::HEADER_BYTES + SMALL_PAYLOAD_BYTES)
    }
}

/// The end of the log.
#[derive(Debug)]
pub(crate) struct Log {
    entries: VecDeque<Entry>,
    /// The seq of the first entry, or of the next record if there is none.
    base: Seq,
    /// The newest record.
    last: Position,
    /// Every record at or below this seq is at a write quorum.
    commit: Seq,
    /// Every record at or below this seq is settled: on media at a write quorum. Only this is told to
    /// members as commit: what was merely acknowledged can be lost with the power, and then a
    /// member must still be able to truncate it.
    pub(crate) durable: Seq,
    /// Bytes of records acknowledged since they were last asked to be put on media.
    pub(crate) unsettled_bytes: usize,
    /// The seq of this epoch's EpochStart.
    start: Option<Seq>,
    /// The position before it.
    tail: Position,
    /// Seqs above `commit` that count only on media.
    media: VecDeque<Seq>,
    /// Bytes pinned by entries at or below `commit`.
    backlog_bytes: usize,
}

impl Log {
    pub(crate) fn new(capacity: usize) -> Self {
        Self {
            entries: VecDeque::with_capacity(capacity),
            base: Seq(1),
            last: Position::ZERO,
            commit: Seq::ZERO,
            durable: Seq::ZERO,
            unsettled_bytes: 0,
            start: None,
            tail: Position::ZERO,
            media: VecDeque::with_capacity(capacity),
            backlog_bytes: 0,
        }
    }

    /// Begins anew after `tail`, the position that an opening chose, of which everything through
    /// `commit` is known to be settled.
    pub(crate) fn follow(&mut self, tail: Position, commit: Seq) {
        assert!(self.start.is_none() && self.entries.is_empty(), "before the EpochStart only");
        self.tail = tail;
        self.last = tail;
        self.base = tail.seq.next();
        self.commit = commit.min(tail.seq);
        self.durable = self.commit;
    }

    /// Of the log that an opening chose, everything through `seq` is settled.
    pub(crate) fn settle(&mut self, seq: Seq) {
        assert!(seq <= self.tail.seq, "before the EpochStart only");
        self.commit = self.commit.max(seq);
        self.durable = self.durable.max(seq);
    }

    pub(crate) fn push(&mut self, entry: Entry) {
        let header = entry.record.header();
        assert_eq!(header.position.seq, self.last.seq.next(), "records follow each other");
        assert_eq!(header.previous_epoch, self.last.epoch, "records know the one before");
        self.last = header.position;
        self.start.get_or_insert(header.position.seq);
        if entry.media {
            self.media.push_back(header.position.seq);
        }
        self.entries.push_back(entry);
    }

    pub(crate) fn last(&self) -> Position {
        self.last
    }

    pub(crate) fn base(&self) -> Seq {
        self.base
    }

    pub(crate) fn commit(&self) -> Seq {
        self.commit
    }

    pub(crate) fn start(&self) -> Option<Seq> {
        self.start
    }

    pub(crate) fn tail(&self) -> Position {
        self.tail
    }

    /// Records above `commit`.
    pub(crate) fn undecided(&self) -> usize {
        usize::try_from(self.last.seq.0 - self.commit.0.max(self.base.0 - 1))
            .expect("the entries are in memory")
    }

    pub(crate) fn entry(&self, seq: Seq) -> Option<&Entry> {
        let index = usize::try_from(seq.0.checked_sub(self.base.0)?).ok()?;
        self.entries.get(index)
    }

    pub(crate) fn entry_mut(&mut self, seq: Seq) -> Option<&mut Entry> {
        let index = usize::try_from(seq.0.checked_sub(self.base.0)?).ok()?;
        self.entries.get_mut(index)
    }

    /// The lowest undecided record that counts only on media.
    pub(crate) fn first_media(&self) -> Option<Seq> {
        self.media.front().copied()
    }

    /// Moves `commit` on by one record.
    pub(crate) fn commit_next(&mut self) -> Seq {
        let seq = self.commit.next().max(self.base);
        let entry = self.entry(seq).expect("commit moves over records in memory only");
        let bytes = pinned(&entry.record).1;
        self.backlog_bytes += bytes;
        self.unsettled_bytes += bytes;
        self.commit = seq;
        while self.media.front().is_some_and(|first| *first <= seq) {
            self.media.pop_front();
        }
        seq
    }

    /// Acknowledged entries and the bytes they pin.
    pub(crate) fn backlog(&self) -> (usize, usize) {
        let records = (self.commit.0 + 1).saturating_sub(self.base.0);
        (usize::try_from(records).expect("the entries are in memory"), self.backlog_bytes)
    }

    /// Forgets the first entry, which is acknowledged.
    pub(crate) fn forget_first(&mut self) {
        let entry = self.entries.pop_front().expect("a backlog has entries");
        assert!(entry.seq() <= self.commit, "only acknowledged records are forgotten");
        assert!(entry.request.is_none(), "an acknowledged record was answered");
        self.backlog_bytes -= pinned(&entry.record).1;
        self.base = self.base.next();
    }

    /// The epoch of record `seq`, if that follows from what is in memory.
    pub(crate) fn epoch_at(&self, seq: Seq) -> Option<Epoch> {
        if seq == Seq::ZERO {
            Some(Epoch::NONE)
        } else if seq == self.tail.seq {
            Some(self.tail.epoch)
        } else if self.start.is_some_and(|start| seq >= start) && seq <= self.last.seq {
            Some(self.last.epoch)
        } else {
            None
        }
    }

    /// Takes all entries, at the end of a head.
    pub(crate) fn drain(&mut self) -> impl Iterator<Item = Entry> + '_ {
        self.media.clear();
        self.backlog_bytes = 0;
        self.base = self.last.seq.next();
        self.entries.drain(..)
    }

    pub(crate) fn check(&self) {
        assert!(self.commit <= self.last.seq);
        assert_eq!(self.base.0 + self.entries.len() as u64, self.last.seq.0 + 1);
        for (offset, entry) in self.entries.iter().enumerate() {
            assert_eq!(entry.seq().0, self.base.0 + offset as u64);
            assert!(entry.seq() > self.commit || entry.request.is_none());
        }
    }
}
