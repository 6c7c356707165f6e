//! Daemons are upgraded under clients that cannot reconnect, and under a guest.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use framework::fio::{Fio, Verify};
use framework::{
    Attached, Cluster, Deadline, Guest, GuestOptions, Lab, Load, LoadOptions, Oracle, Place,
    PoolSizes, Process, test, verify, wait_until,
};

/// Requests that must be answered between two upgrades.
const REQUESTS: u64 = 500;

/// How long anything may take on a busy machine.
fn patience() -> Deadline {
    Deadline::seconds(60)
}

fn small() -> PoolSizes {
    PoolSizes { buffers_mib: 48, ..PoolSizes::default() }
}

fn load(socket: &Path, seed: u64) -> Result<Load> {
    let options = LoadOptions { seed, rate: 2000, blocks: 4096, ..LoadOptions::default() };
    Load::start(socket, options, Oracle::new(options.blocks))
}

/// Upgrades server 0 `times` times under `loads`; the longest pause.
fn upgrade_under(cluster: &Cluster<'_>, loads: &[Load], times: usize) -> Result<Duration> {
    let mut longest = Duration::ZERO;
    for _ in 0..times {
        for load in loads {
            load.wait_for(REQUESTS, patience())?;
            load.begin_window();
        }
        let before = cluster.servers()[0].pid()?;
        cluster.servers()[0].upgrade()?;
        ensure!(cluster.servers()[0].pid()? != before, "another process serves");
        for load in loads {
            load.wait_for(REQUESTS, patience())?;
            longest = longest.max(load.end_window().pause);
        }
    }
    Ok(longest)
}

#[test]
fn clients_without_reconnect_do_not_notice_upgrades() {
    test(1, |lab: &Lab| {
        let cluster = Cluster::start_with(lab, 3, small())?;
        let mut sockets = Vec::new();
        let mut loads = Vec::new();
        for (volume, replicas) in [("one", 3), ("two", 1)] {
            cluster.create_volume(volume, 64, replicas)?;
            let socket = cluster.export(0, volume)?;
            loads.push(load(&socket, replicas as u64)?);
            sockets.push(socket);
        }
        let longest = upgrade_under(&cluster, &loads, 4)?;
        println!("the longest pause was {} ms", longest.as_millis());
        for (socket, load) in sockets.iter().zip(loads) {
            let oracle = load.finish()?;
            // New front ends find the same socket.
            verify(socket, oracle)?;
        }
        // What the API had added is still known, and can be removed.
        cluster.unexport(0, &sockets[0])?;
        ensure!(!sockets[0].exists(), "the socket is gone");
        cluster.servers()[0].stop()
    });
}

#[test]
fn a_next_process_that_fails_leaves_the_running_one_serving() {
    test(1, |lab: &Lab| {
        let cluster = Cluster::start_with(lab, 3, small())?;
        cluster.create_volume("disk", 64, 3)?;
        let socket = cluster.export(0, "disk")?;
        let server = &cluster.servers()[0];
        let load = load(&socket, 7)?;
        let pid = server.pid()?;
        for what in ["version", "noise", "leave", "die", "silence", "die"] {
            load.wait_for(REQUESTS, patience())?;
            let mut peer = misbehave(lab, &server.upgrade_socket(), what)?;
            let ended = peer.wait(patience())?;
            // Who stays silent is killed, and who is about to end may be.
            let by_itself = matches!(what, "version" | "noise");
            ensure!(!by_itself || ended.success(), "{what}: {ended}");
            ensure!(what != "silence" || !ended.success(), "{what}: {ended}");
            load.wait_for(REQUESTS, patience()).with_context(|| what.to_owned())?;
            ensure!(server.pid()? == pid, "the same process serves");
            server.check_alive()?;
        }
        fails_with_another_pool(&cluster, lab)?;
        load.wait_for(REQUESTS, patience())?;
        ensure!(server.pid()? == pid, "the same process serves");
        // And after all that, one that works.
        upgrade_under(&cluster, std::slice::from_ref(&load), 1)?;
        verify(&socket, load.finish()?)?;
        Ok(())
    });
}

/// A new process that finds out only after it has everything that it cannot serve.
fn fails_with_another_pool(cluster: &Cluster<'_>, lab: &Lab) -> Result<()> {
    let server = &cluster.servers()[0];
    let text = std::fs::read_to_string(server.config())?;
    let wrong = lab.directory().join("wrong.toml");
    std::fs::write(&wrong, text.replace("a-fast", "a-nothing"))?;
    let mut next = server.start_upgrade(Some(&wrong))?;
    let ended = next.wait(patience())?;
    ensure!(!ended.success(), "it cannot have served");
    Ok(())
}

fn misbehave(lab: &Lab, socket: &Path, what: &str) -> Result<Process> {
    let program = Path::new(env!("CARGO_BIN_EXE_upgrade_peer"));
    let arguments = [socket.display().to_string(), what.to_owned()];
    Process::start(&format!("upgrade_peer {what}"), program, arguments, &lab.log("upgrade-peer"))
}

/// Where a `holdfast attach` can be asked to hand everything over.
fn upgrade_socket(attached: &Attached) -> PathBuf {
    PathBuf::from(format!("{}.upgrade", attached.socket.display()))
}

fn end(attached: &mut Attached) -> Result<()> {
    let ended = attached.process.terminate(patience())?;
    ensure!(ended.success(), "it ended with {ended}");
    Ok(())
}

#[test]
fn clients_of_an_attached_volume_do_not_notice_upgrades() {
    test(1, |lab: &Lab| {
        let cluster = Cluster::start_with(lab, 3, small())?;
        cluster.create_volume("disk", 64, 3)?;
        let mut attached = cluster.attach("disk")?;
        let load = load(&attached.socket, 11)?;
        let mut longest = Duration::ZERO;
        for round in 0..4 {
            load.wait_for(REQUESTS, patience())?;
            load.begin_window();
            // A head that was deposed gives up: it must not take its successor for another one.
            cluster.upgrade_attach("disk", &mut attached, &[])?;
            load.wait_for(REQUESTS, patience()).with_context(|| format!("round {round}"))?;
            longest = longest.max(load.end_window().pause);
        }
        println!("the longest pause was {} ms", longest.as_millis());
        attached.process.check_alive()?;
        verify(&attached.socket, load.finish()?)?;
        end(&mut attached)?;
        ensure!(!attached.socket.exists(), "the socket is gone");
        ensure!(!upgrade_socket(&attached).exists(), "the socket for upgrades, too");
        // It has given the lease back.
        end(&mut cluster.attach("disk")?)
    });
}

#[test]
fn a_next_attach_that_fails_leaves_the_running_one_serving() {
    test(1, |lab: &Lab| {
        let cluster = Cluster::start_with(lab, 3, small())?;
        cluster.create_volume("disk", 64, 3)?;
        cluster.create_volume("other", 64, 3)?;
        let mut attached = cluster.attach("disk")?;
        let load = load(&attached.socket, 13)?;
        for what in ["version", "leave", "die", "silence"] {
            load.wait_for(REQUESTS, patience())?;
            let mut peer = misbehave(lab, &upgrade_socket(&attached), what)?;
            peer.wait(patience())?;
            load.wait_for(REQUESTS, patience()).with_context(|| what.to_owned())?;
            attached.process.check_alive()?;
        }
        // Other arguments than those of the one that runs, and one that runs already.
        for (volume, more) in [("other", ""), ("disk", "--standby"), ("disk", "--read-only")] {
            let more: Vec<&str> = [more].into_iter().filter(|text| !text.is_empty()).collect();
            let mut next = cluster.start_attach_upgrade(volume, &attached, &more)?;
            let ended = next.wait(patience())?;
            ensure!(ended.code() == Some(2), "{volume} {more:?}: {ended}");
        }
        load.wait_for(REQUESTS, patience())?;
        for round in 0..5 {
            dies_half_way(&cluster, &mut attached, &load, round)
                .with_context(|| format!("round {round}"))?;
        }
        cluster.upgrade_attach("disk", &mut attached, &[])?;
        load.wait_for(REQUESTS, patience())?;
        verify(&attached.socket, load.finish()?)?;
        end(&mut attached)
    });
}

/// The next process is stopped at some moment. If it has not taken over by then it dies there.
fn dies_half_way(
    cluster: &Cluster<'_>,
    attached: &mut Attached,
    load: &Load,
    round: u64,
) -> Result<()> {
    let mut next = cluster.start_attach_upgrade("disk", attached, &[])?;
    load.wait_for(REQUESTS / 10 * round, patience())?;
    next.pause()?;
    let gone =
        wait_until("the one before to end", Deadline::seconds(2), || attached.process.try_wait());
    match gone {
        // Between the two there was nothing to stop.
        Ok(_) => {
            next.resume()?;
            attached.process = next;
        }
        Err(_) => next.kill()?,
    }
    load.wait_for(REQUESTS, patience())?;
    attached.process.check_alive()
}

#[test]
fn a_standby_is_upgraded_before_and_after_its_guest_comes() {
    test(1, |lab: &Lab| {
        let cluster = Cluster::start_with(lab, 3, small())?;
        cluster.create_volume("disk", 64, 3)?;
        let standby = ["--standby"];
        let mut attached = cluster.start_attach("disk", &Place::default(), &standby)?;
        attached.wait_for_socket()?;
        cluster.upgrade_attach("disk", &mut attached, &standby)?;
        let load = load(&attached.socket, 17)?;
        load.wait_for(REQUESTS, patience())?;
        cluster.upgrade_attach("disk", &mut attached, &standby)?;
        load.wait_for(REQUESTS, patience())?;
        let oracle = load.finish()?;
        // Its guest is gone, so it yields: another one may have the volume, and it does not take
        // it back when it is upgraded.
        let mut other = cluster.start_attach("disk", &Place::default(), &standby)?;
        other.wait_for_socket()?;
        verify(&other.socket, oracle)?;
        cluster.upgrade_attach("disk", &mut attached, &standby)?;
        end(&mut other)?;
        end(&mut attached)
    });
}

#[test]
fn a_guest_under_fio_sees_upgrades_as_pauses() {
    test(1, |lab: &Lab| {
        let cluster = Cluster::start_with(lab, 3, small())?;
        cluster.create_volume("disk", 128, 3)?;
        let socket = cluster.export(0, "disk")?;
        let mut guest = Guest::boot(lab, &GuestOptions::new("guest").disk("disk", &socket))?;
        let pass = Fio::new("/dev/vda", "randwrite").size_mib(24);
        pass.clone().verify(Verify::Pattern).run(&mut guest)?;
        let second = pass.verify(Verify::Crc32c).rate(1000);
        let job = second.start(&mut guest)?;
        for _ in 0..3 {
            let before = requests(&cluster)?;
            wait_until("writes of the guest", patience(), || {
                Ok((requests(&cluster)? >= before + 300).then_some(()))
            })?;
            cluster.servers()[0].upgrade()?;
        }
        second.finish(&mut guest, job)?;
        guest.check_no_complaints()?;
        guest.power_off()
    });
}

/// Writes that the head in server 0 has answered since it opened.
fn requests(cluster: &Cluster<'_>) -> Result<u64> {
    let status = cluster.servers()[0].status()?;
    let head = status["heads"].get(0).context("a head")?;
    head["last_seq"].as_u64().context("last_seq")
}
