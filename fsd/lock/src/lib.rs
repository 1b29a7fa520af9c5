//! The lock server and the lock client of verbfs, as pure state machines.
//!
//! No I/O, no clock, no thread: messages and *ticks* go in, effects come out in a vector,
//! and the volume carries them out in the order given. PROTOCOL.md is the reference.
//!
//! # Modes
//!
//! | | S | X | E (ATTR only) |
//! |---|---|---|---|
//! | may cache clean pages, attributes, entries | yes | yes | size lower bound |
//! | may dirty | no | yes | raise size, touch mtime |
//! | compatible with | S | nothing | E |
//!
//! | pin | needs | beside other pins of its node |
//! |---|---|---|
//! | [`PinKind::Shared`] | S (or X) | all but Exclusive |
//! | [`PinKind::Extend`] | E (or X) | all but Exclusive |
//! | [`PinKind::Write`] | X | all but Exclusive |
//! | [`PinKind::Exclusive`] | X | none on an overlapping range |
//!
//! | asked | holder has | the holder |
//! |---|---|---|
//! | S | X | keeps S; its dirty pages go home |
//! | S one-shot | X | keeps E, and is then glimpsed with all other holders of E |
//! | S one-shot | E | is glimpsed: frozen, read, thawed; keeps its lock |
//! | S | E | gives up |
//! | E | X | keeps E |
//! | E | S | gives up |
//! | X | S, E | gives up |
//! | X | X | gives up, or hands over page by page to the asker (DATA) |
//!
//! # The three rules everything rests on
//!
//! 1. **The server's record of a node is never weaker than what the node believes.** A release takes
//!    from the client first, a grant gives to the server first.
//! 2. **A grant never meets a fence.** The server grants a node nothing over a range it is revoking from
//!    that node; the node volunteers no range that it is asking for. So the range of a GRANT is always
//!    unfenced when it arrives, and the new grant simply supersedes older ones there.
//! 3. **A node's LOCK never overtakes its own RELEASE.** Lanes may be reordered, so a LOCK says how many
//!    releases preceded it and the server lets it wait for them. What a RELEASE carries (sizes, times)
//!    is therefore known when the request after it is answered.
//!
//! # Peers that lie
//!
//! Both machines judge a message before they act on it: who may say it of that resource, and whether it fits what they know.
//! A [`Violation`] changes nothing. What a liar says within these bounds can spoil only the resources it serves itself.

pub mod client;
mod ranges;
pub mod server;

pub use client::{
    ClientCounters, ClientEffect, ClientOptions, FenceId, GiveUpNeed, GrantView, LockClient, PinKind, PinRequest,
    PinToken, RevokePolicy, Vacated,
};
pub use server::{HolderView, LockServer, ServerCounters, ServerEffect, ServerOptions, WaiterView};

use verbfs_protocol::LockMessage;

/// Time as the machines see it: an ever rising count of whatever the volume ticks in.
pub type Tick = u64;

/// A message that no peer sends that keeps the protocol. It has changed nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Violation(pub &'static str);

impl std::fmt::Display for Violation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.0)
    }
}

impl std::error::Error for Violation {}

/// `Err(Violation(reason))` unless `lawful`.
pub(crate) fn require(lawful: bool, reason: &'static str) -> Result<(), Violation> {
    if lawful { Ok(()) } else { Err(Violation(reason)) }
}

/// Whether `message` is for a [`LockServer`]; all others are for a [`LockClient`].
pub fn is_for_server(message: &LockMessage) -> bool {
    use LockMessage::*;
    matches!(message, Lock { .. } | Cancel { .. } | Release { .. } | Taken { .. } | Refused { .. } | Glimpsed { .. })
}

/// Ways to be wrong, for tests that show that the tests would see it. All off: the machines as they are.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Mutations {
    /// Server: grant as soon as the revokes are sent.
    pub grant_before_release: bool,
    /// Server: answer a one-shot request without freezing anybody.
    pub skip_glimpse: bool,
    /// Server: grow over whatever is there.
    pub unclamped_growth: bool,
    /// Server: let a LOCK overtake the RELEASE before it.
    pub ignore_release_order: bool,
    /// Client: pins enter fenced ranges.
    pub skip_fence: bool,
    /// Client: a fence does not wait for pins.
    pub skip_drain: bool,
    /// Client: a granted range may go before the pin that asked for it ran.
    pub skip_reservation: bool,
    /// Client: answers a glimpse but goes on extending.
    pub skip_freeze: bool,
    /// Client: uses a handed over range before its pages are there.
    pub skip_fetch: bool,
    /// Client: takes the volume's word although a pin has been through the fence.
    pub skip_resweep: bool,
    /// Client: gives up ranges it is asking for.
    pub volunteer_asked: bool,
    /// Client: Exclusive pins do not exclude.
    pub skip_exclusion: bool,
}

/// A value that is no part of a state's identity (counters, time stamps): the model checker does not tell
/// states apart by it.
#[derive(Clone, Copy, Default)]
pub struct Uncompared<T>(pub T);

impl<T> PartialEq for Uncompared<T> {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}
impl<T> Eq for Uncompared<T> {}
impl<T> std::hash::Hash for Uncompared<T> {
    fn hash<H: std::hash::Hasher>(&self, _: &mut H) {}
}
impl<T: std::fmt::Debug> std::fmt::Debug for Uncompared<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}
impl<T> std::ops::Deref for Uncompared<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.0
    }
}
impl<T> std::ops::DerefMut for Uncompared<T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.0
    }
}
