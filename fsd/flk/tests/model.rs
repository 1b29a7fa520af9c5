//! The lock table against a naive model: one cell per byte and owner.

use proptest::prelude::*;
use std::collections::BTreeMap;
use verbfs_flk::{Granted, LockTable, Outcome, WaitToken, would_deadlock};
use verbfs_protocol::{FileLock, FileLockKind, Ino, LockOwner, LockSpace, Node};

const BYTES: usize = 12;
const OWNERS: usize = 5;
const FILE: Ino = Ino(7);

/// Two owners on slot 0, two on slot 1, one on slot 2.
fn owner(number: usize) -> LockOwner {
    LockOwner { slot: number as u16 / 2, incarnation: 3, owner: number as u64, pid: 100 + number as u32 }
}

fn token(number: u64) -> WaitToken {
    WaitToken { node: Node { slot: 0, incarnation: 1 }, number }
}

#[derive(Clone, Debug)]
enum Step {
    Set { owner: usize, start: usize, end: usize, kind: FileLockKind, wait: bool },
    Get { owner: usize, start: usize, end: usize, kind: FileLockKind },
    Cancel(u64),
    Release(usize),
    NodeGone(u16),
}

fn kind() -> impl Strategy<Value = FileLockKind> {
    prop_oneof![Just(FileLockKind::Read), Just(FileLockKind::Write), Just(FileLockKind::Unlock)]
}

fn step() -> impl Strategy<Value = Step> {
    let range = (0..BYTES, 0..BYTES).prop_map(|(one, other)| (one.min(other), one.max(other)));
    prop_oneof![
        12 => (0..OWNERS, range.clone(), kind(), any::<bool>())
            .prop_map(|(owner, (start, end), kind, wait)| Step::Set { owner, start, end, kind, wait }),
        2 => (0..OWNERS, range, kind()).prop_map(|(owner, (start, end), kind)| Step::Get { owner, start, end, kind }),
        2 => (0..60u64).prop_map(Step::Cancel),
        1 => (0..OWNERS).prop_map(Step::Release),
        1 => (0..3u16).prop_map(Step::NodeGone),
    ]
}

#[derive(Default)]
struct Model {
    held: [[Option<FileLockKind>; BYTES]; OWNERS],
    waiting: Vec<(u64, usize, usize, usize, FileLockKind)>,
}

impl Model {
    fn conflicts(&self, owner: usize, start: usize, end: usize, kind: FileLockKind) -> bool {
        kind != FileLockKind::Unlock
            && (0..OWNERS).filter(|&other| other != owner).any(|other| {
                self.held[other][start..=end]
                    .iter()
                    .flatten()
                    .any(|&held| held == FileLockKind::Write || kind == FileLockKind::Write)
            })
    }
    fn put(&mut self, owner: usize, start: usize, end: usize, kind: FileLockKind) {
        self.held[owner][start..=end].fill(Some(kind).filter(|&kind| kind != FileLockKind::Unlock));
    }
    /// The first by arrival that can be granted, again and again.
    fn wake(&mut self) -> Vec<u64> {
        let mut woken = Vec::new();
        while let Some(at) =
            self.waiting.iter().position(|&(_, owner, start, end, kind)| !self.conflicts(owner, start, end, kind))
        {
            let (token, owner, start, end, kind) = self.waiting.remove(at);
            self.put(owner, start, end, kind);
            woken.push(token);
        }
        woken
    }
    /// What an owner holds, joined.
    fn runs(&self, owner: usize) -> Vec<(u64, u64, FileLockKind)> {
        let mut runs: Vec<(u64, u64, FileLockKind)> = Vec::new();
        for (byte, held) in self.held[owner].iter().enumerate() {
            let Some(kind) = *held else { continue };
            match runs.last_mut() {
                Some((_, end, last)) if *end + 1 == byte as u64 && *last == kind => *end = byte as u64,
                _ => runs.push((byte as u64, byte as u64, kind)),
            }
        }
        runs
    }
}

fn check_against(model: &Model, table: &LockTable) {
    table.check();
    let mut held: BTreeMap<u64, Vec<(u64, u64, FileLockKind)>> = BTreeMap::new();
    for lock in table.holders(FILE, LockSpace::Posix) {
        held.entry(lock.owner.owner).or_default().push((lock.start, lock.end, lock.kind));
    }
    for owner in 0..OWNERS {
        assert_eq!(held.remove(&(owner as u64)).unwrap_or_default(), model.runs(owner), "owner {owner}");
    }
    let waiting: Vec<u64> = table.waiters(FILE, LockSpace::Posix).map(|(token, _)| token.number).collect();
    assert_eq!(waiting, model.waiting.iter().map(|waiter| waiter.0).collect::<Vec<_>>());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn posix_locks_behave_like_bytes(steps in prop::collection::vec(step(), 1..60)) {
        let mut table = LockTable::new();
        let mut model = Model::default();
        for (number, step) in steps.into_iter().enumerate() {
            let mut effects = Vec::new();
            let mut expected = Vec::new();
            match step {
                Step::Set { owner: who, start, end, kind, wait } => {
                    let lock = FileLock { start: start as u64, end: end as u64, kind, owner: owner(who) };
                    let outcome = table.set(FILE, LockSpace::Posix, lock, wait.then(|| token(number as u64)), &mut effects);
                    if !model.conflicts(who, start, end, kind) {
                        prop_assert_eq!(outcome, Outcome::Granted);
                        model.put(who, start, end, kind);
                        expected = model.wake();
                    } else if wait {
                        prop_assert_eq!(outcome, Outcome::Waiting);
                        model.waiting.push((number as u64, who, start, end, kind));
                        let mut waits_for: Vec<u64> = table.waits_for(owner(who)).iter().map(|(_, holder)| holder.owner).collect();
                        waits_for.sort_unstable();
                        waits_for.dedup();
                        let blockers: Vec<u64> = (0..OWNERS).filter(|&other| model.waiting.iter().any(|&(_, waiter, start, end, kind)| {
                            waiter == who && other != who && {
                                let mut alone = Model::default();
                                alone.held[other] = model.held[other];
                                alone.conflicts(who, start, end, kind)
                            }
                        })).map(|other| other as u64).collect();
                        prop_assert_eq!(waits_for, blockers);
                    } else {
                        let Outcome::Conflict(held) = outcome else { panic!("{outcome:?}") };
                        prop_assert!(held.start <= lock.end && lock.start <= held.end && held.owner.owner != who as u64);
                        prop_assert!(held.kind == FileLockKind::Write || kind == FileLockKind::Write);
                    }
                }
                Step::Get { owner: who, start, end, kind } => {
                    let lock = FileLock { start: start as u64, end: end as u64, kind, owner: owner(who) };
                    prop_assert_eq!(table.get(FILE, LockSpace::Posix, lock).is_some(), model.conflicts(who, start, end, kind));
                }
                Step::Cancel(number) => {
                    let waited = model.waiting.iter().any(|waiter| waiter.0 == number);
                    model.waiting.retain(|waiter| waiter.0 != number);
                    prop_assert_eq!(table.cancel(token(number)), waited);
                }
                Step::Release(who) => {
                    table.release_owner(FILE, LockSpace::Posix, owner(who), &mut effects);
                    model.held[who] = [None; BYTES];
                    expected = model.wake();
                }
                Step::NodeGone(slot) => {
                    table.node_gone(slot, &mut effects);
                    for who in (0..OWNERS).filter(|&who| owner(who).slot == slot) {
                        model.held[who] = [None; BYTES];
                    }
                    model.waiting.retain(|waiter| owner(waiter.1).slot != slot);
                    expected = model.wake();
                }
            }
            prop_assert_eq!(effects.iter().map(|granted| granted.token.number).collect::<Vec<_>>(), expected);
            check_against(&model, &table);
        }
        let mut effects = Vec::new();
        for slot in 0..3 {
            table.node_gone(slot, &mut effects);
        }
        prop_assert_eq!(table.files().count(), 0);
    }

    /// flock: at most one lock an owner, invariants hold, both spaces and several files at once.
    #[test]
    fn spaces_and_files_keep_their_invariants(
        steps in prop::collection::vec((0..OWNERS, 0..3u64, any::<bool>(), 0..8u64, 0..8u64, kind(), any::<bool>()), 1..80)
    ) {
        let mut table = LockTable::new();
        let mut waiting: BTreeMap<u64, (Ino, LockSpace, LockOwner)> = BTreeMap::new();
        for (number, (who, ino, flock, one, other, kind, wait)) in steps.into_iter().enumerate() {
            let space = if flock { LockSpace::Flock } else { LockSpace::Posix };
            let lock = FileLock { start: one.min(other), end: one.max(other), kind, owner: owner(who) };
            let mut effects = Vec::new();
            let outcome = table.set(Ino(ino), space, lock, wait.then(|| token(number as u64)), &mut effects);
            table.check();
            let mut own_waiter_woken = false;
            for Granted { token } in effects {
                let (ino, space, owner) = waiting.remove(&token.number).expect("granted once, to who waits");
                own_waiter_woken |= owner == lock.owner;
                if space == LockSpace::Flock && owner != lock.owner {
                    prop_assert!(table.holders(ino, space).any(|held| held.owner == owner));
                }
            }
            match outcome {
                Outcome::Waiting => { waiting.insert(number as u64, (Ino(ino), space, lock.owner)); }
                Outcome::Granted if kind != FileLockKind::Unlock => {
                    prop_assert!(table.holders(Ino(ino), space).any(|held| held.owner == lock.owner && held.kind == kind));
                }
                Outcome::Conflict(held) => prop_assert!(held.owner != lock.owner),
                _ => {}
            }
            if flock && outcome != Outcome::Granted && !own_waiter_woken {
                prop_assert!(!table.holders(Ino(ino), space).any(|held| held.owner == lock.owner), "a failed conversion leaves nothing");
            }
        }
    }
}

fn lock(who: usize, start: u64, end: u64, kind: FileLockKind) -> FileLock {
    FileLock { start, end, kind, owner: owner(who) }
}

fn set(table: &mut LockTable, space: LockSpace, lock: FileLock, wait: Option<u64>) -> (Outcome, Vec<u64>) {
    let mut effects = Vec::new();
    let outcome = table.set(FILE, space, lock, wait.map(token), &mut effects);
    (outcome, effects.into_iter().map(|granted| granted.token.number).collect())
}

use FileLockKind::{Read, Unlock, Write};
use LockSpace::{Flock, Posix};

#[test]
fn waiters_are_served_by_arrival() {
    let mut table = LockTable::new();
    set(&mut table, Posix, lock(0, 0, 9, Write), None);
    for waiter in 1..5 {
        assert_eq!(set(&mut table, Posix, lock(waiter, 0, 9, Write), Some(waiter as u64)).0, Outcome::Waiting);
    }
    for holder in 0..4 {
        assert_eq!(
            set(&mut table, Posix, lock(holder, 0, 9, Unlock), None),
            (Outcome::Granted, vec![holder as u64 + 1])
        );
    }
}

#[test]
fn downgrading_lets_all_readers_in() {
    let mut table = LockTable::new();
    set(&mut table, Posix, lock(0, 0, 9, Write), None);
    set(&mut table, Posix, lock(1, 5, 5, Read), Some(1));
    set(&mut table, Posix, lock(2, 0, 20, Read), Some(2));
    assert_eq!(set(&mut table, Posix, lock(0, 0, 9, Read), None), (Outcome::Granted, vec![1, 2]));
}

#[test]
fn the_two_spaces_do_not_interact() {
    let mut table = LockTable::new();
    assert_eq!(set(&mut table, Posix, lock(0, 0, 9, Write), None).0, Outcome::Granted);
    assert_eq!(set(&mut table, Flock, lock(1, 0, 0, Write), None).0, Outcome::Granted);
    assert_eq!(table.get(FILE, Posix, lock(2, 10, u64::MAX, Write)), None);
    assert_eq!(table.get(FILE, Flock, lock(2, 10, 10, Read)).map(|held| held.owner), Some(owner(1)));
}

#[test]
fn a_flock_conversion_that_fails_has_lost_the_old_lock() {
    let mut table = LockTable::new();
    set(&mut table, Flock, lock(0, 0, 0, Read), None);
    set(&mut table, Flock, lock(1, 0, 0, Read), None);
    assert!(matches!(set(&mut table, Flock, lock(0, 0, 0, Write), None).0, Outcome::Conflict(_)));
    assert_eq!(set(&mut table, Flock, lock(1, 0, 0, Write), None).0, Outcome::Granted);
}

#[test]
fn a_lock_to_the_last_byte_splits_and_joins() {
    let mut table = LockTable::new();
    set(&mut table, Posix, lock(0, 0, u64::MAX, Write), None);
    set(&mut table, Posix, lock(0, u64::MAX, u64::MAX, Unlock), None);
    assert_eq!(table.holders(FILE, Posix).map(|held| held.end).collect::<Vec<_>>(), [u64::MAX - 1]);
    set(&mut table, Posix, lock(0, u64::MAX, u64::MAX, Write), None);
    assert_eq!(table.holders(FILE, Posix).collect::<Vec<_>>(), [lock(0, 0, u64::MAX, Write)]);
    assert_eq!(set(&mut table, Posix, lock(0, 5, 4, Read), None).0, Outcome::Invalid);
}

#[test]
fn the_pid_does_not_make_another_owner() {
    let mut table = LockTable::new();
    set(&mut table, Posix, lock(0, 0, 9, Write), None);
    let mut child = lock(0, 0, 9, Read);
    child.owner.pid = 4711;
    assert_eq!(set(&mut table, Posix, child, None).0, Outcome::Granted);
    assert_eq!(table.holders(FILE, Posix).collect::<Vec<_>>(), [child]);
}

#[test]
fn two_upgrades_of_one_range_deadlock() {
    let mut table = LockTable::new();
    set(&mut table, Posix, lock(0, 0, 9, Read), None);
    set(&mut table, Posix, lock(1, 0, 9, Read), None);
    set(&mut table, Posix, lock(0, 0, 9, Write), Some(0));
    assert!(!would_deadlock(&table.edges(), owner(0)));
    set(&mut table, Posix, lock(1, 0, 9, Write), Some(1));
    assert!(would_deadlock(&table.edges(), owner(1)));
    assert!(table.cancel(token(1)));
    assert!(!would_deadlock(&table.edges(), owner(0)));
    assert_eq!(set(&mut table, Posix, lock(1, 0, 9, Unlock), None), (Outcome::Granted, vec![0]));
}

#[test]
fn a_waiting_token_stays_as_it_is() {
    let mut table = LockTable::new();
    set(&mut table, Posix, lock(0, 0, 9, Write), None);
    set(&mut table, Posix, lock(1, 0, 9, Write), Some(1));
    assert_eq!(set(&mut table, Posix, lock(1, 0, 9, Write), Some(1)).0, Outcome::Waiting);
    assert_eq!(table.waiters(FILE, Posix).count(), 1);
    assert_eq!(set(&mut table, Posix, lock(0, 0, 9, Unlock), None).1, [1]);
    assert!(!table.cancel(token(1)), "granted: the caller has to unlock");
}

/// Bounds what one node may hold, and that it can always unlock.
#[test]
fn a_node_runs_out_of_locks_and_can_unlock() {
    let mut table = LockTable::new();
    let mut effects = Vec::new();
    let mut set =
        |table: &mut LockTable, ino: u64, kind| table.set(Ino(ino), Posix, lock(0, 0, 9, kind), None, &mut effects);
    for ino in 0..verbfs_flk::LOCKS_PER_NODE_MAX as u64 {
        assert_eq!(set(&mut table, ino, Write), Outcome::Granted);
    }
    assert_eq!(set(&mut table, 1 << 40, Write), Outcome::Exhausted);
    assert_eq!(set(&mut table, 0, Unlock), Outcome::Granted);
    assert_eq!(set(&mut table, 1 << 40, Write), Outcome::Granted);
    table.check();
}
