//! The shared-memory algorithms of this crate, free of where their words lie.
//!
//! Three small protocols carry the whole `shm` provider: an event count (who must wake whom), a ring of immediates with
//! one producer and one consumer, and revocation (stop an initiator in the same process). Each is written against
//! [`Word`] and [`Platform`], so that the very code that runs on mapped memory also runs under loom (tests/loom.rs).

use std::sync::atomic::{AtomicU64, Ordering};

/// One 64-bit word that several parties read and write.
pub trait Word {
    fn load(&self, order: Ordering) -> u64;
    fn store(&self, value: u64, order: Ordering);
    fn swap(&self, value: u64, order: Ordering) -> u64;
}

/// A memory model: the hardware's, or loom's.
pub trait Platform {
    type Word: Word;
    fn fence(order: Ordering);
}

/// The machine we run on.
#[derive(Debug)]
pub struct Hardware;

impl Word for AtomicU64 {
    #[inline]
    fn load(&self, order: Ordering) -> u64 {
        AtomicU64::load(self, order)
    }
    #[inline]
    fn store(&self, value: u64, order: Ordering) {
        AtomicU64::store(self, value, order)
    }
    #[inline]
    fn swap(&self, value: u64, order: Ordering) -> u64 {
        AtomicU64::swap(self, value, order)
    }
}

impl Platform for Hardware {
    type Word = AtomicU64;
    #[inline]
    fn fence(order: Ordering) {
        std::sync::atomic::fence(order)
    }
}

/// Event count: a receiver announces that it is about to sleep, a sender wakes only a receiver that has.
///
/// Both sides write one location, fence, and read the other's. Whichever fence comes second sees the other's write: either
/// the receiver finds the work when it looks again, or the sender finds the announcement. Neither may skip its half.
pub mod event_count {
    use super::{Ordering, Platform, Word};

    /// Receiver: announces sleep. The caller must look for work once more before it really sleeps.
    #[inline]
    pub fn announce<P: Platform>(sleeping: &P::Word) {
        sleeping.store(1, Ordering::Relaxed);
        P::fence(Ordering::SeqCst);
    }

    /// Receiver: is awake, no wake-up is wanted.
    #[inline]
    pub fn withdraw<P: Platform>(sleeping: &P::Word) {
        sleeping.store(0, Ordering::Relaxed);
    }

    /// Sender, after it has published its work: whether it has to wake the receiver. True at most once per announcement.
    #[inline]
    pub fn must_wake<P: Platform>(sleeping: &P::Word) -> bool {
        P::fence(Ordering::SeqCst);
        sleeping.load(Ordering::Relaxed) != 0 && sleeping.swap(0, Ordering::AcqRel) != 0
    }
}

/// A ring of immediates: one producer, one consumer, three words an entry.
///
/// An entry is valid when its first word is the entry's number plus one: the consumer never trusts a producer's counter.
/// The producer learns of free space from the consumer's counter, which it checks before use.
pub mod immediate_ring {
    use super::{Ordering, Platform, Word};

    /// Words in one entry: its number plus one, the immediate, the byte count.
    pub const ENTRY_WORDS: usize = 3;

    /// Why nothing was pushed.
    #[derive(Debug, PartialEq, Eq, Clone, Copy)]
    pub enum PushError {
        /// The consumer is a whole ring behind; it was told (through `stalled`) to wake the producer.
        Full,
        /// The consumer's counter is impossible: it does not keep to the protocol.
        Corrupt,
    }

    /// The producer's private state.
    #[derive(Debug, Default)]
    pub struct Producer {
        produced: u64,
        consumed: u64,
    }

    impl Producer {
        fn refresh<P: Platform>(&mut self, capacity: u64, head: &P::Word) -> Result<bool, PushError> {
            let consumed = head.load(Ordering::Acquire);
            if consumed < self.consumed || consumed > self.produced {
                return Err(PushError::Corrupt);
            }
            self.consumed = consumed;
            Ok(self.produced - consumed < capacity)
        }

        /// Whether `push` would succeed. When not, `stalled` has been set and the consumer will wake this side.
        pub fn has_room<P: Platform>(
            &mut self,
            entries: &[[P::Word; ENTRY_WORDS]],
            head: &P::Word,
            stalled: &P::Word,
        ) -> Result<(), PushError> {
            let capacity = entries.len() as u64;
            if self.produced - self.consumed < capacity || self.refresh::<P>(capacity, head)? {
                return Ok(());
            }
            stalled.store(1, Ordering::Relaxed);
            P::fence(Ordering::SeqCst);
            if self.refresh::<P>(capacity, head)? { Ok(()) } else { Err(PushError::Full) }
        }

        /// Appends one entry; everything written before is visible to whoever pops it.
        pub fn push<P: Platform>(
            &mut self,
            entries: &[[P::Word; ENTRY_WORDS]],
            head: &P::Word,
            stalled: &P::Word,
            immediate: u32,
            length: u32,
        ) -> Result<(), PushError> {
            self.has_room::<P>(entries, head, stalled)?;
            let entry = &entries[(self.produced % entries.len() as u64) as usize];
            entry[1].store(u64::from(immediate), Ordering::Relaxed);
            entry[2].store(u64::from(length), Ordering::Relaxed);
            self.produced += 1;
            entry[0].store(self.produced, Ordering::Release);
            Ok(())
        }
    }

    /// The consumer's private state.
    #[derive(Debug, Default)]
    pub struct Consumer {
        consumed: u64,
    }

    impl Consumer {
        fn entry<'a, P: Platform>(&self, entries: &'a [[P::Word; ENTRY_WORDS]]) -> &'a [P::Word; ENTRY_WORDS] {
            &entries[(self.consumed % entries.len() as u64) as usize]
        }

        /// Whether `pop` would return an entry.
        pub fn pending<P: Platform>(&self, entries: &[[P::Word; ENTRY_WORDS]]) -> bool {
            self.entry::<P>(entries)[0].load(Ordering::Acquire) == self.consumed + 1
        }

        /// The next immediate and byte count, if there is one.
        pub fn pop<P: Platform>(&mut self, entries: &[[P::Word; ENTRY_WORDS]], head: &P::Word) -> Option<(u32, u32)> {
            let entry = self.entry::<P>(entries);
            if entry[0].load(Ordering::Acquire) != self.consumed + 1 {
                return None;
            }
            let taken = (entry[1].load(Ordering::Relaxed) as u32, entry[2].load(Ordering::Relaxed) as u32);
            self.consumed += 1;
            head.store(self.consumed, Ordering::Release);
            Some(taken)
        }

        /// After popping: whether the producer waits for the space just freed and must be woken.
        pub fn must_wake_producer<P: Platform>(&self, stalled: &P::Word) -> bool {
            P::fence(Ordering::SeqCst);
            stalled.load(Ordering::Relaxed) != 0 && stalled.swap(0, Ordering::AcqRel) != 0
        }
    }
}

/// Revocation: a target stops an initiator that shares its address space and cannot be killed.
///
/// The initiator enters, looks whether it is revoked, works, leaves. The target revokes and waits until nobody is inside.
/// The two sequentially consistent fences make it impossible that the initiator works while the target believes it quiet.
pub mod revocation {
    use super::{Ordering, Platform, Word};

    /// Initiator: true when it may touch the target's memory; it must then `leave`. False: revoked, nothing to leave.
    #[inline]
    pub fn enter<P: Platform>(revoked: &P::Word, in_flight: &P::Word) -> bool {
        in_flight.store(1, Ordering::Relaxed);
        P::fence(Ordering::SeqCst);
        if revoked.load(Ordering::Acquire) == 0 {
            return true;
        }
        in_flight.store(0, Ordering::Release);
        false
    }

    /// Initiator: its operation is over.
    #[inline]
    pub fn leave<P: Platform>(in_flight: &P::Word) {
        in_flight.store(0, Ordering::Release);
    }

    /// Target: no operation that has not entered may enter any more.
    pub fn revoke<P: Platform>(revoked: &P::Word) {
        revoked.store(1, Ordering::Release);
        P::fence(Ordering::SeqCst);
    }

    /// Target, after `revoke`: whether the last operation has left.
    pub fn is_quiet<P: Platform>(in_flight: &P::Word) -> bool {
        in_flight.load(Ordering::Acquire) == 0
    }
}

/// Publication of ring records: the body first, the word that makes it valid last.
///
/// The receiver clears that word (and the first word of every unit the record covered) before it returns the credit, so a
/// lap later an old record's bytes can never pass for a new record's head.
pub mod publication {
    use super::{Ordering, Word};

    /// Sender: makes a record, whose body is already in place, visible.
    #[inline]
    pub fn publish<W: Word>(head: &W, value: u64) {
        head.store(value, Ordering::Release);
    }

    /// Receiver: the head word; zero means nothing is there.
    #[inline]
    pub fn observe<W: Word>(head: &W) -> u64 {
        head.load(Ordering::Acquire)
    }

    /// Receiver: empties a unit it has consumed, before the credit for it goes back.
    #[inline]
    pub fn clear<W: Word>(head: &W) {
        head.store(0, Ordering::Relaxed);
    }
}
