//! A set of numbers as disjoint half-open ranges.

use std::collections::BTreeMap;
use verbfs_protocol::Range;

#[derive(Clone, Debug, Default)]
pub struct RangeSet(BTreeMap<u64, u64>);

impl RangeSet {
    pub fn insert(&mut self, range: Range) {
        if range.is_empty() {
            return;
        }
        let Range { mut lo, mut hi } = range;
        let touching: Vec<(u64, u64)> =
            self.0.range(..=hi).rev().take_while(|(_, end)| **end >= lo).map(|(a, b)| (*a, *b)).collect();
        for (start, end) in touching {
            self.0.remove(&start);
            lo = lo.min(start);
            hi = hi.max(end);
        }
        self.0.insert(lo, hi);
    }

    pub fn remove(&mut self, range: Range) {
        if range.is_empty() {
            return;
        }
        let touching: Vec<Range> = self
            .0
            .range(..range.hi)
            .rev()
            .take_while(|(_, end)| **end > range.lo)
            .map(|(a, b)| Range::new(*a, *b))
            .collect();
        for piece in touching {
            self.0.remove(&piece.lo);
            for rest in piece.without(range) {
                self.0.insert(rest.lo, rest.hi);
            }
        }
    }

    pub fn contains(&self, range: Range) -> bool {
        range.is_empty() || self.0.range(..=range.lo).next_back().is_some_and(|(_, end)| *end >= range.hi)
    }

    /// What of `range` is not in the set, ascending.
    pub fn missing(&self, range: Range) -> Vec<Range> {
        let mut missing = Vec::new();
        let mut lo = range.lo;
        if let Some((_, end)) = self.0.range(..=range.lo).next_back() {
            lo = lo.max(*end);
        }
        for (start, end) in self.0.range(range.lo..range.hi) {
            if *start > lo {
                missing.push(Range::new(lo, *start));
            }
            lo = lo.max(*end);
        }
        if lo < range.hi {
            missing.push(Range::new(lo, range.hi));
        }
        missing
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn iter(&self) -> impl Iterator<Item = Range> + '_ {
        self.0.iter().map(|(lo, hi)| Range::new(*lo, *hi))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Against a plain set of numbers.
        #[test]
        fn behaves_as_a_set(steps in proptest::collection::vec((any::<bool>(), 0u64..40, 0u64..12), 1..60)) {
            let mut ranges = RangeSet::default();
            let mut model = std::collections::BTreeSet::new();
            for (insert, lo, length) in steps {
                let range = Range::new(lo, lo + length);
                if insert {
                    ranges.insert(range);
                    model.extend(lo..lo + length);
                } else {
                    ranges.remove(range);
                    for number in lo..lo + length {
                        model.remove(&number);
                    }
                }
                let listed: std::collections::BTreeSet<u64> = ranges.iter().flat_map(|range| range.lo..range.hi).collect();
                prop_assert_eq!(&listed, &model);
                let missing: Vec<u64> = ranges.missing(Range::new(5, 45)).into_iter().flat_map(|range| range.lo..range.hi).collect();
                prop_assert_eq!(missing, (5..45).filter(|number| !model.contains(number)).collect::<Vec<_>>());
                for range in [Range::new(3, 9), Range::new(0, 1)] {
                    prop_assert_eq!(ranges.contains(range), (range.lo..range.hi).all(|number| model.contains(&number)));
                }
            }
        }
    }
}
