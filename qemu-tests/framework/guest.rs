//! A virtual machine: booting it, commands in it, disks that come and go.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;

use crate::accelerator::Accelerator;
use crate::agent::{Agent, Output};
use crate::binaries::system_binary;
use crate::initramfs::{BootFiles, boot_files};
use crate::lab::Lab;
use crate::lines::Lines;
use crate::network::Place;
use crate::process::{Process, tail};
use crate::qmp::Qmp;
use crate::wait::{Deadline, wait_until};

/// How long an ordinary command may take: the slowest machine formats a disk under emulation.
const COMMAND_LIMIT: Duration = Duration::from_mins(1);

/// How much a guest that makes way does so (`nice`).
const NICENESS: &str = "10";

/// How long a device may take to come or go.
const HOTPLUG_LIMIT: Duration = Duration::from_secs(30);

/// What the kernel prints when storage failed, or looked as if it had.
pub(crate) const KERNEL_COMPLAINTS: [&str; 7] = [
    "I/O error",
    "EXT4-fs error",
    "EXT4-fs warning",
    "Remounting filesystem read-only",
    "blocked for more than",
    "critical medium error",
    "BUG:",
];

/// A disk that a vhost-user-blk back end serves.
#[derive(Debug, Clone)]
pub struct Disk {
    /// QEMU's name for it.
    pub id: String,
    /// The back end's socket.
    pub socket: PathBuf,
}

impl Disk {
    /// A disk served at `socket`.
    pub fn new(id: &str, socket: &Path) -> Self {
        Self { id: id.to_owned(), socket: socket.to_owned() }
    }
}

/// What to boot.
#[derive(Debug, Clone)]
pub struct GuestOptions {
    /// Its name, for logs and sockets.
    pub name: String,
    /// Its disks: the first is `/dev/vda`.
    pub disks: Vec<Disk>,
    /// Its processors: a disk gets as many queues.
    pub cpus: u32,
    /// Its memory, in MiB.
    pub memory_mib: u32,
    /// How long it may live. Everything waited for in it fails after that.
    pub limit: Duration,
    /// Where it runs.
    pub place: Place,
    /// Whether it is to have the verifying writer ([`crate::Writer`]).
    pub writer: bool,
    /// Stays stopped until it is told to go on.
    pub paused: bool,
    /// Makes way for everything else on the machine. Emulation takes whole processors, which back ends
    /// would not have to share with a guest on a host of its own; where that is measured it is in the way.
    /// Not where other tests run: it could starve.
    pub makes_way: bool,
}

impl GuestOptions {
    /// A guest without disks.
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            disks: Vec::new(),
            cpus: 1,
            memory_mib: 256,
            limit: Duration::from_mins(4),
            place: Place::HERE,
            writer: false,
            paused: false,
            makes_way: false,
        }
    }

    /// Adds a disk.
    #[must_use]
    pub fn disk(mut self, id: &str, socket: &Path) -> Self {
        self.disks.push(Disk::new(id, socket));
        self
    }
}

/// A running virtual machine. Dropping it kills it.
#[derive(Debug)]
pub struct Guest {
    name: String,
    process: Process,
    qmp: Qmp,
    agent: Agent,
    console: PathBuf,
    shell_socket: PathBuf,
    writer: Option<Lines>,
    trace: PathBuf,
    deadline: Deadline,
    jobs: u32,
}

/// A command that runs on in the guest while others do.
#[derive(Debug, Clone, Copy)]
#[must_use = "wait for it: its exit status says whether it worked"]
pub struct Job(u32);

impl Guest {
    /// Boots a guest and waits until it takes commands.
    pub fn boot(lab: &Lab, options: &GuestOptions) -> Result<Self> {
        Self::boot_with(lab, options, Accelerator::detect()?)
    }

    pub(crate) fn boot_with(
        lab: &Lab,
        options: &GuestOptions,
        accelerator: Accelerator,
    ) -> Result<Self> {
        let mut guest = Self::launch(lab, options, accelerator, None)?;
        let ready = guest.agent.wait_ready(guest.deadline);
        guest.explain(ready)?;
        Ok(guest)
    }

    /// Starts a QEMU that waits at `address` (`tcp:HOST:PORT`) for a guest to migrate to it.
    pub fn await_migration(lab: &Lab, options: &GuestOptions, address: &str) -> Result<Self> {
        Self::launch(lab, options, Accelerator::detect()?, Some(address))
    }

    fn launch(
        lab: &Lab,
        options: &GuestOptions,
        accelerator: Accelerator,
        incoming: Option<&str>,
    ) -> Result<Self> {
        let name = options.name.clone();
        let deadline = Deadline::after(options.limit);
        let console = lab.log(&format!("{name}.console"));
        let trace = lab.directory().join(format!("{name}.trace"));
        let socket = |role: &str| lab.socket(&format!("{name}-{role}"));
        let boot = boot_files(options.writer)?;
        let mut arguments = arguments(options, &boot, accelerator, &console, &socket);
        if options.writer {
            // When QEMU asked its back ends for what, and when they answered.
            let file = trace.display().to_string();
            let words = ["-trace", "vhost_user_read", "-trace", "vhost_user_write", "-D", &file];
            arguments.extend(["-msg", "timestamp=on"].into_iter().chain(words).map(str::to_owned));
        }
        arguments.extend(incoming.iter().flat_map(|&at| ["-incoming".to_owned(), at.to_owned()]));
        let log = lab.log(&format!("{name}.qemu"));
        let qemu = system_binary("qemu-system-x86_64")?;
        let what = format!("guest {name}");
        let mut program = qemu;
        if options.makes_way {
            let nice = ["-n".to_owned(), NICENESS.to_owned(), program.display().to_string()];
            arguments.splice(0..0, nice);
            program = system_binary("nice")?;
        }
        let mut process = Process::start_at(&options.place, &what, &program, arguments, &log)?;

        let agent = Agent::connect(&socket("agent"), deadline, || process.check_alive())?;
        let qmp = Qmp::connect(&socket("qmp"), deadline, || process.check_alive())?;
        let writer = if options.writer {
            Some(Lines::connect(&socket("writer"), deadline, || process.check_alive())?)
        } else {
            None
        };
        let shell_socket = socket("shell");
        Ok(Self {
            name,
            process,
            qmp,
            agent,
            console,
            shell_socket,
            writer,
            trace,
            deadline,
            jobs: 0,
        })
    }

    /// Goes on where `source` was, whose guest has come here.
    pub(crate) fn succeed(&mut self, source: &Self) {
        self.agent.succeed(&source.agent);
        self.jobs = source.jobs;
    }

    /// The writer's line, if it has one.
    pub(crate) fn writer_line(&mut self) -> Result<(&mut Lines, Deadline)> {
        let line = self.writer.as_mut();
        let line = line.with_context(|| format!("guest {} has no verifying writer", self.name))?;
        Ok((line, self.deadline))
    }

    /// What QEMU said to its back ends, and they to it.
    pub(crate) fn trace(&self) -> &Path {
        &self.trace
    }

    /// QEMU's process.
    pub(crate) fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// When it is over for this guest.
    pub fn deadline(&self) -> Deadline {
        self.deadline
    }

    /// QEMU's control socket.
    pub fn qmp(&mut self) -> &mut Qmp {
        &mut self.qmp
    }

    /// The socket of the guest's terminal, `/dev/hvc0`.
    pub(crate) fn shell_socket(&self) -> &Path {
        &self.shell_socket
    }

    /// Runs a shell command and returns what it printed; an exit status but 0 is an error.
    pub fn sh(&mut self, command: &str) -> Result<String> {
        self.sh_for(command, COMMAND_LIMIT)
    }

    /// The same, for a command that may take `limit`.
    pub fn sh_for(&mut self, command: &str, limit: Duration) -> Result<String> {
        let output = self.output_of(command, limit)?;
        ensure!(
            output.status == 0,
            "in guest {}: `{command}` ended with status {}:\n{}",
            self.name,
            output.status,
            output.text
        );
        Ok(output.text)
    }

    /// Runs a shell command and returns what came of it.
    pub fn output_of(&mut self, command: &str, limit: Duration) -> Result<Output> {
        let output = self.agent.run(command, limit, self.deadline);
        self.explain(output)
    }

    /// Starts a shell command that goes on by itself.
    pub fn spawn(&mut self, command: &str) -> Result<Job> {
        self.jobs += 1;
        let job = Job(self.jobs);
        let script = job.path("sh");
        let (out, status) = (job.path("out"), job.path("status"));
        self.sh(&format!(
            "cat >{script} <<'END-OF-JOB'\n{command}\nEND-OF-JOB\n\
             setsid sh -c 'sh {script} >{out} 2>&1; echo $? >{status}.new; \
             mv {status}.new {status}' >/dev/null 2>&1 &"
        ))?;
        Ok(job)
    }

    /// What a job came to, if it has ended.
    pub fn poll(&mut self, job: Job) -> Result<Option<Output>> {
        let (out, status) = (job.path("out"), job.path("status"));
        let text = self.sh(&format!("[ ! -e {status} ] || cat {status} {out}"))?;
        let Some((status, text)) = text.split_once('\n') else { return Ok(None) };
        let status = status.parse().context("a job's exit status")?;
        Ok(Some(Output { status, text: text.to_owned() }))
    }

    /// Waits for a job and returns what it printed; an exit status but 0 is an error.
    pub fn wait(&mut self, job: Job, limit: Duration) -> Result<String> {
        let output = self.wait_output(job, limit)?;
        ensure!(
            output.status == 0,
            "in guest {}: a job ended with status {}:\n{}",
            self.name,
            output.status,
            output.text
        );
        Ok(output.text)
    }

    /// Waits for a job and returns what came of it.
    pub fn wait_output(&mut self, job: Job, limit: Duration) -> Result<Output> {
        let deadline = self.deadline.min(Deadline::after(limit));
        let status = job.path("status");
        // The guest waits a while by itself, so that asking costs it little.
        let wait =
            format!("n=0; until [ -e {status} -o $n = 20 ]; do usleep 50000; n=$((n+1)); done");
        loop {
            self.sh(&wait)?;
            if let Some(output) = self.poll(job)? {
                return Ok(output);
            }
            if deadline.has_passed() {
                let so_far = self.sh(&format!("cat {}", job.path("out")))?;
                bail!("in guest {}: a job did not end; it printed so far:\n{so_far}", self.name);
            }
        }
    }

    /// Plugs a disk in and returns its device, like `/dev/vda`.
    pub fn plug(&mut self, disk: &Disk) -> Result<String> {
        let before = self.disks()?;
        let deadline = self.deadline.min(Deadline::after(HOTPLUG_LIMIT));
        let address = json!({ "type": "unix", "data": { "path": disk.socket } });
        let backend = json!({ "addr": address, "server": false, "reconnect-ms": RECONNECT_MS });
        self.qmp.execute(
            "chardev-add",
            &json!({ "id": chardev(&disk.id), "backend": { "type": "socket", "data": backend } }),
            deadline,
        )?;
        self.qmp.execute(
            "device_add",
            &json!({ "driver": "vhost-user-blk-pci", "id": disk.id, "chardev": chardev(&disk.id) }),
            deadline,
        )?;
        wait_until("the guest to see the disk", deadline, || {
            let found = self.disks()?.into_iter().find(|name| !before.contains(name));
            Ok(found.map(|name| format!("/dev/{name}")))
        })
    }

    /// Unplugs a disk, which the guest must let go of.
    pub fn unplug(&mut self, id: &str) -> Result<()> {
        let before = self.disks()?.len();
        let deadline = self.deadline.min(Deadline::after(HOTPLUG_LIMIT));
        self.qmp.execute("device_del", &json!({ "id": id }), deadline)?;
        self.qmp.event("DEVICE_DELETED", deadline, |data| data["device"] == id)?;
        self.qmp.execute("chardev-remove", &json!({ "id": chardev(id) }), deadline)?;
        wait_until("the guest to drop the disk", deadline, || {
            Ok((self.disks()?.len() < before).then_some(()))
        })
    }

    /// The names of the disks the guest sees, like `vda`.
    pub fn disks(&mut self) -> Result<Vec<String>> {
        let names = self.sh(
            "cd /sys/block && for d in vd*; do [ \"$(cat $d/serial)\" = tools ] || echo $d; done",
        )?;
        Ok(names.lines().map(str::to_owned).collect())
    }

    /// An error if the guest's kernel complained about storage, ever.
    pub fn check_no_complaints(&mut self) -> Result<()> {
        let messages = self.sh("dmesg")?;
        let is_complaint = |line: &&str| KERNEL_COMPLAINTS.iter().any(|text| line.contains(text));
        let found: Vec<&str> = messages.lines().filter(is_complaint).collect();
        ensure!(found.is_empty(), "guest {}'s kernel complained:\n{}", self.name, found.join("\n"));
        Ok(())
    }

    /// Ends the guest as a power cut does.
    pub fn kill(&mut self) -> Result<()> {
        self.process.kill()
    }

    /// Shuts the guest down in order, its data written.
    pub fn power_off(mut self) -> Result<()> {
        self.sh("umount -a -t ext4; sync")?;
        let deadline = self.deadline.min(Deadline::seconds(30));
        self.qmp.execute("quit", &json!({}), deadline)?;
        let status = self.process.wait(deadline)?;
        ensure!(status.success(), "QEMU of guest {} ended with {status}", self.name);
        Ok(())
    }

    /// Adds to an error what the guest's console and QEMU said last.
    fn explain<T>(&mut self, outcome: Result<T>) -> Result<T> {
        outcome.or_else(|error| {
            self.process.check_alive().context(error.to_string())?;
            Err(error.context(format!("guest {}; console:\n{}", self.name, tail(&self.console))))
        })
    }
}

impl Job {
    fn path(self, what: &str) -> String {
        format!("/tmp/job.{}.{what}", self.0)
    }
}

/// How soon QEMU tries again when the back end is gone.
const RECONNECT_MS: u32 = 100;

fn chardev(disk: &str) -> String {
    format!("{disk}-socket")
}

fn arguments(
    options: &GuestOptions,
    boot: &BootFiles,
    accelerator: Accelerator,
    console: &Path,
    socket: &impl Fn(&str) -> PathBuf,
) -> Vec<String> {
    let memory = options.memory_mib;
    let server =
        |role: &str| format!("socket,id={role},server=on,wait=off,path={}", socket(role).display());
    let mut arguments: Vec<String> = accelerator.arguments().map(str::to_owned).into();
    let mut add = |words: &[&str]| arguments.extend(words.iter().map(|&word| word.to_owned()));
    add(&["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
    // A machine that can have one processor only is emulated without memory barriers (QEMU 10 drops the
    // lock prefix), and then the driver and a back end on another processor can each miss what the other
    // has just written: a lost kick or interrupt, and the disk hangs.
    let cpus = options.cpus;
    add(&["-smp", &format!("{cpus},maxcpus={}", cpus.max(2))]);
    add(&["-m", &format!("{memory}M"), "-machine", "pc,memory-backend=memory"]);
    // A vhost-user back end maps the guest's memory.
    add(&["-object", &format!("memory-backend-memfd,id=memory,size={memory}M,share=on")]);
    add(&["-kernel", &boot.kernel.display().to_string()]);
    add(&["-initrd", &boot.initramfs.display().to_string()]);
    add(&["-append", "console=ttyS0 quiet panic=-1 random.trust_cpu=on mitigations=off"]);
    // The last slot, so that the disks under test come first.
    let tools = boot.tools.display();
    add(&["-drive", &format!("if=none,id=tools,format=raw,readonly=on,file={tools}")]);
    add(&["-device", "virtio-blk-pci,drive=tools,serial=tools,addr=0x1e"]);
    add(&["-serial", &format!("file:{}", console.display())]);
    add(&["-chardev", &server("qmp"), "-mon", "chardev=qmp,mode=control"]);
    add(&["-device", "virtio-serial-pci"]);
    add(&["-chardev", &server("agent"), "-device", "virtserialport,chardev=agent,name=agent"]);
    add(&["-chardev", &server("shell"), "-device", "virtconsole,chardev=shell"]);
    if options.writer {
        add(&["-chardev", &server("writer")]);
        add(&["-device", "virtserialport,chardev=writer,name=writer"]);
    }
    if options.paused {
        add(&["-S"]);
    }
    for disk in &options.disks {
        let (id, chardev) = (&disk.id, chardev(&disk.id));
        let path = disk.socket.display();
        let back_end = format!("socket,id={chardev},path={path},reconnect-ms={RECONNECT_MS}");
        let device = format!("vhost-user-blk-pci,id={id},chardev={chardev}");
        add(&["-chardev", &back_end, "-device", &device]);
    }
    arguments
}
