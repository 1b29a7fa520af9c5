//! A map from disjoint ranges to values, the book-keeping both machines share.
//!
//! Invariant: ranges are non-empty and disjoint. All look-ups cost O(log n) plus what they return.

use std::collections::BTreeMap;
use verbfs_protocol::Range;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct RangeMap<T> {
    map: BTreeMap<u64, (u64, T)>,
}

impl<T> Default for RangeMap<T> {
    fn default() -> Self {
        RangeMap { map: BTreeMap::new() }
    }
}

impl<T: Clone> RangeMap<T> {
    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }
    pub fn len(&self) -> usize {
        self.map.len()
    }
    pub fn iter(&self) -> impl Iterator<Item = (Range, &T)> {
        self.map.iter().map(|(&lo, (hi, value))| (Range::new(lo, *hi), value))
    }
    /// First key of the entry that may reach into `at`.
    fn start(&self, at: u64) -> u64 {
        match self.map.range(..at).next_back() {
            Some((&lo, &(hi, _))) if hi > at => lo,
            _ => at,
        }
    }
    pub fn overlapping(&self, range: Range) -> impl DoubleEndedIterator<Item = (Range, &T)> {
        let start = if range.is_empty() { range.hi } else { self.start(range.lo) };
        self.map.range(start..range.hi.max(start)).map(|(&lo, (hi, value))| (Range::new(lo, *hi), value))
    }
    pub fn overlapping_mut(&mut self, range: Range) -> impl Iterator<Item = (Range, &mut T)> {
        let start = if range.is_empty() { range.hi } else { self.start(range.lo) };
        self.map.range_mut(start..range.hi.max(start)).map(|(&lo, (hi, value))| (Range::new(lo, *hi), value))
    }
    /// Nearest first, below `at`, among entries that end at or below `at`.
    pub fn below(&self, at: u64) -> impl Iterator<Item = (Range, &T)> {
        self.map
            .range(..at)
            .rev()
            .map(|(&lo, (hi, value))| (Range::new(lo, *hi), value))
            .filter(move |(range, _)| range.hi <= at)
    }
    /// Nearest first, from `at` on.
    pub fn above(&self, at: u64) -> impl Iterator<Item = (Range, &T)> {
        self.map.range(at..).map(|(&lo, (hi, value))| (Range::new(lo, *hi), value))
    }
    fn split(&mut self, at: u64) {
        if let Some((_, (hi, value))) = self.map.range_mut(..at).next_back()
            && *hi > at
        {
            let upper = (*hi, value.clone());
            *hi = at;
            self.map.insert(at, upper);
        }
    }
    /// Makes `range` begin and end at entry boundaries.
    pub fn isolate(&mut self, range: Range) {
        self.split(range.lo);
        self.split(range.hi);
    }
    /// Removes and returns all within `range`, splitting at its ends.
    pub fn take(&mut self, range: Range) -> Vec<(Range, T)> {
        self.isolate(range);
        let keys: Vec<u64> = self.map.range(range.lo..range.hi).map(|(&lo, _)| lo).collect();
        keys.into_iter()
            .map(|lo| {
                let (hi, value) = self.map.remove(&lo).expect("just seen");
                (Range::new(lo, hi), value)
            })
            .collect()
    }
    pub fn insert(&mut self, range: Range, value: T) {
        debug_assert!(!range.is_empty());
        debug_assert!(self.overlapping(range).next().is_none(), "ranges stay disjoint");
        self.map.insert(range.lo, (range.hi, value));
    }
    /// The parts of `range` no entry covers.
    pub fn gaps(&self, range: Range) -> Vec<Range> {
        let mut gaps = Vec::new();
        let mut at = range.lo;
        for (held, _) in self.overlapping(range) {
            if held.lo > at {
                gaps.push(Range::new(at, held.lo));
            }
            at = held.hi;
        }
        if at < range.hi {
            gaps.push(Range::new(at, range.hi));
        }
        gaps
    }
    /// Joins neighbours in and next to `range` which `same` says are alike.
    pub fn merge(&mut self, range: Range, same: impl Fn(&T, &T) -> bool) {
        let from = self.map.range(..range.lo).next_back().map_or(range.lo, |(&lo, _)| lo);
        let mut at = from;
        while let Some((&lo, (hi, value))) = self.map.range(at..).next() {
            if lo > range.hi {
                break;
            }
            let (hi, alike) = (*hi, self.map.get(hi).is_some_and(|(_, next)| same(value, next)));
            if alike {
                let (end, _) = self.map.remove(&hi).expect("just seen");
                self.map.get_mut(&lo).expect("just seen").0 = end;
                at = lo;
            } else {
                at = hi;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_merges_and_finds_gaps() {
        let mut map = RangeMap::default();
        map.insert(Range::new(0, 10), 'a');
        map.insert(Range::new(20, 30), 'b');
        assert_eq!(map.gaps(Range::new(5, 35)), [Range::new(10, 20), Range::new(30, 35)]);
        assert_eq!(map.take(Range::new(5, 25)), [(Range::new(5, 10), 'a'), (Range::new(20, 25), 'b')]);
        map.insert(Range::new(5, 25), 'b');
        map.merge(Range::new(5, 25), |a, b| a == b);
        assert_eq!(
            map.iter().map(|(range, &value)| (range, value)).collect::<Vec<_>>(),
            [(Range::new(0, 5), 'a'), (Range::new(5, 30), 'b')]
        );
        assert_eq!(map.overlapping(Range::new(4, 5)).count(), 1);
        assert_eq!(map.overlapping(Range::new(4, 6)).count(), 2);
        assert_eq!(map.below(5).count(), 1);
        assert_eq!(map.above(5).count(), 1);
    }

    proptest::proptest! {
        /// Against a plain array.
        #[test]
        fn like_an_array(steps in proptest::collection::vec((0u64..32, 1u64..12, 0u8..3), 1..40)) {
            let mut map: RangeMap<u8> = RangeMap::default();
            let mut array = [None; 48];
            for (lo, len, value) in steps {
                let range = Range::new(lo, lo + len);
                map.take(range);
                for slot in &mut array[lo as usize..(lo + len) as usize] { *slot = None; }
                if value > 0 {
                    map.insert(range, value);
                    map.merge(range, |a, b| a == b);
                    for slot in &mut array[lo as usize..(lo + len) as usize] { *slot = Some(value); }
                }
                for (at, want) in array.iter().enumerate() {
                    let found = map.overlapping(Range::new(at as u64, at as u64 + 1)).map(|(_, &value)| value).next();
                    assert_eq!(found, *want);
                }
                let runs = array.iter().enumerate().filter(|&(at, value)| value.is_some() && (at == 0 || array[at - 1] != *value)).count();
                assert!(map.len() >= runs);
            }
        }
    }
}
