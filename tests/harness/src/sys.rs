//! The few system calls that `rustix` and `nix` do not wrap as these tools need them, and shared mappings.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};

/// A record lock request on bytes `start..start + len` (`len` 0: to the end of all files).
pub fn record(kind: libc::c_int, start: u64, len: u64) -> libc::flock {
    libc::flock {
        l_type: kind as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: start as i64,
        l_len: len as i64,
        l_pid: 0,
    }
}

/// `fcntl` with one of the lock commands (F_SETLK, F_SETLKW, F_GETLK and their OFD sisters).
pub fn fcntl_lock(fd: impl AsFd, command: libc::c_int, lock: &mut libc::flock) -> io::Result<()> {
    // SAFETY: the descriptor is borrowed for the call, and `lock` is a valid structure the kernel may read and write.
    let done = unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), command, lock as *mut libc::flock) };
    if done == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The size of an extended attribute, asked for with an empty buffer (`rustix` does not pass the answer on).
pub fn xattr_size(path: &std::path::Path, name: &str) -> io::Result<usize> {
    use std::os::unix::ffi::OsStrExt;
    let (path, name) = (std::ffi::CString::new(path.as_os_str().as_bytes())?, std::ffi::CString::new(name)?);
    // SAFETY: both strings end with a zero byte, and with size 0 the kernel writes nothing.
    let size = unsafe { libc::getxattr(path.as_ptr(), name.as_ptr(), std::ptr::null_mut(), 0) };
    if size < 0 { Err(io::Error::last_os_error()) } else { Ok(size as usize) }
}

/// A mapping of a file, unmapped when dropped.
pub struct Mapping {
    address: *mut u8,
    len: usize,
}

impl Mapping {
    /// Map `len` bytes from `offset`, shared or private, readable and, if asked, writable.
    pub fn new(fd: BorrowedFd<'_>, offset: u64, len: usize, shared: bool, writable: bool) -> io::Result<Self> {
        use rustix::mm::{MapFlags, ProtFlags, mmap};
        let flags = if shared { MapFlags::SHARED } else { MapFlags::PRIVATE };
        let protection = if writable { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ };
        // SAFETY: the kernel chooses a free address, so nothing that Rust knows is replaced.
        let address = unsafe { mmap(std::ptr::null_mut(), len, protection, flags, fd, offset)? };
        Ok(Self { address: address.cast(), len })
    }

    /// Copy the bytes at `at` out of the mapping. Others may change them meanwhile.
    pub fn read(&self, at: usize, out: &mut [u8]) {
        assert!(at.checked_add(out.len()).is_some_and(|end| end <= self.len));
        // SAFETY: the range lies in the mapping (asserted), which lives as long as `self`, and `out` is ordinary memory.
        unsafe { std::ptr::copy_nonoverlapping(self.address.add(at), out.as_mut_ptr(), out.len()) }
    }

    /// Copy `bytes` into the mapping at `at`. The mapping must be writable.
    pub fn write(&self, at: usize, bytes: &[u8]) {
        assert!(at.checked_add(bytes.len()).is_some_and(|end| end <= self.len));
        // SAFETY: the range lies in the mapping (asserted), which lives as long as `self`; nobody holds references into it.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.address.add(at), bytes.len()) }
    }

    fn word(&self, index: usize) -> &AtomicU64 {
        assert!((index + 1) * 8 <= self.len);
        // SAFETY: the word lies in the mapping (asserted), mappings are page-aligned, and all access here is atomic or copying.
        unsafe { AtomicU64::from_ptr(self.address.cast::<u64>().add(index)) }
    }

    /// Load 8-byte word number `index`.
    pub fn load(&self, index: usize) -> u64 {
        self.word(index).load(Ordering::SeqCst)
    }

    /// Store 8-byte word number `index`. The mapping must be writable.
    pub fn store(&self, index: usize, value: u64) {
        self.word(index).store(value, Ordering::SeqCst);
    }

    /// 8-byte word number `index`, in a mapping that then stays until the process ends. The mapping must be writable.
    pub fn leak_word(self, index: usize) -> &'static AtomicU64 {
        let mapping: &'static Self = Box::leak(Box::new(self));
        mapping.word(index)
    }

    /// `msync(MS_SYNC)` of the whole mapping.
    pub fn sync(&self) -> io::Result<()> {
        // SAFETY: the range is exactly the mapping, which lives as long as `self`.
        unsafe { rustix::mm::msync(self.address.cast(), self.len, rustix::mm::MsyncFlags::SYNC)? };
        Ok(())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is exactly the mapping, and no reference into it outlives `self`.
        let _ = unsafe { rustix::mm::munmap(self.address.cast(), self.len) };
    }
}

/// Memory that begins at a page: what direct I/O needs, and what keeps a request of 1 MiB in one piece.
pub struct PageBuffer {
    address: *mut u8,
    len: usize,
}

impl PageBuffer {
    /// `len` bytes of zeros.
    pub fn new(len: usize) -> Self {
        use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
        // SAFETY: the kernel chooses a free address, so nothing that Rust knows is replaced.
        let address =
            unsafe { mmap_anonymous(std::ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE) }
                .expect("anonymous memory is available");
        Self { address: address.cast(), len }
    }
}

impl std::ops::Deref for PageBuffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: private memory of this length, zeroed by the kernel, lives as long as `self`.
        unsafe { std::slice::from_raw_parts(self.address, self.len) }
    }
}

impl std::ops::DerefMut for PageBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` makes this the only reference.
        unsafe { std::slice::from_raw_parts_mut(self.address, self.len) }
    }
}

impl Drop for PageBuffer {
    fn drop(&mut self) {
        // SAFETY: the range is exactly this buffer's, and no reference into it outlives `self`.
        let _ = unsafe { rustix::mm::munmap(self.address.cast(), self.len) };
    }
}

/// What a forked child did.
#[derive(Debug, PartialEq, Eq)]
pub enum ChildEnd {
    /// It exited with this status.
    Exited(i32),
    /// It was ended by this signal.
    Killed(i32),
    /// It still runs.
    Running,
}

/// A forked child process; killed and collected when dropped.
pub struct Child {
    /// Its process id.
    pub pid: nix::unistd::Pid,
    collected: bool,
}

impl Child {
    /// Fork, and run `body` in the child; its value is the exit status. The calling process must have a single thread.
    pub fn fork(body: impl FnOnce() -> i32) -> io::Result<Self> {
        // SAFETY: the caller has a single thread (its contract), so the child inherits no lock held by another one.
        match unsafe { nix::unistd::fork() }? {
            nix::unistd::ForkResult::Parent { child } => Ok(Self { pid: child, collected: false }),
            nix::unistd::ForkResult::Child => {
                let status = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body)).unwrap_or(101);
                use std::io::Write;
                let _ = std::io::stdout().flush();
                // SAFETY: ends this process at once, without running destructors that belong to the parent.
                unsafe { libc::_exit(status) }
            }
        }
    }

    /// How it stands, without waiting.
    pub fn poll(&mut self) -> ChildEnd {
        use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
        match waitpid(self.pid, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(_, status)) => {
                self.collected = true;
                ChildEnd::Exited(status)
            }
            Ok(WaitStatus::Signaled(_, signal, _)) => {
                self.collected = true;
                ChildEnd::Killed(signal as i32)
            }
            _ => ChildEnd::Running,
        }
    }

    /// Wait for its end, `limit` at most.
    pub fn wait(&mut self, limit: std::time::Duration) -> ChildEnd {
        let begun = std::time::Instant::now();
        loop {
            match self.poll() {
                ChildEnd::Running if begun.elapsed() < limit => {
                    std::thread::sleep(std::time::Duration::from_micros(500));
                }
                end => return end,
            }
        }
    }

    /// Send it a signal.
    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        let _ = nix::sys::signal::kill(self.pid, signal);
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if !self.collected {
            self.signal(nix::sys::signal::Signal::SIGKILL);
            // Not for ever: a process stuck in the kernel does not die.
            self.wait(std::time::Duration::from_secs(2));
        }
    }
}

/// The error number of the last failure as `rustix` and `std` report it.
pub fn errno(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(-1)
}
