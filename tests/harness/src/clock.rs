//! The clock of all histories.
//!
//! [`now`] promises: when one call returned before another began, in whatever process of whatever machine that takes part, the
//! second returns at least as much as the first. Histories need no more, and the checkers rely on it.
//!
//! On one host this is CLOCK_MONOTONIC. Virtual machines on one host each have a monotonic clock of their own, begun when they
//! booted, so there `VERBFS_CLOCK` names memory that all of them share: in a guest the region of a PCI device, on the host the file
//! behind it. Its first word is the time that was given last, and each call moves it on in one atomic step. Of two calls, the
//! later one finds what the earlier one left and returns more. That holds whatever the machines' own clocks do: among calls that
//! follow each other the error is nothing, and no offset between machines has to be measured.
//!
//! The clock also passes as time does. Each process adds its own CLOCK_MONOTONIC to the largest lead over it that it has seen, so
//! - between two calls of one process, the time grows by at least what CLOCK_MONOTONIC says passed between them;
//! - nobody runs ahead of the time that the process would give whose clock leads: a lead is measured behind the call that found
//!   it. So the time grows at the rate of the machines' clocks, but for a nanosecond for each call that found no later one.

use crate::sys::Mapping;
use anyhow::{Context, Result};
use rustix::time::{ClockId, clock_gettime};
use std::fs::OpenOptions;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

/// The environment variable that names the shared memory.
pub const VARIABLE: &str = "VERBFS_CLOCK";
/// Of the shared memory, how many bytes are mapped; its first word is the clock, the rest is free for tests.
pub const SHARED_LEN: usize = 4096;

/// Nanoseconds: of CLOCK_MONOTONIC, or of the clock that `VERBFS_CLOCK` names. See the module for what is promised.
///
/// # Panics
/// If `VERBFS_CLOCK` names something that is no such clock: no history can be recorded then.
pub fn now() -> u64 {
    static SHARED: OnceLock<Option<Shared>> = OnceLock::new();
    let shared = SHARED.get_or_init(|| {
        let path = PathBuf::from(std::env::var_os(VARIABLE)?);
        Some(Shared::open(&path).unwrap_or_else(|error| panic!("{VARIABLE}: {error:#}")))
    });
    match shared {
        Some(shared) => shared.now(),
        None => monotonic(),
    }
}

/// Nanoseconds of this machine's own CLOCK_MONOTONIC.
pub fn monotonic() -> u64 {
    let t = clock_gettime(ClockId::Monotonic);
    t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64
}

/// A clock in memory that several machines share.
pub struct Shared {
    last: &'static AtomicU64,
    /// By how much the shared time is at least ahead of this machine's; it only grows.
    lead: AtomicI64,
}

impl Shared {
    /// The clock in the shared memory at `path`. It stays mapped until the process ends.
    pub fn open(path: &Path) -> Result<Self> {
        Ok(Self::join(map(path)?.leak_word(0)))
    }

    /// Memory is zero at first: who comes first starts the clock with its own time, the others go on from what was given last.
    fn join(last: &'static AtomicU64) -> Self {
        let _ = last.compare_exchange(0, monotonic(), Ordering::SeqCst, Ordering::SeqCst);
        let found = last.load(Ordering::SeqCst);
        Self { last, lead: AtomicI64::new(found as i64 - monotonic() as i64) }
    }

    /// The next time. Later than any that was returned before, by any process.
    pub fn now(&self) -> u64 {
        let own = monotonic().saturating_add_signed(self.lead.load(Ordering::Relaxed));
        let next = |last: u64| own.max(last + 1);
        // The order of these updates is the order of times: each finds what the one before left.
        let (Ok(last) | Err(last)) =
            self.last.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |last| Some(next(last)));
        let time = next(last);
        // Read behind the update. A lead over a reading from before it would contain however long the update took, and a
        // machine with such a lead would run ahead of all others, who would then follow.
        self.lead.fetch_max(time as i64 - monotonic() as i64, Ordering::Relaxed);
        time
    }
}

/// Map the shared memory at `path`.
pub fn map(path: &Path) -> Result<Mapping> {
    let file =
        OpenOptions::new().read(true).write(true).open(path).with_context(|| format!("open {}", path.display()))?;
    Mapping::new(file.as_fd(), 0, SHARED_LEN, true, true).with_context(|| format!("map {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A clock in memory of this process only, zero at first.
    fn memory() -> &'static AtomicU64 {
        Box::leak(Box::new(AtomicU64::new(0)))
    }

    /// Threads stand for processes: the clock knows neither.
    #[test]
    fn no_two_calls_get_the_same_time_and_each_thread_sees_it_grow() {
        let last = memory();
        let call = || {
            let clock = Shared::join(last);
            (0..20_000).map(|_| clock.now()).collect()
        };
        let per_thread: Vec<Vec<u64>> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(call)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        for times in &per_thread {
            assert!(times.is_sorted_by(|a, b| a < b));
        }
        let mut all = per_thread.concat();
        all.sort_unstable();
        assert!(all.is_sorted_by(|a, b| a < b), "a time was given twice");
    }

    /// One machine's clock is a day ahead of the other's: neither sees a step, and both see time pass.
    #[test]
    fn machines_whose_clocks_differ_share_one_time() {
        const DAY: i64 = 86_400_000_000_000;
        let last = memory();
        let (first, second) = (Shared::join(last), Shared::join(last));
        second.lead.fetch_sub(DAY, Ordering::Relaxed);
        let mut previous = first.now();
        let began = (previous, monotonic());
        for round in 0..1000 {
            std::thread::sleep(std::time::Duration::from_micros(50));
            let time = if round % 2 == 0 { second.now() } else { first.now() };
            assert!(time > previous);
            previous = time;
        }
        let passed = monotonic() - began.1;
        // A call that found no later time adds a nanosecond.
        assert!(previous - began.0 <= passed + 2000, "{} ns given, {passed} ns passed", previous - began.0);
        // The slow machine knows by now what it lacked.
        assert!(second.lead.load(Ordering::Relaxed) > -DAY / 2);
    }

    #[test]
    fn time_grows_by_what_passed() {
        let clock = Shared::join(memory());
        for _ in 0..1000 {
            let first = clock.now();
            let began = monotonic();
            std::hint::spin_loop();
            let passed = monotonic() - began;
            assert!(clock.now() - first >= passed);
        }
    }

    /// Whoever comes later goes on from what was given, however far its own clock is.
    #[test]
    fn what_was_given_is_never_taken_back() {
        let last = memory();
        let ahead = monotonic() + 3_600_000_000_000;
        last.store(ahead, Ordering::SeqCst);
        assert!(Shared::join(last).now() > ahead);
        last.store(5, Ordering::SeqCst);
        assert!((6..1_000_000_000).contains(&Shared::join(last).now()), "a new machine made time jump");
    }

    #[test]
    fn what_is_no_clock_is_refused() {
        assert!(Shared::open(Path::new("/nonexistent/clock")).is_err());
        assert!(Shared::open(Path::new("/dev/null")).is_err());
    }
}
