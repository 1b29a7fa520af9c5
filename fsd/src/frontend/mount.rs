//! Mounting a node, and getting rid of the mount under any circumstances.
//!
//! The mount is made and removed here and `fuser` gets the open device: the guard of `fuser` 0.18 unmounts its path
//! once more when it is dropped, whatever is mounted there by then.

use std::ffi::{CStr, CString, OsStr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use fuser::{BackgroundSession, Config, Filesystem, Session, SessionACL};

use super::Observer;
use super::fuse::VerbfsFuse;
use super::kernel_cache::FuseKernelCache;
use crate::volume::NodeHandle;

/// How long an unmount waits for programs that still use the mount, before it detaches it.
const BUSY_PATIENCE: Duration = Duration::from_secs(5);
/// How long a detached mount may go on serving what is still open, before its connection is aborted.
const DETACHED_PATIENCE: Duration = Duration::from_secs(5);
/// How often a busy mount is tried again.
const RETRY: Duration = Duration::from_millis(50);
/// Dead mounts that may lie on top of each other at a path.
const MOST_STACKED: usize = 16;

/// Why there is no mount, or why it would not go.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The mount point is missing, not a directory, or not accessible.
    #[error("cannot mount at {}: {reason}", path.display())]
    Path {
        /// The mount point.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The kernel refused.
    #[error("cannot mount at {}: {source}{}", path.display(), hint(source))]
    Mount {
        /// The mount point.
        path: PathBuf,
        /// What the kernel or `fuser` said.
        source: std::io::Error,
    },
    /// It could not be unmounted.
    #[error("cannot unmount {}: {source}", path.display())]
    Unmount {
        /// The mount point.
        path: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
}

/// What to do about an error of mount(2).
fn hint(error: &std::io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::ENOENT) => " (is there a /dev/fuse? try: modprobe fuse)",
        Some(libc::EPERM | libc::EACCES) => {
            " (mounting needs root, or in a container --device /dev/fuse --cap-add SYS_ADMIN)"
        }
        Some(libc::ENODEV) => " (this kernel has no FUSE: try: modprobe fuse)",
        _ => "",
    }
}

/// How to mount.
#[derive(Clone, Debug)]
pub struct MountOptions {
    /// The first column of df(1).
    pub source: String,
    /// Threads that read requests. They never wait, so few are enough.
    pub threads: usize,
    /// Each thread has a device descriptor, and so a table of unanswered requests, of its own. May help where many processors
    /// share one mount. Costs an error line of `fuser` per interrupted lock call: its refusal of FUSE_INTERRUPT goes to
    /// another table than that of the call.
    pub clone_device: bool,
}

impl Default for MountOptions {
    fn default() -> Self {
        MountOptions { source: "verbfs".into(), threads: 2, clone_device: false }
    }
}

/// A mounted file system. Unmounts when dropped; call [`unmount`](Self::unmount) to see errors.
pub struct Mounted {
    path: PathBuf,
    session: Option<BackgroundSession>,
    /// Minor number of the mount's device: the name of its connection below /sys/fs/fuse/connections.
    connection: Option<u32>,
}

/// Mounts the volume of `node` at `path`. Pages that the kernel caches are dropped through `cache`.
pub fn mount(
    node: NodeHandle,
    path: &Path,
    options: &MountOptions,
    cache: &FuseKernelCache,
    observer: Arc<dyn Observer>,
) -> Result<Mounted, MountError> {
    let filesystem =
        VerbfsFuse::new(node, observer).map_err(|source| MountError::Mount { path: path.into(), source })?;
    mount_filesystem(filesystem, path, options, |notifier| cache.attach(notifier))
}

/// Mounts any file system by the same options; `attach` gets the notifier before the first request is answered.
pub(super) fn mount_filesystem<F: Filesystem>(
    filesystem: F,
    path: &Path,
    options: &MountOptions,
    attach: impl FnOnce(fuser::Notifier),
) -> Result<Mounted, MountError> {
    let path = prepare(path)?;
    let mut config = Config::default();
    config.n_threads = Some(options.threads.max(1));
    config.clone_fd = options.clone_device;
    let device =
        mount_call(&path, &options.source).map_err(|source| MountError::Mount { path: path.clone(), source })?;
    // Whatever fails from here on leaves nothing mounted.
    let failed = |source| {
        let _ = unmount_call(&path, libc::MNT_DETACH);
        MountError::Mount { path: path.clone(), source }
    };
    let session = Session::from_fd(filesystem, device, SessionACL::All, config).map_err(failed)?;
    attach(session.notifier());
    let session = session.spawn().map_err(failed)?;
    // From the table of mounts, not by stat: a request of this process to its own mount that is not answered would keep
    // the process from ever ending, however it is killed.
    let mounted = Mounted { path: path.clone(), session: Some(session), connection: connection_of(&path) };
    tracing::info!(path = %path.display(), threads = options.threads, "mounted");
    Ok(mounted)
}

/// Checks the mount point and removes the dead mounts of daemons that were killed. Returns its canonical path.
fn prepare(path: &Path) -> Result<PathBuf, MountError> {
    for _ in 0..MOST_STACKED {
        let error = match std::fs::metadata(path) {
            Ok(found) if found.is_dir() => {
                return path.canonicalize().map_err(|source| MountError::Mount { path: path.into(), source });
            }
            Ok(_) => return Err(MountError::Path { path: path.into(), reason: "not a directory".into() }),
            Err(error) => error,
        };
        if error.raw_os_error() != Some(libc::ENOTCONN) {
            return Err(MountError::Path { path: path.into(), reason: error.to_string() });
        }
        tracing::warn!(path = %path.display(), "unmounting a dead mount that another daemon left here");
        unmount_call(path, libc::MNT_DETACH).map_err(|source| MountError::Unmount { path: path.into(), source })?;
    }
    Err(MountError::Path { path: path.into(), reason: "dead mounts lie on top of each other and do not end".into() })
}

/// The name of a mount's connection below /sys/fs/fuse/connections: the minor number of its device.
fn connection_of(path: &Path) -> Option<u32> {
    let table = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
    // The last mount at a path is the one seen. Fields: id, parent, MAJOR:MINOR, root, mount point, ...
    table.lines().rev().find_map(|line| {
        let mut fields = line.split(' ');
        let device = fields.nth(2)?;
        let point = unescape(fields.nth(1)?);
        (point == path.as_os_str().as_bytes()).then(|| device.split(':').nth(1)?.parse().ok())?
    })
}

/// Undoes the octal escapes of the table of mounts (proc(5): white space and backslash).
fn unescape(field: &str) -> Vec<u8> {
    let bytes = field.as_bytes();
    let mut plain = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let octal = bytes.get(at + 1..at + 4).filter(|_| bytes[at] == b'\\');
        match octal.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok()) {
            Some(byte) => {
                plain.push(byte);
                at += 4;
            }
            None => {
                plain.push(bytes[at]);
                at += 1;
            }
        }
    }
    plain
}

/// Opens the FUSE device and mounts it: mount(2) by root. Set-id bits and devices count, as on a local file system; the
/// kernel checks permissions for all users.
fn mount_call(path: &Path, source: &str) -> std::io::Result<OwnedFd> {
    const TYPE: &CStr = c"fuse.verbfs";
    let device = std::fs::File::options().read(true).write(true).custom_flags(libc::O_CLOEXEC).open("/dev/fuse")?;
    let options =
        format!("fd={},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other", device.as_raw_fd());
    let (source, target, options) =
        (CString::new(source)?, CString::new(path.as_os_str().as_bytes())?, CString::new(options)?);
    // SAFETY: all arguments are strings that end in zero and outlive the call.
    let result = unsafe { libc::mount(source.as_ptr(), target.as_ptr(), TYPE.as_ptr(), 0, options.as_ptr().cast()) };
    if result == 0 { Ok(device.into()) } else { Err(std::io::Error::last_os_error()) }
}

/// umount2(2).
fn unmount_call(path: &Path, flags: i32) -> std::io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: the path is a string that ends in zero and outlives the call.
    if unsafe { libc::umount2(path.as_ptr(), flags | libc::UMOUNT_NOFOLLOW) } == 0 {
        Ok(())
    } else {
        Err(std::io::Error::last_os_error())
    }
}

impl Mounted {
    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether somebody else unmounted it.
    pub fn is_gone(&self) -> bool {
        self.session.as_ref().is_none_or(|session| session.guard.is_finished())
    }

    /// Unmounts and waits until no request can come any more. While programs use the mount, tries for [`BUSY_PATIENCE`]; then
    /// detaches it, so that nobody new finds it, and waits for them to close; then aborts the connection: what is
    /// still open gets ECONNABORTED.
    pub fn unmount(mut self) -> Result<(), MountError> {
        self.unmount_now()
    }

    fn unmount_now(&mut self) -> Result<(), MountError> {
        let Some(session) = self.session.take() else { return Ok(()) };
        // unmount(2) writes back pages and may wait for the volume: not on this thread.
        let (sender, receiver) = mpsc::channel();
        let path = self.path.clone();
        let helper = std::thread::Builder::new().name("unmount".into()).spawn(move || {
            let _ = sender.send(unmount_patiently(&path));
        });
        let patience = BUSY_PATIENCE + DETACHED_PATIENCE;
        let unmounted = match helper {
            Ok(_) => receiver
                .recv_timeout(patience)
                .unwrap_or_else(|_| Err(std::io::Error::new(std::io::ErrorKind::TimedOut, "unmounting hangs"))),
            Err(error) => Err(error),
        };
        if let Err(error) = &unmounted {
            tracing::warn!(path = %self.path.display(), %error, "cannot unmount; the connection is aborted");
        } else if wait_until(DETACHED_PATIENCE, || session.guard.is_finished()) {
            return session.join().or_else(|error| {
                tracing::warn!(%error, "the threads of a mount ended with an error");
                Ok(())
            });
        } else {
            tracing::warn!(path = %self.path.display(), "files of the detached mount are still open; its connection is aborted");
        }
        self.abort();
        if wait_until(DETACHED_PATIENCE, || session.guard.is_finished()) {
            // The mount of an aborted connection goes without waiting for anybody.
            if unmounted.is_err() {
                let _ = unmount_call(&self.path, libc::MNT_DETACH);
            }
            let _ = session.join();
            return Ok(());
        }
        Err(MountError::Unmount {
            path: self.path.clone(),
            source: unmounted.err().unwrap_or_else(|| std::io::ErrorKind::ResourceBusy.into()),
        })
    }

    /// Makes the kernel fail all requests of this connection, now and later.
    fn abort(&self) {
        const CONNECTIONS: &str = "/sys/fs/fuse/connections";
        let Some(connection) = self.connection else { return };
        let file = format!("{CONNECTIONS}/{connection}/abort");
        if !Path::new(&file).exists() {
            // Not every system mounts the control file system (containers, minimal images).
            // SAFETY: all arguments are strings that end in zero, the last may be null.
            unsafe {
                libc::mount(
                    c"fusectl".as_ptr(),
                    c"/sys/fs/fuse/connections".as_ptr(),
                    c"fusectl".as_ptr(),
                    0,
                    std::ptr::null(),
                );
            }
        }
        if let Err(error) = std::fs::write(&file, "1") {
            tracing::error!(%file, %error, "cannot abort a FUSE connection");
        }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Err(error) = self.unmount_now() {
            tracing::error!(%error, "a mount is left behind");
        }
    }
}

/// Unmounts, first as if nobody used it, in the end in spite of those who do.
fn unmount_patiently(path: &Path) -> std::io::Result<()> {
    let start = Instant::now();
    loop {
        match unmount_call(path, 0) {
            Ok(()) => return Ok(()),
            // Not mounted any more: somebody else was faster.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOENT)) => return Ok(()),
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && start.elapsed() < BUSY_PATIENCE => {
                std::thread::sleep(RETRY)
            }
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                tracing::warn!(path = %path.display(), "still in use; detaching it");
                return unmount_call(path, libc::MNT_DETACH);
            }
            Err(error) => return Err(error),
        }
    }
}

/// Processes of this host, but this one, with an open file, a working directory, a root or a mapping below `directory`: number and
/// name of each. Only links are read, so nothing waits for the mount itself. Processes of other mount namespaces may be missed.
pub fn users(directory: &Path) -> Vec<String> {
    let uses = |link: std::io::Result<PathBuf>| link.is_ok_and(|target| target.starts_with(directory));
    let all = |of: PathBuf| std::fs::read_dir(of).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut users = Vec::new();
    for process in all("/proc".into()) {
        let number = process.file_name().and_then(OsStr::to_str).and_then(|name| name.parse::<u32>().ok());
        let Some(number) = number.filter(|number| *number != std::process::id()) else { continue };
        let here = ["cwd", "root", "exe"].iter().any(|link| uses(std::fs::read_link(process.join(link))))
            || ["fd", "map_files"]
                .iter()
                .any(|links| all(process.join(links)).any(|link| uses(std::fs::read_link(link))));
        if here {
            let name = std::fs::read_to_string(process.join("comm")).unwrap_or_default();
            users.push(format!("process {number} ({})", name.trim_end()));
        }
    }
    users
}

/// Whether `done` becomes true in time.
fn wait_until(patience: Duration, done: impl Fn() -> bool) -> bool {
    let start = Instant::now();
    while !done() {
        if start.elapsed() > patience {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    true
}
