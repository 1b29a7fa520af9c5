//! What the outside is shown: status, locks. And the way out: leaving in good order.

use super::*;

/// Another node as this one sees it.
pub struct PeerReport {
    pub slot: Slot,
    pub connected: bool,
    pub incarnation: Option<u32>,
    pub gone_for: Option<Duration>,
}

/// How a node is doing.
pub struct Report {
    pub peers: Vec<PeerReport>,
    pub arena_pages: u64,
    pub arena_used: u64,
    pub inodes: u64,
    pub cache_pages: u64,
    pub cache_used: u64,
    pub cache_dirty: u64,
    pub locks_held: u64,
    pub locks_granted: u64,
    pub lock_waiters: u64,
    pub file_lock_waiters: u64,
    pub arena_reserved: u64,
    pub cache_evictions: u64,
    pub transport: TransportStatistics,
}

pub struct ListedLock {
    pub resource: Resource,
    pub holder: Holder,
    pub waits: bool,
}

#[derive(Default)]
pub struct ListedLocks {
    pub locks: Vec<ListedLock>,
    /// fcntl and flock locks, and whether they are waited for.
    pub file_locks: Vec<(FileLock, LockSpace, bool)>,
    pub unreachable: Vec<(Slot, String)>,
}

impl ListedLocks {
    fn add(&mut self, resource: Resource, reply: Reply) {
        if let Reply::Holders { holders, waiters } = reply {
            self.locks.extend(holders.into_iter().map(|holder| ListedLock { resource, holder, waits: false }));
            self.locks.extend(waiters.into_iter().map(|holder| ListedLock { resource, holder, waits: true }));
        }
    }
}

impl Volume {
    pub fn report(&self) -> Report {
        let pages = self.extents.borrow().pages();
        let server = self.lock_server.borrow();
        let (mut locks_granted, mut lock_waiters) = (0, 0);
        for resource in server.resources() {
            locks_granted += server.holders(resource).len() as u64;
            lock_waiters += server.waiters(resource).len() as u64;
        }
        let cache = self.cache.borrow();
        Report {
            peers: self
                .peers
                .borrow()
                .iter()
                .map(|(slot, peer)| PeerReport {
                    slot: *slot,
                    connected: peer.connected,
                    incarnation: peer.node.map(|node| node.incarnation),
                    gone_for: peer.gone_since.map(|since| since.elapsed()),
                })
                .collect(),
            arena_pages: pages.total,
            arena_used: pages.allocated(),
            inodes: self.store.borrow().inode_count().unwrap_or(0),
            cache_pages: cache.capacity() as u64,
            cache_used: cache.used() as u64,
            cache_dirty: (cache.dirty_pages() + cache.writing_pages()) as u64,
            locks_held: self.lock_client.borrow().len() as u64,
            locks_granted,
            lock_waiters,
            file_lock_waiters: self.file_locks.borrow().waiters() as u64,
            arena_reserved: pages.reserved,
            cache_evictions: cache.evictions(),
            transport: self.transport.borrow().as_ref().map(|transport| transport.statistics()).unwrap_or_default(),
        }
    }

    /// All locks on an inode, from all servers that have some.
    pub async fn describe_inode(self: &Rc<Self>, ino: Ino) -> ListedLocks {
        let mut listed = ListedLocks::default();
        let mut resources = vec![Resource::open(ino), Resource::attr(ino), Resource::name(ino)];
        if let Ok(layout) = self.layout(ino).await {
            resources.extend(layout.slots.iter().map(|slot| Resource::data(ino, *slot)));
        }
        for resource in resources {
            match self.call(resource.server, Request::Describe { resource }).await {
                Ok(reply) => listed.add(resource, reply),
                Err(error) => listed.unreachable.push((resource.server, error.to_string())),
            }
        }
        if let Ok(Reply::FileLocks(locks)) = self.call(ino.home(), Request::DescribeFileLocks { ino }).await {
            listed.file_locks = locks;
        }
        listed.unreachable.dedup();
        listed
    }

    /// All locks this node's server has.
    pub fn describe_all(&self) -> ListedLocks {
        let mut listed = ListedLocks::default();
        let resources: Vec<Resource> = self.lock_server.borrow().resources().collect();
        for resource in resources {
            listed.add(resource, self.describe(resource));
        }
        // What this node holds and wants, as its own lock client sees it.
        let client = self.lock_client.borrow();
        for view in client.grants() {
            let mut state = String::from("held here");
            for (is, word) in [
                (view.fenced, "fenced"),
                (view.incoming, "awaiting pages"),
                (view.in_transit, "handed over"),
                (view.frozen, "frozen"),
            ] {
                if is {
                    state.push_str(", ");
                    state.push_str(word);
                }
            }
            if view.pins > 0 {
                state.push_str(&format!(", {} in use", view.pins));
            }
            let holder = Holder { slot: self.slot(), range: view.range, mode: view.mode, state };
            listed.locks.push(ListedLock { resource: view.resource, holder, waits: false });
        }
        for request in client.waiting() {
            let mode = match request.kind {
                verbfs_lock::PinKind::Shared => Mode::S,
                verbfs_lock::PinKind::Extend => Mode::E,
                verbfs_lock::PinKind::Write | verbfs_lock::PinKind::Exclusive => Mode::X,
            };
            let state = if request.through_fence { "wanted here by the kernel's page cache" } else { "wanted here" };
            let holder = Holder { slot: self.slot(), range: request.range, mode, state: state.into() };
            listed.locks.push(ListedLock { resource: request.resource, holder, waits: true });
        }
        listed
    }

    pub(crate) fn list_file_locks(&self, ino: Ino) -> Vec<(FileLock, LockSpace, bool)> {
        let locks = self.file_locks.borrow();
        let mut listed = Vec::new();
        for space in [LockSpace::Posix, LockSpace::Flock] {
            listed.extend(locks.table.holders(ino, space).map(|lock| (lock, space, false)));
            listed.extend(locks.table.waiters(ino, space).map(|(_, lock)| (lock, space, true)));
        }
        listed.truncate(FILE_LOCKS_MAX);
        listed
    }

    /// Writes everything back and gives every lock up. False when the limit passed first: something is not home.
    pub async fn leave(self: &Rc<Self>, limit: Duration) -> bool {
        let began = Instant::now();
        self.open_files.borrow_mut().clear();
        loop {
            let mut effects = Vec::new();
            self.lock_client.borrow_mut().trim(0, &mut effects);
            self.client_effects.borrow_mut().extend(effects);
            let dirty = {
                let cache = self.cache.borrow();
                cache.dirty_pages() + cache.writing_pages()
            };
            // What other nodes' servers granted is to be given back; the own server ends with this daemon.
            let held = self.lock_client.borrow().grants().any(|grant| {
                grant.resource.server != self.slot()
                    && self.peers.borrow().get(&grant.resource.server).is_some_and(|peer| peer.connected)
            });
            if dirty == 0 && !held {
                return true;
            }
            if began.elapsed() >= limit {
                return false;
            }
            self.start_write_back();
            self.executor.sleep(Duration::from_millis(20)).await;
        }
    }
}
