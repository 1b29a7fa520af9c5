//! Unix sockets that keep message boundaries and carry descriptors, and the other descriptors of this provider.

use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use crate::handshake::{Channel, ConnectError};

/// Most descriptors in one frame.
pub(super) const DESCRIPTORS_MAXIMUM: usize = 2;

pub(crate) fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn owned(descriptor: libc::c_int) -> io::Result<OwnedFd> {
    let descriptor = check(descriptor)?;
    // SAFETY: the system call just gave us this descriptor; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

fn address(path: &Path) -> io::Result<(libc::sockaddr_un, libc::socklen_t)> {
    // SAFETY: an all-zero sockaddr_un is valid.
    let mut address: libc::sockaddr_un = unsafe { zeroed() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    let bytes = path.as_os_str().as_bytes();
    if bytes.len() >= address.sun_path.len() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "socket path longer than the system allows"));
    }
    for (target, source) in address.sun_path.iter_mut().zip(bytes) {
        *target = *source as libc::c_char;
    }
    Ok((address, size_of::<libc::sockaddr_un>() as libc::socklen_t))
}

fn new_socket() -> io::Result<OwnedFd> {
    // SAFETY: no pointers are passed.
    owned(unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK, 0) })
}

/// A non-blocking connection to `path`.
pub(crate) fn connect(path: &Path) -> io::Result<OwnedFd> {
    let socket = new_socket()?;
    let (address, length) = address(path)?;
    // SAFETY: `address` is a valid sockaddr_un of `length` bytes.
    check(unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), length) })?;
    Ok(socket)
}

/// A listening socket at `path`, for its owner only. A socket file nobody listens behind is replaced.
pub(super) fn listen(path: &Path) -> io::Result<OwnedFd> {
    match connect(path) {
        Ok(_) => return Err(io::Error::from(io::ErrorKind::AddrInUse)),
        Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {
            return Err(io::Error::from(io::ErrorKind::AddrInUse));
        }
        Err(error) if error.raw_os_error() == Some(libc::ECONNREFUSED) => std::fs::remove_file(path)?,
        Err(_) => {}
    }
    let socket = new_socket()?;
    let (address, length) = address(path)?;
    // Permissions first: between bind and chmod nobody can connect, for nobody listens yet.
    // SAFETY: `address` is a valid sockaddr_un of `length` bytes.
    check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) })?;
    std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    // SAFETY: no pointers are passed.
    check(unsafe { libc::listen(socket.as_raw_fd(), 128) })?;
    Ok(socket)
}

pub(super) fn accept(listener: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    // SAFETY: null address pointers are allowed.
    owned(unsafe {
        libc::accept4(
            listener.as_raw_fd(),
            std::ptr::null_mut(),
            std::ptr::null_mut(),
            libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK,
        )
    })
}

/// The process at the other end, as it was when the connection was made.
pub(super) fn peer_process(socket: BorrowedFd<'_>) -> io::Result<i32> {
    // SAFETY: an all-zero ucred is valid.
    let mut credentials: libc::ucred = unsafe { zeroed() };
    let mut length = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: both pointers are to locals of the right size.
    check(unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut credentials).cast(),
            &mut length,
        )
    })?;
    Ok(credentials.pid)
}

/// A descriptor that names a process for good, whatever becomes of its number.
pub(super) fn process_descriptor(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: no pointers are passed.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) } as libc::c_int)
}

pub(super) fn kill_process(process: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: a null siginfo is allowed.
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            process.as_raw_fd(),
            libc::SIGKILL,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    check(result as libc::c_int).map(drop)
}

/// Waits until the descriptor is readable. False: `deadline` passed.
pub(crate) fn wait_readable(descriptor: BorrowedFd<'_>, deadline: Instant) -> io::Result<bool> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut entry = libc::pollfd { fd: descriptor.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // Rounded up: a wait of zero would spin through the last millisecond.
        let milliseconds = left.as_micros().div_ceil(1000).min(i32::MAX as u128) as libc::c_int;
        // SAFETY: one valid pollfd.
        let ready = unsafe { libc::poll(&mut entry, 1, milliseconds) };
        if ready > 0 {
            return Ok(true);
        }
        if ready < 0 {
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
        if left.is_zero() {
            return Ok(false);
        }
    }
}

/// Whether the other end has hung up.
pub(super) fn has_hung_up(socket: BorrowedFd<'_>) -> bool {
    let mut entry = libc::pollfd { fd: socket.as_raw_fd(), events: 0, revents: 0 };
    // SAFETY: one valid pollfd.
    let ready = unsafe { libc::poll(&mut entry, 1, 0) };
    ready > 0 && entry.revents & (libc::POLLHUP | libc::POLLERR) != 0
}

/// An event descriptor, non-blocking.
pub(crate) fn event_descriptor() -> io::Result<OwnedFd> {
    // SAFETY: no pointers are passed.
    owned(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) })
}

/// Makes an event descriptor readable.
pub(crate) fn signal_event(descriptor: RawFd) {
    let one = 1u64;
    // SAFETY: eight readable bytes. A full counter is as good as written: the reader wakes anyway.
    unsafe { libc::write(descriptor, (&raw const one).cast(), 8) };
}

/// Makes an event descriptor unreadable.
pub(crate) fn drain_event(descriptor: RawFd) {
    let mut count = 0u64;
    // SAFETY: eight writable bytes. Nothing to read is fine.
    unsafe { libc::read(descriptor, (&raw mut count).cast(), 8) };
}

/// Whether a descriptor that a peer gave us is an event descriptor: writing anything else could block us or kill us.
pub(super) fn is_event_descriptor(descriptor: BorrowedFd<'_>) -> bool {
    std::fs::read_link(format!("/proc/self/fd/{}", descriptor.as_raw_fd()))
        .is_ok_and(|target| target.as_os_str().as_bytes() == b"anon_inode:[eventfd]")
}

/// Anonymous memory that can be handed out: neither side can shrink it under the other.
pub(crate) fn sealed_memory(length: usize) -> io::Result<OwnedFd> {
    // SAFETY: a constant C string.
    let memory = owned(unsafe { libc::memfd_create(c"verbfs".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) })?;
    // SAFETY: no pointers are passed.
    check(unsafe { libc::ftruncate(memory.as_raw_fd(), length as libc::off_t) })?;
    // SAFETY: no pointers are passed.
    check(unsafe { libc::fcntl(memory.as_raw_fd(), libc::F_ADD_SEALS, SEALS) })?;
    Ok(memory)
}

const SEALS: libc::c_int = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;

/// Whether memory a peer gave us can no longer be shrunk.
pub(super) fn is_sealed(memory: BorrowedFd<'_>) -> bool {
    // SAFETY: no pointers are passed.
    let seals = unsafe { libc::fcntl(memory.as_raw_fd(), libc::F_GET_SEALS) };
    seals >= 0 && seals & libc::F_SEAL_SHRINK != 0
}

/// Sends one frame, without blocking.
pub(super) fn send(socket: BorrowedFd<'_>, bytes: &[u8], descriptors: &[Arc<OwnedFd>]) -> io::Result<()> {
    debug_assert!(descriptors.len() <= DESCRIPTORS_MAXIMUM);
    let mut vector = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    let mut space = [0u64; 8];
    // SAFETY: an all-zero msghdr is valid.
    let mut message: libc::msghdr = unsafe { zeroed() };
    message.msg_iov = &mut vector;
    message.msg_iovlen = 1;
    if !descriptors.is_empty() {
        let payload = (descriptors.len() * size_of::<RawFd>()) as libc::c_uint;
        message.msg_control = space.as_mut_ptr().cast();
        // SAFETY: pure arithmetic.
        message.msg_controllen = unsafe { libc::CMSG_SPACE(payload) } as _;
        // SAFETY: the control buffer is aligned and has room for one header and DESCRIPTORS_MAXIMUM descriptors.
        unsafe {
            let header = libc::CMSG_FIRSTHDR(&message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(payload) as _;
            let data = libc::CMSG_DATA(header).cast::<RawFd>();
            for (index, descriptor) in descriptors.iter().enumerate() {
                data.add(index).write_unaligned(descriptor.as_raw_fd());
            }
        }
    }
    // SAFETY: all pointers in `message` are to live locals.
    let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &message, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) };
    check(sent as libc::c_int).map(drop)
}

/// Receives one frame, without blocking. Zero bytes: the other end is gone.
pub(super) fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut vector = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    let mut space = [0u64; 16];
    // SAFETY: an all-zero msghdr is valid.
    let mut message: libc::msghdr = unsafe { zeroed() };
    message.msg_iov = &mut vector;
    message.msg_iovlen = 1;
    message.msg_control = space.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&space) as _;
    // SAFETY: all pointers in `message` are to live locals.
    let length =
        unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT) };
    let length = check(length as libc::c_int)? as usize;
    let mut descriptors = Vec::new();
    // SAFETY: the kernel filled the control buffer; every descriptor in it is new and ours.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(&message);
        while !header.is_null() {
            if (*header).cmsg_level == libc::SOL_SOCKET && (*header).cmsg_type == libc::SCM_RIGHTS {
                let bytes = (*header).cmsg_len as usize - libc::CMSG_LEN(0) as usize;
                let data = libc::CMSG_DATA(header).cast::<RawFd>();
                for index in 0..bytes / size_of::<RawFd>() {
                    descriptors.push(OwnedFd::from_raw_fd(data.add(index).read_unaligned()));
                }
            }
            header = libc::CMSG_NXTHDR(&message, header);
        }
    }
    if message.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0 {
        return Err(io::Error::from(io::ErrorKind::InvalidData));
    }
    Ok((length, descriptors))
}

impl Channel for BorrowedFd<'_> {
    fn send(&mut self, message: &[u8]) -> Result<(), ConnectError> {
        send(*self, message, &[]).map_err(|error| match error.raw_os_error() {
            Some(libc::EPIPE | libc::ECONNRESET) => ConnectError::Broken,
            other => ConnectError::System(other.unwrap_or(libc::EIO)),
        })
    }

    fn receive(&mut self, buffer: &mut [u8], deadline: Instant) -> Result<usize, ConnectError> {
        loop {
            match receive(*self, buffer) {
                Ok((0, _)) => return Err(ConnectError::Broken),
                // Descriptors have no place here; dropping them closes them.
                Ok((length, _)) => return Ok(length),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => match wait_readable(*self, deadline) {
                    Ok(true) => {}
                    Ok(false) => return Err(ConnectError::TimedOut),
                    Err(error) => return Err(ConnectError::System(error.raw_os_error().unwrap_or(libc::EIO))),
                },
                Err(error) if error.kind() == io::ErrorKind::InvalidData => return Err(ConnectError::Malformed),
                Err(error) => {
                    return Err(match error.raw_os_error() {
                        Some(libc::ECONNRESET) => ConnectError::Broken,
                        other => ConnectError::System(other.unwrap_or(libc::EIO)),
                    });
                }
            }
        }
    }
}
