//! Sessions of ring messages: what two lives of two daemons have said to each other, over however many connections.
//!
//! A session has five lanes each way ([`Lane`]); a lane is a ring in the receiver's memory that the sender fills one-sided
//! ([`record`], [`lane`]). A payload of up to [`record::INLINE_MAXIMUM`] bytes lies in the ring; a longer one in the
//! sender's staging area, whence the receiver reads it before it goes on with that lane.
//!
//! What outlives a connection: positions, the outbox, the staging area, the backlog. What does not: the inbox, the rings
//! the peer writes to. It is new for every connection, so a straggling write of an old one meets nothing.

pub(crate) mod lane;
pub(crate) mod record;

use crate::fabric::{Fabric, Local, PostError, Region, Remote, RemoteKey};
use crate::handshake::Hello;
use lane::{Inbound, Outbound, STAGING_LENGTH};
use record::{NO_LANE, PAYLOAD_MAXIMUM, RING_LENGTH};

/// The lanes of a session. Handling a message may wait only on later lanes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(u8)]
pub enum Lane {
    /// Namespace operations.
    Ns = 0,
    /// Lock requests.
    Lock = 1,
    /// Grants and revokes.
    Ctrl = 2,
    /// Layouts and commits.
    Io = 3,
    /// Releases and all replies.
    Ack = 4,
}

impl Lane {
    /// All lanes, in order.
    pub const ALL: [Lane; LANES] = [Lane::Ns, Lane::Lock, Lane::Ctrl, Lane::Io, Lane::Ack];
}

/// Number of lanes.
pub const LANES: usize = 5;

const RINGS_LENGTH: usize = LANES * RING_LENGTH;
/// Bytes between credit words: they are written separately.
const CREDIT_STRIDE: usize = 64;
/// Bytes of the memory a peer writes to: its rings, then one credit word per lane of ours.
pub(crate) const INBOX_LENGTH: usize = RINGS_LENGTH + 4096;
const _: () = assert!(LANES * CREDIT_STRIDE <= 4096);
/// Tells a returned credit from a record, in the immediate. The low bits are the lane.
pub(crate) const IMMEDIATE_CREDIT: u32 = 0x80;

pub(crate) fn credit_offset(lane: u8) -> usize {
    RINGS_LENGTH + usize::from(lane) * CREDIT_STRIDE
}

/// What each side tells the other at the start of a connection.
#[derive(Debug, PartialEq, Eq, Clone, Copy)]
pub(crate) struct SetUp {
    pub(crate) inbox: RemoteKey,
    pub(crate) staging: RemoteKey,
    /// Per lane the position it wants to hear from.
    pub(crate) wanted: [u64; LANES],
}

const SET_UP_LENGTH: usize = 8 + 8 * LANES;

impl SetUp {
    pub(crate) fn encode(&self) -> [u8; SET_UP_LENGTH] {
        let mut bytes = [0; SET_UP_LENGTH];
        bytes[0..4].copy_from_slice(&self.inbox.0.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.staging.0.to_le_bytes());
        for (chunk, position) in bytes[8..].chunks_exact_mut(8).zip(self.wanted) {
            chunk.copy_from_slice(&position.to_le_bytes());
        }
        bytes
    }

    pub(crate) fn decode(bytes: &[u8]) -> Option<SetUp> {
        let bytes: &[u8; SET_UP_LENGTH] = bytes.try_into().ok()?;
        let mut wanted = [0; LANES];
        for (chunk, position) in bytes[8..].chunks_exact(8).zip(&mut wanted) {
            *position = u64::from_le_bytes(chunk.try_into().expect("eight bytes"));
        }
        Some(SetUp {
            inbox: RemoteKey(u32::from_le_bytes(bytes[0..4].try_into().expect("four bytes"))),
            staging: RemoteKey(u32::from_le_bytes(bytes[4..8].try_into().expect("four bytes"))),
            wanted,
        })
    }
}

/// A session's present connection.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) inbox: Region,
    /// Tells completions of this connection from those of earlier ones.
    pub(crate) generation: u32,
    /// Inbox and staging area of the peer, once its set-up is here.
    pub(crate) peer: Option<(RemoteKey, RemoteKey)>,
}

#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) slot: u16,
    pub(crate) hello: Hello,
    pub(crate) link: Option<Link>,
    pub(crate) outbound: [Outbound; LANES],
    pub(crate) inbound: [Inbound; LANES],
    outbox: Region,
    pub(crate) staging: Region,
    /// Where staged payloads land; made when the first one comes.
    pub(crate) landing: Option<Region>,
}

impl Session {
    pub(crate) fn new(fabric: &mut dyn Fabric, slot: u16, hello: Hello) -> std::io::Result<Session> {
        use crate::fabric::Access;
        Ok(Session {
            slot,
            hello,
            link: None,
            outbound: Default::default(),
            inbound: Default::default(),
            // The image of the peer's inbox, credit words included.
            outbox: fabric.register_memory(INBOX_LENGTH, Access::Local)?,
            staging: fabric.register_memory(LANES * STAGING_LENGTH, Access::Peer(slot))?,
            landing: None,
        })
    }

    pub(crate) fn release(self, fabric: &mut dyn Fabric) {
        let inbox = self.link.map(|link| link.inbox);
        for region in [Some(self.outbox), Some(self.staging), self.landing, inbox].into_iter().flatten() {
            fabric.deregister(&region);
        }
    }

    pub(crate) fn landing(&mut self, fabric: &mut dyn Fabric) -> std::io::Result<Region> {
        if let Some(region) = &self.landing {
            return Ok(region.clone());
        }
        let region = fabric.register_memory(LANES * PAYLOAD_MAXIMUM, crate::fabric::Access::Local)?;
        Ok(self.landing.insert(region).clone())
    }

    /// Acknowledges on every record the lane that is owed most.
    fn acknowledgement(&self) -> (u8, u32) {
        let mut best = (NO_LANE, 0);
        let mut owed = 0;
        for (lane, inbound) in self.inbound.iter().enumerate() {
            if inbound.consumed - inbound.told > owed {
                owed = inbound.consumed - inbound.told;
                best = (lane as u8, inbound.consumed as u32);
            }
        }
        best
    }

    /// Puts a message into its lane if there is credit for it.
    pub(crate) fn place(&mut self, lane: u8, payload: &[u8]) -> bool {
        let acknowledgement = self.acknowledgement();
        let outbound = &mut self.outbound[usize::from(lane)];
        let placed = outbound.place(&self.outbox, &self.staging, lane, payload, acknowledgement);
        if placed && acknowledgement.0 != NO_LANE {
            let inbound = &mut self.inbound[usize::from(acknowledgement.0)];
            inbound.told = inbound.consumed;
        }
        placed
    }

    /// The position behind the record that the outbox holds at `position`.
    pub(crate) fn next_position(&self, lane: u8, position: u64) -> u64 {
        self.outbound[usize::from(lane)].record(&self.outbox, lane, position).2
    }

    /// Publishes what is placed and not yet posted on this connection.
    pub(crate) fn post(&mut self, fabric: &mut dyn Fabric, lane: u8) {
        let Some((inbox, _)) = self.link.as_ref().and_then(|link| link.peer) else { return };
        let outbound = &mut self.outbound[usize::from(lane)];
        while outbound.posted < outbound.head {
            let (offset, length, next) = outbound.record(&self.outbox, lane, outbound.posted);
            let source = Local { region: &self.outbox, offset: offset as u64, length };
            let target = Remote { key: inbox, offset: offset as u64 };
            match fabric.publish(self.slot, source, target, u32::from(lane)) {
                Ok(()) => outbound.posted = next,
                // The provider's queue is full, or the connection just ended: from here on later, or on the next one.
                Err(PostError::QueueFull | PostError::NotConnected(_)) => return,
                Err(error) => unreachable!("a record is a valid operand: {error}"),
            }
        }
    }

    /// Tells the sender by a write of its own how far we are.
    pub(crate) fn return_credit(&mut self, fabric: &mut dyn Fabric, lane: u8) -> bool {
        let Some((inbox, _)) = self.link.as_ref().and_then(|link| link.peer) else { return false };
        let inbound = &mut self.inbound[usize::from(lane)];
        let offset = credit_offset(lane);
        self.outbox.write_at(offset, &inbound.consumed.to_le_bytes());
        let source = Local { region: &self.outbox, offset: offset as u64, length: 8 };
        let target = Remote { key: inbox, offset: offset as u64 };
        let posted = fabric.publish(self.slot, source, target, IMMEDIATE_CREDIT | u32::from(lane)).is_ok();
        if posted {
            inbound.told = inbound.consumed;
        }
        posted
    }

    /// Credit that came by a write of its own.
    pub(crate) fn refresh_credit(&mut self, lane: u8) -> Result<(), &'static str> {
        let Some(link) = &self.link else { return Ok(()) };
        let position = crate::sync::publication::observe(link.inbox.word(credit_offset(lane)));
        self.outbound[usize::from(lane)].acknowledge(&self.outbox, lane, position)
    }

    /// Whether `refresh_credit` would find news.
    pub(crate) fn credit_waits(&self, lane: u8) -> bool {
        let Some(link) = &self.link else { return false };
        crate::sync::publication::observe(link.inbox.word(credit_offset(lane))) > self.outbound[usize::from(lane)].acked
    }

    pub(crate) fn acknowledged(&mut self, lane: u8, low: u32) -> Result<(), &'static str> {
        match self.outbound.get_mut(usize::from(lane)) {
            Some(outbound) => outbound.acknowledge_low(&self.outbox, lane, low),
            None if lane == NO_LANE => Ok(()),
            None => Err("an acknowledgement of no lane"),
        }
    }

    /// The peer's set-up has come: both directions go on where they were.
    pub(crate) fn resume(&mut self, set_up: &SetUp) -> Result<(), &'static str> {
        for (lane, outbound) in self.outbound.iter_mut().enumerate() {
            outbound.resume(&self.outbox, lane as u8, set_up.wanted[lane])?;
        }
        Ok(())
    }

    /// Moves messages from the backlog into the lane while there is credit. Returns how many.
    pub(crate) fn drain_backlog(&mut self, lane: u8) -> usize {
        let mut moved = 0;
        while let Some(payload) = self.outbound[usize::from(lane)].backlog.pop_front() {
            if !self.place(lane, &payload) {
                self.outbound[usize::from(lane)].backlog.push_front(payload);
                break;
            }
            self.outbound[usize::from(lane)].backlog_bytes -= payload.len();
            moved += 1;
        }
        moved
    }
}
