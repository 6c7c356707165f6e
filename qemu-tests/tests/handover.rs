//! Volumes that go from host to host with their front ends, on real daemons: whoever uses them holds them.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use blkio_client::{Client, Operation};
use framework::{
    Attached, Cluster, Deadline, Lab, Load, LoadOptions, Oracle, Place, test, verify, wait_until,
};
use serde_json::Value;

/// What a step may take on a busy machine.
const PATIENCE_SECONDS: u64 = 120;

const VOLUME_MIB: u64 = 64;

fn options() -> LoadOptions {
    LoadOptions { rate: 400, ..LoadOptions::default() }
}

fn standby(cluster: &Cluster<'_>) -> Result<Attached> {
    let mut attached = cluster.start_attach("disk", &Place::HERE, &["--standby"])?;
    attached.wait_for_socket()?;
    Ok(attached)
}

fn show(cluster: &Cluster<'_>) -> Result<Value> {
    cluster.holdfast(&["volume", "show", "disk"])
}

fn wait_shown(cluster: &Cluster<'_>, what: &str, is: impl Fn(&Value) -> bool) -> Result<()> {
    let mut last = Value::Null;
    let shown = wait_until(what, Deadline::seconds(PATIENCE_SECONDS), || {
        last = show(cluster)?;
        Ok(is(&last).then_some(()))
    });
    shown.with_context(|| format!("{last:#}"))
}

#[test]
fn a_volume_goes_with_its_front_end_from_host_to_host() {
    test(1, |lab: &Lab| {
        let cluster = Cluster::start(lab, 3)?;
        cluster.create_volume("disk", VOLUME_MIB, 3)?;
        let (one, two) = (standby(&cluster)?, standby(&cluster)?);
        let (three, four) =
            (cluster.export_standby(0, "disk")?, cluster.export_standby(1, "disk")?);
        ensure!(show(&cluster)?["holder"].is_null(), "nobody uses it yet");
        let stops: [&PathBuf; 6] =
            [&one.socket, &two.socket, &one.socket, &three, &four, &two.socket];
        let mut oracle = Oracle::new(options().blocks);
        for socket in stops {
            let load = Load::start(socket, options(), oracle)?;
            load.wait_for(100, Deadline::seconds(PATIENCE_SECONDS))?;
            ensure!(show(&cluster)?["yieldable"] == false, "it is in use");
            load.check()?;
            oracle = load.finish()?;
        }
        verify(&one.socket, oracle)?;
        wait_shown(&cluster, "the last one to yield", |volume| volume["yieldable"] == true)?;
        for mut attached in [one, two] {
            attached.process.terminate(Deadline::seconds(PATIENCE_SECONDS))?;
        }
        wait_shown(&cluster, "the volume to be given back", |volume| volume["holder"].is_null())
    });
}

#[test]
fn who_comes_too_early_waits_until_the_other_one_stops() {
    test(1, |lab: &Lab| {
        let cluster = Cluster::start(lab, 3)?;
        cluster.create_volume("disk", VOLUME_MIB, 3)?;
        let (one, two) = (standby(&cluster)?, standby(&cluster)?);
        let load = Load::start(&one.socket, options(), Oracle::new(options().blocks))?;
        load.wait_for(100, Deadline::seconds(PATIENCE_SECONDS))?;
        let mut early = Client::connect(&two.socket, 1, 4096)?;
        ensure!(early.capacity_bytes()? == VOLUME_MIB << 20, "the size is known without the lease");
        early.submit(0, Operation::Read, 0, 4096);
        early.wait(0, Duration::from_millis(100), |_| {})?;
        wait_shown(&cluster, "the waiting one to be named", |volume| {
            volume["waiting"].is_string()
        })?;
        load.wait_for(100, Deadline::seconds(PATIENCE_SECONDS))?;
        let oracle = load.finish()?;
        let begun = Instant::now();
        let mut result = -1;
        early.wait(1, Duration::from_secs(PATIENCE_SECONDS), |done| result = done.result)?;
        eprintln!("answered {:?} after the other one had stopped", begun.elapsed());
        ensure!(result == 0, "errno {}", -result);
        drop(early);
        verify(&one.socket, oracle)?;
        Ok(())
    });
}
