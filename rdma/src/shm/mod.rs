//! The `shm` provider: daemons on one host, each its own process (or several endpoints in one, for tests).
//!
//! Regions are memory files; their descriptors travel over a Unix socket once both sides have proved the cluster key. An
//! operation is performed by the *initiator*, at once, on its mapping of the target's memory: the target's processor takes
//! no part, and order on a connection is program order. What two sides share besides regions is one page each
//! ([`page`]): sleep announcement, revocation, and the ring of immediates.
//!
//! Fencing kills: a process that has mapped our memory can be stopped in no other way. It is killed through a process
//! descriptor taken during the handshake, so a recycled process number cannot be hit. A peer in our own process is revoked.
//!
//! What this provider cannot defend against: a peer that holds the cluster key can write to any region it may name by any
//! operation, as with real RDMA, and can truncate a *file* behind a region we mapped (anonymous memory is sealed).

mod background;
mod page;
pub(crate) mod socket;

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use self::background::{Established, Outcome, Shared};
use self::page::Page;
use crate::fabric::*;
use crate::handshake::{ConnectError, Hello, Incarnation, SLOTS_MAXIMUM};
use crate::mapping::Mapping;
use crate::sync::immediate_ring::{Consumer, Producer, PushError};
use crate::sync::{Hardware, event_count, publication, revocation};

/// Operations that wait for the peer to take immediates, per connection. Twice its ring: beyond that the peer is stuck.
const PENDING_MAXIMUM: usize = 2 * page::IMMEDIATES;
/// Regions one peer may show us. Each costs an address range and a kernel object.
const PEER_REGIONS_MAXIMUM: usize = 4096;
/// Frames queued to a peer that does not read its socket; then it is given up.
const OUTGOING_MAXIMUM: usize = 2 * PEER_REGIONS_MAXIMUM;
/// Bytes of the longest frame: one tag and a set-up message.
const FRAME_LENGTH_MAXIMUM: usize = 512;
const _: () = assert!(CONTROL_LENGTH_MAXIMUM < FRAME_LENGTH_MAXIMUM);
/// Frames read from one peer before the others get their turn.
const FRAMES_PER_POLL: usize = 64;

const FRAME_ATTACH: u8 = 1;
const FRAME_REGION: u8 = 2;
const FRAME_FORGET: u8 = 3;
const FRAME_CONTROL: u8 = 4;

/// How an endpoint on this host is set up.
#[derive(Clone, Debug)]
pub struct ShmConfig {
    pub slot: u16,
    pub incarnation: Incarnation,
    /// The cluster's name; only its hash is sent.
    pub cluster: String,
    pub key: [u8; 32],
    /// Where `<slot>.sock` lies. Belongs to the daemons' user alone.
    pub directory: PathBuf,
    pub handshake_timeout: Duration,
    /// How long `fence` waits for a killed process to be gone.
    pub fence_timeout: Duration,
}

struct Frame {
    bytes: Vec<u8>,
    descriptors: Vec<Arc<OwnedFd>>,
}

#[derive(Clone, Copy, Debug)]
enum Verb {
    Write,
    WriteImmediate(u32),
    Publish,
    Read,
    CompareSwap { expected: u64, new: u64 },
    FetchAdd { addend: u64 },
}

#[derive(Clone, Copy, Debug)]
struct Operation<R> {
    verb: Verb,
    region: R,
    local_offset: u64,
    length: u32,
    remote: Remote,
    work_id: u64,
}

enum Performed {
    Done,
    /// The ring of immediates is full; the operation has not begun.
    Later,
    Failed(DisconnectReason),
}

/// A process that has, or had, our memory mapped.
struct Process {
    incarnation: Incarnation,
    pid: i32,
    descriptor: Arc<OwnedFd>,
}

struct RemoteSide {
    page: Page,
    event: OwnedFd,
}

struct Connection {
    token: u64,
    socket: OwnedFd,
    signal: Arc<AtomicBool>,
    hello: Hello,
    initiated_here: bool,
    process: Option<Arc<OwnedFd>>,
    /// Ours: the peer writes to it.
    page: Arc<Page>,
    consumer: Consumer,
    /// The peer's, once its attach frame is here.
    remote: Option<RemoteSide>,
    producer: Producer,
    mappings: Vec<(RemoteKey, Mapping)>,
    outgoing: VecDeque<Frame>,
    pending: VecDeque<Operation<Region>>,
}

#[derive(Default)]
struct Peer {
    connection: Option<Box<Connection>>,
    /// A handshake of ours is under way.
    connecting: bool,
    /// Somebody asked for a connection and waits for the outcome.
    awaited: bool,
    processes: Vec<Process>,
    /// Pages through which an endpoint in this process could still reach us.
    insiders: Vec<Arc<Page>>,
    last: Option<Incarnation>,
}

struct Registered {
    region: Region,
    access: Access,
}

/// The provider.
pub struct ShmFabric {
    shared: Arc<Shared>,
    listener: Arc<Mutex<Option<OwnedFd>>>,
    socket_path: PathBuf,
    background: Option<JoinHandle<()>>,
    regions: BTreeMap<RemoteKey, Registered>,
    next_key: u32,
    next_token: u64,
    peers: Vec<Peer>,
    /// Slots with a connection.
    active: Vec<u16>,
    events: VecDeque<FabricEvent>,
    armed: bool,
    fence_timeout: Duration,
    wakeups_written: u64,
}

impl ShmFabric {
    /// Starts the background thread; nobody can connect before `listen`.
    ///
    /// # Errors
    /// `InvalidInput` when the slot is out of range; otherwise what the system says about threads and descriptors.
    pub fn new(config: ShmConfig) -> io::Result<ShmFabric> {
        if config.slot >= SLOTS_MAXIMUM {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "slot out of range"));
        }
        let hello = Hello::new(&config.cluster, config.slot, config.incarnation);
        let socket_path = config.directory.join(format!("{}.sock", config.slot));
        let shared = Shared::new(hello, config.key, config.directory, config.handshake_timeout)?;
        let listener = Arc::new(Mutex::new(None));
        let background = std::thread::Builder::new().name("verbfs-fabric".into()).spawn({
            let (shared, listener) = (shared.clone(), listener.clone());
            move || shared.run(&listener)
        })?;
        let mut random = [0; 4];
        getrandom::fill(&mut random).map_err(|_| io::Error::from(io::ErrorKind::Other))?;
        Ok(ShmFabric {
            shared,
            listener,
            socket_path,
            background: Some(background),
            regions: BTreeMap::new(),
            // A random start: a key kept from an earlier life of this daemon names nothing in this one.
            next_key: u32::from_le_bytes(random) & 0x7fff_ffff,
            next_token: background::TOKEN_FIRST,
            peers: Vec::new(),
            active: Vec::new(),
            events: VecDeque::new(),
            armed: false,
            fence_timeout: config.fence_timeout,
            wakeups_written: 0,
        })
    }

    fn peer(&mut self, slot: u16) -> &mut Peer {
        let index = usize::from(slot);
        if self.peers.len() <= index {
            self.peers.resize_with(index + 1, Peer::default);
        }
        &mut self.peers[index]
    }

    fn register(&mut self, descriptor: OwnedFd, length: usize, access: Access, sealed: bool) -> io::Result<Region> {
        let mapping = Mapping::new(descriptor.as_fd(), length)?;
        let key = RemoteKey(self.next_key);
        self.next_key = self.next_key.checked_add(1).ok_or(io::ErrorKind::OutOfMemory)?;
        let region = Region(Arc::new(RegionInner {
            registration: None,
            mapping: Arc::new(mapping),
            key,
            descriptor: Some(Arc::new(descriptor)),
            sealed,
        }));
        self.regions.insert(key, Registered { region: region.clone(), access });
        for slot in self.active.clone() {
            if may_name(access, slot) {
                self.enqueue(slot, region_frame(&region));
            }
        }
        Ok(region)
    }

    /// Leaves an event for `poll`. Whoever sleeps on the event descriptor may be another thread than the one that caused it.
    fn report(&mut self, event: FabricEvent) {
        if self.armed && self.events.is_empty() {
            socket::signal_event(self.shared.event.as_raw_fd());
        }
        self.events.push_back(event);
    }

    /// Queues a frame behind those that wait, and sends what the socket takes.
    fn enqueue(&mut self, slot: u16, frame: Frame) {
        let Some(connection) = self.peers[usize::from(slot)].connection.as_mut() else { return };
        connection.outgoing.push_back(frame);
        let reason = if connection.outgoing.len() > OUTGOING_MAXIMUM {
            Some(DisconnectReason::Protocol("it does not read its socket"))
        } else {
            connection.flush_outgoing().err()
        };
        if let Some(reason) = reason {
            self.disconnect(slot, reason);
        }
    }

    fn fail(&mut self, slot: u16, reason: ConnectError) {
        if std::mem::take(&mut self.peer(slot).awaited) {
            self.report(FabricEvent::ConnectFailed { slot, reason });
        }
    }

    fn attach_failed(&mut self, slot: u16, error: &io::Error) {
        self.fail(slot, ConnectError::System(error.raw_os_error().unwrap_or(libc::EIO)));
    }

    fn attach(&mut self, established: Established) {
        let Established { socket, hello, initiated_here, process } = established;
        let slot = hello.slot;
        let our_slot = self.shared.hello.slot;
        if initiated_here {
            self.peer(slot).connecting = false;
        }
        // The world may have changed since the handshake.
        if let Err(refusal) = self.shared.admissions.admit(slot, hello.incarnation) {
            if initiated_here {
                self.fail(slot, ConnectError::RefusedByUs(refusal));
            }
            return;
        }
        if let Some(old) = &self.peer(slot).connection {
            // Of two connections the peers made to each other at once, both sides keep the lower slot's. One that has
            // hung up, or belongs to an earlier incarnation, or was made by the same side before, gives way.
            let lower = our_slot.min(slot);
            let initiator = |here: bool| if here { our_slot } else { slot };
            let old_wins = old.hello.incarnation == hello.incarnation
                && initiator(old.initiated_here) == lower
                && initiator(initiated_here) != lower
                && !socket::has_hung_up(old.socket.as_fd());
            if old_wins {
                return;
            }
            self.disconnect(slot, DisconnectReason::Replaced);
        }
        let (page, page_descriptor) = match Page::create() {
            Ok(created) => created,
            Err(error) => {
                tracing::error!(slot, %error, "no memory for a connection");
                return self.attach_failed(slot, &error);
            }
        };
        let page = Arc::new(page);
        let (pid, process) = match process {
            Some((pid, descriptor)) => (pid, Some(Arc::new(descriptor))),
            None => (0, None),
        };
        let token = self.next_token;
        self.next_token += 1;
        let watched =
            self.shared.watch_connection(token, socket.as_fd(), process.as_ref().map(|descriptor| descriptor.as_fd()));
        let signal = match watched {
            Ok(signal) => signal,
            Err(error) => {
                tracing::error!(slot, %error, "cannot watch a connection");
                return self.attach_failed(slot, &error);
            }
        };
        self.shared.admissions.require(slot, hello.incarnation);
        let peer = self.peer(slot);
        peer.last = Some(hello.incarnation);
        match &process {
            Some(descriptor) => {
                let now = Instant::now();
                peer.processes.retain(|known| !socket::wait_readable(known.descriptor.as_fd(), now).unwrap_or(false));
                if !peer.processes.iter().any(|known| known.pid == pid && known.incarnation == hello.incarnation) {
                    peer.processes.push(Process {
                        incarnation: hello.incarnation,
                        pid,
                        descriptor: descriptor.clone(),
                    });
                }
            }
            None => {
                peer.insiders.retain(|page| !revocation::is_quiet::<Hardware>(page.in_flight()));
                peer.insiders.push(page.clone());
            }
        }
        peer.connection = Some(Box::new(Connection {
            token,
            socket,
            signal,
            hello,
            initiated_here,
            process,
            page,
            consumer: Consumer::default(),
            remote: None,
            producer: Producer::default(),
            mappings: Vec::new(),
            outgoing: VecDeque::new(),
            pending: VecDeque::new(),
        }));
        self.active.push(slot);
        let attach = Frame {
            bytes: vec![FRAME_ATTACH],
            descriptors: vec![Arc::new(page_descriptor), self.shared.event.clone()],
        };
        self.enqueue(slot, attach);
        let visible: Vec<Frame> = self
            .regions
            .values()
            .filter(|registered| may_name(registered.access, slot))
            .map(|registered| region_frame(&registered.region))
            .collect();
        for frame in visible {
            self.enqueue(slot, frame);
        }
        self.shared.attention.store(true, Ordering::SeqCst);
    }

    /// Reads the peer's frames. May end the connection.
    fn service_socket(&mut self, slot: u16) {
        for _ in 0..FRAMES_PER_POLL {
            let Some(connection) = self.peers[usize::from(slot)].connection.as_mut() else { return };
            if let Err(reason) = connection.flush_outgoing() {
                return self.disconnect(slot, reason);
            }
            match connection.receive_frame() {
                Ok(Some(Arrival::Attached)) => {
                    let hello = connection.hello;
                    self.peer(slot).awaited = false;
                    self.report(FabricEvent::Connected { slot, hello });
                }
                Ok(Some(Arrival::Control(bytes))) => self.report(FabricEvent::Control { slot, bytes }),
                Ok(Some(Arrival::Region)) => {}
                Ok(None) => {
                    if connection.process_is_gone() {
                        self.disconnect(slot, DisconnectReason::PeerClosed);
                    }
                    return;
                }
                Err(reason) => return self.disconnect(slot, reason),
            }
        }
        // More may wait, and an edge is reported only once.
        if let Some(connection) = &self.peers[usize::from(slot)].connection {
            connection.signal.store(true, Ordering::SeqCst);
            self.shared.attention.store(true, Ordering::SeqCst);
            if self.armed {
                self.interrupt();
            }
        }
    }

    fn post(&mut self, slot: u16, operation: Operation<&Region>) -> Result<(), PostError> {
        if !operation.region.contains(operation.local_offset, u64::from(operation.length)) {
            return Err(PostError::LocalBounds);
        }
        let connection = self.peers.get_mut(usize::from(slot)).and_then(|peer| peer.connection.as_mut());
        let Some(connection) = connection.filter(|connection| connection.remote.is_some()) else {
            return Err(PostError::NotConnected(slot));
        };
        if connection.pending.is_empty() && connection.outgoing.is_empty() {
            match self.perform(slot, &operation) {
                Performed::Done => return Ok(()),
                Performed::Failed(_) => {
                    // The completion says so; the events follow from `poll`.
                    return Ok(());
                }
                Performed::Later => {}
            }
        }
        let Some(connection) = self.peers[usize::from(slot)].connection.as_mut() else {
            return Err(PostError::NotConnected(slot));
        };
        if connection.pending.len() >= PENDING_MAXIMUM {
            return Err(PostError::QueueFull);
        }
        let Operation { verb, region, local_offset, length, remote, work_id } = operation;
        connection.pending.push_back(Operation { verb, region: region.clone(), local_offset, length, remote, work_id });
        Ok(())
    }

    /// Performs one operation, reports it, and wakes the peer where the verb says so.
    fn perform(&mut self, slot: u16, operation: &Operation<&Region>) -> Performed {
        let Some(connection) = self.peers[usize::from(slot)].connection.as_mut() else {
            return Performed::Failed(DisconnectReason::PeerClosed);
        };
        let mut performed = connection.perform(operation);
        if matches!(performed, Performed::Failed(DisconnectReason::RemoteAccess)) {
            // The key may have been announced before the peer told us of it over a faster way.
            self.service_socket(slot);
            let Some(connection) = self.peers[usize::from(slot)].connection.as_mut() else {
                self.complete(slot, operation, Err(WorkError::Flushed));
                return Performed::Failed(DisconnectReason::PeerClosed);
            };
            performed = connection.perform(operation);
        }
        match performed {
            Performed::Done => {
                if matches!(operation.verb, Verb::Publish | Verb::WriteImmediate(_)) {
                    self.wake(slot);
                }
                self.complete(slot, operation, Ok(()));
            }
            Performed::Later => {}
            Performed::Failed(reason) => {
                let error = match reason {
                    DisconnectReason::RemoteAccess => WorkError::RemoteAccess,
                    _ => WorkError::Flushed,
                };
                self.complete(slot, operation, Err(error));
                self.disconnect(slot, reason);
            }
        }
        performed
    }

    fn complete(&mut self, slot: u16, operation: &Operation<&Region>, result: Result<(), WorkError>) {
        if !matches!(operation.verb, Verb::Publish) {
            self.report(FabricEvent::Completed { slot, work_id: operation.work_id, result });
        }
    }

    #[inline]
    fn wake(&mut self, slot: u16) {
        let connection = self.peers[usize::from(slot)].connection.as_ref();
        if let Some(remote) = connection.and_then(|connection| connection.remote.as_ref())
            && event_count::must_wake::<Hardware>(remote.page.sleeping())
        {
            socket::signal_event(remote.event.as_raw_fd());
            self.wakeups_written += 1;
        }
    }

    fn retry_pending(&mut self, slot: u16) {
        loop {
            let Some(connection) = self.peers[usize::from(slot)].connection.as_mut() else { return };
            if !connection.outgoing.is_empty() {
                return;
            }
            let Some(operation) = connection.pending.pop_front() else { return };
            let Operation { verb, ref region, local_offset, length, remote, work_id } = operation;
            let borrowed = Operation { verb, region, local_offset, length, remote, work_id };
            if let Performed::Later = self.perform(slot, &borrowed)
                && let Some(connection) = self.peers[usize::from(slot)].connection.as_mut()
            {
                connection.pending.push_front(operation);
                return;
            }
        }
    }

    /// Whether an operation that waited for room could go on. Asked after sleep was announced, or the wake-up for room
    /// freed in between would be lost.
    fn can_resume(&mut self) -> bool {
        let peers = &mut self.peers;
        self.active.iter().any(|slot| {
            let Some(connection) = peers[usize::from(*slot)].connection.as_mut() else { return false };
            let Some(remote) = connection.remote.as_ref() else { return false };
            let page = &remote.page;
            !connection.pending.is_empty()
                && connection.outgoing.is_empty()
                && connection.producer.has_room::<Hardware>(page.entries(), page.consumed(), page.stalled())
                    != Err(PushError::Full)
        })
    }

    fn has_pending(&self) -> bool {
        !self.events.is_empty()
            || self.shared.attention.load(Ordering::SeqCst)
            || self.active.iter().any(|slot| {
                let Some(connection) = self.peers[usize::from(*slot)].connection.as_ref() else { return false };
                connection.consumer.pending::<Hardware>(connection.page.entries())
            })
    }
}

fn may_name(access: Access, slot: u16) -> bool {
    match access {
        Access::Everyone => true,
        Access::Peer(peer) => peer == slot,
        Access::Local => false,
    }
}

fn region_frame(region: &Region) -> Frame {
    let mut bytes = vec![FRAME_REGION, u8::from(region.0.sealed)];
    bytes.extend_from_slice(&region.key().0.to_le_bytes());
    bytes.extend_from_slice(&(region.len() as u64).to_le_bytes());
    Frame { bytes, descriptors: region.0.descriptor.iter().cloned().collect() }
}

enum Arrival {
    Attached,
    Region,
    Control(Vec<u8>),
}

impl Connection {
    fn flush_outgoing(&mut self) -> Result<(), DisconnectReason> {
        while let Some(frame) = self.outgoing.front() {
            match socket::send(self.socket.as_fd(), &frame.bytes, &frame.descriptors) {
                Ok(()) => {
                    self.outgoing.pop_front();
                }
                Err(error) => match error.raw_os_error() {
                    // ETOOMANYREFS: descriptors in flight are limited, and are taken out by whoever reads.
                    Some(libc::EAGAIN | libc::EINTR | libc::ENOBUFS | libc::ETOOMANYREFS) => return Ok(()),
                    _ => return Err(DisconnectReason::PeerClosed),
                },
            }
        }
        Ok(())
    }

    fn process_is_gone(&self) -> bool {
        self.process
            .as_ref()
            .is_some_and(|process| socket::wait_readable(process.as_fd(), Instant::now()).unwrap_or(true))
    }

    fn receive_frame(&mut self) -> Result<Option<Arrival>, DisconnectReason> {
        let malformed = DisconnectReason::Protocol("malformed frame");
        let mut buffer = [0; FRAME_LENGTH_MAXIMUM];
        let (length, mut descriptors) = match socket::receive(self.socket.as_fd(), &mut buffer) {
            Ok((0, _)) => return Err(DisconnectReason::PeerClosed),
            Ok(received) => received,
            Err(error) => {
                return match error.kind() {
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(None),
                    io::ErrorKind::InvalidData => Err(malformed),
                    _ => Err(DisconnectReason::PeerClosed),
                };
            }
        };
        let bytes = &buffer[1..length];
        let attached = self.remote.is_some();
        match (buffer[0], attached, descriptors.len()) {
            (FRAME_ATTACH, false, 2) if bytes.is_empty() => {
                let event = descriptors.pop().expect("two descriptors");
                let page = descriptors.pop().expect("two descriptors");
                if !socket::is_event_descriptor(event.as_fd()) {
                    return Err(DisconnectReason::Protocol("its event descriptor is none"));
                }
                let page = Page::open(page.as_fd()).map_err(|_| DisconnectReason::Protocol("its page is none"))?;
                self.remote = Some(RemoteSide { page, event });
                Ok(Some(Arrival::Attached))
            }
            (FRAME_REGION, true, 1) if bytes.len() == 13 => {
                let sealed = bytes[0] != 0;
                let key = RemoteKey(u32::from_le_bytes(bytes[1..5].try_into().expect("four bytes")));
                let length = u64::from_le_bytes(bytes[5..13].try_into().expect("eight bytes"));
                let memory = descriptors.pop().expect("one descriptor");
                let known = self.mappings.iter().any(|(other, _)| *other == key);
                if known || self.mappings.len() >= PEER_REGIONS_MAXIMUM || sealed && !socket::is_sealed(memory.as_fd())
                {
                    return Err(DisconnectReason::Protocol("a region that cannot be"));
                }
                let mapping = usize::try_from(length)
                    .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))
                    .and_then(|length| Mapping::new(memory.as_fd(), length));
                match mapping {
                    Ok(mapping) => self.mappings.push((key, mapping)),
                    Err(error) => {
                        tracing::warn!(slot = self.hello.slot, %error, "cannot map a peer's region");
                        return Err(DisconnectReason::Protocol("a region that cannot be mapped"));
                    }
                }
                Ok(Some(Arrival::Region))
            }
            (FRAME_FORGET, true, 0) if bytes.len() == 4 => {
                let key = RemoteKey(u32::from_le_bytes(bytes.try_into().expect("four bytes")));
                self.mappings.retain(|(other, _)| *other != key);
                Ok(Some(Arrival::Region))
            }
            (FRAME_CONTROL, true, 0) if bytes.len() <= CONTROL_LENGTH_MAXIMUM => {
                Ok(Some(Arrival::Control(bytes.to_vec())))
            }
            _ => Err(malformed),
        }
    }

    /// Performs one operation on the peer's memory.
    fn perform(&mut self, operation: &Operation<&Region>) -> Performed {
        let Some(remote) = &self.remote else { return Performed::Failed(DisconnectReason::PeerClosed) };
        let Operation { verb, region, local_offset, length, remote: Remote { key, offset }, .. } = *operation;
        let Some((_, mapping)) = self.mappings.iter().find(|(other, _)| *other == key) else {
            return Performed::Failed(DisconnectReason::RemoteAccess);
        };
        let atomic = matches!(verb, Verb::CompareSwap { .. } | Verb::FetchAdd { .. } | Verb::Publish);
        if !mapping.contains(offset, u64::from(length)) || atomic && !offset.is_multiple_of(8) {
            return Performed::Failed(DisconnectReason::RemoteAccess);
        }
        if let Verb::WriteImmediate(_) = verb {
            // Room first: once its bytes are in place the announcement may not fail.
            match self.producer.has_room::<Hardware>(
                remote.page.entries(),
                remote.page.consumed(),
                remote.page.stalled(),
            ) {
                Ok(()) => {}
                Err(PushError::Full) => return Performed::Later,
                Err(PushError::Corrupt) => {
                    return Performed::Failed(DisconnectReason::Protocol("its consumed counter is impossible"));
                }
            }
        }
        // Another process is fenced by its death, which needs no fence instruction here: it looks at the word only so as
        // to fail early. Within one process the word is all there is.
        let admitted = match self.process {
            Some(_) => remote.page.revoked().load(Ordering::Acquire) == 0,
            None => revocation::enter::<Hardware>(remote.page.revoked(), remote.page.in_flight()),
        };
        if !admitted {
            return Performed::Failed(DisconnectReason::Revoked);
        }
        let (at, length) = (offset as usize, length as usize);
        // SAFETY: `post` checked the local range, and the lines above the remote one, against live mappings. Others may
        // write to either concurrently; that is what one-sided access means, and no reference to the bytes exists.
        unsafe {
            let local = region.as_ptr().add(local_offset as usize);
            let target = mapping.as_ptr().add(at);
            match verb {
                Verb::Write | Verb::WriteImmediate(_) => {
                    // Order on the connection: earlier operations are visible before this one.
                    fence(Ordering::Release);
                    if length == 8 && offset.is_multiple_of(8) {
                        mapping.word(at).store(local.cast::<u64>().read_unaligned(), Ordering::Release);
                    } else {
                        std::ptr::copy(local, target, length);
                    }
                }
                Verb::Publish => {
                    std::ptr::copy_nonoverlapping(local.add(8), target.add(8), length - 8);
                    publication::publish(mapping.word(at), local.cast::<u64>().read_unaligned());
                }
                Verb::Read => {
                    if length == 8 && offset.is_multiple_of(8) {
                        local.cast::<u64>().write_unaligned(mapping.word(at).load(Ordering::Acquire));
                    } else {
                        std::ptr::copy(target, local, length);
                    }
                    fence(Ordering::Acquire);
                }
                Verb::CompareSwap { expected, new } => {
                    let old = mapping.word(at).compare_exchange(expected, new, Ordering::SeqCst, Ordering::SeqCst);
                    local.cast::<u64>().write_unaligned(old.unwrap_or_else(|old| old));
                }
                Verb::FetchAdd { addend } => {
                    local.cast::<u64>().write_unaligned(mapping.word(at).fetch_add(addend, Ordering::SeqCst));
                }
            }
        }
        let mut performed = Performed::Done;
        if let Verb::WriteImmediate(immediate) = verb {
            let pushed = self.producer.push::<Hardware>(
                remote.page.entries(),
                remote.page.consumed(),
                remote.page.stalled(),
                immediate,
                length as u32,
            );
            if pushed.is_err() {
                performed = Performed::Failed(DisconnectReason::Protocol("its consumed counter is impossible"));
            }
        }
        if self.process.is_none() {
            revocation::leave::<Hardware>(remote.page.in_flight());
        }
        performed
    }
}

impl Fabric for ShmFabric {
    fn register_memory(&mut self, length: usize, access: Access) -> io::Result<Region> {
        if length == 0 {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        self.register(socket::sealed_memory(length)?, length, access, true)
    }

    fn register_file(&mut self, file: &File, length: usize, access: Access) -> io::Result<Region> {
        self.register(file.as_fd().try_clone_to_owned()?, length, access, false)
    }

    fn deregister(&mut self, region: &Region) {
        let Some(registered) = self.regions.remove(&region.key()) else { return };
        let mut bytes = vec![FRAME_FORGET];
        bytes.extend_from_slice(&region.key().0.to_le_bytes());
        for slot in self.active.clone() {
            if may_name(registered.access, slot) {
                self.enqueue(slot, Frame { bytes: bytes.clone(), descriptors: Vec::new() });
            }
        }
    }

    fn listen(&mut self) -> io::Result<()> {
        let mut listener = self.listener.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if listener.is_some() {
            return Ok(());
        }
        let socket = socket::listen(&self.socket_path)?;
        let descriptor = listener.insert(socket);
        self.shared.add_listener(descriptor.as_fd())
    }

    fn connect(&mut self, slot: u16) -> Result<bool, ConnectError> {
        if slot == self.shared.hello.slot || slot >= SLOTS_MAXIMUM {
            return Err(ConnectError::InvalidSlot(slot));
        }
        let peer = self.peer(slot);
        if let Some(connection) = &peer.connection
            && !socket::has_hung_up(connection.socket.as_fd())
        {
            peer.awaited = connection.remote.is_none();
            return Ok(peer.awaited);
        }
        peer.awaited = true;
        if !std::mem::replace(&mut peer.connecting, true) {
            self.shared.connect(slot);
        }
        Ok(true)
    }

    fn disconnect(&mut self, slot: u16, reason: DisconnectReason) {
        let Some(peer) = self.peers.get_mut(usize::from(slot)) else { return };
        let Some(mut connection) = peer.connection.take() else { return };
        self.active.retain(|other| *other != slot);
        revocation::revoke::<Hardware>(connection.page.revoked());
        self.shared.unwatch_connection(
            connection.token,
            connection.socket.as_fd(),
            connection.process.as_ref().map(|descriptor| descriptor.as_fd()),
        );
        for operation in connection.pending.drain(..) {
            if !matches!(operation.verb, Verb::Publish) {
                let result = Err(WorkError::Flushed);
                self.report(FabricEvent::Completed { slot, work_id: operation.work_id, result });
            }
        }
        if !matches!(reason, DisconnectReason::Local | DisconnectReason::PeerClosed | DisconnectReason::Replaced) {
            tracing::warn!(slot, %reason, "connection ended");
        }
        if connection.remote.is_some() {
            self.report(FabricEvent::Disconnected { slot, reason });
        }
        let peer = self.peer(slot);
        if reason == DisconnectReason::Replaced {
            // Whoever had an interest in this connection has it in the next.
            peer.awaited = true;
        } else if peer.awaited && !peer.connecting {
            self.fail(slot, ConnectError::Broken);
        }
    }

    fn latest(&self, slot: u16) -> Option<Incarnation> {
        self.peers.get(usize::from(slot)).and_then(|peer| peer.last)
    }

    fn fence(&mut self, slot: u16) -> Result<(), FenceError> {
        let deadline = Instant::now() + self.fence_timeout;
        // First the door: a peer that finds itself cut off may knock before we are done here.
        if let Some(last) = self.peer(slot).last {
            self.refuse(slot, last.node);
        }
        self.disconnect(slot, DisconnectReason::Fenced);
        for page in &self.peer(slot).insiders {
            revocation::revoke::<Hardware>(page.revoked());
        }
        for process in &self.peer(slot).processes {
            match socket::kill_process(process.descriptor.as_fd()) {
                Ok(()) => {}
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
                Err(source) => return Err(FenceError::Signal { pid: process.pid, source }),
            }
        }
        // Every process is signalled before any is waited for; each is forgotten only once it is gone.
        while let Some(process) = self.peer(slot).processes.last() {
            match socket::wait_readable(process.descriptor.as_fd(), deadline) {
                Ok(true) => {}
                Ok(false) => return Err(FenceError::StillRunning { pid: process.pid }),
                Err(source) => return Err(FenceError::Signal { pid: process.pid, source }),
            }
            self.peer(slot).processes.pop();
        }
        while let Some(page) = self.peer(slot).insiders.last() {
            if revocation::is_quiet::<Hardware>(page.in_flight()) {
                self.peer(slot).insiders.pop();
            } else if Instant::now() > deadline {
                return Err(FenceError::StillInside);
            } else {
                std::thread::sleep(Duration::from_micros(50));
            }
        }
        Ok(())
    }

    fn admit_only(&mut self, slots: &[u16]) {
        self.shared.admissions.admit_only(slots);
    }

    fn refuse(&mut self, slot: u16, node_incarnation: u32) {
        self.shared.admissions.refuse(slot, node_incarnation);
    }

    fn write(&mut self, slot: u16, source: Local<'_>, remote: Remote, work_id: u64) -> Result<(), PostError> {
        let Local { region, offset: local_offset, length } = source;
        self.post(slot, Operation { verb: Verb::Write, region, local_offset, length, remote, work_id })
    }

    fn write_with_immediate(
        &mut self,
        slot: u16,
        source: Local<'_>,
        remote: Remote,
        immediate: u32,
        work_id: u64,
    ) -> Result<(), PostError> {
        let Local { region, offset: local_offset, length } = source;
        let verb = Verb::WriteImmediate(immediate);
        self.post(slot, Operation { verb, region, local_offset, length, remote, work_id })
    }

    fn read(&mut self, slot: u16, target: Local<'_>, remote: Remote, work_id: u64) -> Result<(), PostError> {
        let Local { region, offset: local_offset, length } = target;
        self.post(slot, Operation { verb: Verb::Read, region, local_offset, length, remote, work_id })
    }

    fn compare_swap(
        &mut self,
        slot: u16,
        result: Local<'_>,
        remote: Remote,
        expected: u64,
        new: u64,
        work_id: u64,
    ) -> Result<(), PostError> {
        let Local { region, offset: local_offset, length } = result;
        if length != 8 || !local_offset.is_multiple_of(8) {
            return Err(PostError::Misaligned);
        }
        let verb = Verb::CompareSwap { expected, new };
        self.post(slot, Operation { verb, region, local_offset, length, remote, work_id })
    }

    fn fetch_add(
        &mut self,
        slot: u16,
        result: Local<'_>,
        remote: Remote,
        addend: u64,
        work_id: u64,
    ) -> Result<(), PostError> {
        let Local { region, offset: local_offset, length } = result;
        if length != 8 || !local_offset.is_multiple_of(8) {
            return Err(PostError::Misaligned);
        }
        let verb = Verb::FetchAdd { addend };
        self.post(slot, Operation { verb, region, local_offset, length, remote, work_id })
    }

    #[inline]
    fn publish(&mut self, slot: u16, source: Local<'_>, remote: Remote, _immediate: u32) -> Result<(), PostError> {
        let Local { region, offset: local_offset, length } = source;
        if length < 8 {
            return Err(PostError::LocalBounds);
        }
        self.post(slot, Operation { verb: Verb::Publish, region, local_offset, length, remote, work_id: 0 })
    }

    fn publication(&self) -> Publication {
        Publication::Memory
    }

    fn send_control(&mut self, slot: u16, bytes: &[u8]) -> Result<(), PostError> {
        assert!(bytes.len() <= CONTROL_LENGTH_MAXIMUM, "set-up message too long");
        if self.peers.get(usize::from(slot)).is_none_or(|peer| peer.connection.is_none()) {
            return Err(PostError::NotConnected(slot));
        }
        let bytes = [&[FRAME_CONTROL], bytes].concat();
        self.enqueue(slot, Frame { bytes, descriptors: Vec::new() });
        Ok(())
    }

    fn poll(&mut self, events: &mut Vec<FabricEvent>) {
        if self.armed {
            self.disarm();
            socket::drain_event(self.shared.event.as_raw_fd());
        }
        if self.shared.attention.load(Ordering::Relaxed) && self.shared.attention.swap(false, Ordering::SeqCst) {
            while let Some(outcome) = self.shared.next_outcome() {
                match outcome {
                    Outcome::Established(established) => self.attach(established),
                    Outcome::Failed { slot, reason } => {
                        self.peer(slot).connecting = false;
                        // A connection the peer made may still be what was asked for.
                        if self.peer(slot).connection.is_none() {
                            self.fail(slot, reason);
                        }
                    }
                }
            }
            for slot in self.active.clone() {
                if let Some(connection) = self.peers[usize::from(slot)].connection.as_ref()
                    && connection.signal.swap(false, Ordering::SeqCst)
                {
                    self.service_socket(slot);
                }
            }
        }
        let mut index = 0;
        while let Some(slot) = self.active.get(index).copied() {
            index += 1;
            let Some(connection) = self.peers[usize::from(slot)].connection.as_mut() else { continue };
            let mut popped = false;
            while let Some((immediate, length)) =
                connection.consumer.pop::<Hardware>(connection.page.entries(), connection.page.consumed())
            {
                popped = true;
                self.events.push_back(FabricEvent::Received { slot, immediate, length });
            }
            if popped && connection.consumer.must_wake_producer::<Hardware>(connection.page.stalled()) {
                self.wake(slot);
            }
            if let Some(connection) = self.peers[usize::from(slot)].connection.as_ref()
                && !connection.pending.is_empty()
            {
                self.retry_pending(slot);
            }
        }
        events.extend(self.events.drain(..));
    }

    fn event_fd(&self) -> RawFd {
        self.shared.event.as_raw_fd()
    }

    fn arm(&mut self) -> bool {
        self.armed = true;
        for slot in &self.active {
            if let Some(connection) = self.peers[usize::from(*slot)].connection.as_ref() {
                event_count::announce::<Hardware>(connection.page.sleeping());
            }
        }
        if self.has_pending() || self.can_resume() {
            self.disarm();
            return false;
        }
        true
    }

    fn interrupt(&self) {
        socket::signal_event(self.shared.event.as_raw_fd());
    }

    fn disarm(&mut self) {
        self.armed = false;
        for slot in &self.active {
            if let Some(connection) = self.peers[usize::from(*slot)].connection.as_ref() {
                event_count::withdraw::<Hardware>(connection.page.sleeping());
            }
        }
    }

    fn is_quiet(&mut self) -> bool {
        self.armed && !self.has_pending() && !self.can_resume()
    }

    fn wakeups_written(&self) -> u64 {
        self.wakeups_written
    }
}

impl Drop for ShmFabric {
    fn drop(&mut self) {
        for slot in self.active.clone() {
            self.disconnect(slot, DisconnectReason::Local);
        }
        if self.listener.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take().is_some() {
            // Ours while we listened; whoever comes next replaces a stale one anyway.
            let _ = std::fs::remove_file(&self.socket_path);
        }
        self.shared.stop();
        if let Some(background) = self.background.take() {
            let _ = background.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::fd::FromRawFd;

    fn fabric(directory: &std::path::Path, slot: u16, handshake_timeout: Duration) -> ShmFabric {
        ShmFabric::new(ShmConfig {
            slot,
            incarnation: Incarnation { node: 1, daemon: 1 },
            cluster: "unit".into(),
            key: [3; 32],
            directory: directory.into(),
            handshake_timeout,
            fence_timeout: Duration::from_secs(10),
        })
        .unwrap()
    }

    fn wait_for<T>(fabrics: &mut [&mut ShmFabric], mut wanted: impl FnMut(usize, &FabricEvent) -> Option<T>) -> T {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            for (index, fabric) in fabrics.iter_mut().enumerate() {
                let mut events = Vec::new();
                fabric.poll(&mut events);
                if let Some(found) = events.iter().find_map(|event| wanted(index, event)) {
                    return found;
                }
            }
            assert!(Instant::now() < deadline, "nothing came");
            std::thread::yield_now();
        }
    }

    /// Two ends of a socket; the first stands in a connection as if its handshake were done.
    fn raw_connection() -> (Connection, OwnedFd) {
        let mut ends = [0; 2];
        // SAFETY: room for two descriptors.
        let made =
            unsafe { libc::socketpair(libc::AF_UNIX, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC, 0, ends.as_mut_ptr()) };
        assert_eq!(made, 0);
        // SAFETY: both descriptors are new and ours.
        let (near, far) = unsafe { (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])) };
        let hello = Hello::new("unit", 1, Incarnation { node: 1, daemon: 1 });
        let connection = Connection {
            token: 0,
            socket: near,
            signal: Arc::default(),
            hello,
            initiated_here: true,
            process: None,
            page: Arc::new(Page::create().unwrap().0),
            consumer: Consumer::default(),
            remote: None,
            producer: Producer::default(),
            mappings: Vec::new(),
            outgoing: VecDeque::new(),
            pending: VecDeque::new(),
        };
        (connection, far)
    }

    fn attach(connection: &mut Connection, far: &OwnedFd) {
        let (_, page) = Page::create().unwrap();
        let event = socket::event_descriptor().unwrap();
        socket::send(far.as_fd(), &[FRAME_ATTACH], &[Arc::new(page), Arc::new(event)]).unwrap();
        assert!(matches!(connection.receive_frame(), Ok(Some(Arrival::Attached))));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]
        #[test]
        fn any_frame_is_taken_or_refused(
            attached: bool,
            tag in 0u8..6,
            body in proptest::collection::vec(any::<u8>(), 0..600),
            descriptors in 0..3usize,
            sealed: bool,
        ) {
            let (mut connection, far) = raw_connection();
            if attached {
                attach(&mut connection, &far);
            }
            let descriptors: Vec<Arc<OwnedFd>> = (0..descriptors)
                .map(|_| if sealed { socket::sealed_memory(4096) } else { socket::event_descriptor() })
                .map(|made| Arc::new(made.unwrap()))
                .collect();
            let bytes = [&[tag], body.as_slice()].concat();
            socket::send(far.as_fd(), &bytes, &descriptors).unwrap();
            match connection.receive_frame() {
                Ok(Some(Arrival::Region)) => {
                    prop_assert!(tag == FRAME_FORGET || tag == FRAME_REGION && connection.mappings.len() == 1);
                }
                Ok(Some(Arrival::Control(control))) => prop_assert!(attached && tag == FRAME_CONTROL && control == body),
                Ok(Some(Arrival::Attached)) => prop_assert!(false, "no attach frame was sent that is right"),
                Ok(None) => prop_assert!(false, "a frame went missing"),
                Err(reason) => prop_assert!(matches!(reason, DisconnectReason::Protocol(_))),
            }
        }
    }

    #[test]
    fn regions_shorter_than_they_say_are_refused() {
        let announce = |length: u64, sealed: u8| {
            let mut bytes = vec![FRAME_REGION, sealed, 1, 0, 0, 0];
            bytes.extend_from_slice(&length.to_le_bytes());
            bytes
        };
        let plain = |length: u64| {
            let file = tempfile::tempfile().unwrap();
            file.set_len(length).unwrap();
            OwnedFd::from(file)
        };
        for (length, sealed, memory, fine) in [
            (4096, 1, socket::sealed_memory(4096).unwrap(), true),
            (4097, 1, socket::sealed_memory(4096).unwrap(), false),
            (u64::MAX, 1, socket::sealed_memory(4096).unwrap(), false),
            (0, 1, socket::sealed_memory(4096).unwrap(), false),
            (4096, 1, plain(4096), false),
            (4096, 0, plain(4096), true),
            (4096, 0, plain(4095), false),
            (4096, 0, socket::event_descriptor().unwrap(), false),
        ] {
            let (mut connection, far) = raw_connection();
            attach(&mut connection, &far);
            socket::send(far.as_fd(), &announce(length, sealed), &[Arc::new(memory)]).unwrap();
            let taken = matches!(connection.receive_frame(), Ok(Some(Arrival::Region)));
            assert_eq!(taken, fine, "length {length}, sealed {sealed}");
        }
    }

    #[test]
    fn an_impossible_counter_ends_the_connection() {
        let directory = tempfile::tempdir().unwrap();
        let mut a = fabric(directory.path(), 1, Duration::from_secs(10));
        let mut b = fabric(directory.path(), 2, Duration::from_secs(10));
        b.listen().unwrap();
        a.connect(2).unwrap();
        let mut up = 0;
        wait_for(&mut [&mut a, &mut b], |_, event| {
            up += usize::from(matches!(event, FabricEvent::Connected { .. }));
            (up == 2).then_some(())
        });
        let target = b.register_memory(4096, Access::Everyone).unwrap();
        let local = a.register_memory(4096, Access::Local).unwrap();
        b.peers[1].connection.as_ref().unwrap().page.consumed().store(u64::MAX, Ordering::SeqCst);
        for work_id in 0..=page::IMMEDIATES as u64 {
            let source = Local { region: &local, offset: 0, length: 8 };
            let remote = Remote { key: target.key(), offset: 0 };
            if a.write_with_immediate(2, source, remote, 1, work_id).is_err() {
                break;
            }
        }
        let reason = wait_for(&mut [&mut a], |_, event| match event {
            FabricEvent::Disconnected { reason, .. } => Some(*reason),
            _ => None,
        });
        assert!(matches!(reason, DisconnectReason::Protocol(_)));
    }

    #[test]
    fn garbage_on_the_socket_harms_nobody() {
        let directory = tempfile::tempdir().unwrap();
        let mut a = fabric(directory.path(), 1, Duration::from_secs(10));
        a.listen().unwrap();
        let path = directory.path().join("1.sock");
        let mut runner = proptest::test_runner::TestRunner::deterministic();
        let mut silent = Vec::new();
        for round in 0..200 {
            let stranger = match socket::connect(&path) {
                Ok(stranger) => stranger,
                Err(error) => {
                    assert_eq!(error.raw_os_error(), Some(libc::EAGAIN));
                    continue;
                }
            };
            let tree = proptest::collection::vec(any::<u8>(), 1..200).new_tree(&mut runner).unwrap();
            let mut bytes = proptest::strategy::ValueTree::current(&tree);
            if round % 2 == 0 {
                // Right on the outside: it gets further in.
                let mut hello = Hello::new("unit", 2, Incarnation { node: 1, daemon: 1 }).encode().to_vec();
                hello.insert(0, 1);
                bytes.resize(32, 7);
                hello.extend_from_slice(&bytes);
                let _ = socket::send(stranger.as_fd(), &hello, &[]);
            }
            let memory = socket::sealed_memory(4096).unwrap();
            let _ = socket::send(stranger.as_fd(), &bytes, &[Arc::new(memory)]);
            if round % 20 == 0 {
                // Says no more and does not go.
                silent.push(stranger);
            }
        }
        let mut b = fabric(directory.path(), 2, Duration::from_secs(10));
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            b.connect(1).unwrap();
            let connected = wait_for(&mut [&mut b, &mut a], |index, event| match event {
                FabricEvent::Connected { .. } if index == 0 => Some(true),
                FabricEvent::ConnectFailed { .. } => Some(false),
                _ => None,
            });
            if connected {
                break;
            }
            // Busy with strangers, who are let go of in time.
            assert!(Instant::now() < deadline);
        }
        assert_eq!(a.active, [2]);
    }

    #[test]
    fn a_silent_peer_blocks_for_a_bounded_time() {
        let directory = tempfile::tempdir().unwrap();
        let listener = socket::listen(&directory.path().join("2.sock")).unwrap();
        let mut a = fabric(directory.path(), 1, Duration::from_millis(100));
        a.connect(2).unwrap();
        let reason = wait_for(&mut [&mut a], |_, event| match event {
            FabricEvent::ConnectFailed { reason, .. } => Some(reason.clone()),
            _ => None,
        });
        assert_eq!(reason, ConnectError::TimedOut);
        drop(listener);
        // A silent caller is hung up on.
        a.listen().unwrap();
        let caller = socket::connect(&directory.path().join("1.sock")).unwrap();
        let deadline = Instant::now() + Duration::from_secs(30);
        assert!(socket::wait_readable(caller.as_fd(), deadline).unwrap());
        assert!(socket::has_hung_up(caller.as_fd()));
    }

    #[test]
    fn one_slot_has_one_listener() {
        let directory = tempfile::tempdir().unwrap();
        let mut first = fabric(directory.path(), 1, Duration::from_secs(10));
        first.listen().unwrap();
        let mut second = fabric(directory.path(), 1, Duration::from_secs(10));
        assert_eq!(second.listen().unwrap_err().kind(), io::ErrorKind::AddrInUse);
        drop(first);
        second.listen().unwrap();
        // What a killed daemon leaves behind is no obstacle.
        drop(second);
        let path = directory.path().join("1.sock");
        let abandoned = socket::listen(&path).unwrap();
        drop(abandoned);
        assert!(path.exists());
        fabric(directory.path(), 1, Duration::from_secs(10)).listen().unwrap();
    }
}
