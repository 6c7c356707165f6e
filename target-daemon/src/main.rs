//! `holdfastd`: a storage server.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::process::{self, ExitCode, Stdio};

use anyhow::Context;
use clap::{Parser, Subcommand};
use target_daemon::config::Config;
use target_daemon::{Daemon, logging};
use tokio::signal::unix::{SignalKind, signal};

const EXIT_CODES: &str = "\
Exit status:
  0  stopped on SIGTERM or SIGINT, in good order; or the configuration is good
  1  could not start, or did not stop in good order
  2  wrong arguments, or the configuration is wrong";

/// A Holdfast storage server: keeps replicas in its pool and serves volumes to guests.
#[derive(Parser)]
#[command(name = "holdfastd", version, after_help = EXIT_CODES)]
struct Arguments {
    /// The configuration, a TOML file.
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        default_value = "/etc/holdfast/holdfastd.toml"
    )]
    config: PathBuf,
    /// Check the configuration and exit.
    #[arg(long)]
    check_config: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Take everything over from the daemon that runs with this configuration, guests included,
    /// which notice a pause of some milliseconds; then serve in its place. If that fails, the
    /// running one goes on.
    Upgrade {
        /// Serve in the background: return when it serves, or has failed.
        #[arg(long)]
        detach: bool,
    },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let config = match Config::read(&arguments.config) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::from(2);
        }
    };
    if arguments.check_config {
        println!("{}: good", arguments.config.display());
        return ExitCode::SUCCESS;
    }
    let start = match arguments.command {
        Some(Command::Upgrade { detach: true }) => return detach(&arguments.config),
        Some(Command::Upgrade { detach: false }) => Start::Upgrade,
        None => Start::Anew,
    };
    logging::start(config.log_level, config.log_format);
    match run(config, start) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("holdfastd: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Where a daemon's state comes from.
#[derive(Clone, Copy)]
enum Start {
    Anew,
    Upgrade,
}

/// What the daemon in the background says when it serves.
const SERVES: &str = "serves";

/// Runs `upgrade` in the background, until it serves or has failed.
fn detach(config: &Path) -> ExitCode {
    let upgraded = || {
        let program = std::env::current_exe().context("cannot find this program")?;
        let mut child = process::Command::new(program)
            .arg("upgrade")
            .arg("--config")
            .arg(config)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            // A terminal's signals are not meant for it.
            .process_group(0)
            .spawn()
            .context("cannot start the new daemon")?;
        let mut said = String::new();
        if let Some(stdout) = child.stdout.take() {
            BufReader::new(stdout).read_line(&mut said).context("the new daemon")?;
        }
        if said.trim_end() == SERVES {
            return Ok(ExitCode::SUCCESS);
        }
        // It has said why, in its log.
        let status = child.wait().context("the new daemon")?;
        anyhow::bail!("the new daemon has not taken over ({status})")
    };
    upgraded().unwrap_or_else(|error: anyhow::Error| {
        eprintln!("holdfastd: {error:#}");
        ExitCode::FAILURE
    })
}

fn run(config: Config, start: Start) -> anyhow::Result<()> {
    // Two threads: one for the API, one so that a busy handler does not hold up a signal.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("api")
        .enable_all()
        .build()
        .context("cannot start the control plane's runtime")?;
    let ran = runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).context("cannot catch SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("cannot catch SIGINT")?;
        let mut stop = pin!(async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        });
        let start = tokio::task::spawn_blocking(move || match start {
            Start::Anew => Daemon::start(config, shell::start),
            Start::Upgrade => {
                let daemon = Daemon::take_over(config)?;
                // Whoever waits for this may have gone.
                let _ = writeln!(std::io::stdout(), "{SERVES}");
                Ok(daemon)
            }
        });
        let daemon = tokio::select! {
            started = start => started??,
            // Recovering a pool may take long. It changes nothing that a crash could not leave.
            () = &mut stop => {
                tracing::info!("told to stop while starting");
                return Ok(());
            }
        };
        Ok(daemon.serve(stop).await?)
    });
    // Does not wait for a start that was given up, nor for requests that nobody waits for.
    runtime.shutdown_background();
    ran
}
