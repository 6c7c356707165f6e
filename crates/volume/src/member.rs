//! What a head knows of one member.

use core::time::Duration;

use base::limits::MEMBER_COMMANDS_MAX;
use base::{Epoch, Instant, Position, ReplicaError, ReplicaState, Role, Seq, ServerId};

use crate::catchup::CatchUp;
use crate::fill::Filling;
use crate::grants::Grant;
use crate::health::MemberHealth;
use crate::log::pinned;
use crate::matching::Matching;
use crate::size::MemberSize;
use crate::slow::Speed;
use crate::status::MemberMode;

const WORDS: usize = MEMBER_COMMANDS_MAX / 64;
/// For so long a member that is to be sealed anew may take to answer what it was sent before.
const PATIENCE: Duration = Duration::from_millis(100);

/// One bit for each of the last [`MEMBER_COMMANDS_MAX`] seqs.
#[derive(Clone, Debug, Default)]
struct SeqBits([u64; WORDS]);

impl SeqBits {
    fn place(seq: Seq) -> (usize, u64) {
        let bit = usize::try_from(seq.0 % MEMBER_COMMANDS_MAX as u64).expect("below the limit");
        (bit / 64, 1 << (bit % 64))
    }

    fn contains(&self, seq: Seq) -> bool {
        let (word, bit) = Self::place(seq);
        self.0[word] & bit != 0
    }

    fn put(&mut self, seq: Seq, value: bool) {
        let (word, bit) = Self::place(seq);
        if value {
            self.0[word] |= bit;
        } else {
            self.0[word] &= !bit;
        }
    }
}

/// What a head is doing with a member.
#[derive(Debug)]
pub(crate) enum Mode {
    /// No session.
    Down,
    /// Commands of a life that ended are under way, or it is too early to try again; then Seal.
    Resting { error: Option<ReplicaError>, until: Instant },
    /// Seal is under way.
    Sealing,
    /// Sealed; the opening has not chosen a tail yet.
    Sealed(ReplicaState),
    /// Looking for the last record it shares with the head's log.
    Matching(Matching),
    /// Truncate is under way.
    Truncating { keep: Seq, durable: Seq },
    /// Its log is a prefix of the head's, short of what is in memory.
    CatchingUp(Box<CatchUp>),
    /// Its log is a prefix of the head's, the rest is in memory.
    Live,
    /// Another member fills it.
    Filling(Filling),
    /// Cannot be used, until the given time.
    Parked { why: MemberMode, until: Option<Instant> },
}

/// Whether a member was told that the head is about to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Farewell {
    None,
    /// By the Release of this number.
    Said(u64),
    Answered,
}

/// A member and the appends under way to it.
#[derive(Debug)]
pub(crate) struct Member {
    pub(crate) server: ServerId,
    pub(crate) role: Role,
    pub(crate) connected: bool,
    pub(crate) session: u64,
    pub(crate) mode: Mode,
    pub(crate) since: Instant,
    /// Commands of this session that are not answered.
    pub(crate) outstanding: usize,
    /// Those of them that outlive a Seal.
    pub(crate) outliving: usize,
    /// It holds this record and every one before, all as in the head's log. Valid while `follows`.
    pub(crate) acked: Seq,
    /// It may hold records of the head's log through here, by what it said or was sent.
    pub(crate) reach: Seq,
    /// No record of its log has a greater position: what it said or was sent in this head's life.
    pub(crate) end: Position,
    /// Where its log ended when it began to follow. Valid while `follows`.
    pub(crate) joined: Position,
    /// What it holds is known: it has answered this head, and nobody else writes to its log.
    pub(crate) heard: bool,
    /// It was truncated at a record that it could not read, which may have been the head's.
    pub(crate) doubted: bool,
    /// Of what it acknowledged, what is on its media.
    durable: Seq,
    /// The next record to send it.
    pub(crate) next_send: Seq,
    /// The epoch of the record before.
    pub(crate) sent_epoch: Epoch,
    answered: SeqBits,
    large: SeqBits,
    pub(crate) in_flight_bytes: usize,
    pub(crate) told_commit: Seq,
    /// When a command last went out.
    pub(crate) told_at: Instant,
    /// A Flush is under way and will put everything through here on media.
    pub(crate) flushing: Option<Seq>,
    pub(crate) trimmed: Seq,
    pub(crate) backoff: Duration,
    /// What was sent last is no Release: it grants, or may have granted, what has to be given back
    /// before another head opens without waiting.
    pub(crate) granting: bool,
    pub(crate) farewell: Farewell,
    pub(crate) health: MemberHealth,
    /// It said that it lost durable records.
    pub(crate) damaged: bool,
    /// It is not filled before: a filling ended just now.
    pub(crate) fill_after: Instant,
    /// In this session nobody could bring it the log's tail but the head.
    pub(crate) fills_refused: bool,
    pub(crate) size: MemberSize,
    pub(crate) grant: Grant,
    pub(crate) speed: Speed,
}

impl Member {
    pub(crate) fn new(server: ServerId, role: Role, now: Instant, backoff: Duration) -> Self {
        Self {
            server,
            role,
            connected: false,
            session: 0,
            mode: Mode::Down,
            since: now,
            outstanding: 0,
            outliving: 0,
            acked: Seq::ZERO,
            reach: Seq::ZERO,
            end: Position::ZERO,
            joined: Position::ZERO,
            heard: false,
            doubted: false,
            durable: Seq::ZERO,
            next_send: Seq(1),
            sent_epoch: Epoch::NONE,
            answered: SeqBits::default(),
            large: SeqBits::default(),
            in_flight_bytes: 0,
            told_commit: Seq::ZERO,
            told_at: now,
            flushing: None,
            trimmed: Seq::ZERO,
            backoff,
            granting: false,
            farewell: Farewell::None,
            health: MemberHealth::new(now),
            damaged: false,
            fill_after: now,
            fills_refused: false,
            size: MemberSize::default(),
            grant: Grant::new(),
            speed: Speed::default(),
        }
    }

    pub(crate) fn in_sync(&self) -> bool {
        self.role == Role::InSync
    }

    /// A Release is answered; those of a head that only rests mean nothing here.
    pub(crate) fn release_answered(&mut self, number: u64) {
        if self.farewell == Farewell::Said(number) {
            self.farewell = Farewell::Answered;
        }
    }

    /// True while its log is known to be a prefix of the head's.
    pub(crate) fn follows(&self) -> bool {
        match self.mode {
            Mode::CatchingUp(_) | Mode::Live => true,
            Mode::Down
            | Mode::Resting { .. }
            | Mode::Sealing
            | Mode::Sealed(_)
            | Mode::Matching(_)
            | Mode::Truncating { .. }
            | Mode::Filling(_)
            | Mode::Parked { .. } => false,
        }
    }

    /// True if it is connected and nothing is known to keep it from following.
    pub(crate) fn usable(&self) -> bool {
        match &self.mode {
            Mode::Down | Mode::Parked { .. } | Mode::Resting { error: Some(_), .. } => false,
            Mode::Filling(filling) => !filling.copies_chunks(),
            Mode::Resting { error: None, .. }
            | Mode::Sealing
            | Mode::Sealed(_)
            | Mode::Matching(_)
            | Mode::Truncating { .. }
            | Mode::CatchingUp(_)
            | Mode::Live => true,
        }
    }

    /// Its log's end is being looked at, or is brought to it: it follows soon.
    pub(crate) fn comes_soon(&self) -> bool {
        match &self.mode {
            Mode::Resting { error: None, .. }
            | Mode::Sealing
            | Mode::Sealed(_)
            | Mode::Matching(_)
            | Mode::Truncating { .. } => true,
            Mode::Filling(filling) => filling.log_end().is_some(),
            Mode::Down
            | Mode::Resting { error: Some(_), .. }
            | Mode::CatchingUp(_)
            | Mode::Live
            | Mode::Parked { .. } => false,
        }
    }

    /// From then on it may be sealed, or filled, anew: nothing is under way of what came before, or that has had its
    /// time. None: not before more is answered.
    ///
    /// What was sent to a full log is never answered, and it may be this very opening that makes room: so nothing
    /// is waited for without end that a Seal ends as well.
    pub(crate) fn free_at(&self) -> Option<Instant> {
        if self.outstanding == 0 {
            Some(self.since)
        } else {
            (self.outliving == 0).then_some(self.since + PATIENCE)
        }
    }

    /// Another session with it begins, or what the head makes of the same one: answers to what was sent before
    /// mean nothing any more.
    pub(crate) fn begin_session(&mut self, session: u64) {
        self.session = session;
        self.outstanding = 0;
        self.outliving = 0;
        self.grant.session_over();
        self.speed.session_over();
    }

    /// Enters `mode`.
    pub(crate) fn enter(&mut self, mode: Mode, now: Instant) {
        self.mode = mode;
        self.since = now;
    }

    /// Starts to follow: its log ends at `acked`, a prefix of the head's.
    pub(crate) fn follow_from(&mut self, acked: Seq, epoch: Epoch, durable: Seq) {
        assert!(!self.follows(), "the mode changes after");
        self.acked = acked;
        self.joined = Position::new(epoch, acked);
        self.durable = durable.min(acked);
        self.next_send = acked.next();
        self.sent_epoch = epoch;
        self.answered = SeqBits::default();
        self.in_flight_bytes = 0;
        self.flushing = None;
    }

    /// Records on its media, of those it is known to hold.
    pub(crate) fn durable(&self) -> Seq {
        self.durable.min(self.acked)
    }

    pub(crate) fn learn_durable(&mut self, durable: Seq) {
        self.durable = self.durable.max(durable);
    }

    pub(crate) fn in_flight_records(&self) -> usize {
        usize::try_from(self.next_send.0 - self.acked.0 - 1).expect("bounded by the limit")
    }

    /// Notes that record `next_send` goes out.
    pub(crate) fn sent(&mut self, record: &base::Record) {
        let (large, bytes) = pinned(record);
        let seq = self.next_send;
        self.large.put(seq, large);
        self.answered.put(seq, false);
        self.in_flight_bytes += bytes;
        self.sent_epoch = record.header().position.epoch;
        self.next_send = seq.next();
        self.reach = self.reach.max(seq);
        self.end = self.end.max(record.header().position);
        assert!(self.in_flight_records() < MEMBER_COMMANDS_MAX, "appends are bounded");
    }

    /// Notes the answer to the append of `seq`. True if `acked` moved.
    pub(crate) fn append_answered(&mut self, seq: Seq) -> bool {
        if seq <= self.acked || seq >= self.next_send || self.answered.contains(seq) {
            return false;
        }
        self.answered.put(seq, true);
        let bytes = if self.large.contains(seq) {
            base::limits::HEADER_BYTES + base::limits::PAYLOAD_BYTES_MAX
        } else {
            base::limits::HEADER_BYTES + base::limits::SMALL_PAYLOAD_BYTES
        };
        self.in_flight_bytes = self.in_flight_bytes.saturating_sub(bytes);
        let before = self.acked;
        while self.acked.next() < self.next_send && self.answered.contains(self.acked.next()) {
            self.acked = self.acked.next();
            self.answered.put(self.acked, false);
        }
        self.acked > before
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use base::{
        BlockCount, BlockSize, BufferPool, Lba, Position, Record, RecordHeader, RecordKind,
        ReplicaKey, ShardIndex, VolumeId,
    };

    #[test]
    fn answers_out_of_order_count_only_once_contiguous() {
        let pool = BufferPool::heap(1, 0);
        let server = ServerId::from_bytes([1; 16]);
        let mut member = Member::new(server, Role::InSync, Instant::ZERO, Duration::from_millis(1));
        member.follow_from(Seq(1000), Epoch(3), Seq(900));
        member.mode = Mode::Live;
        for seq in 1001..1004 {
            let header = RecordHeader {
                key: ReplicaKey { volume: VolumeId::from_bytes([1; 16]), shard: ShardIndex(0) },
                position: Position::new(Epoch(3), Seq(seq)),
                previous_epoch: Epoch(3),
                kind: RecordKind::Discard,
                block_size: BlockSize::B512,
                lba: Lba(0),
                blocks: BlockCount(1),
                fua: false,
            };
            member.sent(&Record::encode(header, pool.take(0).unwrap()));
        }
        assert!(!member.append_answered(Seq(1003)));
        assert!(!member.append_answered(Seq(1002)));
        assert!(!member.append_answered(Seq(1002)));
        assert!(!member.append_answered(Seq(1004)));
        assert_eq!(member.acked, Seq(1000));
        assert!(member.append_answered(Seq(1001)));
        assert_eq!(member.acked, Seq(1003));
        assert_eq!((member.in_flight_bytes, member.in_flight_records()), (0, 0));
        member.learn_durable(Seq(2000));
        assert_eq!(member.durable(), Seq(1003));
    }
}
