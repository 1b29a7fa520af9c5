//! A shared mapping that unmaps itself.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::AtomicU64;

/// Memory mapped MAP_SHARED, readable and writable.
#[derive(Debug)]
pub(crate) struct Mapping {
    start: *mut u8,
    length: usize,
}

// SAFETY: the mapping is plain memory; every access goes through raw pointers or atomics, whose users answer for races.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps the first `length` bytes of `descriptor`, which must be that long.
    pub(crate) fn new(descriptor: BorrowedFd<'_>, length: usize) -> io::Result<Mapping> {
        if length == 0 || length > isize::MAX as usize {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        // SAFETY: an all-zero stat is a valid value to be overwritten.
        let mut stat: libc::stat = unsafe { std::mem::zeroed() };
        // SAFETY: the descriptor is open and `stat` is writable.
        if unsafe { libc::fstat(descriptor.as_raw_fd(), &mut stat) } != 0 {
            return Err(io::Error::last_os_error());
        }
        if stat.st_mode & libc::S_IFMT != libc::S_IFREG || (stat.st_size as u64) < length as u64 {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        // SAFETY: a fresh mapping at an address the kernel chooses disturbs no memory of ours.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                descriptor.as_raw_fd(),
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Mapping { start: start.cast(), length })
    }

    #[inline]
    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.start
    }
    #[inline]
    pub(crate) fn len(&self) -> usize {
        self.length
    }
    #[inline]
    pub(crate) fn contains(&self, offset: u64, length: u64) -> bool {
        offset.checked_add(length).is_some_and(|end| end <= self.length as u64)
    }
    /// The word at `offset`, which must be a multiple of 8 and inside.
    #[inline]
    pub(crate) fn word(&self, offset: usize) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8) && self.contains(offset as u64, 8), "word outside the mapping");
        // SAFETY: in bounds and aligned (the mapping is page-aligned); the reference cannot outlive `self`.
        unsafe { AtomicU64::from_ptr(self.start.add(offset).cast()) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this mapping was made by `new` and nobody else unmaps it.
        unsafe { libc::munmap(self.start.cast(), self.length) };
    }
}
