//! The programs do what their first pages say, on a local directory that plays all three mounts.

use std::path::PathBuf;
use std::process::{Command, Output};

/// A fresh directory of this test.
struct Place(PathBuf);

impl Place {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("verbfs-harness-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).expect("create a directory");
        Self(path)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn run(program: &str, place: &Place, arguments: &str) -> (i32, String) {
    let mut command = Command::new(program);
    for _ in 0..3 {
        command.arg("--mount").arg(&place.0);
    }
    // Saved histories and operation lists go where they are removed.
    command.env("TMPDIR", &place.0);
    let Output { status, stdout, stderr } = command.args(arguments.split_whitespace()).output().expect("run");
    let text = format!("{}{}", String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    (status.code().unwrap_or(-1), text)
}

const COHERENCE: &str = env!("CARGO_BIN_EXE_verbfs-coherence");
/// A local file system is linearizable for single words only.
const LOCAL: &str = "--max-io 8 --without-stat --operations 2000 --seed 11";

#[test]
fn coherence_accepts_a_local_directory() {
    let place = Place::new("accepts");
    let (status, text) = run(COHERENCE, &place, LOCAL);
    assert_eq!(status, 0, "{text}");
    for family in ["data", "names", "mmap", "locks"] {
        assert!(text.contains(&format!("ok {family}")), "{text}");
    }
    // Nothing is left behind.
    assert_eq!(std::fs::read_dir(&place.0).expect("list").count(), 0);
}

#[test]
fn coherence_finds_an_injected_stale_read_and_its_saved_history_again() {
    let place = Place::new("stale");
    for family in ["data", "mmap"] {
        let history = place.0.join("history");
        let arguments = format!("{LOCAL} --families {family} --inject-stale-read --history {}", history.display());
        let (status, text) = run(COHERENCE, &place, &arguments);
        assert_eq!(status, 1, "{text}");
        assert!(text.contains("injected") && text.contains("NOT LINEARIZABLE") && text.contains("replay:"), "{text}");
        let saved = Command::new(COHERENCE).arg("--check").arg(history.with_extension(family)).output().expect("run");
        assert_eq!(saved.status.code(), Some(1));
    }
}

#[test]
fn coherence_reports_a_standstill() {
    let place = Place::new("standstill");
    // Nobody may take even a second: some call is always in progress when the watchdog looks.
    let (status, text) = run(COHERENCE, &place, "--families locks --stall-seconds 0 --operations 5000000");
    assert_eq!(status, 2, "{text}");
    assert!(text.contains("STANDSTILL locks") && text.contains("wchan"), "{text}");
}

/// Three programs, one for each mount, as on three machines.
#[test]
fn coherence_joins_the_histories_of_several_parts() {
    let place = Place::new("parts");
    let (mount, meeting) = (place.0.join("mount"), place.0.join("meeting"));
    for directory in [&mount, &meeting] {
        std::fs::create_dir(directory).expect("make a directory");
    }
    let part = |part: u32| {
        let mut command = Command::new(COHERENCE);
        command.args(LOCAL.split(' ')).args([
            "--families",
            "data,names,locks",
            "--parts",
            "3",
            "--part",
            &part.to_string(),
        ]);
        command.arg("--mount").arg(&mount).arg("--meeting").arg(&meeting);
        command.stdout(std::process::Stdio::piped()).spawn().expect("run")
    };
    let parts: Vec<_> = (0..3).map(part).collect();
    for part in parts {
        let output = part.wait_with_output().expect("wait");
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{text}");
        assert!(text.contains("recorded names"), "{text}");
    }
    assert_eq!(std::fs::read_dir(&mount).expect("list").count(), 0, "nothing is left behind");
    let check = |family: &str, parts: &[u32], more: &[&str]| {
        let mut command = Command::new(COHERENCE);
        for part in parts {
            command.arg("--check").arg(meeting.join(format!("{family}-11-calls.history.{part}")));
        }
        let output = command.args(more).output().expect("run");
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    for family in ["data", "names", "locks"] {
        let (status, text) = check(family, &[0, 1, 2], &[]);
        assert_eq!(status, Some(0), "{text}");
        assert!(!text.contains(" 0 one of another mount"), "{text}");
        // What one part saw is explained by what the others did.
        let (status, text) = check(family, &[0], &[]);
        assert!(status == Some(1) || family == "locks", "{text}");
    }
    let (status, text) = check("data", &[0, 1, 2], &["--inject-stale-read", "--seed", "1"]);
    assert_eq!(status, Some(1), "{text}");
}

#[test]
fn exercisers_agree_with_a_local_directory() {
    let place = Place::new("exerciser");
    let (status, text) = run(env!("CARGO_BIN_EXE_verbfs-exerciser"), &place, "--seed 1 --operations 500 --no-direct");
    assert_eq!(status, 0, "{text}");
    let arguments = format!("--seed 1 --operations 1000 --reference {}", place.0.display());
    let (status, text) = run(env!("CARGO_BIN_EXE_verbfs-namespace-exerciser"), &place, &arguments);
    assert_eq!(status, 0, "{text}");
}

#[test]
fn posix_lists_and_runs_single_checks() {
    let place = Place::new("posix");
    let program = env!("CARGO_BIN_EXE_verbfs-posix");
    let list = Command::new(program).arg("--list").output().expect("run");
    let names = String::from_utf8_lossy(&list.stdout).lines().count();
    assert!(names > 100, "{names} checks");
    let (status, text) = run(program, &place, "--only rename_replaces --only fcntl_deadlock_is_found");
    assert_eq!(status, 0, "{text}");
    assert!(text.contains("2 passed, 0 failed"), "{text}");
}
