//! Name-space operations, storage requests and the envelope of lock messages.

use crate::DecodeError;
use crate::header::{self, Source};
use crate::lock::{Lane, LockMessage};
use crate::wire::{Bytes, Codec, ErrorNumber, Fault, List, Malformed, Reader, Text, Variants, Wire, wire};
use crate::{AttributeReport, Attributes, FileKind, GrantId, Ino, OperationId, Range, Resource, Slot, Time};

/// Longest name of a directory entry, bytes.
pub const NAME_MAX: usize = 255;
/// Longest target of a symbolic link, bytes.
pub const SYMLINK_MAX: usize = 4095;
/// Longest value of an extended attribute, bytes.
pub const XATTR_VALUE_MAX: usize = 64 << 10;
/// Most page runs named by one COMMIT, most pages named by one hand-over.
pub const RUNS_MAX: usize = 4096;
/// Entries in one reply to LIST at most: about 40 KiB of names of usual length, at most 280 KiB.
pub const LIST_MAX: usize = 1024;
/// Extents in one reply at most: 800 KiB. Who asks about more is told E2BIG and asks about less.
pub const EXTENTS_MAX: usize = 32 << 10;
/// Updates of one home in one transaction at most: a rename has the most, fewer than ten.
pub const UPDATES_MAX: usize = 64;
/// Entries that travel with the lock on their hash: more names than that share one hash hardly ever.
pub const HASH_ENTRIES_MAX: usize = 4;
/// Extended attributes of a new inode at most: the two lists of its ACL.
pub const UPDATE_XATTRS_MAX: usize = 2;
/// Longest list of the names of a file's extended attributes, bytes with a terminator each (XATTR_LIST_MAX of Linux).
pub const XATTR_LIST_MAX: usize = 64 << 10;
/// Most names in such a list: none is empty.
pub const XATTR_NAMES_MAX: usize = XATTR_LIST_MAX / 2;
/// Most fcntl and flock locks that a home tells of one file, for people to read.
pub const FILE_LOCKS_MAX: usize = 16 << 10;
/// Most owners that one owner is said to wait for.
pub const OWNERS_MAX: usize = 16 << 10;
/// Most holders, and most waiters, that a home tells of one resource, for people to read.
pub const HOLDERS_MAX: usize = 4096;
/// Longest state of a holder or waiter, bytes.
pub const STATE_MAX: usize = 64;

// What a mailbox takes in one payload is 1 MiB; the longest lists stay below it.
const PAYLOAD_MAX: usize = 1 << 20;
const _: () = assert!(EXTENTS_MAX * size_of_element::<Extent>() < PAYLOAD_MAX - 1024);
const _: () = assert!(RUNS_MAX * size_of_element::<HandOverPage>() < PAYLOAD_MAX - 1024);
const _: () = assert!(RUNS_MAX * size_of_element::<Range>() < PAYLOAD_MAX - 1024);
const _: () = assert!(FILE_LOCKS_MAX * size_of_element::<(FileLock, LockSpace, bool)>() < PAYLOAD_MAX - 1024);
const _: () = assert!(OWNERS_MAX * size_of_element::<(u64, LockOwner)>() < PAYLOAD_MAX - 1024);
const _: () = assert!(2 * HOLDERS_MAX * (Holder::MINIMUM + STATE_MAX) < PAYLOAD_MAX - 1024);
const _: () = assert!(LIST_MAX * (Listed::MINIMUM + NAME_MAX) < PAYLOAD_MAX - 1024);

const fn size_of_element<T: Wire>() -> usize {
    match T::SIZE {
        Some(size) => size,
        None => panic!("elements of varying length"),
    }
}

/// One message between nodes. The `type` of the header says which, and with which variant: its upper byte is the
/// group below, its lower byte the number of the variant ([`LockMessage`], [`Request`], [`Reply`]).
#[derive(Clone, Debug, PartialEq)]
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

/// Groups of messages. Never renumbered.
pub mod group {
    pub const LOCK: u8 = 1;
    pub const REQUEST: u8 = 2;
    pub const REPLY: u8 = 3;
    pub const HAND_OVER: u8 = 4;
    pub const BEAT: u8 = 5;
}
/// In the place of a reply's variant: the request failed, an errno follows.
pub const REPLY_FAILED: u8 = 0;

/// A lock message with what the volumes attach to it.
///
/// Behind the lock message's fields stands one byte that says what is attached, a bit for each: 1 the home's time, 2 a
/// report, 4 attributes, 8 entries. What is attached follows, in this order; what is not takes no room.
#[derive(Clone, Debug, PartialEq)]
pub struct Envelope {
    pub message: LockMessage,
    /// With Grant and Observed of ATTR: the attributes, and the home's clock.
    pub attributes: Option<Box<Attributes>>,
    pub home_time: Option<Time>,
    /// With Release and Glimpsed of ATTR.
    pub report: Option<AttributeReport>,
    /// With Grant of NAME that was asked for one hash: all entries of that hash.
    pub entries: Option<HashEntries>,
}

const ATTACHED_HOME_TIME: u8 = 1;
const ATTACHED_REPORT: u8 = 2;
const ATTACHED_ATTRIBUTES: u8 = 4;
const ATTACHED_ENTRIES: u8 = 8;
const ATTACHED_ALL: u8 = ATTACHED_HOME_TIME | ATTACHED_REPORT | ATTACHED_ATTRIBUTES | ATTACHED_ENTRIES;

impl Envelope {
    fn encode_body(&self, out: &mut Vec<u8>) {
        self.message.encode_fields(out);
        let mut attached = 0;
        if self.home_time.is_some() {
            attached |= ATTACHED_HOME_TIME;
        }
        if self.report.is_some() {
            attached |= ATTACHED_REPORT;
        }
        if self.attributes.is_some() {
            attached |= ATTACHED_ATTRIBUTES;
        }
        if self.entries.is_some() {
            attached |= ATTACHED_ENTRIES;
        }
        out.push(attached);
        self.home_time.iter().for_each(|time| time.encode(out));
        self.report.iter().for_each(|report| report.encode(out));
        self.attributes.iter().for_each(|attributes| attributes.encode(out));
        self.entries.iter().for_each(|entries| entries.encode(out));
    }

    fn decode_body(number: u8, reader: &mut Reader<'_>) -> Result<Envelope, Malformed> {
        let message = LockMessage::decode_fields(number, reader)?;
        let value = u8::decode(reader).map_err(|malformed| malformed.within("attached"))?;
        if value & !ATTACHED_ALL != 0 {
            return Err(Malformed::new(Fault::Unknown { what: "set of attachments", value }).within("attached"));
        }
        fn attached<T: Wire>(there: bool, name: &'static str, reader: &mut Reader<'_>) -> Result<Option<T>, Malformed> {
            there.then(|| T::decode(reader).map_err(|malformed| malformed.within(name))).transpose()
        }
        Ok(Envelope {
            message,
            home_time: attached(value & ATTACHED_HOME_TIME != 0, "home_time", reader)?,
            report: attached(value & ATTACHED_REPORT != 0, "report", reader)?,
            attributes: attached(value & ATTACHED_ATTRIBUTES != 0, "attributes", reader)?,
            entries: attached(value & ATTACHED_ENTRIES != 0, "entries", reader)?,
        })
    }
}

wire! {
    /// A run of pages of a file and where its home's arena has it.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct HandOverPage {
        pub page: u64,
        /// Byte offset in the old holder's registered cache.
        pub offset: u64,
        pub dirty: bool,
    }

    /// From the old holder to its successor, which fetches the pages one-sided.
    #[derive(Clone, Debug, PartialEq, Eq)]
    pub struct HandOver {
        pub resource: Resource,
        /// The successor's grant.
        pub new_grant: GrantId,
        pub old_grant: GrantId,
        pub range: Range,
        /// Key of the old holder's cache region.
        pub key: u32,
        pub pages: Vec<HandOverPage> as List<RUNS_MAX>,
        /// Pages allocated ahead that hold nothing and do not count as the file's yet: the successor's to use or give back.
        pub spare: Vec<Range> as List<RUNS_MAX>,
    }

    /// The identity that asks, for what the home decides by it.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Caller {
        pub uid: u32,
        pub gid: u32,
        pub pid: u32,
    }

    /// What a new inode is to be.
    #[derive(Clone, Debug, PartialEq, Eq)]
    pub struct NewInode {
        pub kind: FileKind,
        /// Permission bits as asked for, before umask or default ACL.
        pub mode: u32,
        pub umask: u32,
        pub rdev: u32,
        /// Target of a symbolic link.
        pub target: Vec<u8> as Bytes<SYMLINK_MAX>,
    }

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum NewTime {
        Now = 1,
        At = 2 (time: Time),
    }

    /// What setattr changes at the home. Sizes are changed by truncation, see the volume.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Change {
        pub mode: Option<u32>,
        pub uid: Option<u32>,
        pub gid: Option<u32>,
        pub atime: Option<NewTime>,
        pub mtime: Option<NewTime>,
        /// Take away what a write takes away: file capabilities, and set-user-id and set-group-id unless root writes.
        pub clear_set_id: bool,
    }

    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub flags RenameFlags {
        pub no_replace = 1,
        pub exchange = 2,
    }

    /// A directory entry.
    #[derive(Clone, Debug, PartialEq, Eq)]
    pub struct Listed {
        pub name: Vec<u8> as Bytes<NAME_MAX>,
        pub ino: Ino,
        pub kind: FileKind,
        /// Where a scan goes on behind this entry; below 2^63.
        pub cursor: u64,
    }

    /// All entries of a directory whose names have one hash.
    #[derive(Clone, Debug, PartialEq, Eq)]
    pub struct HashEntries {
        pub hash: u64,
        pub entries: Vec<Listed> as List<HASH_ENTRIES_MAX>,
    }

    /// Which of the two spaces of advisory locks.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub enum LockSpace {
        Posix = 1,
        Flock = 2,
    }

    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
    pub struct LockOwner {
        pub slot: Slot,
        pub incarnation: u32,
        pub owner: u64,
        pub pid: u32,
    }

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum FileLockKind {
        Read = 1,
        Write = 2,
        Unlock = 3,
    }

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct FileLock {
        pub start: u64,
        /// Inclusive, as in FUSE.
        pub end: u64,
        pub kind: FileLockKind,
        pub owner: LockOwner,
    }

    /// Changes of one home, applied in one transaction.
    #[derive(Clone, Debug, PartialEq, Eq)]
    pub enum Update {
        PutEntry = 1 {
            directory: Ino,
            name: Vec<u8> as Bytes<NAME_MAX>,
            ino: Ino,
            kind: FileKind,
        },
        DeleteEntry = 2 {
            directory: Ino,
            name: Vec<u8> as Bytes<NAME_MAX>,
        },
        /// Entries came or went: times, entry count and link count (subdirectories).
        Touch = 3 {
            directory: Ino,
            entries: i64,
            links: i64,
            time: Time,
        },
        CreateInode = 4 {
            attributes: Box<Attributes>,
            target: Vec<u8> as Bytes<SYMLINK_MAX>,
            parent: Option<Ino>,
            xattrs: Vec<(Vec<u8>, Vec<u8>)> as List<UPDATE_XATTRS_MAX, (Bytes<NAME_MAX>, Bytes<XATTR_VALUE_MAX>)>,
        },
        /// Link count of something that is not a directory; at zero it becomes an orphan.
        Links = 5 {
            ino: Ino,
            delta: i64,
            time: Time,
        },
        /// A directory that must be empty becomes an orphan.
        RemoveDirectory = 6 {
            ino: Ino,
            time: Time,
        },
        /// A renamed inode: ctime, and for a directory its new parent.
        Moved = 7 {
            ino: Ino,
            parent: Option<Ino>,
            time: Time,
        },
    }
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

wire! {
    /// What one node asks of another and gets a [`Reply`] to.
    #[derive(Clone, Debug, PartialEq)]
    pub enum Request {
        /// A name-space operation, executed by the home under its own locks. Lane NS.
        Operation = 1 {
            operation: OperationId,
            acked_below: u64,
            caller: Caller,
            kind: Operation,
        },
        // ---- lane IO: answered without waiting, but for Sync, Flush and Prepare
        /// An entry, read under the asker's NAME lock.
        Lookup = 2 {
            directory: Ino,
            name: Vec<u8> as Bytes<NAME_MAX>,
        },
        /// Entries from `cursor` on, read under the asker's NAME lock.
        List = 3 {
            directory: Ino,
            cursor: u64,
            limit: u32,
        },
        /// The parent of a directory.
        Parent = 4 {
            directory: Ino,
        },
        /// A fresh inode number.
        ReserveInode = 5,
        ReadLink = 6 {
            ino: Ino,
        },
        GetXattr = 7 {
            ino: Ino,
            name: Vec<u8> as Bytes<NAME_MAX>,
        },
        ListXattr = 8 {
            ino: Ino,
        },
        /// Extents of a range, read under the asker's DATA lock.
        Layout = 9 {
            ino: Ino,
            range: Range,
        },
        /// The same, allocating what is missing, under the asker's DATA X. `zero`: write zeros to what is new and commit it (fallocate).
        Allocate = 10 {
            ino: Ino,
            range: Range,
            /// Around `range`, under the same lock: allocated too if there is plenty of space. The answer is about all of it.
            ahead: Range,
            zero: bool,
        },
        /// Pages were written to their extents.
        Commit = 11 {
            ino: Ino,
            ranges: Vec<Range> as List<RUNS_MAX>,
        },
        /// Give pages back, under the asker's DATA X.
        Free = 12 {
            ino: Ino,
            range: Range,
        },
        /// Have all holders write back, then make data and attributes of `ino` here durable.
        Sync = 13 {
            ino: Ino,
        },
        /// To a holder: write back what is dirty in the range, keep the lock.
        Flush = 14 {
            resource: Resource,
            range: Range,
        },
        Prepare = 15 {
            transaction: OperationId,
            updates: Vec<Update> as List<UPDATES_MAX>,
        },
        Decide = 16 {
            transaction: OperationId,
            commit: bool,
        },
        SetFileLock = 17 {
            ino: Ino,
            space: LockSpace,
            lock: FileLock,
            wait: bool,
            token: u64,
        },
        GetFileLock = 18 {
            ino: Ino,
            space: LockSpace,
            lock: FileLock,
        },
        /// The waiting caller gave up.
        CancelFileLock = 19 {
            ino: Ino,
            token: u64,
        },
        /// All locks of an owner go (close).
        ReleaseFileLocks = 20 {
            ino: Ino,
            space: LockSpace,
            owner: LockOwner,
        },
        /// For whom does this owner wait here?
        WaitsFor = 21 {
            owner: LockOwner,
        },
        Statfs = 22,
        Describe = 23 {
            resource: Resource,
        },
        DescribeFileLocks = 24 {
            ino: Ino,
        },
        /// Pages allocated ahead and not used, under the asker's DATA X.
        GiveBack = 25 {
            ino: Ino,
            ranges: Vec<Range> as List<RUNS_MAX>,
        },
        /// The asking server is short of space: give back what was allocated ahead there.
        ReturnSpare = 26,
    }

    /// What a home does for a client under its own locks.
    #[derive(Clone, Debug, PartialEq, Eq)]
    pub enum Operation {
        /// `opening`: the asker opens what it makes; the inode stays for that, whoever unlinks it meanwhile.
        Create = 1 {
            parent: Ino,
            name: Vec<u8> as Bytes<NAME_MAX>,
            new: NewInode,
            exclusive: bool,
            opening: bool,
        },
        MakeDirectory = 2 {
            parent: Ino,
            name: Vec<u8> as Bytes<NAME_MAX>,
            new: NewInode,
        },
        Unlink = 3 {
            parent: Ino,
            name: Vec<u8> as Bytes<NAME_MAX>,
        },
        RemoveDirectory = 4 {
            parent: Ino,
            name: Vec<u8> as Bytes<NAME_MAX>,
        },
        Link = 5 {
            ino: Ino,
            parent: Ino,
            name: Vec<u8> as Bytes<NAME_MAX>,
        },
        Rename = 6 {
            parent: Ino,
            name: Vec<u8> as Bytes<NAME_MAX>,
            new_parent: Ino,
            new_name: Vec<u8> as Bytes<NAME_MAX>,
            flags: RenameFlags,
        },
        Change = 7 {
            ino: Ino,
            change: Change,
        },
        SetXattr = 8 {
            ino: Ino,
            name: Vec<u8> as Bytes<NAME_MAX>,
            value: Vec<u8> as Bytes<XATTR_VALUE_MAX>,
            create: bool,
            replace: bool,
        },
        RemoveXattr = 9 {
            ino: Ino,
            name: Vec<u8> as Bytes<NAME_MAX>,
        },
    }

    /// Space and inodes of one node, or summed over the volume.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Space {
        pub pages: u64,
        pub free_pages: u64,
        pub inodes: u64,
        pub free_inodes: u64,
    }

    /// A grant or waiter as `verbfs locks` shows it.
    #[derive(Clone, Debug, PartialEq, Eq)]
    pub struct Holder {
        pub slot: Slot,
        pub range: Range,
        pub mode: crate::Mode,
        pub state: String as Text<STATE_MAX>,
    }

    #[derive(Clone, Debug, PartialEq)]
    pub enum Reply {
        Done = 1,
        Attributes = 2 (attributes: Box<Attributes>),
        /// Of an operation that may find the file there: `created` says which.
        Created = 3 {
            attributes: Box<Attributes>,
            created: bool,
        },
        Entry = 4 (entry: Option<(Ino, FileKind)>),
        Entries = 5 {
            entries: Vec<Listed> as List<LIST_MAX>,
            end: bool,
        },
        Ino = 6 (ino: Ino),
        Bytes = 7 (bytes: Vec<u8> as Bytes<XATTR_VALUE_MAX>),
        Names = 8 (names: Vec<Vec<u8>> as List<XATTR_NAMES_MAX, Bytes<NAME_MAX>>),
        /// `key` names the arena; all pages of the asked range without extent are holes.
        /// `allocated`: pages that were new.
        Extents = 9 {
            key: u32,
            extents: Vec<Extent> as List<EXTENTS_MAX>,
            allocated: u64,
        },
        /// Written back; of ATTR also what the holder changed.
        Flushed = 10 {
            report: Option<AttributeReport>,
        },
        Freed = 11 (pages: u64),
        /// The attributes of all inodes a decision changed.
        Decided = 12 (changed: Vec<Attributes> as List<UPDATES_MAX>),
        FileLock = 13 (lock: Option<FileLock>),
        /// Each with its space and whether it is waited for.
        FileLocks = 14 (locks: Vec<(FileLock, LockSpace, bool)> as List<FILE_LOCKS_MAX>),
        /// Each with the number of the wait that waits for it.
        Owners = 15 (owners: Vec<(u64, LockOwner)> as List<OWNERS_MAX>),
        Space = 16 (space: Space),
        Holders = 17 {
            holders: Vec<Holder> as List<HOLDERS_MAX>,
            waiters: Vec<Holder> as List<HOLDERS_MAX>,
        },
    }
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
        let (group, number) = match self {
            Message::Lock(envelope) => (group::LOCK, envelope.message.variant().number),
            Message::Request { request, .. } => (group::REQUEST, request.variant().number),
            Message::Reply { reply: Ok(reply), .. } => (group::REPLY, reply.variant().number),
            Message::Reply { reply: Err(_), .. } => (group::REPLY, REPLY_FAILED),
            Message::HandOver(_) => (group::HAND_OVER, 0),
            Message::Beat { .. } => (group::BEAT, 0),
        };
        u16::from_be_bytes([group, number])
    }

    fn encode_body(&self, out: &mut Vec<u8>) {
        match self {
            Message::Lock(envelope) => envelope.encode_body(out),
            Message::Request { id, request } => {
                id.encode(out);
                request.encode_fields(out);
            }
            Message::Reply { id, reply } => {
                id.encode(out);
                match reply {
                    Ok(reply) => reply.encode_fields(out),
                    Err(errno) => ErrorNumber::encode(errno, out),
                }
            }
            Message::HandOver(hand_over) => hand_over.encode(out),
            Message::Beat { number, echo } => {
                number.encode(out);
                echo.encode(out);
            }
        }
    }

    /// The body alone: what stands behind the header.
    pub fn body(&self) -> Vec<u8> {
        let mut body = Vec::new();
        self.encode_body(&mut body);
        body
    }

    /// Decodes the body of a message of this type.
    ///
    /// # Errors
    /// [`DecodeError::Type`], [`DecodeError::Body`].
    pub fn from_body(message_type: u16, body: &[u8]) -> Result<Message, DecodeError> {
        let mut reader = Reader::new(body);
        let reader = &mut reader;
        let message = match message_type.to_be_bytes() {
            [group::LOCK, number] => Message::Lock(Envelope::decode_body(number, reader)?),
            [group::REQUEST, number] => {
                Message::Request { id: u64::decode(reader)?, request: Request::decode_fields(number, reader)? }
            }
            [group::REPLY, REPLY_FAILED] => {
                let id = u64::decode(reader)?;
                let errno = ErrorNumber::decode(reader).map_err(|malformed| malformed.within("errno"))?;
                Message::Reply { id, reply: Err(errno) }
            }
            [group::REPLY, number] => {
                Message::Reply { id: u64::decode(reader)?, reply: Ok(Reply::decode_fields(number, reader)?) }
            }
            [group::HAND_OVER, 0] => Message::HandOver(HandOver::decode(reader)?),
            [group::BEAT, 0] => Message::Beat { number: u64::decode(reader)?, echo: bool::decode(reader)? },
            _ => return Err(DecodeError::Type(message_type)),
        };
        reader.end()?;
        Ok(message)
    }

    /// Header and body, as one record of the mailbox.
    pub fn record(&self, source: Source) -> Vec<u8> {
        // Room for all messages that hold no list.
        let mut record = Vec::with_capacity(header::HEADER_LENGTH + 256);
        record.resize(header::HEADER_LENGTH, 0);
        self.encode_body(&mut record);
        header::put(&mut record, source, self.message_type());
        record
    }

    /// Takes a record apart: who says it is from them, and the message.
    ///
    /// # Errors
    /// Every [`DecodeError`]: the record is not one that [`Message::record`] makes.
    pub fn from_record(record: &[u8]) -> Result<(Source, Message), DecodeError> {
        let (source, message_type, body) = header::unframe(record)?;
        Ok((source, Message::from_body(message_type, body)?))
    }

    /// A message of the given type, for tests; `None` if there is no such type.
    #[cfg(feature = "sample")]
    pub fn sample(message_type: u16, source: &mut dyn crate::wire::Source) -> Option<Message> {
        fn index_of<T: Variants>(number: u8) -> Option<usize> {
            T::VARIANTS.iter().position(|variant| variant.number == number)
        }
        Some(match message_type.to_be_bytes() {
            [group::LOCK, number] => Message::Lock(Envelope {
                message: LockMessage::sample_variant(index_of::<LockMessage>(number)?, source),
                home_time: Option::sample(source),
                report: Option::sample(source),
                attributes: Option::sample(source),
                entries: Option::sample(source),
            }),
            [group::REQUEST, number] => {
                let index = index_of::<Request>(number)?;
                Message::Request { id: u64::sample(source), request: Request::sample_variant(index, source) }
            }
            [group::REPLY, REPLY_FAILED] => {
                Message::Reply { id: u64::sample(source), reply: Err(ErrorNumber::sample(source)) }
            }
            [group::REPLY, number] => {
                let index = index_of::<Reply>(number)?;
                Message::Reply { id: u64::sample(source), reply: Ok(Reply::sample_variant(index, source)) }
            }
            [group::HAND_OVER, 0] => Message::HandOver(HandOver::sample(source)),
            [group::BEAT, 0] => Message::Beat { number: u64::sample(source), echo: bool::sample(source) },
            _ => return None,
        })
    }

    /// Every `type` there is.
    pub fn types() -> Vec<u16> {
        fn of(group: u8, variants: &[crate::wire::Variant]) -> impl Iterator<Item = u16> {
            variants.iter().map(move |variant| u16::from_be_bytes([group, variant.number]))
        }
        of(group::LOCK, LockMessage::VARIANTS)
            .chain(of(group::REQUEST, Request::VARIANTS))
            .chain([u16::from_be_bytes([group::REPLY, REPLY_FAILED])])
            .chain(of(group::REPLY, Reply::VARIANTS))
            .chain([u16::from_be_bytes([group::HAND_OVER, 0]), u16::from_be_bytes([group::BEAT, 0])])
            .collect()
    }
}

/// First byte of the record under which a participant keeps prepared updates.
const PREPARED_VERSION: u8 = 1;

/// The record of prepared updates, as a participant stores it: a version byte, then the list as it travels.
pub fn prepared_record(updates: &Vec<Update>) -> Vec<u8> {
    let mut record = vec![PREPARED_VERSION];
    <List<UPDATES_MAX>>::encode(updates, &mut record);
    record
}

/// # Errors
/// [`DecodeError::Version`], [`DecodeError::Body`].
pub fn parse_prepared_record(record: &[u8]) -> Result<Vec<Update>, DecodeError> {
    let mut reader = Reader::new(record);
    let version = u8::decode(&mut reader)?;
    if version != PREPARED_VERSION {
        return Err(DecodeError::Version(version.into()));
    }
    let updates = <List<UPDATES_MAX>>::decode(&mut reader)?;
    reader.end()?;
    Ok(updates)
}
