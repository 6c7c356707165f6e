//! Replicas that other servers fill: what comes, what it costs, what interrupts it.

use core::time::Duration;

use base::{FillPhase, Role, ShardRecord};
use node::metrics::FillCounters;
use node::{FillEvent, FillFailure, HeadHandle};

use crate::harness::{CHUNK_BLOCKS, Cluster, KEY, Setup, shard};

const CHUNK_BYTES: u64 = CHUNK_BLOCKS * 4096;
/// Blocks of the largest write.
const WRITE_BLOCKS: u32 = 32;

/// Two members in sync, and a third of another role.
fn third(role: Role) -> ShardRecord {
    shard(&[(0, Role::InSync), (1, Role::InSync), (2, role)])
}

/// Two members in sync.
fn pair() -> ShardRecord {
    shard(&[(0, Role::InSync), (1, Role::InSync)])
}

/// Writes every block.
fn write_everything(cluster: &mut Cluster, at: usize, head: HeadHandle, blocks: u64) {
    for lba in (0..blocks).step_by(WRITE_BLOCKS as usize) {
        cluster.write(at, head, lba, WRITE_BLOCKS);
    }
}

/// Writes to the first `chunks` chunks until no log reaches back to before.
fn roll_logs(cluster: &mut Cluster, at: usize, head: HeadHandle, chunks: u64) {
    for index in 0..400 {
        cluster.write(at, head, index % chunks * CHUNK_BLOCKS, 16);
    }
    cluster.run_for(Duration::from_secs(2));
}

/// A cluster whose first two servers hold data that is home, of which no log has the beginning.
fn with_data(setup: Setup) -> (Cluster, usize, HeadHandle) {
    let mut cluster = Cluster::new(setup);
    let at = cluster.diskless();
    let head = cluster.open_head(at, pair());
    write_everything(&mut cluster, at, head, setup.blocks);
    cluster.discard(at, head, 2 * CHUNK_BLOCKS, 32);
    cluster.discard(at, head, 5 * CHUNK_BLOCKS + 3, 5);
    roll_logs(&mut cluster, at, head, 2);
    (cluster, at, head)
}

fn add_third(cluster: &mut Cluster, at: usize, head: HeadHandle) {
    let now = cluster.now;
    cluster.node_mut(at).members_changed(now, head, &third(Role::CatchingUp));
}

fn chunks_copied(cluster: &Cluster) -> u64 {
    cluster.counters(2).fills.chunks
}

#[test]
fn a_replica_that_is_filled_under_writes_equals_its_source() {
    let (mut cluster, at, head) = with_data(Setup { blocks: 2048, ..Setup::default() });
    add_third(&mut cluster, at, head);
    let mut lba = 7;
    while !cluster.member(at, head, 2).caught_up {
        lba = (lba * 31 + 17) % 2000;
        cluster.write(at, head, lba, 3);
        if lba % 5 == 0 {
            cluster.discard(at, head, lba, 40);
        }
        cluster.run_for(Duration::from_micros(500));
    }
    let fills = cluster.counters(2).fills;
    assert!(fills.chunks > 100, "{fills:?}");
    // The head may find out only by trying that no log reaches back so far.
    for event in cluster.fills(2) {
        match event {
            FillEvent::Started { .. } => {}
            FillEvent::Done { bytes } => assert_eq!(*bytes, fills.chunk_bytes + fills.log_bytes),
            FillEvent::Failed { failure } => assert_eq!(*failure, FillFailure::Trimmed),
        }
    }
    // From now on it gets what the others get.
    cluster.write(at, head, 0, 32);
    cluster.run("to catch up again", |c| c.member(at, head, 2).lag == Some(0));
    cluster.release(at, head);
    for index in 0..3 {
        cluster.check_replica(index);
    }
}

#[test]
fn a_server_that_was_away_costs_what_changed() {
    let blocks = 64 << 20 >> 12;
    let mut cluster = Cluster::new(Setup { blocks, ..Setup::default() });
    let at = cluster.diskless();
    let head = cluster.open_head(at, third(Role::InSync));
    write_everything(&mut cluster, at, head, blocks);
    cluster.run_for(Duration::from_secs(2));
    cluster.kill(2);
    roll_logs(&mut cluster, at, head, 3);
    // It does not count any more, so it may be filled.
    let now = cluster.now;
    let record = third(Role::CatchingUp);
    cluster.node_mut(at).change_members(now, head, &record).expect("two hold everything");
    cluster.node_mut(at).members_changed(now, head, &record);
    cluster.start(2);
    cluster.run("to catch up", |c| c.member(at, head, 2).caught_up);
    let FillCounters { chunk_bytes, log_bytes, list_bytes, chunks, .. } = cluster.counters(2).fills;
    let cost = chunk_bytes + log_bytes + list_bytes;
    println!("64 MiB, 3 chunks changed: {chunk_bytes} + {log_bytes} + {list_bytes} = {cost} bytes");
    assert_eq!((chunks, chunk_bytes), (3, 3 * CHUNK_BYTES));
    assert!(log_bytes + list_bytes <= 64 * 1024, "log {log_bytes}, lists {list_bytes}");
    cluster.release(at, head);
    cluster.check_replica(2);
}

#[test]
fn what_was_copied_stays_whatever_interrupts() {
    let setup = Setup { blocks: 2048, fill_bytes_per_second: 2 << 20, ..Setup::default() };
    let (mut cluster, at, mut head) = with_data(setup);
    add_third(&mut cluster, at, head);
    cluster.run("to copy a quarter", |c| chunks_copied(c) >= 32);
    let progress = cluster.node(2).fills().next().expect("a fill").1;
    assert_eq!(progress.phase, FillPhase::Chunks);
    assert!(progress.total_bytes > progress.copied_bytes && progress.copied_bytes > 0);
    // The source's sessions go, then the target dies, then another head comes.
    cluster.reset_connections(2, 0);
    cluster.reset_connections(2, 1);
    cluster.run("to copy half", |c| chunks_copied(c) >= 64);
    let before = cluster.counters(2).fills;
    cluster.kill(2);
    cluster.start(2);
    cluster.run("to copy some more", |c| chunks_copied(c) >= 32);
    let state = cluster.node(2).store().and_then(|store| store.replica(KEY)).expect("it is there");
    assert!(state.state.filling);
    cluster.release(at, head);
    head = cluster.open_head(at, third(Role::CatchingUp));
    cluster.run("to catch up", |c| c.member(at, head, 2).caught_up);
    let after = cluster.counters(2).fills;
    let chunks = before.chunks + after.chunks;
    let bytes = before.chunk_bytes + after.chunk_bytes;
    let total = 2048 / CHUNK_BLOCKS;
    // What is under way when it is interrupted comes again.
    assert!(chunks <= total + 24, "{chunks} chunks of {total}");
    assert!(bytes <= (total + 24) * CHUNK_BYTES, "{bytes} bytes");
    cluster.release(at, head);
    cluster.check_replica(2);
}

#[test]
fn a_fill_whose_source_forgets_the_log_makes_another_pass() {
    let setup = Setup { blocks: 2048, fill_bytes_per_second: 4 << 20, ..Setup::default() };
    let (mut cluster, at, head) = with_data(setup);
    add_third(&mut cluster, at, head);
    cluster.run("to copy a little", |c| chunks_copied(c) >= 8);
    for index in 0..400 {
        cluster.write(at, head, index % 20 * CHUNK_BLOCKS, 16);
    }
    cluster.run("to catch up", |c| c.member(at, head, 2).caught_up);
    let fills = cluster.counters(2).fills;
    let total = 2048 / CHUNK_BLOCKS;
    assert!(fills.chunks > total, "a chunk was copied twice: {fills:?}");
    assert!(fills.chunks < total + 80, "and not all of them: {fills:?}");
    cluster.release(at, head);
    cluster.check_replica(2);
}

#[test]
fn a_log_within_reach_is_copied_without_chunks() {
    let mut cluster = Cluster::new(Setup { blocks: 2048, ..Setup::default() });
    let at = cluster.diskless();
    let head = cluster.open_head(at, third(Role::InSync));
    write_everything(&mut cluster, at, head, 512);
    cluster.run_for(Duration::from_secs(1));
    cluster.kill(2);
    for index in 0..300 {
        cluster.write(at, head, index * 5 % 2000, 2);
    }
    cluster.start(2);
    cluster.run("to catch up", |c| c.member(at, head, 2).caught_up);
    let fills = cluster.counters(2).fills;
    assert!(fills.records >= 200 && fills.records < 320, "{fills:?}");
    assert!(fills.log_bytes <= 320 * 8192 && fills.chunk_bytes == 0, "{fills:?}");
    cluster.release(at, head);
    cluster.check_replica(2);
}

#[test]
fn a_source_that_dies_is_replaced_by_another() {
    let setup = Setup { blocks: 2048, fill_bytes_per_second: 4 << 20, ..Setup::default() };
    let (mut cluster, at, head) = with_data(setup);
    add_third(&mut cluster, at, head);
    cluster.run("to copy a little", |c| chunks_copied(c) >= 8);
    let source = (0..2).find(|index| cluster.node(2).is_peer_up(crate::harness::server(*index)));
    cluster.kill(source.expect("it reads from one of them"));
    cluster.run("to catch up", |c| c.node(2).counters().fills.done > 0);
    assert!(chunks_copied(&cluster) <= 2048 / CHUNK_BLOCKS + 8);
    cluster.start(source.expect("as above"));
    cluster.run("to catch up", |c| c.member(at, head, 2).caught_up);
    cluster.release(at, head);
    cluster.check_replica(2);
}

/// Numbers that a seed decides.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        (self.0 >> 33) % bound
    }
}

/// A fill under everything that can happen to it: writes, discards, logs that roll, sessions and
/// processes that go, heads that come.
fn random_fill(seed: u64) -> u64 {
    const BLOCKS: u64 = 1024;
    let setup = Setup { blocks: BLOCKS, fill_bytes_per_second: 2 << 20, ..Setup::default() };
    let (mut cluster, mut at, mut head) = with_data(setup);
    add_third(&mut cluster, at, head);
    let mut random = Random(seed);
    let mut starts = 0;
    for _ in 0..60 {
        match random.below(12) {
            0..5 => {
                for _ in 0..random.below(20) {
                    let blocks = 1 + random.below(u64::from(WRITE_BLOCKS));
                    let lba = random.below(BLOCKS - blocks);
                    let blocks = u32::try_from(blocks).expect("a few");
                    if random.below(6) == 0 {
                        cluster.discard(at, head, lba, blocks);
                    } else {
                        cluster.write(at, head, lba, blocks);
                    }
                }
            }
            5 | 6 => cluster.reset_connections(2, usize::from(random.below(2) == 0)),
            7 | 8 => {
                let victim = usize::try_from(random.below(3)).expect("a machine");
                starts += cluster.counters(2).fills.started;
                cluster.kill(victim);
                cluster.run_for(Duration::from_millis(random.below(100)));
                cluster.start(victim);
                if victim == at {
                    head = cluster.open_head(at, third(Role::CatchingUp));
                }
            }
            9 => {
                at = usize::try_from(random.below(4)).expect("a machine");
                if let Some(old) = cluster.node(at).head_of(KEY.volume) {
                    cluster.release(at, old);
                }
                head = cluster.open_head(at, third(Role::CatchingUp));
            }
            10 => {
                cluster.cut(2, usize::from(random.below(2) == 0));
                cluster.run_for(Duration::from_millis(random.below(8000)));
                cluster.mend();
            }
            _ => cluster.run_for(Duration::from_millis(random.below(2000))),
        }
        cluster.run_for(Duration::from_millis(random.below(40)));
    }
    cluster.run("to catch up", |c| c.member(at, head, 2).caught_up);
    cluster.check_content(at, head);
    cluster.release(at, head);
    for index in 0..3 {
        cluster.check_replica(index);
    }
    starts + cluster.counters(2).fills.started
}

#[test]
fn a_fill_ends_well_whatever_happens() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let base = number("NODE_SEED_BASE").unwrap_or(1);
    let mut started = 0;
    for seed in base..base + number("NODE_SEEDS").unwrap_or(4) {
        println!(
            "seed {seed}; replay: NODE_SEED_BASE={seed} NODE_SEEDS=1 cargo test -p node --test \
             cluster whatever_happens"
        );
        started += random_fill(seed);
    }
    assert!(started > 4, "fills were interrupted");
}
