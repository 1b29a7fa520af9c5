//! Directory entries.
//!
//! The entries of a directory lie under consecutive keys (directory, cursor). The key
//! (directory, 0) holds the number of entries and is absent when there are none.

use crate::Error;
use crate::hash::{COLLISIONS_MAX, CURSOR_MIN};
use crate::record::{Place, decode_entry, decode_u64, encode_entry, ino_key, pair_key, split_pair};
use crate::store::{Access, Transaction, Writing};
use std::ops::Bound;
use verbfs_protocol::{FileKind, Ino, NAME_MAX};

/// What a name stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Entry {
    pub ino: Ino,
    pub kind: FileKind,
}

/// An entry as a scan shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Where this entry stands: scanning from here goes on behind it. From [`crate::CURSOR_MIN`] to 2^63 - 1.
    pub cursor: u64,
    pub name: Vec<u8>,
    pub entry: Entry,
}

/// Where a name is, or could be put.
enum Found {
    At(u64, Entry),
    /// The first free cursor of the name's hash; None if the bucket is full.
    Free(Option<u64>),
}

impl<A: Access> Transaction<'_, A> {
    /// Looks up a name.
    pub fn entry(&self, directory: Ino, name: &[u8]) -> Result<Option<Entry>, Error> {
        Ok(match self.find(directory, name)? {
            Found::At(_, entry) => Some(entry),
            Found::Free(_) => None,
        })
    }

    fn find(&self, directory: Ino, name: &[u8]) -> Result<Found, Error> {
        let first = self.tables.hash(name);
        let last = first + (COLLISIONS_MAX - 1);
        let mut free = Some(first);
        let mut wanted = first;
        // Nearly always one step: the hash's first cursor holds the name, or the next key is of another hash.
        while wanted <= last {
            let Some((key, bytes)) =
                self.tables.entries.get_greater_than_or_equal_to(self.access.view(), &pair_key(directory, wanted))?
            else {
                break;
            };
            let place = Place { table: "entries", key };
            let (parent, cursor) = split_pair(place)?;
            if parent != directory.0 || cursor > last {
                break;
            }
            let (ino, kind, stored) = decode_entry(place, bytes)?;
            if stored == name {
                return Ok(Found::At(cursor, Entry { ino, kind }));
            }
            if free == Some(cursor) {
                free = (cursor < last).then_some(cursor + 1);
            }
            wanted = cursor + 1;
        }
        Ok(Found::Free(free))
    }

    /// Number of entries of a directory.
    pub fn entry_count(&self, directory: Ino) -> Result<u64, Error> {
        let key = pair_key(directory, 0);
        match self.tables.entries.get(self.access.view(), &key)? {
            None => Ok(0),
            Some(bytes) => decode_u64(Place { table: "entries", key: &key }, bytes),
        }
    }

    pub fn is_empty_directory(&self, directory: Ino) -> Result<bool, Error> {
        Ok(self.entry_count(directory)? == 0)
    }

    /// At most `limit` entries behind `cursor` (0: from the start), by cursor.
    ///
    /// An entry keeps its cursor while it exists, so scans that go on from the last cursor seen show every entry that
    /// exists throughout exactly once, whatever else comes and goes.
    pub fn scan(&self, directory: Ino, cursor: u64, limit: usize) -> Result<Vec<Listed>, Error> {
        let mut listed = Vec::new();
        if limit > 0 {
            self.scan_with(directory, cursor, |cursor, name, entry| {
                listed.push(Listed { cursor, name: name.to_vec(), entry });
                listed.len() < limit
            })?;
        }
        Ok(listed)
    }

    /// Calls `each` with cursor, name and entry of those behind `cursor` until it returns false.
    pub fn scan_with(
        &self,
        directory: Ino,
        cursor: u64,
        mut each: impl FnMut(u64, &[u8], Entry) -> bool,
    ) -> Result<(), Error> {
        let after = pair_key(directory, cursor);
        let end = pair_key(directory, u64::MAX);
        let bounds = (Bound::Excluded(&after[..]), Bound::Included(&end[..]));
        for item in self.tables.entries.range(self.access.view(), &bounds)? {
            let (key, bytes) = item?;
            let place = Place { table: "entries", key };
            let (_, cursor) = split_pair(place)?;
            if !(CURSOR_MIN..1 << 63).contains(&cursor) {
                return Err(place.corrupt("no cursor of an entry"));
            }
            let (ino, kind, name) = decode_entry(place, bytes)?;
            if !each(cursor, name, Entry { ino, kind }) {
                break;
            }
        }
        Ok(())
    }

    /// Calls `each` with directory, name and entry of all directories until it returns an error.
    pub fn for_each_entry<E: From<Error>>(
        &self,
        mut each: impl FnMut(Ino, &[u8], Entry) -> Result<(), E>,
    ) -> Result<(), E> {
        for item in self.tables.entries.iter(self.access.view()).map_err(Error::from)? {
            let (key, bytes) = item.map_err(Error::from)?;
            let place = Place { table: "entries", key };
            let (directory, cursor) = split_pair(place)?;
            if cursor != 0 {
                let (ino, kind, name) = decode_entry(place, bytes)?;
                each(Ino(directory), name, Entry { ino, kind })?;
            }
        }
        Ok(())
    }
}

impl Transaction<'_, Writing<'_>> {
    /// Makes `name` stand for `entry`; returns what it stood for before. A replaced entry keeps its cursor.
    ///
    /// # Errors
    /// [`Error::NameLength`] unless the name has 1 to [`NAME_MAX`] bytes; [`Error::Collisions`].
    pub fn put_entry(&mut self, directory: Ino, name: &[u8], entry: Entry) -> Result<Option<Entry>, Error> {
        if name.is_empty() || name.len() > NAME_MAX {
            return Err(Error::NameLength(name.len()));
        }
        let (cursor, replaced) = match self.find(directory, name)? {
            Found::At(cursor, entry) => (cursor, Some(entry)),
            Found::Free(Some(cursor)) => (cursor, None),
            Found::Free(None) => return Err(Error::Collisions),
        };
        if replaced.is_none() {
            let count = self.entry_count(directory)?;
            self.put_entry_count(directory, count.saturating_add(1))?;
        }
        encode_entry(entry.ino, entry.kind, name, &mut self.buffer);
        self.tables.entries.put(&mut self.access.txn, &pair_key(directory, cursor), &self.buffer)?;
        Ok(replaced)
    }

    /// Removes a name; returns what it stood for.
    pub fn delete_entry(&mut self, directory: Ino, name: &[u8]) -> Result<Option<Entry>, Error> {
        let Found::At(cursor, entry) = self.find(directory, name)? else {
            return Ok(None);
        };
        let Some(count) = self.entry_count(directory)?.checked_sub(1) else {
            return Err(Place { table: "entries", key: &ino_key(directory) }
                .corrupt("an entry in a directory that counts none"));
        };
        self.tables.entries.delete(&mut self.access.txn, &pair_key(directory, cursor))?;
        self.put_entry_count(directory, count)?;
        Ok(Some(entry))
    }

    fn put_entry_count(&mut self, directory: Ino, count: u64) -> Result<(), Error> {
        let key = pair_key(directory, 0);
        if count == 0 {
            self.tables.entries.delete(&mut self.access.txn, &key)?;
        } else {
            self.tables.entries.put(&mut self.access.txn, &key, &count.to_le_bytes())?;
        }
        Ok(())
    }
}
