//! Processes of several machines that take part in one run, and a directory all of them see where they meet.
//!
//! Each machine has mounts of its own. At a *meeting* every part says something and goes on when it has heard what all others
//! said: what one did before is then behind what another does afterwards. What is said lies in files, so that a directory shared
//! by virtual machines is enough. A part that fails says so, and nobody waits for it.

use crate::clock::{self, now};
use anyhow::{Context, Result, bail, ensure};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long a part waits for the others at one meeting: above the time that the slowest needs for its calls.
const PATIENCE: Duration = Duration::from_secs(300);
/// How often it looks. Directories that virtual machines share tell nobody that they changed.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// One part's place among all.
#[derive(Clone, Debug)]
pub struct Meeting {
    /// This part's number, from 0.
    pub part: u32,
    /// Parts in all.
    pub parts: u32,
    /// Where they meet. It must be empty at first.
    directory: Option<PathBuf>,
}

impl Meeting {
    /// For a run of one process: nobody is waited for.
    pub fn alone() -> Self {
        Self { part: 0, parts: 1, directory: None }
    }

    /// Part number `part` of `parts`, which meet in `directory`.
    ///
    /// Waits for all of them, and fails when their times cannot be compared.
    pub fn join(part: u32, parts: u32, directory: &Path) -> Result<Self> {
        ensure!(part < parts, "parts are numbered from 0: there is no part {part} of {parts}");
        let directory = directory.canonicalize().with_context(|| format!("meet in {}", directory.display()))?;
        let meeting = Self { part, parts, directory: Some(directory) };
        meeting.compare().inspect_err(|error| meeting.fail(&format!("{error:#}")))?;
        Ok(meeting)
    }

    /// Whether the times of the parts can be compared.
    fn compare(&self) -> Result<()> {
        let machine = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").context("the machine's boot_id")?;
        let shared = std::env::var_os(clock::VARIABLE).is_some();
        let said = self.meet("machine", &format!("{} {shared}", machine.trim()))?;
        let machines: Vec<&str> = said.iter().filter_map(|s| s.split(' ').next()).collect();
        if machines.iter().any(|m| *m != machines[0]) {
            ensure!(
                said.iter().all(|s| s.ends_with(" true")),
                "parts are on several machines, whose clocks differ: {} must name a time base that they share",
                clock::VARIABLE
            );
        }
        // What was said before this part heard it lies in its past, or the times of the parts do not compare.
        for (other, time) in self.meet("time", &now().to_string())?.iter().enumerate() {
            let (time, own): (u64, u64) = (time.parse().context("the time of another part")?, now());
            let ahead = time.saturating_sub(own);
            ensure!(ahead == 0, "part {other} is ahead of part {} by {ahead} ns: they share no time base", self.part);
        }
        Ok(())
    }

    fn file(&self, directory: &Path, topic: &str, part: u32) -> PathBuf {
        directory.join(format!("{topic}.{part}"))
    }

    /// Say `what` on `topic`, of which there is one meeting only, and hear what every part said, in their order.
    pub fn meet(&self, topic: &str, what: &str) -> Result<Vec<String>> {
        let Some(directory) = &self.directory else { return Ok(vec![what.to_owned()]) };
        self.say(topic, what)?;
        let begun = Instant::now();
        let mut heard = Vec::new();
        while heard.len() < self.parts as usize {
            let other = heard.len() as u32;
            match std::fs::read_to_string(self.file(directory, topic, other)) {
                Ok(said) => {
                    heard.push(said);
                    continue;
                }
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(error).with_context(|| format!("hear part {other} on {topic}")),
            }
            for failed in 0..self.parts {
                if let Ok(why) = std::fs::read_to_string(self.file(directory, FAILED, failed)) {
                    bail!("part {failed} failed: {why}");
                }
            }
            ensure!(begun.elapsed() < PATIENCE, "part {other} said nothing on {topic} in {} s", PATIENCE.as_secs());
            std::thread::sleep(LOOK_EVERY);
        }
        Ok(heard)
    }

    /// Tell the others that this part does not go on.
    pub fn fail(&self, why: &str) {
        if self.directory.is_some() {
            let _ = self.say(FAILED, why);
        }
    }

    /// A file appears with all that it holds.
    fn say(&self, topic: &str, what: &str) -> Result<()> {
        let Some(directory) = &self.directory else { return Ok(()) };
        let file = self.file(directory, topic, self.part);
        ensure!(!file.exists(), "{} is left from another run: meet in an empty directory", file.display());
        let new = file.with_extension(format!("{}.new", self.part));
        std::fs::write(&new, what).with_context(|| format!("write {}", new.display()))?;
        std::fs::rename(&new, &file).with_context(|| format!("rename to {}", file.display()))
    }

    /// Where this part leaves the history called `name`; `None` when it is alone.
    pub fn history(&self, name: &str) -> Option<PathBuf> {
        self.directory.as_ref().map(|d| d.join(format!("{name}.history.{}", self.part)))
    }
}

/// The topic of parts that do not go on.
const FAILED: &str = "failed";

#[cfg(test)]
mod tests {
    use super::*;

    fn place(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("verbfs-meeting-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        path
    }

    #[test]
    fn all_hear_what_all_said() {
        let place = place("all");
        let heard: Vec<Vec<String>> = std::thread::scope(|scope| {
            let part = |n: u32| {
                let place = &place;
                scope.spawn(move || Meeting::join(n, 3, place).unwrap().meet("topic", &n.to_string()).unwrap())
            };
            let parts: Vec<_> = (0..3).map(part).collect();
            parts.into_iter().map(|p| p.join().unwrap()).collect()
        });
        assert_eq!(heard, vec![["0", "1", "2"]; 3]);
        let _ = std::fs::remove_dir_all(place);
    }

    #[test]
    fn nobody_waits_for_a_part_that_failed() {
        let place = place("failed");
        let meeting = |part| Meeting { part, parts: 2, directory: Some(place.clone()) };
        meeting(1).fail("a reason");
        let error = meeting(0).meet("topic", "").unwrap_err();
        assert_eq!(error.to_string(), "part 1 failed: a reason");
        let _ = std::fs::remove_dir_all(&place);
    }

    #[test]
    fn a_directory_serves_once_and_alone_nobody_waits() {
        let place = place("once");
        assert!(Meeting::join(1, 1, &place).is_err());
        Meeting::join(0, 1, &place).unwrap();
        let error = Meeting::join(0, 1, &place).unwrap_err();
        assert!(error.to_string().contains("left from another run"), "{error}");
        assert_eq!(Meeting::alone().meet("topic", "mine").unwrap(), ["mine"]);
        let _ = std::fs::remove_dir_all(&place);
    }
}
