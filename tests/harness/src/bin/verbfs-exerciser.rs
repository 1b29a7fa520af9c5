//! `verbfs-exerciser`: one process, one file, handles on every mount, random operations, a model in memory.
//!
//! ```text
//! verbfs-exerciser --mount A --mount B [--seed N] [--operations N] [--max-size BYTES]
//! verbfs-exerciser --mount A --mount B --replay FILE
//! ```
//!
//! # What is checked
//! Operations follow one another, each through a mount chosen at random: writes (`pwrite`, `write`, `writev`, direct,
//! through a shared mapping, appending), reads (the same ways, and a private mapping), truncation by handle and by path, `fallocate` (plain,
//! keep-size, punch, zero-range with and without keep-size), `copy_file_range` within the file from mount to mount, `fsync`,
//! closing and opening again. After each one, what it touched is read through *another* mount, with its surroundings, and the size
//! is asked for on both; now and then the whole file is compared through all mounts, SEEK_DATA and SEEK_HOLE are
//! walked (no hole may hold a byte that is not zero; the parts must cover the file), and `st_blocks` must be plausible.
//! Offsets and lengths cluster around pages, the 1 MiB chunks and the end of the file, where mistakes live.
//! What a mount cannot do at all (direct I/O, shared mappings, some `fallocate`) is found out first and left out, and said.
//!
//! # How to read a failure
//! The failed operation, what was wrong, a hex dump (`-` expected, `+` found) around the first difference with the number
//! of differing bytes, and the last operations, newest last. The same seed makes the same operations again. All operations are
//! also written to a file, one a line; `--replay` carries out such a file, so lines may be deleted by hand to find the shortest one.
//!
//! Exit status: 0 good, 1 a difference, 2 standstill, 3 the tool could not do its work.

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use rustix::fs::{self, FallocateFlags, Mode, OFlags, SeekFrom};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufRead, BufReader, IoSlice, IoSliceMut, Read, Seek, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use verbfs_harness::mounts::{Mounts, WorkDirectory};
use verbfs_harness::progress::Progress;
use verbfs_harness::rng::{Rng, seed_or_clock};
use verbfs_harness::sys::{Mapping, PageBuffer};
use verbfs_harness::watchdog::Watchdog;

/// Compare a file under random operations, through several mounts, with a model in memory.
#[derive(Parser, Debug)]
#[command(version, about)]
struct Arguments {
    /// A directory of the file system under test; give one for each mount.
    #[arg(long = "mount", required = true)]
    mounts: Vec<PathBuf>,
    /// The operations follow from it.
    #[arg(long)]
    seed: Option<u64>,
    /// How many.
    #[arg(long, default_value_t = 3000)]
    operations: u64,
    /// The file never grows beyond.
    #[arg(long, default_value_t = 4 << 20)]
    max_size: u64,
    /// Carry out the operations of this file.
    #[arg(long)]
    replay: Option<PathBuf>,
    /// Do without direct I/O (XFS may answer EIO when it meets stores through a mapping).
    #[arg(long)]
    no_direct: bool,
    /// An operation that takes longer ends the run with exit status 2.
    #[arg(long, default_value_t = 60)]
    stall_seconds: u64,
    /// How many operations to print on failure.
    #[arg(long, default_value_t = 20)]
    last: usize,
    /// Do without shared mappings.
    #[arg(long)]
    no_mmap: bool,
    /// Leave the file in place on failure.
    #[arg(long)]
    keep: bool,
}

const PAGE: u64 = 4096;
const CHUNK: u64 = 1 << 20;
/// The whole file is compared every so many operations.
const FULL_CHECK_EVERY: u64 = 64;
/// Bytes read before and behind what an operation touched.
const SURROUNDINGS: u64 = 5000;
/// Preallocation and speculation of real file systems stay below this.
const BLOCKS_SLACK: u64 = 64 << 20;

/// A way to move bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
enum Way {
    Positioned,
    Sequential,
    Vectored,
    Direct,
    SharedMapping,
    PrivateMapping,
}

/// A kind of `fallocate`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
enum Allocation {
    Plain,
    KeepSize,
    Punch,
    Zero,
    ZeroKeepSize,
}

const ALLOCATIONS: [Allocation; 5] =
    [Allocation::Plain, Allocation::KeepSize, Allocation::Punch, Allocation::Zero, Allocation::ZeroKeepSize];

impl Allocation {
    fn flags(self) -> FallocateFlags {
        match self {
            Allocation::Plain => FallocateFlags::empty(),
            Allocation::KeepSize => FallocateFlags::KEEP_SIZE,
            Allocation::Punch => FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            Allocation::Zero => FallocateFlags::ZERO_RANGE,
            Allocation::ZeroKeepSize => FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE,
        }
    }
}

/// One operation with all its parameters: it needs no random number any more.
#[derive(Clone, Debug, Serialize, Deserialize)]
enum Operation {
    Write { mount: usize, way: Way, offset: u64, len: u64, salt: u64 },
    Append { mount: usize, len: u64, salt: u64 },
    Read { mount: usize, way: Way, offset: u64, len: u64 },
    Truncate { mount: usize, size: u64, by_path: bool },
    Allocate { mount: usize, kind: Allocation, offset: u64, len: u64 },
    Copy { from_mount: usize, to_mount: usize, from: u64, to: u64, len: u64 },
    Sync { mount: usize, data_only: bool },
    Reopen { mount: usize },
    SeekWalk { mount: usize },
    CompareAll,
}

/// What the file system under test can do.
#[derive(Default)]
struct Abilities {
    ways: BTreeSet<Way>,
    allocations: BTreeSet<Allocation>,
    copies: bool,
}

/// All handles of one mount.
struct Handles {
    path: PathBuf,
    file: File,
    appending: File,
    direct: Option<File>,
    mapping: Option<Mapping>,
}

impl Handles {
    /// The shared mapping, as a program may touch it: having asked how long the file is. A FUSE kernel bounds a mapping by
    /// the size it last saw, and raises SIGBUS beyond, whatever another mount has appended since.
    fn mapped(&self) -> Result<&Mapping> {
        self.file.metadata()?;
        self.mapping.as_ref().context("no mapping")
    }

    fn open(path: &Path, map: Option<u64>, direct: bool) -> Result<Self> {
        let open = |flags: OFlags| -> std::result::Result<File, Errno> {
            Ok(File::from(fs::open(path, flags | OFlags::CLOEXEC, Mode::empty())?))
        };
        let file = open(OFlags::RDWR).with_context(|| format!("open {}", path.display()))?;
        let appending = open(OFlags::WRONLY | OFlags::APPEND)?;
        let direct = if direct { Some(open(OFlags::RDWR | OFlags::DIRECT)?) } else { None };
        // The mapping reaches over the largest size; only bytes inside the file are touched.
        let mapping = map.map(|len| Mapping::new(file.as_fd(), 0, len as usize, true, true)).transpose()?;
        Ok(Self { path: path.to_owned(), file, appending, direct, mapping })
    }
}

struct Exerciser {
    abilities: Abilities,
    handles: Vec<Handles>,
    model: Vec<u8>,
    max_size: u64,
    done: u64,
}

fn fill(salt: u64, len: u64) -> Vec<u8> {
    let mut rng = Rng::new(salt);
    let mut bytes: Vec<u8> = (0..len.div_ceil(8)).flat_map(|_| rng.bits().to_le_bytes()).collect();
    bytes.truncate(len as usize);
    bytes
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x} ")).collect()
}

/// Say how `found` differs from `expected`, both of which begin at `offset`.
fn compare(expected: &[u8], found: &[u8], offset: u64, what: &str) -> Result<()> {
    ensure!(
        expected.len() == found.len(),
        "{what}: {} bytes at offset {offset}, expected {}",
        found.len(),
        expected.len()
    );
    let Some(first) = expected.iter().zip(found).position(|(e, f)| e != f) else { return Ok(()) };
    let wrong = expected.iter().zip(found).filter(|(e, f)| e != f).count();
    let last = expected.iter().zip(found).rposition(|(e, f)| e != f).unwrap_or(first);
    let mut text = format!(
        "{what}: {wrong} bytes differ, the first at {:#x} and the last at {:#x}\n",
        offset + first as u64,
        offset + last as u64
    );
    let begin = first.saturating_sub(16) & !15;
    for line in (begin..expected.len()).step_by(16).take(8) {
        let end = (line + 16).min(expected.len());
        let at = offset + line as u64;
        if expected[line..end] == found[line..end] {
            text += &format!("    {at:#010x}   {}\n", hex(&expected[line..end]));
        } else {
            text += &format!(
                "  - {at:#010x}   {}\n  + {at:#010x}   {}\n",
                hex(&expected[line..end]),
                hex(&found[line..end])
            );
        }
    }
    bail!("{text}")
}

impl Exerciser {
    fn size(&self) -> u64 {
        self.model.len() as u64
    }

    /// Find out what works here; the file is empty before and after.
    fn probe(work: &WorkDirectory, name: &str, arguments: &Arguments) -> Result<Abilities> {
        let path = work.on(0).join(name);
        let file = File::create_new(&path)?;
        file.set_len(64 << 10)?;
        let mut abilities = Abilities::default();
        abilities.ways.extend([Way::Positioned, Way::Sequential, Way::Vectored, Way::PrivateMapping]);
        let mut missing = Vec::new();
        let direct = work.all().iter().all(|directory| {
            let Ok(fd) = fs::open(directory.join(name), OFlags::RDWR | OFlags::DIRECT, Mode::empty()) else {
                return false;
            };
            File::from(fd).write_at(&PageBuffer::new(PAGE as usize), 0).is_ok()
        });
        if direct && !arguments.no_direct {
            abilities.ways.insert(Way::Direct);
        } else {
            missing.push("O_DIRECT".to_owned());
        }
        let mapped = work.all().iter().all(|directory| {
            let Ok(file) = File::options().read(true).write(true).open(directory.join(name)) else { return false };
            Mapping::new(file.as_fd(), 0, PAGE as usize, true, true).is_ok()
        });
        if mapped && !arguments.no_mmap {
            abilities.ways.insert(Way::SharedMapping);
        } else {
            missing.push("MAP_SHARED".to_owned());
        }
        for kind in ALLOCATIONS {
            match fs::fallocate(&file, kind.flags(), 0, PAGE) {
                Ok(()) => drop(abilities.allocations.insert(kind)),
                Err(Errno::OPNOTSUPP) => missing.push(format!("fallocate {kind:?}")),
                Err(e) => return Err(e).with_context(|| format!("fallocate {kind:?}")),
            }
        }
        let source = File::open(&path)?;
        abilities.copies = fs::copy_file_range(&source, Some(&mut 0), &file, Some(&mut 8192), 100).is_ok();
        if !abilities.copies {
            missing.push("copy_file_range".to_owned());
        }
        if !missing.is_empty() {
            println!("left out, since not possible here: {}", missing.join(", "));
        }
        file.set_len(0)?;
        Ok(abilities)
    }

    fn new(work: &WorkDirectory, arguments: &Arguments) -> Result<Self> {
        let name = "file";
        let abilities = Self::probe(work, name, arguments)?;
        let handles = work
            .all()
            .iter()
            .map(|directory| {
                let map = abilities.ways.contains(&Way::SharedMapping).then_some(arguments.max_size);
                Handles::open(&directory.join(name), map, abilities.ways.contains(&Way::Direct))
            })
            .collect::<Result<_>>()?;
        Ok(Self { abilities, handles, model: Vec::new(), max_size: arguments.max_size, done: 0 })
    }

    fn offset(&self, rng: &mut Rng) -> u64 {
        let anchor = match rng.below(10) {
            0..3 => rng.below(self.max_size),
            3..5 => rng.below(self.max_size / PAGE + 1) * PAGE,
            5..7 => rng.below(self.max_size / CHUNK + 1) * CHUNK,
            7..9 => self.size(),
            _ => 0,
        };
        let nudge = *rng.pick(&[0i64, 0, 0, -1, 1, -8, 7, -512, -(PAGE as i64), 100]);
        anchor.saturating_add_signed(nudge).min(self.max_size - 1)
    }

    fn range(&self, rng: &mut Rng) -> (u64, u64) {
        let offset = self.offset(rng);
        let len = match rng.below(12) {
            0..3 => rng.between(1, 16),
            3..6 => rng.between(1, PAGE + 1),
            6..9 => rng.between(1, 16) * PAGE,
            9..11 => rng.between(1, 200_000),
            _ => rng.between(CHUNK - PAGE, CHUNK + CHUNK / 2),
        };
        (offset, len.min(self.max_size - offset).max(1))
    }

    fn generate(&self, rng: &mut Rng) -> Operation {
        let mount = rng.below(self.handles.len() as u64) as usize;
        let (mut offset, mut len) = self.range(rng);
        let salt = rng.bits();
        let ways: Vec<Way> = self.abilities.ways.iter().copied().collect();
        let way = *rng.pick(&ways);
        match rng.weighted(&[34, 6, 24, 8, 10, 6, 3, 3, 3]) {
            0 => {
                let way = if way == Way::PrivateMapping { Way::Positioned } else { way };
                if way == Way::Direct {
                    offset = offset / PAGE * PAGE;
                    len = len.next_multiple_of(PAGE);
                    if offset + len > self.max_size {
                        len = (self.max_size - offset) / PAGE * PAGE;
                    }
                }
                if way == Way::SharedMapping {
                    offset = if self.size() == 0 { 0 } else { offset % self.size() };
                    len = len.min(self.size() - offset);
                }
                Operation::Write { mount, way, offset, len, salt }
            }
            1 => Operation::Append { mount, len: len.min(self.max_size - self.size()), salt },
            2 => {
                if way == Way::Direct {
                    offset = offset / PAGE * PAGE;
                    len = len.next_multiple_of(PAGE);
                }
                if matches!(way, Way::SharedMapping | Way::PrivateMapping) {
                    offset = if self.size() == 0 { 0 } else { offset % self.size() };
                    len = len.min(self.size() - offset);
                }
                Operation::Read { mount, way, offset, len }
            }
            3 => {
                Operation::Truncate { mount, size: if rng.percent(10) { 0 } else { offset }, by_path: rng.percent(30) }
            }
            4 if !self.abilities.allocations.is_empty() => {
                let kinds: Vec<Allocation> = self.abilities.allocations.iter().copied().collect();
                Operation::Allocate { mount, kind: *rng.pick(&kinds), offset, len }
            }
            5 if self.abilities.copies => {
                let to = self.offset(rng);
                let mut len = len.min(self.max_size - to);
                // Overlapping ranges are refused by the kernel, and not interesting.
                len = len.min(offset.abs_diff(to));
                Operation::Copy {
                    from_mount: mount,
                    to_mount: rng.below(self.handles.len() as u64) as usize,
                    from: offset,
                    to,
                    len,
                }
            }
            6 => Operation::Sync { mount, data_only: rng.percent(50) },
            7 => Operation::Reopen { mount },
            _ => Operation::SeekWalk { mount },
        }
    }

    fn put(&mut self, offset: u64, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        let end = offset as usize + bytes.len();
        if end > self.model.len() {
            self.model.resize(end, 0);
        }
        self.model[offset as usize..end].copy_from_slice(bytes);
    }

    fn expected(&self, offset: u64, len: u64) -> &[u8] {
        let size = self.size();
        &self.model[offset.min(size) as usize..(offset + len).min(size) as usize]
    }

    fn read_positioned(file: &File, offset: u64, len: u64) -> Result<Vec<u8>> {
        let mut bytes = vec![0xA5; len as usize];
        let mut done = 0;
        while done < bytes.len() {
            match file.read_at(&mut bytes[done..], offset + done as u64)? {
                0 => break,
                n => done += n,
            }
        }
        bytes.truncate(done);
        Ok(bytes)
    }

    fn write(&mut self, mount: usize, way: Way, offset: u64, len: u64, salt: u64) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        let bytes = fill(salt, len);
        let handles = &mut self.handles[mount];
        let written = match way {
            Way::Positioned | Way::PrivateMapping => handles.file.write_at(&bytes, offset)?,
            Way::Sequential => {
                handles.file.seek(std::io::SeekFrom::Start(offset))?;
                let n = handles.file.write(&bytes)?;
                ensure!(handles.file.stream_position()? == offset + n as u64, "the offset is wrong after write");
                n
            }
            Way::Vectored => {
                handles.file.seek(std::io::SeekFrom::Start(offset))?;
                let (one, two) = bytes.split_at(bytes.len() / 3);
                handles.file.write_vectored(&[IoSlice::new(one), IoSlice::new(two)])?
            }
            Way::Direct => {
                let mut buffer = PageBuffer::new(bytes.len());
                buffer.copy_from_slice(&bytes);
                handles.direct.as_ref().context("no direct handle")?.write_at(&buffer, offset)?
            }
            Way::SharedMapping => {
                // A replayed file may have been shortened by hand: stay inside.
                if offset + len > self.model.len() as u64 {
                    return Ok(());
                }
                handles.mapped()?.write(offset as usize, &bytes);
                bytes.len()
            }
        };
        ensure!(written == bytes.len(), "{written} of {len} bytes written");
        self.put(offset, &bytes);
        Ok(())
    }

    fn read(&mut self, mount: usize, way: Way, offset: u64, len: u64) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        let size = self.size();
        let handles = &mut self.handles[mount];
        let found = match way {
            Way::Positioned => Self::read_positioned(&handles.file, offset, len)?,
            Way::Sequential => {
                handles.file.seek(std::io::SeekFrom::Start(offset))?;
                let mut bytes = Vec::new();
                (&mut handles.file).take(len).read_to_end(&mut bytes)?;
                bytes
            }
            Way::Vectored => {
                handles.file.seek(std::io::SeekFrom::Start(offset))?;
                let (mut one, mut two) = (vec![0; (len / 3) as usize], vec![0; (len - len / 3) as usize]);
                let n = handles.file.read_vectored(&mut [IoSliceMut::new(&mut one), IoSliceMut::new(&mut two)])?;
                let mut bytes = [one, two].concat();
                bytes.truncate(n);
                bytes
            }
            Way::Direct => {
                let mut buffer = PageBuffer::new(len as usize);
                let n = handles.direct.as_ref().context("no direct handle")?.read_at(&mut buffer, offset)?;
                buffer[..n].to_vec()
            }
            Way::SharedMapping | Way::PrivateMapping => {
                if offset + len > size {
                    return Ok(());
                }
                let mut bytes = vec![0; len as usize];
                if way == Way::SharedMapping {
                    handles.mapped()?.read(offset as usize, &mut bytes);
                } else {
                    let start = offset / PAGE * PAGE;
                    handles.file.metadata()?;
                    let mapping =
                        Mapping::new(handles.file.as_fd(), start, (offset + len - start) as usize, false, true)?;
                    mapping.read((offset - start) as usize, &mut bytes);
                    // Private: must reach nobody.
                    mapping.write((offset - start) as usize, &[0x5A]);
                }
                bytes
            }
        };
        compare(self.expected(offset, len), &found, offset, &format!("read ({way:?}) through mount {mount}"))
    }

    fn seek_walk(&self, mount: usize) -> Result<()> {
        let (file, size) = (&self.handles[mount].file, self.size());
        let mut at = 0;
        loop {
            let data = match fs::seek(file, SeekFrom::Data(at)) {
                Ok(data) => data,
                Err(Errno::NXIO) => size,
                Err(e) => return Err(e).context("SEEK_DATA"),
            };
            ensure!(data >= at && data <= size.max(at), "SEEK_DATA from {at} says {data}, size {size}");
            if let Some(n) = self.model[at as usize..data as usize].iter().position(|b| *b != 0) {
                bail!("SEEK_DATA from {at} on mount {mount} says {data}, but there is data at {}", at + n as u64);
            }
            if data >= size {
                return Ok(());
            }
            let hole = fs::seek(file, SeekFrom::Hole(data)).context("SEEK_HOLE")?;
            ensure!(hole > data && hole <= size, "SEEK_HOLE from {data} says {hole}, size {size}");
            at = hole;
            if at >= size {
                return Ok(());
            }
        }
    }

    fn compare_all(&self) -> Result<()> {
        for (mount, handles) in self.handles.iter().enumerate() {
            let found = Self::read_positioned(&handles.file, 0, self.size() + PAGE)?;
            compare(&self.model, &found, 0, &format!("the whole file through mount {mount}"))?;
            let blocks = handles.file.metadata()?.blocks();
            ensure!(
                blocks * 512 <= self.max_size + BLOCKS_SLACK,
                "{blocks} blocks for at most {} bytes",
                self.max_size
            );
        }
        Ok(())
    }

    /// Size through two mounts and bytes around the range through another one.
    fn look(&self, mount: usize, range: Option<(u64, u64)>) -> Result<()> {
        let other = (mount + 1 + self.done as usize % self.handles.len().max(2).saturating_sub(1)) % self.handles.len();
        for seen in [mount, other] {
            let by_handle = self.handles[seen].file.metadata()?.len();
            ensure!(
                by_handle == self.size(),
                "fstat through mount {seen} says size {by_handle}, expected {}",
                self.size()
            );
            let by_path = std::fs::metadata(&self.handles[seen].path)?.len();
            ensure!(by_path == self.size(), "stat through mount {seen} says size {by_path}, expected {}", self.size());
        }
        if let Some((offset, len)) = range {
            let from = offset.saturating_sub(SURROUNDINGS);
            let len = offset + len + SURROUNDINGS - from;
            let found = Self::read_positioned(&self.handles[other].file, from, len)?;
            compare(self.expected(from, len), &found, from, &format!("afterwards, through mount {other}"))?;
        }
        Ok(())
    }

    /// Carry out one operation on file and model, and look.
    fn carry_out(&mut self, operation: &Operation) -> Result<()> {
        self.done += 1;
        let (mount, range) = match *operation {
            Operation::Write { mount, way, offset, len, salt } => {
                self.write(mount, way, offset, len, salt)?;
                (mount, Some((offset, len)))
            }
            Operation::Append { mount, len, salt } => {
                let bytes = fill(salt, len);
                let at = self.size();
                let written = self.handles[mount].appending.write(&bytes)?;
                ensure!(written == bytes.len(), "{written} of {len} bytes appended");
                self.put(at, &bytes);
                (mount, Some((at, len)))
            }
            Operation::Read { mount, way, offset, len } => {
                self.read(mount, way, offset, len)?;
                (mount, None)
            }
            Operation::Truncate { mount, size, by_path } => {
                if by_path {
                    nix::unistd::truncate(&self.handles[mount].path, size as i64)?;
                } else {
                    self.handles[mount].file.set_len(size)?;
                }
                let from = size.min(self.size());
                self.model.resize(size as usize, 0);
                (mount, Some((from, size - from)))
            }
            Operation::Allocate { mount, kind, offset, len } => {
                fs::fallocate(&self.handles[mount].file, kind.flags(), offset, len)?;
                let end = offset + len;
                if matches!(kind, Allocation::Plain | Allocation::Zero) && end > self.size() {
                    self.model.resize(end as usize, 0);
                }
                if matches!(kind, Allocation::Punch | Allocation::Zero | Allocation::ZeroKeepSize) {
                    let end = end.min(self.size());
                    if offset < end {
                        self.model[offset as usize..end as usize].fill(0);
                    }
                }
                (mount, Some((offset, len)))
            }
            Operation::Copy { from_mount, to_mount, from, to, len } => {
                let bytes = self.expected(from, len).to_vec();
                // As cp does; see `Handles::mapped`.
                self.handles[from_mount].file.metadata()?;
                let mut done = 0;
                while done < bytes.len() as u64 {
                    let (mut source, mut target) = (from + done, to + done);
                    let (files, left) = (&self.handles, bytes.len() - done as usize);
                    match fs::copy_file_range(
                        &files[from_mount].file,
                        Some(&mut source),
                        &files[to_mount].file,
                        Some(&mut target),
                        left,
                    ) {
                        // Between two mounts the kernel may refuse.
                        Err(Errno::XDEV) if done == 0 => return Ok(()),
                        Err(e) => return Err(e).context("copy_file_range"),
                        Ok(0) => bail!("copy_file_range ended after {done} of {} bytes", bytes.len()),
                        Ok(n) => done += n as u64,
                    }
                }
                self.put(to, &bytes);
                (to_mount, Some((to, len)))
            }
            Operation::Sync { mount, data_only } => {
                let handles = &self.handles[mount];
                if data_only {
                    handles.file.sync_data()?
                } else {
                    handles.file.sync_all()?
                }
                if let Some(mapping) = &handles.mapping {
                    mapping.sync().context("msync")?;
                }
                (mount, None)
            }
            Operation::Reopen { mount } => {
                let old = &self.handles[mount];
                let map = old.mapping.is_some().then_some(self.max_size);
                let new = Handles::open(&old.path, map, old.direct.is_some())?;
                self.handles[mount] = new;
                (mount, Some((0, PAGE)))
            }
            Operation::SeekWalk { mount } => {
                self.seek_walk(mount)?;
                (mount, None)
            }
            Operation::CompareAll => {
                self.compare_all()?;
                (0, None)
            }
        };
        self.look(mount, range)
    }
}

fn run(arguments: &Arguments) -> Result<bool> {
    let mounts = Mounts::new(&arguments.mounts)?;
    ensure!(arguments.max_size >= 4 * PAGE, "--max-size is below four pages");
    let seed = seed_or_clock(arguments.seed);
    let watchdog = Watchdog::ending_the_program(arguments.stall_seconds);
    let mut work = mounts.work_directory(&format!("exerciser-{seed}-{}", std::process::id()))?;
    let mut exerciser = Exerciser::new(&work, arguments)?;
    let replayed: Option<Vec<Operation>> = match &arguments.replay {
        Some(path) => Some(
            BufReader::new(File::open(path)?)
                .lines()
                .map(|line| Ok(serde_json::from_str(&line?)?))
                .collect::<Result<_>>()?,
        ),
        None => None,
    };
    println!("seed {seed}");
    let total = replayed.as_ref().map_or(arguments.operations, |r| r.len() as u64);
    let mut progress = Progress::new("operations", total);
    let mut rng = Rng::new(seed);
    let mut history: Vec<Operation> = Vec::new();
    for number in 0..total {
        let operation = match &replayed {
            Some(operations) => operations[number as usize].clone(),
            None if number % FULL_CHECK_EVERY == FULL_CHECK_EVERY - 1 || number + 1 == total => Operation::CompareAll,
            None => exerciser.generate(&mut rng),
        };
        history.push(operation.clone());
        let outcome = watchdog.during(format!("operation {number}: {operation:?}"), || exerciser.carry_out(&operation));
        if let Err(error) = outcome {
            drop(progress);
            println!("FAIL at operation {number}: {operation:?}\n{error:#}\n\nthe last operations:");
            for (n, operation) in history.iter().enumerate().skip(history.len().saturating_sub(arguments.last)) {
                println!("{n:>7}  {operation:?}");
            }
            let path = std::env::temp_dir().join(format!("verbfs-exerciser-{seed}.operations"));
            let mut file = File::create(&path)?;
            for operation in &history {
                serde_json::to_writer(&mut file, operation)?;
                file.write_all(b"\n")?;
            }
            let mounts: Vec<String> = arguments.mounts.iter().map(|m| format!("--mount {}", m.display())).collect();
            let mounts = mounts.join(" ");
            println!(
                "\nagain:  verbfs-exerciser {mounts} --seed {seed} --operations {} --max-size {}",
                arguments.operations, arguments.max_size
            );
            println!("replay: verbfs-exerciser {mounts} --max-size {} --replay {}", arguments.max_size, path.display());
            if arguments.keep {
                work.keep();
                println!("kept:   {}", work.on(0).display());
            }
            return Ok(false);
        }
        progress.step();
    }
    drop(progress);
    println!("ok: {total} operations through {} mounts, final size {}", arguments.mounts.len(), exerciser.size());
    Ok(true)
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("verbfs-exerciser: {error:#}");
            ExitCode::from(3)
        }
    }
}
