//! What this node does as a home: name-space operations, each under the home's own locks.
//!
//! The home of the (first) directory named executes an operation. It pins, in locking order, RENAME where
//! directories move between directories, NAME X on the entries, ATTR X on every inode it changes, wherever
//! those live; then it applies the updates: in one transaction where all are its own, else in two phases,
//! presumed abort, with itself as coordinator. Locks are held until all homes have applied.
//!
//! An inode whose last name goes becomes an *orphan* in the same transaction. Its home then asks for OPEN X, gets
//! it when the last node has closed it, and removes data and record.

use super::attributes::CAPABILITY_XATTR;
use super::names::{check_name, name_range};
use super::storage::store_error;
use super::*;
use crate::acl::{ACCESS_XATTR, Acl, DEFAULT_XATTR, inherit};
use std::collections::{BTreeMap, BTreeSet};
use verbfs_lock::PinKind;
use verbfs_namespace::{Entry, SetXattr, WriteTransaction};

/// Most links to one inode.
const LINKS_MAX: u32 = 65_000;
/// Deepest directory, for the walk that finds loops.
const DEPTH_MAX: usize = 4096;
/// An operation that finds the tree changed between look and lock starts again so often.
const RENAME_ATTEMPTS: usize = 32;

/// Extended attributes by name.
type Xattrs = Vec<(Vec<u8>, Vec<u8>)>;

/// Why a transaction of updates did not commit.
enum ApplyError {
    Store(verbfs_namespace::Error),
    Errno(Errno),
    /// The updates can be applied; this was only a try.
    Tried,
}

impl From<verbfs_namespace::Error> for ApplyError {
    fn from(error: verbfs_namespace::Error) -> Self {
        ApplyError::Store(error)
    }
}

impl ApplyError {
    fn errno(self) -> Errno {
        match self {
            ApplyError::Store(error) => store_error(error),
            ApplyError::Errno(errno) => errno,
            ApplyError::Tried => Errno::EINVAL,
        }
    }
}

/// Inodes whose attributes changed, and those that became orphans.
#[derive(Default)]
struct Applied {
    changed: BTreeMap<Ino, Attributes>,
    orphans: Vec<Ino>,
}

/// Applies updates of one home within a transaction.
fn apply(txn: &mut WriteTransaction<'_>, updates: &[Update]) -> std::result::Result<Applied, ApplyError> {
    let mut applied = Applied::default();
    for update in updates {
        let record = |txn: &WriteTransaction<'_>, ino: Ino| -> std::result::Result<Attributes, ApplyError> {
            match applied.changed.get(&ino) {
                Some(attributes) => Ok(attributes.clone()),
                None => txn.inode(ino)?.ok_or(ApplyError::Errno(Errno::ENOENT)),
            }
        };
        let attributes = match update {
            Update::PutEntry { directory, name, ino, kind } => {
                txn.put_entry(*directory, name, Entry { ino: *ino, kind: *kind })?;
                continue;
            }
            Update::DeleteEntry { directory, name } => {
                txn.delete_entry(*directory, name)?;
                continue;
            }
            Update::Touch { directory, entries, links, time } => {
                let mut attributes = record(txn, *directory)?;
                if attributes.nlink == 0 {
                    return Err(ApplyError::Errno(Errno::ENOENT));
                }
                attributes.size = attributes.size.saturating_add_signed(*entries);
                attributes.nlink = attributes.nlink.saturating_add_signed(*links as i32);
                attributes.mtime = *time;
                attributes.ctime = *time;
                attributes
            }
            Update::CreateInode { attributes, target, parent, xattrs } => {
                // An inode never comes into being twice, whatever a peer takes for a fresh number.
                if txn.inode(attributes.ino)?.is_some() {
                    return Err(ApplyError::Errno(Errno::EEXIST));
                }
                if !target.is_empty() {
                    txn.put_symlink(attributes.ino, target)?;
                }
                if let Some(parent) = parent {
                    txn.put_parent(attributes.ino, *parent)?;
                }
                for (name, value) in xattrs {
                    txn.set_xattr(attributes.ino, name, value, SetXattr::Any)?;
                }
                (**attributes).clone()
            }
            Update::Links { ino, delta, time } => {
                let mut attributes = record(txn, *ino)?;
                if *delta > 0 && (attributes.nlink == 0 || attributes.nlink >= LINKS_MAX) {
                    return Err(ApplyError::Errno(if attributes.nlink == 0 { Errno::ENOENT } else { Errno::EMLINK }));
                }
                attributes.nlink = attributes.nlink.saturating_add_signed(*delta as i32);
                attributes.ctime = *time;
                if attributes.nlink == 0 {
                    txn.add_orphan(*ino)?;
                    applied.orphans.push(*ino);
                }
                attributes
            }
            Update::RemoveDirectory { ino, time } => {
                if !txn.is_empty_directory(*ino)? {
                    return Err(ApplyError::Errno(Errno::ENOTEMPTY));
                }
                let mut attributes = record(txn, *ino)?;
                attributes.nlink = 0;
                attributes.ctime = *time;
                txn.add_orphan(*ino)?;
                applied.orphans.push(*ino);
                attributes
            }
            Update::Moved { ino, parent, time } => {
                let mut attributes = record(txn, *ino)?;
                attributes.ctime = *time;
                if let Some(parent) = parent {
                    txn.put_parent(*ino, *parent)?;
                }
                attributes
            }
        };
        txn.put_inode(&attributes)?;
        applied.changed.insert(attributes.ino, attributes);
    }
    Ok(applied)
}

impl Volume {
    /// Makes the root directory of a new volume; only at its home, and only if there is none.
    pub fn make_root(&self, mode: u32, uid: u32, gid: u32) -> Result<()> {
        if self.slot() != Ino::ROOT.home() || self.stored_attributes(Ino::ROOT)?.is_some() {
            return Ok(());
        }
        let now = self.clock();
        let root = Attributes {
            ino: Ino::ROOT,
            kind: FileKind::Directory,
            mode,
            uid,
            gid,
            nlink: 2,
            rdev: 0,
            size: 0,
            pages: 0,
            atime: now,
            mtime: now,
            ctime: now,
            crtime: now,
            truncate_generation: 0,
            layout: Layout::default(),
            has_xattrs: false,
        };
        self.store
            .borrow_mut()
            .write(|txn| {
                txn.put_parent(Ino::ROOT, Ino::ROOT)?;
                txn.put_inode(&root)
            })
            .map_err(store_error)
    }

    /// Orphans that an earlier daemon of this node left are removed.
    pub fn reap_orphans(self: &Rc<Self>) {
        match self.store.borrow().read(|txn| txn.orphans()) {
            Ok(orphans) => orphans.into_iter().for_each(|ino| self.reap_later(ino)),
            Err(error) => tracing::error!(%error, "orphans could not be listed"),
        }
    }

    pub(crate) fn put_attributes(&self, attributes: &Attributes) -> Result<()> {
        self.store.borrow_mut().write(|txn| txn.put_inode(attributes)).map_err(store_error)
    }

    /// Attributes for an operation that has ATTR pinned, with everything this node knows taken in.
    fn settled_attributes(&self, ino: Ino) -> Result<Attributes> {
        if ino.home() == self.slot() {
            self.absorb_own_report(ino);
            return self.stored_attributes(ino)?.ok_or(Errno::ESTALE);
        }
        self.pinned_attributes(ino)
    }

    async fn pin_name(self: &Rc<Self>, directory: Ino, name: &[u8]) -> Result<Pin> {
        self.pin(Resource::name(directory), name_range(name), Range::ALL, PinKind::Exclusive).await
    }

    /// ATTR X on inodes, in locking order.
    async fn pin_attributes(self: &Rc<Self>, inos: impl IntoIterator<Item = Ino>) -> Result<Vec<Pin>> {
        let mut pins = Vec::new();
        for resource in inos.into_iter().map(Resource::attr).collect::<BTreeSet<_>>() {
            pins.push(self.pin(resource, Range::UNIT, Range::UNIT, PinKind::Exclusive).await?);
        }
        Ok(pins)
    }

    /// A directory that takes entries: it exists and has not been removed.
    fn live_directory(&self, directory: Ino) -> Result<Attributes> {
        let attributes = self
            .settled_attributes(directory)
            .map_err(|error| if error == Errno::ESTALE { Errno::ENOENT } else { error })?;
        if attributes.kind != FileKind::Directory {
            return Err(Errno::ENOTDIR);
        }
        if attributes.nlink == 0 { Err(Errno::ENOENT) } else { Ok(attributes) }
    }

    /// Executes an operation for a client.
    pub(crate) async fn operate(
        self: &Rc<Self>,
        operation: OperationId,
        caller: Caller,
        kind: Operation,
    ) -> Result<Reply> {
        let (first, second) = match &kind {
            Operation::Create { parent, .. }
            | Operation::MakeDirectory { parent, .. }
            | Operation::Unlink { parent, .. }
            | Operation::RemoveDirectory { parent, .. }
            | Operation::Link { parent, .. } => (*parent, None),
            Operation::Rename { parent, new_parent, .. } => (*parent, Some(*new_parent)),
            Operation::Change { ino, .. } | Operation::SetXattr { ino, .. } | Operation::RemoveXattr { ino, .. } => {
                (*ino, None)
            }
        };
        if first.home() != self.slot() {
            return Err(Errno::EINVAL);
        }
        let outcome = self.execute(operation, caller, kind).await;
        if operation.node.slot != self.slot() {
            // Whoever asked looks at the same attributes next: let it have the lock and not only a glimpse.
            for ino in [Some(first), second].into_iter().flatten() {
                self.give_up(Resource::attr(ino), Range::UNIT);
            }
        }
        outcome
    }

    async fn execute(self: &Rc<Self>, operation: OperationId, caller: Caller, kind: Operation) -> Result<Reply> {
        match kind {
            Operation::Create { parent, name, new, exclusive, opening } => {
                self.operate_create(operation, caller, parent, name, new, exclusive, opening).await
            }
            Operation::MakeDirectory { parent, name, new } => {
                self.operate_make_directory(operation, caller, parent, name, new).await
            }
            Operation::Unlink { parent, name } => self.operate_unlink(operation, parent, name, false).await,
            Operation::RemoveDirectory { parent, name } => self.operate_unlink(operation, parent, name, true).await,
            Operation::Link { ino, parent, name } => self.operate_link(operation, ino, parent, name).await,
            Operation::Rename { parent, name, new_parent, new_name, flags } => {
                self.operate_rename(operation, parent, name, new_parent, new_name, flags).await
            }
            Operation::Change { ino, change } => self.operate_change(caller, ino, change).await,
            Operation::SetXattr { ino, name, value, create, replace } => {
                self.operate_set_xattr(caller, ino, name, value, create, replace).await
            }
            Operation::RemoveXattr { ino, name } => self.operate_remove_xattr(ino, name).await,
        }
    }

    /// A new inode's record, with what it inherits.
    fn new_inode(&self, ino: Ino, caller: Caller, parent: &Attributes, new: &NewInode) -> Result<(Attributes, Xattrs)> {
        let is_directory = new.kind == FileKind::Directory;
        let default = if parent.has_xattrs {
            let value = self.store.borrow().read(|txn| txn.xattr(parent.ino, DEFAULT_XATTR)).map_err(store_error)?;
            value.and_then(|value| Acl::parse(&value).ok().flatten())
        } else {
            None
        };
        let mut xattrs = Vec::new();
        let mut mode = new.mode & 0o7777;
        if new.kind == FileKind::Symlink {
            mode = 0o777;
        } else {
            let inherited = inherit(default.as_ref(), mode, new.umask, is_directory);
            mode = inherited.mode;
            xattrs.extend(inherited.access.map(|list| (ACCESS_XATTR.to_vec(), list.serialise())));
            xattrs.extend(inherited.default.map(|list| (DEFAULT_XATTR.to_vec(), list.serialise())));
        }
        let mut gid = caller.gid;
        if parent.mode & 0o2000 != 0 {
            gid = parent.gid;
            if is_directory {
                mode |= 0o2000;
            }
        }
        let now = self.clock();
        let layout = if new.kind == FileKind::Regular {
            let members = &self.options.members;
            let first = members.iter().position(|slot| *slot == ino.home()).unwrap_or(0);
            let width = self.options.width.clamp(1, members.len().min(Layout::MAX_WIDTH));
            Layout {
                chunk_pages: self.options.chunk_pages,
                slots: (0..width).map(|step| members[(first + step) % members.len()]).collect(),
            }
        } else {
            Layout::default()
        };
        let attributes = Attributes {
            ino,
            kind: new.kind,
            mode,
            uid: caller.uid,
            gid,
            nlink: if is_directory { 2 } else { 1 },
            rdev: new.rdev,
            size: if new.kind == FileKind::Symlink { new.target.len() as u64 } else { 0 },
            pages: 0,
            atime: now,
            mtime: now,
            ctime: now,
            crtime: now,
            truncate_generation: 0,
            layout,
            has_xattrs: !xattrs.is_empty(),
        };
        Ok((attributes, xattrs))
    }

    #[allow(clippy::too_many_arguments)]
    async fn operate_create(
        self: &Rc<Self>,
        operation: OperationId,
        caller: Caller,
        parent: Ino,
        name: Vec<u8>,
        new: NewInode,
        exclusive: bool,
        opening: bool,
    ) -> Result<Reply> {
        check_name(&name)?;
        if new.kind == FileKind::Directory
            || (new.kind == FileKind::Symlink && (new.target.is_empty() || new.target.len() > SYMLINK_MAX))
        {
            return Err(Errno::EINVAL);
        }
        let _name_pin = self.pin_name(parent, &name).await?;
        if let Some((ino, _)) = self.pinned_entry(parent, &name).await? {
            if exclusive {
                return Err(Errno::EEXIST);
            }
            return Ok(Reply::Created { attributes: Box::new(self.attributes(ino).await?), created: false });
        }
        let _pins = self.pin_attributes([parent]).await?;
        let directory = self.live_directory(parent)?;
        let sequence = self.store.borrow_mut().write(|txn| txn.allocate_sequence()).map_err(store_error)?;
        let (attributes, xattrs) = self.new_inode(Ino::new(self.slot(), sequence), caller, &directory, &new)?;
        let updates = vec![
            Update::CreateInode { attributes: Box::new(attributes.clone()), target: new.target, parent: None, xattrs },
            Update::PutEntry { directory: parent, name, ino: attributes.ino, kind: attributes.kind },
            Update::Touch { directory: parent, entries: 1, links: 0, time: attributes.crtime },
        ];
        if opening {
            self.keep_for_opening(attributes.ino, operation.node.slot);
        }
        if let Err(error) = self.update(operation, updates).await {
            self.opening_asked(attributes.ino, operation.node.slot);
            return Err(error);
        }
        Ok(Reply::Created { attributes: Box::new(attributes), created: true })
    }

    /// The inode is about to be opened by a node whose OPEN lock is not asked for yet. Without this, an unlink
    /// in between would have one open(O_CREAT) make the file twice: once for the unlink, once when tried again.
    fn keep_for_opening(&self, ino: Ino, slot: Slot) {
        if ino.home() == self.slot() {
            *self.openings.borrow_mut().entry((ino, slot)).or_default() += 1;
        }
    }

    /// The node's OPEN lock stands in the server's queue, or will not come.
    pub(crate) fn opening_asked(&self, ino: Ino, slot: Slot) {
        let mut openings = self.openings.borrow_mut();
        if let Some(count) = openings.get_mut(&(ino, slot)) {
            *count -= 1;
            if *count == 0 {
                openings.remove(&(ino, slot));
                drop(openings);
                self.openings_changed.notify();
            }
        }
    }

    pub(crate) fn forget_openings(&self, slot: Slot) {
        self.openings.borrow_mut().retain(|(_, other), _| *other != slot);
        self.openings_changed.notify();
    }

    /// Where a new directory lives: by hash, so that trees spread over the nodes.
    fn directory_home(&self, parent: Ino, name: &[u8]) -> Slot {
        let hash = verbfs_namespace::name_hash(name) ^ parent.0.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.options.members[((hash >> 17) % self.options.members.len() as u64) as usize]
    }

    async fn operate_make_directory(
        self: &Rc<Self>,
        operation: OperationId,
        caller: Caller,
        parent: Ino,
        name: Vec<u8>,
        new: NewInode,
    ) -> Result<Reply> {
        check_name(&name)?;
        if new.kind != FileKind::Directory {
            return Err(Errno::EINVAL);
        }
        let _name_pin = self.pin_name(parent, &name).await?;
        if self.pinned_entry(parent, &name).await?.is_some() {
            return Err(Errno::EEXIST);
        }
        let directory_home = self.directory_home(parent, &name);
        let ino = match self.call(directory_home, Request::ReserveInode).await? {
            Reply::Ino(ino) if ino.home() == directory_home && ino != Ino::ROOT => ino,
            _ => return Err(Errno::EPROTO),
        };
        let _pins = self.pin_attributes([parent]).await?;
        let directory = self.live_directory(parent)?;
        if directory.nlink >= LINKS_MAX {
            return Err(Errno::EMLINK);
        }
        let (attributes, xattrs) = self.new_inode(ino, caller, &directory, &new)?;
        let updates = vec![
            Update::CreateInode {
                attributes: Box::new(attributes.clone()),
                target: Vec::new(),
                parent: Some(parent),
                xattrs,
            },
            Update::PutEntry { directory: parent, name, ino, kind: FileKind::Directory },
            Update::Touch { directory: parent, entries: 1, links: 1, time: attributes.crtime },
        ];
        self.update(operation, updates).await?;
        Ok(Reply::Attributes(Box::new(attributes)))
    }

    async fn operate_unlink(
        self: &Rc<Self>,
        operation: OperationId,
        parent: Ino,
        name: Vec<u8>,
        directory: bool,
    ) -> Result<Reply> {
        check_name(&name)?;
        let _name_pin = self.pin_name(parent, &name).await?;
        let (ino, kind) = self.pinned_entry(parent, &name).await?.ok_or(Errno::ENOENT)?;
        match (directory, kind == FileKind::Directory) {
            (true, false) => return Err(Errno::ENOTDIR),
            (false, true) => return Err(Errno::EISDIR),
            _ => {}
        }
        let _pins = self.pin_attributes([parent, ino]).await?;
        self.live_directory(parent)?;
        self.settled_attributes(ino)?;
        let time = self.clock();
        let removal =
            if directory { Update::RemoveDirectory { ino, time } } else { Update::Links { ino, delta: -1, time } };
        let updates = vec![
            Update::DeleteEntry { directory: parent, name },
            Update::Touch { directory: parent, entries: -1, links: if directory { -1 } else { 0 }, time },
            removal,
        ];
        self.update(operation, updates).await?;
        Ok(Reply::Done)
    }

    async fn operate_link(
        self: &Rc<Self>,
        operation: OperationId,
        ino: Ino,
        parent: Ino,
        name: Vec<u8>,
    ) -> Result<Reply> {
        check_name(&name)?;
        let _name_pin = self.pin_name(parent, &name).await?;
        if self.pinned_entry(parent, &name).await?.is_some() {
            return Err(Errno::EEXIST);
        }
        let _pins = self.pin_attributes([parent, ino]).await?;
        self.live_directory(parent)?;
        let attributes =
            self.settled_attributes(ino).map_err(|error| if error == Errno::ESTALE { Errno::ENOENT } else { error })?;
        if attributes.kind == FileKind::Directory {
            return Err(Errno::EPERM);
        }
        if attributes.nlink == 0 {
            return Err(Errno::ENOENT);
        }
        if attributes.nlink >= LINKS_MAX {
            return Err(Errno::EMLINK);
        }
        let time = self.clock();
        let updates = vec![
            Update::PutEntry { directory: parent, name, ino, kind: attributes.kind },
            Update::Touch { directory: parent, entries: 1, links: 0, time },
            Update::Links { ino, delta: 1, time },
        ];
        self.update(operation, updates).await?;
        Ok(Reply::Attributes(Box::new(self.settled_attributes(ino)?)))
    }

    async fn operate_rename(
        self: &Rc<Self>,
        operation: OperationId,
        parent: Ino,
        name: Vec<u8>,
        new_parent: Ino,
        new_name: Vec<u8>,
        flags: RenameFlags,
    ) -> Result<Reply> {
        check_name(&name)?;
        check_name(&new_name)?;
        if flags.no_replace && flags.exchange {
            return Err(Errno::EINVAL);
        }
        let mut lock_tree = false;
        for _ in 0..RENAME_ATTEMPTS {
            match self.try_rename(operation, parent, &name, new_parent, &new_name, flags, lock_tree).await? {
                Some(reply) => return Ok(reply),
                // A directory moves between directories: once more with RENAME held.
                None => lock_tree = true,
            }
        }
        Err(Errno::EBUSY)
    }

    #[allow(clippy::too_many_arguments)]
    async fn try_rename(
        self: &Rc<Self>,
        operation: OperationId,
        parent: Ino,
        name: &[u8],
        new_parent: Ino,
        new_name: &[u8],
        flags: RenameFlags,
        lock_tree: bool,
    ) -> Result<Option<Reply>> {
        let _tree_pin = if lock_tree {
            Some(self.pin(Resource::rename(), Range::UNIT, Range::UNIT, PinKind::Exclusive).await?)
        } else {
            None
        };
        // Both names in locking order. Two names of one directory are one pin over both: with a pin on the first,
        // the second would wait behind whoever asked for a range that holds both, and that one for the first.
        let mut names: Vec<(Resource, Range)> =
            vec![(Resource::name(parent), name_range(name)), (Resource::name(new_parent), name_range(new_name))];
        if parent == new_parent {
            names = vec![(names[0].0, names[0].1.hull(names[1].1))];
        }
        names.sort_unstable();
        let mut name_pins = Vec::new();
        for (resource, range) in names {
            name_pins.push(self.pin(resource, range, Range::ALL, PinKind::Exclusive).await?);
        }
        let (ino, kind) = self.pinned_entry(parent, name).await?.ok_or(Errno::ENOENT)?;
        let target = self.pinned_entry(new_parent, new_name).await?;
        if flags.no_replace && target.is_some() {
            return Err(Errno::EEXIST);
        }
        if flags.exchange && target.is_none() {
            return Err(Errno::ENOENT);
        }
        if target.is_some_and(|(target, _)| target == ino) {
            // Two names of one file: nothing happens, says rename(2).
            return Ok(Some(Reply::Done));
        }
        let is_directory = kind == FileKind::Directory;
        let target_is_directory = target.is_some_and(|(_, kind)| kind == FileKind::Directory);
        let moves_directory = parent != new_parent && (is_directory || (flags.exchange && target_is_directory));
        if moves_directory && !lock_tree {
            return Ok(None);
        }
        if let (Some(_), false) = (target, flags.exchange) {
            match (is_directory, target_is_directory) {
                (true, false) => return Err(Errno::ENOTDIR),
                (false, true) => return Err(Errno::EISDIR),
                _ => {}
            }
        }
        if moves_directory {
            if is_directory {
                self.check_no_loop(ino, new_parent).await?;
            }
            if flags.exchange && target_is_directory {
                self.check_no_loop(target.expect("an exchange has a target").0, parent).await?;
            }
        }
        let mut inos = vec![parent, new_parent, ino];
        inos.extend(target.map(|(target, _)| target));
        let _pins = self.pin_attributes(inos).await?;
        self.live_directory(parent)?;
        let new_directory = self.live_directory(new_parent)?;
        self.settled_attributes(ino)?;
        if let Some((target, _)) = target {
            self.settled_attributes(target)?;
        }
        let time = self.clock();
        let mut updates = Vec::new();
        if flags.exchange {
            let (target, target_kind) = target.expect("an exchange has a target");
            updates.push(Update::PutEntry { directory: parent, name: name.to_vec(), ino: target, kind: target_kind });
            updates.push(Update::PutEntry { directory: new_parent, name: new_name.to_vec(), ino, kind });
            let links = i64::from(target_is_directory) - i64::from(is_directory);
            if parent == new_parent {
                updates.push(Update::Touch { directory: parent, entries: 0, links: 0, time });
            } else {
                updates.push(Update::Touch { directory: parent, entries: 0, links, time });
                updates.push(Update::Touch { directory: new_parent, entries: 0, links: -links, time });
            }
            updates.push(Update::Moved { ino, parent: is_directory.then_some(new_parent), time });
            updates.push(Update::Moved { ino: target, parent: target_is_directory.then_some(parent), time });
        } else {
            if moves_directory && target.is_none() && new_directory.nlink >= LINKS_MAX {
                return Err(Errno::EMLINK);
            }
            updates.push(Update::DeleteEntry { directory: parent, name: name.to_vec() });
            updates.push(Update::PutEntry { directory: new_parent, name: new_name.to_vec(), ino, kind });
            let replaced = i64::from(target.is_some());
            let directories = i64::from(is_directory);
            let replaced_directories = i64::from(target_is_directory);
            if parent == new_parent {
                updates.push(Update::Touch {
                    directory: parent,
                    entries: -replaced,
                    links: -replaced_directories,
                    time,
                });
            } else {
                updates.push(Update::Touch { directory: parent, entries: -1, links: -directories, time });
                updates.push(Update::Touch {
                    directory: new_parent,
                    entries: 1 - replaced,
                    links: directories - replaced_directories,
                    time,
                });
            }
            updates.push(Update::Moved { ino, parent: is_directory.then_some(new_parent), time });
            if let Some((target, _)) = target {
                updates.push(if target_is_directory {
                    Update::RemoveDirectory { ino: target, time }
                } else {
                    Update::Links { ino: target, delta: -1, time }
                });
            }
        }
        self.update(operation, updates).await?;
        drop(name_pins);
        Ok(Some(Reply::Done))
    }

    /// A directory must not become its own descendant. Under RENAME, so that no ancestor moves meanwhile.
    async fn check_no_loop(self: &Rc<Self>, moved: Ino, into: Ino) -> Result<()> {
        let mut ancestor = into;
        for _ in 0..DEPTH_MAX {
            if ancestor == moved {
                return Err(Errno::EINVAL);
            }
            if ancestor == Ino::ROOT {
                return Ok(());
            }
            ancestor = self.parent(ancestor).await?;
        }
        Err(Errno::ELOOP)
    }

    /// Applies updates wherever they belong, all or none. All locks are held by the caller.
    async fn update(self: &Rc<Self>, transaction: OperationId, updates: Vec<Update>) -> Result<()> {
        let mut by_home: BTreeMap<Slot, Vec<Update>> = BTreeMap::new();
        for update in updates {
            by_home.entry(update.ino().home()).or_default().push(update);
        }
        let own = by_home.remove(&self.slot()).unwrap_or_default();
        let others: Vec<(Slot, Vec<Update>)> = by_home.into_iter().collect();
        for (index, (slot, updates)) in others.iter().enumerate() {
            if let Err(error) = self.call(*slot, Request::Prepare { transaction, updates: updates.clone() }).await {
                for (slot, _) in &others[..index] {
                    // Presumed abort: a participant that does not hear this finds out by asking.
                    let _ = self.call(*slot, Request::Decide { transaction, commit: false }).await;
                }
                return Err(error);
            }
        }
        // The commit point.
        if let Err(error) = self.apply_own(&own) {
            for (slot, _) in &others {
                let _ = self.call(*slot, Request::Decide { transaction, commit: false }).await;
            }
            return Err(error);
        }
        // What this node has cached of the other homes' directories under the very locks it now changes them with.
        for (_, updates) in &others {
            for update in updates {
                if let Update::PutEntry { directory, name, .. } | Update::DeleteEntry { directory, name } = update {
                    self.names.borrow_mut().drop_range(*directory, name_range(name));
                }
            }
        }
        for (slot, _) in &others {
            match self.call(*slot, Request::Decide { transaction, commit: true }).await? {
                Reply::Decided(changed) => {
                    for attributes in changed.into_iter().filter(|changed| plausible::attributes_of(*slot, changed)) {
                        self.replace_base(attributes);
                    }
                }
                _ => return Err(Errno::EPROTO),
            }
        }
        Ok(())
    }

    fn apply_own(self: &Rc<Self>, updates: &[Update]) -> Result<Vec<Attributes>> {
        if updates.is_empty() {
            return Ok(Vec::new());
        }
        for update in updates {
            self.absorb_own_report(update.ino());
        }
        let full = |error: &ApplyError| matches!(error, ApplyError::Store(verbfs_namespace::Error::Full));
        let gives_back = updates
            .iter()
            .any(|update| matches!(update, Update::Links { delta: -1, .. } | Update::RemoveDirectory { .. }));
        let mut store = self.store.borrow_mut();
        let outcome = if gives_back {
            store.write_reclaiming(full, |txn| apply(txn, updates))
        } else {
            store.write(|txn| apply(txn, updates))
        };
        drop(store);
        let applied = outcome.map_err(ApplyError::errno)?;
        for attributes in applied.changed.values() {
            self.replace_base(attributes.clone());
        }
        for ino in applied.orphans {
            self.reap_later(ino);
        }
        Ok(applied.changed.into_values().collect())
    }

    /// A participant promises that the updates can be applied, and remembers them.
    pub(crate) fn prepare(self: &Rc<Self>, transaction: OperationId, updates: Vec<Update>) -> Result<Reply> {
        if updates.iter().any(|update| update.ino().home() != self.slot() || !plausible::update(update)) {
            return Err(Errno::EINVAL);
        }
        let tried = self.store.borrow_mut().write(|txn| {
            apply(txn, &updates)?;
            Err::<(), ApplyError>(ApplyError::Tried)
        });
        match tried {
            Err(ApplyError::Tried) => {}
            Err(error) => return Err(error.errno()),
            Ok(()) => unreachable!("a try never commits"),
        }
        self.store
            .borrow_mut()
            .write(|txn| txn.put_prepared(transaction, &prepared_record(&updates)))
            .map_err(store_error)?;
        self.prepared.borrow_mut().insert(transaction, updates);
        Ok(Reply::Done)
    }

    /// The coordinator has decided.
    pub(crate) fn decide(self: &Rc<Self>, transaction: OperationId, commit: bool) -> Result<Reply> {
        let updates = self.prepared.borrow_mut().remove(&transaction).ok_or(Errno::EINVAL)?;
        let changed = if commit { self.apply_own(&updates)? } else { Vec::new() };
        self.store.borrow_mut().write(|txn| txn.delete_prepared(transaction)).map_err(store_error)?;
        Ok(Reply::Decided(changed))
    }

    async fn operate_change(self: &Rc<Self>, caller: Caller, ino: Ino, change: Change) -> Result<Reply> {
        let _pins = self.pin_attributes([ino]).await?;
        let mut attributes = self.settled_attributes(ino)?;
        let now = self.clock();
        let time = |new: NewTime| match new {
            NewTime::Now => now,
            NewTime::At(time) => time,
        };
        let mut list = None;
        if let Some(mode) = change.mode {
            attributes.mode = mode & 0o7777;
            if attributes.has_xattrs {
                let value = self.store.borrow().read(|txn| txn.xattr(ino, ACCESS_XATTR)).map_err(store_error)?;
                list = value.and_then(|value| Acl::parse(&value).ok().flatten()).map(|list| list.chmod(mode));
            }
        }
        if change.clear_set_id && caller.uid != 0 {
            if attributes.mode & 0o2010 == 0o2010 {
                attributes.mode &= !0o2000;
            }
            attributes.mode &= !0o4000;
        }
        if let Some(uid) = change.uid {
            attributes.uid = uid;
        }
        if let Some(gid) = change.gid {
            attributes.gid = gid;
        }
        if let Some(atime) = change.atime {
            attributes.atime = time(atime);
        }
        if let Some(mtime) = change.mtime {
            attributes.mtime = time(mtime);
            // What holders report from now on came later, however early its time.
            self.touched.borrow_mut().remove(&ino);
        }
        attributes.ctime = now;
        self.store
            .borrow_mut()
            .write(|txn| {
                if let Some(list) = &list {
                    txn.set_xattr(ino, ACCESS_XATTR, &list.serialise(), SetXattr::Any)?;
                }
                if change.clear_set_id && attributes.has_xattrs {
                    txn.remove_xattr(ino, CAPABILITY_XATTR)?;
                    attributes.has_xattrs = !txn.xattrs(ino)?.is_empty();
                }
                txn.put_inode(&attributes)
            })
            .map_err(store_error)?;
        self.replace_base(attributes.clone());
        Ok(Reply::Attributes(Box::new(attributes)))
    }

    async fn operate_set_xattr(
        self: &Rc<Self>,
        caller: Caller,
        ino: Ino,
        name: Vec<u8>,
        value: Vec<u8>,
        create: bool,
        replace: bool,
    ) -> Result<Reply> {
        if !plausible::xattr(&name, &value) {
            return Err(Errno::EINVAL);
        }
        let _pins = self.pin_attributes([ino]).await?;
        let mut attributes = self.settled_attributes(ino)?;
        let mut store_value = Some(value);
        if name == ACCESS_XATTR || name == DEFAULT_XATTR {
            if attributes.kind == FileKind::Symlink {
                return Err(Errno::EOPNOTSUPP);
            }
            let bytes = store_value.take().expect("it was just put there");
            let list = Acl::parse(&bytes).map_err(|error| Errno(error.errno()))?;
            if name == ACCESS_XATTR {
                if let Some(list) = list {
                    let (mode, stored) = list.stored_as(attributes.mode);
                    attributes.mode = mode;
                    // setxattr by somebody outside the group drops set-group-id, as chmod does.
                    if caller.uid != 0 && caller.gid != attributes.gid {
                        attributes.mode &= !0o2000;
                    }
                    store_value = stored.map(|list| list.serialise());
                }
            } else {
                if attributes.kind != FileKind::Directory {
                    return if list.is_some() { Err(Errno::EACCES) } else { Ok(Reply::Done) };
                }
                store_value = list.map(|list| list.serialise());
            }
        }
        let how = match (create, replace) {
            (true, _) => SetXattr::Create,
            (_, true) => SetXattr::Replace,
            _ => SetXattr::Any,
        };
        attributes.ctime = self.clock();
        self.store
            .borrow_mut()
            .write(|txn| {
                match &store_value {
                    Some(value) => txn.set_xattr(ino, &name, value, how)?,
                    None => {
                        txn.remove_xattr(ino, &name)?;
                    }
                }
                attributes.has_xattrs = !txn.xattrs(ino)?.is_empty();
                txn.put_inode(&attributes)
            })
            .map_err(store_error)?;
        self.replace_base(attributes);
        Ok(Reply::Done)
    }

    async fn operate_remove_xattr(self: &Rc<Self>, ino: Ino, name: Vec<u8>) -> Result<Reply> {
        let _pins = self.pin_attributes([ino]).await?;
        let mut attributes = self.settled_attributes(ino)?;
        attributes.ctime = self.clock();
        let removed = self
            .store
            .borrow_mut()
            .write(|txn| {
                let removed = txn.remove_xattr(ino, &name)?;
                if removed {
                    attributes.has_xattrs = !txn.xattrs(ino)?.is_empty();
                    txn.put_inode(&attributes)?;
                }
                Ok::<_, verbfs_namespace::Error>(removed)
            })
            .map_err(store_error)?;
        if !removed {
            return Err(Errno::ENODATA);
        }
        self.replace_base(attributes);
        Ok(Reply::Done)
    }

    /// Removes an orphan as soon as nobody has it open.
    fn reap_later(self: &Rc<Self>, ino: Ino) {
        let volume = self.clone();
        self.spawn(async move {
            if let Err(error) = volume.reap(ino).await {
                tracing::debug!(%ino, ?error, "an orphan could not be removed; it is tried again when a peer or this node is back");
            }
        });
    }

    async fn reap(self: &Rc<Self>, ino: Ino) -> Result<()> {
        while self.openings.borrow().keys().any(|(other, _)| *other == ino) {
            self.openings_changed.wait().await;
        }
        let _open_pin = self.pin(Resource::open(ino), Range::UNIT, Range::UNIT, PinKind::Exclusive).await?;
        let _pins = self.pin_attributes([ino]).await?;
        let attributes = match self.settled_attributes(ino) {
            Ok(attributes) if attributes.nlink == 0 => attributes,
            Ok(_) | Err(Errno::ESTALE) => return Ok(()),
            Err(error) => return Err(error),
        };
        if attributes.layout.is_valid() && (attributes.pages > 0 || attributes.size > 0) {
            // Nobody may write back to extents that are about to be somebody else's.
            let range = data::ALL_PAGES;
            let mut pins = Vec::new();
            for (resource, hull) in self.data_resources(ino, &attributes.layout, range) {
                pins.push(self.pin(resource, hull, hull, PinKind::Exclusive).await?);
            }
            self.free_pages(ino, &attributes.layout, range).await?;
        }
        let full = |error: &verbfs_namespace::Error| matches!(error, verbfs_namespace::Error::Full);
        self.store.borrow_mut().write_reclaiming(full, |txn| txn.delete_inode(ino)).map_err(store_error)?;
        self.attributes.borrow_mut().remove(&ino);
        self.touched.borrow_mut().remove(&ino);
        self.files.borrow_mut().remove(&ino);
        Ok(())
    }
}
