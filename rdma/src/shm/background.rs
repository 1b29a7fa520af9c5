//! The endpoint's own thread: accepts, watches sockets and processes, and never touches a peer's memory.
//!
//! Handshakes run in threads of their own, bounded in number and time, so that a silent peer delays nobody. What they and
//! the watcher find is left in [`Shared`] for the thread that polls, which alone maps memory and changes connections.

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::socket;
use crate::admission::{Admissions, refusal_to_log};
use crate::handshake::{self, ConnectError, Hello, Identity};

/// Handshakes under way at one time; whoever comes beyond is hung up on and tries again.
pub(super) const HANDSHAKES_MAXIMUM: usize = 64;

/// A peer that has proved the cluster key.
#[derive(Debug)]
pub(super) struct Established {
    pub(super) socket: OwnedFd,
    pub(super) hello: Hello,
    pub(super) initiated_here: bool,
    /// None: the peer is this very process.
    pub(super) process: Option<(i32, OwnedFd)>,
}

#[derive(Debug)]
pub(super) enum Outcome {
    Established(Established),
    Failed { slot: u16, reason: ConnectError },
}

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) hello: Hello,
    pub(super) key: [u8; 32],
    pub(super) directory: PathBuf,
    pub(super) handshake_timeout: Duration,
    pub(super) event: Arc<OwnedFd>,
    /// Set when the polling thread has to look at `outcomes` or at signals.
    pub(super) attention: AtomicBool,
    outcomes: Mutex<VecDeque<Outcome>>,
    pub(super) admissions: Admissions,
    signals: Mutex<HashMap<u64, Arc<AtomicBool>>>,
    handshakes: AtomicUsize,
    watcher: OwnedFd,
    stop: OwnedFd,
    stopping: AtomicBool,
}

const TOKEN_STOP: u64 = 0;
const TOKEN_LISTENER: u64 = 1;
/// Tokens from here on name connections.
pub(super) const TOKEN_FIRST: u64 = 2;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // The maps stay whole whatever panicked: each change is one insertion or removal.
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl Shared {
    pub(super) fn new(
        hello: Hello,
        key: [u8; 32],
        directory: PathBuf,
        handshake_timeout: Duration,
    ) -> std::io::Result<Arc<Shared>> {
        use std::os::fd::FromRawFd;
        // SAFETY: no pointers are passed.
        let watcher = socket::check(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })?;
        let shared = Shared {
            hello,
            key,
            directory,
            handshake_timeout,
            event: Arc::new(socket::event_descriptor()?),
            attention: AtomicBool::new(false),
            outcomes: Mutex::default(),
            admissions: Admissions::default(),
            signals: Mutex::default(),
            handshakes: AtomicUsize::new(0),
            // SAFETY: the descriptor is new and ours.
            watcher: unsafe { OwnedFd::from_raw_fd(watcher) },
            stop: socket::event_descriptor()?,
            stopping: AtomicBool::new(false),
        };
        shared.watch(shared.stop.as_fd(), TOKEN_STOP, libc::EPOLLIN)?;
        Ok(Arc::new(shared))
    }

    fn watch(&self, descriptor: BorrowedFd<'_>, token: u64, events: libc::c_int) -> std::io::Result<()> {
        let mut event = libc::epoll_event { events: events as u32, u64: token };
        // SAFETY: `event` is valid for the call.
        socket::check(unsafe {
            libc::epoll_ctl(self.watcher.as_raw_fd(), libc::EPOLL_CTL_ADD, descriptor.as_raw_fd(), &mut event)
        })
        .map(drop)
    }

    /// Whatever happens to the socket or the process raises the returned signal.
    pub(super) fn watch_connection(
        &self,
        token: u64,
        connection: BorrowedFd<'_>,
        process: Option<BorrowedFd<'_>>,
    ) -> std::io::Result<Arc<AtomicBool>> {
        // Raised from the start: what arrived before the watch is not reported by an edge.
        let signal = Arc::new(AtomicBool::new(true));
        lock(&self.signals).insert(token, signal.clone());
        self.watch(connection, token, libc::EPOLLIN | libc::EPOLLOUT | libc::EPOLLRDHUP | libc::EPOLLET)?;
        if let Some(process) = process {
            self.watch(process, token, libc::EPOLLIN | libc::EPOLLET)?;
        }
        Ok(signal)
    }

    pub(super) fn unwatch_connection(&self, token: u64, connection: BorrowedFd<'_>, process: Option<BorrowedFd<'_>>) {
        lock(&self.signals).remove(&token);
        for descriptor in std::iter::once(connection).chain(process) {
            // SAFETY: deletion ignores the event. A descriptor not watched is no harm.
            unsafe {
                libc::epoll_ctl(
                    self.watcher.as_raw_fd(),
                    libc::EPOLL_CTL_DEL,
                    descriptor.as_raw_fd(),
                    std::ptr::null_mut(),
                )
            };
        }
    }

    fn call_attention(&self) {
        self.attention.store(true, Ordering::SeqCst);
        socket::signal_event(self.event.as_raw_fd());
    }

    fn report(&self, outcome: Outcome) {
        lock(&self.outcomes).push_back(outcome);
        self.call_attention();
    }

    pub(super) fn next_outcome(&self) -> Option<Outcome> {
        lock(&self.outcomes).pop_front()
    }

    fn begin_handshake(self: &Arc<Self>, work: impl FnOnce(&Arc<Shared>) + Send + 'static) -> bool {
        if self.handshakes.fetch_add(1, Ordering::AcqRel) >= HANDSHAKES_MAXIMUM {
            self.handshakes.fetch_sub(1, Ordering::AcqRel);
            return false;
        }
        let shared = self.clone();
        let spawned = std::thread::Builder::new().name("verbfs-handshake".into()).spawn(move || {
            work(&shared);
            shared.handshakes.fetch_sub(1, Ordering::AcqRel);
        });
        if spawned.is_err() {
            self.handshakes.fetch_sub(1, Ordering::AcqRel);
        }
        spawned.is_ok()
    }

    fn identity<R>(&self, body: impl FnOnce(&Identity<'_>) -> R) -> R {
        body(&Identity {
            hello: &self.hello,
            key: &self.key,
            admit: &|slot, incarnation| self.admissions.admit(slot, incarnation),
        })
    }

    fn peer_process(connection: BorrowedFd<'_>) -> Result<Option<(i32, OwnedFd)>, ConnectError> {
        let system = |error: std::io::Error| ConnectError::System(error.raw_os_error().unwrap_or(libc::EIO));
        let pid = socket::peer_process(connection).map_err(system)?;
        if pid == std::process::id() as i32 {
            return Ok(None);
        }
        // Without a handle on the process it could not be fenced, so it is not let in.
        Ok(Some((pid, socket::process_descriptor(pid).map_err(system)?)))
    }

    /// Starts a connection attempt to `slot`.
    pub(super) fn connect(self: &Arc<Self>, slot: u16) {
        let started = self.begin_handshake(move |shared| {
            let attempt = || {
                let path = shared.directory.join(format!("{slot}.sock"));
                let connection = socket::connect(&path).map_err(|error| match error.raw_os_error() {
                    Some(libc::ENOENT | libc::ECONNREFUSED) => ConnectError::NotListening(slot),
                    Some(libc::EAGAIN) => ConnectError::Busy,
                    other => ConnectError::System(other.unwrap_or(libc::EINVAL)),
                })?;
                let deadline = Instant::now() + shared.handshake_timeout;
                let hello = shared
                    .identity(|identity| handshake::initiate(&mut connection.as_fd(), identity, slot, deadline))?
                    .hello;
                let process = Self::peer_process(connection.as_fd())?;
                Ok(Established { socket: connection, hello, initiated_here: true, process })
            };
            match attempt() {
                Ok(established) => shared.report(Outcome::Established(established)),
                Err(reason) => {
                    if !matches!(reason, ConnectError::NotListening(_)) {
                        tracing::debug!(slot, %reason, "connection attempt failed");
                    }
                    shared.report(Outcome::Failed { slot, reason })
                }
            }
        });
        if !started {
            self.report(Outcome::Failed { slot, reason: ConnectError::Busy });
        }
    }

    pub(super) fn add_listener(&self, listener: BorrowedFd<'_>) -> std::io::Result<()> {
        self.watch(listener, TOKEN_LISTENER, libc::EPOLLIN)
    }

    fn accept(self: &Arc<Self>, listener: BorrowedFd<'_>) {
        let Ok(connection) = socket::accept(listener) else { return };
        let started = self.begin_handshake(move |shared| {
            let deadline = Instant::now() + shared.handshake_timeout;
            let attempt = || {
                let hello = shared
                    .identity(|identity| handshake::accept(&mut connection.as_fd(), identity, deadline, &|_| {}))?
                    .hello;
                Ok((hello, Self::peer_process(connection.as_fd())?))
            };
            match attempt() {
                Ok((hello, process)) => shared.report(Outcome::Established(Established {
                    socket: connection,
                    hello,
                    initiated_here: false,
                    process,
                })),
                // A probe (see `listen`) hangs up without a word: nothing to tell.
                Err(ConnectError::Broken) => {}
                Err(reason) => {
                    let pid = socket::peer_process(connection.as_fd()).unwrap_or(0);
                    if let Some(more) = refusal_to_log() {
                        tracing::warn!(pid, %reason, more, "refused a connection");
                    }
                }
            }
        });
        if !started {
            tracing::warn!("too many handshakes under way, hung up on one");
        }
    }

    /// The watcher's life.
    pub(super) fn run(self: &Arc<Self>, listener: &Mutex<Option<OwnedFd>>) {
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; 32];
        loop {
            // SAFETY: `events` has room for as many entries as we say.
            let count = unsafe {
                libc::epoll_wait(self.watcher.as_raw_fd(), events.as_mut_ptr(), events.len() as libc::c_int, -1)
            };
            if self.stopping.load(Ordering::Acquire) {
                return;
            }
            let mut attention = false;
            for event in &events[..count.max(0) as usize] {
                match event.u64 {
                    TOKEN_STOP => {}
                    TOKEN_LISTENER => {
                        if let Some(listener) = lock(listener).as_ref() {
                            self.accept(listener.as_fd());
                        }
                    }
                    token => {
                        if let Some(signal) = lock(&self.signals).get(&token) {
                            signal.store(true, Ordering::SeqCst);
                            attention = true;
                        }
                    }
                }
            }
            if attention {
                self.call_attention();
            }
        }
    }

    pub(super) fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        socket::signal_event(self.stop.as_raw_fd());
    }
}
