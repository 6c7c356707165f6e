//! Runs of whole clusters: fixed seeds, fresh seeds, and replay of one.

use base::Durability;
use sim::{World, WorldConfig};

fn config(seed: u64) -> WorldConfig {
    WorldConfig {
        seed,
        servers: [3, 1, 3, 2, 3, 5][usize::try_from(seed % 6).expect("small")],
        diskless: seed % 4 == 1,
        blocks: 512,
        requests: 1500,
        faults: true,
        hiccups: true,
        durability: if seed.is_multiple_of(2) { Durability::Durable } else { Durability::Flush },
        trace_block: number("SIM_BLOCK"),
        allocations: || 0,
    }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

fn quiet(servers: usize, diskless: bool) -> WorldConfig {
    WorldConfig {
        seed: 7,
        servers,
        diskless,
        blocks: 512,
        requests: 2000,
        faults: false,
        hiccups: true,
        durability: Durability::Flush,
        trace_block: number("SIM_BLOCK"),
        allocations: || 0,
    }
}

#[test]
fn a_quiet_cluster_answers_everything() {
    for servers in [1, 2, 3, 5] {
        for diskless in [false, true] {
            let config = quiet(servers, diskless);
            let report = World::new(config).run();
            assert!(report.answered >= 2000, "{servers} servers: {report:?}");
            assert_eq!(report.heads, 1);
        }
    }
}

#[test]
fn clusters_under_faults_lose_nothing() {
    let base = number("SIM_SEED_BASE").unwrap_or(0);
    let count = number("SIM_SEEDS").unwrap_or(40);
    let (mut faults, mut heads, mut checked) = (0, 0, 0);
    for seed in base..base + count {
        let report = World::new(config(seed)).run();
        faults += report.faults;
        heads += report.heads;
        checked += report.checked;
    }
    println!("seeds {base}..{}: {faults} faults, {heads} heads, {checked} blocks", base + count);
    assert!(faults > count && heads > count && checked > 0, "the faults happen");
}

/// `SIM_SEED=N [SIM_SERVERS=N SIM_DISKLESS=true] cargo test -p sim replay`.
#[test]
fn replay() {
    let Some(seed) = number("SIM_SEED") else {
        println!("SKIPPED: set SIM_SEED to replay a seed");
        return;
    };
    println!("{:?}", World::new(config(seed)).run());
}

/// The log of a simulated server holds 16 MiB; the guest writes many times that.
#[test]
fn a_small_log_overwritten_many_times_does_not_stop() {
    for servers in [1, 3] {
        let config = WorldConfig { servers, requests: 12_000, ..quiet(servers, false) };
        let report = World::new(config).run();
        assert!(report.answered >= 12_000, "{servers} servers: {report:?}");
    }
}
