//! A length in a message is checked before memory is taken for it.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use verbfs_protocol::Message;
use verbfs_protocol::wire::Source;

thread_local! {
    /// The largest piece this thread asked for.
    static LARGEST: Cell<usize> = const { Cell::new(0) };
}

struct Watching;

// SAFETY: every call goes on to the system's allocator unchanged; the note taken allocates nothing.
unsafe impl GlobalAlloc for Watching {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let _ = LARGEST.try_with(|largest| largest.set(largest.get().max(layout.size())));
        // SAFETY: the caller's promises are the same.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are the same; `pointer` came from `System` above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Watching = Watching;

struct Full;

impl Source for Full {
    fn number(&mut self, bits: u32) -> u64 {
        bits.into()
    }
    fn below(&mut self, bound: u64) -> u64 {
        bound - 1
    }
    fn length(&mut self, maximum: usize) -> usize {
        maximum.min(2)
    }
    fn is_lawful(&self) -> bool {
        true
    }
}

/// Values take more room than their bytes: an update of a few bytes is as large as one that makes an inode.
const GROWTH: usize = 32;

#[test]
fn a_length_that_lies_costs_no_memory() {
    for message_type in Message::types() {
        let body = Message::sample(message_type, &mut Full).unwrap().body();
        for at in 0..body.len().saturating_sub(3) {
            // Beyond every limit, and within most.
            for lie in [u32::MAX, 1 << 20, 16 << 10, 4096, 1000, 64] {
                let mut changed = body.clone();
                changed[at..at + 4].copy_from_slice(&lie.to_le_bytes());
                LARGEST.set(0);
                let _ = Message::from_body(message_type, &changed);
                let largest = LARGEST.get();
                assert!(
                    largest <= GROWTH * body.len() + 256,
                    "type {message_type:04x}: {lie} at {at} took {largest} bytes for a message of {}",
                    body.len()
                );
            }
        }
    }
}
