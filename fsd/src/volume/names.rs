//! Names as a client sees them: look-ups under NAME locks, and operations that homes execute.

use super::*;
use std::collections::BTreeMap;
use verbfs_lock::PinKind;
use verbfs_namespace::{COLLISIONS_MAX, name_hash};

/// Cached hashes of names of all directories at most; about 150 bytes each.
const CACHED_HASHES_MAX: usize = 200_000;
/// A look-up whose inode goes away between entry and attributes is tried so often again.
const LOOKUP_ATTEMPTS: usize = 16;

/// What a name is known to stand for; `None`: nothing.
type Named = Option<(Ino, FileKind)>;

/// What is known of the names of one hash: nearly always one.
#[derive(Default)]
struct Known {
    entries: Vec<(Vec<u8>, Named)>,
    /// A name that is not listed does not exist.
    complete: bool,
}

/// Entries of directories of other homes, present or absent, each under a NAME lock.
#[derive(Default)]
pub(crate) struct NameCache {
    directories: HashMap<Ino, BTreeMap<u64, Known>>,
    hashes: usize,
}

impl NameCache {
    fn get(&self, directory: Ino, hash: u64, name: &[u8]) -> Option<Named> {
        let known = self.directories.get(&directory)?.get(&hash)?;
        match known.entries.iter().find(|(other, _)| other == name) {
            Some((_, entry)) => Some(*entry),
            None => known.complete.then_some(None),
        }
    }

    fn of_hash(&mut self, directory: Ino, hash: u64) -> &mut Known {
        if self.hashes >= CACHED_HASHES_MAX {
            // Entries may be forgotten at any time; the lock stays.
            self.directories.clear();
            self.hashes = 0;
        }
        self.directories.entry(directory).or_default().entry(hash).or_insert_with(|| {
            self.hashes += 1;
            Known::default()
        })
    }

    fn put(&mut self, directory: Ino, hash: u64, name: &[u8], entry: Named) {
        let known = self.of_hash(directory, hash);
        known.entries.retain(|(other, _)| other != name);
        known.entries.push((name.to_vec(), entry));
    }

    pub fn drop_range(&mut self, directory: Ino, range: Range) {
        let Some(entries) = self.directories.get_mut(&directory) else { return };
        let gone: Vec<u64> = entries.range(range.lo..range.hi).map(|(hash, _)| *hash).collect();
        for hash in gone {
            entries.remove(&hash);
            self.hashes -= 1;
        }
        if entries.is_empty() {
            self.directories.remove(&directory);
        }
    }
}

/// The NAME range of one name.
pub(crate) fn name_range(name: &[u8]) -> Range {
    let hash = name_hash(name);
    Range::new(hash, hash + 1)
}

pub(crate) fn check_name(name: &[u8]) -> Result<()> {
    if name.is_empty() || name == b"." || name == b".." || name.contains(&b'/') || name.contains(&0) {
        return Err(Errno::EINVAL);
    }
    if name.len() > NAME_MAX { Err(Errno::ENAMETOOLONG) } else { Ok(()) }
}

impl Volume {
    /// An entry, read under a NAME S lock.
    async fn entry(self: &Rc<Self>, directory: Ino, name: &[u8]) -> Result<Option<(Ino, FileKind)>> {
        let range = name_range(name);
        let _pin = self.pin(Resource::name(directory), range, Range::ALL, PinKind::Shared).await?;
        self.pinned_entry(directory, name).await
    }

    /// An entry while its NAME is pinned.
    pub(crate) async fn pinned_entry(self: &Rc<Self>, directory: Ino, name: &[u8]) -> Result<Option<(Ino, FileKind)>> {
        if directory.home() == self.slot() {
            let entry = self.store.borrow().read(|txn| txn.entry(directory, name)).map_err(storage::store_error)?;
            return Ok(entry.map(|entry| (entry.ino, entry.kind)));
        }
        let hash = name_hash(name);
        if let Some(known) = self.names.borrow().get(directory, hash, name) {
            return Ok(known);
        }
        match self.call(directory.home(), Request::Lookup { directory, name: name.to_vec() }).await? {
            Reply::Entry(entry) => {
                self.names.borrow_mut().put(directory, hash, name, entry);
                Ok(entry)
            }
            _ => Err(Errno::EPROTO),
        }
    }

    /// All entries of one hash, to travel with the lock on it. `None`: whoever asked asks again by name.
    pub(crate) fn entries_of(&self, directory: Ino, hash: u64) -> Option<HashEntries> {
        let after = hash.checked_sub(1)?;
        let found = self.store.borrow().read(|txn| txn.scan(directory, after, HASH_ENTRIES_MAX + 1)).ok()?;
        let listed: Vec<Listed> = found
            .into_iter()
            .take_while(|entry| entry.cursor - hash < COLLISIONS_MAX)
            .map(|entry| Listed {
                name: entry.name,
                ino: entry.entry.ino,
                kind: entry.entry.kind,
                cursor: entry.cursor,
            })
            .collect();
        (listed.len() <= HASH_ENTRIES_MAX).then_some(HashEntries { hash, entries: listed })
    }

    /// GRANT of NAME brought these: all entries of one hash.
    pub(crate) fn adopt_entries(&self, from: Slot, directory: Ino, named: HashEntries) {
        let HashEntries { hash, entries } = named;
        let range = Range::new(hash, hash.saturating_add(1));
        if entries.iter().any(|entry| check_name(&entry.name).is_err() || name_hash(&entry.name) != hash) {
            self.refuse(from, "entries of another hash than was granted");
            return;
        }
        if self.lock_client.borrow().held(Resource::name(directory), range).is_none() {
            return;
        }
        let mut names = self.names.borrow_mut();
        let known = names.of_hash(directory, hash);
        known.entries = entries.iter().map(|entry| (entry.name.clone(), Some((entry.ino, entry.kind)))).collect();
        known.complete = true;
    }

    /// Attributes of what `name` names in a directory.
    ///
    /// # Errors
    /// ENOENT; ENAMETOOLONG; EIO when a home is unreachable.
    pub async fn lookup(self: &Rc<Self>, parent: Ino, name: &[u8]) -> Result<Attributes> {
        if name.len() > NAME_MAX {
            return Err(Errno::ENAMETOOLONG);
        }
        for _ in 0..LOOKUP_ATTEMPTS {
            let Some((ino, _)) = self.entry(parent, name).await? else { return Err(Errno::ENOENT) };
            match self.attributes(ino).await {
                Ok(attributes) if attributes.nlink > 0 => return Ok(attributes),
                // Unlinked in between: the name means something else now, or nothing.
                Ok(_) | Err(Errno::ESTALE) => {}
                Err(error) => return Err(error),
            }
        }
        Err(Errno::ENOENT)
    }

    async fn operation(self: &Rc<Self>, home: Slot, caller: Caller, kind: Operation) -> Result<Reply> {
        let wanted = self.yield_locks(home, &kind);
        let operation = OperationId { node: self.options.me, sequence: self.number() };
        let outcome = self.call(home, Request::Operation { operation, acked_below: 0, caller, kind }).await;
        self.ask_ahead(wanted);
        outcome
    }

    /// What a home is about to take for an operation it need not ask this node for: that would be a round trip each. Returns
    /// what of it this node will want again, because the kernel looks at it next.
    fn yield_locks(self: &Rc<Self>, home: Slot, kind: &Operation) -> Vec<(Resource, Range)> {
        if home == self.slot() {
            return Vec::new();
        }
        // Each with whether it is wanted again.
        let mut yielded: Vec<(Resource, Range, bool)> = Vec::new();
        let mut entry = |directory: &Ino, name: &[u8], stays: bool| {
            let known = self.names.borrow().get(*directory, name_hash(name), name).flatten();
            yielded.push((Resource::name(*directory), name_range(name), stays));
            yielded.push((Resource::attr(*directory), Range::UNIT, true));
            if let Some((ino, _)) = known {
                yielded.push((Resource::attr(ino), Range::UNIT, false));
                if !stays {
                    yielded.push((Resource::open(ino), Range::UNIT, false));
                }
            }
        };
        match kind {
            Operation::Create { parent, name, .. } | Operation::MakeDirectory { parent, name, .. } => {
                entry(parent, name, true)
            }
            Operation::Unlink { parent, name } | Operation::RemoveDirectory { parent, name } => {
                entry(parent, name, false)
            }
            Operation::Link { ino, parent, name } => {
                entry(parent, name, true);
                yielded.push((Resource::attr(*ino), Range::UNIT, true));
            }
            Operation::Rename { parent, name, new_parent, new_name, .. } => {
                entry(parent, name, true);
                entry(new_parent, new_name, false);
            }
            Operation::Change { ino, .. } | Operation::SetXattr { ino, .. } | Operation::RemoveXattr { ino, .. } => {
                yielded.push((Resource::attr(*ino), Range::UNIT, true));
            }
        }
        let wanted = yielded
            .into_iter()
            .filter(|(resource, range, _)| resource.server != self.slot() && self.give_up(*resource, *range))
            .filter(|(.., wanted)| *wanted)
            .map(|(resource, range, _)| (resource, range))
            .collect();
        // The releases first, or the home asks for what is on its way.
        while self.pump() {}
        wanted
    }

    /// Asks for locks that will be wanted, without waiting for them.
    fn ask_ahead(self: &Rc<Self>, wanted: Vec<(Resource, Range)>) {
        for (resource, range) in wanted {
            let want = if resource.class == Class::Name { Range::ALL } else { range };
            let volume = self.clone();
            self.spawn(async move {
                // Whoever needs it and does not find it asks again, and hears the error.
                let _ = volume.pin(resource, range, want, PinKind::Shared).await;
            });
        }
    }

    /// Makes something that is not a directory. `Ok((attributes, created))`. With `opening`, [`Volume::open`] must follow: until
    /// its lock is asked for, the home keeps the inode.
    ///
    /// # Errors
    /// EEXIST when `exclusive` and the name is taken; ENOENT when the directory was removed; ENOSPC.
    pub async fn create(
        self: &Rc<Self>,
        caller: Caller,
        parent: Ino,
        name: &[u8],
        new: NewInode,
        exclusive: bool,
        opening: bool,
    ) -> Result<(Attributes, bool)> {
        check_name(name)?;
        match self
            .operation(
                parent.home(),
                caller,
                Operation::Create { parent, name: name.to_vec(), new, exclusive, opening },
            )
            .await?
        {
            Reply::Created { attributes, created } if plausible::attributes(&attributes) => {
                // Who opens it wants the layout next; closing forgets it again. A home's word counts for its own inodes.
                if opening && attributes.ino.home() == parent.home() && self.is_usable(&attributes.layout) {
                    self.files.borrow_mut().entry(attributes.ino).or_default().layout =
                        Some(Rc::new(attributes.layout.clone()));
                }
                Ok((*attributes, created))
            }
            _ => Err(Errno::EPROTO),
        }
    }

    pub async fn make_directory(
        self: &Rc<Self>,
        caller: Caller,
        parent: Ino,
        name: &[u8],
        new: NewInode,
    ) -> Result<Attributes> {
        check_name(name)?;
        match self
            .operation(parent.home(), caller, Operation::MakeDirectory { parent, name: name.to_vec(), new })
            .await?
        {
            Reply::Attributes(attributes) if plausible::attributes(&attributes) => Ok(*attributes),
            _ => Err(Errno::EPROTO),
        }
    }

    pub async fn unlink(self: &Rc<Self>, caller: Caller, parent: Ino, name: &[u8]) -> Result<()> {
        check_name(name)?;
        self.operation(parent.home(), caller, Operation::Unlink { parent, name: name.to_vec() }).await.map(|_| ())
    }

    pub async fn remove_directory(self: &Rc<Self>, caller: Caller, parent: Ino, name: &[u8]) -> Result<()> {
        match name {
            b"." => return Err(Errno::EINVAL),
            b".." => return Err(Errno::ENOTEMPTY),
            _ => check_name(name)?,
        }
        self.operation(parent.home(), caller, Operation::RemoveDirectory { parent, name: name.to_vec() })
            .await
            .map(|_| ())
    }

    pub async fn link(self: &Rc<Self>, caller: Caller, ino: Ino, parent: Ino, name: &[u8]) -> Result<Attributes> {
        check_name(name)?;
        match self.operation(parent.home(), caller, Operation::Link { ino, parent, name: name.to_vec() }).await? {
            Reply::Attributes(attributes) if attributes.ino == ino && plausible::attributes(&attributes) => {
                Ok(*attributes)
            }
            _ => Err(Errno::EPROTO),
        }
    }

    pub async fn rename(
        self: &Rc<Self>,
        caller: Caller,
        parent: Ino,
        name: &[u8],
        new_parent: Ino,
        new_name: &[u8],
        flags: RenameFlags,
    ) -> Result<()> {
        check_name(name)?;
        check_name(new_name)?;
        let kind = Operation::Rename { parent, name: name.to_vec(), new_parent, new_name: new_name.to_vec(), flags };
        self.operation(parent.home(), caller, kind).await.map(|_| ())
    }

    /// Mode, owner, times; see [`Volume::truncate`] for the size.
    pub async fn change(self: &Rc<Self>, caller: Caller, ino: Ino, change: Change) -> Result<Attributes> {
        match self.operation(ino.home(), caller, Operation::Change { ino, change }).await? {
            Reply::Attributes(attributes) if attributes.ino == ino && plausible::attributes(&attributes) => {
                Ok(*attributes)
            }
            _ => Err(Errno::EPROTO),
        }
    }

    pub async fn read_link(self: &Rc<Self>, ino: Ino) -> Result<Vec<u8>> {
        match self.call(ino.home(), Request::ReadLink { ino }).await? {
            Reply::Bytes(target) if target.len() <= SYMLINK_MAX => Ok(target),
            _ => Err(Errno::EIO),
        }
    }

    pub async fn get_xattr(self: &Rc<Self>, ino: Ino, name: &[u8]) -> Result<Vec<u8>> {
        if self.has_no_xattrs(ino) {
            return Err(Errno::ENODATA);
        }
        match self.call(ino.home(), Request::GetXattr { ino, name: name.to_vec() }).await? {
            Reply::Bytes(value) => Ok(value),
            _ => Err(Errno::EPROTO),
        }
    }

    /// Whether a lock that this node holds already says that an inode has no extended attributes. `ls -l` asks for two of each
    /// file that it has just asked the attributes of.
    fn has_no_xattrs(self: &Rc<Self>, ino: Ino) -> bool {
        let pin = self.pin_held(Resource::attr(ino), Range::UNIT, PinKind::Shared);
        pin.is_some() && self.pinned_attributes(ino).is_ok_and(|attributes| !attributes.has_xattrs)
    }

    pub async fn list_xattr(self: &Rc<Self>, ino: Ino) -> Result<Vec<Vec<u8>>> {
        if self.has_no_xattrs(ino) {
            return Ok(Vec::new());
        }
        match self.call(ino.home(), Request::ListXattr { ino }).await? {
            Reply::Names(names) => Ok(names),
            _ => Err(Errno::EPROTO),
        }
    }

    pub async fn set_xattr(
        self: &Rc<Self>,
        caller: Caller,
        ino: Ino,
        name: &[u8],
        value: &[u8],
        create: bool,
        replace: bool,
    ) -> Result<()> {
        if value.len() > XATTR_VALUE_MAX {
            return Err(Errno(libc::E2BIG));
        }
        if name.is_empty() || name.len() > NAME_MAX {
            return Err(Errno::ERANGE);
        }
        self.operation(
            ino.home(),
            caller,
            Operation::SetXattr { ino, name: name.to_vec(), value: value.to_vec(), create, replace },
        )
        .await
        .map(|_| ())
    }

    pub async fn remove_xattr(self: &Rc<Self>, caller: Caller, ino: Ino, name: &[u8]) -> Result<()> {
        self.operation(ino.home(), caller, Operation::RemoveXattr { ino, name: name.to_vec() }).await.map(|_| ())
    }

    /// Space of the whole volume: the sum over the nodes that can be reached.
    pub async fn statfs(self: &Rc<Self>) -> Result<Space> {
        let calls = self.options.members.clone().into_iter().map(
            |slot| -> std::pin::Pin<Box<dyn Future<Output = Result<Reply>>>> {
                let volume = self.clone();
                Box::pin(async move { volume.call(slot, Request::Statfs).await })
            },
        );
        let mut sum = Space::default();
        for reply in crate::executor::join_all(calls.collect()).await {
            if let Ok(Reply::Space(space)) = reply {
                sum.pages = sum.pages.saturating_add(space.pages);
                sum.free_pages = sum.free_pages.saturating_add(space.free_pages);
                sum.inodes = sum.inodes.saturating_add(space.inodes);
                sum.free_inodes = sum.free_inodes.saturating_add(space.free_inodes);
            }
        }
        Ok(sum)
    }

    /// Entries behind `cursor` (0 = start), without . and ..; `true` at the end. An entry that exists throughout
    /// a scan is listed once, one that never does is not.
    pub async fn list(self: &Rc<Self>, directory: Ino, cursor: u64, limit: u32) -> Result<(Vec<Listed>, bool)> {
        let _pin = self.pin(Resource::name(directory), Range::ALL, Range::ALL, PinKind::Shared).await?;
        match self.call(directory.home(), Request::List { directory, cursor, limit }).await? {
            Reply::Entries { entries, end } => {
                // What FUSE refuses to pass on would never reach the caller.
                if entries.iter().any(|entry| check_name(&entry.name).is_err() || entry.cursor <= cursor) {
                    self.refuse(directory.home(), "a listing with names that cannot be");
                    return Err(Errno::EIO);
                }
                Ok((entries, end))
            }
            _ => Err(Errno::EPROTO),
        }
    }

    pub async fn parent(self: &Rc<Self>, directory: Ino) -> Result<Ino> {
        match self.call(directory.home(), Request::Parent { directory }).await? {
            Reply::Ino(ino) => Ok(ino),
            _ => Err(Errno::EPROTO),
        }
    }
}
