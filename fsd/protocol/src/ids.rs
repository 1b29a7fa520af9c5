//! Identifiers. All integers; none is ever reused within its scope.

use crate::wire::{self, Fault, Malformed, Reader, Wire, wire};

/// Bytes in a page: the unit of caching, of data locks and of allocation.
pub const PAGE_SIZE: u64 = 4096;

/// Place of a node in the volume: 0 decides membership and is the root's home.
pub type Slot = u16;

/// An inode number. The upper 16 bits are the *home*: the slot that keeps the
/// inode's attributes and locks and, for a directory, its entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ino(pub u64);

impl Ino {
    /// The root directory: home slot 0, number 1 (what FUSE calls the root).
    pub const ROOT: Ino = Ino(1);
    /// Bits below the home slot.
    pub const LOCAL_BITS: u32 = 48;

    /// The `sequence`-th inode born at `home`. `sequence` must be below 2^48.
    pub fn new(home: Slot, sequence: u64) -> Ino {
        debug_assert!(sequence < 1 << Self::LOCAL_BITS);
        Ino((home as u64) << Self::LOCAL_BITS | sequence)
    }
    pub fn home(self) -> Slot {
        (self.0 >> Self::LOCAL_BITS) as Slot
    }
    pub fn sequence(self) -> u64 {
        self.0 & ((1 << Self::LOCAL_BITS) - 1)
    }
}

impl Wire for Ino {
    const SIZE: Option<usize> = Some(8);
    const MINIMUM: usize = 8;
    #[inline]
    fn encode(&self, out: &mut Vec<u8>) {
        self.0.encode(out);
    }
    #[inline]
    fn decode(reader: &mut Reader<'_>) -> wire::Result<Ino> {
        u64::decode(reader).map(Ino)
    }
    #[cfg(feature = "sample")]
    fn sample(source: &mut dyn wire::Source) -> Ino {
        Ino(u64::sample(source))
    }
}

impl std::fmt::Display for Ino {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.home(), self.sequence())
    }
}

wire! {
    /// A node of one incarnation: a node that was evicted and came back is another one.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
    pub struct Node {
        pub slot: Slot,
        pub incarnation: u32,
    }

    /// Names one grant for ever (PROTOCOL.md: gid). `server_incarnation` is the incarnation of the server's lock table.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
    pub struct GrantId {
        pub server: Slot,
        pub server_incarnation: u32,
        pub sequence: u64,
    }

    /// Names one lock request of a client node for ever (PROTOCOL.md: req_id).
    #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
    pub struct RequestId {
        pub node: Node,
        pub sequence: u64,
    }
}

/// Names one name-space operation for ever; its reply is stored under it (PROTOCOL.md: op_id).
pub type OperationId = RequestId;

/// A half-open range `[lo, hi)`, never empty where it names a lock. The space it
/// lies in depends on the class: NAME = hash of a name, DATA = page of the file, others `[0, 1)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Range {
    pub lo: u64,
    pub hi: u64,
}

impl Range {
    pub const ALL: Range = Range { lo: 0, hi: u64::MAX };
    pub const UNIT: Range = Range { lo: 0, hi: 1 };

    pub const fn new(lo: u64, hi: u64) -> Range {
        Range { lo, hi }
    }
    pub fn is_empty(self) -> bool {
        self.lo >= self.hi
    }
    pub fn len(self) -> u64 {
        self.hi.saturating_sub(self.lo)
    }
    pub fn overlaps(self, other: Range) -> bool {
        self.lo < other.hi && other.lo < self.hi
    }
    pub fn contains(self, other: Range) -> bool {
        self.lo <= other.lo && other.hi <= self.hi
    }
    pub fn intersect(self, other: Range) -> Range {
        Range { lo: self.lo.max(other.lo), hi: self.hi.min(other.hi) }
    }
    /// What is left of `self` without `other`: at most two pieces.
    pub fn without(self, other: Range) -> impl Iterator<Item = Range> {
        let pieces = if self.overlaps(other) {
            [Range { lo: self.lo, hi: other.lo.max(self.lo) }, Range { lo: other.hi.min(self.hi), hi: self.hi }]
        } else {
            [self, Range { lo: 0, hi: 0 }]
        };
        pieces.into_iter().filter(|piece| !piece.is_empty())
    }
    /// The smallest range that holds both.
    pub fn hull(self, other: Range) -> Range {
        Range { lo: self.lo.min(other.lo), hi: self.hi.max(other.hi) }
    }
}

/// Start, then end. A range may be empty, its end never lies before its start.
impl Wire for Range {
    const SIZE: Option<usize> = Some(16);
    const MINIMUM: usize = 16;
    #[inline]
    fn encode(&self, out: &mut Vec<u8>) {
        self.lo.encode(out);
        self.hi.encode(out);
    }
    #[inline]
    fn decode(reader: &mut Reader<'_>) -> wire::Result<Range> {
        let range = Range { lo: u64::decode(reader)?, hi: u64::decode(reader)? };
        if range.lo > range.hi {
            return Err(Malformed::new(Fault::Inverted { lo: range.lo, hi: range.hi }));
        }
        Ok(range)
    }
    #[cfg(feature = "sample")]
    fn sample(source: &mut dyn wire::Source) -> Range {
        let (one, other) = (u64::sample(source), u64::sample(source));
        if source.is_lawful() { Range::new(one.min(other), one.max(other)) } else { Range::new(one, other) }
    }
}

impl std::fmt::Display for Range {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.hi == u64::MAX { write!(f, "[{}, end)", self.lo) } else { write!(f, "[{}, {})", self.lo, self.hi) }
    }
}

wire! {
    /// Lock classes in locking order: a call takes its pins in this order (PROTOCOL.md, Resources).
    #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
    pub enum Class {
        /// Renames of directories between directories; one per volume, at slot 0.
        Rename = 1,
        /// Entries of a directory, by hash of the name.
        Name = 2,
        /// Held S while any process of a node has the file open.
        Open = 3,
        /// Attributes: size, times, mode, owner, links.
        Attr = 4,
        /// Pages of a file that one server stores.
        Data = 5,
    }

    /// What a lock is about. The order of this type is the locking order.
    ///
    /// `server` is the slot that grants locks on it: the inode's home, or for DATA the slot
    /// that stores the pages: a striped file has one DATA resource per slot of its layout, and a
    /// range of it covers only those pages of the range that the slot stores.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
    pub struct Resource {
        pub class: Class,
        pub ino: Ino,
        pub server: Slot,
    }
}

impl Resource {
    pub fn rename() -> Resource {
        Resource { class: Class::Rename, ino: Ino::ROOT, server: 0 }
    }
    pub fn name(directory: Ino) -> Resource {
        Resource { class: Class::Name, ino: directory, server: directory.home() }
    }
    pub fn open(ino: Ino) -> Resource {
        Resource { class: Class::Open, ino, server: ino.home() }
    }
    pub fn attr(ino: Ino) -> Resource {
        Resource { class: Class::Attr, ino, server: ino.home() }
    }
    pub fn data(ino: Ino, server: Slot) -> Resource {
        Resource { class: Class::Data, ino, server }
    }
}

impl std::fmt::Display for Resource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}({})@{}", self.class, self.ino, self.server)
    }
}

wire! {
    /// Lock modes (PROTOCOL.md, Modes). E exists for ATTR only.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
    pub enum Mode {
        /// Shared: may cache.
        S = 1,
        /// Extend: may raise the size and touch mtime; compatible with other E.
        E = 2,
        /// Exclusive: may dirty.
        X = 3,
    }
}

impl Mode {
    /// Whether two *different* nodes may hold these at once on overlapping ranges.
    pub fn compatible(self, other: Mode) -> bool {
        matches!((self, other), (Mode::S, Mode::S) | (Mode::E, Mode::E))
    }
    /// Whether holding `self` permits what `wanted` permits.
    pub fn covers(self, wanted: Mode) -> bool {
        self == wanted || self == Mode::X
    }
}
