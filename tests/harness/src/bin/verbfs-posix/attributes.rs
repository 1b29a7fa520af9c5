//! Attributes, times, permissions, extended attributes and ACLs, seen at once through every mount.

use crate::support::*;
use crate::{checks, same};
use anyhow::{Context as _, Result, ensure};
use rustix::fs::{self, AtFlags, CWD, Mode, OFlags, Timespec, Timestamps, XattrFlags};
use rustix::io::Errno;
use std::fs::{File, metadata};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt, chown};
use std::path::Path;
use std::time::Duration;

checks! {
    write_updates_times_everywhere, utimens_exact_everywhere, utimens_omit_and_now, write_after_future_mtime_lowers_it,
    times_beyond_2038, times_at_the_ends_of_time, chmod_seen_everywhere, chmod_changes_ctime_only, chown_seen_everywhere, chown_clears_suid,
    write_clears_suid_and_sgid, truncate_clears_suid, write_clears_file_capabilities, size_seen_at_once, inode_number_same_everywhere,
    link_count_seen_everywhere, directory_link_count, directory_times_follow_names, link_and_rename_change_ctime,
    blocks_after_fsync, statx_basic_fields, truncate_to_same_size_keeps_data, permission_denied_for_others,
    only_the_owner_may_change, access_tells_permissions, sticky_directory_protects, umask_applies,
    setgid_directory_gives_its_group, supplementary_groups_count, statfs_is_sane, xattr_seen_everywhere,
    xattr_create_and_replace, xattr_sizes, xattr_64_kib, xattr_many, xattr_of_directory_and_others, acl_grants_named_user,
    acl_mask_follows_chmod, acl_default_is_inherited,
}

fn mode(bits: u32) -> Mode {
    Mode::from_raw_mode(bits)
}

fn mtime(path: &Path) -> Result<(i64, i64)> {
    let m = metadata(path).with_context(|| format!("stat {}", path.display()))?;
    Ok((m.mtime(), m.mtime_nsec()))
}

fn ctime(path: &Path) -> Result<(i64, i64)> {
    let m = metadata(path)?;
    Ok((m.ctime(), m.ctime_nsec()))
}

/// Kernels stamp files by the tick: let one pass.
fn tick() {
    std::thread::sleep(Duration::from_millis(25));
}

fn write_updates_times_everywhere(c: &Context) -> Result<()> {
    let file = File::create(c.a("f"))?;
    for round in 0..5 {
        let before = (mtime(&c.b("f"))?, ctime(&c.b("f"))?);
        tick();
        file.write_all_at(b"x", round)?;
        let after = (mtime(&c.b("f"))?, ctime(&c.b("f"))?);
        ensure!(after.0 > before.0, "mtime on the second mount stayed {:?} after a write", before.0);
        ensure!(after.1 > before.1, "ctime on the second mount stayed {:?} after a write", before.1);
        same!((mtime(&c.c("f"))?, ctime(&c.c("f"))?), after, "times on the third mount");
        same!((mtime(&c.a("f"))?, ctime(&c.a("f"))?), after, "times on the writing mount");
    }
    Ok(())
}

fn stamps(a: (i64, i64), m: (i64, i64)) -> Timestamps {
    let spec = |t: (i64, i64)| Timespec { tv_sec: t.0, tv_nsec: t.1 };
    Timestamps { last_access: spec(a), last_modification: spec(m) }
}

fn utimens_exact_everywhere(c: &Context) -> Result<()> {
    File::create(c.a("f"))?;
    for (mount, second) in [(0, 1_000_000_000), (1, 1), (2, 1_700_000_000)] {
        let times = stamps((second + 7, 987_654_321), (second, 123_456_789));
        fs::utimensat(CWD, c.on(mount, "f"), &times, AtFlags::empty())?;
        for seen in 0..3 {
            let m = metadata(c.on(seen, "f"))?;
            same!((m.mtime(), m.mtime_nsec()), (second, 123_456_789), "mtime through mount {seen}");
            same!((m.atime(), m.atime_nsec()), (second + 7, 987_654_321), "atime through mount {seen}");
        }
    }
    Ok(())
}

fn utimens_omit_and_now(c: &Context) -> Result<()> {
    File::create(c.a("f"))?;
    fs::utimensat(CWD, c.a("f"), &stamps((5, 5), (6, 6)), AtFlags::empty())?;
    fs::utimensat(CWD, c.b("f"), &stamps((9, 0), (0, fs::UTIME_OMIT)), AtFlags::empty())?;
    let m = metadata(c.c("f"))?;
    same!((m.mtime(), m.mtime_nsec(), m.atime()), (6, 6, 9), "times after UTIME_OMIT");
    fs::utimensat(CWD, c.b("f"), &stamps((0, fs::UTIME_OMIT), (0, fs::UTIME_NOW)), AtFlags::empty())?;
    let m = metadata(c.a("f"))?;
    ensure!(m.mtime() > 1_600_000_000, "UTIME_NOW gave {}", m.mtime());
    same!(m.atime(), 9, "atime after UTIME_OMIT");
    Ok(())
}

/// mtime is not a maximum: after it was set to the future, a write sets it to now.
fn write_after_future_mtime_lowers_it(c: &Context) -> Result<()> {
    let file = File::create(c.a("f"))?;
    let future = metadata(c.a("f"))?.mtime() + 100_000;
    fs::utimensat(CWD, c.b("f"), &stamps((future, 0), (future, 0)), AtFlags::empty())?;
    same!(mtime(&c.a("f"))?, (future, 0), "mtime in the future, on the first mount");
    file.write_all_at(b"x", 0)?;
    ensure!(mtime(&c.c("f"))?.0 < future, "mtime is still in the future after a write");
    Ok(())
}

fn times_beyond_2038(c: &Context) -> Result<()> {
    File::create(c.a("f"))?;
    let far = 4_000_000_000;
    fs::utimensat(CWD, c.a("f"), &stamps((far, 1), (far, 2)), AtFlags::empty())?;
    same!(mtime(&c.b("f"))?, (far, 2), "a time in 2096");
    Ok(())
}

/// No time that a caller can name may stop a daemon; what cannot be kept is cut to what can.
fn times_at_the_ends_of_time(c: &Context) -> Result<()> {
    File::create(c.a("f"))?;
    for (seconds, nanoseconds) in [(-2, 500_000_000), (-1, 1), (i64::from(i32::MIN), 0)] {
        fs::utimensat(CWD, c.a("f"), &stamps((seconds, nanoseconds), (seconds, nanoseconds)), AtFlags::empty())?;
        same!(mtime(&c.b("f"))?, (seconds, nanoseconds), "a time before 1970");
    }
    for (seconds, nanoseconds) in [(i64::MIN, 0), (i64::MIN, 1), (i64::MIN, 999_999_999), (i64::MAX, 999_999_999)] {
        fs::utimensat(CWD, c.a("f"), &stamps((seconds, nanoseconds), (seconds, nanoseconds)), AtFlags::empty())?;
        for seen in 0..3 {
            let (kept, _) = mtime(&c.on(seen, "f"))?;
            ensure!(kept.signum() == seconds.signum(), "{seconds} s became {kept} s through mount {seen}");
        }
    }
    Ok(())
}

fn chmod_seen_everywhere(c: &Context) -> Result<()> {
    File::create(c.a("f"))?;
    for (mount, bits) in [(0, 0o600), (1, 0o4755), (2, 0o1640), (0, 0o2777), (1, 0)] {
        fs::chmod(c.on(mount, "f"), mode(bits))?;
        for seen in 0..3 {
            same!(metadata(c.on(seen, "f"))?.mode() & 0o7777, bits, "mode through mount {seen}");
        }
    }
    Ok(())
}

fn chmod_changes_ctime_only(c: &Context) -> Result<()> {
    File::create(c.a("f"))?;
    let before = (mtime(&c.b("f"))?, ctime(&c.b("f"))?);
    tick();
    fs::chmod(c.a("f"), mode(0o640))?;
    same!(mtime(&c.b("f"))?, before.0, "mtime after chmod");
    ensure!(ctime(&c.b("f"))? > before.1, "ctime did not move after chmod");
    Ok(())
}

fn need_root() -> Result<()> {
    if rustix::process::geteuid().is_root() { Ok(()) } else { skip("needs root") }
}

fn chown_seen_everywhere(c: &Context) -> Result<()> {
    need_root()?;
    File::create(c.a("f"))?;
    chown(c.a("f"), Some(USER), Some(GROUP))?;
    for seen in 0..3 {
        let m = metadata(c.on(seen, "f"))?;
        same!((m.uid(), m.gid()), (USER, GROUP), "owner through mount {seen}");
    }
    chown(c.b("f"), None, Some(USER))?;
    let m = metadata(c.c("f"))?;
    same!((m.uid(), m.gid()), (USER, USER), "owner after only the group changed");
    Ok(())
}

fn chown_clears_suid(c: &Context) -> Result<()> {
    need_root()?;
    File::create(c.a("f"))?;
    fs::chmod(c.a("f"), mode(0o6755))?;
    chown(c.b("f"), Some(USER), Some(USER))?;
    same!(metadata(c.c("f"))?.mode() & 0o7777, 0o755, "mode after chown");
    Ok(())
}

fn write_clears_suid_and_sgid(c: &Context) -> Result<()> {
    c.open_to_all()?;
    need_root()?;
    File::create(c.a("f"))?.write_all(b"0123456789")?;
    chown(c.a("f"), Some(USER), Some(USER))?;
    fs::chmod(c.a("f"), mode(0o6777))?;
    as_user(OTHER_USER, &[], || {
        let file = File::options().write(true).open(c.b("f"))?;
        Ok(file.write_all_at(b"x", 3)?)
    })?;
    same!(metadata(c.c("f"))?.mode() & 0o7777, 0o777, "mode after a write by somebody else");
    Ok(())
}

fn truncate_clears_suid(c: &Context) -> Result<()> {
    c.open_to_all()?;
    need_root()?;
    File::create(c.a("f"))?.write_all(b"0123456789")?;
    fs::chmod(c.a("f"), mode(0o4777))?;
    as_user(USER, &[], || Ok(File::options().write(true).open(c.b("f"))?.set_len(4)?))?;
    same!(metadata(c.c("f"))?.mode() & 0o7777, 0o777, "mode after truncate by somebody else");
    same!(metadata(c.c("f"))?.len(), 4, "size");
    Ok(())
}

/// Who may write a program must not get its capabilities for his own bytes; nor does Linux leave them to root.
fn write_clears_file_capabilities(c: &Context) -> Result<()> {
    c.open_to_all()?;
    need_root()?;
    const NAME: &str = "security.capability";
    // cap_net_bind_service, permitted: struct vfs_cap_data of revision 2.
    let mut value = [0; 20];
    value[..8].copy_from_slice(&[0, 0, 0, 2, 0, 4, 0, 0]);
    for (mount, user) in [(0, USER), (1, USER), (2, 0)] {
        File::create(c.a("f"))?.write_all(b"0123456789")?;
        fs::chmod(c.a("f"), mode(0o4777))?;
        set(&c.b("f"), "user.other", b"stays", XattrFlags::empty())?;
        let open_before = File::options().write(true).open(c.on(mount, "f"))?;
        open_before.write_all_at(b"x", 1)?;
        set(&c.b("f"), NAME, &value, XattrFlags::empty())?;
        fs::chmod(c.a("f"), mode(0o4777))?;
        same!(get(&c.on(mount, "f"), NAME), Ok(value.to_vec()), "the capability before the write");
        let write = || Ok(File::options().write(true).open(c.on(mount, "f"))?.write_all_at(b"y", 3)?);
        if user == 0 {
            write()?
        } else {
            as_user(user, &[], write)?
        }
        for seen in 0..3 {
            fails_with(get(&c.on(seen, "f"), NAME), &[Errno::NODATA], "the capability after a write")?;
            same!(get(&c.on(seen, "f"), "user.other"), Ok(b"stays".to_vec()), "another attribute");
        }
        let expected = if user == 0 { 0o4777 } else { 0o777 };
        same!(metadata(c.c("f"))?.mode() & 0o7777, expected, "mode after the write");
    }
    Ok(())
}

fn size_seen_at_once(c: &Context) -> Result<()> {
    let files: Vec<File> = (0..3)
        .map(|m| File::options().create(true).truncate(false).write(true).open(c.on(m, "f")))
        .collect::<std::io::Result<_>>()?;
    let mut size = 0;
    for round in 0..90u64 {
        let writer = &files[round as usize % 3];
        if round % 7 == 6 {
            size /= 2;
            writer.set_len(size)?;
        } else {
            writer.write_all_at(&[1; 777], size)?;
            size += 777;
        }
        for (seen, file) in files.iter().enumerate() {
            same!(metadata(c.on(seen, "f"))?.len(), size, "stat through mount {seen} in round {round}");
            same!(file.metadata()?.len(), size, "fstat through mount {seen} in round {round}");
        }
    }
    Ok(())
}

fn inode_number_same_everywhere(c: &Context) -> Result<()> {
    let file = File::create(c.a("f"))?;
    std::fs::create_dir(c.a("d"))?;
    for name in ["f", "d"] {
        let inode = metadata(c.a(name))?.ino();
        ensure!(inode != 0, "inode number 0");
        for seen in 0..3 {
            same!(metadata(c.on(seen, name))?.ino(), inode, "inode number of {name} through mount {seen}");
        }
        std::fs::rename(c.b(name), c.b(&format!("{name}2")))?;
        same!(metadata(c.c(&format!("{name}2")))?.ino(), inode, "inode number of {name} after a rename");
    }
    same!(file.metadata()?.ino(), metadata(c.b("f2"))?.ino(), "inode number of the open file");
    Ok(())
}

fn link_count_seen_everywhere(c: &Context) -> Result<()> {
    let file = File::create(c.a("f0"))?;
    for n in 1..20u64 {
        std::fs::hard_link(c.on(n as usize, "f0"), c.on(n as usize, &format!("f{n}")))?;
        same!(metadata(c.on(n as usize + 1, "f0"))?.nlink(), n + 1, "links through the next mount");
        same!(file.metadata()?.nlink(), n + 1, "links of the open file");
    }
    for n in 0..20u64 {
        std::fs::remove_file(c.on(n as usize, &format!("f{n}")))?;
        same!(file.metadata()?.nlink(), 19 - n, "links of the open file after an unlink");
    }
    Ok(())
}

fn directory_link_count(c: &Context) -> Result<()> {
    std::fs::create_dir(c.a("d"))?;
    if metadata(c.a("d"))?.nlink() == 1 {
        return skip("directories have link count 1 here");
    }
    same!(metadata(c.b("d"))?.nlink(), 2, "links of an empty directory");
    std::fs::create_dir(c.b("d/1"))?;
    std::fs::create_dir(c.a("d/2"))?;
    File::create(c.a("d/file"))?;
    same!(metadata(c.c("d"))?.nlink(), 4, "links of a directory with two subdirectories");
    std::fs::rename(c.c("d/2"), c.c("elsewhere"))?;
    same!(metadata(c.a("d"))?.nlink(), 3, "links after one moved out");
    std::fs::remove_dir(c.a("d/1"))?;
    same!(metadata(c.b("d"))?.nlink(), 2, "links after the other was removed");
    Ok(())
}

fn directory_times_follow_names(c: &Context) -> Result<()> {
    std::fs::create_dir(c.a("d"))?;
    let mut before = mtime(&c.b("d"))?;
    let mut moved = |what: &str| -> Result<()> {
        let after = mtime(&c.b("d"))?;
        ensure!(after > before, "mtime of the directory did not move on {what}");
        before = after;
        tick();
        Ok(())
    };
    tick();
    File::create(c.a("d/f"))?;
    moved("create")?;
    std::fs::rename(c.c("d/f"), c.c("d/g"))?;
    moved("rename")?;
    std::fs::hard_link(c.a("d/g"), c.a("d/h"))?;
    moved("link")?;
    std::fs::remove_file(c.c("d/g"))?;
    moved("unlink")?;
    std::fs::create_dir(c.a("d/sub"))?;
    moved("mkdir")?;
    std::fs::remove_dir(c.a("d/sub"))?;
    moved("rmdir")
}

fn link_and_rename_change_ctime(c: &Context) -> Result<()> {
    File::create(c.a("f"))?;
    let before = ctime(&c.b("f"))?;
    tick();
    std::fs::hard_link(c.a("f"), c.a("g"))?;
    let linked = ctime(&c.b("f"))?;
    ensure!(linked > before, "ctime did not move on link");
    tick();
    std::fs::remove_file(c.c("f"))?;
    ensure!(ctime(&c.b("g"))? > linked, "ctime did not move on unlink of the other name");
    Ok(())
}

fn blocks_after_fsync(c: &Context) -> Result<()> {
    let mut file = File::create(c.a("f"))?;
    file.write_all(&vec![7; 1 << 20])?;
    file.sync_all()?;
    for seen in 0..3 {
        let m = metadata(c.on(seen, "f"))?;
        ensure!(m.blocks() * 512 >= 1 << 20, "only {} blocks for 1 MiB through mount {seen}", m.blocks());
        ensure!(m.blocks() * 512 <= 4 << 20, "{} blocks for 1 MiB through mount {seen}", m.blocks());
        ensure!(m.blksize() >= 512, "block size {}", m.blksize());
    }
    file.set_len(0)?;
    ensure!(metadata(c.b("f"))?.blocks() <= 16, "blocks remain after truncate to 0");
    Ok(())
}

fn statx_basic_fields(c: &Context) -> Result<()> {
    File::create(c.a("f"))?.write_all(b"12345")?;
    let x = fs::statx(CWD, c.b("f"), AtFlags::empty(), fs::StatxFlags::BASIC_STATS)?;
    ensure!(
        x.stx_mask & fs::StatxFlags::BASIC_STATS.bits() == fs::StatxFlags::BASIC_STATS.bits(),
        "fields are missing: {:x}",
        x.stx_mask
    );
    let m = metadata(c.c("f"))?;
    same!((x.stx_size, x.stx_ino, x.stx_nlink as u64), (5, m.ino(), m.nlink()), "statx");
    same!(x.stx_mode as u32, m.mode(), "mode by statx");
    Ok(())
}

fn truncate_to_same_size_keeps_data(c: &Context) -> Result<()> {
    std::fs::write(c.a("f"), b"hello")?;
    File::options().write(true).open(c.b("f"))?.set_len(5)?;
    same!(std::fs::read(c.c("f"))?, b"hello", "bytes");
    Ok(())
}

fn permission_denied_for_others(c: &Context) -> Result<()> {
    c.open_to_all()?;
    std::fs::write(c.a("f"), b"secret")?;
    fs::chmod(c.a("f"), mode(0o600))?;
    std::fs::create_dir(c.a("d"))?;
    fs::chmod(c.a("d"), mode(0o755))?;
    std::fs::create_dir(c.a("closed"))?;
    std::fs::write(c.a("closed/f"), b"x")?;
    fs::chmod(c.a("closed"), mode(0o700))?;
    as_user(USER, &[], || {
        for mount in 0..3 {
            let on = |name: &str| c.on(mount, name);
            fails_with(File::open(on("f")), &[Errno::ACCESS], "open of another's 0600 file")?;
            fails_with(File::create(on("d/new")), &[Errno::ACCESS], "create in another's directory")?;
            fails_with(std::fs::create_dir(on("d/new")), &[Errno::ACCESS], "mkdir in another's directory")?;
            fails_with(metadata(on("closed/f")), &[Errno::ACCESS], "stat behind a closed directory")?;
            fails_with(std::fs::read_dir(on("closed")), &[Errno::ACCESS], "list a closed directory")?;
        }
        Ok(())
    })?;
    // A permission given through one mount counts on the others at once, one taken likewise.
    for round in 0..5 {
        fs::chmod(c.on(round, "f"), mode(0o644))?;
        as_user(USER, &[], || {
            same!(std::fs::read(c.on(round + 1, "f"))?, b"secret", "bytes");
            Ok(())
        })?;
        fs::chmod(c.on(round, "f"), mode(0o600))?;
        as_user(USER, &[], || fails_with(File::open(c.on(round + 1, "f")), &[Errno::ACCESS], "open after chmod 0600"))?;
    }
    Ok(())
}

fn only_the_owner_may_change(c: &Context) -> Result<()> {
    c.open_to_all()?;
    File::create(c.a("f"))?;
    fs::chmod(c.a("f"), mode(0o666))?;
    as_user(USER, &[], || {
        fails_with(fs::chmod(c.b("f"), mode(0o777)), &[Errno::PERM], "chmod of another's file")?;
        fails_with(chown(c.b("f"), Some(USER), None), &[Errno::PERM], "chown of another's file")?;
        fails_with(
            fs::utimensat(CWD, c.b("f"), &stamps((1, 1), (1, 1)), AtFlags::empty()),
            &[Errno::PERM],
            "utimens of another's file",
        )?;
        File::create(c.b("mine"))?;
        fails_with(chown(c.c("mine"), Some(OTHER_USER), None), &[Errno::PERM], "giving a file away")?;
        let m = metadata(c.a("mine"))?;
        same!((m.uid(), m.gid()), (USER, USER), "owner of a new file");
        Ok(())
    })
}

fn access_tells_permissions(c: &Context) -> Result<()> {
    c.open_to_all()?;
    File::create(c.a("f"))?;
    fs::chmod(c.a("f"), mode(0o644))?;
    as_user(USER, &[], || {
        fs::accessat(CWD, c.b("f"), fs::Access::READ_OK, AtFlags::empty())?;
        fs::accessat(CWD, c.b("f"), fs::Access::READ_OK, AtFlags::EACCESS)?;
        fails_with(fs::access(c.b("f"), fs::Access::WRITE_OK), &[Errno::ACCESS], "access W_OK")?;
        fails_with(fs::access(c.b("f"), fs::Access::EXEC_OK), &[Errno::ACCESS], "access X_OK")?;
        fails_with(fs::access(c.b("none"), fs::Access::EXISTS), &[Errno::NOENT], "access of nothing")
    })?;
    fails_with(fs::access(c.b("f"), fs::Access::EXEC_OK), &[Errno::ACCESS], "access X_OK by root without any x bit")
}

fn sticky_directory_protects(c: &Context) -> Result<()> {
    c.open_to_all()?;
    std::fs::create_dir(c.a("d"))?;
    fs::chmod(c.a("d"), mode(0o1777))?;
    as_user(USER, &[], || Ok(std::fs::write(c.a("d/mine"), b"x")?))?;
    as_user(OTHER_USER, &[], || {
        fails_with(std::fs::remove_file(c.b("d/mine")), &[Errno::PERM, Errno::ACCESS], "unlink in a sticky directory")?;
        fails_with(
            std::fs::rename(c.b("d/mine"), c.b("d/yours")),
            &[Errno::PERM, Errno::ACCESS],
            "rename in a sticky directory",
        )
    })?;
    as_user(USER, &[], || Ok(std::fs::remove_file(c.c("d/mine"))?))
}

fn umask_applies(c: &Context) -> Result<()> {
    let old = rustix::process::umask(mode(0o027));
    let made = (|| -> Result<()> {
        fs::open(c.a("f"), OFlags::CREATE | OFlags::WRONLY, mode(0o666))?;
        fs::mkdir(c.a("d"), mode(0o777))?;
        fs::mknodat(CWD, c.a("p"), fs::FileType::Fifo, mode(0o666), 0)?;
        Ok(())
    })();
    rustix::process::umask(old);
    made?;
    for (name, bits) in [("f", 0o640), ("d", 0o750), ("p", 0o640)] {
        same!(metadata(c.b(name))?.mode() & 0o7777, bits, "mode of {name}");
    }
    Ok(())
}

fn setgid_directory_gives_its_group(c: &Context) -> Result<()> {
    need_root()?;
    c.open_to_all()?;
    std::fs::create_dir(c.a("d"))?;
    chown(c.a("d"), None, Some(GROUP))?;
    fs::chmod(c.a("d"), mode(0o2777))?;
    as_user(USER, &[], || {
        File::create(c.b("d/f"))?;
        Ok(std::fs::create_dir(c.b("d/sub"))?)
    })?;
    same!(metadata(c.c("d/f"))?.gid(), GROUP, "group of a new file");
    same!(metadata(c.c("d/sub"))?.gid(), GROUP, "group of a new directory");
    same!(metadata(c.c("d/sub"))?.mode() & 0o2000, 0o2000, "setgid bit of a new directory");
    Ok(())
}

fn supplementary_groups_count(c: &Context) -> Result<()> {
    need_root()?;
    c.open_to_all()?;
    std::fs::write(c.a("f"), b"for the group")?;
    chown(c.a("f"), None, Some(GROUP))?;
    fs::chmod(c.a("f"), mode(0o640))?;
    as_user(USER, &[GROUP], || {
        same!(std::fs::read(c.b("f"))?, b"for the group", "bytes");
        Ok(())
    })?;
    as_user(USER, &[], || fails_with(File::open(c.b("f")), &[Errno::ACCESS], "open outside the group"))
}

fn statfs_is_sane(c: &Context) -> Result<()> {
    for mount in 0..3 {
        let s = fs::statvfs(&*c.on(mount, ""))?;
        ensure!(s.f_bsize >= 512 && s.f_frsize >= 512, "block sizes {} and {}", s.f_bsize, s.f_frsize);
        ensure!(
            s.f_blocks > 0 && s.f_bfree <= s.f_blocks && s.f_bavail <= s.f_bfree,
            "blocks {}, free {}, available {}",
            s.f_blocks,
            s.f_bfree,
            s.f_bavail
        );
        ensure!(s.f_namemax == 255, "longest name {}", s.f_namemax);
    }
    Ok(())
}

/// Set, and skip where the file system has no such attributes at all.
fn set(path: &Path, name: &str, value: &[u8], flags: XattrFlags) -> Result<()> {
    match fs::setxattr(path, name, value, flags) {
        Err(Errno::OPNOTSUPP) => skip(format!("no extended attributes ({name})")),
        other => other.with_context(|| format!("setxattr {name}")),
    }
}

fn get(path: &Path, name: &str) -> std::result::Result<Vec<u8>, Errno> {
    let mut value = vec![0; 65536];
    let n = fs::getxattr(path, name, &mut value[..])?;
    value.truncate(n);
    Ok(value)
}

fn list(path: &Path) -> Result<Vec<String>> {
    let mut bytes = vec![0u8; 65536];
    let n = fs::listxattr(path, &mut bytes[..])?;
    let mut names: Vec<String> = bytes[..n]
        .split(|b| *b == 0)
        .filter(|n| !n.is_empty())
        .map(|n| String::from_utf8_lossy(n).into_owned())
        .filter(|n| n.starts_with("user."))
        .collect();
    names.sort();
    Ok(names)
}

fn xattr_seen_everywhere(c: &Context) -> Result<()> {
    File::create(c.a("f"))?;
    for round in 0..6 {
        let value = format!("value {round}");
        set(&c.on(round, "f"), "user.colour", value.as_bytes(), XattrFlags::empty())?;
        for seen in 0..3 {
            same!(get(&c.on(seen, "f"), "user.colour")?, value.as_bytes(), "value through mount {seen}");
        }
    }
    same!(list(&c.b("f"))?, ["user.colour"], "names");
    fs::removexattr(c.b("f"), "user.colour")?;
    for seen in 0..3 {
        fails_with(get(&c.on(seen, "f"), "user.colour"), &[Errno::NODATA], "getxattr after removal")?;
        same!(list(&c.on(seen, "f"))?.len(), 0, "names after removal");
    }
    fails_with(fs::removexattr(c.a("f"), "user.colour"), &[Errno::NODATA], "removing it again")
}

fn xattr_create_and_replace(c: &Context) -> Result<()> {
    File::create(c.a("f"))?;
    set(&c.a("f"), "user.probe", b"1", XattrFlags::empty())?;
    fails_with(
        fs::setxattr(c.b("f"), "user.probe", b"2", XattrFlags::CREATE),
        &[Errno::EXIST],
        "XATTR_CREATE of an existing one",
    )?;
    fails_with(
        fs::setxattr(c.b("f"), "user.none", b"2", XattrFlags::REPLACE),
        &[Errno::NODATA],
        "XATTR_REPLACE of a missing one",
    )?;
    fs::setxattr(c.b("f"), "user.probe", b"3", XattrFlags::REPLACE)?;
    fs::setxattr(c.b("f"), "user.new", b"4", XattrFlags::CREATE)?;
    same!(get(&c.c("f"), "user.probe")?, b"3", "value");
    same!(list(&c.c("f"))?, ["user.new", "user.probe"], "names");
    Ok(())
}

fn xattr_sizes(c: &Context) -> Result<()> {
    File::create(c.a("f"))?;
    set(&c.a("f"), "user.five", b"12345", XattrFlags::empty())?;
    same!(verbfs_harness::sys::xattr_size(&c.b("f"), "user.five")?, 5, "size asked with an empty buffer");
    let mut small = [0u8; 3];
    fails_with(fs::getxattr(c.b("f"), "user.five", &mut small[..]), &[Errno::RANGE], "getxattr into a small buffer")?;
    set(&c.b("f"), "user.empty", b"", XattrFlags::empty())?;
    same!(get(&c.c("f"), "user.empty")?.len(), 0, "size of an empty value");
    let long = format!("user.{}", "n".repeat(250));
    set(&c.b("f"), &long, b"long", XattrFlags::empty())?;
    same!(get(&c.c("f"), &long)?, b"long", "value under a name of 255 bytes");
    let longer = format!("user.{}", "n".repeat(251));
    fails_with(fs::setxattr(c.b("f"), longer, b"x", XattrFlags::empty()), &[Errno::RANGE], "a name of 256 bytes")
}

fn xattr_64_kib(c: &Context) -> Result<()> {
    File::create(c.a("f"))?;
    let value: Vec<u8> = (0..65536u32).map(|i| (i * 7 % 251) as u8).collect();
    match fs::setxattr(c.a("f"), "user.large", &value, XattrFlags::empty()) {
        Err(e @ (Errno::NOSPC | Errno::TOOBIG | Errno::OPNOTSUPP)) => return skip(format!("64 KiB values: {e}")),
        other => other?,
    }
    ensure!(get(&c.b("f"), "user.large")? == value, "the value differs");
    fs::removexattr(c.c("f"), "user.large")?;
    fails_with(get(&c.a("f"), "user.large"), &[Errno::NODATA], "getxattr after removal")
}

fn xattr_many(c: &Context) -> Result<()> {
    File::create(c.a("f"))?;
    let mut names = Vec::new();
    for n in 0..60 {
        let name = format!("user.attribute{n:03}");
        set(&c.on(n, "f"), &name, name.as_bytes(), XattrFlags::CREATE)?;
        names.push(name);
    }
    for seen in 0..3 {
        same!(list(&c.on(seen, "f"))?, names, "names through mount {seen}");
        for name in &names {
            same!(get(&c.on(seen, "f"), name)?, name.as_bytes(), "value of {name}");
        }
    }
    Ok(())
}

fn xattr_of_directory_and_others(c: &Context) -> Result<()> {
    std::fs::create_dir(c.a("d"))?;
    set(&c.a("d"), "user.d", b"directory", XattrFlags::empty())?;
    same!(get(&c.b("d"), "user.d")?, b"directory", "value");
    std::os::unix::fs::symlink("d", c.a("s"))?;
    same!(get(&c.b("s"), "user.d")?, b"directory", "value through a symbolic link");
    fails_with(
        fs::lsetxattr(c.b("s"), "user.s", b"x", XattrFlags::empty()),
        &[Errno::PERM],
        "user attribute of a symbolic link",
    )?;
    need_root()?;
    set(&c.a("d"), "trusted.t", b"root", XattrFlags::empty())?;
    same!(get(&c.b("d"), "trusted.t")?, b"root", "trusted value");
    Ok(())
}

/// Version, then entries of tag, permissions and id: the kernel's form of an ACL.
fn acl(entries: &[(u16, u16, u32)]) -> Vec<u8> {
    let mut bytes = 2u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(permissions.to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}

const NOBODY: u32 = u32::MAX;
const OWNER: u16 = 1;
const NAMED_USER: u16 = 2;
const OWNING_GROUP: u16 = 4;
const MASK: u16 = 0x10;
const OTHERS: u16 = 0x20;
const ACCESS_ACL: &str = "system.posix_acl_access";
const DEFAULT_ACL: &str = "system.posix_acl_default";

fn acl_for_user(permissions: u16, mask: u16) -> Vec<u8> {
    acl(&[
        (OWNER, 6, NOBODY),
        (NAMED_USER, permissions, USER),
        (OWNING_GROUP, 0, NOBODY),
        (MASK, mask, NOBODY),
        (OTHERS, 0, NOBODY),
    ])
}

fn acl_grants_named_user(c: &Context) -> Result<()> {
    c.open_to_all()?;
    std::fs::write(c.a("f"), b"named")?;
    fs::chmod(c.a("f"), mode(0o600))?;
    set(&c.a("f"), ACCESS_ACL, &acl_for_user(4, 4), XattrFlags::empty())?;
    same!(get(&c.b("f"), ACCESS_ACL)?, acl_for_user(4, 4), "the ACL");
    same!(metadata(c.b("f"))?.mode() & 0o777, 0o640, "mode shows the mask");
    as_user(USER, &[], || {
        same!(std::fs::read(c.b("f"))?, b"named", "bytes");
        fails_with(File::options().write(true).open(c.c("f")), &[Errno::ACCESS], "open for writing")
    })?;
    as_user(OTHER_USER, &[], || fails_with(File::open(c.b("f")), &[Errno::ACCESS], "open by somebody else"))?;
    fs::removexattr(c.c("f"), ACCESS_ACL)?;
    as_user(USER, &[], || fails_with(File::open(c.b("f")), &[Errno::ACCESS], "open after the ACL was removed"))
}

fn acl_mask_follows_chmod(c: &Context) -> Result<()> {
    c.open_to_all()?;
    std::fs::write(c.a("f"), b"masked")?;
    set(&c.a("f"), ACCESS_ACL, &acl_for_user(6, 6), XattrFlags::empty())?;
    fs::chmod(c.b("f"), mode(0o600))?;
    same!(get(&c.c("f"), ACCESS_ACL)?, acl_for_user(6, 0), "the ACL after chmod 0600");
    as_user(USER, &[], || fails_with(File::open(c.a("f")), &[Errno::ACCESS], "open under an empty mask"))?;
    fs::chmod(c.c("f"), mode(0o640))?;
    as_user(USER, &[], || {
        same!(std::fs::read(c.b("f"))?, b"masked", "bytes");
        Ok(())
    })
}

fn acl_default_is_inherited(c: &Context) -> Result<()> {
    c.open_to_all()?;
    std::fs::create_dir(c.a("d"))?;
    fs::chmod(c.a("d"), mode(0o755))?;
    let default = acl(&[
        (OWNER, 7, NOBODY),
        (NAMED_USER, 5, USER),
        (OWNING_GROUP, 5, NOBODY),
        (MASK, 5, NOBODY),
        (OTHERS, 0, NOBODY),
    ]);
    set(&c.a("d"), DEFAULT_ACL, &default, XattrFlags::empty())?;
    // With a default ACL the umask does not count.
    let old = rustix::process::umask(mode(0o077));
    let made = std::fs::write(c.b("d/f"), b"inherited").and_then(|()| std::fs::create_dir(c.b("d/sub")));
    rustix::process::umask(old);
    made?;
    same!(get(&c.c("d/sub"), DEFAULT_ACL)?, default, "default ACL of a new subdirectory");
    same!(metadata(c.c("d/f"))?.mode() & 0o777, 0o640, "mode of a new file");
    as_user(USER, &[], || {
        same!(std::fs::read(c.a("d/f"))?, b"inherited", "bytes");
        Ok(())
    })?;
    as_user(OTHER_USER, &[], || fails_with(File::open(c.a("d/f")), &[Errno::ACCESS], "open by somebody else"))
}
