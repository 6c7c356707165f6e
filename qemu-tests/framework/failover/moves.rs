//! Loops in which replicas move: a server is emptied, and in the midst of that another one dies.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::Value;

use super::{
    Amount, FELT, Felt, Ground, PATIENCE_SECONDS, QUIET, RECOVERY_RATE, Run, WARM_UP, milliseconds,
    watch,
};
use crate::cluster::{Cluster, ClusterOptions};
use crate::load::{Load, LoadOptions, fill_all, verify};
use crate::wait::{Deadline, wait_until};

/// Enough data that a copy of it takes a while.
const BLOCKS: u32 = 65_536;

/// The volume's size, in MiB.
const MOVED_MIB: u64 = 256;

/// How long the client is watched after the last thing that happened.
const AFTER: Duration = Duration::from_millis(300);

/// How long healing may take. A copy makes way for the client: on a machine with much else to do it is slow.
const HEAL_SECONDS: &str = "240";

/// How a server is emptied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Messages {
    /// Servers tell heads what is coming.
    On,
    /// Heads have to find out.
    Off,
}

/// What was done in a run, and when.
struct Step {
    /// A process was killed in the midst of it.
    killed: Option<Instant>,
    done: Instant,
}

pub(super) fn drained(
    ground: Ground<'_>,
    messages: Messages,
    amount: Amount,
    told: &mut dyn FnMut(&Run),
) -> Result<()> {
    let cluster = start(ground, messages)?;
    repeat(&cluster, amount, told, |victim, _other| {
        let server = &cluster.servers()[victim];
        cluster.holdfast(&["server", "drain", server.name(), "--wait", HEAL_SECONDS])?;
        // It said that it is safe to stop: so stop it.
        server.stop()?;
        let emptied = Instant::now();
        std::thread::sleep(AFTER);
        server.start()?;
        cluster.holdfast(&["server", "undrain", server.name()])?;
        Ok(Step { killed: None, done: emptied })
    })
}

pub(super) fn killed_in_rebuild(
    ground: Ground<'_>,
    amount: Amount,
    told: &mut dyn FnMut(&Run),
) -> Result<()> {
    let cluster = start(ground, Messages::On)?;
    repeat(&cluster, amount, told, |victim, other| {
        let leaving = cluster.servers()[victim].name();
        cluster.holdfast(&["server", "drain", leaving])?;
        wait_until("a copy to begin", Deadline::seconds(PATIENCE_SECONDS), || {
            let members = members(&cluster)?;
            Ok(members.iter().any(|(_, role)| role == "catching_up").then_some(()))
        })?;
        let server = &cluster.servers()[other];
        let killed = Some(Instant::now());
        server.kill()?;
        std::thread::sleep(Duration::from_secs(1));
        server.start()?;
        cluster.holdfast(&["server", "drain", leaving, "--wait", HEAL_SECONDS])?;
        cluster.holdfast(&["server", "undrain", leaving])?;
        Ok(Step { killed, done: Instant::now() })
    })
}

fn start(ground: Ground<'_>, messages: Messages) -> Result<Cluster<'_>> {
    let configuration = match messages {
        Messages::On => String::new(),
        Messages::Off => "[test]\nstate_messages = false\n".to_owned(),
    };
    Cluster::start_of(ground.lab, ClusterOptions { configuration, ..ground.cluster(4) })
}

/// The names and roles of the volume's members.
fn members(cluster: &Cluster<'_>) -> Result<Vec<(String, String)>> {
    let volume = cluster.holdfast(&["volume", "show", "disk"])?;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let members = volume["members"].as_array().context("members")?;
    Ok(members.iter().map(|member| (text(&member["server"]), text(&member["role"]))).collect())
}

/// The numbers of the servers that have a replica, without the head's.
fn others(cluster: &Cluster<'_>, head: usize) -> Result<Vec<usize>> {
    let members = members(cluster)?;
    let is_member = |number: &usize| {
        let name = cluster.servers()[*number].name();
        *number != head && members.iter().any(|(member, _)| member == name)
    };
    Ok((0..cluster.servers().len()).filter(is_member).collect())
}

/// Lets `step` empty a member's server again and again; it gets another member's number, too. What counts is what
/// the client feels of all that, or of the kill.
fn repeat(
    cluster: &Cluster<'_>,
    amount: Amount,
    told: &mut dyn FnMut(&Run),
    mut step: impl FnMut(usize, usize) -> Result<Step>,
) -> Result<()> {
    cluster.create_volume("disk", MOVED_MIB, 3)?;
    let members = members(cluster)?;
    let head = cluster.servers().iter().position(|server| server.name() == members[0].0);
    let head = head.context("the first member's server")?;
    let socket = cluster.export(head, "disk")?;
    let options = LoadOptions { blocks: BLOCKS, ..LoadOptions::default() };
    let load = Load::start(&socket, options, fill_all(&socket, BLOCKS)?)?;
    let mut runs = 0;
    while !amount.is_reached(runs) {
        load.set_rate(RECOVERY_RATE);
        cluster.holdfast(&["volume", "wait", "disk", "--timeout", HEAL_SECONDS])?;
        load.set_rate(options.rate / 16);
        load.wait_for(WARM_UP / 4, Deadline::seconds(PATIENCE_SECONDS))?;
        let quiet = watch(&load, QUIET)?;
        let others = others(cluster, head)?;
        let (victim, other) = (others[runs % 2], others[(runs + 1) % 2]);
        load.begin_window();
        let start = Instant::now();
        let Step { killed, done } = step(victim, other)?;
        std::thread::sleep(AFTER);
        load.check()?;
        let window = load.end_window();
        runs += 1;
        let (slowest, completed) = (window.slowest, window.completed);
        let within = killed.map(|_| FELT);
        let Felt { pauses, figure, began_ms } = Felt::of(window, killed.unwrap_or(start), within);
        told(&Run {
            figure,
            pauses,
            quiet: milliseconds(quiet.pause),
            slowest_ms: milliseconds(slowest),
            began_ms,
            took_ms: milliseconds(done - start),
            completed,
        });
    }
    load.set_rate(RECOVERY_RATE);
    cluster.holdfast(&["volume", "wait", "disk", "--timeout", HEAL_SECONDS])?;
    verify(&socket, load.finish()?)?;
    Ok(())
}
