//! Records that an opening cannot read: waited for while they may have been acknowledged, dropped when
//! they cannot have been.

use base::{BufferPool, Durability, Epoch, Position, ReplicaError, Role, Seq};

use super::bench::Bench;
use super::random::{self, number};
use super::settings::Settings;
use super::world::Counts;
use crate::{HeadPhase, MemberMode, StallReason};

/// Writes 1 to 6 reach only `holders` of so many members; then the head is gone. The log: 1 is the EpochStart.
fn left_behind(members: usize, holders: &[usize], rotten: Seq) -> Bench {
    let mut bench = Bench::opened(members);
    for member in 0..members {
        bench.held[member] = !holders.contains(&member);
    }
    for value in 1..=6 {
        bench.write(value, value);
    }
    bench.next_head();
    bench.held.fill(false);
    for holder in holders {
        bench.models[*holder].damaged.insert(rotten);
    }
    bench
}

fn waits_for(bench: &Bench, seq: u64) {
    let stall = bench.head.status().stall.expect("it waits");
    assert_eq!(stall.reason, StallReason::Damaged { seq: Seq(seq) });
}

#[test]
fn what_only_one_of_three_can_hold_is_dropped() {
    let mut bench = left_behind(3, &[0], Seq(4));
    bench.up([0, 1]);
    bench.pass(3000);
    waits_for(&bench, 4);
    assert_eq!(bench.models[0].last(), Position::new(Epoch(1), Seq(7)), "nothing was truncated");
    // The third one shows that it does not hold it either.
    bench.up([2]);
    bench.pass(1000);
    assert_eq!(bench.head.status().phase, HeadPhase::Serving);
    assert!((0..3).all(|member| bench.mode(member) == MemberMode::Live));
    // Records 2 and 3 could be read, and are kept.
    for (lba, value) in [(1, 1), (2, 2), (3, 0), (6, 0)] {
        let read = bench.read(lba);
        assert_eq!(bench.value(read), Some(value), "block {lba}");
    }
    bench.write_ok(3, 77);
    assert_eq!(bench.models[0].log, bench.models[1].log);
    assert_eq!(bench.models[0].log, bench.models[2].log);
}

#[test]
fn of_five_those_that_have_not_answered_may_hold_it() {
    let mut bench = left_behind(5, &[0], Seq(3));
    bench.up([0, 1, 2]);
    bench.pass(3000);
    waits_for(&bench, 3);
    bench.up([3]);
    bench.pass(1000);
    assert_eq!(bench.head.status().phase, HeadPhase::Serving, "two of five are no quorum");
    bench.up([4]);
    bench.pass(1000);
    assert!((0..5).all(|member| bench.mode(member) == MemberMode::Live));
}

#[test]
fn members_that_lost_something_may_have_held_it() {
    let mut bench = left_behind(3, &[0], Seq(4));
    bench.models[2].lost = true;
    bench.up([0, 1, 2]);
    bench.pass(3000);
    waits_for(&bench, 4);
    assert_eq!(bench.mode(2), MemberMode::Damaged);
}

#[test]
fn what_two_of_three_hold_is_kept_even_if_neither_can_read_it() {
    let mut bench = left_behind(3, &[0, 1], Seq(4));
    bench.up([0, 1, 2]);
    bench.pass(3000);
    // The two are a write quorum: they agree on where their logs end without reading it.
    assert_eq!(bench.head.status().phase, HeadPhase::Serving);
    assert_eq!(bench.mode(2), MemberMode::CatchingUp);
    assert_eq!((bench.models[0].last().seq, bench.models[2].last().seq), (Seq(8), Seq(3)));
}

#[test]
fn a_settled_record_is_never_dropped() {
    let mut bench = left_behind(3, &[0], Seq(4));
    bench.models[0].commit = Seq(4);
    bench.models[0].durable = Seq(7);
    bench.up([0, 1, 2]);
    bench.pass(3000);
    waits_for(&bench, 4);
}

/// A log that ends in what is settled is part of ours, whether or not ours can be read there: that member may have
/// just what is missed.
#[test]
fn a_settled_end_need_not_be_compared_with_what_cannot_be_read() {
    let mut bench = Bench::opened(3);
    for value in 1..=3 {
        bench.write(value, value);
    }
    bench.held[1] = true;
    for value in 4..=6 {
        bench.write_ok(value, value);
    }
    bench.pass(1000);
    assert_eq!((bench.models[2].commit, bench.models[2].last().seq), (Seq(7), Seq(7)));
    // Only member 0 gets the next head's first record, and then cannot read what member 1 lacks.
    bench.next_head();
    bench.held.fill(false);
    let room = std::mem::replace(&mut bench.room[2], 0);
    bench.up([0, 2]);
    assert_eq!(bench.models[0].last(), Position::new(Epoch(2), Seq(8)));
    assert_eq!(bench.models[2].last().seq, Seq(7));
    bench.next_head();
    bench.room[2] = room;
    bench.models[0].damaged.extend([Seq(6), Seq(7), Seq(8)]);
    bench.up([0, 1, 2]);
    bench.pass(1000);
    assert_eq!(bench.head.status().phase, HeadPhase::Serving);
    assert!((0..3).all(|member| bench.mode(member) == MemberMode::Live));
    assert_eq!(bench.models[1].log, bench.models[2].log);
    for value in 1..=6 {
        let read = bench.read(value);
        assert_eq!(bench.value(read), Some(value), "block {value}");
    }
}

#[test]
fn a_member_that_cannot_read_its_end_is_truncated_only_where_ours_can_be_read() {
    // Epoch 1 leaves records 5 to 7 at member 1 alone, epoch 2 records 5 and up at the others.
    let mut bench = Bench::opened(3);
    for value in 1..=3 {
        bench.write(value, value);
    }
    bench.held = vec![true, false, true];
    for value in 4..=6 {
        bench.write(value, value);
    }
    bench.next_head();
    bench.held.fill(false);
    bench.up([0, 2]);
    for value in 11..=15 {
        bench.write(value, value);
    }
    bench.next_head();
    // Record 4 is the same everywhere, but member 1 can no longer tell, and member 0 not help.
    bench.models[1].damaged.extend([Seq(4), Seq(5)]);
    bench.models[0].damaged.insert(Seq(4));
    bench.models[1].commit = Seq(1);
    bench.up([0, 1]);
    bench.pass(3000);
    waits_for(&bench, 4);
    assert_eq!(bench.models[1].last().seq, Seq(7), "it keeps what it has");
    bench.up([2]);
    bench.pass(1000);
    assert_eq!(bench.head.status().phase, HeadPhase::Serving);
    assert_eq!(bench.mode(1), MemberMode::Live);
    assert_eq!(bench.models[1].log, bench.models[2].log);
}

#[test]
fn nothing_is_dropped_while_a_change_of_members_is_open() {
    let mut bench = left_behind(5, &[0, 1, 2], Seq(4));
    bench.models[1].damaged.clear();
    bench.held[1] = true;
    bench.up([0, 2, 3, 4]);
    // Three hold it; one of them leaves before it could be read.
    bench.pass(100);
    let roles: Vec<_> = [0, 1, 2, 3].map(|member| (member, Role::InSync)).into();
    let refused = bench.change(&roles);
    assert!(refused.is_err(), "too few of the new set hold the log");
    waits_for_any(&bench);
    bench.held[1] = false;
    bench.up([1]);
    bench.pass(1000);
    assert_eq!(bench.head.status().phase, HeadPhase::Serving);
    let read = bench.read(3);
    assert_eq!(bench.value(read), Some(3));
}

fn waits_for_any(bench: &Bench) {
    assert_eq!(bench.head.status().phase, HeadPhase::Reconciling);
}

/// Worlds in which one member's records rot, also those that it alone has.
fn settings(seed: u64) -> Settings {
    let mut settings = random::settings(seed);
    settings.members = if seed.is_multiple_of(3) { 5 } else { 3 };
    settings.bad = Some(usize::try_from(seed).unwrap() % settings.members);
    settings.greedy_trims = false;
    settings.power_losses = false;
    settings.stall_deadline_ms = None;
    settings.durability =
        if seed.is_multiple_of(2) { Durability::Durable } else { Durability::Flush };
    settings
}

fn first_failure(seeds: core::ops::Range<u64>, blindly: bool) -> (Counts, Option<(u64, String)>) {
    let buffers = BufferPool::heap(128, 64);
    let mut counts = Counts::new();
    for seed in seeds {
        let mut settings = settings(seed);
        settings.drops_blindly = blindly;
        let one = std::panic::AssertUnwindSafe(|| random::run(seed, settings, &buffers));
        match std::panic::catch_unwind(one) {
            Ok((seen, _)) => {
                for (what, times) in seen {
                    *counts.entry(what).or_default() += times;
                }
            }
            Err(panic) => {
                let what = panic.downcast_ref::<String>().cloned().unwrap_or_default();
                return (counts, Some((seed, what)));
            }
        }
    }
    (counts, None)
}

#[test]
fn unreadable_worlds() {
    if let Some(seed) = number("HOLDFAST_SEED") {
        eprintln!("{:?}", first_failure(seed..seed + 1, false));
        return;
    }
    let seeds = number("HOLDFAST_SEEDS").unwrap_or(60);
    let first = number("HOLDFAST_FIRST_SEED").unwrap_or(0);
    let (counts, failed) = first_failure(first..first + seeds, false);
    eprintln!("{seeds} worlds, {counts:?}");
    if let Some((seed, what)) = failed {
        panic!("{what}; again with: HOLDFAST_SEED={seed} cargo test -p volume unreadable_worlds");
    }
    if seeds >= 60 {
        for what in ["damage of a lone record", "unreadable record dropped"] {
            assert!(counts.contains_key(what), "no {what} in {seeds} worlds");
        }
    }
}

/// The worlds find a head that does not count who may hold what it drops.
#[test]
fn dropping_without_counting_is_noticed() {
    let (_, caught) = first_failure(0..600, true);
    eprintln!("caught with {caught:?}");
    assert!(caught.is_some());
}

/// Member 2 alone got the EpochStart of epoch 2, and then cannot read the end of its log: nobody can say where
/// those of the others, which have all that counts, part from it. Record 5 to 7 are at members 1 and 2 only.
fn passed_over() -> Bench {
    let mut bench = Bench::opened(3);
    for value in 1..=3 {
        bench.write(value, value);
    }
    bench.held[0] = true;
    for value in 4..=6 {
        bench.write_ok(value, value);
    }
    bench.next_head();
    let room = std::mem::replace(&mut bench.room[1], 0);
    bench.up([1, 2]);
    assert_eq!(bench.models[2].last(), Position::new(Epoch(2), Seq(8)));
    assert_eq!(bench.models[1].last(), Position::new(Epoch(1), Seq(7)));
    bench.next_head();
    bench.room[1] = room;
    bench.held.fill(false);
    bench.models[2].damaged.extend((5..=8).map(Seq));
    bench
}

#[test]
fn who_cannot_read_the_chosen_log_is_passed_over_if_the_others_suffice() {
    let mut bench = passed_over();
    bench.up([1, 2]);
    bench.pass(3000);
    // The two are no write quorum without member 2.
    waits_for(&bench, 7);
    assert_eq!(bench.models[2].last(), Position::new(Epoch(2), Seq(8)), "nothing was truncated");
    bench.up([0]);
    bench.pass(1000);
    assert_eq!(bench.head.status().phase, HeadPhase::Serving);
    assert!((0..3).all(|member| bench.mode(member) == MemberMode::Live));
    assert_eq!(bench.models[0].log, bench.models[1].log);
    assert_eq!(bench.models[0].log, bench.models[2].log);
    for value in 1..=6 {
        let read = bench.read(value);
        assert_eq!(bench.value(read), Some(value), "block {value}");
    }
}

#[test]
fn what_is_settled_is_not_passed_over() {
    let mut bench = passed_over();
    bench.models[2].commit = Seq(8);
    bench.models[2].durable = Seq(8);
    bench.up([0, 1, 2]);
    bench.pass(3000);
    waits_for_any(&bench);
    assert_eq!(bench.models[2].last(), Position::new(Epoch(2), Seq(8)));
}

#[test]
fn what_a_member_cannot_read_others_hold_before_it_is_forgotten() {
    let mut bench = passed_over();
    let room = std::mem::replace(&mut bench.room[0], 0);
    bench.up([0, 1, 2]);
    bench.pass(900);
    assert_eq!(bench.head.status().phase, HeadPhase::Reconciling);
    assert_eq!(bench.models[2].last(), Position::new(Epoch(2), Seq(8)), "it may be needed yet");
    bench.room[0] = room;
    bench.settle();
    bench.pass(50);
    assert_eq!(bench.head.status().phase, HeadPhase::Serving);
    assert_eq!(bench.mode(2), MemberMode::Live);
    assert_eq!(bench.models[0].log, bench.models[2].log);
}

#[test]
fn a_donor_that_fails_otherwise_is_no_reason_to_drop() {
    let mut bench = left_behind(3, &[0], Seq(4));
    bench.models[0].damaged.clear();
    bench.failing_scans = Some(ReplicaError::NoSpace);
    bench.up([0, 1, 2]);
    bench.pass(3000);
    assert_eq!(bench.head.status().phase, HeadPhase::Reconciling);
    bench.failing_scans = None;
    bench.pass(3000);
    assert_eq!(bench.head.status().phase, HeadPhase::Serving);
    let read = bench.read(6);
    assert_eq!(bench.value(read), Some(6));
}
