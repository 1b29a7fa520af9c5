//! A fresh working directory, seen through every mount.

use anyhow::{Context, Result, bail, ensure};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// The directories under test: all of them show one and the same tree.
#[derive(Clone, Debug)]
pub struct Mounts {
    roots: Vec<PathBuf>,
}

impl Mounts {
    /// Check that every path is a directory.
    pub fn new(roots: &[PathBuf]) -> Result<Self> {
        ensure!(!roots.is_empty(), "at least one --mount is needed");
        let mut absolute = Vec::new();
        for root in roots {
            let root = root.canonicalize().with_context(|| format!("mount {}", root.display()))?;
            ensure!(root.is_dir(), "{} is not a directory", root.display());
            absolute.push(root);
        }
        Ok(Self { roots: absolute })
    }

    /// Create directory `name` through the first mount and find it through all others.
    ///
    /// That the others see it at once is the first thing tested: no retry.
    pub fn work_directory(&self, name: &str) -> Result<WorkDirectory> {
        let first = self.roots[0].join(name);
        std::fs::create_dir(&first).with_context(|| format!("create {}", first.display()))?;
        self.find(name, std::fs::metadata(&first)?.ino(), false)
    }

    /// The directory `name` with this inode number, which another machine created and will remove.
    pub fn work_directory_of_another(&self, name: &str, inode: u64) -> Result<WorkDirectory> {
        self.find(name, inode, true)
    }

    fn find(&self, name: &str, inode: u64, keep: bool) -> Result<WorkDirectory> {
        let mut paths = Vec::new();
        for root in &self.roots {
            let path = root.join(name);
            match std::fs::metadata(&path) {
                Ok(m) if m.ino() == inode => paths.push(path),
                Ok(m) => bail!("{} has inode {}, but was created with inode {inode}", path.display(), m.ino()),
                Err(e) => {
                    bail!("{} was just created, and says {e}: are these mounts of one file system?", path.display())
                }
            }
        }
        Ok(WorkDirectory { paths, keep, owner: std::process::id() })
    }
}

/// A directory of this run, removed with all it holds when dropped.
#[derive(Debug)]
pub struct WorkDirectory {
    paths: Vec<PathBuf>,
    keep: bool,
    owner: u32,
}

impl WorkDirectory {
    /// The directory as mount number `mount` (modulo the number of mounts) shows it.
    pub fn on(&self, mount: usize) -> &Path {
        &self.paths[mount % self.paths.len()]
    }

    /// The directory through every mount.
    pub fn all(&self) -> &[PathBuf] {
        &self.paths
    }

    /// Leave the directory in place, for somebody to look at.
    pub fn keep(&mut self) {
        self.keep = true;
    }
}

impl Drop for WorkDirectory {
    fn drop(&mut self) {
        // A forked child inherits the value, not the duty.
        if !self.keep && self.owner == std::process::id() {
            let _ = std::fs::remove_dir_all(&self.paths[0]);
        }
    }
}
