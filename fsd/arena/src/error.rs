//! What can go wrong with an arena and its extents.

use std::io;
use std::path::PathBuf;
use verbfs_namespace::Run;
use verbfs_protocol::{Ino, Range};

#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not that many pages are free and unreserved (or, drawn from a reservation, not that many are reserved).
    #[error("{wanted} pages are wanted, {available} are available")]
    NoSpace { wanted: u64, available: u64 },
    /// The file system below has no room for the arena.
    #[error("no room for an arena of {bytes} bytes at {path}")]
    NoRoom { path: PathBuf, bytes: u64 },
    /// The size asked for is no positive multiple of the page size, or too large.
    #[error("an arena of {wanted} bytes at {path}: {reason}")]
    Size { path: PathBuf, wanted: u64, reason: String },
    /// What lies beyond the size asked for may be in use.
    #[error("{path} has {present} bytes and cannot shrink to {wanted}: set storage.arena_size to {present} or more")]
    Shrinks { path: PathBuf, wanted: u64, present: u64 },
    /// Another process, or another [`crate::Arena`] of this one, has the file open.
    #[error("the arena {0} is in use")]
    InUse(PathBuf),
    /// The arena was made just now, but the store knows extents: their bytes are lost (a tmpfs that was emptied?).
    #[error("the arena is new, but the store has {extents} extents in it")]
    Lost { extents: u64 },
    /// Two extents of the store claim one page of the arena.
    #[error("extents overlap in the arena: inode {}, {:?} and inode {}, {:?}", .first.0, .first.1, .second.0, .second.1)]
    Overlap { first: (Ino, Run), second: (Ino, Run) },
    /// An extent of the store lies beyond the end of the arena.
    #[error("inode {ino}, {run:?} lies beyond the {arena_pages} pages of the arena")]
    OutOfRange { ino: Ino, run: Run, arena_pages: u64 },
    /// Pages that were to be committed were never allocated.
    #[error("pages {range} of inode {ino} have no extent to commit")]
    NotAllocated { ino: Ino, range: Range },
    /// Pages that were to be freed are free, or no pages of the arena. The free map is unchanged.
    #[error("pages {0} of the arena are not allocated")]
    NotInUse(Range),
    /// One transaction may not both commit and remove the same pages.
    #[error("pages {range} of inode {ino} are committed and removed in one transaction")]
    Twice { ino: Ino, range: Range },
    /// An empty range where pages are needed, or one that ends beyond the last page number.
    #[error("invalid range {0}")]
    InvalidRange(Range),
    #[error(transparent)]
    Store(#[from] verbfs_namespace::Error),
    #[error("{0}")]
    Io(#[from] io::Error),
}

impl Error {
    /// The errno to answer a caller with.
    pub fn errno(&self) -> i32 {
        match self {
            Error::NoSpace { .. } | Error::NoRoom { .. } => libc::ENOSPC,
            Error::InvalidRange(_) | Error::NotAllocated { .. } | Error::Size { .. } | Error::Shrinks { .. } => {
                libc::EINVAL
            }
            Error::InUse(_) => libc::EBUSY,
            Error::Store(error) => error.errno(),
            Error::Io(error) => error.raw_os_error().unwrap_or(libc::EIO),
            Error::Lost { .. }
            | Error::Overlap { .. }
            | Error::OutOfRange { .. }
            | Error::NotInUse(_)
            | Error::Twice { .. } => libc::EIO,
        }
    }
}
