//! The command line.

use std::path::PathBuf;

use base::{BlockSize, Durability};
use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use cluster::StoreAddress;
use target_daemon::config::{QUEUES_DEFAULT, QUEUES_MAX};
use target_daemon::size::parse_size;

use crate::exit::{self, Exit, Failure};

/// Replicated block volumes for virtual machines.
#[derive(Parser)]
#[command(name = "holdfast", version, after_help = exit::HELP, propagate_version = true)]
pub(crate) struct Arguments {
    /// Answer in JSON.
    #[arg(long, global = true)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) store: StoreArgument,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Which cluster store.
#[derive(Args)]
pub(crate) struct StoreArgument {
    /// The cluster store, as in sqlite:/var/lib/holdfast/cluster.db, or
    /// etcd://a:2379,b:2379,c:2379/holdfast.
    #[arg(long = "store", global = true, env = "HOLDFAST_STORE", value_name = "ADDRESS")]
    address: Option<StoreAddress>,
}

impl StoreArgument {
    pub(crate) fn address(&self) -> Result<&StoreAddress, Failure> {
        self.address.as_ref().ok_or_else(|| {
            let text = "this command needs the cluster store: give --store ADDRESS, or set \
                        HOLDFAST_STORE (as in sqlite:/var/lib/holdfast/cluster.db)";
            Failure::new(Exit::Usage, text)
        })
    }
}

/// Which daemon.
#[derive(Args)]
pub(crate) struct ApiArgument {
    /// The daemon's API socket, `api` in its configuration.
    #[arg(id = "api", long = "api", env = "HOLDFAST_API", value_name = "SOCKET")]
    pub(crate) socket: PathBuf,
}

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Make pools.
    #[command(subcommand)]
    Pool(PoolCommand),
    /// See servers, and move everything off one.
    #[command(subcommand)]
    Server(ServerCommand),
    /// Create, see and delete volumes.
    #[command(subcommand)]
    Volume(VolumeCommand),
    /// Serve a volume at a vhost-user socket of this host, which keeps no replica of it.
    Attach(AttachArguments),
    /// Serve volumes at vhost-user sockets of a daemon.
    #[command(subcommand)]
    Export(ExportCommand),
    /// Show what happened in the cluster, one line each with its cause.
    Events(EventsArguments),
    /// Watch servers and volumes, live, on one screen; q ends it.
    Top(TopArguments),
    /// Show what a daemon is doing.
    Status {
        #[command(flatten)]
        api: ApiArgument,
    },
    /// Print completions for a shell.
    Completions {
        /// The shell.
        shell: Shell,
    },
}

#[derive(Subcommand)]
pub(crate) enum PoolCommand {
    /// Format devices or files as a server's pool, and register the server.
    Format(FormatArguments),
}

#[derive(Args)]
pub(crate) struct FormatArguments {
    /// The server's name.
    #[arg(long)]
    pub(crate) name: String,
    /// A fast device or file, for the log; may be given again.
    #[arg(long, value_name = "PATH", required = true)]
    pub(crate) fast: Vec<PathBuf>,
    /// A mass device or file, for the home; may be given again.
    #[arg(long, value_name = "PATH")]
    pub(crate) mass: Vec<PathBuf>,
    /// Size of each file that is to be made.
    #[arg(long, value_parser = parse_size)]
    pub(crate) size: Option<u64>,
    /// Size of each fast file that is to be made, if not --size.
    #[arg(long, value_parser = parse_size, value_name = "SIZE")]
    pub(crate) fast_size: Option<u64>,
    /// Size of each mass file that is to be made, if not --size.
    #[arg(long, value_parser = parse_size, value_name = "SIZE")]
    pub(crate) mass_size: Option<u64>,
    /// How much of each fast device is log; the rest of it is home. All of it if not given.
    #[arg(long, value_parser = parse_size, value_name = "SIZE")]
    pub(crate) log_size: Option<u64>,
    /// Overwrite what the devices hold, and replace the pool of a server with this name.
    #[arg(long)]
    pub(crate) force: bool,
}

#[derive(Subcommand)]
pub(crate) enum ServerCommand {
    /// List the servers of the cluster.
    List,
    /// Move everything off a server, so that it can be stopped without anybody noticing.
    Drain(DrainArguments),
    /// Let a server take replicas again.
    Undrain {
        /// The server's name or id.
        server: String,
    },
    /// Forget a server that does not run and keeps nothing: nobody waits for it any more.
    Remove {
        /// The server's name or id.
        server: String,
        /// Though it keeps replicas, because its pool is gone for good: the volumes are healed from
        /// their other copies. Refused all the same where too few of those are left.
        #[arg(long)]
        force: bool,
    },
}

#[derive(Args)]
pub(crate) struct DrainArguments {
    /// The server's name or id.
    pub(crate) server: String,
    /// Wait until it is safe to stop the server; for this many seconds at most, if a number is
    /// given. The draining goes on whether somebody waits or not.
    #[arg(long, value_name = "SECONDS")]
    #[expect(clippy::option_option, reason = "an option with an optional value")]
    pub(crate) wait: Option<Option<u64>>,
    /// Move what can be moved, even if some replicas have nowhere to go.
    #[arg(long)]
    pub(crate) force: bool,
}

#[derive(Args)]
pub(crate) struct EventsArguments {
    /// Go on with what happens from now on.
    #[arg(long, short)]
    pub(crate) follow: bool,
    /// Show this many of the last events.
    #[arg(long, short = 'n', default_value_t = 50, value_name = "COUNT", conflicts_with = "after")]
    pub(crate) limit: usize,
    /// Show all events after the one with this number, as JSON shows it.
    #[arg(long, value_name = "NUMBER")]
    pub(crate) after: Option<u64>,
    /// Only what happened to this volume (name or id).
    #[arg(long)]
    pub(crate) volume: Option<String>,
    /// Only what happened to or at this server (name or id).
    #[arg(long)]
    pub(crate) server: Option<String>,
}

#[derive(Args)]
pub(crate) struct TopArguments {
    /// Print one picture and end; so does --json.
    #[arg(long)]
    pub(crate) once: bool,
    /// Seconds between two pictures.
    #[arg(long, default_value_t = 1, value_name = "SECONDS",
          value_parser = clap::value_parser!(u64).range(1..=60))]
    pub(crate) every: u64,
}

#[derive(Subcommand)]
pub(crate) enum VolumeCommand {
    /// Create a volume and wait until its servers have made its replicas.
    Create(CreateArguments),
    /// List the volumes.
    List,
    /// Show one volume.
    Show {
        /// The volume's name or id.
        volume: String,
    },
    /// Wait until a volume has all its copies, with progress.
    Wait(WaitArguments),
    /// Make a volume larger, also while it is used; its guests see the new size at once.
    Resize(ResizeArguments),
    /// Name the servers that are to take a lost member's place, best first.
    Failover(FailoverArguments),
    /// Delete a volume with its data.
    Delete(DeleteArguments),
    /// Take a volume's lease from a holder that is gone for good.
    Release {
        /// The volume's name or id.
        volume: String,
        /// Really.
        #[arg(long)]
        force: bool,
    },
}

#[derive(Args)]
pub(crate) struct ResizeArguments {
    /// The volume's name or id.
    pub(crate) volume: String,
    /// Its new size: a multiple of the block size, not less than it has; as in 8G.
    #[arg(value_parser = parse_size)]
    pub(crate) size: u64,
    /// Seconds to wait until whoever serves the volume serves the new size; 0: do not wait.
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub(crate) wait: u64,
}

#[derive(Args)]
pub(crate) struct FailoverArguments {
    /// The volume's name or id.
    pub(crate) volume: String,
    /// Servers that keep no replica of it and have room, best first.
    #[arg(required_unless_present = "any")]
    pub(crate) servers: Vec<String>,
    /// No server in particular: take back what was named.
    #[arg(long, conflicts_with = "servers")]
    pub(crate) any: bool,
}

#[derive(Args)]
pub(crate) struct CreateArguments {
    /// The volume's name.
    pub(crate) name: String,
    /// Its size: a multiple of the block size; 512K, 256M, 4G and 2T are powers of 1024.
    #[arg(long, value_parser = parse_size)]
    pub(crate) size: u64,
    /// Copies to keep, on as many servers: 1, 2, 3 or 5.
    #[arg(long, default_value_t = 3)]
    pub(crate) replicas: u8,
    /// The block size in bytes: 512 or 4096.
    #[arg(long, default_value = "4096", value_parser = parse_block_size)]
    pub(crate) block_size: BlockSize,
    /// When a write counts: when the servers' logs have taken it, as a disk's cache does, or when
    /// it is on media.
    #[arg(long, value_enum, default_value_t = DurabilityArgument::Flush)]
    pub(crate) durability: DurabilityArgument,
    /// After how many milliseconds without a quorum guests see an error; never if not given.
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) stall_deadline: Option<u64>,
    /// Guests can only read it.
    #[arg(long)]
    pub(crate) read_only: bool,
    /// The servers that are to take a lost member's place, best first; none of them gets a replica
    /// now. Whichever qualify, if not given.
    #[arg(long, value_name = "SERVER", value_delimiter = ',')]
    pub(crate) failover: Vec<String>,
    /// How many seconds to wait for the servers; 0: not at all.
    #[arg(long, default_value_t = 30, value_name = "SECONDS")]
    pub(crate) wait: u64,
}

/// When a write counts.
#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum DurabilityArgument {
    Flush,
    Durable,
}

impl From<DurabilityArgument> for Durability {
    fn from(argument: DurabilityArgument) -> Self {
        match argument {
            DurabilityArgument::Flush => Self::Flush,
            DurabilityArgument::Durable => Self::Durable,
        }
    }
}

fn parse_block_size(text: &str) -> Result<BlockSize, String> {
    let bytes = parse_size(text).map_err(|error| error.to_string())?;
    let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
    BlockSize::try_from(bytes).map_err(|error| error.to_string())
}

#[derive(Args)]
pub(crate) struct WaitArguments {
    /// The volume's name or id.
    pub(crate) volume: String,
    /// Give up after this many seconds; never if not given.
    #[arg(long, value_name = "SECONDS")]
    pub(crate) timeout: Option<u64>,
}

#[derive(Args)]
pub(crate) struct DeleteArguments {
    /// The volume's name or id.
    pub(crate) volume: String,
    /// How many seconds to wait until its servers have removed its replicas.
    #[arg(long, default_value_t = 0, value_name = "SECONDS")]
    pub(crate) wait: u64,
}

#[derive(Args)]
pub(crate) struct AttachArguments {
    /// The volume's name or id.
    pub(crate) volume: String,
    /// The vhost-user socket to make.
    #[arg(long, value_name = "PATH")]
    pub(crate) socket: PathBuf,
    /// Request queues.
    #[arg(long, default_value_t = QUEUES_DEFAULT, value_parser = queues())]
    pub(crate) queues: u16,
    /// The guest sees a read-only disk.
    #[arg(long)]
    pub(crate) read_only: bool,
    /// Take the volume from another holder that is gone for good.
    #[arg(long, conflicts_with = "standby")]
    pub(crate) force: bool,
    /// Take the volume when a guest starts the disk, and not before: for the destination of a live
    /// migration. The holder before yields it when its guest has stopped there.
    #[arg(long)]
    pub(crate) standby: bool,
    /// Take over from the `holdfast attach` that serves the socket, which may be of another version:
    /// its guest notices a pause of some milliseconds. Everything else must be as it was given
    /// there. If that fails, the running one goes on.
    #[arg(long, conflicts_with = "force")]
    pub(crate) upgrade: bool,
    /// Memory for the data of requests under way.
    #[arg(long, default_value = "64M", value_parser = parse_size, value_name = "SIZE")]
    pub(crate) buffers: u64,
    /// How long a member must have been silent before it is replaced, in milliseconds; 10000 if
    /// not given.
    #[arg(long, value_name = "MS", hide = true)]
    pub(crate) heal_delay_ms: Option<u64>,
}

fn queues() -> clap::builder::RangedI64ValueParser<u16> {
    clap::value_parser!(u16).range(1..=i64::from(QUEUES_MAX))
}

#[derive(Subcommand)]
pub(crate) enum ExportCommand {
    /// Serve a volume at a socket until it is removed, over restarts of the daemon too.
    Add {
        #[command(flatten)]
        api: ApiArgument,
        /// The volume's name or id.
        volume: String,
        /// The vhost-user socket to make.
        #[arg(long, value_name = "PATH")]
        socket: PathBuf,
        /// Request queues.
        #[arg(long, default_value_t = QUEUES_DEFAULT, value_parser = queues())]
        queues: u16,
        /// The guest sees a read-only disk.
        #[arg(long)]
        read_only: bool,
        /// Take the volume when a guest starts the disk, and not before: for the destination of a
        /// live migration.
        #[arg(long)]
        standby: bool,
        /// How many seconds to wait for the volume to be open.
        #[arg(long, default_value_t = 30, value_name = "SECONDS",
              value_parser = clap::value_parser!(u64).range(..=60))]
        wait: u64,
    },
    /// List the daemon's exports.
    List {
        #[command(flatten)]
        api: ApiArgument,
    },
    /// Stop serving at a socket.
    Remove {
        #[command(flatten)]
        api: ApiArgument,
        /// The export's socket.
        #[arg(long, value_name = "PATH")]
        socket: PathBuf,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }
}
