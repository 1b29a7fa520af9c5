//! The `verbs` provider: daemons on hosts with RDMA devices.
//!
//! A peer is known by its slot and reached at an IP address, of which the connection manager makes device, port, GID and
//! path. First both sides prove the cluster key over TCP ([`acquaintance`]); only then is there a queue pair, made for that
//! one peer. Keys of regions travel in messages on it, so nobody has one before.
//!
//! One thread at a time does everything here; the only other threads are those that shake hands. What there is to wait for
//! (completions, events of the connection manager and of the device, outcomes of handshakes, a timer) is behind one epoll
//! descriptor.
//!
//! Fencing destroys the peer's queue pair: the device itself refuses what still comes. Nothing is asked of the peer.
//!
//! The layer below is safe to use: [`device`], [`region`], [`completion`], [`queue_pair`] and [`connection_manager`] hold
//! what they depend on by `Arc`, and memory under operations is held by the queue pair they are on.
//!
//! What differs from `shm` is described in docs/rdma.md: keys are the device's, [`Access::Peer`] means that nobody else is
//! told the key, and a fenced peer lives on.

pub(crate) mod acquaintance;
pub mod completion;
pub(crate) mod connection;
pub mod connection_manager;
pub mod device;
pub mod discovery;
pub mod queue_pair;
pub mod region;

#[cfg(test)]
mod faults;
#[cfg(test)]
mod layout;

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::fs::File;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use self::acquaintance::{Outcome, Shared};
use self::completion::CompletionChannel;
use self::connection::{ConnectRequest, Connection, Operation, Phase, Report, request_mark};
use self::connection_manager::{Event, EventChannel, Identifier, Kind};
use self::device::{AsynchronousEvent, Device, DeviceError, ProtectionDomain};
use self::queue_pair::{LocalRange, QueuePair, Verb, Work};
use self::region::MemoryRegion;
use crate::fabric::*;
use crate::handshake::{ConnectError, Hello, Incarnation, Proved, SLOTS_MAXIMUM};
use crate::mapping::Mapping;
use crate::shm::socket::{check, drain_event, sealed_memory, signal_event};

/// Polls between two looks at descriptors while nobody sleeps and nothing is being set up: a system call each.
const POLLS_PER_LOOK: u32 = 32;
/// How often deadlines are looked at while something is being set up.
const TICK: Duration = Duration::from_millis(100);
/// Peers that shook hands and have not asked yet. Each holds a few hundred bytes, and is let go of in time.
const EXPECTED_MAXIMUM: usize = 1024;
/// Identifiers that still say good-bye. Beyond that the oldest goes without.
const CLOSING_MAXIMUM: usize = 64;
/// How long one may take to say good-bye.
const CLOSING_TIMEOUT: Duration = Duration::from_secs(5);
/// Keys tried for a region until one is found that named nothing before.
const KEYS_TRIED_MAXIMUM: usize = 64;

/// Reasons for turning a request down, as they travel. None of them is proved, so none is more than a hint.
const REJECTED_UNKNOWN: u8 = 1;
const REJECTED_SUPERSEDED: u8 = 2;
const REJECTED_NOT_ADMITTED: u8 = 3;
const REJECTED_RESOURCES: u8 = 4;

/// Which descriptor is ready.
const LOOK_COMPLETIONS: u64 = 0;
const LOOK_CONNECTIONS: u64 = 1;
const LOOK_DEVICE: u64 = 2;
const LOOK_OUTCOMES: u64 = 3;
const LOOK_TIMER: u64 = 4;

/// How a node with an RDMA device is set up.
#[derive(Clone, Debug)]
pub struct VerbsConfig {
    pub slot: u16,
    pub incarnation: Incarnation,
    /// The cluster's name; only its hash is sent.
    pub cluster: String,
    pub key: [u8; 32],
    /// Where each slot is, our own included: an address of an RDMA interface, and a port for TCP and the connection manager.
    pub addresses: BTreeMap<u16, SocketAddr>,
    pub handshake_timeout: Duration,
}

/// Why the provider cannot start.
#[derive(thiserror::Error, Debug)]
pub enum VerbsError {
    #[error("slot {0} is out of range")]
    Slot(u16),
    #[error("slot {0} has no address")]
    NoAddress(u16),
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error("cannot {action}: {source}")]
    System { action: &'static str, source: io::Error },
}

#[derive(Default)]
struct Peer {
    /// The present connection: up, or taken and not yet confirmed.
    connection: Option<Box<Connection>>,
    /// One that we are asking for.
    attempt: Option<Box<Connection>>,
    /// A handshake of ours is under way.
    introducing: bool,
    /// Somebody asked for a connection and waits for the outcome.
    awaited: bool,
    last: Option<Incarnation>,
    /// Number of the last connection that ended here.
    closed: u64,
    /// Queue pairs that the device did not destroy.
    leftovers: Vec<QueuePair>,
}

/// Whose identifier an event is about.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Owner {
    Attempt(u16),
    Connection(u16),
    Closing,
}

struct Closing {
    identifier: Identifier,
    deadline: Instant,
}

/// The provider.
pub struct VerbsFabric {
    shared: Arc<Shared>,
    address: SocketAddr,
    listening: Option<(Identifier, JoinHandle<()>)>,
    /// By identity of their identifier.
    owners: HashMap<usize, Owner>,
    peers: Vec<Peer>,
    /// Slots with a connection that is up.
    active: Vec<u16>,
    /// Who has shaken hands and may ask, by the mark they will show.
    expected: HashMap<[u8; 32], (Proved, Instant)>,
    closing: VecDeque<Closing>,
    /// Those that say good-bye only when the port is active again (see `close`).
    silent: VecDeque<Identifier>,
    /// By address: a key of one that nobody may name could be another's.
    regions: HashMap<usize, Region>,
    retired_keys: HashSet<u32>,
    events: VecDeque<FabricEvent>,
    reports: Vec<Report>,
    corked: bool,
    armed: bool,
    polls: u32,
    wakeups: u64,
    timer_runs: bool,
    timer: OwnedFd,
    watcher: OwnedFd,
    events_of_connections: Arc<EventChannel>,
    completions: Arc<CompletionChannel>,
    domain: Arc<ProtectionDomain>,
    device: Arc<Device>,
}

impl VerbsFabric {
    /// Opens the device that our address belongs to; nobody can connect before `listen`.
    ///
    /// # Errors
    /// [`VerbsError`], which says what to do.
    pub fn new(config: VerbsConfig) -> Result<VerbsFabric, VerbsError> {
        if config.slot >= SLOTS_MAXIMUM {
            return Err(VerbsError::Slot(config.slot));
        }
        let address = *config.addresses.get(&config.slot).ok_or(VerbsError::NoAddress(config.slot))?;
        let device = Device::for_address(address)?;
        let system = |action| move |source| VerbsError::System { action, source };
        let domain = ProtectionDomain::new(&device).map_err(system("make a protection domain"))?;
        let completions = CompletionChannel::new(&device).map_err(system("make a completion channel"))?;
        let events_of_connections = EventChannel::new().map_err(DeviceError::ConnectionManager)?;
        let hello = Hello::new(&config.cluster, config.slot, config.incarnation);
        let shared = Shared::new(hello, config.key, config.addresses, config.handshake_timeout)
            .map_err(system("make an event descriptor"))?;
        // SAFETY: no pointers are passed.
        let watcher = check(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) }).map_err(system("make an epoll"))?;
        // SAFETY: the descriptor is new and ours.
        let watcher = unsafe { OwnedFd::from_raw_fd(watcher) };
        // SAFETY: no pointers are passed.
        let timer = unsafe { libc::timerfd_create(libc::CLOCK_MONOTONIC, libc::TFD_CLOEXEC | libc::TFD_NONBLOCK) };
        let timer = check(timer).map_err(system("make a timer"))?;
        // SAFETY: the descriptor is new and ours.
        let timer = unsafe { OwnedFd::from_raw_fd(timer) };
        for (descriptor, look) in [
            (completions.descriptor(), LOOK_COMPLETIONS),
            (events_of_connections.descriptor(), LOOK_CONNECTIONS),
            (device.event_descriptor(), LOOK_DEVICE),
            (shared.event.as_raw_fd(), LOOK_OUTCOMES),
            (timer.as_raw_fd(), LOOK_TIMER),
        ] {
            let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: look };
            // SAFETY: `event` is valid for the call.
            check(unsafe { libc::epoll_ctl(watcher.as_raw_fd(), libc::EPOLL_CTL_ADD, descriptor, &mut event) })
                .map_err(system("watch a descriptor"))?;
        }
        let limits = device.limits();
        tracing::info!(device = device.name(), port = device.port(), %address, ?limits, "RDMA device opened");
        if !limits.atomics {
            tracing::warn!(device = device.name(), "this RDMA device has no atomic operations");
        }
        Ok(VerbsFabric {
            shared,
            address,
            listening: None,
            owners: HashMap::new(),
            peers: Vec::new(),
            active: Vec::new(),
            expected: HashMap::new(),
            closing: VecDeque::new(),
            silent: VecDeque::new(),
            regions: HashMap::new(),
            retired_keys: HashSet::new(),
            events: VecDeque::new(),
            reports: Vec::new(),
            corked: false,
            armed: false,
            polls: 0,
            wakeups: 0,
            timer_runs: false,
            timer,
            watcher,
            events_of_connections,
            completions,
            domain,
            device,
        })
    }

    /// The device it works on.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    fn peer(&mut self, slot: u16) -> &mut Peer {
        let index = usize::from(slot);
        if self.peers.len() <= index {
            self.peers.resize_with(index + 1, Peer::default);
        }
        &mut self.peers[index]
    }

    /// The connection that is up, if there is one.
    fn up(&mut self, slot: u16) -> Option<&mut Connection> {
        let connection = self.peers.get_mut(usize::from(slot))?.connection.as_mut()?;
        (connection.phase == Phase::Up).then_some(connection)
    }

    /// Leaves an event for `poll`. Whoever sleeps on the event descriptor may be another thread than the one that caused it.
    fn report(&mut self, event: FabricEvent) {
        if self.armed && self.events.is_empty() {
            signal_event(self.shared.event.as_raw_fd());
        }
        self.events.push_back(event);
    }

    fn fail(&mut self, slot: u16, reason: ConnectError) {
        if std::mem::take(&mut self.peer(slot).awaited) {
            self.report(FabricEvent::ConnectFailed { slot, reason });
        }
    }

    /// As `fail`, unless something else may still come of it.
    fn fail_unless_hopeful(&mut self, slot: u16, reason: ConnectError) {
        let peer = self.peer(slot);
        if !peer.introducing && peer.attempt.is_none() && peer.connection.is_none() {
            self.fail(slot, reason);
        }
    }

    fn register(&mut self, mapping: Mapping, access: Access) -> io::Result<Region> {
        let mapping = Arc::new(mapping);
        let remote = match access {
            Access::Everyone | Access::Peer(_) => region::Remote::Everything,
            Access::Local => region::Remote::Nothing,
        };
        // Devices give keys out again; who remembers an old one must not find new memory behind it.
        let mut unusable = Vec::new();
        let registration = loop {
            let registration = MemoryRegion::new(&self.domain, mapping.clone(), remote)?;
            if remote == region::Remote::Nothing || !self.retired_keys.contains(&registration.remote_key()) {
                break registration;
            }
            if unusable.len() >= KEYS_TRIED_MAXIMUM {
                return Err(io::Error::other("the device gives out no keys but old ones; restart the daemon"));
            }
            unusable.push(registration);
        };
        // Where nothing is allowed some devices give out no key at all. The local one serves as a name then: a peer that
        // learns it is refused all the same.
        let key = RemoteKey(match remote {
            region::Remote::Everything => registration.remote_key(),
            region::Remote::Nothing => registration.local_key(),
        });
        let region = Region(Arc::new(RegionInner {
            registration: Some(registration),
            mapping,
            key,
            descriptor: None,
            sealed: false,
        }));
        self.regions.insert(Arc::as_ptr(&region.0).addr(), region.clone());
        Ok(region)
    }

    /// Takes an identifier out of use; it says good-bye first.
    fn retire(&mut self, identifier: Identifier) {
        self.owners.insert(identifier.identity(), Owner::Closing);
        self.closing.push_back(Closing { identifier, deadline: Instant::now() + CLOSING_TIMEOUT });
        while self.closing.len() > CLOSING_MAXIMUM
            && let Some(oldest) = self.closing.pop_front()
        {
            self.owners.remove(&oldest.identifier.identity());
        }
        self.keep_time();
    }

    /// Closes a connection and returns the ids of the operations that did not end.
    ///
    /// While the port is down nobody says good-bye: it would not arrive, and SoftRoCE of Linux 6.1 does not get over it. There a
    /// message of the connection manager that cannot be sent leaves the queue of all of them one behind: each is sent when
    /// the next is posted, on a port that is up again too, and no connection is made in time any more.
    fn close(&mut self, slot: u16, connection: Connection) -> Vec<u64> {
        self.peer(slot).closed = connection.number;
        // The event that tells may come after the failure that brought us here: the device itself is asked.
        let silently = !self.device.port_is_active();
        let (identifier, flushed, leftover) = connection.close(silently);
        if let Some((pair, error)) = leftover {
            tracing::error!(slot, %error, "the device does not destroy a queue pair");
            self.peer(slot).leftovers.push(pair);
        }
        if !silently {
            self.retire(identifier);
            return flushed;
        }
        self.owners.insert(identifier.identity(), Owner::Closing);
        self.silent.push_back(identifier);
        if self.silent.len() > CLOSING_MAXIMUM
            && let Some(oldest) = self.silent.pop_front()
        {
            self.owners.remove(&oldest.identity());
        }
        flushed
    }

    fn give_up_attempt(&mut self, slot: u16) {
        if let Some(attempt) = self.peer(slot).attempt.take() {
            // It was never a connection: the peer need not hear that it is over.
            let closed = self.peer(slot).closed;
            self.close(slot, *attempt);
            self.peer(slot).closed = closed;
        }
    }

    /// Runs the timer as long as there is something to time.
    fn keep_time(&mut self) {
        let needed = self.is_setting_up() || !self.closing.is_empty();
        if needed == self.timer_runs {
            return;
        }
        let interval = libc::timespec { tv_sec: 0, tv_nsec: if needed { TICK.subsec_nanos().into() } else { 0 } };
        let setting = libc::itimerspec { it_interval: interval, it_value: interval };
        // SAFETY: `setting` is valid for the call, and a null pointer for the old one is allowed.
        unsafe { libc::timerfd_settime(self.timer.as_raw_fd(), 0, &setting, std::ptr::null_mut()) };
        self.timer_runs = needed;
    }

    fn is_setting_up(&self) -> bool {
        !self.expected.is_empty()
            || self.peers.iter().any(|peer| {
                peer.attempt.is_some()
                    || peer.connection.as_ref().is_some_and(|connection| connection.phase != Phase::Up)
            })
    }

    fn expire(&mut self) {
        let now = Instant::now();
        self.expected.retain(|_, (_, deadline)| *deadline > now);
        while let Some(first) = self.closing.front()
            && first.deadline <= now
            && let Some(first) = self.closing.pop_front()
        {
            self.owners.remove(&first.identifier.identity());
        }
        for slot in 0..self.peers.len() as u16 {
            let late = |connection: &Option<Box<Connection>>| {
                connection
                    .as_ref()
                    .is_some_and(|connection| connection.phase != Phase::Up && connection.deadline <= now)
            };
            let peer = &self.peers[usize::from(slot)];
            let (attempt, accepted) = (late(&peer.attempt), late(&peer.connection));
            if attempt {
                self.give_up_attempt(slot);
            }
            if accepted {
                self.disconnect(slot, DisconnectReason::PeerClosed);
            }
            if attempt || accepted {
                self.fail_unless_hopeful(slot, ConnectError::TimedOut);
            }
        }
        self.keep_time();
    }

    /// Looks at everything that is behind a descriptor.
    fn look(&mut self) {
        let mut ready = [libc::epoll_event { events: 0, u64: 0 }; 8];
        // SAFETY: `ready` has room for as many entries as we say.
        let count =
            unsafe { libc::epoll_wait(self.watcher.as_raw_fd(), ready.as_mut_ptr(), ready.len() as libc::c_int, 0) };
        for entry in &ready[..count.max(0) as usize] {
            match entry.u64 {
                LOOK_COMPLETIONS => {
                    if self.completions.drain() > 0 {
                        self.wakeups += 1;
                    }
                }
                LOOK_CONNECTIONS => {
                    while let Some(event) = self.events_of_connections.next() {
                        self.handle(event);
                    }
                }
                LOOK_DEVICE => {
                    while let Some(event) = self.device.next_event() {
                        self.handle_device(event);
                    }
                }
                LOOK_TIMER => {
                    let mut expirations = [0u8; 8];
                    // SAFETY: `expirations` has room for the eight bytes. Only the reading matters, not what is read.
                    unsafe { libc::read(self.timer.as_raw_fd(), expirations.as_mut_ptr().cast(), expirations.len()) };
                    self.expire();
                }
                _ => drain_event(self.shared.event.as_raw_fd()),
            }
        }
        self.take_outcomes();
    }

    fn take_outcomes(&mut self) {
        if !self.shared.attention.swap(false, Ordering::SeqCst) {
            return;
        }
        let deadline = Instant::now() + self.shared.timeout();
        while let Some(outcome) = self.shared.next_outcome() {
            match outcome {
                Outcome::Expected(proved) => {
                    if self.expected.len() < EXPECTED_MAXIMUM {
                        self.expected.insert(request_mark(&proved.binding), (proved, deadline));
                    }
                }
                Outcome::Introduced(proved) => self.introduced(&proved, deadline),
                Outcome::Failed { slot, reason } => {
                    self.peer(slot).introducing = false;
                    // A connection the peer made may still be what was asked for.
                    self.fail_unless_hopeful(slot, reason);
                }
            }
        }
        self.keep_time();
    }

    /// We have shaken hands with a peer: asks for the connection.
    fn introduced(&mut self, proved: &Proved, deadline: Instant) {
        let slot = proved.hello.slot;
        self.peer(slot).introducing = false;
        // The world may have changed since the handshake.
        if let Err(refusal) = self.shared.admissions.admit(slot, proved.hello.incarnation) {
            return self.fail(slot, ConnectError::RefusedByUs(refusal));
        }
        let incarnation = |connection: &Connection| connection.hello.incarnation;
        let present = self.peer(slot).connection.as_deref().map(incarnation);
        if present == Some(proved.hello.incarnation) {
            // The peer was first.
            return;
        }
        self.give_up_attempt(slot);
        let Some(target) = self.shared.address(slot) else {
            return self.fail(slot, ConnectError::InvalidSlot(slot));
        };
        if !self.device.port_is_active() {
            return self.fail(slot, ConnectError::System(libc::ENETDOWN));
        }
        let milliseconds = self.shared.timeout().as_millis().clamp(1, u128::from(u32::MAX / 2)) as u32;
        let made = Identifier::new(&self.events_of_connections).and_then(|mut identifier| {
            identifier.resolve_address(self.address, target, milliseconds)?;
            Ok(identifier)
        });
        match made {
            Ok(identifier) => {
                self.owners.insert(identifier.identity(), Owner::Attempt(slot));
                let attempt = Connection::new(proved, identifier, true, Phase::Resolving, deadline);
                self.peer(slot).attempt = Some(Box::new(attempt));
            }
            Err(error) => self.fail(slot, system_error(slot, &error)),
        }
    }

    fn handle(&mut self, event: Event) {
        if let Some(requester) = event.requester {
            let (data, served, initiated) = (event.data, event.reads_served, event.reads_initiated);
            return self.requested(requester, &data, served, initiated);
        }
        match self.owners.get(&event.identity).copied() {
            Some(Owner::Attempt(slot)) => self.handle_attempt(slot, &event),
            Some(Owner::Connection(slot)) => self.handle_connection(slot, &event),
            Some(Owner::Closing) => {
                if matches!(event.kind, Kind::Disconnected | Kind::Forgotten | Kind::Unreachable) {
                    self.owners.remove(&event.identity);
                    self.closing.retain(|closing| closing.identifier.identity() != event.identity);
                    self.silent.retain(|identifier| identifier.identity() != event.identity);
                    self.keep_time();
                }
            }
            // The listener.
            None => {
                if event.kind == Kind::DeviceRemoved {
                    tracing::error!(device = self.device.name(), "the RDMA device was removed; restart the daemon");
                }
            }
        }
    }

    fn handle_attempt(&mut self, slot: u16, event: &Event) {
        let milliseconds = self.shared.timeout().as_millis().clamp(1, u128::from(u32::MAX / 2)) as u32;
        let (domain, completions) = (self.domain.clone(), self.completions.clone());
        let closed = self.peer(slot).closed;
        let Some(attempt) = self.peer(slot).attempt.as_mut() else { return };
        let failed = match event.kind {
            Kind::AddressResolved => match attempt.identifier.device_and_port() {
                Some((name, _)) if name == domain.device().name() => {
                    attempt.identifier.resolve_route(milliseconds).err().map(|error| system_error(slot, &error))
                }
                other => {
                    tracing::error!(slot, ?other, ours = domain.device().name(), "the peer is behind another device");
                    Some(ConnectError::System(libc::ENETUNREACH))
                }
            },
            Kind::RouteResolved => {
                attempt.request(&domain, &completions, closed).err().map(|error| system_error(slot, &error))
            }
            Kind::Response => match attempt.conclude(&event.data) {
                Ok(()) => return self.attempt_is_up(slot),
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                    tracing::warn!(slot, %error, "not connected");
                    Some(ConnectError::Malformed)
                }
                Err(error) => Some(system_error(slot, &error)),
            },
            Kind::Rejected => Some(match event.data.first().copied() {
                Some(REJECTED_SUPERSEDED | REJECTED_RESOURCES) => ConnectError::Busy,
                Some(REJECTED_UNKNOWN | REJECTED_NOT_ADMITTED) => ConnectError::Broken,
                // By the connection manager itself: a port without listener, or an old connection of the same numbers.
                _ if event.status == CONNECTION_MANAGER_NO_SUCH_SERVICE => ConnectError::NotListening(slot),
                _ => ConnectError::Broken,
            }),
            Kind::Unreachable => Some(ConnectError::TimedOut),
            Kind::Failed => Some(ConnectError::System(match event.status {
                0 => libc::EIO,
                status => status.saturating_abs(),
            })),
            Kind::Disconnected | Kind::DeviceRemoved => Some(ConnectError::Broken),
            Kind::Request | Kind::Established | Kind::Forgotten | Kind::Other => None,
        };
        if let Some(reason) = failed {
            tracing::debug!(slot, %reason, event = ?event.kind, status = event.status, "connection attempt failed");
            self.give_up_attempt(slot);
            self.fail_unless_hopeful(slot, reason);
            self.keep_time();
        }
    }

    fn attempt_is_up(&mut self, slot: u16) {
        let Some(attempt) = self.peer(slot).attempt.take() else { return };
        if let Err(refusal) = self.shared.admissions.admit(slot, attempt.hello.incarnation) {
            self.close(slot, *attempt);
            return self.fail(slot, ConnectError::RefusedByUs(refusal));
        }
        if self.peer(slot).connection.is_some() {
            self.disconnect(slot, DisconnectReason::Replaced);
        }
        self.owners.insert(attempt.identifier.identity(), Owner::Connection(slot));
        self.peer(slot).connection = Some(attempt);
        self.is_up(slot);
    }

    fn is_up(&mut self, slot: u16) {
        let Some(connection) = self.peer(slot).connection.as_mut() else { return };
        connection.phase = Phase::Up;
        let hello = connection.hello;
        self.shared.admissions.require(slot, hello.incarnation);
        let peer = self.peer(slot);
        peer.last = peer.last.max(Some(hello.incarnation));
        peer.awaited = false;
        self.active.push(slot);
        self.report(FabricEvent::Connected { slot, hello });
        if self.armed {
            self.watch(slot);
        }
        self.keep_time();
    }

    /// A peer asks for a connection.
    fn requested(&mut self, mut requester: Identifier, data: &[u8], reads_served: u8, reads_initiated: u8) {
        // The handshake's outcome was left before the peer could ask.
        self.take_outcomes();
        let request = ConnectRequest::decode(data);
        let found = request.and_then(|request| Some((request, self.expected.remove(&request.mark)?)));
        let Some((request, (proved, deadline))) = found else {
            if let Some(more) = crate::admission::refusal_to_log() {
                tracing::warn!(more, "refused a connection request of a stranger");
            }
            return requester.reject(REJECTED_UNKNOWN);
        };
        let (slot, incarnation) = (proved.hello.slot, proved.hello.incarnation);
        if self.shared.admissions.admit(slot, incarnation).is_err() {
            return requester.reject(REJECTED_NOT_ADMITTED);
        }
        let ours = self.shared.hello.slot;
        let peer = self.peer(slot);
        // Of two connections the peers made to each other at once, both sides keep the lower slot's. One that the peer
        // knows to be over, or that it made itself, or of an earlier incarnation, gives way.
        let keep_present = peer.connection.as_ref().is_some_and(|present| {
            present.initiated_here && present.hello.incarnation == incarnation && present.number != request.closed
        });
        let keep_attempt =
            peer.attempt.as_ref().is_some_and(|attempt| attempt.hello.incarnation == incarnation && ours < slot);
        if keep_present || keep_attempt {
            return requester.reject(REJECTED_SUPERSEDED);
        }
        self.give_up_attempt(slot);
        if self.peer(slot).connection.is_some() {
            self.disconnect(slot, DisconnectReason::Replaced);
        }
        let identity = requester.identity();
        let mut connection = Connection::new(&proved, requester, false, Phase::Accepted, deadline);
        match connection.accept(&self.domain, &self.completions, &request, reads_served, reads_initiated) {
            Ok(()) => {
                self.owners.insert(identity, Owner::Connection(slot));
                self.peer(slot).connection = Some(Box::new(connection));
            }
            Err(error) => {
                tracing::error!(slot, %error, "cannot take a connection");
                connection.identifier.reject(REJECTED_RESOURCES);
                self.fail_unless_hopeful(slot, system_error(slot, &error));
            }
        }
        self.keep_time();
    }

    fn handle_connection(&mut self, slot: u16, event: &Event) {
        let Some(connection) = self.peer(slot).connection.as_mut() else { return };
        match event.kind {
            Kind::Established if connection.phase == Phase::Accepted => {
                let incarnation = connection.hello.incarnation;
                if self.shared.admissions.admit(slot, incarnation).is_err() {
                    self.disconnect(slot, DisconnectReason::Fenced);
                } else {
                    self.is_up(slot);
                }
            }
            Kind::Disconnected | Kind::Rejected | Kind::Unreachable | Kind::Failed | Kind::DeviceRemoved => {
                self.disconnect(slot, DisconnectReason::PeerClosed);
            }
            _ => {}
        }
    }

    fn handle_device(&mut self, event: AsynchronousEvent) {
        let device = self.device.name().to_string();
        let owner = |fabric: &Self, pair| {
            (0..fabric.peers.len()).find(|index| {
                fabric.peers[*index].connection.as_ref().is_some_and(|connection| connection.owns_pair(pair))
            })
        };
        match event {
            AsynchronousEvent::QueuePairFatal(pair) => {
                if let Some(slot) = owner(self, pair) {
                    tracing::error!(slot, device, "the queue pair failed");
                    self.disconnect(slot as u16, DisconnectReason::PeerClosed);
                }
            }
            AsynchronousEvent::QueuePairViolated(pair) => {
                if let Some(slot) = owner(self, pair) {
                    tracing::warn!(slot, device, "the peer named a wrong key or range");
                    self.disconnect(slot as u16, DisconnectReason::PeerClosed);
                }
            }
            AsynchronousEvent::Established(pair) => {
                if let Some(slot) = owner(self, pair)
                    && let Some(connection) = self.peers[slot].connection.as_mut()
                    && connection.phase == Phase::Accepted
                {
                    connection.identifier.notify_established();
                }
            }
            AsynchronousEvent::PortActive(port) => {
                tracing::info!(device, port, "the RDMA port is up");
                if self.device.port_is_active() {
                    for mut identifier in std::mem::take(&mut self.silent) {
                        identifier.disconnect();
                        self.retire(identifier);
                    }
                }
            }
            AsynchronousEvent::PortDown(port) => {
                tracing::warn!(device, port, "the RDMA port is down; operations under way fail if it stays down");
            }
            AsynchronousEvent::DeviceFatal => {
                tracing::error!(device, "the RDMA device failed; restart the daemon when it is back");
                for slot in self.active.clone() {
                    self.disconnect(slot, DisconnectReason::PeerClosed);
                }
            }
            AsynchronousEvent::Other(number) => tracing::debug!(device, number, "an event of the RDMA device"),
        }
    }

    /// Collects what one connection has to report; the reason why it is over, if it is.
    fn collect(&mut self, slot: u16) -> Option<DisconnectReason> {
        let mut reports = std::mem::take(&mut self.reports);
        let result = self.up(slot).map(|connection| connection.poll(&mut reports));
        for report in reports.drain(..) {
            self.report(match report {
                Report::Ended { work_id, result } => FabricEvent::Completed { slot, work_id, result },
                Report::Received { immediate, length } => FabricEvent::Received { slot, immediate, length },
                Report::Control(bytes) => FabricEvent::Control { slot, bytes },
            });
        }
        self.reports = reports;
        result?.err()
    }

    /// Collects, and hands over what waited.
    fn serve(&mut self, slot: u16) {
        if let Some(reason) = self.collect(slot) {
            return self.disconnect(slot, reason);
        }
        self.hand_over(slot);
    }

    /// Hands over what was just queued.
    fn flush(&mut self, slot: u16) {
        self.hand_over(slot);
        if self.armed && self.up(slot).is_some_and(|connection| connection.has_pending()) {
            // What would make room may have ended already, unheard: whoever sleeps has to look, and to announce itself anew.
            self.interrupt();
        }
    }

    fn hand_over(&mut self, slot: u16) {
        let armed = self.armed;
        let Some(connection) = self.up(slot) else { return };
        if let Err(error) = connection.flush(armed) {
            tracing::error!(slot, %error, "the device does not take an operation");
            self.disconnect(slot, DisconnectReason::Local);
        }
    }

    fn watch(&mut self, slot: u16) {
        let Some(connection) = self.up(slot) else { return };
        if let Err(error) = connection.watch() {
            tracing::error!(slot, %error, "the device does not watch a completion queue");
            self.disconnect(slot, DisconnectReason::Local);
        }
    }

    fn post(
        &mut self,
        slot: u16,
        mut verb: Verb,
        local: Local<'_>,
        mut remote: Remote,
        work: Work,
    ) -> Result<(), PostError> {
        if !local.region.contains(local.offset, u64::from(local.length)) {
            return Err(PostError::LocalBounds);
        }
        let atomic = verb.is_atomic();
        if atomic && (local.length != 8 || !local.offset.is_multiple_of(8)) {
            return Err(PostError::Misaligned);
        }
        let limits = self.device.limits();
        if atomic && !limits.atomics {
            return Err(PostError::NoAtomics);
        }
        if local.length > limits.operation_length {
            return Err(PostError::TooLong);
        }
        if atomic && !remote.offset.is_multiple_of(8) {
            // The peer's device is to refuse it. Some do not even send an atomic on half a word, so it goes as a read
            // that is just as wrong: beyond the end of every region.
            (verb, remote.offset) = (Verb::Read, u64::MAX - 7);
        }
        let corked = self.corked;
        let Some(connection) = self.up(slot) else { return Err(PostError::NotConnected(slot)) };
        let memory = local.region.0.registration.as_ref();
        let usable = |memory: &&Arc<MemoryRegion>| connection.domain().is_some_and(|domain| memory.is_usable(domain));
        let Some(memory) = memory.filter(usable) else { return Err(PostError::LocalBounds) };
        if !connection.has_room() {
            return Err(PostError::QueueFull);
        }
        let local = LocalRange { memory: memory.clone(), offset: local.offset, length: local.length };
        connection.queue(Operation { verb, local, remote: (remote.key.0, remote.offset), work });
        if !corked || connection.fills_a_chain() {
            self.flush(slot);
        }
        Ok(())
    }
}

/// `IB_CM_REJ_INVALID_SERVICE_ID`: nobody listens there.
const CONNECTION_MANAGER_NO_SUCH_SERVICE: i32 = 8;

fn system_error(slot: u16, error: &io::Error) -> ConnectError {
    tracing::warn!(slot, %error, "cannot set up a connection");
    ConnectError::System(error.raw_os_error().unwrap_or(libc::EIO))
}

impl Fabric for VerbsFabric {
    fn register_memory(&mut self, length: usize, access: Access) -> io::Result<Region> {
        if length == 0 {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        let memory = Mapping::new(sealed_memory(length)?.as_fd(), length)?;
        self.register(memory, access)
    }

    fn register_file(&mut self, file: &File, length: usize, access: Access) -> io::Result<Region> {
        let memory = Mapping::new(file.as_fd(), length)?;
        self.register(memory, access)
    }

    fn deregister(&mut self, region: &Region) {
        let Some(region) = self.regions.remove(&Arc::as_ptr(&region.0).addr()) else { return };
        let Some(registration) = &region.0.registration else { return };
        // What only we use stays until the last operation of ours on it has ended, by the operation's own hold.
        if registration.remote() == region::Remote::Everything {
            self.retired_keys.insert(registration.remote_key());
            registration.withdraw();
        }
    }

    fn listen(&mut self) -> io::Result<()> {
        if self.listening.is_some() {
            return Ok(());
        }
        let named = |what: &'static str, address: SocketAddr| {
            move |error: io::Error| {
                let number = error.kind();
                io::Error::new(number, format!("cannot listen for {what} at {address}: {error}"))
            }
        };
        let address = self.address;
        // TCP first: it says for certain whether another daemon is there.
        let listener = TcpListener::bind(address).map_err(named("handshakes", address))?;
        listener.set_nonblocking(true)?;
        let mut identifier = Identifier::new(&self.events_of_connections)?;
        identifier.bind(address).and_then(|()| identifier.listen()).map_err(named("RDMA connections", address))?;
        let shared = self.shared.clone();
        let thread = std::thread::Builder::new().name("verbfs-fabric".into()).spawn(move || shared.run(&listener))?;
        self.listening = Some((identifier, thread));
        Ok(())
    }

    fn connect(&mut self, slot: u16) -> Result<bool, ConnectError> {
        if slot == self.shared.hello.slot || slot >= SLOTS_MAXIMUM {
            return Err(ConnectError::InvalidSlot(slot));
        }
        let address = self.shared.address(slot).ok_or(ConnectError::InvalidSlot(slot))?;
        // A connection that is known to be over is none.
        self.look();
        if self.armed {
            // Whoever sleeps was to be woken by what was just taken.
            self.interrupt();
        }
        let peer = self.peer(slot);
        if let Some(connection) = &peer.connection {
            peer.awaited = connection.phase != Phase::Up;
            return Ok(peer.awaited);
        }
        peer.awaited = true;
        if peer.attempt.is_none() && !std::mem::replace(&mut peer.introducing, true) {
            self.shared.introduce(slot, address);
        }
        Ok(true)
    }

    fn disconnect(&mut self, slot: u16, reason: DisconnectReason) {
        let Some(peer) = self.peers.get(usize::from(slot)) else { return };
        if peer.connection.is_none() {
            if peer.attempt.is_some() {
                self.give_up_attempt(slot);
                self.fail_unless_hopeful(slot, ConnectError::Broken);
                self.keep_time();
            }
            return;
        }
        // What has happened until now is reported. That it has broken meanwhile is no news.
        let _ = self.collect(slot);
        let Some(connection) = self.peer(slot).connection.take() else { return };
        self.active.retain(|other| *other != slot);
        let was_up = connection.phase == Phase::Up;
        for work_id in self.close(slot, *connection) {
            let result = Err(WorkError::Flushed);
            self.report(FabricEvent::Completed { slot, work_id, result });
        }
        if !matches!(reason, DisconnectReason::Local | DisconnectReason::PeerClosed | DisconnectReason::Replaced) {
            tracing::warn!(slot, %reason, "connection ended");
        }
        if was_up {
            self.report(FabricEvent::Disconnected { slot, reason });
        }
        if reason == DisconnectReason::Replaced {
            // Whoever had an interest in this connection has it in the next.
            self.peer(slot).awaited = true;
        } else {
            self.fail_unless_hopeful(slot, ConnectError::Broken);
        }
    }

    fn latest(&self, slot: u16) -> Option<Incarnation> {
        self.peers.get(usize::from(slot)).and_then(|peer| peer.last)
    }

    fn fence(&mut self, slot: u16) -> Result<(), FenceError> {
        // First the door: a peer that finds itself cut off may knock before we are done here.
        if let Some(last) = self.peer(slot).last {
            self.refuse(slot, last.node);
        }
        self.give_up_attempt(slot);
        self.disconnect(slot, DisconnectReason::Fenced);
        let peer = self.peer(slot);
        while let Some(mut pair) = peer.leftovers.pop() {
            if let Err(source) = pair.destroy() {
                peer.leftovers.push(pair);
                return Err(FenceError::QueuePair { source });
            }
        }
        Ok(())
    }

    fn admit_only(&mut self, slots: &[u16]) {
        self.shared.admissions.admit_only(slots);
    }

    #[cfg(test)]
    fn break_queue_pair(&mut self, slot: u16) {
        self.up(slot).expect("connected").pair_mut().fail().expect("the device takes the queue pair into error");
    }

    fn refuse(&mut self, slot: u16, node_incarnation: u32) {
        self.shared.admissions.refuse(slot, node_incarnation);
    }

    fn write(&mut self, slot: u16, source: Local<'_>, target: Remote, work_id: u64) -> Result<(), PostError> {
        self.post(slot, Verb::Write, source, target, Work::Reported(work_id))
    }

    fn write_with_immediate(
        &mut self,
        slot: u16,
        source: Local<'_>,
        target: Remote,
        immediate: u32,
        work_id: u64,
    ) -> Result<(), PostError> {
        self.post(slot, Verb::WriteImmediate(immediate), source, target, Work::Reported(work_id))
    }

    fn read(&mut self, slot: u16, target: Local<'_>, source: Remote, work_id: u64) -> Result<(), PostError> {
        self.post(slot, Verb::Read, target, source, Work::Reported(work_id))
    }

    fn compare_swap(
        &mut self,
        slot: u16,
        result: Local<'_>,
        target: Remote,
        expected: u64,
        new: u64,
        work_id: u64,
    ) -> Result<(), PostError> {
        self.post(slot, Verb::CompareSwap { expected, new }, result, target, Work::Reported(work_id))
    }

    fn fetch_add(
        &mut self,
        slot: u16,
        result: Local<'_>,
        target: Remote,
        addend: u64,
        work_id: u64,
    ) -> Result<(), PostError> {
        self.post(slot, Verb::FetchAdd { addend }, result, target, Work::Reported(work_id))
    }

    fn publish(&mut self, slot: u16, source: Local<'_>, target: Remote, immediate: u32) -> Result<(), PostError> {
        if source.length < 8 {
            return Err(PostError::LocalBounds);
        }
        self.post(slot, Verb::WriteImmediate(immediate), source, target, Work::Silent)
    }

    fn publication(&self) -> Publication {
        Publication::Completion
    }

    fn send_control(&mut self, slot: u16, bytes: &[u8]) -> Result<(), PostError> {
        assert!(bytes.len() <= CONTROL_LENGTH_MAXIMUM, "set-up message too long");
        let Some(connection) = self.up(slot) else { return Err(PostError::NotConnected(slot)) };
        if !connection.has_room() {
            return Err(PostError::QueueFull);
        }
        connection.queue_control(bytes);
        // Not held back: it is rare, and the other side can do nothing before it has it.
        self.flush(slot);
        Ok(())
    }

    fn cork(&mut self) {
        self.corked = true;
    }

    fn uncork(&mut self) {
        self.corked = false;
        let mut index = 0;
        while let Some(slot) = self.active.get(index).copied() {
            index += 1;
            if self.up(slot).is_some_and(|connection| connection.has_pending()) {
                self.flush(slot);
            }
        }
    }

    fn poll(&mut self, events: &mut Vec<FabricEvent>) {
        let slept = std::mem::take(&mut self.armed);
        self.polls = self.polls.wrapping_add(1);
        if slept
            || self.timer_runs
            || self.polls.is_multiple_of(POLLS_PER_LOOK)
            || self.shared.attention.load(Ordering::Relaxed)
        {
            self.look();
        }
        let mut index = 0;
        while let Some(slot) = self.active.get(index).copied() {
            index += 1;
            self.serve(slot);
        }
        events.extend(self.events.drain(..));
    }

    fn event_fd(&self) -> RawFd {
        self.watcher.as_raw_fd()
    }

    fn arm(&mut self) -> bool {
        if !self.events.is_empty() {
            return false;
        }
        self.armed = true;
        for slot in self.active.clone() {
            // What completes after this makes the descriptor readable; what did before is found by the look behind it.
            self.watch(slot);
            self.serve(slot);
        }
        if !self.events.is_empty() || self.shared.attention.load(Ordering::SeqCst) {
            self.disarm();
            return false;
        }
        true
    }

    fn interrupt(&self) {
        signal_event(self.shared.event.as_raw_fd());
    }

    fn disarm(&mut self) {
        self.armed = false;
    }

    fn wakeups_written(&self) -> u64 {
        self.wakeups
    }
}

impl Drop for VerbsFabric {
    fn drop(&mut self) {
        for slot in 0..self.peers.len() as u16 {
            self.give_up_attempt(slot);
            self.disconnect(slot, DisconnectReason::Local);
        }
        self.shared.stop();
        if let Some((identifier, thread)) = self.listening.take() {
            drop(identifier);
            let _ = thread.join();
        }
    }
}
