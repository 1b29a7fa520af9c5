//! What a file is: attributes, times, layout.

use crate::wire::{List, UpTo, wire};
use crate::{Ino, Slot};

wire! {
    /// A point of wall-clock time, as stat(2) shows it.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
    pub struct Time {
        pub seconds: i64,
        /// 0 ..= 999_999_999
        pub nanoseconds: u32 as UpTo<999_999_999>,
    }

    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub enum FileKind {
        Regular = 1,
        Directory = 2,
        Symlink = 3,
        Fifo = 4,
        Socket = 5,
        CharacterDevice = 6,
        BlockDevice = 7,
    }

    /// Where the pages of a file are stored: chunk `k` (of `chunk_pages` pages) at slot
    /// `slots[k % slots.len()]`. `slots[0]` is the inode's home. Empty for what has no data.
    #[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Layout {
        pub chunk_pages: u32,
        pub slots: Vec<Slot> as List<{ Layout::MAX_WIDTH }>,
    }
}

impl Layout {
    /// Most slots a file may be striped over.
    pub const MAX_WIDTH: usize = 64;

    pub fn slot_of_page(&self, page: u64) -> Slot {
        self.slots[(page / self.chunk_pages as u64 % self.slots.len() as u64) as usize]
    }
    /// A layout that came from a peer or the disk is usable for data.
    pub fn is_valid(&self) -> bool {
        self.chunk_pages > 0 && !self.slots.is_empty() && self.slots.len() <= Self::MAX_WIDTH
    }
}

wire! {
    /// Everything stat(2) shows of an inode, and its layout.
    #[derive(Clone, Debug, PartialEq, Eq, Hash)]
    pub struct Attributes {
        pub ino: Ino,
        pub kind: FileKind,
        /// Permission, set-id and sticky bits: `mode & 0o7777`.
        pub mode: u32 as UpTo<0o7777>,
        pub uid: u32,
        pub gid: u32,
        pub nlink: u32,
        pub rdev: u32,
        /// Bytes. For a directory, the number of its entries.
        pub size: u64,
        /// Pages allocated to the file on all nodes.
        pub pages: u64,
        pub atime: Time,
        pub mtime: Time,
        pub ctime: Time,
        pub crtime: Time,
        /// Raised by every truncation; names the state of the layout (PROTOCOL.md: trunc_gen).
        pub truncate_generation: u64,
        /// Set when the file has a POSIX ACL or any `security.` attribute that a write must look at.
        pub has_xattrs: bool,
        /// Last: all that has varying length.
        pub layout: Layout,
    }

    /// What a holder of ATTR X or E changed: travels with Release and Glimpsed.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct AttributeReport {
        /// Under E: the size is at least this. Under X: it is this.
        pub size: u64,
        /// Under X the size is exact, also where it is smaller than what the home has.
        pub exact_size: bool,
        /// The last change of data this node knows of; replaces mtime and ctime unless older than what the home exposed.
        pub touched: Option<Time>,
        /// Pages allocated less pages freed by this holder since its last report.
        pub pages_delta: i64,
        /// Truncations since the last report.
        pub truncations: u64,
    }
}
