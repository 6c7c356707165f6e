//! How long guests wait when a member is slow, in simulated time: no more than when none is.

use std::collections::BTreeMap;

use base::{BufferPool, Durability, RequestId};

use super::oracle::Asked;
use super::settings::Settings;
use super::world::{Counts, MS, World, server_id};
use crate::Tunables;

/// How long requests take.
#[derive(Debug, Default)]
pub(super) struct Stopwatch {
    started: BTreeMap<u64, (u64, bool)>,
    reads: Vec<u64>,
    writes: Vec<u64>,
    /// One in so many reads takes a hundred times as long.
    pub(super) hiccups_one_in: Option<u64>,
}

impl World {
    pub(super) fn start_watch(&mut self, id: u64, asked: Asked) {
        let reads = asked == Asked::Read;
        if let Some(watch) = &mut self.stopwatch
            && asked != Asked::Flush
        {
            watch.started.insert(id, (self.now, reads));
        }
    }

    pub(super) fn stop_watch(&mut self, id: RequestId) {
        let now = self.now;
        let Some(watch) = &mut self.stopwatch else { return };
        let Some((since, reads)) = watch.started.remove(&id.0) else { return };
        let took = now - since;
        if reads { watch.reads.push(took) } else { watch.writes.push(took) }
    }

    pub(super) fn reading_takes(&mut self, server: usize) -> u64 {
        let one_in = self.stopwatch.as_ref().and_then(|watch| watch.hiccups_one_in);
        let hiccup = one_in.is_some_and(|times| self.random.one_in(times));
        self.delay() * self.slowness[server] * if hiccup { 100 } else { 1 }
    }
}

fn settings(delay: u64) -> Settings {
    Settings {
        members: 3,
        durability: Durability::Flush,
        blocks: 64,
        depth: 4,
        tunables: Tunables::default(),
        delay,
        slow: None,
        bad: None,
        power_losses: false,
        greedy_trims: false,
        stall_deadline_ms: None,
        spares: None,
        grows: false,
        room: None,
        grants: true,
        deposes: false,
        untrue_head: false,
        untrue_members: false,
        drops_blindly: false,
    }
}

/// Latencies of a run, sorted.
struct Run {
    reads: Vec<u64>,
    writes: Vec<u64>,
    counts: Counts,
}

fn run(millis: u64, delay: u64, prepare: impl Fn(&mut World)) -> Run {
    let mut world = World::new(1, settings(delay), BufferPool::heap(2000, 64));
    world.stopwatch = Some(Stopwatch::default());
    prepare(&mut world);
    world.new_head();
    world.run_until_done(5_000 * MS, "it opens", World::open);
    world.start_load();
    world.run_until(world.now + millis * MS);
    world.submitting = false;
    world.slowness.fill(1);
    world.run_until_done(60_000 * MS, "all requests are answered", World::idle);
    let Stopwatch { mut reads, mut writes, .. } = world.stopwatch.take().unwrap();
    reads.sort_unstable();
    writes.sort_unstable();
    Run { reads, writes, counts: world.finish() }
}

fn percentile(sorted: &[u64], of_thousand: usize) -> u64 {
    sorted[(sorted.len() - 1) * of_thousand / 1000]
}

#[test]
fn one_slow_member_of_three_is_not_waited_for() {
    let healthy = run(1500, MS / 5, |_| {});
    let p99 = |run: &Run| (percentile(&run.reads, 990), percentile(&run.writes, 990));
    let (reads, writes) = p99(&healthy);
    eprintln!("healthy: p99 of {} reads {reads} ns, writes {writes} ns", healthy.reads.len());
    for slow in 0..3 {
        for times in [10, 100] {
            let run = run(1500, MS / 5, |world| world.slowness[slow] = times);
            let (slow_reads, slow_writes) = p99(&run);
            eprintln!(
                "member {slow} {times} times slower: p99 of {} reads {slow_reads} ns, p999 {} ns, \
                 writes {slow_writes} ns, {} commands to read",
                run.reads.len(),
                percentile(&run.reads, 999),
                run.counts["Read"],
            );
            assert!(slow_reads * 2 <= reads * 3, "reads wait for the slow member");
            assert!(slow_writes * 2 <= writes * 3, "writes wait for the slow member");
        }
    }
}

#[test]
fn a_read_that_is_late_is_asked_of_another() {
    let usual = run(1500, MS / 5, |_| {});
    let hiccups = run(1500, MS / 5, |world| {
        world.stopwatch.as_mut().unwrap().hiccups_one_in = Some(40);
    });
    let (p50, p99, p999) = (
        percentile(&hiccups.reads, 500),
        percentile(&hiccups.reads, 990),
        percentile(&hiccups.reads, 999),
    );
    let (reads, commands) = (hiccups.reads.len() as u64, hiccups.counts["Read"]);
    eprintln!(
        "one read in 40 takes 20 ms on average: p50 {p50} ns, p99 {p99} ns, p999 {p999} ns; \
         {commands} commands for {reads} reads"
    );
    assert!(p50 < 2 * percentile(&usual.reads, 500), "the rest are not slower");
    assert!(p99 < 3 * MS, "late after a few times the mean, then answered by another");
    assert!(commands < reads + reads / 8, "second opinions are few");
}

#[test]
fn a_slow_member_is_noticed_announced_and_comes_back() {
    for member in 0..3 {
        let mut world = World::new(3, settings(MS), BufferPool::heap(2000, 64));
        world.new_head();
        world.run_until_done(5_000 * MS, "it opens", World::open);
        world.start_load();
        world.run_until(world.now + 500 * MS);
        let slow = |world: &World, member: usize| {
            let status = world.head().unwrap().head.status();
            let status = status.members.iter().find(|status| status.server == server_id(member));
            status.unwrap().slow_since.is_some()
        };
        assert!((0..3).all(|member| !slow(&world, member)));
        world.slowness[member] = 60;
        let began = world.now;
        world.run_until_done(3_000 * MS, "it is noticed", |world| slow(world, member));
        assert!(world.now - began > 1_000 * MS, "not at the first slow answer");
        assert_eq!(world.counts["member slow"], 1);
        world.run_until(world.now + 2_000 * MS);
        assert!((0..3).all(|other| slow(&world, other) == (other == member)));
        world.slowness[member] = 1;
        let began = world.now;
        world.run_until_done(20_000 * MS, "it comes back", |world| !slow(world, member));
        assert!(world.now - began > 5_000 * MS, "not at the first fast answer");
        assert_eq!((world.counts["member slow"], world.counts["member fast"]), (1, 1));
        world.submitting = false;
        world.run_until_done(60_000 * MS, "all requests are answered", World::idle);
        world.finish();
    }
}
