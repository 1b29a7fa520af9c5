//! One node's volume as a FUSE file system.
//!
//! # The strict recipe
//! | setting | why |
//! |---|---|
//! | every open of a file is `FOPEN_DIRECT_IO` | a buffered write would be in the kernel's page cache before this daemon hears of it |
//! | ... and `FOPEN_PARALLEL_DIRECT_WRITES` | writers to different ranges do not queue on the inode lock |
//! | entries, absent entries and attributes are valid for 0 s | dropping a cached entry needs the parent's inode lock, which a create may hold while it waits behind the very revoke |
//! | no `FUSE_WRITEBACK_CACHE` | with it the kernel believes that it alone knows sizes and times |
//! | no `FUSE_ATOMIC_O_TRUNC` | the kernel then sends a setattr to size 0 after the open, with its own checks |
//! | no `FUSE_DO_READDIRPLUS` | with attributes valid for 0 s the kernel looks every entry up again: all of its work is wasted |
//! | `FUSE_EXPLICIT_INVAL_DATA` | pages the kernel caches (shared mappings, exec, sendfile) are dropped when the lock that covers them goes, not when a size or time happens to have changed |
//! | `FUSE_DIRECT_IO_ALLOW_MMAP` (Linux 6.6) | shared mappings of files opened for direct I/O |
//! | `FUSE_POSIX_ACL`, `FUSE_DONT_MASK`, `default_permissions` | the kernel checks permissions by fresh modes and lists; the umask is applied by the volume, which knows default lists |
//!
//! `FUSE_SETXATTR_EXT`, `FUSE_HANDLE_KILLPRIV_V2` and `FUSE_ALLOW_IDMAP` must not be asked for: `fuser` 0.18 misreads the requests that they change.
//!
//! # Threads
//! No thread of FUSE waits. Each request is submitted to the node's core with its reply inside, and is answered
//! by whatever thread completes it.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Instant, SystemTime};

use fuser::{
    AccessFlags, BsdFileFlags, CopyFileRangeFlags, Errno, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, InitFlags, IoctlFlags, KernelConfig, LockOwner as FuseLockOwner, OpenFlags,
    RenameFlags as FuseRenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty,
    ReplyEntry, ReplyIoctl, ReplyLock, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow,
    WriteFlags,
};
use verbfs_protocol::{
    Attributes, Caller, Change, FileKind, FileLock, FileLockKind, Ino, LockOwner, LockSpace, NAME_MAX, NewInode,
    PAGE_SIZE, RenameFlags, SYMLINK_MAX, XATTR_VALUE_MAX,
};

use super::convert::{self, NO_CACHING, ino, node_id};
use super::file_locks::FileLockOwners;
use super::interrupts::Interrupts;
use super::lock_flags::{self, FUSE_LK_FLOCK, LockArguments};
use super::{NoObserver, Observer};
use crate::volume::{self, NodeHandle, Volume};

/// Largest read and write request: what the volume takes as one atomic piece.
pub const MAX_REQUEST: u32 = 1 << 20;
/// Background requests (asynchronous direct I/O, read-ahead) the kernel keeps in flight: enough for a queue of 1 MiB requests
/// from several programs; beyond it the kernel queues them itself.
const MAX_BACKGROUND: u16 = 128;
/// From here on the kernel holds back read-ahead: three quarters, as in libfuse.
const CONGESTION_THRESHOLD: u16 = MAX_BACKGROUND / 4 * 3;
const _: () = assert!(CONGESTION_THRESHOLD < MAX_BACKGROUND);

/// What every open of a regular file is answered with.
pub const OPEN_FLAGS: FopenFlags = FopenFlags::FOPEN_DIRECT_IO.union(FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES);

/// What is asked of the kernel where it has it.
const WANTED: [InitFlags; 12] = [
    InitFlags::FUSE_ASYNC_READ,
    InitFlags::FUSE_POSIX_LOCKS,
    InitFlags::FUSE_FLOCK_LOCKS,
    InitFlags::FUSE_BIG_WRITES,
    InitFlags::FUSE_DONT_MASK,
    InitFlags::FUSE_ASYNC_DIO,
    InitFlags::FUSE_PARALLEL_DIROPS,
    InitFlags::FUSE_POSIX_ACL,
    InitFlags::FUSE_MAX_PAGES,
    InitFlags::FUSE_EXPORT_SUPPORT,
    InitFlags::FUSE_EXPLICIT_INVAL_DATA,
    InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP,
];

/// Without these the promise of the file system cannot be kept, and the mount fails.
const REQUIRED: InitFlags = InitFlags::FUSE_POSIX_LOCKS
    .union(InitFlags::FUSE_FLOCK_LOCKS)
    .union(InitFlags::FUSE_DONT_MASK)
    .union(InitFlags::FUSE_POSIX_ACL);

/// Offsets of `.` and `..` in a directory; entry cursors of the volume follow, moved up by [`CURSOR_SHIFT`].
const OFFSET_BEHIND_DOT: u64 = 1;
const OFFSET_BEHIND_DOT_DOT: u64 = 2;
const CURSOR_SHIFT: u64 = OFFSET_BEHIND_DOT_DOT;
/// The largest offset that the kernel can seek a directory to. The cursors that do not fit below it share it as "the end".
const OFFSET_END: u64 = i64::MAX as u64;
/// Entries asked for at once: about what fills the smallest buffer, a page. Doubled while the buffer has room.
const LIST_FIRST: u32 = 128;
const LIST_MOST: u32 = 1024;

/// Inode numbers are never used again, so one generation is enough.
const GENERATION: Generation = Generation(0);

/// Asks the kernel for the strict recipe; shared with [`super::null`].
pub(super) fn configure(config: &mut KernelConfig) -> std::io::Result<()> {
    let missing = REQUIRED & !config.capabilities();
    if !missing.is_empty() {
        return Err(std::io::Error::new(
            std::io::ErrorKind::Unsupported,
            format!("this kernel's FUSE lacks {missing:?}"),
        ));
    }
    for wanted in WANTED {
        if let Err(absent) = config.add_capabilities(wanted) {
            tracing::info!(?absent, "this kernel's FUSE lacks a wanted feature");
        }
    }
    // These fail only for values that fuser or the kernel cannot take; what they then use is good enough.
    let _ = config.set_max_write(MAX_REQUEST);
    let _ = config.set_max_background(MAX_BACKGROUND);
    let _ = config.set_congestion_threshold(CONGESTION_THRESHOLD);
    // None: a request for several pages holds the locks of all of them while it waits for DATA locks one server after
    // the other, and another node's revoke waits for those page locks.
    let _ = config.set_max_readahead(1);
    Ok(())
}

/// A mounted volume: implements [`fuser::Filesystem`] on a [`NodeHandle`].
pub struct VerbfsFuse {
    node: NodeHandle,
    observer: Arc<dyn Observer>,
    lock_owners: Arc<FileLockOwners>,
    interrupts: Interrupts,
    next_token: AtomicU64,
}

/// Observes an operation from its start until this is dropped, behind the reply.
struct Timer {
    observer: Arc<dyn Observer>,
    operation: &'static str,
    start: Instant,
}

impl Drop for Timer {
    fn drop(&mut self) {
        self.observer.observe(self.operation, self.start.elapsed().as_nanos().min(u128::from(u64::MAX)) as u64);
    }
}

/// The error number of the volume as `fuser` wants it.
fn errno(error: volume::Errno) -> Errno {
    Errno::from_i32(error.0)
}

/// Who asks.
fn caller(request: &Request) -> Caller {
    Caller { uid: request.uid(), gid: request.gid(), pid: request.pid() }
}

/// A name that fits into a directory entry.
fn name(name: &OsStr) -> Result<Vec<u8>, Errno> {
    if name.len() > NAME_MAX { Err(Errno::ENAMETOOLONG) } else { Ok(name.as_bytes().to_vec()) }
}

/// Unwraps, or replies with the error and returns.
macro_rules! or_reply {
    ($reply:ident, $result:expr) => {
        match $result {
            Ok(value) => value,
            Err(error) => return $reply.error(error),
        }
    };
}

fn reply_empty(reply: ReplyEmpty, result: Result<(), volume::Errno>) {
    match result {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(errno(error)),
    }
}

fn reply_entry(reply: ReplyEntry, result: Result<Attributes, volume::Errno>) {
    match result {
        Ok(found) => reply.entry(&NO_CACHING, &convert::attributes(&found), GENERATION),
        Err(error) => reply.error(errno(error)),
    }
}

impl VerbfsFuse {
    /// Serves the volume of `node`. Starts the thread that watches waiting lock calls.
    pub fn new(node: NodeHandle, observer: Arc<dyn Observer>) -> std::io::Result<VerbfsFuse> {
        let canceller = node.clone();
        let interrupts = Interrupts::start(Box::new(move |ino, token| {
            canceller.submit(move |volume| async move { volume.cancel_file_lock(ino, token) })
        }))?;
        Ok(VerbfsFuse { node, observer, lock_owners: Arc::default(), interrupts, next_token: AtomicU64::new(1) })
    }

    /// Serves the volume of `node` and tells nobody how long things take.
    pub fn unobserved(node: NodeHandle) -> std::io::Result<VerbfsFuse> {
        Self::new(node, Arc::new(NoObserver))
    }

    /// Runs an operation in the core. What it captures, its reply above all, moves there with it.
    fn submit<F, Fut>(&self, operation: &'static str, run: F)
    where
        F: FnOnce(std::rc::Rc<Volume>) -> Fut + Send + 'static,
        Fut: Future<Output = ()> + 'static,
    {
        self.observer.arrived(operation);
        let timer = Timer { observer: Arc::clone(&self.observer), operation, start: Instant::now() };
        self.node.submit(move |volume| {
            let running = run(volume);
            async move {
                running.await;
                drop(timer);
            }
        });
    }

    /// Which space a lock request is about; `None` if the request cannot be understood.
    fn lock_space(request: &Request, arguments: LockArguments) -> Option<LockSpace> {
        let Some(flags) = lock_flags::flags(request, arguments) else {
            tracing::error!("a lock request does not lie where fuser 0.18 has it: file locks are refused");
            return None;
        };
        Some(if flags & FUSE_LK_FLOCK != 0 { LockSpace::Flock } else { LockSpace::Posix })
    }

    fn get_attribute_bytes(
        &self,
        operation: &'static str,
        size: u32,
        reply: ReplyXattr,
        get: impl AsyncFnOnce(std::rc::Rc<Volume>) -> Result<Vec<u8>, volume::Errno> + Send + 'static,
    ) {
        self.submit(operation, move |volume| async move {
            match get(volume).await {
                Err(error) => reply.error(errno(error)),
                Ok(value) if size == 0 => reply.size(value.len() as u32),
                Ok(value) if value.len() > size as usize => reply.error(Errno::ERANGE),
                Ok(value) => reply.data(&value),
            }
        });
    }
}

/// Namespaces of extended attributes (xattr(7)) that files of this system have.
fn xattr_name(name: &OsStr) -> Result<Vec<u8>, Errno> {
    let name = name.as_bytes();
    let known = [b"user.".as_slice(), b"trusted.", b"security."]
        .iter()
        .any(|prefix| name.len() > prefix.len() && name.starts_with(prefix));
    if name.len() > NAME_MAX {
        Err(Errno::ERANGE)
    } else if known || name == crate::acl::ACCESS_XATTR || name == crate::acl::DEFAULT_XATTR {
        Ok(name.to_vec())
    } else {
        Err(Errno::EOPNOTSUPP)
    }
}

/// Whether listxattr shows a name to this user: `trusted.` names are root's (xattr(7)); names outside the known namespaces are the volume's own.
fn xattr_is_listed(name: &[u8], uid: u32) -> bool {
    xattr_name(OsStr::from_bytes(name)).is_ok() && (uid == 0 || !name.starts_with(b"trusted."))
}

/// Whether the mode bits alone show that `caller` may open the file so.
///
/// A create that finds a file there (another node was faster) is opened by the kernel without a check. Where the bits
/// do not settle it (groups and lists are not known here) the caller is told ESTALE, and the kernel walks the path
/// again, finds the file by lookup, and checks.
fn may_open_found(found: &Attributes, caller: Caller, flags: i32) -> bool {
    if found.kind != FileKind::Regular {
        return false;
    }
    let access = match flags & libc::O_ACCMODE {
        libc::O_RDONLY => 0o4,
        libc::O_WRONLY => 0o2,
        _ => 0o6,
    } | if flags & libc::O_TRUNC != 0 { 0o2 } else { 0 };
    let granted = |shift: u32| found.mode >> shift & access == access;
    caller.uid == 0 || if caller.uid == found.uid { granted(6) } else { !found.has_xattrs && granted(3) && granted(0) }
}

impl Filesystem for VerbfsFuse {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        configure(config)
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, entry: &OsStr, reply: ReplyEntry) {
        let (parent, entry) = (ino(parent), or_reply!(reply, name(entry)));
        self.submit("lookup", move |volume| async move {
            // The dots are asked for by the NFS server only (FUSE_EXPORT_SUPPORT).
            let found = match entry.as_slice() {
                b"." => volume.attributes(parent).await,
                b".." => match volume.parent(parent).await {
                    Ok(above) => volume.attributes(above).await,
                    Err(error) => Err(error),
                },
                _ => volume.lookup(parent, &entry).await,
            };
            reply_entry(reply, found);
        });
    }

    fn getattr(&self, _request: &Request, node: INodeNo, _handle: Option<FileHandle>, reply: ReplyAttr) {
        self.submit("getattr", move |volume| async move {
            match volume.attributes(ino(node)).await {
                Ok(found) => reply.attr(&NO_CACHING, &convert::attributes(&found)),
                Err(error) => reply.error(errno(error)),
            }
        });
    }

    fn setattr(
        &self,
        request: &Request,
        node: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _handle: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let (caller, node) = (caller(request), ino(node));
        let change = Change {
            mode: mode.map(|mode| mode & 0o7777),
            uid,
            gid,
            atime: atime.map(convert::new_time),
            mtime: mtime.map(convert::new_time),
            clear_set_id: false,
        };
        self.submit("setattr", move |volume| async move {
            // Size first: a truncation sets mtime, which an explicit time must overrule.
            let mut result = match size {
                Some(size) => volume.truncate(caller, node, size).await.map(Some),
                None => Ok(None),
            };
            if result.is_ok() && change != Change::default() {
                result = volume.change(caller, node, change).await.map(Some);
            }
            let result = match result {
                Ok(Some(changed)) => Ok(changed),
                Ok(None) => volume.attributes(node).await,
                Err(error) => Err(error),
            };
            match result {
                Ok(changed) => reply.attr(&NO_CACHING, &convert::attributes(&changed)),
                Err(error) => reply.error(errno(error)),
            }
        });
    }

    fn readlink(&self, _request: &Request, node: INodeNo, reply: ReplyData) {
        self.submit("readlink", move |volume| async move {
            match volume.read_link(ino(node)).await {
                Ok(target) => reply.data(&target),
                Err(error) => reply.error(errno(error)),
            }
        });
    }

    fn mknod(
        &self,
        request: &Request,
        parent: INodeNo,
        entry: &OsStr,
        mode: u32,
        umask: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        let (caller, parent, entry) = (caller(request), ino(parent), or_reply!(reply, name(entry)));
        let kind = or_reply!(reply, convert::kind_of_mode(mode).ok_or(Errno::EINVAL));
        let new = NewInode { kind, mode: mode & 0o7777, umask, rdev, target: Vec::new() };
        self.submit("mknod", move |volume| async move {
            let created = volume.create(caller, parent, &entry, new, true, false).await;
            reply_entry(reply, created.map(|(created, _)| created));
        });
    }

    fn mkdir(&self, request: &Request, parent: INodeNo, entry: &OsStr, mode: u32, umask: u32, reply: ReplyEntry) {
        let (caller, parent, entry) = (caller(request), ino(parent), or_reply!(reply, name(entry)));
        let new = NewInode { kind: FileKind::Directory, mode: mode & 0o7777, umask, rdev: 0, target: Vec::new() };
        self.submit("mkdir", move |volume| async move {
            reply_entry(reply, volume.make_directory(caller, parent, &entry, new).await);
        });
    }

    fn unlink(&self, request: &Request, parent: INodeNo, entry: &OsStr, reply: ReplyEmpty) {
        let (caller, parent, entry) = (caller(request), ino(parent), or_reply!(reply, name(entry)));
        self.submit(
            "unlink",
            move |volume| async move { reply_empty(reply, volume.unlink(caller, parent, &entry).await) },
        );
    }

    fn rmdir(&self, request: &Request, parent: INodeNo, entry: &OsStr, reply: ReplyEmpty) {
        let (caller, parent, entry) = (caller(request), ino(parent), or_reply!(reply, name(entry)));
        self.submit("rmdir", move |volume| async move {
            reply_empty(reply, volume.remove_directory(caller, parent, &entry).await)
        });
    }

    fn symlink(&self, request: &Request, parent: INodeNo, entry: &OsStr, target: &Path, reply: ReplyEntry) {
        let (caller, parent, entry) = (caller(request), ino(parent), or_reply!(reply, name(entry)));
        let target = target.as_os_str().as_bytes().to_vec();
        if target.len() > SYMLINK_MAX {
            return reply.error(Errno::ENAMETOOLONG);
        }
        let new = NewInode { kind: FileKind::Symlink, mode: 0o777, umask: 0, rdev: 0, target };
        self.submit("symlink", move |volume| async move {
            let created = volume.create(caller, parent, &entry, new, true, false).await;
            reply_entry(reply, created.map(|(created, _)| created));
        });
    }

    fn rename(
        &self,
        request: &Request,
        parent: INodeNo,
        entry: &OsStr,
        new_parent: INodeNo,
        new_entry: &OsStr,
        flags: FuseRenameFlags,
        reply: ReplyEmpty,
    ) {
        let (caller, parent, entry) = (caller(request), ino(parent), or_reply!(reply, name(entry)));
        let (new_parent, new_entry) = (ino(new_parent), or_reply!(reply, name(new_entry)));
        let known = FuseRenameFlags::RENAME_NOREPLACE | FuseRenameFlags::RENAME_EXCHANGE;
        if flags.bits() & !known.bits() != 0 || flags == known {
            return reply.error(Errno::EINVAL);
        }
        let flags = RenameFlags {
            no_replace: flags.contains(FuseRenameFlags::RENAME_NOREPLACE),
            exchange: flags.contains(FuseRenameFlags::RENAME_EXCHANGE),
        };
        self.submit("rename", move |volume| async move {
            reply_empty(reply, volume.rename(caller, parent, &entry, new_parent, &new_entry, flags).await);
        });
    }

    fn link(&self, request: &Request, node: INodeNo, new_parent: INodeNo, new_entry: &OsStr, reply: ReplyEntry) {
        let (caller, node, new_parent, new_entry) =
            (caller(request), ino(node), ino(new_parent), or_reply!(reply, name(new_entry)));
        self.submit("link", move |volume| async move {
            reply_entry(reply, volume.link(caller, node, new_parent, &new_entry).await)
        });
    }

    fn open(&self, _request: &Request, node: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        self.submit("open", move |volume| async move {
            match volume.open(ino(node), flags.0).await {
                Ok(handle) => reply.opened(FileHandle(handle), OPEN_FLAGS),
                Err(error) => reply.error(errno(error)),
            }
        });
    }

    fn create(
        &self,
        request: &Request,
        parent: INodeNo,
        entry: &OsStr,
        mode: u32,
        umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let (caller, parent, entry) = (caller(request), ino(parent), or_reply!(reply, name(entry)));
        let new = NewInode { kind: FileKind::Regular, mode: mode & 0o7777, umask, rdev: 0, target: Vec::new() };
        self.submit("create", move |volume| async move {
            let result = async {
                let (mut found, created) =
                    volume.create(caller, parent, &entry, new, flags & libc::O_EXCL != 0, true).await?;
                if !created && !may_open_found(&found, caller, flags) {
                    return Err(volume::Errno(libc::ESTALE));
                }
                let handle = if created {
                    volume.open_new(found.ino, flags).await?
                } else {
                    volume.open(found.ino, flags).await?
                };
                // The kernel takes the file for new and leaves O_TRUNC out.
                if !created && flags & libc::O_TRUNC != 0 {
                    match volume.truncate(caller, found.ino, 0).await {
                        Ok(truncated) => found = truncated,
                        Err(error) => {
                            volume.release(handle);
                            return Err(error);
                        }
                    }
                }
                Ok((found, handle))
            };
            match result.await {
                Ok((found, handle)) => {
                    reply.created(&NO_CACHING, &convert::attributes(&found), GENERATION, FileHandle(handle), OPEN_FLAGS)
                }
                Err(error) => reply.error(errno(error)),
            }
        });
    }

    fn read(
        &self,
        _request: &Request,
        _node: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        owner: Option<FuseLockOwner>,
        reply: ReplyData,
    ) {
        // The kernel names a lock owner in direct reads only: it has none when it fills pages (a fault, read-ahead,
        // sendfile), and then it holds those pages locked.
        let page_cache = owner.is_none();
        self.submit(if page_cache { "read_page_cache" } else { "read" }, move |volume| async move {
            match volume.read(handle.0, offset, size.min(MAX_REQUEST), page_cache).await {
                Ok(data) => reply.data(&data),
                Err(error) => reply.error(errno(error)),
            }
        });
    }

    fn write(
        &self,
        request: &Request,
        _node: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        flags: OpenFlags,
        _owner: Option<FuseLockOwner>,
        reply: ReplyWrite,
    ) {
        let page_cache = write_flags.contains(WriteFlags::FUSE_WRITE_CACHE);
        let append = flags.0 & libc::O_APPEND != 0 && !page_cache;
        // The kernel says whether the writer's rights clear set-id bits (in direct writes it leaves that to the file system): the volume clears
        // them for all but root. Pages that it writes back are nobody's in particular, and clear nothing.
        let clears = write_flags.contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID) && !page_cache;
        let caller = if clears { caller(request) } else { Caller { uid: 0, gid: 0, pid: request.pid() } };
        // The one copy: the buffer the request lies in takes the next request when this returns.
        let data = data.to_vec();
        self.submit(if page_cache { "write_page_cache" } else { "write" }, move |volume| async move {
            match volume.write(caller, handle.0, offset, data, append, page_cache).await {
                Ok(written) => reply.written(written as u32),
                Err(error) => reply.error(errno(error)),
            }
        });
    }

    fn flush(&self, _request: &Request, node: INodeNo, _handle: FileHandle, owner: FuseLockOwner, reply: ReplyEmpty) {
        let node = ino(node);
        if !self.lock_owners.flushed(node, owner.0) {
            return reply.ok();
        }
        self.submit("flush", move |volume| async move {
            reply_empty(reply, volume.release_file_locks(node, LockSpace::Posix, owner.0).await);
        });
    }

    fn release(
        &self,
        _request: &Request,
        node: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        flock_owner: Option<FuseLockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        let node = ino(node);
        let open_file_owners = self.lock_owners.released(node, handle.0);
        self.submit("release", move |volume| async move {
            // A file lock that could not be freed is freed when this node leaves; the close itself cannot fail.
            for owner in open_file_owners {
                if let Err(error) = volume.release_file_locks(node, LockSpace::Posix, owner).await {
                    tracing::warn!(ino = %node, errno = error.0, "locks of a closed file could not be freed");
                }
            }
            // Only named by the kernel where flock(2) was called on this open file.
            if let Some(owner) = flock_owner
                && let Err(error) = volume.release_file_locks(node, LockSpace::Flock, owner.0).await
            {
                tracing::warn!(ino = %node, errno = error.0, "the flock of a closed file could not be freed");
            }
            volume.release(handle.0);
            reply.ok();
        });
    }

    fn fsync(&self, _request: &Request, node: INodeNo, _handle: FileHandle, data_only: bool, reply: ReplyEmpty) {
        self.submit("fsync", move |volume| async move { reply_empty(reply, volume.fsync(ino(node), data_only).await) });
    }

    fn opendir(&self, _request: &Request, node: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        self.submit("opendir", move |volume| async move {
            match volume.open(ino(node), flags.0).await {
                Ok(handle) => reply.opened(FileHandle(handle), FopenFlags::empty()),
                Err(error) => reply.error(errno(error)),
            }
        });
    }

    fn readdir(&self, _request: &Request, node: INodeNo, _handle: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        self.submit("readdir", move |volume| async move {
            let listed = scan(&volume, ino(node), offset, async |entry: Scanned| {
                Ok(reply.add(node_id(entry.ino), entry.offset, entry.kind, OsStr::from_bytes(&entry.name)))
            })
            .await;
            match listed {
                Ok(()) => reply.ok(),
                Err(error) => reply.error(errno(error)),
            }
        });
    }

    fn readdirplus(
        &self,
        _request: &Request,
        node: INodeNo,
        _handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        self.submit("readdirplus", move |volume| async move {
            let listed =
                scan(&volume, ino(node), offset, async |entry: Scanned| match volume.attributes(entry.ino).await {
                    Ok(found) => {
                        let name = OsStr::from_bytes(&entry.name);
                        Ok(reply.add(
                            node_id(entry.ino),
                            entry.offset,
                            name,
                            &NO_CACHING,
                            &convert::attributes(&found),
                            GENERATION,
                        ))
                    }
                    // Removed since it was listed.
                    Err(error) if error.0 == libc::ENOENT => Ok(false),
                    Err(error) => Err(error),
                })
                .await;
            match listed {
                Ok(()) => reply.ok(),
                Err(error) => reply.error(errno(error)),
            }
        });
    }

    fn releasedir(&self, _request: &Request, _node: INodeNo, handle: FileHandle, _flags: OpenFlags, reply: ReplyEmpty) {
        self.submit("releasedir", move |volume| async move {
            volume.release(handle.0);
            reply.ok();
        });
    }

    fn fsyncdir(&self, _request: &Request, node: INodeNo, _handle: FileHandle, data_only: bool, reply: ReplyEmpty) {
        self.submit(
            "fsyncdir",
            move |volume| async move { reply_empty(reply, volume.fsync(ino(node), data_only).await) },
        );
    }

    fn statfs(&self, _request: &Request, _node: INodeNo, reply: ReplyStatfs) {
        self.submit("statfs", move |volume| async move {
            match volume.statfs().await {
                Ok(space) => reply.statfs(
                    space.pages,
                    space.free_pages,
                    space.free_pages,
                    space.inodes,
                    space.free_inodes,
                    PAGE_SIZE as u32,
                    NAME_MAX as u32,
                    PAGE_SIZE as u32,
                ),
                Err(error) => reply.error(errno(error)),
            }
        });
    }

    fn setxattr(
        &self,
        request: &Request,
        node: INodeNo,
        attribute: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        let (caller, node, attribute) = (caller(request), ino(node), or_reply!(reply, xattr_name(attribute)));
        let (create, replace) = (flags & libc::XATTR_CREATE != 0, flags & libc::XATTR_REPLACE != 0);
        if value.len() > XATTR_VALUE_MAX {
            return reply.error(Errno::E2BIG);
        }
        let value = value.to_vec();
        self.submit("setxattr", move |volume| async move {
            reply_empty(reply, volume.set_xattr(caller, node, &attribute, &value, create, replace).await);
        });
    }

    fn getxattr(&self, _request: &Request, node: INodeNo, attribute: &OsStr, size: u32, reply: ReplyXattr) {
        let attribute = or_reply!(reply, xattr_name(attribute));
        self.get_attribute_bytes("getxattr", size, reply, async move |volume: std::rc::Rc<Volume>| {
            volume.get_xattr(ino(node), &attribute).await
        });
    }

    fn listxattr(&self, request: &Request, node: INodeNo, size: u32, reply: ReplyXattr) {
        let uid = request.uid();
        self.get_attribute_bytes("listxattr", size, reply, async move |volume: std::rc::Rc<Volume>| {
            let mut bytes = Vec::new();
            for name in volume.list_xattr(ino(node)).await? {
                if xattr_is_listed(&name, uid) {
                    bytes.extend_from_slice(&name);
                    bytes.push(0);
                }
            }
            Ok(bytes)
        });
    }

    fn removexattr(&self, request: &Request, node: INodeNo, attribute: &OsStr, reply: ReplyEmpty) {
        let (caller, node, attribute) = (caller(request), ino(node), or_reply!(reply, xattr_name(attribute)));
        self.submit("removexattr", move |volume| async move {
            reply_empty(reply, volume.remove_xattr(caller, node, &attribute).await)
        });
    }

    /// Never asked under `default_permissions`.
    fn access(&self, _request: &Request, _node: INodeNo, _mask: AccessFlags, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn getlk(
        &self,
        request: &Request,
        node: INodeNo,
        handle: FileHandle,
        owner: FuseLockOwner,
        start: u64,
        end: u64,
        kind: i32,
        pid: u32,
        reply: ReplyLock,
    ) {
        let space =
            Self::lock_space(request, LockArguments { handle: handle.0, owner: owner.0, start, end, kind, pid });
        let (Some(space), Some(kind)) = (space, lock_kind(kind)) else {
            return reply.error(if space.is_none() { Errno::EIO } else { Errno::EINVAL });
        };
        let lock = FileLock { start, end, kind, owner: LockOwner { slot: 0, incarnation: 0, owner: owner.0, pid } };
        self.submit("getlk", move |volume| async move {
            match volume.get_file_lock(ino(node), space, lock).await {
                Ok(None) => reply.locked(start, end, libc::F_UNLCK, 0),
                Ok(Some(held)) => reply.locked(held.start, held.end, type_of_lock(held.kind), held.owner.pid),
                Err(error) => reply.error(errno(error)),
            }
        });
    }

    fn setlk(
        &self,
        request: &Request,
        node: INodeNo,
        handle: FileHandle,
        owner: FuseLockOwner,
        start: u64,
        end: u64,
        kind: i32,
        pid: u32,
        sleep: bool,
        reply: ReplyEmpty,
    ) {
        let node = ino(node);
        let space =
            Self::lock_space(request, LockArguments { handle: handle.0, owner: owner.0, start, end, kind, pid });
        let (Some(space), Some(kind)) = (space, lock_kind(kind)) else {
            return reply.error(if space.is_none() { Errno::EIO } else { Errno::EINVAL });
        };
        if start > end {
            return reply.error(Errno::EINVAL);
        }
        let locks = kind != FileLockKind::Unlock;
        if locks && space == LockSpace::Posix {
            self.lock_owners.locking(node, handle.0, owner.0);
        }
        let token = self.next_token.fetch_add(1, Ordering::Relaxed);
        let waits = sleep && locks;
        let watch = waits.then(|| self.interrupts.watch(request.pid(), pid, node, token));
        let lock = FileLock { start, end, kind, owner: LockOwner { slot: 0, incarnation: 0, owner: owner.0, pid } };
        self.submit(if waits { "setlkw" } else { "setlk" }, move |volume| async move {
            let result = volume.set_file_lock(node, space, lock, waits, token).await;
            drop(watch);
            reply_empty(reply, result);
        });
    }

    fn ioctl(
        &self,
        _request: &Request,
        _node: INodeNo,
        _handle: FileHandle,
        _flags: IoctlFlags,
        _command: u32,
        _data: &[u8],
        _size: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(Errno::ENOTTY);
    }

    fn bmap(&self, _request: &Request, _node: INodeNo, _block_size: u32, _block: u64, reply: fuser::ReplyBmap) {
        reply.error(Errno::ENOSYS);
    }

    fn poll(
        &self,
        _request: &Request,
        _node: INodeNo,
        _handle: FileHandle,
        _notifier: fuser::PollNotifier,
        _events: fuser::PollEvents,
        _flags: fuser::PollFlags,
        reply: fuser::ReplyPoll,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn fallocate(
        &self,
        request: &Request,
        _node: INodeNo,
        handle: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        const ALLOCATE: i32 = 0;
        const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        const ZERO_KEEP: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
        if !matches!(mode, ALLOCATE | libc::FALLOC_FL_KEEP_SIZE | PUNCH | libc::FALLOC_FL_ZERO_RANGE | ZERO_KEEP) {
            return reply.error(Errno::EOPNOTSUPP);
        }
        let caller = caller(request);
        self.submit("fallocate", move |volume| async move {
            reply_empty(reply, volume.fallocate(caller, handle.0, mode, offset, length).await);
        });
    }

    fn lseek(
        &self,
        _request: &Request,
        node: INodeNo,
        _handle: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let hole = match whence {
            libc::SEEK_HOLE => true,
            libc::SEEK_DATA => false,
            // The kernel does the others itself.
            _ => return reply.error(Errno::EINVAL),
        };
        let Ok(offset) = u64::try_from(offset) else { return reply.error(Errno::ENXIO) };
        self.submit("lseek", move |volume| async move {
            match volume.seek(ino(node), offset, hole).await.map(i64::try_from) {
                Ok(Ok(found)) => reply.offset(found),
                Ok(Err(_)) => reply.error(Errno::EOVERFLOW),
                Err(error) => reply.error(errno(error)),
            }
        });
    }

    fn copy_file_range(
        &self,
        request: &Request,
        _from: INodeNo,
        from_handle: FileHandle,
        from_offset: u64,
        _to: INodeNo,
        to_handle: FileHandle,
        to_offset: u64,
        length: u64,
        flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        if flags.bits() != 0 {
            return reply.error(Errno::EINVAL);
        }
        // The reply has 32 bits for the length.
        const MOST: u64 = u32::MAX as u64 & !(PAGE_SIZE - 1);
        let caller = caller(request);
        self.submit("copy_file_range", move |volume| async move {
            match volume.copy_range(caller, from_handle.0, from_offset, to_handle.0, to_offset, length.min(MOST)).await
            {
                Ok(copied) => reply.written(copied as u32),
                Err(error) => reply.error(errno(error)),
            }
        });
    }
}

fn lock_kind(kind: i32) -> Option<FileLockKind> {
    match kind {
        libc::F_RDLCK => Some(FileLockKind::Read),
        libc::F_WRLCK => Some(FileLockKind::Write),
        libc::F_UNLCK => Some(FileLockKind::Unlock),
        _ => None,
    }
}

fn type_of_lock(kind: FileLockKind) -> i32 {
    match kind {
        FileLockKind::Read => libc::F_RDLCK,
        FileLockKind::Write => libc::F_WRLCK,
        FileLockKind::Unlock => libc::F_UNLCK,
    }
}

/// An entry of a directory as readdir(3) shows it.
struct Scanned {
    name: Vec<u8>,
    ino: Ino,
    kind: FileType,
    /// Where a scan goes on behind it: what telldir(3) returns.
    offset: u64,
}

/// Feeds `.`, `..` and the entries behind `offset` to `add` until that says that it is full.
///
/// Nothing is kept between calls: an offset says all there is to say, so seekdir(3) works and a scan
/// sees what is there when it gets there.
async fn scan(
    volume: &std::rc::Rc<Volume>,
    directory: Ino,
    offset: u64,
    mut add: impl AsyncFnMut(Scanned) -> Result<bool, volume::Errno>,
) -> Result<(), volume::Errno> {
    if offset >= OFFSET_END {
        return Ok(());
    }
    let dot = |name: &[u8], ino, offset| Scanned { name: name.to_vec(), ino, kind: FileType::Directory, offset };
    if offset < OFFSET_BEHIND_DOT && add(dot(b".", directory, OFFSET_BEHIND_DOT)).await? {
        return Ok(());
    }
    if offset < OFFSET_BEHIND_DOT_DOT {
        let parent = volume.parent(directory).await?;
        if add(dot(b"..", parent, OFFSET_BEHIND_DOT_DOT)).await? {
            return Ok(());
        }
    }
    let mut cursor = offset.saturating_sub(CURSOR_SHIFT);
    let mut limit = LIST_FIRST;
    loop {
        let (entries, end) = volume.list(directory, cursor, limit).await?;
        let last = entries.last().map(|entry| entry.cursor);
        for entry in entries {
            let offset = entry.cursor.saturating_add(CURSOR_SHIFT).min(OFFSET_END);
            if add(Scanned { name: entry.name, ino: entry.ino, kind: convert::file_type(entry.kind), offset }).await? {
                return Ok(());
            }
        }
        match last {
            Some(last) if !end => cursor = last,
            _ => return Ok(()),
        }
        limit = (limit * 2).min(LIST_MOST);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use verbfs_protocol::{Layout, Time};

    fn file(mode: u32, uid: u32) -> Attributes {
        Attributes {
            ino: Ino(2),
            kind: FileKind::Regular,
            mode,
            uid,
            gid: 0,
            nlink: 1,
            rdev: 0,
            size: 0,
            pages: 0,
            atime: Time::default(),
            mtime: Time::default(),
            ctime: Time::default(),
            crtime: Time::default(),
            truncate_generation: 0,
            layout: Layout::default(),
            has_xattrs: false,
        }
    }

    #[test]
    fn a_found_file_is_opened_only_where_mode_bits_alone_allow_it() {
        let user = |uid| Caller { uid, gid: uid, pid: 1 };
        assert!(may_open_found(&file(0o000, 5), user(0), libc::O_RDWR));
        assert!(may_open_found(&file(0o600, 5), user(5), libc::O_RDWR));
        assert!(!may_open_found(&file(0o466, 5), user(5), libc::O_RDWR));
        assert!(!may_open_found(&file(0o444, 5), user(5), libc::O_RDONLY | libc::O_TRUNC));
        assert!(may_open_found(&file(0o666, 5), user(6), libc::O_WRONLY));
        assert!(!may_open_found(&file(0o606, 5), user(6), libc::O_WRONLY), "the caller may be in the group");
        assert!(
            !may_open_found(&Attributes { has_xattrs: true, ..file(0o666, 5) }, user(6), libc::O_RDONLY),
            "there may be a list"
        );
        assert!(!may_open_found(&Attributes { kind: FileKind::Fifo, ..file(0o666, 5) }, user(0), libc::O_RDONLY));
    }

    #[test]
    fn only_known_namespaces_of_attributes_are_shown() {
        assert!(xattr_is_listed(b"user.a", 5));
        assert!(xattr_is_listed(b"system.posix_acl_access", 5));
        assert!(!xattr_is_listed(b"trusted.a", 5));
        assert!(xattr_is_listed(b"trusted.a", 0));
        assert!(!xattr_is_listed(b"verbfs.parent", 0));
        assert_eq!(xattr_name(OsStr::new("user.")).map_err(|e| e.code()), Err(libc::EOPNOTSUPP));
    }
}
