//! Notices calls that do not come back.
//!
//! A thread looks at what the caller says it is doing. It can report, but it cannot free the caller: a thread that waits in the
//! kernel for a dead daemon may be unkillable, and then even the exit of its process waits for the daemon's end. What
//! there is to say is therefore printed first.

use crate::clock::now;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// How often the thread looks.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// The call in progress: when it began, and what it is.
type Current = Arc<Mutex<Option<(u64, String)>>>;

/// A call that takes too long.
pub struct Stall {
    /// What it is.
    pub call: String,
    /// For how long it has been in progress.
    pub seconds: u64,
    /// What the kernel says of the thread: `wchan`, `syscall`, `stack`, as far as readable.
    pub kernel: String,
}

impl Stall {
    /// Print it, and end the program with exit status 2.
    pub fn end_the_program(&self) -> ! {
        println!("STANDSTILL: {} for {} s\n{}", self.call, self.seconds, self.kernel);
        use std::io::Write;
        let _ = std::io::stdout().flush();
        std::process::exit(2);
    }
}

/// The caller's end: says what it is doing.
pub struct Watchdog {
    current: Current,
}

impl Watchdog {
    /// Watch the calling thread; `report` is called, again and again, while a call takes longer than `limit_seconds`.
    pub fn start(limit_seconds: u64, mut report: impl FnMut(Stall) + Send + 'static) -> Self {
        let watched = Current::default();
        let current = watched.clone();
        let thread = rustix::thread::gettid().as_raw_nonzero();
        std::thread::spawn(move || {
            loop {
                std::thread::sleep(LOOK_EVERY);
                let in_progress = current.lock().expect("the caller does not panic with the lock").clone();
                let Some((start, call)) = in_progress else { continue };
                let seconds = now().saturating_sub(start) / 1_000_000_000;
                if seconds < limit_seconds {
                    continue;
                }
                let kernel = ["wchan", "syscall", "stack"]
                    .map(|name| {
                        let text = std::fs::read_to_string(format!("/proc/self/task/{thread}/{name}"));
                        format!("{name}: {}", text.unwrap_or_else(|e| e.to_string()).trim())
                    })
                    .join("\n");
                report(Stall { call, seconds, kernel });
                std::thread::sleep(Duration::from_secs(1));
            }
        });
        Self { current: watched }
    }

    /// Watch the calling thread; a stall is printed and ends the program with exit status 2.
    pub fn ending_the_program(limit_seconds: u64) -> Self {
        Self::start(limit_seconds, |stall| stall.end_the_program())
    }

    /// A call begins now; returns when.
    pub fn begin(&self, what: String) -> u64 {
        let start = now();
        *self.current.lock().expect("the watching thread does not panic") = Some((start, what));
        start
    }

    /// The call came back.
    pub fn end(&self) {
        *self.current.lock().expect("the watching thread does not panic") = None;
    }

    /// Do `body`, which is called `what`, under watch.
    pub fn during<T>(&self, what: impl Into<String>, body: impl FnOnce() -> T) -> T {
        self.begin(what.into());
        let result = body();
        self.end();
        result
    }
}
