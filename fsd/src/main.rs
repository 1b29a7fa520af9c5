//! The `verbfs` program: daemon and command line. What it does is in the library.

use anyhow::Context;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use verbfs_fsd::cli::{self, Demo, Program, Start};
use verbfs_fsd::config::{Config, LogFormat};
use verbfs_fsd::daemon::Daemon;

/// Set by SIGINT and SIGTERM, for the demonstration also by SIGHUP.
static TERMINATED: AtomicBool = AtomicBool::new(false);

extern "C" fn on_signal(_signal: libc::c_int) {
    TERMINATED.store(true, Ordering::Release);
}

fn catch_signals(signals: &[libc::c_int]) {
    for &signal in signals {
        let handler: extern "C" fn(libc::c_int) = on_signal;
        // SAFETY: the handler only stores to an atomic, which is async-signal-safe.
        unsafe { libc::signal(signal, handler as libc::sighandler_t) };
    }
}

struct Verbfs;

impl Program for Verbfs {
    fn start_logging(&self, config: &Config) -> anyhow::Result<()> {
        let filter = tracing_subscriber::EnvFilter::try_new(&config.log.level)
            .with_context(|| format!("log.level = {:?}", config.log.level))?;
        let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false);
        match config.log.format {
            LogFormat::Text => builder.init(),
            LogFormat::Json => builder.json().init(),
        }
        Ok(())
    }

    fn run_daemon(&self, start: &Start) -> anyhow::Result<()> {
        catch_signals(&[libc::SIGINT, libc::SIGTERM]);
        // A panic inside the core leaves its tables half changed: better no daemon than a wrong one.
        let default = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            default(panic);
            std::process::abort();
        }));
        let daemon = Daemon::start(start.config.clone(), start.slot)?;
        if let Some(mount) = &start.mount
            && let Err(error) = daemon.mount(mount)
        {
            daemon.stop()?;
            return Err(error);
        }
        while !TERMINATED.load(Ordering::Acquire) {
            if daemon.wait_for_stop(Duration::from_millis(200)) {
                break;
            }
        }
        tracing::info!(slot = start.slot, "stopping");
        daemon.stop()
    }

    fn demo(&self, demo: &Demo) -> anyhow::Result<()> {
        // A terminal that is closed must leave no mounts either.
        catch_signals(&[libc::SIGINT, libc::SIGTERM, libc::SIGHUP]);
        verbfs_fsd::demo::run(demo, &TERMINATED)
    }
}

fn main() -> ExitCode {
    cli::run(&Verbfs)
}
