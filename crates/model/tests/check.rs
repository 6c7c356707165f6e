//! The model holds, and does not hold without any one of its rules.

#![allow(clippy::unwrap_used, reason = "tests")]

use model::{Bounds, Mutant, Protocol};
use stateright::{Checker, HasDiscoveries, Model};

/// Three members of which all are in sync, two heads, three writes.
const WRITES: Bounds = Bounds { epochs: 2, writes: 3, changes: 0, in_sync: 0b111, grants: false };
const CHANGES: Bounds = Bounds { epochs: 2, writes: 1, changes: 1, in_sync: 0b111, grants: false };
const GROWS: Bounds = Bounds { epochs: 2, writes: 1, changes: 1, in_sync: 0b011, grants: false };
const GRANTS: Bounds = Bounds { epochs: 2, writes: 1, changes: 0, in_sync: 0b111, grants: true };

fn holds(name: &str, bounds: Bounds) {
    let started = std::time::Instant::now();
    let checker = Protocol { bounds, mutant: None }.checker().threads(2).spawn_bfs().join();
    println!(
        "{name}: {} states, depth {}, {:?}",
        checker.unique_state_count(),
        checker.max_depth(),
        started.elapsed()
    );
    checker.assert_properties();
}

fn fails(mutant: Mutant, bounds: Bounds) -> bool {
    let always = ["acknowledged writes survive", "reads are current", "settled logs agree"];
    let checker = Protocol { bounds, mutant: Some(mutant) }
        .checker()
        .threads(2)
        .finish_when(HasDiscoveries::AnyOf(always.into_iter().collect()))
        .spawn_bfs()
        .join();
    let found = always.iter().find_map(|name| checker.discovery(name).map(|path| (name, path)));
    let Some((name, path)) = found else {
        println!("{mutant:?} breaks nothing in {} states", checker.unique_state_count());
        return false;
    };
    println!("{mutant:?}: not {name}, after {} steps", path.into_actions().len());
    true
}

#[test]
fn writes() {
    holds("writes", WRITES);
}

#[test]
fn changes() {
    holds("changes", CHANGES);
}

#[test]
fn grows() {
    holds("grows", GROWS);
}

#[test]
fn writes_and_changes() {
    holds("writes and changes", Bounds { writes: 3, ..CHANGES });
}

#[test]
fn three_epochs() {
    holds("three epochs", Bounds { epochs: 3, writes: 1, ..WRITES });
}

#[test]
fn grants_and_changes() {
    holds("grants and changes", Bounds { changes: 1, ..GRANTS });
}

#[test]
fn grants() {
    holds("grants", GRANTS);
}

/// The rules whose absence must show, with bounds in which it does.
fn survivors(mutants: &[(Mutant, Bounds)]) -> Vec<Mutant> {
    let survives = |(mutant, bounds): &&(Mutant, Bounds)| !fails(*mutant, *bounds);
    mutants.iter().filter(survives).map(|(mutant, _)| *mutant).collect()
}

#[test]
fn without_a_rule_of_writing_and_opening_it_does_not_hold() {
    let mutants = [
        (Mutant::AckEarly, WRITES),
        (Mutant::SealEarly, WRITES),
        (Mutant::WrongTail, WRITES),
        (Mutant::NoFence, WRITES),
        (Mutant::LongestTail, Bounds { epochs: 3, writes: 2, ..WRITES }),
    ];
    assert_eq!(survivors(&mutants), []);
}

#[test]
fn without_epoch_start_it_does_not_hold() {
    // The shortest way takes four heads.
    let bounds = Bounds { epochs: 4, writes: 1, ..WRITES };
    assert_eq!(survivors(&[(Mutant::ServeEarly, bounds)]), []);
}

#[test]
fn without_a_rule_of_membership_it_does_not_hold() {
    let mutants = [
        (Mutant::ForgetOldSet, GROWS),
        (Mutant::ForgetNewSet, CHANGES),
        (Mutant::AdmitBehind, CHANGES),
        (Mutant::AdoptEarly, GROWS),
        (Mutant::CountOthers, GROWS),
        (Mutant::UnconditionalChange, Bounds { epochs: 3, ..CHANGES }),
    ];
    assert_eq!(survivors(&mutants), []);
}

#[test]
fn without_a_rule_of_reading_it_does_not_hold() {
    assert_eq!(survivors(&[(Mutant::IgnoreGrant, GRANTS), (Mutant::TrustForEver, GRANTS)]), []);
}
