//! What docs/operations.md says of libvirt, line by line: a guest of its own, a back end that dies under it,
//! and `virsh migrate`. Runs where libvirt is installed (`scripts/install libvirt`).

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use framework::fio::{Fio, Verify};
use framework::{Cluster, Deadline, Domain, Lab, Libvirt, Place, Server, skip, test, wait_until};

/// How long the guest lives at most.
const LIMIT: Duration = Duration::from_mins(8);

/// How long a command in it may take.
const COMMAND: Duration = Duration::from_mins(1);

/// How long the guest's writer may take for what it is waited for.
const PATIENCE_SECONDS: u64 = 240;

/// Requests to write that the guest has had answered.
fn writes(guest: &mut Domain) -> Result<u64> {
    let text = guest.sh("awk '{print $5}' /sys/block/vda/stat", COMMAND)?;
    text.trim().parse().context("a number of writes")
}

/// Waits until the guest got on.
fn get_on(guest: &mut Domain, count: u64) -> Result<()> {
    let goal = writes(guest)? + count;
    wait_until("the guest's writes", Deadline::seconds(PATIENCE_SECONDS), || {
        Ok((writes(guest)? >= goal).then_some(()))
    })
}

#[test]
fn a_guest_of_libvirt_outlives_its_back_end_and_moves() {
    if let Some(reason) = Libvirt::unavailable() {
        return skip(&reason);
    }
    test(1, |lab: &Lab| {
        let cluster = Cluster::start(lab, 3)?;
        cluster.create_volume("disk", 64, 3)?;
        let mut here = cluster.attach("disk")?;
        let mut there = cluster.start_attach("disk", &Place::HERE, &["--standby"])?;
        there.wait_for_socket()?;
        let (one, two) = (Libvirt::start(lab, 1)?, Libvirt::start(lab, 2)?);
        let mut guest = one.boot(lab, "guest", &here.socket, LIMIT)?;

        // A writer that checks everything in the end.
        let fio = Fio::new("/dev/vda", "randwrite").size_mib(48).verify(Verify::Pattern).rate(400);
        let script = format!("cat >/tmp/job <<'END'\n{}\nEND\n", fio.command_line());
        guest.sh(&script, COMMAND)?;
        let start =
            "setsid sh -c 'sh /tmp/job >/tmp/out 2>&1; echo $? >/tmp/status' >/dev/null 2>&1 &";
        guest.sh(start, COMMAND)?;
        get_on(&mut guest, 200)?;

        here.process.kill()?;
        cluster.attach_again("disk", &mut here)?;
        get_on(&mut guest, 400)?;

        let mut guest = one.migrate(lab, guest, &two, &there.socket)?;
        ensure!(
            one.virsh(&["list", "--name"])?.trim().is_empty(),
            "the guest is still at the source"
        );
        let moved = two.virsh(&["domstate", guest.name()])?;
        ensure!(moved.trim() == "running", "the guest is {moved} at the destination");
        get_on(&mut guest, 200)?;

        wait_until("the guest's writer to end", Deadline::seconds(PATIENCE_SECONDS), || {
            Ok(guest
                .sh("[ ! -e /tmp/status ] || echo over", COMMAND)?
                .contains("over")
                .then_some(()))
        })?;
        let ended = guest.sh("cat /tmp/status /tmp/out", COMMAND)?;
        ensure!(ended.starts_with("0\n"), "the guest's writer: {ended}");
        guest.check_no_complaints()?;
        two.virsh(&["destroy", guest.name()])?;
        here.process.check_alive()?;
        there.process.check_alive()?;
        cluster.servers().iter().try_for_each(Server::check_alive)
    });
}
