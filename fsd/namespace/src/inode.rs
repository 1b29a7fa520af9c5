//! Inodes, symbolic links and orphans.

use crate::Error;
use crate::record::{Place, decode_inode, decode_u64, encode_inode, ino_key, split_ino};
use crate::store::{Access, Transaction, Writing};
use verbfs_protocol::{Attributes, Ino, SYMLINK_MAX};

impl<A: Access> Transaction<'_, A> {
    pub fn inode(&self, ino: Ino) -> Result<Option<Attributes>, Error> {
        let key = ino_key(ino);
        let bytes = self.tables.inodes.get(self.access.view(), &key)?;
        bytes.map(|bytes| decode_inode(Place { table: "inodes", key: &key }, ino, bytes)).transpose()
    }

    /// Number of inodes in the store.
    pub fn inode_count(&self) -> Result<u64, Error> {
        Ok(self.tables.inodes.len(self.access.view())?)
    }

    /// Calls `each` with every inode, by number, until it returns an error.
    pub fn for_each_inode<E: From<Error>>(&self, mut each: impl FnMut(Attributes) -> Result<(), E>) -> Result<(), E> {
        for item in self.tables.inodes.iter(self.access.view()).map_err(Error::from)? {
            let (key, bytes) = item.map_err(Error::from)?;
            let place = Place { table: "inodes", key };
            each(decode_inode(place, split_ino(place)?, bytes)?)?;
        }
        Ok(())
    }

    /// Target of a symbolic link.
    pub fn symlink(&self, ino: Ino) -> Result<Option<Vec<u8>>, Error> {
        Ok(self.tables.symlinks.get(self.access.view(), &ino_key(ino))?.map(<[u8]>::to_vec))
    }

    /// The directory a directory is in.
    pub fn parent(&self, directory: Ino) -> Result<Option<Ino>, Error> {
        let key = ino_key(directory);
        let bytes = self.tables.parents.get(self.access.view(), &key)?;
        bytes.map(|bytes| decode_u64(Place { table: "parents", key: &key }, bytes).map(Ino)).transpose()
    }

    /// Inodes without a name that are still open somewhere, by number.
    pub fn orphans(&self) -> Result<Vec<Ino>, Error> {
        let mut orphans = Vec::new();
        for item in self.tables.orphans.iter(self.access.view())? {
            let (key, _) = item?;
            orphans.push(split_ino(Place { table: "orphans", key })?);
        }
        Ok(orphans)
    }

    pub fn is_orphan(&self, ino: Ino) -> Result<bool, Error> {
        Ok(self.tables.orphans.get(self.access.view(), &ino_key(ino))?.is_some())
    }
}

impl Transaction<'_, Writing<'_>> {
    /// Stores the attributes of `attributes.ino`.
    ///
    /// # Errors
    /// [`Error::ValueLength`] for a layout of more than [`verbfs_protocol::Layout::MAX_WIDTH`] slots.
    pub fn put_inode(&mut self, attributes: &Attributes) -> Result<(), Error> {
        encode_inode(attributes, &mut self.buffer)?;
        Ok(self.tables.inodes.put(&mut self.access.txn, &ino_key(attributes.ino), &self.buffer)?)
    }

    /// Deletes an inode with its link target, parent, extended attributes and orphan record; its extents and entries are the
    /// caller's business. False if there was none.
    pub fn delete_inode(&mut self, ino: Ino) -> Result<bool, Error> {
        let key = ino_key(ino);
        self.tables.symlinks.delete(&mut self.access.txn, &key)?;
        self.tables.parents.delete(&mut self.access.txn, &key)?;
        self.tables.orphans.delete(&mut self.access.txn, &key)?;
        self.remove_all_xattrs(ino)?;
        Ok(self.tables.inodes.delete(&mut self.access.txn, &key)?)
    }

    /// Sets the target of a symbolic link: 1 to [`SYMLINK_MAX`] bytes.
    pub fn put_symlink(&mut self, ino: Ino, target: &[u8]) -> Result<(), Error> {
        if target.is_empty() || target.len() > SYMLINK_MAX {
            return Err(Error::ValueLength { length: target.len(), limit: SYMLINK_MAX });
        }
        Ok(self.tables.symlinks.put(&mut self.access.txn, &ino_key(ino), target)?)
    }

    /// Records the directory a directory is in.
    pub fn put_parent(&mut self, directory: Ino, parent: Ino) -> Result<(), Error> {
        Ok(self.tables.parents.put(&mut self.access.txn, &ino_key(directory), &parent.0.to_le_bytes())?)
    }

    pub fn add_orphan(&mut self, ino: Ino) -> Result<(), Error> {
        Ok(self.tables.orphans.put(&mut self.access.txn, &ino_key(ino), &[])?)
    }

    /// False if it was none.
    pub fn remove_orphan(&mut self, ino: Ino) -> Result<bool, Error> {
        Ok(self.tables.orphans.delete(&mut self.access.txn, &ino_key(ino))?)
    }
}
