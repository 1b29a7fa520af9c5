//! Mutual proof of the cluster key, before any memory, key or descriptor changes hands.
//!
//! ```text
//! initiator                                acceptor
//!   hello, nonce                 ->
//!                                <-   hello, nonce        (or refusal: version, cluster, slot)
//!   HMAC("initiator", transcript) ->
//!                                <-   HMAC("acceptor", transcript, verdict), verdict
//! ```
//! The transcript is both hellos and both nonces, so nothing can be replayed, reflected or spliced. Verdicts that end a
//! session (stale, fenced) come under the acceptor's proof: a stranger on the socket cannot fake them.

use std::time::Instant;

use hmac::{Hmac, Mac};
use sha2::{Digest, Sha256};

const MAGIC: u64 = u64::from_le_bytes(*b"verbfs\x00\x01");
/// Changes whenever anything two daemons share in memory or on the socket changes its layout.
pub const VERSION: u32 = 1;
/// Bytes of a hello on the wire: magic 8, version 4, slot 2, zero 2, node incarnation 4, daemon incarnation 4, pid 4, zero 4, cluster 32.
const HELLO_LENGTH: usize = 64;
const NONCE_LENGTH: usize = 32;
const PROOF_LENGTH: usize = 32;
/// Largest handshake message in bytes.
pub(crate) const MESSAGE_LENGTH_MAXIMUM: usize = 128;
const _: () = assert!(HELLO_LENGTH + NONCE_LENGTH < MESSAGE_LENGTH_MAXIMUM);

/// Slots are numbered below this. Bounds the tables a stranger's hello can make us grow.
pub const SLOTS_MAXIMUM: u16 = 1024;

/// Who a node is: which life of the node, and which life of its daemon in it. Later lives compare greater.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Incarnation {
    pub node: u32,
    pub daemon: u32,
}

/// What each side says of itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Hello {
    pub version: u32,
    /// SHA-256 of the cluster's name.
    pub cluster: [u8; 32],
    pub slot: u16,
    pub incarnation: Incarnation,
    /// As its own process-id namespace numbers it: for logs only.
    pub pid: u32,
}

impl Hello {
    pub(crate) fn new(cluster: &str, slot: u16, incarnation: Incarnation) -> Hello {
        Hello {
            version: VERSION,
            cluster: Sha256::digest(cluster.as_bytes()).into(),
            slot,
            incarnation,
            pid: std::process::id(),
        }
    }

    pub(crate) fn encode(&self) -> [u8; HELLO_LENGTH] {
        let mut bytes = [0; HELLO_LENGTH];
        bytes[0..8].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.version.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.slot.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.incarnation.node.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.incarnation.daemon.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.pid.to_le_bytes());
        bytes[32..64].copy_from_slice(&self.cluster);
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Hello> {
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        if bytes.len() != HELLO_LENGTH || bytes[0..8] != MAGIC.to_le_bytes() {
            return None;
        }
        Some(Hello {
            version: word(8),
            slot: u16::from_le_bytes([bytes[12], bytes[13]]),
            incarnation: Incarnation { node: word(16), daemon: word(20) },
            pid: word(24),
            cluster: bytes[32..64].try_into().expect("thirty-two bytes"),
        })
    }
}

/// Why one side will not have the other.
#[derive(thiserror::Error, Debug, PartialEq, Eq, Clone, Copy)]
pub enum Refusal {
    #[error("another version of the protocol")]
    Version,
    #[error("another cluster")]
    Cluster,
    #[error("a wrong slot, or one that is no member")]
    Slot,
    #[error("the cluster key was not proved")]
    Key,
    #[error("a later incarnation of that node or daemon is known")]
    Stale,
    #[error("that incarnation was fenced")]
    Fenced,
}

impl Refusal {
    fn code(self) -> u8 {
        match self {
            Refusal::Version => 1,
            Refusal::Cluster => 2,
            Refusal::Slot => 3,
            Refusal::Key => 4,
            Refusal::Stale => 5,
            Refusal::Fenced => 6,
        }
    }
    fn from_code(code: u8) -> Option<Refusal> {
        [Refusal::Version, Refusal::Cluster, Refusal::Slot, Refusal::Key, Refusal::Stale, Refusal::Fenced]
            .into_iter()
            .find(|refusal| refusal.code() == code)
    }
}

/// Why a connection attempt came to nothing.
#[derive(thiserror::Error, Debug, PartialEq, Eq, Clone)]
pub enum ConnectError {
    /// Nobody listens there (yet): try again later.
    #[error("nobody listens at slot {0}")]
    NotListening(u16),
    #[error("slot {0} is our own or out of range")]
    InvalidSlot(u16),
    /// The peer will not have us.
    #[error("the peer refused us: {0}")]
    RefusedByPeer(Refusal),
    /// We will not have the peer.
    #[error("we refused the peer: {0}")]
    RefusedByUs(Refusal),
    #[error("the peer did not answer in time")]
    TimedOut,
    /// The peer has too many connection attempts under way: try again later.
    #[error("the peer is busy")]
    Busy,
    #[error("the peer's handshake made no sense")]
    Malformed,
    /// The connection ended between the handshake and the end of set-up: try again.
    #[error("the connection ended during set-up")]
    Broken,
    #[error("system error {0}")]
    System(i32),
}

/// A peer that has proved the cluster key, and a secret that only the two who proved it to each other know.
#[derive(Clone, Copy)]
pub(crate) struct Proved {
    pub(crate) hello: Hello,
    /// Names this one handshake. Whoever shows what is derived from it was part of it.
    pub(crate) binding: [u8; PROOF_LENGTH],
}

/// A socket that keeps message boundaries.
pub(crate) trait Channel {
    fn send(&mut self, message: &[u8]) -> Result<(), ConnectError>;
    /// Fills `buffer` with the next message and returns its length. `TimedOut` at `deadline`.
    fn receive(&mut self, buffer: &mut [u8], deadline: Instant) -> Result<usize, ConnectError>;
}

/// What we know before the handshake starts.
pub(crate) struct Identity<'a> {
    pub(crate) hello: &'a Hello,
    pub(crate) key: &'a [u8; 32],
    /// Whether an authenticated peer may connect.
    pub(crate) admit: &'a dyn Fn(u16, Incarnation) -> Result<(), Refusal>,
}

const KIND_HELLO: u8 = 1;
const KIND_REFUSAL: u8 = 2;
const KIND_PROOF: u8 = 3;

fn proof(key: &[u8; 32], role: &[u8; 9], transcript: &[u8], verdict: u8) -> Hmac<Sha256> {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("any key length is allowed");
    mac.update(role);
    mac.update(transcript);
    mac.update(&[verdict]);
    mac
}

fn hello_message(hello: &Hello) -> Result<Vec<u8>, ConnectError> {
    let mut nonce = [0; NONCE_LENGTH];
    getrandom::fill(&mut nonce).map_err(|_| ConnectError::System(libc::EIO))?;
    let mut message = vec![KIND_HELLO];
    message.extend_from_slice(&hello.encode());
    message.extend_from_slice(&nonce);
    Ok(message)
}

fn check_hello(us: &Hello, message: &[u8]) -> Result<Hello, ConnectError> {
    if message.len() != 1 + HELLO_LENGTH + NONCE_LENGTH || message[0] != KIND_HELLO {
        return Err(ConnectError::Malformed);
    }
    let hello = Hello::decode(&message[1..1 + HELLO_LENGTH]).ok_or(ConnectError::Malformed)?;
    if hello.version != us.version {
        return Err(ConnectError::RefusedByUs(Refusal::Version));
    }
    if hello.cluster != us.cluster {
        return Err(ConnectError::RefusedByUs(Refusal::Cluster));
    }
    if hello.slot == us.slot || hello.slot >= SLOTS_MAXIMUM {
        return Err(ConnectError::RefusedByUs(Refusal::Slot));
    }
    Ok(hello)
}

fn refusal_in(message: &[u8]) -> Option<ConnectError> {
    match message {
        [KIND_REFUSAL, code] => {
            Some(Refusal::from_code(*code).map_or(ConnectError::Malformed, ConnectError::RefusedByPeer))
        }
        _ => None,
    }
}

fn refuse(channel: &mut dyn Channel, error: ConnectError) -> ConnectError {
    if let ConnectError::RefusedByUs(refusal) = &error {
        // The refusal is a courtesy: whether it arrives changes nothing here.
        let _ = channel.send(&[KIND_REFUSAL, refusal.code()]);
    }
    error
}

fn proved(key: &[u8; 32], transcript: &[u8], hello: Hello) -> Proved {
    Proved { hello, binding: proof(key, b"binding\0\0", transcript, 0).finalize().into_bytes().into() }
}

/// The connecting side's half.
pub(crate) fn initiate(
    channel: &mut dyn Channel,
    us: &Identity<'_>,
    expected_slot: u16,
    deadline: Instant,
) -> Result<Proved, ConnectError> {
    let ours = hello_message(us.hello)?;
    channel.send(&ours)?;
    let mut buffer = [0; MESSAGE_LENGTH_MAXIMUM];
    let length = channel.receive(&mut buffer, deadline)?;
    let theirs = buffer[..length].to_vec();
    if let Some(error) = refusal_in(&theirs) {
        return Err(error);
    }
    let hello = check_hello(us.hello, &theirs)?;
    if hello.slot != expected_slot {
        return Err(ConnectError::RefusedByUs(Refusal::Slot));
    }
    let transcript = [ours, theirs].concat();
    let mut message = vec![KIND_PROOF];
    message.extend_from_slice(&proof(us.key, b"initiator", &transcript, 0).finalize().into_bytes());
    channel.send(&message)?;

    let length = channel.receive(&mut buffer, deadline)?;
    if let Some(error) = refusal_in(&buffer[..length]) {
        return Err(error);
    }
    if length != 2 + PROOF_LENGTH || buffer[0] != KIND_PROOF {
        return Err(ConnectError::Malformed);
    }
    let verdict = buffer[1];
    // `verify_slice` compares in constant time.
    proof(us.key, b"acceptor\0", &transcript, verdict)
        .verify_slice(&buffer[2..length])
        .map_err(|_| ConnectError::RefusedByUs(Refusal::Key))?;
    if verdict != 0 {
        return Err(Refusal::from_code(verdict).map_or(ConnectError::Malformed, ConnectError::RefusedByPeer));
    }
    (us.admit)(hello.slot, hello.incarnation).map_err(ConnectError::RefusedByUs)?;
    Ok(proved(us.key, &transcript, hello))
}

/// The listening side's half. `prepare` is called for a peer that is let in, before it can know that it is.
pub(crate) fn accept(
    channel: &mut dyn Channel,
    us: &Identity<'_>,
    deadline: Instant,
    prepare: &dyn Fn(&Proved),
) -> Result<Proved, ConnectError> {
    let mut buffer = [0; MESSAGE_LENGTH_MAXIMUM];
    let length = channel.receive(&mut buffer, deadline)?;
    let theirs = buffer[..length].to_vec();
    let hello = check_hello(us.hello, &theirs).map_err(|error| refuse(channel, error))?;
    let ours = hello_message(us.hello)?;
    channel.send(&ours)?;
    let transcript = [theirs, ours].concat();

    let length = channel.receive(&mut buffer, deadline)?;
    if length != 1 + PROOF_LENGTH || buffer[0] != KIND_PROOF {
        return Err(ConnectError::Malformed);
    }
    proof(us.key, b"initiator", &transcript, 0)
        .verify_slice(&buffer[1..length])
        .map_err(|_| refuse(channel, ConnectError::RefusedByUs(Refusal::Key)))?;
    let admitted = (us.admit)(hello.slot, hello.incarnation);
    let verdict = admitted.err().map_or(0, Refusal::code);
    let proved = proved(us.key, &transcript, hello);
    if admitted.is_ok() {
        prepare(&proved);
    }
    let mut message = vec![KIND_PROOF, verdict];
    message.extend_from_slice(&proof(us.key, b"acceptor\0", &transcript, verdict).finalize().into_bytes());
    channel.send(&message)?;
    admitted.map_err(ConnectError::RefusedByUs)?;
    Ok(proved)
}
