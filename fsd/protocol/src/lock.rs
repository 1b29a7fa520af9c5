//! Lock messages (PROTOCOL.md, Messages), without the attributes and layouts that
//! travel with some of them: those are attached by the volume, see [`crate::operation::Envelope`].

use crate::wire::{ErrorNumber, wire};
use crate::{GrantId, Mode, Range, RequestId, Resource, Slot};

wire! {
    /// How a LOCK wants to be treated.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub flags LockFlags {
        /// Deny with EAGAIN rather than wait.
        pub r#try = 1,
        /// Grant exactly `need`.
        pub no_growth = 2,
        /// ATTR S only: where E or X holders are, answer once by a glimpse instead of taking their locks away.
        pub one_shot = 4,
    }

    /// The next holder of a range whose pages it will fetch from the present holder.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct Successor {
        pub slot: Slot,
        pub grant: GrantId,
    }

    /// One lock message. The lane is that of [`LockMessage::lane`].
    #[derive(Clone, Debug, PartialEq, Eq, Hash)]
    pub enum LockMessage {
        // ---- client to server, lane LOCK
        /// `after_releases`: how many RELEASEs this node sent to this server before; the server handles those first,
        /// whatever the order in which the lanes deliver.
        Lock = 1 {
            request: RequestId,
            resource: Resource,
            mode: Mode,
            need: Range,
            want: Range,
            flags: LockFlags,
            upgrade: Option<GrantId>,
            after_releases: u64,
        },
        Cancel = 2 {
            request: RequestId,
            resource: Resource,
        },
        // ---- server to client, lane CTRL
        /// `from`: the old holder (slot, grant) from which HANDOVER will come; without it the storage is current.
        Grant = 3 {
            request: RequestId,
            grant: GrantId,
            resource: Resource,
            range: Range,
            mode: Mode,
            from: Option<Successor>,
        },
        Deny = 4 {
            request: RequestId,
            errno: i32 as ErrorNumber,
        },
        /// Answer to a one-shot request: nothing is granted, the attributes travel in the envelope.
        Observed = 5 {
            request: RequestId,
        },
        /// `keep`: the mode the holder may keep on `need` (after writing back); `want`: what the waiter could use beyond `need`.
        Revoke = 6 {
            grant: GrantId,
            resource: Resource,
            revoke_sequence: u32,
            need: Range,
            want: Range,
            keep: Option<Mode>,
            successor: Option<Successor>,
        },
        Glimpse = 7 {
            grant: GrantId,
            resource: Resource,
            round: u32,
        },
        Thaw = 8 {
            grant: GrantId,
            resource: Resource,
            round: u32,
        },
        /// To the old holder: the successor has the pages.
        Done = 9 {
            grant: GrantId,
            resource: Resource,
            range: Range,
        },
        /// To the old holder: the successor is gone; flush and release.
        HandBack = 10 {
            grant: GrantId,
            resource: Resource,
            range: Range,
        },
        /// Give back about `count` grants, least recently used first.
        Recall = 11 {
            count: u32,
        },
        // ---- client to server, lane ACK
        /// Gives up `range` of `grant`, or keeps it in mode `keep`. The attributes the holder changed travel in the envelope.
        Release = 12 {
            grant: GrantId,
            resource: Resource,
            range: Range,
            keep: Option<Mode>,
            revoke_sequence: u32,
        },
        Taken = 13 {
            grant: GrantId,
            resource: Resource,
        },
        Refused = 14 {
            grant: GrantId,
            resource: Resource,
        },
        Glimpsed = 15 {
            grant: GrantId,
            resource: Resource,
            round: u32,
        },
        // ---- server to successor, lane IO
        Probe = 16 {
            grant: GrantId,
            resource: Resource,
        },
    }
}

/// The lanes of a pair of nodes, in order: handling a message may wait only on later lanes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Lane {
    Ns = 0,
    Lock = 1,
    Ctrl = 2,
    Io = 3,
    Ack = 4,
}

impl LockMessage {
    pub fn lane(&self) -> Lane {
        use LockMessage::*;
        match self {
            Lock { .. } | Cancel { .. } => Lane::Lock,
            Grant { .. }
            | Deny { .. }
            | Observed { .. }
            | Revoke { .. }
            | Glimpse { .. }
            | Thaw { .. }
            | Done { .. }
            | HandBack { .. }
            | Recall { .. } => Lane::Ctrl,
            Release { .. } | Taken { .. } | Refused { .. } | Glimpsed { .. } => Lane::Ack,
            Probe { .. } => Lane::Io,
        }
    }
}
