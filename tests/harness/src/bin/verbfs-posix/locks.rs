//! fcntl, open-file-description and flock locks across mounts: conflict, waiting, wake-up, signals, death, deadlock.

use crate::support::*;
use crate::{checks, same};
use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal as Sig, sigaction};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use std::fs::File;
use std::os::unix::fs::FileExt;
use verbfs_harness::clock::now;
use verbfs_harness::sys::{ChildEnd, fcntl_lock, record};

checks! {
    fcntl_write_lock_excludes, fcntl_read_locks_are_shared, fcntl_ranges_split_and_merge, fcntl_upgrade_and_downgrade,
    fcntl_getlk_tells_the_holder, fcntl_waiting_lock_is_granted, fcntl_waiting_readers_are_all_granted, fcntl_close_releases,
    fcntl_exit_releases, fcntl_killed_holder_releases, fcntl_killed_waiter_is_forgotten, fcntl_wait_is_interrupted, fcntl_interrupted_wait_holds_nothing,
    fcntl_deadlock_is_found, fcntl_deadlock_of_three_has_one_victim, fcntl_ordered_locking_is_no_deadlock, fcntl_child_inherits_nothing, fcntl_needs_a_fitting_handle, fcntl_lock_to_the_end_of_all_files,
    fcntl_locks_are_of_the_file, fcntl_locked_counter_is_exact, ofd_locks_exclude, flock_excludes, flock_waiting_is_granted,
    flock_is_of_the_open_file, flock_killed_holder_releases, flock_wait_is_interrupted, flock_upgrade, flock_locked_counter_is_exact, locks_hand_over_quickly,
}

fn open(c: &Context, mount: usize) -> Result<File> {
    File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(c.on(mount, "f"))
        .with_context(|| format!("open through mount {mount}"))
}

fn set(file: &File, kind: i32, start: u64, len: u64) -> std::io::Result<()> {
    fcntl_lock(file, libc::F_SETLK, &mut record(kind, start, len))
}

fn wait(file: &File, kind: i32, start: u64, len: u64) -> std::io::Result<()> {
    fcntl_lock(file, libc::F_SETLKW, &mut record(kind, start, len))
}

const READ: i32 = libc::F_RDLCK;
const WRITE: i32 = libc::F_WRLCK;
const UNLOCK: i32 = libc::F_UNLCK;
const REFUSED: &[Errno] = &[Errno::AGAIN, Errno::ACCESS];

/// Another process holds a lock until told otherwise.
struct Holder {
    task: Task,
    release: Signal,
    pid: i32,
}

impl Holder {
    fn start(c: &Context, mount: usize, take: impl FnOnce(&File) -> Result<()>) -> Result<Self> {
        let (held, release) = (Signal::new()?, Signal::new()?);
        let mut task = Task::start(|| {
            let file = open(c, mount)?;
            let taken = take(&file);
            held.send()?;
            taken?;
            release.wait()
        })?;
        held.wait()?;
        let pid = task.process().pid.as_raw();
        Ok(Self { task, release, pid })
    }

    fn fcntl(c: &Context, mount: usize, kind: i32, start: u64, len: u64) -> Result<Self> {
        Self::start(c, mount, |file| Ok(wait(file, kind, start, len)?))
    }

    fn release(self) -> Result<()> {
        self.release.send()?;
        self.task.join()
    }
}

/// In a process of its own through `mount`: is the lock refused?
fn refused(c: &Context, mount: usize, kind: i32, start: u64, len: u64) -> Result<bool> {
    let mut task = Task::start(|| {
        let file = open(c, mount)?;
        match set(&file, kind, start, len) {
            Ok(()) => Ok(()),
            Err(e) if [Some(libc::EAGAIN), Some(libc::EACCES)].contains(&e.raw_os_error()) => {
                std::process::exit(33);
            }
            Err(e) => Err(e.into()),
        }
    })?;
    match task.process().wait(TASK_LIMIT) {
        ChildEnd::Exited(0) => Ok(false),
        ChildEnd::Exited(33) => Ok(true),
        end => bail!("F_SETLK through mount {mount}: {end:?}"),
    }
}

fn expect_refused(
    c: &Context,
    expected: bool,
    mount: usize,
    kind: i32,
    start: u64,
    len: u64,
    what: &str,
) -> Result<()> {
    same!(refused(c, mount, kind, start, len)?, expected, "refused: {what}, mount {mount}, {start}+{len}");
    Ok(())
}

fn fcntl_write_lock_excludes(c: &Context) -> Result<()> {
    for mount in 0..3 {
        let holder = Holder::fcntl(c, mount, WRITE, 100, 50)?;
        for other in 0..3 {
            expect_refused(c, true, other, WRITE, 100, 50, "same range")?;
            expect_refused(c, true, other, READ, 149, 1, "last byte")?;
            expect_refused(c, true, other, WRITE, 0, 0, "whole file")?;
            expect_refused(c, false, other, WRITE, 0, 100, "range before")?;
            expect_refused(c, false, other, WRITE, 150, 10, "range behind")?;
        }
        holder.release()?;
        expect_refused(c, false, mount + 1, WRITE, 0, 0, "after release")?;
    }
    Ok(())
}

fn fcntl_read_locks_are_shared(c: &Context) -> Result<()> {
    let one = Holder::fcntl(c, 0, READ, 0, 100)?;
    let two = Holder::fcntl(c, 1, READ, 50, 100)?;
    expect_refused(c, false, 2, READ, 0, 0, "a reader")?;
    expect_refused(c, true, 2, WRITE, 60, 1, "a writer")?;
    one.release()?;
    expect_refused(c, true, 0, WRITE, 60, 1, "a writer, one reader left")?;
    expect_refused(c, false, 0, WRITE, 0, 50, "a writer of the free part")?;
    two.release()?;
    expect_refused(c, false, 0, WRITE, 0, 0, "a writer, no reader left")
}

fn fcntl_ranges_split_and_merge(c: &Context) -> Result<()> {
    let holder = Holder::start(c, 0, |file| {
        set(file, WRITE, 0, 100)?;
        set(file, UNLOCK, 40, 20)?;
        set(file, READ, 80, 40)?;
        set(file, WRITE, 200, 10)?;
        Ok(set(file, WRITE, 210, 10)?)
    })?;
    for (refusal, kind, start, len) in [
        (true, READ, 0, 1),
        (true, READ, 39, 1),
        (false, WRITE, 40, 20),
        (true, READ, 60, 1),
        (true, READ, 79, 1),
        (false, READ, 80, 40),
        (true, WRITE, 119, 1),
        (false, WRITE, 120, 80),
        (true, READ, 219, 1),
        (false, WRITE, 220, 0),
    ] {
        expect_refused(c, refusal, 1, kind, start, len, "parts")?;
    }
    holder.release()
}

fn fcntl_upgrade_and_downgrade(c: &Context) -> Result<()> {
    let file = open(c, 0)?;
    set(&file, READ, 0, 10)?;
    set(&file, WRITE, 0, 10)?;
    expect_refused(c, true, 1, READ, 0, 10, "after upgrade")?;
    set(&file, READ, 0, 10)?;
    expect_refused(c, false, 1, READ, 0, 10, "after downgrade")?;
    let reader = Holder::fcntl(c, 2, READ, 5, 1)?;
    fails_with(set(&file, WRITE, 0, 10), REFUSED, "upgrade beside another reader")?;
    expect_refused(c, true, 1, WRITE, 0, 1, "the read lock after a refused upgrade")?;
    reader.release()?;
    Ok(set(&file, WRITE, 0, 10)?)
}

fn fcntl_getlk_tells_the_holder(c: &Context) -> Result<()> {
    let holder = Holder::fcntl(c, 1, WRITE, 30, 20)?;
    for mount in 0..3 {
        let mut lock = record(READ, 0, 0);
        fcntl_lock(open(c, mount)?, libc::F_GETLK, &mut lock)?;
        same!(
            (lock.l_type as i32, lock.l_start, lock.l_len),
            (WRITE, 30, 20),
            "the conflicting lock through mount {mount}"
        );
        same!(lock.l_pid, holder.pid, "its holder through mount {mount}");
        let mut lock = record(READ, 0, 30);
        fcntl_lock(open(c, mount)?, libc::F_GETLK, &mut lock)?;
        same!(lock.l_type as i32, UNLOCK, "a free range through mount {mount}");
    }
    holder.release()
}

/// Start a waiter, see that it waits, release, see that it is granted.
fn waits_then_granted(holder: Holder, mut waiter: Task) -> Result<()> {
    settle();
    ensure!(waiter.running(), "the waiter did not wait");
    holder.release()?;
    waiter.join().context("the waiter after release")
}

fn fcntl_waiting_lock_is_granted(c: &Context) -> Result<()> {
    for (mine, theirs, kind) in [(0, 1, WRITE), (1, 2, READ), (2, 2, WRITE)] {
        let holder = Holder::fcntl(c, mine, WRITE, 0, 10)?;
        let waiter = Task::start(|| Ok(wait(&open(c, theirs)?, kind, 5, 10)?))?;
        waits_then_granted(holder, waiter)?;
    }
    Ok(())
}

fn fcntl_waiting_readers_are_all_granted(c: &Context) -> Result<()> {
    let holder = Holder::fcntl(c, 0, WRITE, 0, 0)?;
    // All readers hold the lock at the same time: each waits for the others before it leaves.
    let (arrived, leave) = (Signal::new()?, Signal::new()?);
    let mut readers = Vec::new();
    for n in 0..5 {
        let (arrived, leave) = (&arrived, &leave);
        readers.push(Task::start(move || {
            wait(&open(c, n)?, READ, 0, 0)?;
            arrived.send()?;
            leave.wait()
        })?);
    }
    settle();
    holder.release()?;
    for _ in 0..5 {
        arrived.wait()?;
    }
    for _ in 0..5 {
        leave.send()?;
    }
    readers.into_iter().try_for_each(Task::join)
}

/// POSIX: closing any handle of the file drops all the process's locks on it.
fn fcntl_close_releases(c: &Context) -> Result<()> {
    let (file, other) = (open(c, 0)?, open(c, 0)?);
    set(&file, WRITE, 0, 10)?;
    expect_refused(c, true, 1, WRITE, 0, 10, "while open")?;
    drop(other);
    expect_refused(c, false, 1, WRITE, 0, 10, "after another handle closed")?;
    set(&file, WRITE, 0, 10)?;
    drop(file);
    expect_refused(c, false, 2, WRITE, 0, 10, "after the handle closed")
}

fn fcntl_exit_releases(c: &Context) -> Result<()> {
    let mut holder = Holder::fcntl(c, 0, WRITE, 0, 10)?;
    holder.release.send()?;
    same!(holder.task.process().wait(TASK_LIMIT), ChildEnd::Exited(0), "end of the holder");
    expect_refused(c, false, 1, WRITE, 0, 10, "right after the holder's exit was collected")
}

fn fcntl_killed_holder_releases(c: &Context) -> Result<()> {
    let mut holder = Holder::fcntl(c, 0, WRITE, 0, 10)?;
    let mut waiter = Task::start(|| Ok(wait(&open(c, 1)?, WRITE, 0, 10)?))?;
    settle();
    ensure!(waiter.running(), "the waiter did not wait");
    holder.task.process().signal(Sig::SIGKILL);
    waiter.join().context("the waiter after the holder was killed")?;
    holder.task.process().wait(TASK_LIMIT);
    expect_refused(c, false, 2, WRITE, 0, 10, "after all ended")
}

fn fcntl_killed_waiter_is_forgotten(c: &Context) -> Result<()> {
    let holder = Holder::fcntl(c, 0, WRITE, 0, 10)?;
    let mut waiter = Task::start(|| Ok(wait(&open(c, 1)?, WRITE, 0, 10)?))?;
    settle();
    waiter.process().signal(Sig::SIGKILL);
    same!(waiter.process().wait(TASK_LIMIT), ChildEnd::Killed(libc::SIGKILL), "end of the killed waiter");
    holder.release()?;
    expect_refused(c, false, 2, WRITE, 0, 10, "after the holder released; a dead waiter must not get it")
}

extern "C" fn do_nothing(_: i32) {}

fn handle_sigint() -> Result<()> {
    let action = SigAction::new(SigHandler::Handler(do_nothing), SaFlags::empty(), SigSet::empty());
    // SAFETY: the handler does nothing, which is safe at any time.
    unsafe { sigaction(Sig::SIGINT, &action)? };
    Ok(())
}

/// Start `waiting` in a process, interrupt it while it waits, and let it report.
fn interrupted(waiting: impl FnOnce() -> Result<()>) -> Result<Task> {
    let mut task = Task::start(|| {
        handle_sigint()?;
        waiting()
    })?;
    settle();
    ensure!(task.running(), "the waiter did not wait");
    task.process().signal(Sig::SIGINT);
    Ok(task)
}

fn fcntl_wait_is_interrupted(c: &Context) -> Result<()> {
    for mount in 0..3 {
        let holder = Holder::fcntl(c, 0, WRITE, 0, 10)?;
        let task = interrupted(|| {
            fails_with(wait(&open(c, mount)?, WRITE, 0, 10), &[Errno::INTR], "F_SETLKW interrupted by SIGINT")
        })?;
        task.join()?;
        holder.release()?;
    }
    Ok(())
}

fn fcntl_interrupted_wait_holds_nothing(c: &Context) -> Result<()> {
    let holder = Holder::fcntl(c, 0, WRITE, 0, 10)?;
    let (done, leave) = (Signal::new()?, Signal::new()?);
    let task = interrupted(|| {
        let file = open(c, 1)?;
        let result = wait(&file, WRITE, 0, 10);
        done.send()?;
        fails_with(result, &[Errno::INTR], "F_SETLKW interrupted by SIGINT")?;
        leave.wait()
    })?;
    done.wait()?;
    holder.release()?;
    expect_refused(c, false, 2, WRITE, 0, 10, "after an interrupted wait and the holder's release")?;
    leave.send()?;
    task.join()
}

/// So many processes, each on the next mount, wait in a ring; the last wait closes it. One must be told EDEADLK, the others granted.
fn deadlocked_ring(c: &Context, size: u64) -> Result<()> {
    let ready: Vec<Signal> = (0..size).map(|_| Signal::new()).collect::<Result<_>>()?;
    let (found, granted) = (Signal::new()?, Signal::new()?);
    let tasks: Vec<Task> = (0..size)
        .map(|n| {
            let (ready, found, granted) = (&ready, &found, &granted);
            Task::start(move || {
                let file = open(c, n as usize)?;
                set(&file, WRITE, n * 10, 10)?;
                // One for each of the others.
                (1..size).try_for_each(|_| ready[n as usize].send())?;
                for other in 1..size {
                    ready[((n + other) % size) as usize].wait()?;
                }
                match wait(&file, WRITE, (n + 1) % size * 10, 10) {
                    Ok(()) => granted.send(),
                    Err(e) if e.raw_os_error() == Some(libc::EDEADLK) => found.send(),
                    Err(e) => Err(e.into()),
                }
            })
        })
        .collect::<Result<_>>()?;
    found.wait()?;
    for _ in 1..size {
        granted.wait()?;
    }
    tasks.into_iter().try_for_each(Task::join)
}

fn fcntl_deadlock_is_found(c: &Context) -> Result<()> {
    deadlocked_ring(c, 2)
}

fn fcntl_deadlock_of_three_has_one_victim(c: &Context) -> Result<()> {
    (0..10).try_for_each(|_| deadlocked_ring(c, 3))
}

/// Whoever locks in one order cannot deadlock, however often waits come and go while somebody looks for cycles.
fn fcntl_ordered_locking_is_no_deadlock(c: &Context) -> Result<()> {
    const FILES: usize = 5;
    const ROUNDS: u64 = 150;
    for index in 0..FILES {
        // Homes differ from directory to directory.
        std::fs::create_dir(c.a(&format!("d{index}")))?;
        File::create(c.a(&format!("d{index}/f")))?;
    }
    let worker = |number: u64| -> Result<()> {
        let mut rng = verbfs_harness::rng::Rng::new(number + 1);
        let files: Vec<File> = (0..FILES)
            .map(|index| {
                let path = c.on(number as usize % 3, &format!("d{index}/f"));
                Ok(File::options().read(true).write(true).open(path)?)
            })
            .collect::<Result<_>>()?;
        for round in 0..ROUNDS {
            let chosen: Vec<&File> = files.iter().filter(|_| rng.percent(50)).collect();
            for file in &chosen {
                wait(file, WRITE, 0, 0).with_context(|| format!("round {round}: a lock in ascending order"))?;
            }
            for file in chosen.iter().rev() {
                set(file, UNLOCK, 0, 0)?;
            }
        }
        Ok(())
    };
    let worker = &worker;
    together(
        (0..6).map(|number| -> Box<dyn FnOnce() -> Result<()> + '_> { Box::new(move || worker(number)) }).collect(),
    )
}

fn fcntl_child_inherits_nothing(c: &Context) -> Result<()> {
    let file = open(c, 0)?;
    set(&file, WRITE, 0, 10)?;
    Task::start(|| fails_with(set(&file, WRITE, 0, 10), REFUSED, "a child's lock on its parent's range"))?.join()?;
    expect_refused(c, true, 1, WRITE, 0, 10, "the parent's lock after the child's end")
}

fn fcntl_needs_a_fitting_handle(c: &Context) -> Result<()> {
    drop(open(c, 0)?);
    let reading = File::open(c.b("f"))?;
    let writing = File::options().write(true).open(c.b("f"))?;
    fails_with(set(&reading, WRITE, 0, 1), &[Errno::BADF], "a write lock on a read-only handle")?;
    fails_with(set(&writing, READ, 0, 1), &[Errno::BADF], "a read lock on a write-only handle")?;
    set(&reading, READ, 0, 1)?;
    Ok(set(&writing, WRITE, 5, 1)?)
}

fn fcntl_lock_to_the_end_of_all_files(c: &Context) -> Result<()> {
    let holder = Holder::fcntl(c, 0, WRITE, 1000, 0)?;
    expect_refused(c, true, 1, READ, i64::MAX as u64 - 1, 1, "the last byte there can be")?;
    expect_refused(c, true, 2, READ, 1000, 1, "the first byte")?;
    expect_refused(c, false, 2, WRITE, 0, 1000, "before it")?;
    holder.release()
}

/// Names come and go, the locks stay with the file.
fn fcntl_locks_are_of_the_file(c: &Context) -> Result<()> {
    let holder = Holder::fcntl(c, 0, WRITE, 0, 10)?;
    std::fs::hard_link(c.b("f"), c.b("g"))?;
    std::fs::rename(c.c("f"), c.c("h"))?;
    expect_refused(c, false, 1, WRITE, 0, 10, "a new file of the old name")?;
    std::fs::rename(c.a("g"), c.a("f"))?;
    expect_refused(c, true, 1, WRITE, 0, 10, "the file under its other name")?;
    holder.release()
}

fn counter(
    c: &Context,
    take: impl Fn(&File) -> Result<()> + Copy,
    give: impl Fn(&File) -> Result<()> + Copy,
) -> Result<()> {
    const ROUNDS: u64 = 60;
    const PROCESSES: usize = 6;
    open(c, 0)?.write_all_at(&0u64.to_le_bytes(), 0)?;
    let bodies = (0..PROCESSES)
        .map(|n| {
            Box::new(move || {
                let file = open(c, n)?;
                for _ in 0..ROUNDS {
                    take(&file)?;
                    let mut bytes = [0; 8];
                    file.read_exact_at(&mut bytes, 0)?;
                    let next = u64::from_le_bytes(bytes) + 1;
                    file.write_all_at(&next.to_le_bytes(), 0)?;
                    give(&file)?;
                }
                Ok(())
            }) as Box<dyn FnOnce() -> Result<()>>
        })
        .collect();
    together(bodies)?;
    let mut bytes = [0; 8];
    open(c, 1)?.read_exact_at(&mut bytes, 0)?;
    same!(u64::from_le_bytes(bytes), ROUNDS * PROCESSES as u64, "increments under the lock");
    Ok(())
}

fn fcntl_locked_counter_is_exact(c: &Context) -> Result<()> {
    counter(c, |f| Ok(wait(f, WRITE, 0, 8)?), |f| Ok(set(f, UNLOCK, 0, 8)?))
}

fn ofd_locks_exclude(c: &Context) -> Result<()> {
    let ofd = |file: &File, kind: i32| fcntl_lock(file, libc::F_OFD_SETLK, &mut record(kind, 0, 10));
    let files: Vec<File> = (0..3).map(|m| open(c, m)).collect::<Result<_>>()?;
    match ofd(&files[0], WRITE) {
        Err(e) if matches!(e.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP | libc::ENOSYS)) => {
            return skip(format!("no open-file-description locks: {e}"));
        }
        other => other?,
    }
    // Within one process, too: the holder is the open file.
    fails_with(ofd(&files[1], READ), REFUSED, "the same through another mount")?;
    fails_with(ofd(&open(c, 0)?, READ), REFUSED, "the same through another handle")?;
    expect_refused(c, true, 2, WRITE, 0, 10, "a record lock of another process")?;
    ofd(&files[0], UNLOCK)?;
    ofd(&files[1], WRITE)?;
    drop(files);
    ofd(&open(c, 2)?, WRITE).context("after all handles closed")
}

const EXCLUSIVE_NOW: FlockOperation = FlockOperation::NonBlockingLockExclusive;
const SHARED_NOW: FlockOperation = FlockOperation::NonBlockingLockShared;

fn flock_excludes(c: &Context) -> Result<()> {
    for mount in 0..3 {
        let holder = open(c, mount)?;
        // Waiting: the last round's holder was closed a moment ago, see below.
        flock(&holder, FlockOperation::LockExclusive)?;
        for other in 0..3 {
            fails_with(flock(open(c, other)?, SHARED_NOW), &[Errno::AGAIN], "LOCK_SH beside LOCK_EX")?;
            fails_with(flock(open(c, other)?, EXCLUSIVE_NOW), &[Errno::AGAIN], "LOCK_EX beside LOCK_EX")?;
        }
        flock(&holder, FlockOperation::Unlock)?;
        let (one, two) = (open(c, mount + 1)?, open(c, mount + 2)?);
        flock(&one, SHARED_NOW)?;
        flock(&two, SHARED_NOW)?;
        fails_with(flock(&holder, EXCLUSIVE_NOW), &[Errno::AGAIN], "LOCK_EX beside two LOCK_SH")?;
        drop(one);
        fails_with(flock(&holder, EXCLUSIVE_NOW), &[Errno::AGAIN], "LOCK_EX beside LOCK_SH")?;
        drop(two);
        // FUSE tells of a last close when it has happened: the lock is free soon after, not before close returns.
        flock(&holder, FlockOperation::LockExclusive).context("LOCK_EX after all others closed")?;
    }
    Ok(())
}

fn flock_waiting_is_granted(c: &Context) -> Result<()> {
    for (mine, theirs) in [(0, 1), (1, 2), (2, 2)] {
        let holder = Holder::start(c, mine, |file| Ok(flock(file, EXCLUSIVE_NOW)?))?;
        let waiter = Task::start(|| Ok(flock(open(c, theirs)?, FlockOperation::LockExclusive)?))?;
        waits_then_granted(holder, waiter)?;
    }
    Ok(())
}

fn flock_is_of_the_open_file(c: &Context) -> Result<()> {
    let file = open(c, 0)?;
    flock(&file, EXCLUSIVE_NOW)?;
    let copy = file.try_clone()?;
    drop(file);
    fails_with(flock(open(c, 1)?, EXCLUSIVE_NOW), &[Errno::AGAIN], "LOCK_EX while a duplicate is open")?;
    // A child shares the open file: it can unlock for the parent.
    Task::start(|| Ok(flock(&copy, FlockOperation::Unlock)?))?.join()?;
    flock(open(c, 1)?, EXCLUSIVE_NOW).context("LOCK_EX after a child unlocked")
}

fn flock_killed_holder_releases(c: &Context) -> Result<()> {
    let mut holder = Holder::start(c, 0, |file| Ok(flock(file, EXCLUSIVE_NOW)?))?;
    let mut waiter = Task::start(|| Ok(flock(open(c, 1)?, FlockOperation::LockExclusive)?))?;
    settle();
    ensure!(waiter.running(), "the waiter did not wait");
    holder.task.process().signal(Sig::SIGKILL);
    waiter.join().context("the waiter after the holder was killed")
}

fn flock_wait_is_interrupted(c: &Context) -> Result<()> {
    let holder = Holder::start(c, 0, |file| Ok(flock(file, EXCLUSIVE_NOW)?))?;
    let task = interrupted(|| {
        let result = flock(open(c, 1)?, FlockOperation::LockExclusive);
        fails_with(result, &[Errno::INTR], "flock interrupted by SIGINT")
    })?;
    task.join()?;
    holder.release()?;
    flock(open(c, 2)?, EXCLUSIVE_NOW).context("LOCK_EX after an interrupted waiter and the holder's release")
}

fn flock_upgrade(c: &Context) -> Result<()> {
    let file = open(c, 0)?;
    flock(&file, SHARED_NOW)?;
    flock(&file, EXCLUSIVE_NOW)?;
    fails_with(flock(open(c, 1)?, SHARED_NOW), &[Errno::AGAIN], "LOCK_SH after the upgrade")?;
    flock(&file, SHARED_NOW)?;
    flock(open(c, 1)?, SHARED_NOW).context("LOCK_SH after the downgrade")
}

fn flock_locked_counter_is_exact(c: &Context) -> Result<()> {
    counter(c, |f| Ok(flock(f, FlockOperation::LockExclusive)?), |f| Ok(flock(f, FlockOperation::Unlock)?))
}

/// A lock that somebody waits for is handed over by an event, not by polling: tens of milliseconds would be polling.
fn locks_hand_over_quickly(c: &Context) -> Result<()> {
    const TURNS: usize = 60;
    let begun = now();
    let bodies = (0..2usize)
        .map(|n| {
            Box::new(move || {
                let file = open(c, n)?;
                for _ in 0..TURNS {
                    wait(&file, WRITE, 0, 1)?;
                    std::thread::sleep(std::time::Duration::from_micros(200));
                    set(&file, UNLOCK, 0, 1)?;
                }
                Ok(())
            }) as Box<dyn FnOnce() -> Result<()>>
        })
        .collect();
    together(bodies)?;
    let each = (now() - begun) / (2 * TURNS as u64);
    ensure!(each < 50_000_000, "a hand-over takes {} ms", each / 1_000_000);
    Ok(())
}
