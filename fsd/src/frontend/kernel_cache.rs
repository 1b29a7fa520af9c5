//! How the volume has pages and attributes dropped that the kernel caches.

use std::sync::OnceLock;

use fuser::Notifier;
use verbfs_protocol::Ino;

use crate::volume::KernelCache;

/// The kernel's cache of one mount. Made before the mount, which [attaches](Self::attach) itself;
/// until then nothing is cached and nothing needs dropping.
#[derive(Default)]
pub struct FuseKernelCache {
    notifier: OnceLock<Notifier>,
}

impl FuseKernelCache {
    /// From here on invalidations go to this mount. The first one stays.
    pub fn attach(&self, notifier: Notifier) {
        let _ = self.notifier.set(notifier);
    }
}

impl KernelCache for FuseKernelCache {
    /// Drops the pages that overlap `[offset, offset + length)` and the attributes; `length` 0
    /// drops the attributes only, which never waits for a page lock. A `length` that reaches past `i64::MAX` means "to the end".
    fn invalidate(&self, ino: Ino, offset: u64, length: u64) {
        let Some(notifier) = self.notifier.get() else { return };
        let (offset, length) = kernel_range(offset, length);
        match notifier.inval_inode(super::convert::node_id(ino), offset, length) {
            Ok(()) => {}
            // The kernel has no such inode (ENOENT never gets here: fuser takes it for success), or the mount is gone.
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::ENOENT | libc::ENODEV | libc::ENOTCONN | libc::EPERM | libc::ECONNABORTED)
                ) => {}
            Err(error) => tracing::warn!(%ino, offset, length, %error, "the kernel refused to drop cached pages"),
        }
    }
}

/// The arguments of `fuse_reverse_inval_inode`: a negative offset means "attributes only", a length of zero or less "to the end".
fn kernel_range(offset: u64, length: u64) -> (i64, i64) {
    match (i64::try_from(offset), length) {
        (_, 0) | (Err(_), _) => (-1, 0),
        (Ok(start), length) => {
            (start, i64::try_from(length).ok().filter(|length| start.checked_add(*length).is_some()).unwrap_or(0))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::kernel_range;

    #[test]
    fn ranges_are_those_of_the_kernel() {
        assert_eq!(kernel_range(4096, 8192), (4096, 8192));
        assert_eq!(kernel_range(4096, 0), (-1, 0));
        assert_eq!(kernel_range(0, u64::MAX), (0, 0));
        assert_eq!(kernel_range(4096, i64::MAX as u64), (4096, 0));
        assert_eq!(kernel_range(u64::MAX, 1), (-1, 0));
    }
}
