//! Advisory (fcntl and flock) locks of the files of one home, as a pure state machine: no I/O, no clock, no thread.
//!
//! [`LockTable::set`] answers at once: granted, in conflict, or waiting under a token. Whatever frees something returns, in
//! `effects`, the tokens of the waiters that got their locks by it.
//!
//! # Rules
//! - The two spaces of a file do not interact, as on Linux.
//! - An *owner* is (slot, incarnation, owner number): a process for fcntl, an open file for flock. Its pid is only
//!   reported. Owners of one number in the two spaces have nothing to do with each other.
//! - fcntl: a lock replaces what its owner held on its bytes: splits, joins, upgrades and downgrades it. While an upgrade
//!   waits, the old lock stays.
//! - flock: the range is always the whole file. A conversion gives up the old lock first, as on Linux: others may
//!   get in between, and if it then fails the old lock is gone.
//! - Waiters are served in order of arrival. As on Linux a request is weighed against locks that are *held*, not against
//!   earlier waiters, so that F_SETLK fails only because of a lock F_GETLK would show. Queueing behind waiters would be
//!   fairer to writers under a stream of readers, but it makes owners wait for owners that hold nothing, and so turns
//!   programs that are free of deadlock on a local file system into EDEADLK on this one: a rank that holds a lock
//!   elsewhere and asks for a read lock behind a waiting writer.
//!
//! # Invariants
//! 1. No two locks of different owners on overlapping bytes unless both are for reading.
//! 2. The locks of one owner are disjoint; neighbours of one kind are one lock.
//! 3. No waiter is left whose lock conflicts with no held one.
//!
//! [`LockTable::check`] asserts them.

mod deadlock;
mod table;

pub use deadlock::would_deadlock;
pub use table::{Granted, LOCKS_PER_NODE_MAX, LockTable, Outcome, WaitToken};
