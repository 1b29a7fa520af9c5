//! What the checks share: where they work, how they fail, and how they become other processes and users.

use anyhow::{Result, bail};
use rustix::io::Errno;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;
use verbfs_harness::sys::{Child, ChildEnd};

/// A promise and the function that checks it.
pub struct Check {
    /// As printed; the name of the function.
    pub name: &'static str,
    /// Returns an error that says what was seen.
    pub run: fn(&Context) -> Result<()>,
}

/// A list of checks from function names.
#[macro_export]
macro_rules! checks {
    ($($name:ident),* $(,)?) => {
        /// The checks of this module, in the order they run.
        pub const CHECKS: &[$crate::support::Check] =
            &[$($crate::support::Check { name: stringify!($name), run: $name }),*];
    };
}

/// Fail unless two values are equal; says both.
#[macro_export]
macro_rules! same {
    ($left:expr, $right:expr, $($what:tt)+) => {{
        match (&$left, &$right) {
            (left, right) => anyhow::ensure!(left == right, "{}: {:?}, expected {:?}", format!($($what)+), left, right),
        }
    }};
}

/// Not a failure: this file system or this caller cannot do it.
#[derive(Debug)]
pub struct Skip(pub String);

impl std::fmt::Display for Skip {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Skip {}

/// End the check as skipped.
pub fn skip<T>(why: impl Into<String>) -> Result<T> {
    Err(Skip(why.into()).into())
}

/// Where a check works.
pub struct Context {
    /// One empty directory, through every mount.
    pub directories: Vec<PathBuf>,
    /// Whether --long was given.
    pub long: bool,
    /// Whether --fill was given.
    pub fill: bool,
}

impl Context {
    /// `name` through mount `mount`.
    pub fn on(&self, mount: usize, name: &str) -> PathBuf {
        self.directories[mount % self.directories.len()].join(name)
    }

    /// `name` through the first mount.
    pub fn a(&self, name: &str) -> PathBuf {
        self.on(0, name)
    }

    /// `name` through the second mount.
    pub fn b(&self, name: &str) -> PathBuf {
        self.on(1, name)
    }

    /// `name` through the third mount.
    pub fn c(&self, name: &str) -> PathBuf {
        self.on(2, name)
    }

    /// Let every user work in the directory.
    pub fn open_to_all(&self) -> Result<()> {
        Ok(rustix::fs::chmod(&self.directories[0], rustix::fs::Mode::from_raw_mode(0o777))?)
    }
}

/// The error number in any of the error types in use.
pub trait Number {
    fn number(&self) -> i32;
}

impl Number for Errno {
    fn number(&self) -> i32 {
        self.raw_os_error()
    }
}

impl Number for std::io::Error {
    fn number(&self) -> i32 {
        self.raw_os_error().unwrap_or(-1)
    }
}

/// The failure in words, with the line of the check it comes from (from the backtrace that `anyhow` took, see `main`).
pub fn describe(error: &anyhow::Error) -> String {
    let trace = error.backtrace().to_string();
    let place = trace
        .lines()
        .filter_map(|line| line.trim().strip_prefix("at "))
        .filter_map(|at| at.split_once("verbfs-posix/").map(|(_, place)| place))
        .find(|place| !place.starts_with("support.rs") && !place.starts_with("main.rs"));
    match place {
        // The text of a process of the check already ends with its own place.
        Some(place) if !error.is::<FromTask>() => format!("{error:#} [{place}]"),
        _ => format!("{error:#}"),
    }
}

/// The failure of another process of the check, told by it.
#[derive(Debug)]
struct FromTask(String);

impl std::fmt::Display for FromTask {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for FromTask {}

fn name_of(number: i32) -> String {
    format!("{:?}", nix::errno::Errno::from_raw(number))
}

/// The call must fail with one of `allowed`.
pub fn fails_with<T, E: Number>(result: std::result::Result<T, E>, allowed: &[Errno], what: &str) -> Result<()> {
    let names: Vec<String> = allowed.iter().map(|a| name_of(a.raw_os_error())).collect();
    let names = names.join(" or ");
    match result {
        Ok(_) => bail!("{what} succeeded, expected {names}"),
        Err(e) if allowed.iter().any(|a| a.raw_os_error() == e.number()) => Ok(()),
        Err(e) => bail!("{what} failed with {}, expected {names}", name_of(e.number())),
    }
}

/// Part of a check in a process of its own.
pub struct Task {
    child: Child,
    output: OwnedFd,
}

/// How long a task may take.
pub const TASK_LIMIT: Duration = Duration::from_secs(40);

impl Task {
    /// Start it.
    pub fn start(body: impl FnOnce() -> Result<()>) -> Result<Self> {
        let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        let child = Child::fork(|| match body() {
            Ok(()) => 0,
            Err(error) => {
                let skipped = error.is::<Skip>();
                let text = if skipped { format!("{error:#}") } else { describe(&error) };
                let _ = File::from(writer).write_all(text.as_bytes());
                if skipped { 77 } else { 1 }
            }
        })?;
        Ok(Self { child, output: reader })
    }

    /// Its process.
    pub fn process(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Wait for its end and pass on its failure.
    pub fn join(mut self) -> Result<()> {
        match self.child.wait(TASK_LIMIT) {
            ChildEnd::Exited(0) => Ok(()),
            ChildEnd::Exited(status) => {
                let mut bytes = vec![0; 4096];
                rustix::fs::fcntl_setfl(&self.output, rustix::fs::OFlags::NONBLOCK)?;
                let n = File::from(self.output).read(&mut bytes).unwrap_or(0);
                let text = String::from_utf8_lossy(&bytes[..n]).into_owned();
                if status == 77 { skip(text) } else { Err(FromTask(text).into()) }
            }
            ChildEnd::Killed(signal) => bail!("a process of the check was ended by signal {signal}"),
            ChildEnd::Running => bail!("a process of the check still runs after {TASK_LIMIT:?}"),
        }
    }

    /// Whether it still runs.
    pub fn running(&mut self) -> bool {
        self.child.poll() == ChildEnd::Running
    }
}

/// Run all at the same time, wait for all.
pub fn together(bodies: Vec<Box<dyn FnOnce() -> Result<()> + '_>>) -> Result<()> {
    let tasks: Vec<Task> = bodies.into_iter().map(Task::start).collect::<Result<_>>()?;
    tasks.into_iter().try_for_each(Task::join)
}

/// Somebody who is not root.
pub const USER: u32 = 54_321;
/// Somebody else who is not root.
pub const OTHER_USER: u32 = 54_322;
/// A group of neither.
pub const GROUP: u32 = 54_399;

/// Run `body` as user and group `id`, also in `groups`, in a child process.
pub fn as_user(id: u32, groups: &[u32], body: impl FnOnce() -> Result<()>) -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        return skip("needs root, to become another user");
    }
    let groups: Vec<nix::unistd::Gid> = groups.iter().map(|g| nix::unistd::Gid::from_raw(*g)).collect();
    Task::start(move || {
        let (uid, gid) = (nix::unistd::Uid::from_raw(id), nix::unistd::Gid::from_raw(id));
        nix::unistd::setgroups(&groups)?;
        nix::unistd::setresgid(gid, gid, gid)?;
        nix::unistd::setresuid(uid, uid, uid)?;
        body()
    })?
    .join()
}

/// Wait until `path` exists (as seen where the caller looks), which another process makes as a sign.
pub fn wait_for(path: &Path) -> Result<()> {
    let begun = std::time::Instant::now();
    while !path.exists() {
        if begun.elapsed() > TASK_LIMIT {
            bail!("waited {TASK_LIMIT:?} for {}", path.display());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// A pipe on which one process waits for others without using the file system under test.
pub struct Signal {
    reader: OwnedFd,
    writer: OwnedFd,
}

impl Signal {
    /// Nothing sent yet.
    pub fn new() -> Result<Self> {
        let (reader, writer) = rustix::pipe::pipe()?;
        Ok(Self { reader, writer })
    }

    /// Send one.
    pub fn send(&self) -> Result<()> {
        rustix::io::write(&self.writer, b"!")?;
        Ok(())
    }

    /// Take one; wait for it.
    pub fn wait(&self) -> Result<()> {
        same!(rustix::io::read(&self.reader, &mut [0u8; 1][..])?, 1, "bytes from the pipe");
        Ok(())
    }
}

/// Time for others to come to rest in a blocking call.
pub fn settle() {
    std::thread::sleep(Duration::from_millis(150));
}
