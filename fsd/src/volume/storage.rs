//! What this node answers as the place where records and pages are stored.

use super::*;
use crate::ranges::RangeSet;
use verbfs_arena::Claim;
use verbfs_lock::HolderView;

/// Pages that one ALLOCATE may name at most.
const ALLOCATE_MAX: u64 = crate::volume::data::PIECE_MAX / PAGE_SIZE * 64;
const _: () = assert!(ALLOCATE_MAX as usize <= EXTENTS_MAX);

pub(crate) fn store_error(error: verbfs_namespace::Error) -> Errno {
    if !error.is_harmless() {
        tracing::error!(%error, "the store failed");
    }
    Errno(error.errno())
}

pub(crate) fn arena_error(error: verbfs_arena::Error) -> Errno {
    let errno = Errno(error.errno());
    if errno != Errno::ENOSPC {
        tracing::error!(%error, "the arena failed");
    }
    errno
}

impl Volume {
    /// Serves a request of a node, also this one.
    pub(crate) async fn serve(self: Rc<Self>, from: Node, request: Request) -> Result<Reply> {
        match request {
            Request::Operation { operation, caller, kind, .. } => {
                if operation.node != from {
                    return Err(Errno::EINVAL);
                }
                self.operate(operation, caller, kind).await
            }
            Request::Lookup { directory, name } => {
                let entry = self.store.borrow().read(|txn| txn.entry(directory, &name)).map_err(store_error)?;
                Ok(Reply::Entry(entry.map(|entry| (entry.ino, entry.kind))))
            }
            Request::List { directory, cursor, limit } => {
                let limit = (limit as usize).clamp(1, LIST_MAX);
                let listed = self.store.borrow().read(|txn| txn.scan(directory, cursor, limit)).map_err(store_error)?;
                let end = listed.len() < limit;
                Ok(Reply::Entries {
                    entries: listed
                        .into_iter()
                        .map(|entry| Listed {
                            name: entry.name,
                            ino: entry.entry.ino,
                            kind: entry.entry.kind,
                            cursor: entry.cursor,
                        })
                        .collect(),
                    end,
                })
            }
            Request::Parent { directory } => {
                let parent = self.store.borrow().read(|txn| txn.parent(directory)).map_err(store_error)?;
                Ok(Reply::Ino(parent.unwrap_or(Ino::ROOT)))
            }
            Request::ReserveInode => {
                let sequence = self.store.borrow_mut().write(|txn| txn.allocate_sequence()).map_err(store_error)?;
                Ok(Reply::Ino(Ino::new(self.slot(), sequence)))
            }
            Request::ReadLink { ino } => {
                let target = self.store.borrow().read(|txn| txn.symlink(ino)).map_err(store_error)?;
                match target {
                    Some(target) => Ok(Reply::Bytes(target)),
                    None if self.stored_attributes(ino)?.is_none() => Err(Errno::ESTALE),
                    None => Err(Errno::EINVAL),
                }
            }
            Request::GetXattr { ino, name } => {
                if self.stored_attributes(ino)?.is_none() {
                    return Err(Errno::ESTALE);
                }
                let value = self.store.borrow().read(|txn| txn.xattr(ino, &name)).map_err(store_error)?;
                value.map(Reply::Bytes).ok_or(Errno::ENODATA)
            }
            Request::ListXattr { ino } => {
                if self.stored_attributes(ino)?.is_none() {
                    return Err(Errno::ESTALE);
                }
                let names = self.store.borrow().read(|txn| txn.xattrs(ino)).map_err(store_error)?;
                if names.iter().map(|name| name.len() + 1).sum::<usize>() > XATTR_LIST_MAX {
                    return Err(Errno::E2BIG);
                }
                Ok(Reply::Names(names))
            }
            Request::Layout { ino, range } => {
                let extents = self
                    .store
                    .borrow()
                    .read(|txn| self.extents.borrow().lookup(txn, ino, range))
                    .map_err(arena_error)?;
                if extents.len() > EXTENTS_MAX {
                    return Err(Errno::E2BIG);
                }
                Ok(Reply::Extents { key: self.arena_key, extents, allocated: 0 })
            }
            Request::Allocate { ino, range, ahead, zero } => match self.allocate(from, ino, range, ahead, zero) {
                Err(Errno::ENOSPC) if self.reclaim_spare().await => self.allocate(from, ino, range, range, zero),
                outcome => outcome,
            }
            .inspect_err(|error| {
                if *error == Errno::ENOSPC {
                    self.metrics.arena_full.increment();
                }
            }),
            Request::GiveBack { ino, ranges } => self.take_back(from, ino, &ranges),
            Request::ReturnSpare => {
                self.give_back_spare(None, Some(from.slot)).await;
                Ok(Reply::Done)
            }
            Request::Commit { ino, ranges } => {
                if ranges.len() > RUNS_MAX {
                    return Err(Errno::EINVAL);
                }
                self.note_taken(from, ino, &ranges);
                let change = self
                    .store
                    .borrow_mut()
                    .write(|txn| self.extents.borrow_mut().commit(txn, ino, &ranges))
                    .map_err(arena_error)?;
                self.extents.borrow_mut().apply(change).map_err(arena_error)?;
                Ok(Reply::Done)
            }
            Request::Free { ino, range } => self.free(ino, range).map(Reply::Freed),
            Request::Sync { ino } => self.sync(ino).await,
            Request::Flush { resource, range } => match resource.class {
                Class::Data => {
                    self.flush_range(resource, range).await?;
                    Ok(Reply::Flushed { report: None })
                }
                Class::Attr => Ok(Reply::Flushed { report: self.take_report(resource.ino) }),
                _ => Err(Errno::EINVAL),
            },
            Request::Prepare { transaction, updates } => self.prepare(transaction, updates),
            Request::Decide { transaction, commit } => self.decide(transaction, commit),
            Request::SetFileLock { ino, space, lock, wait, token } => {
                self.serve_set_file_lock(from, ino, space, lock, wait, token).await
            }
            Request::GetFileLock { ino, space, lock } => {
                Ok(Reply::FileLock(self.file_locks.borrow().table.get(ino, space, lock)))
            }
            Request::CancelFileLock { token, .. } => self.serve_cancel_file_lock(from, token),
            Request::ReleaseFileLocks { ino, space, owner } => self.serve_release_file_locks(from, ino, space, owner),
            Request::WaitsFor { owner } => {
                let waits = self.file_locks.borrow().table.waits_for(owner);
                // Of a wait, its number is enough: its node is its owner's.
                let owners = waits.into_iter().map(|(token, holder)| (token.number, holder)).take(OWNERS_MAX);
                Ok(Reply::Owners(owners.collect()))
            }
            Request::Statfs => self.space().map(Reply::Space),
            Request::Describe { resource } => Ok(self.describe(resource)),
            Request::DescribeFileLocks { ino } => Ok(Reply::FileLocks(self.list_file_locks(ino))),
        }
    }

    /// Who commits pages has taken them over, though its TAKEN may still be on the way: were it to die now, a hand-back
    /// must not let the old holder write older bytes over these.
    fn note_taken(&self, from: Node, ino: Ino, ranges: &[Range]) {
        let resource = Resource::data(ino, self.slot());
        let mut server = self.lock_server.borrow_mut();
        let taken: Vec<GrantId> = server
            .holders(resource)
            .into_iter()
            .filter(|view| {
                view.incoming && view.slot == from.slot && ranges.iter().any(|range| range.overlaps(view.range))
            })
            .map(|view| view.grant)
            .collect();
        let mut effects = Vec::new();
        for grant in taken {
            let taken = LockMessage::Taken { grant, resource };
            server.handle(from, taken, self.ticks(), &mut effects).expect("this node grants the resource");
        }
        self.server_effects.borrow_mut().extend(effects);
    }

    /// What is held X of the data this server keeps of a file, by the holders that count.
    fn held_exclusively(&self, ino: Ino, counts: impl Fn(&HolderView) -> bool) -> RangeSet {
        let mut held = RangeSet::default();
        for view in self.lock_server.borrow().holders(Resource::data(ino, self.slot())) {
            if view.mode == Mode::X && counts(&view) {
                held.insert(view.range);
            }
        }
        held
    }

    fn allocate(&self, from: Node, ino: Ino, range: Range, ahead: Range, zero: bool) -> Result<Reply> {
        // One request covers at most one chunk; what is asked beyond any file, or without a lock, is a peer's error.
        let held = self.held_exclusively(ino, |view| view.slot == from.slot);
        if !held.contains(range)
            || range.is_empty()
            || range.len() > ALLOCATE_MAX
            || range.hi > u64::MAX / PAGE_SIZE
            || !ahead.contains(range)
            || (zero && ahead != range)
        {
            return Err(Errno::EINVAL);
        }
        // Ahead only within a lock that was not given up meanwhile, and while there is plenty.
        const PLENTY: u64 = 8;
        let pages = self.extents.borrow().pages();
        let plenty = pages.available().saturating_sub(ahead.len()) >= pages.total / PLENTY;
        let ahead = if held.contains(ahead) && ahead.len() <= ALLOCATE_MAX { ahead } else { range };
        let asked = if plenty { ahead } else { range };
        let before =
            self.store.borrow().read(|txn| self.extents.borrow().lookup(txn, ino, range)).map_err(arena_error)?;
        let had: u64 = before.iter().map(|extent| extent.pages).sum();
        let mut extents = self
            .store
            .borrow()
            .read(|txn| {
                let mut table = self.extents.borrow_mut();
                table.allocate(txn, ino, asked, Claim::Free)?;
                table.lookup(txn, ino, if zero { range } else { ahead })
            })
            .map_err(arena_error)?;
        let new = range.len() - had;
        if zero {
            // What was allocated and not committed before belongs to a page somebody has dirty: left to its commit.
            let mut fresh = Vec::new();
            for extent in extents.iter().filter(|extent| !extent.committed) {
                for part in without_all(Range::new(extent.page, extent.page + extent.pages), &before) {
                    self.extents
                        .borrow()
                        .arena()
                        .zero((extent.arena_page + (part.lo - extent.page)) * PAGE_SIZE, part.len() * PAGE_SIZE);
                    fresh.push(part);
                }
            }
            let change = self
                .store
                .borrow_mut()
                .write(|txn| self.extents.borrow_mut().commit(txn, ino, &fresh))
                .map_err(arena_error)?;
            self.extents.borrow_mut().apply(change).map_err(arena_error)?;
            extents =
                self.store.borrow().read(|txn| self.extents.borrow().lookup(txn, ino, range)).map_err(arena_error)?;
        }
        Ok(Reply::Extents { key: self.arena_key, extents, allocated: new })
    }

    /// Frees pages that a node had allocated ahead and has not used. Who holds X no more had them freed with its lock.
    fn take_back(&self, from: Node, ino: Ino, ranges: &[Range]) -> Result<Reply> {
        if ranges.len() > RUNS_MAX {
            return Err(Errno::EINVAL);
        }
        // While a hand-over is under way they may be its successor's already.
        let held = self.held_exclusively(ino, |view| view.slot == from.slot && !view.handing);
        for range in ranges.iter().filter(|range| !range.is_empty() && held.contains(**range)) {
            self.extents.borrow_mut().release_uncommitted(ino, *range).map_err(arena_error)?;
        }
        Ok(Reply::Done)
    }

    /// Has every node give back what it has allocated here ahead; whether there was any to ask for.
    async fn reclaim_spare(self: &Rc<Self>) -> bool {
        let mut holders: Vec<Slot> = {
            let extents = self.extents.borrow();
            let server = self.lock_server.borrow();
            let holders = extents.uncommitted_inodes().flat_map(|ino| server.exclusive_holders(ino));
            holders.map(|(slot, ..)| slot).collect()
        };
        holders.sort_unstable();
        holders.dedup();
        let any = !holders.is_empty();
        let calls = holders.into_iter().map(|slot| -> std::pin::Pin<Box<dyn Future<Output = Result<Reply>>>> {
            let volume = self.clone();
            Box::pin(async move { volume.call(slot, Request::ReturnSpare).await })
        });
        // Who cannot be reached keeps what it has.
        crate::executor::join_all(calls.collect()).await;
        any
    }

    /// Has the lock server handle what makes a node give up locks on data (`release`), then frees what the node had allocated
    /// there and not committed. A RELEASE says that what was dirty is committed; a node that is `gone` may have handed its
    /// pages over, so what anybody holds X on afterwards stays.
    pub(crate) fn freeing_uncommitted<T>(
        &self,
        node: Slot,
        gone: bool,
        inos: &[Ino],
        release: impl FnOnce() -> T,
    ) -> T {
        let inos: Vec<Ino> = inos.iter().copied().filter(|ino| self.extents.borrow().has_uncommitted(*ino)).collect();
        let before: Vec<RangeSet> =
            inos.iter().map(|ino| self.held_exclusively(*ino, |view| view.slot == node)).collect();
        let outcome = release();
        for (ino, before) in inos.into_iter().zip(before) {
            let after = self.held_exclusively(ino, |view| gone || view.slot == node);
            for given_up in before.iter().flat_map(|range| after.missing(range)) {
                if let Err(error) = self.extents.borrow_mut().release_uncommitted(ino, given_up) {
                    tracing::error!(%ino, %error, "pages of a lock that was given up could not be freed");
                }
            }
        }
        outcome
    }

    pub(crate) fn free(&self, ino: Ino, range: Range) -> Result<u64> {
        let full = |error: &verbfs_arena::Error| error.errno() == libc::ENOSPC;
        let change = self
            .store
            .borrow_mut()
            .write_reclaiming(full, |txn| self.extents.borrow_mut().remove(txn, ino, range))
            .map_err(arena_error)?;
        self.extents.borrow_mut().apply(change).map_err(arena_error)
    }

    /// SYNC: all holders write back what they have of this file here, keeping their locks. Hand-overs are
    /// off meanwhile: dirty pages that moved on to a node not asked would escape.
    async fn sync(self: &Rc<Self>, ino: Ino) -> Result<Reply> {
        self.lock_server.borrow_mut().pause_hand_over(ino);
        let outcome = self.sync_holders(ino).await;
        self.lock_server.borrow_mut().resume_hand_over(ino);
        outcome?;
        Ok(Reply::Done)
    }

    async fn sync_holders(self: &Rc<Self>, ino: Ino) -> Result<()> {
        let mut holders = self.lock_server.borrow().exclusive_holders(ino);
        holders.sort_unstable_by_key(|(slot, _, resource, range)| (*slot, *resource, *range));
        // One request for each holder and resource: the hull is enough, clean pages cost nothing.
        let mut asked: Vec<(Slot, Resource, Range)> = Vec::new();
        for (slot, _, resource, range) in holders {
            match asked.last_mut() {
                Some((last_slot, last, hull)) if *last_slot == slot && *last == resource => *hull = hull.hull(range),
                _ => asked.push((slot, resource, range)),
            }
        }
        let calls =
            asked.into_iter().map(|(slot, resource, range)| -> std::pin::Pin<Box<dyn Future<Output = Result<()>>>> {
                let volume = self.clone();
                Box::pin(async move {
                    match volume.call(slot, Request::Flush { resource, range }).await? {
                        Reply::Flushed { report } => {
                            if let Some(report) = report.filter(plausible::report)
                                && resource.class == Class::Attr
                            {
                                volume.apply_report(resource.ino, report);
                            }
                            Ok(())
                        }
                        _ => Err(Errno::EPROTO),
                    }
                })
            });
        let mut outcome = Ok(());
        for result in crate::executor::join_all(calls.collect()).await {
            outcome = outcome.and(result);
        }
        outcome
    }

    /// Space and inodes of this node.
    fn space(&self) -> Result<Space> {
        let pages = self.extents.borrow().pages();
        let store = self.store.borrow();
        let usage = store.usage();
        let inodes = store.inode_count().map_err(store_error)?;
        // An inode with its entry takes about so much of the store.
        const BYTES_PER_INODE: u64 = 512;
        let free_inodes = usage.limit.saturating_sub(usage.high_water) / BYTES_PER_INODE;
        Ok(Space { pages: pages.total, free_pages: pages.available(), inodes: inodes + free_inodes, free_inodes })
    }

    pub(crate) fn describe(&self, resource: Resource) -> Reply {
        let server = self.lock_server.borrow();
        let holders = server.holders(resource).into_iter().take(HOLDERS_MAX).map(|view| {
            let state = match (view.revoking, view.handing, view.incoming) {
                (_, true, _) => "handing over",
                (true, _, _) => "revoking",
                (_, _, true) => "incoming",
                _ => "granted",
            };
            Holder { slot: view.slot, range: view.range, mode: view.mode, state: state.to_string() }
        });
        let waiters = server.waiters(resource).into_iter().take(HOLDERS_MAX).map(|view| Holder {
            slot: view.request.node.slot,
            range: view.need,
            mode: view.mode,
            state: format!("waiting for {} ms", self.ticks().saturating_sub(view.since)),
        });
        Reply::Holders { holders: holders.collect(), waiters: waiters.collect() }
    }
}

/// What of `range` no extent covers.
fn without_all(range: Range, extents: &[Extent]) -> Vec<Range> {
    let mut rest = vec![range];
    for extent in extents {
        let covered = Range::new(extent.page, extent.page + extent.pages);
        rest = rest.into_iter().flat_map(|piece| piece.without(covered).collect::<Vec<_>>()).collect();
    }
    rest
}
