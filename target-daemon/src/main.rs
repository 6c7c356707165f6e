//! `holdfastd`: a storage server.

use std::path::PathBuf;
use std::pin::pin;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
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
    #[arg(long, value_name = "FILE", default_value = "/etc/holdfast/holdfastd.toml")]
    config: PathBuf,
    /// Check the configuration and exit.
    #[arg(long)]
    check_config: bool,
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
    logging::start(config.log_level, config.log_format);
    match run(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("holdfastd: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(config: Config) -> anyhow::Result<()> {
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
        let start = tokio::task::spawn_blocking(move || Daemon::start(config, shell::start));
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
