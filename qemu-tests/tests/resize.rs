//! Volumes grow under their guests.

use anyhow::{Context, Result, ensure};
use framework::{Attached, Cluster, Deadline, Guest, GuestOptions, Lab, test, wait_until};

/// How long anything may take on a busy machine.
const PATIENCE_SECONDS: u64 = 60;
const MIB: u64 = 1 << 20;

fn resize(cluster: &Cluster, mib: u64) -> Result<String> {
    let view = cluster.holdfast(&["volume", "resize", "disk", &format!("{mib}M")])?;
    ensure!(view["size_bytes"] == mib * MIB, "{view}");
    Ok(view["state"].as_str().context("a state")?.to_owned())
}

fn wait_for_size(guest: &mut Guest, mib: u64) -> Result<()> {
    wait_until(&format!("{mib} MiB in the guest"), Deadline::seconds(PATIENCE_SECONDS), || {
        let size = guest.sh("blockdev --getsize64 /dev/vda")?;
        Ok((size.trim() == (mib * MIB).to_string()).then_some(()))
    })
}

/// The new end reads as zeroes, takes what is written there, and gives it back.
fn use_the_end(guest: &mut Guest, old_mib: u64, new_mib: u64) -> Result<()> {
    let (first, last) = (old_mib * 256, new_mib * 256 - 1);
    let at = |block: u64| format!("dd if=/dev/vda bs=4k skip={block} count=1 iflag=direct");
    for block in [first, last] {
        guest.sh(&format!("{} 2>/dev/null | cmp -n 4096 - /dev/zero", at(block)))?;
        let write = format!("dd of=/dev/vda bs=4k seek={block} oflag=direct conv=fsync");
        guest.sh(&format!("yes {block} | head -c 4096 | {write} 2>/dev/null"))?;
    }
    check_the_end(guest, old_mib, new_mib)
}

fn check_the_end(guest: &mut Guest, old_mib: u64, new_mib: u64) -> Result<()> {
    for block in [old_mib * 256, new_mib * 256 - 1] {
        let read = format!("dd if=/dev/vda bs=4k skip={block} count=1 iflag=direct 2>/dev/null");
        let found = guest.sh(&format!("{read} | head -n 1"))?;
        ensure!(found.trim() == block.to_string(), "block {block} has {found}");
    }
    Ok(())
}

#[test]
fn a_guest_sees_its_disk_grow() {
    test(1, |lab: &Lab| {
        let cluster = Cluster::start(lab, 3)?;
        cluster.create_volume("disk", 64, 3)?;
        // Nobody has attached it yet.
        ensure!(resize(&cluster, 72)? == "resized");
        let socket = cluster.export(0, "disk")?;
        let mut guest = Guest::boot(lab, &GuestOptions::new("guest").disk("disk", &socket))?;
        wait_for_size(&mut guest, 72)?;

        ensure!(resize(&cluster, 96)? == "served");
        wait_for_size(&mut guest, 96)?;
        use_the_end(&mut guest, 72, 96)?;
        ensure!(resize(&cluster, 96)? == "unchanged");
        let smaller = cluster.holdfast_output(&["volume", "resize", "disk", "64M"])?;
        let text = String::from_utf8_lossy(&smaller.stderr).into_owned();
        ensure!(smaller.status.code() == Some(2) && text.contains("volumes only grow"), "{text}");
        let larger = cluster.holdfast_output(&["volume", "resize", "disk", "2T"])?;
        let text = String::from_utf8_lossy(&larger.stderr).into_owned();
        ensure!(larger.status.code() == Some(5) && text.contains("bytes of room"), "{text}");

        // The next process has the front end's back-end channel, too.
        cluster.servers()[0].upgrade()?;
        ensure!(resize(&cluster, 112)? == "served");
        wait_for_size(&mut guest, 112)?;
        use_the_end(&mut guest, 96, 112)?;

        // A member is away while it grows once more, and the daemon dies.
        cluster.servers()[2].kill()?;
        ensure!(resize(&cluster, 128)? == "served");
        wait_for_size(&mut guest, 128)?;
        use_the_end(&mut guest, 112, 128)?;
        cluster.servers()[0].kill()?;
        cluster.servers()[0].start()?;
        cluster.servers()[2].start()?;
        check_the_end(&mut guest, 72, 96)?;
        check_the_end(&mut guest, 96, 128)?;
        // The one that was away has it all: the other one goes.
        cluster.wait_all_well(0, "disk")?;
        cluster.servers()[1].kill()?;
        guest.sh("echo 3 >/proc/sys/vm/drop_caches")?;
        check_the_end(&mut guest, 96, 128)?;
        use_the_end(&mut guest, 128 - 8, 128 - 4)?;
        guest.check_no_complaints()?;
        guest.power_off()
    });
}

#[test]
fn an_attached_volume_grows_also_while_its_process_is_away() {
    test(1, |lab: &Lab| {
        let cluster = Cluster::start(lab, 3)?;
        cluster.create_volume("disk", 64, 3)?;
        let mut attached: Attached = cluster.attach("disk")?;
        let options = GuestOptions::new("guest").disk("disk", &attached.socket);
        let mut guest = Guest::boot(lab, &options)?;
        ensure!(resize(&cluster, 80)? == "served");
        wait_for_size(&mut guest, 80)?;
        use_the_end(&mut guest, 64, 80)?;
        cluster.upgrade_attach("disk", &mut attached, &[])?;
        ensure!(resize(&cluster, 88)? == "served");
        wait_for_size(&mut guest, 88)?;
        use_the_end(&mut guest, 80, 88)?;

        attached.process.kill()?;
        let told = cluster.holdfast(&["volume", "resize", "disk", "96M", "--wait", "0"])?;
        ensure!(told["state"] == "telling", "{told}");
        cluster.attach_again("disk", &mut attached)?;
        // QEMU asks for the configuration only when it is told to.
        wait_for_size(&mut guest, 96)?;
        use_the_end(&mut guest, 88, 96)?;
        check_the_end(&mut guest, 64, 80)?;
        check_the_end(&mut guest, 80, 88)?;
        guest.check_no_complaints()?;
        guest.power_off()?;
        attached.process.check_alive()
    });
}
