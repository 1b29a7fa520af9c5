//! The store against maps: transactions that commit, abort and fail to commit, and reopening at any point.

use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use verbfs_namespace::{CURSOR_MIN, Entry, Error, Run, SetXattr, Store, StoreOptions, WriteTransaction};
use verbfs_protocol::{Attributes, FileKind, Ino, Layout, Node, OperationId, Range, Time};

/// Three hashes for all names.
fn colliding(name: &[u8]) -> u64 {
    u64::from(name.iter().map(|&byte| byte as u32).sum::<u32>() % 3) << 40
}

fn options() -> StoreOptions {
    StoreOptions { map_size: 16 << 20, name_hash: colliding }
}

const INODES: u64 = 4;
const PAGES: u64 = 24;

#[derive(Clone, Debug)]
enum Change {
    PutInode(u64, u64),
    DeleteInode(u64),
    PutSymlink(u64, Vec<u8>),
    PutParent(u64, u64),
    PutEntry(u64, Vec<u8>, u64),
    DeleteEntry(u64, Vec<u8>),
    SetXattr(u64, Vec<u8>, Vec<u8>, SetXattr),
    RemoveXattr(u64, Vec<u8>),
    InsertExtent(u64, Run),
    RemoveExtents(u64, Range),
    AddOrphan(u64),
    RemoveOrphan(u64),
    PutReply(u32, u64, Vec<u8>),
    Prune(u32, u64),
    Forget(u32),
    PutPrepared(u64, Vec<u8>),
    DeletePrepared(u64),
    PutMeta(String, Vec<u8>),
    AllocateSequence,
}

#[derive(Clone, Debug)]
enum Fate {
    Commit,
    Abort,
    FailToCommit,
}

fn name() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(b'a'..b'd', 1..4)
}
fn bytes() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(any::<u8>(), 0..20)
}
fn range() -> impl Strategy<Value = Range> {
    (0..PAGES, 0..=PAGES).prop_map(|(one, other)| Range::new(one.min(other), one.max(other)))
}
fn run() -> impl Strategy<Value = Run> {
    // The shift takes few values, so that neighbours often continue each other in the arena too.
    (0..PAGES, 1..8u64, 0..2u64).prop_map(|(page, pages, shift)| Run { page, arena_page: page + 100 * shift, pages })
}
fn change() -> impl Strategy<Value = Change> {
    let ino = || 1..INODES;
    let how = prop_oneof![Just(SetXattr::Any), Just(SetXattr::Create), Just(SetXattr::Replace)];
    prop_oneof![
        2 => (ino(), any::<u64>()).prop_map(|(ino, size)| Change::PutInode(ino, size)),
        1 => ino().prop_map(Change::DeleteInode),
        1 => (ino(), prop::collection::vec(any::<u8>(), 1..20)).prop_map(|(ino, target)| Change::PutSymlink(ino, target)),
        1 => (ino(), ino()).prop_map(|(ino, parent)| Change::PutParent(ino, parent)),
        6 => (ino(), name(), ino()).prop_map(|(directory, name, ino)| Change::PutEntry(directory, name, ino)),
        4 => (ino(), name()).prop_map(|(directory, name)| Change::DeleteEntry(directory, name)),
        2 => (ino(), name(), bytes(), how).prop_map(|(ino, name, value, how)| Change::SetXattr(ino, name, value, how)),
        1 => (ino(), name()).prop_map(|(ino, name)| Change::RemoveXattr(ino, name)),
        5 => (ino(), run()).prop_map(|(ino, run)| Change::InsertExtent(ino, run)),
        3 => (ino(), range()).prop_map(|(ino, range)| Change::RemoveExtents(ino, range)),
        1 => ino().prop_map(Change::AddOrphan),
        1 => ino().prop_map(Change::RemoveOrphan),
        2 => (0..3u32, 0..8u64, bytes()).prop_map(|(node, sequence, reply)| Change::PutReply(node, sequence, reply)),
        1 => (0..3u32, 0..8u64).prop_map(|(node, below)| Change::Prune(node, below)),
        1 => (0..3u32).prop_map(Change::Forget),
        1 => (0..4u64, bytes()).prop_map(|(id, bytes)| Change::PutPrepared(id, bytes)),
        1 => (0..4u64).prop_map(Change::DeletePrepared),
        1 => ("[a-c]", bytes()).prop_map(|(key, value)| Change::PutMeta(key, value)),
        1 => Just(Change::AllocateSequence),
    ]
}
fn fate() -> impl Strategy<Value = (Fate, bool)> {
    (
        prop_oneof![4 => Just(Fate::Commit), 1 => Just(Fate::Abort), 1 => Just(Fate::FailToCommit)],
        prop::bool::weighted(0.1),
    )
}

#[derive(Clone, Debug, Default, PartialEq)]
struct Model {
    inodes: BTreeMap<u64, u64>,
    symlinks: BTreeMap<u64, Vec<u8>>,
    parents: BTreeMap<u64, u64>,
    entries: BTreeMap<(u64, Vec<u8>), u64>,
    xattrs: BTreeMap<(u64, Vec<u8>), Vec<u8>>,
    /// Page by page.
    extents: BTreeMap<(u64, u64), u64>,
    orphans: BTreeSet<u64>,
    replies: BTreeMap<(u32, u64), Vec<u8>>,
    prepared: BTreeMap<u64, Vec<u8>>,
    meta: BTreeMap<String, Vec<u8>>,
}

fn attributes(ino: u64, size: u64) -> Attributes {
    let time = |seed: u64| Time { seconds: size as i64 ^ seed as i64, nanoseconds: (seed % 1_000_000_000) as u32 };
    Attributes {
        ino: Ino(ino),
        kind: [FileKind::Regular, FileKind::Directory, FileKind::Fifo][(size % 3) as usize],
        mode: size as u32 & 0o7777,
        uid: 1,
        gid: 2,
        nlink: 3,
        rdev: 4,
        size,
        pages: 5,
        atime: time(1),
        mtime: time(2),
        ctime: time(3),
        crtime: time(999_999_999),
        truncate_generation: 6,
        layout: Layout { chunk_pages: 256, slots: (0..(size % 65) as u16).collect() },
        has_xattrs: size % 2 == 1,
    }
}

fn operation(incarnation: u32, sequence: u64) -> OperationId {
    OperationId { node: Node { slot: 9, incarnation }, sequence }
}

/// Pages of runs, one by one.
fn pages(runs: &[Run]) -> Vec<(u64, u64)> {
    runs.iter().flat_map(|run| (0..run.pages).map(|page| (run.page + page, run.arena_page + page))).collect()
}

impl Model {
    fn take_extents(&mut self, ino: u64, range: Range) -> Vec<(u64, u64)> {
        let taken: Vec<(u64, u64)> = self
            .extents
            .iter()
            .filter(|((of, page), _)| *of == ino && range.lo <= *page && *page < range.hi)
            .map(|((_, page), &at)| (*page, at))
            .collect();
        self.extents.retain(|&(of, page), _| of != ino || page < range.lo || range.hi <= page);
        taken
    }

    /// Applies a change to both, comparing what they answer.
    fn apply(&mut self, txn: &mut WriteTransaction<'_>, change: Change, sequences: &mut BTreeSet<u64>) {
        match change {
            Change::PutInode(ino, size) => {
                txn.put_inode(&attributes(ino, size)).unwrap();
                self.inodes.insert(ino, size);
            }
            Change::DeleteInode(ino) => {
                assert_eq!(txn.delete_inode(Ino(ino)).unwrap(), self.inodes.remove(&ino).is_some());
                self.symlinks.remove(&ino);
                self.parents.remove(&ino);
                self.orphans.remove(&ino);
                self.xattrs.retain(|(of, _), _| *of != ino);
            }
            Change::PutSymlink(ino, target) => {
                txn.put_symlink(Ino(ino), &target).unwrap();
                self.symlinks.insert(ino, target);
            }
            Change::PutParent(ino, parent) => {
                txn.put_parent(Ino(ino), Ino(parent)).unwrap();
                self.parents.insert(ino, parent);
            }
            Change::PutEntry(directory, name, ino) => {
                let entry = |ino| Entry { ino: Ino(ino), kind: FileKind::Regular };
                let replaced = txn.put_entry(Ino(directory), &name, entry(ino)).unwrap();
                assert_eq!(replaced, self.entries.insert((directory, name), ino).map(entry));
            }
            Change::DeleteEntry(directory, name) => {
                let deleted = txn.delete_entry(Ino(directory), &name).unwrap();
                assert_eq!(deleted.map(|entry| entry.ino.0), self.entries.remove(&(directory, name)));
            }
            Change::SetXattr(ino, name, value, how) => {
                let result = txn.set_xattr(Ino(ino), &name, &value, how);
                match (how, self.xattrs.contains_key(&(ino, name.clone()))) {
                    (SetXattr::Create, true) => assert!(matches!(result, Err(Error::AttributeExists))),
                    (SetXattr::Replace, false) => assert!(matches!(result, Err(Error::AttributeMissing))),
                    _ => {
                        result.unwrap();
                        self.xattrs.insert((ino, name), value);
                    }
                }
            }
            Change::RemoveXattr(ino, name) => {
                assert_eq!(txn.remove_xattr(Ino(ino), &name).unwrap(), self.xattrs.remove(&(ino, name)).is_some());
            }
            Change::InsertExtent(ino, run) => {
                let replaced = txn.insert_extent(Ino(ino), run).unwrap();
                assert_eq!(pages(&replaced), self.take_extents(ino, run.range()));
                self.extents.extend(pages(&[run]).into_iter().map(|(page, at)| ((ino, page), at)));
            }
            Change::RemoveExtents(ino, range) => {
                let removed = txn.remove_extents(Ino(ino), range).unwrap();
                assert_eq!(pages(&removed), self.take_extents(ino, range));
            }
            Change::AddOrphan(ino) => {
                txn.add_orphan(Ino(ino)).unwrap();
                self.orphans.insert(ino);
            }
            Change::RemoveOrphan(ino) => assert_eq!(txn.remove_orphan(Ino(ino)).unwrap(), self.orphans.remove(&ino)),
            Change::PutReply(node, sequence, reply) => {
                txn.put_reply(operation(node, sequence), &reply).unwrap();
                self.replies.insert((node, sequence), reply);
            }
            Change::Prune(node, below) => {
                let before = self.replies.len();
                self.replies.retain(|&(of, sequence), _| of != node || sequence >= below);
                let pruned = txn.prune_replies(operation(node, 0).node, below).unwrap();
                assert_eq!(pruned as usize, before - self.replies.len());
            }
            Change::Forget(node) => {
                let before = self.replies.len();
                self.replies.retain(|&(of, _), _| of >= node);
                assert_eq!(txn.forget_replies(9, node).unwrap() as usize, before - self.replies.len());
            }
            Change::PutPrepared(id, bytes) => {
                txn.put_prepared(operation(1, id), &bytes).unwrap();
                self.prepared.insert(id, bytes);
            }
            Change::DeletePrepared(id) => {
                assert_eq!(txn.delete_prepared(operation(1, id)).unwrap(), self.prepared.remove(&id).is_some());
            }
            Change::PutMeta(key, value) => {
                txn.put_meta(&key, &value).unwrap();
                self.meta.insert(key, value);
            }
            Change::AllocateSequence => {
                assert!(sequences.insert(txn.allocate_sequence().unwrap()), "a sequence given out twice")
            }
        }
    }

    fn compare(&self, store: &Store) {
        store
            .read::<_, Error>(|txn| {
                assert_eq!(txn.inode_count()?, self.inodes.len() as u64);
                let mut inodes = Vec::new();
                txn.for_each_inode::<Error>(|attributes| {
                    inodes.push(attributes);
                    Ok(())
                })?;
                assert_eq!(inodes, self.inodes.iter().map(|(&ino, &size)| attributes(ino, size)).collect::<Vec<_>>());
                for ino in 1..INODES {
                    assert_eq!(txn.inode(Ino(ino))?.map(|attributes| attributes.size), self.inodes.get(&ino).copied());
                    assert_eq!(txn.symlink(Ino(ino))?.as_ref(), self.symlinks.get(&ino));
                    assert_eq!(txn.parent(Ino(ino))?.map(|parent| parent.0), self.parents.get(&ino).copied());
                    assert_eq!(txn.is_orphan(Ino(ino))?, self.orphans.contains(&ino));

                    let names: BTreeMap<&[u8], u64> = self
                        .entries
                        .iter()
                        .filter(|((of, _), _)| *of == ino)
                        .map(|((_, name), &to)| (&name[..], to))
                        .collect();
                    assert_eq!(txn.entry_count(Ino(ino))?, names.len() as u64);
                    assert_eq!(txn.is_empty_directory(Ino(ino))?, names.is_empty());
                    // In steps of two, going on from cursors.
                    let mut listed = Vec::new();
                    loop {
                        let cursor = listed.last().map_or(0, |last: &verbfs_namespace::Listed| last.cursor);
                        let more = txn.scan(Ino(ino), cursor, 2)?;
                        if more.is_empty() {
                            break;
                        }
                        listed.extend(more);
                    }
                    assert!(listed.windows(2).all(|pair| pair[0].cursor < pair[1].cursor));
                    assert!(listed.iter().all(|listed| (CURSOR_MIN..1 << 63).contains(&listed.cursor)));
                    assert_eq!(listed.len(), names.len());
                    assert_eq!(
                        listed.iter().map(|listed| (&listed.name[..], listed.entry.ino.0)).collect::<BTreeMap<_, _>>(),
                        names
                    );
                    for (name, to) in names {
                        assert_eq!(txn.entry(Ino(ino), name)?.map(|entry| entry.ino.0), Some(to));
                    }
                    assert_eq!(txn.entry(Ino(ino), b"absent")?, None);

                    let xattrs: Vec<_> = self.xattrs.iter().filter(|((of, _), _)| *of == ino).collect();
                    assert_eq!(
                        txn.xattrs(Ino(ino))?,
                        xattrs.iter().map(|((_, name), _)| name.clone()).collect::<Vec<_>>()
                    );
                    for ((_, name), value) in xattrs {
                        assert_eq!(txn.xattr(Ino(ino), name)?.as_ref(), Some(value));
                    }

                    let runs = txn.extents(Ino(ino), Range::ALL)?;
                    assert!(runs.windows(2).all(|pair| !pair[0].continues_with(pair[1])), "not merged: {runs:?}");
                    for range in [Range::ALL, Range::new(3, 9), Range::new(5, 6), Range::new(7, 7)] {
                        let expected: Vec<_> = self
                            .extents
                            .iter()
                            .filter(|((of, page), _)| *of == ino && range.lo <= *page && *page < range.hi)
                            .map(|((_, page), &at)| (*page, at))
                            .collect();
                        assert_eq!(pages(&txn.extents(Ino(ino), range)?), expected);
                    }
                }
                let mut extents = BTreeMap::new();
                txn.for_each_extent::<Error>(|ino, run| {
                    extents.extend(pages(&[run]).into_iter().map(|(page, at)| ((ino.0, page), at)));
                    Ok(())
                })?;
                assert_eq!(extents, self.extents);
                assert_eq!(txn.orphans()?, self.orphans.iter().map(|&ino| Ino(ino)).collect::<Vec<_>>());
                assert_eq!(txn.reply_count()?, self.replies.len() as u64);
                for (&(node, sequence), reply) in &self.replies {
                    assert_eq!(txn.reply(operation(node, sequence))?.as_ref(), Some(reply));
                }
                let prepared: Vec<_> =
                    self.prepared.iter().map(|(&id, bytes)| (operation(1, id), bytes.clone())).collect();
                assert_eq!(txn.all_prepared()?, prepared);
                for (key, value) in &self.meta {
                    assert_eq!(txn.meta(key)?.as_ref(), Some(value));
                }
                Ok(())
            })
            .unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_store_behaves_like_maps(
        transactions in prop::collection::vec((prop::collection::vec(change(), 1..12), fate()), 1..30)
    ) {
        let directory = tempfile::tempdir().unwrap();
        let mut store = Store::open(directory.path(), options()).unwrap();
        let mut model = Model::default();
        // Those an aborted transaction took may come again after a restart, and not before.
        let mut committed_sequences = BTreeSet::new();
        let mut taken_sequences = BTreeSet::new();
        for (changes, (fate, reopen)) in transactions {
            let mut changed = model.clone();
            let taken_before = taken_sequences.clone();
            if matches!(fate, Fate::FailToCommit) {
                store.fail_commits_after(Some(0));
            }
            let result = store.write::<_, Error>(|txn| {
                for change in changes {
                    changed.apply(txn, change, &mut taken_sequences);
                }
                if matches!(fate, Fate::Abort) { Err(Error::InvalidRun) } else { Ok(()) }
            });
            store.fail_commits_after(None);
            match fate {
                Fate::Commit => { result.unwrap(); model = changed; }
                Fate::Abort => prop_assert!(matches!(result, Err(Error::InvalidRun))),
                Fate::FailToCommit => prop_assert!(matches!(result, Err(Error::Injected))),
            }
            if matches!(fate, Fate::Commit) {
                committed_sequences.extend(taken_sequences.difference(&taken_before));
            }
            if reopen {
                taken_sequences = committed_sequences.clone();
                drop(store);
                store = Store::open(directory.path(), options()).unwrap();
            }
            model.compare(&store);
        }
    }
}
