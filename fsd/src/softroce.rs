//! SoftRoCE devices (`rdma_rxe`): found in `/sys`, made and removed by the kernel's RDMA netlink, as `rdma link add` does it.
//!
//! The netlink messages are those of `include/uapi/rdma/rdma_netlink.h`: a header, then attributes of length, kind and value,
//! each padded to four bytes. A request with NLM_F_ACK is answered by an error number, 0 for done.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use rustix::io::Errno;
use rustix::net::netlink::{self, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, sendto, socket_with};

/// The kernel's modules that a SoftRoCE device and its users need.
pub const MODULES: [&str; 3] = ["rdma_rxe", "rdma_ucm", "ib_uverbs"];

/// A device that SoftRoCE made of an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SoftDevice {
    /// Such as `rxe0`.
    pub name: String,
    /// The interface that carries it.
    pub interface: String,
}

/// Every SoftRoCE device below `sys`, which is `/sys`. Only rdma_rxe says what its devices' parents are.
pub fn devices(sys: &Path) -> Vec<SoftDevice> {
    let mut found: Vec<SoftDevice> = entries(&sys.join("class/infiniband"))
        .into_iter()
        .filter_map(|name| {
            let parent = fs::read_to_string(sys.join("class/infiniband").join(&name).join("parent")).ok()?;
            Some(SoftDevice { name, interface: parent.trim().to_string() })
        })
        .collect();
    found.sort_by(|a, b| a.name.cmp(&b.name));
    found
}

/// The names in a directory, in order; none when it is not there.
pub fn entries(directory: &Path) -> Vec<String> {
    let Ok(list) = fs::read_dir(directory) else { return Vec::new() };
    let mut names: Vec<String> = list.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// `rxe0`, or the next number that no device has.
pub fn free_name(sys: &Path) -> String {
    let taken = entries(&sys.join("class/infiniband"));
    (0..).map(|number| format!("rxe{number}")).find(|name| !taken.contains(name)).expect("numbers do not end")
}

/// The processes that have a device open, by number and name: those whose descriptors we may see.
pub fn users(device: &str) -> Vec<String> {
    let verbs = Path::new("/sys/class/infiniband_verbs");
    let nodes: Vec<PathBuf> = entries(verbs)
        .into_iter()
        .filter(|node| fs::read_to_string(verbs.join(node).join("ibdev")).is_ok_and(|name| name.trim() == device))
        .map(|node| Path::new("/dev/infiniband").join(node))
        .collect();
    let uses = |pid: &String| {
        let descriptors = format!("/proc/{pid}/fd");
        entries(Path::new(&descriptors))
            .iter()
            .any(|fd| fs::read_link(format!("{descriptors}/{fd}")).is_ok_and(|target| nodes.contains(&target)))
    };
    entries(Path::new("/proc"))
        .into_iter()
        .filter(|pid| pid.parse::<u32>().is_ok())
        .filter(uses)
        .map(|pid| {
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            format!("{} ({pid})", name.trim())
        })
        .collect()
}

/// Makes SoftRoCE device `name` of an interface.
///
/// # Errors
/// Why not, and what to do.
pub fn add(name: &str, interface: &str) -> anyhow::Result<()> {
    let mut request = Request::new(NEW_LINK, REQUEST | ACKNOWLEDGE);
    request.text(DEVICE_NAME, name).text(LINK_TYPE, "rxe").text(INTERFACE_NAME, interface);
    acknowledged(&request).map_err(|error| match error {
        Refusal::NoRdma => anyhow::anyhow!("{error}"),
        Refusal::Said(errno) => {
            let advice = match errno {
                Errno::PERM | Errno::ACCESS => "be root, or have CAP_NET_ADMIN",
                Errno::INVAL => "load the module rdma_rxe, and name an interface itself, not a VLAN on it",
                Errno::EXIST => "an RDMA device of that name or on that interface exists",
                Errno::NODEV => "there is no such interface",
                _ => "the kernel's log (dmesg) may tell more",
            };
            anyhow::anyhow!("{errno}; {advice}")
        }
    })
}

/// Removes the RDMA device `name`.
///
/// # Errors
/// Why not.
pub fn remove(name: &str) -> anyhow::Result<()> {
    let index = index_of(name)?.with_context(|| format!("the kernel knows no RDMA device {name}"))?;
    let mut request = Request::new(DELETE_LINK, REQUEST | ACKNOWLEDGE);
    request.number(DEVICE_INDEX, index);
    acknowledged(&request).map_err(|error| match error {
        Refusal::Said(Errno::PERM | Errno::ACCESS) => anyhow::anyhow!("{error}; be root, or have CAP_NET_ADMIN"),
        Refusal::Said(Errno::INVAL) => anyhow::anyhow!("{error}; it is no software device"),
        _ => anyhow::anyhow!("{error}"),
    })
}

/// By which number the kernel means a device.
fn index_of(name: &str) -> anyhow::Result<Option<u32>> {
    let request = Request::new(GET, REQUEST | DUMP);
    let mut found = None;
    exchange(&request, |kind, payload| {
        if kind != message_kind(GET) {
            return;
        }
        let (mut index, mut is_it) = (None, false);
        for (attribute, value) in attributes(payload) {
            match attribute {
                DEVICE_INDEX => index = value.try_into().ok().map(u32::from_ne_bytes),
                DEVICE_NAME => is_it = value.strip_suffix(&[0]).unwrap_or(value) == name.as_bytes(),
                _ => {}
            }
        }
        if is_it {
            found = index;
        }
    })
    .map_err(|error| anyhow::anyhow!("cannot list RDMA devices: {error}"))?;
    Ok(found)
}

// Numbers of rdma_netlink.h and netlink.h.
const NLDEV: u16 = 5;
const GET: u16 = 1;
const NEW_LINK: u16 = 3;
const DELETE_LINK: u16 = 4;
const DEVICE_INDEX: u16 = 1;
const DEVICE_NAME: u16 = 2;
const INTERFACE_NAME: u16 = 51;
const LINK_TYPE: u16 = 65;
const REQUEST: u16 = 0x1;
const ACKNOWLEDGE: u16 = 0x4;
const DUMP: u16 = 0x300;
const ERROR: u16 = 2;
const DONE: u16 = 3;
/// Bytes of a message's header: length, kind, flags, sequence number, port.
const HEADER: usize = 16;

fn message_kind(command: u16) -> u16 {
    (NLDEV << 10) + command
}

/// Why the kernel does not.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("this kernel has no RDMA loaded: load the module rdma_rxe (modprobe rdma_rxe)")]
    NoRdma,
    #[error("{0}")]
    Said(#[from] Errno),
}

struct Request(Vec<u8>);

impl Request {
    fn new(command: u16, flags: u16) -> Request {
        let mut bytes = vec![0; HEADER];
        bytes[4..6].copy_from_slice(&message_kind(command).to_ne_bytes());
        bytes[6..8].copy_from_slice(&flags.to_ne_bytes());
        Request(bytes)
    }
    fn attribute(&mut self, kind: u16, value: &[u8]) -> &mut Request {
        self.0.extend_from_slice(&(value.len() as u16 + 4).to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }
    fn text(&mut self, kind: u16, value: &str) -> &mut Request {
        self.attribute(kind, &[value.as_bytes(), &[0]].concat())
    }
    fn number(&mut self, kind: u16, value: u32) -> &mut Request {
        self.attribute(kind, &value.to_ne_bytes())
    }
    fn finished(&self) -> Vec<u8> {
        let mut bytes = self.0.clone();
        let length = bytes.len() as u32;
        bytes[..4].copy_from_slice(&length.to_ne_bytes());
        bytes
    }
}

fn acknowledged(request: &Request) -> Result<(), Refusal> {
    exchange(request, |_, _| {})
}

/// Sends a request and gives each answer to `each`, until the kernel says that it is done.
fn exchange(request: &Request, mut each: impl FnMut(u16, &[u8])) -> Result<(), Refusal> {
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, Some(netlink::RDMA))
        .map_err(|errno| if errno == Errno::PROTONOSUPPORT { Refusal::NoRdma } else { Refusal::Said(errno) })?;
    // A kernel that has the protocol and nobody behind it refuses the message.
    let kernel = SocketAddrNetlink::new(0, 0);
    sendto(&socket, &request.finished(), SendFlags::empty(), &kernel)
        .map_err(|errno| if errno == Errno::CONNREFUSED { Refusal::NoRdma } else { Refusal::Said(errno) })?;
    let mut buffer = vec![0; 64 << 10];
    loop {
        let (_, length) = recv(&socket, &mut buffer[..], RecvFlags::empty())?;
        for (kind, payload) in messages(&buffer[..length]) {
            let number = || payload.get(..4).and_then(|bytes| bytes.try_into().ok()).map_or(0, i32::from_ne_bytes);
            match kind {
                ERROR | DONE => {
                    return match number() {
                        0 => Ok(()),
                        number => Err(Refusal::Said(Errno::from_raw_os_error(-number))),
                    };
                }
                _ => each(kind, payload),
            }
        }
    }
}

/// Kind and payload of each message in what one call received; ends at what is cut off.
fn messages(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?) as usize;
        let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
        let payload = bytes.get(HEADER..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, payload))
    })
}

/// Kind and value of each attribute; ends at what is cut off.
fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?) as usize;
        let kind = u16::from_ne_bytes(bytes.get(2..4)?.try_into().ok()?);
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        // The two highest bits say how the value is made.
        Some((kind & 0x3fff, value))
    })
}

/// Loads the modules that are not there, by modprobe. What is built into the kernel is there.
///
/// # Errors
/// Which one, and what modprobe said.
pub fn load_modules(sys: &Path) -> anyhow::Result<()> {
    for module in MODULES {
        if sys.join("module").join(module).exists() {
            continue;
        }
        let output = std::process::Command::new("modprobe").arg(module).output();
        let output = match output {
            Ok(output) => output,
            Err(error) => {
                bail!("cannot load the module {module}: modprobe: {error}; install kmod, or load it otherwise")
            }
        };
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "cannot load the module {module}: {}", said.trim());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_laid_out_as_the_kernel_reads_them() {
        let mut request = Request::new(NEW_LINK, REQUEST | ACKNOWLEDGE);
        request.text(DEVICE_NAME, "rxe0").number(DEVICE_INDEX, 7);
        let bytes = request.finished();
        let all: Vec<_> = messages(&bytes).collect();
        assert_eq!(all.len(), 1);
        assert_eq!(all[0].0, 0x1403);
        assert_eq!(bytes.len(), 16 + 12 + 8);
        let list: Vec<_> = attributes(all[0].1).collect();
        assert_eq!(list, [(DEVICE_NAME, &b"rxe0\0"[..]), (DEVICE_INDEX, &7u32.to_ne_bytes()[..])]);
    }

    #[test]
    fn what_is_cut_off_ends_the_list() {
        let mut request = Request::new(GET, REQUEST);
        request.text(DEVICE_NAME, "a-device");
        let bytes = request.finished();
        for length in 0..bytes.len() {
            assert_eq!(messages(&bytes[..length]).count(), 0);
            assert!(attributes(bytes[HEADER..].get(..length).unwrap_or_default()).count() <= 1);
        }
        assert_eq!(attributes(&[0, 0, 0, 0]).count(), 0, "a length of nothing does not go round for ever");
    }

    #[test]
    fn devices_are_those_with_an_interface() {
        let sys = tempfile::tempdir().unwrap();
        assert!(devices(sys.path()).is_empty());
        assert_eq!(free_name(sys.path()), "rxe0");
        for (name, parent) in [("rxe0", Some("eth0\n")), ("mlx5_0", None)] {
            let directory = sys.path().join("class/infiniband").join(name);
            fs::create_dir_all(&directory).unwrap();
            if let Some(parent) = parent {
                fs::write(directory.join("parent"), parent).unwrap();
            }
        }
        assert_eq!(devices(sys.path()), [SoftDevice { name: "rxe0".into(), interface: "eth0".into() }]);
        assert_eq!(free_name(sys.path()), "rxe1");
    }
}
