//! `verbfs-posix`: what a user of a file system notices, one named check for each promise.
//!
//! ```text
//! verbfs-posix --mount A --mount B --mount C [--only NAME]... [--list] [--long] [--fill]
//! ```
//!
//! # What is checked
//! Attributes and times, permissions, extended attributes and ACLs (`attributes`); names, links, renames and directories
//! (`names`); bytes, holes, mappings and the many ways to move bytes (`data`); fcntl, open-file-description and flock
//! locks with waiting, signals, death and deadlock (`locks`). Most checks do a thing through one mount and look through
//! another *at once*, without retry: that is the point. With one mount given three times they are plain POSIX checks.
//!
//! # How to read the output
//! `ok NAME`, `skip NAME: why` (the file system or the caller cannot, and documented so), or `FAIL NAME: why`; the last line counts.
//! Exit status 0 if none failed, 1 otherwise. Each check runs in a process of its own and a directory of its own, so
//! one cannot disturb another; one that takes longer than `--limit` seconds fails as stuck, with the kernel's view of it, and
//! the rest go on. Repeat one with `--only NAME`; the function of that name says what is promised. `--keep` leaves its files.
//!
//! Run as root: many checks become other users in child processes. The file system must then be mounted such that others
//! may use it (FUSE: `allow_other`).

mod attributes;
mod data;
mod locks;
mod names;
mod support;

use clap::Parser;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use support::{Check, Context, Skip};
use verbfs_harness::mounts::Mounts;
use verbfs_harness::sys::{Child, ChildEnd};

/// Check POSIX behaviour through one or several mounts of one file system.
#[derive(Parser, Debug)]
#[command(version, about)]
struct Arguments {
    /// A directory of the file system under test; give one for each mount.
    #[arg(long = "mount", required_unless_present = "list")]
    mounts: Vec<PathBuf>,
    /// Only the check of this name; may be given several times.
    #[arg(long)]
    only: Vec<String>,
    /// Print the names of all checks.
    #[arg(long)]
    list: bool,
    /// The long versions: directories of 100 000 entries.
    #[arg(long)]
    long: bool,
    /// Also fill the file system until it has no space left.
    #[arg(long)]
    fill: bool,
    /// Seconds a check may take (ten times that with --long or --fill).
    #[arg(long, default_value_t = 60)]
    limit: u64,
    /// Count a skipped check as failed, unless --may-skip names it: for a file system that promises all of it.
    #[arg(long)]
    strict: bool,
    /// A check that --strict lets skip.
    #[arg(long)]
    may_skip: Vec<String>,
    /// Leave the files of failed checks in place.
    #[arg(long)]
    keep: bool,
}

enum Outcome {
    Passed,
    Skipped(String),
    Failed(String),
}

fn kernel_view(pid: nix::unistd::Pid) -> String {
    ["wchan", "syscall", "stack"]
        .map(|name| {
            let text = std::fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap_or_default();
            format!("{name}: {}", text.trim().replace('\n', " < "))
        })
        .join("; ")
}

fn run(check: &Check, arguments: &Arguments, mounts: &Mounts) -> Outcome {
    let mut work = match mounts.work_directory(&format!("posix-{}-{}", std::process::id(), check.name)) {
        Ok(work) => work,
        Err(error) => return Outcome::Failed(format!("{error:#}")),
    };
    let context = Context { directories: work.all().to_vec(), long: arguments.long, fill: arguments.fill };
    let (reader, writer) = match rustix::pipe::pipe() {
        Ok(ends) => ends,
        Err(error) => return Outcome::Failed(format!("pipe: {error}")),
    };
    let child = Child::fork(|| {
        let result = (check.run)(&context);
        let (status, text) = match result {
            Ok(()) => (0, String::new()),
            Err(error) if error.is::<Skip>() => (77, format!("{error:#}")),
            Err(error) => (1, support::describe(&error)),
        };
        let _ = std::fs::File::from(writer).write_all(text.as_bytes());
        status
    });
    let mut child = match child {
        Ok(child) => child,
        Err(error) => return Outcome::Failed(format!("fork: {error}")),
    };
    let factor = if arguments.long || arguments.fill { 10 } else { 1 };
    let end = child.wait(Duration::from_secs(arguments.limit * factor));
    let outcome = match end {
        ChildEnd::Running => {
            let view = kernel_view(child.pid);
            // Its files may be what it hangs on: do not touch them.
            work.keep();
            return Outcome::Failed(format!("stuck for more than {} s; {view}", arguments.limit * factor));
        }
        ChildEnd::Killed(signal) => Outcome::Failed(format!("the check was ended by signal {signal}")),
        ChildEnd::Exited(status) => {
            let mut text = String::new();
            // Grandchildren that hang may hold the pipe open, so read only what is there.
            if rustix::fs::fcntl_setfl(&reader, rustix::fs::OFlags::NONBLOCK).is_ok() {
                let mut bytes = vec![0; 65536];
                let n = std::fs::File::from(reader).read(&mut bytes).unwrap_or(0);
                text = String::from_utf8_lossy(&bytes[..n]).into_owned();
            }
            match status {
                0 => Outcome::Passed,
                77 => Outcome::Skipped(text),
                101 => Outcome::Failed("panicked; its message is above".to_owned()),
                _ => Outcome::Failed(text),
            }
        }
    };
    if arguments.keep && matches!(outcome, Outcome::Failed(_)) {
        work.keep();
    }
    outcome
}

fn main() -> ExitCode {
    // A failure names its line: `anyhow` takes a backtrace where an error first appears, if asked to.
    // SAFETY: no other thread exists yet (nor later: checks fork).
    unsafe { std::env::set_var("RUST_LIB_BACKTRACE", "1") };
    let arguments = Arguments::parse();
    let all: Vec<&Check> =
        [attributes::CHECKS, names::CHECKS, data::CHECKS, locks::CHECKS].into_iter().flatten().collect();
    if arguments.list {
        all.iter().for_each(|check| println!("{}", check.name));
        return ExitCode::SUCCESS;
    }
    if let Some(unknown) = arguments.only.iter().find(|o| !all.iter().any(|c| c.name == o.as_str())) {
        eprintln!("verbfs-posix: no check is called {unknown}; see --list");
        return ExitCode::from(3);
    }
    let mounts = match Mounts::new(&arguments.mounts) {
        Ok(mounts) => mounts,
        Err(error) => {
            eprintln!("verbfs-posix: {error:#}");
            return ExitCode::from(3);
        }
    };
    let (mut passed, mut failed, mut skipped) = (0, Vec::new(), 0);
    for check in all {
        if !arguments.only.is_empty() && !arguments.only.iter().any(|o| o == check.name) {
            continue;
        }
        let begun = Instant::now();
        let outcome = match run(check, &arguments, &mounts) {
            Outcome::Skipped(why) if arguments.strict && !arguments.may_skip.iter().any(|m| m == check.name) => {
                Outcome::Failed(format!("skipped: {why}"))
            }
            outcome => outcome,
        };
        let seconds = begun.elapsed().as_secs_f64();
        let slow = if seconds > 2.0 { format!(" ({seconds:.1} s)") } else { String::new() };
        match outcome {
            Outcome::Passed => {
                passed += 1;
                println!("ok {}{slow}", check.name);
            }
            Outcome::Skipped(why) => {
                skipped += 1;
                println!("skip {}: {why}", check.name);
            }
            Outcome::Failed(why) => {
                failed.push(check.name);
                println!("FAIL {}: {why}{slow}", check.name);
            }
        }
        let _ = std::io::stdout().flush();
    }
    if !failed.is_empty() {
        println!("failed: {}", failed.join(" "));
    }
    println!("{passed} passed, {} failed, {skipped} skipped", failed.len());
    if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(1) }
}
