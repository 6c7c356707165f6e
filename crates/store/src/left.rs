//! Where the log is, as the process that lets go of a pool tells the one that opens it next.
//!
//! A reopening that knows nothing reads the beginning of every segment to learn whose it is, and behind each
//! log's end the rest of that segment, for evidence that more was on media once. Neither is needed after a
//! hand-over, in which guests wait for the reopening. What is said counts for one generation of the metadata:
//! whoever opens the pool raises it. After a crash nobody says anything, and everything is read.

use base::planted::{self, Bug};
use base::{Epoch, Position, ReplicaKey, Seq};

use crate::batch::{Owner, SegmentHeader};
use crate::replica::{Exclusive, Replica};
use crate::segments::SegmentState;
use crate::store::{Phase, Store};

/// Where the log of a pool is that was let go of. Segments of which nothing is said are nobody's: each could
/// have been taken and written over at that moment, so nothing that counts is in them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LogLeft {
    /// What each replica has of it.
    pub replicas: Vec<ReplicaLog>,
    /// Segments with something that is not home, and others that must be looked at.
    pub segments: Vec<u32>,
}

/// The log of a replica.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplicaLog {
    /// The replica.
    pub key: ReplicaKey,
    /// Which of the replicas that had this key.
    pub incarnation: u32,
    /// The last record that is known to be written; nobody was promised more. `None`: it was being
    /// changed.
    pub end: Option<Position>,
    /// Segments of which everything is home, and which are kept for scans.
    pub clean: Vec<CleanSegment>,
}

/// A segment of which everything is home.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CleanSegment {
    /// Its number in the pool.
    pub segment: u32,
    /// Its number in the replica's log.
    pub ordinal: u64,
    /// Its first record.
    pub first_seq: Seq,
    /// Epoch of the record before.
    pub previous_epoch: Epoch,
}

/// What a reopening need not find out.
#[derive(Default)]
pub(crate) struct Known {
    /// The segments to look at, if not all.
    pub(crate) segments: Option<Vec<u32>>,
    /// Where logs end.
    pub(crate) ends: Vec<(ReplicaKey, Position)>,
}

impl Store {
    /// Where the log is now, for the process that opens the pool next; `None` if this one does not have it
    /// open. Nothing may be asked of the devices any more.
    pub fn log_left(&self) -> Option<LogLeft> {
        if self.phase != Phase::Open {
            return None;
        }
        let mut left = LogLeft::default();
        for replica in self.replicas.iter().flatten() {
            let state = |segment: &u32| self.segments.all[*segment as usize];
            let clean = |segment: &u32| CleanSegment {
                segment: *segment,
                ordinal: state(segment).ordinal,
                first_seq: state(segment).first_seq,
                previous_epoch: state(segment).previous_epoch,
            };
            let own = replica.segments.iter();
            let own = own.filter(|segment| state(segment).state == SegmentState::Clean);
            left.replicas.push(ReplicaLog {
                key: replica.key,
                incarnation: replica.incarnation,
                end: replica.log_end(),
                clean: own.map(clean).collect(),
            });
        }
        let untold = planted::is(Bug::LogSegmentsUntold);
        let is_known = |state| {
            matches!(state, SegmentState::Free | SegmentState::Clean)
                || untold && state == SegmentState::Full
        };
        let segments = self.segments.all.iter().enumerate();
        left.segments = segments
            .filter(|(_, segment)| !is_known(segment.state))
            .map(|(index, _)| u32::try_from(index).expect("segments are counted in 32 bits"))
            .collect();
        Some(left)
    }

    /// The pool was let go of in this generation, its log as `left` says. To be called before the first output
    /// is taken.
    pub fn inherit(&mut self, generation: u64, left: LogLeft) {
        self.opening.left = Some((generation, left));
    }

    /// The metadata has been read: takes in what is known of the log, if nobody has opened the pool since.
    pub(crate) fn take_inheritance(&mut self) {
        let Some((generation, left)) = self.opening.left.take() else { return };
        if generation != self.journal.generation {
            return;
        }
        let count = self.segments.all.len();
        let mut segments = left.segments;
        for log in left.replicas {
            for clean in log.clean {
                let header = SegmentHeader {
                    owner: Owner {
                        pool: self.pool,
                        key: log.key,
                        incarnation: log.incarnation,
                        segment: clean.segment,
                        ordinal: clean.ordinal,
                    },
                    // What only a replay asks for.
                    previous_crc: 0,
                    first_batch: 0,
                    first_seq: clean.first_seq,
                    previous_epoch: clean.previous_epoch,
                };
                let slot = self.slot_of(&header.owner, clean.segment);
                let is_home =
                    slot.is_some_and(|slot| clean.ordinal < self.replica_ref(slot).flushed_ordinal);
                match self.opening.segment_headers.get_mut(clean.segment as usize) {
                    Some(known) if is_home => *known = Some(header),
                    Some(_) | None => segments.push(clean.segment),
                }
            }
            self.opening.known.ends.extend(log.end.map(|end| (log.key, end)));
        }
        segments.retain(|segment| (*segment as usize) < count);
        self.opening.known.segments = Some(segments);
    }
}

impl Replica {
    /// The last record of the log that is known to be written.
    fn log_end(&self) -> Option<Position> {
        let rests = self.exclusive == Exclusive::None && !self.damaged && !self.filling;
        let mut end = self.written;
        if planted::is(Bug::LogEndToldTooLow) && end.seq > self.home_through().seq {
            end.seq.0 -= 1;
        }
        rests.then_some(end)
    }
}

impl Known {
    /// The last record of a replica's log.
    pub(crate) fn end(&self, key: ReplicaKey) -> Option<Position> {
        self.ends.iter().find(|(replica, _)| *replica == key).map(|(_, end)| *end)
    }

    /// The segment to look at after so many, of `all`.
    pub(crate) fn segment(&self, after: u32, all: u32) -> Option<u32> {
        match &self.segments {
            None => (after < all).then_some(after),
            Some(segments) => segments.get(after as usize).copied(),
        }
    }
}
