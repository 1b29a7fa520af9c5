//! The environment: opening, transactions, sync.

use crate::record::{FormatRecord, Place, decode_u64};
use crate::{Error, hash, name_hash};
use heed::types::Bytes;
use heed::{Database, Env, EnvFlags, EnvOpenOptions, RoTxn, RwTxn, WithoutTls};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};
use zerocopy::{FromBytes, IntoBytes};

/// First bytes of the format record.
const MAGIC: [u8; 8] = *b"verbfsNS";
/// Version of the layouts drawn in the crate's documentation.
pub const FORMAT_VERSION: u32 = 1;
/// Name of the file that is locked while the store is open.
const LOCK_FILE: &str = "in-use";
/// Map size unless set: address space, not memory or disk. About 10 million small files.
pub const DEFAULT_MAP_SIZE: usize = 16 << 30;
/// Smallest map size: the empty tables take 15 pages, and a copy of what a transaction changes must fit beside them.
pub const MIN_MAP_SIZE: usize = 1 << 20;
/// LMDB writes through its mapping here, and a store into a hole of the file on a full file system would kill the process. So
/// only what is allocated on the file system is mapped, and before every write transaction at least this much of it lies unused:
/// a transaction that touches more new pages than this (4096) meets a full store, though larger map sizes are allowed.
const HEADROOM: usize = 16 << 20;
/// What is mapped grows by this much: a remapping every 100 thousand creates.
const GROWTH: usize = 32 << 20;
/// The file LMDB keeps everything in.
const DATA_FILE: &str = "data.mdb";
/// Room beyond what is mapped that only [`Store::write_reclaiming`] may use: a copy-on-write store needs pages even to delete.
/// It is allocated on the file system too, so that a full one can be emptied. Removing a file copies fewer than 100 of its 2048 pages.
const RECLAIM_RESERVE: usize = 8 << 20;
/// Inode sequences are made durable by blocks of this many: one more write per 4096 creates, and at most that many numbers of 2^48 lost per restart.
const SEQUENCE_BLOCK: u64 = 4096;
/// 0 is no inode and 1 is the root.
const SEQUENCE_FIRST: u64 = 2;
/// One beyond the last sequence an inode number can carry.
const SEQUENCE_END: u64 = 1 << verbfs_protocol::Ino::LOCAL_BITS;

const FORMAT_KEY: &[u8] = b"format";
const SEQUENCE_KEY: &[u8] = b"next-sequence";

pub(crate) type Table = Database<Bytes, Bytes>;

/// How to open a store.
#[derive(Clone, Debug)]
pub struct StoreOptions {
    /// Most bytes the store may grow to; a multiple of the page size, at least [`MIN_MAP_SIZE`].
    /// It may differ from one opening to the next; below what is in use it counts as that.
    pub map_size: usize,
    /// Hash of names. [`name_hash`] everywhere but in tests that want collisions. What it returns is
    /// cut to the form of `name_hash`.
    pub name_hash: fn(&[u8]) -> u64,
}

impl Default for StoreOptions {
    fn default() -> StoreOptions {
        StoreOptions { map_size: DEFAULT_MAP_SIZE, name_hash }
    }
}

/// Told how long each write transaction took that has committed.
pub type CommitObserver = Box<dyn FnMut(Duration) + Send>;

/// What the store takes on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Bytes the store may grow to.
    pub limit: u64,
    /// Bytes up to the last page ever used; pages freed since are used again and still counted.
    pub high_water: u64,
}

pub(crate) struct Tables {
    /// The store's own records.
    pub store: Table,
    pub meta: Table,
    pub inodes: Table,
    pub symlinks: Table,
    pub parents: Table,
    pub entries: Table,
    pub xattrs: Table,
    pub extents: Table,
    pub orphans: Table,
    pub replies: Table,
    pub prepared: Table,
    pub name_hash: fn(&[u8]) -> u64,
}
/// Tables above.
const TABLES: u32 = 11;

impl Tables {
    pub fn hash(&self, name: &[u8]) -> u64 {
        let hash = (self.name_hash)(name);
        if hash.is_multiple_of(hash::COLLISIONS_MAX) && (hash::CURSOR_MIN..1 << 63).contains(&hash) {
            hash
        } else {
            hash::fit(hash)
        }
    }
}

/// The numbers `next..limit` are durably ours. `next > limit` after an aborted transaction took some: those are skipped.
#[derive(Clone, Copy)]
pub(crate) struct Sequence {
    next: u64,
    limit: u64,
}

/// The name-space store of one node. See the crate's documentation.
pub struct Store {
    env: Env<WithoutTls>,
    tables: Tables,
    /// LMDB's file, for allocating it on the file system.
    data: File,
    /// Most bytes the store may grow to.
    limit: usize,
    /// Bytes mapped, all of them allocated on the file system.
    mapped: usize,
    sequence: Sequence,
    /// Write transactions begun.
    transactions: u64,
    commits_before_failure: Option<u64>,
    on_commit: Option<CommitObserver>,
    /// Locked while the store is open. Declared last: the environment is closed first.
    _in_use: File,
}

/// A snapshot: sees the last committed state.
pub type ReadTransaction<'s> = Transaction<'s, Reading<'s>>;
/// The one writer: sees its own changes.
pub type WriteTransaction<'s> = Transaction<'s, Writing<'s>>;

/// Access to the tables; what can be done depends on `A`.
pub struct Transaction<'s, A> {
    pub(crate) tables: &'s Tables,
    pub(crate) access: A,
    /// Encoding buffer, so that a put allocates nothing.
    pub(crate) buffer: Vec<u8>,
}

/// A way into the tables: [`Reading`] or [`Writing`].
pub trait Access: sealed::View {}
impl Access for Reading<'_> {}
impl Access for Writing<'_> {}

mod sealed {
    pub trait View {
        fn view(&self) -> &heed::RoTxn<'_>;
    }
}
pub(crate) use sealed::View;

/// What a [`ReadTransaction`] holds.
pub struct Reading<'s>(RoTxn<'s, WithoutTls>);

/// What a [`WriteTransaction`] holds.
pub struct Writing<'s> {
    pub(crate) txn: RwTxn<'s>,
    sequence: Sequence,
    number: u64,
}

impl View for Reading<'_> {
    fn view(&self) -> &RoTxn<'_> {
        &self.0
    }
}

impl View for Writing<'_> {
    fn view(&self) -> &RoTxn<'_> {
        &self.txn
    }
}

impl Store {
    /// Opens the store in `directory`, making both if they do not exist.
    ///
    /// # Errors
    /// [`Error::InUse`], [`Error::NotAStore`], [`Error::Version`], [`Error::Corrupt`] for the store's own
    /// records, [`Error::Full`] if a new store does not fit, [`Error::Io`].
    pub fn open(directory: &Path, options: StoreOptions) -> Result<Store, Error> {
        std::fs::create_dir_all(directory)?;
        let in_use = File::options().create(true).truncate(false).write(true).open(directory.join(LOCK_FILE))?;
        match in_use.try_lock() {
            Ok(()) => {}
            Err(std::fs::TryLockError::WouldBlock) => return Err(Error::InUse(directory.into())),
            Err(std::fs::TryLockError::Error(error)) => return Err(error.into()),
        }
        let limit = options.map_size.max(MIN_MAP_SIZE).next_multiple_of(verbfs_protocol::PAGE_SIZE as usize);
        let mut builder = EnvOpenOptions::new().read_txn_without_tls();
        // LMDB itself raises this to what an existing store uses.
        builder.map_size(limit.min(GROWTH)).max_dbs(TABLES);
        // SAFETY: NO_SYNC gives up only power-loss safety between syncs, which the crate documents. With WRITE_MAP, all
        // that is mapped is allocated before it is written (`allocate`), so that a store to it cannot fault; borrowed records are
        // never written to. Locking stays on.
        unsafe { builder.flags(EnvFlags::NO_SYNC | EnvFlags::WRITE_MAP | EnvFlags::NO_READ_AHEAD) };
        // SAFETY: the file is not changed behind LMDB's back: the lock taken above keeps every other
        // opener of this crate out, and the directory is the daemon's own.
        let env = match unsafe { builder.open(directory) } {
            Ok(env) => env,
            Err(heed::Error::Mdb(heed::MdbError::Invalid | heed::MdbError::VersionMismatch)) => {
                return Err(Error::NotAStore(directory.into(), "the data file is not LMDB's"));
            }
            Err(heed::Error::EnvAlreadyOpened) => return Err(Error::InUse(directory.into())),
            Err(error) => return Err(error.into()),
        };

        let data = File::options().read(true).write(true).open(directory.join(DATA_FILE))?;
        let mapped = env.info().map_size;
        allocate(&data, mapped)?;
        reserve(&data, mapped);

        let mut txn = env.write_txn()?;
        let mut table = |name: &str| -> Result<Table, Error> { Ok(env.create_database(&mut txn, Some(name))?) };
        let tables = Tables {
            store: table("store")?,
            meta: table("meta")?,
            inodes: table("inodes")?,
            symlinks: table("symlinks")?,
            parents: table("parents")?,
            entries: table("entries")?,
            xattrs: table("xattrs")?,
            extents: table("extents")?,
            orphans: table("orphans")?,
            replies: table("replies")?,
            prepared: table("prepared")?,
            name_hash: options.name_hash,
        };
        match tables.store.get(&txn, FORMAT_KEY)? {
            None if tables.inodes.is_empty(&txn)? && tables.entries.is_empty(&txn)? => {
                tables.store.put(&mut txn, FORMAT_KEY, FormatRecord::new(MAGIC, FORMAT_VERSION).as_bytes())?;
            }
            None => return Err(Error::NotAStore(directory.into(), "the format record is missing")),
            Some(bytes) => {
                let place = Place { table: "store", key: FORMAT_KEY };
                let record = FormatRecord::ref_from_bytes(bytes)
                    .map_err(|_| place.corrupt("not the length of a format record"))?;
                if record.magic != MAGIC {
                    return Err(Error::NotAStore(directory.into(), "the format record is another program's"));
                }
                if record.version.get() != FORMAT_VERSION {
                    return Err(Error::Version { found: record.version.get(), supported: FORMAT_VERSION });
                }
            }
        }
        let durable = match tables.store.get(&txn, SEQUENCE_KEY)? {
            None => SEQUENCE_FIRST,
            Some(bytes) => {
                let place = Place { table: "store", key: SEQUENCE_KEY };
                let next = decode_u64(place, bytes)?;
                if !(SEQUENCE_FIRST..=SEQUENCE_END).contains(&next) {
                    return Err(place.corrupt("no inode sequence"));
                }
                next
            }
        };
        txn.commit()?;
        let sequence = Sequence { next: durable, limit: durable };
        Ok(Store {
            env,
            tables,
            data,
            limit,
            mapped,
            sequence,
            transactions: 0,
            commits_before_failure: None,
            on_commit: None,
            _in_use: in_use,
        })
    }

    /// Runs `read` on a snapshot of the last committed state.
    pub fn read<T, E: From<Error>>(&self, read: impl FnOnce(&ReadTransaction<'_>) -> Result<T, E>) -> Result<T, E> {
        let txn = self.env.read_txn().map_err(Error::from)?;
        read(&Transaction { tables: &self.tables, access: Reading(txn), buffer: Vec::new() })
    }

    /// Runs `write` and commits what it did if it returns Ok; otherwise nothing has happened.
    /// A committed transaction survives the death of the process; [`Store::sync`] makes it survive loss of power.
    ///
    /// # Errors
    /// Those of `write`, and [`Error::Full`], [`Error::Io`], [`Error::Engine`] from the commit: nothing has happened then either.
    pub fn write<T, E: From<Error>>(
        &mut self,
        write: impl FnOnce(&mut WriteTransaction<'_>) -> Result<T, E>,
    ) -> Result<T, E> {
        self.make_headroom()?;
        self.transactions += 1;
        let began = self.on_commit.is_some().then(Instant::now);
        let txn = self.env.write_txn().map_err(Error::from)?;
        let access = Writing { txn, sequence: self.sequence, number: self.transactions };
        let mut transaction = Transaction { tables: &self.tables, access, buffer: Vec::new() };
        let result = write(&mut transaction);
        let Writing { txn, sequence, .. } = transaction.access;
        // Numbers once given out are never given out again, even if the transaction that took them aborts.
        self.sequence.next = sequence.next;
        let value = result?;
        if let Some(left) = &mut self.commits_before_failure {
            if *left == 0 {
                return Err(Error::Injected.into());
            }
            *left -= 1;
        }
        txn.commit().map_err(Error::from)?;
        self.sequence = sequence;
        if let (Some(observe), Some(began)) = (&mut self.on_commit, began) {
            observe(began.elapsed());
        }
        Ok(value)
    }

    /// Like [`Store::write`], for transactions that give space back (unlink, truncate, pruning): they succeed on a full
    /// store too. `write` runs a second time, from the old state, if the first run met a full store.
    ///
    /// `is_full` says whether an error of the caller's type is [`Error::Full`].
    pub fn write_reclaiming<T, E: From<Error>>(
        &mut self,
        is_full: impl Fn(&E) -> bool,
        mut write: impl FnMut(&mut WriteTransaction<'_>) -> Result<T, E>,
    ) -> Result<T, E> {
        match self.write(&mut write) {
            Err(error) if is_full(&error) => {}
            other => return other,
        }
        let regular = self.mapped;
        self.map(self.limit.max(self.high_water()) + RECLAIM_RESERVE)?;
        let result = self.write(&mut write);
        // Down to what is in use, if that is more: LMDB sees to it.
        self.resize(regular)?;
        result
    }

    /// Has `observer` told of every commit from now on. It must be quick: the caller of [`Store::write`] waits for it.
    pub fn observe_commits(&mut self, observer: CommitObserver) {
        self.on_commit = Some(observer);
    }

    fn high_water(&self) -> usize {
        (self.env.info().last_page_number + 1) * verbfs_protocol::PAGE_SIZE as usize
    }

    /// Maps more if less than [`HEADROOM`] is unused and the limit allows it.
    fn make_headroom(&mut self) -> Result<(), Error> {
        let needed = self.high_water() + HEADROOM;
        if needed <= self.mapped || self.limit <= self.mapped {
            return Ok(());
        }
        let size = (needed + GROWTH).min(self.limit);
        // The reserve goes with it: better to be full a little earlier than to be stuck.
        match allocate(&self.data, size + RECLAIM_RESERVE).and_then(|()| self.map(size)) {
            // Free pages within what is mapped may do.
            Err(Error::Full) => Ok(()),
            other => other,
        }
    }

    /// Maps `size` bytes, allocated before.
    fn map(&mut self, size: usize) -> Result<(), Error> {
        allocate(&self.data, size)?;
        self.resize(size)
    }

    fn resize(&mut self, size: usize) -> Result<(), Error> {
        // SAFETY: no transaction is open: they exist only inside `read` and `write`, and `&mut self` excludes both.
        unsafe { self.env.resize(size)? };
        self.mapped = self.env.info().map_size;
        reserve(&self.data, self.mapped);
        Ok(())
    }

    /// Makes every committed transaction survive loss of power. Blocks for as long as the disk takes; nothing on tmpfs.
    pub fn sync(&self) -> Result<(), Error> {
        Ok(self.env.force_sync()?)
    }

    /// Number of inodes.
    pub fn inode_count(&self) -> Result<u64, Error> {
        self.read(|txn| txn.inode_count())
    }

    pub fn usage(&self) -> Usage {
        let high_water = self.high_water();
        Usage { limit: self.limit.max(high_water) as u64, high_water: high_water as u64 }
    }

    /// For tests: after `commits` more successful commits, every commit fails with [`Error::Injected`]; None ends it.
    pub fn fail_commits_after(&mut self, commits: Option<u64>) {
        self.commits_before_failure = commits;
    }
}

/// Allocates the first `size` bytes of a file on the file system below.
fn allocate(file: &File, size: usize) -> Result<(), Error> {
    loop {
        // SAFETY: no memory is passed; the descriptor is open for as long as `file` is borrowed.
        match unsafe { libc::posix_fallocate(file.as_raw_fd(), 0, size as libc::off_t) } {
            0 => return Ok(()),
            libc::EINTR => {}
            libc::ENOSPC | libc::EDQUOT | libc::EFBIG => return Err(Error::Full),
            error => return Err(std::io::Error::from_raw_os_error(error).into()),
        }
    }
}

/// Allocates [`RECLAIM_RESERVE`] behind the first `mapped` bytes, which are the length of the file: LMDB cuts it to that when it maps.
/// Should that fail, deletions on a full file system may fail too.
fn reserve(file: &File, mapped: usize) {
    // SAFETY: as in `allocate`.
    unsafe {
        libc::fallocate(
            file.as_raw_fd(),
            libc::FALLOC_FL_KEEP_SIZE,
            mapped as libc::off_t,
            RECLAIM_RESERVE as libc::off_t,
        );
    }
}

impl Transaction<'_, Writing<'_>> {
    /// Takes the next inode sequence of this store (at least 2): never given out before, nor ever after.
    ///
    /// # Errors
    /// [`Error::SequenceExhausted`] after 2^48.
    pub fn allocate_sequence(&mut self) -> Result<u64, Error> {
        let sequence = &mut self.access.sequence;
        if sequence.next >= SEQUENCE_END {
            return Err(Error::SequenceExhausted);
        }
        if sequence.next >= sequence.limit {
            let limit = (sequence.next + SEQUENCE_BLOCK).min(SEQUENCE_END);
            self.tables.store.put(&mut self.access.txn, SEQUENCE_KEY, &limit.to_le_bytes())?;
            sequence.limit = limit;
        }
        let taken = sequence.next;
        sequence.next += 1;
        Ok(taken)
    }

    /// Number of this write transaction, from 1: no other one of this opening of the store has it.
    pub fn id(&self) -> u64 {
        self.access.number
    }
}
