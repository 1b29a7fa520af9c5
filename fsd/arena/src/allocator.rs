//! The free pages of an arena.
//!
//! Invariants: free runs do not touch or overlap (neighbours are merged); `by_length` holds the same runs;
//! `reserved <= free`.

use crate::Error;
use std::collections::{BTreeMap, BTreeSet};
use verbfs_protocol::Range;

/// Where the pages of an allocation are accounted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// From what is free and not reserved.
    Free,
    /// From what was reserved before: the reservation shrinks by the pages allocated.
    Reserved,
}

/// How the pages of an arena are used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pages {
    pub total: u64,
    /// Not allocated, reserved ones included.
    pub free: u64,
    /// Promised to writers, not yet allocated.
    pub reserved: u64,
}

impl Pages {
    /// Pages that can still be promised or allocated.
    pub fn available(self) -> u64 {
        self.free - self.reserved
    }
    pub fn allocated(self) -> u64 {
        self.total - self.free
    }
}

/// Which pages of an arena are free.
#[derive(Debug)]
pub struct Allocator {
    /// First page -> one beyond the last.
    free: BTreeMap<u64, u64>,
    /// (length, first page)
    by_length: BTreeSet<(u64, u64)>,
    pages: Pages,
}

impl Allocator {
    /// All of `total` pages are free.
    pub fn new(total: u64) -> Allocator {
        Allocator::with_allocated(total, std::iter::empty())
    }

    /// All pages but those of `allocated` are free. These must be sorted, disjoint and below `total`.
    pub(crate) fn with_allocated(total: u64, allocated: impl Iterator<Item = Range>) -> Allocator {
        let mut allocator = Allocator {
            free: BTreeMap::new(),
            by_length: BTreeSet::new(),
            pages: Pages { total, free: 0, reserved: 0 },
        };
        let mut end = 0;
        for range in allocated.chain([Range::new(total, total)]) {
            debug_assert!(end <= range.lo && range.hi <= total);
            if end < range.lo {
                allocator.insert(end, range.lo);
                allocator.pages.free += range.lo - end;
            }
            end = range.hi;
        }
        allocator
    }

    pub fn pages(&self) -> Pages {
        self.pages
    }

    /// Promises `count` pages to somebody who will allocate them with [`Claim::Reserved`] or give them back.
    pub fn reserve(&mut self, count: u64) -> Result<(), Error> {
        if count > self.pages.available() {
            return Err(Error::NoSpace { wanted: count, available: self.pages.available() });
        }
        self.pages.reserved += count;
        Ok(())
    }

    /// Takes back a promise. Giving back more than is reserved gives back all.
    pub fn unreserve(&mut self, count: u64) {
        debug_assert!(count <= self.pages.reserved, "{count} pages given back, {} reserved", self.pages.reserved);
        self.pages.reserved = self.pages.reserved.saturating_sub(count);
    }

    /// Allocates `count` pages as few ranges: behind `near` if that is free, else the smallest free run that holds all, else
    /// the largest ones. All or nothing.
    pub fn allocate(&mut self, count: u64, near: Option<u64>, claim: Claim) -> Result<Vec<Range>, Error> {
        let available = match claim {
            Claim::Free => self.pages.available(),
            Claim::Reserved => self.pages.reserved,
        };
        if count > available {
            return Err(Error::NoSpace { wanted: count, available });
        }
        let mut ranges = Vec::new();
        let mut left = count;
        if let Some(near) = near
            && left > 0
            && let Some(&end) = self.free.get(&near)
        {
            let taken = Range::new(near, near + left.min(end - near));
            self.take(near, end, taken);
            ranges.push(taken);
            left -= taken.len();
        }
        while left > 0 {
            let &(length, start) = self
                .by_length
                .range((left, 0)..)
                .next()
                .or_else(|| self.by_length.last())
                .expect("count pages are free");
            let taken = Range::new(start, start + left.min(length));
            self.take(start, start + length, taken);
            ranges.push(taken);
            left -= taken.len();
        }
        self.pages.free -= count;
        if claim == Claim::Reserved {
            self.pages.reserved -= count;
        }
        Ok(ranges)
    }

    /// Frees allocated pages.
    ///
    /// # Errors
    /// [`Error::NotInUse`] if any of them is free or no page of the arena; nothing is freed then.
    pub fn free(&mut self, range: Range) -> Result<(), Error> {
        if range.is_empty() || range.hi > self.pages.total || self.is_partly_free(range) {
            return Err(Error::NotInUse(range));
        }
        let mut merged = range;
        if let Some((&start, &end)) = self.free.range(..range.lo).next_back()
            && end == range.lo
        {
            self.delete(start, end);
            merged.lo = start;
        }
        if let Some(&end) = self.free.get(&range.hi) {
            self.delete(range.hi, end);
            merged.hi = end;
        }
        self.insert(merged.lo, merged.hi);
        self.pages.free += range.len();
        Ok(())
    }

    fn is_partly_free(&self, range: Range) -> bool {
        self.free.range(..range.hi).next_back().is_some_and(|(_, &end)| end > range.lo)
    }

    /// The free runs, by page.
    pub fn free_runs(&self) -> impl Iterator<Item = Range> {
        self.free.iter().map(|(&start, &end)| Range::new(start, end))
    }

    fn take(&mut self, start: u64, end: u64, taken: Range) {
        self.delete(start, end);
        for rest in Range::new(start, end).without(taken) {
            self.insert(rest.lo, rest.hi);
        }
    }

    fn insert(&mut self, start: u64, end: u64) {
        self.free.insert(start, end);
        self.by_length.insert((end - start, start));
    }

    fn delete(&mut self, start: u64, end: u64) {
        self.free.remove(&start);
        self.by_length.remove(&(end - start, start));
    }
}
