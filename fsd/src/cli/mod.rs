//! The command line of `verbfs`.
//!
//! [`run`] parses the arguments and does what they ask, except for what only the daemon can do: that is
//! the [`Program`] it is given. Commands that talk to a running daemon find it by [`target`], print
//! for people ([`render`]) or as JSON, and end with status 0 done, 1 failed, 2 wrong use, 3 no daemon there.

pub mod arguments;
mod background;
mod rdma;
pub mod render;
mod table;
mod target;

use crate::{
    config::{ClusterKey, Config},
    control::{self, ControlError, LocksRequest, MountRequest, Request, Response, Status},
};
use anyhow::{Context, bail};
use arguments::{Arguments, Command, ConfigCommand, DemoArguments, StartArguments};
use clap::{CommandFactory, Parser};
use std::{
    io::{self, Write},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

/// What a daemon is started with.
#[derive(Clone, Debug)]
pub struct Start {
    /// Checked as a whole.
    pub config: Config,
    /// This daemon's slot; one of the configured nodes.
    pub slot: u16,
    /// Where to mount the volume once the daemon serves; the directory is absolute.
    pub mount: Option<MountRequest>,
}

/// What the demonstration is asked for.
pub type Demo = DemoArguments;

/// What the command line leaves to the daemon's side of the program.
pub trait Program {
    /// Runs a daemon in this process until SIGINT, SIGTERM or a `Stop` request, then writes back, unmounts and returns.
    /// It answers on `start.config.control_socket(start.slot)` ([`crate::control::ControlServer`]) from early on: `verbfs start`
    /// waits for it.
    ///
    /// # Errors
    /// What kept it from starting, or from stopping in good order: what failed, on which node, what to do.
    fn run_daemon(&self, start: &Start) -> anyhow::Result<()>;

    /// Runs the demonstration to its end and cleans up, also when interrupted.
    ///
    /// # Errors
    /// What went wrong.
    fn demo(&self, demo: &Demo) -> anyhow::Result<()>;

    /// Sets up logging for a daemon; called before [`Program::run_daemon`].
    fn start_logging(&self, config: &Config) -> anyhow::Result<()>;
}

/// Does what the arguments of this process ask.
pub fn run(program: &dyn Program) -> ExitCode {
    // clap prints help, versions and wrong use by itself, and ends the process with 0 or 2.
    let arguments = Arguments::parse();
    match dispatch(arguments.command, program) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS, // the reader had enough
        Err(error) => {
            let _ = writeln!(io::stderr(), "verbfs: {error:#}");
            match error.downcast_ref::<ControlError>() {
                Some(ControlError::Unreachable { .. }) => ExitCode::from(3),
                _ if error.is::<target::NoDaemon>() => ExitCode::from(3),
                _ => ExitCode::FAILURE,
            }
        }
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

/// Prints without the panic that `print!` makes of a closed pipe.
fn emit(text: &str) -> anyhow::Result<()> {
    let mut output = io::stdout().lock();
    output.write_all(text.as_bytes())?;
    output.flush()?;
    Ok(())
}

fn emit_json(value: &impl serde::Serialize) -> anyhow::Result<()> {
    emit(&(serde_json::to_string_pretty(value)? + "\n"))
}

fn dispatch(command: Command, program: &dyn Program) -> anyhow::Result<()> {
    match command {
        Command::Start(start) => self::start(start, program),
        Command::Mount(mount) => {
            let request = MountRequest { directory: absolute(&mount.directory)?, options: mount.options.into() };
            let directory = request.directory.clone();
            ask(&mount.target.socket()?, &Request::Mount(request))
                .with_context(|| format!("cannot mount at {}", directory.display()))?;
            Ok(())
        }
        Command::Unmount(unmount) => {
            let directory = absolute(&unmount.directory)?;
            let mounts = control::verbfs_mounts()?;
            let Some((socket, _)) = mounts.iter().rfind(|(_, mounted)| *mounted == directory) else {
                bail!("{} is not a verbfs mount; `verbfs status` lists them", directory.display());
            };
            ask(socket, &Request::Unmount { directory: directory.clone() })
                .with_context(|| format!("cannot unmount {}", directory.display()))?;
            Ok(())
        }
        Command::Status(status) => {
            let socket = status.target.socket()?;
            if status.metrics {
                match ask(&socket, &Request::Metrics)? {
                    Response::Metrics { text } => emit(&text),
                    _ => unreachable!("`ask` checks the kind of the answer"),
                }
            } else {
                let answer = ask_status(&socket)?;
                if status.json { emit_json(&answer) } else { emit(&render::status(&answer)) }
            }
        }
        Command::Locks(locks) => {
            let (socket, ino) = match &locks.file {
                Some(file) => {
                    let (socket, ino) = target::of_file(file)?;
                    (locks.target.explicit_socket()?.unwrap_or(socket), Some(ino))
                }
                None => (locks.target.socket()?, None),
            };
            let Response::Locks(mut answer) = ask(&socket, &Request::Locks(LocksRequest { ino }))? else {
                unreachable!("`ask` checks the kind of the answer")
            };
            if answer.path.is_none() {
                answer.path = locks.file.as_deref().and_then(|file| absolute(file).ok());
            }
            if locks.json { emit_json(&answer) } else { emit(&render::locks(&answer)) }
        }
        Command::Top(top) => {
            let socket = top.target.socket()?;
            let take = || match ask(&socket, &Request::Top)? {
                Response::Top(top) => anyhow::Ok(top),
                _ => unreachable!("`ask` checks the kind of the answer"),
            };
            let interval = Duration::from_secs_f64(top.interval);
            let live = !top.json && !top.once && rustix::termios::isatty(io::stdout());
            let mut before = take()?;
            loop {
                std::thread::sleep(interval);
                let now = take()?;
                let difference = now.snapshot.since(&before.snapshot);
                if top.json {
                    emit(&(render::top_json(&now, &difference).to_string() + "\n"))?;
                } else {
                    let clear = if live { "\x1b[H\x1b[J" } else { "" };
                    emit(&format!("{clear}{}", render::top(&now, &difference)))?;
                }
                if top.once {
                    return Ok(());
                }
                before = now;
            }
        }
        Command::Stop(stop) => {
            let socket = stop.target.socket()?;
            // Who it is must be asked before it ends.
            let pid = ask_status(&socket).ok().map(|status| status.pid);
            ask(&socket, &Request::Stop { force: stop.force })?;
            wait_for_end(&socket, pid)
        }
        Command::Demo(demo) => program.demo(&demo),
        Command::Config { command } => config(command),
        Command::Rdma { command } => rdma::run(command),
        Command::Completions { shell } => {
            let mut text = Vec::new();
            clap_complete::generate(shell, &mut Arguments::command(), "verbfs", &mut text);
            emit(&String::from_utf8_lossy(&text))
        }
        Command::Manual { directory } => std::fs::create_dir_all(&directory)
            .and_then(|()| clap_mangen::generate_to(Arguments::command(), &directory))
            .with_context(|| format!("cannot write the manual to {}", directory.display())),
    }
}

fn ask(socket: &Path, request: &Request) -> anyhow::Result<Response> {
    Ok(control::ask(socket, request)?)
}

fn ask_status(socket: &Path) -> anyhow::Result<Status> {
    match ask(socket, &Request::Status)? {
        Response::Status(status) => Ok(status),
        _ => unreachable!("`ask` checks the kind of the answer"),
    }
}

fn start(arguments: StartArguments, program: &dyn Program) -> anyhow::Result<()> {
    let path = &arguments.config;
    let config = Config::load(path)?;
    let slot = match arguments.slot {
        Some(slot) if config.nodes.iter().any(|node| node.slot == slot) => slot,
        Some(slot) => bail!("--slot {slot}: {} has no such node", path.display()),
        None => {
            config.own_slot(&target::hostname()).map_err(|problem| anyhow::anyhow!("{}: {problem}", path.display()))?
        }
    };
    let mount = match &arguments.mount {
        Some(directory) => {
            let directory = absolute(directory)?;
            // The daemon removes a dead mount by itself.
            if !directory.is_dir() && !is_dead_mount(&directory) {
                bail!("cannot mount at {}: it is not a directory; make it first", directory.display());
            }
            Some(MountRequest { directory, options: arguments.options.clone().into() })
        }
        None => None,
    };
    if !arguments.foreground {
        return background::start(&arguments, &config, slot);
    }
    if arguments.detached {
        background::detach()?;
    }
    program.start_logging(&config)?;
    program.run_daemon(&Start { config, slot, mount })
}

/// A stopped daemon answers first and ends then: wait until it is gone.
fn wait_for_end(socket: &Path, pid: Option<u32>) -> anyhow::Result<()> {
    const PATIENCE: Duration = Duration::from_secs(240);
    let pid = pid.and_then(|pid| rustix::process::Pid::from_raw(pid as i32));
    let start = std::time::Instant::now();
    let lives = || match pid {
        // A daemon in another PID name space cannot be seen by number.
        Some(pid) if rustix::process::test_kill_process(pid).is_ok() => true,
        _ => socket.exists(),
    };
    while lives() {
        if start.elapsed() > PATIENCE {
            bail!(
                "the daemon at {} is still stopping after {} s; its log says what it waits for",
                socket.display(),
                PATIENCE.as_secs()
            );
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

fn config(command: ConfigCommand) -> anyhow::Result<()> {
    match command {
        ConfigCommand::Check { config: path, no_key } => {
            let config = Config::load(&path)?;
            let key = if no_key {
                "not looked at".into()
            } else {
                config.load_key()?;
                config.key_file.display().to_string()
            };
            let own = match config.own_slot(&target::hostname()) {
                Ok(slot) => format!("slot {slot}"),
                Err(problem) => format!("none: {problem}"),
            };
            emit(&render::config_check(&config, &path, &key, &own))
        }
        ConfigCommand::Show { config: path } => emit(&Config::load(&path)?.to_toml()),
        ConfigCommand::NewKey { file } => {
            ClusterKey::create(&file)?;
            emit(&format!(
                "wrote a new key to {}\ncopy it to the same path on every node, readable by root only (scp -p keeps its mode)\n",
                file.display()
            ))
        }
    }
}

/// Whether the path is a mount whose daemon is gone.
fn is_dead_mount(path: &Path) -> bool {
    std::fs::metadata(path).is_err_and(|error| error.raw_os_error() == Some(libc::ENOTCONN))
}

fn absolute(path: &Path) -> anyhow::Result<PathBuf> {
    // `canonicalize` would ask a mount that may hang; its parent is enough to be right about symbolic links.
    let path = std::path::absolute(path).with_context(|| format!("cannot make {} absolute", path.display()))?;
    match (path.parent().map(std::fs::canonicalize), path.file_name()) {
        (Some(Ok(parent)), Some(name)) => Ok(parent.join(name)),
        _ => Ok(path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn definitions_are_consistent() {
        Arguments::command().debug_assert();
    }

    /// Every command that is shown explains itself and gives an example.
    #[test]
    fn every_command_is_worth_asking_for_help() {
        for command in Arguments::command().get_subcommands().filter(|command| !command.is_hide_set()) {
            let help = command.clone().render_long_help().to_string();
            assert!(command.get_about().is_some(), "{}", command.get_name());
            if command.get_subcommands().next().is_none() {
                assert!(help.contains("verbfs "), "{} has no example:\n{help}", command.get_name());
            }
        }
    }

    #[test]
    fn completions_and_manual_can_be_made() {
        for shell in [clap_complete::Shell::Bash, clap_complete::Shell::Zsh, clap_complete::Shell::Fish] {
            let mut text = Vec::new();
            clap_complete::generate(shell, &mut Arguments::command(), "verbfs", &mut text);
            assert!(String::from_utf8(text).unwrap().contains("locks"));
        }
        let directory = tempfile::tempdir().unwrap();
        clap_mangen::generate_to(Arguments::command(), directory.path()).unwrap();
        assert!(directory.path().join("verbfs.1").exists());
        assert!(directory.path().join("verbfs-locks.1").exists());
    }

    #[test]
    fn paths_become_absolute_without_asking_the_mount() {
        let directory = tempfile::tempdir().unwrap();
        let inner = directory.path().join("inner");
        std::fs::create_dir(&inner).unwrap();
        std::os::unix::fs::symlink(&inner, directory.path().join("link")).unwrap();
        let real = std::fs::canonicalize(&inner).unwrap();
        assert_eq!(absolute(&directory.path().join("link/mount")).unwrap(), real.join("mount"));
        assert_eq!(absolute(Path::new("/")).unwrap(), Path::new("/"));
    }
}
