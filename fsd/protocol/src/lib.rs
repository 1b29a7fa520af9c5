//! What verbfs nodes say to each other: identifiers, lock messages, name-space
//! operations and the fixed-layout header in front of them.
//!
//! The header is a fixed byte layout ([`header`]); bodies are encoded by
//! `postcard` from the types here (their bytes are not pinned by a test yet). Everything
//! that comes out of [`decode`] has been bounds-checked by the decoder; what the
//! values *mean* (an inode that does not exist, a range outside a file) is
//! checked by the receiver before use.

pub mod attributes;
pub mod header;
pub mod ids;
pub mod lock;
pub mod operation;

pub use attributes::*;
pub use ids::*;
pub use lock::LockMessage;
pub use operation::*;

/// The version of every layout in this crate. Peers of another version are refused at connection time.
pub const PROTOCOL_VERSION: u16 = 1;

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
    #[error("body does not decode: {0}")]
    Body(#[from] postcard::Error),
    #[error("{0} bytes follow the body")]
    Trailing(usize),
}

/// Encodes a body.
///
/// # Panics
/// Never for the types of this crate: they hold nothing that postcard cannot encode.
pub fn encode<T: serde::Serialize>(value: &T) -> Vec<u8> {
    postcard::to_stdvec(value).expect("types of this crate encode")
}

/// Decodes a body that must fill `bytes` exactly.
pub fn decode<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> Result<T, DecodeError> {
    let (value, rest) = postcard::take_from_bytes(bytes)?;
    if rest.is_empty() { Ok(value) } else { Err(DecodeError::Trailing(rest.len())) }
}
