//! Names, links, renames, special files and directories, seen at once through every mount.

use crate::support::*;
use crate::{checks, same};
use anyhow::{Context as _, Result, bail, ensure};
use rustix::fs::{self, AtFlags, CWD, FileType, Mode, OFlags, RenameFlags, SeekFrom};
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{File, metadata};
use std::io::{Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, symlink};
use std::path::Path;

checks! {
    create_seen_at_once, removal_seen_at_once, absence_is_not_remembered, exclusive_create_has_one_winner,
    mkdir_has_one_winner, exclusive_create_sees_dangling_links, truncating_open_everywhere, rename_replaces,
    rename_noreplace, rename_exchange, rename_of_two_names_of_one_file, rename_moves_directories,
    rename_into_itself_refused, rename_respects_kinds, rename_race_has_one_winner, open_file_survives_rename_elsewhere,
    hard_links_across_directories, link_refusals, unlink_and_rmdir_refusals, create_in_removed_directory,
    removed_open_file_keeps_working, removed_file_reopened_through_proc, replaced_open_file_keeps_working,
    temporary_file_without_name, path_handle, names_up_to_255_bytes, names_of_any_bytes, paths_that_are_too_long,
    deep_directories, symlink_of_4095_bytes, symlinks_are_followed, symlink_loops, open_flags_by_kind, fifo_works,
    unix_socket_works, working_directory_survives_rename, dot_and_dot_dot, directory_entry_kinds, directory_seek,
    directory_rewind_sees_changes, directory_of_many_entries, remove_while_listing, names_seen_by_ping_pong,
}

fn mode(bits: u32) -> Mode {
    Mode::from_raw_mode(bits)
}

fn names_in(path: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(path).with_context(|| format!("list {}", path.display()))? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

fn create_seen_at_once(c: &Context) -> Result<()> {
    for n in 0..60 {
        let name = format!("f{n}");
        std::fs::write(c.on(n, &name), name.as_bytes())?;
        for seen in 0..3 {
            same!(std::fs::read(c.on(seen, &name))?, name.as_bytes(), "bytes of {name} through mount {seen}");
        }
    }
    let expected = names_in(&c.a(""))?;
    same!(expected.len(), 60, "entries");
    same!(names_in(&c.b(""))?, expected, "entries on the second mount");
    Ok(())
}

fn removal_seen_at_once(c: &Context) -> Result<()> {
    for n in 0..60 {
        File::create(c.on(n, "f"))?;
        for seen in 0..3 {
            metadata(c.on(seen, "f"))?;
        }
        std::fs::remove_file(c.on(n + 1, "f"))?;
        for seen in 0..3 {
            fails_with(metadata(c.on(seen, "f")), &[Errno::NOENT], "stat of a removed file")?;
            fails_with(File::open(c.on(seen, "f")), &[Errno::NOENT], "open of a removed file")?;
            same!(names_in(&c.on(seen, ""))?.len(), 0, "entries");
        }
    }
    Ok(())
}

fn absence_is_not_remembered(c: &Context) -> Result<()> {
    for n in 0..60 {
        let name = format!("f{n}");
        for seen in 0..3 {
            fails_with(metadata(c.on(seen, &name)), &[Errno::NOENT], "stat before creation")?;
        }
        match n % 4 {
            0 => drop(File::create(c.on(n, &name))?),
            1 => std::fs::create_dir(c.on(n, &name))?,
            2 => symlink("/", c.on(n, &name))?,
            _ => std::fs::rename(c.on(n, &format!("f{}", n - 1)), c.on(n, &name))?,
        }
        for seen in 0..3 {
            std::fs::symlink_metadata(c.on(seen, &name))
                .with_context(|| format!("stat of {name} through mount {seen}"))?;
        }
    }
    Ok(())
}

/// Six processes try each of many names at the same time; each name is made by exactly one.
fn race(c: &Context, make: impl Fn(&Path) -> std::result::Result<(), Errno>) -> Result<()> {
    const PROCESSES: usize = 6;
    const NAMES: usize = 150;
    let gates: Vec<Signal> = (0..PROCESSES).map(|_| Signal::new()).collect::<Result<_>>()?;
    let (reader, writer) = rustix::pipe::pipe()?;
    let mut tasks = Vec::new();
    for (process, gate) in gates.iter().enumerate() {
        let (writer, make) = (&writer, &make);
        tasks.push(Task::start(move || {
            gate.wait()?;
            for n in 0..NAMES {
                match make(&c.on(process, &format!("n{n}"))) {
                    Ok(()) => drop(rustix::io::write(writer, &[n as u8])?),
                    Err(Errno::EXIST) => {}
                    Err(e) => bail!("process {process}, name {n}: {e}"),
                }
            }
            Ok(())
        })?);
    }
    gates.iter().try_for_each(Signal::send)?;
    tasks.into_iter().try_for_each(Task::join)?;
    drop(writer);
    let mut winners = Vec::new();
    File::from(reader).read_to_end(&mut winners)?;
    winners.sort();
    same!(winners, (0..NAMES as u8).collect::<Vec<_>>(), "names by successful creations");
    Ok(())
}

fn exclusive_create_has_one_winner(c: &Context) -> Result<()> {
    race(c, |path| fs::open(path, OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY, mode(0o644)).map(drop))
}

fn mkdir_has_one_winner(c: &Context) -> Result<()> {
    race(c, |path| fs::mkdir(path, mode(0o755)))
}

fn exclusive_create_sees_dangling_links(c: &Context) -> Result<()> {
    symlink("nowhere", c.a("s"))?;
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY;
    fails_with(fs::open(c.b("s"), flags, mode(0o644)), &[Errno::EXIST], "O_EXCL on a dangling link")?;
    File::create(c.c("s"))?;
    ensure!(metadata(c.a("nowhere"))?.is_file(), "creating through a dangling link made no file");
    Ok(())
}

fn truncating_open_everywhere(c: &Context) -> Result<()> {
    for round in 0..10 {
        std::fs::write(c.on(round, "f"), vec![9; 10_000])?;
        let reader = File::open(c.on(round + 1, "f"))?;
        same!(reader.read_at(&mut [0; 20_000], 0)?, 10_000, "bytes before");
        drop(File::create(c.on(round + 2, "f"))?);
        same!(reader.metadata()?.len(), 0, "size after O_TRUNC elsewhere");
        same!(reader.read_at(&mut [0; 20_000], 0)?, 0, "bytes after O_TRUNC elsewhere");
    }
    Ok(())
}

fn rename_replaces(c: &Context) -> Result<()> {
    for round in 0..20 {
        std::fs::write(c.on(round, "new"), format!("{round}"))?;
        std::fs::rename(c.on(round + 1, "new"), c.on(round + 1, "name"))?;
        for seen in 0..3 {
            same!(std::fs::read_to_string(c.on(seen, "name"))?, format!("{round}"), "bytes through mount {seen}");
            fails_with(metadata(c.on(seen, "new")), &[Errno::NOENT], "the old name")?;
        }
    }
    Ok(())
}

fn rename_with(from: &Path, to: &Path, flags: RenameFlags) -> std::result::Result<(), Errno> {
    fs::renameat_with(CWD, from, CWD, to, flags)
}

fn rename_noreplace(c: &Context) -> Result<()> {
    std::fs::write(c.a("x"), "x")?;
    std::fs::write(c.b("y"), "y")?;
    fails_with(rename_with(&c.c("x"), &c.c("y"), RenameFlags::NOREPLACE), &[Errno::EXIST], "NOREPLACE over a file")?;
    same!(std::fs::read(c.a("y"))?, b"y", "target after a refused rename");
    rename_with(&c.c("x"), &c.c("z"), RenameFlags::NOREPLACE)?;
    same!(names_in(&c.a(""))?, ["y", "z"], "entries");
    Ok(())
}

fn rename_exchange(c: &Context) -> Result<()> {
    std::fs::write(c.a("f"), "file")?;
    std::fs::create_dir(c.a("d"))?;
    std::fs::create_dir(c.a("d/sub"))?;
    std::fs::create_dir(c.a("other"))?;
    fails_with(rename_with(&c.b("f"), &c.b("none"), RenameFlags::EXCHANGE), &[Errno::NOENT], "EXCHANGE with nothing")?;
    rename_with(&c.b("f"), &c.b("d"), RenameFlags::EXCHANGE)?;
    same!(std::fs::read(c.c("d"))?, b"file", "the file under the directory's name");
    ensure!(metadata(c.a("f/sub"))?.is_dir(), "the directory lost its content");
    rename_with(&c.c("f/sub"), &c.c("other"), RenameFlags::EXCHANGE)?;
    let parent = metadata(c.a("other/.."))?.ino();
    same!(parent, metadata(c.b(""))?.ino(), "parent of the directory that moved up");
    Ok(())
}

/// POSIX: renaming one name of a file over another of the same file does nothing.
fn rename_of_two_names_of_one_file(c: &Context) -> Result<()> {
    std::fs::write(c.a("x"), "same")?;
    std::fs::hard_link(c.b("x"), c.b("y"))?;
    std::fs::rename(c.c("x"), c.c("y"))?;
    same!(names_in(&c.a(""))?, ["x", "y"], "entries");
    same!(metadata(c.b("x"))?.nlink(), 2, "links");
    std::fs::rename(c.a("x"), c.a("x"))?;
    Ok(())
}

fn rename_moves_directories(c: &Context) -> Result<()> {
    std::fs::create_dir_all(c.a("one/d/deep"))?;
    std::fs::write(c.a("one/d/deep/f"), "deep")?;
    std::fs::create_dir(c.b("two"))?;
    let inode = metadata(c.b("one/d"))?.ino();
    std::fs::rename(c.b("one/d"), c.b("two/e"))?;
    same!(std::fs::read(c.c("two/e/deep/f"))?, b"deep", "a file in it");
    fails_with(metadata(c.a("one/d")), &[Errno::NOENT], "the old name")?;
    same!(metadata(c.a("two/e"))?.ino(), inode, "inode number");
    for seen in 0..3 {
        same!(
            metadata(c.on(seen, "two/e/.."))?.ino(),
            metadata(c.on(seen, "two"))?.ino(),
            "its parent through mount {seen}"
        );
    }
    // Over an empty directory it may go, and it is that directory's place then.
    std::fs::create_dir(c.c("one/empty"))?;
    std::fs::rename(c.a("two/e"), c.a("one/empty"))?;
    same!(std::fs::read(c.b("one/empty/deep/f"))?, b"deep", "a file in it");
    Ok(())
}

fn rename_into_itself_refused(c: &Context) -> Result<()> {
    std::fs::create_dir_all(c.a("d/sub/deeper"))?;
    fails_with(std::fs::rename(c.b("d"), c.b("d/sub/new")), &[Errno::INVAL], "rename into itself")?;
    fails_with(std::fs::rename(c.b("d"), c.b("d/sub/deeper")), &[Errno::INVAL], "rename over its own grandchild")?;
    fails_with(
        std::fs::rename(c.b("d/sub/deeper"), c.b("d")),
        &[Errno::NOTEMPTY, Errno::EXIST],
        "rename over its ancestor",
    )?;
    // Two opposite moves at the same time: a loop must never come of it.
    for round in 0..30 {
        std::fs::create_dir_all(c.a("l"))?;
        std::fs::create_dir_all(c.a("r"))?;
        let results: Vec<Task> = [("l", "r/in"), ("r", "l/in")]
            .into_iter()
            .enumerate()
            .map(|(mount, (from, to))| {
                Task::start(move || match std::fs::rename(c.on(mount, from), c.on(mount, to)) {
                    Ok(()) => Ok(()),
                    Err(e)
                        if [libc::ENOENT, libc::EINVAL, libc::ENOTEMPTY].contains(&e.raw_os_error().unwrap_or(0)) =>
                    {
                        Ok(())
                    }
                    Err(e) => Err(e.into()),
                })
            })
            .collect::<Result<_>>()?;
        results.into_iter().try_for_each(Task::join)?;
        let names = names_in(&c.c(""))?;
        ensure!(
            names.contains(&"l".to_owned()) || names.contains(&"r".to_owned()),
            "both directories left the tree in round {round}"
        );
        for name in ["l", "r"] {
            let _ = std::fs::remove_dir_all(c.a(name));
        }
    }
    Ok(())
}

fn rename_respects_kinds(c: &Context) -> Result<()> {
    std::fs::write(c.a("f"), "f")?;
    std::fs::create_dir(c.a("d"))?;
    std::fs::create_dir_all(c.a("full/x"))?;
    fails_with(std::fs::rename(c.b("f"), c.b("d")), &[Errno::ISDIR], "file over directory")?;
    fails_with(std::fs::rename(c.b("d"), c.b("f")), &[Errno::NOTDIR], "directory over file")?;
    fails_with(std::fs::rename(c.b("d"), c.b("full")), &[Errno::NOTEMPTY, Errno::EXIST], "directory over a full one")?;
    fails_with(std::fs::rename(c.b("none"), c.b("f")), &[Errno::NOENT], "rename of nothing")?;
    same!(names_in(&c.c(""))?, ["d", "f", "full"], "entries");
    Ok(())
}

/// Many rename one file to names of their own: exactly one succeeds.
fn rename_race_has_one_winner(c: &Context) -> Result<()> {
    for round in 0..25 {
        std::fs::write(c.a("source"), "x")?;
        let signals: Vec<Signal> = (0..4).map(|_| Signal::new()).collect::<Result<_>>()?;
        let mut tasks = Vec::new();
        for (n, signal) in signals.iter().enumerate() {
            tasks.push(Task::start(move || {
                signal.wait()?;
                match std::fs::rename(c.on(n, "source"), c.on(n, &format!("target{n}"))) {
                    Err(e) if e.raw_os_error() != Some(libc::ENOENT) => Err(e.into()),
                    _ => Ok(()),
                }
            })?);
        }
        signals.iter().try_for_each(Signal::send)?;
        tasks.into_iter().try_for_each(Task::join)?;
        let names = names_in(&c.b(""))?;
        same!(names.len(), 1, "entries {names:?} after round {round}");
        std::fs::remove_file(c.c(&names[0]))?;
    }
    Ok(())
}

fn open_file_survives_rename_elsewhere(c: &Context) -> Result<()> {
    let file = File::options().create_new(true).read(true).write(true).open(c.a("f"))?;
    file.write_all_at(b"before", 0)?;
    std::fs::create_dir(c.b("d"))?;
    std::fs::rename(c.b("f"), c.b("d/g"))?;
    file.write_all_at(b"after!", 0)?;
    same!(std::fs::read(c.c("d/g"))?, b"after!", "bytes under the new name");
    std::fs::write(c.c("d/g"), "third")?;
    let mut bytes = [0; 5];
    file.read_exact_at(&mut bytes, 0)?;
    same!(&bytes, b"third", "bytes through the open file");
    Ok(())
}

fn hard_links_across_directories(c: &Context) -> Result<()> {
    std::fs::create_dir(c.a("one"))?;
    std::fs::create_dir(c.b("two"))?;
    std::fs::write(c.a("one/f"), "linked")?;
    std::fs::hard_link(c.b("one/f"), c.b("two/g"))?;
    same!(metadata(c.c("two/g"))?.ino(), metadata(c.a("one/f"))?.ino(), "inode numbers");
    File::options().append(true).open(c.c("two/g"))?.write_all(b" and changed")?;
    same!(std::fs::read(c.b("one/f"))?, b"linked and changed", "bytes under the other name");
    std::fs::remove_file(c.a("one/f"))?;
    same!(std::fs::read(c.b("two/g"))?, b"linked and changed", "bytes after the first name went");
    same!(metadata(c.c("two/g"))?.nlink(), 1, "links");
    Ok(())
}

fn link_refusals(c: &Context) -> Result<()> {
    std::fs::write(c.a("f"), "f")?;
    std::fs::create_dir(c.a("d"))?;
    fails_with(std::fs::hard_link(c.b("f"), c.b("d")), &[Errno::EXIST], "link over something")?;
    fails_with(std::fs::hard_link(c.b("f"), c.b("f")), &[Errno::EXIST], "link over itself")?;
    fails_with(std::fs::hard_link(c.b("d"), c.b("d2")), &[Errno::PERM], "link of a directory")?;
    fails_with(std::fs::hard_link(c.b("none"), c.b("x")), &[Errno::NOENT], "link of nothing")?;
    symlink("f", c.a("s"))?;
    fs::linkat(CWD, c.b("s"), CWD, c.b("s2"), AtFlags::empty())?;
    same!(std::fs::read_link(c.c("s2"))?.as_os_str(), OsStr::new("f"), "a linked symbolic link");
    Ok(())
}

fn unlink_and_rmdir_refusals(c: &Context) -> Result<()> {
    std::fs::create_dir_all(c.a("d/sub"))?;
    std::fs::write(c.a("f"), "f")?;
    fails_with(std::fs::remove_file(c.b("d")), &[Errno::ISDIR, Errno::PERM], "unlink of a directory")?;
    fails_with(std::fs::remove_dir(c.b("d")), &[Errno::NOTEMPTY, Errno::EXIST], "rmdir of a full directory")?;
    fails_with(std::fs::remove_dir(c.b("f")), &[Errno::NOTDIR], "rmdir of a file")?;
    fails_with(fs::rmdir(c.b("d/.")), &[Errno::INVAL], "rmdir of .")?;
    fails_with(fs::rmdir(c.b("d/sub/..")), &[Errno::NOTEMPTY, Errno::EXIST], "rmdir of ..")?;
    fails_with(std::fs::remove_file(c.b("f/x")), &[Errno::NOTDIR], "a path through a file")?;
    std::fs::remove_dir(c.c("d/sub"))?;
    std::fs::remove_dir(c.b("d"))?;
    Ok(())
}

fn create_in_removed_directory(c: &Context) -> Result<()> {
    std::fs::create_dir(c.a("d"))?;
    let directory: OwnedFd = fs::open(c.a("d"), OFlags::DIRECTORY, Mode::empty())?;
    std::fs::remove_dir(c.b("d"))?;
    let flags = OFlags::CREATE | OFlags::WRONLY;
    fails_with(fs::openat(&directory, "f", flags, mode(0o644)), &[Errno::NOENT, Errno::STALE], "create")?;
    fails_with(fs::mkdirat(&directory, "sub", mode(0o755)), &[Errno::NOENT, Errno::STALE], "mkdir")?;
    fails_with(fs::symlinkat("x", &directory, "s"), &[Errno::NOENT, Errno::STALE], "symlink")?;
    // A new directory of that name is another one.
    std::fs::create_dir(c.c("d"))?;
    fails_with(
        fs::openat(&directory, "f", flags, mode(0o644)),
        &[Errno::NOENT, Errno::STALE],
        "create in the old one",
    )?;
    std::fs::write(c.a("d/f"), "new")?;
    Ok(())
}

fn removed_open_file_keeps_working(c: &Context) -> Result<()> {
    let file = File::options().create_new(true).read(true).write(true).open(c.a("f"))?;
    let other = File::options().read(true).write(true).open(c.b("f"))?;
    file.write_all_at(b"still here", 0)?;
    std::fs::remove_file(c.c("f"))?;
    same!(file.metadata()?.nlink(), 0, "links");
    let mut bytes = [0; 10];
    other.read_exact_at(&mut bytes, 0)?;
    same!(&bytes, b"still here", "bytes through another mount");
    other.write_all_at(&vec![5; 300_000], 10)?;
    same!(file.metadata()?.len(), 300_010, "size");
    file.set_len(20)?;
    other.sync_all()?;
    same!(other.metadata()?.len(), 20, "size after truncation");
    // A new file of that name is not mixed up with it.
    std::fs::write(c.b("f"), "new")?;
    file.read_exact_at(&mut bytes, 0)?;
    same!(&bytes, b"still here", "bytes of the removed file");
    drop(file);
    other.read_exact_at(&mut bytes, 0)?;
    same!(&bytes, b"still here", "bytes after the creator's handle closed");
    drop(other);
    same!(std::fs::read(c.c("f"))?, b"new", "bytes of the new file");
    Ok(())
}

fn removed_file_reopened_through_proc(c: &Context) -> Result<()> {
    std::fs::write(c.a("f"), "gone")?;
    let file = File::open(c.a("f"))?;
    std::fs::remove_file(c.b("f"))?;
    let again = File::options().read(true).write(true).open(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    again.write_all_at(b"G", 0)?;
    let mut bytes = [0; 4];
    file.read_exact_at(&mut bytes, 0)?;
    same!(&bytes, b"Gone", "bytes");
    Ok(())
}

fn replaced_open_file_keeps_working(c: &Context) -> Result<()> {
    std::fs::write(c.a("f"), "old")?;
    let file = File::open(c.a("f"))?;
    std::fs::write(c.b("g"), "new")?;
    std::fs::rename(c.b("g"), c.b("f"))?;
    let mut bytes = [0; 3];
    file.read_exact_at(&mut bytes, 0)?;
    same!(&bytes, b"old", "bytes of the replaced file");
    same!(file.metadata()?.nlink(), 0, "links of the replaced file");
    same!(std::fs::read(c.a("f"))?, b"new", "bytes under the name");
    Ok(())
}

fn temporary_file_without_name(c: &Context) -> Result<()> {
    let fd = match fs::open(c.a(""), OFlags::TMPFILE | OFlags::RDWR, mode(0o600)) {
        Err(e @ (Errno::OPNOTSUPP | Errno::ISDIR | Errno::NOSYS)) => return skip(format!("O_TMPFILE: {e}")),
        other => other?,
    };
    let file = File::from(fd);
    file.write_all_at(b"temporary", 0)?;
    same!(names_in(&c.b(""))?.len(), 0, "entries");
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    fs::linkat(CWD, path, CWD, c.a("named"), AtFlags::SYMLINK_FOLLOW)?;
    same!(std::fs::read(c.b("named"))?, b"temporary", "bytes after it got a name");
    Ok(())
}

fn path_handle(c: &Context) -> Result<()> {
    std::fs::write(c.a("f"), "x")?;
    let fd = fs::open(c.b("f"), OFlags::PATH, Mode::empty())?;
    same!(fs::fstat(&fd)?.st_size, 1, "size through an O_PATH handle");
    fails_with(rustix::io::read(&fd, &mut [0u8; 1][..]), &[Errno::BADF], "read through an O_PATH handle")?;
    std::fs::create_dir(c.a("d"))?;
    let directory = fs::open(c.b("d"), OFlags::PATH | OFlags::DIRECTORY, Mode::empty())?;
    std::fs::rename(c.c("d"), c.c("e"))?;
    drop(fs::openat(&directory, "inside", OFlags::CREATE | OFlags::WRONLY, mode(0o644))?);
    metadata(c.a("e/inside"))?;
    Ok(())
}

fn names_up_to_255_bytes(c: &Context) -> Result<()> {
    for len in [1, 100, 254, 255] {
        let name = "n".repeat(len);
        std::fs::write(c.a(&name), &name)?;
        same!(std::fs::read(c.b(&name))?, name.as_bytes(), "bytes");
        ensure!(names_in(&c.c(""))?.contains(&name), "a name of {len} bytes is not listed");
        std::fs::rename(c.b(&name), c.b(&"m".repeat(len)))?;
        std::fs::remove_file(c.a(&"m".repeat(len)))?;
    }
    let long = "n".repeat(256);
    fails_with(File::create(c.a(&long)), &[Errno::NAMETOOLONG], "create")?;
    fails_with(metadata(c.b(&long)), &[Errno::NAMETOOLONG], "stat")?;
    fails_with(std::fs::create_dir(c.c(&long)), &[Errno::NAMETOOLONG], "mkdir")?;
    File::create(c.a("f"))?;
    fails_with(std::fs::rename(c.a("f"), c.a(&long)), &[Errno::NAMETOOLONG], "rename")?;
    fails_with(symlink("x", c.a(&long)), &[Errno::NAMETOOLONG], "symlink")
}

fn names_of_any_bytes(c: &Context) -> Result<()> {
    let names: [&[u8]; 6] =
        [b" ", b"new\nline", b"\xff\xfe not utf8", "\u{1F980}".as_bytes(), b"...", b"back\\slash\t\x01"];
    for name in names {
        let name = OsStr::from_bytes(name);
        std::fs::write(c.a("").join(name), name.as_bytes())?;
        same!(std::fs::read(c.b("").join(name))?, name.as_bytes(), "bytes of {name:?}");
    }
    let mut listed: Vec<Vec<u8>> =
        std::fs::read_dir(c.c(""))?.map(|e| Ok(e?.file_name().as_bytes().to_vec())).collect::<std::io::Result<_>>()?;
    listed.sort();
    let mut expected: Vec<Vec<u8>> = names.iter().map(|n| n.to_vec()).collect();
    expected.sort();
    same!(listed, expected, "entries");
    Ok(())
}

fn paths_that_are_too_long(c: &Context) -> Result<()> {
    let path = c.a(&"d/".repeat(2100));
    fails_with(metadata(path), &[Errno::NAMETOOLONG], "stat of a path beyond 4096 bytes")?;
    fails_with(symlink("x".repeat(4096), c.a("s")), &[Errno::NAMETOOLONG], "symlink to 4096 bytes")?;
    fails_with(symlink("", c.a("s")), &[Errno::NOENT], "symlink to nothing")
}

fn deep_directories(c: &Context) -> Result<()> {
    let mut directory = fs::open(c.a(""), OFlags::DIRECTORY, Mode::empty())?;
    for _ in 0..120 {
        fs::mkdirat(&directory, "level", mode(0o755))?;
        directory = fs::openat(&directory, "level", OFlags::DIRECTORY, Mode::empty())?;
    }
    drop(fs::openat(&directory, "leaf", OFlags::CREATE | OFlags::WRONLY, mode(0o644))?);
    metadata(c.b(&format!("{}leaf", "level/".repeat(120))))?;
    std::fs::remove_dir_all(c.c("level"))?;
    same!(names_in(&c.a(""))?.len(), 0, "entries");
    Ok(())
}

fn symlink_of_4095_bytes(c: &Context) -> Result<()> {
    for len in [1, 59, 60, 255, 1024, 4095] {
        let target: String = (0..len).map(|i| if i % 200 == 199 { '/' } else { 'x' }).collect();
        let name = format!("s{len}");
        match symlink(&target, c.a(&name)) {
            // XFS ends at 1023.
            Err(e) if len > 1023 && e.raw_os_error() == Some(libc::ENAMETOOLONG) => {
                return skip(format!("symbolic links end below {len} bytes"));
            }
            other => other?,
        }
        same!(std::fs::read_link(c.b(&name))?.as_os_str(), OsStr::new(&target), "target of {len} bytes");
        same!(std::fs::symlink_metadata(c.c(&name))?.len(), len as u64, "size of the link");
    }
    Ok(())
}

fn symlinks_are_followed(c: &Context) -> Result<()> {
    std::fs::create_dir_all(c.a("d/sub"))?;
    std::fs::write(c.a("d/f"), "found")?;
    symlink("../f", c.b("d/sub/up"))?;
    symlink("d/sub", c.c("short"))?;
    for seen in 0..3 {
        same!(std::fs::read(c.on(seen, "short/up"))?, b"found", "bytes through two links, mount {seen}");
    }
    std::fs::remove_file(c.a("short"))?;
    symlink("d", c.b("short"))?;
    same!(std::fs::read(c.a("short/f"))?, b"found", "bytes through the replaced link");
    Ok(())
}

fn symlink_loops(c: &Context) -> Result<()> {
    symlink("two", c.a("one"))?;
    symlink("one", c.b("two"))?;
    fails_with(metadata(c.c("one")), &[Errno::LOOP], "stat of a loop")?;
    fails_with(File::create(c.c("one")), &[Errno::LOOP], "create through a loop")
}

fn open_flags_by_kind(c: &Context) -> Result<()> {
    std::fs::write(c.a("f"), "x")?;
    std::fs::create_dir(c.a("d"))?;
    symlink("f", c.a("s"))?;
    let open = |name: &str, flags: OFlags| fs::open(c.b(name), flags, mode(0o644));
    fails_with(open("d", OFlags::WRONLY), &[Errno::ISDIR], "directory for writing")?;
    fails_with(open("d", OFlags::CREATE | OFlags::RDWR), &[Errno::ISDIR], "O_CREAT on a directory")?;
    fails_with(open("f", OFlags::DIRECTORY), &[Errno::NOTDIR], "O_DIRECTORY on a file")?;
    fails_with(open("f/", OFlags::RDONLY), &[Errno::NOTDIR], "a file with a slash behind")?;
    fails_with(open("s", OFlags::NOFOLLOW), &[Errno::LOOP], "O_NOFOLLOW on a link")?;
    fails_with(open("none", OFlags::RDONLY), &[Errno::NOENT], "nothing")?;
    fails_with(
        rustix::io::read(open("d", OFlags::RDONLY)?, &mut [0u8; 8][..]),
        &[Errno::ISDIR],
        "read of a directory",
    )?;
    fails_with(rustix::io::write(open("f", OFlags::RDONLY)?, b"x"), &[Errno::BADF], "write to a read-only handle")?;
    fails_with(
        rustix::io::read(open("f", OFlags::WRONLY)?, &mut [0u8; 8][..]),
        &[Errno::BADF],
        "read from a write-only handle",
    )?;
    Ok(())
}

fn fifo_works(c: &Context) -> Result<()> {
    fs::mknodat(CWD, c.a("p"), FileType::Fifo, mode(0o600), 0)?;
    ensure!(metadata(c.b("p"))?.file_type().is_fifo(), "not a fifo on the second mount");
    // A fifo's bytes stay within one kernel and one mount.
    let path = c.a("p");
    let writer = Task::start(|| Ok(std::fs::write(&path, "through the pipe")?))?;
    same!(std::fs::read(c.a("p"))?, b"through the pipe", "bytes");
    writer.join()?;
    std::fs::remove_file(c.c("p"))?;
    Ok(())
}

fn unix_socket_works(c: &Context) -> Result<()> {
    let path = c.a("s");
    // Socket addresses hold 107 bytes: go there with a short name.
    std::env::set_current_dir(c.a(""))?;
    let listener = std::os::unix::net::UnixListener::bind("s").with_context(|| format!("bind {}", path.display()))?;
    ensure!(metadata(c.b("s"))?.file_type().is_socket(), "not a socket on the second mount");
    let client = Task::start(|| Ok(std::os::unix::net::UnixStream::connect("s")?.write_all(b"hello")?))?;
    let mut bytes = Vec::new();
    listener.accept()?.0.read_to_end(&mut bytes)?;
    same!(bytes, b"hello", "bytes");
    client.join()
}

fn working_directory_survives_rename(c: &Context) -> Result<()> {
    std::fs::create_dir_all(c.a("one/two"))?;
    std::env::set_current_dir(c.a("one/two"))?;
    same!(std::env::current_dir()?, c.a("one/two"), "getcwd");
    std::fs::rename(c.a("one"), c.a("renamed"))?;
    same!(std::env::current_dir()?, c.a("renamed/two"), "getcwd after a rename above");
    std::fs::write("here", "x")?;
    metadata(c.b("renamed/two/here"))?;
    std::fs::rename(c.b("renamed/two"), c.b("moved"))?;
    // Relative names go on meaning the directory itself. (Its `..` is the kernel's own memory of where it was found:
    // docs/semantics.md, stock limits.)
    std::fs::write("there", "x").with_context(|| "writing after the directory moved on another mount")?;
    metadata(c.c("moved/there"))?;
    std::env::set_current_dir("/")?;
    Ok(())
}

struct Entry {
    name: Vec<u8>,
    inode: u64,
    kind: FileType,
    /// Where the entry after this one begins.
    next: u64,
}

/// All entries from the handle's position on, as the kernel gives them.
fn raw_entries(directory: impl AsFd) -> Result<Vec<Entry>> {
    let mut buffer = vec![MaybeUninit::uninit(); 4096];
    let mut entries = fs::RawDir::new(directory, &mut buffer);
    let mut all = Vec::new();
    while let Some(entry) = entries.next() {
        let entry = entry?;
        all.push(Entry {
            name: entry.file_name().to_bytes().to_vec(),
            inode: entry.ino(),
            kind: entry.file_type(),
            next: entry.next_entry_cookie(),
        });
    }
    Ok(all)
}

fn open_directory(path: &Path) -> Result<OwnedFd> {
    fs::open(path, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .with_context(|| format!("opendir {}", path.display()))
}

fn dot_and_dot_dot(c: &Context) -> Result<()> {
    std::fs::create_dir_all(c.a("d/sub"))?;
    for seen in 0..3 {
        let entries = raw_entries(open_directory(&c.on(seen, "d/sub"))?)?;
        let find = |name: &[u8]| entries.iter().filter(|e| e.name == name).map(|e| e.inode).collect::<Vec<_>>();
        same!(find(b"."), [metadata(c.a("d/sub"))?.ino()], "inode number of . in a listing");
        same!(find(b".."), [metadata(c.a("d"))?.ino()], "inode number of .. in a listing");
        same!(metadata(c.on(seen, "d/sub/../."))?.ino(), metadata(c.a("d"))?.ino(), "inode number of ..");
    }
    Ok(())
}

fn directory_entry_kinds(c: &Context) -> Result<()> {
    File::create(c.a("f"))?;
    std::fs::create_dir(c.a("d"))?;
    symlink("f", c.a("s"))?;
    fs::mknodat(CWD, c.a("p"), FileType::Fifo, mode(0o600), 0)?;
    let kinds =
        [("f", FileType::RegularFile), ("d", FileType::Directory), ("s", FileType::Symlink), ("p", FileType::Fifo)];
    let entries = raw_entries(open_directory(&c.b(""))?)?;
    for (name, kind) in kinds {
        let Some(entry) = entries.iter().find(|e| e.name == name.as_bytes()) else { bail!("{name} is not listed") };
        ensure!(entry.kind == kind || entry.kind == FileType::Unknown, "{name} is listed as {:?}", entry.kind);
        same!(entry.inode, std::fs::symlink_metadata(c.c(name))?.ino(), "inode number of {name}");
    }
    Ok(())
}

fn directory_seek(c: &Context) -> Result<()> {
    for n in 0..300 {
        File::create(c.on(n, &format!("file-with-a-longer-name-{n:04}")))?;
    }
    let directory = open_directory(&c.b(""))?;
    let all = raw_entries(&directory)?;
    same!(all.len(), 302, "entries");
    // From each remembered place the rest follows, whatever was read meanwhile.
    for at in [0, 1, 7, 100, 150, 250, 299, 300] {
        fs::seek(&directory, SeekFrom::Start(all[at].next))?;
        let rest = raw_entries(&directory)?;
        let (got, expected): (Vec<_>, Vec<_>) =
            (rest.iter().map(|e| &e.name).collect(), all[at + 1..].iter().map(|e| &e.name).collect());
        ensure!(got == expected, "after seekdir to place {at}: {} entries, expected {}", got.len(), expected.len());
    }
    fs::seek(&directory, SeekFrom::Start(0))?;
    same!(raw_entries(&directory)?.len(), 302, "entries after rewinddir");
    same!(raw_entries(&directory)?.len(), 0, "entries after the end");
    Ok(())
}

fn directory_rewind_sees_changes(c: &Context) -> Result<()> {
    let directory = open_directory(&c.b(""))?;
    for n in 0..20usize {
        File::create(c.a(&format!("f{n}")))?;
        fs::seek(&directory, SeekFrom::Start(0))?;
        same!(raw_entries(&directory)?.len(), n + 3, "entries after creation {n} elsewhere");
    }
    for n in 0..20usize {
        std::fs::remove_file(c.c(&format!("f{n}")))?;
        fs::seek(&directory, SeekFrom::Start(0))?;
        same!(raw_entries(&directory)?.len(), 21 - n, "entries after removal {n} elsewhere");
    }
    Ok(())
}

/// Whatever others make and remove meanwhile: what is there all the time is listed, exactly once.
fn directory_of_many_entries(c: &Context) -> Result<()> {
    let count = if c.long { 100_000 } else { 10_000 };
    let makers = (0..3)
        .map(|mount| {
            Box::new(move || {
                for n in (mount..count).step_by(3) {
                    fs::open(
                        c.on(mount, &format!("stays-{n}")),
                        OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY,
                        mode(0o644),
                    )?;
                }
                Ok(())
            }) as Box<dyn FnOnce() -> Result<()>>
        })
        .collect();
    together(makers)?;
    let mut disturber = Task::start(|| {
        for n in 0.. {
            let name = format!("comes-and-goes-{}", n % 500);
            File::create(c.on(n, &name))?;
            std::fs::remove_file(c.on(n + 1, &name))?;
            let stays = c.on(n, &format!("new-{n}"));
            File::create(stays)?;
        }
        Ok(())
    })?;
    for listing in 0..6 {
        let mut counts: BTreeMap<Vec<u8>, u32> = BTreeMap::new();
        for entry in raw_entries(open_directory(&c.on(listing, ""))?)? {
            *counts.entry(entry.name).or_default() += 1;
        }
        for n in 0..count {
            let name = format!("stays-{n}");
            match counts.get(name.as_bytes()) {
                Some(1) => {}
                Some(times) => bail!("{name} is listed {times} times by listing {listing}"),
                None => bail!("{name} is missing from listing {listing}, which has {} entries", counts.len()),
            }
        }
        ensure!(disturber.running(), "the process that creates meanwhile has ended");
    }
    drop(disturber);
    Ok(())
}

/// What `rm -r` does: remove what was listed, in pieces, until nothing is left.
fn remove_while_listing(c: &Context) -> Result<()> {
    for n in 0..1500 {
        File::create(c.on(n, &format!("file-number-{n}")))?;
    }
    let mut removed = 0;
    for entry in std::fs::read_dir(c.b(""))? {
        std::fs::remove_file(c.on(removed, "").join(entry?.file_name()))?;
        removed += 1;
    }
    same!(removed, 1500, "entries seen by one listing that removes them");
    same!(names_in(&c.c(""))?.len(), 0, "entries left");
    Ok(())
}

/// Two processes answer each other by names on different mounts: each sees what the other did before.
fn names_seen_by_ping_pong(c: &Context) -> Result<()> {
    const ROUNDS: usize = 100;
    let player = |mount: usize, mine: &'static str, theirs: &'static str| {
        move || -> Result<()> {
            for n in 0..ROUNDS {
                if mine == "pong" {
                    wait_for(&c.on(mount, &format!("{theirs}{n}")))?;
                }
                std::fs::write(c.on(mount, &format!("data-{mine}{n}")), format!("{mine}{n}"))?;
                File::create(c.on(mount, &format!("{mine}{n}")))?;
                if mine == "ping" {
                    wait_for(&c.on(mount, &format!("{theirs}{n}")))?;
                }
                let bytes = std::fs::read_to_string(c.on(mount, &format!("data-{theirs}{n}")))?;
                same!(bytes, format!("{theirs}{n}"), "bytes written before the sign was given");
            }
            Ok(())
        }
    };
    together(vec![Box::new(player(0, "ping", "pong")), Box::new(player(1, "pong", "ping"))])
}
