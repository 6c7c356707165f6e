//! Anything may fail, on real processes under load: short forms of the loops that `scripts/dev bench
//! failover` measures. `HOLDFAST_LOOP_MINUTES=n` runs each for n minutes.
//!
//! What counts here is that no request fails and no byte is wrong; how long clients wait is the
//! benchmark's business, on a machine that does nothing else.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream};

use anyhow::{Context, Result, ensure};
use framework::failover::{Amount, Ground, Scenario};
use framework::{
    Cluster, ClusterOptions, Deadline, Etcd, Lab, Load, LoadOptions, Oracle, Place, Space,
    loopback_address, skip_without_network, test, verify, wait_until,
};
use rustix::net::{AddressFamily, SocketType};

/// What anything may take on a busy machine.
const PATIENCE_SECONDS: u64 = 60;

fn repeat(scenario: Scenario, runs: usize) {
    if scenario.needs_network() && skip_without_network() {
        return;
    }
    test(1, |lab: &Lab| {
        let ground = Ground { lab, space: Space::Sparse };
        scenario.repeat(ground, Amount::from_environment(runs), &mut |run| {
            eprintln!("{}: {run}", scenario.name());
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

/// The connections to both other members break again and again, under load, one member at a time and both
/// at once: they are made again, and nothing is lost, done twice or in another order.
#[test]
fn connections_that_break_all_the_time_lose_nothing() {
    test(1, |lab: &Lab| {
        let options = ClusterOptions { servers: 3, proxied: true, ..ClusterOptions::default() };
        let cluster = Cluster::start_of(lab, options)?;
        cluster.create_volume("disk", 64, 3)?;
        let socket = cluster.export(0, "disk")?;
        let options = LoadOptions { rate: 500, ..LoadOptions::default() };
        let load = Load::start(&socket, options, Oracle::new(options.blocks))?;
        for round in 0..30 {
            load.wait_for(20, Deadline::seconds(PATIENCE_SECONDS))?;
            if round % 3 != 1 {
                cluster.servers()[1].proxy()?.reset();
            }
            if round % 3 != 0 {
                cluster.servers()[2].proxy()?.reset();
            }
        }
        load.wait_for(200, Deadline::seconds(PATIENCE_SECONDS))?;
        cluster.wait_all_well(0, "disk")?;
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

/// Two of three members of etcd are lost while a client works: it works on, also without a member of its
/// volume, and every change is refused with the reason. All goes on when the quorum is back.
#[test]
fn etcd_loses_its_quorum_while_a_client_works() {
    test(1, |lab: &Lab| {
        let addresses: Vec<String> = (0..3).map(|_| loopback_address().to_string()).collect();
        let mut members = [None, None, None];
        Etcd::start_members(lab, &addresses, &mut members)?;
        let store = Some(Etcd::store_at(&addresses));
        let options = ClusterOptions { servers: 3, store, ..ClusterOptions::default() };
        let cluster = Cluster::start_of(lab, options)?;
        cluster.create_volume("disk", 64, 3)?;
        let socket = cluster.export(0, "disk")?;
        let options = LoadOptions { rate: 500, ..LoadOptions::default() };
        let load = Load::start(&socket, options, Oracle::new(options.blocks))?;
        load.wait_for(200, Deadline::seconds(PATIENCE_SECONDS))?;

        // One of them costs nobody anything.
        members[0] = None;
        cluster.create_volume("with-two", 64, 3)?;
        // The next one is the quorum.
        if let Some(member) = &mut members[1] {
            member.process().pause()?;
        }
        let refused: [&[&str]; 4] = [
            &["volume", "create", "with-one", "--size", "64M", "--replicas", "3"],
            &["volume", "delete", "with-two"],
            &["server", "drain", "b", "--force"],
            &["volume", "release", "disk", "--force"],
        ];
        for arguments in refused {
            let output = cluster.holdfast_output(arguments)?;
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            ensure!(output.status.code() == Some(6), "{arguments:?}: {output:?}");
            ensure!(said.contains("quorum"), "{arguments:?} does not say why: {said}");
        }
        cluster.servers()[1].kill()?;
        load.wait_for(1500, Deadline::seconds(PATIENCE_SECONDS))?;

        // Dead instead of silent, and back with all they knew.
        members[1] = None;
        load.wait_for(500, Deadline::seconds(PATIENCE_SECONDS))?;
        Etcd::start_members(lab, &addresses, &mut members)?;
        cluster.servers()[1].start()?;
        cluster.wait_all_well(0, "disk")?;
        cluster.create_volume("with-three", 64, 3)?;
        let volumes = cluster.holdfast(&["volume", "list"])?;
        let count = volumes.as_array().map_or(0, Vec::len);
        ensure!(count == 3, "those that were acknowledged, and no other: {volumes:#}");
        verify(&socket, load.finish()?)?;
        Ok(())
    });
}

/// Where the flood comes from.
const FLOODER: Ipv4Addr = Ipv4Addr::new(127, 200, 0, 1);

/// A connection from an address of this machine's.
fn connect_from(from: Ipv4Addr, to: SocketAddr) -> Result<TcpStream> {
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None)?;
    rustix::net::bind(&socket, &SocketAddrV4::new(from, 0))?;
    rustix::net::connect(&socket, &to)?;
    Ok(socket.into())
}

/// Connections one host may have that have not said who they are.
const HANDSHAKES_MAX: usize = 128;

/// A host opens connections to a server and says nothing on them. It gets no more than its share; guests do
/// not notice, and others come and go as before.
#[test]
fn a_flood_of_connections_keeps_nobody_else_out() {
    test(1, |lab: &Lab| {
        let cluster = Cluster::start(lab, 3)?;
        cluster.create_volume("disk", 64, 3)?;
        let socket = cluster.export(0, "disk")?;
        let options = LoadOptions { rate: 500, ..LoadOptions::default() };
        let load = Load::start(&socket, options, Oracle::new(options.blocks))?;
        load.wait_for(200, Deadline::seconds(PATIENCE_SECONDS))?;
        let flooded = &cluster.servers()[1];
        let counted = |name: &str| -> Result<usize> {
            let metrics = flooded.metrics()?;
            let line = metrics.lines().find(|line| line.starts_with(name)).context("a metric")?;
            Ok(line.rsplit(' ').next().context("a value")?.parse()?)
        };
        let refused = || counted("holdfast_connections_refused_total ");
        let listen =
            flooded.status()?["server"]["listen"].as_str().context("an address")?.to_owned();
        let target: SocketAddr = listen.parse()?;
        let flood: Vec<TcpStream> = (0..3 * HANDSHAKES_MAX)
            .map(|_| connect_from(FLOODER, target))
            .collect::<Result<_>>()?;
        wait_until("the flood to be refused", Deadline::seconds(PATIENCE_SECONDS), || {
            Ok((refused()? >= 2 * HANDSHAKES_MAX).then_some(()))
        })?;
        // A head whose process is new to that server gets its session.
        cluster.create_volume("other", 64, 3)?;
        let mut attached = cluster.attach("other")?;
        wait_until("all members to answer", Deadline::seconds(PATIENCE_SECONDS), || {
            let shown = cluster.holdfast(&["volume", "show", "other"])?;
            Ok((shown["health"] == "healthy").then_some(()))
        })?;
        attached.process.terminate(Deadline::seconds(PATIENCE_SECONDS))?;
        load.wait_for(200, Deadline::seconds(PATIENCE_SECONDS))?;
        cluster.wait_all_well(0, "disk")?;
        drop(flood);
        verify(&socket, load.finish()?)?;
        let log = std::fs::read_to_string(flooded.log())?;
        let lines = log.lines().filter(|line| line.contains("is refused: too many")).count();
        ensure!((1..=6).contains(&lines), "{lines} lines about it: {log}");
        Ok(())
    });
}
