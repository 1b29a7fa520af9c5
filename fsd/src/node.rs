//! A node: its core, and the threads that work for it.
//!
//! Whoever leaves the core has polled the fabric until nothing was left and has armed it, or found it armed, so the core
//! thread can sleep on the fabric's descriptor whoever was the last to leave, and no message waits for a tick.

use crate::volume::{KernelCache, Volume};
use parking_lot::Mutex;
use std::os::fd::RawFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How often time-outs, reconnections and minimum holds are looked at.
pub const TICK: Duration = Duration::from_millis(100);
/// How long a page stays dirty before background write-back begins.
pub const WRITE_BACK_INTERVAL: Duration = Duration::from_secs(5);

struct Core {
    volume: Rc<Volume>,
}

// SAFETY: everything reachable from the volume (reference counts, cells, tasks, wakers) is reached only through
// the mutex around the core: nothing hands out a reference that outlives `NodeHandle::enter`, tasks and wakers stay
// inside (see `executor`), and the mutex orders the accesses of different threads.
unsafe impl Send for Core {}

struct Shared {
    core: Mutex<Core>,
    event_fd: RawFd,
    stop: AtomicBool,
    next_tick: Mutex<Instant>,
    /// Until when the core thread sleeps; work that is due earlier must wake it.
    sleeping_until: Mutex<Instant>,
}

/// A way into a node's core, from any thread.
#[derive(Clone)]
pub struct NodeHandle {
    shared: Arc<Shared>,
}

impl NodeHandle {
    /// Makes a core of what `build` returns. The core thread is started by [`NodeHandle::start`].
    pub fn new<E>(build: impl FnOnce() -> Result<Rc<Volume>, E>) -> Result<NodeHandle, E> {
        let volume = build()?;
        let event_fd = volume.transport.borrow().as_ref().map_or(-1, |transport| transport.event_fd());
        Ok(NodeHandle {
            shared: Arc::new(Shared {
                core: Mutex::new(Core { volume }),
                event_fd,
                stop: AtomicBool::new(false),
                next_tick: Mutex::new(Instant::now()),
                sleeping_until: Mutex::new(Instant::now()),
            }),
        })
    }

    /// Works inside the core: `f`, then everything that is ready.
    pub fn enter<R>(&self, f: impl FnOnce(&Rc<Volume>) -> R) -> R {
        let core = self.shared.core.lock();
        let volume = &core.volume;
        let result = f(volume);
        loop {
            volume.executor.fire_timers(Instant::now());
            volume.run();
            // Armed since somebody left it so, and nothing has come: polling and arming it again would change nothing.
            if volume.transport.borrow_mut().as_mut().is_some_and(|transport| transport.is_quiet()) {
                break;
            }
            if volume.poll_transport() {
                continue;
            }
            if volume.transport.borrow_mut().as_mut().is_none_or(|transport| transport.arm()) {
                break;
            }
        }
        if let Some(due) = volume.next_due()
            && due < *self.shared.sleeping_until.lock()
            && let Some(transport) = volume.transport.borrow().as_ref()
        {
            transport.interrupt();
        }
        result
    }

    /// Starts an operation: it runs to its first wait before this returns. Neither the future nor the volume
    /// leaves the core, so neither needs to be `Send`.
    pub fn submit<F, Fut>(&self, operation: F)
    where
        F: FnOnce(Rc<Volume>) -> Fut + Send + 'static,
        Fut: Future<Output = ()> + 'static,
    {
        self.enter(|volume| volume.spawn(operation(volume.clone())));
    }

    /// Runs an operation and waits for what it returns; for threads that may block.
    pub fn block_on<T, F, Fut>(&self, operation: F) -> T
    where
        T: Send + 'static,
        F: FnOnce(Rc<Volume>) -> Fut + Send + 'static,
        Fut: Future<Output = T> + 'static,
    {
        let (sender, receiver) = std::sync::mpsc::sync_channel(1);
        self.submit(move |volume| {
            let work = operation(volume);
            async move {
                // The receiver waits below; it cannot be gone.
                let _ = sender.send(work.await);
            }
        });
        receiver.recv().expect("the operation ends with its result")
    }

    /// Starts the core thread.
    pub fn start(&self) -> std::io::Result<CoreThread> {
        let node = self.clone();
        let thread = std::thread::Builder::new().name("verbfs-core".into()).spawn(move || node.work())?;
        Ok(CoreThread { node: self.clone(), thread: Some(thread) })
    }

    fn work(&self) {
        while !self.shared.stop.load(Ordering::Acquire) {
            self.enter(|volume| {
                let now = Instant::now();
                // Awake: nobody needs to wake this thread until it has looked at what is due.
                *self.shared.sleeping_until.lock() = now;
                let mut next_tick = self.shared.next_tick.lock();
                if now >= *next_tick {
                    *next_tick = now + TICK;
                    volume.tick();
                    if let Some(transport) = volume.transport.borrow_mut().as_mut() {
                        transport.maintain();
                    }
                }
                volume.tick_locks_if_due();
            });
            let deadline = {
                let core = self.shared.core.lock();
                let next_tick = *self.shared.next_tick.lock();
                let deadline = core.volume.next_due().map_or(next_tick, |due| due.min(next_tick));
                *self.shared.sleeping_until.lock() = deadline;
                deadline
            };
            let wait = deadline.saturating_duration_since(Instant::now());
            // Rounded up, or the last fraction of a millisecond would be spun away.
            let milliseconds = (wait.as_micros().div_ceil(1000)).min(1000) as i32;
            let mut descriptor = libc::pollfd { fd: self.shared.event_fd, events: libc::POLLIN, revents: 0 };
            // SAFETY: one valid pollfd; a negative descriptor is ignored by poll.
            unsafe { libc::poll(&mut descriptor, 1, milliseconds) };
        }
    }

    /// Serves invalidations with `cache` from now on: each on a thread of its own, since each may wait for page
    /// locks, and for another one's end.
    pub fn attach_kernel_cache(&self, cache: Arc<dyn KernelCache>) -> std::io::Result<()> {
        let (sender, receiver) = std::sync::mpsc::channel::<crate::volume::Invalidation>();
        let node = self.clone();
        std::thread::Builder::new().name("verbfs-inval".into()).spawn(move || {
            while let Ok(invalidation) = receiver.recv() {
                let (cache, worker) = (cache.clone(), node.clone());
                let (number, ino, range) = (invalidation.number, invalidation.ino, invalidation.range);
                let work = move || {
                    let page = verbfs_protocol::PAGE_SIZE;
                    let offset = range.lo.saturating_mul(page).min(i64::MAX as u64);
                    let length = range.hi.saturating_mul(page).min(i64::MAX as u64) - offset;
                    cache.invalidate(ino, offset, length);
                    worker.enter(|volume| volume.invalidated(number));
                };
                if std::thread::Builder::new().name("verbfs-inval-one".into()).spawn(work).is_err() {
                    tracing::error!(%ino, "no thread to drop kernel pages with; the revoke waits for the next attempt");
                    node.enter(|volume| volume.invalidated(number));
                }
            }
        })?;
        self.enter(|volume| volume.set_kernel_cache(Some(sender)));
        Ok(())
    }

    pub fn detach_kernel_cache(&self) {
        self.enter(|volume| volume.set_kernel_cache(None));
    }
}

/// The core thread; ends when dropped.
pub struct CoreThread {
    node: NodeHandle,
    thread: Option<JoinHandle<()>>,
}

impl Drop for CoreThread {
    fn drop(&mut self) {
        self.node.shared.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            // It looks at the flag at least every tick. A panic there has aborted the process already.
            let _ = thread.join();
        }
    }
}
