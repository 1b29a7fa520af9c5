//! A node's storage: mapped memory allocated in extents.
//!
//! [`Arena`] is a preallocated file, mapped whole; [`Allocator`] knows its free pages; [`ExtentTable`] knows which of
//! them hold which pages of which file.
//!
//! The life of a page: free, perhaps *reserved* (counted only), *uncommitted* (a client may write it one-sided; for everybody else it
//! reads as zeros), *committed* (in the store: its bytes count and survive the daemon), free again. What a page
//! held before is never cleared: nobody may read an extent that is not committed.

mod allocator;
mod arena;
mod error;
mod table;

pub use allocator::{Allocator, Claim, Pages};
pub use arena::{ARENA_MAX, Arena, ArenaOptions};
pub use error::Error;
pub use table::{Change, ExtentTable};
