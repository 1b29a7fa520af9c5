//! From a recorded history to a verdict that a person can read.

use crate::history::{Call, Op};
use crate::linearize::{Model, Timed, Verdict, check};
use crate::model::data::{DataModel, DataOp, FileState};
use crate::model::locks::{LockModel, LockOp};
use crate::model::names::{NameModel, NameOp, Seen};
use crate::model::words::{WordModel, WordOp};
use crate::rng::Rng;
use std::collections::BTreeMap;

use super::{DIRECTORIES, NAMES};

/// What the checker found over all objects of a history.
#[derive(Debug, Default)]
pub struct Report {
    /// Calls checked.
    pub calls: usize,
    /// Calls that overlapped the call before them: without these nothing is tested.
    pub overlapping: usize,
    /// Calls that overlapped an earlier one of another mount.
    pub across_mounts: usize,
    /// The largest number of configurations the search held.
    pub configurations: usize,
    /// One text for each object whose history is impossible, or undecided.
    pub failures: Vec<String>,
}

/// At most so many lines of a window are printed.
const WINDOW_LINES: usize = 60;

struct Object<M: Model> {
    name: String,
    model: M,
    initial: M::State,
    calls: Vec<(Timed<M::Op>, Call)>,
}

fn judge<M: Model>(object: Object<M>, report: &mut Report, show: impl Fn(&M::State) -> String) {
    let Object { name, model, initial, mut calls } = object;
    calls.sort_by_key(|c| c.0.start);
    let history: Vec<Timed<M::Op>> = calls.iter().map(|c| c.0.clone()).collect();
    match check(&model, &initial, &history) {
        Verdict::Linearizable { configurations } => report.configurations = report.configurations.max(configurations),
        Verdict::Undecided { at, configurations } => report.failures.push(format!(
            "{name}: UNDECIDED, more than {configurations} configurations at\n  {}",
            calls[at].1.line(calls[0].1.start)
        )),
        Verdict::Rejected(r) => {
            let culprit = &calls[r.call].1;
            let origin = culprit.start;
            let mut text = format!(
                "{name}: NOT LINEARIZABLE\n  No order of the calls explains:\n  {}\n  Certain before the window: {}\n",
                culprit.line(origin),
                show(&r.before)
            );
            let from = r.window.len().saturating_sub(WINDOW_LINES);
            text += &format!(
                "  The window (times in microseconds around that call; {} calls, {from} not shown):\n",
                r.window.len()
            );
            for &w in &r.window[from..] {
                let mark = if w == r.call { ">>" } else { "  " };
                text += &format!("{mark}{}\n", calls[w].1.line(origin));
            }
            text += "  States possible just before that call returned (it may still change them):\n";
            for state in &r.possible {
                text += &format!("    {}\n", show(state));
            }
            report.failures.push(text);
        }
    }
}

/// Check a history that began with empty files, no names, no locks and zero words.
pub fn verdict(calls: &[Call], clients: usize) -> Report {
    let mut report = Report { calls: calls.len(), ..Report::default() };
    let mut order: Vec<&Call> = calls.iter().collect();
    order.sort_by_key(|c| c.start);
    let mut latest: BTreeMap<u32, u64> = BTreeMap::new();
    for call in &order {
        report.overlapping += latest.values().any(|end| call.start <= *end) as usize;
        report.across_mounts += latest.iter().any(|(m, end)| *m != call.mount && call.start <= *end) as usize;
        let latest = latest.entry(call.mount).or_default();
        *latest = (*latest).max(call.end.unwrap_or(u64::MAX));
    }

    let mut files: BTreeMap<u32, Vec<(Timed<DataOp>, Call)>> = BTreeMap::new();
    let mut words: BTreeMap<u64, Vec<(Timed<WordOp>, Call)>> = BTreeMap::new();
    let mut names: Vec<(Timed<NameOp>, Call)> = Vec::new();
    let mut locks: BTreeMap<bool, Vec<(Timed<LockOp>, Call)>> = BTreeMap::new();
    for call in order {
        fn timed<O>(call: &Call, op: O) -> (Timed<O>, Call) {
            (Timed { start: call.start, end: call.end, op }, call.clone())
        }
        match &call.op {
            Op::Data { file, op } => files.entry(*file).or_default().push(timed(call, op.clone())),
            Op::Word { word, op } => words.entry(*word).or_default().push(timed(call, op.clone())),
            Op::Name(NameOp::Readdir { listed, .. }) => {
                for &(slot, there) in listed {
                    let seen = if there { Seen::Present } else { Seen::Absent };
                    names.push(timed(call, NameOp::See { slot, seen, how: "readdir".to_owned() }));
                }
            }
            Op::Name(op) => names.push(timed(call, op.clone())),
            Op::Lock { flock, op } => locks.entry(*flock).or_default().push(timed(call, op.clone())),
            Op::Unexpected { .. } => {
                report.failures.push(format!("an impossible result:\n  {}", call.line(call.start)))
            }
        }
    }
    for (file, calls) in files {
        let object = Object { name: format!("file{file}"), model: DataModel, initial: FileState::default(), calls };
        judge(object, &mut report, |s| format!("size {} {}", s.size(), crate::history::runs(&s.read(0, u64::MAX))));
    }
    for (word, calls) in words {
        let object = Object { name: format!("word{word}"), model: WordModel, initial: 0, calls };
        judge(object, &mut report, |s| crate::history::tag(*s));
    }
    if !names.is_empty() {
        let initial = vec![None; DIRECTORIES * NAMES];
        let object = Object { name: "names".to_owned(), model: NameModel, initial, calls: names };
        judge(object, &mut report, |s| {
            let all: Vec<String> =
                s.iter().enumerate().filter_map(|(n, t)| t.map(|t| format!("name{n}={t:?}"))).collect();
            all.join(" ")
        });
    }
    for (flock, calls) in locks {
        let name = if flock { "flock" } else { "fcntl locks" }.to_owned();
        let object = Object { name, model: LockModel, initial: LockModel::initial(clients), calls };
        judge(object, &mut report, |s| {
            let rows: Vec<String> = s
                .iter()
                .enumerate()
                .map(|(c, row)| format!("client{c}:{}", row.map(|m| ["-", "r", "W"][m as usize]).concat()))
                .collect();
            rows.join(" ")
        });
    }
    report
}

/// Turn one recorded read into one that returns bytes overwritten before it began. The result cannot be linearizable.
///
/// Returns a line that tells what was changed, or `None` if the history holds no fitting read.
pub fn inject_stale_read(calls: &mut [Call], rng: &mut Rng) -> Option<String> {
    let end = |c: &Call| c.end.unwrap_or(u64::MAX);
    let readers: Vec<usize> = (0..calls.len())
        .filter(|&i| {
            matches!(&calls[i].op, Op::Data { op: DataOp::Read { .. }, .. } | Op::Word { op: WordOp::Load { .. }, .. })
        })
        .collect();
    if readers.is_empty() {
        return None;
    }
    let first = rng.below(readers.len() as u64) as usize;
    for k in 0..readers.len() {
        let reader = readers[(first + k) % readers.len()];
        let before = calls[reader].line(calls[reader].start);
        let changed = match &calls[reader].op {
            Op::Word { word, .. } => {
                let stores: Vec<(&Call, u32)> = calls
                    .iter()
                    .filter_map(|c| match &c.op {
                        Op::Word { word: w, op: WordOp::Store { tag, .. } } if w == word => Some((c, *tag)),
                        _ => None,
                    })
                    .collect();
                let overwriting = stores.iter().filter(|s| end(s.0) < calls[reader].start).max_by_key(|s| s.0.start);
                let stale = overwriting
                    .and_then(|over| stores.iter().filter(|s| end(s.0) < over.0.start).max_by_key(|s| s.0.start))
                    .map(|s| s.1);
                let (word, via) = (*word, crate::model::words::Via::Mapping);
                stale.map(|tag| Op::Word { word, op: WordOp::Load { tag, via } })
            }
            Op::Data { file, op: DataOp::Read { offset, len, got } } => {
                // The first word read carries the tag of a pwrite; an earlier pwrite that this one covered there is stale.
                let covering: Vec<(&Call, u32)> = calls
                    .iter()
                    .filter_map(|c| match &c.op {
                        Op::Data { file: f, op: DataOp::Write { offset: o, len: l, tag } }
                            if f == file && o <= offset && offset + 8 <= o + l =>
                        {
                            Some((c, *tag))
                        }
                        _ => None,
                    })
                    .collect();
                let seen = got.first().and_then(|g| covering.iter().find(|c| c.1 == g.1));
                let stale = seen
                    .filter(|seen| end(seen.0) < calls[reader].start)
                    .and_then(|seen| covering.iter().filter(|c| end(c.0) < seen.0.start).max_by_key(|c| c.0.start));
                stale.map(|stale| {
                    let mut runs = Vec::new();
                    crate::pattern::push(&mut runs, 8, stale.1);
                    let mut skip = 8;
                    for &(length, tag) in got {
                        let cut = length.min(skip);
                        skip -= cut;
                        crate::pattern::push(&mut runs, length - cut, tag);
                    }
                    Op::Data { file: *file, op: DataOp::Read { offset: *offset, len: *len, got: runs } }
                })
            }
            _ => None,
        };
        if let Some(op) = changed {
            calls[reader].op = op;
            let after = calls[reader].line(calls[reader].start);
            return Some(format!("injected a stale read:\n  was {before}\n  is  {after}"));
        }
    }
    None
}
