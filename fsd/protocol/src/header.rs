//! The fixed-layout header in front of every message between nodes.
//!
//! The session, lane, sequence number, acknowledgement and credits of a message stand in the
//! mailbox record around it; this header says who speaks, in which view, and what follows.
//!
//! ```text
//!  0  u16  version           12  u32  source node incarnation
//!  2  u16  message type      16  u32  source daemon incarnation
//!  4  u32  view              20  u32  body length
//!  8  u16  source slot       24  body
//! 10  u16  zero
//! ```
//! Little endian throughout.

use crate::{DecodeError, PROTOCOL_VERSION, Slot};
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Header {
    pub version: U16,
    pub message_type: U16,
    pub view: U32,
    pub source_slot: U16,
    pub zero: U16,
    pub source_incarnation: U32,
    pub daemon_incarnation: U32,
    pub length: U32,
}

pub const HEADER_LENGTH: usize = 24;
const _: () = assert!(size_of::<Header>() == HEADER_LENGTH);

/// Who sends: constant for the life of a daemon but for the view.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source {
    pub slot: Slot,
    pub node_incarnation: u32,
    pub daemon_incarnation: u32,
    pub view: u32,
}

/// Writes the header over the first [`HEADER_LENGTH`] bytes of a record whose body stands behind them.
///
/// # Panics
/// If the record is shorter than a header.
pub(crate) fn put(record: &mut [u8], source: Source, message_type: u16) {
    let (bytes, body) = record.split_first_chunk_mut::<HEADER_LENGTH>().expect("room for the header");
    let header = Header {
        version: PROTOCOL_VERSION.into(),
        message_type: message_type.into(),
        view: source.view.into(),
        source_slot: source.slot.into(),
        zero: 0.into(),
        source_incarnation: source.node_incarnation.into(),
        daemon_incarnation: source.daemon_incarnation.into(),
        length: (body.len() as u32).into(),
    };
    bytes.copy_from_slice(header.as_bytes());
}

/// Puts the header in front of `body`, whatever that is.
pub fn frame(source: Source, message_type: u16, body: &[u8]) -> Vec<u8> {
    let mut record = vec![0; HEADER_LENGTH];
    record.extend_from_slice(body);
    put(&mut record, source, message_type);
    record
}

/// Splits a received record; version, reserved field and length are checked, the body is not looked at.
pub fn unframe(record: &[u8]) -> Result<(Source, u16, &[u8]), DecodeError> {
    let (header, body) = Header::ref_from_prefix(record).map_err(|_| DecodeError::Short(record.len()))?;
    if header.version.get() != PROTOCOL_VERSION {
        return Err(DecodeError::Version(header.version.get()));
    }
    if header.zero.get() != 0 {
        return Err(DecodeError::Reserved(header.zero.get()));
    }
    if header.length.get() as usize != body.len() {
        return Err(DecodeError::Length { header: header.length.get() as usize, record: body.len() });
    }
    let source = Source {
        slot: header.source_slot.get(),
        node_incarnation: header.source_incarnation.get(),
        daemon_incarnation: header.daemon_incarnation.get(),
        view: header.view.get(),
    };
    Ok((source, header.message_type.get(), body))
}
