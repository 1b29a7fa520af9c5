//! The clock of all histories.
//!
//! [`now`] promises: when one call returned before another began, in whatever process of whatever machine that takes part, the
//! second returns at least as much as the first. Histories need no more, and the checkers rely on it.
//!
//! On one host this is CLOCK_MONOTONIC. Virtual machines on one host each have their own, so there `VERBFS_CLOCK` names memory that
//! all of them share: in a guest a region of a PCI device, on the host the file behind it. The first word of it is the last time
//! anybody was told, and each call moves it on: to the host's time, or by one where that is not later. Of two calls, the later one finds
//! what the earlier one left, so it returns more; that holds whatever the machines' own clocks do, and needs no bound of
//! an error. Guests ask the emulator for the host's time, through a port that VMware invented; so the clock also tells time: it lies
//! between the host's time before the call and [`HOST_CLOCK_ERROR`] behind the host's time after it.

use crate::sys::Mapping;
use anyhow::{Context, Result, ensure};
use rustix::time::{ClockId, clock_gettime};
use std::fs::OpenOptions;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// The environment variable that names the shared memory.
pub const VARIABLE: &str = "VERBFS_CLOCK";
/// Of the shared memory, how much is mapped; its first word is the clock, the rest is free for tests.
pub const SHARED_LEN: usize = 4096;
/// Nanoseconds by which the shared clock may differ from the host's: the emulator tells microseconds, and calls within the same one
/// are told apart by nanoseconds that did not pass. No machine of ours makes a thousand calls in a microsecond.
pub const HOST_CLOCK_ERROR: u64 = 2_000;
/// PCI devices of a guest appear below this.
const PCI_DEVICES: &str = "/sys/bus/pci/devices";

/// Nanoseconds: of CLOCK_MONOTONIC, or of the clock that `VERBFS_CLOCK` names. See the module for what is promised.
///
/// # Panics
/// If `VERBFS_CLOCK` names something that is no such clock: no history can be recorded then.
pub fn now() -> u64 {
    static SHARED: OnceLock<Option<Shared>> = OnceLock::new();
    let shared = SHARED.get_or_init(|| {
        let path = PathBuf::from(std::env::var_os(VARIABLE)?);
        Some(Shared::open(&path).unwrap_or_else(|error| panic!("{VARIABLE}={}: {error:#}", path.display())))
    });
    match shared {
        Some(shared) => shared.now(),
        None => read(ClockId::Monotonic),
    }
}

fn read(clock: ClockId) -> u64 {
    let t = clock_gettime(clock);
    t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64
}

/// A clock in memory that several machines share.
pub struct Shared {
    last: &'static AtomicU64,
    in_guest: bool,
}

impl Shared {
    /// The clock in the shared memory at `path`. It stays mapped until the process ends.
    pub fn open(path: &Path) -> Result<Self> {
        let in_guest = path.starts_with(PCI_DEVICES);
        if in_guest {
            ensure!(guest::host_time().is_some(), "this is no guest of an emulator that tells the host's time");
        }
        Ok(Self { last: map(path)?.leak_word(0), in_guest })
    }

    /// The next time. Always later than any that was returned before, by any process.
    pub fn now(&self) -> u64 {
        let host = self.host_time();
        let next = |last: u64| host.max(last + 1);
        // The order of these updates is the order of times: each finds what the one before left.
        match self.last.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |last| Some(next(last))) {
            Ok(last) | Err(last) => next(last),
        }
    }

    /// What the host's CLOCK_REALTIME says, in nanoseconds; a guest learns only microseconds, rounded down.
    pub fn host_time(&self) -> u64 {
        if self.in_guest { guest::host_time().expect("answered before") } else { read(ClockId::Realtime) }
    }
}

/// Map the shared memory at `path`.
pub fn map(path: &Path) -> Result<Mapping> {
    let file = OpenOptions::new().read(true).write(true).open(path).with_context(|| format!("open {}", path.display()))?;
    Mapping::new(file.as_fd(), 0, SHARED_LEN, true, true).with_context(|| format!("map {}", path.display()))
}

/// What a guest can ask its emulator.
#[cfg(target_arch = "x86_64")]
mod guest {
    use std::arch::asm;
    use std::cell::Cell;

    /// The port of VMware's "backdoor", which QEMU answers too, and what must stand in registers to be answered.
    const PORT: u16 = 0x5658;
    const MAGIC: u32 = 0x564D_5868;
    const COMMAND_TIME: u32 = 46;
    /// A read of four bytes touches four ports.
    const PORTS: libc::c_ulong = 4;

    thread_local! {
        /// The right to use ports is a thread's, not a process's.
        static ALLOWED: Cell<bool> = const { Cell::new(false) };
    }

    /// The host's CLOCK_REALTIME in nanoseconds, from whole microseconds; `None` where nobody answers or ports are forbidden.
    pub fn host_time() -> Option<u64> {
        if !ALLOWED.get() {
            // SAFETY: gives this thread the right to use four ports, and touches no memory.
            if unsafe { libc::ioperm(PORT.into(), PORTS, 1) } != 0 {
                return None;
            }
            ALLOWED.set(true);
        }
        let (answer, high, low, microseconds): (u32, u64, u64, u64);
        // SAFETY: reading this port changes nothing but registers: the answer comes in eax, ebx, ecx, edx and esi, which are all
        // declared; rbx, which the compiler keeps for itself, is put back. The thread may use the port, so no fault is raised.
        unsafe {
            asm!(
                "xchg {kept}, rbx",
                "in eax, dx",
                "xchg {kept}, rbx",
                kept = inout(reg) 0u64 => microseconds,
                inout("eax") MAGIC => answer,
                inout("rcx") u64::from(COMMAND_TIME) => _,
                inout("rdx") u64::from(PORT) => low,
                inout("rsi") 0u64 => high,
                options(nomem, nostack, preserves_flags),
            );
        }
        let seconds = (high & 0xFFFF_FFFF) << 32 | (low & 0xFFFF_FFFF);
        (answer == MAGIC && microseconds < 1_000_000).then(|| (seconds * 1_000_000 + microseconds) * 1_000)
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod guest {
    /// Only x86-64 has ports.
    pub fn host_time() -> Option<u64> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shared() -> (tempdir::Scratch, Shared) {
        let scratch = tempdir::Scratch::new("clock");
        let path = scratch.path().join("clock");
        std::fs::File::create(&path).unwrap().set_len(SHARED_LEN as u64).unwrap();
        let clock = Shared::open(&path).unwrap();
        (scratch, clock)
    }

    mod tempdir {
        use std::path::{Path, PathBuf};

        /// A directory of this test's own, removed when dropped.
        pub struct Scratch(PathBuf);

        impl Scratch {
            pub fn new(name: &str) -> Self {
                use std::sync::atomic::{AtomicU32, Ordering};
                static COUNT: AtomicU32 = AtomicU32::new(0);
                let count = COUNT.fetch_add(1, Ordering::Relaxed);
                let path = std::env::temp_dir().join(format!("verbfs-{name}-{}-{count}", std::process::id()));
                std::fs::create_dir_all(&path).unwrap();
                Self(path)
            }

            pub fn path(&self) -> &Path {
                &self.0
            }
        }

        impl Drop for Scratch {
            fn drop(&mut self) {
                let _ = std::fs::remove_dir_all(&self.0);
            }
        }
    }

    /// Threads stand for processes: the clock knows neither.
    #[test]
    fn no_two_calls_get_the_same_time_and_each_thread_sees_it_grow() {
        let (_scratch, clock) = shared();
        let per_thread: Vec<Vec<u64>> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| (0..20_000).map(|_| clock.now()).collect())).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        for times in &per_thread {
            assert!(times.is_sorted_by(|a, b| a < b));
        }
        let mut all = per_thread.concat();
        all.sort_unstable();
        assert!(all.is_sorted_by(|a, b| a < b), "a time was given twice");
    }

    /// A machine whose own clock is behind, or jumps back, still gets later times.
    #[test]
    fn what_was_told_is_never_taken_back() {
        let (_scratch, clock) = shared();
        let ahead = clock.host_time() + 3_600_000_000_000;
        clock.last.store(ahead, Ordering::SeqCst);
        assert_eq!(clock.now(), ahead + 1);
        assert_eq!(clock.now(), ahead + 2);
    }

    #[test]
    fn the_clock_tells_the_hosts_time() {
        let (_scratch, clock) = shared();
        for _ in 0..1000 {
            let before = clock.host_time();
            let time = clock.now();
            let after = clock.host_time();
            assert!(before <= time && time <= after + HOST_CLOCK_ERROR, "{before} {time} {after}");
        }
    }

    #[test]
    fn what_is_no_clock_is_refused() {
        assert!(Shared::open(Path::new("/nonexistent/clock")).is_err());
        assert!(Shared::open(Path::new("/sys/bus/pci/devices/nonexistent/resource2")).is_err());
    }
}
