//! The checker is itself checked: it accepts what could have happened and rejects, one by one, what file systems get wrong.

use verbfs_harness::coherence::client::data_range;
use verbfs_harness::coherence::verdict::{Report, inject_stale_read, verdict};
use verbfs_harness::coherence::{DIRECTORIES, MAPPED_WORDS, NAMES};
use verbfs_harness::history::{Call, Op};
use verbfs_harness::linearize::{Model, Step};
use verbfs_harness::model::data::{DataOp, FileState};
use verbfs_harness::model::locks::{LockModel, LockOp, LockState, Mode, Outcome, UNITS};
use verbfs_harness::model::names::{Come, NameModel, NameOp, NameState, RenameKind, Seen, Thing};
use verbfs_harness::model::words::{Via, WordOp};
use verbfs_harness::rng::Rng;

const CLIENTS: u32 = 6;

fn call(client: u32, start: u64, end: u64, op: Op) -> Call {
    Call { client, mount: client % 3, start, end: Some(end), op }
}

fn data(client: u32, start: u64, end: u64, op: DataOp) -> Call {
    call(client, start, end, Op::Data { file: 0, op })
}

fn name(client: u32, start: u64, end: u64, op: NameOp) -> Call {
    call(client, start, end, Op::Name(op))
}

fn judge(calls: &[Call]) -> Report {
    verdict(calls, CLIENTS as usize)
}

#[track_caller]
fn accepted(calls: &[Call]) -> Report {
    let report = judge(calls);
    assert!(report.failures.is_empty(), "rejected: {}", report.failures.join("\n"));
    report
}

#[track_caller]
fn rejected(calls: &[Call]) -> String {
    let report = judge(calls);
    assert!(!report.failures.is_empty(), "accepted {calls:#?}");
    let text = report.failures.join("\n");
    assert!(text.contains(">>") && !text.contains("UNDECIDED"), "{text}");
    text
}

/// Intervals of `count` calls by [`CLIENTS`] clients, each with an instant in it; sorted by instant.
fn instants(rng: &mut Rng, count: usize) -> Vec<(u32, u64, u64, u64)> {
    let mut free = [0u64; CLIENTS as usize];
    let mut all: Vec<(u32, u64, u64, u64)> = (0..count)
        .map(|_| {
            let client = rng.below(CLIENTS as u64) as u32;
            let start = free[client as usize] + rng.between(1, 40) * 1000;
            let instant = start + rng.between(1, 60) * 1000 + rng.below(1000);
            let end = instant + rng.between(1, 60) * 1000;
            free[client as usize] = end;
            (client, start, instant, end)
        })
        .collect();
    all.sort_by_key(|c| c.2);
    all
}

fn data_history(seed: u64, count: usize) -> Vec<Call> {
    let mut rng = Rng::new(seed);
    let mut states = vec![FileState::default(); 3];
    let mut next = 0;
    instants(&mut rng.clone(), count)
        .into_iter()
        .map(|(client, start, _, end)| {
            let file = rng.below(3) as u32;
            let state = &mut states[file as usize];
            let (offset, len) = data_range(&mut rng, file, 1 << 20);
            next += 1;
            let tag = (client + 1) << 24 | next;
            let op = match rng.weighted(&[40, 25, 15, 5, 5, 10]) {
                0 => DataOp::Read { offset, len, got: state.read(offset, len) },
                1 => {
                    *state = state.write(offset, len, tag);
                    DataOp::Write { offset, len, tag }
                }
                2 => {
                    *state = state.write(state.size(), len.min(4096), tag);
                    DataOp::Append { len: len.min(4096), tag }
                }
                3 => {
                    *state = state.truncate(offset);
                    DataOp::Truncate { size: offset }
                }
                4 => {
                    *state = state.punch(offset, len);
                    DataOp::Punch { offset, len }
                }
                _ => DataOp::Size { size: state.size(), by_name: rng.percent(50) },
            };
            call(client, start, end, Op::Data { file, op })
        })
        .collect()
}

#[test]
fn accepts_generated_data_histories() {
    for seed in 0..5 {
        let begun = std::time::Instant::now();
        let report = accepted(&data_history(seed, 4000));
        assert!(report.overlapping > 2000, "the history hardly overlaps");
        assert!(begun.elapsed().as_secs() < 20, "{} configurations, {:?}", report.configurations, begun.elapsed());
    }
}

#[test]
fn rejects_every_injected_stale_read() {
    for seed in 0..20 {
        let mut calls = data_history(seed, 1500);
        calls.sort_by_key(|c| c.start);
        let line = inject_stale_read(&mut calls, &mut Rng::new(seed)).expect("some read can be made stale");
        let text = rejected(&calls);
        assert!(text.contains("pread"), "{line}\n{text}");
    }
}

#[test]
fn rejection_shows_a_short_window() {
    let mut calls = data_history(1, 3000);
    calls.sort_by_key(|c| c.start);
    inject_stale_read(&mut calls, &mut Rng::new(5)).expect("some read can be made stale");
    let text = rejected(&calls);
    assert!(text.lines().count() < 60, "{} lines:\n{text}", text.lines().count());
}

fn write(offset: u64, len: u64, tag: u32) -> DataOp {
    DataOp::Write { offset, len, tag }
}

fn read(offset: u64, len: u64, got: &[(u64, u32)]) -> DataOp {
    DataOp::Read { offset, len, got: got.to_vec() }
}

#[test]
fn a_read_beside_a_write_may_see_either_but_not_both() {
    let history = |one: &[(u64, u32)], two: &[(u64, u32)]| {
        vec![
            data(0, 1, 2, write(0, 64, 1)),
            data(0, 10, 100, write(0, 64, 2)),
            data(1, 20, 30, read(0, 64, one)),
            data(1, 40, 50, read(0, 64, two)),
        ]
    };
    accepted(&history(&[(64, 1)], &[(64, 1)]));
    accepted(&history(&[(64, 1)], &[(64, 2)]));
    accepted(&history(&[(64, 2)], &[(64, 2)]));
    rejected(&history(&[(64, 2)], &[(64, 1)]));
    rejected(&history(&[(32, 1), (32, 2)], &[(64, 2)]));
}

#[test]
fn rejects_a_stale_read() {
    rejected(&[data(0, 1, 2, write(0, 8, 1)), data(0, 3, 4, write(0, 8, 2)), data(1, 5, 6, read(0, 8, &[(8, 1)]))]);
}

#[test]
fn rejects_a_lost_append() {
    let append = |len, tag| DataOp::Append { len, tag };
    let both = [data(0, 1, 10, append(8, 1)), data(1, 2, 11, append(16, 2))];
    let seen = |got: &[(u64, u32)]| [both.to_vec(), vec![data(2, 20, 21, read(0, 100, got))]].concat();
    accepted(&seen(&[(8, 1), (16, 2)]));
    accepted(&seen(&[(16, 2), (8, 1)]));
    rejected(&seen(&[(16, 2)]));
    rejected(&seen(&[(8, 1), (8, 2)]));
}

#[test]
fn rejects_a_size_that_never_was() {
    let history = |size| {
        vec![
            data(0, 1, 2, write(0, 4096, 1)),
            data(0, 10, 20, write(4096, 4096, 2)),
            data(1, 11, 19, DataOp::Truncate { size: 100 }),
            data(2, 12, 18, DataOp::Size { size, by_name: true }),
        ]
    };
    for possible in [4096, 8192, 100] {
        accepted(&history(possible));
    }
    rejected(&history(4196));
    rejected(&history(0));
}

#[test]
fn rejects_bytes_that_come_back_after_truncation() {
    let calls = |got: &[(u64, u32)]| {
        vec![
            data(0, 1, 2, write(0, 64, 1)),
            data(1, 3, 4, DataOp::Truncate { size: 8 }),
            data(2, 5, 6, DataOp::Truncate { size: 64 }),
            data(0, 7, 8, read(0, 64, got)),
        ]
    };
    accepted(&calls(&[(8, 1), (56, 0)]));
    rejected(&calls(&[(64, 1)]));
}

#[test]
fn a_call_that_never_returned_may_count_or_not() {
    let calls = |tag| {
        let mut pending = data(0, 3, 4, write(0, 8, 2));
        pending.end = None;
        vec![data(0, 1, 2, write(0, 8, 1)), pending, data(1, 9, 10, read(0, 8, &[(8, tag)]))]
    };
    accepted(&calls(1));
    accepted(&calls(2));
    rejected(&calls(3));
}

#[test]
fn words_are_registers() {
    let word = |client, start, end, op| call(client, start, end, Op::Word { word: MAPPED_WORDS[1], op });
    let store = |tag| WordOp::Store { tag, via: Via::Mapping };
    let load = |tag| WordOp::Load { tag, via: Via::Call };
    accepted(&[word(0, 1, 10, store(1)), word(1, 2, 9, store(2)), word(2, 11, 12, load(1)), word(3, 13, 14, load(1))]);
    rejected(&[word(0, 1, 10, store(1)), word(1, 2, 9, store(2)), word(2, 11, 12, load(1)), word(3, 13, 14, load(2))]);
    rejected(&[word(0, 1, 2, store(1)), word(1, 3, 4, load(0))]);
}

fn make(slot: usize, inode: u64) -> NameOp {
    NameOp::Make { slot, thing: Thing::File(inode), result: 0 }
}

fn see(slot: usize, seen: Seen) -> NameOp {
    NameOp::See { slot, seen, how: "stat".to_owned() }
}

#[test]
fn rejects_a_name_seen_after_its_unlink() {
    let calls = |seen| {
        vec![
            name(0, 1, 2, make(0, 9)),
            name(0, 3, 4, NameOp::Unlink { slot: 0, result: 0 }),
            name(1, 5, 6, see(0, seen)),
        ]
    };
    accepted(&calls(Seen::Absent));
    rejected(&calls(Seen::File(9)));
}

#[test]
fn rejects_two_winners_of_an_exclusive_create() {
    rejected(&[name(0, 1, 10, make(0, 1)), name(1, 2, 9, make(0, 2))]);
}

#[test]
fn rejects_a_name_that_vanishes_during_replacement() {
    let calls = |seen| {
        vec![
            name(0, 1, 2, make(0, 1)),
            name(0, 3, 4, make(1, 2)),
            name(0, 5, 50, NameOp::Rename { from: 0, to: 1, kind: RenameKind::Plain, result: 0 }),
            name(1, 10, 20, see(1, seen)),
        ]
    };
    accepted(&calls(Seen::File(1)));
    accepted(&calls(Seen::File(2)));
    rejected(&calls(Seen::Absent));
}

#[test]
fn rename_and_link_see_what_two_look_ups_can_see() {
    let rename = |result| NameOp::Rename { from: 0, to: 1, kind: RenameKind::NoReplace, result };
    // The source is made during the rename: absent when looked up, or there.
    for result in [libc::ENOENT, 0] {
        accepted(&[name(0, 1, 10, rename(result)), name(1, 2, 9, make(0, 1))]);
    }
    // The target is there only after the source went: no order of look-ups sees both.
    let moved = NameOp::Rename { from: 0, to: 1, kind: RenameKind::Plain, result: 0 };
    let calls =
        |result| vec![name(0, 1, 2, make(0, 1)), name(1, 10, 20, moved.clone()), name(2, 11, 19, rename(result))];
    accepted(&calls(libc::ENOENT));
    // Source looked up before the other rename, target after it.
    accepted(&calls(libc::EEXIST));
    rejected(&[name(0, 1, 2, make(0, 1)), name(1, 3, 4, moved.clone()), name(2, 11, 19, rename(libc::EEXIST))]);
    // Both look-ups gave one inode: nothing to do, success.
    let plain = |start, end| name(2, start, end, moved.clone());
    accepted(&[name(0, 1, 2, make(0, 1)), name(1, 10, 20, moved.clone()), plain(11, 19)]);
    rejected(&[name(0, 1, 2, make(0, 1)), name(1, 3, 4, moved.clone()), plain(11, 19)]);
    // A link to a file that lost its last name during the call is refused; to one that has another name it is not.
    let link = |result| NameOp::Link { from: 0, to: 2, result };
    let gone = NameOp::Unlink { slot: 0, result: 0 };
    accepted(&[name(0, 1, 2, make(0, 1)), name(1, 10, 20, gone.clone()), name(2, 11, 19, link(libc::ENOENT))]);
    accepted(&[name(0, 1, 2, make(0, 1)), name(1, 10, 20, gone.clone()), name(2, 11, 19, link(0))]);
    rejected(&[name(0, 1, 2, make(0, 1)), name(1, 3, 4, gone), name(2, 11, 19, link(0))]);
}

#[test]
fn readdir_is_judged_name_by_name() {
    let list = |there: [bool; 2]| NameOp::Readdir { directory: 0, listed: vec![(0, there[0]), (1, there[1])] };
    // Name 0 exists throughout; name 1 is made during the scan.
    let calls = |there| vec![name(0, 1, 2, make(0, 1)), name(0, 10, 20, make(1, 2)), name(1, 5, 30, list(there))];
    accepted(&calls([true, false]));
    accepted(&calls([true, true]));
    rejected(&calls([false, true]));
    // A move during the scan may be seen as both names, or none.
    let moved = NameOp::Rename { from: 0, to: 1, kind: RenameKind::Plain, result: 0 };
    let calls = |there| vec![name(0, 1, 2, make(0, 1)), name(0, 10, 20, moved.clone()), name(1, 5, 30, list(there))];
    accepted(&calls([true, true]));
    accepted(&calls([false, false]));
}

/// Carry out a call completely in one state, for generators; `None` if its claimed result cannot be.
fn perform(state: &NameState, op: &NameOp) -> Option<NameState> {
    let mut come = Come::default();
    let mut state = state.clone();
    loop {
        match NameModel.step(&state, op, &come).into_iter().next()? {
            Step::Done(next) => return Some(next),
            Step::More(next, further) => (state, come) = (next, further),
        }
    }
}

fn name_history(seed: u64, count: usize) -> Vec<Call> {
    let mut rng = Rng::new(seed);
    let slots = DIRECTORIES * NAMES;
    let mut state: NameState = vec![None; slots];
    let mut next = 0;
    instants(&mut rng.clone(), count)
        .into_iter()
        .map(|(client, start, _, end)| {
            let slot = rng.below(slots as u64) as usize;
            let other = (slot + 1 + rng.below(slots as u64 - 1) as usize) % slots;
            next += 1;
            let choice = rng.weighted(&[20, 5, 10, 5, 10, 20, 30]);
            let kind = *rng.pick(&[RenameKind::Plain, RenameKind::NoReplace, RenameKind::Exchange]);
            let with = |result: i32| match choice {
                0 => NameOp::Make { slot, thing: Thing::File(next), result },
                1 => NameOp::Make { slot, thing: Thing::Directory(next), result },
                2 => NameOp::Unlink { slot, result },
                3 => NameOp::Rmdir { slot, result },
                4 => NameOp::Link { from: slot, to: other, result },
                5 => NameOp::Rename { from: slot, to: other, kind, result },
                _ => see(
                    slot,
                    match state[slot] {
                        None => Seen::Absent,
                        Some(Thing::File(inode)) => Seen::File(inode),
                        Some(Thing::Directory(_)) => Seen::Directory,
                        Some(Thing::Link(_)) => Seen::Link,
                    },
                ),
            };
            let results = [0, libc::ENOENT, libc::EEXIST, libc::EISDIR, libc::ENOTDIR, libc::EPERM];
            let (op, after) = results
                .into_iter()
                .find_map(|result| perform(&state, &with(result)).map(|after| (with(result), after)))
                .expect("every call has some result");
            state = after;
            call(client, start, end, Op::Name(op))
        })
        .collect()
}

#[test]
fn accepts_generated_name_histories_and_rejects_a_changed_one() {
    for seed in 0..5 {
        let mut calls = name_history(seed, 3000);
        let begun = std::time::Instant::now();
        accepted(&calls);
        assert!(begun.elapsed().as_secs() < 20, "{:?}", begun.elapsed());
        // A file that never was.
        let at = calls
            .iter()
            .position(|c| matches!(&c.op, Op::Name(NameOp::See { seen: Seen::File(_), .. })))
            .expect("some");
        if let Op::Name(NameOp::See { seen, .. }) = &mut calls[at].op {
            *seen = Seen::File(u64::MAX);
        }
        rejected(&calls);
    }
}

fn lock(client: u32, start: u64, end: u64, mode: Mode, outcome: Outcome) -> Call {
    call(client, start, end, Op::Lock { flock: false, op: LockOp { client, from: 1, to: 3, mode, outcome } })
}

#[test]
fn rejects_two_holders_and_unjustified_refusals() {
    use Mode::*;
    use Outcome::*;
    let grant = |client, start| lock(client, start, start + 1, Exclusive, Granted);
    let release = |client, start| lock(client, start, start + 1, Free, Granted);
    accepted(&[grant(0, 1), release(0, 3), grant(1, 5)]);
    rejected(&[grant(0, 1), grant(1, 3), release(0, 5)]);
    rejected(&[grant(0, 1), lock(1, 3, 4, Shared, GrantedBlocking), release(0, 5)]);
    accepted(&[grant(0, 1), lock(1, 3, 10, Shared, GrantedBlocking), release(0, 5)]);
    accepted(&[grant(0, 1), lock(1, 3, 4, Shared, Refused), release(0, 5)]);
    rejected(&[grant(0, 1), release(0, 3), lock(1, 5, 6, Shared, Refused)]);
    accepted(&[lock(0, 1, 2, Shared, Granted), lock(1, 3, 4, Shared, Granted)]);
    rejected(&[lock(0, 1, 2, Shared, Granted), lock(1, 3, 4, Shared, WouldRefuse)]);
}

#[test]
fn accepts_generated_lock_histories() {
    for seed in 0..5 {
        let mut rng = Rng::new(seed);
        let mut state: LockState = LockModel::initial(CLIENTS as usize);
        let calls: Vec<Call> = instants(&mut rng.clone(), 3000)
            .into_iter()
            .map(|(client, start, _, end)| {
                let from = rng.below(UNITS as u64) as usize;
                let to = rng.between(from as u64 + 1, UNITS as u64) as usize;
                let mode = *rng.pick(&[Mode::Free, Mode::Free, Mode::Shared, Mode::Exclusive]);
                let mut op = LockOp { client, from, to, mode, outcome: Outcome::Granted };
                if LockModel.step(&state, &op, &()).is_empty() {
                    op.outcome = Outcome::Refused;
                }
                for step in LockModel.step(&state, &op, &()) {
                    if let Step::Done(next) = step {
                        state = next;
                    }
                }
                call(client, start, end, Op::Lock { flock: false, op })
            })
            .collect();
        accepted(&calls);
    }
}

#[test]
fn histories_survive_saving() {
    let calls = data_history(3, 200);
    let path = std::env::temp_dir().join(format!("verbfs-harness-history-{}", std::process::id()));
    verbfs_harness::history::save(&path, &calls).expect("save");
    assert_eq!(verbfs_harness::history::load(&path).expect("load"), calls);
    std::fs::remove_file(path).expect("remove");
}
