//! The file, its mapping and its free pages.

use crate::{Allocator, Error};
use memmap2::{MmapOptions, MmapRaw};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::ptr::NonNull;
use verbfs_protocol::PAGE_SIZE;

/// Largest arena, bytes: what a process can map on x86-64 (2^47), less room for everything else.
pub const ARENA_MAX: u64 = 1 << 46;

/// How to open an arena.
#[derive(Clone, Copy, Debug, Default)]
pub struct ArenaOptions {
    /// Fault all pages in now rather than on first use: costs start-up time, saves faults later.
    pub populate: bool,
}

/// A preallocated file, mapped whole and shared: this node's part of the data of the file system.
///
/// Peers write into it one-sided, so its bytes change at any time: there is no way to borrow them as a slice,
/// only to copy.
pub struct Arena {
    file: File,
    map: MmapRaw,
    created: bool,
    /// Which pages are free. Empty extents table: all.
    pub allocator: Allocator,
}

impl Arena {
    /// Opens the arena at `path`, making it if it does not exist and growing it if it is smaller than `size` bytes
    /// (a positive multiple of [`PAGE_SIZE`]). All of it is allocated on the file system below.
    ///
    /// # Errors
    /// [`Error::NoRoom`], [`Error::Size`], [`Error::Shrinks`], [`Error::InUse`], [`Error::Io`]. A file that was made here is
    /// removed again.
    pub fn open(path: &Path, size: u64, options: ArenaOptions) -> Result<Arena, Error> {
        if size == 0 || !size.is_multiple_of(PAGE_SIZE) || size > ARENA_MAX {
            return Err(Error::Size {
                path: path.into(),
                wanted: size,
                reason: format!("use a multiple of {PAGE_SIZE}, at most {ARENA_MAX}"),
            });
        }
        let file = File::options().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(std::fs::TryLockError::WouldBlock) => return Err(Error::InUse(path.into())),
            Err(std::fs::TryLockError::Error(error)) => return Err(error.into()),
        }
        // It holds the bytes of all users' files. One that was made or copied with a looser mode is closed again.
        file.set_permissions(std::fs::Permissions::from_mode(0o600))?;
        let present = file.metadata()?.len();
        let created = present == 0;
        if present > size {
            return Err(Error::Shrinks { path: path.into(), wanted: size, present });
        }
        // Also for a file of full size: an earlier attempt may have been killed half way.
        if let Err(error) = preallocate(&file, size) {
            if created {
                let _ = std::fs::remove_file(path);
            }
            return Err(match error.raw_os_error() {
                Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => Error::NoRoom { path: path.into(), bytes: size },
                _ => error.into(),
            });
        }
        let mut mapping = MmapOptions::new();
        mapping.len(size as usize); // ARENA_MAX fits
        if options.populate {
            mapping.populate();
        }
        let map = mapping.map_raw(&file)?;
        Ok(Arena { file, map, created, allocator: Allocator::new(size / PAGE_SIZE) })
    }

    /// Whether [`Arena::open`] made the file: it holds nothing.
    pub fn is_new(&self) -> bool {
        self.created
    }

    /// The file, for who registers or maps it.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// First byte of the mapping; page-aligned, valid for [`Arena::len`] bytes while the arena lives.
    pub fn base(&self) -> NonNull<u8> {
        NonNull::new(self.map.as_mut_ptr()).expect("a mapping is not at address 0")
    }

    /// Bytes.
    #[allow(clippy::len_without_is_empty)] // never empty
    pub fn len(&self) -> u64 {
        self.map.len() as u64
    }

    /// Pages of [`PAGE_SIZE`] bytes.
    pub fn total_pages(&self) -> u64 {
        self.len() / PAGE_SIZE
    }

    /// Copies bytes out, from byte `offset` on. Bytes a peer writes meanwhile come out old or new.
    ///
    /// # Panics
    /// Beyond the end of the arena.
    pub fn copy_out(&self, offset: u64, bytes: &mut [u8]) {
        let from = self.at(offset, bytes.len());
        // SAFETY: `at` checked the range; `bytes` is ours alone and no part of the mapping, which is never lent out as a reference.
        unsafe { std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), bytes.len()) }
    }

    /// Copies bytes in, from byte `offset` on.
    ///
    /// # Panics
    /// Beyond the end of the arena.
    pub fn copy_in(&self, offset: u64, bytes: &[u8]) {
        let to = self.at(offset, bytes.len());
        // SAFETY: `at` checked the range; nobody holds a reference into the mapping.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) }
    }

    /// Fills `length` bytes from byte `offset` on with zeros.
    ///
    /// # Panics
    /// Beyond the end of the arena.
    pub fn zero(&self, offset: u64, length: u64) {
        let length = usize::try_from(length).expect("within the arena");
        let to = self.at(offset, length);
        // SAFETY: as in `copy_in`.
        unsafe { std::ptr::write_bytes(to, 0, length) }
    }

    fn at(&self, offset: u64, length: usize) -> *mut u8 {
        let end = offset.checked_add(length as u64);
        assert!(end.is_some_and(|end| end <= self.len()), "bytes {offset} + {length} of an arena of {}", self.len());
        // SAFETY: within the mapping, as just checked.
        unsafe { self.map.as_mut_ptr().add(offset as usize) }
    }

    /// Makes what was written survive loss of power. Nothing to do on tmpfs, slow on disks.
    pub fn sync(&self) -> Result<(), Error> {
        Ok(self.map.flush()?)
    }
}

fn preallocate(file: &File, size: u64) -> std::io::Result<()> {
    loop {
        // SAFETY: no memory is passed; the descriptor is open for as long as `file` is borrowed.
        let result = unsafe { libc::fallocate(file.as_raw_fd(), 0, 0, size as libc::off_t) };
        if result == 0 {
            return Ok(());
        }
        let error = std::io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::EINTR) {
            return Err(error);
        }
    }
}
