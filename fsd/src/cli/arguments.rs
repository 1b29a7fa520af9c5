//! What can be written behind `verbfs`, and its help texts.

use crate::control::MountOptions;
use clap::{Args, Parser, Subcommand};
use std::path::PathBuf;

/// Where the configuration is looked for unless `--config` says otherwise.
pub const DEFAULT_CONFIG: &str = "/etc/verbfs/verbfs.toml";

/// A strictly coherent file system over the memory and local storage of the nodes of one cluster.
///
/// Every node runs the same daemon, `verbfs start`; what it mounts is one POSIX file system, on which all
/// nodes see each write as soon as it has returned. See it on this machine alone with `verbfs demo`.
#[derive(Debug, Parser)]
#[command(
    name = "verbfs",
    version,
    max_term_width = 110,
    subcommand_required = true,
    arg_required_else_help = true,
    after_help = "A first cluster, on every node as root:\n  \
        verbfs config new-key /etc/verbfs/verbfs.key     (once; copy it to all nodes)\n  \
        verbfs config check                              (reads /etc/verbfs/verbfs.toml)\n  \
        verbfs start --mount /mnt/verbfs\n\n\
        Exit status: 0 done, 1 failed, 2 wrong use, 3 no daemon there."
)]
pub struct Arguments {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start the daemon of this node, and mount the volume if a directory is given
    #[command(after_help = "Examples:\n  \
        verbfs start --mount /mnt/verbfs\n  \
        verbfs start --config /etc/verbfs/job.toml --slot 2 --foreground\n\n\
        Without --foreground the command returns when the daemon serves, or says why it does not. A daemon\n\
        that still waits for other nodes goes on doing so; `verbfs status` shows for whom. Interrupting the\n\
        command before it returns ends the daemon as well.")]
    Start(StartArguments),

    /// Mount the volume at a directory of this node
    #[command(after_help = "Example:\n  verbfs mount /mnt/verbfs\n\nA daemon has one mount at a time.")]
    Mount(MountArguments),

    /// Unmount a directory; the daemon goes on
    #[command(after_help = "Example:\n  verbfs unmount /mnt/verbfs")]
    Unmount(UnmountArguments),

    /// Show the daemon of this node: members, mounts, storage, cache, locks
    #[command(after_help = "Examples:\n  \
        verbfs status\n  \
        verbfs status --json | jq .members\n  \
        verbfs status --metrics | grep lock_wait")]
    Status(StatusArguments),

    /// Show who holds and who waits for the locks of a file: node, process and range
    #[command(after_help = "Examples:\n  \
        verbfs locks /mnt/verbfs/results.h5\n  \
        verbfs locks --json           (all locks that this node's server has)\n\n\
        Locks of nodes: name (entries of a directory), open, attr (size and times), data (bytes).\n\
        S may cache, X may change, E may extend the file. Only what a node does now pins a lock; one that\n\
        is merely cached is given up when another asks. Locks of programs: fcntl and flock.")]
    Locks(LocksArguments),

    /// Show live rates: requests, bytes, locks, messages, and how long they take
    #[command(after_help = "Examples:\n  \
        verbfs top\n  \
        verbfs top --interval 5\n  \
        verbfs top --once --json | jq .times")]
    Top(TopArguments),

    /// Write everything back, unmount, leave the cluster and end the daemon
    #[command(after_help = "Examples:\n  \
        verbfs stop\n  \
        verbfs stop --config /etc/verbfs/job.toml --slot 2\n\n\
        Returns when the daemon has ended. Programs that still use its mount have 5 seconds to leave it; then it\n\
        is detached, and what is open 5 seconds later gets errors. See first who they are: fuser -vm DIRECTORY")]
    Stop(StopArguments),

    /// Bring up several nodes and mounts on this machine, put data through them, clean up
    #[command(after_help = "Examples:\n  \
        verbfs demo\n  \
        verbfs demo --nodes 2 --keep   (leaves them running until Ctrl-C)\n\n\
        Needs root (or fusermount3) and /dev/fuse; no RDMA hardware, no kernel module. Ctrl-C leaves nothing\n\
        mounted and nothing running.")]
    Demo(DemoArguments),

    /// Check a configuration, show it with all defaults, make a cluster key
    Config {
        #[command(subcommand)]
        command: ConfigCommand,
    },

    /// Set software RDMA up on an interface, and say what RDMA lacks on this host
    Rdma {
        #[command(subcommand)]
        command: RdmaCommand,
    },

    /// Print the completions of a shell
    #[command(after_help = "Examples:\n  \
        verbfs completions bash > /etc/bash_completion.d/verbfs\n  \
        verbfs completions zsh > \"${fpath[1]}/_verbfs\"")]
    Completions { shell: clap_complete::Shell },

    /// Write the manual pages to a directory
    #[command(hide = true)]
    Manual { directory: PathBuf },
}

/// Which daemon is meant.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Which daemon (needed only where several run)")]
pub struct Target {
    /// The configuration that the daemon was started with
    #[arg(long, value_name = "FILE", conflicts_with = "socket")]
    pub config: Option<PathBuf>,

    /// The daemon's slot, where several run on this host
    #[arg(long, value_name = "N", conflicts_with = "socket")]
    pub slot: Option<u16>,

    /// The daemon's control socket, RUNTIME/CLUSTER/SLOT.control
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
}

#[derive(Args, Clone, Debug)]
pub struct StartArguments {
    /// The cluster's configuration; every key is documented in example.toml
    #[arg(long, short, value_name = "FILE", default_value = DEFAULT_CONFIG)]
    pub config: PathBuf,

    /// This node's slot, where the configuration and the host name do not tell
    #[arg(long, value_name = "N")]
    pub slot: Option<u16>,

    /// Mount the volume here
    #[arg(long, short, value_name = "DIRECTORY")]
    pub mount: Option<PathBuf>,

    #[command(flatten)]
    pub options: MountOptionArguments,

    /// Stay in the foreground and log to standard error; Ctrl-C stops the daemon in good order
    #[arg(long, short)]
    pub foreground: bool,

    /// Seconds to wait for the other nodes before returning
    #[arg(long, value_name = "SECONDS", default_value_t = 10.0, value_parser = seconds(0.0, 3600.0))]
    pub wait: f64,

    /// Set by `verbfs start` itself: standard input tells whether it still lives
    #[arg(long, hide = true, requires = "foreground")]
    pub detached: bool,
}

#[derive(Args, Clone, Debug, Default)]
pub struct MountOptionArguments {
    /// Refuse every change through this mount (planned; this version refuses the option)
    #[arg(long)]
    pub read_only: bool,

    /// Allow shared mappings on kernels before 6.6, at the price of weaker coherence on this node (planned; this
    /// version refuses the option)
    #[arg(long)]
    pub stock_mmap: bool,
}

impl From<MountOptionArguments> for MountOptions {
    fn from(arguments: MountOptionArguments) -> MountOptions {
        MountOptions { read_only: arguments.read_only, stock_mmap: arguments.stock_mmap }
    }
}

#[derive(Args, Clone, Debug)]
pub struct MountArguments {
    /// An existing directory
    pub directory: PathBuf,
    #[command(flatten)]
    pub options: MountOptionArguments,
    #[command(flatten)]
    pub target: Target,
}

#[derive(Args, Clone, Debug)]
pub struct UnmountArguments {
    /// Where the volume is mounted
    pub directory: PathBuf,
}

#[derive(Args, Clone, Debug)]
pub struct StatusArguments {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Print all metrics in the text format of Prometheus instead
    #[arg(long, conflicts_with = "json")]
    pub metrics: bool,
    #[command(flatten)]
    pub target: Target,
}

#[derive(Args, Clone, Debug)]
pub struct LocksArguments {
    /// A file or directory on a verbfs mount; without it, everything this node's lock server has
    pub file: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub target: Target,
}

#[derive(Args, Clone, Debug)]
pub struct TopArguments {
    /// Seconds between two looks
    #[arg(long, short, value_name = "SECONDS", default_value_t = 1.0, value_parser = seconds(0.1, 3600.0))]
    pub interval: f64,
    /// Look once, print, end
    #[arg(long)]
    pub once: bool,
    /// Print a line of JSON per look
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub target: Target,
}

#[derive(Args, Clone, Debug)]
pub struct StopArguments {
    /// Also while programs use the mount: they are waited for, then cut off
    #[arg(long)]
    pub force: bool,
    #[command(flatten)]
    pub target: Target,
}

#[derive(Args, Clone, Debug)]
pub struct DemoArguments {
    /// How many nodes
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=16))]
    pub nodes: u16,

    /// Where to put mounts, sockets and stores; a new temporary directory unless given
    #[arg(long, value_name = "DIRECTORY")]
    pub directory: Option<PathBuf>,

    /// The source tree to put through it: a directory or a tar archive; one found on this machine unless given
    #[arg(long, value_name = "PATH")]
    pub source: Option<PathBuf>,

    /// Leave nodes and mounts up afterwards, until Ctrl-C
    #[arg(long)]
    pub keep: bool,
}

#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Say whether a configuration and its key can be used, and everything that is wrong with it
    #[command(after_help = "Example:\n  verbfs config check --config /etc/verbfs/verbfs.toml")]
    Check {
        #[arg(long, short, value_name = "FILE", default_value = DEFAULT_CONFIG)]
        config: PathBuf,
        /// Do not look at the key
        #[arg(long)]
        no_key: bool,
    },
    /// Print a configuration with every default filled in
    #[command(after_help = "Example:\n  verbfs config show")]
    Show {
        #[arg(long, short, value_name = "FILE", default_value = DEFAULT_CONFIG)]
        config: PathBuf,
    },
    /// Write a new random cluster key to a file that does not exist yet
    #[command(after_help = "Example:\n  verbfs config new-key /etc/verbfs/verbfs.key")]
    NewKey { file: PathBuf },
}

#[derive(Debug, Subcommand)]
pub enum RdmaCommand {
    /// Make a SoftRoCE device of an Ethernet interface, loading what it needs
    #[command(after_help = "Examples:\n  \
        verbfs rdma up eth0\n  \
        verbfs rdma up               (where one Ethernet interface is up)\n\n\
        Needs root. A device that is there already stays. It is gone after a reboot. What is still missing\n\
        is said, and then the exit status is 1. The interface goes on as before; RoCE v2 is UDP at port 4791.")]
    Up {
        /// The Ethernet interface; the only one that is up unless given
        interface: Option<String>,
        /// What to call the device; rxe0 or the next free number unless given
        #[arg(long)]
        name: Option<String>,
    },
    /// Remove a SoftRoCE device
    #[command(after_help = "Examples:\n  verbfs rdma down eth0\n  verbfs rdma down rxe0 --force")]
    Down {
        /// The device or its interface; the only SoftRoCE device unless given
        device: Option<String>,
        /// Also while programs have it open: they lose their connections
        #[arg(long)]
        force: bool,
    },
    /// Say what RDMA has and lacks on this host, and how to mend it
    #[command(after_help = "Examples:\n  \
        verbfs rdma check\n  \
        verbfs rdma check --address 198.18.0.1\n\n\
        Looks at modules, device files and who may open them, ports and MTU, drivers, the node's address, and how\n\
        much memory may be locked. Run it as the daemon's user, with the daemon's limits. Exit status: 0 nothing is\n\
        missing, 1 something is.")]
    Check {
        /// The address of this node, which must be that of an RDMA device; that of the configuration unless given
        #[arg(long)]
        address: Option<std::net::IpAddr>,
        /// The cluster's configuration, for this node's address and how much it locks [default: the usual one, if it is there]
        #[arg(long, short, value_name = "FILE")]
        config: Option<PathBuf>,
    },
}

/// A parser of seconds within bounds.
fn seconds(least: f64, most: f64) -> impl Fn(&str) -> Result<f64, String> + Clone + Send + Sync + 'static {
    move |text| match text.parse::<f64>() {
        Ok(seconds) if (least..=most).contains(&seconds) => Ok(seconds),
        _ => Err(format!("write a number of seconds from {least} to {most}")),
    }
}
