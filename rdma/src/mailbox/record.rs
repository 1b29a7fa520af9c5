//! One record in a ring.
//!
//! ```text
//! byte  0  u32  sequence: the record's position in the lane, in units, low 32 bits     \
//!       4  u16  length: bytes after the header                                          | the head word,
//!       6  u8   kind: 1 inline, 2 staged, 3 skip to the ring's start                    | visible last
//!       7  u8   marker: never zero, so an empty unit is never a record                 /
//!       8  u32  CRC-32C of the record with this field zero
//!      12  u32  acknowledged: a position of the lane below, low 32 bits
//!      16  u8   lane acknowledged; 255: none
//!      17  u8   lane the record is on
//!      18  u8 x 6  zero
//!      24       the payload; of a staged record: offset u64, length u32, zero u32
//! ```
//! Sequence numbers count ring units, as TCP's count bytes: one number says both which record and where it lies. They run
//! through a session's whole life, over all its connections.

/// Bytes in a unit: a cache line. Every record starts on one, so a small one is one line's transfer.
pub const UNIT: usize = 64;
/// Bytes of a lane's ring: 16 full-sized inline records less one, several hundred small ones; five of them per peer stay in L2.
pub const RING_LENGTH: usize = 16 * 1024;
/// Units of a lane's ring.
pub const RING_UNITS: u64 = (RING_LENGTH / UNIT) as u64;
/// Bytes of a record's header.
pub const HEADER_LENGTH: usize = 24;
/// Longest payload that travels inside the ring, in bytes. A page's worth of message would fill the ring with four.
pub const INLINE_MAXIMUM: usize = 1024;
/// Longest payload, in bytes: one atomic read or write.
pub const PAYLOAD_MAXIMUM: usize = 1024 * 1024;
/// Bytes of a staged record's body.
pub const STAGED_LENGTH: usize = 16;
/// Units of the longest record.
pub const RECORD_UNITS_MAXIMUM: u64 = units(INLINE_MAXIMUM);

const _: () = assert!(RING_LENGTH.is_multiple_of(UNIT));
// The largest record fits behind the largest skip even when a quarter of the ring is not yet acknowledged (see `lane`).
const _: () = assert!(2 * RECORD_UNITS_MAXIMUM < RING_UNITS - RING_UNITS / 4);
// Half the sequence space tells old acknowledgements from new ones.
const _: () = assert!(RING_UNITS < u32::MAX as u64 / 2);
const _: () = assert!(STAGED_LENGTH <= INLINE_MAXIMUM && INLINE_MAXIMUM <= u16::MAX as usize);

const MARKER: u8 = 0xb7;
/// Acknowledges nothing.
pub(crate) const NO_LANE: u8 = 255;

/// Units of a record with `length` bytes after its header.
pub(crate) const fn units(length: usize) -> u64 {
    (HEADER_LENGTH + length).div_ceil(UNIT) as u64
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    Inline,
    Staged,
    Skip,
}

/// The head word, taken apart.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Head {
    pub(crate) sequence: u32,
    pub(crate) length: u16,
    pub(crate) kind: Kind,
}

impl Head {
    pub(crate) fn encode(self) -> u64 {
        let kind = match self.kind {
            Kind::Inline => 1u64,
            Kind::Staged => 2,
            Kind::Skip => 3,
        };
        u64::from(self.sequence) | u64::from(self.length) << 32 | kind << 48 | u64::from(MARKER) << 56
    }

    /// The record that should stand at `position`, or what is wrong with it.
    pub(crate) fn decode(word: u64, position: u64) -> Result<Head, &'static str> {
        if (word >> 56) as u8 != MARKER {
            return Err("a record without its marker");
        }
        let kind = match (word >> 48) as u8 {
            1 => Kind::Inline,
            2 => Kind::Staged,
            3 => Kind::Skip,
            _ => return Err("a record of no kind"),
        };
        let head = Head { sequence: word as u32, length: (word >> 32) as u16, kind };
        if head.sequence != position as u32 {
            return Err("a record out of sequence");
        }
        let length_fits = match kind {
            Kind::Inline => usize::from(head.length) <= INLINE_MAXIMUM,
            Kind::Staged => usize::from(head.length) == STAGED_LENGTH,
            Kind::Skip => head.length == 0,
        };
        if !length_fits || position % RING_UNITS + units(usize::from(head.length)) > RING_UNITS {
            return Err("a record of impossible length");
        }
        Ok(head)
    }

    /// How far the record reaches, in units, when it stands at `position`.
    pub(crate) fn advance(self, position: u64) -> u64 {
        match self.kind {
            Kind::Skip => RING_UNITS - position % RING_UNITS,
            _ => units(usize::from(self.length)),
        }
    }
}

/// The header, taken apart.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Header {
    pub(crate) head: Head,
    pub(crate) acknowledged: u32,
    pub(crate) acknowledged_lane: u8,
    pub(crate) lane: u8,
}

fn checksum(mut header: [u8; HEADER_LENGTH], body: &[u8]) -> u32 {
    header[8..12].fill(0);
    crc32c::crc32c_append(crc32c::crc32c(&header), body)
}

impl Header {
    /// The header's bytes in front of `body`.
    pub(crate) fn encode(self, body: &[u8]) -> [u8; HEADER_LENGTH] {
        let mut bytes = [0; HEADER_LENGTH];
        bytes[0..8].copy_from_slice(&self.head.encode().to_le_bytes());
        bytes[12..16].copy_from_slice(&self.acknowledged.to_le_bytes());
        bytes[16] = self.acknowledged_lane;
        bytes[17] = self.lane;
        let sum = checksum(bytes, body);
        bytes[8..12].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    /// Checks private copies of a header and its body. `head` is what the head word was when it was first seen.
    pub(crate) fn decode(
        bytes: &[u8; HEADER_LENGTH],
        body: &[u8],
        head: Head,
        lane: u8,
    ) -> Result<Header, &'static str> {
        let sum = u32::from_le_bytes(bytes[8..12].try_into().expect("four bytes"));
        if bytes[0..8] != head.encode().to_le_bytes() || sum != checksum(*bytes, body) {
            return Err("a record with a wrong checksum");
        }
        let header = Header {
            head,
            acknowledged: u32::from_le_bytes(bytes[12..16].try_into().expect("four bytes")),
            acknowledged_lane: bytes[16],
            lane: bytes[17],
        };
        if header.lane != lane || bytes[18..24] != [0; 6] {
            return Err("a record of another lane");
        }
        Ok(header)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_changed_byte_never_passes(
            body in proptest::collection::vec(any::<u8>(), 0..200),
            at in any::<prop::sample::Index>(),
            flip in 1u8..,
        ) {
            let head = Head { sequence: 7, length: body.len() as u16, kind: Kind::Inline };
            let header = Header { head, acknowledged: 3, acknowledged_lane: 2, lane: 1 };
            let bytes = header.encode(&body);
            prop_assert_eq!(Header::decode(&bytes, &body, head, 1), Ok(header));
            let mut whole = [bytes.as_slice(), body.as_slice()].concat();
            let at = at.index(whole.len());
            whole[at] ^= flip;
            let changed: [u8; HEADER_LENGTH] = whole[..HEADER_LENGTH].try_into().unwrap();
            prop_assert!(Header::decode(&changed, &whole[HEADER_LENGTH..], head, 1).is_err());
        }

        #[test]
        fn any_head_word_is_refused_or_stays_in_the_ring(word: u64, position: u64) {
            let position = position >> 1;
            for word in [word, word & !(0xffff << 48) | 0xb701 << 48, word & !(0xffff_ffff) | position & 0xffff_ffff] {
                if let Ok(head) = Head::decode(word, position) {
                    prop_assert!(position % RING_UNITS + head.advance(position) <= RING_UNITS);
                }
            }
        }
    }
}
