//! Volumes that heal themselves, on real daemons: a client with a model of what it wrote looks on.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use framework::{
    Attached, BLOCK_BYTES, Cluster, ClusterOptions, Deadline, Lab, Load, LoadOptions, Oracle,
    Place, PoolSizes, Server, fill_all, generation_in, overwrite, test, verify, wait_until,
};
use serde_json::Value;

/// How long a member may be silent, and what it is called on the command line and in files.
const DELAY_MS: &str = "1000";

/// What a step of healing may take on a busy machine.
const PATIENCE_SECONDS: u64 = 120;

/// The exit status of `holdfast attach` when another holder has taken the volume.
const SUPERSEDED: i32 = 7;

const VOLUME_MIB: u64 = 64;

fn start(lab: &Lab, servers: usize) -> Result<Cluster<'_>> {
    let sizes = PoolSizes { fast_mib: 192, mass_mib: 256, buffers_mib: 64, ..PoolSizes::default() };
    let configuration = format!("[heal]\ndelay_ms = {DELAY_MS}\n");
    Cluster::start_of(lab, ClusterOptions { servers, sizes, configuration, ..Default::default() })
}

fn attach(cluster: &Cluster<'_>, more: &[&str]) -> Result<Attached> {
    let arguments = [&["--heal-delay-ms", DELAY_MS], more].concat();
    let mut attached = cluster.start_attach("disk", &Place::HERE, &arguments)?;
    attached.wait_for_socket()?;
    Ok(attached)
}

fn options() -> LoadOptions {
    LoadOptions { rate: 400, ..LoadOptions::default() }
}

fn load(attached: &Attached) -> Result<Load> {
    let load = Load::start(&attached.socket, options(), Oracle::new(options().blocks))?;
    load.wait_for(400, Deadline::seconds(PATIENCE_SECONDS))?;
    Ok(load)
}

/// Names and roles of the volume's members.
fn members(cluster: &Cluster<'_>) -> Result<Vec<(String, String)>> {
    let volume = cluster.holdfast(&["volume", "show", "disk"])?;
    let members = volume["members"].as_array().context("members")?;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    Ok(members.iter().map(|member| (text(&member["server"]), text(&member["role"]))).collect())
}

fn has(members: &[(String, String)], server: &str) -> bool {
    members.iter().any(|(name, _)| name == server)
}

/// Waits until `count` members are in sync and none of them is on `without`.
fn wait_whole(cluster: &Cluster<'_>, count: usize, without: &str) -> Result<()> {
    let mut last = Vec::new();
    let whole = wait_until("the volume to be whole", Deadline::seconds(PATIENCE_SECONDS), || {
        last = members(cluster)?;
        let well = |(name, role): &&(String, String)| name != without && role == "in_sync";
        let lost = last.iter().any(|(name, role)| name == without && role != "leaving");
        Ok((last.iter().filter(well).count() == count && !lost).then_some(()))
    });
    whole.with_context(|| format!("its members are {last:?}"))
}

/// A server of the volume's, by its number in the cluster.
fn member_number(cluster: &Cluster<'_>) -> Result<usize> {
    let members = members(cluster)?;
    let numbers = cluster.servers().iter().position(|server| has(&members, server.name()));
    numbers.context("the volume has a member on some server")
}

#[test]
fn a_killed_member_is_replaced_under_load_and_then_another() {
    test(1, |lab: &Lab| {
        let cluster = start(lab, 5)?;
        cluster.create_volume("disk", VOLUME_MIB, 3)?;
        let mut attached = attach(&cluster, &[])?;
        let load = load(&attached)?;
        for _ in 0..2 {
            let victim = &cluster.servers()[member_number(&cluster)?];
            let name = victim.name().to_owned();
            victim.kill()?;
            wait_whole(&cluster, 3, &name)?;
            load.wait_for(200, Deadline::seconds(PATIENCE_SECONDS))?;
            load.check()?;
        }
        // What they hold is what was written.
        verify(&attached.socket, load.finish()?)?;
        attached.process.terminate(Deadline::seconds(PATIENCE_SECONDS))?;

        // Those that were lost clean up when they are back.
        cluster.start_all()?;
        wait_until("the former members to go", Deadline::seconds(PATIENCE_SECONDS), || {
            Ok((members(&cluster)?.len() == 3).then_some(()))
        })
    });
}

#[test]
fn a_volume_that_nobody_has_attached_is_healed_and_gives_way_to_a_guest() {
    test(1, |lab: &Lab| {
        let cluster = start(lab, 4)?;
        cluster.create_volume("disk", VOLUME_MIB, 2)?;
        let mut attached = attach(&cluster, &[])?;
        let oracle = load(&attached)?.finish()?;
        attached.process.terminate(Deadline::seconds(PATIENCE_SECONDS))?;

        let victim = &cluster.servers()[member_number(&cluster)?];
        victim.kill()?;
        wait_until("a repair head", Deadline::seconds(PATIENCE_SECONDS), || {
            let volume = cluster.holdfast(&["volume", "show", "disk"])?;
            Ok((volume["epoch"].as_u64() > Some(1)).then_some(()))
        })?;
        // Nobody is asked for --force, whatever the repair is doing.
        let mut attached = attach(&cluster, &[])?;
        let load = Load::start(&attached.socket, options(), oracle)?;
        wait_whole(&cluster, 2, victim.name())?;
        load.check()?;
        let oracle = load.finish()?;
        attached.process.terminate(Deadline::seconds(PATIENCE_SECONDS))?;

        // Once more, to its end.
        let victim = &cluster.servers()[member_number(&cluster)?];
        victim.kill()?;
        wait_whole(&cluster, 2, victim.name())?;
        wait_until("the volume to be free", Deadline::seconds(PATIENCE_SECONDS), || {
            let volume = cluster.holdfast(&["volume", "show", "disk"])?;
            Ok(volume["holder"].is_null().then_some(()))
        })?;
        let mut attached = attach(&cluster, &[])?;
        verify(&attached.socket, oracle)?;
        attached.process.terminate(Deadline::seconds(PATIENCE_SECONDS))?;
        Ok(())
    });
}

#[test]
fn a_server_is_drained_under_load_without_a_pause() {
    test(1, |lab: &Lab| {
        let cluster = start(lab, 4)?;
        cluster.create_volume("disk", VOLUME_MIB, 3)?;
        let mut attached = attach(&cluster, &[])?;
        let load = load(&attached)?;
        let number = member_number(&cluster)?;
        let server = &cluster.servers()[number];
        load.begin_window();
        cluster.holdfast(&["server", "drain", server.name(), "--wait", "100"])?;
        wait_until("the replica to be gone", Deadline::seconds(PATIENCE_SECONDS), || {
            load.check()?;
            let drain = server.status()?["drain"].clone();
            Ok((drain["safe_to_stop"] == true).then_some(()))
        })?;
        server.stop()?;
        let window = load.end_window();
        eprintln!("drained; the longest pause was {} ms", window.pause.as_millis());
        ensure!(window.pause < Duration::from_secs(2), "the client waited {:?}", window.pause);
        wait_whole(&cluster, 3, server.name())?;
        server.start()?;
        cluster.holdfast(&["server", "undrain", server.name()])?;
        ensure!(server.status()?["drain"].is_null(), "it is in use again");
        verify(&attached.socket, load.finish()?)?;
        attached.process.terminate(Deadline::seconds(PATIENCE_SECONDS))?;
        Ok(())
    });
}

/// A server that keeps a replica of a volume and serves it to a guest, too, is drained: the replica goes
/// elsewhere, the guest goes on from there without an error, and the server says that it waits for it. When
/// the guest has gone it is safe to stop.
#[test]
fn a_server_is_drained_beside_its_guest() {
    test(1, |lab: &Lab| {
        let cluster = start(lab, 4)?;
        cluster.create_volume("disk", VOLUME_MIB, 3)?;
        let number = member_number(&cluster)?;
        let server = &cluster.servers()[number];
        let socket = cluster.export(number, "disk")?;
        let load = Load::start(&socket, options(), Oracle::new(options().blocks))?;
        load.wait_for(400, Deadline::seconds(PATIENCE_SECONDS))?;
        load.begin_window();
        cluster.holdfast(&["server", "drain", server.name()])?;
        wait_until("only the guest to be left", Deadline::seconds(PATIENCE_SECONDS), || {
            load.check()?;
            let drain = server.status()?["drain"].clone();
            ensure!(drain["safe_to_stop"] != true, "a guest uses it: {drain:#}");
            let left = &drain["heads"][0];
            let waits = left["volume"] == "disk" && left["reason"].to_string().contains("migrate");
            let moved = drain["replicas"].as_array().is_some_and(Vec::is_empty);
            Ok((waits && moved).then_some(()))
        })?;
        load.wait_for(400, Deadline::seconds(PATIENCE_SECONDS))?;
        let window = load.end_window();
        eprintln!(
            "drained beside its guest; the longest pause was {} ms",
            window.pause.as_millis()
        );
        ensure!(window.pause < Duration::from_secs(2), "the client waited {:?}", window.pause);
        wait_whole(&cluster, 3, server.name())?;
        // Whoever operates it is told what to do, with the guest's socket.
        let servers = cluster.holdfast(&["server", "list"])?.to_string();
        ensure!(servers.contains(&socket.display().to_string()), "{servers}");
        let refused =
            cluster.holdfast_output(&["server", "drain", server.name(), "--wait", "1"])?;
        ensure!(!refused.status.success(), "it is not empty: {refused:?}");

        let oracle = load.finish()?;
        wait_until("it to be safe to stop", Deadline::seconds(PATIENCE_SECONDS), || {
            let volume = cluster.holdfast(&["volume", "show", "disk"])?;
            let safe = server.status()?["drain"]["safe_to_stop"] == true;
            Ok((safe && volume["holder"].is_null()).then_some(()))
        })?;
        server.stop()?;
        let mut attached = attach(&cluster, &[])?;
        verify(&attached.socket, oracle)?;
        attached.process.terminate(Deadline::seconds(PATIENCE_SECONDS))?;
        Ok(())
    });
}

#[test]
fn a_head_that_was_stopped_and_deposed_does_no_harm_and_says_so_once() {
    test(1, |lab: &Lab| {
        let cluster = start(lab, 3)?;
        cluster.create_volume("disk", VOLUME_MIB, 3)?;
        let mut old = attach(&cluster, &[])?;
        let load = load(&old)?;
        old.process.pause()?;
        let mut new = attach(&cluster, &["--force"])?;
        // What the old head had accepted and not answered is unknown from here on.
        let paused = load.abandon()?;
        let load = Load::start(&new.socket, options(), paused)?;
        load.wait_for(2000, Deadline::seconds(PATIENCE_SECONDS))?;
        old.process.resume()?;
        let status = old.process.wait(Deadline::seconds(PATIENCE_SECONDS))?;
        ensure!(status.code() == Some(SUPERSEDED), "the old head ended with {status}");
        let log = std::fs::read_to_string(old.process.log())?;
        let told: Vec<&str> = log.lines().filter(|line| line.starts_with("holdfast: ")).collect();
        ensure!(told.len() == 1, "it says what became of it once: {log}");
        load.wait_for(500, Deadline::seconds(PATIENCE_SECONDS))?;
        verify(&new.socket, load.finish()?)?;
        new.process.terminate(Deadline::seconds(PATIENCE_SECONDS))?;
        Ok(())
    });
}

/// Blocks of a replica's home that rot, with the guest's data in them.
const ROTTEN: usize = 24;

/// Where in a device's image blocks of the guest's are.
fn blocks_in(image: &[u8]) -> Vec<usize> {
    let is_block = |bytes: &[u8]| {
        let words = [&bytes[..4], &bytes[4..8]].map(|word| word.try_into().expect("4 bytes"));
        let [generation, block] = words.map(u32::from_le_bytes);
        generation == 1 && generation_in(block, bytes) == Ok(generation)
    };
    let blocks = image.chunks_exact(BLOCK_BYTES).enumerate();
    blocks.filter(|(_, bytes)| is_block(bytes)).map(|(number, _)| number * BLOCK_BYTES).collect()
}

/// How many blocks heads say that they have written again.
fn mended_blocks(cluster: &Cluster<'_>) -> Result<usize> {
    let events = cluster.holdfast_output(&["events", "--limit", "1000"])?;
    let mut blocks = 0;
    for line in String::from_utf8(events.stdout)?.lines() {
        let event: Value = serde_json::from_str(line)?;
        if event["kind"] == "mended" {
            let text = event["text"].as_str().context("a text")?;
            blocks += text.split(' ').next().context("a number")?.parse::<usize>()?;
        }
    }
    Ok(blocks)
}

/// Three servers whose scrub is quick.
fn start_scrubbing(lab: &Lab) -> Result<Cluster<'_>> {
    let sizes = PoolSizes { fast_mib: 192, mass_mib: 256, buffers_mib: 64, ..Default::default() };
    let configuration = "scrub = \"64M\"\n".to_owned();
    Cluster::start_of(
        lab,
        ClusterOptions { servers: 3, sizes, configuration, ..Default::default() },
    )
}

/// Waits until a server's part of the volume is home, and lets some blocks of it rot.
fn rot(lab: &Lab, cluster: &Cluster<'_>, number: usize) -> Result<()> {
    let server = &cluster.servers()[number];
    let mass = lab.directory().join(format!("{}-mass", server.name()));
    wait_until("data to be home", Deadline::seconds(PATIENCE_SECONDS), || {
        let metrics = server.metrics()?;
        let is_home = metrics.lines().any(|line| line == "holdfast_log_dirty_bytes 0");
        Ok((is_home && blocks_in(&std::fs::read(&mass)?).len() >= 2 * ROTTEN).then_some(()))
    })?;
    let at_home = blocks_in(&std::fs::read(&mass)?);
    for offset in at_home.iter().step_by(at_home.len() / ROTTEN).take(ROTTEN) {
        overwrite(&mass, u64::try_from(*offset)? + 1000, b"rot")?;
    }
    Ok(())
}

fn wait_mended(cluster: &Cluster<'_>) -> Result<()> {
    wait_until("the rot to be mended", Deadline::seconds(PATIENCE_SECONDS), || {
        Ok((mended_blocks(cluster)? >= ROTTEN).then_some(()))
    })
}

/// Bytes change on a server's disk. Its scrub finds them, the head writes them again, and nobody is given a
/// wrong byte meanwhile.
#[test]
fn rot_in_a_pool_is_found_and_mended() {
    test(1, |lab: &Lab| {
        let cluster = start_scrubbing(lab)?;
        cluster.create_volume("disk", VOLUME_MIB, 3)?;
        let socket = cluster.export(0, "disk")?;
        let oracle = fill_all(&socket, options().blocks)?;
        rot(lab, &cluster, 1)?;
        let oracle = verify(&socket, oracle)?;
        wait_mended(&cluster)?;
        cluster.wait_all_well(0, "disk")?;
        // The server that had it all wrong serves it, beside another one, to a head elsewhere.
        cluster.unexport(0, &socket)?;
        cluster.servers()[2].kill()?;
        let socket = cluster.export(1, "disk")?;
        verify(&socket, oracle)?;
        Ok(())
    });
}

/// The same with nobody there to read it: the server whose disk rots opens the volume for as long as it
/// takes to mend it.
#[test]
fn rot_in_a_volume_that_nobody_has_attached_is_mended() {
    test(1, |lab: &Lab| {
        let cluster = start_scrubbing(lab)?;
        cluster.create_volume("disk", VOLUME_MIB, 3)?;
        let socket = cluster.export(0, "disk")?;
        let oracle = fill_all(&socket, options().blocks)?;
        cluster.unexport(0, &socket)?;
        rot(lab, &cluster, 1)?;
        wait_mended(&cluster)?;
        wait_until("the volume to be free", Deadline::seconds(PATIENCE_SECONDS), || {
            let volume = cluster.holdfast(&["volume", "show", "disk"])?;
            let metrics = cluster.servers()[1].metrics()?;
            let whole = metrics.lines().any(|line| line == "holdfast_damaged_blocks 0");
            Ok((volume["holder"].is_null() && whole).then_some(()))
        })?;
        cluster.servers()[2].kill()?;
        let socket = cluster.export(1, "disk")?;
        verify(&socket, oracle)?;
        Ok(())
    });
}

/// A guest's last writes, which it did not flush, go home as everything else does: a server opens the volume
/// to learn that it may take them there.
#[test]
fn what_a_guest_left_without_a_flush_goes_home() {
    test(1, |lab: &Lab| {
        let cluster = start(lab, 3)?;
        cluster.create_volume("disk", VOLUME_MIB, 3)?;
        let socket = cluster.export(0, "disk")?;
        let oracle = fill_all(&socket, 200)?;
        cluster.unexport(0, &socket)?;
        wait_until("the log to be settled", Deadline::seconds(PATIENCE_SECONDS), || {
            for server in cluster.servers() {
                let replica = &server.status()?["replicas"][0];
                if replica["commit_seq"] != replica["last_seq"] {
                    return Ok(None);
                }
            }
            let volume = cluster.holdfast(&["volume", "show", "disk"])?;
            Ok(volume["holder"].is_null().then_some(()))
        })?;
        let socket = cluster.export(1, "disk")?;
        verify(&socket, oracle)?;
        Ok(())
    });
}

/// The last record that a server's only replica holds.
fn end_of_log(server: &Server) -> Result<u64> {
    let status = server.status()?;
    status["replicas"][0]["last_seq"].as_u64().context("a replica with a log")
}

/// A server was away when the last guest left. When it is back it is brought what it lacks, though nobody has
/// the volume attached: then the loss of another one costs nothing.
#[test]
fn a_server_that_comes_back_to_a_volume_that_nobody_has_attached_catches_up() {
    test(1, |lab: &Lab| {
        let cluster = start(lab, 3)?;
        cluster.create_volume("disk", VOLUME_MIB, 3)?;
        let absent = &cluster.servers()[2];
        let mut oracle = Oracle::new(options().blocks);
        // Away when the volume is opened, and away only later.
        for before in [true, false] {
            if before {
                absent.kill()?;
            }
            let mut attached = attach(&cluster, &[])?;
            let load = Load::start(&attached.socket, options(), oracle)?;
            load.wait_for(400, Deadline::seconds(PATIENCE_SECONDS))?;
            absent.kill()?;
            load.wait_for(1200, Deadline::seconds(PATIENCE_SECONDS))?;
            oracle = load.finish()?;
            attached.process.terminate(Deadline::seconds(PATIENCE_SECONDS))?;
            absent.start()?;
            wait_until("all to hold the same", Deadline::seconds(PATIENCE_SECONDS), || {
                let ends = cluster.servers().iter().map(end_of_log);
                let ends = ends.collect::<Result<Vec<_>>>()?;
                let volume = cluster.holdfast(&["volume", "show", "disk"])?;
                let same = ends.iter().all(|end| *end == ends[0]);
                Ok((volume["holder"].is_null() && same).then_some(()))
            })
            .with_context(|| format!("away before the opening: {before}"))?;
        }
        cluster.servers()[0].kill()?;
        let mut attached = attach(&cluster, &[])?;
        verify(&attached.socket, oracle)?;
        attached.process.terminate(Deadline::seconds(PATIENCE_SECONDS))?;
        Ok(())
    });
}
