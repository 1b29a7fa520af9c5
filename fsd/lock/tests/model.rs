//! Every order of events of small scripts, by stateright.
//!
//! A scenario is a script for each of two or three nodes; the server of all resources is node 0 (or 0 and 1). Between any
//! two events anything else may happen that the lanes allow. Checked in every state: invariants 1 and 2, the oracle of
//! [`world`] (invariant 3 and 4: what is seen is the latest), the server's record covers what nodes believe; and no
//! state without a successor has a waiter (invariant 5).
//!
//! Each scenario stops at `STATES` states (the same state counts again when it is reached again); `VERBFS_LOCK_STATES=n` changes that (0: no limit). Scenarios marked `ignored`
//! are the larger ones: `cargo test --release -p verbfs-lock --test model -- --ignored`.

mod world;

use stateright::{Checker, HasDiscoveries, Model, Property};
use std::time::Instant;
use verbfs_lock::*;
use verbfs_protocol::{Ino, Resource};
use world::*;

const STATES: usize = 1_000_000;

struct Scenario {
    start: World,
}

impl Model for Scenario {
    type State = World;
    type Action = Step;

    fn init_states(&self) -> Vec<World> {
        vec![self.start.clone()]
    }
    fn actions(&self, state: &World, actions: &mut Vec<Step>) {
        if state.violation.is_none() {
            actions.extend(state.steps());
        }
    }
    fn next_state(&self, state: &World, step: Step) -> Option<World> {
        let mut next = state.clone();
        next.apply(&step);
        next.check_exclusion();
        next.check_records();
        Some(next)
    }
    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("all that is seen is true and every lock is exclusive", |_, state: &World| {
                state.violation.is_none()
            }),
            Property::always("no final state with a waiter", |_, state: &World| {
                state.violation.is_some()
                    || state.at_rest()
                    || state
                        .steps()
                        .iter()
                        .any(|step| !matches!(step, Step::Kill(_) | Step::Trim(_) | Step::Cancel(..)))
            }),
            Property::sometimes("all is done", |_, state: &World| state.at_rest()),
        ]
    }
}

fn limit() -> usize {
    std::env::var("VERBFS_LOCK_STATES").map_or(STATES, |value| value.parse().expect("a number"))
}

/// Different states seen and whether that is all of them, or what was violated.
fn explore(start: World, states: usize) -> Result<(usize, bool), String> {
    let mut builder = Scenario { start }.checker().threads(1).finish_when(HasDiscoveries::AnyFailures);
    if states > 0 {
        builder = builder.target_state_count(states);
    }
    let checker = builder.spawn_dfs().join();
    for name in ["all that is seen is true and every lock is exclusive", "no final state with a waiter"] {
        if let Some(path) = checker.discovery(name) {
            let last = path.last_state().violation.clone();
            return Err(format!("{name}: {last:?}\nafter {:#?}", path.into_actions()));
        }
    }
    Ok((checker.unique_state_count(), states == 0 || checker.state_count() < states))
}

fn check(name: &str, start: World) {
    let begun = Instant::now();
    match explore(start, limit()) {
        Ok((states, all)) => {
            eprintln!("{name}: {} {states} states in {:.1?}", if all { "all" } else { "first" }, begun.elapsed())
        }
        Err(wrong) => panic!("{name}: {wrong}"),
    }
}

fn data() -> Resource {
    Resource::data(Ino::new(0, 7), 0)
}
fn attr() -> Resource {
    Resource::attr(Ino::new(0, 7))
}
fn open() -> Resource {
    Resource::open(Ino::new(0, 7))
}
fn read(lo: u64, hi: u64) -> Errand {
    Errand::new(vec![PinSpec::new(data(), lo, hi, PinKind::Shared)])
}
fn write(lo: u64, hi: u64) -> Errand {
    Errand::new(vec![PinSpec::new(data(), lo, hi, PinKind::Write)])
}
fn truncate(size: u64) -> Errand {
    Errand::new(vec![PinSpec::attr(attr(), PinKind::Exclusive, size)])
}
fn extend(size: u64) -> Errand {
    Errand::new(vec![PinSpec::attr(attr(), PinKind::Extend, size)])
}
fn stat() -> Errand {
    Errand::new(vec![PinSpec::stat(attr())])
}
fn options() -> Options {
    Options { conflict_granule: 2, hand_over: true, parallel: 2, ..Options::default() }
}

#[test]
fn two_writers_and_a_reader() {
    let start =
        World::new(3, options()).script(0, vec![read(0, 1)]).script(1, vec![write(0, 1)]).script(2, vec![write(0, 1)]);
    check("two writers and a reader", start);
}

#[test]
fn two_upgraders() {
    let start = World::new(2, Options { hand_over: false, ..options() })
        .script(0, vec![read(0, 1), write(0, 1)])
        .script(1, vec![read(0, 1), write(0, 1)]);
    check("two upgraders", start);
}

#[test]
fn growth_and_partial_revoke() {
    let start = World::new(2, Options { generous: true, hand_over: false, ..options() })
        .script(0, vec![write(0, 1), write(2, 3)])
        .script(1, vec![write(3, 4), read(0, 1)]);
    check("growth and partial revoke", start);
}

#[test]
fn hand_over_by_all_means() {
    let options = Options { may_write_back: true, may_fail_fetch: true, ..options() };
    let start =
        World::new(2, options).script(0, vec![write(0, 2), write(0, 1)]).script(1, vec![write(0, 1), write(1, 2)]);
    check("hand-over by all means", start);
}

#[test]
fn hand_over_with_a_death() {
    let options = Options { kills: 1, may_fail_fetch: true, ..options() };
    let start =
        World::new(3, options).script(1, vec![write(0, 1)]).script(2, vec![write(0, 1)]).script(0, vec![read(0, 1)]);
    check("hand-over with a death", start);
}

#[test]
fn trim_against_everything() {
    let start = World::new(2, options())
        .script(0, vec![write(0, 1)])
        .script(1, vec![write(0, 1), read(2, 3), write(0, 1)])
        .trims(1, 2);
    check("trim against everything", start);
}

#[test]
fn cancel_crosses_grant() {
    let start = World::new(2, options())
        .script(0, vec![write(0, 1), read(0, 2)])
        .script(1, vec![write(0, 1).cancellable(), write(1, 2).cancellable()]);
    check("cancel crosses grant", start);
}

#[test]
fn through_a_fence() {
    let through = |kind| Errand::new(vec![PinSpec::new(data(), 0, 1, kind).through_fence()]);
    let start = World::new(2, options())
        .script(0, vec![write(0, 1)])
        .script(1, vec![write(0, 1), through(PinKind::Write), through(PinKind::Shared)]);
    check("through a fence", start);
}

#[test]
fn stat_against_extenders() {
    let start = World::new(3, options())
        .script(0, vec![stat()])
        .script(1, vec![extend(5), extend(9)])
        .script(2, vec![extend(7)]);
    check("stat against extenders", start);
}

#[test]
fn stat_against_truncate() {
    let start = World::new(3, options())
        .script(0, vec![stat(), stat()])
        .script(1, vec![extend(5), truncate(2)])
        .script(2, vec![extend(7)]);
    check("stat against truncate", start);
}

#[test]
fn a_release_and_the_request_after_it() {
    let start =
        World::new(2, options()).script(0, vec![stat()]).script(1, vec![extend(5), extend(9), truncate(3)]).trims(1, 2);
    check("a release and the request after it", start);
}

#[test]
fn append_against_truncate() {
    let append =
        || Errand::new(vec![PinSpec::attr(attr(), PinKind::Write, 8), PinSpec::new(data(), 0, 1, PinKind::Write)]);
    let cut = || {
        Errand::new(vec![PinSpec::attr(attr(), PinKind::Exclusive, 0), PinSpec::new(data(), 0, 2, PinKind::Exclusive)])
    };
    let start = World::new(2, options()).script(0, vec![append()]).script(1, vec![cut(), append()]);
    check("append against truncate", start);
}

#[test]
fn open_joins_and_last_unlink_tries() {
    let opened = || Errand::new(vec![PinSpec::new(open(), 0, 1, PinKind::Shared)]);
    let unlink = Errand::new(vec![PinSpec::new(open(), 0, 1, PinKind::Exclusive).trying()]);
    let reap = Errand::new(vec![PinSpec::new(open(), 0, 1, PinKind::Exclusive)]);
    let start = World::new(3, options())
        .script(0, vec![unlink, reap])
        .script(1, vec![opened(), opened()])
        .script(2, vec![opened()]);
    check("open joins and last unlink tries", start);
}

#[test]
fn pages_go_on_from_hand_to_hand() {
    let options = Options { may_write_back: true, ..options() };
    let start = World::new(3, options)
        .script(0, vec![write(0, 1), read(0, 1)])
        .script(1, vec![write(0, 2)])
        .script(2, vec![write(0, 1)]);
    check("pages go on from hand to hand", start);
}

#[test]
fn deaths_on_both_ends_of_a_hand_over() {
    let options = Options { kills: 2, may_write_back: true, may_fail_fetch: true, parallel: 1, ..options() };
    let start =
        World::new(4, options).script(1, vec![write(0, 1)]).script(2, vec![write(0, 1)]).script(3, vec![write(0, 1)]);
    check("deaths on both ends of a hand-over", start);
}

#[test]
fn stat_with_a_death() {
    let start = World::new(3, Options { kills: 1, ..options() })
        .script(0, vec![stat(), extend(4)])
        .script(1, vec![extend(5), stat()])
        .script(2, vec![extend(7)]);
    check("stat with a death", start);
}

#[test]
fn generous_holders_that_ask_again() {
    let options = Options { generous: true, hand_over: false, ..options() };
    let start = World::new(2, options)
        .script(0, vec![read(0, 1), write(2, 3), read(1, 2)])
        .script(1, vec![write(0, 1), write(2, 3)])
        .trims(0, 1);
    check("generous holders that ask again", start);
}

#[test]
#[ignore = "millions of states: for a machine left alone"]
fn three_of_everything() {
    let options = Options { may_write_back: true, may_fail_fetch: true, generous: true, kills: 1, ..options() };
    let start = World::new(3, options)
        .script(0, vec![write(0, 2), read(1, 3)])
        .script(1, vec![read(0, 3), write(1, 2), write(0, 1).cancellable()])
        .script(2, vec![write(1, 3), write(0, 1)])
        .trims(1, 1);
    check("three of everything", start);
}

/// What the random runs cannot show as fast: a mutation whose effect needs one exact order.
#[test]
fn mutations_are_noticed() {
    let noticed = |name: &str, mutations: Mutations, start: World| {
        let mut start = start;
        let scripts: Vec<_> = start.nodes.iter().map(|node| (node.script.clone(), node.trims)).collect();
        start = World::new(start.nodes.len(), Options { mutations, ..start.options });
        for (slot, (script, trims)) in scripts.into_iter().enumerate() {
            start = start.script(slot, script.into()).trims(slot, trims);
        }
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(|_| {}));
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| explore(start, STATES)));
        std::panic::set_hook(hook);
        assert!(!matches!(outcome, Ok(Ok(_))), "nobody notices {name}");
    };
    let world = || World::new(2, options());
    let writers = || world().script(0, vec![write(0, 1)]).script(1, vec![write(0, 1), write(0, 1), read(0, 1)]);
    noticed(
        "grant_before_release",
        Mutations { grant_before_release: true, ..Mutations::default() },
        World::new(2, Options { hand_over: false, ..options() })
            .script(0, vec![write(0, 1)])
            .script(1, vec![write(0, 1)]),
    );
    noticed("skip_fetch", Mutations { skip_fetch: true, ..Mutations::default() }, writers());
    noticed("skip_drain", Mutations { skip_drain: true, ..Mutations::default() }, writers());
    noticed(
        "unclamped_growth",
        Mutations { unclamped_growth: true, ..Mutations::default() },
        World::new(2, Options { hand_over: false, ..options() })
            .script(0, vec![write(0, 1)])
            .script(1, vec![write(3, 4)]),
    );
    noticed(
        "skip_freeze",
        Mutations { skip_freeze: true, ..Mutations::default() },
        World::new(3, options())
            .script(0, vec![stat()])
            .script(1, vec![extend(5), extend(9)])
            .script(2, vec![extend(7)]),
    );
    noticed(
        "skip_glimpse",
        Mutations { skip_glimpse: true, ..Mutations::default() },
        World::new(3, options()).script(0, vec![stat()]).script(1, vec![extend(5)]).script(2, vec![extend(7)]),
    );
    noticed(
        "ignore_release_order",
        Mutations { ignore_release_order: true, ..Mutations::default() },
        world().script(0, vec![stat()]).script(1, vec![extend(5), extend(9)]).trims(1, 1),
    );
}
