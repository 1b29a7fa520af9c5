//! A client process: makes calls, one after the other, and reports each with its times.

use super::*;
use crate::clock::now;
use crate::history::{Call, Op};
use crate::model::data::DataOp;
use crate::model::locks::{LockOp, Mode, Outcome, UNITS};
use crate::model::names::{NameOp, RenameKind, Seen, Thing};
use crate::model::words::{Via, WordOp};
use crate::pattern;
use crate::rng::Rng;
use crate::sys::{self, Mapping, PageBuffer};
use crate::watchdog::{Stall, Watchdog};
use anyhow::{Context, Result, anyhow};
use rustix::fs::{self, AtFlags, FallocateFlags, Mode as FileMode, OFlags, RenameFlags};
use rustix::io::Errno;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::Duration;

/// Makes calls, times them, and sends them to the driver.
struct Recorder {
    config: ClientConfig,
    watchdog: Watchdog,
    rng: Rng,
    /// Number of the next write; with the client's number it makes values unique.
    next_tag: u32,
    calls: Vec<Message>,
}

fn send(messages: &[Message]) {
    let mut bytes = Vec::new();
    for message in messages {
        serde_json::to_writer(&mut bytes, message).expect("messages are plain data");
        bytes.push(b'\n');
    }
    // The driver went away: nobody needs this process.
    if std::io::stdout().lock().write_all(&bytes).is_err() {
        std::process::exit(0);
    }
}

/// Messages are sent in groups of this many, so that sending does not space out the calls.
const GROUP: usize = 32;

impl Recorder {
    /// Make one call. `what` names it before its result is known.
    fn call(&mut self, what: String, body: impl FnOnce() -> Op) {
        // A random pause in half of the cases, so that calls of all clients meet in all phases.
        if self.rng.percent(50) {
            let pause = self.rng.below(60);
            std::thread::sleep(Duration::from_micros(pause));
        }
        let start = self.watchdog.begin(what);
        let dilate = self.config.dilate;
        let mut lag = || {
            if dilate > 0 {
                std::thread::sleep(Duration::from_micros(self.rng.below(dilate)));
            }
        };
        lag();
        let op = body();
        lag();
        let end = now();
        self.watchdog.end();
        let call = Call { client: self.config.client, mount: self.config.mount, start, end: Some(end), op };
        self.calls.push(Message::Call(call));
        if self.calls.len() >= GROUP {
            self.flush();
        }
    }

    fn flush(&mut self) {
        send(&self.calls);
        self.calls.clear();
    }

    fn tag(&mut self) -> u32 {
        self.next_tag += 1;
        (self.config.client + 1) << 24 | self.next_tag
    }
}

/// The whole life of a client process.
pub fn main(config: &str) -> Result<()> {
    let config: ClientConfig = serde_json::from_str(config)?;
    let (client, mount) = (config.client, config.mount);
    let watchdog = Watchdog::start(config.stall_seconds, move |stall| {
        let Stall { call, seconds, kernel } = stall;
        send(&[Message::Stalled { client, mount, call, seconds, kernel }]);
    });
    let rng = Rng::new(config.seed).fork(config.client as u64);
    let recorder = Recorder { config: config.clone(), watchdog, rng, next_tag: 0, calls: Vec::new() };
    match config.family {
        Family::Data => data(recorder),
        Family::Names => names(recorder),
        Family::Mmap => mmap(recorder),
        Family::Locks => locks(recorder),
    }
}

/// Tell the driver that all is open, and wait until every client is.
fn start() -> Result<()> {
    send(&[Message::Ready]);
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).context("wait for the start")?;
    Ok(())
}

fn finish(mut recorder: Recorder) -> Result<()> {
    recorder.calls.push(Message::Finished);
    recorder.flush();
    Ok(())
}

fn unexpected(what: impl std::fmt::Display, error: impl std::fmt::Display) -> Op {
    Op::Unexpected { what: format!("{what}: {error}") }
}

/// A place and length for file `file`, of one of the shapes that break caches: within a page, across two pages, several
/// pages, across the 1 MiB boundary, large.
pub fn data_range(rng: &mut Rng, file: u32, max_io: u64) -> (u64, u64) {
    const PAGE: u64 = 4096;
    const MIB: u64 = 1 << 20;
    let (offset, len) = match (file, rng.below(100)) {
        (1, 0..40) => (MIB - *rng.pick(&[8, 512, PAGE, 2 * PAGE]), *rng.pick(&[16, 1024, 2 * PAGE, 3 * PAGE])),
        (1, 40..75) => (MIB + *rng.pick(&[0, 8, PAGE]) - *rng.pick(&[0, PAGE]), *rng.pick(&[8, 512, PAGE])),
        (1, 75..90) => (MIB - *rng.pick(&[PAGE, 64 * 1024]), *rng.pick(&[128 * 1024, 2 * PAGE])),
        (1, _) => (*rng.pick(&[0, MIB / 2, MIB - PAGE]), *rng.pick(&[MIB / 4, MIB])),
        (_, 0..35) => (rng.below(4) * 1024, *rng.pick(&[8, 512, 1024])),
        (_, 35..60) => (PAGE * rng.between(1, 3) - *rng.pick(&[8, 64, 512]), *rng.pick(&[16, 128, 1024])),
        _ => (PAGE * rng.below(4), PAGE * rng.between(1, 4)),
    };
    (offset, len.min(max_io).max(8))
}

/// The file that is appended to is cut more often above this size.
const APPENDED_LIMIT: u64 = 64 << 10;
/// A look at the end of that file takes this many bytes around the size last known.
const TAIL: u64 = 48 << 10;

fn data(mut r: Recorder) -> Result<()> {
    let path = |file: u32| r.config.directory.join(format!("f{file}"));
    let open = |flags: OFlags, file: u32| -> Result<File> {
        let fd = fs::open(path(file), flags, FileMode::empty()).with_context(|| format!("open f{file}"))?;
        Ok(File::from(fd))
    };
    let files: Vec<File> = (0..DATA_FILES).map(|f| open(OFlags::RDWR, f)).collect::<Result<_>>()?;
    let appending: Vec<File> =
        (0..DATA_FILES).map(|f| open(OFlags::WRONLY | OFlags::APPEND, f)).collect::<Result<_>>()?;
    let paths: Vec<_> = (0..DATA_FILES).map(path).collect();
    let mut buffer = PageBuffer::new(1 << 20);
    let max_io = r.config.max_io.min(1 << 20) & !7;
    // The size of each file as this client last knew it: appended bytes are looked for where they must be. Orders
    // of appends that nobody looks at would also multiply the explanations the checker has to keep.
    let mut known = [0u64; DATA_FILES as usize];
    start()?;
    for _ in 0..r.config.operations {
        let file = r.rng.weighted(&[5, 3, 4]) as u32;
        let (mut offset, mut len) = data_range(&mut r.rng, file, max_io);
        let handle = &files[file as usize];
        let size = &mut known[file as usize];
        // Of: pread, pwrite, append, ftruncate, punch, fstat, stat.
        let mut weights: [u64; 7] = match file {
            2 => [30, 10, 25, 6, 2, 12, 8],
            _ => [45, 35, 0, 3, 4, 5, 4],
        };
        if !r.config.stat {
            weights[5..].fill(0);
        }
        if !r.config.punch {
            weights[4] = 0;
        }
        if *size > APPENDED_LIMIT && file != 1 {
            weights[3] = 40;
        }
        match r.rng.weighted(&weights) {
            0 => {
                if file == 2 && r.rng.percent(60) {
                    offset = size.saturating_sub(TAIL / 2) & !7;
                    len = TAIL.min(max_io);
                }
                let bytes = &mut buffer[..len as usize];
                r.call(format!("file{file} pread({offset}, {len})"), || match handle.read_at(bytes, offset) {
                    Ok(n) => {
                        *size = if (n as u64) < len && n > 0 { offset + n as u64 } else { *size };
                        let got = pattern::decode(&bytes[..n], offset);
                        Op::Data { file, op: DataOp::Read { offset, len, got } }
                    }
                    Err(e) => unexpected("pread", e),
                });
            }
            1 => {
                let tag = r.tag();
                let bytes = &mut buffer[..len as usize];
                pattern::fill(bytes, offset, tag);
                r.call(format!("file{file} pwrite({offset}, {len})"), || match handle.write_at(bytes, offset) {
                    Ok(n) if n as u64 == len => Op::Data { file, op: DataOp::Write { offset, len, tag } },
                    Ok(n) => unexpected("pwrite", format!("wrote {n} of {len} at {offset} of file{file}")),
                    Err(e) => unexpected("pwrite", e),
                });
            }
            2 => {
                let len = (*r.rng.pick(&[8, 24, 512, 4096, 5000])).min(max_io);
                let tag = r.tag();
                let bytes = &mut buffer[..len as usize];
                bytes.chunks_exact_mut(8).for_each(|w| w.copy_from_slice(&pattern::floating_word(tag)));
                r.call(format!("file{file} append({len})"), || match (&appending[file as usize]).write(bytes) {
                    Ok(n) if n as u64 == len => {
                        *size += len;
                        Op::Data { file, op: DataOp::Append { len, tag } }
                    }
                    Ok(n) => unexpected("append", format!("wrote {n} of {len} of file{file}")),
                    Err(e) => unexpected("append", e),
                });
            }
            3 => {
                let new = *r.rng.pick(&[0, 8, 4000, 4096, 8192, 10_000, 16_384]);
                let new = if file == 1 { new + (1 << 20) - 8192 } else { new };
                r.call(format!("file{file} ftruncate({new})"), || match fs::ftruncate(handle, new) {
                    Ok(()) => {
                        *size = new;
                        Op::Data { file, op: DataOp::Truncate { size: new } }
                    }
                    Err(e) => unexpected("ftruncate", e),
                });
            }
            4 => {
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                r.call(format!("file{file} punch({offset}, {len})"), || {
                    match fs::fallocate(handle, flags, offset, len) {
                        Ok(()) => Op::Data { file, op: DataOp::Punch { offset, len } },
                        Err(e) => unexpected("punch", e),
                    }
                });
            }
            6 => {
                let path = &paths[file as usize];
                r.call(format!("file{file} stat"), || match std::fs::metadata(path) {
                    Ok(m) => {
                        *size = m.size();
                        Op::Data { file, op: DataOp::Size { size: m.size(), by_name: true } }
                    }
                    Err(e) => unexpected("stat", e),
                });
            }
            _ => {
                r.call(format!("file{file} fstat"), || match handle.metadata() {
                    Ok(m) => {
                        *size = m.size();
                        Op::Data { file, op: DataOp::Size { size: m.size(), by_name: false } }
                    }
                    Err(e) => unexpected("fstat", e),
                });
            }
        }
    }
    finish(r)
}

fn mmap(mut r: Recorder) -> Result<()> {
    let fd = fs::open(r.config.directory.join(MAPPED_FILE), OFlags::RDWR, FileMode::empty())?;
    let len = (MAPPED_PAGES * 4096) as usize;
    let mapping = match Mapping::new(fd.as_fd(), 0, len, true, true) {
        Ok(mapping) => mapping,
        Err(e) if matches!(sys::errno(&e), libc::ENODEV | libc::EINVAL | libc::EOPNOTSUPP) => {
            send(&[Message::Unsupported(format!("mmap(MAP_SHARED): {e}"))]);
            return Ok(());
        }
        Err(e) => return Err(anyhow!("mmap(MAP_SHARED): {e}")),
    };
    let file = File::from(fd);
    start()?;
    for _ in 0..r.config.operations {
        let word = *r.rng.pick(&MAPPED_WORDS);
        let tag_of = |value: u64| pattern::decode_word(value, word);
        match r.rng.weighted(&[45, 30, 12, 8, 1]) {
            0 => r.call(format!("word{word} load"), || {
                let tag = tag_of(mapping.load(word as usize));
                Op::Word { word, op: WordOp::Load { tag, via: Via::Mapping } }
            }),
            1 => {
                let tag = r.tag();
                r.call(format!("word{word} store"), || {
                    mapping.store(word as usize, pattern::encode_word(tag, word));
                    Op::Word { word, op: WordOp::Store { tag, via: Via::Mapping } }
                });
            }
            2 => r.call(format!("word{word} pread"), || {
                let mut bytes = [0; 8];
                match file.read_exact_at(&mut bytes, word * 8) {
                    Ok(()) => {
                        let tag = tag_of(u64::from_le_bytes(bytes));
                        Op::Word { word, op: WordOp::Load { tag, via: Via::Call } }
                    }
                    Err(e) => unexpected("pread of a word", e),
                }
            }),
            3 => {
                let tag = r.tag();
                let bytes = pattern::encode_word(tag, word).to_le_bytes();
                r.call(format!("word{word} pwrite"), || match file.write_all_at(&bytes, word * 8) {
                    Ok(()) => Op::Word { word, op: WordOp::Store { tag, via: Via::Call } },
                    Err(e) => unexpected("pwrite of a word", e),
                });
            }
            // Not part of the history: write-back must simply not disturb it.
            _ => {
                let _ = mapping.sync();
            }
        }
    }
    finish(r)
}

/// Result number of a call: 0 or the error.
fn result<T>(r: Result<T, Errno>) -> i32 {
    match r {
        Ok(_) => 0,
        Err(e) => e.raw_os_error(),
    }
}

fn names(mut r: Recorder) -> Result<()> {
    let root: OwnedFd = fs::open(&r.config.directory, OFlags::DIRECTORY | OFlags::PATH, FileMode::empty())?;
    let root = root.as_fd();
    let slots = DIRECTORIES * NAMES;
    let mode = FileMode::from_raw_mode(0o755);
    start()?;
    for _ in 0..r.config.operations {
        let slot = r.rng.below(slots as u64) as usize;
        let other = (slot + 1 + r.rng.below(slots as u64 - 1) as usize) % slots;
        let path = slot_path(slot);
        let other_path = slot_path(other);
        match r.rng.weighted(&[14, 8, 5, 4, 6, 6, 9, 5, 4, 9, 18, 10]) {
            0 => r.call(format!("create {path}"), || {
                let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR;
                match fs::openat(root, &path, flags, mode) {
                    Ok(fd) => match fs::fstat(&fd) {
                        Ok(s) => Op::Name(NameOp::Make { slot, thing: Thing::File(s.st_ino), result: 0 }),
                        Err(e) => unexpected("fstat of a new file", e),
                    },
                    Err(e) => Op::Name(NameOp::Make { slot, thing: Thing::File(0), result: e.raw_os_error() }),
                }
            }),
            1 => r.call(format!("open {path}"), || {
                let seen = match fs::openat(root, &path, OFlags::RDONLY | OFlags::NOFOLLOW, mode) {
                    Ok(fd) => match fs::fstat(&fd) {
                        Ok(s) if s.st_mode & libc::S_IFMT == libc::S_IFDIR => Seen::Directory,
                        Ok(s) => Seen::File(s.st_ino),
                        Err(e) => return unexpected("fstat of an open file", e),
                    },
                    Err(Errno::NOENT) => Seen::Absent,
                    Err(Errno::LOOP) => Seen::Link,
                    // Looked up, and gone from all nodes before it was opened, twice in a row: the kernel tries once more.
                    Err(Errno::STALE) => Seen::Present,
                    Err(e) => return unexpected("open", e),
                };
                Op::Name(NameOp::See { slot, seen, how: "open".to_owned() })
            }),
            2 => r.call(format!("open O_CREAT {path}"), || {
                match fs::openat(root, &path, OFlags::CREATE | OFlags::RDWR | OFlags::NOFOLLOW, mode) {
                    Ok(fd) => match fs::fstat(&fd) {
                        Ok(s) => Op::Name(NameOp::OpenCreate { slot, inode: s.st_ino, result: 0 }),
                        Err(e) => unexpected("fstat of an open file", e),
                    },
                    Err(e) => Op::Name(NameOp::OpenCreate { slot, inode: 0, result: e.raw_os_error() }),
                }
            }),
            3 => {
                let id = r.tag() as u64;
                r.call(format!("mkdir {path}"), || {
                    let result = result(fs::mkdirat(root, &path, mode));
                    Op::Name(NameOp::Make { slot, thing: Thing::Directory(id), result })
                });
            }
            4 => {
                let id = r.tag() as u64;
                r.call(format!("symlink {path}"), || {
                    let result = result(fs::symlinkat(format!("target-{id}"), root, &path));
                    Op::Name(NameOp::Make { slot, thing: Thing::Link(id), result })
                });
            }
            5 => r.call(format!("readlink {path}"), || {
                let seen = match fs::readlinkat(root, &path, Vec::new()) {
                    Ok(target) => match target.to_str().ok().and_then(|t| t.strip_prefix("target-")?.parse().ok()) {
                        Some(id) => Seen::LinkTo(id),
                        None => return unexpected("readlink", format!("strange target {target:?}")),
                    },
                    Err(Errno::NOENT) => Seen::Absent,
                    Err(Errno::INVAL) => Seen::NotLink,
                    Err(Errno::STALE) => Seen::Present,
                    Err(e) => return unexpected("readlink", e),
                };
                Op::Name(NameOp::See { slot, seen, how: "readlink".to_owned() })
            }),
            6 => r.call(format!("unlink {path}"), || {
                Op::Name(NameOp::Unlink { slot, result: result(fs::unlinkat(root, &path, AtFlags::empty())) })
            }),
            7 => r.call(format!("rmdir {path}"), || {
                Op::Name(NameOp::Rmdir { slot, result: result(fs::unlinkat(root, &path, AtFlags::REMOVEDIR)) })
            }),
            8 => r.call(format!("link {path} {other_path}"), || {
                let result = result(fs::linkat(root, &path, root, &other_path, AtFlags::empty()));
                Op::Name(NameOp::Link { from: slot, to: other, result })
            }),
            9 => {
                let directory = slot / NAMES;
                r.call(format!("readdir d{directory}"), || {
                    let entries = match std::fs::read_dir(format!("/proc/self/fd/{}/d{directory}", raw(root))) {
                        Ok(entries) => entries,
                        Err(e) => return unexpected("opendir", e),
                    };
                    let mut listed: Vec<(usize, bool)> =
                        (directory * NAMES..(directory + 1) * NAMES).map(|slot| (slot, false)).collect();
                    for entry in entries {
                        let name = match entry {
                            Ok(entry) => entry.file_name().into_string().unwrap_or_default(),
                            Err(e) => return unexpected("readdir", e),
                        };
                        match name.strip_prefix('n').and_then(|n| n.parse::<usize>().ok()) {
                            Some(n) if n < NAMES => listed[n].1 = true,
                            _ => return unexpected("readdir", format!("name {name:?} was never made")),
                        }
                    }
                    Op::Name(NameOp::Readdir { directory, listed })
                });
            }
            10 => {
                let kind =
                    *r.rng.pick(&[RenameKind::Plain, RenameKind::Plain, RenameKind::NoReplace, RenameKind::Exchange]);
                let flags = match kind {
                    RenameKind::Plain => RenameFlags::empty(),
                    RenameKind::NoReplace => RenameFlags::NOREPLACE,
                    RenameKind::Exchange => RenameFlags::EXCHANGE,
                };
                r.call(format!("rename {kind:?} {path} {other_path}"), || {
                    let result = result(fs::renameat_with(root, &path, root, &other_path, flags));
                    Op::Name(NameOp::Rename { from: slot, to: other, kind, result })
                });
            }
            _ => r.call(format!("stat {path}"), || {
                let seen = match fs::statat(root, &path, AtFlags::SYMLINK_NOFOLLOW) {
                    Ok(s) => match s.st_mode & libc::S_IFMT {
                        libc::S_IFDIR => Seen::Directory,
                        libc::S_IFLNK => Seen::Link,
                        _ => Seen::File(s.st_ino),
                    },
                    Err(Errno::NOENT) => Seen::Absent,
                    // A directory moved by another mount, during a rename on this one (see `model::names`); or what was looked
                    // up was gone from all nodes before its attributes were asked for, twice in a row.
                    Err(Errno::STALE) => Seen::Present,
                    Err(e) => return unexpected("stat", e),
                };
                Op::Name(NameOp::See { slot, seen, how: "stat".to_owned() })
            }),
        }
    }
    finish(r)
}

fn raw(fd: impl AsFd) -> i32 {
    use std::os::fd::AsRawFd;
    fd.as_fd().as_raw_fd()
}

fn locks(mut r: Recorder) -> Result<()> {
    let path = r.config.directory.join(LOCKED_FILE);
    let fd = fs::open(&path, OFlags::RDWR, FileMode::empty())?;
    let whole = fs::open(&path, OFlags::RDWR, FileMode::empty())?;
    let client = r.config.client;
    let mut held = [Mode::Free; UNITS];
    let mut flocked = Mode::Free;
    start()?;
    let flock = |operation: fs::FlockOperation| fs::flock(&whole, operation);
    let mut round = 0;
    loop {
        let nothing_held = flocked == Mode::Free && held.iter().all(|m| *m == Mode::Free);
        // Every unlock must be in the history, so nothing is left to the end of the process.
        if round >= r.config.operations && nothing_held {
            break;
        }
        round += 1;
        let last = round >= r.config.operations;
        let from = r.rng.below(UNITS as u64) as usize;
        let to = if r.rng.percent(15) {
            UNITS
        } else {
            r.rng.between(from as u64 + 1, (from as u64 + 2).min(UNITS as u64)) as usize
        };
        let mode = *r.rng.pick(&[Mode::Shared, Mode::Exclusive]);
        let kind = match mode {
            Mode::Shared => libc::F_RDLCK,
            _ => libc::F_WRLCK,
        };
        let (offset, len) = (from as u64 * LOCK_UNIT, if to == UNITS { 0 } else { (to - from) as u64 * LOCK_UNIT });
        let op =
            |mode: Mode, outcome: Outcome| Op::Lock { flock: false, op: LockOp { client, from, to, mode, outcome } };
        let whole_op = |mode: Mode, outcome: Outcome| Op::Lock {
            flock: true,
            op: LockOp { client, from: 0, to: UNITS, mode, outcome },
        };
        // Who waits holds nothing, so waiting never becomes a deadlock; and no lock is kept for long.
        let release = !nothing_held && (last || r.rng.percent(45));
        if release && flocked != Mode::Free {
            r.call("flock unlock".to_owned(), || match flock(fs::FlockOperation::Unlock) {
                Ok(()) => whole_op(Mode::Free, Outcome::Granted),
                Err(e) => unexpected("flock unlock", e),
            });
            flocked = Mode::Free;
        } else if release {
            let (from, to) = if last || r.rng.percent(60) { (0, UNITS) } else { (from, to) };
            let len = if to == UNITS { 0 } else { (to - from) as u64 * LOCK_UNIT };
            r.call(format!("fcntl unlock {from}..{to}"), || {
                let mut lock = sys::record(libc::F_UNLCK, from as u64 * LOCK_UNIT, len);
                match sys::fcntl_lock(&fd, libc::F_SETLK, &mut lock) {
                    Ok(()) => {
                        let op = LockOp { client, from, to, mode: Mode::Free, outcome: Outcome::Granted };
                        Op::Lock { flock: false, op }
                    }
                    Err(e) => unexpected("fcntl unlock", e),
                }
            });
            held[from..to].fill(Mode::Free);
        } else if nothing_held && r.rng.percent(25) {
            if r.rng.percent(70) {
                r.call(format!("F_SETLKW {mode:?} {from}..{to}"), || {
                    let mut lock = sys::record(kind, offset, len);
                    match sys::fcntl_lock(&fd, libc::F_SETLKW, &mut lock) {
                        Ok(()) => op(mode, Outcome::GrantedBlocking),
                        Err(e) => unexpected("F_SETLKW", e),
                    }
                });
                held[from..to].fill(mode);
            } else {
                let operation = match mode {
                    Mode::Shared => fs::FlockOperation::LockShared,
                    _ => fs::FlockOperation::LockExclusive,
                };
                r.call(format!("flock {mode:?}"), || match flock(operation) {
                    Ok(()) => whole_op(mode, Outcome::GrantedBlocking),
                    Err(e) => unexpected("flock", e),
                });
                flocked = mode;
            }
        } else if r.rng.percent(15) {
            r.call(format!("F_GETLK {mode:?} {from}..{to}"), || {
                let mut lock = sys::record(kind, offset, len);
                match sys::fcntl_lock(&fd, libc::F_GETLK, &mut lock) {
                    Ok(()) if lock.l_type == libc::F_UNLCK as i16 => op(mode, Outcome::WouldGrant),
                    Ok(()) => op(mode, Outcome::WouldRefuse),
                    Err(e) => unexpected("F_GETLK", e),
                }
            });
        } else if flocked == Mode::Free && r.rng.percent(25) {
            // flock converts a lock by dropping it first: only taken anew here.
            let operation = match mode {
                Mode::Shared => fs::FlockOperation::NonBlockingLockShared,
                _ => fs::FlockOperation::NonBlockingLockExclusive,
            };
            let mut granted = false;
            r.call(format!("flock NB {mode:?}"), || match flock(operation) {
                Ok(()) => {
                    granted = true;
                    whole_op(mode, Outcome::Granted)
                }
                Err(Errno::AGAIN) => whole_op(mode, Outcome::Refused),
                Err(e) => unexpected("flock", e),
            });
            if granted {
                flocked = mode;
            }
        } else {
            let mut granted = false;
            r.call(format!("F_SETLK {mode:?} {from}..{to}"), || {
                let mut lock = sys::record(kind, offset, len);
                match sys::fcntl_lock(&fd, libc::F_SETLK, &mut lock) {
                    Ok(()) => {
                        granted = true;
                        op(mode, Outcome::Granted)
                    }
                    Err(e) if matches!(sys::errno(&e), libc::EAGAIN | libc::EACCES) => op(mode, Outcome::Refused),
                    Err(e) => unexpected("F_SETLK", e),
                }
            });
            if granted {
                held[from..to].fill(mode);
            }
        }
    }
    finish(r)
}
