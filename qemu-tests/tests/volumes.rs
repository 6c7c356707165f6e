//! Guests on replicated volumes, served by real daemons, some of which die.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use blkio_client::{Client, Operation};
use framework::fio::{Fio, Verify};
use framework::{Cluster, Deadline, Disk, Guest, GuestOptions, Lab, PoolSizes, test, wait_until};

/// Makes a partition and a file system on the disk, and a file with random bytes and its sum.
fn fill(guest: &mut Guest, device: &str) -> Result<()> {
    guest.sh(&format!("echo 'label: gpt\n,' | sfdisk --quiet {device}"))?;
    guest.sh(&format!("mkfs.ext4 -q {device}1 && mount {device}1 /mnt"))?;
    guest.sh("dd if=/dev/urandom of=/mnt/data bs=64k count=96 2>/dev/null")?;
    guest.sh("cd /mnt && md5sum data >sum && cd / && umount /mnt")?;
    Ok(())
}

/// Checks the file system and the file that [`fill`] made.
fn check(guest: &mut Guest, device: &str) -> Result<()> {
    guest.sh("echo 3 >/proc/sys/vm/drop_caches")?;
    guest.sh(&format!("e2fsck -fn {device}1 && mount {device}1 /mnt"))?;
    guest.sh("cd /mnt && md5sum -c sum && cd / && umount /mnt")?;
    Ok(())
}

#[test]
fn a_file_system_on_a_hyperconverged_volume_survives_remount_and_replug() {
    test(1, |lab: &Lab| {
        let cluster = Cluster::start(lab, 3)?;
        cluster.create_volume("disk", 192, 3)?;
        let disk = Disk::new("disk", &cluster.export(0, "disk")?);
        let options = GuestOptions { disks: vec![disk.clone()], ..GuestOptions::new("guest") };
        let mut guest = Guest::boot(lab, &options)?;
        fill(&mut guest, "/dev/vda")?;
        check(&mut guest, "/dev/vda")?;

        guest.unplug("disk")?;
        ensure!(guest.disks()?.is_empty(), "the disk is gone");
        let device = guest.plug(&disk)?;
        check(&mut guest, &device)?;
        Fio::new(&device, "randwrite").size_mib(8).verify(Verify::Pattern).run(&mut guest)?;
        guest.check_no_complaints()?;
        guest.power_off()
    });
}

#[test]
fn a_file_system_on_an_attached_volume_survives_remount() {
    test(1, |lab: &Lab| {
        let cluster = Cluster::start(lab, 3)?;
        cluster.create_volume("disk", 192, 3)?;
        let mut attached = cluster.attach("disk")?;
        let options = GuestOptions::new("guest").disk("disk", &attached.socket);
        let mut guest = Guest::boot(lab, &options)?;
        fill(&mut guest, "/dev/vda")?;
        check(&mut guest, "/dev/vda")?;
        Fio::new("/dev/vda", "randwrite").size_mib(8).verify(Verify::Pattern).run(&mut guest)?;
        guest.check_no_complaints()?;
        guest.power_off()?;
        attached.process.check_alive()
    });
}

#[test]
fn a_guest_does_not_notice_that_one_of_three_servers_is_killed() {
    test(1, |lab: &Lab| {
        let cluster = Cluster::start(lab, 3)?;
        cluster.create_volume("disk", 128, 3)?;
        let socket = cluster.export(0, "disk")?;
        let mut guest = Guest::boot(lab, &GuestOptions::new("guest").disk("disk", &socket))?;

        let pass = Fio::new("/dev/vda", "randwrite").size_mib(24);
        pass.clone().verify(Verify::Pattern).run(&mut guest)?;
        // A block that is lost now has no checksum, but the pattern of the pass before.
        let second = pass.clone().verify(Verify::Crc32c).rate(2000);
        let job = second.start(&mut guest)?;
        wait_for_writes(&mut guest, WRITES + 500)?;
        cluster.servers()[1].kill()?;
        let measured = second.finish(&mut guest, job)?;
        eprintln!("longest pause {:.0} ms", measured.longest_pause_us() / 1000.0);
        guest.check_no_complaints()?;

        // Two of three go on, and the third comes back under load.
        let third = pass.verify(Verify::Pattern).seed(3).rate(2000);
        let job = third.start(&mut guest)?;
        cluster.servers()[1].start()?;
        third.finish(&mut guest, job)?;
        guest.check_no_complaints()?;
        cluster.servers()[0].check_alive()?;
        cluster.servers()[2].check_alive()?;
        guest.power_off()
    });
}

/// The writes of one pass over 24 MiB.
const WRITES: u64 = 24 * 256;

/// Waits until the guest has written `count` requests to its first disk since it booted.
fn wait_for_writes(guest: &mut Guest, count: u64) -> Result<()> {
    let reach = format!(
        "n=0; until [ $(awk '{{print $5}}' /sys/block/vda/stat) -ge {count} ]; do \
         n=$((n+1)); [ $n -lt 1000 ] || exit 1; usleep 20000; done"
    );
    guest.sh(&reach).map(|_silent| ())
}

#[test]
fn data_survives_a_cold_restart_of_everything() {
    test(1, |lab: &Lab| {
        let cluster = Cluster::start(lab, 3)?;
        cluster.create_volume("disk", 192, 3)?;
        let fio = Fio::new("/dev/vda2", "randwrite").size_mib(16).verify(Verify::Pattern);
        {
            let socket = cluster.export(0, "disk")?;
            let mut guest = Guest::boot(lab, &GuestOptions::new("before").disk("disk", &socket))?;
            guest.sh("printf 'label: gpt\n,96M\n,\n' | sfdisk --quiet /dev/vda")?;
            guest.sh("mkfs.ext4 -q /dev/vda1 && mount /dev/vda1 /mnt")?;
            guest.sh("dd if=/dev/urandom of=/mnt/data bs=64k count=96 2>/dev/null")?;
            guest.sh("cd /mnt && md5sum data >sum && cd / && umount /mnt")?;
            fio.run(&mut guest)?;
            guest.sh("sync; blockdev --flushbufs /dev/vda")?;
            // A power cut of the host: the guest and all daemons at once.
            guest.kill()?;
        }
        cluster.kill_all()?;
        cluster.start_all()?;

        let socket = cluster.export(0, "disk")?;
        let mut guest = Guest::boot(lab, &GuestOptions::new("after").disk("disk", &socket))?;
        check(&mut guest, "/dev/vda")?;
        fio.check_only(&mut guest)?;

        // And from another server than before.
        guest.unplug("disk")?;
        cluster.unexport(0, &socket)?;
        let socket = cluster.export(1, "disk")?;
        let device = guest.plug(&Disk::new("moved", &socket))?;
        check(&mut guest, &device)?;
        guest.check_no_complaints()?;
        guest.power_off()?;
        cluster.unexport(1, &socket)?;
        cluster.servers().iter().try_for_each(framework::Server::stop)
    });
}

#[test]
fn two_guests_work_two_volumes_of_one_daemon() {
    test(2, |lab: &Lab| {
        let cluster = Cluster::start(lab, 3)?;
        let mut guests = Vec::new();
        for name in ["one", "two"] {
            cluster.create_volume(name, 96, 3)?;
            let socket = cluster.export(0, name)?;
            guests.push(Guest::boot(lab, &GuestOptions::new(name).disk("disk", &socket))?);
        }
        let fio = Fio::new("/dev/vda", "randwrite").size_mib(16).verify(Verify::Pattern);
        let mut jobs = Vec::new();
        for guest in &mut guests {
            let name = guest.name().to_owned();
            guest.sh(&format!("echo {name} | dd of=/dev/vda bs=512 seek=65536 2>/dev/null"))?;
            jobs.push(fio.start(guest)?);
        }
        for (guest, job) in guests.iter_mut().zip(jobs) {
            fio.finish(guest, job)?;
        }
        // Neither wrote into the other's volume.
        for guest in &mut guests {
            guest.sh("echo 3 >/proc/sys/vm/drop_caches")?;
            let found =
                guest.sh("dd if=/dev/vda bs=512 skip=65536 count=1 2>/dev/null | head -n1")?;
            ensure!(found.trim() == guest.name(), "{} found {found}", guest.name());
            guest.check_no_complaints()?;
        }
        guests.into_iter().try_for_each(Guest::power_off)
    });
}

#[test]
fn a_guest_sees_a_pause_and_no_error_when_its_daemon_is_killed_and_restarted() {
    test(1, |lab: &Lab| {
        let cluster = Cluster::start(lab, 3)?;
        cluster.create_volume("disk", 128, 3)?;
        let socket = cluster.export(0, "disk")?;
        let mut guest = Guest::boot(lab, &GuestOptions::new("guest").disk("disk", &socket))?;

        let pass = Fio::new("/dev/vda", "randwrite").size_mib(24);
        pass.clone().verify(Verify::Crc32c).run(&mut guest)?;
        let second = pass.verify(Verify::Pattern).rate(2000);
        let job = second.start(&mut guest)?;
        wait_for_writes(&mut guest, WRITES + 500)?;
        cluster.servers()[0].kill()?;
        cluster.servers()[0].start()?;
        let socket_again = cluster.export(0, "disk")?;
        ensure!(socket_again == socket, "the front end comes back to the same socket");
        let measured = second.finish(&mut guest, job)?;
        eprintln!("longest pause {:.0} ms", measured.longest_pause_us() / 1000.0);
        guest.check_no_complaints()?;
        guest.power_off()
    });
}

#[test]
fn an_idle_daemon_costs_next_to_nothing() {
    test(0, |lab: &Lab| {
        let cluster = Cluster::start(lab, 3)?;
        cluster.create_volume("disk", 64, 3)?;
        let socket = cluster.export(0, "disk")?;
        let mut client = Client::connect(&socket, 8, 128 << 10)?;
        for block in 0..256_u64 {
            client.submit(0, Operation::Write, block * (128 << 10), 128 << 10);
            client.wait(1, Duration::from_secs(30), |done| assert_eq!(done.result, 0))?;
        }
        // What is still to be flushed home is work; idleness comes after it.
        let pid = cluster.servers()[0].pid()?;
        wait_until("the daemon to idle", Deadline::seconds(60), || {
            let before = cpu_time(pid)?;
            let start = Instant::now();
            // Not a wait for anything: processor time is measured over a stretch of time.
            std::thread::sleep(Duration::from_secs(2));
            let spent = cpu_time(pid)?.saturating_sub(before);
            Ok((spent < start.elapsed() / 100).then_some(()))
        })?;

        // 64 MiB, the configured buffers, and 24 bytes for each block in the log.
        let blocks = 32 * 256;
        let allowed_kib = (64 + 128) * 1024 + blocks * 24 / 1024;
        let resident_kib = resident_kib(pid)?;
        eprintln!("resident {resident_kib} KiB of {allowed_kib}");
        ensure!(resident_kib < allowed_kib, "{resident_kib} KiB resident, {allowed_kib} allowed");
        Ok(())
    });
}

/// Guests share the daemon's buffers. One whose first request finds none must be served once the
/// others give theirs back, even if nothing else happens then.
#[test]
fn a_guest_that_found_no_buffer_is_served_when_others_are_done() {
    const SLOTS: usize = 200;
    test(0, |lab: &Lab| {
        let sizes = PoolSizes { buffers_mib: 16, ..PoolSizes::default() };
        let cluster = Cluster::start_with(lab, 1, sizes)?;
        let mut clients = Vec::new();
        for name in ["greedy1", "greedy2", "greedy3", "modest"] {
            cluster.create_volume(name, 64, 1)?;
            let socket = cluster.export(0, name)?;
            let slots = if name == "modest" { 1 } else { SLOTS };
            clients.push(Client::connect(&socket, slots, 128 << 10)?);
        }
        let mut modest = clients.pop().context("the last one")?;
        for round in 0..10 {
            for client in &mut clients {
                for slot in 0..SLOTS {
                    client.submit(slot, Operation::Write, (slot as u64) * (128 << 10), 128 << 10);
                }
                client.wait(0, Duration::from_secs(30), |_| {})?;
            }
            modest.submit(0, Operation::Write, 0, 128 << 10);
            let mut served = 0;
            modest
                .wait(1, Duration::from_secs(20), |_| served += 1)
                .with_context(|| format!("round {round}: the modest guest was forgotten"))?;
            for client in &mut clients {
                let busy = client.busy();
                client.wait(busy, Duration::from_secs(30), |done| assert_eq!(done.result, 0))?;
            }
        }
        Ok(())
    });
}

/// The log holds a sixteenth of what is written: it is flushed home and trimmed under load.
/// `HOLDFAST_PASSES=n` overwrites the volume n times.
#[test]
fn a_volume_much_larger_than_the_log_is_overwritten_without_a_stop() {
    const SLOTS: usize = 8;
    const PIECE: u64 = 128 << 10;
    const PIECES: u64 = (4096 << 20) / PIECE;
    test(0, |lab: &Lab| {
        let sizes = PoolSizes { fast_mib: 272, mass_mib: 5120, ..PoolSizes::default() };
        let cluster = Cluster::start_with(lab, 1, sizes)?;
        cluster.create_volume("disk", 4096, 1)?;
        let socket = cluster.export(0, "disk")?;
        let mut client = Client::connect(&socket, SLOTS, 128 << 10)?;
        let passes = std::env::var("HOLDFAST_PASSES").ok().and_then(|n| n.parse().ok());
        let passes: u64 = passes.unwrap_or(1);
        let stamp = |pass: u64, piece: u64| (pass << 32 | (piece + 1)).to_le_bytes();
        let mut longest = Duration::ZERO;
        for pass in 0..passes {
            let mut free: Vec<usize> = (0..SLOTS).collect();
            for piece in 0..PIECES {
                let slot = free.pop().context("a slot is free")?;
                for block in client.bytes(slot).chunks_exact_mut(4096) {
                    block[..8].copy_from_slice(&stamp(pass, piece));
                }
                client.submit(slot, Operation::Write, piece * PIECE, 128 << 10);
                if free.is_empty() {
                    let start = Instant::now();
                    client.wait(1, Duration::from_secs(30), |done| {
                        assert_eq!(done.result, 0);
                        free.push(done.slot);
                    })?;
                    longest = longest.max(start.elapsed());
                }
            }
            client.wait(SLOTS - free.len(), Duration::from_secs(30), |done| {
                assert_eq!(done.result, 0);
            })?;
            // A prime step visits pieces all over the volume.
            for piece in (0..PIECES).step_by(97) {
                client.submit(0, Operation::Read, piece * PIECE, 128 << 10);
                client.wait(1, Duration::from_secs(30), |done| assert_eq!(done.result, 0))?;
                let mut blocks = client.bytes(0).chunks_exact(4096);
                ensure!(blocks.all(|b| b[..8] == stamp(pass, piece)), "pass {pass} piece {piece}");
            }
        }
        eprintln!("{passes} passes of 4 GiB, the longest wait for a completion: {longest:?}");
        Ok(())
    });
}

/// Processor time of a process so far, user and system.
fn cpu_time(pid: u32) -> Result<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let (_name, fields) = stat.rsplit_once(')').context("a process's name in parentheses")?;
    let ticks = fields.split_whitespace().skip(11).take(2).map(str::parse::<u64>);
    let ticks = ticks.sum::<Result<u64, _>>()?;
    // USER_HZ is 100 on every Linux that we run on (proc(5)).
    Ok(Duration::from_millis(ticks * 10))
}

/// Memory of a process's own, without the guest's memory that it maps.
fn resident_kib(pid: u32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB"));
    kib.context("RssAnon in kB")?.parse().context("a number of KiB")
}
