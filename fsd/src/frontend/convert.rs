//! Types of `fuser` to and from types of the protocol.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{FileAttr, FileType, INodeNo, TimeOrNow};
use verbfs_protocol::{Attributes, FileKind, Ino, NewTime, PAGE_SIZE, Time};

/// What stat(2) calls the preferred size of I/O. One page: hints beyond it make some programs read more than they need.
pub const BLOCK_SIZE: u32 = PAGE_SIZE as u32;

/// The kernel caches neither entries nor attributes: every call asks.
pub const NO_CACHING: Duration = Duration::ZERO;

/// Bytes in the unit of `st_blocks`.
const STAT_BLOCK: u64 = 512;

/// An inode number as the kernel's node id. They are the same number; the root is 1 in both.
pub fn node_id(ino: Ino) -> INodeNo {
    INodeNo(ino.0)
}

/// The kernel's node id as an inode number.
pub fn ino(node: INodeNo) -> Ino {
    Ino(node.0)
}

/// The attributes as stat(2) shows them.
pub fn attributes(from: &Attributes) -> FileAttr {
    FileAttr {
        ino: node_id(from.ino),
        size: from.size,
        blocks: from.pages * (PAGE_SIZE / STAT_BLOCK),
        atime: system_time(from.atime),
        mtime: system_time(from.mtime),
        ctime: system_time(from.ctime),
        crtime: system_time(from.crtime),
        kind: file_type(from.kind),
        perm: (from.mode & 0o7777) as u16,
        nlink: from.nlink,
        uid: from.uid,
        gid: from.gid,
        rdev: from.rdev,
        blksize: BLOCK_SIZE,
        flags: 0,
    }
}

/// The kind of a directory entry.
pub fn file_type(kind: FileKind) -> FileType {
    match kind {
        FileKind::Regular => FileType::RegularFile,
        FileKind::Directory => FileType::Directory,
        FileKind::Symlink => FileType::Symlink,
        FileKind::Fifo => FileType::NamedPipe,
        FileKind::Socket => FileType::Socket,
        FileKind::CharacterDevice => FileType::CharDevice,
        FileKind::BlockDevice => FileType::BlockDevice,
    }
}

/// The kind that mknod(2) asks for; `None` for what it cannot make.
pub fn kind_of_mode(mode: u32) -> Option<FileKind> {
    match mode & libc::S_IFMT {
        0 | libc::S_IFREG => Some(FileKind::Regular),
        libc::S_IFIFO => Some(FileKind::Fifo),
        libc::S_IFSOCK => Some(FileKind::Socket),
        libc::S_IFCHR => Some(FileKind::CharacterDevice),
        libc::S_IFBLK => Some(FileKind::BlockDevice),
        _ => None,
    }
}

/// A time as `fuser` wants it. Saturates: no time that a peer can send may stop the daemon.
pub fn system_time(time: Time) -> SystemTime {
    let nanoseconds = Duration::from_nanos(u64::from(time.nanoseconds.min(999_999_999)));
    let seconds = Duration::from_secs(time.seconds.unsigned_abs());
    let whole = if time.seconds < 0 { UNIX_EPOCH.checked_sub(seconds) } else { UNIX_EPOCH.checked_add(seconds) };
    whole.and_then(|whole| whole.checked_add(nanoseconds)).unwrap_or(UNIX_EPOCH)
}

/// A time that setattr asks for.
///
/// `fuser` 0.18 turns `(-seconds, nanoseconds)` of the kernel into "seconds *and* nanoseconds before
/// 1970"; the kernel means "nanoseconds after the second before 1970". Both parts are still there, so read them back as they came.
pub fn new_time(time: TimeOrNow) -> NewTime {
    match time {
        TimeOrNow::Now => NewTime::Now,
        TimeOrNow::SpecificTime(time) => NewTime::At(match time.duration_since(UNIX_EPOCH) {
            Ok(since) => {
                Time { seconds: since.as_secs().min(i64::MAX as u64) as i64, nanoseconds: since.subsec_nanos() }
            }
            Err(before) => {
                let before = before.duration();
                Time { seconds: 0i64.saturating_sub_unsigned(before.as_secs()), nanoseconds: before.subsec_nanos() }
            }
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_1970_are_read_as_the_kernel_meant_them() {
        // What fuser makes of (-2, 500_000_000), which is 1.5 s before 1970.
        let from_fuser = UNIX_EPOCH - Duration::new(2, 500_000_000);
        assert_eq!(
            new_time(TimeOrNow::SpecificTime(from_fuser)),
            NewTime::At(Time { seconds: -2, nanoseconds: 500_000_000 })
        );
        assert_eq!(
            system_time(Time { seconds: -2, nanoseconds: 500_000_000 }),
            UNIX_EPOCH - Duration::new(1, 500_000_000)
        );
    }

    #[test]
    fn no_time_panics() {
        for seconds in [i64::MIN, -1, 0, 1, i64::MAX] {
            for nanoseconds in [0, 999_999_999, u32::MAX] {
                system_time(Time { seconds, nanoseconds });
            }
        }
    }
}
