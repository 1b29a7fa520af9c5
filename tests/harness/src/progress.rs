//! Long work shows that it lives: a bar on a terminal, a line every few seconds in a log.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// Between two lines when standard error is not a terminal.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// Progress of one piece of work, on standard error.
pub struct Progress {
    bar: Option<indicatif::ProgressBar>,
    name: String,
    total: u64,
    done: u64,
    printed: Instant,
}

impl Progress {
    /// Work called `name` that has `total` steps.
    pub fn new(name: &str, total: u64) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = indicatif::ProgressStyle::with_template("{msg:24} {bar:40} {pos}/{len} {eta}")
                .expect("the template is constant and well formed");
            indicatif::ProgressBar::new(total).with_style(style).with_message(name.to_owned())
        });
        Self { bar, name: name.to_owned(), total, done: 0, printed: Instant::now() }
    }

    /// `done` steps are done by now.
    pub fn set(&mut self, done: u64) {
        self.done = done;
        match &self.bar {
            Some(bar) => bar.set_position(done),
            None if self.printed.elapsed() >= LINE_EVERY => {
                self.printed = Instant::now();
                eprintln!("{}: {}/{}", self.name, done, self.total);
            }
            None => {}
        }
    }

    /// One more step is done.
    pub fn step(&mut self) {
        self.set(self.done + 1);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
