//! A reliable connected queue pair, which keeps what its operations use until they have ended.
//!
//! Memory under an operation is held by the queue pair itself: an operation is posted with an [`Arc`] of its region, and
//! that is let go when its completion has been polled, or when the queue pair has been destroyed. So nothing a caller does
//! can make the device reach memory that is gone.
//!
//! Operations are gathered by a [`PostGuard`] and handed to the device as one chain, with one doorbell. The guard borrows
//! the queue pair, so there is one at a time, and it cannot outlive it:
//!
//! ```compile_fail,E0499
//! # use verbfs_rdma::verbs::queue_pair::QueuePair;
//! fn two_at_once(pair: &mut QueuePair) {
//!     let first = pair.gather();
//!     let second = pair.gather();
//!     first.ring();
//! }
//! ```
//! ```compile_fail,E0505
//! # use verbfs_rdma::verbs::queue_pair::QueuePair;
//! fn outliving(mut pair: QueuePair) {
//!     let guard = pair.gather();
//!     drop(pair);
//!     guard.ring();
//! }
//! ```
//! ```compile_fail,E0382
//! # use verbfs_rdma::verbs::queue_pair::QueuePair;
//! fn ringing_twice(pair: &mut QueuePair) {
//!     let guard = pair.gather();
//!     guard.ring();
//!     guard.ring();
//! }
//! ```
//! The same with one guard after the other compiles, so the examples above fail for what they say:
//! ```
//! # use verbfs_rdma::verbs::queue_pair::QueuePair;
//! fn one_after_the_other(pair: &mut QueuePair) {
//!     pair.gather().ring();
//!     pair.gather().ring();
//! }
//! ```

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use rdma_sys::*;

use super::completion::{Completion, CompletionChannel, CompletionQueue};
use super::connection_manager::Attributes;
use super::device::{ProtectionDomain, check};
use super::region::{MemoryRegion, Remote};
use crate::fabric::{CONTROL_LENGTH_MAXIMUM, WorkError};
use crate::mapping::Mapping;

/// Bytes of a buffer for one message: tag and set-up message, rounded to 16.
pub(super) const MESSAGE_LENGTH: usize = (1 + CONTROL_LENGTH_MAXIMUM).next_multiple_of(16);
/// Messages of ours under way at one time.
pub(super) const OUTGOING_MESSAGES: usize = 32;
/// Bytes we would like to hand over with the request itself: records of a few units. A device that cannot takes none.
const INLINE_WANTED: u32 = 192;
/// Completions that may be in a queue beyond one for each request, so that a queue is never quite full.
const COMPLETIONS_SPARE: u32 = 8;
/// Retries before a peer that does not answer is given up. Seven would mean for ever with SoftRoCE.
const RETRIES: u8 = 6;
/// Retries when the peer has no receive posted. Flow control makes sure that it has, so this bounds what a broken one costs.
const RECEIVER_NOT_READY_RETRIES: u8 = 6;
/// 0.64 ms between them (InfiniBand's table of RNR timers).
const RECEIVER_NOT_READY_TIMER: u8 = 12;
/// How long an answer may take: 4.096 us * 2^16, a quarter of a second; with the retries two seconds until a peer is given up.
const ACKNOWLEDGE_TIMEOUT: u8 = 16;

/// How many requests a queue pair takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Depth {
    pub sends: u32,
    pub receives: u32,
}

/// Part of a region.
#[derive(Clone)]
pub struct LocalRange {
    pub(super) memory: Arc<MemoryRegion>,
    pub(super) offset: u64,
    pub(super) length: u32,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    Write,
    WriteImmediate(u32),
    Read,
    CompareSwap {
        expected: u64,
        new: u64,
    },
    FetchAdd {
        addend: u64,
    },
    /// Takes one of the peer's receives.
    Message,
}

impl Verb {
    /// Whether the peer's memory is read, so that what follows may overtake it.
    pub(super) fn fetches(self) -> bool {
        matches!(self, Verb::Read | Verb::CompareSwap { .. } | Verb::FetchAdd { .. })
    }
    /// Whether it is done in one step on one word.
    pub(super) fn is_atomic(self) -> bool {
        matches!(self, Verb::CompareSwap { .. } | Verb::FetchAdd { .. })
    }
    /// Whether it takes one of the peer's receives.
    pub(super) fn is_announced(self) -> bool {
        matches!(self, Verb::WriteImmediate(_) | Verb::Message)
    }
}

/// Who wants to know of an operation's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// The consumer, by this id.
    Reported(u64),
    /// Nobody.
    Silent,
    /// The buffer of that number becomes free.
    Message(u16),
}

/// One operation as handed to [`PostGuard::push`].
pub struct Request {
    pub verb: Verb,
    pub local: LocalRange,
    /// The peer's key, and bytes from the start of its region.
    pub remote: (u32, u64),
    pub work: Work,
    /// Whether its end is reported by a completion of its own; that of a later one says so otherwise.
    pub signalled: bool,
    /// Whether it waits for the reads and atomics before it.
    pub fenced: bool,
}

struct InFlight {
    work: Work,
    fetches: bool,
    /// Held until the device is done with it.
    _memory: Arc<MemoryRegion>,
}

/// How an operation failed, with what the device calls it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failure {
    pub error: WorkError,
    /// An `ibv_wc_status`.
    pub status: u32,
}

/// What arrived.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// The peer's write with immediate is in place.
    Immediate { immediate: u32, length: u32 },
    /// A message of the peer.
    Message(Vec<u8>),
}

/// See the module.
pub struct QueuePair {
    /// Null once destroyed.
    pair: *mut ibv_qp,
    depth: Depth,
    inline: u32,
    in_flight: VecDeque<InFlight>,
    /// Sequence number of the first in flight; the work id the device knows a request by is such a number.
    first: u64,
    fetching: usize,
    requests: Vec<(ibv_send_wr, ibv_sge)>,
    /// One buffer of [`MESSAGE_LENGTH`] bytes for each receive, then one for each outgoing message.
    buffers: Arc<MemoryRegion>,
    free_buffers: Vec<u16>,
    completions: Vec<Completion>,
    send_completions: CompletionQueue,
    receive_completions: CompletionQueue,
    domain: Arc<ProtectionDomain>,
}

// SAFETY: libibverbs allows use from any thread; the pointers in `requests` are only valid, and only followed, within one call.
unsafe impl Send for QueuePair {}

impl QueuePair {
    /// A queue pair that is connected to nobody, in the state RESET.
    ///
    /// # Errors
    /// What the device says.
    pub fn new(
        domain: &Arc<ProtectionDomain>,
        channel: &Arc<CompletionChannel>,
        depth: Depth,
    ) -> io::Result<QueuePair> {
        let slots = depth.receives as usize + OUTGOING_MESSAGES;
        let length = slots * MESSAGE_LENGTH;
        let memory = Mapping::new(crate::shm::socket::sealed_memory(length)?.as_fd(), length)?;
        let buffers = MemoryRegion::new(domain, Arc::new(memory), Remote::Nothing)?;
        let send_completions = CompletionQueue::new(channel, depth.sends + COMPLETIONS_SPARE)?;
        let receive_completions = CompletionQueue::new(channel, depth.receives + COMPLETIONS_SPARE)?;
        let mut pair = std::ptr::null_mut();
        let mut inline = 0;
        for wanted in [INLINE_WANTED, 0] {
            let mut attributes = ibv_qp_init_attr {
                qp_context: std::ptr::null_mut(),
                send_cq: send_completions.as_ptr(),
                recv_cq: receive_completions.as_ptr(),
                srq: std::ptr::null_mut(),
                cap: ibv_qp_cap {
                    max_send_wr: depth.sends,
                    max_recv_wr: depth.receives,
                    max_send_sge: 1,
                    max_recv_sge: 1,
                    max_inline_data: wanted,
                },
                qp_type: ibv_qp_type::IBV_QPT_RC,
                sq_sig_all: 0,
            };
            // SAFETY: domain and completion queues are alive, and the queue pair will hold them.
            pair = unsafe { ibv_create_qp(domain.as_ptr(), &mut attributes) };
            if !pair.is_null() {
                inline = attributes.cap.max_inline_data.min(wanted);
                break;
            }
        }
        if pair.is_null() {
            return Err(io::Error::last_os_error());
        }
        Ok(QueuePair {
            pair,
            depth,
            inline,
            in_flight: VecDeque::new(),
            first: 0,
            fetching: 0,
            requests: Vec::new(),
            buffers,
            free_buffers: (0..OUTGOING_MESSAGES as u16).rev().collect(),
            completions: Vec::new(),
            send_completions,
            receive_completions,
            domain: domain.clone(),
        })
    }

    /// What the peer addresses it by.
    pub fn number(&self) -> u32 {
        // SAFETY: alive as long as `destroy` has not been called, which consumes what could ask.
        unsafe { (*self.pair).qp_num }
    }
    /// What asynchronous events name it by.
    pub fn identity(&self) -> usize {
        self.pair as usize
    }
    /// Bytes that travel with a request.
    pub fn inline_length(&self) -> u32 {
        self.inline
    }
    pub(super) fn domain(&self) -> &Arc<ProtectionDomain> {
        &self.domain
    }
    pub(super) fn depth(&self) -> Depth {
        self.depth
    }

    /// RESET to INIT: bound to its port, and told what a peer may do.
    ///
    /// # Errors
    /// What the device says.
    pub fn initialize(&mut self, mut attributes: Attributes) -> io::Result<()> {
        let mut access = ibv_access_flags::IBV_ACCESS_REMOTE_WRITE.0 | ibv_access_flags::IBV_ACCESS_REMOTE_READ.0;
        if self.domain.device().limits().atomics {
            access |= ibv_access_flags::IBV_ACCESS_REMOTE_ATOMIC.0;
        }
        attributes.attributes.qp_access_flags = access;
        attributes.mask |= ibv_qp_attr_mask::IBV_QP_ACCESS_FLAGS.0 as libc::c_int;
        self.modify(attributes)
    }

    /// INIT to RTR: it answers its peer from now on, up to `reads_served` reads and atomics at a time.
    ///
    /// # Errors
    /// What the device says.
    pub fn become_ready_to_receive(&mut self, mut attributes: Attributes, reads_served: Option<u8>) -> io::Result<()> {
        if let Some(reads) = reads_served {
            attributes.attributes.max_dest_rd_atomic = reads;
        }
        attributes.attributes.min_rnr_timer = RECEIVER_NOT_READY_TIMER;
        attributes.mask |= ibv_qp_attr_mask::IBV_QP_MIN_RNR_TIMER.0 as libc::c_int;
        self.modify(attributes)
    }

    /// RTR to RTS: it works, with up to `reads_initiated` reads and atomics at a time.
    ///
    /// # Errors
    /// What the device says.
    pub fn become_ready_to_send(&mut self, mut attributes: Attributes, reads_initiated: Option<u8>) -> io::Result<()> {
        if let Some(reads) = reads_initiated {
            attributes.attributes.max_rd_atomic = reads;
        }
        attributes.attributes.timeout = ACKNOWLEDGE_TIMEOUT;
        attributes.attributes.retry_cnt = RETRIES;
        attributes.attributes.rnr_retry = RECEIVER_NOT_READY_RETRIES;
        self.modify(attributes)
    }

    /// To ERR: nothing is answered and nothing sent any more; what was posted is flushed.
    ///
    /// # Errors
    /// What the device says.
    pub fn fail(&mut self) -> io::Result<()> {
        let mut attributes = Attributes::zeroed();
        attributes.attributes.qp_state = ibv_qp_state::IBV_QPS_ERR;
        attributes.mask = ibv_qp_attr_mask::IBV_QP_STATE.0 as libc::c_int;
        self.modify(attributes)
    }

    fn modify(&mut self, mut attributes: Attributes) -> io::Result<()> {
        // SAFETY: the queue pair is alive and the attributes are valid for the call.
        check(unsafe { ibv_modify_qp(self.pair, &mut attributes.attributes, attributes.mask) })
    }

    /// Once this returns `Ok`, no operation of the peer reaches our memory and none of ours is under way.
    ///
    /// # Errors
    /// What the device says; the queue pair may still be there, and dropping it tries again.
    pub fn destroy(&mut self) -> io::Result<()> {
        if self.pair.is_null() {
            return Ok(());
        }
        // SAFETY: alive, and set to null below, so destroyed once.
        check(unsafe { ibv_destroy_qp(self.pair) })?;
        self.pair = std::ptr::null_mut();
        Ok(())
    }

    /// Room for further operations, those in flight considered.
    pub fn room(&self) -> usize {
        (self.depth.sends as usize).saturating_sub(self.in_flight.len())
    }
    /// Whether reads or atomics are in flight, which a fenced operation waits for.
    pub fn is_fetching(&self) -> bool {
        self.fetching > 0
    }
    /// Whether somebody waits for the end of an operation in flight.
    pub fn is_awaited(&self) -> bool {
        self.in_flight.iter().any(|operation| operation.work != Work::Silent)
    }

    /// Starts a chain of operations.
    pub fn gather(&mut self) -> PostGuard<'_> {
        self.requests.clear();
        PostGuard { pair: self }
    }

    /// A buffer for an outgoing message with `bytes` in it; free again when the message's work has ended.
    ///
    /// # Panics
    /// When the message is longer than a buffer.
    pub(super) fn message(&mut self, bytes: &[u8]) -> Option<(LocalRange, Work)> {
        assert!(bytes.len() <= MESSAGE_LENGTH, "message too long");
        let number = self.free_buffers.pop()?;
        let offset = (self.depth.receives as usize + usize::from(number)) * MESSAGE_LENGTH;
        // SAFETY: the buffer is inside the mapping, and no operation uses it: its number was free.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.buffers.memory().as_ptr().add(offset), bytes.len());
        }
        let local = LocalRange { memory: self.buffers.clone(), offset: offset as u64, length: bytes.len() as u32 };
        Some((local, Work::Message(number)))
    }

    /// Posts receives into the buffers `slots`, which must not be posted already.
    ///
    /// # Errors
    /// What the device says.
    pub fn post_receives(&mut self, slots: impl IntoIterator<Item = u32>) -> io::Result<()> {
        let mut requests: Vec<(ibv_recv_wr, ibv_sge)> = slots
            .into_iter()
            .filter(|slot| *slot < self.depth.receives)
            .map(|slot| {
                let entry = ibv_sge {
                    addr: u64::from(slot) * MESSAGE_LENGTH as u64,
                    length: MESSAGE_LENGTH as u32,
                    lkey: self.buffers.local_key(),
                };
                let request = ibv_recv_wr {
                    wr_id: u64::from(slot),
                    next: std::ptr::null_mut(),
                    sg_list: std::ptr::null_mut(),
                    num_sge: 1,
                };
                (request, entry)
            })
            .collect();
        if requests.is_empty() {
            return Ok(());
        }
        let mut next = std::ptr::null_mut();
        for (request, entry) in requests.iter_mut().rev() {
            request.sg_list = entry;
            request.next = next;
            next = request;
        }
        let mut bad = std::ptr::null_mut();
        // SAFETY: the chain lies in `requests`, which lives through the call and no longer moves; the buffers belong to the
        // queue pair and go after it.
        check(unsafe { ibv_post_recv(self.pair, next, &mut bad) })
    }

    /// Makes the channel readable when a peer's next message or immediate arrives.
    ///
    /// # Errors
    /// What the device says.
    pub fn request_arrival_notification(&self) -> io::Result<()> {
        self.receive_completions.request_notification()
    }
    /// Makes the channel readable when the next signalled operation of ours ends.
    ///
    /// # Errors
    /// What the device says.
    pub fn request_end_notification(&self) -> io::Result<()> {
        self.send_completions.request_notification()
    }

    /// Appends the operations that have ended, in the order they were posted; returns how many completions said so.
    ///
    /// # Errors
    /// When the completion queue overflowed or the device is gone.
    pub fn poll_ends(&mut self, ended: &mut Vec<(Work, Result<(), Failure>)>) -> io::Result<usize> {
        self.completions.clear();
        let count = self.send_completions.poll(&mut self.completions)?;
        for index in 0..self.completions.len() {
            let completion = self.completions[index];
            // Everything before it has ended well, or would have had a completion of its own.
            while self.first < completion.work_id
                && let Some(operation) = self.take_first()
            {
                ended.push((operation.work, Ok(())));
            }
            if self.first != completion.work_id {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "a completion of what was never posted"));
            }
            let Some(operation) = self.take_first() else { continue };
            let result = if completion.succeeded() {
                Ok(())
            } else {
                let error = match completion.status {
                    ibv_wc_status::IBV_WC_REM_ACCESS_ERR | ibv_wc_status::IBV_WC_REM_INV_REQ_ERR => {
                        WorkError::RemoteAccess
                    }
                    _ => WorkError::Flushed,
                };
                Err(Failure { error, status: completion.status })
            };
            ended.push((operation.work, result));
        }
        Ok(count)
    }

    fn take_first(&mut self) -> Option<InFlight> {
        let operation = self.in_flight.pop_front()?;
        self.first += 1;
        self.fetching -= usize::from(operation.fetches);
        if let Work::Message(number) = operation.work {
            self.free_buffers.push(number);
        }
        Some(operation)
    }

    /// Appends what has arrived and the buffers it came in, which have to be posted again; returns how many completions
    /// there were. False in the second place: the queue pair is broken.
    ///
    /// # Errors
    /// When the completion queue overflowed or the device is gone.
    pub fn poll_arrivals(&mut self, arrivals: &mut Vec<(u32, Arrival)>) -> io::Result<(usize, bool)> {
        self.completions.clear();
        let count = self.receive_completions.poll(&mut self.completions)?;
        for completion in &self.completions {
            if !completion.succeeded() {
                return Ok((count, false));
            }
            let slot = completion.work_id as u32;
            let arrival = if completion.opcode == ibv_wc_opcode::IBV_WC_RECV_RDMA_WITH_IMM {
                Arrival::Immediate { immediate: completion.immediate, length: completion.length }
            } else {
                let length = (completion.length as usize).min(MESSAGE_LENGTH);
                let mut bytes = vec![0; length];
                let offset = slot as usize * MESSAGE_LENGTH;
                let memory = self.buffers.memory();
                assert!(memory.contains(offset as u64, length as u64), "a receive into no buffer of ours");
                // SAFETY: inside the mapping, as just checked; the device has finished with the buffer.
                unsafe { std::ptr::copy_nonoverlapping(memory.as_ptr().add(offset), bytes.as_mut_ptr(), length) };
                Arrival::Message(bytes)
            };
            arrivals.push((slot, arrival));
        }
        Ok((count, true))
    }

    /// The ids of operations in flight that somebody waits for, in order.
    pub(super) fn awaited(&self) -> impl Iterator<Item = u64> + '_ {
        self.in_flight.iter().filter_map(|operation| match operation.work {
            Work::Reported(work_id) => Some(work_id),
            _ => None,
        })
    }
}

impl Drop for QueuePair {
    fn drop(&mut self) {
        if let Err(error) = self.destroy() {
            // Its memory must outlive it: better lost than reached by a peer after it was given away.
            tracing::error!(%error, "cannot destroy a queue pair; its memory is kept for good");
            std::mem::forget(std::mem::take(&mut self.in_flight));
            std::mem::forget(self.buffers.clone());
        }
    }
}

/// A chain of operations to be posted with one doorbell. Dropped without [`PostGuard::ring`], nothing is posted.
pub struct PostGuard<'a> {
    pair: &'a mut QueuePair,
}

impl PostGuard<'_> {
    /// Appends an operation, if there is room.
    ///
    /// # Panics
    /// When the local range leaves its region, or the region cannot be used with this queue pair.
    pub fn push(&mut self, request: Request) -> bool {
        let pair = &mut *self.pair;
        if pair.room() == 0 {
            return false;
        }
        let Request { verb, local, remote: (key, offset), work, signalled, fenced } = request;
        assert!(local.memory.memory().contains(local.offset, u64::from(local.length)), "range outside the region");
        let mut flags = 0;
        if signalled {
            flags |= ibv_send_flags::IBV_SEND_SIGNALED.0;
        }
        if fenced {
            flags |= ibv_send_flags::IBV_SEND_FENCE.0;
        }
        let inline = !verb.fetches() && local.length > 0 && local.length <= pair.inline;
        let address = if inline {
            flags |= ibv_send_flags::IBV_SEND_INLINE.0;
            // The processor copies it, so it wants the true address.
            local.memory.memory().as_ptr() as u64 + local.offset
        } else {
            local.offset
        };
        let rdma = wr_t { rdma: rdma_t { remote_addr: offset, rkey: key } };
        let atomic =
            |compare_add, swap| wr_t { atomic: atomic_t { remote_addr: offset, compare_add, swap, rkey: key } };
        let (opcode, immediate, wr) = match verb {
            Verb::Write => (ibv_wr_opcode::IBV_WR_RDMA_WRITE, 0, rdma),
            Verb::WriteImmediate(immediate) => (ibv_wr_opcode::IBV_WR_RDMA_WRITE_WITH_IMM, immediate, rdma),
            Verb::Read => (ibv_wr_opcode::IBV_WR_RDMA_READ, 0, rdma),
            Verb::CompareSwap { expected, new } => (ibv_wr_opcode::IBV_WR_ATOMIC_CMP_AND_SWP, 0, atomic(expected, new)),
            Verb::FetchAdd { addend } => (ibv_wr_opcode::IBV_WR_ATOMIC_FETCH_AND_ADD, 0, atomic(addend, 0)),
            Verb::Message => (ibv_wr_opcode::IBV_WR_SEND, 0, rdma),
        };
        let request = ibv_send_wr {
            wr_id: pair.first + pair.in_flight.len() as u64,
            next: std::ptr::null_mut(),
            sg_list: std::ptr::null_mut(),
            num_sge: libc::c_int::from(local.length > 0),
            opcode,
            send_flags: flags,
            imm_data_invalidated_rkey_union: imm_data_invalidated_rkey_union_t { imm_data: immediate.to_be() },
            wr,
            qp_type: qp_type_t { xrc: xrc_t { remote_srqn: 0 } },
            bind_mw_tso_union: bind_mw_tso_union_t { tso: tso_t { hdr: std::ptr::null_mut(), hdr_sz: 0, mss: 0 } },
        };
        let entry = ibv_sge { addr: address, length: local.length, lkey: local.memory.local_key() };
        pair.requests.push((request, entry));
        pair.fetching += usize::from(verb.fetches());
        pair.in_flight.push_back(InFlight { work, fetches: verb.fetches(), _memory: local.memory });
        true
    }

    /// Whether nothing was pushed.
    pub fn is_empty(&self) -> bool {
        self.pair.requests.is_empty()
    }

    /// Whether reads or atomics are in flight or in the chain.
    pub fn is_fetching(&self) -> bool {
        self.pair.is_fetching()
    }

    /// Hands the chain to the device.
    ///
    /// # Errors
    /// What the device says. Part of the chain may be under way; the queue pair is of no more use.
    pub fn ring(self) -> io::Result<()> {
        let pair = &mut *self.pair;
        let mut next = std::ptr::null_mut();
        for (request, entry) in pair.requests.iter_mut().rev() {
            request.sg_list = entry;
            request.next = next;
            next = request;
        }
        let result = if next.is_null() {
            Ok(())
        } else {
            let mut bad = std::ptr::null_mut();
            // SAFETY: the chain lies in `requests`, which lives through the call and no longer moves. Local ranges were
            // checked against their regions, and the regions are in `in_flight` until the device is done with them.
            check(unsafe { ibv_post_send(pair.pair, next, &mut bad) })
        };
        pair.requests.clear();
        result
    }
}

impl Drop for PostGuard<'_> {
    fn drop(&mut self) {
        // Not rung: these were never in flight.
        for _ in 0..self.pair.requests.len() {
            if let Some(operation) = self.pair.in_flight.pop_back() {
                self.pair.fetching -= usize::from(operation.fetches);
                if let Work::Message(number) = operation.work {
                    self.pair.free_buffers.push(number);
                }
            }
        }
        self.pair.requests.clear();
    }
}
