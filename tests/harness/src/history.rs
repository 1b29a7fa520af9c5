//! Calls with start and end, in a form that is saved, read back and printed.

use crate::model::data::DataOp;
use crate::model::locks::{LockOp, Mode, Outcome};
use crate::model::names::NameOp;
use crate::model::words::{Via, WordOp};
use crate::pattern::{GARBAGE, Run, ZERO};
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::Path;

/// What a call was applied to, the call, and its result.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Op {
    /// On file number `file`.
    Data { file: u32, op: DataOp },
    /// On a word of the mapped file, by its number.
    Word { word: u64, op: WordOp },
    /// On names.
    Name(NameOp),
    /// On advisory locks: `fcntl` or `flock`.
    Lock { flock: bool, op: LockOp },
    /// A call that failed in a way no model allows, or wrote less than it was given.
    Unexpected { what: String },
}

/// One call of one client.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Call {
    /// The client process, by number.
    pub client: u32,
    /// The mount it went through.
    pub mount: u32,
    /// [`crate::clock::now`] just before.
    pub start: u64,
    /// [`crate::clock::now`] just after; `None` when the client was stopped meanwhile.
    pub end: Option<u64>,
    /// What was done.
    pub op: Op,
}

/// Write a history as one line of JSON for each call.
pub fn save(path: &Path, calls: &[Call]) -> Result<()> {
    let mut out = BufWriter::new(std::fs::File::create(path).with_context(|| format!("create {}", path.display()))?);
    for call in calls {
        serde_json::to_writer(&mut out, call)?;
        out.write_all(b"\n")?;
    }
    Ok(out.flush()?)
}

/// Read what [`save`] wrote.
pub fn load(path: &Path) -> Result<Vec<Call>> {
    let file = std::fs::File::open(path).with_context(|| format!("open {}", path.display()))?;
    BufReader::new(file)
        .lines()
        .enumerate()
        .map(|(n, line)| serde_json::from_str(&line?).with_context(|| format!("line {} of {}", n + 1, path.display())))
        .collect()
}

/// A tag as people read it: client and number of its write.
pub fn tag(tag: u32) -> String {
    match tag {
        ZERO => "zeros".to_owned(),
        GARBAGE => "GARBAGE".to_owned(),
        _ => format!("w{}.{}", tag >> 24, tag & 0xFF_FFFF),
    }
}

/// Stretches as people read them.
pub fn runs(runs: &[Run]) -> String {
    let parts: Vec<String> = runs.iter().map(|(len, t)| format!("{len}*{}", tag(*t))).collect();
    format!("[{}]", parts.join(" "))
}

fn error(result: i32) -> String {
    match result {
        0 => "ok".to_owned(),
        _ => format!("{:?}", nix::errno::Errno::from_raw(result)),
    }
}

impl std::fmt::Display for Op {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Op::Data { file, op } => match op {
                DataOp::Read { offset, len, got } => write!(f, "file{file} pread({offset}, {len}) = {}", runs(got)),
                DataOp::Write { offset, len, tag: t } => write!(f, "file{file} pwrite({offset}, {len}) of {}", tag(*t)),
                DataOp::Append { len, tag: t } => write!(f, "file{file} append({len}) of {}", tag(*t)),
                DataOp::Truncate { size } => write!(f, "file{file} ftruncate({size})"),
                DataOp::Punch { offset, len } => write!(f, "file{file} punch_hole({offset}, {len})"),
                DataOp::Size { size, by_name } => {
                    write!(f, "file{file} {} size = {size}", if *by_name { "stat" } else { "fstat" })
                }
            },
            Op::Word { word, op } => {
                let (what, t, via) = match op {
                    WordOp::Load { tag, via } => ("load =", tag, via),
                    WordOp::Store { tag, via } => ("store of", tag, via),
                };
                write!(f, "word{word} {}{what} {}", if *via == Via::Call { "pread/pwrite " } else { "" }, tag(*t))
            }
            Op::Name(op) => match op {
                NameOp::See { slot, seen, how } => write!(f, "{how} name{slot} = {seen:?}"),
                NameOp::Make { slot, thing, result } => write!(f, "make name{slot} as {thing:?} = {}", error(*result)),
                NameOp::OpenCreate { slot, inode, result } => {
                    write!(f, "open(O_CREAT) name{slot} = {} inode {inode}", error(*result))
                }
                NameOp::Unlink { slot, result } => write!(f, "unlink name{slot} = {}", error(*result)),
                NameOp::Rmdir { slot, result } => write!(f, "rmdir name{slot} = {}", error(*result)),
                NameOp::Link { from, to, result } => write!(f, "link name{from} name{to} = {}", error(*result)),
                NameOp::Rename { from, to, kind, result } => {
                    write!(f, "rename {kind:?} name{from} name{to} = {}", error(*result))
                }
                NameOp::Readdir { directory, listed } => {
                    let names: Vec<String> =
                        listed.iter().filter(|l| l.1).map(|(slot, _)| format!("name{slot}")).collect();
                    write!(f, "readdir dir{directory} = [{}]", names.join(" "))
                }
            },
            Op::Lock { flock, op } => {
                let call = if *flock { "flock" } else { "fcntl" };
                let mode = match op.mode {
                    Mode::Free => "unlock",
                    Mode::Shared => "shared",
                    Mode::Exclusive => "exclusive",
                };
                let outcome = match op.outcome {
                    Outcome::Granted => "granted",
                    Outcome::GrantedBlocking => "granted (waiting)",
                    Outcome::Refused => "refused",
                    Outcome::WouldGrant => "F_GETLK: free",
                    Outcome::WouldRefuse => "F_GETLK: conflict",
                };
                write!(f, "{call} {mode} units {}..{} = {outcome}", op.from, op.to)
            }
            Op::Unexpected { what } => write!(f, "UNEXPECTED {what}"),
        }
    }
}

impl Call {
    /// The call in one line, times in microseconds after `origin`.
    pub fn line(&self, origin: u64) -> String {
        let micro = |t: u64| (t as i64 - origin as i64) as f64 / 1000.0;
        let end = self.end.map_or("never".to_owned(), |t| format!("{:.1}", micro(t)));
        format!("{:>12.1} .. {:>12}  client {} mount {}  {}", micro(self.start), end, self.client, self.mount, self.op)
    }
}
