//! The driver: files, client processes, their calls, the verdict.
//!
//! When mounts are on several machines, each has a driver, a *part*, with the clients of its own mounts. Part 0 makes the files.
//! All go together, each saves what its clients did, and one history is judged when it has been joined ([`crate::meeting`]).

use super::verdict::{Report, verdict};
use super::*;
use crate::clock::now;
use crate::history::{self, Call, Op};
use crate::meeting::Meeting;
use crate::model::data::DataOp;
use crate::model::words::{Via, WordOp};
use crate::mounts::{Mounts, WorkDirectory};
use crate::pattern;
use crate::progress::Progress;
use crate::watchdog::Watchdog;
use anyhow::{Context, Result, bail};
use rustix::fs::FallocateFlags;
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// The driver's own calls on the mounts, which make and remove many files, may take at least so many seconds.
const DRIVER_PATIENCE: u64 = 20;

/// What one run is to do.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The family of calls.
    pub family: Family,
    /// Its seed.
    pub seed: u64,
    /// Client processes on each mount.
    pub clients_per_mount: u32,
    /// Mounts in use, those of all parts; each part has as many.
    pub mounts: u32,
    /// This part's place among all.
    pub meeting: Meeting,
    /// Calls in all, of all parts.
    pub operations: u64,
    /// The longest read or write.
    pub max_io: u64,
    /// Whether the data family asks for sizes.
    pub stat: bool,
    /// Calls are pretended to take up to so many microseconds longer.
    pub dilate: u64,
    /// After so long a call counts as stuck.
    pub stall_seconds: u64,
}

impl Plan {
    /// The numbers of this part's mounts.
    fn own_mounts(&self) -> std::ops::Range<u32> {
        let each = self.mounts / self.meeting.parts;
        self.meeting.part * each..(self.meeting.part + 1) * each
    }

    /// What this run is called in a meeting.
    fn topic(&self, what: &str) -> String {
        format!("{}-{}-{what}", self.family.name(), self.seed)
    }
}

/// How recording ended.
pub enum Recorded {
    /// All clients finished.
    History(Vec<Call>),
    /// This family cannot be tried here, and why.
    Unsupported(String),
    /// Calls that do not come back: a text for people.
    Standstill { dump: String, calls: Vec<Call> },
}

/// The number that stands for the driver itself in histories: the client after the last.
fn driver_client(plan: &Plan) -> u32 {
    plan.clients_per_mount * plan.mounts
}

fn make_files(plan: &Plan, work: &WorkDirectory) -> Result<bool> {
    let root = work.on(0);
    match plan.family {
        Family::Data => {
            for file in 0..DATA_FILES {
                File::create_new(root.join(format!("f{file}")))?;
            }
            let probe = File::create_new(root.join("probe"))?;
            probe.set_len(8192)?;
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            Ok(rustix::fs::fallocate(&probe, flags, 0, 4096).is_ok())
        }
        Family::Names => {
            for directory in 0..DIRECTORIES {
                std::fs::create_dir(root.join(format!("d{directory}")))?;
            }
            Ok(false)
        }
        Family::Mmap => {
            File::create_new(root.join(MAPPED_FILE))?.set_len(MAPPED_PAGES * 4096)?;
            Ok(false)
        }
        Family::Locks => {
            File::create_new(root.join(LOCKED_FILE))?.set_len(4096)?;
            Ok(false)
        }
    }
}

/// After all clients have finished, look through every mount once more: what they see now is part of the history.
fn final_look(plan: &Plan, work: &WorkDirectory, calls: &mut Vec<Call>) -> Result<()> {
    for mount in plan.own_mounts() {
        let client = driver_client(plan);
        let root = work.on(mount as usize);
        match plan.family {
            Family::Data => {
                for file in 0..DATA_FILES {
                    let handle = File::open(root.join(format!("f{file}")))?;
                    let len = plan.max_io.min(1 << 20);
                    let mut buffer = crate::sys::PageBuffer::new(1 << 20);
                    let tail = handle.metadata()?.len().saturating_sub(len) & !7;
                    for offset in [0, 4096, (1 << 20) - 4096, tail] {
                        let start = now();
                        let n = handle.read_at(&mut buffer[..len as usize], offset)?;
                        let end = Some(now());
                        let got = pattern::decode(&buffer[..n], offset);
                        let op = Op::Data { file, op: DataOp::Read { offset, len, got } };
                        calls.push(Call { client, mount, start, end, op });
                    }
                }
            }
            Family::Mmap => {
                let handle = File::open(root.join(MAPPED_FILE))?;
                for word in MAPPED_WORDS {
                    let mut bytes = [0; 8];
                    let start = now();
                    handle.read_exact_at(&mut bytes, word * 8)?;
                    let end = Some(now());
                    let tag = pattern::decode_word(u64::from_le_bytes(bytes), word);
                    let op = Op::Word { word, op: WordOp::Load { tag, via: Via::Call } };
                    calls.push(Call { client, mount, start, end, op });
                }
            }
            Family::Names | Family::Locks => {}
        }
    }
    Ok(())
}

/// Run this part's clients of `plan` and collect what they did; the files are made.
fn record(plan: &Plan, work: &WorkDirectory, punch: bool, watchdog: &Watchdog) -> Result<Recorded> {
    let clients = plan.clients_per_mount * plan.mounts;
    let program = std::env::current_exe()?;
    let (sender, receiver) = mpsc::channel::<(u32, Option<Message>)>();
    let mut processes = Vec::new();
    for client in (0..clients).filter(|client| plan.own_mounts().contains(&(client % plan.mounts))) {
        let mount = client % plan.mounts;
        let config = ClientConfig {
            family: plan.family,
            client,
            clients,
            mount,
            directory: work.on(mount as usize).to_owned(),
            seed: plan.seed,
            operations: plan.operations.div_ceil(clients as u64),
            max_io: plan.max_io,
            stat: plan.stat,
            dilate: plan.dilate,
            punch,
            stall_seconds: plan.stall_seconds,
        };
        let mut process = Command::new(&program)
            .arg(CLIENT_ARGUMENT)
            .arg(serde_json::to_string(&config)?)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("start a client process")?;
        let output = process.stdout.take().expect("standard output is a pipe");
        let sender = sender.clone();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines() {
                let Ok(message) = line.map_err(anyhow::Error::from).and_then(|l| Ok(serde_json::from_str(&l)?)) else {
                    break;
                };
                if sender.send((client, Some(message))).is_err() {
                    return;
                }
            }
            let _ = sender.send((client, None));
        });
        processes.push(process);
    }
    drop(sender);

    let mut calls = Vec::new();
    let (mut ready, mut finished) = (0, BTreeSet::new());
    let mut nobody_to_wait_for = None;
    let mut unsupported = None;
    let mut stalls: Vec<String> = Vec::new();
    let mut first_stall: Option<Instant> = None;
    let mut lost = None;
    let mut progress = Progress::new(plan.family.name(), plan.operations / plan.meeting.parts as u64);
    while finished.len() < processes.len() {
        // After the first stuck call the others get a moment to report theirs.
        if first_stall.is_some_and(|t| t.elapsed() > Duration::from_secs(3)) {
            break;
        }
        let (client, message) = match receiver.recv_timeout(Duration::from_millis(500)) {
            Ok(received) => received,
            Err(mpsc::RecvTimeoutError::Timeout) => continue,
            Err(mpsc::RecvTimeoutError::Disconnected) => break,
        };
        match message {
            Some(Message::Ready) => {
                ready += 1;
                if ready == processes.len() {
                    if let Err(error) = plan.meeting.meet(&plan.topic("ready"), "") {
                        nobody_to_wait_for = Some(error);
                        break;
                    }
                    for process in &mut processes {
                        let _ = process.stdin.as_mut().expect("standard input is a pipe").write_all(b"go\n");
                    }
                }
            }
            Some(Message::Call(call)) => {
                calls.push(call);
                progress.set(calls.len() as u64);
            }
            Some(Message::Stalled { client, mount, call, seconds, kernel }) => {
                let text = format!(
                    "client {client} on mount {mount} is in {call} for {seconds} s\n{}",
                    kernel.lines().map(|l| format!("      {l}\n")).collect::<String>()
                );
                if !stalls.iter().any(|s| s.starts_with(&format!("client {client} "))) {
                    stalls.push(text);
                }
                first_stall.get_or_insert_with(Instant::now);
            }
            Some(Message::Unsupported(why)) => {
                unsupported = Some(why);
                break;
            }
            Some(Message::Finished) => {
                finished.insert(client);
            }
            None if !finished.contains(&client) => {
                lost = Some(client);
                break;
            }
            None => {}
        }
    }
    drop(progress);
    let stopped = unsupported.is_some() || lost.is_some() || !stalls.is_empty() || nobody_to_wait_for.is_some();
    for process in &mut processes {
        if stopped {
            let _ = process.kill();
        }
        // A process stuck in the kernel cannot be collected; it is left behind.
        let begun = Instant::now();
        while matches!(process.try_wait(), Ok(None)) && begun.elapsed() < Duration::from_secs(2) {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    if let Some(why) = unsupported {
        return Ok(Recorded::Unsupported(why));
    }
    if !stalls.is_empty() {
        return Ok(Recorded::Standstill { dump: stalls.join(""), calls });
    }
    if let Some(client) = lost {
        bail!("client process {client} ended early; its message is above");
    }
    if let Some(error) = nobody_to_wait_for {
        return Err(error);
    }
    plan.meeting.meet(&plan.topic("finished"), "")?;
    watchdog.during("the look through every mount at the end", || final_look(plan, work, &mut calls))?;
    calls.sort_by_key(|c| c.start);
    Ok(Recorded::History(calls))
}

/// The working directory with its files, and whether holes can be punched there. Part 0 makes it, and removes it at the end.
fn prepare(plan: &Plan, mounts: &Mounts, watchdog: &Watchdog) -> Result<(WorkDirectory, bool)> {
    let topic = plan.topic("made");
    if plan.meeting.part != 0 {
        let made: Made = serde_json::from_str(&plan.meeting.meet(&topic, "")?[0])?;
        let found = || mounts.work_directory_of_another(&made.name, made.inode);
        return Ok((watchdog.during("finding the working directory", found)?, made.punch));
    }
    let name = format!("coherence-{}-{}-{}", plan.family.name(), plan.seed, std::process::id());
    let work = watchdog.during("making the working directory", || mounts.work_directory(&name))?;
    let punch = watchdog.during("making the files", || make_files(plan, &work))?;
    let inode = std::fs::metadata(work.on(0))?.ino();
    plan.meeting.meet(&topic, &serde_json::to_string(&Made { name, inode, punch })?)?;
    Ok((work, punch))
}

/// What part 0 tells of the working directory.
#[derive(Serialize, Deserialize)]
struct Made {
    name: String,
    inode: u64,
    punch: bool,
}

/// Record one family in a directory of its own, and judge the history. `change` may alter it in between (injections).
///
/// A part of several saves its history for whoever joins them, and judges nothing.
pub fn run(
    plan: &Plan,
    mounts: &Mounts,
    change: impl FnOnce(&mut Vec<Call>) -> Result<()>,
) -> Result<(Recorded, Option<Report>)> {
    let meeting = plan.meeting.clone();
    let watchdog = Watchdog::start(plan.stall_seconds.max(DRIVER_PATIENCE), move |stall| {
        meeting.fail(&format!("{} takes longer than {} s", stall.call, stall.seconds));
        stall.end_the_program();
    });
    let result = record_and_judge(plan, mounts, change, &watchdog);
    match &result {
        Err(error) => plan.meeting.fail(&format!("{error:#}")),
        Ok((Recorded::Unsupported(why), _)) => plan.meeting.fail(why),
        Ok((Recorded::Standstill { .. }, _)) => plan.meeting.fail("a call does not come back"),
        Ok((Recorded::History(_), _)) => {}
    }
    result
}

fn record_and_judge(
    plan: &Plan,
    mounts: &Mounts,
    change: impl FnOnce(&mut Vec<Call>) -> Result<()>,
    watchdog: &Watchdog,
) -> Result<(Recorded, Option<Report>)> {
    let (work, punch) = prepare(plan, mounts, watchdog)?;
    let mut recorded = record(plan, &work, punch, watchdog)?;
    let report = match &mut recorded {
        Recorded::History(calls) => {
            if let Some(path) = plan.meeting.history(&plan.topic("calls")) {
                history::save(&path, calls)?;
            }
            plan.meeting.meet(&plan.topic("looked"), "")?;
            watchdog.during("removing the working directory", || drop(work));
            if plan.meeting.parts > 1 {
                return Ok((recorded, None));
            }
            change(calls)?;
            Some(verdict(calls, driver_client(plan) as usize + 1))
        }
        Recorded::Standstill { .. } => {
            // Removing it may hang as well.
            let mut work = work;
            work.keep();
            None
        }
        Recorded::Unsupported(_) => None,
    };
    Ok((recorded, report))
}
