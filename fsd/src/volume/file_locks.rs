//! fcntl and flock locks: kept by the inode's home, waited for by whoever asks.
//!
//! A waiting request stays unanswered at the home until it is granted, cancelled (its caller got a
//! signal) or found to close a cycle. Cycles run across homes: a request that has to wait follows the edges "waits for"
//! through all members. The edges it meets are of different instants, so what looks like a cycle need never have been one: it is
//! walked again, and counts only if every wait in it is still the same. A wait that was there both times was there all the
//! time between, and whoever waits acquires and frees nothing; so at the instant between the two walks the cycle was whole.

use super::*;
use verbfs_flk::{Granted, LockTable, Outcome, WaitToken};

/// Owners followed in the search for a cycle. A longer chain counts as none: its members wait, killable.
const CHAIN_MAX: usize = 64;
/// How long each owner of a cycle lets the ones before it, by identity, give way: so one does, and not all.
const GIVE_WAY: Duration = Duration::from_millis(100);

/// What tells owners apart.
type Identity = (Slot, u32, u64);

/// An edge of "waits for": who waits, by which wait of its, where, and for whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Edge {
    waiter: LockOwner,
    wait: u64,
    home: Slot,
    holder: LockOwner,
}

fn identity(owner: &LockOwner) -> Identity {
    (owner.slot, owner.incarnation, owner.owner)
}

/// The edges that lead from an owner back to it, first to last, if any do.
fn cycle_through(owner: Identity, edges: &[Edge]) -> Option<Vec<Edge>> {
    let mut came_by: std::collections::BTreeMap<Identity, Edge> = Default::default();
    let mut next = std::collections::VecDeque::from([owner]);
    while let Some(waiter) = next.pop_front() {
        for edge in edges.iter().filter(|edge| identity(&edge.waiter) == waiter) {
            let holder = identity(&edge.holder);
            if holder == owner {
                let mut path = vec![*edge];
                while identity(&path[path.len() - 1].waiter) != owner {
                    path.push(came_by[&identity(&path[path.len() - 1].waiter)]);
                }
                path.reverse();
                return Some(path);
            }
            came_by.entry(holder).or_insert_with(|| {
                next.push_back(holder);
                *edge
            });
        }
    }
    None
}

#[derive(Default)]
pub(crate) struct FileLocks {
    pub table: LockTable,
    waiting: HashMap<WaitToken, Sender<()>>,
}

impl FileLocks {
    /// Requests that wait now.
    pub fn waiters(&self) -> usize {
        self.waiting.len()
    }
}

impl Volume {
    fn own_owner(&self, mut lock: FileLock) -> FileLock {
        lock.owner.slot = self.slot();
        lock.owner.incarnation = self.options.me.incarnation;
        lock
    }

    /// Locks or unlocks a range. `token` names a waiting call, for [`Volume::cancel_file_lock`].
    ///
    /// # Errors
    /// EAGAIN without `wait`; EINTR when cancelled; EDEADLK; ENOLCK.
    pub async fn set_file_lock(
        self: &Rc<Self>,
        ino: Ino,
        space: LockSpace,
        lock: FileLock,
        wait: bool,
        token: u64,
    ) -> Result<()> {
        let lock = self.own_owner(lock);
        self.metrics.file_lock_requests.increment();
        self.call(ino.home(), Request::SetFileLock { ino, space, lock, wait, token }).await.map(|_| ())
    }

    /// A waiting [`Volume::set_file_lock`] returns EINTR, unless it was granted meanwhile.
    pub fn cancel_file_lock(self: &Rc<Self>, ino: Ino, token: u64) {
        let volume = self.clone();
        self.spawn(async move {
            // The waiting call's own reply says how it ended.
            let _ = volume.call(ino.home(), Request::CancelFileLock { ino, token }).await;
        });
    }

    pub async fn get_file_lock(
        self: &Rc<Self>,
        ino: Ino,
        space: LockSpace,
        lock: FileLock,
    ) -> Result<Option<FileLock>> {
        let lock = self.own_owner(lock);
        match self.call(ino.home(), Request::GetFileLock { ino, space, lock }).await? {
            Reply::FileLock(lock) => Ok(lock),
            _ => Err(Errno::EPROTO),
        }
    }

    /// Close: all locks of an owner on a file go.
    pub async fn release_file_locks(self: &Rc<Self>, ino: Ino, space: LockSpace, owner: u64) -> Result<()> {
        let owner = LockOwner { slot: self.slot(), incarnation: self.options.me.incarnation, owner, pid: 0 };
        self.call(ino.home(), Request::ReleaseFileLocks { ino, space, owner }).await.map(|_| ())
    }

    // ---- the home's side

    fn wake_granted(&self, granted: Vec<Granted>) {
        for Granted { token } in granted {
            let sender = self.file_locks.borrow_mut().waiting.remove(&token);
            if let Some(sender) = sender {
                sender.send(());
            }
        }
    }

    pub(crate) async fn serve_set_file_lock(
        self: &Rc<Self>,
        from: Node,
        ino: Ino,
        space: LockSpace,
        lock: FileLock,
        wait: bool,
        token: u64,
    ) -> Result<Reply> {
        if lock.owner.slot != from.slot {
            return Err(Errno::EINVAL);
        }
        let token = WaitToken { node: from, number: token };
        let mut granted = Vec::new();
        let outcome = self.file_locks.borrow_mut().table.set(ino, space, lock, wait.then_some(token), &mut granted);
        self.wake_granted(granted);
        match outcome {
            Outcome::Granted => Ok(Reply::Done),
            Outcome::Conflict(_) => Err(Errno::EAGAIN),
            Outcome::Invalid => Err(Errno::EINVAL),
            Outcome::Exhausted => Err(Errno::ENOLCK),
            Outcome::Waiting => {
                let (sender, receiver) = oneshot();
                self.file_locks.borrow_mut().waiting.insert(token, sender);
                if space == LockSpace::Posix
                    && self.is_deadlocked(lock.owner).await
                    && self.file_locks.borrow_mut().table.cancel(token)
                {
                    self.file_locks.borrow_mut().waiting.remove(&token);
                    self.metrics.file_lock_deadlocks.increment();
                    return Err(Errno::EDEADLK);
                }
                match receiver.await {
                    Some(()) => Ok(Reply::Done),
                    None => Err(Errno::EINTR),
                }
            }
        }
    }

    /// Whether an owner that has begun to wait must give up its wait, because it would never end.
    async fn is_deadlocked(self: &Rc<Self>, owner: LockOwner) -> bool {
        let Some(cycle) = self.confirmed_cycle(owner).await else { return false };
        // Others of the cycle may have found it as well: the greatest gives way, the next one only if it does not.
        let before = cycle.iter().filter(|edge| identity(&edge.waiter) > identity(&owner)).count();
        if before == 0 {
            return true;
        }
        self.executor.sleep(GIVE_WAY * before as u32).await;
        self.confirmed_cycle(owner).await.is_some()
    }

    /// A cycle of waits through an owner that was whole at one instant.
    async fn confirmed_cycle(self: &Rc<Self>, owner: LockOwner) -> Option<Vec<Edge>> {
        let cycle = cycle_through(identity(&owner), &self.edges_from(owner).await)?;
        for edge in &cycle {
            let still = self.edges_at(edge.home, edge.waiter).await;
            let same = |other: &Edge| other.wait == edge.wait && identity(&other.holder) == identity(&edge.holder);
            if !still.iter().any(same) {
                return None;
            }
        }
        Some(cycle)
    }

    /// What an owner waits for at one home.
    async fn edges_at(self: &Rc<Self>, home: Slot, waiter: LockOwner) -> Vec<Edge> {
        // Who cannot be asked has no say: its locks end with it, or its waiters go on waiting, killable.
        if home != self.slot() && !self.peers.borrow().get(&home).is_some_and(|peer| peer.connected) {
            return Vec::new();
        }
        match self.call(home, Request::WaitsFor { owner: waiter }).await {
            Ok(Reply::Owners(owners)) => {
                owners.into_iter().map(|(wait, holder)| Edge { waiter, wait, home, holder }).collect()
            }
            _ => Vec::new(),
        }
    }

    /// All edges that can be reached from an owner, each as of when it was asked for.
    async fn edges_from(self: &Rc<Self>, owner: LockOwner) -> Vec<Edge> {
        let mut edges = Vec::new();
        let mut seen = std::collections::BTreeSet::new();
        let mut next = vec![owner];
        while let Some(waiter) = next.pop() {
            if seen.len() >= CHAIN_MAX || !seen.insert(identity(&waiter)) {
                continue;
            }
            for home in self.options.members.clone() {
                let found = self.edges_at(home, waiter).await;
                next.extend(found.iter().map(|edge| edge.holder));
                edges.extend(found);
            }
        }
        edges
    }

    pub(crate) fn serve_cancel_file_lock(&self, from: Node, token: u64) -> Result<Reply> {
        let token = WaitToken { node: from, number: token };
        if self.file_locks.borrow_mut().table.cancel(token) {
            let sender = self.file_locks.borrow_mut().waiting.remove(&token);
            drop(sender);
        }
        Ok(Reply::Done)
    }

    pub(crate) fn serve_release_file_locks(
        &self,
        from: Node,
        ino: Ino,
        space: LockSpace,
        owner: LockOwner,
    ) -> Result<Reply> {
        if owner.slot != from.slot {
            return Err(Errno::EINVAL);
        }
        let mut granted = Vec::new();
        self.file_locks.borrow_mut().table.release_owner(ino, space, owner, &mut granted);
        self.wake_granted(granted);
        Ok(Reply::Done)
    }

    pub(crate) fn file_locks_of_lost_node(&self, slot: Slot) {
        let mut granted = Vec::new();
        let gone: Vec<Sender<()>> = {
            let mut locks = self.file_locks.borrow_mut();
            locks.table.node_gone(slot, &mut granted);
            let tokens: Vec<WaitToken> =
                locks.waiting.keys().filter(|token| token.node.slot == slot).copied().collect();
            tokens.into_iter().filter_map(|token| locks.waiting.remove(&token)).collect()
        };
        drop(gone);
        self.wake_granted(granted);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn edge(waiter: u64, holder: u64) -> Edge {
        let owner = |owner| LockOwner { slot: 1, incarnation: 1, owner, pid: 7 };
        Edge { waiter: owner(waiter), wait: 10 * waiter, home: 0, holder: owner(holder) }
    }

    #[test]
    fn a_cycle_is_found_whole_and_only_if_it_leads_back() {
        let owner = identity(&edge(1, 1).waiter);
        let edges = [edge(1, 2), edge(1, 3), edge(2, 4), edge(3, 5), edge(5, 3), edge(5, 1), edge(4, 4)];
        assert_eq!(cycle_through(owner, &edges).unwrap(), [edge(1, 3), edge(3, 5), edge(5, 1)]);
        assert_eq!(cycle_through(owner, &edges[..5]), None, "a cycle of others is theirs to find");
        assert_eq!(cycle_through(owner, &[edge(1, 1)]).unwrap(), [edge(1, 1)]);
    }
}
