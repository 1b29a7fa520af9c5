//! Inodes, directory entries, xattrs and extents in an embedded transactional store

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
    Access, DEFAULT_MAP_SIZE, FORMAT_VERSION, MIN_MAP_SIZE, ReadTransaction, Reading, Store, StoreOptions, Transaction, Usage,
    WriteTransaction, Writing,
};
pub use xattr::SetXattr;
