//! `verbfs-namespace-exerciser`: random operations on names, done to the mounts and to a local directory alike.
//!
//! ```text
//! verbfs-namespace-exerciser --mount A --mount B --reference /tmp [--seed N] [--operations N] [--replay FILE]
//! ```
//!
//! # What is checked
//! A tree of few names (so that operations meet), among them one of 255 bytes, one that is too long and one that is not UTF-8, is
//! changed by create, mkdir, fifos, symbolic and hard links, unlink, rmdir, rename (plain, NOREPLACE, EXCHANGE), chmod,
//! chown, utimens, truncate, whole-file writes and appends, extended attributes, and by use of files that were opened and then unlinked or
//! replaced. Each operation goes through the next mount and, the same, into the reference directory on a local file system.
//! They must agree in: the error number, what was read or listed, and then, through *another* mount, the attributes of
//! the names involved: kind, mode, owner, group, link count, size (not of directories), symbolic link target, bytes, `user.`
//! attributes, and times where they were set. Every so often the whole trees are compared through every mount. Inode numbers
//! are compared by identity: two names of one file here must be two names of one file there.
//!
//! # How to read a failure
//! The operation, what the mount gave and what the reference gave, and the last operations. The seed repeats them; the saved file
//! repeats them with `--replay`, also after lines were deleted by hand.
//!
//! Error numbers on which POSIX gives a choice count as equal: EEXIST and ENOTEMPTY. The reference must be a file system with
//! extended attributes and link counts of directories (ext4, XFS, tmpfs from Linux 6.6 on).
//!
//! Exit status: 0 good, 1 a difference, 2 standstill, 3 the tool could not do its work.

use anyhow::{Context, Result, ensure};
use clap::Parser;
use rustix::fs::{self, AtFlags, FileType, Mode, OFlags, RenameFlags, Timespec, Timestamps, XattrFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use verbfs_harness::mounts::Mounts;
use verbfs_harness::progress::Progress;
use verbfs_harness::rng::{Rng, seed_or_clock};
use verbfs_harness::watchdog::Watchdog;

/// Compare random operations on names with the same operations on a local directory.
#[derive(Parser, Debug)]
#[command(version, about)]
struct Arguments {
    /// A directory of the file system under test; give one for each mount.
    #[arg(long = "mount", required = true)]
    mounts: Vec<PathBuf>,
    /// A directory of a local file system that is right by definition.
    #[arg(long)]
    reference: PathBuf,
    /// The operations follow from it.
    #[arg(long)]
    seed: Option<u64>,
    /// How many.
    #[arg(long, default_value_t = 5000)]
    operations: u64,
    /// Carry out the operations of this file.
    #[arg(long)]
    replay: Option<PathBuf>,
    /// An operation that takes longer ends the run with exit status 2.
    #[arg(long, default_value_t = 60)]
    stall_seconds: u64,
    /// How many operations to print on failure.
    #[arg(long, default_value_t = 20)]
    last: usize,
    /// Leave out extended attributes.
    #[arg(long)]
    no_xattr: bool,
}

/// The trees are compared every so many operations.
const TREE_EVERY: u64 = 100;
/// Directories below the root are at most so deep.
const DEPTH: u64 = 3;
/// Ids used for owners.
const OWNERS: [u32; 3] = [0, 54_321, 54_322];

/// One operation with all its parameters. Paths are lists of names by number, see [`path`].
#[derive(Clone, Debug, Serialize, Deserialize)]
enum Operation {
    Create {
        path: Vec<u8>,
        exclusive: bool,
        mode: u32,
    },
    Mkdir {
        path: Vec<u8>,
        mode: u32,
    },
    Fifo {
        path: Vec<u8>,
        mode: u32,
    },
    Symlink {
        path: Vec<u8>,
        target: String,
    },
    Link {
        from: Vec<u8>,
        to: Vec<u8>,
        follow: bool,
    },
    Unlink {
        path: Vec<u8>,
    },
    Rmdir {
        path: Vec<u8>,
    },
    Rename {
        from: Vec<u8>,
        to: Vec<u8>,
        flags: u32,
    },
    Chmod {
        path: Vec<u8>,
        mode: u32,
    },
    Chown {
        path: Vec<u8>,
        uid: Option<u32>,
        gid: Option<u32>,
    },
    Utimens {
        path: Vec<u8>,
        seconds: i64,
        nanoseconds: i64,
    },
    Truncate {
        path: Vec<u8>,
        size: u64,
    },
    WriteWhole {
        path: Vec<u8>,
        len: usize,
        salt: u8,
    },
    Append {
        path: Vec<u8>,
        len: usize,
        salt: u8,
    },
    SetXattr {
        path: Vec<u8>,
        name: u8,
        len: usize,
        flags: u32,
    },
    GetXattr {
        path: Vec<u8>,
        name: u8,
    },
    RemoveXattr {
        path: Vec<u8>,
        name: u8,
    },
    Stat {
        path: Vec<u8>,
        follow: bool,
    },
    List {
        path: Vec<u8>,
    },
    Access {
        path: Vec<u8>,
        mode: u32,
    },
    /// Open, remove the name, go on using the file.
    UseUnlinked {
        path: Vec<u8>,
        salt: u8,
    },
    /// Open, rename another file over the name, go on using the old one.
    UseReplaced {
        path: Vec<u8>,
        by: Vec<u8>,
        salt: u8,
    },
}

/// The names in use. Few, so that operations meet.
fn name(number: u8) -> Vec<u8> {
    match number {
        0..=4 => vec![b'a' + number],
        5 => vec![b'L'; 255],
        6 => vec![b'X'; 256],
        7 => b"\xff\xfe odd\n".to_vec(),
        8 => b"..".to_vec(),
        _ => b".".to_vec(),
    }
}

fn path(names: &[u8]) -> PathBuf {
    let mut path = PathBuf::new();
    for number in names {
        path.push(OsStr::from_bytes(&name(*number)));
    }
    // `push` keeps "." and ".." as they are; an empty list is the root.
    if names.is_empty() { PathBuf::from(".") } else { path }
}

fn random_path(rng: &mut Rng) -> Vec<u8> {
    let depth = rng.weighted(&[55, 30, 15]) as u64 + 1;
    (0..depth.min(DEPTH))
        .map(|_| match rng.below(100) {
            0..88 => rng.below(5) as u8,
            88..92 => 5,
            92..94 => 6,
            94..97 => 7,
            97..99 => 8,
            _ => 9,
        })
        .collect()
}

/// A path that never climbs out of the tree.
fn safe_path(rng: &mut Rng) -> Vec<u8> {
    loop {
        let path = random_path(rng);
        let mut depth = 0i32;
        let inside = path.iter().all(|n| {
            depth += match n {
                8 => -1,
                9 => 0,
                _ => 1,
            };
            depth >= 0
        });
        if inside && depth > 0 {
            return path;
        }
    }
}

fn generate(rng: &mut Rng, xattr: bool) -> Operation {
    let path = safe_path(rng);
    let other = safe_path(rng);
    let mode = *rng.pick(&[0o644, 0o600, 0o755, 0o777, 0o4755, 0o2755, 0o1777, 0o000, 0o6711]);
    let salt = rng.below(256) as u8;
    let len = *rng.pick(&[0, 1, 100, 4096, 5000, 70_000]);
    let attribute = rng.below(3) as u8;
    // No target climbs or is absolute: whatever is followed, no operation ever leaves the tree.
    let targets = ["a", "b/c", "a/b/c", "nowhere", "./././b", "d"];
    let x = if xattr { 1 } else { 0 };
    match rng.weighted(&[12, 10, 3, 5, 6, 8, 6, 14, 5, 4, 4, 4, 5, 3, 4 * x, 3 * x, 2 * x, 6, 4, 2, 2, 2]) {
        0 => Operation::Create { path, exclusive: rng.percent(50), mode: mode & 0o777 },
        1 => Operation::Mkdir { path, mode: mode & 0o1777 },
        2 => Operation::Fifo { path, mode: mode & 0o777 },
        3 => {
            let target = if rng.percent(15) {
                "t/".repeat(rng.between(30, 400) as usize)
            } else {
                (*rng.pick(&targets)).to_owned()
            };
            Operation::Symlink { path, target }
        }
        4 => Operation::Link { from: path, to: other, follow: rng.percent(20) },
        5 => Operation::Unlink { path },
        6 => Operation::Rmdir { path },
        7 => {
            let flags = *rng.pick(&[0, 0, 0, RenameFlags::NOREPLACE.bits(), RenameFlags::EXCHANGE.bits(), 3]);
            Operation::Rename { from: path, to: other, flags }
        }
        8 => Operation::Chmod { path, mode },
        9 => {
            let id = |rng: &mut Rng| rng.percent(70).then(|| *rng.pick(&OWNERS));
            Operation::Chown { path, uid: id(rng), gid: id(rng) }
        }
        10 => Operation::Utimens {
            path,
            seconds: *rng.pick(&[0, 1, 1_000_000_000, 2_000_000_000]),
            nanoseconds: *rng.pick(&[0, 1, 123_456_789, 999_999_999]),
        },
        11 => Operation::Truncate { path, size: *rng.pick(&[0, 1, 4095, 4096, 10_000, 1 << 20, 5 << 30]) },
        12 => Operation::WriteWhole { path, len, salt },
        13 => Operation::Append { path, len, salt },
        14 => {
            Operation::SetXattr { path, name: attribute, len: rng.below(120) as usize, flags: *rng.pick(&[0, 0, 1, 2]) }
        }
        15 => Operation::GetXattr { path, name: attribute },
        16 => Operation::RemoveXattr { path, name: attribute },
        17 => Operation::Stat { path, follow: rng.percent(50) },
        18 => Operation::List { path },
        19 => Operation::Access { path, mode: rng.below(8) as u32 },
        20 => Operation::UseUnlinked { path, salt },
        _ => Operation::UseReplaced { path, by: other, salt },
    }
}

impl Operation {
    /// The names whose attributes are compared afterwards.
    fn paths(&self) -> Vec<&[u8]> {
        match self {
            Operation::Link { from, to, .. } | Operation::Rename { from, to, .. } => vec![from, to],
            Operation::UseReplaced { path, by, .. } => vec![path, by],
            Operation::Create { path, .. }
            | Operation::Mkdir { path, .. }
            | Operation::Fifo { path, .. }
            | Operation::Symlink { path, .. }
            | Operation::Unlink { path }
            | Operation::Rmdir { path }
            | Operation::Chmod { path, .. }
            | Operation::Chown { path, .. }
            | Operation::Utimens { path, .. }
            | Operation::Truncate { path, .. }
            | Operation::WriteWhole { path, .. }
            | Operation::Append { path, .. }
            | Operation::SetXattr { path, .. }
            | Operation::GetXattr { path, .. }
            | Operation::RemoveXattr { path, .. }
            | Operation::Stat { path, .. }
            | Operation::List { path }
            | Operation::Access { path, .. }
            | Operation::UseUnlinked { path, .. } => vec![path],
        }
    }
}

/// Files larger than this are sparse and are not read whole.
const READ_LIMIT: u64 = 2 << 20;

/// One tree: the one under test through one mount, or the reference.
struct Tree {
    root: OwnedFd,
}

/// What a call gave, in a form that compares: text, or an error number.
type Got = std::result::Result<String, Errno>;

fn contents(salt: u8, len: usize) -> Vec<u8> {
    (0..len).map(|i| (i as u8).wrapping_mul(13) ^ salt).collect()
}

/// A short text for bytes that differs where the bytes do (FNV-1a).
fn digest(bytes: &[u8]) -> String {
    let hash = bytes.iter().fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ *b as u64).wrapping_mul(0x100_0000_01b3));
    format!("{} bytes #{hash:016x}", bytes.len())
}

impl Tree {
    fn open(path: &Path) -> Result<Self> {
        let root = fs::open(path, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        Ok(Self { root })
    }

    /// The path for calls that take no directory handle.
    fn absolute(&self, names: &[u8]) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.root.as_raw_fd())).join(path(names))
    }

    fn open_file(&self, names: &[u8], flags: OFlags, mode: u32) -> std::result::Result<File, Errno> {
        // Never wait at a fifo.
        let flags = flags | OFlags::CLOEXEC | OFlags::NONBLOCK;
        fs::openat(&self.root, path(names), flags, Mode::from_raw_mode(mode)).map(File::from)
    }

    fn xattr_name(number: u8) -> String {
        format!("user.attribute{number}")
    }

    fn perform(&self, operation: &Operation) -> Got {
        let mode = |bits: u32| Mode::from_raw_mode(bits);
        let io = |e: std::io::Error| Errno::from_io_error(&e).unwrap_or(Errno::IO);
        let nothing = |()| String::new();
        match operation {
            Operation::Create { path, exclusive, mode } => {
                let flags = OFlags::CREATE | OFlags::RDWR | if *exclusive { OFlags::EXCL } else { OFlags::empty() };
                self.open_file(path, flags, *mode).map(|f| format!("size {}", f.metadata().map_or(0, |m| m.len())))
            }
            Operation::Mkdir { path: p, mode: m } => fs::mkdirat(&self.root, path(p), mode(*m)).map(nothing),
            Operation::Fifo { path: p, mode: m } => {
                fs::mknodat(&self.root, path(p), FileType::Fifo, mode(*m), 0).map(nothing)
            }
            Operation::Symlink { path: p, target } => fs::symlinkat(target, &self.root, path(p)).map(nothing),
            Operation::Link { from, to, follow } => {
                let flags = if *follow { AtFlags::SYMLINK_FOLLOW } else { AtFlags::empty() };
                fs::linkat(&self.root, path(from), &self.root, path(to), flags).map(nothing)
            }
            Operation::Unlink { path: p } => fs::unlinkat(&self.root, path(p), AtFlags::empty()).map(nothing),
            Operation::Rmdir { path: p } => fs::unlinkat(&self.root, path(p), AtFlags::REMOVEDIR).map(nothing),
            Operation::Rename { from, to, flags } => {
                let flags = RenameFlags::from_bits_retain(*flags);
                fs::renameat_with(&self.root, path(from), &self.root, path(to), flags).map(nothing)
            }
            Operation::Chmod { path: p, mode: m } => {
                fs::chmodat(&self.root, path(p), mode(*m), AtFlags::empty()).map(nothing)
            }
            Operation::Chown { path: p, uid, gid } => {
                let (uid, gid) = (uid.map(rustix::fs::Uid::from_raw), gid.map(rustix::fs::Gid::from_raw));
                fs::chownat(&self.root, path(p), uid, gid, AtFlags::SYMLINK_NOFOLLOW).map(nothing)
            }
            Operation::Utimens { path: p, seconds, nanoseconds } => {
                let time = Timespec { tv_sec: *seconds, tv_nsec: *nanoseconds };
                let times = Timestamps { last_access: time, last_modification: time };
                fs::utimensat(&self.root, path(p), &times, AtFlags::SYMLINK_NOFOLLOW)?;
                let m = fs::statat(&self.root, path(p), AtFlags::SYMLINK_NOFOLLOW)?;
                Ok(format!("mtime {}.{:09}", m.st_mtime, m.st_mtime_nsec))
            }
            Operation::Truncate { path: p, size } => {
                // A fifo or directory is for the kernel to refuse.
                nix::unistd::truncate(&self.absolute(p), *size as i64)
                    .map(nothing)
                    .map_err(|e| Errno::from_raw_os_error(e as i32))
            }
            Operation::WriteWhole { path, len, salt } => {
                let file = self.open_file(path, OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC, 0o644)?;
                file.write_all_at(&contents(*salt, *len), 0).map_err(io)?;
                Ok(digest(&contents(*salt, *len)))
            }
            Operation::Append { path, len, salt } => {
                let mut file = self.open_file(path, OFlags::WRONLY | OFlags::APPEND, 0)?;
                file.write_all(&contents(*salt, *len)).map_err(io)?;
                file.metadata().map(|m| format!("size {}", m.len())).map_err(io)
            }
            Operation::SetXattr { path, name, len, flags } => {
                let (name, value) = (Self::xattr_name(*name), contents(*name, *len));
                fs::lsetxattr(self.absolute(path), name, &value, XattrFlags::from_bits_retain(*flags)).map(nothing)
            }
            Operation::GetXattr { path, name } => {
                let mut value = vec![0; 1024];
                let n = fs::lgetxattr(self.absolute(path), Self::xattr_name(*name), &mut value[..])?;
                Ok(digest(&value[..n]))
            }
            Operation::RemoveXattr { path, name } => {
                fs::lremovexattr(self.absolute(path), Self::xattr_name(*name)).map(nothing)
            }
            Operation::Stat { path, follow } => self.describe(path, *follow),
            Operation::List { path } => self.list(path),
            Operation::Access { path: p, mode } => {
                let mode = fs::Access::from_bits_retain(*mode);
                fs::accessat(&self.root, path(p), mode, AtFlags::empty()).map(nothing)
            }
            Operation::UseUnlinked { path: p, salt } => {
                let file = self.open_file(p, OFlags::RDWR | OFlags::NOFOLLOW, 0)?;
                if !file.metadata().map_err(io)?.is_file() {
                    return Ok("not a file".to_owned());
                }
                fs::unlinkat(&self.root, path(p), AtFlags::empty())?;
                self.use_open(&file, *salt)
            }
            Operation::UseReplaced { path: p, by, salt } => {
                let file = self.open_file(p, OFlags::RDWR | OFlags::NOFOLLOW, 0)?;
                if !file.metadata().map_err(io)?.is_file() {
                    return Ok("not a file".to_owned());
                }
                fs::renameat(&self.root, path(by), &self.root, path(p))?;
                self.use_open(&file, *salt)
            }
        }
    }

    /// Write, read, cut and ask an open file; what was seen.
    fn use_open(&self, file: &File, salt: u8) -> Got {
        let io = |e: std::io::Error| Errno::from_io_error(&e).unwrap_or(Errno::IO);
        let bytes = contents(salt, 9000);
        file.write_all_at(&bytes, 100).map_err(io)?;
        let mut back = vec![0; 9000];
        file.read_exact_at(&mut back, 100).map_err(io)?;
        if back != bytes {
            return Ok("the open file gives other bytes than were written to it".to_owned());
        }
        file.set_len(50).map_err(io)?;
        file.sync_all().map_err(io)?;
        let m = file.metadata().map_err(io)?;
        let n = file.read_at(&mut back, 0).map_err(io)?;
        Ok(format!("links {} size {} {}", m.nlink(), m.len(), digest(&back[..n])))
    }

    /// All that is compared of one name.
    fn describe(&self, names: &[u8], follow: bool) -> Got {
        let flags = if follow { AtFlags::empty() } else { AtFlags::SYMLINK_NOFOLLOW };
        let s = fs::statat(&self.root, path(names), flags)?;
        let kind = FileType::from_raw_mode(s.st_mode);
        let mut text =
            format!("{kind:?} mode {:o} owner {}:{} links {}", s.st_mode & 0o7777, s.st_uid, s.st_gid, s.st_nlink);
        match kind {
            FileType::Symlink => {
                let target = fs::readlinkat(&self.root, path(names), Vec::new())?;
                text += &format!(" size {} target {}", s.st_size, digest(target.to_bytes()));
            }
            FileType::RegularFile => {
                text += &format!(" size {}", s.st_size);
                if (s.st_size as u64) < READ_LIMIT {
                    let file = self.open_file(names, OFlags::RDONLY, 0)?;
                    let mut bytes = vec![0; s.st_size as usize + 1];
                    let mut done = 0;
                    while let Ok(n @ 1..) = file.read_at(&mut bytes[done..], done as u64) {
                        done += n;
                    }
                    text += &format!(" {}", digest(&bytes[..done]));
                }
            }
            _ => {}
        }
        if kind == FileType::RegularFile || kind == FileType::Directory {
            let mut list = vec![0u8; 4096];
            // Without attributes there is nothing to compare.
            let n = fs::listxattr(self.absolute(names), &mut list[..]).unwrap_or(0);
            let mut attributes: Vec<String> = list[..n]
                .split(|b| *b == 0)
                .map(|name| String::from_utf8_lossy(name).into_owned())
                .filter(|name| name.starts_with("user."))
                .collect();
            attributes.sort();
            for attribute in attributes {
                let mut value = vec![0; 1024];
                let n = fs::getxattr(self.absolute(names), &attribute, &mut value[..])?;
                text += &format!(" {attribute}={}", digest(&value[..n]));
            }
        }
        Ok(text)
    }

    fn list(&self, names: &[u8]) -> Got {
        let fd = fs::openat(&self.root, path(names), OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        let mut all = Vec::new();
        for entry in fs::Dir::read_from(&fd)? {
            let entry = entry?;
            all.push(format!("{:?}", String::from_utf8_lossy(entry.file_name().to_bytes())));
        }
        all.sort();
        Ok(all.join(" "))
    }

    /// Every name below `names` with all that is compared; and for each name the first name of the same inode.
    fn walk(&self, names: &mut Vec<u8>, all: &mut Vec<String>, inodes: &mut BTreeMap<u64, String>) -> Result<()> {
        all.push(format!("{:?}: {}", path(names), self.describe(names, false)?));
        let s = fs::statat(&self.root, path(names), AtFlags::SYMLINK_NOFOLLOW)?;
        let first = inodes.entry(s.st_ino).or_insert_with(|| format!("{names:?}"));
        all.push(format!("{:?} is the inode of {first}", path(names)));
        if FileType::from_raw_mode(s.st_mode) == FileType::Directory {
            all.push(format!("{:?} lists {}", path(names), self.list(names)?));
            for number in [0, 1, 2, 3, 4, 5, 7] {
                names.push(number);
                if fs::statat(&self.root, path(names), AtFlags::SYMLINK_NOFOLLOW).is_ok() {
                    self.walk(names, all, inodes)?;
                }
                names.pop();
            }
        }
        Ok(())
    }
}

/// Whether two results count as the same.
fn agree(tested: &Got, reference: &Got) -> bool {
    let group = |e: &Errno| match *e {
        Errno::NOTEMPTY => Errno::EXIST,
        other => other,
    };
    match (tested, reference) {
        (Ok(a), Ok(b)) => a == b,
        (Err(a), Err(b)) => group(a) == group(b),
        _ => false,
    }
}

struct Exerciser {
    mounts: Vec<Tree>,
    reference: Tree,
}

impl Exerciser {
    /// Carry out and compare; a text says what disagrees.
    fn step(&self, number: u64, operation: &Operation) -> Result<Option<String>> {
        let through = number as usize % self.mounts.len();
        let other =
            (through + 1 + number as usize / 7 % self.mounts.len().saturating_sub(1).max(1)) % self.mounts.len();
        let tested = self.mounts[through].perform(operation);
        let reference = self.reference.perform(operation);
        if !agree(&tested, &reference) {
            return Ok(Some(format!(
                "result through mount {through}: {tested:?}\nresult of the reference: {reference:?}"
            )));
        }
        for names in operation.paths() {
            for seen in [other, through] {
                let (tested, reference) =
                    (self.mounts[seen].describe(names, false), self.reference.describe(names, false));
                if !agree(&tested, &reference) {
                    return Ok(Some(format!(
                        "{:?} afterwards, done through mount {through}\n  through mount {seen}: {tested:?}\n  the reference:   {reference:?}",
                        path(names)
                    )));
                }
            }
        }
        if number % TREE_EVERY == TREE_EVERY - 1 { self.compare_trees() } else { Ok(None) }
    }

    fn compare_trees(&self) -> Result<Option<String>> {
        let mut expected = Vec::new();
        self.reference.walk(&mut Vec::new(), &mut expected, &mut BTreeMap::new()).context("walk the reference")?;
        for (number, mount) in self.mounts.iter().enumerate() {
            let mut found = Vec::new();
            mount
                .walk(&mut Vec::new(), &mut found, &mut BTreeMap::new())
                .with_context(|| format!("walk mount {number}"))?;
            if found != expected {
                let differing: Vec<String> = expected
                    .iter()
                    .filter(|line| !found.contains(line))
                    .map(|line| format!("  - {line}"))
                    .chain(found.iter().filter(|line| !expected.contains(line)).map(|line| format!("  + {line}")))
                    .collect();
                return Ok(Some(format!(
                    "the trees differ (- only the reference, + only mount {number}):\n{}",
                    differing.join("\n")
                )));
            }
        }
        Ok(None)
    }
}

fn run(arguments: &Arguments) -> Result<bool> {
    let mounts = Mounts::new(&arguments.mounts)?;
    let seed = seed_or_clock(arguments.seed);
    let name = format!("namespace-{seed}-{}", std::process::id());
    let watchdog = Watchdog::ending_the_program(arguments.stall_seconds);
    let work = mounts.work_directory(&name)?;
    let beside =
        Mounts::new(std::slice::from_ref(&arguments.reference))?.work_directory(&format!("{name}-reference"))?;
    for directory in [work.on(0), beside.on(0)] {
        fs::chmod(directory, Mode::from_raw_mode(0o755))?;
        // Owner and group of the roots, and of what is born in them, must be the same.
        ensure!(std::fs::metadata(directory)?.mode() & 0o2000 == 0, "{} is setgid", directory.display());
    }
    rustix::process::umask(Mode::from_raw_mode(0o022));
    let exerciser = Exerciser {
        mounts: work.all().iter().map(|p| Tree::open(p)).collect::<Result<_>>()?,
        reference: Tree::open(beside.on(0))?,
    };
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
    let mut history = Vec::new();
    for number in 0..total {
        let operation = match &replayed {
            Some(operations) => operations[number as usize].clone(),
            None => generate(&mut rng, !arguments.no_xattr),
        };
        history.push(operation.clone());
        let mut outcome =
            watchdog.during(format!("operation {number}: {operation:?}"), || exerciser.step(number, &operation))?;
        if outcome.is_none() && number + 1 == total {
            outcome = exerciser.compare_trees()?;
        }
        if let Some(difference) = outcome {
            drop(progress);
            println!(
                "FAIL at operation {number}: {operation:?}\n{difference}\n\nthe last operations (names: 0-4 are a-e, 5 is 255 bytes long, 6 too long, 7 not UTF-8, 8 .., 9 .):"
            );
            for (n, operation) in history.iter().enumerate().skip(history.len().saturating_sub(arguments.last)) {
                println!("{n:>7}  {operation:?}");
            }
            let path = std::env::temp_dir().join(format!("verbfs-namespace-{seed}.operations"));
            let mut file = File::create(&path)?;
            for operation in &history {
                serde_json::to_writer(&mut file, operation)?;
                file.write_all(b"\n")?;
            }
            let mounts: Vec<String> = arguments.mounts.iter().map(|m| format!("--mount {}", m.display())).collect();
            let common = format!(
                "verbfs-namespace-exerciser {} --reference {}",
                mounts.join(" "),
                arguments.reference.display()
            );
            println!("\nagain:  {common} --seed {seed} --operations {}", arguments.operations);
            println!("replay: {common} --replay {}", path.display());
            return Ok(false);
        }
        progress.step();
    }
    drop(progress);
    println!("ok: {total} operations through {} mounts agree with the reference", arguments.mounts.len());
    Ok(true)
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("verbfs-namespace-exerciser: {error:#}");
            ExitCode::from(3)
        }
    }
}
