//! What verbfs nodes say to each other: identifiers, lock messages, name-space
//! operations and the fixed-layout header in front of them.
//!
//! Header ([`header`]) and bodies have fixed layouts, little endian: the rules stand in [`wire`], the fields and their
//! order in the declarations of the types. What comes out of [`Message::from_record`] is well formed: lengths within
//! their limits, known variants, ranges that are ranges, nothing left over. What the values *mean* (an inode that does
//! not exist, a range outside a file) is checked by the receiver before use.

pub mod attributes;
pub mod header;
pub mod ids;
pub mod lock;
pub mod operation;
pub mod wire;

pub use attributes::*;
pub use ids::*;
pub use lock::LockMessage;
pub use operation::*;

/// The version of every layout in this crate. Peers of another version are refused at connection time.
pub const PROTOCOL_VERSION: u16 = 4;

/// A message could not be decoded: the peer that sent it loses its connection.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    #[error("record of {0} bytes is shorter than the header")]
    Short(usize),
    #[error("protocol version {0}, this node speaks {PROTOCOL_VERSION}")]
    Version(u16),
    #[error("message type {0} is unknown")]
    Type(u16),
    #[error("header says {header} bytes of body, record holds {record}")]
    Length { header: usize, record: usize },
    #[error("a reserved field of the header holds {0}, not zero")]
    Reserved(u16),
    #[error("body does not decode: {0}")]
    Body(#[from] wire::Malformed),
}
