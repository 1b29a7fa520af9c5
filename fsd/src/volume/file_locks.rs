//! fcntl and flock locks: kept by the inode's home, waited for by whoever asks.
//!
//! A waiting request stays unanswered at the home until it is granted, cancelled (its caller got a
//! signal) or found to close a cycle. Cycles run across homes: a request that has to wait follows the edges "waits for"
//! through all members.

use super::*;
use verbfs_flk::{Granted, LockTable, Outcome, WaitToken};

/// Owners followed in the search for a cycle. A longer chain counts as none: its members wait, killable.
const CHAIN_MAX: usize = 64;

#[derive(Default)]
pub(crate) struct FileLocks {
    pub table: LockTable,
    waiting: HashMap<WaitToken, Sender<()>>,
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
                    && self.closes_cycle(lock.owner).await
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

    /// Whether following "waits for" from an owner leads back to it.
    async fn closes_cycle(self: &Rc<Self>, owner: LockOwner) -> bool {
        let identity = |owner: &LockOwner| (owner.slot, owner.incarnation, owner.owner);
        let mut seen = std::collections::BTreeSet::new();
        let mut next = vec![owner];
        while let Some(waiter) = next.pop() {
            if seen.len() >= CHAIN_MAX {
                return false;
            }
            if !seen.insert(identity(&waiter)) {
                continue;
            }
            for slot in self.options.members.clone() {
                if slot != self.slot() && !self.peers.borrow().get(&slot).is_some_and(|peer| peer.connected) {
                    continue;
                }
                if let Ok(Reply::Owners(owners)) = self.call(slot, Request::WaitsFor { owner: waiter }).await {
                    if owners.iter().any(|holder| identity(holder) == identity(&owner)) {
                        return true;
                    }
                    next.extend(owners);
                }
            }
        }
        false
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
