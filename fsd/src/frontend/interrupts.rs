//! Calls that wait for a file lock, and the signals of those who made them.
//!
//! `fuser` answers FUSE_INTERRUPT with ENOSYS, so the kernel never tells that a waiting caller got a
//! signal: it would wait, unkillable, until the lock is granted. One thread therefore looks at the pending
//! signals of all waiting callers every [`POLL`] and cancels the wait of those that have one. The reply
//! EINTR makes the kernel restart the call or return EINTR, as sigaction(2) asks.
//!
//! The thread sleeps without waking while nobody waits (after a last [`LINGER`], so that locks that are granted at once do not
//! wake it each).
//!
//! A signal for the *process* is pending for all its threads, but the kernel wakes one to take it and restarts
//! only that one; a thread cancelled in its place returns the kernel's inner error 512 to its program. Which one it woke
//! cannot be seen. So a shared signal counts only when it is seen pending twice, [`POLL`] apart (a running thread would have
//! taken it), and where several threads of a process wait, one is cancelled at a time, in the order in which the kernel
//! tries them: the main thread, then the oldest.
//!
//! Limits, until `fuser` passes FUSE_INTERRUPT on: several threads of one process that all wait for file locks, and
//! that block different signals or got several, may be taken in the wrong order. Callers in another PID namespace than
//! the mounter's have no thread id here and are not watched: they are killed only with the lock granted or the mount gone.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use verbfs_protocol::Ino;

/// How often the signals of waiting callers are looked at: what a Ctrl-C may take longer.
const POLL: Duration = Duration::from_millis(20);
/// How long the thread goes on looking after the last call was done.
const LINGER: Duration = Duration::from_secs(2);

/// Cancels the waiting call `token` on `ino`. May be called again for the same call, and after it is done.
type Cancel = Box<dyn Fn(Ino, u64) + Send>;

/// The waiting calls of one mount.
pub struct Interrupts {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    wake: Condvar,
}

#[derive(Default)]
struct State {
    /// By token.
    waiting: HashMap<u64, Waiter>,
    last_change: Option<Instant>,
    stopping: bool,
}

#[derive(Clone, Copy)]
struct Waiter {
    thread: u32,
    process: u32,
    ino: Ino,
    /// The last look saw a signal pending for the process.
    seen_shared: bool,
}

/// A call that is watched until this is dropped.
pub struct Watch {
    shared: Arc<Shared>,
    token: u64,
}

impl Drop for Watch {
    fn drop(&mut self) {
        let mut state = self.shared.state.lock();
        state.waiting.remove(&self.token);
        state.last_change = Some(Instant::now());
    }
}

impl Interrupts {
    /// Starts the thread.
    pub fn start(cancel: Cancel) -> std::io::Result<Interrupts> {
        let shared = Arc::new(Shared { state: Mutex::default(), wake: Condvar::new() });
        let of_thread = Arc::clone(&shared);
        std::thread::Builder::new().name("lock-signals".into()).spawn(move || of_thread.run(cancel))?;
        Ok(Interrupts { shared })
    }

    /// Watches a call of `thread` (of `process`) that may wait for a lock on `ino` under `token`.
    pub fn watch(&self, thread: u32, process: u32, ino: Ino, token: u64) -> Watch {
        let mut state = self.shared.state.lock();
        if thread != 0 {
            state.waiting.insert(token, Waiter { thread, process, ino, seen_shared: false });
            if state.last_change.is_none() {
                state.last_change = Some(Instant::now());
                self.shared.wake.notify_one();
            }
        }
        Watch { shared: Arc::clone(&self.shared), token }
    }
}

impl Drop for Interrupts {
    fn drop(&mut self) {
        self.shared.state.lock().stopping = true;
        self.shared.wake.notify_one();
    }
}

impl Shared {
    fn run(&self, cancel: Cancel) {
        loop {
            let waiting = {
                let mut state = self.state.lock();
                if state.waiting.is_empty() && state.last_change.is_none_or(|at| at.elapsed() > LINGER) {
                    state.last_change = None;
                    while state.last_change.is_none() && !state.stopping {
                        self.wake.wait(&mut state);
                    }
                }
                if !state.stopping {
                    self.wake.wait_for(&mut state, POLL);
                }
                if state.stopping {
                    return;
                }
                state.waiting.clone()
            };
            if waiting.is_empty() {
                continue;
            }
            // No lock is held here: reading /proc may take a while, and cancelling enters the volume.
            let looked: Vec<_> =
                waiting.into_iter().map(|(token, waiter)| (token, waiter, Pending::of_thread(waiter.thread))).collect();
            {
                let mut state = self.state.lock();
                for (token, _, pending) in &looked {
                    if let Some(waiter) = state.waiting.get_mut(token) {
                        waiter.seen_shared = *pending == Pending::Process;
                    }
                }
            }
            to_cancel(looked).into_iter().for_each(|(ino, token)| cancel(ino, token));
        }
    }
}

/// Whom a look at all waiting callers cancels.
fn to_cancel(mut looked: Vec<(u64, Waiter, Pending)>) -> Vec<(Ino, u64)> {
    // The order in which the kernel looks for a thread to take a signal of the process (complete_signal()).
    looked.sort_by_key(|(_, waiter, _)| (waiter.thread != waiter.process, waiter.thread));
    let mut served = HashSet::new();
    looked
        .into_iter()
        .filter(|(_, waiter, pending)| match pending {
            Pending::Nothing => false,
            Pending::Thread => true,
            Pending::Process => waiter.seen_shared && served.insert(waiter.process),
        })
        .map(|(token, waiter, _)| (waiter.ino, token))
        .collect()
}

/// The signals that would interrupt a waiting thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pending {
    Nothing,
    /// One for the process, which any of its threads may take.
    Process,
    /// One that this thread will take, or the thread is gone or being killed.
    Thread,
}

impl Pending {
    fn of_thread(thread: u32) -> Pending {
        match std::fs::read_to_string(format!("/proc/{thread}/status")) {
            Ok(status) => Self::of_status(&status),
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => Pending::Thread,
            Err(error) => {
                tracing::warn!(thread, %error, "cannot look at the signals of a process that waits for a lock");
                Pending::Nothing
            }
        }
    }

    /// From the text of /proc/TID/status (proc(5)). A killed process has SIGKILL pending in each of its threads.
    fn of_status(status: &str) -> Pending {
        let (mut thread, mut process, mut blocked, mut ignored) = (0u64, 0, 0, 0);
        for line in status.lines() {
            let Some((key, value)) = line.split_once(':') else { continue };
            let field = match key {
                "SigPnd" => &mut thread,
                "ShdPnd" => &mut process,
                "SigBlk" => &mut blocked,
                "SigIgn" => &mut ignored,
                "State" if value.trim_start().starts_with(['Z', 'X']) => return Pending::Thread,
                _ => continue,
            };
            *field = u64::from_str_radix(value.trim(), 16).unwrap_or(0);
        }
        let counts = !(blocked | ignored);
        match (thread & counts != 0, process & counts != 0) {
            (true, _) => Pending::Thread,
            (false, true) => Pending::Process,
            (false, false) => Pending::Nothing,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(thread: u64, process: u64, blocked: u64, ignored: u64) -> String {
        format!(
            "Name:\tx\nState:\tD (disk sleep)\nSigPnd:\t{thread:016x}\nShdPnd:\t{process:016x}\nSigBlk:\t{blocked:016x}\nSigIgn:\t{ignored:016x}\n"
        )
    }

    #[test]
    fn blocked_and_ignored_signals_do_not_interrupt() {
        assert_eq!(Pending::of_status(&status(0, 0, 0, 0)), Pending::Nothing);
        assert_eq!(Pending::of_status(&status(2, 0, 0, 0)), Pending::Thread);
        assert_eq!(Pending::of_status(&status(2, 0, 2, 0)), Pending::Nothing);
        assert_eq!(Pending::of_status(&status(0, 2, 0, 2)), Pending::Nothing);
        assert_eq!(Pending::of_status(&status(0, 6, 2, 0)), Pending::Process);
        assert_eq!(Pending::of_status("State:\tZ (zombie)\n"), Pending::Thread);
    }

    #[test]
    fn a_thread_that_is_gone_is_cancelled() {
        assert_eq!(Pending::of_thread(u32::MAX - 1), Pending::Thread);
        assert_eq!(Pending::of_thread(std::process::id()), Pending::Nothing);
    }

    #[test]
    fn one_thread_of_a_process_takes_a_shared_signal() {
        let waiter = |thread, seen_shared| Waiter { thread, process: 10, ino: Ino(1), seen_shared };
        let looked = vec![
            (1, waiter(12, true), Pending::Process),
            (2, waiter(10, true), Pending::Process),
            (3, waiter(11, false), Pending::Thread),
        ];
        assert_eq!(to_cancel(looked), [(Ino(1), 2), (Ino(1), 3)]);
        assert_eq!(
            to_cancel(vec![(1, waiter(12, true), Pending::Process), (2, waiter(11, true), Pending::Process)]),
            [(Ino(1), 2)]
        );
        assert_eq!(to_cancel(vec![(1, waiter(10, false), Pending::Process)]), []);
    }
}
