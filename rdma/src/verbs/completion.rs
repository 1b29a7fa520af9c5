//! Completion queues and the channel that tells when one has news.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::RawFd;
use std::sync::Arc;

use rdma_sys::*;

use super::device::{Device, check, set_nonblocking};

/// Completions taken from a queue in one call.
const BATCH: usize = 32;

/// Becomes readable when an armed queue gets a completion.
pub struct CompletionChannel {
    channel: *mut ibv_comp_channel,
    device: Arc<Device>,
}

// SAFETY: libibverbs allows use from any thread.
unsafe impl Send for CompletionChannel {}
// SAFETY: as above.
unsafe impl Sync for CompletionChannel {}

impl CompletionChannel {
    /// # Errors
    /// What the device says.
    pub fn new(device: &Arc<Device>) -> io::Result<Arc<CompletionChannel>> {
        // SAFETY: the context is open as long as the device, which the channel holds.
        let channel = unsafe { ibv_create_comp_channel(device.context()) };
        if channel.is_null() {
            return Err(io::Error::last_os_error());
        }
        let channel = CompletionChannel { channel, device: device.clone() };
        set_nonblocking(channel.descriptor())?;
        Ok(Arc::new(channel))
    }

    /// Readable when an armed queue has had a completion since.
    pub fn descriptor(&self) -> RawFd {
        // SAFETY: the channel lives as long as `self`.
        unsafe { (*self.channel).fd }
    }

    /// Takes all news, and says how many there were. Never blocks.
    pub fn drain(&self) -> usize {
        let mut taken = 0;
        loop {
            let (mut queue, mut context) = (std::ptr::null_mut(), std::ptr::null_mut());
            // SAFETY: both pointers have room. Destroying a queue takes its news off the channel and waits until those that
            // were taken are acknowledged, so `queue` is alive here.
            unsafe {
                if ibv_get_cq_event(self.channel, &mut queue, &mut context) != 0 {
                    return taken;
                }
                ibv_ack_cq_events(queue, 1);
            }
            taken += 1;
        }
    }
}

impl Drop for CompletionChannel {
    fn drop(&mut self) {
        // SAFETY: queues hold the channel, so none is left.
        if unsafe { ibv_destroy_comp_channel(self.channel) } != 0 {
            tracing::error!(device = self.device.name(), "cannot destroy a completion channel");
        }
    }
}

/// How one work request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    pub work_id: u64,
    pub status: u32,
    /// Valid only when the status is success, as all that follows.
    pub opcode: u32,
    pub length: u32,
    /// Zero when the peer sent none.
    pub immediate: u32,
}

impl Completion {
    pub(super) fn succeeded(&self) -> bool {
        self.status == ibv_wc_status::IBV_WC_SUCCESS
    }
}

/// A completion queue.
pub struct CompletionQueue {
    queue: *mut ibv_cq,
    channel: Arc<CompletionChannel>,
}

// SAFETY: libibverbs allows use from any thread.
unsafe impl Send for CompletionQueue {}
// SAFETY: as above.
unsafe impl Sync for CompletionQueue {}

impl CompletionQueue {
    /// A queue of at least `entries`. Whoever puts more work on it than that loses completions.
    ///
    /// # Errors
    /// What the device says.
    pub fn new(channel: &Arc<CompletionChannel>, entries: u32) -> io::Result<CompletionQueue> {
        let entries = libc::c_int::try_from(entries).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        // SAFETY: the context and the channel live as long as the channel, which the queue holds.
        let queue =
            unsafe { ibv_create_cq(channel.device.context(), entries, std::ptr::null_mut(), channel.channel, 0) };
        if queue.is_null() {
            return Err(io::Error::last_os_error());
        }
        Ok(CompletionQueue { queue, channel: channel.clone() })
    }

    pub(super) fn as_ptr(&self) -> *mut ibv_cq {
        self.queue
    }

    /// The next completion makes the channel readable. Those that are in the queue already do not: poll once more.
    ///
    /// # Errors
    /// What the device says.
    pub fn request_notification(&self) -> io::Result<()> {
        // SAFETY: the queue is alive.
        check(unsafe { ibv_req_notify_cq(self.queue, 0) })
    }

    /// Appends what has completed, at most 32 entries; returns how many.
    ///
    /// # Errors
    /// When the queue overflowed or the device is gone.
    pub fn poll(&self, completions: &mut Vec<Completion>) -> io::Result<usize> {
        let mut batch = [const { MaybeUninit::<ibv_wc>::uninit() }; BATCH];
        // SAFETY: the queue is alive and `batch` has room for as many entries as we say.
        let count = unsafe { ibv_poll_cq(self.queue, BATCH as i32, batch.as_mut_ptr().cast()) };
        let count = usize::try_from(count).map_err(|_| io::Error::from_raw_os_error(libc::EIO))?;
        completions.extend(batch[..count].iter().map(|entry| {
            // SAFETY: the device filled `count` entries. Each field is read on its own and none has invalid values; the
            // immediate is only read where the entry says that there is one.
            unsafe {
                let entry = entry.as_ptr();
                let has_immediate = (*entry).status == ibv_wc_status::IBV_WC_SUCCESS
                    && (*entry).wc_flags & ibv_wc_flags::IBV_WC_WITH_IMM.0 != 0;
                Completion {
                    work_id: (*entry).wr_id,
                    status: (*entry).status,
                    opcode: (*entry).opcode,
                    length: (*entry).byte_len,
                    immediate: if has_immediate {
                        u32::from_be((*entry).imm_data_invalidated_rkey_union.imm_data)
                    } else {
                        0
                    },
                }
            }
        }));
        Ok(count)
    }
}

impl Drop for CompletionQueue {
    fn drop(&mut self) {
        // SAFETY: the queue pair that completes here holds the queue, so it is gone; taken news were acknowledged at once.
        if unsafe { ibv_destroy_cq(self.queue) } != 0 {
            tracing::error!(device = self.channel.device.name(), "cannot destroy a completion queue");
        }
    }
}
