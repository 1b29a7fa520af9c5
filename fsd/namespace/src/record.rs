//! The bytes of keys and records. The layouts are drawn in the crate's documentation.

use crate::Error;
use crate::extent::Run;
use verbfs_protocol::{Attributes, FileKind, Ino, Layout, OperationId, Slot, Time};
use zerocopy::little_endian::{I64, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Version byte of an inode record.
const INODE_VERSION: u8 = 1;
/// Nanoseconds are below this.
const NANOSECONDS_PER_SECOND: u32 = 1_000_000_000;
const FLAG_HAS_XATTRS: u16 = 1;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct InodeRecord {
    version: u8,
    kind: u8,
    flags: U16,
    mode: U32,
    uid: U32,
    gid: U32,
    nlink: U32,
    rdev: U32,
    size: U64,
    pages: U64,
    truncate_generation: U64,
    /// atime, mtime, ctime, crtime
    seconds: [I64; 4],
    nanoseconds: [U32; 4],
    chunk_pages: U32,
    width: U16,
    reserved: U16,
}
const _: () = assert!(size_of::<InodeRecord>() == 104);

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct EntryRecord {
    pub ino: U64,
    pub kind: u8,
    pub name_length: u8,
    reserved: U16,
}
const _: () = assert!(size_of::<EntryRecord>() == 12);

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct ExtentRecord {
    pub arena_page: U64,
    pub pages: U64,
}
const _: () = assert!(size_of::<ExtentRecord>() == 16);

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct FormatRecord {
    pub magic: [u8; 8],
    pub version: U32,
    reserved: U32,
}
const _: () = assert!(size_of::<FormatRecord>() == 16);

impl FormatRecord {
    pub fn new(magic: [u8; 8], version: u32) -> FormatRecord {
        FormatRecord { magic, version: U32::new(version), reserved: U32::new(0) }
    }
}

/// The byte that stands for a kind, in inode and entry records.
fn kind_byte(kind: FileKind) -> u8 {
    match kind {
        FileKind::Regular => 1,
        FileKind::Directory => 2,
        FileKind::Symlink => 3,
        FileKind::Fifo => 4,
        FileKind::Socket => 5,
        FileKind::CharacterDevice => 6,
        FileKind::BlockDevice => 7,
    }
}

pub(crate) fn kind_from_byte(byte: u8) -> Option<FileKind> {
    Some(match byte {
        1 => FileKind::Regular,
        2 => FileKind::Directory,
        3 => FileKind::Symlink,
        4 => FileKind::Fifo,
        5 => FileKind::Socket,
        6 => FileKind::CharacterDevice,
        7 => FileKind::BlockDevice,
        _ => return None,
    })
}

/// Where a record stands, for errors.
#[derive(Clone, Copy)]
pub(crate) struct Place<'a> {
    pub table: &'static str,
    pub key: &'a [u8],
}

impl Place<'_> {
    pub fn corrupt(&self, reason: &'static str) -> Error {
        let hex: String = self.key.iter().map(|byte| format!("{byte:02x}")).collect();
        let key = match (self.table, self.key.first_chunk::<8>()) {
            ("inodes" | "symlinks" | "parents" | "entries" | "xattrs" | "extents" | "orphans", Some(ino)) => {
                format!("{hex} (inode {})", Ino(u64::from_be_bytes(*ino)))
            }
            _ => hex,
        };
        Error::Corrupt { table: self.table, key, reason }
    }
}

pub(crate) fn encode_inode(attributes: &Attributes, bytes: &mut Vec<u8>) -> Result<(), Error> {
    let width = attributes.layout.slots.len();
    if width > Layout::MAX_WIDTH {
        return Err(Error::ValueLength { length: width, limit: Layout::MAX_WIDTH });
    }
    let times = [attributes.atime, attributes.mtime, attributes.ctime, attributes.crtime];
    debug_assert!(times.iter().all(|time| time.nanoseconds < NANOSECONDS_PER_SECOND));
    let record = InodeRecord {
        version: INODE_VERSION,
        kind: kind_byte(attributes.kind),
        flags: U16::new(if attributes.has_xattrs { FLAG_HAS_XATTRS } else { 0 }),
        mode: U32::new(attributes.mode),
        uid: U32::new(attributes.uid),
        gid: U32::new(attributes.gid),
        nlink: U32::new(attributes.nlink),
        rdev: U32::new(attributes.rdev),
        size: U64::new(attributes.size),
        pages: U64::new(attributes.pages),
        truncate_generation: U64::new(attributes.truncate_generation),
        seconds: times.map(|time| I64::new(time.seconds)),
        nanoseconds: times.map(|time| U32::new(time.nanoseconds)),
        chunk_pages: U32::new(attributes.layout.chunk_pages),
        width: U16::new(width as u16),
        reserved: U16::new(0),
    };
    bytes.clear();
    bytes.extend_from_slice(record.as_bytes());
    for &slot in &attributes.layout.slots {
        bytes.extend_from_slice(&slot.to_le_bytes());
    }
    Ok(())
}

pub(crate) fn decode_inode(place: Place<'_>, ino: Ino, bytes: &[u8]) -> Result<Attributes, Error> {
    let (record, slots) =
        InodeRecord::ref_from_prefix(bytes).map_err(|_| place.corrupt("shorter than an inode record"))?;
    if record.version != INODE_VERSION {
        return Err(place.corrupt("unknown version of inode record"));
    }
    let kind = kind_from_byte(record.kind).ok_or_else(|| place.corrupt("unknown kind of file"))?;
    let flags = record.flags.get();
    if flags & !FLAG_HAS_XATTRS != 0 || record.reserved.get() != 0 {
        return Err(place.corrupt("unknown flags"));
    }
    let width = record.width.get() as usize;
    if width > Layout::MAX_WIDTH || slots.len() != width * size_of::<Slot>() {
        return Err(place.corrupt("wrong number of slots in the layout"));
    }
    if width > 0 && record.chunk_pages.get() == 0 {
        return Err(place.corrupt("chunks of no pages"));
    }
    if record.nanoseconds.iter().any(|nanoseconds| nanoseconds.get() >= NANOSECONDS_PER_SECOND) {
        return Err(place.corrupt("nanoseconds beyond a second"));
    }
    let time =
        |which: usize| Time { seconds: record.seconds[which].get(), nanoseconds: record.nanoseconds[which].get() };
    Ok(Attributes {
        ino,
        kind,
        mode: record.mode.get(),
        uid: record.uid.get(),
        gid: record.gid.get(),
        nlink: record.nlink.get(),
        rdev: record.rdev.get(),
        size: record.size.get(),
        pages: record.pages.get(),
        atime: time(0),
        mtime: time(1),
        ctime: time(2),
        crtime: time(3),
        truncate_generation: record.truncate_generation.get(),
        layout: Layout {
            chunk_pages: record.chunk_pages.get(),
            slots: slots.chunks_exact(2).map(|slot| Slot::from_le_bytes([slot[0], slot[1]])).collect(),
        },
        has_xattrs: flags & FLAG_HAS_XATTRS != 0,
    })
}

pub(crate) fn encode_entry(ino: Ino, kind: FileKind, name: &[u8], bytes: &mut Vec<u8>) {
    debug_assert!(!name.is_empty() && name.len() <= u8::MAX as usize);
    let record = EntryRecord {
        ino: U64::new(ino.0),
        kind: kind_byte(kind),
        name_length: name.len() as u8,
        reserved: U16::new(0),
    };
    bytes.clear();
    bytes.extend_from_slice(record.as_bytes());
    bytes.extend_from_slice(name);
}

/// The inode, its kind and the name.
pub(crate) fn decode_entry<'a>(place: Place<'_>, bytes: &'a [u8]) -> Result<(Ino, FileKind, &'a [u8]), Error> {
    let (record, name) =
        EntryRecord::ref_from_prefix(bytes).map_err(|_| place.corrupt("shorter than an entry record"))?;
    let kind = kind_from_byte(record.kind).ok_or_else(|| place.corrupt("unknown kind of file"))?;
    if name.is_empty() || name.len() != record.name_length as usize || record.reserved.get() != 0 {
        return Err(place.corrupt("wrong length of name"));
    }
    Ok((Ino(record.ino.get()), kind, name))
}

pub(crate) fn encode_extent(run: Run) -> ExtentRecord {
    ExtentRecord { arena_page: U64::new(run.arena_page), pages: U64::new(run.pages) }
}

/// The inode and the run of an extent.
pub(crate) fn decode_extent(key: &[u8], bytes: &[u8]) -> Result<(Ino, Run), Error> {
    let place = Place { table: "extents", key };
    let (ino, page) = split_pair(place)?;
    let record =
        ExtentRecord::ref_from_bytes(bytes).map_err(|_| place.corrupt("not the length of an extent record"))?;
    let run = Run { page, arena_page: record.arena_page.get(), pages: record.pages.get() };
    if !run.is_valid() {
        return Err(place.corrupt("empty extent or one beyond the last page number"));
    }
    Ok((Ino(ino), run))
}

pub(crate) fn decode_u64(place: Place<'_>, bytes: &[u8]) -> Result<u64, Error> {
    bytes.try_into().map(u64::from_le_bytes).map_err(|_| place.corrupt("not the length of a number"))
}

pub(crate) fn ino_key(ino: Ino) -> [u8; 8] {
    ino.0.to_be_bytes()
}

pub(crate) fn split_ino(place: Place<'_>) -> Result<Ino, Error> {
    place
        .key
        .try_into()
        .map(|bytes| Ino(u64::from_be_bytes(bytes)))
        .map_err(|_| place.corrupt("not the length of an inode number"))
}

/// (directory, cursor) and (inode, page).
pub(crate) fn pair_key(ino: Ino, second: u64) -> [u8; 16] {
    let mut key = [0; 16];
    key[..8].copy_from_slice(&ino.0.to_be_bytes());
    key[8..].copy_from_slice(&second.to_be_bytes());
    key
}

pub(crate) fn split_pair(place: Place<'_>) -> Result<(u64, u64), Error> {
    let key: &[u8; 16] = place.key.try_into().map_err(|_| place.corrupt("key is not of 16 bytes"))?;
    let (first, second) = key.split_at(8);
    let number = |bytes: &[u8]| u64::from_be_bytes(bytes.try_into().expect("halves of 16 bytes"));
    Ok((number(first), number(second)))
}

/// Slot, incarnation, sequence of an operation: 2 + 4 + 8 bytes, ordered.
pub(crate) fn operation_key(operation: OperationId) -> [u8; 14] {
    let mut key = [0; 14];
    key[..2].copy_from_slice(&operation.node.slot.to_be_bytes());
    key[2..6].copy_from_slice(&operation.node.incarnation.to_be_bytes());
    key[6..].copy_from_slice(&operation.sequence.to_be_bytes());
    key
}

pub(crate) fn split_operation(place: Place<'_>) -> Result<OperationId, Error> {
    let key: &[u8; 14] = place.key.try_into().map_err(|_| place.corrupt("key is not of 14 bytes"))?;
    Ok(OperationId {
        node: verbfs_protocol::Node {
            slot: Slot::from_be_bytes([key[0], key[1]]),
            incarnation: u32::from_be_bytes(key[2..6].try_into().expect("4 bytes")),
        },
        sequence: u64::from_be_bytes(key[6..].try_into().expect("8 bytes")),
    })
}
