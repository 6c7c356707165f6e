//! QEMU's own storage daemon as a vhost-user-blk back end: a peer to test the harness with, and
//! to measure against.

use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::binaries::system_binary;
use crate::lab::Lab;
use crate::process::Process;
use crate::wait::{Deadline, wait_until};

/// How long it may take to listen.
const START_SECONDS: u64 = 10;

/// A running `qemu-storage-daemon` that serves one file.
#[derive(Debug)]
pub struct StorageDaemon {
    process: Process,
    socket: PathBuf,
}

impl StorageDaemon {
    /// Serves `file` with direct I/O through io_uring, from a thread of its own.
    pub fn start(lab: &Lab, name: &str, file: &Path) -> Result<Self> {
        Self::start_with(lab, name, file, "")
    }

    /// The same of a file that other processes have open, too, as guests' hosts have what they share.
    pub fn share(lab: &Lab, name: &str, file: &Path) -> Result<Self> {
        Self::start_with(lab, name, file, ",locking=off")
    }

    fn start_with(lab: &Lab, name: &str, file: &Path, how: &str) -> Result<Self> {
        let socket = lab.socket(name);
        let file = file.display();
        let arguments = [
            "--object".to_owned(),
            "iothread,id=io".to_owned(),
            "--blockdev".to_owned(),
            format!(
                "file,node-name=disk,filename={file},cache.direct=on,aio=io_uring,discard=unmap{how}"
            ),
            "--export".to_owned(),
            format!(
                "vhost-user-blk,id=export,node-name=disk,writable=on,iothread=io,\
                 addr.type=unix,addr.path={}",
                socket.display()
            ),
        ];
        let program = system_binary("qemu-storage-daemon")?;
        let mut process = Process::start(name, &program, arguments, &lab.log(name))?;
        wait_until("qemu-storage-daemon to listen", Deadline::seconds(START_SECONDS), || {
            process.check_alive()?;
            Ok(socket.exists().then_some(()))
        })?;
        Ok(Self { process, socket })
    }

    /// Where it listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// What it says.
    pub fn log(&self) -> &Path {
        self.process.log()
    }

    /// The process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }
}
