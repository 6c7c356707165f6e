//! Guests that move with several disks and queues, that grow on the way, and whose destination dies. Their
//! fio verifies everything.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use framework::fio::{Fio, Verify};
use framework::migration::{move_guest, move_guest_meanwhile};
use framework::{
    Attached, Cluster, Deadline, Guest, GuestOptions, Lab, Place, holdfast_binary,
    loopback_address, test, wait_until,
};

/// What a step may take on a busy machine.
const PATIENCE_SECONDS: u64 = 120;

const VOLUME_MIB: u64 = 64;

fn standby(cluster: &Cluster<'_>, volume: &str, more: &[&str]) -> Result<Attached> {
    let options = [&["--standby"], more].concat();
    let mut attached = cluster.start_attach(volume, &Place::HERE, &options)?;
    attached.wait_for_socket()?;
    Ok(attached)
}

fn options(name: &str, sockets: &[&Attached]) -> GuestOptions {
    let mut options = GuestOptions::new(name);
    options.limit *= 2;
    for (number, attached) in sockets.iter().enumerate() {
        options = options.disk(&format!("disk{number}"), &attached.socket);
    }
    options
}

fn address() -> String {
    format!("tcp:{}", loopback_address())
}

/// Writes that go on for a while, and are read back in the end.
fn pass(disk: &str, seed: u32) -> Fio {
    Fio::new(disk, "randwrite").size_mib(24).verify(Verify::Pattern).seed(seed).rate(600)
}

fn wait_for_writes(guest: &mut Guest, disk: &str, count: u64) -> Result<()> {
    let written = |guest: &mut Guest| -> Result<u64> {
        let text = guest.sh(&format!("awk '{{print $5}}' /sys/block/{disk}/stat"))?;
        text.trim().parse().context("a number of writes")
    };
    let goal = written(guest)? + count;
    wait_until("the guest's writes", Deadline::seconds(PATIENCE_SECONDS), || {
        Ok((written(guest)? >= goal).then_some(()))
    })
}

#[test]
fn several_disks_with_several_queues_move_together() {
    test(1, |lab: &Lab| {
        let cluster = Cluster::start(lab, 3)?;
        let host = |cluster: &Cluster<'_>| {
            let queues = ["--queues", "2"];
            Ok::<_, anyhow::Error>([
                standby(cluster, "one", &queues)?,
                standby(cluster, "two", &queues)?,
            ])
        };
        cluster.create_volume("one", VOLUME_MIB, 3)?;
        cluster.create_volume("two", VOLUME_MIB, 3)?;
        let hosts = [host(&cluster)?, host(&cluster)?];
        let guest_on = |number: usize, name: &str| {
            let [first, second] = &hosts[number];
            GuestOptions { cpus: 2, ..options(name, &[first, second]) }
        };
        let mut guest = Guest::boot(lab, &guest_on(0, "guest0"))?;
        for disk in ["vda", "vdb"] {
            let queues = guest.sh(&format!("ls /sys/block/{disk}/mq | wc -l"))?;
            ensure!(queues.trim() == "2", "{disk} has {queues} queues");
        }
        for number in 1..=2_u32 {
            let (first, second) = (pass("/dev/vda", number), pass("/dev/vdb", 100 + number));
            let jobs = (first.start(&mut guest)?, second.start(&mut guest)?);
            wait_for_writes(&mut guest, "vda", 200)?;
            wait_for_writes(&mut guest, "vdb", 200)?;
            let there = guest_on(usize::try_from(number % 2)?, &format!("guest{number}"));
            guest = move_guest(lab, guest, &there, &address())?.0;
            first.finish(&mut guest, jobs.0)?;
            second.finish(&mut guest, jobs.1)?;
        }
        guest.check_no_complaints()?;
        guest.power_off()?;
        for [mut first, mut second] in hosts {
            first.process.check_alive()?;
            second.process.check_alive()?;
        }
        Ok(())
    });
}

#[test]
fn a_volume_grows_while_its_guest_moves() {
    test(1, |lab: &Lab| {
        let cluster = Cluster::start(lab, 3)?;
        cluster.create_volume("disk", VOLUME_MIB, 3)?;
        let hosts = [standby(&cluster, "disk", &[])?, standby(&cluster, "disk", &[])?];
        let mut guest = Guest::boot(lab, &options("guest0", &[&hosts[0]]))?;
        let fio = pass("/dev/vda", 1);
        let job = fio.start(&mut guest)?;
        wait_for_writes(&mut guest, "vda", 100)?;
        let there = options("guest1", &[&hosts[1]]);
        let mut guest = move_guest_meanwhile(lab, guest, &there, &address(), || {
            let view = cluster.holdfast(&["volume", "resize", "disk", "96M"])?;
            ensure!(view["state"] == "served", "{view}");
            Ok(())
        })?;
        wait_until("the new size", Deadline::seconds(PATIENCE_SECONDS), || {
            let size = guest.sh("blockdev --getsize64 /dev/vda")?;
            Ok((size.trim() == (96_u64 << 20).to_string()).then_some(()))
        })?;
        fio.finish(&mut guest, job)?;
        // What is new there is all of it: also beyond the old end.
        let last = "dd if=/dev/vda bs=1M skip=64 count=32 iflag=direct 2>/dev/null | cmp -n 33554432 - /dev/zero";
        guest.sh(last)?;
        Fio { size_mib: 96, rate: None, ..pass("/dev/vda", 2) }.run(&mut guest)?;
        guest.check_no_complaints()?;
        guest.power_off()
    });
}

/// A pass at the destination, which then dies: with the guest only, and with what serves its disk.
#[test]
fn a_guest_is_started_at_its_source_when_its_destination_died() {
    test(1, |lab: &Lab| {
        let cluster = Cluster::start(lab, 3)?;
        cluster.create_volume("disk", VOLUME_MIB, 3)?;
        let (here, mut there) = (standby(&cluster, "disk", &[])?, standby(&cluster, "disk", &[])?);
        let mut guest = Guest::boot(lab, &options("guest0", &[&here]))?;
        for (number, whole_host) in [(1, false), (2, true)] {
            let last = pass("/dev/vda", 10 + number);
            let first = pass("/dev/vda", number);
            let job = first.start(&mut guest)?;
            wait_for_writes(&mut guest, "vda", 200)?;
            let moved = options(&format!("guest{number}-moved"), &[&there]);
            let (mut moved, _downtime) = move_guest(lab, guest, &moved, &address())?;
            first.finish(&mut moved, job)?;
            last.run(&mut moved)?;
            moved.check_no_complaints()?;
            if whole_host {
                // First: the back end yields within a millisecond of its front end's end.
                there.process.kill()?;
            }
            moved.kill()?;
            let again = options(&format!("guest{number}-again"), &[&here]);
            guest = if whole_host {
                boot_after_release(lab, &cluster, &again)?
            } else {
                // The destination yields by itself.
                Guest::boot(lab, &again)?
            };
            last.check_only(&mut guest)?;
        }
        guest.check_no_complaints()?;
        guest.power_off()
    });
}

/// Nobody knows that the destination's host is gone for good until somebody says so.
fn boot_after_release(lab: &Lab, cluster: &Cluster<'_>, options: &GuestOptions) -> Result<Guest> {
    let (program, store) = (holdfast_binary("holdfast")?, cluster.store().to_owned());
    let operator = move || {
        let holdfast = |arguments: &[&str]| -> Result<String> {
            let output =
                Command::new(&program).args(["--store", &store]).args(arguments).output()?;
            ensure!(output.status.success(), "holdfast {arguments:?}: {output:?}");
            Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        };
        wait_until("the guest to wait visibly", Deadline::seconds(PATIENCE_SECONDS), || {
            let volume = holdfast(&["--json", "volume", "show", "disk"])?;
            let volume: serde_json::Value = serde_json::from_str(&volume)?;
            Ok(volume["waiting"].is_string().then_some(()))
        })?;
        holdfast(&["volume", "release", "disk", "--force"])
    };
    std::thread::scope(|scope| {
        let operator = scope.spawn(operator);
        let guest = Guest::boot(lab, options);
        operator.join().expect("the operator does not panic")?;
        guest
    })
}
