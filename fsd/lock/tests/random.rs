//! Long fair random runs: many nodes, ranges, cancels, trims, through-fence pins, hand-overs, deaths.
//!
//! Every caller must be served within a bounded number of steps, and the oracle of [`world`] must agree with all that
//! is seen. `VERBFS_LOCK_SEED=n` runs one seed, `VERBFS_LOCK_STEPS=n` changes the length of a run.
//! `CARGO_PROFILE_RELEASE_DEBUG_ASSERTIONS=true` adds the assertions inside the machines to a release build.

mod world;

use verbfs_lock::*;
use verbfs_protocol::{Ino, Resource, Slot};
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
}

const PAGES: u64 = 24;
/// No caller may wait longer than so many steps of a fair run.
const PATIENCE: u64 = 60_000;

fn operation(random: &mut Random, nodes: u64, step: u64, deaths: bool) -> Errand {
    let ino = Ino::new(random.below(2.min(nodes)) as Slot, 7);
    let other = Ino::new(0, 9);
    let data = Resource::data(ino, if random.one_in(3) { (nodes - 1) as Slot } else { ino.home() });
    let data = if deaths { Resource::data(Ino::new(0, 7), 0) } else { data };
    let attr = if deaths { Resource::attr(Ino::new(0, 7)) } else { Resource::attr(ino) };
    let lo = random.below(PAGES - 1);
    let longest = if random.one_in(4) { PAGES } else { 3 };
    let hi = (lo + 1 + random.below(longest)).min(PAGES);
    let size = if random.one_in(3) { random.below(1000) } else { step };
    let pins = match random.below(18) {
        0..=2 => vec![PinSpec::new(data, lo, hi, PinKind::Shared)],
        3..=5 => vec![PinSpec::new(data, lo, hi, PinKind::Write)],
        6 => vec![PinSpec::new(data, lo, hi, PinKind::Exclusive)],
        7 => vec![PinSpec::new(data, lo, hi, if random.one_in(2) { PinKind::Shared } else { PinKind::Write }).exact()],
        8 => vec![
            PinSpec::new(data, lo, lo + 1, if random.one_in(2) { PinKind::Shared } else { PinKind::Write })
                .through_fence(),
        ],
        9 => vec![PinSpec::attr(attr, PinKind::Extend, size), PinSpec::new(data, lo, hi, PinKind::Write)],
        10 => vec![PinSpec::attr(attr, PinKind::Exclusive, size), PinSpec::new(data, lo, PAGES, PinKind::Exclusive)],
        11 | 12 => vec![PinSpec::stat(attr)],
        13 => vec![PinSpec::attr(attr, PinKind::Shared, 0), PinSpec::new(data, lo, hi, PinKind::Shared)],
        14 => vec![PinSpec::attr(attr, PinKind::Write, size), PinSpec::new(data, lo, hi, PinKind::Write)],
        15 => {
            let name = Resource::name(other);
            vec![PinSpec::new(
                name,
                lo,
                if random.one_in(4) { PAGES } else { lo + 1 },
                if random.one_in(2) { PinKind::Shared } else { PinKind::Write },
            )]
        }
        16 => vec![PinSpec::new(
            Resource::open(other),
            0,
            1,
            if random.one_in(4) { PinKind::Exclusive } else { PinKind::Shared },
        )],
        _ => {
            let pin = PinSpec::new(data, lo, hi, PinKind::Write);
            vec![pin.trying()]
        }
    };
    let operation = Errand::new(pins);
    if random.one_in(6) { operation.cancellable() } else { operation }
}

/// One run. Steps taken and operations finished, or what went wrong.
fn run(seed: u64, steps: u64, mutations: Mutations) -> Result<World, String> {
    let mut random = Random(seed);
    let nodes = 2 + random.below(4);
    let deaths = random.one_in(3) && nodes > 2;
    let options = Options {
        mutations,
        hand_over: !random.one_in(3),
        may_write_back: random.one_in(2),
        may_fail_fetch: random.one_in(2),
        generous: random.one_in(2),
        conflict_granule: [1, 4, 16][random.below(3) as usize],
        minimum_hold: if random.one_in(2) { 0 } else { random.below(200) },
        ..Options::default()
    };
    let restarts = random.one_in(4);
    let mut down: Option<Slot> = None;
    let callers = 1 + random.below(6) as usize;
    let mut world = World::new(nodes as usize, options);
    for step in 0..steps {
        world.now += 1;
        let slot = random.below(nodes) as Slot;
        if let Some(server) = down.filter(|_| random.one_in(100)) {
            world.server_back(server);
            down = None;
        } else if restarts && down.is_none() && random.one_in(3000) {
            world.restart_server(slot);
            down = Some(slot);
        }
        if random.one_in(300) {
            // As a SYNC does.
            world.servers[0].pause_hand_over(Ino::new(0, 7));
        } else if random.one_in(200) {
            world.servers[0].resume_hand_over(Ino::new(0, 7));
        }
        let node = &world.nodes[slot as usize];
        if !node.alive {
            if random.one_in(50) {
                world.revive(slot);
            }
            continue;
        }
        if node.running.len() < callers && random.one_in(6) {
            let operation = operation(&mut random, nodes, step, deaths);
            world.begin(slot, operation);
        } else if random.one_in(400) {
            let keep = random.below(6) as usize;
            world.trim(slot, keep);
        } else if deaths && slot != 0 && random.one_in(3000) {
            world.kill(slot);
        } else {
            one_step(&mut world, &mut random);
        }
        check(&mut world, step)?;
    }
    if let Some(server) = down {
        world.server_back(server);
    }
    let mut step = steps;
    loop {
        world.now += 1;
        step += 1;
        if !one_step(&mut world, &mut random) {
            break;
        }
        check(&mut world, step)?;
    }
    world.check_exclusion();
    world.check_records();
    if let Some(wrong) = world.violation {
        return Err(wrong);
    }
    if !world.at_rest() {
        return Err(format!(
            "invariant 5: nothing can happen and somebody waits: {:#?}",
            world.nodes.iter().flat_map(|node| node.client.waiting()).collect::<Vec<_>>()
        ));
    }
    Ok(world)
}

fn one_step(world: &mut World, random: &mut Random) -> bool {
    let mut steps = world.steps();
    steps.retain(|step| match step {
        Step::Cancel(..) => random.one_in(10),
        Step::Tick(slot) => {
            world.nodes[*slot as usize].client.next_due().is_some_and(|due| due <= world.now) || world.queues.is_empty()
        }
        _ => true,
    });
    if steps.is_empty() {
        return !world.steps().is_empty();
    }
    let step = steps[random.below(steps.len() as u64) as usize].clone();
    world.apply(&step);
    true
}

fn check(world: &mut World, step: u64) -> Result<(), String> {
    if step.is_multiple_of(16) {
        world.check_exclusion();
    }
    if step.is_multiple_of(256) {
        world.check_records();
        for operation in world.nodes.iter().flat_map(|node| node.running.values()) {
            if world.now - operation.since.0 > PATIENCE {
                return Err(format!("step {step}: waits too long: {operation:?}"));
            }
        }
    }
    match world.violation.take() {
        Some(wrong) => Err(format!("step {step}: {wrong}")),
        None => Ok(()),
    }
}

fn from_environment(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().expect("a number"))
}

#[test]
fn every_caller_is_served_and_sees_the_truth() {
    let steps = from_environment("VERBFS_LOCK_STEPS").unwrap_or(if cfg!(debug_assertions) { 4_000 } else { 20_000 });
    let seeds = match from_environment("VERBFS_LOCK_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..from_environment("VERBFS_LOCK_SEEDS").unwrap_or(150),
    };
    let (mut finished, mut hand_overs, mut rounds, mut back, mut resweeps, mut early) = (0, 0, 0, 0, 0, 0);
    for seed in seeds.clone() {
        match std::panic::catch_unwind(|| run(seed, steps, Mutations::default())) {
            Ok(Ok(world)) => {
                finished += world.finished;
                for server in &world.servers {
                    hand_overs += server.counters().hand_overs_taken;
                    rounds += server.counters().glimpse_rounds;
                    back += server.counters().hand_backs;
                    early += server.counters().early_requests;
                }
                resweeps += world.nodes.iter().map(|node| node.client.counters().resweeps).sum::<u64>();
            }
            Ok(Err(wrong)) => panic!("VERBFS_LOCK_SEED={seed} VERBFS_LOCK_STEPS={steps}: {wrong}"),
            Err(_) => panic!("VERBFS_LOCK_SEED={seed} VERBFS_LOCK_STEPS={steps}: a machine panicked, see above"),
        }
    }
    eprintln!(
        "{finished} operations, {hand_overs} hand-overs, {rounds} glimpses, {back} hand-backs, {resweeps} resweeps, {early} early requests"
    );
    if seeds.count() > 20 {
        assert!(hand_overs > 0 && rounds > 0 && back > 0 && resweeps > 0 && early > 0, "the rare paths are taken");
    }
}

/// Some run notices the mutation, be it by an oracle, a stop, or a panic.
fn noticed(mutations: Mutations) -> bool {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let noticed = (0..600).any(|seed| !matches!(std::panic::catch_unwind(|| run(seed, 4_000, mutations)), Ok(Ok(_))));
    std::panic::set_hook(hook);
    noticed
}

macro_rules! mutation {
    ($($name:ident),* $(,)?) => {
        /// Each way to be wrong is seen by the runs that find the machines right.
        #[test]
        fn mutations_are_noticed() {
            $(assert!(noticed(Mutations { $name: true, ..Mutations::default() }), "nobody notices {}", stringify!($name));)*
        }
    };
}

mutation!(
    grant_before_release,
    skip_glimpse,
    unclamped_growth,
    ignore_release_order,
    skip_fence,
    skip_drain,
    skip_freeze,
    skip_fetch,
    skip_resweep,
    volunteer_asked,
    skip_exclusion,
);
