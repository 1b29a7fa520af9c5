//! A daemon: a node with its storage, its fabric, its mounts and the socket on which it answers.

use crate::cache::{CacheMemory, PageCache, PrivateMemory};
use crate::config::Config;
use crate::control::{
    self, CacheUse, ControlServer, LockEntry, LockList, Member, MemberState, MetricsServer, Mount, MountRequest,
    NodeState, Request, Response, Standing, Status, StorageUse, Top,
};
use crate::fabric;
use crate::frontend::Observer;
use crate::frontend::kernel_cache::FuseKernelCache;
use crate::frontend::mount::{self, MountOptions, Mounted};
use crate::metrics::{FuseOperation, Metrics};
use crate::node::{CoreThread, NodeHandle};
use crate::topology::Topology;
use crate::transport::{FabricTransport, RegisteredMemory};
use crate::volume::{Foundations, Volume, VolumeOptions};
use anyhow::{Context, bail};
use parking_lot::Mutex;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use verbfs_arena::{Arena, ArenaOptions, ExtentTable};
use verbfs_namespace::{Store, StoreOptions};
use verbfs_protocol::{Class, Ino, LockSpace, Node, PAGE_SIZE, Range, Resource, Slot};
use verbfs_rdma::Incarnation;

/// Lock ranges one node holds at most.
const MAXIMUM_GRANTS: usize = 100_000;
/// Lock entries one answer holds at most.
const LISTED_LOCKS_MAX: usize = 10_000;
/// How long programs that use a mount are waited for before a stop or an unmount is refused.
const USERS_PATIENCE: Duration = Duration::from_secs(5);
/// How long a stopping daemon tries to write back and to leave in good order.
const STOP_LIMIT: Duration = Duration::from_secs(60);

struct MountedHere {
    mounted: Mounted,
    directory: PathBuf,
}

struct Inner {
    config: Config,
    slot: Slot,
    incarnation: u32,
    /// The provider, and why it was chosen.
    fabric: String,
    hostname: String,
    started: Instant,
    node: NodeHandle,
    metrics: Arc<Metrics>,
    mounts: Mutex<Vec<MountedHere>>,
    stopping: std::sync::atomic::AtomicBool,
    mutations_allowed: bool,
}

/// A running daemon. Dropping it without [`Daemon::stop`] unmounts, but writes nothing back.
pub struct Daemon {
    inner: Arc<Inner>,
    core: Option<CoreThread>,
    control: Option<ControlServer>,
    _metrics_server: Option<MetricsServer>,
    stop_requested: std::sync::mpsc::Receiver<()>,
}

/// Reads a counter of the store, adds one, stores it: incarnations only ever grow.
fn next_incarnation(store: &mut Store, key: &str) -> Result<u32, verbfs_namespace::Error> {
    store.write(|txn| {
        let last = txn.meta(key)?.and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_le_bytes);
        txn.put_meta(key, &(last + 1).to_le_bytes())?;
        Ok(last + 1)
    })
}

/// Makes a directory that only root can enter, and what is missing above it.
fn private_directory(directory: &Path) -> std::io::Result<()> {
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)
}

/// The store must be this cluster's and this slot's.
fn check_identity(store: &mut Store, directory: &Path, config: &Config, slot: Slot) -> anyhow::Result<()> {
    let identity = format!("{}/{slot}", config.cluster);
    let found = store.read(|txn| txn.meta("identity"))?;
    match found {
        None => Ok(store.write(|txn| txn.put_meta("identity", identity.as_bytes()))?),
        Some(found) if found == identity.as_bytes() => Ok(()),
        Some(found) => bail!(
            "{} belongs to {}, not to {identity}: set directories.data to another place, or move it away",
            directory.display(),
            String::from_utf8_lossy(&found)
        ),
    }
}

/// Counts the requests of a mount.
struct RequestMetrics(Arc<Metrics>);

impl Observer for RequestMetrics {
    fn arrived(&self, _operation: &'static str) {
        self.0.requests_in_flight.add(1);
    }
    fn observe(&self, operation: &'static str, nanoseconds: u64) {
        self.0.requests_in_flight.add(-1);
        self.0.request[operation_label(operation)].record_nanoseconds(nanoseconds);
    }
}

impl Daemon {
    /// Opens storage and fabric and starts to serve; mounts nothing yet.
    ///
    /// # Errors
    /// What could not be opened, with what to do about it.
    pub fn start(config: Config, slot: Slot) -> anyhow::Result<Daemon> {
        let metrics = Arc::new(Metrics::new());
        let data = config.data_directory(slot);
        // Names, attributes and bytes of all users' files lie there. A looser mode that somebody chose for it stays.
        private_directory(&data).with_context(|| format!("node {slot}: cannot make {}", data.display()))?;
        private_directory(&config.runtime_directory())
            .with_context(|| format!("node {slot}: cannot make {}", config.runtime_directory().display()))?;
        let mut store = Store::open(&data.join("store"), StoreOptions::default())
            .with_context(|| format!("node {slot}: cannot open the store in {}", data.display()))?;
        let committed = metrics.clone();
        store.observe_commits(Box::new(move |time| {
            committed.transactions.increment();
            committed.transaction.record(time);
        }));
        check_identity(&mut store, &data, &config, slot)?;
        let node_incarnation = next_incarnation(&mut store, "node-incarnation")?;
        let daemon_incarnation = next_incarnation(&mut store, "daemon-incarnation")?;
        let arena_path = data.join("arena");
        let arena = Arena::open(&arena_path, config.storage.arena_size.0, ArenaOptions::default())
            .with_context(|| format!("node {slot}: cannot open the arena {}", arena_path.display()))?;
        let arena_file = arena.file().try_clone()?;
        let arena_length = arena.len() as usize;
        let extents =
            ExtentTable::load(&store, arena).with_context(|| format!("node {slot}: arena and store disagree"))?;

        let members: Vec<Slot> = {
            let mut members: Vec<Slot> = config.nodes.iter().map(|node| node.slot).collect();
            members.sort_unstable();
            members
        };
        let cache_length = config.cache.size.0 as usize / PAGE_SIZE as usize * PAGE_SIZE as usize;
        let mut transport: Option<Box<dyn crate::volume::Transport>> = None;
        let (mut arena_key, mut cache_key) = (0, 0);
        let memory: Box<dyn CacheMemory>;
        let mut fabric_description = "none (one node)".to_string();
        if members.len() > 1 {
            let incarnation = Incarnation { node: node_incarnation, daemon: daemon_incarnation };
            let opened = fabric::open(&config, slot, incarnation)?;
            fabric_description = opened.description;
            let mut endpoint = opened.endpoint;
            let cache_region = endpoint
                .register_memory(cache_length)
                .with_context(|| format!("node {slot}: cannot register a page cache of {cache_length} bytes"))?;
            let arena_region = endpoint
                .register_file(&arena_file, arena_length)
                .with_context(|| format!("node {slot}: cannot register the arena"))?;
            arena_key = arena_region.key().0;
            cache_key = cache_region.key().0;
            // One that this configuration does not list would be answered by nobody here, and wait for ever.
            endpoint.admit_only(&members);
            endpoint.listen().with_context(|| {
                format!("node {slot}: cannot listen at {}; is another daemon of this slot running?", opened.place)
            })?;
            memory = Box::new(RegisteredMemory(cache_region.clone()));
            let peers = members.iter().copied().filter(|member| *member != slot);
            transport = Some(Box::new(FabricTransport::new(endpoint, cache_region, peers, metrics.clone())));
        } else {
            memory = Box::new(PrivateMemory::new(cache_length)?);
        }
        let dirty_limit = (config.dirty_bytes() / PAGE_SIZE) as usize;
        let options = VolumeOptions {
            me: Node { slot, incarnation: node_incarnation },
            daemon_incarnation,
            members,
            chunk_pages: (config.storage.chunk_size.0 / PAGE_SIZE) as u32,
            width: config.storage.width as usize,
            dirty_background: dirty_limit / 2,
            dirty_limit: dirty_limit.max(512),
            peer_timeout: config.membership.peer_timeout.0,
            maximum_grants: MAXIMUM_GRANTS,
            hand_over: config.locks.hand_over,
            minimum_hold: config.locks.minimum_hold.0.as_millis() as u64,
        };
        let node = {
            let metrics = metrics.clone();
            NodeHandle::new(move || {
                let foundations = Foundations {
                    store,
                    extents,
                    arena_key,
                    cache: PageCache::new(memory),
                    cache_key,
                    transport,
                    metrics,
                };
                let volume = Volume::new(options, foundations);
                volume.make_root(0o755, 0, 0).map(|()| volume)
            })
            .map_err(|error| anyhow::anyhow!("node {slot}: cannot make the root directory: {error}"))?
        };
        let mutations_allowed = std::env::var_os("VERBFS_ALLOW_MUTATIONS").is_some_and(|value| value == "1");
        if let (true, Ok(name)) = (mutations_allowed, std::env::var("VERBFS_MUTATION"))
            && !node.enter(|volume| volume.mutations.borrow_mut().set(&name, true))
        {
            bail!("VERBFS_MUTATION={name}: no mutation is called so");
        }
        let core = node.start()?;
        node.enter(|volume| volume.reap_orphans());
        let hostname = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let inner = Arc::new(Inner {
            slot,
            incarnation: node_incarnation,
            fabric: fabric_description,
            hostname,
            started: Instant::now(),
            node,
            metrics: metrics.clone(),
            mounts: Mutex::default(),
            stopping: Default::default(),
            mutations_allowed,
            config,
        });
        let (stop_sender, stop_requested) = std::sync::mpsc::channel();
        let control = {
            let inner = inner.clone();
            let stop_sender = Mutex::new(stop_sender);
            let socket = inner.config.control_socket(slot);
            ControlServer::start(&socket, move |request| inner.answer(request, &stop_sender))
                .with_context(|| format!("node {slot}: cannot answer at {}", socket.display()))?
        };
        let metrics_server = match &inner.config.metrics.listen {
            None => None,
            Some(listen) => {
                let inner = inner.clone();
                Some(
                    MetricsServer::start(listen, move || inner.prometheus())
                        .with_context(|| format!("node {slot}: cannot serve metrics"))?,
                )
            }
        };
        Ok(Daemon { inner, core: Some(core), control: Some(control), _metrics_server: metrics_server, stop_requested })
    }

    pub fn node(&self) -> &NodeHandle {
        &self.inner.node
    }

    /// Mounts the volume; returns when the mount answers.
    pub fn mount(&self, request: &MountRequest) -> anyhow::Result<()> {
        self.inner.mount(request)
    }

    /// Waits until somebody asks for the end through the control socket, at most `limit`. True when asked.
    pub fn wait_for_stop(&self, limit: Duration) -> bool {
        self.stop_requested.recv_timeout(limit).is_ok()
    }

    /// Unmounts, writes back, gives up every lock, leaves.
    pub fn stop(mut self) -> anyhow::Result<()> {
        self.inner.stopping.store(true, std::sync::atomic::Ordering::Release);
        let mut outcome = Ok(());
        for here in std::mem::take(&mut *self.inner.mounts.lock()) {
            if let Err(error) = here.mounted.unmount() {
                outcome = Err(anyhow::Error::from(error).context(format!(
                    "node {}: {} stays mounted",
                    self.inner.slot,
                    here.directory.display()
                )));
            }
        }
        self.inner.node.detach_kernel_cache();
        let left = self.inner.node.block_on(|volume| async move { volume.leave(STOP_LIMIT).await });
        if !left {
            outcome = Err(anyhow::anyhow!(
                "node {}: not everything could be written back within {} s",
                self.inner.slot,
                STOP_LIMIT.as_secs()
            ));
        }
        drop(self.core.take());
        drop(self.control.take());
        outcome
    }
}

impl Inner {
    fn mount(&self, request: &MountRequest) -> anyhow::Result<()> {
        if request.options.read_only || request.options.stock_mmap {
            bail!("node {}: read-only mounts and cached opens are not built into this version", self.slot);
        }
        let mut mounts = self.mounts.lock();
        mounts.retain(|here| !here.mounted.is_gone());
        if !mounts.is_empty() {
            bail!("node {}: already mounted at {}", self.slot, mounts[0].directory.display());
        }
        let threads = match self.config.threads.fuse {
            0 => Topology::discover().fuse_threads(),
            threads => threads as usize,
        };
        let options = MountOptions {
            source: control::mount_source(&self.config.control_socket(self.slot)),
            threads,
            ..MountOptions::default()
        };
        let cache = FuseKernelCache::default();
        let observer = Arc::new(RequestMetrics(self.metrics.clone()));
        let mounted = mount::mount(self.node.clone(), &request.directory, &options, &cache, observer)
            .with_context(|| format!("node {}: cannot mount at {}", self.slot, request.directory.display()))?;
        self.node.attach_kernel_cache(Arc::new(cache))?;
        mounts.push(MountedHere { mounted, directory: request.directory.clone() });
        Ok(())
    }

    fn unmount(&self, directory: &Path) -> anyhow::Result<()> {
        let mut mounts = self.mounts.lock();
        let Some(index) = mounts.iter().position(|here| here.directory == directory) else {
            bail!("node {}: nothing is mounted at {}", self.slot, directory.display());
        };
        let here = mounts.swap_remove(index);
        here.mounted.unmount()?;
        self.node.detach_kernel_cache();
        Ok(())
    }

    /// Waits a while for programs to leave the mounts (one of them), and names those that do not. The close of a file arrives
    /// after close(2) has returned, so whoever has just ended may still be counted.
    ///
    /// # Errors
    /// Somebody is still there; `or_else` ends the advice.
    fn wait_for_users(&self, only: Option<&Path>, or_else: &str) -> anyhow::Result<()> {
        let directories: Vec<PathBuf> = {
            let mounts = self.mounts.lock();
            let here = mounts.iter().filter(|here| !here.mounted.is_gone()).map(|here| here.directory.clone());
            here.filter(|directory| only.is_none_or(|only| only == directory)).collect()
        };
        let began = Instant::now();
        loop {
            let users: Vec<String> = directories.iter().flat_map(|directory| mount::users(directory)).collect();
            let open = if directories.is_empty() { 0 } else { self.node.enter(|volume| volume.open_handles()) };
            if users.is_empty() && open == 0 {
                return Ok(());
            }
            if began.elapsed() >= USERS_PATIENCE {
                let who = if users.is_empty() { format!("{open} open files") } else { users.join(", ") };
                let of =
                    directories.iter().map(|directory| directory.display().to_string()).collect::<Vec<_>>().join(", ");
                bail!("node {}: {of} is in use by {who}: end these programs, {or_else}", self.slot);
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn answer(&self, request: Request, stop: &Mutex<std::sync::mpsc::Sender<()>>) -> Response {
        let done = |outcome: anyhow::Result<()>| match outcome {
            Ok(()) => Response::Done,
            Err(error) => Response::Error { message: format!("{error:#}") },
        };
        match request {
            Request::Status => Response::Status(self.status()),
            Request::Locks(request) => Response::Locks(self.locks(request.ino)),
            Request::Metrics => Response::Metrics { text: self.prometheus() },
            Request::Top => {
                self.update_gauges();
                Response::Top(Top {
                    cluster: self.config.cluster.clone(),
                    slot: self.slot,
                    snapshot: self.metrics.snapshot(self.started.elapsed()),
                })
            }
            Request::Mount(request) => done(self.mount(&request)),
            Request::Unmount { directory } => {
                done(self.wait_for_users(Some(&directory), "then try again").and_then(|()| self.unmount(&directory)))
            }
            Request::Stop { force } => {
                if !force && let Err(error) = self.wait_for_users(None, "or stop it with --force, which cuts them off")
                {
                    return done(Err(error));
                }
                // The main thread waits for it; if it is gone, the daemon is ending already.
                let _ = stop.lock().send(());
                Response::Done
            }
            Request::SetMutation { name } => {
                if !self.mutations_allowed {
                    return Response::Error {
                        message: format!(
                            "node {}: mutations are for tests: start the daemon with VERBFS_ALLOW_MUTATIONS=1",
                            self.slot
                        ),
                    };
                }
                let known = self.node.enter(|volume| {
                    let mut mutations = volume.mutations.borrow_mut();
                    if name == "none" {
                        *mutations = Default::default();
                        true
                    } else {
                        mutations.set(&name, true)
                    }
                });
                if known {
                    Response::Done
                } else {
                    Response::Error { message: format!("node {}: no mutation is called {name:?}", self.slot) }
                }
            }
        }
    }

    fn status(&self) -> Status {
        let report = self.node.enter(|volume| volume.report());
        let members = self
            .config
            .nodes
            .iter()
            .map(|node| {
                let peer = report.peers.iter().find(|peer| peer.slot == node.slot);
                let state = match peer {
                    None => MemberState::Own,
                    Some(peer) if peer.connected => MemberState::Connected,
                    Some(peer)
                        if peer.incarnation.is_none()
                            && peer.gone_for.is_none_or(|gone| gone < self.config.membership.peer_timeout.0) =>
                    {
                        MemberState::Connecting
                    }
                    Some(peer) if peer.incarnation.is_none() => MemberState::Absent,
                    Some(_) => MemberState::Silent,
                };
                Member {
                    slot: node.slot,
                    address: node.address.clone(),
                    incarnation: peer.map_or(Some(self.incarnation), |peer| peer.incarnation),
                    state,
                    silent_milliseconds: peer.and_then(|peer| peer.gone_for).map(|gone| gone.as_millis() as u64),
                }
            })
            .collect();
        let state = if self.stopping.load(std::sync::atomic::Ordering::Acquire) {
            NodeState::Stopping
        } else if report.peers.iter().all(|peer| peer.connected) {
            NodeState::Serving
        } else {
            NodeState::Joining
        };
        let mounts = self.mounts.lock();
        Status {
            cluster: self.config.cluster.clone(),
            slot: self.slot,
            incarnation: self.incarnation,
            hostname: self.hostname.clone(),
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").into(),
            fabric: self.fabric.clone(),
            state,
            uptime_seconds: self.started.elapsed().as_secs(),
            view: 1,
            members,
            mounts: mounts
                .iter()
                .map(|here| Mount {
                    directory: here.directory.clone(),
                    front_end: "stock".into(),
                    read_only: false,
                    requests_in_flight: self.metrics.requests_in_flight.get().max(0) as u64,
                })
                .collect(),
            storage: StorageUse {
                bytes: report.arena_pages * PAGE_SIZE,
                used: report.arena_used * PAGE_SIZE,
                reserved: report.arena_reserved * PAGE_SIZE,
                inodes: report.inodes,
            },
            cache: CacheUse {
                bytes: report.cache_pages * PAGE_SIZE,
                used: report.cache_used * PAGE_SIZE,
                dirty: report.cache_dirty * PAGE_SIZE,
            },
            locks_held: report.locks_held,
            locks_granted: report.locks_granted,
            lock_waiters: report.lock_waiters,
            metrics: self.config.metrics.listen.as_ref().map(|listen| listen.to_string()),
        }
    }

    fn update_gauges(&self) {
        let report = self.node.enter(|volume| volume.report());
        let metrics = &self.metrics;
        metrics.locks_held.set(report.locks_held as i64);
        metrics.lock_grants_live.set(report.locks_granted as i64);
        metrics.lock_waiters.set(report.lock_waiters as i64);
        metrics.file_lock_waiters.set(report.file_lock_waiters as i64);
        metrics.cache_evictions.raise_to(report.cache_evictions);
        metrics.messages_resent.raise_to(report.transport.messages_resent);
        metrics.credit_stalls.raise_to(report.transport.credit_stalls);
        metrics.arena_reserved_bytes.set((report.arena_reserved * PAGE_SIZE) as i64);
        metrics.cache_pages.set(report.cache_used as i64);
        metrics.cache_dirty_pages.set(report.cache_dirty as i64);
        metrics.arena_bytes.set((report.arena_pages * PAGE_SIZE) as i64);
        metrics.arena_used_bytes.set((report.arena_used * PAGE_SIZE) as i64);
        metrics.inodes.set(report.inodes as i64);
        metrics.view.set(1);
        metrics.members.set(1 + report.peers.iter().filter(|peer| peer.connected).count() as i64);
    }

    fn prometheus(&self) -> String {
        self.update_gauges();
        self.metrics.to_prometheus()
    }

    /// Locks of one inode, on all its servers; or all that this node's server has.
    fn locks(&self, ino: Option<u64>) -> LockList {
        let mut list = LockList { ino, ..LockList::default() };
        let listed = match ino {
            Some(ino) => {
                list.home = Some(Ino(ino).home());
                self.node.block_on(move |volume| async move { volume.describe_inode(Ino(ino)).await })
            }
            None => self.node.enter(|volume| volume.describe_all()),
        };
        list.unreachable = listed.unreachable;
        for item in listed.locks {
            if list.entries.len() >= LISTED_LOCKS_MAX {
                list.truncated = true;
                break;
            }
            list.entries.push(self.lock_entry(item.resource, item.holder, item.waits));
        }
        for (lock, space, waits) in listed.file_locks {
            let flock = space == LockSpace::Flock;
            list.entries.push(LockEntry {
                ino: ino.unwrap_or(0),
                class: if flock { "flock" } else { "fcntl" }.into(),
                server: Ino(ino.unwrap_or(0)).home(),
                start: lock.start,
                end: if lock.end >= i64::MAX as u64 { None } else { Some(lock.end + 1) },
                mode: if lock.kind == verbfs_protocol::FileLockKind::Write { "write" } else { "read" }.into(),
                standing: if waits { Standing::Waits } else { Standing::Holds },
                state: if waits { "waiting" } else { "granted" }.into(),
                node: lock.owner.slot,
                host: None,
                pid: (lock.owner.pid != 0).then_some(lock.owner.pid),
                command: (lock.owner.slot == self.slot).then(|| command_of(lock.owner.pid)).flatten(),
                age_milliseconds: None,
            });
        }
        list
    }

    fn lock_entry(&self, resource: Resource, holder: verbfs_protocol::Holder, waits: bool) -> LockEntry {
        let unit = if resource.class == Class::Data { PAGE_SIZE } else { 1 };
        let whole = matches!(resource.class, Class::Open | Class::Attr | Class::Rename);
        LockEntry {
            ino: resource.ino.0,
            class: format!("{:?}", resource.class).to_lowercase(),
            server: resource.server,
            start: holder.range.lo.saturating_mul(unit),
            end: if whole || holder.range.hi == Range::ALL.hi {
                None
            } else {
                Some(holder.range.hi.saturating_mul(unit))
            },
            mode: format!("{:?}", holder.mode),
            standing: if waits { Standing::Waits } else { Standing::Holds },
            state: holder.state,
            node: holder.slot,
            host: self.config.nodes.iter().find(|node| node.slot == holder.slot).map(|node| node.host_name()),
            pid: None,
            command: None,
            age_milliseconds: None,
        }
    }
}

/// The command of a process of this host.
fn command_of(pid: u32) -> Option<String> {
    std::fs::read_to_string(format!("/proc/{pid}/comm")).ok().map(|name| name.trim_end().to_string())
}

/// The label of a request's latency.
fn operation_label(operation: &str) -> FuseOperation {
    let name = match operation {
        "read_page_cache" => "read",
        "write_page_cache" => "write",
        other => other,
    };
    let values = <FuseOperation as crate::metrics::Label>::VALUES;
    values.iter().position(|value| *value == name).map_or(FuseOperation::Other, |index| FuseOperation::ALL[index])
}
