//! In steady state a node allocates nothing per request: what is left is per segment of log, per
//! discarded range and per table that still grows.

use std::alloc::System;

use sim::{World, WorldConfig};
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

fn allocations() -> u64 {
    let stats = ALLOCATOR.stats();
    (stats.allocations + stats.reallocations) as u64
}

#[test]
fn a_request_costs_no_allocation() {
    for (servers, diskless) in [(1, false), (3, false), (3, true)] {
        let quiet = WorldConfig::quiet(11, servers, diskless, 4000);
        let config = WorldConfig { hiccups: false, allocations, ..quiet };
        let report = World::new(config).run();
        println!("{servers} servers, diskless {diskless}: {report:?}");
        // Measured over the second 2000 requests: one allocation per request would be 2000 in each
        // node that it passes.
        assert!(report.node_allocations < 500, "{servers} servers: {report:?}");
    }
}
