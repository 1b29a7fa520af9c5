//! What can go wrong in the store, and the errno a caller of the file system sees.

use std::io;
use std::path::PathBuf;

/// Why an operation on the store failed. A failed operation inside a write
/// transaction leaves the transaction usable only for the variants for which
/// [`Error::is_harmless`] says so; after any other, abort it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The store has reached its configured size, or the file system below it is full.
    #[error("the name-space store is full")]
    Full,
    /// A record read from disk does not decode.
    #[error("corrupt record in table {table}, key {key}: {reason}")]
    Corrupt { table: &'static str, key: String, reason: &'static str },
    /// The directory holds something that is not a verbfs store.
    #[error("{0} holds no verbfs store: {1}")]
    NotAStore(PathBuf, &'static str),
    /// The store was written in another version of the format.
    #[error("the store has format version {found}, this program reads version {supported}")]
    Version { found: u32, supported: u32 },
    /// Another process, or another [`crate::Store`] of this one, has the store open.
    #[error("the store in {0} is in use")]
    InUse(PathBuf),
    /// An extended attribute to be created exists.
    #[error("the extended attribute exists")]
    AttributeExists,
    /// An extended attribute to be replaced does not exist.
    #[error("the extended attribute does not exist")]
    AttributeMissing,
    /// A name is empty or longer than [`verbfs_protocol::NAME_MAX`].
    #[error("a name of {0} bytes")]
    NameLength(usize),
    /// A value is longer than the limit of its kind, bytes.
    #[error("a value of {length} bytes, at most {limit} are allowed")]
    ValueLength { length: usize, limit: usize },
    /// More than [`crate::COLLISIONS_MAX`] names of one directory share a hash.
    #[error("too many names with one hash in a directory")]
    Collisions,
    /// A page run is empty or reaches beyond the last page number.
    #[error("invalid page run")]
    InvalidRun,
    /// All 2^48 inode numbers of this home are used up.
    #[error("no inode number is left")]
    SequenceExhausted,
    /// A fault asked for by [`crate::Store::fail_commits_after`].
    #[error("injected commit failure")]
    Injected,
    /// The operating system refused a file operation.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// LMDB failed in a way that has no variant of its own.
    #[error("store engine: {0}")]
    Engine(heed::Error),
}

/// Linux errno values, which are what FUSE and the protocol carry.
mod errno {
    pub const EIO: i32 = 5;
    pub const E2BIG: i32 = 7;
    pub const EEXIST: i32 = 17;
    pub const EBUSY: i32 = 16;
    pub const EINVAL: i32 = 22;
    pub const ENOSPC: i32 = 28;
    pub const ENAMETOOLONG: i32 = 36;
    pub const ENODATA: i32 = 61;
}

impl Error {
    /// The errno to answer a caller with.
    pub fn errno(&self) -> i32 {
        match self {
            Error::Full | Error::Collisions | Error::SequenceExhausted => errno::ENOSPC,
            Error::AttributeExists => errno::EEXIST,
            Error::AttributeMissing => errno::ENODATA,
            Error::NameLength(0) | Error::InvalidRun => errno::EINVAL,
            Error::NameLength(_) => errno::ENAMETOOLONG,
            Error::ValueLength { .. } => errno::E2BIG,
            Error::InUse(_) => errno::EBUSY,
            Error::Io(error) => error.raw_os_error().unwrap_or(errno::EIO),
            Error::Corrupt { .. }
            | Error::NotAStore(..)
            | Error::Version { .. }
            | Error::Injected
            | Error::Engine(_) => errno::EIO,
        }
    }

    /// Whether a write transaction that met this error may go on: nothing was changed by the refused call.
    pub fn is_harmless(&self) -> bool {
        matches!(
            self,
            Error::AttributeExists
                | Error::AttributeMissing
                | Error::NameLength(_)
                | Error::ValueLength { .. }
                | Error::Collisions
                | Error::InvalidRun
                | Error::SequenceExhausted
        )
    }
}

impl From<heed::Error> for Error {
    fn from(error: heed::Error) -> Error {
        match error {
            heed::Error::Mdb(heed::MdbError::MapFull) => Error::Full,
            heed::Error::Io(error) if error.raw_os_error() == Some(errno::ENOSPC) => Error::Full,
            heed::Error::Io(error) => Error::Io(error),
            other => Error::Engine(other),
        }
    }
}
