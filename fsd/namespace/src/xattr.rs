//! Extended attributes, under keys of inode number and name.

use crate::Error;
use crate::record::{Place, ino_key};
use crate::store::{Access, Transaction, Writing};
use verbfs_protocol::{Ino, NAME_MAX, XATTR_VALUE_MAX};

/// How to set an extended attribute (setxattr(2): 0, XATTR_CREATE, XATTR_REPLACE).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetXattr {
    Any,
    /// Only if it does not exist.
    Create,
    /// Only if it exists.
    Replace,
}

fn xattr_key(ino: Ino, name: &[u8]) -> Result<Vec<u8>, Error> {
    if name.is_empty() || name.len() > NAME_MAX {
        return Err(Error::NameLength(name.len()));
    }
    Ok([&ino_key(ino)[..], name].concat())
}

impl<A: Access> Transaction<'_, A> {
    pub fn xattr(&self, ino: Ino, name: &[u8]) -> Result<Option<Vec<u8>>, Error> {
        Ok(self.tables.xattrs.get(self.access.view(), &xattr_key(ino, name)?)?.map(<[u8]>::to_vec))
    }

    /// Names of the extended attributes of an inode, in byte order.
    pub fn xattrs(&self, ino: Ino) -> Result<Vec<Vec<u8>>, Error> {
        let mut names = Vec::new();
        for item in self.tables.xattrs.prefix_iter(self.access.view(), &ino_key(ino))? {
            let (key, _) = item?;
            match key.get(ino_key(ino).len()..) {
                Some(name) if (1..=NAME_MAX).contains(&name.len()) => names.push(name.to_vec()),
                _ => return Err(Place { table: "xattrs", key }.corrupt("wrong length of name")),
            }
        }
        Ok(names)
    }
}

impl Transaction<'_, Writing<'_>> {
    /// # Errors
    /// [`Error::NameLength`], [`Error::ValueLength`] beyond [`XATTR_VALUE_MAX`], [`Error::AttributeExists`], [`Error::AttributeMissing`].
    pub fn set_xattr(&mut self, ino: Ino, name: &[u8], value: &[u8], how: SetXattr) -> Result<(), Error> {
        let key = xattr_key(ino, name)?;
        if value.len() > XATTR_VALUE_MAX {
            return Err(Error::ValueLength { length: value.len(), limit: XATTR_VALUE_MAX });
        }
        if how != SetXattr::Any {
            let exists = self.tables.xattrs.get(&self.access.txn, &key)?.is_some();
            match how {
                SetXattr::Create if exists => return Err(Error::AttributeExists),
                SetXattr::Replace if !exists => return Err(Error::AttributeMissing),
                _ => {}
            }
        }
        Ok(self.tables.xattrs.put(&mut self.access.txn, &key, value)?)
    }

    /// False if it did not exist.
    pub fn remove_xattr(&mut self, ino: Ino, name: &[u8]) -> Result<bool, Error> {
        Ok(self.tables.xattrs.delete(&mut self.access.txn, &xattr_key(ino, name)?)?)
    }

    pub(crate) fn remove_all_xattrs(&mut self, ino: Ino) -> Result<(), Error> {
        for name in self.xattrs(ino)? {
            self.remove_xattr(ino, &name)?;
        }
        Ok(())
    }
}
