//! The lock client: what this node holds, of all servers, and the pins that rest on it.
//!
//! Only pins block: an operation pins its ranges in locking order, works, and unpins; the lock stays
//! cached until a REVOKE comes. A pin that finds no lock holds nothing while it waits.
//!
//! ```text
//! pin, not covered     LOCK, once the pin could run but for the lock; the request is recorded first
//! GRANT                HELD; the pin that asked is *reserved*: fences wait for it as if it ran already
//! GRANT(from)          INCOMING: AwaitHandOver, fetched() -> TAKEN -> HELD; revokes are remembered till then
//! REVOKE               after the minimum hold: FENCED over what must go (the policy may add neighbours)
//! FENCED               new pins wait; when those inside have drained: Vacate; the volume works; vacated():
//!                      WrittenBack -> RELEASE, rest HELD in the kept mode or gone
//!                      HandedOver  -> TRANSIT; DONE -> Dropped; HANDBACK -> Vacate again -> RELEASE
//! GLIMPSE              wait for pins that extend, freeze, GLIMPSED; THAW
//! ```
//!
//! Why REVOKE needs no "killed" and no "clamp" mark on a request that is still out: GRANT and REVOKE come in
//! one first-in-first-out lane, so a revoke never arrives before the grant it means. What remains of the
//! race is that the grant goes before the pin that asked ran; the reservation settles that.
//!
//! Passing a fence: a caller that holds kernel page locks must not wait for the very revoke that wants those
//! pages. Its `through_fence` pin enters the still held range; the sweep is then done again. A pin of class
//! OPEN joins others that are inside. (A frozen ATTR stops `through_fence` pins too: do not take
//! Extend pins with page locks held.)

use crate::ranges::RangeMap;
use crate::server::{EAGAIN, ECANCELED, weaker};
use crate::{Mutations, Tick, Uncompared, Violation, require};
use std::collections::{BTreeMap, BTreeSet};
use verbfs_protocol::lock::{LockFlags, Successor};
use verbfs_protocol::{Class, GrantId, LockMessage, Mode, Node, Range, RequestId, Resource, Slot};

/// Resources used so lately are not put in order among themselves.
const RECENT: u64 = 64;

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
        PinRequest {
            token,
            resource,
            range,
            want: range,
            kind,
            through_fence: false,
            no_growth: false,
            r#try: false,
            one_shot: false,
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct ClientOptions {
    /// A DATA grant lives at least so many ticks before a revoke is obeyed (LESSONS 8).
    pub minimum_hold: Tick,
    #[doc(hidden)]
    pub mutations: Mutations,
}

/// What the volume did about a [`ClientEffect::Vacate`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Vacated {
    /// Dirty pages and attributes are home; what the kept mode does not allow is gone.
    WrittenBack,
    /// All is ready for the successor; the pages stay here, unreadable, until [`ClientEffect::Dropped`].
    /// HANDOVER is sent *after* [`LockClient::vacated`] has accepted this, never before: a through-fence
    /// pin may have written meanwhile, or the successor may be gone.
    HandedOver,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClientEffect {
    Send {
        to: Slot,
        message: LockMessage,
    },
    Pinned {
        token: PinToken,
    },
    PinFailed {
        token: PinToken,
        errno: i32,
    },
    /// One-shot answer: the attributes travel outside; the token is done, no pin is held.
    Observed {
        token: PinToken,
    },
    /// A fence over `range` has drained its pins. Write back, or hand over to `successor`, drop what `keep` does
    /// not allow, then call [`LockClient::vacated`]. May come again for the same fence, with a weaker `keep`,
    /// without the successor, or because a through-fence pin has been in: do the work again.
    Vacate {
        fence: FenceId,
        resource: Resource,
        range: Range,
        held: Mode,
        grant: GrantId,
        keep: Option<Mode>,
        successor: Option<Successor>,
        /// When what goes was granted.
        since: Uncompared<Tick>,
    },
    /// Granted; comes before any Pinned that rests on it. `fresh`: the parts of `range` that were not held before.
    Acquired {
        resource: Resource,
        range: Range,
        mode: Mode,
        grant: GrantId,
        fresh: Vec<Range>,
    },
    /// Pages of `range` come from `from` once its HANDOVER message is there; then call [`LockClient::fetched`].
    /// If [`ClientEffect::Acquired`] for `grant` comes first, storage is current: what was fetched must not be used.
    AwaitHandOver {
        grant: GrantId,
        resource: Resource,
        range: Range,
        from: Successor,
    },
    /// A hand-over has ended: the pages kept for it may be freed.
    Dropped {
        resource: Resource,
        range: Range,
        grant: GrantId,
    },
    /// The server lost this grant: drop the pages; dirty ones are EIO.
    Lost {
        resource: Resource,
        range: Range,
        grant: GrantId,
        mode: Mode,
    },
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

impl PinKind {
    pub fn mode(self) -> Mode {
        match self {
            PinKind::Shared => Mode::S,
            PinKind::Extend => Mode::E,
            PinKind::Write | PinKind::Exclusive => Mode::X,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum State {
    Held,
    Fenced(FenceId),
    /// Granted, but the pages are still with the old holder.
    Incoming,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Piece {
    grant: GrantId,
    mode: Mode,
    state: State,
    since: Uncompared<Tick>,
}

fn alike(a: &Piece, b: &Piece) -> bool {
    a == b && a.state == State::Held
}

/// Exactly one piece is fenced by each fence; they begin and end together.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Fence {
    range: Range,
    grant: GrantId,
    keep: Option<Mode>,
    successor: Option<Successor>,
    revoke_sequence: u32,
    /// Vacate was emitted, with this `keep`.
    vacating: Option<Option<Mode>>,
    /// A pin has been through since.
    resweep: bool,
    /// No pin may come through any more (its pages were handed over and back).
    sealed: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Request {
    sequence: u64,
    need: Range,
    want: Range,
    mode: Mode,
    flags: LockFlags,
    asker: Option<PinToken>,
    cancelled: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Revoke {
    grant: GrantId,
    need: Range,
    want: Range,
    keep: Option<Mode>,
    successor: Option<Successor>,
    revoke_sequence: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Incoming {
    range: Range,
    refused: bool,
    revokes: Vec<Revoke>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Transit {
    grant: GrantId,
    range: Range,
    revoke_sequence: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Pin {
    request: PinRequest,
    /// Waiting: the grant it asked for is here and must serve it before it goes.
    reserved: bool,
    broken: bool,
}

/// All this node knows of one resource.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Local {
    pieces: RangeMap<Piece>,
    fences: BTreeMap<FenceId, Fence>,
    incoming: BTreeMap<GrantId, Incoming>,
    transits: Vec<Transit>,
    active: Vec<Pin>,
    waiting: Vec<Pin>,
    requests: Vec<Request>,
    /// Rounds of glimpses that froze a grant, from GLIMPSE to THAW.
    frozen: Vec<(GrantId, u32)>,
    /// Of those, the ones not answered yet.
    unanswered: Vec<(GrantId, u32)>,
    /// Revokes that wait for the minimum hold.
    deferred: Vec<(Uncompared<Tick>, Revoke)>,
    counted: Uncompared<usize>,
    used: Uncompared<u64>,
}

enum Coverage {
    Usable,
    /// Something local must end first: a fence, a glimpse, a fetch.
    Blocked,
    Missing,
}

fn exclude(a: &PinRequest, b: &PinRequest) -> bool {
    (a.kind == PinKind::Exclusive || b.kind == PinKind::Exclusive) && a.range.overlaps(b.range)
}

impl Local {
    fn is_unused(&self) -> bool {
        self.pieces.is_empty()
            && self.active.is_empty()
            && self.waiting.is_empty()
            && self.requests.is_empty()
            && self.transits.is_empty()
            && self.deferred.is_empty()
    }

    fn coverage(&self, pin: &Pin, class: Class, mutations: &Mutations) -> Coverage {
        let PinRequest { range, kind, through_fence, .. } = pin.request;
        let (mut at, mut missing, mut blocked) = (range.lo, false, false);
        for (held, piece) in self.pieces.overlapping(range) {
            missing |= held.lo > at;
            at = held.hi;
            let covers = piece.mode.covers(kind.mode());
            match piece.state {
                State::Incoming => blocked = true,
                State::Held => missing |= !covers,
                State::Fenced(id) => {
                    let fence = &self.fences[&id];
                    let joins = class == Class::Open
                        && self.active.iter().any(|active| active.request.range.overlaps(fence.range));
                    blocked |=
                        !covers || !(through_fence && !fence.sealed || pin.reserved || joins || mutations.skip_fence);
                }
            }
            let frozen = self.frozen.iter().any(|&(grant, _)| grant == piece.grant);
            blocked |= frozen && piece.mode == Mode::E && kind == PinKind::Extend && !mutations.skip_freeze;
        }
        missing |= at < range.hi;
        match (blocked, missing) {
            (true, _) => Coverage::Blocked,
            (_, true) => Coverage::Missing,
            _ => Coverage::Usable,
        }
    }

    /// Whether other pins of this node let it run. `earlier`: how many of the waiting came before.
    fn runs_beside(&self, pin: &Pin, class: Class, earlier: usize, mutations: &Mutations) -> bool {
        if mutations.skip_exclusion {
            return true;
        }
        let excluded = |other: &Pin| exclude(&pin.request, &other.request);
        !self.active.iter().any(excluded)
            && (pin.reserved
                || pin.request.through_fence
                // Whoever has a file open opens it again, past the last unlink that waits for its close.
                || (class == Class::Open && !self.active.is_empty())
                || !self.waiting[..earlier].iter().any(excluded))
    }

    /// Whether the answer to `request` will do for `pin`.
    fn serves(request: &Request, pin: &PinRequest) -> bool {
        !request.cancelled
            && !request.flags.one_shot
            && !request.flags.r#try
            && !pin.r#try
            && request.need.contains(pin.range)
            && request.mode.covers(pin.kind.mode())
    }

    /// The largest part of `range` around `core` that touches none of `obstacles`.
    fn around(mut range: Range, core: Range, obstacles: impl Iterator<Item = Range>) -> Range {
        for obstacle in obstacles {
            if obstacle.lo < core.hi && obstacle.hi > range.lo {
                range.lo = obstacle.hi.min(core.lo);
            }
            if obstacle.hi > core.lo && obstacle.lo < range.hi {
                range.hi = obstacle.lo.max(core.hi);
            }
        }
        range
    }

    fn in_motion(&self) -> impl Iterator<Item = Range> {
        let fences = self.fences.values().map(|fence| fence.range);
        let incoming = self.incoming.values().map(|incoming| incoming.range);
        fences.chain(incoming).chain(self.transits.iter().map(|transit| transit.range))
    }

    fn assert_invariants(&self) {
        if !cfg!(debug_assertions) {
            return;
        }
        for (index, pin) in self.active.iter().enumerate().filter(|(_, pin)| !pin.broken) {
            // Invariant 1: who runs holds.
            let range = pin.request.range;
            let covered = self
                .pieces
                .overlapping(range)
                .all(|(_, piece)| piece.mode.covers(pin.request.kind.mode()) && piece.state != State::Incoming);
            debug_assert!(
                covered && self.pieces.gaps(range).is_empty(),
                "{pin:?} runs without its lock: {:?}",
                self.pieces
            );
            debug_assert!(
                self.active[..index].iter().all(|other| !exclude(&pin.request, &other.request)),
                "{pin:?} does not run alone"
            );
        }
        for (range, piece) in self.pieces.iter().take(64) {
            if let State::Fenced(id) = piece.state {
                debug_assert_eq!((self.fences[&id].range, self.fences[&id].grant), (range, piece.grant));
            }
        }
    }
}

/// The locks of one node.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct LockClient {
    node: Node,
    options: ClientOptions,
    locals: BTreeMap<Resource, Box<Local>>,
    tokens: BTreeMap<PinToken, Resource>,
    fences: BTreeMap<FenceId, Resource>,
    /// Requests that are out, by sequence: their answers do not all name the resource.
    asked: BTreeMap<u64, Resource>,
    incoming: BTreeMap<GrantId, Resource>,
    deferred: BTreeSet<(Tick, Resource)>,
    down: BTreeSet<Slot>,
    releases_sent: BTreeMap<Slot, u64>,
    last_request: u64,
    last_fence: u64,
    last_use: Uncompared<u64>,
    least_recent: Uncompared<BTreeMap<u64, Resource>>,
    ranges: Uncompared<usize>,
    counters: Uncompared<ClientCounters>,
}

type Effects = Vec<ClientEffect>;

fn send(effects: &mut Effects, to: Slot, message: LockMessage) {
    effects.push(ClientEffect::Send { to, message });
}

impl LockClient {
    pub fn new(node: Node, options: ClientOptions) -> Self {
        LockClient {
            node,
            options,
            locals: BTreeMap::new(),
            tokens: BTreeMap::new(),
            fences: BTreeMap::new(),
            asked: BTreeMap::new(),
            incoming: BTreeMap::new(),
            deferred: BTreeSet::new(),
            down: BTreeSet::new(),
            releases_sent: BTreeMap::new(),
            last_request: 0,
            last_fence: 0,
            last_use: Uncompared(0),
            least_recent: Uncompared::default(),
            ranges: Uncompared(0),
            counters: Uncompared::default(),
        }
    }

    /// Wants a pin. True: pinned at once (no effect says so). False: Pinned, PinFailed or Observed follows.
    pub fn pin(&mut self, request: PinRequest, _now: Tick, effects: &mut Effects) -> bool {
        debug_assert!(!request.range.is_empty());
        debug_assert!(request.kind != PinKind::Extend || request.resource.class == Class::Attr);
        debug_assert!(!request.one_shot || (request.kind == PinKind::Shared && request.resource.class == Class::Attr));
        let resource = request.resource;
        let known = self.tokens.insert(request.token, resource);
        debug_assert!(known.is_none(), "a token is used once");
        self.counters.pins += 1;
        let local = self.locals.entry(resource).or_default();
        let pin = Pin { request, reserved: false, broken: false };
        let beside = local.runs_beside(&pin, resource.class, local.waiting.len(), &self.options.mutations);
        if beside && let Coverage::Usable = local.coverage(&pin, resource.class, &self.options.mutations) {
            self.counters.hits += 1;
            Self::enter(local, pin);
            self.touch(resource);
            return true;
        }
        local.waiting.push(pin);
        self.progress(resource, effects);
        false
    }

    fn enter(local: &mut Local, pin: Pin) {
        for fence in local.fences.values_mut() {
            fence.resweep |= fence.vacating.is_some() && fence.range.overlaps(pin.request.range);
        }
        local.active.push(pin);
    }

    /// Notes that a resource was used. What is among the last [`RECENT`] stays where it is: the order only says what to trim.
    fn touch(&mut self, resource: Resource) {
        let Some(local) = self.locals.get_mut(&resource) else { return };
        if *local.used != 0 && *self.last_use - *local.used < RECENT {
            return;
        }
        *self.last_use += 1;
        if *local.used != 0 {
            self.least_recent.remove(&*local.used);
        }
        *local.used = *self.last_use;
        self.least_recent.insert(*self.last_use, resource);
    }

    /// Ends a pin, or gives up waiting for it.
    pub fn unpin(&mut self, token: PinToken, _now: Tick, effects: &mut Effects) {
        let Some(resource) = self.tokens.remove(&token) else { return };
        let local = self.locals.get_mut(&resource).expect("it has a pin");
        if let Some(index) = local.active.iter().position(|pin| pin.request.token == token) {
            local.active.swap_remove(index);
            self.touch(resource);
        } else {
            local.waiting.retain(|pin| pin.request.token != token);
            self.abandon(resource, token, effects);
        }
        self.progress(resource, effects);
    }

    /// Nobody waits as `token` any more: its request goes to another pin it would serve, or is cancelled.
    fn abandon(&mut self, resource: Resource, token: PinToken, effects: &mut Effects) {
        let local = self.locals.get_mut(&resource).expect("it has requests");
        for request in local.requests.iter_mut().filter(|request| request.asker == Some(token)) {
            let heir = local.waiting.iter().find(|pin| Local::serves(request, &pin.request));
            request.asker = heir.map(|pin| pin.request.token);
            if heir.is_none() && !request.cancelled {
                request.cancelled = true;
                let request = RequestId { node: self.node, sequence: request.sequence };
                send(effects, resource.server, LockMessage::Cancel { request, resource });
            }
        }
    }

    /// Lets run what may run, asks for what is missing, and finishes fences and glimpses that have drained.
    fn progress(&mut self, resource: Resource, effects: &mut Effects) {
        let mutations = self.options.mutations;
        let mut again = true;
        while again {
            again = false;
            let mut index = 0;
            while let Some(local) = self.locals.get_mut(&resource)
                && let Some(pin) = local.waiting.get(index)
            {
                if !local.runs_beside(pin, resource.class, index, &mutations) {
                    if pin.request.r#try {
                        self.fail(resource, index, EAGAIN, effects);
                    } else {
                        index += 1;
                    }
                    continue;
                }
                match local.coverage(pin, resource.class, &mutations) {
                    Coverage::Usable => {
                        let pin = local.waiting.remove(index);
                        effects.push(ClientEffect::Pinned { token: pin.request.token });
                        Self::enter(local, pin);
                        self.touch(resource);
                        // OPEN: others may join it.
                        again |= resource.class == Class::Open;
                        continue;
                    }
                    Coverage::Blocked if pin.request.r#try => {
                        self.fail(resource, index, EAGAIN, effects);
                        continue;
                    }
                    Coverage::Blocked => {}
                    Coverage::Missing => self.ask(resource, index, effects),
                }
                index += 1;
            }
        }
        let Some(local) = self.locals.get_mut(&resource) else { return };
        for (&id, fence) in local.fences.iter_mut().filter(|(_, fence)| fence.vacating.is_none()) {
            let inside = |pin: &Pin| pin.request.range.overlaps(fence.range);
            let reserved = local.waiting.iter().any(|pin| pin.reserved && inside(pin));
            let pinned = local.active.iter().any(|pin| inside(pin) && !pin.broken);
            if !reserved && (!pinned || mutations.skip_drain) {
                fence.vacating = Some(fence.keep);
                fence.resweep = false;
                let piece = local.pieces.overlapping(fence.range).next().expect("a fence stands on a piece").1;
                let (held, since) = (piece.mode, piece.since);
                let Fence { range, grant, keep, successor, .. } = *fence;
                effects.push(ClientEffect::Vacate { fence: id, resource, range, held, grant, keep, successor, since });
            }
        }
        let extending = local
            .active
            .iter()
            .any(|pin| matches!(pin.request.kind, PinKind::Extend | PinKind::Write | PinKind::Exclusive));
        if !extending || mutations.skip_freeze {
            for (grant, round) in local.unanswered.drain(..) {
                send(effects, resource.server, LockMessage::Glimpsed { grant, resource, round });
            }
        }
        if mutations == Mutations::default() {
            local.assert_invariants();
        }
        *self.ranges = *self.ranges + local.pieces.len() - *local.counted;
        *local.counted = local.pieces.len();
        if local.is_unused() {
            let used = *local.used;
            self.locals.remove(&resource);
            self.least_recent.remove(&used);
        }
    }

    fn fail(&mut self, resource: Resource, index: usize, errno: i32, effects: &mut Effects) {
        let pin = self.locals.get_mut(&resource).expect("it has a pin").waiting.remove(index);
        self.tokens.remove(&pin.request.token);
        self.abandon(resource, pin.request.token, effects);
        effects.push(ClientEffect::PinFailed { token: pin.request.token, errno });
    }

    fn ask(&mut self, resource: Resource, index: usize, effects: &mut Effects) {
        let local = self.locals.get_mut(&resource).expect("it has a pin");
        let pin = local.waiting[index].request;
        let answered = |request: &Request| request.asker == Some(pin.token) || Local::serves(request, &pin);
        if self.down.contains(&resource.server) || local.requests.iter().any(answered) {
            return;
        }
        // Growth keeps away from what this node is giving up (lib.rs, rule 2).
        let want = Local::around(pin.want.hull(pin.range), pin.range, local.in_motion());
        let upgrade = local.pieces.overlapping(pin.range).next().map(|(_, piece)| piece.grant);
        let flags = LockFlags { r#try: pin.r#try, no_growth: pin.no_growth, one_shot: pin.one_shot };
        self.last_request += 1;
        let (need, mode, sequence) = (pin.range, pin.kind.mode(), self.last_request);
        local.requests.push(Request { sequence, need, want, mode, flags, asker: Some(pin.token), cancelled: false });
        self.asked.insert(sequence, resource);
        self.counters.requests += 1;
        let request = RequestId { node: self.node, sequence };
        let after_releases = self.releases_sent.get(&resource.server).copied().unwrap_or(0);
        send(
            effects,
            resource.server,
            LockMessage::Lock { request, resource, mode, need, want, flags, upgrade, after_releases },
        );
    }

    fn send_release(
        &mut self,
        resource: Resource,
        grant: GrantId,
        range: Range,
        keep: Option<Mode>,
        revoke_sequence: u32,
        effects: &mut Effects,
    ) {
        *self.releases_sent.entry(resource.server).or_default() += 1;
        self.counters.releases += 1;
        send(effects, resource.server, LockMessage::Release { grant, resource, range, keep, revoke_sequence });
    }

    /// Acts on a message of a server.
    ///
    /// # Errors
    /// A message that cannot come from a server that keeps the protocol; it has changed nothing.
    pub fn handle(
        &mut self,
        from: Slot,
        message: LockMessage,
        now: Tick,
        policy: &mut dyn RevokePolicy,
        effects: &mut Effects,
    ) -> Result<(), Violation> {
        self.check(from, &message)?;
        match message {
            LockMessage::Grant { request, grant, resource, range, mode, from: old } => {
                self.granted(request, grant, resource, range, mode, old, now, effects)
            }
            LockMessage::Deny { request, errno } => self.answered(request, Err(errno), effects),
            LockMessage::Observed { request } => self.answered(request, Ok(()), effects),
            LockMessage::Revoke { grant, resource, revoke_sequence, need, want, keep, successor } => {
                self.counters.revokes += 1;
                self.revoke(
                    resource,
                    Revoke { grant, need, want, keep, successor, revoke_sequence },
                    now,
                    policy,
                    effects,
                );
                self.progress(resource, effects);
            }
            LockMessage::Glimpse { grant, resource, round } => {
                self.counters.glimpses += 1;
                match self.locals.get_mut(&resource) {
                    Some(local) if local.pieces.iter().any(|(_, piece)| piece.grant == grant) => {
                        // One round at a time: an earlier one is over, whether or not its thaw was worth sending.
                        local.frozen.retain(|&(frozen, _)| frozen != grant);
                        local.unanswered.retain(|&(frozen, _)| frozen != grant);
                        local.frozen.push((grant, round));
                        local.unanswered.push((grant, round));
                        self.progress(resource, effects);
                    }
                    // A node that no longer knows the object still answers.
                    _ => send(effects, from, LockMessage::Glimpsed { grant, resource, round }),
                }
            }
            LockMessage::Thaw { grant, resource, round } => {
                if let Some(local) = self.locals.get_mut(&resource) {
                    local.frozen.retain(|&frozen| frozen != (grant, round));
                    self.progress(resource, effects);
                }
            }
            LockMessage::Done { grant, resource, range } => {
                let Some(local) = self.locals.get_mut(&resource) else { return Ok(()) };
                for transit in
                    local.transits.extract_if(.., |transit| transit.grant == grant && transit.range.overlaps(range))
                {
                    effects.push(ClientEffect::Dropped { resource, range: transit.range, grant });
                }
                self.progress(resource, effects);
            }
            LockMessage::HandBack { grant, resource, range } => self.hand_back(grant, resource, range, effects),
            LockMessage::Recall { count } => self.trim(self.ranges.saturating_sub(count as usize), effects),
            _ => {}
        }
        Ok(())
    }

    /// Whether a server that keeps the protocol could have sent this. All that [`LockClient::handle`] relies on is established here.
    fn check(&self, from: Slot, message: &LockMessage) -> Result<(), Violation> {
        use LockMessage::*;
        match *message {
            Grant { resource, grant, .. }
            | Revoke { resource, grant, .. }
            | Glimpse { resource, grant, .. }
            | Thaw { resource, grant, .. }
            | Done { resource, grant, .. }
            | HandBack { resource, grant, .. } => {
                require(resource.server == from, "a word about what another node grants")?;
                require(grant.server == from, "a grant of another node")?;
            }
            Deny { request, .. } | Observed { request } => {
                require(request.node == self.node, "an answer to another node's request")?;
                let asked = self.asked.get(&request.sequence);
                require(
                    asked.is_none_or(|resource| resource.server == from),
                    "an answer to what another node was asked",
                )?;
            }
            Recall { .. } | Probe { .. } => {}
            Lock { .. } | Cancel { .. } | Release { .. } | Taken { .. } | Refused { .. } | Glimpsed { .. } => {
                return Err(Violation("a client's message to a client"));
            }
        }
        match *message {
            Grant { request, grant, resource, range, mode, from: old } => {
                require(!range.is_empty(), "a grant of nothing")?;
                require(mode != Mode::E || resource.class == Class::Attr, "a mode that is for attributes only")?;
                self.check_grant(request, grant, resource, range, mode, old)
            }
            Observed { request } => {
                let one_shot = self.request(request).is_none_or(|asked| asked.flags.one_shot);
                require(one_shot, "attributes observed that were to be locked")
            }
            Revoke { resource, need, want, keep, successor, .. } => {
                require(!need.is_empty() && want.contains(need), "a revoke of nothing")?;
                require(keep != Some(Mode::E) || resource.class == Class::Attr, "a mode that is for attributes only")?;
                require(
                    successor.is_none_or(|successor| {
                        resource.class == Class::Data
                            && keep.is_none()
                            && successor.slot != self.node.slot
                            && successor.grant.server == from
                    }),
                    "a successor that cannot be",
                )
            }
            Glimpse { resource, .. } => require(resource.class == Class::Attr, "a glimpse of what is not attributes"),
            Done { resource, range, .. } | HandBack { resource, range, .. } => {
                require(!range.is_empty() && resource.class == Class::Data, "the end of no hand-over")
            }
            _ => Ok(()),
        }
    }

    fn check_grant(
        &self,
        request: RequestId,
        grant: GrantId,
        resource: Resource,
        range: Range,
        mode: Mode,
        old: Option<Successor>,
    ) -> Result<(), Violation> {
        require(request.node == self.node, "a grant for another node's request")?;
        if let Some(announced) = self.incoming.get(&grant) {
            let incoming = self.locals.get(announced).and_then(|local| local.incoming.get(&grant));
            let same = *announced == resource && incoming.is_some_and(|incoming| incoming.range == range);
            return require(same && mode == Mode::X && old.is_none(), "a grant other than it was announced");
        }
        let Some(asked) = self.request(request) else { return Ok(()) };
        require(self.asked.get(&request.sequence) == Some(&resource), "a grant of what was not asked for")?;
        require(
            range.contains(asked.need) && asked.want.hull(asked.need).contains(range),
            "a grant of another range than was asked for",
        )?;
        require(mode.covers(asked.mode), "a grant in a weaker mode than was asked for")?;
        if let Some(old) = old {
            require(
                resource.class == Class::Data && mode == Mode::X && old.slot != self.node.slot,
                "a hand-over that cannot be",
            )?;
        }
        if self.options.mutations != Mutations::default() {
            return Ok(());
        }
        let local = self.locals.get(&resource).expect("it has a request");
        // Rule 2 (lib.rs), and pages come from elsewhere only where nothing is held.
        require(local.in_motion().all(|moving| !moving.overlaps(range)), "a grant over what is on its way")?;
        require(old.is_none() || local.pieces.overlapping(range).next().is_none(), "a hand-over of what is held")
    }

    /// A request that is out.
    fn request(&self, request: RequestId) -> Option<&Request> {
        let resource = self.asked.get(&request.sequence)?;
        self.locals.get(resource)?.requests.iter().find(|asked| asked.sequence == request.sequence)
    }

    /// A request is answered by no grant.
    fn answered(&mut self, request: RequestId, outcome: Result<(), i32>, effects: &mut Effects) {
        let Some(resource) = self.asked.remove(&request.sequence) else { return };
        let local = self.locals.get_mut(&resource).expect("it has a request");
        let index = local.requests.iter().position(|asked| asked.sequence == request.sequence).expect("it is asked");
        let asked = local.requests.remove(index);
        if let Some(index) = local.waiting.iter().position(|pin| Some(pin.request.token) == asked.asker) {
            match outcome {
                Ok(()) => {
                    let pin = local.waiting.remove(index);
                    self.tokens.remove(&pin.request.token);
                    effects.push(ClientEffect::Observed { token: pin.request.token });
                }
                Err(ECANCELED) => {}
                Err(errno) => self.fail(resource, index, errno, effects),
            }
        }
        self.progress(resource, effects);
    }

    #[allow(clippy::too_many_arguments)]
    fn granted(
        &mut self,
        request: RequestId,
        grant: GrantId,
        resource: Resource,
        range: Range,
        mode: Mode,
        from: Option<Successor>,
        now: Tick,
        effects: &mut Effects,
    ) {
        if self.incoming.contains_key(&grant) {
            // The old holder wrote back instead, or died: storage is current.
            self.arrive(grant, now, effects);
            return;
        }
        if self.asked.remove(&request.sequence).is_none() {
            // Also what was taken meanwhile comes here once more, from storage; then there is nothing to do.
            let known = self
                .locals
                .get(&resource)
                .is_some_and(|local| local.pieces.iter().any(|(_, piece)| piece.grant == grant));
            if !known {
                self.send_release(resource, grant, range, None, 0, effects);
            }
            return;
        }
        self.counters.grants += 1;
        let local = self.locals.get_mut(&resource).expect("it has a request");
        let index = local.requests.iter().position(|asked| asked.sequence == request.sequence).expect("it is asked");
        let asked = local.requests.remove(index);
        if let Some(pin) = local.waiting.iter_mut().find(|pin| Some(pin.request.token) == asked.asker) {
            pin.reserved = !self.options.mutations.skip_reservation;
        }
        let fresh = local.pieces.gaps(range);
        let lawful = self.options.mutations == Mutations::default();
        if let Some(from) = from
            && !self.options.mutations.skip_fetch
        {
            debug_assert!(!lawful || fresh == [range], "pages come from elsewhere only where nothing is held");
            local.pieces.insert(range, Piece { grant, mode, state: State::Incoming, since: Uncompared(now) });
            local.incoming.insert(grant, Incoming { range, refused: false, revokes: Vec::new() });
            self.incoming.insert(grant, resource);
            effects.push(ClientEffect::AwaitHandOver { grant, resource, range, from });
            self.progress(resource, effects);
            return;
        }
        for (piece_range, piece) in local.pieces.take(range) {
            debug_assert!(
                !lawful || piece.state == State::Held,
                "a grant never meets a fence: {piece:?} {piece_range}"
            );
            local.pieces.insert(piece_range, Piece { grant, mode: crate::server::join(piece.mode, mode), ..piece });
        }
        for &gap in &fresh {
            local.pieces.insert(gap, Piece { grant, mode, state: State::Held, since: Uncompared(now) });
        }
        local.pieces.merge(range, alike);
        Self::forget_glimpses(local);
        self.touch(resource);
        effects.push(ClientEffect::Acquired { resource, range, mode, grant, fresh });
        self.progress(resource, effects);
    }

    /// A glimpse concerns one grant and ends with it; the server knows as much.
    fn forget_glimpses(local: &mut Local) {
        if !local.frozen.is_empty() {
            let pieces = &local.pieces;
            local.frozen.retain(|&(grant, _)| pieces.iter().any(|(_, piece)| piece.grant == grant));
        }
    }

    /// What was incoming is held from now on: its pins go first, then the revokes that came meanwhile.
    fn arrive(&mut self, grant: GrantId, now: Tick, effects: &mut Effects) {
        let Some(resource) = self.incoming.remove(&grant) else { return };
        let local = self.locals.get_mut(&resource).expect("it has a grant");
        let Incoming { range, revokes, .. } = local.incoming.remove(&grant).expect("it is incoming");
        for (_, piece) in local.pieces.overlapping_mut(range) {
            debug_assert_eq!(piece.grant, grant);
            piece.state = State::Held;
            piece.since = Uncompared(now);
        }
        self.touch(resource);
        effects.push(ClientEffect::Acquired { resource, range, mode: Mode::X, grant, fresh: vec![range] });
        self.progress(resource, effects);
        for revoke in revokes {
            self.revoke(resource, revoke, now, &mut GiveUpNeed, effects);
            self.progress(resource, effects);
        }
    }

    fn revoke(
        &mut self,
        resource: Resource,
        revoke: Revoke,
        now: Tick,
        policy: &mut dyn RevokePolicy,
        effects: &mut Effects,
    ) {
        let Revoke { grant, need, want, keep, successor, revoke_sequence } = revoke;
        let concerned: Vec<(Range, Piece)> = match self.locals.get(&resource) {
            Some(local) => local
                .pieces
                .overlapping(need)
                .filter(|(_, piece)| piece.grant == grant)
                .map(|(range, piece)| (range, piece.clone()))
                .collect(),
            None => Vec::new(),
        };
        if concerned.is_empty() {
            // A node that no longer knows the grant still answers.
            self.send_release(resource, grant, need, None, revoke_sequence, effects);
            return;
        }
        let local = self.locals.get_mut(&resource).expect("it has pieces");
        if resource.class == Class::Data {
            let young = concerned
                .iter()
                .filter(|(_, piece)| piece.state == State::Held)
                .map(|(_, piece)| piece.since.saturating_add(self.options.minimum_hold))
                .max();
            if let Some(due) = young.filter(|&due| due > now) {
                local.deferred.push((Uncompared(due), revoke));
                self.deferred.insert((due, resource));
                return;
            }
        }
        // Pages go to a successor only from one whole piece; else the server will see a RELEASE instead.
        let successor = successor.filter(|_| {
            concerned.len() == 1
                && concerned[0].0.contains(need)
                && concerned[0].1.state == State::Held
                && concerned[0].1.mode == Mode::X
        });
        for (held, piece) in concerned {
            let part = held.intersect(need);
            let local = self.locals.get_mut(&resource).expect("it has pieces");
            match piece.state {
                State::Incoming => {
                    let incoming = local.incoming.get_mut(&grant).expect("its piece is incoming");
                    let revoke = Revoke { grant, need: part, want, keep, successor: None, revoke_sequence };
                    incoming.revokes.push(revoke);
                }
                State::Fenced(id) => {
                    let fence = local.fences.get_mut(&id).expect("fences stand on pieces");
                    fence.keep = weaker(fence.keep, keep);
                    fence.revoke_sequence = revoke_sequence;
                }
                State::Held => {
                    let mut range = part;
                    if keep.is_none() && successor.is_none() {
                        let offered = policy.give_up(resource, held, part, want).hull(part).intersect(held);
                        let asked = local.requests.iter().map(|request| request.want.hull(request.need));
                        range = if self.options.mutations.volunteer_asked {
                            offered
                        } else {
                            Local::around(offered, part, asked)
                        };
                    }
                    self.start_fence(resource, range, keep, successor, revoke_sequence, effects);
                }
            }
        }
    }

    /// Fences `range`, which lies within one held piece.
    fn start_fence(
        &mut self,
        resource: Resource,
        range: Range,
        keep: Option<Mode>,
        successor: Option<Successor>,
        revoke_sequence: u32,
        effects: &mut Effects,
    ) {
        let local = self.locals.get_mut(&resource).expect("it has pieces");
        local.pieces.isolate(range);
        let (whole, piece) = local.pieces.overlapping_mut(range).next().expect("it is held");
        debug_assert_eq!((whole, piece.state), (range, State::Held));
        let (grant, mode) = (piece.grant, piece.mode);
        if keep == Some(mode) {
            // It is no more than that already.
            local.pieces.merge(range, alike);
            self.send_release(resource, grant, range, keep, revoke_sequence, effects);
            return;
        }
        let keep = keep.filter(|&keep| mode.covers(keep));
        self.last_fence += 1;
        let id = FenceId(self.last_fence);
        piece.state = State::Fenced(id);
        local.fences.insert(
            id,
            Fence { range, grant, keep, successor, revoke_sequence, vacating: None, resweep: false, sealed: false },
        );
        self.fences.insert(id, resource);
    }

    /// The volume has done what Vacate asked. False: not accepted, Vacate comes again (at once, or when a
    /// through-fence pin has ended). True for a fence that is no more.
    pub fn vacated(&mut self, id: FenceId, outcome: Vacated, _now: Tick, effects: &mut Effects) -> bool {
        let Some(&resource) = self.fences.get(&id) else { return true };
        let local = self.locals.get_mut(&resource).expect("it has a fence");
        let fence = local.fences.get_mut(&id).expect("it is listed");
        let Some(told) = fence.vacating else { return false };
        let pinned = local.active.iter().any(|pin| pin.request.range.overlaps(fence.range) && !pin.broken);
        let stale =
            (fence.resweep || pinned) && !self.options.mutations.skip_resweep && !self.options.mutations.skip_drain;
        if stale || told != fence.keep || (outcome == Vacated::HandedOver && fence.successor.is_none()) {
            fence.vacating = None;
            self.counters.resweeps += 1;
            self.progress(resource, effects);
            return false;
        }
        let fence = local.fences.remove(&id).expect("just seen");
        self.fences.remove(&id);
        let Fence { range, grant, keep, revoke_sequence, .. } = fence;
        let (_, mut piece) = local.pieces.take(range).pop().expect("a fence stands on a piece");
        match outcome {
            Vacated::HandedOver => {
                local.transits.push(Transit { grant, range, revoke_sequence });
                self.counters.hand_overs_given += 1;
            }
            Vacated::WrittenBack => {
                if let Some(mode) = keep {
                    piece.mode = mode;
                    piece.state = State::Held;
                    local.pieces.insert(range, piece);
                    local.pieces.merge(range, alike);
                }
                self.send_release(resource, grant, range, keep, revoke_sequence, effects);
            }
        }
        Self::forget_glimpses(self.locals.get_mut(&resource).expect("it had a fence"));
        self.progress(resource, effects);
        true
    }

    fn hand_back(&mut self, grant: GrantId, resource: Resource, range: Range, effects: &mut Effects) {
        let mut known = false;
        if let Some(local) = self.locals.get_mut(&resource) {
            let concerns = |other: GrantId, theirs: Range| other == grant && theirs.overlaps(range);
            for fence in local.fences.values_mut().filter(|fence| concerns(fence.grant, fence.range)) {
                // If Vacate named the successor already, vacated(HandedOver) will not be accepted.
                fence.successor = None;
                known = true;
            }
            for (_, revoke) in local.deferred.iter_mut().filter(|(_, revoke)| concerns(revoke.grant, revoke.need)) {
                revoke.successor = None;
                known = true;
            }
            let transits: Vec<Transit> =
                local.transits.extract_if(.., |transit| concerns(transit.grant, transit.range)).collect();
            for Transit { grant, range, revoke_sequence } in transits {
                known = true;
                self.last_fence += 1;
                let id = FenceId(self.last_fence);
                local
                    .pieces
                    .insert(range, Piece { grant, mode: Mode::X, state: State::Fenced(id), since: Uncompared(0) });
                local.fences.insert(
                    id,
                    Fence {
                        range,
                        grant,
                        keep: None,
                        successor: None,
                        revoke_sequence,
                        vacating: None,
                        resweep: false,
                        sealed: true,
                    },
                );
                self.fences.insert(id, resource);
            }
        }
        if !known {
            self.send_release(resource, grant, range, None, 0, effects);
        }
        self.progress(resource, effects);
    }

    /// The pages of a hand-over have been read (`ok`), or cannot be: then the old holder is asked to write
    /// back, and [`ClientEffect::Acquired`] comes when storage is current.
    pub fn fetched(&mut self, grant: GrantId, ok: bool, now: Tick, effects: &mut Effects) {
        let Some(&resource) = self.incoming.get(&grant) else { return };
        let incoming =
            self.locals.get_mut(&resource).and_then(|local| local.incoming.get_mut(&grant)).expect("it is incoming");
        if incoming.refused {
            // The old holder has been told to write back: only storage counts now, whatever was read since.
            return;
        }
        if ok {
            self.counters.hand_overs_taken += 1;
            send(effects, resource.server, LockMessage::Taken { grant, resource });
            self.arrive(grant, now, effects);
            return;
        }
        incoming.refused = true;
        send(effects, resource.server, LockMessage::Refused { grant, resource });
    }

    /// Obeys revokes whose minimum hold is over.
    pub fn tick(&mut self, now: Tick, policy: &mut dyn RevokePolicy, effects: &mut Effects) {
        while let Some(&(due, resource)) = self.deferred.first()
            && due <= now
        {
            self.deferred.pop_first();
            let Some(local) = self.locals.get_mut(&resource) else { continue };
            let revokes: Vec<_> = local.deferred.extract_if(.., |(at, _)| at.0 <= now).collect();
            for (_, revoke) in revokes {
                self.revoke(resource, revoke, now, policy, effects);
                self.progress(resource, effects);
            }
        }
    }

    /// When `tick` has something to do.
    pub fn next_due(&self) -> Option<Tick> {
        self.deferred.first().map(|&(due, _)| due)
    }

    /// Gives up least recently used unpinned grants until at most so many ranges are held.
    pub fn trim(&mut self, keep_at_most: usize, effects: &mut Effects) {
        let mut surplus = self.ranges.saturating_sub(keep_at_most + self.fences.len());
        let candidates: Vec<Resource> =
            if surplus == 0 { Vec::new() } else { self.least_recent.values().copied().collect() };
        for resource in candidates {
            if surplus == 0 {
                break;
            }
            let given = self.give_up(resource, surplus, effects);
            surplus -= given;
            self.counters.trimmed += given as u64;
        }
    }

    /// Gives up at most `most` unpinned ranges of one resource; returns how many. None while anything of it is asked for, waited
    /// for or frozen.
    pub fn give_up(&mut self, resource: Resource, most: usize, effects: &mut Effects) -> usize {
        self.give_up_within(resource, Range::ALL, most, effects)
    }

    /// The same, of what lies within `within`.
    pub fn give_up_within(&mut self, resource: Resource, within: Range, most: usize, effects: &mut Effects) -> usize {
        let Some(local) = self.locals.get(&resource) else { return 0 };
        // It volunteers nothing it may be asking for (lib.rs, rule 2).
        if !(self.options.mutations.volunteer_asked || local.requests.is_empty() && local.waiting.is_empty())
            || !local.frozen.is_empty()
        {
            return 0;
        }
        let idle: Vec<Range> = local
            .pieces
            .overlapping(within)
            .filter(|(_, piece)| piece.state == State::Held)
            .map(|(range, _)| range.intersect(within))
            .filter(|range| !local.active.iter().any(|pin| pin.request.range.overlaps(*range)))
            .take(most)
            .collect();
        for &range in &idle {
            self.start_fence(resource, range, None, None, 0, effects);
        }
        self.progress(resource, effects);
        idle.len()
    }

    /// The server's lock table is gone (it restarted): what it granted is void. What waits is asked again
    /// by [`LockClient::server_back`].
    pub fn server_lost(&mut self, slot: Slot, effects: &mut Effects) {
        self.down.insert(slot);
        self.releases_sent.remove(&slot);
        let resources: Vec<Resource> = self.locals.keys().filter(|resource| resource.server == slot).copied().collect();
        for &resource in &resources {
            let local = self.locals.get_mut(&resource).expect("just listed");
            for (range, piece) in local.pieces.take(Range::ALL) {
                effects.push(ClientEffect::Lost { resource, range, grant: piece.grant, mode: piece.mode });
            }
            for Transit { grant, range, .. } in local.transits.drain(..) {
                effects.push(ClientEffect::Lost { resource, range, grant, mode: Mode::X });
            }
            local.fences.clear();
            local.incoming.clear();
            local.requests.clear();
            local.frozen.clear();
            local.unanswered.clear();
            local.deferred.clear();
            local.active.iter_mut().for_each(|pin| pin.broken = true);
            local.waiting.iter_mut().for_each(|pin| pin.reserved = false);
        }
        self.fences.retain(|_, resource| resource.server != slot);
        self.asked.retain(|_, resource| resource.server != slot);
        self.incoming.retain(|_, resource| resource.server != slot);
        self.deferred.retain(|(_, resource)| resource.server != slot);
        for resource in resources {
            self.progress(resource, effects);
        }
    }

    pub fn server_back(&mut self, slot: Slot, _now: Tick, effects: &mut Effects) {
        self.down.remove(&slot);
        let resources: Vec<Resource> = self.locals.keys().filter(|resource| resource.server == slot).copied().collect();
        for resource in resources {
            self.progress(resource, effects);
        }
    }

    fn active(&self, token: PinToken) -> Option<&Pin> {
        let resource = self.tokens.get(&token)?;
        self.locals.get(resource)?.active.iter().find(|pin| pin.request.token == token)
    }

    /// The grant under an active pin was lost: what was done under it is void.
    pub fn is_broken(&self, token: PinToken) -> bool {
        self.active(token).is_some_and(|pin| pin.broken)
    }

    pub fn is_pinned(&self, token: PinToken) -> bool {
        self.active(token).is_some()
    }

    /// Weakest mode over all of `range`, if all of it is held (fenced or not).
    pub fn held(&self, resource: Resource, range: Range) -> Option<Mode> {
        let local = self.locals.get(&resource)?;
        let mut at = range.lo;
        let mut weakest = Mode::X;
        for (held, piece) in local.pieces.overlapping(range) {
            if held.lo > at || piece.state == State::Incoming {
                return None;
            }
            at = held.hi;
            if piece.mode != Mode::X {
                weakest = piece.mode;
            }
        }
        (at >= range.hi).then_some(weakest)
    }

    /// How far around `range`, within `within`, all is held X and nothing is on its way out; `range` itself if not even that is.
    pub fn held_exclusively_around(&self, resource: Resource, range: Range, within: Range) -> Range {
        let Some(local) = self.locals.get(&resource) else { return range };
        let mut run = Range::new(within.lo, within.lo);
        for (held, piece) in local.pieces.overlapping(within) {
            let held = held.intersect(within);
            if piece.mode != Mode::X || piece.state != State::Held {
                run = Range::new(held.hi, held.hi);
                continue;
            }
            let joined = if held.lo == run.hi { Range::new(run.lo, held.hi) } else { held };
            if joined.lo > range.lo {
                break;
            }
            run = joined;
        }
        if run.contains(range) { run } else { range }
    }

    pub fn grants(&self) -> impl Iterator<Item = GrantView> + '_ {
        self.locals.iter().flat_map(|(&resource, local)| {
            let held = local.pieces.iter().map(move |(range, piece)| GrantView {
                resource,
                range,
                grant: piece.grant,
                mode: piece.mode,
                fenced: matches!(piece.state, State::Fenced(_)),
                incoming: piece.state == State::Incoming,
                in_transit: false,
                frozen: local.frozen.iter().any(|&(grant, _)| grant == piece.grant),
                pins: local.active.iter().filter(|pin| pin.request.range.overlaps(range)).count(),
            });
            let transits = local.transits.iter().map(move |transit| GrantView {
                resource,
                range: transit.range,
                grant: transit.grant,
                mode: Mode::X,
                fenced: false,
                incoming: false,
                in_transit: true,
                frozen: false,
                pins: 0,
            });
            held.chain(transits)
        })
    }

    /// Pins that wait, with what they wait for.
    pub fn waiting(&self) -> impl Iterator<Item = &PinRequest> + '_ {
        self.locals.values().flat_map(|local| local.waiting.iter().map(|pin| &pin.request))
    }

    /// Ranges held.
    pub fn len(&self) -> usize {
        *self.ranges
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn counters(&self) -> &ClientCounters {
        &self.counters
    }
}
