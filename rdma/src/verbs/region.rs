//! Memory that the device may reach.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicPtr, Ordering};

use rdma_sys::*;

use super::device::ProtectionDomain;
use crate::mapping::Mapping;

/// What a peer that knows the key may do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Remote {
    /// Nothing: only our own operations use it.
    Nothing,
    /// Read, write, and atomics where the device has them.
    Everything,
}

/// Registered memory. It owns what it registers, so neither can go before the other; addresses in it count from its start.
pub struct MemoryRegion {
    /// Null once withdrawn.
    region: AtomicPtr<ibv_mr>,
    local_key: u32,
    remote_key: u32,
    remote: Remote,
    memory: Arc<Mapping>,
    domain: Arc<ProtectionDomain>,
}

impl MemoryRegion {
    /// Registers the whole of `memory`.
    ///
    /// # Errors
    /// What the device says, with what to do about it.
    pub(crate) fn new(
        domain: &Arc<ProtectionDomain>,
        memory: Arc<Mapping>,
        remote: Remote,
    ) -> io::Result<Arc<MemoryRegion>> {
        let mut access = ibv_access_flags::IBV_ACCESS_LOCAL_WRITE.0;
        if remote == Remote::Everything {
            access |= ibv_access_flags::IBV_ACCESS_REMOTE_WRITE.0 | ibv_access_flags::IBV_ACCESS_REMOTE_READ.0;
            if domain.device().limits().atomics {
                access |= ibv_access_flags::IBV_ACCESS_REMOTE_ATOMIC.0;
            }
        }
        // Addresses of the region count from zero: a peer needs its key and nothing else.
        // SAFETY: the mapping is `length` bytes of readable and writable memory and outlives the registration, being owned by it.
        let region =
            unsafe { ibv_reg_mr_iova(domain.as_ptr(), memory.as_ptr().cast(), memory.len(), 0, access as libc::c_int) };
        if region.is_null() {
            return Err(explain(io::Error::last_os_error(), memory.len()));
        }
        // SAFETY: just made.
        let (local_key, remote_key) = unsafe { ((*region).lkey, (*region).rkey) };
        Ok(Arc::new(MemoryRegion {
            region: AtomicPtr::new(region),
            local_key,
            remote_key,
            remote,
            memory,
            domain: domain.clone(),
        }))
    }

    /// What peers name it by.
    pub fn remote_key(&self) -> u32 {
        self.remote_key
    }
    pub(super) fn local_key(&self) -> u32 {
        self.local_key
    }
    pub(super) fn remote(&self) -> Remote {
        self.remote
    }
    pub(crate) fn memory(&self) -> &Arc<Mapping> {
        &self.memory
    }
    /// Whether queue pairs of `domain` may use it now.
    pub(super) fn is_usable(&self, domain: &Arc<ProtectionDomain>) -> bool {
        Arc::ptr_eq(&self.domain, domain) && !self.region.load(Ordering::Acquire).is_null()
    }

    /// Takes the memory from the device: the keys name nothing any more. Operations of ours that use it fail.
    pub fn withdraw(&self) {
        let region = self.region.swap(std::ptr::null_mut(), Ordering::AcqRel);
        if region.is_null() {
            return;
        }
        // SAFETY: swapped out, so nobody else deregisters it.
        let result = unsafe { ibv_dereg_mr(region) };
        if result != 0 {
            let error = io::Error::from_raw_os_error(result.abs());
            tracing::error!(%error, length = self.memory.len(), "cannot deregister memory");
        }
    }
}

impl Drop for MemoryRegion {
    fn drop(&mut self) {
        self.withdraw();
    }
}

fn explain(error: io::Error, length: usize) -> io::Error {
    let advice = match error.raw_os_error() {
        Some(libc::ENOMEM | libc::EAGAIN | libc::EPERM) => {
            let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
            // SAFETY: `limit` has room for the answer.
            unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &mut limit) };
            if limit.rlim_cur == libc::RLIM_INFINITY {
                "memory is short: make the arena or the cache smaller".to_string()
            } else {
                format!(
                    "locked memory is limited to {} bytes: raise it with LimitMEMLOCK=infinity in the service, \
                     `ulimit -l unlimited` in the shell, or memlock in /etc/security/limits.d",
                    limit.rlim_cur
                )
            }
        }
        Some(libc::EOPNOTSUPP | libc::EFAULT | libc::EINVAL) => {
            "from Linux 6.5 on only memory and files on tmpfs or huge pages can be registered: put the arena there"
                .to_string()
        }
        _ => "see the kernel log".to_string(),
    };
    io::Error::new(error.kind(), format!("cannot register {length} bytes with the RDMA device: {error}; {advice}"))
}
