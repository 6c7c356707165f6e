//! Counters and latency histograms of requests, by kind of operation. Plain numbers, updated in
//! place; somebody else renders them.

use core::time::Duration;

use base::{Operation, Status};

pub use crate::fills::FillCounters;

/// Upper bounds of the latency buckets, in nanoseconds; one more bucket takes the rest.
pub const LATENCY_BOUNDS_NS: &[u64] = &[
    10_000,
    20_000,
    50_000,
    100_000,
    200_000,
    500_000,
    1_000_000,
    2_000_000,
    5_000_000,
    10_000_000,
    20_000_000,
    50_000_000,
    100_000_000,
    500_000_000,
    1_000_000_000,
    10_000_000_000,
];

const BUCKETS: usize = LATENCY_BOUNDS_NS.len() + 1;

/// The kinds of operation that are counted apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OperationKind {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Flushes.
    Flush,
    /// Discards.
    Discard,
    /// Write-zeroes.
    WriteZeroes,
}

impl OperationKind {
    /// All kinds, in the order of their index.
    pub const ALL: [Self; 5] =
        [Self::Read, Self::Write, Self::Flush, Self::Discard, Self::WriteZeroes];

    /// The kind of `operation`.
    pub const fn of(operation: &Operation) -> Self {
        match operation {
            Operation::Read { .. } => Self::Read,
            Operation::Write { .. } => Self::Write,
            Operation::Flush => Self::Flush,
            Operation::Discard => Self::Discard,
            Operation::WriteZeroes { .. } => Self::WriteZeroes,
        }
    }

    /// The kind's name in metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::Discard => "discard",
            Self::WriteZeroes => "write_zeroes",
        }
    }
}

/// What is counted of one kind of operation.
#[derive(Clone, Copy, Debug, Default)]
pub struct OperationCounters {
    /// Answered.
    pub requests: u64,
    /// Of these, not with [`Status::Ok`].
    pub errors: u64,
    /// Bytes of those that ended well.
    pub bytes: u64,
    /// Nanoseconds from arrival to answer, summed.
    pub latency_sum_ns: u64,
    /// Answers per latency bucket (not cumulative).
    pub latency_counts: [u64; BUCKETS],
}

/// The counters of a volume's head.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counters {
    by_kind: [OperationCounters; 5],
}

impl Counters {
    /// Of one kind.
    pub fn of(&self, kind: OperationKind) -> &OperationCounters {
        &self.by_kind[kind as usize]
    }

    pub(crate) fn count(
        &mut self,
        kind: OperationKind,
        status: Status,
        bytes: u64,
        latency: Duration,
    ) {
        let counters = &mut self.by_kind[kind as usize];
        let nanos = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX);
        counters.requests += 1;
        if status == Status::Ok {
            counters.bytes += bytes;
        } else {
            counters.errors += 1;
        }
        counters.latency_sum_ns = counters.latency_sum_ns.saturating_add(nanos);
        let bucket = LATENCY_BOUNDS_NS.partition_point(|bound| *bound < nanos);
        counters.latency_counts[bucket] += 1;
    }
}

/// What is counted of a node as a whole. Of a diskless one everything is zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NodeCounters {
    /// Seals whose answers wait, at this moment, for the read grant of a deposed head to run out.
    pub seals_held: usize,
    /// Seals whose answers have ever waited for that.
    pub seals_waited: u64,
    /// Connections that were closed as they came.
    pub refused: u64,
    /// What fills of this server's replicas have done.
    pub fills: FillCounters,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_falls_into_one_bucket() {
        let mut counters = Counters::default();
        let kind = OperationKind::Write;
        counters.count(kind, Status::Ok, 4096, Duration::from_micros(10));
        counters.count(kind, Status::IoError, 4096, Duration::from_secs(100));
        let write = counters.of(kind);
        assert_eq!((write.requests, write.errors, write.bytes), (2, 1, 4096));
        assert_eq!(write.latency_counts[0], 1);
        assert_eq!(write.latency_counts[BUCKETS - 1], 1);
        assert_eq!(counters.of(OperationKind::Read).requests, 0);
    }
}
