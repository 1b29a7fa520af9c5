//! `kill -9` in the middle of commits: what was acknowledged is there, and nothing is half there.

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use verbfs_namespace::{Entry, Error, Store, StoreOptions};
use verbfs_protocol::{FileKind, Ino};

/// Set for the child: the directory of its store.
const CHILD: &str = "VERBFS_NAMESPACE_KILL_TEST";
const DIRECTORY: Ino = Ino::ROOT;
const ROUNDS: u64 = 12;
/// The value of an extended attribute that goes with file `number`: long enough to take pages of its own at times.
fn value(number: u64) -> Vec<u8> {
    vec![number as u8; (number % 50 * 100) as usize]
}

fn options() -> StoreOptions {
    StoreOptions { map_size: 256 << 20, ..StoreOptions::default() }
}

fn name(number: u64) -> Vec<u8> {
    format!("{number}").into_bytes()
}

/// Transaction `number` creates file `number` and removes file `number - 20`.
#[test]
fn child() {
    let Some(directory) = std::env::var_os(CHILD) else { return };
    let mut store = Store::open(directory.as_ref(), options()).unwrap();
    let start =
        store.read(|txn| txn.meta("next")).unwrap().map_or(0, |bytes| u64::from_le_bytes(bytes.try_into().unwrap()));
    let mut out = std::io::stdout().lock();
    for number in start.. {
        store
            .write::<_, Error>(|txn| {
                let ino = Ino(1000 + number);
                txn.put_entry(DIRECTORY, &name(number), Entry { ino, kind: FileKind::Regular })?;
                txn.put_symlink(ino, &name(number))?;
                txn.set_xattr(ino, b"user.value", &value(number), verbfs_namespace::SetXattr::Create)?;
                if number >= 20 {
                    let old = txn.delete_entry(DIRECTORY, &name(number - 20))?.expect("created 20 transactions ago");
                    txn.delete_inode(old.ino)?;
                }
                txn.put_meta("next", &(number + 1).to_le_bytes())
            })
            .unwrap();
        writeln!(out, "committed {}", number + 1).unwrap();
    }
}

#[test]
fn nothing_committed_is_missing_and_nothing_is_half_there() {
    let directory = tempfile::tempdir().unwrap();
    let mut total = 0;
    for round in 0..ROUNDS {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child", "--nocapture"])
            .env(CHILD, directory.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut acknowledged = 0;
        // At another point of another commit each time.
        for _ in 0..50 + 97 * round {
            if let Some(number) = lines.next().unwrap().unwrap().strip_prefix("committed ") {
                acknowledged = number.parse().unwrap();
            }
        }
        child.kill().unwrap();
        child.wait().unwrap();
        for line in lines {
            if let Some(Ok(number)) = line.unwrap().strip_prefix("committed ").map(str::parse::<u64>)
                && number == acknowledged + 1
            {
                acknowledged = number;
            }
        }

        let store = Store::open(directory.path(), options()).unwrap();
        store
            .read::<_, Error>(|txn| {
                let next = u64::from_le_bytes(txn.meta("next")?.unwrap().try_into().unwrap());
                assert!(next >= acknowledged, "transactions {next}..{acknowledged} are lost");
                assert!(next <= acknowledged + 1, "a transaction came from nowhere");
                assert!(next > total, "no progress in round {round}");
                total = next;
                let alive = next.saturating_sub(20)..next;
                assert_eq!(txn.entry_count(DIRECTORY)?, alive.end - alive.start);
                assert_eq!(txn.scan(DIRECTORY, 0, 100)?.len() as u64, alive.end - alive.start);
                for number in alive {
                    let ino = txn.entry(DIRECTORY, &name(number))?.expect("a file that was created").ino;
                    assert_eq!(txn.symlink(ino)?, Some(name(number)));
                    assert_eq!(txn.xattr(ino, b"user.value")?, Some(value(number)));
                }
                assert_eq!(txn.xattrs(Ino(1000 + next))?, Vec::<Vec<u8>>::new());
                Ok(())
            })
            .unwrap();
    }
}

/// Set for the child of the full-disk test: the directory of its store.
const LIMITED: &str = "VERBFS_NAMESPACE_LIMIT_TEST";
/// Largest file the child may have, bytes: what a full file system looks like to it.
const FILE_LIMIT: libc::rlim_t = 80 << 20;

#[test]
fn limited_child() {
    let Some(directory) = std::env::var_os(LIMITED) else { return };
    let limit = libc::rlimit { rlim_cur: FILE_LIMIT, rlim_max: FILE_LIMIT };
    // SAFETY: plain system calls of this process, which runs nothing but this test.
    unsafe {
        assert_eq!(libc::setrlimit(libc::RLIMIT_FSIZE, &limit), 0);
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
    }
    let mut store = Store::open(directory.as_ref(), options()).unwrap();
    let mut put = |number: u64| {
        store.write::<_, Error>(|txn| {
            txn.set_xattr(Ino(number), b"user.value", &[7; 60_000], verbfs_namespace::SetXattr::Create)
        })
    };
    let (full, error) = (0..).find_map(|number| put(number).err().map(|error| (number, error))).unwrap();
    assert!(matches!(error, Error::Full), "{error}");
    // More than the first mapping holds, and as much as fits.
    assert!((900..1400).contains(&full), "{full} values");
    for number in 0..full {
        let removed = store
            .write_reclaiming(|error| matches!(error, Error::Full), |txn| txn.remove_xattr(Ino(number), b"user.value"));
        assert!(removed.unwrap());
    }
    store
        .write::<_, Error>(|txn| txn.set_xattr(Ino(0), b"user.value", &[8; 60_000], verbfs_namespace::SetXattr::Create))
        .unwrap();
}

#[test]
fn a_full_disk_is_an_error_and_no_signal() {
    let directory = tempfile::tempdir().unwrap();
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "limited_child", "--nocapture"])
        .env(LIMITED, directory.path())
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let store = Store::open(directory.path(), options()).unwrap();
    assert_eq!(store.read(|txn| txn.xattr(Ino(0), b"user.value")).unwrap(), Some(vec![8; 60_000]));
    assert_eq!(store.read(|txn| txn.xattr(Ino(1), b"user.value")).unwrap(), None);
}
