//! The process that serves a running guest's disk is killed and comes back: short forms of what
//! `scripts/dev bench restart` does. `HOLDFAST_LOOP_MINUTES=n` runs each for n minutes.

use anyhow::ensure;
use framework::failover::Amount;
use framework::fio::{Fio, Verify};
use framework::restart::Victim;
use framework::{Cluster, Deadline, Guest, GuestOptions, Lab, Place, test};

fn repeat(victim: Victim, runs: usize) {
    test(1, |lab: &Lab| {
        victim.repeat(lab, Amount::from_environment(runs), &mut |run| {
            eprintln!("{}: {run:?}", victim.name());
        })
    });
}

#[test]
fn a_daemon_is_killed_under_its_guest_and_comes_back() {
    repeat(Victim::Daemon, 2);
}

#[test]
fn an_attachment_is_killed_under_its_guest_and_comes_back() {
    repeat(Victim::Attach, 2);
}

#[test]
fn a_daemon_is_killed_again_while_it_recovers() {
    repeat(Victim::DaemonTwice, 1);
}

#[test]
fn an_attachment_is_killed_again_while_it_recovers() {
    repeat(Victim::AttachTwice, 1);
}

/// Exit status of `holdfast` when something is in the way.
const CONFLICT: i32 = 4;
/// Exit status of `holdfast attach` when another holder has taken the volume.
const SUPERSEDED: i32 = 7;

/// The host dies with its guest, the guest is started on another host, and then the first host turns out
/// to live: once with the process that served, which was only stopped, once with a new one.
#[test]
fn a_volume_whose_host_died_is_served_elsewhere_and_the_first_host_does_no_harm() {
    test(1, |lab: &Lab| {
        let cluster = Cluster::start(lab, 3)?;
        cluster.create_volume("disk", 64, 3)?;
        let mut first = cluster.attach("disk")?;
        let old = Fio::new("/dev/vda", "randwrite").size_mib(12).verify(Verify::Pattern);
        let new = old.clone().seed(2);
        {
            let options = GuestOptions::new("before").disk("disk", &first.socket);
            let mut guest = Guest::boot(lab, &options)?;
            old.run(&mut guest)?;
            // A pass that nobody will see the end of.
            let _unfinished = new.clone().rate(500).start(&mut guest)?;
            first.process.pause()?;
            guest.kill()?;
        }

        // Without force it stays where it is said to be.
        let mut refused = cluster.start_attach("disk", &Place::HERE, &[])?;
        let status = refused.process.wait(Deadline::seconds(60))?;
        ensure!(status.code() == Some(CONFLICT), "a second attachment ended with {status}");
        let mut second = cluster.start_attach("disk", &Place::HERE, &["--force"])?;
        second.wait_for_socket()?;
        let mut guest = Guest::boot(lab, &GuestOptions::new("after").disk("disk", &second.socket))?;
        new.run(&mut guest)?;

        // The first host's process goes on where it was: it has requests of its dead guest.
        first.process.resume()?;
        let status = first.process.wait(Deadline::seconds(60))?;
        ensure!(status.code() == Some(SUPERSEDED), "the deposed attachment ended with {status}");
        new.check_only(&mut guest)?;
        // And then a service manager starts it again.
        cluster.attach_again("disk", &mut first)?;
        let status = first.process.wait(Deadline::seconds(60))?;
        ensure!(status.code() == Some(CONFLICT), "the first host's attachment ended with {status}");
        new.check_only(&mut guest)?;

        let last = old.seed(3);
        last.run(&mut guest)?;
        guest.check_no_complaints()?;
        guest.power_off()?;
        second.process.check_alive()
    });
}
