//! A child process with a log, that never outlives the harness.

use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use anyhow::{Context, Result, bail};

use crate::binaries::system_binary;
use crate::network::Place;
use crate::wait::{Deadline, wait_until};

/// How much of a log goes into a report, in lines.
const REPORT_LINES_MAX: usize = 60;

/// A running child. Dropping it kills it (by pid) and reaps it; if the harness itself is killed,
/// the kernel does.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `program` with its output appended to `log`.
    pub fn start(
        name: &str,
        program: &Path,
        arguments: impl IntoIterator<Item = impl AsRef<std::ffi::OsStr>>,
        log: &Path,
    ) -> Result<Self> {
        Self::start_at(&Place::HERE, name, program, arguments, log)
    }

    /// The same, on another host of a test's network.
    pub fn start_at(
        place: &Place,
        name: &str,
        program: &Path,
        arguments: impl IntoIterator<Item = impl AsRef<std::ffi::OsStr>>,
        log: &Path,
    ) -> Result<Self> {
        let output = OpenOptions::new().create(true).append(true).open(log)?;
        // setpriv and nsenter exec what follows: the pid stays the same.
        let child = Command::new(system_binary("setpriv")?)
            .args(["--pdeathsig", "KILL", "--"])
            .args(place.prefix()?)
            .arg(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .spawn()
            .with_context(|| format!("starting {}", program.display()))?;
        Ok(Self { name: name.to_owned(), child, log: log.to_owned() })
    }

    /// The name it was given.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// An error if it is no longer running.
    pub fn check_alive(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => {
                bail!("{} ended ({status}); its log ends:\n{}", self.name, tail(&self.log))
            }
        }
    }

    /// `kill -9`, and waits until it is gone.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill().with_context(|| format!("killing {}", self.name))?;
        self.child.wait()?;
        Ok(())
    }

    /// Sends SIGTERM and waits for it to end by itself.
    pub fn terminate(&mut self, deadline: Deadline) -> Result<ExitStatus> {
        self.signal("TERM")?;
        self.wait(deadline)
    }

    /// SIGSTOP: it stands still, and nobody is told.
    pub fn pause(&mut self) -> Result<()> {
        self.signal("STOP")
    }

    /// SIGCONT: it goes on, and does not know that it stood still.
    pub fn resume(&mut self) -> Result<()> {
        self.signal("CONT")
    }

    fn signal(&mut self, signal: &str) -> Result<()> {
        self.check_alive()?;
        let pid = self.pid().to_string();
        let program = system_binary("kill")?;
        let sent = Command::new(program).args(["-s", signal, &pid]).status()?;
        if !sent.success() {
            bail!("could not send SIG{signal} to {} (pid {pid})", self.name);
        }
        Ok(())
    }

    /// Waits for it to end.
    pub fn wait(&mut self, deadline: Deadline) -> Result<ExitStatus> {
        let what = format!("{} to end", self.name);
        wait_until(&what, deadline, || Ok(self.child.try_wait()?))
    }

    /// How it ended, if it has.
    pub fn try_wait(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// The path of its log.
    pub fn log(&self) -> &Path {
        &self.log
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Already reaped: the pid may be somebody else's, and kill() knows.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The end of a log, for a report.
pub(crate) fn tail(log: &Path) -> String {
    let bytes = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().collect();
    let skipped = lines.len().saturating_sub(REPORT_LINES_MAX);
    let mut out = Vec::new();
    if skipped > 0 {
        out.push(format!("  ... {skipped} lines before"));
    }
    for line in &lines[skipped..] {
        // A console has colours and carriage returns.
        let clean: String = line.chars().filter(|c| !c.is_control() || *c == '\t').collect();
        out.push(format!("  {clean}"));
    }
    out.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_ends_is_noticed_with_its_log() {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("log");
        let script = ["-c", "echo what happened; exit 3"];
        let mut process = Process::start("shell", Path::new("/bin/sh"), script, &log).unwrap();
        process.wait(Deadline::seconds(10)).unwrap();
        let error = process.check_alive().unwrap_err().to_string();
        assert!(error.contains("what happened") && error.contains('3'), "{error}");
    }

    #[test]
    fn dropping_kills() {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("log");
        let process = Process::start("sleep", Path::new("/bin/sleep"), ["3600"], &log).unwrap();
        let proc = PathBuf::from(format!("/proc/{}", process.pid()));
        assert!(proc.exists());
        drop(process);
        assert!(!proc.exists());
    }
}
