//! The page each side of a connection gives the other.
//!
//! The *target* makes it and reads it; the *initiator*, the peer, writes most of it. Words that different sides write lie
//! 128 bytes apart: adjacent cache lines are fetched in pairs.
//!
//! | byte | word | written by |
//! |---|---|---|
//! | 0 | revoked | target |
//! | 128 | in flight | initiator |
//! | 256 | sleeping | both |
//! | 384 | immediates consumed | target |
//! | 512 | producer stalled | both |
//! | 1024.. | entries of the ring of immediates, 32 bytes each | initiator |

use std::io;
use std::mem::size_of;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::AtomicU64;

use super::socket;
use crate::mapping::Mapping;
use crate::sync::immediate_ring::ENTRY_WORDS;

/// Bytes of the page.
pub(super) const PAGE_LENGTH: usize = 16 * 1024;
const ENTRIES_START: usize = 1024;
/// Immediates in flight per direction. As deep as a receive queue would be; a full ring only delays.
pub(super) const IMMEDIATES: usize = 512;
type Entry = [AtomicU64; ENTRY_WORDS];
const _: () = assert!(ENTRIES_START + IMMEDIATES * size_of::<Entry>() <= PAGE_LENGTH);

#[derive(Debug)]
pub(super) struct Page(Mapping);

impl Page {
    /// A new page of our own, and the descriptor to hand to the peer.
    pub(super) fn create() -> io::Result<(Page, OwnedFd)> {
        let memory = socket::sealed_memory(PAGE_LENGTH)?;
        let page = Page(Mapping::new(std::os::fd::AsFd::as_fd(&memory), PAGE_LENGTH)?);
        Ok((page, memory))
    }

    /// The peer's page.
    pub(super) fn open(memory: BorrowedFd<'_>) -> io::Result<Page> {
        if !socket::is_sealed(memory) {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        Ok(Page(Mapping::new(memory, PAGE_LENGTH)?))
    }

    #[inline]
    pub(super) fn revoked(&self) -> &AtomicU64 {
        self.0.word(0)
    }
    #[inline]
    pub(super) fn in_flight(&self) -> &AtomicU64 {
        self.0.word(128)
    }
    #[inline]
    pub(super) fn sleeping(&self) -> &AtomicU64 {
        self.0.word(256)
    }
    #[inline]
    pub(super) fn consumed(&self) -> &AtomicU64 {
        self.0.word(384)
    }
    #[inline]
    pub(super) fn stalled(&self) -> &AtomicU64 {
        self.0.word(512)
    }
    #[inline]
    pub(super) fn entries(&self) -> &[Entry] {
        // SAFETY: the entries lie inside the mapping (asserted above), aligned to 8; atomics may be shared with anyone.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr().add(ENTRIES_START).cast::<Entry>(), IMMEDIATES) }
    }
}
