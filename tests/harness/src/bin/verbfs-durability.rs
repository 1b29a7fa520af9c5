//! `verbfs-durability`: what was acknowledged must be there after a daemon was killed.
//!
//! ```text
//! verbfs-durability write --directory D --tag T --journal J --stop S    until the file S exists
//! verbfs-durability verify --directory D --journal J
//! verbfs-durability hold FILE --ready R                                 a write lock, until killed
//! verbfs-durability take FILE --limit SECONDS                           a write lock, or failure
//! ```
//!
//! # What is promised, and checked
//! The writer makes files, writes blocks that name file, block and version, renames, removes, and fsyncs. Before each call the
//! journal (outside of the file system under test) says what is about to be done, and behind a good fsync what is durable by it:
//! the versions written before, and the present name. `verify` accepts for each block exactly the versions from the durable one to
//! the last one begun, for each file exactly one of the names from the durable one to the last one begun.
//! A call may fail while a node is dead. A file whose fsync failed is left alone from then on: what it lost was reported.
//! A fsync that succeeds although pages were dropped is what this program is made to find.
//!
//! Exit status: 0 good, 1 something acknowledged is missing, 3 the tool could not do its work.

use anyhow::{Context, Result, bail, ensure};
use clap::{Parser, Subcommand};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};
use verbfs_harness::rng::{Rng, seed_or_clock};
use verbfs_harness::sys;

/// Unit of versions. Smaller than a page: pages are shared between versions.
const BLOCK: usize = 512;
/// Blocks of a file: three chunks of 1 MiB, so that a file lies on several nodes.
const BLOCKS: u64 = 6144;
/// Files a writer has at a time.
const FILES: usize = 4;
/// Between calls that failed: a dead mount fails at once.
const PAUSE: Duration = Duration::from_millis(20);

/// Write with acknowledgements, and look whether all that was acknowledged is there.
#[derive(Parser)]
#[command(version, about)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Write, rename, remove and fsync until the stop file exists.
    Write {
        #[arg(long)]
        directory: PathBuf,
        /// Begins the names of all files of this writer.
        #[arg(long)]
        tag: String,
        #[arg(long)]
        journal: PathBuf,
        #[arg(long)]
        stop: PathBuf,
        #[arg(long)]
        seed: Option<u64>,
        /// The longest a call may take, in seconds.
        #[arg(long, default_value_t = 20)]
        limit: u64,
    },
    /// Compare with a journal.
    Verify {
        #[arg(long)]
        directory: PathBuf,
        #[arg(long)]
        journal: PathBuf,
    },
    /// Take an fcntl write lock on a file and keep it until killed.
    Hold {
        file: PathBuf,
        /// Is made when the lock is held.
        #[arg(long)]
        ready: PathBuf,
    },
    /// Take an fcntl write lock on a file within a time.
    Take {
        file: PathBuf,
        #[arg(long, default_value_t = 10)]
        limit: u64,
    },
}

/// What the journal says of a file.
#[derive(Default)]
struct Known {
    /// Block: the durable version, and the last one begun.
    blocks: BTreeMap<u64, (u64, u64)>,
    /// Versions that returned without error, not yet durable.
    written: BTreeMap<u64, u64>,
    /// Names begun (the last generation) and made durable.
    begun: u64,
    returned: u64,
    durable: Option<u64>,
    /// A removal was begun, and one returned.
    removing: bool,
    removed: bool,
}

fn name(tag: &str, file: u64, generation: u64) -> String {
    format!("{tag}.{file}.{generation}")
}

fn fill(block: &mut [u8], file: u64, number: u64, version: u64) {
    for chunk in block.chunks_exact_mut(32) {
        for (slot, value) in chunk.chunks_exact_mut(8).zip([file, number, version, !(file ^ number ^ version)]) {
            slot.copy_from_slice(&value.to_le_bytes());
        }
    }
}

/// The version a block holds; `None` for zeros.
fn version_of(block: &[u8], file: u64, number: u64) -> Result<Option<u64>> {
    if block.iter().all(|byte| *byte == 0) {
        return Ok(None);
    }
    let version = u64::from_le_bytes(block[16..24].try_into().expect("eight bytes"));
    let mut expected = vec![0; block.len()];
    fill(&mut expected, file, number, version);
    ensure!(block == expected, "block {number} holds bytes that nobody wrote: {:02x?}...", &block[..32]);
    Ok(Some(version))
}

struct Writer {
    directory: PathBuf,
    tag: String,
    journal: File,
    longest: Duration,
    calls: u64,
    failures: BTreeMap<i32, u64>,
}

struct Open {
    number: u64,
    generation: u64,
    version: u64,
    handle: File,
}

impl Writer {
    fn note(&mut self, line: &str) {
        // One write for each line: a journal that is lost in part would accuse the file system.
        self.journal.write_all(format!("{line}\n").as_bytes()).expect("the journal can be written");
    }

    fn path(&self, file: u64, generation: u64) -> PathBuf {
        self.directory.join(name(&self.tag, file, generation))
    }

    fn call<T>(&mut self, body: impl FnOnce() -> std::io::Result<T>) -> Option<T> {
        let began = Instant::now();
        let result = body();
        self.longest = self.longest.max(began.elapsed());
        self.calls += 1;
        match result {
            Ok(value) => Some(value),
            Err(error) => {
                *self.failures.entry(sys::errno(&error)).or_default() += 1;
                std::thread::sleep(PAUSE);
                None
            }
        }
    }

    fn create(&mut self, number: u64) -> Option<Open> {
        let path = self.path(number, 0);
        self.note(&format!("create {number}"));
        let handle = self.call(|| OpenOptions::new().read(true).write(true).create_new(true).open(path))?;
        Some(Open { number, generation: 0, version: 0, handle })
    }

    /// False: the file is to be left alone.
    fn step(&mut self, open: &mut Open, rng: &mut Rng) -> bool {
        let number = open.number;
        match rng.weighted(&[60, 30, 6, 4]) {
            0 => {
                let count = if rng.percent(90) { rng.between(1, 24) } else { rng.between(100, 600) };
                let first = if rng.percent(70) { rng.below(64) } else { rng.below(BLOCKS) };
                let last = (first + count).min(BLOCKS);
                open.version += 1;
                let mut bytes = vec![0; (last - first) as usize * BLOCK];
                for (block, index) in bytes.chunks_exact_mut(BLOCK).zip(first..) {
                    fill(block, number, index, open.version);
                }
                self.note(&format!("write {number} {first} {last} {}", open.version));
                if self.call(|| open.handle.write_all_at(&bytes, first * BLOCK as u64)).is_some() {
                    self.note(&format!("wrote {number} {first} {last} {}", open.version));
                }
                true
            }
            1 => {
                let data_only = rng.percent(20);
                let synced =
                    self.call(|| if data_only { open.handle.sync_data() } else { open.handle.sync_all() }).is_some();
                if synced {
                    self.note(&format!("synced {number}"));
                }
                synced
            }
            2 => {
                let (from, to) = (self.path(number, open.generation), self.path(number, open.generation + 1));
                self.note(&format!("rename {number} {}", open.generation + 1));
                if self.call(|| std::fs::rename(from, to)).is_none() {
                    return false; // which name it has is not known
                }
                open.generation += 1;
                self.note(&format!("renamed {number} {}", open.generation));
                true
            }
            _ => {
                let path = self.path(number, open.generation);
                self.note(&format!("remove {number}"));
                if self.call(|| std::fs::remove_file(path)).is_some() {
                    self.note(&format!("removed {number}"));
                }
                false
            }
        }
    }
}

fn write(directory: PathBuf, tag: String, journal: &Path, stop: &Path, seed: Option<u64>, limit: u64) -> Result<()> {
    let seed = seed_or_clock(seed);
    let journal = File::create_new(journal).context("the journal must be new")?;
    let mut writer = Writer { directory, tag, journal, longest: Duration::ZERO, calls: 0, failures: BTreeMap::new() };
    let mut rng = Rng::new(seed);
    let mut open: Vec<Open> = Vec::new();
    let mut next = 0;
    while !stop.exists() {
        if open.len() < FILES {
            next += 1;
            open.extend(writer.create(next));
            continue;
        }
        let index = rng.below(open.len() as u64) as usize;
        if !writer.step(&mut open[index], &mut rng) {
            open.swap_remove(index);
        }
    }
    println!(
        "{}: seed {seed}, {} calls, the longest {:.1} s, {} files, failures by errno: {:?}",
        writer.tag,
        writer.calls,
        writer.longest.as_secs_f64(),
        next,
        writer.failures
    );
    ensure!(writer.longest <= Duration::from_secs(limit), "a call took {:.1} s", writer.longest.as_secs_f64());
    Ok(())
}

fn read_journal(journal: &Path) -> Result<BTreeMap<u64, Known>> {
    let mut files: BTreeMap<u64, Known> = BTreeMap::new();
    for line in BufReader::new(File::open(journal)?).lines() {
        let line = line?;
        let mut words = line.split(' ');
        let what = words.next().unwrap_or_default();
        let numbers: Vec<u64> = words.map(str::parse).collect::<Result<_, _>>().with_context(|| format!("'{line}'"))?;
        let file = files.entry(numbers[0]).or_default();
        match (what, &numbers[1..]) {
            ("create", []) => {}
            ("write", &[first, last, version]) => {
                (first..last).for_each(|block| file.blocks.entry(block).or_default().1 = version)
            }
            ("wrote", &[first, last, version]) => file.written.extend((first..last).map(|block| (block, version))),
            ("synced", []) => {
                for (block, version) in std::mem::take(&mut file.written) {
                    file.blocks.entry(block).or_default().0 = version;
                }
                file.durable = Some(file.returned);
            }
            ("rename", &[generation]) => file.begun = generation,
            ("renamed", &[generation]) => file.returned = generation,
            ("remove", []) => file.removing = true,
            ("removed", []) => file.removed = true,
            _ => bail!("'{line}' says nothing"),
        }
    }
    Ok(files)
}

fn verify_file(directory: &Path, tag: &str, number: u64, known: &Known) -> Result<u64> {
    let mut found = Vec::new();
    for generation in 0..=known.begun {
        let path = directory.join(name(tag, number, generation));
        match std::fs::symlink_metadata(&path) {
            Ok(_) => found.push((generation, path)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).with_context(|| path.display().to_string()),
        }
    }
    ensure!(found.len() <= 1, "it has several names: {found:?}");
    let Some((generation, path)) = found.pop() else {
        ensure!(
            known.durable.is_none() || known.removing,
            "its durable name (generation {:?}, begun {}) is gone",
            known.durable,
            known.begun
        );
        return Ok(0);
    };
    ensure!(
        known.durable.is_none_or(|durable| generation >= durable),
        "generation {generation} of its name is back, {:?} was durable",
        known.durable
    );
    let handle = File::open(&path)?;
    let length = handle.metadata()?.len();
    let mut checked = 0;
    let mut bytes = vec![0; BLOCK];
    for (&block, &(durable, begun)) in &known.blocks {
        let at = block * BLOCK as u64;
        let version = if at + BLOCK as u64 <= length {
            handle.read_exact_at(&mut bytes, at).with_context(|| format!("block {block}"))?;
            version_of(&bytes, number, block)?
        } else {
            None
        };
        let range = durable..=begun;
        ensure!(
            range.contains(&version.unwrap_or(0)),
            "block {block} of {} ({length} bytes) has version {version:?}, durable is {durable}, begun {begun}",
            path.display()
        );
        checked += u64::from(durable > 0);
    }
    Ok(checked)
}

fn verify(directory: &Path, journal: &Path) -> Result<bool> {
    let tag = journal.file_stem().context("the journal is called TAG.journal")?.to_string_lossy().into_owned();
    let files = read_journal(journal)?;
    let (mut blocks, mut bad) = (0, 0);
    for (&number, known) in &files {
        match verify_file(directory, &tag, number, known) {
            Ok(checked) => blocks += checked,
            Err(error) => {
                bad += 1;
                println!("{tag}: file {number}: {error:#}");
            }
        }
    }
    let durable = files.values().filter(|known| known.durable.is_some()).count();
    println!("{tag}: {} files, {durable} with a durable name, {blocks} durable blocks, {bad} files wrong", files.len());
    Ok(bad == 0)
}

fn hold(file: &Path, ready: &Path) -> Result<()> {
    let handle = OpenOptions::new().read(true).write(true).open(file)?;
    let mut lock = sys::record(libc::F_WRLCK as libc::c_int, 0, 0);
    sys::fcntl_lock(&handle, libc::F_SETLK, &mut lock)?;
    File::create(ready)?;
    loop {
        std::thread::sleep(Duration::from_secs(1));
    }
}

fn take(file: &Path, limit: u64) -> Result<()> {
    let began = Instant::now();
    loop {
        let attempt = OpenOptions::new().read(true).write(true).open(file).and_then(|handle| {
            let mut lock = sys::record(libc::F_WRLCK as libc::c_int, 0, 0);
            sys::fcntl_lock(&handle, libc::F_SETLK, &mut lock)
        });
        match attempt {
            Ok(()) => {
                return {
                    println!("locked after {:.1} s", began.elapsed().as_secs_f64());
                    Ok(())
                };
            }
            Err(error) if began.elapsed() >= Duration::from_secs(limit) => {
                return Err(error).context("not locked in time");
            }
            Err(_) => std::thread::sleep(Duration::from_millis(100)),
        }
    }
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Write { directory, tag, journal, stop, seed, limit } => {
            write(directory, tag, &journal, &stop, seed, limit).map(|()| true)
        }
        Command::Verify { directory, journal } => verify(&directory, &journal),
        Command::Hold { file, ready } => hold(&file, &ready).map(|()| true),
        Command::Take { file, limit } => take(&file, limit).map(|()| true),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("verbfs-durability: {error:#}");
            ExitCode::from(3)
        }
    }
}
