//! The locks held and waited for.

use std::collections::HashMap;
use std::collections::hash_map;
use verbfs_protocol::{FileLock, FileLockKind, Ino, LockOwner, LockSpace, Node, Slot};

/// Most locks held and waited for by the processes of one node. Every call takes time in proportion to the locks of its
/// file; this keeps it below a millisecond a node, whatever a program does.
pub const LOCKS_PER_NODE_MAX: usize = 1 << 15;

/// Names a waiting request for ever: the node that waits and a number of its choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WaitToken {
    pub node: Node,
    pub number: u64,
}

/// The request that waited under this token has its lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Granted {
    pub token: WaitToken,
}

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Done.
    Granted,
    /// Not done: this lock is in the way (EAGAIN).
    Conflict(FileLock),
    /// Not done yet: [`Granted`] with the token follows, unless it is cancelled.
    Waiting,
    /// The range is empty: its end lies before its start (EINVAL).
    Invalid,
    /// The node has [`LOCKS_PER_NODE_MAX`] locks (ENOLCK). Unlocking never meets this.
    Exhausted,
}

/// What makes two owners one: everything but the pid.
pub(crate) type Identity = (Slot, u32, u64);

pub(crate) fn identity(owner: &LockOwner) -> Identity {
    (owner.slot, owner.incarnation, owner.owner)
}

/// Last byte of a file for locks, inclusive.
const LAST_BYTE: u64 = u64::MAX;

/// The advisory locks of all files of one home.
#[derive(Debug, Default)]
pub struct LockTable {
    /// Only files with locks or waiters.
    files: HashMap<(Ino, LockSpace), File>,
    /// Every waiter, by its token.
    waiting: HashMap<WaitToken, (Ino, LockSpace, Identity)>,
    /// Locks and waiters by slot; no zeros.
    per_node: HashMap<Slot, usize>,
}

#[derive(Debug, Default)]
struct File {
    /// Sorted by start; kind is never Unlock.
    held: Vec<FileLock>,
    /// By arrival; kind is never Unlock.
    waiting: Vec<(WaitToken, FileLock)>,
}

fn same_owner(one: &FileLock, other: &FileLock) -> bool {
    identity(&one.owner) == identity(&other.owner)
}

fn overlap(one: &FileLock, other: &FileLock) -> bool {
    one.start <= other.end && other.start <= one.end
}

fn touch(one: &FileLock, other: &FileLock) -> bool {
    one.end.checked_add(1) == Some(other.start) || other.end.checked_add(1) == Some(one.start)
}

fn conflict(one: &FileLock, other: &FileLock) -> bool {
    overlap(one, other)
        && !same_owner(one, other)
        && (one.kind == FileLockKind::Write || other.kind == FileLockKind::Write)
}

impl File {
    /// The first held lock in the way of `wanted`.
    fn conflict_with(&self, wanted: &FileLock) -> Option<FileLock> {
        // Sorted by start: nothing from the first lock behind `wanted` on can overlap it.
        self.held.iter().take_while(|held| held.start <= wanted.end).find(|held| conflict(held, wanted)).copied()
    }

    /// Makes `lock` what its owner holds on its bytes. Returns whether others may hold more than before.
    fn put(&mut self, lock: FileLock) -> bool {
        let mut weakened = false;
        let mut joined = lock;
        let mut rests: Vec<FileLock> = Vec::new();
        self.held.retain(|held| {
            if !same_owner(held, &lock) {
                return true;
            }
            if held.kind == lock.kind && (overlap(held, &lock) || touch(held, &lock)) {
                joined.start = joined.start.min(held.start);
                joined.end = joined.end.max(held.end);
                return false;
            }
            if !overlap(held, &lock) {
                return true;
            }
            weakened |= lock.kind == FileLockKind::Unlock || held.kind == FileLockKind::Write;
            if held.start < lock.start {
                rests.push(FileLock { end: lock.start - 1, ..*held });
            }
            if held.end > lock.end {
                rests.push(FileLock { start: lock.end + 1, ..*held });
            }
            false
        });
        if lock.kind != FileLockKind::Unlock {
            rests.push(joined);
        }
        for rest in rests {
            let place = self.held.partition_point(|held| held.start < rest.start);
            self.held.insert(place, rest);
        }
        weakened
    }

    /// Grants what can be granted, by arrival.
    fn wake(&mut self, effects: &mut Vec<Granted>) {
        let mut at = 0;
        while let Some(&(token, wanted)) = self.waiting.get(at) {
            if self.conflict_with(&wanted).is_some() {
                at += 1;
                continue;
            }
            self.waiting.remove(at);
            effects.push(Granted { token });
            // A grant that turned a write lock of its owner into a read lock may have made room for one that came before.
            if self.put(wanted) {
                at = 0;
            }
        }
    }
}

impl LockTable {
    pub fn new() -> LockTable {
        LockTable::default()
    }

    /// Locks or unlocks bytes `lock.start ..= lock.end` (all of the file for flock) for `lock.owner`.
    ///
    /// With `wait`, a lock that cannot be had now is queued under that token; a token that is queued already stays as it is. Unlocking and
    /// downgrading, and any flock conversion, may grant others what they wait for: they are appended to `effects`.
    pub fn set(
        &mut self,
        ino: Ino,
        space: LockSpace,
        mut lock: FileLock,
        wait: Option<WaitToken>,
        effects: &mut Vec<Granted>,
    ) -> Outcome {
        if space == LockSpace::Flock {
            (lock.start, lock.end) = (0, LAST_BYTE);
        }
        if lock.start > lock.end {
            return Outcome::Invalid;
        }
        if wait.is_some_and(|token| self.waiting.contains_key(&token)) {
            return Outcome::Waiting;
        }
        if lock.kind != FileLockKind::Unlock
            && self.per_node.get(&lock.owner.slot).is_some_and(|&count| count >= LOCKS_PER_NODE_MAX)
        {
            return Outcome::Exhausted;
        }
        self.change(ino, space, effects, |file, effects| {
            if space == LockSpace::Flock && lock.kind != FileLockKind::Unlock {
                match file.held.iter().find(|held| same_owner(held, &lock)) {
                    Some(held) if held.kind == lock.kind => return (Outcome::Granted, None),
                    Some(_) => {
                        file.put(FileLock { kind: FileLockKind::Unlock, ..lock });
                        file.wake(effects);
                    }
                    None => {}
                }
            }
            let in_the_way = if lock.kind == FileLockKind::Unlock { None } else { file.conflict_with(&lock) };
            match (in_the_way, wait) {
                (None, _) => {
                    if file.put(lock) {
                        file.wake(effects);
                    }
                    (Outcome::Granted, None)
                }
                (Some(held), None) => (Outcome::Conflict(held), None),
                (Some(_), Some(token)) => {
                    file.waiting.push((token, lock));
                    (Outcome::Waiting, Some((token, identity(&lock.owner))))
                }
            }
        })
    }

    /// The first lock that `lock` would conflict with.
    pub fn get(&self, ino: Ino, space: LockSpace, mut lock: FileLock) -> Option<FileLock> {
        if space == LockSpace::Flock {
            (lock.start, lock.end) = (0, LAST_BYTE);
        }
        if lock.kind == FileLockKind::Unlock || lock.start > lock.end {
            return None;
        }
        self.files.get(&(ino, space))?.conflict_with(&lock)
    }

    /// The waiting caller gave up. False if nobody waits under this token: the lock was granted, or never asked for.
    pub fn cancel(&mut self, token: WaitToken) -> bool {
        let Some(&(ino, space, _)) = self.waiting.get(&token) else {
            return false;
        };
        // Nobody waits for waiters, so nobody is woken.
        self.change(ino, space, &mut Vec::new(), |file, _| {
            file.waiting.retain(|(waiting, _)| *waiting != token);
            ((), None)
        });
        self.waiting.remove(&token);
        true
    }

    /// Unlocks all that `owner` holds on a file, as close does. Requests of the owner that wait go on waiting, as on
    /// Linux: whoever waits is interrupted and cancels.
    pub fn release_owner(&mut self, ino: Ino, space: LockSpace, owner: LockOwner, effects: &mut Vec<Granted>) {
        let all = FileLock { start: 0, end: LAST_BYTE, kind: FileLockKind::Unlock, owner };
        self.set(ino, space, all, None, effects);
    }

    /// Drops all locks and waiters of a node, of any incarnation.
    pub fn node_gone(&mut self, slot: Slot, effects: &mut Vec<Granted>) {
        let files: Vec<(Ino, LockSpace)> = self.files.keys().copied().collect();
        self.waiting.retain(|_, (_, _, owner)| owner.0 != slot);
        for (ino, space) in files {
            self.change(ino, space, effects, |file, effects| {
                let before = file.held.len();
                file.waiting.retain(|(_, wanted)| wanted.owner.slot != slot);
                file.held.retain(|held| held.owner.slot != slot);
                if file.held.len() < before {
                    file.wake(effects);
                }
                ((), None)
            });
        }
    }

    /// For whom `owner` waits here with fcntl locks, and by which wait, each once. (Linux looks for no deadlocks among flock
    /// locks.)
    pub fn waits_for(&self, owner: LockOwner) -> Vec<(WaitToken, LockOwner)> {
        let mut holders: Vec<(WaitToken, LockOwner)> = Vec::new();
        for (token, &(ino, space, waiter)) in &self.waiting {
            if space == LockSpace::Posix && waiter == identity(&owner) {
                let file = &self.files[&(ino, space)];
                let wanted =
                    file.waiting.iter().find(|(waiting, _)| waiting == token).expect("every waiter is in its file").1;
                let blocking = file.held.iter().filter(|held| conflict(held, &wanted));
                holders.extend(blocking.map(|held| (*token, held.owner)));
            }
        }
        holders.sort_unstable();
        holders.dedup_by_key(|(token, holder)| (*token, identity(holder)));
        holders
    }

    /// Every edge (waiter, holder) among fcntl locks here, each once: for [`crate::would_deadlock`].
    pub fn edges(&self) -> Vec<(LockOwner, LockOwner)> {
        let mut edges = Vec::new();
        for (_, file) in self.files.iter().filter(|((_, space), _)| *space == LockSpace::Posix) {
            for (_, wanted) in &file.waiting {
                edges.extend(
                    file.held.iter().filter(|held| conflict(held, wanted)).map(|held| (wanted.owner, held.owner)),
                );
            }
        }
        edges.sort_unstable();
        edges.dedup_by_key(|(waiter, holder)| (identity(waiter), identity(holder)));
        edges
    }

    /// Locks held on a file, by first byte.
    pub fn holders(&self, ino: Ino, space: LockSpace) -> impl Iterator<Item = FileLock> {
        self.files.get(&(ino, space)).into_iter().flat_map(|file| file.held.iter().copied())
    }

    /// Requests that wait on a file, by arrival.
    pub fn waiters(&self, ino: Ino, space: LockSpace) -> impl Iterator<Item = (WaitToken, FileLock)> {
        self.files.get(&(ino, space)).into_iter().flat_map(|file| file.waiting.iter().copied())
    }

    /// Files with locks, in no order.
    pub fn files(&self) -> impl Iterator<Item = (Ino, LockSpace)> {
        self.files.keys().copied()
    }

    /// Whether anything is held or waited for on a file in either space.
    pub fn is_locked(&self, ino: Ino) -> bool {
        [LockSpace::Posix, LockSpace::Flock].into_iter().any(|space| self.files.contains_key(&(ino, space)))
    }

    /// Lets `change` loose on a file, then brings counts, tokens and the set of files in line with it.
    fn change<T>(
        &mut self,
        ino: Ino,
        space: LockSpace,
        effects: &mut Vec<Granted>,
        change: impl FnOnce(&mut File, &mut Vec<Granted>) -> (T, Option<(WaitToken, Identity)>),
    ) -> T {
        let mut place = match self.files.entry((ino, space)) {
            hash_map::Entry::Occupied(place) => place,
            hash_map::Entry::Vacant(place) => place.insert_entry(File::default()),
        };
        let file = place.get_mut();
        count(&mut self.per_node, file, usize::wrapping_sub);
        let granted_before = effects.len();
        let (value, queued) = change(file, effects);
        count(&mut self.per_node, file, usize::wrapping_add);
        if file.held.is_empty() && file.waiting.is_empty() {
            place.remove();
        }
        if let Some((token, owner)) = queued {
            self.waiting.insert(token, (ino, space, owner));
        }
        for granted in &effects[granted_before..] {
            self.waiting.remove(&granted.token);
        }
        value
    }

    /// Asserts the invariants of the crate. Takes time in proportion to the square of the locks of a file.
    ///
    /// # Panics
    /// If one does not hold.
    pub fn check(&self) {
        let mut waiters = 0;
        let mut per_node: HashMap<Slot, usize> = HashMap::new();
        for (&(ino, space), file) in &self.files {
            assert!(!file.held.is_empty() || !file.waiting.is_empty(), "a file without locks");
            assert!(file.held.is_sorted_by_key(|held| held.start));
            for (place, held) in file.held.iter().enumerate() {
                assert!(held.start <= held.end && held.kind != FileLockKind::Unlock);
                assert!(space == LockSpace::Posix || (held.start, held.end) == (0, LAST_BYTE));
                for other in &file.held[place + 1..] {
                    assert!(!conflict(held, other), "{held:?} and {other:?} are both held");
                    if same_owner(held, other) {
                        assert!(!overlap(held, other), "{held:?} and {other:?} of one owner overlap");
                        assert!(
                            held.kind != other.kind || !touch(held, other),
                            "{held:?} and {other:?} are not joined"
                        );
                    }
                }
            }
            for (token, wanted) in &file.waiting {
                assert!(file.conflict_with(wanted).is_some(), "{wanted:?} waits for nothing");
                assert_eq!(self.waiting.get(token), Some(&(ino, space, identity(&wanted.owner))));
            }
            waiters += file.waiting.len();
            count(&mut per_node, file, usize::wrapping_add);
        }
        assert_eq!(waiters, self.waiting.len(), "a token without a waiter");
        assert_eq!(per_node, self.per_node);
    }
}

/// Adds or subtracts the locks and waiters of a file to those of their nodes.
fn count(per_node: &mut HashMap<Slot, usize>, file: &File, by: fn(usize, usize) -> usize) {
    let mut slots =
        file.held.iter().chain(file.waiting.iter().map(|(_, wanted)| wanted)).map(|lock| lock.owner.slot).peekable();
    while let Some(slot) = slots.next() {
        // One look-up for a row of locks of one node.
        let mut row = 1;
        while slots.next_if_eq(&slot).is_some() {
            row += 1;
        }
        let count = per_node.entry(slot).or_default();
        *count = by(*count, row);
        if *count == 0 {
            per_node.remove(&slot);
        }
    }
}
