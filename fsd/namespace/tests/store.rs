//! Opening, limits, full stores, collisions, scans under change, and damage.

use proptest::prelude::*;
use std::collections::BTreeMap;
use verbfs_namespace::*;
use verbfs_protocol::{Attributes, FileKind, Ino, Layout, Node, OperationId, Range, Time};

fn attributes(ino: u64) -> Attributes {
    let time = Time { seconds: 1, nanoseconds: 2 };
    Attributes {
        ino: Ino(ino),
        kind: FileKind::Regular,
        mode: 0o644,
        uid: 0,
        gid: 0,
        nlink: 1,
        rdev: 0,
        size: 0,
        pages: 0,
        atime: time,
        mtime: time,
        ctime: time,
        crtime: time,
        truncate_generation: 0,
        layout: Layout { chunk_pages: 256, slots: vec![0, 1] },
        has_xattrs: false,
    }
}

fn entry(ino: u64) -> Entry {
    Entry { ino: Ino(ino), kind: FileKind::Regular }
}

const DIRECTORY: Ino = Ino::ROOT;

fn small() -> StoreOptions {
    StoreOptions { map_size: MIN_MAP_SIZE, ..StoreOptions::default() }
}

/// All names have one hash.
fn one_bucket() -> StoreOptions {
    StoreOptions { map_size: 16 << 20, name_hash: |_| 77 }
}

type Result = std::result::Result<(), Error>;

#[test]
fn a_store_is_opened_once_at_a_time() -> Result {
    let directory = tempfile::tempdir()?;
    let store = Store::open(directory.path(), small())?;
    assert!(matches!(Store::open(directory.path(), small()), Err(Error::InUse(_))));
    drop(store);
    Store::open(directory.path(), small())?;
    Ok(())
}

#[test]
fn a_store_is_send() {
    fn send<T: Send>() {}
    send::<Store>();
}

#[test]
fn what_is_no_store_is_refused() -> Result {
    let directory = tempfile::tempdir()?;
    std::fs::write(directory.path().join("data.mdb"), vec![b'x'; 1 << 16])?;
    assert!(matches!(Store::open(directory.path(), small()), Err(Error::NotAStore(..))));
    Ok(())
}

/// The tables as bytes, behind the store's back.
fn raw(directory: &std::path::Path, table: &str, change: impl Fn(&[u8], &[u8]) -> Option<Vec<u8>>) {
    let mut options = heed::EnvOpenOptions::new().read_txn_without_tls();
    options.map_size(16 << 20).max_dbs(20);
    // SAFETY: the store is closed.
    let env = unsafe { options.open(directory).unwrap() };
    let mut txn = env.write_txn().unwrap();
    let table: heed::Database<heed::types::Bytes, heed::types::Bytes> =
        env.open_database(&txn, Some(table)).unwrap().unwrap();
    let records: Vec<(Vec<u8>, Vec<u8>)> = table
        .iter(&txn)
        .unwrap()
        .map(|item| item.map(|(key, value)| (key.to_vec(), value.to_vec())).unwrap())
        .collect();
    for (key, value) in records {
        if let Some(changed) = change(&key, &value) {
            table.put(&mut txn, &key, &changed).unwrap();
        }
    }
    txn.commit().unwrap();
    env.prepare_for_closing().wait();
}

#[test]
fn another_version_of_the_format_is_refused() -> Result {
    let directory = tempfile::tempdir()?;
    drop(Store::open(directory.path(), small())?);
    raw(directory.path(), "store", |key, value| {
        let mut value = value.to_vec();
        (key == b"format").then(|| {
            value[8] = 99;
            value
        })
    });
    assert!(matches!(
        Store::open(directory.path(), small()),
        Err(Error::Version { found: 99, supported: FORMAT_VERSION })
    ));
    raw(directory.path(), "store", |key, _| (key == b"format").then(|| b"short".to_vec()));
    assert!(matches!(Store::open(directory.path(), small()), Err(Error::Corrupt { .. })));
    Ok(())
}

/// The layout of the inode record, byte by byte: what the crate's documentation draws.
#[test]
fn records_have_the_documented_bytes() -> Result {
    let directory = tempfile::tempdir()?;
    let mut store = Store::open(directory.path(), small())?;
    store.write::<_, Error>(|txn| {
        txn.put_inode(&Attributes {
            size: 0x0102_0304,
            layout: Layout { chunk_pages: 256, slots: vec![0, 0x0201] },
            has_xattrs: true,
            ..attributes(7)
        })?;
        txn.put_entry(DIRECTORY, b"name", entry(7))?;
        txn.insert_extent(Ino(7), Run { page: 1, arena_page: 2, pages: 3 })?;
        Ok(())
    })?;
    drop(store);
    raw(directory.path(), "inodes", |key, value| {
        assert_eq!(key, [0, 0, 0, 0, 0, 0, 0, 7]);
        assert_eq!(value.len(), 104 + 4);
        assert_eq!(value[..4], [1, 1, 1, 0]);
        assert_eq!(value[24..32], [4, 3, 2, 1, 0, 0, 0, 0]);
        assert_eq!(value[96..], [0, 1, 0, 0, 2, 0, 0, 0, 0, 0, 1, 2]);
        None
    });
    raw(directory.path(), "entries", |key, value| {
        assert_eq!(key[..8], DIRECTORY.0.to_be_bytes());
        if key[8..] == [0; 8] {
            assert_eq!(value, [1, 0, 0, 0, 0, 0, 0, 0]);
        } else {
            assert_eq!(key[8..], name_hash(b"name").to_be_bytes());
            assert_eq!(value, b"\x07\0\0\0\0\0\0\0\x01\x04\0\0name");
        }
        None
    });
    raw(directory.path(), "extents", |key, value| {
        assert_eq!(key, [0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 1]);
        assert_eq!(value, [2, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0]);
        None
    });
    Ok(())
}

#[test]
fn a_full_store_says_so_and_can_be_emptied() -> Result {
    let directory = tempfile::tempdir()?;
    let mut store = Store::open(directory.path(), small())?;
    for round in 0..3 {
        let mut files = 0;
        let error = loop {
            let name = format!("{files}");
            let created = store.write::<_, Error>(|txn| {
                txn.put_inode(&attributes(100 + files))?;
                txn.put_entry(DIRECTORY, name.as_bytes(), entry(100 + files))?;
                txn.set_xattr(Ino(100 + files), b"user.a", &[7; 500], SetXattr::Create)
            });
            match created {
                Ok(()) => files += 1,
                Err(error) => break error,
            }
        };
        assert!(matches!(error, Error::Full), "{error}");
        assert_eq!(error.errno(), 28);
        assert!(files > 300, "{files} files in round {round}");
        assert_eq!(store.inode_count()?, files);
        for file in 0..files {
            let unlinked = store.write_reclaiming(
                |error| matches!(error, Error::Full),
                |txn| {
                    txn.delete_entry(DIRECTORY, format!("{file}").as_bytes())?;
                    txn.delete_inode(Ino(100 + file))
                },
            )?;
            assert!(unlinked);
        }
        assert_eq!(store.inode_count()?, 0);
        assert!(store.read(|txn| txn.is_empty_directory(DIRECTORY))?);
    }
    drop(store);
    Store::open(directory.path(), small())?;
    Ok(())
}

#[test]
fn names_beyond_the_bucket_are_refused_and_come_back() -> Result {
    let directory = tempfile::tempdir()?;
    let mut store = Store::open(directory.path(), one_bucket())?;
    let name = |number: u64| format!("{number}").into_bytes();
    store.write::<_, Error>(|txn| {
        for number in 0..COLLISIONS_MAX {
            txn.put_entry(DIRECTORY, &name(number), entry(number))?;
        }
        let refused = txn.put_entry(DIRECTORY, b"one more", entry(0));
        assert!(matches!(refused, Err(Error::Collisions)));
        assert_eq!(txn.put_entry(DIRECTORY, &name(200), entry(5))?, Some(entry(200)));
        txn.delete_entry(DIRECTORY, &name(3))?;
        txn.put_entry(DIRECTORY, b"one more", entry(0))?;
        assert_eq!(txn.entry_count(DIRECTORY)?, COLLISIONS_MAX);
        for number in (0..COLLISIONS_MAX).filter(|&number| number != 3 && number != 200) {
            assert_eq!(txn.entry(DIRECTORY, &name(number))?, Some(entry(number)));
        }
        Ok(())
    })
}

#[test]
fn limits_are_checked() -> Result {
    let directory = tempfile::tempdir()?;
    let mut store = Store::open(directory.path(), small())?;
    store.write::<_, Error>(|txn| {
        assert!(matches!(txn.put_entry(DIRECTORY, &[b'a'; 256], entry(1)), Err(Error::NameLength(256))));
        assert!(matches!(txn.put_entry(DIRECTORY, b"", entry(1)), Err(Error::NameLength(0))));
        assert_eq!(txn.put_entry(DIRECTORY, &[b'a'; 255], entry(1))?, None);
        let long = vec![0; 65537];
        assert!(matches!(txn.set_xattr(DIRECTORY, b"n", &long, SetXattr::Any), Err(Error::ValueLength { .. })));
        txn.set_xattr(DIRECTORY, &[b'n'; 255], &long[1..], SetXattr::Any)?;
        assert_eq!(txn.xattr(DIRECTORY, &[b'n'; 255])?.map(|value| value.len()), Some(65536));
        assert!(matches!(txn.put_symlink(DIRECTORY, &[b'a'; 4096]), Err(Error::ValueLength { .. })));
        let mut wide = attributes(9);
        wide.layout.slots = vec![0; 65];
        assert!(matches!(txn.put_inode(&wide), Err(Error::ValueLength { .. })));
        let beyond = Run { page: u64::MAX, arena_page: 0, pages: 1 };
        assert!(matches!(txn.insert_extent(DIRECTORY, beyond), Err(Error::InvalidRun)));
        let last = Run { page: u64::MAX - 1, arena_page: 0, pages: 1 };
        txn.insert_extent(DIRECTORY, last)?;
        assert_eq!(txn.extents(DIRECTORY, Range::ALL)?, [last]);
        Ok(())
    })
}

#[test]
fn sequences_are_never_given_out_twice() -> Result {
    let directory = tempfile::tempdir()?;
    let mut last = 1;
    for opening in 0..3 {
        let mut store = Store::open(directory.path(), small())?;
        for _ in 0..5000 {
            let taken = store.write::<_, Error>(|txn| txn.allocate_sequence())?;
            assert!(taken > last, "{taken} after {last} in opening {opening}");
            last = taken;
        }
        let mut aborted = 0;
        let result: std::result::Result<(), Error> = store.write(|txn| {
            aborted = txn.allocate_sequence()?;
            Err(Error::InvalidRun)
        });
        assert!(result.is_err());
        last = store.write::<_, Error>(|txn| txn.allocate_sequence())?;
        assert!(last > aborted);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    /// Entries that exist from start to end of a scan are seen exactly once, under their cursor, whatever changes meanwhile.
    #[test]
    fn scans_see_what_stays_exactly_once(
        buckets in 1..5u64,
        stay in prop::collection::btree_set(0..60u64, 0..30),
        changes in prop::collection::vec((60..90u64, any::<bool>()), 0..80),
        step in 1..4usize,
    ) {
        let directory = tempfile::tempdir().unwrap();
        let hashes: [fn(&[u8]) -> u64; 5] = [|_| 0, |_| 0, |name| (name[0] as u64 % 2) << 40, |name| (name[0] as u64 % 3) << 40, |name| (name[0] as u64 % 4) << 40];
        let mut store = Store::open(directory.path(), StoreOptions { map_size: 16 << 20, name_hash: hashes[buckets as usize] }).unwrap();
        let name = |number: u64| [number as u8];
        let put = |store: &mut Store, number| store.write::<_, Error>(|txn| txn.put_entry(DIRECTORY, &name(number), entry(number))).unwrap();
        for &number in &stay {
            put(&mut store, number);
        }
        let mut seen: BTreeMap<Vec<u8>, u32> = BTreeMap::new();
        let mut changes = changes.into_iter();
        let mut cursor = 0;
        loop {
            let listed = store.read(|txn| txn.scan(DIRECTORY, cursor, step)).unwrap();
            let Some(last) = listed.last() else { break };
            cursor = last.cursor;
            for listed in listed {
                *seen.entry(listed.name).or_default() += 1;
            }
            for (number, add) in changes.by_ref().take(3) {
                if add {
                    put(&mut store, number);
                } else {
                    store.write::<_, Error>(|txn| txn.delete_entry(DIRECTORY, &name(number))).unwrap();
                }
            }
        }
        for number in stay {
            prop_assert_eq!(seen.get(&name(number)[..]), Some(&1));
        }
    }

    /// Random bytes in any record: an error that names it, or a value, and never a panic.
    #[test]
    fn damaged_records_are_errors(
        table in prop::sample::select(vec!["inodes", "entries", "extents", "parents", "symlinks", "xattrs", "prepared", "replies"]),
        cut in 0..130usize,
        at in 0..130usize,
        with in any::<u8>(),
    ) {
        let directory = tempfile::tempdir().unwrap();
        let options = || StoreOptions { map_size: 16 << 20, ..StoreOptions::default() };
        let mut store = Store::open(directory.path(), options()).unwrap();
        let operation = OperationId { node: Node { slot: 1, incarnation: 1 }, sequence: 1 };
        store.write::<_, Error>(|txn| {
            txn.put_inode(&attributes(7))?;
            txn.put_entry(DIRECTORY, b"name", entry(7))?;
            txn.put_parent(DIRECTORY, DIRECTORY)?;
            txn.put_symlink(Ino(7), b"target")?;
            txn.set_xattr(Ino(7), b"a", b"value", SetXattr::Any)?;
            txn.insert_extent(Ino(7), Run { page: 1, arena_page: 2, pages: 3 })?;
            txn.put_reply(operation, b"reply")?;
            txn.put_prepared(operation, b"prepared")
        }).unwrap();
        drop(store);
        raw(directory.path(), table, |_, value| {
            let mut value = value.to_vec();
            value.truncate(cut.max(at % 7));
            if let Some(byte) = value.get_mut(at) {
                *byte = with;
            }
            Some(value)
        });
        let mut store = Store::open(directory.path(), options()).unwrap();
        let typed = |result: std::result::Result<(), Error>| match result {
            Ok(()) => true,
            Err(Error::Corrupt { table: named, key, .. }) => named == table && !key.is_empty(),
            Err(_) => false,
        };
        prop_assert!(typed(store.read(|txn| txn.inode(Ino(7)).map(drop))));
        prop_assert!(typed(store.read(|txn| txn.for_each_inode(|_| Ok(())))));
        prop_assert!(typed(store.read(|txn| txn.entry(DIRECTORY, b"name").map(drop))));
        prop_assert!(typed(store.read(|txn| txn.scan(DIRECTORY, 0, 10).map(drop))));
        prop_assert!(typed(store.read(|txn| txn.entry_count(DIRECTORY).map(drop))));
        prop_assert!(typed(store.read(|txn| txn.parent(DIRECTORY).map(drop))));
        prop_assert!(typed(store.read(|txn| txn.extents(Ino(7), Range::ALL).map(drop))));
        prop_assert!(typed(store.read(|txn| txn.for_each_extent(|_, _| Ok(())))));
        prop_assert!(typed(store.read(|txn| txn.all_prepared().map(drop))));
        prop_assert!(typed(store.write(|txn| txn.delete_entry(DIRECTORY, b"name").map(drop))));
        prop_assert!(typed(store.write(|txn| txn.remove_extents(Ino(7), Range::ALL).map(drop))));
    }
}
