//! Loops in which a member fails: the head goes on with the others.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::{
    Amount, FELT, Felt, Ground, PATIENCE_SECONDS, RECOVERY_RATE, Run, VOLUME_MIB, WARM_UP, WATCH,
    milliseconds, watch,
};
use crate::cluster::{Cluster, ClusterOptions, Server};
use crate::load::{Load, LoadOptions, Window, verify};
use crate::network::Network;
use crate::oracle::Oracle;
use crate::wait::Deadline;

/// How much longer each way to and from a slow member takes.
const SLOW_EACH_WAY: Duration = Duration::from_millis(5);

/// How long a slow member may be slow before it is held against the head.
const SLOW_SETTLE: Duration = Duration::from_secs(2);

/// How long latencies are gathered.
const SLOW_MEASURE: Duration = Duration::from_secs(2);

/// The members that fail in turn. The head is at the first server.
const VICTIMS: [usize; 2] = [1, 2];

pub(super) fn killed(ground: Ground<'_>, amount: Amount, told: &mut dyn FnMut(&Run)) -> Result<()> {
    let cluster = Cluster::start_of(ground.lab, ground.cluster(3))?;
    repeat(&cluster, Some(FELT), amount, told, |run, load| {
        kill_and_start(&cluster.servers()[VICTIMS[run % VICTIMS.len()]], load)
    })
}

/// The same with a server that keeps no replica of the volume.
pub(super) fn bystander_killed(
    ground: Ground<'_>,
    amount: Amount,
    told: &mut dyn FnMut(&Run),
) -> Result<()> {
    let cluster = Cluster::start_of(ground.lab, ground.cluster(4))?;
    cluster.create_volume("disk", VOLUME_MIB, 3)?;
    let shown = cluster.holdfast(&["volume", "show", "disk"])?;
    let members = shown["members"].as_array().context("members")?;
    let is_member =
        |server: &&Server| members.iter().any(|member| member["server"] == server.name());
    let bystander = cluster.servers().iter().find(|server| !is_member(server));
    let bystander = bystander.context("a server without a replica")?;
    let head = cluster.servers().iter().position(|server| is_member(&server));
    let head = head.context("a server with a replica")?;
    let kill = |_, load: &Load| kill_and_start(bystander, load);
    under_load(&cluster, head, Some(FELT), amount, told, kill)
}

fn kill_and_start(victim: &Server, load: &Load) -> Result<Window> {
    load.begin_window();
    victim.kill()?;
    let window = watch_on(load)?;
    victim.start()?;
    Ok(window)
}

pub(super) fn partitioned(
    ground: Ground<'_>,
    amount: Amount,
    told: &mut dyn FnMut(&Run),
) -> Result<()> {
    let network = Network::start(ground.lab, &["a", "b", "c"])?;
    let options = ClusterOptions { network: Some(&network), ..ground.cluster(3) };
    let cluster = Cluster::start_of(ground.lab, options)?;
    repeat(&cluster, None, amount, told, |run, load| {
        let victim = cluster.servers()[VICTIMS[run % VICTIMS.len()]].name();
        load.begin_window();
        network.isolate(victim)?;
        let window = watch_on(load)?;
        network.rejoin(victim)?;
        Ok(window)
    })
}

/// Goes on watching, in the window that began right before the fault.
fn watch_on(load: &Load) -> Result<Window> {
    std::thread::sleep(WATCH);
    load.check()?;
    Ok(load.end_window())
}

/// Lets `fault` happen again and again to a volume of the first server's; it gets the run's number, and
/// undoes what it did. What it makes is felt within so long, or at any time.
fn repeat(
    cluster: &Cluster<'_>,
    within: Option<Duration>,
    amount: Amount,
    told: &mut dyn FnMut(&Run),
    fault: impl FnMut(usize, &Load) -> Result<Window>,
) -> Result<()> {
    cluster.create_volume("disk", VOLUME_MIB, 3)?;
    under_load(cluster, 0, within, amount, told, fault)
}

fn under_load(
    cluster: &Cluster<'_>,
    head: usize,
    within: Option<Duration>,
    amount: Amount,
    told: &mut dyn FnMut(&Run),
    mut fault: impl FnMut(usize, &Load) -> Result<Window>,
) -> Result<()> {
    let socket = cluster.export(head, "disk")?;
    let options = LoadOptions::default();
    let load = Load::start(&socket, options, Oracle::new(options.blocks))?;
    load.wait_for(WARM_UP, Deadline::seconds(PATIENCE_SECONDS))?;
    let mut runs = 0;
    while !amount.is_reached(runs) {
        load.set_rate(RECOVERY_RATE);
        cluster.wait_all_well(head, "disk")?;
        load.set_rate(options.rate);
        // As long as after the fault, so that the two can be compared on a machine that has other work.
        let quiet = watch(&load, within.unwrap_or(WATCH))?;
        let start = Instant::now();
        let window = fault(runs, &load)?;
        runs += 1;
        let (slowest, completed) = (window.slowest, window.completed);
        let Felt { pauses, figure, began_ms } = Felt::of(window, start, within);
        told(&Run {
            figure,
            pauses,
            quiet: milliseconds(quiet.pause),
            slowest_ms: milliseconds(slowest),
            began_ms,
            took_ms: milliseconds(WATCH),
            completed,
        });
    }
    load.set_rate(RECOVERY_RATE);
    cluster.wait_all_well(head, "disk")?;
    verify(&socket, load.finish()?)?;
    Ok(())
}

pub(super) fn slow(ground: Ground<'_>, amount: Amount, told: &mut dyn FnMut(&Run)) -> Result<()> {
    let options = ClusterOptions { proxied: true, ..ground.cluster(3) };
    let cluster = Cluster::start_of(ground.lab, options)?;
    cluster.create_volume("disk", VOLUME_MIB, 3)?;
    // All members are remote: reads may go to any of them.
    let attached = cluster.attach("disk")?;
    let options = LoadOptions::default();
    let load = Load::start(&attached.socket, options, Oracle::new(options.blocks))?;
    load.wait_for(WARM_UP, Deadline::seconds(PATIENCE_SECONDS))?;
    let mut runs = 0;
    while !amount.is_reached(runs) {
        let healthy = watch(&load, SLOW_MEASURE)?;
        let proxy = cluster.servers()[runs % 3].proxy()?;
        proxy.delay(SLOW_EACH_WAY);
        let settling = watch(&load, SLOW_SETTLE)?;
        let slow = watch(&load, SLOW_MEASURE)?;
        proxy.delay(Duration::ZERO);
        // It is to be trusted again before the next one is slow.
        watch(&load, Duration::from_secs(6))?;
        let p99 = |window: &Window| milliseconds(window.percentile(99));
        runs += 1;
        told(&Run {
            figure: p99(&slow) / p99(&healthy),
            pauses: Vec::new(),
            quiet: p99(&settling) / p99(&healthy),
            slowest_ms: milliseconds(slow.slowest.max(settling.slowest)),
            began_ms: 0.0,
            took_ms: milliseconds(SLOW_SETTLE + SLOW_MEASURE),
            completed: slow.completed,
        });
    }
    verify(&attached.socket, load.finish()?)?;
    Ok(())
}
