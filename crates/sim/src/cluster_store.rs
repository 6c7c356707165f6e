//! The cluster store as its users see it: a record that is changed by compare-and-swap, by calls
//! that are late, or whose answers are.

use core::time::Duration;

use base::limits::PAGE_BYTES;
use base::{Epoch, Holder, Instant, ShardRecord, VolumeRecord};

use crate::random::Random;

/// The records of the one volume, as of a revision.
#[derive(Clone, Debug)]
pub(crate) struct Records {
    pub(crate) revision: u64,
    pub(crate) volume: VolumeRecord,
    pub(crate) shard: ShardRecord,
}

/// What a process asks of the store.
#[derive(Clone, Debug)]
pub(crate) enum Call {
    Read,
    /// Replaces both records if nobody has changed them since that revision.
    Swap(Box<Records>),
}

/// What a process hears.
#[derive(Clone, Debug)]
pub(crate) enum Answer {
    Records(Box<Records>),
    Swapped,
    Conflict,
    /// No answer: whether the call took effect is unknown.
    Lost,
}

/// Which part of a process asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Caller {
    /// Whoever wants to be head.
    Lease,
    /// Whoever looks after members.
    Healer,
}

/// How a call will go.
pub(crate) struct Course {
    /// When it takes effect, if it does.
    pub(crate) effect: Option<Instant>,
    /// When its caller hears of it.
    pub(crate) answer: Instant,
    /// It hears nothing but a time-out.
    pub(crate) lost: bool,
}

/// A caller's time-out.
const TIMEOUT: Duration = Duration::from_secs(1);

/// The store.
pub(crate) struct ClusterStore {
    pub(crate) records: Records,
    pub(crate) away_until: Instant,
    /// Answers that will be lost.
    pub(crate) mute: u64,
    random: Random,
}

impl ClusterStore {
    pub(crate) fn new(volume: VolumeRecord, shard: ShardRecord, seed: u64) -> Self {
        Self {
            records: Records { revision: 1, volume, shard },
            away_until: Instant::ZERO,
            mute: 0,
            random: Random::of(seed, "cluster store"),
        }
    }

    /// Decides how a call made at `now` goes.
    pub(crate) fn course(&mut self, now: Instant, call: &Call) -> Course {
        let there = now + Duration::from_nanos(self.random.between(100_000, 3_000_000));
        let back = there + Duration::from_nanos(self.random.between(100_000, 3_000_000));
        if there < self.away_until {
            return Course { effect: None, answer: now + TIMEOUT, lost: true };
        }
        // An answer that matters is the answer to a change.
        if self.mute > 0 && (matches!(call, Call::Swap(_)) || self.random.one_in(4)) {
            self.mute -= 1;
            // It may take effect even after its caller has asked again.
            let late = there + Duration::from_nanos(self.random.below(2_000_000_000));
            let effect = if self.random.one_in(3) { late } else { there };
            return Course { effect: Some(effect), answer: now + TIMEOUT, lost: true };
        }
        Course { effect: Some(there), answer: back, lost: false }
    }

    /// A call takes effect.
    pub(crate) fn perform(&mut self, call: Call) -> Answer {
        match call {
            Call::Read => Answer::Records(Box::new(self.records.clone())),
            Call::Swap(records) if records.revision == self.records.revision => {
                assert!(
                    records.volume.epoch >= self.records.volume.epoch,
                    "epochs never go back in the store"
                );
                self.records = *records;
                self.records.revision += 1;
                Answer::Swapped
            }
            Call::Swap(_) => Answer::Conflict,
        }
    }

    /// Somebody has made the volume larger.
    pub(crate) fn grow(&mut self, blocks: u64) {
        self.records.volume.size_bytes += blocks * PAGE_BYTES as u64;
        self.records.revision += 1;
    }

    pub(crate) fn heal(&mut self) {
        self.away_until = Instant::ZERO;
        self.mute = 0;
    }
}

/// What a process is about to do, or waits for, to run the head.
#[derive(Clone, Debug, Default)]
pub(crate) enum Lease {
    /// Nothing.
    #[default]
    Idle,
    /// For the records; if they name this process as holder of `tried`, it has won.
    Reading { tried: Option<Epoch> },
    /// For the answer to its compare-and-swap.
    Swapping { won: Box<Records> },
}

impl Records {
    /// The volume's size.
    pub(crate) fn blocks(&self) -> u64 {
        self.volume.size_bytes / PAGE_BYTES as u64
    }

    /// These records with `holder` as the head of a new epoch.
    pub(crate) fn acquired(&self, holder: Holder) -> Self {
        let mut records = self.clone();
        records.volume.epoch = records.volume.epoch.next();
        records.volume.holder = Some(holder);
        records
    }
}
