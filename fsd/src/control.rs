//! How `verbfs status`, `locks`, `top` and their like talk to a running daemon.
//!
//! A Unix socket in the runtime directory, one JSON [`Request`] per line, one JSON [`Response`] line
//! back; any number of them per connection. Only root and the daemon's own user are served: the
//! socket has mode 0600, and the kernel's word on who connected is checked as well.
//!
//! [`ControlServer`] runs in threads of its own and hands every request to one closure, which may take
//! its time: each connection has its thread, at most [`MAX_CONNECTIONS`] at once.
//!
//! [`MetricsServer`] answers `GET /metrics` over TCP or a Unix socket for Prometheus, and nothing else.

use crate::{config::Listen, metrics::Snapshot};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::{
    io::{self, BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    os::unix::{
        fs::{FileTypeExt, MetadataExt, PermissionsExt},
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    thread::JoinHandle,
    time::Duration,
};

/// Connections served at once; people and scripts, not programs, sit at the other end.
pub const MAX_CONNECTIONS: usize = 32;
/// Longest request line in bytes: a path of 4096 bytes, every one escaped, and the rest.
pub const MAX_REQUEST: u64 = 32 << 10;
/// Longest response line in bytes: the locks of a large table.
pub const MAX_RESPONSE: u64 = 256 << 20;
/// A client that sends nothing for this long is disconnected.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(60);
/// Sending a response may take this long.
const SEND_TIMEOUT: Duration = Duration::from_secs(10);
/// A scrape must send its request, and take the answer, within this.
const SCRAPE_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest head of a scrape's HTTP request, in bytes.
const MAX_HTTP_HEAD: u64 = 16 << 10;

/// What a daemon can be asked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Who the daemon is and how it is doing.
    Status,
    /// Who holds and waits for the locks of a file, or of everything this node serves.
    Locks(LocksRequest),
    /// The metrics as Prometheus text.
    Metrics,
    /// The metrics as values, for rates.
    Top,
    /// Mount the volume at a directory of this host.
    Mount(MountRequest),
    /// Unmount one of this daemon's mounts.
    Unmount { directory: PathBuf },
    /// Write back, unmount, leave the cluster, end. Answered before the daemon ends.
    Stop {
        /// Unmount even while files are open there.
        force: bool,
    },
    /// Switch off one safeguard by name (`none`: all on again). Builds for tests only; others refuse.
    SetMutation { name: String },
}

/// Which locks to tell of.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LocksRequest {
    /// The inode, as `stat` shows it on a mount. `None`: every lock this node's server has.
    pub ino: Option<u64>,
}

/// Where and how to mount.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MountRequest {
    pub directory: PathBuf,
    pub options: MountOptions,
}

/// How to mount.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MountOptions {
    pub read_only: bool,
    /// Cached opens for shared mappings on kernels before 6.6, with the weaknesses that documentation names.
    pub stock_mmap: bool,
}

/// What a daemon answers. Which one fits which request: [`Request::answers`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "response", rename_all = "snake_case")]
pub enum Response {
    Status(Status),
    Locks(LockList),
    Metrics {
        text: String,
    },
    Top(Top),
    /// It was done.
    Done,
    /// It was not: what failed, on which node, what to do.
    Error {
        message: String,
    },
}

impl Request {
    /// Whether `response` is of the kind that answers this request.
    pub fn answers(&self, response: &Response) -> bool {
        matches!(
            (self, response),
            (_, Response::Error { .. })
                | (Request::Status, Response::Status(_))
                | (Request::Locks(_), Response::Locks(_))
                | (Request::Metrics, Response::Metrics { .. })
                | (Request::Top, Response::Top(_))
                | (
                    Request::Mount(_) | Request::Unmount { .. } | Request::Stop { .. } | Request::SetMutation { .. },
                    Response::Done
                )
        )
    }

    /// How long a client waits for the answer. Stopping writes back everything that is dirty.
    pub fn timeout(&self) -> Duration {
        match self {
            Request::Stop { .. } => Duration::from_secs(240),
            Request::Mount(_) | Request::Unmount { .. } => Duration::from_secs(60),
            _ => Duration::from_secs(15),
        }
    }
}

/// How a daemon is doing.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Status {
    pub cluster: String,
    pub slot: u16,
    pub incarnation: u32,
    pub hostname: String,
    pub pid: u32,
    /// Version of the program.
    pub version: String,
    /// `shm` or `verbs`.
    pub fabric: String,
    pub state: NodeState,
    pub uptime_seconds: u64,
    /// Number of the membership view.
    pub view: u64,
    /// Every configured node, by slot.
    pub members: Vec<Member>,
    pub mounts: Vec<Mount>,
    pub storage: StorageUse,
    pub cache: CacheUse,
    /// Ranges this node has locked.
    pub locks_held: u64,
    /// Grants in this node's server tables.
    pub locks_granted: u64,
    /// Requests that wait there.
    pub lock_waiters: u64,
    /// Where Prometheus is answered.
    pub metrics: Option<String>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NodeState {
    /// Connecting to the others; calls wait.
    #[default]
    Joining,
    /// In the view, with a valid lease.
    Serving,
    /// Its lease lapsed; nothing is served from cache.
    Suspended,
    /// Out of the view; calls get EIO.
    Evicted,
    /// Writing back and leaving.
    Stopping,
}

/// Another node, or this one, as this one sees it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Member {
    pub slot: u16,
    pub address: String,
    pub incarnation: Option<u32>,
    pub state: MemberState,
    /// Since its last message. `None` for this node and for nodes never heard of.
    pub silent_milliseconds: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MemberState {
    Own,
    Connected,
    Connecting,
    /// Silent for longer than the peer timeout.
    Silent,
    Evicted,
    /// Not one life of it is known: never seen, or its last one has ended.
    Absent,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Mount {
    pub directory: PathBuf,
    /// `stock` or `kernel`.
    pub front_end: String,
    pub read_only: bool,
    /// Requests of the kernel not yet answered.
    pub requests_in_flight: u64,
}

/// Bytes of this node's arena, and its inodes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StorageUse {
    pub bytes: u64,
    pub used: u64,
    /// Promised to writers and not yet allocated.
    pub reserved: u64,
    pub inodes: u64,
}

/// Bytes of this node's page cache.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CacheUse {
    pub bytes: u64,
    pub used: u64,
    pub dirty: u64,
}

/// The locks of a file or a server.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LockList {
    /// The file asked for.
    pub ino: Option<u64>,
    /// A path of it, where one is known.
    pub path: Option<PathBuf>,
    /// Slot of the node that keeps its attributes.
    pub home: Option<u16>,
    pub entries: Vec<LockEntry>,
    /// Nodes that were asked and did not answer, each with the reason: their locks are missing from `entries`.
    #[serde(default)]
    pub unreachable: Vec<(u16, String)>,
    /// There were more entries than were sent.
    #[serde(default)]
    pub truncated: bool,
}

/// One lock, held or waited for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LockEntry {
    pub ino: u64,
    /// `rename`, `name`, `open`, `attr` or `data` for locks of nodes; `fcntl` or `flock` for locks of programs.
    pub class: String,
    /// Slot of the server.
    pub server: u16,
    /// First of the range: a byte for `data` and `fcntl`, a hash for `name`.
    pub start: u64,
    /// End of the range, not part of it. `None`: to the end of the file, or everything.
    pub end: Option<u64>,
    /// `S`, `X` or `E`; `read` or `write` for programs.
    pub mode: String,
    pub standing: Standing,
    /// The server's or the client's word for what it is doing: `granted`, `revoking`, `handing`, `asked`, ...
    pub state: String,
    /// Slot of the node that holds or waits.
    pub node: u16,
    pub host: Option<String>,
    /// The process, where the lock or the wait belongs to one.
    pub pid: Option<u32>,
    /// Its command.
    pub command: Option<String>,
    /// Since it was granted or asked for, where that is known.
    pub age_milliseconds: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Standing {
    Holds,
    Waits,
}

/// A snapshot to compute rates from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Top {
    pub cluster: String,
    pub slot: u16,
    pub snapshot: Snapshot,
}

/// Why a daemon could not be asked, or did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    #[error("no verbfs daemon answers at {socket}: {error}; start one with `verbfs start`")]
    Unreachable { socket: PathBuf, error: io::Error },
    #[error("the verbfs daemon at {socket} is for root only: run this as root")]
    Forbidden { socket: PathBuf },
    #[error("the verbfs daemon at {socket} did not answer within {seconds} s; `verbfs status` shows whether it lives")]
    Timeout { socket: PathBuf, seconds: u64 },
    #[error(
        "the verbfs daemon at {socket} closed the connection without an answer: it ended, or it is of another version"
    )]
    Closed { socket: PathBuf },
    #[error(
        "the verbfs daemon at {socket} answered what this program does not understand ({problem}): is it of another version?"
    )]
    Nonsense { socket: PathBuf, problem: String },
    #[error("lost the connection to the verbfs daemon at {socket}: {error}")]
    Lost { socket: PathBuf, error: io::Error },
    /// The daemon's own words.
    #[error("{0}")]
    Refused(String),
}

// --- the server ----------------------------------------------------------------------------------

/// Answers requests until it is dropped, which removes the socket and waits for answers under way to be sent.
pub struct ControlServer {
    socket: PathBuf,
    /// Of the socket's file, so that dropping removes no other daemon's.
    inode: u64,
    acceptor: Acceptor,
}

impl ControlServer {
    /// Listens at `socket`, whose directory is made (mode 0700) if need be, and has `handler` answer what comes.
    /// What is left of a dead daemon's socket is removed. `handler` is called from several threads at once.
    ///
    /// # Errors
    /// [`io::ErrorKind::AddrInUse`] when a living daemon answers there; else what the system says, naming the path.
    pub fn start(
        socket: &Path,
        handler: impl Fn(Request) -> Response + Send + Sync + 'static,
    ) -> io::Result<ControlServer> {
        let listener = bind_unix(socket)?;
        let inode = std::fs::symlink_metadata(socket)?.ino();
        let own_user = rustix::process::geteuid();
        let wake = {
            let socket = socket.to_path_buf();
            move || drop(UnixStream::connect(&socket))
        };
        let acceptor = Acceptor::start(
            "verbfs-control",
            move || listener.accept().map(|(stream, _)| stream),
            move |stream: UnixStream, closing: &AtomicBool| {
                let user = match rustix::net::sockopt::socket_peercred(&stream) {
                    Ok(credentials) => credentials.uid,
                    Err(error) => {
                        tracing::warn!(%error, "cannot tell who connected to the control socket");
                        return;
                    }
                };
                if !user.is_root() && user != own_user {
                    tracing::warn!(user = user.as_raw(), "refused a control connection: not root");
                    refuse(&stream, "the control socket is for root only");
                    return;
                }
                serve(stream, &handler, closing);
            },
            wake,
        )?;
        Ok(ControlServer { socket: socket.into(), inode, acceptor })
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        self.acceptor.stop();
        remove_own_socket(&self.socket, self.inode);
    }
}

fn remove_own_socket(socket: &Path, inode: u64) {
    if std::fs::symlink_metadata(socket).is_ok_and(|metadata| metadata.ino() == inode) {
        let _ = std::fs::remove_file(socket);
    }
}

/// Binds a Unix socket of mode 0600, in place of one that nobody listens at any more.
fn bind_unix(socket: &Path) -> io::Result<UnixListener> {
    let naming =
        |error: io::Error| io::Error::new(error.kind(), format!("cannot listen at {}: {error}", socket.display()));
    if let Some(directory) = socket.parent()
        && !directory.exists()
    {
        use std::os::unix::fs::DirBuilderExt;
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(naming)?;
    }
    match std::fs::symlink_metadata(socket) {
        Err(_) => {}
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(naming(io::Error::new(io::ErrorKind::AlreadyExists, "a file that is not a socket lies there")));
        }
        Ok(_) => match UnixStream::connect(socket) {
            Ok(_) => {
                let text = "another daemon answers there; stop it with `verbfs stop`, or give this one another slot";
                return Err(naming(io::Error::new(io::ErrorKind::AddrInUse, text)));
            }
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                std::fs::remove_file(socket).map_err(naming)?;
            }
            Err(error) => return Err(naming(error)),
        },
    }
    let listener = UnixListener::bind(socket).map_err(naming)?;
    // Until here the directory kept others out, and afterwards the peer's credentials do as well.
    std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600)).map_err(naming)?;
    Ok(listener)
}

/// Answers the lines of one connection.
fn serve(stream: UnixStream, handler: &(impl Fn(Request) -> Response + ?Sized), closing: &AtomicBool) {
    let setup = stream.set_read_timeout(Some(IDLE_TIMEOUT)).and(stream.set_write_timeout(Some(SEND_TIMEOUT)));
    let Ok(()) = setup else { return };
    let mut reader = BufReader::new(&stream);
    while !closing.load(SeqCst) {
        let response = match read_line(&mut reader, MAX_REQUEST) {
            Ok(None) => return,
            Ok(Some(line)) => match serde_json::from_slice::<Request>(&line) {
                Ok(request) => handler(request),
                Err(error) => Response::Error { message: format!("not a request this daemon understands: {error}") },
            },
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                refuse(&stream, &error.to_string());
                return;
            }
            Err(_) => return,
        };
        if let Err(error) = send(&stream, &response) {
            tracing::debug!(%error, "a control client left before its answer");
            return;
        }
    }
}

/// Says why, then hangs up. What the client had sent is read first: closing over it would take our words back.
fn refuse(stream: &UnixStream, message: &str) {
    const PATIENCE: Duration = Duration::from_secs(1);
    let limits = stream.set_read_timeout(Some(PATIENCE)).and(stream.set_write_timeout(Some(PATIENCE)));
    if limits.is_ok() && send(stream, &Response::Error { message: message.into() }).is_ok() {
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let _ = io::copy(&mut stream.take(MAX_REQUEST), &mut io::sink());
    }
}

fn send(mut stream: &UnixStream, message: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    stream.write_all(&line)
}

/// A line without its end; `None` at the end of the stream. A longer or an unfinished one is [`io::ErrorKind::InvalidData`].
fn read_line(reader: &mut impl BufRead, limit: u64) -> io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    reader.take(limit + 1).read_until(b'\n', &mut line)?;
    match line.pop() {
        None => Ok(None),
        Some(b'\n') => Ok(Some(line)),
        Some(_) if line.len() as u64 >= limit => {
            Err(io::Error::new(io::ErrorKind::InvalidData, format!("a line is longer than {limit} bytes")))
        }
        Some(_) => Err(io::Error::new(io::ErrorKind::InvalidData, "the line is incomplete")),
    }
}

/// A thread that accepts, and one for every connection.
struct Acceptor {
    closing: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    wake: Box<dyn Fn() + Send + Sync>,
    /// Ends what still reads on open connections.
    hang_up: Arc<connections::Connections>,
}

/// Open connections, so that stopping can end those that only wait.
mod connections {
    use std::{collections::HashMap, net::Shutdown, os::unix::net::UnixStream, sync::Mutex};

    /// A stream whose reading side can be closed from another thread.
    pub trait HangUp: Send + 'static {
        fn twin(&self) -> std::io::Result<Box<dyn HangUp>>;
        fn hang_up(&self);
    }
    impl HangUp for UnixStream {
        fn twin(&self) -> std::io::Result<Box<dyn HangUp>> {
            Ok(Box::new(self.try_clone()?))
        }
        fn hang_up(&self) {
            let _ = self.shutdown(Shutdown::Read);
        }
    }
    impl HangUp for std::net::TcpStream {
        fn twin(&self) -> std::io::Result<Box<dyn HangUp>> {
            Ok(Box::new(self.try_clone()?))
        }
        fn hang_up(&self) {
            let _ = self.shutdown(Shutdown::Read);
        }
    }

    #[derive(Default)]
    pub struct Connections(Mutex<HashMap<usize, Box<dyn HangUp>>>);

    impl Connections {
        pub fn insert(&self, number: usize, stream: Box<dyn HangUp>) {
            self.0.lock().unwrap_or_else(|poison| poison.into_inner()).insert(number, stream);
        }
        pub fn remove(&self, number: usize) {
            self.0.lock().unwrap_or_else(|poison| poison.into_inner()).remove(&number);
        }
        pub fn hang_up(&self) {
            for stream in self.0.lock().unwrap_or_else(|poison| poison.into_inner()).values() {
                stream.hang_up();
            }
        }
    }
}

impl Acceptor {
    fn start<S: connections::HangUp>(
        name: &str,
        accept: impl Fn() -> io::Result<S> + Send + 'static,
        serve: impl Fn(S, &AtomicBool) + Send + Sync + 'static,
        wake: impl Fn() + Send + Sync + 'static,
    ) -> io::Result<Acceptor> {
        let closing = Arc::new(AtomicBool::new(false));
        let connections = Arc::new(connections::Connections::default());
        let thread = std::thread::Builder::new().name(name.into()).spawn({
            let (closing, connections, name) = (closing.clone(), connections.clone(), name.to_string());
            move || {
                let serve = Arc::new(serve);
                let live = Arc::new(AtomicUsize::new(0));
                let mut threads: Vec<JoinHandle<()>> = Vec::new();
                let mut number = 0;
                loop {
                    let accepted = accept();
                    if closing.load(SeqCst) {
                        break;
                    }
                    let stream = match accepted {
                        Ok(stream) => stream,
                        Err(error) => {
                            // Out of descriptors, for instance: do not spin on it.
                            tracing::warn!(%error, "cannot accept a connection for {name}");
                            std::thread::sleep(Duration::from_millis(100));
                            continue;
                        }
                    };
                    threads.retain(|thread| !thread.is_finished());
                    if live.load(SeqCst) >= MAX_CONNECTIONS {
                        tracing::warn!("refused a connection for {name}: {MAX_CONNECTIONS} are open");
                        continue;
                    }
                    let Ok(twin) = stream.twin() else { continue };
                    number += 1;
                    connections.insert(number, twin);
                    live.fetch_add(1, SeqCst);
                    let spawned = std::thread::Builder::new().name(name.clone()).spawn({
                        let (serve, live, closing) = (serve.clone(), live.clone(), closing.clone());
                        let connections = connections.clone();
                        move || {
                            /// Also when the handler panics.
                            struct Leave(Arc<AtomicUsize>, Arc<connections::Connections>, usize);
                            impl Drop for Leave {
                                fn drop(&mut self) {
                                    self.1.remove(self.2);
                                    self.0.fetch_sub(1, SeqCst);
                                }
                            }
                            let _leave = Leave(live, connections, number);
                            serve(stream, &closing);
                        }
                    });
                    match spawned {
                        Ok(thread) => threads.push(thread),
                        Err(error) => {
                            connections.remove(number);
                            live.fetch_sub(1, SeqCst);
                            tracing::warn!(%error, "cannot serve a connection for {name}");
                        }
                    }
                }
                connections.hang_up();
                for thread in threads {
                    let _ = thread.join();
                }
            }
        })?;
        Ok(Acceptor { closing, thread: Some(thread), wake: Box::new(wake), hang_up: connections })
    }

    /// Ends it and waits for answers under way. May be called from a handler's own thread: then it waits for nobody.
    fn stop(&mut self) {
        self.closing.store(true, SeqCst);
        (self.wake)();
        self.hang_up.hang_up();
        if let Some(thread) = self.thread.take() {
            let own = std::thread::current().name().map(str::to_string);
            if own.as_deref() != thread.thread().name() {
                let _ = thread.join();
            }
        }
    }
}

// --- the client ----------------------------------------------------------------------------------

/// Asks the daemon at `socket` and waits for its answer as long as [`Request::timeout`] says.
///
/// # Errors
/// [`ControlError::Refused`] with the daemon's words when it answers [`Response::Error`]; the others when it cannot be asked.
pub fn ask(socket: &Path, request: &Request) -> Result<Response, ControlError> {
    ask_within(socket, request, request.timeout())
}

/// As [`ask`], with a time limit of its own.
pub fn ask_within(socket: &Path, request: &Request, timeout: Duration) -> Result<Response, ControlError> {
    let path = || socket.to_path_buf();
    let stream = UnixStream::connect(socket).map_err(|error| match error.kind() {
        io::ErrorKind::PermissionDenied => ControlError::Forbidden { socket: path() },
        _ => ControlError::Unreachable { socket: path(), error },
    })?;
    let failed = |error: io::Error| match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
            ControlError::Timeout { socket: path(), seconds: timeout.as_secs() }
        }
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => ControlError::Closed { socket: path() },
        _ => ControlError::Lost { socket: path(), error },
    };
    let timeout = timeout.max(Duration::from_millis(1)); // zero would mean for ever
    stream.set_read_timeout(Some(timeout)).and(stream.set_write_timeout(Some(timeout))).map_err(failed)?;
    let sent = send(&stream, request);
    // A daemon that refuses says so before it hangs up: look for its words even where sending failed.
    let line = match (read_line(&mut BufReader::new(&stream), MAX_RESPONSE), sent) {
        (Ok(Some(line)), _) => line,
        (_, Err(error)) => return Err(failed(error)),
        (Ok(None), Ok(())) => return Err(ControlError::Closed { socket: path() }),
        (Err(error), Ok(())) if error.kind() == io::ErrorKind::InvalidData => {
            return Err(ControlError::Nonsense { socket: path(), problem: error.to_string() });
        }
        (Err(error), Ok(())) => return Err(failed(error)),
    };
    match decode(&line) {
        Err(problem) => Err(ControlError::Nonsense { socket: path(), problem }),
        Ok(Response::Error { message }) => Err(ControlError::Refused(message)),
        Ok(response) if request.answers(&response) => Ok(response),
        Ok(_) => Err(ControlError::Nonsense { socket: path(), problem: "the answer to another request".into() }),
    }
}

fn decode<T: DeserializeOwned>(line: &[u8]) -> Result<T, String> {
    serde_json::from_slice(line).map_err(|error| error.to_string())
}

// --- which daemon serves a mount ------------------------------------------------------------------

const MOUNT_SOURCE: &str = "verbfs:";

/// What the front end gives as source (`fsname`) of a mount, so that [`socket_of_path`] finds the daemon behind it.
pub fn mount_source(control_socket: &Path) -> String {
    format!("{MOUNT_SOURCE}{}", control_socket.display())
}

/// The control socket of the daemon that serves the mount on which `path` lies, and that mount's directory.
/// `None` when `path` is not on a verbfs mount of this host.
///
/// # Errors
/// When `path` cannot be resolved or the mounts cannot be read.
pub fn socket_of_path(path: &Path) -> io::Result<Option<(PathBuf, PathBuf)>> {
    let path = std::fs::canonicalize(path)?;
    Ok(find_mount(&std::fs::read_to_string("/proc/self/mountinfo")?, &path))
}

/// All verbfs mounts of this host: control socket and directory.
pub fn verbfs_mounts() -> io::Result<Vec<(PathBuf, PathBuf)>> {
    let table = std::fs::read_to_string("/proc/self/mountinfo")?;
    Ok(table.lines().filter_map(|line| Some((mounted_socket(line)?, mounted_directory(line)?))).collect())
}

fn mounted_directory(line: &str) -> Option<PathBuf> {
    line.split(' ').nth(4).map(unescape).map(PathBuf::from)
}

fn mounted_socket(line: &str) -> Option<PathBuf> {
    let (_, after) = line.split_once(" - ")?;
    let source = unescape(after.split(' ').nth(1)?);
    Some(PathBuf::from(source.strip_prefix(MOUNT_SOURCE)?))
}

/// The last mount of the longest directory above `path` hides the others.
fn find_mount(table: &str, path: &Path) -> Option<(PathBuf, PathBuf)> {
    let (line, directory) = table
        .lines()
        .filter_map(|line| Some((line, mounted_directory(line)?)))
        .filter(|(_, directory)| path.starts_with(directory))
        .max_by_key(|(_, directory)| directory.as_os_str().len())?;
    Some((mounted_socket(line)?, directory))
}

/// mountinfo writes blanks, tabs, line breaks and backslashes in octal.
fn unescape(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut plain = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let octal = bytes.get(at + 1..at + 4).and_then(|digits| std::str::from_utf8(digits).ok());
        match (bytes[at], octal.and_then(|digits| u8::from_str_radix(digits, 8).ok())) {
            (b'\\', Some(byte)) => {
                plain.push(byte);
                at += 4;
            }
            (byte, _) => {
                plain.push(byte);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&plain).into_owned()
}

// --- Prometheus ----------------------------------------------------------------------------------

/// Answers `GET /metrics` until it is dropped.
pub struct MetricsServer {
    acceptor: Acceptor,
    listen: Listen,
    unix_inode: Option<u64>,
}

impl MetricsServer {
    /// Listens at `listen` and answers with what `text` gives ([`crate::metrics::Metrics::to_prometheus`]).
    /// A Unix socket gets mode 0600.
    ///
    /// # Errors
    /// What the system says, naming the address.
    pub fn start(listen: &Listen, text: impl Fn() -> String + Send + Sync + 'static) -> io::Result<MetricsServer> {
        match listen {
            Listen::Tcp(address) => {
                let naming =
                    |error: io::Error| io::Error::new(error.kind(), format!("cannot listen at {listen}: {error}"));
                let listener = TcpListener::bind(address).map_err(naming)?;
                let bound = listener.local_addr().map_err(naming)?;
                let acceptor = Acceptor::start(
                    "verbfs-metrics",
                    move || listener.accept().map(|(stream, _)| stream),
                    move |stream: TcpStream, _: &AtomicBool| {
                        let limits = stream
                            .set_read_timeout(Some(SCRAPE_TIMEOUT))
                            .and(stream.set_write_timeout(Some(SCRAPE_TIMEOUT)));
                        if limits.is_ok() {
                            answer_scrape(&stream, &stream, &text);
                        }
                    },
                    move || {
                        let mut target = bound;
                        if target.ip().is_unspecified() {
                            target.set_ip(if target.is_ipv4() {
                                std::net::Ipv4Addr::LOCALHOST.into()
                            } else {
                                std::net::Ipv6Addr::LOCALHOST.into()
                            });
                        }
                        drop(TcpStream::connect_timeout(&target, Duration::from_secs(1)));
                    },
                )?;
                Ok(MetricsServer { acceptor, listen: Listen::Tcp(bound), unix_inode: None })
            }
            Listen::Unix(path) => {
                let listener = bind_unix(path)?;
                let inode = std::fs::symlink_metadata(path)?.ino();
                let wake = {
                    let path = path.clone();
                    move || drop(UnixStream::connect(&path))
                };
                let acceptor = Acceptor::start(
                    "verbfs-metrics",
                    move || listener.accept().map(|(stream, _)| stream),
                    move |stream: UnixStream, _: &AtomicBool| {
                        let limits = stream
                            .set_read_timeout(Some(SCRAPE_TIMEOUT))
                            .and(stream.set_write_timeout(Some(SCRAPE_TIMEOUT)));
                        if limits.is_ok() {
                            answer_scrape(&stream, &stream, &text);
                        }
                    },
                    wake,
                )?;
                Ok(MetricsServer { acceptor, listen: listen.clone(), unix_inode: Some(inode) })
            }
        }
    }

    /// Where it listens: with the port that was chosen if 0 was asked for.
    pub fn listen(&self) -> &Listen {
        &self.listen
    }
}

impl Drop for MetricsServer {
    fn drop(&mut self) {
        self.acceptor.stop();
        if let (Listen::Unix(path), Some(inode)) = (&self.listen, self.unix_inode) {
            remove_own_socket(path, inode);
        }
    }
}

/// One HTTP request, one answer, end of connection.
fn answer_scrape(input: impl Read, mut output: impl Write, text: &dyn Fn() -> String) {
    let mut reader = BufReader::new(input.take(MAX_HTTP_HEAD));
    let mut line = String::new();
    if reader.read_line(&mut line).is_err() {
        return;
    }
    // The rest of the head says nothing that matters, but must be read before the connection is closed.
    let mut rest = String::new();
    while reader.read_line(&mut rest).is_ok_and(|length| length > 2) {
        rest.clear();
    }
    let mut words = line.split_ascii_whitespace();
    let (method, target) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
    let path = target.split('?').next().unwrap_or("");
    let (status, kind, body) = match (method, path) {
        ("GET" | "HEAD", "/metrics") => ("200 OK", "text/plain; version=0.0.4; charset=utf-8", text()),
        ("GET" | "HEAD", _) => ("404 Not Found", "text/plain", "the metrics are at /metrics\n".into()),
        ("", _) => return,
        _ => ("405 Method Not Allowed", "text/plain", "only GET is answered\n".into()),
    };
    let length = body.len();
    let head =
        format!("HTTP/1.0 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n");
    let body = if method == "HEAD" { "" } else { &body };
    let _ = output.write_all(head.as_bytes()).and_then(|()| output.write_all(body.as_bytes()));
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::Instant;

    fn status() -> Status {
        Status { cluster: "test".into(), slot: 1, ..Status::default() }
    }

    fn answer(request: Request) -> Response {
        match request {
            Request::Status => Response::Status(status()),
            Request::Locks(locks) => Response::Locks(LockList { ino: locks.ino, ..LockList::default() }),
            Request::Stop { .. } => Response::Done,
            Request::Top => {
                std::thread::sleep(Duration::from_millis(300));
                Response::Done
            }
            _ => Response::Error { message: "node 1: not in this build".into() },
        }
    }

    #[test]
    fn asks_and_answers() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("run/0.control");
        let server = ControlServer::start(&socket, answer).unwrap();
        assert_eq!(std::fs::metadata(&socket).unwrap().mode() & 0o777, 0o600);
        assert_eq!(std::fs::metadata(directory.path().join("run")).unwrap().mode() & 0o777, 0o700);
        assert_eq!(ask(&socket, &Request::Status).unwrap(), Response::Status(status()));
        assert_eq!(ask(&socket, &Request::Stop { force: false }).unwrap(), Response::Done);
        let error = ask(&socket, &Request::SetMutation { name: "none".into() }).unwrap_err();
        assert_eq!(error.to_string(), "node 1: not in this build");
        let error = ask_within(&socket, &Request::Top, Duration::from_millis(50)).unwrap_err();
        assert!(matches!(error, ControlError::Timeout { .. }), "{error}");
        let error = ask(&socket, &Request::Top).unwrap_err();
        assert!(matches!(error, ControlError::Nonsense { .. }), "the answer to another request: {error}");
        let error = ControlServer::start(&socket, answer).err().unwrap();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        drop(server);
        assert!(!socket.exists());
        let error = ask(&socket, &Request::Status).unwrap_err();
        assert!(error.to_string().contains("verbfs start"), "{error}");
    }

    #[test]
    fn takes_the_place_of_a_dead_daemon_but_of_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("0.control");
        drop(UnixListener::bind(&socket).unwrap());
        assert!(socket.exists());
        let server = ControlServer::start(&socket, answer).unwrap();
        assert_eq!(server.socket(), socket);
        drop(server);
        std::fs::write(&socket, "precious").unwrap();
        assert!(ControlServer::start(&socket, answer).is_err());
        assert_eq!(std::fs::read(&socket).unwrap(), b"precious");
    }

    #[test]
    fn nonsense_is_answered_and_harms_nobody() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("0.control");
        let _server = ControlServer::start(&socket, answer).unwrap();
        for nonsense in [&b"\n"[..], b"{}\n", b"{\"request\":\"stop\"}\n", b"\xff\xfe\n", b"[[[[[[\n"] {
            let mut stream = UnixStream::connect(&socket).unwrap();
            stream.write_all(nonsense).unwrap();
            let line = read_line(&mut BufReader::new(&stream), MAX_RESPONSE).unwrap().unwrap();
            assert!(matches!(decode(&line), Ok(Response::Error { .. })), "{nonsense:?}");
            // The connection is still good.
            stream.write_all(b"{\"request\":\"status\"}\n").unwrap();
            let line = read_line(&mut BufReader::new(&stream), MAX_RESPONSE).unwrap().unwrap();
            assert_eq!(decode::<Response>(&line).unwrap(), Response::Status(status()));
        }
        let mut stream = UnixStream::connect(&socket).unwrap();
        // The daemon hangs up in the middle of an endless line.
        let _ = stream.write_all(&vec![b'x'; 4 * MAX_REQUEST as usize]);
        let mut said = String::new();
        let _ = stream.read_to_string(&mut said);
        assert!(said.is_empty() || said.contains("longer than"));
        assert!(ask(&socket, &Request::Status).is_ok());
    }

    #[test]
    fn a_panicking_handler_costs_its_connection_only() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("0.control");
        let server = ControlServer::start(&socket, |request| match request {
            Request::Top => panic!("as the test wants it"),
            request => answer(request),
        })
        .unwrap();
        for _ in 0..MAX_CONNECTIONS + 1 {
            assert!(matches!(ask(&socket, &Request::Top), Err(ControlError::Closed { .. })));
        }
        assert!(ask(&socket, &Request::Status).is_ok());
        drop(server);
    }

    #[test]
    fn stopping_does_not_wait_for_idle_clients() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("0.control");
        let server = ControlServer::start(&socket, answer).unwrap();
        let idle = UnixStream::connect(&socket).unwrap();
        let start = Instant::now();
        std::thread::sleep(Duration::from_millis(50));
        drop(server);
        assert!(start.elapsed() < IDLE_TIMEOUT / 10);
        drop(idle);
    }

    #[test]
    fn connections_are_bounded() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("0.control");
        let _server = ControlServer::start(&socket, answer).unwrap();
        let mut idle: Vec<_> = (0..MAX_CONNECTIONS).map(|_| UnixStream::connect(&socket).unwrap()).collect();
        assert!(ask(&socket, &Request::Status).is_err());
        idle.clear();
        let start = Instant::now();
        while ask(&socket, &Request::Status).is_err() {
            assert!(start.elapsed() < Duration::from_secs(10), "never served again");
        }
    }

    /// Root may become somebody else; others cannot test this.
    #[test]
    fn others_are_refused() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        // Where others can get to: TMPDIR may lie in a directory of this user's alone.
        let directory = tempfile::tempdir_in("/tmp").unwrap();
        std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        let socket = directory.path().join("0.control");
        let _server = ControlServer::start(&socket, answer).unwrap();
        let ask_as_nobody = || {
            use std::os::unix::process::CommandExt;
            let script = "import socket,sys; s=socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); \
                          s.sendall(b'{\"request\":\"status\"}\\n'); print(s.recv(4096).decode())";
            let Ok(output) =
                std::process::Command::new("python3").args(["-c", script]).arg(&socket).uid(65534).output()
            else {
                return None; // no python3 here
            };
            Some(String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr))
        };
        let Some(said) = ask_as_nobody() else { return };
        assert!(said.contains("Permission"), "{said}");
        // Even where the socket's mode lets them in.
        std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o666)).unwrap();
        let said = ask_as_nobody().unwrap();
        assert!(said.contains("root only"), "{said}");
    }

    #[test]
    fn prometheus_is_answered_over_tcp_and_unix() {
        let scrape = |stream: &mut dyn ReadWrite, request: &str| {
            stream.write_all(request.as_bytes()).unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            answer
        };
        trait ReadWrite: Read + Write {}
        impl<T: Read + Write> ReadWrite for T {}

        let server = MetricsServer::start(&"127.0.0.1:0".parse().unwrap(), || "verbfs_view 1\n".into()).unwrap();
        let Listen::Tcp(address) = *server.listen() else { panic!() };
        let tcp = |request: &str| scrape(&mut TcpStream::connect(address).unwrap(), request);
        let answer = tcp("GET /metrics HTTP/1.1\r\nHost: x\r\nAccept: */*\r\n\r\n");
        assert!(answer.starts_with("HTTP/1.0 200 OK\r\n") && answer.ends_with("\r\n\r\nverbfs_view 1\n"), "{answer}");
        assert!(tcp("GET /metrics?x=1 HTTP/1.0\r\n\r\n").contains("200 OK"));
        assert!(tcp("HEAD /metrics HTTP/1.0\r\n\r\n").ends_with("\r\n\r\n"));
        assert!(tcp("GET / HTTP/1.0\r\n\r\n").contains("404"));
        assert!(tcp("POST /metrics HTTP/1.0\r\n\r\n").contains("405"));
        drop(server);
        assert!(TcpStream::connect(address).is_err());

        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("metrics");
        let server = MetricsServer::start(&Listen::Unix(path.clone()), || "verbfs_view 1\n".into()).unwrap();
        let answer = scrape(&mut UnixStream::connect(&path).unwrap(), "GET /metrics HTTP/1.0\r\n\r\n");
        assert!(answer.ends_with("verbfs_view 1\n"));
        drop(server);
        assert!(!path.exists());
    }

    #[test]
    fn finds_the_daemon_behind_a_path() {
        let table = "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n\
                     40 22 0:40 / /mnt/a rw,nosuid shared:2 - fuse.verbfs verbfs:/run/verbfs/demo/0.control rw,user_id=0\n\
                     41 22 0:41 / /mnt/a\\040b rw - fuse.verbfs verbfs:/run/verbfs/demo/1.control rw\n\
                     42 40 0:42 / /mnt/a/inner rw - tmpfs tmpfs rw\n";
        let find = |path: &str| find_mount(table, Path::new(path)).map(|(socket, _)| socket);
        assert_eq!(find("/mnt/a/x/y"), Some("/run/verbfs/demo/0.control".into()));
        assert_eq!(find("/mnt/a b/x"), Some("/run/verbfs/demo/1.control".into()));
        assert_eq!(find("/mnt/a/inner/x"), None);
        assert_eq!(find("/mnt/ab"), None);
        assert_eq!(mount_source(Path::new("/run/verbfs/demo/0.control")), "verbfs:/run/verbfs/demo/0.control");
    }

    proptest! {
        #[test]
        fn any_bytes_are_refused_or_understood(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode::<Request>(&bytes);
            let _ = decode::<Response>(&bytes);
        }

        #[test]
        fn requests_survive(ino in any::<Option<u64>>(), force in any::<bool>(), name in "\\PC{0,40}", read_only in any::<bool>()) {
            let options = MountOptions { read_only, stock_mmap: force };
            for request in [
                Request::Status,
                Request::Locks(LocksRequest { ino }),
                Request::Mount(MountRequest { directory: (&name).into(), options }),
                Request::Unmount { directory: (&name).into() },
                Request::Stop { force },
                Request::SetMutation { name: name.clone() },
            ] {
                let line = serde_json::to_vec(&request).unwrap();
                prop_assert!(!line.contains(&b'\n'));
                prop_assert_eq!(decode::<Request>(&line).unwrap(), request);
            }
        }

        #[test]
        fn mount_tables_never_panic(text in "[ -~\\\\]{0,80}") {
            let _ = unescape(&text);
            let _ = find_mount(&text, Path::new("/x"));
        }
    }
}
