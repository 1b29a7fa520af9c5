//! `verbfs start` without `--foreground`: a daemon of its own session, and a parent that waits for it to serve.
//!
//! The child's standard input is a pipe from the parent. A byte on it means that the start is over; its end
//! without one means that the parent was interrupted, and the daemon ends as by SIGTERM.

use super::{arguments::StartArguments, render};
use crate::{
    config::Config,
    control::{self, NodeState, Request, Response},
};
use anyhow::{Context, bail};
use std::{
    fs::File,
    io::{Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

/// Lines of a daemon's log that are shown when it does not start.
const LOG_LINES: usize = 15;
/// Between two looks at a daemon that starts.
const POLL: Duration = Duration::from_millis(20);

/// Where a daemon in the background logs: `RUNTIME/CLUSTER/SLOT.log`.
pub fn log_file(config: &Config, slot: u16) -> PathBuf {
    config.runtime_directory().join(format!("{slot}.log"))
}

/// Starts this program again as a daemon and waits until it serves, or for as long as `arguments.wait` says.
///
/// # Errors
/// The end of the daemon's log, when it ended.
pub fn start(arguments: &StartArguments, config: &Config, slot: u16) -> anyhow::Result<()> {
    let socket = config.control_socket(slot);
    if control::ask(&socket, &Request::Status).is_ok() {
        bail!(
            "a daemon for slot {slot} of {} runs already ({}); see `verbfs status`",
            config.cluster,
            socket.display()
        );
    }
    let log_path = log_file(config, slot);
    let mut log = open_log(&log_path).with_context(|| format!("cannot write the log {}", log_path.display()))?;
    let log_start = log.seek(SeekFrom::End(0))?;

    let program = std::env::current_exe().context("cannot find the verbfs program")?;
    let mut command = Command::new(program);
    command
        .args(["start", "--foreground", "--detached", "--slot", &slot.to_string(), "--config"])
        .arg(std::path::absolute(&arguments.config)?);
    if let Some(directory) = &arguments.mount {
        command.arg("--mount").arg(super::absolute(directory)?);
    }
    if arguments.options.read_only {
        command.arg("--read-only");
    }
    if arguments.options.stock_mmap {
        command.arg("--stock-mmap");
    }
    command.current_dir("/").stdin(Stdio::piped()).stdout(log.try_clone()?).stderr(log);
    let mut child = command.spawn().context("cannot start the daemon")?;
    let mut alive = child.stdin.take().expect("standard input is a pipe");

    let give_up = Instant::now() + Duration::from_secs_f64(arguments.wait);
    loop {
        if let Some(status) = child.try_wait()? {
            let said = last_lines(&log_path, log_start);
            bail!("the daemon of node {slot} ended ({status}); its log, {}, says:\n{said}", log_path.display());
        }
        let answer = control::ask_within(&socket, &Request::Status, Duration::from_secs(1));
        if let Ok(Response::Status(status)) = answer {
            let mounted = arguments.mount.is_none() || !status.mounts.is_empty();
            let serving = status.state == NodeState::Serving && mounted;
            if serving || Instant::now() >= give_up {
                alive.write_all(b"\n").context("the daemon ended while it started")?;
                if !serving {
                    eprintln!(
                        "verbfs: not everything is there yet; the daemon goes on by itself (log: {})",
                        log_path.display()
                    );
                }
                return super::emit(&render::started(&status, &log_path));
            }
        } else if Instant::now() >= give_up + Duration::from_secs(20) {
            // Dropping `alive` ends it.
            bail!(
                "the daemon of node {slot} does not answer at {}; its log, {}, says:\n{}",
                socket.display(),
                log_path.display(),
                last_lines(&log_path, log_start)
            );
        }
        std::thread::sleep(POLL);
    }
}

/// In the daemon: leaves the terminal's session, and ends this process as by SIGTERM if the parent goes before it said so.
pub fn detach() -> anyhow::Result<()> {
    rustix::process::setsid().context("cannot leave the session")?;
    std::thread::Builder::new().name("verbfs-parent".into()).spawn(|| {
        let mut byte = [0];
        if !matches!(std::io::stdin().read(&mut byte), Ok(1)) {
            eprintln!("verbfs: `verbfs start` was interrupted; stopping");
            let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::TERM);
        }
    })?;
    Ok(())
}

fn open_log(path: &Path) -> std::io::Result<File> {
    use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
    if let Some(directory) = path.parent() {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    }
    File::options().create(true).append(true).mode(0o600).open(path)
}

fn last_lines(path: &Path, from: u64) -> String {
    let read = || {
        let mut file = File::open(path)?;
        let end = file.seek(SeekFrom::End(0))?;
        file.seek(SeekFrom::Start(from.max(end.saturating_sub(64 << 10))))?;
        let mut text = Vec::new();
        file.read_to_end(&mut text)?;
        std::io::Result::Ok(String::from_utf8_lossy(&text).into_owned())
    };
    match read() {
        Ok(text) => {
            let lines: Vec<&str> = text.lines().collect();
            let last = &lines[lines.len().saturating_sub(LOG_LINES)..];
            last.iter().map(|line| format!("  {line}")).collect::<Vec<_>>().join("\n")
        }
        Err(error) => format!("  (cannot be read: {error})"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shows_the_end_of_this_start_only() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("run/0.log");
        let mut log = open_log(&path).unwrap();
        log.write_all(b"of another time\n").unwrap();
        let from = log.stream_position().unwrap();
        for line in 0..50 {
            writeln!(log, "line {line}").unwrap();
        }
        let said = last_lines(&path, from);
        assert_eq!(said.lines().count(), LOG_LINES);
        assert!(said.ends_with("line 49") && !said.contains("another"));
        assert_eq!(last_lines(&path, 1 << 20), "");
    }
}
