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
