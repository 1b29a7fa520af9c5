//! One node's view of the file system: ties lock client, lock server, cache, name space and fabric together.
//!
//! - `locks`: carries lock messages between the pure machines and the peers, and does what they ask: vacate a range, fetch a hand-over
//! - `attributes`: attributes under ATTR locks; sizes and times
//! - `data`: reading, writing, truncating pages under DATA locks
//! - `transfer`: moves pages between cache and arenas: fetch, write-back, hand-over
//! - `names`: look-ups and what a client asks of homes
//! - `home`: what this node does as the home of inodes and directories, under its own locks
//! - `storage`: what this node answers as the place where pages and records are stored
//! - `file_locks`: fcntl and flock
//! - `remote`: requests and replies
//! - `plausible`: what a peer may say
//!
//! Everything here runs inside the core (see [`crate::executor`]).

mod attributes;
mod data;
mod file_locks;
mod home;
#[cfg(test)]
mod hostile;
mod inspect;
mod locks;
mod names;
mod plausible;
mod remote;
mod storage;
mod transfer;

pub use crate::errno::{Errno, Result};
pub use crate::node::NodeHandle;
pub use inspect::{ListedLocks, Report};
pub use locks::Pin;

use crate::cache::PageCache;
use crate::executor::{Event, Executor, Receiver, Sender, oneshot};
use attributes::AttributeState;
use data::FileState;
use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};
use verbfs_lock::{ClientEffect, LockClient, LockServer, PinKind, ServerEffect};
use verbfs_protocol::*;

/// What the volume needs of the fabric; one call never blocks.
pub trait Transport {
    /// Queues a message; `Err` when the peer's session is gone or the queue is full.
    fn send(&mut self, slot: Slot, lane: verbfs_protocol::lock::Lane, record: &[u8])
    -> std::result::Result<(), String>;
    /// Reads from a peer's region into this node's cache region.
    fn read(
        &mut self,
        slot: Slot,
        cache_offset: usize,
        key: u32,
        offset: u64,
        length: usize,
        work: u64,
    ) -> std::result::Result<(), String>;
    /// Writes from this node's cache region into a peer's region.
    fn write(
        &mut self,
        slot: Slot,
        cache_offset: usize,
        key: u32,
        offset: u64,
        length: usize,
        work: u64,
    ) -> std::result::Result<(), String>;
    fn poll(&mut self, events: &mut Vec<TransportEvent>);
    /// The peer broke the protocol: drop its connection.
    fn refuse(&mut self, slot: Slot, reason: &str);
    fn statistics(&self) -> TransportStatistics;
    /// Readable when an armed transport has something.
    fn event_fd(&self) -> std::os::fd::RawFd;
    /// Nobody will poll before `event_fd` is readable. `false`: there is something already.
    fn arm(&mut self) -> bool;
    /// Whether it is still armed and nothing has come since.
    fn is_quiet(&mut self) -> bool;
    /// Makes `event_fd` readable: wakes whoever sleeps on it.
    fn interrupt(&self);
    /// Called now and then: connects to peers that are not there, looks after the dead.
    fn maintain(&mut self);
}

#[derive(Debug)]
pub enum TransportEvent {
    Message {
        slot: Slot,
        record: Vec<u8>,
    },
    Completed {
        work: u64,
        ok: bool,
    },
    Connected {
        slot: Slot,
        node: Node,
    },
    Disconnected {
        slot: Slot,
        reason: String,
    },
    /// The peer's daemon is gone for good (its process ended); another incarnation may come.
    Lost {
        slot: Slot,
    },
}

#[derive(Clone, Copy, Debug, Default)]
pub struct TransportStatistics {
    pub messages_sent: u64,
    pub messages_received: u64,
    pub messages_resent: u64,
    pub credit_stalls: u64,
    pub bytes_read: u64,
    pub bytes_written: u64,
}

/// How pages that the kernel caches are dropped. Called from a thread of its own; may block on page locks.
pub trait KernelCache: Send + Sync {
    /// Drops (after writing back) what the kernel caches of `length` bytes from `offset`.
    fn invalidate(&self, ino: Ino, offset: u64, length: u64);
}

/// A range of which the kernel must drop its pages, for the invalidation thread.
pub struct Invalidation {
    pub number: u64,
    pub ino: Ino,
    pub range: Range,
}

/// Faults that a test switches on to see that the suite notices (docs/semantics.md, mutation check).
#[derive(Clone, Debug, Default)]
pub struct Mutations {
    names: std::collections::BTreeSet<String>,
}

impl Mutations {
    /// All names that [`Mutations::set`] takes.
    pub const ALL: &'static [&'static str] = &[
        "keep_pages_after_revoke",
        "no_write_back_before_release",
        "no_kernel_invalidation",
        "stat_without_glimpse",
        "size_floor_never_capped",
        "hand_over_drops_dirty",
        "names_kept_after_revoke",
        "append_without_exclusive",
        "sync_own_pages_only",
        "no_clear_set_id",
    ];

    pub fn set(&mut self, name: &str, on: bool) -> bool {
        if !Self::ALL.contains(&name) {
            return false;
        }
        if on {
            self.names.insert(name.to_string());
        } else {
            self.names.remove(name);
        }
        true
    }
    pub fn on(&self, name: &str) -> bool {
        debug_assert!(Self::ALL.contains(&name));
        !self.names.is_empty() && self.names.contains(name)
    }
}

#[derive(Clone, Debug)]
pub struct VolumeOptions {
    pub me: Node,
    pub daemon_incarnation: u32,
    /// All slots of the volume, this one included, ascending.
    pub members: Vec<Slot>,
    pub chunk_pages: u32,
    pub width: usize,
    /// Dirty pages at which write-back begins.
    pub dirty_background: usize,
    /// Dirty pages at which writers wait.
    pub dirty_limit: usize,
    /// How long an operation waits for a peer that is not there before it fails with EIO.
    pub peer_timeout: Duration,
    /// Most lock ranges held by this node.
    pub maximum_grants: usize,
    pub hand_over: bool,
    /// Ticks (milliseconds) a DATA grant lives at least.
    pub minimum_hold: u64,
}

/// What is known of another node.
#[derive(Clone, Debug, Default)]
pub(crate) struct Peer {
    pub connected: bool,
    pub node: Option<Node>,
    /// Since when it has been unreachable.
    pub gone_since: Option<Instant>,
    /// Why, for `verbfs status`.
    pub reason: Option<String>,
}

/// An open file of this node's mount.
pub(crate) struct OpenFile {
    pub ino: Ino,
    pub flags: i32,
    _pin: Pin,
}

pub struct Volume {
    pub(crate) options: VolumeOptions,
    pub(crate) executor: Executor,
    pub(crate) started: Instant,
    pub(crate) transport: RefCell<Option<Box<dyn Transport>>>,
    pub(crate) peers: RefCell<HashMap<Slot, Peer>>,
    pub(crate) peers_changed: Rc<Event>,

    pub(crate) lock_client: RefCell<LockClient>,
    pub(crate) lock_server: RefCell<LockServer>,
    pub(crate) client_effects: RefCell<VecDeque<ClientEffect>>,
    pub(crate) server_effects: RefCell<VecDeque<ServerEffect>>,
    pub(crate) inbox: RefCell<VecDeque<Message>>,
    pub(crate) waiting_pins: RefCell<HashMap<u64, locks::WaitingPin>>,
    pub(crate) hand_overs: RefCell<locks::HandOvers>,
    pub(crate) glimpse_answers: RefCell<HashMap<u64, Option<Box<Attributes>>>>,
    /// What waiting requests are about whose answer brings attributes or entries.
    pub(crate) asked: RefCell<HashMap<RequestId, locks::Asked>>,
    pub(crate) next_number: Cell<u64>,

    pub(crate) store: RefCell<verbfs_namespace::Store>,
    pub(crate) extents: RefCell<verbfs_arena::ExtentTable>,
    pub(crate) arena_key: u32,

    pub(crate) cache: RefCell<PageCache>,
    pub(crate) cache_key: u32,
    pub(crate) cache_changed: Rc<Event>,
    pub(crate) files: RefCell<HashMap<Ino, FileState>>,
    pub(crate) attributes: RefCell<HashMap<Ino, AttributeState>>,
    pub(crate) names: RefCell<names::NameCache>,
    pub(crate) open_files: RefCell<HashMap<u64, Rc<OpenFile>>>,
    pub(crate) arena_keys: RefCell<HashMap<Slot, u32>>,
    pub(crate) calls: RefCell<HashMap<u64, remote::Call>>,
    pub(crate) transfers: RefCell<HashMap<u64, Sender<bool>>>,
    pub(crate) touched: RefCell<HashMap<Ino, Time>>,
    pub(crate) prepared: RefCell<HashMap<OperationId, Vec<Update>>>,
    pub(crate) file_locks: RefCell<file_locks::FileLocks>,
    /// Inodes that nodes are about to open, see [`Volume::create`].
    pub(crate) openings: RefCell<HashMap<(Ino, Slot), usize>>,
    pub(crate) openings_changed: Rc<Event>,
    pub(crate) flushing: Cell<bool>,
    pub(crate) last_write_back: Cell<u64>,

    pub(crate) invalidations: RefCell<Option<std::sync::mpsc::Sender<Invalidation>>>,
    pub(crate) waiting_invalidations: RefCell<HashMap<u64, Sender<()>>>,
    pub mutations: RefCell<Mutations>,
    pub metrics: Arc<crate::metrics::Metrics>,
}

/// What a volume is built on.
pub struct Foundations {
    pub store: verbfs_namespace::Store,
    pub extents: verbfs_arena::ExtentTable,
    pub arena_key: u32,
    pub cache: PageCache,
    pub cache_key: u32,
    pub transport: Option<Box<dyn Transport>>,
    pub metrics: Arc<crate::metrics::Metrics>,
}

impl Volume {
    pub fn new(options: VolumeOptions, foundations: Foundations) -> Rc<Volume> {
        let server_options = verbfs_lock::ServerOptions { hand_over: options.hand_over, ..Default::default() };
        let client_options = verbfs_lock::ClientOptions { minimum_hold: options.minimum_hold, ..Default::default() };
        // Nobody is there before its first connection: what is asked of it until then is asked when it comes.
        let mut lock_client = LockClient::new(options.me, client_options);
        for slot in options.members.iter().filter(|slot| **slot != options.me.slot) {
            let mut nothing_held = Vec::new();
            lock_client.server_lost(*slot, &mut nothing_held);
        }
        let peers = options
            .members
            .iter()
            .filter(|slot| **slot != options.me.slot)
            .map(|slot| (*slot, Peer { gone_since: Some(Instant::now()), ..Peer::default() }))
            .collect();
        Rc::new(Volume {
            executor: Executor::default(),
            started: Instant::now(),
            transport: RefCell::new(foundations.transport),
            peers: RefCell::new(peers),
            peers_changed: Rc::default(),
            lock_client: RefCell::new(lock_client),
            lock_server: RefCell::new(LockServer::new(options.me.slot, options.daemon_incarnation, server_options)),
            client_effects: RefCell::default(),
            server_effects: RefCell::default(),
            inbox: RefCell::default(),
            waiting_pins: RefCell::default(),
            hand_overs: RefCell::default(),
            glimpse_answers: RefCell::default(),
            asked: RefCell::default(),
            next_number: Cell::new(1),
            store: RefCell::new(foundations.store),
            extents: RefCell::new(foundations.extents),
            arena_key: foundations.arena_key,
            cache: RefCell::new(foundations.cache),
            cache_key: foundations.cache_key,
            cache_changed: Rc::default(),
            files: RefCell::default(),
            attributes: RefCell::default(),
            names: RefCell::default(),
            open_files: RefCell::default(),
            arena_keys: RefCell::default(),
            calls: RefCell::default(),
            transfers: RefCell::default(),
            touched: RefCell::default(),
            prepared: RefCell::default(),
            file_locks: RefCell::default(),
            openings: RefCell::default(),
            openings_changed: Rc::default(),
            flushing: Cell::new(false),
            last_write_back: Cell::new(0),
            invalidations: RefCell::new(None),
            waiting_invalidations: RefCell::default(),
            mutations: RefCell::default(),
            metrics: foundations.metrics,
            options,
        })
    }

    pub fn slot(&self) -> Slot {
        self.options.me.slot
    }

    /// Starts a task inside the core.
    pub fn spawn(self: &Rc<Self>, future: impl Future<Output = ()> + 'static) {
        self.executor.spawn(future);
    }

    /// A number that this daemon has not used before: for tokens, requests, transfers.
    pub(crate) fn number(&self) -> u64 {
        let number = self.next_number.get();
        self.next_number.set(number + 1);
        number
    }

    /// Milliseconds since start: the lock machines' ticks.
    pub(crate) fn ticks(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }

    /// Works until nothing is ready: tasks, lock effects, messages to oneself. Called inside the core only.
    pub fn run(self: &Rc<Self>) {
        loop {
            if self.pump() {
                continue;
            }
            if !self.executor.run_one() {
                break;
            }
        }
    }

    /// Whether a mutation is on; see [`Mutations`].
    pub(crate) fn mutated(&self, name: &str) -> bool {
        self.mutations.borrow().on(name)
    }

    /// Opens a file or directory. The handle keeps the OPEN lock, so that the inode stays while it is open.
    ///
    /// # Errors
    /// ESTALE when the inode is gone.
    pub async fn open(self: &Rc<Self>, ino: Ino, flags: i32) -> Result<u64> {
        let pin = self.pin(Resource::open(ino), Range::UNIT, Range::UNIT, PinKind::Shared).await?;
        self.opened(ino, flags, pin).await
    }

    /// Opens what this node has just made. The attributes' lock is asked for in the same breath: they are looked at next.
    ///
    /// # Errors
    /// As for [`Volume::open`].
    pub async fn open_new(self: &Rc<Self>, ino: Ino, flags: i32) -> Result<u64> {
        let kind = if is_writable(flags) { PinKind::Extend } else { PinKind::Shared };
        let ask = |resource: Resource,
                   kind: PinKind,
                   keep: bool|
         -> std::pin::Pin<Box<dyn Future<Output = Option<Result<Pin>>>>> {
            let volume = self.clone();
            Box::pin(async move {
                let outcome = volume.pin(resource, Range::UNIT, Range::UNIT, kind).await;
                // A pin on ATTR must not outlast a wait for OPEN, which comes before it in locking order.
                keep.then_some(outcome)
            })
        };
        let asked = vec![ask(Resource::open(ino), PinKind::Shared, true), ask(Resource::attr(ino), kind, false)];
        let pin = crate::executor::join_all(asked).await.into_iter().flatten().next().unwrap_or(Err(Errno::EIO))?;
        self.opened(ino, flags, pin).await
    }

    async fn opened(self: &Rc<Self>, ino: Ino, flags: i32, pin: Pin) -> Result<u64> {
        if !self.attributes_exist(ino).await? {
            return Err(Errno::ESTALE);
        }
        let handle = self.number();
        if is_writable(flags) {
            let first = {
                let mut files = self.files.borrow_mut();
                let file = files.entry(ino).or_default();
                file.writers += 1;
                file.writers == 1 && !file.kernel.is_empty()
            };
            if first {
                // From here on a page that the kernel caches may be stored to without its asking: none may stay under S.
                self.sweep_kernel(ino, Range::ALL).await;
            }
        }
        self.open_files.borrow_mut().insert(handle, Rc::new(OpenFile { ino, flags, _pin: pin }));
        Ok(handle)
    }

    /// Closes a handle of [`Volume::open`]; unknown ones are ignored.
    pub fn release(self: &Rc<Self>, handle: u64) {
        let file = self.open_files.borrow_mut().remove(&handle);
        if let Some(file) = file {
            if is_writable(file.flags)
                && let Some(state) = self.files.borrow_mut().get_mut(&file.ino)
            {
                state.writers = state.writers.saturating_sub(1);
                if state.writers == 0 && !state.spare.is_empty() {
                    let (volume, ino) = (self.clone(), file.ino);
                    self.spawn(async move {
                        volume.give_back_spare(Some(ino), None).await;
                        volume.prune_file(ino);
                    });
                }
            }
            self.prune_file(file.ino);
        }
    }

    /// Files and directories that programs of this node's mounts have open.
    pub fn open_handles(&self) -> usize {
        self.open_files.borrow().len()
    }

    pub(crate) fn open_file(&self, handle: u64) -> Result<Rc<OpenFile>> {
        self.open_files.borrow().get(&handle).cloned().ok_or(Errno::EBADF)
    }

    /// Has the kernel drop its pages of a range; returns when that is done.
    pub(crate) async fn invalidate_kernel(self: &Rc<Self>, ino: Ino, range: Range) {
        if self.mutated("no_kernel_invalidation") {
            return;
        }
        let receiver: Receiver<()> = {
            let invalidations = self.invalidations.borrow();
            let Some(thread) = invalidations.as_ref() else { return };
            let number = self.number();
            let (sender, receiver) = oneshot();
            self.waiting_invalidations.borrow_mut().insert(number, sender);
            if thread.send(Invalidation { number, ino, range }).is_err() {
                self.waiting_invalidations.borrow_mut().remove(&number);
                return;
            }
            receiver
        };
        receiver.await;
    }

    /// From the invalidation thread, by way of the core.
    pub fn invalidated(&self, number: u64) {
        let sender = self.waiting_invalidations.borrow_mut().remove(&number);
        if let Some(sender) = sender {
            sender.send(());
        }
    }

    /// Where invalidations go; set when a mount begins, `None` when it ends.
    pub fn set_kernel_cache(&self, thread: Option<std::sync::mpsc::Sender<Invalidation>>) {
        *self.invalidations.borrow_mut() = thread;
        // Whoever waits for the old thread goes on: there is no kernel cache any more.
        self.waiting_invalidations.borrow_mut().clear();
    }
}

pub(crate) fn is_writable(flags: i32) -> bool {
    flags & libc::O_ACCMODE != libc::O_RDONLY
}
