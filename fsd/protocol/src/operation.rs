//! Name-space operations, storage requests and the envelope of lock messages.

use crate::lock::{Lane, LockMessage};
use crate::{AttributeReport, Attributes, FileKind, GrantId, Ino, OperationId, Range, Resource, Slot, Time};
use serde::{Deserialize, Serialize};

/// Longest name of a directory entry, bytes.
pub const NAME_MAX: usize = 255;
/// Longest target of a symbolic link, bytes.
pub const SYMLINK_MAX: usize = 4095;
/// Longest value of an extended attribute, bytes.
pub const XATTR_VALUE_MAX: usize = 64 << 10;
/// Most page runs named by one COMMIT or hand-over.
pub const RUNS_MAX: usize = 4096;

/// One message between nodes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Message {
    Lock(Envelope),
    Request {
        id: u64,
        request: Request,
    },
    Reply {
        id: u64,
        reply: Result<Reply, i32>,
    },
    HandOver(HandOver),
    /// Heartbeat; answered by an echo.
    Beat {
        number: u64,
        echo: bool,
    },
}

/// A lock message with what the volumes attach to it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Envelope {
    pub message: LockMessage,
    /// With Grant and Observed of ATTR: the attributes, and the home's clock.
    pub attributes: Option<Box<Attributes>>,
    pub home_time: Option<Time>,
    /// With Release and Glimpsed of ATTR.
    pub report: Option<AttributeReport>,
}

/// A run of pages of a file and where its home's arena has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    /// First page of the file.
    pub page: u64,
    /// First page of the arena.
    pub arena_page: u64,
    pub pages: u64,
    /// Not committed: reads as zeros for everybody but who allocated it.
    pub committed: bool,
}

/// A page of a hand-over: where it lies in the old holder's cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandOverPage {
    pub page: u64,
    /// Byte offset in the old holder's registered cache.
    pub offset: u64,
    pub dirty: bool,
}

/// From the old holder to its successor, which fetches the pages one-sided.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandOver {
    pub resource: Resource,
    /// The successor's grant.
    pub new_grant: GrantId,
    pub old_grant: GrantId,
    pub range: Range,
    /// Key of the old holder's cache region.
    pub key: u32,
    pub pages: Vec<HandOverPage>,
}

/// The identity that asks, for what the home decides by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Caller {
    pub uid: u32,
    pub gid: u32,
    pub pid: u32,
}

/// What a new inode is to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewInode {
    pub kind: FileKind,
    /// Permission bits as asked for, before umask or default ACL.
    pub mode: u32,
    pub umask: u32,
    pub rdev: u32,
    /// Target of a symbolic link.
    pub target: Vec<u8>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum NewTime {
    Now,
    At(Time),
}

/// What setattr changes at the home. Sizes are changed by truncation, see the volume.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    pub mode: Option<u32>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    pub atime: Option<NewTime>,
    pub mtime: Option<NewTime>,
    /// Clear set-user-id and set-group-id as a write by an ordinary user does.
    pub clear_set_id: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RenameFlags {
    pub no_replace: bool,
    pub exchange: bool,
}

/// A directory entry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listed {
    pub name: Vec<u8>,
    pub ino: Ino,
    pub kind: FileKind,
    /// Where a scan goes on behind this entry; below 2^63.
    pub cursor: u64,
}

/// Which of the two spaces of advisory locks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum LockSpace {
    Posix,
    Flock,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct LockOwner {
    pub slot: Slot,
    pub incarnation: u32,
    pub owner: u64,
    pub pid: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileLockKind {
    Read,
    Write,
    Unlock,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileLock {
    pub start: u64,
    /// Inclusive, as in FUSE.
    pub end: u64,
    pub kind: FileLockKind,
    pub owner: LockOwner,
}

/// Changes of one home, applied in one transaction.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Update {
    PutEntry {
        directory: Ino,
        name: Vec<u8>,
        ino: Ino,
        kind: FileKind,
    },
    DeleteEntry {
        directory: Ino,
        name: Vec<u8>,
    },
    /// Entries came or went: times, entry count and link count (subdirectories).
    Touch {
        directory: Ino,
        entries: i64,
        links: i64,
        time: Time,
    },
    CreateInode {
        attributes: Box<Attributes>,
        target: Vec<u8>,
        parent: Option<Ino>,
        xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    },
    /// Link count of something that is not a directory; at zero it becomes an orphan.
    Links {
        ino: Ino,
        delta: i64,
        time: Time,
    },
    /// A directory that must be empty becomes an orphan.
    RemoveDirectory {
        ino: Ino,
        time: Time,
    },
    /// A renamed inode: ctime, and for a directory its new parent.
    Moved {
        ino: Ino,
        parent: Option<Ino>,
        time: Time,
    },
}

impl Update {
    /// The inode whose home applies this.
    pub fn ino(&self) -> Ino {
        match self {
            Update::PutEntry { directory, .. }
            | Update::DeleteEntry { directory, .. }
            | Update::Touch { directory, .. } => *directory,
            Update::CreateInode { attributes, .. } => attributes.ino,
            Update::Links { ino, .. } | Update::RemoveDirectory { ino, .. } | Update::Moved { ino, .. } => *ino,
        }
    }
}

/// What one node asks of another and gets a [`Reply`] to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Request {
    /// A name-space operation, executed by the home under its own locks. Lane NS.
    Operation {
        operation: OperationId,
        acked_below: u64,
        caller: Caller,
        kind: Operation,
    },
    // ---- lane IO: answered without waiting, but for Sync, Flush and Prepare
    /// An entry, read under the asker's NAME lock.
    Lookup {
        directory: Ino,
        name: Vec<u8>,
    },
    /// Entries from `cursor` on, read under the asker's NAME lock.
    List {
        directory: Ino,
        cursor: u64,
        limit: u32,
    },
    /// The parent of a directory.
    Parent {
        directory: Ino,
    },
    /// A fresh inode number.
    ReserveInode,
    ReadLink {
        ino: Ino,
    },
    GetXattr {
        ino: Ino,
        name: Vec<u8>,
    },
    ListXattr {
        ino: Ino,
    },
    /// Extents of a range, read under the asker's DATA lock.
    Layout {
        ino: Ino,
        range: Range,
    },
    /// The same, allocating what is missing, under the asker's DATA X. `zero`: write zeros to what is new and commit it (fallocate).
    Allocate {
        ino: Ino,
        range: Range,
        zero: bool,
    },
    /// Pages were written to their extents.
    Commit {
        ino: Ino,
        ranges: Vec<Range>,
    },
    /// Give pages back, under the asker's DATA X.
    Free {
        ino: Ino,
        range: Range,
    },
    /// Have all holders write back, then make data and attributes of `ino` here durable.
    Sync {
        ino: Ino,
    },
    /// To a holder: write back what is dirty in the range, keep the lock.
    Flush {
        resource: Resource,
        range: Range,
    },
    Prepare {
        transaction: OperationId,
        updates: Vec<Update>,
    },
    Decide {
        transaction: OperationId,
        commit: bool,
    },
    SetFileLock {
        ino: Ino,
        space: LockSpace,
        lock: FileLock,
        wait: bool,
        token: u64,
    },
    GetFileLock {
        ino: Ino,
        space: LockSpace,
        lock: FileLock,
    },
    /// The waiting caller gave up.
    CancelFileLock {
        ino: Ino,
        token: u64,
    },
    /// All locks of an owner go (close).
    ReleaseFileLocks {
        ino: Ino,
        space: LockSpace,
        owner: LockOwner,
    },
    /// For whom does this owner wait here?
    WaitsFor {
        owner: LockOwner,
    },
    Statfs,
    Describe {
        resource: Resource,
    },
    DescribeFileLocks {
        ino: Ino,
    },
}

/// What a home does for a client under its own locks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Operation {
    /// `opening`: the asker opens what it makes; the inode stays for that, whoever unlinks it meanwhile.
    Create {
        parent: Ino,
        name: Vec<u8>,
        new: NewInode,
        exclusive: bool,
        opening: bool,
    },
    MakeDirectory {
        parent: Ino,
        name: Vec<u8>,
        new: NewInode,
    },
    Unlink {
        parent: Ino,
        name: Vec<u8>,
    },
    RemoveDirectory {
        parent: Ino,
        name: Vec<u8>,
    },
    Link {
        ino: Ino,
        parent: Ino,
        name: Vec<u8>,
    },
    Rename {
        parent: Ino,
        name: Vec<u8>,
        new_parent: Ino,
        new_name: Vec<u8>,
        flags: RenameFlags,
    },
    Change {
        ino: Ino,
        change: Change,
    },
    SetXattr {
        ino: Ino,
        name: Vec<u8>,
        value: Vec<u8>,
        create: bool,
        replace: bool,
    },
    RemoveXattr {
        ino: Ino,
        name: Vec<u8>,
    },
}

/// Space and inodes of one node, or summed over the volume.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Space {
    pub pages: u64,
    pub free_pages: u64,
    pub inodes: u64,
    pub free_inodes: u64,
}

/// A grant or waiter as `verbfs locks` shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    pub slot: Slot,
    pub range: Range,
    pub mode: crate::Mode,
    pub state: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Reply {
    Done,
    Attributes(Box<Attributes>),
    /// Of an operation that may find the file there: `created` says which.
    Created {
        attributes: Box<Attributes>,
        created: bool,
    },
    Entry(Option<(Ino, FileKind)>),
    Entries {
        entries: Vec<Listed>,
        end: bool,
    },
    Ino(Ino),
    Bytes(Vec<u8>),
    Names(Vec<Vec<u8>>),
    /// `key` names the arena; all pages of the asked range without extent are holes.
    /// `allocated`: pages that were new.
    Extents {
        key: u32,
        extents: Vec<Extent>,
        allocated: u64,
    },
    /// Written back; of ATTR also what the holder changed.
    Flushed {
        report: Option<AttributeReport>,
    },
    Freed(u64),
    /// The attributes of all inodes a decision changed.
    Decided(Vec<Attributes>),
    FileLock(Option<FileLock>),
    /// Each with its space and whether it is waited for.
    FileLocks(Vec<(FileLock, LockSpace, bool)>),
    Owners(Vec<LockOwner>),
    Space(Space),
    Holders {
        holders: Vec<Holder>,
        waiters: Vec<Holder>,
    },
}

impl Message {
    /// The lane this message travels in.
    pub fn lane(&self) -> Lane {
        match self {
            Message::Lock(envelope) => envelope.message.lane(),
            Message::Request { request, .. } => match request {
                Request::Operation { .. } => Lane::Ns,
                Request::Flush { .. } => Lane::Ctrl,
                _ => Lane::Io,
            },
            Message::HandOver(_) => Lane::Io,
            Message::Reply { .. } | Message::Beat { .. } => Lane::Ack,
        }
    }

    /// The `type` of the header.
    pub fn message_type(&self) -> u16 {
        match self {
            Message::Lock(_) => 1,
            Message::Request { .. } => 2,
            Message::Reply { .. } => 3,
            Message::HandOver(_) => 4,
            Message::Beat { .. } => 5,
        }
    }
}
