//! A few names in a few directories, as the kernel's VFS shows them over a server whose look-ups and operations are
//! each linearizable.
//!
//! Most calls on names ask the server once in a way that matters, and take effect at one instant:
//! - `stat`, `open`, `readlink`: the look-up decides. What happens to the name afterwards is not theirs.
//! - `open(O_EXCL)`, `mkdir`, `symlink`, `unlink`, `rmdir`: a failure may come from the kernel's look-up or from the
//!   operation, a success from the operation: in any case one instant explains the result.
//!
//! Two calls do not, and the model takes exactly the steps the kernel takes:
//! - `rename(A, B)`: look up A (absent: ENOENT); look up B (with NOREPLACE present: EEXIST; with EXCHANGE absent: ENOENT);
//!   if both look-ups gave one inode, succeed without asking further; compare kinds (ENOTDIR, EISDIR); then
//!   the operation proper, by name, which may find other inodes there than the look-ups did, and repeats all these tests.
//!   So a rename may report ENOENT because A was absent when looked up, though it was there a moment later, and
//!   it may do nothing, successfully, because another client renamed A to B between its two look-ups. Where a name stands for
//!   a directory that another mount has moved, a look-up during a rename may say ESTALE (Linux `__d_unalias`): nothing happened.
//! - `link(A, B)`: look up A (absent: ENOENT); look up B (present: EEXIST); then the operation on *the inode looked up*, which
//!   needs a name still (else ENOENT) and B absent (else EEXIST).
//!
//! `open(O_CREAT)` without O_EXCL takes effect at one instant as well. A server that is asked to create where a directory or
//! symbolic link has appeared since the look-up must say EISDIR, or ESTALE, on which the kernel starts anew; EEXIST would
//! reach the caller and is rejected here.
//!
//! `readdir` gives no snapshot: each name is judged by itself. A name that exists all the time must be listed, one that
//! is absent all the time must not. The history is split into one observer for each name before it comes here.
//!
//! Inode numbers identify files. Where a file system uses numbers again (ext4 does), two files may be taken
//! for one, which can only make the check more lenient in practice.

use crate::linearize::{Model, Step};
use serde::{Deserialize, Serialize};

/// Error numbers the model knows; all others are unexpected.
pub mod errno {
    pub const ENOENT: i32 = libc::ENOENT;
    pub const EEXIST: i32 = libc::EEXIST;
    pub const EISDIR: i32 = libc::EISDIR;
    pub const ENOTDIR: i32 = libc::ENOTDIR;
    pub const EINVAL: i32 = libc::EINVAL;
}
use errno::*;

/// A place for a name, counted through all directories.
pub type Slot = usize;

/// What a name stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Thing {
    /// A regular file, by inode number.
    File(u64),
    /// A directory, always empty, by a number of the call that made it.
    Directory(u64),
    /// A symbolic link, by its target.
    Link(u64),
}

/// What an observer saw under a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Seen {
    /// Nothing.
    Absent,
    /// Something (`readdir` tells no more).
    Present,
    /// The regular file with this inode number.
    File(u64),
    /// Some directory.
    Directory,
    /// Some symbolic link.
    Link,
    /// The symbolic link with this target.
    LinkTo(u64),
    /// Something that is not a symbolic link (EINVAL of `readlink`).
    NotLink,
}

/// Flags of `renameat2`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RenameKind {
    Plain,
    NoReplace,
    Exchange,
}

/// A call on names. `result` is the error number, 0 for success.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum NameOp {
    /// `stat`, `open`, `readlink`, or one name of a `readdir`.
    See { slot: Slot, seen: Seen, how: String },
    /// A new thing under a name that must be free: `open(O_CREAT|O_EXCL)`, `mkdir`, `symlink`.
    Make { slot: Slot, thing: Thing, result: i32 },
    /// `open(O_CREAT)` without O_EXCL: the inode opened, whether new or there before.
    OpenCreate { slot: Slot, inode: u64, result: i32 },
    /// `unlink`.
    Unlink { slot: Slot, result: i32 },
    /// `rmdir`.
    Rmdir { slot: Slot, result: i32 },
    /// `link(from, to)`; a symbolic link is not followed.
    Link { from: Slot, to: Slot, result: i32 },
    /// `renameat2(from, to)`.
    Rename { from: Slot, to: Slot, kind: RenameKind, result: i32 },
    /// `readdir` of one directory: for each of its slots whether it was listed.
    Readdir { directory: usize, listed: Vec<(Slot, bool)> },
}

/// How far a `rename` or `link` has come.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub enum Come {
    /// Nothing looked up yet.
    #[default]
    Start,
    /// The first name looked up.
    Source(Thing),
    /// `rename`: both looked up, the operation is on its way.
    Sent,
    /// `link`: both looked up, the operation on this inode is on its way.
    SentFor(Thing),
}

/// The names: what each slot holds.
pub type NameState = Vec<Option<Thing>>;

/// The specification of all names together: `rename` and `link` tie them to one another.
pub struct NameModel;

impl NameModel {
    fn kinds_fit(kind: RenameKind, source: Thing, target: Option<Thing>) -> Result<(), i32> {
        let directory = |t: Thing| matches!(t, Thing::Directory(_));
        match target {
            Some(target) if kind != RenameKind::Exchange => match (directory(source), directory(target)) {
                (true, false) => Err(ENOTDIR),
                (false, true) => Err(EISDIR),
                _ => Ok(()),
            },
            _ => Ok(()),
        }
    }

    /// The tests that look-ups and operation have in common: `Ok(true)` when there is nothing to do.
    fn rename_tests(kind: RenameKind, source: Option<Thing>, target: Option<Thing>) -> Result<bool, i32> {
        let source = source.ok_or(ENOENT)?;
        match kind {
            RenameKind::NoReplace if target.is_some() => return Err(EEXIST),
            RenameKind::Exchange if target.is_none() => return Err(ENOENT),
            _ => {}
        }
        if target == Some(source) {
            return Ok(true);
        }
        Self::kinds_fit(kind, source, target)?;
        Ok(false)
    }

    fn rename(
        state: &NameState,
        from: Slot,
        to: Slot,
        kind: RenameKind,
        result: i32,
        come: &Come,
    ) -> Vec<Step<NameState, Come>> {
        let done_if = |good: bool| if good { vec![Step::Done(state.clone())] } else { vec![] };
        // A look-up that finds a directory where this kernel does not have it may fail while another rename is under
        // way on the same mount: the kernel would have to take that rename's lock to move its own entry.
        let moved_directory = |slot: Slot| result == libc::ESTALE && matches!(state[slot], Some(Thing::Directory(_)));
        match come {
            Come::Start if moved_directory(from) => done_if(true),
            Come::Source(_) if moved_directory(to) => done_if(true),
            Come::Start => match state[from] {
                None => done_if(result == ENOENT),
                Some(thing) => vec![Step::More(state.clone(), Come::Source(thing))],
            },
            Come::Source(source) => match Self::rename_tests(kind, Some(*source), state[to]) {
                Err(error) => done_if(result == error),
                Ok(true) => done_if(result == 0),
                Ok(false) => vec![Step::More(state.clone(), Come::Sent)],
            },
            Come::Sent | Come::SentFor(_) => match Self::rename_tests(kind, state[from], state[to]) {
                Err(error) => done_if(result == error),
                Ok(_) if result != 0 => vec![],
                Ok(true) => vec![Step::Done(state.clone())],
                Ok(false) => {
                    let mut next = state.clone();
                    next[to] = state[from];
                    next[from] = if kind == RenameKind::Exchange { state[to] } else { None };
                    vec![Step::Done(next)]
                }
            },
        }
    }

    fn link(state: &NameState, from: Slot, to: Slot, result: i32, come: &Come) -> Vec<Step<NameState, Come>> {
        let done_if = |good: bool| if good { vec![Step::Done(state.clone())] } else { vec![] };
        match come {
            Come::Start => match state[from] {
                None => done_if(result == ENOENT),
                Some(thing) => vec![Step::More(state.clone(), Come::Source(thing))],
            },
            Come::Source(_) if state[to].is_some() => done_if(result == EEXIST),
            // Directories have no second name; the kernel says so after both look-ups.
            Come::Source(Thing::Directory(_)) => done_if(result == libc::EPERM),
            Come::Source(thing) => vec![Step::More(state.clone(), Come::SentFor(*thing))],
            Come::SentFor(thing) => {
                let mut steps = Vec::new();
                let named = state.contains(&Some(*thing));
                // The order of the server's two tests is its own business.
                if (result == EEXIST && state[to].is_some()) || (result == ENOENT && !named) {
                    steps.push(Step::Done(state.clone()));
                }
                if result == 0 && named && state[to].is_none() {
                    let mut next = state.clone();
                    next[to] = Some(*thing);
                    steps.push(Step::Done(next));
                }
                steps
            }
            Come::Sent => vec![],
        }
    }
}

impl Model for NameModel {
    type State = NameState;
    type Op = NameOp;
    type Local = Come;

    fn step(&self, state: &NameState, op: &NameOp, come: &Come) -> Vec<Step<NameState, Come>> {
        let same = || vec![Step::Done(state.clone())];
        let changed = |slot: Slot, value: Option<Thing>| {
            let mut next = state.clone();
            next[slot] = value;
            vec![Step::Done(next)]
        };
        // As in `rename`: the look-up of a moved directory.
        let looked_up: &[Slot] = match op {
            NameOp::Make { slot, result: libc::ESTALE, .. }
            | NameOp::OpenCreate { slot, result: libc::ESTALE, .. }
            | NameOp::Unlink { slot, result: libc::ESTALE }
            | NameOp::Rmdir { slot, result: libc::ESTALE } => &[*slot],
            NameOp::Link { from, to, result: libc::ESTALE } => &[*from, *to],
            _ => &[],
        };
        if !looked_up.is_empty() {
            let moved = looked_up.iter().any(|slot| matches!(state[*slot], Some(Thing::Directory(_))));
            return if moved { same() } else { vec![] };
        }
        match op {
            NameOp::See { slot, seen, .. } => {
                let right = match (state[*slot], *seen) {
                    (None, Seen::Absent) => true,
                    (None, _) | (Some(_), Seen::Absent) => false,
                    (Some(_), Seen::Present) => true,
                    (Some(Thing::File(a)), Seen::File(b)) => a == b,
                    (Some(Thing::Directory(_)), Seen::Directory) => true,
                    (Some(Thing::Link(_)), Seen::Link) => true,
                    (Some(Thing::Link(a)), Seen::LinkTo(b)) => a == b,
                    (Some(Thing::File(_) | Thing::Directory(_)), Seen::NotLink) => true,
                    _ => false,
                };
                if right { same() } else { vec![] }
            }
            NameOp::Make { slot, thing, result } => match (state[*slot], *result) {
                (None, 0) => changed(*slot, Some(*thing)),
                (Some(_), EEXIST) => same(),
                _ => vec![],
            },
            NameOp::OpenCreate { slot, inode, result } => match (state[*slot], *result) {
                (None, 0) => changed(*slot, Some(Thing::File(*inode))),
                (Some(Thing::File(there)), 0) if there == *inode => same(),
                (Some(Thing::Directory(_)), EISDIR) => same(),
                (Some(Thing::Link(_)), libc::ELOOP) => same(),
                _ => vec![],
            },
            NameOp::Unlink { slot, result } => match (state[*slot], *result) {
                (None, ENOENT) | (Some(Thing::Directory(_)), EISDIR) => same(),
                (Some(Thing::File(_) | Thing::Link(_)), 0) => changed(*slot, None),
                _ => vec![],
            },
            NameOp::Rmdir { slot, result } => match (state[*slot], *result) {
                (None, ENOENT) | (Some(Thing::File(_) | Thing::Link(_)), ENOTDIR) => same(),
                (Some(Thing::Directory(_)), 0) => changed(*slot, None),
                _ => vec![],
            },
            NameOp::Link { from, to, result } => Self::link(state, *from, *to, *result, come),
            NameOp::Rename { from, to, kind, result } => Self::rename(state, *from, *to, *kind, *result, come),
            NameOp::Readdir { .. } => unreachable!("a readdir is split into its names before it is checked"),
        }
    }

    fn is_observer(&self, op: &NameOp) -> bool {
        match op {
            NameOp::See { .. } => true,
            NameOp::Make { result, .. } | NameOp::Unlink { result, .. } | NameOp::Rmdir { result, .. } => *result != 0,
            _ => false,
        }
    }
}
