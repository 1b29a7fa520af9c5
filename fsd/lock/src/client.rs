//! The lock client.
use crate::Tick;
use verbfs_protocol::{GrantId, LockMessage, Mode, Node, Range, Resource, Slot, lock::Successor};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PinToken(pub u64);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FenceId(pub u64);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PinKind {
    /// Needs S.
    Shared,
    /// Needs E (ATTR only).
    Extend,
    /// Needs X; runs beside other pins of this node.
    Write,
    /// Needs X and excludes every other pin of this node on an overlapping range.
    Exclusive,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PinRequest {
    /// Never used twice.
    pub token: PinToken,
    pub resource: Resource,
    pub range: Range,
    /// What the grant may grow to; contains `range`.
    pub want: Range,
    pub kind: PinKind,
    /// The caller holds kernel page locks: may enter a fenced range until it is vacated.
    pub through_fence: bool,
    pub no_growth: bool,
    /// Fail with EAGAIN rather than wait.
    pub r#try: bool,
    /// Shared on ATTR: an answer without a lock will do ([`ClientEffect::Observed`]).
    pub one_shot: bool,
}

impl PinRequest {
    pub fn new(token: PinToken, resource: Resource, range: Range, kind: PinKind) -> PinRequest {
        PinRequest { token, resource, range, want: range, kind, through_fence: false, no_growth: false, r#try: false, one_shot: false }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ClientOptions {
    /// A DATA grant lives at least so many ticks before a revoke is obeyed (LESSONS 8).
    pub minimum_hold: Tick,
}
impl Default for ClientOptions {
    fn default() -> Self {
        ClientOptions { minimum_hold: 0 }
    }
}

/// What the volume did about a [`ClientEffect::Vacate`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Vacated {
    /// Dirty pages and attributes are home; what the kept mode does not allow is gone.
    WrittenBack,
    /// HANDOVER was sent to the successor; the pages stay here, unreadable, until [`ClientEffect::Dropped`].
    HandedOver,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClientEffect {
    Send { to: Slot, message: LockMessage },
    Pinned { token: PinToken },
    PinFailed { token: PinToken, errno: i32 },
    /// One-shot answer: the attributes travel outside; the token is done, no pin is held.
    Observed { token: PinToken },
    /// A fence over `range` has drained its pins. Write back, or hand over to `successor`, drop what `keep` does
    /// not allow, then call [`LockClient::vacated`]. May come again for the same fence, with a weaker `keep`,
    /// without the successor, or because a through-fence pin has been in: do the work again.
    Vacate { fence: FenceId, resource: Resource, range: Range, held: Mode, grant: GrantId, keep: Option<Mode>, successor: Option<Successor> },
    /// Granted; comes before any Pinned that rests on it. `fresh`: the parts of `range` that were not held before.
    Acquired { resource: Resource, range: Range, mode: Mode, grant: GrantId, fresh: Vec<Range> },
    /// Pages of `range` come from `from` once its HANDOVER message is there; then call [`LockClient::fetched`].
    /// If [`ClientEffect::Acquired`] for `grant` comes first, storage is current and nothing is to be fetched.
    AwaitHandOver { grant: GrantId, resource: Resource, range: Range, from: Successor },
    /// A hand-over has ended: the pages kept for it may be freed.
    Dropped { resource: Resource, range: Range, grant: GrantId },
    /// The server lost this grant: drop the pages; dirty ones are EIO.
    Lost { resource: Resource, range: Range, grant: GrantId, mode: Mode },
}

pub trait RevokePolicy {
    /// The range to give up for a revoke that needs `need` and could use `want`: contains `need`, lies
    /// within `granted`. Typically `need`, grown over neighbours where the node caches nothing.
    fn give_up(&mut self, resource: Resource, granted: Range, need: Range, want: Range) -> Range;
}

/// Gives up exactly what is needed.
pub struct GiveUpNeed;
impl RevokePolicy for GiveUpNeed {
    fn give_up(&mut self, _resource: Resource, _granted: Range, need: Range, _want: Range) -> Range {
        need
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClientCounters {
    pub pins: u64,
    /// Pins that found their lock.
    pub hits: u64,
    pub requests: u64,
    pub grants: u64,
    pub revokes: u64,
    pub resweeps: u64,
    pub releases: u64,
    pub hand_overs_given: u64,
    pub hand_overs_taken: u64,
    pub glimpses: u64,
    pub trimmed: u64,
}

/// One range this node holds, for `verbfs locks`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GrantView {
    pub resource: Resource,
    pub range: Range,
    pub grant: GrantId,
    pub mode: Mode,
    pub fenced: bool,
    pub incoming: bool,
    pub in_transit: bool,
    pub frozen: bool,
    pub pins: usize,
}

pub struct LockClient {
    counters: ClientCounters,
}

impl LockClient {
    pub fn new(_node: Node, _options: ClientOptions) -> Self {
        todo!()
    }
    /// Wants a pin. True: pinned at once (no effect says so). False: Pinned, PinFailed or Observed follows.
    pub fn pin(&mut self, _request: PinRequest, _now: Tick, _effects: &mut Vec<ClientEffect>) -> bool {
        todo!()
    }
    /// Ends a pin, or gives up waiting for it.
    pub fn unpin(&mut self, _token: PinToken, _now: Tick, _effects: &mut Vec<ClientEffect>) {
        todo!()
    }
    pub fn handle(&mut self, _from: Slot, _message: LockMessage, _now: Tick, _policy: &mut dyn RevokePolicy, _effects: &mut Vec<ClientEffect>) {
        todo!()
    }
    /// The volume has done what Vacate asked. False: not accepted, Vacate comes again.
    pub fn vacated(&mut self, _fence: FenceId, _outcome: Vacated, _now: Tick, _effects: &mut Vec<ClientEffect>) -> bool {
        todo!()
    }
    /// The pages of a hand-over have been read (`ok`) or cannot be.
    pub fn fetched(&mut self, _grant: GrantId, _ok: bool, _now: Tick, _effects: &mut Vec<ClientEffect>) {
        todo!()
    }
    /// Obeys revokes whose minimum hold is over.
    pub fn tick(&mut self, _now: Tick, _policy: &mut dyn RevokePolicy, _effects: &mut Vec<ClientEffect>) {
        todo!()
    }
    /// When `tick` has something to do.
    pub fn next_due(&self) -> Option<Tick> {
        todo!()
    }
    /// Gives up least recently used unpinned grants until at most so many ranges are held.
    pub fn trim(&mut self, _keep_at_most: usize, _effects: &mut Vec<ClientEffect>) {
        todo!()
    }
    pub fn server_lost(&mut self, _slot: Slot, _effects: &mut Vec<ClientEffect>) {
        todo!()
    }
    pub fn server_back(&mut self, _slot: Slot, _now: Tick, _effects: &mut Vec<ClientEffect>) {
        todo!()
    }
    /// The grant under an active pin was lost: what was done under it is void.
    pub fn is_broken(&self, _token: PinToken) -> bool {
        todo!()
    }
    pub fn is_pinned(&self, _token: PinToken) -> bool {
        todo!()
    }
    /// Weakest mode over all of `range`, if all of it is held (fenced or not).
    pub fn held(&self, _resource: Resource, _range: Range) -> Option<Mode> {
        todo!()
    }
    pub fn grants(&self) -> impl Iterator<Item = GrantView> + '_ {
        std::iter::empty()
    }
    /// Ranges held.
    pub fn len(&self) -> usize {
        todo!()
    }
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
    pub fn counters(&self) -> &ClientCounters {
        &self.counters
    }
}
