//! Inodes, directory entries, extended attributes and extents in an embedded transactional store.
//!
//! One [`Store`] holds what one node is home of. [`Store::read`] runs on a snapshot, [`Store::write`] commits on Ok and
//! leaves no trace on Err. A caller that changes several things in one transaction gets all of them or none.
//!
//! # What survives
//! - A committed transaction survives the death of the process at any instant (`kill -9`): it is in the operating
//!   system's page cache when [`Store::write`] returns, and the page that makes it valid is written last.
//! - Loss of power: what was committed before the last [`Store::sync`] is on disk. Commits *after* it may reach the disk in any
//!   order, and LMDB has no checksums, so a store that was written to after its last sync must be taken for lost
//!   when the power goes. (The arena beside it is on tmpfs and is gone then in any case.)
//! - Damaged records give [`Error::Corrupt`], which names table and key. Damage to LMDB's own pages is not always noticed.
//!
//! # Bytes
//! Keys are big-endian, so that they sort as numbers do; records are little-endian, without padding.
//!
//! ```text
//! table     key                                 record
//! store     "format"                            "verbfsNS" | version u32 | 0 u32
//!           "next-sequence"                     first inode sequence not yet durably taken u64
//! meta      name, 1 to 255 bytes of UTF-8       the daemon's bytes
//! inodes    ino u64                             see below
//! symlinks  ino u64                             target, 1 to 4095 bytes
//! parents   ino u64 of a directory              ino u64 of the directory it is in
//! entries   directory u64 | cursor u64          ino u64 | kind u8 | name length u8 | 0 u16 | name, 1 to 255 bytes
//!           directory u64 | 0 u64               number of entries u64; absent if there are none
//! xattrs    ino u64 | name, 1 to 255 bytes      value, 0 to 65536 bytes
//! extents   ino u64 | first page u64            first arena page u64 | pages u64
//! orphans   ino u64                             nothing
//! replies   slot u16 | incarnation u32 | sequence u64    the daemon's bytes
//! prepared  the same                                     the daemon's bytes
//!
//! inode     0        1      2           4        8       12      16       20       24
//!           +--------+------+-----------+--------+-------+-------+--------+--------+
//!           | 1      | kind | flags u16 | mode   | uid   | gid   | nlink  | rdev   |  u32 each
//!           +--------+------+-----------+--------+-------+-------+--------+--------+
//!        24 | size u64 | pages u64 | truncate generation u64                        |
//!           +----------+-----------+------------------------------------------------+
//!        48 | seconds i64 of atime | of mtime | of ctime | of crtime                |
//!           +----------------------+----------+----------+--------------------------+
//!        80 | nanoseconds u32 of atime | of mtime | of ctime | of crtime            |
//!           +--------------------------+----------+----------+----------------------+
//!        96 | chunk pages u32 | width u16 | 0 u16 | slot u16, width times           |
//!           +-----------------+-----------+-------+---------------------------------+
//!
//! kind      1 regular  2 directory  3 symlink  4 fifo  5 socket  6 character device  7 block device
//! flags     bit 0: has_xattrs; others 0
//! ```
//! Cursors are drawn in `hash`: [`name_hash`] with the number of the collision in its low bits.
//!
//! # Why LMDB
//! `store-bench` (an example of this crate) creates a million files in one directory with one commit each, looks them up in scattered order,
//! unlinks a tenth, and kills a writing process. Two cores of a virtual machine that builds and tests were running on as well, tmpfs, all engines
//! in one run; times in microseconds, memory of the process with all files in place, in MB (pages of tmpfs not counted):
//!
//! ```text
//!                             create us         lookup us       unlink  memory, MB          disk
//! engine             files     mean      p99     mean      p99     mean      heap    mapped       MB
//! Store            1000000      9.2     10.1     3.97     3.67     13.3         8         3      268
//! heed no-sync     1000000     27.0     28.5     2.39     2.86     25.1         8         3      231
//! heed write-map   1000000      5.7      9.2     3.61     3.02      9.8         8         3      231
//! redb durable        2000     89.0    121.3     3.14     1.77     80.9         1         4        0
//! redb no-sync     1000000     74.7    469.9     5.59     6.60     88.7       261         4        0
//! fjall            1000000     21.1     58.9    14.56    40.13     27.5       301         4      516
//! after kill -9: commits acknowledged, lost
//! Store               3639        0
//! heed no-sync        3046        0
//! heed write-map      3000        0
//! redb durable         300        0
//! redb no-sync        3000     3000
//! fjall               3051        0
//! ```
//! - redb keeps commits without sync in its own memory: they die with the process. With sync they cost a disk's flush each.
//! - fjall survives and writes fast, but looks up slower, keeps hundreds of megabytes on its own heap, and compacts on
//!   threads of its own, on a machine whose two cores serve three daemons.
//! - LMDB looks up from the page cache without copying, has next to no heap, and its commit through the mapping (WRITE_MAP) costs a
//!   fifth of the one through pwrite. (On the machine's disk, ext4, while it was quiet, in one run: 3.0 against 21.8 microseconds a create; redb with
//!   sync 344, without 77; fjall 9.0, and 9.5 a look-up against 1.8.) The dangers of WRITE_MAP are met: a store into a hole of a file on a full disk would be SIGBUS, so all that
//!   is mapped is allocated first (`store::HEADROOM`); a wild pointer could reach the mapping, as it could the arena.
//! - `Store` differs from bare `heed` by what it does more: entry counts, collisions, checks, encoding.

mod entry;
mod error;
mod extent;
mod hash;
mod inode;
mod operation;
mod record;
mod store;
mod xattr;

pub use entry::{Entry, Listed};
pub use error::Error;
pub use extent::Run;
pub use hash::{COLLISIONS_MAX, CURSOR_MIN, name_hash};
pub use operation::META_KEY_MAX;
pub use store::{
    Access, CommitObserver, DEFAULT_MAP_SIZE, FORMAT_VERSION, MIN_MAP_SIZE, ReadTransaction, Reading, Store,
    StoreOptions, Transaction, Usage, WriteTransaction, Writing,
};
pub use xattr::SetXattr;
