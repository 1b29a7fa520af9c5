//! Stored replies, prepared transactions and the daemon's own small records.

use crate::Error;
use crate::record::{Place, operation_key, split_operation};
use crate::store::{Access, Transaction, Writing};
use std::ops::Bound;
use verbfs_protocol::{Node, OperationId, Slot};

/// Longest key of [`Transaction::put_meta`], bytes: half of what LMDB allows.
pub const META_KEY_MAX: usize = 255;

fn check_meta_key(key: &str) -> Result<(), Error> {
    if key.is_empty() || key.len() > META_KEY_MAX { Err(Error::NameLength(key.len())) } else { Ok(()) }
}

impl<A: Access> Transaction<'_, A> {
    /// The stored reply of an operation: it has been carried out.
    pub fn reply(&self, operation: OperationId) -> Result<Option<Vec<u8>>, Error> {
        Ok(self.tables.replies.get(self.access.view(), &operation_key(operation))?.map(<[u8]>::to_vec))
    }

    /// Number of stored replies.
    pub fn reply_count(&self) -> Result<u64, Error> {
        Ok(self.tables.replies.len(self.access.view())?)
    }

    /// What was prepared under this transaction.
    pub fn prepared(&self, transaction: OperationId) -> Result<Option<Vec<u8>>, Error> {
        Ok(self.tables.prepared.get(self.access.view(), &operation_key(transaction))?.map(<[u8]>::to_vec))
    }

    /// All prepared transactions, ordered.
    pub fn all_prepared(&self) -> Result<Vec<(OperationId, Vec<u8>)>, Error> {
        let mut all = Vec::new();
        for item in self.tables.prepared.iter(self.access.view())? {
            let (key, bytes) = item?;
            all.push((split_operation(Place { table: "prepared", key })?, bytes.to_vec()));
        }
        Ok(all)
    }

    /// A record of the daemon's own: incarnations, cluster id, slot.
    pub fn meta(&self, key: &str) -> Result<Option<Vec<u8>>, Error> {
        check_meta_key(key)?;
        Ok(self.tables.meta.get(self.access.view(), key.as_bytes())?.map(<[u8]>::to_vec))
    }
}

impl Transaction<'_, Writing<'_>> {
    pub fn put_reply(&mut self, operation: OperationId, reply: &[u8]) -> Result<(), Error> {
        Ok(self.tables.replies.put(&mut self.access.txn, &operation_key(operation), reply)?)
    }

    /// Forgets the replies to `node` whose sequence is below `acknowledged_below`; returns how many.
    pub fn prune_replies(&mut self, node: Node, acknowledged_below: u64) -> Result<u64, Error> {
        let first = OperationId { node, sequence: 0 };
        self.delete_replies(first, OperationId { node, sequence: acknowledged_below })
    }

    /// Forgets all replies to incarnations of `slot` before `incarnation`: they were evicted and will not ask. Returns how many.
    pub fn forget_replies(&mut self, slot: Slot, incarnation: u32) -> Result<u64, Error> {
        let at = |incarnation| OperationId { node: Node { slot, incarnation }, sequence: 0 };
        self.delete_replies(at(0), at(incarnation))
    }

    fn delete_replies(&mut self, first: OperationId, end: OperationId) -> Result<u64, Error> {
        let (first, end) = (operation_key(first), operation_key(end));
        let bounds = (Bound::Included(&first[..]), Bound::Excluded(&end[..]));
        Ok(self.tables.replies.delete_range(&mut self.access.txn, &bounds)? as u64)
    }

    pub fn put_prepared(&mut self, transaction: OperationId, bytes: &[u8]) -> Result<(), Error> {
        Ok(self.tables.prepared.put(&mut self.access.txn, &operation_key(transaction), bytes)?)
    }

    /// False if it was not prepared.
    pub fn delete_prepared(&mut self, transaction: OperationId) -> Result<bool, Error> {
        Ok(self.tables.prepared.delete(&mut self.access.txn, &operation_key(transaction))?)
    }

    /// # Errors
    /// [`Error::NameLength`] unless the key has 1 to [`META_KEY_MAX`] bytes.
    pub fn put_meta(&mut self, key: &str, value: &[u8]) -> Result<(), Error> {
        check_meta_key(key)?;
        Ok(self.tables.meta.put(&mut self.access.txn, key.as_bytes(), value)?)
    }

    /// False if there was none.
    pub fn delete_meta(&mut self, key: &str) -> Result<bool, Error> {
        check_meta_key(key)?;
        Ok(self.tables.meta.delete(&mut self.access.txn, key.as_bytes())?)
    }
}
