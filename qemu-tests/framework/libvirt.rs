//! A libvirt of our own: `libvirtd` in a namespace with its directories in the lab, so that it knows
//! nothing of the machine's and several run at once, each as if on a host of its own.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::agent::{Agent, Output};
use crate::binaries::system_binary;
use crate::guest::KERNEL_COMPLAINTS;
use crate::initramfs::boot_files;
use crate::lab::Lab;
use crate::network::Network;
use crate::process::{Process, tail};
use crate::wait::{Deadline, wait_until};

/// How long libvirtd may take to answer: it asks QEMU first what it can do.
const START_SECONDS: u64 = 120;

/// How long a command may take: a start, a migration.
const COMMAND_SECONDS: u64 = 180;

/// What a guest's kernel is told: as `crate::guest` does.
const KERNEL_LINE: &str = "console=ttyS0 quiet panic=-1 random.trust_cpu=on mitigations=off";

/// Hides the machine's directories of libvirt behind `$1`'s, takes the name `$2`, and runs libvirtd. The shell
/// stays: it is the first of its processes and buries the others, whose deaths libvirtd waits for.
const ENTER: &str = r#"
set -e
mount --make-rprivate /
for place in etc/libvirt run/libvirt var/lib/libvirt var/log/libvirt var/cache/libvirt; do
    mkdir -p "/$place" "$1/$place"
    mount --bind "$1/$place" "/$place"
done
hostname "$2"
libvirtd --config "$1/etc/libvirt/libvirtd.conf" --pid-file "$1/libvirtd.pid" &
wait $!
"#;

/// QEMU as root, with nothing around it: this is about disks.
const QEMU_CONFIGURATION: &str = r#"
user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
security_driver = "none"
namespaces = []
cgroup_controllers = []
stdio_handler = "file"
"#;

/// A running libvirtd.
#[derive(Debug)]
pub struct Libvirt {
    name: String,
    process: Process,
    uri: String,
}

/// A guest that libvirt runs.
#[derive(Debug)]
pub struct Domain {
    name: String,
    agent: Agent,
    paths: Paths,
    deadline: Deadline,
}

/// What of a guest is another one on another host.
#[derive(Debug, Clone)]
struct Paths {
    disk: PathBuf,
    agent: PathBuf,
    console: PathBuf,
}

impl Libvirt {
    /// Why this machine cannot have one, if it cannot.
    pub fn unavailable() -> Option<String> {
        let missing = ["libvirtd", "virsh", "unshare"].into_iter().find_map(|program| {
            let error = system_binary(program).err()?;
            Some(error.to_string())
        });
        missing.or_else(Network::unavailable)
    }

    /// Starts number `number` of this lab.
    pub fn start(lab: &Lab, number: u8) -> Result<Self> {
        let name = format!("virt{number}");
        let directory = lab.directory().join(&name);
        let configuration = directory.join("etc/libvirt");
        fs::create_dir_all(&configuration)?;
        fs::write(configuration.join("qemu.conf"), QEMU_CONFIGURATION)?;
        let socket = lab.socket(&name);
        fs::create_dir_all(&socket)?;
        let mut text = String::new();
        writeln!(text, "unix_sock_dir = \"{}\"", socket.display())?;
        writeln!(text, "auth_unix_rw = \"none\"")?;
        // Two of one id refuse to migrate to each other.
        writeln!(text, "host_uuid = \"{number:08}-1111-4111-8111-111111111111\"")?;
        writeln!(text, "log_outputs = \"3:stderr\"")?;
        fs::write(configuration.join("libvirtd.conf"), text)?;
        let unshare = system_binary("unshare")?;
        let root = directory.display().to_string();
        // Its guests are nobody's children: they end with the namespace of processes.
        let spaces = ["--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc", "--"];
        let command = ["sh", "-c", ENTER, "sh", &root, &name];
        let arguments = spaces.into_iter().chain(command);
        let process = Process::start(&name, &unshare, arguments, &lab.log(&name))?;
        let socket = socket.join("libvirt-sock").display().to_string();
        let mut libvirt =
            Self { name, process, uri: format!("qemu+unix:///system?socket={socket}") };
        wait_until("libvirtd to answer", Deadline::seconds(START_SECONDS), || {
            libvirt.process.check_alive()?;
            Ok(libvirt.virsh(&["list"]).ok())
        })?;
        Ok(libvirt)
    }

    /// Runs a command of virsh's.
    pub fn virsh(&self, arguments: &[&str]) -> Result<String> {
        let output = std::process::Command::new(system_binary("timeout")?)
            .args(["--kill-after=5", &COMMAND_SECONDS.to_string()])
            .arg(system_binary("virsh")?)
            .args(["--quiet", "--connect", &self.uri])
            .args(arguments)
            .output()?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        if !output.status.success() {
            let error = String::from_utf8_lossy(&output.stderr);
            bail!(
                "{}: virsh {} ended with {}: {error}",
                self.name,
                arguments.join(" "),
                output.status
            );
        }
        Ok(said)
    }

    /// Starts a guest with a disk at `socket`, and waits until it takes commands.
    pub fn boot(&self, lab: &Lab, name: &str, socket: &Path, limit: Duration) -> Result<Domain> {
        let paths = self.paths(lab, name, socket);
        let description = write(&paths, &domain_xml(name, &paths)?)?;
        self.virsh(&["create", &description])?;
        let deadline = Deadline::after(limit);
        let mut agent = Agent::connect(&paths.agent, deadline, || Ok(()))?;
        let ready = agent.wait_ready(deadline);
        ready.with_context(|| format!("guest {name}; console:\n{}", tail(&paths.console)))?;
        Ok(Domain { name: name.to_owned(), agent, paths, deadline })
    }

    /// Where it has what.
    fn paths(&self, lab: &Lab, name: &str, disk: &Path) -> Paths {
        let name = format!("{name}-{}", self.name);
        let console = lab.log(&format!("{name}.console"));
        Paths { disk: disk.to_owned(), agent: lab.socket(&name), console }
    }

    /// Moves a guest to another libvirt of this machine, whose disk is at `socket` there.
    pub fn migrate(&self, lab: &Lab, domain: Domain, to: &Self, socket: &Path) -> Result<Domain> {
        let Domain { name, agent: before, paths: here, deadline } = domain;
        let there = to.paths(lab, &name, socket);
        // As docs/operations.md has it: what it has is dumped, and the paths are changed.
        let mut text = self.virsh(&["dumpxml", "--migratable", &name])?;
        let pairs = [
            (&here.disk, &there.disk),
            (&here.agent, &there.agent),
            (&here.console, &there.console),
        ];
        for (from, to) in pairs {
            text = text.replace(&from.display().to_string(), &to.display().to_string());
        }
        let description = write(&there, &text)?;
        let stream = ["--migrateuri", "tcp://127.0.0.1", "--xml", &description];
        let command = [["migrate", "--live", &name, &to.uri].as_slice(), &stream].concat();
        let mut agent = std::thread::scope(|scope| {
            let moving = scope.spawn(|| self.virsh(&command));
            // Before the guest is there, or it is told that its agent's port was closed.
            let agent = Agent::connect(&there.agent, deadline, || {
                ensure!(!moving.is_finished(), "the migration is over");
                Ok(())
            });
            moving.join().expect("virsh's thread does not panic")?;
            agent
        })?;
        agent.succeed(&before);
        Ok(Domain { name, agent, paths: there, deadline })
    }
}

impl Domain {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// An error if the guest's kernel complained about storage, ever.
    pub fn check_no_complaints(&mut self) -> Result<()> {
        let messages = self.sh("dmesg", Duration::from_secs(30))?;
        let found =
            messages.lines().find(|line| KERNEL_COMPLAINTS.iter().any(|c| line.contains(c)));
        ensure!(found.is_none(), "guest {}'s kernel complained: {found:?}", self.name);
        Ok(())
    }

    /// Runs a shell command in the guest and returns what it printed; an exit status but 0 is an error.
    pub fn sh(&mut self, command: &str, limit: Duration) -> Result<String> {
        let output: Result<Output> = self.agent.run(command, limit, self.deadline);
        let output = output.with_context(|| {
            format!("guest {}; console:\n{}", self.name, tail(&self.paths.console))
        })?;
        ensure!(output.status == 0, "in guest {}: `{command}`: {output:?}", self.name);
        Ok(output.text)
    }
}

/// A guest's description in a file; its path.
fn write(paths: &Paths, text: &str) -> Result<String> {
    let path = paths.agent.with_extension("xml");
    fs::write(&path, text)?;
    Ok(path.display().to_string())
}

/// What docs/operations.md has, and around it what makes a guest of ours.
fn domain_xml(name: &str, paths: &Paths) -> Result<String> {
    let boot = boot_files(false)?;
    Ok(format!(
        "<domain type='qemu'>
  <name>{name}</name>
  <uuid>22222222-2222-4222-8222-222222222222</uuid>
  <memory unit='MiB'>256</memory>
  <memoryBacking>
    <source type='memfd'/>
    <access mode='shared'/>
  </memoryBacking>
  <vcpu current='1'>2</vcpu>
  <os>
    <type arch='x86_64' machine='pc'>hvm</type>
    <kernel>{}</kernel>
    <initrd>{}</initrd>
    <cmdline>{KERNEL_LINE}</cmdline>
  </os>
  <features><acpi/></features>
  <devices>
    <emulator>{}</emulator>
    <disk type='vhostuser' device='disk' snapshot='no'>
      <driver name='qemu' type='raw' queues='1'/>
      <source type='unix' path='{}'>
        <reconnect enabled='yes' timeout='1'/>
      </source>
      <target dev='vda' bus='virtio'/>
    </disk>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw'/>
      <source file='{}'/>
      <target dev='vdb' bus='virtio'/>
      <serial>tools</serial>
      <readonly/>
    </disk>
    <serial type='file'><source path='{}'/></serial>
    <channel type='unix'>
      <source mode='bind' path='{}'/>
      <target type='virtio' name='agent'/>
    </channel>
  </devices>
</domain>
",
        boot.kernel.display(),
        boot.initramfs.display(),
        system_binary("qemu-system-x86_64")?.display(),
        paths.disk.display(),
        boot.tools.display(),
        paths.console.display(),
        paths.agent.display(),
    ))
}
