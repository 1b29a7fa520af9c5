//! The one-sided fabric: what a provider promises.
//!
//! A provider joins *slots* (nodes) by reliable connections that behave as RC queue pairs do:
//! - operations of one connection take effect at the target, and complete at the initiator, in the order posted;
//! - the target's processor takes no part;
//! - an operation that names a wrong key or leaves its region changes nothing, completes with
//!   [`WorkError::RemoteAccess`], and its connection is finished: what follows is flushed;
//! - a write with immediate is announced to the target after its bytes are in place.
//!
//! Nothing is promised across connections, nor about the order in which the bytes *of one write* become visible, but for
//! [`Fabric::publish`]. Atomics are atomic to other fabric atomics on the same word and, with `shm` only, to the processor.

use std::fmt;
use std::fs::File;
use std::os::fd::{OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use crate::handshake::{ConnectError, Hello};
use crate::mapping::Mapping;
use crate::verbs::region::MemoryRegion;

/// What a remote party names a region by. Never reused within a daemon's life.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct RemoteKey(pub u32);

/// Who may name a region.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// Every connected peer, those that connect later too.
    Everyone,
    /// This one peer.
    Peer(u16),
    /// Nobody: the region only serves as the local side of our own operations.
    Local,
}

pub(crate) struct RegionInner {
    /// With `verbs`: what the device knows the memory by. First, so that it goes before the memory does.
    pub(crate) registration: Option<Arc<MemoryRegion>>,
    pub(crate) mapping: Arc<Mapping>,
    pub(crate) key: RemoteKey,
    /// With `shm`: what peers map.
    pub(crate) descriptor: Option<Arc<OwnedFd>>,
    /// Anonymous memory is sealed against shrinking, a file is not.
    pub(crate) sealed: bool,
}

/// Registered memory. Clones share it; it is unmapped when the last clone is gone *and* it was deregistered.
///
/// The bytes are shared with other processes, which is why no `&[u8]` is ever handed out: copy in and out, or use the
/// pointer under your own proof that nobody writes.
#[derive(Clone)]
pub struct Region(pub(crate) Arc<RegionInner>);

impl Region {
    /// First byte; page-aligned.
    pub fn as_ptr(&self) -> *mut u8 {
        self.0.mapping.as_ptr()
    }
    /// Length in bytes, at least 1.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.0.mapping.len()
    }
    /// What peers name it by.
    pub fn key(&self) -> RemoteKey {
        self.0.key
    }
    /// Whether `[offset, offset + length)` lies inside.
    pub fn contains(&self, offset: u64, length: u64) -> bool {
        self.0.mapping.contains(offset, length)
    }
    /// Copies bytes in.
    ///
    /// # Panics
    /// When the range leaves the region.
    pub fn write_at(&self, offset: usize, bytes: &[u8]) {
        assert!(self.contains(offset as u64, bytes.len() as u64), "range outside the region");
        // SAFETY: the range is inside the mapping, and `bytes` cannot overlap it: no reference to it is ever handed out.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.as_ptr().add(offset), bytes.len()) }
    }
    /// Copies bytes out.
    ///
    /// # Panics
    /// When the range leaves the region.
    pub fn read_at(&self, offset: usize, bytes: &mut [u8]) {
        assert!(self.contains(offset as u64, bytes.len() as u64), "range outside the region");
        // SAFETY: the range is inside the mapping, and `bytes` cannot overlap it: no reference to it is ever handed out.
        unsafe { std::ptr::copy_nonoverlapping(self.as_ptr().add(offset), bytes.as_mut_ptr(), bytes.len()) }
    }
    /// Copies bytes out into a new vector.
    ///
    /// # Panics
    /// When the range leaves the region.
    pub fn to_vec(&self, offset: usize, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.read_at(offset, &mut bytes);
        bytes
    }
    /// The 64-bit word at `offset`.
    ///
    /// # Panics
    /// When the word leaves the region or `offset` is not a multiple of 8.
    pub fn word(&self, offset: usize) -> &AtomicU64 {
        self.0.mapping.word(offset)
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Region").field("key", &self.0.key.0).field("length", &self.len()).finish()
    }
}

/// The local side of an operation.
#[derive(Clone, Copy, Debug)]
pub struct Local<'a> {
    pub region: &'a Region,
    /// Bytes from the region's start.
    pub offset: u64,
    /// Bytes. Zero is allowed.
    pub length: u32,
}

/// The remote side of an operation.
#[derive(Clone, Copy, Debug)]
pub struct Remote {
    pub key: RemoteKey,
    /// Bytes from the region's start.
    pub offset: u64,
}

/// Why an operation could not even be posted. Nothing has happened and there will be no completion.
#[derive(thiserror::Error, Debug, PartialEq, Eq, Clone, Copy)]
pub enum PostError {
    #[error("slot {0} is not connected")]
    NotConnected(u16),
    #[error("the local range lies outside its region")]
    LocalBounds,
    #[error("an atomic needs an 8-byte local range aligned to 8")]
    Misaligned,
    #[error("too many operations wait on this connection")]
    QueueFull,
    #[error("work ids from {:#x} on are the mailbox's own", crate::RESERVED_WORK_IDS)]
    ReservedWorkId,
    #[error("longer than one operation of this device can be")]
    TooLong,
    #[error("this device has no atomic operations")]
    NoAtomics,
}

/// How a posted operation failed.
#[derive(thiserror::Error, Debug, PartialEq, Eq, Clone, Copy)]
pub enum WorkError {
    /// The target has no such key, or the range leaves its region, or an atomic's address is not a multiple of 8.
    /// The target's memory is unchanged; the connection is finished.
    #[error("the peer refuses access to that key or range")]
    RemoteAccess,
    /// The connection ended first. A write may or may not have taken effect.
    #[error("the connection ended before the operation completed")]
    Flushed,
}

/// Why a connection ended.
#[derive(thiserror::Error, Debug, PartialEq, Eq, Clone, Copy)]
pub enum DisconnectReason {
    #[error("we closed it")]
    Local,
    #[error("the peer closed it or died")]
    PeerClosed,
    #[error("an operation named a wrong key or range")]
    RemoteAccess,
    #[error("the peer broke the protocol: {0}")]
    Protocol(&'static str),
    #[error("the peer withdrew our access")]
    Revoked,
    #[error("another connection to the same peer took its place")]
    Replaced,
    #[error("the peer was fenced")]
    Fenced,
}

/// Why a fence could not be established. The peer must be assumed to still have access.
#[derive(thiserror::Error, Debug)]
pub enum FenceError {
    #[error("cannot signal process {pid}: {source}")]
    Signal { pid: i32, source: std::io::Error },
    #[error("process {pid} has not exited in time")]
    StillRunning { pid: i32 },
    #[error("an operation of the peer has not ended in time")]
    StillInside,
    #[error("the device does not destroy a queue pair of the peer: {source}")]
    QueuePair { source: std::io::Error },
}

/// What a provider reports.
#[derive(Debug)]
pub enum FabricEvent {
    Connected {
        slot: u16,
        hello: Hello,
    },
    ConnectFailed {
        slot: u16,
        reason: ConnectError,
    },
    /// Only after `Connected`.
    Disconnected {
        slot: u16,
        reason: DisconnectReason,
    },
    /// One of our operations is over. In posting order per connection.
    Completed {
        slot: u16,
        work_id: u64,
        result: Result<(), WorkError>,
    },
    /// The peer's write with immediate is in place.
    Received {
        slot: u16,
        immediate: u32,
        length: u32,
    },
    /// The peer sent a set-up message.
    Control {
        slot: u16,
        bytes: Vec<u8>,
    },
}

/// How a receiver learns of a published record.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Publication {
    /// By polling the record's first word in memory.
    Memory,
    /// By a [`FabricEvent::Received`]: placement within one write has no order.
    Completion,
}

/// Largest set-up message, in bytes. It has to fit a pre-posted receive.
pub const CONTROL_LENGTH_MAXIMUM: usize = 256;

/// A provider. One thread at a time; all calls return at once, but for `fence`.
pub trait Fabric: Send {
    /// Anonymous zeroed memory of `length` bytes.
    ///
    /// # Errors
    /// When the system has no memory or descriptors to give, or `length` is 0.
    fn register_memory(&mut self, length: usize, access: Access) -> std::io::Result<Region>;
    /// An existing file, mapped shared from its start for `length` bytes. It must be that long and must not be truncated
    /// while registered: touching what is gone kills the process.
    ///
    /// # Errors
    /// `InvalidInput` when the file is shorter or `length` is 0; what mapping it says otherwise.
    fn register_file(&mut self, file: &File, length: usize, access: Access) -> std::io::Result<Region>;
    /// Peers can name the region no more. Their operations under way may still end in it, unless they are fenced.
    fn deregister(&mut self, region: &Region);

    /// Refuses every slot but these from now on, whoever proves the key. Connections that are there stay.
    fn admit_only(&mut self, slots: &[u16]);

    /// Accepts connections from now on.
    ///
    /// # Errors
    /// What binding the address says; `AddrInUse` when another daemon listens there.
    fn listen(&mut self) -> std::io::Result<()>;
    /// Starts to connect, or joins an attempt under way: `Connected` or `ConnectFailed` follows. False: connected already.
    ///
    /// # Errors
    /// When the slot is our own or out of range.
    fn connect(&mut self, slot: u16) -> Result<bool, ConnectError>;
    /// Ends the connection, if there is one; `Disconnected` with `reason` follows.
    fn disconnect(&mut self, slot: u16, reason: DisconnectReason);
    /// The latest incarnation of a slot that has been known here, also one whose connection is not up yet.
    fn latest(&self, slot: u16) -> Option<crate::Incarnation>;
    /// After it returns `Ok`, no operation of that peer's known incarnations can change our memory, and they cannot connect again.
    ///
    /// # Errors
    /// The peer may still have access.
    fn fence(&mut self, slot: u16) -> Result<(), FenceError>;
    /// Puts the queue pair of a connection into error, as a device does that has found a fault. For tests.
    #[cfg(test)]
    fn break_queue_pair(&mut self, _slot: u16) {
        unimplemented!("this provider has no queue pairs");
    }
    /// Refuses every incarnation of `slot` up to `node_incarnation`, known or not.
    fn refuse(&mut self, slot: u16, node_incarnation: u32);

    fn write(&mut self, slot: u16, source: Local<'_>, target: Remote, work_id: u64) -> Result<(), PostError>;
    fn write_with_immediate(
        &mut self,
        slot: u16,
        source: Local<'_>,
        target: Remote,
        immediate: u32,
        work_id: u64,
    ) -> Result<(), PostError>;
    fn read(&mut self, slot: u16, target: Local<'_>, source: Remote, work_id: u64) -> Result<(), PostError>;
    /// Replaces the remote word by `new` when it is `expected`; its old value arrives in `result` (8 bytes, aligned).
    fn compare_swap(
        &mut self,
        slot: u16,
        result: Local<'_>,
        target: Remote,
        expected: u64,
        new: u64,
        work_id: u64,
    ) -> Result<(), PostError>;
    /// Adds to the remote word, wrapping; its old value arrives in `result` (8 bytes, aligned).
    fn fetch_add(
        &mut self,
        slot: u16,
        result: Local<'_>,
        target: Remote,
        addend: u64,
        work_id: u64,
    ) -> Result<(), PostError>;

    /// Writes a record of at least 8 bytes whose first word must become visible last, tells the peer in the way of
    /// `publication`, and wakes it if it sleeps. No completion is reported; the source must stay until the peer says it has
    /// the record. It follows earlier writes, but may overtake earlier *reads* and atomics.
    fn publish(&mut self, slot: u16, source: Local<'_>, target: Remote, immediate: u32) -> Result<(), PostError>;
    /// How our peers learn of what we publish.
    fn publication(&self) -> Publication;
    /// A small message for set-up, reliable and in order with region announcements, at most [`CONTROL_LENGTH_MAXIMUM`] bytes.
    fn send_control(&mut self, slot: u16, bytes: &[u8]) -> Result<(), PostError>;

    /// Until `uncork`, the provider may hold posted operations back, so that one doorbell serves them all.
    fn cork(&mut self) {}
    /// Hands over what was held back.
    fn uncork(&mut self) {}

    /// Collects what has happened. Never blocks.
    fn poll(&mut self, events: &mut Vec<FabricEvent>);
    /// Becomes readable when an armed provider has something to report.
    fn event_fd(&self) -> RawFd;
    /// Announces that the caller is about to sleep on `event_fd`. False: something is pending, poll instead.
    fn arm(&mut self) -> bool;
    /// Makes `event_fd` readable, so that whoever sleeps on it polls.
    fn interrupt(&self);
    /// Takes the announcement back.
    fn disarm(&mut self);
    /// Whether the provider is still armed and nothing has happened since: who only passes by need not poll. A provider
    /// that cannot tell cheaply says false.
    fn is_quiet(&mut self) -> bool {
        false
    }
    /// Times a sleeper was woken by a peer so far: counted where the wake-up is written (`shm`) or where it arrives (`verbs`).
    fn wakeups_written(&self) -> u64;
}
