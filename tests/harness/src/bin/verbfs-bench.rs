//! `verbfs-bench`: the load generator of `make bench`, and what turns its figures into the table of docs/BENCHMARKS.md.
//!
//! ```text
//! verbfs-bench null MOUNTPOINT...       a file system that does nothing at each, until SIGTERM
//! verbfs-bench rows ...                 the rows of the table but the last, appended to --out as JSON lines
//! verbfs-bench memory ...               the last row: a daemon with as many files as can be made in the given time
//! verbfs-bench report FILE              the JSON lines as Markdown
//! ```
//!
//! # How it measures
//! Both sides of a row stand ready before the first sample. A round takes one sample of each, in turns forwards and
//! backwards, so that what else this host does meets both. A side's figure is the median of its samples; the ratio
//! is the median of the rounds' ratios, not the quotient of the medians. Work is done by processes of their own, which
//! open their files, say that they are ready, and begin together; a rate is what all did between the first one's start and
//! the last one's end.
//!
//! Exit status: 0 measured, whatever came out; 3 the tool could not do its work.

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, Parser, Subcommand};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use verbfs_fsd::frontend::NoObserver;
use verbfs_fsd::frontend::mount::MountOptions;
use verbfs_fsd::frontend::null::mount_null;
use verbfs_fsd::topology::Topology;
use verbfs_harness::clock::now;
use verbfs_harness::rng::Rng;
use verbfs_harness::sys::PageBuffer;

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;
/// A file that a cache of 256 MiB holds, and that is less than what may be dirty before write-back begins (64 MiB).
const CACHED: u64 = 48 * MIB;
/// What each of the three processes writes to a fresh file.
const SHARE: u64 = 32 * MIB;
/// A record that is aligned to nothing: that of a well-known benchmark of shared files.
const RECORD: u64 = 47_008;
/// A sample that goes by time.
const SAMPLE: Duration = Duration::from_millis(400);
/// A sample that goes by amount is cut short here.
const SAMPLE_MAX: Duration = Duration::from_secs(4);
/// One look at a file per so long, beside its writer.
const LOOK: Duration = Duration::from_millis(10);
const IDLE: Duration = Duration::from_secs(10);

#[derive(Parser)]
#[command(name = "verbfs-bench", about = "Load generator of `make bench`")]
struct Arguments {
    #[command(subcommand)]
    command: Mode,
}

#[derive(Subcommand)]
enum Mode {
    /// Mount file systems that do nothing
    Null { directories: Vec<PathBuf> },
    /// Measure all rows but that on memory
    Rows(RowsArguments),
    /// Measure the memory of daemons
    Memory(MemoryArguments),
    /// Print Markdown
    Report { file: PathBuf },
    /// One process of a measurement
    #[command(hide = true)]
    Worker { job: String },
}

#[derive(Args)]
struct RowsArguments {
    /// The mounts of a cluster of three
    #[arg(long = "three", required = true)]
    three: Vec<PathBuf>,
    /// Their daemons
    #[arg(long = "pid", required = true)]
    pids: Vec<u32>,
    /// The mount of a volume with a single member
    #[arg(long)]
    one: PathBuf,
    /// Three mounts that do nothing
    #[arg(long = "null", required = true)]
    null: Vec<PathBuf>,
    /// The program `verbfs`
    #[arg(long)]
    verbfs: PathBuf,
    /// The configuration of the cluster of three
    #[arg(long)]
    config: PathBuf,
    /// The example `pingpong` of verbfs-rdma
    #[arg(long)]
    pingpong: PathBuf,
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Only rows whose name contains this
    #[arg(long, default_value = "")]
    only: String,
    #[arg(long)]
    out: PathBuf,
}

#[derive(Args)]
struct MemoryArguments {
    #[arg(long)]
    mount: PathBuf,
    #[arg(long = "pid", required = true)]
    pids: Vec<u32>,
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    #[arg(long)]
    out: PathBuf,
}

// ---------------------------------------------------------------------------------------------------------------- results

/// One line of the table.
#[derive(Serialize, Deserialize)]
struct Row {
    what: String,
    figure: String,
    against: String,
    ratio: String,
    /// Smallest and largest ratio of a round.
    spread: String,
    target: String,
    reached: bool,
    /// What else was counted; Markdown.
    notes: Vec<String>,
}

fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        length if length % 2 == 1 => values[length / 2],
        length => (values[length / 2 - 1] + values[length / 2]) / 2.0,
    }
}

struct Compared {
    figure: f64,
    against: f64,
    ratio: f64,
    least: f64,
    most: f64,
}

/// Pairs samples of the same round.
fn compare(figure: &[f64], against: &[f64]) -> Compared {
    let ratios: Vec<f64> = figure.iter().zip(against).map(|(a, b)| a / b).collect();
    Compared {
        figure: median(figure.iter().copied()),
        against: median(against.iter().copied()),
        ratio: median(ratios.iter().copied()),
        least: ratios.iter().copied().fold(f64::INFINITY, f64::min),
        most: ratios.iter().copied().fold(0.0, f64::max),
    }
}

enum Target {
    AtLeast(f64),
    AtMost(f64),
}

fn row(
    what: &str,
    compared: &Compared,
    show: impl Fn(f64) -> String,
    against: &str,
    target: Target,
    notes: Vec<String>,
) -> Row {
    let (target, reached) = match target {
        Target::AtLeast(bound) => (format!("at least {bound}"), compared.ratio >= bound),
        Target::AtMost(bound) => (format!("at most {bound}"), compared.ratio <= bound),
    };
    Row {
        what: what.into(),
        figure: show(compared.figure),
        against: format!("{}: {}", against, show(compared.against)),
        ratio: number(compared.ratio),
        spread: format!("{} to {}", number(compared.least), number(compared.most)),
        target,
        reached,
        notes,
    }
}

fn number(value: f64) -> String {
    if value >= 100.0 {
        format!("{value:.0}")
    } else if value >= 10.0 {
        format!("{value:.1}")
    } else {
        format!("{value:.2}")
    }
}
fn rate(bytes_per_second: f64) -> String {
    format!("{} MiB/s", number(bytes_per_second / MIB as f64))
}
fn per_second(value: f64) -> String {
    format!("{value:.0} /s")
}
fn time(nanoseconds: f64) -> String {
    if nanoseconds >= 1e6 {
        format!("{} ms", number(nanoseconds / 1e6))
    } else if nanoseconds >= 1e3 {
        format!("{} us", number(nanoseconds / 1e3))
    } else {
        format!("{nanoseconds:.0} ns")
    }
}

fn append(out: &Path, row: &Row) -> Result<()> {
    eprintln!(
        "bench: {}: {} ({}), ratio {} ({}), {}",
        row.what, row.figure, row.against, row.ratio, row.spread, row.target
    );
    for note in &row.notes {
        eprintln!("bench:     {note}");
    }
    let mut file = OpenOptions::new().append(true).create(true).open(out)?;
    Ok(writeln!(file, "{}", serde_json::to_string(row)?)?)
}

fn report(file: &Path) -> Result<()> {
    let rows: Vec<Row> = std::fs::read_to_string(file)?.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    println!("| what | figure | against | ratio | least to most | target | |");
    println!("|---|---|---|---|---|---|---|");
    for row in &rows {
        let mark = if row.reached { "reached" } else { "**missed**" };
        println!(
            "| {} | {} | {} | {} | {} | {} | {mark} |",
            row.what, row.figure, row.against, row.ratio, row.spread, row.target
        );
    }
    println!("\n### Beside the figures\n");
    for row in rows.iter().filter(|row| !row.notes.is_empty()) {
        println!("- {}: {}.", row.what, row.notes.join("; "));
    }
    Ok(())
}

// ------------------------------------------------------------------------------------------------------------------- work

/// What one process does.
#[derive(Serialize, Deserialize)]
enum Job {
    /// Whole-file passes of `unit` bytes, for SAMPLE, over the first `length` bytes: in order, or anywhere.
    Transfer { path: PathBuf, write: bool, random: bool, unit: u64, length: u64 },
    /// Records number `first`, `first + step`, ... of `unit` bytes, until `bytes` are written: once, to a fresh file.
    Strided { path: PathBuf, unit: u64, first: u64, step: u64, bytes: u64 },
    /// The page at `offset` through two mounts in turns, for SAMPLE.
    PingPong { one: PathBuf, other: PathBuf, offset: u64 },
    /// stat, with pauses, for SAMPLE.
    Look { path: PathBuf, pause: Duration },
    /// create, stat, unlink, for SAMPLE.
    Names { directory: PathBuf, prefix: String },
    /// mknod until `limit`.
    Fill { directory: PathBuf, prefix: String, limit: Duration },
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Outcome {
    operations: u64,
    bytes: u64,
    start: u64,
    end: u64,
}

fn open(path: &Path) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .with_context(|| format!("cannot open {}", path.display()))
}

/// Runs `step` until `limit` or until it says that it is done. It returns the bytes it moved.
fn repeat(limit: Duration, mut step: impl FnMut(u64) -> Result<Option<u64>>) -> Result<Outcome> {
    let start = now();
    let last = start + limit.as_nanos() as u64;
    let mut outcome = Outcome { operations: 0, bytes: 0, start, end: start };
    while outcome.end < last {
        let Some(bytes) = step(outcome.operations)? else { break };
        outcome.operations += 1;
        outcome.bytes += bytes;
        outcome.end = now();
    }
    Ok(outcome)
}

/// Opens what is needed, waits for the word on standard input, works.
fn work(job: Job) -> Result<Outcome> {
    let go = || -> Result<()> {
        println!("ready");
        let mut line = String::new();
        ensure!(std::io::stdin().read_line(&mut line)? > 0, "nobody gave the word");
        Ok(())
    };
    match job {
        Job::Transfer { path, write, random, unit, length } => {
            let file = open(&path)?;
            let mut buffer = PageBuffer::new(unit as usize);
            buffer.fill(7);
            let mut rng = Rng::new(1);
            let units = length / unit;
            go()?;
            repeat(SAMPLE, |number| {
                let offset = if random { rng.below(units) } else { number % units } * unit;
                if write {
                    file.write_all_at(&buffer, offset)?
                } else {
                    file.read_exact_at(&mut buffer, offset)?
                }
                Ok(Some(unit))
            })
        }
        Job::Strided { path, unit, first, step, bytes } => {
            let file = open(&path)?;
            let mut buffer = PageBuffer::new(unit as usize);
            buffer.fill(first as u8 + 1);
            go()?;
            repeat(SAMPLE_MAX, |number| {
                if number * unit >= bytes {
                    return Ok(None);
                }
                file.write_all_at(&buffer, (first + number * step) * unit)?;
                Ok(Some(unit))
            })
        }
        Job::PingPong { one, other, offset } => {
            let files = [open(&one)?, open(&other)?];
            let mut buffer = PageBuffer::new(PAGE as usize);
            go()?;
            repeat(SAMPLE, |number| {
                buffer[0] = number as u8;
                files[number as usize % 2].write_all_at(&buffer, offset)?;
                Ok(Some(PAGE))
            })
        }
        Job::Look { path, pause } => {
            go()?;
            repeat(SAMPLE, |_| {
                std::fs::metadata(&path)?;
                if !pause.is_zero() {
                    std::thread::sleep(pause);
                }
                Ok(Some(0))
            })
        }
        Job::Names { directory, prefix } => {
            go()?;
            repeat(SAMPLE, |number| {
                let path = directory.join(format!("{prefix}{number}"));
                drop(OpenOptions::new().write(true).create_new(true).open(&path)?);
                std::fs::metadata(&path)?;
                std::fs::remove_file(&path)?;
                Ok(Some(0))
            })
        }
        Job::Fill { directory, prefix, limit } => {
            let directory = File::open(&directory)?;
            go()?;
            repeat(limit, |number| {
                use rustix::fs::{FileType, Mode, mknodat};
                mknodat(&directory, format!("{prefix}{number}"), FileType::RegularFile, Mode::from_raw_mode(0o644), 0)?;
                Ok(Some(0))
            })
        }
    }
}

/// Runs jobs side by side, each in a process.
fn run(jobs: &[Job]) -> Result<Vec<Outcome>> {
    let mut workers = Vec::new();
    for job in jobs {
        let mut child = Command::new(std::env::current_exe()?)
            .args(["worker", &serde_json::to_string(job)?])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let output = BufReader::new(child.stdout.take().expect("it was piped"));
        workers.push((child, output));
    }
    let mut line = String::new();
    for (_, output) in &mut workers {
        line.clear();
        output.read_line(&mut line)?;
        ensure!(line == "ready\n", "a worker ended before it began");
    }
    for (child, _) in &mut workers {
        child.stdin.as_mut().expect("it was piped").write_all(b"go\n")?;
    }
    workers
        .into_iter()
        .map(|(mut child, mut output)| {
            let mut line = String::new();
            output.read_line(&mut line)?;
            ensure!(child.wait()?.success(), "a worker failed");
            Ok(serde_json::from_str(&line)?)
        })
        .collect()
}

/// Seconds from the first start to the last end.
fn span(outcomes: &[Outcome]) -> f64 {
    let start = outcomes.iter().map(|outcome| outcome.start).min().unwrap_or(0);
    let end = outcomes.iter().map(|outcome| outcome.end).max().unwrap_or(0);
    (end - start) as f64 / 1e9
}
fn bytes_per_second(jobs: &[Job]) -> Result<f64> {
    let outcomes = run(jobs)?;
    Ok(outcomes.iter().map(|outcome| outcome.bytes).sum::<u64>() as f64 / span(&outcomes))
}
fn operations_per_second(jobs: &[Job]) -> Result<f64> {
    let outcomes = run(jobs)?;
    Ok(outcomes.iter().map(|outcome| outcome.operations).sum::<u64>() as f64 / span(&outcomes))
}

/// Samples of each side, by rounds in turns forwards and backwards. A first round is not counted: it touches fresh memory.
fn interleave(rounds: usize, sides: &mut [&mut dyn FnMut() -> Result<f64>]) -> Result<Vec<Vec<f64>>> {
    let mut samples = vec![Vec::new(); sides.len()];
    for side in sides.iter_mut() {
        side()?;
    }
    for round in 0..rounds {
        for place in 0..sides.len() {
            let side = if round % 2 == 0 { place } else { sides.len() - 1 - place };
            samples[side].push(sides[side]()?);
        }
    }
    Ok(samples)
}

// ---------------------------------------------------------------------------------------------------------------- daemons

/// The counters of all daemons of a cluster, added up, or of one.
#[derive(Clone, Default)]
struct Counters(BTreeMap<String, f64>);

impl Counters {
    fn read(verbfs: &Path, config: &Path, slots: impl IntoIterator<Item = usize>) -> Result<Counters> {
        let mut sums = BTreeMap::new();
        for slot in slots {
            let output = Command::new(verbfs)
                .args(["status", "--metrics", "--slot", &slot.to_string(), "--config"])
                .arg(config)
                .output()?;
            ensure!(output.status.success(), "no metrics of slot {slot}: {}", String::from_utf8_lossy(&output.stderr));
            for line in String::from_utf8(output.stdout)?.lines().filter(|line| !line.starts_with('#')) {
                if let Some((name, value)) = line.rsplit_once(' ') {
                    *sums.entry(name.to_string()).or_insert(0.0) += value.parse::<f64>().unwrap_or(0.0);
                }
            }
        }
        Ok(Counters(sums))
    }
    fn get(&self, name: &str) -> f64 {
        self.0.get(name).copied().unwrap_or(0.0)
    }
    /// What was counted since `before`.
    fn since(&self, before: &Counters) -> Counters {
        Counters(self.0.iter().map(|(name, value)| (name.clone(), value - before.get(name))).collect())
    }
    fn add(&mut self, other: &Counters) {
        for (name, value) in &other.0 {
            *self.0.entry(name.clone()).or_insert(0.0) += value;
        }
    }
    /// Members of a family that counted something: label value and count.
    fn members(&self, family: &str) -> Vec<(String, f64)> {
        let matching = self.0.range(format!("{family}{{")..).take_while(|(name, _)| name.starts_with(family));
        matching
            .filter(|(_, value)| **value != 0.0)
            .map(|(name, value)| (name.split('"').nth(1).unwrap_or_default().to_string(), *value))
            .collect()
    }
    /// Mean of a histogram, nanoseconds; `label` as in `{class="data"}` or empty.
    fn mean(&self, name: &str, label: &str) -> f64 {
        1e9 * self.get(&format!("{name}_sum{label}")) / self.get(&format!("{name}_count{label}"))
    }
}

/// Processor time of a process, in ticks: user and system.
fn ticks(pid: u32) -> Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name in parentheses may hold anything.
    let fields: Vec<&str> = text.rsplit_once(')').context("a strange /proc/PID/stat")?.1.split_whitespace().collect();
    Ok(fields[11].parse::<u64>()? + fields[12].parse::<u64>()?)
}

/// A line of /proc/PID/status, MiB.
fn resident(pid: u32, what: &str) -> Result<f64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(what)?.strip_prefix(':'))
        .with_context(|| format!("no {what} of {pid}"))?;
    Ok(line.trim().trim_end_matches(" kB").parse::<f64>()? / 1024.0)
}

// ------------------------------------------------------------------------------------------------------------------- rows

struct Bench {
    arguments: RowsArguments,
    /// Median of the mailbox's round trip of two sleeping processes on two cores, and of two spinning ones.
    asleep: f64,
    awake: f64,
}

impl Bench {
    fn counters(&self, slots: impl IntoIterator<Item = usize>) -> Result<Counters> {
        Counters::read(&self.arguments.verbfs, &self.arguments.config, slots)
    }
    fn put(&self, row: Row) -> Result<()> {
        append(&self.arguments.out, &row)
    }
    fn wanted(&self, name: &str) -> bool {
        name.contains(&self.arguments.only)
    }

    fn mailbox(&mut self) -> Result<()> {
        #[derive(Deserialize)]
        struct Line {
            measurement: String,
            payload_bytes: u64,
            median_ns: u64,
        }
        let mut samples: BTreeMap<String, Vec<f64>> = BTreeMap::new();
        for _ in 0..self.arguments.rounds {
            let output = Command::new(&self.arguments.pingpong).arg("20000").output().context("cannot run pingpong")?;
            ensure!(output.status.success(), "pingpong: {}", String::from_utf8_lossy(&output.stderr));
            for line in String::from_utf8(output.stdout)?.lines() {
                let line: Line = serde_json::from_str(line)?;
                samples
                    .entry(format!("{} {}", line.measurement, line.payload_bytes))
                    .or_default()
                    .push(line.median_ns as f64);
            }
        }
        let of = |name: &str| samples.get(name).cloned().with_context(|| format!("pingpong does not measure {name}"));
        let awake = compare(&of("mailbox_awake_two_cores 40")?, &of("cache_line 8")?);
        let asleep = compare(&of("mailbox_asleep_two_cores 40")?, &of("eventfd_two_cores 8")?);
        let one_core = compare(&of("mailbox_asleep_one_core 40")?, &of("eventfd_one_core 8")?);
        (self.awake, self.asleep) = (awake.figure, asleep.figure);
        let large = median(of("mailbox_awake_two_cores 1024")?);
        self.put(row(
            "mailbox round trip, both spinning, two cores",
            &awake,
            time,
            "cache line",
            Target::AtMost(5.0),
            vec![format!("40 bytes; with 1024 bytes {}", time(large))],
        ))?;
        let note = format!(
            "two cores; both on one core: {} against {}, ratio {}",
            time(one_core.figure),
            time(one_core.against),
            number(one_core.ratio)
        );
        self.put(row("mailbox round trip, both asleep", &asleep, time, "eventfd", Target::AtMost(1.5), vec![note]))
    }

    fn transfers(&self) -> Result<()> {
        let (three, one, null) = (
            self.arguments.three[0].join("cached"),
            self.arguments.one.join("cached"),
            self.arguments.null[0].join("cached"),
        );
        for path in [&three, &one, &null] {
            // Written twice: the second time finds all locks and all pages.
            for _ in 0..2 {
                bytes_per_second(&[Job::Strided { path: path.clone(), unit: MIB, first: 0, step: 1, bytes: CACHED }])?;
            }
        }
        let transfer = |path: &Path, write, unit, random| {
            [Job::Transfer { path: path.into(), write, random, unit, length: CACHED }]
        };
        for (write, name) in [(false, "read"), (true, "write")] {
            let samples = interleave(
                self.arguments.rounds,
                &mut [
                    &mut || bytes_per_second(&transfer(&three, write, MIB, false)),
                    &mut || bytes_per_second(&transfer(&one, write, MIB, false)),
                    &mut || bytes_per_second(&transfer(&null, write, MIB, false)),
                ],
            )?;
            let compared = compare(&samples[0], &samples[1]);
            let null = compare(&samples[0], &samples[2]);
            let note = format!("the do-nothing file system: {}, ratio {}", rate(null.against), number(null.ratio));
            self.put(row(
                &format!("1 MiB sequential {name}, one node of three, locks held"),
                &compared,
                rate,
                "a single member",
                Target::AtLeast(0.95),
                vec![note],
            ))?;
        }
        for (write, name) in [(false, "read"), (true, "write")] {
            let before = self.counters([0])?;
            let samples = interleave(
                self.arguments.rounds,
                &mut [&mut || operations_per_second(&transfer(&three, write, PAGE, true)), &mut || {
                    operations_per_second(&transfer(&null, write, PAGE, true))
                }],
            )?;
            let counted = self.counters([0])?.since(&before);
            let compared = compare(&samples[0], &samples[1]);
            let inside = counted.mean("verbfs_request_seconds", &format!("{{operation=\"{name}\"}}"));
            let note = format!("{} from request to reply inside the daemon", time(inside));
            let what = format!("4 KiB random {name} that hits the daemon's cache");
            self.put(row(&what, &compared, per_second, "do-nothing file system", Target::AtLeast(0.8), vec![note]))?;
        }
        for path in [three, one, null] {
            std::fs::remove_file(path)?;
        }
        Ok(())
    }

    /// Three processes write a fresh file each, or one together; returns bytes per second.
    fn strided(&self, shared: bool, unit: u64) -> Result<f64> {
        let paths: Vec<PathBuf> = self
            .arguments
            .three
            .iter()
            .enumerate()
            .map(|(slot, mount)| mount.join(if shared { "shared".into() } else { format!("own{slot}") }))
            .collect();
        let count = paths.len() as u64;
        let jobs: Vec<Job> = (0..count)
            .map(|slot| {
                let (first, step) = if shared { (slot, count) } else { (0, 1) };
                Job::Strided { path: paths[slot as usize].clone(), unit, first, step, bytes: SHARE }
            })
            .collect();
        let result = bytes_per_second(&jobs);
        for path in paths.iter().take(if shared { 1 } else { 3 }) {
            std::fs::remove_file(path)?;
        }
        result
    }

    fn shared_file(&self) -> Result<()> {
        let mut small = Counters::default();
        let samples = interleave(
            self.arguments.rounds,
            &mut [&mut || self.strided(true, MIB), &mut || self.strided(false, MIB), &mut || {
                let before = self.counters(0..3)?;
                let result = self.strided(true, RECORD);
                small.add(&self.counters(0..3)?.since(&before));
                result
            }],
        )?;
        let note = format!("fresh files, {} MiB by each of three processes, one per mount", SHARE / MIB);
        self.put(row(
            "three nodes, one shared file, 1 MiB aligned strided writes",
            &compare(&samples[0], &samples[1]),
            rate,
            "a file each",
            Target::AtLeast(0.9),
            vec![note],
        ))?;
        let records = (SHARE.div_ceil(RECORD) * 3 * (self.arguments.rounds as u64 + 1)) as f64;
        let messages: f64 = small.members("verbfs_messages_sent_total").iter().map(|(_, count)| count).sum();
        let note = format!(
            "per record: {} messages, {} hand-overs, {} lock requests for data",
            number(messages / records),
            number(small.get("verbfs_hand_overs_total{direction=\"received\"}") / records),
            number(small.get("verbfs_lock_requests_total{class=\"data\"}") / records)
        );
        self.put(row(
            "the same with 47 008-byte records",
            &compare(&samples[2], &samples[0]),
            rate,
            "the aligned case",
            Target::AtLeast(0.5),
            vec![note],
        ))
    }

    fn hand_over(&self) -> Result<()> {
        let [one, other] = [&self.arguments.three[0], &self.arguments.three[1]].map(|mount| mount.join("handed"));
        // One chunk on each node: the server of the lock is the one side, the other side, and neither.
        bytes_per_second(&[Job::Strided { path: one.clone(), unit: MIB, first: 0, step: 1, bytes: 3 * MIB }])?;
        let mut all = Counters::default();
        let (mut waits, mut calls, mut per_chunk) = (Vec::new(), Vec::new(), vec![(0.0, 0.0); 3]);
        for _ in 0..self.arguments.rounds {
            let mut round = Counters::default();
            for (chunk, sum) in per_chunk.iter_mut().enumerate() {
                let job = Job::PingPong { one: one.clone(), other: other.clone(), offset: chunk as u64 * MIB };
                let before = self.counters(0..3)?;
                let outcome = run(&[job])?[0];
                let counted = self.counters(0..3)?.since(&before);
                calls.push((outcome.end - outcome.start) as f64 / outcome.operations as f64);
                sum.0 += counted.members("verbfs_messages_sent_total").iter().map(|(_, count)| count).sum::<f64>();
                sum.1 += counted.get("verbfs_hand_overs_total{direction=\"received\"}");
                round.add(&counted);
            }
            waits.push(round.mean("verbfs_lock_wait_seconds", "{class=\"data\"}"));
            all.add(&round);
        }
        std::fs::remove_file(&one)?;
        let hand_overs = all.get("verbfs_hand_overs_total{direction=\"received\"}");
        ensure!(hand_overs > 0.0, "no dirty page was handed over");
        let per = |value: f64| number(value / hand_overs);
        let lanes: Vec<String> = all
            .members("verbfs_messages_sent_total")
            .iter()
            .map(|(lane, count)| format!("{lane} {}", per(*count)))
            .collect();
        let one_sided: Vec<String> = all
            .members("verbfs_fabric_operations_total")
            .iter()
            .map(|(kind, count)| format!("{kind} {}", per(*count)))
            .collect();
        let requests: Vec<String> = all
            .members("verbfs_lock_requests_total")
            .iter()
            .map(|(class, count)| format!("{class} {}", per(*count)))
            .collect();
        let chunks: Vec<String> = per_chunk.iter().map(|(messages, count)| number(messages / count)).collect();
        let notes = vec![
            "the figure is the daemons' mean wait for the DATA lock, from asking to holding (`lock_wait`), without FUSE".to_string(),
            format!("a 4 KiB write(2) that takes the page over, FUSE, ATTR and DATA together: {}", time(median(calls))),
            format!("pulling the pages, from the grant on: {}", time(all.mean("verbfs_hand_over_seconds", ""))),
            format!("wait for the ATTR lock: {}", time(all.mean("verbfs_lock_wait_seconds", "{class=\"attr\"}"))),
            format!("per hand-over: lock requests {}; messages of all kinds, on and off the critical path, by lane: {}; one-sided operations: {}", requests.join(", "), lanes.join(", "), one_sided.join(", ")),
            format!("messages per hand-over by page, one page per serving node: {}", chunks.join(", ")),
            format!("dirty pages per hand-over (the range of a lock is more than the page asked for): {}", per(all.get("verbfs_hand_over_pages_total{direction=\"sent\"}"))),
            format!("against two spinning processes ({}): ratio {}", time(self.awake), number(median(waits.iter().copied()) / self.awake)),
        ];
        let against = vec![self.asleep; waits.len()];
        self.put(row(
            "hand-over of a dirty page between two nodes",
            &compare(&waits, &against),
            time,
            "mailbox round trip, asleep",
            Target::AtMost(10.0),
            notes,
        ))
    }

    fn stat(&self) -> Result<()> {
        let [writer, reader] = [&self.arguments.three[0], &self.arguments.three[1]].map(|mount| mount.join("watched"));
        bytes_per_second(&[Job::Strided { path: writer.clone(), unit: MIB, first: 0, step: 1, bytes: CACHED }])?;
        let write = || Job::Transfer { path: writer.clone(), write: true, random: false, unit: MIB, length: CACHED };
        let looks = std::cell::Cell::new(0);
        let beside = |pause: Duration| -> Result<f64> {
            let outcomes = run(&[write(), Job::Look { path: reader.clone(), pause }])?;
            looks.set(looks.get() + outcomes[1].operations);
            Ok(outcomes[0].bytes as f64 / span(&outcomes[..1]))
        };
        bytes_per_second(&[write()])?;
        let mut lost = Counters::default();
        let mut paced_looks = 0;
        let samples = interleave(
            self.arguments.rounds,
            &mut [
                &mut || {
                    let before = self.counters([0])?;
                    looks.set(0);
                    let result = beside(LOOK);
                    paced_looks += looks.get();
                    lost.add(&self.counters([0])?.since(&before));
                    result
                },
                &mut || bytes_per_second(&[write()]),
                &mut || beside(Duration::ZERO),
            ],
        )?;
        std::fs::remove_file(&writer)?;
        let busy = compare(&samples[2], &samples[1]);
        let revoked = lost.members("verbfs_lock_revokes_received_total");
        let revoked = if revoked.is_empty() {
            "none".into()
        } else {
            revoked.iter().map(|(class, count)| format!("{class} {count:.0}")).collect::<Vec<_>>().join(", ")
        };
        let notes = vec![
            format!("{paced_looks} looks, one per {} ms; locks the writer lost: {revoked}", LOOK.as_millis()),
            format!(
                "stat in a loop without a pause, which takes a processor of its own: {}, ratio {}",
                rate(busy.figure),
                number(busy.ratio)
            ),
        ];
        let mut result = row(
            "writer of a file while another node stats it",
            &compare(&samples[0], &samples[1]),
            rate,
            "without",
            Target::AtLeast(0.9),
            notes,
        );
        result.reached &= lost.members("verbfs_lock_revokes_received_total").is_empty();
        result.target += ", no lock lost";
        self.put(result)
    }

    fn names(&self) -> Result<()> {
        let mut homes = Vec::new();
        for (slot, mount) in self.arguments.three.iter().enumerate() {
            let directory = mount.join(format!("names{slot}"));
            std::fs::create_dir(&directory)?;
            homes.push(std::fs::metadata(&directory)?.ino() >> 48);
        }
        std::fs::create_dir(self.arguments.three[0].join("names"))?;
        // Where a directory lives follows from its name: names until each node has one of its own.
        let mut at_home = Vec::new();
        for (slot, mount) in self.arguments.three.iter().enumerate() {
            let found = (0..200).find_map(|number| {
                let directory = mount.join(format!("home{slot}-{number}"));
                std::fs::create_dir(&directory).ok()?;
                (std::fs::metadata(&directory).ok()?.ino() >> 48 == slot as u64).then_some(directory)
            });
            at_home.push(found.context("no directory came to live where it was made")?);
        }
        let home_jobs: Vec<Job> = at_home
            .into_iter()
            .enumerate()
            .map(|(slot, directory)| Job::Names { directory, prefix: format!("file{slot}-") })
            .collect();
        for (slot, mount) in self.arguments.null.iter().enumerate() {
            std::fs::create_dir(mount.join(format!("names{slot}")))?;
        }
        let jobs = |mounts: &[PathBuf], shared: bool| -> Vec<Job> {
            let job = |(slot, mount): (usize, &PathBuf)| Job::Names {
                directory: mount.join(if shared { "names".into() } else { format!("names{slot}") }),
                prefix: format!("file{slot}-"),
            };
            mounts.iter().enumerate().map(job).collect()
        };
        let mut counted = [Counters::default(), Counters::default()];
        let [own_counters, shared_counters] = &mut counted;
        let count = |shared: bool, sum: &mut Counters| -> Result<f64> {
            let before = self.counters(0..3)?;
            let result = operations_per_second(&jobs(&self.arguments.three, shared));
            sum.add(&self.counters(0..3)?.since(&before));
            result
        };
        let samples = interleave(
            self.arguments.rounds,
            &mut [
                &mut || count(false, own_counters),
                &mut || operations_per_second(&jobs(&self.arguments.null, false)),
                &mut || count(true, shared_counters),
                &mut || operations_per_second(&home_jobs),
            ],
        )?;
        let sets = |counters: &Counters| counters.get("verbfs_request_seconds_count{operation=\"create\"}").max(1.0);
        let note = |counters: &Counters| {
            let messages: f64 = counters.members("verbfs_messages_sent_total").iter().map(|(_, count)| count).sum();
            let requests: Vec<String> = counters
                .members("verbfs_lock_requests_total")
                .iter()
                .map(|(class, count)| format!("{class} {}", number(count / sets(counters))))
                .collect();
            let operations = ["lookup", "create", "getattr", "unlink", "flush", "release", "getxattr"]
                .iter()
                .filter_map(|operation| {
                    let label = format!("{{operation=\"{operation}\"}}");
                    let count = counters.get(&format!("verbfs_request_seconds_count{label}"));
                    (count > 0.0).then(|| {
                        format!(
                            "{operation} {} x {}",
                            number(count / sets(counters)),
                            time(counters.mean("verbfs_request_seconds", &label))
                        )
                    })
                });
            format!(
                "per file: requests {}; {} messages; lock requests {}",
                operations.collect::<Vec<_>>().join(", "),
                number(messages / sets(counters)),
                requests.join(", ")
            )
        };
        let home = compare(&samples[3], &samples[1]);
        let own_note = format!(
            "{}; the directories of nodes 0, 1 and 2 live on nodes {homes:?}; with each directory living on the node that uses it: {}, ratio {}",
            note(&counted[0]),
            per_second(home.figure),
            number(home.ratio)
        );
        self.put(row(
            "create + stat + unlink of small files, directory per node",
            &compare(&samples[0], &samples[1]),
            per_second,
            "do-nothing file system",
            Target::AtLeast(0.3),
            vec![own_note],
        ))?;
        let shared = compare(&samples[2], &samples[1]);
        self.put(row(
            "the same, one shared directory",
            &shared,
            per_second,
            "do-nothing file system",
            Target::AtLeast(0.15),
            vec![note(&counted[1])],
        ))
    }

    fn idle(&self) -> Result<()> {
        // Whatever the rows before have left to write back is written back by now.
        std::thread::sleep(Duration::from_secs(6));
        let read = || self.arguments.pids.iter().map(|pid| ticks(*pid)).collect::<Result<Vec<u64>>>();
        let (before, start) = (read()?, Instant::now());
        std::thread::sleep(IDLE);
        let (after, seconds) = (read()?, start.elapsed().as_secs_f64());
        // SAFETY: no pointers are passed.
        let hertz = unsafe { libc::sysconf(libc::_SC_CLK_TCK) } as f64;
        let used: Vec<f64> = after
            .iter()
            .zip(&before)
            .map(|(after, before)| (after - before) as f64 / hertz / seconds * 100.0)
            .collect();
        let total: f64 = used.iter().sum();
        self.put(Row {
            what: "idle cluster of three daemons".into(),
            figure: format!("{total:.2} % of one core"),
            against: "".into(),
            ratio: "".into(),
            spread: "".into(),
            target: "under 1 %".into(),
            reached: total < 1.0,
            notes: vec![format!(
                "mounted, over {seconds:.0} s; by daemon: {}",
                used.iter().map(|used| format!("{used:.2} %")).collect::<Vec<_>>().join(", ")
            )],
        })
    }
}

fn rows(arguments: RowsArguments) -> Result<()> {
    ensure!(
        arguments.three.len() == 3 && arguments.null.len() == 3 && arguments.pids.len() == 3,
        "three mounts, three daemons, three null mounts"
    );
    let mut bench = Bench { arguments, asleep: f64::NAN, awake: f64::NAN };
    // Hand-overs are compared with the mailbox.
    if bench.wanted("mailbox") || bench.wanted("hand") {
        bench.mailbox()?;
    }
    if bench.wanted("transfers") {
        bench.transfers()?;
    }
    if bench.wanted("shared") {
        bench.shared_file()?;
    }
    if bench.wanted("hand") {
        bench.hand_over()?;
    }
    if bench.wanted("stat") {
        bench.stat()?;
    }
    if bench.wanted("names") {
        bench.names()?;
    }
    if bench.wanted("idle") {
        bench.idle()?;
    }
    Ok(())
}

// ----------------------------------------------------------------------------------------------------------------- memory

/// The target of the memory row, MiB, and the files it speaks of.
const MEMORY_MAX: f64 = 400.0;
const MEMORY_FILES: f64 = 1e6;

fn memory(arguments: MemoryArguments) -> Result<()> {
    let pid = arguments.pids[0];
    let own = || -> Result<f64> { Ok(resident(pid, "RssAnon")? + resident(pid, "RssShmem")?) };
    // Directories are spread over the nodes; files live where their directory lives. Only the measured daemon gets any.
    let mut directories = Vec::new();
    for number in 0..200 {
        let directory = arguments.mount.join(format!("many{number}"));
        std::fs::create_dir(&directory)?;
        if std::fs::metadata(&directory)?.ino() >> 48 == 0 {
            directories.push(directory)
        } else {
            std::fs::remove_dir(&directory)?
        }
        if directories.len() == 2 {
            break;
        }
    }
    ensure!(!directories.is_empty(), "no directory came to live on node 0");
    // The cache first, all of it: written, then read, a file larger than the cache.
    let path = arguments.mount.join("large");
    for _ in 0..2 {
        run(&[Job::Strided { path: path.clone(), unit: MIB, first: 0, step: 1, bytes: 384 * MIB }])?;
    }
    let file = open(&path)?;
    let mut buffer = PageBuffer::new(MIB as usize);
    for offset in 0..384 {
        file.read_at(&mut buffer, offset * MIB)?;
    }
    let full = own()?;
    let mut files = 0;
    let mut history = Vec::new();
    let parts = 6;
    for part in 0..parts {
        let limit = Duration::from_secs(arguments.seconds) / parts;
        let jobs: Vec<Job> = directories
            .iter()
            .map(|directory| Job::Fill { directory: directory.clone(), prefix: format!("a-small-file-{part}-"), limit })
            .collect();
        files += run(&jobs)?.iter().map(|outcome| outcome.operations).sum::<u64>();
        history.push((files as f64, own()?));
    }
    let used = own()?;
    let statuses = arguments
        .pids
        .iter()
        .map(|pid| {
            Ok(format!(
                "{:.0} MiB (own memory {:.0}, shared memory {:.0}, mapped files {:.0})",
                resident(*pid, "VmRSS")?,
                resident(*pid, "RssAnon")?,
                resident(*pid, "RssShmem")?,
                resident(*pid, "RssFile")?
            ))
        })
        .collect::<Result<Vec<String>>>()?;
    let (first, last) = (history[parts as usize / 2 - 1], history[parts as usize - 1]);
    let per_file = (last.1 - first.1) * MIB as f64 / (last.0 - first.0);
    let million = used + (MEMORY_FILES - files as f64).max(0.0) * per_file / MIB as f64;
    let row = Row {
        what: "memory of a daemon with a cache of 256 MiB".into(),
        figure: format!("{used:.0} MiB with {files} files"),
        against: "".into(),
        ratio: "".into(),
        spread: "".into(),
        target: "under 400 MiB with a million files".into(),
        reached: used < MEMORY_MAX && million < MEMORY_MAX,
        notes: vec![
            format!("RssAnon and RssShmem, cache full: {full:.0} MiB before the first file"),
            format!(
                "{files} files were made in {} s, all living on this node; in the second half each new one cost {per_file:.0} bytes, so a million would take {million:.0} MiB (extrapolated)",
                arguments.seconds
            ),
            format!(
                "all resident memory of the three daemons, the mapped store and arena included: {}",
                statuses.join(", ")
            ),
        ],
    };
    append(&arguments.out, &row)
}

// ------------------------------------------------------------------------------------------------------------------- null

fn null(directories: &[PathBuf]) -> Result<()> {
    use nix::sys::signal::{SigSet, Signal};
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    // Before the first thread, so that none takes them.
    signals.thread_block()?;
    let options = MountOptions {
        source: "verbfs-null".into(),
        threads: Topology::discover().fuse_threads(),
        ..MountOptions::default()
    };
    let mounts = directories
        .iter()
        .map(|directory| mount_null(directory, CACHED, &options, Arc::new(NoObserver)))
        .collect::<Result<Vec<_>, _>>()?;
    signals.wait()?;
    for mounted in mounts {
        mounted.unmount()?;
    }
    Ok(())
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Mode::Null { directories } => null(&directories),
        Mode::Rows(arguments) => rows(arguments),
        Mode::Memory(arguments) => memory(arguments),
        Mode::Report { file } => report(&file),
        Mode::Worker { job } => (|| {
            let Ok(job) = serde_json::from_str(&job) else { bail!("no job") };
            println!("{}", serde_json::to_string(&work(job)?)?);
            Ok(())
        })(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("verbfs-bench: {error:#}");
            ExitCode::from(3)
        }
    }
}
