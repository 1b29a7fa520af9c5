//! Between the lock machines and the rest: pins as guards, messages in and out, and the work that
//! a revoke or a hand-over asks of this node.
//!
//! The order of effects is the order of the machines. What travels with lock messages is attached here:
//! attributes with GRANT and OBSERVED of ATTR, the holder's changes with RELEASE and GLIMPSED.
//! A home takes those changes into its store before its lock server sees the message, so that
//! whatever the server grants next is granted with them.

use super::transfer::SPARE_PAGES_MAX;
use super::*;
use verbfs_lock::{PinKind, PinRequest, PinToken, RevokePolicy, Vacated, is_for_server};
use verbfs_protocol::lock::Successor;

/// Hand-overs from one node under grants of one server that may be here before the grants that announce them. More than
/// operations can be waiting for.
const ARRIVED_MAX: usize = 1024;

/// A range held for an operation; dropping it ends the pin.
pub struct Pin {
    volume: Rc<Volume>,
    token: PinToken,
    done: Cell<bool>,
}

impl Drop for Pin {
    fn drop(&mut self) {
        if !self.done.get() {
            self.volume.unpin(self.token);
        }
    }
}

impl Pin {
    pub(crate) fn number(&self) -> u64 {
        self.token.0
    }

    /// The lock under this pin was lost with its server: what was done under it is void.
    pub fn check(&self) -> Result<()> {
        if self.volume.lock_client.borrow().is_broken(self.token) { Err(Errno::EIO) } else { Ok(()) }
    }
}

pub(crate) struct WaitingPin {
    pub sender: Sender<std::result::Result<Outcome, i32>>,
    pub server: Slot,
    pub since: Instant,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Pinned,
    Observed,
}

/// A request whose answer brings attributes or entries.
pub(crate) struct Asked {
    pub resource: Resource,
    pub need: Range,
    pub since: Instant,
}

/// Hand-overs towards this node of which one half is here.
#[derive(Default)]
pub(crate) struct HandOvers {
    /// Grant seen, message not.
    awaited: HashMap<GrantId, (Resource, Range, Successor)>,
    /// Message seen, grant not. By sender: until the grant says who the old holder is, anybody's word may be the true one.
    arrived: HashMap<(GrantId, Slot), HandOver>,
    /// Resources of hand-overs whose pages are not all here yet.
    pub fetching: HashMap<GrantId, (Resource, Range)>,
}

/// How a pin is wanted; see [`PinRequest`].
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct PinOptions {
    pub through_fence: bool,
    pub one_shot: bool,
}

impl Volume {
    /// Waits for a lock and pins it.
    ///
    /// # Errors
    /// EIO when the server is no member or unreachable for longer than the peer time-out, or what the server denies with.
    pub async fn pin(self: &Rc<Self>, resource: Resource, range: Range, want: Range, kind: PinKind) -> Result<Pin> {
        self.pin_with(resource, range, want, kind, PinOptions::default()).await.map(|(pin, _)| pin)
    }

    pub(crate) async fn pin_with(
        self: &Rc<Self>,
        resource: Resource,
        range: Range,
        want: Range,
        kind: PinKind,
        options: PinOptions,
    ) -> Result<(Pin, Outcome)> {
        debug_assert!(!range.is_empty() && want.contains(range), "{resource} {range} {want}");
        // Inode numbers come from directories of other homes: one of a home that does not exist would be waited for for ever.
        if !self.options.members.contains(&resource.server) {
            return Err(Errno::EIO);
        }
        let (pin, receiver) = match self.begin_pin(resource, range, want, kind, options) {
            (pin, None) => return Ok((pin, Outcome::Pinned)),
            (pin, Some(receiver)) => (pin, receiver),
        };
        let began = Instant::now();
        let outcome = receiver.await;
        self.metrics.lock_wait[metric_class(resource.class)].record(began.elapsed());
        match outcome {
            Some(Ok(Outcome::Pinned)) => Ok((pin, Outcome::Pinned)),
            Some(Ok(Outcome::Observed)) => {
                pin.done.set(true);
                Ok((pin, Outcome::Observed))
            }
            Some(Err(errno)) => {
                pin.done.set(true);
                Err(Errno::from_peer(errno))
            }
            // The server's peer time-out: dropping the pin cancels the request.
            None => Err(Errno::EIO),
        }
    }

    /// Pins only what is held, without asking anybody.
    pub(crate) fn pin_held(self: &Rc<Self>, resource: Resource, range: Range, kind: PinKind) -> Option<Pin> {
        let mode = self.lock_client.borrow().held(resource, range)?;
        let enough = match kind {
            PinKind::Shared => mode.covers(Mode::S),
            PinKind::Extend => mode.covers(Mode::E),
            PinKind::Write | PinKind::Exclusive => mode == Mode::X,
        };
        if !enough {
            return None;
        }
        match self.begin_pin(resource, range, range, kind, PinOptions::default()) {
            (pin, None) => Some(pin),
            (_cancelled, Some(_)) => None,
        }
    }

    fn begin_pin(
        self: &Rc<Self>,
        resource: Resource,
        range: Range,
        want: Range,
        kind: PinKind,
        options: PinOptions,
    ) -> (Pin, Option<Receiver<std::result::Result<Outcome, i32>>>) {
        let token = PinToken(self.number());
        let request = PinRequest {
            want,
            through_fence: options.through_fence,
            one_shot: options.one_shot,
            ..PinRequest::new(token, resource, range, kind)
        };
        let mut effects = Vec::new();
        let pinned = self.lock_client.borrow_mut().pin(request, self.ticks(), &mut effects);
        self.client_effects.borrow_mut().extend(effects);
        let pin = Pin { volume: self.clone(), token, done: Cell::new(false) };
        if pinned {
            self.metrics.lock_hits[metric_class(resource.class)].increment();
            return (pin, None);
        }
        // Effects wait for their turn, so no answer has come yet.
        let (sender, receiver) = oneshot();
        let waiting = WaitingPin { sender, server: resource.server, since: Instant::now() };
        self.waiting_pins.borrow_mut().insert(token.0, waiting);
        (pin, Some(receiver))
    }

    fn unpin(&self, token: PinToken) {
        let waiting = self.waiting_pins.borrow_mut().remove(&token.0);
        drop(waiting);
        let mut effects = Vec::new();
        self.lock_client.borrow_mut().unpin(token, self.ticks(), &mut effects);
        self.client_effects.borrow_mut().extend(effects);
    }

    /// Gives up what of a cached lock nobody pins; whether there was any.
    pub(crate) fn give_up(&self, resource: Resource, range: Range) -> bool {
        let mut effects = Vec::new();
        let given = self.lock_client.borrow_mut().give_up_within(resource, range, usize::MAX, &mut effects);
        self.client_effects.borrow_mut().extend(effects);
        given > 0
    }

    /// Carries out one effect or message; `false` when there is none.
    pub(crate) fn pump(self: &Rc<Self>) -> bool {
        let effect = self.client_effects.borrow_mut().pop_front();
        if let Some(effect) = effect {
            self.client_effect(effect);
            return true;
        }
        let effect = self.server_effects.borrow_mut().pop_front();
        if let Some(ServerEffect::Send { to, message }) = effect {
            self.send_lock(to, message);
            return true;
        }
        let message = self.inbox.borrow_mut().pop_front();
        if let Some(message) = message {
            self.receive(self.options.me, message);
            return true;
        }
        false
    }

    /// Sends a lock message with what belongs to it.
    fn send_lock(self: &Rc<Self>, to: Slot, message: LockMessage) {
        let mut envelope = Envelope { message, attributes: None, home_time: None, report: None, entries: None };
        match &envelope.message {
            LockMessage::Release { resource, .. } | LockMessage::Glimpsed { resource, .. }
                if resource.class == Class::Attr =>
            {
                envelope.report = self.take_report(resource.ino);
            }
            LockMessage::Grant { resource, .. } if matches!(resource.class, Class::Attr | Class::Open) => {
                envelope.attributes = self.stored_attributes(resource.ino).ok().flatten().map(Box::new);
                envelope.home_time = Some(self.clock());
            }
            LockMessage::Observed { request } => {
                let asked = self.asked.borrow_mut().remove(request);
                if let Some(Asked { since, .. }) = &asked {
                    self.metrics.glimpse.record_since(*since);
                }
                envelope.attributes =
                    asked.and_then(|asked| self.stored_attributes(asked.resource.ino).ok().flatten()).map(Box::new);
                envelope.home_time = Some(self.clock());
            }
            _ => {}
        }
        match &envelope.message {
            LockMessage::Grant { request, resource, .. } => {
                if let Some(asked) = self.asked.borrow_mut().remove(request)
                    && resource.class == Class::Name
                {
                    envelope.entries = self.entries_of(resource.ino, asked.need.lo);
                }
                self.metrics.lock_grants[metric_class(resource.class)].increment();
            }
            LockMessage::Lock { resource, upgrade, .. } => {
                self.metrics.lock_requests[metric_class(resource.class)].increment();
                if upgrade.is_some() {
                    self.metrics.lock_upgrades[metric_class(resource.class)].increment();
                }
            }
            LockMessage::Revoke { resource, .. } => {
                self.metrics.lock_revokes_sent[metric_class(resource.class)].increment()
            }
            LockMessage::Release { resource, .. } => {
                self.metrics.lock_releases[metric_class(resource.class)].increment()
            }
            LockMessage::Deny { request, .. } => {
                self.asked.borrow_mut().remove(request);
                self.metrics.lock_denials[metric_class(Class::Data)].increment()
            }
            LockMessage::Glimpse { .. } => self.metrics.lock_glimpses.increment(),
            _ => {}
        }
        self.send(to, Message::Lock(envelope));
    }

    /// A peer's word about what it wants to lock: a resource of this server, a range of its space, a mode of its class.
    fn is_lockable(&self, resource: Resource, mode: Mode, need: Range, want: Range, one_shot: bool) -> bool {
        let home = match resource.class {
            Class::Rename => resource == Resource::rename(),
            Class::Data => true,
            Class::Name | Class::Open | Class::Attr => resource.ino.home() == resource.server,
        };
        let space = match resource.class {
            Class::Name | Class::Data => Range::ALL,
            Class::Rename | Class::Open | Class::Attr => Range::UNIT,
        };
        home && resource.server == self.slot()
            && !need.is_empty()
            && want.contains(need)
            && space.contains(want)
            && (mode != Mode::E || resource.class == Class::Attr)
            && (!one_shot || (resource.class == Class::Attr && mode == Mode::S))
    }

    /// A lock message from a node (also this one).
    pub(crate) fn receive_lock(self: &Rc<Self>, from: Node, envelope: Envelope) {
        let now = self.ticks();
        if is_for_server(&envelope.message) {
            if let LockMessage::Lock { request, resource, mode, flags, need, want, .. } = &envelope.message {
                if !self.is_lockable(*resource, *mode, *need, *want, flags.one_shot) || request.node != from {
                    self.send_lock(from.slot, LockMessage::Deny { request: *request, errno: libc::EINVAL });
                    return;
                }
                // A node of its own needs no telling what its store holds.
                let named = resource.class == Class::Name && need.len() == 1 && from.slot != self.slot();
                if named || (flags.one_shot && resource.class == Class::Attr) {
                    let asked = Asked { resource: *resource, need: *need, since: Instant::now() };
                    self.asked.borrow_mut().insert(*request, asked);
                }
            }
            if let LockMessage::Cancel { request, .. } = &envelope.message {
                self.asked.borrow_mut().remove(request);
            }
            // What the holder changed goes into the store before anything the server now grants goes out.
            let report = match &envelope.message {
                LockMessage::Release { resource, .. } | LockMessage::Glimpsed { resource, .. } => {
                    envelope.report.map(|report| (*resource, report))
                }
                _ => None,
            };
            let reporter_holds = report.is_some_and(|(resource, _)| {
                let holders = self.lock_server.borrow().holders(resource);
                holders.iter().any(|view| view.slot == from.slot && view.mode != Mode::S)
            });
            let opening = match &envelope.message {
                LockMessage::Lock { resource, .. } if resource.class == Class::Open => Some(resource.ino),
                _ => None,
            };
            let given_up: &[Ino] = match &envelope.message {
                LockMessage::Release { resource, .. } if resource.class == Class::Data => &[resource.ino],
                _ => &[],
            };
            let mut effects = Vec::new();
            let outcome = self.freeing_uncommitted(from.slot, false, given_up, || {
                self.lock_server.borrow_mut().handle(from, envelope.message, now, &mut effects)
            });
            if let Err(violation) = outcome {
                self.refuse(from.slot, violation.0);
                return;
            }
            if let Some((resource, report)) = report {
                if !plausible::report(&report) {
                    self.refuse(from.slot, "a report of attributes that cannot be");
                } else if reporter_holds && resource.class == Class::Attr {
                    self.apply_report(resource.ino, report);
                } else {
                    tracing::warn!(slot = from.slot, %resource, "attributes reported under no lock are not taken");
                }
            }
            self.server_effects.borrow_mut().extend(effects);
            if let Some(ino) = opening {
                self.opening_asked(ino, from.slot);
            }
            return;
        }
        let Envelope { message, attributes, home_time, entries, .. } = envelope;
        let about = match &message {
            LockMessage::Grant { resource, .. } => Some(*resource),
            _ => None,
        };
        let fits = |attributes: &Attributes| {
            plausible::attributes(attributes) && about.is_none_or(|resource| attributes.ino == resource.ino)
        };
        if !attributes.as_deref().is_none_or(fits) {
            self.refuse(from.slot, "attributes that cannot be");
            return;
        }
        // What is held before a grant of attributes says how far it brings news.
        let held_before = about
            .filter(|resource| resource.class == Class::Attr)
            .and_then(|resource| self.lock_client.borrow().held(resource, Range::UNIT));
        let observed = matches!(message, LockMessage::Observed { .. });
        if let LockMessage::Revoke { resource, .. } = &message {
            self.metrics.lock_revokes_received[metric_class(resource.class)].increment();
        }
        let thawed = match &message {
            LockMessage::Thaw { resource, .. } => Some(*resource),
            _ => None,
        };
        let mut effects = Vec::new();
        let outcome = self.lock_client.borrow_mut().handle(from.slot, message, now, &mut Policy(self), &mut effects);
        if let Err(violation) = outcome {
            self.refuse(from.slot, violation.0);
            return;
        }
        // No pin that rests on the grant runs before these are known: its effect is still to be carried out.
        match about {
            Some(Resource { class: Class::Attr, ino, .. }) => {
                self.adopt_attributes(ino, held_before, attributes.as_deref().cloned(), home_time)
            }
            // Layouts do not change while an inode lives, and an inode does not live twice.
            Some(Resource { class: Class::Open, ino, .. }) => {
                let mut files = self.files.borrow_mut();
                let file = files.entry(ino).or_default();
                match &attributes {
                    Some(attributes) if !self.is_usable(&attributes.layout) => {}
                    Some(attributes) => file.layout = Some(Rc::new(attributes.layout.clone())),
                    None => file.gone = true,
                }
            }
            Some(Resource { class: Class::Name, ino, .. }) => {
                if let Some(entries) = entries {
                    self.adopt_entries(from.slot, ino, entries);
                }
            }
            _ => {}
        }
        // Somebody asks for the size of what nobody writes here any more: let the next to ask have it to keep.
        if let Some(resource) = thawed
            && self.files.borrow().get(&resource.ino).is_none_or(|file| file.writers == 0)
        {
            self.lock_client.borrow_mut().give_up(resource, usize::MAX, &mut effects);
        }
        if observed {
            for effect in &effects {
                if let ClientEffect::Observed { token } = effect {
                    self.glimpse_answers.borrow_mut().insert(token.0, attributes.clone());
                }
            }
        }
        self.client_effects.borrow_mut().extend(effects);
    }

    fn client_effect(self: &Rc<Self>, effect: ClientEffect) {
        match effect {
            ClientEffect::Send { to, message } => self.send_lock(to, message),
            ClientEffect::Pinned { token } => self.finish_pin(token, Ok(Outcome::Pinned)),
            ClientEffect::PinFailed { token, errno } => self.finish_pin(token, Err(errno)),
            ClientEffect::Observed { token } => self.finish_pin(token, Ok(Outcome::Observed)),
            ClientEffect::Vacate { fence, resource, range, held, grant, keep, successor, since } => {
                let began = Instant::now();
                let held_for = Duration::from_millis(self.ticks().saturating_sub(*since));
                match resource.class {
                    Class::Data => {
                        let volume = self.clone();
                        self.spawn(async move {
                            let hand_over = volume.vacate_data(resource, range, held, grant, keep, successor).await;
                            volume.metrics.lock_revoke.record(began.elapsed());
                            let outcome = if hand_over.is_some() { Vacated::HandedOver } else { Vacated::WrittenBack };
                            // Refused: somebody has been in meanwhile, or the successor is gone; the work comes again.
                            if volume.finish_vacate(fence, outcome, (resource.class, held_for))
                                && let Some((slot, message)) = hand_over
                            {
                                if let Some(file) = volume.files.borrow_mut().get_mut(&resource.ino) {
                                    message.spare.iter().for_each(|part| file.spare.remove(*part));
                                }
                                volume.send(slot, Message::HandOver(message));
                            }
                        });
                    }
                    Class::Name => {
                        if keep.is_none() && !self.mutated("names_kept_after_revoke") {
                            self.names.borrow_mut().drop_range(resource.ino, range);
                        }
                        self.finish_vacate(fence, Vacated::WrittenBack, (resource.class, held_for));
                    }
                    Class::Attr | Class::Open | Class::Rename => {
                        self.finish_vacate(fence, Vacated::WrittenBack, (resource.class, held_for));
                    }
                }
            }
            ClientEffect::Acquired { resource, grant, fresh, .. } => {
                if resource.class == Class::Data {
                    for piece in &fresh {
                        self.cap_size_floor(resource.ino, piece.lo);
                    }
                    // Before its hand-over has ended: the old holder wrote back instead, storage is current, and what
                    // is being fetched is not taken.
                    let mut hand_overs = self.hand_overs.borrow_mut();
                    hand_overs.fetching.remove(&grant);
                    hand_overs.awaited.remove(&grant);
                    drop(hand_overs);
                    self.cache_changed.notify();
                }
            }
            ClientEffect::AwaitHandOver { grant, resource, range, from } => {
                let arrived = {
                    let mut hand_overs = self.hand_overs.borrow_mut();
                    hand_overs.fetching.insert(grant, (resource, range));
                    hand_overs.awaited.insert(grant, (resource, range, from));
                    let arrived = hand_overs.arrived.remove(&(grant, from.slot));
                    hand_overs.arrived.retain(|(other, _), _| *other != grant);
                    arrived
                };
                if let Some(hand_over) = arrived {
                    self.receive_hand_over(from.slot, hand_over);
                }
            }
            ClientEffect::Dropped { resource, range, .. } => self.drop_transit(resource, range),
            ClientEffect::Lost { resource, range, mode, .. } => self.lose(resource, range, mode),
        }
    }

    fn finish_pin(&self, token: PinToken, outcome: std::result::Result<Outcome, i32>) {
        let waiting = self.waiting_pins.borrow_mut().remove(&token.0);
        match waiting {
            Some(waiting) => waiting.sender.send(outcome),
            // The waiter is gone and has unpinned.
            None => {
                self.glimpse_answers.borrow_mut().remove(&token.0);
            }
        }
    }

    fn finish_vacate(&self, fence: verbfs_lock::FenceId, outcome: Vacated, held_for: (Class, Duration)) -> bool {
        let mut effects = Vec::new();
        let accepted = self.lock_client.borrow_mut().vacated(fence, outcome, self.ticks(), &mut effects);
        self.client_effects.borrow_mut().extend(effects);
        if accepted {
            self.metrics.lock_hold[metric_class(held_for.0)].record(held_for.1);
        }
        accepted
    }

    /// HANDOVER from an old holder.
    pub(crate) fn receive_hand_over(self: &Rc<Self>, from: Slot, hand_over: HandOver) {
        let HandOver { resource, range, new_grant, .. } = hand_over;
        // Each page once, within the range, at a page of the sender's cache.
        let mut behind = range.lo;
        let pages_fit = hand_over.pages.iter().all(|page| {
            let fits = page.page >= behind && page.page < range.hi && page.offset % PAGE_SIZE == 0;
            behind = page.page.saturating_add(1);
            fits
        });
        let spare = hand_over.spare.iter().fold(0, |sum: u64, spare| sum.saturating_add(spare.len()));
        let spare_fits =
            spare <= SPARE_PAGES_MAX && hand_over.spare.iter().all(|spare| !spare.is_empty() && range.contains(*spare));
        if resource.class != Class::Data
            || new_grant.server != resource.server
            || !self.options.members.contains(&resource.server)
            || hand_over.pages.len() > RUNS_MAX
            || !pages_fit
            || !spare_fits
        {
            self.refuse(from, "a hand-over that cannot be");
            return;
        }
        let awaited = self.hand_overs.borrow().awaited.get(&new_grant).copied();
        match awaited {
            Some((expected, granted, source)) => {
                if source.slot != from || expected != resource || granted != range {
                    self.refuse(from, "a hand-over of something else than what was granted");
                    return;
                }
                self.hand_overs.borrow_mut().awaited.remove(&new_grant);
                self.take_over(from, hand_over);
            }
            None => {
                let mut hand_overs = self.hand_overs.borrow_mut();
                // Left behind by a server that names successors and does not tell them, or by a sender that nobody told to.
                let left = hand_overs.arrived.keys().filter(|key| (key.0.server, key.1) == (resource.server, from));
                if left.count() >= ARRIVED_MAX {
                    tracing::warn!(from, %resource, "too many hand-overs that were never granted; one is dropped");
                    return;
                }
                hand_overs.arrived.insert((new_grant, from), hand_over);
            }
        }
    }

    fn take_over(self: &Rc<Self>, from: Slot, hand_over: HandOver) {
        let volume = self.clone();
        self.spawn(async move {
            let began = Instant::now();
            let grant = hand_over.new_grant;
            let ok = volume.fetch_hand_over(from, &hand_over).await;
            volume.metrics.hand_over.record(began.elapsed());
            volume.metrics.hand_overs[crate::metrics::Direction::Received].increment();
            volume.hand_overs.borrow_mut().fetching.remove(&grant);
            let mut effects = Vec::new();
            volume.lock_client.borrow_mut().fetched(grant, ok, volume.ticks(), &mut effects);
            volume.client_effects.borrow_mut().extend(effects);
            volume.cache_changed.notify();
        });
    }

    /// Whether pages of this range are still on their way from an earlier holder.
    pub(crate) fn is_taking_over(&self, resource: Resource, range: Range) -> bool {
        self.hand_overs.borrow().fetching.values().any(|(other, pages)| *other == resource && pages.overlaps(range))
    }

    /// When a timer or a minimum hold is due, by this node's clock.
    pub(crate) fn next_due(&self) -> Option<Instant> {
        let hold = self.lock_client.borrow().next_due().map(|tick| self.started + Duration::from_millis(tick));
        let timer = self.executor.next_deadline();
        match (hold, timer) {
            (Some(hold), Some(timer)) => Some(hold.min(timer)),
            (hold, timer) => hold.or(timer),
        }
    }

    pub(crate) fn tick_locks_if_due(self: &Rc<Self>) {
        let due = self.lock_client.borrow().next_due().is_some_and(|tick| tick <= self.ticks());
        if due {
            self.tick_locks();
        }
    }

    /// What ticks: minimum holds, the number of grants.
    pub(crate) fn tick_locks(self: &Rc<Self>) {
        let mut effects = Vec::new();
        let now = self.ticks();
        {
            let mut client = self.lock_client.borrow_mut();
            client.tick(now, &mut Policy(self), &mut effects);
            if client.len() > self.options.maximum_grants {
                client.trim(self.options.maximum_grants * 9 / 10, &mut effects);
            }
        }
        self.client_effects.borrow_mut().extend(effects);
    }

    /// Pins that wait for a server which has been gone too long fail with EIO.
    pub(crate) fn expire_pins(&self, gone: &[Slot]) {
        let expired: Vec<u64> = self
            .waiting_pins
            .borrow()
            .iter()
            .filter(|(_, waiting)| {
                gone.contains(&waiting.server) && waiting.since.elapsed() >= self.options.peer_timeout
            })
            .map(|(token, _)| *token)
            .collect();
        for token in expired {
            let waiting = self.waiting_pins.borrow_mut().remove(&token);
            drop(waiting);
        }
    }
}

/// What to give up for a revoke: for data, everything around that holds no page; of names and the rest, what is needed.
struct Policy<'a>(&'a Volume);

impl RevokePolicy for Policy<'_> {
    fn give_up(&mut self, resource: Resource, granted: Range, need: Range, want: Range) -> Range {
        match resource.class {
            Class::Data => {
                let (below, above) = self.0.cache.borrow().neighbours(resource.ino, need);
                let offered = granted.intersect(want.hull(need));
                Range::new(
                    offered.lo.max(below.unwrap_or(0)).min(need.lo),
                    offered.hi.min(above.unwrap_or(u64::MAX)).max(need.hi),
                )
            }
            _ => need,
        }
    }
}

fn metric_class(class: Class) -> crate::metrics::LockClass {
    use crate::metrics::LockClass;
    match class {
        Class::Rename => LockClass::Rename,
        Class::Name => LockClass::Name,
        Class::Open => LockClass::Open,
        Class::Attr => LockClass::Attr,
        Class::Data => LockClass::Data,
    }
}

impl Volume {
    /// A peer that is gone hands nothing over any more.
    pub(crate) fn drop_hand_overs_from(self: &Rc<Self>, slot: Slot) {
        let dead: Vec<GrantId> = {
            let mut hand_overs = self.hand_overs.borrow_mut();
            // Neither what it handed over nor what it granted.
            hand_overs.arrived.retain(|(grant, from), _| *from != slot && grant.server != slot);
            hand_overs.awaited.retain(|grant, _| grant.server != slot);
            hand_overs.fetching.retain(|grant, _| grant.server != slot);
            hand_overs.awaited.iter().filter(|(_, (_, _, from))| from.slot == slot).map(|(grant, _)| *grant).collect()
        };
        for grant in dead {
            self.give_up_hand_over(grant);
        }
        self.cache_changed.notify();
    }

    /// The pages of a hand-over will not come: the server has them written back instead, or knows that they are lost.
    fn give_up_hand_over(&self, grant: GrantId) {
        {
            let mut hand_overs = self.hand_overs.borrow_mut();
            hand_overs.awaited.remove(&grant);
            hand_overs.fetching.remove(&grant);
        }
        let mut effects = Vec::new();
        self.lock_client.borrow_mut().fetched(grant, false, self.ticks(), &mut effects);
        self.client_effects.borrow_mut().extend(effects);
    }
}
