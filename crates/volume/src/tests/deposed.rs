//! Heads that were deposed and do not know it: cut off, stopped, slow. Whatever they answer must be
//! what was acknowledged last. `HOLDFAST_SEED=n` replays one world.

use base::{BufferPool, Durability};

use super::random::number;
use super::settings::{Settings, quick};
use super::world::{Counts, MS, Random, World};
use crate::Input;

fn settings(seed: u64) -> Settings {
    let mut random = Random::new(seed ^ 0x9a17);
    Settings {
        members: [1, 2, 3, 3, 3, 5][random.index(6)],
        durability: Durability::Flush,
        // Reads of what undecided writes touch wait with those.
        blocks: [16, 64][random.index(2)],
        depth: [2, 8][random.index(2)],
        tunables: quick(),
        delay: [MS / 2, 2 * MS][random.index(2)],
        slow: None,
        bad: None,
        power_losses: false,
        greedy_trims: false,
        stall_deadline_ms: None,
        spares: None,
        grows: false,
        room: None,
        grants: true,
        deposes: true,
        untrue_head: false,
        untrue_members: false,
        drops_blindly: false,
    }
}

fn run(seed: u64, settings: Settings, buffers: &BufferPool) -> Counts {
    let mut world = World::new(seed, settings, buffers.clone());
    world.new_head();
    world.start_load();
    world.start_faults();
    world.run_until(3_000 * MS);
    world.calm_down();
    world.run_until_done(60_000 * MS, "all requests are answered", World::idle);
    world.finish()
}

/// Runs worlds until one fails; its seed, and what it said.
fn first_failure(
    seeds: core::ops::Range<u64>,
    change: impl Fn(&mut Settings),
    counts: &mut Counts,
) -> Option<(u64, String)> {
    for seed in seeds {
        let mut settings = settings(seed);
        change(&mut settings);
        let buffers = BufferPool::heap(256, 64);
        let one = std::panic::AssertUnwindSafe(|| run(seed, settings, &buffers));
        let seen = match std::panic::catch_unwind(one) {
            Ok(seen) => seen,
            Err(panic) => {
                return Some((seed, panic.downcast_ref::<String>().cloned().unwrap_or_default()));
            }
        };
        for (what, times) in seen {
            *counts.entry(what).or_default() += times;
        }
    }
    None
}

#[test]
fn deposed_heads_show_nothing_out_of_date() {
    let mut counts = Counts::new();
    if let Some(seed) = number("HOLDFAST_SEED") {
        eprintln!("{:?}", settings(seed));
        eprintln!("{:?}", run(seed, settings(seed), &BufferPool::heap(256, 64)));
        return;
    }
    let seeds = number("HOLDFAST_SEEDS").unwrap_or(40);
    let first = number("HOLDFAST_FIRST_SEED").unwrap_or(0);
    let failed = first_failure(first..first + seeds, |_| {}, &mut counts);
    eprintln!("{seeds} worlds, {counts:?}");
    if let Some((seed, what)) = failed {
        panic!("{what}; again with: HOLDFAST_SEED={seed} cargo test -p volume deposed_heads");
    }
    if seeds >= 40 {
        for what in ["deposed read", "held seal", "cut off", "stopped", "superseded", "Renew"] {
            assert!(counts.contains_key(what), "no {what} in {seeds} worlds");
        }
    }
}

/// The test above finds heads that read without grants, and members that break theirs.
#[test]
fn reading_without_grants_is_noticed() {
    let head = |settings: &mut Settings| settings.untrue_head = true;
    let members = |settings: &mut Settings| settings.untrue_members = true;
    let caught = [
        first_failure(0..40, head, &mut Counts::new()),
        first_failure(0..40, members, &mut Counts::new()),
    ];
    eprintln!("caught with seeds {caught:?}");
    for caught in caught {
        let (_, what) = caught.expect("caught");
        assert!(what.contains("was acknowledged or seen before"), "{what}");
    }
}

#[test]
fn a_head_that_was_stopped_reads_nothing_and_says_once_that_it_is_over() {
    for seed in 0..10 {
        let mut settings = settings(seed);
        settings.deposes = false;
        let buffers = BufferPool::heap(256, 64);
        let mut world = World::new(seed, settings, buffers);
        let old = world.new_head();
        world.start_load();
        world.run_until_done(5_000 * MS, "it opens", World::open);
        world.stop(old, 10_000 * MS);
        world.new_head();
        world.run_until_done(5_000 * MS, "the next one opens", World::open);
        let before = world.counts.get("deposed read").copied();
        // It is asked while it is stopped, and finds that together with all the rest.
        world.run_until(world.now + 9_000 * MS);
        assert!(!world.heads[old].as_ref().unwrap().ended);
        world.run_until(world.now + 3_000 * MS);
        assert!(world.heads[old].as_ref().unwrap().ended, "seed {seed}");
        assert_eq!(world.counts.get("deposed read").copied(), before, "seed {seed}");
        assert_eq!(world.counts.get("superseded"), Some(&1), "seed {seed}");
        world.submitting = false;
        world.run_until_done(60_000 * MS, "all requests are answered", World::idle);
        let current = world.current();
        world.input(current, Input::Release);
        world.run_until(world.now + 2_000 * MS);
        world.finish();
    }
}

/// Another head need not wait for what the one that rests was granted, and the guest goes on there.
fn the_next_one_opens_at_once(mut world: World, seed: u64) {
    let (begun, held) = (world.now, world.counts.get("held seal").copied());
    world.new_head();
    world.run_until_done(5_000 * MS, "the next one opens", World::open);
    assert_eq!(world.counts.get("held seal").copied(), held, "seed {seed}");
    let waited = world.now - begun;
    assert!(waited < base::limits::GRANT_MS * MS, "seed {seed}: {} ms", waited / MS);
    world.start_load();
    world.run_until(world.now + 500 * MS);
    world.submitting = false;
    world.run_until_done(60_000 * MS, "all requests are answered", World::idle);
    let current = world.current();
    world.input(current, Input::Release);
    world.run_until(world.now + 2_000 * MS);
    world.finish();
}

/// One that was opened for a guest that has not come yet is in nobody's way either.
#[test]
fn a_head_that_rests_from_the_beginning_makes_way_at_once() {
    for seed in 0..10 {
        let mut settings = settings(seed);
        settings.deposes = false;
        let mut world = World::new(seed, settings, BufferPool::heap(256, 64));
        let old = world.new_head();
        world.input(old, Input::Rest);
        world.run_until_done(5_000 * MS, "it opens", World::open);
        world.run_until(world.now + 50 * MS);
        the_next_one_opens_at_once(world, seed);
    }
}

/// A head that rests gives back what it was granted: the next one opens without waiting for that. And
/// until somebody else seals, it goes on as if nothing had been.
#[test]
fn a_head_that_rests_makes_way_at_once() {
    for seed in 0..10 {
        let mut settings = settings(seed);
        settings.deposes = false;
        let mut world = World::new(seed, settings, BufferPool::heap(256, 64));
        let old = world.new_head();
        world.start_load();
        world.run_until_done(5_000 * MS, "it opens", World::open);
        for _ in 0..3 {
            world.run_until(world.now + 100 * MS);
            world.submitting = false;
            world.run_until_done(60_000 * MS, "all requests are answered", World::idle);
            world.input(old, Input::Rest);
            // What was acknowledged is put on media meanwhile, and members are told: each time they
            // are released again.
            world.run_until(world.now + 300 * MS);
            world.start_load();
        }
        assert!(!world.heads[old].as_ref().unwrap().ended, "seed {seed}");
        world.submitting = false;
        world.run_until_done(60_000 * MS, "all requests are answered", World::idle);
        world.input(old, Input::Rest);
        world.run_until(world.now + 300 * MS);
        the_next_one_opens_at_once(world, seed);
    }
}

/// One that has rested counts on nothing that it gave back: it is cut off with a single member when the next
/// one opens and the guest writes there, and what it is asked for again has to wait.
#[test]
fn a_head_that_rested_reads_nothing_by_grants_it_gave_back() {
    for seed in 0..10 {
        let mut settings = settings(seed);
        (settings.members, settings.deposes) = (if seed % 2 == 0 { 3 } else { 5 }, false);
        let mut world = World::new(seed, settings, BufferPool::heap(256, 64));
        let old = world.new_head();
        world.start_load();
        world.run_until_done(5_000 * MS, "it opens", World::open);
        world.run_until(world.now + 100 * MS);
        world.submitting = false;
        world.run_until_done(60_000 * MS, "all requests are answered", World::idle);
        world.input(old, Input::Rest);
        // Less than a grant lasts: by its clock it could still count on all that it had.
        world.run_until(world.now + 60 * MS);
        let (own, apart) = (world.settings.members - 1, 500 * MS);
        for server in 0..own {
            world.stall_link(old, server, apart);
        }
        world.apart = Some((own, world.now + apart));
        let (begun, before) = (world.now, world.counts.get("deposed read").copied());
        world.new_head();
        world.run_until_done(5_000 * MS, "the next one opens", World::open);
        assert!(world.now - begun < 80 * MS, "seed {seed}: {} ms", (world.now - begun) / MS);
        world.start_load();
        world.run_until(begun + apart - 50 * MS);
        assert_eq!(world.counts.get("deposed read").copied(), before, "seed {seed}");
        world.run_until(begun + 2 * apart);
        assert!(world.heads[old].as_ref().unwrap().ended, "seed {seed}");
        world.submitting = false;
        world.run_until_done(60_000 * MS, "all requests are answered", World::idle);
        let current = world.current();
        world.input(current, Input::Release);
        world.run_until(world.now + 2_000 * MS);
        world.finish();
    }
}

/// A head that is released has the last word at every member: the next one opens without waiting for what was
/// granted, whatever the old one still had to tell them when the release began.
#[test]
fn a_head_that_is_released_makes_way_at_once() {
    for seed in 0..300 {
        let mut settings = settings(seed);
        settings.deposes = false;
        let mut world = World::new(seed, settings, BufferPool::heap(256, 64));
        let old = world.new_head();
        world.start_load();
        world.run_until_done(5_000 * MS, "it opens", World::open);
        world.run_until(world.now + (100 + seed % 200) * MS);
        world.submitting = false;
        world.input(old, Input::Release);
        world.run_until_done(5_000 * MS, "the next one opens", |world| {
            world.current() > old && world.open()
        });
        assert_eq!(world.counts.get("held seal"), None, "seed {seed}");
        world.run_until_done(60_000 * MS, "all requests are answered", World::idle);
        let current = world.current();
        world.input(current, Input::Release);
        world.run_until(world.now + 2_000 * MS);
        world.finish();
    }
}
