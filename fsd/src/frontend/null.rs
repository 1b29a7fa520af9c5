//! A FUSE file system that does nothing, by the same recipe as [`super::fuse`]: what FUSE itself costs.
//!
//! Names and kinds are kept in a small map, nothing else: every file has the size that was chosen at
//! the mount, reads return zeros, writes are thrown away.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Instant, SystemTime};

use fuser::{
    BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, KernelConfig,
    LockOwner, OpenFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyOpen,
    ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use parking_lot::Mutex;

use super::Observer;
use super::convert::{BLOCK_SIZE, NO_CACHING};
use super::fuse::{MAX_REQUEST, OPEN_FLAGS, configure};
use super::mount::{MountError, MountOptions, Mounted, mount_filesystem};

/// Mounts a file system that does nothing. Every file in it has `file_size` bytes.
pub fn mount_null(
    path: &Path,
    file_size: u64,
    options: &MountOptions,
    observer: Arc<dyn Observer>,
) -> Result<Mounted, MountError> {
    mount_filesystem(Null::new(file_size, observer), path, options, |_| ())
}

/// The file system.
pub struct Null {
    file_size: u64,
    zeros: Vec<u8>,
    born: SystemTime,
    next: AtomicU64,
    names: Mutex<HashMap<(u64, OsString), (u64, FileType)>>,
    kinds: Mutex<HashMap<u64, FileType>>,
    observer: Arc<dyn Observer>,
}

impl Null {
    /// An empty one.
    pub fn new(file_size: u64, observer: Arc<dyn Observer>) -> Null {
        Null {
            file_size,
            zeros: vec![0; MAX_REQUEST as usize],
            born: SystemTime::now(),
            next: AtomicU64::new(INodeNo::ROOT.0 + 1),
            names: Mutex::default(),
            kinds: Mutex::new(HashMap::from([(INodeNo::ROOT.0, FileType::Directory)])),
            observer,
        }
    }

    fn attributes(&self, node: u64, kind: FileType) -> FileAttr {
        let is_directory = kind == FileType::Directory;
        let size = if is_directory { 0 } else { self.file_size };
        FileAttr {
            ino: INodeNo(node),
            size,
            blocks: size.div_ceil(512),
            atime: self.born,
            mtime: self.born,
            ctime: self.born,
            crtime: self.born,
            kind,
            perm: if is_directory { 0o777 } else { 0o666 },
            nlink: if is_directory { 2 } else { 1 },
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: BLOCK_SIZE,
            flags: 0,
        }
    }

    /// The inode of a name, made if need be.
    fn make(&self, parent: INodeNo, name: &OsStr, kind: FileType) -> (u64, FileType) {
        let made = *self
            .names
            .lock()
            .entry((parent.0, name.to_owned()))
            .or_insert_with(|| (self.next.fetch_add(1, Ordering::Relaxed), kind));
        self.kinds.lock().insert(made.0, made.1);
        made
    }

    fn remove(&self, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        match self.names.lock().remove(&(parent.0, name.to_owned())) {
            Some((node, _)) => {
                self.kinds.lock().remove(&node);
                reply.ok();
            }
            None => reply.error(Errno::ENOENT),
        }
    }

    fn observed(&self, operation: &'static str, run: impl FnOnce()) {
        let start = Instant::now();
        run();
        self.observer.observe(operation, start.elapsed().as_nanos() as u64);
    }
}

impl Filesystem for Null {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        configure(config)
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        self.observed("lookup", || {
            let found = self.names.lock().get(&(parent.0, name.to_owned())).copied();
            match found {
                Some((node, kind)) => reply.entry(&NO_CACHING, &self.attributes(node, kind), Generation(0)),
                None => reply.error(Errno::ENOENT),
            }
        });
    }

    fn getattr(&self, _request: &Request, node: INodeNo, _handle: Option<FileHandle>, reply: ReplyAttr) {
        self.observed("getattr", || {
            // A file that was removed while open is still a file.
            let kind = self.kinds.lock().get(&node.0).copied().unwrap_or(FileType::RegularFile);
            reply.attr(&NO_CACHING, &self.attributes(node.0, kind));
        });
    }

    fn setattr(
        &self,
        request: &Request,
        node: INodeNo,
        _mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        _size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        handle: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        self.getattr(request, node, handle, reply);
    }

    fn create(
        &self,
        _request: &Request,
        parent: INodeNo,
        name: &OsStr,
        _mode: u32,
        _umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        self.observed("create", || {
            let (node, kind) = self.make(parent, name, FileType::RegularFile);
            reply.created(&NO_CACHING, &self.attributes(node, kind), Generation(0), FileHandle(0), OPEN_FLAGS);
        });
    }

    fn mkdir(&self, _request: &Request, parent: INodeNo, name: &OsStr, _mode: u32, _umask: u32, reply: ReplyEntry) {
        let (node, kind) = self.make(parent, name, FileType::Directory);
        reply.entry(&NO_CACHING, &self.attributes(node, kind), Generation(0));
    }

    fn unlink(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        self.observed("unlink", || self.remove(parent, name, reply));
    }

    fn rmdir(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        self.remove(parent, name, reply);
    }

    fn open(&self, _request: &Request, _node: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        self.observed("open", || reply.opened(FileHandle(0), OPEN_FLAGS));
    }

    fn read(
        &self,
        _request: &Request,
        _node: INodeNo,
        _handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.observed("read", || {
            let size = u64::from(size).min(self.file_size.saturating_sub(offset)).min(self.zeros.len() as u64);
            reply.data(&self.zeros[..size as usize]);
        });
    }

    fn write(
        &self,
        _request: &Request,
        _node: INodeNo,
        _handle: FileHandle,
        _offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        self.observed("write", || reply.written(data.len() as u32));
    }

    fn flush(&self, _request: &Request, _node: INodeNo, _handle: FileHandle, _owner: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _request: &Request, _node: INodeNo, _handle: FileHandle, _data_only: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    fn opendir(&self, _request: &Request, _node: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::empty());
    }

    fn readdir(&self, _request: &Request, node: INodeNo, _handle: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let dots = [".", ".."].map(|name| (OsString::from(name), (node.0, FileType::Directory)));
        let names = self.names.lock();
        let entries =
            names.iter().filter(|((parent, _), _)| *parent == node.0).map(|((_, name), found)| (name.clone(), *found));
        for (index, (name, (ino, kind))) in dots.into_iter().chain(entries).enumerate().skip(offset as usize) {
            if reply.add(INodeNo(ino), index as u64 + 1, kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn ioctl(
        &self,
        _request: &Request,
        _node: INodeNo,
        _handle: FileHandle,
        _flags: fuser::IoctlFlags,
        _command: u32,
        _data: &[u8],
        _size: u32,
        reply: fuser::ReplyIoctl,
    ) {
        reply.error(Errno::ENOTTY);
    }

    fn statfs(&self, _request: &Request, _node: INodeNo, reply: ReplyStatfs) {
        reply.statfs(1 << 30, 1 << 30, 1 << 30, 1 << 30, 1 << 30, BLOCK_SIZE, 255, BLOCK_SIZE);
    }

    fn listxattr(&self, _request: &Request, _node: INodeNo, size: u32, reply: ReplyXattr) {
        if size == 0 { reply.size(0) } else { reply.data(&[]) }
    }

    /// No lists, so that the kernel's permission checks ask as they do for a real file.
    fn getxattr(&self, _request: &Request, _node: INodeNo, _name: &OsStr, _size: u32, reply: ReplyXattr) {
        reply.error(Errno::ENODATA);
    }
}
