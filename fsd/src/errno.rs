//! Errors as the kernel knows them.

/// An errno value: what a failed operation returns to its caller.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(pub i32);

macro_rules! errnos {
    ($($name:ident)*) => {
        impl Errno { $(pub const $name: Errno = Errno(libc::$name);)* }
        impl std::fmt::Debug for Errno {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                match self.0 {
                    $(libc::$name => f.write_str(stringify!($name)),)*
                    other => write!(f, "errno {other}"),
                }
            }
        }
    };
}
errnos! {
    EPERM ENOENT EINTR EIO E2BIG EBADF EAGAIN ENOMEM EACCES EBUSY EEXIST EXDEV ENOTDIR EISDIR EINVAL EFBIG ENOSPC EROFS EMLINK ERANGE
    EDEADLK ENAMETOOLONG ENOTEMPTY ELOOP ENODATA EOPNOTSUPP ENXIO ESTALE ECANCELED ETIMEDOUT ENOTCONN EPROTO ENOLCK EDQUOT ENOSYS
}

impl Errno {
    /// An error number out of a message. What no kernel takes as one (FUSE would leave the caller waiting for ever) is EIO.
    pub fn from_peer(errno: i32) -> Errno {
        const LARGEST: i32 = 511;
        if (1..=LARGEST).contains(&errno) { Errno(errno) } else { Errno::EIO }
    }
}

impl std::fmt::Display for Errno {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", std::io::Error::from_raw_os_error(self.0))
    }
}

impl std::error::Error for Errno {}

pub type Result<T> = std::result::Result<T, Errno>;
