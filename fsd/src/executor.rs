//! The core of a node: one mutex, inside it everything that is not thread-safe, and the tasks that work on it.
//!
//! Operations are futures. A thread that brings work (a FUSE thread with a request, the core thread
//! with a message, the invalidation thread with a result) enters the core, and runs ready tasks
//! until none is left; a future therefore runs to its first wait on the thread that brought it, and
//! a call that hits its caches is answered without a switch of threads. Between two waits a task
//! is alone: copying pages, changing tables and deciding are atomic to all other tasks without further locks.
//!
//! Rule: no `RefCell` borrow is held across an `.await`.

use async_task::Runnable;
use crossbeam::queue::SegQueue;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

/// The run queue and the timers of one core.
pub struct Executor {
    ready: Arc<SegQueue<Runnable>>,
    timers: RefCell<BTreeMap<(Instant, u64), Waker>>,
    next_timer: Cell<u64>,
}

impl Default for Executor {
    fn default() -> Self {
        Executor { ready: Arc::new(SegQueue::new()), timers: RefCell::default(), next_timer: Cell::new(0) }
    }
}

impl Executor {
    /// Adds a task; it is polled by the next [`Executor::run_ready`].
    pub fn spawn(&self, future: impl Future<Output = ()> + 'static) {
        let ready = self.ready.clone();
        let schedule = move |runnable| ready.push(runnable);
        // SAFETY: the future is 'static, and the schedule function is Send + Sync + 'static. The future
        // is not Send, but it is created, polled and dropped only while the core's mutex is held: wakers
        // are kept inside the core (oneshots, timers, events below), the queue is emptied only inside
        // the core, and the core is dropped as a whole. The mutex orders all those accesses.
        let (runnable, task) = unsafe { async_task::spawn_unchecked(future, schedule) };
        task.detach();
        runnable.schedule();
    }

    /// Runs one ready task; `false` when there was none.
    pub fn run_one(&self) -> bool {
        match self.ready.pop() {
            Some(runnable) => {
                runnable.run();
                true
            }
            None => false,
        }
    }

    /// Wakes the tasks whose time has come.
    pub fn fire_timers(&self, now: Instant) {
        loop {
            let waker = {
                let mut timers = self.timers.borrow_mut();
                match timers.first_key_value() {
                    Some((key, _)) if key.0 <= now => timers.pop_first().map(|(_, waker)| waker),
                    _ => None,
                }
            };
            match waker {
                Some(waker) => waker.wake(),
                None => break,
            }
        }
    }

    /// When the next timer is due.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.timers.borrow().first_key_value().map(|(key, _)| key.0)
    }

    /// Waits at least `duration`; timers are looked at every [`crate::node::TICK`].
    pub fn sleep(&self, duration: Duration) -> Sleep<'_> {
        Sleep { executor: self, deadline: Instant::now() + duration, key: None }
    }

    /// Lets every other ready task run first.
    pub async fn yield_now(&self) {
        let mut yielded = false;
        std::future::poll_fn(move |context| {
            if yielded {
                return Poll::Ready(());
            }
            yielded = true;
            context.waker().wake_by_ref();
            Poll::Pending
        })
        .await
    }
}

/// See [`Executor::sleep`].
pub struct Sleep<'a> {
    executor: &'a Executor,
    deadline: Instant,
    key: Option<(Instant, u64)>,
}

impl Future for Sleep<'_> {
    type Output = ();
    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        if Instant::now() >= self.deadline {
            return Poll::Ready(());
        }
        let mut timers = self.executor.timers.borrow_mut();
        if let Some(key) = self.key {
            timers.remove(&key);
        }
        let number = self.executor.next_timer.get();
        self.executor.next_timer.set(number + 1);
        let key = (self.deadline, number);
        timers.insert(key, context.waker().clone());
        drop(timers);
        self.key = Some(key);
        Poll::Pending
    }
}

impl Drop for Sleep<'_> {
    fn drop(&mut self) {
        if let Some(key) = self.key {
            self.executor.timers.borrow_mut().remove(&key);
        }
    }
}

struct Slot<T> {
    value: Option<T>,
    waker: Option<Waker>,
    closed: bool,
}

/// The sending half of [`oneshot`]. Dropped unused, it wakes the receiver with `None`.
pub struct Sender<T>(Rc<RefCell<Slot<T>>>);

/// The receiving half of [`oneshot`].
pub struct Receiver<T>(Rc<RefCell<Slot<T>>>);

/// One value from one task to another within a core.
pub fn oneshot<T>() -> (Sender<T>, Receiver<T>) {
    let slot = Rc::new(RefCell::new(Slot { value: None, waker: None, closed: false }));
    (Sender(slot.clone()), Receiver(slot))
}

impl<T> Sender<T> {
    pub fn send(self, value: T) {
        self.0.borrow_mut().value = Some(value);
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        let waker = {
            let mut slot = self.0.borrow_mut();
            slot.closed = true;
            slot.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl<T> Future for Receiver<T> {
    type Output = Option<T>;
    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<T>> {
        let mut slot = self.0.borrow_mut();
        if let Some(value) = slot.value.take() {
            return Poll::Ready(Some(value));
        }
        if slot.closed {
            return Poll::Ready(None);
        }
        slot.waker = Some(context.waker().clone());
        Poll::Pending
    }
}

/// Something that happens again and again: whoever waits is woken by the next [`Event::notify`].
/// A waiter must look at its condition, then call [`Event::wait`] without an `.await` between: nothing is lost then.
#[derive(Default)]
pub struct Event {
    waiters: RefCell<Vec<Waker>>,
    generation: Cell<u64>,
}

impl Event {
    pub fn notify(&self) {
        self.generation.set(self.generation.get() + 1);
        for waker in self.waiters.take() {
            waker.wake();
        }
    }

    pub fn wait(self: &Rc<Self>) -> impl Future<Output = ()> + 'static {
        let event = self.clone();
        let seen = self.generation.get();
        std::future::poll_fn(move |context| {
            if event.generation.get() != seen {
                return Poll::Ready(());
            }
            let mut waiters = event.waiters.borrow_mut();
            if !waiters.iter().any(|waker| waker.will_wake(context.waker())) {
                waiters.push(context.waker().clone());
            }
            Poll::Pending
        })
    }
}

/// Runs futures side by side and collects what they return, in order.
pub async fn join_all<T>(futures: Vec<Pin<Box<dyn Future<Output = T> + '_>>>) -> Vec<T> {
    let mut running: Vec<Option<Pin<Box<dyn Future<Output = T> + '_>>>> = futures.into_iter().map(Some).collect();
    let mut results: Vec<Option<T>> = running.iter().map(|_| None).collect();
    std::future::poll_fn(move |context| {
        let mut pending = false;
        for (place, result) in running.iter_mut().zip(results.iter_mut()) {
            if let Some(future) = place {
                match future.as_mut().poll(context) {
                    Poll::Ready(value) => {
                        *result = Some(value);
                        *place = None;
                    }
                    Poll::Pending => pending = true,
                }
            }
        }
        if pending {
            Poll::Pending
        } else {
            Poll::Ready(results.iter_mut().map(|result| result.take().expect("every future is done")).collect())
        }
    })
    .await
}
