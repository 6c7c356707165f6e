//! Read grants: when a new head may open, and what an old one may still read.

use core::time::Duration;

use base::limits::GRANT_MS;
use base::{Role, Status};
use node::{HeadEvent, Input};

use crate::harness::{Cluster, KEY, Setup, shard};

const GRANT: Duration = Duration::from_millis(GRANT_MS);

fn three() -> base::ShardRecord {
    shard(&[(0, Role::InSync), (1, Role::InSync), (2, Role::InSync)])
}

#[test]
fn a_head_that_is_cut_off_stops_reading_before_the_next_one_opens() {
    let mut cluster = Cluster::new(Setup::default());
    let at = cluster.diskless();
    let old = cluster.open_head(at, three());
    cluster.write(at, old, 0, 8);
    for server in 0..3 {
        cluster.cut(at, server);
    }
    let cut_at = cluster.now;
    let new = cluster.open_head(0, three());
    let waited = cluster.now.since(cut_at);
    assert!(waited >= GRANT * 9 / 10 && waited < 2 * GRANT, "opened after {waited:?}");
    let held: u64 = (0..3).map(|index| cluster.counters(index).seals_waited).sum();
    assert!(held >= 2, "members waited");
    // The old one holds its reads back, whatever became of the new one.
    let read = cluster.begin_read(at, old, 0);
    cluster.run_for(Duration::from_secs(2));
    assert_eq!(cluster.status(at, read), None, "nobody may answer that");
    cluster.write(0, new, 0, 8);
    // When it hears of the new head it ends.
    cluster.mend();
    cluster.run("to hear of the new head", |c| c.has_ended(at, old));
    assert_eq!(cluster.status(at, read), Some(Status::Superseded));
    cluster.check_content(0, new);
}

#[test]
fn a_head_that_released_is_not_waited_for() {
    let mut cluster = Cluster::new(Setup::default());
    let at = cluster.diskless();
    let old = cluster.open_head(at, three());
    cluster.write(at, old, 0, 8);
    cluster.release(at, old);
    let released_at = cluster.now;
    cluster.open_head(0, three());
    let took = cluster.now.since(released_at);
    assert!(took < GRANT / 2, "opened after {took:?}");
    assert_eq!((0..3).map(|index| cluster.counters(index).seals_waited).sum::<u64>(), 0);
}

#[test]
fn a_head_that_hears_that_it_was_deposed_is_not_waited_for() {
    for (state_messages, at_most) in [(true, GRANT / 4), (false, 2 * GRANT)] {
        let mut cluster = Cluster::new(Setup { state_messages, ..Setup::default() });
        let at = cluster.diskless();
        let old = cluster.open_head(at, three());
        cluster.write(at, old, 0, 8);
        // Until nothing of it is under way.
        cluster.run_for(GRANT / 8);
        let begun_at = cluster.now;
        let new = cluster.open_head(0, three());
        let took = cluster.now.since(begun_at);
        println!("taken over after {took:?}; state messages: {state_messages}");
        assert!(took < at_most && (state_messages || took > GRANT / 2), "{took:?}");
        cluster.check_content(0, new);
        // The same if the old one runs on a member, and has a flush under way, whose answer it hears first.
        cluster.write(0, new, 8, 8);
        let begun_at = cluster.now;
        cluster.open_head(1, three());
        let took = cluster.now.since(begun_at);
        assert!(took < at_most, "{took:?}");
    }
}

#[test]
fn a_member_that_restarted_counts_as_granted() {
    let mut cluster = Cluster::new(Setup::default());
    let at = cluster.diskless();
    let old = cluster.open_head(at, three());
    cluster.write(at, old, 0, 8);
    cluster.kill(at);
    cluster.run_for(Duration::from_secs(5));
    for index in 0..3 {
        cluster.kill(index);
        cluster.start(index);
    }
    let started_at = cluster.now;
    cluster.start(at);
    let new = cluster.begin_head(at, three());
    cluster.run_for(GRANT / 2);
    assert!(!cluster.is_open(at, new), "nobody remembers what was granted");
    cluster.run("to open a head", |c| c.is_open(at, new));
    let waited = cluster.now.since(started_at);
    assert!(waited < 2 * GRANT, "opened after {waited:?}");
    cluster.check_content(at, new);
}

#[test]
fn an_idle_head_hears_that_it_was_deposed_only_with_messages() {
    for state_messages in [true, false] {
        let mut cluster = Cluster::new(Setup { state_messages, ..Setup::default() });
        let at = cluster.diskless();
        let old = cluster.open_head(at, three());
        cluster.run_for(Duration::from_secs(1));
        let new = cluster.open_head(0, three());
        cluster.run_for(Duration::from_millis(10));
        let told = cluster
            .events(at, old)
            .iter()
            .any(|event| matches!(event, HeadEvent::Superseded { .. }));
        assert_eq!(told, state_messages);
        assert!(cluster.is_open(0, new));
    }
}

#[test]
fn a_replica_that_is_made_anew_refuses_heads_of_earlier_epochs() {
    let mut cluster = Cluster::new(Setup::default());
    let (block_size, blocks) = (base::BlockSize::B4096, 16);
    cluster.input(2, node::Input::DeleteReplica { tag: 2, key: KEY });
    cluster.run_for(Duration::from_millis(50));
    let epoch = base::Epoch(7);
    cluster.input(2, node::Input::CreateReplica { tag: 3, key: KEY, block_size, blocks, epoch });
    cluster.run_for(Duration::from_millis(50));
    let at = cluster.diskless();
    let head = cluster.begin_head(at, shard(&[(2, Role::InSync)]));
    cluster.run("to be refused", |c| c.has_ended(at, head));
    let deposed = |event: &HeadEvent| *event == HeadEvent::Superseded { sealed: epoch };
    assert!(cluster.events(at, head).iter().any(deposed));
}

/// A server with the only replica, and a head elsewhere that has just written there.
fn one_replica() -> (Cluster, usize, base::ShardRecord, node::HeadHandle) {
    let mut cluster = Cluster::new(Setup::default());
    let at = cluster.diskless();
    let members = shard(&[(0, Role::InSync)]);
    let head = cluster.open_head(at, members.clone());
    cluster.write(at, head, 0, 8);
    (cluster, at, members, head)
}

#[test]
fn a_pool_that_changes_hands_after_release_is_not_waited_for() {
    let (mut cluster, at, members, head) = one_replica();
    cluster.release(at, head);
    let legacy = cluster.hand_over(0);
    cluster.start_after(0, Some(legacy));
    let started_at = cluster.now;
    let new = cluster.open_head(at, members);
    let took = cluster.now.since(started_at);
    assert!(took < GRANT / 2, "opened after {took:?}");
    assert_eq!(cluster.counters(0).seals_waited, 0);
    cluster.check_content(at, new);
}

#[test]
fn a_pool_that_changes_hands_waits_for_what_it_granted() {
    let (mut cluster, at, members, head) = one_replica();
    cluster.cut(at, 0);
    let cut_at = cluster.now;
    let legacy = cluster.hand_over(0);
    assert!(legacy.grants.iter().any(|grant| grant.left > GRANT / 2), "{legacy:?}");
    cluster.start_after(0, Some(legacy));
    let new = cluster.open_head(0, members);
    let waited = cluster.now.since(cut_at);
    assert!(waited >= GRANT * 9 / 10 && waited < 2 * GRANT, "opened after {waited:?}");
    // The old one may have read until then, and not any more.
    let read = cluster.begin_read(at, head, 0);
    cluster.run_for(GRANT);
    assert_eq!(cluster.status(at, read), None, "nobody may answer that");
    cluster.mend();
    cluster.check_content(0, new);
}

#[test]
fn what_a_process_granted_in_between_is_waited_for() {
    let (mut cluster, at, members, head) = one_replica();
    cluster.release(at, head);
    let legacy = cluster.hand_over(0);
    // The next one serves, grants, and dies. What the one before had said is no longer true.
    cluster.start_after(0, Some(legacy.clone()));
    let second = cluster.open_head(at, members.clone());
    cluster.write(at, second, 0, 8);
    cluster.cut(at, 0);
    let cut_at = cluster.now;
    cluster.kill(0);
    cluster.start_after(0, Some(legacy));
    let third = cluster.open_head(0, members);
    let waited = cluster.now.since(cut_at);
    assert!(waited >= GRANT * 9 / 10, "opened after {waited:?}");
    cluster.check_content(0, third);
}

/// A guest that is stopped and goes on finds everything as it was: its members are not sealed again.
#[test]
fn a_head_that_rested_goes_on_at_once() {
    let mut cluster = Cluster::new(Setup::default());
    let at = cluster.diskless();
    let members = shard(&[(0, Role::InSync), (1, Role::InSync), (2, Role::InSync)]);
    let head = cluster.open_head(at, members);
    cluster.write(at, head, 0, 8);
    for _ in 0..3 {
        cluster.input(at, Input::RestHead(head));
        cluster.run_for(GRANT * 2);
        let started_at = cluster.now;
        cluster.check_content(at, head);
        cluster.write(at, head, 0, 8);
        let took = cluster.now.since(started_at);
        assert!(took < Duration::from_millis(1), "it took {took:?}");
    }
}
