//! One-sided memory fabric and ring messages. Knows nothing of files.
//!
//! - [`fabric`]: what a provider promises: registered memory and one-sided operations with the order of an RC queue pair
//! - [`shm`]: the provider for daemons on one host
//! - [`verbs`]: the provider for RDMA devices
//! - [`handshake`]: the proof of the cluster key that precedes everything
//! - [`mailbox`]: sessions of ring messages, and their records
//! - [`endpoint`]: fabric and mailbox as the daemon uses them
//! - [`sync`]: the shared-memory algorithms, in a form that loom can check
//!
//! `cargo test -p verbfs-rdma` runs everything: unit and property tests, the conformance suite every provider must pass
//! (tests/conformance.rs), and loom (tests/loom.rs, no flags needed). examples/pingpong.rs measures round trips.

mod admission;
pub mod endpoint;
pub mod fabric;
pub mod handshake;
pub mod mailbox;
mod mapping;
pub mod shm;
pub mod sync;
pub mod verbs;

pub use endpoint::{Endpoint, EndpointConfig, Event, Limits, SendError, SessionLoss, Statistics};
pub use fabric::{Access, DisconnectReason, FenceError, PostError, Region, RemoteKey, WorkError};
pub use handshake::{ConnectError, Hello, Incarnation, Refusal};
pub use mailbox::record::{INLINE_MAXIMUM, PAYLOAD_MAXIMUM};
pub use mailbox::{LANES, Lane};

/// Work ids from here on are the mailbox's own.
pub const RESERVED_WORK_IDS: u64 = 0xffff << 48;
