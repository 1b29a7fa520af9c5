//! `verbfs rdma`: makes and removes SoftRoCE devices, and says what RDMA lacks on this host and how to mend it.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use rustix::process::{Resource, getrlimit};
use verbfs_rdma::verbs::device::Device;
use verbfs_rdma::verbs::discovery;

use super::arguments::{DEFAULT_CONFIG, RdmaCommand};
use super::{emit, target};
use crate::config::{Config, Fabric};
use crate::softroce::{self, SoftDevice, entries};

/// How long a new device may take until its port is active.
const ACTIVE_PATIENCE: Duration = Duration::from_secs(5);
/// What each peer's mailbox and buffers take of locked memory, rounded up (docs/rdma.md).
const BYTES_PER_PEER: u64 = 16 << 20;
/// From this MTU on, an interface has room for RDMA's largest packets: 4096 bytes and headers.
const LARGE_MTU: u32 = 4200;
/// The bit of CAP_IPC_LOCK in /proc/self/status.
const CAP_IPC_LOCK: u32 = 14;

pub fn run(command: RdmaCommand) -> anyhow::Result<()> {
    let host = Host::this();
    match command {
        RdmaCommand::Up { interface, name } => up(&host, interface, name),
        RdmaCommand::Down { device, force } => down(&host, device, force),
        RdmaCommand::Check { address, config } => {
            let findings = check(&host, &Wanted::find(address, config)?);
            emit(&findings.iter().map(Finding::to_string).collect::<String>())?;
            conclude(&findings)
        }
    }
}

/// Fails when something is missing.
fn conclude(findings: &[Finding]) -> anyhow::Result<()> {
    match findings.iter().filter(|finding| finding.state == State::Missing).count() {
        0 => Ok(()),
        1 => bail!("RDMA cannot be used here yet: one thing is missing"),
        missing => bail!("RDMA cannot be used here yet: {missing} things are missing"),
    }
}

fn up(host: &Host, interface: Option<String>, name: Option<String>) -> anyhow::Result<()> {
    let interface = match interface {
        Some(interface) => interface,
        None => host.only_interface()?,
    };
    ensure!(
        host.sys.join("class/net").join(&interface).exists(),
        "there is no interface {interface}; there are: {}",
        list(&host.interfaces())
    );
    ensure!(
        host.interfaces().contains(&interface),
        "{interface} is no Ethernet interface; there are: {}",
        list(&host.interfaces())
    );
    let here = softroce::devices(&host.sys).into_iter().find(|device| device.interface == interface);
    let name = match (here, name) {
        (Some(device), Some(name)) if device.name != name => {
            bail!("{interface} carries {} already; `verbfs rdma down {interface}` removes it", device.name)
        }
        (Some(device), _) => {
            emit(&format!("{} was there, on {interface}\n", device.name))?;
            device.name
        }
        (None, name) => {
            let loaded = softroce::load_modules(&host.sys);
            let name = name.unwrap_or_else(|| softroce::free_name(&host.sys));
            // Without the modules it will not work; what the kernel says to it is less than what kept them from loading.
            loaded.with_context(|| {
                format!("cannot make a SoftRoCE device of {interface}; `verbfs rdma check` says more")
            })?;
            softroce::add(&name, &interface)
                .with_context(|| format!("cannot make a SoftRoCE device of {interface}"))?;
            emit(&format!("made {name} on {interface}\n"))?;
            name
        }
    };
    let begun = Instant::now();
    let port = host.sys.join("class/infiniband").join(&name).join("ports/1/state");
    while !fs::read_to_string(&port).is_ok_and(|state| state.contains("ACTIVE")) && begun.elapsed() < ACTIVE_PATIENCE {
        std::thread::sleep(Duration::from_millis(20));
    }
    let findings = check(host, &Wanted { device: Some(name), ..Wanted::default() });
    emit(&findings.iter().filter(|f| f.state != State::Good).map(Finding::to_string).collect::<String>())?;
    conclude(&findings)
}

fn down(host: &Host, wanted: Option<String>, force: bool) -> anyhow::Result<()> {
    let devices = softroce::devices(&host.sys);
    let names: Vec<String> = devices.iter().map(|d| format!("{} on {}", d.name, d.interface)).collect();
    let device = match (&wanted, &devices[..]) {
        (None, [device]) => device,
        (None, []) => bail!("there is no SoftRoCE device"),
        (None, _) => bail!("there are several SoftRoCE devices: {}; say which", list(&names)),
        (Some(wanted), _) => {
            let is_it = |device: &&SoftDevice| device.name == *wanted || device.interface == *wanted;
            devices.iter().find(is_it).with_context(|| {
                format!(
                    "there is no SoftRoCE device {wanted}, nor one on an interface {wanted}; there are: {}",
                    list(&names)
                )
            })?
        }
    };
    let users = softroce::users(&device.name);
    if !users.is_empty() && !force {
        bail!(
            "{} is in use by {}; stop them first, or say --force: they will lose their connections",
            device.name,
            list(&users)
        );
    }
    softroce::remove(&device.name).with_context(|| format!("cannot remove {}", device.name))?;
    emit(&format!("removed {} from {}\n", device.name, device.interface))
}

fn list(names: &[String]) -> String {
    if names.is_empty() { "none".into() } else { names.join(", ") }
}

/// Where to look: this host's own directories, or a test's.
struct Host {
    sys: PathBuf,
    dev: PathBuf,
    proc: PathBuf,
    /// The modules of the kernel that runs.
    modules: PathBuf,
}

impl Host {
    fn this() -> Host {
        let release = rustix::system::uname().release().to_string_lossy().into_owned();
        Host {
            sys: "/sys".into(),
            dev: "/dev".into(),
            proc: "/proc".into(),
            modules: Path::new("/lib/modules").join(release),
        }
    }

    fn release(&self) -> String {
        self.modules.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    fn read(&self, path: &str) -> Option<String> {
        fs::read_to_string(self.sys.join(path)).ok().map(|text| text.trim().to_string())
    }

    /// Those that could carry RDMA: Ethernet (kind 1), and not the loopback.
    fn interfaces(&self) -> Vec<String> {
        let ethernet = |name: &String| self.read(&format!("class/net/{name}/type")).as_deref() == Some("1");
        entries(&self.sys.join("class/net")).into_iter().filter(ethernet).collect()
    }

    /// The one Ethernet interface that is up.
    fn only_interface(&self) -> anyhow::Result<String> {
        let is_up = |name: &String| {
            let state = self.read(&format!("class/net/{name}/operstate")).unwrap_or_default();
            // Dummies do not know.
            state == "up" || state == "unknown"
        };
        let candidates: Vec<String> = self.interfaces().into_iter().filter(is_up).collect();
        match &candidates[..] {
            [one] => Ok(one.clone()),
            [] => bail!("no Ethernet interface is up; name one: {}", list(&self.interfaces())),
            several => bail!("several interfaces are up; name one: {}", list(several)),
        }
    }

    /// How the kernel has a module.
    fn module(&self, name: &str) -> Module {
        if self.sys.join("module").join(name).exists() {
            return Module::Loaded;
        }
        let names = |file: &str| {
            let text = fs::read_to_string(self.modules.join(file)).unwrap_or_default();
            text.lines().any(|line| line.split(':').next().unwrap_or(line).contains(&format!("/{name}.ko")))
        };
        if names("modules.builtin") {
            Module::Loaded
        } else if names("modules.dep") {
            Module::Available
        } else {
            Module::Absent
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Module {
    Loaded,
    Available,
    Absent,
}

/// What has to work, beyond some device.
#[derive(Default)]
struct Wanted {
    /// The one device that matters; all when not said.
    device: Option<String>,
    /// An address that must be a device's.
    address: Option<IpAddr>,
    /// What a daemon will lock at most, and why.
    locked: Option<(u64, String)>,
}

impl Wanted {
    /// From the command line, and from the configuration where there is one.
    fn find(address: Option<IpAddr>, config: Option<PathBuf>) -> anyhow::Result<Wanted> {
        let path = config.clone().unwrap_or_else(|| DEFAULT_CONFIG.into());
        let mut wanted = Wanted { address, ..Wanted::default() };
        // The default one is looked at when it is there: a laptop may have none yet.
        if config.is_none() && !path.exists() {
            return Ok(wanted);
        }
        let config = Config::load(&path)?;
        if config.fabric() == Fabric::Shm {
            return Ok(wanted);
        }
        let peers = config.nodes.len().saturating_sub(1) as u64;
        let (arena, cache) = (config.storage.arena_size.0, config.cache.size.0);
        let why = format!("arena, cache and {peers} peers of {}", path.display());
        wanted.locked = Some((arena + cache + peers * BYTES_PER_PEER, why));
        if wanted.address.is_none()
            && let Ok(slot) = config.own_slot(&target::hostname())
        {
            wanted.address = Some(crate::fabric::address_of(&config, slot)?.ip());
        }
        Ok(wanted)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Good,
    /// It works, and could be better.
    Doubtful,
    Missing,
}

/// What was found of one thing that RDMA needs, and what to do.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Finding {
    state: State,
    what: String,
    mend: Option<String>,
}

impl Finding {
    fn good(what: impl Into<String>) -> Finding {
        Finding { state: State::Good, what: what.into(), mend: None }
    }
    fn doubtful(what: impl Into<String>, mend: impl Into<String>) -> Finding {
        Finding { state: State::Doubtful, what: what.into(), mend: Some(mend.into()) }
    }
    fn missing(what: impl Into<String>, mend: impl Into<String>) -> Finding {
        Finding { state: State::Missing, what: what.into(), mend: Some(mend.into()) }
    }
}

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let word = match self.state {
            State::Good => "ok",
            State::Doubtful => "note",
            State::Missing => "missing",
        };
        writeln!(f, "{word:<8} {}", self.what)?;
        self.mend.iter().try_for_each(|mend| writeln!(f, "         -> {mend}"))
    }
}

/// Everything that RDMA needs here, from the kernel up.
fn check(host: &Host, wanted: &Wanted) -> Vec<Finding> {
    let mut found = Vec::new();
    let names: Vec<String> = entries(&host.sys.join("class/infiniband"))
        .into_iter()
        .filter(|name| wanted.device.as_ref().is_none_or(|wanted| wanted == name))
        .collect();
    if names.is_empty() {
        found.push(no_device(host));
    }
    found.push(connection_manager(host));
    // What the libraries know of, with addresses. On a host without RDMA they have nothing to say.
    let known = if names.is_empty() { Vec::new() } else { discovery::devices().unwrap_or_default() };
    for name in &names {
        found.extend(ports(host, name));
        found.push(device_node(host, name));
        found.push(driver(name, &known));
    }
    if let Some(address) = wanted.address
        && !names.is_empty()
    {
        found.push(match Device::for_address(SocketAddr::new(address, 0)) {
            Ok(device) => Finding::good(format!("{address} is an address of {} port {}", device.name(), device.port())),
            Err(error) => Finding::missing(
                error.to_string(),
                "the node's address in the configuration must be that of an interface with RDMA",
            ),
        });
    }
    found.push(locked_memory(host, wanted));
    found
}

fn no_device(host: &Host) -> Finding {
    let what = "no RDMA device";
    match host.module("rdma_rxe") {
        Module::Loaded => {
            Finding::missing(what, "verbfs rdma up INTERFACE makes a SoftRoCE device of an Ethernet interface")
        }
        Module::Available => Finding::missing(
            what,
            "load the driver of your adapter; or verbfs rdma up INTERFACE loads rdma_rxe and makes a SoftRoCE device",
        ),
        Module::Absent => Finding::missing(
            format!("{what}, and kernel {} has no module rdma_rxe (SoftRoCE)", host.release()),
            format!(
                "boot a kernel with CONFIG_RDMA_RXE, as Debian's linux-image-amd64, with its modules in {}; in a container \
                 or sandbox, load rdma_rxe on the host",
                host.modules.display()
            ),
        ),
    }
}

/// Whether a file of `/dev` can be opened as the libraries do; else why not, and what to do.
fn openable(host: &Host, name: &str, module: &str) -> Result<(), (String, String)> {
    let path = host.dev.join(name);
    match fs::OpenOptions::new().read(true).write(true).open(&path) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let mend = match host.module(module) {
                Module::Loaded => {
                    "udev makes it; into a container, pass /dev/infiniband (--device=/dev/infiniband)".into()
                }
                Module::Available => format!("modprobe {module}"),
                Module::Absent => format!("boot a kernel with the module {module}, or load it on the container's host"),
            };
            Err((format!("{} is not there", path.display()), mend))
        }
        Err(error) => {
            let mend = "be root, or let the daemon's user open it (mode 0666 is what udev rules of rdma-core give)";
            Err((format!("{}: {error}", path.display()), mend.into()))
        }
    }
}

fn connection_manager(host: &Host) -> Finding {
    match openable(host, "infiniband/rdma_cm", "rdma_ucm") {
        Ok(()) => Finding::good("the connection manager can be used"),
        Err((why, mend)) => Finding::missing(format!("the connection manager: {why}"), mend),
    }
}

fn device_node(host: &Host, device: &str) -> Finding {
    let nodes = entries(&host.sys.join("class/infiniband_verbs"));
    let is_it = |node: &&String| host.read(&format!("class/infiniband_verbs/{node}/ibdev")).as_deref() == Some(device);
    let Some(node) = nodes.iter().find(is_it) else {
        return Finding::missing(format!("{device} has no interface for programs"), "modprobe ib_uverbs");
    };
    match openable(host, &format!("infiniband/{node}"), "ib_uverbs") {
        Ok(()) => Finding::good(format!("{device} can be opened (/dev/infiniband/{node})")),
        Err((why, mend)) => Finding::missing(format!("{device}: {why}"), mend),
    }
}

/// Whether libibverbs can drive what the kernel has.
fn driver(device: &str, known: &[discovery::Found]) -> Finding {
    match known.iter().find(|found| found.name == device) {
        None => Finding::missing(
            format!("libibverbs has no driver for {device}"),
            "apt-get install ibverbs-providers, or your distribution's drivers of rdma-core",
        ),
        Some(found) => match &found.addresses {
            Err(why) => Finding::missing(format!("{device}: {why}"), "see what is said of its device file"),
            Ok(addresses) if addresses.is_empty() => {
                Finding::missing(format!("{device} has no address"), "give its interface an IP address: ip addr add")
            }
            Ok(_) => Finding::good(found.to_string()),
        },
    }
}

fn ports(host: &Host, device: &str) -> Vec<Finding> {
    let mut found = Vec::new();
    for port in entries(&host.sys.join("class/infiniband").join(device).join("ports")) {
        let base = format!("class/infiniband/{device}/ports/{port}");
        let state = host.read(&format!("{base}/state")).unwrap_or_default();
        let state = state.split(": ").last().unwrap_or_default();
        let interface = host.read(&format!("{base}/gid_attrs/ndevs/0"));
        let carried = interface.as_ref().map_or_else(String::new, |interface| format!(" on {interface}"));
        if state != "ACTIVE" {
            let mend = match &interface {
                Some(interface) => format!("ip link set dev {interface} up"),
                None => "is its cable or interface up? InfiniBand needs a subnet manager (opensm)".into(),
            };
            found.push(Finding::missing(format!("{device} port {port}{carried} is {state}"), mend));
            continue;
        }
        let mtu = interface.as_ref().and_then(|name| host.read(&format!("class/net/{name}/mtu"))?.parse::<u32>().ok());
        found.push(match (interface, mtu) {
            (Some(interface), Some(mtu)) if mtu < LARGE_MTU => Finding::doubtful(
                format!("{device} port {port}{carried} is active; its packets are small: the interface's MTU is {mtu}"),
                format!("where network and peers allow it: ip link set dev {interface} mtu {LARGE_MTU}"),
            ),
            _ => Finding::good(format!("{device} port {port}{carried} is active")),
        });
    }
    found
}

fn locked_memory(host: &Host, wanted: &Wanted) -> Finding {
    let status = fs::read_to_string(host.proc.join("self/status")).unwrap_or_default();
    locked_memory_within(&status, getrlimit(Resource::Memlock).current, wanted)
}

/// `status` is that of /proc/self, `limit` in bytes, `None` for no limit.
fn locked_memory_within(status: &str, limit: Option<u64>, wanted: &Wanted) -> Finding {
    let effective = status.lines().find_map(|line| u64::from_str_radix(line.strip_prefix("CapEff:")?.trim(), 16).ok());
    if effective.is_some_and(|set| set & 1 << CAP_IPC_LOCK != 0) {
        return Finding::good("memory can be locked: CAP_IPC_LOCK");
    }
    let Some(limit) = limit else { return Finding::good("memory can be locked: no limit") };
    let mib = |bytes: u64| format!("{} MiB", bytes.div_ceil(1 << 20));
    let mend = "LimitMEMLOCK=infinity in the service, `ulimit -l unlimited` in the shell, memlock in /etc/security/limits.d for \
                logins, or CAP_IPC_LOCK";
    match &wanted.locked {
        Some((needed, _)) if *needed <= limit => Finding::good(format!("memory can be locked: up to {}", mib(limit))),
        Some((needed, why)) => Finding::missing(
            format!("at most {} can be locked, and {} are needed: {why}", mib(limit), mib(*needed)),
            mend,
        ),
        None => {
            let each = mib(BYTES_PER_PEER);
            let what =
                format!("at most {} can be locked; a daemon needs arena, cache and {each} for each peer", mib(limit));
            Finding::doubtful(what, mend)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A host of which only the given files exist.
    fn host(files: &[(&str, &str)]) -> (tempfile::TempDir, Host) {
        let directory = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = directory.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let below = |name: &str| directory.path().join(name);
        let host =
            Host { sys: below("sys"), dev: below("dev"), proc: below("proc"), modules: below("modules/6.1.0-test") };
        (directory, host)
    }

    const DEVICE: [(&str, &str); 5] = [
        ("sys/class/infiniband/rxe0/ports/1/state", "4: ACTIVE\n"),
        ("sys/class/infiniband/rxe0/ports/1/gid_attrs/ndevs/0", "eth0\n"),
        ("sys/class/net/eth0/mtu", "4500\n"),
        ("sys/class/infiniband_verbs/uverbs3/ibdev", "rxe0\n"),
        ("dev/infiniband/uverbs3", ""),
    ];

    #[test]
    fn a_kernel_without_rdma_is_told_from_one_that_has_not_loaded_it() {
        let (_keep, nothing) = host(&[]);
        let text = no_device(&nothing).to_string();
        assert!(text.starts_with("missing") && text.contains("kernel 6.1.0-test has no module rdma_rxe"), "{text}");
        let (_keep, available) =
            host(&[("modules/6.1.0-test/modules.dep", "kernel/drivers/rxe/rdma_rxe.ko.xz: a.ko\n")]);
        assert!(no_device(&available).to_string().contains("verbfs rdma up INTERFACE loads rdma_rxe"));
        assert_eq!(available.module("rdma"), Module::Absent);
        let (_keep, loaded) = host(&[("sys/module/rdma_rxe/refcnt", "0")]);
        assert!(no_device(&loaded).to_string().contains("makes a SoftRoCE device"));
        let (_keep, builtin) = host(&[("modules/6.1.0-test/modules.builtin", "kernel/drivers/rxe/rdma_rxe.ko\n")]);
        assert_eq!(builtin.module("rdma_rxe"), Module::Loaded);
        // Each with the way to mend it, and the whole check fails.
        let findings = check(&nothing, &Wanted::default());
        assert!(conclude(&findings).unwrap_err().to_string().contains("2 things are missing"));
        assert!(findings.iter().all(|finding| finding.state == State::Good || finding.mend.is_some()));
    }

    #[test]
    fn files_of_devices_are_looked_for_and_opened() {
        let (_keep, without) = host(&[("modules/6.1.0-test/modules.dep", "kernel/core/rdma_ucm.ko: ib.ko\n")]);
        let text = connection_manager(&without).to_string();
        assert!(text.contains("rdma_cm is not there") && text.contains("-> modprobe rdma_ucm"), "{text}");
        let (_keep, container) = host(&[("sys/module/rdma_ucm/refcnt", "0")]);
        assert!(connection_manager(&container).to_string().contains("pass /dev/infiniband"));
        let (_keep, with) = host(&[("dev/infiniband/rdma_cm", "")]);
        assert_eq!(connection_manager(&with).state, State::Good);
        assert_eq!(device_node(&with, "rxe0").mend.as_deref(), Some("modprobe ib_uverbs"));
        let (_keep, device) = host(&DEVICE);
        assert_eq!(device_node(&device, "rxe0").state, State::Good);
        fs::remove_file(device.dev.join("infiniband/uverbs3")).unwrap();
        assert!(device_node(&device, "rxe0").to_string().contains("uverbs3 is not there"));
        assert!(driver("rxe0", &[]).to_string().contains("ibverbs-providers"));
    }

    #[test]
    fn ports_are_judged_by_state_and_mtu() {
        let (_keep, good) = host(&DEVICE);
        assert_eq!(ports(&good, "rxe0"), [Finding::good("rxe0 port 1 on eth0 is active")]);
        fs::write(good.sys.join("class/net/eth0/mtu"), "1500\n").unwrap();
        let small = &ports(&good, "rxe0")[0];
        assert!(small.state == State::Doubtful && small.to_string().contains("mtu 4200"), "{small}");
        fs::write(good.sys.join("class/infiniband/rxe0/ports/1/state"), "1: DOWN\n").unwrap();
        let down = &ports(&good, "rxe0")[0];
        assert!(down.state == State::Missing && down.to_string().contains("ip link set dev eth0 up"), "{down}");
    }

    #[test]
    fn locked_memory_is_held_against_what_is_needed() {
        let none = "Name:\tverbfs\nCapEff:\t0000000000000000\n";
        let wanted = |bytes| Wanted { locked: Some((bytes, "arena".into())), ..Wanted::default() };
        let judge = |limit, wanted: &Wanted| locked_memory_within(none, limit, wanted).state;
        assert_eq!(judge(None, &wanted(1 << 40)), State::Good);
        assert_eq!(judge(Some(64 << 20), &wanted(64 << 20)), State::Good);
        assert_eq!(judge(Some(64 << 20), &wanted(65 << 20)), State::Missing);
        assert_eq!(judge(Some(64 << 20), &Wanted::default()), State::Doubtful);
        let text = locked_memory_within(none, Some(8 << 20), &wanted(100 << 20)).to_string();
        assert!(text.contains("at most 8 MiB") && text.contains("100 MiB") && text.contains("LimitMEMLOCK"), "{text}");
        assert_eq!(locked_memory_within("CapEff:\t0000000000004000\n", Some(0), &wanted(1)).state, State::Good);
        assert_eq!(locked_memory_within("CapEff:\t0000000000008000\n", Some(0), &wanted(1)).state, State::Missing);
    }

    #[test]
    fn what_to_bring_up_or_down_must_be_clear() {
        let (_keep, host) = host(&[
            ("sys/class/net/lo/type", "772"),
            ("sys/class/net/eth0/type", "1"),
            ("sys/class/net/eth0/operstate", "up\n"),
            ("sys/class/net/wlan0/type", "1"),
            ("sys/class/net/wlan0/operstate", "down\n"),
        ]);
        assert_eq!(host.only_interface().unwrap(), "eth0");
        let error = up(&host, Some("eth9".into()), None).unwrap_err().to_string();
        assert_eq!(error, "there is no interface eth9; there are: eth0, wlan0");
        let error = up(&host, Some("lo".into()), None).unwrap_err().to_string();
        assert_eq!(error, "lo is no Ethernet interface; there are: eth0, wlan0");
        fs::write(host.sys.join("class/net/wlan0/operstate"), "up\n").unwrap();
        assert!(host.only_interface().unwrap_err().to_string().contains("name one: eth0, wlan0"));
        assert_eq!(down(&host, None, false).unwrap_err().to_string(), "there is no SoftRoCE device");
        let parent = host.sys.join("class/infiniband/rxe0/parent");
        fs::create_dir_all(parent.parent().unwrap()).unwrap();
        fs::write(parent, "eth0\n").unwrap();
        let error = down(&host, Some("eth1".into()), false).unwrap_err().to_string();
        assert!(error.ends_with("there are: rxe0 on eth0"), "{error}");
        let error = up(&host, Some("eth0".into()), Some("other".into())).unwrap_err().to_string();
        assert!(error.contains("eth0 carries rxe0 already"), "{error}");
    }
}
