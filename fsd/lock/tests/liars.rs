//! Random runs with one member that breaks the protocol as server and as client, in well-typed messages.
//!
//! It answers what it is asked with what fits, with what does not and with what was meant for others, and speaks unasked.
//! The honest must not panic; what they hold of each other's resources must stay exclusive and true; and when the
//! liar has been found out and fenced, every caller must be served. `VERBFS_LOCK_SEED=n` runs one seed.

mod world;

use verbfs_lock::*;
use verbfs_protocol::lock::{LockFlags, Successor};
use verbfs_protocol::{Class, GrantId, Ino, LockMessage, Mode, Node, Range, RequestId, Resource, Slot};
use world::*;

/// SplitMix64: small, seedable, the same everywhere.
struct Random(u64);
impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }
}

const PAGES: u64 = 12;
const HONEST: Slot = 3;
const LIAR: Slot = HONEST;
/// Of what it has heard, the liar remembers so much.
const MEMORY: usize = 200;

fn resource(random: &mut Random, server: Slot) -> Resource {
    let ino = Ino::new(server, 7);
    let class =
        random.pick(&[Class::Data, Class::Data, Class::Data, Class::Attr, Class::Attr, Class::Name, Class::Open]);
    Resource { class, ino, server }
}

/// What an honest caller does, some of it with what the liar serves.
fn errand(random: &mut Random, step: u64) -> Errand {
    let server = random.below(HONEST as u64 + 1) as Slot;
    let resource = resource(random, server);
    let lo = random.below(PAGES - 1);
    let hi = (lo + 1 + random.below(3)).min(PAGES);
    let kind = random.pick(&[PinKind::Shared, PinKind::Write, PinKind::Exclusive]);
    let mut pins = match resource.class {
        Class::Data | Class::Name => vec![PinSpec::new(resource, lo, hi, kind)],
        Class::Attr => vec![match random.below(3) {
            0 => PinSpec::stat(resource),
            1 => PinSpec::attr(resource, PinKind::Extend, step),
            _ => PinSpec::attr(resource, kind, step),
        }],
        _ => vec![PinSpec::new(resource, 0, 1, kind)],
    };
    // Pins held while the liar is waited for, and the other way round. One-shot pins are alone in an errand.
    if random.one_in(3) && !pins[0].one_shot {
        let other = Resource::data(
            Ino::new(random.below(HONEST as u64 + 1) as Slot, 8),
            random.below(HONEST as u64 + 1) as Slot,
        );
        pins.push(PinSpec::new(other, lo, hi, kind));
        pins.sort_by_key(|pin| pin.resource);
    }
    let errand = Errand::new(pins);
    if random.one_in(4) { errand.cancellable() } else { errand }
}

struct Liar {
    random: Random,
    /// With hand-over, what it holds exclusively is its own to lose: it does not get that.
    may_hold_exclusively: bool,
    grants: u64,
    requests: u64,
}

impl Liar {
    fn node(slot: Slot) -> Node {
        Node { slot, incarnation: 1 }
    }

    fn range(&mut self, near: Range) -> Range {
        match self.random.below(8) {
            0 => Range::ALL,
            1 => Range::new(near.hi, near.lo),
            2 => Range::new(near.lo, near.lo),
            3 => Range::new(near.lo.saturating_sub(1), near.hi.saturating_add(2)),
            4 => Range::new(self.random.below(PAGES), self.random.below(PAGES)),
            5 => Range::new(self.random.next(), self.random.next()),
            _ => near,
        }
    }

    fn grant(&mut self, server: Slot) -> GrantId {
        if self.random.one_in(2) {
            self.grants += 1;
            return GrantId { server: LIAR, server_incarnation: 1, sequence: self.grants };
        }
        let server = if self.random.one_in(4) { self.random.below(5) as Slot } else { server };
        GrantId { server, server_incarnation: 1, sequence: 1 + self.random.below(self.grants.max(20)) }
    }

    fn mode(&mut self) -> Mode {
        self.random.pick(&[Mode::S, Mode::E, Mode::X])
    }

    fn successor(&mut self) -> Successor {
        Successor { slot: self.random.below(HONEST as u64 + 1) as Slot, grant: self.grant(LIAR) }
    }

    /// Something to `to` that answers `heard`, more or less.
    fn answer(&mut self, to: Slot, heard: &LockMessage) -> LockMessage {
        match *heard {
            LockMessage::Lock { request, resource, mode, need, want, .. } => {
                let range = if self.random.one_in(3) { self.range(want) } else { need };
                let mode = if self.random.one_in(5) { self.mode() } else { mode };
                let resource = if self.random.one_in(10) { self.resource(to) } else { resource };
                match self.random.below(8) {
                    0 => LockMessage::Observed { request },
                    1 => LockMessage::Deny { request, errno: self.random.pick(&[1, 11, 22, 125]) },
                    2 => {
                        let from = Some(self.successor());
                        LockMessage::Grant { request, grant: self.grant(LIAR), resource, range, mode: Mode::X, from }
                    }
                    _ => LockMessage::Grant { request, grant: self.grant(LIAR), resource, range, mode, from: None },
                }
            }
            LockMessage::Grant { grant, resource, range, .. } => {
                let keep = self.random.pick(&[None, None, Some(Mode::S), Some(Mode::E), Some(Mode::X)]);
                LockMessage::Release { grant, resource, range: self.range(range), keep, revoke_sequence: 0 }
            }
            LockMessage::Revoke { grant, resource, need, revoke_sequence, .. } => match self.random.below(4) {
                0 => LockMessage::Taken { grant, resource },
                1 => LockMessage::Refused { grant, resource },
                _ => LockMessage::Release { grant, resource, range: need, keep: None, revoke_sequence },
            },
            LockMessage::Glimpse { grant, resource, round } => LockMessage::Glimpsed { grant, resource, round },
            _ => self.anything(to),
        }
    }

    fn resource(&mut self, to: Slot) -> Resource {
        let server = match self.random.below(4) {
            0 => self.random.below(HONEST as u64 + 1) as Slot,
            1 => to,
            _ => LIAR,
        };
        resource(&mut self.random, server)
    }

    /// Any message with any values.
    fn anything(&mut self, to: Slot) -> LockMessage {
        let resource = self.resource(to);
        let grant = self.grant(resource.server);
        let near = Range::new(self.random.below(PAGES), PAGES);
        let range = self.range(near);
        let slot = self.random.pick(&[to, to, LIAR, 0]);
        let request = RequestId { node: Self::node(slot), sequence: self.random.below(self.requests + 40) };
        let round = self.random.below(6) as u32;
        let keep = self.random.pick(&[None, Some(Mode::S), Some(Mode::E), Some(Mode::X)]);
        match self.random.below(15) {
            0..=2 => {
                self.requests += 1;
                let request = RequestId { node: Self::node(LIAR), sequence: self.requests };
                let server = Resource { server: to, ino: Ino::new(to, 7), ..resource };
                let mut mode = self.mode();
                if mode == Mode::X && server.class == Class::Data && !self.may_hold_exclusively {
                    mode = Mode::S;
                }
                let flags = LockFlags {
                    r#try: self.random.one_in(6),
                    no_growth: self.random.one_in(3),
                    one_shot: self.random.one_in(6),
                };
                let need = if self.random.one_in(4) { range } else { near };
                let want = if self.random.one_in(3) { self.range(need) } else { Range::ALL };
                let after_releases = if self.random.one_in(40) { u64::MAX } else { 0 };
                LockMessage::Lock { request, resource: server, mode, need, want, flags, upgrade: None, after_releases }
            }
            3 => LockMessage::Cancel { request, resource },
            4 => {
                let mode = self.mode();
                let from = if self.random.one_in(3) { Some(self.successor()) } else { None };
                LockMessage::Grant { request, grant, resource, range, mode, from }
            }
            5 => LockMessage::Deny { request, errno: 5 },
            6 => LockMessage::Observed { request },
            7 => {
                let successor = if self.random.one_in(3) { Some(self.successor()) } else { None };
                let want = self.range(range);
                LockMessage::Revoke { grant, resource, revoke_sequence: round, need: range, want, keep, successor }
            }
            8 => LockMessage::Glimpse { grant, resource, round },
            9 => LockMessage::Thaw { grant, resource, round },
            10 if self.random.one_in(2) => LockMessage::Done { grant, resource, range },
            10 => LockMessage::HandBack { grant, resource, range },
            11 => LockMessage::Recall { count: self.random.below(5) as u32 },
            12 => LockMessage::Release { grant, resource, range, keep, revoke_sequence: round },
            13 if self.random.one_in(2) => LockMessage::Taken { grant, resource },
            13 => LockMessage::Refused { grant, resource },
            _ => LockMessage::Glimpsed { grant, resource, round },
        }
    }
}

fn one_step(world: &mut World, random: &mut Random) -> bool {
    let steps = world.steps();
    if steps.is_empty() {
        return false;
    }
    let step = steps[random.below(steps.len() as u64) as usize].clone();
    if matches!(step, Step::Cancel(..)) && !random.one_in(10) {
        return true;
    }
    world.apply(&step);
    true
}

#[derive(Default)]
struct Tally {
    finished: u64,
    taken: u64,
    refused: u64,
}

fn run(seed: u64, steps: u64) -> Result<Tally, String> {
    let mut random = Random(seed);
    let hand_over = random.one_in(2);
    let mut world = World::new(
        HONEST as usize + 1,
        Options {
            hand_over,
            may_write_back: random.one_in(2),
            may_fail_fetch: true,
            generous: random.one_in(2),
            conflict_granule: random.pick(&[1, 4, 16]),
            minimum_hold: random.pick(&[0, 0, 20]),
            ..Options::default()
        },
    );
    world.liar = Some(LIAR);
    world.nodes[LIAR as usize].alive = false;
    let mut liar = Liar { random: Random(seed ^ 0xbad), may_hold_exclusively: !hand_over, grants: 0, requests: 0 };
    let mut tally = Tally::default();
    let wrong = |world: &mut World, step: u64| world.violation.take().map(|wrong| format!("step {step}: {wrong}"));
    for step in 0..steps {
        world.now += 1;
        let slot = random.below(HONEST as u64) as Slot;
        if world.nodes[slot as usize].running.len() < 4 && random.one_in(5) {
            let errand = errand(&mut random, step);
            world.begin(slot, errand);
        } else if random.one_in(4) {
            let message = if !world.heard.is_empty() && random.one_in(2) {
                let index = random.below(world.heard.len() as u64) as usize;
                let heard = if random.one_in(3) { world.heard[index].clone() } else { world.heard.swap_remove(index) };
                liar.answer(slot, &heard)
            } else {
                liar.anything(slot)
            };
            // An answer goes to whoever asked, mostly.
            let to = match &message {
                LockMessage::Grant { request, .. }
                | LockMessage::Observed { request }
                | LockMessage::Deny { request, .. }
                    if request.node.slot < HONEST && !random.one_in(8) =>
                {
                    request.node.slot
                }
                LockMessage::Release { resource, .. }
                | LockMessage::Taken { resource, .. }
                | LockMessage::Refused { resource, .. }
                | LockMessage::Glimpsed { resource, .. }
                    if resource.server < HONEST && !random.one_in(8) =>
                {
                    resource.server
                }
                _ => slot,
            };
            match world.lie(to, message) {
                Ok(()) => tally.taken += 1,
                Err(_) => tally.refused += 1,
            }
            let surplus = world.heard.len().saturating_sub(MEMORY);
            world.heard.drain(..surplus);
        } else if random.one_in(200) {
            world.trim(slot, random.below(4) as usize);
        } else {
            one_step(&mut world, &mut random);
        }
        if step % 16 == 0 {
            world.check_exclusion();
            world.check_records();
        }
        if let Some(wrong) = wrong(&mut world, step) {
            return Err(wrong);
        }
    }
    world.end_lies();
    while one_step(&mut world, &mut random) {
        world.now += 1;
        if let Some(wrong) = wrong(&mut world, steps) {
            return Err(wrong);
        }
    }
    world.check_exclusion();
    world.check_records();
    if let Some(wrong) = wrong(&mut world, steps) {
        return Err(wrong);
    }
    if !world.at_rest() {
        return Err(format!(
            "the liar is gone, nothing can happen, and somebody waits: {:#?}",
            world.nodes.iter().flat_map(|node| node.client.waiting()).collect::<Vec<_>>()
        ));
    }
    tally.finished = world.finished;
    Ok(tally)
}

#[test]
fn a_member_that_lies_spoils_only_what_it_serves() {
    let number = |name: &str| std::env::var(name).ok().map(|value| value.parse::<u64>().expect("a number"));
    let steps = number("VERBFS_LOCK_STEPS").unwrap_or(4_000);
    let seeds = match number("VERBFS_LOCK_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("VERBFS_LOCK_SEEDS").unwrap_or(200),
    };
    let mut all = Tally::default();
    for seed in seeds.clone() {
        match std::panic::catch_unwind(|| run(seed, steps)) {
            Ok(Ok(tally)) => {
                all.finished += tally.finished;
                all.taken += tally.taken;
                all.refused += tally.refused;
            }
            Ok(Err(wrong)) => panic!("VERBFS_LOCK_SEED={seed} VERBFS_LOCK_STEPS={steps}: {wrong}"),
            Err(_) => panic!("VERBFS_LOCK_SEED={seed} VERBFS_LOCK_STEPS={steps}: a machine panicked, see above"),
        }
    }
    eprintln!("{} operations, {} lies taken, {} refused", all.finished, all.taken, all.refused);
    if seeds.count() > 20 {
        assert!(all.finished > 1000 && all.taken > 1000 && all.refused > 1000, "all of it happens");
    }
}
