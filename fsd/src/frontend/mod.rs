//! The stock front end: a FUSE mount of one node's volume.
//!
//! Requests are translated into calls of [`crate::volume::Volume`] and the results into replies;
//! nothing is decided and nothing is cached here.
//!
//! | module | what |
//! |---|---|
//! | [`fuse`] | the requests, one by one, and the recipe that makes FUSE strict |
//! | [`mount`] | mounting, waiting until the mount answers, and getting rid of it under any circumstances |
//! | [`kernel_cache`] | how the volume has pages dropped that the kernel caches |
//! | [`null`] | a file system that does nothing, with the same recipe: the baseline of benchmarks |
//! | [`convert`] | types of `fuser` to and from types of the protocol |
//! | [`file_locks`] | who holds fcntl locks through which open file, so that closing frees them |
//! | [`interrupts`] | waiting lock calls whose process got a signal |
//! | [`lock_flags`] | the bit of a lock request that `fuser` leaves out |

pub mod convert;
pub mod file_locks;
pub mod fuse;
pub mod interrupts;
pub mod kernel_cache;
pub mod lock_flags;
pub mod mount;
pub mod null;

/// Told how long each request took, from its arrival to its reply. Called on any thread; must be quick.
pub trait Observer: Send + Sync + 'static {
    /// A request has arrived; [`Observer::observe`] follows.
    fn arrived(&self, _operation: &'static str) {}
    /// `operation` is the name of the request, as in `"lookup"`.
    fn observe(&self, operation: &'static str, nanoseconds: u64);
}

impl<F: Fn(&'static str, u64) + Send + Sync + 'static> Observer for F {
    fn observe(&self, operation: &'static str, nanoseconds: u64) {
        self(operation, nanoseconds)
    }
}

/// Observes nothing.
pub struct NoObserver;

impl Observer for NoObserver {
    fn observe(&self, _operation: &'static str, _nanoseconds: u64) {}
}
