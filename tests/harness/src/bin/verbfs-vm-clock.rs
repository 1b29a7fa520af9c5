//! `verbfs-vm-clock`: does the clock that virtual machines share hold what `verbfs_harness::clock` promises?
//!
//! ```text
//! verbfs-vm-clock ring --clock PATH --member N --members M [--rounds R] [--from HOP] [--source shared|own] [--expect order|disorder]
//! verbfs-vm-clock hammer --clock PATH [--calls N]
//! ```
//!
//! *ring*: members on several machines pass a token through the shared memory, and with it the sender's reading of the clock. Who
//! gets it reads the clock afterwards: later in real time, whatever the clock says. Each hop whose reading is not later than the
//! sender's is counted. So this judges a clock by nothing but causes and effects, and a hop out of order is a false history. With
//! `--source own` the members read their machines' own time of day instead: the same ring must find disorder there.
//!
//! *hammer*: calls the clock as fast as it can and prints each time; all times of all machines must differ.
//!
//! In both, time must pass: between two readings of one member not less than its CLOCK_MONOTONIC says; in a ring, once
//! all members have read the clock, not more than [`RATE_MOST`] times as much.
//!
//! Exit status: 0 as expected, 1 not so, 3 the tool could not do its work.

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand, ValueEnum};
use rustix::time::{ClockId, clock_gettime};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};
use verbfs_harness::clock::{Shared, map, monotonic};

/// Words of the shared memory, apart by a cache line: the number of the hop that is next, and the sender's reading.
const TOKEN: usize = 64;
const STAMP: usize = 72;
/// Looks at the token before a member sleeps: the others may wait for its processor.
const LOOKS: u32 = 200;
const SLEEP: Duration = Duration::from_micros(50);
/// A member that waits this long for its turn gives up.
const PATIENCE: Duration = Duration::from_secs(60);
/// How much faster than a member's own clock the shared one may run: it follows the fastest.
const RATE_MOST: f64 = 1.01;
/// Nanoseconds for which a member may be without a processor between a reading and that of its own clock.
const ABSENCE_MOST: f64 = 5e8;
/// Rounds after which all members have found what the leading one gives: who joins knows only when the clock was read last.
const ROUNDS_TO_MEET: u64 = 2;

/// Try the clock that virtual machines share.
#[derive(Parser)]
#[command(version, about)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Pass readings around, and count those that contradict their order.
    Ring {
        #[arg(long)]
        clock: PathBuf,
        /// This member's place, from 0.
        #[arg(long)]
        member: u64,
        #[arg(long)]
        members: u64,
        /// How often the token goes around.
        #[arg(long, default_value_t = 1000)]
        rounds: u64,
        /// The first hop: rings before this one used the shared memory up to it.
        #[arg(long, default_value_t = 0)]
        from: u64,
        #[arg(long, value_enum, default_value_t = Source::Shared)]
        source: Source,
        /// What this member is to find for the exit status 0.
        #[arg(long, value_enum, default_value_t = Expect::Order)]
        expect: Expect,
    },
    /// Print many readings, made as fast as possible.
    Hammer {
        #[arg(long)]
        clock: PathBuf,
        #[arg(long, default_value_t = 20_000)]
        calls: usize,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Source {
    Shared,
    Own,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Expect {
    Order,
    Disorder,
}

/// Reads a source, and judges how the shared clock passes.
struct Reader {
    clock: Shared,
    source: Source,
    /// The reading from which on the rate is judged, and the last one, each with CLOCK_MONOTONIC just behind it.
    first: Option<(u64, u64)>,
    last: Option<(u64, u64)>,
    /// Readings that grew by less than what passed.
    slow: u64,
}

impl Reader {
    fn new(path: &Path, source: Source) -> Result<Self> {
        Ok(Self { clock: Shared::open(path)?, source, first: None, last: None, slow: 0 })
    }

    fn read(&mut self) -> u64 {
        if self.source == Source::Own {
            let t = clock_gettime(ClockId::Realtime);
            return t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64;
        }
        let before = monotonic();
        let time = self.clock.now();
        let reading = (time, monotonic());
        if let Some((last, behind)) = self.last {
            self.slow += u64::from(time.saturating_sub(last) < before - behind);
        }
        self.last = Some(reading);
        time
    }

    /// Whether time passed as it should; `Err` says how it did not.
    fn verdict(&self) -> Result<String> {
        ensure!(self.slow == 0, "{} readings grew by less than what passed", self.slow);
        let (Some(first), Some(last)) = (self.first, self.last) else { return Ok("rate not judged".to_owned()) };
        let (given, passed) = ((last.0 - first.0) as f64, (last.1 - first.1) as f64);
        let said = format!("{:.3} ms given, {:.3} ms passed", given / 1e6, passed / 1e6);
        ensure!(given <= passed * RATE_MOST + ABSENCE_MOST, "too fast: {said}");
        Ok(said)
    }
}

/// The hops out of order that this member saw.
fn ring(reader: &mut Reader, path: &Path, place: (u64, u64), hops: std::ops::Range<u64>) -> Result<u64> {
    let (member, members) = place;
    ensure!(member < members, "member {member} of {members}");
    let memory = map(path)?;
    let (mut disorder, mut least, mut most) = (0, i64::MAX, i64::MIN);
    for hop in hops.clone().filter(|hop| hop % members == member) {
        let began = Instant::now();
        let mut looks = 0;
        while memory.load(TOKEN) != hop {
            looks += 1;
            if looks > LOOKS {
                std::thread::sleep(SLEEP);
                ensure!(began.elapsed() < PATIENCE, "hop {hop} did not come; hop {} is next", memory.load(TOKEN));
            }
        }
        let sent = memory.load(STAMP);
        let got = reader.read();
        // The first hop has no sender.
        if hop != hops.start {
            let later = got as i64 - sent as i64;
            (least, most) = (least.min(later), most.max(later));
            disorder += u64::from(later <= 0);
        }
        memory.store(STAMP, reader.read());
        if hop < hops.start + ROUNDS_TO_MEET * members {
            reader.first = reader.last;
        }
        memory.store(TOKEN, hop + 1);
    }
    println!("member {member}: {disorder} hops out of order; from reading to reading {least} to {most} ns");
    Ok(disorder)
}

fn run() -> Result<bool> {
    let (mut reader, good) = match Arguments::parse().command {
        Command::Ring { clock: path, member, members, rounds, from, source, expect } => {
            let mut reader = Reader::new(&path, source)?;
            let disorder = ring(&mut reader, &path, (member, members), from..from + rounds * members)?;
            (reader, (disorder == 0) == (expect == Expect::Order))
        }
        Command::Hammer { clock, calls } => {
            let mut reader = Reader::new(&clock, Source::Shared)?;
            let times: Vec<u64> = (0..calls).map(|_| reader.read()).collect();
            let mut out = BufWriter::new(std::io::stdout().lock());
            for time in times {
                writeln!(out, "{time}").context("print times")?;
            }
            out.flush()?;
            (reader, true)
        }
    };
    // One more, so that what the last reading found is judged too.
    reader.read();
    match reader.verdict() {
        Ok(said) => {
            eprintln!("{said}");
            Ok(good)
        }
        Err(error) => {
            eprintln!("verbfs-vm-clock: {error:#}");
            Ok(false)
        }
    }
}

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("verbfs-vm-clock: {error:#}");
            ExitCode::from(3)
        }
    }
}
