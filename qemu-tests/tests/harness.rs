//! The harness against a peer's back end, so that a failure elsewhere is not the harness's.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use anyhow::{Result, ensure};
use blkio_client::{Client, Operation};
use framework::fio::{Fio, Verify};
use framework::{
    Deadline, Disk, Guest, GuestOptions, Lab, StorageDaemon, Writer, WriterOptions, overwrite,
    test, wait_until,
};

const MIB: u64 = 1 << 20;

#[test]
fn a_guest_works_a_disk_of_qemu_storage_daemon() {
    test(1, |lab: &Lab| {
        let file = lab.file("disk", 128 * MIB)?;
        let back_end = StorageDaemon::start(lab, "storage-daemon", &file)?;
        let disk = Disk::new("disk", back_end.socket());
        let options = GuestOptions { disks: vec![disk.clone()], ..GuestOptions::new("guest") };
        let mut guest = Guest::boot(lab, &options)?;

        guest.sh("echo 'label: gpt\n,' | sfdisk --quiet /dev/vda")?;
        guest.sh("mkfs.ext4 -q /dev/vda1 && mount /dev/vda1 /mnt")?;
        guest.sh("dd if=/dev/urandom of=/mnt/data bs=64k count=64 2>/dev/null")?;
        guest.sh("cd /mnt && md5sum data >sum && cd / && umount /mnt")?;

        guest.unplug("disk")?;
        ensure!(guest.disks()?.is_empty(), "the disk is gone");
        let device = guest.plug(&disk)?;
        guest.sh(&format!("e2fsck -fn {device}1 && mount {device}1 /mnt"))?;
        guest.sh("cd /mnt && md5sum -c sum && cd / && umount /mnt")?;

        let fio = Fio::new(&device, "randwrite").size_mib(8).verify(Verify::Crc32c);
        let measured = fio.run(&mut guest)?;
        ensure!(measured.write.requests == 2048, "{measured:?}");
        ensure!(measured.read.requests == 2048, "{measured:?}");
        guest.check_no_complaints()?;
        guest.power_off()
    });
}

#[test]
fn damage_below_the_disk_is_seen_in_the_guest() -> Result<()> {
    let mut seen = String::new();
    test(1, |lab: &Lab| {
        let file = lab.file("disk", 16 * MIB)?;
        let back_end = StorageDaemon::start(lab, "storage-daemon", &file)?;
        let options = GuestOptions::new("guest").disk("disk", back_end.socket());
        let mut guest = Guest::boot(lab, &options)?;
        let fio = Fio::new("/dev/vda", "randwrite").size_mib(1).verify(Verify::Crc32c);
        fio.run(&mut guest)?;
        fio.check_only(&mut guest)?;
        // What another pass wrote is told apart, not only what is damaged.
        let pattern = Fio::new("/dev/vda", "randwrite").size_mib(1).verify(Verify::Pattern);
        ensure!(pattern.check_only(&mut guest).is_err(), "data that was never written verified");
        pattern.run(&mut guest)?;
        ensure!(fio.check_only(&mut guest).is_err(), "overwritten data verified");
        ensure!(pattern.clone().seed(2).check_only(&mut guest).is_err(), "stale data verified");
        fio.run(&mut guest)?;
        overwrite(&file, 40 * 4096 + 1024, &[0x55; 512])?;
        seen = match fio.check_only(&mut guest) {
            Ok(_) => "nothing".to_owned(),
            Err(error) => error.to_string(),
        };
        Ok(())
    });
    ensure!(seen.contains("verify"), "fio saw {seen}");
    Ok(())
}

#[test]
fn the_client_without_a_guest_reads_what_it_wrote() {
    test(0, |lab: &Lab| {
        let file = lab.file("disk", 16 * MIB)?;
        let back_end = StorageDaemon::start(lab, "storage-daemon", &file)?;
        let mut client = Client::connect(back_end.socket(), 2, 5000)?;
        ensure!(client.capacity_bytes()? == 16 * MIB, "{:?}", client.capacity_bytes());
        ensure!(client.bytes(0).len() == 8192, "slots are whole pages");
        client.bytes(0).fill(0xA5);
        client.bytes(1).fill(0);
        for (slot, operation, expected) in
            [(0, Operation::Write, 0), (1, Operation::Flush, 0), (1, Operation::Read, 0)]
        {
            let length = if slot == 0 { 8192 } else { 4096 };
            client.submit(slot, operation, 4096, length);
            let mut results = Vec::new();
            client.wait(1, Duration::from_secs(30), |done| results.push(done))?;
            ensure!(results.len() == 1, "{results:?}");
            ensure!(results[0].slot == slot && results[0].result == expected, "{results:?}");
        }
        ensure!(client.bytes(1)[..4096].iter().all(|&byte| byte == 0xA5), "what was written");
        ensure!(client.bytes(1)[4096..].iter().all(|&byte| byte == 0), "and no more");
        // Past the end: an error from the back end, and the client goes on.
        client.submit(0, Operation::Read, 16 * MIB, 4096);
        let mut result = 0;
        client.wait(1, Duration::from_secs(30), |done| result = done.result)?;
        ensure!(result < 0, "a read past the end gave {result}");
        Ok(())
    });
}

#[test]
fn the_verifying_writer_sees_what_is_wrong_below_its_disk() {
    test(1, |lab: &Lab| {
        let file = lab.file("disk", 64 * MIB)?;
        let back_end = StorageDaemon::start(lab, "storage-daemon", &file)?;
        let options = GuestOptions { writer: true, ..GuestOptions::new("guest") };
        let mut guest = Guest::boot(lab, &options.disk("disk", back_end.socket()))?;
        let options = WriterOptions { blocks: 1024, ..WriterOptions::default() };
        let writer = Writer::start(&mut guest, options)?;
        writer.begin(&mut guest)?;
        let seen = writer.wait_for(&mut guest, 3000, Deadline::seconds(120))?;
        ensure!(seen.completed >= 3000 && seen.slowest > Duration::ZERO, "{seen:?}");
        // Half of what it works on is another block's now.
        let mut block = vec![0; 4096];
        File::open(&file)?.read_exact_at(&mut block, 4096)?;
        for number in 0..512 {
            overwrite(&file, number * 2 * 4096, &block)?;
        }
        let wrong = wait_until("the writer to notice", Deadline::seconds(120), || {
            Ok(writer.seen(&mut guest).err().map(|error| format!("{error:#}")))
        })?;
        ensure!(wrong.contains("block"), "{wrong}");
        ensure!(writer.finish(&mut guest).is_err(), "what was wrong stays wrong");
        guest.check_no_complaints()
    });
}

#[test]
fn commands_in_the_guest_have_deadlines_and_statuses() {
    test(1, |lab: &Lab| {
        let mut guest = Guest::boot(lab, &GuestOptions::new("guest"))?;
        ensure!(guest.sh("echo done 7 0; echo end 7")? == "done 7 0\nend 7\n", "frames in output");
        let output = guest.output_of("echo partial; exit 3", Duration::from_secs(5))?;
        ensure!(output.status == 3 && output.text == "partial\n", "{output:?}");
        let output = guest.output_of("echo before; sleep 3600", Duration::from_secs(1))?;
        ensure!(output.status == 137 && output.text.starts_with("before\n"), "{output:?}");
        // The agent is still there, and jobs run beside other commands.
        let job = guest.spawn("until [ -e /tmp/go ]; do usleep 10000; done; echo went; exit 4")?;
        ensure!(guest.poll(job)?.is_none(), "the job waits");
        guest.sh("touch /tmp/go")?;
        let output = guest.wait_output(job, Duration::from_secs(10))?;
        ensure!(output.status == 4 && output.text == "went\n", "{output:?}");
        Ok(())
    });
}
