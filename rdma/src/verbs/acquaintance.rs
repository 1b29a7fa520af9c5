//! Getting to know a peer before there is anything it could reach: the handshake, over a TCP connection of its own.
//!
//! Each side proves the cluster key ([`crate::handshake`]); what both then know and nobody else is the *binding*, from which
//! the marks are derived that the request and the answer of the connection manager carry. So a queue pair is made only
//! for a peer that has proved itself, and a request of a stranger is turned down unseen.
//!
//! Handshakes run in threads of their own, bounded in number and time, so that a silent peer delays nobody. What they find
//! is left in [`Shared`] for the thread that polls, which alone touches connections.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::admission::{Admissions, refusal_to_log};
use crate::handshake::{self, Channel, ConnectError, Hello, Identity, Proved};
use crate::shm::socket::{event_descriptor, signal_event};

/// Handshakes under way at one time; whoever comes beyond is hung up on and tries again.
const HANDSHAKES_MAXIMUM: usize = 64;
/// How long the listener rests when the system has no descriptors or threads to give.
const BREATHER: Duration = Duration::from_millis(50);

/// What came of a handshake.
pub(super) enum Outcome {
    /// The peer came to us and will ask for a connection.
    Expected(Proved),
    /// We came to the peer and may ask for one.
    Introduced(Proved),
    Failed {
        slot: u16,
        reason: ConnectError,
    },
}

/// What the threads share.
pub(super) struct Shared {
    pub(super) hello: Hello,
    key: [u8; 32],
    addresses: BTreeMap<u16, SocketAddr>,
    timeout: Duration,
    /// Readable when there is an outcome, or when somebody interrupts.
    pub(super) event: OwnedFd,
    /// Set when there is an outcome.
    pub(super) attention: AtomicBool,
    outcomes: Mutex<VecDeque<Outcome>>,
    pub(super) admissions: Admissions,
    handshakes: AtomicUsize,
    stop: OwnedFd,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // The queue stays whole whatever panicked: each change is one insertion or removal.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub(super) fn new(
        hello: Hello,
        key: [u8; 32],
        addresses: BTreeMap<u16, SocketAddr>,
        timeout: Duration,
    ) -> io::Result<Arc<Shared>> {
        Ok(Arc::new(Shared {
            hello,
            key,
            addresses,
            timeout,
            event: event_descriptor()?,
            attention: AtomicBool::new(false),
            outcomes: Mutex::default(),
            admissions: Admissions::default(),
            handshakes: AtomicUsize::new(0),
            stop: event_descriptor()?,
        }))
    }

    /// How long a handshake may take, and the set-up after it.
    pub(super) fn timeout(&self) -> Duration {
        self.timeout
    }

    pub(super) fn address(&self, slot: u16) -> Option<SocketAddr> {
        self.addresses.get(&slot).copied()
    }

    pub(super) fn next_outcome(&self) -> Option<Outcome> {
        lock(&self.outcomes).pop_front()
    }

    fn report(&self, outcome: Outcome) {
        lock(&self.outcomes).push_back(outcome);
        self.attention.store(true, Ordering::SeqCst);
        signal_event(self.event.as_raw_fd());
    }

    pub(super) fn stop(&self) {
        signal_event(self.stop.as_raw_fd());
    }

    fn begin(self: &Arc<Self>, work: impl FnOnce(&Arc<Shared>) + Send + 'static) -> bool {
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

    /// Introduces us to `slot`; an outcome follows.
    pub(super) fn introduce(self: &Arc<Self>, slot: u16, address: SocketAddr) {
        let started = self.begin(move |shared| {
            let deadline = Instant::now() + shared.timeout;
            let attempt = || {
                let stream = TcpStream::connect_timeout(&address, shared.timeout).map_err(|error| {
                    match (error.kind(), error.raw_os_error()) {
                        (io::ErrorKind::ConnectionRefused, _) => ConnectError::NotListening(slot),
                        (io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock, _) => ConnectError::TimedOut,
                        (_, number) => ConnectError::System(number.unwrap_or(libc::EIO)),
                    }
                })?;
                let mut stream = Stream::new(stream, shared.timeout)?;
                shared.identity(|identity| handshake::initiate(&mut stream, identity, slot, deadline))
            };
            shared.report(match attempt() {
                Ok(proved) => Outcome::Introduced(proved),
                Err(reason) => {
                    if !matches!(reason, ConnectError::NotListening(_)) {
                        tracing::debug!(slot, %reason, "connection attempt failed");
                    }
                    Outcome::Failed { slot, reason }
                }
            });
        });
        if !started {
            self.report(Outcome::Failed { slot, reason: ConnectError::Busy });
        }
    }

    fn receive(self: &Arc<Self>, stream: TcpStream, from: SocketAddr) {
        let started = self.begin(move |shared| {
            let deadline = Instant::now() + shared.timeout;
            let attempt = || {
                let mut stream = Stream::new(stream, shared.timeout)?;
                // Before the peer can know that it is let in, or its request might come before we expect it.
                let expect = |proved: &Proved| shared.report(Outcome::Expected(*proved));
                shared.identity(|identity| handshake::accept(&mut stream, identity, deadline, &expect))
            };
            match attempt() {
                // A probe hangs up without a word: nothing to tell.
                Ok(_) | Err(ConnectError::Broken) => {}
                Err(reason) => {
                    if let Some(more) = refusal_to_log() {
                        tracing::warn!(%from, %reason, more, "refused a connection");
                    }
                }
            }
        });
        if !started {
            tracing::warn!(%from, "too many handshakes under way, hung up on one");
        }
    }

    /// The listener's life.
    pub(super) fn run(self: &Arc<Self>, listener: &TcpListener) {
        loop {
            let entry = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
            let mut entries = [entry(self.stop.as_raw_fd()), entry(listener.as_fd().as_raw_fd())];
            // SAFETY: two valid entries.
            unsafe { libc::poll(entries.as_mut_ptr(), entries.len() as libc::nfds_t, -1) };
            if entries[0].revents != 0 {
                return;
            }
            match listener.accept() {
                Ok((stream, from)) => self.receive(stream, from),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => std::thread::sleep(BREATHER),
            }
        }
    }
}

/// Messages on a TCP connection, each behind its length in two bytes.
struct Stream(TcpStream);

impl Stream {
    fn new(stream: TcpStream, timeout: Duration) -> Result<Stream, ConnectError> {
        stream.set_nonblocking(false).map_err(system)?;
        stream.set_nodelay(true).map_err(system)?;
        stream.set_write_timeout(Some(timeout)).map_err(system)?;
        Ok(Stream(stream))
    }

    fn fill(&mut self, mut buffer: &mut [u8], deadline: Instant) -> Result<(), ConnectError> {
        while !buffer.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ConnectError::TimedOut);
            }
            self.0.set_read_timeout(Some(left)).map_err(system)?;
            match self.0.read(buffer) {
                Ok(0) => return Err(ConnectError::Broken),
                Ok(length) => buffer = &mut buffer[length..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(system(error)),
            }
        }
        Ok(())
    }
}

fn system(error: io::Error) -> ConnectError {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => ConnectError::TimedOut,
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => ConnectError::Broken,
        _ => ConnectError::System(error.raw_os_error().unwrap_or(libc::EIO)),
    }
}

impl Channel for Stream {
    fn send(&mut self, message: &[u8]) -> Result<(), ConnectError> {
        let length = u16::try_from(message.len()).expect("handshake messages are short");
        self.0.write_all(&[&length.to_le_bytes(), message].concat()).map_err(system)
    }

    fn receive(&mut self, buffer: &mut [u8], deadline: Instant) -> Result<usize, ConnectError> {
        let mut length = [0; 2];
        self.fill(&mut length, deadline)?;
        let length = usize::from(u16::from_le_bytes(length));
        let buffer = buffer.get_mut(..length).ok_or(ConnectError::Malformed)?;
        self.fill(buffer, deadline)?;
        Ok(length)
    }
}
