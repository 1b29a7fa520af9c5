//! Extents and the free map against maps of single pages.

use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use verbfs_arena::{Allocator, Arena, ArenaOptions, Claim, Error, ExtentTable};
use verbfs_namespace::{Store, StoreOptions};
use verbfs_protocol::{Extent, Ino, PAGE_SIZE, Range};

const ARENA_PAGES: u64 = 40;
const FILE_PAGES: u64 = 24;
const FILES: u64 = 3;

#[derive(Clone, Debug)]
enum Step {
    Allocate(u64, Range, bool),
    Commit(u64, Vec<Range>, Fate),
    Remove(u64, Range, Fate),
    Release(u64, Range),
    Reserve(u64),
    Unreserve(u64),
    Reopen,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Fate {
    Commit,
    Abort,
    FailToCommit,
}

fn range() -> impl Strategy<Value = Range> {
    (0..FILE_PAGES, 0..=FILE_PAGES).prop_map(|(one, other)| Range::new(one.min(other), one.max(other)))
}

fn step() -> impl Strategy<Value = Step> {
    let fate = || prop_oneof![4 => Just(Fate::Commit), 1 => Just(Fate::Abort), 1 => Just(Fate::FailToCommit)];
    prop_oneof![
        8 => (0..FILES, range(), prop::bool::weighted(0.3)).prop_map(|(file, range, reserved)| Step::Allocate(file, range, reserved)),
        6 => (0..FILES, prop::collection::vec(range(), 1..3), fate()).prop_map(|(file, ranges, fate)| Step::Commit(file, ranges, fate)),
        4 => (0..FILES, range(), fate()).prop_map(|(file, range, fate)| Step::Remove(file, range, fate)),
        2 => (0..FILES, range()).prop_map(|(file, range)| Step::Release(file, range)),
        2 => (1..12u64).prop_map(Step::Reserve),
        1 => (1..12u64).prop_map(Step::Unreserve),
        1 => Just(Step::Reopen),
    ]
}

/// (file, page) -> (page of the arena, committed)
#[derive(Clone, Default, PartialEq, Debug)]
struct Model(BTreeMap<(u64, u64), (u64, bool)>);

impl Model {
    fn within(&self, file: u64, range: Range) -> BTreeMap<u64, (u64, bool)> {
        let keys = self.0.range((file, 0)..(file + 1, 0));
        keys.filter(|((_, page), _)| range.lo <= *page && *page < range.hi)
            .map(|(&(_, page), &at)| (page, at))
            .collect()
    }
    fn forget(&mut self, file: u64, range: Range, uncommitted_only: bool) -> u64 {
        let before = self.0.len();
        self.0.retain(|&(of, page), &mut (_, committed)| {
            of != file || page < range.lo || range.hi <= page || uncommitted_only && committed
        });
        (before - self.0.len()) as u64
    }
}

/// Extents page by page; asserts that they are sorted and disjoint.
fn pages(extents: &[Extent]) -> BTreeMap<u64, (u64, bool)> {
    assert!(extents.windows(2).all(|pair| pair[0].page + pair[0].pages <= pair[1].page), "{extents:?}");
    let single = |extent: &Extent| {
        let extent = *extent;
        (0..extent.pages).map(move |page| (extent.page + page, (extent.arena_page + page, extent.committed)))
    };
    extents.iter().flat_map(single).collect()
}

fn open(directory: &std::path::Path) -> (Store, ExtentTable) {
    let store =
        Store::open(&directory.join("store"), StoreOptions { map_size: 16 << 20, ..StoreOptions::default() }).unwrap();
    let arena = Arena::open(&directory.join("arena"), ARENA_PAGES * PAGE_SIZE, ArenaOptions::default()).unwrap();
    let table = ExtentTable::load(&store, arena).unwrap();
    (store, table)
}

fn ino(file: u64) -> Ino {
    Ino::new(file as u16 * 7, 100 + file)
}

/// Runs a change with a fate, and applies it if its transaction committed. None if it did not.
fn with_fate(
    store: &mut Store,
    table: &mut ExtentTable,
    fate: Fate,
    change: impl FnOnce(
        &mut ExtentTable,
        &mut verbfs_namespace::WriteTransaction<'_>,
    ) -> Result<verbfs_arena::Change, Error>,
) -> Result<Option<u64>, Error> {
    store.fail_commits_after((fate == Fate::FailToCommit).then_some(0));
    let result = store.write(|txn| {
        let change = change(table, txn)?;
        if fate == Fate::Abort { Err(Error::Store(verbfs_namespace::Error::Injected)) } else { Ok(change) }
    });
    store.fail_commits_after(None);
    match result {
        Ok(change) => {
            let promised = change.pages_freed();
            let freed = table.apply(change)?;
            assert_eq!(freed, promised);
            Ok(Some(freed))
        }
        Err(Error::Store(verbfs_namespace::Error::Injected)) => Ok(None),
        Err(error) => Err(error),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn extents_behave_like_a_map_of_pages(steps in prop::collection::vec(step(), 1..50)) {
        let directory = tempfile::tempdir().unwrap();
        let (mut store, mut table) = open(directory.path());
        let mut model = Model::default();
        let mut reserved = 0;
        for step in steps {
            match step {
                Step::Allocate(file, range, from_reserve) => {
                    let known = model.within(file, range);
                    let missing = range.len() - known.len() as u64;
                    let claim = if from_reserve { Claim::Reserved } else { Claim::Free };
                    let available = if from_reserve { reserved } else { ARENA_PAGES - model.0.len() as u64 - reserved };
                    let result = store.read(|txn| table.allocate(txn, ino(file), range, claim));
                    if range.is_empty() {
                        prop_assert!(matches!(result, Err(Error::InvalidRange(_))));
                    } else if missing > available {
                        let correct = matches!(result, Err(Error::NoSpace { wanted, available: left }) if wanted == missing && left == available);
                        prop_assert!(correct, "{:?}", result);
                    } else {
                        let got = pages(&result.unwrap());
                        prop_assert_eq!(got.keys().copied().collect::<Vec<_>>(), (range.lo..range.hi).collect::<Vec<_>>());
                        let used: BTreeSet<u64> = model.0.values().map(|at| at.0).collect();
                        for (page, at) in got {
                            match known.get(&page) {
                                Some(before) => prop_assert_eq!(*before, at),
                                None => {
                                    prop_assert!(!at.1 && at.0 < ARENA_PAGES && !used.contains(&at.0), "page {} given out twice", at.0);
                                    model.0.insert((file, page), at);
                                }
                            }
                        }
                        if from_reserve {
                            reserved -= missing;
                        }
                    }
                }
                Step::Commit(file, ranges, fate) => {
                    let covered = ranges.iter().all(|&range| model.within(file, range).len() as u64 == range.len());
                    let result = with_fate(&mut store, &mut table, fate, |table, txn| table.commit(txn, ino(file), &ranges));
                    match (covered, fate) {
                        (false, _) => {
                            let refused = matches!(result, Err(Error::NotAllocated { .. }));
                            prop_assert!(refused);
                        }
                        (true, Fate::Commit) => {
                            prop_assert_eq!(result.unwrap(), Some(0));
                            for range in ranges {
                                for page in range.lo..range.hi {
                                    model.0.get_mut(&(file, page)).unwrap().1 = true;
                                }
                            }
                        }
                        (true, _) => prop_assert_eq!(result.unwrap(), None),
                    }
                }
                Step::Remove(file, range, fate) => {
                    let result = with_fate(&mut store, &mut table, fate, |table, txn| table.remove(txn, ino(file), range)).unwrap();
                    let expected = (fate == Fate::Commit).then(|| model.forget(file, range, false));
                    prop_assert_eq!(result, expected);
                }
                Step::Release(file, range) => {
                    prop_assert_eq!(table.release_uncommitted(ino(file), range).unwrap(), model.forget(file, range, true));
                }
                Step::Reserve(count) => {
                    if table.reserve(count).is_ok() {
                        reserved += count;
                        prop_assert!(reserved + model.0.len() as u64 <= ARENA_PAGES);
                    } else {
                        prop_assert!(reserved + model.0.len() as u64 + count > ARENA_PAGES);
                    }
                }
                Step::Unreserve(count) => {
                    let count = count.min(reserved);
                    table.unreserve(count);
                    reserved -= count;
                }
                Step::Reopen => {
                    drop((store, table));
                    (store, table) = open(directory.path());
                    model.0.retain(|_, at| at.1);
                    reserved = 0;
                }
            }
            prop_assert_eq!(table.pages().free, ARENA_PAGES - model.0.len() as u64);
            prop_assert_eq!(table.pages().reserved, reserved);
            prop_assert_eq!(table.uncommitted_pages(), model.0.values().filter(|at| !at.1).count() as u64);
            store.read::<_, Error>(|txn| {
                table.check(txn);
                for file in 0..FILES {
                    for range in [Range::ALL, Range::new(5, 11)] {
                        assert_eq!(pages(&table.lookup(txn, ino(file), range)?), model.within(file, range));
                    }
                }
                Ok(())
            }).unwrap();
        }
    }

    /// The free map alone: fill it in random pieces, free in random order, and it is whole again.
    #[test]
    fn the_free_map_fills_and_empties(
        pieces in prop::collection::vec((1..9u64, any::<prop::sample::Index>()), 1..60)
    ) {
        let mut allocator = Allocator::new(100);
        let mut used: Vec<Range> = Vec::new();
        for (count, victim) in pieces {
            match allocator.allocate(count, used.last().map(|range| range.hi), Claim::Free) {
                Ok(ranges) => {
                    prop_assert_eq!(ranges.iter().map(|range| range.len()).sum::<u64>(), count);
                    for range in ranges {
                        prop_assert!(used.iter().all(|other| !other.overlaps(range)) && range.hi <= 100);
                        used.push(range);
                    }
                }
                Err(_) => {
                    prop_assert!(allocator.pages().free < count);
                    let freed = used.swap_remove(victim.index(used.len()));
                    allocator.free(freed).unwrap();
                    prop_assert!(matches!(allocator.free(freed), Err(Error::NotInUse(_))), "freed twice");
                }
            }
            prop_assert_eq!(allocator.pages().allocated(), used.iter().map(|range| range.len()).sum::<u64>());
        }
        for range in used {
            allocator.free(range).unwrap();
        }
        prop_assert_eq!(allocator.free_runs().collect::<Vec<_>>(), [Range::new(0, 100)]);
        prop_assert!(allocator.free(Range::new(99, 101)).is_err());
    }
}
