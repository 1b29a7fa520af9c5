//! Who holds fcntl locks through which open file of this mount.
//!
//! Two things need it. Every close(2) sends FLUSH with the closing process as lock owner; most
//! owners never locked anything, and for them no message should go to the file's home. And
//! locks of an *open file description* (`F_OFD_SETLK`) belong to no process: no FLUSH names their owner, so
//! they are freed when the open file goes.
//!
//! Why RELEASE may free what is left of an open file: a process that locked through it and closed it sent a
//! FLUSH then, which frees all its locks on that inode through whatever open file (fcntl(2)) and removes the owner
//! here from all of them. What is left when the last reference goes are owners that are no process.

use std::collections::{HashMap, HashSet};

use parking_lot::Mutex;
use verbfs_protocol::Ino;

/// Lock owners by inode and the open files they locked through.
#[derive(Default)]
pub struct FileLockOwners {
    held: Mutex<HashMap<Ino, HashSet<(u64, u64)>>>,
}

impl FileLockOwners {
    /// `owner` asks for a lock through `handle`. Called before the lock is asked for, so that no close overtakes it.
    pub fn locking(&self, ino: Ino, handle: u64, owner: u64) {
        self.held.lock().entry(ino).or_default().insert((handle, owner));
    }

    /// `owner` closes a descriptor of `ino`: whether it may hold locks, which are no longer remembered.
    pub fn flushed(&self, ino: Ino, owner: u64) -> bool {
        let mut held = self.held.lock();
        let Some(owners) = held.get_mut(&ino) else { return false };
        let before = owners.len();
        owners.retain(|&(_, other)| other != owner);
        let found = owners.len() != before;
        if owners.is_empty() {
            held.remove(&ino);
        }
        found
    }

    /// The open file `handle` is gone: the owners whose locks go with it.
    pub fn released(&self, ino: Ino, handle: u64) -> Vec<u64> {
        let mut held = self.held.lock();
        let Some(owners) = held.get_mut(&ino) else { return Vec::new() };
        let left = owners.extract_if(|&(other, _)| other == handle).map(|(_, owner)| owner).collect();
        if owners.is_empty() {
            held.remove(&ino);
        }
        left
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: Ino = Ino(7);

    #[test]
    fn a_process_that_never_locked_has_nothing_to_free() {
        let owners = FileLockOwners::default();
        owners.locking(FILE, 1, 100);
        assert!(!owners.flushed(FILE, 200));
        assert!(!owners.flushed(Ino(8), 100));
        assert!(owners.flushed(FILE, 100));
        assert!(!owners.flushed(FILE, 100));
        assert!(owners.held.lock().is_empty());
    }

    #[test]
    fn a_process_that_locks_again_through_another_open_file_keeps_its_lock() {
        let owners = FileLockOwners::default();
        owners.locking(FILE, 1, 100);
        assert!(owners.flushed(FILE, 100));
        owners.locking(FILE, 2, 100);
        assert!(owners.released(FILE, 1).is_empty());
        assert!(owners.flushed(FILE, 100));
    }

    #[test]
    fn locks_of_an_open_file_description_go_with_it() {
        let owners = FileLockOwners::default();
        owners.locking(FILE, 1, 900);
        assert_eq!(owners.released(FILE, 1), [900]);
        assert!(owners.released(FILE, 1).is_empty());
    }
}
