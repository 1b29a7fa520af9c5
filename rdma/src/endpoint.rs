//! A node's end of everything: fabric and mailbox as the daemon uses them.
//!
//! One thread polls; others may call under a mutex the consumer provides. No call blocks but [`Endpoint::fence`].
//! To sleep: [`Endpoint::arm`]; if it says true, wait until [`Endpoint::event_fd`] is readable; then poll.
//!
//! # Sessions
//! A session starts with the first connection to a peer and joins this life of our daemon with that life of the peer's. It
//! outlives connections: messages are neither lost nor doubled nor reordered within their lane, whatever happens to
//! connections. It ends, with [`Event::SessionLost`], when the peer comes back in a later incarnation (of the node, or of
//! the daemon alone: sequence numbers live in its memory), when it is fenced or refused, or when it refuses us as such.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::time::Duration;

use crate::RESERVED_WORK_IDS;
use crate::fabric::{
    Access, DisconnectReason, Fabric, FabricEvent, FenceError, Local, PostError, Publication, Region, Remote,
    RemoteKey, WorkError,
};
use crate::handshake::{ConnectError, Hello, Incarnation, Refusal, SLOTS_MAXIMUM};
use crate::mailbox::lane::{CREDIT_RETURN_UNITS, Fetch, STAGING_LENGTH};
use crate::mailbox::record::{INLINE_MAXIMUM, Kind, PAYLOAD_MAXIMUM};
use crate::mailbox::{IMMEDIATE_CREDIT, INBOX_LENGTH, LANES, Lane, Link, Session, SetUp};
use crate::shm::{ShmConfig, ShmFabric};

/// Messages taken from one lane before the others get their turn: a quarter of a ring of the smallest.
const MESSAGES_PER_LANE_AND_POLL: usize = 64;

/// Bounds that a deployment may move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Messages queued per lane and peer beyond what its ring holds. Requests are bounded by the callers' number, which this must exceed.
    pub queued_messages: usize,
    /// Bytes of those messages. At least one payload of the largest size.
    pub queued_bytes: usize,
    /// How long a peer may take over its handshake.
    pub handshake_timeout: Duration,
    /// How long `fence` waits for a killed peer to be gone.
    pub fence_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            queued_messages: 16 * 1024,
            queued_bytes: 64 * 1024 * 1024,
            handshake_timeout: Duration::from_secs(5),
            fence_timeout: Duration::from_secs(10),
        }
    }
}

/// Who we are and where our peers are.
#[derive(Clone, Debug)]
pub struct EndpointConfig {
    /// Our slot, below [`SLOTS_MAXIMUM`].
    pub slot: u16,
    /// Grows each time the node joins anew.
    pub node_incarnation: u32,
    /// Grows each time the daemon starts within one life of the node.
    pub daemon_incarnation: u32,
    /// The cluster's name, of any length.
    pub cluster: String,
    /// What all members know and nobody else.
    pub key: [u8; 32],
    /// Where the sockets lie; its path leaves room for `/<slot>.sock` in 107 bytes.
    pub directory: PathBuf,
    pub limits: Limits,
}

/// Why a session ended.
#[derive(thiserror::Error, Debug, PartialEq, Eq, Clone, Copy)]
pub enum SessionLoss {
    #[error("the peer came back in a later incarnation")]
    Incarnation,
    #[error("the peer was fenced or refused by us")]
    Fenced,
    #[error("the peer refuses us: {0}")]
    RefusedByPeer(Refusal),
}

/// What [`Endpoint::poll`] reports.
#[derive(Debug)]
pub enum Event {
    /// A message. In order within its lane.
    Message { slot: u16, lane: Lane, payload: Vec<u8> },
    /// A one-sided operation is over. In posting order per peer.
    Completed { slot: u16, work_id: u64, result: Result<(), WorkError> },
    /// A connection is ready, whoever made it. The session with the peer began, or goes on.
    Connected { slot: u16, hello: Hello },
    /// What a `connect` came to. A connection made by the peer may follow all the same.
    ConnectFailed { slot: u16, reason: ConnectError },
    /// The connection is gone; the session waits for another.
    Disconnected { slot: u16, reason: DisconnectReason },
    /// The session is over: what was queued or not acknowledged is dropped.
    SessionLost { slot: u16, incarnation: Incarnation, loss: SessionLoss },
}

/// Why a message was not taken. Nothing was queued.
#[derive(thiserror::Error, Debug, PartialEq, Eq, Clone, Copy)]
pub enum SendError {
    #[error("there is no session with slot {0}")]
    NoSession(u16),
    #[error("too much is queued for that peer and lane")]
    QueueFull,
    #[error("longer than {PAYLOAD_MAXIMUM} bytes")]
    TooLong,
}

/// Counters since the endpoint was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Messages taken by `send`, per lane.
    pub messages_sent: [u64; LANES],
    /// Messages delivered, per lane.
    pub messages_received: [u64; LANES],
    /// Bytes of one-sided reads posted by the consumer.
    pub bytes_read: u64,
    /// Bytes of one-sided writes posted by the consumer.
    pub bytes_written: u64,
    /// Times a sleeping peer was woken.
    pub wakeups_written: u64,
    /// Messages that had to be queued for want of credit or connection.
    pub credit_stalls: u64,
    /// Credits returned by a write of their own.
    pub credits_written: u64,
    /// Records sent again after a reconnect.
    pub records_resent: u64,
    /// Payloads fetched from a staging area.
    pub payloads_fetched: u64,
    /// Connections dropped because the peer broke the protocol.
    pub protocol_violations: u64,
    pub connections: u64,
    pub sessions_lost: u64,
}

/// How far a `connect` has come. An earlier connection's end concerns only an attempt that has a connection.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Attempt {
    /// The fabric has yet to say what came of it.
    Connecting,
    /// The mailboxes are being set up.
    SettingUp,
}

// Callers share an endpoint between threads under a mutex.
const _: () = {
    const fn is_send<T: Send>() {}
    is_send::<Endpoint>();
    is_send::<Region>();
};

/// See the module.
pub struct Endpoint {
    fabric: Box<dyn Fabric>,
    hello_slot: u16,
    limits: Limits,
    sessions: Vec<Option<Box<Session>>>,
    /// Slots with a link.
    linked: Vec<u16>,
    /// Slots for which a `connect` has had no outcome yet.
    attempts: BTreeMap<u16, Attempt>,
    generation: u32,
    fabric_events: Vec<FabricEvent>,
    /// Found outside `poll`, reported by the next one.
    waiting: Vec<Event>,
    statistics: Statistics,
}

impl Endpoint {
    /// An endpoint on the `shm` provider. Nobody can reach it before `listen`.
    ///
    /// # Errors
    /// `InvalidInput` for a slot out of range; otherwise what the system says about threads and descriptors.
    pub fn new(config: EndpointConfig) -> io::Result<Endpoint> {
        let fabric = ShmFabric::new(ShmConfig {
            slot: config.slot,
            incarnation: Incarnation { node: config.node_incarnation, daemon: config.daemon_incarnation },
            cluster: config.cluster.clone(),
            key: config.key,
            directory: config.directory.clone(),
            handshake_timeout: config.limits.handshake_timeout,
            fence_timeout: config.limits.fence_timeout,
        })?;
        Ok(Self::with_fabric(config.slot, config.limits, Box::new(fabric)))
    }

    /// An endpoint on any provider.
    pub fn with_fabric(slot: u16, limits: Limits, fabric: Box<dyn Fabric>) -> Endpoint {
        Endpoint {
            fabric,
            hello_slot: slot,
            limits,
            sessions: Vec::new(),
            linked: Vec::new(),
            attempts: BTreeMap::new(),
            generation: 0,
            fabric_events: Vec::new(),
            waiting: Vec::new(),
            statistics: Statistics::default(),
        }
    }

    /// Our own slot.
    pub fn slot(&self) -> u16 {
        self.hello_slot
    }

    /// Accepts connections from now on; finished ones come out of `poll`.
    ///
    /// # Errors
    /// What binding the address says; `AddrInUse` when another daemon listens there.
    pub fn listen(&mut self) -> io::Result<()> {
        self.fabric.listen()
    }

    /// Starts to connect to `slot`. `Connected` or `ConnectFailed` follows; neither when it is connected already.
    /// A peer that has proved the key and then stands still delays the outcome: [`Endpoint::disconnect`] gives it up.
    ///
    /// # Errors
    /// [`ConnectError::InvalidSlot`] for our own slot or one out of range.
    pub fn connect(&mut self, slot: u16) -> Result<(), ConnectError> {
        if self.fabric.connect(slot)? {
            self.attempts.insert(slot, Attempt::Connecting);
        } else if !self.is_connected(slot) {
            self.attempts.insert(slot, Attempt::SettingUp);
        }
        Ok(())
    }

    /// Whether messages and one-sided operations reach `slot` right now.
    pub fn is_connected(&self, slot: u16) -> bool {
        self.session(slot).and_then(|session| session.link.as_ref()).is_some_and(|link| link.peer.is_some())
    }

    /// The peer's hello of the present session.
    pub fn peer(&self, slot: u16) -> Option<Hello> {
        self.session(slot).map(|session| session.hello)
    }

    /// Whether an incarnation of a slot later than that of its session has been here: its session is about to begin, and
    /// [`Endpoint::fence`] would hit it too.
    pub fn has_successor(&self, slot: u16) -> bool {
        let session = self.session(slot).map(|session| session.hello.incarnation);
        session.is_some_and(|session| self.fabric.latest(slot).is_some_and(|latest| latest > session))
    }

    /// Anonymous zeroed memory of `length` bytes that every peer may name.
    ///
    /// # Errors
    /// When the system has no memory or descriptors to give, or `length` is 0.
    pub fn register_memory(&mut self, length: usize) -> io::Result<Region> {
        self.fabric.register_memory(length, Access::Everyone)
    }

    /// As `register_memory`, but only our own operations may use it: the place to read into and write from.
    ///
    /// # Errors
    /// As `register_memory`.
    pub fn register_local_memory(&mut self, length: usize) -> io::Result<Region> {
        self.fabric.register_memory(length, Access::Local)
    }

    /// The first `length` bytes of a file, mapped shared, that every peer may name. It must not be truncated meanwhile.
    ///
    /// # Errors
    /// `InvalidInput` when the file is shorter or `length` is 0; what mapping it says otherwise.
    pub fn register_file(&mut self, file: &File, length: usize) -> io::Result<Region> {
        self.fabric.register_file(file, length, Access::Everyone)
    }

    /// Withdraws a region. Operations under way may still end in it.
    pub fn deregister(&mut self, region: &Region) {
        self.fabric.deregister(region);
    }

    /// Sends a message of up to [`PAYLOAD_MAXIMUM`] bytes. Never blocks: without credit or connection it is queued.
    ///
    /// # Errors
    /// [`SendError`]; then nothing was queued.
    pub fn send(&mut self, slot: u16, lane: Lane, payload: &[u8]) -> Result<(), SendError> {
        if payload.len() > PAYLOAD_MAXIMUM {
            return Err(SendError::TooLong);
        }
        let session = self.sessions.get_mut(usize::from(slot)).and_then(Option::as_mut);
        let session = session.ok_or(SendError::NoSession(slot))?;
        let index = lane as usize;
        let number = lane as u8;
        let mut placed = session.outbound[index].backlog.is_empty() && session.place(number, payload);
        if !placed {
            if let Err(reason) = session.refresh_credit(number) {
                self.drop_connection(slot, reason);
                return self.send(slot, lane, payload);
            }
            session.drain_backlog(number);
            placed = session.outbound[index].backlog.is_empty() && session.place(number, payload);
        }
        if !placed {
            let outbound = &mut session.outbound[index];
            if outbound.backlog.len() >= self.limits.queued_messages
                || outbound.backlog_bytes + payload.len() > self.limits.queued_bytes
            {
                return Err(SendError::QueueFull);
            }
            outbound.backlog_bytes += payload.len();
            outbound.backlog.push_back(payload.to_vec());
            self.statistics.credit_stalls += 1;
        }
        self.statistics.messages_sent[index] += 1;
        self.fabric.cork();
        session.post(&mut *self.fabric, number);
        self.fabric.uncork();
        Ok(())
    }

    /// Messages queued for `slot` on `lane` beyond what the ring holds, for back-pressure.
    pub fn queued(&self, slot: u16, lane: Lane) -> usize {
        self.session(slot).map_or(0, |session| session.outbound[lane as usize].backlog.len())
    }

    /// Reads `length` bytes of a peer's region into ours. `Completed` follows.
    ///
    /// # Errors
    /// [`PostError`]; then nothing was posted.
    #[allow(clippy::too_many_arguments)]
    pub fn read(
        &mut self,
        slot: u16,
        local: &Region,
        local_offset: u64,
        key: RemoteKey,
        remote_offset: u64,
        length: u32,
        work_id: u64,
    ) -> Result<(), PostError> {
        self.check_post(slot, work_id)?;
        let target = Local { region: local, offset: local_offset, length };
        self.fabric.read(slot, target, Remote { key, offset: remote_offset }, work_id)?;
        self.statistics.bytes_read += u64::from(length);
        Ok(())
    }

    /// Writes `length` bytes of our region into a peer's. `Completed` follows. The source may change only after that.
    ///
    /// # Errors
    /// [`PostError`]; then nothing was posted.
    #[allow(clippy::too_many_arguments)]
    pub fn write(
        &mut self,
        slot: u16,
        local: &Region,
        local_offset: u64,
        key: RemoteKey,
        remote_offset: u64,
        length: u32,
        work_id: u64,
    ) -> Result<(), PostError> {
        self.check_post(slot, work_id)?;
        let source = Local { region: local, offset: local_offset, length };
        self.fabric.write(slot, source, Remote { key, offset: remote_offset }, work_id)?;
        self.statistics.bytes_written += u64::from(length);
        Ok(())
    }

    /// Replaces the remote word by `new` if it is `expected`. Its old value is at `local_offset` once `Completed` comes.
    ///
    /// # Errors
    /// [`PostError`]; then nothing was posted.
    #[allow(clippy::too_many_arguments)]
    pub fn compare_swap(
        &mut self,
        slot: u16,
        local: &Region,
        local_offset: u64,
        key: RemoteKey,
        remote_offset: u64,
        expected: u64,
        new: u64,
        work_id: u64,
    ) -> Result<(), PostError> {
        self.check_post(slot, work_id)?;
        let result = Local { region: local, offset: local_offset, length: 8 };
        self.fabric.compare_swap(slot, result, Remote { key, offset: remote_offset }, expected, new, work_id)
    }

    /// Adds to the remote word, wrapping. Its old value is at `local_offset` once `Completed` comes.
    ///
    /// # Errors
    /// [`PostError`]; then nothing was posted.
    #[allow(clippy::too_many_arguments)]
    pub fn fetch_add(
        &mut self,
        slot: u16,
        local: &Region,
        local_offset: u64,
        key: RemoteKey,
        remote_offset: u64,
        addend: u64,
        work_id: u64,
    ) -> Result<(), PostError> {
        self.check_post(slot, work_id)?;
        let result = Local { region: local, offset: local_offset, length: 8 };
        self.fabric.fetch_add(slot, result, Remote { key, offset: remote_offset }, addend, work_id)
    }

    /// Appends what has happened to `events`. Never blocks.
    pub fn poll(&mut self, events: &mut Vec<Event>) {
        events.append(&mut self.waiting);
        // What this sets going (credit, fetches, queued messages) goes out together at the end.
        self.fabric.cork();
        // A second round only when the first posted fetches: with `shm` they are complete already.
        for _ in 0..2 {
            let mut found = std::mem::take(&mut self.fabric_events);
            self.fabric.poll(&mut found);
            for event in found.drain(..) {
                self.handle(event, events);
            }
            self.fabric_events = found;
            let mut fetching = false;
            let mut index = 0;
            while let Some(slot) = self.linked.get(index).copied() {
                index += 1;
                if self.is_connected(slot) {
                    fetching |= self.poll_session(slot, events);
                }
            }
            if !fetching {
                break;
            }
        }
        self.fabric.uncork();
        events.append(&mut self.waiting);
    }

    /// Readable when an armed endpoint has something to report. Do not read it: `poll` does.
    pub fn event_fd(&self) -> RawFd {
        self.fabric.event_fd()
    }

    /// Announces that the caller is about to sleep on `event_fd`. False: something is pending, poll instead.
    pub fn arm(&mut self) -> bool {
        if !self.waiting.is_empty() || !self.fabric.arm() {
            return false;
        }
        if self.linked.iter().any(|slot| self.session(*slot).is_some_and(|session| self.has_work(session))) {
            self.fabric.disarm();
            return false;
        }
        true
    }

    /// Whether it is still armed and nothing has come since: who only passes by need not poll and arm it again.
    pub fn is_quiet(&mut self) -> bool {
        self.waiting.is_empty()
            && self.fabric.is_quiet()
            && !self.linked.iter().any(|slot| self.session(*slot).is_some_and(|session| self.has_work(session)))
    }

    /// Makes `event_fd` readable: wakes the thread that sleeps on it, at the price of a system call.
    pub fn interrupt(&self) {
        self.fabric.interrupt();
    }

    /// Breaks the connection and nothing else: the session resumes over the next one. Fault injection.
    pub fn disconnect(&mut self, slot: u16) {
        self.fabric.disconnect(slot, DisconnectReason::Local);
    }

    /// As a device would that has found a fault. For tests of the provider.
    #[cfg(test)]
    pub(crate) fn break_queue_pair(&mut self, slot: u16) {
        self.fabric.break_queue_pair(slot);
    }

    /// After it returns `Ok`, no operation of that peer's known incarnations can change our memory, its session is over, and
    /// they are refused for good. Blocks, up to [`Limits::fence_timeout`]. Known are those that have been connected to this
    /// endpoint: an evicted incarnation that may not have been yet is kept out by [`Endpoint::refuse`], called first.
    ///
    /// # Errors
    /// The peer may still have access: nothing it held may be granted again. Its session is over all the same.
    pub fn fence(&mut self, slot: u16) -> Result<(), FenceError> {
        let result = self.fabric.fence(slot);
        self.lose_session(slot, SessionLoss::Fenced);
        result
    }

    /// Refuses every slot but these from now on. To be called before `listen`: connections that are there stay.
    pub fn admit_only(&mut self, slots: &[u16]) {
        self.fabric.admit_only(slots);
    }

    /// Refuses every incarnation of `slot` up to `node_incarnation`, connected before or not; ends its session and connection.
    /// Does not revoke what it has mapped: that is `fence`.
    pub fn refuse(&mut self, slot: u16, node_incarnation: u32) {
        self.fabric.refuse(slot, node_incarnation);
        if self.session(slot).is_some_and(|session| session.hello.incarnation.node <= node_incarnation) {
            self.fabric.disconnect(slot, DisconnectReason::Fenced);
            self.lose_session(slot, SessionLoss::Fenced);
        }
    }

    /// A snapshot of the counters.
    pub fn statistics(&self) -> Statistics {
        Statistics { wakeups_written: self.fabric.wakeups_written(), ..self.statistics }
    }

    fn session(&self, slot: u16) -> Option<&Session> {
        self.sessions.get(usize::from(slot)).and_then(Option::as_deref)
    }

    fn check_post(&self, slot: u16, work_id: u64) -> Result<(), PostError> {
        if work_id >= RESERVED_WORK_IDS {
            return Err(PostError::ReservedWorkId);
        }
        if !self.is_connected(slot) {
            return Err(PostError::NotConnected(slot));
        }
        Ok(())
    }

    fn has_work(&self, session: &Session) -> bool {
        let Some(link) = session.link.as_ref().filter(|link| link.peer.is_some()) else { return false };
        let records = self.fabric.publication() == Publication::Memory
            && session
                .inbound
                .iter()
                .enumerate()
                .any(|(lane, inbound)| inbound.fetch.is_none() && inbound.peek(&link.inbox, lane as u8) != 0);
        records
            || session
                .outbound
                .iter()
                .enumerate()
                .any(|(lane, outbound)| !outbound.backlog.is_empty() && session.credit_waits(lane as u8))
    }

    fn drop_connection(&mut self, slot: u16, reason: &'static str) {
        self.statistics.protocol_violations += 1;
        self.unlink(slot);
        self.fabric.disconnect(slot, DisconnectReason::Protocol(reason));
    }

    /// Forgets the connection, not the session.
    fn unlink(&mut self, slot: u16) -> Option<Link> {
        self.linked.retain(|other| *other != slot);
        let session = self.sessions.get_mut(usize::from(slot)).and_then(Option::as_mut)?;
        for inbound in &mut session.inbound {
            inbound.fetch = None;
            inbound.announced = 0;
        }
        let link = session.link.take()?;
        self.fabric.deregister(&link.inbox);
        Some(link)
    }

    fn lose_session(&mut self, slot: u16, loss: SessionLoss) {
        let link = self.unlink(slot);
        let Some(session) = self.sessions.get_mut(usize::from(slot)).and_then(Option::take) else { return };
        if link.is_some_and(|link| link.peer.is_some()) {
            // The fabric's own event comes too late: there is no session any more for which to report it.
            self.waiting.push(Event::Disconnected { slot, reason: DisconnectReason::Fenced });
        }
        let incarnation = session.hello.incarnation;
        session.release(&mut *self.fabric);
        self.statistics.sessions_lost += 1;
        tracing::info!(slot, ?incarnation, %loss, "session lost");
        self.waiting.push(Event::SessionLost { slot, incarnation, loss });
        // The thread that polls may be asleep.
        self.fabric.interrupt();
    }

    fn handle(&mut self, event: FabricEvent, events: &mut Vec<Event>) {
        match event {
            FabricEvent::Connected { slot, hello } => {
                if let Some(attempt) = self.attempts.get_mut(&slot) {
                    *attempt = Attempt::SettingUp;
                }
                if let Err(error) = self.start_link(slot, hello, events) {
                    tracing::error!(slot, %error, "no memory for a session");
                    self.fabric.disconnect(slot, DisconnectReason::Local);
                }
            }
            FabricEvent::ConnectFailed { slot, reason } => {
                if let ConnectError::RefusedByPeer(refusal @ (Refusal::Fenced | Refusal::Stale)) = reason {
                    self.lose_session(slot, SessionLoss::RefusedByPeer(refusal));
                    events.append(&mut self.waiting);
                }
                if self.attempts.remove(&slot).is_some() {
                    events.push(Event::ConnectFailed { slot, reason });
                }
            }
            FabricEvent::Disconnected { slot, reason } => {
                // Nothing of this connection may go out any more: the fabric may have another for this slot already.
                let link = self.sessions.get_mut(usize::from(slot)).and_then(Option::as_mut);
                let link = link.and_then(|session| session.link.as_mut());
                let was_connected = link.and_then(|link| link.peer.take()).is_some();
                // What arrived before the end is as good as ever.
                if was_connected && !matches!(reason, DisconnectReason::Protocol(_) | DisconnectReason::Fenced) {
                    self.poll_session(slot, events);
                }
                self.unlink(slot);
                if was_connected || matches!(reason, DisconnectReason::Protocol(_)) {
                    events.push(Event::Disconnected { slot, reason });
                }
                if self.attempts.get(&slot) == Some(&Attempt::SettingUp) {
                    if reason == DisconnectReason::Replaced {
                        // The attempt lives on in the connection that took this one's place.
                        self.attempts.insert(slot, Attempt::Connecting);
                    } else {
                        self.attempts.remove(&slot);
                        events.push(Event::ConnectFailed { slot, reason: ConnectError::Broken });
                    }
                }
            }
            FabricEvent::Completed { slot, work_id, result } => {
                if work_id < RESERVED_WORK_IDS {
                    events.push(Event::Completed { slot, work_id, result });
                } else {
                    self.fetched(slot, work_id, result, events);
                }
            }
            FabricEvent::Received { slot, immediate, .. } => {
                let session = self.sessions.get_mut(usize::from(slot)).and_then(Option::as_mut);
                // A returned credit needs no more than the wake-up.
                if let Some(session) = session
                    && immediate & IMMEDIATE_CREDIT == 0
                    && let Some(inbound) = session.inbound.get_mut(immediate as usize)
                {
                    inbound.announced += 1;
                }
            }
            FabricEvent::Control { slot, bytes } => {
                if let Err(reason) = self.finish_link(slot, &bytes, events) {
                    self.drop_connection(slot, reason);
                }
            }
        }
    }

    fn start_link(&mut self, slot: u16, hello: Hello, events: &mut Vec<Event>) -> io::Result<()> {
        debug_assert!(slot < SLOTS_MAXIMUM);
        if self.session(slot).is_some_and(|session| session.hello.incarnation != hello.incarnation) {
            self.unlink(slot);
            self.lose_session(slot, SessionLoss::Incarnation);
            events.append(&mut self.waiting);
        }
        let index = usize::from(slot);
        if self.sessions.len() <= index {
            self.sessions.resize_with(index + 1, || None);
        }
        if self.sessions[index].is_none() {
            self.sessions[index] = Some(Box::new(Session::new(&mut *self.fabric, slot, hello)?));
        }
        self.unlink(slot);
        let inbox = self.fabric.register_memory(INBOX_LENGTH, Access::Peer(slot))?;
        let session = self.sessions[index].as_mut().expect("made above");
        let mut wanted = [0; LANES];
        for (lane, inbound) in session.inbound.iter_mut().enumerate() {
            wanted[lane] = inbound.consumed;
            inbound.told = inbound.consumed;
        }
        let set_up = SetUp { inbox: inbox.key(), staging: session.staging.key(), wanted };
        self.generation = (self.generation + 1) & 0xff_ffff;
        session.hello = hello;
        session.link = Some(Link { inbox, generation: self.generation, peer: None });
        self.linked.push(slot);
        // When the connection is gone already, its event follows.
        let _ = self.fabric.send_control(slot, &set_up.encode());
        Ok(())
    }

    fn finish_link(&mut self, slot: u16, bytes: &[u8], events: &mut Vec<Event>) -> Result<(), &'static str> {
        let session = self.sessions.get_mut(usize::from(slot)).and_then(Option::as_mut);
        let session = session.ok_or("a set-up without a session")?;
        let set_up = SetUp::decode(bytes).ok_or("a malformed set-up")?;
        match &mut session.link {
            Some(link) if link.peer.is_none() => {}
            _ => return Err("a second set-up"),
        }
        let before: [u64; LANES] = std::array::from_fn(|lane| session.outbound[lane].posted);
        session.resume(&set_up)?;
        session.link.as_mut().expect("checked above").peer = Some((set_up.inbox, set_up.staging));
        for (lane, before) in before.into_iter().enumerate() {
            let mut position = session.outbound[lane].posted;
            while position < before {
                position = session.next_position(lane as u8, position);
                self.statistics.records_resent += 1;
            }
            session.post(&mut *self.fabric, lane as u8);
        }
        self.attempts.remove(&slot);
        self.statistics.connections += 1;
        events.push(Event::Connected { slot, hello: session.hello });
        Ok(())
    }

    /// Takes what the peer has published. True when a fetch was posted.
    fn poll_session(&mut self, slot: u16, events: &mut Vec<Event>) -> bool {
        let Some(mut session) = self.sessions.get_mut(usize::from(slot)).and_then(Option::take) else { return false };
        let result = if session.link.is_some() { self.poll_lanes(&mut session, events) } else { Ok(false) };
        self.sessions[usize::from(slot)] = Some(session);
        result.unwrap_or_else(|reason| {
            self.drop_connection(slot, reason);
            // Reported here: the link that the fabric's event would be reported for is gone.
            false
        })
    }

    fn poll_lanes(&mut self, session: &mut Session, events: &mut Vec<Event>) -> Result<bool, &'static str> {
        let slot = session.slot;
        let polled = self.fabric.publication() == Publication::Memory;
        let mut fetching = false;
        // Later lanes first: earlier ones wait for them.
        for lane in Lane::ALL.into_iter().rev() {
            let (index, number) = (lane as usize, lane as u8);
            for _ in 0..MESSAGES_PER_LANE_AND_POLL {
                let link = session.link.as_ref().expect("only linked sessions are polled");
                let inbound = &session.inbound[index];
                if inbound.fetch.is_some() || !polled && inbound.announced == 0 {
                    break;
                }
                let word = inbound.peek(&link.inbox, number);
                if word == 0 {
                    break;
                }
                let taken = inbound.take(&link.inbox, number, word)?;
                session.acknowledged(taken.header.acknowledged_lane, taken.header.acknowledged)?;
                let link = session.link.as_ref().expect("as above");
                let inbound = &mut session.inbound[index];
                inbound.announced = inbound.announced.saturating_sub(1);
                match taken.header.head.kind {
                    Kind::Skip => inbound.consume(&link.inbox, number, taken.next),
                    Kind::Inline => {
                        inbound.consume(&link.inbox, number, taken.next);
                        self.statistics.messages_received[index] += 1;
                        events.push(Event::Message { slot, lane, payload: taken.body });
                    }
                    Kind::Staged => {
                        if !self.fetch(session, number, &taken.body, taken.next)? {
                            break;
                        }
                        fetching = true;
                    }
                }
                let inbound = &session.inbound[index];
                if inbound.consumed - inbound.told >= CREDIT_RETURN_UNITS
                    && session.return_credit(&mut *self.fabric, number)
                {
                    self.statistics.credits_written += 1;
                }
            }
            if !session.outbound[index].backlog.is_empty() {
                session.refresh_credit(number)?;
                session.drain_backlog(number);
            }
            if session.outbound[index].posted < session.outbound[index].head {
                session.post(&mut *self.fabric, number);
            }
        }
        Ok(fetching)
    }

    fn fetch(&mut self, session: &mut Session, lane: u8, body: &[u8], next: u64) -> Result<bool, &'static str> {
        let offset = u64::from_le_bytes(body[0..8].try_into().expect("eight bytes"));
        let length = u32::from_le_bytes(body[8..12].try_into().expect("four bytes"));
        let start = u64::from(lane) * STAGING_LENGTH as u64;
        let fits = offset >= start
            && offset.checked_add(u64::from(length)).is_some_and(|end| end <= start + STAGING_LENGTH as u64);
        if !fits || length as usize <= INLINE_MAXIMUM || length as usize > PAYLOAD_MAXIMUM || body[12..16] != [0; 4] {
            return Err("a staged payload that cannot be");
        }
        let landing = session.landing(&mut *self.fabric).map_err(|_| "no memory to fetch into")?;
        let link = session.link.as_ref().expect("only linked sessions are polled");
        // The connection is gone: the record will come again on the next one.
        let Some((_, staging)) = link.peer else { return Ok(false) };
        let work_id =
            RESERVED_WORK_IDS | u64::from(link.generation) << 24 | u64::from(session.slot) << 8 | u64::from(lane);
        let target = Local { region: &landing, offset: u64::from(lane) * PAYLOAD_MAXIMUM as u64, length };
        session.inbound[usize::from(lane)].fetch = Some(Fetch { length, next });
        // Not posted: likewise.
        Ok(self.fabric.read(session.slot, target, Remote { key: staging, offset }, work_id).is_ok())
    }

    fn fetched(&mut self, slot: u16, work_id: u64, result: Result<(), WorkError>, events: &mut Vec<Event>) {
        let lane = work_id as u8;
        let generation = (work_id >> 24) as u32 & 0xff_ffff;
        let Some(session) = self.sessions.get_mut(usize::from(slot)).and_then(Option::as_mut) else { return };
        let Some(link) = session.link.as_ref().filter(|link| link.generation == generation) else { return };
        let inbound = &mut session.inbound[usize::from(lane)];
        if result.is_err() {
            return;
        }
        let Some(fetch) = inbound.fetch.take() else { return };
        let landing = session.landing.as_ref().expect("a fetch was posted");
        let payload = landing.to_vec(usize::from(lane) * PAYLOAD_MAXIMUM, fetch.length as usize);
        inbound.consume(&link.inbox, lane, fetch.next);
        self.statistics.messages_received[usize::from(lane)] += 1;
        self.statistics.payloads_fetched += 1;
        events.push(Event::Message { slot, lane: Lane::ALL[usize::from(lane)], payload });
        // At once: it is the staging area that is short, not the ring.
        if session.return_credit(&mut *self.fabric, lane) {
            self.statistics.credits_written += 1;
        }
    }
}
