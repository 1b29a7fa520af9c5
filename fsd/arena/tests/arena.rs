//! Opening, contiguity, damage and `kill -9`.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use verbfs_arena::{Arena, ArenaOptions, Claim, Error, ExtentTable};
use verbfs_namespace::{Run, Store, StoreOptions};
use verbfs_protocol::{Ino, PAGE_SIZE, Range};

const PAGES: u64 = 256;
const FILE: Ino = Ino(42);

fn open_store(directory: &Path) -> Store {
    Store::open(&directory.join("store"), StoreOptions { map_size: 64 << 20, ..StoreOptions::default() }).unwrap()
}
fn open_arena(directory: &Path) -> Arena {
    Arena::open(&directory.join("arena"), PAGES * PAGE_SIZE, ArenaOptions::default()).unwrap()
}

#[test]
fn tables_are_send() {
    fn send<T: Send>() {}
    send::<ExtentTable>();
}

#[test]
fn an_arena_is_whole_aligned_and_kept() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("arena");
    let arena = Arena::open(&path, 3 * PAGE_SIZE, ArenaOptions { populate: true }).unwrap();
    assert!(arena.is_new());
    assert_eq!(arena.base().as_ptr() as u64 % PAGE_SIZE, 0);
    assert_eq!((arena.len(), arena.total_pages()), (3 * PAGE_SIZE, 3));
    assert!(matches!(Arena::open(&path, 3 * PAGE_SIZE, ArenaOptions::default()), Err(Error::InUse(_))));
    arena.copy_in(2 * PAGE_SIZE - 2, b"over the edge");
    drop(arena);
    // Grown, with its bytes.
    let arena = Arena::open(&path, 8 * PAGE_SIZE, ArenaOptions::default()).unwrap();
    assert!(!arena.is_new());
    let mut bytes = [0; 13];
    arena.copy_out(2 * PAGE_SIZE - 2, &mut bytes);
    assert_eq!(&bytes, b"over the edge");
    arena.zero(2 * PAGE_SIZE, 4);
    arena.copy_out(2 * PAGE_SIZE - 2, &mut bytes);
    assert_eq!(&bytes, b"ov\0\0\0\0he edge");
    arena.sync().unwrap();
    drop(arena);
    for size in [0, PAGE_SIZE + 1, u64::MAX - PAGE_SIZE + 1] {
        assert!(matches!(Arena::open(&path, size, ArenaOptions::default()), Err(Error::Size { .. })));
    }
    let error = Arena::open(&path, 3 * PAGE_SIZE, ArenaOptions::default()).err().expect("it would shrink");
    assert!(matches!(error, Error::Shrinks { present, .. } if present == 8 * PAGE_SIZE), "{error}");
}

#[test]
fn only_its_owner_can_read_an_arena() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("arena");
    let mode = || std::fs::metadata(&path).unwrap().permissions().mode() & 0o7777;
    drop(open_arena(directory.path()));
    assert_eq!(mode(), 0o600);
    // As one that was made with a looser mode, or copied.
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
    drop(open_arena(directory.path()));
    assert_eq!(mode(), 0o600);
}

#[test]
#[should_panic(expected = "of an arena of")]
fn bytes_beyond_the_arena_are_out_of_reach() {
    let directory = tempfile::tempdir().unwrap();
    open_arena(directory.path()).copy_in(PAGES * PAGE_SIZE - 1, b"two");
}

/// On whatever file system the temporary directory is: none has 32 TiB to spare.
#[test]
fn no_room_is_told_and_leaves_no_file() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("arena");
    let error = Arena::open(&path, 1 << 45, ArenaOptions::default()).err().expect("no room");
    assert!(matches!(error, Error::NoRoom { .. }), "{error}");
    assert_eq!(error.errno(), 28);
    assert!(!path.exists());
}

#[test]
fn files_that_grow_in_turn_stay_contiguous_where_they_can() {
    let directory = tempfile::tempdir().unwrap();
    let store = open_store(directory.path());
    let mut table = ExtentTable::load(&store, open_arena(directory.path())).unwrap();
    store
        .read::<_, Error>(|txn| {
            for start in (0..64).step_by(8) {
                table.allocate(txn, FILE, Range::new(start, start + 8), Claim::Free)?;
            }
            assert_eq!(table.lookup(txn, FILE, Range::ALL)?.len(), 1, "a file that grows alone is one extent");
            assert_eq!(table.allocate(txn, Ino(43), Range::new(0, 100), Claim::Free)?.len(), 1);
            let error = table.allocate(txn, Ino(44), Range::new(0, 100), Claim::Free).expect_err("92 are left");
            assert!(matches!(error, Error::NoSpace { wanted: 100, available: 92 }));
            assert_eq!(table.pages().available(), 92, "nothing is left behind");
            assert!(table.allocate(txn, Ino(44), Range::ALL, Claim::Free).is_err());
            table.release_uncommitted(FILE, Range::new(10, 20))?;
            assert_eq!(
                table.allocate(txn, Ino(44), Range::new(0, 10), Claim::Free)?.len(),
                1,
                "the hole that fits best"
            );
            assert_eq!(
                table
                    .allocate(txn, Ino(44), Range::new(0, 102), Claim::Free)?
                    .iter()
                    .map(|extent| extent.pages)
                    .sum::<u64>(),
                102
            );
            assert_eq!(table.pages().free, 0);
            table.check(txn);
            for file in [FILE, Ino(43), Ino(44)] {
                table.release_uncommitted(file, Range::ALL)?;
            }
            assert_eq!(table.pages().free, PAGES);
            Ok(())
        })
        .unwrap();
}

#[test]
fn committing_and_removing_in_one_transaction_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let mut store = open_store(directory.path());
    let mut table = ExtentTable::load(&store, open_arena(directory.path())).unwrap();
    store.read(|txn| table.allocate(txn, FILE, Range::new(0, 4), Claim::Free)).unwrap();
    for _ in 0..2 {
        let result: Result<(), Error> = store.write(|txn| {
            let _committed = table.commit(txn, FILE, &[Range::new(0, 4)])?;
            let _removed = table.remove(txn, FILE, Range::new(3, 9))?;
            Ok(())
        });
        assert!(matches!(result, Err(Error::Twice { ino: FILE, range: Range { lo: 3, hi: 4 } })), "{result:?}");
    }
    // Other pages are no concern, nor is the next transaction, nor one that aborted.
    let (committed, removed) = store
        .write::<_, Error>(|txn| {
            Ok((table.commit(txn, FILE, &[Range::new(0, 2)])?, table.remove(txn, FILE, Range::new(2, 4))?))
        })
        .unwrap();
    assert_eq!((table.apply(committed).unwrap(), table.apply(removed).unwrap()), (0, 2));
    let removed = store.write(|txn| table.remove(txn, FILE, Range::ALL)).unwrap();
    assert_eq!(table.apply(removed).unwrap(), 2);
    store
        .read::<_, Error>(|txn| {
            table.check(txn);
            Ok(())
        })
        .unwrap();
}

#[test]
fn a_store_whose_extents_cannot_be_is_refused_by_name() {
    let directory = tempfile::tempdir().unwrap();
    let mut store = open_store(directory.path());
    drop(open_arena(directory.path()));
    let put = |store: &mut Store, ino, page, arena_page, pages| {
        store.write::<_, Error>(|txn| Ok(txn.insert_extent(ino, Run { page, arena_page, pages })?)).unwrap();
    };
    put(&mut store, Ino(1), 0, 10, 10);
    put(&mut store, Ino(2), 5, 19, 3);
    let error = ExtentTable::load(&store, open_arena(directory.path())).err().expect("they overlap");
    assert!(matches!(error, Error::Overlap { first: (Ino(1), _), second: (Ino(2), Run { page: 5, .. }) }), "{error}");
    put(&mut store, Ino(2), 5, PAGES - 1, 3);
    let error = ExtentTable::load(&store, open_arena(directory.path())).err().expect("it lies beyond");
    assert!(
        matches!(error, Error::OutOfRange { ino: Ino(2), run: Run { page: 5, .. }, arena_pages: PAGES }),
        "{error}"
    );
    put(&mut store, Ino(2), 5, 20, 3);
    assert_eq!(ExtentTable::load(&store, open_arena(directory.path())).unwrap().pages().free, PAGES - 13);
    // A tmpfs was emptied: the store's extents have lost their bytes.
    std::fs::remove_file(directory.path().join("arena")).unwrap();
    let error = ExtentTable::load(&store, open_arena(directory.path())).err().expect("the bytes are lost");
    assert!(matches!(error, Error::Lost { extents: 2 }), "{error}");
}

/// Set for the child of the kill test: its directory.
const CHILD: &str = "VERBFS_ARENA_KILL_TEST";

fn content(page: u64, round: u64) -> Vec<u8> {
    [page, round].repeat(PAGE_SIZE as usize / 16).into_iter().flat_map(u64::to_le_bytes).collect()
}

/// Rewrites file `round % 4` with 1 to 30 pages of new bytes: allocate, write, commit; then removes the file after it.
#[test]
fn child() {
    let Some(directory) = std::env::var_os(CHILD) else { return };
    let directory = Path::new(&directory);
    let mut store = open_store(directory);
    let mut table = ExtentTable::load(&store, open_arena(directory)).unwrap();
    let mut out = std::io::stdout().lock();
    let start =
        store.read(|txn| txn.meta("round")).unwrap().map_or(0, |bytes| u64::from_le_bytes(bytes.try_into().unwrap()));
    for round in start + 1.. {
        let (file, pages) = (Ino(10 + round % 4), 1 + round % 30);
        // What an earlier process had allocated and not committed must be free: never more than 4 files of 30 pages.
        let extents = store.read(|txn| table.allocate(txn, file, Range::new(0, pages), Claim::Free)).unwrap();
        for extent in extents {
            for page in 0..extent.pages {
                table.arena().copy_in((extent.arena_page + page) * PAGE_SIZE, &content(extent.page + page, round));
            }
        }
        let changes = store
            .write::<_, Error>(|txn| {
                txn.put_meta("round", &round.to_le_bytes())?;
                txn.put_meta(&format!("file {}", file.0), &round.to_le_bytes())?;
                let next = Ino(10 + (round + 1) % 4);
                txn.delete_meta(&format!("file {}", next.0))?;
                Ok([table.commit(txn, file, &[Range::new(0, pages)])?, table.remove(txn, next, Range::ALL)?])
            })
            .unwrap();
        for change in changes {
            table.apply(change).unwrap();
        }
        writeln!(out, "round {round}").unwrap();
    }
}

#[test]
fn committed_pages_survive_kill_and_uncommitted_ones_are_free() {
    let directory = tempfile::tempdir().unwrap();
    for kill in 0..10 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child", "--nocapture"])
            .env(CHILD, directory.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut acknowledged = 0;
        for _ in 0..20 + 31 * kill {
            if let Some(round) = lines.next().unwrap().unwrap().strip_prefix("round ") {
                acknowledged = round.parse().unwrap();
            }
        }
        child.kill().unwrap();
        child.wait().unwrap();

        let store = open_store(directory.path());
        let table = ExtentTable::load(&store, open_arena(directory.path())).unwrap();
        store
            .read::<_, Error>(|txn| {
                table.check(txn);
                let number = |key: &str| {
                    Ok::<_, Error>(txn.meta(key)?.map(|bytes| u64::from_le_bytes(bytes.try_into().unwrap())))
                };
                assert!(number("round")?.unwrap() >= acknowledged);
                let mut used = 0;
                for file in 10..14 {
                    let extents = table.lookup(txn, Ino(file), Range::ALL)?;
                    let pages: u64 = extents.iter().map(|extent| extent.pages).sum();
                    used += pages;
                    let Some(round) = number(&format!("file {file}"))? else {
                        assert_eq!(pages, 0, "a removed file keeps nothing");
                        continue;
                    };
                    assert_eq!(pages, 1 + round % 30);
                    for extent in extents {
                        assert!(extent.committed);
                        for page in 0..extent.pages {
                            let mut bytes = vec![0; PAGE_SIZE as usize];
                            table.arena().copy_out((extent.arena_page + page) * PAGE_SIZE, &mut bytes);
                            assert!(
                                bytes == content(extent.page + page, round),
                                "page {page} of file {file}, round {round}"
                            );
                        }
                    }
                }
                assert_eq!(table.pages().free, PAGES - used);
                Ok(())
            })
            .unwrap();
    }
}
