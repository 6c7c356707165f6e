//! Loops in which a head fails: another host takes its volume.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::{
    Amount, Ground, PATIENCE_SECONDS, QUIET, Run, VOLUME_MIB, WARM_UP, milliseconds, watch,
};
use crate::cluster::{Attached, Cluster, ClusterOptions};
use crate::load::{Load, LoadOptions, verify};
use crate::network::{Network, Place};
use crate::oracle::Oracle;
use crate::wait::Deadline;

/// The exit status of `holdfast attach` when another holder has taken the volume.
const SUPERSEDED: i32 = 7;

/// How often the new socket is looked for.
const SOCKET_POLL: Duration = Duration::from_millis(1);

pub(super) fn taken_over(
    ground: Ground<'_>,
    amount: Amount,
    told: &mut dyn FnMut(&Run),
) -> Result<()> {
    let cluster = Cluster::start_of(ground.lab, ground.cluster(3))?;
    let places = [Place::HERE, Place::HERE];
    repeat(
        &cluster,
        &places,
        amount,
        told,
        |_host, attached| attached.process.kill(),
        |_, _| Ok(()),
    )
}

pub(super) fn partitioned(
    ground: Ground<'_>,
    amount: Amount,
    told: &mut dyn FnMut(&Run),
) -> Result<()> {
    let hosts = ["one", "two"];
    let network = Network::start(ground.lab, &["a", "b", "c", hosts[0], hosts[1]])?;
    let options = ClusterOptions { network: Some(&network), ..ground.cluster(3) };
    let cluster = Cluster::start_of(ground.lab, options)?;
    let places = [network.place(hosts[0])?, network.place(hosts[1])?];
    let heal = |host: usize, mut old: Attached| {
        network.rejoin(hosts[host])?;
        let status = old.process.wait(Deadline::seconds(PATIENCE_SECONDS))?;
        ensure!(status.code() == Some(SUPERSEDED), "the old head ended with {status}");
        Ok(())
    };
    let cut = |host: usize, _: &mut Attached| network.isolate(hosts[host]);
    repeat(&cluster, &places, amount, told, cut, heal)
}

/// Lets the head's host fail again and again, the other one take over, and the first one heal.
fn repeat(
    cluster: &Cluster<'_>,
    places: &[Place; 2],
    amount: Amount,
    told: &mut dyn FnMut(&Run),
    mut fail: impl FnMut(usize, &mut Attached) -> Result<()>,
    mut heal: impl FnMut(usize, Attached) -> Result<()>,
) -> Result<()> {
    cluster.create_volume("disk", VOLUME_MIB, 3)?;
    let options = LoadOptions::default();
    let mut attached = cluster.start_attach("disk", &places[0], &[])?;
    attached.wait_for_socket()?;
    let mut load = Load::start(&attached.socket, options, Oracle::new(options.blocks))?;
    let mut runs = 0;
    while !amount.is_reached(runs) {
        load.wait_for(WARM_UP, Deadline::seconds(PATIENCE_SECONDS))?;
        let quiet = watch(&load, QUIET)?;
        let (here, there) = (runs % 2, (runs + 1) % 2);

        let start = Instant::now();
        fail(here, &mut attached)?;
        let mut successor = cluster.start_attach("disk", &places[there], &["--force"])?;
        let oracle = load.abandon()?;
        load = connect(&mut successor, options, oracle)?;
        load.wait_for(1, Deadline::seconds(PATIENCE_SECONDS))?;
        let first = load.first_answer().context("an answer")?;
        load.wait_for(WARM_UP, Deadline::seconds(PATIENCE_SECONDS))?;
        let window = load.end_window();
        heal(here, std::mem::replace(&mut attached, successor))?;
        runs += 1;
        told(&Run {
            figure: milliseconds(first - start),
            pauses: vec![(start, first)],
            quiet: milliseconds(quiet.pause),
            slowest_ms: milliseconds(window.slowest),
            began_ms: 0.0,
            took_ms: milliseconds(start.elapsed()),
            completed: window.completed,
        });
    }
    let oracle = load.finish()?;
    verify(&attached.socket, oracle)?;
    attached.process.terminate(Deadline::seconds(PATIENCE_SECONDS))?;
    Ok(())
}

/// Connects to the new head as soon as it listens.
fn connect(attached: &mut Attached, options: LoadOptions, oracle: Oracle) -> Result<Load> {
    let deadline = Deadline::seconds(PATIENCE_SECONDS);
    // The socket is there a moment before anybody listens at it.
    while !attached.listens()? {
        attached.process.check_alive()?;
        ensure!(!deadline.has_passed(), "holdfast attach does not listen");
        std::thread::sleep(SOCKET_POLL);
    }
    Load::start(&attached.socket, options, oracle)
}
