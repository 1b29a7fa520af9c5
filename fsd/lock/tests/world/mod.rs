//! A world for the machines: nodes with a toy volume each, queues between them, and an oracle.
//!
//! Shared by the model (every order of events of a small script) and the random runs (many orders of
//! long ones). Messages are first in, first out per pair of nodes and lane, and otherwise as late as can be.
//! The oracle knows, for every page, the version last written, what storage has and what each cache has; and
//! for every ATTR the true size, what the home believes and what each node believes. A read must see the latest
//! version, a `stat` a size that was true at some instant between its start and its end.
//!
//! The first thing that goes wrong is kept in `violation`.
#![allow(dead_code)]

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use verbfs_lock::*;
use verbfs_protocol::lock::{Lane, Successor};
use verbfs_protocol::{Class, GrantId, LockMessage, Mode, Node, Range, RequestId, Resource, Slot};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Report {
    Exactly(u64),
    AtLeast(u64),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Wire {
    Lock(LockMessage, Option<Report>),
    HandOver { grant: GrantId },
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PinSpec {
    pub resource: Resource,
    pub range: Range,
    pub want: Range,
    pub kind: PinKind,
    pub through_fence: bool,
    pub no_growth: bool,
    pub r#try: bool,
    pub one_shot: bool,
    /// The size an ATTR operation sets or extends to.
    pub size: u64,
}

impl PinSpec {
    pub fn new(resource: Resource, lo: u64, hi: u64, kind: PinKind) -> PinSpec {
        let want = match resource.class {
            Class::Data | Class::Name => Range::ALL,
            _ => Range::UNIT,
        };
        PinSpec {
            resource,
            range: Range::new(lo, hi),
            want,
            kind,
            through_fence: false,
            no_growth: false,
            r#try: false,
            one_shot: false,
            size: 0,
        }
    }
    pub fn attr(resource: Resource, kind: PinKind, size: u64) -> PinSpec {
        PinSpec { size, ..PinSpec::new(resource, 0, 1, kind) }
    }
    pub fn stat(resource: Resource) -> PinSpec {
        PinSpec { one_shot: true, ..PinSpec::new(resource, 0, 1, PinKind::Shared) }
    }
    pub fn through_fence(self) -> PinSpec {
        PinSpec { through_fence: true, ..self }
    }
    pub fn exact(self) -> PinSpec {
        PinSpec { no_growth: true, ..self }
    }
    pub fn trying(self) -> PinSpec {
        PinSpec { r#try: true, ..self }
    }
}

/// What one caller does: takes its pins one after the other, works, drops them all.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Errand {
    pub pins: Vec<PinSpec>,
    pub cancellable: bool,
    pub tokens: Vec<PinToken>,
    pub holding: bool,
    /// Sizes that were true since a one-shot pin was asked for.
    pub truths: BTreeSet<u64>,
    pub since: Ignored,
}

impl Errand {
    pub fn new(pins: Vec<PinSpec>) -> Errand {
        debug_assert!(pins.is_sorted_by_key(|pin| pin.resource), "pins go in locking order");
        Errand {
            pins,
            cancellable: false,
            tokens: Vec::new(),
            holding: false,
            truths: BTreeSet::new(),
            since: Ignored(0),
        }
    }
    pub fn cancellable(self) -> Errand {
        Errand { cancellable: true, ..self }
    }
}

/// A step count, no part of the state.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ignored(pub u64);
impl PartialEq for Ignored {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}
impl Eq for Ignored {}
impl std::hash::Hash for Ignored {
    fn hash<H: std::hash::Hasher>(&self, _: &mut H) {}
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct FenceWork {
    resource: Resource,
    range: Range,
    held: Mode,
    grant: GrantId,
    keep: Option<Mode>,
    successor: Option<Successor>,
    swept: bool,
}

type Pages = Vec<(u64, u64, bool)>;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct NodeState {
    pub alive: bool,
    pub node: Node,
    pub client: LockClient,
    /// Version and whether dirty.
    pub cache: BTreeMap<(Resource, u64), (u64, bool)>,
    pub sizes: BTreeMap<Resource, u64>,
    pub transits: BTreeMap<(GrantId, u64), (Resource, Pages)>,
    pub fences: BTreeMap<FenceId, FenceWork>,
    /// Range, old holder, whether HANDOVER has come.
    pub awaiting: BTreeMap<GrantId, (Resource, Range, Successor, bool)>,
    /// HANDOVER that came before its GRANT.
    pub early_hand_overs: BTreeSet<GrantId>,
    /// Not begun yet (model).
    pub script: VecDeque<Errand>,
    pub running: BTreeMap<u64, Errand>,
    pub trims: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct World {
    pub options: Options,
    pub nodes: Vec<NodeState>,
    pub servers: Vec<LockServer>,
    pub queues: BTreeMap<(Slot, Slot, Lane), VecDeque<Wire>>,
    pub storage: BTreeMap<(Resource, u64), u64>,
    pub latest: BTreeMap<(Resource, u64), u64>,
    pub home_sizes: BTreeMap<Resource, u64>,
    pub true_sizes: BTreeMap<Resource, u64>,
    pub asked: BTreeMap<RequestId, Resource>,
    pub last_token: u64,
    pub last_operation: u64,
    pub now: u64,
    pub violation: Option<String>,
    pub finished: u64,
    /// A slot whose machines are not asked: a test speaks in its name. The oracle says nothing of what it serves.
    pub liar: Option<Slot>,
    /// What the honest have sent to it.
    pub heard: Vec<LockMessage>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Options {
    pub mutations: Mutations,
    pub hand_over: bool,
    /// The old holder may write back although a successor is named.
    pub may_write_back: bool,
    /// Reading a successor's pages may fail.
    pub may_fail_fetch: bool,
    /// Neighbours are given up with what is asked.
    pub generous: bool,
    pub conflict_granule: u64,
    pub minimum_hold: u64,
    /// Nodes the model may kill.
    pub kills: u32,
    /// Errands of a script that run beside each other; 0 is 1.
    pub parallel: usize,
}

/// One thing that can happen next.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    Deliver(Slot, Slot, Lane),
    Begin(Slot),
    Finish(Slot, u64),
    Cancel(Slot, u64),
    Sweep(Slot, FenceId),
    Vacated(Slot, FenceId, bool),
    Fetch(Slot, GrantId, bool),
    Trim(Slot),
    Tick(Slot),
    Kill(Slot),
}

struct Policy {
    generous: bool,
}
impl RevokePolicy for Policy {
    fn give_up(&mut self, _: Resource, granted: Range, need: Range, want: Range) -> Range {
        if self.generous { Range::new(need.lo, granted.intersect(want).hi.max(need.hi)) } else { need }
    }
}

impl World {
    pub fn new(nodes: usize, options: Options) -> World {
        let state = |slot: usize| {
            let node = Node { slot: slot as Slot, incarnation: 1 };
            Self::fresh_node(node, &options)
        };
        let server = |slot: usize| {
            let server_options = ServerOptions {
                hand_over: options.hand_over,
                conflict_granule: options.conflict_granule.max(1),
                mutations: options.mutations,
                ..ServerOptions::default()
            };
            LockServer::new(slot as Slot, 1, server_options)
        };
        World {
            nodes: (0..nodes).map(state).collect(),
            servers: (0..nodes).map(server).collect(),
            queues: BTreeMap::new(),
            storage: BTreeMap::new(),
            latest: BTreeMap::new(),
            home_sizes: BTreeMap::new(),
            true_sizes: BTreeMap::new(),
            asked: BTreeMap::new(),
            last_token: 0,
            last_operation: 0,
            now: 0,
            violation: None,
            finished: 0,
            liar: None,
            heard: Vec::new(),
            options,
        }
    }

    fn fresh_node(node: Node, options: &Options) -> NodeState {
        NodeState {
            alive: true,
            node,
            client: LockClient::new(
                node,
                ClientOptions { minimum_hold: options.minimum_hold, mutations: options.mutations },
            ),
            cache: BTreeMap::new(),
            sizes: BTreeMap::new(),
            transits: BTreeMap::new(),
            fences: BTreeMap::new(),
            awaiting: BTreeMap::new(),
            early_hand_overs: BTreeSet::new(),
            script: VecDeque::new(),
            running: BTreeMap::new(),
            trims: 0,
        }
    }

    pub fn script(mut self, slot: usize, operations: Vec<Errand>) -> World {
        self.nodes[slot].script.extend(operations);
        self
    }

    pub fn trims(mut self, slot: usize, count: u32) -> World {
        self.nodes[slot].trims = count;
        self
    }

    fn violate(&mut self, what: String) {
        if self.violation.is_none() {
            self.violation = Some(what);
        }
    }

    pub fn node(&mut self, slot: Slot) -> &mut NodeState {
        &mut self.nodes[slot as usize]
    }

    /// All that can happen next, but for kills and new operations of random runs.
    pub fn steps(&self) -> Vec<Step> {
        let mut steps: Vec<Step> = self.queues.keys().map(|&(from, to, lane)| Step::Deliver(from, to, lane)).collect();
        for node in self.nodes.iter().filter(|node| node.alive) {
            let slot = node.node.slot;
            if !node.script.is_empty() && node.running.len() < self.options.parallel.max(1) {
                steps.push(Step::Begin(slot));
            }
            for (&id, operation) in &node.running {
                if operation.holding {
                    steps.push(Step::Finish(slot, id));
                } else if operation.cancellable {
                    steps.push(Step::Cancel(slot, id));
                }
            }
            for (&id, work) in &node.fences {
                if work.swept {
                    steps.push(Step::Vacated(slot, id, false));
                } else {
                    if work.successor.is_none() || self.options.may_write_back {
                        steps.push(Step::Sweep(slot, id));
                    }
                    if work.successor.is_some() {
                        steps.push(Step::Vacated(slot, id, true));
                    }
                }
            }
            for (&grant, (_, _, old, come)) in &node.awaiting {
                if *come {
                    if self.nodes[old.slot as usize].alive {
                        steps.push(Step::Fetch(slot, grant, true));
                    }
                    if self.options.may_fail_fetch {
                        steps.push(Step::Fetch(slot, grant, false));
                    }
                }
            }
            if node.trims > 0 && !node.client.is_empty() {
                steps.push(Step::Trim(slot));
            }
            if node.client.next_due().is_some() {
                steps.push(Step::Tick(slot));
            }
            if self.options.kills > 0 && slot != 0 {
                steps.push(Step::Kill(slot));
            }
        }
        steps
    }

    /// Everything asked for has been done.
    pub fn at_rest(&self) -> bool {
        self.nodes.iter().all(|node| {
            !node.alive || (node.running.is_empty() && node.script.is_empty() && node.client.waiting().next().is_none())
        }) && self.servers.iter().all(|server| server.resources().all(|resource| server.waiters(resource).is_empty()))
    }

    pub fn apply(&mut self, step: &Step) {
        match *step {
            Step::Deliver(from, to, lane) => {
                let queue = self.queues.get_mut(&(from, to, lane)).expect("a queue");
                let wire = queue.pop_front().expect("not empty");
                if queue.is_empty() {
                    self.queues.remove(&(from, to, lane));
                }
                self.deliver(from, to, wire);
            }
            Step::Begin(slot) => {
                let operation = self.node(slot).script.pop_front().expect("a script");
                self.begin(slot, operation);
            }
            Step::Finish(slot, id) => self.finish(slot, id),
            Step::Cancel(slot, id) => {
                let operation = self.node(slot).running.remove(&id).expect("running");
                self.unpin_all(slot, operation);
            }
            Step::Sweep(slot, id) => self.sweep(slot, id),
            Step::Vacated(slot, id, hand_over) => self.vacated(slot, id, hand_over),
            Step::Fetch(slot, grant, ok) => self.fetch(slot, grant, ok),
            Step::Trim(slot) => {
                self.node(slot).trims -= 1;
                self.trim(slot, 0);
            }
            Step::Tick(slot) => {
                let now = self.node(slot).client.next_due().expect("due");
                self.now = self.now.max(now);
                let mut effects = Vec::new();
                let mut policy = Policy { generous: self.options.generous };
                let now = self.now;
                self.node(slot).client.tick(now, &mut policy, &mut effects);
                self.client_effects(slot, effects, None);
            }
            Step::Kill(slot) => {
                self.options.kills = self.options.kills.saturating_sub(1);
                self.kill(slot);
            }
        }
    }

    pub fn trim(&mut self, slot: Slot, keep: usize) {
        let mut effects = Vec::new();
        self.node(slot).client.trim(keep, &mut effects);
        self.client_effects(slot, effects, None);
    }

    pub fn begin(&mut self, slot: Slot, mut operation: Errand) {
        self.last_operation += 1;
        let id = self.last_operation;
        operation.since = Ignored(self.now);
        self.node(slot).running.insert(id, operation);
        self.next_pin(slot, id);
    }

    fn next_pin(&mut self, slot: Slot, id: u64) {
        loop {
            self.last_token += 1;
            let token = PinToken(self.last_token);
            let now = self.now;
            let truths = self.true_sizes.clone();
            let node = self.node(slot);
            let operation = node.running.get_mut(&id).expect("running");
            let Some(pin) = operation.pins.get(operation.tokens.len()) else {
                operation.holding = true;
                return;
            };
            let request = PinRequest {
                token,
                resource: pin.resource,
                range: pin.range,
                want: pin.want,
                kind: pin.kind,
                through_fence: pin.through_fence,
                no_growth: pin.no_growth,
                r#try: pin.r#try,
                one_shot: pin.one_shot,
            };
            if pin.one_shot {
                operation.truths = BTreeSet::from([truths.get(&pin.resource).copied().unwrap_or(0)]);
            }
            operation.tokens.push(token);
            let mut effects = Vec::new();
            let pinned = node.client.pin(request, now, &mut effects);
            if pinned {
                self.pinned(slot, token);
            }
            self.client_effects(slot, effects, None);
            if !pinned {
                return;
            }
        }
    }

    fn by_token(&self, slot: Slot, token: PinToken) -> Option<(u64, PinSpec)> {
        self.nodes[slot as usize].running.iter().find_map(|(&id, operation)| {
            let index = operation.tokens.iter().position(|&other| other == token)?;
            Some((id, operation.pins[index].clone()))
        })
    }

    /// A pin is there: it sees what it protects.
    fn pinned(&mut self, slot: Slot, token: PinToken) {
        if let Some((_, pin)) = self.by_token(slot, token) {
            self.look(slot, &pin);
        }
    }

    fn look(&mut self, slot: Slot, pin: &PinSpec) {
        let is_honest = !self.is_lied_about(pin.resource);
        let held = self.nodes[slot as usize].client.held(pin.resource, pin.range);
        if !held.is_some_and(|held| held.covers(pin.kind.mode())) {
            self.violate(format!(
                "invariant 1: node {slot} uses {} {} as {:?} but holds {held:?}",
                pin.resource, pin.range, pin.kind
            ));
        }
        if !is_honest {
            return;
        }
        if pin.resource.class == Class::Attr {
            let mine = self.nodes[slot as usize].sizes.get(&pin.resource).copied().unwrap_or(0);
            let size = self.true_sizes.get(&pin.resource).copied().unwrap_or(0);
            if pin.kind != PinKind::Extend && mine != size {
                self.violate(format!("node {slot} sees size {mine} of {}, it is {size}", pin.resource));
            }
            return;
        }
        for page in pin.range.lo..pin.range.hi {
            let key = (pin.resource, page);
            let stored = self.storage.get(&key).copied().unwrap_or(0);
            let latest = self.latest.get(&key).copied().unwrap_or(0);
            let &mut (seen, _) = self.node(slot).cache.entry(key).or_insert((stored, false));
            if seen != latest {
                self.violate(format!(
                    "node {slot} sees version {seen} of page {page} of {}, the latest is {latest}",
                    pin.resource
                ));
            }
        }
    }

    fn finish(&mut self, slot: Slot, id: u64) {
        let operation = self.node(slot).running.remove(&id).expect("running");
        for (pin, &token) in operation.pins.iter().zip(&operation.tokens) {
            if self.nodes[slot as usize].client.is_broken(token) {
                // The server lost the lock: the caller gets EIO.
                continue;
            }
            self.look(slot, pin);
            let excluded = |other: &PinSpec| {
                (pin.kind == PinKind::Exclusive || other.kind == PinKind::Exclusive)
                    && pin.resource == other.resource
                    && pin.range.overlaps(other.range)
            };
            let beside = self.nodes[slot as usize].running.values().any(|other| {
                other
                    .tokens
                    .iter()
                    .zip(&other.pins)
                    .any(|(&token, pin)| excluded(pin) && self.nodes[slot as usize].client.is_pinned(token))
            });
            if beside {
                self.violate(format!("an exclusive pin of node {slot} on {} does not run alone", pin.resource));
            }
            if pin.kind == PinKind::Shared || self.is_lied_about(pin.resource) {
                continue;
            }
            if pin.resource.class == Class::Attr {
                let size = self.true_sizes.entry(pin.resource).or_default();
                *size = if pin.kind == PinKind::Extend { pin.size.max(*size) } else { pin.size };
                let size = *size;
                let mine = self.node(slot).sizes.entry(pin.resource).or_default();
                *mine = if pin.kind == PinKind::Extend { pin.size.max(*mine) } else { pin.size };
                for (other, pin) in
                    self.nodes.iter_mut().flat_map(|node| node.running.values_mut()).filter_map(|other| {
                        other.pins.get(other.tokens.len().checked_sub(1)?).cloned().map(|pin| (other, pin))
                    })
                {
                    if pin.one_shot {
                        other.truths.insert(size);
                    }
                }
                continue;
            }
            for page in pin.range.lo..pin.range.hi {
                let key = (pin.resource, page);
                let latest = self.latest.entry(key).or_default();
                *latest += 1;
                let latest = *latest;
                self.node(slot).cache.insert(key, (latest, true));
            }
        }
        self.finished += 1;
        self.unpin_all(slot, operation);
    }

    fn unpin_all(&mut self, slot: Slot, operation: Errand) {
        let now = self.now;
        for token in operation.tokens {
            let mut effects = Vec::new();
            self.node(slot).client.unpin(token, now, &mut effects);
            self.client_effects(slot, effects, None);
        }
    }

    fn sweep(&mut self, slot: Slot, id: FenceId) {
        let work = self.nodes[slot as usize].fences[&id].clone();
        // Write-back ends in a COMMIT, whose grant proves that a hand-over was taken.
        let server = &mut self.servers[work.resource.server as usize];
        if server.is_incoming(work.resource, work.grant) {
            let mut effects = Vec::new();
            let taken = LockMessage::Taken { grant: work.grant, resource: work.resource };
            server.handle(self.nodes[slot as usize].node, taken, self.now, &mut effects).expect("an honest client");
            self.server_effects(work.resource.server, effects);
        }
        let pages: Vec<u64> = self
            .node(slot)
            .cache
            .range((work.resource, work.range.lo)..(work.resource, work.range.hi))
            .map(|(&(_, page), _)| page)
            .collect();
        for page in pages {
            let key = (work.resource, page);
            let (version, dirty) = self.node(slot).cache[&key];
            if dirty {
                let stored = self.storage.entry(key).or_default();
                let old = *stored;
                *stored = version;
                if old > version {
                    self.violate(format!("node {slot} writes version {version} of page {page} over {old}"));
                }
            }
            match work.keep {
                Some(_) => self.node(slot).cache.insert(key, (version, false)),
                None => self.node(slot).cache.remove(&key),
            };
        }
        self.node(slot).fences.get_mut(&id).expect("there").swept = true;
    }

    fn vacated(&mut self, slot: Slot, id: FenceId, hand_over: bool) {
        let work = self.node(slot).fences.remove(&id).expect("there");
        let outcome = if hand_over { Vacated::HandedOver } else { Vacated::WrittenBack };
        let now = self.now;
        let mut effects = Vec::new();
        let range = (work.resource, work.range.lo)..(work.resource, work.range.hi);
        let held = self.nodes[slot as usize].client.held(work.resource, work.range);
        let accepted = self.node(slot).client.vacated(id, outcome, now, &mut effects);
        let report = match (work.resource.class, held) {
            (Class::Attr, Some(Mode::X)) => Some(Report::Exactly(self.nodes[slot as usize].sizes[&work.resource])),
            (Class::Attr, Some(Mode::E)) => Some(Report::AtLeast(self.nodes[slot as usize].sizes[&work.resource])),
            _ => None,
        };
        if !accepted {
            self.client_effects(slot, effects, None);
            return;
        }
        if hand_over {
            let successor = work.successor.expect("a successor");
            let pages: Pages = self.nodes[slot as usize]
                .cache
                .range(range)
                .map(|(&(_, page), &(version, dirty))| (page, version, dirty))
                .collect();
            for &(page, _, _) in &pages {
                self.node(slot).cache.remove(&(work.resource, page));
            }
            self.node(slot).transits.insert((work.grant, work.range.lo), (work.resource, pages));
            self.send(slot, successor.slot, Lane::Io, Wire::HandOver { grant: successor.grant });
        } else {
            let left: Vec<_> =
                self.nodes[slot as usize].cache.range(range).map(|(&key, &value)| (key, value)).collect();
            for ((_, page), (_, dirty)) in left {
                if dirty || work.keep.is_none() {
                    self.violate(format!(
                        "invariant 3: node {slot} gives up page {page} of {} that is still cached",
                        work.resource
                    ));
                }
            }
        }
        if work.resource.class == Class::Attr && work.keep.is_none() {
            self.node(slot).sizes.remove(&work.resource);
        }
        self.client_effects(slot, effects, report);
    }

    fn fetch(&mut self, slot: Slot, grant: GrantId, ok: bool) {
        let (resource, range, old, _) = self.nodes[slot as usize].awaiting[&grant];
        let pages = self.nodes[old.slot as usize].transits.get(&(old.grant, range.lo)).cloned();
        let now = self.now;
        let mut effects = Vec::new();
        match pages {
            Some((_, pages)) if ok => {
                for (page, version, dirty) in pages {
                    self.node(slot).cache.insert((resource, page), (version, dirty));
                }
                self.node(slot).client.fetched(grant, true, now, &mut effects);
            }
            _ => {
                self.node(slot).awaiting.get_mut(&grant).expect("there").3 = false;
                self.node(slot).client.fetched(grant, false, now, &mut effects);
            }
        }
        self.client_effects(slot, effects, None);
    }

    pub fn is_lied_about(&self, resource: Resource) -> bool {
        self.liar == Some(resource.server)
    }

    /// The liar says `message` to `to`. What is refused has no effect.
    pub fn lie(&mut self, to: Slot, message: LockMessage) -> Result<(), Violation> {
        let liar = self.liar.expect("there is one");
        let (now, before) = (self.now, self.nodes[to as usize].client.clone());
        let mut effects = Vec::new();
        if is_for_server(&message) {
            let from = self.nodes[liar as usize].node;
            let outcome = self.servers[to as usize].handle(from, message, now, &mut effects);
            self.server_effects(to, effects);
            return outcome;
        }
        let mut policy = Policy { generous: self.options.generous };
        let mut effects = Vec::new();
        let outcome = self.node(to).client.handle(liar, message, now, &mut policy, &mut effects);
        if outcome.is_err() && (!effects.is_empty() || before != self.nodes[to as usize].client) {
            self.violate("a message that was refused has changed something".into());
        }
        self.client_effects(to, effects, Some(Report::Exactly(0)));
        outcome
    }

    /// It is found out: fenced, its locks released, what it granted void, and whoever waits for it is told so.
    pub fn end_lies(&mut self) {
        let liar = self.liar.expect("there is one");
        self.kill(liar);
        for slot in 0..liar {
            let mut effects = Vec::new();
            self.node(slot).client.server_lost(liar, &mut effects);
            self.client_effects(slot, effects, None);
            let waits = |errand: &Errand| errand.pins.iter().any(|pin| pin.resource.server == liar);
            let fruitless: Vec<u64> = self.nodes[slot as usize]
                .running
                .iter()
                .filter(|(_, errand)| waits(errand))
                .map(|(&id, _)| id)
                .collect();
            for id in fruitless {
                let errand = self.node(slot).running.remove(&id).expect("just listed");
                self.unpin_all(slot, errand);
            }
        }
    }

    fn send(&mut self, from: Slot, to: Slot, lane: Lane, wire: Wire) {
        if self.liar == Some(to) {
            if let Wire::Lock(message, _) = wire {
                self.heard.push(message);
            }
            return;
        }
        if self.nodes[to as usize].alive {
            self.queues.entry((from, to, lane)).or_default().push_back(wire);
        }
    }

    fn client_effects(&mut self, slot: Slot, effects: Vec<ClientEffect>, mut report: Option<Report>) {
        for effect in effects {
            match effect {
                ClientEffect::Send { to, message } => {
                    let carried = match &message {
                        LockMessage::Release { .. } => report.take(),
                        LockMessage::Glimpsed { resource, .. }
                            if self.nodes[slot as usize].client.held(*resource, Range::UNIT) == Some(Mode::E) =>
                        {
                            Some(Report::AtLeast(self.nodes[slot as usize].sizes[resource]))
                        }
                        _ => None,
                    };
                    if let LockMessage::Lock { request, resource, .. } = &message {
                        self.asked.insert(*request, *resource);
                    }
                    self.send(slot, to, message.lane(), Wire::Lock(message, carried));
                }
                ClientEffect::Pinned { token } => {
                    self.pinned(slot, token);
                    if let Some((id, _)) = self.by_token(slot, token) {
                        self.next_pin(slot, id);
                    }
                }
                ClientEffect::PinFailed { token, .. } => {
                    if let Some((id, pin)) = self.by_token(slot, token) {
                        if !pin.r#try && !self.is_lied_about(pin.resource) {
                            self.violate(format!("a pin of node {slot} on {} was denied", pin.resource));
                        }
                        let operation = self.node(slot).running.remove(&id).expect("running");
                        self.finished += 1;
                        self.unpin_all(slot, operation);
                    }
                }
                ClientEffect::Observed { token } => {
                    let size = match report {
                        Some(Report::Exactly(size)) => size,
                        _ => unreachable!("OBSERVED carries a size"),
                    };
                    if let Some((id, pin)) = self.by_token(slot, token) {
                        let operation = self.node(slot).running.remove(&id).expect("running");
                        if !operation.truths.contains(&size) && !self.is_lied_about(pin.resource) {
                            self.violate(format!(
                                "node {slot} observes size {size} of {}, true were {:?}",
                                pin.resource, operation.truths
                            ));
                        }
                        self.finished += 1;
                        self.unpin_all(slot, operation);
                    }
                }
                ClientEffect::Vacate { fence, resource, range, held, grant, keep, successor, .. } => {
                    // Handed back: the pages are this node's again.
                    let back: Vec<(GrantId, u64)> = self.nodes[slot as usize]
                        .transits
                        .keys()
                        .filter(|&&(other, lo)| other == grant && range.contains(Range::new(lo, lo + 1)))
                        .copied()
                        .collect();
                    for key in back {
                        for (page, version, dirty) in self.node(slot).transits.remove(&key).expect("just seen").1 {
                            self.node(slot).cache.insert((resource, page), (version, dirty));
                        }
                    }
                    self.node(slot)
                        .fences
                        .insert(fence, FenceWork { resource, range, held, grant, keep, successor, swept: false });
                }
                ClientEffect::Acquired { resource, grant, .. } => {
                    self.node(slot).awaiting.remove(&grant);
                    if resource.class == Class::Attr {
                        let Some(Report::Exactly(size)) = report else { unreachable!("GRANT carries a size") };
                        let mine = self.node(slot).sizes.entry(resource).or_insert(size);
                        *mine = size.max(*mine);
                    }
                }
                ClientEffect::AwaitHandOver { grant, resource, range, from } => {
                    let come = self.node(slot).early_hand_overs.remove(&grant);
                    self.node(slot).awaiting.insert(grant, (resource, range, from, come));
                }
                ClientEffect::Dropped { range, grant, .. } => {
                    self.node(slot).transits.remove(&(grant, range.lo));
                }
                ClientEffect::Lost { resource, range, grant, .. } => {
                    let node = self.node(slot);
                    node.fences.retain(|_, work| work.grant != grant);
                    node.awaiting.remove(&grant);
                    node.transits.remove(&(grant, range.lo));
                    node.cache
                        .retain(|&(other, page), _| other != resource || !range.contains(Range::new(page, page + 1)));
                    if resource.class == Class::Attr {
                        node.sizes.remove(&resource);
                    }
                }
            }
        }
    }

    fn deliver(&mut self, from: Slot, to: Slot, wire: Wire) {
        let now = self.now;
        let (message, report) = match wire {
            Wire::HandOver { grant } => {
                let node = self.node(to);
                match node.awaiting.get_mut(&grant) {
                    Some(awaiting) => awaiting.3 = true,
                    None => {
                        node.early_hand_overs.insert(grant);
                    }
                }
                return;
            }
            Wire::Lock(message, report) => (message, report),
        };
        if is_for_server(&message) {
            let sender = self.nodes[from as usize].node;
            if let LockMessage::Release { resource, grant, .. } | LockMessage::Glimpsed { resource, grant, .. } =
                &message
                && let Some(report) = report
            {
                let known = self.servers[to as usize]
                    .holders(*resource)
                    .iter()
                    .any(|holder| holder.grant == *grant && holder.slot == from);
                if !known && matches!(message, LockMessage::Release { .. }) {
                    self.violate(format!("what node {from} reports of {resource} comes too late"));
                }
                if known {
                    let size = self.home_sizes.entry(*resource).or_default();
                    *size = match report {
                        Report::Exactly(exact) => exact,
                        Report::AtLeast(least) => least.max(*size),
                    };
                }
            }
            let mut effects = Vec::new();
            let outcome = self.servers[to as usize].handle(sender, message, now, &mut effects);
            self.server_effects(to, effects);
            if let Err(violation) = outcome {
                self.violate(format!("the server of {to} takes node {from} for a liar: {violation}"));
            }
        } else {
            // A GRANT over what is held X already brings no news.
            let mut report = report;
            if let LockMessage::Grant { resource, .. } = &message
                && resource.class == Class::Attr
                && self.nodes[to as usize].client.held(*resource, Range::UNIT) == Some(Mode::X)
            {
                report = Some(Report::Exactly(self.nodes[to as usize].sizes[resource]));
            }
            let mut policy = Policy { generous: self.options.generous };
            let mut effects = Vec::new();
            let outcome = self.node(to).client.handle(from, message, now, &mut policy, &mut effects);
            self.client_effects(to, effects, report);
            if let Err(violation) = outcome {
                self.violate(format!("the client of {to} takes the server of {from} for a liar: {violation}"));
            }
        }
    }

    fn server_effects(&mut self, slot: Slot, effects: Vec<ServerEffect>) {
        for ServerEffect::Send { to, message } in effects {
            let resource = match &message {
                LockMessage::Grant { resource, .. } => Some(*resource),
                LockMessage::Observed { request } => self.asked.get(request).copied(),
                _ => None,
            };
            if let LockMessage::Grant { request, .. }
            | LockMessage::Observed { request }
            | LockMessage::Deny { request, .. } = &message
            {
                self.asked.remove(request);
            }
            let report = resource
                .filter(|resource| resource.class == Class::Attr)
                .map(|resource| Report::Exactly(self.home_sizes.get(&resource).copied().unwrap_or(0)));
            self.send(slot, to, message.lane(), Wire::Lock(message, report));
        }
    }

    /// The node dies with all it had; it is fenced, then the servers are told.
    pub fn kill(&mut self, slot: Slot) {
        let node = self.nodes[slot as usize].node;
        self.nodes[slot as usize] = NodeState { alive: false, ..Self::fresh_node(node, &self.options) };
        self.queues.retain(|&(from, to, _), _| from != slot && to != slot);
        for server in 0..self.servers.len() {
            let mut effects = Vec::new();
            let now = self.now;
            self.servers[server].node_gone(slot, now, &mut effects);
            self.server_effects(server as Slot, effects);
        }
        self.settle_truth();
    }

    pub fn revive(&mut self, slot: Slot) {
        let Node { slot, incarnation } = self.nodes[slot as usize].node;
        self.nodes[slot as usize] = Self::fresh_node(Node { slot, incarnation: incarnation + 1 }, &self.options);
    }

    /// The server of `slot` restarts with an empty table: what was not home is lost, and `server_back` must follow.
    pub fn restart_server(&mut self, slot: Slot) {
        let incarnation = 2 + self.now as u32;
        let options = ServerOptions {
            hand_over: self.options.hand_over,
            conflict_granule: self.options.conflict_granule.max(1),
            mutations: self.options.mutations,
            ..ServerOptions::default()
        };
        self.servers[slot as usize] = LockServer::new(slot, incarnation, options);
        for (&(from, to, _), queue) in self.queues.iter_mut() {
            queue.retain(|wire| match wire {
                Wire::Lock(message, _) if is_for_server(message) => to != slot,
                Wire::Lock(..) => from != slot,
                Wire::HandOver { .. } => true,
            });
        }
        self.queues.retain(|_, queue| !queue.is_empty());
        self.latest = self
            .latest
            .iter()
            .map(|(&key, &version)| {
                (key, if key.0.server == slot { self.storage.get(&key).copied().unwrap_or(0) } else { version })
            })
            .collect();
        let sizes: Vec<Resource> = self.true_sizes.keys().filter(|resource| resource.server == slot).copied().collect();
        for resource in sizes {
            let size = self.home_sizes.get(&resource).copied().unwrap_or(0);
            self.true_sizes.insert(resource, size);
            for operation in self.nodes.iter_mut().flat_map(|node| node.running.values_mut()) {
                operation.truths.insert(size);
            }
        }
        for node in 0..self.nodes.len() as Slot {
            let mut effects = Vec::new();
            self.node(node).client.server_lost(slot, &mut effects);
            self.client_effects(node, effects, None);
        }
    }

    pub fn server_back(&mut self, slot: Slot) {
        let now = self.now;
        for node in 0..self.nodes.len() as Slot {
            let mut effects = Vec::new();
            self.node(node).client.server_back(slot, now, &mut effects);
            self.client_effects(node, effects, None);
        }
    }

    /// What a dead node had not sent home is lost; what others hold is not. Says what is true from now on.
    fn settle_truth(&mut self) {
        let keys: Vec<(Resource, u64)> = self.latest.keys().copied().collect();
        for (resource, page) in keys {
            let at = Range::new(page, page + 1);
            let key = (resource, page);
            let holders = self.servers[resource.server as usize].holders(resource);
            let here = |handing: bool| {
                holders
                    .iter()
                    .find(|holder| holder.mode == Mode::X && holder.range.overlaps(at) && holder.handing == handing)
            };
            let stored = self.storage.get(&key).copied().unwrap_or(0);
            // A copy in transit counts only under the grant the server knows: others wait to be dropped.
            let fetched = |holder: &HolderView| {
                let node = &self.nodes[holder.slot as usize];
                let held = node.client.grants().any(|view| {
                    view.resource == resource && view.range.overlaps(at) && !view.incoming && !view.in_transit
                });
                held.then(|| node.cache.get(&key).map(|&(version, _)| version)).flatten()
            };
            let in_transit = |holder: &HolderView| {
                let kept = self.nodes[holder.slot as usize]
                    .transits
                    .iter()
                    .filter(|((grant, _), (other, _))| (*grant, *other) == (holder.grant, resource));
                kept.flat_map(|(_, (_, pages))| pages).find(|entry| entry.0 == page).map(|entry| entry.1)
            };
            let candidates = [here(false), here(true)];
            let truth = candidates.iter().flatten().find_map(|holder| fetched(holder).or_else(|| in_transit(holder)));
            self.latest.insert(key, truth.unwrap_or(stored));
        }
        let resources: Vec<Resource> = self.true_sizes.keys().copied().collect();
        for resource in resources {
            let mut size = self.home_sizes.get(&resource).copied().unwrap_or(0);
            for wire in self.queues.values().flatten() {
                if let Wire::Lock(LockMessage::Release { resource: other, .. }, Some(report)) = wire
                    && *other == resource
                {
                    size = match *report {
                        Report::Exactly(exact) => exact,
                        Report::AtLeast(least) => least.max(size),
                    };
                }
            }
            for node in &self.nodes {
                match node.client.held(resource, Range::UNIT) {
                    Some(Mode::X) => size = node.sizes[&resource],
                    Some(Mode::E) => size = size.max(node.sizes[&resource]),
                    _ => {}
                }
            }
            self.true_sizes.insert(resource, size);
            for operation in self.nodes.iter_mut().flat_map(|node| node.running.values_mut()) {
                operation.truths.insert(size);
            }
        }
    }

    /// Invariant 2, as the nodes see it: nobody holds beside an exclusive holder.
    pub fn check_exclusion(&mut self) {
        let mut wrong = None;
        for (index, a) in self.nodes.iter().enumerate() {
            for held in a.client.grants().filter(|held| !held.incoming && !held.in_transit) {
                if self.is_lied_about(held.resource) {
                    continue;
                }
                for b in &self.nodes[index + 1..] {
                    for other in b.client.grants().filter(|other| {
                        !other.incoming
                            && !other.in_transit
                            && other.resource == held.resource
                            && other.range.overlaps(held.range)
                    }) {
                        if !held.mode.compatible(other.mode) {
                            wrong = Some(format!(
                                "invariant 2: {held:?} of {} beside {other:?} of {}",
                                a.node.slot, b.node.slot
                            ));
                        }
                    }
                }
            }
        }
        if let Some(wrong) = wrong {
            self.violate(wrong);
        }
    }

    /// Rule 1: the servers' records cover what the nodes believe.
    pub fn check_records(&mut self) {
        let mut wrong = None;
        for node in self.nodes.iter().filter(|node| node.alive) {
            for held in node.client.grants().filter(|held| !held.in_transit && !self.is_lied_about(held.resource)) {
                let holders = self.servers[held.resource.server as usize].holders(held.resource);
                let mut at = held.range.lo;
                for holder in
                    holders.iter().filter(|holder| holder.slot == node.node.slot && holder.range.overlaps(held.range))
                {
                    if holder.range.lo > at || !holder.mode.covers(held.mode) {
                        break;
                    }
                    at = holder.range.hi;
                }
                if at < held.range.hi {
                    wrong = Some(format!("node {} believes in {held:?}, the server in {holders:?}", node.node.slot));
                }
            }
        }
        if let Some(wrong) = wrong {
            self.violate(wrong);
        }
    }
}
