//! Committed page runs of the files whose pages this node stores.
//!
//! Invariant: the runs of one inode do not overlap. Neighbours that continue each other both in the file and in the
//! arena are one run.

use crate::Error;
use crate::record::{decode_extent, encode_extent, pair_key};
use crate::store::{Access, Transaction, Writing};
use std::ops::Bound;
use verbfs_protocol::{Ino, Range};
use zerocopy::IntoBytes;

/// Consecutive pages of a file that lie consecutively in the arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Run {
    /// First page of the file.
    pub page: u64,
    /// First page of the arena.
    pub arena_page: u64,
    /// At least 1.
    pub pages: u64,
}

impl Run {
    /// Not empty, and both ends are page numbers.
    pub fn is_valid(self) -> bool {
        self.pages > 0
            && self.page.checked_add(self.pages).is_some()
            && self.arena_page.checked_add(self.pages).is_some()
    }

    /// The pages of the file.
    pub fn range(self) -> Range {
        Range::new(self.page, self.page + self.pages)
    }

    /// The part within `range`, which must overlap the run.
    pub fn clip(self, range: Range) -> Run {
        let part = self.range().intersect(range);
        debug_assert!(!part.is_empty());
        Run { page: part.lo, arena_page: self.arena_page + (part.lo - self.page), pages: part.len() }
    }

    /// Whether `next` goes on where this one ends, in the file and in the arena.
    pub fn continues_with(self, next: Run) -> bool {
        self.page + self.pages == next.page && self.arena_page + self.pages == next.arena_page
    }
}

impl<A: Access> Transaction<'_, A> {
    /// The committed runs within `range`, cut to it, by page.
    pub fn extents(&self, ino: Ino, range: Range) -> Result<Vec<Run>, Error> {
        let mut runs = self.whole_extents(ino, range)?;
        for run in &mut runs {
            *run = run.clip(range);
        }
        Ok(runs)
    }

    /// The stored runs that overlap `range`, uncut.
    fn whole_extents(&self, ino: Ino, range: Range) -> Result<Vec<Run>, Error> {
        let mut runs: Vec<Run> = Vec::new();
        if range.is_empty() {
            return Ok(runs);
        }
        let view = self.access.view();
        if let Some((key, bytes)) = self.tables.extents.get_lower_than(view, &pair_key(ino, range.lo))? {
            let (owner, run) = decode_extent(key, bytes)?;
            if owner == ino && run.range().overlaps(range) {
                runs.push(run);
            }
        }
        let (first, end) = (pair_key(ino, range.lo), pair_key(ino, range.hi));
        for item in self.tables.extents.range(view, &(Bound::Included(&first[..]), Bound::Excluded(&end[..])))? {
            let (key, bytes) = item?;
            runs.push(decode_extent(key, bytes)?.1);
        }
        Ok(runs)
    }

    /// Calls `each` with every run of every inode, by inode and page, until it returns an error.
    pub fn for_each_extent<E: From<Error>>(&self, mut each: impl FnMut(Ino, Run) -> Result<(), E>) -> Result<(), E> {
        for item in self.tables.extents.iter(self.access.view()).map_err(Error::from)? {
            let (key, bytes) = item.map_err(Error::from)?;
            let (ino, run) = decode_extent(key, bytes)?;
            each(ino, run)?;
        }
        Ok(())
    }
}

impl Transaction<'_, Writing<'_>> {
    /// Makes `run` what its pages of the file are; returns what they were before, cut to them.
    ///
    /// # Errors
    /// [`Error::InvalidRun`].
    pub fn insert_extent(&mut self, ino: Ino, run: Run) -> Result<Vec<Run>, Error> {
        if !run.is_valid() {
            return Err(Error::InvalidRun);
        }
        let replaced = self.remove_extents(ino, run.range())?;
        let mut merged = run;
        // Only a run that ends where this one begins, or begins where it ends, can continue it.
        if run.page > 0
            && let Some(&before) = self.whole_extents(ino, Range::new(run.page - 1, run.page))?.first()
            && before.continues_with(merged)
        {
            merged = Run { pages: before.pages + merged.pages, ..before };
        }
        let end = run.page + run.pages;
        if let Some(&after) = self.whole_extents(ino, Range::new(end, end.saturating_add(1)))?.first()
            && merged.continues_with(after)
        {
            self.delete_run(ino, after)?;
            merged.pages += after.pages;
        }
        self.put_run(ino, merged)?;
        Ok(replaced)
    }

    /// Forgets the runs within `range`; returns them, cut to it.
    pub fn remove_extents(&mut self, ino: Ino, range: Range) -> Result<Vec<Run>, Error> {
        let mut runs = self.whole_extents(ino, range)?;
        for run in &mut runs {
            self.delete_run(ino, *run)?;
            for rest in run.range().without(range) {
                self.put_run(ino, run.clip(rest))?;
            }
            *run = run.clip(range);
        }
        Ok(runs)
    }

    fn put_run(&mut self, ino: Ino, run: Run) -> Result<(), Error> {
        Ok(self.tables.extents.put(&mut self.access.txn, &pair_key(ino, run.page), encode_extent(run).as_bytes())?)
    }

    fn delete_run(&mut self, ino: Ino, run: Run) -> Result<(), Error> {
        self.tables.extents.delete(&mut self.access.txn, &pair_key(ino, run.page))?;
        Ok(())
    }
}
