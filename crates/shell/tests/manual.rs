//! Whatever a head says of itself and of its members, the operator's manual says what to do about it.

use base::{DegradedReason, ReplicaError, Seq};
use volume::{MemberMode, StallReason};

const MANUAL: &str = include_str!("../../../docs/operations.md");

/// A row of a table whose first cell has all words of `text`, numbers and what comes after a colon
/// apart, and whose last cell says something.
fn has_row(text: &str) -> bool {
    let text = text.split(':').next().unwrap_or(text).replace("seq ", "");
    let words: Vec<&str> = text.split(|c: char| c.is_ascii_digit()).map(str::trim).collect();
    MANUAL.lines().filter(|line| line.starts_with("| ")).any(|line| {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        let says = cells.len() >= 2 && cells.last().is_some_and(|last| !last.is_empty());
        says && words.iter().all(|word| cells[0].contains(word))
    })
}

#[test]
fn every_reason_of_a_stall_is_in_the_manual() {
    let all = [
        StallReason::Members { usable: 1, needed: 2, of: 3 },
        StallReason::NotSealed { sealed: 1, of: 3 },
        StallReason::Reconciling { hold: 1, needed: 2 },
        StallReason::Damaged { seq: Seq(7) },
        StallReason::Unanswered { seq: Seq(7) },
        StallReason::NotOnMedia { seq: Seq(7) },
        StallReason::NoReader,
        StallReason::NoGrant { granted: 1, needed: 2 },
    ];
    for (number, reason) in all.into_iter().enumerate() {
        // A new reason does not compile here: add it above.
        let known = match reason {
            StallReason::Members { .. } => 0,
            StallReason::NotSealed { .. } => 1,
            StallReason::Reconciling { .. } => 2,
            StallReason::Damaged { .. } => 3,
            StallReason::Unanswered { .. } => 4,
            StallReason::NotOnMedia { .. } => 5,
            StallReason::NoReader => 6,
            StallReason::NoGrant { .. } => 7,
        };
        assert_eq!(number, known);
        assert!(has_row(&reason.to_string()), "docs/operations.md does not explain: {reason}");
    }
}

#[test]
fn every_mode_of_a_member_is_in_the_manual() {
    let all = [
        MemberMode::Down,
        MemberMode::Sealing,
        MemberMode::Reconciling,
        MemberMode::CatchingUp,
        MemberMode::Live,
        MemberMode::TooFarBehind,
        MemberMode::Diverged,
        MemberMode::Damaged,
        MemberMode::Filling,
        MemberMode::Failed(ReplicaError::DeviceFailed),
    ];
    for (number, mode) in all.into_iter().enumerate() {
        let known = match mode {
            MemberMode::Down => 0,
            MemberMode::Sealing => 1,
            MemberMode::Reconciling => 2,
            MemberMode::CatchingUp => 3,
            MemberMode::Live => 4,
            MemberMode::TooFarBehind => 5,
            MemberMode::Diverged => 6,
            MemberMode::Damaged => 7,
            MemberMode::Filling => 8,
            MemberMode::Failed(_) => 9,
        };
        assert_eq!(number, known);
        // Nothing is said of one that is well.
        let said = mode != MemberMode::Live;
        assert!(!said || has_row(&mode.to_string()), "docs/operations.md does not explain: {mode}");
    }
}

#[test]
fn everything_that_a_server_says_is_wrong_with_it_is_in_the_manual() {
    let all = [
        DegradedReason::SlowDevice,
        DegradedReason::FailedDevice,
        DegradedReason::LogFull,
        DegradedReason::Damage,
    ];
    for (number, reason) in all.into_iter().enumerate() {
        let known = match reason {
            DegradedReason::SlowDevice => 0,
            DegradedReason::FailedDevice => 1,
            DegradedReason::LogFull => 2,
            DegradedReason::Damage => 3,
        };
        assert_eq!(number, known);
        assert!(has_row(&reason.to_string()), "docs/operations.md does not explain: {reason}");
    }
}
