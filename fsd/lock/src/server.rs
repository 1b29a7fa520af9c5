//! The lock server: who holds what of the resources this node grants, and who waits.
//!
//! Per resource it keeps, for each node, a map of disjoint ranges (the grants), and one queue of
//! waiters in the order of arrival. Everything that happens ends in a *rescan*: each waiter, in
//! order, is granted if nothing of another node and no earlier waiter of another node conflicts;
//! else every conflicting holder is revoked, all at once, unless it was already. A range of a grant is
//!
//! ```text
//! GRANTED -- conflict --> REVOKING(keep) -- RELEASE covers it --> gone, or GRANTED in mode keep
//! GRANTED -- conflict, X to X, DATA, one holder --> HANDING(gid'), and INCOMING(gid') for the asker
//! HANDING -- TAKEN(gid') --> gone, DONE to the old holder;  INCOMING -> GRANTED
//! HANDING -- RELEASE, or the old holder dies --> gone, GRANT(gid') again without `from`: storage is current
//! HANDING -- REFUSED(gid') --> HANDBACK to the old holder, which will RELEASE
//! INCOMING -- the successor dies --> gone, HANDBACK: HANDING -> REVOKING
//! ```
//!
//! Marks are kept by range, so a revoke of part of a grant splits it and a RELEASE that does not
//! cover a waiter's need does not help it. Why nothing gets stuck: holders always answer a revoke;
//! a waiter waits only for earlier waiters and for such answers; and a request over a range
//! its own node is giving up stands behind the waiter that range is for.
//!
//! The record of a node is never weaker than what the node believes (lib.rs, rule 1). Numbers of
//! grants are never used again, so a RELEASE of a grant that is gone or superseded changes nothing.

use crate::ranges::RangeMap;
use crate::{Mutations, Tick, Uncompared, Violation, require};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use verbfs_protocol::lock::{LockFlags, Successor};
use verbfs_protocol::{Class, GrantId, Ino, LockMessage, Mode, Node, Range, RequestId, Resource, Slot};

pub(crate) const EAGAIN: i32 = 11;
const EINVAL: i32 = 22;
pub(crate) const ECANCELED: i32 = 125;

/// Requests of one node that wait for a RELEASE sent before them. Only the reordering of two lanes makes them wait: there are
/// never more than a node has operations.
const EARLY_MAX: usize = 1 << 16;
/// Growth looks at no more than so many compatible neighbours per node and side: bounds the cost of a grant.
const GROWTH_NEIGHBOURS: usize = 64;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ServerOptions {
    /// Let pages go from an X holder to the next X holder directly (DATA).
    pub hand_over: bool,
    /// Once conflicts were seen on a resource, grants grow only to this alignment (pages).
    pub conflict_granule: u64,
    /// So many grants without a conflict make a resource uncontended again.
    pub calm_after: u32,
    #[doc(hidden)]
    pub mutations: Mutations,
}

impl Default for ServerOptions {
    fn default() -> Self {
        ServerOptions { hand_over: true, conflict_granule: 256, calm_after: 64, mutations: Mutations::default() }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServerCounters {
    pub requests: u64,
    pub grants: u64,
    /// Requests that could not be granted when they came.
    pub conflicts: u64,
    pub revokes: u64,
    pub hand_overs: u64,
    pub hand_overs_taken: u64,
    /// Hand-overs that ended in the old holder writing back.
    pub hand_overs_from_storage: u64,
    pub hand_backs: u64,
    pub releases: u64,
    pub glimpse_rounds: u64,
    pub observed: u64,
    pub denials: u64,
    pub cancels: u64,
    /// Requests that came before a release sent earlier.
    pub early_requests: u64,
    pub waiters: u64,
    pub longest_queue: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServerEffect {
    /// `to` may be the own slot.
    Send { to: Slot, message: LockMessage },
}

/// One range one node holds, for `verbfs locks`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HolderView {
    pub slot: Slot,
    pub grant: GrantId,
    pub range: Range,
    pub mode: Mode,
    pub revoking: bool,
    pub handing: bool,
    pub incoming: bool,
}

/// One waiting request, for `verbfs locks`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WaiterView {
    pub request: RequestId,
    pub mode: Mode,
    pub need: Range,
    pub since: Tick,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum State {
    Granted,
    /// Asked to keep no more than `keep`.
    Revoking {
        keep: Option<Mode>,
    },
    /// Asked to hand its pages over; the asker's grant is in `hand_overs`.
    Handing {
        to: GrantId,
    },
    /// Awaits pages from an old holder. `revoked`: a REVOKE has been sent on, with this `keep`.
    Incoming {
        revoked: Option<Option<Mode>>,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Held {
    grant: GrantId,
    mode: Mode,
    state: State,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Waiter {
    request: RequestId,
    mode: Mode,
    need: Range,
    want: Range,
    flags: LockFlags,
    since: Uncompared<Tick>,
}

impl Waiter {
    fn slot(&self) -> Slot {
        self.request.node.slot
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct HandOver {
    old: Successor,
    new: Slot,
    range: Range,
    request: RequestId,
}

/// One glimpse: all holders of E are frozen, from their answer to THAW.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Round {
    number: u32,
    holders: BTreeSet<(Slot, GrantId)>,
    unanswered: BTreeSet<(Slot, GrantId)>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Entry {
    nodes: BTreeMap<Slot, RangeMap<Held>>,
    waiters: Vec<Waiter>,
    hand_overs: BTreeMap<GrantId, HandOver>,
    round: Option<Round>,
    /// Grants until the resource counts as uncontended again.
    contended: u32,
    revoke_sequence: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Peer {
    incarnation: u32,
    gone: bool,
    /// RELEASEs handled so far.
    releases: u64,
    /// LOCK lane messages that came before a RELEASE sent earlier.
    early: VecDeque<LockMessage>,
}

/// What one node holds together when it gets `b` beside its own `a`.
pub(crate) fn join(a: Mode, b: Mode) -> Mode {
    if a == b { a } else { Mode::X }
}

/// What may be kept under two demands.
pub(crate) fn weaker(a: Option<Mode>, b: Option<Mode>) -> Option<Mode> {
    if a == b { a } else { None }
}

/// What the holder of `held` may keep beside a waiter for `wanted`.
fn keep_beside(held: Mode, wanted: Mode, one_shot: bool) -> Option<Mode> {
    match (held, wanted) {
        (Mode::X, Mode::S) if one_shot => Some(Mode::E),
        (Mode::X, Mode::S) => Some(Mode::S),
        (Mode::X, Mode::E) => Some(Mode::E),
        _ => None,
    }
}

fn alike(a: &Held, b: &Held) -> bool {
    a == b && a.state == State::Granted
}

impl Entry {
    fn is_unused(&self) -> bool {
        self.nodes.is_empty() && self.waiters.is_empty() && self.round.is_none()
    }

    /// The mode the node would hold after `wanted` is granted: an ATTR grant joins the one it has.
    fn effective(&self, class: Class, slot: Slot, wanted: Mode, need: Range) -> Mode {
        if class != Class::Attr {
            return wanted;
        }
        let own = self.nodes.get(&slot).into_iter().flat_map(|map| map.overlapping(need));
        own.fold(wanted, |mode, (_, held)| join(mode, held.mode))
    }

    /// Ranges of other nodes that do not go with `mode` over `need`. What is being handed
    /// over stands for its successor's grant, which is there too.
    fn conflicts(&self, slot: Slot, mode: Mode, need: Range) -> Vec<(Slot, Range, Held)> {
        let others = self.nodes.iter().filter(|&(&other, _)| other != slot);
        let mut found = Vec::new();
        for (&other, map) in others {
            for (range, held) in map.overlapping(need) {
                if !held.mode.compatible(mode) && !matches!(held.state, State::Handing { .. }) {
                    found.push((other, range, held.clone()));
                }
            }
        }
        found
    }

    fn own_in_motion(&self, slot: Slot, need: Range) -> bool {
        self.nodes.get(&slot).is_some_and(|map| map.overlapping(need).any(|(_, held)| held.state != State::Granted))
    }

    fn behind_earlier(&self, index: usize, mode: Mode) -> bool {
        let waiter = &self.waiters[index];
        self.waiters[..index].iter().any(|earlier| {
            earlier.slot() != waiter.slot() && earlier.need.overlaps(waiter.need) && !earlier.mode.compatible(mode)
        })
    }

    /// The largest range within `within` around `need` that meets no obstacle to `mode`.
    fn grow(&self, slot: Slot, mode: Mode, need: Range, within: Range) -> Range {
        let mut range = within.hull(need);
        let mut clip = |obstacle: Range| {
            if obstacle.lo < need.hi && obstacle.hi > range.lo {
                range.lo = obstacle.hi.min(need.lo);
            }
            if obstacle.hi > need.lo && obstacle.lo < range.hi {
                range.hi = obstacle.lo.max(need.hi);
            }
        };
        for (&other, map) in &self.nodes {
            let obstructs =
                |held: &Held| if other == slot { held.state != State::Granted } else { !held.mode.compatible(mode) };
            for (at, (piece, held)) in map.below(need.lo).enumerate() {
                if obstructs(held) || at == GROWTH_NEIGHBOURS {
                    clip(piece);
                    break;
                }
                if piece.lo <= within.lo {
                    break;
                }
            }
            for (at, (piece, held)) in map.above(need.hi).enumerate() {
                if obstructs(held) || at == GROWTH_NEIGHBOURS {
                    clip(piece);
                    break;
                }
                if piece.hi >= within.hi {
                    break;
                }
            }
            // A neighbour that reaches into the need is compatible there, and to its end.
        }
        for waiter in self.waiters.iter().filter(|waiter| waiter.slot() != slot && !waiter.mode.compatible(mode)) {
            clip(waiter.need);
        }
        debug_assert!(range.contains(need));
        range
    }

    fn assert_invariants(&self) {
        if !cfg!(debug_assertions) {
            return;
        }
        // Invariant 2: X excludes all else; E and S exclude each other. Hand-over is the one
        // exception: both records stand until the server knows which of the two it is.
        for (a, map) in &self.nodes {
            debug_assert!(!map.is_empty());
            for (range, held) in map.iter().take(64) {
                for (b, other) in self.nodes.range(a + 1..) {
                    for (_, theirs) in other.overlapping(range) {
                        let handing = matches!(held.state, State::Handing { .. })
                            || matches!(theirs.state, State::Handing { .. });
                        debug_assert!(
                            handing || held.mode.compatible(theirs.mode),
                            "{held:?} of {a} beside {theirs:?} of {b} over {range}"
                        );
                    }
                }
            }
        }
    }
}

/// The lock table of one node.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct LockServer {
    slot: Slot,
    incarnation: u32,
    options: ServerOptions,
    entries: BTreeMap<Resource, Box<Entry>>,
    peers: BTreeMap<Slot, Peer>,
    /// Inodes whose pages go home rather than to a successor, and how many asked for that.
    hand_over_paused: BTreeMap<Ino, u32>,
    last_grant: u64,
    last_round: u32,
    counters: Uncompared<ServerCounters>,
}

type Effects = Vec<ServerEffect>;

fn send(effects: &mut Effects, to: Slot, message: LockMessage) {
    effects.push(ServerEffect::Send { to, message });
}

impl LockServer {
    pub fn new(slot: Slot, server_incarnation: u32, options: ServerOptions) -> Self {
        LockServer {
            slot,
            incarnation: server_incarnation,
            options,
            entries: BTreeMap::new(),
            peers: BTreeMap::new(),
            hand_over_paused: BTreeMap::new(),
            last_grant: 0,
            last_round: 0,
            counters: Uncompared::default(),
        }
    }

    /// Acts on a message of a client.
    ///
    /// # Errors
    /// A message that cannot come from a client that keeps the protocol; it has changed nothing.
    pub fn handle(
        &mut self,
        from: Node,
        message: LockMessage,
        now: Tick,
        effects: &mut Effects,
    ) -> Result<(), Violation> {
        self.check(from, &message)?;
        let peer = self.peers.entry(from.slot).or_insert_with(|| Peer {
            incarnation: from.incarnation,
            gone: false,
            releases: 0,
            early: VecDeque::new(),
        });
        if from.incarnation < peer.incarnation || (from.incarnation == peer.incarnation && peer.gone) {
            return Ok(());
        }
        if from.incarnation > peer.incarnation {
            if !peer.gone {
                self.node_gone(from.slot, now, effects);
            }
            self.peers.insert(
                from.slot,
                Peer { incarnation: from.incarnation, gone: false, releases: 0, early: VecDeque::new() },
            );
        }
        match message {
            LockMessage::Lock { .. } | LockMessage::Cancel { .. } => {
                let peer = self.peers.get_mut(&from.slot).expect("just made");
                peer.early.push_back(message);
                self.admit(from, now, effects);
            }
            LockMessage::Release { grant, resource, range, keep, .. } => {
                self.counters.releases += 1;
                self.peers.get_mut(&from.slot).expect("just made").releases += 1;
                self.release(from.slot, grant, resource, range, keep, now, effects);
                self.admit(from, now, effects);
            }
            LockMessage::Taken { grant, resource } => self.taken(from.slot, grant, resource, effects),
            LockMessage::Refused { grant, resource } => self.refused(from.slot, grant, resource, effects),
            LockMessage::Glimpsed { grant, resource, round } => {
                self.glimpsed(from.slot, grant, resource, round, effects)
            }
            _ => unreachable!("checked above"),
        }
        Ok(())
    }

    /// Whether a client that keeps the protocol could have sent this. What is wrong with a LOCK itself is denied instead.
    fn check(&self, from: Node, message: &LockMessage) -> Result<(), Violation> {
        use LockMessage::*;
        match *message {
            Lock { .. } | Cancel { .. } => {
                if let Cancel { request, .. } = *message {
                    require(request.node == from, "another node's request is cancelled")?;
                }
                let early = self.peers.get(&from.slot).map_or(0, |peer| peer.early.len());
                require(early < EARLY_MAX, "requests without end that wait for a release")
            }
            Release { resource, range, keep, .. } => {
                require(resource.server == self.slot, "a release of what this node does not grant")?;
                require(!range.is_empty(), "a release of nothing")?;
                require(keep != Some(Mode::E) || resource.class == Class::Attr, "a mode that is for attributes only")
            }
            Taken { resource, .. } | Refused { resource, .. } | Glimpsed { resource, .. } => {
                require(resource.server == self.slot, "a word about what this node does not grant")
            }
            Grant { .. }
            | Deny { .. }
            | Observed { .. }
            | Revoke { .. }
            | Glimpse { .. }
            | Thaw { .. }
            | Done { .. }
            | HandBack { .. }
            | Recall { .. }
            | Probe { .. } => Err(Violation("a server's message to a server")),
        }
    }

    /// Handles what waits on the LOCK lane of a peer, as far as its releases have come (lib.rs, rule 3).
    fn admit(&mut self, from: Node, now: Tick, effects: &mut Effects) {
        loop {
            let ignore_order = self.options.mutations.ignore_release_order;
            let peer = self.peers.get_mut(&from.slot).expect("a peer that sends");
            match peer.early.front() {
                Some(LockMessage::Lock { after_releases, .. }) if *after_releases > peer.releases && !ignore_order => {
                    self.counters.early_requests += 1;
                    return;
                }
                Some(_) => {}
                None => return,
            }
            match peer.early.pop_front().expect("just seen") {
                LockMessage::Lock { request, resource, mode, need, want, flags, .. } => {
                    let wrong = resource.server != self.slot
                        || request.node != from
                        || need.is_empty()
                        || !want.contains(need)
                        || (mode == Mode::E && resource.class != Class::Attr)
                        || (flags.one_shot && (mode != Mode::S || resource.class != Class::Attr));
                    if wrong {
                        self.counters.denials += 1;
                        send(effects, from.slot, LockMessage::Deny { request, errno: EINVAL });
                    } else {
                        self.lock(
                            Waiter { request, mode, need, want, flags, since: Uncompared(now) },
                            resource,
                            effects,
                        );
                    }
                }
                LockMessage::Cancel { request, resource } => self.cancel(request, resource, effects),
                _ => unreachable!("only LOCK and CANCEL are kept"),
            }
        }
    }

    fn lock(&mut self, waiter: Waiter, resource: Resource, effects: &mut Effects) {
        self.counters.requests += 1;
        let (request, slot, flags) = (waiter.request, waiter.slot(), waiter.flags);
        let calm_after = self.options.calm_after;
        let entry = self.entries.entry(resource).or_default();
        entry.waiters.push(waiter);
        let index = entry.waiters.len() - 1;
        if flags.r#try && !flags.one_shot && !entry.grantable(resource.class, index) {
            entry.waiters.pop();
            entry.contended = calm_after;
            self.counters.denials += 1;
            send(effects, slot, LockMessage::Deny { request, errno: EAGAIN });
            self.drop_if_unused(resource);
            return;
        }
        self.counters.waiters += 1;
        self.rescan(resource, effects);
        if let Some(entry) = self.entries.get_mut(&resource) {
            if entry.waiters.iter().any(|waiter| waiter.request == request) {
                entry.contended = calm_after;
                self.counters.conflicts += 1;
                self.counters.longest_queue = self.counters.longest_queue.max(entry.waiters.len() as u64);
            } else {
                entry.contended = entry.contended.saturating_sub(1);
            }
        }
    }

    fn cancel(&mut self, request: RequestId, resource: Resource, effects: &mut Effects) {
        let Some(entry) = self.entries.get_mut(&resource) else { return };
        let Some(index) = entry.waiters.iter().position(|waiter| waiter.request == request) else { return };
        entry.waiters.remove(index);
        self.counters.waiters -= 1;
        self.counters.cancels += 1;
        send(effects, request.node.slot, LockMessage::Deny { request, errno: ECANCELED });
        self.rescan(resource, effects);
    }

    /// Grants what can be granted, asks back what stands in the way of the rest.
    fn rescan(&mut self, resource: Resource, effects: &mut Effects) {
        let mut index = 0;
        while let Some(entry) = self.entries.get(&resource)
            && index < entry.waiters.len()
        {
            let waiter = entry.waiters[index].clone();
            let slot = waiter.slot();
            let mode = entry.effective(resource.class, slot, waiter.mode, waiter.need);
            if entry.behind_earlier(index, mode) || entry.own_in_motion(slot, waiter.need) {
                index += 1;
                continue;
            }
            let conflicts = entry.conflicts(slot, mode, waiter.need);
            if conflicts.is_empty() {
                self.grant(resource, index, effects);
                continue;
            }
            if waiter.flags.one_shot {
                let all_extend = conflicts.iter().all(|(_, _, held)| held.mode == Mode::E);
                if all_extend {
                    if self.options.mutations.skip_glimpse {
                        self.observe(resource, index, effects);
                        continue;
                    }
                    if conflicts.iter().all(|(_, _, held)| held.state == State::Granted) {
                        self.start_round(resource, effects);
                    }
                    index += 1;
                    continue;
                }
            }
            if let [(old, range, held)] = &conflicts[..]
                && self.options.hand_over
                && !self.hand_over_paused.contains_key(&resource.ino)
                && resource.class == Class::Data
                && (mode, held.mode) == (Mode::X, Mode::X)
                && range.contains(waiter.need)
            {
                match held.state {
                    State::Granted => {
                        let (old, range, held) = (*old, *range, held.clone());
                        self.hand_over(resource, index, old, held.grant, range, effects);
                        continue;
                    }
                    // It can be handed on when it has been taken.
                    State::Incoming { revoked: None } => {
                        index += 1;
                        continue;
                    }
                    _ => {}
                }
            }
            self.revoke(resource, &waiter, mode, conflicts, effects);
            if self.options.mutations.grant_before_release {
                self.grant(resource, index, effects);
                continue;
            }
            index += 1;
        }
        if let Some(entry) = self.entries.get(&resource)
            && self.options.mutations == Mutations::default()
        {
            entry.assert_invariants();
        }
        self.drop_if_unused(resource);
    }

    fn drop_if_unused(&mut self, resource: Resource) {
        if self.entries.get(&resource).is_some_and(|entry| entry.is_unused()) {
            self.entries.remove(&resource);
        }
    }

    fn new_grant(&mut self) -> GrantId {
        self.last_grant += 1;
        GrantId { server: self.slot, server_incarnation: self.incarnation, sequence: self.last_grant }
    }

    /// Where a grant may grow to before obstacles are looked at.
    fn growth_limit(&self, entry: &Entry, waiter: &Waiter) -> Range {
        if waiter.flags.no_growth {
            return waiter.need;
        }
        let wanted = waiter.want.hull(waiter.need);
        if entry.contended == 0 || self.options.mutations.unclamped_growth {
            return wanted;
        }
        let granule = self.options.conflict_granule.max(1);
        let lo = waiter.need.lo - waiter.need.lo % granule;
        let hi = waiter.need.hi.checked_next_multiple_of(granule).unwrap_or(u64::MAX);
        wanted.intersect(Range::new(lo, hi)).hull(waiter.need)
    }

    fn grant(&mut self, resource: Resource, index: usize, effects: &mut Effects) {
        let grant = self.new_grant();
        let entry = &self.entries[&resource];
        let waiter = entry.waiters[index].clone();
        let slot = waiter.slot();
        let mut mode = entry.effective(resource.class, slot, waiter.mode, waiter.need);
        let alone =
            entry.nodes.keys().all(|&other| other == slot) && entry.waiters.iter().all(|other| other.slot() == slot);
        if mode == Mode::E && alone {
            mode = Mode::X;
        }
        let limit = self.growth_limit(entry, &waiter);
        let range =
            if self.options.mutations.unclamped_growth { limit } else { entry.grow(slot, mode, waiter.need, limit) };
        let entry = self.entries.get_mut(&resource).expect("just seen");
        entry.waiters.remove(index);
        let map = entry.nodes.entry(slot).or_default();
        let gaps = map.gaps(range);
        for (piece, held) in map.take(range) {
            debug_assert!(
                held.state == State::Granted || self.options.mutations != Mutations::default(),
                "a grant never meets a fence"
            );
            map.insert(piece, Held { grant, mode: join(held.mode, mode), state: State::Granted });
        }
        for gap in gaps {
            map.insert(gap, Held { grant, mode, state: State::Granted });
        }
        map.merge(range, alike);
        self.counters.grants += 1;
        self.counters.waiters -= 1;
        self.forget_in_round(resource, slot);
        send(effects, slot, LockMessage::Grant { request: waiter.request, grant, resource, range, mode, from: None });
        self.end_round_if_answered(resource, effects);
    }

    fn hand_over(
        &mut self,
        resource: Resource,
        index: usize,
        old: Slot,
        old_grant: GrantId,
        old_range: Range,
        effects: &mut Effects,
    ) {
        let grant = self.new_grant();
        let entry = &self.entries[&resource];
        let waiter = entry.waiters[index].clone();
        let slot = waiter.slot();
        let granule = self.options.conflict_granule.max(1);
        let mut range = waiter.need;
        if !waiter.flags.no_growth {
            // What grows is taken from the one holder only, by a granule at most, and from no waiter.
            let lo = range.lo - range.lo % granule;
            let hi = range.hi.checked_next_multiple_of(granule).unwrap_or(u64::MAX);
            let limit = old_range.intersect(Range::new(lo, hi)).intersect(waiter.want.hull(waiter.need));
            let mut clear = Entry { waiters: entry.waiters.clone(), ..Entry::default() };
            for (&node, map) in entry.nodes.iter().filter(|&(&node, _)| node != old) {
                clear.nodes.insert(node, RangeMap::default());
                for (piece, held) in map.overlapping(limit) {
                    clear.nodes.get_mut(&node).expect("just made").insert(piece, held.clone());
                }
            }
            range = clear.grow(slot, Mode::X, waiter.need, limit);
        }
        let entry = self.entries.get_mut(&resource).expect("just seen");
        entry.waiters.remove(index);
        entry.contended = self.options.calm_after;
        entry.revoke_sequence += 1;
        let revoke_sequence = entry.revoke_sequence;
        let from = Successor { slot: old, grant: old_grant };
        entry.hand_overs.insert(grant, HandOver { old: from, new: slot, range, request: waiter.request });
        let map = entry.nodes.get_mut(&old).expect("it holds the range");
        map.isolate(range);
        for (_, held) in map.overlapping_mut(range) {
            held.state = State::Handing { to: grant };
        }
        let held = Held { grant, mode: Mode::X, state: State::Incoming { revoked: None } };
        entry.nodes.entry(slot).or_default().insert(range, held);
        self.counters.grants += 1;
        self.counters.waiters -= 1;
        self.counters.revokes += 1;
        self.counters.hand_overs += 1;
        let successor = Some(Successor { slot, grant });
        send(
            effects,
            old,
            LockMessage::Revoke {
                grant: old_grant,
                resource,
                revoke_sequence,
                need: range,
                want: range,
                keep: None,
                successor,
            },
        );
        send(
            effects,
            slot,
            LockMessage::Grant { request: waiter.request, grant, resource, range, mode: Mode::X, from: Some(from) },
        );
    }

    /// Asks back from every conflicting holder what it was not asked for already.
    fn revoke(
        &mut self,
        resource: Resource,
        waiter: &Waiter,
        mode: Mode,
        conflicts: Vec<(Slot, Range, Held)>,
        effects: &mut Effects,
    ) {
        let mut asks: Vec<(Slot, GrantId, Range, Option<Mode>)> = Vec::new();
        let entry = self.entries.get_mut(&resource).expect("it has a waiter");
        for (slot, range, held) in conflicts {
            let part = range.intersect(waiter.need);
            let keep = keep_beside(held.mode, mode, waiter.flags.one_shot);
            let (keep, state) = match held.state {
                State::Granted => (keep, State::Revoking { keep }),
                State::Revoking { keep: asked } if weaker(asked, keep) != asked => {
                    (weaker(asked, keep), State::Revoking { keep: weaker(asked, keep) })
                }
                State::Incoming { revoked: None } => (keep, State::Incoming { revoked: Some(keep) }),
                State::Incoming { revoked: Some(asked) } if weaker(asked, keep) != asked => {
                    (weaker(asked, keep), State::Incoming { revoked: Some(weaker(asked, keep)) })
                }
                _ => continue,
            };
            let map = entry.nodes.get_mut(&slot).expect("it conflicts");
            map.isolate(part);
            for (_, piece) in map.overlapping_mut(part) {
                piece.state = state.clone();
            }
            match asks.last_mut() {
                Some((last, grant, run, kept))
                    if (*last, *grant, run.hi, *kept) == (slot, held.grant, part.lo, keep) =>
                {
                    run.hi = part.hi
                }
                _ => asks.push((slot, held.grant, part, keep)),
            }
        }
        for (slot, grant, need, keep) in asks {
            entry.revoke_sequence += 1;
            self.counters.revokes += 1;
            let revoke_sequence = entry.revoke_sequence;
            send(
                effects,
                slot,
                LockMessage::Revoke {
                    grant,
                    resource,
                    revoke_sequence,
                    need,
                    want: waiter.want.hull(waiter.need),
                    keep,
                    successor: None,
                },
            );
        }
    }

    #[allow(clippy::too_many_arguments)]
    fn release(
        &mut self,
        slot: Slot,
        grant: GrantId,
        resource: Resource,
        range: Range,
        keep: Option<Mode>,
        _now: Tick,
        effects: &mut Effects,
    ) {
        let Some(entry) = self.entries.get_mut(&resource) else { return };
        let Some(map) = entry.nodes.get_mut(&slot) else { return };
        if range.is_empty() {
            return;
        }
        let mut handed = BTreeSet::new();
        for (piece, mut held) in map.take(range) {
            if held.grant == grant && !matches!(held.state, State::Incoming { .. }) {
                if let State::Handing { to } = held.state {
                    handed.insert(to);
                    continue;
                }
                let Some(kept) = keep else { continue };
                if held.mode.covers(kept) {
                    held.mode = kept;
                }
                if held.state == (State::Revoking { keep }) {
                    held.state = State::Granted;
                }
            }
            map.insert(piece, held);
        }
        map.merge(range, alike);
        if map.is_empty() {
            entry.nodes.remove(&slot);
        }
        for to in handed {
            if !self.entries[&resource].still_handing(slot, to) {
                self.settle_from_storage(resource, to, effects);
            }
        }
        self.forget_in_round(resource, slot);
        self.end_round_if_answered(resource, effects);
        self.rescan(resource, effects);
    }

    /// A hand-over's pages are in storage (or died with their holder): the successor need not fetch.
    fn settle_from_storage(&mut self, resource: Resource, grant: GrantId, effects: &mut Effects) {
        let entry = self.entries.get_mut(&resource).expect("it has a hand-over");
        let Some(hand_over) = entry.hand_overs.remove(&grant) else { return };
        entry.arrived(grant, &hand_over);
        self.counters.hand_overs_from_storage += 1;
        let HandOver { new, range, request, .. } = hand_over;
        send(effects, new, LockMessage::Grant { request, grant, resource, range, mode: Mode::X, from: None });
    }

    fn taken(&mut self, slot: Slot, grant: GrantId, resource: Resource, effects: &mut Effects) {
        let Some(entry) = self.entries.get_mut(&resource) else { return };
        if entry.hand_overs.get(&grant).is_none_or(|hand_over| hand_over.new != slot) {
            return;
        }
        let hand_over = entry.hand_overs.remove(&grant).expect("just seen");
        entry.arrived(grant, &hand_over);
        let HandOver { old, range, .. } = hand_over;
        if let Some(map) = entry.nodes.get_mut(&old.slot) {
            for (piece, held) in map.take(range) {
                if held.state != (State::Handing { to: grant }) {
                    map.insert(piece, held);
                }
            }
            if map.is_empty() {
                entry.nodes.remove(&old.slot);
            }
        }
        self.counters.hand_overs_taken += 1;
        send(effects, old.slot, LockMessage::Done { grant: old.grant, resource, range });
        self.rescan(resource, effects);
    }

    fn refused(&mut self, slot: Slot, grant: GrantId, resource: Resource, effects: &mut Effects) {
        let Some(entry) = self.entries.get(&resource) else { return };
        if let Some(hand_over) = entry.hand_overs.get(&grant)
            && hand_over.new == slot
        {
            self.counters.hand_backs += 1;
            send(
                effects,
                hand_over.old.slot,
                LockMessage::HandBack { grant: hand_over.old.grant, resource, range: hand_over.range },
            );
        }
    }

    /// Whether `grant` still counts as not taken. A COMMIT of pages under such a grant proves that it was:
    /// the volume must call `handle(from, Taken{..})` before it serves one.
    pub fn is_incoming(&self, resource: Resource, grant: GrantId) -> bool {
        self.entries.get(&resource).is_some_and(|entry| entry.hand_overs.contains_key(&grant))
    }

    fn start_round(&mut self, resource: Resource, effects: &mut Effects) {
        let entry = self.entries.get_mut(&resource).expect("it has a waiter");
        if entry.round.is_some() {
            return;
        }
        self.last_round += 1;
        let number = self.last_round;
        let holders: BTreeSet<(Slot, GrantId)> = entry
            .nodes
            .iter()
            .flat_map(|(&slot, map)| {
                map.iter().filter(|(_, held)| held.mode == Mode::E).map(move |(_, held)| (slot, held.grant))
            })
            .collect();
        for &(slot, grant) in &holders {
            send(effects, slot, LockMessage::Glimpse { grant, resource, round: number });
        }
        entry.round = Some(Round { number, unanswered: holders.clone(), holders });
        self.counters.glimpse_rounds += 1;
    }

    fn glimpsed(&mut self, slot: Slot, grant: GrantId, resource: Resource, round: u32, effects: &mut Effects) {
        let Some(current) = self.entries.get_mut(&resource).and_then(|entry| entry.round.as_mut()) else { return };
        if current.number == round && current.unanswered.remove(&(slot, grant)) {
            self.end_round_if_answered(resource, effects);
            self.rescan(resource, effects);
        }
    }

    /// What no longer holds E under the grant it was asked for is no part of the round.
    fn forget_in_round(&mut self, resource: Resource, slot: Slot) {
        let Some(entry) = self.entries.get_mut(&resource) else { return };
        let Some(round) = entry.round.as_mut() else { return };
        let map = entry.nodes.get(&slot);
        let still = |grant: GrantId| {
            map.is_some_and(|map| map.iter().any(|(_, held)| held.grant == grant && held.mode == Mode::E))
        };
        round.holders.retain(|&(holder, grant)| holder != slot || still(grant));
        round.unanswered.retain(|&(holder, grant)| holder != slot || still(grant));
    }

    /// All holders are frozen at this instant: answers those who asked, then thaws.
    fn end_round_if_answered(&mut self, resource: Resource, effects: &mut Effects) {
        let Some(entry) = self.entries.get_mut(&resource) else { return };
        if !entry.round.as_ref().is_some_and(|round| round.unanswered.is_empty()) {
            return;
        }
        let round = entry.round.take().expect("just seen");
        let mut index = 0;
        while let Some(entry) = self.entries.get(&resource)
            && let Some(waiter) = entry.waiters.get(index)
        {
            // Everybody who could extend is frozen, and nobody may do more.
            let frozen = entry.nodes.iter().all(|(&slot, map)| {
                map.iter().all(|(_, held)| match held.mode {
                    Mode::S => true,
                    Mode::E => round.holders.contains(&(slot, held.grant)),
                    Mode::X => false,
                })
            });
            if waiter.flags.one_shot && frozen && !entry.behind_earlier(index, Mode::S) && !round.holders.is_empty() {
                self.observe(resource, index, effects);
            } else {
                index += 1;
            }
        }
        for (slot, grant) in round.holders {
            send(effects, slot, LockMessage::Thaw { grant, resource, round: round.number });
        }
    }

    fn observe(&mut self, resource: Resource, index: usize, effects: &mut Effects) {
        let entry = self.entries.get_mut(&resource).expect("it has a waiter");
        let waiter = entry.waiters.remove(index);
        self.counters.observed += 1;
        self.counters.waiters -= 1;
        send(effects, waiter.slot(), LockMessage::Observed { request: waiter.request });
    }

    /// After fencing: what the node held, awaited or owed an answer for is gone.
    pub fn node_gone(&mut self, slot: Slot, _now: Tick, effects: &mut Effects) {
        if let Some(peer) = self.peers.get_mut(&slot) {
            peer.gone = true;
            peer.early.clear();
        }
        let resources: Vec<Resource> = self.entries.keys().copied().collect();
        for resource in resources {
            let entry = self.entries.get_mut(&resource).expect("just listed");
            let held = entry.nodes.remove(&slot).is_some();
            let before = entry.waiters.len();
            entry.waiters.retain(|waiter| waiter.slot() != slot);
            let waited = before - entry.waiters.len();
            self.counters.waiters -= waited as u64;
            if !held && waited == 0 {
                continue;
            }
            let awaited: Vec<GrantId> = entry
                .hand_overs
                .iter()
                .filter(|(_, hand_over)| hand_over.new == slot)
                .map(|(&grant, _)| grant)
                .collect();
            for grant in awaited {
                let hand_over = entry.hand_overs.remove(&grant).expect("just listed");
                let HandOver { old, range, .. } = hand_over;
                for (_, held) in entry.nodes.get_mut(&old.slot).into_iter().flat_map(|map| map.overlapping_mut(range)) {
                    if held.state == (State::Handing { to: grant }) {
                        held.state = State::Revoking { keep: None };
                    }
                }
                self.counters.hand_backs += 1;
                send(effects, old.slot, LockMessage::HandBack { grant: old.grant, resource, range });
            }
            let given: Vec<GrantId> = entry
                .hand_overs
                .iter()
                .filter(|(_, hand_over)| hand_over.old.slot == slot)
                .map(|(&grant, _)| grant)
                .collect();
            for grant in given {
                self.settle_from_storage(resource, grant, effects);
            }
            self.forget_in_round(resource, slot);
            self.end_round_if_answered(resource, effects);
            self.rescan(resource, effects);
        }
    }

    /// From here on revokes of this inode's DATA have dirty pages written home: a SYNC that has listed the holders
    /// must meet every dirty page at one of them. Calls nest; each needs its [`LockServer::resume_hand_over`].
    pub fn pause_hand_over(&mut self, ino: Ino) {
        *self.hand_over_paused.entry(ino).or_default() += 1;
    }

    pub fn resume_hand_over(&mut self, ino: Ino) {
        if let Some(count) = self.hand_over_paused.get_mut(&ino) {
            *count -= 1;
            if *count == 0 {
                self.hand_over_paused.remove(&ino);
            }
        }
    }

    /// X holders on the DATA this server keeps of `ino`, X and E holders on its ATTR.
    pub fn exclusive_holders(&self, ino: Ino) -> Vec<(Slot, GrantId, Resource, Range)> {
        let mut found = Vec::new();
        for resource in [Resource { class: Class::Attr, ino, server: self.slot }, Resource::data(ino, self.slot)] {
            let Some(entry) = self.entries.get(&resource) else { continue };
            for (&slot, map) in &entry.nodes {
                found.extend(
                    map.iter()
                        .filter(|(_, held)| held.mode != Mode::S)
                        .map(|(range, held)| (slot, held.grant, resource, range)),
                );
            }
        }
        found
    }

    pub fn holders(&self, resource: Resource) -> Vec<HolderView> {
        let nodes = self.entries.get(&resource).into_iter().flat_map(|entry| &entry.nodes);
        nodes
            .flat_map(|(&slot, map)| {
                map.iter().map(move |(range, held)| HolderView {
                    slot,
                    grant: held.grant,
                    range,
                    mode: held.mode,
                    revoking: matches!(held.state, State::Revoking { .. } | State::Incoming { revoked: Some(_) }),
                    handing: matches!(held.state, State::Handing { .. }),
                    incoming: matches!(held.state, State::Incoming { .. }),
                })
            })
            .collect()
    }

    pub fn waiters(&self, resource: Resource) -> Vec<WaiterView> {
        let waiters = self.entries.get(&resource).into_iter().flat_map(|entry| &entry.waiters);
        waiters
            .map(|waiter| WaiterView {
                request: waiter.request,
                mode: waiter.mode,
                need: waiter.need,
                since: waiter.since.0,
            })
            .collect()
    }

    /// Resources with a grant or a waiter.
    pub fn resources(&self) -> impl Iterator<Item = Resource> + '_ {
        self.entries.keys().copied()
    }

    pub fn counters(&self) -> &ServerCounters {
        &self.counters
    }
}

impl Entry {
    fn grantable(&self, class: Class, index: usize) -> bool {
        let waiter = &self.waiters[index];
        let mode = self.effective(class, waiter.slot(), waiter.mode, waiter.need);
        !self.behind_earlier(index, mode)
            && !self.own_in_motion(waiter.slot(), waiter.need)
            && self.conflicts(waiter.slot(), mode, waiter.need).is_empty()
    }

    fn still_handing(&self, slot: Slot, to: GrantId) -> bool {
        let (Some(hand_over), Some(map)) = (self.hand_overs.get(&to), self.nodes.get(&slot)) else { return false };
        map.overlapping(hand_over.range).any(|(_, held)| held.state == (State::Handing { to }))
    }

    /// The successor has its pages: its ranges are granted, or on their way back at once.
    fn arrived(&mut self, grant: GrantId, hand_over: &HandOver) {
        let Some(map) = self.nodes.get_mut(&hand_over.new) else { return };
        for (_, held) in map.overlapping_mut(hand_over.range) {
            if held.grant == grant
                && let State::Incoming { revoked } = held.state
            {
                held.state = match revoked {
                    Some(keep) => State::Revoking { keep },
                    None => State::Granted,
                };
            }
        }
        map.merge(hand_over.range, alike);
    }
}
