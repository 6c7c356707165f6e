//! Runs of whole clusters: fixed seeds, fresh seeds, and replay of one.

use sim::{World, WorldConfig};

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[test]
fn a_quiet_cluster_answers_everything() {
    for servers in [1, 2, 3, 5] {
        for diskless in [false, true] {
            let report = World::new(WorldConfig::quiet(7, servers, diskless, 2000)).run();
            assert!(report.answered >= 2000, "{servers} servers: {report:?}");
            assert_eq!(report.heads, 1);
        }
    }
}

#[test]
fn clusters_under_faults_lose_nothing() {
    let base = number("SIM_SEED_BASE").unwrap_or(0);
    let count = number("SIM_SEEDS").unwrap_or(12);
    let (mut faults, mut heads, mut checked) = (0, 0, 0);
    for seed in base..base + count {
        println!("seed {seed}; replay: scripts/dev sim --replay {seed}");
        let report = World::new(WorldConfig::with_faults(seed)).run();
        faults += report.faults;
        heads += report.heads;
        checked += report.checked;
    }
    println!("seeds {base}..{}: {faults} faults, {heads} heads, {checked} blocks", base + count);
    assert!(faults > count && heads > count && checked > 0, "the faults happen");
}

/// Seeds that found something once, and what.
const REGRESSIONS: &[(u64, &str)] = &[
    (
        364_275_402_077_037,
        "a discard that a copied chunk had before it came, and a copy of that copy",
    ),
    (5, "a member forgot its log where the first page of a segment could not be read"),
    (60, "a cluster of one server with nothing left to do"),
    (121, "a member too far behind and another one's pool lost"),
    (133, "an unreadable record that only one member could hold"),
    (216, "a pool with an unreadable sector in one copy of its label"),
    (326, "unreadable records in a row that only one member could hold"),
    (355, "commit news that reads had carried away"),
    (664, "a pool that did not open after a replica was sealed while it was deleted"),
    (41246, "a truncation that reads what settles"),
    (
        41754,
        "a fetch under a record that is not settled, after a crash on its predecessor's way home",
    ),
    (41309, "commit news that reads had carried away, with one server"),
    (501_195, "an opening that a full log kept from going on"),
    (448, "a running head that had let go of what its only member lost with its power"),
    (700_350, "the same, with two openings before"),
    (501_755, "an ended head whose unanswered reads waited for each other's buffers"),
    (502_897, "a deposed head whose members were all replaced"),
    (502_814, "a copy that was about to go, read alone"),
    (501_618, "a log whose last batches rotted and ended before them"),
    (700_533, "a seal lost in both copies, which was beyond the budget"),
    (720_525, "rot in the end of a log whose server died only later"),
    (910_455, "a liar's word that the oracle believed after a second opening"),
    (8_008_497, "rot in batches that were written at the same time, which nothing vouches for"),
    (710_550, "a read grant that was asked for again without end"),
    (476_745_050_938_459, "a settled log that waited for what could be read nowhere but in it"),
    (
        489_321_442_642_631,
        "a full log beside one that was far behind, and a flush that nobody asked for",
    ),
    (477_968_553_642_570, "a full log that waited for the opening that waited for its answers"),
    (
        351_609_381_092_118,
        "batches of a log that a fill had dropped, which vouched for the new one",
    ),
    (351_609_381_094_238, "a member that lost power unnoticed, and was read alone"),
    (351_609_381_095_676, "a small log that rotted as a whole, and nothing in the journal of it"),
    (
        100_679,
        "a segment whose header rotted beside an unreadable page, and that was nobody's then",
    ),
    (
        359_263_143_688_173,
        "full logs while the faulty server's is lost: a known gap, found when nothing went on",
    ),
    (300_332, "a record that was looked for in a log while that was being cut back"),
    (
        366_411_002_680_027,
        "rot at the end of an idle log, of which only the store knew that it was on media",
    ),
    (372_120_406_546_575, "what was dropped on a liar's word, and back when the liar had lost it"),
    (
        491_344_679_220_386,
        "rot in a batch that a later one vouched for which was never synced, beyond the budget",
    ),
    (
        492_673_630_631_020,
        "an EpochStart at one member that could not read its log, so that nobody's could be compared",
    ),
    (
        494_063_584_417_463,
        "a full log beside a member that needs a copy, and whose log ends in an older epoch",
    ),
    (
        494_063_584_402_904,
        "a server that was asked to delete its replica again, and did not say that it is gone",
    ),
    (
        494_063_584_375_442,
        "what a power cut left of a segment, which vouched for the log that used it under the same ordinal",
    ),
    (
        497_091_274_052_326,
        "rot in a batch that a later one vouched for whose sync was about to fail, beyond the budget",
    ),
    (
        497_091_274_101_893,
        "a liar's word by which others settled what it had not been told is settled",
    ),
    (90_070, "a seal on a page of the journal that neither copy could give, taken for the end"),
];

#[test]
fn seeds_that_found_something_stay_clean() {
    for (seed, what) in REGRESSIONS {
        println!("seed {seed}: {what}; replay: scripts/dev sim --replay {seed}");
        World::new(WorldConfig::with_faults(*seed)).run();
    }
}

#[test]
fn a_seed_decides_everything() {
    for seed in [3, 4] {
        let run = || World::new(WorldConfig::with_faults(seed)).run();
        let (one, other) = (run(), run());
        assert_eq!(
            (one.digest, one.events, one.answered),
            (other.digest, other.events, other.answered)
        );
    }
}

/// The log of a simulated server holds 16 MiB; the guest writes many times that.
#[test]
fn a_small_log_overwritten_many_times_does_not_stop() {
    for servers in [1, 3] {
        let report = World::new(WorldConfig::quiet(7, servers, false, 12_000)).run();
        assert!(report.answered >= 12_000, "{servers} servers: {report:?}");
    }
}
