//! `holdfast`: the command line of users and operators, and `holdfast attach`, the diskless head.

mod api;
mod arguments;
mod attach;
mod drain;
mod events;
mod exit;
mod output;
mod pool;
mod progress;
mod resize;
mod server;
mod signature;
mod terminal;
mod top;
mod view;
mod volume;

use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use arguments::{Arguments, Command, PoolCommand, ServerCommand, VolumeCommand};
use exit::Failure;
use output::Output;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let output = Output { json: arguments.json };
    match run(arguments, &output) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            output.failure(&failure);
            ExitCode::from(failure.exit.code())
        }
    }
}

fn run(arguments: Arguments, output: &Output) -> Result<(), Failure> {
    let store = arguments.store;
    match arguments.command {
        Command::Pool(PoolCommand::Format(format)) => pool::format(&store, &format, output),
        Command::Server(command) => match command {
            ServerCommand::List => server::list(&store, output),
            ServerCommand::Drain(arguments) => drain::drain(&store, &arguments, output),
            ServerCommand::Undrain { server } => drain::undrain(&store, &server, output),
            ServerCommand::Remove { server, force } => {
                server::remove(&store, &server, force, output)
            }
        },
        Command::Volume(command) => match command {
            VolumeCommand::Create(create) => volume::create(&store, &create, output),
            VolumeCommand::List => volume::list(&store, output),
            VolumeCommand::Show { volume } => volume::show(&store, &volume, output),
            VolumeCommand::Wait(wait) => volume::wait(&store, &wait, output),
            VolumeCommand::Resize(arguments) => resize::resize(&store, &arguments, output),
            VolumeCommand::Failover(arguments) => volume::failover(&store, &arguments, output),
            VolumeCommand::Delete(delete) => volume::delete(&store, &delete, output),
            VolumeCommand::Release { volume, force } => {
                volume::release(&store, &volume, force, output)
            }
        },
        Command::Attach(attach) => attach::run(&store, &attach, output),
        Command::Export(command) => api::export(command, output),
        Command::Events(arguments) => events::run(&store, &arguments, output),
        Command::Top(arguments) => top::run(&store, &arguments, output),
        Command::Status { api } => api::status(&api, output),
        Command::Completions { shell } => {
            let mut command = Arguments::command();
            clap_complete::generate(shell, &mut command, "holdfast", &mut std::io::stdout());
            Ok(())
        }
    }
}
