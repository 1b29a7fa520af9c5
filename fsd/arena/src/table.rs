//! Which pages of the arena hold which pages of which file.
//!
//! Committed extents live in the store, and nowhere else; uncommitted ones live here, in memory, and nowhere else. A
//! daemon that dies forgets them, and their pages are free again.
//!
//! Order of changes: a page of the arena is freed, or an extent stops being uncommitted, only once the
//! transaction that says so has committed. So [`ExtentTable::commit`] and [`ExtentTable::remove`] change the store within the caller's
//! transaction and return a [`Change`], to be [applied](ExtentTable::apply) after the commit or dropped with the aborted transaction.
//!
//! Invariant: every allocated page of the arena belongs to exactly one extent, committed or not, of one
//! file page. In a debug build [`ExtentTable::check`] proves it.

use crate::{Arena, Claim, Error, Pages};
use std::collections::{BTreeMap, HashMap};
use verbfs_namespace::{Access, Run, Store, Transaction, WriteTransaction};
use verbfs_protocol::{Extent, Ino, Range};

/// The extents of all files stored on this node.
pub struct ExtentTable {
    arena: Arena,
    /// Per inode, never empty: first page of the file -> run.
    uncommitted: HashMap<Ino, BTreeMap<u64, Run>>,
    /// What the write transaction with this id has done, to refuse committing and removing the same pages in one.
    changing: (u64, Vec<(Ino, Range, Kind)>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Commit,
    Remove,
}

/// What follows from a committed transaction. Apply it then, before anything else is done with the table; drop it if the transaction aborts.
#[must_use = "apply it once the transaction has committed"]
#[derive(Debug)]
pub struct Change {
    kind: Kind,
    ino: Ino,
    /// Runs that stop being uncommitted.
    settled: Vec<Run>,
    /// Committed runs whose pages become free.
    freed: Vec<Run>,
}

impl Change {
    /// Pages that applying this will free.
    pub fn pages_freed(&self) -> u64 {
        let settled = if self.kind == Kind::Remove { self.settled.as_slice() } else { &[] };
        settled.iter().chain(&self.freed).map(|run| run.pages).sum()
    }
}

impl ExtentTable {
    /// Builds the free map from the extents of `store`.
    ///
    /// # Errors
    /// [`Error::Overlap`], [`Error::OutOfRange`], [`Error::Lost`], [`Error::Store`].
    pub fn load(store: &Store, mut arena: Arena) -> Result<ExtentTable, Error> {
        let mut extents: Vec<(Ino, Run)> = Vec::new();
        store.read(|txn| {
            let mut last: Option<(Ino, Run)> = None;
            txn.for_each_extent(|ino, run| {
                if run.arena_page + run.pages > arena.total_pages() {
                    return Err(Error::OutOfRange { ino, run, arena_pages: arena.total_pages() });
                }
                // By inode and page: only neighbours can overlap in the file.
                if let Some(before) = last
                    && before.0 == ino
                    && before.1.range().overlaps(run.range())
                {
                    return Err(Error::Overlap { first: before, second: (ino, run) });
                }
                last = Some((ino, run));
                extents.push((ino, run));
                Ok(())
            })
        })?;
        if arena.is_new() && !extents.is_empty() {
            return Err(Error::Lost { extents: extents.len() as u64 });
        }
        extents.sort_unstable_by_key(|(_, run)| run.arena_page);
        for pair in extents.windows(2) {
            if arena_range(pair[0].1).overlaps(arena_range(pair[1].1)) {
                return Err(Error::Overlap { first: pair[0], second: pair[1] });
            }
        }
        let allocated = extents.iter().map(|(_, run)| arena_range(*run));
        arena.allocator = crate::Allocator::with_allocated(arena.total_pages(), allocated);
        Ok(ExtentTable { arena, uncommitted: HashMap::new(), changing: (0, Vec::new()) })
    }

    pub fn arena(&self) -> &Arena {
        &self.arena
    }

    pub fn pages(&self) -> Pages {
        self.arena.allocator.pages()
    }

    /// Promises pages to a writer before it may dirty its cache, so that ENOSPC reaches the writer.
    pub fn reserve(&mut self, pages: u64) -> Result<(), Error> {
        self.arena.allocator.reserve(pages)
    }

    /// Takes back a promise.
    pub fn unreserve(&mut self, pages: u64) {
        self.arena.allocator.unreserve(pages)
    }

    /// The extents within `range`, cut to it, by page; pages without one are missing.
    pub fn lookup<A: Access>(&self, txn: &Transaction<'_, A>, ino: Ino, range: Range) -> Result<Vec<Extent>, Error> {
        let committed = txn.extents(ino, range)?;
        let mut extents: Vec<Extent> = committed.into_iter().map(|run| extent(run, true)).collect();
        let before = extents.len();
        extents.extend(self.uncommitted_in(ino, range).map(|run| extent(run, false)));
        if before > 0 && extents.len() > before {
            extents.sort_unstable_by_key(|extent| extent.page);
        }
        debug_assert!(
            extents.windows(2).all(|pair| pair[0].page + pair[0].pages <= pair[1].page),
            "committed and uncommitted overlap"
        );
        Ok(extents)
    }

    /// The extents of all of `range`: those that exist, and new uncommitted ones for the pages that have none. Doing it twice
    /// gives the same extents. All or nothing.
    ///
    /// # Errors
    /// [`Error::NoSpace`]; [`Error::InvalidRange`] if it is empty.
    pub fn allocate<A: Access>(
        &mut self,
        txn: &Transaction<'_, A>,
        ino: Ino,
        range: Range,
        claim: Claim,
    ) -> Result<Vec<Extent>, Error> {
        if range.is_empty() {
            return Err(Error::InvalidRange(range));
        }
        let mut extents = self.lookup(txn, ino, range)?;
        let holes = holes(range, &extents);
        let missing: u64 = holes.iter().map(|hole| hole.len()).sum();
        if missing == 0 {
            return Ok(extents);
        }
        let near = self.end_before(txn, ino, holes[0].lo)?;
        let taken = self.arena.allocator.allocate(missing, near, claim)?;

        let mut taken = taken.into_iter();
        let mut piece = Range::new(0, 0);
        for hole in holes {
            let mut page = hole.lo;
            while page < hole.hi {
                if piece.is_empty() {
                    piece = taken.next().expect("as many pages were allocated as are missing");
                }
                let pages = piece.len().min(hole.hi - page);
                let run = Run { page, arena_page: piece.lo, pages };
                self.insert_uncommitted(ino, run);
                extents.push(extent(run, false));
                page += pages;
                piece.lo += pages;
            }
        }
        extents.sort_unstable_by_key(|extent| extent.page);
        Ok(extents)
    }

    /// The page of the arena behind the one that holds the page before `page`: where the file would best go on.
    fn end_before<A: Access>(&self, txn: &Transaction<'_, A>, ino: Ino, page: u64) -> Result<Option<u64>, Error> {
        let Some(before) = page.checked_sub(1) else { return Ok(None) };
        let last = self.lookup(txn, ino, Range::new(before, page))?;
        Ok(last.first().map(|extent| extent.arena_page + extent.pages))
    }

    /// Commits the uncommitted extents within `ranges` in `txn`; what is committed already stays so.
    ///
    /// # Errors
    /// [`Error::NotAllocated`] for pages without an extent, [`Error::Twice`], [`Error::Store`]. Abort the transaction after any.
    pub fn commit(&mut self, txn: &mut WriteTransaction<'_>, ino: Ino, ranges: &[Range]) -> Result<Change, Error> {
        let mut change = Change { kind: Kind::Commit, ino, settled: Vec::new(), freed: Vec::new() };
        for &range in ranges {
            self.note(txn, ino, range, Kind::Commit)?;
            let committed: Vec<Range> = txn.extents(ino, range)?.into_iter().map(Run::range).collect();
            let mut covered = committed.clone();
            for run in self.uncommitted_in(ino, range) {
                covered.push(run.range());
                // A range named twice was committed by this very transaction the first time.
                for piece in without_all(run.range(), &committed) {
                    txn.insert_extent(ino, run.clip(piece))?;
                }
                change.settled.push(run);
            }
            covered.sort_unstable_by_key(|range| range.lo);
            if let Some(&hole) = without_all(range, &covered).first() {
                return Err(Error::NotAllocated { ino, range: hole });
            }
        }
        Ok(change)
    }

    /// Removes all extents within `range` (truncate, punch; [`Range::ALL`] for the whole file). Their pages are free once the change is applied.
    ///
    /// # Errors
    /// [`Error::Twice`], [`Error::Store`]. Abort the transaction after any.
    pub fn remove(&mut self, txn: &mut WriteTransaction<'_>, ino: Ino, range: Range) -> Result<Change, Error> {
        self.note(txn, ino, range, Kind::Remove)?;
        let freed = txn.remove_extents(ino, range)?;
        Ok(Change { kind: Kind::Remove, ino, settled: self.uncommitted_in(ino, range).collect(), freed })
    }

    /// Does in memory what a committed transaction did in the store. Returns the pages freed.
    ///
    /// # Errors
    /// [`Error::NotInUse`] if the table and the store disagree about a page (it stays as it is): a bug, or damage.
    pub fn apply(&mut self, change: Change) -> Result<u64, Error> {
        let mut freed = 0;
        for run in change.settled {
            // Applying two removals of overlapping ranges: the first has taken it out.
            for gone in self.take_uncommitted(change.ino, run.range()) {
                if change.kind == Kind::Remove {
                    self.arena.allocator.free(arena_range(gone))?;
                    freed += gone.pages;
                }
            }
        }
        for run in change.freed {
            self.arena.allocator.free(arena_range(run))?;
            freed += run.pages;
        }
        Ok(freed)
    }

    /// Frees the uncommitted extents within `range`: their writer failed or gave up. Returns the pages freed.
    ///
    /// # Errors
    /// [`Error::NotInUse`] as for [`ExtentTable::apply`].
    pub fn release_uncommitted(&mut self, ino: Ino, range: Range) -> Result<u64, Error> {
        let mut freed = 0;
        for run in self.take_uncommitted(ino, range) {
            self.arena.allocator.free(arena_range(run))?;
            freed += run.pages;
        }
        Ok(freed)
    }

    /// The inodes that have uncommitted extents, in no order.
    pub fn uncommitted_inodes(&self) -> impl Iterator<Item = Ino> {
        self.uncommitted.keys().copied()
    }

    /// Whether an inode has uncommitted extents.
    pub fn has_uncommitted(&self, ino: Ino) -> bool {
        self.uncommitted.contains_key(&ino)
    }

    /// Uncommitted pages of all files.
    pub fn uncommitted_pages(&self) -> u64 {
        self.uncommitted.values().flat_map(BTreeMap::values).map(|run| run.pages).sum()
    }

    fn note(&mut self, txn: &WriteTransaction<'_>, ino: Ino, range: Range, kind: Kind) -> Result<(), Error> {
        let (id, noted) = &mut self.changing;
        if *id != txn.id() {
            *id = txn.id();
            noted.clear();
        }
        if let Some((_, other, _)) =
            noted.iter().find(|(of, other, did)| *of == ino && *did != kind && other.overlaps(range))
        {
            return Err(Error::Twice { ino, range: other.intersect(range) });
        }
        noted.push((ino, range, kind));
        Ok(())
    }

    fn uncommitted_in(&self, ino: Ino, range: Range) -> impl Iterator<Item = Run> {
        let runs = self.uncommitted.get(&ino).filter(|_| !range.is_empty());
        runs.into_iter().flat_map(move |runs| {
            let before =
                runs.range(..range.lo).next_back().map(|(_, run)| *run).filter(|run| run.range().overlaps(range));
            before
                .into_iter()
                .chain(runs.range(range.lo..range.hi).map(|(_, run)| *run))
                .map(move |run| run.clip(range))
        })
    }

    fn insert_uncommitted(&mut self, ino: Ino, mut run: Run) {
        let runs = self.uncommitted.entry(ino).or_default();
        if let Some((_, before)) = runs.range_mut(..run.page).next_back()
            && before.continues_with(run)
        {
            before.pages += run.pages;
            run = *before;
        }
        let end = run.page + run.pages;
        if let Some(&after) = runs.get(&end)
            && run.continues_with(after)
        {
            runs.remove(&end);
            run.pages += after.pages;
        }
        runs.insert(run.page, run);
    }

    /// Takes out what is uncommitted within `range`.
    fn take_uncommitted(&mut self, ino: Ino, range: Range) -> Vec<Run> {
        let taken: Vec<Run> = self.uncommitted_in(ino, range).collect();
        let Some(runs) = self.uncommitted.get_mut(&ino) else { return taken };
        for run in &taken {
            let (&start, &whole) = runs.range(..=run.page).next_back().expect("a part of a run that is there");
            runs.remove(&start);
            for rest in whole.range().without(run.range()) {
                runs.insert(rest.lo, whole.clip(rest));
            }
        }
        if runs.is_empty() {
            self.uncommitted.remove(&ino);
        }
        taken
    }

    /// Proves the invariant of this module: for tests and debug builds, takes time in proportion to all extents.
    ///
    /// # Panics
    /// If it does not hold.
    pub fn check<A: Access>(&self, txn: &Transaction<'_, A>) {
        let mut used: Vec<Range> =
            self.uncommitted.values().flat_map(BTreeMap::values).map(|run| arena_range(*run)).collect();
        txn.for_each_extent::<Error>(|_, run| {
            used.push(arena_range(run));
            Ok(())
        })
        .expect("extents can be read");
        used.extend(self.arena.allocator.free_runs());
        used.sort_unstable_by_key(|range| range.lo);
        let mut end = 0;
        for range in used {
            assert_eq!(range.lo, end, "a page that is used twice or lost");
            end = range.hi;
        }
        assert_eq!(end, self.arena.total_pages(), "lost pages");
    }
}

fn extent(run: Run, committed: bool) -> Extent {
    Extent { page: run.page, arena_page: run.arena_page, pages: run.pages, committed }
}

fn arena_range(run: Run) -> Range {
    Range::new(run.arena_page, run.arena_page + run.pages)
}

/// The parts of `range` no extent covers. The extents are sorted and disjoint.
fn holes(range: Range, extents: &[Extent]) -> Vec<Range> {
    let covered: Vec<Range> =
        extents.iter().map(|extent| Range::new(extent.page, extent.page + extent.pages)).collect();
    without_all(range, &covered)
}

/// What is left of `range` without `others`, which are sorted by start.
fn without_all(range: Range, others: &[Range]) -> Vec<Range> {
    let mut rest = Vec::new();
    let mut start = range.lo;
    for other in others {
        if start < other.lo.min(range.hi) {
            rest.push(Range::new(start, other.lo.min(range.hi)));
        }
        start = start.max(other.hi);
    }
    if start < range.hi {
        rest.push(Range::new(start, range.hi));
    }
    rest
}
