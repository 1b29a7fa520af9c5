//! `verbfs-coherence`: concurrent clients on several mounts, judged by a linearizability checker.
//!
//! ```text
//! verbfs-coherence --mount A --mount B --mount C [--families data,names,mmap,locks] [--seed N] [--operations N]
//! verbfs-coherence --check FILE          judge a saved history again
//! verbfs-coherence --mount A --part 0 --parts 3 --meeting DIRECTORY --seed N ...   on each of three machines
//! verbfs-coherence --check HISTORY.0 --check HISTORY.1 --check HISTORY.2           judge what they saved as one history
//! ```
//!
//! # What is checked
//! Client processes, `--clients-per-mount` on each mount, make random calls on few objects and note when each call
//! began and ended (CLOCK_MONOTONIC, one host). A history is accepted if and only if every call can be given an instant
//! between its start and end such that the results are those of one call after the other:
//! - `data`: `pread`, `pwrite`, appends, `ftruncate`, hole punching, sizes, on three files: one used in its first pages, one around
//!   the 1 MiB boundary, one that grows by appends and is cut. Every write carries a value of its own, in every word.
//! - `names`: create, open, stat, mkdir, rmdir, symlink, readlink, unlink, link, rename (plain, NOREPLACE, EXCHANGE), readdir, on
//!   eight names in two directories. What the kernel's look-ups allow beyond one instant is in `model/names.rs`.
//! - `mmap`: loads and stores of 8-byte words through MAP_SHARED, mixed with `pread` and `pwrite` of the same words.
//! - `locks`: F_SETLK, F_SETLKW, F_GETLK on ranges and `flock`: no conflicting holders, no unjustified refusal.
//!
//! Each family ends with a look through every mount.
//!
//! # Several machines
//! Each machine runs the program as one part, with its own mounts and otherwise the same arguments. They meet in an empty
//! directory that all of them see, where each leaves `FAMILY-SEED-calls.history.PART`. `VERBFS_CLOCK` must name a time base that
//! they share; parts on several machines without one refuse to start, and so do parts whose times turn out not to compare.
//!
//! # How to read a failure
//! The output names the call that no order explains (marked `>>`), what was certain before, and the calls that matter.
//! `w3.17` is write number 17 of client 2 (numbers start at 1; `zeros` are bytes nobody wrote, `GARBAGE` is a torn or
//! misplaced word). Times are microseconds relative to the start of the marked call. Timing differs from run to run, so
//! the replay command given repeats the same *choices*; the saved history (`--history`, or the file named on failure)
//! gives the same verdict every time with `--check`.
//!
//! Exit status: 0 accepted, 1 rejected (or undecided), 2 standstill (a call took longer than `--stall-seconds`),
//! 3 the tool could not do its work.
//!
//! Local file systems are mostly *not* linearizable beyond a word (ext4 and tmpfs read while they write); use `--max-io 8` to
//! try the tool there, or XFS with `--without-stat`: its buffered reads and writes exclude each other.

use anyhow::{Context, Result};
use clap::Parser;
use std::path::PathBuf;
use std::process::ExitCode;
use verbfs_harness::coherence::driver::{Plan, Recorded, run};
use verbfs_harness::coherence::verdict::{Report, inject_stale_read, verdict};
use verbfs_harness::coherence::{CLIENT_ARGUMENT, Family, client};
use verbfs_harness::history;
use verbfs_harness::meeting::Meeting;
use verbfs_harness::mounts::Mounts;
use verbfs_harness::rng::{Rng, seed_or_clock};

/// Check that calls of concurrent clients on several mounts are linearizable.
#[derive(Parser, Debug)]
#[command(version, about)]
struct Arguments {
    /// A directory of the file system under test; give one for each mount.
    #[arg(long = "mount", required_unless_present = "check")]
    mounts: Vec<PathBuf>,
    /// Client processes on each mount.
    #[arg(long, default_value_t = 2)]
    clients_per_mount: u32,
    /// The choices of all clients follow from it.
    #[arg(long)]
    seed: Option<u64>,
    /// Calls for each family, all clients together.
    #[arg(long, default_value_t = 6000)]
    operations: u64,
    /// What to try.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Family::Data, Family::Names, Family::Mmap, Family::Locks])]
    families: Vec<Family>,
    /// The longest read or write of the data family, which is taken to be atomic.
    #[arg(long, default_value_t = 1 << 20)]
    max_io: u64,
    /// Do not ask for sizes in the data family: even XFS shows sizes from the middle of a write.
    #[arg(long)]
    without_stat: bool,
    /// A call that takes longer ends the run with exit status 2.
    #[arg(long, default_value_t = 30)]
    stall_seconds: u64,
    /// Pretend that calls take up to so many microseconds longer before and after: more overlap, harder to check, less found.
    #[arg(long, default_value_t = 0)]
    dilate: u64,
    /// Save the histories (with the family's name appended).
    #[arg(long)]
    history: Option<PathBuf>,
    /// Judge a saved history instead of making one; given several times, the files are parts of one history.
    #[arg(long)]
    check: Vec<PathBuf>,
    /// The number of this part, from 0, when the clients are on several machines.
    #[arg(long, requires_all = ["parts", "meeting", "seed"], conflicts_with_all = ["check", "inject_stale_read"])]
    part: Option<u32>,
    /// How many parts there are.
    #[arg(long, requires = "part", value_parser = clap::value_parser!(u32).range(1..))]
    parts: Option<u32>,
    /// A directory, empty at first, that all parts see.
    #[arg(long, requires = "part")]
    meeting: Option<PathBuf>,
    /// Make one recorded read stale: the run must then fail. Tests the test.
    #[arg(long)]
    inject_stale_read: bool,
}

fn print_report(name: &str, report: &Report) -> bool {
    println!(
        "{} {name}: {} calls, {} overlapped an earlier one, {} one of another mount, at most {} explanations at once",
        if report.failures.is_empty() { "ok" } else { "FAIL" },
        report.calls,
        report.overlapping,
        report.across_mounts,
        report.configurations
    );
    for failure in &report.failures {
        println!("{failure}");
    }
    report.failures.is_empty()
}

fn work(arguments: &Arguments) -> Result<ExitCode> {
    if let Some(first) = arguments.check.first() {
        let parts: Vec<_> = arguments.check.iter().map(|path| history::load(path)).collect::<Result<_>>()?;
        let mut calls = parts.concat();
        calls.sort_by_key(|c| c.start);
        if arguments.inject_stale_read {
            let seed = seed_or_clock(arguments.seed);
            println!("{}", inject_stale_read(&mut calls, &mut Rng::new(seed)).context("no read can be made stale")?);
        }
        let clients = calls.iter().map(|c| c.client as usize + 1).max().unwrap_or(1);
        let good = print_report(&first.display().to_string(), &verdict(&calls, clients));
        return Ok(if good { ExitCode::SUCCESS } else { ExitCode::from(1) });
    }
    let mounts = Mounts::new(&arguments.mounts)?;
    let seed = seed_or_clock(arguments.seed);
    let meeting = match (arguments.part, arguments.parts, &arguments.meeting) {
        (Some(part), Some(parts), Some(directory)) => Meeting::join(part, parts, directory)?,
        _ => Meeting::alone(),
    };
    let replay = |family: Family| {
        let mounts: Vec<String> = arguments.mounts.iter().map(|m| format!("--mount {}", m.display())).collect();
        format!(
            "verbfs-coherence {} --clients-per-mount {} --seed {seed} --operations {} --max-io {}{} --families {}",
            mounts.join(" "),
            arguments.clients_per_mount,
            arguments.operations,
            arguments.max_io,
            if arguments.without_stat { " --without-stat" } else { "" },
            family.name()
        )
    };
    println!("seed {seed}");
    let mut good = true;
    for &family in &arguments.families {
        let plan = Plan {
            family,
            seed,
            clients_per_mount: arguments.clients_per_mount,
            mounts: arguments.mounts.len() as u32 * meeting.parts,
            meeting: meeting.clone(),
            operations: arguments.operations,
            max_io: arguments.max_io,
            stat: !arguments.without_stat,
            dilate: arguments.dilate,
            stall_seconds: arguments.stall_seconds,
        };
        let begun = std::time::Instant::now();
        let mut injected = false;
        let (recorded, report) = run(&plan, &mounts, |calls| {
            if arguments.inject_stale_read
                && let Some(line) = inject_stale_read(calls, &mut Rng::new(seed))
            {
                println!("{}: {line}", family.name());
                injected = true;
            }
            Ok(())
        })?;
        match &recorded {
            Recorded::Unsupported(why) => println!("skipped {}: {why}", family.name()),
            Recorded::Standstill { dump, calls } => {
                println!("STANDSTILL {}: after {} calls\n{dump}replay: {}", family.name(), calls.len(), replay(family));
                let path = arguments.history.clone().unwrap_or_else(|| std::env::temp_dir().join("verbfs-standstill"));
                let path = path.with_extension(family.name());
                history::save(&path, calls)?;
                println!("calls that returned: {}", path.display());
                return Ok(ExitCode::from(2));
            }
            Recorded::History(calls) => {
                let Some(report) = report else {
                    let (family, seconds) = (family.name(), begun.elapsed().as_secs_f64());
                    println!("recorded {family} ({seconds:.1} s): {} calls of part {}", calls.len(), meeting.part);
                    continue;
                };
                let accepted =
                    print_report(&format!("{} ({:.1} s)", family.name(), begun.elapsed().as_secs_f64()), &report);
                good &= accepted;
                let failed = (!accepted).then(|| std::env::temp_dir().join(format!("verbfs-history-{seed}")));
                if let Some(path) = arguments.history.clone().or(failed) {
                    let path = path.with_extension(family.name());
                    history::save(&path, calls)?;
                    println!("history: {}", path.display());
                }
                if !accepted {
                    println!("replay: {}", replay(family));
                }
                if injected && accepted {
                    println!("FAIL {}: the injected stale read was accepted", family.name());
                }
            }
        }
    }
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

fn main() -> ExitCode {
    let mut raw = std::env::args();
    let result = match (raw.nth(1), raw.next()) {
        (Some(first), Some(config)) if first == CLIENT_ARGUMENT => client::main(&config).map(|()| ExitCode::SUCCESS),
        _ => work(&Arguments::parse()),
    };
    result.unwrap_or_else(|error| {
        eprintln!("verbfs-coherence: {error:#}");
        ExitCode::from(3)
    })
}
