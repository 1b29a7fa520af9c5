//! A connection to one peer: its queue pair, what waits for it, and how many receives the peer has for us.
//!
//! Every write with immediate and every message takes a receive of the peer's. Each side posts [`Depth::receives`], tells
//! the other how many of them it may take, and gives them back in batches when it has posted them again; so a sender
//! waits here, in its own memory, instead of running into receiver-not-ready errors at the peer.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::Instant;

use hmac::{Hmac, Mac};
use sha2::Sha256;

use super::completion::CompletionChannel;
use super::connection_manager::{Identifier, Parameters, REPLY_DATA_MAXIMUM, REQUEST_DATA_MAXIMUM, State};
use super::device::ProtectionDomain;
use super::queue_pair::{Arrival, Depth, Failure, LocalRange, QueuePair, Request, Verb, Work};
use crate::fabric::{CONTROL_LENGTH_MAXIMUM, DisconnectReason, WorkError};
use crate::handshake::{Hello, Proved};

/// Send requests we would like to have under way on one connection.
const SENDS_WANTED: u32 = 512;
/// Receives we would like to post: the records of five lanes, 256 each, and returned credit beside them. So what the mailbox
/// may have under way never waits for credit of this layer, whether the sender polls or not.
const RECEIVES_WANTED: u32 = 5 * 256 + 256 + RECEIVES_RESERVED;
/// Receives kept for messages that give receives back, which wait for nothing.
const RECEIVES_RESERVED: u32 = 16;
/// A quarter of the receives is given back at a time, so fewer than this many such messages are ever under way.
const RETURNS: u32 = 4;
const _: () = assert!(RETURNS < RECEIVES_RESERVED);
/// Reads and atomics under way we would like: more gains nothing but costs the device memory.
const READS_WANTED: u8 = 16;
/// Operations that wait for room, per connection. Beyond that the peer is stuck.
const PENDING_MAXIMUM: usize = 1024;
/// Operations handed over with one doorbell. Bounds how long the first of them waits for its completion.
const CHAIN_MAXIMUM: usize = 32;
/// Operations nobody waits for between two completions; fewer where the queue would not hold several such runs.
const SILENT_RUN_MAXIMUM: u32 = 64;
/// A queue holds this many runs at least, or it could be full of operations that never say they have ended.
const SILENT_RUNS: u32 = 4;
const _: () = assert!(SILENT_RUN_MAXIMUM * SILENT_RUNS < SENDS_WANTED && SILENT_RUNS <= 4 * RETURNS);
/// Completions taken from one connection before the others get their turn.
const COMPLETIONS_PER_POLL: usize = 256;

const MARK_LENGTH: usize = 32;
/// Mark, receives, the connection given up before.
const REQUEST_LENGTH: usize = MARK_LENGTH + 4 + 8;
/// Mark, receives.
const REPLY_LENGTH: usize = MARK_LENGTH + 4;
const _: () = assert!(REQUEST_LENGTH <= REQUEST_DATA_MAXIMUM && REPLY_LENGTH <= REPLY_DATA_MAXIMUM);

const MESSAGE_CONTROL: u8 = 1;
const MESSAGE_RETURN: u8 = 2;

/// What the request of the connection manager says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ConnectRequest {
    /// Derived from the binding of the handshake: names it, and proves that the requester was part of it.
    pub(super) mark: [u8; MARK_LENGTH],
    /// How many of the requester's receives we may take.
    pub(super) receives: u32,
    /// The number of the last connection with us that the requester knows to be over; zero if there was none.
    pub(super) closed: u64,
}

impl ConnectRequest {
    pub(super) fn encode(&self) -> [u8; REQUEST_LENGTH] {
        let mut bytes = [0; REQUEST_LENGTH];
        bytes[..32].copy_from_slice(&self.mark);
        bytes[32..36].copy_from_slice(&self.receives.to_le_bytes());
        bytes[36..].copy_from_slice(&self.closed.to_le_bytes());
        bytes
    }
    pub(super) fn decode(bytes: &[u8]) -> Option<ConnectRequest> {
        let bytes = bytes.get(..REQUEST_LENGTH)?;
        Some(ConnectRequest {
            mark: bytes[..32].try_into().ok()?,
            receives: u32::from_le_bytes(bytes[32..36].try_into().ok()?),
            closed: u64::from_le_bytes(bytes[36..].try_into().ok()?),
        })
    }
}

fn mark(binding: &[u8; 32], role: &[u8]) -> [u8; MARK_LENGTH] {
    let mut mac = Hmac::<Sha256>::new_from_slice(binding).expect("any key length is allowed");
    mac.update(role);
    mac.finalize().into_bytes().into()
}

/// What a request shows that comes from whoever shook hands with this binding.
pub(super) fn request_mark(binding: &[u8; 32]) -> [u8; MARK_LENGTH] {
    mark(binding, b"request")
}

/// How far a connection is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Phase {
    /// Ours: address and route are looked up.
    Resolving,
    /// Ours: the peer was asked.
    Requested,
    /// The peer's: taken, and not yet confirmed.
    Accepted,
    Up,
}

/// One operation of the consumer's or the mailbox's.
pub(super) struct Operation {
    pub(super) verb: Verb,
    pub(super) local: LocalRange,
    pub(super) remote: (u32, u64),
    pub(super) work: Work,
}

enum Pending {
    Operation(Operation),
    Message(Vec<u8>),
}

/// What a connection has to report.
pub(super) enum Report {
    Ended { work_id: u64, result: Result<(), WorkError> },
    Received { immediate: u32, length: u32 },
    Control(Vec<u8>),
}

/// See the module.
pub(super) struct Connection {
    pub(super) hello: Hello,
    /// Names the connection between the two.
    pub(super) number: u64,
    pub(super) initiated_here: bool,
    pub(super) phase: Phase,
    /// Until when it has to be up.
    pub(super) deadline: Instant,
    /// First, so that no operation is under way when the identifier goes.
    pair: Option<QueuePair>,
    pub(super) identifier: Identifier,
    binding: [u8; 32],
    pending: VecDeque<Pending>,
    /// Receives of the peer's that we may take.
    credit: u32,
    credit_maximum: u32,
    /// Receives of ours posted again and not yet given back.
    owed: u32,
    silent_run: u32,
    arrivals: Vec<(u32, Arrival)>,
    ended: Vec<(Work, Result<(), Failure>)>,
}

impl Connection {
    pub(super) fn new(
        proved: &Proved,
        identifier: Identifier,
        initiated_here: bool,
        phase: Phase,
        deadline: Instant,
    ) -> Connection {
        let name = mark(&proved.binding, b"name");
        Connection {
            hello: proved.hello,
            number: u64::from_le_bytes(name[..8].try_into().expect("eight bytes")) | 1,
            initiated_here,
            phase,
            deadline,
            pair: None,
            identifier,
            binding: proved.binding,
            pending: VecDeque::new(),
            credit: 0,
            credit_maximum: 0,
            owed: 0,
            silent_run: 0,
            arrivals: Vec::new(),
            ended: Vec::new(),
        }
    }

    pub(super) fn owns_pair(&self, identity: usize) -> bool {
        self.pair.as_ref().is_some_and(|pair| pair.identity() == identity)
    }

    #[cfg(test)]
    pub(super) fn pair_mut(&mut self) -> &mut QueuePair {
        self.pair.as_mut().expect("a connection that is up has a queue pair")
    }

    /// Makes the queue pair, posts its receives, and says how many of them the peer may take.
    fn make_pair(
        &mut self,
        domain: &Arc<ProtectionDomain>,
        channel: &Arc<CompletionChannel>,
    ) -> io::Result<(&mut QueuePair, u32)> {
        let limits = domain.device().limits();
        let depth = Depth {
            sends: SENDS_WANTED.min(limits.queue_depth).min(limits.completions / 2),
            receives: RECEIVES_WANTED.min(limits.queue_depth).min(limits.completions / 2),
        };
        if depth.sends < 4 * RETURNS || depth.receives <= 2 * RECEIVES_RESERVED {
            let message = format!("its queues hold {} requests, which is too few", limits.queue_depth);
            return Err(io::Error::new(io::ErrorKind::Unsupported, message));
        }
        let mut pair = QueuePair::new(domain, channel, depth)?;
        pair.initialize(self.identifier.attributes(State::Initialized)?)?;
        pair.post_receives(0..depth.receives)?;
        Ok((self.pair.insert(pair), depth.receives - RECEIVES_RESERVED))
    }

    fn set_credit(&mut self, receives: u32) {
        self.credit = receives;
        self.credit_maximum = receives;
    }

    /// Ours, with its route known: asks the peer. `closed` is the last connection to it that is over.
    pub(super) fn request(
        &mut self,
        domain: &Arc<ProtectionDomain>,
        channel: &Arc<CompletionChannel>,
        closed: u64,
    ) -> io::Result<()> {
        let limits = domain.device().limits();
        let mark = request_mark(&self.binding);
        let (pair, receives) = self.make_pair(domain, channel)?;
        let parameters = Parameters {
            queue_pair: pair.number(),
            reads_served: READS_WANTED.min(limits.reads_served),
            reads_initiated: READS_WANTED.min(limits.reads_initiated),
        };
        self.identifier.connect(parameters, &ConnectRequest { mark, receives, closed }.encode())?;
        self.phase = Phase::Requested;
        Ok(())
    }

    /// The peer's answer to our request: checks that it is the peer's, and goes up.
    pub(super) fn conclude(&mut self, data: &[u8]) -> io::Result<()> {
        let malformed = |what| io::Error::new(io::ErrorKind::InvalidData, what);
        let data = data.get(..REPLY_LENGTH).ok_or_else(|| malformed("an answer that is too short"))?;
        if data[..MARK_LENGTH] != mark(&self.binding, b"reply") {
            return Err(malformed("an answer of somebody else"));
        }
        let receives = u32::from_le_bytes(data[MARK_LENGTH..].try_into().expect("four bytes"));
        let to_receive = self.identifier.attributes(State::ReadyToReceive)?;
        let pair = self.pair.as_mut().ok_or_else(|| malformed("an answer to no request"))?;
        pair.become_ready_to_receive(to_receive, None)?;
        pair.become_ready_to_send(self.identifier.attributes(State::ReadyToSend)?, None)?;
        self.set_credit(receives);
        self.identifier.establish()?;
        self.phase = Phase::Up;
        Ok(())
    }

    /// Takes the peer's request.
    pub(super) fn accept(
        &mut self,
        domain: &Arc<ProtectionDomain>,
        channel: &Arc<CompletionChannel>,
        request: &ConnectRequest,
        reads_served: u8,
        reads_initiated: u8,
    ) -> io::Result<()> {
        let limits = domain.device().limits();
        let reads_served = reads_served.min(READS_WANTED).min(limits.reads_served);
        let reads_initiated = reads_initiated.min(READS_WANTED).min(limits.reads_initiated);
        let (pair, receives) = self.make_pair(domain, channel)?;
        let queue_pair = pair.number();
        let to_receive = self.identifier.attributes(State::ReadyToReceive)?;
        let pair = self.pair.as_mut().expect("just made");
        pair.become_ready_to_receive(to_receive, Some(reads_served))?;
        pair.become_ready_to_send(self.identifier.attributes(State::ReadyToSend)?, Some(reads_initiated))?;
        self.set_credit(request.receives);
        let mut reply = [0; REPLY_LENGTH];
        reply[..MARK_LENGTH].copy_from_slice(&mark(&self.binding, b"reply"));
        reply[MARK_LENGTH..].copy_from_slice(&receives.to_le_bytes());
        self.identifier.accept(Parameters { queue_pair, reads_served, reads_initiated }, &reply)?;
        self.phase = Phase::Accepted;
        Ok(())
    }

    /// Whether an operation can be taken.
    pub(super) fn has_room(&self) -> bool {
        self.pending.len() < PENDING_MAXIMUM
    }

    pub(super) fn has_pending(&self) -> bool {
        !self.pending.is_empty()
    }

    pub(super) fn queue(&mut self, operation: Operation) {
        self.pending.push_back(Pending::Operation(operation));
    }

    pub(super) fn queue_control(&mut self, bytes: &[u8]) {
        debug_assert!(bytes.len() <= CONTROL_LENGTH_MAXIMUM);
        self.pending.push_back(Pending::Message([&[MESSAGE_CONTROL], bytes].concat()));
    }

    /// Whether enough wait for a doorbell of their own.
    pub(super) fn fills_a_chain(&self) -> bool {
        self.pending.len() >= CHAIN_MAXIMUM
    }

    /// Hands over what waits, as far as there is room and credit. `watched`: somebody sleeps until there is news.
    pub(super) fn flush(&mut self, watched: bool) -> io::Result<()> {
        let Some(pair) = self.pair.as_mut() else { return Ok(()) };
        if self.owed >= (pair_receives(pair) / RETURNS).max(1) && pair.room() > 0 {
            let bytes = [&[MESSAGE_RETURN][..], &self.owed.to_le_bytes()].concat();
            if let Some((local, work)) = pair.message(&bytes) {
                let mut guard = pair.gather();
                guard.push(Request {
                    verb: Verb::Message,
                    local,
                    remote: (0, 0),
                    work,
                    signalled: true,
                    fenced: false,
                });
                guard.ring()?;
                self.owed = 0;
            }
        }
        let silent_run_maximum = SILENT_RUN_MAXIMUM.min(pair.depth().sends / SILENT_RUNS);
        while !self.pending.is_empty() {
            // How many go: the chain's last reported operation carries the completion for those before it.
            let mut count = 0;
            let mut credit = self.credit;
            for waiting in self.pending.iter().take(CHAIN_MAXIMUM.min(pair.room())) {
                let announced = match waiting {
                    Pending::Operation(operation) => operation.verb.is_announced(),
                    Pending::Message(_) => true,
                };
                if announced {
                    if credit == 0 {
                        break;
                    }
                    credit -= 1;
                }
                count += 1;
            }
            let last_reported = self.pending.iter().take(count).rposition(
                |waiting| matches!(waiting, Pending::Operation(operation) if matches!(operation.work, Work::Reported(_))),
            );
            if watched && last_reported.is_some() {
                // Before it is posted: a completion that is there already makes no noise.
                pair.request_end_notification()?;
            }
            let mut posted = 0;
            let mut messages = Vec::new();
            // Buffers first: while the guard is there, the queue pair is taken.
            for waiting in self.pending.iter().take(count) {
                if let Pending::Message(bytes) = waiting {
                    match pair.message(bytes) {
                        Some(prepared) => messages.push(prepared),
                        None => break,
                    }
                }
            }
            let mut messages = messages.into_iter();
            let mut guard = pair.gather();
            while posted < count {
                let Some(waiting) = self.pending.pop_front() else { break };
                let (verb, local, remote, work) = match waiting {
                    Pending::Operation(Operation { verb, local, remote, work }) => (verb, local, remote, work),
                    Pending::Message(bytes) => match messages.next() {
                        Some((local, work)) => (Verb::Message, local, (0, 0), work),
                        None => {
                            // All buffers are under way.
                            self.pending.push_front(Pending::Message(bytes));
                            break;
                        }
                    },
                };
                let silent = work == Work::Silent;
                self.silent_run = if silent { self.silent_run + 1 } else { self.silent_run };
                let signalled = matches!(work, Work::Message(_))
                    || last_reported == Some(posted)
                    || self.silent_run >= silent_run_maximum;
                if signalled {
                    self.silent_run = 0;
                }
                // Published records are not ordered behind reads: the mailbox waits for those where it must.
                let fenced = guard.is_fetching() && !silent && verb != Verb::Read && verb != Verb::Message;
                self.credit -= u32::from(verb.is_announced());
                let pushed = guard.push(Request { verb, local, remote, work, signalled, fenced });
                debug_assert!(pushed, "room was counted");
                posted += 1;
            }
            guard.ring()?;
            if posted == 0 || posted < count {
                break;
            }
        }
        Ok(())
    }

    /// Collects what has happened. `Err`: the connection is over, for this reason; what was reported before is right.
    pub(super) fn poll(&mut self, reports: &mut Vec<Report>) -> Result<(), DisconnectReason> {
        let Some(pair) = self.pair.as_mut() else { return Ok(()) };
        let lost = |error: io::Error| {
            tracing::error!(%error, "an RDMA completion queue is of no more use");
            DisconnectReason::Local
        };
        let mut failure = None;
        let mut taken = 0;
        while taken < COMPLETIONS_PER_POLL {
            let count = pair.poll_ends(&mut self.ended).map_err(lost)?;
            for (work, result) in self.ended.drain(..) {
                if let Err(failed) = result
                    && failure.is_none()
                {
                    failure = Some(failed);
                }
                if let Work::Reported(work_id) = work {
                    reports.push(Report::Ended { work_id, result: result.map_err(|failed| failed.error) });
                }
            }
            taken += count;
            if count == 0 || failure.is_some() {
                break;
            }
        }
        let mut taken = 0;
        let mut whole = true;
        let mut again = Vec::new();
        let mut violation = None;
        while taken < COMPLETIONS_PER_POLL && whole && violation.is_none() {
            let (count, fine) = pair.poll_arrivals(&mut self.arrivals).map_err(lost)?;
            whole = fine;
            for (slot, arrival) in self.arrivals.drain(..) {
                again.push(slot);
                match arrival {
                    Arrival::Immediate { immediate, length } => {
                        self.owed += 1;
                        reports.push(Report::Received { immediate, length });
                    }
                    Arrival::Message(bytes) => match bytes.split_first() {
                        Some((&MESSAGE_CONTROL, control)) if control.len() <= CONTROL_LENGTH_MAXIMUM => {
                            self.owed += 1;
                            reports.push(Report::Control(control.to_vec()));
                        }
                        Some((&MESSAGE_RETURN, number)) if number.len() == 4 => {
                            let number = u32::from_le_bytes(number.try_into().expect("four bytes"));
                            match self.credit.checked_add(number).filter(|credit| *credit <= self.credit_maximum) {
                                Some(credit) => self.credit = credit,
                                None => violation = Some("it gives back receives that were not taken"),
                            }
                        }
                        _ => violation = Some("a malformed message"),
                    },
                }
            }
            taken += count;
            if count == 0 {
                break;
            }
        }
        if let Some(violation) = violation {
            return Err(DisconnectReason::Protocol(violation));
        }
        if let Some(failed) = failure {
            if !matches!(failed.error, WorkError::RemoteAccess) {
                tracing::debug!(slot = self.hello.slot, status = failed.status, "an operation failed");
            }
            return Err(match failed.error {
                WorkError::RemoteAccess => DisconnectReason::RemoteAccess,
                WorkError::Flushed => DisconnectReason::PeerClosed,
            });
        }
        if !whole {
            return Err(DisconnectReason::PeerClosed);
        }
        pair.post_receives(again).map_err(lost)?;
        Ok(())
    }

    /// Makes the channel readable when something comes of this connection.
    pub(super) fn watch(&self) -> io::Result<()> {
        let Some(pair) = self.pair.as_ref() else { return Ok(()) };
        pair.request_arrival_notification()?;
        if pair.is_awaited() || self.has_pending() {
            pair.request_end_notification()?;
        }
        Ok(())
    }

    /// Whether operations may use `memory`'s domain, and at most how long they may be.
    pub(super) fn domain(&self) -> Option<&Arc<ProtectionDomain>> {
        self.pair.as_ref().map(QueuePair::domain)
    }

    /// Ends it: after `Ok` the peer reaches nothing through it. Returns the identifier, which may still have to say
    /// good-bye (`silently`: has not begun to), and the ids of what did not end.
    pub(super) fn close(mut self, silently: bool) -> (Identifier, Vec<u64>, Option<(QueuePair, io::Error)>) {
        let mut flushed = Vec::new();
        let mut leftover = None;
        if !silently {
            self.identifier.disconnect();
        }
        if let Some(mut pair) = self.pair.take() {
            // Fails where it is in that state already.
            let _ = pair.fail();
            // What is in flight is let go of only with the queue pair itself.
            let destroyed = pair.destroy();
            flushed.extend(pair.awaited());
            if let Err(error) = destroyed {
                leftover = Some((pair, error));
            }
        }
        flushed.extend(self.pending.drain(..).filter_map(|waiting| match waiting {
            Pending::Operation(Operation { work: Work::Reported(work_id), .. }) => Some(work_id),
            _ => None,
        }));
        (self.identifier, flushed, leftover)
    }
}

fn pair_receives(pair: &QueuePair) -> u32 {
    pair.depth().receives - RECEIVES_RESERVED
}
