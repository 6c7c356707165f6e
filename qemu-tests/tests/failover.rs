//! Anything may fail, on real processes under load: short forms of the loops that `scripts/dev bench
//! failover` measures. `HOLDFAST_LOOP_MINUTES=n` runs each for n minutes.
//!
//! What counts here is that no request fails and no byte is wrong; how long clients wait is the
//! benchmark's business, on a machine that does nothing else.

use anyhow::ensure;
use framework::failover::{Amount, Scenario};
use framework::{
    Cluster, ClusterOptions, Deadline, Etcd, Lab, Load, LoadOptions, Oracle, Place,
    loopback_address, skip_without_network, test, verify, wait_until,
};

/// What anything may take on a busy machine.
const PATIENCE_SECONDS: u64 = 60;

fn repeat(scenario: Scenario, runs: usize) {
    if scenario.needs_network() && skip_without_network() {
        return;
    }
    test(1, |lab: &Lab| {
        scenario.repeat(lab, Amount::from_environment(runs), &mut |run| {
            eprintln!("{}: {:?}", scenario.name(), run);
        })
    });
}

#[test]
fn members_are_killed_and_come_back() {
    repeat(Scenario::MemberKilled, 2);
}

#[test]
fn members_are_cut_off_and_come_back() {
    repeat(Scenario::MemberPartitioned, 2);
}

#[test]
fn a_member_is_slow_for_a_while() {
    repeat(Scenario::MemberSlow, 1);
}

#[test]
fn a_server_is_emptied_and_stopped() {
    repeat(Scenario::Drain, 1);
}

#[test]
fn a_member_is_killed_while_another_is_copied() {
    repeat(Scenario::PeerKilledInRebuild, 1);
}

#[test]
fn dead_heads_are_succeeded() {
    repeat(Scenario::TakeOver, 3);
}

#[test]
fn heads_that_are_cut_off_are_succeeded_and_end() {
    repeat(Scenario::HeadPartitioned, 2);
}

/// What a packet that is lost in one direction only looks like: the head hears the member, the
/// member does not hear the head; and the reverse.
#[test]
fn one_way_cuts_do_not_stop_the_others() {
    if skip_without_network() {
        return;
    }
    test(1, |lab: &Lab| {
        let network = framework::Network::start(lab, &["a", "b", "c"])?;
        let options =
            ClusterOptions { servers: 3, network: Some(&network), ..ClusterOptions::default() };
        let cluster = Cluster::start_of(lab, options)?;
        cluster.create_volume("disk", 64, 3)?;
        let socket = cluster.export(0, "disk")?;
        let options = LoadOptions { rate: 500, ..LoadOptions::default() };
        let load = Load::start(&socket, options, Oracle::new(options.blocks))?;
        for (from, to) in [("a", "b"), ("b", "a"), ("c", "a")] {
            load.wait_for(200, Deadline::seconds(PATIENCE_SECONDS))?;
            network.cut(from, to)?;
            load.wait_for(500, Deadline::seconds(PATIENCE_SECONDS))?;
            network.mend(from, to)?;
            cluster.wait_all_well(0, "disk")?;
        }
        verify(&socket, load.finish()?)?;
        Ok(())
    });
}

/// Volumes of every width lose as many members as they may, and one more.
#[test]
fn one_two_and_five_replicas() {
    test(1, |lab: &Lab| {
        let cluster = Cluster::start_of(
            lab,
            ClusterOptions {
                servers: 5,
                // Nobody is replaced here: there is no spare, and time is short.
                configuration: "[heal]\ndelay_ms = 600000\n".to_owned(),
                ..ClusterOptions::default()
            },
        )?;
        for (name, replicas) in [("five", 5), ("two", 2), ("one", 1)] {
            cluster.create_volume(name, 64, replicas)?;
            let mut attached = cluster.start_attach(name, &Place::HERE, &[])?;
            attached.wait_for_socket()?;
            let options = LoadOptions { rate: 500, ..LoadOptions::default() };
            let load = Load::start(&attached.socket, options, Oracle::new(options.blocks))?;
            load.wait_for(200, Deadline::seconds(PATIENCE_SECONDS))?;
            let shown = cluster.holdfast(&["volume", "show", name])?;
            let is_member = |server: &&framework::Server| {
                let members = shown["members"].as_array().into_iter().flatten();
                members.into_iter().any(|member| member["server"] == server.name())
            };
            let members: Vec<_> = cluster.servers().iter().filter(is_member).collect();
            ensure!(members.len() == replicas, "{shown:#}");
            let spared = replicas - (replicas / 2 + 1);
            members[..spared].iter().try_for_each(|server| server.kill())?;
            load.wait_for(200, Deadline::seconds(PATIENCE_SECONDS))?;
            // One more than it can lose: requests wait, and go on when it is back.
            members[spared].kill()?;
            wait_until("the volume to stall", Deadline::seconds(PATIENCE_SECONDS), || {
                let shown = cluster.holdfast(&["volume", "show", name])?;
                Ok((shown["health"] == "stalled").then_some(()))
            })?;
            members[spared].start()?;
            load.wait_for(200, Deadline::seconds(PATIENCE_SECONDS))?;
            verify(&attached.socket, load.finish()?)?;
            attached.process.terminate(Deadline::seconds(PATIENCE_SECONDS))?;
            cluster.start_all()?;
        }
        Ok(())
    });
}

/// The cluster store stands still, and then loses its process, while a client works. Nothing of it
/// is noticed; a member that dies meanwhile is noticed by the head alone.
#[test]
fn the_cluster_store_is_away_while_a_client_works() {
    test(1, |lab: &Lab| {
        let address = loopback_address().to_string();
        let mut etcd = Etcd::start(lab, &Place::HERE, "etcd", &address)?;
        let options =
            ClusterOptions { servers: 3, store: Some(etcd.store()), ..ClusterOptions::default() };
        let cluster = Cluster::start_of(lab, options)?;
        cluster.create_volume("disk", 64, 3)?;
        let socket = cluster.export(0, "disk")?;
        let options = LoadOptions { rate: 500, ..LoadOptions::default() };
        let load = Load::start(&socket, options, Oracle::new(options.blocks))?;
        load.wait_for(200, Deadline::seconds(PATIENCE_SECONDS))?;

        // Silent, as an etcd that has lost its quorum: nothing changes, everything goes on.
        etcd.process().pause()?;
        load.wait_for(1500, Deadline::seconds(PATIENCE_SECONDS))?;
        let refused = cluster.holdfast_output(&["volume", "list"])?;
        ensure!(refused.status.code() == Some(6), "{refused:?}");
        etcd.process().resume()?;

        etcd.process().kill()?;
        cluster.servers()[1].kill()?;
        load.wait_for(1500, Deadline::seconds(PATIENCE_SECONDS))?;
        drop(etcd);
        let _etcd = Etcd::start(lab, &Place::HERE, "etcd", &address)?;
        cluster.servers()[1].start()?;
        cluster.wait_all_well(0, "disk")?;
        cluster.holdfast(&["volume", "list"])?;
        verify(&socket, load.finish()?)?;
        Ok(())
    });
}
