//! Cycles of owners that wait for each other.

use crate::table::identity;
use std::collections::{HashMap, HashSet};
use verbfs_protocol::LockOwner;

/// Whether `from` waits, through any number of others, for itself. An edge (a, b) says that a waits for b;
/// edges may come from several homes, in any order, and more than once.
pub fn would_deadlock(edges: &[(LockOwner, LockOwner)], from: LockOwner) -> bool {
    let mut next: HashMap<_, Vec<_>> = HashMap::new();
    for (waiter, holder) in edges {
        next.entry(identity(waiter)).or_default().push(identity(holder));
    }
    let start = identity(&from);
    let mut seen = HashSet::new();
    let mut open = vec![start];
    while let Some(owner) = open.pop() {
        for &holder in next.get(&owner).into_iter().flatten() {
            if holder == start {
                return true;
            }
            if seen.insert(holder) {
                open.push(holder);
            }
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owner(owner: u64) -> LockOwner {
        LockOwner { slot: 1, incarnation: 1, owner, pid: owner as u32 }
    }
    fn edges(pairs: &[(u64, u64)]) -> Vec<(LockOwner, LockOwner)> {
        pairs.iter().map(|&(waiter, holder)| (owner(waiter), owner(holder))).collect()
    }

    #[test]
    fn a_cycle_through_others_is_found() {
        assert!(would_deadlock(&edges(&[(1, 2), (2, 3), (3, 1)]), owner(1)));
        assert!(would_deadlock(&edges(&[(1, 5), (1, 2), (5, 6), (2, 1)]), owner(1)));
    }

    #[test]
    fn a_cycle_of_others_is_not_mine() {
        assert!(!would_deadlock(&edges(&[(1, 2), (2, 3), (3, 2)]), owner(1)));
        assert!(!would_deadlock(&[], owner(1)));
    }

    #[test]
    fn the_pid_is_no_part_of_an_owner() {
        let thread = LockOwner { pid: 77, ..owner(1) };
        assert!(would_deadlock(&[(owner(1), owner(2)), (owner(2), thread)], owner(1)));
    }
}
