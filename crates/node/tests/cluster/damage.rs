//! What a scrub finds while nobody has the volume opened is kept in mind, and mended by whoever opens it.

use core::time::Duration;

use base::{Role, ShardRecord};
use node::HeadEvent;

use crate::harness::{Cluster, KEY, Setup, server, shard};

fn members() -> ShardRecord {
    shard(&[(0, Role::InSync), (1, Role::InSync), (2, Role::InSync)])
}

/// A cluster whose volume nobody has opened, and whose replica on 0 cannot read so many blocks.
fn rotten(blocks: usize) -> Cluster {
    let setup = Setup { scrub_bytes_per_second: 64 << 20, ..Setup::default() };
    let mut cluster = Cluster::new(setup);
    let at = cluster.diskless();
    let head = cluster.open_head(at, members());
    for chunk in 0..16 {
        cluster.write(at, head, chunk * 16, 16);
    }
    cluster.run_for(Duration::from_secs(3));
    cluster.release(at, head);
    for number in 0..blocks {
        // Apart, so that they are found apart.
        assert!(cluster.rot(0, number * 2), "block {} is home", number * 2);
    }
    let damaged = u64::try_from(blocks).expect("few");
    cluster.run("to find the rot", |c| c.node(0).damaged_blocks(KEY) == damaged);
    cluster
}

fn mended(cluster: &Cluster, at: usize, head: node::HeadHandle) -> u32 {
    let of = |event: HeadEvent| match event {
        HeadEvent::Mended { server: at, blocks, .. } => {
            assert_eq!(at, server(0));
            blocks.0
        }
        _ => 0,
    };
    cluster.events(at, head).into_iter().map(of).sum()
}

#[test]
fn what_was_found_while_nobody_was_there_is_mended_by_the_next_head() {
    // A head in the process of the replica, and one elsewhere.
    for local in [true, false] {
        let mut cluster = rotten(3);
        cluster.run_for(Duration::from_secs(5));
        assert_eq!(cluster.node(0).damaged_blocks(KEY), 3, "nobody writes");
        let at = if local { 0 } else { cluster.diskless() };
        let head = cluster.open_head(at, members());
        cluster.run("to mend", |c| c.node(0).damaged_blocks(KEY) == 0 && mended(c, at, head) == 3);
        cluster.check_content(at, head);
        cluster.release(at, head);
        cluster.check_replica(0);
    }
}

#[test]
fn a_head_is_told_of_more_as_it_gets_on() {
    let mut cluster = rotten(40);
    let at = cluster.diskless();
    // The first one is gone before it has done much.
    let first = cluster.open_head(at, members());
    cluster.run_for(Duration::from_millis(300));
    cluster.release(at, first);
    assert!(mended(&cluster, at, first) < 40);
    let head = cluster.open_head(at, members());
    cluster.run("to mend", |c| c.node(0).damaged_blocks(KEY) == 0);
    cluster.check_content(at, head);
    cluster.release(at, head);
    cluster.check_replica(0);
}

#[test]
fn what_could_not_be_written_again_is_not_forgotten() {
    for local in [true, false] {
        let mut cluster = rotten(3);
        let at = if local { 0 } else { cluster.diskless() };
        let head = cluster.open_head(at, members());
        assert_eq!(cluster.node(0).damaged_blocks(KEY), 3, "it is not mended yet");
        cluster.refuse_writes(0);
        // A quorum has it, and the replica on 0 has not.
        cluster.write(at, head, 0, 16);
        cluster.run_for(Duration::from_secs(1));
        assert_eq!(cluster.node(0).damaged_blocks(KEY), 3, "head beside it: {local}");
    }
}
