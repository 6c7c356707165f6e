//! The user's terminal joined to a shell in the guest.

use std::io::{self, IsTerminal, Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::guest::Guest;

/// How long somebody may sit in the guest's shell.
const SESSION_LIMIT: Duration = Duration::from_hours(24);

/// A shell in a guest, on the terminal that this program runs in.
#[derive(Debug)]
pub struct Shell;

impl Shell {
    /// Runs a shell in the guest until the user leaves it.
    pub fn run(guest: &mut Guest) -> Result<()> {
        ensure!(io::stdin().is_terminal(), "a shell needs a terminal on standard input");
        let from_guest = UnixStream::connect(guest.shell_socket())?;
        let to_guest = from_guest.try_clone()?;
        let settings = stty(&["-g"])?;
        stty(&["raw", "-echo"])?;
        // Both end with the program: one sits in a read of the terminal that nothing interrupts.
        thread::spawn(move || copy(io::stdin(), to_guest));
        thread::spawn(move || copy(from_guest, io::stdout()));
        let outcome = guest.spawn(
            "exec setsid -c sh -c 'stty sane; cd /; PS1=\"guest# \" exec sh' \
             </dev/hvc0 >/dev/hvc0 2>&1",
        );
        let outcome = outcome.and_then(|job| guest.wait_output(job, SESSION_LIMIT));
        stty(&[settings.trim()])?;
        println!();
        outcome.map(|_left| ())
    }
}

fn copy(mut from: impl Read, mut to: impl Write) {
    let mut chunk = [0; 4096];
    while let Ok(length @ 1..) = from.read(&mut chunk) {
        if to.write_all(&chunk[..length]).and_then(|()| to.flush()).is_err() {
            return;
        }
    }
}

fn stty(arguments: &[&str]) -> Result<String> {
    let output = Command::new("stty")
        .args(arguments)
        .stdin(Stdio::inherit())
        .output()
        .context("running stty")?;
    ensure!(output.status.success(), "stty {arguments:?} failed");
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
