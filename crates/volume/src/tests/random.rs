//! Random worlds. `HOLDFAST_SEED=n` replays one, `HOLDFAST_SEEDS=n` runs so many.

use base::{BufferPool, Durability, Role};

use super::model::{touches, values_of};
use super::oracle::{Answers, Asked};
use super::settings::{Settings, quick};
use super::world::{Counts, MS, Random, World, index_of};
use crate::{HeadPhase, Input, MemberMode, Tunables};

pub(super) fn settings(seed: u64) -> Settings {
    let mut random = Random::new(seed ^ 0xabcd);
    let members = [1, 2, 3, 3, 3, 5][random.index(6)];
    let rough = members >= 3;
    let bad = (rough && random.one_in(3)).then(|| random.index(members));
    let greedy_trims = bad.is_none() && random.one_in(8);
    Settings {
        members,
        durability: if random.one_in(4) { Durability::Durable } else { Durability::Flush },
        blocks: [4, 16, 64][random.index(3)],
        depth: [1, 4, 16, 32][random.index(4)],
        tunables: if random.one_in(2) { quick() } else { Tunables::default() },
        delay: [MS / 20, MS / 2, 4 * MS][random.index(3)],
        slow: random.one_in(3).then(|| random.index(members)),
        bad,
        power_losses: bad.is_none() && random.one_in(2),
        greedy_trims,
        stall_deadline_ms: random.one_in(8).then(|| 20 + random.below(400)),
        grants: false,
        deposes: false,
        untrue_head: false,
        untrue_members: false,
        drops_blindly: false,
        spares: None,
        grows: random.one_in(3),
        room: None,
    }
}

/// Worlds in which members' logs are often full.
fn full_settings(seed: u64) -> Settings {
    let mut random = Random::new(seed ^ 0x2468);
    let mut settings = settings(seed);
    settings.members = [1, 2, 3, 3, 3, 5][random.index(6)];
    settings.bad = None;
    settings.slow = random.one_in(4).then(|| random.index(settings.members));
    settings.greedy_trims = false;
    settings.power_losses = false;
    settings.stall_deadline_ms = None;
    settings.depth = [4, 16, 32][random.index(3)];
    settings.room = Some([3, 8, 20][random.index(3)]);
    settings
}

/// Worlds in which members come and go.
fn changing_settings(seed: u64) -> Settings {
    let mut random = Random::new(seed ^ 0x1357);
    let mut settings = settings(seed);
    settings.members = [1, 2, 2, 3, 3, 3, 5][random.index(7)];
    settings.spares = Some(1 + random.index(2));
    settings.bad = None;
    settings.slow = random.one_in(4).then(|| random.index(settings.members));
    settings.greedy_trims = random.one_in(2);
    settings.power_losses = random.one_in(3);
    settings.blocks = [4, 16][random.index(2)];
    if random.one_in(2) {
        settings.tunables.log_copy_records = random.below(30);
        settings.tunables.fill_interval = core::time::Duration::from_millis(5);
    }
    if !settings.power_losses && !settings.greedy_trims && random.one_in(2) {
        settings.room = Some([3, 8, 20][random.index(3)]);
    }
    settings
}

impl World {
    /// What every block must hold by the members' settled records.
    pub(super) fn replayed(&self) -> Vec<u64> {
        let members = self.record.0.in_sync().map(|server| &self.servers[index_of(server)]);
        let longest = members.max_by_key(|server| server.model.last()).unwrap();
        let mut blocks = vec![0; usize::try_from(self.size).unwrap()];
        for entry in &longest.model.log {
            for (lba, block) in blocks.iter_mut().enumerate() {
                if touches(&entry.header, lba) {
                    *block = entry.value;
                }
            }
        }
        blocks
    }

    /// Asserts that all members hold the same log.
    pub(super) fn check_converged(&self) {
        let members = self.record.0.members.iter().map(|member| index_of(member.server));
        let mut logs = members.map(|index| &self.servers[index].model.log);
        let first = logs.next().expect("a member");
        for log in logs {
            assert_eq!(log.len(), first.len());
            assert!(log == first, "logs are the same");
        }
    }
}

/// Runs one world to its end.
pub(super) fn run(seed: u64, mut settings: Settings, buffers: &BufferPool) -> (Counts, Answers) {
    // Where it is not too long to wait for them.
    settings.grants = settings.delay >= MS && seed.is_multiple_of(2);
    let (delay, greedy) = (settings.delay, settings.greedy_trims);
    let mut world = World::new(seed, settings, buffers.clone());
    world.oracle.errors_allowed = world.settings.stall_deadline_ms.is_some();
    world.new_head();
    world.start_load();
    world.start_faults();
    let length = 100 + world.random.below(900);
    world.run_until(length * delay);
    world.calm_down();
    if world.settings.power_losses {
        mend(&mut world);
    }
    let changing = world.settings.spares.is_some();
    if greedy && !changing && !settles(&mut world) {
        world.count("stranded by greedy trims");
        return (world.finish(), Answers::default());
    }
    world.run_until_done(60_000 * MS, "all requests are answered", World::idle);
    world.run_until_done(60_000 * MS, "the new size is served", |world| {
        world.served(world.current()) as u64 == world.size
    });
    check_content(&mut world);
    if !greedy || changing {
        let live = |world: &World| {
            let status = world.head().unwrap().head.status();
            let caught_up = |member: &crate::MemberStatus| {
                member.mode == MemberMode::Live
                    && member.last == status.last.seq
                    && member.role == Role::InSync
            };
            world.mended() && status.members.iter().all(caught_up)
        };
        world.run_until_done(60_000 * MS, "all members are live", live);
        world.check_converged();
    }
    let current = world.current();
    world.input(current, Input::Release);
    world.run_until_done(5_000 * MS, "the head is released", |world| {
        world.phase() != Some(HeadPhase::Releasing)
    });
    let answers = world.oracle.answers;
    (world.finish(), answers)
}

/// What was acknowledged but not settled may be lost with the power of enough members, and then
/// the head that acknowledged it rather waits for ever. Another head takes what is there.
fn mend(world: &mut World) {
    let end = world.now + 10_000 * MS;
    while world.now < end && !world.idle() {
        world.step();
    }
    if !world.idle() {
        world.count("lost with the power");
        world.crash_head(1);
    }
}

/// Members may have trimmed what others need, which only a chunk copy can mend. False if that left no
/// quorum.
fn settles(world: &mut World) -> bool {
    let end = world.now + 20_000 * MS;
    while world.now < end && !world.idle() {
        world.step();
    }
    if world.idle() {
        return true;
    }
    let status = world.head().unwrap().head.status();
    let behind = |member: &&crate::MemberStatus| member.mode == MemberMode::TooFarBehind;
    let lost = status.members.iter().filter(behind).count();
    assert!(
        status.members.len() - lost < base::membership::write_quorum(status.members.len()),
        "stalled for another reason: {status} {status:?}"
    );
    false
}

/// Every block reads as the settled log says.
fn check_content(world: &mut World) {
    let expected = world.replayed();
    for (lba, value) in expected.iter().enumerate() {
        // A slow member may still hold the buffers of what it was sent.
        let end = world.now + 60_000 * MS;
        while !world.request(Asked::Read, lba, 1) {
            assert!(world.step() && world.now < end, "buffers come back");
        }
        world.run_until_done(60_000 * MS, "a read is answered", World::idle);
        let reply = world.last_reply.take().unwrap();
        if reply.status != base::Status::Ok {
            assert!(world.oracle.errors_allowed); // a slow member and a short stall deadline
            continue;
        }
        assert_eq!(values_of(reply.data.unwrap().bytes()), [*value], "block {lba}");
    }
}

pub(super) fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().expect("a number"))
}

/// Runs many worlds, or the one that the environment names.
fn worlds(name: &str, settings: impl Fn(u64) -> Settings, seeds: u64, wanted: &[&str]) {
    let buffers = BufferPool::heap(128, 64);
    if let Some(seed) = number("HOLDFAST_SEED") {
        eprintln!("{:?}", settings(seed));
        eprintln!("{:?}", run(seed, settings(seed), &buffers));
        return;
    }
    let standard = seeds;
    let seeds = number("HOLDFAST_SEEDS").unwrap_or(seeds);
    let first = number("HOLDFAST_FIRST_SEED").unwrap_or(0);
    let mut counts = Counts::new();
    let mut answers = Answers::default();
    for seed in first..first + seeds {
        let one = std::panic::AssertUnwindSafe(|| run(seed, settings(seed), &buffers));
        let result = std::panic::catch_unwind(one);
        let Ok((seen, answered)) = result else {
            panic!("failed; again with: HOLDFAST_SEED={seed} cargo test -p volume {name}")
        };
        for (what, times) in seen {
            *counts.entry(what).or_default() += times;
        }
        answers.reads += answered.reads;
        answers.writes += answered.writes;
        answers.flushes += answered.flushes;
        answers.errors += answered.errors;
    }
    eprintln!("{seeds} worlds, {answers:?}\n{counts:?}");
    if seeds >= standard {
        for what in wanted {
            let reached = counts.get(what).is_some_and(|times| *times > 0);
            assert!(reached, "no {what} in {seeds} worlds");
        }
    }
}

#[test]
fn random_worlds() {
    let wanted = [
        "Append",
        "Scan",
        "Truncate",
        "Trim",
        "Release",
        "truncated",
        "superseded",
        "released",
        "damaged",
        "returned",
        "injected error",
        "power loss",
        "server crash",
        "head crash",
        "takeover",
        "stalled",
        "resumed",
        "grown",
        "resized",
        "Grow",
    ];
    worlds("random_worlds", settings, 300, &wanted);
}

#[test]
fn random_full_logs() {
    let wanted =
        ["append that waits for room", "append dropped before it had room", "truncated", "Scan"];
    worlds("random_full_logs", full_settings, 300, &wanted);
}

#[test]
fn random_memberships() {
    let wanted = [
        "Install",
        "agreed",
        "answer lost",
        "change died with its head",
        "change outlived its head",
        "changed",
        "conflict",
        "deleted",
        "durable records lost",
        "filled",
        "refused: no quorum",
        "refused: not caught up",
        "refused: not open",
        "refused: not settled",
    ];
    worlds("random_memberships", changing_settings, 200, &wanted);
}
