//! `verbfs demo`: several nodes on this machine, real work through all of them, everything checked, nothing left behind.
//!
//! 1. A source tree is unpacked on node 0.
//! 2. It is compiled on node 1, and what came out is run from another node's mount.
//! 3. Node 2 checksums it, and compares names, sizes, modes and times with the tree outside.
//! 4. All nodes write one file at once, in records that begin and end within pages; every node reads it back.
//! 5. What the locks did.
//!
//! The nodes are daemons of this very program, as `verbfs start` would run them. They die with the demonstration, however
//! that ends: by [`Cluster::end`], or by their parent's death.

use crate::cli::Demo;
use crate::config::{ClusterKey, Config, Size};
use crate::control::{self, NodeState, Request, Response};
use crate::metrics::{Snapshot, Value};
use anyhow::{Context, bail, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use rustix::process::{Pid, Signal};
use std::collections::BTreeMap;
use std::ffi::{CString, OsStr};
use std::fmt::Display;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier, mpsc};
use std::time::{Duration, Instant};

/// A tree found on this machine has at least this many bytes in its files; more directories are added until it has.
const TREE_BYTES: u64 = 64_000_000;
/// Storage per node, unless the tree needs more.
const ARENA: u64 = 256 << 20;
/// Page cache per node: less than the tree, so that it is also evicted and fetched again.
const CACHE: u64 = 48 << 20;
/// What a node keeps besides: its store of names, its rings.
const BESIDES: u64 = 128 << 20;
/// Size of the records in the shared file: neither they nor their offsets are multiples of a page.
const RECORD: usize = 47_008;
/// Where the first record begins; before it lies a hole.
const FIRST_RECORD: u64 = 1_234;
/// Records per node and round.
const RECORDS: u64 = 80;
/// Each round overwrites the file of the last with other bytes.
const ROUNDS: u64 = 2;
const _: () = assert!(!(RECORD as u64).is_multiple_of(crate::config::PAGE_SIZE));

/// How long the nodes may take to find each other.
const START_LIMIT: Duration = Duration::from_secs(30);
/// How long one step may take: many times what it takes on two slow cores.
const STEP_LIMIT: Duration = Duration::from_secs(150);
/// How long the daemons may take to write back, unmount and leave, before they are killed.
const STOP_LIMIT: Duration = Duration::from_secs(30);
/// How long the kernel may take to end a killed daemon.
const KILL_LIMIT: Duration = Duration::from_secs(10);
/// How often a wait looks whether it should go on.
const POLL: Duration = Duration::from_millis(50);
/// How much of a log or of a program's output an error shows.
const SHOWN_LINES: usize = 8;

/// The demonstration was told to end; not an error of the file system.
#[derive(Debug, thiserror::Error)]
#[error("interrupted")]
struct Interrupted;

/// Runs the demonstration, and cleans up whatever happens. `stop` is set by SIGINT and SIGTERM.
///
/// # Errors
/// What went wrong or differed, and at which node.
pub fn run(demo: &Demo, stop: &AtomicBool) -> anyhow::Result<()> {
    let start = Instant::now();
    for program in ["tar", "cp", "sha256sum", "make", "gcc"] {
        ensure!(
            find_program(program).is_some(),
            "the demonstration needs {program}: apt-get install make gcc tar coreutils"
        );
    }
    let place = Place::new(demo)?;
    let mut cluster = Cluster { place, daemons: Vec::new(), nodes: demo.nodes, stop, ended: false };
    let mut outcome = steps(demo, &mut cluster);
    let interrupted = outcome.as_ref().is_err_and(|error| error.is::<Interrupted>());
    if outcome.is_err() && !interrupted {
        cluster.show_logs();
    }
    if demo.keep && !interrupted && !cluster.daemons.is_empty() {
        if let Err(error) = &outcome {
            say(format_args!("failed: {error:#}"));
        }
        cluster.keep();
    }
    // The first error is the one to tell.
    let ended = cluster.end();
    if outcome.is_ok() {
        outcome = ended;
    } else if let Err(error) = ended {
        say(format_args!("cleaning up: {error:#}"));
    }
    outcome?;
    say(format_args!("nothing is left mounted or running; {:.0} s in all", start.elapsed().as_secs_f64()));
    Ok(())
}

fn steps(demo: &Demo, cluster: &mut Cluster) -> anyhow::Result<()> {
    let step = Step::begin("find a source tree");
    let tree = Tree::stage(demo.source.as_deref(), cluster)?;
    step.done("source", format_args!("{} files, {} ({})", tree.files(), megabytes(tree.bytes), tree.origin));

    let step = Step::begin("start the nodes");
    cluster.start(tree.bytes)?;
    step.done("all nodes", format_args!("daemons serve, mounts answer below {}", cluster.place.directory.display()));

    let (unpacker, compiler, checker) = (0, 1 % cluster.nodes, 2 % cluster.nodes);
    let step = Step::begin(format_args!("unpack on node {unpacker}"));
    unpack(cluster, &tree, &step, unpacker)?;
    step.done(
        format_args!("node {unpacker}"),
        format_args!("unpacked {} files, {}", tree.files(), megabytes(tree.bytes)),
    );

    if tree.lmdb.is_some() || tree.crates {
        let step = Step::begin(format_args!("compile on node {compiler}"));
        let built = compile(cluster, &tree, &step, compiler)?;
        step.done(format_args!("node {compiler}"), format_args!("compiled {}", built.join(" and ")));
        let step = Step::begin(format_args!("run on node {checker} what node {compiler} built"));
        let ran = run_built(cluster, &tree, compiler, checker)?;
        step.done(format_args!("node {checker}"), ran.join("; "));
    } else {
        say("            nothing in this tree that the demonstration knows how to compile");
    }

    let step = Step::begin(format_args!("checksum on node {checker}"));
    checksum(cluster, &tree, &step, checker)?;
    step.done(
        format_args!("node {checker}"),
        format_args!("{} checksums, names, sizes, modes and times are those of the tree outside", tree.files()),
    );

    let step = Step::begin("write one file from all nodes at once");
    let bytes = share(cluster, &step)?;
    step.done(
        "all nodes",
        format_args!("wrote {} into one file, {RECORD} bytes at a time, and each read it all back", megabytes(bytes)),
    );
    say(cluster.table()?);
    Ok(())
}

// --- what is said ---------------------------------------------------------------------------------

/// A line for people; that nobody reads on is no reason to fail.
fn say(line: impl Display) {
    let _ = writeln!(io::stdout(), "{line}");
}

fn megabytes(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}

/// A step under way: a bar on a terminal, and in any case one line when it is done.
struct Step {
    bar: ProgressBar,
    start: Instant,
}

impl Step {
    fn begin(what: impl Display) -> Step {
        let bar = ProgressBar::new_spinner();
        let style = ProgressStyle::with_template("{spinner} {prefix}  {wide_msg}").expect("the template is correct");
        bar.set_style(style);
        bar.set_prefix(what.to_string());
        bar.enable_steady_tick(Duration::from_millis(120));
        Step { bar, start: Instant::now() }
    }

    /// From here on it is known how much there is to do.
    fn of(&self, total: u64, bytes: bool) {
        let template = if bytes {
            "{spinner} {prefix}  {bar:30} {bytes}/{total_bytes}  {bytes_per_sec}"
        } else {
            "{spinner} {prefix}  {bar:30} {pos}/{len}"
        };
        self.bar.set_style(ProgressStyle::with_template(template).expect("the template is correct"));
        self.bar.set_length(total);
    }

    fn done(self, who: impl Display, what: impl Display) {
        self.bar.finish_and_clear();
        say(format_args!("{:<10}  {what}  ({:.1} s)", who.to_string(), self.start.elapsed().as_secs_f64()));
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

// --- where everything lies ------------------------------------------------------------------------

/// The directories of the demonstration.
struct Place {
    /// Mounts, sockets, logs, key and configuration.
    directory: PathBuf,
    /// Stores, and the tree outside of the mounts: in memory where there is room.
    data: PathBuf,
    /// Directories to remove at the end, besides what was made in them.
    made: Vec<PathBuf>,
}

impl Place {
    fn new(demo: &Demo) -> anyhow::Result<Place> {
        if let Some(directory) = &demo.directory {
            let directory = std::path::absolute(directory)?;
            let made = match fs::create_dir(&directory) {
                Ok(()) => vec![directory.clone()],
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    let empty = fs::read_dir(&directory)
                        .with_context(|| format!("cannot use {}", directory.display()))?
                        .next()
                        .is_none();
                    ensure!(empty, "{} is not empty: give a new or empty directory", directory.display());
                    Vec::new()
                }
                Err(error) => return Err(error).with_context(|| format!("cannot make {}", directory.display())),
            };
            return Ok(Place { data: directory.clone(), directory, made });
        }
        let directory = make_temporary(&std::env::temp_dir())?;
        let mut place = Place { data: directory.clone(), directory: directory.clone(), made: vec![directory] };
        let memory = Path::new("/dev/shm");
        let enough = room(memory).is_ok_and(|bytes| bytes >= needed(demo.nodes, TREE_BYTES));
        if enough && let Ok(data) = make_temporary(memory) {
            place.data = data.clone();
            place.made.push(data);
        }
        Ok(place)
    }

    fn scratch(&self) -> PathBuf {
        self.data.join("scratch")
    }

    fn mount(&self, slot: u16) -> PathBuf {
        self.directory.join(format!("node{slot}"))
    }

    fn log(&self, slot: u16) -> PathBuf {
        self.directory.join(format!("node{slot}.log"))
    }

    /// Removes what was made. What is mounted must be unmounted before: nothing is removed through a mount.
    fn remove(&self, nodes: u16) -> anyhow::Result<()> {
        let mut mounts = (0..nodes).map(|slot| self.mount(slot));
        if let Some(mount) = mounts.find(|mount| is_mounted(mount)) {
            bail!("{} is still mounted: umount -l {0}, then remove {}", mount.display(), self.directory.display());
        }
        let absent = |result: io::Result<()>| match result {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        };
        for slot in 0..nodes {
            absent(fs::remove_dir(self.mount(slot)))?;
            absent(fs::remove_file(self.log(slot)))?;
        }
        for name in ["key", "verbfs.toml"] {
            absent(fs::remove_file(self.directory.join(name)))?;
        }
        absent(fs::remove_dir_all(self.directory.join("run")))?;
        absent(fs::remove_dir_all(self.data.join("data")))?;
        absent(fs::remove_dir_all(self.scratch()))?;
        for directory in &self.made {
            absent(fs::remove_dir(directory)).with_context(|| format!("cannot remove {}", directory.display()))?;
        }
        Ok(())
    }
}

fn make_temporary(parent: &Path) -> anyhow::Result<PathBuf> {
    let mut salt = [0; 6];
    File::open("/dev/urandom").and_then(|mut source| source.read_exact(&mut salt))?;
    let name: String = salt.iter().map(|byte| format!("{byte:02x}")).collect();
    let directory = parent.join(format!("verbfs-demo-{name}"));
    fs::DirBuilder::new()
        .mode(0o755)
        .create(&directory)
        .with_context(|| format!("cannot make {}", directory.display()))?;
    Ok(directory)
}

/// Bytes free for this user.
fn room(path: &Path) -> io::Result<u64> {
    let found = rustix::fs::statvfs(path)?;
    Ok(found.f_bavail * found.f_frsize)
}

fn arena_size(nodes: u16, tree: u64) -> u64 {
    // What the compiler makes comes on top; nothing says that it spreads evenly.
    ARENA.max((4 * tree / u64::from(nodes)).next_multiple_of(1 << 20))
}

/// Bytes of all stores, of the tree outside and its archive.
fn needed(nodes: u16, tree: u64) -> u64 {
    u64::from(nodes) * (arena_size(nodes, tree) + BESIDES) + 3 * tree
}

fn is_mounted(path: &Path) -> bool {
    control::verbfs_mounts().is_ok_and(|mounts| mounts.iter().any(|(_, mounted)| mounted == path))
}

// --- the nodes ------------------------------------------------------------------------------------

struct Daemon {
    slot: u16,
    child: Child,
    socket: PathBuf,
    /// Number of the mount's FUSE connection, once it was seen.
    connection: Option<u32>,
}

impl Daemon {
    /// Kills it. A thread that waits for an answer of its own mount cannot be killed, and keeps the device open that would
    /// have to be closed to end the wait: the connection is aborted first.
    fn kill(&mut self) -> io::Result<std::process::ExitStatus> {
        if let Some(connection) = self.connection {
            let _ = fs::write(format!("/sys/fs/fuse/connections/{connection}/abort"), "1");
        }
        let _ = self.child.kill();
        let deadline = Instant::now() + KILL_LIMIT;
        loop {
            match self.child.try_wait()? {
                Some(status) => return Ok(status),
                None if Instant::now() < deadline => std::thread::sleep(POLL),
                None => return Err(io::Error::other(format!("process {} cannot be killed", self.child.id()))),
            }
        }
    }
}

/// The device number of what is mounted at `path`, from the kernel's list: asking the mount itself might wait for ever.
fn connection_of(path: &Path) -> Option<u32> {
    let table = fs::read_to_string("/proc/self/mountinfo").ok()?;
    let line = table.lines().rfind(|line| line.split(' ').nth(4).is_some_and(|mounted| Path::new(mounted) == path))?;
    line.split(' ').nth(2)?.split_once(':')?.1.parse().ok()
}

struct Cluster<'a> {
    place: Place,
    daemons: Vec<Daemon>,
    nodes: u16,
    stop: &'a AtomicBool,
    ended: bool,
}

impl Cluster<'_> {
    fn start(&mut self, tree: u64) -> anyhow::Result<()> {
        let place = &self.place;
        let (free, needed) = (room(&place.data)?, needed(self.nodes, tree));
        ensure!(
            free >= needed,
            "{} has room for {}, the stores need {}: free some, or name another place by --directory",
            place.data.display(),
            megabytes(free),
            megabytes(needed)
        );
        // Names of clusters must not meet on one host.
        let mut config = Config::single_host(&format!("demo{}", std::process::id()), 0, self.nodes, &place.directory);
        config.slot = None;
        config.directories.data = place.data.join("data");
        config.storage.arena_size = Size(arena_size(self.nodes, tree));
        config.cache.size = Size(CACHE);
        ClusterKey::create(&config.key_file)?;
        let file = place.directory.join("verbfs.toml");
        fs::write(&file, config.to_toml())?;
        Config::load(&file)?;

        let program = std::env::current_exe().context("cannot find the verbfs program")?;
        for slot in 0..self.nodes {
            let mount = self.place.mount(slot);
            fs::create_dir(&mount)?;
            let log = File::create(self.place.log(slot))?;
            let mut command = Command::new(&program);
            command.args(["start", "--foreground", "--config"]).arg(&file);
            command.args(["--slot", &slot.to_string(), "--mount"]).arg(&mount);
            command.current_dir("/").stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
            let child = spawn(&mut command, Signal::TERM).with_context(|| format!("cannot start node {slot}"))?;
            self.daemons.push(Daemon { slot, child, socket: config.control_socket(slot), connection: None });
        }
        let deadline = Instant::now() + START_LIMIT;
        for slot in 0..usize::from(self.nodes) {
            let mut state = "does not answer".to_string();
            loop {
                self.check()?;
                let asked = control::ask_within(&self.daemons[slot].socket, &Request::Status, Duration::from_secs(1));
                if let Ok(Response::Status(status)) = asked {
                    if status.state == NodeState::Serving && !status.mounts.is_empty() {
                        break;
                    }
                    state = format!("is {:?} with {} mounts", status.state, status.mounts.len()).to_lowercase();
                }
                ensure!(Instant::now() < deadline, "node {slot} {state} after {} s", START_LIMIT.as_secs());
                std::thread::sleep(POLL);
            }
        }
        Ok(())
    }

    /// Whether to go on: nobody said stop, and every daemon lives.
    fn check(&mut self) -> anyhow::Result<()> {
        if self.stop.load(Ordering::Acquire) {
            return Err(Interrupted.into());
        }
        for Daemon { slot, child, connection, .. } in &mut self.daemons {
            *connection = connection.or_else(|| connection_of(&self.place.mount(*slot)));
            if let Some(status) = child.try_wait()? {
                bail!("the daemon of node {slot} ended ({status})");
            }
        }
        Ok(())
    }

    /// Runs a program to its end, and gives its standard output line by line to `line`, then what it said on the other.
    fn program(&mut self, command: &mut Command, line: impl FnMut(&str)) -> anyhow::Result<()> {
        self.program_with_input(command, None, line)
    }

    fn program_with_input(
        &mut self,
        command: &mut Command,
        input: Option<Feed>,
        mut line: impl FnMut(&str),
    ) -> anyhow::Result<()> {
        let name = Path::new(command.get_program()).file_name().unwrap_or_default().to_string_lossy().into_owned();
        // The variables of a `make` or `cargo` that started this program would steer these.
        for (variable, _) in std::env::vars_os() {
            let text = variable.to_string_lossy();
            let steers = ["CARGO_", "RUSTFLAGS", "RUSTC", "MAKE"].iter().any(|begin| text.starts_with(begin))
                || text == "MFLAGS";
            if steers && !command.get_envs().any(|(set, _)| set == variable) {
                command.env_remove(&variable);
            }
        }
        command
            .stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() })
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut group = Group(spawn(command, Signal::KILL).with_context(|| format!("cannot run {name}"))?);
        let (sender, lines) = mpsc::channel();
        let outputs: [(bool, Box<dyn Read + Send>); 2] = [
            (false, Box::new(group.0.stdout.take().expect("standard output is a pipe"))),
            (true, Box::new(group.0.stderr.take().expect("standard error is a pipe"))),
        ];
        for (is_error, output) in outputs {
            let sender = sender.clone();
            std::thread::spawn(move || {
                for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
                    if sender.send((is_error, String::from_utf8_lossy(&line).into_owned())).is_err() {
                        return;
                    }
                }
            });
        }
        drop(sender);
        let feeder = input.map(|input| {
            let mut pipe = group.0.stdin.take().expect("standard input is a pipe");
            std::thread::spawn(move || input(&mut pipe))
        });
        let deadline = Instant::now() + STEP_LIMIT;
        let mut said = Vec::new();
        loop {
            self.check()?;
            match lines.recv_timeout(POLL) {
                Ok((is_error, text)) => {
                    line(&text);
                    if is_error {
                        said.push(text);
                    }
                }
                Err(mpsc::RecvTimeoutError::Disconnected) => break,
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    ensure!(
                        Instant::now() < deadline,
                        "{name} does not end: nothing moved on for up to {} s",
                        STEP_LIMIT.as_secs()
                    );
                }
            }
        }
        let status = group.0.wait()?;
        let last = &said[said.len().saturating_sub(SHOWN_LINES)..];
        ensure!(status.success(), "{name} failed ({status}):\n  {}", last.join("\n  "));
        if let Some(feeder) = feeder {
            feeder.join().expect("the feeder does not panic").with_context(|| format!("cannot feed {name}"))?;
        }
        Ok(())
    }

    /// The standard output of a program, as lines.
    fn lines_of(&mut self, command: &mut Command) -> anyhow::Result<Vec<String>> {
        let mut lines = Vec::new();
        self.program(command, |line| lines.push(line.to_string()))?;
        Ok(lines)
    }

    /// What the locks did, per node.
    fn table(&mut self) -> anyhow::Result<String> {
        const TITLES: [&str; 8] =
            ["", "granted", "revoked", "hand-overs", "glimpses", "messages", "one-sided", "p99 wait"];
        let mut rows = vec![TITLES.map(str::to_string)];
        let mut sums = [0; 6];
        for Daemon { slot, socket, .. } in &self.daemons {
            let Response::Top(top) = control::ask(socket, &Request::Top)? else { bail!("node {slot}: another answer") };
            let snapshot = top.snapshot;
            let counts = [
                "verbfs_lock_grants_total",
                "verbfs_lock_revokes_sent_total",
                "verbfs_hand_overs_total{direction=\"received\"}",
                "verbfs_lock_glimpses_total",
                "verbfs_messages_sent_total",
                "verbfs_fabric_bytes_total",
            ]
            .map(|name| count(&snapshot, name));
            for (sum, count) in sums.iter_mut().zip(counts) {
                *sum += count;
            }
            rows.push(row(format!("node {slot}"), counts, longest_wait(&snapshot)));
        }
        rows.push(row("all".into(), sums, String::new()));
        let mut text = String::from("\nWhat the locks did:\n");
        for row in &rows {
            for (column, cell) in row.iter().enumerate() {
                let width = rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
                if column == 0 { text += &format!("  {cell:<width$}") } else { text += &format!("  {cell:>width$}") }
            }
            text.truncate(text.trim_end().len());
            text.push('\n');
        }
        text += "\ngranted, revoked: by the node's lock server; hand-overs: dirty ranges taken straight from the last writer;\n\
            glimpses: sizes and times asked for without taking locks; one-sided: moved without messages;\n\
            p99 wait: for a lock, of the class that waits longest.\n";
        Ok(text)
    }

    /// What the daemons complained of.
    fn show_logs(&self) {
        for slot in 0..self.nodes {
            let Ok(text) = fs::read(self.place.log(slot)) else { continue };
            let text = String::from_utf8_lossy(&text);
            let words = [" WARN ", " ERROR ", "panicked"];
            let lines: Vec<&str> = text
                .lines()
                .filter(|line| line.starts_with("verbfs: ") || words.iter().any(|word| line.contains(word)))
                .collect();
            for line in &lines[lines.len().saturating_sub(SHOWN_LINES)..] {
                say(format_args!("log of node {slot}: {line}"));
            }
        }
    }

    /// Waits until told to stop.
    fn keep(&mut self) {
        say("\nLeft up until Ctrl-C:");
        for Daemon { slot, socket, .. } in &self.daemons {
            let (mount, log) = (self.place.mount(*slot), self.place.log(*slot));
            say(format_args!("  node {slot}  {}  log {}", mount.display(), log.display()));
            say(format_args!("          verbfs status --socket {}", socket.display()));
        }
        while !self.stop.load(Ordering::Acquire) {
            std::thread::sleep(POLL);
        }
    }

    /// Ends the daemons, in good order if they will, and removes everything.
    fn end(&mut self) -> anyhow::Result<()> {
        self.ended = true;
        let mut wrong = Vec::new();
        for Daemon { child, .. } in &mut self.daemons {
            // One that was waited for has no process to signal any more.
            if let Ok(None) = child.try_wait() {
                let _ = rustix::process::kill_process(Pid::from_child(child), Signal::TERM);
            }
        }
        let deadline = Instant::now() + STOP_LIMIT;
        for daemon in &mut self.daemons {
            let slot = daemon.slot;
            let status = loop {
                match daemon.child.try_wait() {
                    Ok(None) if Instant::now() < deadline => std::thread::sleep(POLL),
                    Ok(None) => {
                        wrong.push(format!("node {slot} did not end within {} s and was killed", STOP_LIMIT.as_secs()));
                        break daemon.kill();
                    }
                    Ok(Some(status)) => break Ok(status),
                    Err(error) => break Err(error),
                }
            };
            let mount = self.place.mount(slot);
            if is_mounted(&mount) {
                wrong.push(format!("node {slot} left its mount; it is detached"));
                detach(&mount);
            }
            match status {
                // By our signal, before it caught any.
                Ok(status) if status.success() || status.signal() == Some(libc::SIGTERM) => {}
                Ok(status) => wrong.push(format!("the daemon of node {slot} did not end well ({status})")),
                Err(error) => wrong.push(format!("node {slot}: {error}")),
            }
        }
        if !wrong.is_empty() {
            self.show_logs();
        }
        self.daemons.clear();
        if let Err(error) = self.place.remove(self.nodes) {
            wrong.push(format!("{error:#}"));
        }
        ensure!(wrong.is_empty(), "{}", wrong.join("; "));
        Ok(())
    }
}

impl Drop for Cluster<'_> {
    fn drop(&mut self) {
        if !self.ended {
            let _ = self.end();
        }
    }
}

/// Writes a program's standard input, on a thread of its own.
type Feed = Box<dyn FnOnce(&mut dyn Write) -> io::Result<()> + Send>;

/// A program with its children, which share a process group; killed when dropped.
struct Group(Child);

impl Drop for Group {
    fn drop(&mut self) {
        let group = Pid::from_child(&self.0);
        // Waited for or not: what it started may live on, and keep a mount busy.
        let _ = rustix::process::kill_process_group(group, Signal::KILL);
        let _ = self.0.try_wait();
    }
}

/// Starts a program in a process group of its own (Ctrl-C is for the demonstration, not for the nodes), which gets `signal`
/// when the demonstration is gone. Must be called by the main thread: for the kernel, that is the parent.
fn spawn(command: &mut Command, signal: Signal) -> io::Result<Child> {
    let parent = rustix::process::getpid();
    let prepare = move || {
        rustix::process::set_parent_process_death_signal(Some(signal))?;
        // It may have gone before that.
        if rustix::process::getppid() == Some(parent) { Ok(()) } else { Err(io::ErrorKind::BrokenPipe.into()) }
    };
    // SAFETY: between fork and exec only two system calls are made, both async-signal-safe.
    unsafe { command.process_group(0).pre_exec(prepare) };
    command.spawn()
}

fn detach(mount: &Path) {
    if let Ok(path) = CString::new(mount.as_os_str().as_bytes()) {
        // SAFETY: the path is a string that ends in zero and outlives the call.
        unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH | libc::UMOUNT_NOFOLLOW) };
    }
}

/// Where PATH, or rustup's own directory, has a program.
fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let home = std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cargo/bin"));
    std::env::split_paths(&path).chain(home).map(|directory| directory.join(name)).find(|file| file.is_file())
}

/// A counter, or all members of its family.
fn count(snapshot: &Snapshot, name: &str) -> u64 {
    let own = snapshot
        .samples
        .iter()
        .filter(|(key, _)| key.strip_prefix(name).is_some_and(|labels| labels.is_empty() || labels.starts_with('{')));
    own.map(|(_, value)| if let Value::Counter(count) = value { *count } else { 0 }).sum()
}

/// The longest of the classes' waits for locks that 99 of 100 do not exceed.
fn longest_wait(snapshot: &Snapshot) -> String {
    let waits = snapshot.samples.iter().filter(|(key, _)| key.starts_with("verbfs_lock_wait_seconds"));
    let quantiles =
        waits.filter_map(|(_, value)| if let Value::Times(times) = value { times.quantile(0.99) } else { None });
    quantiles.max().map_or("-".into(), |time| format!("{:.1} ms", time.as_secs_f64() * 1e3))
}

fn row(name: String, counts: [u64; 6], wait: String) -> [String; 8] {
    let [granted, revoked, hand_overs, glimpses, messages, bytes] = counts;
    let [granted, revoked, hand_overs, glimpses, messages] =
        [granted, revoked, hand_overs, glimpses, messages].map(|count| count.to_string());
    [name, granted, revoked, hand_overs, glimpses, messages, megabytes(bytes), wait]
}

// --- the source tree ------------------------------------------------------------------------------

/// What cannot be told apart from outside must be the same on every node.
#[derive(Debug, PartialEq, Eq)]
struct Entry {
    mode: u32,
    /// Of files.
    length: u64,
    /// Of files: seconds and nanoseconds.
    modified: (i64, i64),
    /// Of symbolic links.
    target: Option<PathBuf>,
}

impl Entry {
    fn is_file(&self) -> bool {
        self.mode & libc::S_IFMT == libc::S_IFREG
    }
}

/// Everything below `root`, by path relative to it.
fn walk(root: &Path) -> anyhow::Result<BTreeMap<PathBuf, Entry>> {
    let mut found = BTreeMap::new();
    let mut directories = vec![PathBuf::new()];
    while let Some(directory) = directories.pop() {
        let path = root.join(&directory);
        let entries = fs::read_dir(&path).with_context(|| format!("cannot list {}", path.display()))?;
        for entry in entries {
            let entry = entry.with_context(|| format!("cannot list {}", path.display()))?;
            let name = directory.join(entry.file_name());
            let metadata = entry.metadata().with_context(|| format!("cannot look at {}", entry.path().display()))?;
            let is_file = metadata.is_file();
            let entry = Entry {
                mode: metadata.mode(),
                length: if is_file { metadata.len() } else { 0 },
                modified: if is_file { (metadata.mtime(), metadata.mtime_nsec()) } else { (0, 0) },
                target: if metadata.is_symlink() { Some(fs::read_link(entry.path())?) } else { None },
            };
            if metadata.is_dir() {
                directories.push(name.clone());
            }
            found.insert(name, entry);
        }
    }
    Ok(found)
}

/// A source tree outside of the mounts, and all that is to be found again inside.
struct Tree {
    origin: String,
    outside: PathBuf,
    archive: PathBuf,
    entries: BTreeMap<PathBuf, Entry>,
    /// SHA-256 of every file, in hexadecimal digits.
    sums: BTreeMap<PathBuf, String>,
    /// Of all files.
    bytes: u64,
    /// Where LMDB's C sources are.
    lmdb: Option<PathBuf>,
    /// Whether it holds crates that cargo can take from it.
    crates: bool,
}

/// Crates that make up what is compiled; they come into the tree first.
const CRATES_FIRST: [&str; 5] = ["lmdb-master-sys", "regex-automata", "regex-syntax", "aho-corasick", "memchr"];

impl Tree {
    fn files(&self) -> usize {
        self.sums.len()
    }

    /// Copies the tree to scratch, packs it, takes its checksums.
    fn stage(source: Option<&Path>, cluster: &mut Cluster) -> anyhow::Result<Tree> {
        let scratch = cluster.place.scratch();
        let outside = scratch.join("tree");
        fs::create_dir_all(&outside)?;
        let origin;
        let mut crates = false;
        match source {
            Some(path) if path.is_dir() => {
                origin = path.display().to_string();
                cluster.program(Command::new("cp").arg("-a").arg(path.join(".")).arg(&outside), |_| {})?;
            }
            Some(path) => {
                ensure!(path.exists(), "{} does not exist", path.display());
                origin = path.display().to_string();
                cluster.program(Command::new("tar").arg("-xf").arg(path).arg("-C").arg(&outside), |_| {})?;
            }
            None => {
                let (mut directories, mut bytes) = registry_crates();
                crates = !directories.is_empty();
                let mut places = Vec::new();
                if crates {
                    places.push("crates of cargo's registry: Rust and C".to_string());
                }
                for path in system_sources() {
                    if bytes < TREE_BYTES {
                        bytes += size_of(&path);
                        places.push(path.display().to_string());
                        directories.push(path);
                    }
                }
                origin = places.join(", ");
                ensure!(
                    bytes >= TREE_BYTES,
                    "no source tree of {} was found on this machine: name one, a directory or a tar archive, by --source",
                    megabytes(TREE_BYTES)
                );
                cluster.program(Command::new("cp").arg("-a").args(&directories).arg(&outside), |_| {})?;
            }
        }
        let mut entries = walk(&outside)?;
        entries.retain(|name, entry| {
            let line_break = name.as_os_str().as_bytes().contains(&b'\n');
            // sha256sum writes such names otherwise; device nodes and pipes are no sources.
            let known = [libc::S_IFREG, libc::S_IFDIR, libc::S_IFLNK].contains(&(entry.mode & libc::S_IFMT));
            if line_break || !known {
                let _ = fs::remove_file(outside.join(name));
            }
            !line_break && known
        });
        let mut sums =
            checksums(cluster, &outside, entries.iter().filter(|(_, entry)| entry.is_file()).map(|(name, _)| name))?;
        if crates {
            write_crate_checksums(&outside, &sums)?;
            entries = walk(&outside)?;
            let more: Vec<&PathBuf> = entries
                .iter()
                .filter(|(name, entry)| entry.is_file() && !sums.contains_key(*name))
                .map(|(name, _)| name)
                .collect();
            let more = checksums(cluster, &outside, more.into_iter())?;
            sums.extend(more);
        }
        let files = entries.values().filter(|entry| entry.is_file());
        let bytes = files.map(|entry| entry.length).sum();
        let lmdb = entries
            .keys()
            .find(|name| name.ends_with("liblmdb/mdb.c"))
            .and_then(|name| name.parent())
            .map(Path::to_path_buf);
        let archive = scratch.join("tree.tar");
        // This format keeps nanoseconds.
        cluster.program(
            Command::new("tar").args(["--format=posix", "-cf"]).arg(&archive).arg("-C").arg(&outside).arg("."),
            |_| {},
        )?;
        crates &= find_program("cargo").is_some()
            && CRATES_FIRST[1..].iter().all(|name| {
                entries.keys().any(|path| path.parent() == Some(Path::new("")) && is_crate(path.as_os_str(), name))
            });
        Ok(Tree { origin, outside, archive, entries, sums, bytes, lmdb, crates })
    }
}

/// Whether `directory` is NAME-VERSION.
fn is_crate(directory: &OsStr, name: &str) -> bool {
    let rest =
        directory.to_str().and_then(|directory| directory.strip_prefix(name)).and_then(|rest| rest.strip_prefix('-'));
    rest.is_some_and(|version| version.starts_with(|c: char| c.is_ascii_digit()))
}

/// Bytes in the files of a directory.
fn size_of(directory: &Path) -> u64 {
    walk(directory).map_or(0, |entries| entries.values().map(|entry| entry.length).sum())
}

/// Sources that building verbfs brought to this machine, and the bytes in them; none when cargo never unpacked any here.
fn registry_crates() -> (Vec<PathBuf>, u64) {
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cargo"))).unwrap_or_default();
    let mut best = (Vec::new(), 0);
    for registry in directories_in(&home.join("registry/src")) {
        let mut crates = directories_in(&registry);
        // Import libraries for another system are no sources.
        crates.retain(|path| path.join("Cargo.toml").is_file() && !path.to_string_lossy().contains("-pc-windows-"));
        crates.sort_by_key(|path| {
            let name = path.file_name().unwrap_or_default();
            (!CRATES_FIRST.iter().any(|first| is_crate(name, first)), name.to_os_string())
        });
        let (mut taken, mut bytes) = (Vec::new(), 0);
        for path in crates {
            if bytes < TREE_BYTES {
                bytes += size_of(&path);
                taken.push(path);
            }
        }
        if bytes > best.1 {
            best = (taken, bytes);
        }
    }
    best
}

/// Sources that packages brought to this machine.
fn system_sources() -> Vec<PathBuf> {
    let mut found = directories_in(Path::new("/usr/src"));
    found.extend(["/usr/include", "/usr/lib/python3"].map(PathBuf::from).into_iter().filter(|path| path.is_dir()));
    found
}

fn directories_in(path: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| path.is_dir()).collect()
}

/// What a directory of crates needs for cargo to build from it; cargo then checks every file of a crate that it compiles.
fn write_crate_checksums(outside: &Path, sums: &BTreeMap<PathBuf, String>) -> anyhow::Result<()> {
    let mut crates: BTreeMap<&Path, BTreeMap<String, &str>> = BTreeMap::new();
    for (name, sum) in sums {
        let mut parts = name.components();
        let Some(first) = parts.next() else { continue };
        let within = parts.as_path().to_string_lossy().into_owned();
        if !within.is_empty() {
            crates.entry(Path::new(first.as_os_str())).or_default().insert(within, sum);
        }
    }
    for (name, files) in crates.into_iter().filter(|(_, files)| files.contains_key("Cargo.toml")) {
        let text = serde_json::to_string(&serde_json::json!({ "files": files }))?;
        fs::write(outside.join(name).join(".cargo-checksum.json"), text)?;
    }
    Ok(())
}

/// SHA-256 of files below `root`.
fn checksums<'n>(
    cluster: &mut Cluster,
    root: &Path,
    names: impl Iterator<Item = &'n PathBuf>,
) -> anyhow::Result<BTreeMap<PathBuf, String>> {
    let list: Vec<u8> = names.flat_map(|name| [name.as_os_str().as_bytes(), b"\0"].concat()).collect();
    let feed: Feed = Box::new(move |pipe: &mut dyn Write| pipe.write_all(&list));
    let mut sums = BTreeMap::new();
    let mut command = Command::new("xargs");
    command.args(["-0", "-r", "sha256sum", "--binary"]).current_dir(root);
    cluster.program_with_input(&mut command, Some(feed), |line| {
        if let Some((sum, name)) = line.split_once(" *") {
            sums.insert(PathBuf::from(name), sum.to_string());
        }
    })?;
    Ok(sums)
}

// --- the steps ------------------------------------------------------------------------------------

fn tree_on(cluster: &Cluster, node: u16) -> PathBuf {
    cluster.place.mount(node).join("tree")
}

fn build_on(cluster: &Cluster, node: u16) -> PathBuf {
    cluster.place.mount(node).join("build")
}

fn unpack(cluster: &mut Cluster, tree: &Tree, step: &Step, node: u16) -> anyhow::Result<()> {
    let to = tree_on(cluster, node);
    fs::create_dir(&to).with_context(|| format!("node {node}: cannot make {}", to.display()))?;
    let mut archive = File::open(&tree.archive)?;
    step.of(archive.metadata()?.len(), true);
    let bar = step.bar.clone();
    let feed: Feed = Box::new(move |pipe: &mut dyn Write| {
        let mut piece = vec![0; 256 << 10];
        loop {
            let length = archive.read(&mut piece)?;
            if length == 0 {
                return Ok(());
            }
            pipe.write_all(&piece[..length])?;
            bar.inc(length as u64);
        }
    });
    let mut command = Command::new("tar");
    command.args(["-xpf", "-", "-C"]).arg(&to);
    cluster.program_with_input(&mut command, Some(feed), |_| {}).with_context(|| format!("node {node}: unpacking"))
}

/// Builds LMDB with its own Makefile, and a program over regex crates with cargo; all of it is read and written through the
/// mount of `node`. Says what was built.
fn compile(cluster: &mut Cluster, tree: &Tree, step: &Step, node: u16) -> anyhow::Result<Vec<String>> {
    let (sources, build) = (tree_on(cluster, node), build_on(cluster, node));
    fs::create_dir(&build).with_context(|| format!("node {node}: cannot make {}", build.display()))?;
    let mut built = Vec::new();
    let mut makefile = String::from("all: $(PARTS)\n");
    let mut parts = Vec::new();
    if let Some(lmdb) = &tree.lmdb {
        cluster.program(Command::new("cp").arg("-a").arg(sources.join(lmdb)).arg(build.join("liblmdb")), |_| {})?;
        makefile += "lmdb:\n\t+$(MAKE) -C liblmdb all\n";
        parts.push("lmdb");
        built.push("LMDB (C, 2 libraries, 10 programs)".to_string());
    }
    if tree.crates {
        let program = build.join("lines");
        fs::create_dir_all(program.join("src"))?;
        fs::create_dir_all(program.join(".cargo"))?;
        fs::write(program.join("Cargo.toml"), LINES_MANIFEST)?;
        fs::write(program.join("src/main.rs"), LINES_PROGRAM)?;
        let crates = serde_json::to_string(&sources)?;
        let source = format!("[source.crates-io]\nreplace-with = \"tree\"\n[source.tree]\ndirectory = {crates}\n");
        fs::write(program.join(".cargo/config.toml"), source)?;
        let cargo = find_program("cargo").context("cargo went away")?;
        makefile += &format!("lines:\n\t+cd lines && '{}' build --offline\n", cargo.display());
        parts.push("lines");
        built.push("regex (Rust, 4 crates and a program)".into());
    }
    makefile += ".PHONY: all lmdb lines\n";
    fs::write(build.join("Makefile"), makefile)?;
    let home = cluster.place.scratch().join("cargo");
    fs::create_dir_all(&home)?;
    let mut command = Command::new("make");
    command.args(["-j2", "all"]).arg(format!("PARTS={}", parts.join(" "))).current_dir(&build);
    // Its own home: the cargo of somebody else holds no lock there, and settles nothing.
    command.env("CARGO_HOME", home).env("CARGO_INCREMENTAL", "0").env("CARGO_TERM_COLOR", "never");
    let bar = step.bar.clone();
    cluster
        .program(&mut command, |line| bar.set_message(line.to_string()))
        .with_context(|| format!("node {node}: compiling"))?;
    Ok(built)
}

const LINES_MANIFEST: &str = "[package]\nname = \"lines\"\nversion = \"0.1.0\"\nedition = \"2021\"\n\
    [dependencies]\nregex-automata = \"*\"\n[workspace]\n";

/// Counts lines that define functions.
const LINES_PROGRAM: &str = r#"use regex_automata::meta::Regex;
use std::path::Path;

fn count(path: &Path, regex: &Regex) -> std::io::Result<u64> {
    let mut sum = 0;
    for entry in std::fs::read_dir(path)? {
        let path = entry?.path();
        if path.is_dir() && !path.is_symlink() {
            sum += count(&path, regex)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            sum += regex.find_iter(&std::fs::read(&path)?).count() as u64;
        }
    }
    Ok(sum)
}

fn main() -> std::io::Result<()> {
    let regex = Regex::new(r"(?m)^\s*(pub(\([a-z]+\))? )?(const )?(unsafe )?fn [A-Za-z0-9_]+").expect("a correct expression");
    let path = std::env::args().nth(1).expect("a directory");
    println!("{}", count(Path::new(&path), &regex)?);
    Ok(())
}
"#;

/// Runs what `compiler` built from its own mount and from that of `node`: a database of the tree's checksums is written on
/// the one and read on the other; functions in the tree are counted on `node` and outside.
fn run_built(cluster: &mut Cluster, tree: &Tree, compiler: u16, node: u16) -> anyhow::Result<Vec<String>> {
    let (theirs, ours) = (build_on(cluster, compiler), build_on(cluster, node));
    let scratch = cluster.place.scratch();
    let mut ran = Vec::new();
    if tree.lmdb.is_some() {
        let input = scratch.join("sums.txt");
        let mut text = String::from("VERSION=3\nformat=print\ntype=btree\nmapsize=268435456\nHEADER=END\n");
        // Names longer than a key of LMDB stay out.
        let sums: BTreeMap<Vec<u8>, &str> = tree
            .sums
            .iter()
            .map(|(name, sum)| (name.as_os_str().as_bytes().to_vec(), sum.as_str()))
            .filter(|(name, _)| name.len() < 500)
            .collect();
        for (name, sum) in &sums {
            text += &format!(" {}\n {sum}\n", escape(name));
        }
        text += "DATA=END\n";
        fs::write(&input, text)?;
        // Not on a mount: LMDB maps it shared, for which older kernels have no way over FUSE.
        let database = scratch.join("sums.mdb");
        let mut load = Command::new(theirs.join("liblmdb/mdb_load"));
        cluster
            .program(load.args(["-n", "-f"]).arg(&input).arg(&database), |_| {})
            .with_context(|| format!("node {compiler}"))?;
        let mut dump = Command::new(ours.join("liblmdb/mdb_dump"));
        let lines = cluster.lines_of(dump.args(["-p", "-n"]).arg(&database)).with_context(|| format!("node {node}"))?;
        let data: Vec<&str> = lines.iter().filter_map(|line| line.strip_prefix(' ')).collect();
        let back: BTreeMap<Vec<u8>, &str> = data.chunks_exact(2).map(|pair| (unescape(pair[0]), pair[1])).collect();
        ensure!(
            back == sums,
            "mdb_dump of node {node} read {} entries from a database into which mdb_load of node {compiler} wrote {}, and they differ",
            back.len(),
            sums.len()
        );
        ran.push(format!(
            "ran mdb_dump from here on a database of {} entries by node {compiler}'s mdb_load",
            sums.len()
        ));
    }
    if tree.crates {
        let mut counts = Vec::new();
        for (program, directory) in [(&ours, tree_on(cluster, node)), (&theirs, tree.outside.clone())] {
            let mut command = Command::new(program.join("lines/target/debug/lines"));
            counts.push(cluster.lines_of(command.arg(&directory)).with_context(|| format!("node {node}"))?);
        }
        ensure!(
            counts[0] == counts[1],
            "node {node} counts {:?} functions in the tree, outside of it there are {:?}",
            counts[0],
            counts[1]
        );
        ran.push(format!("counted {} functions", counts[0].join(" ")));
    }
    Ok(ran)
}

/// As mdb_load reads keys.
fn escape(bytes: &[u8]) -> String {
    bytes
        .iter()
        .map(|&byte| {
            if byte.is_ascii_graphic() && byte != b'\\' { (byte as char).to_string() } else { format!("\\{byte:02x}") }
        })
        .collect()
}

/// As mdb_dump writes them.
fn unescape(text: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        let code = after.get(..2).and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok());
        let byte;
        (byte, rest) = match (first, code) {
            (b'\\', Some(code)) => (code, &after[2..]),
            (b'\\', None) if after.first() == Some(&b'\\') => (b'\\', &after[1..]),
            _ => (first, after),
        };
        bytes.push(byte);
    }
    bytes
}

fn checksum(cluster: &mut Cluster, tree: &Tree, step: &Step, node: u16) -> anyhow::Result<()> {
    let root = tree_on(cluster, node);
    step.of(tree.files() as u64, false);
    // Names first: what is missing, what is too much, what looks otherwise.
    let (sender, walked) = mpsc::channel();
    {
        let root = root.clone();
        std::thread::spawn(move || sender.send(walk(&root)));
    }
    let found = wait(cluster, &walked, Instant::now() + STEP_LIMIT, || format!("node {node}: listing the tree"))?
        .with_context(|| format!("node {node}"))?;
    let mut wrong = Vec::new();
    for (name, entry) in &tree.entries {
        match found.get(name) {
            None => wrong.push(format!("{} is missing", name.display())),
            Some(other) if other != entry => wrong.push(format!("{}: {other:?} instead of {entry:?}", name.display())),
            Some(_) => {}
        }
    }
    wrong.extend(
        found
            .keys()
            .filter(|name| !tree.entries.contains_key(*name))
            .map(|name| format!("{} is too much", name.display())),
    );

    let list: String = tree.sums.iter().map(|(name, sum)| format!("{sum} *{}\n", name.display())).collect();
    let file = cluster.place.scratch().join("sums");
    fs::write(&file, list)?;
    let bar = step.bar.clone();
    let mut checked = 0;
    let mut command = Command::new("sha256sum");
    command.arg("--check").arg(&file).current_dir(&root).env("LC_ALL", "C");
    let outcome = cluster.program(&mut command, |line| match line.strip_suffix(": OK") {
        Some(_) => {
            checked += 1;
            bar.inc(1);
        }
        None if !line.starts_with("sha256sum: WARNING") => wrong.push(line.to_string()),
        None => {}
    });
    if wrong.is_empty() {
        outcome.with_context(|| format!("node {node}: checksums"))?;
        ensure!(checked == tree.files(), "node {node}: {checked} of {} checksums were looked at", tree.files());
        return Ok(());
    }
    let shown = &wrong[..wrong.len().min(SHOWN_LINES)];
    bail!(
        "node {node} sees another tree than there is outside ({} differences):\n  {}",
        wrong.len(),
        shown.join("\n  ")
    )
}

/// Waits for what another thread finds out.
fn wait<T>(
    cluster: &mut Cluster,
    from: &mpsc::Receiver<T>,
    deadline: Instant,
    what: impl Fn() -> String,
) -> anyhow::Result<T> {
    loop {
        cluster.check()?;
        match from.recv_timeout(POLL) {
            Ok(found) => return Ok(found),
            Err(mpsc::RecvTimeoutError::Disconnected) => bail!("{}: the thread ended", what()),
            Err(mpsc::RecvTimeoutError::Timeout) => {
                ensure!(Instant::now() < deadline, "{}: hangs, after {} s", what(), STEP_LIMIT.as_secs());
            }
        }
    }
}

/// The bytes that belong at `offset` after `round`.
fn pattern(offset: u64, length: usize, round: u64) -> Vec<u8> {
    let word = |index: u64| {
        // SplitMix64: no two places look alike.
        let mut z = (index ^ round << 56).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ z >> 31).to_le_bytes()
    };
    let words = (offset / 8..(offset + length as u64).div_ceil(8)).flat_map(word);
    words.skip((offset % 8) as usize).take(length).collect()
}

/// What a writer or reader of the shared file has to say.
enum News {
    Record,
    Done(u16, io::Result<()>),
}

/// All nodes write their records of one file at the same time, then each reads the file. Returns the bytes written.
fn share(cluster: &mut Cluster, step: &Step) -> anyhow::Result<u64> {
    let nodes = u64::from(cluster.nodes);
    let records = RECORDS * nodes;
    let end = FIRST_RECORD + records * RECORD as u64;
    step.of(records * RECORD as u64 * ROUNDS * (1 + nodes), true);
    let paths: Vec<PathBuf> = (0..cluster.nodes).map(|node| cluster.place.mount(node).join("shared")).collect();
    for round in 1..=ROUNDS {
        let deadline = Instant::now() + STEP_LIMIT;
        let together = Arc::new(Barrier::new(usize::from(cluster.nodes)));
        let (sender, news) = mpsc::channel();
        for (node, path) in (0..cluster.nodes).zip(&paths) {
            let (path, together, sender) = (path.clone(), together.clone(), sender.clone());
            std::thread::spawn(move || {
                // Those that are already on their way must not wait for one that could not open.
                let file = File::options().create(true).truncate(false).write(true).open(path);
                together.wait();
                let write = |file: File| {
                    for record in (u64::from(node)..records).step_by(nodes as usize) {
                        let offset = FIRST_RECORD + record * RECORD as u64;
                        file.write_all_at(&pattern(offset, RECORD, round), offset)?;
                        let _ = sender.send(News::Record);
                    }
                    Ok(())
                };
                let outcome = file.and_then(write);
                let _ = sender.send(News::Done(node, outcome));
            });
        }
        drop(sender);
        let mut done = 0;
        while done < cluster.nodes {
            match wait(cluster, &news, deadline, || format!("round {round}: writing the shared file"))? {
                News::Record => step.bar.inc(RECORD as u64),
                News::Done(node, outcome) => {
                    outcome.with_context(|| format!("node {node}: cannot write the shared file"))?;
                    done += 1;
                }
            }
        }
        for (node, path) in (0..cluster.nodes).zip(&paths) {
            let (sender, news) = mpsc::channel();
            let path = path.clone();
            std::thread::spawn(move || sender.send(fs::read(path)));
            let found = wait(cluster, &news, Instant::now() + STEP_LIMIT, || {
                format!("round {round}: node {node} reading the shared file")
            })?;
            let found = found.with_context(|| format!("node {node}: cannot read the shared file"))?;
            verify(&found, end, round, nodes).map_err(|what| {
                anyhow::anyhow!(
                    "round {round}: node {node} reads the shared file otherwise than it was written: {what}"
                )
            })?;
            step.bar.inc(records * RECORD as u64);
        }
    }
    Ok(records * RECORD as u64 * ROUNDS)
}

/// Compares the shared file byte by byte.
fn verify(found: &[u8], end: u64, round: u64, nodes: u64) -> Result<(), String> {
    if found.len() as u64 != end {
        return Err(format!("it has {} bytes instead of {end}", found.len()));
    }
    let hole = FIRST_RECORD as usize;
    let expected = [vec![0; hole], pattern(FIRST_RECORD, found.len() - hole, round)].concat();
    let differs = |at: &usize| found[*at] != expected[*at];
    let Some(first) = (0..found.len()).find(differs) else { return Ok(()) };
    let count = (first..found.len()).filter(differs).count();
    let last = (first..found.len()).rfind(differs).unwrap_or(first);
    let writer = match first.checked_sub(hole) {
        None => "in the hole before all records".to_string(),
        Some(within) => {
            let record = within / RECORD;
            format!("byte {} of record {record}, which node {} wrote", within % RECORD, record as u64 % nodes)
        }
    };
    let before = round > 1 && found[first] == pattern(first as u64, 1, round - 1)[0];
    let kind = if before { ", as the round before left it" } else { "" };
    Err(format!(
        "{count} bytes differ between {first} and {last}; the first is {writer}, page {}: {:#04x} instead of {:#04x}{kind}",
        first / 4096,
        found[first],
        expected[first]
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_byte_is_found_and_named() {
        let end = FIRST_RECORD + 3 * RECORD as u64;
        let mut file = [vec![0; FIRST_RECORD as usize], pattern(FIRST_RECORD, 3 * RECORD, 2)].concat();
        assert_eq!(verify(&file, end, 2, 3), Ok(()));
        let at = FIRST_RECORD as usize + RECORD + 5;
        file[at] ^= 1;
        let said = verify(&file, end, 2, 3).unwrap_err();
        assert!(said.contains("1 bytes differ") && said.contains("byte 5 of record 1, which node 1 wrote"), "{said}");
        file[3] = 1;
        assert!(verify(&file, end, 2, 3).unwrap_err().contains("in the hole"));
        file.pop();
        assert!(verify(&file, end, 2, 3).unwrap_err().contains("bytes instead of"));
    }

    #[test]
    fn patterns_fit_together_at_any_offset() {
        let whole = pattern(0, 1000, 1);
        for (offset, length) in [(0, 1), (3, 50), (8, 8), (999, 1), (17, 983)] {
            assert_eq!(pattern(offset as u64, length, 1), whole[offset..offset + length]);
        }
        assert_ne!(pattern(0, 1000, 2), whole);
    }

    #[test]
    fn keys_come_back_from_their_written_form() {
        let name = b"a b\\c\xff\n-\\41";
        assert_eq!(unescape(&escape(name)), name);
        assert_eq!(unescape(r"a\\b"), br"a\b");
    }

    #[test]
    fn crates_are_told_apart() {
        assert!(is_crate(OsStr::new("regex-automata-0.4.19"), "regex-automata"));
        assert!(!is_crate(OsStr::new("memchr-extra-1.0.0"), "memchr"));
        assert!(!is_crate(OsStr::new("memchr"), "memchr"));
    }

    #[test]
    fn families_are_summed_and_namesakes_left_out() {
        let metrics = crate::metrics::Metrics::new();
        metrics.lock_grants[crate::metrics::LockClass::Data].add(2);
        metrics.lock_grants[crate::metrics::LockClass::Attr].add(3);
        metrics.lock_grants_live.set(7);
        let snapshot = metrics.snapshot(Duration::ZERO);
        assert_eq!(count(&snapshot, "verbfs_lock_grants_total"), 5);
        assert_eq!(count(&snapshot, "verbfs_lock_grants"), 0, "the name of another begins like this");
    }
}
