//! The driver: files, client processes, their calls, the verdict.

use super::verdict::{Report, verdict};
use super::*;
use crate::clock::now;
use crate::history::{Call, Op};
use crate::model::data::DataOp;
use crate::model::words::{Via, WordOp};
use crate::mounts::{Mounts, WorkDirectory};
use crate::pattern;
use crate::progress::Progress;
use crate::watchdog::Watchdog;
use anyhow::{Context, Result, bail};
use rustix::fs::FallocateFlags;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
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
    /// Mounts in use.
    pub mounts: u32,
    /// Calls in all.
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
    for mount in 0..plan.mounts {
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

/// Run the clients of `plan` and collect what they did.
pub fn record(plan: &Plan, work: &WorkDirectory, watchdog: &Watchdog) -> Result<Recorded> {
    let punch = watchdog.during("making the files", || make_files(plan, work))?;
    let clients = plan.clients_per_mount * plan.mounts;
    let program = std::env::current_exe()?;
    let (sender, receiver) = mpsc::channel::<(usize, Option<Message>)>();
    let mut processes = Vec::new();
    for client in 0..clients {
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
                if sender.send((client as usize, Some(message))).is_err() {
                    return;
                }
            }
            let _ = sender.send((client as usize, None));
        });
        processes.push(process);
    }
    drop(sender);

    let mut calls = Vec::new();
    let (mut ready, mut finished) = (0, vec![false; clients as usize]);
    let mut unsupported = None;
    let mut stalls: Vec<String> = Vec::new();
    let mut first_stall: Option<Instant> = None;
    let mut lost = None;
    let mut progress = Progress::new(plan.family.name(), plan.operations);
    while !finished.iter().all(|f| *f) {
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
                if ready == clients {
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
            Some(Message::Finished) => finished[client] = true,
            None if !finished[client] => {
                lost = Some(client);
                break;
            }
            None => {}
        }
    }
    drop(progress);
    let stopped = unsupported.is_some() || lost.is_some() || !stalls.is_empty();
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
    watchdog.during("the look through every mount at the end", || final_look(plan, work, &mut calls))?;
    calls.sort_by_key(|c| c.start);
    Ok(Recorded::History(calls))
}

/// Record one family in a directory of its own, and judge the history. `change` may alter it in between (injections).
pub fn run(
    plan: &Plan,
    mounts: &Mounts,
    change: impl FnOnce(&mut Vec<Call>) -> Result<()>,
) -> Result<(Recorded, Option<Report>)> {
    let name = format!("coherence-{}-{}-{}", plan.family.name(), plan.seed, std::process::id());
    let watchdog = Watchdog::ending_the_program(plan.stall_seconds.max(DRIVER_PATIENCE));
    let work = watchdog.during("making the working directory", || mounts.work_directory(&name))?;
    let mut recorded = record(plan, &work, &watchdog)?;
    let report = match &mut recorded {
        Recorded::History(calls) => {
            watchdog.during("removing the working directory", || drop(work));
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
