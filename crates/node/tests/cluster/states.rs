//! State messages, and members that come and go.

use core::time::Duration;

use base::{DegradedReason, Role, ServerId, StateMessage};
use node::Audience;

use crate::harness::{Cluster, Setup, server, shard};

const LEFT: Duration = Duration::from_secs(30);

fn draining() -> StateMessage {
    StateMessage::Draining { deadline_ms: 30_000, successor: ServerId::from_bytes([0; 16]) }
}

#[test]
fn what_a_server_says_reaches_heads_here_and_there_and_those_that_come_later() {
    let mut cluster = Cluster::new(Setup { servers: 4, ..Setup::default() });
    let at = cluster.diskless();
    let members = || shard(&[(0, Role::InSync), (1, Role::InSync), (2, Role::InSync)]);
    let remote = cluster.open_head(at, members());
    let now = cluster.now;
    cluster.node_mut(0).publish(now, Audience::Heads, None, draining());
    cluster.run("to hear that 0 drains", |c| c.member(at, remote, 0).draining.is_some());
    let until = cluster.member(at, remote, 0).draining.expect("it drains").until;
    assert!(until >= now + LEFT && until < now + LEFT + Duration::from_millis(100));
    assert!(cluster.member(at, remote, 1).draining.is_none());
    // A head of the same process as the member, and one whose process had no session before.
    for place in [0, 3] {
        cluster.run_for(Duration::from_secs(1));
        let later = cluster.open_head(place, members());
        cluster.run("to hear it too", |c| c.member(place, later, 0).draining.is_some());
        let left = cluster.member(place, later, 0).draining.expect("it drains").until;
        assert!(left < until + Duration::from_millis(100), "no time is won by asking again");
        if place == 3 {
            let now = cluster.now;
            cluster.node_mut(0).publish(now, Audience::Heads, None, StateMessage::Back);
            cluster
                .run("to hear that it is over", |c| c.member(place, later, 0).draining.is_none());
        }
    }
}

#[test]
fn what_is_told_to_the_owner_reaches_nobody_else() {
    let mut cluster = Cluster::new(Setup::default());
    let at = cluster.diskless();
    let head = cluster.open_head(at, shard(&[(0, Role::InSync), (1, Role::InSync)]));
    let now = cluster.now;
    let message = StateMessage::Degraded { reason: DegradedReason::SlowDevice };
    let key = Some(crate::harness::KEY);
    for index in [0, 2] {
        cluster.node_mut(index).publish(now, Audience::Owner, key, message);
    }
    cluster.run("to hear of 0", |c| c.member(at, head, 0).degraded.is_some());
    assert!(cluster.member(at, head, 1).degraded.is_none());
}

#[test]
fn members_come_and_go_while_a_head_runs() {
    let mut cluster = Cluster::new(Setup::default());
    // The head runs where a member will come, and later go.
    let head = cluster.open_head(0, shard(&[(1, Role::InSync), (2, Role::InSync)]));
    cluster.write(0, head, 0, 16);
    let record = |role| shard(&[(1, Role::InSync), (2, Role::InSync), (0, role)]);
    let now = cluster.now;
    cluster.node_mut(0).members_changed(now, head, &record(Role::Provisioning));
    assert_eq!(cluster.node(0).local_member(head), None);
    cluster.node_mut(0).members_changed(now, head, &record(Role::CatchingUp));
    assert_eq!(cluster.node(0).local_member(head), Some(server(0)));
    cluster.run("to catch up", |c| c.member(0, head, 0).caught_up);
    let mut agreed = false;
    while !agreed {
        let now = cluster.now;
        agreed = cluster.node_mut(0).change_members(now, head, &record(Role::InSync)).is_ok();
        cluster.run_for(Duration::from_millis(10));
    }
    let now = cluster.now;
    cluster.node_mut(0).members_changed(now, head, &record(Role::InSync));
    cluster.write(0, head, 8, 16);
    // One of the others leaves; its session is given up.
    let left = shard(&[(1, Role::InSync), (0, Role::InSync), (2, Role::Leaving)]);
    cluster.run_for(Duration::from_millis(300));
    let now = cluster.now;
    cluster.node_mut(0).change_members(now, head, &left).expect("the others hold everything");
    cluster.node_mut(0).members_changed(now, head, &left);
    cluster.run_for(Duration::from_secs(2));
    assert!(!cluster.node(0).is_peer_up(server(2)));
    cluster.write(0, head, 100, 16);
    cluster.check_content(0, head);
    cluster.release(0, head);
    cluster.check_replica(0);
}
