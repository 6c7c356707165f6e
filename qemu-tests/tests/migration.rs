//! Guests that move between hosts while a program in them verifies every read.
//!
//! Short forms: `HOLDFAST_LOOP_MINUTES=n` repeats each loop for n minutes, and `scripts/dev bench migrate`
//! measures what a guest feels.

use std::time::Duration;

use anyhow::{Result, ensure};
use framework::failover::Amount;
use framework::migration::{Hosts, Rig, RigOptions, Step, network, start_store};
use framework::{Deadline, Lab, skip_without_network, test, wait_until};

/// How long a guest lives at most in a loop that is not told to be long.
const LIMIT: Duration = Duration::from_mins(6);

/// What anything may take on a busy machine.
const PATIENCE_SECONDS: u64 = 120;

fn limit() -> Duration {
    let minutes = std::env::var("HOLDFAST_LOOP_MINUTES").ok().and_then(|text| text.parse().ok());
    minutes.map_or(LIMIT, |minutes: u64| LIMIT + Duration::from_mins(minutes))
}

/// Runs a body in a rig of its own.
fn on_rig(hosts: Hosts, body: impl FnOnce(&mut Rig<'_>) -> Result<()>) {
    if skip_without_network() {
        return;
    }
    test(1, |lab: &Lab| {
        let network = network(lab)?;
        let mut rig = Rig::start(lab, &network, RigOptions::new(hosts, limit()))?;
        body(&mut rig)?;
        rig.finish()
    });
}

/// Moves it so often.
fn back_and_forth(rig: &mut Rig<'_>, moves: usize) -> Result<()> {
    let amount = Amount::from_environment(moves);
    let mut done = 0;
    while !amount.is_reached(done) {
        eprintln!("{:?}", rig.migrate()?);
        done += 1;
    }
    Ok(())
}

#[test]
fn a_guest_moves_between_servers_and_back() {
    on_rig(Hosts::Servers, |rig| back_and_forth(rig, 2));
}

#[test]
fn a_guest_moves_between_diskless_hosts_and_back() {
    on_rig(Hosts::Diskless, |rig| back_and_forth(rig, 4));
}

/// After each migration that comes to nothing, one that goes through.
fn given_up(hosts: Hosts) {
    on_rig(hosts, |rig| {
        let amount = Amount::from_environment(Step::ALL.len());
        let mut done = 0;
        for step in Step::ALL.into_iter().cycle() {
            eprintln!("{}", step.name());
            rig.give_up_at(step)?;
            rig.migrate()?;
            done += 1;
            if amount.is_reached(done) {
                break;
            }
        }
        Ok(())
    });
}

#[test]
fn migrations_between_servers_are_given_up_at_each_step() {
    given_up(Hosts::Servers);
}

#[test]
fn migrations_between_diskless_hosts_are_given_up_at_each_step() {
    given_up(Hosts::Diskless);
}

#[test]
fn a_guest_moves_while_a_member_is_dead() {
    on_rig(Hosts::Diskless, |rig| {
        rig.cluster().servers()[2].kill()?;
        rig.calm()?;
        rig.migrate()?;
        rig.give_up_at(Step::Stopped)?;
        rig.cluster().servers()[2].start()?;
        rig.migrate()?;
        Ok(())
    });
}

/// A server that holds a replica is emptied to a fourth one while the guest moves back and forth.
#[test]
fn a_guest_moves_while_a_replica_is_copied() {
    if skip_without_network() {
        return;
    }
    test(1, |lab: &Lab| {
        let network = network(lab)?;
        let mut options = RigOptions::new(Hosts::Diskless, limit());
        options.servers = 4;
        let mut rig = Rig::start(lab, &network, options)?;
        let volume = rig.cluster().holdfast(&["volume", "show", "disk"])?;
        let leaving = volume["members"][0]["server"].as_str().unwrap_or_default().to_owned();
        rig.cluster().holdfast(&["server", "drain", &leaving])?;
        let mut moves = 0;
        wait_until(
            "the replica to be somewhere else",
            Deadline::seconds(PATIENCE_SECONDS),
            || {
                rig.migrate()?;
                moves += 1;
                let volume = rig.cluster().holdfast(&["volume", "show", "disk"])?;
                let members = volume["members"].as_array().into_iter().flatten();
                let left = members.filter(|member| member["server"] == leaving.as_str()).count();
                Ok((left == 0).then_some(()))
            },
        )?;
        eprintln!("{moves} moves while a replica was copied");
        rig.cluster().holdfast(&["server", "undrain", &leaving])?;
        rig.finish()
    });
}

/// Without the cluster store nobody can take the volume: the guest's requests wait at the destination, and
/// go on when the store is back. A migration that was given up leaves the source waiting no longer.
#[test]
fn a_guest_moves_while_the_cluster_store_is_away() {
    if skip_without_network() {
        return;
    }
    test(1, |lab: &Lab| {
        let network = network(lab)?;
        let mut etcd = start_store(lab, &network)?;
        let mut options = RigOptions::new(Hosts::Diskless, limit());
        options.store = Some(etcd.store());
        let mut rig = Rig::start(lab, &network, options)?;

        etcd.process().pause()?;
        rig.calm()?;
        let there = 1 - rig.here();
        let said_before = rig.said(there)?.len();
        rig.migrate_blindly()?;
        let before = rig.seen()?.total;
        wait_until(
            "the destination to say that it waits",
            Deadline::seconds(PATIENCE_SECONDS),
            || Ok(rig.said(there)?[said_before..].contains("waiting:").then_some(())),
        )?;
        let waited = rig.seen()?.total - before;
        ensure!(waited <= 16, "{waited} requests were answered by nobody who may");
        etcd.process().resume()?;
        rig.calm()?;

        // Given up while it is away: the source has told nobody that it would yield, and goes on by itself.
        let here = rig.here();
        let said_before = rig.said(here)?.len();
        etcd.process().pause()?;
        rig.abort_at(Step::Stopped)?;
        rig.calm()?;
        let said = rig.said(here)?[said_before..].to_owned();
        let (yields, ready) = (said.find("yielding:"), said.rfind("ready:"));
        ensure!(yields.is_some() && yields < ready, "the source said: {said}");
        ensure!(!said.contains("yielded:"), "nobody has been told: {said}");
        etcd.process().resume()?;
        rig.calm()?;
        rig.migrate()?;
        rig.finish()
    });
}
