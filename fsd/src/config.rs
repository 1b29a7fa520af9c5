//! What a daemon is told: one TOML file per node (or the same file on all), read once at start.
//!
//! [`Config::load`] returns a configuration that has been checked as a whole, or an error that
//! lists *everything* that is wrong with it. `docs/example.toml` documents every key and states
//! every default; a test compares it with [`Config::default`].

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::{
    collections::BTreeSet,
    fmt,
    io::Read,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

/// Bytes in a page; sizes that hold pages are multiples of it.
pub const PAGE_SIZE: u64 = 4096;
/// Most nodes of a cluster: one job or one small cluster. Rings and member tables are kept per pair of nodes.
pub const MAX_NODES: usize = 256;
/// Most slots a file may be striped over, as the layout of an inode holds it.
pub const MAX_WIDTH: u32 = 64;
/// Smaller chunks would give almost every request several homes.
pub const MIN_CHUNK: u64 = 64 << 10;
/// Larger chunks would leave most files on a single node.
pub const MAX_CHUNK: u64 = 1 << 30;
/// Below this an arena fills up with its own tables.
pub const MIN_ARENA: u64 = 16 << 20;
/// Several requests of 1 MiB must be in flight at once.
pub const MIN_CACHE: u64 = 8 << 20;
/// A node lease that is renewed more often than this would cost more than it protects.
pub const MIN_PEER_TIMEOUT: Duration = Duration::from_millis(500);
/// Callers wait this long for a silent peer; nobody should wait longer.
pub const MAX_PEER_TIMEOUT: Duration = Duration::from_secs(600);
/// A revoke waits for the minimum hold, so it must stay far below the peer timeout.
pub const MAX_MINIMUM_HOLD: Duration = Duration::from_millis(100);
/// Most event loops that read from /dev/fuse.
pub const MAX_FUSE_THREADS: u32 = 64;
/// Longest cluster name: it becomes part of socket paths, which end at 108 bytes.
pub const MAX_CLUSTER_NAME: usize = 32;
/// Longest path of a Unix socket, as the kernel has it, less the closing zero.
pub const MAX_SOCKET_PATH: usize = 107;
/// Bytes in a cluster key.
pub const KEY_LENGTH: usize = 32;
/// Port of peers whose address names none.
pub const DEFAULT_PORT: u16 = 4790;

const _: () = assert!(MIN_CHUNK.is_multiple_of(PAGE_SIZE) && MAX_CHUNK.is_multiple_of(PAGE_SIZE));
const _: () = assert!(MAX_MINIMUM_HOLD.as_millis() < MIN_PEER_TIMEOUT.as_millis());
const _: () = assert!(MIN_CACHE <= MIN_ARENA);

/// A configuration that cannot be used: what is wrong, in which file, what to do.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {path}: {error}{}", hint(.error))]
    Read { path: PathBuf, error: std::io::Error },
    /// The file is not TOML, or holds an unknown key or a value of the wrong kind. The message names line and column.
    #[error("{path} is not a usable configuration:\n{message}(every key is documented in docs/example.toml)")]
    Parse { path: PathBuf, message: String },
    /// The values contradict each other or lie outside their ranges.
    #[error("{path} is not a usable configuration:{}", list(.problems))]
    Invalid { path: PathBuf, problems: Vec<String> },
    /// The cluster key is absent, malformed or readable by others.
    #[error("cannot use the cluster key {path}: {problem}")]
    Key { path: PathBuf, problem: String },
    /// A new key cannot be written there.
    #[error("cannot write a new cluster key to {path}: {problem}")]
    NewKey { path: PathBuf, problem: String },
}

fn hint(error: &std::io::Error) -> &'static str {
    match error.kind() {
        std::io::ErrorKind::NotFound => "; name another with --config, or start from a copy of example.toml",
        _ => "",
    }
}

fn list(problems: &[String]) -> String {
    problems.iter().map(|problem| format!("\n  - {problem}")).collect()
}

/// Everything a daemon is told. Every field has a default; a real cluster sets `cluster`, `key_file` and `nodes`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Name of the cluster: letters, digits, `-` and `_`, at most [`MAX_CLUSTER_NAME`] bytes.
    pub cluster: String,
    /// File with the key that peers prove to each other. See [`Config::load_key`].
    pub key_file: PathBuf,
    /// This node's slot. Absent: the node of [`Config::nodes`] whose host is this host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slot: Option<u16>,
    pub fabric: Fabric,
    pub directories: Directories,
    pub storage: Storage,
    pub cache: Cache,
    pub locks: Locks,
    pub membership: Membership,
    pub threads: Threads,
    pub metrics: MetricsListener,
    pub log: Log,
    /// The members, in any order. Slot 0 decides membership and must be there.
    pub nodes: Vec<NodeConfig>,
}

/// What carries messages and pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Fabric {
    /// `shm` where all nodes are on this host, else `verbs`.
    #[default]
    Auto,
    /// Mapped shared memory between daemons on one host.
    Shm,
    /// RDMA.
    Verbs,
}

/// Where a daemon keeps its files.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Directories {
    /// Sockets and process ids; lost at reboot. Used: `RUNTIME/CLUSTER/`.
    pub runtime: PathBuf,
    /// Names, attributes and what must outlive the daemon. Used: `DATA/CLUSTER/SLOT/`.
    pub data: PathBuf,
}

/// What this node gives to the volume, and how new files are laid out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Storage {
    /// Bytes of file data this node stores; a multiple of the page size, at least [`MIN_ARENA`].
    pub arena_size: Size,
    /// Bytes of a file that lie together on one node; [`MIN_CHUNK`] to [`MAX_CHUNK`], a multiple of the page size.
    pub chunk_size: Size,
    /// Nodes a new file is striped over, 1 to [`MAX_WIDTH`]; fewer where the cluster has fewer.
    pub width: u32,
}

/// The daemon's page cache.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Cache {
    /// Bytes of registered memory for cached pages, at least [`MIN_CACHE`].
    pub size: Size,
    /// Share of the cache that may be dirty before writers wait for write-back; above 0, at most 0.9.
    pub dirty_ratio: f64,
    /// Bytes that may be dirty before writers wait; the smaller of this and the ratio counts.
    pub dirty_limit: Size,
}

/// How locks change hands.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Locks {
    /// Least life of a grant, so that each hand-over does useful work; at most [`MAX_MINIMUM_HOLD`].
    pub minimum_hold: Interval,
    /// Dirty pages go from holder to next holder directly, not by way of their home.
    pub hand_over: bool,
}

/// When a silent node counts as gone.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Membership {
    /// Calls that need a silent peer fail with EIO after this; [`MIN_PEER_TIMEOUT`] to [`MAX_PEER_TIMEOUT`].
    pub peer_timeout: Interval,
}

/// Threads and where they run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Threads {
    /// Event loops that read requests from the kernel, at most [`MAX_FUSE_THREADS`]; 0: chosen by the cores of the machine.
    pub fuse: u32,
    /// Bind threads to cores near the adapter, where the machine has cores to spare.
    pub bind: bool,
}

/// Where Prometheus finds the metrics, beside `verbfs status --metrics`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MetricsListener {
    /// Absent: nowhere. `ADDRESS:PORT` or `unix:/PATH`. It answers anyone who can reach it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub listen: Option<Listen>,
}

/// What is logged, and how.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// `error`, `warn`, `info`, `debug` or `trace`; also directives like `info,verbfs_lock=debug`.
    pub level: String,
    pub format: LogFormat,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    #[default]
    Text,
    Json,
}

/// One member of the cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeConfig {
    /// Place in the volume: below [`MAX_NODES`], never given to another node while the volume lives.
    pub slot: u16,
    /// Host name or address, with or without `:PORT` ([`DEFAULT_PORT`]). IPv6 addresses with a port stand in brackets.
    pub address: String,
    /// Name of the host, where the address does not say it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            cluster: "verbfs".into(),
            key_file: "/etc/verbfs/verbfs.key".into(),
            slot: None,
            fabric: Fabric::Auto,
            directories: Directories::default(),
            storage: Storage::default(),
            cache: Cache::default(),
            locks: Locks::default(),
            membership: Membership::default(),
            threads: Threads::default(),
            metrics: MetricsListener::default(),
            log: Log::default(),
            nodes: vec![NodeConfig { slot: 0, address: "localhost".into(), host: None }],
        }
    }
}

impl Default for Directories {
    fn default() -> Directories {
        Directories { runtime: "/run/verbfs".into(), data: "/var/lib/verbfs".into() }
    }
}

impl Default for Storage {
    fn default() -> Storage {
        Storage { arena_size: Size(1 << 30), chunk_size: Size(1 << 20), width: 8 }
    }
}

impl Default for Cache {
    fn default() -> Cache {
        Cache { size: Size(256 << 20), dirty_ratio: 0.5, dirty_limit: Size(1 << 30) }
    }
}

impl Default for Locks {
    fn default() -> Locks {
        Locks { minimum_hold: Interval(Duration::ZERO), hand_over: true }
    }
}

impl Default for Membership {
    fn default() -> Membership {
        Membership { peer_timeout: Interval(Duration::from_secs(10)) }
    }
}

impl Default for Threads {
    fn default() -> Threads {
        Threads { fuse: 0, bind: true }
    }
}

impl Default for Log {
    fn default() -> Log {
        Log { level: "info".into(), format: LogFormat::Text }
    }
}

impl Config {
    /// Reads and checks the file at `path`.
    ///
    /// # Errors
    /// [`ConfigError::Read`], [`ConfigError::Parse`] or [`ConfigError::Invalid`], each naming `path`.
    pub fn load(path: &Path) -> Result<Config, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|error| ConfigError::Read { path: path.into(), error })?;
        Config::parse(&text, path)
    }

    /// As [`Config::load`], from the text of a file called `path` in messages.
    pub fn parse(text: &str, path: &Path) -> Result<Config, ConfigError> {
        let config: Config = toml::from_str(text)
            .map_err(|error| ConfigError::Parse { path: path.into(), message: error.to_string() })?;
        match config.problems() {
            problems if problems.is_empty() => Ok(config),
            problems => Err(ConfigError::Invalid { path: path.into(), problems }),
        }
    }

    /// A cluster of `nodes` daemons on this host, all of whose files lie below `directory`: for demonstrations and tests.
    /// The key is expected at `directory/key`, readable by its owner only.
    pub fn single_host(cluster: &str, slot: u16, nodes: u16, directory: &Path) -> Config {
        Config {
            cluster: cluster.into(),
            key_file: directory.join("key"),
            slot: Some(slot),
            fabric: Fabric::Shm,
            directories: Directories { runtime: directory.join("run"), data: directory.join("data") },
            nodes: (0..nodes).map(|slot| NodeConfig { slot, address: "localhost".into(), host: None }).collect(),
            ..Config::default()
        }
    }

    /// The configuration as TOML that [`Config::parse`] reads back.
    pub fn to_toml(&self) -> String {
        toml::to_string_pretty(self).expect("every configuration is expressible in TOML")
    }

    /// Everything that is wrong, one sentence each; empty for a usable configuration.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let mut require = |holds: bool, problem: String| {
            if !holds {
                problems.push(problem);
            }
        };

        let name_holds = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        require(
            !self.cluster.is_empty() && self.cluster.len() <= MAX_CLUSTER_NAME && self.cluster.chars().all(name_holds),
            format!("cluster = {:?}: use 1 to {MAX_CLUSTER_NAME} letters, digits, '-' and '_'", self.cluster),
        );
        for (key, path) in [
            ("key_file", &self.key_file),
            ("directories.runtime", &self.directories.runtime),
            ("directories.data", &self.directories.data),
        ] {
            require(
                path.is_absolute() && path.to_str().is_some_and(|path| !path.contains([',', '\n', '\0'])),
                format!("{key} = {path:?}: use an absolute path without commas and line breaks"),
            );
        }
        // The longest name that a daemon puts there is a control socket's.
        let socket = self.runtime_directory().join(control_socket_name(u16::MAX));
        require(
            socket.as_os_str().len() <= MAX_SOCKET_PATH,
            format!(
                "directories.runtime = {:?}: too long, socket paths such as {socket:?} must not exceed {MAX_SOCKET_PATH} bytes",
                self.directories.runtime
            ),
        );

        let storage = &self.storage;
        require(
            storage.arena_size.0 >= MIN_ARENA && storage.arena_size.0.is_multiple_of(PAGE_SIZE),
            format!(
                "storage.arena_size = {}: use at least {}, a multiple of 4 KiB",
                storage.arena_size,
                Size(MIN_ARENA)
            ),
        );
        require(
            (MIN_CHUNK..=MAX_CHUNK).contains(&storage.chunk_size.0) && storage.chunk_size.0.is_multiple_of(PAGE_SIZE),
            format!(
                "storage.chunk_size = {}: use {} to {}, a multiple of 4 KiB",
                storage.chunk_size,
                Size(MIN_CHUNK),
                Size(MAX_CHUNK)
            ),
        );
        require(
            (1..=MAX_WIDTH).contains(&storage.width),
            format!("storage.width = {}: use 1 to {MAX_WIDTH}", storage.width),
        );

        let cache = &self.cache;
        require(
            cache.size.0 >= MIN_CACHE && cache.size.0.is_multiple_of(PAGE_SIZE),
            format!("cache.size = {}: use at least {}, a multiple of 4 KiB", cache.size, Size(MIN_CACHE)),
        );
        require(
            cache.dirty_ratio > 0.0 && cache.dirty_ratio <= 0.9,
            format!(
                "cache.dirty_ratio = {}: use more than 0 and at most 0.9, or clean pages have no room",
                cache.dirty_ratio
            ),
        );
        require(
            cache.dirty_limit.0 >= 1 << 20,
            format!("cache.dirty_limit = {}: use at least 1MiB, the longest atomic write", cache.dirty_limit),
        );
        require(
            self.dirty_bytes() >= 1 << 20 || cache.dirty_limit.0 < 1 << 20,
            format!(
                "cache: dirty_ratio {} of {} is less than 1MiB, the longest atomic write",
                cache.dirty_ratio, cache.size
            ),
        );

        require(
            self.locks.minimum_hold.0 <= MAX_MINIMUM_HOLD,
            format!("locks.minimum_hold = {}: use at most {}", self.locks.minimum_hold, Interval(MAX_MINIMUM_HOLD)),
        );
        require(
            (MIN_PEER_TIMEOUT..=MAX_PEER_TIMEOUT).contains(&self.membership.peer_timeout.0),
            format!(
                "membership.peer_timeout = {}: use {} to {}",
                self.membership.peer_timeout,
                Interval(MIN_PEER_TIMEOUT),
                Interval(MAX_PEER_TIMEOUT)
            ),
        );
        require(
            self.threads.fuse <= MAX_FUSE_THREADS,
            format!("threads.fuse = {}: use at most {MAX_FUSE_THREADS}, or 0 to have it chosen", self.threads.fuse),
        );
        require(
            log_level_is_plausible(&self.log.level),
            format!(
                "log.level = {:?}: use error, warn, info, debug or trace, or a list like \"info,verbfs_lock=debug\"",
                self.log.level
            ),
        );

        require(!self.nodes.is_empty(), "nodes: name at least one node by [[nodes]]".into());
        require(self.nodes.len() <= MAX_NODES, format!("nodes: {} of them, use at most {MAX_NODES}", self.nodes.len()));
        require(
            self.nodes.is_empty() || self.nodes.iter().any(|node| node.slot == 0),
            "nodes: none has slot 0, which keeps the root directory and decides who is a member".into(),
        );
        let mut slots = BTreeSet::new();
        let mut addresses = BTreeSet::new();
        for node in &self.nodes {
            require(
                usize::from(node.slot) < MAX_NODES,
                format!("nodes: slot {} is too large, use 0 to {}", node.slot, MAX_NODES - 1),
            );
            require(slots.insert(node.slot), format!("nodes: slot {} is given twice", node.slot));
            match node.host_and_port() {
                Ok(address) => require(
                    addresses.insert(address) || self.fabric() == Fabric::Shm,
                    format!(
                        "nodes: slot {}: address {:?} is given twice; nodes of one host need a port each",
                        node.slot, node.address
                    ),
                ),
                Err(problem) => require(false, format!("nodes: slot {}: {problem}", node.slot)),
            }
        }
        if let Some(slot) = self.slot {
            require(
                self.nodes.iter().any(|node| node.slot == slot),
                format!("slot = {slot}: no node of [[nodes]] has this slot"),
            );
        }
        require(
            self.fabric != Fabric::Shm || self.on_one_host(),
            "fabric = \"shm\": joins daemons on one host only, but nodes are on several; use \"verbs\" or \"auto\""
                .into(),
        );
        problems
    }

    /// The fabric to use: what is configured, or for [`Fabric::Auto`] what fits the nodes. Never `Auto`.
    pub fn fabric(&self) -> Fabric {
        match self.fabric {
            Fabric::Auto if self.on_one_host() => Fabric::Shm,
            Fabric::Auto => Fabric::Verbs,
            chosen => chosen,
        }
    }

    fn on_one_host(&self) -> bool {
        let hosts: BTreeSet<String> = self.nodes.iter().map(NodeConfig::host_name).collect();
        hosts.len() <= 1
    }

    /// The slot of the node this process runs for: [`Config::slot`], or the only node on the host called `hostname`.
    ///
    /// # Errors
    /// A sentence that says what to set, when no node or several nodes are on this host.
    pub fn own_slot(&self, hostname: &str) -> Result<u16, String> {
        if let Some(slot) = self.slot {
            return Ok(slot);
        }
        if let [only] = self.nodes.as_slice()
            && is_loopback(&only.host_name())
        {
            return Ok(only.slot);
        }
        let short = |name: &str| name.split('.').next().unwrap_or(name).to_ascii_lowercase();
        let on_this_host = |node: &&NodeConfig| {
            let host = node.host_name();
            let both_qualified = host.contains('.') && hostname.contains('.');
            if host.parse::<std::net::IpAddr>().is_ok() || both_qualified {
                host.eq_ignore_ascii_case(hostname)
            } else {
                short(&host) == short(hostname)
            }
        };
        let own: Vec<u16> = self.nodes.iter().filter(on_this_host).map(|node| node.slot).collect();
        match own.as_slice() {
            [slot] => Ok(*slot),
            [] => Err(format!(
                "no node of [[nodes]] is on this host ({hostname}): give --slot, or set `slot`, or `host = {hostname:?}` for \
                 this node"
            )),
            several => Err(format!("slots {several:?} are all on this host ({hostname}): set `slot`, or give --slot")),
        }
    }

    /// Bytes that may be dirty before writers wait: the smaller of ratio and limit.
    pub fn dirty_bytes(&self) -> u64 {
        let by_ratio = (self.cache.size.0 as f64 * self.cache.dirty_ratio) as u64;
        by_ratio.min(self.cache.dirty_limit.0) / PAGE_SIZE * PAGE_SIZE
    }

    /// Where this cluster's sockets lie on this host: `RUNTIME/CLUSTER`.
    pub fn runtime_directory(&self) -> PathBuf {
        self.directories.runtime.join(&self.cluster)
    }

    /// What the daemon of `slot` keeps: `DATA/CLUSTER/SLOT`.
    pub fn data_directory(&self, slot: u16) -> PathBuf {
        self.directories.data.join(&self.cluster).join(slot.to_string())
    }

    /// The socket on which the daemon of `slot` answers `verbfs status` and its like.
    pub fn control_socket(&self, slot: u16) -> PathBuf {
        self.runtime_directory().join(control_socket_name(slot))
    }

    /// Reads the cluster key: 32 bytes, raw or as 64 hexadecimal digits (white space around them does not count).
    ///
    /// # Errors
    /// [`ConfigError::Key`] when the file cannot be read, holds something else, is not a regular file, belongs to
    /// somebody other than root or this process's user, or is open to group or others in any way.
    pub fn load_key(&self) -> Result<ClusterKey, ConfigError> {
        ClusterKey::load(&self.key_file)
    }
}

/// Name of the control socket of `slot` in the runtime directory.
pub fn control_socket_name(slot: u16) -> String {
    format!("{slot}.control")
}

fn is_loopback(host: &str) -> bool {
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

fn log_level_is_plausible(level: &str) -> bool {
    const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
    let known = |level: &str| LEVELS.contains(&level.trim().to_ascii_lowercase().as_str());
    !level.trim().is_empty()
        && level.split(',').all(|directive| match directive.split_once('=') {
            Some((target, level)) => !target.trim().is_empty() && known(level),
            None => known(directive),
        })
}

impl NodeConfig {
    /// The host and port of [`NodeConfig::address`].
    ///
    /// # Errors
    /// A sentence that says what is wrong with it.
    pub fn host_and_port(&self) -> Result<(String, u16), String> {
        let address = self.address.as_str();
        let wrong = |what: &str| Err(format!("address {address:?}: {what}"));
        let (host, port) = if let Some(rest) = address.strip_prefix('[') {
            match rest.split_once(']') {
                Some((host, "")) => (host, None),
                Some((host, port)) if port.starts_with(':') => (host, Some(&port[1..])),
                _ => return wrong("write [IPv6 address]:PORT"),
            }
        } else if address.matches(':').count() > 1 {
            (address, None) // a bare IPv6 address
        } else {
            match address.split_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (address, None),
            }
        };
        let letters = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_' | ':' | '%');
        if host.is_empty() || !host.chars().all(letters) {
            return wrong("write HOST or HOST:PORT");
        }
        match port.map(str::parse::<u16>) {
            None => Ok((host.into(), DEFAULT_PORT)),
            Some(Ok(port)) if port != 0 => Ok((host.into(), port)),
            Some(_) => wrong("the port must be 1 to 65535"),
        }
    }

    /// The name of the node's host: `host` if given, else the host of its address.
    pub fn host_name(&self) -> String {
        match (&self.host, self.host_and_port()) {
            (Some(host), _) => host.clone(),
            (None, Ok((host, _))) => host,
            (None, Err(_)) => self.address.clone(),
        }
    }
}

/// The key that peers prove to each other before anything is mapped. Never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct ClusterKey([u8; KEY_LENGTH]);

impl fmt::Debug for ClusterKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClusterKey(..)")
    }
}

impl ClusterKey {
    pub fn bytes(&self) -> &[u8; KEY_LENGTH] {
        &self.0
    }

    /// See [`Config::load_key`].
    pub fn load(path: &Path) -> Result<ClusterKey, ConfigError> {
        use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
        let fail = |problem: String| ConfigError::Key { path: path.into(), problem };
        let no_block = rustix::fs::OFlags::NONBLOCK.bits() as i32; // a FIFO must not hang the start
        let mut file = std::fs::File::options().read(true).custom_flags(no_block).open(path).map_err(|error| {
            let hint = if error.kind() == std::io::ErrorKind::NotFound {
                "; make one by `verbfs config new-key`, and copy it to every node"
            } else {
                ""
            };
            fail(format!("{error}{hint}"))
        })?;
        let metadata = file.metadata().map_err(|error| fail(error.to_string()))?;
        if !metadata.is_file() {
            return Err(fail("it is not a regular file".into()));
        }
        if metadata.mode() & 0o077 != 0 {
            let mode = metadata.mode() & 0o7777;
            return Err(fail(format!(
                "its mode is {mode:04o}, open to others than its owner: chmod 0600 {}",
                path.display()
            )));
        }
        let user = rustix::process::geteuid().as_raw();
        if metadata.uid() != 0 && metadata.uid() != user {
            return Err(fail(format!("it belongs to user {}: chown root {}", metadata.uid(), path.display())));
        }
        let mut content = Vec::new();
        // More than any spelling of a key can need is not a key, and not worth reading.
        file.by_ref().take(4096).read_to_end(&mut content).map_err(|error| fail(error.to_string()))?;
        ClusterKey::decode(&content).ok_or_else(|| {
            fail(format!(
                "it holds {} bytes, not {KEY_LENGTH} raw bytes or {} hexadecimal digits",
                content.len(),
                2 * KEY_LENGTH
            ))
        })
    }

    fn decode(content: &[u8]) -> Option<ClusterKey> {
        if let Ok(raw) = content.try_into() {
            return Some(ClusterKey(raw));
        }
        let digits = content.trim_ascii();
        if digits.len() != 2 * KEY_LENGTH {
            return None;
        }
        let mut key = [0; KEY_LENGTH];
        for (byte, pair) in key.iter_mut().zip(digits.chunks_exact(2)) {
            let digit = |c: u8| (c as char).to_digit(16);
            *byte = (digit(pair[0])? << 4 | digit(pair[1])?) as u8;
        }
        Some(ClusterKey(key))
    }

    /// Makes a new key from the kernel's random numbers and writes it to `path`, which must not exist, with mode 0600.
    ///
    /// # Errors
    /// [`ConfigError::NewKey`] when the file exists or cannot be written.
    pub fn create(path: &Path) -> Result<ClusterKey, ConfigError> {
        use std::{io::Write, os::unix::fs::OpenOptionsExt};
        let fail = |error: std::io::Error| {
            let hint = match error.kind() {
                std::io::ErrorKind::AlreadyExists => "; it is kept: all nodes of a cluster need the same key",
                std::io::ErrorKind::NotFound => "; make its directory first",
                _ => "",
            };
            ConfigError::NewKey { path: path.into(), problem: format!("{error}{hint}") }
        };
        let mut key = [0; KEY_LENGTH];
        std::fs::File::open("/dev/urandom").and_then(|mut source| source.read_exact(&mut key)).map_err(fail)?;
        let mut text: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
        text.push('\n');
        let mut file = std::fs::File::options().write(true).create_new(true).mode(0o600).open(path).map_err(fail)?;
        file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(fail)?;
        Ok(ClusterKey(key))
    }
}

/// A number of bytes. Written as a number, or with a unit: `K`, `M`, `G`, `T` and `KiB`, `MiB`, `GiB`, `TiB` are
/// powers of 1024; `KB`, `MB`, `GB`, `TB` are powers of 1000.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

impl FromStr for Size {
    type Err = String;
    fn from_str(text: &str) -> Result<Size, String> {
        let wrong = || format!("{text:?} is not a size: write a whole number and a unit, like 512M, 1GiB or 4096");
        let (number, unit) = split_unit(text).ok_or_else(wrong)?;
        let factor: u64 = match unit.to_ascii_lowercase().as_str() {
            "" | "b" => 1,
            "k" | "kib" => 1 << 10,
            "m" | "mib" => 1 << 20,
            "g" | "gib" => 1 << 30,
            "t" | "tib" => 1 << 40,
            "kb" => 1_000,
            "mb" => 1_000_000,
            "gb" => 1_000_000_000,
            "tb" => 1_000_000_000_000,
            _ => return Err(wrong()),
        };
        number.checked_mul(factor).map(Size).ok_or_else(|| format!("{text:?} is more than 2^64 bytes"))
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (factor, unit) in [(1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")] {
            if self.0 >= factor && self.0.is_multiple_of(factor) {
                return write!(f, "{}{unit}", self.0 / factor);
            }
        }
        write!(f, "{}", self.0)
    }
}

/// A length of time. Written with a unit: `us`, `ms`, `s` or `m`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Interval(pub Duration);

impl FromStr for Interval {
    type Err = String;
    fn from_str(text: &str) -> Result<Interval, String> {
        let wrong =
            || format!("{text:?} is not a length of time: write a whole number and a unit, like 10s, 5ms or 250us");
        let (number, unit) = split_unit(text).ok_or_else(wrong)?;
        Ok(Interval(match unit {
            "us" => Duration::from_micros(number),
            "ms" => Duration::from_millis(number),
            "s" => Duration::from_secs(number),
            "m" => Duration::from_secs(number.checked_mul(60).ok_or_else(wrong)?),
            "" if number == 0 => Duration::ZERO,
            _ => return Err(wrong()),
        }))
    }
}

impl fmt::Display for Interval {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let micros = self.0.as_micros();
        if micros.is_multiple_of(1_000_000) {
            write!(f, "{}s", micros / 1_000_000)
        } else if micros.is_multiple_of(1000) {
            write!(f, "{}ms", micros / 1000)
        } else {
            write!(f, "{micros}us")
        }
    }
}

/// `"12 MiB"` to `(12, "MiB")`.
fn split_unit(text: &str) -> Option<(u64, &str)> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    Some((text[..digits].parse().ok()?, text[digits..].trim_start()))
}

/// Where something listens: `ADDRESS:PORT` or `unix:/PATH`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listen {
    Tcp(std::net::SocketAddr),
    Unix(PathBuf),
}

impl FromStr for Listen {
    type Err = String;
    fn from_str(text: &str) -> Result<Listen, String> {
        let wrong = || format!("{text:?} is not an address: write ADDRESS:PORT, like 127.0.0.1:9479, or unix:/PATH");
        if let Some(path) = text.strip_prefix("unix:") {
            let fits = path.starts_with('/') && path.len() <= MAX_SOCKET_PATH && !path.contains('\0');
            return if fits { Ok(Listen::Unix(path.into())) } else { Err(wrong()) };
        }
        text.parse().map(Listen::Tcp).map_err(|_| wrong())
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Listen::Tcp(address) => write!(f, "{address}"),
            Listen::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// Lets a type that reads and prints text stand in TOML as a string.
macro_rules! as_string {
    ($type:ty, $expecting:literal $(, $from_integer:expr)?) => {
        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<$type, D::Error> {
                struct Visitor;
                impl de::Visitor<'_> for Visitor {
                    type Value = $type;
                    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                        f.write_str($expecting)
                    }
                    fn visit_str<E: de::Error>(self, text: &str) -> Result<$type, E> {
                        text.parse().map_err(E::custom)
                    }
                    $(
                        fn visit_i64<E: de::Error>(self, number: i64) -> Result<$type, E> {
                            u64::try_from(number)
                                .map($from_integer)
                                .map_err(|_| E::invalid_value(de::Unexpected::Signed(number), &self))
                        }
                        fn visit_u64<E: de::Error>(self, number: u64) -> Result<$type, E> {
                            Ok(($from_integer)(number))
                        }
                    )?
                }
                deserializer.deserialize_any(Visitor)
            }
        }
    };
}
as_string!(Size, "a size, like \"1GiB\", \"512M\" or 4096", Size);
as_string!(Interval, "a length of time, like \"10s\", \"5ms\" or \"250us\"");
as_string!(Listen, "an address, like \"127.0.0.1:9479\" or \"unix:/run/verbfs/metrics\"");

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::PermissionsExt;

    const EXAMPLE: &str = include_str!("../../docs/example.toml");

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(text, Path::new("test.toml"))
    }

    #[test]
    fn empty_file_is_the_default() {
        assert_eq!(parse("").unwrap(), Config::default());
        assert_eq!(Config::default().fabric(), Fabric::Shm);
    }

    /// Uncommented lines of the example state defaults, except for the nodes, which nobody can know.
    #[test]
    fn example_states_the_defaults() {
        let example = parse(EXAMPLE).unwrap();
        assert_eq!(Config { nodes: Config::default().nodes, ..example }, Config::default());
    }

    /// Every key that a configuration can have is in the example, if only as a comment, and the comments parse.
    #[test]
    fn example_documents_every_key() {
        let all: String = EXAMPLE
            .lines()
            .map(|line| match line.strip_prefix('#') {
                // Settings are commented out by a bare '#', prose by "# ".
                Some(setting) if !setting.starts_with(' ') && setting.contains('=') => format!("{setting}\n"),
                _ => format!("{line}\n"),
            })
            .collect();
        let full = parse(&all).unwrap_or_else(|error| panic!("{error}\n{all}"));
        assert!(full.slot.is_some() && full.metrics.listen.is_some());
        assert!(full.nodes.iter().any(|node| node.host.is_some()));
        for line in full.to_toml().lines() {
            if let Some((key, _)) = line.split_once(" = ") {
                assert!(all.contains(&format!("{key} = ")), "docs/example.toml does not document {key}");
            }
        }
    }

    #[test]
    fn survives_being_written_out() {
        let config = Config::single_host("demo", 2, 3, Path::new("/tmp/demo"));
        assert_eq!(config.problems(), Vec::<String>::new());
        assert_eq!(parse(&config.to_toml()).unwrap(), config);
        assert_eq!(config.control_socket(2), Path::new("/tmp/demo/run/demo/2.control"));
        assert_eq!(config.data_directory(2), Path::new("/tmp/demo/data/demo/2"));
    }

    #[test]
    fn names_what_is_wrong() {
        for (text, says) in [
            ("cluster = 'a/b'", "letters, digits"),
            ("key_file = 'key'", "absolute path"),
            ("directories.runtime = '/run/a,b'", "without commas"),
            ("storage.arena_size = '4K'", "storage.arena_size = 4KiB"),
            ("storage.chunk_size = 65537", "storage.chunk_size"),
            ("storage.width = 0", "storage.width"),
            ("storage.width = 65", "storage.width"),
            ("cache.size = '1M'", "cache.size"),
            ("cache.dirty_ratio = 0.0", "cache.dirty_ratio"),
            ("cache.dirty_ratio = nan", "cache.dirty_ratio"),
            ("cache.dirty_ratio = 0.95", "cache.dirty_ratio"),
            ("cache.dirty_limit = 0", "cache.dirty_limit"),
            ("cache = { size = '8M', dirty_ratio = 0.01 }", "less than 1MiB"),
            ("locks.minimum_hold = '1s'", "locks.minimum_hold = 1s"),
            ("membership.peer_timeout = '1ms'", "use 500ms to 600s"),
            ("threads.fuse = 1000", "threads.fuse"),
            ("log.level = 'loud'", "log.level"),
            ("nodes = []", "at least one node"),
            ("nodes = [{slot = 1, address = 'a'}]", "slot 0"),
            ("nodes = [{slot = 0, address = 'a'}, {slot = 0, address = 'b'}]", "slot 0 is given twice"),
            ("nodes = [{slot = 0, address = 'a'}, {slot = 1, address = 'a:4790'}]\nfabric = 'verbs'", "given twice"),
            ("nodes = [{slot = 0, address = 'a'}, {slot = 300, address = 'b'}]", "too large"),
            ("nodes = [{slot = 0, address = 'a:0'}]", "port"),
            ("nodes = [{slot = 0, address = 'a b'}]", "HOST:PORT"),
            ("nodes = [{slot = 0, address = '[::1'}]", "IPv6"),
            ("slot = 4", "slot = 4"),
            ("fabric = 'shm'\nnodes = [{slot = 0, address = 'a'}, {slot = 1, address = 'b'}]", "one host"),
            ("fabric = 'tcp'", "line 1"),
            ("widht = 3", "unknown field"),
            ("storage.arena_size = 'much'", "not a size"),
            ("storage.arena_size = -1", "a size, like"),
            ("membership.peer_timeout = 10", "a length of time, like"),
            ("metrics.listen = 'here'", "not an address"),
            ("nodes = [{address = 'a'}]", "missing field `slot`"),
        ] {
            let message = parse(text).expect_err(text).to_string();
            assert!(message.contains(says), "{text}: {message}");
            assert!(message.contains("test.toml"), "{text}: {message}");
        }
    }

    #[test]
    fn names_everything_that_is_wrong_at_once() {
        let Err(ConfigError::Invalid { problems, .. }) = parse("cluster = ''\nstorage.width = 0\nthreads.fuse = 99")
        else {
            panic!("accepted")
        };
        assert_eq!(problems.len(), 3, "{problems:?}");
    }

    #[test]
    fn addresses() {
        let split =
            |address: &str| NodeConfig { slot: 0, address: address.into(), host: None }.host_and_port().unwrap();
        assert_eq!(split("node0"), ("node0".into(), DEFAULT_PORT));
        assert_eq!(split("node0.example:1"), ("node0.example".into(), 1));
        assert_eq!(split("10.0.0.1:99"), ("10.0.0.1".into(), 99));
        assert_eq!(split("fe80::1"), ("fe80::1".into(), DEFAULT_PORT));
        assert_eq!(split("[fe80::1%eth0]:99"), ("fe80::1%eth0".into(), 99));
    }

    #[test]
    fn finds_its_slot_by_host() {
        let config = parse(
            "nodes = [{slot = 0, address = 'n0.cluster'}, {slot = 1, address = '10.0.0.2', host = 'N1'}, {slot = 2, address = 'n2'}]",
        )
        .unwrap();
        assert_eq!(config.own_slot("n0"), Ok(0));
        assert_eq!(config.own_slot("n0.cluster"), Ok(0));
        assert_eq!(config.own_slot("n1.cluster"), Ok(1));
        assert_eq!(config.own_slot("n2.cluster"), Ok(2));
        assert!(config.own_slot("n0.elsewhere").unwrap_err().contains("set `slot`"));
        assert!(config.own_slot("n3").is_err());
        assert_eq!(config.fabric(), Fabric::Verbs);
        assert_eq!(Config { slot: Some(2), ..config }.own_slot("anything"), Ok(2));
        assert_eq!(Config::default().own_slot("anything"), Ok(0));
        let several = Config { slot: None, ..Config::single_host("c", 0, 2, Path::new("/d")) };
        assert!(several.own_slot("localhost").unwrap_err().contains("--slot"));
    }

    #[test]
    fn keys() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key");
        let load = |content: &[u8], mode: u32| {
            std::fs::write(&path, content).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            ClusterKey::load(&path).map_err(|error| error.to_string())
        };
        assert_eq!(load(&[7; 32], 0o600).unwrap().bytes(), &[7; 32]);
        assert_eq!(load(format!(" {}\n", "aB".repeat(32)).as_bytes(), 0o400).unwrap().bytes(), &[0xab; 32]);
        assert!(load(&[7; 32], 0o640).unwrap_err().contains("0640"));
        assert!(load(&[7; 31], 0o600).unwrap_err().contains("31 bytes"));
        assert!(load("xy".repeat(32).as_bytes(), 0o600).is_err());
        assert!(load(&[b'a'; 5000], 0o600).is_err());
        assert!(ClusterKey::create(&path).is_err(), "overwrote a key");
        assert!(ClusterKey::load(directory.path()).is_err());
        std::fs::remove_file(&path).unwrap();
        assert!(ClusterKey::load(&path).unwrap_err().to_string().contains("new-key"));
        let created = ClusterKey::create(&path).unwrap();
        assert_eq!(ClusterKey::load(&path).unwrap(), created);
        assert_eq!(format!("{created:?}"), "ClusterKey(..)");
    }

    #[test]
    fn dirty_bytes_is_the_smaller_bound() {
        let mut config = Config::default();
        assert_eq!(config.dirty_bytes(), 128 << 20);
        config.cache.dirty_limit = Size(16 << 20);
        assert_eq!(config.dirty_bytes(), 16 << 20);
    }

    proptest! {
        #[test]
        fn any_text_is_refused_or_checked(text in "\\PC{0,200}") {
            if let Ok(config) = parse(&text) {
                prop_assert!(config.problems().is_empty());
            }
        }

        /// Damages the example by exchanging, dropping and doubling pieces of it.
        #[test]
        fn damaged_examples_are_refused_or_checked(
            edits in proptest::collection::vec((any::<prop::sample::Index>(), 0usize..12, "[ -~\\n]{0,6}"), 1..6)
        ) {
            let mut text: Vec<char> = EXAMPLE.chars().collect();
            for (at, length, with) in edits {
                let at = at.index(text.len());
                let end = (at + length).min(text.len());
                text.splice(at..end, with.chars());
            }
            let text: String = text.into_iter().collect();
            if let Ok(config) = parse(&text) {
                prop_assert!(config.problems().is_empty());
                prop_assert_eq!(parse(&config.to_toml()).unwrap(), config);
            }
        }

        #[test]
        fn sizes_survive(bytes in any::<u64>()) {
            prop_assert_eq!(Size(bytes).to_string().parse(), Ok(Size(bytes)));
        }

        #[test]
        fn intervals_survive(micros in 0u64..u64::MAX / 60) {
            let interval = Interval(Duration::from_micros(micros));
            prop_assert_eq!(interval.to_string().parse(), Ok(interval));
        }

        #[test]
        fn sizes_and_intervals_never_panic(text in "[0-9]{0,25} ?[a-zA-Z]{0,4}") {
            let _ = text.parse::<Size>();
            let _ = text.parse::<Interval>();
        }
    }
}
