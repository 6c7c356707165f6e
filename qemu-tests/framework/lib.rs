//! Boots real guests under QEMU, on disks served by real processes, and works them.
//!
//! A test is a closure over a [`Lab`]: a working directory whose processes and guests are gone
//! when it ends, and whose logs and consoles are the failure report.
//!
//! * [`Lab`], [`test()`]: the directory, the slots that bound how many guests run at once, the report.
//! * [`Process`]: a child with a log, killed when dropped.
//! * [`Guest`]: a virtual machine, and commands run in it ([`Guest::sh`]).
//! * [`Cluster`]: `holdfastd` servers over one cluster store, and volumes.
//! * [`StorageDaemon`]: QEMU's own vhost-user-blk server, to test this harness against a peer.
//! * [`fio`]: jobs for the guest, and what they measured.
//!
//! Nothing here skips: without a working KVM guests run under QEMU's emulation, and a missing
//! program is an error that says `scripts/install`.

mod accelerator;
mod agent;
pub mod bench;
mod binaries;
mod cluster;
mod console;
mod cpio;
mod damage;
mod disk;
mod etcd;
pub mod failover;
pub mod fio;
mod guest;
mod initramfs;
mod lab;
mod libvirt;
mod lines;
mod load;
mod machine;
pub mod migration;
mod network;
mod oracle;
mod process;
mod processors;
mod proxy;
mod qmp;
pub mod restart;
mod storage_daemon;
mod wait;
mod writer;

pub use accelerator::Accelerator;
pub use agent::Output;
pub use binaries::{cache_directory, holdfast_binary, system_binary};
pub use cluster::{Attached, Cluster, ClusterOptions, PoolSizes, Server, Space, loopback_address};
pub use console::Shell;
pub use damage::overwrite;
pub use etcd::Etcd;
pub use guest::{Disk, Guest, GuestOptions, Job};
pub use lab::{Lab, skip, skip_without_network, test};
pub use libvirt::{Domain, Libvirt};
pub use load::{Load, LoadOptions, Window, fill_all, verify};
pub use machine::{MachineProbe, Stretch};
pub use network::{Network, Place};
pub use oracle::{BLOCK_BYTES, Oracle, fill, generation_in, mix};
pub use process::Process;
pub use proxy::Proxy;
pub use qmp::Qmp;
pub use storage_daemon::StorageDaemon;
pub use wait::{Deadline, wait_until};
pub use writer::{Clocks, Seen, Writer, WriterOptions, wall_clock};
