//! Which daemon a command is meant for.

use super::arguments::{DEFAULT_CONFIG, Target};
use crate::{config::Config, control};
use anyhow::{Context, bail};
use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

/// No daemon could be found, or more than one.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct NoDaemon(String);

impl Target {
    /// The socket that the options name; `None` when they name none.
    pub fn explicit_socket(&self) -> anyhow::Result<Option<PathBuf>> {
        if let Some(socket) = &self.socket {
            return Ok(Some(socket.clone()));
        }
        let Some(path) = &self.config else { return Ok(None) };
        let config = Config::load(path)?;
        let slot = match self.slot {
            Some(slot) => slot,
            None => config.own_slot(&hostname()).map_err(|problem| anyhow::anyhow!("{}: {problem}", path.display()))?,
        };
        Ok(Some(config.control_socket(slot)))
    }

    /// The socket of the daemon that is meant: what the options name, else the only daemon of this host.
    ///
    /// # Errors
    /// [`NoDaemon`] when there is none or several to choose from, naming them.
    pub fn socket(&self) -> anyhow::Result<PathBuf> {
        if let Some(socket) = self.explicit_socket()? {
            return Ok(socket);
        }
        let mut found = BTreeSet::new();
        let mut runtime = PathBuf::from("/run/verbfs");
        if let Ok(config) = Config::load(Path::new(DEFAULT_CONFIG)) {
            runtime = config.directories.runtime;
        }
        found.extend(sockets_below(&runtime));
        found.extend(control::verbfs_mounts().unwrap_or_default().into_iter().map(|(socket, _)| socket));
        found.retain(|socket| std::os::unix::net::UnixStream::connect(socket).is_ok_or_forbidden());
        if let Some(slot) = self.slot {
            let name = crate::config::control_socket_name(slot);
            found.retain(|socket| socket.file_name().is_some_and(|file| file == name.as_str()));
        }
        choose(&found, self.slot)
    }
}

trait Answers {
    fn is_ok_or_forbidden(&self) -> bool;
}

impl<T> Answers for std::io::Result<T> {
    fn is_ok_or_forbidden(&self) -> bool {
        // One that may not be asked is there all the same, and asking says what to do.
        self.as_ref().map_or_else(|error| error.kind() == std::io::ErrorKind::PermissionDenied, |_| true)
    }
}

fn choose(found: &BTreeSet<PathBuf>, slot: Option<u16>) -> anyhow::Result<PathBuf> {
    let mut sockets = found.iter();
    match (sockets.next(), sockets.next()) {
        (Some(only), None) => Ok(only.clone()),
        (None, _) => {
            let which = slot.map(|slot| format!(" of slot {slot}")).unwrap_or_default();
            Err(NoDaemon(format!(
                "no verbfs daemon{which} runs on this host: start one with `verbfs start`, or say which you mean by --config or --socket"
            ))
            .into())
        }
        _ => {
            let list: String = found.iter().map(|socket| format!("\n  --socket {}", socket.display())).collect();
            Err(NoDaemon(format!("several verbfs daemons run on this host; say which you mean:{list}")).into())
        }
    }
}

/// `RUNTIME/CLUSTER/SLOT.control`, all of them.
fn sockets_below(runtime: &Path) -> Vec<PathBuf> {
    let entries =
        |directory: &Path| std::fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path());
    entries(runtime)
        .flat_map(|cluster| entries(&cluster).collect::<Vec<_>>())
        .filter(|path| path.extension().is_some_and(|extension| extension == "control"))
        .collect()
}

/// The daemon behind a file of a verbfs mount, and the file's inode number.
///
/// # Errors
/// When the file does not exist or is not on such a mount.
pub fn of_file(file: &Path) -> anyhow::Result<(PathBuf, u64)> {
    use rustix::fs::{AtFlags, CWD, StatxFlags, statx};
    let Some((socket, _)) =
        control::socket_of_path(file).with_context(|| format!("cannot look at {}", file.display()))?
    else {
        bail!("{} is not on a verbfs mount of this host; `verbfs status` lists its mounts", file.display());
    };
    // The inode number needs no fresh attributes: fetching them would take the very locks that are asked about.
    let flags = AtFlags::STATX_DONT_SYNC;
    let attributes =
        statx(CWD, file, flags, StatxFlags::INO).with_context(|| format!("cannot look at {}", file.display()))?;
    Ok((socket, attributes.stx_ino))
}

/// This host's name as the kernel has it.
pub fn hostname() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_the_choice_where_there_is_one() {
        let error = choose(&BTreeSet::new(), None).unwrap_err();
        assert!(error.is::<NoDaemon>() && error.to_string().contains("verbfs start"));
        let one = BTreeSet::from([PathBuf::from("/run/verbfs/a/0.control")]);
        assert_eq!(choose(&one, None).unwrap(), Path::new("/run/verbfs/a/0.control"));
        let two = BTreeSet::from([PathBuf::from("/run/verbfs/a/0.control"), PathBuf::from("/run/verbfs/a/1.control")]);
        let message = choose(&two, None).unwrap_err().to_string();
        assert!(message.contains("--socket /run/verbfs/a/0.control") && message.contains("1.control"), "{message}");
    }

    #[test]
    fn options_name_a_socket() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("c.toml");
        let config = Config::single_host("demo", 1, 2, directory.path());
        std::fs::write(&file, config.to_toml()).unwrap();
        let target = Target { config: Some(file.clone()), ..Target::default() };
        assert_eq!(target.socket().unwrap(), config.control_socket(1));
        let target = Target { config: Some(file), slot: Some(0), ..Target::default() };
        assert_eq!(target.socket().unwrap(), config.control_socket(0));
        let target = Target { socket: Some("/x".into()), ..Target::default() };
        assert_eq!(target.socket().unwrap(), Path::new("/x"));
    }

    #[test]
    fn finds_sockets() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(directory.path().join("demo")).unwrap();
        for name in ["0.control", "1.control", "0.log"] {
            std::fs::write(directory.path().join("demo").join(name), "").unwrap();
        }
        assert_eq!(sockets_below(directory.path()).len(), 2);
        assert!(sockets_below(Path::new("/nonexistent")).is_empty());
    }

    #[test]
    fn files_elsewhere_are_told_apart() {
        let directory = tempfile::tempdir().unwrap();
        let message = of_file(directory.path()).unwrap_err().to_string();
        assert!(message.contains("not on a verbfs mount"), "{message}");
        assert!(of_file(Path::new("/nonexistent")).is_err());
    }
}
