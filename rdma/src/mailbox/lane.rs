//! The two ends of a lane.
//!
//! The sender keeps every record it has not seen acknowledged in its *outbox*, a private image of the receiver's ring, so
//! sending again after a reconnect is writing the same bytes to the same offsets. The receiver empties the units of a record
//! before it gives their credit back; a sender therefore always writes into empty units.
//!
//! Credit comes back on every record that travels the other way, and by a one-sided write once a quarter of the ring is
//! owed. So a sender never waits in vain: if it lacks room for the largest record, three quarters of the ring and more are
//! outstanding, and of those the receiver keeps less than one quarter to itself.

use std::collections::VecDeque;

use super::record::*;
use crate::fabric::Region;

/// Bytes of a lane's staging ring: a payload of the largest size always fits once those before it are acknowledged.
pub(crate) const STAGING_LENGTH: usize = 2 * PAYLOAD_MAXIMUM;
/// Units consumed before their credit is returned by a write of its own.
pub(crate) const CREDIT_RETURN_UNITS: u64 = RING_UNITS / 4;

/// The sending end.
#[derive(Debug, Default)]
pub(crate) struct Outbound {
    /// All positions in units from the session's start: acked <= posted <= head <= acked + RING_UNITS.
    pub(crate) head: u64,
    pub(crate) posted: u64,
    pub(crate) acked: u64,
    staging_head: u64,
    staging_tail: u64,
    /// For each staged record: the position behind it, and up to where the staging ring is free once that is acknowledged.
    staged: VecDeque<(u64, u64)>,
    pub(crate) backlog: VecDeque<Vec<u8>>,
    pub(crate) backlog_bytes: usize,
}

fn offset_of(lane: u8, position: u64) -> usize {
    usize::from(lane) * RING_LENGTH + (position % RING_UNITS) as usize * UNIT
}

impl Outbound {
    /// The record that the outbox holds at `position`: its byte offset, its length in bytes, and the position behind it.
    pub(crate) fn record(&self, outbox: &Region, lane: u8, position: u64) -> (usize, u32, u64) {
        let offset = offset_of(lane, position);
        let word = outbox.word(offset).load(std::sync::atomic::Ordering::Relaxed);
        let head = Head::decode(word, position).expect("the outbox is private to its session");
        (offset, (HEADER_LENGTH + usize::from(head.length)) as u32, position + head.advance(position))
    }

    fn put(&mut self, outbox: &Region, lane: u8, kind: Kind, body: &[u8], acknowledge: (u8, u32)) {
        let position = self.head;
        let head = Head { sequence: position as u32, length: body.len() as u16, kind };
        let header = Header { head, acknowledged: acknowledge.1, acknowledged_lane: acknowledge.0, lane };
        let offset = offset_of(lane, position);
        outbox.write_at(offset, &header.encode(body));
        outbox.write_at(offset + HEADER_LENGTH, body);
        self.head += head.advance(position);
    }

    fn free_units(&self) -> u64 {
        RING_UNITS - (self.head - self.acked)
    }

    fn stage(&mut self, staging: &Region, lane: u8, payload: &[u8]) -> Option<u64> {
        let capacity = STAGING_LENGTH as u64;
        let needed = payload.len().next_multiple_of(UNIT) as u64;
        let mut start = self.staging_head;
        if start % capacity + needed > capacity {
            start = start.next_multiple_of(capacity);
        }
        if start + needed - self.staging_tail > capacity {
            return None;
        }
        self.staging_head = start + needed;
        let offset = u64::from(lane) * capacity + start % capacity;
        staging.write_at(offset as usize, payload);
        Some(offset)
    }

    /// Puts a message into the outbox, if there is credit for it. `acknowledge` is taken only then.
    pub(crate) fn place(
        &mut self,
        outbox: &Region,
        staging: &Region,
        lane: u8,
        payload: &[u8],
        acknowledge: (u8, u32),
    ) -> bool {
        let inline = payload.len() <= INLINE_MAXIMUM;
        let needed = units(if inline { payload.len() } else { STAGED_LENGTH });
        let behind = RING_UNITS - self.head % RING_UNITS;
        let skip = if needed > behind { behind } else { 0 };
        if skip + needed > self.free_units() {
            return false;
        }
        let mut body = [0; STAGED_LENGTH];
        if !inline {
            let Some(offset) = self.stage(staging, lane, payload) else { return false };
            body[0..8].copy_from_slice(&offset.to_le_bytes());
            body[8..12].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        }
        if skip > 0 {
            self.put(outbox, lane, Kind::Skip, &[], (NO_LANE, 0));
        }
        if inline {
            self.put(outbox, lane, Kind::Inline, payload, acknowledge);
        } else {
            self.put(outbox, lane, Kind::Staged, &body, acknowledge);
            self.staged.push_back((self.head, self.staging_head));
        }
        debug_assert!(self.head - self.acked <= RING_UNITS);
        true
    }

    /// The receiver has everything before `position`. Older news is ignored.
    pub(crate) fn acknowledge(&mut self, outbox: &Region, lane: u8, position: u64) -> Result<(), &'static str> {
        if position <= self.acked {
            return Ok(());
        }
        if position > self.posted {
            return Err("an acknowledgement of what was not sent");
        }
        while self.acked < position {
            let (_, _, next) = self.record(outbox, lane, self.acked);
            if next > position {
                return Err("an acknowledgement of half a record");
            }
            self.acked = next;
        }
        while let Some((end, free)) = self.staged.front().copied()
            && end <= self.acked
        {
            self.staging_tail = free;
            self.staged.pop_front();
        }
        Ok(())
    }

    /// As `acknowledge`, with only the low half of the position.
    pub(crate) fn acknowledge_low(&mut self, outbox: &Region, lane: u8, low: u32) -> Result<(), &'static str> {
        let ahead = low.wrapping_sub(self.acked as u32);
        // A record sent again after a reconnect carries the acknowledgement it was born with: behind, and no news.
        if ahead >= u32::MAX / 2 { Ok(()) } else { self.acknowledge(outbox, lane, self.acked + u64::from(ahead)) }
    }

    /// A new connection: the receiver wants everything from `position` on.
    pub(crate) fn resume(&mut self, outbox: &Region, lane: u8, position: u64) -> Result<(), &'static str> {
        if position < self.acked {
            return Err("it forgot what it acknowledged");
        }
        // Of the old connection all that was posted may have arrived; a record not yet posted cannot.
        self.acknowledge(outbox, lane, position)?;
        self.posted = self.acked;
        Ok(())
    }
}

/// A payload on its way from the sender's staging area.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fetch {
    pub(crate) length: u32,
    /// Position behind its record.
    pub(crate) next: u64,
}

/// The receiving end.
#[derive(Debug, Default)]
pub(crate) struct Inbound {
    /// Position of the next record.
    pub(crate) consumed: u64,
    /// What the sender was told of it.
    pub(crate) told: u64,
    pub(crate) fetch: Option<Fetch>,
    /// Records announced by completion and not yet consumed; unused where memory is polled.
    pub(crate) announced: u64,
}

/// A record's content, copied out of reach of the sender.
#[derive(Debug)]
pub(crate) struct Taken {
    pub(crate) header: Header,
    pub(crate) body: Vec<u8>,
    /// Position behind it.
    pub(crate) next: u64,
}

impl Inbound {
    /// The head word of the next record; zero while there is none.
    #[inline]
    pub(crate) fn peek(&self, inbox: &Region, lane: u8) -> u64 {
        crate::sync::publication::observe(inbox.word(offset_of(lane, self.consumed)))
    }

    /// Copies the record with head word `word` out and checks it.
    pub(crate) fn take(&self, inbox: &Region, lane: u8, word: u64) -> Result<Taken, &'static str> {
        let head = Head::decode(word, self.consumed)?;
        let offset = offset_of(lane, self.consumed);
        let mut bytes = [0; HEADER_LENGTH];
        inbox.read_at(offset, &mut bytes);
        let body = inbox.to_vec(offset + HEADER_LENGTH, usize::from(head.length));
        let header = Header::decode(&bytes, &body, head, lane)?;
        Ok(Taken { header, body, next: self.consumed + head.advance(self.consumed) })
    }

    /// Empties the units up to `next` and moves there.
    pub(crate) fn consume(&mut self, inbox: &Region, lane: u8, next: u64) {
        debug_assert!(next > self.consumed && next - self.consumed <= RING_UNITS);
        for position in self.consumed..next {
            crate::sync::publication::clear(inbox.word(offset_of(lane, position)));
        }
        self.consumed = next;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fabric::{RegionInner, RemoteKey};
    use crate::mailbox::{INBOX_LENGTH, LANES};
    use crate::mapping::Mapping;
    use crate::sync::publication;
    use proptest::prelude::*;
    use std::os::fd::AsFd;
    use std::sync::Arc;

    fn region(length: usize) -> Region {
        let descriptor = crate::shm::socket::sealed_memory(length).unwrap();
        let mapping = Mapping::new(descriptor.as_fd(), length).unwrap();
        Region(Arc::new(RegionInner {
            registration: None,
            mapping: Arc::new(mapping),
            key: RemoteKey(0),
            descriptor: Some(Arc::new(descriptor)),
            sealed: true,
        }))
    }

    #[derive(Debug, Clone)]
    enum Step {
        Send(usize),
        Post,
        Receive,
        Acknowledge,
        AcknowledgeLow,
        /// A new connection: an empty inbox, and everything not consumed once more.
        Reconnect,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            6 => prop_oneof![0..100usize, 900..1025usize, 1025..2000usize].prop_map(Step::Send),
            6 => Just(Step::Post),
            6 => Just(Step::Receive),
            1 => Just(Step::Acknowledge),
            1 => Just(Step::AcknowledgeLow),
            1 => Just(Step::Reconnect),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(100))]
        /// Also where the sequence number's low half wraps.
        #[test]
        fn a_lane_delivers_everything_once(start in 0..2000u64, steps in proptest::collection::vec(step(), 1..600)) {
            const LANE: u8 = 3;
            let start = (u64::from(u32::MAX) - 1000 + start) / RING_UNITS * RING_UNITS + start % RING_UNITS;
            let (outbox, staging) = (region(INBOX_LENGTH), region(LANES * STAGING_LENGTH));
            let mut inbox = region(INBOX_LENGTH);
            let mut sender = Outbound { head: start, posted: start, acked: start, ..Outbound::default() };
            let mut receiver = Inbound { consumed: start, told: start, ..Inbound::default() };
            let (mut sent, mut got) = (VecDeque::new(), 0u64);
            let mut stale = start as u32;
            let mut number = 0u64;
            for step in steps {
                match step {
                    Step::Send(length) => {
                        let mut payload = vec![number as u8; length.max(8)];
                        payload[..8].copy_from_slice(&number.to_le_bytes());
                        if sender.place(&outbox, &staging, LANE, &payload, (NO_LANE, 0)) {
                            sent.push_back(payload);
                            number += 1;
                        }
                    }
                    Step::Post => {
                        while sender.posted < sender.head {
                            let (offset, length, next) = sender.record(&outbox, LANE, sender.posted);
                            let bytes = outbox.to_vec(offset, length as usize);
                            prop_assert_eq!(publication::observe(inbox.word(offset)), 0, "a unit in use");
                            inbox.write_at(offset + 8, &bytes[8..]);
                            publication::publish(inbox.word(offset), u64::from_le_bytes(bytes[..8].try_into().unwrap()));
                            sender.posted = next;
                        }
                    }
                    Step::Receive => {
                        let word = receiver.peek(&inbox, LANE);
                        if word != 0 {
                            let taken = receiver.take(&inbox, LANE, word).unwrap();
                            let payload = match taken.header.head.kind {
                                Kind::Skip => None,
                                Kind::Inline => Some(taken.body),
                                Kind::Staged => {
                                    let offset = u64::from_le_bytes(taken.body[0..8].try_into().unwrap());
                                    let length = u32::from_le_bytes(taken.body[8..12].try_into().unwrap());
                                    Some(staging.to_vec(offset as usize, length as usize))
                                }
                            };
                            if let Some(payload) = payload {
                                prop_assert_eq!(Some(payload), sent.pop_front());
                                got += 1;
                            }
                            receiver.consume(&inbox, LANE, taken.next);
                        }
                    }
                    Step::Acknowledge => sender.acknowledge(&outbox, LANE, receiver.consumed).unwrap(),
                    Step::AcknowledgeLow => {
                        sender.acknowledge_low(&outbox, LANE, receiver.consumed as u32).unwrap();
                        sender.acknowledge_low(&outbox, LANE, stale).unwrap();
                        stale = receiver.consumed as u32;
                    }
                    Step::Reconnect => {
                        inbox = region(INBOX_LENGTH);
                        sender.resume(&outbox, LANE, receiver.consumed).unwrap();
                    }
                }
                prop_assert!(sender.acked <= sender.posted && sender.posted <= sender.head);
                prop_assert!(sender.acked <= receiver.consumed);
            }
            prop_assert_eq!(got + sent.len() as u64, number);
        }
    }
}
